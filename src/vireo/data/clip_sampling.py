"""Which frames of a video make a clip. Frames are chosen by index, so a variable frame rate does no harm."""

from typing import Literal

import numpy as np

from vireo.randomness import Draws

Pad = Literal["repeat_last", "loop", "error"]


def clip_indices(length: int, num_frames: int, step: int, start: int) -> list[int]:
    """`num_frames` indices, every `step`-th from `start` on; behind the end the last frame is held.

    Going back to the first frame instead, as the published TAEHV loader does, puts a hard cut into the clip.
    """
    return [min(start + step * k, length - 1) for k in range(num_frames)]


def random_clip(length: int, num_frames: int, frame_step: tuple[int, int], draws: Draws) -> list[int]:
    """A step drawn uniformly from those of `frame_step` (first and last included) that fit, then a uniform start.

    length: frames of the video, at least 1. Where no step fits, the smallest is taken from the first frame on and the
    last frame is held. Draws "clip"; B is 1.
    """
    smallest, largest = frame_step
    if num_frames > 1:
        largest = max(smallest, min(largest, (length - 1) // (num_frames - 1)))
    for_step, for_start = draws.uniform("clip", 2)[0].tolist()
    step = smallest + int(for_step * (largest - smallest + 1))
    starts = max(1, length - _span(num_frames, step) + 1)
    return clip_indices(length, num_frames, step, int(for_start * starts))


def middle_clip(length: int, num_frames: int, step: int) -> list[int]:
    """The clip in the middle of the video, where neither fades nor title cards are: always the same, for validation."""
    return clip_indices(length, num_frames, step, max(0, (length - _span(num_frames, step)) // 2))


def _span(num_frames: int, step: int) -> int:
    """Frames of the video from the first to the last of a clip."""
    return (num_frames - 1) * step + 1


def strided_clip(length: int, num_frames: int) -> list[int]:
    """Every (length // num_frames)-th frame from the first on, at most `num_frames` of them.

    The published CogVideoX loader's rule. What it covers depends on the length: of 49 frames all 33 that are wanted are
    the first ones, of 66 they are every second one. A shorter video gives all that it has, see `fill_up`.
    """
    return list(range(0, length, max(1, length // num_frames)))[:num_frames]


def uniform_clip(length: int, num_frames: int) -> list[int]:
    """`num_frames` frames from the first to the last at equal distances, rounded; of a shorter video all frames."""
    if num_frames == 1 or length < num_frames:
        return list(range(min(length, num_frames)))
    return [round(k * (length - 1) / (num_frames - 1)) for k in range(num_frames)]


def timed_clip(length: int, num_frames: int, step: float, start: float) -> list[int]:
    """The frames nearest to every `step`-th place, from 0 on and moved by the share `start` of what is left over.

    step: frames of the video from one to the next, perhaps a fraction: 3.125 makes 8 frames a second of 25.
    start: 0 for the first clip that fits, 0.5 for the middle one, up to 1. A shorter video gives fewer frames.
    """
    count = min(num_frames, num_timed(length, step))
    left_over = length - 1 - (count - 1) * step
    first = min(int(start * (int(left_over) + 1)), int(left_over)) if count == num_frames else 0
    return [min(int(first + k * step + 0.5), length - 1) for k in range(count)]


def num_timed(length: int, step: float) -> int:
    """How many frames a video has at a distance of `step`."""
    return int((length - 1) / step + 1e-9) + 1


def fill_up(indices: list[int], num_frames: int, pad: Pad) -> list[int]:
    """Indices of a clip that is too short, made `num_frames` long: its last frame held, or the clip again and again.

    Raises ValueError where pad is "error" and frames are missing.
    """
    missing = num_frames - len(indices)
    if missing and pad == "error":
        raise ValueError(f"{len(indices)} frames, {num_frames} are needed")
    if pad == "loop":
        return [indices[k % len(indices)] for k in range(num_frames)]
    return indices + [indices[-1]] * missing


def spread_clip(first: int, stop: int, num_frames: int, step: float, start: float) -> list[int]:
    """`num_frames` indices of the frames [first, stop), `step` apart, or closer together where these are too few.

    step: may be a fraction. start: share of the places where the clip can begin, in [0, 1). Where there are fewer
    frames, all of them and the first ones again, in order. OpenS2V's rule, for which a short video is a slow one.
    """
    length = stop - first
    if length <= num_frames:
        return sorted(first + k % length for k in range(num_frames))
    span = min(length, round((num_frames - 1) * step) + 1)
    first += int(start * (length - span + 1))
    return np.linspace(first, first + span - 1, num_frames).astype(int).tolist()  # of whole places, as published
