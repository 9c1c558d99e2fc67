"""Motion amplitude as an evaluation."""

import pytest
import torch
from tests.sampling.test_reference_evaluations import CPU, Stream
from tests.sampling.test_reference_videos import Encoder
from tests.test_optical_flow import picture

from vireo.sampling.evaluation import Evaluated
from vireo.sampling.motion import MotionAmplitude
from vireo.sampling.sampler import Sampler


class Moves(Sampler):
    """Everything moves by 3 pixels to the right, so by 1.5 in the mean of both components; the prediction stands."""

    unscored = ("inputs",)

    def __call__(self, network, encoder, batch, draws):
        frames = torch.stack([picture(64, 80, 3.0 * t, 0) for t in range(3)]) / 255
        video = frames[None, :, None].expand(1, 3, 3, 64, 80)
        still = video[:, :1]
        return {"inputs": video, "target": video, "prediction": still.expand_as(video), "picture": still}


def test_each_column_has_its_amplitude():
    rows = MotionAmplitude(clips=2)(Evaluated(None, Encoder(), Moves(), Stream(), range(3), CPU, None))
    target, prediction = rows
    assert [row["column"] for row in rows] == ["target", "prediction"] and target["clips"] == 2
    assert target["motion_amplitude"] == pytest.approx(1.5, abs=0.1) and target["score"] == 1
    assert prediction["motion_amplitude"] == pytest.approx(0, abs=0.01)
