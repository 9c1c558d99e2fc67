"""Networks in folders as diffusers and transformers save them: config.json and safetensors, read strictly.

A pipeline's folder has one such folder for each of its parts (`unet/`, `vae/`, `text_encoder/`); wherever a part is
asked for, the pipeline's folder does as well.
"""

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vireo import json_files, tensor_files
from vireo.digests import file_digest
from vireo.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # diffusers' and transformers' names
VERSIONS = ("transformers_version", "dtype", "torch_dtype")  # of a config, what is no part of the function


class Part(NamedTuple):
    """The folder of one network, its config.json and its weights files (several, where they are sharded)."""

    folder: Path
    config: dict[str, Any]
    weights: list[Path]

    def identity(self, unused: Collection[str] = ()) -> str:
        """Names the network by its config and its weights' content, wherever it lies; no weights are loaded.

        unused: names in the config that what is computed does not depend on.
        """
        left_out = {*VERSIONS, *unused}
        config = {name: value for name, value in self.config.items() if name[:1] != "_" and name not in left_out}
        return digest(json.dumps(config, sort_keys=True), self.weights)


def count(weights: list[Path]) -> int:
    """How many numbers safetensors files hold, by their headers."""
    return sum(math.prod(shape) for file in weights for shape in tensor_files.shapes(file).values())


def find_config(path: str | Path, name: str, key: str) -> tuple[Path, dict[str, Any]]:
    """The folder of the network `name` in `path`/`name` or in `path` itself, and its config.

    key: what the user sets to another folder, for the message of the UserError where there is none.
    """
    outer = Path(path).expanduser()
    folder = outer / name if (outer / name / CONFIG).is_file() else outer
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{key}={path} has no {name}: there is neither {outer / name / CONFIG} nor {outer / CONFIG}. Set {key} to "
            "a folder as diffusers saves it; `huggingface-cli download <name> --local-dir <folder>` gives one."
        )
    return folder, json_files.read(folder / CONFIG)


def find(path: str | Path, name: str, key: str) -> Part:
    """As `find_config`, with the weights' files. Raises UserError where these are missing or not safetensors."""
    folder, config = find_config(path, name, key)
    for weights in WEIGHTS:
        if (folder / weights).is_file():
            return Part(folder, config, [folder / weights])
        if (folder / f"{weights}.index.json").is_file():
            files = _shards(folder / f"{weights}.index.json")
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise UserError(f"{folder} lacks {', '.join(missing)}, which its index names; fetch them again.")
            return Part(folder, config, files)
    present = ", ".join(sorted(file.name for file in folder.iterdir() if file.name != CONFIG)) or "nothing else"
    raise UserError(
        f"{folder} has no weights: beside {CONFIG} there is {present}. Only safetensors are read "
        f"({' or '.join(WEIGHTS)}), since pickled files (.bin, .pt, .pth, .ckpt) can run code."
    )


def _shards(index: Path) -> list[Path]:
    """The files that an index names, which lie beside it. Raises UserError for others."""
    try:
        names = sorted(set(json_files.read(index)["weight_map"].values()))
        others = [name for name in names if Path(name).name != name]
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of weights: it has no weight_map, {{tensor: file}}") from error
    if others:
        raise UserError(f"{index} names {others[0]}, which does not lie beside it: only files of its folder are read")
    return [index.with_name(name) for name in names]


def find_tokenizer(path: str | Path) -> Path:
    """`path`/tokenizer, the folder `path` itself, or the one beside it in a pipeline. Raises UserError for none."""
    outer = Path(path).expanduser()
    places = [outer / "tokenizer", outer, outer.parent / "tokenizer"]
    for place in places:
        if (place / "tokenizer_config.json").is_file():
            return place
    raise UserError(
        f"There is no tokenizer in {', '.join(map(str, places))}. Set model.encoder.tokenizer to a folder with "
        "tokenizer_config.json and the vocabulary."
    )


def load(part: Part, kind: Any, dtype: torch.dtype) -> Any:
    """The network of class `kind` on the CPU, in evaluation mode. Raises UserError for weights that do not fit it."""
    from safetensors import SafetensorError

    if kind.__module__.startswith("transformers"):
        from transformers.utils import logging

        logging.disable_progress_bar()  # of tensors, in milliseconds: it only spoils logs
    try:
        network, report = kind.from_pretrained(
            part.folder, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{part.folder}: the weights of this {kind.__name__} cannot be loaded: {error}") from error
    # Both libraries fill up what a file lacks with random numbers, and only warn. CLIP's position_ids are no weights.
    found = {fault: [str(key) for key in keys if "position_ids" not in str(key)] for fault, keys in report.items()}
    faults = [f"{len(keys)} {fault} ({keys[0]}, …)" for fault, keys in found.items() if keys]
    if faults:
        raise UserError(f"{part.folder}: the weights do not fit {CONFIG}: {'; '.join(faults)}. Fetch both again.")
    return network.eval()


def save(network: Any, state: Mapping[str, Tensor], folder: Path, max_shard_size: str = "10GB") -> None:
    """Write a diffusers network's config and the given weights into one folder, which is made.

    As its `save_pretrained` does: one safetensors file, or shards and their index. The config does not tell where the
    network was loaded from, a folder of this machine.
    """
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(network.to_json_string())
    config.pop("_name_or_path", None)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    pattern = WEIGHTS[0].replace(".safetensors", "{suffix}.safetensors")
    # On a CPU, ZeRO's weights are pieces of one buffer, which files cannot share.
    own = {n: v if v.untyped_storage().nbytes() == v.nbytes else v.clone() for n, v in state.items()}
    save_torch_state_dict(own, folder, filename_pattern=pattern, max_shard_size=max_shard_size)


def tensors(part: Part) -> dict[str, Tensor]:
    """All weights by name, as they are stored."""
    return {name: value for file in part.weights for name, value in tensor_files.read(file)[0].items()}


def load_strictly(network: nn.Module, state: Mapping[str, Tensor], source: str | Path, assign: bool = False) -> None:
    """`load_state_dict`. Raises UserError with what is missing, unexpected, or of another shape."""
    try:
        network.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        raise UserError(f"{source} does not fit this network: {error}") from None


def below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def digest(text: str, files: list[Path]) -> str:
    """Hash of a text and of files' contents; a file is read again only when its size or time has changed."""
    total = hashlib.blake2b(text.encode(), digest_size=16)
    for file in files:
        total.update(bytes.fromhex(file_digest(file)))
    return total.hexdigest()
