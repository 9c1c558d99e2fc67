import json
import os
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data import edits
from vireo.data.edit_clips import list_raw, named_parts
from vireo.errors import UserError


@pytest.fixture
def root(tmp_path):
    return edits.write(tmp_path)


def reasons(root: Path) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in list_raw(root).left_out)


def test_clips_are_listed_in_order_with_split_task_and_text(root):
    clips, left_out = list_raw(root)
    assert [clip.name for clip in clips] == list(edits.NAMES) and left_out == []
    assert [clip.split for clip in clips] == ["train"] * 3 + ["val", "test"]
    assert clips[1].task == "drop_object" and clips[1].prompt == "do what train/drop_object/video_01 says"
    assert [frame.path.name for frame in clips[0].frames] == [f"{number:02d}.png" for number in range(21)]
    assert clips[0].frames[20].read() == (root / edits.NAMES[0] / "20.png").read_bytes()


@pytest.mark.parametrize("file", ["metadata.json", "metadata.jsonl"])
def test_both_spellings_and_both_files_say_the_same(root, file):
    other = {"input_frames_folder": f"./{edits.NAMES[1]}/", "edit_prompt": "the other spelling"}
    (root / "metadata.json").unlink()
    edits.write_metadata(root, [edits.row(edits.NAMES[0]), other], file)
    clips, left_out = list_raw(root)
    assert [clip.name for clip in clips] == list(edits.NAMES[:2]) and left_out == []
    assert clips[1].prompt == "the other spelling" and clips[1].task == "drop_object"


@pytest.mark.parametrize("empty", ["", "  ", None])
def test_an_empty_spelling_gives_way_to_the_other(root, empty):
    row = {"video_path": empty, "input_frames_folder": edits.NAMES[0], "instruction": empty, "edit_prompt": "do it"}
    edits.write_metadata(root, [row])
    (clip,), left_out = list_raw(root)
    assert (clip.name, clip.prompt) == (edits.NAMES[0], "do it") and left_out == []


def test_a_frame_that_is_there_twice_leaves_its_clip_out(root):
    folder = root / edits.NAMES[0]
    (folder / "20.jpg").write_bytes((folder / "20.png").read_bytes())
    assert len(list_raw(root).clips) == len(edits.NAMES) - 1
    assert reasons(root)[edits.NAMES[0]].startswith("frame 20 there as more than one file, such as .jpg and .png")


def test_what_cannot_be_used_is_left_out_with_its_reason(root):
    name = edits.NAMES[0]
    (root / edits.NAMES[1] / "13.png").unlink()
    for number in range(2, 9):
        (root / edits.NAMES[2] / f"{number:02d}.png").unlink()
    rows = [edits.row(name) for name in edits.NAMES]
    rows[3]["instruction"] = "  "
    del rows[4]["instruction"]
    strange = [{**edits.row(name), "video_path": path} for path in ("other/move/v", "../out/v", "/abs/v", "train/no/v")]
    edits.write_metadata(root, [*rows, edits.row(name), *strange, {"instruction": "x"}, "text"])
    assert [clip.name for clip in list_raw(root).clips] == [name]
    assert reasons(root) == {
        edits.NAMES[1]: "frame 13 missing",
        edits.NAMES[2]: "frames 02, 03, 04 and 4 more missing",
        edits.NAMES[3]: "has no instruction",
        edits.NAMES[4]: "has no instruction",
        name: "listed twice, the first row counts",
        "other/move/v": "lies in none of train/, val/, test/",
        "../out/v": f"{root}/../out/v lies outside {root}: allow it with +data.allow_outside_root=true",
        "/abs/v": f"/abs/v lies outside {root}: allow it with +data.allow_outside_root=true",
        "train/no/v": "its folder cannot be read (No such file or directory)",
        "row 10 of metadata.json": "has neither video_path nor input_frames_folder",
        "row 11 of metadata.json": "has neither video_path nor input_frames_folder",
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"video_path": ', "line 1, column 17: malformed JSON"),
        ("[]", "lists no clip"),
        ('{"list": []}', "expected a list of clips, found dict"),
    ],
)
def test_a_metadata_file_that_cannot_be_used_is_refused(root, text, message):
    (root / "metadata.json").write_text(text)
    with pytest.raises(UserError, match=message):
        list_raw(root)


def test_a_malformed_line_is_named(root):
    (root / "metadata.json").unlink()
    (root / "metadata.jsonl").write_text(json.dumps(edits.row(edits.NAMES[0])) + "\n\n{oops}\n")
    with pytest.raises(UserError, match="line 3, column 2: malformed JSON"):
        list_raw(root)


def test_a_root_without_metadata_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no metadata.json or metadata.jsonl in"):
        list_raw(tmp_path)


parts = st.text(st.characters(exclude_characters="/\0"), min_size=1).filter(lambda part: part not in (".", ".."))


@given(st.lists(parts), st.sampled_from(["train", "val", "test"]), parts, parts)
def test_a_clip_is_named_from_its_last_split_on(above, split, task, clip):
    if task in ("train", "val", "test"):
        return
    folder = PurePosixPath("/", *above, split, task, clip)
    assert named_parts(folder) == (f"{split}/{task}/{clip}", split, task)


def test_a_folder_without_a_split_has_no_name():
    assert named_parts(PurePosixPath("/data/move_object/video_01")) == ("", "", "")
    assert named_parts(PurePosixPath("train/video_test_01")) == ("train/video_test_01", "train", "")


@pytest.mark.skipif("VIREO_SAMPLE_DATA" not in os.environ, reason="VIREO_SAMPLE_DATA is not set: no real clips")
def test_the_real_sample():
    root = Path(os.environ["VIREO_SAMPLE_DATA"], "ip2p_sample/dataset_root")
    clips, left_out = list_raw(root)
    assert left_out == ["train/drop_object/video_03: frame 13 missing"]
    assert [sum(clip.split == split for clip in clips) for split in ("train", "val", "test")] == [8, 3, 3]
