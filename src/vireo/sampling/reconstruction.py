"""An autoencoder's clips as they come back, beside the originals."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vireo.models import taehv_variants
from vireo.models.taehv import Mode
from vireo.pixels import to_pixels
from vireo.randomness import Draws
from vireo.sampling.sampler import Sampler


class Reconstruction(Sampler):
    """Encodes a clip and decodes the network's own latents.

    mode, chunk: how many frames are run at a time, see `TAEHV.encode`; "chunked" for long or large clips.
    variant: where clips may be longer than what comes back of them, the variant that says how much that is, so that the
        baselines have the target's length. None: clips come back whole.

    Columns are float32 (B, K, 3, H, W) in [0, 1]; K is the number of frames that come back, which are the first ones.
    """

    def __init__(self, mode: Mode = "parallel", chunk: int = 4, variant: str | None = None) -> None:
        self.mode = mode
        self.chunk = chunk
        self.variant = variant

    @torch.no_grad()
    def __call__(self, network: nn.Module, encoder: object, batch: dict, draws: Draws) -> dict[str, Tensor]:
        """batch: frames, uint8 (B, T, 3, H, W). Nothing is drawn, and no frozen encoder is needed."""
        frames = to_pixels(batch["frames"], low=0.0)
        prediction = network(frames, mode=self.mode, chunk=self.chunk).frames.float().clamp(0, 1)
        return {"target": frames[:, : prediction.shape[1]], "prediction": prediction}

    def baselines(self, batch: dict) -> dict[str, Tensor]:
        """What one gets without a network: each clip's mean colour; each frame at an eighth of its size and back."""
        frames = to_pixels(batch["frames"], low=0.0)
        if self.variant is not None:
            frames = frames[:, : taehv_variants.lengths(self.variant, frames.shape[1]).decoded]
        height, width = frames.shape[-2:]
        small = F.interpolate(frames.flatten(0, 1), size=(height // 8, width // 8), mode="area")
        enlarged = F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)
        return {
            "mean colour": frames.mean(dim=(1, 3, 4), keepdim=True).expand_as(frames),
            "8x down and up": enlarged.unflatten(0, frames.shape[:2]),
        }
