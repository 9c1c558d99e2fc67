"""What a `_target_` takes, read from its source without importing it.

Importing torch or diffusers takes seconds and a config should be judged in milliseconds. So the dotted path is followed
through the files: packages are found by Python's path finder, which runs no code of theirs, and the source is parsed.
What the source cannot say (compiled modules, lazily made names, dataclasses) is None: not checked.
"""

import ast
import functools
import importlib.machinery
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Parameter(NamedTuple):
    """annotation: its source's syntax tree, aliases of the same package written out, None without one. required: has no
    default."""

    name: str
    annotation: ast.expr | None
    required: bool


class Signature(NamedTuple):
    """parameters: in order, without self. takes_any: accepts further keywords (**kwargs)."""

    parameters: list[Parameter]
    takes_any: bool

    @property
    def names(self) -> list[str]:
        return [parameter.name for parameter in self.parameters]


class Missing(LookupError):
    """The dotted path leads nowhere. within: the part of it that exists; names: what there is instead."""

    def __init__(self, within: str, wanted: str, names: list[str]) -> None:
        super().__init__(f"{within} has no {wanted}" if within else f"there is no package {wanted}")
        self.within, self.wanted, self.names = within, wanted, names


class _Unknown(Exception):
    """The source does not say."""


class _Found(NamedTuple):
    """A definition and the module it stands in."""

    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    module: str


def signature(target: str) -> Signature | None:
    """What calling `target` takes; None where the source does not say. Raises Missing where there is no such thing."""
    try:
        return _signature_of(target)
    except (_Unknown, RecursionError):
        return None


def accepts(annotation: ast.expr | None, value: Any) -> bool:
    """Whether a plain value (scalar, list, dict, None) suits an annotation. True where that cannot be told."""
    match annotation:
        case ast.Constant(value=None):
            return value is None
        case ast.Constant(value=str(text)):
            return accepts(ast.parse(text, mode="eval").body, value)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return accepts(left, value) or accepts(right, value)
        case ast.Subscript(value=outer, slice=inner):
            inside = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return _accepts_generic(_last_name(outer), inside, value)
        case ast.Name() | ast.Attribute():
            return _accepts_name(_last_name(annotation), value)
    return True


def _accepts_name(name: str, value: Any) -> bool:
    match name:
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "bool":
            return isinstance(value, bool)
        case "str" | "Path" | "PathLike":
            return isinstance(value, str)
        case "list" | "List" | "Sequence" | "Iterable" | "tuple" | "Tuple" | "set" | "Collection":
            return isinstance(value, list | tuple)
        case "dict" | "Dict" | "Mapping" | "MutableMapping":
            return isinstance(value, dict)
    return True


def _accepts_generic(name: str, inside: list[ast.expr], value: Any) -> bool:
    match name:
        case "Optional":
            return value is None or accepts(inside[0], value)
        case "Union":
            return any(accepts(one, value) for one in inside)
        case "Literal":
            return value in [one.value for one in inside if isinstance(one, ast.Constant)]
        case "Annotated":
            return accepts(inside[0], value)
        case "tuple" | "Tuple" if not isinstance(inside[-1], ast.Constant):
            return (
                isinstance(value, list | tuple)
                and len(value) == len(inside)
                and all(accepts(one, v) for one, v in zip(inside, value, strict=True))
            )
        case "list" | "List" | "Sequence" | "Iterable" | "tuple" | "Tuple" | "set" | "Collection":
            return isinstance(value, list | tuple) and all(accepts(inside[0], v) for v in value)
        case "dict" | "Dict" | "Mapping" | "MutableMapping":
            return isinstance(value, dict) and all(accepts(inside[-1], v) for v in value.values())
    return True


def _last_name(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


@functools.cache
def _signature_of(target: str) -> Signature:
    module, names = _split(target)
    if not names:
        raise Missing(module, "such function or class: it is a module", _names_in(module))
    found = _lookup(module, names[0])
    if found is None:
        raise Missing(module, names[0], _names_in(module))
    owner: str | None = None
    for name in names[1:]:
        if not isinstance(found.node, ast.ClassDef):
            raise _Unknown
        owner = found.node.name
        method = _method(found, name)
        if method is None:
            raise Missing(f"{module}.{owner}", name, [n.name for n in found.node.body if hasattr(n, "name")])
        found = method
    if isinstance(found.node, ast.ClassDef):
        return _constructor(found)
    static = any(_last_name(d) == "staticmethod" for d in found.node.decorator_list)
    return _arguments(found, bound=owner is not None and not static)


def _constructor(found: _Found) -> Signature:
    node = found.node
    assert isinstance(node, ast.ClassDef)
    if any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        raise _Unknown
    made_by = _method(found, "__init__") or _method(found, "__new__")
    return _arguments(made_by, bound=True) if made_by else Signature([], False)


def _method(found: _Found, name: str) -> _Found | None:
    """A method of a class or of its bases, in the order of a depth-first search; None where nobody defines it."""
    assert isinstance(found.node, ast.ClassDef)
    for statement in _statements(found.node.body):
        if isinstance(statement, ast.FunctionDef) and statement.name == name:
            return _Found(statement, found.module)
    for base in found.node.bases:
        dotted = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        if dotted.rpartition(".")[2] in ("object", "ABC", "Generic", "Protocol"):
            continue
        above = _resolve(found.module, dotted)
        if not isinstance(above.node, ast.ClassDef) or above.node is found.node:
            raise _Unknown
        inherited = _method(above, name)
        if inherited is not None:
            return inherited
    return None


def _arguments(found: _Found, bound: bool) -> Signature:
    node = found.node
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    without_default = len(positional) - len(arguments.defaults)
    parameters = [Parameter(a.arg, _annotation(a, found), i < without_default) for i, a in enumerate(positional)]
    keyword_only = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    parameters = parameters[1:] if bound else parameters
    parameters += [Parameter(a.arg, _annotation(a, found), default is None) for a, default in keyword_only]
    return Signature(parameters, arguments.kwarg is not None)


def _annotation(argument: ast.arg, found: _Found) -> ast.expr | None:
    try:
        return None if argument.annotation is None else _written_out(argument.annotation, found.module)
    except _Unknown:  # an alias of a compiled module
        return argument.annotation


def _written_out(annotation: ast.expr, module: str) -> ast.expr:
    """The annotation with what aliases such as `Mode = Literal["a", "b"]` stand for, here and inside | and [ ]."""
    match annotation:
        case ast.Name(id=name):
            return _alias(module, name) or annotation
        case ast.BinOp(left=left, op=ast.BitOr() as either, right=right):
            return ast.BinOp(_written_out(left, module), either, _written_out(right, module))
        case ast.Tuple(elts=inner):
            return ast.Tuple([_written_out(one, module) for one in inner], ast.Load())
        case ast.Subscript(value=outer, slice=inner) if _last_name(outer) not in ("Literal", "Annotated"):
            return ast.Subscript(outer, _written_out(inner, module), ast.Load())
    return annotation


def _alias(module: str, name: str) -> ast.expr | None:
    """What a name of a module stands for in annotations; None where that is no type made of others.

    Imports are followed within the package alone: those of typing or torch are known by their names.
    """
    for statement in _statements(_tree(module).body):
        match statement:
            case ast.Assign(targets=[ast.Name(id=assigned)], value=ast.Subscript() | ast.BinOp() as value):
                if assigned == name:
                    return _written_out(value, module)
            case ast.ImportFrom():
                source = _source_of(statement, module)
                if source.partition(".")[0] == module.partition(".")[0]:
                    for imported in statement.names:
                        if (imported.asname or imported.name) == name and _spec(source) is not None:
                            return _alias(source, imported.name)
    return None


def _resolve(module: str, dotted: str) -> _Found:
    """What a name means inside a module, following its imports."""
    first, *rest = dotted.split(".")
    if not rest:
        found = _lookup(module, first)
        if found is None:
            raise _Unknown
        return found
    for statement in _statements(_tree(module).body):
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                if (alias.asname or alias.name.partition(".")[0]) == first:
                    return _from_path(".".join([alias.name if alias.asname else first, *rest]))
        elif isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == first:
                    return _from_path(".".join([_source_of(statement, module), alias.name, *rest]))
    raise _Unknown


def _from_path(target: str) -> _Found:
    module, names = _split(target)
    found = _lookup(module, names[0]) if len(names) == 1 else None
    if found is None:
        raise _Unknown
    return found


def _lookup(module: str, name: str) -> _Found | None:
    """A function or class of a module, its own or imported into it; None if no statement makes such a name."""
    unsure = False
    for statement in _statements(_tree(module).body):
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() if statement.name == name:
                return _Found(statement, module)
            case ast.ImportFrom():
                for alias in statement.names:
                    if (alias.asname or alias.name) == name:
                        return _from_path(f"{_source_of(statement, module)}.{alias.name}")
                    unsure |= alias.name == "*"
            case ast.Assign(targets=[ast.Name(id=assigned)], value=value) if assigned == name:
                if isinstance(value, ast.Name | ast.Attribute):
                    return _resolve(module, ast.unparse(value))
                raise _Unknown
            case ast.AnnAssign(target=ast.Name(id=assigned)) if assigned == name:
                raise _Unknown
            case ast.FunctionDef(name="__getattr__"):
                unsure = True  # the module makes names when they are asked for
    if unsure:
        raise _Unknown
    return None


def _source_of(statement: ast.ImportFrom, module: str) -> str:
    """The absolute name of the module that a `from … import` reads."""
    if statement.level == 0:
        return statement.module or ""
    package = module if _is_package(module) else module.rpartition(".")[0]
    for _ in range(statement.level - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{statement.module}" if statement.module else package


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the body does, those inside if, try and with blocks too."""
    for statement in body:
        yield statement
        for block in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(statement, block, []))
        if isinstance(statement, ast.Try):
            for handler in statement.handlers:
                yield from _statements(handler.body)


def _split(target: str) -> tuple[str, list[str]]:
    """A dotted path as its longest module and the names inside it. Raises Missing if not even the package exists."""
    first, *rest = target.split(".")
    module = first
    if _spec(first) is None:
        raise Missing("", first, [])
    while rest and _spec(f"{module}.{rest[0]}") is not None:
        module = f"{module}.{rest.pop(0)}"
    return module, rest


@functools.cache
def _spec(module: str) -> importlib.machinery.ModuleSpec | None:
    """Where a module is, without importing it or its packages."""
    package, _, _ = module.rpartition(".")
    if not package:
        return importlib.util.find_spec(module)
    parent = _spec(package)
    if parent is None or parent.submodule_search_locations is None:
        return None
    folders = [str(folder) for folder in parent.submodule_search_locations]  # a lazy package may have put Paths there
    return importlib.machinery.PathFinder.find_spec(module, folders)


def _is_package(module: str) -> bool:
    spec = _spec(module)
    return spec is not None and spec.submodule_search_locations is not None


@functools.cache
def _tree(module: str) -> ast.Module:
    spec = _spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise _Unknown
    with open(spec.origin, encoding="utf-8") as file:
        return ast.parse(file.read())


def _names_in(module: str) -> list[str]:
    """Public functions and classes that a module defines, and the modules of a package: what could have been meant."""
    nodes = _statements(_tree(module).body)
    names = [n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    spec = _spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        names += [path.stem for path in Path(folder).glob("*.py")]
        names += [path.parent.name for path in Path(folder).glob("*/__init__.py")]
    return [name for name in names if not name.startswith("_")]
