"""Processes that somebody else started: torchrun, accelerate launch, srun."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import runs
from vireo import cli, config, distributed, launch, ranks, worker
from vireo.errors import UserError
from vireo.mini import world

ROOT = Path(__file__).parents[1]
WORDS = [*runs.TINY, "batch_size=1", "steps=3"]
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


def check_equal(outputs, own):
    """One folder, one log for each rank, and the figures of vireo's own two processes."""
    (resolved,) = outputs.rglob("resolved.yaml")
    folder = resolved.parent
    assert runs.metrics(folder) == runs.metrics(own)
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["rank_1.log"]
    assert yaml.safe_load(resolved.read_text())["launcher"]["processes"] == 2
    assert [path for path in outputs.iterdir() if path.name not in ("taehv", "cache")] == []


def test_torchrun_on_two_machines(tmp_path, own):
    """Both are this one; launch/torchrun.sh is what a person starts on each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        master = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = [
        subprocess.Popen(
            [ROOT / "launch" / "torchrun.sh", *WORDS],
            env=environment(
                tmp_path, NODES="2", NODE=str(node), PROCESSES="1", MASTER=master, VIDEO_TRAIN_PROCESSES="5"
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "".join(said)
    assert "Where to look" in said[0] and "Where to look" not in said[1]
    check_equal(tmp_path, own)


def test_accelerate_launch_with_ones_own_config_file(tmp_path, own):
    file = tmp_path / "accelerate.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: false\n"
    )
    command = [ROOT / "launch" / "accelerate.sh", file, *WORDS]
    ran = subprocess.run(command, env=environment(tmp_path / "out"), capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    check_equal(tmp_path / "out", own)


@pytest.mark.full
@pytest.mark.parametrize("wrong", [["-m", "seed=1,2"], ["launcher.processes=3"], ["stepz=1"]])
def test_what_cannot_be_under_torchrun_ends_all_ranks_and_makes_no_folder(tmp_path, wrong):
    command = ["torchrun", "--standalone", "--nproc-per-node=2", ROOT / "train.py", *WORDS, *wrong]
    ran = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=60)
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
