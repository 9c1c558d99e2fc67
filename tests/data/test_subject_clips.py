import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from vireo.data import rle
from vireo.data.references import Augmentation
from vireo.data.source import ChangedError
from vireo.data.stream import Stream
from vireo.data.subject_clips import SubjectClips
from vireo.data.transforms import RESAMPLER
from vireo.errors import UserError
from vireo.mini import subject_clips as world
from vireo.randomness import Draws
from vireo.video_io import BadVideoError

ANNOTATIONS = "demo_result/step5/merge_final_json/mini.json"
VIDEOS = "demo_result/step0/videos/mini"
PAIRS = "demo_result/step6/cross-frames-pairs"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three clusters of two clips, 21 frames of 64 x 64."""
    folder = tmp_path_factory.mktemp("subjects") / "root"
    world.write(folder, 3)
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def changed(root, tmp_path):
    """Makes a folder with the same videos, and annotations that a function has changed in place."""

    def make(change):
        (tmp_path / "demo_result/step5/merge_final_json").mkdir(parents=True, exist_ok=True)
        if not (tmp_path / "demo_result/step0").exists():
            (tmp_path / "demo_result/step0").symlink_to(root / "demo_result/step0")
        entries = json.loads((root / ANNOTATIONS).read_text())
        for key, entry in entries.items():
            change(key, entry)
        (tmp_path / ANNOTATIONS).write_text(json.dumps(entries))
        return tmp_path

    return make


def clips(root, frames=9, height=64, width=64, **arguments):
    return SubjectClips(root, frames, height, width, **{"held_out": 0, "subject_area": [0.01, 0.9], **arguments})


def draws(position=0):
    return Draws(0, [position])


def test_a_sample(root):
    made = clips(root, max_subjects_per_sample=2, height=32, width=48)
    sample = made.sample(0, draws())
    assert len(made) == 6
    assert sample.keys() == {"frames", "references", "clip_references", "reference_mask", "prompt", "name"}
    assert sample["name"] == "mini/0000_part1_step1-0-21_step2-0-21"
    assert "thing moves" in sample["prompt"]
    assert sample["frames"].load().shape == (9, 3, 32, 48)
    assert [source.load().shape for source in sample["references"]] == [(3, 32, 48)] * 2
    assert [source.load().shape for source in sample["clip_references"]] == [(3, 512, 512)] * 2
    assert sample["reference_mask"].tolist() == [True, False]
    assert sample["references"][1].load().unique().tolist() == [255]


def test_what_is_drawn_depends_on_the_position_alone(root):
    one, same, other = (clips(root, sample_stride=1).sample(0, draws(position)) for position in (0, 0, 3))
    assert torch.equal(one["frames"].load(), same["frames"].load())
    assert not torch.equal(one["frames"].load(), other["frames"].load())
    assert one["frames"].identity is None
    assert one["references"][0].identity == other["references"][0].identity is not None


def test_the_reference_is_the_thing_on_white(root):
    sample = clips(root).sample(0, draws())
    reference = sample["clip_references"][0].load()
    corners, middle = reference[:, [0, 0, -1, -1], [0, -1, 0, -1]], reference[:, 256, 256]
    assert (corners == 255).any() and middle.float().std() > 5  # a coloured thing
    kept = clips(root, reference_background="keep").sample(0, draws())["clip_references"][0].load()
    assert (kept == 255).all(0).sum() < (reference == 255).all(0).sum()


def test_first_takes_whatever_is_first(root):
    plain = {"no_background": False, "subject_area": None, "min_text_score": None, "max_overlap": None}
    first = clips(root, subject_selection="first", prefer_tagged=False, **plain).sample(0, draws())
    assert first["references"][0].name.endswith("mask 1")
    assert clips(root, subject_selection="first", **plain).sample(0, draws())["references"][0].name.endswith("mask 2")
    assert clips(root, subject_selection="first").sample(0, draws())["references"][0].name.endswith("mask 2")
    drawn = clips(root, subject_selection="random", prefer_tagged=False, **plain)
    assert len({drawn.sample(0, draws(k))["references"][0].name for k in range(12)}) == 2


@pytest.mark.parametrize(
    "filters", [{"min_text_score": 0.5}, {"subject_area": [0.2, 0.3]}, {"with_face": True}], ids=lambda f: next(iter(f))
)
def test_without_a_subject_that_suits_the_whole_frame_is_shown(root, filters):
    sample = clips(root, **filters).sample(0, draws())
    assert sample["references"][0].name.endswith("whole frame")
    frame = clips(root, subject_mask=True, sample_stride=1, frames=21, **filters).sample(0, draws())
    torch.testing.assert_close(sample["references"][0].load(), frame["frames"].load()[0], atol=2, rtol=0)
    assert frame["subject_mask"].min() == 1


def test_faces_are_in_pixels_of_the_whole_frame(changed):
    def cropped_with_a_face(key, entry):
        entry["metadata"]["crop"] = [0, 64, 0, 64]
        mask = rle.decode(entry["annotation"]["mask_annotation"]["0"]["2"]["counts"], 64, 64)
        y, x = (int(place.mean()) for place in np.nonzero(mask))
        box = {"x1": x - 2, "y1": y - 2, "x2": x + 2, "y2": y + 2}
        entry["annotation"]["face_bbox"] = {"0": {"face": [{"box": box}]}, "5": {"face": []}}

    sample = clips(changed(cropped_with_a_face), with_face=True).sample(0, draws())
    assert sample["references"][0].name.endswith("mask 2")


def test_the_crop_is_x_x_y_y(root, changed):
    def crop(key, entry):
        entry["metadata"]["crop"] = [16, 48, 0, 64]
        mask = np.zeros((64, 32), bool)
        mask[8:40, 8:24] = True
        entry["annotation"]["mask_annotation"]["0"] = {"2": {"size": [64, 32], "counts": rle.encode(mask)}}

    sample = clips(changed(crop), 21, 64, 32, sample_stride=1, subject_mask=True).sample(0, draws())
    whole = clips(root, 21, 64, 64, sample_stride=1)
    frames = whole.sample(0, draws())["frames"].load()
    assert torch.equal(sample["frames"].load(), frames[:, :, :, 16:48])
    shown, expected = sample["references"][0].load().float(), frames[0, :, 8:40, 24:40].float()
    torch.testing.assert_close(shown.mean((1, 2)), expected.mean((1, 2)), atol=1, rtol=0)
    assert sample["subject_mask"].shape == (1, 1, 64, 32)
    assert sample["subject_mask"].sum() == 32 * 16 and sample["subject_mask"][0, 0, 8, 8] == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda e: e["metadata"].update(crop=[0, 65, 0, 64]), r"64x64 pixels; crop \[0, 65, 0, 64\]"),
        (lambda e: e["metadata"].update(face_cut=[40, 60]), "21 frames; .* begins at frame 40"),
        (lambda e: e["metadata"].update(path="none.mp4"), "No such file"),
    ],
)
def test_a_clip_that_cannot_be_shown_is_named(changed, change, says):
    root = changed(lambda key, entry: change(entry) if key.startswith("0001_part1") else None)
    with pytest.raises(BadVideoError, match=says):
        sample = clips(root, reference_background="white").sample(2, draws())
        sample["frames"].load()


def test_a_mask_of_another_size_is_named(changed):
    def other(key, entry):
        entry["annotation"]["mask_annotation"]["0"]["2"] = {
            "size": [32, 32],
            "counts": rle.encode(np.eye(32, k=16) > 0),
        }

    with pytest.raises(BadVideoError, match="mask 2 is 32x32, the cropped picture 64x64"):
        clips(changed(other)).sample(0, draws())["references"][0].load()


def test_entries_that_cannot_be_used_are_left_out_and_told(changed, caplog):
    def spoil(key, entry):
        match key[:4]:
            case "0000":
                del entry["metadata"]["face_cap_qwen"]
            case "0001":
                entry["metadata"]["face_cut"] = [5, 5]

    made = clips(changed(spoil))
    assert len(made) == 2
    assert "no caption" in caplog.text and "face_cut is [5, 5]" in caplog.text
    assert len(made.describe()["left_out"]) == len(made.faults()) == 4


def test_a_number_without_an_end_leaves_out_its_entry_alone(changed, caplog):
    made = clips(changed(lambda key, e: e["metadata"].update(face_cut=[0, float("inf")]) if key[:4] == "0000" else 0))
    assert len(made) == 4 and "face_cut is [0, inf]" in caplog.text


def test_masks_that_are_none_are_faults_and_bad_samples(changed):
    def spoil(key, entry):
        entry["annotation"]["mask_annotation"]["0"]["2"]["counts"] = "04"

    made = clips(changed(spoil))
    assert "4 pixels" in made.faults()[0]
    with pytest.raises(BadVideoError, match="4 pixels"):
        made.sample(0, draws())


# ------------------------------------------------------------------ splits


def test_clips_of_one_video_are_held_out_together(root):
    parts = {split: clips(root, held_out=0.3, split=split) for split in ("train", "validation")}
    names = {split: {made._clip(i).name.split("_")[0] for i in range(len(made))} for split, made in parts.items()}
    assert not names["train"] & names["validation"]
    assert sum(map(len, names.values())) == 3 and len(parts["train"]) + len(parts["validation"]) == 6
    assert len(clips(root, held_out=0, split="validation")) == 0
    assert [len(clips(root, held_out="same", split=split)) for split in ("train", "validation")] == [6, 6]


def test_a_list_holds_out(root, tmp_path):
    listed = tmp_path / "held_out.txt"
    listed.write_text("mini/0001_part2_step1-0-21_step2-0-21\n")
    assert len(clips(root, held_out=str(listed))) == 4
    assert len(clips(root, held_out=str(listed), split="validation")) == 2
    listed.write_text("mini/unknown\n")
    with pytest.raises(UserError, match="mini/unknown"):
        clips(root, held_out=str(listed))


def test_validation_is_the_same_each_time(root):
    made = clips(root, held_out=0.3, split="validation", subject_selection="random", pairs=PAIRS)
    one, other = (made.sample(0, draws(position)) for position in (0, 9))
    assert torch.equal(one["frames"].load(), other["frames"].load())
    assert one["references"][0].identity == other["references"][0].identity
    assert one["fps"] == 8 / 3


# ------------------------------------------------------------------ pairs


def test_the_reference_is_from_the_other_clip_of_a_pair(root):
    made = clips(root, pairs=PAIRS)
    for index in range(len(made)):
        sample = made.sample(index, draws(index))
        own, shown = sample["name"], sample["references"][0].name
        assert own.split("_part")[0] == shown.split("_part")[0] and own not in shown and shown.endswith("mask 2")
    assert made.describe()["with a reference from another clip (6)"] == "6 clips; the others show themselves"


def test_a_partner_may_be_in_another_file_and_brings_its_own_subject(root, tmp_path):
    """Three clips of one cluster in two annotation files; the subject of one is mask 2, in the others 2 and 1."""
    (first, one), (_, two), (_, three), *_ = json.loads((root / ANNOTATIONS).read_text()).items()
    video = first.split("_part")[0]
    parts = {"a": {first: one}, "b": {f"{video}_part8": two, f"{video}_part9": three}}
    for part, entries in parts.items():
        (tmp_path / f"{part}.json").write_text(json.dumps(entries))
    pairs = [("b/{}_part8", "2"), ("b/{}_part9", "1"), ("c/{}_part1", "2")]  # the last one is not here
    listed = [
        {"cur_id": f"a/{first}", "cur_class_id": "2", "aft_id": name.format(video), "aft_class_id": mask}
        for name, mask in pairs
    ]
    folder = tmp_path / "pairs" / "final_output"
    folder.mkdir(parents=True)
    (folder / f"{video}.json").write_text(json.dumps(listed))

    def of(*parts):
        files = {"annotations": [f"{part}.json" for part in parts], "videos": [str(root / VIDEOS)] * len(parts)}
        everything = {"no_background": False, "subject_area": None}
        return clips(tmp_path, pairs="pairs", allow_outside_root=True, **files, **everything)

    both, alone = of("a", "b"), of("a")
    shown = [both.sample(0, draws(position))["references"][0].name for position in range(12)]
    assert set(shown) == {f"b/{video}_part8, mask 2", f"b/{video}_part9, mask 1"}
    assert both.sample(1, draws())["references"][0].name == f"a/{first}, mask 2"
    assert both.describe()["with a reference from another clip (3)"] == "3 clips; the others show themselves"
    assert alone.sample(0, draws())["references"][0].name == f"a/{first}, mask 2"
    assert alone.describe()["with a reference from another clip (1)"] == "0 clips; the others show themselves"


def test_without_a_pair_it_is_from_the_clip_itself(root, tmp_path):
    (tmp_path / "final_output").mkdir()
    made = clips(root, pairs=str(tmp_path))
    sample = made.sample(0, draws())
    assert sample["name"] in sample["references"][0].name
    assert made.describe()["with a reference from another clip (6)"] == "0 clips; the others show themselves"
    with pytest.raises(UserError, match="data.pairs"):
        clips(root, pairs=str(tmp_path / "none"))


def paired(folder, root, change):
    """A folder with the pairs of a root, of which a function has changed those of each cluster, by its number."""
    (folder / "final_output").mkdir(parents=True)
    for number, file in enumerate(sorted((root / PAIRS / "final_output").glob("*.json"))):
        listed = json.loads(file.read_text())
        change(number, listed)
        (folder / "final_output" / file.name).write_text(json.dumps(listed))
    return str(folder)


def test_pairs_that_name_another_mask_than_they_say_are_left_out_and_told(root, tmp_path):
    """Of three clusters the pair of one says that mask 2 is a dog; of another it names a mask that is not there."""
    wrong = ({"aft_class_name": "dog"}, {"cur_class_id": "7"}, {})
    folder = paired(tmp_path, root, lambda number, listed: listed[0].update(wrong[number]))
    made = clips(root, pairs=folder)
    samples = [made.sample(index, draws()) for index in range(6)]
    assert [s["name"] in s["references"][0].name for s in samples] == [True] * 4 + [False] * 2
    about = made.describe()
    assert about["with a reference from another clip (6)"].startswith("2 clips")
    told = ["mask 2 of mini/0000_part2_step1-0-21_step2-0-21 is 'thing', not 'dog'"]
    told += ["mini/0001_part1_step1-0-21_step2-0-21 has no mask 7"]
    assert about["masks that pairs are wrong about (6)"] == told
    (fault,) = made.faults()
    report = SubjectClips.prepare(root, pairs=folder)
    assert all(line in fault and line in report for line in told)
    assert "3 pairs, 1 of them usable" in report and "2 left out" in report
    assert clips(root, pairs=PAIRS).faults() == []


@pytest.mark.parametrize("unfit", ["gme_score", "background", "area"])
def test_filters_apply_to_the_picture_of_another_clip(root, changed, unfit):
    def spoil(key, entry):
        if "_part2" not in key:
            return
        if unfit == "gme_score":
            entry["annotation"]["ann_frame_data"]["annotations"][1]["gme_score"] = 0.1
        elif unfit == "background":
            entry["word_tags"]["background"] = ["thing"]
        else:
            small = np.zeros((64, 64), bool)
            small[:2, :2] = True
            entry["annotation"]["mask_annotation"]["0"]["2"]["counts"] = rle.encode(small)

    made = clips(changed(spoil), pairs=str(root / PAIRS))
    assert made.sample(0, draws())["references"][0].name == "mini/0000_part1_step1-0-21_step2-0-21, mask 2"
    assert made.describe()["with a reference from another clip (6)"].startswith("0 clips")


def test_no_picture_of_another_clip_is_shown_twice(root, changed, tmp_path):
    """Two subjects of each first clip have one partner, which a sample shows once, and one of them itself."""

    def halve(key, entry):
        mask = rle.decode(entry["annotation"]["mask_annotation"]["0"]["2"]["counts"], 64, 64)
        left = mask & (np.arange(64) < np.flatnonzero(mask.any(0)).mean())
        for number, half in (("2", left), ("3", mask & ~left)):
            entry["annotation"]["mask_annotation"]["0"][number] = {"size": [64, 64], "counts": rle.encode(half)}
        entry["annotation"]["mask_map"]["3"] = {"class_name": "thing"}
        entry["annotation"]["ann_frame_data"]["annotations"].append({"gme_score": 0.4, "aes_score": 4.0})

    folder = paired(tmp_path / "pairs", root, lambda _, listed: listed.append({**listed[0], "cur_class_id": "3"}))
    plain = {"subject_area": None, "max_subjects_per_sample": 2, "pairs": folder}
    for overlap in (0.8, None):
        made = clips(changed(halve), max_overlap=overlap, **plain)
        shown = made.sample(0, draws())["references"]
        assert {source.name.split("_step")[0][-5:] for source in shown} == {"part1", "part2"}
        assert {source.identity for source in shown} <= {source.identity for source in made.sources(0)["references"]}


# ------------------------------------------------------------------ what can be cached


@pytest.mark.parametrize(
    "arguments",
    [
        {"windows": 3},
        {"windows": 2, "subject_selection": "random", "no_background": False, "max_subjects_per_sample": 2}
        | {"max_overlap": None},
        {"windows": 1, "pairs": PAIRS},
        {"split": "validation", "held_out": 0.5},
    ],
    ids=["windows", "random", "pairs", "validation"],
)
def test_sources_are_all_that_samples_ask_for(root, arguments):
    made = clips(root, **arguments)
    listed = {field: {s.identity for s in sources} for field, sources in made.sources(0).items() if field != "prompt"}
    asked = {field: set() for field in listed}
    for position in range(24):
        sample = made.sample(0, draws(position))
        asked["frames"].add(sample["frames"].identity)
        for field in ("references", "clip_references"):
            asked[field] |= {source.identity for source in sample[field]}
    assert asked == listed
    assert None not in listed["frames"] and made.sources(0)["prompt"] == [sample["prompt"]]


def test_of_subjects_that_overlap_all_are_listed_that_a_draw_may_choose(changed):
    def double(key, entry):
        entry["annotation"]["mask_annotation"]["0"]["3"] = entry["annotation"]["mask_annotation"]["0"]["2"]
        entry["annotation"]["mask_map"]["3"] = {"class_name": "thing"}
        entry["annotation"]["ann_frame_data"]["annotations"].append({"gme_score": 0.4, "aes_score": 4.0})

    made = clips(changed(double), subject_selection="random", max_subjects_per_sample=2)
    asked = {s.identity for position in range(12) for s in made.sample(0, draws(position))["references"]}
    assert len(asked) == 3, "two masks of one thing, and white"
    assert asked == {source.identity for source in made.sources(0)["references"]}


def test_a_clip_that_is_shown_whole_can_be_cached_without_windows(root):
    made = clips(root, 21)
    identity = made.sample(0, draws())["frames"].identity
    assert identity == made.sources(0)["frames"][0].identity and json.loads(identity)["resampler"] == RESAMPLER
    assert "frames" not in clips(root, 20).sources(0)


def test_equal_sources_load_equal_pictures(root):
    made = clips(root, windows=2, max_subjects_per_sample=2)
    for sample in (made.sample(0, draws(k)) for k in range(3)):
        for field in ("references", "clip_references"):
            known = {source.identity: source.load() for source in made.sources(0)[field]}
            assert all(torch.equal(known[source.identity], source.load()) for source in sample[field])


@pytest.mark.parametrize("field", ["frames", "references"])
def test_a_video_that_changes_after_it_was_hashed_is_found(root, tmp_path, field):
    shutil.copytree(root, tmp_path / "root")
    sample = clips(tmp_path / "root", windows=1).sample(0, draws())
    source = sample[field] if field == "frames" else sample[field][0]
    videos = tmp_path / "root" / VIDEOS
    shutil.copyfile(videos / "0001_part1.mp4", videos / "0000_part1.mp4")
    with pytest.raises(ChangedError, match="0000_part1.mp4"):
        source.load()


def test_what_is_changed_at_random_cannot_be_cached(root):
    made = clips(root, augmentation=Augmentation())
    one, same, other = (made.sample(0, draws(k))["references"][0] for k in (0, 0, 1))
    assert one.identity is None and "references" not in made.sources(0) and "clip_references" not in made.sources(0)
    assert torch.equal(one.load(), same.load()) and not torch.equal(one.load(), other.load())
    held_out = clips(root, augmentation=Augmentation(), split="validation", held_out=0.3).sample(0, draws())
    assert held_out["references"][0].identity is not None


# ------------------------------------------------------------------ arguments and layouts


def test_frames_a_second_in_place_of_a_stride(root):
    every, second = clips(root, sample_stride=2), clips(root, target_fps=4)  # of 8
    assert torch.equal(every.sample(0, draws())["frames"].load(), second.sample(0, draws())["frames"].load())


def test_files_of_other_places(root):
    assert len(clips(root, annotations=[ANNOTATIONS], videos=[VIDEOS])) == 6
    with pytest.raises(UserError, match="has 1 files and data.videos 2 folders"):
        clips(root, annotations=[ANNOTATIONS], videos=[VIDEOS, VIDEOS])
    with pytest.raises(UserError, match="give both, or neither"):
        clips(root, annotations=[ANNOTATIONS])
    with pytest.raises(UserError, match="name of two files"):
        clips(root, annotations=[ANNOTATIONS] * 2, videos=[VIDEOS] * 2)
    with pytest.raises(UserError, match="all of 6 videos"):
        clips(root, annotations=[ANNOTATIONS], videos=["demo_result"])


def test_the_layout_of_the_whole_data_set(root, tmp_path):
    for source, there in ((ANNOTATIONS, "Jsons/mask_and_bbox/total_part1.json"), (VIDEOS, "Videos/total_part1")):
        (tmp_path / there).parent.mkdir(parents=True)
        (tmp_path / there).symlink_to(root / source)
    assert clips(tmp_path).sample(0, draws())["name"].startswith("total_part1/0000")
    with pytest.raises(UserError, match="no annotated clips"):
        clips(tmp_path / "Videos")


def test_all_wrong_arguments_are_told_together(root):
    with pytest.raises(UserError) as told:
        clips(root, sample_stride=0, subject_selection="best", held_out=1.5, windows=0, subject_area=[0.5, 0.1])
    for name in ("sample_stride", "subject_selection", "held_out", "windows", "subject_area"):
        assert name in str(told.value)


def test_a_sample_of_files(tmp_path):
    Image.new("RGB", (8, 4), (9, 9, 9)).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(tmp_path / "b.png")
    sample = SubjectClips.from_files(16, 16, "a dog", f"{tmp_path / 'a.png'}, {tmp_path / 'b.png'}")
    assert sample["references"].shape == (2, 3, 16, 16) and sample["clip_references"].shape == (2, 3, 512, 512)
    assert (
        sample["references"][0, :, 8, 8].tolist() == [9] * 3 and sample["references"][0, :, 0, 0].tolist() == [255] * 3
    )
    assert sample["references"][1].min() == 255  # all of it is transparent
    assert sample["reference_mask"].tolist() == [True, True] and sample["prompt"] == "a dog"
    assert SubjectClips.from_files(16, 16, "a dog")["reference_mask"].tolist() == [False]
    with pytest.raises(BadVideoError, match="no such picture"):
        SubjectClips.from_files(16, 16, "a dog", str(tmp_path / "c.png"))


def test_the_report(root, changed):
    report = SubjectClips.prepare(root)
    assert "6 entries, 6 of them usable: 126 frames" in report and "12 masks" in report
    other = changed(lambda key, entry: entry["metadata"].update(path="none.mp4") if key[:4] == "0002" else None)
    assert "2 videos are missing" in SubjectClips.prepare(other)


def test_batches(root):
    batch = Stream(clips(root, max_subjects_per_sample=2), 0).batch([0, 1, 2], torch.device("cpu"))
    assert batch["frames"].shape == (3, 9, 3, 64, 64)
    assert batch["references"].shape == (3, 2, 3, 64, 64) and batch["clip_references"].shape == (3, 2, 3, 512, 512)
    assert batch["reference_mask"].tolist() == [[True, False]] * 3
