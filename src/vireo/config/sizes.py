"""The two sizes: the embedded demonstration, and the recipe on data and weights that have to be there."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vireo.config.interpolation import Absent, strings
from vireo.config.problems import Problem

# Where the folders below paths.weights come from: files of GitHub repositories, else ids of the Hugging Face hub.
WEIGHTS = {
    "taehv": "https://github.com/madebyollin/taehv (the files *.pth or *.safetensors)",
    "CogVideoX-2b": "THUDM/CogVideoX-2b",
    "CogVideoX-5b": "THUDM/CogVideoX-5b",
    "CogVideoX-5b-I2V": "THUDM/CogVideoX-5b-I2V",
    "CogVideoX1.5-5B": "THUDM/CogVideoX1.5-5B",
    "CogVideoX1.5-5B-I2V": "THUDM/CogVideoX1.5-5B-I2V",
    "instruct-pix2pix": "timbrooks/instruct-pix2pix",
    "stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse",
    "diffuEraser": "lixiaowen/diffuEraser",
    "animatediff-motion-adapter-v1-5-2": "guoyww/animatediff-motion-adapter-v1-5-2",
    "Wan2.1-T2V-1.3B-Diffusers": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "LongLive-1.3B": "Efficient-Large-Model/LongLive-1.3B",
    "SkyReels-A2": "Skywork/SkyReels-A2",
    "HunyuanVideo": "hunyuanvideo-community/HunyuanVideo",
    "LTX-2": "Lightricks/LTX-2",
}


FOLDERS = ("data", "weights")  # of `paths`, which size=full needs


def check(
    values: dict[str, Any],
    raw: dict[str, Any],
    overrides: Sequence[str],
    choices: Callable[[], dict[str, str]],
    folders: Sequence[str] = FOLDERS,
) -> Iterator[Problem]:
    """Whether the size was chosen knowingly, has numbers for this experiment, and finds its files.

    raw: the config before its interpolations were replaced, which tells what is read below which folder. folders: those
    that are looked for.
    """
    size, experiment, paths = values.get("size"), values.get("experiment"), values.get("paths")
    if not isinstance(paths, dict) or not isinstance(experiment, str):
        return
    if size == "mini":
        if values.get("mini_of") != experiment:
            yield _no_mini_numbers(experiment, choices())
        if not any(re.match(r"\+*size=", override) for override in overrides):
            yield from _size_not_chosen(raw["paths"])
    elif size == "full":
        for folder in folders:
            users = {k: _at(values, k) for k, text in strings(raw) if f"${{paths.{folder}}}" in text}
            if users and not isinstance(paths.get(folder), Absent):
                yield from _missing(folder, paths.get(folder), users)


def _size_not_chosen(paths: dict[str, Any]) -> Iterator[Problem]:
    for folder in ("data", "weights"):
        given = paths.get(folder)
        if given not in (f"${{mini_world:{folder}}}", "???"):
            yield Problem(
                f"paths.{folder}",
                f"is {given}, but no size was chosen. size=full trains the recipe on it; size=mini is the "
                "demonstration, a toy, and would use it too. Add one of the two",
            )


def _no_mini_numbers(experiment: str, choices: dict[str, str]) -> Problem:
    chosen = choices.get("experiment", experiment)
    if chosen != experiment:
        return Problem("experiment", f"is {experiment}, the chosen file is {chosen}.yaml: they must be called the same")
    return Problem(
        "size",
        f"there are no mini numbers for {experiment}: say size=full, or write sizes/mini/experiment/{experiment}.yaml "
        f"with `mini_of: {experiment}` and what is to be smaller",
    )


def _missing(folder: str, path: Any, users: dict[str, Any]) -> Iterator[Problem]:
    """What size=full needs below paths.data or paths.weights and does not find."""
    if path is None:
        yield Problem(
            f"paths.{folder}",
            f"size=full needs your {folder}{_how_to_get(folder, users)}. Give the folder: paths.{folder}=…, or "
            f"machine.{folder} in conf/local/default.yaml (see local/example.yaml), or VIREO_{folder.upper()}",
        )
    elif not Path(path).expanduser().is_dir():
        where = Path(path).expanduser().absolute()
        yield Problem(f"paths.{folder}", f"is {where}: there is no such folder{_how_to_get(folder, users)}")
    else:
        for key, text in users.items():
            file = Path(str(text)).expanduser()
            if not file.exists() and not any(file.parent.glob(f"{file.name}.*")):
                name = str(text).removeprefix(str(path)).lstrip("/")
                yield Problem(key, f"{file.absolute()} is missing{_how_to_get(folder, {key: name})}")


def _how_to_get(folder: str, users: dict[str, Any]) -> str:
    """Where the weights that some keys name can be had."""
    if folder != "weights":
        return ""
    names = {str(text).removeprefix("None/").partition("/")[0] for text in users.values()}
    origins = [f"{name}: {WEIGHTS[name]}" for name in sorted(names & WEIGHTS.keys())]
    return f" ({'; '.join(origins)})" if origins else ""


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree[int(name)] if isinstance(tree, list) else tree[name]
    return tree
