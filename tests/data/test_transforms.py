import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vireo.data.transforms import (
    LUMA,
    Box,
    ColorJitter,
    box_size,
    centre_box,
    crop_and_resize,
    filled_box,
    jitter_colors,
    padded_size,
    random_box,
    random_jitter,
    resize,
)
from vireo.randomness import Draws

sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))
scales = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda pair: (min(pair), max(pair)))


def coordinates(height, width, num_frames=1):
    """Frames whose red is the row and whose green is the column."""
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.uint8).expand(height, width)
    return torch.stack([rows, columns, torch.zeros_like(rows)]).expand(num_frames, 3, height, width)


def noise(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@given(sizes, sizes, scales, st.integers(0, 2**40))
def test_boxes_lie_inside_the_frame_wherever_it_is_large_enough(frame, target, scale, position):
    for box in (random_box(frame, target, scale, Draws(0, [position])), centre_box(frame, target)):
        for start, length, side, wanted in (
            (box.top, box.height, frame[0], target[0]),
            (box.left, box.width, frame[1], target[1]),
        ):
            assert length >= wanted, "a crop is never enlarged"
            if side >= length:
                assert 0 <= start <= side - length
            else:
                assert length == wanted and start == (side - length) // 2, "a small frame lies in the middle"
            if frame[0] >= target[0] and frame[1] >= target[1]:
                assert length <= side


@given(st.integers(20, 90), st.integers(20, 90), st.integers(4, 20), st.integers(4, 20))
def test_the_largest_box_has_the_aspect_of_the_target(height, width, target_height, target_width):
    box = centre_box((height, width), (target_height, target_width))
    assert box.height == height or box.width == width
    assert abs(box.width * target_height - box.height * target_width) <= (target_height + target_width) / 2


def test_scale_one_is_the_largest_box_and_scale_zero_the_target():
    assert box_size((480, 720), (128, 128), 1.0) == (480, 480)
    assert box_size((480, 720), (128, 128), 0.8) == (384, 384)
    assert box_size((480, 720), (128, 128), 0.0) == (128, 128)
    assert box_size((480, 720), (480, 720), 0.5) == (480, 720)


def test_random_boxes_reach_every_place():
    boxes = [random_box((8, 12), (4, 4), (0.4, 1.0), Draws(0, [position])) for position in range(2000)]
    assert {box.height for box in boxes} == {4, 5, 6, 7, 8}
    assert {(box.top, box.left) for box in boxes if box.height == 4} == {(y, x) for y in range(5) for x in range(9)}


@settings(deadline=None)
@given(sizes, sizes, st.integers(0, 2**40))
def test_all_frames_of_a_clip_are_treated_alike(frame, target, position):
    draws = Draws(0, [position])
    clip = noise(1, 3, *frame).expand(4, 3, *frame)
    out = crop_and_resize(clip, random_box(frame, target, (0.5, 1.0), draws), *target)
    out = random_jitter(out, ColorJitter(), draws)
    assert out.shape == (4, 3, *target) and out.dtype == torch.uint8
    assert all(torch.equal(out[0], other) for other in out[1:])


@settings(deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(-100, 60),
    st.integers(-100, 60),
    st.integers(1, 99),
    st.integers(1, 99),
)
def test_outside_the_frame_its_border_is_a_mirror(height, width, top, left, box_height, box_width):
    """As numpy's padding, which repeats the reflection as often as it takes."""
    frames = coordinates(height, width)
    box = Box(top, left, box_height, box_width)
    crop = crop_and_resize(frames, box, box_height, box_width)
    bottom, right = top + box_height - height, left + box_width - width
    outside = ((max(-top, 0), max(bottom, 0)), (max(-left, 0), max(right, 0)))
    padded = np.pad(frames[0].numpy(), ((0, 0), *outside), mode="reflect")
    y, x = max(top, 0), max(left, 0)
    assert np.array_equal(crop[0].numpy(), padded[:, y : y + box_height, x : x + box_width])


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_resampler_is_antialiased_and_agrees_with_pillow(channels_last):
    frames = noise(3, 3, 90, 120)
    if channels_last:
        frames = frames.contiguous(memory_format=torch.channels_last)
    out = crop_and_resize(frames, Box(5, 10, 80, 100), 24, 30)
    for before, after in zip(frames, out, strict=True):
        picture = Image.fromarray(before.permute(1, 2, 0).contiguous().numpy()).crop((10, 5, 110, 85))
        expected = np.asarray(picture.resize((30, 24), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(after.permute(1, 2, 0).numpy() - expected).max() <= 1


def test_a_crop_of_the_targets_size_is_not_resampled():
    frames = noise(2, 3, 20, 30)
    assert torch.equal(crop_and_resize(frames, Box(3, 7, 8, 9), 8, 9), frames[:, :, 3:11, 7:16])


def test_unchanged_colors_are_unchanged():
    frames = noise(2, 3, 9, 11)
    assert torch.equal(jitter_colors(frames, 1, 1, 1, 0), frames)


def luma(frames):
    return (frames.double() * torch.tensor(LUMA, dtype=torch.float64)[:, None, None]).sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ((0.9, 1, 1, 0), lambda x: 0.9 * x),
        ((1.1, 1, 1, 0), lambda x: 1.1 * x),
        ((1, 1.2, 1, 0), lambda x: luma(x).mean() + 1.2 * (x - luma(x).mean())),
        ((1, 1, 0, 0), lambda x: luma(x).expand_as(x)),
        ((1, 1, 1.3, 0), lambda x: luma(x) + 1.3 * (x - luma(x))),
        ((1, 1, 1, 1 / 3), lambda x: x.roll(1, dims=1)),  # red to green, green to blue
        ((1, 1, 1, 2 / 3), lambda x: x.roll(2, dims=1)),
    ],
)
def test_each_change_of_colors(parameters, expected):
    frames = noise(2, 3, 9, 11)
    wanted = expected(frames.double()).clamp(0, 255)
    assert (jitter_colors(frames, *parameters).double() - wanted).abs().max() <= 0.5 + 1e-3


def test_grey_keeps_its_hue_and_saturation():
    grey = noise(2, 1, 9, 11).expand(2, 3, 9, 11)
    assert torch.equal(jitter_colors(grey, 1, 1, 1.4, 0.2), grey)


def test_jitter_keeps_within_its_strength():
    flat = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)  # contrast, saturation and hue do not change plain grey
    levels = {int(random_jitter(flat, ColorJitter(), Draws(0, [p]))[0, 0, 0, 0]) for p in range(500)}
    assert levels == set(range(90, 111))
    assert torch.equal(random_jitter(noise(2, 3, 5, 5), ColorJitter(0, 0, 0, 0), Draws(0, [0])), noise(2, 3, 5, 5))


@settings(max_examples=60, deadline=None)
@given(*[st.integers(8, 80)] * 4, st.sampled_from(["crop", "pad", "stretch"]))
def test_whole_frames_come_to_any_size(height, width, target_height, target_width, how):
    frames = torch.randint(1, 255, (2, 3, height, width), dtype=torch.uint8)
    found = resize(frames, target_height, target_width, how)
    assert found.shape == (2, 3, target_height, target_width) and found.dtype == torch.uint8
    assert torch.equal(found[1:], resize(frames[1:], target_height, target_width, how)), "a frame alone is no other"
    inside = padded_size((height, width), (target_height, target_width))
    black = (found == 0).all(dim=(0, 1))
    bars = target_height * target_width - inside[0] * inside[1]
    assert int(black.sum()) == (bars if how == "pad" else 0)
    box = filled_box((height, width), (target_height, target_width))
    assert box.top >= 0 and box.left >= 0 and box.top + box.height <= height and box.left + box.width <= width
    assert box.height == height or box.width == width, "as much as fits"


def test_resizing_nothing_changes_nothing():
    frames = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    for how in ("crop", "pad", "stretch"):
        assert torch.equal(resize(frames, 20, 30, how), frames)


def test_a_crop_is_the_middle_and_a_bar_on_each_side():
    frames = torch.arange(60, dtype=torch.uint8).expand(1, 3, 20, 60) + 1
    assert resize(frames, 20, 20, "crop")[0, 0, 0].tolist() == list(range(21, 41))
    padded = resize(frames, 60, 60, "pad")
    assert torch.equal(padded[:, :, 20:40], frames) and not padded[:, :, :20].any() and not padded[:, :, 40:].any()
