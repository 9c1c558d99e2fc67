"""Masks on the grid of latents."""

import torch

from vireo.diffusion.latent_masks import latent_mask


def test_a_mask_of_one_frame_holds_at_all_times():
    mask = torch.zeros(2, 1, 1, 8, 16, dtype=torch.uint8)
    mask[..., :6] = 1
    found = latent_mask(mask, torch.zeros(2, 4, 3, 2, 4))
    assert found.shape == (2, 1, 3, 2, 4) and found.dtype == torch.float32
    assert found[0, 0, 2].tolist() == [[1, 0.5, 0, 0]] * 2


def test_a_mask_of_every_frame():
    mask = torch.zeros(1, 9, 1, 4, 4)
    mask[:, :3] = 1
    assert latent_mask(mask, torch.zeros(1, 4, 3, 2, 2))[0, 0, :, 0, 0].tolist() == [1, 0, 0]
