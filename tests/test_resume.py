"""Resume equals no interruption, bit for bit: SIGKILL in a step, and the same command again."""

import json
import os
import random
import signal
import threading
import time

import pytest
import torch

from tests import runs
from vireo import checkpoint, drill, processes
from vireo.mini import world


@pytest.fixture(scope="module", autouse=True)
def mini_world():
    world.ensure()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Metrics and last checkpoint of runs that nothing happened to, by accumulation."""
    root = tmp_path_factory.mktemp("undisturbed")
    return {a: runs.train(root, f"gradient_accumulation={a}") for a in (1, 2)}


def same(one, two):
    assert runs.metrics(one) == runs.metrics(two)
    a, b = checkpoint.latest(one), checkpoint.latest(two)
    assert a is not None and b is not None and a.step == b.step and a.state == b.state
    for part in ("network", "optimizer", "ema"):
        first, second = a.tensors(part), b.tensors(part)
        assert first.keys() == second.keys() and first
        assert all(torch.equal(first[name], second[name]) for name in first)


full = pytest.mark.full
WORKERS_AND_ACCUMULATION = [
    (0, 0, 1),
    (2, 2, 2),
    (2, 0, 1),
    (0, 1, 2),
    *(pytest.param(*case, marks=full) for case in ((0, 0, 2), (2, 2, 1), (2, 0, 2), (0, 1, 1))),
]


@pytest.mark.parametrize(("before", "after", "accumulation"), WORKERS_AND_ACCUMULATION)
def test_killed_in_a_step(tmp_path, undisturbed, accumulation, before, after):
    generator = random.Random(100 * accumulation + 10 * before + after)
    words = [f"gradient_accumulation={accumulation}"]
    folder = runs.make(tmp_path, [*words, f"loader.workers={before}"])
    for step in sorted(generator.sample(range(8), 2)):
        assert runs.work(folder, runs.die_at(step, generator.randrange(accumulation))) == -signal.SIGKILL
    assert runs.make(tmp_path, [*words, f"loader.workers={after}"]) == folder
    assert runs.work(folder) == 0
    same(folder, undisturbed[accumulation])


def test_killed_in_a_save(tmp_path, undisturbed):
    def arm():
        def deadly(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)

        checkpoint._flush = deadly  # every file is written, nothing is renamed yet

    folder = runs.make(tmp_path, [])
    assert runs.work(folder, arm) == -signal.SIGKILL
    assert checkpoint.steps(folder) == []
    assert [p.name for p in (folder / "checkpoints").iterdir()] != []
    assert runs.work(folder) == 0
    assert all(not path.name.startswith(".") for path in (folder / "checkpoints").iterdir())
    same(folder, undisturbed[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_asked_to_stop(tmp_path, undisturbed, number):
    def arm():
        from vireo import training

        original = training.seed_default

        def ask(seed, purpose, position):
            if position[0] == 4:
                os.kill(os.getpid(), number)
            original(seed, purpose, position)

        training.seed_default = ask

    folder = runs.make(tmp_path, [])
    assert runs.work(folder, arm) == 75
    assert checkpoint.steps(folder)[-1] == 5 and not (folder / "finished").exists()
    assert runs.work(folder) == 0
    assert runs.metrics(folder) == runs.metrics(undisturbed[1])


def stop_before_the_validation():
    """Sabotage: SIGTERM in the step after which held-out clips are due."""
    drill._at_step(3, drill._signal(signal.SIGTERM))


def stop_in_the_validation():
    """Sabotage: SIGTERM while they are scored."""
    from vireo import worker

    validate = worker.validate

    def asked(*args, folder, **options):
        if folder.name == "step_00000004":
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(*args, folder=folder, **options)

    worker.validate = asked


@pytest.mark.parametrize("arm", [stop_before_the_validation, stop_in_the_validation])
def test_a_stop_does_not_wait_for_a_validation_which_is_made_when_the_run_goes_on(tmp_path, undisturbed, arm):
    folder = runs.make(tmp_path, [])
    assert runs.work(folder, arm) == 75
    assert checkpoint.steps(folder) == [3, 4]
    assert [row["step"] for row in runs.metrics(folder) if "validation/loss" in row] == [0]
    assert "step 4: a checkpoint was saved in " in (folder / "train.log").read_text()
    assert runs.work(folder, runs.die_at(5)) == -signal.SIGKILL  # it is not made twice, either
    assert runs.work(folder) == 0
    same(folder, undisturbed[1])
    assert (folder / "export" / "best").is_dir()


def test_the_best_validation_begins_anew_with_other_clips(tmp_path):
    assert runs.work(runs.make(tmp_path, ["run=one", "steps=4"])) == 0
    folder = runs.make(tmp_path, ["run=one", "steps=8", "validation.clips=1"])
    (folder / "finished").unlink()
    assert runs.work(folder) == 0
    said = (folder / "train.log").read_text()
    assert "the best validation so far, of step 4, judged otherwise (clips 2 before, 1 now" in said
    assert "held-out loss on fixed draws" not in said.partition("judged otherwise")[2], "one validation of these clips"
    best = json.loads((folder / "finished").read_text())["best"]
    assert (best["step"], best["clips"], best["metric"]) == (8, 1, "psnr")
    assert [row["held_out_clips"] for row in runs.metrics(folder) if "validation/loss" in row] == [2, 2, 1]


def test_a_second_ctrl_c_during_the_save_ends_at_once(tmp_path, undisturbed):
    def arm():
        from vireo import training

        original, flush, asked = training.seed_default, checkpoint._flush, []

        def ask(seed, purpose, position):
            if position[0] == 4 and not asked:
                asked.append(os.kill(os.getpid(), signal.SIGINT))
            original(seed, purpose, position)

        def slow(path):
            if asked:
                time.sleep(1.2)  # what comes sooner is the same Ctrl-C, heard twice
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            flush(path)

        training.seed_default, checkpoint._flush = ask, slow

    folder = runs.make(tmp_path, [])
    assert runs.work(folder, arm, timeout=50) == 130
    assert checkpoint.steps(folder) == [3, 4], "no half of step 5 is visible"
    assert runs.work(folder) == 0
    same(folder, undisturbed[1])


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, undisturbed):
    folder = runs.make(tmp_path, [])
    assert runs.work(folder, runs.die_at(7)) == -signal.SIGKILL
    assert checkpoint.steps(folder) == [3, 4, 6]
    file = checkpoint.folder_of(folder, 6) / "network.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert runs.work(folder) == 0
    assert "step_00000006" in (folder / "train.log").read_text()
    same(folder, undisturbed[1])


def test_where_every_checkpoint_is_damaged_it_begins_anew_and_keeps_what_was(tmp_path, undisturbed):
    folder = runs.make(tmp_path, ["checkpoint.keep_last=1", "checkpoint.keep_best=false"])
    assert runs.work(folder, runs.die_at(7)) == -signal.SIGKILL
    assert checkpoint.steps(folder) == [6]
    (checkpoint.folder_of(folder, 6) / "manifest.json").unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    assert runs.work(folder) == 0
    assert (folder / "metrics.jsonl.damaged").read_bytes() == before
    assert (folder / "checkpoints" / "step_00000006.damaged").is_dir()
    assert runs.metrics(folder) == runs.metrics(undisturbed[1]) and checkpoint.latest(folder).step == 8


def test_writing_in_the_background_changes_nothing(tmp_path, undisturbed):
    folder = runs.train(tmp_path, "checkpoint.background=true")
    same(folder, undisturbed[1])


def fail_to_save(steps):
    """Sabotage: checkpoints of these steps do not fit on the disk."""

    def arm():
        original = checkpoint.save

        def full(folder, step, parts, state):
            if step in steps:
                raise OSError(28, "No space left on device")
            return original(folder, step, parts, state)

        checkpoint.save = full

    return arm


def test_a_failed_save_in_the_background_is_told_and_changes_nothing(tmp_path, undisturbed):
    folder = runs.make(tmp_path, ["checkpoint.background=true"])
    assert runs.work(folder, fail_to_save([3, 6])) == 0
    log = (folder / "train.log").read_text()
    assert log.count("the checkpoint could not be saved: OSError: [Errno 28] No space left") == 2
    same(folder, undisturbed[1])


def test_a_final_save_that_fails_is_no_success_and_the_last_good_one_stays(tmp_path, undisturbed):
    """Retention may not make room for what then cannot be written."""
    for background in ("true", "false"):
        words = [f"checkpoint.background={background}", "checkpoint.keep_last=1", "checkpoint.keep_best=false"]
        folder = runs.make(tmp_path, [*words, f"run=full_{background}"])
        assert runs.work(folder, fail_to_save(range(4, 9))) == 1
        assert "the final checkpoint could not be saved" in (folder / "train.log").read_text()
        assert checkpoint.latest(folder).step == 3 and not (folder / "finished").exists()
        assert runs.work(folder) == 0
        assert runs.metrics(folder) == runs.metrics(undisturbed[1])


def test_max_hours_ends_a_run_as_a_signal_does(tmp_path, undisturbed, monkeypatch):
    monkeypatch.setenv(processes.STARTED, str(time.time() - 3600))  # this is a restart, after a fault
    folder = runs.make(tmp_path, ["max_hours=1.9"])

    def an_hour_passes():
        clock = time.time
        drill._at_step(1, lambda: setattr(time, "time", lambda: clock() + 3600))

    assert runs.work(folder, an_hour_passes) == 75
    assert checkpoint.latest(folder).step == 2, "the step in which all ranks hear of it"
    assert runs.make(tmp_path, []) == folder, "it is no other run"
    assert runs.work(folder) == 0
    same(folder, undisturbed[1])


def free(size):
    """Sabotage: so many bytes are free on every disk."""

    def arm():
        import shutil

        shutil.disk_usage = lambda path: shutil._ntuple_diskusage(2**40, 2**40 - size, size)

    return arm


def test_space_for_a_checkpoint_is_looked_for_before_the_first_step(tmp_path):
    folder = runs.make(tmp_path, ["validation.at_start=false", "steps=1", "checkpoint.keep_last=1000"])
    assert runs.work(folder, free(2**20)) == 2
    log = (folder / "train.log").read_text()
    assert "1.0 MiB free, but a checkpoint of this run takes" in log and "paths.outputs=…" in log
    assert checkpoint.steps(folder) == [] and not (folder / "metrics.jsonl").exists()
    assert runs.work(folder, free(checkpoint.MARGIN + 2**20)) == 0
    assert "checkpoint.keep_last=1000 and one being written take" in (folder / "train.log").read_text()


def test_a_disk_that_is_full_for_a_while(tmp_path, undisturbed):
    folder = runs.make(tmp_path, [])
    assert runs.work(folder, fail_to_save([3])) == 0
    log = (folder / "train.log").read_text()
    assert "step 3: the checkpoint could not be saved: OSError: [Errno 28] No space left" in log
    assert runs.metrics(folder) == runs.metrics(undisturbed[1])


def test_a_disk_that_stays_full_ends_the_run_and_leaves_nothing_to_resume(tmp_path):
    def arm():
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        import safetensors.torch

        safetensors.torch.save_file = full

    folder = runs.make(tmp_path, ["faults.max_consecutive_save_failures=2"])
    assert runs.work(folder, arm) == 1
    assert checkpoint.latest(folder) is None and list((folder / "checkpoints").glob("*")) == []


def test_a_run_at_its_last_step_ends_cleanly(tmp_path):
    folder = runs.train(tmp_path, "steps=2", "validation.at_start=false")
    before = runs.metrics(folder)
    assert runs.work(folder) == 0
    assert runs.metrics(folder) == before


def die_after(seconds, step):
    """Sabotage: SIGKILL so long after a step has begun, wherever the process is then."""

    def arm():
        from vireo import training

        original = training.seed_default

        def timed(seed, purpose, position):
            if position[:2] == (step, 0):
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
            original(seed, purpose, position)

        training.seed_default = timed

    return arm


def die_in_a_save(call):
    """Sabotage: SIGKILL at one of the calls by which a checkpoint is written, published, and old ones are deleted."""

    def arm():
        calls = []

        def counted(original):
            def deadly(*args, **kwargs):
                calls.append(original)
                if len(calls) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return deadly

        checkpoint._flush, checkpoint._identity = counted(checkpoint._flush), counted(checkpoint._identity)
        checkpoint.retain, checkpoint.shutil.rmtree = counted(checkpoint.retain), counted(checkpoint.shutil.rmtree)

    return arm


@pytest.mark.full
def test_killed_at_twenty_random_instants(tmp_path):
    """Half of them while a checkpoint is written, published, or an old one deleted."""
    words = ["steps=80", "checkpoint.every=1", "checkpoint.keep_last=1", "validation.every=null", "loader.workers=1"]
    calm = runs.train(tmp_path / "calm", *words)
    folder, generator, instants = runs.make(tmp_path, words), random.Random(0), []
    for kill in range(20):
        reached = max(checkpoint.steps(folder), default=0)
        if kill % 2:
            instants.append(("save", reached, generator.randrange(1, 40)))
            sabotage = die_in_a_save(instants[-1][-1])
        else:
            step = reached + generator.randrange(4)
            instants.append(("step", step, generator.uniform(0, 0.3)))
            sabotage = die_after(instants[-1][-1], step)
        assert runs.work(folder, sabotage) == -signal.SIGKILL, instants
    assert runs.work(folder) == 0, instants
    same(folder, calm)
