"""What evaluations look at is what validation scores."""

import pytest
import torch
from tests.toys import Denoise, Denoised, ToyDataset, ToyNetwork

from vireo.data.stream import Stream
from vireo.metrics import measure_video
from vireo.models.encoders import NoEncoder
from vireo.sampling.columns import columns, scored
from vireo.validation import SEED, score_clips

CPU = torch.device("cpu")


def test_the_videos_are_those_that_validation_scores():
    torch.manual_seed(0)
    network, stream = ToyNetwork().eval(), Stream(ToyDataset(side=16), SEED, shuffle=False)
    made = list(columns(network, NoEncoder(), Denoised(), stream, [4, 1], CPU))
    scores = list(score_clips(network, NoEncoder(), Denoise(), Denoised(), stream, [4, 1], 2, CPU))
    assert [set(videos) for videos in made] == [{"target", "prediction", "grey"}] * 2
    for videos, (score, _) in zip(made, scores, strict=True):
        assert videos["target"].shape == (2, 3, 16, 16)
        figures = measure_video(videos["prediction"], videos["target"])
        assert figures == pytest.approx({name: score.measures[name] for name in figures}, rel=1e-5)


def test_only_columns_of_the_targets_shape_are_compared():
    videos = {name: torch.zeros(2, 3, side, 8) for name, side in (("target", 8), ("prediction", 8), ("small", 4))}
    assert list(scored(videos)) == ["prediction"]
    assert scored({"prediction": torch.zeros(2, 3, 8, 8)}) == {}
