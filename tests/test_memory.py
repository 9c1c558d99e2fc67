"""The estimate against what is really held, and against the sizes of Stable Diffusion 1.5."""

import psutil
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from vireo import memory
from vireo.ema import ExponentialMovingAverage
from vireo.models.video_ip2p import widen


def estimate(network, average=(), frozen=(), loss_state=(), half_precision=False):
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    return memory.estimate(network, optimizer, dict(average), dict(frozen), dict(loss_state), half_precision)


@pytest.mark.parametrize(("frames", "parameters"), [(1, 859_532_484), (20, 859_751_364)])
def test_stable_diffusion_trained_with_adam_takes_sixteen_bytes_a_parameter(frames, parameters):
    with torch.device("meta"):
        unet = UNet2DConditionModel(in_channels=8, cross_attention_dim=768, attention_head_dim=8)
        assert sum(p.numel() for p in unet.parameters()) == 859_532_484
        widen(unet, frames)
    found = estimate(unet)
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert found == {
        "trained weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer moments": 8 * parameters,
    }
    assert sum(found.values()) / 1e9 == pytest.approx(13.8, abs=0.05)
    average = {name: p for name, p in unet.named_parameters()}
    assert estimate(unet, average)["average of the weights"] / 1e9 == pytest.approx(3.4, abs=0.05)


def test_it_is_what_is_held():
    network = nn.Sequential(nn.Linear(100, 50), nn.BatchNorm1d(50), nn.Linear(50, 10))
    network[2].requires_grad_(False)
    average = ExponentialMovingAverage({n: p for n, p in network.named_parameters() if p.requires_grad}, 0.9)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad])
    replay = {"replay": torch.zeros(7, dtype=torch.uint8)}
    found = memory.estimate(network, optimizer, average.average, {"VAE": 1000}, replay, half_precision=True)
    network(torch.ones(2, 100)).square().sum().backward()
    optimizer.step()
    trained = 100 * 50 + 50 + 100
    state = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert found == {
        "trained weights": 4 * trained,
        "frozen weights": 4 * 510,
        "buffers": 4 * 100 + 8,
        "gradients": sum(p.grad.numel() * 4 for p in network.parameters() if p.requires_grad),
        "optimizer moments": sum(value.numel() * 4 for value in state),
        "average of the weights": 4 * trained,
        "autocast's copy": 2 * (5000 + 500),
        "loss's own": 7,
        "frozen VAE": 1000,
    }


def test_the_table_is_for_people():
    text = memory.table({"trained weights": 3 << 30, "frozen VAE": 5 << 20}, capacity=80 << 30)
    assert text.splitlines() == [
        "trained weights             3.00 GiB",
        "frozen VAE                   5.0 MiB",
        "total before activations    3.00 GiB",
        "of the device's            80.00 GiB",
    ]


def test_more_frames_cost_little():
    with torch.device("meta"):
        one = UNet2DConditionModel(
            in_channels=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )
    before = estimate(one)["trained weights"]
    widen(one, 20)
    assert estimate(one)["trained weights"] - before == 4 * 19 * 4 * 32 * 9


def test_memory_that_grows_is_told_once_for_each_time_that_it_has(monkeypatch, caplog):
    """At first it may grow as it likes; then by half and by a GiB."""
    used = dict.fromkeys(range(0, 21, 10), memory.GIB) | {30: 2.4 * memory.GIB, 40: 2.6 * memory.GIB}
    used |= {50: 2.7 * memory.GIB, 60: 4 * memory.GIB, 70: 5.5 * memory.GIB}
    creep, told = memory.Creep(), []
    for step, size in used.items():
        monkeypatch.setattr(memory, "_resident", lambda size=size: int(size))
        figures = creep.look(step, torch.device("cpu"))
        assert figures["host_memory"] == pytest.approx(size / memory.GIB)
        told += [step] * len(caplog.records)
        caplog.clear()
    assert told == [40, 70]


def test_so_is_that_of_the_device_and_not_for_its_peak(monkeypatch, caplog):
    used = {0: 1, 20: 4, 30: 6.9, 40: 7.1, 50: 7.2, 60: 12}  # in GiB, by step
    creep, told = memory.Creep(), []
    monkeypatch.setattr(memory, "_resident", lambda: memory.GIB)
    for step, size in used.items():
        here = {"device_allocated": int(size * memory.GIB), "device_reserved": 0, "device_memory": 80 * memory.GIB}
        monkeypatch.setattr(memory, "_on_gpu", lambda device, here=here: here)
        figures = creep.look(step, torch.device("cuda"))
        assert figures["device_allocated"] == pytest.approx(size) and figures["device_memory"] == 80
        told += [step] * len(caplog.records)
        assert all("tensors on the device take" in record.getMessage() for record in caplog.records)
        caplog.clear()
    assert told == [40, 60]


def test_memory_in_use_is_that_of_all_processes():
    assert memory._resident() > psutil.Process().memory_info().rss * 0.9
