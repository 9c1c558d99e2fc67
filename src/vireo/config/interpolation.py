"""The values of a composed config: every `${…}` replaced, or a problem that says why it cannot be.

Nothing secret may come into a config: what is in it is written into the run's folder and sent to trackers.
"""

import os
import re
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationResolutionError,
    InterpolationToMissingValueError,
    OmegaConfBaseException,
)

from vireo.config.problems import Problem

SECRET = re.compile(r"(^|_)(KEY|TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIALS?)(_|$)", re.IGNORECASE)
_ENVIRONMENT = re.compile(r"oc\.env:\s*([A-Za-z_][A-Za-z0-9_]*)")


class Absent(Enum):
    """What stands in the tree for a value that is not known."""

    MISSING = "???"  # nobody gave it
    UNRESOLVED = "unresolved"  # its interpolation fails
    REFERENCE = "reference"  # an interpolation of a whole node, which is judged where it stands


def unresolved(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain values with its interpolations as they are written; "???" for what is missing."""
    return OmegaConf.to_container(cfg, resolve=False, enum_to_str=True)  # type: ignore[return-value]


def expand(cfg: DictConfig, choices: Callable[[], dict[str, str]]) -> tuple[dict[str, Any], list[Problem]]:
    """The config as plain values, with `Absent` where there is none, and the problems of its interpolations.

    choices: gives the chosen option of each group, for messages; only called when there is a problem.
    """
    problems: list[Problem] = []
    blamed: set[str] = set()  # interpolations that lead nowhere, each reported where it is written

    def walk(raw: Any, node: Any, path: str) -> Any:
        if isinstance(raw, dict):
            return {k: leaf(v, node, k, f"{path}.{k}" if path else str(k)) for k, v in raw.items()}
        return [leaf(v, node, i, f"{path}.{i}") for i, v in enumerate(raw)]

    def leaf(raw: Any, node: Any, key: Any, path: str) -> Any:
        if isinstance(raw, dict | list):
            return walk(raw, node[key], path)
        if raw == "???":
            return Absent.MISSING
        if not isinstance(raw, str):
            return raw
        secrets = [name for name in _ENVIRONMENT.findall(raw) if SECRET.search(name)]
        if secrets:
            problems.append(Problem(path, secret_message(secrets[0])))
            return Absent.UNRESOLVED
        value = resolve(raw, node, key, path) if "${" in raw else raw
        if isinstance(value, str) and (name := secret_in(value)):
            problems.append(Problem(path, f"holds the value of {name}. {_WHY_NOT}"))
        return value

    def resolve(raw: str, node: Any, key: Any, path: str) -> Any:
        try:
            value = node[key]
        except InterpolationToMissingValueError:
            return Absent.UNRESOLVED
        except InterpolationKeyError as error:
            wanted = _wanted(error)
            if wanted in raw and wanted not in blamed:
                problems.append(Problem(path, _nothing_there(path, wanted, choices())))
            blamed.add(wanted)
            return Absent.UNRESOLVED
        except (InterpolationResolutionError, OmegaConfBaseException) as error:
            problems.append(Problem(path, _cannot_resolve(raw, error)))
            return Absent.UNRESOLVED
        if isinstance(value, DictConfig | ListConfig):
            return Absent.REFERENCE if isinstance(value, DictConfig) else OmegaConf.to_container(value, resolve=True)
        return value.value if isinstance(value, Enum) else value

    return walk(unresolved(cfg), cfg, ""), problems


def references(text: str) -> list[str]:
    """The keys that a text refers to: ["paths.data"] of "${paths.data}/clips"."""
    return re.findall(r"\$\{([A-Za-z_][\w.-]*)\}", text)


def strings(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """All strings of nested dicts and lists with their dotted keys."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in pairs:
        if isinstance(value, str):
            yield f"{prefix}{name}", value
        yield from strings(value, f"{prefix}{name}.")


_WHY_NOT = "What is in a config is written to disk and sent to trackers: leave secrets in the environment"


def secret_message(name: str) -> str:
    return f"reads the environment variable {name}, which looks like a secret. {_WHY_NOT}, where programs find them"


def secret_in(value: str) -> str | None:
    """The name of the environment's secret that a string contains, if any."""
    found = (n for n, v in os.environ.items() if len(v) >= 8 and v in value and SECRET.search(n))
    return next(found, None)


def _wanted(error: InterpolationKeyError) -> str:
    match = re.search(r"Interpolation key '([^']*)' not found", str(error))
    return match[1] if match else ""


def _nothing_there(path: str, wanted: str, choices: dict[str, str]) -> str:
    """ "loss=denoising needs model.noise_schedule, model=taehv has none"."""

    def choice(key: str) -> str:
        group = key.partition(".")[0]
        group = group if group in choices else group.replace("_", "-")
        return f"{group}={choices[group]}" if group in choices else ""

    asking, asked = choice(path), choice(wanted)
    if asking and asked and asking != asked:
        return f"{asking} needs {wanted}, {asked} has none"
    return f"refers to {wanted}, which is not in the config"


def _cannot_resolve(raw: str, error: Exception) -> str:
    text = str(error).splitlines()[0]
    match = re.search(r"Environment variable '([^']*)' not found", text)
    if match:
        return f"{raw} needs the environment variable {match[1]}, which is not set: export it, or give the key a value"
    return f"{raw} cannot be resolved: {text}"
