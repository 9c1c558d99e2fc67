"""Learning-rate schedules as pure functions of the optimizer step.

A schedule gives the multiplier of each parameter group's base learning rate. It keeps no state, so a resumed run, a
skipped step and any number of processes see the same rate at the same step.
"""

import math
from typing import Protocol


class Schedule(Protocol):
    def __call__(self, step: int, steps: int) -> float:
        """The multiplier for optimizer step `step` (0 is the first) of a run of `steps` steps."""
        ...


def warmup(step: int, warmup_steps: int) -> float:
    """Linear ramp: (step + 1) / warmup_steps until it reaches 1. The first step already moves."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0


def progress(step: int, steps: int, warmup_steps: int) -> float:
    """How much of the run after the warm-up is done: 0 at its end, 1 at the last step."""
    return min(1.0, max(0.0, (step - warmup_steps) / max(1, steps - 1 - warmup_steps)))


class Constant:
    """Full rate after a linear warm-up of `warmup_steps` optimizer steps."""

    def __init__(self, warmup_steps: int = 0) -> None:
        self.warmup_steps = warmup_steps

    def __call__(self, step: int, steps: int) -> float:
        return warmup(step, self.warmup_steps)


class Cosine:
    """Half a cosine from 1 to `final` after a linear warm-up (Loshchilov and Hutter 2017, SGDR, eq. 5, one period)."""

    def __init__(self, warmup_steps: int = 0, final: float = 0.0) -> None:
        self.warmup_steps = warmup_steps
        self.final = final

    def __call__(self, step: int, steps: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * progress(step, steps, self.warmup_steps)))
        return warmup(step, self.warmup_steps) * (self.final + (1 - self.final) * cosine)


class Linear:
    """A straight line from 1 to `final` after a linear warm-up."""

    def __init__(self, warmup_steps: int = 0, final: float = 0.0) -> None:
        self.warmup_steps = warmup_steps
        self.final = final

    def __call__(self, step: int, steps: int) -> float:
        line = 1 - progress(step, steps, self.warmup_steps)
        return warmup(step, self.warmup_steps) * (self.final + (1 - self.final) * line)
