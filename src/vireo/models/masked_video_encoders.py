"""The frozen encoders of video inpainting: latents of frames and of frames with a hole, and the mask at latent size."""

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from vireo.models.image_encoders import ImageTextEncoder
from vireo.randomness import Draws

REMEMBERED = 64  # texts


class MaskedVideoEncoder(ImageTextEncoder):
    """Frames, one by one, through the VAE of an image model; masked frames too, afresh at every step; text by CLIP.

    Arguments as in `ImageTextEncoder`; text_encoder is always frozen. Texts are remembered, since most clips of
    inpainting share one: each is encoded once.

    Cached outputs (float32): frame_moments (B, T, 2C, h, w) of frames, prompt_embeds (B, L, D) of prompt.
    """

    parts = (*ImageTextEncoder.parts, "embeds_by_text")

    def __init__(
        self,
        vae: str,
        text_encoder: str,
        tokenizer: str | None = None,
        vae_batch: int = 16,
        dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    ) -> None:
        super().__init__(vae, text_encoder, tokenizer, vae_batch, dtype)
        self.outputs = {"frame_moments": "frames", "prompt_embeds": "prompt"}

    @functools.cached_property
    def embeds_by_text(self) -> dict[str, Tensor]:
        return {}

    def encode(self, output: str, values: Any) -> Tensor:
        if output != "prompt_embeds":
            return super().encode(output, values)
        known = self.embeds_by_text
        if len(known.keys() | set(values)) > REMEMBERED:
            known.clear()
        new = [text for text in dict.fromkeys(values) if text not in known]
        if new:
            known |= dict(zip(new, super().encode(output, new), strict=True))
        return torch.stack([known[text] for text in values])

    def condition(self, batch: dict[str, Any], draws: Draws) -> dict[str, Any]:
        """Adds latents and masked_latents, (B, C, T, h, w), drawn and scaled, and keep, float32 (B, 1, T, h, w).

        batch: masked_frames, uint8 (B, T, 3, H, W), and hole, uint8 (B, T, 1, H, W), 1 in the hole. The networks want
        it the other way round: keep is 1 where the picture is kept, 0 in the hole, of each latent's first pixel.
        Draws: "posterior", "masked posterior".
        """
        masked = self.encode("frame_moments", batch["masked_frames"])
        keep = 1 - batch["hole"][..., :: self.factor, :: self.factor].float()
        made = {
            "latents": self.drawn(batch["frame_moments"], draws, "posterior"),
            "masked_latents": self.drawn(masked, draws, "masked posterior"),
            "keep": keep,
        }
        return {**batch, **{name: value.transpose(1, 2) for name, value in made.items()}}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames, float32 (B, T, 3, H, W) in [0, 1], of scaled latents (B, C, T, h, w)."""
        frames = super().decode(latents.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (len(latents), -1))
