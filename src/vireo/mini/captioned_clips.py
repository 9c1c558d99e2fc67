"""Clips whose captions say all that is in them, in the layout of the CogVideoX fine-tuning recipe.

"a small red square moves to the left on sand": one object, its way, and one of four grounds. Some captions are
shown by no training clip, so what a model makes of them tells whether it understands the words.
`python -m vireo.mini.captioned_clips <folder>` writes them into a folder: prompts.txt, videos.txt, images.txt with
videos/ and images/, and validation/ with the same.
"""

import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vireo.mini import scenes
from vireo.mini.world import write_video

NUM_TRAINING = 480
NUM_HELD_OUT = 24  # captions, and as many clips
NUM_FRAMES = 18  # of which every second makes 9
GROUNDS = {
    "sand": (0.64, 0.56, 0.40),
    "grass": (0.36, 0.54, 0.36),
    "water": (0.36, 0.46, 0.64),
    "stone": (0.50, 0.50, 0.50),
}
SIZES = {"small": (7.0, 8.5), "large": (11.0, 12.5)}  # radii
SEED = 600_000  # of the first clip; the other layouts' scenes have other seeds

_SPEED = 1.5  # units of length a frame
_CONTRAST = 0.08  # of the ground's texture


class Meaning(NamedTuple):
    """What a caption says."""

    size: str
    colour: str
    shape: str
    direction: str
    ground: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} moves {self.direction} on {self.ground}"


def meanings() -> tuple[list[Meaning], list[Meaning]]:
    """All that captions can say, in the same random order each time: what training clips show, and what they do not."""
    everything = itertools.product(SIZES, scenes.COLOURS, scenes.SHAPES, scenes.DIRECTIONS, GROUNDS)
    shuffled = [Meaning(*some) for some in everything]
    order = np.random.default_rng(SEED).permutation(len(shuffled))
    mixed = [shuffled[place] for place in order]
    return mixed[NUM_HELD_OUT:], mixed[:NUM_HELD_OUT]


def words() -> list[str]:
    """All words of the captions, in alphabetical order."""
    return sorted({word for some in meanings() for meaning in some for word in meaning.caption.split()})


def scene(meaning: Meaning, seed: int) -> scenes.Scene:
    """One of the scenes that a caption describes: place, exact size and light of the object and texture are free."""
    rng = np.random.default_rng(seed)
    radius, travel = rng.uniform(*SIZES[meaning.size]), _SPEED * (NUM_FRAMES - 1)
    way = np.array(scenes.DIRECTIONS[meaning.direction])
    middle = rng.uniform(radius, 64 - radius, 2)
    middle = np.where(way != 0, rng.uniform(28, 36, 2), middle)  # it stays in the picture
    start = middle - way * travel / 2
    waves = np.stack([*rng.normal(0, 0.2, (2, 4)), rng.uniform(0, 2 * np.pi, 4)], axis=1)
    contrast = _CONTRAST * np.ones(3)
    colour = np.array(GROUNDS[meaning.ground])
    background = scenes.Background(
        colour.astype(np.float32), contrast.astype(np.float32), waves.astype(np.float32), (0.0, 0.0)
    )
    velocity = way * _SPEED
    thing = scenes.Thing(
        meaning.shape,
        meaning.colour,
        radius,
        (float(start[0]), float(start[1])),
        rng.uniform(0, 2 * np.pi),
        velocity=(float(velocity[0]), float(velocity[1])),
        rest=0,
    )
    return scenes.Scene("move_object", meaning.caption, (thing,), background)


def write(folder: Path, num_training: int = NUM_TRAINING) -> None:
    """Write the layout at `folder`, which must not be there. Every caption comes once."""
    trained, held_out = meanings()
    _write(folder, trained[:num_training], SEED)
    _write(folder / "validation", held_out, SEED + num_training)
    (folder / ".nomedia").touch()  # these are no clips of those who read all videos below a folder


def _write(folder: Path, shown: list[Meaning], first_seed: int) -> None:
    for part in ("videos", "images"):
        (folder / part).mkdir(parents=True)
    names = [f"{number:04d}" for number in range(len(shown))]
    for number, (name, meaning) in enumerate(zip(names, shown, strict=True)):
        pixels = scenes.render(scene(meaning, first_seed + number), np.arange(NUM_FRAMES))
        write_video(folder / "videos" / f"{name}.mp4", pixels, "mbtree=0")
        Image.fromarray(pixels[0]).save(folder / "images" / f"{name}.png")
    lists = {
        "prompts.txt": [meaning.caption for meaning in shown],
        "videos.txt": [f"videos/{name}.mp4" for name in names],
        "images.txt": [f"images/{name}.png" for name in names],
    }
    for name, lines in lists.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
