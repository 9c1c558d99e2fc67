"""The verb on the mini world, in this process; tests/test_launch.py runs it as a command on a trained run."""

import csv
import json

import pytest
import torch
from tests import runs

from vireo.errors import UserError
from vireo.mini import world
from vireo.models.teachers import Teacher
from vireo.verbs import evaluate

FAST = ["model.evaluations.speed.num_frames=8", "+model.evaluations.speed.repeats=1"]
FAST += ["model.evaluations.full_resolution.clips=1", "model.evaluations.full_resolution.max_frames=9"]
TEACHER = [*runs.TINY, "experiment=taehv_seraena"]


@pytest.fixture(autouse=True)
def mini_world():
    world.ensure()


def test_everything_is_measured_shown_and_written(tmp_path, capsys):
    assert evaluate.main([*TEACHER, *FAST, "clips=4", f"out={tmp_path}"]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["missing"] == [] and found["clips"] == len(found["each"]) == 4 and found["device"] == "cpu"
    assert list(found["evaluations"]) == ["phases", "perceptual", "full_resolution", "speed"]
    said = capsys.readouterr().out
    for name, rows in found["evaluations"].items():
        assert name.replace("_", " ") in said and rows
    assert "not measured: alexnet" in said
    columns = {row["column"] for row in found["evaluations"]["phases"]}
    assert columns == {"teacher", "prediction", "own latents", "tiny to teacher", "mean colour", "8x down and up"}
    assert {"mse", "flicker", "pooled_psnr", "teacher/mse", "latent_r2"} <= found["mean"].keys()

    psnr = {row["clip"]: row["psnr"] for row in found["each"]}
    ranking = sorted(psnr, key=lambda name: psnr[name])
    assert [found["shown"][f"worst_{place}"] for place in (1, 2, 3)] == ranking[:3]
    assert [found["shown"][f"best_{place}"] for place in (1, 2, 3)] == ranking[:0:-1]
    shown = {f"{title}_{place}.{kind}" for title in ("worst", "best") for place in (1, 2, 3) for kind in ("mp4", "png")}
    assert {path.name for path in tmp_path.iterdir()} == shown | {
        *("full_000.mp4", "full_000.png", "metrics.csv", "metrics.json", "psnr_by_frame.png")
    }
    with open(tmp_path / "metrics.csv") as file:
        assert [float(row["psnr"]) for row in csv.DictReader(file)] == list(psnr.values())


@pytest.mark.parametrize("when", ["while clips are scored", "in the last evaluation"])
def test_a_teacher_that_fails_fails_the_evaluation(when, tmp_path, monkeypatch):
    decode = Teacher.decode

    def broken(self, latents):
        if when == "while clips are scored" or latents.shape[2] == 2:  # as many as 8 frames have
            raise RuntimeError("the teacher is broken")
        return decode(self, latents)

    monkeypatch.setattr(Teacher, "decode", broken)
    with pytest.raises(RuntimeError, match="the teacher is broken"):
        evaluate.main([*TEACHER, *FAST, "clips=1", f"out={tmp_path}"])
    if when == "in the last evaluation":  # what was done is kept, and what was not is named
        found = json.loads((tmp_path / "metrics.json").read_text())
        assert found["missing"] == ["speed"] and "phases" in found["evaluations"]
    else:
        assert not (tmp_path / "metrics.json").exists()


def test_a_run_is_evaluated_in_its_own_precision(tmp_path):
    words = ["steps=1", "validation.every=1", "validation.at_start=false", "precision=bf16"]
    folder = runs.train(tmp_path, *words)
    figures = {}
    for precision in ("bf16", "fp32"):
        further = ["clips=2", "model.evaluations=null", f"precision={precision}", f"out={tmp_path / precision}"]
        assert evaluate.main([f"run={folder}", *further]) == 0
        figures[precision] = json.loads((tmp_path / precision / "metrics.json").read_text())["mean"]["psnr"]
    validated = runs.metrics(folder)[-1]["validation/psnr"]
    assert figures["bf16"] == pytest.approx(validated, abs=1e-6) != figures["fp32"]


def test_an_infinite_psnr_is_null_in_a_clips_row():
    measures = {"psnr": 100.0, "teacher/pooled_psnr": 100.0, "ssim": 1.0, "temporal_psnr": 99.9}
    honest = {"psnr": None, "teacher/pooled_psnr": None, "ssim": 1.0, "temporal_psnr": 99.9}
    assert evaluate._honest(measures) == honest


def test_mistakes_are_told(tmp_path):
    words = [*runs.TINY, "clips=1", f"out={tmp_path}"]
    with pytest.raises(UserError, match="metric=fid is not measured; there are loss, psnr"):
        evaluate.main([*words, "validation.metric=fid"])
    with pytest.raises(UserError, match="is '/gone.pth', which does not exist"):
        evaluate.main([*words, "model.evaluations.perceptual.alexnet=/gone.pth"])
    assert not list(tmp_path.iterdir()), "before anything is measured"


def test_an_evaluation_can_be_left_out(tmp_path):
    words = [*runs.TINY, "clips=1", f"out={tmp_path}", "model.evaluations.speed=null"]
    assert evaluate.main([*words, "model.evaluations.full_resolution=null"]) == 0
    assert list(json.loads((tmp_path / "metrics.json").read_text())["evaluations"]) == ["phases", "perceptual"]


def test_averaged_weights_are_measured(tmp_path, capsys):
    run = runs.train(tmp_path / "outputs", "steps=2", "validation.every=null", "validation.clips=1")
    assert evaluate.main([f"run={run}", "clips=1", "model.evaluations={}"]) == 0
    assert "(averaged)" in capsys.readouterr().out and (run / "evaluation" / "worst_1.mp4").exists()
    assert torch.is_grad_enabled()
