"""The smoke version of benchmarks/learn.py, and the precisions."""

import pytest

from tests import runs
from vireo.mini import world


@pytest.mark.slow
def test_fine_tuning_the_shipped_student_gains_at_once(tmp_path):
    world.ensure()
    words = ["experiment=taehv", "steps=50", "validation.every=null", "validation.clips=8", "tracker=none"]
    folder = runs.train(tmp_path, *words, "loader.workers=0", shrunk=False)
    start, end = (row for row in runs.metrics(folder) if "validation/psnr" in row)
    assert start["validation/psnr"] > start["validation/8x down and up/psnr"] > start["validation/mean colour/psnr"]
    assert end["validation/psnr"] > start["validation/psnr"] + 0.3


@pytest.mark.slow
def test_a_network_that_knows_nothing_begins_to_fill_holes(tmp_path):
    world.ensure()
    words = ["experiment=diffueraser_stage1", "steps=40", "warmup_steps=5", "batch_size=4", "validation.every=null"]
    words += ["validation.clips=2", "model.sampler.num_inference_steps=1", "validation.gif=false", "ema.decay=0"]
    folder = runs.train(tmp_path, *words, "tracker=none", "loader.workers=0", shrunk=False)
    start, end = (row["validation/loss"] for row in runs.metrics(folder) if "validation/loss" in row)
    assert end < 0.8 * start


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_resumes_and_stays_close_to_full(tmp_path, precision):
    world.ensure()
    words = ["lr=1e-3", "warmup_steps=1"]
    full = runs.metrics(runs.train(tmp_path / "full", *words))
    folder = runs.make(tmp_path / "half", [*words, f"precision={precision}"])
    assert runs.work(folder, runs.die_at(5)) < 0
    assert runs.work(folder) == 0
    half = runs.metrics(folder)
    assert half[-1]["validation/psnr"] == pytest.approx(full[-1]["validation/psnr"], abs=0.5)
    assert half == runs.metrics(runs.train(tmp_path / "undisturbed", *words, f"precision={precision}"))
