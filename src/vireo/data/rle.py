"""Masks as COCO's compressed run lengths (https://github.com/cocodataset/cocoapi, common/maskApi.c).

Runs go down the columns and begin with zeros. From the fourth run on, what is stored is the difference to the run two
before. Each number is a string of characters from "0" on with 5 bits each, the lowest first; bit 5 says that more
follow, and bit 4 of the last one is the sign.
"""

import numpy as np
from numpy.typing import NDArray


def decode(counts: str, height: int, width: int) -> NDArray[np.bool_]:
    """The mask (height, width). Raises ValueError if the runs do not fill it."""
    bits = np.frombuffer(counts.encode("latin-1", "replace"), np.uint8).astype(np.int64) - 48
    if not len(bits) or bits.min() < 0 or bits.max() > 63 or bits[-1] & 32:
        raise ValueError("the run lengths are no COCO string")
    ends = np.flatnonzero(bits < 32)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 12:  # 60 bits
        raise ValueError("the run lengths are no COCO string")
    place = np.arange(len(bits)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((bits & 31) << 5 * place, starts)
    runs -= np.where(bits[ends] & 16, np.int64(1) << 5 * lengths, 0)
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    if runs.min() < 0 or runs.sum() != height * width:
        raise ValueError(f"the run lengths cover {runs.sum()} pixels, the mask has {height}x{width}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def encode(mask: NDArray[np.bool_]) -> str:
    """The inverse of `decode`, of a mask (height, width) with at least one pixel."""
    pixels = np.concatenate([[False], np.asarray(mask, bool).T.ravel()])
    changes = np.flatnonzero(pixels[1:] != pixels[:-1])
    runs = np.diff(np.concatenate([[0], changes, [mask.size]]))
    runs[3:] -= runs[1:-2].copy()
    return "".join(_characters(int(run)) for run in runs)


def _characters(number: int) -> str:
    text = ""
    while True:
        bits, number = number & 31, number >> 5
        if number == (-1 if bits & 16 else 0):
            return text + chr(bits + 48)
        text += chr((bits | 32) + 48)
