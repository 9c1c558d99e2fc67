"""Every experiment file trains at its mini size, survives a kill bit for bit, and exports."""

import signal

import pytest
import torch

from tests import runs
from vireo import checkpoint, config
from vireo.mini import world

SHORT = ["steps=4", "checkpoint.every=2", "validation.every=null", "validation.clips=1", "logging.every=1"]
SHORT += ["batch_size=2", "height=32", "width=32", "tracker=none", "loader.workers=0"]


ALONE = [name for name in config.experiments() if not config.settings([f"experiment={name}"])["chain"]]


@pytest.mark.parametrize("experiment", ALONE)
def test_it_trains_and_resumes_exactly(experiment, tmp_path):
    world.ensure()
    words = [f"experiment={experiment}", *SHORT]
    undisturbed = runs.train(tmp_path / "undisturbed", *words, shrunk=False)
    folder = runs.make(tmp_path / "killed", words, shrunk=False)
    assert runs.work(folder, runs.die_at(3)) == -signal.SIGKILL
    assert checkpoint.steps(folder) == [2]
    assert runs.work(folder) == 0
    assert runs.metrics(folder) == runs.metrics(undisturbed)
    one, two = checkpoint.latest(undisturbed), checkpoint.latest(folder)
    assert one is not None and two is not None and one.step == two.step == 4
    for part in ("network", "optimizer", "ema", "loss"):
        first, second = one.tensors(part), two.tensors(part)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), part
    assert list((folder / "export").rglob("*.safetensors"))
    assert "total before activations" in (folder / "train.log").read_text()
