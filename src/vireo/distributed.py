"""Processes: what they agree on and what they add up. How one model is spread over them: `vireo.strategies`."""

import os
import threading
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

PATIENCE = 20.0  # seconds that leaving a process group may take after a fault

_side_group: dist.ProcessGroup | None = None


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True on the one process that writes files."""
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier(group=_side_group)


def vote(flags: int) -> int:
    """The bitwise OR of every rank's flags, over a CPU group: what one rank knows, all decide together.

    One process returns its own flags at once. Measured with two gloo processes: 0.3 ms.
    """
    if not dist.is_initialized():
        return flags
    ballot = torch.tensor([flags], dtype=torch.int64)
    dist.all_reduce(ballot, dist.ReduceOp.BOR, group=_side_group)
    return int(ballot)


def gather(thing: Any) -> list[Any]:
    """One picklable object of every rank, in rank order, on every rank; between processes of one run only."""
    if not dist.is_initialized():
        return [thing]
    things: list[Any] = [None] * world_size()
    dist.all_gather_object(things, thing, group=_side_group)
    return things


def average(values: dict[str, float]) -> dict[str, float]:
    """Means over ranks of scalars that every rank has under the same names."""
    if not dist.is_initialized() or not values:
        return values
    names = sorted(values)
    sums = torch.tensor([values[name] for name in names], dtype=torch.float64)
    dist.all_reduce(sums, group=_side_group)
    return dict(zip(names, (sums / world_size()).tolist(), strict=True))


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average the gradients of parameters that no wrapper synchronises (a loss's own learner), in one collective."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class _SumOverRanks(torch.autograd.Function):
    """Every rank uses the sum, so a summand's gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _SumOverRanks.apply(gradients[0])


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of a tensor that every rank has, on its device; differentiable, with one more sum in the backward pass.

    Each rank differentiates its own loss; the gradient is that of the sum of all ranks' losses.
    """
    return _SumOverRanks.apply(x) if world_size() > 1 else x


def var_mean(x: Tensor, dim: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Population variance and mean over `dim` (None: all) and over all ranks, whose x have equal shapes.

    Differentiable. One process returns exactly what torch.var_mean does.
    """
    var, mean = torch.var_mean(x, dim, correction=0)
    if world_size() == 1:
        return var, mean
    var, mean = var.double(), mean.double()  # a difference of squares, which float32 would cancel
    mean, square = sum_over_ranks(torch.stack([mean, var + mean.square()])) / world_size()
    return (square - mean.square()).to(x.dtype), mean.to(x.dtype)


def concatenate(x: Tensor) -> Tensor:
    """The rows of all ranks in rank order, on every rank. x: (N, ...), of equal shape on all of them."""
    if world_size() == 1:
        return x
    own = x.contiguous().view(torch.uint8)  # as bytes, since not every backend moves every dtype
    rows = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(rows, own)
    return torch.cat(rows).view(x.dtype)


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give every rank the values of rank 0, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def open_side_group(timeout: float) -> None:
    """A gloo group for votes, so that what the host knows is agreed on without touching the GPU's queue."""
    global _side_group
    if dist.is_initialized():
        _side_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))


def close(after_fault: bool = False) -> bool:
    """Leave the process group; a second run in the same process could not start otherwise.

    DeepSpeed remembers the group it was started in and cannot be given another one: with it, one run a process.

    after_fault: other ranks may never end the collective that NCCL is in, so its work is aborted, and waited for no
    longer than PATIENCE. Returns False if it goes on even then: only os._exit ends such a process.
    """
    from accelerate.state import AcceleratorState

    global _side_group
    _side_group = None
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # set by accelerate for the run that is over
    if dist.is_initialized():
        if after_fault:
            leaving = threading.Thread(target=_abort, daemon=True)
            leaving.start()
            leaving.join(PATIENCE)
            if leaving.is_alive():
                return False
        else:
            dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    return True


def _abort() -> None:
    abort = getattr(distributed_c10d, "_abort_process_group", None)
    if abort is not None and "nccl" in dist.get_backend_config():
        abort()
    else:
        dist.destroy_process_group()  # which does not wait for others, with gloo
