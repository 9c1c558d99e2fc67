"""LPIPS against torchmetrics', and as an evaluation."""

import pytest
import torch
from tests.golden.fill import fill, noise
from tests.toys import Denoised, ToyDataset, ToyNetwork

from vireo.data.stream import Stream
from vireo.errors import UserError
from vireo.models.encoders import NoEncoder
from vireo.sampling import perceptual
from vireo.sampling.evaluation import Evaluated
from vireo.sampling.perceptual import Lpips, PerceptualDistance

CPU = torch.device("cpu")
SHAPES = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}  # of torchvision's


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    """A file as torchvision's, with weights that depend only on their names."""
    state = {}
    for layer, (out, into, side) in SHAPES.items():
        state |= {f"features.{layer}.weight": torch.empty(out, into, side, side)}
        state |= {f"features.{layer}.bias": torch.empty(out)}
    file = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save({**fill(state), "classifier.1.weight": torch.zeros(1)}, file)
    return file


# Of torchmetrics 1.9's _LPIPS(net="alex") on torchvision 0.28's AlexNet with the same weights and inputs.
@pytest.mark.parametrize(
    "shape, far, near",
    [
        ((3, 3, 64, 48), [0.088189, 0.086457, 0.092560], [0.001788, 0.001576, 0.001725]),
        ((1, 3, 31, 31), [0.073459], [0.001507]),
    ],
)
def test_lpips_is_that_of_torchmetrics(alexnet, shape, far, near):
    a, b = (noise(name, *shape).mul(0.2).add(0.5).clamp(0, 1) for name in ("prediction", "target"))
    lpips = Lpips(alexnet)
    assert lpips(a, b).tolist() == pytest.approx(far, abs=2e-6)
    assert lpips(b + 0.1 * (a - b), b).tolist() == pytest.approx(near, abs=2e-6)
    assert lpips(b, b).tolist() == [0] * shape[0]


def test_small_pictures_and_wrong_files_are_refused(alexnet, tmp_path):
    with pytest.raises(UserError, match="31x31"):
        Lpips(alexnet)(torch.zeros(1, 3, 30, 64), torch.zeros(1, 3, 30, 64))
    with pytest.raises(UserError, match="no file .*gone.pth; torchvision's alexnet-owt"):
        PerceptualDistance(str(tmp_path / "gone.pth"))
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match="vgg.pth holds no AlexNet"):
        Lpips(tmp_path / "vgg.pth")


def evaluate(measured, tmp_path):
    torch.manual_seed(0)
    stream = Stream(ToyDataset(side=32), "validation", shuffle=False)
    return measured(Evaluated(ToyNetwork().eval(), NoEncoder(), Denoised(), stream, range(3), CPU, tmp_path))


def test_every_column_has_a_row(alexnet, tmp_path):
    rows = evaluate(PerceptualDistance(str(alexnet)), tmp_path)
    assert [row["column"] for row in rows] == ["prediction", "grey"]
    assert all(row["lpips"] > 0 and row["note"] == "" for row in rows)


def test_without_weights_it_says_so_and_makes_no_videos(tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual, "columns", lambda *_: pytest.fail("the sampler was called"))
    [row] = evaluate(PerceptualDistance(), tmp_path)
    assert row["lpips"] is None and "not measured" in row["note"] and "alexnet-owt-7be5be79.pth" in row["note"]
