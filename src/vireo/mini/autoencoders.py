"""The four small autoencoders that stand for AutoencoderKL, CogVideoX's and Wan's VAEs and TAEHV, and how each learns.

All have 8x space; the video ones also 4x time and sixteen latent channels. Each has fewer than 500,000 parameters, so
that its weights take less than 1 MB in half precision. What makes such small networks learn quickly: many cheap steps
before few expensive ones, that is single frames or 32x32 crops first and 64x64 clips last. Video networks start as
image networks applied to every frame, so that what was learnt from single frames holds when clips begin.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vireo.randomness import Draws

WEIGHTS = Path(__file__).parent / "weights"
Autoencoder = Any  # an nn.Module with encode and decode, which diffusers' stubs do not say of its own


class Stage(NamedTuple):
    """`steps` optimizer steps on `batch` clips of `frames` consecutive frames, cropped to size x size."""

    steps: int
    batch: int
    frames: int
    size: int
    earliest: int = 0  # the first frame that a clip may begin with; the later, the more moves


class Recipe(NamedTuple):
    build: Callable[[], Autoencoder]
    reconstruct: Callable[[Autoencoder, Tensor, Draws | None], "Reconstruction"]
    stages: list[Stage]
    muon_lr: float  # of hidden convolutions
    adamw_lr: float  # of the convolutions that touch pixels, biases and norms
    kl_weight: float
    folder: str
    before_video: Callable[[Autoencoder], None] = lambda network: None  # called between single frames and clips
    restart: int | None = None  # the step at which the learning rate warms up once more, to half its peak


def build_kl() -> Autoencoder:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=64,
    )


def build_cogvideox() -> Autoencoder:
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 16, 24, 24),
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_height=64,
        sample_width=64,
    )


def build_wan() -> Autoencoder:
    """Starts as an image network applied to every frame: taps that look back in time are zero.

    Wan pads time with zeros, so single frames train the last tap only, and the others would enter the first video
    step at random.
    """
    from diffusers import AutoencoderKLWan

    network: Autoencoder = AutoencoderKLWan(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 2, 3, 3],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
    )
    for name, module in network.named_modules():
        if not isinstance(module, nn.Conv3d):
            continue
        if module.kernel_size[0] == 3:
            nn.init.zeros_(module.weight[:, :, :-1])
        if name.endswith("time_conv"):  # starts by taking every second frame, or by repeating every frame
            copies = module.out_channels // module.in_channels
            module.weight.data[:, :, -1, 0, 0] = torch.eye(module.in_channels).repeat(copies, 1)
            nn.init.zeros_(module.get_parameter("bias"))
        module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)  # a third faster
    return network


TAEHV_ARGUMENTS: dict = {"encoder_width": 36, "decoder_widths": [56, 40, 32, 24], "num_memblocks": 1}


def build_taehv() -> Autoencoder:
    """Starts as an image network too: MemBlocks ignore the past. See `share_time_slots`."""
    from vireo.models.taehv import TAEHV, MemBlock

    network = TAEHV("taecvx", **TAEHV_ARGUMENTS)
    for module in network.modules():
        if isinstance(module, MemBlock):
            present_and_past = module.get_parameter("conv.0.weight")  # (width, 2 * width, 3, 3)
            nn.init.zeros_(present_and_past.chunk(2, dim=1)[1])
    return network


@torch.no_grad()
def share_time_slots(network: Autoencoder) -> None:
    """Copy what TGrow's last frame has learnt to the ones before it, which are trimmed from a single frame's decode."""
    from vireo.models.taehv import TGrow

    for module in network.modules():
        if isinstance(module, TGrow):
            last = module.conv.weight[-module.conv.in_channels :]
            module.conv.weight.copy_(last.repeat(module.stride, 1, 1, 1))


class Reconstruction(NamedTuple):
    clips: Tensor  # (B, T, C, H, W), black -1, white 1
    latents: Tensor  # channels second
    penalty: Tensor  # mean KL divergence from a standard normal, per latent element


def reconstruct_frames(network: Autoencoder, clips: Tensor, draws: Draws | None) -> Reconstruction:
    frames, latents, kl = reconstruct_pixels(network, clips.flatten(0, 1), draws)
    return Reconstruction(frames.unflatten(0, clips.shape[:2]), latents, kl)


def reconstruct_video(network: Autoencoder, clips: Tensor, draws: Draws | None) -> Reconstruction:
    video, latents, kl = reconstruct_pixels(network, clips.transpose(1, 2), draws)
    return Reconstruction(video.transpose(1, 2), latents, kl)


def reconstruct_pixels(network: Autoencoder, pixels: Tensor, draws: Draws | None) -> Reconstruction:
    """Encode, draw from the posterior (without draws: take its mean), decode, in the layout of diffusers."""
    posterior = network.encode(pixels).latent_dist
    latents = mean = posterior.mean
    if draws is not None:
        noise = draws.normal("posterior", len(mean) // len(draws.positions), *mean.shape[1:]).flatten(0, 1)
        latents = mean + posterior.std * noise
    kl = 0.5 * (mean.square() + posterior.logvar.exp() - 1 - posterior.logvar).mean()
    return Reconstruction(network.decode(latents).sample, latents, kl)


def reconstruct_taehv(network: Autoencoder, clips: Tensor, draws: Draws | None) -> Reconstruction:
    """TAEHV's pixels are in [0, 1]. It has no posterior; of the divergence remains the square of the latents."""
    latents, frames = network(clips / 2 + 0.5)
    return Reconstruction(2 * frames - 1, latents, latents.square().mean() / 2)


def build_student() -> Autoencoder:
    """The shipped autoencoder of the recipe "taehv", to go on from."""
    from vireo.models.taehv import TAEHV

    return TAEHV("taecvx", **TAEHV_ARGUMENTS, weights=str(WEIGHTS / "taehv_autoencoder"))


@functools.cache
def teacher() -> Autoencoder:
    """The shipped CogVideoX VAE, frozen."""
    from diffusers import AutoencoderKLCogVideoX

    folder = WEIGHTS / "autoencoder_kl_cogvideox"
    return AutoencoderKLCogVideoX.from_pretrained(folder, torch_dtype=torch.float32).eval().requires_grad_(False)


def distill_taehv(network: Autoencoder, clips: Tensor, draws: Draws | None) -> Reconstruction:
    """The published recipe without its adversarial term: encode to the teacher's raw latents, decode from them.

    The penalty is the mean squared error of the latents.
    """
    target = teacher().encode(clips.transpose(1, 2)).latent_dist.mean
    latents, frames = network(clips / 2 + 0.5, target)
    return Reconstruction(2 * frames - 1, latents, torch.nn.functional.mse_loss(latents, target))


RECIPES = {
    "kl": Recipe(
        build=build_kl,
        reconstruct=reconstruct_frames,
        stages=[Stage(2500, 16, 1, 32), Stage(1000, 8, 1, 64)],
        muon_lr=0.02,
        adamw_lr=4e-3,
        kl_weight=2e-4,
        folder="autoencoder_kl",
    ),
    "cogvideox": Recipe(
        build=build_cogvideox,
        reconstruct=reconstruct_video,
        stages=[Stage(800, 16, 1, 32), Stage(1300, 4, 9, 32), Stage(1000, 2, 9, 64), Stage(1000, 2, 9, 64, earliest=9)],
        restart=3100,
        muon_lr=0.02,
        adamw_lr=4e-3,
        kl_weight=1e-4,
        folder="autoencoder_kl_cogvideox",
    ),
    "wan": Recipe(
        build=build_wan,
        reconstruct=reconstruct_video,
        stages=[Stage(800, 16, 1, 32), Stage(1800, 4, 9, 32), Stage(1400, 2, 9, 64)],
        muon_lr=0.02,
        adamw_lr=3e-3,
        kl_weight=1e-4,
        folder="autoencoder_kl_wan",
    ),
    "taehv": Recipe(
        build=build_taehv,
        reconstruct=reconstruct_taehv,
        stages=[
            Stage(2500, 16, 1, 32),
            Stage(250, 4, 9, 32),
            Stage(2750, 4, 9, 32, earliest=6),
            Stage(600, 2, 9, 64, earliest=6),
        ],
        muon_lr=0.01,
        adamw_lr=3e-3,
        kl_weight=1e-4,
        folder="taehv_autoencoder",
        before_video=share_time_slots,
    ),
    # What stands for the released taecvx: the network above, taught the latents of the CogVideoX VAE above.
    "taehv_distilled": Recipe(
        build=build_student,
        reconstruct=distill_taehv,
        stages=[Stage(350, 4, 9, 32, earliest=6), Stage(100, 2, 9, 64, earliest=6)],
        muon_lr=0.01,
        adamw_lr=3e-3,
        kl_weight=1.0,
        folder="taehv",
    ),
}
