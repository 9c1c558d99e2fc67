"""Command lines of the verbs: `key=value` words, of which some are the verb's own and the rest belong to the config."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vireo import config, run_folder
from vireo.errors import UserError

FILES = ("resolved.yaml", run_folder.CHAIN)  # of a run's folder, and of a chain's


class Arguments(NamedTuple):
    """settings: the resolved config. folder: the run it belongs to, if one was named. own: the verb's own values."""

    settings: dict[str, Any]
    folder: Path | None
    own: dict[str, str]


def read(words: Sequence[str], own: Collection[str], folders: Sequence[str] = ("data", "weights")) -> Arguments:
    """Split the words; `run=` names a run's folder (or a name below outputs) whose config is taken.

    own: names of the verb's own keys. folders: of `paths`, in which what size=full wants must be there; for a run it
    was. Raises UserError for words that are not key=value, unknown runs and whatever is wrong with the config.
    """
    values, overrides = split(words, ["run", *own])
    if "run" in values:
        folder = find_run(values.pop("run"))
        return Arguments(config.change(config.load_resolved(folder / "resolved.yaml"), overrides), folder, values)
    return Arguments(config.settings(overrides, folders=folders), None, values)


def split(words: Sequence[str], own: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """A verb's own values, and the words for the config. Raises UserError for words that are not key=value."""
    values: dict[str, str] = {}
    overrides: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals and "/" not in word and not word.startswith("~"):
            raise UserError(f"{word!r} is not key=value; this verb takes {', '.join(f'{k}=' for k in own)}")
        if key in own:
            values[key] = value
        else:
            overrides.append(word)
    return values, overrides


def find_run(name: str) -> Path:
    """A run by its folder, or by its name anywhere below outputs; of a chain the stage that has begun last."""
    return run_folder.newest_stage(find(name))


def find(name: str) -> Path:
    """The folder of a run or of a chain, by itself or by its name anywhere below outputs."""
    path = Path(name)
    if is_run(path):
        return path
    outputs = config.outputs_folder()
    runs = sorted(path for path in outputs.glob("*/*") if is_run(path))
    found = [run for run in runs if run.name == name or f"{run.parent.name}/{run.name}" == name]
    if len(found) == 1:
        return found[0]
    known = "\n".join(f"  {run}" for run in (found or runs)[-10:]) or "  (none)"
    problem = "is the name of several runs" if found else "is neither a run's folder nor its name"
    raise UserError(f"run={name} {problem}. Runs below {outputs}:\n{known}")


def is_run(folder: Path) -> bool:
    """Whether this is the folder of a run or of a chain."""
    return any((folder / file).is_file() for file in FILES)


def whole(own: dict[str, str], key: str, default: int | None) -> int | None:
    """An own value as a whole number. Raises UserError if it is none."""
    if key not in own:
        return default
    try:
        return int(own[key])
    except ValueError:
        raise UserError(f"{key}={own[key]}: a whole number is expected") from None
