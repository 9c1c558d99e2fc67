"""CogVideoX's frozen encoder against diffusers, transformers and the golden numbers, and its part in the cache."""

import json
import shutil

import diffusers
import pytest
import torch
import transformers
from tests.cogvideox import CASES, DESCRIBED, reference
from tests.data import captions, videos
from tests.golden.fill import fill, noise
from tests.waits import Waits

from vireo import cache_filling, digests
from vireo.cache import Cache, text_identity
from vireo.data.captioned_clips import CaptionedClips
from vireo.data.stream import Stream
from vireo.errors import UserError
from vireo.mini import tokenizers
from vireo.models import video_encoders
from vireo.models.video_encoders import VideoTextEncoder
from vireo.randomness import Draws

DRAWS = Draws(0, [3, 8])
T2V, I2V, V15 = {"in_channels": 4}, {"in_channels": 8}, {"in_channels": 8, "patch_size_t": 2}
VAE15 = {"invert_scale_latents": True}


def save(folder, transformer, vae=None):
    """A pipeline's folder without transformer weights and scheduler."""
    config = {**DESCRIBED["vae_config"], "scaling_factor": 0.7, **(vae or {})}
    fill(diffusers.AutoencoderKLCogVideoX(**config)).save_pretrained(folder / "vae")
    tokenizers.write_t5_tokenizer(folder / "tokenizer")
    t5 = transformers.T5Config(vocab_size=200, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    fill(transformers.T5EncoderModel(t5)).save_pretrained(folder / "text_encoder")
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps({"max_text_seq_length": 12, **transformer}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {
        "t2v": save(root / "t2v", T2V),
        "i2v": save(root / "i2v", I2V),
        "1.5": save(root / "v15", V15, VAE15),
    }


def make(folder, **options):
    return VideoTextEncoder(*[str(folder)] * 3, **{"dtype": "fp32", **options})


def batch(frames=9, clips=2):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (clips, frames, 3, 16, 32), generator=generator, dtype=torch.uint8)
    return {"frames": pixels, "image": pixels[:, 0], "prompt": ["drop the red square", "up"][:clips]}


def close(found, expected, **given):
    torch.testing.assert_close(found, expected, **{"rtol": 1e-5, "atol": 1e-5, **given})


# ------------------------------------------------------------------ what it computes


@torch.no_grad()
def test_it_encodes_as_the_pipelines_do(folders):
    encoder, data = make(folders["t2v"]), batch()
    found = encoder(data, DRAWS)
    vae = diffusers.AutoencoderKLCogVideoX.from_pretrained(folders["t2v"] / "vae").eval()
    posterior = vae.encode(data["frames"].transpose(1, 2).float() / 255 * 2 - 1).latent_dist
    close(found["video_moments"], posterior.parameters)
    close(found["latents"], (posterior.mean + posterior.std * DRAWS.normal("posterior", 4, 3, 2, 4)) * 0.7)
    assert "image_latents" not in found and found["padding_frames"].tolist() == [0, 0]
    pipeline = diffusers.CogVideoXPipeline(
        transformers.T5Tokenizer.from_pretrained(folders["t2v"] / "tokenizer"),
        transformers.T5EncoderModel.from_pretrained(folders["t2v"] / "text_encoder"),
        vae,
        None,
        diffusers.CogVideoXDDIMScheduler(),
    )
    for name, texts in (("prompt_embeds", data["prompt"]), ("null_prompt_embeds", ["", ""])):
        close(found[name], pipeline._get_t5_prompt_embeds(texts, max_sequence_length=12, device="cpu"))
    pixels = encoder.decode(found["latents"])
    assert pixels.shape == (2, 9, 3, 16, 32) and pixels.dtype == torch.float32
    expected = pipeline.decode_latents(found["latents"].transpose(1, 2)).transpose(1, 2) / 2 + 0.5
    close(pixels, expected.clamp(0, 1))


@torch.no_grad()
def test_the_vae_of_the_golden_numbers(folders):
    vae = make(folders["t2v"]).loaded_vae
    described = DESCRIBED["cases"]["vae"]
    name, shape = next(value for value in described.values() if isinstance(value, list) and isinstance(value[0], str))
    posterior = vae.encode(
        noise(name.removeprefix("tanh of "), *shape).tanh() if "tanh" in name else noise(name, *shape)
    )
    close(posterior.latent_dist.mean, reference()["vae/mean"])


@pytest.mark.parametrize("case", ["i2v_5b", "i2v_15"])
@pytest.mark.parametrize("mode", ["pipeline", "upstream"])
def test_pictures_of_the_golden_numbers(case, mode, folders, monkeypatch):
    described = CASES[case]
    name, shape = described["images"]
    image = noise(name.removeprefix("tanh of "), *shape).tanh()
    monkeypatch.setattr(video_encoders, "to_pixels", lambda pixels: pixels)

    class Recorded:
        positions = [0, 1]

        def once_normal(self, purpose):
            assert purpose == "image_sigma"
            return float(noise(f"d.{case}.sigma", 1))

        def normal(self, purpose, *shape):
            drawn = {"image_noise": (2, 3, 1, *shape[1:]), "image_posterior": (2, *shape)}[purpose]
            return noise(f"d.{case}.{purpose.replace('image_posterior', 'posterior')}", *drawn).view(2, *shape)

    scale = "scaling" if mode == "upstream" else "auto"
    encoder = make(folders["1.5" if case == "i2v_15" else "i2v"], image_noise_per="batch", image_latent_scale=scale)
    found = encoder.condition({"image": image}, Recorded())["image_latents"]
    stored = reference()
    if mode == "upstream":
        expected = stored[f"{case}/hidden_states"][:, :1, 4:].transpose(1, 2)
    else:
        expected = stored[f"{case}/image_latents_pipeline"][:, :1].transpose(1, 2)
    close(found, expected)


@pytest.mark.parametrize(("rule", "factor"), [("auto", 1 / 0.7), ("scaling", 0.7), ("inverse", 1 / 0.7), ("none", 1.0)])
def test_the_scale_of_pictures(folders, rule, factor):
    assert make(folders["1.5"], image_latent_scale=rule).image_scaling_factor == pytest.approx(factor)
    assert make(folders["i2v"]).image_scaling_factor == pytest.approx(0.7)
    assert make(folders["1.5"]).scaling_factor == 0.7, "that of clips is not turned over"


@torch.no_grad()
def test_clean_pictures_are_what_the_pipeline_sees(folders):
    encoder, data = make(folders["1.5"]), batch()
    found = encoder.clean_image_latents(data, DRAWS)
    vae = diffusers.AutoencoderKLCogVideoX.from_pretrained(folders["1.5"] / "vae").eval()
    posterior = vae.encode((data["image"].float() / 255 * 2 - 1)[:, :, None]).latent_dist
    close(found, (posterior.mean + posterior.std * DRAWS.normal("image_posterior", 4, 1, 2, 4)) / 0.7)


@pytest.mark.parametrize("frames", [1, 9, 17, 25])
def test_padding_frames_stand_first_and_are_dropped(folders, frames):
    plain, encoder, data = make(folders["t2v"]), make(folders["1.5"]), batch(frames, clips=1)
    unpadded = plain(data, Draws(0, [3]))["latents"]
    found = encoder(data, Draws(0, [3]))
    assert found["latents"].shape[2] == unpadded.shape[2] + 1 and found["padding_frames"].tolist() == [1]
    close(found["latents"], torch.cat([unpadded[:, :, :1], unpadded], dim=2))
    assert tuple(found["latents"].shape[1:]) == encoder.latent_shape(frames, 16, 32)
    assert tuple(unpadded.shape[1:]) == plain.latent_shape(frames, 16, 32)
    close(encoder.decode(found["latents"]), plain.decode(unpadded))


def test_captions_without_clips(folders):
    data = {"prompt": batch()["prompt"]}
    found = make(folders["t2v"])(data, DRAWS)
    assert found.keys() == {"prompt", "prompt_embeds", "null_prompt_embeds"}
    with_picture = make(folders["i2v"], image_variants=1)(data | {"image": batch()["image"]}, DRAWS)
    assert with_picture["image_latents"].shape == (2, 4, 1, 2, 4) and "latents" not in with_picture


def test_the_mean_is_drawn_from_nothing(folders):
    encoder, data = make(folders["i2v"], posterior="mean", image_variants=1), batch()
    first, second = (encoder(data, Draws(seed, [3, 8])) for seed in (0, 1))
    for name in ("latents", "image_latents"):
        assert torch.equal(first[name], second[name])
    assert not torch.equal(*(make(folders["i2v"])(data, Draws(seed, [3, 8]))["latents"] for seed in (0, 1)))


def test_noise_on_pictures(folders):
    data = {"image": torch.full((400, 3, 8, 8), 128, dtype=torch.uint8)}
    seen = {}

    def record(encoder):
        encoder._moments = lambda pixels: seen.update(pixels=pixels) or torch.zeros(len(pixels), 8, 1, 1, 1)
        return encoder

    record(make(folders["i2v"])).condition(data, Draws(0, range(400)))
    sigma = (seen["pixels"] - seen["pixels"].mean((1, 2, 3, 4), keepdim=True)).flatten(1).std(1).log()
    assert abs(float(sigma.mean()) + 3) < 0.1 and abs(float(sigma.std()) - 0.5) < 0.1
    record(make(folders["i2v"], image_noise_per="batch")).condition(data, Draws(0, range(400)))
    sigma = (seen["pixels"] - seen["pixels"].mean((1, 2, 3, 4), keepdim=True)).flatten(1).std(1).log()
    assert float(sigma.std()) < 0.1, "one for the whole step"


def test_slicing_and_tiling(folders):
    frames = batch()["frames"].repeat_interleave(3, -1)[..., :80]
    whole = make(folders["t2v"], slicing=False).encode("video_moments", frames)
    close(make(folders["t2v"], slicing=True).encode("video_moments", frames), whole)
    found = make(folders["t2v"], tiling=True, tile_height=24, tile_width=40).encode("video_moments", frames)
    assert found.shape == whole.shape and not torch.allclose(found, whole, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_inside_float32_outside(folders, dtype):
    encoder = make(folders["i2v"], dtype=dtype)
    found = encoder(batch(), DRAWS)
    assert encoder.loaded_vae.dtype == encoder.loaded_text_encoder.dtype == video_encoders.DTYPES[dtype]
    for name in ("latents", "image_latents", "prompt_embeds"):
        assert found[name].dtype == torch.float32
    close(found["latents"], make(folders["i2v"])(batch(), DRAWS)["latents"], rtol=0.05, atol=0.05)


def test_a_step_does_not_wait_for_the_device(folders):
    encoder = make(folders["i2v"])
    encoder(batch(), DRAWS)  # with what is loaded
    with Waits() as waits:
        encoder(batch(), DRAWS)
    assert waits.count == 0


def test_values_that_are_not_finite_are_told_before_the_first_step(folders):
    encoder, network = make(folders["i2v"], dtype="bf16"), torch.nn.Identity()
    found = encoder(batch(), DRAWS)
    encoder.check_network(network, found)
    for name in ("video_moments", "prompt_embeds", "image_latents"):
        broken = found[name].clone()
        broken[1].view(-1)[3] = torch.nan
        with pytest.raises(UserError, match=rf"{name} of rows \[1\] .* in bf16: set model.encoder.dtype=fp32"):
            encoder.check_network(network, {**found, name: broken})


def test_what_does_not_suit(folders, tmp_path):
    with pytest.raises(UserError, match="Clips of 8x16x32 cannot be encoded"):
        make(folders["t2v"])(batch(8), DRAWS)
    with pytest.raises(UserError, match="there is no picture: take data=captioned_clips_image"):
        make(folders["i2v"])({k: v for k, v in batch().items() if k != "image"}, DRAWS)
    with pytest.raises(UserError, match="dtype is 'fp8'.*; model.encoder.posterior is 'mode'.*image_variants is 0"):
        make(folders["t2v"], dtype="fp8", posterior="mode", image_variants=0)
    with pytest.raises(UserError, match="patch_size_t is 3"):
        make(save(tmp_path / "three", {**T2V, "patch_size_t": 3}))
    with pytest.raises(UserError, match="holds a AutoencoderKL, not the AutoencoderKLCogVideoX"):
        other = shutil.copytree(folders["t2v"], tmp_path / "other")
        config = json.loads((other / "vae" / "config.json").read_text())
        (other / "vae" / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKL"}))
        make(other)


# ------------------------------------------------------------------ pictures that were noised before


def test_variants_hold_the_clean_picture_and_noised_ones(folders):
    encoder, data = make(folders["i2v"], image_variants=3), batch()
    variants = encoder.encode("image_moments", data["image"])
    assert variants.shape == (2, 4, 8, 1, 2, 4)
    assert torch.equal(variants, encoder.encode("image_moments", data["image"])), "noise follows from the picture"
    close(encoder.encode("image_moments", data["image"][1:])[0], variants[1])
    assert not torch.allclose(variants[:, 1], variants[:, 2], atol=1e-4)
    close(encoder.clean_image_latents({"image_moments": variants}, DRAWS), encoder.clean_image_latents(data, DRAWS))


def test_one_variant_is_drawn_and_no_vae_is_needed(folders, monkeypatch):
    encoder = make(folders["i2v"], image_variants=3, posterior="mean")
    variants = encoder.encode("image_moments", batch()["image"])
    monkeypatch.setattr(VideoTextEncoder, "loaded_vae", property(lambda self: pytest.fail("the VAE is not needed")))
    seen = set()
    for position in range(40):
        found = encoder.condition({"image_moments": variants[:1]}, Draws(0, [position]))["image_latents"][0] / 0.7
        matches = [k for k in range(4) if torch.allclose(found, variants[0, k, :4], atol=1e-5)]
        assert len(matches) == 1
        seen.update(matches)
    assert seen == {1, 2, 3}, "never the clean one"


# ------------------------------------------------------------------ nothing stale is ever read: section 1.5


@pytest.fixture
def data(tmp_path):
    return captions.write(tmp_path / "data", [9, 9], (16, 32))


@pytest.fixture(autouse=True)
def own_index(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "index"))
    monkeypatch.setattr(digests, "_remembered", {})


def clips_of(data, **options):
    return CaptionedClips(data, 9, 16, 32, **{"held_out": 0, "image": "first_frame", **options})


def filled(folder, data, tmp_path, clips=None, **options):
    """How many entries had to be encoded, and the batch that training would then see."""
    encoder, dataset = make(folder, **options), clips or clips_of(data)
    cache = Cache.of(encoder, tmp_path / "cache")
    added = cache_filling.fill(cache, {"train": dataset}, encoder, "test", batch_size=2).encoded
    read = Stream(dataset, 0, shuffle=False, cache=cache).batch(range(len(dataset)), torch.device("cpu"))
    return added, read


def test_a_complete_cache_needs_no_weights_and_gives_what_they_give(folders, data, tmp_path, monkeypatch):
    added, read = filled(folders["1.5"], data, tmp_path, image_variants=2)
    assert added == 2 + 2 + 2 + 1, "clips, pictures, captions and the empty one"
    encoder = make(folders["1.5"], image_variants=2)
    fresh = encoder(Stream(clips_of(data), 0, shuffle=False).batch(range(2), torch.device("cpu")), DRAWS)
    monkeypatch.setattr(video_encoders.saved_networks, "load", lambda *_: pytest.fail("nothing is to be loaded"))
    found = make(folders["1.5"], image_variants=2)(read, DRAWS)
    assert "frames" not in read and "image" not in read
    for name in ("latents", "image_latents", "prompt_embeds", "null_prompt_embeds"):
        close(found[name], fresh[name])
    assert filled(folders["1.5"], data, tmp_path, image_variants=2)[0] == 0


def test_text_encoder_and_vae_are_never_loaded_at_once(folders, data, tmp_path, monkeypatch):
    loaded, encode = [], VideoTextEncoder.encode

    def noted(encoder, output, values):
        encodings = encode(encoder, output, values)
        loaded.append([part for part in encoder.parts if part in vars(encoder)])
        return encodings

    monkeypatch.setattr(VideoTextEncoder, "encode", noted)
    assert filled(folders["i2v"], data, tmp_path, image_variants=2)[0] == 2 + 2 + 2 + 1
    assert loaded == [["loaded_text_encoder"]] * 2 + [["loaded_vae"]] * 2, "both kinds of texts, pictures, clips"


def test_another_clip_under_the_same_name_is_encoded(folders, data, tmp_path):
    before = filled(folders["t2v"], data, tmp_path)[1]
    videos.write_flat(data / "videos" / "1.mp4", 9, 16, 32, first=40)
    added, after = filled(folders["t2v"], data, tmp_path)
    assert added == 1
    assert torch.equal(before["video_moments"][0], after["video_moments"][0])
    assert not torch.equal(before["video_moments"][1], after["video_moments"][1])


def test_other_weights_in_the_same_folder_are_used(folders, data, tmp_path):
    folder = shutil.copytree(folders["t2v"], tmp_path / "copy")
    before = filled(folder, data, tmp_path)[1]
    for kind, name in ((diffusers.AutoencoderKLCogVideoX, "vae"), (transformers.T5EncoderModel, "text_encoder")):
        network = kind.from_pretrained(folder / name)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.01)
        network.save_pretrained(folder / name)
    added, after = filled(folder, data, tmp_path)
    assert added == 5
    for name in ("video_moments", "prompt_embeds"):
        assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize(
    ("change", "added"),
    [
        ({"dtype": "bf16"}, 5),
        ({"tiling": True}, 2),
        ({"tiling": True, "tile_height": 24, "tile_width": 16}, 2),
        ({"slicing": False}, 0),
        ({"posterior": "mean"}, 0),
    ],
)
def test_settings_that_change_numbers_change_entries(folders, data, tmp_path, change, added):
    filled(folders["t2v"], data, tmp_path)
    assert filled(folders["t2v"], data, tmp_path, **change)[0] == added


def test_the_length_of_texts_and_the_way_of_resizing_count(folders, data, tmp_path):
    filled(folders["t2v"], data, tmp_path)
    folder = shutil.copytree(folders["t2v"], tmp_path / "copy")
    (folder / "transformer" / "config.json").write_text(json.dumps({**T2V, "max_text_seq_length": 13}))
    assert filled(folder, data, tmp_path)[0] == 3, "texts alone"
    assert filled(folders["t2v"], data, tmp_path, clips_of(data, resize="pad"))[0] == 2


def test_the_family_of_a_model_names_nothing(folders, data, tmp_path):
    """2B and 5B have a VAE of different scale, which is no part of what is kept: both read the same entries."""
    smaller = save(tmp_path / "2b", T2V, {"scaling_factor": 1.15258426})
    _, of_5b = filled(folders["t2v"], data, tmp_path)
    added, of_2b = filled(smaller, data, tmp_path)
    assert added == 0
    one, other = (make(f).condition(b, DRAWS)["latents"] for f, b in ((folders["t2v"], of_5b), (smaller, of_2b)))
    close(one / 0.7, other / 1.15258426)


def test_clips_of_one_stem_do_not_share_an_entry(folders, tmp_path):
    data = captions.write(tmp_path / "data", [9, 9], (16, 32), names=["a/clip.mp4", "b/clip.mp4"])
    moments = filled(folders["t2v"], data, tmp_path)[1]["video_moments"]
    assert not torch.equal(moments[0], moments[1])


def test_a_caption_belongs_to_its_encoder(folders, data, tmp_path):
    keys = {
        Cache.of(make(folder, dtype=dtype), tmp_path).key("prompt_embeds", text_identity("up"))
        for folder in (folders["t2v"], save(tmp_path / "other", {**T2V, "max_text_seq_length": 9}))
        for dtype in ("fp32", "bf16")
    }
    assert len(keys) == 4


def test_half_written_entries_are_encoded_again(folders, data, tmp_path):
    before = filled(folders["t2v"], data, tmp_path)[1]
    entry = max((tmp_path / "cache").glob("*/*.safetensors"), key=lambda path: path.stat().st_size)
    entry.write_bytes(entry.read_bytes()[:-10])
    added, after = filled(folders["t2v"], data, tmp_path)
    assert added == 1 and torch.equal(before["video_moments"], after["video_moments"])


def test_a_cold_run_draws_what_a_warm_one_draws(folders, data, tmp_path):
    """Encoding takes no number from torch's generator, which a cold run alone would then go on from, and its own noise
    is the same wherever that one stands.
    """
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        added, read = filled(folders["i2v"], data, tmp_path / str(seed), image_variants=3)
        assert added and torch.equal(torch.get_rng_state(), before)
        found.append(read)
    warm = filled(folders["i2v"], data, tmp_path / "1", image_variants=3)[1]
    for name in ("video_moments", "image_moments", "prompt_embeds"):
        assert torch.equal(found[0][name], found[1][name]) and torch.equal(found[0][name], warm[name])


def test_moved_data_in_another_order_stay_cached(folders, data, tmp_path):
    before = filled(folders["t2v"], data, tmp_path)[1]
    moved = shutil.copytree(data, tmp_path / "moved")
    captions.write_list(moved / "videos.txt", ["videos/1.mp4", "videos/0.mp4"])
    captions.write_list(moved / "prompts.txt", ["caption 1", "caption 0"])
    added, after = filled(folders["t2v"], moved, tmp_path)
    assert added == 0 and torch.equal(after["video_moments"], before["video_moments"].flip(0))
