"""How much a video flickers along its own motion: the warping error, with a flow that needs no weights.

The flow is Lucas and Kanade's, dense, iterated and from coarse to fine (Bouguet 2000; Le Besnerais and Champagnat
2005). Papers take it from RAFT: their figures are not comparable, which the names of ours say.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
RADIUS = 3  # pixels, of the windows in which the motion is taken to be the same
ROUNDS = 4  # at each size
SMALLEST = 12  # pixels, of the shorter side at the coarsest size
NOISE = 1e-4  # added to the gradients' energy, so that what has no texture does not move


def optical_flow(first: Tensor, second: Tensor) -> Tensor:
    """Where each pixel of `first` is in `second`: displacements x, y in pixels, float32 (N, 2, H, W).

    Both (N, 3, H, W) in [0, 1].
    """
    weights = torch.tensor(LUMA, device=first.device).view(1, 3, 1, 1)
    pyramid = [tuple((pictures.float() * weights).sum(1, keepdim=True) for pictures in (first, second))]
    while min(pyramid[-1][0].shape[-2:]) >= 2 * SMALLEST:
        pyramid.append(tuple(F.avg_pool2d(grey, 2) for grey in pyramid[-1]))
    flow = torch.zeros(len(first), 2, *pyramid[-1][0].shape[-2:], device=first.device)
    for one, other in reversed(pyramid):
        height, width = one.shape[-2:]
        scale = torch.tensor([width / flow.shape[-1], height / flow.shape[-2]], device=flow.device).view(1, 2, 1, 1)
        flow = F.interpolate(flow, (height, width), mode="bilinear", align_corners=False) * scale
        for _ in range(ROUNDS):
            flow = _mean(flow + _step(one, warp(other, flow)), 1)
    return flow


def warp(pictures: Tensor, flow: Tensor) -> Tensor:
    """Each pixel from where the flow points, bilinear; outside, the nearest pixel. (N, C, H, W), (N, 2, H, W)."""
    height, width = flow.shape[-2:]
    x = torch.arange(width, device=flow.device) + flow[:, 0]
    y = torch.arange(height, device=flow.device)[:, None] + flow[:, 1]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)


def correspondence(truth: Tensor) -> tuple[Tensor, Tensor]:
    """For each frame but the first, where its pixels were in the frame before, and which of them can be seen there.

    truth: (B, T, 3, H, W) in [0, 1]. Returns flow (B, T - 1, 2, H, W) and bool (B, T - 1, 1, H, W): inside the picture,
    and flow there and back agree as |b + f(b)|² <= 0.01 (|b|² + |f(b)|²) + 0.5.
    """
    before, after = truth[:, :-1].flatten(0, 1), truth[:, 1:].flatten(0, 1)
    back, forth = optical_flow(after, before), optical_flow(before, after)
    forth = warp(forth, back)
    apart = (back + forth).square().sum(1, keepdim=True)
    lengths = back.square().sum(1, keepdim=True) + forth.square().sum(1, keepdim=True)
    height, width = back.shape[-2:]
    x = torch.arange(width, device=back.device) + back[:, :1]
    y = torch.arange(height, device=back.device)[:, None] + back[:, 1:]
    seen = (apart <= 0.01 * lengths + 0.5) & (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return back.unflatten(0, truth[:, 1:].shape[:2]), seen.unflatten(0, truth[:, 1:].shape[:2])


def warp_error(video: Tensor, flow: Tensor, seen: Tensor) -> Tensor:
    """1000 times the mean squared difference of a frame and the one before, moved along the flow; float64 (B,).

    Squares are summed over the colours and averaged over the pixels that `seen` names, then over the pairs of frames.
    video: (B, T, 3, H, W) in [0, 1]; flow, seen: of the true video, from `correspondence`.
    """
    moved = warp(video[:, :-1].flatten(0, 1).float(), flow.flatten(0, 1)).unflatten(0, flow.shape[:2])
    squares = (moved - video[:, 1:]).double().square().sum(dim=2, keepdim=True) * seen
    pixels = seen.sum(dim=(2, 3, 4)).clamp_min(1)
    return 1000 * (squares.sum(dim=(2, 3, 4)) / pixels).mean(dim=1)


def _step(one: Tensor, other: Tensor) -> Tensor:
    """The displacement that explains what is left between two grey pictures, window by window; at most one pixel."""
    wide = F.pad((one + other) / 2, (1, 1, 1, 1), mode="replicate")
    dx = (wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]) / 2
    dy = (wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]) / 2
    left = one - other
    products = _mean(torch.cat([dx * dx, dx * dy, dy * dy, dx * left, dy * left], dim=1), RADIUS)
    xx, xy, yy, x, y = products.split(1, dim=1)
    xx, yy = xx + NOISE, yy + NOISE
    determinant = xx * yy - xy * xy
    return torch.cat([yy * x - xy * y, xx * y - xy * x], dim=1).div(determinant).clamp(-1, 1)


def _mean(values: Tensor, radius: int) -> Tensor:
    return F.avg_pool2d(values, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)
