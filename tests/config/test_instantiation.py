"""Objects from nodes."""

import collections
import datetime
import functools

import pytest

from vireo.config import instantiate
from vireo.errors import UserError


def call(*args, **kwargs):
    return args, kwargs


def refuse(**kwargs):
    raise UserError("no")


HERE = f"{__name__}.call"


def test_arguments_and_nested_objects():
    node = {
        "_target_": HERE,
        "made": {"_target_": "collections.Counter", "_args_": ["aab"]},
        "listed": [{"_target_": "datetime.date", "year": 2024, "month": 2, "day": 1}, 3],
        "plain": {"inner": {"_target_": "collections.OrderedDict"}},
    }
    args, kwargs = instantiate(node, added=7)
    assert args == () and kwargs["added"] == 7
    assert kwargs["made"] == collections.Counter("aab")
    assert kwargs["listed"] == [datetime.date(2024, 2, 1), 3]
    assert kwargs["plain"] == {"inner": collections.OrderedDict()}


def test_partial_is_a_plain_partial():
    made = instantiate({"_target_": HERE, "_partial_": True, "a": [1, 2]}, b=3)
    assert type(made) is functools.partial
    assert made(4) == ((4,), {"a": [1, 2], "b": 3})


def test_not_recursive():
    inner = {"_target_": "no.such.thing"}
    assert instantiate({"_target_": HERE, "_recursive_": False, "inner": inner}) == ((), {"inner": inner})


def test_errors_say_where_they_come_from():
    with pytest.raises(RuntimeError, match=r"datetime\.date\(year=0, month=1, day=1\): ValueError: year 0"):
        instantiate({"_target_": "datetime.date", "year": 0, "month": 1, "day": 1})
    with pytest.raises(UserError, match="^no$"):
        instantiate({"_target_": f"{__name__}.refuse", "a": 1})
