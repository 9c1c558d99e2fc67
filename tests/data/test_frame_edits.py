import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data import edits
from vireo.data import edit_clips_arrow
from vireo.data.edit_clips_conversion import convert
from vireo.data.frame_edits import FrameEdits
from vireo.data.source import ChangedError
from vireo.data.stream import Stream, collate
from vireo.data.transforms import RESAMPLER
from vireo.errors import UserError
from vireo.randomness import Draws
from vireo.video_io import BadVideoError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return edits.write(tmp_path_factory.mktemp("edits") / "raw")


@pytest.fixture(scope="module")
def ramp(tmp_path_factory):
    """One clip, 40 x 80, whose red is 3 times the column; the frame's number is in its green."""
    root = edits.write(tmp_path_factory.mktemp("ramp"), edits.NAMES[:1], (40, 80))
    for frame in range(21):
        picture = Image.open(root / edits.NAMES[0] / f"{frame:02d}.png")
        for column in range(80):
            for line in range(40):
                picture.putpixel((column, line), (3 * column, 10 * frame, line))
        picture.save(root / edits.NAMES[0] / f"{frame:02d}.png")
    return root


def draws(position=0, seed=0):
    return Draws(seed, [position])


def loaded(sample) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([source.load() for source in sample["frames"]]), sample["target"].load()


def shown(sample) -> list[int]:
    """The numbers of the frames of a sample, the target last."""
    frames, target = loaded(sample)
    return [int(frame[1, 0, 0]) // 10 for frame in [*frames, target]]


def test_a_sample(root):
    edited = FrameEdits(root, 20, 16, 16)
    sample = edited.sample(1, draws())
    assert len(edited) == 3
    assert sample.keys() == {"frames", "target", "prompt", "name", "task", "frame_numbers"}
    assert (sample["name"], sample["task"]) == ("train/drop_object/video_01", "drop_object")
    assert sample["prompt"] == "do what train/drop_object/video_01 says"
    frames, target = loaded(sample)
    assert (
        frames.shape == (20, 3, 16, 16) and target.shape == (3, 16, 16) and frames.dtype == target.dtype == torch.uint8
    )
    assert target.is_contiguous() and frames[0, 0, 0, 0] == 40
    assert shown(sample) == list(range(21))


@pytest.mark.parametrize("num_frames", [1, 3, 20])
def test_the_condition_is_the_last_frames_before_the_target(root, num_frames):
    assert shown(FrameEdits(root, num_frames, 8, 8).sample(0, draws())) == list(range(20 - num_frames, 21))


def test_the_published_baseline_is_a_pair_of_numbers(root):
    pair = FrameEdits(root, 1, 8, 8, target_frame=1, condition_frames=[0])
    assert shown(pair.sample(0, draws())) == [0, 1]
    three = FrameEdits(root, 3, 8, 8, condition_frames=[0, 10, 19]).sample(0, draws())
    assert shown(three) == three["frame_numbers"] == [0, 10, 19, 20]


def test_splits(root):
    def names(split, held_out=("val", "test")):
        edited = FrameEdits(root, 1, 8, 8, split=split, held_out=held_out)
        return [edited.sample(index, draws())["name"] for index in range(len(edited))]

    assert names("train") == list(edits.NAMES[:3])
    assert names("validation") == list(edits.NAMES[3:])
    assert names("validation", ["test"]) == [edits.NAMES[4]]


def test_batches_through_the_stream(root):
    stream = Stream(FrameEdits(root, 2, 8, 12), seed=0)
    batch = collate([stream[(position, 0)] for position in range(3)])
    assert batch["frames"].shape == (3, 2, 3, 8, 12) and batch["target"].shape == (3, 3, 8, 12)
    assert sorted(batch["name"]) == sorted(edits.NAMES[:3])


def test_an_arrow_dataset_gives_the_same_samples(root, tmp_path):
    convert(root, tmp_path / "arrow")
    raw, arrow = (FrameEdits(folder, 20, 16, 20) for folder in (root, tmp_path / "arrow"))
    for index in range(3):
        one, other = raw.sample(index, draws()), arrow.sample(index, draws())
        for a, b in zip(loaded(one), loaded(other), strict=True):
            assert torch.equal(a, b)
        assert [one[key] for key in ("prompt", "name", "task")] == [other[key] for key in ("prompt", "name", "task")]
        assert one["target"].identity == other["target"].identity
    assert len(FrameEdits(tmp_path / "arrow", 20, 16, 20, split="validation", held_out=["test"])) == 1


# ------------------------------------------------------------------ crop and flip


def test_the_centre_fills_the_frame(ramp):
    frames, _ = loaded(FrameEdits(ramp, 1, 40, 40).sample(0, draws()))
    assert torch.equal(frames[0, 0, 0], 3 * torch.arange(20, 60).to(torch.uint8))
    larger, _ = loaded(FrameEdits(ramp, 1, 80, 80).sample(0, draws()))
    assert larger[0, 0, 0, 0] in range(58, 63) and larger[0, 0, 0, -1] in range(174, 180), (
        "scaled up, nothing reflected"
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 2**40), size=st.tuples(st.integers(4, 60), st.integers(4, 60)))
def test_all_frames_have_one_crop_and_one_flip(ramp, position, size):
    edited = FrameEdits(ramp, 20, *size, crop="random", crop_scale=(0.5, 1.0), flip=0.5)
    frames, target = loaded(edited.sample(0, draws(position)))
    assert (frames[:, 0::2] == target[0::2]).all(), "red and blue are places, green is the frame"
    again, _ = loaded(edited.sample(0, draws(position)))
    assert torch.equal(frames, again)


def test_flip_is_a_coin_for_each_sample(ramp):
    edited = FrameEdits(ramp, 1, 40, 40, flip=0.25)
    plain = loaded(FrameEdits(ramp, 1, 40, 40).sample(0, draws()))[1]
    targets = [loaded(edited.sample(0, draws(position)))[1] for position in range(400)]
    flipped = sum(torch.equal(target, plain.flip(-1)) for target in targets)
    assert sum(torch.equal(target, plain) for target in targets) == 400 - flipped
    assert 70 < flipped < 130
    held_out = FrameEdits(ramp, 1, 40, 40, flip=1.0, crop="random", split="validation")
    assert held_out._flips == [False] and not held_out._is_random


def test_random_crops_differ_between_positions(ramp):
    edited = FrameEdits(ramp, 1, 20, 20, crop="random", crop_scale=(0.5, 0.9))
    targets = {loaded(edited.sample(0, draws(position)))[1].numpy().tobytes() for position in range(12)}
    assert len(targets) > 9


# ------------------------------------------------------------------ identities


def test_equal_identities_decode_to_equal_tensors(ramp, root):
    """Over settings that differ in one thing each: content, size, crop, flip."""
    known: dict[str, torch.Tensor] = {}
    variants = [
        {}, {"height": 20}, {"width": 20}, {"flip": 1.0}, {"crop": "random", "crop_variants": 3},
        {"crop": "random", "crop_variants": 3, "crop_scale": (0.4, 0.5)}, {"num_frames": 20},
    ]  # fmt: skip
    for folder in (ramp, root):
        for variant in variants:
            edited = FrameEdits(folder, **{"num_frames": 1, "height": 16, "width": 16, **variant})
            for position in range(6):
                sample = edited.sample(0, draws(position))
                for source in [*sample["frames"], sample["target"]]:
                    tensor = source.load()
                    assert torch.equal(known.setdefault(source.identity, tensor), tensor)
        if folder is ramp:  # plain pictures look the same from both sides
            assert len({tensor.numpy().tobytes() for tensor in known.values()}) == len(known)


def test_identities_follow_the_content_not_the_place(root, tmp_path):
    moved = shutil.copytree(root, tmp_path / "moved")
    target = FrameEdits(root, 1, 8, 8).sample(0, draws())["target"]
    edited = FrameEdits(moved, 1, 8, 8)
    assert edited.sample(0, draws())["target"].identity == target.identity
    assert json.loads(target.identity)["resampler"] == RESAMPLER
    shutil.copy(moved / edits.NAMES[0] / "03.png", moved / edits.NAMES[0] / "20.png")
    assert FrameEdits(moved, 1, 8, 8).sample(0, draws())["target"].identity != target.identity


def test_a_picture_that_has_changed_is_not_what_its_identity_says(root, tmp_path):
    edited = FrameEdits(shutil.copytree(root, tmp_path / "edited"), 2, 8, 8)
    before = edited.sample(0, draws())
    place = tmp_path / "edited" / edits.NAMES[0] / "19.png"
    shutil.copy(place.with_name("03.png"), place)
    assert edited.sample(0, draws())["frames"][1].identity == before["frames"][1].identity, "asked once"
    with pytest.raises(ChangedError, match="19.png: frame 19 of train/move_object/video_01: has changed since"):
        before["frames"][1].load()
    before["frames"][0].load()
    now = edited.sources(0)["frames"][1]
    assert now.identity != before["frames"][1].identity and now.load()[1, 0, 0] == 30
    assert edited.sample(0, draws())["frames"][1].identity == now.identity


def test_new_random_crops_have_no_identity(root):
    edited = FrameEdits(root, 2, 8, 8, crop="random")
    sample = edited.sample(0, draws())
    assert [source.identity for source in [*sample["frames"], sample["target"]]] == [None] * 3
    assert edited.sources(0) == {"prompt": [sample["prompt"]]}


@pytest.mark.parametrize(
    "options, count",
    [({}, 1), ({"flip": 0.5}, 2), ({"flip": 1.0}, 1), ({"crop": "random", "crop_variants": 3, "flip": 0.5}, 6)],
)
def test_sources_are_all_that_samples_ask_for(root, options, count):
    edited = FrameEdits(root, 2, 8, 8, **options)
    told = edited.sources(1)
    samples = [edited.sample(1, draws(position)) for position in range(60)]
    assert {source.identity for source in told["target"]} == {sample["target"].identity for sample in samples}
    asked = {source.identity for sample in samples for source in sample["frames"]}
    assert {source.identity for source in told["frames"]} == asked
    assert (len(told["target"]), len(told["frames"])) == (count, 2 * count)
    assert told["prompt"] == [samples[0]["prompt"]]


# ------------------------------------------------------------------ what is wrong


def test_a_broken_frame_is_named_and_another_sample_taken(root, tmp_path):
    broken = shutil.copytree(root, tmp_path / "broken")
    edited = FrameEdits(broken, 20, 8, 8)
    frame = broken / edits.NAMES[2] / "13.png"
    frame.write_bytes(frame.read_bytes()[:50])
    with pytest.raises(BadVideoError, match=r"13.png: frame 13 of train/cover_object/video_01: the picture is damaged"):
        loaded(edited.sample(2, draws()))
    frame.unlink()
    with pytest.raises(BadVideoError, match="frame 13 of train/cover_object/video_01: there is no such picture"):
        loaded(edited.sample(2, draws()))
    anew = FrameEdits(root, 20, 8, 8)
    anew.clips = edited.clips  # was there when the dataset was made, but has never been looked at
    for _ in range(2):
        with pytest.raises(BadVideoError, match="frame 13 of train/cover_object/video_01: there is no such picture"):
            anew.sample(2, draws())
    stream = Stream(edited, seed=0)
    samples = [stream[(position, 0)] for position in range(3)]
    assert {sample["name"] for sample in samples} <= set(edits.NAMES[:2])
    assert [path for sample in samples for path, _ in sample["bad"]] == [str(frame)]


def test_faults_of_a_raw_layout(root, tmp_path):
    assert FrameEdits(root, 1, 8, 8).faults() == []
    broken = shutil.copytree(root, tmp_path / "broken")
    (broken / edits.NAMES[3] / "13.png").unlink()
    edited = FrameEdits(broken, 1, 8, 8)
    assert edited.faults() == ["no clip of the split val can be used", f"{edits.NAMES[3]}: frame 13 missing"]
    assert edited.describe()["left_out"] == [f"{edits.NAMES[3]}: frame 13 missing"]


def test_faults_of_a_dataset(root, tmp_path):
    import datasets

    raw = shutil.copytree(root, tmp_path / "raw")
    convert(raw, tmp_path / "arrow")
    assert FrameEdits(tmp_path / "arrow", 1, 8, 8).faults() == []
    shutil.copy(raw / edits.NAMES[0] / "03.png", raw / edits.NAMES[0] / "20.png")
    splits = datasets.load_from_disk(str(tmp_path / "arrow"))
    datasets.DatasetDict({"train": splits["train"], "val": splits["train"]}).save_to_disk(str(tmp_path / "mixed"))
    faults = FrameEdits(tmp_path / "mixed", 1, 8, 8, frames_root=raw).faults()
    assert faults[0] == "no clip of the split test can be used"
    assert (
        f"{edits.NAMES[0]}: {raw / edits.NAMES[0] / '20.png'} has changed since the conversion: convert it anew"
        in faults
    )
    assert f"{edits.NAMES[1]} is in train and in val" in faults


def test_a_row_without_its_edited_picture_is_left_out(root, tmp_path):
    import datasets

    convert(root, tmp_path / "whole")
    splits = datasets.load_from_disk(str(tmp_path / "whole"))
    told = splits["train"].cast_column("edited_image", datasets.Image(decode=False))
    pictures = [*told["edited_image"][:1], {"bytes": b"", "path": "20.png"}, None]
    lacking = datasets.Dataset.from_dict({**told[:], "edited_image": pictures}, features=splits["train"].features)
    datasets.DatasetDict({**splits, "train": lacking}).save_to_disk(str(tmp_path / "lacking"))
    edited = FrameEdits(tmp_path / "lacking", 2, 8, 8, frames_root=root)
    assert [clip.name for clip in edited.clips] == [edits.NAMES[0]]
    assert edited.faults() == [f"{name}: has no edited_image" for name in edits.NAMES[1:3]]
    target = edited.clips[0].frames[-1]._replace(read=lambda: edit_clips_arrow._edited_image(lacking, 2))
    edited.clips[0] = dataclasses.replace(edited.clips[0], frames=(*edited.clips[0].frames[:-1], target))
    with pytest.raises(BadVideoError, match="frame 20 of train/move_object/video_01"):
        edited.sources(0)


def test_a_clip_that_a_dataset_lists_twice_has_two_names_and_is_told(root, tmp_path):
    import datasets

    convert(root, tmp_path / "arrow")
    splits = datasets.load_from_disk(str(tmp_path / "arrow"))
    twice = datasets.concatenate_datasets([splits["train"], splits["train"].select([1])])
    datasets.DatasetDict({**splits, "train": twice}).save_to_disk(str(tmp_path / "twice"))
    edited = FrameEdits(tmp_path / "twice", 2, 8, 8, frames_root=root, crop="random", crop_variants=50)
    first, second = (edited.sample(index, draws()) for index in (1, 3))
    assert (first["name"], second["name"]) == (edits.NAMES[1], f"{edits.NAMES[1]} (2)")
    assert second["target"].name == f"{edits.NAMES[1]} (2)/20"
    assert first["target"].identity != second["target"].identity, "each has crops of its own"
    assert edited.faults() == [f"{root / edits.NAMES[1]} is listed 2 times in train"]


def test_all_wrong_arguments_are_told_at_once(root):
    wrong = {
        "num_frames": 0,
        "height": -1,
        "target_frame": 21,
        "crop": "left",
        "crop_scale": (0.9, 0.8),
        "crop_variants": 0,
        "flip": 1.5,
        "split": "test",
        "held_out": ["train"],
        "max_bad_fraction": -1,
    }
    with pytest.raises(UserError) as caught:
        FrameEdits(**{"root": root, "width": 8, **wrong})
    for name in wrong:
        assert f"\n  {name} is " in str(caught.value), name


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_frames": 21}, "20 frames are before target_frame=20"),
        ({"num_frames": 2, "condition_frames": [3]}, r"condition_frames are \[3\], expected num_frames = 2"),
        ({"num_frames": 3, "condition_frames": [18, 19, 20]}, "end before the frame to be made"),
        ({"num_frames": 1, "target_frame": 5, "condition_frames": [9]}, "5 frames are before target_frame=5"),
        ({"num_frames": 3, "condition_frames": [19, 10, 15]}, "numbers from 0 that rise"),
        ({"num_frames": 2, "condition_frames": [19, 19]}, "numbers from 0 that rise"),
        ({"num_frames": 2, "condition_frames": [-1, 19]}, "numbers from 0 that rise"),
        ({"num_frames": 1, "crop_variants": 2}, "is for crop=random"),
        ({"num_frames": 1, "frames_root": "/x"}, "is for Hugging Face datasets"),
    ],
)
def test_arguments_that_contradict_each_other(root, options, message):
    with pytest.raises(UserError, match=message):
        FrameEdits(root, height=8, width=8, **options)


def test_a_root_without_clips_is_refused_and_one_below_is_found(root, tmp_path):
    with pytest.raises(UserError, match="no edited clips in"):
        FrameEdits(tmp_path, 1, 8, 8)
    shutil.copytree(root, tmp_path / "frame_edits")
    assert len(FrameEdits(tmp_path, 1, 8, 8)) == 3
    shutil.copytree(root, tmp_path / "outer" / "dataset_root")
    with pytest.raises(UserError, match="paths.data=.*/outer/dataset_root has them"):
        FrameEdits(tmp_path / "outer", 1, 8, 8)
    edits.write_metadata(tmp_path / "frame_edits", [edits.row(edits.NAMES[4])])
    with pytest.raises(UserError, match="can be trained on"):
        FrameEdits(tmp_path, 1, 8, 8)


def test_prepare_tells_where_the_dataset_is(root, tmp_path):
    raw = shutil.copytree(root, tmp_path / "raw")
    assert f"paths.data={tmp_path / 'raw_arrow'}" in FrameEdits.prepare(raw)
    assert len(FrameEdits(tmp_path / "raw_arrow", 20, 8, 8)) == 3
    with pytest.raises(UserError, match="already"):
        FrameEdits.prepare(tmp_path / "raw_arrow")


@pytest.mark.skipif("VIREO_SAMPLE_DATA" not in os.environ, reason="VIREO_SAMPLE_DATA is not set: no real clips")
def test_the_real_sample():
    root = Path(os.environ["VIREO_SAMPLE_DATA"], "ip2p_sample/dataset_root")
    for split, count in (("train", 8), ("validation", 6)):
        edited = FrameEdits(root, 20, 64, 64, split=split)
        assert len(edited) == count and edited.faults() == ["train/drop_object/video_03: frame 13 missing"]
        for index in range(count):
            frames, target = loaded(edited.sample(index, draws()))
            assert frames.shape == (20, 3, 64, 64) and target.float().std() > 10


def test_two_entries_of_one_name_keep_their_own_identities(root):
    edited = FrameEdits(root, 1, 8, 8)
    first, second = edited.clips[:2]
    edited.clips[1] = dataclasses.replace(second, name=first.name)
    one, two = (edited.sample(index, draws())["target"].identity for index in (0, 1))
    assert one != two
