"""Measures of how close two videos are. Pixels are floats in [0, 1], (B, T, C, H, W); results are one value a clip."""

import torch
from torch import Tensor

from vireo.pixels import as_8_bit

MOST = 100.0  # dB; what a frame without error counts as
HALF_A_LEVEL = 0.5 / 255  # of 8-bit pixels


def frame_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each frame, float64 (B, T)."""
    return (prediction.double() - target.double()).square().mean(dim=(-3, -2, -1))


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the whole clip. (B,)"""
    return frame_mse(prediction, target).mean(dim=1)


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
    """-10 log10(mse), at most MOST."""
    return -10 * torch.log10(mse.clamp_min(10 ** (-MOST / 10)))


def mean_where(region: Tensor, values: Tensor) -> Tensor:
    """Mean over a region and all colours, 0 where it is empty: (B, T, 1, H, W), (B, T, C, H, W) -> (B,)."""
    chosen = region.expand_as(values).to(values.dtype)
    return (values * chosen).sum(dim=(1, 2, 3, 4)) / chosen.sum(dim=(1, 2, 3, 4)).clamp_min(1)


def ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004): 11x11 Gaussian window, sigma 1.5, mean over the clip's frames. (B,)

    For frames smaller than the window, the window shrinks to the largest odd size that fits.
    """
    return ssim_map(prediction, target).mean(dim=(1, 2, 3, 4))


def ssim_map(prediction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity around each pixel, see `ssim`; frames are mirrored at borders. Float64 (B, T, C, H, W)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    side = min(11, *(s - 1 + s % 2 for s in target.shape[-2:]))
    _, similarity = structural_similarity_index_measure(
        prediction.flatten(0, 1).float(),
        target.flatten(0, 1).float(),
        gaussian_kernel=True,
        sigma=1.5 * side / 11,
        kernel_size=side,
        data_range=1.0,
        reduction="none",
        return_full_image=True,
    )
    return similarity.view(target.shape).double()


def box_ssim(prediction: Tensor, target: Tensor, side: int = 65) -> Tensor:
    """Structural similarity as papers on video inpainting have it: each colour by itself, even windows of 65x65. (B, T)

    It is skimage's structural_similarity(win_size=side) with sample covariances. For smaller frames the window shrinks
    to the largest odd size that fits.
    """
    side = min(side, *(s - 1 + s % 2 for s in target.shape[-2:]))
    x, y = prediction.double(), target.double()
    mean_x, mean_y, xx, yy, xy = (_box_mean(values, side) for values in (x, y, x * x, y * y, x * y))
    sample = side**2 / max(side**2 - 1, 1)
    var_x, var_y, cov = sample * (xx - mean_x**2), sample * (yy - mean_y**2), sample * (xy - mean_x * mean_y)
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return likeness.mean(dim=(-3, -2, -1))


def _box_mean(values: Tensor, side: int) -> Tensor:
    """Means over all windows of side x side inside the frames, (..., H, W) -> (..., H - side + 1, W - side + 1)."""
    sums = torch.nn.functional.pad(values.cumsum(-1).cumsum(-2), (1, 0, 1, 0))
    box = sums[..., side:, side:] - sums[..., :-side, side:] - sums[..., side:, :-side] + sums[..., :-side, :-side]
    return box / side**2


def temporal_psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """PSNR in dB of the differences between successive frames: flicker and lost motion. Two frames at least. (B,)"""
    return decibels(frame_mse(prediction.diff(dim=1), target.diff(dim=1)).mean(dim=1))


def flicker(prediction: Tensor, target: Tensor) -> Tensor:
    """How much more than the target a clip jumps to and fro: 1 as much, above flickering, below smeared in time. (B,)

    Mean absolute second difference in time of the prediction over that of the target, each plus half a level of 8-bit
    pixels, so that a target that stands still divides by what cannot be seen and not by nothing. Three frames at least.
    """
    jumps, expected = (x.double().diff(n=2, dim=1).abs().mean(dim=(1, 2, 3, 4)) for x in (prediction, target))
    return (jumps + HALF_A_LEVEL) / (expected + HALF_A_LEVEL)


MEASURES = {
    "psnr": psnr,
    "pooled_psnr": pooled_psnr,
    "mse": mse,
    "ssim": ssim,
    "temporal_psnr": temporal_psnr,
    "flicker": flicker,
}
FRAMES_NEEDED = {"temporal_psnr": 2, "flicker": 3}


def measure_video(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """Every weight-free measure of one clip (T, C, H, W), on the pixels an 8-bit video would have.

    What a clip is too short for is left out.
    """
    a, b = as_8_bit(prediction)[None], as_8_bit(target)[None]
    possible = [name for name in MEASURES if len(target) >= FRAMES_NEEDED.get(name, 1)]
    return {name: float(MEASURES[name](a, b)[0]) for name in possible}
