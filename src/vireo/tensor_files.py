"""Weights in files of others: tensors and nothing else, and never more memory than the file is long.

safetensors checks its header against the file's length before a tensor is made. A file of torch.save is read with
`weights_only=True`, so that no code in it is run. But its tensors may claim any shape: one of four bytes can be
expanded to terabytes, and an entry of its archive can be compressed. Both are refused before anything is copied.
"""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vireo.errors import UserError

PICKLED = (".pt", ".pth")


def read(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a file holds by name, on the CPU, and its metadata (of safetensors only).

    Of safetensors these are tensors; torch.save may have stored dictionaries of them, and plain values beside them.
    Raises UserError for what is damaged, holds objects, or claims more than it has.
    """
    import safetensors
    import torch

    try:
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, framework="pt") as opened:
                names = opened.keys()
                return {name: opened.get_tensor(name) for name in names}, opened.metadata() or {}
        is_archive = zipfile.is_zipfile(file)  # what torch before 1.6 wrote is none, and cannot be mapped
        if is_archive:
            _refuse_compressed(file)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_archive)
    except UserError:
        raise
    except Exception as error:  # of pickle, zipfile, torch or safetensors, whatever is damaged
        raise UserError(
            f"{file} cannot be read as weights ({type(error).__name__}). Either it is damaged, then fetch it again, or "
            "it holds pickled objects, which are not loaded since they can run code: save the state dict alone."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no state dict: expected tensors by name.")
    _refuse_claims(file, content)
    return content, {}


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, by its header alone. Raises UserError for a damaged one."""
    import safetensors

    try:
        return header_shapes(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{file} cannot be read as weights ({error}): fetch it again") from error


def header_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """As `shapes`, for callers with words of their own: raises OSError, or SafetensorError for a damaged file.

    safetensors compares the header with the file's length. Torch is not imported: the launcher's parent verifies too.
    """
    import safetensors

    with safetensors.safe_open(file, framework="np") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 - no dict


def _refuse_compressed(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise UserError(f"{file} is not what torch.save writes: {packed[0]} in it is compressed. It is not read.")


def _refuse_claims(file: Path, content: Mapping[Any, Any]) -> None:
    """Tied weights share their memory, so a file may claim more than it has, but not several times as much."""
    size, claimed = file.stat().st_size, sum(t.numel() * t.element_size() for t in _tensors(content))
    if claimed > 4 * size:
        raise UserError(f"{file}: {size} bytes, but its tensors claim to have {claimed}. It is not read.")


def _tensors(content: Any) -> Iterator[Any]:
    from torch import Tensor

    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _tensors(value)
