"""Small networks of Wan with references in the places of the real ones; `vireo.mini.networks` writes them.

Positions, channels and layers are of the real ones' kinds; widths, depths and the pictures of the vision tower are
small. The transformer is trained and shipped (`ship_transformer`). Text encoder and vision tower are random and stay
so: what they give differs for different texts and pictures, which is all that is asked of them here.
"""

import json
from pathlib import Path

from vireo.mini import captioned_clips, subject_clips
from vireo.mini.networks import made, save, write_json
from vireo.mini.tokenizers import write_t5_tokenizer

WAN, LONGLIVE, SKYREELS = "Wan2.1-T2V-1.3B-Diffusers", "LongLive-1.3B", "SkyReels-A2"
TRANSFORMER = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 256,
    "num_layers": 3,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 64,
}
UMT5 = {
    "d_model": TRANSFORMER["text_dim"],
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "is_encoder_decoder": False,
    "use_cache": False,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "projection_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "hidden_act": "gelu",
}
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": VISION["image_size"], "width": VISION["image_size"]},
    "size": {"shortest_edge": VISION["image_size"]},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],  # CLIP's
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,  # bicubic
    "rescale_factor": 1 / 255,
}
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "solver_order": 2,
}
PIPELINE = {
    "_class_name": "WanPipeline",
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
SHIPPED_TRANSFORMER = Path(__file__).parent / "weights" / "wan_transformer"


def write(weights: Path) -> None:
    """The three folders below `weights`, without Wan's VAE, which is shipped."""
    write_pipeline(weights / WAN)
    write_generator(weights / LONGLIVE / "models")
    save("transformers", "CLIPVisionModel", VISION, weights / SKYREELS / "image_encoder")
    write_json(weights / SKYREELS / "image_processor" / "preprocessor_config.json", PROCESSOR)


def write_pipeline(folder: Path) -> None:
    """A text-to-video pipeline without its VAE."""
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", PIPELINE)
    words = {word for text in _captions() for word in text.split()}
    write_t5_tokenizer(folder / "tokenizer", sorted({*captioned_clips.words(), *words}))
    tokens = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    save("transformers", "UMT5EncoderModel", {**UMT5, "vocab_size": len(tokens)}, folder / "text_encoder")
    save("diffusers", "WanTransformer3DModel", TRANSFORMER, folder / "transformer", SHIPPED_TRANSFORMER)


def write_generator(folder: Path) -> None:
    """A generator with causal frames and a LoRA in LongLive's layout: {"generator": …} with Wan's own names.

    The weights are the pipeline's: of a first group of 3 latent frames causal frames make the same, later groups are
    more than they were trained for. The LoRA, of one layer in each block, changes nothing, so that merging it does no
    harm.
    """
    import torch

    from vireo.models.wan_weights import to_published

    network = made("diffusers", "WanTransformer3DModel", TRANSFORMER, SHIPPED_TRANSFORMER)
    state = {f"model.{to_published(name).replace('_fused', '')}": value for name, value in network.state_dict().items()}
    lora: dict[str, torch.Tensor] = {}
    for name, weight in state.items():
        if name.endswith("self_attn.q.weight"):
            layer, (height, width) = name.removesuffix(".weight"), weight.shape
            lora |= {f"{layer}.lora_A.weight": torch.ones(4, width), f"{layer}.lora_B.weight": torch.zeros(height, 4)}
    folder.mkdir(parents=True)
    torch.save({"generator": state}, folder / "longlive_base.pt")
    torch.save({"generator_lora": lora}, folder / "lora.pt")


def _captions() -> list[str]:
    trained, held_out = captioned_clips.meanings()
    return [subject_clips.caption(meaning) for meaning in [*trained, *held_out]]
