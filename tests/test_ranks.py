"""Processes that somebody else started: torchrun, accelerate launch, srun."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests import runs
from vireo import checkpoint, cli, config, distributed, launch, ranks, worker
from vireo.errors import UserError
from vireo.mini import world

ROOT = Path(__file__).parents[1]
WORDS = [*runs.TINY, "batch_size=1", "steps=3"]
LONG = [*runs.TINY, "batch_size=1", "steps=40", "checkpoint.every=10", "validation.every=null"]
STEP = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[03-04]",
}


def environment(outputs, **further):
    bin = Path(sys.executable).parent
    path = os.pathsep.join(p for p in sys.path if p)
    own = {"PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": path, "VIREO_OUTPUTS": str(outputs)}
    return {**os.environ, **own, **further}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The run folder of vireo's own two processes, as a program starts them."""
    world.ensure()
    outputs = tmp_path_factory.mktemp("own")
    return launch.train(*WORDS, "run=own", "launcher.processes=2", f"paths.outputs={outputs}").folder


def the_only_folder(outputs, processes):
    """The run's folder, with one log for each rank."""
    (resolved,) = outputs.rglob("resolved.yaml")
    logs = sorted(path.name for path in (resolved.parent / "logs").iterdir())
    assert logs == [f"rank_{rank}.log" for rank in range(1, processes)]
    assert yaml.safe_load(resolved.read_text())["launcher"]["processes"] == processes
    assert [path for path in outputs.iterdir() if path.name not in ("taehv", "cache")] == []
    return resolved.parent


def losses(folder):
    return [row["loss"] for row in runs.metrics(folder) if "loss" in row]


@pytest.mark.slow
def test_torchrun_on_three_machines(tmp_path):
    """All are this one; launch/torchrun.sh is what a person starts on each. Ranks compare hashes of their configs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        master = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = [
        subprocess.Popen(
            [ROOT / "launch" / "torchrun.sh", *WORDS],
            env=environment(
                tmp_path / "out", NODES="3", NODE=str(node), PROCESSES="1", MASTER=master, VIDEO_TRAIN_PROCESSES="5"
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(3)
    ]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0, 0], "".join(said)
    assert "Where to look" in said[0] and "Where to look" not in said[1] + said[2]
    alone = runs.train(tmp_path / "alone", "batch_size=3", "steps=3")
    assert losses(the_only_folder(tmp_path / "out", 3)) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.full
def test_accelerate_launch_with_ones_own_config_file(tmp_path, own):
    file = tmp_path / "accelerate.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: false\n"
    )
    command = [ROOT / "launch" / "accelerate.sh", file, *WORDS]
    ran = subprocess.run(command, env=environment(tmp_path / "out"), capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert runs.metrics(the_only_folder(tmp_path / "out", 2)) == runs.metrics(own)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """Figures of the run that torchrun's are disturbed in."""
    outputs = tmp_path_factory.mktemp("calm")
    words = [*LONG, "run=calm", "launcher.processes=2", f"paths.outputs={outputs}"]
    return runs.metrics(launch.train(*words).folder)


def start_torchrun(outputs):
    command = [
        "torchrun",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=1",
        ROOT / "train.py",
        *LONG,
        "run=one",
    ]
    return subprocess.Popen(
        command, env=environment(outputs), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_a_checkpoint(folder, agent):
    began = time.monotonic()
    while not checkpoint.steps(folder):
        assert agent.poll() is None and time.monotonic() - began < 300, agent.communicate()
        time.sleep(0.05)


@pytest.mark.full
def test_torchrun_starts_again_from_the_checkpoint_after_a_worker_was_killed(tmp_path, calm):
    folder, agent = tmp_path / "taehv" / "one", start_torchrun(tmp_path)
    wait_for_a_checkpoint(folder, agent)
    workers = subprocess.run(["ps", "--ppid", str(agent.pid), "-o", "pid="], capture_output=True, text=True).stdout
    os.kill(int(workers.split()[-1]), signal.SIGKILL)
    said, _ = agent.communicate(timeout=300)
    assert agent.returncode == 0, said
    assert "resumed from" in (folder / "train.log").read_text() and runs.metrics(folder) == calm


@pytest.mark.full
def test_torchrun_that_is_asked_to_stop_saves_and_the_same_command_goes_on(tmp_path, calm):
    folder, agent = tmp_path / "taehv" / "one", start_torchrun(tmp_path)
    wait_for_a_checkpoint(folder, agent)
    agent.terminate()
    said, _ = agent.communicate(timeout=300)
    assert "the same command goes on from here" in (folder / "train.log").read_text(), said
    assert not (folder / "finished").exists()
    agent = start_torchrun(tmp_path)
    assert agent.communicate(timeout=300) and agent.returncode == 0
    assert runs.metrics(folder) == calm


@pytest.mark.parametrize(
    "wrong",
    [
        ["-m", "seed=1,2"],
        pytest.param(["launcher.processes=3"], marks=pytest.mark.full),
        pytest.param(["stepz=1"], marks=pytest.mark.full),
    ],
)
def test_what_cannot_be_under_torchrun_ends_all_ranks_and_makes_no_folder(tmp_path, wrong):
    command = ["torchrun", "--standalone", "--nproc-per-node=2", ROOT / "train.py", *WORDS, *wrong]
    ran = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=300)
    assert ran.returncode != 0 and list(tmp_path.iterdir()) == []
    told = {
        "-m": "Use: python train.py experiment=taehv ",
        "launcher.processes=3": "started 2 (WORLD_SIZE)",
        "stepz=1": "stepz",
    }
    assert ran.stderr.count(told[wrong[0]]) == 1, ran.stderr


def test_accelerate_that_was_asked_for_two_and_started_one_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    for line in ("accelerate launch --cpu --num_processes 2 train.py", "accelerate launch --num-processes=2 train.py"):
        monkeypatch.setattr(ranks, "_command_line", lambda _, line=line: line.split())
        with pytest.raises(UserError, match="asked for 2 processes and started one"):
            ranks.started()
    file = tmp_path / "file.yaml"
    file.write_text("num_processes: 4\nuse_cpu: true\n")
    monkeypatch.setattr(ranks, "_command_line", lambda _: ["accelerate", "launch", "--config_file", str(file)])
    with pytest.raises(UserError, match="python train.py launcher.processes=4"):
        ranks.started()
    monkeypatch.setattr(ranks, "_command_line", lambda _: ["accelerate", "launch", "train.py"])
    assert ranks.started() is None


def test_ranks_of_srun():
    found = ranks.slurm_variables(STEP)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("5", "8", "1")
    assert found["MASTER_ADDR"] == "node03" and 20_000 <= int(found["MASTER_PORT"]) < 40_000
    assert ranks.slurm_variables({**STEP, "SLURM_PROCID": "6"})["MASTER_PORT"] == found["MASTER_PORT"]
    assert ranks.slurm_variables({**STEP, "SLURM_ARRAY_TASK_ID": "1"})["MASTER_PORT"] != found["MASTER_PORT"]
    assert ranks.slurm_variables({**STEP, "SLURM_STEP_NUM_NODES": "1"})["MASTER_ADDR"] == "127.0.0.1"
    assert ranks.slurm_variables({**STEP, "CUDA_VISIBLE_DEVICES": "3"})["LOCAL_RANK"] == "0"
    assert ranks.slurm_variables({**STEP, "CUDA_VISIBLE_DEVICES": "0,1"})["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(
    "nodes, first",
    [("gpu1", "gpu1"), ("a,b", "a"), ("n[3-5,9],m1", "n3"), ("n[007,9]", "n007"), ("r[1-2]n[3-4]x", "r1n3x")],
)
def test_the_first_host_of_a_list(nodes, first):
    assert ranks.first_host(nodes) == first


def test_who_started_this(monkeypatch):
    for variable in ("RANK", "WORLD_SIZE", "SUBMITIT_EXECUTOR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)
    assert ranks.started() is None
    with monkeypatch.context() as inside:
        fresh = dict(os.environ)
        inside.setattr(os, "environ", {**fresh, **STEP, "SLURM_STEP_NUM_TASKS": "1"})
        assert ranks.started() is None  # an interactive shell of one task
        inside.setattr(os, "environ", {**fresh, **STEP, "SUBMITIT_EXECUTOR": "slurm"})
        assert ranks.started() is None  # a job of vireo's own
        inside.setattr(os, "environ", {**fresh, **STEP})
        assert ranks.started() == (5, 8, "srun")


def test_a_world_of_one_counts_only_where_somebody_starts_it_again(monkeypatch):
    left_over = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    fresh = {name: value for name, value in os.environ.items() if name not in (*left_over, "SUBMITIT_EXECUTOR")}
    monkeypatch.setattr(os, "environ", {**fresh, **left_over, "TORCHELASTIC_RUN_ID": "x"})
    assert ranks.started() == (0, 1, "torchrun or accelerate launch") and "RANK" in os.environ
    monkeypatch.setattr(os, "environ", {**fresh, **left_over})
    assert ranks.started() is None and not left_over.keys() & os.environ.keys()


def test_sweeps_and_other_launchers_are_refused():
    two = ranks.World(0, 2, "srun")
    for words in (["-m", "seed=1,2"], ["seed=1", "--multirun"], ["hydra.mode=MULTIRUN"]):
        with pytest.raises(UserError, match=r"under srun[^$]*Use: python train.py .*launcher.processes=2"):
            ranks.refuse_sweeps(two, words)
    with pytest.raises(UserError, match="Use: python train.py launcher=slurm$"):
        ranks.refuse_sweeps(two, ["launcher=slurm"])
    ranks.refuse_sweeps(two, ["launcher=local", "seed=1"])
    ranks.refuse_sweeps(ranks.World(0, 1, "srun"), ["-m"])


@pytest.mark.parametrize(
    "chosen", ["defaults:\n  - override /launcher: submitit_local\n", "hydra:\n  mode: MULTIRUN\n"]
)
def test_a_sweep_that_a_file_asks_for_is_refused_before_it_starts(tmp_path, monkeypatch, capsys, chosen):
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "default.yaml").write_text(f"# @package _global_\n{chosen}")
    words = [*WORDS, "--config-dir", str(tmp_path)]
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "VIREO_OUTPUTS": str(tmp_path / "out")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as ended:
        launch.compose_and_run(words)
    assert ended.value.code == 2 and "of a YAML file cannot be used under" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_size_that_was_asked_for():
    two = ranks.World(0, 2, "torchrun")
    for processes in (2, "2", "auto"):
        ranks.check_size(two, processes)
    with pytest.raises(UserError, match=r"launcher.processes=4, but torchrun started 2 \(WORLD_SIZE\)"):
        ranks.check_size(two, 4)


def test_a_rank_that_deepspeed_appends_is_left_out(monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "main", lambda words: seen.extend(words) or 0)
    monkeypatch.setattr(sys, "argv", ["train.py", "--local_rank=1", "seed=1"])
    assert cli.train() == 0 and seen == ["seed=1"]


def test_processes_that_run_different_things_are_stopped(monkeypatch):
    settings = config.settings(runs.TINY)
    worker._check_agreement(settings)
    monkeypatch.setattr(distributed, "gather", lambda fact: [fact, ("other", fact[1], "0123456789abcdef")])
    with pytest.raises(UserError, match="rank 1 on other: .*sources 0123456789abcdef"):
        worker._check_agreement(settings)
