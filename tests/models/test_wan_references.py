"""Wan with reference images, by the published modules' numbers and by what must hold for any weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import WanTransformer3DModel
from tests import wan
from tests.golden.fill import fill, noise
from tests.wan import CLIP_DIM, golden, inputs, network

from vireo import config
from vireo.errors import UserError
from vireo.freezing import FreezePolicy
from vireo.lora import LoRA
from vireo.models.wan_attention import Context, DualCrossAttention, KeyValueCache, add_modules
from vireo.models.wan_references import (
    Projection,
    WanReferences,
    add_references,
    grid_positions,
    initialize,
    is_new,
)

BASE, DUAL = golden("wan_base"), golden("wan_dual")
T_BATCH = torch.tensor(BASE[0]["inputs"]["t_batch"])
T_FRAMES = torch.tensor(BASE[0]["inputs"]["t_per_frame"])
REAL = {"num_attention_heads": 12, "attention_head_dim": 128, "text_dim": 4096, "ffn_dim": 8960, "num_layers": 30}
REFERENCES = ("reference_clip", "reference_latents")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return wan.save_base(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def fresh(folder):
    return network(folder)


@pytest.fixture(scope="module")
def full(folder):
    return wan.filled(network(folder))


def close(found, wanted, tolerance=1e-4):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def causal(made, folder, group, window=None, sink=0):
    """A causal twin with the same weights."""
    twin = network(folder, mode="causal", group_frames=group, window_frames=window, sink_frames=sink)
    twin.load_state_dict(made.state_dict())
    return twin


class TestGolden:
    def test_attention_block(self):
        described, reference = golden("dual_attention")
        heads, dim = described["config"]["heads"], described["config"]["dim"]
        block = WanTransformer3DModel(**wan.CONFIG["diffusers"] | {"num_layers": 1}).blocks[0].attn2
        assert (block.heads, block.to_q.in_features) == (heads, dim)
        add_modules(block)
        block.set_processor(DualCrossAttention(0))
        names = {"to_out.0": "o", "to_q": "q", "to_k": "k_fused", "to_v": "v_fused", "norm_k": "norm_k_fused"}

        def published(name):
            module, _, leaf = name.rpartition(".")
            return f"{names.get(module, module)}.{leaf}"

        fill(block, rename=published)
        block.clip_gate.data.fill_(1)
        given = described["inputs"]
        x, fused, vae = (noise(*given[name]) for name in ("x", "fused", "vae"))
        context = Context(text=fused[:, :3], clip=fused[:, 3:], latents=vae)
        close(block(x, context), reference["both"], described["tolerance"])
        close(block(x, context._replace(latents=None)), reference["fused_only"], described["tolerance"])
        close(block(x, fused), reference["fused_only"], described["tolerance"])

    @pytest.mark.parametrize("name", ["clip_proj", "vae_proj"])
    def test_projections(self, name):
        described, reference = golden("dual_attention")
        given = noise(*described["inputs"][f"{name} input"])
        made = fill(Projection(given.shape[-1], described["config"]["dim"]))
        close(made(given), reference[name], described["tolerance"])

    @torch.no_grad()
    def test_base(self, fresh):
        close(fresh(timesteps=T_BATCH, **inputs()), BASE[1]["t_batch"])
        close(fresh(timesteps=T_FRAMES, **inputs()), BASE[1]["t_per_frame"])

    @pytest.mark.parametrize(("group", "window"), [(1, None), (3, None), (2, 3)])
    @torch.no_grad()
    def test_causal_base(self, folder, fresh, group, window):
        made = causal(fresh, folder, group, window)
        close(made(timesteps=T_FRAMES, **inputs()), BASE[1][f"causal_nf{group}_win{window or -1}_t_per_frame"])

    @pytest.mark.parametrize(
        ("case", "names"),
        [
            ("", REFERENCES),
            ("_clip_only", ["reference_clip"]),
            ("_vae_only", ["reference_latents"]),
            ("_no_ref", []),
        ],
    )
    @torch.no_grad()
    def test_both_paths(self, full, case, names):
        close(full(timesteps=T_BATCH, **inputs(["prompt_embeds", *names])), DUAL[1][f"bidirectional{case}"])

    @torch.no_grad()
    def test_a_timestep_for_each_frame(self, full):
        close(full(timesteps=T_FRAMES, **inputs()), DUAL[1]["bidirectional_t_per_frame"])

    @pytest.mark.parametrize("group", [1, 3])
    @torch.no_grad()
    def test_both_paths_of_causal_frames(self, folder, full, group):
        close(causal(full, folder, group)(timesteps=T_BATCH, **inputs()), DUAL[1][f"causal_nf{group}"])


class TestIdentity:
    @pytest.mark.parametrize("mode", ["bidirectional", "causal"])
    @torch.no_grad()
    def test_nothing_changes_at_the_first_step(self, folder, fresh, mode):
        made = causal(fresh, folder, 3) if mode == "causal" else fresh
        given = inputs()
        plain = made.transformer(given["noisy"], T_BATCH, given["prompt_embeds"], return_dict=False)[0]
        assert torch.equal(made(timesteps=T_BATCH, **given), plain)
        if mode == "bidirectional":
            untouched = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
            base = untouched(given["noisy"], T_BATCH, given["prompt_embeds"], return_dict=False)[0]
            assert torch.equal(plain, base)

    @torch.no_grad()
    def test_the_published_start_changes_much(self, folder, fresh):
        published, given = network(folder, init="published"), inputs()
        difference = published(timesteps=T_BATCH, **given) - fresh(timesteps=T_BATCH, **given)
        assert difference.norm() / fresh(timesteps=T_BATCH, **given).norm() > 0.02

    def gradients(self, folder, init, steps=2):
        """Names of new parameters without a gradient, at each step."""
        torch.manual_seed(0)
        made = network(folder, init=init).double()
        new = {name: p.requires_grad_(is_new(name)) for name, p in made.named_parameters()}
        new = {name: p for name, p in new.items() if p.requires_grad}
        optimizer = torch.optim.AdamW(new.values(), lr=1e-4)
        given = {name: value.double() for name, value in inputs().items()}
        dead = []
        for _ in range(steps):
            optimizer.zero_grad()
            made(timesteps=T_BATCH.double(), **given).square().mean().backward()
            dead.append([name for name, p in new.items() if p.grad is None or p.grad.abs().max() <= 1e-12])
            optimizer.step()
        return dead

    def test_everything_learns_from_the_second_step_on(self, folder):
        first, second = self.gradients(folder, "identity")
        assert len(first) == 22 and second == []

    @torch.no_grad()
    def test_what_a_projection_learns_soon_outweighs_its_draw(self, folder):
        """Ten of Adam's steps of 1e-4 in one direction make nearly the tokens of that direction alone."""
        for proj in (network(folder).clip_proj.proj, network(folder).vae_proj.proj):
            learnt, given = 1e-3 * torch.randn(proj[3].weight.shape).sign(), torch.randn(4, proj[1].in_features)
            assert proj[3].weight.abs().min() > 0
            proj[3].weight += learnt
            both = proj(given)
            proj[3].weight.copy_(learnt)
            assert F.cosine_similarity(both, proj(given)).min() > 0.9

    def test_the_published_start_leaves_the_path_of_latents_dead(self, folder):
        _, second = self.gradients(folder, "published")
        paths = {name for name in second if name.startswith("vae_proj") or "k_vae" in name}
        assert paths and any(name.endswith("v_vae.weight") for name in second)


class TestFreezePolicies:
    def policy(self, name):
        files = (config.conf_dir() / "freeze-policy" / f"{option}.yaml" for option in ("new_modules", name))
        nodes = [yaml.safe_load(file.read_text()) for file in files]
        return FreezePolicy(nodes[1]["train"], nodes[0]["groups"])

    def trained(self, made, name):
        self.policy(name)(made)
        return {name for name, parameter in made.named_parameters() if parameter.requires_grad}

    def test_the_new_modules_learn_and_gates_faster(self, folder):
        made = network(folder)
        new = {name for name, _ in made.named_parameters() if is_new(name.removeprefix("transformer."))}
        assert self.trained(made, "new_modules") == new
        gate, *others = self.policy("new_modules").groups(made, 1e-4)
        assert [name for name, _ in gate["params"]] == [f"transformer.blocks.{n}.attn2.clip_gate" for n in range(2)]
        assert gate["lr"] == pytest.approx(1e-2)
        assert [group["name"] for group in others] == ["clip_proj", "vae_proj", "k_vae", "v_vae"]
        assert all(group["lr"] == 1e-4 for group in others)

    def test_gates_of_one_are_a_formula_and_stay(self, folder, tmp_path):
        torch.save({"generator": wan.native_state(DUAL[0])}, tmp_path / "model.pt")
        loaded = network(folder)
        loaded.load(tmp_path / "model.pt")
        learnt = self.trained(network(folder), "new_modules")
        for made in (network(folder, init="published"), loaded):
            left = learnt - self.trained(made, "new_modules")
            assert left == {f"transformer.blocks.{n}.attn2.clip_gate" for n in range(2)}
            assert "gate" not in [group["name"] for group in self.policy("new_modules").groups(made, 1e-4)]

    def test_what_scales_positions_learns_as_fast_as_gates(self, folder):
        made = network(folder, vae_pos_embed=True)
        assert "vae_proj.position_scale" in self.trained(made, "new_modules")
        gate, *_ = self.policy("new_modules").groups(made, 1e-4)
        assert "vae_proj.position_scale" in [name for name, _ in gate["params"]]

    def test_the_fused_path_learns_as_well(self, folder):
        made = network(folder)
        more = self.trained(made, "new_modules_fused") - self.trained(made, "new_modules")
        fused = ("to_k.weight", "to_k.bias", "to_v.weight", "to_v.bias", "norm_k.weight")
        assert more == {f"transformer.blocks.{n}.attn2.{name}" for n in range(2) for name in fused}

    def test_an_adapter_learns_as_well(self, folder):
        new = self.trained(network(folder), "new_modules")
        made = network(folder)
        LoRA(rank=2, alpha=2)(made)
        more = self.trained(made, "new_modules_adapter") - new
        assert len(more) == 2 * 2 * 4 * 2 and all(".lora_" in name for name in more)

    def test_an_adapter_alone_learns_beside_trained_references_only(self, folder, full, tmp_path):
        made = network(folder)
        LoRA(rank=2, alpha=2)(made)
        with pytest.raises(UserError, match="nothing of the adapter learns"):
            self.policy("new_modules")(made)
        with pytest.raises(UserError, match="nothing of their modules learns"):
            FreezePolicy([r"\.lora_"])(made)
        full.export(tmp_path, full.state_dict())
        made.load(tmp_path)
        FreezePolicy([r"\.lora_"])(made)
        assert not any(p.requires_grad for name, p in made.named_parameters() if is_new(name))


class TestPositions:
    def test_they_differ_everywhere_and_depend_on_one_axis_each(self):
        grid = grid_positions(3, 5, 16)
        assert grid.shape == (3, 5, 16) and len(grid.flatten(0, 1).unique(dim=0)) == 15
        assert torch.equal(grid[:, :1, :8].expand(3, 5, 8), grid[..., :8])  # rows
        assert torch.equal(grid[:1, :, 8:].expand(3, 5, 8), grid[..., 8:])  # columns
        torch.testing.assert_close(grid[2, 4, [0, 4, 8, 12]], torch.tensor([2.0, 2, 4, 4]).sin().where(
            torch.tensor([True, False, True, False]), torch.tensor([2.0, 2, 4, 4]).cos()))  # fmt: skip

    @torch.no_grad()
    def test_places_count_once_their_scale_is_not_zero(self, folder, full):
        made, given = network(folder, vae_pos_embed=True), inputs()
        made.load_state_dict(full.state_dict(), strict=False)
        moved = given | {"reference_latents": given["reference_latents"].roll(1, dims=-1)}
        plain, rolled = (made(timesteps=T_BATCH, **some) for some in (given, moved))
        assert torch.equal(plain, full(timesteps=T_BATCH, **given))
        close(rolled, plain, 1e-5)  # a bag of tokens
        made.vae_proj.position_scale.fill_(1.0)
        plain, rolled = (made(timesteps=T_BATCH, **some) for some in (given, moved))
        assert (rolled - plain).abs().max() > 1e-3

    def test_their_scale_learns_and_is_exported(self, folder, tmp_path):
        made = wan.filled(network(folder, vae_pos_embed=True))
        made(timesteps=T_BATCH, **inputs()).square().mean().backward()
        assert made.vae_proj.position_scale.grad.abs() > 0
        made.vae_proj.position_scale.data.fill_(0.5)
        made.export(tmp_path, made.state_dict())
        again = network(folder, vae_pos_embed=True)
        again.load(tmp_path)
        assert again.vae_proj.position_scale == 0.5
        with pytest.raises(UserError, match="position_scale"):
            network(folder).load(tmp_path)


class TestFigures:
    def test_they_are_those_of_the_last_forward_in_training(self, folder, full):
        made = network(folder)
        assert made.figures() == {}
        made(timesteps=T_BATCH, **inputs())
        assert {name: float(value) for name, value in made.figures().items()} == {"clip_gate": 0, "vae_over_fused": 0}
        made.load_state_dict(full.state_dict())
        made(timesteps=T_BATCH, **inputs())
        figures = made.figures()
        assert figures["clip_gate"] == 1 and figures["vae_over_fused"] > 0
        made.eval()(timesteps=T_BATCH, reference_scale=0.0, **inputs())
        assert made.figures() == figures
        made.train()(timesteps=T_BATCH, reference_scale=0.5, **inputs())
        assert not any(value.requires_grad for value in made.figures().values())
        assert 0 < made.figures()["vae_over_fused"] < figures["vae_over_fused"]


class TestSize:
    def test_parameters_of_the_published_network(self):
        with torch.device("meta"):
            transformer = WanTransformer3DModel(**REAL)
        projections = add_references(transformer)
        new = {name: p for name, p in transformer.named_parameters() if is_new(name)}
        gates = sum(p.numel() for name, p in new.items() if name.endswith("clip_gate"))
        others = sum(p.numel() for name, p in new.items() if not name.endswith("clip_gate"))
        in_front = [sum(p.numel() for p in projection.parameters()) for projection in projections]
        assert in_front == [4_334_080, 2_390_048]
        assert others + sum(in_front) == 148_420_128 and gates == 30
        total = sum(p.numel() for p in transformer.parameters()) + sum(in_front) - gates
        assert total == 1_567_416_928

    def test_an_image_model_is_refused(self):
        with torch.device("meta"):
            made = WanTransformer3DModel(**wan.CONFIG["diffusers"], image_dim=24, added_kv_proj_dim=48)
        with pytest.raises(UserError, match="image-to-video"):
            add_references(made)


def test_checkpointing_changes_no_gradient(folder, full):
    twin = network(folder, gradient_checkpointing=True)
    twin.load_state_dict(full.state_dict())
    for made in (full, twin):
        made.zero_grad()
        made(timesteps=T_FRAMES, **inputs()).square().mean().backward()
    for (name, one), other in zip(full.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    full.zero_grad()


class TestPadding:
    @torch.no_grad()
    def test_padded_references_count_for_nothing(self, full):
        given = inputs()
        mask = torch.tensor([[True, False], [True, True]])
        both = full(timesteps=T_BATCH, **given)
        padded = full(timesteps=T_BATCH, reference_mask=mask, **given)
        shorter = given | {
            "reference_clip": given["reference_clip"][:, :1],
            "reference_latents": given["reference_latents"][:, :, :1],
        }
        alone = full(timesteps=T_BATCH, **shorter)
        torch.testing.assert_close(padded[0], alone[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(padded[1], both[1], rtol=0, atol=1e-5)
        assert (padded[0] - both[0]).abs().max() > 1e-2

    @pytest.mark.parametrize("count", [1, 2])
    def test_a_row_without_references_is_the_base(self, full, count):
        given = inputs()
        given["reference_clip"] = given["reference_clip"][:, :count]
        given["reference_latents"] = given["reference_latents"][:, :, :count]
        mask = torch.tensor([[False] * count, [True] * count])
        found = full(timesteps=T_BATCH, reference_mask=mask, **given)
        with torch.no_grad():
            base = full(timesteps=T_BATCH, **inputs(["prompt_embeds"]))
        assert torch.equal(found[0], base[0]) and not torch.equal(found[1], base[1])
        full.zero_grad()
        found.square().mean().backward()
        assert all(torch.isfinite(p.grad).all() for p in full.parameters() if p.grad is not None)
        full.zero_grad()

    @torch.no_grad()
    def test_the_scale_turns_references_down_to_the_base(self, full):
        base = full(timesteps=T_BATCH, **inputs(["prompt_embeds"]))
        assert torch.equal(full(timesteps=T_BATCH, reference_scale=0.0, **inputs()), base)
        half, whole = (full(timesteps=T_BATCH, reference_scale=s, **inputs()) for s in (0.5, 1.0))
        assert 0 < (half - base).norm() < (whole - base).norm()


class TestCache:
    """A roll-out frame by frame against the forward of all frames at once, where each frame has its own timestep."""

    def rolled(self, made, group, cached=None):
        given, cache, parts = inputs(), KeyValueCache(), []
        for start in range(0, 6, group):
            some = {**given, "noisy": given["noisy"][:, :, start : start + group]}
            times = T_FRAMES[:, start : start + group]
            made(**some, timesteps=times + 50, cache=cache)  # a step of denoising leaves no trace
            parts.append(made(**some, timesteps=times, cache=cache, keep=True))
            if cached is not None:
                cached.append(list(cache.frames))
        return torch.cat(parts, dim=2)

    @torch.no_grad()
    def test_one_group_is_the_parallel_forward(self, folder, full):
        made = causal(full, folder, 6)
        assert torch.equal(self.rolled(made, 6), made(timesteps=T_FRAMES, **inputs()))
        close(self.rolled(made, 6), full(timesteps=T_FRAMES, **inputs()), 2e-5)

    @pytest.mark.parametrize(
        ("group", "window", "sink"), [(1, None, 0), (3, None, 0), (2, 4, 0), (1, 3, 1), (1, 2, 0), (2, 4, 2), (3, 6, 3)]
    )
    @torch.no_grad()
    def test_groups_are_the_parallel_forward(self, folder, full, group, window, sink):
        made = causal(full, folder, group, window, sink)
        close(self.rolled(made, group), made(timesteps=T_FRAMES, **inputs()), 2e-5)

    @torch.no_grad()
    def test_only_what_the_next_group_sees_is_kept(self, folder, full):
        made, kept = causal(full, folder, 1, window=4, sink=1), []
        self.rolled(made, 1, kept)
        assert kept == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5]]

    def test_frames_that_see_later_ones_have_no_cache(self, full):
        with pytest.raises(UserError, match=r"mode=causal"):
            full(timesteps=T_BATCH, cache=KeyValueCache(), **inputs())

    def test_groups_must_fit(self, folder, full):
        made = causal(full, folder, 4, window=8)
        with pytest.raises(UserError, match=r"group_frames=4"):
            made(timesteps=T_BATCH, **inputs())
        with pytest.raises(UserError, match="window_frames"):
            network(folder, mode="causal", group_frames=3, window_frames=5, sink_frames=3)


def test_later_frames_are_not_seen(folder, full):
    made = causal(full, folder, 3)
    given = inputs()
    changed = given | {"noisy": torch.cat([given["noisy"][:, :, :3], given["noisy"][:, :, 3:] + 1], dim=2)}
    with torch.no_grad():
        one, other = (made(timesteps=T_BATCH, **some) for some in (given, changed))
    assert torch.equal(one[:, :, :3], other[:, :, :3]) and not torch.equal(one[:, :, 3:], other[:, :, 3:])


def test_fused_projections_are_refused(folder):
    made = network(folder)
    made.transformer.blocks[0].attn2.fuse_projections()
    with pytest.raises(UserError, match="fused projections"):
        made(timesteps=T_BATCH, **inputs())


def test_context_parallelism_is_refused(folder):
    made = network(folder)
    for processor in made.transformer.attn_processors.values():
        if isinstance(processor, DualCrossAttention):
            processor._parallel_config = object()
    with pytest.raises(UserError, match="context parallelism"):
        made(timesteps=T_BATCH, **inputs())


def test_settings_are_checked(folder):
    for wrong in ({"mode": "sideways"}, {"init": "zero"}, {"export_layout": "zip"}):
        with pytest.raises(UserError, match="model.network"):
            WanReferences(str(folder), clip_dim=CLIP_DIM, **wrong)


def test_initial_values_are_drawn_anew(folder):
    made = network(folder)
    again = copy.deepcopy(made)
    initialize(again, "identity")
    assert not torch.equal(made.clip_proj.proj[1].weight, again.clip_proj.proj[1].weight)
