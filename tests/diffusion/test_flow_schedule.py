"""The flow's table and formulas by the published scheduler's numbers and by diffusers' schedulers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.golden.fill import noise
from tests.wan import golden

from vireo.diffusion.flow_schedule import FlowSchedule
from vireo.errors import UserError

DESCRIBED, REFERENCE = golden("flow_matching")
INDICES = 999 - torch.tensor(DESCRIBED["inputs"]["sched_idx"])  # the published table descends
FRAME_INDICES = 999 - torch.tensor(DESCRIBED["inputs"]["sigma index per frame"])


def close(found, wanted, tolerance=1e-6):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def latents(name):
    """Golden inputs (B, F, C, H, W) in the network's layout (B, C, F, H, W)."""
    return noise(*DESCRIBED["inputs"][name]).transpose(1, 2)


def test_the_table():
    found = FlowSchedule().timesteps(INDICES)
    close(found, REFERENCE["timesteps"])
    close(found / 1000, REFERENCE["sigmas"])


def test_the_network_is_told_the_noise_level_that_it_gets():
    schedule = FlowSchedule()
    timesteps = schedule.timesteps(FRAME_INDICES)
    close(timesteps, REFERENCE["t_correct"])
    assert (timesteps - REFERENCE["t_as_published"]).abs().max() > 300  # of the mirrored index
    zeros, ones = torch.zeros(2, 4, 6, 3, 5), torch.ones(2, 4, 6, 3, 5)
    close(schedule.add_noise(zeros, ones, timesteps)[:, 0, :, 0, 0], timesteps / 1000)


def test_noise_target_and_loss():
    schedule, timesteps = FlowSchedule(), FlowSchedule().timesteps(FRAME_INDICES)
    clean, noise_, prediction = latents("x0"), latents("noise"), latents("flow_pred")
    noisy = schedule.add_noise(clean, noise_, timesteps)
    close(noisy.transpose(1, 2), REFERENCE["x_t"])
    target = schedule.target(clean, noise_, timesteps)
    close(target.transpose(1, 2), REFERENCE["target"])
    close((prediction - target).square().mean(), REFERENCE["loss"])
    close(schedule.to_clean(prediction, noisy, timesteps).transpose(1, 2), REFERENCE["x0_from_pred"], 1e-5)


@given(st.lists(st.floats(0, 1000), min_size=2, max_size=2), st.floats(0.2, 12))
def test_a_prediction_leads_back(timesteps, shift):
    schedule, timesteps = FlowSchedule(shift=shift), torch.tensor(timesteps)
    clean, noise_ = latents("x0"), latents("noise")
    target = schedule.target(clean, noise_, timesteps)
    close(schedule.to_clean(target, schedule.add_noise(clean, noise_, timesteps), timesteps), clean, 1e-5)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_perfect_prediction_is_sampled_exactly(name):
    schedule = FlowSchedule()
    scheduler = schedule.scheduler(name)
    scheduler.set_timesteps(6)
    clean, sample = latents("x0"), latents("noise")
    for timestep in scheduler.timesteps:
        prediction = (sample - clean) / (timestep / 1000)
        sample = scheduler.step(prediction, timestep, sample, return_dict=False)[0]
    close(sample, clean, 2e-3)  # schedulers round timesteps to whole numbers or end a little above zero


def test_noise_levels_of_a_few_steps_are_shifted_once():
    scheduler = FlowSchedule().scheduler("FlowMatchEulerDiscreteScheduler")
    scheduler.set_timesteps(5)
    wanted = FlowSchedule().timesteps(torch.tensor([999, 799, 599, 399, 199]))
    close(scheduler.timesteps, wanted, 1e-5)
    multistep = FlowSchedule().scheduler("UniPCMultistepScheduler")
    multistep.set_timesteps(5)
    close(multistep.sigmas, scheduler.sigmas, 1e-3)


def test_another_shift_can_be_sampled_with():
    assert FlowSchedule().scheduler("FlowMatchEulerDiscreteScheduler", shift=8.0).config.shift == 8.0
    assert FlowSchedule().scheduler("UniPCMultistepScheduler").config.flow_shift == 5.0


@pytest.mark.parametrize("name", ["DDIMScheduler", "NoSuchScheduler"])
def test_other_schedulers_are_refused(name):
    with pytest.raises(UserError, match=f"no scheduler '{name}' for flows"):
        FlowSchedule().scheduler(name)


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match="does not take eta"):
        FlowSchedule().scheduler("FlowMatchEulerDiscreteScheduler", eta=1)
    for wrong in ({"shift": 0}, {"num_train_timesteps": 1}):
        with pytest.raises(UserError, match=r"model\.noise_schedule"):
            FlowSchedule(**wrong)
