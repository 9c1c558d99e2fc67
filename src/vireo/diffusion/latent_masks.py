"""Masks of pixels on the grid of latents."""

import torch.nn.functional as F
from torch import Tensor


def latent_mask(mask: Tensor, latents: Tensor) -> Tensor:
    """The share of a mask's pixels that each latent stands for, float32 (B, 1, t, h, w).

    mask: (B, T, 1, H, W), 0 to 1; with T of 1 it is the same at all times. latents: (B, C, t, h, w).
    """
    frames, height, width = latents.shape[2:]
    return F.adaptive_avg_pool3d(mask.transpose(1, 2).float().to(latents.device), (frames, height, width))
