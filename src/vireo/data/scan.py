"""Which videos or pictures of a dataset can be read: looked at once, remembered until a file changes.

`vireo.video_io.probe` and `probe_image` say what is checked in each file. What it found is kept in
`${XDG_CACHE_HOME:-~/.cache}/vireo/scans/`, one JSON file per dataset folder, under each video's size and time of
change, so a later start only asks the file system for these. Of a folder of frames they are the number of its pictures
and the time of change of the folder: a picture that is overwritten in place goes unnoticed.
"""

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

from vireo.video_io import BadVideoError, VideoInfo, is_frame, probe, probe_image

Identity = tuple[int, int]  # size and modification time in ns
Finding = VideoInfo | str  # what a readable video is like, or why it cannot be read

VERSION = 1  # of the file's format and of what `probe` checks: another one is scanned again
PROGRESS_EVERY = 10.0  # seconds

logger = logging.getLogger(__name__)


def scan(videos: Mapping[str, Path], root: Path, pictures: bool = False) -> dict[str, Finding]:
    """Probe every video that has changed since it was last probed; the others are remembered.

    videos: files or folders of frames by name. root: the dataset's folder, which names the cache file. pictures:
    whether each is a single picture instead. Returns for each name a VideoInfo, or the reason why it cannot be read.
    Of several processes that scan the same folder one works while the others wait for its result. A cache that is
    corrupt is made anew; without a folder to write to, a warning is logged and every start scans.
    """
    identities = {name: _identity(path) for name, path in videos.items()}
    digest = hashlib.blake2b(os.fsencode(root.resolve()), digest_size=12).hexdigest()
    cache = _folder() / f"{digest}{'.pictures' if pictures else ''}.json"
    remembered = _remembered(cache, identities)
    if len(remembered) < len(videos):
        with one_process(cache.with_suffix(".lock")):
            remembered = _remembered(cache, identities)  # perhaps by the process that was waited for
            new = {name: path for name, path in videos.items() if name not in remembered}
            remembered |= _probe_all(new, probe_image if pictures else probe, identities, cache, root)
    return {name: remembered[name] for name in videos}


def _probe_all(
    videos: Mapping[str, Path],
    look: Callable[[Path], VideoInfo],
    identities: Mapping[str, Identity | None],
    cache: Path,
    root: Path,
) -> dict[str, Finding]:
    """In a few threads: most of the time is spent in the decoder, which lets go of Python's lock."""
    findings: dict[str, Finding] = {}
    told = time.monotonic()
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for name, finding in zip(videos, pool.map(partial(_probe, look), videos.values()), strict=True):
                findings[name] = finding
                if time.monotonic() - told > PROGRESS_EVERY:
                    told = time.monotonic()
                    logger.info("looked at %d of %d new videos in %s", len(findings), len(videos), root)
    finally:  # an interrupted scan goes on where it stopped
        _remember(cache, root, findings, identities)
    return findings


def _probe(look: Callable[[Path], VideoInfo], path: Path) -> Finding:
    try:
        return look(path)
    except BadVideoError as error:
        return error.reason


def _identity(path: Path) -> Identity | None:
    """None for a file that cannot be looked at: what is found out about it is not remembered."""
    try:
        status = path.stat()
        size = sum(is_frame(name) for name in os.listdir(path)) if path.is_dir() else status.st_size
    except OSError:
        return None
    return size, status.st_mtime_ns


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vireo" / "scans"


def _remembered(cache: Path, identities: Mapping[str, Identity | None]) -> dict[str, Finding]:
    """What is known about the videos that have not changed."""
    records = _records(cache)
    return {name: records[name][1] for name, now in identities.items() if name in records and records[name][0] == now}


def _records(cache: Path) -> dict[str, tuple[Identity, Finding]]:
    """Everything in a cache file, by name; nothing if it is missing, corrupt or of another version."""
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            return {}
        return {
            name: ((size, changed), found if isinstance(found, str) else VideoInfo(**found))
            for name, (size, changed, found) in content["videos"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be used (%s): the videos are looked at again", cache, error)
        return {}


def _remember(
    cache: Path, root: Path, findings: Mapping[str, Finding], identities: Mapping[str, Identity | None]
) -> None:
    """Add to the cache file, which is replaced as a whole."""
    records: dict[str, tuple[Identity | None, Finding]] = {**_records(cache)}
    records |= {name: (identities[name], found) for name, found in findings.items()}
    videos = {
        name: (*identity, found if isinstance(found, str) else asdict(found))
        for name, (identity, found) in records.items()
        if identity is not None
    }
    unfinished = cache.with_suffix(f".{os.getpid()}.tmp")
    try:
        unfinished.write_text(json.dumps({"version": VERSION, "root": str(root), "videos": videos}), encoding="utf-8")
        os.replace(unfinished, cache)
    except OSError as error:
        logger.warning("what was found in %s is not remembered: %s", root, error)
        if unfinished.exists():
            unfinished.unlink()


@contextmanager
def one_process(lock_file: Path) -> Iterator[None]:
    """Hold a file lock, which the system gives back if the process dies; go on without one where there can be none."""
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_file.open("a")
    except OSError as error:
        logger.warning("%s cannot be locked, so every process works for itself: %s", lock_file, error)
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s cannot be locked, so every process works for itself: %s", lock_file, error)
        yield
