"""vireo prepare experiment=<recipe> [out=<folder>] [strict=true] [resplit=0.1] [any override]
vireo prepare experiment=<recipe> cache=fill|status|verify|prune [any override]
vireo prepare mini out=<folder> [clips=480]

Convert a recipe's raw data into what it reads best. Entries that cannot be used are left out and reported; strict=true
refuses them. resplit=0.1 holds a tenth of the entries out, by `seed`, in place of the split that the data have.
A dataset's class takes part by a static method `prepare`, which gets what it names of its node's values and of these.

`cache=…` looks after the encodings of frozen networks (docs/cache.md): fill computes what is missing, as training with
cache=on does before its first step; status says what is there, what is missing and why; verify reads every entry; prune
removes those that no composition asks for any more.

`prepare mini` writes the edited clips of the demonstration, in the raw layout, to look at or to train on: `clips` is
the number of those for training.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from vireo.config.instantiation import locate
from vireo.errors import UserError
from vireo.verbs import arguments, prepare_cache

OWN = ("out", "strict", "resplit")
KINDS = {"out": (str, "a folder"), "strict": (bool, "true or false"), "resplit": (float, "a share such as 0.1")}


def main(words: Sequence[str]) -> int:
    if list(words[:1]) == ["mini"]:
        return _mini(words[1:])
    encodes = any(word.startswith("cache=") for word in words)
    given = arguments.read(words, (*OWN, "cache"), folders=("data", "weights") if encodes else ("data",))
    if encodes:
        others = sorted(given.own.keys() - {"cache"})
        if others:
            raise UserError(f"cache={given.own['cache']} goes without {', '.join(others)}: prepare the data first")
        return prepare_cache.main(given, given.own["cache"])
    own = {name: _value(name, text) for name, text in given.own.items()}
    if given.settings["size"] == "mini":
        from vireo.mini import world

        world.ensure()
    node = given.settings["data"]
    name = node["_target_"]
    prepare = getattr(locate(name), "prepare", None)
    if prepare is None:
        raise UserError(f"data of {given.settings['experiment']}: {name} is read as it is, there is nothing to prepare")
    takes = inspect.signature(prepare).parameters
    unknown = own.keys() - takes.keys()
    if unknown:
        raise UserError(f"{name} is not prepared with {', '.join(sorted(unknown))}; it takes {', '.join(takes)}")
    values = {"seed": given.settings["seed"], **node, **own}
    print(prepare(**{argument: value for argument, value in values.items() if argument in takes}))
    return 0


def _value(name: str, text: str) -> Any:
    kind, expected = KINDS[name]
    value = text if kind is str else yaml.safe_load(text)
    value = float(value) if kind is float and type(value) is int else value
    if not isinstance(value, kind):
        raise UserError(f"{name}={text}: {expected} is expected")
    return value


def _mini(words: Sequence[str]) -> int:
    from vireo.mini import frame_edits

    values = dict(word.partition("=")[::2] for word in words)
    unknown = values.keys() - {"out", "clips"}
    if unknown or not values.get("out"):
        raise UserError("vireo prepare mini takes out=<folder> and, perhaps, clips=<number>")
    clips = arguments.whole(values, "clips", frame_edits.NUM_TRAINING)
    out = Path(values["out"]).expanduser()
    frame_edits.write(out, clips or 0)
    print(
        f"{clips} clips to train on, {2 * frame_edits.NUM_HELD_OUT} held out: {out}\nto train on them: paths.data={out}"
    )
    return 0
