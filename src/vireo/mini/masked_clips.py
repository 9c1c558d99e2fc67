"""The mini world's videos with everything in motion, in the layouts of DAVIS and YouTube-VOS, to fill holes in.

What a hole hides in one frame is seen in others: the background pans and every object crosses the picture. No object is
black, as holes are. `python -m vireo.mini.masked_clips <folder>` writes `DAVIS/` and `YouTubeVOS/` into a folder.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from vireo.mini import scenes

NUM_TRAINING, NUM_HELD_OUT, NUM_FRAMES = 24, 16, 26  # of DAVIS
NUM_YOUTUBE, NUM_SHORT, SHORT = 240, 8, 16  # of YouTube-VOS, where the last ones are too short for 22 frames
FIRST_SEEDS = {"train": 2_000_000, "val": 2_100_000, "youtube": 2_200_000}
QUALITY = 90  # with the colours in full resolution about 40 dB
PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * 759  # DAVIS's: nothing, first and second object
DISTANCE = 24.0  # that each object moves at least, in units of length


def write(folder: Path) -> None:
    """`DAVIS/` with annotations of the object in front, and `YouTubeVOS/`."""
    davis = folder / "DAVIS"
    (davis / "ImageSets" / "2017").mkdir(parents=True)
    for split, count in {"train": NUM_TRAINING, "val": NUM_HELD_OUT}.items():
        names = [f"{split}-{number:02d}" for number in range(count)]
        (davis / "ImageSets" / "2017" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for number, name in enumerate(names):
            scene = drifting(FIRST_SEEDS[split] + number)
            _write_frames(davis / "JPEGImages" / "480p" / name, scene, NUM_FRAMES)
            _write_annotations(davis / "Annotations" / "480p" / name, scene)
    for number in range(NUM_YOUTUBE + NUM_SHORT):
        count = NUM_FRAMES if number < NUM_YOUTUBE else SHORT
        scene = drifting(FIRST_SEEDS["youtube"] + number)
        _write_frames(folder / "YouTubeVOS" / "JPEGImages" / f"{number:010x}", scene, count, step=5)


def drifting(seed: int) -> scenes.Scene:
    """Two or three things that move evenly from one place to another, over a panning background."""
    rng = np.random.default_rng(seed)
    background = scenes.panning_background(rng)
    colours = rng.permutation([colour for colour in scenes.COLOURS if colour != "black"])[: rng.integers(2, 4)]
    return scenes.Scene("drift", "", tuple(_crossing(rng, str(colour)) for colour in colours), background)


def times(num_frames: int) -> np.ndarray:
    """When the frames of a video are taken, as `scenes.render` counts time."""
    return np.arange(num_frames) * (scenes.NUM_FRAMES - 1) / (NUM_FRAMES - 1)


def _crossing(rng: np.random.Generator, colour: str) -> scenes.Thing:
    shape, radius = scenes.SHAPES[rng.integers(len(scenes.SHAPES))], rng.uniform(7, 11)
    start = end = rng.uniform(4, scenes.HEIGHT - 4, 2)
    while np.hypot(*(end - start)) < DISTANCE:
        end = rng.uniform(4, scenes.HEIGHT - 4, 2)
    velocity = (end - start) / (scenes.NUM_FRAMES - 1)
    return scenes.Thing(shape, colour, radius, tuple(start), rng.uniform(0, 2 * np.pi), tuple(velocity), rest=0)


def _write_frames(folder: Path, scene: scenes.Scene, num_frames: int, step: int = 1) -> None:
    folder.mkdir(parents=True)
    for number, pixels in enumerate(scenes.render(scene, times(num_frames))):
        Image.fromarray(pixels).save(folder / f"{step * number:05d}.jpg", quality=QUALITY, subsampling=0)


def _write_annotations(folder: Path, scene: scenes.Scene) -> None:
    folder.mkdir(parents=True)
    for number, covered in enumerate(scenes.coverage(scene.things[0], times(NUM_FRAMES))):
        picture = Image.fromarray((covered > 0.5).astype(np.uint8), "P")
        picture.putpalette(PALETTE)
        picture.save(folder / f"{number:05d}.png")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
