"""The mini world's DiffuEraser: folders as published, in which the network finds every start."""

import pytest
import torch

from vireo.mini import eraser_networks
from vireo.models.diffueraser import DiffuEraser


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    eraser_networks.write(folder)
    return folder


@pytest.mark.parametrize("unet_init", ["released", "base"])
@pytest.mark.parametrize("motion_init", ["none", "adapter", "released"])
def test_every_start_is_there_and_motion_begins_idle(weights, unet_init, motion_init):
    names = {"released": "diffuEraser", "base": "stable-diffusion-v1-5"}
    names["motion_adapter"] = "animatediff-motion-adapter-v1-5-2"
    folders = {argument: str(weights / name) for argument, name in names.items()}
    made = DiffuEraser(**folders, unet_init=unet_init, motion_init=motion_init).eval()
    shapes = {"noisy": (1, 4, 3, 8, 8), "masked_latents": (1, 4, 3, 8, 8), "keep": (1, 1, 3, 8, 8)}
    given = {name: torch.ones(shape) for name, shape in shapes.items()}
    given |= {"prompt_embeds": torch.ones(1, 7, 32), "timesteps": torch.tensor([500])}
    with torch.no_grad():
        prediction = made(**given)
    assert prediction.shape == (1, 4, 3, 8, 8)
    torch.testing.assert_close(prediction[:, :, 0], prediction[:, :, 2], rtol=1e-4, atol=1e-5)


def test_weights_are_the_same_each_time(weights, tmp_path):
    torch.manual_seed(5)
    eraser_networks.write(tmp_path)
    for name in ("diffuEraser/unet_main", "diffuEraser/brushnet", "animatediff-motion-adapter-v1-5-2"):
        file = f"{name}/diffusion_pytorch_model.safetensors"
        assert (tmp_path / file).read_bytes() == (weights / file).read_bytes()
