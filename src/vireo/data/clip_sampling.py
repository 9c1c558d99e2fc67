"""Which frames of a video make a clip. Frames are chosen by index, so a variable frame rate does no harm."""

import numpy as np

from vireo.randomness import Draws


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


def spread_clip(length: int, num_frames: int, step: float, start: float) -> list[int]:
    """`num_frames` indices, `step` apart, or closer together where the video is too short for that.

    step: may be a fraction. start: share of the places where the clip can begin, in [0, 1). A video of fewer frames
    gives all of them and the first ones again, in order. OpenS2V's rule, for which a short video is a slow one.
    """
    if length <= num_frames:
        return sorted(k % length for k in range(num_frames))
    span = min(length, round((num_frames - 1) * step) + 1)
    first = int(start * (length - span + 1))
    return np.linspace(first, first + span - 1, num_frames).astype(int).tolist()
