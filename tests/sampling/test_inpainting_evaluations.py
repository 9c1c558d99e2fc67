"""Whole sequences and means of samples, with networks whose figures are known."""

import pytest
import torch
from tests.sampling.test_inpainting import Encoder, Oracle, sampler

from vireo.data.masked_clips import MaskedClips
from vireo.data.stream import Stream
from vireo.errors import UserError
from vireo.mini import masked_clips
from vireo.sampling.columns import Remembered
from vireo.sampling.evaluation import Evaluated
from vireo.sampling.inpainting_evaluations import InpaintedSequences, SampleMean
from vireo.sampling.reconstruction import Reconstruction

CPU = torch.device("cpu")


class Encoding(Encoder):
    def __call__(self, batch, draws):
        return super().__call__(batch)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    with pytest.MonkeyPatch.context() as patch:
        for name, count in {"NUM_TRAINING": 1, "NUM_HELD_OUT": 2, "NUM_YOUTUBE": 0, "NUM_SHORT": 0}.items():
            patch.setattr(masked_clips, name, count)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        masked_clips.write(folder)
        data = MaskedClips(4, 64, 64, davis=folder / "DAVIS", ytvos=None, split="validation", annotations=False)
    return Stream(data, "validation", shuffle=False, keep_fields=True)


def test_whole_sequences_are_filled_by_windows(stream, tmp_path):
    network, filler = Oracle(), sampler(num_inference_steps=2, window=10, overlap=2)
    evaluation = InpaintedSequences()
    rows = evaluation(Evaluated(network, Encoding(), Remembered(filler, tmp_path), stream, [0, 1], CPU, tmp_path))
    assert {noisy.shape[2] for noisy, _ in network.calls} == {10}, "26 frames are three windows"
    by_column = {row["column"]: row for row in rows}
    assert set(by_column) == {"prediction", "target", "vae", "composite", "ring mean", "harmonic"}
    assert {(row["sequences"], row["frames"]) for row in rows} == {(2, 52)}
    assert by_column["target"]["psnr"] is None and by_column["target"]["warp_error_lk"] > 0
    assert by_column["harmonic"]["hole_psnr"] > by_column["prediction"]["hole_psnr"], "this one leaves the hole black"
    assert by_column["vae"]["ssim_65"] > by_column["prediction"]["ssim_65"]
    (row,) = {len(row) for row in rows}
    short = InpaintedSequences(clips=1, max_frames=5)(
        Evaluated(network, Encoding(), filler, stream, [0, 1], CPU, tmp_path)
    )
    assert {(row["sequences"], row["frames"]) for row in short} == {(1, 5)} and {len(row) for row in short} == {row}


def test_the_mean_of_samples_errs_less_than_a_sample(stream, tmp_path):
    """A network whose samples are the truth and an error of its own: of eight the mean has an eighth of the square."""

    class Guessing(Oracle):
        def __call__(self, noisy, timesteps, **conditions):
            if timesteps[0] == 999:
                self.clean = conditions["masked_latents"] + 0.1 * noisy
            return super().__call__(noisy, timesteps, **conditions)

    filler = sampler(num_inference_steps=2, noise="independent")
    rows = SampleMean(samples=8)(Evaluated(Guessing(), Encoding(), filler, stream, [0, 1], CPU, tmp_path))
    by_line = {row["line"]: row for row in rows}
    assert {"prediction", "mean of 8", "vae", "ring mean", "harmonic"} <= set(by_line)
    assert by_line["mean of 8"]["background_psnr"] > by_line["prediction"]["background_psnr"] + 1
    assert set(by_line["vae"]) == {"line", "hole_psnr", "background_psnr"}


@pytest.mark.parametrize("evaluation", [InpaintedSequences(), SampleMean()])
def test_another_sampler_is_refused(evaluation, stream, tmp_path):
    with pytest.raises(UserError, match="got Reconstruction"):
        evaluation(Evaluated(Oracle(), Encoding(), Reconstruction(), stream, [0], CPU, tmp_path))


def test_a_mean_needs_two():
    with pytest.raises(UserError, match="samples=1"):
        SampleMean(samples=1)
