"""LoRA on a network: what it changes, what its files mean to diffusers and peft, and what is refused."""

import json
import math

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from tests.cogvideox import CASES, DESCRIBED, RecordedDraws, noise_schedule, reference, save_transformer
from tests.golden.fill import fill, noise
from vireo import config, lora, objects
from vireo.errors import UserError
from vireo.freezing import FreezePolicy
from vireo.lora import FILE, LoRA
from vireo.losses.denoising import Denoising
from vireo.mini import world
from vireo.models.cogvideox import CogVideoX
from vireo.optimizers import adamw
from vireo.randomness import seed_default

CASE = "t2v_5b"
RANK = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_transformer(CASE, tmp_path_factory.mktemp("base"))


def adapted(folder, rank=RANK, alpha=1.0, learnt=True, dtype="fp32", **settings):
    """A network with an adapter whose B is no longer zero."""
    network = CogVideoX(str(folder), dtype)
    seed_default(0, "init", "adapter")
    LoRA(rank, alpha, **settings)(network)
    FreezePolicy([r"\.lora_"])(network)
    if learnt:
        fill({name: value for name, value in network.state_dict().items() if ".lora_B." in name})
        for name, value in network.state_dict().items():
            if ".lora_magnitude_vector." in name:
                value.mul_(1.3)
    return network


def predict(network):
    x, text = noise("x", 2, 4, 3, 6, 8), noise("text", 2, 6, 16)
    with torch.no_grad():
        return network(x, torch.tensor([10, 700]), text)


def pipeline(folder):
    """diffusers' own, of the same base."""
    base = CogVideoX(str(folder), "fp32").transformer.eval()
    vae = AutoencoderKLCogVideoX(**DESCRIBED["vae_config"])
    return CogVideoXPipeline(None, None, vae, base, CogVideoXDDIMScheduler())


def through_diffusers(folder, exported):
    """The prediction of diffusers' transformer with the exported file loaded by its pipeline."""
    made = pipeline(folder)
    made.load_lora_weights(exported)
    network = CogVideoX(str(folder), "fp32")
    network.transformer = made.transformer
    return predict(network)


def test_nothing_changes_at_first(folder):
    assert torch.equal(predict(adapted(folder, learnt=False)), predict(CogVideoX(str(folder), "fp32")))


def test_only_the_adapter_learns_and_in_float32(folder):
    network = adapted(folder, dtype="bf16")
    learns = {name: p.dtype for name, p in network.named_parameters() if p.requires_grad}
    assert len(learns) == 2 * 4 * 2 and set(learns.values()) == {torch.float32}
    assert {p.dtype for p in network.parameters() if not p.requires_grad} == {torch.bfloat16}
    network(noise("x", 1, 4, 3, 6, 8), torch.tensor([10]), noise("text", 1, 6, 16)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters() if p.requires_grad)


def test_the_same_seed_gives_the_same_start(folder):
    one, two = (adapted(folder, learnt=False).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(value.any() for name, value in one.items() if ".lora_A." in name)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"alpha": RANK},
        {"rslora": True},
        {"dora": True},
        {"targets": ["to_q", "ff.net.2", "norm1.linear", "proj_out"]},
        {"targets": r"transformer\.transformer_blocks\.1\..*to_(k|out\.0)"},
    ],
    ids=str,
)
def test_diffusers_loads_it_at_the_trained_scale(settings, folder, tmp_path):
    network = adapted(folder, **settings)
    (file,) = network.export(tmp_path, network.state_dict())
    assert file == tmp_path / FILE
    torch.testing.assert_close(through_diffusers(folder, tmp_path), predict(network), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(predict(network), predict(CogVideoX(str(folder), "fp32")), atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"rslora": True}, {"dora": True}], ids=str)
def test_the_folded_form_needs_no_header(settings, folder, tmp_path):
    network = adapted(folder, export="folded", **settings)
    network.export(tmp_path, network.state_dict())
    torch.testing.assert_close(through_diffusers(folder, tmp_path), predict(network), rtol=1e-5, atol=1e-5)
    made = pipeline(folder)
    made.load_lora_weights(load_file(tmp_path / FILE))  # the tensors alone
    bare = CogVideoX(str(folder), "fp32")
    bare.transformer = made.transformer
    torch.testing.assert_close(predict(bare), predict(network), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"rslora": True}, {"dora": True}, {"targets": ["patch_embed.proj", "to_v"]}],
    ids=str,
)
def test_the_merged_form_is_a_network_of_its_own(settings, folder, tmp_path):
    network = adapted(folder, export="merged", **settings)
    (made,) = network.export(tmp_path, network.state_dict())
    assert made == tmp_path / "transformer"
    merged = CogVideoX(str(tmp_path), "fp32")
    assert merged.state_dict().keys() == CogVideoX(str(folder), "fp32").state_dict().keys()
    torch.testing.assert_close(predict(merged), predict(network), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "words",
    [
        ["experiment=ip2p_video"],
        ["experiment=diffueraser_stage1"],
        ["experiment=diffueraser_stage2"],
        ["experiment=taehv", r"adapter.targets='encoder\..*\.conv\.2'"],
    ],
    ids=lambda words: words[0],
)
def test_where_an_export_is_always_whole_the_updates_are_in_it(words, tmp_path):
    world.ensure()
    adapter = ["adapter=lora", "freeze-policy=adapter", "adapter.rank=2", *words[1:]]
    network, plain = (objects.network(config.settings([words[0], *more])) for more in (adapter, []))
    fill({name: value for name, value in network.state_dict().items() if ".lora_B." in name})
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    plain.load(network.export(tmp_path, network.state_dict())[0])
    after, whole = plain.state_dict(), network.whole(network.state_dict())
    assert after.keys() == whole.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"{layer}.weight" for layer in lora.layers(network.state_dict())}
    for name, value in after.items():
        torch.testing.assert_close(value, whole[name].to(value.dtype))
    with pytest.raises(UserError, match=r"adapter\.export=lora: this network's export is always whole; say merged"):
        objects.network(config.settings([words[0], *adapter, "adapter.export=lora"]))


def test_the_file_is_diffusers_own(folder, tmp_path):
    network = adapted(folder, rank=RANK, alpha=2.0)
    network.export(tmp_path, network.state_dict())
    with safe_open(tmp_path / FILE, "pt") as opened:
        keys, header = list(opened.keys()), json.loads(opened.metadata()["lora_adapter_metadata"])
        assert opened.get_tensor(keys[0]).dtype == torch.float32
    assert sorted(keys) == sorted(DESCRIBED["cases"]["lora"]["saved_keys"])
    assert header["transformer.lora_alpha"] == 2.0 and header["transformer.r"] == RANK


def test_checkpointing_hides_no_key(folder, tmp_path):
    network = CogVideoX(str(folder), "fp32", gradient_checkpointing=1)
    LoRA(RANK, RANK)(network)
    predict(network)
    network.export(tmp_path, network.state_dict())
    assert sorted(load_file(tmp_path / FILE)) == sorted(DESCRIBED["cases"]["lora"]["saved_keys"])


def test_it_goes_on_from_a_file_of_another_scale(folder, tmp_path):
    network = adapted(folder, alpha=1.0)
    network.export(tmp_path, network.state_dict())
    for alpha in (1.0, 8.0):
        other = adapted(folder, alpha=alpha, learnt=False, weights=str(tmp_path))
        torch.testing.assert_close(predict(other), predict(network), rtol=1e-5, atol=1e-5)
    loaded = adapted(folder, alpha=3.0, learnt=False)
    loaded.load(tmp_path / FILE)
    torch.testing.assert_close(predict(loaded), predict(network), rtol=1e-5, atol=1e-5)


def test_the_base_can_be_replaced_below_it(folder, tmp_path):
    save_transformer(CASE, tmp_path, out_channels=4)
    network = adapted(folder)
    wanted = predict(network)
    with torch.no_grad():
        network.transformer.proj_out.weight.zero_()
        network.transformer.transformer_blocks[0].attn1.to_q.base_layer.weight.zero_()
    network.load(tmp_path)
    assert torch.equal(predict(network), wanted)


def test_as_the_published_trainer_learns(folder):
    described, stored = DESCRIBED["cases"]["lora"], reference()
    network = adapted(folder, described["r"], described["lora_alpha"], learnt=False)
    state = network.state_dict()
    fill({n: v for n, v in state.items() if ".lora_A." in n}, rename=lambda name: name.replace(".default", ""))
    loss = Denoising(noise_schedule(CASE), ["prompt_embeds"])
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    optimizer = adamw([{"params": trained}], lr=1e-2, betas=(0.9, 0.95), weight_decay=1e-4)
    shape, norms = CASES[CASE]["latents_BCFHW"][1], []
    for step, wanted in enumerate(described["losses"]):
        draws = RecordedDraws(f"d.lora{step}", [100 * step + 50, 900 - 100 * step])
        given = {
            "latents": noise(f"d.lora{step}.latents", *shape),
            "prompt_embeds": noise(f"d.lora{step}.text", 2, 6, 16),
        }
        total = loss(network, given, draws).total
        total.backward()
        norms.append(torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0))
        optimizer.step()
        optimizer.zero_grad()
        assert total.item() == pytest.approx(wanted, rel=1e-4)
    torch.testing.assert_close(torch.stack(norms), stored["lora/grad_norms"].float(), rtol=1e-3, atol=0)
    state = {name.replace(".default", "").removeprefix("transformer."): value for name, value in state.items()}
    finals = [key for key in stored if key.startswith("lora/final.")]
    assert len(finals) == 2
    for key in finals:
        torch.testing.assert_close(state[key.removeprefix("lora/final.")], stored[key], rtol=1e-3, atol=1e-4)


def test_a_policy_that_leaves_it_out_is_refused(folder):
    network = adapted(folder)
    with pytest.raises(UserError, match="nothing of the adapter learns"):
        FreezePolicy([r"proj_out"])(network)


@pytest.mark.parametrize("dora", [False, True])
def test_a_frozen_base_in_8_bits_is_nearly_the_same(dora, folder, tmp_path):
    network, small = adapted(folder, dora=dora), adapted(folder, dora=dora, float8=True)
    stored = [p for p in small.parameters() if p.dtype == torch.float8_e4m3fn]
    assert len(stored) == 2 * (4 + 2) and not any(p.requires_grad for p in stored)
    error = (predict(small) - predict(network)).abs().mean() / predict(network).abs().mean()
    assert 0 < error < 0.1
    x, text = noise("x", 2, 4, 3, 6, 8), noise("text", 2, 6, 16)
    gradients = {}
    for name, each in (("full", network), ("small", small)):
        each(x, torch.tensor([10, 700]), text).square().mean().backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in each.parameters() if p.requires_grad])
    assert torch.cosine_similarity(gradients["full"], gradients["small"], dim=0) > 0.98
    small.export(tmp_path, small.state_dict())
    assert sorted(load_file(tmp_path / FILE))
    FreezePolicy(["attn1.to_q.base_layer", "lora_"])(small)
    with pytest.raises(UserError, match="adapter.float8 stores what is frozen"):
        predict(small)


def test_dropout_is_that_of_training_and_of_the_default_generator(folder):
    network, plain = adapted(folder, dropout=0.5), adapted(folder)
    policy = FreezePolicy([r"\.lora_"])
    policy.train_mode(network)
    torch.manual_seed(3)
    one, other = predict(network), predict(network)
    torch.manual_seed(3)
    assert torch.equal(predict(network), one) and not torch.equal(one, other)
    assert torch.equal(predict(network.eval()), predict(plain))


def test_the_published_names(folder):
    words = ["experiment=opens2v_wan", "adapter=lora_published", "freeze-policy=new_modules_adapter", "adapter.r=6"]
    node = config.settings([*words, "adapter.lora_dropout=0.1", "adapter.target_modules=[to_q,to_out]"])["adapter"]
    made = config.instantiate(node)
    assert (made.rank, made.alpha, made.dropout, made.targets) == (6, 6, 0.1, ["to_q", "to_out.0"])
    with pytest.raises(UserError, match="adapter_type is lora"):
        config.instantiate({**node, "adapter_type": "loha"})


def test_a_weak_scale_is_told(caplog):
    LoRA(rank=64, alpha=1)
    assert "alpha / rank is 0.0156" in caplog.text and "Set adapter.alpha to the rank" in caplog.text
    caplog.clear()
    LoRA(rank=64, alpha=16)
    assert not caplog.text


def test_a_short_name_of_the_output(folder):
    short, full = (set(adapted(folder, targets=[name]).state_dict()) for name in ("to_out", "to_out.0"))
    assert short == full


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is at least 1"),
        ({"alpha": math.inf}, "alpha above 0"),
        ({"targets": []}, "targets names some layers"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\)"),
        ({"targets": ["to_q", "to_x"]}, r"to_x names none of the network's \d+ layers. They end in .*attn1.to_q"),
        ({"targets": "to_q"}, "to_q names none"),
        ({"export": "peft"}, "export is lora, folded, merged or null"),
    ],
)
def test_what_cannot_be_is_refused(settings, message, folder):
    with pytest.raises(UserError, match=message):
        adapted(folder, **settings)


def test_files_that_do_not_fit_are_refused(folder, tmp_path):
    network = adapted(folder, rank=2)
    network.export(tmp_path, network.state_dict())
    with pytest.raises(UserError, match="adapter.rank=4, targets and dora must be those"):
        adapted(folder, rank=4, weights=str(tmp_path))
    with pytest.raises(UserError, match="holds no adapter"):
        adapted(folder, weights=str(folder))
    with pytest.raises(UserError, match="is a LoRA: say adapter=lora"):
        CogVideoX(str(folder), "fp32").load(tmp_path)
