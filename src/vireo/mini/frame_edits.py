"""The mini world's clips as edits, in the raw layout of the InstructPix2Pix video recipe.

`{train,val,test}/{drop_object,cover_object,move_object}/video_0007/00.jpg … 20.jpg` and `metadata.json`. The text of a
scene says what happens in its last nine frames, so frame 20 follows from the twenty before it and from the text.
`python -m vireo.mini.frame_edits <folder>` writes it into a folder.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from PIL import Image

from vireo.errors import UserError
from vireo.mini import scenes

NUM_TRAINING = 480
NUM_HELD_OUT = 48  # in each of val and test
HELD_OUT_SEEDS = {"val": 900_000, "test": 950_000}  # the first; those of the training clips begin at 0
QUALITY = 90  # with the colours in full resolution about 40 dB


def write(folder: Path, num_training: int = NUM_TRAINING) -> None:
    """Make the layout at `folder`, whole or not at all. Raises UserError for a folder with something in it, or for a
    number of training clips that is not from 1 to 900,000."""
    if not 1 <= num_training <= HELD_OUT_SEEDS["val"]:
        raise UserError(f"clips={num_training}: expected 1 to {HELD_OUT_SEEDS['val']}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: name another folder")
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        seeds = {"train": range(num_training)}
        seeds |= {split: range(first, first + NUM_HELD_OUT) for split, first in HELD_OUT_SEEDS.items()}
        rows = [
            _write_clip(unfinished, split, number, scenes.scene(seed))
            for split in seeds
            for number, seed in enumerate(seeds[split])
        ]
        (unfinished / "metadata.json").write_text(json.dumps(rows, indent=1) + "\n")
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_clip(root: Path, split: str, number: int, scene: scenes.Scene) -> dict[str, str]:
    """Write the 21 frames; returns the row of metadata.json."""
    name = f"{split}/{scene.task}/video_{number:04d}"
    (root / name).mkdir(parents=True)
    for frame, pixels in enumerate(scenes.render(scene)):
        Image.fromarray(pixels).save(root / name / f"{frame:02d}.jpg", quality=QUALITY, subsampling=0)
    return {"video_path": name, "instruction": scene.text, "task_type": scene.task}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
