"""Where a value of a composed config was written: the command line, or a file and a line."""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from hydra._internal.defaults_list import DefaultsList
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from vireo.config.search import NAME, searching

COMMAND_LINE = "command line"


class Source(NamedTuple):
    """A file that takes part in a composition and the key under which its content is put ("" is the root)."""

    path: Path
    package: str


def place(key: str, overrides: Sequence[str], files: Callable[[], list[Source]]) -> str:
    """Who gave `key` its value: "command line", "conf/experiment/taehv.yaml:7", or "" where nobody did.

    Of a key that is missing, the place of the node it would stand in. files: gives the composition's `sources`.
    """
    return _on_command_line(key, overrides) or _in_files(key, files())


def sources(overrides: Sequence[str]) -> list[Source]:
    """The files of a composition, later ones win; none if its groups cannot be composed."""
    with searching():
        folders = search_folders()
        defaults = _defaults_list(overrides)
    found = []
    for default in defaults.defaults if defaults else ():
        for folder in folders:
            path = folder / f"{default.config_path}.yaml"
            if path.is_file():
                found.append(Source(path, default.package or ""))
                break
    return found


def search_folders() -> list[Path]:
    """Folders that are searched for YAML files, the first match wins; call inside `searching()`."""
    found = GlobalHydra.instance().config_loader().get_sources()
    folders = [Path(source.path) for source in found if source.scheme() == "file"]
    return [folder for folder in folders if folder.is_dir()]


def groups() -> list[str]:
    """Names of the config groups: what can be chosen with <group>=<option>."""
    with searching():
        folders = search_folders()
    return sorted({path.name for folder in folders for path in folder.iterdir() if path.is_dir()})


def is_group(name: str) -> bool:
    with searching():
        return any((folder / name).is_dir() for folder in search_folders())


def is_option(group: str, name: str) -> bool:
    with searching():
        return any((folder / group / f"{name}.yaml").is_file() for folder in search_folders())


def choices(overrides: Sequence[str]) -> dict[str, str]:
    """The chosen option of each group, {"model": "taehv", …}; empty where they cannot be composed."""
    with searching():
        defaults = _defaults_list(overrides)
    known = defaults.overrides.known_choices if defaults else {}
    return {group: str(option) for group, option in known.items() if option is not None}


def _defaults_list(overrides: Sequence[str]) -> DefaultsList | None:
    """What Hydra puts together for the words that choose an option which exists; the others only give values."""
    choosing = []
    for word in overrides:
        group, _, option = word.partition("=")
        if is_option(group.lstrip("+"), option):
            choosing.append(word)
    try:
        return GlobalHydra.instance().config_loader().compute_defaults_list(NAME, choosing, RunMode.RUN)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError):
        return None


def short(path: Path) -> str:
    """A path as a person would type it here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _on_command_line(key: str, overrides: Sequence[str]) -> str:
    for override in reversed(overrides):
        given = override.partition("=")[0].lstrip("+~")
        if key == given or (key.startswith(f"{given}.") and not is_group(given)):
            return COMMAND_LINE
    return ""


def _in_files(key: str, files: Sequence[Source]) -> str:
    wanted = tuple(key.split("."))
    deepest, where = 0, ""
    for source in reversed(files):
        package = tuple(source.package.split(".")) if source.package else ()
        if package != wanted[: len(package)]:
            continue
        depth, line = _find(source.path, wanted[len(package) :])
        if len(package) + depth > deepest:
            deepest, where = len(package) + depth, f"{short(source.path)}:{line}"
    return where


def _find(path: Path, keys: tuple[str, ...]) -> tuple[int, int]:
    """How many of the nested keys a file holds, and the line of the last one found."""
    node, depth, line = _tree(path), 0, 1
    for key in keys:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        match = next(((name, value) for name, value in pairs if name.value == key), None)
        if match is None:
            break
        line, node, depth = match[0].start_mark.line + 1, match[1], depth + 1
    return depth, line


@functools.cache
def _tree(path: Path) -> yaml.Node | None:
    try:
        return yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None
