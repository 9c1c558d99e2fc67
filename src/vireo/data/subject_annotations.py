"""What OpenS2V-5M says about a clip: its frames, a caption, and masks of the subjects in one of them.

https://huggingface.co/datasets/BestWishYsh/OpenS2V-5M (Yuan et al. 2025). One entry of a part's JSON file is
{"metadata", "word_tags", "annotation"}. Masks and boxes are in pixels of the cropped picture, faces in those of the
whole one; here all are in the cropped one's.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vireo.data import rle

VERSION = "3"  # of what `judge` accepts


class Subject(NamedTuple):
    """One mask. id: its name in the entry, "1", "2", …. text_score, aesthetic_score: gme_score and aes_score, how well
    the picture fits the class and how good it looks, 0 where the entry has none."""

    id: str
    class_name: str
    size: tuple[int, int]
    counts: str
    text_score: float
    aesthetic_score: float

    def mask(self) -> NDArray[np.bool_]:
        """bool (height, width). Raises ValueError for run lengths that do not fit."""
        return rle.decode(self.counts, *self.size)


class Annotation(NamedTuple):
    """One entry of a part.

    video: path relative to the part's videos. start, stop: the usable frames. crop: (x0, x1, y0, y1), the picture
    without watermarks, in this order; None is the whole one. fps: 0 if unknown. frame: the number of the one that the
    masks belong to. faces: boxes (x0, y0, x1, y1) in that frame. background, subject: classes by their kind.
    """

    key: str
    video: str
    start: int
    stop: int
    crop: tuple[int, int, int, int] | None
    fps: float
    caption: str
    frame: int
    subjects: tuple[Subject, ...]
    faces: tuple[tuple[float, float, float, float], ...]
    background: frozenset[str]
    subject: frozenset[str]


def cluster(key: str) -> str:
    """The video that an entry was cut from: what is before `_segment` or, without that, before `_part`."""
    return re.split("_segment" if "_segment" in key else "_part", key)[0]


def judge(key: str, value: Any) -> str:
    """For `JsonIndex`: the entry's cluster. Raises ValueError, for people, for an entry that cannot be used."""
    parse(key, value)
    if {"..", ""} & set(cluster(key).split("/")):  # clusters are names of files
        raise ValueError(f"the key {key!r} names no clip")
    return cluster(key)


def parse(key: str, value: Any) -> Annotation:
    """Raises ValueError, for people, for what is missing or makes no sense."""
    try:
        return _parse(key, value)
    except (AttributeError, LookupError, OverflowError, TypeError) as error:  # an object for a number, and the like
        raise ValueError(f"not built as OpenS2V's entries are: {type(error).__name__} {error}") from error


def _parse(key: str, value: Any) -> Annotation:
    metadata = _get(value, "metadata", dict)
    frames, crop = _get(metadata, "face_cut", list), metadata.get("crop")
    if len(frames) != 2 or not _are_numbers(frames) or not 0 <= frames[0] < frames[1]:
        raise ValueError(f"metadata.face_cut is {frames}, expected the first frame and the one behind the last")
    if crop is not None and (
        len(crop) != 4 or not _are_numbers(crop) or not (0 <= crop[0] < crop[1] and 0 <= crop[2] < crop[3])
    ):
        raise ValueError(f"metadata.crop is {crop}, expected x0, x1, y0, y1")
    caption = metadata.get("face_cap_qwen") or metadata.get("cap")
    caption = caption[0] if isinstance(caption, list) and caption else caption
    if not isinstance(caption, str):
        raise ValueError("no caption, metadata.face_cap_qwen or metadata.cap")
    annotation, tags = _get(value, "annotation", dict), value.get("word_tags") or {}
    about = annotation.get("ann_frame_data") or {}
    frame, fps = about.get("ann_frame_idx", frames[0]), metadata.get("fps") or 0
    if int(frame) < 0:
        raise ValueError(f"annotation.ann_frame_data.ann_frame_idx is {frame}, expected the number of a frame")
    if not 0 <= float(fps) < math.inf:
        raise ValueError(f"metadata.fps is {fps}, expected frames a second")
    return Annotation(
        key=key,
        video=_get(metadata, "path", str),
        start=int(frames[0]),
        stop=int(frames[1]),
        crop=None if crop is None else (int(crop[0]), int(crop[1]), int(crop[2]), int(crop[3])),
        fps=float(fps),
        caption=caption,
        frame=int(frame),
        subjects=_subjects(annotation, about.get("annotations") or [], str(frame)),
        faces=_faces(annotation, str(frame), crop),
        background=frozenset(tags.get("background") or ()),
        subject=frozenset([*(tags.get("subject") or ()), *(tags.get("pre_define") or ())]),
    )


def _subjects(annotation: Mapping[str, Any], scores: list[Any], frame: str) -> tuple[Subject, ...]:
    """In the order of the masks; mask n has the (n - 1)-th scores, wherever it stands."""
    masks = (annotation.get("mask_annotation") or {}).get(frame) or {}
    names = annotation.get("mask_map") or {}
    found = []
    for number, mask in masks.items():
        size, counts = mask.get("size"), mask.get("counts")
        if not isinstance(counts, str) or not isinstance(size, list) or len(size) != 2 or not number.isdecimal():
            raise ValueError(f"mask {number} is not {{size: [height, width], counts: run lengths}}")
        place = int(number) - 1
        scored = scores[place] if 0 <= place < len(scores) else {}
        class_name = (names.get(number) or scored).get("class_name", "")
        text, aesthetic = float(scored.get("gme_score") or 0), float(scored.get("aes_score") or 0)
        found.append(Subject(number, class_name, (int(size[0]), int(size[1])), counts, text, aesthetic))
    return tuple(found)


def _faces(
    annotation: Mapping[str, Any], frame: str, crop: list[int] | None
) -> tuple[tuple[float, float, float, float], ...]:
    left, top = (crop[0], crop[2]) if crop is not None else (0, 0)
    boxes = [face["box"] for face in ((annotation.get("face_bbox") or {}).get(frame) or {}).get("face") or ()]
    if not all(_are_numbers([box[side] for side in ("x1", "y1", "x2", "y2")]) for box in boxes):
        raise ValueError("annotation.face_bbox has a box whose x1, y1, x2, y2 are not numbers")
    return tuple((b["x1"] - left, b["y1"] - top, b["x2"] - left, b["y2"] - top) for b in boxes)


def _get(holder: Any, name: str, kind: type) -> Any:
    value = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(value, kind) or not value:
        raise ValueError(f"no {name} ({'text' if kind is str else 'object' if kind is dict else 'list'})")
    return value


def _are_numbers(values: list[Any]) -> bool:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)
