"""Filling holes without a network, and putting a filling into a video."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vireo.sampling.holes import blurred, composite, harmonic_fill, ring_fill


def hole_of(height, width, rows, columns):
    hole = torch.zeros(1, 1, height, width)
    hole[..., slice(*rows), slice(*columns)] = 1
    return hole


def test_the_composite_is_the_prediction_in_the_hole_and_the_frame_far_from_it():
    generator = torch.Generator().manual_seed(0)
    frames, prediction = (
        torch.rand(2, 3, 3, 64, 80, generator=generator),
        torch.rand(2, 3, 3, 64, 80, generator=generator),
    )
    hole = hole_of(64, 80, (20, 30), (30, 45)).expand(2, 3, 1, 64, 80).clone()
    made = composite(prediction, frames, hole)
    inside = hole.bool().expand_as(made)
    assert torch.equal(made[inside], prediction[inside])
    assert torch.equal(made[..., 45:, :], frames[..., 45:, :]) and torch.equal(made[..., :, 60:], frames[..., :, 60:])
    seam = made[..., 31, 38]
    share = float(blurred(hole)[0, 0, 0, 31, 38])
    assert 0 < share < 1
    torch.testing.assert_close(seam, share * prediction[..., 31, 38] + (1 - share) * frames[..., 31, 38])


def test_the_blur_is_opencvs_gaussian():
    """Of one pixel: the outer product of exp(-x²/2σ²) with σ = 0.3 (10 - 1) + 0.8 over 21 pixels."""
    made = blurred(hole_of(41, 41, (20, 21), (20, 21)))[0, 0]
    line = np.exp(-(np.arange(-10, 11) ** 2) / (2 * 3.5**2))
    line /= line.sum()
    assert np.allclose(made[10:31, 10:31], np.outer(line, line), atol=1e-6) and math.isclose(
        made.sum(), 1, rel_tol=1e-5
    )
    assert blurred(hole_of(8, 8, (0, 8), (0, 8))).allclose(torch.ones(8, 8)), "smaller than the Gaussian"


@settings(max_examples=25, deadline=None)
@given(size=st.tuples(st.integers(6, 40), st.integers(6, 40)), seed=st.integers(0, 10**6))
def test_a_filling_changes_nothing_but_the_hole_and_stays_between_the_known_colours(size, seed):
    generator = torch.Generator().manual_seed(seed)
    frames = torch.rand(2, 3, 3, *size, generator=generator)
    hole = (torch.rand(2, 3, 1, *size, generator=generator) < 0.5).float()
    for made in (ring_fill(frames, hole), harmonic_fill(frames, hole)):
        keep = (hole == 0).expand_as(frames)
        assert torch.equal(made[keep], frames[keep])
        low = frames.masked_fill(~keep, 2).amin(dim=(-2, -1), keepdim=True)
        high = frames.masked_fill(~keep, -1).amax(dim=(-2, -1), keepdim=True)
        known = keep.any(dim=-1).any(dim=-1)[..., None, None]
        inside = (made >= low - 1e-5) & (made <= high + 1e-5)
        assert (inside | ~known).all()


def test_the_ring_is_four_pixels_wide():
    frames = torch.zeros(1, 3, 30, 30)
    frames[..., 6:24, 6:24] = 0.75  # the hole and four pixels around it
    hole = hole_of(30, 30, (10, 20), (10, 20))
    assert (ring_fill(frames, hole)[..., 10:20, 10:20] == 0.75).all()
    wider = ring_fill(frames, hole, width=5)[..., 10:20, 10:20]
    assert (wider < 0.75).all() and (wider > 0.5).all()
    assert (ring_fill(frames, torch.ones_like(hole)) == 0.5).all(), "nothing is known"


def test_the_harmonic_filling_solves_laplaces_equation():
    """Against the linear system itself, on a hole of many pixels with a border in it; planes come back as they are."""
    height, width = 36, 44
    generator = torch.Generator().manual_seed(1)
    picture = torch.rand(1, 1, height, width, generator=generator)
    picture = torch.nn.functional.avg_pool2d(picture, 5, stride=1, padding=2)
    hole = hole_of(height, width, (8, 28), (24, 44))
    rows, columns = np.nonzero(hole[0, 0].numpy())
    place = {pixel: k for k, pixel in enumerate(zip(rows, columns, strict=True))}
    matrix, right = np.zeros((len(place), len(place))), np.zeros(len(place))
    for (row, column), k in place.items():
        for other in ((row - 1, column), (row + 1, column), (row, column - 1), (row, min(column + 1, width - 1))):
            matrix[k, k] += 1
            if other in place:
                matrix[k, place[other]] -= 1
            else:
                right[k] += picture[0, 0][other]
    expected = np.linalg.solve(matrix, right)
    found = harmonic_fill(picture, hole)[0, 0].numpy()[rows, columns]
    assert np.abs(found - expected).max() < 0.01
    plane = (torch.arange(height)[:, None] + 2 * torch.arange(width)).float()[None, None] / 200
    inner = hole_of(height, width, (8, 28), (10, 30))
    assert (harmonic_fill(plane, inner) - plane).abs().max() < 2e-3


@pytest.mark.parametrize("fill", [ring_fill, harmonic_fill])
def test_frames_are_filled_alone(fill):
    frames = torch.rand(1, 4, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    hole = hole_of(24, 24, (5, 15), (5, 15)).expand(1, 4, 1, 24, 24)
    torch.testing.assert_close(fill(frames, hole)[:, 2:3], fill(frames[:, 2:3], hole[:, 2:3]))
