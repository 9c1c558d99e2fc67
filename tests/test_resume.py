"""Resume equals no interruption, bit for bit: SIGKILL in a step, and the same command again."""

import os
import random
import signal

import pytest
import torch

from tests import runs
from vireo import checkpoint
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


def test_writing_in_the_background_changes_nothing(tmp_path, undisturbed):
    folder = runs.train(tmp_path, "checkpoint.background=true")
    same(folder, undisturbed[1])


def test_a_disk_that_is_full_for_a_while(tmp_path, undisturbed):
    def arm():
        original, failures = checkpoint.save, [0]

        def full(folder, step, parts, state):
            if step == 3:
                failures[0] += 1
                raise OSError(28, "No space left on device")
            return original(folder, step, parts, state)

        checkpoint.save = full

    folder = runs.make(tmp_path, [])
    assert runs.work(folder, arm) == 0
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
