"""The recipes that the tests of strategies and of accumulation go through: a line for each."""

from typing import NamedTuple

TINY_TAEHV = ["model.network.weights=null", "++model.network.encoder_width=8", "++model.network.num_memblocks=1"]
TINY_TAEHV += ["++model.network.decoder_widths=[8,8,8,8]", "height=32", "width=32"]
TINY_ERASER = ["height=32", "width=32", "num_frames=3", "model.sampler.num_inference_steps=2"]
TINY_WAN = ["height=32", "width=32", "cache=off", "model.sampler.num_inference_steps=2"]
TINY_COGVIDEOX = ["cache=off", "model.sampler.num_inference_steps=2"]
TINY_IP2P = ["height=32", "width=32", "cache=off", "model.sampler.num_inference_steps=2"]


class Recipe(NamedTuple):
    """words: what makes the mini size smaller still. tolerance: of losses on two processes, beside those of one.

    accumulates: whether accumulation is a larger batch (Seraena's learner steps at each micro-batch). quick: part of
    `make test` (at most 20 s of CPU time for a recipe), else of the full matrix only.
    """

    words: list[str]
    tolerance: float = 1e-5
    accumulates: bool = True
    quick: bool = True


# The discriminator turns small differences into larger ones.
RECIPES = {
    "taehv": Recipe(TINY_TAEHV),
    "taehv_seraena": Recipe(TINY_TAEHV, tolerance=1e-3, accumulates=False),
    "taehv_seraena_wan": Recipe(TINY_TAEHV, tolerance=1e-3, accumulates=False, quick=False),
    "ip2p_image": Recipe(TINY_IP2P, quick=False),
    "ip2p_video": Recipe(TINY_IP2P),
    "diffueraser_stage1": Recipe(TINY_ERASER, quick=False),
    "diffueraser_stage2": Recipe(TINY_ERASER),
    "opens2v_wan": Recipe(TINY_WAN),
    "opens2v_longlive": Recipe(TINY_WAN, quick=False),
    "cogvideox_t2v_lora": Recipe(TINY_COGVIDEOX),
    **{
        f"cogvideox{version}_{task}_{mode}": Recipe(TINY_COGVIDEOX, quick=False)
        for version, task, mode in (
            ("", "t2v", "sft"),
            ("", "i2v", "lora"),
            ("", "i2v", "sft"),
            ("15", "t2v", "lora"),
            ("15", "t2v", "sft"),
            ("15", "i2v", "lora"),
            ("15", "i2v", "sft"),
        )
    },
}
