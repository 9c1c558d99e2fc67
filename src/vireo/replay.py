"""A step that was turned away, made again one sample at a time, to see what was wrong with it.

A run's steps are functions of its config, its checkpoint and their number, so the step can be reached again from the
newest checkpoint before it: bit by bit on the CPU, closely on a GPU. Nothing is written into the run.
"""

import dataclasses
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vireo import checkpoint, distributed, faults
from vireo.data.stream import to_device
from vireo.incidents import Incident
from vireo.randomness import Draws, seed_default
from vireo.training import Progress
from vireo.worker import Run

SHOWN = 5  # names of parameters


@dataclasses.dataclass
class Sample:
    """What one sample alone gives. terms: "loss" and the loss's metrics. parameters: whose gradient is not finite."""

    position: int
    name: str
    terms: dict[str, float]
    gradient_norm: float
    parameters: list[str]

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, [*self.terms.values(), self.gradient_norm]))


class _Again(Run):
    """A run that goes to a step, writes nothing on the way, and makes it one sample at a time."""

    def __init__(self, settings: dict[str, Any], folder: Path, scratch: Path, step: int) -> None:
        self.original, self.target = folder, step
        super().__init__(settings, scratch, faults.StopRequest())

    def _find_checkpoint(self) -> checkpoint.Checkpoint | None:
        return checkpoint.latest(self.original, before=self.target)

    def report(self, step: int, figures: Mapping[str, float]) -> None:
        """Nobody looks."""

    def record(self, incident: Incident) -> None:
        """It is known."""

    def at_boundary(self, progress: Progress, last: bool) -> bool:
        if progress.step + 1 == self.target:
            self.stop.ask()  # the next step is the last one before the one that is looked at
        return False

    def reach(self) -> Progress:
        progress = self.resume()
        start = self.found.folder.name if self.found else "the beginning, since no checkpoint before it is left"
        print(f"making it again, {self.target - progress.step} step(s) after {start} …", flush=True)
        self.at_boundary(progress, last=False)
        return self.advance(progress) if progress.step < self.target else progress

    def samples(self, progress: Progress) -> list[Sample]:
        """Each sample of the next step by itself, in the order of the stream."""
        batches, seed = self.batches(progress), self.settings["seed"]
        found = []
        for micro in range(self.accumulation):
            batch = next(batches)
            names = batch.get("name", batch["position"].tolist())
            for row, (position, name) in enumerate(zip(batch["position"].tolist(), names, strict=True)):
                seed_default(seed, "network", (progress.step, micro, 0))
                sample = {key: value[row : row + 1] for key, value in batch.items() if key != "bad"}
                found.append(self._alone(sample, Draws(seed, [position], self.device, progress.step), str(name)))
        return found

    def _alone(self, sample: dict[str, Any], draws: Draws, name: str) -> Sample:
        with self.strategy.micro_step(last=True):
            objective = self.loss(self.wrapped, self.encoder(to_device(sample, self.device), draws), draws)
            objective.total.backward()
        gradients = {n: p.grad for n, p in self.network.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.get_total_norm(list(gradients.values()))
        broken = [n for n, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]
        self.network.zero_grad(set_to_none=True)
        terms = {"loss": objective.total, **objective.metrics}
        return Sample(draws.positions[0], name, {n: float(v.detach()) for n, v in terms.items()}, float(norm), broken)


def replay(settings: dict[str, Any], run_folder: Path, incident: Incident) -> list[Sample]:
    """The samples of an incident's step, each by itself, with the weights that the step began with.

    settings: the run's resolved ones. One process does it, whatever the run had; the global batch is the incident's.
    """
    settings = {
        **settings,
        "preempt_at": None,
        "max_hours": None,
        "strategy": {"_target_": "vireo.strategies.replicated.Replicated", "processes": "one"},
        "faults": {**settings["faults"], "max_consecutive_skips": incident.step + 1},
    }
    with tempfile.TemporaryDirectory() as scratch:
        try:
            again = _Again(settings, run_folder, Path(scratch), incident.step)
            again.accumulation = max(1, len(incident.samples) // settings["batch_size"])
            return again.samples(again.reach())
        finally:
            distributed.close()
