"""Networks, losses and sampling against the numbers of the published implementation."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from tests.golden.fill import fill, noise
from vireo.diffusion.noise_schedule import NoiseSchedule
from vireo.losses.denoising import Denoising
from vireo.models.brushnet import BrushNetModel
from vireo.models.unet_walk import walk

FOLDER = Path(__file__).parent / "golden" / "diffueraser"
DESCRIBED = json.loads((FOLDER / "tiny.json").read_text())
REFERENCE = load_file(FOLDER / "tiny.safetensors")
CONFIG = DESCRIBED["config"]
B, T = 2, 3


def unet2d():
    return fill(diffusers.UNet2DConditionModel(**CONFIG["unet2d"])).eval()


def motion_unet():
    adapter = fill(diffusers.MotionAdapter(**CONFIG["motion_adapter"]))
    return diffusers.UNetMotionModel.from_unet2d(unet2d(), adapter).eval()


def brushnet():
    return fill(BrushNetModel.from_unet(unet2d())).eval()


@pytest.fixture(scope="module")
def inputs():
    latents, masked = noise("tiny.latents", 6, 4, 16, 16), noise("tiny.masked_latents", 6, 4, 16, 16)
    keep = (noise("tiny.mask", 6, 1, 16, 16) > 0).float()
    return {
        "latents": latents,
        "noise": noise("tiny.noise", 6, 4, 16, 16),
        "timesteps": torch.tensor(DESCRIBED["inputs"]["timesteps_per_video"]),
        "noisy": REFERENCE["noisy"],
        "condition": torch.cat([masked, keep], dim=1),
        "context": noise("tiny.text", 2, 7, 16),
    }


def residuals(inputs):
    return brushnet()(inputs["noisy"], inputs["timesteps"], inputs["context"], inputs["condition"], T)


def predict(unet, inputs, residuals=None, checkpointing=False):
    x = walk(
        unet,
        unet.conv_in(inputs["noisy"]),
        inputs["timesteps"],
        inputs["context"],
        T,
        residuals=residuals,
        gradient_checkpointing=checkpointing,
    )
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


def close(found, name, tolerance=1e-5):
    torch.testing.assert_close(found, REFERENCE[name], rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")


@torch.no_grad()
def test_brushnets_residuals(inputs):
    found = residuals(inputs)
    names = [f"brush.down.{n}" for n in range(12)] + ["brush.mid"] + [f"brush.up.{n}" for n in range(15)]
    for value, name in zip(found, names, strict=True):
        close(value[[1, 5]], name)


@torch.no_grad()
@pytest.mark.parametrize(("build", "name"), [(unet2d, "unet2d"), (motion_unet, "motion")])
def test_the_unet_with_and_without_residuals(inputs, build, name):
    unet = build()
    close(predict(unet, inputs), f"{name}.plain")
    close(predict(unet, inputs, residuals(inputs)), f"{name}.brush")
