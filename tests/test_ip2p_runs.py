"""What a run of the video editor promises, from its first step to its exported pipeline."""

import json
import os
import re
import shutil
import signal
import sys

import pytest
import torch

from tests import edit_runs, runs
from vireo import cache, checkpoint, cli, config, digests, launch, objects
from vireo.models.image_encoders import ImageTextEncoder
from vireo.models.video_ip2p import VideoEditor
from vireo.sampling.video_ip2p_pipeline import VideoInstructPix2PixPipeline
from vireo.verbs import evaluate, prepare, sample, trained

CALM = ["validation.every=null", "validation.at_start=false", "validation.clips=1"]
SAMPLES = os.environ.get("VIREO_SAMPLE_DATA")
TEXT = ["model=ip2p_video_text", "freeze-policy=unet_text_encoder"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user")))
        digests._remembered.clear()
        yield [*edit_runs.world(tmp_path_factory.mktemp("world")), *edit_runs.SHORT]
    digests._remembered.clear()


@pytest.fixture(scope="module")
def plain(words, tmp_path_factory):
    """A finished run with the cache."""
    return runs.train(tmp_path_factory.mktemp("plain"), *words, shrunk=False)


@pytest.fixture
def vireo(words, tmp_path, monkeypatch, capfd):
    """vireo(flag or word, …) -> (exit code, what was printed) of `vireo train`, in this process; the words name data
    and weights only."""
    monkeypatch.setenv("VIREO_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(launch, "start", lambda resolved, launcher, held: abs(runs.work(resolved.parent)))

    def train(*more):
        base = [word for word in words if word not in edit_runs.SHORT]
        monkeypatch.setattr(sys, "argv", ["vireo", "train", *sorted([*base, *more], key=_is_no_flag)])
        capfd.readouterr()
        return cli.vireo(), "".join(capfd.readouterr())

    return train


def _is_no_flag(word):
    return not word.startswith("-")


def close(one, two):
    """Two runs' figures, of which measures of 8-bit pixels may round to their other neighbour."""
    first, second = runs.metrics(one), runs.metrics(two)
    assert len(first) == len(second) and first
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
        losses = {name for name in a if name.endswith("loss")}
        assert {n: a[n] for n in losses} == pytest.approx({n: b[n] for n in losses}, rel=1e-5)


def test_cached_and_uncached_runs_have_the_same_losses(words, plain, tmp_path):
    close(runs.train(tmp_path, *words, "cache=off", shrunk=False), plain)
    assert not (tmp_path / "cache").exists()
    assert "entries are missing" in (plain / "train.log").read_text()


def test_a_second_start_reads_no_weights_to_know_them(words, plain, monkeypatch):
    """Though the first one tried an export, wrote the best one and that of its end, with links to them."""
    read, original = [], digests._read
    monkeypatch.setattr(digests, "_read", lambda file: (read.append(file), original(file))[1])
    digests._remembered.clear()
    encoder = objects.encoder(config.load_resolved(plain / "resolved.yaml"))
    assert [encoder.identity(output) for output in encoder.outputs]
    assert not [file for file in read if file.endswith(".safetensors")]


def test_accumulation_equals_a_larger_batch(words, plain, tmp_path):
    close(runs.train(tmp_path, *words, "batch_size=1", "gradient_accumulation=2", shrunk=False), plain)


def test_five_steps_are_five_steps_however_many_epochs_they_are(words, tmp_path):
    folder = runs.train(tmp_path, *words, *CALM, "steps=5", "gradient_accumulation=2", shrunk=False)
    assert [row["step"] for row in runs.metrics(folder) if "loss" in row] == [1, 2, 3, 4, 5]
    found = checkpoint.latest(folder)
    assert found is not None and found.step == 5 and found.state["position"] == 5 * 4
    assert {int(moment) for name, moment in found.tensors("optimizer").items() if name.endswith("step")} == {5}


def test_one_clip_is_learnt_by_heart(words, tmp_path):
    more = ["steps=60", "batch_size=1", "validation.every=null", "validation.clips=1", "checkpoint.every=null"]
    folder = runs.train(tmp_path, *edit_runs.one_clip(words, tmp_path), *more, shrunk=False)
    start, end = (row["validation/loss"] for row in runs.metrics(folder) if "validation/loss" in row)
    assert end < 0.7 * start, "of the same noise at the same timesteps"


def test_a_text_encoder_learns_resumes_and_is_exported(words, tmp_path):
    more = [*TEXT, "steps=3", "checkpoint.every=2", "validation.clips=1", "validation.at_start=false"]
    straight = runs.train(tmp_path / "straight", *words, *more, shrunk=False)
    folder = runs.make(tmp_path / "killed", [*words, *more], shrunk=False)
    assert runs.work(folder, runs.die_at(2)) == -signal.SIGKILL
    assert runs.work(folder) == 0
    runs.same(folder, straight)
    network = checkpoint.latest(folder).tensors("network")
    pipeline = VideoInstructPix2PixPipeline.from_pretrained(folder / "export")
    start = objects.network(config.load_resolved(folder / "resolved.yaml")).state_dict()
    for part in ("unet", "text_encoder"):
        learnt = {n.removeprefix(f"{part}."): v for n, v in network.items() if n.startswith(f"{part}.")}
        exported = getattr(pipeline, part).state_dict()
        assert len(learnt) > 10 and all(torch.equal(exported[name], value) for name, value in learnt.items())
        assert any(not torch.equal(start[f"{part}.{name}"], value) for name, value in learnt.items()), part


def export_as_published():
    """Sabotage: the config of the exported UNet says 8 channels, as the published converter's."""
    export = VideoEditor.export

    def broken(self, folder, state):
        written = export(self, folder, state)
        config_file = folder / "unet" / "config.json"
        config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "in_channels": 8}))
        return written

    VideoEditor.export = broken


def test_a_run_whose_export_cannot_be_run_is_not_finished(words, tmp_path):
    folder = runs.make(tmp_path, [*words, *CALM, "steps=1"], shrunk=False)
    assert runs.work(folder, export_as_published) == 1
    assert "ValueError: Cannot load" in (folder / "train.log").read_text() and not (folder / "finished").exists()
    assert runs.work(folder) == 0 and (folder / "finished").exists()


@pytest.mark.skipif(not SAMPLES, reason="VIREO_SAMPLE_DATA names no folder with real clips")
def test_real_clips_from_their_conversion_to_the_evaluation(words, tmp_path, capsys):
    raw = [*words, f"paths.data={SAMPLES}/ip2p_sample/dataset_root", "height=24", "width=40", "precision=fp32"]
    assert prepare.main([*(word for word in raw if word not in edit_runs.SHORT), f"out={tmp_path}/dataset"]) == 0
    assert "train/drop_object/video_03: frame 13 missing" in capsys.readouterr().out
    given = [*raw, f"paths.data={tmp_path}/dataset", f"cache.folder={tmp_path}/cache"]
    straight = runs.train(tmp_path / "straight", *given, shrunk=False)
    folder = runs.make(tmp_path / "killed", given, shrunk=False)
    assert runs.work(folder, runs.die_at(3)) == -signal.SIGKILL
    assert runs.work(folder) == 0
    runs.same(folder, straight)
    assert sample.main([f"run={folder}", "clips=1", f"out={tmp_path}/shown"]) == 0
    assert (tmp_path / "shown" / "clip_000_roll_out.mp4").is_file()
    assert evaluate.main([f"run={folder}", f"out={tmp_path}/measured"]) == 0
    found = json.loads((tmp_path / "measured" / "metrics.json").read_text())
    assert found["clips"] == 6 and not found["missing"] and not found["unreadable"]
    validated = runs.metrics(folder)[-1]  # of the first two clips
    two = [row["changed_ssim"] for row in found["each"][:2]]
    assert validated["validation/changed_ssim"] == pytest.approx(sum(two) / 2, abs=1e-5)


def test_the_sanity_check_runs_the_experiment_that_is_asked_for(vireo, tmp_path):
    code, said = vireo("debug=sanity", "run=sane")
    assert code == 0 and "starting again from step 5" in said and "step 5 of 6" in said, said
    assert re.search(r"held-out loss on fixed draws: \S+ at step 0, \S+ at step 6", said)
    pipeline = VideoInstructPix2PixPipeline.from_pretrained(tmp_path / "ip2p_video" / "sane" / "export")
    assert pipeline.num_condition_frames == 20


def test_the_published_plans_sweep(vireo, tmp_path):
    short = ["steps=2", "validation.at_start=false", "validation.clips=1", "tracker=none", "loader.workers=0"]
    code, said = vireo("-m", "lr=5e-5,1e-4", "ema.decay=0,0.9999", *short)
    assert code == 0, said
    found = {}
    for path in (tmp_path / "ip2p_video").glob("*/resolved.yaml"):
        made = config.load_resolved(path)
        last = checkpoint.latest(path.parent)
        found[made["lr"], made["ema"]["decay"]] = (last.tensors("network"), last.tensors("ema"))
    assert found.keys() == {(lr, decay) for lr in (5e-5, 1e-4) for decay in (0.0, 0.9999)}
    for lr in (5e-5, 1e-4):
        (alone, none), (network, average) = found[lr, 0.0], found[lr, 0.9999]
        assert not none and average.keys() == network.keys()
        assert all(torch.equal(alone[name], network[name]) for name in network), "an average changes no training"
        assert any(not torch.equal(average[name], network[name]) for name in network)


def test_the_image_baseline_sees_the_last_frame_of_the_same_clips(words):
    image = ["experiment=ip2p_image", *(w for w in words if w.partition("=")[0] not in ("experiment", "num_frames"))]
    for split in ("train", "validation"):
        one, twenty = (objects.dataset(config.settings(chosen), split) for chosen in (image, words))
        assert [clip.name for clip in one.clips] == [clip.name for clip in twenty.clips]
        assert one.target_frame == twenty.target_frame == 20
        assert one.condition_frames == [19] and twenty.condition_frames == list(range(20))


CHANGES = ["lr=1e-4", "warmup_steps=3", "seed=1", "batch_size=1", "gradient_accumulation=2", "max_grad_norm=0.01"]
CHANGES += ["num_frames=3", "height=24", "width=24", "precision=bf16", "ema.decay=0.5", "schedule=cosine"]
CHANGES += ["loss.condition_dropout=0.3", "loss.history_dropout=1", "optimizer.weight_decay=0.5", "cache.enabled=false"]
CHANGES += ["freeze_policy.groups.conv_in.lr_scale=10", "model.noise_schedule.prediction_type=v_prediction"]
CHANGES += ["model.sampler.num_inference_steps=3", "model.sampler.text_guidance=1", "model.sampler.image_guidance=3"]
CHANGES += [
    "model.encoder.dtype=bf16",
    "data.held_out=[test]",
    "data.target_frame=19 data.condition_frames=[0] num_frames=1",
]


@pytest.mark.full
@pytest.mark.parametrize("change", CHANGES)
def test_every_key_does_something(words, plain, tmp_path, change):
    changed = runs.train(tmp_path, *words, *change.split(), shrunk=False)
    if change.startswith("cache"):  # whose only effect is that nothing is kept
        assert not (tmp_path / "cache").exists()
    else:
        assert runs.metrics(changed) != runs.metrics(plain)


def test_eight_bit_moments_without_a_gpu_are_a_mistake(words, tmp_path):
    folder = runs.make(tmp_path, [*words, "optimizer.moments=8bit"], shrunk=False)
    assert runs.work(folder) == 2
    log = (folder / "train.log").read_text()
    assert "GPU" in log and "Traceback" not in log


def test_an_evaluation_encodes_nothing_that_is_cached(plain, tmp_path, monkeypatch, capsys):
    def encode(*args):
        raise AssertionError("was encoded again")

    monkeypatch.setattr(ImageTextEncoder, "encode", encode)
    assert evaluate.main([f"run={plain}", "model.evaluations=null", f"out={tmp_path}"]) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said[said.index("by task") :].splitlines()[2:]]
    assert ["drop_object", "2", "copy-last", "-"] in [row[:4] for row in rows]
    settings = config.load_resolved(plain / "resolved.yaml")
    encoder = objects.encoder(settings)
    batch = trained.held_out(settings, encoder).batch([0, 1], torch.device("cpu"))
    assert {"frames", "frame_moments", "target", "prompt_embeds"} <= batch.keys()
    assert len(list(cache.entries(plain.parents[1] / "cache"))) == 6 * 21 + 6 + 1


def test_a_held_out_clip_that_cannot_be_read_is_marked_and_never_replaced(plain, words, tmp_path, capsys):
    [given] = [word.partition("=")[2] for word in words if word.startswith("paths.data=")]
    data = shutil.copytree(given, tmp_path / "data")
    damaged = data / edit_runs.HELD_OUT[1] / "20.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    told = [f"run={plain}", f"paths.data={data}", f"out={tmp_path}"]
    assert evaluate.main([*told, "model.sampler.num_inference_steps=1"]) == 0
    said, found = capsys.readouterr().out, json.loads((tmp_path / "metrics.json").read_text())
    assert f"2 held-out clips, weights: {plain}" in said and f"left out: {damaged}: frame 20 of" in said
    scored, marked = found["each"][:2], found["each"][2]
    assert found["clips"] == 2 and [row["clip"] for row in scored] == [edit_runs.HELD_OUT[0], edit_runs.HELD_OUT[2]]
    assert marked == {**dict.fromkeys(scored[0]), "clip": str(damaged)} and list(found["unreadable"]) == [str(damaged)]
    assert found["mean"]["psnr"] == pytest.approx(sum(row["psnr"] for row in scored) / 2)
    assert set(found["shown"].values()) == {row["clip"] for row in scored}
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(lines) == 4 and lines[-1].startswith(str(damaged)) and set(lines[-1].removeprefix(str(damaged))) == {","}
    assert sample.main([*told, "clips=3", "model.sampler.num_inference_steps=1"]) == 0
    said = capsys.readouterr().out
    assert f"clip 1 is left out: {damaged}: frame 20" in said and not list(tmp_path.glob("clip_001*"))
    assert list(tmp_path.glob("clip_002_roll_out*"))
