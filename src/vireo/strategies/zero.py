"""ZeRO: DeepSpeed shares out moments and gradients (stage 2) or everything (stage 3), through accelerate.

DeepSpeed owns clipping and the update, since only it knows where the gradients lie; the schedule, accumulation and the
number format of the weights stay the loop's. Read from the source of deepspeed 0.19 and measured on a CPU.
"""

import math
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vireo import distributed, optimizers
from vireo.errors import UserError
from vireo.strategies import zero_ops
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


class Zero(Strategy):
    """`strategy=zero2`, `zero2_offload` and `zero3`.

    config: DeepSpeed's own configuration, with the run's numbers in it. Two values get its form here:
        torch_autocast, a precision, since what `auto` means is known only on the machine; gradient_clipping, None as 0.
    precision: fp32, bf16 or auto, by autocast from float32 weights as in `Replicated`. timeout: see there.

    Raises UserError where something else runs in the end than what was asked for: accelerate ignores DeepSpeed
    silently in some environments.
    """

    def __init__(self, config: dict[str, Any], precision: str = "auto", timeout: float = 1800) -> None:
        self.precision = resolve_precision(precision)
        refuse_fp16(self.precision, "zero2 or zero3")
        autocast = {"enabled": self.precision == "bf16", "dtype": "bfloat16"}
        self.config = {**config, "torch_autocast": autocast}
        self.config["gradient_clipping"] = config["gradient_clipping"] or 0.0
        zero_ops.prepare()
        if asked_processes() == 1:
            _be_a_group_of_one()
        from accelerate import Accelerator, DeepSpeedPlugin
        from accelerate.utils import InitProcessGroupKwargs

        backend = "nccl" if torch.cuda.is_available() else "gloo"
        self.accelerator = Accelerator(
            mixed_precision="no",
            gradient_accumulation_steps=config["gradient_accumulation_steps"],
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=self.config),
            kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=timedelta(seconds=timeout))],
        )
        check_processes(asked_processes(), self.accelerator.num_processes)
        found = self.accelerator.distributed_type
        if found.value != "DEEPSPEED":
            raise UserError(
                f"DeepSpeed was asked for, but accelerate chose {found.value}: is ACCELERATE_USE_CPU set, or use_cpu "
                "in the config of `accelerate launch`?"
            )
        self.device = self.accelerator.device
        _forget_in_transformers()
        distributed.open_side_group(timeout)

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        check_precision(network)
        check_elementwise(optimizer)
        self.network, self.optimizer = network, optimizer
        self.groups = {name: i for i, group in enumerate(optimizer.param_groups) for name in group["param_names"]}
        network.forward = in_precision(network.forward, self.device, self.precision)  # type: ignore[method-assign]
        self.engine, _ = self.accelerator.prepare(network, optimizer)
        _forget_in_transformers()
        self.zero = self.engine.optimizer
        self._check_engine()
        # Any: DeepSpeed hangs its own attributes (ds_shape, ds_tensor, …) on parameters.
        self.trained: dict[str, Any] = {n: p for n, p in network.named_parameters() if p.requires_grad}
        return self.engine

    def _check_engine(self) -> None:
        """Compare what runs with what was asked for. Raises UserError for a difference."""
        wanted = self.config["zero_optimization"]
        offload = wanted.get("offload_optimizer", {}).get("device", "none") != "none"
        asked = {
            "stage": wanted["stage"],
            "offload": offload,
            "processes": asked_processes(),
            "batch": self.config["train_micro_batch_size_per_gpu"],
            "clipping": self.config["gradient_clipping"],
            "autocast": self.config["torch_autocast"]["enabled"],
        }
        found = {
            "stage": int(self.engine.zero_optimization_stage()),
            "offload": bool(self.zero.cpu_offload if asked["stage"] < 3 else self.zero.offload_optimizer),
            "processes": self.engine.dp_world_size,
            "batch": self.engine.train_micro_batch_size_per_gpu(),
            "clipping": self.engine.gradient_clipping(),
            "autocast": self.engine.torch_autocast_enabled(),
        }
        if asked != found:
            raise UserError(f"DeepSpeed runs with {found}, asked for was {asked}")

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, max_norm: float | None) -> Tensor:
        if (max_norm or 0.0) != self.engine.gradient_clipping():
            raise ValueError(f"DeepSpeed clips at {self.engine.gradient_clipping()}, the step asks for {max_norm}")
        self.engine.step()  # which measures the norm, turns the update away where it is not finite, and clears
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.device)

    @property
    def shards(self) -> bool:
        return self.config["zero_optimization"]["stage"] == 3

    @property
    def forward_is_local(self) -> bool:  # type: ignore[override]
        return not self.shards

    def parts(self) -> dict[str, Tensor]:
        return {name: (p.ds_tensor if self.shards else p).detach() for name, p in self.trained.items()}

    def refresh(self) -> None:
        if self.shards:  # small parameters stay whole between steps, and would keep their old values
            for parameter in self.trained.values():
                parameter.partition()

    def gather(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole = {}
        for name, part in parts.items():
            value = part
            if self.shards and part.ndim:
                parameter = self.trained[name.partition("|")[0]]
                value = distributed.concatenate(part.to(self.device))[: parameter.ds_numel].view(parameter.ds_shape)
            if distributed.is_main():
                whole[name] = value.detach().cpu()
        return whole

    def scatter(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.shards:
            return dict(whole)
        return {name: value if value.ndim == 0 else self._part(value) for name, value in whole.items()}

    def _part(self, whole: Tensor) -> Tensor:
        """This rank's chunk of the flat tensor, padded so that all chunks are equally long."""
        size = math.ceil(whole.numel() / dist.get_world_size())
        padded = torch.zeros(size * dist.get_world_size(), dtype=whole.dtype)
        padded[: whole.numel()] = whole.flatten()
        return padded[size * dist.get_rank() :][:size]

    def _flat(self) -> list[Tensor]:
        """The flat tensors that DeepSpeed's optimizer updates; its state hangs on them."""
        return self.zero.fp32_partitioned_groups_flat if self.shards else self.zero.single_partition_of_fp32_groups

    def moments(self) -> dict[str, Tensor]:
        moments: dict[str, Tensor] = {}
        for name, flat, own, there in self._places():
            for key, value in self.zero.optimizer.state.get(flat, {}).items():
                moments |= self._moment(f"{name}|{key}", value, own, there)
        return moments

    def _moment(self, key: str, flat: Tensor, own: slice, there: slice) -> dict[str, Tensor]:
        """A whole moment on the main process, from what each has in its flat tensor."""
        if flat.ndim == 0:
            return self.gather({key: flat})
        if self.shards:
            return self.gather({key: flat[own]})
        parameter = self.trained[key.partition("|")[0]]
        whole = torch.zeros(parameter.numel(), dtype=flat.dtype, device=self.device)
        whole[there] = flat[own].to(self.device)
        dist.all_reduce(whole)
        return self.gather({key: whole.view_as(parameter)})

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        shapes = {name: p.ds_shape if self.shards else p.shape for name, p in self.trained.items()}
        stored = optimizers.check_moments(shapes, moments)
        state = self.zero.optimizer.state
        for name, flat, own, there in self._places():
            for key, value in stored.get(name, {}).items():
                if value.ndim == 0:
                    state[flat][key] = value.clone()
                    continue
                if key not in state[flat]:
                    state[flat][key] = torch.zeros_like(flat)
                part = self._part(value) if self.shards else value.flatten()[there]
                state[flat][key][own] = part.to(flat.device)

    def _places(self) -> Iterator[tuple[str, Tensor, slice, slice]]:
        """Where each trained parameter lies: name, the flat tensor that is updated, its place there, its place in the
        flattened parameter (stage 2; a stage-3 process has its chunk, padded).

        DeepSpeed's own `safe_get_full_optimizer_state` fails in stage 2 for all groups of parameters but the first.
        """
        for name, parameter in self.trained.items():
            if self.shards:
                group, start, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
                yield name, self.zero.fp32_partitioned_groups_flat[group], slice(start, start + size), slice(0, 0)
                continue
            found = parameter._hp_mapping  # None: this process has nothing of it
            group = self.groups[name]
            flat = self.zero.single_partition_of_fp32_groups[group]
            if found is None:
                yield name, flat, slice(0, 0), slice(0, 0)
                continue
            own, there = found.get_hp_fragment_address(), found.lp_fragment_address
            yield (name, flat, slice(own.start, own.start + own.numel), slice(there.start, there.start + there.numel))

    def full_state(self) -> dict[str, Tensor]:
        state = {}
        for name, value in self.network.state_dict(keep_vars=True).items():
            whole = value
            if hasattr(value, "ds_tensor"):
                part = distributed.concatenate(value.ds_tensor.detach().to(self.device))
                whole = part[: value.ds_numel].view(value.ds_shape)
            if distributed.is_main():
                state[name] = whole.detach().cpu()
        return state

    def on_device(self, sizes: Mapping[str, int]) -> dict[str, int]:
        offloads = "offload_optimizer" in self.config["zero_optimization"]
        kinds = ("weights", "gradients", "moments", "average") if self.shards else ("gradients", "moments")
        held = share(sizes, kinds, dist.get_world_size(), ("moments", "gradients") if offloads else ())
        if not self.shards and not offloads:  # stage 2 updates a copy of each process's part
            held["copy that is updated"] = -(-sizes["trained weights"] // dist.get_world_size())
        return held


def _forget_in_transformers() -> None:
    """Take back what accelerate tells transformers: it would cut up every model that it loads, frozen encoders too."""
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def _be_a_group_of_one() -> None:
    """Say so in the environment, where DeepSpeed looks for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in group.items():
        os.environ.setdefault(name, value)
