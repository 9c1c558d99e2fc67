"""The one place where 8-bit frames become floating-point pixels and back.

A published recipe divided by 255 twice and trained for days on pictures that were almost black, so nothing else in
vireo divides by 255.
"""

import torch
from torch import Tensor


def to_pixels(frames: Tensor, low: float = -1.0) -> Tensor:
    """Float pixels from 8-bit frames, on the frames' device.

    frames: uint8, any shape, 0 to 255. low: value of black; -1 for VAEs, 0 for TAEHV.
    Returns float32 in [low, 1]. Raises TypeError unless the frames are uint8.
    """
    if frames.dtype != torch.uint8:
        raise TypeError(f"to_pixels takes uint8 frames in 0..255, got {frames.dtype}")
    return frames.float().div_(255).mul_(1 - low).add_(low) if low else frames.float().div_(255)


def to_uint8(pixels: Tensor, low: float = -1.0) -> Tensor:
    """8-bit frames from float pixels in [low, 1]; values outside are clamped, the rest rounded to nearest."""
    return ((pixels.detach().float() - low) / (1 - low) * 255).round().clamp_(0, 255).to(torch.uint8)


def as_8_bit(pixels: Tensor) -> Tensor:
    """Float pixels in [0, 1] as an 8-bit video would have them: what people see is what is measured. float32."""
    return to_pixels(to_uint8(pixels, low=0.0), low=0.0)
