"""Randomness as a function of (seed, purpose, position) instead of a state.

Everything drawn for a sample is keyed by the sample's position in the run's infinite global stream, so crops, masks,
timesteps and noise are the same whatever the number of processes, loader workers, micro-batches or restarts, and a
checkpoint has no random state to save. What is drawn once for a whole step is keyed by the step.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def key(seed: object, purpose: str, position: object) -> int:
    """63 bits of blake2b over the three parts: the seed of one independent generator."""
    digest = hashlib.blake2b(repr((seed, purpose, position)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: object, purpose: str, position: object) -> torch.Generator:
    """A fresh CPU generator for one key."""
    made = torch.Generator("cpu")
    made.manual_seed(key(seed, purpose, position))
    return made


class Draws:
    """All random numbers of some samples, each a pure function of (seed, purpose, position).

    seed: the run's seed, or any other value with a stable repr ("validation").
    positions: the samples' places in the global stream, one a row. step: the optimizer step they belong to.
    Numbers are drawn on the CPU and moved to `device`, so that every device sees the same ones.
    """

    def __init__(
        self, seed: object, positions: Sequence[int] | Tensor, device: str | torch.device = "cpu", step: int = 0
    ) -> None:
        self.seed = seed
        self.positions = [int(p) for p in positions]
        self.device = torch.device(device)
        self.step = step
        self.pins: dict[str, float] = {}

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal float32, (B, *shape)."""
        return self._rows(purpose, lambda g: torch.randn(shape, generator=g))

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Uniform float32 in [0, 1), (B, *shape)."""
        return self._rows(purpose, lambda g: torch.rand(shape, generator=g))

    def integers(self, purpose: str, low: int, high: int, *shape: int) -> Tensor:
        """Uniform int64 in [low, high), (B, *shape)."""
        return self._rows(purpose, lambda g: torch.randint(low, high, shape, generator=g))

    def once_integer(self, purpose: str, low: int, high: int) -> int:
        """One integer in [low, high) for the whole step, the same on every rank and for every sample."""
        return int(torch.randint(low, high, (), generator=self._of_step(purpose)))

    def once_uniform(self, purpose: str) -> float:
        """One number in [0, 1) for the whole step, as `once_integer`."""
        return float(torch.rand((), generator=self._of_step(purpose)))

    def once_normal(self, purpose: str) -> float:
        """One standard normal number for the whole step, as `once_integer`."""
        return float(torch.randn((), generator=self._of_step(purpose)))

    def generators(self, purpose: str) -> list[torch.Generator]:
        """One fresh CPU generator a sample, for what draws by itself, as diffusers' schedulers do. Not pinned."""
        return [generator(self.seed, purpose, position) for position in self.positions]

    def to(self, device: str | torch.device) -> "Draws":
        return Draws(self.seed, self.positions, device, self.step).pinned(self.pins)

    def pinned(self, pins: Mapping[str, float]) -> "Draws":
        """The same draws, but with one value, the same for all samples, for each purpose in `pins`."""
        pinned = Draws(self.seed, self.positions, self.device, self.step)
        pinned.pins = {**self.pins, **pins}
        return pinned

    def _of_step(self, purpose: str) -> torch.Generator:
        return generator(self.seed, purpose, ("step", self.step))

    def _rows(self, purpose: str, draw) -> Tensor:
        if purpose in self.pins:
            pinned = torch.full_like(draw(generator(self.seed, purpose, 0)), self.pins[purpose])
            return pinned.expand(len(self.positions), *pinned.shape).to(self.device)
        rows = [draw(generator(self.seed, purpose, position)) for position in self.positions]
        return torch.stack(rows).to(self.device)


def order(seed: object, epoch: int, n: int) -> Tensor:
    """The permutation of range(n) in which epoch `epoch` visits a dataset of n entries."""
    return torch.randperm(n, generator=generator(seed, "order", epoch))


def seed_default(seed: object, purpose: str, position: object) -> None:
    """Seed torch's default generators: initial weights, and dropout inside networks.

    `torch.manual_seed` costs about 130 us (it formats a stack trace for the lazy CUDA call); seeding the generators
    themselves costs 1 us and gives the same numbers.
    """
    number = key(seed, purpose, position)
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(number)
