"""What a dataset consists of: the clips found below a folder, or those listed in an annotation file."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vireo import json_files
from vireo.errors import UserError
from vireo.video_io import VIDEO_SUFFIXES, is_frame

logger = logging.getLogger(__name__)

SKIPPED = ".nomedia"  # as media players have it


@dataclass(frozen=True)
class Entry:
    """One clip. name: its path relative to the root, with forward slashes, by which splits and reports know it (the
    absolute path if it lies outside). path: a video file or a folder of frames. text: its caption, None without one."""

    name: str
    path: Path
    text: str | None = None


def inside(root: Path, path: Path, allow_outside_root: bool) -> Path:
    """`path`, which a list of others names, if it lies in `root` or may lie elsewhere: the one guard of all layouts.

    Raises ValueError, for people, for one that leads out of it: absolute, by `..` or by a link.
    """
    if allow_outside_root or path.resolve().is_relative_to(_resolved(os.path.abspath(root))):
        return path
    raise ValueError(f"{path} lies outside {root}: allow it with +data.allow_outside_root=true")


@lru_cache(maxsize=64)
def _resolved(root: str) -> Path:
    return Path(root).resolve()  # asks the disk for each of its parts, and lists have millions of lines


def list_folder(root: Path) -> list[Entry]:
    """All videos below `root`, or if there is none all folders of frames below it, sorted by name.

    Videos come first because pictures that lie beside them (first frames, thumbnails) are no clips; folders of
    pictures beside videos, which may have been meant as clips, are told. Links are followed, hidden files and
    folders are not, nor are folders below `root` with a file .nomedia, the sign for those that hold something else.
    Raises UserError if the folder is missing or holds no clip.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: expected a folder with videos or with folders of frames")
    videos, frame_folders = [], []
    visited = set()
    for folder, below, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link that leads back up
            below.clear()
            continue
        visited.add(real)
        if SKIPPED in files and Path(folder) != root:
            below.clear()
            continue
        below[:] = [name for name in below if not name.startswith(".")]
        here = [Path(folder, name) for name in files if _is_video(name)]
        videos += here
        if Path(folder) != root and not here and any(is_frame(name) for name in files):
            frame_folders.append(Path(folder))
    found = videos or frame_folders
    with_videos = {path.parent for path in videos}
    beside = sorted(str(one.relative_to(root)) for one in frame_folders if one.parent in with_videos)
    if beside:
        logger.warning(
            "%s: %d folders of pictures lie beside videos and are no clips: if they are, move them elsewhere; if not, "
            "a file %s in each keeps this quiet:\n%s",
            root, len(beside), SKIPPED, shortened(beside),
        )  # fmt: skip
    if not found:
        expected = f"videos ({', '.join(sorted(VIDEO_SUFFIXES))}), or one folder of .jpg or .png for each clip"
        raise UserError(f"there are no clips in {root}: expected {expected}, in subfolders or not")
    return sorted((Entry(path.relative_to(root).as_posix(), path) for path in found), key=lambda entry: entry.name)


def list_annotation(file: Path, root: Path, allow_outside_root: bool = False) -> list[Entry]:
    """The clips of an annotation file, in its order: {"total": N, "list": [entry, …]} or the bare list.

    An entry is an object with "path" (relative to `root`) or "full_path", and perhaps "text" or "caption"; other keys
    are not read. Whether the videos are there is not looked at. Raises UserError for a file that cannot be read, JSON
    that is malformed (with line and column), and for all wrong entries together: without a path, outside `root` though
    not allowed (also by `..` or a link), with a text that is none, or without one where others have one.
    """
    entries, problems = [], []
    for index, item in enumerate(_items(file)):
        try:
            entries.append(_entry(item, root, allow_outside_root))
        except ValueError as error:
            problems.append(f"list[{index}]: {error}")
    with_text = sum(entry.text is not None for entry in entries)
    if 0 < with_text < len(entries):
        without = next(entry.name for entry in entries if entry.text is None)
        missing = len(entries) - with_text
        problems.append(f'{missing} of {len(entries)} entries have no "text", {without} first: give it to all or none')
    if problems:
        raise UserError(f"{file} cannot be used:\n" + shortened(problems))
    return entries


def shortened(lines: Sequence[str], limit: int = 10) -> str:
    """At most `limit` lines, indented, the last of them counting what is left out."""
    shown = list(lines if len(lines) <= limit else lines[: limit - 1])
    if len(shown) < len(lines):
        shown.append(f"… and {len(lines) - len(shown)} more")
    return "\n".join(f"  {line}" for line in shown)


def _items(file: Path) -> list[Any]:
    content = json_files.read(file, largest=None)
    items = content.get("list") if isinstance(content, dict) else content
    if not isinstance(items, list):
        raise UserError(f'{file}: expected a list of clips, or an object with one under "list"')
    if isinstance(content, dict) and content.get("total", len(items)) != len(items):
        told = content["total"]
        raise UserError(f'{file}: "total" is {told}, but "list" has {len(items)} entries: correct it or take it out')
    if not items:
        raise UserError(f"{file}: the list is empty, expected at least one clip")
    return items


def _entry(item: Any, root: Path, allow_outside_root: bool) -> Entry:
    """Raises ValueError, for people, for an entry that cannot be used."""
    if not isinstance(item, dict):
        raise ValueError(f'expected an object with "path", found {type(item).__name__}')
    written = item.get("path", item.get("full_path"))
    if not isinstance(written, str) or not written:
        raise ValueError('no "path" (a string, relative to the root)')
    text = item.get("text", item.get("caption"))
    if text is not None and not isinstance(text, str):
        raise ValueError(f'"text" is {type(text).__name__}, expected a string')
    path = inside(root, root / written, allow_outside_root)  # an absolute path stays itself
    plain = Path(os.path.normpath(path))
    is_inside = plain.is_relative_to(os.path.normpath(root))
    return Entry((plain.relative_to(os.path.normpath(root)) if is_inside else plain).as_posix(), path, text)


def _is_video(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES and not name.startswith(".")
