"""What strategies refuse, and one process of those that are meant for several."""

import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from tests.strategies.ops import skip_without_ops
from tests.toys import ToyNetwork
from vireo import distributed, optimizers, processes
from vireo.errors import UserError
from vireo.muon import Muon
from vireo.strategies.replicated import Replicated
from vireo.strategies.sharded import FullySharded, units
from vireo.strategies.strategy import check_elementwise, check_processes, share
from vireo.strategies.zero import Zero


@pytest.fixture(autouse=True)
def fresh_process_state():
    yield
    distributed.close()


def groups(network):
    return [{"name": "default", "lr": 0.1, "params": list(network.named_parameters())}]


@pytest.mark.parametrize("offload", [False, True])
def test_one_process_that_shards_does_what_one_does(offload):
    results = []
    for make in (lambda: Replicated(precision="fp32"), lambda: FullySharded(offload, 1, "fp32")):
        strategy = make()
        torch.manual_seed(0)
        network = ToyNetwork()
        optimizer = optimizers.adamw(groups(network), lr=0.1)
        called = strategy.prepare(network, optimizer)
        for _ in range(3):
            strategy.backward(called(torch.ones(1, 2, 3, 8, 8)).square().mean())
            strategy.step(0.1)
        moments = strategy.gather(optimizers.moments(optimizer))
        results.append(({k: v.clone() for k, v in strategy.full_state().items()}, moments))
        parts = strategy.parts()
        back = strategy.scatter(strategy.gather(parts))
        assert all(torch.equal(back[name], parts[name]) for name in parts)
        distributed.close()
    for one, two in zip(*results, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-7)


def pad_anew(self):
    """What torch before 2.10 does with an uneven shard when it is gathered first, and later versions before."""
    local = self.sharded_param._local_tensor
    if local.size() != self.padded_sharded_param_size:
        padded = local.new_zeros(self.padded_sharded_param_size)
        padded[: len(local)] = local
        self._sharded_param_data = padded.view(-1)
        self.sharded_param._local_tensor = padded[: len(local)]


def learn_unevenly(rank: int, port: int, results) -> None:
    group = {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()})
    found = []
    for reset in (FSDPParam.reset_sharded_param, pad_anew):
        FSDPParam.reset_sharded_param = reset
        torch.manual_seed(0)
        network, strategy = nn.Linear(4, 5), FullySharded(precision="fp32")
        called = strategy.prepare(network, optimizers.adamw(groups(network), lr=0.1))
        for _ in range(2):
            strategy.backward(called(torch.ones(3, 4)).square().mean())
            strategy.step(None)
        found.append({name: value.tolist() for name, value in strategy.full_state().items()})
    results.put((rank, found))


@pytest.mark.full
def test_shards_that_torch_pads_anew_learn(tmp_path):
    # Not forked: this process may have had a group of its own, whose threads a fork would not have.
    spawn = multiprocessing.get_context("spawn")
    results, port = spawn.SimpleQueue(), processes.free_port()
    started = [spawn.Process(target=learn_unevenly, args=(rank, port, results)) for rank in range(2)]
    for one in started:
        one.start()
    for one in started:
        one.join(60)
        assert one.exitcode == 0
    now, before = dict(results.get() for _ in started)[0]
    torch.manual_seed(0)
    assert now == before and now["weight"] != nn.Linear(4, 5).weight.tolist()


def test_shards_that_have_moved_are_an_error():
    strategy, network = FullySharded(precision="fp32"), nn.Linear(4, 5)
    called = strategy.prepare(network, optimizers.adamw(groups(network), lr=0.1))
    strategy.backward(called(torch.ones(3, 4)).square().mean())
    network.weight._local_tensor = network.weight._local_tensor.clone()
    with pytest.raises(UserError, match=r"has moved FSDP's shards in the first step, weight for one"):
        strategy.step(None)


def test_units_are_the_outermost_large_members_of_lists():
    block = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(10, 10), nn.Linear(10, 10)])})
    network = nn.ModuleDict({"blocks": nn.ModuleList([block, nn.Linear(2, 2)]), "head": nn.Linear(10, 10)})
    assert units(network, 100) == [block]
    assert units(network, 1000) == []
    assert units(network, 1) == [block, network["blocks"][1]]


def test_units_of_blocks_that_are_called_in_parts():
    class InParts(ToyNetwork):
        def __init__(self):
            super().__init__()
            block = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(10, 10), nn.Linear(2, 2)])})
            self.blocks = nn.ModuleList([block, nn.Linear(10, 10)])

        def called_in_parts(self):
            return [self.blocks[0]]

    network = InParts()
    assert units(network, 100) == [network.blocks[1], network.blocks[0]["layers"][0]]


def test_an_optimizer_that_needs_whole_matrices_is_refused():
    network = ToyNetwork()
    with pytest.raises(UserError, match="Muon is not known .* use optimizer=adamw, or strategy=ddp"):
        check_elementwise(Muon(groups(network), lr=0.1))
    check_elementwise(optimizers.adamw(groups(network), lr=0.1))


def test_fp16_needs_a_loss_scale():
    with pytest.raises(UserError, match="precision=fp16 needs strategy=single or ddp"):
        FullySharded(precision="fp16")


def test_memory_is_shared_out_by_kind():
    sizes = {"trained weights": 8, "gradients": 8, "optimizer moments": 15, "buffers": 1}
    assert share(sizes, ("gradients", "moments"), 2, ()) == {**sizes, "gradients": 4, "optimizer moments": 8}
    assert share(sizes, ("moments",), 2, ("moments",)) == {"trained weights": 8, "gradients": 8, "buffers": 1}


@pytest.mark.parametrize(
    "stage, offload, copied", [(2, {}, {"copy that is updated": 4}), (2, {"offload_optimizer": {}}, {}), (3, {}, {})]
)
def test_stage_2_of_zero_updates_a_copy(monkeypatch, stage, offload, copied):
    zero = object.__new__(Zero)
    zero.config = {"zero_optimization": {"stage": stage, **offload}}
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    held = zero.on_device({"trained weights": 8, "gradients": 8})
    assert held.items() >= copied.items() and ("copy that is updated" in held) == bool(copied)


ZERO = """
from vireo import config
from vireo.strategies.zero import Zero
Zero(config.settings(["experiment=taehv", "strategy=zero2"])["strategy"]["config"])
"""


@pytest.mark.slow
def test_accelerate_s_silence_about_deepspeed_is_an_error():
    skip_without_ops()
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"}
    ended = subprocess.run([sys.executable, "-c", ZERO], env=environment, capture_output=True, text=True, timeout=120)
    assert "UserError: DeepSpeed was asked for, but accelerate chose" in ended.stderr, ended.stderr


def test_processes_that_take_no_part_are_an_error():
    check_processes(2, 2)
    with pytest.raises(UserError, match="2 processes were started .* but 1 take part"):
        check_processes(2, 1)
