"""Clips longer than a network was trained on: overlapping windows, whose predictions are blended at every step."""

from collections.abc import Callable

import torch
from torch import Tensor

from vireo.errors import UserError


class Windows:
    """A network (noisy, timesteps, **conditions) for clips of any length, made of one for at most `length` frames.

    Each frame's prediction is a mean of those of the windows that it lies in, with weights that rise and fall linearly
    over `overlap` frames; so one scheduler denoises the whole clip. A clip of one window goes through unchanged.
    Conditions that have the clip's frames as third axis are cut like the latents. Raises UserError for an overlap that
    leaves no progress.
    """

    def __init__(self, network: Callable[..., Tensor], length: int, overlap: int) -> None:
        if not 0 <= overlap < length:
            raise UserError(f"windows of {length} frames cannot overlap by {overlap}: expected 0 to {length - 1}")
        self.network, self.length, self.overlap = network, length, overlap

    def __call__(self, noisy: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        """noisy: (B, C, T, h, w) -> (B, C, T, h, w)."""
        frames = noisy.shape[2]
        if frames <= self.length:
            return self.network(noisy, timesteps, **conditions)
        total, weights = torch.zeros_like(noisy), torch.zeros(frames, device=noisy.device, dtype=noisy.dtype)
        ramp = torch.arange(1, self.length + 1, device=noisy.device)
        ramp = torch.minimum(ramp, ramp.flip(0)).clamp(max=self.overlap + 1).to(noisy.dtype)
        for start in self.starts(frames):
            part = slice(start, start + self.length)
            own = {
                name: value[:, :, part] if value.ndim == 5 and value.shape[2] == frames else value
                for name, value in conditions.items()
            }
            total[:, :, part] += ramp[:, None, None] * self.network(noisy[:, :, part], timesteps, **own)
            weights[part] += ramp
        return total / weights[:, None, None]

    def starts(self, frames: int) -> list[int]:
        """First frames of the windows, the last of which ends with the clip."""
        last = max(frames - self.length, 0)
        return [*range(0, last, self.length - self.overlap), last]
