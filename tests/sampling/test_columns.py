"""What evaluations look at is what validation scores."""

from pathlib import Path

import pytest
import torch
from tests.toys import Denoise, Denoised, ToyDataset, ToyNetwork

from vireo.data.stream import Stream
from vireo.metrics import measure_video
from vireo.models.encoders import NoEncoder
from vireo.pixels import as_8_bit
from vireo.sampling.columns import Remembered, columns, scored
from vireo.sampling.evaluation import Evaluated
from vireo.validation import SEED, score_clips

CPU = torch.device("cpu")


def test_the_videos_are_those_that_validation_scores():
    torch.manual_seed(0)
    network, stream = ToyNetwork().eval(), Stream(ToyDataset(side=16), SEED, shuffle=False)
    made = list(columns(Evaluated(network, NoEncoder(), Denoised(), stream, [4, 1], CPU, Path())))
    scores = list(score_clips(network, NoEncoder(), Denoise(), Denoised(), stream, [4, 1], 2, CPU))
    assert [set(videos) for _, videos in made] == [{"target", "prediction", "grey"}] * 2
    for (_, videos), (score, _) in zip(made, scores, strict=True):
        assert videos["target"].shape == (2, 3, 16, 16)
        figures = measure_video(videos["prediction"], videos["target"])
        assert figures == pytest.approx({name: score.measures[name] for name in figures}, rel=1e-5)


def test_videos_are_made_once(tmp_path):
    torch.manual_seed(0)
    network, stream = ToyNetwork().eval(), Stream(ToyDataset(side=16), SEED, shuffle=False)
    calls = []

    class Counting(Denoised):
        def __call__(self, network, encoder, batch, draws):
            calls.append(draws.positions)
            return super().__call__(network, encoder, batch, draws)

    class Encoder(NoEncoder):
        def condition(self, batch, draws):
            assert draws.positions in ([0, 1, 2], [3]), "what is remembered needs no encoding"
            return batch

    remembered = Remembered(Counting(), tmp_path)
    scores = score_clips(network, NoEncoder(), Denoise(), remembered, stream, [0, 1, 2], 3, CPU)
    plain = score_clips(network, NoEncoder(), Denoise(), Denoised(), stream, [0, 1, 2], 3, CPU)
    assert [score for score, _ in scores] == [score for score, _ in plain]
    for _ in range(2):
        made = list(columns(Evaluated(network, Encoder(), remembered, stream, [2, 3, 0], CPU, Path())))
        expected = list(columns(Evaluated(network, NoEncoder(), Denoised(), stream, [2, 3, 0], CPU, Path())))
        for (_, videos), (_, fresh) in zip(made, expected, strict=True):
            assert list(videos) == list(fresh) == ["target", "prediction", "grey"]
            for name in videos:
                torch.testing.assert_close(as_8_bit(videos[name]), as_8_bit(fresh[name]), rtol=0, atol=1e-7)
    assert calls == [[0, 1, 2], [3]]


def test_only_columns_of_the_targets_shape_are_compared():
    videos = {name: torch.zeros(2, 3, side, 8) for name, side in (("target", 8), ("prediction", 8), ("small", 4))}
    assert list(scored(videos)) == ["prediction"]
    assert scored({"prediction": torch.zeros(2, 3, 8, 8)}) == {}


def test_all_that_a_sampler_offers_passes_through(tmp_path):
    class Everything(Denoised):
        unscored = ("difference",)

        def videos(self, network, encoder, batch, draws):
            return {"longer": batch}

    remembered = Remembered(Everything(), tmp_path)
    assert remembered.unscored == ("difference",) and remembered.videos(None, None, {"x": 1}, None) == {
        "longer": {"x": 1}
    }
    frames = {"frames": torch.zeros(1, 2, 3, 8, 8)}
    assert remembered.baselines(frames).keys() == {"grey"} == Everything().baselines(frames).keys()
    assert remembered.measure(None, None, frames, {})["brightness"].tolist() == [0]
