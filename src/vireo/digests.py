"""Hashes of files, read once and remembered until a file changes.

What is remembered lies in `${XDG_CACHE_HOME:-~/.cache}/vireo/digests/`, one file for each folder of files, and counts
as long as a file's size and times of change stay the same, so that a warm start only asks the file system. A hard link
that was made or removed, as exports do, changes a time but no content. Such an index has JSON lines and only grows:
several processes may add to it at once, and a line that a killed one has left unfinished is passed over. Lost, it is
made anew by reading the files.
"""

import fcntl
import hashlib
import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TextIO

logger = logging.getLogger(__name__)

PROGRESS_EVERY = 10.0  # seconds
TICK = 2_000_000_000  # ns within which a file system may give two changes the same time


class Stamp(NamedTuple):
    """What the file system says about a file; `changed` also moves when an older file takes its place, or links do."""

    size: int
    modified: int
    changed: int
    links: int
    inode: int

    def is_only_linked(self, before: "Stamp") -> bool:
        """Whether another number of hard links explains what is different."""
        return self.links != before.links and self == before._replace(changed=self.changed, links=self.links)


class Record(NamedTuple):
    """A file's digest, what it was like when it was read, and when that was (seconds since 1970)."""

    stamp: Stamp
    read_at: float
    digest: str


_remembered: dict[str, dict[str, Record]] = {}  # by folder and name, what this process has seen
_trusted_from = 0.0


def distrust() -> None:
    """From now on trust no digest from before now: every file is read again, once for all processes of a run.

    For those who do not believe size and times (`cache.verify=bytes`).
    """
    global _trusted_from
    _trusted_from = time.time()


def bytes_digest(content: bytes) -> str:
    """The digest of a file with this content."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def file_digest(path: str | Path) -> str:
    """blake2b of a file's bytes, 32 hexadecimal digits. Raises OSError if it cannot be read."""
    return file_digests([path])[str(path)]


def file_digests(paths: Iterable[str | Path]) -> dict[str, str]:
    """The digests of many files by their paths as given; new ones are read by a few threads.

    Of several processes that ask for the same files one reads and the others wait for it. Raises OSError if one cannot
    be read. Without a folder to remember in, a warning is logged.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    for path in map(str, paths):
        folders[os.path.dirname(path)].append(path)
    found: dict[str, str] = {}
    for folder, files in folders.items():
        found |= _of_folder(os.path.realpath(folder), files)
    return found


def _of_folder(folder: str, files: list[str]) -> dict[str, str]:
    if folder not in _remembered:
        _remembered[folder] = _read_index(_index(folder))
    found, new = _known(folder, files)
    if new:
        with _adding_to(_index(folder)) as index:
            _remembered[folder] |= _records(index) if index else {}  # perhaps of the process that was waited for
            more, new = _known(folder, new)
            found |= more | _read_files(folder, new, index)
    return found


def _known(folder: str, files: list[str]) -> tuple[dict[str, str], list[str]]:
    """The digests that are remembered and still right, and the files that have to be read."""
    records, found, new = _remembered[folder], {}, []
    for file in files:
        record = records.get(os.path.basename(file))
        if record is not None and record.read_at >= _trusted_from and record.stamp == _stamp(file):
            found[file] = record.digest
        else:
            new.append(file)
    return found, new


def _read_files(folder: str, files: list[str], index: TextIO | None) -> dict[str, str]:
    found: dict[str, str] = {}
    told = time.monotonic()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for file, (record, lasting) in zip(files, pool.map(partial(_renewed, folder), files), strict=True):
            found[file] = record.digest
            name = os.path.basename(file)
            if lasting:
                _remembered[folder][name] = record
                if index is not None:
                    index.write(json.dumps([name, *record.stamp, record.read_at, record.digest]) + "\n")
            if time.monotonic() - told > PROGRESS_EVERY:
                told = time.monotonic()
                logger.info("read %d of %d new files in %s", len(found), len(files), folder)
    return found


def _renewed(folder: str, file: str) -> tuple[Record, bool]:
    """As `_read`, which is left out where the content is known to be the same."""
    record, stamp = _remembered[folder].get(os.path.basename(file)), _stamp(file)
    if record is not None and record.read_at >= _trusted_from and stamp.is_only_linked(record.stamp):
        return record._replace(stamp=stamp), True
    return _read(file)


def _read(file: str) -> tuple[Record, bool]:
    """A file's record, and whether it will show if the file changes: it would not within one tick of the clock."""
    read_at, stamp = time.time(), _stamp(file)
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    lasting = stamp == _stamp(file) and time.time_ns() - stamp.modified > TICK
    return Record(stamp, read_at, digest.hexdigest()), lasting


def _stamp(file: str) -> Stamp:
    status = os.stat(file)
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_nlink, status.st_ino)


def _index(folder: str) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vireo" / "digests"
    return root / f"{hashlib.blake2b(os.fsencode(folder), digest_size=12).hexdigest()}.jsonl"


def _read_index(path: Path) -> dict[str, Record]:
    try:
        with open(path, encoding="utf-8", errors="replace") as index:
            return _records(index)
    except OSError:  # nothing is remembered yet, or `_adding_to` will say why it cannot be
        return {}


def _records(index: TextIO) -> dict[str, Record]:
    """What an index says, later lines last."""
    index.seek(0)
    records = {}
    for line in index:
        try:
            name, *stamp, read_at, digest = json.loads(line)
            records[name] = Record(Stamp(*stamp), read_at, digest)
        except (ValueError, TypeError):  # left by a process that was killed
            continue
    return records


@contextmanager
def _adding_to(path: Path) -> Iterator[TextIO | None]:
    """An index to read and add to, for this process alone; None where there can be none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        index = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed below
        fcntl.flock(index, fcntl.LOCK_EX)
    except OSError as error:
        logger.warning("hashes of files are not remembered: %s", error)
        yield None
        return
    with index:
        yield index
