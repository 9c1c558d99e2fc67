"""The inpainting sampler: columns, figures, noise, priors and long clips, with a network that knows the truth."""

import pytest
import torch

from vireo.diffusion.noise_schedule import NoiseSchedule
from vireo.errors import UserError
from vireo.metrics import decibels
from vireo.mini import masked_clips, scenes
from vireo.pixels import to_pixels
from vireo.randomness import Draws
from vireo.sampling.inpainting import InpaintingSampler

INPUTS = ["masked_latents", "keep", "prompt_embeds"]


class Encoder:
    """Latents are the frames themselves, every second pixel, as numbers around 0."""

    scaling_factor = 0.5

    def encode(self, output, frames):
        mean = 2 * (to_pixels(frames, low=-1.0)[..., ::2, ::2])
        return torch.cat([mean, torch.zeros_like(mean)], dim=2)

    def __call__(self, batch):
        latents = (
            self.encode("", batch[name]).chunk(2, 2)[0].transpose(1, 2) / 2 for name in ("frames", "masked_frames")
        )
        latents, masked = latents
        given = {"latents": latents, "masked_latents": masked, "frame_moments": self.encode("", batch["frames"])}
        keep = 1 - batch["hole"][..., ::2, ::2].float().transpose(1, 2)
        return {**batch, **given, "keep": keep, "prompt_embeds": torch.zeros(len(masked), 2, 3)}

    def decode(self, latents):
        pixels = latents.transpose(1, 2) / 2 + 0.5
        return pixels.repeat_interleave(2, -1).repeat_interleave(2, -2)


class Oracle:
    """Predicts the noise towards what is known of a clip, or towards `clean`; remembers what it was called with."""

    def __init__(self, clean=None):
        self.schedule, self.clean, self.calls = NoiseSchedule(), clean, []

    def __call__(self, noisy, timesteps, masked_latents, keep, prompt_embeds):
        self.calls.append((noisy.clone(), timesteps.clone()))
        clean = masked_latents if self.clean is None else self.clean
        left = self.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1, 1)
        return (noisy - left.sqrt() * clean) / (1 - left).sqrt()


@pytest.fixture(scope="module")
def batch():
    pictures = torch.stack(
        [
            torch.from_numpy(scenes.render(masked_clips.drifting(seed), masked_clips.times(26)[:4])).permute(0, 3, 1, 2)
            for seed in (0, 1)
        ]
    )
    hole = torch.zeros(2, 4, 1, 64, 64, dtype=torch.uint8)
    hole[0, :, :, 20:40, 10:30] = 1
    hole[1, :, :, 40:50, 30:60] = 1
    return Encoder()({"frames": pictures, "masked_frames": pictures * (1 - hole), "hole": hole})


def sampler(**changes):
    return InpaintingSampler(NoiseSchedule(), INPUTS, **{"num_inference_steps": 6, "noise": "shared", **changes})


def test_columns_stand_in_the_order_that_people_compare(batch):
    columns = sampler()(Oracle(), Encoder(), batch, Draws(0, [0, 1]))
    assert list(columns) == ["input", "mask", "prediction", "target", "vae", "composite"]
    assert {column.shape for column in columns.values()} == {(2, 4, 3, 64, 64)}
    target, hole = to_pixels(batch["frames"], low=0.0), batch["hole"].float()
    assert torch.equal(columns["target"], target) and torch.equal(columns["mask"], hole.expand_as(target))
    assert torch.equal(columns["input"], target * (1 - hole))
    halved = target[..., ::2, ::2].repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(columns["vae"], halved)
    torch.testing.assert_close(columns["prediction"][:, :, :, :20], halved[:, :, :, :20], atol=2e-3, rtol=0)
    inside = hole.bool().expand_as(target)
    assert torch.equal(columns["composite"][inside], columns["prediction"][inside])
    assert torch.equal(columns["composite"][:, :, :, :8], target[:, :, :, :8])


def test_hole_and_background_are_measured_apart(batch):
    made = sampler()
    network = Oracle(batch["latents"])
    columns = {**made(network, Encoder(), batch, Draws(0, [0, 1])), **made.baselines(batch)}
    figures = made.measure(network, Encoder(), batch, columns)
    target = columns["target"]
    hole = batch["hole"].bool().expand_as(target)
    for row in (0, 1):
        error = (columns["ring mean"][row] - target[row])[hole[row]].double()
        assert float(figures["ring mean/hole_psnr"][row]) == pytest.approx(
            float(decibels(error.square().mean())), abs=0.05
        )
    assert (figures["ring mean/background_psnr"] == 100).all(), "nothing but the hole was filled"
    assert (figures["harmonic/hole_psnr"] > figures["ring mean/hole_psnr"]).all()
    torch.testing.assert_close(figures["hole_psnr"], figures["vae/hole_psnr"], atol=0.3, rtol=0)
    torch.testing.assert_close(figures["hole_fraction"], torch.tensor([400 / 4096, 300 / 4096]).double())
    assert (figures["target/warp_error_lk"] < figures["ring mean/warp_error_lk"]).all()
    assert "input/hole_psnr" not in figures and "mask/warp_error_lk" not in figures


def test_single_frames_have_no_motion_and_an_empty_hole_no_error(batch):
    one = {name: value[:, :1] for name, value in batch.items() if name in ("frames", "masked_frames", "hole")}
    one = Encoder()({**one, "masked_frames": one["frames"], "hole": 0 * one["hole"]})
    made = sampler()
    columns = made(Oracle(), Encoder(), one, Draws(0, [0, 1]))
    figures = made.measure(Oracle(), Encoder(), one, columns)
    assert not [name for name in figures if "warp" in name]
    assert (figures["hole_psnr"] == 100).all() and (figures["background_psnr"] < 50).all()


@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_one_noise_for_all_frames_or_one_for_each(batch, noise):
    network = Oracle()
    sampler(noise=noise).sample(network, batch, Draws(0, [0, 1]))
    start, timesteps = network.calls[0]
    frames = start.unbind(2)
    assert torch.equal(frames[0], frames[3]) == (noise == "shared")
    assert not torch.equal(start[0], start[1]) and timesteps.tolist() == [999, 999]
    assert len(network.calls) == 6
    other = Oracle()
    sampler(noise=noise).sample(other, batch, Draws(0, [0, 1]), number=3)
    assert not torch.equal(other.calls[0][0], start), "each sample of a clip has noise of its own"


def test_a_prior_is_noised_to_where_the_last_steps_begin(batch):
    prior = torch.full_like(batch["latents"], 0.7)
    network, made = Oracle(), sampler(noise="independent", prior_strength=0.5)
    made.sample(network, batch, Draws(0, [0, 1]), prior=prior)
    whole = Oracle()
    made.sample(whole, batch, Draws(0, [0, 1]))
    assert [t[0].item() for _, t in network.calls] == [t[0].item() for _, t in whole.calls][3:]
    start, timesteps = network.calls[0]
    noise = whole.calls[0][0]
    torch.testing.assert_close(start, NoiseSchedule().add_noise(prior, noise, timesteps))
    given = {**batch, "prior_frames": batch["frames"]}
    kept = made.predict(Oracle(prior), Encoder(), given, Draws(0, [0, 1]))
    torch.testing.assert_close(kept, Encoder().decode(prior), atol=2e-3, rtol=0)


def test_long_clips_are_made_of_windows(batch):
    long = {name: torch.cat([batch[name]] * 3, dim=1) for name in ("frames", "masked_frames", "hole")}
    long = Encoder()(long)
    network = Oracle()
    made = sampler(window=5, overlap=2, noise="independent").sample(network, long, Draws(0, [0, 1]))
    assert made.shape[2] == 12 and {noisy.shape[2] for noisy, _ in network.calls} == {5}
    torch.testing.assert_close(made, long["masked_latents"], atol=5e-3, rtol=0)


def test_videos_without_truth_are_shown_and_not_measured(batch):
    made, given = sampler(), {**batch, "has_truth": [False, False]}
    columns = made(Oracle(), Encoder(), given, Draws(0, [0, 1]))
    assert list(columns) == ["input", "prediction", "composite"] and made.result in columns
    assert made.measure(Oracle(), Encoder(), given, columns) == {}


@pytest.mark.parametrize(
    "wrong", [{"num_inference_steps": 0}, {"noise": "both"}, {"prior_strength": 0.0}, {"window": 0}, {"overlap": -1}]
)
def test_settings_without_sense_are_refused(wrong):
    with pytest.raises(UserError):
        sampler(**wrong)
