"""Jobs through submitit, with processes of this machine in place of Slurm's; the real one is in tests/slurm."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import runs
from tests.test_ranks import ROOT, environment
from vireo import config, launch, submitted
from vireo.errors import UserError
from vireo.mini import world

pytest.importorskip("submitit", reason="submitit is not installed (pip install 'vireo[slurm]')")


def submit(outputs: Path, *words: str) -> subprocess.Popen:
    world.ensure()
    command = [sys.executable, ROOT / "train.py", *words[:1], *runs.TINY, "batch_size=1", *words[1:]]
    return subprocess.Popen(
        command, env=environment(outputs), cwd=outputs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def task_of_last_job(outputs: Path, jobs: int) -> int:
    """The process of the last of so many jobs, once all have begun; submitit names a local job by its controller's."""
    began = time.monotonic()
    while True:
        controllers = [path.stem.split("_")[0] for path in outputs.glob("sweeps/*/.submitit/*/*_submitted.pkl")]
        last = max(map(int, controllers), default=0)
        tasks = subprocess.run(["ps", "--ppid", str(last), "-o", "pid="], capture_output=True, text=True).stdout.split()
        if len(controllers) == jobs and tasks:
            return int(tasks[0])
        assert time.monotonic() - began < 300
        time.sleep(0.05)


def test_a_job_without_a_sweep(tmp_path):
    parent = submit(tmp_path, "launcher=submitit_local", "steps=2", "run=one")
    said, _ = parent.communicate(timeout=300)
    assert parent.returncode == 0, said
    fresh = runs.train(tmp_path / "fresh", "steps=2", "batch_size=1")
    assert runs.metrics(tmp_path / "taehv" / "one") == runs.metrics(fresh)


@pytest.mark.full
def test_a_sweep(tmp_path):
    parent = submit(tmp_path, "-m", "launcher=submitit_local", "steps=2", "data.held_out=0.1,no_such_list.txt,0.2")
    os.kill(task_of_last_job(tmp_path, 3), signal.SIGKILL)
    said, _ = parent.communicate(timeout=300)
    assert parent.returncode == 2, said  # of the worst job
    (table,) = tmp_path.glob("sweeps/*/sweep.csv")
    rows = list(csv.DictReader(table.open()))
    assert [row["state"] for row in rows] == ["finished", "mistake", "failed (1)"]
    assert "job 2 (data.held_out=0.2) failed (1): it was cancelled, or its machine is gone; what it printed: " in said
    assert str(table.parent / ".submitit") in said
    fresh = runs.train(tmp_path / "fresh", "steps=2", "batch_size=1")
    assert runs.metrics(Path(rows[0]["run"])) == runs.metrics(fresh)


@pytest.mark.full
def test_a_sweep_of_two_processes_each(tmp_path):
    parent = submit(tmp_path, "-m", "launcher=submitit_local", "launcher.processes=2", "steps=3", "seed=0,1")
    said, _ = parent.communicate(timeout=300)
    assert parent.returncode == 0, said
    (table,) = tmp_path.glob("sweeps/*/sweep.csv")
    first, second = [Path(row["run"]) for row in csv.DictReader(table.open())]
    own = launch.train(
        *runs.TINY, "batch_size=1", "steps=3", "launcher.processes=2", f"paths.outputs={tmp_path / 'own'}"
    )
    assert runs.metrics(first) == runs.metrics(own.folder) != runs.metrics(second)


@pytest.mark.full
def test_a_preempted_job_saves_first_and_goes_on_with_the_same_command(tmp_path):
    """Without -m too. submitit's local jobs are not queued again, so the command is given a second time."""
    words = ["launcher=submitit_local", "steps=120", "validation.every=null", "checkpoint.every=null", "run=one"]
    parent = submit(tmp_path, *words)
    folder, began = tmp_path / "taehv" / "one", time.monotonic()
    while not (folder / "metrics.jsonl").exists() or len(runs.metrics(folder)) < 4:
        assert parent.poll() is None and time.monotonic() - began < 300, parent.communicate()
        time.sleep(0.1)
    (process,) = [path.stem.split("_")[0] for path in tmp_path.glob("sweeps/*/.submitit/*/*_submitted.pkl")]
    tasks = subprocess.run(["ps", "--ppid", process, "-o", "pid="], capture_output=True, text=True).stdout.split()
    os.kill(int(tasks[0]), signal.SIGUSR2)
    said, _ = parent.communicate(timeout=300)
    assert "the same command goes on from here" in (folder / "train.log").read_text(), said
    if not (folder / "finished").exists():
        assert submit(tmp_path, *words).wait(timeout=300) == 0
    calm = runs.train(tmp_path / "calm", *words[1:4], "batch_size=1")
    assert runs.metrics(folder) == runs.metrics(calm)


@pytest.mark.parametrize(
    "told, requeued",
    [
        ("JobState=RUNNING Reason=None PreemptTime=2026-11-26T05:16:54", True),
        ("JobState=RUNNING Reason=None PreemptTime=None", False),
        ("JobState=COMPLETING Reason=None PreemptTime=None", False),  # scancel
    ],
)
def test_a_sigterm_requeues_a_job_that_is_preempted_and_none_that_is_cancelled(monkeypatch, told, requeued):
    heard: list[int] = []
    before = {n: signal.signal(n, lambda number, frame: heard.append(number)) for n in (signal.SIGTERM, signal.SIGUSR2)}
    for name, value in {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(submitted.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, told))
    try:
        with submitted.first_machine():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert heard == ([signal.SIGUSR2] if requeued else [])


def test_who_waits_for_slurm_no_longer_is_told_what_goes_on(tmp_path, monkeypatch, capsys):
    """hydra.main is replaced by what it does until then: it submits an array of two jobs, one of which has ended."""
    sweep = tmp_path / "sweep"

    def submit_and_wait(**_):
        def interrupted():
            for name in ("17/17_submission.sh", "17_0/17_0_submitted.pkl", "17_1/17_1_submitted.pkl"):
                (sweep / ".submitit" / name).parent.mkdir(parents=True)
                (sweep / ".submitit" / name).touch()
            (sweep / ".submitit" / "17_0" / "17_0_0_result.pkl").touch()
            launch.SweepFolder.last = sweep
            raise KeyboardInterrupt

        return lambda task: interrupted

    monkeypatch.setattr(launch.hydra, "main", submit_and_wait)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert launch.compose_and_run([]) == 75
    said = capsys.readouterr()
    assert "jobs that go on: 17_1\nto end them: scancel 17\n" in said.err and f"sweep={sweep}" in said.err
    assert said.out == "", "no job has begun"


def test_what_would_not_be_queued_is_refused(monkeypatch):
    with pytest.raises(UserError, match="Hydra ignores it. Say launcher=slurm"):
        submitted.check(["hydra/launcher=vireo_slurm"])
    submitted.check(["-m", "hydra/launcher=vireo_slurm"])
    with pytest.raises(UserError, match="hydra/sweeper=optuna is for sweeps; without -m, Hydra ignores it"):
        submitted.check(["hydra/sweeper=optuna", "lr=1"])
    for words in (["--multirun"], ["hydra.mode=MULTIRUN"], ["launcher=slurm"]):
        submitted.check([*words, "hydra/sweeper=optuna"])
    for word in ("hydra/sweeper=optuna", "hydra.sweep.dir=x"):
        with pytest.raises(UserError, match=f"{word} is for the command line"):
            launch.train(*runs.TINY, word)
    with pytest.raises(UserError, match="launcher=slurm is for the command line"):
        launch.train(*runs.TINY, "launcher=slurm")
    monkeypatch.setattr(submitted.importlib.util, "find_spec", lambda name: None)
    submitted.check(["launcher=local"])
    with pytest.raises(UserError, match=r"pip install 'vireo\[slurm\]'"):
        submitted.check(["launcher=slurm"])


def test_jobs_of_this_machine_wait_for_their_turn_and_share_it(tmp_path):
    """Three, two at a time: submitit itself starts all at once."""
    code = (
        "import os, sys, time; from vireo import devices, submitted; devices.cores = lambda: 8\n"
        "with submitted.turn(2, 1):\n"
        "    began = time.time(); time.sleep(0.6); print(began, time.time(), os.environ['OMP_NUM_THREADS'])"
    )
    variables = {**environment(tmp_path), "SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "1"}
    variables["SUBMITIT_FOLDER"] = str(tmp_path / "%j")
    del variables["OMP_NUM_THREADS"]
    jobs = [
        subprocess.Popen([sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    found = [job.communicate(timeout=60)[0].split() for job in jobs]
    spans = [(float(began), float(ended)) for began, ended, _ in found]
    assert max(sum(a <= b < e for a, e in spans) for b, _ in spans) == 2
    assert {threads for *_, threads in found} == {"4"}


def test_a_refusal_of_sbatch_is_told_once(tmp_path, monkeypatch):
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'sbatch: error: no controller' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    outputs = tmp_path / "out"
    outputs.mkdir()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    parent = submit(outputs, "launcher=slurm", "steps=2")
    said, _ = parent.communicate(timeout=300)
    assert parent.returncode == 1 and said.count("no controller") == 1 and "(none)" not in said, said
    assert "sbatch has refused, so no job was queued by it" in said and not list(outputs.rglob("sweep.csv"))


def test_a_machine_without_slurm_is_told(monkeypatch):
    monkeypatch.setenv("PATH", "")
    submitted.require_queue("submitit_local")
    with pytest.raises(UserError, match="launcher=slurm_multinode, but this machine has no sbatch and srun"):
        submitted.require_queue("slurm_multinode")


@pytest.mark.parametrize(
    "word",
    ["launcher.slurm.sbatch={mail-type: END}", "launcher.slurm.sbatch.mail-type=END",
     'launcher.slurm.srun=["--container-mounts=/data"]', "launcher.slurm.setup=[module load cuda]"],
)  # fmt: skip
def test_options_of_slurm_as_the_documentation_writes_them(word):
    settings = config.settings([*runs.TINY, "launcher=slurm", word])["launcher"]["slurm"]
    documented = (ROOT / "docs" / "configuration.md").read_text()
    assert ".mail-type=" in word or f", as {word.partition('=')[2]} |" in documented
    found = {**settings["sbatch"], "srun": settings["srun"], "setup": settings["setup"]}
    expected = {"sbatch": ("mail-type", "END"), "srun": ("srun", ["--container-mounts=/data"])}
    key, value = expected.get(word.split(".")[2].partition("=")[0], ("setup", ["module load cuda"]))
    assert found[key] == value and found["requeue"]


def test_mistakes_are_told_before_anything_is_queued(tmp_path):
    said, _ = (parent := submit(tmp_path, "launcher=slurm", "stepz=1")).communicate(timeout=300)
    assert parent.returncode == 2 and "stepz" in said and list(tmp_path.iterdir()) == []


def test_the_script_that_is_submitted(tmp_path):
    """What is asked of Slurm, as sbatch would read it."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.utils import instantiate
    from submitit.slurm.slurm import _make_sbatch_string

    words = ["launcher=slurm_multinode", "launcher.slurm.gpus=8", "launcher.slurm.partition=long"]
    words += ["launcher.slurm.container=image.sqsh", "launcher.slurm.setup=[module load cuda]"]
    words += ["+launcher.slurm.sbatch.mail-type=END", "launcher.slurm.minutes=90"]
    config.register()
    with config.search.searching():
        import hydra

        composed = hydra.compose("config", [*words, "hydra.sweep.dir=x"], return_hydra_config=True)
        assert composed.hydra.mode.name == "MULTIRUN" and GlobalHydra.instance().is_initialized()
        params = instantiate(composed.hydra.launcher).params
    slurm = {"partition", "signal_delay_s", "setup", "srun_args", "additional_parameters", "nodes", "gpus_per_node"}
    text = _make_sbatch_string(
        "python job", str(tmp_path), time=params["timeout_min"], **{name: params[name] for name in slurm}
    )
    for line in ("--nodes=2", "--gpus-per-node=8", "--partition=long", "--mail-type=END", "--time=90", "--requeue"):
        assert f"#SBATCH {line}\n" in text, text
    assert "--signal=USR2@120" in text and "\nmodule load cuda\n" in text
    assert "--kill-on-bad-exit=1 --container-image=image.sqsh python job" in text


def test_the_other_machines_of_a_job_do_what_the_first_one_tells(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(submitted, "_message", lambda: tmp_path / "start.json")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[03-04]")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(submitted, "GLANCE", 0.01)
    (tmp_path / "start.json").write_text('{"over": true, "restart": "0"}')  # of the job's life before it was requeued

    def run(resolved, count, place, obsolete, resend):
        calls.append((resolved.name, count, place.node, place.nodes, obsolete()))
        if len(calls) == 1:
            submitted.share(tmp_path / "second", 4)  # the first machine starts again after a fault
        else:
            with submitted.first_machine():
                pass
        assert obsolete()

    monkeypatch.setattr(submitted.processes, "run", run)
    assert submitted.share(tmp_path / "first", 4).node == 0
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert submitted.node() == 1
    submitted.follow()
    assert calls == [("first", 4, 1, 2, False), ("second", 4, 1, 2, False)]
