"""DeepSpeed's C++ for CPUs, compiled once and kept.

Several processes on a CPU talk through shared memory by a piece of C++ that DeepSpeed compiles when it is first used,
which takes minutes. It is kept in the user's cache. torch guards a build by a file `lock` and waits for ever for one
that a killed process has left; here a lock of the operating system is held around the build, so whoever holds it knows
that a `lock` file is stale.
"""

import fcntl
import logging
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch

from vireo.errors import UserError

log = logging.getLogger(__name__)


def folder() -> Path:
    """Where compiled extensions are kept: by versions and environment, below $TORCH_EXTENSIONS_DIR or the user's cache.

    Paths of the environment are in the compiler's command, so another one would compile everything anew in this folder.
    """
    python = f"py{sys.version_info.major}{sys.version_info.minor}-{zlib.crc32(sys.prefix.encode()):08x}"
    versions = f"torch{torch.__version__}-deepspeed{metadata.version('deepspeed')}-{python}"
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(given) if given else cache / "vireo" / "torch_extensions"
    return root if root.name == versions else root / versions


def prepare() -> None:
    """Make DeepSpeed usable here. On a CPU: choose it, and compile what it needs, one process after the other.

    To be called before the process group is made, whose members would wait no longer than its timeout. Raises UserError
    where DeepSpeed is missing or cannot be compiled.
    """
    try:
        metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        raise UserError("strategy=zero… needs deepspeed: pip install deepspeed (Linux only), or use fsdp") from None
    if torch.cuda.is_available():
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder())
    beside = Path(sys.executable).parent  # an environment that was not activated has its ninja there
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(beside)])
    with locked(folder()):
        remove_stale(folder())
        _load()


def _load() -> None:
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    builder = ShareMemCommBuilder()
    library = folder() / builder.name / f"{builder.name}.so"
    if not library.exists():
        missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
        if missing:
            raise UserError(
                f"DeepSpeed compiles a part of itself for CPUs and finds no {' and no '.join(missing)}: install it "
                "(apt install g++, pip install ninja), or use strategy=fsdp, which needs no compiler"
            )
        log.info("compiling DeepSpeed's part for CPUs into %s, once; this takes minutes", library.parent)
    try:
        builder.load(verbose=False)
    except (RuntimeError, ImportError, OSError) as error:
        raise UserError(
            f"DeepSpeed's part for CPUs cannot be compiled or loaded: {error}\nUse strategy=fsdp, or delete "
            f"{library.parent} to compile it anew"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Held by one process of this machine at a time; a killed one loses it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".building", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_stale(folder: Path) -> list[Path]:
    """Remove the `lock` files of builds that were killed, tell, and return them; the caller holds `locked`."""
    stale = sorted(folder.glob("*/lock"))
    for path in stale:
        log.warning("%s was left by a build that was killed; removed, or torch would wait for it for ever", path)
        path.unlink()
    return stale
