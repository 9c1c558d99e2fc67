"""Distances as people see them. Their networks' weights are the user's files; nothing is downloaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vireo.errors import UserError
from vireo.models.taehv_weights import read
from vireo.pixels import as_8_bit
from vireo.sampling.columns import columns, scored
from vireo.sampling.evaluation import Evaluated

SMALLEST = 31  # pixels: smaller pictures end before AlexNet's last layers


class Lpips(nn.Module):
    """LPIPS 0.1 with AlexNet (Zhang et al. 2018, https://github.com/richzhang/PerceptualSimilarity); 0 is equal.

    Sum over five layers of the squared distance of features, normalised over their channels and weighted by channel.
    The weights of the channels are those that torchmetrics ships; AlexNet is written down here, since torchvision,
    which torchmetrics takes it from, is no requirement of vireo.

    alexnet: torchvision's file alexnet-owt-7be5be79.pth, or its tensors as safetensors.
    Raises UserError if it is missing or holds another network.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, alexnet: str | Path) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
        )
        _load(self.features, Path(alexnet).expanduser())
        self.channel_weights = _channel_weights()
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """One distance a picture, float32 (N,). Both (N, 3, H, W) in [0, 1]; raises UserError below 31 x 31 pixels."""
        if min(target.shape[-2:]) < SMALLEST:
            raise UserError(f"LPIPS needs pictures of {SMALLEST}x{SMALLEST} pixels at least, got {tuple(target.shape)}")
        x, y = ((2 * pictures - 1 - self.mean) / self.std for pictures in (prediction, target))
        distance = torch.zeros(len(target), device=target.device)
        weights = iter(self.channel_weights)
        for layer in self.features:
            x, y = layer(x), layer(y)
            if isinstance(layer, nn.ReLU):
                difference = F.normalize(x, eps=1e-10) - F.normalize(y, eps=1e-10)
                distance += (difference.square() * next(weights)).sum(1).mean((1, 2))
        return distance


class PerceptualDistance:
    """LPIPS of every column that can be compared with the target: the mean over frames and clips.

    alexnet: see `Lpips`; None measures nothing and says so.
    """

    def __init__(self, alexnet: str | None = None) -> None:
        self.lpips = None if alexnet is None else Lpips(alexnet)

    @torch.no_grad()
    def __call__(self, given: Evaluated) -> Sequence[Mapping[str, Any]]:
        """A row a column: {"column", "lpips", "note"}; see `vireo.sampling.evaluation.Evaluation`."""
        if self.lpips is None:
            note = "not measured: alexnet names no file; torchvision's alexnet-owt-7be5be79.pth is meant"
            return [{"column": "all", "lpips": None, "note": note}]
        self.lpips.to(given.device)
        found: dict[str, list[float]] = {}
        for _, videos in columns(given):
            target = as_8_bit(videos["target"]) if "target" in videos else None
            for name, video in scored(videos).items():
                found.setdefault(name, []).append(float(self.lpips(as_8_bit(video), target).mean()))
        return [{"column": name, "lpips": sum(each) / len(each), "note": ""} for name, each in found.items()]


def _load(features: nn.Sequential, file: Path) -> None:
    if not file.is_file():
        raise UserError(f"LPIPS: there is no file {file}; torchvision's alexnet-owt-7be5be79.pth is meant")
    state, _ = read(file)
    named = {name.removeprefix("features."): tensor for name, tensor in state.items() if name.startswith("features.")}
    try:
        features.load_state_dict(named)
    except RuntimeError as error:
        raise UserError(f"LPIPS: {file} holds no AlexNet as torchvision names it: {error}") from None


def _channel_weights() -> nn.ParameterList:
    """One (C, 1, 1) for each of the five layers, not negative, from the file in torchmetrics."""
    from torchmetrics.functional.image import lpips

    state, _ = read(Path(lpips.__file__).parent / "lpips_models" / "alex.pth")
    return nn.ParameterList(state[f"lin{layer}.model.1.weight"][0] for layer in range(5))
