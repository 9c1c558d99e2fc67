"""What goes wrong in one process of several: nobody waits for ever, and the run goes on from its checkpoint."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import ranks, runs
from vireo import checkpoint, drill, faults, hangs, launch, run_folder
from vireo.mini import world

PAIR = [*runs.TINY, "batch_size=1", "launcher.processes=2", "launcher.timeout=20", "validation.at_start=false"]
MOST = 60  # seconds from a fault to the end of all processes


@pytest.fixture(scope="module", autouse=True)
def mini_world():
    world.ensure()


def seconds_after(path: Path) -> float:
    """Since a file was written last."""
    return time.time() - path.stat().st_mtime


def test_a_process_that_hangs_is_shown_with_all_others_and_the_run_ends(tmp_path, disturbed, capfd):
    disturbed("hang_at", 4)
    done = launch.train(*PAIR, f"paths.outputs={tmp_path}", "run=hang")
    assert done.exit_code == faults.EXIT_FAULT
    assert seconds_after(done.folder / "metrics.jsonl") < MOST
    one, two = (hangs.file_of(done.folder, rank) for rank in range(2))
    assert "in vote" in one.read_text() and "in train" in one.read_text()
    assert "in _stand_still" in two.read_text() and "in train" in two.read_text()
    said = capfd.readouterr().err
    assert re.search(rf"where processes stood then:\s+{one}\s+{two}", said), said
    assert checkpoint.latest(done.folder).step == 4, "of the validation before"


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The run folder of two processes to which nothing happened."""
    folder = runs.make(tmp_path_factory.mktemp("calm"), [*PAIR[len(runs.TINY) :], "run=calm"])
    assert ranks.work([folder]) == [[0, 0]]
    return folder


def test_a_signal_to_one_process_of_two_is_heard_by_both(tmp_path, calm):
    def ask_the_second():
        if os.environ["RANK"] == "1":
            drill._at_step(4, drill._signal(signal.SIGTERM))

    folder = runs.make(tmp_path, [*PAIR[len(runs.TINY) :], "run=asked"])
    assert ranks.work([folder, folder], ask_the_second) == [[faults.EXIT_STOPPED] * 2, [faults.EXIT_FINISHED] * 2]
    log = (folder / "train.log").read_text()
    assert "stopped on request at step 5" in log and "step 5 of 8" in log
    runs.same(folder, calm)


# Where memory runs out on one process while others wait within collectives.
STRANDING = {
    "in_backward": ["strategy=ddp"],
    "in_forward": ["strategy=fsdp"],
}


@pytest.mark.parametrize("where", ["in_backward", pytest.param("in_forward", marks=pytest.mark.full)])
def test_memory_that_runs_out_while_others_wait_ends_the_group_and_smaller_pieces_go_on(
    tmp_path, disturbed, capfd, where
):
    words = ["validation.every=null", "checkpoint.every=2"]
    alone = runs.train(tmp_path, *words, "batch_size=4", "run=alone")
    disturbed(f"out_of_memory_{where}", 5, 5)  # it would run out again, if as much was tried again
    done = launch.train(*PAIR, *words, "batch_size=2", *STRANDING[where], f"paths.outputs={tmp_path}", "run=full")
    assert done.exit_code == faults.EXIT_FINISHED
    said = "".join(capfd.readouterr())
    assert "starting again from the last checkpoint (with 1 samples at a time" in said, said
    assert "rank 1 failed first" in said, said
    log = (done.folder / "train.log").read_text() + (done.folder / "logs" / "rank_1.log").read_text()
    assert "CUDA out of memory (on purpose)" in log and "gradient_accumulation" in log, "what takes less memory"
    assert "step 4 of 8" in log
    wanted, found = ([row["loss"] for row in runs.metrics(f) if "loss" in row] for f in (alone, done.folder))
    assert found == pytest.approx(wanted, rel=1e-5)


def test_processes_take_the_same_pieces_whatever_they_read(tmp_path):
    """A network's file system may show one of them an older file."""

    def the_second_sees_nothing():
        if os.environ["RANK"] == "1":
            faults.rows_that_fit = lambda path: None

    folder = runs.make(tmp_path, [*PAIR[len(runs.TINY) :], "batch_size=2", "steps=2", "validation.every=null"])
    run_folder.write_json(run_folder.room_file(folder), {"rows": 1})
    assert ranks.work([folder], the_second_sees_nothing) == [[faults.EXIT_FINISHED] * 2]


@pytest.mark.full
def test_a_process_that_fails_takes_the_others_with_it(tmp_path, disturbed, capfd):
    disturbed("fail_at", 4)
    done = launch.train(*PAIR, f"paths.outputs={tmp_path}", "run=fails", "launcher.timeout=1800")
    assert done.exit_code == faults.EXIT_FAULT
    assert seconds_after(done.folder / "metrics.jsonl") < MOST
    said = capfd.readouterr().err
    assert "rank 1 failed first" in said and "ZeroDivisionError" in said
    assert checkpoint.latest(done.folder).step == 4 and not (done.folder / "finished").exists()


# ------------------------------------------------------------ loader workers


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def gone_within(processes: list[psutil.Process], seconds: float) -> bool:
    began = time.monotonic()
    while alive(processes) and time.monotonic() - began < seconds:
        time.sleep(0.2)
    return not alive(processes)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_loader_workers_do_not_outlive_their_process(tmp_path, number):
    words = ["steps=5000", "loader.workers=2", "validation.every=null", "validation.at_start=false"]
    folder = runs.make(tmp_path, [*words, "checkpoint.every=null"])
    command = [sys.executable, "-m", "vireo.start_worker", str(os.getpid()), folder / "resolved.yaml"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    main, began = subprocess.Popen(command, env=environment), time.monotonic()
    while not (folder / "metrics.jsonl").exists() or len(runs.metrics(folder)) < 2:
        assert main.poll() is None and time.monotonic() - began < 300
        time.sleep(0.2)
    workers = psutil.Process(main.pid).children()
    assert len(workers) >= 2
    main.send_signal(number)
    assert main.wait(MOST) == (-number if number == signal.SIGKILL else faults.EXIT_STOPPED)
    assert gone_within(workers, 10), alive(workers)


HANGS = """
import os, sys, time
from pathlib import Path
from vireo import drill, orphans, worker
from vireo.console import set_up_logging
orphans.die_with_parent(int(sys.argv[1]))
set_up_logging(Path(sys.argv[2]).parent / "train.log")

def hang():
    Path(sys.argv[3]).write_text(str(os.getpid()))
    time.sleep(3600)

drill._in_a_loader_worker(hang)()
sys.exit(worker.main(Path(sys.argv[2])))
"""


@pytest.mark.full
def test_a_loader_worker_that_hangs_does_not_outlive_its_process(tmp_path):
    """Its process gives up after loader.timeout and ends, though Python waits for its children at exit."""
    folder, number = runs.make(tmp_path, ["loader.workers=1", "loader.timeout=5"]), tmp_path / "number"
    command = [sys.executable, "-c", HANGS, str(os.getpid()), folder / "resolved.yaml", number]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    main, began = subprocess.Popen(command, env=environment), time.monotonic()
    while not number.exists():
        assert main.poll() is None and time.monotonic() - began < 300
        time.sleep(0.2)
    hanging = psutil.Process(int(number.read_text()))
    assert main.wait(MOST) == faults.EXIT_FAULT
    assert gone_within([hanging], 10)
    assert "DataLoader timed out after 5" in (folder / "train.log").read_text()
