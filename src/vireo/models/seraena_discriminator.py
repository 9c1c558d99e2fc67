"""The discriminator of Seraena: what tells decoded frames from real ones, given the latents they were decoded from.

Source: madebyollin/seraena (https://github.com/madebyollin/seraena), seraena.py; the reference saves the same keys
below `disc.`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vireo import distributed
from vireo.models import taehv_variants

# kernel, stride, and width as a multiple of the first block's
BLOCKS = ((3, 1, 1), (4, 2, 2), (4, 2, 4), (4, 2, 8), (3, 1, 8), (3, 1, 8))
PATCH = 8  # pixels to a score along height and along width


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose statistics are those of all ranks' batches together, on any device.

    torch's own SyncBatchNorm takes GPU tensors only. The ranks' batches have equal shapes.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or distributed.world_size() == 1:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None  # for mypy: nobody switches them off
        assert self.num_batches_tracked is not None and self.momentum is not None
        var, mean = distributed.var_mean(x, dim=(0, 2, 3))
        with torch.no_grad():
            count = x.numel() // x.shape[1] * distributed.world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class SeraenaDiscriminator(nn.Module):
    """Scores of image patches: towards +1 for decoded ones, towards -1 for real ones.

    image_channels: of an image, which may be several frames side by side in its channels. context_channels: of what
    the image is judged by. width: of the first block; 64 is the reference's, smaller ones suit small videos.
    """

    def __init__(self, image_channels: int, context_channels: int, width: int = 64) -> None:
        super().__init__()
        self.image_channels, self.context_channels = image_channels, context_channels
        widths = [image_channels + context_channels, *(width * multiple for _, _, multiple in BLOCKS)]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, kernel, stride, padding=1, bias=False), SyncBatchNorm2d(after), nn.ReLU()
            )
            for (kernel, stride, _), before, after in zip(BLOCKS, widths[:-1], widths[1:], strict=True)
        )
        self.proj = nn.ModuleList(nn.Conv2d(after, 1, 1, bias=False) for after in widths[1:])

    def forward(self, images: Tensor, context: Tensor) -> Tensor:
        """Scores (N, 6, H // 8, W // 8), a map of each block.

        images: (N, image_channels, H, W), pixels around [0, 1]. context: (N, context_channels, h, w), any h and w.
        """
        height, width = images.shape[-2:]
        x = torch.cat([2 * images - 1, F.interpolate(context, (height, width), mode="nearest")], dim=1)
        scores = []
        for block, proj in zip(self.blocks, self.proj, strict=True):
            x = block(x)
            scores.append(F.adaptive_avg_pool2d(proj(x), (height // PATCH, width // PATCH)))
        return torch.cat(scores, dim=1)


def for_taehv(variant: str, group_frames: int, width: int = 64) -> SeraenaDiscriminator:
    """The discriminator of groups of frames that a TAEHV variant decodes, judged by its latents.

    variant: a name of `taehv_variants.VARIANTS`, which tells the latent channels; raises UserError for another.
    group_frames: consecutive frames in one image. width: see SeraenaDiscriminator.
    """
    return SeraenaDiscriminator(3 * group_frames, taehv_variants.find(variant).latent_channels, width)
