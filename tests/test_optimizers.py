import pytest
import torch
from torch import nn

from vireo.errors import UserError
from vireo.optimizers import adamw, load_moments, moments


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
