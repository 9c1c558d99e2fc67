"""The Inception network of FID and Inception Score, as converted from the TensorFlow release of December 2015.

It differs from torchvision's: 1008 classes, averages that do not count the padding, a maximum in the last block's pool,
and pictures enlarged as TensorFlow 1 did. Layers and key names: Szegedy et al. 2016 (https://arxiv.org/abs/1512.00567),
file format: https://github.com/mseitzer/pytorch-fid.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vireo.errors import UserError
from vireo.models.taehv_weights import read

FILE = "pt_inception-2015-12-05-6726825d.pth"
SIDE = 299
Kernel = int | tuple[int, int]
Conv = tuple[str, int, int, Kernel]  # name, channels in, out, kernel


class InceptionOutput(NamedTuple):
    """features: (N, 2048), of FID. logits: (N, 1008) without the bias, of the Inception Score."""

    features: Tensor
    logits: Tensor


class Inception(nn.Module):
    """float32, frozen, in evaluation mode. weights: the file FILE. Raises UserError if it is another or missing."""

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _Reduction(
            [[("branch3x3", 288, 384, 3)], _path("branch3x3dbl", 288, (64, 1), (96, 3), (96, 3))]
        )
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _c(128), _c(160), _c(160), _c(192)
        seven = _path("branch7x7x3", 768, (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3))
        self.Mixed_7a = _Reduction([_path("branch3x3", 768, (192, 1), (320, 3)), seven])
        self.Mixed_7b, self.Mixed_7c = _Forked(1280, "average"), _Forked(2048, "maximum")
        self.fc = nn.Linear(2048, 1008)
        _load(self, Path(weights).expanduser())
        self.eval().requires_grad_(False)

    def forward(self, pictures: Tensor) -> InceptionOutput:
        """pictures: uint8 (N, 3, H, W)."""
        x = (_enlarged(pictures.float()) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        features = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean(dim=(2, 3))
        return InceptionOutput(features, features @ self.fc.weight.T)


class _Convolution(nn.Module):
    def __init__(self, channels: int, width: int, kernel: Kernel, stride: int = 1, padding: Any = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class _Branches(nn.Module):
    """Chains of convolutions on the same input, stacked on the channels."""

    def __init__(self, chains: Sequence[Sequence[Conv]]) -> None:
        super().__init__()
        self.chains = [[name for name, *_ in chain] for chain in chains]
        for name, channels, width, kernel in (each for chain in chains for each in chain):
            self.add_module(name, self.convolution(name, channels, width, kernel))

    def convolution(self, name: str, channels: int, width: int, kernel: Kernel) -> _Convolution:
        padding = kernel // 2 if isinstance(kernel, int) else tuple(side // 2 for side in kernel)
        return _Convolution(channels, width, kernel, padding=padding)

    def run(self, x: Tensor, names: Sequence[str]) -> Tensor:
        for name in names:
            x = self.get_submodule(name)(x)
        return x


class _Mixed(_Branches):
    """The last chain sees the local averages of the input."""

    def forward(self, x: Tensor) -> Tensor:
        inputs = [x] * (len(self.chains) - 1) + [_average(x)]
        return torch.cat([self.run(value, chain) for value, chain in zip(inputs, self.chains, strict=True)], dim=1)


class _Reduction(_Branches):
    """Half the size: each chain ends with a stride of 2; the local maxima of the input are stacked behind them."""

    def convolution(self, name: str, channels: int, width: int, kernel: Kernel) -> _Convolution:
        if name not in {chain[-1] for chain in self.chains}:
            return super().convolution(name, channels, width, kernel)
        return _Convolution(channels, width, kernel, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*(self.run(x, chain) for chain in self.chains), F.max_pool2d(x, 3, 2)], dim=1)


class _Forked(_Branches):
    """Two of the chains end in a row and a column of three, side by side. pool: what the last chain sees."""

    def __init__(self, channels: int, pool: str) -> None:
        forks: list[Conv] = []
        for name in ("branch3x3_2", "branch3x3dbl_3"):
            forks += [(f"{name}a", 384, 384, (1, 3)), (f"{name}b", 384, 384, (3, 1))]
        first = [("branch1x1", channels, 320, 1), ("branch3x3_1", channels, 384, 1)]
        double = _path("branch3x3dbl", channels, (448, 1), (384, 3))
        super().__init__([[first[0]], [first[1]], double, forks, [("branch_pool", channels, 192, 1)]])
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        one, three, double, fork, last = self.chains
        pooled = _average(x) if self.pool == "average" else F.max_pool2d(x, 3, 1, 1)
        stems = [stem for stem in (self.run(x, three), self.run(x, double)) for _ in range(2)]
        forked = [self.run(stem, [name]) for stem, name in zip(stems, fork, strict=True)]
        return torch.cat([self.run(x, one), *forked, self.run(pooled, last)], dim=1)


def _path(name: str, channels: int, *layers: tuple[int, Kernel]) -> list[Conv]:
    """A chain of convolutions name_1, name_2, … of (width, kernel) each."""
    widths = [channels, *(width for width, _ in layers)]
    return [(f"{name}_{n + 1}", widths[n], width, kernel) for n, (width, kernel) in enumerate(layers)]


def _a(channels: int, pooled: int) -> _Mixed:
    five, double = (64, 5), _path("branch3x3dbl", channels, (64, 1), (96, 3), (96, 3))
    first, last = ("branch1x1", channels, 64, 1), ("branch_pool", channels, pooled, 1)
    return _Mixed([[first], _path("branch5x5", channels, (48, 1), five), double, [last]])


def _c(width: int) -> _Mixed:
    row, column = (1, 7), (7, 1)
    seven = _path("branch7x7", 768, (width, 1), (width, row), (192, column))
    double = _path("branch7x7dbl", 768, (width, 1), (width, column), (width, row), (width, column), (192, row))
    return _Mixed([[("branch1x1", 768, 192, 1)], seven, double, [("branch_pool", 768, 192, 1)]])


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _enlarged(pictures: Tensor) -> Tensor:
    """(N, 3, H, W) to 299 x 299, bilinear, with pixel corners aligned at the upper left as in TensorFlow 1."""
    for axis in (2, 3):
        count = pictures.shape[axis]
        places = torch.arange(SIDE, dtype=torch.float32, device=pictures.device) * (count / SIDE)
        low = places.long()
        shape = [1, 1, 1, 1]
        shape[axis] = SIDE
        fraction = (places - low).view(shape)
        lower, upper = (pictures.index_select(axis, at.clamp(max=count - 1)) for at in (low, low + 1))
        pictures = lower + (upper - lower) * fraction
    return pictures


def _load(network: nn.Module, file: Path) -> None:
    if not file.is_file():
        raise UserError(f"Inception: there is no file {file}; {FILE} of pytorch-fid is meant")
    state, _ = read(file)
    missing, unexpected = network.load_state_dict(state, strict=False) if _fits(network, state) else (["fc"], [])
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]  # older files have none
    if missing or unexpected:
        raise UserError(
            f"Inception: {file} is another network than {FILE}; missing {missing[:3]}, too many {unexpected[:3]}"
        )


def _fits(network: nn.Module, state: dict[str, Tensor]) -> bool:
    own = network.state_dict()
    return all(own[name].shape == value.shape for name, value in state.items() if name in own)
