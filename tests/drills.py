"""Drills with forked workers, so that importing is paid once."""

from pathlib import Path

import pytest

from tests import ranks, runs
from vireo import drill
from vireo.mini import world


def start(folder: Path, fault: drill.Fault | None) -> int:
    """One process on a run's folder; exit codes as a shell has them."""
    code = runs.work(folder, fault.arm if fault else None)
    return code if code >= 0 else 128 - code


def undisturbed(words: list[str], outputs: Path) -> tuple[dict, Path]:
    """The settings of a drill, and its first run."""
    world.ensure()
    settings = drill.settings_of(words, outputs)
    folder = drill._make(settings, "undisturbed")
    assert start(folder, None) == 0, (folder / "train.log").read_text()
    return settings, folder


def survives(drilled: tuple[dict, Path], title: str) -> None:
    """Fail unless the composition survives the fault; skip where the fault makes no sense."""
    settings, folder = drilled
    (result,) = drill.drill(settings, start, exact=True, only=[title], undisturbed=folder)
    if result.survived is None:
        pytest.skip(result.detail)
    assert result.survived, result.detail


def two_ranks(words: list[str], outputs: Path, title: str) -> None:
    """The same with two gloo processes, for faults that end no process."""
    settings = drill.settings_of([*words, "launcher.processes=2"], outputs)
    fault = next(fault for fault in drill.FAULTS if fault.title == title)
    hit = drill._make(settings, fault.title)
    assert ranks.work([hit], fault.arm) == [[fault.code] * 2]
    assert drill._logged(hit)[-1][fault.figure] == 1
    if fault.then == "finite":
        problem = drill._not_finite(hit)
    else:
        plain = drill._make(settings, "undisturbed")
        assert ranks.work([plain]) == [[0, 0]]
        problem = drill.difference(plain, hit, exact=False)
    assert problem is None, problem
