import json
import os
import time

import pytest
import torch

from vireo import cache
from vireo.cache import Cache, entries
from vireo.cache_manifests import UNFINISHED_AFTER, Listed, differences, prune, read, reasons, write
from vireo.errors import UserError


@pytest.fixture
def store(tmp_path):
    return Cache(tmp_path, {"moments": "frames"}, {"moments": "vae 1"})


def add(store, *sources):
    """Entries with values; what a manifest says of them."""
    found = {}
    for source in sources:
        store.write("moments", source, torch.ones(10))
        found[store.key("moments", source)] = Listed("moments", f"{source}.png", "vae 1", source)
    return found


def test_a_manifest_comes_back(store):
    entries = add(store, "a", "ä")
    write(store.folder, "one", entries)
    (manifest,) = read(store.folder)
    assert manifest.entries == entries and manifest.file.name == "one.json"


def test_writing_it_again_says_that_it_is_used(store):
    file = write(store.folder, "one", add(store, "a"))
    os.utime(file, (1, 1))
    write(store.folder, "two", {})
    assert [manifest.file.stem for manifest in read(store.folder)] == ["two", "one"]
    write(store.folder, "one", add(store, "a"))
    assert [manifest.file.stem for manifest in read(store.folder)] == ["one", "two"]


def test_prune_removes_what_no_manifest_lists(store):
    write(store.folder, "one", add(store, "a", "b"))
    write(store.folder, "two", add(store, "b", "c"))
    size = store.path("moments", "d")
    add(store, "d")
    size = size.stat().st_size
    assert prune(store.folder) == (1, size, 3, 3 * size)
    assert {source for source in "abcd" if store.holds("moments", source)} == set("abc")


def test_an_edited_file_makes_its_old_entry_useless(store):
    write(store.folder, "one", add(store, "old", "other"))
    write(store.folder, "one", add(store, "new", "other"))
    assert prune(store.folder).removed == 1 and not store.holds("moments", "old") and store.holds("moments", "new")


def test_prune_removes_what_was_left_unfinished_long_ago(store):
    write(store.folder, "one", add(store, "a"))
    folder = store.path("moments", "a").parent
    old, fresh = folder / ".x.1.tmp", folder / ".x.2.tmp"
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * UNFINISHED_AFTER,) * 2)
    prune(store.folder)
    assert not old.exists() and fresh.exists() and store.holds("moments", "a")


def during(monkeypatch, happening):
    """Something happens once the manifests have been read, while the entries are looked at."""
    original = cache.entries
    monkeypatch.setattr(cache, "entries", lambda folder: (happening(), original(folder))[1])


def sources_held(store):
    return {source for source in "abcd" if store.holds("moments", source)}


def test_a_run_that_starts_while_pruning_keeps_the_old_entries_that_it_needs(store, monkeypatch):
    write(store.folder, "one", add(store, "a"))
    old = add(store, "b", "c")
    key = store.key("moments", "b")
    during(monkeypatch, lambda: write(store.folder, "two", {key: old[key]}))
    assert prune(store.folder)[::2] == (1, 2) and sources_held(store) == set("ab")
    assert not list(cache.unfinished(store.folder))


def test_what_is_written_while_pruning_stays(store, monkeypatch):
    """Also what no manifest lists: of a filling whose composition has got another manifest since."""
    write(store.folder, "one", add(store, "a"))
    add(store, "b")

    def happening():
        time.sleep(0.02)  # the clock of files is coarse
        add(store, "c")

    during(monkeypatch, happening)
    assert prune(store.folder)[::2] == (1, 2) and sources_held(store) == set("ac")


def test_a_manifest_that_breaks_while_pruning_removes_nothing(store, monkeypatch):
    file = write(store.folder, "one", add(store, "a"))
    add(store, "b")
    during(monkeypatch, lambda: file.write_text("half"))
    with pytest.raises(UserError, match="one.json cannot be read"):
        prune(store.folder)
    assert sources_held(store) == set("ab")


@pytest.mark.parametrize("text", ["", "[]", '{"encoders": [], "entries": {"k": ["moments", "a", 0, "a"]}}'])
def test_with_a_manifest_that_cannot_be_read_nothing_is_pruned(store, text):
    file = write(store.folder, "one", add(store, "a"))
    file.write_text(text)
    with pytest.raises(UserError, match="one.json cannot be read"):
        prune(store.folder)
    assert len(list(entries(store.folder))) == 1


def test_an_empty_folder_has_nothing_to_prune(tmp_path):
    assert read(tmp_path / "none") == [] and prune(tmp_path / "none") == (0, 0, 0, 0)


def listed(name="a.png", encoder="vae 1", **source):
    return Listed("moments", name, encoder, json.dumps(source))


def test_reasons_name_what_is_new(tmp_path):
    write(tmp_path, "one", {"k1": listed(content="1", height=64), "k2": listed("b.png", content="2", height=64)})
    missing = {
        "k1": listed(content="1", height=64),
        "k3": listed(content="9", height=64),
        "k4": listed(content="1", height=128),
        "k5": listed(content="1", height=64, encoder="vae 2"),
        "k6": listed("c.png", content="7", height=64),
        "k7": listed("b.png", content="2", height=32, flip=True),
    }
    assert reasons(missing, read(tmp_path)) == {
        "k1": "not encoded yet, or removed",
        "k3": "the file's content",
        "k4": "height 64 -> 128",
        "k5": "encoder vae 1 -> vae 2",
        "k6": "new",
        "k7": "flip null -> true, height 64 -> 32",
    }


def test_reasons_compare_with_the_nearest(tmp_path):
    write(tmp_path, "one", {"k1": listed(content="1", height=64, crop="a")})
    write(tmp_path, "two", {"k2": listed(content="1", height=32, crop="b")})
    assert reasons({"k3": listed(content="1", height=16, crop="b")}, read(tmp_path)) == {"k3": "height 32 -> 16"}


def test_differences_of_identities():
    assert differences("encoder", '{"vae": "1", "dtype": "bf16"}', '{"vae": "1", "dtype": "fp32"}') == [
        "encoder dtype bf16 -> fp32"
    ]
    assert differences("", "plain", "other") == ["source plain -> other"]
    assert differences("", "same", "same") == []
    (long,) = differences("", "x" * 100, "y")
    assert len(long) < 80
