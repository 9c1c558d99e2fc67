"""The mini world's folders of Wan, LongLive and SkyReels-A2 load as the real ones do."""

import shutil

import pytest
import torch

from vireo.mini import wan_networks, world
from vireo.models.wan_references import WanReferences


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    wan_networks.write(folder)
    vae = f"{wan_networks.WAN}/vae"
    shutil.copytree(world.SHIPPED / world.WEIGHTS[vae], folder / vae)
    return folder


def test_the_folder_is_a_pipeline_that_runs(weights):
    import diffusers

    pipeline = diffusers.WanPipeline.from_pretrained(weights / wan_networks.WAN)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        "a small red square moves up on sand", height=64, width=64, num_frames=5, num_inference_steps=2,
        output_type="np", generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    assert frames.shape == (1, 5, 64, 64, 3) and frames.std() > 0
    assert sum(p.numel() for p in pipeline.transformer.parameters()) < 500_000


def test_the_generator_has_the_names_of_longlive(weights):
    models = weights / wan_networks.LONGLIVE / "models"
    state = torch.load(models / "longlive_base.pt", weights_only=True)["generator"]
    assert "model.blocks.0.cross_attn.k.weight" in state and "model.head.modulation" in state
    made = WanReferences(
        str(weights / wan_networks.WAN), str(models / "longlive_base.pt"), generator_lora=str(models / "lora.pt"),
        mode="causal", clip_dim=32, dtype="fp32",
    )  # fmt: skip
    for name, value in made.transformer.state_dict().items():
        if name == "blocks.0.attn1.to_q.weight":
            torch.testing.assert_close(value, state["model.blocks.0.self_attn.q.weight"])


def test_weights_are_the_same_each_time(weights, tmp_path):
    torch.manual_seed(5)
    wan_networks.write(tmp_path)
    for name in (
        "Wan2.1-T2V-1.3B-Diffusers/transformer",
        "Wan2.1-T2V-1.3B-Diffusers/text_encoder",
        "SkyReels-A2/image_encoder",
    ):
        (file,) = (tmp_path / name).glob("*.safetensors")
        assert file.read_bytes() == (weights / name / file.name).read_bytes()
