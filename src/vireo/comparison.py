"""Versions of one clip next to each other, and what is wrong with the prediction: what people judge by."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vireo import video_io

GAIN = 4  # of the errors that are shown
FPS = 8.0  # frames a second of videos of which nobody knows it


def with_error(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The columns, uint8 (T, C, H, W), and behind "prediction" GAIN times the absolute error of it.

    Without a "target" of the prediction's shape there is no error to show.
    """
    shown: dict[str, Tensor] = {}
    for name, video in columns.items():
        shown[name] = video
        if name == "prediction" and "target" in columns and columns["target"].shape == video.shape:
            error = (video.to(torch.int16) - columns["target"].to(torch.int16)).abs()
            shown[f"{GAIN}x error"] = (GAIN * error).clamp(max=255).to(torch.uint8)
    return shown


def show(columns: Mapping[str, Tensor], path: Path, fps: float | None, gif: bool = False) -> list[Path]:
    """Write one clip's columns and the prediction's error: side by side `path`.mp4, a grid of frames `path`.png.

    Where the prediction is a single frame, nothing moves: then `path`.png alone shows everything in one row.
    fps: frames a second; None or 0, which files say that know no better: FPS. gif: also `path`.gif, which plays for
    ever. Returns what was written.
    """
    shown = with_error(columns)
    picture, video = path.with_name(f"{path.name}.png"), path.with_name(f"{path.name}.mp4")
    if len(columns["prediction"]) == 1:
        video_io.write_row(picture, shown)
        return [picture]
    frames = video_io.side_by_side(shown)
    video_io.write_video(video, frames, fps or FPS)
    video_io.write_grid(picture, shown)
    if not gif:
        return [video, picture]
    animation = path.with_name(f"{path.name}.gif")
    video_io.write_gif(animation, frames, fps or FPS)
    return [video, picture, animation]
