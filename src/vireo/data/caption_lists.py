"""Captioned clips as list files: line i of prompts.txt, videos.txt and images.txt belongs together.

The layout of the CogVideoX fine-tuning recipe (https://github.com/THUDM/CogVideo, finetune/). Paths are relative to the
folder of their list file. The published reader drops blank lines of each file by itself, which moves captions to other
clips; here only blank lines at the end are dropped, and everything that is wrong is told at once, with its line.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from vireo.data.listing import inside, shortened
from vireo.errors import UserError

# Names that the lists of published datasets have; the first is the documented one.
ALIASES = {
    "prompts": ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt"),
    "videos": ("videos.txt", "video.txt"),
    "images": ("images.txt", "image.txt"),
}


class ListFile(NamedTuple):
    """One list file. lines: stripped, without the blank ones at the end."""

    path: Path
    lines: list[str]

    def place(self, row: int) -> str:
        return f"{self.path.name}, line {row + 1}"

    def file(self, row: int) -> Path:
        """What a row of videos.txt or images.txt names."""
        return self.path.parent / self.lines[row]


class Lists(NamedTuple):
    """The list files of one folder by kind ("prompts", "videos", "images"), and what is wrong with them."""

    files: dict[str, ListFile]
    problems: list[str]

    def __len__(self) -> int:
        return len(self.files["prompts"].lines)


def read(
    root: Path, names: Mapping[str, str | None], empty_captions: bool = False, allow_outside_root: bool = False
) -> Lists:
    """The list files of a folder and their faults: counts that differ, blank lines, missing files, clips listed twice.

    names: for each kind that is wanted a file name relative to `root`, or None for whichever of ALIASES is there. Only
    the first kind must be there, so a caller looks at what it got. empty_captions: whether an inner blank line of the
    prompts is a caption. allow_outside_root: whether clips and pictures may lie outside `root`, or outside the folder
    of their list where that was named and lies elsewhere.
    Raises UserError without a folder or a list of the first kind, for names that several files have, for what is no
    UTF-8 text, and for lines that lead out though they may not.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: expected one with {ALIASES['prompts'][0]} and its clips")
    found = {kind: _find(root, kind, name) for kind, name in names.items()}
    files = {kind: ListFile(path, _lines(path)) for kind, path in found.items() if path is not None}
    needed = next(iter(names))
    if needed not in files:
        beside = f"; {root} has {', '.join(sorted(p.name for p in root.iterdir())[:8]) or 'nothing in it'}"
        what = "captions" if needed == "prompts" else needed
        raise UserError(f"no {what} in {root}: expected {' or '.join(ALIASES[needed])}{beside}")
    listing = [file for kind, file in files.items() if kind != "prompts"]
    if outside := [told for file in listing for told in _outside(root, file, allow_outside_root)]:
        raise UserError(f"{root} cannot be used:\n{shortened(outside)}")
    problems = _count_problems(files)
    for kind, file in files.items():
        if not (kind == "prompts" and empty_captions):
            problems += [f"{file.place(row)}: blank" for row, line in enumerate(file.lines) if not line]
        if kind != "prompts":
            problems += _file_problems(file, once=kind == "videos")
    return Lists(files, problems)


def present(root: Path, kind: str) -> list[Path]:
    """The list files of a kind in a folder, under any of their usual names."""
    return [root / alias for alias in ALIASES[kind] if (root / alias).is_file()]


def _outside(root: Path, file: ListFile, allow_outside_root: bool) -> Iterator[str]:
    home = root if file.path.resolve().is_relative_to(root.resolve()) else file.path.parent
    for row in range(len(file.lines)):
        try:
            inside(home, file.file(row), allow_outside_root)
        except ValueError as error:
            yield f"{file.place(row)}: {error}"


def _find(root: Path, kind: str, name: str | None) -> Path | None:
    if name is not None:
        if not (root / name).is_file():
            raise UserError(f"data.{kind}={name}: there is no such file in {root}")
        return root / name
    there = present(root, kind)
    if len(there) > 1:
        raise UserError(f"{root} has {' and '.join(path.name for path in there)}: say which one by data.{kind}=<name>")
    return there[0] if there else None


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text") from error
    lines = [line.strip() for line in text.split("\n")]  # not splitlines: a caption may hold other separators
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"{path} is empty, expected one line for each clip")
    return lines


def _count_problems(files: Mapping[str, ListFile]) -> list[str]:
    counts = {file.path.name: len(file.lines) for file in files.values()}
    shortest = min(counts.values())
    if len(set(counts.values())) == 1:
        return []
    longest = max(files.values(), key=lambda file: len(file.lines))
    lacking = " and ".join(name for name, count in counts.items() if count == shortest)
    told = ", ".join(f"{name} {count}" for name, count in counts.items())
    first = longest.lines[shortest]
    return [f"the lists differ in length: {told}; {longest.place(shortest)} ({first!r}) has no partner in {lacking}"]


def _file_problems(file: ListFile, once: bool) -> list[str]:
    problems, first_rows = [], dict[str, int]()
    for row, line in enumerate(file.lines):
        if not line:
            continue
        path = os.path.realpath(file.file(row))
        if not os.path.exists(path):
            problems.append(f"{file.place(row)}: there is no file {line} in {file.path.parent}")
        elif once and path in first_rows:
            problems.append(f"{file.place(row)}: {line} is the file of line {first_rows[path] + 1} already")
        first_rows.setdefault(path, row)
    return problems
