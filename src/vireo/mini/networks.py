"""Small networks with random weights, for the mini world's places of networks that a recipe trains.

`python -m vireo.mini.networks <weights>` writes them below a folder of weights. They are made by diffusers and
transformers, in a process of their own: the one that makes the world never imports torch.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from vireo.mini import captioned_clips
from vireo.mini.tokenizers import write_clip_tokenizer, write_t5_tokenizer

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

# CogVideoX: what differs between the released models, and what all of them share. Positions, channels, patches in time
# and the schedule are those of the real ones; widths, lengths and the size are small.
COGVIDEOX: dict[str, dict[str, Any]] = {
    "CogVideoX-2b": {"use_rotary_positional_embeddings": False},
    "CogVideoX-5b": {},
    "CogVideoX-5b-I2V": {"in_channels": 32, "use_learned_positional_embeddings": True},
    "CogVideoX1.5-5B": {"patch_size_t": 2, "patch_bias": False},
    "CogVideoX1.5-5B-I2V": {"patch_size_t": 2, "patch_bias": False, "in_channels": 32, "ofs_embed_dim": 32},
}
TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "num_layers": 3,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "time_embed_dim": 32,
    "text_embed_dim": 32,
    "max_text_seq_length": 24,
    "sample_height": 8,
    "sample_width": 8,
    "sample_frames": 9,
    "use_rotary_positional_embeddings": True,
}
T5 = {
    "d_model": TRANSFORMER["text_embed_dim"],
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "is_encoder_decoder": False,
    "use_cache": False,
}
COGVIDEOX_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
}
SHIPPED_TRANSFORMER = Path(__file__).parent / "weights" / "cogvideox_transformer"


def write_cogvideox(folder: Path, name: str) -> None:
    """The pipeline's folder of one of COGVIDEOX, without its VAE, which is shipped."""
    config = {**TRANSFORMER, **COGVIDEOX[name]}
    is_2b, has_image = not config["use_rotary_positional_embeddings"], config["in_channels"] > config["out_channels"]
    scheduler = {
        "_class_name": "CogVideoXDDIMScheduler" if is_2b else "CogVideoXDPMScheduler",
        **COGVIDEOX_SCHEDULER,
        "snr_shift_scale": 3.0 if is_2b else 1.0,
    }
    index = {
        "_class_name": "CogVideoXImageToVideoPipeline" if has_image else "CogVideoXPipeline",
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", index)
    write_t5_tokenizer(folder / "tokenizer", captioned_clips.words())
    tokens = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    save("transformers", "T5EncoderModel", {**T5, "vocab_size": len(tokens)}, folder / "text_encoder")
    save("diffusers", "CogVideoXTransformer3DModel", config, folder / "transformer", SHIPPED_TRANSFORMER)


def write_editor(folder: Path) -> None:
    """The pipeline's folder without its VAE, which is shipped."""
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", PIPELINE)
    write_text_encoder(folder)
    save("diffusers", "UNet2DConditionModel", UNET, folder / "unet")


def write_text_encoder(folder: Path) -> None:
    """`tokenizer/` and the `text_encoder/` that fits it."""
    write_clip_tokenizer(folder / "tokenizer")
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    ends = {"bos_token_id": "<|startoftext|>", "eos_token_id": "<|endoftext|>", "pad_token_id": "<|endoftext|>"}
    tokens = {name: vocabulary[token] for name, token in ends.items()}
    text_encoder = {**TEXT_ENCODER, "vocab_size": len(vocabulary), **tokens}
    save("transformers", "CLIPTextModel", text_encoder, folder / "text_encoder")


def fitted(state: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """The state of a CogVideoX, float32, with all that the weights of the text-to-video one of 1.0 can give it.

    Of a picture nothing is known: its channels begin at zero, and so does what `ofs` adds. Where a token is p latent
    frames, it begins as their mean, and its prediction for each of them is the same.
    """
    made = {}
    for name, own in state.items():
        given = trained.get(name)
        if given is not None:
            given = given.float()
            if name == "patch_embed.proj.weight":
                given = _patches(given, own)
            elif name.startswith("proj_out"):  # features are channels, frames, rows, columns
                repeats = own.shape[0] // given.shape[0]
                given = given.unflatten(0, (-1, 4)).repeat_interleave(repeats, 0).flatten(0, 1)
        made[name] = own * (not name.startswith("ofs_embedding.linear_2")) if given is None else given
    return made


def _patches(given: Any, own: Any) -> Any:
    """The kernel of the first layer, (D, C, 2, 2), for more channels (D, C + X, 2, 2) or frames (D, (C + X) 4 p)."""
    width, channels = given.shape[:2]
    frames = 1 if own.ndim == 4 else 2
    wide = given.new_zeros(width, own[0].numel() // 4 // frames, frames, 2, 2)
    wide[:, :channels] = given[:, :, None] / frames
    return wide.view_as(own)


def made(package: str, name: str, config: dict[str, Any], shipped: Path | None = None) -> Any:
    """A network with random weights, the same wherever it is made: keyed by the class and its config.

    shipped: folder of trained weights that take their place, as far as they fit, see `fitted`.
    """
    from safetensors.torch import load_file

    from vireo.randomness import seed_default

    seed_default("mini world", name, json.dumps(config, sort_keys=True))
    network_class = getattr(importlib.import_module(package), name)
    if package == "diffusers":
        network = network_class.from_config(config)
    else:
        network = network_class(network_class.config_class(**config))
    if shipped is not None and shipped.is_dir():
        trained = load_file(shipped / "diffusion_pytorch_model.safetensors")
        network.load_state_dict(fitted(network.state_dict(), trained), assign=True)
    return network


def save(package: str, name: str, config: dict[str, Any], folder: Path, shipped: Path | None = None) -> None:
    """Write what `made` gives as its package does."""
    made(package, name, config, shipped).save_pretrained(folder)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    from vireo.mini import eraser_networks, wan_networks  # which import this module

    write_editor(Path(sys.argv[1]) / EDITOR)
    for model in COGVIDEOX:
        write_cogvideox(Path(sys.argv[1]) / model, model)
    eraser_networks.write(Path(sys.argv[1]))
    wan_networks.write(Path(sys.argv[1]))
