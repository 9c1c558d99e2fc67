"""What a sampler shows of held-out clips, made once, for evaluations that look at every column."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vireo.pixels import to_pixels, to_uint8
from vireo.randomness import Draws
from vireo.sampling.evaluation import Evaluated
from vireo.sampling.sampler import Sampler


class Remembered(Sampler):
    """A sampler that makes each clip's videos once, though scoring and several evaluations ask for them.

    sampler: the recipe's, for evaluations that want more of it than every sampler offers. folder: where the videos are
    kept, in 8 bits, which is all that is measured and shown of them: T x C x H x W bytes a column and clip. For one
    network and one stream of clips, whose positions are the key.
    """

    def __init__(self, sampler: Sampler, folder: Path) -> None:
        self.sampler, self.folder = sampler, folder
        self.unscored = sampler.unscored
        self.names: list[str] = []  # in the sampler's order, which files do not keep

    def knows(self, positions: Sequence[int]) -> bool:
        """Whether the videos of all these positions are there, so that the batch need not be encoded."""
        return all(self._file(position).exists() for position in positions)

    def __call__(self, network: nn.Module, encoder: Any, batch: dict, draws: Draws) -> dict[str, Tensor]:
        """The sampler's columns as 8-bit videos have them, at the first call as at every other."""
        if not self.knows(draws.positions):
            columns = self.sampler(network, encoder, batch, draws)
            self.names = list(columns)
            for row, position in enumerate(draws.positions):
                videos = {name: to_uint8(video[row], low=0.0).cpu().contiguous() for name, video in columns.items()}
                save_file(videos, self._file(position))
        kept = [load_file(self._file(position)) for position in draws.positions]
        return {n: to_pixels(torch.stack([k[n] for k in kept]).to(draws.device), low=0.0) for n in self.names}

    def baselines(self, batch: dict) -> dict[str, Tensor]:
        """The sampler's own, as the rest."""
        return self.sampler.baselines(batch)

    def measure(
        self, network: nn.Module, encoder: Any, batch: dict, columns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return self.sampler.measure(network, encoder, batch, columns)

    def videos(self, network: nn.Module, encoder: Any, batch: dict, draws: Draws) -> dict[str, dict[str, Tensor]]:
        return self.sampler.videos(network, encoder, batch, draws)

    def _file(self, position: int) -> Path:
        return self.folder / f"{position}.safetensors"


@torch.no_grad()
def columns(given: Evaluated) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Of one clip each its batch and the sampler's columns with, where there is a truth, its baselines: (T, C, H, W) in
    [0, 1].

    Columns that are for the eyes only are left out. Everything is drawn as in validation, so these are the videos that
    it scores; what is remembered is not made again.
    """
    sampler = given.sampler
    for index in given.indices:
        batch = given.stream.batch([index], given.device)
        draws = Draws(given.stream.seed, batch["position"], given.device)
        if not (isinstance(sampler, Remembered) and sampler.knows(draws.positions)):
            batch = given.encoder(batch, draws)
        made = sampler(given.network, given.encoder, batch, draws)
        if "target" in made:
            made = {**made, **sampler.baselines(batch)}
        yield batch, {name: video[0] for name, video in made.items() if name not in sampler.unscored}


def scored(videos: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The columns that can be compared with the target: those of its shape."""
    target = videos.get("target")
    if target is None:
        return {}
    return {name: video for name, video in videos.items() if name != "target" and video.shape == target.shape}
