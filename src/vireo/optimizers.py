"""Optimizers, and their moments by parameter name."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw as functional_adamw

from vireo.errors import UserError


def adamw(
    groups: Sequence[dict],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    moments: Literal["fp32", "8bit", "offloaded"] = "fp32",
) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019), torch's fused kernel.

    The fused kernel can turn an update away by a flag on the device, so that a non-finite step needs no
    synchronisation with the host; torch has it for CPUs too.
    moments: "8bit" are those of Dettmers et al. 2021 (https://arxiv.org/abs/2110.02861); tensors of less than 4096
    numbers keep 32 bits. "offloaded" ones are in the host's memory, see `OffloadedAdamW`.
    Raises UserError for 8 bits without a GPU or without bitsandbytes.
    """
    numbers: dict[str, Any] = {"lr": lr, "betas": (betas[0], betas[1]), "eps": eps, "weight_decay": weight_decay}
    match moments:
        case "fp32":
            return torch.optim.AdamW(groups, **numbers, fused=True)
        case "8bit":
            return _adamw_8bit()(groups, **numbers)
        case "offloaded":
            return OffloadedAdamW(groups, **numbers)
    raise UserError(f"optimizer.moments is {moments!r}, expected fp32, 8bit or offloaded")


def _adamw_8bit() -> type[torch.optim.Optimizer]:
    if not torch.cuda.is_available():
        raise UserError("optimizer.moments=8bit needs a GPU, and torch sees none here; use optimizer.moments=fp32.")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"optimizer.moments=8bit needs bitsandbytes, which cannot be imported ({error}): pip install bitsandbytes, "
            "or use optimizer.moments=fp32."
        ) from error
    return AdamW8bit


class OffloadedAdamW(torch.optim.Optimizer):
    """AdamW whose moments stay in the host's memory, where its CPU makes the updates.

    On a GPU that is 8 bytes less for each number that learns, for a copy of its gradient to the host and of its value
    to and fro at each step. For one process, or replicas; strategies with parts have offloads of their own.
    """

    def __init__(
        self,
        groups: Sequence[dict],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": (betas[0], betas[1]), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict) -> None:
        value, gradient = parameter.detach().cpu(), parameter.grad.cpu()  # type: ignore[union-attr]
        stored = self.state[parameter] or {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(value),
            "exp_avg_sq": torch.zeros_like(value),
        }
        state = self.state[parameter] = {name: moment.cpu() for name, moment in stored.items()}
        functional_adamw(
            [value],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            **{name: group[name] for name in ("lr", "eps", "weight_decay")},
        )
        parameter.copy_(value)


def guarded_step(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """One update, turned away where `finite` (bool scalar on the device) is false.

    Fused kernels take a flag, so nothing waits; for other optimizers the host has to look at each step.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(finite):
        optimizer.step()


def parameter_names(optimizer: torch.optim.Optimizer) -> dict[str, list[str]]:
    """The parameters of each of a freeze policy's groups, which an optimizer may have split."""
    names: dict[str, list[str]] = {}
    for group in optimizer.param_groups:
        names.setdefault(group["name"], []).extend(group["param_names"])
    return names


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes on the device that the optimizer's moments take once it has made a step; known before the first one."""

    def size(parameter: Tensor, kind: str) -> int:
        if kind == "muon":
            return 4 * parameter.numel()  # one moment
        if kind == "AdamW8bit" and parameter.numel() >= 4096:
            return 2 * (parameter.numel() + 4 * -(-parameter.numel() // 256))  # and a scale for each block of 256
        if kind == "OffloadedAdamW":
            return 0
        return 8 * parameter.numel()  # two moments in float32

    name = type(optimizer).__name__
    return sum(size(p, group.get("kind", name)) for group in optimizer.param_groups for p in group["params"])


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors named `<parameter name>|<state name>`, whatever the order of groups."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for state_name, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}|{state_name}"] = torch.as_tensor(value)
    return tensors


def load_moments(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put stored moments back. Hyper-parameters always come from the config, only moments from a checkpoint.

    Raises UserError where the stored names or shapes are not those of the optimizer's parameters.
    """
    own = {n: p for g in optimizer.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}
    for name, state in check_moments({n: p.shape for n, p in own.items()}, tensors).items():
        # AdamW's step counters live beside the parameter where the kernel is fused; moments have its dtype already.
        optimizer.state[own[name]] = {
            # Whole numbers are plain ones: bitsandbytes counts steps so, torch in float32.
            k: v.clone().to(own[name].device) if v.ndim or v.is_floating_point() else int(v)
            for k, v in state.items()
        }


def check_moments(shapes: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Stored moments as {parameter name: {state name: tensor}}. shapes: of what is trained, by name.

    Raises UserError for names or shapes that are not those.
    """
    stored: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, state_name = key.rpartition("|")
        stored.setdefault(name, {})[state_name] = value
    strangers = sorted(stored.keys() - shapes.keys())
    if strangers:
        raise UserError(
            f"the checkpoint's optimizer has moments of {len(strangers)} parameters that are not trained now, "
            f"for instance {strangers[0]}. Was the freeze policy or the adapter another one?"
        )
    for name, state in stored.items():
        for state_name, value in state.items():
            is_table = state_name.startswith(("qmap", "absmax"))  # bitsandbytes' scales of its 8-bit moments
            if value.ndim and value.shape != shapes[name] and not is_table:
                raise UserError(
                    f"the checkpoint's {state_name} of {name} has shape {tuple(value.shape)}, "
                    f"the parameter has {tuple(shapes[name])}"
                )
    return stored
