"""The training loop, readable from top to bottom.

One step: batches -> draws from their positions -> encoder -> loss -> vote -> backward -> clip -> guard -> optimizer,
schedule, average -> log. It knows no recipe, no kind of model or loss and no strategy. What can go wrong in it is
decided by all ranks together (faults.py).
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vireo import distributed, faults
from vireo.data.stream import to_device
from vireo.ema import ExponentialMovingAverage
from vireo.hangs import Watchdog
from vireo.incidents import Incident, Verdicts
from vireo.losses.objective import Loss, Objective
from vireo.models.encoders import Encoder
from vireo.randomness import Draws, seed_default
from vireo.schedules import Schedule
from vireo.strategies.strategy import Strategy

log = logging.getLogger(__name__)


class Progress(NamedTuple):
    """Where a run is.

    step: optimizer steps made. position: samples seen, the stream's next position. skipped: updates turned away.
    usual_loss, losses_seen: what `faults.LossSpikes` compares with, and how many losses went into it.
    """

    step: int
    position: int
    skipped: int
    usual_loss: float = 0.0
    losses_seen: int = 0


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
    max_loss_rise: float | None,
    room: faults.Room,
    bad_files: faults.BadFiles,
    stop: faults.StopRequest,
    watchdog: Watchdog,
    report: Callable[[int, Mapping[str, float]], None],
    record: Callable[[Incident], None],
    at_boundary: Callable[[Progress, bool], bool],
) -> Progress:
    """Train from `progress` to `steps` optimizer steps, or until `stop`; returns where it ended.

    network: the wrapped module, in the mode it trains in. batches: micro-batches of this rank in order. report: gets
    each logged step's figures on every rank (means over micro-steps and ranks). record: gets each step that was turned
    away, on every rank. at_boundary: called on every rank after every step with the progress and whether the run is
    about to stop; it validates and saves as it sees fit, and returns whether it was asked to stop meanwhile.
    room: how many samples fit into memory at once, as far as an earlier start has found out.
    Raises faults.TooManyFaults when non-finite steps or unreadable files pass their limits, or when one sample alone
    does not fit into memory.
    """
    rank, device = distributed.rank(), strategy.device
    base_rates = [group["lr"] for group in optimizer.param_groups]
    several_groups = len({group["name"] for group in optimizer.param_groups}) > 1
    verdicts = Verdicts(max_consecutive_skips, progress.skipped, record)
    spikes = faults.LossSpikes(max_loss_rise, progress.usual_loss, progress.losses_seen)
    stopwatch = Stopwatch()

    for step in range(progress.step, steps):
        watchdog.begin_step()
        rate = schedule(step, steps)
        _set_rates(optimizer, base_rates, rate)
        figures: dict[str, Tensor] = {}
        samples: list[tuple[int, str]] = []
        flags = 0

        # ---------------------------------------------------------------- one gradient step
        for micro in range(accumulation):
            with stopwatch.waiting():
                batch = next(batches)
            bad_files.note(step, batch["bad"])
            samples += _named(batch)
            seed_default(seed, "network", (step, micro, rank))

            pieces = room.pieces(batch)  # one, the micro-batch itself, unless memory ran out before
            while pieces:
                piece = pieces.popleft()
                size = len(piece["position"])
                draws = Draws(seed, piece["position"], device, step)
                with room.noted(size), strategy.micro_step(last=micro == accumulation - 1 and not pieces):
                    objective = _forward(network, encoder, loss, piece, draws, strategy)
                    agreed = distributed.vote(
                        (faults.STOP if stop else 0)
                        | (faults.BAD_DATA if bad_files.news else 0)
                        | (faults.OUT_OF_MEMORY if objective is None else 0)
                    )
                    flags |= agreed
                    if objective is None or agreed & faults.OUT_OF_MEMORY:
                        objective = None
                        strategy.abandon()
                        pieces = room.smaller(step, [piece, *pieces])
                        continue
                    parts = accumulation * len(batch["position"]) / size
                    strategy.backward(spikes.guarded(objective.total) / parts)
                for name, value in {"loss": objective.total, **objective.metrics}.items():
                    figures[name] = figures.get(name, 0) + value.detach() / parts

        if flags & faults.BAD_DATA:
            bad_files.share()
        stopping = bool(flags & faults.STOP)
        last = step + 1 == steps or stopping
        logged = last or (step + 1) % log_every == 0
        by_group = strategy.group_norms() if logged and several_groups else {}
        norm = strategy.step(max_grad_norm)
        average.update(step, torch.isfinite(norm))
        of_step = loss.end_step()
        # ----------------------------------------------------------------

        stopwatch.steps += 1
        seen = progress.position + batch_size * accumulation * distributed.world_size()
        # The host reads each verdict one step late, so it never waits for the step it has just queued; where looking
        # is free, or done anyway, a checkpoint knows its own step's verdict too.
        verdicts.add(step, norm, figures, samples, at_once=logged or device.type == "cpu")
        if logged:
            means = _means({**figures, **of_step, **strategy.network.figures()})
            for name in [name for name in of_step if math.isnan(means[name])]:
                del means[name]  # nothing is known of it yet, on any rank
            norms = {"grad_norm": norm, **{f"grad_norm_{group}": value for group, value in by_group.items()}}
            state = {"lr": optimizer.defaults["lr"] * rate, **{name: float(value) for name, value in norms.items()}}
            counts = {"skipped_steps": verdicts.skipped, "bad_files": len(bad_files), "memory_retries": room.retries}
            report(step + 1, {**means, **state, **counts, **stopwatch.lap()})
        progress = Progress(step + 1, seen, verdicts.skipped, spikes.usual, spikes.seen)

        if bad_files.too_many:
            raise bad_files.error()
        with stopwatch.paused():  # validation and saving are not part of a step's time
            stopping = at_boundary(progress, last) or stopping
        if stopping:
            break
    return progress


def _forward(
    network: nn.Module, encoder: Encoder, loss: Loss, batch: dict[str, Any], draws: Draws, strategy: Strategy
) -> Objective | None:
    """The objective of a batch on the host; None if memory ran out on this rank, where that can be tried again."""
    try:
        return loss(network, encoder(to_device(batch, strategy.device), draws), draws)
    except (RuntimeError, MemoryError) as error:
        if not faults.is_out_of_memory(error):
            raise
        if distributed.world_size() > 1 and not (strategy.forward_is_local and loss.is_local):
            raise  # other ranks wait inside their own forward pass, where no vote reaches them: see Room.noted
    # Here the exception, and with it everything its frames held, is gone.
    faults.give_memory_back()
    return None


def _set_rates(optimizer: torch.optim.Optimizer, base_rates: list[float], factor: float) -> None:
    for group, base_rate in zip(optimizer.param_groups, base_rates, strict=True):
        group["lr"] = base_rate * factor


def _means(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """Over ranks."""
    return distributed.average({name: float(value) for name, value in figures.items()})


def _named(batch: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Position and name of each sample of a batch."""
    positions = batch["position"].tolist()
    return list(zip(positions, map(str, batch.get("name", positions)), strict=True))


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
