"""BrushNet: a second UNet that sees the masked picture and tells the first one at every layer what to paint.

Ju et al. 2024 (https://arxiv.org/abs/2403.06976, https://github.com/TencentARC/BrushNet); with all the cross-attention
in it, as in DiffuEraser (https://github.com/lixiaowen-xw/DiffuEraser), or without, as published first.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vireo.models.unet_walk import walk


class BrushNetModel(ModelMixin, ConfigMixin):
    """The trunk of a UNet2DConditionModel with a wider first convolution and a 1x1 convolution for each site.

    in_channels, conditioning_channels: of the noisy latent; of the masked picture's latent and the mask, together.
    mid_block_type: "UNetMidBlock2DCrossAttn", or "MidBlock2D" for the one without attention.
    brushnet_conditioning_channel_order, conditioning_embedding_out_channels, global_pool_conditions: only kept, since
        other loaders want to read them.
    The others are UNet2DConditionModel's; so are the names of the parameters of the trunk.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        conditioning_channels: int = 5,
        down_block_types: Sequence[str] = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        mid_block_type: str = "UNetMidBlock2DCrossAttn",
        up_block_types: Sequence[str] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        cross_attention_dim: int = 1280,
        attention_head_dim: int = 8,
        brushnet_conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: Sequence[int] = (16, 32, 96, 256),
        global_pool_conditions: bool = False,
    ) -> None:
        super().__init__()
        trunk: Any = UNet2DConditionModel(
            in_channels=in_channels + conditioning_channels,
            down_block_types=tuple(down_block_types),
            up_block_types=tuple(up_block_types),
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            cross_attention_dim=cross_attention_dim,
            attention_head_dim=attention_head_dim,
        )
        if mid_block_type == "MidBlock2D":
            trunk.mid_block.attentions = nn.ModuleList()
        self.conv_in_condition = trunk.conv_in
        self.time_proj, self.time_embedding = trunk.time_proj, trunk.time_embedding
        self.down_blocks, self.mid_block, self.up_blocks = trunk.down_blocks, trunk.mid_block, trunk.up_blocks
        down = [block_out_channels[0]]
        up = []
        for number, (width, mirrored) in enumerate(zip(block_out_channels, reversed(block_out_channels), strict=True)):
            resampled = number < len(block_out_channels) - 1
            down += [width] * (layers_per_block + resampled)
            up += [mirrored] * (layers_per_block + 1 + resampled)
        self.brushnet_down_blocks = nn.ModuleList(map(_zero_convolution, down))
        self.brushnet_mid_block = _zero_convolution(block_out_channels[-1])
        self.brushnet_up_blocks = nn.ModuleList(map(_zero_convolution, up))

    @classmethod
    @torch.no_grad()
    def from_unet(cls, unet: UNet2DConditionModel) -> "BrushNetModel":
        """A BrushNet that adds nothing yet: the UNet's trunk, copied, with 1x1 convolutions of zeros.

        The first convolution sees noisy and masked latent with the UNet's kernels, and the mask with zeros.
        """
        given: Any = unet
        names = ["in_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block"]
        names += ["norm_num_groups", "cross_attention_dim", "attention_head_dim"]
        made = cls(**{name: given.config[name] for name in names})
        kernel = given.conv_in.weight
        wide = torch.cat([kernel, kernel, torch.zeros_like(kernel[:, :1])], dim=1)
        made.conv_in_condition.load_state_dict({"weight": wide, "bias": given.conv_in.bias})  # copies
        for name in ("time_embedding", "down_blocks", "mid_block", "up_blocks"):
            getattr(made, name).load_state_dict(getattr(given, name).state_dict())
        return made

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        context: Tensor,
        condition: Tensor,
        num_frames: int = 1,
        gradient_checkpointing: bool = False,
    ) -> list[Tensor]:
        """What the UNet adds at its sites, in their order (see `vireo.models.unet_walk`).

        noisy: (B * T, 4, h, w). condition: (B * T, 5, h, w), the masked picture's latent and the mask, 1 where the
        picture is kept and 0 in the hole. timesteps: int64 (B,). context: (B, L, D). num_frames: T.
        """
        features: list[Tensor] = []
        x = self.conv_in_condition(torch.cat([noisy, condition], dim=1))
        walk(
            self,
            x,
            timesteps,
            context,
            num_frames,
            features=features,
            gradient_checkpointing=gradient_checkpointing,
        )
        convolutions = [*self.brushnet_down_blocks, self.brushnet_mid_block, *self.brushnet_up_blocks]
        return [convolve(x) for convolve, x in zip(convolutions, features, strict=True)]


def _zero_convolution(width: int) -> nn.Conv2d:
    made = nn.Conv2d(width, width, 1)
    nn.init.zeros_(made.weight)
    assert made.bias is not None
    nn.init.zeros_(made.bias)
    return made
