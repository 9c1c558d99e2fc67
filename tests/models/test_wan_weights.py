"""Wan's weights in all the layouts that there are, to and fro, and what is refused."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import wan
from tests.wan import KEY_MAP, golden, inputs, native_state, network

from vireo.checkpoint import Checkpoint
from vireo.errors import UserError
from vireo.freezing import FreezePolicy
from vireo.lora import LoRA
from vireo.models import wan_weights
from vireo.models.wan_references import is_new
from vireo.weights import frozen_digest, initialize_from, trained_state

BASE, DUAL = golden("wan_base"), golden("wan_dual")
T_BATCH = torch.tensor(BASE[0]["inputs"]["t_batch"])
NEW_MODULES = r"^clip_proj|^vae_proj|\.(k_vae|v_vae|norm_k_vae|clip_gate)(\.|$)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return wan.save_base(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """The base in Wan's own names, in a container and below prefixes as LongLive has it."""
    file = tmp_path_factory.mktemp("native") / "longlive_base.pt"
    state = {f"model._fsdp_wrapped_module.{name}": value for name, value in native_state(BASE[0]).items()}
    torch.save({"generator": state, "step": 3}, file)
    return file


@pytest.fixture(scope="module")
def half(folder):
    made = network(folder, dtype="bf16")
    FreezePolicy([NEW_MODULES])(made)
    return made


FUSED = ("to_k.weight", "to_k.bias", "to_v.weight", "to_v.bias", "norm_k.weight")


def predicted(made, **more):
    with torch.no_grad():
        return made(timesteps=T_BATCH, **inputs(), **more)


class TestNames:
    @pytest.mark.parametrize("described", [BASE[0], DUAL[0]], ids=["base", "dual"])
    def test_to_diffusers(self, described):
        assert {name: wan_weights.to_diffusers(name) for name in described["key_map"]} == described["key_map"]

    def test_to_published(self):
        assert {name: wan_weights.to_published(new) for name, new in KEY_MAP.items()} == {
            name: name for name in KEY_MAP
        }

    def test_diffusers_names_stay(self):
        assert all(wan_weights.to_diffusers(name) == name for name in KEY_MAP.values())

    def test_what_is_new(self):
        old = set(BASE[0]["key_map"].values())
        assert {name for name in KEY_MAP.values() if is_new(name)} == set(KEY_MAP.values()) - old


class TestBase:
    def test_native_files_give_what_diffusers_folders_give(self, folder, native, tmp_path):
        wanted = predicted(network(folder))
        assert torch.equal(predicted(network(folder, generator=str(native))), wanted)
        file = tmp_path / "native.safetensors"
        save_file(native_state(BASE[0]), file)
        assert torch.equal(predicted(network(folder, generator=str(file))), wanted)

    def test_the_state_can_be_bare_or_the_average(self, tmp_path):
        state = native_state(BASE[0])
        torch.save(state, tmp_path / "bare.pt")
        torch.save({"generator": state, "generator_ema": {k: v + 1 for k, v in state.items()}}, tmp_path / "both.pt")
        bare, own = wan_weights.read(tmp_path / "bare.pt"), wan_weights.read(tmp_path / "both.pt")
        average = wan_weights.read(tmp_path / "both.pt", "generator_ema")
        assert all(torch.equal(bare[name], own[name]) for name in bare)
        assert all(torch.equal(bare[name] + 1, average[name]) for name in bare)

    def test_a_network_can_take_the_average_of_its_base(self, folder, tmp_path):
        state = native_state(BASE[0])
        torch.save({"generator": {k: v + 1 for k, v in state.items()}, "generator_ema": state}, tmp_path / "both.pt")
        made = network(folder, generator=str(tmp_path / "both.pt"), generator_key="generator_ema")
        assert torch.equal(predicted(made), predicted(network(folder)))
        with pytest.raises(UserError, match=r"no weights under ema; it has generator, generator_ema"):
            network(folder, generator=str(tmp_path / "both.pt"), generator_key="ema")

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda state: state.pop("blocks.1.cross_attn.k.weight"), r"blocks\.1\.attn2\.to_k\.weight: missing"),
            (lambda state: state.update({"blocks.2.ffn.0.bias": torch.zeros(4)}), r"blocks\.2\.\S+: not used"),
            (lambda state: state.update({"head.head.bias": torch.zeros(4)}), r"proj_out\.bias: \(4,\), here \(64,\)"),
        ],
    )
    def test_a_base_that_does_not_fit_stops_the_run_with_names(self, folder, tmp_path, change, says):
        state = native_state(BASE[0])
        change(state)
        torch.save({"generator": state}, tmp_path / "base.pt")
        with pytest.raises(UserError, match=says):
            network(folder, generator=str(tmp_path / "base.pt"))

    def test_a_folder_that_lacks_a_tensor_is_refused(self, folder, tmp_path):
        made = wan.save_base(tmp_path / "cut")
        file = made / "transformer" / "diffusion_pytorch_model.safetensors"
        state = load_file(file)
        del state["blocks.0.attn2.norm_k.weight"]
        save_file(state, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match="norm_k"):
            network(made)

    def test_a_published_checkpoint_is_no_base(self, folder, tmp_path):
        torch.save({"generator": native_state(DUAL[0])}, tmp_path / "model.pt")
        with pytest.raises(UserError, match="init_from"):
            network(folder, generator=str(tmp_path / "model.pt"))

    def test_other_networks_are_refused(self, folder, tmp_path):
        (tmp_path / "config.json").write_text('{"_class_name": "CogVideoXTransformer3DModel"}')
        with pytest.raises(UserError, match="not a WanTransformer3DModel"):
            network(tmp_path)

    def test_what_is_no_weights_is_refused(self, tmp_path):
        torch.save({"optimizer": {"lr": 1.0}}, tmp_path / "odd.pt")
        torch.save({"generator": object}, tmp_path / "code.pt")
        (tmp_path / "cut.pt").write_bytes(b"PK")
        for name, says in (("odd.pt", "no weights"), ("code.pt", "pickled objects"), ("cut.pt", "cut.pt")):
            with pytest.raises(UserError, match=says):
                wan_weights.read(tmp_path / name)
        for name in ("none.pt", "model.ckpt"):
            (tmp_path / "model.ckpt").touch()
            with pytest.raises(UserError, match=name):
                wan_weights.read(tmp_path / name)


class TestLora:
    LAYERS = ("self_attn.q", "cross_attn.k", "cross_attn.v", "ffn.0")

    def lora(self, names):
        state = native_state(BASE[0])
        made = {}
        for layer in (f"blocks.{block}.{name}" for block in range(2) for name in names):
            out, into = state[f"{layer}.weight"].shape
            made[f"{layer}.lora_A.weight"] = torch.randn(3, into) / 10
            made[f"{layer}.lora_B.weight"] = torch.randn(out, 3) / 10
        return made

    def test_it_is_added_to_the_base(self, folder, native, tmp_path):
        lora = self.lora(self.LAYERS)
        named = {f"base_model.model.{name}": value for name, value in lora.items()}
        torch.save({"generator_lora": named}, tmp_path / "lora.pt")
        arguments = {"generator": str(native), "generator_lora": str(tmp_path / "lora.pt"), "lora_alpha": 6}
        plain, made = network(folder), network(folder, **arguments)
        weight, before = (n.transformer.blocks[1].attn2.to_k.weight for n in (made, plain))
        change = lora["blocks.1.cross_attn.k.lora_B.weight"] @ lora["blocks.1.cross_attn.k.lora_A.weight"]
        torch.testing.assert_close(weight, before + 2 * change)
        other = (n.transformer.blocks[1].attn2.to_q.weight for n in (made, plain))
        assert torch.equal(*other)
        on_folder = network(folder, generator_lora=str(tmp_path / "lora.pt"), lora_alpha=6)
        assert torch.equal(predicted(on_folder), predicted(made))

    def test_the_published_names_of_its_layers(self, folder, tmp_path):
        lora = self.lora(["cross_attn.k"])
        fused = {name.replace("cross_attn.k", "cross_attn.k_fused"): value for name, value in lora.items()}
        torch.save({"generator_lora": lora}, tmp_path / "one.pt")
        torch.save({"generator_lora": fused}, tmp_path / "other.pt")
        one, other = (network(folder, generator_lora=str(tmp_path / f"{name}.pt")) for name in ("one", "other"))
        assert torch.equal(predicted(one), predicted(other))
        assert not torch.equal(predicted(one), predicted(network(folder)))

    def test_a_lora_of_other_layers_is_refused(self, folder, tmp_path):
        lora = self.lora(["cross_attn.k"])
        torch.save(
            {"generator_lora": {name.replace(".1.", ".7."): v for name, v in lora.items()}}, tmp_path / "lora.pt"
        )
        with pytest.raises(UserError, match=r"2 tensors .*blocks\.7\.attn2"):
            network(folder, generator_lora=str(tmp_path / "lora.pt"))


class TestExport:
    def test_the_adapter_holds_what_is_not_the_base(self, folder, tmp_path):
        made = wan.filled(network(folder))
        FreezePolicy([NEW_MODULES])(made)
        (file,) = made.export(tmp_path, made.state_dict())
        assert file.name == "references.safetensors"
        assert load_file(file).keys() == {n for n in KEY_MAP.values() if is_new(n)} | {
            f"blocks.{number}.attn2.clip_gate" for number in range(2)
        }
        for source in (file, tmp_path):
            again = network(folder)
            again.transformer.load_state_dict(made.transformer.state_dict() | _base(again))  # its base, nothing else
            again.load(source)
            assert all(torch.equal(v, again.state_dict()[n]) for n, v in made.state_dict().items() if is_new(_inner(n)))

    def test_the_adapter_holds_what_else_was_trained(self, folder, tmp_path):
        made = wan.filled(network(folder))
        FreezePolicy([NEW_MODULES, r"attn2\.(to_k|to_v|norm_k)\."])(made)
        (file,) = made.export(tmp_path, made.state_dict())
        assert "blocks.1.attn2.to_k.weight" in load_file(file)
        again = network(folder)
        again.load(file)
        assert torch.equal(again.transformer.blocks[1].attn2.to_k.weight, made.transformer.blocks[1].attn2.to_k.weight)

    @pytest.mark.parametrize("source", ["export", "checkpoint", "published"])
    def test_what_was_trained_before_stays_in_the_exports_of_who_goes_on(self, folder, tmp_path, source):
        """First the fused path learns as well, then only the new modules do."""
        made = _on_base(folder)
        FreezePolicy([NEW_MODULES, r"attn2\.(to_k|to_v|norm_k)\."])(made)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01)
        if source == "export":
            made.export(tmp_path, made.state_dict())
            begins = tmp_path
        elif source == "checkpoint":
            save_file(trained_state(made, made.state_dict()), tmp_path / "network.safetensors")
            begins = Checkpoint(tmp_path, 1, {"frozen": frozen_digest(made)})
        else:
            begins = wan_weights.save_published(tmp_path / "model.pt", _inners(made))
        second = network(folder)
        initialize_from(second, begins)
        FreezePolicy([NEW_MODULES])(second)
        (file,) = second.export(tmp_path / "second", second.state_dict())
        fused = {f"blocks.{n}.attn2.{m}" for n in range(2) for m in FUSED}
        assert {name for name in load_file(file) if not is_new(name)} == fused
        third = network(folder)
        third.load(file)
        assert torch.equal(predicted(third), predicted(made))

    def test_a_published_checkpoint_of_the_same_base_adds_nothing_to_exports(self, folder, tmp_path):
        made = _on_base(folder)
        wan_weights.save_published(tmp_path / "model.pt", _inners(made))
        again = network(folder, dtype="bf16")
        again.load(tmp_path / "model.pt")
        FreezePolicy([NEW_MODULES])(again)
        (file,) = again.export(tmp_path, again.state_dict())
        assert all(is_new(name) for name in load_file(file))

    def test_the_published_layout(self, folder, tmp_path, caplog):
        made = wan.filled(network(folder, export_layout="published"))
        (file,) = made.export(tmp_path, made.state_dict())
        content = torch.load(file, weights_only=True)
        described = native_state(DUAL[0])
        gates = {f"blocks.{number}.cross_attn.clip_gate" for number in range(2)}
        assert content.keys() == {"generator"}
        assert content["generator"].keys() == {f"model.{name}" for name in described.keys() | gates}
        for name, value in described.items():
            torch.testing.assert_close(content["generator"][f"model.{name}"], value, rtol=0, atol=0)
        again = network(folder)
        again.load(tmp_path)
        assert torch.equal(predicted(again), predicted(made)) and not caplog.records
        with caplog.at_level(logging.WARNING):
            fresh = network(folder, export_layout="published")
            fresh.export(tmp_path, fresh.state_dict())
        assert "clip_gate" in caplog.text

    def test_a_published_checkpoint_has_gates_of_one(self, folder, tmp_path):
        state = {f"model.{name}": value for name, value in native_state(DUAL[0]).items()}
        torch.save({"generator": state, "optimizer": {}, "step": 500}, tmp_path / "model.pt")
        made = network(folder)
        made.load(tmp_path / "model.pt")
        torch.testing.assert_close(predicted(made), DUAL[1]["bidirectional"], rtol=0, atol=1e-4)

    @pytest.mark.parametrize(
        "gone", ["clip_proj.proj.3.weight", "blocks.0.cross_attn.v_vae.bias", "patch_embedding.bias"]
    )
    def test_an_incomplete_checkpoint_is_refused(self, folder, tmp_path, gone):
        state = native_state(DUAL[0])
        del state[gone]
        torch.save({"generator": state}, tmp_path / "model.pt")
        with pytest.raises(UserError, match=f"{wan_weights.to_diffusers(gone)}: missing"):
            network(folder).load(tmp_path / "model.pt")

    def test_a_base_is_no_export(self, folder, native):
        with pytest.raises(UserError, match=r"clip_proj\.\S+: missing"):
            network(folder).load(native)


class TestAdapter:
    """A LoRA of the base learns together with the new modules, and both are saved."""

    TARGETS = ("to_q", "to_k", "to_v", "to_out")

    def adapted(self, folder, form="lora", layout="adapter"):
        made = network(folder, export_layout=layout)
        LoRA(rank=2, alpha=4, targets=self.TARGETS, export=form)(made)
        FreezePolicy([NEW_MODULES, r"\.lora_"])(made)
        with torch.no_grad():
            for value in made.parameters():
                if value.requires_grad:
                    value.copy_(torch.randn_like(value) / 5)
        return made

    def test_the_published_targets_are_two_attentions_of_each_block(self, folder):
        made = self.adapted(folder)
        layers = {name.partition(".lora_")[0] for name, _ in made.named_parameters() if ".lora_" in name}
        assert len(layers) == 2 * 2 * 4 and not any("vae" in name for name in layers)
        trained = {name for name, p in made.named_parameters() if p.requires_grad}
        assert any("clip_gate" in name for name in trained) and any("lora_A" in name for name in trained)

    def test_both_are_saved_and_loaded(self, folder, tmp_path):
        made = self.adapted(folder)
        references, lora = made.export(tmp_path, made.state_dict())
        assert all(is_new(name) for name in load_file(references))
        assert all(".lora_" in name for name in load_file(lora))
        again = self.adapted(folder)
        again.load(tmp_path)
        torch.testing.assert_close(predicted(again), predicted(made))
        with pytest.raises(UserError, match="adapter=lora"):
            network(folder).load(tmp_path)

    @pytest.mark.parametrize(("form", "layout"), [("merged", "adapter"), ("lora", "published")])
    def test_it_can_be_merged(self, folder, tmp_path, form, layout):
        made = self.adapted(folder, form, layout)
        (file,) = made.export(tmp_path, made.state_dict())
        again = network(folder)
        again.load(file)
        torch.testing.assert_close(predicted(again), predicted(made), rtol=0, atol=1e-4)


class TestHalfPrecision:
    def test_only_the_frozen_base_is_half(self, half):
        kept = ("norm", "scale_shift_table", "time_embedder")
        for name, value in half.named_parameters():
            whole = value.requires_grad or any(part in name for part in kept if "attn" not in name)
            assert value.dtype == (torch.float32 if whole else torch.bfloat16), name

    def test_native_files_and_folders_agree(self, folder, native, half):
        other = network(folder, generator=str(native), dtype="bf16")
        assert torch.equal(predicted(other), predicted(half))

    def test_it_learns(self, half, folder):
        given = inputs()
        plain = half(timesteps=T_BATCH, **inputs(["prompt_embeds"]))
        assert torch.equal(half(timesteps=T_BATCH, **given), plain)
        half(timesteps=T_BATCH, **given).float().square().mean().backward()
        assert half.transformer.blocks[0].attn2.v_vae.weight.grad.abs().max() > 0
        relative = (plain - predicted(network(folder))).norm() / plain.norm()
        assert relative < 0.03


def _inner(name):
    return name.removeprefix("transformer.")


def _inners(made):
    return {_inner(name): value for name, value in made.state_dict().items()}


def _on_base(folder):
    """The base of the folder with the reference's new modules, and gates that learn."""
    made, base = network(folder), _base(network(folder))
    wan.filled(made).transformer.load_state_dict(base, strict=False)
    for block in made.transformer.blocks:
        block.attn2.clip_gate.data.fill_(0.5)
    return made


def _base(made):
    return {name: value for name, value in made.transformer.state_dict().items() if not is_new(name)}
