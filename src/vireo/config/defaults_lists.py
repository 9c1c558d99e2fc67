"""The defaults lists of YAML files, read as they are written: their keywords, and where an entry stands.

Hydra takes a misspelt keyword (`- overide /model: x`) for part of a group's name.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from vireo.config import places
from vireo.config.problems import Problem, did_you_mean
from vireo.config.search import searching

WORDS = ("optional", "override")


class Entry(NamedTuple):
    """`- override /model: taehv`: the keywords, the group without its slash, the option, and file:line."""

    words: list[str]
    group: str
    option: str
    place: str


def check() -> Iterator[Problem]:
    """A problem for each entry that begins with an unknown word, in all files that are searched."""
    for entry in entries():
        for word in entry.words:
            if word not in WORDS:
                message = f"{word!r} is no keyword of a defaults list.{did_you_mean(word, WORDS)}"
                yield Problem(f"{word} {entry.group}", message, entry.place)


def entries() -> Iterator[Entry]:
    """All entries that choose an option."""
    with searching():
        folders = places.search_folders()
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            text = path.read_text(encoding="utf-8")
            if "defaults:" in text:
                yield from _entries_of(path, text)


def _entries_of(path: Path, text: str) -> Iterator[Entry]:
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return  # told by whoever composes it
    lists = [value for name, value in getattr(tree, "value", ()) if name.value == "defaults"]
    for entry in lists[0].value if lists else ():
        for key, option in entry.value if isinstance(entry, yaml.MappingNode) else ():
            *words, group = key.value.split()
            place = f"{places.short(path)}:{key.start_mark.line + 1}"
            yield Entry(words, group.lstrip("/").partition("@")[0], str(option.value), place)
