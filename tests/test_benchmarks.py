"""What benchmarks conclude from what they measured."""

import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
PAIRED = runpy.run_path(str(FOLDER / "paired.py"))


@pytest.mark.parametrize(
    "low, high, most, least",
    [(0.8, 0.9, "held", "missed"), (0.9, 1.1, "undecided", "undecided"), (1.1, 1.2, "missed", "held")],
)
def test_a_bound_inside_of_the_interval_is_undecided(low, high, most, least):
    assert PAIRED["at_most"](1.0, low, high) == f"<= 1.0: {most}"
    assert PAIRED["at_least"](1.0, low, high) == f">= 1.0: {least}"


def test_one_round_is_not_judged(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    compare = runpy.run_path(str(FOLDER / "scaling.py"))["compare"]
    compare("sweep", "swept", "by hand", [(1.0, 2.0)], 1.3)
    compare("sweep", "swept", "by hand", [(1.0, 2.0), (1.1, 2.0)], 1.3)
    one, two = capsys.readouterr().out.splitlines()
    assert one.endswith("<= 1.3: not judged, one round") and two.endswith("<= 1.3: held")
