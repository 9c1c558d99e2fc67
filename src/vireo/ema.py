"""Exponential moving average of what learns."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class ExponentialMovingAverage:
    """average <- d * average + (1 - d) * parameter, with d = min(decay, (1 + n) / (10 + n)) at update n > 0.

    The first update, n = 0, copies. The ramp is diffusers' `EMAModel` default: a young average forgets the start
    quickly. Averages are float32 and have the names of the parameters. `decay=0` is no averaging: it holds nothing.

    parameters: what is averaged, by name: the trained parameters, or this process's parts of them (`Strategy.parts`).
    refresh: called after they were written to.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], decay: float, refresh: Callable[[], None] = lambda: None
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay must lie in [0, 1), got {decay}")
        self.decay, self.refresh = decay, refresh
        self.parameters = parameters if decay else {}
        self.average = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    def __bool__(self) -> bool:
        return self.decay > 0

    @torch.no_grad()
    def update(self, step: int, finite: Tensor) -> None:
        """Take in the parameters after optimizer step `step`; nothing moves where `finite` (bool scalar) is false."""
        if not self.average:
            return
        decay = min(self.decay, (1 + step) / (10 + step)) if step else 0.0
        averages = list(self.average.values())
        # Stays on the device, so there is no synchronisation, but for parts that are offloaded to the host.
        weight = finite.float().to(averages[0].device) * (1 - decay)
        change = torch._foreach_sub([p.detach().float() for p in self.parameters.values()], averages)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(averages, change)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network holds the averages inside the block and its own weights again after it."""
        if not self.average:
            yield
            return
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(own)

    def load(self, average: dict[str, Tensor]) -> None:
        """Continue from a stored average; names and shapes must be those of the trained parameters."""
        if average.keys() != self.average.keys():
            odd = sorted(average.keys() ^ self.average.keys())
            raise ValueError(f"the stored average has other parameters than the network trains: {odd[:5]}")
        for name, value in average.items():
            self.average[name].copy_(value)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
        self.refresh()
