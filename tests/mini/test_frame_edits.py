"""The mini world's edits are clips of the recipe's raw layout."""

import json

import numpy as np
import pytest
from PIL import Image

from vireo.data.frame_edits import FrameEdits
from vireo.errors import UserError
from vireo.mini import frame_edits, scenes
from vireo.randomness import Draws


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini") / "edits"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame_edits, "NUM_HELD_OUT", 3)
        frame_edits.write(folder, 9)
    return folder


def test_the_recipe_reads_it(made):
    train, held_out = (FrameEdits(made, 20, 64, 64, split=split) for split in ("train", "validation"))
    assert (len(train), len(held_out)) == (9, 6) and train.faults() == []
    sample = train.sample(4, Draws(0, [0]))
    scene = scenes.scene(4)
    assert (sample["prompt"], sample["task"]) == (scene.text, scene.task)
    assert sample["name"] == f"train/{scene.task}/video_0004"


def test_pictures_are_the_scenes_hardly_compressed(made):
    rows = json.loads((made / "metadata.json").read_text())
    truth = scenes.render(scenes.scene(2))
    pictures = [np.asarray(Image.open(made / rows[2]["video_path"] / f"{frame:02d}.jpg")) for frame in range(21)]
    assert len(list((made / rows[2]["video_path"]).iterdir())) == 21
    error = (np.stack(pictures).astype(float) - truth) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 38


def test_held_out_clips_show_other_scenes(made):
    rows = json.loads((made / "metadata.json").read_text())
    pictures = {split: set() for split in ("train", "val", "test")}
    for row in rows:
        split = row["video_path"].split("/")[0]
        pictures[split].add((made / row["video_path"] / "20.jpg").read_bytes())
    assert [len(pictures[split]) for split in ("train", "val", "test")] == [9, 3, 3]
    assert len(set.union(*pictures.values())) == 15


def test_a_folder_in_use_and_no_clips_are_refused(made, tmp_path):
    with pytest.raises(UserError, match="is not empty"):
        frame_edits.write(made, 1)
    with pytest.raises(UserError, match="clips=0"):
        frame_edits.write(tmp_path / "none", 0)
    assert not (tmp_path / "none").exists()
