"""Tiny Wan transformers with the weights of the golden numbers."""

import json
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file

from tests.golden.fill import fill, noise
from vireo.models.wan_references import WanReferences

GOLDEN = Path(__file__).parent / "golden" / "opens2v"


def golden(name):
    """The description and the reference's tensors."""
    return json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")


CONFIG, KEY_MAP = (golden("wan_dual")[0][name] for name in ("config", "key_map"))
CLIP_DIM = CONFIG["native"]["clip_dim"]


def native_state(described):
    """The reference's weights under its own names."""
    return fill({name: torch.empty(shape) for name, shape in described["state_dict"].items()})


def save_base(folder, described=None):
    """A diffusers pipeline's folder whose transformer has the golden base weights."""
    described = described or golden("wan_base")[0]
    made = diffusers.WanTransformer3DModel(**CONFIG["diffusers"])
    state = native_state(described)
    made.load_state_dict({new: state[old] for old, new in described["key_map"].items()})
    made.save_pretrained(folder / "transformer")
    return folder


def network(folder, **arguments):
    return WanReferences(str(folder), clip_dim=CLIP_DIM, **arguments)


def filled(made):
    """The network with the reference's weights in every tensor, and with gates of 1, which is its formula."""
    state = native_state(golden("wan_dual")[0])
    own = {name.removeprefix("transformer."): value for name, value in made.state_dict().items()}
    for old, new in KEY_MAP.items():
        own[new].copy_(state[old])
    for name, value in own.items():
        if name.endswith("clip_gate"):
            value.fill_(1)
    return made


def inputs(names=("prompt_embeds", "reference_clip", "reference_latents")):
    """The golden network's inputs by the names that it has here."""
    known = {
        "noisy": noise("opens2v.latent", 2, 16, 6, 8, 6),
        "prompt_embeds": noise("opens2v.text", 2, 12, 20),
        "reference_clip": noise("opens2v.clip", 2, 10, 24).unflatten(1, (2, 5)),
        "reference_latents": noise("opens2v.vae", 2, 16, 2, 8, 6),
    }
    return {name: known[name] for name in ("noisy", *names)}
