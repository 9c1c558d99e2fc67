"""A step that takes far too long leaves the stacks of this process behind; an ordinary one leaves nothing."""

import ctypes
import multiprocessing
import os
import signal
import time

import pytest

from vireo import hangs
from vireo.hangs import Watchdog


@pytest.fixture
def rearm_always(monkeypatch):
    monkeypatch.setattr(hangs, "REARM", 0.0)


def stand_still(seconds):
    time.sleep(seconds)


def test_a_hanging_step_is_shown_where_it_stands(tmp_path, rearm_always, caplog):
    watchdog = Watchdog(tmp_path / "stacks" / "rank_0.txt", timeout=100, at_least=0.1)
    for _ in range(4):
        watchdog.begin_step()
        stand_still(0.01)
    assert 0.1 <= watchdog.patience() < 1
    watchdog.begin_step()
    stand_still(1.0)
    watchdog.close()
    assert "stand_still" in (tmp_path / "stacks" / "rank_0.txt").read_text()
    assert "rank_0.txt" in caplog.text


def test_ordinary_steps_leave_nothing(tmp_path, rearm_always, caplog):
    watchdog = Watchdog(tmp_path / "stacks.txt", timeout=100, at_least=0.2)
    for _ in range(5):
        watchdog.begin_step()
        stand_still(0.01)
    watchdog.between_steps()
    stand_still(0.4)  # validation may take long
    watchdog.begin_step()
    watchdog.close()
    assert not (tmp_path / "stacks.txt").exists() and not caplog.text


def test_the_first_steps_may_take_most_of_the_collectives_timeout(tmp_path):
    watchdog = Watchdog(tmp_path / "stacks.txt", timeout=50)
    assert watchdog.patience() == pytest.approx(hangs.SHARE * 50)
    watchdog.seconds.extend([1.0, 1.0, 1.0])
    assert watchdog.patience() == hangs.AT_LEAST
    watchdog.seconds.extend([100.0] * 10)
    assert watchdog.patience() == pytest.approx(hangs.SHARE * 50), "stacks are there before the collective gives up"


def test_what_an_earlier_attempt_left_is_kept_and_not_told_again(tmp_path, rearm_always, caplog):
    file = hangs.file_of(tmp_path, 0)
    file.parent.mkdir()
    file.write_text("stacks of the attempt that was killed\n")
    os.utime(file, (1, 1))
    watchdog = Watchdog(file, timeout=100, at_least=0.1)
    watchdog.begin_step()
    watchdog.close()
    assert not caplog.text
    assert file.read_text().startswith("stacks of") and hangs.written_since(tmp_path, 2) == []
    assert hangs.written_since(tmp_path, 0) == [file]


@pytest.mark.parametrize("begin", ["begin_step", "between_steps"])
def test_a_process_that_is_alone_does_not_wait_for_ever_either(tmp_path, begin):
    """It has no collective that gives up; here it does not even come to run Python."""

    def hang():
        watchdog = Watchdog(tmp_path / "stacks.txt", timeout=0.5)
        watchdog.begin_step()
        getattr(watchdog, begin)()
        ctypes.PyDLL(None).sleep(30)  # holds the interpreter's lock

    child = multiprocessing.get_context("fork").Process(target=hang)
    child.start()
    child.join(20)
    child.kill()
    assert child.exitcode == -signal.SIGALRM
    assert "in hang" in (tmp_path / "stacks.txt").read_text()


def test_after_its_end_nothing_is_watched(tmp_path):
    watchdog = Watchdog(tmp_path / "stacks.txt", timeout=100)
    watchdog.begin_step()
    assert 199 < signal.getitimer(signal.ITIMER_REAL)[0] <= 200
    watchdog.close()
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_forked_child_can_watch_too(tmp_path):
    watchdog = Watchdog(tmp_path / "stacks.txt", timeout=100)
    watchdog.begin_step()
    child = multiprocessing.get_context("fork").Process(target=Watchdog(tmp_path / "child.txt", 100).begin_step)
    child.start()
    child.join(20)
    alive = child.is_alive()
    child.kill()
    watchdog.close()
    assert not alive
