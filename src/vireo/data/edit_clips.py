"""The raw layout of edited clips: `{train,val,test}/<task>/<clip>/00.jpg … 20.jpg` and a metadata file that lists them.

Frames 00 to 19 are what was there before, frame 20 is what an instruction made of it. `metadata.json` is a list,
`metadata.jsonl` has an object on each line; an object names the folder of a clip (`video_path` or
`input_frames_folder`, relative to the root), its text (`instruction` or `edit_prompt`) and, perhaps, `task_type`.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vireo import json_files
from vireo.data.listing import inside
from vireo.errors import UserError
from vireo.video_io import is_frame

NUM_FRAMES = 21  # 20 before the edit and one after it
SPLITS = ("train", "val", "test")
METADATA = ("metadata.json", "metadata.jsonl")


class Frame(NamedTuple):
    """One encoded picture. path: its file; of a picture inside another file, the file that it was made from, which may
    be gone. read: its bytes, fresh from the disk; raises OSError. is_inside: of another file."""

    path: Path
    read: Callable[[], bytes]
    is_inside: bool = False


@dataclass(frozen=True)
class EditClip:
    """name: "train/move_object/video_01", by which reports know it, whatever the layout. split: train, val or test.
    prompt: the instruction. task: "move_object", or "" if nothing says. frames: all 21 in order."""

    name: str
    split: str
    prompt: str
    task: str
    frames: tuple[Frame, ...]


class Listing(NamedTuple):
    """clips: those that can be used, in the order of the rows. left_out: the others, "<clip>: <reason>"."""

    clips: list[EditClip]
    left_out: list[str]


def metadata_file(root: Path) -> Path | None:
    """The metadata file directly in `root`, or None; of two the .json counts."""
    return next((root / name for name in METADATA if (root / name).is_file()), None)


def list_raw(root: Path, allow_outside_root: bool = False) -> Listing:
    """The clips that the metadata file in `root` names, checked without opening a picture.

    Left out, with the reason: clips without text, outside the three splits, outside `root` unless that is allowed (then
    the last part of a path that is a split counts), listed twice, not complete, or with two files of one frame.
    Raises UserError for a missing file, malformed JSON (with the line), or a file that lists nothing.
    """
    file = metadata_file(root)
    if file is None:
        raise UserError(f"there is no {' or '.join(METADATA)} in {root}: expected a list of its clips there")
    rows = list(_rows(file))
    if not rows:
        raise UserError(f"{file} lists no clip")
    clips: dict[str, EditClip] = {}
    left_out = []
    for number, row in enumerate(rows):
        name = _name(row) or f"row {number} of {file.name}"
        try:
            if name in clips:
                raise ValueError("listed twice, the first row counts")
            clips[name] = _clip(row, root, allow_outside_root)
        except ValueError as error:
            left_out.append(f"{name}: {error}")
    return Listing(list(clips.values()), left_out)


def named_parts(folder: PurePosixPath) -> tuple[str, str, str]:
    """Name, split and task of a clip by its folder, from the last part on that is a split.

    ("", "", "") if no part is one.
    """
    parts = folder.parts
    places = [place for place, part in enumerate(parts[:-1]) if part in SPLITS]
    if not places:
        return "", "", ""
    inside = parts[places[-1] :]
    return "/".join(inside), inside[0], inside[1] if len(inside) > 2 else ""


def numbers(frames: list[int]) -> str:
    """ "frame 13", "frames 3, 4 and 5 more": what is missing, for people."""
    shown = ", ".join(f"{number:02d}" for number in frames[:3])
    more = f" and {len(frames) - 3} more" if len(frames) > 3 else ""
    return f"frame{'s' if len(frames) > 1 else ''} {shown}{more}"


def _rows(file: Path) -> Iterator[Any]:
    if file.suffix == ".jsonl":
        for number, line in enumerate(json_files.text(file).splitlines(), start=1):
            if line.strip():
                yield json_files.parse(line, str(file), number)
        return
    rows = json_files.read(file, largest=None)
    if not isinstance(rows, list):
        raise UserError(f"{file}: expected a list of clips, found {type(rows).__name__}")
    yield from rows


def _name(row: Any) -> str:
    """The clip's folder as it is written, in one spelling; "" if the row has none."""
    written = _either(row, "video_path", "input_frames_folder")
    return os.path.normpath(written).replace(os.sep, "/") if isinstance(written, str) and written.strip() else ""


def _either(row: Any, key: str, other: str) -> Any:
    """What the first of two keys says, or the second where the first is not there, null or blank."""
    if not isinstance(row, dict):
        return None
    value = row.get(key)
    return row.get(other) if value is None or (isinstance(value, str) and not value.strip()) else value


def _clip(row: Any, root: Path, allow_outside_root: bool) -> EditClip:
    """Raises ValueError, for people, for a row that cannot be used."""
    name = _name(row)
    if not name:
        raise ValueError("has neither video_path nor input_frames_folder")
    written = PurePosixPath(name)
    folder = inside(root, root / name, allow_outside_root)
    is_elsewhere = written.is_absolute() or ".." in written.parts
    clip, split, task = named_parts(written)
    if not clip or not (is_elsewhere or written.parts[0] in SPLITS):
        raise ValueError(f"lies in none of {', '.join(f'{split}/' for split in SPLITS)}")
    prompt = _either(row, "instruction", "edit_prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("has no instruction")
    task = row.get("task_type") or task
    return EditClip(clip if is_elsewhere else name, split, prompt, str(task), tuple(_frames(folder)))


def _frames(folder: Path) -> list[Frame]:
    try:
        names = [name for name in os.listdir(folder) if is_frame(name)]
    except OSError as error:
        raise ValueError(f"its folder cannot be read ({error.strerror})") from error
    found = {Path(name).stem: folder / name for name in sorted(names)}
    twice = Counter(Path(name).stem for name in names)
    if several := [number for number in range(NUM_FRAMES) if twice[f"{number:02d}"] > 1]:
        raise ValueError(
            f"{numbers(several)} there as more than one file, such as .jpg and .png: delete the wrong ones"
        )
    missing = [number for number in range(NUM_FRAMES) if f"{number:02d}" not in found]
    if missing:
        raise ValueError(f"{numbers(missing)} missing")
    paths = [found[f"{number:02d}"] for number in range(NUM_FRAMES)]
    return [Frame(path, partial(Path.read_bytes, path)) for path in paths]
