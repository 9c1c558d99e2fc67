"""Frozen layers in 8 bits: a quarter of float32's memory, or half of bf16's, computed in what the input is in."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vireo.errors import UserError

STORED = torch.float8_e4m3fn  # 3 bits of mantissa; weights of transformers lie well within +-448


def store_in_float8(network: nn.Module) -> None:
    """Store the weights of frozen linear layers inside blocks (members of a ModuleList) in 8 bits, in place.

    What is outside blocks stays: patches, positions, time and the output cost little and matter much. So do biases and
    layers that make the scales of normalisations. The weights lose precision for good.
    """
    for block in (block for holder in network.modules() if isinstance(holder, nn.ModuleList) for block in holder):
        for name, layer in block.named_modules():
            frozen = type(layer) is nn.Linear and not layer.weight.requires_grad
            if frozen and not any("norm" in part for part in name.split(".")):
                layer.weight.data = layer.weight.data.to(STORED)
                layer.__class__ = _Float8Linear


class _Float8Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if self.weight.requires_grad:
            raise UserError("adapter.float8 stores what is frozen; freeze_policy.train names such a layer's weight.")
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Product.apply(input.to(dtype), self.weight, bias)


class _Product(torch.autograd.Function):
    """Keeps the 8-bit weight for the backward pass, where F.linear would keep a copy in full."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(input, weight.to(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight.to(gradients[0].dtype), None, None
