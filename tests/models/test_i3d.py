"""The network of VFID against the one that ProPainter measures with, whose numbers stand here."""

import pytest
import torch
from tests.golden.fill import fill, noise

from vireo.errors import UserError
from vireo.models import i3d
from vireo.models.i3d import I3D


def save(file):
    """Weights by the rule of the golden numbers, in the published format."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(i3d, "_load", lambda network, file: None)
        state = fill(I3D("").state_dict())
    state = {name: value.abs() + 0.5 if "running_var" in name else value for name, value in state.items()}
    torch.save(state, file)
    return file


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save(tmp_path_factory.mktemp("i3d") / "weights.pt")


def test_features(weights):
    network = I3D(weights)
    features = network((noise("i3d", 2, 7, 3, 37, 64) * 0.2 + 0.5).clamp(0, 1))
    some = [[0.0, 0.09841561, 0.04555666, 0.11819367, 0.0], [0.0, 0.0914305, 0.04399274, 0.11653478, 0.0]]
    torch.testing.assert_close(features[:, [0, 200, 500, 800, 1023]], torch.tensor(some), rtol=0, atol=1e-6)
    torch.testing.assert_close(features.sum(1), torch.tensor([168.81076, 168.06035]), rtol=1e-5, atol=0)
    assert sum(parameter.numel() for parameter in network.parameters()) == 12_697_264


def test_other_files_are_refused(weights, tmp_path):
    with pytest.raises(UserError, match="no file .*i3d_rgb_imagenet"):
        I3D(tmp_path / "missing.pt")
    state = torch.load(weights, weights_only=True)
    changes = ({"logits.conv3d.weight": torch.zeros(51, 1024, 1, 1, 1)}, {"extra": torch.zeros(2)})
    for number, change in enumerate(changes):
        torch.save({**state, **change}, tmp_path / f"{number}.pt")
        with pytest.raises(UserError, match="another network"):
            I3D(tmp_path / f"{number}.pt")
    del state["Mixed_3b.b0.bn.bias"]
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(UserError, match="missing .'Mixed_3b.b0.bn.bias"):
        I3D(tmp_path / "less.pt")
