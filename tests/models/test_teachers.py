"""Frozen VAEs as teachers, each class of diffusers with a few thousand parameters."""

import json
import math
import shutil
from typing import NamedTuple

import diffusers
import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vireo.errors import UserError
from vireo.metrics import psnr
from vireo.mini import scenes, world
from vireo.models import saved_networks, teachers
from vireo.models.taehv import TAEHV, TAEHVOutput
from vireo.models.taehv_variants import lengths
from vireo.models.teacher_lengths import FAMILIES
from vireo.models.teachers import Teacher, compare_latents
from vireo.randomness import Draws

DRAWS = Draws(0, [3, 8])
SIDES = {"AutoencoderKLHunyuanVideo15": 32, "AutoencoderKLLTXVideo": 32, "AutoencoderKLLTX2Video": 64}
FAMILY = {name: family for family, known in FAMILIES.items() for name in known.classes}
COGVIDEOX, WAN, HUNYUAN, HUNYUAN15, LTX, LTX2 = FAMILY


def build(name, **changes):
    """A random VAE of that class whose latent statistics are unlike anybody's default."""
    ltx = {"latent_channels": 4, "block_out_channels": (8,) * 4, "layers_per_block": (1,) * 5, "scaling_factor": 0.5}
    arguments = {
        COGVIDEOX: {
            "block_out_channels": (4,) * 4,
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
            "layers_per_block": 1,
            "latent_channels": 16,
            "norm_num_groups": 2,
            "scaling_factor": 0.7,
        },
        WAN: {
            "base_dim": 4,
            "z_dim": 16,
            "dim_mult": [1] * 4,
            "num_res_blocks": 1,
            "latents_mean": [0.1 * k for k in range(16)],
            "latents_std": [0.5 + 0.1 * k for k in range(16)],
        },
        HUNYUAN: {"latent_channels": 16, "block_out_channels": (4,) * 4, "layers_per_block": 1, "norm_num_groups": 2},
        HUNYUAN15: {"latent_channels": 4, "block_out_channels": (8,) * 5, "layers_per_block": 1},
        LTX: {**ltx, "decoder_block_out_channels": (8,) * 4, "decoder_layers_per_block": (1,) * 5},
        LTX2: {**ltx, "decoder_block_out_channels": (8, 16, 32), "decoder_layers_per_block": (1,) * 4},
    }
    torch.manual_seed(0)
    vae = getattr(diffusers, name)(**{**arguments[name], **changes}).eval()
    if "LTX" in name:
        vae.latents_mean.copy_(torch.linspace(-0.5, 0.5, 4))
        vae.latents_std.copy_(torch.linspace(0.5, 2, 4))
    return vae


class Saved(NamedTuple):
    name: str
    folder: str

    def teacher(self, latent_space="raw", **arguments):
        return Teacher(FAMILY[self.name], self.folder, latent_space, **{"dtype": "fp32", **arguments})

    def vae(self):
        return getattr(diffusers, self.name).from_pretrained(self.folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(name)`: a VAE of that class in a folder, made once."""
    made = {}

    def save(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            build(name).save_pretrained(folder)
            made[name] = Saved(name, str(folder))
        return made[name]

    return save


def batch(frames=9, side=16, clips=2):
    generator = torch.Generator().manual_seed(1)
    shape = (clips, frames, 3, side, side)
    return {"frames": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)}


def pixels(data):
    """What diffusers takes: (B, 3, T, H, W) in [-1, 1]."""
    return (data["frames"].float() / 255 * 2 - 1).transpose(1, 2)


def latents(teacher, data, draws=DRAWS):
    return teacher(data, draws)["target_latents"]


# ---------------------------------------------------------------------------------------------------------------------
# Lengths and scales


@pytest.mark.parametrize(
    ("name", "table"),
    [
        (COGVIDEOX, "5-2-8 8-2-8 9-3-9 12-3-9 13-4-16 16-4-16 17-5-17 20-5-17 25-7-25"),
        (WAN, "1-1-1 9-3-9 12-3-9 13-4-13 17-5-17"),
        (HUNYUAN, "1-1-1 9-3-9 12-3-9 13-4-13 17-5-17 21-6-21"),
        (HUNYUAN15, "9-3-9 13-4-13"),
        (LTX, "1-1-1 9-2-9 12-2-9 17-3-17"),
        (LTX2, "9-2-9 17-3-17"),
    ],
)
def test_lengths_as_they_were_measured(saved, name, table):
    teacher = saved(name).teacher()
    for row in table.split():
        frames, latent_frames, decoded = map(int, row.split("-"))
        found = latents(teacher, batch(frames, SIDES.get(name, 16), clips=1), Draws(0, [0]))
        assert found.shape[2] == latent_frames
        assert teacher.decode(found).shape[1] == decoded
        assert lengths(FAMILIES[FAMILY[name]].twin, frames) == (latent_frames, decoded)


def test_which_frames_a_latent_of_wan_has_seen(saved):
    teacher, data = saved(WAN).teacher(), batch(12)
    before = latents(teacher, data)
    data["frames"][:, 9:] = 0
    assert torch.equal(latents(teacher, data), before), "the last three of twelve frames are in no latent"
    data["frames"][:, 5:] = 0
    after = latents(teacher, data)
    assert torch.equal(after[:, :, :2], before[:, :, :2])
    assert not torch.allclose(after[:, :, 2], before[:, :, 2])


@pytest.mark.parametrize("name", FAMILY)
def test_both_scales_and_back(saved, name):
    data, vae = batch(side=SIDES.get(name, 16)), saved(name).vae()
    vae.enable_slicing()
    with torch.no_grad():
        expected = vae.encode(pixels(data)).latent_dist.mode()
        decoded = (vae.decode(expected).sample.transpose(1, 2) / 2 + 0.5).clamp(0, 1)
    if name == WAN:
        mean, std, scale = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std), 1.0
    elif "LTX" in name:
        mean, std, scale = vae.latents_mean, vae.latents_std, 0.5
    else:
        mean, std, scale = torch.zeros(1), torch.ones(1), vae.config.scaling_factor
    scaled = (expected - mean.view(-1, 1, 1, 1)) * scale / std.view(-1, 1, 1, 1)
    assert not torch.allclose(scaled, expected, rtol=1e-2)
    for space, wanted in (("raw", expected), ("diffusion", scaled)):
        teacher = saved(name).teacher(space)
        found = latents(teacher, data)
        assert found.dtype == torch.float32 and not found.requires_grad
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        frames = teacher.decode(found)
        assert frames.dtype == torch.float32 and frames.shape == data["frames"].shape
        torch.testing.assert_close(frames, decoded, rtol=1e-4, atol=1e-4)


def test_a_sample_is_drawn_by_position(saved):
    data = batch()
    mode = latents(saved(WAN).teacher(), data)
    teacher = saved(WAN).teacher(posterior="sample")
    sample = latents(teacher, data)
    std = saved(WAN).vae().encode(pixels(data)).latent_dist.std
    noise = DRAWS.normal("posterior", *mode.shape[1:])
    torch.testing.assert_close(sample, mode + std * noise)
    assert not torch.allclose(sample, mode)
    alone = latents(teacher, {"frames": data["frames"][1:]}, Draws(0, [8]))
    torch.testing.assert_close(alone, sample[1:])


def test_clips_are_never_tiled_in_time(saved):
    data = batch(21)
    vae = saved(HUNYUAN).vae()
    with torch.no_grad():
        whole = vae.quant_conv(vae.encoder(pixels(data))).chunk(2, dim=1)[0]
        tiled = vae.encode(pixels(data)).latent_dist.mode()
    found = latents(saved(HUNYUAN).teacher(), data)
    torch.testing.assert_close(found, whole)
    assert not torch.allclose(found, tiled, atol=1e-3), "the default of diffusers has seams, else this tests nothing"


# ---------------------------------------------------------------------------------------------------------------------
# Frozen, lazy, cheap


def test_it_is_loaded_once_and_when_it_is_needed(saved, monkeypatch):
    calls, load = [], teachers.load
    monkeypatch.setattr(teachers, "load", lambda *arguments: calls.append(arguments) or load(*arguments))
    teacher = saved(WAN).teacher()
    teacher.to(torch.device("cpu"))
    teacher.identity("target_latents")
    assert not calls
    state = torch.get_rng_state()
    latents(teacher, batch())
    teacher.decode(latents(teacher, batch()))
    assert len(calls) == 1
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn, lest a resumed run differs"
    assert not teacher.loaded.vae.training
    assert not any(parameter.requires_grad for parameter in teacher.loaded.vae.parameters())
    teacher.to(torch.device("cpu"))
    latents(teacher, batch())
    assert len(calls) == 2, "it is where it was told to be"


@pytest.mark.parametrize("name", [COGVIDEOX, WAN, HUNYUAN, LTX])
def test_one_clip_at_a_time_changes_nothing(saved, name):
    data = batch(side=SIDES.get(name, 16))
    whole, sliced = saved(name).teacher(), saved(name).teacher(slicing=True)
    found = latents(sliced, data)
    assert sliced.loaded.vae.use_slicing and not whole.loaded.vae.use_slicing
    torch.testing.assert_close(found, latents(whole, data))
    torch.testing.assert_close(sliced.decode(found), whole.decode(found), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [COGVIDEOX, WAN])
def test_half_precision_inside_float32_outside(saved, name):
    exact, half = saved(name).teacher("diffusion"), saved(name).teacher("diffusion", dtype="bf16")
    found = latents(half, batch())
    assert half.loaded.vae.dtype == torch.bfloat16
    assert found.dtype == half.decode(found).dtype == torch.float32
    expected = latents(exact, batch())
    assert (found - expected).square().mean() < 1e-3 * expected.square().mean()
    assert not torch.equal(found, expected)


def test_autocast_does_not_reach_the_teacher(saved):
    teacher = saved(WAN).teacher()
    expected = latents(teacher, batch())
    frames = teacher.decode(expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(latents(teacher, batch()), expected)
        assert torch.equal(teacher.decode(expected), frames)


def test_a_teacher_that_fails_fails_the_run(saved, monkeypatch):
    teacher = saved(WAN).teacher()
    monkeypatch.setattr(teacher.loaded.vae, "encode", lambda x: (_ for _ in ()).throw(RuntimeError("no kernel")))
    with pytest.raises(RuntimeError, match="no kernel"):
        latents(teacher, batch())


def test_the_other_fields_of_the_batch_stay(saved):
    data = {**batch(), "name": ["a", "b"]}
    assert saved(WAN).teacher()(data, DRAWS).keys() == {"frames", "name", "target_latents"}


@pytest.mark.parametrize(("name", "family"), [("autoencoder_kl_cogvideox", "cogvideox"), ("autoencoder_kl_wan", "wan")])
def test_the_small_vaes_of_the_mini_world_show_the_clip(name, family):
    teacher = Teacher(family, str(world.SHIPPED / name), "diffusion", dtype="fp32")
    clip = torch.from_numpy(scenes.render(scenes.scene(2_000_000)))[-9:].permute(0, 3, 1, 2)[None].contiguous()
    found = latents(teacher, {"frames": clip}, Draws(0, [0]))
    assert found.shape == (1, 16, 3, 8, 8) and 0.5 < found.std() < 2
    assert psnr(teacher.decode(found), clip / 255).item() > 20


# ---------------------------------------------------------------------------------------------------------------------
# Folders and files


def test_a_pipelines_folder_has_it_below(saved, tmp_path):
    shutil.copytree(saved(WAN).folder, tmp_path / "Wan" / "vae")
    (tmp_path / "Wan" / "config.json").write_text('{"_class_name": "WanModel"}')
    teacher = Teacher("wan", str(tmp_path / "Wan"), "raw", dtype="fp32")
    assert torch.equal(latents(teacher, batch()), latents(saved(WAN).teacher(), batch()))


def test_an_id_of_the_hub_is_fetched_at_first_use(saved, monkeypatch):
    calls = []

    def snapshot_download(repository, allow_patterns):
        calls.append((repository, allow_patterns))
        return saved(WAN).folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    teacher = Teacher("wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "raw", dtype="fp32")
    assert not calls
    assert torch.equal(latents(teacher, batch()), latents(saved(WAN).teacher(), batch()))
    ((repository, patterns),) = calls
    assert repository == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert "vae/diffusion_pytorch_model.safetensors" in patterns
    assert all(pattern.endswith((".safetensors", ".json")) for pattern in patterns)


def test_a_hub_that_does_not_answer(monkeypatch):
    def snapshot_download(repository, allow_patterns):
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match="vae=someone/something is no folder here, and the .* hub .*: offline"):
        latents(Teacher("wan", "someone/something", "raw"), batch())


def test_shards(saved, tmp_path):
    build(WAN).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    teacher = Teacher("wan", str(tmp_path), "raw", dtype="fp32")
    assert torch.equal(latents(teacher, batch()), latents(saved(WAN).teacher(), batch()))
    next(tmp_path.glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(UserError, match="lacks diffusion_pytorch_model-00002-of"):
        Teacher("wan", str(tmp_path), "raw")


def test_no_folder_names_where_was_looked(tmp_path):
    with pytest.raises(UserError, match=rf"neither {tmp_path}/x/vae/config.json nor {tmp_path}/x/config.json"):
        Teacher("wan", str(tmp_path / "x"), "raw")


def test_the_config_says_another_class(saved, tmp_path):
    with pytest.raises(UserError, match="AutoencoderKLWan, which is of family wan; model.encoder.family is cogvideox"):
        Teacher("cogvideox", saved(WAN).folder, "raw")
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(UserError, match=r"AutoencoderKL, which is no teacher; there are .*AutoencoderKLWan \(wan\)"):
        Teacher("wan", str(tmp_path), "raw")


def test_pickled_weights_are_not_read(saved, tmp_path):
    shutil.copy(f"{saved(WAN).folder}/config.json", tmp_path)
    torch.save(build(WAN).state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="no weights: beside .* there is diffusion_pytorch_model.bin.*can run code"):
        Teacher("wan", str(tmp_path), "raw")


def test_damaged_and_incomplete_weights(saved, tmp_path):
    shutil.copy(f"{saved(WAN).folder}/config.json", tmp_path)
    (tmp_path / saved_networks.WEIGHTS[0]).write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match="weights of this AutoencoderKLWan cannot be loaded"):
        latents(Teacher("wan", str(tmp_path), "raw"), batch())
    vae = build(WAN)
    vae.quant_conv = nn.Identity()
    vae.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"do not fit config.json: 2 missing_keys \(quant_conv"):
        latents(Teacher("wan", str(tmp_path), "raw"), batch())


def test_weights_of_another_size(saved, tmp_path):
    build(WAN, base_dim=8).save_pretrained(tmp_path)
    shutil.copy(f"{saved(WAN).folder}/config.json", tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)):
        latents(Teacher("wan", str(tmp_path), "raw"), batch())


@pytest.mark.parametrize("arguments", [{"latent_space": "scaled"}, {"posterior": "mean"}, {"dtype": "fp16"}])
def test_impossible_settings(saved, arguments):
    with pytest.raises(UserError, match="latent_space is raw or diffusion, its posterior mode or sample, its dtype"):
        saved(WAN).teacher(**arguments)
    with pytest.raises(UserError, match="Unknown family"):
        Teacher("vae", saved(WAN).folder, "raw")


@pytest.mark.parametrize("denoising", [{"timestep_conditioning": True}, {"decoder_inject_noise": (True,) * 5}])
def test_a_decoder_that_denoises_is_not_asked(tmp_path, denoising):
    build(LTX, **denoising).save_pretrained(tmp_path)
    teacher = Teacher("ltx", str(tmp_path), "raw", dtype="fp32")
    found = latents(teacher, batch(side=32))
    with pytest.raises(UserError, match=r"denoises .* \+model.sampler.teacher_decoder=false"):
        teacher.decode(found)


def test_identity_is_that_of_content_and_settings(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved(WAN).folder, folder)
    original = saved(WAN).teacher().identity("target_latents")
    copied = Saved(WAN, str(folder))
    assert copied.teacher().identity("target_latents") == original
    for changes in ({"latent_space": "diffusion"}, {"posterior": "sample"}, {"dtype": "bf16"}):
        assert copied.teacher(**changes).identity("target_latents") != original
    assert copied.teacher(slicing=True).identity("target_latents") == original
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_diffusers_version": "9"}))
    assert copied.teacher().identity("target_latents") == original
    (folder / "config.json").write_text(json.dumps({**config, "latents_std": [1.0] * 16}))
    assert copied.teacher().identity("target_latents") != original
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / saved_networks.WEIGHTS[0]
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert copied.teacher().identity("target_latents") != original
    with pytest.raises(KeyError, match="no output 'moments'"):
        copied.teacher().identity("moments")


# ---------------------------------------------------------------------------------------------------------------------
# The scale of the student's latents


def test_figures_of_latents():
    z = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    same = compare_latents(z, z)
    assert {name: value.shape for name, value in same.items()} == dict.fromkeys(same, torch.Size([2]))
    assert [round(float(value[1]), 6) for value in same.values()] == [0, 1, 1, 0, 1]
    scaled = compare_latents(3 * z, z)
    torch.testing.assert_close(scaled["latent_correlation"], same["latent_correlation"])
    torch.testing.assert_close(scaled["latent_std_ratio"], torch.full((2,), 3.0, dtype=torch.float64))
    assert (scaled["latent_r2"] < -2).all()
    std = z.double().flatten(2).var(2, correction=0).mean(1).sqrt()
    moved = compare_latents(z + 2, z)
    torch.testing.assert_close(moved["latent_mse"], torch.full((2,), 4.0, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(moved["latent_mean_shift"], 2 / std, rtol=1e-5, atol=0)
    means = compare_latents(z.mean((2, 3, 4), keepdim=True).expand_as(z), z)
    torch.testing.assert_close(means["latent_r2"], torch.zeros(2, dtype=torch.float64), atol=1e-6, rtol=0)
    assert all(torch.isfinite(value).all() for value in compare_latents(torch.zeros_like(z), 0 * z).values())


@settings(deadline=None, max_examples=50)
@given(st.floats(0.75, 0.999), st.floats(-1.5, 1.5).filter(lambda x: abs(x) > 0.13))
def test_the_right_scale_fits_better_however_good_the_student_is(correlation, log_scale):
    """A student that was trained by squared error is the conditional mean: it shrinks, the more the worse it is."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 4, 4, 16, 16, generator=generator)
    noise = torch.randn(z.shape, generator=generator)
    student = correlation * (correlation * z + math.sqrt(1 - correlation**2) * noise)
    right = compare_latents(student, z)["latent_r2"]
    wrong = compare_latents(student, math.exp(log_scale) * z)["latent_r2"]
    assert right > 0.5 and right > wrong


class Student(nn.Module):
    """Gives the latents that it was made with."""

    def __init__(self, latents):
        super().__init__()
        self.latents = latents

    def forward(self, frames, *, decode):
        assert not decode and frames.min() >= 0 and frames.max() <= 1
        return TAEHVOutput(self.latents, None)


@pytest.mark.parametrize("name", [COGVIDEOX, WAN, HUNYUAN, LTX])
@pytest.mark.parametrize("space", ["raw", "diffusion"])
def test_a_student_of_the_other_space_is_stopped(saved, name, space):
    data = batch(side=SIDES.get(name, 16))
    other = "diffusion" if space == "raw" else "raw"
    teacher = saved(name).teacher(space)
    data = teacher(data, DRAWS)
    z = latents(saved(name).teacher(other), data)
    stranger = Student(z + 0.05 * z.std() * torch.randn(z.shape, generator=torch.Generator().manual_seed(0)))
    message = f"latent_space={space}, but the network's weights were made for {other} .*Set .*latent_space={other}"
    with pytest.raises(UserError, match=message):
        teacher.check_network(stranger, data)
    saved(name).teacher(space, strict_space=False).check_network(stranger, data)
    saved(name).teacher(other).check_network(stranger, saved(name).teacher(other)(data, DRAWS))


def test_a_fresh_student_knows_neither_space_and_passes(saved, caplog):
    torch.manual_seed(0)
    network = TAEHV("taew2_1", encoder_width=4, decoder_widths=(4, 4, 4, 4), num_memblocks=1)
    teacher = saved(WAN).teacher("diffusion")
    with caplog.at_level("INFO", logger="vireo.models.teachers"):
        teacher.check_network(network, teacher(batch(), DRAWS))
    assert "correlation" in caplog.text and "as raw ones mse" in caplog.text


def test_a_student_of_another_size_is_told_so(saved):
    teacher = saved(WAN).teacher()
    with pytest.raises(UserError, match=r"makes latents \(2, 48, 3, 1, 1\).* its teacher .*\(2, 16, 3, 2, 2\)"):
        teacher.check_network(Student(torch.zeros(2, 48, 3, 1, 1)), teacher(batch(), DRAWS))
