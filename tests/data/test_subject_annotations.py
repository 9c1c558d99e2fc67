import numpy as np
import pytest

from vireo.data.rle import encode
from vireo.data.subject_annotations import cluster, parse
from vireo.data.subject_choice import Filters, choose


def entry(**metadata):
    masks = {"1": np.zeros((8, 10), bool), "2": np.zeros((8, 10), bool), "3": np.zeros((8, 10), bool)}
    masks["1"][:] = True
    masks["2"][2:6, 2:6] = True
    masks["3"][2:6, 2:7] = True
    return {
        "metadata": {
            "path": "a/b.mp4",
            "face_cut": [5, 20],
            "crop": [10, 20, 4, 12],
            "fps": 25,
            "face_cap_qwen": "A dog.",
        }
        | metadata,
        "word_tags": {"background": ["park"], "subject": ["dog"], "object": ["ball"], "pre_define": ["person"]},
        "annotation": {
            "ann_frame_data": {
                "ann_frame_idx": 5,
                "annotations": [
                    {"class_name": "park", "bbox": [0, 0, 10, 8], "gme_score": 0.5, "aes_score": 5.0},
                    {"class_name": "ball", "bbox": [2, 2, 6, 6], "gme_score": 0.2, "aes_score": 4.5},
                    {"class_name": "dog", "bbox": [2, 2, 7, 6], "gme_score": 0.4, "aes_score": 4.0},
                ],
            },
            "mask_map": {"1": {"class_name": "park"}, "2": {"class_name": "ball"}, "3": {"class_name": "dog"}},
            "mask_annotation": {"5": {n: {"size": [8, 10], "counts": encode(m)} for n, m in masks.items()}},
            "face_bbox": {"5": {"face": [{"box": {"x1": 12, "y1": 6, "x2": 16, "y2": 10}}]}},
        },
    }


def ids(annotation, selection="first", limit=None, **arguments):
    return [one.subject.id for one in choose(annotation, selection, limit, **arguments)]


def test_an_entry():
    found = parse("v_part1_x", entry())
    assert (found.video, found.start, found.stop, found.crop, found.frame) == ("a/b.mp4", 5, 20, (10, 20, 4, 12), 5)
    assert (found.caption, found.fps) == ("A dog.", 25.0)
    assert [(s.class_name, s.text_score, s.aesthetic_score) for s in found.subjects][1] == ("ball", 0.2, 4.5)
    assert found.faces == ((2, 2, 6, 6),)  # less the crop's corner
    assert found.subject == {"dog", "person"} and found.background == {"park"}


def test_scores_belong_to_the_number_of_a_mask_not_to_its_place():
    changed = entry()
    del changed["annotation"]["mask_annotation"]["5"]["1"]
    assert [(s.id, s.class_name, s.text_score) for s in parse("k", changed).subjects][0] == ("2", "ball", 0.2)


def test_an_older_caption_does():
    assert parse("k", entry(face_cap_qwen=None, cap=["Old."])).caption == "Old."


@pytest.mark.parametrize(
    ("key", "name"),
    [("gm1-2_part2_step1-0-95", "gm1-2"), ("a_segment3_part1_step1", "a"), ("a_part1_segment2", "a_part1"), ("x", "x")],
)
def test_the_source_video(key, name):
    assert cluster(key) == name


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"path": ""}, "no path"),
        ({"face_cut": [9, 9]}, r"face_cut is \[9, 9\]"),
        ({"face_cut": ["a", "b"]}, "face_cut is"),
        ({"face_cut": [0, float("inf")]}, r"face_cut is \[0, inf\]"),
        ({"crop": [0, float("nan"), 0, 9]}, r"crop is \[0, nan, 0, 9\]"),
        ({"face_cut": [0, 10**400]}, "not built as"),
        ({"fps": float("inf")}, "fps is inf"),
        ({"crop": [0, 5, 9, 3]}, r"crop is \[0, 5, 9, 3\], expected x0, x1, y0, y1"),
        ({"crop": 5}, "not built as"),
        ({"face_cap_qwen": "", "cap": []}, "no caption"),
    ],
)
def test_what_makes_no_sense_is_told(metadata, says):
    with pytest.raises(ValueError, match=says):
        parse("k", entry(**metadata))


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("ann_frame_data", "ann_frame_idx"), -5, "ann_frame_idx is -5"),
        (("ann_frame_data", "ann_frame_idx"), float("inf"), "not built as"),
        (("mask_annotation", "5", "1", "size"), [float("inf"), 10], "not built as"),
        (("face_bbox", "5", "face", 0, "box", "x1"), float("inf"), "face_bbox"),
    ],
    ids=lambda x: ".".join(map(str, x)) if isinstance(x, tuple) else None,
)
def test_numbers_of_an_annotation_that_make_no_sense_are_told(place, value, says):
    changed = entry()
    holder = changed["annotation"]
    for name in place[:-1]:
        holder = holder[name]
    holder[place[-1]] = value
    with pytest.raises(ValueError, match=says):
        parse("k", changed)


@pytest.mark.parametrize("value", [None, [], {"metadata": {}}, {"metadata": {"path": "a"}}])
def test_what_is_no_entry_is_told(value):
    with pytest.raises(ValueError):
        parse("k", value)


def test_without_masks_there_are_no_subjects():
    plain = entry()
    plain["annotation"] = {"ann_frame_data": None, "mask_annotation": None, "mask_map": None}
    assert parse("k", plain).subjects == ()
    assert parse("k", plain).frame == 5


def test_the_order_of_subjects():
    annotation = parse("k", entry())
    assert ids(annotation) == ["1", "2", "3"] and ids(annotation, limit=1) == ["1"]
    assert ids(annotation, "best_score") == ["1", "2", "3"]
    assert ids(annotation, prefer_tagged=True) == ["3", "1", "2"]
    assert ids(annotation, among=["2", "3"]) == ["2", "3"]


def test_each_filter():
    annotation = parse("k", entry())
    assert ids(annotation, filters=Filters(no_background=True)) == ["2", "3"]
    assert ids(annotation, filters=Filters(area=(0.1, 0.2))) == ["2"]  # 16 of 80 pixels, 20, and all
    assert ids(annotation, filters=Filters(text_score=0.4)) == ["1", "3"]
    assert ids(annotation, filters=Filters(overlap=0.7)) == ["1", "2"]  # 16 of 20 pixels
    assert ids(annotation, filters=Filters(overlap=0.85)) == ["1", "2", "3"]
    assert ids(annotation, filters=Filters(with_face=True)) == ["1", "2", "3"]
    away = annotation._replace(faces=((9.0, 0.0, 10.0, 1.0),))
    assert ids(away, filters=Filters(with_face=True)) == ["1"]


def test_an_empty_mask_is_passed_over():
    changed = entry()
    changed["annotation"]["mask_annotation"]["5"]["1"]["counts"] = encode(np.zeros((8, 10), bool))
    assert ids(parse("k", changed), limit=1) == ["2"]
