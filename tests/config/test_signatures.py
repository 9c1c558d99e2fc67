"""Signatures that are read from source agree with what importing would say."""

import ast
import inspect
import sys
import textwrap

import pytest

from vireo.config import signatures
from vireo.config.signatures import Missing, accepts, signature


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose modules raise when they are imported."""

    def write(**modules: str) -> None:
        for name, text in modules.items():
            (root / f"{name}.py").write_text("raise ImportError\n" + textwrap.dedent(text))

    root = tmp_path / "toy_package"
    root.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    for cached in (signatures._signature_of, signatures._spec, signatures._tree):
        cached.cache_clear()
    write(__init__="")
    return write


def test_functions_and_classes(package):
    package(
        here="""
        def function(a, b: int = 3, *, c, d=None): ...
        def anything(a, **more): ...
        class Plain: ...
        class Made:
            def __init__(self, x, y=1): ...
            @staticmethod
            def build(z): ...
            @classmethod
            def load(cls, path): ...
            def method(self, w): ...
        """
    )
    found = signature("toy_package.here.function")
    assert found.names == ["a", "b", "c", "d"] and not found.takes_any
    assert [p.name for p in found.parameters if p.required] == ["a", "c"]
    assert signature("toy_package.here.anything").takes_any
    assert signature("toy_package.here.Plain").names == []
    assert signature("toy_package.here.Made").names == ["x", "y"]
    assert signature("toy_package.here.Made.build").names == ["z"]
    assert signature("toy_package.here.Made.load").names == ["path"]
    assert signature("toy_package.here.Made.method").names == ["w"]


def test_imports_and_inheritance_are_followed(package):
    package(
        base="""
        from abc import ABC
        class Base(ABC):
            def __init__(self, x): ...
        """,
        middle="""
        from typing import TYPE_CHECKING
        from . import base as renamed
        if TYPE_CHECKING:
            from .base import Base
        else:
            try:
                from toy_package.base import Base as Other
            except ImportError:
                Other = None
        class Child(renamed.Base): ...
        class Own(Base):
            def __init__(self, y): ...
        alias = Own
        """,
        top="""
        from toy_package.middle import Child, Own as Mine, alias
        import toy_package.base as b
        class Deep(b.Base): ...
        """,
    )
    assert signature("toy_package.top.Child").names == ["x"]
    assert signature("toy_package.top.Mine").names == ["y"]
    assert signature("toy_package.top.alias").names == ["y"]
    assert signature("toy_package.top.Deep").names == ["x"]
    assert signature("toy_package.middle.Other").names == ["x"]


def test_what_the_source_does_not_say_is_not_checked(package):
    package(
        odd="""
        from dataclasses import dataclass
        @dataclass
        class Data:
            x: int
        made = print
        computed: int = 3
        class Child(unknown()): ...
        """,
        lazy="def __getattr__(name): ...",
        star="from math import *",
    )
    for name in ("odd.Data", "odd.made", "odd.computed", "odd.Child", "lazy.anything", "star.sin"):
        assert signature(f"toy_package.{name}") is None


def test_what_is_not_there(package):
    package(here="def function(): ...\nclass Thing: ...")
    for path, within, names in [
        ("no_such_package.x", "", []),
        ("toy_package.her.function", "toy_package", ["here"]),
        ("toy_package.here.functoin", "toy_package.here", ["function", "Thing"]),
        ("toy_package.here.Thing.method", "toy_package.here.Thing", []),
        ("toy_package.here", "toy_package.here", ["function", "Thing"]),
    ]:
        with pytest.raises(Missing) as missing:
            signature(path)
        assert missing.value.within == within and missing.value.names == names


@pytest.mark.parametrize(
    "target",
    [
        "vireo.optimizers.adamw",
        "vireo.schedules.Cosine",
        "vireo.freezing.FreezePolicy",
        "vireo.tracking.TensorBoard",
        "vireo.tracking.Wandb",
        "vireo.strategies.replicated.Replicated",
        "vireo.models.taehv.TAEHV",
        "vireo.models.encoders.NoEncoder",
        "vireo.data.clips.Clips",
        "vireo.losses.autoencoder.Autoencoder",
        "vireo.sampling.reconstruction.Reconstruction",
        "torch.optim.AdamW",
        "torch.optim.SGD",
        "diffusers.AutoencoderKLCogVideoX",
        "diffusers.AutoencoderKLWan.from_pretrained",
        "diffusers.UNet2DConditionModel",
        "transformers.models.t5.modeling_t5.T5EncoderModel",
    ],
)
def test_agrees_with_the_imported_object(target):
    from vireo.config.instantiation import locate

    read = signature(target)
    real = inspect.signature(locate(target)).parameters.values()
    kinds = inspect.Parameter
    assert read.takes_any == any(p.kind is kinds.VAR_KEYWORD for p in real)
    named = [p for p in real if p.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)]
    if not any("no_init" in str(p) for p in named):
        assert read.names == [p.name for p in named]
        assert [p.required for p in read.parameters] == [p.default is kinds.empty for p in named]


def test_aliases_are_written_out(package):
    package(
        names="""
        from typing import Literal
        Mode = Literal["a", "b"]
        Size = int | tuple[int, int]
        """,
        here="""
        from pathlib import Path
        from toy_package.names import Mode as Way, Size
        Own = list[Way] | None
        Loop = list[Loop]
        limit = 3
        def function(one: Way, two: Own = None, three: dict[str, Size] = {}, four: Path = "", five: limit = 3): ...
        def endless(a: Loop): ...
        """,
    )
    found = signature("toy_package.here.function").parameters
    assert [ast.unparse(each.annotation) for each in found] == [
        "Literal['a', 'b']",
        "list[Literal['a', 'b']] | None",
        "dict[str, int | tuple[int, int]]",
        "Path",
        "limit",
    ]
    assert accepts(found[0].annotation, "b") and not accepts(found[0].annotation, "c")
    assert signature("toy_package.here.endless") is None


def test_choices_behind_an_alias_are_checked_in_a_config():
    annotations = {p.name: p.annotation for p in signature("vireo.sampling.edits.EditSampler").parameters}
    assert accepts(annotations["recycle"], "latents") and not accepts(annotations["recycle"], "latent")
    assert accepts(annotations["roll_out_noise"], "same") and not accepts(annotations["roll_out_noise"], "foo")


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        ("int", [3], [True, 2.0, "3", None]),
        ("float", [3, 2.5], [True, "3", None]),
        ("bool", [True], [0, "yes"]),
        ("str", ["x"], [False, 3, None]),
        ("str | Path", ["x"], [3]),
        ("int | None", [3, None], ["x"]),
        ("Optional[int]", [3, None], ["x"]),
        ("Union[int, str]", [3, "x"], [2.5]),
        ("list[int]", [[], [1, 2]], [["a"], 3]),
        ("Sequence[str] | None", [["a"], None], ["a", [1]]),
        ("tuple[float, float]", [[1, 2.5]], [[1], [1, 2, 3], ["a", "b"]]),
        ("tuple[int, ...]", [[1, 2, 3], []], [["a"]]),
        ("dict[str, int]", [{"a": 1}], [{"a": "b"}, 3]),
        ("Literal['a', 'b']", ["a"], ["c", 3]),
        ("'int'", [3], ["x"]),
        ("Tensor", [3, "x", None, [1]], []),
        ("torch.dtype", ["bf16", 3], []),
        ("Callable[[int], str]", ["x"], []),
    ],
)
def test_annotations(annotation, good, bad):
    tree = ast.parse(annotation, mode="eval").body
    assert all(accepts(tree, value) for value in good)
    assert not any(accepts(tree, value) for value in bad)
    assert accepts(None, object())


def test_nothing_is_imported(package):
    package(here="def function(a): ...")
    assert signature("toy_package.here.function").names == ["a"]
    assert "toy_package" not in sys.modules
