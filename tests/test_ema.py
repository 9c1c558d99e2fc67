import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from vireo.ema import ExponentialMovingAverage

TRUE, FALSE = torch.tensor(True), torch.tensor(False)


def of(network, decay):
    return ExponentialMovingAverage(dict(network.named_parameters()), decay)


def test_it_follows_the_formula():
    network = nn.Linear(2, 1)
    average = of(network, 0.5)
    expected = network.weight.detach().clone()
    for step in range(8):
        with torch.no_grad():
            network.weight += 1
        average.update(step, TRUE)
        decay = min(0.5, (1 + step) / (10 + step)) if step else 0
        expected = decay * expected + (1 - decay) * network.weight.detach()
    torch.testing.assert_close(average.average["weight"], expected)


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_it_is_diffusers_average(decay):
    network = nn.Linear(3, 2)
    reference, average = EMAModel(network.parameters(), decay=decay), of(network, decay)
    for step in range(12):
        with torch.no_grad():
            network.weight += torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        reference.step(network.parameters())
        average.update(step, TRUE)
    torch.testing.assert_close(average.average["weight"], reference.shadow_params[0])


def test_a_step_that_was_turned_away_leaves_no_trace():
    network = nn.Linear(2, 1)
    average = of(network, 0.9)
    before = average.average["weight"].clone()
    with torch.no_grad():
        network.weight += 1
    average.update(0, FALSE)
    assert torch.equal(average.average["weight"], before)


def test_own_weights_come_back_even_after_an_error():
    network = nn.Linear(2, 1)
    average = of(network, 0.9)
    own = network.weight.detach().clone()
    average.average["weight"] += 3
    with pytest.raises(RuntimeError), average.applied():
        assert torch.equal(network.weight, own + 3)
        raise RuntimeError
    assert torch.equal(network.weight, own)


def test_zero_is_off():
    network = nn.Linear(2, 1)
    off = of(network, 0)
    assert not off and off.average == {}
    with pytest.raises(ValueError, match="ema.decay"):
        of(network, 1.0)


def test_a_foreign_average_is_refused():
    with pytest.raises(ValueError, match="other parameters"):
        of(nn.Linear(2, 1), 0.9).load({"weight": torch.zeros(1, 2)})
