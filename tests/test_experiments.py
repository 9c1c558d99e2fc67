"""Every experiment file trains at its mini size, survives the worst faults bit for bit, and exports."""

import pytest

from tests import drills
from vireo import config

SHORT = ["batch_size=2", "height=32", "width=32", "loader.workers=0"]
WORST = ["kill", "kill-save", "not-finite"]
# One experiment of each recipe is drilled whenever tests run, the others with the full matrix.
QUICK = ("taehv_seraena", "ip2p_video")


def experiments():
    full = pytest.mark.full
    return [pytest.param(name, marks=[] if name in QUICK else full, id=name) for name in config.experiments()]


@pytest.fixture(scope="module", params=experiments())
def drilled(request, tmp_path_factory):
    return drills.undisturbed([f"experiment={request.param}", *SHORT], tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("title", WORST)
def test_it_survives(drilled, title):
    drills.survives(drilled, title)


def test_it_exports_and_says_what_memory_it_takes(drilled):
    _, folder = drilled
    assert list((folder / "export").rglob("*.safetensors"))
    assert "total before activations" in (folder / "train.log").read_text()
