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


def test_temporal_psnr_sees_flicker_but_not_a_constant_offset():
    flicker = TARGET + 0.1 * torch.tensor([1.0, -1, 1, -1]).view(1, 4, 1, 1, 1)
    assert (metrics.temporal_psnr(TARGET + 0.1, TARGET) > 90).all()
    assert metrics.temporal_psnr(flicker, TARGET).tolist() == pytest.approx([13.979] * 2, abs=1e-3)
    assert metrics.temporal_psnr(TARGET[:, :1], TARGET[:, :1]).tolist() == [100, 100]
