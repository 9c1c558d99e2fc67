"""Edited clips in the raw layout for the tests: frame k of clip n is a plain colour that tells k, and n modulo 6."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = (
    "train/move_object/video_01",
    "train/drop_object/video_01",
    "train/cover_object/video_01",
    "val/move_object/video_01",
    "test/drop_object/video_01",
)


def colour(clip: int, frame: int) -> tuple[int, int, int]:
    return 40 * (clip % 6), 10 * frame, 128


def write(root: Path, names: Sequence[str] = NAMES, size: tuple[int, int] = (24, 32), suffix: str = ".png") -> Path:
    """A root with clips of plain pictures, height and width `size`, and metadata.json."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for frame in range(21):
            picture = np.empty((*size, 3), np.uint8)
            picture[:] = colour(number, frame)
            Image.fromarray(picture).save(root / name / f"{frame:02d}{suffix}")
    return write_metadata(root, [row(name) for name in names])


def row(name: str) -> dict[str, str]:
    return {"video_path": name, "instruction": f"do what {name} says", "task_type": name.split("/")[1]}


def write_metadata(root: Path, rows: Sequence, file: str = "metadata.json") -> Path:
    text = "\n".join(map(json.dumps, rows)) if file.endswith("l") else json.dumps(rows)
    (root / file).write_text(text)
    return root
