"""The command line as people use it. Workers are forked, except where the process itself is what is tested."""

import csv
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests import runs
from vireo import checkpoint, cli, faults, global_batch, launch, run_folder
from vireo.errors import UserError
from vireo.mini import world

ROOT = Path(__file__).parents[1]


@pytest.fixture
def vireo(tmp_path, monkeypatch, capfd):
    """Call the command line in this process: vireo("train", "lr=1", …) -> (exit code, what was printed)."""
    world.ensure()
    monkeypatch.setenv("VIREO_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(launch, "start", lambda resolved, launcher, held: abs(runs.work(resolved.parent)))

    def call(verb, *words):
        monkeypatch.setattr(sys, "argv", ["vireo", verb, *words])
        capfd.readouterr()
        try:
            code = cli.vireo()
        except SystemExit as exit:
            code = exit.code
        return code, "".join(capfd.readouterr())

    return call


def only_run(outputs: Path) -> Path:
    (folder,) = (path.parent for path in outputs.glob("taehv/*/resolved.yaml"))
    return folder


def test_a_run_leaves_what_it_promises_and_the_same_command_does_nothing_more(vireo, tmp_path):
    code, said = vireo("train", *runs.TINY, "notes=a try", "tags=[one]")
    folder = only_run(tmp_path)
    assert code == 0 and "This is the demonstration" in said and "Where to look" in said, said
    for name in (
        "resolved.yaml",
        "overrides.json",
        "environment.json",
        "metrics.jsonl",
        "train.log",
        "curves.png",
        "finished",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert (folder / "export" / "taecvx.safetensors").exists() and (folder / "export" / "best").is_dir()
    assert (folder / "samples" / "step_00000008" / "clip_000.mp4").stat().st_size > 0
    assert checkpoint.latest(folder).step == 8
    about = json.loads((folder / "environment.json").read_text())
    assert about["packages"]["torch"] and "vireo" in about["command"]
    data = json.loads((folder / "data.json").read_text())
    assert data["root"]["files"] > 3 and data["root"]["path"] == str(world.ensure() / "data")

    stamp = (folder / "metrics.jsonl").stat().st_mtime_ns
    code, said = vireo("train", *runs.TINY, "notes=a try", "tags=[one]")
    assert code == 0 and "is finished (step 8)" in said and (folder / "metrics.jsonl").stat().st_mtime_ns == stamp

    code, said = vireo("runs")
    assert code == 0 and folder.name in said and "finished" in said
    code, said = vireo("evaluate", f"run={folder.name}", "clips=3")
    assert (
        code == 0
        and "mean colour" in said
        and len(json.loads((folder / "evaluation/metrics.json").read_text())["each"]) == 3
    )
    code, said = vireo("sample", f"run={folder}", "step=6", "clips=1", f"out={tmp_path / 'shown'}")
    assert code == 0 and "step_00000006" in said and (tmp_path / "shown" / "clip_000.png").exists()
    code, said = vireo("export", f"run={folder.name}", "step=6")
    exported = folder / "export" / "step_00000006" / "taecvx.safetensors"
    assert code == 0 and exported.exists()
    code, said = vireo("evaluate", *runs.TINY, f"weights={exported}", "clips=1", f"out={tmp_path / 'foreign'}")
    assert code == 0 and str(exported) in said
    code, said = vireo("evaluate", f"run={folder.name}", "step=5")
    assert code == 2 and "has no checkpoint of step 5; it has [4, 6, 8]" in said


def test_a_named_run_can_be_lengthened_but_not_changed(vireo, tmp_path):
    assert vireo("train", *runs.TINY, "run=mine", "steps=3")[0] == 0
    code, said = vireo("train", *runs.TINY, "run=mine", "steps=5")
    assert code == 0 and "resumed from" in said and "changed: steps: 3 in the run, 5 now\n" in said
    assert [row["step"] for row in runs.metrics(tmp_path / "taehv" / "mine") if "loss" in row] == [1, 2, 3, 4, 5]
    code, said = vireo("train", *runs.TINY, "run=mine", "steps=6", "lr=0.5", "seed=7")
    assert code == 2 and "lr: 0.0005 in the run, 0.5 now" in said and "seed: 0 in the run, 7 now" in said
    assert vireo("train", *runs.TINY, "run=mine", "steps=6", "lr=0.5", "allow_changes=[lr]", "loader.workers=1")[0] == 0
    told = "changed: loader.workers: 0 in the run, 1 now; lr: 0.0005 in the run, 0.5 now; steps: 5 in the run, 6 now\n"
    assert told in (tmp_path / "taehv" / "mine" / "train.log").read_text()


def test_processes_that_cannot_share_the_global_batch_leave_a_finished_run_as_it_is(vireo, tmp_path):
    assert vireo("train", *runs.TINY, "run=mine", "steps=3")[0] == 0
    folder = tmp_path / "taehv" / "mine"
    before = {name: (folder / name).read_bytes() for name in ("finished", "resolved.yaml", "overrides.json")}
    code, said = vireo("train", *runs.TINY, "run=mine", "steps=5", "launcher.processes=2")
    assert code == 2 and "a global batch of 2, which 2 processes with batch_size=2 cannot share" in said
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert "with 2, batch_size=1 allow_changes=[batch_size] can" in said
    assert vireo("train", *runs.TINY, "run=mine", "steps=3", "launcher.processes=2")[0] == 0, "nothing to be done"
    advised = ["batch_size=1", "allow_changes=[batch_size]"]
    assert vireo("train", *runs.TINY, "run=mine", "steps=5", "launcher.processes=2", *advised)[0] == 0


def test_what_is_told_of_a_global_batch_that_cannot_be_shared():
    assert global_batch.accumulation(12, 2, 3) == 2
    told = {
        (12, 2, 4): "launcher.processes=1 or 2 or 3 or 6 can (on all machines together); with 4, batch_size=1 allow",
        (12, 2, 5): "launcher.processes=1 or 2 or 3 or 6 can (on all machines together)$",
        (12, 8, 4): "share equally; with 4, batch_size=3 allow_changes=[batch_size] can$",
        (12, 8, 5): "share equally; a number that divides 12 can, with batch_size=1 allow_changes=[batch_size]",
    }
    for numbers, advice in told.items():
        with pytest.raises(UserError, match=re.escape(advice).replace(r"\$", "$")):
            global_batch.accumulation(*numbers)


def test_a_run_that_preempts_itself_equals_an_undisturbed_one(vireo, tmp_path):
    code, said = vireo("train", *runs.TINY, "steps=6", "run=calm", "warmup_steps=0")
    assert code == 0 and re.search(r"held-out loss on fixed draws: \S+ at step 0, \S+ at step 6", said)
    code, said = vireo("train", *runs.TINY, "steps=6", "run=again", "debug=sanity", "warmup_steps=0")
    assert code == 0 and "starting again from step 5" in said and "step 5 of 6" in said
    one, two = (checkpoint.latest(tmp_path / "taehv" / name) for name in ("calm", "again"))
    assert one.step == two.step == 6
    for part in ("network", "optimizer", "ema"):
        first, second = one.tensors(part), two.tensors(part)
        assert all(torch.equal(first[name], second[name]) for name in first), part
    code, said = vireo("train", *runs.TINY, "steps=6", "run=again", "debug=sanity", "warmup_steps=0")
    assert code == 0 and "starting again from step 5" in said, "the second check checks as the first one did"
    third = checkpoint.latest(tmp_path / "taehv" / "again-2").tensors("network")
    assert all(torch.equal(value, third[name]) for name, value in one.tensors("network").items())


def test_resume_none_starts_beside_and_an_explicit_checkpoint_must_be_there(vireo, tmp_path):
    assert vireo("train", *runs.TINY, "steps=2")[0] == 0
    first = only_run(tmp_path)
    assert vireo("train", *runs.TINY, "steps=2", "resume=none")[0] == 0
    assert runs.metrics(first.with_name(f"{first.name}-2")) == runs.metrics(first)
    code, said = vireo("train", *runs.TINY, "run=other", f"resume={tmp_path / 'nowhere'}")
    assert code == 2 and "nowhere" in said


@pytest.fixture
def queue(vireo, tmp_path, monkeypatch):
    """queue(job, restarts, *words, kill=…): a command as a job of Slurm, killed in a step or undisturbed."""

    def call(job, restarts, *words, kill=None):
        monkeypatch.setenv("SLURM_JOB_ID", str(job))
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        sabotage = runs.die_at(kill) if kill else None
        monkeypatch.setattr(launch, "start", lambda resolved, *_: abs(runs.work(resolved.parent, sabotage)))
        return vireo("train", *runs.TINY, *words)

    return call


def test_a_job_that_is_queued_again_goes_on_in_the_folder_that_it_began_afresh(queue, tmp_path):
    assert queue(1, 0)[0] == 0
    first = only_run(tmp_path)
    assert queue(2, 0, "resume=none", kill=7)[0] == signal.SIGKILL
    assert queue(3, 0, "resume=none", "steps=8", kill=2)[0] == signal.SIGKILL  # of another job, beside
    code, said = queue(2, 1, "resume=none")
    second = first.with_name(f"{first.name}-2")
    assert code == 0 and "step 6 of 8" in (second / "train.log").read_text(), said
    assert runs.metrics(second) == runs.metrics(first)
    assert sorted(path.name for path in first.parent.iterdir()) == [first.name, f"{first.name}-2", f"{first.name}-3"]
    code, said = queue(2, 2, "resume=none")
    assert code == 0 and f"{second.name} is finished" in said


def test_a_job_that_is_queued_again_goes_on_from_its_own_newest_checkpoint(queue, tmp_path):
    assert queue(1, 0, "run=first")[0] == 0
    first, second = tmp_path / "taehv" / "first", tmp_path / "taehv" / "second"
    words = ["run=second", f"resume={first}/checkpoints/step_00000004"]
    code, said = queue(2, 0, *words, kill=7)
    assert code == signal.SIGKILL and f"{second}/checkpoints/step_00000004: step 4 of 8" in said, said
    code, said = queue(2, 1, *words)
    assert code == 0 and "step 6 of 8" in said, said
    assert runs.metrics(second) == [row for row in runs.metrics(first) if row["step"] > 4]
    # A checkpoint of the run itself, which it deletes later on: the words still stand in the job's command.
    words = ["run=second", f"resume={second}/checkpoints/step_00000004", "checkpoint.keep_last=1", "steps=9"]
    words.append("checkpoint.keep_best=false")
    assert queue(3, 0, *words, kill=8)[0] == signal.SIGKILL
    assert checkpoint.steps(second) == [6]
    code, said = queue(3, 1, *words)
    assert code == 0 and "step 6 of 9" in said, said


def test_init_from_takes_weights_only(vireo, tmp_path):
    assert vireo("train", *runs.TINY, "run=first")[0] == 0
    first = tmp_path / "taehv" / "first"
    last = {name: value for name, value in runs.metrics(first)[-1].items() if "psnr" in name}
    for source in (
        first,
        first / "checkpoints" / "step_00000008",
        first / "export",
        first / "export" / "taecvx.safetensors",
    ):
        name = f"from_{source.name}".replace(".", "_")
        assert vireo("train", *runs.TINY, f"run={name}", f"init_from={source}", "steps=1")[0] == 0
        start = runs.metrics(tmp_path / "taehv" / name)[0]
        assert start["step"] == 0 and start["validation/psnr"] == pytest.approx(last["validation/psnr"], abs=1e-6), (
            source
        )
    code, said = vireo("train", *runs.TINY, "run=x", f"init_from={tmp_path / 'nothing'}")
    assert code == 2 and "which does not exist" in said


def test_a_sweep_runs_every_job_says_what_failed_and_can_go_on(vireo, tmp_path):
    words = [*runs.TINY, "steps=2", "lr=1e-4,2e-4", "data.held_out=0.1,no_such_list.txt"]
    code, said = vireo("train", "-m", *words)
    assert code == 2 and "no_such_list.txt" in said
    (table,) = (tmp_path / "sweeps").glob("*/sweep.csv")
    rows = list(csv.DictReader(table.open()))
    assert [row["state"] for row in rows] == ["finished", "mistake", "finished", "mistake"]
    assert rows[0]["overrides"] == "lr=0.0001 data.held_out=0.1" and table.with_name("curves.png").exists()
    _, again = vireo("train", "-m", *words)
    assert again.count("is finished (step 2)") == 2


def test_a_mistake_in_any_job_is_told_before_the_first_one_starts(vireo, tmp_path):
    code, said = vireo("train", "-m", *runs.TINY, "lr=1e-4,fast")
    assert code == 2 and "is 'fast'; expected a number" in said and not (tmp_path / "taehv").exists()


def test_jobs_of_a_sweep_do_not_leak_into_one_another(vireo, tmp_path):
    assert vireo("train", "-m", *runs.TINY, "steps=2", "seed=1,2")[0] == 0
    found = {yaml.safe_load((p / "resolved.yaml").read_text())["seed"]: p for p in (tmp_path / "taehv").iterdir()}
    fresh = runs.train(tmp_path / "fresh", "steps=2", "seed=2")
    assert runs.metrics(found[2]) == runs.metrics(fresh) != runs.metrics(found[1])


def test_an_output_folder_that_cannot_be_written_is_said_before_anything_is_loaded(vireo, tmp_path):
    (tmp_path / "file").write_text("")
    code, said = vireo("train", *runs.TINY, f"paths.outputs={tmp_path / 'file'}")
    assert code == 2 and str(tmp_path / "file") in said and "paths.outputs" in said


def test_a_folder_in_use_is_refused(vireo, tmp_path):
    folder = runs.make(tmp_path, ["run=busy"])
    with open(folder / ".lock", "w") as file:
        file.write("process 1 on there")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        code, said = vireo("train", *runs.TINY, "run=busy")
        assert code == 2 and "process 1 on there" in said
        assert "running" in vireo("runs")[1]


@pytest.mark.skipif(os.name != "posix", reason="mounting is tried on Linux only")
def test_a_read_only_mount(vireo, tmp_path):
    place = tmp_path / "mount"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount")
    try:
        code, said = vireo("train", *runs.TINY, f"paths.outputs={place}")
        assert code == 2 and "Read-only file system" in said and str(place) in said
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_two_processes_equal_one_from_the_command_line(tmp_path):
    """The real thing: train.py starts two workers, which share a batch that one process sees alone."""
    world.ensure()
    words = [*runs.TINY, f"paths.outputs={tmp_path}", "steps=3", "run=two", "batch_size=1", "launcher.processes=2"]
    command = [sys.executable, str(ROOT / "train.py"), *words]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    alone = runs.train(tmp_path, "steps=3", "run=one", "batch_size=2")
    for one, two in zip(runs.metrics(alone), runs.metrics(tmp_path / "taehv" / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)  # a pixel that rounds to its other neighbour moves 8-bit measures
    state = checkpoint.latest(tmp_path / "taehv" / "two").state
    assert state["world_size"] == 2 and state["global_batch"] == 2
    # Gone on with by one process: the global batch stays, the accumulation changes.
    folder = runs.make(tmp_path, ["run=two", "batch_size=1", "steps=5"])
    assert runs.work(folder) == 0
    assert checkpoint.latest(folder).state["global_batch"] == 2
    assert "gradient_accumulation is 2 now" in (folder / "train.log").read_text()


def test_the_worker_says_what_is_wrong_and_exits_with_two(tmp_path):
    world.ensure()
    empty = tmp_path / "empty"
    empty.mkdir()
    folder = runs.make(tmp_path, [f"paths.data={empty}", "size=mini"])
    assert runs.work(folder) == 2
    assert str(empty) in (folder / "train.log").read_text() and "Traceback" not in (folder / "train.log").read_text()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_to_the_whole_process_group_saves_and_says_resumable(tmp_path, processes):
    """As a batch system or a container does it: parent, launcher, workers and loaders all get the SIGTERM."""
    world.ensure()
    words = [*runs.TINY, f"paths.outputs={tmp_path}", "run=group", "steps=5000", f"launcher.processes={processes}"]
    words += ["loader.workers=1", "checkpoint.every=null", "validation.every=null"]
    command = [sys.executable, str(ROOT / "train.py"), *words]
    output = (tmp_path / "output").open("w")
    child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=tmp_path, start_new_session=True)
    folder, began = tmp_path / "taehv" / "group", time.monotonic()
    while not (folder / "metrics.jsonl").exists() or len(runs.metrics(folder)) < 4:
        assert child.poll() is None and time.monotonic() - began < 120, (tmp_path / "output").read_text()
        time.sleep(0.2)
    os.killpg(child.pid, signal.SIGTERM)
    assert child.wait(timeout=60) == 75, (tmp_path / "output").read_text()
    found = checkpoint.latest(folder)
    assert found is not None and found.step == runs.metrics(folder)[-1]["step"] >= 3
    assert "the same command goes on from here" in (folder / "train.log").read_text()


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.full)])
def test_workers_that_are_killed_start_again_from_the_newest_checkpoint(tmp_path, disturbed, count):
    world.ensure()
    words = [*runs.TINY, "batch_size=1", f"launcher.processes={count}", f"paths.outputs={tmp_path}"]
    disturbed("die_at", 3, 7)
    done = launch.train(*words, "run=killed", "launcher.restarts=2")
    log = (done.folder / "train.log").read_text()
    assert done.exit_code == 0 and "step 3 of 8" in log and "step 6 of 8" in log, log
    calm = launch.train(*words, "run=calm")
    assert runs.metrics(done.folder) == runs.metrics(calm.folder)
    if count == 2:  # killed once more than it may start again
        disturbed("die_at", 1, 3, 7)
        lost = launch.train(*words, "run=lost", "launcher.restarts=2")
        assert lost.exit_code == 137 and checkpoint.latest(lost.folder).step == 6


def test_what_fits_into_memory_is_remembered_until_the_config_changes(vireo, tmp_path, monkeypatch):
    """Else the same command would run out again, for ever, where somebody else starts the processes."""
    fit, work = [], launch.start

    def runs_out(resolved, launcher, held):
        room = run_folder.room_file(resolved.parent)
        fit.append(faults.rows_that_fit(room))
        run_folder.write_json(room, {"rows": 1})
        return faults.EXIT_FAULT

    monkeypatch.setattr(launch, "start", runs_out)
    words = [*runs.TINY, "run=tight", "validation.at_start=false", "validation.every=null"]
    for steps in (3, 3, 2):
        assert vireo("train", *words, f"steps={steps}")[0] == faults.EXIT_FAULT
    assert fit == [None, 1, None]
    monkeypatch.setattr(launch, "start", work)
    code, said = vireo("train", *words, "steps=2")
    assert code == 0 and "1 at a time, since memory ran out with more in an earlier start" in said, said
    assert f"delete {tmp_path / 'taehv' / 'tight' / 'room.json'}" in said


def test_a_fault_starts_the_workers_again_but_a_mistake_does_not(tmp_path, monkeypatch):
    codes = iter([1, 137, 0])
    monkeypatch.setattr(launch, "_start_once", lambda *_: next(codes))
    assert launch.start(tmp_path / "resolved.yaml", {"restarts": 2, "processes": 1}, 0) == 0
    for code in (2, 75, 130):
        codes = iter([code])
        assert launch.start(tmp_path / "resolved.yaml", {"restarts": 2, "processes": 1}, 0) == code
    codes = iter([1, 1])
    assert launch.start(tmp_path / "resolved.yaml", {"restarts": 1, "processes": 1}, 0) == 1
