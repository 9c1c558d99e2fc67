"""The table of noise levels against diffusers' own, and predictions there and back."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from vireo.diffusion.noise_schedule import PREDICTION_TYPES, NoiseSchedule, saved_in
from vireo.errors import UserError

SCHEDULES = st.builds(
    NoiseSchedule,
    num_train_timesteps=st.integers(2, 1500),
    beta_start=st.floats(1e-5, 1e-3),
    beta_end=st.floats(2e-3, 2e-2),
    beta_schedule=st.sampled_from(["linear", "scaled_linear"]),
    prediction_type=st.sampled_from(PREDICTION_TYPES),
    snr_shift_scale=st.sampled_from([1.0, 3.0]),
)


def tensors(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_it_is_ddpm(beta_schedule, prediction_type):
    own = NoiseSchedule(beta_schedule=beta_schedule, prediction_type=prediction_type)
    reference = diffusers.DDPMScheduler(1000, 0.00085, 0.012, beta_schedule, prediction_type=prediction_type)
    torch.testing.assert_close(own.alphas_cumprod, reference.alphas_cumprod, rtol=1e-4, atol=1e-6)
    clean, noise = tensors(5, 4, 3, 3)
    timesteps = torch.tensor([0, 10, 500, 998, 999])
    torch.testing.assert_close(
        own.add_noise(clean, noise, timesteps), reference.add_noise(clean, noise, timesteps), rtol=1e-5, atol=1e-5
    )
    wanted = noise if prediction_type == "epsilon" else reference.get_velocity(clean, noise, timesteps)
    torch.testing.assert_close(own.target(clean, noise, timesteps), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("snr_shift_scale", [1.0, 3.0])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_it_is_cogvideox(snr_shift_scale, zero_snr):
    settings = {"snr_shift_scale": snr_shift_scale, "rescale_betas_zero_snr": zero_snr}
    own = NoiseSchedule(prediction_type="v_prediction", **settings)
    reference = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", **settings)
    torch.testing.assert_close(own.alphas_cumprod, reference.alphas_cumprod.float(), rtol=1e-6, atol=1e-9)
    assert (own.alphas_cumprod[-1] == 0) == zero_snr
    made = own.scheduler("CogVideoXDDIMScheduler")
    assert torch.equal(made.alphas_cumprod, reference.alphas_cumprod)
    clean, noise = tensors(2, 16, 3, 4, 4)
    timesteps = torch.tensor([400, 999])
    torch.testing.assert_close(own.add_noise(clean, noise, timesteps), reference.add_noise(clean, noise, timesteps))
    torch.testing.assert_close(own.target(clean, noise, timesteps), reference.get_velocity(clean, noise, timesteps))


def test_rescaled_betas_are_ddpms_too():
    own = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    made = own.scheduler("DDPMScheduler")
    torch.testing.assert_close(own.alphas_cumprod, made.alphas_cumprod, rtol=1e-4, atol=1e-6)


@given(schedule=SCHEDULES, share=st.floats(0, 1), seed=st.integers(0, 9))
def test_a_perfect_prediction_is_the_clean_sample(schedule, share, seed):
    clean, noise = tensors(2, 3, 2, seed=seed)
    timesteps = torch.tensor([0, int(share * (schedule.num_train_timesteps - 1))])
    noisy = schedule.add_noise(clean, noise, timesteps)
    found = schedule.to_clean(schedule.target(clean, noise, timesteps), noisy, timesteps)
    least = schedule.alphas_cumprod[timesteps].min().sqrt()  # a prediction of noise is divided by it
    torch.testing.assert_close(found, clean, rtol=1e-4, atol=float(1e-5 / least))


@given(schedule=SCHEDULES)
def test_less_and_less_signal_is_left(schedule):
    table = schedule.alphas_cumprod
    assert table.dtype == torch.float32 and table.shape == (schedule.num_train_timesteps,)
    assert bool((table.diff() < 0).all()) and table[-1] > 0 and table[0] < 1


def test_half_precision_stays_half_and_is_computed_in_full():
    schedule = NoiseSchedule(prediction_type="v_prediction")
    clean, noise = (x.half() for x in tensors(1, 8))
    noisy = schedule.add_noise(clean, noise, torch.tensor([3]))
    assert noisy.dtype == schedule.target(clean, noise, torch.tensor([3])).dtype == torch.float16
    exact = schedule.add_noise(clean.float(), noise.float(), torch.tensor([3]))
    assert torch.equal(noisy, exact.half())


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_sampler_runs_on_the_same_table(name):
    schedule = NoiseSchedule(prediction_type="v_prediction", beta_end=0.02)
    made = schedule.scheduler(name, timestep_spacing="trailing")
    assert made.config.prediction_type == "v_prediction" and made.config.timestep_spacing == "trailing"
    torch.testing.assert_close(made.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-4, atol=1e-6)
    assert not made.config.get("clip_sample"), "latents leave [-1, 1]"


def test_a_clean_sample_comes_out_of_ddim_in_one_step():
    schedule = NoiseSchedule(prediction_type="v_prediction")
    scheduler = schedule.scheduler("DDIMScheduler", timestep_spacing="trailing")
    scheduler.set_timesteps(1)
    clean, noise = tensors(1, 4, 2, 2)
    last = torch.tensor([999])
    noisy = schedule.add_noise(clean, noise, last)
    assert int(scheduler.timesteps[0]) == 999
    stepped = scheduler.step(schedule.target(clean, noise, last), 999, noisy).prev_sample
    torch.testing.assert_close(stepped, clean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction_type": "v"}, "prediction_type one of epsilon, v_prediction, sample"),
        ({"beta_schedule": "cosine"}, "beta_schedule is one of linear"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start <= beta_end"),
        ({"rescale_betas_zero_snr": True}, "use v_prediction or sample"),
    ],
)
def test_what_makes_no_schedule_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        NoiseSchedule(**arguments)


def test_schedulers_that_cannot_follow_are_refused():
    with pytest.raises(UserError, match="no scheduler 'Euler'"):
        NoiseSchedule().scheduler("Euler")
    with pytest.raises(UserError, match="does not take snr_shift_scale=3.0"):
        NoiseSchedule(snr_shift_scale=3.0).scheduler("DDIMScheduler")
    with pytest.raises(UserError, match="does not take eta"):
        NoiseSchedule().scheduler("DDIMScheduler", eta=1)


def test_a_pipelines_table_is_read_from_its_folder(tmp_path):
    given = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    diffusers.CogVideoXDDIMScheduler(**given).save_pretrained(tmp_path / "scheduler")
    file = tmp_path / "scheduler" / "scheduler_config.json"
    short = {name: value for name, value in json.loads(file.read_text()).items() if name != "snr_shift_scale"}
    file.write_text(json.dumps(short))
    found = saved_in(str(tmp_path))
    assert found.settings["snr_shift_scale"] == 3.0, "the default of that scheduler, not ours"
    assert found.settings["rescale_betas_zero_snr"] and found.prediction_type == "v_prediction"
    with pytest.raises(UserError, match=r"there is no .*scheduler_config.json"):
        saved_in(str(tmp_path / "scheduler"))


@pytest.mark.parametrize("shift", [1, 3])
def test_the_table_of_cogvideox(shift):
    golden = load_file(Path(__file__).parents[1] / "golden" / "cogvideox" / "train_loss.safetensors")
    table = golden[f"scheduler/alphas_cumprod_shift{shift}"].float()
    schedule = NoiseSchedule(prediction_type="v_prediction", snr_shift_scale=shift, rescale_betas_zero_snr=True)
    torch.testing.assert_close(schedule.alphas_cumprod, table, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_same_error_whatever_is_predicted(kind):
    schedule, timesteps = NoiseSchedule(prediction_type=kind), torch.arange(0, 1000, 37)
    clean, noise = tensors(len(timesteps), 16)
    noisy = schedule.add_noise(clean, noise, timesteps)
    wrong = schedule.target(clean, noise, timesteps) + 0.1
    errors = (schedule.to_clean(wrong, noisy, timesteps) - clean).square().mean(1)
    weights = schedule.min_snr_weights(timesteps, 5.0)
    snr = schedule.alphas_cumprod[timesteps] / (1 - schedule.alphas_cumprod[timesteps])
    torch.testing.assert_close(weights * 0.01, errors * snr.clamp(max=5.0), rtol=1e-2, atol=1e-5)


def test_min_snr_of_pure_noise_is_zero():
    schedule = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert schedule.min_snr_weights(torch.tensor([999]), 5.0).tolist() == [0.0]
