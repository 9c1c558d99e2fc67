"""Small networks with random weights in the places of DiffuEraser's and of what it is made from.

`vireo.mini.networks` writes them, in a process of their own. Motion modules begin as they do in AnimateDiff: what
they add is zero. The released BrushNet adds something, as a trained one does: from zeros it would begin to learn late.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn

from vireo.mini.networks import write_text_encoder

UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64],  # multiples of 32: some motion modules have 32 groups whatever the config says
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
ADAPTER: dict[str, Any] = {
    "block_out_channels": UNET["block_out_channels"],
    "motion_layers_per_block": UNET["layers_per_block"],
    "motion_transformer_layers_per_block": 1,
    "motion_transformer_layers_per_mid_block": 1,
    "motion_num_attention_heads": 4,
    "motion_norm_num_groups": UNET["norm_num_groups"],
    "motion_max_seq_length": 32,
    "use_motion_mid_block": True,
}
OF_BRUSHNET = ["block_out_channels", "down_block_types", "up_block_types", "layers_per_block"]
OF_BRUSHNET += ["norm_num_groups", "cross_attention_dim", "attention_head_dim"]
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def write(weights: Path) -> None:
    """`stable-diffusion-v1-5/` without its VAE, which is shipped, `animatediff-…/` and `diffuEraser/`."""
    from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel

    from vireo.models.brushnet import BrushNetModel
    from vireo.models.diffueraser import motion_config

    base, released = weights / "stable-diffusion-v1-5", weights / "diffuEraser"
    write_text_encoder(base)
    (base / "scheduler").mkdir(exist_ok=True)
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    _save(UNet2DConditionModel, UNET, base / "unet")
    _save(MotionAdapter, ADAPTER, weights / "animatediff-motion-adapter-v1-5-2")
    _save(UNetMotionModel, motion_config(UNET, ADAPTER), released / "unet_main")
    _save(BrushNetModel, {name: UNET[name] for name in OF_BRUSHNET}, released / "brushnet")


def _save(kind: Any, config: dict[str, Any], folder: Path) -> None:
    """Random weights, the same wherever they are made: keyed by the class and its config."""
    from vireo.randomness import seed_default

    seed_default("mini world", kind.__name__, json.dumps(config, sort_keys=True))
    network = kind.from_config(config)
    for name, module in network.named_modules():
        if name.endswith("proj_out") and "motion_modules" in name:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        if name.startswith("brushnet_") and isinstance(module, nn.Conv2d):
            module.reset_parameters()
    network.save_pretrained(folder)
