"""Dense optical flow by polynomial expansion (Farneback 2003, "Two-Frame Motion Estimation Based on Polynomial …").

As OpenCV's calcOpticalFlowFarneback computes it (flags 0), on which evaluations of video models rely, without OpenCV.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vireo.pixels import to_uint8

GREY = (0.299, 0.587, 0.114)
SMALLEST = 32  # side of a picture in the pyramid
BORDER = (0.14, 0.14, 0.4472, 0.4472, 0.4472)  # weights of the outermost pixels, from the border inwards


def farneback(
    first: Tensor,
    second: Tensor,
    pyr_scale: float = 0.5,
    levels: int = 3,
    winsize: int = 15,
    iterations: int = 3,
    poly_n: int = 5,
    poly_sigma: float = 1.2,
) -> Tensor:
    """Motion of each pixel from the first picture to the second, float32 (B, 2, H, W): x and y, in pixels.

    first, second: grey pictures (B, H, W), 0 to 255. The other arguments have OpenCV's names and the usual values; with
    these, means agree with OpenCV 5.0 to 0.2 %, single pixels away from borders to a hundredth of a pixel.
    """
    pictures = torch.stack([first, second], dim=1).float()  # (B, 2, H, W)
    height, width = pictures.shape[-2:]
    scale, used = 1.0, 0
    while used < levels and min(height, width) * scale * pyr_scale >= SMALLEST:
        scale, used = scale * pyr_scale, used + 1
    flow: Tensor | None = None
    for level in range(used, -1, -1):
        scale = pyr_scale**level
        size = (round(height * scale), round(width * scale))
        shrunk = _shrunk(pictures, scale, size)
        before, after = (_expansion(shrunk[:, place, None], poly_n, poly_sigma) for place in (0, 1))
        if flow is None:
            flow = pictures.new_zeros(len(pictures), 2, *size)
        else:
            flow = F.interpolate(flow, size, mode="bilinear", align_corners=False) / pyr_scale
        for _ in range(iterations):
            flow = _solved(_box(_equations(before, after, flow), winsize))
    assert flow is not None
    return flow


def motion_amplitude(video: Tensor) -> Tensor:
    """|mean flow| of videos, float32 (B,), in pixels: over x, y, both components and all pairs of consecutive frames.

    As OpenS2V-Eval (https://github.com/PKU-YuanGroup/OpenS2V-Nexus) measures it, where each flow is averaged over areas
    first, which leaves the mean as it is. Signs count, so opposite motions cancel.

    video: (B, T, 3, H, W) in [0, 1], T > 1.
    """
    weights = torch.tensor(GREY, device=video.device).view(3, 1, 1)
    grey = (to_uint8(video, low=0.0) * weights).sum(dim=2).round()  # (B, T, H, W)
    pairs = zip(grey.unbind(1), grey[:, 1:].unbind(1), strict=False)
    return torch.stack([farneback(*pair).mean(dim=(1, 2, 3)) for pair in pairs]).mean(dim=0).abs()


def _shrunk(pictures: Tensor, scale: float, size: tuple[int, int]) -> Tensor:
    """(B, 2, H, W) blurred and made smaller."""
    sigma = (1 / scale - 1) * 0.5
    length = max(round(sigma * 5) | 1, 3)
    if sigma > 0:
        distance = torch.arange(length, dtype=torch.float32, device=pictures.device) - length // 2
        kernel = torch.exp(-distance.square() / (2 * sigma**2))
        kernel, reach = kernel / kernel.sum(), length // 2
        blurred = F.pad(pictures.flatten(0, 1)[:, None], (reach, reach, reach, reach), mode="reflect")
        blurred = F.conv2d(F.conv2d(blurred, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
        pictures = blurred[:, 0].unflatten(0, pictures.shape[:2])
    return F.interpolate(pictures, size, mode="bilinear", align_corners=False)


def _expansion(picture: Tensor, n: int, sigma: float) -> Tensor:
    """Coefficients of x, y, x^2, y^2 and x y in each pixel's neighbourhood, (B, 5, H, W), of (B, 1, H, W)."""
    reach = torch.arange(-n, n + 1, dtype=torch.float64)
    weight = torch.exp(-reach.square() / (2 * sigma**2))
    weight = weight / weight.sum()
    x, y = torch.meshgrid(reach, reach, indexing="xy")
    basis = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y]).flatten(1)  # (6, (2n+1)^2)
    applicability = (weight[:, None] * weight[None, :]).flatten()
    dual = torch.linalg.inv((basis * applicability) @ basis.T) @ (basis * applicability)
    kernels = dual.view(6, 1, 2 * n + 1, 2 * n + 1)[1:].to(picture)
    return F.conv2d(F.pad(picture, (n, n, n, n), mode="replicate"), kernels)


def _equations(one: Tensor, other: Tensor, flow: Tensor) -> Tensor:
    """Each pixel's two linear equations for its motion, (B, 5, H, W): g11, g12, g22, h1, h2."""
    height, width = flow.shape[-2:]
    ys, xs = torch.meshgrid(
        torch.arange(height, device=flow.device), torch.arange(width, device=flow.device), indexing="ij"
    )
    x, y = xs + flow[:, 0], ys + flow[:, 1]
    inside = (x >= 0) & (x < width - 1) & (y >= 0) & (y < height - 1)
    grid = torch.stack([2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1], dim=-1)
    moved = F.grid_sample(other, grid, mode="bilinear", padding_mode="border", align_corners=True)
    inside = inside[:, None]
    # A = (r4 r6/2; r6/2 r5), with means of both pictures; b from their difference.
    quadratic = torch.where(inside, (one[:, 2:] + moved[:, 2:]) * 0.5, one[:, 2:])
    linear = torch.where(inside, one[:, :2] - moved[:, :2], one[:, :2]) * 0.5
    a, c, b = quadratic[:, 0], quadratic[:, 1], quadratic[:, 2] * 0.5
    r1 = linear[:, 0] + a * flow[:, 0] + b * flow[:, 1]
    r2 = linear[:, 1] + b * flow[:, 0] + c * flow[:, 1]
    border = _border(height, flow)[:, None] * _border(width, flow)[None, :]
    r1, r2, a, b, c = (value * border for value in (r1, r2, a, b, c))
    return torch.stack([a * a + b * b, (a + c) * b, c * c + b * b, a * r1 + b * r2, b * r1 + c * r2], dim=1)


def _border(length: int, like: Tensor) -> Tensor:
    weights = torch.ones(length, dtype=like.dtype, device=like.device)
    for place, weight in enumerate(BORDER[:length]):
        weights[place] *= weight
        weights[length - 1 - place] *= weight
    return weights


def _box(x: Tensor, size: int) -> Tensor:
    """Mean over a square around each pixel; at the border its last pixel goes on."""
    reach = size // 2
    return F.avg_pool2d(F.pad(x, (reach, reach, reach, reach), mode="replicate"), 2 * reach + 1, stride=1)


def _solved(equations: Tensor) -> Tensor:
    g11, g12, g22, h1, h2 = equations.unbind(1)
    inverse = 1 / (g11 * g22 - g12 * g12 + 1e-3)
    return torch.stack([(g22 * h1 - g12 * h2) * inverse, (g11 * h2 - g12 * h1) * inverse], dim=1)
