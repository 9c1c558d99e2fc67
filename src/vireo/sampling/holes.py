"""What can be done about a hole without a network, and putting a network's filling into the video.

Pictures are float (..., C, H, W), holes (..., 1, H, W) with 1 in the hole, as floats or booleans.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLUR = 21  # pixels, side of the Gaussian; its sigma is OpenCV's for this side
SIGMA = 0.3 * ((BLUR - 1) / 2 - 1) + 0.8
ROUNDS = 48  # of relaxation at each size


def composite(prediction: Tensor, frames: Tensor, hole: Tensor) -> Tensor:
    """The frames with the prediction in and just around the hole, whose blurred edge hides the seam.

    The share m' of the prediction is 1 - (1 - m)(1 - blur(m)): 1 in the hole, fading outside (DiffuEraser's pipeline).
    """
    share = 1 - (1 - hole) * (1 - blurred(hole))
    return share * prediction + (1 - share) * frames


def blurred(hole: Tensor) -> Tensor:
    """By a Gaussian of 21 x 21 pixels, borders reflected where the picture is large enough, else repeated."""
    offsets = torch.arange(BLUR, device=hole.device) - BLUR // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    weights = (weights / weights.sum()).to(hole.dtype)
    flat = hole.flatten(0, -4)
    mode = "reflect" if min(hole.shape[-2:]) > BLUR // 2 else "replicate"
    padded = F.pad(flat, [BLUR // 2] * 4, mode=mode)
    across = F.conv2d(padded, weights.view(1, 1, 1, -1))
    return F.conv2d(across, weights.view(1, 1, -1, 1)).reshape(hole.shape)


def ring_fill(frames: Tensor, hole: Tensor, width: int = 4) -> Tensor:
    """Each frame's hole in the mean colour of the ring of `width` pixels around it; without a ring, in grey."""
    flat, inside = frames.flatten(0, -4), hole.flatten(0, -4).to(frames.dtype)
    ring = F.max_pool2d(inside, 2 * width + 1, stride=1, padding=width) - inside
    total = ring.sum(dim=(-2, -1), keepdim=True)
    mean = (flat * ring).sum(dim=(-2, -1), keepdim=True) / total.clamp_min(1)
    mean = torch.where(total > 0, mean, torch.full_like(mean, 0.5))
    return torch.where(inside > 0, mean, flat).reshape(frames.shape)


def harmonic_fill(frames: Tensor, hole: Tensor) -> Tensor:
    """Each frame's hole filled as smoothly as its surrounding allows: every pixel is the mean of its four neighbours.

    Solved by relaxation from coarse to fine. Nothing is taken from other frames.
    """
    keep = 1 - hole.flatten(0, -4).to(frames.dtype)
    return _relaxed(frames.flatten(0, -4), keep).reshape(frames.shape)


def _relaxed(pictures: Tensor, keep: Tensor) -> Tensor:
    """pictures: (N, C, H, W), of which the pixels count where keep, (N, 1, H, W), is 1."""
    if min(pictures.shape[-2:]) < 4 or bool(keep.all()):
        start = (pictures * keep).sum(dim=(-2, -1), keepdim=True) / keep.sum(dim=(-2, -1), keepdim=True).clamp_min(1)
    else:
        known = F.avg_pool2d(keep, 2, ceil_mode=True)
        small = F.avg_pool2d(pictures * keep, 2, ceil_mode=True) / known.clamp_min(1e-6)
        coarse = _relaxed(small, (known > 0).to(keep.dtype))
        start = F.interpolate(coarse, pictures.shape[-2:], mode="bilinear", align_corners=False)
    filled = torch.where(keep > 0, pictures, start)
    for _ in range(ROUNDS):
        wide = F.pad(filled, (1, 1, 1, 1), mode="replicate")
        mean = (wide[..., 1:-1, 2:] + wide[..., 1:-1, :-2] + wide[..., 2:, 1:-1] + wide[..., :-2, 1:-1]) / 4
        filled = torch.where(keep > 0, pictures, mean)
    return filled
