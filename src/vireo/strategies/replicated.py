"""Every process holds the whole model.

accelerate owns the process group, the device, mixed precision and the DistributedDataParallel wrapper.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vireo import distributed, optimizers
from vireo.errors import UserError
from vireo.strategies.strategy import (
    Strategy,
    asked_processes,
    check_precision,
    check_processes,
    resolve_precision,
)


class Replicated(Strategy):
    """`strategy=single` (one process) and `strategy=ddp` (any number): gradients are averaged.

    processes: "one" refuses to run on several; "many" is DistributedDataParallel, which is plain for one process.
    precision: fp32, bf16, fp16 or auto (bf16 on a GPU that has it, else fp32); weights stay in float32, autocast
    does the rest. timeout: seconds after which a collective that a rank has left ends the run.
    find_unused_parameters: needed only where a step does not use every trained parameter.
    """

    def __init__(
        self,
        processes: Literal["one", "many"] = "many",
        precision: str = "auto",
        timeout: float = 1800,
        find_unused_parameters: bool = False,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

        asked = asked_processes()
        if processes == "one" and asked > 1:
            raise UserError(f"strategy=single runs one process, {asked} were started; use strategy=ddp for several")
        cuda = torch.cuda.is_available()
        self.precision = resolve_precision(precision)
        self.accelerator = Accelerator(
            cpu=not cuda,
            mixed_precision="no" if self.precision == "fp32" else self.precision,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=timeout)),
                DistributedDataParallelKwargs(
                    find_unused_parameters=find_unused_parameters, broadcast_buffers=False, gradient_as_bucket_view=True
                ),
            ],
        )
        check_processes(asked, self.accelerator.num_processes)
        found = self.accelerator.distributed_type
        if found not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
            raise UserError(
                f"strategy=single or ddp was asked for, but accelerate was told by its launcher to use {found.value}; "
                "choose that strategy here too (strategy=zero2, …), or start without that option of accelerate's config"
            )
        self.device = self.accelerator.device
        distributed.open_side_group(timeout)
        self.abandoned = False

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        check_precision(network)
        self.network = network
        self.optimizer = optimizer
        with warnings.catch_warnings():
            # torch 2.13 renames an argument that torch 2.6 knows only by its old name.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.wrapped: nn.Module = self.accelerator.prepare_model(network)
        self.trained = [p for p in network.parameters() if p.requires_grad]
        return self.wrapped

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        if last or self.abandoned:
            yield
        else:
            with self.accelerator.no_sync(self.wrapped):
                yield

    def abandon(self) -> None:
        # Ranks whose forward pass was done expect a backward pass that exchanges gradients, others do not. Until the
        # step's end all of them exchange: what was exchanged before is the same everywhere, and its mean is itself.
        self.abandoned = True

    def backward(self, loss: Tensor) -> None:
        scaler = self.accelerator.scaler
        (scaler.scale(loss) if scaler is not None else loss).backward()

    def step(self, max_norm: float | None) -> Tensor:
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.trained if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if max_norm is not None:
            torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        # The gradients are unscaled already, so the scaler's own step has nothing to add.
        optimizers.guarded_step(self.optimizer, torch.isfinite(norm))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.abandoned = False
        return norm

    def group_norms(self) -> dict[str, Tensor]:
        scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
        named = dict(self.network.named_parameters())
        norms = {}
        for group, names in optimizers.parameter_names(self.optimizer).items():
            gradients = [gradient for name in names if (gradient := named[name].grad) is not None]
            norms[group] = torch.nn.utils.get_total_norm(gradients) / scale
        return norms

    def parts(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.network.named_parameters() if p.requires_grad}

    def gather(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: part.detach().cpu() for name, part in parts.items()} if distributed.is_main() else {}

    def scatter(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(whole)

    def moments(self) -> dict[str, Tensor]:
        return self.gather(optimizers.moments(self.optimizer))

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        optimizers.load_moments(self.optimizer, dict(moments))

    def full_state(self) -> dict[str, Tensor]:
        return self.gather(self.network.state_dict())

    def state(self) -> dict[str, Any]:
        return {} if self.accelerator.scaler is None else {"scaler": self.accelerator.scaler.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.accelerator.scaler is not None and state.get("scaler"):
            self.accelerator.scaler.load_state_dict(state["scaler"])
