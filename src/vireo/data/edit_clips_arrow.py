"""Edited clips as a Hugging Face dataset on disk: what `save_to_disk` wrote, with the published recipe's features.

`input_frames` are paths of the 20 frames before the edit, `edited_image` is the picture after it, with its bytes.
Paths are relative to a folder that the dataset's description records (`vireo.data.edit_clips_conversion`), or
absolute in datasets of the published converter.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from vireo.data.edit_clips import NUM_FRAMES, EditClip, Frame, Listing, named_parts, numbers
from vireo.data.listing import inside
from vireo.errors import UserError

MARKER = "dataset_dict.json"  # in a folder that `DatasetDict.save_to_disk` wrote


def features() -> Any:
    """The columns of each split, `datasets.Features`."""
    from datasets import Features, Image, Sequence, Value

    return Features(
        {
            "input_frames": Sequence(Value("string"), length=NUM_FRAMES - 1),
            "edit_prompt": Value("string"),
            "edited_image": Image(),
        }
    )


def list_arrow(folder: Path, frames_root: Path | None = None, allow_outside_root: bool = False) -> Listing:
    """The clips of all splits, checked without opening a picture; the edited one stays in the mapped file.

    frames_root: the folder that paths start from, in place of the recorded one; absolute paths are then looked for in
    it too, from their split's name on. allow_outside_root: whether frames may lie elsewhere, as absolute paths without
    frames_root do. Left out, with the reason: clips without text, without edited picture, or with a missing frame. A
    clip that a split lists again, say with another text, is named "<clip> (2)".
    Raises UserError for a folder that holds something else, for other columns, and for frames that are not where the
    dataset says.
    """
    splits = open_splits(folder)
    root = _root(folder, splits, frames_root, allow_outside_root)
    clips, left_out = [], []
    for split, table in splits.items():
        seen: Counter[str] = Counter()
        rows, has_picture = table.select_columns(["input_frames", "edit_prompt"])[:], _has_picture(table)
        for row, (written, prompt) in enumerate(zip(rows["input_frames"], rows["edit_prompt"], strict=True)):
            name, _, task = named_parts(PurePosixPath(written[0]).parent)
            name = name or f"{split}/row_{row:05d}"
            seen[name] += 1
            name = name if seen[name] == 1 else f"{name} ({seen[name]})"
            paths = [root / (_from_split(path) if frames_root is not None else path) for path in written]
            try:
                for parent in {path.parent for path in paths}:
                    inside(root, parent, allow_outside_root)
            except ValueError as error:
                left_out.append(f"{name}: {error}")
                continue
            missing = [number for number, path in enumerate(paths) if path.name not in _names_in(path.parent)]
            if missing:
                left_out.append(f"{name}: {numbers(missing)} missing, looked for as {paths[missing[0]]}")
            elif not (prompt or "").strip():
                left_out.append(f"{name}: has no instruction")
            elif not has_picture[row]:
                left_out.append(f"{name}: has no edited_image")
            else:
                target = paths[-1].with_name(f"{NUM_FRAMES - 1:02d}{paths[-1].suffix}")
                frames = [Frame(path, partial(Path.read_bytes, path)) for path in paths]
                edited = Frame(target, partial(_edited_image, table, row), is_inside=True)
                clips.append(EditClip(name, split, prompt, task, (*frames, edited)))
    return Listing(clips, left_out)


def open_splits(folder: Path) -> dict[str, Any]:
    """The splits, `datasets.Dataset` by name, mapped into memory; pictures stay encoded. Raises UserError."""
    from datasets import DatasetDict, Image, load_from_disk

    try:
        splits = load_from_disk(str(folder))
    except Exception as error:  # of pyarrow, json, or datasets itself, whatever is damaged
        raise UserError(f"{folder} cannot be read as a dataset that save_to_disk wrote: {error}") from error
    if not isinstance(splits, DatasetDict):
        raise UserError(f"{folder} is one split: expected the folder above it, with train and test in it")
    for name, split in splits.items():
        if split.features != features():
            raise UserError(
                f"{folder / name} has other columns.\nfound    {dict(split.features)}\nexpected {dict(features())}"
            )
    return {name: split.cast_column("edited_image", Image(decode=False)) for name, split in splits.items()}


def _has_picture(table: Any) -> list[bool]:
    """Of each row, by the lengths of its bytes alone."""
    import pyarrow.compute

    column = table.select_columns("edited_image").with_format("arrow")[:]["edited_image"]
    lengths = pyarrow.compute.binary_length(pyarrow.compute.struct_field(column, "bytes"))
    return [bool(length) for length in lengths.to_pylist()]


def _edited_image(table: Any, row: int) -> bytes:
    content = (table[row]["edited_image"] or {}).get("bytes")
    if not content:
        raise FileNotFoundError(None, "the row has no edited_image")
    return content


def _root(folder: Path, splits: Mapping[str, Any], given: Path | None, allow_outside_root: bool) -> Path:
    """Where relative paths start: as given, else as recorded, beside the dataset or where it was made."""
    if given is not None:
        if not given.is_dir():
            raise UserError(f"data.frames_root={given}: there is no such folder")
        return given
    first = [table[0]["input_frames"][0] for table in splits.values() if len(table)]
    if all(os.path.isabs(path) for path in first):
        if not allow_outside_root:
            raise UserError(
                f"{folder} names its frames by absolute paths, such as {first[0]}: give the folder that they are in, "
                "data.frames_root=…, or allow all of them with +data.allow_outside_root=true"
            )
        return Path("/")
    recorded = _recorded(next(iter(splits.values())).info.description)
    candidates = [Path(os.path.normpath(folder / path)) for path in recorded]
    for candidate in candidates:
        if (candidate / first[0]).parent.is_dir():
            return candidate
    looked = " or ".join(map(str, candidates)) or "it says nothing"
    raise UserError(f"the frames of {folder} are not where it says ({looked}): give their folder, data.frames_root=…")


def description(root: Path, folder: Path) -> str:
    """What is recorded in a dataset at `folder` whose paths start from `root`: both ways to it, as JSON."""
    return json.dumps({"frames_root": [os.path.relpath(root, folder), str(root)]})


def _recorded(description: str) -> Sequence[str]:
    """The folders that `description` wrote; none if others wrote it."""
    try:
        return json.loads(description)["frames_root"]
    except (ValueError, LookupError, TypeError):
        return ()


def _from_split(path: str) -> str:
    """An absolute path from its split's name on, where one is in it."""
    if not os.path.isabs(path):
        return path
    name = named_parts(PurePosixPath(path).parent)[0]
    return f"{name}/{PurePosixPath(path).name}" if name else path


def _names_in(folder: Path) -> frozenset[str]:
    try:
        return _listed(folder, folder.stat().st_mtime_ns)
    except OSError:
        return frozenset()


@lru_cache(maxsize=4096)
def _listed(folder: Path, changed: int) -> frozenset[str]:
    return frozenset(os.listdir(folder))
