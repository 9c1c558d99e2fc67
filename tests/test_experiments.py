"""Every experiment file trains at its mini size, survives faults bit for bit, and exports."""

import pytest

from tests import drills
from tests.recipes import RECIPES
from vireo import drill

WORST = ("kill", "kill-save", "not-finite")  # drilled whenever tests run; the full matrix has every fault


def recipes():
    """Those that are quick are drilled whenever tests run (taehv with every fault, in test_drill.py)."""
    return [
        pytest.param(name, marks=[] if recipe.quick and name != "taehv" else pytest.mark.full)
        for name, recipe in RECIPES.items()
    ]


def titles():
    return [pytest.param(fault.title, marks=[] if fault.title in WORST else pytest.mark.full) for fault in drill.FAULTS]


@pytest.fixture(scope="module", params=recipes())
def drilled(request, tmp_path_factory):
    words = [f"experiment={request.param}", *RECIPES[request.param].words, "batch_size=2", "loader.workers=0"]
    return drills.undisturbed(words, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("title", titles())
def test_it_survives(drilled, title):
    settings, folder = drilled
    if title.endswith("-loader"):  # which changes nothing else: the undisturbed run had none
        settings = {**settings, "loader": {**settings["loader"], "workers": 1}}
    drills.survives((settings, folder), title)


def test_it_exports_and_says_what_memory_it_takes(drilled):
    _, folder = drilled
    assert list((folder / "export").rglob("*.safetensors"))
    assert "total before activations" in (folder / "train.log").read_text()
