"""What benchmarks conclude from what they measured."""

import runpy
from pathlib import Path

import pytest

PAIRED = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "paired.py"))


@pytest.mark.parametrize(
    "low, high, most, least",
    [(0.8, 0.9, "held", "missed"), (0.9, 1.1, "undecided", "undecided"), (1.1, 1.2, "missed", "held")],
)
def test_a_bound_inside_of_the_interval_is_undecided(low, high, most, least):
    assert PAIRED["at_most"](1.0, low, high) == f"<= 1.0: {most}"
    assert PAIRED["at_least"](1.0, low, high) == f">= 1.0: {least}"
