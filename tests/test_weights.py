from pathlib import Path

import pytest
import torch
from torch import nn

from vireo.checkpoint import Checkpoint
from vireo.errors import UserError
from vireo.weights import check_frozen, frozen_digest, load_trained, trained_names, trained_state


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.BatchNorm1d(2).requires_grad_(False)
        self.learns = nn.BatchNorm1d(2)


def test_buffers_count_where_a_parameter_of_their_module_learns():
    assert trained_names(Net()) == {
        f"learns.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }


def test_round_trip_leaves_frozen_parts_alone():
    one, two = Net(), Net()
    with torch.no_grad():
        for value in (*one.parameters(), one.learns.running_mean):
            value += 1
    load_trained(two, trained_state(one, one.state_dict()), Path("here"))
    assert torch.equal(two.learns.weight, one.learns.weight) and torch.equal(
        two.learns.running_mean, one.learns.running_mean
    )
    assert not torch.equal(two.frozen.weight, one.frozen.weight)


def test_frozen_weights_are_known_by_name_and_value():
    one, two = Net(), Net()
    assert frozen_digest(one) == frozen_digest(two)
    with torch.no_grad():
        two.learns.weight += 1
    assert frozen_digest(one) == frozen_digest(two)
    with torch.no_grad():
        two.frozen.bias += 1
    assert frozen_digest(one) != frozen_digest(two)
    found = Checkpoint(Path("step_5"), 5, {"frozen": frozen_digest(one)})
    check_frozen(found, frozen_digest(one))
    with pytest.raises(UserError, match="step_5 was trained beside other frozen weights"):
        check_frozen(found, frozen_digest(two))


def test_differences_are_named_with_both_shapes():
    stored = trained_state(Net(), Net().state_dict())
    stored["learns.weight"] = torch.zeros(3)
    stored["other"] = stored.pop("learns.bias")
    with pytest.raises(UserError) as error:
        load_trained(Net(), stored, Path("step_5"))
    for part in ("step_5", "learns.bias: missing", "other: not trained", "learns.weight: (3,) stored, (2,) here"):
        assert part in str(error.value)
