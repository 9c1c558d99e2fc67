"""Muon: momentum whose matrix is orthogonalized before it is applied.

Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks"
(https://kellerjordan.github.io/posts/muon/). torch.optim.Muon takes matrices only; here a convolution's kernel counts
as a matrix of (output channels) x (everything else).
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor


def orthogonalize(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The matrix with its singular values brought near 1 (about 0.7 to 1.2), by a quintic Newton-Schulz iteration."""
    x = matrix / (matrix.norm() + 1e-7)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    for _ in range(iterations):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (2.0315 * gram @ gram - 4.7750 * gram) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.T


class Muon(torch.optim.Optimizer):
    """Muon for the weights of hidden layers, AdamW for everything else, in one optimizer.

    groups: parameter groups with names, [{name, lr, params: [(name, parameter), …]}]. lr: of Muon; an update's root
    mean square singular value is lr, whatever the gradient's size, so 0.02 suits most networks.
    adamw_lr_scale: AdamW's rate is lr times this. adamw: regular expressions of further parameter names that AdamW
    takes, as is customary for the layers that touch pixels, tokens or latents. Tensors of less than two dimensions
    (biases, norms) always go to AdamW.
    """

    def __init__(
        self,
        groups: Sequence[dict],
        lr: float,
        momentum: float = 0.9,
        adamw: Sequence[str] = (),
        adamw_lr_scale: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        split = []
        for group in groups:
            hidden: list = []
            others: list = []
            for name, parameter in group["params"]:
                plain = parameter.ndim < 2 or any(re.search(pattern, name) for pattern in adamw)
                (others if plain else hidden).append((name, parameter))
            own = group.get("lr", lr)
            kinds = (("muon", hidden, own), ("adamw", others, own * adamw_lr_scale))
            split += [{**group, "params": ps, "lr": rate, "kind": kind} for kind, ps, rate in kinds if ps]
        defaults = {"lr": lr, "momentum": momentum, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(split, {**defaults, "kind": "muon"})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            update = self._muon if group["kind"] == "muon" else self._adamw
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update(parameter, parameter.grad, self.state[parameter], group)

    def _muon(self, parameter: Tensor, gradient: Tensor, state: dict, group: dict) -> None:
        """Nesterov momentum, orthogonalized."""
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        matrix = gradient.lerp(state["momentum"], group["momentum"]).flatten(1)
        scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        parameter.add_(orthogonalize(matrix).view_as(parameter), alpha=-group["lr"] * scale)

    def _adamw(self, parameter: Tensor, gradient: Tensor, state: dict, group: dict) -> None:
        """AdamW (Loshchilov and Hutter 2019) without the weight decay, which `step` has done."""
        if not state:
            state.update(
                step=torch.zeros(()), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
            )
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2)
        step = float(state["step"])
        scale = (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        denominator = state["exp_avg_sq"].sqrt().add_(group["eps"] * (1 - beta2**step) ** 0.5)
        parameter.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] * scale)
