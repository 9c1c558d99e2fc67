"""The shipped autoencoders load as released ones do and are as good as the figures beside them say."""

import json

import pytest

torch = pytest.importorskip("torch")

from vireo.mini import networks, wan_networks, world  # noqa: E402
from vireo.mini import train_autoencoders as training  # noqa: E402
from vireo.mini.autoencoders import RECIPES  # noqa: E402

# dB on clips that were never trained on
AT_LEAST = {"kl": 28.0, "cogvideox": 25.0, "wan": 25.0, "taehv": 24.3, "taehv_distilled": 24.3}


@pytest.fixture(scope="module")
def pixels():
    return training.to_pixels(training.clips(training.HELD_OUT_SEEDS[:3])[:, -9:])


def load(name: str) -> torch.nn.Module:
    folder = training.WEIGHTS / RECIPES[name].folder
    if name.startswith("taehv"):
        from vireo.models.taehv import TAEHV

        arguments = json.loads((folder / "taecvx.json").read_text())
        return TAEHV(**arguments, weights=str(folder / "taecvx.safetensors"))
    import diffusers

    made = getattr(diffusers, json.loads((folder / "config.json").read_text())["_class_name"])
    return made.from_pretrained(folder, torch_dtype=torch.float32)


@pytest.mark.parametrize("name", AT_LEAST)
def test_shipped_weights_are_as_good_as_stated(name, pixels):
    folder = training.WEIGHTS / RECIPES[name].folder
    figures = json.loads((folder / "figures.json").read_text())
    network = load(name)
    assert all(p.dtype == torch.float32 for p in network.parameters())
    quality = training.psnr(training.reconstruct_all(network, RECIPES[name], pixels), pixels)
    stated = torch.tensor(figures["held_out_psnr_per_clip"][: len(pixels)])
    assert (quality - stated).abs().max() < 0.5
    assert figures["held_out_psnr"] > AT_LEAST[name]
    assert figures["held_out_psnr"] > figures["baselines"]["down_and_up_8x"]
    assert quality.mean() > sum(training.baselines(pixels).values()) / 2  # and on these clips, above both's middle


@pytest.mark.parametrize("name", AT_LEAST)
def test_files_are_small(name):
    files = list((training.WEIGHTS / RECIPES[name].folder).glob("*.safetensors"))
    assert len(files) == 1
    assert files[0].stat().st_size <= 1_000_000


@pytest.mark.parametrize("name", ["kl", "cogvideox", "wan"])
def test_scaled_latents_have_about_unit_variance(name):
    network = load(name)
    mean, std = training.latent_statistics(network, RECIPES[name], num_clips=12)  # 64 were used for the config
    if name == "wan":
        stated_mean, stated_std = torch.tensor(network.config.latents_mean), torch.tensor(network.config.latents_std)
        assert ((mean - stated_mean) / stated_std).abs().max() < 0.3
        assert (std / stated_std - 1).abs().max() < 0.15
    else:
        overall = (std.square() + (mean - mean.mean()).square()).mean().sqrt().item()
        assert abs(overall * network.config.scaling_factor - 1) < 0.1


def test_every_shipped_folder_is_used_by_the_world():
    shipped = {path.name for path in world.SHIPPED.iterdir() if path.is_dir()}
    transformers = {module.SHIPPED_TRANSFORMER.name for module in (networks, wan_networks)}  # `networks` uses them
    assert shipped - transformers == {recipe.folder for recipe in RECIPES.values()}
    begun_as = "taehv_autoencoder"  # the distilled one
    assert set(world.WEIGHTS.values()) == shipped - transformers - {begun_as}
