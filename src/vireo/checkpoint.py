"""Checkpoints: written whole or not at all, verified when read, kept by a stated rule.

A checkpoint is a folder `checkpoints/step_00000500/` with one safetensors file for each part (network, optimizer,
ema, loss) and `manifest.json`, which names every file with its size and SHA-256. It is written under a temporary name
in the same file system, flushed, and renamed: a folder with the final name and a valid manifest is complete. (A
flipped byte in a safetensors file loads without an error, so the hash is needed.)
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vireo import json_files, tensor_files
from vireo.errors import UserError

if TYPE_CHECKING:  # the launcher's parent lists checkpoints and must start without torch
    from torch import Tensor

log = logging.getLogger(__name__)

FORMAT = 1  # of manifests
_NAME = re.compile(r"step_(\d{8})")
LAST = 10**8 - 1  # the last step that has a folder's name
MARGIN = 64 * 2**20  # bytes that must stay free beside a new checkpoint


class Checkpoint(NamedTuple):
    """A verified checkpoint: its folder, the step it was made after, and the JSON state beside the tensors."""

    folder: Path
    step: int
    state: dict[str, Any]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of one part ("network", "optimizer", "ema", "loss") on the CPU; empty if it was not stored."""
        path = self.folder / f"{part}.safetensors"
        return tensor_files.read(path)[0] if path.exists() else {}


def save(run_folder: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write the checkpoint of `step` and return its folder. Only one process calls this.

    parts: tensors by part, on the CPU and not sharing memory. state: JSON values that a resume needs. Raises OSError
    (disk full, no permission, a file shorter than what was written) or whatever the writer raises; nothing that looks
    like a checkpoint is left behind then.
    """
    from safetensors.torch import save_file

    root = run_folder / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    size = sum(t.numel() * t.element_size() for tensors in parts.values() for t in tensors.values())
    free = shutil.disk_usage(root).free
    if free < size + MARGIN:
        raise OSError(f"{root}: {free / 2**20:.0f} MiB free, this checkpoint needs {(size + MARGIN) / 2**20:.0f} MiB")
    final = root / f"step_{step:08d}"
    temporary = root / f".step_{step:08d}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for part, tensors in parts.items():
            if tensors:
                flat = {name: value.contiguous() for name, value in tensors.items()}
                path = temporary / f"{part}.safetensors"
                save_file(flat, path, metadata={"step": str(step), "part": part})
                _check_written(path, flat)
        files = {path.name: _identity(path) for path in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT, "step": step, "files": files, "state": dict(state)}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in temporary.iterdir():
            _flush(path)
        _flush(temporary)
        if final.exists():  # a damaged checkpoint of the same step, which no resume would have taken
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def verify(folder: Path) -> Checkpoint:
    """Read a checkpoint's manifest and check every file's size and hash, and that tensors can be read from it.

    Raises UserError that names the file and what is wrong with it, also where the disk cannot read it.
    """
    path = folder / "manifest.json"
    with _reading(path):
        if not path.is_file():
            raise UserError(f"{folder}: not a checkpoint, manifest.json is missing")
    manifest = json_files.read(path)
    try:
        made_as, step, state = manifest["format"], manifest["step"], dict(manifest["state"])
        files = {name: {"size": about["size"], "sha256": about["sha256"]} for name, about in manifest["files"].items()}
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: damaged manifest ({type(error).__name__}: {error})") from None
    if made_as != FORMAT:
        raise UserError(
            f"{path}: format {made_as!r:.40}, this version of vireo reads {FORMAT}; go on with the other one"
        )
    if not _is_count(step) or step > LAST:
        raise UserError(f"{path}: damaged manifest (step is {step!r:.40}, expected a whole number from 0 to {LAST})")
    _check_state(path, {"owes_validation": False, **state})  # which older ones do not say
    if _NAME.fullmatch(folder.name) and folder.name != f"step_{step:08d}":
        raise UserError(f"{path}: it says step {step}, its folder another one")
    for name, expected in files.items():
        with _reading(folder / name):
            _check_file(folder, name, expected)
    return Checkpoint(folder, step, state)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_best(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and _is_count(value.get("step")) and _is_finite(value.get("value"))
    )


# What a resume reads of the state: what it is for people, and whether a value can be it.
_STATE: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "position": ("a whole number from 0", _is_count),
    "skipped": ("a whole number from 0", _is_count),
    "usual_loss": ("a finite number", _is_finite),
    "losses_seen": ("a whole number from 0", _is_count),
    "global_batch": ("a whole number from 1", lambda value: _is_count(value) and value > 0),
    "strategy": ("an object", lambda value: isinstance(value, dict)),
    "best": ("null, or a step and a finite value", _is_best),
    "frozen": ("a hash", lambda value: isinstance(value, str)),
    "tracker_id": ("null, or a word", lambda value: value is None or isinstance(value, str)),
    "owes_validation": ("true or false", lambda value: isinstance(value, bool)),
}


def _check_state(path: Path, state: Mapping[str, Any]) -> None:
    """Raise UserError for what a resume could not go on from: no hash covers the manifest itself."""
    for key, (expected, can_be) in _STATE.items():
        if key not in state:
            raise UserError(f"{path}: damaged manifest (its state lacks {key}, {expected})")
        if not can_be(state[key]):
            raise UserError(f"{path}: damaged manifest ({key} is {state[key]!r:.40}, expected {expected})")


def _check_file(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    """Raises UserError for a file of a checkpoint that is not as its manifest says."""
    file = folder / name
    if Path(name).name != name or not file.is_file():
        raise UserError(f"{file}: named by the manifest but missing, or not in its folder")
    if file.stat().st_size != expected["size"]:
        raise UserError(f"{file}: {file.stat().st_size} bytes, the manifest says {expected['size']} (cut off?)")
    if _identity(file) != expected:
        raise UserError(f"{file}: its SHA-256 is not the manifest's; the file was changed or damaged")
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError

        try:
            tensor_files.header_shapes(file)
        except SafetensorError as error:
            raise UserError(f"{file}: its tensors cannot be read, though it is as it was written: {error}") from error


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """A file that the disk cannot read is as good as damaged."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error


def steps(run_folder: Path) -> list[int]:
    """Steps of the checkpoints that are visible in a run, ascending; not verified."""
    root = run_folder / "checkpoints"
    names = (_NAME.fullmatch(path.name) for path in root.iterdir()) if root.is_dir() else ()
    return sorted(int(match[1]) for match in names if match)


def folder_of(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step_{step:08d}"


def latest(run_folder: Path, before: int | None = None) -> Checkpoint | None:
    """The newest checkpoint that verifies; damaged ones are reported by name and passed over. None: a fresh start.

    before: only those whose next step is this one or an earlier one.
    """
    for step in reversed([step for step in steps(run_folder) if before is None or step <= before]):
        try:
            return verify(folder_of(run_folder, step))
        except UserError as error:
            log.warning("checkpoint passed over: %s", error)
    return None


def set_damaged_aside(run_folder: Path, found: Checkpoint | None) -> list[int]:
    """Rename what `latest` has passed over before it found this, so that `retain` takes none of them for the newest.

    They become `step_<n>.damaged`. Returns their steps. The caller holds the run's lock, and goes on from `found`.
    """
    damaged = [step for step in steps(run_folder) if found is None or step > found.step]
    for step in damaged:
        _set_aside(folder_of(run_folder, step), ".damaged")
    return damaged


def _set_aside(folder: Path, suffix: str) -> Path:
    aside = folder.with_suffix(suffix)
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def adopt(run_folder: Path, source: Path) -> None:
    """Make a checkpoint, of this run or of another one, the one that this run goes on from: its newest.

    Later ones of this run are set aside as `step_<n>.aside`. Files are linked where the file system can. The caller
    holds the run's lock. Raises UserError if `source` is not a good checkpoint; nothing has changed then.
    """
    found, root = verify(source), run_folder / "checkpoints"
    final = folder_of(run_folder, found.step)
    own = final.exists() and final.samefile(source)
    temporary = root / f".{final.name}.tmp-{os.getpid()}"
    if not own:
        shutil.copytree(source, temporary, copy_function=_link)
    for step in steps(run_folder):
        if step > found.step or (step == found.step and not own):
            there = folder_of(run_folder, step)
            aside = _set_aside(there, ".aside")
            log.warning("%s is set aside as %s, since the run goes on from step %d", there, aside.name, found.step)
    if not own:
        temporary.rename(final)
    _flush(root)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def retain(run_folder: Path, keep_last: int, keep_every: int | None, best: int | None) -> list[int]:
    """Delete old checkpoints; returns the deleted steps. Called after a new one is visible.

    Kept: the newest `keep_last` (at least one), multiples of `keep_every`, and the best step.
    """
    found = steps(run_folder)
    keep = set(found[-max(1, keep_last) :]) | {best}
    doomed = [s for s in found if s not in keep and not (keep_every and s % keep_every == 0)]
    for step in doomed:
        # Renamed first, so that a kill in the middle leaves no folder that looks complete.
        grave = run_folder / "checkpoints" / f".step_{step:08d}.deleted"
        folder_of(run_folder, step).rename(grave)
        shutil.rmtree(grave)
    return doomed


def clean(run_folder: Path) -> None:
    """Remove what killed processes left behind; the caller holds the run's lock."""
    root = run_folder / "checkpoints"
    for path in root.glob(".step_*") if root.is_dir() else ():
        log.info("removed unfinished %s", path.name)
        shutil.rmtree(path)


def _check_written(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises OSError unless the file holds these tensors whole: its hash, which is taken of the file, cannot tell."""
    from safetensors import SafetensorError

    try:
        found = tensor_files.header_shapes(path)
    except SafetensorError as error:
        raise OSError(f"{path} was written, but cannot be read: {error}") from error
    if found != {name: tuple(value.shape) for name, value in tensors.items()}:
        raise OSError(f"{path} was written, but holds other tensors than it was given")


def _identity(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
