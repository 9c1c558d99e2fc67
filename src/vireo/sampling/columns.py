"""What a sampler shows of held-out clips, one after the other, for evaluations that look at every column."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vireo.models.encoders import Encoder
from vireo.randomness import Draws


@torch.no_grad()
def columns(
    network: nn.Module, encoder: Encoder, sampler: Any, stream: Any, indices: Sequence[int], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The sampler's columns and, where there is a truth, its baselines of one clip each: (T, C, H, W) in [0, 1].

    Those that are for the eyes only are left out.

    sampler, stream, indices: as an evaluation is given them (`vireo.validation.Evaluation`). Everything is drawn as
    in validation, so these are the videos that it scores.
    """
    for index in indices:
        batch = stream.batch([index], device)
        draws = Draws(stream.seed, batch["position"], device)
        batch = encoder(batch, draws)
        made = sampler(network, encoder, batch, draws)
        if "target" in made:
            made = {**made, **sampler.baselines(batch)}
        yield {name: video[0] for name, video in made.items() if name not in sampler.unscored}


def scored(videos: dict[str, Tensor]) -> dict[str, Tensor]:
    """The columns that can be compared with the target: those of its shape."""
    target = videos.get("target")
    if target is None:
        return {}
    return {name: video for name, video in videos.items() if name != "target" and video.shape == target.shape}
