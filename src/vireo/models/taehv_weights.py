"""Reading and writing TAEHV weights: `.pth` and `.safetensors` under the released checkpoints' key names.

The shapes of a state dict say which network it is for, whatever the file is called. They are compared with the network
that is asked for, so that a contradiction is told in words and not as a list of keys.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from vireo import tensor_files
from vireo.errors import UserError
from vireo.models.taehv_variants import VARIANTS

SUFFIXES = (".safetensors", ".pth", ".pt")
FACTS = ("patch_size", "latent_channels", "block", "time_downscale", "time_upscale")  # of a Variant, seen in shapes
POOL, GROW = r"encoder\.(\d+)\.conv\.weight", r"decoder\.(\d+)\.conv\.weight"


def find_file(path: Path, variant: str) -> Path:
    """The weights file that is meant by `path`: itself, itself without one of SUFFIXES, or `<variant>` in that folder.

    Raises UserError, naming what was looked for, if there is none.
    """
    path = path.expanduser()
    path = path / variant if path.is_dir() else path
    candidates = [path] if path.suffix in SUFFIXES else [Path(f"{path}{suffix}") for suffix in SUFFIXES]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(
        f"No TAEHV weights found; looked for {', '.join(map(str, candidates))}. The released files are at "
        "https://github.com/madebyollin/taehv; set weights to one of them, or to null to train from scratch."
    )


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State dict and metadata of a weights file. Only tensors are read; no code in a pickle is run.

    A state dict below the key `state_dict` and names that start with `module.` are understood.
    Raises UserError for a file that is damaged or holds anything but tensors.
    """
    state, metadata = tensor_files.read(file)
    if isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items()):
        raise UserError(f"{file} holds no state dict: expected tensors by name.")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}, metadata


def describe(state: Mapping[str, Tensor]) -> dict[str, object]:
    """The network that a state dict is for: the facts of its `Variant` and the widths that `TAEHV` takes.

    Raises UserError if it is no TAEHV's.
    """
    encoder, pools = _by_index(state, r"encoder\.(\d+)\.weight"), _by_index(state, POOL)
    decoder, grows = _by_index(state, r"decoder\.(\d+)\.weight"), _by_index(state, GROW)
    if not (encoder and decoder and len(pools) == len(grows) == 3):
        raise UserError(
            f"not the weights of a TAEHV: three layers encoder.<i>.conv and three decoder.<i>.conv change the frame "
            f"rate there, here are {len(pools)} and {len(grows)}. The first keys are {sorted(state)[:3]}."
        )
    (first, *_, latents), (widest, *_, pixels) = encoder.values(), decoder.values()
    is_super = 0 in decoder  # no Clamp before the first convolution
    grown = [weight.shape[1] for weight in grows.values()]
    first_pool, second_pool, _ = pools
    return {
        "patch_size": round((first.shape[1] / 3) ** 0.5),
        "latent_channels": latents.shape[0],
        "block": "super" if is_super else "wide" if "decoder.3.conv.6.weight" in state else "base",
        "time_downscale": tuple(weight.shape[1] > weight.shape[0] for weight in pools.values()),
        "time_upscale": tuple(weight.shape[0] > weight.shape[1] for weight in grows.values()),
        "encoder_width": first.shape[0],
        "decoder_widths": (widest.shape[0], *grown) if is_super else (*grown, pixels.shape[1]),
        "num_memblocks": second_pool - first_pool - 2,  # a stage is a TPool, a convolution and the MemBlocks
    }


def load(network: nn.Module, variant: str, path: Path) -> None:
    """Load a weights file into a TAEHV of that variant, strictly; half precision is converted to the network's own.

    One difference is legal: where the network does not grow in time (a cheap preview) and the file does, the rows that
    make each group's last frame are kept. path: see `find_file`. Raises UserError where the file is for another variant
    or has other widths.
    """
    file = find_file(path, variant)
    state, metadata = read(file)
    own = network.state_dict()
    try:
        _check(variant, metadata, found=describe(state), expected=describe(own))
        for name in own:
            if re.fullmatch(GROW, name):
                state[name] = state[name][-own[name].shape[0] :]
        network.load_state_dict(state)
    except (UserError, RuntimeError) as error:
        raise UserError(f"{file}: {error}") from None


def save(folder: Path, variant: str, state: Mapping[str, Tensor]) -> Path:
    """Write `<folder>/<variant>.safetensors`: the tensors as they are; variant and widths in the metadata."""
    file = folder / f"{variant}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    facts = {name: json.dumps(value) for name, value in describe(state).items()}
    save_file({n: t.contiguous() for n, t in state.items()}, file, {"format": "pt", "variant": variant, **facts})
    return file


def _check(variant: str, metadata: dict[str, str], found: dict, expected: dict) -> None:
    if metadata.get("variant", variant) != variant:
        raise UserError(
            f"its metadata says variant {metadata['variant']}, the network is variant {variant}. Set the one that the "
            "file is, or take another file: even where the shapes agree, the latents mean something else."
        )
    holds = [name for name, known in VARIANTS.items() if all(getattr(known, key) == found[key] for key in FACTS)]
    if all(theirs >= ours for theirs, ours in zip(found["time_upscale"], expected["time_upscale"], strict=True)):
        found = {**found, "time_upscale": expected["time_upscale"]}
    wrong = [f"{key} is {found[key]}, not {expected[key]}" for key in expected if found[key] != expected[key]]
    if wrong:
        kind = f"the shapes of variant {' or '.join(holds)}" if holds else "the shapes of no known variant"
        raise UserError(
            f"does not fit the network, which is variant {variant}: {'; '.join(wrong)}. The file has {kind}. "
            "Set variant, encoder_width, decoder_widths and num_memblocks to what the file holds, or take another file."
        )


def _by_index(state: Mapping[str, Tensor], pattern: str) -> dict[int, Tensor]:
    """The tensors whose name matches, by the layer's index in ascending order."""
    matches = [match for match in (re.fullmatch(pattern, name) for name in state) if match]
    return {int(match[1]): state[match[0]] for match in sorted(matches, key=lambda match: int(match[1]))}
