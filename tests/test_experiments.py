"""Every experiment file trains at its mini size, survives faults bit for bit, and exports."""

import pytest

from tests import drills
from tests.recipes import RECIPES
from vireo import drill
from vireo.mini import world

WORST = (
    "kill",
    "kill-save",
)  # drilled whenever tests run, with a loss that is not finite; the full matrix has every fault


def recipes():
    """Those that are quick are drilled whenever tests run (taehv with every fault, in test_drill.py)."""
    return [
        pytest.param(name, marks=[] if recipe.quick and name != "taehv" else pytest.mark.full)
        for name, recipe in RECIPES.items()
    ]


def titles():
    return [pytest.param(fault.title, marks=[] if fault.title in WORST else pytest.mark.full) for fault in drill.FAULTS]


def words(name):
    return [f"experiment={name}", *RECIPES[name].words, "batch_size=2", "loader.workers=0"]


@pytest.fixture(scope="module", params=recipes())
def drilled(request, tmp_path_factory):
    return drills.undisturbed(words(request.param), tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("title", titles())
def test_it_survives(drilled, title):
    settings, folder = drilled
    if title.endswith("-loader"):  # which changes nothing else: the undisturbed run had none
        settings = {**settings, "loader": {**settings["loader"], "workers": 1}}
    drills.survives((settings, folder), title)


@pytest.mark.parametrize("name", recipes())
def test_a_loss_that_is_not_finite_on_one_rank_of_two_is_skipped_by_both(name, tmp_path):
    world.ensure()
    drills.two_ranks(words(name), tmp_path, "not-finite")


def test_it_exports_and_says_what_memory_it_takes(drilled):
    _, folder = drilled
    assert list((folder / "export").rglob("*.safetensors"))
    assert "total before activations" in (folder / "train.log").read_text()
