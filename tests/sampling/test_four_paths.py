"""The columns and figures of a tiny autoencoder beside its teacher."""

import pytest
import torch
from torch import nn

from vireo.errors import UserError
from vireo.models.taehv import TAEHV, TAEHVOutput
from vireo.models.teachers import Teacher
from vireo.randomness import Draws
from vireo.sampling.four_paths import FourPaths

DRAWS = Draws("validation", [0, 1])
COLUMNS = ["target", "teacher", "prediction", "own latents", "tiny to teacher"]


class Wrapped(nn.Module):
    """As a data-parallel wrapper: nothing but forward."""

    def __init__(self, network):
        super().__init__()
        self.inner = network

    def forward(self, *arguments, **options):
        return self.inner(*arguments, **options)


def network():
    torch.manual_seed(0)
    return TAEHV("taew2_1", encoder_width=8, decoder_widths=(16, 8, 8, 8), num_memblocks=1)


def batch(teacher, frames=9):
    generator = torch.Generator().manual_seed(0)
    data = {"frames": torch.randint(0, 256, (2, frames, 3, 16, 24), generator=generator, dtype=torch.uint8)}
    return teacher(data, DRAWS)


@pytest.mark.parametrize("mode", ["parallel", "chunked"])
@torch.no_grad()
def test_each_encoder_before_each_decoder(teacher, mode):
    tiny, data = network(), batch(teacher)
    columns = FourPaths(mode, chunk=3)(Wrapped(tiny), teacher, data, DRAWS)
    pixels, given = data["frames"].float() / 255, data["target_latents"]
    own = tiny.encode(pixels)
    expected = [pixels, teacher.decode(given), tiny.decode(given), tiny.decode(own), teacher.decode(own)]
    assert list(columns) == COLUMNS
    for name, video in zip(COLUMNS, expected, strict=True):
        assert columns[name].shape == (2, 9, 3, 16, 24) and columns[name].dtype == torch.float32
        assert columns[name].min() >= 0 and columns[name].max() <= 1
        torch.testing.assert_close(columns[name], video, atol=1e-5, rtol=1e-5, msg=name)
    assert len({float(video.sum()) for video in columns.values()}) == 5, "no two paths are the same"


def test_own_latents_are_rescaled_for_the_teachers_decoder(teacher, folder):
    class Perfect(nn.Module):
        """Its latents are the teacher's."""

        def forward(self, frames=None, latents=None, **options):
            return TAEHVOutput(data["target_latents"], torch.zeros(2, 9, 3, 16, 24))

    for space in ("raw", "diffusion"):
        encoder = Teacher("wan", folder, space, dtype="fp32")
        data = batch(encoder)
        columns = FourPaths()(Perfect(), encoder, data, DRAWS)
        assert torch.equal(columns["tiny to teacher"], columns["teacher"])


def test_only_the_frames_that_come_back(teacher):
    data = batch(teacher, frames=12)
    sampler = FourPaths(variant="taew2_1")
    columns = {**sampler(network(), teacher, data, DRAWS), **sampler.baselines(data)}
    assert {tuple(video.shape) for video in columns.values()} == {(2, 9, 3, 16, 24)}
    assert torch.equal(columns["target"], data["frames"][:, :9].float() / 255)


def test_without_the_teachers_decoder(teacher, monkeypatch):
    data = batch(teacher)
    monkeypatch.setattr(teacher, "decode", lambda latents: pytest.fail("the teacher was asked to decode"))
    assert list(FourPaths(teacher_decoder=False)(network(), teacher, data, DRAWS)) == [COLUMNS[i] for i in (0, 2, 3)]


def test_figures_of_the_latents(teacher):
    tiny, data = network(), batch(teacher)
    figures = FourPaths().measure(Wrapped(tiny), teacher, data, {})
    own = tiny.encode(data["frames"].float() / 255).detach()
    error = (own - data["target_latents"]).double().square().mean((1, 2, 3, 4))
    torch.testing.assert_close(figures["latent_mse"], error, rtol=1e-5, atol=0)
    assert all(value.shape == (2,) and not value.requires_grad for value in figures.values())
    expected = ["latent_mse", "latent_r2", "latent_correlation", "latent_mean_shift", "latent_std_ratio"]
    assert list(figures) == expected
    perfect = FourPaths().measure(tiny, teacher, {**data, "target_latents": own}, {})
    assert perfect["latent_correlation"].tolist() == pytest.approx([1, 1])


def test_a_batch_without_a_teacher(teacher):
    data = {"frames": batch(teacher)["frames"]}
    for compare in (FourPaths(), FourPaths().measure):
        with pytest.raises(UserError, match="no target_latents: .*model=taehv_cogvideox"):
            compare(network(), teacher, data, DRAWS)
