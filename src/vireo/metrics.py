"""Measures of how close two videos are. Pixels are floats in [0, 1], (B, T, C, H, W); results are one value a clip."""

import torch
from torch import Tensor


def frame_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each frame, float64 (B, T)."""
    return (prediction.double() - target.double()).square().mean(dim=(-3, -2, -1))


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip in dB: the mean of its frames' PSNRs, data range 1. (B,)

    The mean of logarithms lies above `pooled_psnr`, the logarithm of the mean (Jensen); papers use both. A frame
    without any error counts as 100 dB, so that a mean stays finite.
    """
    return decibels(frame_mse(prediction, target)).mean(dim=1)


def pooled_psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """PSNR in dB of the mean squared error over the whole clip. (B,)"""
    return decibels(frame_mse(prediction, target).mean(dim=1))


def decibels(mse: Tensor) -> Tensor:
    """-10 log10(mse), at most 100."""
    return -10 * torch.log10(mse.clamp_min(1e-10))


def ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004): 11x11 Gaussian window, sigma 1.5, mean over the clip's frames. (B,)

    For frames smaller than the window, the window shrinks to the largest odd size that fits.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    b, t = target.shape[:2]
    side = min(11, *(s - 1 + s % 2 for s in target.shape[-2:]))
    values = structural_similarity_index_measure(
        prediction.flatten(0, 1).float(),
        target.flatten(0, 1).float(),
        gaussian_kernel=True,
        sigma=1.5 * side / 11,
        kernel_size=side,
        data_range=1.0,
        reduction="none",
    )
    return values.view(b, t).double().mean(dim=1)  # type: ignore[union-attr]


def temporal_psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """PSNR in dB of the differences between successive frames: flicker and lost motion. One frame: 100 dB. (B,)"""
    if target.shape[1] < 2:
        return torch.full((target.shape[0],), 100.0, dtype=torch.float64)
    return decibels(frame_mse(prediction.diff(dim=1), target.diff(dim=1)).mean(dim=1))


MEASURES = {"psnr": psnr, "pooled_psnr": pooled_psnr, "ssim": ssim, "temporal_psnr": temporal_psnr}
