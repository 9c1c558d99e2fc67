"""The flow's loss by the published step's numbers, and its options."""

import pytest
import torch
from tests import wan
from tests.golden.fill import noise
from tests.wan import golden

from vireo.diffusion.flow_schedule import FlowSchedule
from vireo.errors import UserError
from vireo.freezing import FreezePolicy
from vireo.losses.flow_matching import FlowMatching
from vireo.optimizers import adamw
from vireo.randomness import Draws

INPUTS = ["prompt_embeds", "reference_clip", "reference_latents", "reference_mask"]
DESCRIBED, REFERENCE = golden("wan_dual")


def loss(**options):
    return FlowMatching(FlowSchedule(), INPUTS, **options)


def batch(rows=2, frames=6):
    drawn = Draws("data", range(rows))
    return {
        "latents": drawn.normal("latents", 4, frames, 4, 4),
        "prompt_embeds": drawn.normal("prompt", 3, 5),
        "null_prompt_embeds": torch.zeros(rows, 3, 5),
        "reference_clip": drawn.normal("clip", 1, 2, 5),
        "reference_latents": drawn.normal("reference", 4, 1, 4, 4),
        "reference_mask": torch.ones(rows, 1, dtype=torch.bool),
        "subject_mask": torch.cat([torch.ones(rows, 1, 1, 8, 16), torch.zeros(rows, 1, 1, 8, 16)], dim=4),
    }


class Given:
    """Remembers what it was called with, and predicts nothing."""

    def __call__(self, noisy, timesteps, **conditions):
        self.noisy, self.timesteps, self.conditions = noisy, timesteps, conditions
        return torch.zeros_like(noisy)


class RecordedDraws:
    positions = (0, 1)

    def integers(self, purpose, low, high):
        assert purpose == "timestep" and (low, high) == (20, 980)
        return 999 - torch.tensor(DESCRIBED["inputs"]["train sigma index"])  # the published table descends

    def normal(self, purpose, *shape):
        assert purpose == "noise"
        return noise("opens2v.noise", 2, *shape)


def test_a_step_of_training(tmp_path):
    network = wan.filled(wan.network(wan.save_base(tmp_path)))
    FreezePolicy([r"^clip_proj|^vae_proj|\.(k_vae|v_vae|norm_k_vae)\."])(network)
    given = wan.inputs()
    data = {**given, "latents": given.pop("noisy"), "reference_mask": torch.ones(2, 2, dtype=torch.bool)}
    objective, answers = loss(timestep_range=[20, 980]), []

    def called(*arguments, **conditions):
        answers.append(network(*arguments, **conditions))
        return answers[-1]

    total = objective(called, data, RecordedDraws()).total
    total.backward()
    torch.testing.assert_close(answers[0], REFERENCE["train.pred"], rtol=0, atol=1e-4)
    torch.testing.assert_close(total, REFERENCE["train.loss"], rtol=0, atol=1e-4)
    own = {name.removeprefix("transformer."): p for name, p in network.named_parameters()}
    for key in (key for key in REFERENCE if key.startswith("train.grad.")):
        gradient = own[DESCRIBED["key_map"][key.removeprefix("train.grad.")]].grad
        torch.testing.assert_close(gradient, REFERENCE[key], rtol=1e-3, atol=1e-6)
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    torch.testing.assert_close(norm, REFERENCE["train.grad_norm"], rtol=1e-3, atol=0)
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    adamw([{"params": trained}], lr=1e-4, weight_decay=0.0).step()
    for key in (key for key in REFERENCE if key.startswith("train.after_step.")):
        value = own[DESCRIBED["key_map"][key.removeprefix("train.after_step.")]].detach()
        torch.testing.assert_close(value, REFERENCE[key], rtol=0, atol=1e-4)
    again = objective(network, data, RecordedDraws()).total.detach()
    torch.testing.assert_close(again, REFERENCE["train.loss_after_step"], rtol=0, atol=1e-4)


def test_the_network_is_told_its_noise_level():
    network, data = Given(), batch(200)
    data["latents"] = torch.full((200, 4, 6, 4, 4), 1e4)
    loss(timestep_range=[20, 980])(network, data, Draws(0, range(200)))
    level = 1 - network.noisy.mean(dim=(1, 2, 3, 4)) / 1e4
    torch.testing.assert_close(network.timesteps, 1000 * level, rtol=0, atol=0.2)
    assert 90 < network.timesteps.min() < 300 and 990 < network.timesteps.max() < 996.2


def test_a_uniform_place_in_a_shifted_table():
    timesteps = loss().timesteps(Draws(0, range(4000)), torch.zeros(1, 4, 6, 4, 4))
    expected = FlowSchedule().timesteps(torch.arange(1000)).double().mean()
    assert abs(timesteps.double().mean() - expected) < 10


def test_a_logit_normal_place():
    objective = loss(timestep_sampling="logit_normal", timestep_range=[20, 980])
    timesteps = objective.timesteps(Draws(0, range(4000)), torch.zeros(1, 4, 6, 4, 4))
    middle = FlowSchedule().timesteps(torch.tensor([300, 700]))
    inside = ((timesteps > middle[0]) & (timesteps < middle[1])).double().mean()
    assert 0.55 < inside < 0.65  # 0.40 of uniform ones


def test_groups_of_frames_have_their_own_noise_levels():
    network, objective = Given(), loss(group_frames=3)
    objective(network, batch(), Draws(0, [0, 1]))
    times = network.timesteps
    assert times.shape == (2, 6) and times.unique().numel() == 4
    assert torch.equal(times[:, 0], times[:, 2]) and torch.equal(times[:, 3], times[:, 5])
    objective.learning = False
    objective(network, batch(), Draws(0, [0, 1]).pinned(objective.grid[2]))
    torch.testing.assert_close(network.timesteps, FlowSchedule().timesteps(torch.tensor([500, 500])))


def test_errors_inside_the_subject_count_more():
    data, draws = batch(), Draws(0, [0, 1])
    plain, weighted = loss()(Given(), data, draws).total, loss(subject_weight=3.0)(Given(), data, draws).total
    target = draws.normal("noise", 4, 6, 4, 4) - data["latents"]
    inside, outside = target[..., :2].square().mean(), target[..., 2:].square().mean()
    torch.testing.assert_close(plain, (inside + outside) / 2)
    torch.testing.assert_close(weighted, (3 * inside + outside) / 2)
    objective = loss(subject_weight=3.0)
    objective.learning = False
    assert torch.equal(objective(Given(), data, draws).total, plain)


def test_a_weight_of_the_subject_needs_its_mask():
    data = batch()
    del data["subject_mask"]
    with pytest.raises(UserError, match=r"data\.subject_mask=true"):
        loss(subject_weight=2.0)(Given(), data, Draws(0, [0, 1]))


def test_dropped_references_are_masked_out():
    network, data = Given(), batch(200)
    objective = loss(condition_dropout=0.1, image_inputs=["reference_mask"])
    objective(network, data, Draws(0, range(200)))
    present = network.conditions["reference_mask"][:, 0]
    without_text = network.conditions["prompt_embeds"].abs().sum((1, 2)) == 0
    assert present.dtype == torch.bool and 0.1 < (~present).float().mean() < 0.3
    assert 0.1 < without_text.float().mean() < 0.3 and (without_text & ~present).any()
    objective.learning = False
    objective(network, data, Draws(0, range(200)))
    assert network.conditions["reference_mask"].all()


def test_figures_by_quarters_of_the_noise_level():
    data = batch(64)
    for objective in (loss(timestep_bins=4), loss(timestep_bins=4, group_frames=3)):
        objective(Given(), data, Draws(0, range(64)))
        figures = objective.end_step()
        assert list(figures) == ["loss_t0_249", "loss_t250_499", "loss_t500_749", "loss_t750_999"]
        assert figures["loss_t750_999"] > 0


def test_settings_are_checked():
    for wrong in ({"subject_weight": 0}, {"group_frames": 0}, {"timestep_range": [980, 20]}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            loss(**wrong)
