"""A user's mistake in a config, and what was probably meant."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """key: dotted, "" for none. message: what was found, what was expected, what to do. place: file:line or "command
    line", "" where nobody wrote the value."""

    key: str
    message: str
    place: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.place, self.key, self.message) if part)


def report(problems: Sequence[Problem]) -> str:
    """All mistakes in one message."""
    if len(problems) == 1:
        return str(problems[0])
    return "\n".join([f"{len(problems)} things to mend in the config:", *(f"  - {problem}" for problem in problems)])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The sentence " Did you mean x?", or nothing if no known word is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def nearest_key(key: str, tree: dict[str, Any]) -> str | None:
    """The dotted key of a nested dict that `key` was probably meant to be.

    First the path is followed and each part that is not there is replaced by its nearest sibling; else the same or
    nearly the same last part is looked for anywhere.
    """
    node: Any = tree
    path = []
    for part in key.split("."):
        names = list(node) if isinstance(node, dict) else []
        close = [part] if part in names else difflib.get_close_matches(part, names, n=1)
        if not close:
            break
        path.append(close[0])
        node = node[close[0]]
    else:
        return ".".join(path)
    by_last = {dotted.rpartition(".")[2]: dotted for dotted in sorted(keys(tree), key=len, reverse=True)}
    close = difflib.get_close_matches(key.rpartition(".")[2], by_last, n=1)
    return by_last[close[0]] if close else None


def keys(tree: Any, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a nested dict, nodes before what is in them."""
    for name, value in tree.items() if isinstance(tree, dict) else ():
        if not str(name).startswith("_"):
            yield f"{prefix}{name}"
            yield from keys(value, f"{prefix}{name}.")
