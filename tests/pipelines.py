"""Tiny pipeline folders of Stable Diffusion's kind, with the weights of the golden numbers."""

import json
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors.torch import load_file

from tests.golden.fill import fill, noise
from vireo.mini import tokenizers

GOLDEN = Path(__file__).parent / "golden" / "ip2p"


def golden(name):
    """The description and the reference's tensors."""
    return json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")


CONFIG = golden("image_train")[0]["config"]


def unet(in_channels=8, **changes):
    return fill(diffusers.UNet2DConditionModel(**{"in_channels": in_channels, **CONFIG["unet"], **changes}))


def text_encoder(**changes):
    made = transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**CONFIG["text"], **changes}))
    return fill(made, rename=lambda name: name.removeprefix("text_model."))


def save_pipeline(folder: Path, in_channels=8, prediction_type="epsilon") -> Path:
    """A complete pipeline in `folder`. Its words are the mini world's, all of whose tokens the text encoder knows."""
    unet(in_channels).save_pretrained(folder / "unet")
    fill(diffusers.AutoencoderKL(**CONFIG["vae"])).save_pretrained(folder / "vae")
    tokenizers.write_clip_tokenizer(folder / "tokenizer")
    text_encoder(vocab_size=700).save_pretrained(folder / "text_encoder")
    scheduler = diffusers.DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", prediction_type=prediction_type)
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def pixels(name, *shape):
    """uint8 pictures, by the rule of the golden numbers."""
    return ((noise(name, *shape) * 0.5).clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def token_ids(rows):
    ids = torch.full((len(rows), 77), 513)
    for row, numbers in zip(ids, rows, strict=True):
        row[0] = 512
        row[1 : 1 + len(numbers)] = torch.tensor(numbers)
    return ids


class RecordedDraws:
    """What the reference drew, by purpose."""

    def __init__(self, described, batch):
        self.positions = list(range(batch))
        self.described = described

    def normal(self, purpose, *shape):
        return noise({"noise": "train_noise"}.get(purpose, purpose), len(self.positions), *shape)

    def integers(self, purpose, low, high):
        assert purpose == "timestep"
        return torch.tensor(self.described["timesteps"])

    def uniform(self, purpose):
        assert purpose == "condition_dropout"
        return torch.tensor(self.described["random_p"])
