import json
import multiprocessing
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vireo.data import json_index
from vireo.data.json_index import JsonIndex, entries
from vireo.errors import UserError

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def judge(key, value):
    if value == "bad":
        raise ValueError("it is bad")
    return key.split("_")[0]


def index(path):
    return JsonIndex(path, judge, "1")


def write(path, content, **layout):
    path.write_text(content if isinstance(content, str) else json.dumps(content, **layout), encoding="utf-8")
    return path


@given(
    content=st.dictionaries(st.text(), values, max_size=6),
    chunk=st.integers(1, 40),
    layout=st.sampled_from([{}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}]),
)
def test_pieces_give_what_the_whole_gives(tmp_path_factory, content, chunk, layout):
    path = write(tmp_path_factory.mktemp("json") / "a.json", content, **layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_index, "CHUNK", chunk)
        found = list(entries(path))
    whole = path.read_bytes()
    assert {entry.key: entry.value for entry in found} == content
    for entry in found:
        one = whole[entry.offset : entry.offset + entry.length].decode()
        assert json.loads("{" + one + "}") == {entry.key: entry.value}


def test_entries_are_found_by_number_and_by_key(tmp_path):
    made = index(write(tmp_path / "a.json", {"a_1": [1], "b_1": "bad", "a_2": {"é": "ü"}}, ensure_ascii=False))
    assert len(made) == 3 and made.usable.tolist() == [True, False, True]
    assert made.entry(2) == ("a_2", {"é": "ü"})
    assert (made.row("a_2"), made.row("b_1"), made.row("c")) == (2, None, None)
    assert made.groups[0] == made.groups[2] != made.groups[1]
    assert made.problems == ["b_1: it is bad"]


def test_of_a_key_that_comes_twice_the_first_entry_counts(tmp_path):
    made = index(write(tmp_path / "a.json", '{"a": 1, "b": 2, "a": 3}'))
    assert made.usable.tolist() == [True, True, False] and made.row("a") == 0
    assert "1 keys come more than once" in made.problems[0]


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json", {"a": 1})
    index(path)
    with monkeypatch.context() as patch:
        patch.setattr(json_index, "_build", lambda *_: pytest.fail("it is known"))
        assert index(path).entry(0) == ("a", 1)
    write(path, {"a": 1, "b": 2})
    assert len(index(path)) == 2
    assert len([p for p in (tmp_path / "cache/vireo/annotations").iterdir() if p.is_dir()]) == 1


def test_a_file_that_changes_while_it_is_used_is_told(tmp_path):
    path = write(tmp_path / "a.json", {"key": [1, 2, 3]})
    made = index(path)
    write(path, {"k": 1})
    with pytest.raises(UserError, match="changed since the run began"):
        made.entry(0)


@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{\n "a": 1,\n "b" 2}', r"line 3, column 6, byte 16: malformed JSON: expected a key in quotes, and a colon"),
        ('{"a": [1, 2,, 3], "b": "' + 50 * "x" + '"}', r"line 1, column 13, byte 12: malformed JSON: Expecting value"),
        (
            '{"é": 1, "b": nope, "c": "' + 50 * "x" + '"}',
            r"line 1, column 15, byte 15: malformed JSON: Expecting value",
        ),
        ('{"a": 1, "b": {"c": ', "the file ends in the middle"),
        ('{"a": 1, "b": "cut off', "the file ends in the middle"),
        ('{"a": 1,}', "malformed JSON"),
        ('{"a": 1} {"b": 2}', "something follows"),
        ("[1, 2]", r"expected one JSON object, key: annotation, found \["),
        ("", "found nothing"),
    ],
)
def test_what_is_malformed_is_told_with_its_place(tmp_path, monkeypatch, text, says, chunk):
    monkeypatch.setattr(json_index, "CHUNK", chunk)
    with pytest.raises(UserError, match=says):
        list(entries(write(tmp_path / "a.json", text)))


def test_an_empty_object_has_no_entries(tmp_path):
    assert len(index(write(tmp_path / "a.json", "{ }\n"))) == 0


def test_what_cannot_be_read_or_written_is_told(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no-such.json cannot be read"):
        index(tmp_path / "no-such.json")
    (tmp_path / "latin.json").write_bytes(b'{"\xe9": 1}')
    with pytest.raises(UserError, match="not UTF-8"):
        index(tmp_path / "latin.json")
    write(tmp_path / "file", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        index(write(tmp_path / "a.json", {"a": 1}))


def _in_a_process(path, number):
    made = JsonIndex(path, lambda key, value: os.write(number, b"x") and "" or "", "1")
    os._exit(made.entry(1999)[1] != 1999)


def test_of_several_processes_one_reads(tmp_path):
    path = write(tmp_path / "a.json", {str(n): n for n in range(2000)})
    told, writing = os.pipe()
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_in_a_process, args=(path, writing)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert len(os.read(told, 10000)) == 2000
