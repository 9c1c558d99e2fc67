"""TAEHV on a clip that comes piece by piece and may never end: a camera, a world model, a film.

Source: madebyollin/taehv (https://github.com/madebyollin/taehv), whose streaming never trims CogVideoX's clips and
refuses MiniMax H3's; here both keep the rules that they have when run whole. A stream holds what the layers must know
of the frames before, so the memory and the work of a piece do not grow with the clip. However the clip is cut, the
results are those of `TAEHV.encode` and `TAEHV.decode` on the whole of it, to rounding.

All state is the stream's: a network serves any number of them, each with B clips abreast. Gradients are not kept.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vireo.errors import UserError
from vireo.models.taehv import TAEHV


class EncoderStream:
    """Frames to latents: `torch.cat([*map(stream.push, pieces), stream.finish()], dim=2)` is `encode(clip)`.

    chunk: frames at most in any layer at a time. Long pieces are faster and take more memory with a larger one.
    Raises UserError if it is below 1.
    """

    def __init__(self, network: TAEHV, chunk: int = 4) -> None:
        _check_chunk(chunk)
        self.network, self.chunk = network, chunk
        self._begin()

    def _begin(self) -> None:
        self.num_frames = 0
        self.memory: dict[int, Tensor] = {}
        self.layout: tuple[int, ...] | None = None  # of the frames, without time
        self.last = torch.empty(0)  # the newest frame, to pad with
        self.held: Tensor | None = None  # the newest latents, surplus if the clip ends here

    @torch.no_grad()
    def push(self, frames: Tensor) -> Tensor:
        """The clip's next frames (B, n, 3, H, W) in [0, 1], n >= 0; returns the latents (B, C, k, h, w) now complete.

        k is 0 while a latent lacks frames. Of MiniMax H3 the newest three latents are always held back, since the last
        three of a clip are dropped. Raises UserError for frames that the variant cannot encode or of another shape
        than those before.
        """
        self.network.check_frames(frames)
        self.layout = _same_layout(frames, 1, self.layout)
        variant = self.network.variant
        height, width = (side // variant.spatial_downscale for side in frames.shape[3:])
        latents = [frames.new_empty(len(frames), 0, variant.latent_channels, height, width)]
        if self.held is not None:
            latents.append(self.held)
        if frames.shape[1]:
            self.last = frames[:, -1:].clone()
            for piece in self._pieces(F.pixel_unshuffle(frames, variant.patch_size)):
                latents += self.network._run(self.network.encoder, piece, self.chunk, self.memory)
        complete = torch.cat(latents, dim=1)
        ready = max(0, complete.shape[1] - variant.surplus_latents)
        self.held = complete[:, ready:].clone()
        return complete[:, :ready].transpose(1, 2)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """End the clip; returns its last latents (B, C, k, h, w), which repeat the last frame where they lack some.

        The next frame that is pushed begins another clip. Raises UserError if no frame was pushed.
        """
        if not self.num_frames:
            raise UserError("finish ends a clip, but no frame was pushed.")
        variant = self.network.variant
        missing = -self.num_frames % (variant.span or variant.frames_per_latent)
        latents = self.push(self.last.expand(-1, missing, -1, -1, -1))
        self._begin()
        return latents

    def _pieces(self, x: Tensor) -> Iterator[Tensor]:
        """x (B, n, C, H, W), n > 0, cut where H3's spans end; each span starts afresh behind black frames."""
        variant = self.network.variant
        span = variant.span or self.num_frames + x.shape[1]
        first = span - self.num_frames % span
        for piece in (x[:, :first], *x[:, first:].split(span, dim=1)):
            if not piece.shape[1]:
                return
            starts = variant.span is not None and self.num_frames % span == 0
            self.num_frames += piece.shape[1]
            if starts:
                self.memory.clear()
                black = torch.zeros_like(piece[:, :1]).expand(-1, -span % variant.frames_per_latent, -1, -1, -1)
                piece = torch.cat([black, piece], dim=1)
            yield piece


class DecoderStream:
    """Latents to frames: `torch.cat([*map(stream.push, pieces), stream.finish()], dim=1)` is `decode(latents)`.

    num_latents: of the clip, if it is known. Only CogVideoX's rule needs it: of an odd number of latents the first
        three frames are dropped, of an even number they are not. Without it they are withheld until `finish`, which
        then returns the clip's FIRST frames, so that it goes in front: `torch.cat([finished, *pushed], dim=1)`. For
        the other variants nothing is ever withheld, and both orders are the same.
    chunk: as in EncoderStream. clamp: to [0, 1].
    Raises UserError if num_latents or chunk is below 1.
    """

    def __init__(self, network: TAEHV, num_latents: int | None = None, *, chunk: int = 4, clamp: bool = True) -> None:
        _check_chunk(chunk)
        if num_latents is not None and num_latents < 1:
            raise UserError(f"A clip has at least one latent, got num_latents={num_latents}.")
        self.network, self.expected, self.chunk, self.clamp = network, num_latents, chunk, clamp
        self._begin()

    def _begin(self) -> None:
        self.num_latents = 0
        self.memory: dict[int, Tensor] = {}
        self.layout: tuple[int, ...] | None = None  # of the latents, without time
        self.withheld = torch.empty(0)

    @torch.no_grad()
    def push(self, latents: Tensor) -> Tensor:
        """The clip's next latents (B, C, k, h, w), k >= 0; returns their frames (B, n, 3, H, W), without the trimmed.

        Raises UserError for latents of another variant, of another shape than those before, or more than num_latents.
        """
        network, variant = self.network, self.network.variant
        network.check_latents(latents)
        self.layout = _same_layout(latents, 2, self.layout)
        first, count = self.num_latents, latents.shape[2]
        if self.expected is not None and first + count > self.expected:
            raise UserError(f"The stream is for num_latents={self.expected}, but {first + count} were pushed.")
        self.num_latents += count
        height, width = (side * network.spatial_upscale for side in latents.shape[3:])
        nothing = latents.new_empty(len(latents), 0, 3, height, width)
        if first == 0:
            self.withheld = nothing
        if count == 0:
            return nothing
        pieces = network._run(network.decoder, latents.transpose(1, 2), self.chunk, self.memory)
        frames = F.pixel_shuffle(torch.cat(list(pieces), dim=1), variant.patch_size)
        frames = frames.clamp(0, 1) if self.clamp else frames

        trim = variant.frames_to_trim(self.expected or 1)
        each = variant.frames_per_decoded_latent
        span = each * (variant.latents_per_span or self.num_latents)
        places = torch.arange(first * each, self.num_latents * each, device=frames.device) % span
        if variant.decodes_in_pairs and self.expected is None and first == 0:
            self.withheld = frames[:, :trim].clone()
        return frames[:, places >= trim]

    def finish(self) -> Tensor:
        """End the clip; returns the frames (B, n, 3, H, W) that were withheld and are not trimmed, or n = 0.

        The next latent that is pushed begins another clip. Raises UserError if there was none, or not num_latents.
        """
        if not self.num_latents:
            raise UserError("finish ends a clip, but no latent was pushed.")
        if self.expected not in (None, self.num_latents):
            raise UserError(f"The stream is for num_latents={self.expected}, but {self.num_latents} were pushed.")
        frames = self.withheld[:, self.network.variant.frames_to_trim(self.num_latents) :]
        self._begin()
        return frames


def _check_chunk(chunk: int) -> None:
    if chunk < 1:
        raise UserError(f"chunk must be at least 1, got {chunk}.")


def _same_layout(x: Tensor, time: int, before: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of x without its axis of time; raises UserError if that of the pieces before was another."""
    layout = (*x.shape[:time], *x.shape[time + 1 :])
    if before not in (None, layout):
        raise UserError(
            f"The stream's pieces so far were {before} (batch, channels, height, width), this one is {layout}: "
            "finish the clip, or open another stream."
        )
    return layout
