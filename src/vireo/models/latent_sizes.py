"""Which sizes of pictures and clips suit the latents of a VAE; judged before torch is imported."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from vireo.errors import UserError

log = logging.getLogger(__name__)

FRAMES = 8  # that CogVideoX's VAE takes at a time, after the first one
PIXELS = 8  # height and width of what one latent of it stands for


def check_size(height: int, width: int, multiple: int = 8) -> None:
    """Raise UserError unless both sides are multiples of what one latent stands for, 8 pixels in Stable Diffusion."""
    odd = [f"{name}={value}" for name, value in (("height", height), ("width", width)) if value % multiple]
    if odd:
        nearest = sorted({max(multiple, v // multiple * multiple + s) for v in (height, width) for s in (0, multiple)})
        raise UserError(
            f"{' and '.join(odd)} cannot be encoded: one latent stands for {multiple}x{multiple} pixels. Use multiples "
            f"of {multiple}, such as {' or '.join(map(str, nearest))}."
        )


def check_clips(
    num_frames: int,
    height: int,
    width: int,
    transformer: str,
    buckets: Sequence[Sequence[int]] | None = None,
    learned_positions: bool = True,
) -> None:
    """Raise UserError unless clips of these shapes suit a CogVideoX, naming the nearest legal values.

    transformer: folder as diffusers saves it, or a pipeline's; what its config says is read if it is there. buckets:
    further shapes (num_frames, height, width). Lengths are 8 N + 1, sides multiples of 8 pixels times the patch size;
    a learned position table takes the size that it was learnt for alone, unless `learned_positions` is false. Other
    lengths than the weights have seen get a warning; 1.5, whose tokens are two latent frames, has seen more than the
    length that its config names.
    """
    config = _config(Path(transformer).expanduser())
    if not learned_positions:
        config["use_learned_positional_embeddings"] = False
    problems: list[str] = []
    for shape in [(num_frames, height, width), *(buckets or ())]:
        if len(shape) != 3:
            raise UserError(f"a bucket is [num_frames, height, width], got {list(shape)}")
        frames, *size = shape
        problems += _faults(frames, size[0], size[1], config)
    lengths = {num_frames, *(shape[0] for shape in buckets or ())}
    known = config.get("sample_frames", max(lengths))
    if max(lengths) > known and config.get("patch_size_t") is None:
        says = "clips of %d frames: these weights were trained on %d, and quality falls with more"
        log.warning(says, max(lengths), known)
    if config.get("use_learned_positional_embeddings") and lengths != {known}:
        log.warning("learnt positions are of clips of %d frames alone: computed ones take their place", known)
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))


def _faults(num_frames: int, height: int, width: int, config: dict) -> list[str]:
    """What is wrong with one shape."""
    found, multiple = [], PIXELS * config.get("patch_size", 2)
    if num_frames % FRAMES != 1:
        below = max(1, (num_frames - 1) // FRAMES * FRAMES + 1)
        found.append(f"num_frames={num_frames} is not 8 N + 1: {below} or {below + FRAMES} are the nearest")
    for name, side in (("height", height), ("width", width)):
        if side < multiple or side % multiple:
            near = [places * multiple for places in (side // multiple, side // multiple + 1) if places]
            found.append(f"{name}={side} is not a multiple of {multiple}: {' or '.join(map(str, near))}")
    if config.get("use_learned_positional_embeddings"):
        native = [PIXELS * config[f"sample_{name}"] for name in ("height", "width")]
        if native != [height, width]:
            found.append(
                f"{height}x{width} pixels: these weights have learnt positions of {native[0]}x{native[1]} alone; "
                "model.network.learned_positions=false takes them away"
            )
    return found


def _config(folder: Path) -> dict:
    """The transformer's config, empty where there is none: whoever loads the weights says so."""
    for file in (folder / "transformer" / "config.json", folder / "config.json"):
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
    return {}
