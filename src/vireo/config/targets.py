"""Objects named by `_target_`: may they be, do they exist, and do they take the arguments that the config gives?"""

import ast
from collections.abc import Iterator, Sequence
from typing import Any

from vireo.config import signatures
from vireo.config.interpolation import Absent
from vireo.config.problems import Problem, did_you_mean
from vireo.config.schema import MODEL_NODES, PASSED, TARGET_GROUPS

# A config can name any function of these and have it called; others need `allow_targets`.
ALLOWED = (
    "vireo",
    "torch.nn",
    "torch.optim",
    "diffusers",
    "transformers",
    "accelerate",
    "bitsandbytes.optim",
    "deepspeed.ops",
    "peft",
)
HYDRA_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")


def check(values: dict[str, Any]) -> Iterator[Problem]:
    """Everything that is wrong with the `_target_` nodes of an expanded config."""
    yield from _check_groups(values)
    allowed = [*ALLOWED, *(name.rstrip(".") for name in values.get("allow_targets") or ())]
    for path, node in _nodes(values, ""):
        yield from check_node(path, node, allowed)


def strangers(values: dict[str, Any]) -> list[str]:
    """Targets of a config that neither vireo nor its own allow_targets lets it name."""
    allowed = [*ALLOWED, *(name.rstrip(".") for name in values.get("allow_targets") or ())]
    named = [str(node["_target_"]) for _, node in _nodes(values, "")]
    return sorted({target for target in named if not may_name(target, allowed)})


def may_name(target: str, allowed: Sequence[str]) -> bool:
    return any(target == name or target.startswith(f"{name}.") for name in allowed)


def _nodes(tree: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(tree, dict):
        if "_target_" in tree:
            yield path, tree
        for key, value in tree.items():
            yield from _nodes(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from _nodes(value, f"{path}.{index}")


def _check_groups(values: dict[str, Any]) -> Iterator[Problem]:
    """Each group's node is there and names its object."""
    for group, needed in TARGET_GROUPS.items():
        yield from _check_presence(group, values.get(group), needed, group.replace("_", "-"))
    model = values.get("model")
    if not isinstance(model, dict):
        yield Problem("model", "is missing: choose one with model=…")
        return
    for name in model.keys() - MODEL_NODES.keys():
        hint = did_you_mean(f"model.{name}", [f"model.{known}" for known in MODEL_NODES])
        yield Problem(f"model.{name}", f"is nothing that vireo reads.{hint} A model has {', '.join(MODEL_NODES)}")
    for name, needed in MODEL_NODES.items():
        if needed:
            yield from _check_presence(f"model.{name}", model.get(name), True, "model")
    for group in ("checks", "evaluations"):
        for name, node in (model.get(group) or {}).items():
            yield from _check_presence(f"model.{group}.{name}", node, False, "model")


def _check_presence(path: str, node: Any, needed: bool, group: str) -> Iterator[Problem]:
    if node is None:
        if needed:
            yield Problem(path, f"is missing: choose an option with {group}=…")
    elif not isinstance(node, dict):
        if node is not Absent.REFERENCE:
            yield Problem(
                path, f"is {node!r}; a node with a _target_ is expected. An option is chosen by {group}=<name>"
            )
    elif "_target_" not in node:
        given = ", ".join(key for key in node) or "nothing"
        yield Problem(
            path, f"has no _target_, only {given}: these values belong to no object. Choose one with {group}=…"
        )


def check_node(path: str, node: dict[str, Any], allowed: Sequence[str] = ALLOWED) -> Iterator[Problem]:
    """What is wrong with one `_target_` node; nodes inside it are not looked at."""
    target = node["_target_"]
    if not isinstance(target, str):
        if not isinstance(target, Absent):
            yield Problem(f"{path}._target_", f"is {target!r}; a dotted path such as vireo.losses.… is expected")
        return
    if not may_name(target, allowed):
        package = target.rpartition(".")[0] or target
        yield Problem(
            f"{path}._target_",
            f"{target} may not be called by a config; that is left to {', '.join(allowed)}. "
            f"If you trust it: allow_targets=[{package}]",
        )
        return
    try:
        signature = signatures.signature(target)
    except signatures.Missing as missing:
        if missing.within == "":
            yield Problem(f"{path}._target_", f"{target} needs the package {missing.wanted}, which is not installed")
        elif may_name(target, ["vireo"]):
            hint = did_you_mean(missing.wanted, missing.names)
            yield Problem(f"{path}._target_", f"there is no {target}: {missing}.{hint}")
        return
    if signature is not None:
        yield from _check_arguments(path, node, target, signature)


def _check_arguments(
    path: str, node: dict[str, Any], target: str, signature: signatures.Signature
) -> Iterator[Problem]:
    passed = PASSED.get(path, {})
    positional = len(node.get("_args_") or ())
    parameters = {p.name: p for p in signature.parameters[positional:]}
    for name, value in node.items():
        if name in HYDRA_KEYS:
            continue
        if name in passed:
            yield Problem(f"{path}.{name}", f"is not set here: {passed[name]}")
        elif name in parameters:
            annotation = parameters[name].annotation
            if value is not Absent.MISSING and not _suits(annotation, value):
                yield Problem(f"{path}.{name}", _wrong_type(value, annotation))
        elif not signature.takes_any:
            known = [p for p in signature.names if p not in passed]
            yield Problem(
                f"{path}.{name}",
                f"{target} has no argument {name}.{did_you_mean(name, known)} "
                f"It takes {', '.join(known) if known else 'none'}",
            )
    if not node.get("_partial_"):
        lacking = [p.name for p in parameters.values() if p.required and p.name not in node and p.name not in passed]
        if lacking:
            yield Problem(path, f"{target} needs {' and '.join(lacking)}")


def _suits(annotation: ast.expr | None, value: Any) -> bool:
    """Whether a value, as far as it is known, suits an annotation; objects are not judged."""
    if isinstance(value, Absent) or (isinstance(value, dict) and "_target_" in value):
        return True
    if isinstance(value, list) and any(isinstance(v, Absent | dict) for v in value):
        return True
    return signatures.accepts(annotation, value)


def _wrong_type(value: Any, annotation: ast.expr | None) -> str:
    expected = ast.unparse(annotation) if annotation is not None else ""
    hint = " (YAML reads yes, no, on and off as true and false: put it in quotes)" if isinstance(value, bool) else ""
    return f"is {value!r}{hint}; expected {expected.replace(' | ', ' or ')}"
