"""From `key=value` words to one config, and what is wrong with them when Hydra cannot put them together.

Hydra stops at the first mistake and names it in its own terms. So when it fails, the words are looked at one by one
against a composition without types, which holds whatever the files say, and all mistakes are told together.
"""

import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vireo.config import chains, defaults_lists, places, targets
from vireo.config.interpolation import unresolved
from vireo.config.places import COMMAND_LINE
from vireo.config.problems import Problem, did_you_mean, nearest_key, report
from vireo.config.schema import Config
from vireo.config.search import NAME, register, searching
from vireo.config.sizes import FOLDERS
from vireo.config.validation import validate
from vireo.errors import UserError

COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)


OPTUNA = "hydra/sweeper=optuna"
FREE = ("chain.", "launcher.slurm.sbatch")  # may have keys that no file sets
NAMED_BY_OTHERS = ("model", "data", "loss")  # their choices stand in config.yaml's `sizes@…` entries


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The config of `key=value` words, as the command line would compose it. Raises UserError with all mistakes."""
    register()
    with searching():
        words = [_in_hydras_spelling(word) for word in overrides]
        try:
            with _told_as_hydras():
                return hydra.compose(NAME, words)
        except COMPOSE_ERRORS as error:
            raise UserError(report(diagnose(words, error))) from None


def problems(overrides: Sequence[str], folders: Sequence[str] = FOLDERS) -> list[Problem]:
    """Everything that is wrong with the config of these words; empty if nothing is. folders: see `judge`."""
    register()
    with searching():
        words = [_in_hydras_spelling(word) for word in overrides]
        try:
            with _told_as_hydras():
                cfg = hydra.compose(NAME, words)
        except COMPOSE_ERRORS as error:
            return diagnose(words, error)
        return judge(cfg, words, folders)


def judge(cfg: DictConfig, words: Sequence[str], folders: Sequence[str] = FOLDERS) -> list[Problem]:
    """Everything that is wrong with a composed config and, of a chain, with its stages; empty if nothing is.

    folders: of `paths`, whose files have to be there.
    """
    of_all, chain = validate(cfg, words, folders), unresolved(cfg)["chain"]
    if not chain:
        return of_all
    found = [*of_all, *chains.check(chain)]
    if len(found) > len(of_all):
        return found
    for name, own in chains.stages(chain, words).items():
        mistakes = [problem for problem in problems(own, folders) if problem not in of_all]
        found += [replace(problem, key=f"chain.{name}: {problem.key}") for problem in mistakes]
    return found


@contextmanager
def explain_mistakes(words: Sequence[str]) -> Iterator[None]:
    """Around the call of a `@hydra.main` function: what Hydra cannot compose or resolve becomes a UserError.

    words: the command line without the program; inside the block it is what Hydra understands (`tracker=null`). A
    sweep is judged before its first job starts: every value that it goes through, one at a time. With
    HYDRA_FULL_ERROR=1 in the environment errors pass unchanged.
    """
    register()
    arguments = get_args_parser().parse_intermixed_args(list(words))  # flags may stand between the others
    flags = [word for word in words if word not in arguments.overrides]
    folders = [path and Path(path).absolute() for path in (arguments.config_path, arguments.config_dir)]
    with searching(*folders):
        arguments.overrides = [_in_hydras_spelling(word) for word in arguments.overrides]
    sys.argv[1:] = [*arguments.overrides, *flags]
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        yield
        return
    # A launcher of jobs composes in each of them, which may be hours later.
    if arguments.multirun or any(word.startswith("launcher=") for word in words):
        with searching(*folders):
            for job in _jobs(arguments.overrides):
                if mistakes := problems(job):
                    raise UserError(report(mistakes))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and leaving the process
    try:
        with _told_as_hydras():
            yield
    except COMPOSE_ERRORS as error:
        with searching(*folders):
            raise UserError(report(diagnose(arguments.overrides, error))) from None
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


@contextmanager
def _told_as_hydras() -> Iterator[None]:
    """OmegaConf only asserts that no key is set below a null: here that becomes an error of Hydra's, as others are."""
    try:
        yield
    except AssertionError as error:
        if traceback.extract_tb(error.__traceback__)[-1].filename != inspect.getfile(OmegaConf):
            raise
        raise HydraException(str(error)) from error


def _in_hydras_spelling(word: str) -> str:
    """`tracker=null` and `~tracker` as `tracker=none`, where there is such an option; else `group=null` as `~group`.

    Hydra will not have a group set to nothing, and a group that is taken away cannot be interpolated. Nor does it
    allow another file for an option of a plugin, so vireo's settings of Optuna stand under another name.
    """
    if word == OPTUNA:
        return "hydra/sweeper=search"
    group, equals, option = word.lstrip("~").partition("=")
    if not (option == "null" if equals else word.startswith("~")) or not places.is_group(group):
        return f"++{word}" if group.startswith(FREE) else word
    return f"{group}=none" if places.is_option(group, "none") else f"~{group}"


def _jobs(overrides: Sequence[str]) -> list[list[str]]:
    """Jobs of a sweep, so that each value occurs in one: the first of all values, then each other with the first ones.

    All combinations can be a hundred times as many, and a mistake seldom hides in a combination.
    """
    alternatives = [_alternatives(word) for word in overrides]
    first = [values[0] for values in alternatives]
    others = [(place, word) for place, values in enumerate(alternatives) for word in values[1:]]
    return [first, *([*first[:place], word, *first[place + 1 :]] for place, word in others)]


def swept(words: Sequence[str]) -> list[str]:
    """Keys that take several values in a sweep with these words of a command line."""
    keys = []
    for word in get_args_parser().parse_intermixed_args(list(words)).overrides:
        try:
            [override] = OverridesParser.create().parse_overrides([word])
        except OverrideParseException:
            continue
        if override.is_sweep_override():
            keys.append(override.key_or_group)
    return keys


def require_sweeper(words: Sequence[str]) -> None:
    """Raises UserError for a search by Optuna where its plugin is not installed."""
    missing = not find_spec("hydra_plugins") or not find_spec("hydra_plugins.hydra_optuna_sweeper")
    if OPTUNA in words and missing:
        raise UserError(f"{OPTUNA} needs Optuna's plugin for Hydra: pip install 'vireo[optuna]'")


def _alternatives(word: str) -> list[str]:
    """The words that a word of a sweep stands for, in turn; a word that cannot be read, or is no sweep, for itself."""
    try:
        [override] = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides([word])
    except OverrideParseException:
        return [word]
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [f"{override.get_key_element()}={value.start}"]
    if override.is_discrete_sweep():
        return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()] or [word]
    return [word]


def diagnose(overrides: Sequence[str], error: Exception) -> list[Problem]:
    """All mistakes because of which these words could not be composed; `error` is told if nothing is found."""
    found = list(defaults_lists.check())
    parsed, unreadable = _parse(overrides)
    found += unreadable
    groups: list[Override] = []
    values: list[Override] = []
    for override in parsed:
        chooses = override.key_or_group.startswith("hydra/") or places.is_group(override.key_or_group)
        (groups if chooses else values).append(override)
    for override in list(groups):
        mistakes = list(_check_option(override))
        groups = [other for other in groups if other is not override or not mistakes]
        found += mistakes
    try:
        cfg = _compose_untyped([override.input_line or "" for override in groups])
    except COMPOSE_ERRORS as failure:
        return [*found, _in_a_file(failure)]
    for override in values:
        found += _apply(override, cfg)
    located = {problem.key for problem in found}
    found += [problem for problem in validate(cfg, overrides) if problem.key not in located]
    return list(dict.fromkeys(found)) or [_in_hydras_words(error)]


def apply(overrides: Sequence[str], cfg: DictConfig) -> Iterator[Problem]:
    """Change values of a composed config in place, as the command line would; what cannot be done is a problem."""
    register()
    with searching():
        parsed, unreadable = _parse(overrides)
        yield from unreadable
        for override in parsed:
            key = override.key_or_group
            if places.is_group(key) and key != "size":
                message = f"{override.input_line}: another {key} is another run; only values can be changed here"
                yield Problem("", message, COMMAND_LINE)
            else:
                yield from _apply(override, cfg)


def _parse(overrides: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """Overrides one by one, and the words that are none."""
    parser = OverridesParser.create()
    parsed, found = [], []
    for word in overrides:
        try:
            [override] = parser.parse_overrides([word])
        except OverrideParseException as error:
            key, equals, value = word.partition("=")
            quoted = f'["{value.strip("[]")}"]' if value.startswith("[") else f'"{value}"'
            hint = f"Put text in quotes: '{key}={quoted}'" if equals else "Expected key=value"
            found.append(Problem("", f"{word} cannot be read: {error.message.splitlines()[0]}. {hint}", COMMAND_LINE))
            continue
        if override.is_sweep_override():
            message = f"{word} holds several values. -m tries each in turn; a list is written [a,b], a text '\"a,b\"'"
            found.append(Problem("", message, COMMAND_LINE))
        else:
            parsed.append(override)
    return parsed, found


def _check_option(override: Override) -> Iterator[Problem]:
    """Whether the option that a word chooses exists."""
    group, option = override.key_or_group, override.value()
    if group.startswith("hydra/"):
        return  # Hydra's own and its plugins' options are checked by Hydra
    if override.is_delete() and group in NAMED_BY_OTHERS:
        yield Problem(group, f"is missing: choose an option with {group}=…", COMMAND_LINE)
    for name in option if isinstance(option, list) else [option]:
        if isinstance(name, str) and not places.is_option(group, name):
            yield Problem(f"{group}={name}", _no_such_option(group, name), COMMAND_LINE)


def _no_such_option(group: str, name: str) -> str:
    options = GlobalHydra.instance().config_loader().get_group_options(group)
    return f"there is no such option.{did_you_mean(name, options)} There are {', '.join(options)}"


def _compose_untyped(overrides: list[str]) -> DictConfig:
    """The composition with the schema's defaults but without its types, so that it holds what the files say."""
    store = ConfigStore.instance()
    untyped = OmegaConf.to_container(OmegaConf.structured(Config), enum_to_str=True)
    store.store(name="schema", node=untyped)
    try:
        return hydra.compose(NAME, overrides)
    finally:
        register()


def _apply(override: Override, cfg: DictConfig) -> Iterator[Problem]:
    """Do what a word asks for, or say why it cannot be done."""
    key, value = override.key_or_group, override.value()
    values = unresolved(cfg)
    known = _contains(values, key)
    group = key.replace("_", "-")
    if key.startswith("hydra."):
        return  # Hydra's own settings are checked by Hydra
    if override.is_delete():
        if not known:
            yield Problem(key, f"cannot be taken away: there is no such key.{_near(key, values)}", COMMAND_LINE)
    elif group != key and places.is_group(group):
        yield Problem(key, f"the group is written {group}={value}", COMMAND_LINE)
    elif known or override.is_add() or override.is_force_add():
        OmegaConf.update(cfg, key, value, merge=True, force_add=True)
    else:
        message = _below_null(key, values) or _about_argument(key, values, override)
        message = message or f"there is no such key.{_near(key, values)}"
        yield Problem(key, message, COMMAND_LINE)


def _near(key: str, values: dict[str, Any]) -> str:
    near = nearest_key(key, {**dict.fromkeys(places.groups()), **values})
    if near and places.is_group(near.replace("_", "-")):
        near = near.replace("_", "-")
    return f" Did you mean {near}?" if near else ""


def _contains(tree: Any, key: str) -> bool:
    """Whether a nested dict has a key such as `model.network.variant` or `optimizer.betas[0]`."""
    for name in re.split(r"[.\[\]]+", key.rstrip("]")):
        if isinstance(tree, dict) and name in tree:
            tree = tree[name]
        elif isinstance(tree, list) and name.isdigit() and int(name) < len(tree):
            tree = tree[int(name)]
        else:
            return False
    return True


def _below_null(key: str, values: dict[str, Any]) -> str:
    """What to say about a key of something that is null; nothing for others."""
    node: Any = values
    for depth, part in enumerate(parts := key.split(".")):
        if not isinstance(node, dict) or part not in node:
            return ""
        node = node[part]
        if node is None:
            above = ".".join(parts[: depth + 1])
            group = above.replace("_", "-")
            if not places.is_group(group):
                return f"{above} is null and has no keys"
            options = GlobalHydra.instance().config_loader().get_group_options(group)
            return f"{above} is null and has no keys; choose {group}={' or '.join(o for o in options if o != 'none')}"
    return ""


def _about_argument(key: str, values: dict[str, Any], override: Override) -> str:
    """What to say about a key of an object's node that no file sets; nothing for keys that stand elsewhere."""
    path, _, name = key.rpartition(".")
    node: Any = values
    for part in path.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict) or "_target_" not in node:
        return ""
    mistakes = {problem.key: problem.message for problem in targets.check_node(path, {**node, name: override.value()})}
    return mistakes.get(key, f"no file sets this argument of {node['_target_']}: write +{override.input_line}")


def _in_a_file(error: Exception) -> Problem:
    """What a file says that cannot be composed, whatever is on the command line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return Problem("", f"not valid YAML: {error.problem}", f"{places.short(Path(mark.name))}:{mark.line + 1}")
    told = _in_hydras_words(error)
    group = re.search(r"Could not override '([^'@]+)", told.message)
    option = re.search(r"Could not find '([^']+)/([^'/]+)'", told.message)
    for entry in defaults_lists.entries():
        if group and entry.group == group[1]:
            hint = did_you_mean(group[1], places.groups())
            return Problem(f"override /{group[1]}", f"there is no such group.{hint}", entry.place)
        if option and (entry.group, entry.option) == (option[1], option[2]):
            return Problem(f"{option[1]}: {option[2]}", _no_such_option(option[1], option[2]), entry.place)
    return told


def _in_hydras_words(error: Exception) -> Problem:
    """What could not be explained better, without the traceback."""
    causes = [error, *([error.__cause__] if error.__cause__ else [])]
    text = " ".join(" ".join(str(cause).split()) for cause in causes if str(cause))
    return Problem("", text or type(error).__name__)
