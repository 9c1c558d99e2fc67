"""Config in words: what can be chosen, for `--help`; what a run is, for its first lines and its tracker."""

import dataclasses
import textwrap
import typing
from pathlib import Path
from typing import Any

from vireo.config import identity, places
from vireo.config.schema import Config
from vireo.config.search import conf_dir

NOT_CHOSEN = ("experiment", "hydra", "local", "sizes")  # folders of conf/ whose options nobody types
NOT_TYPED = ("mini_of",)  # keys that only files set


def describe_experiments() -> dict[str, str]:
    """Each experiment with the first line of its comment that is no command, by name."""
    files = sorted((conf_dir() / "experiment").glob("*.yaml"))
    return {path.stem: _first_sentence(path) for path in files}


def experiments() -> list[str]:
    return list(describe_experiments())


def help_section(name: str) -> str:
    """A part of the text that `--help` prints: "experiments", "groups" or "knobs"."""
    match name:
        case "experiments":
            rows = describe_experiments()
        case "groups":
            rows = {
                group: ", ".join(path.stem for path in sorted((conf_dir() / group).glob("*.yaml")))
                for group in places.groups()
                if group not in NOT_CHOSEN
            }
        case _:
            rows = knobs()
    width = max(map(len, rows))
    wrapped = textwrap.TextWrapper(118, subsequent_indent=" " * (width + 4))
    return "\n".join(wrapped.fill(f"  {key:<{width}}  {meaning}") for key, meaning in rows.items()).replace("$", "$$")


def knobs() -> dict[str, str]:
    """Every key of the schema with its meaning and default; groups, which are chosen, are left out."""
    rows = {}
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        if field.name in NOT_TYPED:
            continue
        if dataclasses.is_dataclass(hints[field.name]):
            names = [inner.name for inner in dataclasses.fields(hints[field.name])]
            rows[field.name] = f"{field.metadata['meaning']}: {', '.join(names)}"
        elif not (conf_dir() / field.name.replace("_", "-")).is_dir() or field.name == "experiment":
            default = getattr(field.default, "value", field.default)
            known = default not in ("???", None, "", dataclasses.MISSING)
            rows[field.name] = field.metadata["meaning"] + (f" ({default})" if known else "")
    return rows


def banner(settings: dict[str, Any], folder: Path) -> str:
    """The first lines of a run: what it is, how big a step is, where it goes, and whether it is the demonstration."""
    clips, accumulation = settings["batch_size"], settings["gradient_accumulation"]
    processes = settings["launcher"]["processes"]
    batch = f"{clips} clips" + (f" x {accumulation} micro-batches" if accumulation > 1 else "")
    if processes == "auto":
        batch += " on each GPU"
    else:
        batch += f" x {processes} processes" if int(processes) > 1 else ""
        batch += f" = {clips * accumulation * int(processes)} clips" if " x " in batch else ""
    length = f"{settings['steps']} steps" if settings["steps"] else f"{settings['epochs']} epochs"
    frames = f"{settings['num_frames']} frames of {settings['width']}x{settings['height']}"
    lines = [
        f"{settings['experiment']} ({settings['size']}): {length}, {frames}",
        f"one step: {batch}",
        f"folder:   {places.short(folder)}",
    ]
    if settings["size"] == "mini":
        clips = "generated clips" if identity.is_mini_world(settings["paths"]["data"]) else "your clips made small"
        words = f"experiment={settings['experiment']} size=full paths.data=<folder> paths.weights=<folder>"
        lines += [
            f"This is the demonstration: small weights, {clips}. The recipe itself:",
            f"  python train.py {words}",
        ]
    return "\n".join(lines)


def public(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that may leave this machine: without its folders, which stand as ${paths.data} and so on."""
    folders = {path: f"${{paths.{name}}}" for name, path in settings["paths"].items() if path}

    def shown(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shown(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [shown(inner) for inner in value]
        if isinstance(value, str):
            for path, name in folders.items():
                value = value.replace(path, name)
        return value

    return {key: shown(value) for key, value in settings.items() if key not in ("paths", "interpolations")}


def _first_sentence(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("# ")
        if text and not text.startswith(("@package", "python ", "vireo ")):
            return text
    return ""
