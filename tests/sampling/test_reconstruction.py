"""The columns of an autoencoder's validation."""

import pytest
import torch

from vireo.models.taehv import TAEHV
from vireo.randomness import Draws
from vireo.sampling.reconstruction import Reconstruction

DRAWS = Draws("validation", [0, 1])


def network():
    torch.manual_seed(0)
    made = TAEHV("taecvx", encoder_width=8, decoder_widths=(16, 8, 8, 8), num_memblocks=1)
    with torch.no_grad():
        made.decoder[-1].weight.mul_(100)  # so that some pixels leave [0, 1]
    return made


def batch(frames=12):
    generator = torch.Generator().manual_seed(0)
    return {"frames": torch.randint(0, 256, (2, frames, 3, 16, 24), generator=generator, dtype=torch.uint8)}


@pytest.mark.parametrize("mode", ["parallel", "sequential", "chunked"])
def test_the_first_frames_beside_the_clamped_reconstruction(mode):
    autoencoder, data = network(), batch()
    columns = Reconstruction(mode, chunk=3)(autoencoder, None, data, DRAWS)
    pixels = data["frames"].float() / 255
    assert list(columns) == ["target", "prediction"]
    torch.testing.assert_close(columns["target"], pixels[:, :9])
    unclamped = autoencoder(pixels).frames.detach()
    assert unclamped.min() < 0 and unclamped.max() > 1
    torch.testing.assert_close(columns["prediction"], unclamped.clamp(0, 1), atol=1e-5, rtol=1e-5)
    assert not columns["prediction"].requires_grad


def test_baselines_have_the_targets_layout():
    sampler, data = Reconstruction(variant="taecvx"), batch()
    baselines = sampler.baselines(data)
    shapes = {tuple(video.shape) for video in (*baselines.values(), sampler(network(), None, data, DRAWS)["target"])}
    assert shapes == {(2, 9, 3, 16, 24)}
    assert Reconstruction().baselines(data)["mean colour"].shape == (2, 12, 3, 16, 24)


def test_baselines():
    frames = torch.zeros(2, 5, 3, 16, 24, dtype=torch.uint8)
    frames[0, :, 0] = 255
    frames[1, ..., 12:] = 255
    baselines = Reconstruction().baselines({"frames": frames})
    assert torch.equal(baselines["mean colour"][0, 0, :, 0, 0], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(baselines["mean colour"][1], torch.full((5, 3, 16, 24), 0.5))
    torch.testing.assert_close(baselines["8x down and up"][0], frames[0].float() / 255)
    edge = baselines["8x down and up"][1, 0, 0, 0]  # cells of mean 0, 0.5 and 1, joined by straight lines
    assert edge[0] == 0 and edge[-1] == 1
    assert torch.all(edge.diff() >= 0) and edge.diff().max() < 0.1
