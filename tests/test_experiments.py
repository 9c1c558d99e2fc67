"""Every experiment file trains at its mini size, survives a kill bit for bit, and exports."""

import signal

import pytest
import torch

from tests import runs
from vireo import checkpoint, config
from vireo.mini import world

SHORT = ["steps=4", "checkpoint.every=2", "validation.every=null", "validation.clips=1", "logging.every=1"]
SHORT += ["batch_size=2", "tracker=none", "loader.workers=0"]
SMALL = ["height=32", "width=32"]
# Of the eight of CogVideoX these two differ in everything that the others do; encodings are made as they are needed.
OF_COGVIDEOX = ("cogvideox_t2v_lora", "cogvideox15_i2v_sft")
COGVIDEOX = ["cache=off", "model.sampler.num_inference_steps=2"]


def _experiments():
    for name in config.experiments():
        is_like_others = name.startswith("cogvideox") and name not in OF_COGVIDEOX
        yield pytest.param(name, marks=pytest.mark.full) if is_like_others else name


@pytest.mark.parametrize("experiment", list(_experiments()))
def test_it_trains_and_resumes_exactly(experiment, tmp_path):
    world.ensure()
    words = [f"experiment={experiment}", *SHORT, *(COGVIDEOX if experiment.startswith("cogvideox") else SMALL)]
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
