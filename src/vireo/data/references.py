"""Pictures of a subject, cut out of a frame by its mask, for a model to be shown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vireo.data.transforms import jitter_colors
from vireo.randomness import Draws
from vireo.video_io import read_image

WHITE = 255
Background = Literal["white", "keep"]


class Cutout(NamedTuple):
    """picture: uint8 RGB (h, w, 3). shown: bool (h, w), what of it is to be seen; the rest becomes white."""

    picture: NDArray[np.uint8]
    shown: NDArray[np.bool_]


def tight_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int] | None:
    """(x0, y0, x1, y1) around a mask (H, W), the last two behind its last pixel; None for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def cut_out(picture: NDArray[np.uint8], mask: NDArray[np.bool_], background: Background = "white") -> Cutout:
    """The tight box of a mask (H, W), which must not be empty, in a picture (H, W, 3).

    background: of the subject in the box, "white", or "keep" for the picture's own.
    """
    box = tight_box(mask)
    assert box is not None
    inside = slice(box[1], box[3]), slice(box[0], box[2])
    shown = mask[inside]
    return Cutout(picture[inside], shown if background == "white" else np.ones_like(shown))


def read_cutout(path: Path) -> Cutout:
    """A picture in a file, of which what is transparent is not shown. Raises BadVideoError if it cannot be read."""
    picture = read_image(path).permute(1, 2, 0).numpy()
    with Image.open(path) as image:
        return Cutout(picture, np.asarray(image.convert("RGBA"))[..., 3] > 127)


def letterbox(cutout: Cutout, height: int, width: int) -> Tensor:
    """The whole cut-out on white, uint8 RGB (3, height, width): padded to that aspect, then resized by Pillow, bicubic.

    The published recipe's rule, paddings rounded down included.
    """
    picture = np.where(cutout.shown[..., None], cutout.picture, np.uint8(WHITE))
    h, w = picture.shape[:2]
    if h / w < height / width:
        margin = (int((height / width * w - h) / 2), 0)
    else:
        margin = (0, int((width / height * h - w) / 2))
    padded = np.pad(picture, [(margin[0],) * 2, (margin[1],) * 2, (0, 0)], constant_values=WHITE)
    resized = Image.fromarray(padded).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def blank(height: int, width: int) -> Tensor:
    """In the place of a reference that is missing: white, uint8 (3, height, width)."""
    return torch.full((3, height, width), WHITE, dtype=torch.uint8)


class Augmentation:
    """Random changes of a cut-out, so that a model learns the subject and not to paste its picture.

    flip: probability of a mirrored one. crop: smallest share of each side that is kept, at a random place. rotation:
    largest angle in degrees, either way. scale: smallest size in the letterbox, of the largest. colour: largest change
    of brightness, contrast and saturation, as a share.
    """

    def __init__(
        self, flip: float = 0.5, crop: float = 0.9, rotation: float = 10.0, scale: float = 0.7, colour: float = 0.1
    ) -> None:
        self.flip, self.crop, self.rotation, self.scale, self.colour = flip, crop, rotation, scale, colour

    def __call__(self, cutout: Cutout, draws: Draws, number: int) -> Cutout:
        """number: of the reference among those of its sample. Draws "reference_<number>"; B is 1."""
        for_flip, for_size, *for_place, for_angle, for_scale, b, c, s = draws.uniform(f"reference_{number}", 9)[
            0
        ].tolist()
        cutout = _part(cutout, self.crop + (1 - self.crop) * for_size, for_place)
        if for_flip < self.flip:
            cutout = Cutout(cutout.picture[:, ::-1], cutout.shown[:, ::-1])
        cutout = _turned(cutout, self.rotation * (2 * for_angle - 1))
        brightness, contrast, saturation = (1 + self.colour * (2 * u - 1) for u in (b, c, s))
        frame = torch.from_numpy(np.array(cutout.picture)).permute(2, 0, 1)[None]
        picture = jitter_colors(frame, brightness, contrast, saturation, hue=0.0)[0].permute(1, 2, 0).numpy()
        return _smaller(Cutout(picture, cutout.shown), self.scale + (1 - self.scale) * for_scale)


def _part(cutout: Cutout, share: float, place: Sequence[float]) -> Cutout:
    inside = []
    for side, u in zip(cutout.shown.shape, place, strict=True):
        size = max(1, round(share * side))
        start = int(u * (side - size + 1))
        inside.append(slice(start, start + size))
    part = cutout.shown[inside[0], inside[1]]
    return Cutout(cutout.picture[inside[0], inside[1]], part) if part.any() else cutout


def _turned(cutout: Cutout, degrees: float) -> Cutout:
    """On a picture large enough for its corners, which are not shown."""
    picture = Image.fromarray(np.ascontiguousarray(cutout.picture)).rotate(
        degrees, Image.Resampling.BILINEAR, expand=True
    )
    shown = Image.fromarray(np.ascontiguousarray(cutout.shown).astype(np.uint8)).rotate(
        degrees, Image.Resampling.NEAREST, expand=True
    )
    return Cutout(np.asarray(picture), np.asarray(shown).astype(bool))


def _smaller(cutout: Cutout, scale: float) -> Cutout:
    """With a margin around, so that it takes up `scale` of a letterbox's sides."""
    margins = [(round(side * (1 / scale - 1) / 2),) * 2 for side in cutout.shown.shape]
    return Cutout(np.pad(cutout.picture, [*margins, (0, 0)]), np.pad(cutout.shown, margins))
