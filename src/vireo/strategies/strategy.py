"""What the loop, the average and the checkpoints need of a strategy, whichever it is."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from vireo.errors import UserError


class Strategy(ABC):
    """How one model is spread over the processes of a run.

    A process holds a *part* of each trained parameter: all of it, or a shard. Parts are plain tensors that share the
    parameter's memory. What belongs to a parameter element by element (its average, its moments) comes in parts of the
    same shape, so it needs no strategy to be computed; only `gather` and `scatter` know where the parts lie.
    Collective methods are called by every rank. Results on the CPU are there on the main process; others get {}.
    """

    network: Any  # as `prepare` was given it
    device: torch.device
    precision: str  # fp32, bf16 or fp16: what the network computes in
    forward_is_local: bool = True  # a forward pass waits for no other process, so one that failed can be made again

    @abstractmethod
    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Place and spread the network, which has its weights already; the returned module is what is called.

        `optimizer`, which has made no step yet, updates this process's parts from now on; its groups stay the same
        dicts, and the learning rate in them counts. Raises UserError for a network or an optimizer that does not suit.
        """

    @abstractmethod
    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """Context of one forward and backward pass; `last` of its step or not. Gradients add up over a step."""

    def abandon(self) -> None:
        """Called on every rank within a micro-step whose backward pass will not come: another one takes its place."""
        return None

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Backward pass of a micro-step's share of the loss, a scalar: the loop has divided by their number."""

    @abstractmethod
    def step(self, max_norm: float | None) -> Tensor:
        """Clip the gradient of the whole model to `max_norm` (None: not), update, clear gradients. Collective.

        Nothing is updated where the gradient is not finite. Returns the gradient's norm before clipping, a scalar on
        the device, equal on all ranks and not finite exactly if no update was made.
        """

    def group_norms(self) -> dict[str, Tensor]:
        """The gradient's norm in each of the optimizer's groups by name, before `step` clips and clears. Collective.

        Scalars on the device; {} where the whole norm is all that is known.
        """
        return {}

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """This process's part of each trained parameter by name; writing into it changes the parameter."""

    def refresh(self) -> None:
        """Called after parts were written to, before the network is called again."""
        return None

    @abstractmethod
    def gather(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU from parts. Keys: a parameter's name, or `<name>|<what>`. Collective.

        A tensor without dimensions (a step counter) is whole already. May share memory with the parts.
        """

    @abstractmethod
    def scatter(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's parts of whole tensors that all ranks have; the inverse of `gather`."""

    @abstractmethod
    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state, whole, on the CPU, as `optimizers.moments` names it. Collective."""

    @abstractmethod
    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Put back what `moments` gave, of this strategy or another one, on any number of processes."""

    @abstractmethod
    def full_state(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the network as it was built, whole, on the CPU. Collective."""

    def on_device(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Bytes that one process's device holds of parts (see `memory.estimate`) that one process alone would hold."""
        return dict(sizes)

    def state(self) -> dict[str, Any]:
        """What the strategy itself must remember over a restart, as JSON (the loss scale of fp16)."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave; another strategy's is ignored."""
        return None


def asked_processes() -> int:
    """The number of processes that were started, by the launcher's WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_processes(asked: int, found: int) -> None:
    """Raise UserError where not all processes that were started take part."""
    if asked != found:
        raise UserError(
            f"{asked} processes were started (WORLD_SIZE) but {found} take part; "
            "accelerate ignored the request, start with `python train.py launcher.processes=N` or torchrun"
        )


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


# Optimizers that treat each number by itself, so that a part of a parameter is as good as the whole.
ELEMENTWISE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


def check_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError for an optimizer that may need whole parameters, where processes have parts."""
    if not isinstance(optimizer, ELEMENTWISE):
        raise UserError(
            f"{type(optimizer).__name__} is not known to update parts of parameters as it does whole ones, and this "
            "strategy has parts: use optimizer=adamw, or strategy=ddp"
        )


def resolve_precision(asked: str) -> str:
    """What `auto` means here: bf16 on a GPU that has it, else fp32."""
    if asked != "auto":
        return asked
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def refuse_fp16(precision: str, strategy: str) -> None:
    """Raise UserError: where parameters lie in parts, nothing here scales the loss."""
    if precision == "fp16":
        raise UserError(f"precision=fp16 needs strategy=single or ddp; use precision=bf16 with strategy={strategy}")


def in_precision(forward: Callable, device: torch.device, precision: str) -> Callable:
    """A forward under autocast whose outputs are float32, as accelerate's; `forward` itself for fp32.

    precision: fp32, bf16 or fp16, see `resolve_precision`.
    """
    from accelerate.utils import convert_outputs_to_fp32

    if precision == "fp32":
        return forward
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return convert_outputs_to_fp32(torch.autocast(device.type, dtype)(forward))


# Parts of `memory.estimate` by what a strategy may share out.
MEMORY = {
    "weights": ("trained weights", "frozen weights"),
    "gradients": ("gradients",),
    "moments": ("optimizer moments",),
    "average": ("average of the weights",),
}


def share(sizes: Mapping[str, int], kinds: Sequence[str], processes: int, offloaded: Sequence[str]) -> dict[str, int]:
    """Sizes on one device where some kinds (keys of MEMORY) are shared by the processes and some are on the CPU."""
    shared, elsewhere = ([name for kind in some for name in MEMORY[kind]] for some in (kinds, offloaded))
    return {n: -(-s // processes) if n in shared else s for n, s in sizes.items() if n not in elsewhere}
