"""What makes two configs the same run: the hash, the name and the folder of a run, and what may differ in a resume."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Nothing of this changes what a run learns: where and on how many processes it runs, what is looked at and kept, how
# it is called. (The size is in its numbers; `interpolations` only says where values come from.)
NOT_PART_OF_A_RUN = (
    "run", "resume", "preempt_at", "max_hours", "notes", "tags", "allow_changes", "allow_targets", "interpolations",
    "machine", "mini_of", "launcher", "strategy", "logging", "tracker", "validation", "checkpoint", "loader",
    "faults.max_consecutive_skips", "faults.max_consecutive_save_failures", "cache", "paths.outputs", "model.sampler",
    "model.checks", "model.evaluations",
)  # fmt: skip
LENGTH = ("steps", "epochs")
TELLS_FOLDERS_APART = ("run", "experiment")  # whatever else a sweep varies
DIGITS = 8  # of the hash: 32 bits, for the few runs of one experiment
LONGEST_NAME = 60


def config_hash(resolved: dict[str, Any]) -> str:
    """Eight hexadecimal digits of everything in a resolved config that shapes the result.

    The same on every machine, whatever the order of keys; in the mini size also wherever the mini world lies.
    """
    return _digits(_facts(resolved))


def text_hash(resolved: dict[str, Any]) -> str:
    """16 hexadecimal digits of everything in a resolved config, whether it shapes the result or not."""
    text = json.dumps(resolved, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def source_hash() -> str:
    """16 hexadecimal digits of vireo's own source files as they are on this machine."""
    return files_hash([Path(__file__).parents[1]], "*.py")


def files_hash(folders: Sequence[Path], pattern: str) -> str:
    """16 hexadecimal digits of the names and contents of all such files below some folders."""
    digest = hashlib.blake2b(digest_size=8)
    for folder in folders:
        for path in sorted(folder.rglob(pattern)):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def run_name(overrides: Sequence[str], resolved: dict[str, Any], swept: Sequence[str] = ()) -> str:
    """The name of a run's folder: its size, the overrides in short, the hash. Letters, digits, - _ . ; at most 60.

    Overrides that do not shape the result are left out, the rest is sorted, so the order of words does not matter.
    Those of swept keys stand first, whether they shape it or not, and what has no room is left out whole: runs of a
    sweep can be told apart. `run`, if it is given, takes the place of the size, and the hash is of what is swept.
    """
    given = resolved["run"]
    named = [word for word in overrides if (_key(word) in swept if given else _shapes(word, swept))]
    chosen = sorted((_key(word) not in swept, _short(word, resolved)) for word in named if _key(word) != "run")
    name = str(given or resolved["size"])
    room = max(LONGEST_NAME - DIGITS - 1, len(name))
    for later, part in chosen:
        longer = f"{name}_{re.sub(r'[^A-Za-z0-9._-]+', '-', part)}"
        if not later or len(longer) <= room:
            name = longer
    return f"{name[:room].rstrip('._-')}-{_run_hash(overrides, resolved, swept)}"


def _run_hash(overrides: Sequence[str], resolved: dict[str, Any], swept: Sequence[str]) -> str:
    """The hash in a run's name. A sweep over what is no fact of a run (`strategy`) still has a run for each value."""
    varied = _varied(overrides, resolved, swept)
    return _digits(varied if resolved["run"] else _facts(resolved) | varied)


def _varied(overrides: Sequence[str], resolved: dict[str, Any], swept: Sequence[str]) -> dict[str, Any]:
    """What a sweep sets in this job: facts by key, and words whose key is no fact."""
    facts = _facts(resolved)
    found: dict[str, Any] = {}
    for key in swept:
        own = {name: value for name, value in facts.items() if _within(name, [key.replace("-", "_")])}
        found |= own or {word: None for word in overrides if _key(word) == key}
    return found


def _digits(facts: dict[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=DIGITS // 2).hexdigest()


def run_folder(resolved: dict[str, Any]) -> Path:
    """`<outputs>/<experiment>/<run>`."""
    return Path(resolved["paths"]["outputs"]) / resolved["experiment"] / resolved["run"]


def cache_name(resolved: dict[str, Any]) -> str:
    """The name of a composition in an encoding cache: shared by all configs with the same data and encoder."""
    of_cache = ("data", "model.encoder", "paths.data", "paths.weights")
    facts = {key: value for key, value in _facts(resolved).items() if _within(key, of_cache)}
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=DIGITS // 2).hexdigest()
    return f"{resolved['experiment']}-{resolved['size']}-{digest}"


def named(resolved: dict[str, Any], overrides: Sequence[str], swept: Sequence[str] = ()) -> dict[str, Any]:
    """The config with its run's name, unless it has one.

    A folder with the same hash is the same run, even if it was started with other words for the same values. A name
    that all jobs of a sweep have is completed by what is swept, so that no two of them share a folder; `run=a${lr}`
    tells them apart by itself.
    """
    if resolved["run"] is not None:
        said = resolved["interpolations"].get("run", "")
        rest = [key for key in swept if key not in TELLS_FOLDERS_APART and f"${{{key}}}" not in said]
        return (
            {**resolved, "run": run_name(overrides, resolved, rest)} if _varied(overrides, resolved, rest) else resolved
        )
    name = run_name(overrides, resolved, swept)
    beside = Path(resolved["paths"]["outputs"]) / resolved["experiment"]
    same = sorted(path.name for path in beside.glob(f"*-{_run_hash(overrides, resolved, swept)}"))
    return {**resolved, "run": name if name in same or not same else same[0]}


def differences(old: dict[str, Any], new: dict[str, Any], allow_changes: Sequence[str] = ()) -> list[str]:
    """What of a run's config may not differ when it goes on, and does: one line each.

    Free to differ are the length, everything that does not shape the result, and the keys (or nodes) of allow_changes.
    """
    return _lines(_facts(old), _facts(new), [*LENGTH, *allow_changes])


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Every value in which two resolved configs differ, whether it may or not: one line each."""
    return _lines(dict(_flat(old)), dict(_flat(new)), ["interpolations", "allow_changes"])


def _lines(before: dict[str, Any], now: dict[str, Any], free: Sequence[str]) -> list[str]:
    return [
        f"{key}: {_shown(before, key)} in the run, {_shown(now, key)} now"
        for key in sorted(before.keys() | now.keys())
        if not _within(key, free) and before.get(key, _NONE) != now.get(key, _NONE)
    ]


_NONE = object()


def _shown(facts: dict[str, Any], key: str) -> str:
    return json.dumps(facts[key]) if key in facts else "nothing"


def _facts(resolved: dict[str, Any]) -> dict[str, Any]:
    """Flat values by dotted key, only what shapes the result; folders inside values by their name in `paths`."""
    paths = resolved["paths"]
    facts = {key: value for key, value in _flat(resolved) if not _within(key, NOT_PART_OF_A_RUN)}
    if not resolved["chain"]:
        del facts["chain"]
    for folder in ("data", "weights", "outputs"):  # the last holds what a chain's stage starts from
        root = paths.get(folder)
        for key, value in facts.items():
            if root and isinstance(value, str) and key != f"paths.{folder}":
                facts[key] = _below(value, root, f"${{paths.{folder}}}")
        if resolved["size"] == "mini" and root and is_mini_world(root):
            facts[f"paths.{folder}"] = "mini"
    return facts


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts; lists are leaves, and so is an empty dict. 2.0 and 2 are one number."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _within(key: str, nodes: Sequence[str]) -> bool:
    return any(key == node or key.startswith(f"{node}.") for node in nodes)


def _below(value: str, root: str, name: str) -> str:
    return name + value[len(root) :] if value == root or value.startswith(f"{root}/") else value


def is_mini_world(root: str) -> bool:
    """Whether a folder is the data or the weights of an embedded world."""
    return re.search(r"/vireo/mini-[^/]+/(data|weights)$", root) is not None


def _key(override: str) -> str:
    return re.split("[=@]", override, maxsplit=1)[0].lstrip("+~")


def _shapes(override: str, swept: Sequence[str]) -> bool:
    """Whether an override is worth a place in the run's name."""
    key = _key(override)
    if key in ("experiment", "size") or key.startswith("hydra"):
        return False
    return key in swept or not _within(key, NOT_PART_OF_A_RUN)


def _short(override: str, resolved: dict[str, Any]) -> str:
    """ "model.network.variant=taew2_1" in short: "variant-taew2_1"; "~model.checks" as "no-checks".

    Numbers are written in one way: lr=1e-4 and lr=0.0001 are the same run.
    """
    key, _, value = override.partition("=")
    name = key.lstrip("+~").rpartition(".")[2]
    if key.startswith("~"):
        return f"no-{name}"
    meant = dict(_flat(resolved)).get(key.lstrip("+"))
    if isinstance(meant, int | float) and not isinstance(meant, bool):
        value = f"{meant:g}"
    return f"{name}-{value.strip('[]{}')}"
