import os

import pytest

from vireo.data.source import ChangedError, check_content, identify
from vireo.digests import bytes_digest, file_digest


def test_a_file_is_checked_by_its_bytes_or_by_the_file_system(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    file = tmp_path / "clip.mp4"
    file.write_bytes(b"before")
    os.utime(file, (1_600_000_000, 1_600_000_000))
    identity = identify(file_digest(file), flip=False)
    check_content(identity, file, b"before")
    check_content(identity, file)
    file.write_bytes(b"behind")
    check_content(identity, file, b"before")
    for content in (b"behind", None):
        with pytest.raises(ChangedError, match="clip.mp4: has changed since it was looked at"):
            check_content(identity, file, content)
    check_content(None, file)


def test_a_digest_of_bytes_is_that_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    assert bytes_digest(b"content") == file_digest(tmp_path / "a")
