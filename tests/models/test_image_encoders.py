"""The frozen encoder against diffusers and transformers, its laziness, and what it calls things."""

import json
import shutil

import diffusers
import pytest
import torch
import transformers
from tests.pipelines import save_pipeline
from tests.waits import Waits

from vireo.errors import UserError
from vireo.models import image_encoders, saved_networks
from vireo.models.image_encoders import ImageTextEncoder, split
from vireo.randomness import Draws

DRAWS = Draws(0, [3, 8])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


def make(folder, **arguments):
    return ImageTextEncoder(str(folder), **{"text_encoder": str(folder), **arguments})


def batch(frames=3, side=16, clips=2):
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randint(0, 256, (clips, frames + 1, 3, side, side), generator=generator, dtype=torch.uint8)
    texts = ["drop the red square", "move the blue circle to the left"]
    return {"frames": pictures[:, :-1], "target": pictures[:, -1], "prompt": texts[:clips], "name": ["a", "b"][:clips]}


@torch.no_grad()
def test_it_encodes_as_the_recipe_does(folder):
    encoder, data = make(folder), batch()
    found = encoder(data, DRAWS)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    pixels = data["target"].float() / 255 * 2 - 1
    posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(found["target_moments"], posterior.parameters)
    noise = DRAWS.normal("posterior", 4, 8, 8)
    torch.testing.assert_close(found["latents"], (posterior.mean + posterior.std * noise) * 0.18215)
    assert not torch.allclose(found["latents"], posterior.mode() * 0.18215, atol=1e-3), "a sample, not the mode"
    for frame in range(3):
        mode = vae.encode(data["frames"][:, frame].float() / 255 * 2 - 1).latent_dist.mode()
        torch.testing.assert_close(found["condition_latents"][:, frame], mode, msg="the mode, unscaled")
    text_encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    for name, texts in (("prompt_embeds", data["prompt"]), ("null_prompt_embeds", ["", ""])):
        ids = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        torch.testing.assert_close(found[name], text_encoder(ids).last_hidden_state)
    assert found["name"] == ["a", "b"], "the rest stays"


def test_shapes_and_dtypes(folder):
    found = make(folder)(batch(), DRAWS)
    shapes = {
        "frame_moments": (2, 3, 8, 8, 8),
        "target_moments": (2, 8, 8, 8),
        "condition_latents": (2, 3, 4, 8, 8),
        "latents": (2, 4, 8, 8),
        "prompt_embeds": (2, 77, 32),
        "null_prompt_embeds": (2, 77, 32),
    }
    for name, shape in shapes.items():
        assert found[name].shape == shape and found[name].dtype == torch.float32 and not found[name].requires_grad


@pytest.mark.parametrize("vae_batch", [1, 3, 100])
def test_chunks_change_nothing(folder, vae_batch):
    whole, pieces = make(folder), make(folder, vae_batch=vae_batch)
    frames = batch()["frames"]
    expected = whole.encode("frame_moments", frames)
    torch.testing.assert_close(pieces.encode("frame_moments", frames), expected)
    latents = split(expected)[0][0]
    torch.testing.assert_close(pieces.decode(latents), whole.decode(latents))


def test_chunks_are_as_large_as_asked(folder):
    encoder, sizes = make(folder, vae_batch=4), []
    encode = encoder.loaded_vae.encode
    encoder.loaded_vae.encode = lambda pixels: sizes.append(len(pixels)) or encode(pixels)
    encoder.encode("frame_moments", batch(frames=5)["frames"])
    assert sizes == [4, 4, 2]


def test_a_cached_batch_loads_no_network(folder, monkeypatch):
    full = make(folder)(batch(), DRAWS)
    encoder = make(folder)
    monkeypatch.setattr(saved_networks, "load", lambda *arguments: pytest.fail("a network was loaded"))
    cached = {name: full[name] for name in encoder.outputs}
    assert cached.keys() == {"frame_moments", "target_moments", "prompt_embeds", "null_prompt_embeds"}
    found = encoder(cached, DRAWS)
    assert all(torch.equal(found[name], full[name]) for name in found)
    for name in encoder.outputs:
        assert encoder.identity(name)


def test_the_empty_prompt_is_encoded_once(folder, monkeypatch):
    encoder, texts = make(folder), []
    tokenize = encoder.tokenize
    monkeypatch.setattr(encoder, "tokenize", lambda some: texts.append(some) or tokenize(some))
    first, second = (encoder(batch(), DRAWS)["null_prompt_embeds"] for _ in range(2))
    assert torch.equal(first, second) and texts.count([""]) == 1
    encoder.to(torch.device("cpu"))
    encoder(batch(), DRAWS)
    assert texts.count([""]) == 2, "it is where it was told to be"


def test_what_a_roll_out_needs(folder):
    encoder, data = make(folder), batch()
    latents = encoder(data, DRAWS)["latents"]
    pixels = encoder.decode(latents)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    with torch.no_grad():
        expected = (vae.decode(latents / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pixels, expected)
    assert pixels.shape == (2, 3, 16, 16) and pixels.dtype == torch.float32
    again = encoder.encode("target_moments", (pixels * 255).round().to(torch.uint8))
    assert again.shape == (2, 8, 8, 8)


def test_frames_without_a_target_can_be_conditions(folder):
    data = batch()
    found = make(folder).encode("frame_moments", data["frames"][:, -1:])
    torch.testing.assert_close(found[:, 0], make(folder).encode("target_moments", data["frames"][:, -1]))


# ---------------------------------------------------------------------------------------------------------------------
# Identities


def test_pictures_and_texts_have_names_by_content(folder, tmp_path):
    encoder = make(folder)
    assert encoder.identity("frame_moments") == encoder.identity("target_moments")
    assert encoder.identity("prompt_embeds") == encoder.identity("null_prompt_embeds")
    assert encoder.identity("prompt_embeds") != encoder.identity("frame_moments")
    copy = shutil.copytree(folder, tmp_path / "copy")
    for name in encoder.outputs:
        assert make(copy).identity(name) == encoder.identity(name), "wherever it lies"
        assert make(folder, dtype="bf16").identity(name) != encoder.identity(name)
        assert make(folder, vae_batch=1).identity(name) == encoder.identity(name)
    with pytest.raises(KeyError, match="no output 'latents'"):
        encoder.identity("latents")


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("vae/diffusion_pytorch_model.safetensors", {"frame_moments", "target_moments"}),
        ("vae/config.json", {"frame_moments", "target_moments"}),
        ("text_encoder/model.safetensors", {"prompt_embeds", "null_prompt_embeds"}),
        ("tokenizer/merges.txt", {"prompt_embeds", "null_prompt_embeds"}),
    ],
)
def test_names_change_with_what_they_name(folder, tmp_path, file, changed):
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = {name: make(copy).identity(name) for name in make(copy).outputs}
    if file.endswith("config.json"):
        config = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps({**config, "act_fn": "relu"}))
    else:
        content = (copy / file).read_bytes()
        (copy / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    after = {name: make(copy).identity(name) for name in before}
    assert {name for name in before if before[name] != after[name]} == changed


def test_the_version_that_saved_it_is_no_part_of_the_name(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    for file in ("vae/config.json", "text_encoder/config.json"):
        text = (copy / file).read_text()
        changed = text.replace(diffusers.__version__, "0.1.0").replace(transformers.__version__, "0.1.0")
        assert changed != text
        (copy / file).write_text(changed)
    for name in make(folder).outputs:
        assert make(copy).identity(name) == make(folder).identity(name)


def test_the_scale_is_read_from_the_config(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "vae/config.json").read_text())
    (copy / "vae/config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    one, other = make(folder)(batch(), DRAWS), make(copy)(batch(), DRAWS)
    torch.testing.assert_close(other["latents"] / 0.5, one["latents"] / 0.18215)
    assert torch.equal(other["condition_latents"], one["condition_latents"])


# ---------------------------------------------------------------------------------------------------------------------
# Text that learns; precision; mistakes


def test_token_numbers_where_the_text_encoder_learns(folder):
    encoder = ImageTextEncoder(str(folder), None, tokenizer=str(folder))
    found = encoder(batch(), DRAWS)
    assert "prompt_embeds" not in found and encoder.outputs.keys() == {"frame_moments", "target_moments"}
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert tokenizer.decode(found["prompt_ids"][0], skip_special_tokens=True) == "drop the red square"
    assert found["prompt_ids"].dtype == torch.int64 and found["prompt_ids"].shape == (2, 77)
    assert tokenizer.decode(found["null_prompt_ids"][1], skip_special_tokens=True) == ""
    assert found["null_prompt_ids"].shape == (2, 77)


def test_a_long_prompt_is_cut(folder):
    data = batch()
    data["prompt"] = ["red " * 200, "red"]
    assert make(folder)(data, DRAWS)["prompt_embeds"].shape == (2, 77, 32)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_inside_float32_outside(folder, dtype):
    exact, half = make(folder)(batch(), DRAWS), make(folder, dtype=dtype)
    found = half(batch(), DRAWS)
    assert half.loaded_vae.dtype == half.loaded_text_encoder.dtype == image_encoders.DTYPES[dtype]
    for name in ("latents", "condition_latents", "prompt_embeds"):
        assert found[name].dtype == torch.float32 and not torch.equal(found[name], exact[name])
        assert (found[name] - exact[name]).square().mean() < 2e-3 * exact[name].square().mean()


def test_autocast_does_not_reach_it(folder):
    encoder = make(folder)
    expected = encoder(batch(), DRAWS)
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(batch(), DRAWS)
    assert all(torch.equal(found[name], expected[name]) for name in ("latents", "prompt_embeds"))


def test_a_step_does_not_wait_for_the_device(folder):
    encoder, data = make(folder), batch()
    encoder(data, DRAWS)  # with what is loaded
    with Waits() as waits:
        for output, field in encoder.outputs.items():
            encoder.encode(output, data.get(field, [""]))
    assert waits.count == 0


def test_values_that_are_not_finite_are_told_before_the_first_step(folder, monkeypatch):
    encoder, data = make(folder, dtype="fp16"), batch()
    shown = []

    def overflow(pixels):
        shown.append(pixels)
        parameters = torch.zeros(len(pixels), 8, 8, 8)
        parameters[1] = torch.inf
        return type("Encoded", (), {"latent_dist": type("Posterior", (), {"parameters": parameters})})

    monkeypatch.setattr(encoder.loaded_vae, "encode", overflow)
    encoded = encoder(data, DRAWS)
    with pytest.raises(UserError, match=r"frame_moments of rows \[0\] .* in fp16: set model.encoder.dtype=fp32"):
        encoder.check_network(torch.nn.Identity(), encoded)
    encoded["frame_moments"] = torch.zeros(2, 3, 8, 8, 8)
    with pytest.raises(UserError, match=r"target_moments of rows \[1\] "):
        encoder.check_network(torch.nn.Identity(), encoded)
    encoded["target_moments"] = torch.zeros(2, 8, 8, 8)
    encoder.check_network(torch.nn.Identity(), encoded)
    assert shown[0].dtype == torch.float16


def test_frozen_and_in_evaluation_mode(folder):
    encoder = make(folder)
    for network in (encoder.loaded_vae, encoder.loaded_text_encoder):
        assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())


def test_memory_is_known_before_anything_is_loaded(folder):
    encoder = make(folder, dtype="bf16")
    before = encoder.weight_bytes()
    for name, network in (("VAE", encoder.loaded_vae), ("text encoder", encoder.loaded_text_encoder)):
        assert before[name] == sum(p.numel() * p.element_size() for p in network.parameters())


def test_mistakes_are_told(folder, tmp_path):
    with pytest.raises(UserError, match="model.encoder.vae=nowhere has no vae"):
        make("nowhere")
    with pytest.raises(UserError, match="no tokenizer in"):
        ImageTextEncoder(str(folder), None, tokenizer=str(tmp_path))
    with pytest.raises(UserError, match="tokenizer must name a folder"):
        ImageTextEncoder(str(folder), None)
    with pytest.raises(UserError, match="dtype is one of fp32, bf16, fp16"):
        make(folder, dtype="half")
    with pytest.raises(UserError, match="holds a UNet2DConditionModel, not the AutoencoderKL"):
        ImageTextEncoder(str(folder / "unet"), str(folder))
    with pytest.raises(UserError, match="15x15 cannot be encoded: the VAE takes multiples of 2"):
        make(folder).encode("frame_moments", batch(side=15)["frames"])
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = copy / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        make(copy)(batch(), DRAWS)
    weights.unlink()
    (copy / "vae/diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="Only safetensors are read"):
        make(copy)


def test_weights_that_lack_a_tensor_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for part, name in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        copy = shutil.copytree(folder, tmp_path / part)
        file = copy / part / f"{name}.safetensors"
        tensors = load_file(file)
        tensors.pop(next(name for name in tensors if name.endswith("weight")))
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match="the weights do not fit config.json: 1 missing_keys"):
            make(copy)(batch(), DRAWS)


def test_released_text_encoders_have_a_prefix_and_positions(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "text_encoder/model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, file, metadata={"format": "pt"})
    torch.testing.assert_close(
        make(copy)(batch(), DRAWS)["prompt_embeds"], make(folder)(batch(), DRAWS)["prompt_embeds"]
    )
