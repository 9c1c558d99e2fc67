"""The denoising objective with an analytic network, and which conditions it drops how often."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vireo.diffusion.noise_schedule import NoiseSchedule
from vireo.errors import UserError
from vireo.losses.denoising import Denoising
from vireo.randomness import Draws
from vireo.sampling.roll_out import padded

INPUTS = ["condition_latents", "prompt_embeds"]
IMAGES = ["condition_latents"]


class Given:
    """A network that predicts `answer` and remembers what it was given."""

    def __init__(self, answer=0.0):
        self.answer = answer

    def __call__(self, noisy, timesteps, **conditions):
        self.noisy, self.timesteps, self.conditions = noisy, timesteps, conditions
        return torch.zeros_like(noisy) + self.answer


class Uniform:
    """Draws with these uniform numbers, one for each sample."""

    def __init__(self, **numbers):
        self.numbers = numbers

    def uniform(self, purpose):
        return torch.tensor(self.numbers[purpose])


def batch(clips=2, frames=3):
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(clips, 4, 2, 2, generator=generator),
        "condition_latents": torch.randn(clips, frames, 4, 2, 2, generator=generator) + 5,
        "prompt_embeds": torch.ones(clips, 7, 6),
        "null_prompt_embeds": -torch.ones(1, 7, 6).expand(clips, 7, 6),
    }


def loss(prediction_type="epsilon", **arguments):
    return Denoising(NoiseSchedule(prediction_type=prediction_type), INPUTS, **arguments)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_it_compares_with_what_is_predicted(prediction_type):
    data, draws, network = batch(), Draws(0, [3, 8]), Given(answer=0.5)
    objective = loss(prediction_type)(network, data, draws)
    noise = draws.normal("noise", 4, 2, 2)
    share = NoiseSchedule().alphas_cumprod[network.timesteps].view(-1, 1, 1, 1)
    mixed = share.sqrt() * data["latents"] + (1 - share).sqrt() * noise
    torch.testing.assert_close(network.noisy, mixed)
    velocity = share.sqrt() * noise - (1 - share).sqrt() * data["latents"]
    target = {"epsilon": noise, "v_prediction": velocity, "sample": data["latents"]}[prediction_type]
    torch.testing.assert_close(objective.total, (0.5 - target).square().mean())


def test_it_is_computed_in_float32():
    network = Given()
    data = batch()
    data["latents"] = data["latents"].half()
    total = loss()(lambda *a, **k: network(*a, **k).half(), data, Draws(0, [0, 1])).total
    assert total.dtype == network.noisy.dtype == torch.float32


def test_each_sample_has_draws_of_its_own():
    network, data = Given(), batch()
    loss()(network, data, Draws(0, [3, 8]))
    both, timesteps = network.noisy, network.timesteps
    assert len(set(timesteps.tolist())) == 2
    loss()(network, {name: value[1:] for name, value in data.items()}, Draws(0, [8]))
    assert torch.equal(network.noisy, both[1:]) and torch.equal(network.timesteps, timesteps[1:])


def test_timesteps_are_all_of_the_schedules():
    network, small = Given(), Denoising(NoiseSchedule(num_train_timesteps=5), [])
    data = {"latents": torch.zeros(200, 1)}
    small(network, data, Draws(0, range(200)))
    assert set(network.timesteps.tolist()) == set(range(5))


def test_validation_asks_at_fixed_timesteps():
    objective, network, draws = loss(condition_dropout=1 / 3, image_inputs=IMAGES), Given(), Draws(0, [0, 1])
    objective.learning = False
    asked = []
    for point in objective.grid:
        objective(network, batch(), draws.pinned(point))
        asked.append(network.timesteps.tolist())
        assert all(torch.equal(network.conditions[name], batch()[name]) for name in INPUTS), "nothing is dropped"
    assert asked == [[t, t] for t in (50, 250, 500, 750, 950)]


# ---------------------------------------------------------------------------------------------------------------------
# Dropped conditions


@pytest.mark.parametrize("p", [0.05, 0.2])
def test_three_cases_are_equally_likely(p):
    count = 100_000
    data = {
        "condition_latents": torch.ones(count, 1, 1),
        "prompt_embeds": torch.ones(count, 1),
        "null_prompt_embeds": torch.full((count, 1), 2.0),
    }
    drops = loss(condition_dropout=p, image_inputs=IMAGES)
    u = torch.rand(count, generator=torch.Generator().manual_seed(0)).tolist()
    found = drops.conditions(data, Uniform(condition_dropout=u))
    no_text, no_image = found["prompt_embeds"].flatten() == 2, found["condition_latents"].flatten() == 0
    shares = {
        "text": (no_text & ~no_image, p),
        "both": (no_text & no_image, p),
        "image": (~no_text & no_image, p),
        "none": (~no_text & ~no_image, 1 - 3 * p),
    }
    for name, (mask, expected) in shares.items():
        assert mask.float().mean().item() == pytest.approx(expected, abs=0.004), name


@given(u=st.floats(0, 0.999), p=st.floats(0.01, 1 / 3))
def test_the_rule_for_one_draw(u, p):
    u, data = float(torch.tensor(u)), batch(clips=1)  # as float32, which the draws are
    found = loss(condition_dropout=p, image_inputs=IMAGES).conditions(data, Uniform(condition_dropout=[u]))
    drop_text, drop_image = u < float(torch.tensor(2 * p)), float(torch.tensor(p)) <= u < float(torch.tensor(3 * p))
    assert torch.equal(found["prompt_embeds"], data["null_prompt_embeds" if drop_text else "prompt_embeds"])
    expected = torch.zeros_like(data["condition_latents"]) if drop_image else data["condition_latents"]
    assert torch.equal(found["condition_latents"], expected), "all frames together"


def test_one_draw_decides_for_one_sample_only():
    data = batch(clips=4)
    drops = loss(condition_dropout=0.1, image_inputs=IMAGES)
    found = drops.conditions(data, Uniform(condition_dropout=[0.05, 0.15, 0.25, 0.35]))
    assert found["prompt_embeds"][:, 0, 0].tolist() == [-1, -1, 1, 1]
    assert found["condition_latents"].flatten(1).any(1).tolist() == [True, False, False, True]
    assert data["condition_latents"].all() and (data["prompt_embeds"] == 1).all(), "the batch stays"


def test_texts_and_images_may_be_dropped_at_rates_of_their_own():
    count = 100_000
    data = {"condition_latents": torch.ones(count, 1, 1), "prompt_embeds": torch.ones(count, 1)}
    data["null_prompt_embeds"] = torch.full((count, 1), 2.0)
    for text, image in ((0.1, 0.05), (0.0, 0.2), (0.9, 0.0)):
        drops = loss(condition_dropout=text, image_dropout=image, image_inputs=IMAGES)
        found = drops.conditions(data, Draws(0, range(count)))
        no_text, no_image = found["prompt_embeds"].flatten() == 2, found["condition_latents"].flatten() == 0
        shares = {"text": (no_text, text), "image": (no_image, image), "both": (no_text & no_image, text * image)}
        for name, (mask, expected) in shares.items():
            assert mask.float().mean().item() == pytest.approx(expected, abs=0.004), name


def test_text_alone_and_token_numbers():
    data = {"latents": torch.zeros(3, 1), "prompt_ids": torch.tensor([[5, 6]] * 3)}
    data["null_prompt_ids"] = torch.tensor([[0, 9]] * 3)
    drops = Denoising(NoiseSchedule(), ["prompt_ids"], condition_dropout=0.1)
    found = drops.conditions(data, Uniform(condition_dropout=[0.05, 0.15, 0.25]))["prompt_ids"]
    assert found.tolist() == [[0, 9], [5, 6], [5, 6]], "with no picture, p is the probability of a dropped text"


def test_a_shorter_history_is_the_window_that_samplers_make_of_it():
    draws, frames = Draws(0, range(40)), 5
    data = {"condition_latents": torch.randn(40, frames, 4, 2, 2), "prompt_embeds": torch.ones(40, 1, 1)}
    given = data["condition_latents"]
    found = loss(history_dropout=0.5, image_inputs=IMAGES).conditions(data, draws)["condition_latents"]
    dropped = draws.uniform("history_dropout") < 0.5
    known = torch.where(dropped, draws.integers("known_frames", 1, frames), frames)
    assert set(known.tolist()) == set(range(1, frames + 1))
    for window, clip, count in zip(found, given, known, strict=True):
        assert torch.equal(window, padded(clip[None, frames - count :], frames)[0])


def test_one_frame_has_no_history():
    data = batch(clips=2, frames=1)
    found = loss(history_dropout=1.0, image_inputs=IMAGES).conditions(data, Draws(0, [0, 1]))
    assert torch.equal(found["condition_latents"], data["condition_latents"])


def test_history_and_conditions_are_dropped_independently():
    count = 4000
    data = {
        "condition_latents": torch.tensor([1.0, 2.0]).view(1, 2, 1).repeat(count, 1, 1),
        "prompt_embeds": torch.ones(count, 1),
        "null_prompt_embeds": torch.zeros(count, 1),
    }
    drops = loss(condition_dropout=0.2, image_inputs=IMAGES, history_dropout=0.5)
    found = drops.conditions(data, Draws(0, range(count)))["condition_latents"].flatten(1)
    assert (found[:, 1] == 0).float().mean().item() == pytest.approx(0.4, abs=0.03)
    kept = found[found[:, 1] == 2]
    assert (kept[:, 0] == 2).float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_dropped_frames_that_are_not_finite_do_no_harm():
    data = batch(clips=1)
    data["condition_latents"][:] = torch.nan
    found = loss(condition_dropout=0.3, image_inputs=IMAGES).conditions(data, Uniform(condition_dropout=[0.5]))
    assert not found["condition_latents"].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"condition_dropout": 0.34, "image_inputs": IMAGES}, r"must lie in \[0, 0.333\]"),
        ({"condition_dropout": -0.1}, r"must lie in \[0, 1\]"),
        ({"history_dropout": 1.5, "image_inputs": IMAGES}, "history_dropout=1.5"),
        ({"history_dropout": 0.5}, "must name the pictures that are dropped"),
        ({"image_dropout": 0.5}, "must name the pictures that are dropped"),
        ({"image_dropout": 1.5, "image_inputs": IMAGES}, "image_dropout=1.5 must lie in"),
        ({"image_dropout": 0.0, "condition_dropout": 1.5, "image_inputs": IMAGES}, r"must lie in \[0, 1\]"),
        ({"image_inputs": ["frames"]}, r"image_inputs=\['frames'\] must name some of model.inputs"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        loss(**arguments)


def test_a_text_without_a_null_is_told():
    data = batch()
    del data["null_prompt_embeds"]
    with pytest.raises(UserError, match="set loss.condition_dropout=0 or let the encoder give it"):
        loss(condition_dropout=0.1)(Given(), data, Draws(0, [0, 1]))


# ---------------------------------------------------------------------------------------------------------------------
# Timesteps and weights


def test_timesteps_of_a_range_only():
    network, data = Given(), {"latents": torch.zeros(300, 1)}
    for sampling in ("uniform", "logit_normal"):
        some = Denoising(NoiseSchedule(), [], timestep_sampling=sampling, timestep_range=[400, 404])
        some(network, data, Draws(0, range(300)))
        assert set(network.timesteps.tolist()) == {400, 401, 402, 403}, sampling


def test_logit_normal_timesteps_are_validated_on_the_same_grid():
    objective, network = loss(timestep_sampling="logit_normal"), Given()
    objective.learning = False
    for point in objective.grid:
        objective(network, batch(), Draws(0, [0, 1]).pinned(point))
        assert network.timesteps.tolist() == [point["timestep"]] * 2


def test_min_snr_weighs_samples_while_learning():
    data, draws, network = batch(), Draws(0, [3, 8]), Given()
    plain, weighted = loss("v_prediction"), loss("v_prediction", min_snr_gamma=5.0)
    each = [
        plain(network, {n: v[row : row + 1] for n, v in data.items()}, Draws(0, [position])).total
        for row, position in enumerate(draws.positions)
    ]
    total = weighted(network, data, draws).total
    weights = NoiseSchedule(prediction_type="v_prediction").min_snr_weights(network.timesteps, 5.0)
    torch.testing.assert_close(total, (torch.stack(each) * weights).mean())
    weighted.learning = False
    torch.testing.assert_close(weighted(network, data, draws).total, torch.stack(each).mean())


def test_padding_can_be_left_out():
    data = {"latents": torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))}
    padded = {**data, "padding_frames": torch.tensor([1, 1])}
    without = Denoising(NoiseSchedule(prediction_type="sample"), [], skip_padding=True)
    total = without(Given(), padded, Draws(0, [0, 1])).total
    torch.testing.assert_close(total, data["latents"][:, :, 1:].square().mean())
    whole = Denoising(NoiseSchedule(prediction_type="sample"), [])(Given(), padded, Draws(0, [0, 1])).total
    torch.testing.assert_close(whole, data["latents"].square().mean())


def test_each_range_of_timesteps_has_a_figure():
    objective = Denoising(NoiseSchedule(), [], timestep_bins=4)
    plain, network, data = Denoising(NoiseSchedule(), []), Given(), {"latents": torch.zeros(8, 3)}
    first = objective(network, data, Draws(0, range(8)))
    figures = objective.end_step()
    assert list(figures) == ["loss_t0_249", "loss_t250_499", "loss_t500_749", "loss_t750_999"]
    torch.testing.assert_close(first.total, plain(network, data, Draws(0, range(8))).total)
    noise, bins = Draws(0, range(8)).normal("noise", 3), network.timesteps // 250
    for place, value in enumerate(figures.values()):
        mine = noise[bins == place].square()
        torch.testing.assert_close(value, mine.mean(), equal_nan=True)
    other = Denoising(NoiseSchedule(), [], timestep_bins=4)
    other.load_state_dict(objective.state_dict())
    for each in (objective, other):
        each(network, data, Draws(0, range(8, 16)))
    after = objective.end_step()
    torch.testing.assert_close(after, other.end_step(), rtol=0, atol=0, equal_nan=True)  # a resumed run goes on
    objective.learning = False
    objective(network, data, Draws(0, [0] * 8))
    torch.testing.assert_close(objective.end_step(), after, rtol=0, atol=0, equal_nan=True)  # it is not counted
    with pytest.raises(ValueError, match="set loss.timestep_bins"):
        Denoising(NoiseSchedule(), [], timestep_bins=3).load_state_dict(objective.state_dict())


def test_a_range_without_samples_has_no_loss_of_zero():
    objective, network = Denoising(NoiseSchedule(), [], timestep_bins=4), Given()
    objective(network, {"latents": torch.zeros(1, 3)}, Draws(0, [0]))
    unknown = [name for name, value in objective.end_step().items() if torch.isnan(value)]
    assert len(unknown) == 3 and objective.by_timestep.names[int(network.timesteps) // 250] not in unknown


def test_a_sample_that_is_not_finite_spoils_no_figure():
    objective = Denoising(NoiseSchedule(prediction_type="sample"), [], timestep_bins=1)
    data = {"latents": torch.tensor([[1.0], [torch.inf]])}
    objective(Given(), data, Draws(0, [0, 1]))
    assert objective.end_step()["loss_t0_999"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timestep_sampling": "cosine"}, "uniform or logit_normal"),
        ({"timestep_range": [500, 500]}, "the smaller one first"),
        ({"timestep_range": [0, 1001]}, "from 0 to 1000"),
        ({"min_snr_gamma": 0.0}, "above 0"),
        ({"timestep_bins": -1}, "at least 0"),
    ],
)
def test_timesteps_and_weights_that_cannot_be(arguments, message):
    with pytest.raises(UserError, match=message):
        loss(**arguments)


def test_the_loss_falls_for_a_network_that_learns():
    network = torch.nn.Conv2d(4, 4, 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    objective, data, values = loss(), batch(), []
    for _ in range(60):
        total = objective(lambda noisy, timesteps, **_: network(noisy), data, Draws(0, [0, 1])).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(total.item())
    assert values[-1] < 0.5 * values[0]
