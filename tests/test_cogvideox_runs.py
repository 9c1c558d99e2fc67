"""What runs of CogVideoX promise beyond those of any recipe: shapes and folders that are drawn, and real clips.

The latter train the mini world's networks on `cogvideox_sample`, of which nothing is committed.
"""

import os
import shutil
import signal
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

from tests import runs
from tests.data import captions
from tests.golden.fill import noise
from vireo import checkpoint, config, objects, worker
from vireo.mini import world
from vireo.models.cogvideox import CogVideoX
from vireo.verbs import arguments, check, prepare, sample, trained

QUIET = ["logging.every=1", "tracker=none", "loader.workers=0", "model.sampler.num_inference_steps=2"]
SAMPLES = os.environ.get("VIREO_SAMPLE_DATA")
REAL = ["size=mini", "num_frames=17", "height=128", "width=192", "batch_size=1"]
REAL += [f"paths.data={SAMPLES}/cogvideox_sample"]
# The small 5B-I2V has learnt positions of 64x64 pixels, as the real one has of 480x720.
OTHER_SIZE = ["model.network.learned_positions=false", "adapter.export=merged"]
KINDS = {
    "cogvideox_t2v_lora": [],
    "cogvideox_t2v_sft": [],
    "cogvideox15_i2v_lora": ["adapter.alpha=32", "model.encoder.image_variants=2"],
    "cogvideox_i2v_lora": OTHER_SIZE,
}


def resumed(outputs, words):
    """A run that was killed in step 3 of 6 and went on from step 2."""
    folder = runs.make(outputs, words, shrunk=False)
    assert runs.work(folder, runs.die_at(3), timeout=600) == -signal.SIGKILL, (folder / "train.log").read_text()
    return finished(folder)


def finished(folder):
    assert runs.work(folder, timeout=600) == 0, (folder / "train.log").read_text()
    return folder


def test_drawn_shapes_and_folders_resume_exactly(tmp_path):
    world.ensure()
    data = tmp_path / "data"
    for name, size, lengths in (("wide", (32, 48), [20, 9, 12]), ("tall", (48, 32), [9, 20]), ("held", (32, 32), [9])):
        captions.write(data / name, lengths, size)
    words = ["experiment=cogvideox_t2v_lora", "size=mini", f"paths.data={data}", "data.validation=held", *QUIET]
    words += ["data.mix={wide: 1, tall: 3}", "data.buckets=[[9,32,48],[9,48,32],[17,32,48]]", "height=32", "width=32"]
    words += ["batch_size=2", "steps=6", "checkpoint.every=2", "validation.every=null", "validation.clips=1"]
    straight = finished(runs.make(tmp_path / "straight", words, shrunk=False))
    runs.same(resumed(tmp_path / "killed", words), straight)
    settings, found = config.load_resolved(straight / "resolved.yaml"), checkpoint.latest(straight)
    for source in (straight, found.folder):  # a finished run is its export
        began = objects.network({**settings, "init_from": str(source)}).state_dict()
        assert all(torch.equal(began[name], value) for name, value in found.tensors("network").items()), source


def note_loaded_parts():
    """Writes which of the encoder's networks each validation leaves in memory."""
    validate = worker.Run.validate

    def noted(run, step):
        figures = validate(run, step)
        loaded = [part for part in run.encoder.parts if part in vars(run.encoder)]
        (run.folder / f"loaded_{step}").write_text(" ".join(loaded))
        return figures

    worker.Run.validate = noted


@pytest.mark.parametrize(("kind", "left"), [("t2v", ""), ("i2v", "loaded_vae")])
def test_validation_leaves_nothing_in_memory_that_steps_do_not_need(kind, left, tmp_path):
    """Its sampler decodes; the exact noise on pictures needs the VAE at every step."""
    world.ensure()
    data = captions.write(tmp_path / "data", [9, 9, 9], (64, 64))
    words = [f"experiment=cogvideox_{kind}_lora", "size=mini", f"paths.data={data}", "data.validation=null", *QUIET]
    words += ["data.held_out=0.4", "batch_size=1", "steps=1", "validation.clips=1"]
    folder = runs.make(tmp_path, words, shrunk=False)
    assert runs.work(folder, note_loaded_parts) == 0, (folder / "train.log").read_text()
    assert {(folder / f"loaded_{step}").read_text() for step in (0, 1)} == {left}


def through_a_pipeline(folder, settings):
    """What training's network gives, and what diffusers' pipeline of the same weights with the export gives."""
    base = settings["model"]["pipeline"]
    image = "image_latents" in settings["model"]["inputs"]
    made = (diffusers.CogVideoXImageToVideoPipeline if image else diffusers.CogVideoXPipeline).from_pretrained(base)
    if (folder / "export" / "transformer").is_dir():
        made.transformer = diffusers.CogVideoXTransformer3DModel.from_pretrained(folder / "export" / "transformer")
    else:
        made.load_lora_weights(folder / "export")
    frames = 6 if made.transformer.config.patch_size_t else 5
    given = {"noisy": noise("x", 1, 16, frames, 16, 24), "timesteps": torch.tensor([600])}
    given["prompt_embeds"] = noise("text", 1, 24, 32)
    if image:
        given["image_latents"] = noise("image", 1, 16, 1, 16, 24)
    network, _ = trained.network(arguments.read([f"run={folder}"], ()))
    bare = CogVideoX(base, "fp32").eval()
    bare.transformer, bare.config = made.transformer, made.transformer.config
    with torch.no_grad():
        return network(**given), bare(**given), CogVideoX(base, "fp32", learned_positions=False)(**given)


@pytest.mark.full
@pytest.mark.skipif(not SAMPLES, reason="VIREO_SAMPLE_DATA names no folder with real clips")
@pytest.mark.parametrize("kind", KINDS)
def test_real_clips_from_the_first_step_to_the_pipeline(kind, tmp_path, capsys):
    world.ensure()
    words = [f"experiment={kind}", *REAL, *KINDS[kind], *QUIET, "steps=6", "checkpoint.every=2"]
    words += ["validation.every=null", "validation.at_start=false", f"cache.folder={tmp_path}/cache"]
    assert check.main(words) == 0
    assert "videos/toy_ship.mp4: frames 0 to 32 of 49" in capsys.readouterr().out
    straight = finished(runs.make(tmp_path / "straight", words, shrunk=False))
    runs.same(resumed(tmp_path / "killed", words), straight)
    ours, theirs, base = through_a_pipeline(straight, config.load_resolved(straight / "resolved.yaml"))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, base, atol=1e-4), "something was learnt"
    by_hand = [f"run={straight}", "prompt=A toy ship on a blue carpet"]
    if "i2v" in kind:
        by_hand.append(f"image={SAMPLES}/cogvideox_sample/images/kitten.png")
    assert sample.main(by_hand) == 0
    assert (straight / "samples" / "by_hand" / "clip_000_result.mp4").is_file()


@pytest.mark.full
@pytest.mark.skipif(not SAMPLES, reason="VIREO_SAMPLE_DATA names no folder with real clips")
def test_first_frames_of_real_clips(tmp_path, capsys):
    data = Path(str(SAMPLES)) / "cogvideox_sample"
    own = shutil.copytree(data, tmp_path / "own", ignore=shutil.ignore_patterns("images*"))
    words = ["experiment=cogvideox15_i2v_lora", *REAL[:-1], f"paths.data={own}", f"data.validation={data}/validation"]
    assert prepare.main(words) == 0
    assert "4 first frames" in capsys.readouterr().out
    assert (own / "images.txt").read_text().splitlines() == (data / "images.txt").read_text().splitlines()
    for name in ("kitten", "horse"):
        one, two = (Image.open(folder / "images" / f"{name}.png").convert("RGB") for folder in (own, data))
        assert one.tobytes() == two.tobytes(), "the clip's first frame, pixel by pixel"
    assert check.main([*words, "data.image=listed"]) == 0
