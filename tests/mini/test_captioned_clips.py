"""The mini world's captioned clips say what they show, and are of the recipe's layout."""

import numpy as np
import pytest

from vireo.data.captioned_clips import CaptionedClips
from vireo.mini import captioned_clips, scenes
from vireo.mini.captioned_clips import Meaning


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini") / "captioned_clips"
    captioned_clips.write(folder, 12)
    return folder


def test_the_recipe_reads_it(made):
    train, held_out = (
        CaptionedClips(made.parent, 9, 64, 64, split=split, validation="validation", image="listed")
        for split in ("train", "validation")
    )
    assert len(train) == 12 and len(held_out) == captioned_clips.NUM_HELD_OUT
    assert train.describe()["each clip"][0].startswith("videos/0000.mp4: frames 0 to 16 of 18")
    assert not {clip.prompt for clip in train.clips} & {clip.prompt for clip in held_out.clips}


def test_every_caption_comes_once():
    trained, held_out = captioned_clips.meanings()
    everything = [meaning.caption for meaning in [*trained, *held_out]]
    assert len(set(everything)) == len(everything) == 2 * 6 * 3 * 4 * 4
    assert len(trained) >= captioned_clips.NUM_TRAINING and len(held_out) == captioned_clips.NUM_HELD_OUT
    assert captioned_clips.meanings() == (trained, held_out), "the same each time"


@pytest.mark.parametrize("direction", scenes.DIRECTIONS)
def test_what_a_caption_says_is_seen(direction):
    meaning = Meaning("large", "red", "circle", direction, "grass")
    pixels = scenes.render(captioned_clips.scene(meaning, 5), np.arange(captioned_clips.NUM_FRAMES)).astype(int)
    is_red = (pixels[..., 0] > 150) & (pixels[..., 1] < 80)
    centres = np.array([np.argwhere(frame).mean(0)[::-1] for frame in is_red])  # x, y
    travel = centres[-1] - centres[0]
    way = np.array(scenes.DIRECTIONS[direction])
    assert travel @ way > 20 and abs(travel @ way[::-1]) < 3
    sizes = [
        (scenes.render(captioned_clips.scene(meaning._replace(size=size), 5), np.arange(1))[..., 0] > 150).sum()
        for size in ("small", "large")
    ]
    assert sizes[1] > 1.5 * sizes[0]
    ground = np.median(pixels[0].reshape(-1, 3), axis=0) / 255
    assert np.abs(ground - np.array(captioned_clips.GROUNDS["grass"])).max() < 0.1


def test_seeds_vary_what_a_caption_leaves_open():
    meaning = captioned_clips.meanings()[1][0]
    scenes_of_it = [captioned_clips.scene(meaning, seed) for seed in range(8)]
    assert len({scene.things[0].start for scene in scenes_of_it}) == 8
    assert {scene.text for scene in scenes_of_it} == {meaning.caption}


def test_the_files_are_the_same_each_time(made, tmp_path):
    captioned_clips.write(tmp_path / "again", 12)
    for path in sorted(made.rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(made)).read_bytes(), path
