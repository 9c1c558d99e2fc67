"""Who needs which entries of a cache folder, why one is missing, and removing those that nobody needs.

A manifest, `<folder>/manifests/<name>.json`, lists the entries of one composition of data and encoder. It is written
before they are, so that an entry that no manifest lists is one that nobody asks for any more.
"""

import json
import logging
import os
import time
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vireo import cache
from vireo.errors import UserError

UNFINISHED_AFTER = 3600.0  # seconds: an older unfinished file belongs to no process any more

log = logging.getLogger(__name__)


class Listed(NamedTuple):
    """An entry in a manifest: what is encoded (output and the source's name) and the two identities in its key."""

    output: str
    name: str
    encoder: str
    source: str


class Manifest(NamedTuple):
    """The entries of one composition by key. file: where it lies; its time is that of its last use."""

    file: Path
    entries: dict[str, Listed]


class Pruned(NamedTuple):
    """Numbers and bytes of what was removed and of what stays."""

    removed: int
    removed_bytes: int
    kept: int
    kept_bytes: int


def write(folder: Path, name: str, entries: Mapping[str, Listed]) -> Path:
    """List what a composition needs, in place of what it needed when its files were others.

    Raises UserError if the folder cannot be written.
    """
    file = folder / "manifests" / f"{name}.json"
    text = _to_text(entries)
    try:
        if file.exists() and file.read_text(encoding="utf-8") == text:
            try:
                os.utime(file)
            except OSError as error:  # somebody else's folder, or a read-only one: nothing has to be written there
                log.info("%s: its time of use is not noted: %s", file, error.strerror)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, file)
    except OSError as error:
        raise UserError(
            f"the encoding cache in {folder} cannot be written: {error.strerror}. Choose another folder with "
            "cache.folder=…, or do without: cache=off"
        ) from error
    return file


def read(folder: Path) -> list[Manifest]:
    """All manifests of a folder, the last used first.

    Raises UserError for one that cannot be read: nobody knows which entries it needs.
    """
    files = sorted((folder / "manifests").glob("*.json"), key=lambda file: -file.stat().st_mtime)
    manifests = []
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            encoders = content["encoders"]
            entries = {
                key: Listed(output, name, encoders[encoder], source)
                for key, (output, name, encoder, source) in content["entries"].items()
            }
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file} cannot be read ({type(error).__name__}: {error}), so which entries it needs is not known. "
                "Delete it if its composition is not used any more; otherwise, cache=fill writes it anew"
            ) from error
        manifests.append(Manifest(file, entries))
    return manifests


def _to_text(entries: Mapping[str, Listed]) -> str:
    encoders = sorted({one.encoder for one in entries.values()})
    numbers = {encoder: number for number, encoder in enumerate(encoders)}
    text = json.JSONEncoder(ensure_ascii=False).encode  # without indent it is C: there are tens of thousands
    rows = ",\n".join(
        f"{text(key)}: {text((one.output, one.name, numbers[one.encoder], one.source))}"
        for key, one in sorted(entries.items())
    )
    return f'{{"encoders": {text(encoders)}, "entries": {{\n{rows}\n}}}}\n'


def prune(folder: Path) -> Pruned:
    """Remove the entries that no manifest lists, and what killed processes have left unfinished.

    A run that starts at this moment loses nothing: entries that are written from now on stay, and the others are first
    put aside, then the manifests are read again, and what one of them lists by now comes back. Whoever writes a
    manifest later finds those entries missing and makes them anew.
    Raises UserError, before anything is removed, for a manifest that cannot be read.
    """
    began = time.time()
    needed = _needed(folder)
    sizes: dict[Path, int] = {}
    aside: dict[Path, Path] = {}  # an entry -> where it is put, under the name of an unfinished one
    for path in [*cache.entries(folder), *cache.unfinished(folder)]:
        try:
            status = path.stat()
            sizes[path] = status.st_size
            if path.name.startswith("."):
                if began - status.st_mtime > UNFINISHED_AFTER:
                    aside[path] = path
            elif path.stem not in needed and status.st_mtime < began:
                place = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.tmp")
                os.replace(path, place)
                aside[path] = place
        except FileNotFoundError:  # finished, or removed by somebody else, in the meantime
            sizes.pop(path, None)
    back = list(aside)  # all, should a manifest not be readable any more
    try:
        needed = _needed(folder)
        back = [path for path in aside if path.stem in needed]
    finally:
        for path in back:
            with suppress(FileNotFoundError):  # another pruning has taken it for unfinished
                os.replace(aside.pop(path), path)
    for place in aside.values():
        place.unlink(missing_ok=True)
    removed = sum(sizes[path] for path in aside)
    return Pruned(len(aside), removed, len(sizes) - len(aside), sum(sizes.values()) - removed)


def _needed(folder: Path) -> set[str]:
    return set().union(*(manifest.entries for manifest in read(folder)))


def reasons(missing: Mapping[str, Listed], manifests: Sequence[Manifest]) -> dict[str, str]:
    """For each entry that the cache lacks what is new about it, as far as manifests tell that were written before.

    Compared is the nearest entry of the same output and name: "height 64 -> 128", "the file's content".
    """
    listed = set().union(*(manifest.entries for manifest in manifests))
    namesakes: dict[tuple[str, str], list[Listed]] = defaultdict(list)
    for manifest in manifests:
        for one in manifest.entries.values():
            namesakes[one.output, one.name].append(one)
    found = {}
    for key, one in missing.items():
        changes = [_changes(other, one) for other in namesakes[one.output, one.name]]
        if key in listed:
            found[key] = "not encoded yet, or removed"
        elif changes:
            nearest = min(changes, key=len)
            found[key] = ", ".join(nearest)
        else:
            found[key] = "new"
    return found


def _changes(old: Listed, new: Listed) -> list[str]:
    return differences("encoder", old.encoder, new.encoder) + differences("", old.source, new.source)


def differences(prefix: str, old: str, new: str) -> list[str]:
    """What differs between two identities, key by key where both are JSON mappings: ["height 64 -> 128"]."""
    before, now = _facts(prefix, old), _facts(prefix, new)
    found = []
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            shown = f"{name} {_shown(before.get(name))} -> {_shown(now.get(name))}"
            found.append("the file's content" if name == "content" else shown)
    return found


def _facts(prefix: str, identity: str) -> dict[str, object]:
    try:
        content = json.loads(identity)
    except ValueError:
        content = identity
    if not isinstance(content, dict):
        return {prefix or "source": content}
    return {f"{prefix} {name}".strip(): value for name, value in content.items()}


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
