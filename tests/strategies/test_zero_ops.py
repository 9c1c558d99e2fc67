import multiprocessing
import sys
import threading
import time

import pytest

from vireo.errors import UserError
from vireo.strategies import zero_ops


def test_a_lock_that_a_killed_build_left_is_removed_and_told(tmp_path, caplog):
    (tmp_path / "deepspeed_shm_comm").mkdir()
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.touch()
    assert zero_ops.remove_stale(tmp_path) == [lock] and not lock.exists()
    assert str(lock) in caplog.text
    assert zero_ops.remove_stale(tmp_path) == []


def _hold(folder, held, seconds):
    with zero_ops.locked(folder):
        held.set()
        time.sleep(seconds)


def test_one_process_builds_at_a_time_and_a_killed_one_holds_nothing(tmp_path):
    fork = multiprocessing.get_context("fork")
    held = fork.Event()
    other = fork.Process(target=_hold, args=(tmp_path, held, 60))
    other.start()
    assert held.wait(10)
    entered = threading.Event()

    def enter():
        with zero_ops.locked(tmp_path):
            entered.set()

    threading.Thread(target=enter, daemon=True).start()
    assert not entered.wait(0.3)
    other.kill()
    assert entered.wait(10)


def test_what_was_compiled_is_kept_by_versions_and_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = zero_ops.folder()
    assert own.parent == tmp_path / "vireo" / "torch_extensions" and "torch" in own.name and "deepspeed" in own.name
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(sys, "prefix", "/another/environment")
        assert zero_ops.folder().parent == own.parent and zero_ops.folder() != own
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "theirs"))
    assert zero_ops.folder() == tmp_path / "theirs" / own.name
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(zero_ops.folder()))
    assert zero_ops.folder() == tmp_path / "theirs" / own.name


def test_without_a_compiler_it_says_what_to_install(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(zero_ops.shutil, "which", lambda tool: None if tool == "g++" else tool)
    with pytest.raises(UserError, match=r"no g\+\+: install it .*strategy=fsdp"):
        zero_ops.prepare()
