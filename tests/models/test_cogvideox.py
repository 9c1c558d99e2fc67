"""CogVideoX beyond its golden numbers: folders, precision, memory, and what does not fit."""

import json

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.cogvideox import CASES, batch, save_transformer
from tests.golden.fill import noise

from vireo.errors import UserError
from vireo.freezing import FreezePolicy
from vireo.lora import LoRA
from vireo.models import saved_networks
from vireo.models.cogvideox import CogVideoX, fitted_region, rotary_table
from vireo.models.transformer_blocks import compile_each


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {case: save_transformer(case, tmp_path_factory.mktemp(case)) for case in CASES}


def given_to(case):
    """A call's arguments, noisy first."""
    found = batch(case, "pipeline")
    noisy = found.pop("latents")
    return {"noisy": noisy, "timesteps": torch.tensor(CASES[case]["timesteps"]), **found}


def predict(network, case):
    with torch.no_grad():
        return network(**given_to(case))


def gradients(network, case):
    network(**given_to(case)).square().mean().backward()
    return [p.grad.clone() for p in network.parameters()]


@pytest.mark.parametrize("case", ["t2v_2b", "i2v_15"])
def test_an_export_is_diffusers_folder(case, folders, tmp_path):
    network = CogVideoX(str(folders[case]), "fp32")
    with torch.no_grad():
        network.transformer.proj_out.weight.mul_(1.5)
    (made,) = network.export(tmp_path, network.state_dict())
    again = CogVideoXTransformer3DModel.from_pretrained(made)
    assert "_name_or_path" not in (made / "config.json").read_text(), "a folder of this machine"
    path = {"_name_or_path": None}
    assert {**again.config, **path} == {**network.transformer.config, **path}
    assert torch.equal(again.proj_out.weight, network.transformer.proj_out.weight)
    other = CogVideoX(str(folders[case]), "fp32")
    other.load(tmp_path)
    assert torch.equal(predict(other, case), predict(network, case))


def test_a_large_network_is_written_in_shards(folders, tmp_path):
    large = CogVideoX(str(folders["t2v_5b"]), "fp32").transformer
    saved_networks.save(large, large.state_dict(), tmp_path, max_shard_size="30KB")
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    network = CogVideoX(str(tmp_path), "fp32")
    assert torch.equal(predict(network, "t2v_5b"), predict(CogVideoX(str(folders["t2v_5b"]), "fp32"), "t2v_5b"))


def test_an_export_has_the_dtype_that_was_loaded(folders, tmp_path):
    network = CogVideoX(str(folders["t2v_5b"]), "bf16")
    FreezePolicy(["."])(network)
    assert network.transformer.proj_out.weight.dtype == torch.float32
    (made,) = network.export(tmp_path, network.state_dict())
    stored = load_file(made / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert torch.equal(stored["proj_out.weight"].float(), network.transformer.proj_out.weight)


@pytest.mark.parametrize("case", ["t2v_2b", "i2v_5b", "i2v_15"])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_nearly_the_same(case, autocast, folders):
    full, half = (CogVideoX(str(folders[case]), dtype) for dtype in ("fp32", "bf16"))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = predict(half, case)
    error = (found.float() - predict(full, case)).abs().mean() / predict(full, case).abs().mean()
    assert 0 < error < 0.03


@pytest.mark.parametrize("every", [1, 2])
def test_what_is_computed_again_has_the_same_gradient(every, folders):
    plain, checkpointed = (CogVideoX(str(folders["i2v_15"]), "fp32", gradient_checkpointing=k) for k in (0, every))
    seen = []
    for number, block in enumerate(checkpointed.transformer.transformer_blocks):
        block.register_forward_pre_hook(lambda *_, number=number: seen.append(number))
    for one, two in zip(gradients(plain, "i2v_15"), gradients(checkpointed, "i2v_15"), strict=True):
        torch.testing.assert_close(one, two)
    assert sorted(seen) == sorted([0, 1, *range(0, 2, every)]), "chosen blocks run twice"
    assert plain.state_dict().keys() == checkpointed.state_dict().keys()


def test_compiled_blocks_compute_the_same(folders):
    plain, compiled = (CogVideoX(str(folders["t2v_5b"]), "fp32", gradient_checkpointing=k) for k in (0, 2))
    compile_each(compiled.transformer.transformer_blocks, backend="aot_eager")  # without a compiler's minutes
    for one, two in zip(gradients(plain, "t2v_5b"), gradients(compiled, "t2v_5b"), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    assert CogVideoX(str(folders["t2v_5b"]), compile=True).transformer.transformer_blocks[0]._compiled_call_impl


def test_positions_are_computed_once(folders):
    network = CogVideoX(str(folders["t2v_5b"]), "fp32")
    predict(network, "t2v_5b")
    (table,) = network.rotary_tables.values()
    predict(network, "t2v_5b")
    assert next(iter(network.rotary_tables.values())) is table
    network(noise("x", 1, 4, 5, 6, 8), torch.tensor([3]), noise("text", 1, 6, 16))
    assert len(network.rotary_tables) == 2


@given(height=st.integers(1, 40), width=st.integers(1, 60))
def test_a_grid_is_fitted_into_the_middle(height, width):
    (top, left), (bottom, right) = fitted_region((height, width), (30, 45))
    assert 0 <= top <= bottom <= 30 + 1 and 0 <= left <= right <= 45 + 1
    assert bottom - top == 30 or right - left == 45
    assert abs(top - (30 - bottom)) <= 1 and abs(left - (45 - right)) <= 1


def test_the_native_grid_has_whole_positions():
    one, two = (rotary_table(64, (3, 30, 45), base) for base in ((30, 45), None))
    for fitted, whole in zip(one, two, strict=True):
        torch.testing.assert_close(fitted, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("t2v_5b", {"prompt_embeds": torch.zeros(2, 5, 16)}, "reads 6 text tokens, padding included, and was given 5"),
        ("t2v_5b", {"image_latents": torch.zeros(2, 4, 1, 6, 8)}, "takes no picture"),
        ("i2v_5b", {"image_latents": None}, "takes a picture"),
        ("t2v_15", {"noisy": torch.zeros(2, 4, 3, 8, 6)}, "3 latent frames are no multiple of patch_size_t=2"),
        (
            "i2v_5b",
            {"noisy": torch.zeros(2, 4, 3, 8, 8), "image_latents": torch.zeros(2, 4, 1, 8, 8)},
            "table of positions for 48x64 pixels and no other size; got 64x64",
        ),
    ],
)
def test_what_does_not_fit_is_told(case, changes, message, folders):
    with pytest.raises(UserError, match=message):
        CogVideoX(str(folders[case]), "fp32")(**{**given_to(case), **changes})


def test_without_learnt_positions_any_size_will_do(folders, tmp_path):
    network = CogVideoX(str(folders["i2v_5b"]), "fp32", learned_positions=False)
    size = {"noisy": noise("x", 2, 4, 3, 8, 8), "image_latents": noise("image", 2, 4, 1, 8, 8)}
    given = {**given_to("i2v_5b"), **size}
    with torch.no_grad():
        prediction = network(**given)
    (made,) = network.export(tmp_path, network.state_dict())
    again = CogVideoX(str(tmp_path), "fp32")
    assert again.config.use_learned_positional_embeddings is False, "which diffusers' pipelines read"
    with torch.no_grad():
        assert torch.equal(again(**given), prediction)
    network.load(folders["i2v_5b"])
    with torch.no_grad():
        assert torch.equal(network(**given), prediction), "the table of the source is passed over"
    LoRA(rank=2, alpha=2)(network)
    with pytest.raises(UserError, match="adapter.export=merged"):
        network.export(tmp_path / "lora", network.state_dict())
    other = CogVideoX(str(folders["t2v_5b"]), "fp32", learned_positions=False)
    assert not other.positions_removed, "there is no table"


@pytest.mark.parametrize(
    "settings", [{"dtype": "float32"}, {"compat": "diffusers"}, {"gradient_checkpointing": -1}], ids=str
)
def test_settings_that_make_no_sense(settings, folders):
    with pytest.raises(UserError, match="dtype is one of fp32, bf16, fp16, compat pipeline or upstream"):
        CogVideoX(str(folders["t2v_2b"]), **settings)


def test_other_networks_are_refused(folders, tmp_path):
    with pytest.raises(UserError, match="has no transformer"):
        CogVideoX(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    with pytest.raises(UserError, match="holds a WanTransformer3DModel"):
        CogVideoX(str(tmp_path))
    with pytest.raises(UserError, match="does not fit this network"):
        CogVideoX(str(folders["t2v_2b"]), "fp32").load(folders["i2v_15"])
