"""TAEHV, the tiny video autoencoder: frames in [0, 1] to the latents of a large video VAE and back.

Source: madebyollin/taehv (https://github.com/madebyollin/taehv); the state dict's keys are the released checkpoints'.

The encoder and the decoder are flat lists of layers. Most of them are 2-D and see every frame alone. Time passes
through three: a MemBlock also sees its own input of the frame before, a TPool merges neighbouring frames, a TGrow makes
frames. What they must remember is little (one frame; the frames of an unfinished group), so a clip can be run whole or
in pieces, with equal results.

B batch, T frames, C channels, H W pixels, t h w latent grid. Between the layers time is the second axis.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vireo.errors import UserError
from vireo.models import taehv_variants, taehv_weights
from vireo.models.network import Network
from vireo.models.taehv_variants import DECODER_WIDTHS, Flags, Variant

Mode = Literal["parallel", "sequential", "chunked"]


def conv(width_in: int, width_out: int, **options) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, 3, padding=1, **options)


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """A 2-D layer on every frame of (B, T, C, H, W)."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Clamp(nn.Module):
    """Soft limit of the latents to (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class Temporal(nn.Module):
    """A layer that sees time: `layer(x, memory) -> (y, memory)` for the next piece x (B, T, C, H, W) of a clip.

    memory: what the layer returned for the piece before, None at the start of a clip.
    """


class MemBlock(Temporal):
    """Residual block over a frame and the one before it (zeros before the first): `relu(conv([x_t, x_{t-1}]) + x_t)`.

    kind: what the convolutions are. "super" blocks (7x7 depthwise) end without the ReLU.
    """

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.last = nn.Identity() if kind == "super" else nn.ReLU(True)
        if kind == "super":
            layers = [
                nn.Conv2d(2 * width, 2 * width, 7, padding=3, groups=2 * width, bias=False),
                nn.Conv2d(2 * width, 4 * width, 1),
                nn.ReLU(True),
                nn.Conv2d(4 * width, width, 1, bias=False),
            ]
        elif kind == "wide":
            groups = 1 if width % 64 else width // 64
            layers = [nn.Conv2d(2 * width, width, 1), nn.ReLU(True), conv(width, width, groups=groups), nn.ReLU(True)]
            layers += [nn.Conv2d(width, width, 1), nn.ReLU(True), conv(width, width, groups=groups)]
        else:
            layers = [conv(2 * width, width), nn.ReLU(True), conv(width, width), nn.ReLU(True), conv(width, width)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        past = torch.zeros_like(x[:, :1]) if past is None else past
        before = torch.cat([past, x[:, :-1]], dim=1)
        return self.last(per_frame(self.conv, torch.cat([x, before], dim=2)) + x), x[:, -1:]


class TPool(Temporal):
    """Merges each `stride` consecutive frames into one by a 1x1 convolution; an unfinished group is remembered."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(stride * width, width, 1, bias=False)

    def forward(self, x: Tensor, rest: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = x if rest is None else torch.cat([rest, x], dim=1)
        groups = x.shape[1] // self.stride
        whole, rest = x[:, : groups * self.stride], x[:, groups * self.stride :]
        return per_frame(self.conv, whole.unflatten(1, (groups, self.stride)).flatten(2, 3)), rest


class TGrow(Temporal):
    """Makes `stride` consecutive frames of each frame by a 1x1 convolution; remembers nothing."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, stride * width, 1, bias=False)

    def forward(self, x: Tensor, memory: None = None) -> tuple[Tensor, None]:
        return per_frame(self.conv, x).unflatten(2, (self.stride, -1)).flatten(1, 2), None


def make_encoder(variant: Variant, width: int, num_memblocks: int) -> nn.Sequential:
    layers: list[nn.Module] = [conv(3 * variant.patch_size**2, width), nn.ReLU(True)]
    for halve in variant.time_downscale:
        layers += [TPool(width, 1 + halve), conv(width, width, stride=2, bias=False)]
        layers += [MemBlock(width, "base") for _ in range(num_memblocks)]
    return nn.Sequential(*layers, conv(width, variant.latent_channels))


def make_decoder(variant: Variant, widths: Sequence[int], num_memblocks: int, space_upscale: Flags) -> nn.Sequential:
    pixels = conv(widths[-1], 3 * variant.patch_size**2)
    stages = zip(widths[:-1], widths[1:], variant.time_upscale, space_upscale, strict=True)
    if variant.block == "super":
        layers: list[nn.Module] = [nn.Conv2d(variant.latent_channels, widths[0], 1, bias=False)]
        for width, following, double, enlarge in stages:
            layers += [MemBlock(width, "super") for _ in range(num_memblocks)]
            layers += [conv(width, following * (1 + enlarge) ** 2), nn.ReLU(True), nn.PixelShuffle(1 + enlarge)]
            layers += [TGrow(following, 1 + double)]
        return nn.Sequential(*layers, pixels)
    layers = [Clamp(), conv(variant.latent_channels, widths[0]), nn.ReLU(True)]
    for width, following, double, enlarge in stages:
        layers += [MemBlock(width, variant.block) for _ in range(num_memblocks)]
        layers += [nn.Upsample(scale_factor=1 + enlarge), TGrow(width, 1 + double), conv(width, following, bias=False)]
    return nn.Sequential(*layers, nn.ReLU(True), pixels)


class TAEHVOutput(NamedTuple):
    """latents: (B, C, t, h, w) of the given frames. frames: (B, K, 3, H, W) decoded. None where not asked for."""

    latents: Tensor | None
    frames: Tensor | None


class TAEHV(Network):
    """The autoencoder of one variant, at its released size or smaller.

    variant: a name of `taehv_variants.VARIANTS`. encoder_width, decoder_widths (four), num_memblocks (in each stage):
    None and the defaults are the released network. decoder_time_upscale, decoder_space_upscale: which of the three
    stages double the frame rate and the side; all off gives a preview of one small frame a latent from full weights
    (in super decoders the side shapes the weights, so only the frame rate can be switched off with released ones).
    gradient_checkpointing: recompute each MemBlock in the backward pass instead of keeping its activations.
    weights: a released or exported file, see `load`; None starts from scratch, from `init`:

    - "he" (default): kaiming-normal convolutions without biases, each MemBlock's last one x 0.2, so that it starts near
      the identity, and the decoder's last x 0.1 around mid-grey. The signal keeps its size.
    - "torch": PyTorch's own and mid-grey, as the published recipe. Without any normalisation layer the latents start
      with a standard deviation below 0.05, and the deeper the network, the longer it takes to leave that state.

    Measured on moving shapes (mean colour 12.6 dB), "he" against "torch": at the released size after 300 steps of 3e-4
    14.1 against 11.5 dB from frames alone, 17.4 against 16.3 dB behind a teacher; with 400 k parameters, one MemBlock
    and 500 steps of 1.5e-3 13.7 against 13.9 and 18.3 against 18.0 dB.

    Raises UserError for an unknown variant, impossible sizes, or weights that do not fit.
    """

    def __init__(
        self,
        variant: str,
        *,
        encoder_width: int = 64,
        decoder_widths: Sequence[int] | None = None,
        num_memblocks: int = 3,
        decoder_time_upscale: Flags | None = None,
        decoder_space_upscale: Flags = (True, True, True),
        gradient_checkpointing: bool = False,
        init: Literal["he", "torch"] = "he",
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.variant = taehv_variants.find(variant)
        if decoder_time_upscale is not None:
            self.variant = dataclasses.replace(self.variant, time_upscale=decoder_time_upscale)
        widths = tuple(decoder_widths or DECODER_WIDTHS[self.variant.block])
        sizes = {"encoder_width": encoder_width, "decoder_widths": widths, "num_memblocks": num_memblocks}
        if len(widths) != 4 or min(*widths, encoder_width, num_memblocks) < 1:
            raise UserError(f"TAEHV takes four decoder_widths, and no size below 1; got {sizes}.")
        if len(self.variant.time_upscale) != 3 or len(decoder_space_upscale) != 3:
            raise UserError(
                "decoder_time_upscale and decoder_space_upscale take three flags each, one a decoder stage."
            )
        if init not in ("he", "torch"):
            raise UserError(f"TAEHV starts from init 'he' or 'torch', got {init!r}.")
        self.gradient_checkpointing = gradient_checkpointing
        self.spatial_upscale = self.variant.patch_size * 2 ** sum(decoder_space_upscale)
        self.encoder = make_encoder(self.variant, encoder_width, num_memblocks)
        self.decoder = make_decoder(self.variant, widths, num_memblocks, decoder_space_upscale)
        if weights is not None:
            self.load(Path(weights))
        else:
            initialize(self, init)

    def forward(
        self,
        frames: Tensor | None = None,
        latents: Tensor | None = None,
        *,
        use_given: Tensor | None = None,
        detach: bool = False,
        decode: bool = True,
        mode: Mode = "parallel",
        chunk: int = 4,
    ) -> TAEHVOutput:
        """All that a training step needs in one call, since a data-parallel wrapper synchronises only `forward`.

        frames: float (B, T, 3, H, W) in [0, 1], encoded. latents: (B, C, t, h, w), decoded. With both, the decoder gets
        the given latents, or, where use_given (B,) is false, the sample's own. With frames alone it gets its own;
        detach keeps its gradient out of the encoder. decode=False stops after encoding. mode, chunk: see `encode`.

        The decoded frames are the clip's first K, not clamped: a clamp has no gradient at saturated pixels.
        Raises UserError if given and own latents differ in shape, or if the length decodes to more frames than it has.
        """
        own = None if frames is None else self.encode(frames, mode, chunk)
        if not decode:
            return TAEHVOutput(own, None)
        mine = own.detach() if own is not None and detach else own
        source = mine if latents is None else latents
        if source is None:
            raise ValueError("TAEHV needs frames to encode or latents to decode")
        if mine is not None and latents is not None:
            if mine.shape != latents.shape:
                raise UserError(
                    f"The given latents are {tuple(latents.shape)} (B, C, t, h, w), but {self.variant.name} makes "
                    f"{tuple(mine.shape)} of the same frames: their teacher is for another variant or length of clip."
                )
            if use_given is not None:
                source = torch.where(use_given.view(-1, 1, 1, 1, 1), latents, mine)
        decoded = self.decode(source, mode, chunk, clamp=False)
        if frames is not None and decoded.shape[1] > frames.shape[1]:
            taehv_variants.check_length(self.variant.name, frames.shape[1])
        return TAEHVOutput(own, decoded)

    def encode(self, frames: Tensor, mode: Mode = "parallel", chunk: int = 4) -> Tensor:
        """Latents (B, C, t, h, w), as the variant's video model uses them, of frames (B, T, 3, H, W) in [0, 1].

        A clip that does not fill its last latent is padded by repeating its last frame.

        mode: "parallel" runs all frames through one layer after the other, and memory grows with T. "chunked" keeps at
        most `chunk` frames in any layer, and memory does not depend on T; "sequential" is a chunk of 1. All agree to
        rounding. Raises UserError for another layout or for sides that are no multiples of the spatial downscale.
        """
        variant, size = self.variant, _frames_at_a_time(mode, chunk)
        self.check_frames(frames)
        x = F.pixel_unshuffle(frames, variant.patch_size)
        missing = -x.shape[1] % (variant.span or variant.frames_per_latent)
        x = torch.cat([x, x[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        latents: list[Tensor] = []
        for span in x.split(variant.span or x.shape[1], dim=1):
            black = torch.zeros_like(span[:, : -span.shape[1] % variant.frames_per_latent])
            latents += self._run(self.encoder, torch.cat([black, span], dim=1), size, {})
        encoded = torch.cat(latents, dim=1)
        return encoded[:, : encoded.shape[1] - variant.surplus_latents].transpose(1, 2)

    def decode(self, latents: Tensor, mode: Mode = "parallel", chunk: int = 4, clamp: bool = True) -> Tensor:
        """Frames (B, K, 3, H, W) of latents (B, C, t, h, w), in [0, 1] if clamped; modes as in `encode`.

        K is `Variant.num_decoded(t)`. H3's latents are decoded as one clip though encoded in spans; where t is not
        5 k + 2, which no clip is encoded to, every frame that exists comes back (the reference fills up with black).
        """
        self.check_latents(latents)
        variant, count = self.variant, latents.shape[2]
        pieces = self._run(self.decoder, latents.transpose(1, 2), _frames_at_a_time(mode, chunk), {})
        frames = F.pixel_shuffle(torch.cat(list(pieces), dim=1), variant.patch_size)
        spans = frames.split((variant.latents_per_span or count) * variant.frames_per_decoded_latent, dim=1)
        frames = torch.cat([span[:, variant.frames_to_trim(count) :] for span in spans], dim=1)
        return frames.clamp(0, 1) if clamp else frames

    def check_frames(self, frames: Tensor) -> None:
        """Raise UserError unless frames are (B, T, 3, H, W) with sides that the variant can encode."""
        side = self.variant.spatial_downscale
        if frames.ndim != 5 or frames.shape[2] != 3 or frames.shape[3] % side or frames.shape[4] % side:
            raise UserError(
                f"{self.variant.name} encodes frames (B, T, 3, H, W) with H and W multiples of {side}, "
                f"got {tuple(frames.shape)}."
            )

    def check_latents(self, latents: Tensor) -> None:
        """Raise UserError unless latents are (B, C, t, h, w) with the variant's C."""
        if latents.ndim != 5 or latents.shape[1] != self.variant.latent_channels:
            raise UserError(
                f"{self.variant.name} decodes latents (B, C, t, h, w) with C = {self.variant.latent_channels}, "
                f"got {tuple(latents.shape)}."
            )

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> list[Path]:
        """Write `<folder>/<variant>.safetensors`: released key names, dtypes as given, the variant in the metadata."""
        return [taehv_weights.save(folder, self.variant.name, self.whole(state))]

    def load(self, path: Path) -> None:
        """Take in a released or exported file, strictly; see `taehv_weights.load`."""
        taehv_weights.load(self, self.variant.name, path)

    def _run(
        self, layers: nn.Sequential, x: Tensor, size: int | None, memory: dict[int, Tensor], start: int = 0
    ) -> Iterator[Tensor]:
        """x (B, T, C, H, W) through the layers from `start` on, at most `size` frames at a time (None: all).

        Depth first: a piece passes all the layers before the next one is touched. So what is alive is one piece a
        change of frame rate, and `memory`: what each layer must know of the pieces before, by its index.
        """
        for index in range(start, len(layers)):
            if size is not None and x.shape[1] > size:
                for piece in x.split(size, dim=1):
                    yield from self._run(layers, piece, size, memory, index)
                return
            x, state = self._layer(layers[index], x, memory.get(index))
            if size is not None and state is not None:
                memory[index] = state.clone()  # a view would keep the whole piece alive
            if x.shape[1] == 0:  # a TPool waits for the rest of its group
                return
        yield x

    def _layer(self, layer: nn.Module, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not isinstance(layer, Temporal):
            return per_frame(layer, x), None
        if self.gradient_checkpointing and isinstance(layer, MemBlock) and torch.is_grad_enabled():
            # A MemBlock as a whole: its inner ReLUs work in place.
            return checkpoint(layer, x, memory, use_reentrant=False)
        return layer(x, memory)


def _frames_at_a_time(mode: Mode, chunk: int) -> int | None:
    sizes: dict[str, int | None] = {"parallel": None, "sequential": 1, "chunked": chunk}
    if mode not in sizes or chunk < 1:
        raise UserError(f"mode must be {', '.join(sizes)} and chunk at least 1, got {mode!r} and {chunk}.")
    return sizes[mode]


@torch.no_grad()
def initialize(network: TAEHV, init: str) -> None:
    """Start values of a network that is trained from scratch; `TAEHV` says what the two kinds are."""
    if init == "he":
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in network.modules():
            if isinstance(module, TPool | TGrow):
                nn.init.kaiming_normal_(module.conv.weight, nonlinearity="linear")
            elif isinstance(module, MemBlock):
                module.conv[-1].get_parameter("weight").mul_(0.2)
        network.decoder[-1].get_parameter("weight").mul_(0.1)
    network.decoder[-1].get_parameter("bias").fill_(0.5)
