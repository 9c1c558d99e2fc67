"""Jobs as processes; what they do is a toy."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from vireo import devices, faults, sweeps
from vireo.side_by_side import SideBySide


@pytest.fixture
def jobs():
    made = SideBySide()
    yield made
    for one in made.running:
        one.process.kill()
    made.close()


def ending(folder: Path, code: int, best: float | None = None, seconds: float = 0.0):
    """A job that notes when it ran, where, and how it ended."""

    def work() -> int:
        began = time.monotonic()
        time.sleep(seconds)
        facts = {"began": began, "ended": time.monotonic(), "threads": os.environ.get("OMP_NUM_THREADS")}
        os.write(1, b"a word\n")
        sweeps.note(folder, exit_code=code, best=best, **facts)
        os.environ["LEAKED"] = "by a job"
        return code

    return work


def test_jobs_run_side_by_side_and_share_the_machine(jobs, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(devices, "cores", lambda: 8)
    monkeypatch.setattr(devices, "visible_gpus", lambda: [])
    for number in range(4):
        folder = tmp_path / str(number)
        jobs.start(ending(folder, 0, seconds=0.3), folder, [f"lr={number}"], jobs=2, processes=1)
        assert len(jobs.running) <= 2
    jobs.close()
    notes = sweeps.notes(tmp_path)
    assert [notes[number]["overrides"] for number in range(4)] == [[f"lr={number}"] for number in range(4)]
    assert notes[1]["began"] < notes[0]["ended"] and notes[3]["began"] < notes[2]["ended"]
    overlap = [sum(a["began"] <= b["began"] < a["ended"] for a in notes.values()) for b in notes.values()]
    assert max(overlap) == 2
    assert {one["threads"] for one in notes.values()} == {"4"}
    assert (tmp_path / "3" / "console.log").read_text() == "a word\n"
    assert "LEAKED" not in os.environ and "OMP_NUM_THREADS" not in os.environ


def test_a_job_that_fails_or_dies_stops_no_other(jobs, tmp_path):
    def die() -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    folders = [tmp_path / str(number) for number in range(3)]
    work = [ending(folders[0], 1), die, ending(folders[2], 0, best=2.5)]
    results = [jobs.start(w, folder, [], jobs=1, processes=1) for w, folder in zip(work, folders, strict=True)]
    assert [float(result) for result in results] == [-float("inf"), -float("inf"), 2.5]
    notes = sweeps.notes(tmp_path)
    assert [notes[number]["exit_code"] for number in range(3)] == [1, 137, 0]
    assert notes[1]["message"] == "its process died" and sweeps.exit_code(tmp_path) == 137


def test_jobs_have_nothing_of_a_world_that_the_environment_speaks_of(jobs, tmp_path, monkeypatch):
    """That of torchrun with one process: two jobs would meet at its port."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "29511", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)

    def look() -> int:
        left = [
            name for name in os.environ if name in ("RANK", "WORLD_SIZE") or name.startswith(("MASTER_", "TORCHEL"))
        ]
        sweeps.note(tmp_path / "0", exit_code=0, left=left)
        return 0

    jobs.start(look, tmp_path / "0", [], jobs=1, processes=1)
    jobs.close()
    assert sweeps.read(tmp_path / "0")["left"] == [] and os.environ["RANK"] == "0"


def test_the_output_of_a_job_that_died_beside_others_is_named(jobs, tmp_path):
    jobs.start(lambda: os._exit(9), tmp_path / "0", [], jobs=2, processes=1)
    jobs.close()
    assert sweeps.read(tmp_path / "0")["message"] == f"its process died; what it printed: {tmp_path / '0/console.log'}"


def test_a_signal_is_passed_on_and_nothing_more_is_started(jobs, tmp_path):
    """As a batch system does it: to the parent alone."""
    before = signal.getsignal(signal.SIGTERM)

    def obedient() -> int:
        stopped = threading.Event()
        signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
        (tmp_path / "ready").touch()
        while not stopped.is_set():
            time.sleep(0.02)
        sweeps.note(tmp_path / "0", exit_code=faults.EXIT_STOPPED)
        return faults.EXIT_STOPPED

    first = jobs.start(obedient, tmp_path / "0", ["lr=1"], jobs=1, processes=1)
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)
    jobs.start(ending(tmp_path / "1", 0), tmp_path / "1", ["lr=2"], jobs=1, processes=1)
    with pytest.raises(faults.Stopped):
        float(first)
    jobs.close()
    notes = sweeps.notes(tmp_path)
    assert [notes[number]["exit_code"] for number in (0, 1)] == [75, 75] and notes[1]["message"] == "not started"
    assert signal.getsignal(signal.SIGTERM) == before
