"""Optical flow against OpenCV's numbers (5.0.0, kept beside), and what it says of motions that are known."""

import json
from pathlib import Path

import pytest
import torch

from vireo.optical_flow import farneback, motion_amplitude

GOLDEN = json.loads((Path(__file__).parent / "golden" / "opens2v" / "farneback.json").read_text())


def picture(height, width, dx, dy):
    """A smooth pattern that moved by (dx, dy), rounded to 8 bits, float32 (H, W)."""
    y, x = torch.meshgrid(torch.arange(height).double() - dy, torch.arange(width).double() - dx, indexing="ij")
    waves = torch.sin(x / 5 + y / 9) + torch.cos(x / 11 - y / 4) + torch.sin(x / 3.1) * torch.cos(y / 4.3)
    return (127.5 + 40 * waves).round().clamp(0, 255).float()


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: "x".join(map(str, case["size"])))
def test_opencvs_numbers(case):
    first, second = picture(*case["size"], 0, 0), picture(*case["size"], *case["motion"])
    found = farneback(first[None], second[None])[0]
    reference = torch.tensor(case["flow"])  # every eighth pixel
    inner = found[:, ::8, ::8] - reference
    assert inner[:, 2:-2, 2:-2].abs().max() < 0.02 and inner.abs().mean() < 0.02
    torch.testing.assert_close(found.mean(dim=(1, 2)), torch.tensor(case["mean"]), rtol=5e-3, atol=5e-3)


def test_amplitude_is_the_mean_motion():
    frames = torch.stack([picture(64, 80, 1.5 * t, -0.5 * t) for t in range(4)]) / 255
    video = frames[None, :, None].expand(1, 4, 3, 64, 80)
    still = video[:, :1].expand_as(video)
    found = motion_amplitude(torch.cat([video, still, video.flip(1)])).tolist()
    assert found[0] == pytest.approx(0.5, abs=0.05) and found[1] < 0.01  # borders
    assert found[2] == pytest.approx(found[0], abs=0.05)
