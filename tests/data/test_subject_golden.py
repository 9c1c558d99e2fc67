"""OpenS2V's clips against the numbers of the published loader."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vireo.data.clip_sampling import spread_clip
from vireo.data.references import Cutout, letterbox, tight_box
from vireo.data.source import Source
from vireo.data.subject_choice import choose
from vireo.data.subject_clips import SubjectClips
from vireo.data.subject_parts import named
from vireo.data.subject_references import Picture, Reference, Shown
from vireo.data.transforms import covering_size
from vireo.pixels import to_pixels
from vireo.randomness import Draws

GOLDEN = Path(__file__).parents[1] / "golden" / "opens2v"
(ITEM,) = json.loads((GOLDEN / "dataset.json").read_text())["items"]
SIZE = json.loads((GOLDEN / "dataset.json").read_text())["target_hw"]
FIT = json.loads((GOLDEN / "reference_fit.json").read_text())

sample_data = pytest.mark.skipif("VIREO_SAMPLE_DATA" not in os.environ, reason="VIREO_SAMPLE_DATA is not set")


@pytest.fixture(scope="module")
def clips():
    root = Path(os.environ["VIREO_SAMPLE_DATA"]) / "opens2v_sample"
    return SubjectClips(root, 21, *SIZE, held_out=0)


@pytest.fixture(scope="module")
def clip(clips):
    return named(clips.parts, f"dataset1/{ITEM['key']}")


@pytest.mark.parametrize("name", FIT["outputs"])
def test_the_letterbox(name):
    number, size = name.removeprefix("img").split("_")
    h, w = FIT["sizes_hw"][int(number)]
    y, x = np.mgrid[:h, :w]
    picture = np.stack([x * 255 // (w - 1), y * 255 // (h - 1), 255 * ((x // 4 + y // 4) % 2)], -1).astype(np.uint8)
    found = letterbox(Cutout(picture, np.ones((h, w), bool)), *map(int, size.split("x")))
    torch.testing.assert_close(found.permute(1, 2, 0), load_file(GOLDEN / "reference_fit.safetensors")[name])


@pytest.mark.parametrize("case", ITEM["sampling"], ids=lambda case: f"{case['num_frames']}x{case['stride']}")
def test_which_frames(case):
    start, length = case["start"] or 0, ITEM["video_frames"]
    places = max(1, length - min(length, (case["num_frames"] - 1) * case["stride"] + 1) + 1)
    found = spread_clip(0, length, case["num_frames"], case["stride"], (start + 0.5) / places)
    assert found == case["indices"]


def test_frames_of_a_later_range():
    """81 of the 113 frames from the 7th on: places are rounded down in the video, not in the range."""
    published = np.linspace(7, 7 + 113 - 1, 81).astype(int).tolist()
    assert spread_clip(7, 120, 81, 3, 0.5) == published
    assert published != [7 + k for k in spread_clip(0, 113, 81, 3, 0.5)]
    assert spread_clip(7, 10, 5, 3, 0.5) == [7, 7, 8, 8, 9]


@sample_data
def test_masks_and_scores(clip):
    assert len(clip.about.caption) == ITEM["caption_len"]
    assert [clip.about.start, clip.about.stop] == ITEM["face_cut"]
    assert list(clip.about.crop) == ITEM["crop_sx_ex_sy_ey"]
    for subject, wanted in zip(clip.about.subjects, ITEM["subjects"], strict=True):
        mask = subject.mask()
        x0, y0, x1, y1 = tight_box(mask)
        assert (subject.id, subject.class_name) == (wanted["id"], wanted["class_name"])
        assert [*mask.shape, mask.sum()] == [*wanted["size_hw"], wanted["mask_area"]]
        assert [x0, y0, x1 - 1, y1 - 1] == wanted["tight_xyxy_inclusive"]
        assert (subject.text_score, subject.aesthetic_score) == (wanted["gme_score"], wanted["aes_score"])


@sample_data
def test_what_is_cut_out(clip):
    picture = Picture(clip)
    for subject, wanted in zip(clip.about.subjects, ITEM["subjects"], strict=True):
        cutout = Reference(Shown(picture, subject, subject.mask()), "white").cutout
        assert list(cutout.shown.shape[::-1]) == wanted["crop_size_wh"]
        white = np.where(cutout.shown[..., None], cutout.picture, 255)
        assert white.mean((0, 1)) == pytest.approx(wanted["crop_mean_rgb"], abs=1)
        assert cutout.picture[cutout.shown].mean(0) == pytest.approx(wanted["masked_mean_rgb"], abs=1)


@sample_data
def test_which_subjects(clip):
    def ids(selection, limit):
        return [one.subject.id for one in choose(clip.about, selection, limit)]

    assert ids("first", 1) == ITEM["selection"]["first"]
    assert ids("best_score", 1) == ITEM["selection"]["best_score"]
    assert ids("best_score", 3) == ITEM["selection"]["best_score_top3"]


@sample_data
def test_the_recommended_filters_leave_three(clips):
    index = next(i for i in range(len(clips)) if clips._clip(i).name.startswith("dataset1/"))
    chosen = clips._choose(clips._clip(index), 10, Draws(0, [0]), {})
    assert [one.subject.id for one in chosen] == ["15", "6", "7"]  # in its own words: woman, person, blue top


@sample_data
def test_pixels(clip, clips):
    for case in [case for case in ITEM["sampling"] if case["num_frames"] <= 21]:
        clips.num_frames, clips.sample_stride = case["num_frames"], case["stride"]
        places = ITEM["video_frames"] - (case["num_frames"] - 1) * case["stride"]
        frames = clips._load(clip, (case["start"] + 0.5) / places)
        assert covering_size((720, 1280), SIZE) == tuple(case["resized_hw"])
        assert list(frames.shape) == case["out_shape"]
        pixels = to_pixels(frames)
        torch.testing.assert_close(pixels.mean((1, 2, 3)), torch.tensor(case["mean_per_frame"]), atol=0.01, rtol=0)
        grid = torch.nn.functional.adaptive_avg_pool2d(pixels[:1].mean(1), 4)[0]
        torch.testing.assert_close(grid, torch.tensor(case["grid4x4_frame0"]), atol=0.01, rtol=0)


@sample_data
def test_the_sample_is_one_clip_annotated_three_times(clips):
    sample = clips.sample(0, Draws(0, [0]))
    assert len(clips) == 3
    assert isinstance(sample["frames"], Source) and sample["frames"].identity is None
    assert sample["references"][0].load().shape == (3, *SIZE)
    assert sample["clip_references"][0].load().shape == (3, 512, 512)
    assert sample["reference_mask"].tolist() == [True]
    assert clips.faults() == []
