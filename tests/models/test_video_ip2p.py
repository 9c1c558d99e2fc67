"""The editor's surgery, and the pipeline folders that it reads and writes."""

import json
import logging
import shutil

import diffusers
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.pipelines import save_pipeline, unet

from vireo.diffusion.noise_schedule import NoiseSchedule
from vireo.errors import UserError
from vireo.freezing import FreezePolicy
from vireo.models.transformer_blocks import compile_each
from vireo.models.video_ip2p import VideoEditor, widen, widened

SCHEDULE = NoiseSchedule()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


def inputs(frames, clips=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn(clips, 4, 8, 8, generator=generator)
    condition = 5 * torch.randn(clips, frames, 4, 8, 8, generator=generator)
    return noisy, torch.tensor([10, 900])[:clips], condition, torch.randn(clips, 7, 32, generator=generator)


def make(folder, frames=2, noise_schedule=SCHEDULE, **arguments):
    return VideoEditor(frames, str(folder), noise_schedule, **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Surgery


@given(kept=st.integers(0, 4), added=st.integers(0, 20), seed=st.integers(0, 9))
def test_a_widened_convolution_answers_as_before(kept, added, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 4 * (1 + kept), 3, 3, generator=generator)
    wide = widened(weight, kept + added)
    noisy, known = (torch.randn(1, 4 * n, 6, 6, generator=generator) for n in (1, kept))
    older = 1e3 * torch.randn(1, 4 * added, 6, 6, generator=generator)
    before = torch.conv2d(torch.cat([noisy, known], 1), weight)
    torch.testing.assert_close(torch.conv2d(torch.cat([noisy, older, known], 1), wide), before, rtol=1e-4, atol=1e-4)
    assert wide.shape == (5, 4 * (1 + kept + added), 3, 3)


@pytest.mark.parametrize("in_channels", [4, 8, 16])
@torch.no_grad()
def test_any_source_answers_as_before_whatever_older_frames_show(tmp_path, in_channels):
    unet(in_channels).save_pretrained(tmp_path / "unet")
    network, (noisy, timesteps, condition, text) = VideoEditor(6, str(tmp_path), SCHEDULE), inputs(6)
    known = in_channels // 4 - 1
    seen = torch.cat([noisy, condition[:, 6 - known :].flatten(1, 2)], 1)
    before = unet(in_channels)(seen, timesteps, encoder_hidden_states=text).sample
    torch.testing.assert_close(network(noisy, timesteps, condition, text), before, rtol=1e-5, atol=1e-5)
    condition[:, : 6 - known] = 7
    torch.testing.assert_close(network(noisy, timesteps, condition, text), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(network.unet.conv_in.bias, unet(in_channels).conv_in.bias)


def test_the_order_of_channels_is_noise_then_the_oldest_frame_first(folder):
    network, (noisy, timesteps, condition, text) = make(folder, 3), inputs(3)
    seen = []
    network.unet.conv_in.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0]))
    network(noisy, timesteps, condition, text)
    assert torch.equal(seen[0][:, :4], noisy)
    for frame in range(3):
        assert torch.equal(seen[0][:, 4 + 4 * frame : 8 + 4 * frame], condition[:, frame]), "neither scaled nor moved"


def test_older_frames_are_learnt_from_the_first_step(folder):
    network = make(folder, 3)
    assert not network.unet.conv_in.weight[:, 4:12].any()
    network(*inputs(3)).square().mean().backward()
    assert network.unet.conv_in.weight.grad[:, 4:12].abs().amax((0, 2, 3)).min() > 0


def gradients(network):
    prediction = network(*inputs(2))
    prediction.square().mean().backward()
    return [prediction, *(p.grad for p in network.parameters())]


def test_channels_may_lie_last_but_not_those_of_weights(folder):
    plain, fast = make(folder), make(folder, channels_last=True)
    seen = []
    fast.unet.conv_in.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0]))
    for one, two in zip(gradients(plain), gradients(fast), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert all(one.is_contiguous() for one in fast.state_dict().values())


def test_compiling_changes_no_name(folder):
    compiled = make(folder, compile=True)
    assert compiled.unet._compiled_call_impl and not make(folder).unet._compiled_call_impl
    assert compiled.state_dict().keys() == make(folder).state_dict().keys()


@pytest.mark.full
def test_a_compiled_unet_computes_the_same(folder):
    compiled = make(folder)
    compile_each([compiled.unet], backend="aot_eager")  # without a compiler's minutes
    for one, two in zip(gradients(make(folder)), gradients(compiled), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("in_channels", "frames", "message"),
    [(9, 3, "9 input channels.*inpainting"), (16, 2, "for 3 condition frames, more than num_condition_frames=2")],
)
def test_other_sources_are_refused(tmp_path, in_channels, frames, message):
    unet(in_channels).save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match=message):
        VideoEditor(frames, str(tmp_path), SCHEDULE)


def test_it_says_what_became_of_the_source(folder, caplog):
    with caplog.at_level(logging.INFO, "vireo"):
        make(folder, 3)
    assert "8 -> 16 channels; of 3 condition frames the last 1 keep their weights, the rest is zero" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "vireo"):
        make(folder, 1)
    assert not caplog.text, "nothing changes for one frame"


def test_the_saved_config_fits_the_saved_weights(tmp_path):
    made = unet(8)
    widen(made, 5)
    made.save_pretrained(tmp_path)
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert again.config.in_channels == 24
    assert again.state_dict().keys() == made.state_dict().keys()
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in again.state_dict().items())


def test_real_shapes():
    arguments = {"cross_attention_dim": 768, "attention_head_dim": 8}
    with torch.device("meta"):
        made = diffusers.UNet2DConditionModel(in_channels=8, **arguments)
    assert sum(p.numel() for p in made.parameters()) == 859_532_484
    assert 859_532_484 + widened(made.conv_in.weight, 20)[:, 8:].numel() == 859_751_364


# ---------------------------------------------------------------------------------------------------------------------
# Forward


def test_a_wrong_number_of_frames_is_told(folder):
    noisy, timesteps, condition, text = inputs(3)
    with pytest.raises(UserError, match="made for 2 condition frames and was given 3"):
        make(folder, 2)(noisy, timesteps, condition, text)


def test_checkpointing_changes_memory_only(folder):
    gradients = []
    for checkpointing in (False, True):
        network = make(folder, text_encoder=str(folder), gradient_checkpointing=checkpointing)
        assert network.unet.is_gradient_checkpointing == checkpointing
        assert network.text_encoder.is_gradient_checkpointing == checkpointing
        noisy, timesteps, condition, _ = inputs(2)
        network(noisy, timesteps, condition, prompt_ids=torch.arange(154).view(2, 77)).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(*gradients)


def test_weights_are_float32_under_autocast(tmp_path):
    unet(8).half().save_pretrained(tmp_path / "unet")
    network = VideoEditor(2, str(tmp_path), SCHEDULE)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = network(*inputs(2))
    prediction.float().square().mean().backward()
    assert {p.dtype for p in network.parameters()} == {p.grad.dtype for p in network.parameters()} == {torch.float32}


def test_a_text_encoder_can_learn(folder):
    network = make(folder, 2, text_encoder=str(folder))
    noisy, timesteps, condition, _ = inputs(2)
    ids = torch.randint(0, 600, (2, 77), generator=torch.Generator().manual_seed(0))
    FreezePolicy(["^unet", "^text_encoder"])(network)
    prediction = network(noisy, timesteps, condition, prompt_ids=ids)
    prediction.square().mean().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert all("k_proj.bias" in name for name in without), "attention does not see a shift of all keys"
    embeds = network.text_encoder(ids).last_hidden_state
    frozen = make(folder, 2)
    torch.testing.assert_close(frozen(noisy, timesteps, condition, embeds), prediction)


def test_parts_have_names_that_freeze_policies_match(folder):
    network = make(folder)
    FreezePolicy(["^unet"], {"conv_in": {"match": r"^unet\.conv_in", "lr_scale": 10.0}})(network)
    assert all(parameter.requires_grad for parameter in network.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def export(network, folder, scale=1.0):
    """Export with other weights than the network holds, as averaged ones are."""
    state = {name: value * scale for name, value in network.state_dict().items()}
    assert network.export(folder, state) == [folder]
    return state


def test_an_export_is_a_whole_pipeline(folder, tmp_path):
    network = make(folder, 2)
    state = export(network, tmp_path / "out", scale=0.5)
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index.pop("_class_name") == "VideoInstructPix2PixPipeline" and index.pop("num_frames") == 2
    for part, (library, name) in index.items():
        assert (tmp_path / "out" / part).is_dir()
        kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
        assert kind.from_pretrained(tmp_path / "out" / part) is not None
    assert index.keys() == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    saved = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, state[f"unet.{name}"]) for name, value in saved.items())
    again = VideoEditor(2, str(tmp_path / "out"), SCHEDULE)
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_a_trial_of_the_export_leaves_the_frozen_weights_alone(folder, tmp_path):
    def looks():
        return {file: (file.stat().st_ctime_ns, file.stat().st_nlink) for file in folder.rglob("*.safetensors")}

    network, before = make(folder), looks()
    network.try_export(tmp_path / "trial", network.state_dict())
    assert (tmp_path / "trial" / "unet" / "config.json").exists() and looks() == before
    incomplete = shutil.copytree(folder, tmp_path / "incomplete")
    shutil.rmtree(incomplete / "vae")
    with pytest.raises(UserError, match="incomplete has no vae/"):
        make(incomplete).try_export(tmp_path / "trial", network.state_dict())


def test_an_export_stays_when_its_source_goes(folder, tmp_path):
    source = save_pipeline(tmp_path / "source")
    (source / "vae/diffusion_pytorch_model.bin").write_bytes(b"pickled")
    export(make(source), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.bin")) and not any(p.is_symlink() for p in tmp_path.rglob("*"))
    source.rename(tmp_path / "elsewhere")
    assert diffusers.AutoencoderKL.from_pretrained(tmp_path / "out/vae") is not None
    export(make(tmp_path / "out"), tmp_path / "out")  # over itself
    assert diffusers.AutoencoderKL.from_pretrained(tmp_path / "out/vae") is not None


def test_where_files_cannot_be_linked_they_are_copied(folder, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("cross-device link")

    monkeypatch.setattr("os.link", refuse)
    export(make(folder), tmp_path)
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "vae" / name).read_bytes() == (folder / "vae" / name).read_bytes()


def test_a_text_encoder_that_learnt_is_exported_and_loaded(folder, tmp_path):
    network = make(folder, 2, text_encoder=str(folder))
    state = export(network, tmp_path, scale=0.5)
    saved = transformers.CLIPTextModel.from_pretrained(tmp_path / "text_encoder").state_dict()
    assert all(torch.equal(value, state[f"text_encoder.{name}"]) for name, value in saved.items())
    for path in (tmp_path, tmp_path / "unet"):
        network = make(folder, 2, text_encoder=str(folder))
        network.load(path)
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_the_exported_scheduler_is_what_was_trained_on(folder, tmp_path):
    trained = NoiseSchedule(prediction_type="v_prediction", beta_end=0.02)
    network = VideoEditor(2, str(folder), trained)
    export(network, tmp_path)
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.beta_end == 0.02


def test_another_noise_schedule_than_the_weights_is_told(folder, caplog):
    make(folder, 2)
    assert not caplog.text
    VideoEditor(2, str(folder), NoiseSchedule(prediction_type="v_prediction"))
    assert "prediction_type of the weights is epsilon, model.noise_schedule's is v_prediction" in caplog.text


def test_a_pipeline_that_does_not_say_what_it_predicts_is_told(tmp_path, caplog):
    unet(8).save_pretrained(tmp_path / "unet")
    VideoEditor(2, str(tmp_path), SCHEDULE)
    assert "prediction_type of the weights is not said" in caplog.text


def test_load_reads_exports_and_widens(folder, tmp_path):
    image = make(folder, 1)
    state = export(image, tmp_path, scale=0.5)
    for path in (tmp_path, tmp_path / "unet"):
        video = make(folder, 3)
        video.load(path)
        assert torch.equal(video.unet.conv_in.weight, widened(state["unet.conv_in.weight"], 3))
        assert torch.equal(video.unet.conv_out.weight, state["unet.conv_out.weight"])


def test_folders_that_do_not_suit_are_told(folder, tmp_path):
    with pytest.raises(UserError, match="model.network.unet=nowhere has no unet"):
        VideoEditor(2, "nowhere", SCHEDULE)
    with pytest.raises(UserError, match="holds a AutoencoderKL"):
        VideoEditor(2, str(folder / "vae"), SCHEDULE)
    with pytest.raises(UserError, match="init_from=.* has no unet"):
        make(folder).load(tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text((folder / "unet/config.json").read_text())
    with pytest.raises(UserError, match="has no weights: beside config.json there is nothing else"):
        make(tmp_path)
    unet(8).save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match="has no vae/. Set model.network.pipeline"):
        export(make(tmp_path), tmp_path / "out")
    export(make(tmp_path, pipeline=str(folder)), tmp_path / "out")
    other = unet(8, cross_attention_dim=16)
    other.save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match="does not fit this network"):
        make(folder).load(tmp_path)
