"""What the autoencoder's objective compares and what learns from it."""

import pytest
import torch
from torch import nn

from vireo.errors import UserError
from vireo.losses.autoencoder import Autoencoder
from vireo.models.taehv import TAEHV, TAEHVOutput
from vireo.pixels import to_pixels
from vireo.randomness import Draws

DRAWS = Draws(0, [3, 8])


class Recorded(nn.Module):
    """Gives fixed latents and frames and remembers how it was called."""

    def __init__(self, latents, frames):
        super().__init__()
        self.output = TAEHVOutput(latents, frames)

    def forward(self, frames, latents, *, use_given, detach):
        self.frames, self.given, self.use_given, self.detach = frames, latents, use_given, detach
        return self.output


def recorded(frames=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 2, 1, 1, generator=generator).to(dtype)
    return Recorded(latents, (2 * torch.rand(2, frames, 3, 8, 8, generator=generator) - 0.5).to(dtype))


def batch(frames=8, teacher=True, side=8):
    generator = torch.Generator().manual_seed(1)
    found = {"frames": torch.randint(0, 256, (2, frames, 3, side, side), generator=generator, dtype=torch.uint8)}
    if teacher:
        found["target_latents"] = torch.randn(2, 16, -(-frames // 4), side // 8, side // 8, generator=generator)
    return found


def test_terms_weights_and_metrics():
    network, data = recorded(), batch()
    total, metrics = Autoencoder(reconstruction=2.0, latent=3.0, l1=0.5)(network, data, DRAWS)
    target = data["frames"][:, :5].double() / 255  # the first frames, not the last
    error = network.output.frames.double() - target
    reconstruction, l1 = error.square().mean(), error.abs().mean()
    latent = (network.output.latents.double() - data["target_latents"]).square().mean()
    psnr = -10 * (network.output.frames.clamp(0, 1) - target).square().mean((1, 2, 3, 4)).log10().mean()
    expected = {"reconstruction": reconstruction, "l1": l1, "latent": latent, "psnr": psnr}
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-5)
    assert total.item() == pytest.approx((2 * reconstruction + 3 * latent + 0.5 * l1).item(), rel=1e-5)
    assert torch.equal(network.frames, to_pixels(data["frames"], low=0.0))


def test_without_a_teacher_own_latents_are_decoded_and_keep_their_gradient():
    network = recorded()
    _, metrics = Autoencoder()(network, batch(teacher=False), DRAWS)
    assert network.given is None
    assert network.detach is False
    assert metrics.keys() == {"reconstruction", "psnr"}


@pytest.mark.parametrize("decoder_input", ["teacher", "mixed"])
def test_a_teachers_latents_must_be_there_if_they_are_asked_for(decoder_input):
    with pytest.raises(UserError, match=f"decoder_input={decoder_input} .* no target_latents"):
        Autoencoder(decoder_input=decoder_input)(recorded(), batch(teacher=False), DRAWS)


@pytest.mark.parametrize(("decoder_input", "given"), [(None, True), ("teacher", True), ("own", False)])
def test_whose_latents_are_decoded(decoder_input, given):
    network = recorded()
    Autoencoder(decoder_input=decoder_input)(network, batch(), DRAWS)
    assert network.use_given.tolist() == [given, given]
    assert network.detach is True
    Autoencoder(decoder_input=decoder_input, detach=False)(network, batch(), DRAWS)
    assert network.detach is False


def test_mixed_is_drawn_for_each_sample():
    network, loss, used = recorded(), Autoencoder(decoder_input="mixed", mix_probability=0.25), []
    for position in range(0, 400, 2):
        loss(network, batch(), Draws(0, [position, position + 1]))
        used += network.use_given.tolist()
    assert used.count(True) / len(used) == pytest.approx(0.75, abs=0.07)
    loss(network, batch(), Draws(0, [0, 1]))
    assert network.use_given.tolist() == used[:2]


def test_half_precision_outputs_are_compared_in_float32():
    network, data = recorded(dtype=torch.bfloat16), batch()
    total, metrics = Autoencoder()(network, data, DRAWS)
    assert total.dtype == metrics["latent"].dtype == torch.float32
    exact = (network.output.frames.double() - data["frames"][:, :5].double() / 255).square().mean()
    assert metrics["reconstruction"].item() == pytest.approx(exact.item(), rel=1e-5)


def test_trains_under_autocast():
    network = small()
    with torch.autocast("cpu", torch.bfloat16):
        objective = Autoencoder(decoder_input="mixed")(network, batch(side=16), DRAWS)
    objective.total.backward()
    exact = Autoencoder(decoder_input="mixed")(network, batch(side=16), DRAWS)
    assert objective.total.dtype == torch.float32
    assert objective.total.item() == pytest.approx(exact.total.item(), rel=0.02)
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


@pytest.mark.parametrize("arguments", [{"decoder_input": "students"}, {"mix_probability": 1.5}])
def test_impossible_settings(arguments):
    with pytest.raises(UserError, match="decoder_input must be"):
        Autoencoder(**arguments)


def small():
    torch.manual_seed(0)
    return TAEHV("taecvx", encoder_width=8, decoder_widths=(16, 8, 8, 8), num_memblocks=1)


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("decoder_input", [None, "own"])
def test_everything_learns(teacher, decoder_input):
    network = small()
    objective = Autoencoder(decoder_input=decoder_input)(network, batch(teacher=teacher, side=16), DRAWS)
    objective.total.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert all(not value.requires_grad for value in objective.metrics.values())


def test_reconstruction_does_not_move_the_encoder_behind_a_teacher():
    network = small()
    loss = Autoencoder(latent=0.0, decoder_input="mixed")
    loss(network, batch(side=16), DRAWS).total.backward()
    assert all(not parameter.grad.any() for parameter in network.encoder.parameters())
    assert any(parameter.grad.any() for parameter in network.decoder.parameters())


def test_a_teacher_of_another_shape_is_refused():
    data = {**batch(side=16), "target_latents": torch.zeros(2, 16, 3, 2, 2)}
    for decoder_input in ("teacher", "own", "mixed"):
        with pytest.raises(UserError, match="another variant or length of clip"):
            Autoencoder(decoder_input=decoder_input)(small(), data, DRAWS)


def test_it_learns_a_clip():
    network, loss = small(), Autoencoder()
    ramp = torch.linspace(0, 255, 16).view(1, 1, 1, 1, 16).expand(2, 9, 3, 16, 16).to(torch.uint8)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    history = []
    for _ in range(60):
        total, metrics = loss(network, {"frames": ramp}, DRAWS)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(metrics["psnr"].item())
    assert history[-1] > history[0] + 3
