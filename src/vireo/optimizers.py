"""Optimizers, and their moments by parameter name."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vireo.errors import UserError


def adamw(
    groups: Sequence[dict],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019), torch's fused kernel.

    The fused kernel can turn an update away by a flag on the device, so that a non-finite step needs no
    synchronisation with the host; torch has it for CPUs too.
    """
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, fused=True)


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors named `<parameter name>|<state name>`, whatever the order of groups."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for state_name, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}|{state_name}"] = torch.as_tensor(value)
    return tensors


def load_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put stored moments back. Hyper-parameters always come from the config, only moments from a checkpoint.

    Raises UserError where the stored names or shapes are not those of the optimizer's parameters.
    """
    stored: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, state_name = key.rpartition("|")
        stored.setdefault(name, {})[state_name] = value
    own = {n: p for g in optimizer.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}
    strangers = sorted(stored.keys() - own.keys())
    if strangers:
        raise UserError(
            f"the checkpoint's optimizer has moments of {len(strangers)} parameters that are not trained now, "
            f"for instance {strangers[0]}. Was the freeze policy or the adapter another one?"
        )
    for name, state in stored.items():
        parameter = own[name]
        for state_name, value in state.items():
            if value.ndim and value.shape != parameter.shape:
                raise UserError(
                    f"the checkpoint's {state_name} of {name} has shape {tuple(value.shape)}, "
                    f"the parameter has {tuple(parameter.shape)}"
                )
        # AdamW's step counters live beside the parameter where the kernel is fused; moments have its dtype already.
        optimizer.state[parameter] = {k: v.clone().to(parameter.device) for k, v in state.items()}
