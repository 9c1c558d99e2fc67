import multiprocessing
import os
import signal

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vireo import cache, cache_filling
from vireo.cache import Cache, Damaged, New, entries, key, literal, text_identity, text_of, unfinished
from vireo.video_io import BadVideoError

OUTPUTS = {"moments": "frames", "target_moments": "target", "embeds": "prompt"}
IDENTITIES = {"moments": "vae 1", "target_moments": "vae 1", "embeds": "text 1"}


@pytest.fixture
def store(tmp_path):
    return made(tmp_path)


def made(folder, **changed):
    return Cache(folder, OUTPUTS, {**IDENTITIES, **changed}, memory=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("shape", [(2, 3), (), (4, 0), (1,)])
def test_values_come_back_as_they_were(store, dtype, shape):
    value = (1000 * torch.randn(shape)).to(dtype)
    store.write("moments", "a", value)
    back = store.read("moments", "a")
    assert back.dtype == dtype and torch.equal(back, value)
    assert store.holds("moments", "a") and store.holds("moments", "a", thorough=True)
    wanted = {store.key("moments", source): New("moments", source, value) for source in "ab"}
    for thorough in (False, True):
        assert [one.source for one in store.missing(wanted, thorough).values()] == ["b"]


def test_what_is_a_view_is_written_as_its_own_values(store):
    rows = torch.arange(12.0).view(3, 4)
    store.write("moments", "row", rows[1])
    store.write("moments", "column", rows[:, 1])
    assert store.read("moments", "row").tolist() == [4, 5, 6, 7] and store.read("moments", "column").tolist() == [
        1,
        5,
        9,
    ]


def test_missing_is_none(store):
    assert store.read("moments", "a") is None and not store.holds("moments", "a")


def test_outputs_of_the_same_encoder_share_entries(store):
    store.write("moments", "a", torch.ones(2))
    assert torch.equal(store.read("target_moments", "a"), torch.ones(2))
    assert store.read("embeds", "a") is None and len(list(entries(store.folder))) == 1


def test_another_encoder_or_source_is_another_entry(store, tmp_path):
    store.write("moments", "a", torch.ones(2))
    assert store.read("moments", "b") is None
    assert made(tmp_path, moments="vae 2").read("moments", "a") is None
    assert torch.equal(made(tmp_path).read("moments", "a"), torch.ones(2))


def test_another_schema_is_another_entry(store, monkeypatch):
    store.write("moments", "a", torch.ones(2))
    monkeypatch.setattr(cache, "SCHEMA", cache.SCHEMA + 1)
    assert store.read("moments", "a") is None


@given(st.text(), st.text(), st.text(), st.text())
def test_keys_differ_when_anything_does(a, b, c, d):
    assert (key(a, b) == key(c, d)) == ((a, b) == (c, d))


@given(st.text())
def test_texts_are_their_own_identity(text):
    assert text_of(text_identity(text)) == text


def test_a_literal_is_a_text_in_quotes():
    assert literal('""') == "" and literal('"blurry, \\u00e4"') == "blurry, ä" and literal("prompt") is None


def test_a_file_says_where_it_comes_from(store):
    store.write("moments", "a", torch.ones(2), name="clip_1.mp4")
    with safetensors.safe_open(store.path("moments", "a"), "pt") as file:
        about = file.metadata()
    assert about["encoder"] == "vae 1" and about["source"] == "a" and about["name"] == "clip_1.mp4"


@settings(deadline=None)
@given(st.data())
def test_no_flipped_bit_and_no_cut_goes_through(tmp_path_factory, data):
    store = made(tmp_path_factory.mktemp("cache"))
    value = torch.arange(6.0).view(2, 3)
    store.write("moments", "a", value)
    path = store.path("moments", "a")
    good = path.read_bytes()
    if data.draw(st.booleans()):
        path.write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
    else:
        place, bit = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 7))
        path.write_bytes(good[:place] + bytes([good[place] ^ (1 << bit)]) + good[place + 1 :])
    back = store.read("moments", "a")
    assert back is None or torch.equal(back, value)  # equal: it hit what only people read


@pytest.mark.parametrize("damage", ["values", "shape", "length", "empty", "text", "huge header"])
def test_a_damaged_entry_is_missing_with_a_warning(store, caplog, damage):
    store.write("moments", "a", torch.ones(4, 2))
    path = store.path("moments", "a")
    good = path.read_bytes()
    bad = {
        "values": good[:-1] + b"\x00",
        "shape": good.replace(b'"shape":[4,2]', b'"shape":[2,4]'),
        "length": good[:-4],
        "empty": b"",
        "text": b"<html>not found</html>" * 20,
        "huge header": b"\xff" * 8 + good[8:],
    }[damage]
    assert bad != good
    path.write_bytes(bad)
    with pytest.raises(Damaged):
        cache.verify(path)
    assert not store.holds("moments", "a", thorough=True)
    assert store.read("moments", "a") is None and "counts as missing" in caplog.text and str(path) in caplog.text
    assert not path.exists()  # so that the next filling makes it anew
    store.write("moments", "a", torch.ones(4, 2))
    assert torch.equal(store.read("moments", "a"), torch.ones(4, 2))


def test_an_entry_under_another_name_is_damaged(store, caplog):
    store.write("moments", "a", torch.ones(2))
    store.path("moments", "b").parent.mkdir(exist_ok=True)
    store.path("moments", "a").rename(store.path("moments", "b"))
    with pytest.raises(Damaged, match="another encoding"):
        cache.verify(store.path("moments", "b"))
    assert not store.holds("moments", "b")
    assert store.read("moments", "b") is None and "another encoding" in caplog.text


def test_verify_gives_the_size_of_a_good_entry(store):
    store.write("moments", "a", torch.ones(2))
    path = store.path("moments", "a")
    assert cache.verify(path) == path.stat().st_size


def test_killed_while_writing_leaves_no_entry(store):
    def die_before_it_is_whole():
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        store.write("moments", "a", torch.ones(2))

    process = multiprocessing.get_context("fork").Process(target=die_before_it_is_whole)
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    assert (
        store.read("moments", "a") is None
        and not list(entries(store.folder))
        and len(list(unfinished(store.folder))) == 1
    )


def test_a_failed_write_leaves_nothing(store, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        store.write("moments", "a", torch.ones(2))
    assert not [path for path in store.folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("number", [1, 3, 20])
@pytest.mark.parametrize("system", ["with syncfs", "without"])
def test_many_are_written_together(store, monkeypatch, number, system):
    if system == "without":
        monkeypatch.setattr(cache.ctypes, "CDLL", lambda *_, **__: None)
    new = [New("moments", f"{n}", torch.full((3,), float(n))) for n in range(number)]
    assert store.write_all(new) == number
    assert all(torch.equal(store.read(one.output, one.source), one.value) for one in new)
    assert not list(unfinished(store.folder))


def test_what_was_renamed_before_a_failure_stays_and_nothing_else(store, monkeypatch):
    original, done = os.replace, []

    def replace(*arguments):
        if len(done) == 2:
            raise OSError(5, "Input/output error")
        done.append(original(*arguments))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="Input/output"):
        store.write_all([New("moments", f"{n}", torch.ones(3)) for n in range(5)])
    assert len(list(entries(store.folder))) == 2 and not list(unfinished(store.folder))


def test_entries_are_kept_in_memory_up_to_the_limit(tmp_path):
    made(tmp_path).write("moments", "a", torch.ones(1000))
    made(tmp_path).write("moments", "b", torch.ones(1000))
    store = Cache(tmp_path, OUTPUTS, IDENTITIES, memory=4000 + cache.OVERHEAD)
    assert store.read("moments", "a") is store.read("target_moments", "a")
    store.read("moments", "b")
    for path in entries(tmp_path):
        path.unlink()
    assert store.read("moments", "a") is not None and store.read("moments", "b") is None


def test_an_entry_whose_files_cannot_be_hashed_is_left_out(tmp_path):
    class Broken:
        def __len__(self):
            return 2

        def sources(self, index):
            if index == 1:
                raise BadVideoError("gone.png", "no such picture")
            return {"prompt": ["a text"]}

    store, unreadable = Cache(tmp_path, {"embeds": "prompt"}, {"embeds": "encoder"}), []
    found = cache_filling.wanted(store, {"train": Broken()}, unreadable)
    assert len(found) == 1 and len(unreadable) == 1 and "gone.png" in unreadable[0]
