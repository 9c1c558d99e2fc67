import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from vireo import digests
from vireo.digests import file_digest, file_digests

LONG_AGO = 1_600_000_000


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_trusted_from", 0.0)
    forget()


@pytest.fixture
def read(monkeypatch):
    """The files that are really read, in order."""
    files = []
    original = digests._read
    monkeypatch.setattr(digests, "_read", lambda file: (files.append(os.path.basename(file)), original(file))[1])
    return files


def forget():
    """What another process would not know."""
    digests._remembered.clear()


def write(folder, **contents):
    folder.mkdir(exist_ok=True)
    paths = [folder / name for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_bytes(content)
        os.utime(path, (LONG_AGO, LONG_AGO))
    return paths


def expected(content):
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def test_digests_are_those_of_the_bytes_and_files_are_read_once(tmp_path, read):
    paths = [*write(tmp_path / "one", a=b"A", b=b"B"), *write(tmp_path / "two", a=b"A")]
    wanted = {str(path): expected(path.read_bytes()) for path in paths}
    assert file_digests(paths) == wanted
    forget()
    assert file_digests(paths) == wanted and file_digest(paths[0]) == wanted[str(paths[0])]
    assert sorted(read) == ["a", "a", "b"]


def test_only_a_changed_file_is_read_again(tmp_path, read):
    paths = write(tmp_path / "one", a=b"A", b=b"B")
    file_digests(paths)
    write(tmp_path / "one", b=b"C")  # the same size and time of change
    forget()
    assert file_digests(paths)[str(paths[1])] == expected(b"C")
    assert sorted(read) == ["a", "b", "b"]  # several threads read


def test_hard_links_are_no_change(tmp_path, read):
    (path,) = write(tmp_path / "one", a=b"A")
    file_digest(path)
    for happening in (lambda: os.link(path, tmp_path / "link"), lambda: os.unlink(tmp_path / "link")):
        happening()
        forget()
        assert file_digest(path) == expected(b"A")
    assert read == ["a"]
    os.link(path, tmp_path / "link")
    assert file_digest(path) == expected(b"A") and read == ["a"]
    write(tmp_path / "one", a=b"C")  # the same size, time of modification and number of links
    assert file_digest(path) == expected(b"C") and read == ["a", "a"]
    (other,) = write(tmp_path / "two", a=b"D")
    os.replace(other, path)  # another number of links, but another file as well
    assert file_digest(path) == expected(b"D") and read == ["a", "a", "a"]


def test_a_moved_folder_has_the_same_digests(tmp_path):
    paths = write(tmp_path / "one", a=b"A", b=b"B")
    before = file_digests(paths)
    (tmp_path / "one").rename(tmp_path / "moved")
    after = file_digests([tmp_path / "moved" / path.name for path in paths])
    assert list(after.values()) == list(before.values())


def test_a_file_that_may_change_unnoticed_is_not_remembered(tmp_path, read):
    (path,) = write(tmp_path / "one", a=b"A")
    os.utime(path)  # now
    file_digest(path), file_digest(path)
    assert read == ["a", "a"]


def test_distrust_reads_every_file_once_more(tmp_path, read):
    paths = write(tmp_path / "one", a=b"A")
    file_digests(paths)
    digests.distrust()
    file_digests(paths), file_digests(paths)
    forget()
    file_digests(paths)
    assert read == ["a", "a"]


def test_a_damaged_index_costs_what_it_held_and_no_more(tmp_path, read):
    paths = write(tmp_path / "one", a=b"A", b=b"B")
    file_digests(paths)
    (index,) = (tmp_path / "cache").rglob("*.jsonl")
    first, second = index.read_text().splitlines(keepends=True)
    index.write_text(first[:20] + "\n" + second + '["half a li')
    for _ in range(3):
        forget()
        assert file_digests(paths) == {str(path): expected(path.read_bytes()) for path in paths}
    # The line after an unfinished one is lost with it, and found again at the next start.
    assert sorted(read[:2]) == ["a", "b"] and read[2] in read[:2] and len(read) <= 4  # threads read and write them


def test_without_a_folder_to_remember_in_there_is_a_warning(tmp_path, monkeypatch, caplog):
    (path,) = write(tmp_path / "one", a=b"A")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # a file
    assert file_digest(path) == expected(b"A")
    assert "not remembered" in caplog.text


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        file_digest(tmp_path / "nowhere")


def test_many_at_once_agree(tmp_path):
    paths = write(tmp_path / "one", **{f"f{n}": bytes([n]) for n in range(50)})
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: file_digests(paths), range(8)))
    assert all(result == results[0] for result in results)
    assert results[0] == {str(path): expected(path.read_bytes()) for path in paths}
