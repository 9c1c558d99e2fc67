"""Two processes equal one. Both ranks are started once (gloo) and do everything in turn."""

import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests import edit_runs, runs
from vireo import cache, config, distributed
from vireo.errors import UserError
from vireo.strategies.replicated import Replicated
from vireo.strategies.strategy import check_precision

TASKS = """
import pickle, sys
from pathlib import Path
import torch
from torch import nn
from tests import test_training
from tests.test_training import Large, losses, run
from tests.toys import Denoise, ToyDataset
from vireo import distributed, faults, worker
from vireo.console import set_up_logging
from vireo.randomness import order
from vireo.video_io import BadVideoError

torch.set_num_threads(1)

class PoisonedOnOneRank(Denoise):
    def __call__(self, network, batch, draws):
        objective = super().__call__(network, batch, draws)
        poison = float("nan") if draws.step == 2 and distributed.rank() == 1 else 1.0
        return objective._replace(total=objective.total * poison)

network, average, figures, progress = run(batch_size=2)
result = {"losses": losses(figures), "weights": [p.detach() for p in network.parameters()], "progress": tuple(progress)}
result["average"] = list(average.average.values())

network, _, figures, progress = run(batch_size=1, accumulation=2)
result["accumulated"] = losses(figures)

network, _, figures, progress = run(batch_size=2, loss=PoisonedOnOneRank())
result["poisoned"] = [p.detach() for p in network.parameters()]
result["skipped"] = progress.skipped

rank = distributed.rank()
large = Large(1 if rank == 1 else 2)
result["out_of_memory"] = losses(run(batch_size=2, loss=large)[2])
result["sizes"] = large.sizes

class OneFileOfEachRankIsBroken(ToyDataset):
    broken = order(0, 0, 7)[[0, 2]].tolist()  # of the first step's four samples

    def sample(self, index, draws):
        if index in self.broken:
            raise BadVideoError(f"clip {self.broken.index(index)}", "it is empty")
        return super().sample(index, draws)

test_training.ToyDataset = OneFileOfEachRankIsBroken
result["bad_files"] = run(batch_size=2, steps=1, bad_limit=2)[2][1]["bad_files"]
try:
    run(batch_size=2, steps=1, bad_limit=1)
except faults.TooManyFaults as error:
    result["too_many"] = str(error)

result["vote"] = distributed.vote(1 << rank)
result["gather"] = distributed.gather(f"rank {rank}")
result["mean"] = distributed.average({"b": float(rank), "a": 1.0})
layer = nn.Linear(2, 1, bias=False)
layer.weight.grad = torch.full((1, 2), float(rank))
distributed.average_gradients(list(layer.parameters()))
result["gradient"] = layer.weight.grad

edits = Path(sys.argv[2])
set_up_logging(edits.parent / "train.log")
result["edits"] = worker.main(edits)
pickle.dump(result, open(f"{sys.argv[1]}/rank{rank}.pkl", "wb"))
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Of the video editor's run, which ends the tasks."""
    return [*edit_runs.world(tmp_path_factory.mktemp("world")), *edit_runs.SHORT]


@pytest.fixture(scope="module")
def edits(words, tmp_path_factory):
    """The folder of that run, of which each rank has half a batch."""
    return runs.make(tmp_path_factory.mktemp("edits"), [*words, "batch_size=1"], shrunk=False)


@pytest.fixture(scope="module")
def ranks(edits, tmp_path_factory):
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[1]
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    common["PYTHONPATH"] = f"{root}:{root / 'src'}"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TASKS, str(folder), str(edits / "resolved.yaml")],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for child in children:
        output, _ = child.communicate(timeout=120)
        assert child.returncode == 0, output
    return [pickle.loads((folder / f"rank{rank}.pkl").read_bytes()) for rank in range(2)]


@pytest.fixture(scope="module")
def one():
    from tests.test_training import losses, run
    from vireo import distributed

    network, average, figures, _ = run(batch_size=4)
    distributed.close()
    return losses(figures), list(network.parameters()), list(average.average.values())


def test_two_ranks_equal_one_with_the_same_global_batch(ranks, one):
    for rank in ranks:
        torch.testing.assert_close(rank["losses"], one[0], rtol=2e-6, atol=0)
        for here, alone in zip(rank["weights"] + rank["average"], one[1] + one[2], strict=True):
            torch.testing.assert_close(here, alone.detach(), rtol=1e-5, atol=1e-7)
    assert ranks[0]["progress"] == (6, 24, 0, 0.0, 0)


def test_so_do_two_ranks_that_accumulate(ranks, one):
    torch.testing.assert_close(ranks[0]["accumulated"], one[0], rtol=2e-6, atol=0)


def test_the_ranks_are_bitwise_equal(ranks):
    for name in ("weights", "poisoned", "average"):
        assert all(torch.equal(a, b) for a, b in zip(ranks[0][name], ranks[1][name], strict=True))
    assert ranks[0]["losses"] == ranks[1]["losses"]


def test_memory_that_runs_out_on_one_rank_makes_both_take_smaller_pieces(ranks, one):
    assert ranks[0]["sizes"] == ranks[1]["sizes"] == [2, 2, 2, *[1] * 8]
    torch.testing.assert_close(ranks[0]["out_of_memory"], one[0], rtol=2e-6, atol=0)


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_both(ranks):
    assert ranks[0]["skipped"] == ranks[1]["skipped"] == 1
    assert all(torch.isfinite(p).all() for p in ranks[0]["poisoned"])


def test_files_that_cannot_be_read_are_those_of_all_ranks(ranks):
    for rank in ranks:
        assert rank["bad_files"] == 2
        assert "2 files broke while training, at most 1 may" in rank["too_many"]
        assert "clip 0: it is empty" in rank["too_many"] and "clip 1: it is empty" in rank["too_many"]


def test_two_ranks_fill_a_cache_and_train_the_video_editor_as_one_does(ranks, words, edits, tmp_path):
    assert [rank["edits"] for rank in ranks] == [0, 0]
    entries = 6 * 21 + 6 + 1  # pictures, texts and the empty text
    log = (edits / "train.log").read_text()
    assert f"{entries} of {entries} entries are missing" in log and f"cache: {entries} entries added" in log
    alone = runs.train(tmp_path, *words, shrunk=False)
    ours, theirs = (
        {path.name: path.read_bytes() for path in cache.entries(folder.parents[1] / "cache")}
        for folder in (edits, alone)
    )
    assert len(ours) == entries and ours.keys() == theirs.keys()
    for one, two in zip(runs.metrics(alone), runs.metrics(edits), strict=True):
        assert one == pytest.approx(two, rel=1e-4)  # a pixel that rounds to its other neighbour moves 8-bit measures
        assert {n: v for n, v in one.items() if "loss" in n} == pytest.approx(
            {n: v for n, v in two.items() if "loss" in n}, rel=1e-5
        )


def test_votes_and_means(ranks):
    for rank in ranks:
        assert rank["vote"] == 0b11
        assert rank["gather"] == ["rank 0", "rank 1"]
        assert rank["mean"] == {"a": 1.0, "b": 0.5}
        assert torch.equal(rank["gradient"], torch.full((1, 2), 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_not_trained(dtype):
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, dtype=dtype))
    with pytest.raises(UserError, match=f"2 trained parameters are not float32, for instance 1.weight .{dtype}"):
        check_precision(network)
    network[1].requires_grad_(False)
    check_precision(network)


def test_a_strategy_checks_what_it_trains():
    strategy = Replicated(precision="fp32")
    try:
        with pytest.raises(UserError, match="set precision=bf16 or fp16"):
            strategy.prepare(torch.nn.Linear(2, 2).half(), None)
    finally:
        distributed.close()


def test_a_process_that_cannot_leave_its_group_after_a_fault_ends_all_the_same(tmp_path):
    """As NCCL does it where other ranks never come to the collective that it is in."""

    def arm():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        dist.destroy_process_group = lambda: time.sleep(60)
        distributed.PATIENCE = 0.5
        config.load_resolved = lambda path: 1 / 0

    folder = runs.make(tmp_path, [])
    assert runs.work(folder, arm, timeout=30) == 1
    assert "ZeroDivisionError" in (folder / "train.log").read_text()


def test_nccl_is_aborted_after_a_fault_and_only_then(monkeypatch):
    called = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(dist, "destroy_process_group", lambda: called.append("destroyed"))
    monkeypatch.setattr(distributed.distributed_c10d, "_abort_process_group", lambda: called.append("aborted"))
    assert distributed.close() and distributed.close(after_fault=True)
    assert called == ["destroyed", "aborted"]
