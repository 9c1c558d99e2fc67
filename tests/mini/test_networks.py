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
