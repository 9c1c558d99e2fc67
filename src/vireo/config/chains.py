"""The stages of a chain, `chain: {stage1: {experiment: a}, stage2: {experiment: b, lr: 1e-5}}`, as words of their own.

A stage is an ordinary composition: of its experiment, of what is said about the whole chain, and of its own keys, which
win.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vireo.config import places
from vireo.config.problems import Problem

PLAIN = re.compile(r"[A-Za-z_][\w./-]*", re.ASCII)  # text that Hydra reads as text


def stages(chain: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, list[str]]:
    """The `key=value` words of each stage, in order.

    overrides: the words of the chain. Those about the chain itself, and those that a stage says otherwise, are left
    out.
    """
    common = [word for word in overrides if key(word).partition(".")[0] not in ("experiment", "chain")]
    found = {}
    for name, own in chain.items():
        words = list(_words(own))
        said = {key(word) for word in words}
        # Stages may share an experiment, so a name that is given to the chain becomes that of each stage.
        given = [f"{word}-{name}" if key(word) == "run" else word for word in common if key(word) not in said]
        found[name] = [*given, *words]
    return found


def check(chain: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with the node itself; its stages are judged as compositions."""
    for name, own in chain.items():
        if not isinstance(own, dict) or not isinstance(own.get("experiment"), str):
            yield Problem(f"chain.{name}", f"is {own!r}; an experiment is expected, chain.{name}.experiment=<name>")
        elif "chain" in own or "init_from" in own and name != next(iter(chain)):
            fault = "chain" if "chain" in own else "init_from"
            yield Problem(f"chain.{name}.{fault}", "is not for a stage, which starts from the export of the one before")


def key(word: str) -> str:
    """The key of a `key=value` word."""
    return word.partition("=")[0].lstrip("+~")


def _words(own: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """A stage's own nested keys as words that set them, whether they are there already or not."""
    for name, value in own.items():
        path = f"{above}{name}"
        if isinstance(value, dict) and value:
            yield from _words(value, f"{path}.")
        else:
            yield f"{'' if places.is_group(path) else '++'}{path}={_text(value)}"


def _text(value: Any) -> str:
    """A value as Hydra reads it."""
    match value:
        case None | True | False:
            return {None: "null", True: "true", False: "false"}[value]
        case str():
            plain = PLAIN.fullmatch(value) and value.lower() not in ("null", "true", "false", "nan", "inf")
            return value if plain else "'" + value.replace("'", "\\'") + "'"
        case list():
            return f"[{','.join(map(_text, value))}]"
        case dict():
            return f"{{{','.join(f'{name}:{_text(inner)}' for name, inner in value.items())}}}"
    return repr(value)
