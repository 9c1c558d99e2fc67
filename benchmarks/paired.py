"""Paired, alternating timing: machines are noisy, ratios of neighbours are not.

A and B run in turn, A B B A A B …, and each pair gives one ratio A / B. Quoted are the median and its 95 % bootstrap
interval; a bound is missed only if all of the interval misses it, and held only if all of it holds it. A bound inside
is undecided: more pairs, or a quieter machine, would tell.
"""

import random
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Ratio(NamedTuple):
    """Median of A / B with its 95 % interval, by wall time and by CPU time; seconds of one A and B."""

    wall: float
    low: float
    high: float
    cpu: float
    cpu_low: float
    cpu_high: float
    seconds_a: float
    seconds_b: float

    def __str__(self) -> str:
        return (
            f"wall {self.wall:.3f} [{self.low:.3f}, {self.high:.3f}]  "
            f"CPU {self.cpu:.3f} [{self.cpu_low:.3f}, {self.cpu_high:.3f}]  "
            f"(A {self.seconds_a * 1e3:.1f} ms, B {self.seconds_b * 1e3:.1f} ms)"
        )


def paired(
    a: Callable[[], object],
    b: Callable[[], object],
    pairs: int = 30,
    warmup: int = 2,
    cpu_seconds: Callable[[], float] = time.process_time,
) -> Ratio:
    """Time two functions against each other; both should take at least some tens of milliseconds.

    cpu_seconds: the clock of the CPU time, by default that of this process alone.
    """
    for _ in range(warmup):
        a()
        b()
    rows = []
    for pair in range(pairs):
        first, second = (a, b) if pair % 2 == 0 else (b, a)
        one, two = _time(first, cpu_seconds), _time(second, cpu_seconds)
        rows.append((one, two) if pair % 2 == 0 else (two, one))
    wall = [x[0] / y[0] for x, y in rows]
    cpu = [x[1] / y[1] for x, y in rows]
    return Ratio(
        statistics.median(wall),
        *interval(wall),
        statistics.median(cpu),
        *interval(cpu),
        statistics.median(x[0] for x, _ in rows),
        statistics.median(y[0] for _, y in rows),
    )


def interval(values: list[float], resamples: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(resamples))
    return medians[int(0.025 * resamples)], medians[int(0.975 * resamples)]


def verdict(ratio: Ratio, bound: float) -> str:
    """Whether A / B <= bound holds, by wall time."""
    return at_most(bound, ratio.low, ratio.high)


def at_most(bound: float, low: float, high: float) -> str:
    """Whether a figure with this interval is at most the bound."""
    return f"<= {bound}: {'missed' if low > bound else 'held' if high <= bound else 'undecided'}"


def at_least(bound: float, low: float, high: float) -> str:
    """Whether a figure with this interval is at least the bound."""
    return f">= {bound}: {'missed' if high < bound else 'held' if low >= bound else 'undecided'}"


def _time(function: Callable[[], object], cpu_seconds: Callable[[], float]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), cpu_seconds()
    function()
    return time.perf_counter() - wall, cpu_seconds() - cpu
