"""The training loop, readable from top to bottom.

One step: batches -> draws from their positions -> encoder -> loss -> backward -> clip -> guard -> optimizer,
schedule, average -> log. It knows no recipe, no kind of model or loss and no strategy.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vireo import distributed, faults
from vireo.data.stream import to_device
from vireo.ema import ExponentialMovingAverage
from vireo.losses.objective import Loss
from vireo.models.encoders import Encoder
from vireo.randomness import Draws, seed_default
from vireo.schedules import Schedule
from vireo.strategies.strategy import Strategy

log = logging.getLogger(__name__)


class Progress(NamedTuple):
    """Where a run is: optimizer steps made, samples seen (the stream's next position), updates turned away."""

    step: int
    position: int
    skipped: int


def train(
    network: nn.Module,
    encoder: Encoder,
    loss: Loss,
    batches: Iterator[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    strategy: Strategy,
    average: ExponentialMovingAverage,
    *,
    seed: int,
    progress: Progress,
    steps: int,
    batch_size: int,
    accumulation: int,
    max_grad_norm: float | None,
    log_every: int,
    max_consecutive_skips: int,
    max_bad_files: int,
    stop: faults.StopRequest,
    report: Callable[[int, Mapping[str, float]], None],
    at_boundary: Callable[[Progress, bool], None],
) -> Progress:
    """Train from `progress` to `steps` optimizer steps, or until `stop`; returns where it ended.

    network: the wrapped module, in the mode it trains in. batches: micro-batches of this rank in order. report: gets
    each logged step's figures on every rank (means over micro-steps and ranks). at_boundary: called on every rank
    after every step with the progress and whether the run is about to stop; it validates and saves as it sees fit.
    Raises faults.TooManyFaults when non-finite steps or unreadable files pass their limits.
    """
    rank, device = distributed.rank(), strategy.device
    base_rates = [group["lr"] for group in optimizer.param_groups]
    skips = faults.NonFiniteSteps(max_consecutive_skips, progress.skipped)
    bad_files: dict[str, str] = {}
    unread: tuple[int, Tensor, list[str]] | None = None  # last step's verdict, still on the device
    stopwatch = Stopwatch()

    for step in range(progress.step, steps):
        rate = schedule(step, steps)
        for group, base_rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = base_rate * rate
        figures: dict[str, Tensor] = {}
        names: list[str] = []
        flags = 0

        # ---------------------------------------------------------------- one gradient step
        for micro in range(accumulation):
            with stopwatch.waiting():
                batch = next(batches)
            names += [str(name) for name in batch.get("name", batch["position"].tolist())]
            bad_files.update(batch["bad"])

            draws = Draws(seed, batch["position"], device, step)
            seed_default(seed, "network", (step, micro, rank))
            with strategy.micro_step(last=micro == accumulation - 1):
                batch = encoder(to_device(batch, device), draws)
                objective = loss(network, batch, draws)
                flags |= distributed.vote(
                    (faults.STOP if stop else 0) | (faults.BAD_DATA if len(bad_files) > max_bad_files else 0)
                )
                strategy.backward(objective.total / accumulation)
            for name, value in {"loss": objective.total, **objective.metrics}.items():
                figures[name] = figures.get(name, 0) + value.detach() / accumulation

        norm = strategy.step(max_grad_norm)
        finite = torch.isfinite(norm)
        average.update(step, finite)
        # ----------------------------------------------------------------

        # The host reads each verdict one step late, so it never waits for the step it has just queued.
        if unread is not None:
            skips.see(unread[0], bool(unread[1]), unread[2])
        unread = (step, finite, names)
        stopwatch.steps += 1
        progress = Progress(step + 1, progress.position + batch_size * accumulation * distributed.world_size(), 0)
        stopping = bool(flags & faults.STOP)
        last = progress.step == steps or stopping
        logged = last or progress.step % log_every == 0
        if logged or device.type == "cpu":  # where looking is free, a checkpoint knows its own step's verdict too
            skips.see(step, bool(finite), names)
            unread = None
        if logged:
            means = distributed.average({name: float(value) for name, value in figures.items()})
            state = {"grad_norm": float(norm), "lr": optimizer.param_groups[0]["lr"]}
            counts = {"skipped_steps": skips.total, "bad_files": len(bad_files)}
            report(progress.step, {**means, **state, **counts, **stopwatch.lap()})
        progress = progress._replace(skipped=skips.total)

        if flags & faults.BAD_DATA:
            raise faults.TooManyFaults(_bad_files_message(bad_files, max_bad_files))
        with stopwatch.paused():  # validation and saving are not part of a step's time
            at_boundary(progress, last)
        if stopping:
            break
    return progress


class Stopwatch:
    """Seconds per step, and the share of them that went into waiting for data, since the last lap."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self.began, self.waited, self.steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        asked = time.perf_counter()
        yield
        self.waited += time.perf_counter() - asked

    @contextmanager
    def paused(self) -> Iterator[None]:
        stopped = time.perf_counter()
        yield
        self.began += time.perf_counter() - stopped

    def lap(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self.began
        figures = {"seconds_per_step": elapsed / self.steps, "data_wait": self.waited / elapsed}
        self._restart()
        return figures


def _bad_files_message(bad_files: Mapping[str, str], limit: int) -> str:
    lines = [f"  {path}: {reason}" for path, reason in list(bad_files.items())[:10]]
    return "\n".join(
        [f"{len(bad_files)} files broke while training, at most {limit} may (data.max_bad_fraction):", *lines]
    )
