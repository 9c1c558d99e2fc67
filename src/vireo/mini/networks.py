"""Small networks with random weights, for the mini world's places of networks that a recipe trains.

`python -m vireo.mini.networks <weights>` writes them below a folder of weights. They are made by diffusers and
transformers, in a process of their own: the one that makes the world never imports torch.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from vireo.mini.tokenizers import write_clip_tokenizer

EDITOR = "instruct-pix2pix"  # an InstructPix2Pix pipeline: timbrooks/instruct-pix2pix, small
UNET = {
    "sample_size": 8,
    "in_channels": 8,  # the noisy latent and that of one condition frame
    "out_channels": 4,
    "block_out_channels": [64, 96],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
TEXT_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "projection_dim": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
}
SCHEDULER = {
    "_class_name": "EulerAncestralDiscreteScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",  # learns several times faster than epsilon at this size
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
PIPELINE = {
    "_class_name": "StableDiffusionInstructPix2PixPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_editor(folder: Path) -> None:
    """The pipeline's folder without its VAE, which is shipped."""
    for name, content in (("scheduler/scheduler_config.json", SCHEDULER), ("model_index.json", PIPELINE)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    write_text_encoder(folder)
    _save("diffusers", "UNet2DConditionModel", UNET, folder / "unet")


def write_text_encoder(folder: Path) -> None:
    """`tokenizer/` and the `text_encoder/` that fits it."""
    write_clip_tokenizer(folder / "tokenizer")
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    ends = {"bos_token_id": "<|startoftext|>", "eos_token_id": "<|endoftext|>", "pad_token_id": "<|endoftext|>"}
    tokens = {name: vocabulary[token] for name, token in ends.items()}
    text_encoder = {**TEXT_ENCODER, "vocab_size": len(vocabulary), **tokens}
    _save("transformers", "CLIPTextModel", text_encoder, folder / "text_encoder")


def _save(package: str, name: str, config: dict[str, Any], folder: Path) -> None:
    """Random weights, the same wherever they are made: keyed by the class and its config."""
    from vireo.randomness import seed_default

    seed_default("mini world", name, json.dumps(config, sort_keys=True))
    network_class = getattr(importlib.import_module(package), name)
    if package == "diffusers":
        network = network_class.from_config(config)
    else:
        network = network_class(network_class.config_class(**config))
    network.save_pretrained(folder)


if __name__ == "__main__":
    from vireo.mini import eraser_networks

    write_editor(Path(sys.argv[1]) / EDITOR)
    eraser_networks.write(Path(sys.argv[1]))
