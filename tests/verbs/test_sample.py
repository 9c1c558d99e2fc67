"""Samples by hand: what a person gives, and what the recipe makes of it."""

import pytest
import torch
from PIL import Image
from tests import runs

from vireo.cli import run_verb
from vireo.data.captioned_clips import CaptionedClips
from vireo.data.given import Given
from vireo.errors import UserError
from vireo.mini import world
from vireo.randomness import Draws
from vireo.verbs import sample

SHORT = ["steps=1", "validation.every=null", "validation.at_start=false", "validation.clips=1", "tracker=none"]
SHORT += ["loader.workers=0", "batch_size=2", "cache=off", "model.sampler.num_inference_steps=2"]


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "red.png"
    Image.new("RGB", (90, 80), (200, 30, 20)).save(path)
    return path


def test_a_prompt_and_a_picture_become_a_sample(picture):
    made = CaptionedClips.from_files(64, 48, "a dog", str(picture), id_token="BW_STYLE")
    assert made["prompt"] == "BW_STYLE a dog" and made["name"] == "a dog"
    assert made["image"].shape == (3, 64, 48) and made["image"].dtype == torch.uint8
    assert made["image"][:, 30, 20].tolist() == [200, 30, 20]
    plain = CaptionedClips.from_files(64, 48, "a dog", id_token="BW_STYLE", validation_id_token=False)
    assert plain == {"prompt": "a dog", "name": "a dog"}


def test_one_sample_has_several_versions():
    given = Given({"prompt": "a dog"}, 3)
    assert len(given) == 3 and given.sample(2, Draws(0, [2])) == {"prompt": "a dog"} and given.sources(0) == {}


def test_a_name_is_for_one_video_that_is_made_by_hand(capsys):
    for words in (["name=a"], ["name=a", "prompt=b", "clips=2"]):
        assert run_verb("sample", ["experiment=cogvideox_t2v_lora", *words]) != 0
        assert "name=<id> is for one video" in capsys.readouterr().err


@pytest.mark.full
def test_videos_of_a_prompt_and_a_picture(picture, tmp_path, capsys):
    world.ensure()
    run = runs.train(tmp_path, "experiment=cogvideox_i2v_lora", *SHORT, shrunk=False)
    words = [f"run={run}", "prompt=a small red square moves to the left on sand", f"image={picture}"]
    assert run_verb("sample", [*words, "clips=2"]) == 0
    videos = sorted((run / "samples" / "by_hand").glob("clip_00?.mp4"))  # beside each the result alone
    assert [video.name for video in videos] == ["clip_000.mp4", "clip_001.mp4"]
    assert videos[0].read_bytes() != videos[1].read_bytes(), "each version has noise of its own"
    assert "a small red square" in capsys.readouterr().out
    assert run_verb("sample", [*words, "name=first", f"out={tmp_path / 'named'}"]) == 0
    assert [path.name for path in (tmp_path / "named").iterdir()] == ["first.mp4"]
    assert run_verb("sample", words[:2]) != 0
    assert "image=<file> for vireo sample" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "files", "message"),
    [
        ("vireo.data.clips.Clips", {"prompt": "a dog"}, "makes no samples of prompt"),
        ("vireo.data.captioned_clips.CaptionedClips", {"image": "a.png"}, "needs prompt; it takes prompt, image"),
        ("vireo.data.captioned_clips.CaptionedClips", {"prompt": "a", "mask": "b"}, "does not take mask"),
    ],
)
def test_what_the_data_cannot_use_is_told(target, files, message):
    with pytest.raises(UserError, match=message):
        sample._from_files({"_target_": target, "height": 64, "width": 64}, files)


def test_the_nodes_values_are_used(picture):
    node = {"_target_": "vireo.data.captioned_clips.CaptionedClips", "height": 32, "width": 32, "image": "first_frame"}
    assert "image" not in sample._from_files(node, {"prompt": "a"})
    assert sample._from_files(node, {"prompt": "a", "image": str(picture)})["image"].shape == (3, 32, 32)
