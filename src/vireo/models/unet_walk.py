"""One walk through a UNet of Stable Diffusion's kind that can take in, or give out, a feature at each of its sites.

BrushNet gives its features to a second UNet at places that no argument of diffusers' `forward` reaches: also on the way
up, and between a spatial layer and its motion module. So the blocks are diffusers', and the order in which they are
called is written down here.

Sites, in this order, for L layers in each of 4 blocks: the first convolution; on the way down each layer and each
downsampler; the middle block; on the way up each layer and each upsampler. That is 1 + 4 L + 3, 1 and 4 (L + 1) + 3.

Source: https://github.com/lixiaowen-xw/DiffuEraser (AnimateDiff's motion modules: https://arxiv.org/abs/2307.04725).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def walk(
    unet: Any,
    x: Tensor,
    timesteps: Tensor,
    context: Tensor,
    num_frames: int = 1,
    *,
    residuals: Sequence[Tensor] | None = None,
    features: list[Tensor] | None = None,
    gradient_checkpointing: bool = False,
) -> Tensor:
    """What the output layers get, (B * T, C, h, w).

    unet: UNet2DConditionModel, UNetMotionModel, or another module with their time embedding and blocks.
    x: the first convolution's output, (B * T, C, h, w), a video's frames next to each other. timesteps: int64 (B,).
    context: (B, L, D). num_frames: T.
    residuals: one for each site, added there. features: a list that gets the value of each site.
    gradient_checkpointing: compute each layer twice in exchange for the memory of its activations.
    """
    # Repeated first, since the last bits of a row's embedding depend on how many rows there are.
    timesteps, context = (given.repeat_interleave(num_frames, dim=0) for given in (timesteps, context.to(x.dtype)))
    embedding = unet.time_embedding(unet.time_proj(timesteps).to(x.dtype))
    left = iter(residuals or ())

    def site(x: Tensor) -> Tensor:
        if features is not None:
            features.append(x)
        return x if residuals is None else x + next(left)

    def run(compute: Callable[..., Tensor], *given: Any, **named: Any) -> Tensor:
        if gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(compute, *given, use_reentrant=False, **named)
        return compute(*given, **named)

    def layer(block: nn.Module, number: int, x: Tensor) -> Tensor:
        """A spatial layer, what is added after it, and its motion module."""
        x = site(run(_spatial, block, number, x, embedding, context))
        motion_modules = _modules(block, "motion_modules")
        return run(motion_modules[number], x, num_frames=num_frames) if motion_modules else x

    skips = [x]  # the bare first convolution, without what is added to it
    x = site(x)
    for block in unet.down_blocks:
        for number in range(len(block.resnets)):
            x = layer(block, number, x)
            skips.append(x)
        if block.downsamplers:
            x = site(block.downsamplers[0](x))
            skips.append(x)
    middle = unet.mid_block
    x = site(run(_middle, middle, x, embedding, context))
    if _modules(middle, "motion_modules"):
        x = run(middle.motion_modules[0], x, num_frames=num_frames)
        x = run(middle.resnets[1], x, embedding)  # a second time: the released weights were trained so
    for block in unet.up_blocks:
        for number in range(len(block.resnets)):
            x = layer(block, number, torch.cat([x, skips.pop()], dim=1))
        if block.upsamplers:
            x = site(block.upsamplers[0](x, skips[-1].shape[-2:]))
    return x


def _modules(block: nn.Module, name: str) -> Any:
    """A block's attentions or motion modules; nothing where it has none."""
    return getattr(block, name, ())


def _spatial(block: Any, number: int, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
    x = block.resnets[number](x, embedding)
    if _modules(block, "attentions"):
        x = block.attentions[number](x, context, return_dict=False)[0]
    return x


def _middle(block: Any, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
    x = block.resnets[0](x, embedding)
    if _modules(block, "attentions"):
        x = block.attentions[0](x, context, return_dict=False)[0]
    return block.resnets[1](x, embedding)
