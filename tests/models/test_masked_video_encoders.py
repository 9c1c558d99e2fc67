"""The frozen encoder of video inpainting against diffusers, its mask convention, and how often it encodes."""

import shutil

import diffusers
import pytest
import torch
from tests.pipelines import save_pipeline

from vireo.models import saved_networks
from vireo.models.masked_video_encoders import MaskedVideoEncoder
from vireo.randomness import Draws

DRAWS = Draws(0, [3, 8])
T, SIDE = 3, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


def make(folder, **arguments):
    return MaskedVideoEncoder(str(folder), str(folder), **arguments)


def batch():
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (2, T, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    hole = torch.zeros(2, T, 1, SIDE, SIDE, dtype=torch.uint8)
    hole[0, 1, :, 4:9, 6:] = 1
    prompts = ["clean background"] * 2
    return {"frames": frames, "masked_frames": frames * (1 - hole), "hole": hole, "prompt": prompts}


@torch.no_grad()
def test_it_encodes_as_the_recipe_does(folder):
    data = batch()
    found = make(folder)(data, DRAWS)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    for name, field, purpose in (
        ("latents", "frames", "posterior"),
        ("masked_latents", "masked_frames", "masked posterior"),
    ):
        assert found[name].shape == (2, 4, T, 8, 8) and found[name].dtype == torch.float32
        noise = DRAWS.normal(purpose, T, 4, 8, 8)
        for frame in range(T):
            posterior = vae.encode(data[field][:, frame].float() / 255 * 2 - 1).latent_dist
            sample = (posterior.mean + posterior.std * noise[:, frame]) * 0.18215
            torch.testing.assert_close(found[name][:, :, frame], sample, msg="a scaled sample, not the mode")
    assert found["prompt_embeds"].shape == (2, 77, 32)


def test_the_networks_mask_is_one_where_the_picture_is_kept(folder):
    found = make(folder)(batch(), DRAWS)["keep"]
    expected = torch.ones(2, 1, T, 8, 8)
    expected[0, 0, 1, 2:5, 3:] = 0  # every second pixel: this VAE halves a side
    assert torch.equal(found, expected)


def test_the_mask_is_sampled_as_by_interpolation(folder):
    data = batch()
    data["hole"] = torch.randint(0, 2, data["hole"].shape, dtype=torch.uint8)
    found = make(folder)(data, DRAWS)["keep"].transpose(1, 2).flatten(0, 1)
    keep = 1 - data["hole"].flatten(0, 1).float()
    assert torch.equal(found, torch.nn.functional.interpolate(keep, size=(8, 8)))


def test_a_text_is_encoded_once(folder, monkeypatch):
    encoder, texts = make(folder), []
    tokenize = encoder.tokenize
    monkeypatch.setattr(encoder, "tokenize", lambda some: texts.extend(some) or tokenize(some))
    first = encoder(batch(), DRAWS)["prompt_embeds"]
    data = batch() | {"prompt": ["clean background", "a street"]}
    second = encoder(data, DRAWS)["prompt_embeds"]
    assert texts == ["clean background", "a street"]
    assert torch.equal(first[0], second[0]) and not torch.equal(second[0], second[1])
    for number in range(100):
        encoder(data | {"prompt": [f"street {number}", "a street"]}, DRAWS)
    assert len(encoder.embeds_by_text) <= 64


def test_with_cached_frames_the_text_encoder_is_not_loaded(folder, monkeypatch):
    full, encoder = make(folder)(batch(), DRAWS), make(folder)
    load, loaded = saved_networks.load, []
    monkeypatch.setattr(saved_networks, "load", lambda part, *rest: loaded.append(part.folder) or load(part, *rest))
    cached = {name: full[name] for name in encoder.outputs}
    rest = {name: value for name, value in batch().items() if name not in ("frames", "prompt")}
    found = encoder({**rest, **cached}, DRAWS)
    assert loaded == [folder / "vae"], "masked frames are new at every step"
    assert torch.equal(found["latents"], full["latents"])


@torch.no_grad()
def test_decoding_is_the_way_back(folder):
    encoder = make(folder)
    latents = encoder(batch(), DRAWS)["latents"]
    found = encoder.decode(latents)
    assert found.shape == (2, T, 3, SIDE, SIDE) and found.min() >= 0 and found.max() <= 1
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    expected = (vae.decode(latents[:, :, 1] / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found[:, 1], expected)


def test_a_vae_without_a_pipeline_around_it(folder, tmp_path):
    """The published sd-vae-ft-mse is one."""
    shutil.copytree(folder / "vae", tmp_path / "sd-vae-ft-mse")
    alone = MaskedVideoEncoder(str(tmp_path / "sd-vae-ft-mse"), str(folder))
    assert torch.equal(alone(batch(), DRAWS)["latents"], make(folder)(batch(), DRAWS)["latents"])
