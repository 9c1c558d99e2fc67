"""Processes: who computes what, what they agree on, and how one model is spread over them.

The loop sees a `Strategy` and never asks which one it is. Replicas go through accelerate, which owns the process
group, the device, mixed precision and the DistributedDataParallel wrapper.
"""

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vireo.errors import UserError

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


class Strategy(ABC):
    """How one model is spread over the processes of a run."""

    device: torch.device
    precision: str  # fp32, bf16 or fp16: what the network computes in

    @abstractmethod
    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Place and wrap the network; the returned module is what is called."""

    @abstractmethod
    def micro_step(self, last: bool) -> Any:
        """Context of one forward and backward; gradients are exchanged only in the last micro-step of a step."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None: ...

    @abstractmethod
    def clip(self, max_norm: float | None) -> Tensor:
        """Clip the gradients of the whole model to `max_norm` (None: only measure); returns their norm, a scalar."""

    @abstractmethod
    def step(self, finite: Tensor) -> None:
        """One optimizer step, turned away where `finite` (bool scalar on the device) is false; clears gradients."""

    @abstractmethod
    def full_state(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the unwrapped network, unsharded, on the CPU."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What the strategy itself must remember over a restart, as JSON (the loss scale of fp16)."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None: ...


class Replicated(Strategy):
    """Every process holds the whole model: `strategy=single` (one process) and `strategy=ddp` (any number).

    processes: "one" refuses to run on several; "many" is DistributedDataParallel, which is plain for one process.
    precision: fp32, bf16, fp16 or auto (bf16 on a GPU that has it, else fp32); weights stay in float32, autocast
    does the rest. timeout: seconds after which a collective that a rank has left ends the run.
    find_unused_parameters: needed only where a step does not use every trained parameter.
    """

    def __init__(
        self,
        processes: str = "many",
        precision: str = "auto",
        timeout: float = 1800,
        find_unused_parameters: bool = False,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if processes == "one" and asked > 1:
            raise UserError(f"strategy=single runs one process, {asked} were started; use strategy=ddp for several")
        cuda = torch.cuda.is_available()
        if precision == "auto":
            precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
        self.precision = precision
        self.accelerator = Accelerator(
            cpu=not cuda,
            mixed_precision="no" if precision == "fp32" else precision,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=timeout)),
                DistributedDataParallelKwargs(
                    find_unused_parameters=find_unused_parameters, broadcast_buffers=False, gradient_as_bucket_view=True
                ),
            ],
        )
        if self.accelerator.num_processes != asked:
            raise UserError(
                f"{asked} processes were started (WORLD_SIZE) but {self.accelerator.num_processes} take part; "
                "accelerate ignored the request, start with `python train.py launcher.processes=N` or torchrun"
            )
        self.device = self.accelerator.device
        open_side_group(timeout)

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        check_precision(network)
        self.network = network
        self.optimizer = optimizer
        # A flag turns the update away on the device; without kernel support the host has to look at each step.
        self.guards_on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
        with warnings.catch_warnings():
            # torch 2.13 renames an argument that torch 2.6 knows only by its old name.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.wrapped: nn.Module = self.accelerator.prepare_model(network)
        self.trained = [p for p in network.parameters() if p.requires_grad]
        return self.wrapped

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        if last:
            yield
        else:
            with self.accelerator.no_sync(self.wrapped):
                yield

    def backward(self, loss: Tensor) -> None:
        scaler = self.accelerator.scaler
        (scaler.scale(loss) if scaler is not None else loss).backward()

    def clip(self, max_norm: float | None) -> Tensor:
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.trained if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if max_norm is not None:
            torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    def step(self, finite: Tensor) -> None:
        if self.guards_on_device:
            # The gradients are unscaled already, so the scaler's own step has nothing to add to the fused kernel's.
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif bool(finite):
            self.optimizer.step()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def full_state(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu() for name, value in self.network.state_dict().items()}

    def state(self) -> dict[str, Any]:
        return {} if self.accelerator.scaler is None else {"scaler": self.accelerator.scaler.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.accelerator.scaler is not None and state.get("scaler"):
            self.accelerator.scaler.load_state_dict(state["scaler"])


def check_precision(network: nn.Module) -> None:
    """Refuse (UserError) trained weights that are not float32: updates would be rounded away, and fp16's overflow.

    Half precision is autocast's affair (`precision`); frozen weights may be stored in it.
    """
    half = [(n, p.dtype) for n, p in network.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if half:
        raise UserError(
            f"{len(half)} trained parameters are not float32, for instance {half[0][0]} ({half[0][1]}). Load them in "
            "float32 and set precision=bf16 or fp16: autocast then computes in half precision from full weights."
        )


def open_side_group(timeout: float) -> None:
    """A gloo group for votes, so that what the host knows is agreed on without touching the GPU's queue."""
    global _side_group
    if dist.is_initialized():
        _side_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))


def close() -> None:
    """Leave the process group; a second run in the same process could not start otherwise."""
    from accelerate.state import AcceleratorState

    global _side_group
    _side_group = None
    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
