"""A real Slurm of two pretended machines, see cluster.sh: jobs that train, are signalled, queued again and finish."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import runs
from tests.test_ranks import ROOT, environment
from vireo import launch
from vireo.mini import world

SCRIPT = Path(__file__).parent / "cluster.sh"
WORDS = [*runs.TINY, "batch_size=1", "steps=3"]
LONG = [*runs.TINY, "batch_size=1", "steps=150", "validation.every=null", "checkpoint.every=null"]


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    if os.environ.get("VIREO_TEST_SLURM") != "1":
        pytest.skip("VIREO_TEST_SLURM=1 starts a Slurm; before, as root: tests/slurm/cluster.sh install")
    folder = tmp_path_factory.mktemp("slurm")
    try:
        started = subprocess.run([SCRIPT, "start", folder], capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired:
        subprocess.run([SCRIPT, "stop", folder], timeout=60, check=False)
        pytest.skip("Slurm did not start within 90 s")
    try:
        if started.returncode:
            pytest.skip(f"no Slurm: {started.stderr.strip()[-300:]}")
        os.environ["SLURM_CONF"] = started.stdout.strip()
        world.ensure()
        yield
    finally:
        os.environ.pop("SLURM_CONF", None)
        subprocess.run([SCRIPT, "stop", folder], timeout=60, check=False)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Figures of two processes that Slurm has nothing to do with."""
    outputs = tmp_path_factory.mktemp("own")
    return runs.metrics(launch.train(*WORDS, "run=own", "launcher.processes=2", f"paths.outputs={outputs}").folder)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """Figures of the long run, undisturbed, by the number of processes."""
    outputs = tmp_path_factory.mktemp("calm")
    words = [*LONG, f"paths.outputs={outputs}"]
    folders = {n: launch.train(*words, f"run=of_{n}", f"launcher.processes={n}").folder for n in (1, 2)}
    return {n: runs.metrics(folder) for n, folder in folders.items()}


def call(outputs, *command):
    ran = subprocess.run(command, env=environment(outputs), capture_output=True, text=True, timeout=180, cwd=ROOT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def wait_for_rows(folder):
    began = time.monotonic()
    while not (folder / "metrics.jsonl").exists() or len(runs.metrics(folder)) < 5:
        assert time.monotonic() - began < 120, "training did not begin"
        time.sleep(0.1)


def signalled_and_requeued(job, number):
    """Send a signal to a job, or let it give way to an urgent one, and wait until it is back in the queue."""
    if number == "preempt":
        urgent = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
        subprocess.run(urgent, check=True)
    else:
        subprocess.run(["scancel", f"--signal={number}", job], check=True)
    began = time.monotonic()
    while "Restarts=1" not in subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout:
        assert time.monotonic() - began < 60, f"job {job} was not queued again"
        time.sleep(0.2)


def test_two_tasks_of_srun_on_two_machines(tmp_path, own):
    call(tmp_path, "srun", "-N2", "-n2", sys.executable, "train.py", *WORDS)
    (folder,) = tmp_path.glob("taehv/*")
    assert runs.metrics(folder) == own and (folder / "logs" / "rank_1.log").exists()


def test_a_sweep_of_two_jobs_of_two_processes(tmp_path, own):
    words = ["launcher=slurm", "launcher.processes=2", "seed=0,1"]
    call(tmp_path, sys.executable, "train.py", "-m", *WORDS, *words)
    (table,) = tmp_path.glob("sweeps/*/sweep.csv")
    rows = list(csv.DictReader(table.open()))
    assert [row["state"] for row in rows] == ["finished", "finished"]
    assert runs.metrics(Path(rows[0]["run"])) == own != runs.metrics(Path(rows[1]["run"]))


def test_a_job_of_a_sweep_that_is_cancelled_stops_no_other(tmp_path):
    command = [sys.executable, "train.py", "-m", *WORDS, "launcher=slurm", "launcher.slurm.parallel=1", "seed=0,1,2"]
    parent = subprocess.Popen(
        command, env=environment(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    began = time.monotonic()
    while not (waiting := list(tmp_path.glob("sweeps/*/.submitit/*_1/*_submitted.pkl"))):
        assert time.monotonic() - began < 60
        time.sleep(0.1)
    subprocess.run(["scancel", waiting[0].parent.name], check=True)
    said, _ = parent.communicate(timeout=180)
    assert parent.returncode == 1 and "job 1 (seed=1) failed (1): it was cancelled" in said, said
    (table,) = tmp_path.glob("sweeps/*/sweep.csv")
    assert [row["state"] for row in csv.DictReader(table.open())] == ["finished", "failed (1)", "finished"]


def test_a_job_of_two_machines(tmp_path, own):
    call(tmp_path, sys.executable, "train.py", *WORDS, "launcher=slurm_multinode", "launcher.processes=1", "run=two")
    assert runs.metrics(tmp_path / "taehv" / "two") == own


@pytest.mark.parametrize("launcher, how", [("slurm", "USR2"), ("slurm", "preempt"), ("slurm_multinode", "USR2")])
def test_a_preempted_job_is_queued_again_and_equals_an_undisturbed_one(tmp_path, launcher, how, calm):
    words = [f"launcher={launcher}", "launcher.processes=1", "run=preempted"]
    command = [sys.executable, "train.py", *LONG, *words]
    parent = subprocess.Popen(
        command, env=environment(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    folder = tmp_path / "taehv" / "preempted"
    wait_for_rows(folder)
    running = subprocess.run(["squeue", "-h", "-t", "RUNNING", "-o", "%A"], capture_output=True, text=True)
    (job,) = running.stdout.split()
    signalled_and_requeued(job, how)
    said, _ = parent.communicate(timeout=120)
    assert parent.returncode == 0, said
    assert "resumed from" in (folder / "train.log").read_text()
    assert runs.metrics(folder) == calm[1 if launcher == "slurm" else 2]


def test_a_job_that_meets_its_time_limit_is_queued_again_and_equals_an_undisturbed_one(tmp_path):
    """Slurm looks at time limits twice a minute, so the signal comes 20 to 50 s after the start, once or more often."""
    words = [*LONG, "steps=2000", "run=limited"]
    limits = ["launcher.slurm.minutes=1", "launcher.slurm.grace_seconds=10", "launcher.slurm.requeue=30"]
    command = [sys.executable, "train.py", *words, "launcher=slurm", "launcher.processes=1", *limits]
    parent = subprocess.Popen(
        command, env=environment(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    calm = launch.train(*words, "run=calm", f"paths.outputs={tmp_path}").folder  # meanwhile
    said, _ = parent.communicate(timeout=600)
    assert parent.returncode == 0, said
    folder = tmp_path / "taehv" / "limited"
    assert "resumed from" in (folder / "train.log").read_text()
    assert runs.metrics(folder) == runs.metrics(calm)


def test_the_script_for_sbatch_is_queued_again_and_equals_an_undisturbed_run(tmp_path, calm):
    words = ["sbatch", "--parsable", "--ntasks=2", f"--output={tmp_path / 'out'}", "launch/slurm.sbatch"]
    job = call(tmp_path, *words, *LONG, "run=raw").strip()
    folder = tmp_path / "taehv" / "raw"
    wait_for_rows(folder)
    signalled_and_requeued(job, "USR1")
    began = time.monotonic()
    while not (folder / "finished").exists():
        assert time.monotonic() - began < 120, (tmp_path / "out").read_text()
        time.sleep(0.5)
    assert runs.metrics(folder) == calm[2]
