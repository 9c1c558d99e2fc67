"""A run's folder: whose it is, what was asked, what it runs on, and whether it is done."""

import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from vireo.errors import UserError

log = logging.getLogger(__name__)

CHAIN = "chain.json"  # in a chain's folder: the runs of its stages by name, relative to it
PACKAGES = (
    "torch", "accelerate", "diffusers", "transformers", "datasets", "safetensors", "hydra-core", "decord", "av",
    "numpy",
)  # fmt: skip


@contextmanager
def lock(folder: Path) -> Iterator[int]:
    """Hold the folder for this process and the children that inherit the descriptor it yields.

    The kernel frees it when the last of them ends, however it ends. Where the file system has no locks, the file's text
    stands for one: it names the process, and is taken away by it at its end.

    Raises UserError that names the host and process of the run that holds it, and for a folder that cannot be written.
    """
    path = folder / ".lock"
    with needed(folder):
        file = open(path, "a+")  # noqa: SIM115 - held until the end of the run
    with file:
        holder, before = _holder(file, fcntl.LOCK_EX)
        if holder:
            raise UserError(
                f"{folder} belongs to a run that is going on ({holder}). Wait for it, stop it, or give this one "
                "another name with run=<name>"
            )
        if before and not before.endswith(f" on {socket.gethostname()}"):
            log.warning(
                "%s was held by %s, which did not end by itself. If it still runs, this file system does not pass "
                "locks on to other machines: stop one of the two",
                folder,
                before,
            )
        with needed(folder):
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield file.fileno()
        finally:
            file.truncate(0)


def is_locked(folder: Path) -> bool:
    """Whether a run is going on in this folder."""
    path = folder / ".lock"
    if not path.exists():
        return False
    with open(path) as file:
        return _holder(file, fcntl.LOCK_SH)[0] is not None


def _holder(file: TextIO, kind: int) -> tuple[str | None, str]:
    """Lock a file, or learn who holds it (None: this process does now); and what it says of whoever held it last."""
    file.seek(0)
    named = file.read().strip()
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return named or "another process", named
    except OSError as error:  # ENOLCK, ENOSYS, EOPNOTSUPP: a mount without locks
        if named and not _is_dead(named):
            hint = f"as {file.name} says, which is all that is known here ({error.strerror}): delete it if that is over"
            return f"{named}, {hint}", named
    return None, named


def _is_dead(named: str) -> bool:
    """Whether a "process 7 on host" has certainly ended; of other machines that cannot be told."""
    import psutil

    match = re.fullmatch(r"process (\d+) on (.+)", named)
    return match is not None and match[2] == socket.gethostname() and not psutil.pid_exists(int(match[1]))


def log_file(folder: Path, rank: int) -> Path:
    """Where a rank's messages are: `train.log`, or `logs/rank_<n>.log`, in the run's folder."""
    return folder / "train.log" if rank == 0 else folder / "logs" / f"rank_{rank}.log"


def bad_samples_file(folder: Path, rank: int) -> Path:
    """Where a rank writes what it could not read: `bad_samples.jsonl`, or `logs/bad_samples_<n>.jsonl`."""
    return folder / "bad_samples.jsonl" if rank == 0 else folder / "logs" / f"bad_samples_{rank}.jsonl"


def room_file(folder: Path) -> Path:
    """Where a start that ran out of memory says how many samples the next one may take at once."""
    return folder / "room.json"


@contextmanager
def dispensable(what: str) -> Iterator[None]:
    """Around writing what a run can do without: if the disk is full, that is told, and the run goes on."""
    try:
        yield
    except OSError as error:
        log.error("%s could not be written: %s", what, error)


@contextmanager
def needed(folder: Path) -> Iterator[None]:
    """Around writing what a run cannot begin without: a disk that refuses it is told as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be written ({error.strerror or error}); free some space, or choose "
            "another place with paths.outputs=…"
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file at once: a reader sees the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def environment() -> dict[str, Any]:
    """Versions, machine, command and git commit that a run was started with; no environment variables."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "vireo": metadata.version("vireo") if _installed("vireo") else None,
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "command": shlex.join(sys.argv),
        "git": _git(),
    }


def data_files(node: Mapping[str, Any], most: int = 100_000) -> dict[str, dict[str, Any]]:
    """What lies in each folder, or is each file, that the data's node names, by its key: enough to tell whether two
    runs had the same data, without reading them.

    names_and_sizes: a hash of the files' names below the folder and their sizes; of more than `most`, of the first
    ones, folder after folder in the order of names.
    """
    named = {key: Path(value) for key, value in node.items() if isinstance(value, str) and os.path.isabs(value)}
    return {key: _fingerprint(place, most) for key, place in named.items() if place.exists()}


def stages(folder: Path) -> dict[str, Path]:
    """The runs of a chain's stages that have begun, by name; of an ordinary run, or of none, the folder itself."""
    path = folder / CHAIN
    runs = json.loads(path.read_text()) if path.exists() else {}
    begun = {name: folder / run for name, run in runs.items() if (folder / run / "resolved.yaml").exists()}
    return begun or {"": folder}


def newest_stage(folder: Path) -> Path:
    """The run that stands for a folder: of a chain, the last one that has begun."""
    return list(stages(folder).values())[-1]


def finished(folder: Path) -> dict[str, Any] | None:
    """What the `finished` marker says, or None for a run that is not done."""
    path = folder / "finished"
    return json.loads(path.read_text()) if path.exists() else None


def _fingerprint(place: Path, most: int) -> dict[str, Any]:
    count, size, digest = 0, 0, hashlib.blake2b(digest_size=16)
    for file in islice(_files(place), most):
        try:
            length = file.stat().st_size
        except OSError:  # a link to nowhere
            length = -1
        digest.update(os.fsencode(file.relative_to(place)) + f" {length}\n".encode())
        count, size = count + 1, size + max(0, length)
    return {"path": str(place), "files": count, "bytes": size, "names_and_sizes": digest.hexdigest()}


def _files(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
    for parent, folders, names in os.walk(place):
        folders.sort()
        yield from (Path(parent, name) for name in sorted(names))


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _git() -> dict[str, Any] | None:
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return {"commit": commit.stdout.strip(), "changed": bool(status.stdout)} if commit.returncode == 0 else None
