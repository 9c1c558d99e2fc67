"""Tiny transformers of every kind of CogVideoX, with the weights of the golden numbers."""

import functools
import json
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

from tests.golden.fill import fill, noise
from vireo.diffusion.noise_schedule import NoiseSchedule

GOLDEN = Path(__file__).parent / "golden" / "cogvideox"
DESCRIBED = json.loads((GOLDEN / "train_loss.json").read_text())
CASES = {name: case for name, case in DESCRIBED["cases"].items() if "transformer_config" in case}


@functools.cache
def reference():
    return load_file(GOLDEN / "train_loss.safetensors")


def save_transformer(case: str, folder: Path, **changes) -> Path:
    fill(CogVideoXTransformer3DModel(**{**CASES[case]["transformer_config"], **changes})).save_pretrained(folder)
    return folder


def noise_schedule(case: str) -> NoiseSchedule:
    given = CASES[case]["scheduler"]
    names = ("prediction_type", "snr_shift_scale", "rescale_betas_zero_snr")
    return NoiseSchedule(**{name: given[name] for name in names})


def batch(case: str, mode: str) -> dict:
    """What an encoder gives the loss. mode: pipeline or upstream, which differ in the scale of 1.5's pictures."""
    described, stored = CASES[case], reference()
    latents, text = (noise(described[name][0], *described[name][1]) for name in ("latents_BCFHW", "text"))
    padding = latents.shape[2] % (described["transformer_config"].get("patch_size_t") or 1)
    made = {"latents": torch.cat([latents[:, :, :1]] * padding + [latents], dim=2), "prompt_embeds": text}
    if described["images"]:
        made["image_latents"] = stored[f"{case}/hidden_states"][:, :1, latents.shape[1] :].transpose(1, 2)
        if mode == "pipeline" and f"{case}/image_latents_pipeline" in stored:
            made["image_latents"] = stored[f"{case}/image_latents_pipeline"][:, :1].transpose(1, 2)
    return made


class RecordedDraws:
    """What the reference drew; its noise has time before channels."""

    def __init__(self, name: str, timesteps: list[int]):
        self.name, self.timesteps = name, timesteps

    def normal(self, purpose, channels, frames, height, width):
        assert purpose == "noise"
        return noise(f"{self.name}.noise", len(self.timesteps), frames, channels, height, width).transpose(1, 2)

    def integers(self, purpose, low, high):
        assert purpose == "timestep"
        return torch.tensor(self.timesteps)
