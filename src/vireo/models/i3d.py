"""The Inflated Inception network of VFID, which was trained on Kinetics-400 to name actions.

Carreira and Zisserman 2017 (https://arxiv.org/abs/1705.07750); layers' names and file format:
https://github.com/piergiaj/pytorch-i3d. Papers on video inpainting take its features as ProPainter does.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vireo.errors import UserError
from vireo.models.taehv_weights import read

FILE = "i3d_rgb_imagenet.pt"
Triple = tuple[int, int, int]

# Widths of a module's four branches: 1x1; 1x1, 3x3; 1x1, 3x3; 1x1 behind a maximum.
MIXED = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}
POOLED = {"4b": (3, 2), "5b": (2, 2)}  # before these modules: side and stride of the maximum in time and space
CLASSES = 400


class I3D(nn.Module):
    """float32, frozen, in evaluation mode. weights: the file FILE. Raises UserError if it is another or missing."""

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, 64, (7, 7, 7), (2, 2, 2))
        self.Conv3d_2b_1x1 = _Unit(64, 64, (1, 1, 1))
        self.Conv3d_2c_3x3 = _Unit(64, 192, (3, 3, 3))
        channels = 192
        for name, widths in MIXED.items():
            self.add_module(f"Mixed_{name}", _Mixed(channels, widths))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = _Unit(channels, CLASSES, (1, 1, 1), normalised=False)  # in the file, of no use here
        _load(self, Path(weights).expanduser())
        self.eval().requires_grad_(False)

    def forward(self, video: Tensor) -> Tensor:
        """Features (B, 1024), the mean over places and times, of a video (B, T, 3, H, W) in [0, 1].

        The network was trained on [-1, 1] and 224 x 224; published figures are of [0, 1] and any size, as here.
        """
        x = self.Conv3d_1a_7x7(video.transpose(1, 2))
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(_maximum(x, (1, 3, 3), (1, 2, 2))))
        x = _maximum(x, (1, 3, 3), (1, 2, 2))
        for name in MIXED:
            if name in POOLED:
                side, stride = POOLED[name]
                x = _maximum(x, (side,) * 3, (stride,) * 3)
            x = self.get_submodule(f"Mixed_{name}")(x)
        return x.mean(dim=(2, 3, 4))


class _Unit(nn.Module):
    """A convolution that keeps ceil(size / stride) places, as TensorFlow's "SAME" does; batch norm and ReLU."""

    def __init__(
        self, channels: int, width: int, kernel: Triple, stride: Triple = (1, 1, 1), normalised: bool = True
    ) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels, width, kernel, stride, bias=not normalised)
        if normalised:
            self.bn = nn.BatchNorm3d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv3d.kernel_size, self.conv3d.stride
        return self.bn(self.conv3d(_padded(x, kernel, stride))).relu()


class _Mixed(nn.Module):
    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        one, few, three, fewer, other, pooled = widths
        self.b0 = _Unit(channels, one, (1, 1, 1))
        self.b1a, self.b1b = _Unit(channels, few, (1, 1, 1)), _Unit(few, three, (3, 3, 3))
        self.b2a, self.b2b = _Unit(channels, fewer, (1, 1, 1)), _Unit(fewer, other, (3, 3, 3))
        self.b3b = _Unit(channels, pooled, (1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.b3b(_maximum(x, (3, 3, 3), (1, 1, 1)))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), pooled], dim=1)


def _maximum(x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """Missing places count as 0, which is what the published code does."""
    return F.max_pool3d(_padded(x, kernel, stride), kernel, stride)


def _padded(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """With zeros, the odd one behind."""
    missing = [max(k - (n % s or s), 0) for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    return F.pad(x, [side for total in reversed(missing) for side in (total // 2, total - total // 2)])


def _load(network: nn.Module, file: Path) -> None:
    if not file.is_file():
        raise UserError(f"I3D: there is no file {file}; {FILE} of pytorch-i3d is meant")
    state, _ = read(file)
    own = network.state_dict()
    strange = [name for name, value in state.items() if name not in own or own[name].shape != value.shape]
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    if strange or missing:
        raise UserError(f"I3D: {file} is another network than {FILE}; missing {missing[:3]}, too many {strange[:3]}")
    network.load_state_dict(state, strict=False)
