import torch
from torch import nn

from vireo.muon import Muon, orthogonalize
from vireo.optimizers import load_moments, moments


def named(network):
    return [{"name": "default", "lr": 0.02, "params": list(network.named_parameters())}]


def test_singular_values_come_near_one():
    generator = torch.Generator().manual_seed(0)
    for shape in ((8, 30), (30, 8), (5, 5)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=generator)))
        assert values.min() > 0.5 and values.max() < 1.3


def test_biases_and_chosen_layers_go_to_adamw_which_is_torchs():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    one = Muon(named(ours), lr=0.02, adamw=["weight"], adamw_lr_scale=0.5, weight_decay=0.1)
    two = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(5):
        for network, optimizer in ((ours, one), (theirs, two)):
            optimizer.zero_grad()
            network(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_it_learns_and_its_state_survives_by_name():
    torch.manual_seed(0)
    x = torch.randn(64, 3, 6, 6)
    target = torch.nn.functional.avg_pool2d(x, 3, 1, 1)

    def train(network, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (network(x) - target).square().mean()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
    optimizer = Muon(named(network), lr=0.02)
    first = train(network, optimizer, 1)
    assert train(network, optimizer, 40) < 0.5 * first
    copy = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
    copy.load_state_dict(network.state_dict())
    second = Muon(named(copy), lr=0.02)
    load_moments(second, {name: value.clone() for name, value in moments(optimizer).items()})
    assert train(network, optimizer, 3) == train(copy, second, 3)
