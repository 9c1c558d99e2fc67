"""From a composed config to the plain values that a run is made of, and their file."""

import copy
import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from vireo.config import identity, interpolation, places, schema, targets
from vireo.config.composition import apply, compose, judge
from vireo.config.problems import Problem, report
from vireo.config.sizes import FOLDERS
from vireo.config.validation import validate
from vireo.errors import UserError


def settings(
    overrides: Sequence[str],
    swept: Sequence[str] = (),
    init_from: str | None = None,
    folders: Sequence[str] = FOLDERS,
) -> dict[str, Any]:
    """Composed, validated and resolved: what a run with these words is made of. Raises UserError with all mistakes.

    swept, init_from: see `settled`. folders: of `paths`, whose files have to be there; "data" alone for what needs no
    weights.
    """
    return settled(compose(overrides), overrides, swept, init_from, folders)


def settled(
    cfg: DictConfig,
    overrides: Sequence[str] | None = None,
    swept: Sequence[str] = (),
    init_from: str | None = None,
    folders: Sequence[str] = FOLDERS,
) -> dict[str, Any]:
    """A composed config as the settings of a run: validated, resolved, with its run's name.

    overrides: the words it was composed from; None asks the running Hydra app. swept: keys that stand first in the
    run's name. init_from: takes the place of the config's own. folders: as for `settings`. Raises UserError with all
    mistakes.
    """
    words = list(HydraConfig.get().overrides.task) if overrides is None else list(overrides)
    problems = judge(cfg, words, folders)
    if problems:
        raise UserError(report(problems))
    if init_from is not None:
        cfg = cfg.copy()
        cfg.init_from = init_from
    return identity.named(resolve(cfg), words, swept)


def outputs_folder() -> Path:
    """Where runs lie if nobody says otherwise on the command line."""
    return Path(compose().paths.outputs).expanduser()


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """Plain values, everything interpolated, folders absolute.

    `interpolations` keeps which value followed from which other, {"data.num_frames": "${num_frames}"}, so that one can
    be changed later and the others follow. Raises UserError for what is missing, cannot be resolved, or is secret.
    """
    _, problems = interpolation.expand(cfg, dict)
    problems += [Problem(key, "has no value") for key in sorted(OmegaConf.missing_keys(cfg))]
    if problems:
        raise UserError(report(problems))
    written = interpolation.unresolved(cfg)
    cfg = cfg.copy()
    for name, folder in cfg.paths.items():
        cfg.paths[name] = folder and str(Path(folder).expanduser().absolute())
    resolved: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)  # type: ignore[assignment]
    del resolved["machine"]  # its folders are in `paths` now
    resolved["interpolations"] = {
        key: text for key, text in interpolation.strings(written) if "${" in text and ":" not in text
    }
    return resolved


def change(resolved: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Resolved settings with some values changed and all that follows from them: `data.root` from `paths.data`.

    Groups cannot be chosen anew. Raises UserError with everything that is wrong with the words or the result.
    """
    tree: Any = copy.deepcopy({key: value for key, value in resolved.items() if key != "interpolations"})
    for key, text in resolved["interpolations"].items():
        *path, last = key.split(".")
        parent = functools.reduce(_child, path, tree)
        parent[int(last) if isinstance(parent, list) else last] = text
    cfg = OmegaConf.create({**tree, "machine": {}})
    problems = list(apply(overrides, cfg))
    if not problems:
        problems = validate(cfg, [f"size={resolved['size']}", *overrides])
    if problems:
        raise UserError(report(problems))
    return resolve(cfg)


def _child(node: Any, name: str) -> Any:
    return node[int(name)] if isinstance(node, list) else node[name]


class _WrittenOut(yaml.SafeDumper):
    """Writes a value that stands in several places in each of them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _WithoutAliases(yaml.SafeLoader):
    """Refuses aliases, by which ten lines can stand for more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name), which the config of a run has not")
        return super().compose_node(parent, index)


def to_text(resolved: dict[str, Any]) -> str:
    """Settings as YAML; `from_text` gives them back."""
    return yaml.dump(resolved, Dumper=_WrittenOut, sort_keys=False, allow_unicode=True, width=120)


def from_text(text: str, name: str = "resolved.yaml") -> dict[str, Any]:
    """Settings from YAML.

    Raises UserError for text that is no resolved config, lacks what this version reads, or names objects that none may
    name.
    """
    try:
        resolved = yaml.load(text, Loader=_WithoutAliases)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{name} is not valid YAML: {error}") from None
    if not isinstance(resolved, dict) or not {"experiment", "paths", "interpolations"} <= resolved.keys():
        raise UserError(f"{name} is not the resolved config of a run")
    lacking = _lacking(resolved, schema.Config)
    if lacking:
        raise UserError(
            f"{name} was written by another version of vireo: it lacks {', '.join(lacking)}. What it trained still "
            "serves: start anew with init_from=<its folder>, or give a verb experiment=… weights=<its folder>/export"
        )
    strangers = targets.strangers(resolved)
    if strangers:
        raise UserError(f"{name} calls {', '.join(strangers)}, which no config may call (see allow_targets)")
    return resolved


def _lacking(node: dict[str, Any], kind: Any, above: str = "") -> list[str]:
    """Keys of the schema that a resolved config has not."""
    found = []
    for field in dataclasses.fields(kind):
        key = f"{above}{field.name}"
        if field.name not in node and key != "machine":  # resolving takes it away
            found.append(key)
        elif isinstance(node.get(field.name), dict) and dataclasses.is_dataclass(field.type):
            found += _lacking(node[field.name], field.type, f"{key}.")
    return found


def save_resolved(resolved: dict[str, Any], path: Path) -> None:
    """Write a resolved config, at once: a reader sees the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(to_text(resolved), encoding="utf-8")
    temporary.replace(path)


def load_resolved(path: Path) -> dict[str, Any]:
    """Read what `save_resolved` wrote. Raises UserError for a missing file or one that holds something else."""
    try:
        return from_text(path.read_text(encoding="utf-8"), places.short(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
