"""How much memory a run holds before its first activation, part by part, for every recipe."""

import logging
from collections.abc import Iterable, Mapping

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

    Compared with what was in use at the first look after SETTLED steps; told when it has grown by half and by MARGIN,
    then again when it has from there.
    """

    SETTLED, MARGIN = 20, GIB

    def __init__(self) -> None:
        self.started: int | None = None
        self.before: int | None = None

    def look(self, step: int, device: torch.device) -> dict[str, float]:
        """GiB in use now: host_memory of this process and its loader workers, and device_memory, at most so far."""
        used = _resident()
        self.started = step if self.started is None else self.started
        if self.before is None and step >= self.started + self.SETTLED:
            self.before = used
        elif self.before is not None and used > 1.5 * self.before + self.MARGIN:
            log.warning(
                "this process and its loader workers hold %s now, %s earlier: something keeps what it no longer needs. "
                "Fewer loader.workers, a smaller cache.memory, or a restart (the same command) help",
                readable(used),
                readable(self.before),
            )
            self.before = used
        figures = {"host_memory": used / GIB}
        if device.type == "cuda":
            figures["device_memory"] = torch.cuda.max_memory_allocated(device) / GIB
        return figures


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
