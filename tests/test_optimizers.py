import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from vireo import config
from vireo.errors import UserError
from vireo.muon import Muon
from vireo.optimizers import adamw, load_moments, moment_bytes, moments


def make(network):
    return adamw([{"name": "default", "lr": 0.1, "params": list(network.named_parameters())}], lr=0.1)


def step(network, optimizer):
    optimizer.zero_grad()
    network(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()


def test_moments_by_name_restore_the_optimizer_exactly():
    torch.manual_seed(0)
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    first = make(one)
    step(one, first)
    two.load_state_dict(one.state_dict())
    second = make(two)
    load_moments(second, moments(first))
    for _ in range(3):
        step(one, first)
        step(two, second)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_names_are_readable():
    network = nn.Linear(3, 2)
    optimizer = make(network)
    step(network, optimizer)
    assert set(moments(optimizer)) == {
        f"{n}|{k}" for n in ("weight", "bias") for k in ("step", "exp_avg", "exp_avg_sq")
    }


def test_foreign_moments_are_refused():
    with pytest.raises(UserError, match="not trained now.*other"):
        load_moments(make(nn.Linear(3, 2)), {"other|exp_avg": torch.zeros(1)})
    with pytest.raises(UserError, match=r"exp_avg of weight has shape \(1,\)"):
        load_moments(make(nn.Linear(3, 2)), {"weight|exp_avg": torch.zeros(1)})


def test_offloaded_moments_make_the_same_updates_and_survive_a_restart():
    def offloaded(network):
        return adamw([{"name": "default", "params": list(network.named_parameters())}], lr=0.1, moments="offloaded")

    torch.manual_seed(0)
    one, two, three = (nn.Linear(3, 2) for _ in range(3))
    two.load_state_dict(one.state_dict())
    first, second = make(one), offloaded(two)
    for _ in range(3):
        step(one, first)
        step(two, second)
    three.load_state_dict(two.state_dict())
    third = offloaded(three)
    load_moments(third, moments(second))
    for _ in range(2):
        step(one, first)
        step(two, second)
        step(three, third)
    for a, b, c in zip(one.parameters(), two.parameters(), three.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)
    assert moment_bytes(second) == 0 < moment_bytes(first)


class AdamW8bit(torch.optim.Optimizer):
    """Keeps state as bitsandbytes does: 8-bit moments, their tables and scales, and the step as a plain number."""

    def __init__(self, groups, **defaults):
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    eight = parameter.numel() >= 4096
                    state |= {"step": 0, "state1": torch.zeros_like(parameter, dtype=torch.uint8 if eight else None)}
                    state["state2"] = state["state1"].clone()
                    if eight:
                        for number in (1, 2):
                            state[f"qmap{number}"] = torch.linspace(-1, 1, 256)
                            state[f"absmax{number}"] = torch.zeros(-(-parameter.numel() // 256))
                assert isinstance(state["step"], int)
                state["step"] += 1
                state["state1"] += 1
                parameter -= group["lr"] * state["state1"].float() / state["step"]


@pytest.fixture
def eight_bit(monkeypatch):
    """`adamw` with moments="8bit" as on a machine with a GPU and bitsandbytes."""
    package, module = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    module.AdamW8bit = AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return lambda network: adamw(
        [{"name": "default", "params": list(network.named_parameters())}], lr=0.1, moments="8bit"
    )


def test_eight_bit_moments_survive_a_restart(eight_bit):
    one = nn.Linear(64, 64)
    first = eight_bit(one)
    assert first.defaults == {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    first.step()
    stored = {name: value.clone() for name, value in moments(first).items()}
    assert {n.split("|")[1] for n in stored} == {"step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"}
    two = nn.Linear(64, 64)
    two.load_state_dict(one.state_dict())
    second = eight_bit(two)
    load_moments(second, stored)
    first.step()
    second.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    with pytest.raises(UserError, match="state1 of weight has shape"):
        load_moments(second, {"weight|state1": torch.zeros(3, dtype=torch.uint8)})


def test_eight_bits_need_a_gpu_and_a_package(monkeypatch):
    with pytest.raises(UserError, match="needs a GPU.*optimizer.moments=fp32"):
        adamw([], lr=0.1, moments="8bit")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        adamw([], lr=0.1, moments="8bit")
    with pytest.raises(UserError, match="optimizer.moments is '4bit', expected fp32, 8bit or offloaded"):
        adamw([], lr=0.1, moments="4bit")


@pytest.mark.parametrize("kind", ["fp32", "8bit", "offloaded"])
def test_how_moments_are_kept_leaves_a_recipes_numbers(kind, eight_bit):
    """CogVideoX's betas and decay are not AdamW's usual ones."""
    words = ["experiment=cogvideox_t2v_lora", "size=mini", f"optimizer.moments={kind}"]
    group = {"name": "default", "params": list(nn.Linear(3, 2).named_parameters())}
    made = config.instantiate(config.settings(words)["optimizer"])([group], lr=2e-5)
    expected = {"lr": 2e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-4}
    assert {name: made.defaults[name] for name in expected} == expected


@pytest.mark.parametrize("kind", ["adamw", "muon", "eight_bit"])
def test_the_size_of_moments_is_known_before_the_first_step(kind, eight_bit):
    network = nn.Linear(64, 64)
    muon = lambda network: Muon([{"name": "all", "params": list(network.named_parameters())}], lr=0.1)  # noqa: E731
    optimizer = {"adamw": make, "muon": muon, "eight_bit": eight_bit}[kind](network)
    expected = moment_bytes(optimizer)
    network(torch.ones(1, 64)).square().sum().backward()
    optimizer.step()
    held = [value for name, value in moments(optimizer).items() if value.ndim and "qmap" not in name]
    assert expected == sum(value.numel() * value.element_size() for value in held)
