"""BrushNet: its start from a UNet, its parameters at real size, and the variant without attention."""

import torch
from tests.eraser_weights import DESCRIBED, brushnet, unet2d

from vireo.models.brushnet import BrushNetModel
from vireo.models.unet_walk import walk

B, T = 2, 3


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = {"noisy": (B * T, 4, 8, 8), "condition": (B * T, 5, 8, 8), "context": (B, 7, 16)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return made, torch.tensor([37, 811])


def test_names_and_shapes_are_the_published_ones():
    found = {name: list(value.shape) for name, value in BrushNetModel.from_unet(unet2d()).state_dict().items()}
    assert found == DESCRIBED["keys"]["brushnet"]


def test_config_says_what_other_loaders_need():
    config = brushnet().config
    reference = DESCRIBED["brushnet_config"]
    names = ["in_channels", "conditioning_channels", "block_out_channels", "layers_per_block", "norm_num_groups"]
    names += ["cross_attention_dim", "attention_head_dim", "down_block_types", "up_block_types", "mid_block_type"]
    names += ["brushnet_conditioning_channel_order", "conditioning_embedding_out_channels", "global_pool_conditions"]
    for name in names:
        found = config[name]
        assert (list(found) if isinstance(found, tuple) else found) == reference[name], name


def test_a_start_from_a_unet_copies():
    unet = unet2d()
    made = BrushNetModel.from_unet(unet)
    kernel = made.conv_in_condition.weight
    assert torch.equal(kernel[:, :4], unet.conv_in.weight) and torch.equal(kernel[:, 4:8], unet.conv_in.weight)
    assert not kernel[:, 8].any()
    shared = {p.data_ptr() for p in unet.parameters()} & {p.data_ptr() for p in made.parameters()}
    assert not shared, "no parameter is learnt by both, the first bias among them"


def test_a_fresh_one_changes_nothing_and_only_its_zeros_learn_at_first():
    unet = unet2d()
    made = BrushNetModel.from_unet(unet)
    given, timesteps = inputs()
    residuals = made(given["noisy"], timesteps, given["context"], given["condition"], T)
    x = unet.conv_in(given["noisy"])
    alone = walk(unet, x, timesteps, given["context"], T)
    told = walk(unet, x, timesteps, given["context"], T, residuals=residuals)
    assert torch.equal(told, alone)
    told.square().mean().backward()
    moved = {name for name, p in made.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name, _ in made.named_parameters() if name.startswith("brushnet_")}
    assert len(moved) == 56


def test_without_attention():
    """TencentARC's own, told apart by its config."""
    config = {"block_out_channels": (32, 64), "norm_num_groups": 32, "mid_block_type": "MidBlock2D"}
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    made = BrushNetModel(**config, **blocks)
    names = [name for name, _ in made.named_parameters()]
    assert not any("attentions" in name for name in names)
    assert "mid_block.resnets.1.conv1.weight" in names
    given, timesteps = inputs()
    residuals = made(given["noisy"], timesteps, given["context"], given["condition"], T)
    assert len(residuals) == 6 + 1 + 7


def test_parameters_at_real_size():
    with torch.device("meta"):
        made = BrushNetModel(cross_attention_dim=768)
    assert sum(p.numel() for p in made.parameters()) == 886_069_440
    assert len(made.state_dict()) == 738
    assert sum(p.numel() for name, p in made.named_parameters() if name.startswith("brushnet_")) == 26_546_240
