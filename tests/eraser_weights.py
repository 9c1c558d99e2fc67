"""Tiny networks of DiffuEraser's kind, with the weights of the golden numbers, in folders as published."""

import json
from pathlib import Path

import diffusers
from safetensors.torch import load_file

from tests.golden.fill import fill
from vireo.models.brushnet import BrushNetModel

GOLDEN = Path(__file__).parent / "golden" / "diffueraser"
DESCRIBED = json.loads((GOLDEN / "tiny.json").read_text())
REFERENCE = load_file(GOLDEN / "tiny.safetensors")
CONFIG = DESCRIBED["config"]


def unet2d(**changes):
    return fill(diffusers.UNet2DConditionModel(**{**CONFIG["unet2d"], **changes}))


def adapter(**changes):
    return fill(diffusers.MotionAdapter(**{**CONFIG["motion_adapter"], **changes}))


def motion_unet(**changes):
    return diffusers.UNetMotionModel.from_unet2d(unet2d(), adapter(**changes))


def brushnet():
    return fill(BrushNetModel.from_unet(unet2d()))


def save(folder: Path) -> dict[str, str]:
    """Released folder, base pipeline's UNet and motion adapter below `folder`, as arguments of the network.

    The released spatial part has other numbers than the base, and so have the released motion modules.
    """
    released = fill(motion_unet(), rename=lambda name: f"released.{name}")
    released.save_pretrained(folder / "diffuEraser" / "unet_main")
    brushnet().save_pretrained(folder / "diffuEraser" / "brushnet")
    unet2d().save_pretrained(folder / "stable-diffusion-v1-5" / "unet")
    adapter().save_pretrained(folder / "animatediff-motion-adapter-v1-5-2")
    names = {"released": "diffuEraser", "base": "stable-diffusion-v1-5"}
    names["motion_adapter"] = "animatediff-motion-adapter-v1-5-2"
    return {argument: str(folder / name) for argument, name in names.items()}
