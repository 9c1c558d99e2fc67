"""The keys of the schema: do they exist, and do their values suit?"""

import dataclasses
import functools
import typing
from collections.abc import Iterator
from enum import Enum
from types import NoneType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vireo.config.interpolation import Absent
from vireo.config.problems import Problem, nearest_key
from vireo.config.schema import Config


def check(values: dict[str, Any]) -> Iterator[Problem]:
    """Unknown keys, wrong types, numbers out of range and missing values among what the schema names."""
    yield from _check(Config, values, "", values)


def _check(schema: type, node: dict[str, Any], prefix: str, tree: dict[str, Any]) -> Iterator[Problem]:
    fields = {field.name: field for field in dataclasses.fields(schema)}
    hints = typing.get_type_hints(schema)
    for name, value in node.items():
        key = f"{prefix}{name}"
        if name not in fields:
            yield unknown_key(key, tree)
        elif dataclasses.is_dataclass(hints[name]):
            if isinstance(value, dict):
                yield from _check(hints[name], value, f"{key}.", tree)
            else:
                yield Problem(key, f"is {value!r}; keys are expected: {key}.<key>=<value>")
        else:
            yield from _check_value(key, value, schema, fields[name], hints[name])


def unknown_key(key: str, tree: dict[str, Any]) -> Problem:
    """What to say about a key that the schema does not have; `tree` is where a near one is looked for."""
    known = {name: value for name, value in tree.items() if name in {f.name for f in dataclasses.fields(Config)}}
    near = nearest_key(key, known)
    hint = f" Did you mean {near}?" if near else ""
    return Problem(key, f"there is no such key.{hint}")


def _check_value(key: str, value: Any, schema: type, field: dataclasses.Field, hint: Any) -> Iterator[Problem]:
    if value is Absent.MISSING:
        yield Problem(key, f"has no value ({field.metadata['meaning']}): give it one, {key}=…")
    elif isinstance(value, Absent):
        return
    elif (hint is str or hint == str | None) and value in (True, False, "True", "False"):
        yield Problem(key, f"is {str(value).lower()}: YAML reads yes, no, on and off so; put the word in quotes")
    elif not _converts(schema, field.name, value):
        yield Problem(key, f"is {_shown(value)}; expected {_words(hint)}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from _check_range(key, value, field)


def _check_range(key: str, value: float, field: dataclasses.Field) -> Iterator[Problem]:
    limits = field.metadata
    at_least, above, below = limits.get("at_least"), limits.get("above"), limits.get("below")
    if at_least is not None and not value >= at_least:
        yield Problem(key, f"is {value}; at least {at_least} is expected")
    if above is not None and not value > above:
        yield Problem(key, f"is {value}; more than {above} is expected")
    if below is not None and not value < below:
        yield Problem(key, f"is {value}; less than {below} is expected")


def _converts(schema: type, name: str, value: Any) -> bool:
    """Whether OmegaConf takes the value for the field, as it would when composing."""
    try:
        _typed(schema)[name] = value
    except OmegaConfBaseException:
        return False
    return True


@functools.cache
def _typed(schema: type) -> DictConfig:
    """A config to try values on; what it holds does not matter."""
    return OmegaConf.structured(schema)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return f"{str(value).lower()} (YAML reads yes, no, on and off so; put a word in quotes)"
    return repr(value)


def _words(hint: Any) -> str:
    """A type in words: "a whole number or null"."""
    if typing.get_origin(hint) is dict or hint is dict:
        return "keys with values"
    if typing.get_origin(hint) is list:
        return "a list, [a,b]"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(str(member.value) for member in hint)}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
    if hint in names:
        return names[hint]
    return " or ".join(_words(part) for part in typing.get_args(hint))
