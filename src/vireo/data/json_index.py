"""Entries of one huge JSON object, found by number or by key without reading the rest.

A part of OpenS2V-5M is a single object of gigabytes. It is read once, in pieces, and what is kept are places in the
file: a few numbers for each entry, as arrays in `${XDG_CACHE_HOME:-~/.cache}/vireo/annotations/` that all processes
share (they are mapped, not read). They count as long as the file's size and time of change stay the same.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from vireo.data.scan import one_process
from vireo.errors import UserError

VERSION = 1  # of the arrays' format
CHUNK = 1 << 22  # characters that are read at a time
EXAMPLES = 100  # reasons that are kept; all are counted
PROGRESS_EVERY = 10.0  # seconds

Judge = Callable[[str, Any], str]  # key and value of an entry; raises ValueError, for people, if it cannot be used

logger = logging.getLogger(__name__)


class JsonIndex:
    """The entries of a file `{"key": value, …}` by number, in the file's order.

    judge: gives the group of an entry, such as the video that it was cut from, or raises ValueError. version: of judge;
    with another one the file is read again.
    groups: hash of each entry's group, uint64 (n,). usable: bool (n,), false for what judge refuses and for a key that
    came before. problems: why, the first of them.
    Of several processes that need an index one makes it while the others wait. Raises UserError for a file that cannot
    be read, for malformed JSON (with line and byte), and if the index cannot be written.
    """

    def __init__(self, path: Path, judge: Judge, version: str) -> None:
        self.path = path
        self._stamp = _stamp(path)
        folder = _folder(path, self._stamp, version)
        if not folder.is_dir():
            with one_process(folder.parent / f"{folder.name.split('-')[0]}.lock"):
                if not folder.is_dir():
                    _build(path, judge, folder, self._stamp)
        self._offsets, self._lengths, self.groups, self._sorted, self._order, self.usable = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS
        )
        self.problems: list[str] = json.loads((folder / "problems.json").read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return len(self._offsets)

    def entry(self, row: int) -> tuple[str, Any]:
        """Key and value of one entry. Raises UserError if the file is not what it was when it was read."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                content = os.pread(file.fileno(), int(self._lengths[row]), int(self._offsets[row]))
            ((key, value),) = json.loads(b"{" + content + b"}").items()
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} has gone or changed since the run began ({error}): start again") from error
        return key, value

    def row(self, key: str) -> int | None:
        """The number of the usable entry with this key, None without one."""
        wanted = np.uint64(hashed(key))
        place = int(np.searchsorted(self._sorted, wanted))
        while place < len(self) and self._sorted[place] == wanted:
            row = int(self._order[place])
            if self.usable[row]:
                return row
            place += 1
        return None


_ARRAYS = ("offsets", "lengths", "groups", "sorted", "order", "usable")


def hashed(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"the annotation file {path} cannot be read: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


def _folder(path: Path, stamp: tuple[int, int], version: str) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vireo" / "annotations"
    name = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=12).hexdigest()
    return root / f"{name}-{hashlib.blake2b(repr((stamp, version, VERSION)).encode(), digest_size=6).hexdigest()}"


def _build(path: Path, judge: Judge, folder: Path, stamp: tuple[int, int]) -> None:
    """Read the file and publish its index; those of its earlier states are removed."""
    began = told = time.monotonic()
    offsets, lengths, keys, groups, usable = array("q"), array("q"), array("Q"), array("Q"), array("b")
    problems: list[str] = []
    for entry in entries(path):
        group, reason = "", None
        try:
            group = judge(entry.key, entry.value)
        except ValueError as error:
            reason = f"{entry.key}: {error}"
        offsets.append(entry.offset)
        lengths.append(entry.length)
        keys.append(hashed(entry.key))
        groups.append(hashed(group))
        usable.append(reason is None)
        if reason is not None and len(problems) < EXAMPLES:
            problems.append(reason)
        if time.monotonic() - told > PROGRESS_EVERY:
            told = time.monotonic()
            share = (entry.offset + entry.length) / max(1, stamp[0])
            logger.info("indexed %d entries, %.0f %% of %s", len(offsets), 100 * share, path)
    if _stamp(path) != stamp:
        raise UserError(f"{path} changed while it was read: start again when it is complete")
    columns = {name: np.asarray(column) for name, column in (("offsets", offsets), ("lengths", lengths))}
    columns |= {"groups": np.asarray(groups), "usable": np.asarray(usable, bool)}
    hashes = np.asarray(keys)
    columns["order"] = order = np.argsort(hashes, kind="stable")
    columns["sorted"] = hashes[order]
    twice = order[1:][columns["sorted"][1:] == columns["sorted"][:-1]]
    columns["usable"][twice] = False
    problems += [f"{len(twice)} keys come more than once: the first entry of each counts"] * bool(len(twice))
    _publish(columns, problems, folder)
    logger.info("indexed %d entries of %s in %.1f s", len(offsets), path, time.monotonic() - began)


def _publish(columns: dict[str, NDArray], problems: list[str], folder: Path) -> None:
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        for name, column in columns.items():
            np.save(unfinished / f"{name}.npy", column)
        (unfinished / "problems.json").write_text(json.dumps(problems), encoding="utf-8")
        for stale in folder.parent.glob(f"{folder.name.split('-')[0]}-*"):
            shutil.rmtree(stale)  # who has mapped them keeps them
        unfinished.rename(folder)
    except OSError as error:
        raise UserError(
            f"the index of an annotation file cannot be written: {error}. Set XDG_CACHE_HOME to a folder with space."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# Reading in pieces


class Entry(NamedTuple):
    """offset, length: bytes of `"key": value` in the file."""

    key: str
    value: Any
    offset: int
    length: int


_DECODER = json.JSONDecoder()
_BLANK = re.compile(r"[ \t\n\r]*")
_LONGEST = 16  # characters of an escape or a literal, which may be cut in the middle


def entries(path: Path) -> Iterator[Entry]:
    """The entries of a file that holds one JSON object, with no more of it in memory than a few of them.

    Raises UserError, with line, column and byte, for what is malformed, cut off, or no object.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            yield from _Reader(path, file).entries()
    except OSError as error:
        raise UserError(f"the annotation file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}), expected JSON") from error


class _Reader:
    """text: a piece of the file, of which all before `place` is done. offset: the byte at `place`; lines: before it."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self.file = path, file
        self.text, self.place, self.offset, self.lines, self.column = file.read(CHUNK), 0, 0, 0, 0
        while not self.text.strip() and (more := file.read(CHUNK)):
            self.text += more

    def entries(self) -> Iterator[Entry]:
        start = self._blank(0)
        if self.text[start : start + 1] != "{":
            found = self.text[start : start + 1] or "nothing"
            raise UserError(f"{self.path}: expected one JSON object, key: annotation, found {found}")
        self._move(start + 1)
        is_first, is_last = True, False
        while not is_last:
            try:
                key, value, start, end, after, is_last = self._entry()
            except json.JSONDecodeError as error:
                end = self._blank(self.place)
                if is_first and self.text[end : end + 1] == "}":  # an empty object
                    self._move(end + 1)
                    break
                self._read_on(error)
                continue
            is_first = False
            self._move(start)
            offset = self.offset
            self._move(end)
            yield Entry(key, value, offset, self.offset - offset)
            self._move(after)
        if (self.text[self.place :] + self.file.read(CHUNK)).strip():
            raise UserError(f"{self.path}, byte {self.offset}: something follows the object's end")

    def _entry(self) -> tuple[str, Any, int, int, int, bool]:
        """The entry at `place`, where it begins and ends, where the next one may, and whether there is none."""
        start = self._blank(self.place)
        key, end = _DECODER.raw_decode(self.text, start)
        colon = self._blank(end)
        if not isinstance(key, str) or self.text[colon : colon + 1] != ":":
            raise json.JSONDecodeError("expected a key in quotes, and a colon", self.text, colon)
        value, end = _DECODER.raw_decode(self.text, self._blank(colon + 1))
        mark = self._blank(end)
        if self.text[mark : mark + 1] not in (",", "}") or mark == len(self.text):
            raise json.JSONDecodeError("expected a comma or the object's end", self.text, mark)
        return key, value, start, end, mark + 1, self.text[mark] == "}"

    def _read_on(self, error: json.JSONDecodeError) -> None:
        """More text, if that can be what was missing. Raises UserError if not."""
        text = self.text
        is_cut_off = error.pos >= len(text) - _LONGEST or error.msg.startswith("Unterminated string")
        more = self.file.read(max(CHUNK, len(text) - self.place)) if is_cut_off else ""
        if not more:
            self._move(min(error.pos, len(text)))
            is_at_end = error.msg.startswith("Unterminated string") or not text[error.pos :].strip()
            said = "the file ends in the middle" if is_at_end else f"malformed JSON: {error.msg}"
            place = f"line {self.lines + 1}, column {self.column + 1}, byte {self.offset}"
            raise UserError(f"{self.path}, {place}: {said}")
        self.text, self.place = text[self.place :] + more, 0

    def _move(self, place: int) -> None:
        passed = self.text[self.place : place]
        self.offset += len(passed) if passed.isascii() else len(passed.encode())
        if "\n" in passed:
            self.lines += passed.count("\n")
            self.column = len(passed) - passed.rindex("\n") - 1
        else:
            self.column += len(passed)
        self.place = place

    def _blank(self, place: int) -> int:
        found = _BLANK.match(self.text, place)
        assert found is not None
        return found.end()
