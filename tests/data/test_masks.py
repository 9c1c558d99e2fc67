"""Drawn holes have the statistics of the published generator; read ones are what the files show."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vireo.data.masks import MovingShapes, dilate, read_hole
from vireo.errors import UserError
from vireo.randomness import Draws
from vireo.video_io import BadVideoError, write_video

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "diffueraser" / "masks.json").read_text())
WINDOWS = GOLDEN["acceptance_at_64x64_10_frames_500_draws"]
PALETTE = [0, 0, 0, 40, 0, 0, 0, 30, 0] + [0] * 759  # dark colours, as DAVIS's are


def corner(hole):
    """Top, left, height and width of the hole's bounding box."""
    rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
    return rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1


def statistics(height, width, frames=10):
    make, found = MovingShapes(), {"area": [], "height": [], "width": [], "filled": [], "same": [], "steps": []}
    for position in range(500):
        hole = make(frames, height, width, Draws(0, [position])).numpy()
        assert hole.dtype == np.uint8 and set(np.unique(hole)) == {0, 1}
        boxes = [corner(frame) for frame in hole]
        _, _, tall, wide = boxes[0]
        found["area"].append(hole.mean())
        found["height"].append(tall / height)
        found["width"].append(wide / width)
        found["filled"].append(hole[0].sum() / tall / wide)
        found["same"].append((hole == hole[0]).all())
        if not found["same"][-1]:
            found["steps"] += [np.hypot(b[0] - a[0], b[1] - a[1]) for a, b in zip(boxes, boxes[1:], strict=False)]
    return found


def test_holes_lie_in_the_published_windows():
    found = statistics(64, 64)
    means = {
        "mean_area": np.mean(found["area"]),
        "area_p95": np.quantile(found["area"], 0.95),
        "mean_bbox_height": np.mean(found["height"]),
        "mean_bbox_width": np.mean(found["width"]),
        "mean_area_over_bbox": np.mean(found["filled"]),
        "identical_frames": np.mean(found["same"]),
        "mean_step": np.mean(found["steps"]),
    }
    for name, value in means.items():
        low, high = WINDOWS[name]
        assert low <= value <= high, f"{name} is {value}"
    assert max(found["area"]) < WINDOWS["area_max_below"]


def test_holes_of_other_sizes_have_the_published_means():
    run = next(run for run in GOLDEN["runs"] if run["width"] != run["height"])
    found = statistics(run["height"], run["width"], frames=1)
    pairs = {"area": "area_fraction", "height": "bbox_height_fraction", "width": "bbox_width_fraction"}
    for ours, theirs in {**pairs, "filled": "area_over_bbox"}.items():
        assert np.mean(found[ours]) == pytest.approx(run[theirs]["mean"], rel=0.06)  # three standard errors of both


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(8, 90), st.integers(8, 90)),
    frames=st.integers(1, 6),
    scale=st.floats(0.3, 3),
    position=st.integers(0, 10**6),
)
def test_a_shape_is_whole_in_each_frame_and_depends_on_its_draws_alone(size, frames, scale, position):
    hole = MovingShapes(scale=scale)(frames, *size, Draws(3, [position])).numpy()
    assert hole.shape == (frames, *size) and hole[0].any()
    shapes = [
        frame[top : top + tall, left : left + wide] for frame in hole for top, left, tall, wide in [corner(frame)]
    ]
    assert all(np.array_equal(shape, shapes[0]) for shape in shapes), "it never deforms or leaves the picture"
    again = MovingShapes(scale=scale)(frames, *size, Draws(3, [position], step=7)).numpy()
    assert np.array_equal(hole, again)
    moving = MovingShapes(p_static=1.0, scale=scale)(frames, *size, Draws(3, [position])).numpy()
    assert np.array_equal(moving, np.broadcast_to(hole[0], hole.shape)), "the same shape and place, standing still"


def test_knobs_change_what_they_say():
    def mean(make, measure):
        return np.mean([measure(make(8, 64, 64, Draws(1, [position])).numpy()) for position in range(60)])

    area, distance = (lambda h: h.mean()), (lambda h: abs(np.subtract(corner(h[1])[:2], corner(h[0])[:2])).sum())
    assert mean(MovingShapes(scale=2**0.5), area) == pytest.approx(2 * mean(MovingShapes(), area), rel=0.15)
    assert mean(MovingShapes(p_static=0, max_speed=8), distance) > 1.5 * mean(MovingShapes(p_static=0), distance)
    assert mean(MovingShapes(roughness=[0.1], edges=[8]), area) > 1.5 * mean(MovingShapes(), area), "rounder"


@pytest.mark.parametrize(
    "wrong", [{"p_static": 2}, {"edges": []}, {"edges": [1]}, {"roughness": [0]}, {"max_speed": -1}, {"scale": 0}]
)
def test_what_makes_no_shape_is_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        MovingShapes(**wrong)


def test_dilation_is_a_cross():
    hole = (torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0)) < 0.02).to(torch.uint8)
    frame, row, column = np.nonzero(hole.numpy())
    near = np.zeros(hole.shape, bool)
    rows, columns = np.arange(20)[:, None], np.arange(30)
    for k, y, x in zip(frame, row, column, strict=True):
        near[k] |= abs(rows - y) + abs(columns - x) <= 4
    assert np.array_equal(dilate(hole, 4).numpy(), near)
    assert torch.equal(dilate(hole, 0), hole)


def test_dark_palette_colours_are_hole(tmp_path):
    index = np.zeros((6, 8), np.uint8)
    index[1, 2], index[3, 4] = 1, 2
    picture = Image.fromarray(index, "P")
    picture.putpalette(PALETTE)
    picture.save(tmp_path / "00000.png")
    Image.fromarray((index > 0).astype(np.uint8) * 255).save(tmp_path / "00001.png")
    hole = read_hole(tmp_path, [1, 0], 2)
    assert hole.dtype == torch.uint8 and np.array_equal(hole.numpy(), np.stack([index > 0] * 2))
    assert torch.equal(read_hole(tmp_path / "00000.png", range(3), 3), hole[:1].expand(3, -1, -1))
    for frames in (1, 3):
        with pytest.raises(BadVideoError, match=f"2 masks for {frames} frames"):
            read_hole(tmp_path, [0], frames)
    Image.new("L", (9, 6)).save(tmp_path / "00001.png")
    with pytest.raises(BadVideoError, match="different sizes: 8x6, 9x6"):
        read_hole(tmp_path, [0, 1], 2)


def test_what_is_transparent_is_no_hole(tmp_path):
    wanted = np.zeros((6, 8), np.uint8)
    wanted[1:3, 2:5] = 1
    white = np.full((6, 8, 4), 255, np.uint8)
    white[..., 3] = 255 * wanted
    Image.fromarray(white).save(tmp_path / "0.png")
    Image.fromarray(white[..., 2:]).save(tmp_path / "1.png")  # grey and alpha
    palette = Image.fromarray(1 - wanted, "P")
    palette.putpalette([255] * 6)
    palette.save(tmp_path / "2.png", transparency=1)
    opaque = np.dstack([np.repeat(255 * wanted[..., None], 3, 2), np.full((6, 8), 255, np.uint8)])
    Image.fromarray(opaque).save(tmp_path / "3.png")
    assert np.array_equal(read_hole(tmp_path, range(4), 4).numpy(), np.stack([wanted] * 4))
    assert np.array_equal(read_hole(tmp_path / "1.png", [0], 4)[0].numpy(), wanted)


def test_traces_of_compression_are_no_hole(tmp_path):
    wanted = np.zeros((70, 90), np.uint8)
    wanted[17:35, 22:45] = 1
    Image.fromarray(255 * wanted).save(tmp_path / "mask.jpg", quality=60)
    assert (np.array(Image.open(tmp_path / "mask.jpg")) > 0).mean() > 1.2 * wanted.mean(), "there are such traces"
    for path in (tmp_path / "mask.jpg", tmp_path):
        assert abs(float(read_hole(path, [0], 1).float().mean()) - wanted.mean()) < 0.001


def test_mask_videos_are_split_at_half(tmp_path):
    frames = torch.full((4, 3, 16, 16), 20, dtype=torch.uint8)
    frames[:, :, 4:12, :8] = 230
    write_video(tmp_path / "mask.mp4", frames, 8)
    assert torch.equal(read_hole(tmp_path / "mask.mp4", [0, 3], 4), (frames[[0, 3], 0] > 127).to(torch.uint8))
    write_video(tmp_path / "single.mp4", frames[:1], 8)
    one = (frames[:1, 0] > 127).to(torch.uint8)
    assert torch.equal(read_hole(tmp_path / "single.mp4", range(3), 3), one.expand(3, -1, -1))
