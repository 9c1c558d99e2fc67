"""Every process holds a shard of each parameter: FSDP2, torch's `fully_shard`, on GPUs and on CPUs.

accelerate is not asked, since it silently ignores FSDP on a CPU.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from vireo import distributed, optimizers
from vireo.errors import UserError
from vireo.models.network import Network
from vireo.strategies.strategy import (
    Strategy,
    asked_processes,
    check_elementwise,
    check_precision,
    check_processes,
    in_precision,
    refuse_fp16,
    resolve_precision,
    share,
)


class FullySharded(Strategy):
    """`strategy=fsdp` and `fsdp_offload`: parameters, gradients, moments and averages are shared by the processes.

    Parameters are gathered unit by unit in the forward and the backward pass. A unit is a member of a list of modules
    (a transformer's or a UNet's block) with at least `unit` parameters, outermost first; the network's rest is one
    more. Every micro-step exchanges gradients, since whole ones would need the memory that is being saved.

    The optimizer sees plain tensors, the parts, so any that works element by element can be used with its kernels.
    offload: parts, moments and the update are on the CPU, pinned where there is a GPU.
    precision: fp32, bf16 or auto, by autocast from float32 weights as in `Replicated`. timeout: see there.
    """

    forward_is_local = False  # it gathers parameters

    def __init__(
        self, offload: bool = False, unit: int = 1_000_000, precision: str = "auto", timeout: float = 1800
    ) -> None:
        self.precision, self.offload, self.unit = resolve_precision(precision), offload, unit
        refuse_fp16(self.precision, "fsdp")
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            backend, wait = "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(seconds=timeout)
            if asked_processes() == 1:  # a group of one needs no address to meet at
                dist.init_process_group(backend, timeout=wait, store=dist.HashStore(), rank=0, world_size=1)
            else:
                dist.init_process_group(backend, timeout=wait)
        check_processes(asked_processes(), dist.get_world_size())
        self.mesh = init_device_mesh(self.device.type, (dist.get_world_size(),))
        distributed.open_side_group(timeout)

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        check_precision(network)
        check_elementwise(optimizer)
        self.network, self.optimizer = network, optimizer
        network.to(self.device)
        network.forward = in_precision(network.forward, self.device, self.precision)  # type: ignore[method-assign]
        policy = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if self.offload else OffloadPolicy()
        for module in [*units(network, self.unit), network]:
            # The root, too, is sharded again after its forward: otherwise its parts would not be what is called.
            fully_shard(module, mesh=self.mesh, reshard_after_forward=True, offload_policy=policy)
            # What is gathered first is laid out anew by some versions of torch (padded), and parts must not move later.
            unit: Any = module  # an FSDPModule from now on
            unit.unshard()
            unit.reshard()
        self.trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
        self.local = {name: nn.Parameter(part) for name, part in self.parts().items()}
        for group in optimizer.param_groups:
            group["params"] = [self.local[name] for name in group["param_names"]]
        self.checked = False
        return network

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def _check_parts(self) -> None:
        """Raises UserError if the parts that are updated are no longer those that are gathered."""
        moved = [name for name, part in self.parts().items() if part.data_ptr() != self.local[name].data_ptr()]
        if moved:
            raise UserError(
                f"torch {torch.__version__} has moved FSDP's shards in the first step, {moved[0]} for one, so they "
                "would not learn. Use another version of torch, or strategy=zero3"
            )

    def step(self, max_norm: float | None) -> Tensor:
        if not self.checked:
            self._check_parts()
            self.checked = True
        gradients = []
        for name, parameter in self.trained.items():
            if isinstance(parameter.grad, DTensor):
                gradients.append(parameter.grad.to_local())
                self.local[name].grad = gradients[-1]
                parameter.grad = None
        norm = self._total_norm(gradients)
        if max_norm is not None:
            factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            torch._foreach_mul_(gradients, factor.to("cpu") if self.offload else factor)
        finite = torch.isfinite(norm)
        optimizers.guarded_step(self.optimizer, finite.cpu() if self.offload else finite)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def group_norms(self) -> dict[str, Tensor]:
        norms = {}
        for group, names in optimizers.parameter_names(self.optimizer).items():
            found = (self.trained[name].grad for name in names)
            norms[group] = self._total_norm(
                [gradient.to_local() for gradient in found if isinstance(gradient, DTensor)]
            )
        return norms

    def _total_norm(self, gradients: list[Tensor]) -> Tensor:
        square = torch.nn.utils.get_total_norm(gradients).to(self.device).square()
        dist.all_reduce(square)
        return square.sqrt()

    def parts(self) -> dict[str, Tensor]:
        return {name: p.detach().to_local() for name, p in self.trained.items()}  # type: ignore[attr-defined]

    def gather(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole = {}
        for name, part in parts.items():
            value = part if part.ndim == 0 else self._whole(part, self.trained[name.partition("|")[0]])
            if distributed.is_main():
                whole[name] = value.detach().cpu()
        return whole

    def _whole(self, part: Tensor, like: Tensor) -> Tensor:
        own, shape, stride = part.detach().to(self.device), like.shape, like.stride()
        return DTensor.from_local(own, self.mesh, [Shard(0)], shape=shape, stride=stride).full_tensor()

    def scatter(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value if value.ndim == 0 else self._part(value) for name, value in whole.items()}

    def _part(self, whole: Tensor) -> Tensor:
        chunks = whole.chunk(dist.get_world_size())
        return chunks[dist.get_rank()] if dist.get_rank() < len(chunks) else whole[:0]

    def moments(self) -> dict[str, Tensor]:
        return self.gather(optimizers.moments(self.optimizer))

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        optimizers.load_moments(self.optimizer, self.scatter(moments))

    def full_state(self) -> dict[str, Tensor]:
        state = {}
        for name, value in self.network.state_dict().items():
            whole = value
            if isinstance(value, DTensor):
                whole = self._whole(value.to_local(), value)
            if distributed.is_main():
                state[name] = whole.detach().cpu()
        return state

    def on_device(self, sizes: Mapping[str, int]) -> dict[str, int]:
        everything = ("weights", "gradients", "moments", "average")
        return share(sizes, everything, dist.get_world_size(), everything if self.offload else ())


def units(network: nn.Module, at_least: int) -> list[nn.Module]:
    """The members of lists of modules that have at least so many parameters, none inside another one.

    Of members that the network calls in parts, these parts.
    """
    in_parts = network.called_in_parts() if isinstance(network, Network) else ()
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in network.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and module not in inside:
            for member in module:
                large = sum(p.numel() for p in member.parameters()) >= at_least
                if large and member not in inside and member not in in_parts:
                    found.append(member)
                    inside.update(member.modules())
    return found
