"""All mistakes of a composed config at once, before anything heavy is imported."""

import functools
import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vireo.config import defaults_lists, interpolation, knobs, places, sizes, targets
from vireo.config.interpolation import Absent
from vireo.config.problems import Problem, keys, nearest_key

WEIGHTS = (".pt", ".pth", ".safetensors")  # suffixes of files that hold them
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def validate(cfg: DictConfig, overrides: Sequence[str] = (), folders: Sequence[str] = sizes.FOLDERS) -> list[Problem]:
    """Everything that is wrong with a composed config, with the places where it was written; empty if nothing is.

    overrides: the words it was composed from. folders: of `paths`, whose files have to be there. Files are looked at,
    nothing is imported but the model's own checks.
    """
    choices = functools.cache(lambda: places.choices(overrides))
    files = functools.cache(lambda: places.sources(overrides))
    raw = interpolation.unresolved(cfg)
    values, problems = interpolation.expand(cfg, choices)
    problems += defaults_lists.check()
    problems += knobs.check(values)
    problems += targets.check(values)
    problems += _check_run(values)
    problems += _missing_weights(raw) if "weights" in folders else ()
    problems += sizes.check(values, raw, overrides, choices, folders)
    problems += _model_checks(values, [problem.key for problem in problems])
    return [
        problem if problem.place else Problem(problem.key, problem.message, places.place(problem.key, overrides, files))
        for problem in _causes(problems, raw)
    ]


def _causes(problems: list[Problem], raw: dict[str, Any]) -> list[Problem]:
    """One problem for each key, without those that follow from another's: `data.num_frames` from `num_frames`."""
    wrong = {problem.key for problem in problems}
    written = dict(interpolation.strings(raw))
    first = {problem.key or problem.message: problem for problem in reversed(problems)}
    return [
        problem
        for key, problem in reversed(first.items())
        if not wrong.intersection(interpolation.references(written.get(key, "")))
    ]


def _check_run(values: dict[str, Any]) -> Iterator[Problem]:
    """What is wrong between keys: how long, how many at a time, what goes on from where."""
    known = {key: value for key, value in values.items() if not isinstance(value, Absent)}
    steps, epochs = known.get("steps"), known.get("epochs")
    if steps is None and epochs is None and "steps" in known:
        yield Problem("steps", "has no value, nor has epochs: say how long to train")
    if steps is not None and epochs is not None:
        yield Problem("epochs", f"is {epochs} and steps is {steps}: give one of them, steps=null epochs={epochs}")
    launcher, strategy = known.get("launcher"), known.get("strategy")
    processes = launcher.get("processes") if isinstance(launcher, dict) else None
    if isinstance(processes, str) and processes != "auto" and not processes.isdigit():
        yield Problem("launcher.processes", f"is {processes!r}; expected a whole number or auto")
    if isinstance(strategy, dict) and strategy.get("processes") == "one" and processes not in (1, "1", None):
        message = f"is {processes}, and strategy=single runs one process: choose strategy=ddp"
        yield Problem("launcher.processes", message)
    run = known.get("run")
    if isinstance(run, str) and not RUN_NAME.fullmatch(run):
        yield Problem("run", f"is {run!r}; expected letters, digits and - _ . only: it names a folder")
    init_from = known.get("init_from")
    if isinstance(init_from, str) and not Path(init_from).expanduser().exists():
        yield Problem("init_from", f"is {init_from!r}, which does not exist; expected a run, an export or a file")
    loss, data = known.get("loss"), known.get("data")
    weight = loss.get("subject_weight", 1) if isinstance(loss, dict) else 1
    if isinstance(weight, int | float) and weight != 1 and isinstance(data, dict) and data.get("subject_mask") is False:
        message = f"is {weight}, and without data.subject_mask=true no batch says where the subject is"
        yield Problem("loss.subject_weight", message)
    for key in known.get("allow_changes") or ():
        if key not in set(keys(values)):
            near = nearest_key(key, values)
            yield Problem("allow_changes", f"names {key}, which is no key.{f' Did you mean {near}?' if near else ''}")


def _missing_weights(raw: dict[str, Any]) -> Iterator[Problem]:
    """Files of weights that a network, an encoder or an adapter is given by their own paths and that are not there.

    raw: the config before its interpolations were replaced; `sizes` looks for what is below a folder of `paths`.
    """
    for key, text in interpolation.strings(raw):
        is_own = key.startswith(("model.", "adapter.")) and "${" not in text and Path(text).suffix in WEIGHTS
        if is_own and not Path(text).expanduser().exists():
            yield Problem(key, f"is {text!r}, which does not exist; expected a file of weights")


def _model_checks(values: dict[str, Any], wrong: Sequence[str]) -> Iterator[Problem]:
    """`model.checks.<key>` are functions that raise ValueError if the config does not suit the model.

    They are named after the key that they judge, take plain values, and stand in modules that import nothing heavy.
    wrong: keys with problems; a check is not called with values that are no good.
    """
    model = values.get("model")
    for key, node in (model.get("checks") or {}).items() if isinstance(model, dict) else ():
        arguments = {k: v for k, v in node.items() if k not in targets.HYDRA_KEYS}
        spoilt = any(other.startswith(f"model.checks.{key}") for other in wrong)
        if spoilt or any(isinstance(value, Absent) for value in arguments.values()):
            continue
        module, _, name = node["_target_"].rpartition(".")
        try:
            getattr(importlib.import_module(module), name)(**arguments)
        except ValueError as error:
            yield Problem(key, str(error))
