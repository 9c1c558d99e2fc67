"""Holes to be filled: random moving shapes, and those that annotations or mask videos show.

A hole is uint8 (T, H, W), 1 where a pixel is to be filled. Only networks are given its opposite, 1 = keep.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vireo.errors import UserError
from vireo.randomness import Draws
from vireo.video_io import IMAGE_SUFFIXES, BadVideoError, VideoReader, frame_files, read_image

# The published generator draws on a figure of 640 x 480 with these margins around its axes, and samples that.
PLATE = (480, 640)  # height, width
LEFT, BOTTOM, WIDTH, HEIGHT = 0.125, 0.11, 0.775, 0.77
OUTLINE = 2.8  # pixels, 2 points at 100 dots an inch
SAMPLES = 16  # points of each curve
ACCELERATION, TURN = 1.5, 0.25  # standard deviations a frame, pixels and radians
HALF = 127  # the darkest grey
LOSSY = (".jpeg", ".jpg")


class MovingShapes:
    """A smooth random shape that stands still or moves through the clip, as ProPainter and DiffuEraser train on.

    Holes are smaller than their canvas, a third to all of the picture's sides: their mean is 7 % of the picture.

    p_static: probability of a hole that does not move.
    edges, roughness: one of each is drawn: how many curves make the outline, and by how much its radii differ from 1.
    max_speed: speeds at first are uniform from 1 to this, in pixels of the original frames; then they change at random.
    scale: factor of both sides of the shape; what then exceeds the picture is cut.
    Source: https://github.com/sczhou/ProPainter. Raises UserError for numbers that make no shape.
    """

    def __init__(
        self,
        p_static: float = 0.5,
        edges: Sequence[int] = (6, 7, 8),
        roughness: Sequence[float] = (0.6, 0.7, 0.8),
        max_speed: float = 3.0,
        scale: float = 1.0,
    ) -> None:
        self.p_static, self.edges, self.roughness = p_static, list(edges), list(roughness)
        self.max_speed, self.scale = max_speed, scale
        problems = []
        if not 0 <= p_static <= 1:
            problems.append(f"p_static is {p_static}, expected 0 to 1")
        if not self.edges or min(self.edges) < 2:
            problems.append(f"edges are {self.edges}, expected at least one number, each at least 2")
        if not self.roughness or not all(0 < value <= 1 for value in self.roughness):
            problems.append(f"roughness is {self.roughness}, expected at least one number, each above 0 to 1")
        if max_speed < 0 or scale <= 0:
            problems.append(f"max_speed is {max_speed} and scale {scale}, expected at least 0 and above 0")
        if problems:
            raise UserError("the masks cannot be drawn: " + "; ".join(problems))

    def __call__(self, num_frames: int, height: int, width: int, draws: Draws) -> Tensor:
        """The hole of one clip, uint8 (T, H, W). Draws "mask", "mask_radii" and "mask_motion"; B is 1."""
        number = draws.uniform("mask", 9)[0].double().tolist()
        edges, roughness = _one_of(self.edges, number[0]), _one_of(self.roughness, number[1])
        radii = 1 - roughness + 2 * roughness * draws.uniform("mask_radii", 3 * edges + 1)[0].double().numpy()
        sides = zip((height, width), number[2:4], strict=True)
        canvas = [max(1, round(self.scale * _integer(side // 3, side - 1, u))) for side, u in sides]
        shape = _shape(radii, *canvas)[:height, :width]
        room = (height - shape.shape[0], width - shape.shape[1])
        place = tuple(_integer(0, most, u) for most, u in zip(room, number[4:6], strict=True))
        places = [place] * num_frames
        if number[6] >= self.p_static:
            speed, angle = 1 + (self.max_speed - 1) * number[7], 2 * np.pi * number[8]
            places = _path(place, room, speed, angle, num_frames, draws)
        hole = np.zeros((num_frames, height, width), np.uint8)
        for frame, (row, column) in zip(hole, places, strict=True):
            frame[row : row + shape.shape[0], column : column + shape.shape[1]] = shape
        return torch.from_numpy(hole)


def dilate(hole: Tensor, times: int) -> Tensor:
    """The hole (..., H, W) grown `times` pixels by a 3 x 3 cross."""
    for _ in range(times):
        grown = hole.clone()
        grown[..., 1:, :] |= hole[..., :-1, :]
        grown[..., :-1, :] |= hole[..., 1:, :]
        grown[..., 1:] |= hole[..., :-1]
        grown[..., :-1] |= hole[..., 1:]
        hole = grown
    return hole


def read_hole(path: Path, indices: Sequence[int], num_frames: int) -> Tensor:
    """The hole of these frames from a folder of masks, one picture for all frames, or a mask video; uint8 (T, H, W).

    In pictures all that is neither black nor transparent is hole, whatever the grey or palette: annotations number
    their objects from 1 and show them in dark colours. In JPEG files and videos, whose compression leaves traces on
    black, what is brighter than half. num_frames: of the video; there have to be as many masks, or a single one for all
    frames. Raises BadVideoError if a mask cannot be read, or for another number of them.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return _picture(path)[None].expand(len(indices), -1, -1)
    if path.is_dir():
        files = frame_files(path)
        places = _places(path, indices, len(files), num_frames)
        holes = {place: _picture(files[place]) for place in set(places)}
        sizes = {f"{hole.shape[1]}x{hole.shape[0]}" for hole in holes.values()}
        if len(sizes) > 1:
            raise BadVideoError(path, f"its masks have different sizes: {', '.join(sorted(sizes))}")
        return torch.stack([holes[place] for place in places])
    with VideoReader(path) as video:
        return _brighter(video.get(_places(path, indices, len(video), num_frames)), HALF)


def wrong_number(num_masks: int, num_frames: int) -> str:
    """Why so many masks do not suit a video, for people; empty if they do."""
    if num_masks in (1, num_frames):
        return ""
    return f"there are {num_masks} masks for {num_frames} frames: expected as many, or a single one for all"


def _places(path: Path, indices: Sequence[int], num_masks: int, num_frames: int) -> list[int]:
    """Which masks are those of these frames."""
    if wrong := wrong_number(num_masks, num_frames):
        raise BadVideoError(path, wrong)
    return [0] * len(indices) if num_masks == 1 else list(indices)


def _picture(path: Path) -> Tensor:
    """One mask, uint8 (H, W)."""
    return _brighter(read_image(path, over_black=True), HALF if path.suffix.lower() in LOSSY else 0)


def _brighter(pictures: Tensor, darkest: int) -> Tensor:
    """uint8 (…, 3, H, W) -> (…, H, W)."""
    return (pictures.amax(dim=-3) > darkest).to(torch.uint8)


def _shape(radii: np.ndarray, height: int, width: int) -> np.ndarray:
    """A filled outline sampled on a canvas and cut to its bounding box without the last row and column, 0 and 1.

    radii: of 3 n + 1 points at equal angles, the end points and handles of n cubic Bézier curves.
    """
    angles = np.linspace(0, 2 * np.pi, len(radii))
    points = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    points[-1] = points[0]
    low, high = 1.1 * points.min(), 1.1 * points.max()
    unit = (_curve(points) - low) / (high - low)
    outline = np.stack([LEFT + WIDTH * unit[:, 0], 1 - BOTTOM - HEIGHT * unit[:, 1]], axis=1) * PLATE[::-1]
    plate = Image.new("1", PLATE[::-1])
    ImageDraw.Draw(plate).polygon([tuple(point) for point in outline.tolist()], fill=1, outline=1, width=round(OUTLINE))
    rows, columns = ((np.arange(n) + 0.5) * size / n for n, size in zip((height, width), PLATE, strict=True))
    sampled = np.asarray(plate)[rows.astype(int)[:, None], columns.astype(int)]
    if not sampled.any():  # a canvas of a few pixels
        return np.ones((1, 1), np.uint8)
    (top, bottom), (left, right) = (np.flatnonzero(sampled.any(axis=axis))[[0, -1]] for axis in (1, 0))
    cut = sampled[top : max(bottom, top + 1), left : max(right, left + 1)]
    return cut.astype(np.uint8) if cut.any() else np.ones((1, 1), np.uint8)


def _curve(points: np.ndarray) -> np.ndarray:
    """Points (n SAMPLES, 2) on a chain of n cubic Bézier curves with the control points (3 n + 1, 2)."""
    t = np.linspace(0, 1, SAMPLES, endpoint=False)[:, None]
    weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
    control = (points[k : len(points) - 3 + k : 3, None] for k in range(4))  # (n, 1, 2) each
    return sum(weight * point for weight, point in zip(weights, control, strict=True)).reshape(-1, 2)


def _path(
    place: tuple[int, ...], room: tuple[int, int], speed: float, angle: float, num_frames: int, draws: Draws
) -> list[tuple[int, ...]]:
    """Where the shape's corner is in each frame; where it would leave the picture it turns to anywhere."""
    changes = draws.normal("mask_motion", num_frames, 3)[0].double().tolist()
    turns = (2 * np.pi * draws.uniform("mask_motion_turn", num_frames)[0].double()).tolist()
    places = [place]
    for (faster, turn, anew), anywhere in list(zip(changes, turns, strict=True))[1:]:
        row, column = place[0] + int(speed * np.cos(angle)), place[1] + int(speed * np.sin(angle))
        speed, angle = speed + ACCELERATION * faster, angle + TURN * turn
        place = min(max(row, 0), room[0]), min(max(column, 0), room[1])
        if place != (row, column):
            speed, angle = abs(ACCELERATION * anew), anywhere
        places.append(place)
    return places


def _one_of(values: Sequence, u: float):
    return values[int(u * len(values))]


def _integer(low: int, high: int, u: float) -> int:
    """Of low to high, both included."""
    return low + int(u * (high - low + 1))
