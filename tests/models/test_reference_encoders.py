"""The encoder of Wan with references against diffusers' pipeline and transformers' image processor."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from vireo.errors import UserError
from vireo.mini import wan_networks, world
from vireo.models.reference_encoders import ReferenceEncoder, clean
from vireo.pixels import to_pixels
from vireo.randomness import Draws


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    wan_networks.write(folder)
    vae = f"{wan_networks.WAN}/vae"
    shutil.copytree(world.SHIPPED / world.WEIGHTS[vae], folder / vae)
    return folder


@pytest.fixture(scope="module")
def encoder(weights):
    return make(weights)


def make(weights, **arguments):
    pipeline, vision = str(weights / wan_networks.WAN), str(weights / wan_networks.SKYREELS)
    return ReferenceEncoder(pipeline, pipeline, vision, **{"text_dtype": "fp32", **arguments})


def pictures(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def batch():
    return {
        "frames": pictures(2, 9, 3, 64, 64),
        "references": pictures(2, 3, 3, 64, 64),
        "clip_references": pictures(2, 3, 3, 512, 512),
        "reference_mask": torch.ones(2, 3, dtype=torch.bool),
        "prompt": ["a small thing moves up on sand", "x"],
    }


def test_what_a_batch_gets(encoder):
    found = encoder(batch(), Draws(0, [0, 1]))
    shapes = {name: tuple(value.shape) for name, value in found.items() if name not in batch()}
    assert shapes == {
        "video_latents": (2, 16, 3, 8, 8),
        "latents": (2, 16, 3, 8, 8),
        "reference_latents_raw": (2, 3, 16, 8, 8),
        "reference_latents": (2, 16, 3, 8, 8),
        "clip_embeds": (2, 3, 17, 32),
        "reference_clip": (2, 3, 17, 32),
        "prompt_embeds": (2, 512, 32),
        "null_prompt_embeds": (2, 512, 32),
    }
    assert all(found[name].dtype == torch.float32 for name in shapes)
    assert encoder.latent_shape(9, 64, 64) == (16, 3, 8, 8)


@torch.no_grad()
def test_latents_are_the_normalised_mean(encoder):
    found = encoder.encode("video_latents", batch()["frames"])
    vae, frames = encoder.loaded_vae, to_pixels(batch()["frames"]).transpose(1, 2)
    mean, std = (torch.tensor(vae.config[name])[:, None, None, None] for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(found * std + mean, vae.encode(frames).latent_dist.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        encoder.decode(found).transpose(1, 2), (vae.decode(found * std + mean).sample / 2 + 0.5).clamp(0, 1)
    )


def test_a_reference_is_encoded_by_itself(encoder):
    references = batch()["references"]
    together = encoder.encode("reference_latents_raw", references)
    for row in range(2):
        for number in range(3):
            alone = encoder.encode("reference_latents_raw", references[row, number][None])
            torch.testing.assert_close(together[row, number], alone[0], rtol=1e-4, atol=1e-4)
    as_clip = encoder.encode("video_latents", references[:1, :1])
    torch.testing.assert_close(together[0, 0], as_clip[0, :, 0], rtol=1e-4, atol=1e-4)


def test_text_is_what_the_pipeline_makes_of_it(weights, encoder):
    import diffusers

    pipeline = diffusers.WanPipeline.from_pretrained(weights / wan_networks.WAN, dtype=torch.float32)
    texts = ["a small thing moves up on sand", "Unknown words, too", ""]
    expected = pipeline._get_t5_prompt_embeds(texts, max_sequence_length=512)
    found = encoder.encode("prompt_embeds", texts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found[2, 1:].abs().max() == 0 < found[2, 0].abs().max()
    assert found[0, 9:].abs().max() == 0


def test_texts_of_half_precision_are_cached_in_it_and_used_in_float32(weights):
    half, given = make(weights, text_dtype="bf16"), {"prompt": batch()["prompt"]}
    kept = half.encode("prompt_embeds", given["prompt"])
    assert kept.dtype == torch.bfloat16
    uncached = half(given, Draws(0, [0, 1]))
    cached = half({**given, "prompt_embeds": kept}, Draws(0, [0, 1]))
    for name in ("prompt_embeds", "null_prompt_embeds"):
        assert uncached[name].dtype == torch.float32 and torch.equal(uncached[name], cached[name])


def test_captions_are_cleaned(encoder):
    assert clean("  a\n\n thing &amp;amp; more\t") == "a thing & more"
    one, other = encoder.encode("prompt_embeds", ["a  thing\nmoves", "a thing moves"])
    assert torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("size", [(512, 512), (40, 40), (32, 48)])
def test_references_are_prepared_as_the_processor_does(weights, encoder, size):
    from transformers import CLIPImageProcessor

    smooth = torch.nn.functional.interpolate(pictures(1, 3, 8, 8).float(), size, mode="bilinear").to(torch.uint8)
    processor = CLIPImageProcessor.from_pretrained(weights / wan_networks.SKYREELS / "image_processor")
    picture = Image.fromarray(np.ascontiguousarray(smooth[0].permute(1, 2, 0).numpy()))
    values = processor(picture, return_tensors="pt").pixel_values
    expected = encoder.loaded_image_encoder(values, output_hidden_states=True).hidden_states[-2]
    found = encoder.encode("clip_embeds", smooth)
    assert (found - expected).norm() / expected.norm() < 0.02  # a grey level is 0.015 of a standard deviation


def test_identities(weights, encoder):
    for output in encoder.outputs:
        assert encoder.identity(output) == make(weights).identity(output)
    assert encoder.identity("video_latents") == encoder.identity("reference_latents_raw")
    assert encoder.identity("prompt_embeds") == encoder.identity("null_prompt_embeds")
    assert encoder.identity("prompt_embeds") != make(weights, text_dtype="bf16").identity("prompt_embeds")
    with pytest.raises(KeyError, match="no output"):
        encoder.identity("latents")


def test_texts_have_one_length(weights, encoder):
    short = make(weights, max_sequence_length=9)
    found = short.encode("prompt_embeds", ["a small thing moves up on sand"])
    assert found.shape == (1, 9, 32) and not found[:, 8:].any()
    torch.testing.assert_close(found, encoder.encode("prompt_embeds", ["a small thing moves up on sand"])[:, :9])
    assert short.identity("prompt_embeds") != encoder.identity("prompt_embeds")


def test_lengths_and_sizes_that_the_vae_would_cut_are_refused(encoder):
    with pytest.raises(UserError, match="8x64x64 .* one frame more than a multiple of 4"):
        encoder.encode("video_latents", pictures(1, 8, 3, 64, 64))
    with pytest.raises(UserError, match="multiples of 8"):
        encoder.encode("reference_latents_raw", pictures(1, 3, 60, 64))


def test_folders_that_do_not_suit(weights, tmp_path):
    with pytest.raises(UserError, match="preprocessor_config.json"):
        make(weights, image_processor=str(tmp_path))
    with pytest.raises(UserError, match="text_dtype is one of"):
        make(weights, text_dtype="int8")
    with pytest.raises(UserError, match="AutoencoderKLWan"):
        vision = str(weights / wan_networks.SKYREELS)
        ReferenceEncoder(str(world.SHIPPED / "autoencoder_kl"), str(weights / wan_networks.WAN), vision)


def test_memory_is_known_before_loading(weights):
    made = make(weights)
    sizes = made.weight_bytes()
    assert sizes["VAE"] == 4 * sum(p.numel() for p in made.loaded_vae.parameters())
    assert sizes["image encoder"] == 4 * sum(p.numel() for p in made.loaded_image_encoder.parameters())


def test_a_network_for_other_image_tokens_is_refused(encoder):
    found = encoder(batch(), Draws(0, [0, 1]))
    network = torch.nn.ModuleDict(
        {"clip_proj": torch.nn.ModuleDict({"proj": torch.nn.Sequential(torch.nn.LayerNorm(32))})}
    )
    encoder.check_network(network, found)
    network["clip_proj"]["proj"] = torch.nn.Sequential(torch.nn.LayerNorm(1280))
    with pytest.raises(UserError, match="width 32, model.network.clip_dim is 1280"):
        encoder.check_network(network, found)
    del found["reference_clip"]  # texts alone suit any
    encoder.check_network(network, found)
