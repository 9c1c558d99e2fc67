"""The mini world's videos have the layouts of DAVIS and YouTube-VOS, and what a hole hides is seen elsewhere."""

import numpy as np
import pytest
from PIL import Image

from vireo.data.masked_clips import MaskedClips
from vireo.mini import masked_clips, scenes
from vireo.randomness import Draws


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini")
    with pytest.MonkeyPatch.context() as patch:
        for name, count in {"NUM_TRAINING": 3, "NUM_HELD_OUT": 2, "NUM_YOUTUBE": 4, "NUM_SHORT": 1}.items():
            patch.setattr(masked_clips, name, count)
        masked_clips.write(folder)
    return folder


def test_the_recipe_reads_it(made, caplog):
    roots = {"davis": made / "DAVIS", "ytvos": made / "YouTubeVOS"}
    train = MaskedClips(22, 64, 64, **roots, repeat={"davis": 10})
    held_out = MaskedClips(22, 64, 64, **roots, split="validation")
    assert (len(train), len(held_out)) == (3 * 10 + 4, 2)
    assert "1 videos of ytvos have fewer than 22 frames" in caplog.text
    hole = held_out.sample(1, Draws(0, [0]))["hole"].load()
    covered = scenes.coverage(masked_clips.drifting(2_100_001).things[0], masked_clips.times(26))[:22]
    assert hole.shape == (22, 1, 64, 64) and hole[:, 0].numpy()[covered > 0.5].all()


def test_pictures_are_the_scenes_hardly_compressed(made):
    truth = scenes.render(masked_clips.drifting(2_000_002), masked_clips.times(26))
    folder = made / "DAVIS/JPEGImages/480p/train-02"
    pictures = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
    assert len(pictures) == 26 and 10 * np.log10(255**2 / ((pictures.astype(float) - truth) ** 2).mean()) > 38


def test_what_is_hidden_at_one_time_is_seen_at_another():
    """Of the background behind a still hole most is seen beside it in another frame, where its texture has moved on."""
    for seed in range(20):
        scene = masked_clips.drifting(seed)
        moved = np.abs(np.array(scene.background.pan)) * (scenes.NUM_FRAMES - 1)
        assert moved.max() >= 14, "further than half of most holes"
        for thing in scene.things:
            first, last = thing.centre(masked_clips.times(26))[[0, -1]]
            assert np.hypot(*(last - first)) >= masked_clips.DISTANCE and thing.colour != "black"
