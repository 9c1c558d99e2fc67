"""OpenS2V on its published sample, a real clip with real annotations: every verb, a kill, and what is learnt of it."""

import os
import signal
from pathlib import Path

import pytest
import torch

from tests import runs
from vireo import config, objects
from vireo.mini import world
from vireo.verbs import check, evaluate, export, prepare, sample

SAMPLES = os.environ.get("VIREO_SAMPLE_DATA")


@pytest.mark.full
@pytest.mark.skipif(not SAMPLES, reason="VIREO_SAMPLE_DATA names no folder with real clips")
def test_a_real_clip_from_its_annotations_to_a_video(tmp_path, capsys, monkeypatch):
    """One clip, annotated three times, which a network of half a million parameters learns by heart in 60 steps."""
    world.ensure()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    data = Path(SAMPLES or "") / "opens2v_sample"
    words = ["experiment=opens2v_wan", "size=mini", f"paths.data={data}", "data.held_out=same"]
    assert check.main(words) == prepare.main(words) == 0
    assert "dataset1_cluster: 2 entries" in capsys.readouterr().out
    words += ["steps=60", "lr=2e-3", "batch_size=3", "checkpoint.every=30", "validation.every=null"]
    words += ["validation.clips=2", "tracker=none", "loader.workers=0", "model.sampler.num_inference_steps=2"]
    folder = runs.make(tmp_path, [*words, f"cache.folder={tmp_path}/cache"], shrunk=False)
    assert runs.work(folder, runs.die_at(35), timeout=600) == -signal.SIGKILL, (folder / "train.log").read_text()
    assert runs.work(folder, timeout=600) == 0, (folder / "train.log").read_text()
    assert "step 30 of 60" in (folder / "train.log").read_text()
    first, *_, last = (row for row in runs.metrics(folder) if "validation/loss" in row)
    assert last["validation/loss"] < 0.9 * first["validation/loss"]
    assert first["validation/reference_gain"] == 0 < last["validation/reference_gain"]
    (picture, *_) = sorted(data.glob("demo_result/step5/final_output/dataset1/foreground/*.png"))
    given = [f"run={folder}", "prompt=A woman walks through a room", f"reference={picture}", "name=woman"]
    assert sample.main([*given, f"out={tmp_path}/videos"]) == 0
    assert (tmp_path / "videos" / "woman.mp4").is_file()
    assert evaluate.main([f"run={folder}", "clips=2"]) == export.main([f"run={folder}", "step=30"]) == 0
    assert "reference gain" in capsys.readouterr().out
    settings = config.load_resolved(folder / "resolved.yaml")
    ended, earlier = (
        objects.network({**settings, "init_from": str(source)}).clip_proj.proj[1].weight
        for source in (folder, folder / "export" / "step_00000030")
    )
    assert not torch.equal(ended, earlier)
