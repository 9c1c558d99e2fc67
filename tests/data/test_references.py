import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from vireo.data.references import Augmentation, Cutout, cut_out, letterbox, tight_box
from vireo.randomness import Draws


def cutout(height=40, width=30):
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = np.arange(width) * 8
    shown = np.zeros((height, width), bool)
    shown[5:-5, 4:-4] = True
    return Cutout(picture, shown)


def drawn(position=0):
    return Draws(0, [position])


def test_a_box_holds_the_mask_and_no_more():
    mask = np.zeros((9, 7), bool)
    assert tight_box(mask) is None
    mask[2, 3] = mask[6, 5] = True
    assert tight_box(mask) == (3, 2, 6, 7)


def test_what_is_cut_out():
    picture = np.random.default_rng(0).integers(0, 255, (9, 7, 3)).astype(np.uint8)
    mask = np.zeros((9, 7), bool)
    mask[2, 3] = mask[6, 5] = True
    white, kept = cut_out(picture, mask), cut_out(picture, mask, "keep")
    assert (white.picture == picture[2:7, 3:6]).all() and white.shown.sum() == 2
    assert kept.shown.all()
    assert (letterbox(white, 5, 3).permute(1, 2, 0).numpy()[~white.shown] == 255).all()
    assert (letterbox(kept, 5, 3).permute(1, 2, 0).numpy() == picture[2:7, 3:6]).all()


@given(st.integers(1, 50), st.integers(1, 50), st.integers(8, 40), st.integers(8, 40))
def test_a_letterbox_shows_everything_undistorted_on_white(height, width, tall, wide):
    black = Cutout(np.zeros((height, width, 3), np.uint8), np.ones((height, width), bool))
    found = letterbox(black, tall, wide)
    assert found.shape == (3, tall, wide) and found.dtype == torch.uint8
    share = float((255 - found.float()).mean() / 255)
    expected = min(height / width, tall / wide) / max(height / width, tall / wide)
    assert abs(share - expected) <= 2 / min(height, width) + 2 / min(tall, wide)


def test_without_strength_nothing_changes():
    still = Augmentation(flip=0, crop=1, rotation=0, scale=1, colour=0)(cutout(), drawn(), 0)
    assert (still.picture == cutout().picture).all() and (still.shown == cutout().shown).all()


def test_changes_are_drawn_for_each_sample_and_each_reference():
    change = Augmentation()
    one, same, other, second = (
        letterbox(change(cutout(), drawn(position), number), 32, 32)
        for position, number in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one, second)


def test_each_change_does_what_it_says():
    only = {"flip": 0, "crop": 1, "rotation": 0, "scale": 1, "colour": 0}
    flipped = Augmentation(**{**only, "flip": 1})(cutout(), drawn(), 0)
    assert (flipped.picture == cutout().picture[:, ::-1]).all()
    cropped = Augmentation(**{**only, "crop": 0.5})(cutout(), drawn(), 0)
    assert all(a < b for a, b in zip(cropped.shown.shape, (40, 30), strict=True))
    turned = Augmentation(**{**only, "rotation": 90})(cutout(), drawn(), 0)
    assert turned.shown.shape != (40, 30) and abs(turned.shown.sum() / cutout().shown.sum() - 1) < 0.1
    small = Augmentation(**{**only, "scale": 0.3})(cutout(), drawn(), 0)
    assert small.shown.sum() == cutout().shown.sum() and small.shown.shape[0] > 40
    coloured = Augmentation(**{**only, "colour": 0.5})(cutout(), drawn(), 0)
    assert (coloured.picture != cutout().picture).any() and (coloured.shown == cutout().shown).all()
