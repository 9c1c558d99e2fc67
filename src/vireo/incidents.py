"""Steps that were turned away since their gradient was not finite: which samples, which term, since when.

Each one is written to `incidents/step_<n>.json` in the run's folder. Since everything random is a function of the
seed and a sample's position, that is enough to make the step again: `vireo replay run=…`.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vireo import distributed, json_files
from vireo.errors import UserError
from vireo.faults import TooManyFaults
from vireo.run_folder import write_json

log = logging.getLogger(__name__)

FOLDER = "incidents"
MOST = 100  # files in a run's folder; the newest say why it ended


class Incident(NamedTuple):
    """A step whose update was turned away.

    step: counted from 0; the optimizer step that was not made. samples: (position, name) of all ranks, in the order of
    the stream. terms: each rank's mean figures of the step, "loss" among them. consecutive: how many there were in a
    row with this one.
    """

    step: int
    samples: Sequence[tuple[int, str]]
    terms: Sequence[Mapping[str, float]]
    consecutive: int

    def suspects(self) -> list[str]:
        """Names of the terms that were not finite on some rank. None: the gradient alone was not."""
        return sorted({name for of_rank in self.terms for name, value in of_rank.items() if not math.isfinite(value)})

    def diagnosis(self) -> str:
        """What was not finite and with which samples, in one sentence."""
        ranks = [str(r) for r, of_rank in enumerate(self.terms) if not all(map(math.isfinite, of_rank.values()))]
        what = f"{', '.join(self.suspects())} of rank {', '.join(ranks)}" if ranks else "only the gradient, no term"
        names = ", ".join(name for _, name in self.samples[:8])
        return f"not finite: {what}; samples: {names}{', …' if len(self.samples) > 8 else ''}"


class Verdicts:
    """Reads whether each step's gradient was finite, one step late unless it is free, and counts what was turned away.

    limit: consecutive ones that end the run. skipped: those before. record: called on every rank with each of them.
    """

    def __init__(self, limit: int, skipped: int, record: Callable[[Incident], None]) -> None:
        self.limit, self.skipped, self.record = limit, skipped, record
        self.consecutive = 0
        self._unread: list[tuple[int, Tensor, Mapping[str, Tensor], list[tuple[int, str]]]] = []

    def add(
        self,
        step: int,
        norm: Tensor,
        figures: Mapping[str, Tensor],
        samples: list[tuple[int, str]],
        at_once: bool,
    ) -> None:
        """Note a step and read the one before; this one too if `at_once`.

        norm: the gradient's, equal on all ranks, on the device. Raises TooManyFaults at the limit.
        """
        self._unread.append((step, norm, figures, samples))
        while len(self._unread) > (0 if at_once else 1):
            step, norm, figures, samples = self._unread.pop(0)
            if bool(torch.isfinite(norm)):
                self.consecutive = 0
            else:
                self._turned_away(step, figures, samples)

    def _turned_away(self, step: int, figures: Mapping[str, Tensor], samples: list[tuple[int, str]]) -> None:
        self.skipped += 1
        self.consecutive += 1
        everywhere = distributed.gather((samples, {name: float(value) for name, value in figures.items()}))
        incident = Incident(
            step,
            sorted(sample for of_rank, _ in everywhere for sample in of_rank),
            [terms for _, terms in everywhere],
            self.consecutive,
        )
        log.error("step %d: the gradient is not finite, no update was made (%s)", step, incident.diagnosis())
        self.record(incident)
        if self.consecutive >= self.limit:
            raise TooManyFaults(
                f"{self.consecutive} steps in a row had a gradient that is not finite, from step "
                f"{step - self.consecutive + 1} to {step}; in the last one, {incident.diagnosis()}. The last "
                "checkpoint is from before. A lower lr, precision=fp32, model.encoder.dtype=fp32 where that overflows, "
                "or other data are the usual cures; "
                f"`vireo replay run=…` makes step {step} again, sample by sample "
                "(faults.max_consecutive_skips sets the limit)"
            )


def write(run_folder: Path, incident: Incident) -> None:
    """Keep an incident in the run's folder, and MOST of those before. Only the main process calls this."""
    folder = run_folder / FOLDER
    folder.mkdir(exist_ok=True)
    # JSON has no NaN, so numbers that are not finite are words.
    terms = [{name: _number(value) for name, value in of_rank.items()} for of_rank in incident.terms]
    write_json(_file(run_folder, incident.step), {**incident._asdict(), "terms": terms})
    # By time: after a resume, steps that lie behind may stand in the folder already.
    by_age = sorted(folder.glob("step_*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    for old in by_age[:-MOST]:
        old.unlink()


def steps(run_folder: Path) -> list[int]:
    """Steps that were turned away and kept, ascending."""
    return sorted(int(path.stem.removeprefix("step_")) for path in (run_folder / FOLDER).glob("step_*.json"))


def read(run_folder: Path, step: int) -> Incident:
    """An incident that `write` kept. Raises UserError, which names the others, if its file is damaged."""
    path = _file(run_folder, step)
    try:
        kept: dict[str, Any] = json_files.read(path)
        terms = [{name: float(value) for name, value in of_rank.items()} for of_rank in kept["terms"]]
        samples = [(int(position), str(name)) for position, name in kept["samples"]]
        return Incident(int(kept["step"]), samples, terms, int(kept["consecutive"]))
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        problem = error if isinstance(error, UserError) else f"{path}: {type(error).__name__}: {error}"
        others = ", ".join(f"step={other}" for other in steps(run_folder) if other != step) or "none"
        raise UserError(
            f"what was wrong with step {step} cannot be read: {problem}. The file is damaged; delete it. Others that "
            f"are kept: {others}"
        ) from None


def _file(run_folder: Path, step: int) -> Path:
    return run_folder / FOLDER / f"step_{step:08d}.json"


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
