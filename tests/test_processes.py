"""Which worker failed first, what becomes of the others, and where signals go. The workers are small programs."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests import runs
from vireo import processes


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(program, …) -> exit code: one program for each rank, in Python, which may use `note(rank)`."""
    (tmp_path / "resolved.yaml").touch()
    monkeypatch.setattr(processes, "GRACE", 0.5)

    def call(*programs, **further):
        def start(entry, resolved, rank, variables, held):
            code = "import os, signal, sys, time\nfrom vireo.processes import note_failure\n"
            code += f"def note(): note_failure({rank})\n{programs[rank % len(programs)]}"
            with open(processes.log_file(tmp_path, rank), "a") as log:
                environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
                return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=log, stderr=log)

        monkeypatch.setattr(processes, "_start", start)
        return processes.run(tmp_path / "resolved.yaml", len(programs), **further)

    return call


def test_the_code_and_traceback_of_the_rank_that_failed_first(run, capfd):
    second = "try: 1 / 0\nexcept ZeroDivisionError:\n import traceback; traceback.print_exc(); note(); time.sleep(1.2)"
    assert run("time.sleep(1); note(); sys.exit(1)", f"{second}\n sys.exit(3)") == 3
    said = capfd.readouterr().err
    assert "rank 1 failed first (exit code 3); the end of" in said and "logs/rank_1.log" in said
    assert "ZeroDivisionError: division by zero" in said


def test_a_rank_that_was_killed_is_the_first_whatever_the_others_write(run, capfd):
    assert run("note(); sys.exit(1)", "time.sleep(.1); os.kill(os.getpid(), signal.SIGKILL)") == 137
    assert "rank 1 failed first (killed by SIGKILL)" in capfd.readouterr().err


def test_where_nothing_can_be_noted_the_first_one_that_ended_counts(run, capfd, caplog):
    """A full disk takes no notes: here a file stands where their folder would."""
    block = "open(os.environ['VIREO_FAILURES'], 'a').close()"
    assert run(f"{block}; time.sleep(1.5); note(); sys.exit(1)", f"{block}; note(); sys.exit(3)") == 3
    assert "rank 1 failed first (exit code 3)" in capfd.readouterr().err
    assert "that rank 1 has failed could not be written" in caplog.text


def test_a_rank_that_hangs_after_anothers_failure_is_killed_and_not_blamed(run):
    began = time.monotonic()
    assert run("time.sleep(60)", "note(); sys.exit(2)") == 2
    assert time.monotonic() - began < 20


def test_a_failure_on_another_machine_is_told_on_the_first(run, capfd):
    caught = "import traceback\ntry: 1 / 0\nexcept ZeroDivisionError: traceback.print_exc(); note(); sys.exit(3)"
    killed = "time.sleep(.2); os.kill(os.getpid(), signal.SIGKILL)"
    hangs, notices = "time.sleep(60)", "time.sleep(.5); note(); sys.exit(1)"
    fork, began = multiprocessing.get_context("fork"), time.monotonic()
    for port, first, second, code in ((1, hangs, caught, 3), (2, hangs, killed, 137), (3, notices, killed, 137)):
        shares = [processes.Share(node, 2, "127.0.0.1", port) for node in range(2)]
        other = fork.Process(target=run, args=(second,), kwargs={"share": shares[1]})
        other.start()
        assert run(first, share=shares[0]) == code
        other.join()
        said = capfd.readouterr().err
        assert "rank 1 failed first" in said and ("ZeroDivisionError: division by zero" in said or code == 137)
    assert time.monotonic() - began < 40


def test_all_well(run, capfd):
    assert run("", "assert os.environ['RANK'] == '1' and os.environ['WORLD_SIZE'] == '2'") == 0
    assert run("sys.exit(75)", "") == 75
    assert run("sys.exit('RANK' in os.environ)") == 0
    assert capfd.readouterr().err == ""


START = """
import os, sys, time
from pathlib import Path
from vireo import processes
worker = processes._start(("vireo.start_worker",), Path(sys.argv[1]), 0, {}, None)
print(worker.pid, flush=True)
time.sleep(60)
"""


def test_a_worker_whose_parent_is_killed_at_once_ends_too(tmp_path):
    """It dies while it imports, or else would train on for hours."""
    resolved = runs.make(tmp_path, ["steps=100000"]) / "resolved.yaml"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    parent = subprocess.Popen([sys.executable, "-c", START, resolved], env=environment, stdout=subprocess.PIPE)
    number = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    began = time.monotonic()
    while Path(f"/proc/{number}").exists() and "Z" not in Path(f"/proc/{number}/stat").read_text().split()[2]:
        if time.monotonic() - began > 30:
            os.kill(number, signal.SIGKILL)
            pytest.fail("the worker lives")
        time.sleep(0.1)
    assert not (resolved.parent / "train.log").exists()  # it had not begun


def test_a_worker_whose_parent_was_gone_before_it_could_look_ends(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "vireo.start_worker", str(gone.pid), tmp_path / "resolved.yaml"]
    assert subprocess.run(command, env=environment, timeout=60).returncode == -signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def later(seconds, number):
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


def test_a_signal_goes_to_all_and_then_to_the_callers_own_handler(run):
    """submitit's handler requeues the job, so it must come when the workers have saved."""
    ends, wait = [], "time.sleep(60)"
    stop = "signal.signal(signal.SIGUSR2, lambda *_: (time.sleep(.3), print('saved', flush=True), sys.exit(75)))"
    before = signal.signal(signal.SIGUSR2, lambda *_: ends.append("handler"))
    later(1.5, signal.SIGUSR2)
    try:
        assert run(f"{stop}; {wait}", f"{stop}; {wait}", resend=True) == 75
        time.sleep(0.05)
        assert ends == ["handler"]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_stop_before_a_worker_can_listen_is_no_fault(run):
    later(0.5, signal.SIGUSR1)
    assert run("time.sleep(60)", "time.sleep(60)") == 75


def test_a_second_ctrl_c_ends_a_worker_that_hears_no_signal(run, capfd):
    """As one that waits in a collective: its handler would run only afterwards."""
    deaf = "signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    later(0.7, signal.SIGINT)
    later(0.9, signal.SIGINT)  # the same one, from the terminal and passed on
    later(2.0, signal.SIGINT)
    began = time.monotonic()
    assert run(deaf, deaf) == 130 and 2 <= time.monotonic() - began < 20
    assert capfd.readouterr().err == "", "nobody has failed"


def test_workers_of_another_machine_that_is_gone_are_ended(run):
    assert run("time.sleep(60)", share=processes.Share(0, 2, "127.0.0.1", 1), obsolete=lambda: True) == 137


def test_places_on_the_second_of_two_machines():
    one, two = processes.environment(2, processes.Share(1, 2, "first", 29500))
    assert (one["RANK"], two["RANK"], two["LOCAL_RANK"], two["WORLD_SIZE"]) == ("2", "3", "1", "4")
    assert one["MASTER_ADDR"] == "first" and one["MASTER_PORT"] == two["MASTER_PORT"] == "29500"
