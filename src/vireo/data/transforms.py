"""Crop, resize, flip and colour jitter of whole clips: every frame gets the same.

Frames stay uint8 (T, C, H, W). The one resampler is bilinear with antialiasing, which agrees with Pillow's to one grey
level and, on the channels-last frames that decoders give, was measured 8 times as fast as Pillow and 5 times as fast as
OpenCV's area filter; float frames take 7 times as long.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from vireo.randomness import Draws

# For identities of what is cached. Whoever changes what becomes of a pixel in this module counts the version up.
RESAMPLER = "torch bilinear, antialiased, version 1"
Resize = Literal["crop", "pad", "stretch"]

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in torchvision's rgb_to_grayscale


class Box(NamedTuple):
    """A rectangle of pixels. It may reach beyond the frame: what is missing is reflected."""

    top: int
    left: int
    height: int
    width: int


def box_size(frame: Sequence[int], target: Sequence[int], scale: float = 1.0) -> tuple[int, int]:
    """Size of a crop with the target's aspect ratio: `scale` times the largest one, but never below the target.

    frame, target: (height, width). A frame that is smaller than the target is not enlarged: the box is then larger
    than the frame.
    """
    aspect = target[1] / target[0]
    largest = min(frame[0], frame[1] / aspect)  # height
    return max(target[0], round(scale * largest)), max(target[1], round(scale * largest * aspect))


def centre_box(frame: Sequence[int], target: Sequence[int]) -> Box:
    """The largest box of the target's aspect ratio, in the middle."""
    return _centred(frame, box_size(frame, target))


def random_box(frame: Sequence[int], target: Sequence[int], scale: tuple[float, float], draws: Draws) -> Box:
    """A box of uniform scale between the two, at a uniform place; draws "crop", B is 1.

    scale: shares of the largest box, (0.8, 1) in the published TAEHV recipe; (0, 1) goes down to the target's size.
    """
    for_scale, for_top, for_left = draws.uniform("crop", 3)[0].tolist()
    top, left, height, width = _centred(frame, box_size(frame, target, scale[0] + (scale[1] - scale[0]) * for_scale))
    if height < frame[0]:
        top = int(for_top * (frame[0] - height + 1))
    if width < frame[1]:
        left = int(for_left * (frame[1] - width + 1))
    return Box(top, left, height, width)


def _centred(frame: Sequence[int], size: tuple[int, int]) -> Box:
    return Box((frame[0] - size[0]) // 2, (frame[1] - size[1]) // 2, *size)


def crop_and_resize(frames: Tensor, box: Box, height: int, width: int) -> Tensor:
    """The box of each frame, resized: uint8 (T, C, H, W) -> uint8 (T, C, height, width)."""
    inside = _crop(frames, box)
    if (box.height, box.width) == (height, width):
        return inside
    return interpolate(inside, (height, width), mode="bilinear", antialias=True)


def covering_size(frame: Sequence[int], target: Sequence[int]) -> tuple[int, int]:
    """Height and width of a frame scaled until it just covers the target; the longer side is rounded down.

    For a square target this is torchvision's Resize of the shorter side.
    """
    if target[0] * frame[1] >= target[1] * frame[0]:
        return target[0], int(target[0] * frame[1] / frame[0])
    return int(target[1] * frame[0] / frame[1]), target[1]


def crop_centre(frames: Tensor, height: int, width: int) -> Tensor:
    """A view of the middle, (..., H, W) -> (..., height, width), at torchvision's place: halves go to the even one."""
    top, left = round((frames.shape[-2] - height) / 2), round((frames.shape[-1] - width) / 2)
    return frames[..., top : top + height, left : left + width]


def resize(frames: Tensor, height: int, width: int, how: Resize = "crop") -> Tensor:
    """Whole frames brought to a size, up or down: uint8 (T, C, H, W) -> uint8 (T, C, height, width).

    how: "crop" scales until the size is filled and cuts what is too much on both sides alike; "pad" scales until
    everything is inside and leaves the rest black; "stretch" changes the aspect ratio, as the published CogVideoX
    loader does. Of a frame alone it makes what it makes of it in a clip.
    """
    _, _, *size = frames.shape
    if how == "crop":
        return crop_and_resize(frames, filled_box(size, (height, width)), height, width)
    inside = padded_size(size, (height, width)) if how == "pad" else (height, width)
    if inside != tuple(size):
        frames = interpolate(frames, inside, mode="bilinear", antialias=True)
    top, left = (height - inside[0]) // 2, (width - inside[1]) // 2
    return pad(frames, (left, width - inside[1] - left, top, height - inside[0] - top))


def filled_box(frame: Sequence[int], target: Sequence[int]) -> Box:
    """The largest box of the target's aspect ratio inside the frame, in the middle, however small the frame is."""
    scale = min(frame[0] / target[0], frame[1] / target[1])
    return _centred(frame, (max(1, round(scale * target[0])), max(1, round(scale * target[1]))))


def padded_size(frame: Sequence[int], target: Sequence[int]) -> tuple[int, int]:
    """Size of the whole frame when it is scaled until it touches the target's borders from inside."""
    scale = min(target[0] / frame[0], target[1] / frame[1])
    return max(1, round(scale * frame[0])), max(1, round(scale * frame[1]))


def _crop(frames: Tensor, box: Box) -> Tensor:
    """A view where the box lies inside the frame, else a copy whose missing pixels are reflected at the border."""
    bottom, right = box.top + box.height, box.left + box.width
    if box.top >= 0 and box.left >= 0 and bottom <= frames.shape[2] and right <= frames.shape[3]:
        return frames[:, :, box.top : bottom, box.left : right]
    rows, columns = _reflected(box.top, bottom, frames.shape[2]), _reflected(box.left, right, frames.shape[3])
    return frames[:, :, rows[:, None], columns]


def _reflected(start: int, stop: int, size: int) -> Tensor:
    """range(start, stop) folded back into range(size) as between two mirrors, the border pixel not repeated."""
    period = max(2 * (size - 1), 1)
    place = torch.arange(start, stop) % period
    return torch.minimum(place, period - place)


class ColorJitter(NamedTuple):
    """Largest changes: factors of brightness, contrast and saturation lie in 1 ± these, the hue turns by ± `hue` turns.

    The values are those of the published TAEHV recipe.
    """

    brightness: float = 0.1
    contrast: float = 0.1
    saturation: float = 0.1
    hue: float = 0.05


def random_jitter(frames: Tensor, strength: ColorJitter, draws: Draws) -> Tensor:
    """`jitter_colors` with uniform parameters, one set for the whole clip; draws "color_jitter", B is 1."""
    brightness, contrast, saturation, hue = (2 * draws.uniform("color_jitter", 4)[0] - 1).tolist()
    return jitter_colors(
        frames,
        1 + strength.brightness * brightness,
        1 + strength.contrast * contrast,
        1 + strength.saturation * saturation,
        strength.hue * hue,
    )


def jitter_colors(frames: Tensor, brightness: float, contrast: float, saturation: float, hue: float) -> Tensor:
    """Change the colours of a clip: uint8 RGB (T, 3, H, W) -> the same, contiguous, rounded and clamped once.

    brightness, contrast, saturation: factors, 1 changes nothing; contrast is about the clip's mean luma. hue: turns
    about the grey axis, in (-1/2, 1/2]. All four are linear in the colours, so together they are one 3 x 3 matrix and
    an offset (as in the augmentation of StyleGAN2-ADA, Karras et al. 2020, appendix B), applied in one pass.
    torchvision instead turns the hue in HSV, clamps four times and takes the contrast's mean of each frame.
    """
    luma = torch.tensor(LUMA)
    saturate = saturation * torch.eye(3) + (1 - saturation) * luma.expand(3, 3)
    colors = contrast * brightness * _hue_rotation(hue) @ saturate
    few = max(1, 2**18 // frames[0].numel())  # frames at a time: float copies that stay in the processor's cache
    totals = torch.stack([some.float().sum((0, 2, 3)) for some in frames.split(few)]).sum(0)
    mean = totals @ luma / frames[:, 0].numel()  # of the clip
    offset = (1 - contrast) * brightness * mean

    changed = torch.empty(frames.shape, dtype=torch.uint8)
    for some, out in zip(frames.split(few), changed.split(few), strict=True):
        pixels = colors @ some.float().flatten(2)  # (frames, 3, H * W)
        out.flatten(2).copy_(pixels.add_(offset).round_().clamp_(0, 255))
    return changed


def _hue_rotation(turns: float) -> Tensor:
    """The rotation of RGB space about the grey axis (1, 1, 1), float32 (3, 3)."""
    angle = 2 * math.pi * turns
    along = torch.full((3, 3), 1 / 3)
    across = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    return along + math.cos(angle) * (torch.eye(3) - along) + math.sin(angle) * across
