"""Lists of others cannot lead out of the data: one guard and one option for every layout."""

import json
from functools import partial
from pathlib import Path

import datasets
import pytest

from tests.data import captions, edits, videos
from vireo.data import edit_clips_arrow, edit_clips_conversion, vos_layouts
from vireo.data.captioned_clips import CaptionedClips
from vireo.data.clips import Clips
from vireo.data.frame_edits import FrameEdits
from vireo.data.listing import inside
from vireo.data.subject_annotations import judge
from vireo.data.subject_clips import SubjectClips
from vireo.errors import UserError
from vireo.mini import subject_clips as mini_subjects
from vireo.randomness import Draws

OPTION = r"allow it with \+data.allow_outside_root=true"
WAYS = ["up", "absolute", "link"]


@pytest.fixture(autouse=True)
def index_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def way_out(way: str, root: Path, outside: Path) -> str:
    """How a list in `root` names something in the folder `outside`, beside it."""
    if way == "link":
        (root / "link").symlink_to(outside)
    return {"up": f"../{outside.name}", "absolute": str(outside), "link": "link"}[way]


@pytest.fixture
def places(tmp_path):
    """The data's folder and one beside it, with the same two videos each."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root, outside):
        for name in "ab":
            videos.write_flat(folder / f"{name}.mp4", 8)
    return root, outside


@pytest.mark.parametrize("way", WAYS)
def test_the_guard(tmp_path, way):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    path = root / way_out(way, root, outside) / "a.mp4"
    with pytest.raises(ValueError, match=rf"lies outside .*root: {OPTION}"):
        inside(root, path, allow_outside_root=False)
    assert inside(root, path, allow_outside_root=True) == path
    assert inside(root, root / "sub" / ".." / "a.mp4", allow_outside_root=False)


@pytest.mark.parametrize("way", WAYS)
def test_an_annotation_of_clips(places, way):
    root, outside = places
    file = root / "clips.json"
    file.write_text(json.dumps([{"path": "a.mp4"}, {"path": f"{way_out(way, root, outside)}/b.mp4"}]))
    make = partial(Clips, root, 4, 16, 16, annotations=file)
    with pytest.raises(UserError, match=rf"clips.json cannot be used:\n  list\[1\]: .*{OPTION}"):
        make()
    assert len(make(allow_outside_root=True)) + len(make(allow_outside_root=True, split="validation")) == 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("image", ["none", "listed"])
def test_lists_of_captioned_clips(places, way, image):
    root, outside = places
    leads_out = f"{way_out(way, root, outside)}/b.mp4"
    captions.write_list(root / "prompts.txt", ["one", "two"])
    captions.write_list(root / "videos.txt", ["a.mp4", "b.mp4" if image == "listed" else leads_out])
    captions.write_list(root / "images.txt", ["a.mp4", leads_out])  # no pictures, but that is asked later
    file = "images.txt" if image == "listed" else "videos.txt"
    make = partial(CaptionedClips, root, 4, 16, 16, held_out=0, image=image)
    with pytest.raises(UserError, match=rf"{file}, line 2: .*{OPTION}"):
        make()
    if image == "none":
        assert len(make(allow_outside_root=True)) == 2
        CaptionedClips.prepare(root, allow_outside_root=True, out=root / "frames")
    with pytest.raises(UserError, match=rf"videos.txt, line 2: .*{OPTION}" if image == "none" else "exist|images"):
        CaptionedClips.prepare(root)


@pytest.mark.parametrize("way", WAYS)
def test_metadata_of_edited_clips(tmp_path, way):
    root, outside = edits.write(tmp_path / "root"), edits.write(tmp_path / "outside")
    named = f"{way_out(way, root / 'train', outside)}/{edits.NAMES[0]}"
    named = named if way == "absolute" else f"train/{'../' * (way == 'up')}{named}"
    edits.write_metadata(root, [edits.row(name) for name in edits.NAMES[1:]] + [edits.row(named)])
    make = partial(FrameEdits, root, 20, 16, 16)
    assert [line for line in make().listing.left_out if "lies outside" in line and "allow_outside_root" in line]
    assert len(make(allow_outside_root=True)) == len(make()) + 1
    with pytest.raises(UserError, match=OPTION):
        edit_clips_conversion.convert(root, tmp_path / "arrow", strict=True)


def test_a_dataset_of_edited_clips(tmp_path):
    root, outside = edits.write(tmp_path / "root"), edits.write(tmp_path / "outside")
    names = [edits.NAMES[0], f"../outside/{edits.NAMES[1]}"]
    rows = [
        {
            "input_frames": [f"{name}/{frame:02d}.png" for frame in range(20)],
            "edit_prompt": "x",
            "edited_image": str(outside / edits.NAMES[0] / "20.png"),
        }
        for name in names
    ]
    made = datasets.Dataset.from_list(rows, features=edit_clips_arrow.features())
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "arrow"))
    listing = edit_clips_arrow.list_arrow(tmp_path / "arrow", root)
    assert len(listing.clips) == 1 and "allow_outside_root" in listing.left_out[0]
    assert len(edit_clips_arrow.list_arrow(tmp_path / "arrow", root, allow_outside_root=True).clips) == 2


@pytest.mark.parametrize("way", WAYS)
def test_lists_of_davis(tmp_path, way):
    frames = tmp_path / "JPEGImages" / "480p"
    frames.mkdir(parents=True)
    (frames.parent / "outside").mkdir()
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    lines = f"bear\n\n{way_out(way, frames, frames.parent / 'outside')}\n"
    (tmp_path / "ImageSets" / "2017" / "train.txt").write_text(lines)
    with pytest.raises(UserError, match=rf"train.txt, line 3: .*{OPTION}"):
        vos_layouts.davis(tmp_path, "train")
    assert len(vos_layouts.davis(tmp_path, "train", allow_outside_root=True)) == 2


@pytest.mark.parametrize("way", WAYS)
def test_annotations_of_subjects(tmp_path, way):
    root = tmp_path / "root"
    mini_subjects.write(root, 1)
    (file,) = (root / "demo_result" / "step5" / "merge_final_json").glob("*.json")
    folder = root / "demo_result" / "step0" / "videos" / file.stem
    entries = json.loads(file.read_text())
    key = next(iter(entries))
    (tmp_path / "outside").mkdir()
    (folder / entries[key]["metadata"]["path"]).rename(tmp_path / "outside" / "b.mp4")
    (folder / "link").symlink_to(tmp_path / "outside")
    up = "/".join([".."] * (len(folder.relative_to(tmp_path).parts)))
    named = {"up": f"{up}/outside", "absolute": str(tmp_path / "outside"), "link": "link"}[way]
    entries[key]["metadata"]["path"] = f"{named}/b.mp4"
    file.write_text(json.dumps(entries))
    make = partial(SubjectClips, root, 9, 64, 64, held_out=0)
    with pytest.raises(UserError, match=rf"of {file.stem}/{key} in .*{file.name}: .*{OPTION}"):
        make()
    assert make(allow_outside_root=True).sample(0, Draws(0, [0]))["frames"].load().shape[0] == 9
    assert "allow_outside_root" in SubjectClips.prepare(root)


def test_keys_of_subjects_are_no_paths(tmp_path):
    mini_subjects.write(tmp_path, 1)
    (file,) = (tmp_path / "demo_result" / "step5" / "merge_final_json").glob("*.json")
    entry = next(iter(json.loads(file.read_text()).values()))
    assert judge("film_segment_1", entry) == "film"
    for key in ("../../secret_segment_1", "/etc/passwd_segment_1"):
        with pytest.raises(ValueError, match="names no clip"):
            judge(key, entry)
