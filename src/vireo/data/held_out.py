"""Which clips of a dataset are held out for validation: never trained on, and the same ones in every run."""

import hashlib
from collections.abc import Collection
from pathlib import Path

from vireo.data.listing import shortened
from vireo.errors import UserError


def held_out_names(names: Collection[str], rule: float | str, root: Path, unusable: Collection[str] = ()) -> set[str]:
    """The names that `rule` holds out.

    names: of all clips, relative to `root`; unusable: of those that may be listed but cannot be used. rule: one of
    - a fraction in [0, 1): a clip is held out if the hash of its name falls below it, whatever the other clips are,
      so that clips added later move no clip from one part to the other. Of two clips or more at least one is held
      out: the one with the lowest hash (only a set without a clip below the fraction can so lose it to an added one).
      The one with the highest hash is always trained on;
    - a folder below `root`: the clips in it;
    - a list file (as given, or below `root`): one name a line; blank lines and those that begin with # are skipped.
    Raises UserError for a rule that holds out nothing or everything, or names a clip that is not there.
    """
    if not isinstance(rule, str):
        return _by_hash(names, rule)
    if (root / rule).is_dir():
        folder = Path(rule).as_posix().rstrip("/") + "/"
        held_out = {name for name in names if name.startswith(folder)}
        if not held_out:
            raise UserError(f"held_out={rule}: none of the clips lies in {root / rule}")
    else:
        held_out = _by_list({*names, *unusable}, rule, root) - set(unusable)
    if len(held_out) == len(names):
        raise UserError(f"held_out={rule} holds out all {len(names)} clips: none is left to train on")
    return held_out


def _by_hash(names: Collection[str], fraction: float) -> set[str]:
    if fraction == 0 or len(names) < 2:
        return set()
    ranked = sorted(names, key=lambda name: (_hash(name), name))
    below = sum(_hash(name) < fraction for name in ranked)
    return set(ranked[: min(max(below, 1), len(ranked) - 1)])


def _hash(name: str) -> float:
    """Uniform in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "big") / 2**48


def _by_list(names: Collection[str], rule: str, root: Path) -> set[str]:
    file = next((path for path in (Path(rule), root / rule) if path.is_file()), None)
    if file is None:
        raise UserError(f"held_out={rule}: expected a fraction, a folder in {root}, or a list file; there is none")
    lines = enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
    listed = {number: line.strip() for number, line in lines if line.strip() and not line.lstrip().startswith("#")}
    unknown = [f"line {number}: {name}" for number, name in listed.items() if name not in names]
    if unknown:
        raise UserError(f"{file} lists clips that are not in {root}:\n{shortened(unknown)}")
    if not listed:
        raise UserError(f"held_out={rule}: {file} lists no clip")
    return set(listed.values())
