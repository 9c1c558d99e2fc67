"""One frame after the other, each made from those before it."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vireo.errors import UserError

Recycle = Literal["pixels", "latents"]
Noise = Literal["same", "new"]


def roll_out(
    sample: Callable[[Tensor, int], Tensor],
    decode: Callable[[Tensor], Tensor],
    encode: Callable[[Tensor], Tensor],
    window: Tensor,
    num_frames: int,
    scaling_factor: float,
    recycle: Recycle = "pixels",
) -> Tensor:
    """The next `num_frames` frames, uint8 (B, num_frames, 3, H, W).

    window: latents of the last N frames, oldest first, (B, N, C, h, w), not scaled. It is kept from step to step: each
        new frame is encoded once, pushed behind the others, and the oldest is dropped.
    sample: scaled latents (B, C, h, w) of the frame after a window; also gets the frame's number, from 0.
    decode: scaled latents to uint8 frames (B, 3, H, W). encode: back, to the posterior's mode, not scaled.
    recycle: "pixels" feeds back what a viewer would see, as training does. "latents" saves the round trip through the
        VAE, and differs a little from training. Raises UserError for another one.
    """
    check_choice("recycle", recycle, Recycle)
    frames = []
    for number in range(num_frames):
        latents = sample(window, number)
        frames.append(decode(latents))
        if number < num_frames - 1:
            latest = encode(frames[-1]) if recycle == "pixels" else latents / scaling_factor
            window = torch.cat([window[:, 1:], latest[:, None]], dim=1)
    return torch.stack(frames, dim=1)


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises UserError for a value that is none of a `Literal`'s."""
    if value not in get_args(choices):
        raise UserError(f"{name} is {value!r}; expected {' or '.join(map(repr, get_args(choices)))}")


def padded(history: Tensor, length: int) -> Tensor:
    """The last `length` of (B, T, ...); a shorter history is preceded by copies of its oldest entry."""
    history = history[:, -length:]
    missing = length - history.shape[1]
    return torch.cat([history[:, :1].expand(-1, missing, *history.shape[2:]), history], dim=1) if missing else history
