"""How much memory a run holds before its first activation, part by part, for every recipe."""

import logging
from collections.abc import Iterable, Mapping
from typing import ClassVar

import psutil
import torch
from torch import Tensor, nn

from vireo.optimizers import moment_bytes

log = logging.getLogger(__name__)

GIB, MIB = 1 << 30, 1 << 20


def estimate(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Mapping[str, Tensor],
    frozen: Mapping[str, int],
    loss_state: Mapping[str, Tensor],
    half_precision: bool,
) -> dict[str, int]:
    """Bytes on the device of one process by part; what a part does not need is left out.

    average: the moving average's tensors. frozen: bytes of frozen networks by name, once they are loaded. loss_state:
    what the loss owns (a discriminator, its moments, replay). half_precision: whether autocast is on, which keeps a
    half-precision copy of the weights during a forward pass. Activations and a library's own buffers are not counted.
    """
    parameters = list(network.parameters())
    trained = [p for p in parameters if p.requires_grad]
    parts = {
        "trained weights": _bytes(trained),
        "frozen weights": _bytes([p for p in parameters if not p.requires_grad]),
        "buffers": _bytes(network.buffers()),
        "gradients": _bytes(trained),
        "optimizer moments": moment_bytes(optimizer),
        "average of the weights": _bytes(average.values()),
        "autocast's copy": 2 * sum(p.numel() for p in parameters if p.ndim > 1) if half_precision else 0,
        "loss's own": _bytes(loss_state.values()),
        **{f"frozen {name}": size for name, size in frozen.items()},
    }
    return {name: size for name, size in parts.items() if size}


def available(device: torch.device) -> int | None:
    """Bytes that a GPU has; None for a CPU, whose memory is others' too."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def table(parts: Mapping[str, int], capacity: int | None = None) -> str:
    """Lines of `part  size`, the total, and, where it is known, what the device has."""
    rows = [*parts.items(), ("total before activations", sum(parts.values()))]
    rows += [("of the device's", capacity)] if capacity is not None else []
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {readable(size):>10}" for name, size in rows)


def readable(size: int) -> str:
    """12.8 GiB, 3.1 MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Creep:
    """Notices memory that grows while a run goes on: what is never given back ends a run after hours.

    The host's and the device's are compared with what was in use at the first look after SETTLED steps; told when one
    has grown by half and by MARGIN, then again when it has from there.
    """

    SETTLED, MARGIN = 20, GIB
    WATCHED: ClassVar = {  # figures by name: who holds it, and what helps
        "host_memory": (
            "this process and its loader workers hold",
            "Fewer loader.workers, a smaller cache.memory, or a restart (the same command) help",
        ),
        # Not the peak, which one long clip raises for good.
        "device_allocated": (
            "tensors on the device take",
            "A restart (the same command) helps; in code of your own, a loss that is kept must be detached",
        ),
    }

    def __init__(self) -> None:
        self.started: int | None = None
        self.before: dict[str, int] = {}

    def look(self, step: int, device: torch.device) -> dict[str, float]:
        """GiB in use now: host_memory of this process and its loader workers; of a GPU device_allocated (by tensors),
        device_reserved (by torch, for them and for later) and device_memory, the most that tensors had so far.
        """
        figures = {"host_memory": _resident(), **(_on_gpu(device) if device.type == "cuda" else {})}
        self.started = step if self.started is None else self.started
        if step >= self.started + self.SETTLED:
            for name, (holder, cure) in self.WATCHED.items():
                if name in figures:
                    self._compare(name, figures[name], holder, cure)
        return {name: size / GIB for name, size in figures.items()}

    def _compare(self, name: str, used: int, holder: str, cure: str) -> None:
        before = self.before.setdefault(name, used)
        if used > 1.5 * before + self.MARGIN:
            log.warning(
                "%s %s now, %s earlier: something keeps what it no longer needs. %s",
                holder,
                readable(used),
                readable(before),
                cure,
            )
            self.before[name] = used


def _on_gpu(device: torch.device) -> dict[str, int]:
    """Bytes that torch knows of."""
    return {
        "device_allocated": torch.cuda.memory_allocated(device),
        "device_reserved": torch.cuda.memory_reserved(device),
        "device_memory": torch.cuda.max_memory_allocated(device),
    }


def _resident() -> int:
    """Bytes in memory of this process and its children; pages that they share count for each."""
    own = psutil.Process()
    total = own.memory_info().rss
    for child in own.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue  # it ended between the two calls
    return total
