import json
import os
import shutil
from collections import Counter
from pathlib import Path

import datasets
import pytest

from tests.data import edits
from vireo.data.edit_clips import list_raw
from vireo.data.edit_clips_arrow import features, list_arrow
from vireo.data.edit_clips_conversion import convert
from vireo.errors import UserError


@pytest.fixture
def root(tmp_path):
    return edits.write(tmp_path / "raw")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "arrow"


def published(root: Path, out: Path, names: tuple[str, ...] = edits.NAMES) -> Path:
    """What the published converter writes: absolute paths, train and test."""
    rows = [
        {
            "input_frames": [str(root / name / f"{frame:02d}.png") for frame in range(20)],
            "edit_prompt": f"do what {name} says",
            "edited_image": str(root / name / "20.png"),
        }
        for name in names
    ]
    splits = {"train": rows[:3], "test": rows[3:]}
    made = {name: datasets.Dataset.from_list(rows, features=features()) for name, rows in splits.items()}
    datasets.DatasetDict(made).save_to_disk(str(out))
    return out


def contents(clips) -> dict:
    return {clip.name: (clip.prompt, clip.task, [frame.read() for frame in clip.frames]) for clip in clips}


def test_a_conversion_reads_as_the_raw_layout_does(root, out):
    report = convert(root, out)
    assert report.kept == {"train": 3, "val": 1, "test": 1} and report.left_out == []
    clips, left_out = list_arrow(out)
    assert contents(clips) == contents(list_raw(root).clips) and left_out == []
    assert {clip.name: clip.split for clip in clips} == {name: name.split("/")[0] for name in edits.NAMES}


def test_the_features_are_the_published_ones(root, out):
    convert(root, out)
    made = datasets.load_from_disk(str(out))
    for split in made.values():
        assert split.features == datasets.Features(
            {
                "input_frames": datasets.Sequence(datasets.Value("string"), length=20),
                "edit_prompt": datasets.Value("string"),
                "edited_image": datasets.Image(),
            }
        )
        assert str(split.data.schema.field("input_frames").type).startswith("fixed_size_list")
    for file in out.glob("*/*"):
        assert b'"List"' not in file.read_bytes(), f"{file}: datasets before version 4 could not read it"
    row = made["train"][0]
    assert row["input_frames"] == [f"train/move_object/video_01/{frame:02d}.png" for frame in range(20)]
    assert row["edited_image"].getpixel((0, 0)) == edits.colour(0, 20)


def test_what_is_damaged_is_left_out_and_named(root, out):
    truncated = root / edits.NAMES[1] / "07.png"
    truncated.write_bytes(truncated.read_bytes()[:60])
    (root / edits.NAMES[0] / "13.png").unlink()
    shutil.copy(
        edits.write(root / "large", edits.NAMES[:1], (48, 48)) / edits.NAMES[0] / "03.png", root / edits.NAMES[4]
    )
    report = convert(root, out)
    assert report.kept == {"train": 1, "val": 1, "test": 0}
    assert report.left_out[0] == f"{edits.NAMES[0]}: frame 13 missing"
    assert report.left_out[1].startswith(f"{edits.NAMES[1]}: frame 07: the picture is damaged")
    assert report.left_out[2] == f"{edits.NAMES[4]}: its frames have different sizes: 32x24, 48x48"
    assert "2 of 5 clips kept (train 1, val 1, test 0), 3 left out" in str(report)
    assert "the test split is empty" in str(report)
    assert len(list_arrow(out).clips) == 2, "a dataset with an empty split can be read"


def test_strict_refuses_and_writes_nothing(root, out):
    (root / edits.NAMES[0] / "13.png").unlink()
    with pytest.raises(UserError, match=rf"strict: 1 clips.*\n  {edits.NAMES[0]}: frame 13 missing"):
        convert(root, out, strict=True)
    assert not out.exists()


def test_a_conversion_is_never_stale(root, out):
    assert sum(convert(root, out).kept.values()) == 5
    (root / edits.NAMES[2] / "00.png").unlink()
    assert sum(convert(root, out).kept.values()) == 4
    assert [clip.name for clip in list_arrow(out).clips if clip.split == "train"] == list(edits.NAMES[:2])


def test_a_failing_conversion_leaves_the_one_before(root, out, monkeypatch):
    convert(root, out)

    def full_disk(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(datasets.DatasetDict, "save_to_disk", full_disk)
    with pytest.raises(OSError, match="no space left"):
        convert(root, out)
    assert len(list_arrow(out).clips) == 5
    assert sorted(path.name for path in out.parent.iterdir()) == ["arrow", "raw"]


def test_another_folder_is_not_overwritten(root, out):
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="something else than a dataset"):
        convert(root, out)
    assert (out / "thesis.txt").read_text() == "mine"


def test_nothing_to_train_on_is_refused(root, out):
    edits.write_metadata(root, [edits.row(edits.NAMES[4])])
    with pytest.raises(UserError, match="left to train on"):
        convert(root, out)


def test_a_training_clip_with_a_held_out_picture_is_left_out(root, out):
    shutil.copy(root / edits.NAMES[4] / "05.png", root / edits.NAMES[2] / "17.png")
    report = convert(root, out)
    assert report.left_out == [f"{edits.NAMES[2]}: frame 17 also in {edits.NAMES[4]}, held out"]
    assert report.kept == {"train": 2, "val": 1, "test": 1}


@pytest.mark.parametrize("seed", [0, 1])
def test_a_new_split_is_by_clip_seeded_and_without_leaks(root, out, seed):
    names = [f"train/move_object/video_{number:02d}" for number in range(12)]
    root = edits.write(out.parent / "many", names, (2, 2))  # each picture is in two clips
    report = convert(root, out, resplit=0.3, seed=seed)
    clips = list_arrow(out).clips
    assert report.kept.keys() == {"train", "test"} and min(report.kept.values()) >= 1
    assert len(clips) == sum(report.kept.values()) == 12 - len(report.left_out) < 12
    pictures = {part: {f.read() for c in clips if c.split == part for f in c.frames} for part in ("train", "test")}
    assert not pictures["train"] & pictures["test"]
    split = {clip.name: clip.split for clip in clips}
    convert(root, out, resplit=0.3, seed=seed)
    assert {clip.name: clip.split for clip in list_arrow(out).clips} == split


def test_another_seed_splits_otherwise(root, out):
    splits = set()
    for seed in range(8):
        convert(root, out, resplit=0.4, seed=seed)
        splits.add(tuple(sorted(clip.name for clip in list_arrow(out).clips if clip.split == "test")))
    assert len(splits) > 1
    with pytest.raises(UserError, match="resplit=1"):
        convert(root, out, resplit=1)


# ------------------------------------------------------------------ reading


def test_a_published_dataset_loads_with_its_absolute_paths(root, out):
    published(root, out)
    with pytest.raises(UserError, match="absolute paths, .*data.frames_root=…, or allow .*allow_outside_root=true"):
        list_arrow(out)
    clips = list_arrow(out, allow_outside_root=True).clips
    assert contents(clips) == contents(list_raw(root).clips)
    assert Counter(clip.split for clip in clips) == {"train": 3, "test": 2}


def test_a_dataset_finds_its_frames_after_both_were_moved_or_by_frames_root(root, out, tmp_path):
    convert(root, out)
    expected = contents(list_arrow(out).clips)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(root, moved / "raw")
    with pytest.raises(UserError, match=r"are not where it says .*data.frames_root"):
        list_arrow(out)
    assert contents(list_arrow(out, moved / "raw").clips) == expected
    shutil.move(out, moved / "arrow")
    assert contents(list_arrow(moved / "arrow").clips) == expected
    with pytest.raises(UserError, match="there is no such folder"):
        list_arrow(moved / "arrow", tmp_path / "nowhere")


def test_absolute_paths_of_another_machine_follow_frames_root(root, out, tmp_path):
    published(root, out)
    shutil.move(root, tmp_path / "moved")
    assert [line.split(", looked")[0] for line in list_arrow(out, allow_outside_root=True).left_out][0] == (
        f"{edits.NAMES[0]}: frames 00, 01, 02 and 17 more missing"
    )
    assert contents(list_arrow(out, tmp_path / "moved").clips) == contents(list_raw(tmp_path / "moved").clips)


def test_frames_that_are_gone_and_empty_texts_are_left_out(root, out):
    published(root, out)
    (root / edits.NAMES[3] / "19.png").unlink()
    assert list_arrow(out, allow_outside_root=True).left_out == [
        f"{edits.NAMES[3]}: frame 19 missing, looked for as {root / edits.NAMES[3] / '19.png'}"
    ]
    rows = {"input_frames": [[f"a/{k}" for k in range(20)]], "edit_prompt": [""], "edited_image": [None]}
    made = datasets.Dataset.from_dict(rows, features=features())
    shutil.rmtree(out)
    datasets.DatasetDict({"train": made}).save_to_disk(str(out))
    (root / "a").mkdir()
    for k in range(20):
        (root / "a" / f"{k}").touch()
    assert list_arrow(out, root).left_out == ["train/row_00000: has no instruction"]


def test_what_is_no_such_dataset_is_refused(root, out):
    made = datasets.Dataset.from_dict({"input_frames": [["a"] * 20], "edit_prompt": ["x"]})
    datasets.DatasetDict({"train": made}).save_to_disk(str(out))
    with pytest.raises(UserError, match="other columns"):
        list_arrow(out)
    (out / "train" / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as a dataset"):
        list_arrow(out)


@pytest.mark.skipif("VIREO_SAMPLE_DATA" not in os.environ, reason="VIREO_SAMPLE_DATA is not set: no real clips")
def test_the_real_sample(tmp_path, out):
    root = tmp_path / "sample"
    shutil.copytree(Path(os.environ["VIREO_SAMPLE_DATA"], "ip2p_sample/dataset_root"), root)
    (root / "metadata.json").unlink()  # read the other one here
    report = convert(root, out)
    assert report.kept == {"train": 8, "val": 3, "test": 3}
    assert report.left_out == ["train/drop_object/video_03: frame 13 missing"]
    assert contents(list_arrow(out).clips) == contents(list_raw(root).clips)
    (root / "test/move_object/video_01/00.jpg").unlink()
    assert convert(root, out).kept == {"train": 8, "val": 3, "test": 2}
    picture = root / "train/move_object/video_01/20.jpg"
    picture.write_bytes(picture.read_bytes()[:-2000])
    report = convert(root, out)
    assert report.kept == {"train": 7, "val": 3, "test": 2}
    assert any("train/move_object/video_01: frame 20: the picture is damaged" in line for line in report.left_out)
    assert json.loads((out / "dataset_dict.json").read_text()) == {"splits": ["train", "val", "test"]}
