"""Clips of one subject each, with captions that say everything but what it looks like, in OpenS2V's layout.

"a small thing moves to the left on sand": shape and colour are in the reference alone. Every subject comes in two clips
of one cluster, which are a cross-frame pair. Mask 1 is the ground, mask 2 the thing, in the first frame.
`python -m vireo.mini.subject_clips <folder>` writes it into a folder: the layout of OpenS2V's demonstration.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from vireo.data import rle
from vireo.mini import scenes
from vireo.mini.captioned_clips import GROUNDS, SIZES, Meaning, scene
from vireo.mini.world import FPS, write_video

PART = "mini"
NUM_CLUSTERS = 160
SIDE = 64  # pixels
SEED = 700_000  # of the first clip; the other layouts' scenes have other seeds


def caption(meaning: Meaning) -> str:
    return f"a {meaning.size} thing moves {meaning.direction} on {meaning.ground}"


def write(folder: Path, num_clusters: int = NUM_CLUSTERS) -> None:
    """Write the layout at `folder`, which must not be there."""
    root = folder / "demo_result"
    videos, pairs = root / "step0" / "videos" / PART, root / "step6" / "cross-frames-pairs"
    for made in (videos, pairs / "final_output"):
        made.mkdir(parents=True)
    entries, clusters = {}, {}
    for number in range(num_clusters):
        name = f"{number:04d}"
        keys = []
        for part, meaning in enumerate(_meanings(number), start=1):
            key = f"{name}_part{part}_step1-0-{scenes.NUM_FRAMES}_step2-0-{scenes.NUM_FRAMES}"
            shown = scene(meaning, SEED + 2 * number + part - 1)
            write_video(videos / f"{name}_part{part}.mp4", scenes.render(shown))
            entries[key] = _entry(f"{name}_part{part}.mp4", meaning, shown)
            keys.append(f"{PART}/{key}")
        clusters[name] = keys
        _write_json(pairs / "final_output" / f"{name}.json", [_pair(*keys)])
    _write_json(pairs / "cluster_videos.json", clusters)
    _write_json(root / "step5" / "merge_final_json" / f"{PART}.json", entries)
    (folder / ".nomedia").touch()  # see captioned_clips


def _meanings(number: int) -> list[Meaning]:
    """Of the two clips of a cluster: one subject, everything else drawn anew."""
    rng = np.random.default_rng(SEED + number)

    def one_of(names: Any) -> str:
        return str(list(names)[rng.integers(len(names))])

    colour, shape = one_of(scenes.COLOURS), one_of(scenes.SHAPES)
    return [Meaning(one_of(SIZES), colour, shape, one_of(scenes.DIRECTIONS), one_of(GROUNDS)) for _ in range(2)]


def _entry(video: str, meaning: Meaning, shown: scenes.Scene) -> dict[str, Any]:
    thing = scenes.coverage(shown.things[0], np.zeros(1))[0] > 0.5
    masks, classes = (~thing, thing), (meaning.ground, "thing")
    cut = [0, scenes.NUM_FRAMES]
    return {
        "metadata": {
            "path": video,
            "cut": cut,
            "face_cut": cut,
            "crop": [0, SIDE, 0, SIDE],
            "fps": float(FPS),
            "num_frames": scenes.NUM_FRAMES,
            "resolution": {"height": SIDE, "width": SIDE},
            "face_cap_qwen": caption(meaning),
        },
        "word_tags": {"background": list(GROUNDS), "subject": ["thing"], "object": [], "pre_define": []},
        "annotation": {
            "ann_frame_data": {
                "ann_frame_idx": 0,
                "annotations": [
                    {"class_name": name, "bbox": _box(mask), "gme_score": 0.4, "aes_score": 4.0 + number}
                    for number, (name, mask) in enumerate(zip(classes, masks, strict=True))
                ],
                "box_format": "xyxy",
                "img_width": SIDE,
                "img_height": SIDE,
            },
            "mask_map": {str(n): {"class_name": name} for n, name in enumerate(classes, start=1)},
            "mask_annotation": {
                "0": {
                    str(n): {"size": [SIDE, SIDE], "counts": rle.encode(mask), "score": [1.0]}
                    for n, mask in enumerate(masks, start=1)
                }
            },
        },
    }


def _box(mask: Any) -> list[float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


def _pair(one: str, other: str) -> dict[str, Any]:
    same = {"cur_class_name": "thing", "aft_class_name": "thing", "cur_frame_idx": 0, "aft_frame_idx": 0}
    similar = {"text_similarity": 1.0, "image_similarity": 1.0}
    return {"cur_id": one, "aft_id": other, "cur_class_id": "2", "aft_class_id": "2", **same, **similar}


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
