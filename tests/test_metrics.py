import itertools

import pytest
import torch

from vireo import metrics

TARGET = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_psnr_of_a_known_error():
    noisy = TARGET + 0.1
    assert metrics.psnr(noisy, TARGET).tolist() == pytest.approx([20, 20], abs=1e-4)
    assert metrics.pooled_psnr(noisy, TARGET).tolist() == pytest.approx([20, 20], abs=1e-4)


def test_the_mean_of_psnrs_lies_above_the_psnr_of_the_mean():
    noisy = TARGET + torch.tensor([0.01, 0.1, 0.1, 0.1]).view(1, 4, 1, 1, 1)
    assert metrics.psnr(noisy, TARGET).tolist() == pytest.approx([(40 + 3 * 20) / 4] * 2, abs=1e-3)
    assert (metrics.psnr(noisy, TARGET) > metrics.pooled_psnr(noisy, TARGET)).all()


def test_no_error_is_a_hundred_decibels_and_similarity_one():
    assert metrics.psnr(TARGET, TARGET).tolist() == [100, 100]
    assert metrics.ssim(TARGET, TARGET).tolist() == pytest.approx([1, 1])


def test_ssim_falls_with_blur_and_works_on_small_frames():
    blurred = torch.nn.functional.avg_pool2d(TARGET.flatten(0, 1), 3, 1, 1).view_as(TARGET)
    assert (metrics.ssim(blurred, TARGET) < 0.9).all()
    assert metrics.ssim(TARGET[..., :8, :8], TARGET[..., :8, :8]).tolist() == pytest.approx([1, 1])


def test_similarity_of_each_pixel_is_local_and_has_the_clips_as_its_mean():
    other = TARGET.clone()
    other[..., :4, :4] = 0
    pixels = metrics.ssim_map(other, TARGET)
    assert pixels.shape == TARGET.shape
    assert (pixels[..., 9:, 9:] > 0.9999).all(), "out of reach of a window of 11"
    assert pixels[..., :4, :4].mean() < 0.5
    assert pixels.mean(dim=(1, 2, 3, 4)).tolist() == pytest.approx(metrics.ssim(other, TARGET).tolist())


def test_temporal_psnr_sees_flicker_but_not_a_constant_offset():
    flicker = TARGET + 0.1 * torch.tensor([1.0, -1, 1, -1]).view(1, 4, 1, 1, 1)
    assert (metrics.temporal_psnr(TARGET + 0.1, TARGET) > 90).all()
    assert metrics.temporal_psnr(flicker, TARGET).tolist() == pytest.approx([13.979] * 2, abs=1e-3)


def test_mse_of_a_known_error():
    assert metrics.mse(TARGET + 0.1, TARGET).tolist() == pytest.approx([0.01, 0.01], rel=1e-5)


def test_flicker_is_the_ratio_of_second_differences():
    sway = 0.1 * torch.tensor([1.0, -1, 1, -1]).view(1, 4, 1, 1, 1)
    ramp = torch.linspace(0.2, 0.8, 4).view(1, 4, 1, 1, 1).expand(2, 4, 3, 8, 8)  # even motion has none
    half = 0.5 / 255
    assert metrics.flicker(ramp + sway, ramp).tolist() == pytest.approx([(0.4 + half) / half] * 2, rel=1e-4)
    assert metrics.flicker(ramp + sway / 4, ramp + sway).tolist() == pytest.approx(
        [(0.1 + half) / (0.4 + half)] * 2, rel=1e-4
    )
    assert metrics.flicker(TARGET + 0.1, TARGET).tolist() == pytest.approx([1, 1], rel=1e-5)


def test_short_clips_are_measured_by_what_they_are_long_enough_for():
    every = list(metrics.MEASURES)
    for frames, missing in ((1, {"temporal_psnr", "flicker"}), (2, {"flicker"}), (3, set())):
        found = metrics.measure_video(TARGET[0, :frames], TARGET[0, :frames])
        assert list(found) == [name for name in every if name not in missing]
        assert (found["psnr"], found["mse"]) == (100, 0)


def test_videos_are_measured_on_8_bit_pixels():
    target = torch.full((4, 3, 16, 16), 100 / 255)
    assert metrics.measure_video(target + 0.4 / 255, target)["mse"] == 0
    assert metrics.measure_video(target + 0.6 / 255, target)["mse"] == pytest.approx((1 / 255) ** 2)
    assert metrics.measure_video(target + 5, target)["mse"] == pytest.approx((155 / 255) ** 2)


def test_box_ssim_is_that_of_every_window():
    """Against the definition, window by window: even weights, sample covariances, each colour by itself."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(1, 2, 3, 9, 11, generator=generator).double() for _ in range(2))
    found = metrics.box_ssim(x, y, side=5)
    assert found.shape == (1, 2)
    expected = []
    for colour, row, column in itertools.product(range(3), range(5), range(7)):
        a, b = (v[0, 1, colour, row : row + 5, column : column + 5].flatten() for v in (x, y))
        covariance = torch.cov(torch.stack([a, b]))
        means = 2 * a.mean() * b.mean() + 1e-4, a.mean() ** 2 + b.mean() ** 2 + 1e-4
        spread = 2 * covariance[0, 1] + 9e-4, covariance[0, 0] + covariance[1, 1] + 9e-4
        expected.append(means[0] * spread[0] / (means[1] * spread[1]))
    assert float(found[0, 1]) == pytest.approx(float(torch.stack(expected).mean()), abs=1e-9)
    assert float(metrics.box_ssim(x, x)[0, 0]) == pytest.approx(1.0), "the window shrinks to the frame"


def test_mean_where_counts_all_colours_of_a_region():
    values = torch.arange(24.0).view(1, 2, 3, 2, 2)
    region = torch.zeros(1, 2, 1, 2, 2, dtype=torch.bool)
    assert float(metrics.mean_where(region, values)) == 0, "an empty region has no error"
    region[0, 1, 0, 0, 1] = True
    assert float(metrics.mean_where(region, values)) == pytest.approx((13 + 17 + 21) / 3)
