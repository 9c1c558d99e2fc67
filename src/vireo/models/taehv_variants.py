"""The TAEHV variants and what they do to the length of a clip. Imports nothing heavy.

Source: madebyollin/taehv. The published code chooses the network by a substring of the checkpoint's file name; here it
is chosen by the variant's name, written down in the config and in the exported file.
"""

import difflib
import math
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from vireo.errors import UserError

Flags = tuple[bool, bool, bool]

DECODER_WIDTHS = {"base": (256, 128, 64, 64), "super": (512, 256, 128, 64), "wide": (1024, 512, 256, 64)}


@dataclass(frozen=True)
class Variant:
    """What distinguishes one released TAEHV from another.

    name: what the released file is called. latents_of: the video models whose latent space it shares.
    patch_size: side of the pixel block that is folded into channels.
    block: kind of decoder block, a key of DECODER_WIDTHS.
    time_downscale, time_upscale: the encoder stages that halve, and the decoder stages that double, the frame rate.
    decodes_in_pairs: CogVideoX decodes its latents two at a time, so an even number of them has no causal first frame
        and nothing is trimmed.
    span: frames that are encoded without those before them, behind black frames that fill up their first latent
        (MiniMax H3: 17 frames, 3 black). None: the whole clip.
    """

    name: str
    latents_of: str
    patch_size: int
    latent_channels: int
    block: str = "base"
    time_downscale: Flags = (True, True, False)
    time_upscale: Flags = (False, True, True)
    decodes_in_pairs: bool = False
    span: int | None = None

    @property
    def spatial_downscale(self) -> int:
        """Pixels to a latent cell along height and along width."""
        return 8 * self.patch_size

    @property
    def frames_per_latent(self) -> int:
        """Frames that the encoder makes one latent of."""
        return 2 ** sum(self.time_downscale)

    @property
    def frames_per_decoded_latent(self) -> int:
        """Frames that the decoder makes of one latent, before trimming."""
        return 2 ** sum(self.time_upscale)

    @property
    def latents_per_span(self) -> int | None:
        return None if self.span is None else math.ceil(self.span / self.frames_per_latent)

    @property
    def surplus_latents(self) -> int:
        """Latents dropped after encoding: those of H3's last span that see only padding, as its clips have 17 k + 5."""
        return 0 if self.span is None else 3

    def num_latents(self, num_frames: int) -> int:
        """Latents of a clip."""
        span = self.span or num_frames
        return math.ceil(num_frames / span) * math.ceil(span / self.frames_per_latent) - self.surplus_latents

    def frames_to_trim(self, num_latents: int) -> int:
        """Frames dropped at the start of the decoded clip, or of each decoded span."""
        return 0 if self.decodes_in_pairs and num_latents % 2 == 0 else self.frames_per_decoded_latent - 1

    def num_decoded(self, num_latents: int) -> int:
        """Frames that decoding gives, after trimming."""
        spans = math.ceil(num_latents / (self.latents_per_span or num_latents))
        return num_latents * self.frames_per_decoded_latent - spans * self.frames_to_trim(num_latents)


ALL: Flags = (True, True, True)
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("taehv", "HunyuanVideo", 1, 16),
        Variant("taew2_1", "Wan 2.1, Wan 2.2 14B, Qwen-Image", 1, 16),
        Variant("taecvx", "CogVideoX", 1, 16, decodes_in_pairs=True),
        Variant("taeos1_3", "Open-Sora 1.3", 1, 16),
        Variant("taew2_2", "Wan 2.2 5B", 2, 48),
        Variant("taew2_2_super", "Wan 2.2 5B", 2, 48, "super"),
        Variant("taehv1_5", "HunyuanVideo 1.5", 2, 32),
        Variant("taehv1_5_super", "HunyuanVideo 1.5", 2, 32, "super"),
        Variant("taeltx_2", "LTX-2", 4, 128, time_downscale=ALL, time_upscale=ALL),
        Variant("taeltx2_3", "LTX-2.3", 4, 128, time_downscale=ALL, time_upscale=ALL),
        Variant("taeltx2_3_wide", "LTX-2.3", 4, 128, "wide", time_downscale=ALL, time_upscale=ALL),
        Variant("taeh3", "MiniMax H3", 2, 24, span=17),
    )
}


def find(name: str) -> Variant:
    """The variant of that name; raises UserError for an unknown one."""
    if name not in VARIANTS:
        close = difflib.get_close_matches(name, VARIANTS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"Unknown TAEHV variant {name!r}.{hint} Known are: {', '.join(VARIANTS)}.")
    return VARIANTS[name]


class Lengths(NamedTuple):
    """latents: latent frames of a clip. decoded: frames that come back from them, which are the clip's first ones."""

    latents: int
    decoded: int


def lengths(name: str, num_frames: int) -> Lengths:
    """What the variant of that name makes of a clip of num_frames frames. Raises UserError below one frame."""
    if num_frames < 1:
        raise UserError(f"A clip for {name} has at least one frame, got num_frames={num_frames}.")
    variant = find(name)
    latents = variant.num_latents(num_frames)
    return Lengths(latents, variant.num_decoded(latents))


def is_legal(name: str, num_frames: int) -> bool:
    """True where a clip comes back with as many frames as it has.

    These are the lengths of the variant's own video model: 4 k + 1, for LTX 8 k + 1, for CogVideoX 8 k and 8 k + 1, for
    H3 17 k + 5. Of a clip of any other length frames are lost, or more come back than it had.
    """
    return num_frames > 0 and lengths(name, num_frames).decoded == num_frames


def nearest_legal(name: str, num_frames: int) -> list[int]:
    """The nearest legal lengths from num_frames down (if there is one) and up; one length if num_frames is legal."""
    below = next((n for n in range(num_frames, 0, -1) if is_legal(name, n)), None)
    above = next(n for n in count(max(num_frames, 1)) if is_legal(name, n))
    return sorted({above, below or above})


def check_size(name: str, height: int, width: int) -> None:
    """Raise UserError unless both sides are multiples of what the variant's latents stand for.

    An unknown variant is `check_length`'s to report.
    """
    if name not in VARIANTS:
        return  # check_length says so
    side = VARIANTS[name].spatial_downscale
    odd = [f"{key}={value}" for key, value in (("height", height), ("width", width)) if value % side]
    if odd:
        nearest = sorted({max(side, value // side * side + step) for value in (height, width) for step in (0, side)})
        raise UserError(
            f"{' and '.join(odd)} cannot be encoded by {name}: its latents stand for {side}x{side} pixels. "
            f"Use multiples of {side}, such as {' or '.join(map(str, nearest))}"
        )


def check_length(name: str, num_frames: int) -> None:
    """Raise UserError, which names the nearest legal lengths, unless a clip of num_frames frames comes back whole."""
    if not is_legal(name, num_frames):
        latents, decoded = lengths(name, num_frames)
        raise UserError(
            f"num_frames={num_frames} does not suit {name} ({find(name).latents_of}): its {latents} latents decode to "
            f"{decoded} frames. Set num_frames to {' or '.join(map(str, nearest_legal(name, num_frames)))}."
        )
