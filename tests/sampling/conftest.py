import diffusers
import pytest
import torch

from vireo.models.taehv import TAEHV
from vireo.models.teachers import Teacher


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small VAE of Wan's kind, as diffusers saves it."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1] * 4, num_res_blocks=1)
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def teacher(folder):
    return Teacher("wan", folder, "diffusion", dtype="fp32")


@pytest.fixture
def tiny():
    """A TAEHV for these latents."""
    torch.manual_seed(0)
    return TAEHV("taew2_1", encoder_width=8, decoder_widths=(16, 8, 8, 8), num_memblocks=1).eval().requires_grad_(False)
