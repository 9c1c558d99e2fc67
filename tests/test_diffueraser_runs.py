"""Both stages of DiffuEraser as one chain on real frames: killed in each, gone on with, exported and read back."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from PIL import Image
from safetensors.torch import load_file

from tests import runs
from vireo import cli, config, launch, objects, run_folder
from vireo.data.masks import dilate, read_hole
from vireo.errors import UserError
from vireo.mini import world
from vireo.models.brushnet import BrushNetModel

SAMPLES = os.environ.get("VIREO_SAMPLE_DATA")
SHORT = ["steps=4", "checkpoint.every=2", "validation.every=null", "validation.at_start=false", "validation.clips=1"]
SHORT += ["logging.every=1", "tracker=none", "loader.workers=0", "height=32", "width=32", "precision=fp32"]
SHORT += ["model.encoder.dtype=fp32", "model.sampler.num_inference_steps=1", "data.validation_size=crop"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def annotated(davis: Path) -> float:
    """How much of the first frames of the first held-out video is hole."""
    name = (davis / "ImageSets/2017/val.txt").read_text().split()[0]
    masks = davis / "Annotations/480p" / name
    return float(dilate(read_hole(masks, range(3), len(list(masks.iterdir()))), 4).float().mean())


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def spatial(state):
    return {name: value for name, value in state.items() if "motion_modules" not in name}


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLES, reason="VIREO_SAMPLE_DATA names no folder with real frames")
def test_the_chain_on_real_frames(tmp_path, monkeypatch, capfd):
    samples = Path(SAMPLES or "")
    words = ["experiment=diffueraser", "size=full", f"paths.weights={world.ensure() / 'weights'}", *SHORT]
    words += [
        f"paths.data={samples}",
        f"data.davis={samples / 'davis_sample'}",
        f"data.ytvos={samples / 'ytvos_sample'}",
    ]
    words += ["num_frames=3", "batch_size=2", "lr=1e-3", "run=real", f"paths.outputs={tmp_path}"]
    words += ["chain.stage1.validation.at_start=true", "chain.stage1.data.validation_size=native"]
    deadly = ["real-stage1", "real-stage2"]

    def killed_once(resolved, launcher, held):
        doomed = resolved.parent.name in deadly and deadly.pop(0)
        return abs(runs.work(resolved.parent, runs.die_at(3) if doomed else None, timeout=300))

    monkeypatch.setattr(launch, "start", killed_once)
    codes = []
    for _ in range(3):
        monkeypatch.setattr(sys, "argv", ["vireo", "train", *words])
        codes.append(cli.vireo())
    assert codes == [signal.SIGKILL, signal.SIGKILL, 0], capfd.readouterr()
    first, second = (folder / "export" for folder in run_folder.stages(tmp_path / "diffueraser" / "real").values())
    (row,) = (row for row in runs.metrics(first.parent) if "validation/hole_psnr" in row and row["step"] == 0)
    assert row["validation/hole_fraction"] == pytest.approx(annotated(samples / "davis_sample"), rel=0.01)
    shown = first.parent / "samples" / "step_00000000"
    assert {path.name for path in shown.iterdir()} == {f"clip_000.{end}" for end in ("gif", "mp4", "png")}
    with Image.open(shown / "clip_000.gif") as gif:
        assert gif.n_frames == 3 and gif.height >= 240, "as large as the video"
    stage1, stage2 = first / "finetuned-stage1", second / "finetuned-stage2"
    for kind, folder in (
        (UNet2DConditionModel, stage1 / "unet_main"),
        (BrushNetModel, stage1 / "brushnet"),
        (UNetMotionModel, stage2 / "unet_main"),
        (BrushNetModel, stage2 / "brushnet"),
        (MotionAdapter, second / "motion_adapter"),
    ):
        _, report = kind.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), (folder, report)
    assert equal(weights(stage2 / "brushnet"), weights(stage1 / "brushnet"))
    assert equal(spatial(weights(stage2 / "unet_main")), weights(stage1 / "unet_main"))
    released = world.ensure() / "weights" / "diffuEraser"
    assert not equal(weights(stage1 / "brushnet"), weights(released / "brushnet"))
    moved = weights(second / "motion_adapter")
    assert not equal(moved, weights(released.parent / "animatediff-motion-adapter-v1-5-2"))
    settings = config.load_resolved(second.parent / "resolved.yaml")
    for source, stage in ((first.parent, stage1), (second.parent, stage2), (tmp_path / "diffueraser" / "real", stage2)):
        began = objects.network({**settings, "init_from": str(source)})
        wanted = weights(stage / "unet_main")
        unet = {name: value for name, value in began.unet.state_dict().items() if name in wanted}
        assert equal(unet, wanted) and equal(began.brushnet.state_dict(), weights(stage / "brushnet")), source
    with pytest.raises(UserError, match="Start from an export"):  # beside another base than the first stage's
        objects.network({**settings, "init_from": str(second.parent / "checkpoints" / "step_00000004")})
    monkeypatch.setattr(sys, "argv", ["vireo", "export", f"run={tmp_path / 'diffueraser' / 'real'}", "step=2"])
    assert cli.vireo() == 0
    earlier = second / "step_00000002" / "finetuned-stage2"
    assert equal(weights(earlier / "brushnet"), weights(stage1 / "brushnet"))
    assert not equal(weights(earlier / "unet_main"), weights(stage2 / "unet_main"))
