"""Whether a network uses its references, and what colours its videos have; nothing here needs further weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vireo.diffusion.flow_schedule import FlowSchedule
from vireo.pixels import to_uint8
from vireo.randomness import Draws

MASK = "reference_mask"  # the condition that says which references are there
BINS = 8  # of a colour
WHITE = 250  # the background of references, and what is almost that


def flow_errors(
    network: nn.Module,
    noise_schedule: FlowSchedule,
    latents: Tensor,
    draws: Draws,
    timestep: float,
    conditions: Mapping[str, Tensor],
    mask: Tensor | None = None,
) -> Tensor:
    """Each sample's mean squared error of the predicted flow at one noise level, float32 (B,).

    latents: clean (B, C, t, h, w). timestep: 1000 sigma. mask: weights (B, 1, t, h, w) of the mean; None: all alike.
    Draws: "noise", the same for all conditions and networks.
    """
    clean = latents.float()
    noise = draws.normal("noise", *clean.shape[1:])
    times = clean.new_full((len(clean),), timestep)
    prediction = network(noise_schedule.add_noise(clean, noise, times), times, **conditions).float()
    squares = (prediction - noise_schedule.target(clean, noise, times)).square().mean(dim=1, keepdim=True)
    weights = torch.ones_like(squares) if mask is None else mask.to(squares)
    return (squares * weights).flatten(1).sum(1) / weights.flatten(1).sum(1).clamp(min=1e-6)


def without_references(conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same conditions with every reference masked out."""
    return {**conditions, MASK: torch.zeros_like(conditions[MASK])}


def with_references_of(conditions: Mapping[str, Tensor], other: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same conditions with the references of another batch."""
    return {name: other[name] if name.startswith("reference_") else value for name, value in conditions.items()}


def colour_distance(references: Tensor, present: Tensor, video: Tensor) -> Tensor:
    """Bhattacharyya's distance of a video's colours to the subject's, (B,) in [0, 1]: the mean over the frames.

    sqrt(1 - sum sqrt(p q)) of two shares of pixels in 8 x 8 x 8 bins. Only the subject is counted in the references,
    everything in the frames, so 0 is out of reach; compare with the target's.

    references: (B, N, 3, H, W) in [0, 1] on white, whose pixels count as background. present: bool (B, N), false for
    padding. video: (B, T, 3, H, W) in [0, 1].
    """
    pictures, frames = to_uint8(references, low=0.0), to_uint8(video, low=0.0)
    found = []
    for row in range(len(frames)):
        chosen = pictures[row][present[row].to(pictures.device)].movedim(1, -1).reshape(-1, 3)
        subject = _shares(chosen[(chosen < WHITE).any(dim=1)])
        shares = torch.stack([_shares(frame.flatten(1).T) for frame in frames[row]])  # (T, bins)
        affinity = (subject.to(shares) * shares).sqrt().sum(dim=1)
        found.append((1 - affinity).clamp(min=0).sqrt().mean())
    return torch.stack(found)


def _shares(pixels: Tensor) -> Tensor:
    """Shares of pixels in 512 bins, float64; uint8 (M, 3). All are 0 where there is no pixel."""
    steps = torch.tensor([BINS * BINS, BINS, 1], device=pixels.device)
    counts = torch.bincount((pixels.long() * BINS // 256 * steps).sum(dim=1), minlength=BINS**3).double()
    return counts / counts.sum().clamp(min=1)
