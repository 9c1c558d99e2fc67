"""Objects from resolved settings: `_target_` is called with the other keys as arguments.

The keys are Hydra's (`_target_`, `_partial_`, `_recursive_`, `_args_`). Arguments are plain Python values and partial
functions are plain `functools.partial`s, so nothing of Hydra or OmegaConf gets into objects, workers or checkpoints.
"""

import functools
import importlib
from types import ModuleType
from typing import Any

from vireo.errors import UserError


def instantiate(node: dict[str, Any], **arguments: Any) -> Any:
    """The object that a node describes; `arguments` are added to the node's own.

    Nodes inside it become objects first, unless `_recursive_` is false. Raises UserError where the target itself does,
    and RuntimeError that names the target and its arguments for any other exception.
    """
    target = locate(node["_target_"])
    recursive = node.get("_recursive_", True)
    own = {k: _made(v) if recursive else v for k, v in node.items() if not k.startswith("_")}
    positional = [_made(v) if recursive else v for v in node.get("_args_", ())]
    if node.get("_partial_"):
        return functools.partial(target, *positional, **own, **arguments)
    try:
        return target(*positional, **own, **arguments)
    except UserError:
        raise
    except Exception as error:
        given = ", ".join(f"{name}={value!r:.80}" for name, value in {**own, **arguments}.items())
        raise RuntimeError(f"{node['_target_']}({given}): {type(error).__name__}: {error}") from error


def locate(path: str) -> Any:
    """What a dotted path names; modules on the way are imported.

    Raises UserError for what the path's package has not defined but imported: vireo.launch.os.system is not vireo's.
    """
    first, *rest = path.split(".")
    found, walked = importlib.import_module(first), first
    for name in rest:
        walked = f"{walked}.{name}"
        if not hasattr(found, name):
            importlib.import_module(walked)
        found = getattr(found, name)
        if isinstance(found, ModuleType) and found.__name__ != walked:
            raise _elsewhere(path, first, found.__name__)
    home = str(getattr(found, "__module__", None))
    if home.partition(".")[0] != first:
        raise _elsewhere(path, first, home)
    return found


def _elsewhere(path: str, package: str, home: str) -> UserError:
    return UserError(
        f"{path} may not be called by a config: it is of {home}, not of {package}. Name it by its own path, which "
        "allow_targets may have to allow, or write a function around it"
    )


def _made(value: Any) -> Any:
    if isinstance(value, dict):
        return instantiate(value) if "_target_" in value else {k: _made(v) for k, v in value.items()}
    return [_made(v) for v in value] if isinstance(value, list) else value
