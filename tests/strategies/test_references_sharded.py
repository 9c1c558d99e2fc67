"""Wan with references is spread over processes by calling it alone, whatever travels between its blocks."""

import pytest
import torch

from tests import wan
from vireo import distributed, optimizers
from vireo.diffusion.flow_schedule import FlowSchedule
from vireo.freezing import FreezePolicy
from vireo.losses.flow_matching import FlowMatching
from vireo.randomness import Draws
from vireo.strategies.replicated import Replicated
from vireo.strategies.sharded import FullySharded
from vireo.weights import trained_state

INPUTS = ["prompt_embeds", "reference_clip", "reference_latents", "reference_mask"]
NEW = [r"^clip_proj\.", r"^vae_proj\.", r"\.(k_vae|v_vae|norm_k_vae)\.", r"\.clip_gate$"]


@pytest.fixture(autouse=True)
def fresh_process_state():
    yield
    distributed.close()


def trained(folder, strategy, **arguments):
    """What three steps on the golden inputs make of the new modules, and the losses."""
    torch.manual_seed(0)
    network, policy = wan.network(folder, **arguments), FreezePolicy(NEW, {"gate": {"match": "gate", "lr_scale": 100}})
    policy(network)
    optimizer = optimizers.adamw(policy.groups(network, 1e-3), lr=1e-3)
    called = strategy.prepare(network, optimizer)
    given, losses = wan.inputs(), []
    data = {**given, "latents": given.pop("noisy"), "reference_mask": torch.tensor([[True, True], [True, False]])}
    objective = FlowMatching(FlowSchedule(), INPUTS, group_frames=3 if arguments else None)
    for step in range(3):
        total = objective(called, data, Draws(0, [2 * step, 2 * step + 1])).total
        strategy.backward(total)
        strategy.step(1.0)
        losses.append(float(total.detach()))
    state = {name: value.clone() for name, value in trained_state(network, strategy.full_state()).items()}
    distributed.close()
    return state, losses


@pytest.mark.parametrize("arguments", [{}, {"mode": "causal", "gradient_checkpointing": True}], ids=["plain", "causal"])
def test_sharded_is_whole(tmp_path, arguments):
    folder = wan.save_base(tmp_path)
    whole, losses = trained(folder, Replicated(precision="fp32"), **arguments)
    sharded, same = trained(folder, FullySharded(False, 1, "fp32"), **arguments)
    assert whole.keys() == sharded.keys() and len(whole) == 2 * 8 + 2 * 6
    assert same == pytest.approx(losses, rel=1e-5)
    for name, value in whole.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-4, atol=1e-6)
