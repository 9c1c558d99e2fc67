"""The smallest recipe: a network, a dataset and a loss, to test the loop without any model."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vireo.data.source import Source
from vireo.losses.objective import Loss, Objective
from vireo.models.network import Network
from vireo.pixels import to_pixels
from vireo.randomness import Draws
from vireo.sampling.sampler import Sampler

# What a checkpoint knows beside its tensors.
STATE = {
    "position": 2,
    "skipped": 0,
    "usual_loss": 0.5,
    "losses_seen": 1,
    "global_batch": 2,
    "strategy": {},
    "best": None,
    "frozen": "",
    "tracker_id": None,
    "owes_validation": False,
}


class ToyNetwork(Network):
    """One 3x3 convolution over frames: (B, T, 3, H, W) -> (B, T, 3, H, W)."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, frames: Tensor) -> Tensor:
        return self.last(self.first(frames.flatten(0, 1)).relu()).unflatten(0, frames.shape[:2])

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> list[Path]:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(state), folder / "toy.safetensors")
        return [folder / "toy.safetensors"]

    def load(self, path: Path) -> None:
        from safetensors.torch import load_file

        self.load_state_dict(load_file(path))


class ToyDataset:
    """Random frames of n clips, uint8 (T, 3, S, S), with a random brightness so that draws matter."""

    max_bad_fraction = 0.5

    def __init__(self, n: int = 7, num_frames: int = 2, side: int = 8, split: str = "train") -> None:
        generator = torch.Generator().manual_seed(1)
        self.clips = torch.randint(0, 200, (n, num_frames, 3, side, side), generator=generator, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.clips)

    def sample(self, index: int, draws: Draws) -> dict:
        brightness = draws.integers("brightness", 0, 50)[0].to(torch.uint8)
        return {"frames": self.clips[index] + brightness, "name": f"clip{index}"}

    def sources(self, index: int) -> dict[str, list[Source]]:
        return {}

    def describe(self) -> dict:
        return {"clips": len(self)}


class Denoise(Loss):
    """Mean squared error of predicting a frame from its noisy version; the noise comes from the draws."""

    def __init__(self, poison_at: int | None = None) -> None:
        self.poison_at = poison_at

    def __call__(self, network: nn.Module, batch: dict, draws: Draws) -> Objective:
        frames = to_pixels(batch["frames"])
        noise = draws.normal("noise", *frames.shape[1:])
        error = (network(frames + 0.1 * noise) - frames).square().mean()
        if self.poison_at == draws.step and self.learning:
            error = error * float("nan")
        return Objective(error, {"mse": error.detach()})


class Denoised(Sampler):
    """Sampler of the toy recipe."""

    def __call__(self, network: nn.Module, encoder: object, batch: dict, draws: Draws) -> dict[str, Tensor]:
        frames = to_pixels(batch["frames"])
        return {"target": (frames + 1) / 2, "prediction": (network(frames) + 1) / 2}

    def measure(self, network: nn.Module, encoder: object, batch: dict, columns: dict) -> dict[str, Tensor]:
        return {"brightness": batch["frames"].float().mean(dim=(1, 2, 3, 4))}

    def baselines(self, batch: dict) -> dict[str, Tensor]:
        return {"grey": torch.full(batch["frames"].shape, 0.5)}
