import pytest
import torch

from vireo.pixels import as_8_bit, to_pixels, to_uint8


@pytest.mark.parametrize("low", [-1.0, 0.0])
def test_every_level_comes_back(low):
    levels = torch.arange(256, dtype=torch.uint8)
    pixels = to_pixels(levels, low)
    assert (float(pixels[0]), float(pixels[-1])) == (low, 1)
    assert torch.equal(to_uint8(pixels, low), levels)


def test_pixels_as_an_8_bit_video_has_them():
    seen = as_8_bit(torch.tensor([-0.2, 0.001, 0.003, 0.5, 1.7]))
    assert seen.tolist() == pytest.approx([0, 0, 1 / 255, 128 / 255, 1])


def test_only_8_bit_frames_become_pixels():
    with pytest.raises(TypeError, match="uint8"):
        to_pixels(torch.zeros(2))
