"""The mini world's editor is a pipeline folder that diffusers and transformers load."""

import shutil

import pytest

from vireo.mini import networks, world

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / networks.EDITOR
    networks.write_editor(folder)
    shutil.copytree(world.SHIPPED / world.WEIGHTS["instruct-pix2pix/vae"], folder / "vae")
    return folder


def test_the_whole_folder_loads_as_a_pipeline_and_runs(editor):
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(editor)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        "move the red square up", image=torch.zeros(1, 3, 64, 64), num_inference_steps=2, output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert picture.shape == (1, 64, 64, 3) and picture.std() > 0
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.beta_schedule == "scaled_linear"


def test_the_unet_has_the_measured_size(editor):
    unet, info = diffusers.UNet2DConditionModel.from_pretrained(editor / "unet", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert unet.config.in_channels == 8
    extra = 76 * 64 * 9  # of the first convolution with 84 channels
    assert sum(p.numel() for p in unet.parameters()) + extra == 2_197_316


def test_the_text_encoder_fits_the_tokenizer(editor):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(editor / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(editor / "text_encoder").eval()
    assert encoder.config.vocab_size == len(tokenizer) and encoder.config.eos_token_id == tokenizer.eos_token_id
    texts = ["move the red square up", "move the red square down", ""]
    with torch.no_grad():
        states = encoder(**tokenizer(texts, padding="max_length", return_tensors="pt")).last_hidden_state
    assert states.shape == (3, 77, 32)
    assert all((states[i] - states[j]).abs().max() > 0.1 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_weights_are_the_same_each_time(editor, tmp_path):
    torch.manual_seed(5)
    networks.write_editor(tmp_path)
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (editor / name).read_bytes()


@pytest.fixture(scope="module")
def cogvideox(tmp_path_factory):
    """The five pipelines, with the VAEs that the world puts beside them."""
    weights = tmp_path_factory.mktemp("cogvideox")
    for name in networks.COGVIDEOX:
        networks.write_cogvideox(weights / name, name)
        shutil.copytree(world.SHIPPED / world.WEIGHTS[f"{name}/vae"], weights / name / "vae")
    return weights


@pytest.mark.parametrize("name", networks.COGVIDEOX)
def test_each_cogvideox_loads_as_a_pipeline_and_runs(cogvideox, name):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(cogvideox / name)
    pipeline.set_progress_bar_config(disable=True)
    image = {"image": torch.zeros(1, 3, 64, 64)} if "I2V" in name else {}
    video = pipeline(
        prompt="a red square", num_inference_steps=1, num_frames=9, height=64, width=64, max_sequence_length=24,
        output_type="pt", generator=torch.Generator().manual_seed(0), **image,
    ).frames  # fmt: skip
    assert video.shape == (1, 9, 3, 64, 64) and video.std() > 0
    assert pipeline.scheduler.config.snr_shift_scale == (3.0 if name.endswith("2b") else 1.0)


def test_the_transformers_are_small_and_differ_as_the_real_ones_do(cogvideox):
    made = {
        name: diffusers.CogVideoXTransformer3DModel.from_pretrained(cogvideox / name / "transformer")
        for name in networks.COGVIDEOX
    }
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in made.items()}
    assert counts["CogVideoX-5b"] < 490_000, "what is shipped takes less than 1 MB in half precision"
    assert max(counts.values()) < 520_000
    configs = {name: network.config for name, network in made.items()}
    assert [c.patch_size_t for c in configs.values()] == [None, None, None, 2, 2]
    assert [c.in_channels for c in configs.values()] == [16, 16, 32, 16, 32]
    assert [c.use_rotary_positional_embeddings for c in configs.values()] == [False, True, True, True, True]
    assert configs["CogVideoX1.5-5B-I2V"].ofs_embed_dim == networks.TRANSFORMER["time_embed_dim"]


@torch.no_grad()
@pytest.mark.parametrize("name", networks.COGVIDEOX)
def test_trained_weights_serve_the_other_models_as_far_as_they_fit(cogvideox, name):
    """Told nothing of a picture and, with two frames a token, of one frame twice, they predict what they predicted."""
    kind = diffusers.CogVideoXTransformer3DModel
    trained = kind.from_pretrained(cogvideox / "CogVideoX-5b" / "transformer")
    trained.half().float().patch_embed.proj.bias.zero_()  # which 1.5 does not have
    other = kind.from_pretrained(cogvideox / name / "transformer")
    other.load_state_dict(networks.fitted(other.state_dict(), {k: v.half() for k, v in trained.state_dict().items()}))
    other.patch_embed.use_positional_embeddings = other.patch_embed.use_learned_positional_embeddings = False
    frames, channels = other.config.patch_size_t or 1, other.config.in_channels
    noisy, picture = torch.randn(2, 1, frames, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy = noisy[:, :1].expand(-1, frames, -1, -1, -1)
    given = torch.cat([noisy, picture], dim=2)[:, :, :channels]
    text = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(1))
    options = {"image_rotary_emb": (torch.ones(16, 32), torch.zeros(16, 32)), "return_dict": False}  # no rotation
    ofs = torch.full((1,), 2.0) if other.config.ofs_embed_dim else None
    found = other(given, text, torch.tensor([500]), ofs=ofs, **options)[0]
    expected = trained(noisy[:, :1], text, torch.tensor([500]), **options)[0]
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-4, atol=1e-4)
