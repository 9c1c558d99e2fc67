"""Which lengths of a clip a teacher, the frozen VAE behind a TAEHV, can represent. Imports nothing heavy.

Every VAE of diffusers accepts any length and silently does something else with the frames that do not fill its last
latent: Wan's ignores them, CogVideoX's pools all frames in another rhythm than it ever does in generation. A student
that is trained on such clips learns latents that no video model makes.
"""

import logging
from itertools import count
from typing import NamedTuple

from vireo.errors import UserError
from vireo.models import taehv_variants
from vireo.models.taehv_variants import VARIANTS

log = logging.getLogger(__name__)


class Family(NamedTuple):
    """VAEs with the same rhythm in time.

    classes: their names in diffusers. twin: the variant that was released for them, which has their lengths.
    """

    classes: tuple[str, ...]
    twin: str


FAMILIES = {
    "cogvideox": Family(("AutoencoderKLCogVideoX",), "taecvx"),
    "wan": Family(("AutoencoderKLWan",), "taew2_1"),
    "hunyuan": Family(("AutoencoderKLHunyuanVideo", "AutoencoderKLHunyuanVideo15"), "taehv"),
    "ltx": Family(("AutoencoderKLLTXVideo", "AutoencoderKLLTX2Video"), "taeltx_2"),
}


class Plan(NamedTuple):
    """What becomes of a clip of some length.

    latents: latent frames, the teacher's and the student's alike. decoded: frames that either makes of them.
    target: the frames of the clip that these are compared with. pad: copies of the clip's last frame with which the
    student's encoder fills its last latent.
    """

    latents: int
    decoded: int
    target: slice
    pad: int


def find(name: str) -> Family:
    """The family of that name; raises UserError for an unknown one."""
    if name not in FAMILIES:
        raise UserError(f"Unknown family of teachers {name!r}; there are {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def plan(num_frames: int, variant: str, family: str, strict_lengths: bool = True) -> Plan:
    """How clips of num_frames frames go through a student of that variant and a teacher of that family.

    The target is the clip's first frames: latent k ends at frame 4 k, and decoding drops the frames before the first.
    Against the last ones a decoder would learn to predict the future.

    Raises UserError, which names the nearest legal lengths, where the teacher or the student would not give back as
    many frames as the clip has. strict_lengths=False accepts, with a warning, lengths of which both give back the same
    first frames, such as the published recipe's 12 (HunyuanVideo 1.5's and LTX-2's VAEs refuse them themselves).
    """
    student, twin = taehv_variants.find(variant), taehv_variants.find(find(family).twin)
    fitting = [v.name for v in VARIANTS.values() if _rhythm(v) == _rhythm(twin)]
    if variant not in fitting:
        raise UserError(
            f"{variant} cannot learn from a teacher of family {family}, which makes one latent of "
            f"{twin.frames_per_latent} frames. Variants that can: {', '.join(fitting)}."
        )
    own, teachers = taehv_variants.lengths(variant, num_frames), taehv_variants.lengths(twin.name, num_frames)
    if own.decoded != num_frames or teachers != own:
        nearest = " or ".join(map(str, _nearest(num_frames, variant, twin.name)))
        fault = (
            f"num_frames={num_frames} does not suit {variant} with a teacher of family {family} (latents: "
            f"{own.latents}; frames that the teacher decodes of them: {teachers.decoded}, the student: {own.decoded})"
        )
        if teachers != own or own.decoded > num_frames:
            raise UserError(f"{fault}. Set num_frames to {nearest}.")
        if strict_lengths:
            raise UserError(
                f"{fault}. Set num_frames to {nearest}; or accept it, as the published 12 must be, by "
                "+model.checks.num_frames.strict_lengths=false."
            )
        log.warning(
            "%s. The last %d frames are compared with nothing, and the latents may be none that the teacher's video "
            "model makes; num_frames=%s has neither fault.",
            *(fault, num_frames - own.decoded, nearest),
        )
    return Plan(own.latents, own.decoded, slice(0, own.decoded), -num_frames % student.frames_per_latent)


def longest(limit: int, variant: str, family: str | None = None) -> int:
    """The longest clip of at most `limit` frames that comes back whole from the variant, and from a teacher of family.

    Raises UserError, which names the shortest one, if all are longer.
    """
    names = [variant, *([] if family is None else [find(family).twin])]
    legal = [n for n in range(1, limit + 1) if all(taehv_variants.is_legal(name, n) for name in names)]
    if not legal:
        shortest = next(n for n in count(1) if all(taehv_variants.is_legal(name, n) for name in names))
        raise UserError(
            f"no clip of {limit} frames or less comes back whole from {variant}; the shortest has {shortest}"
        )
    return legal[-1]


def check_length(name: str, num_frames: int, family: str, strict_lengths: bool = True) -> None:
    """Raise UserError unless clips of num_frames frames suit the variant of that name and its teacher; see `plan`."""
    plan(num_frames, name, family, strict_lengths)


def _rhythm(variant: taehv_variants.Variant) -> tuple[int, int, int | None]:
    return variant.frames_per_latent, variant.frames_per_decoded_latent, variant.span


def _nearest(num_frames: int, *variants: str) -> list[int]:
    """The nearest lengths, below (there is always 1) and above, that come back whole from all these variants."""

    def legal(num_frames: int) -> bool:
        return all(taehv_variants.is_legal(name, num_frames) for name in variants)

    return [next(filter(legal, range(num_frames, 0, -1))), next(filter(legal, count(num_frames)))]
