"""vireo's training loop, a few steps at a time, to be timed against other loops in the same process."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vireo import faults, objects
from vireo.cache import Cache
from vireo.data.stream import Slices, Stream, loader
from vireo.ema import ExponentialMovingAverage
from vireo.hangs import Watchdog
from vireo.strategies.replicated import Replicated
from vireo.training import Progress, train


class Loop:
    """Rounds of an experiment's steps, going on where the last one ended; batches come from an iterator."""

    def __init__(self, settings: dict[str, Any], encoder: Any, batches: Iterator[dict[str, Any]], steps: int) -> None:
        self.settings, self.encoder, self.batches, self.steps = settings, encoder, batches, steps
        self.network, policy = objects.network(settings), objects.freeze_policy(settings)
        policy(self.network)
        self.optimizer = objects.optimizer(settings)(policy.groups(self.network, settings["lr"]), lr=settings["lr"])
        self.strategy = Replicated(precision="fp32")
        self.wrapped = self.strategy.prepare(self.network, self.optimizer)
        self.average = ExponentialMovingAverage(self.strategy.parts(), settings["ema"]["decay"])
        self.loss, self.schedule = objects.loss(settings), objects.schedule(settings)
        self.step = 0

    def __call__(self) -> None:
        base = [group["lr"] for group in self.optimizer.param_groups]
        self.step = train(
            self.wrapped,
            self.encoder,
            self.loss,
            self.batches,
            self.optimizer,
            self.schedule,
            self.strategy,
            self.average,
            seed=0,
            progress=Progress(self.step, self.step * self.settings["batch_size"], 0),
            steps=self.step + self.steps,
            batch_size=self.settings["batch_size"],
            accumulation=1,
            max_grad_norm=1.0,
            log_every=10,
            max_consecutive_skips=10,
            max_loss_rise=None,
            room=faults.Room(Path(os.devnull, "none")),
            bad_files=faults.BadFiles(1, Path(os.devnull)),
            stop=faults.StopRequest(),
            watchdog=Watchdog(Path(os.devnull), timeout=1e6),
            report=lambda step, figures: None,
            record=lambda incident: None,
            at_boundary=lambda progress, last: False,
        ).step
        for group, rate in zip(self.optimizer.param_groups, base, strict=True):
            group["lr"] = rate  # the loop takes what it finds for the base rate


def loading(settings: dict[str, Any], dataset: Any, encoder: Any, cache: Cache | None, steps: int) -> Loop:
    """Rounds with loading in them, in this process."""
    slices = Slices(0, 0, 10**6, settings["batch_size"], 1, 0, 1)
    return Loop(
        settings, encoder, iter(loader(Stream(dataset, settings["seed"], cache=cache), slices, workers=0)), steps
    )
