"""PSNR by the place of a frame."""

import pytest
import torch
from PIL import Image
from tests.toys import ToyDataset

from vireo.data.stream import Stream
from vireo.models.encoders import NoEncoder
from vireo.sampling.evaluation import Evaluated
from vireo.sampling.frame_phases import FramePhases
from vireo.sampling.sampler import Sampler

CPU = torch.device("cpu")
ERRORS = {0: 0.5, 1: 0.1, 2: 0.2, 3: 0.1, 4: 0.05, 5: 0.1, 6: 0.2, 7: 0.1, 8: 0.05}  # by frame


class Faulty(Sampler):
    """A sampler that errs by ERRORS; its baseline is everywhere 0.25 off."""

    def __call__(self, network, encoder, batch, draws):
        target = torch.zeros(1, batch["frames"].shape[1], 3, 8, 8)
        errors = torch.tensor([ERRORS[t] for t in range(target.shape[1])])
        return {"target": target, "prediction": target + errors.view(1, -1, 1, 1, 1), "picture": target[:, :1]}

    def baselines(self, batch):
        return {"constant": torch.full((1, batch["frames"].shape[1], 3, 8, 8), 0.25)}


def rows(tmp_path, frames, period=4):
    stream = Stream(ToyDataset(num_frames=frames), "validation", shuffle=False)
    return FramePhases(period)(Evaluated(torch.nn.Identity(), NoEncoder(), Faulty(), stream, range(3), CPU, tmp_path))


def test_phases_after_the_first_frame(tmp_path):
    prediction, constant = rows(tmp_path, 9)
    assert prediction == {
        "column": "prediction",
        "first frame": pytest.approx(6, abs=0.1),
        "t mod 4 = 0": pytest.approx(26, abs=0.2),
        "t mod 4 = 1": pytest.approx(20, abs=0.2),
        "t mod 4 = 2": pytest.approx(14, abs=0.2),
        "t mod 4 = 3": pytest.approx(20, abs=0.2),
        "spread": pytest.approx(12, abs=0.3),
    }
    assert constant["column"] == "constant" and constant["spread"] == 0
    with Image.open(tmp_path / "psnr_by_frame.png") as picture:
        assert picture.width > 400


def test_phases_that_a_short_clip_lacks(tmp_path):
    prediction = rows(tmp_path, 3)[0]
    assert prediction["t mod 4 = 0"] is None and prediction["t mod 4 = 3"] is None
    assert prediction["spread"] == pytest.approx(6, abs=0.2)
    alone = rows(tmp_path, 1)[0]
    assert alone["spread"] is None and alone["first frame"] == pytest.approx(6, abs=0.1)


def test_the_period_of_other_latents(tmp_path):
    assert [name for name in rows(tmp_path, 9, period=8)[0] if name.startswith("t mod")][-1] == "t mod 8 = 7"
