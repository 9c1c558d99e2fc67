"""The network of FID against torch-fidelity's (0.4.0), whose numbers stand here."""

import pytest
import torch
from tests.golden.fill import fill, noise

from vireo.errors import UserError
from vireo.models import inception
from vireo.models.inception import Inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "_load", lambda network, file: None)
        state = fill(Inception("").state_dict())
    state = {name: value.abs() + 0.5 if "running_var" in name else value for name, value in state.items()}
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, file)
    return file


def test_features_and_logits(weights):
    pictures = (noise("inception", 2, 3, 37, 64) * 40 + 128).clamp(0, 255).to(torch.uint8)
    features, logits = Inception(weights)(pictures)
    some = [[0.88590688, 0.19627732, 0.0, 0.26294494, 0.0], [0.87796694, 0.19658044, 0.0, 0.26029059, 0.0]]
    others = [[-0.11938776, 0.17423029, 0.05840352], [-0.12080207, 0.17883283, 0.05680135]]
    torch.testing.assert_close(features[:, [0, 500, 1000, 1500, 2047]], torch.tensor(some), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[:, [0, 500, 1007]], torch.tensor(others), rtol=0, atol=1e-5)
    torch.testing.assert_close(features.sum(1), torch.tensor([409.62036, 409.36337]), rtol=1e-5, atol=0)


def test_other_files_are_refused(weights, tmp_path):
    with pytest.raises(UserError, match="no file .*pt_inception"):
        Inception(tmp_path / "missing.pth")
    state = torch.load(weights, weights_only=True)
    for number, change in enumerate(({"fc.weight": torch.zeros(1000, 2048)}, {"AuxLogits": torch.zeros(2)})):
        torch.save({**state, **change}, tmp_path / f"{number}.pth")
        with pytest.raises(UserError, match="another network"):
            Inception(tmp_path / f"{number}.pth")
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    assert not Inception(tmp_path / "old.pth").training
