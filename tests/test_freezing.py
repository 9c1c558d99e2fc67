import pytest
import torch
from torch import nn

from vireo.errors import UserError
from vireo.freezing import FreezePolicy, parameter_table


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
        self.decoder = nn.Sequential(nn.Linear(2, 2), nn.Dropout())


def test_exactly_the_matching_parameters_learn():
    network = Two()
    FreezePolicy([r"^decoder\."])(network)
    assert {n for n, p in network.named_parameters() if p.requires_grad} == {"decoder.0.weight", "decoder.0.bias"}


def test_what_learns_is_float32_and_what_is_frozen_stays_small():
    network = Two().to(torch.bfloat16)
    FreezePolicy([r"^decoder\."])(network)
    assert {p.dtype for p in network.decoder.parameters()} == {torch.float32}
    assert {p.dtype for p in network.encoder.parameters()} == {torch.bfloat16}


def test_a_pattern_without_a_match_is_an_error_that_names_what_there_is():
    with pytest.raises(UserError, match=r"'\^decodr' matches none of the network's 6 parameters.*decoder.0, encoder.0"):
        FreezePolicy(["^encoder", "^decodr"])(Two())
    with pytest.raises(UserError, match="conv_in"):
        FreezePolicy(["."], {"fast": {"match": "conv_in", "lr_scale": 2}})(Two())


def test_groups_share_out_the_trained_parameters():
    network, policy = Two(), FreezePolicy(["encoder"], {"first": {"match": r"encoder\.0", "lr_scale": 10}})
    policy(network)
    first, rest = policy.groups(network, 0.5)
    assert (first["name"], first["lr"]) == ("first", 5.0) and (rest["name"], rest["lr"]) == ("default", 0.5)
    assert [name for name, _ in first["params"]] == ["encoder.0.weight", "encoder.0.bias"]
    assert [name for name, _ in rest["params"]] == ["encoder.2.weight", "encoder.2.bias"]


def test_frozen_parts_stay_in_evaluation_mode_with_their_dropout():
    network, policy = Two(), FreezePolicy(["decoder"])
    policy(network)
    network.eval()
    policy.train_mode(network)
    assert network.decoder.training and network.decoder[1].training
    assert not network.encoder.training and not network.encoder[1].training


def test_nothing_to_train_is_an_error():
    network = Two().requires_grad_(False)
    with pytest.raises(UserError, match="nothing is left to train"):
        FreezePolicy(["."]).groups(network, 1.0)


def test_the_table_counts():
    network = Two()
    FreezePolicy(["decoder"])(network)
    lines = parameter_table(network).splitlines()
    assert lines[0].split() == ["encoder", "0", "/", "12"] and lines[-1].split() == ["total", "6", "/", "18"]
