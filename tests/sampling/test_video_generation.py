"""The sampler beside diffusers' pipelines, on the same tiny networks and numbers."""

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tests.cogvideox import CASES, DESCRIBED, save_transformer
from tests.golden.fill import fill, noise

from vireo.diffusion.noise_schedule import saved_in
from vireo.errors import UserError
from vireo.models.cogvideox import CogVideoX
from vireo.models.encoders import Encoder
from vireo.pixels import to_pixels
from vireo.randomness import Draws
from vireo.sampling.video_generation import VideoSampler

STEPS = 3


class Stub(Encoder):
    """A pipeline's VAE, and texts that are numbers already."""

    def __init__(self, vae, patch_size_t):
        self.vae, self.patch_size_t = vae, patch_size_t or 1

    def latent_shape(self, num_frames, height, width):
        t = (num_frames - 1) // 4 + 1
        return 4, t + t % self.patch_size_t, height // 8, width // 8

    def clean_image_latents(self, batch, draws):
        posterior = self.vae.encode(to_pixels(batch["image"])[:, :, None]).latent_dist
        latents = posterior.mean + posterior.std * draws.normal("image_posterior", *posterior.mean.shape[1:])
        factor = self.vae.config.scaling_factor
        return latents / factor if self.vae.config.invert_scale_latents else latents * factor

    def decode(self, latents):
        padding = (latents.shape[2] - 1) % self.patch_size_t
        pixels = self.vae.decode(latents[:, :, padding:] / self.vae.config.scaling_factor).sample
        return (pixels.transpose(1, 2) / 2 + 0.5).clamp(0, 1)


class Recorded(Draws):
    """Draws whose posterior is the mean, as the pipeline's encoder gives it here."""

    def normal(self, purpose, *shape):
        drawn = super().normal(purpose, *shape)
        return torch.zeros_like(drawn) if purpose == "image_posterior" else drawn


@pytest.fixture(scope="module", params=["t2v_2b", "t2v_5b_off", "t2v_15", "i2v_5b", "i2v_15"])
def models(request, tmp_path_factory):
    """The case, a network of ours, and a pipeline of diffusers, both of the same folder."""
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    save_transformer(request.param, folder / "transformer")
    diffusers.CogVideoXDDIMScheduler(**case["scheduler"]).save_pretrained(folder / "scheduler")
    vae = {"scaling_factor": case["vae_scaling_factor"], "invert_scale_latents": case["vae_invert_scale_latents"]}
    vae = fill(diffusers.AutoencoderKLCogVideoX(**DESCRIBED["vae_config"], **vae)).eval()
    network = CogVideoX(str(folder), "fp32").eval()
    kind = diffusers.CogVideoXImageToVideoPipeline if case["images"] else diffusers.CogVideoXPipeline
    pipeline = kind(
        None,
        None,
        vae,
        network.transformer,
        diffusers.CogVideoXDDIMScheduler.from_pretrained(folder, subfolder="scheduler"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return case, folder, network, pipeline


def batch(case):
    _, (_, _, _, h, w) = case["latents_BCFHW"]
    given = {name: noise(name, 2, 6, 16) for name in ("prompt_embeds", "null_prompt_embeds")}
    given["frames"] = torch.randint(
        0, 256, (2, 9, 3, 8 * h, 8 * w), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    if case["images"]:
        given["image"] = given["frames"][:, 0]
    return given


def sampler(case, folder, **settings):
    _, (_, _, _, h, w) = case["latents_BCFHW"]
    inputs = ["prompt_embeds", *(["image_latents"] if case["images"] else [])]
    return VideoSampler(saved_in(str(folder)), inputs, 9, 8 * h, 8 * w, STEPS, **settings)


@pytest.mark.parametrize(
    ("scheduler", "scale", "dynamic"),
    [
        ("CogVideoXDDIMScheduler", 6.0, False),
        ("CogVideoXDDIMScheduler", 1.0, False),
        ("CogVideoXDPMScheduler", 6.0, True),
    ],
)
def test_it_gives_the_pipelines_videos(models, scheduler, scale, dynamic, monkeypatch):
    case, folder, network, pipeline = models
    given, draws = batch(case), Recorded("validation", [0, 1])
    encoder = Stub(pipeline.vae, case["transformer_config"].get("patch_size_t"))
    ours = sampler(case, folder, guidance_scale=scale, dynamic_guidance=dynamic, scheduler=scheduler)
    latents = ours.sample(network, encoder, given, draws)
    columns = ours(network, encoder, given, draws)
    assert columns["prediction"].shape == (2, 9, 3, *ours.shape[1:])
    assert list(columns) == [*(["image"] if case["images"] else []), "target", "prediction"]
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    channels, *grid = encoder.latent_shape(*ours.shape)
    words = {
        "prompt_embeds": given["prompt_embeds"],
        "negative_prompt_embeds": given["null_prompt_embeds"],
        "height": ours.shape[1],
        "width": ours.shape[2],
        "num_frames": 9,
        "num_inference_steps": STEPS,
        "guidance_scale": scale,
        "use_dynamic_cfg": dynamic,
        "generator": draws.generators("sampling steps"),
        "latents": draws.normal("sampling noise", grid[0], channels, *grid[1:]),
        "output_type": "latent",
    }
    if case["images"]:
        words["image"] = to_pixels(given["image"], low=0.0)
        monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator: self.mean)
    wanted = pipeline(**words).frames
    torch.testing.assert_close(latents.transpose(1, 2), wanted, rtol=1e-5, atol=5e-5)
    padding = wanted.shape[1] - 3
    video = pipeline.decode_latents(latents.transpose(1, 2)[:, padding:]).transpose(1, 2) / 2 + 0.5
    torch.testing.assert_close(columns["prediction"], video.clamp(0, 1), rtol=0, atol=1e-5)


def test_the_weights_say_which_scheduler_suits_them(models):
    case, folder, *_ = models
    ours = sampler(case, folder)
    assert (ours.scheduler, ours.guidance.dynamic) == (
        ("CogVideoXDPMScheduler", STEPS)
        if case["scheduler"]["snr_shift_scale"] == 1
        else ("CogVideoXDDIMScheduler", None)
    )
    assert sampler(case, folder, scheduler="CogVideoXDDIMScheduler").guidance.dynamic is None
    assert sampler(case, folder, dynamic_guidance=True).guidance.dynamic == STEPS


def test_each_clip_has_numbers_of_its_own(models):
    case, folder, network, pipeline = models
    given = batch(case)
    encoder = Stub(pipeline.vae, case["transformer_config"].get("patch_size_t"))
    ours = sampler(case, folder)
    both = ours(network, encoder, given, Draws("validation", [3, 7]))["prediction"]
    alone = ours(network, encoder, {n: v[1:] for n, v in given.items()}, Draws("validation", [7]))["prediction"]
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-4)
    again = ours(network, encoder, given, Draws("validation", [3, 7]))["prediction"]
    assert torch.equal(both, again)
    del given["frames"]
    columns = ours(network, encoder, given, Draws("validation", [3, 7]))
    assert "target" not in columns and torch.equal(columns["prediction"], both)


def test_the_first_frame_held_is_the_baseline(models):
    case, folder, *_ = models
    given = batch(case)
    held = sampler(case, folder).baselines(given)["first frame"]
    assert torch.equal(held[:, 5], to_pixels(given["frames"][:, 0], low=0.0))


def test_what_makes_no_sense_is_refused(models):
    case, folder, network, pipeline = models
    with pytest.raises(UserError, match="at least one step"):
        VideoSampler(None, [], 9, 48, 64, 0)
    if not case["images"]:
        given = batch(case) | {"image": torch.zeros(2, 3, 48, 64, dtype=torch.uint8)}
        with pytest.raises(UserError, match="take no picture"):
            sampler(case, folder)(network, Stub(pipeline.vae, None), given, Draws(0, [0, 1]))
