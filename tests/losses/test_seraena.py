"""The discriminator's lessons and corrections: the reference's numbers, and what follows from the method."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tests.golden.fill import fill, noise

from vireo.errors import UserError
from vireo.losses.seraena import Seraena
from vireo.models.seraena_discriminator import SeraenaDiscriminator
from vireo.randomness import Draws

GOLDEN = Path(__file__).parents[1] / "golden" / "taehv"


class RecordedDraws:
    """Draws by purpose, for clips whose groups they were recorded for in order."""

    def __init__(self, clips=1, **recorded):
        self.positions = list(range(clips))
        self.recorded = recorded

    def to(self, device):
        return self

    def uniform(self, purpose, *shape):
        return torch.tensor(self.recorded[purpose]).view(len(self.positions), *shape)

    def integers(self, purpose, low, high, *shape):
        numbers = self.uniform(purpose, *shape)
        assert low <= numbers.min() and numbers.max() < high
        return numbers


def recorded_draws(fake_mask, sample, replace=(), clips=1):
    """The reference's draws: it takes the first half of the new fakes, and fills the buffer before it overwrites."""
    count = len(fake_mask)
    return RecordedDraws(
        clips,
        decoder_input=[0.5] * clips,
        seraena_coin=[0.25 if fake else 0.75 for fake in fake_mask.tolist()],
        seraena_replay=[0] * (count - len(sample)) + list(sample),
        seraena_slot=[0] * (count - len(replace)) + list(replace),
    )


def golden_discriminator(gain=1.0):
    network = fill(SeraenaDiscriminator(9, 16), rename=lambda name: f"disc.{name}")
    for block in network.blocks:
        block[1].reset_running_stats()
    with torch.no_grad():
        for proj in network.proj:
            proj.weight *= gain
    return network


def distance(found, expected):
    """Relative L2 norm of the difference."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("name", "gain", "tolerances"), [("seraena_c9", 1, (3e-2, 2e-1)), ("seraena_gain", 200, (1e-3,))]
)
def test_golden_steps(name, gain, tolerances):
    described, expected = json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")
    length = described["config"]["max_buff_len"]
    seraena = Seraena(golden_discriminator(gain), replay="reference", replay_dtype="float32", replay_length=length)
    scores = []
    seraena.discriminator.register_forward_hook(
        lambda module, _, output: scores.append((module.training, output.detach()))
    )
    for step, drawn in enumerate(described["random"]["draws"]):
        real, fake, context = (
            noise(f"{name}.{key}{step}", *described["inputs"][key]["shape"]) for key in ("real", "fake", "ctx")
        )
        real, fake = (0.5 + 0.5 * real).clamp(0, 1), 0.5 + 0.5 * F.avg_pool2d(fake, 3, 1, 1)
        draws = recorded_draws(expected[f"step{step}.fake_mask"], drawn["sample"], drawn["replace"])
        scores.clear()
        found = seraena(real, fake, context, draws)
        (learned, first), (judged, wanted), (_, given) = scores
        assert learned and not judged
        figures = {
            "disc_loss": found.discriminator_loss,
            "disc_pred": first,
            "feature_loss": (wanted - given).square().mean(dim=(1, 2, 3)),
            "grad_std": found.deviation,
            "loss": found.correction.square().mean(),
        }
        for key, value in figures.items():
            assert distance(value, expected[f"step{step}.{key}"]) < 1e-2, (step, key)
        assert (
            distance(found.correction, expected[f"step{step}.correction"]) < tolerances[min(step, len(tolerances) - 1)]
        )
        assert found.feature_loss.item() == pytest.approx(figures["feature_loss"].mean().item())
    state = seraena.state_dict()
    norms = torch.stack([state[key].norm() for key in described["state_order"]])
    torch.testing.assert_close(norms, expected["state_l2"], rtol=1e-3, atol=0)
    for key in [key for key in expected if key.startswith("state.")]:
        assert distance(state[key.removeprefix("state.")], expected[key]) < 1e-3, key


SIDE, CHANNELS = 16, 6


def small(seed=0, **options):
    torch.manual_seed(seed)
    return Seraena(SeraenaDiscriminator(CHANNELS, 2, width=4), **{"replay_length": 8, **options})


def groups(count, step=0):
    """Real groups are smooth, fakes are noisier."""
    generator = torch.Generator().manual_seed(step)
    real = torch.rand(count, CHANNELS, 1, 1, generator=generator).expand(-1, -1, SIDE, SIDE)
    fake = real + 0.3 * torch.randn(count, CHANNELS, SIDE, SIDE, generator=generator)
    return real, fake, torch.randn(count, 2, 2, 2, generator=generator)


def lesson(seraena, clips=2, group_count=2, step=0):
    draws = Draws(0, range(clips * step, clips * (step + 1)), step=step)
    return seraena(*groups(clips * group_count, step), draws)


@pytest.mark.parametrize("replay", ["position", "reference"])
@pytest.mark.parametrize(("clips", "group_count"), [(1, 1), (1, 3), (3, 1), (2, 5)])
def test_any_number_of_groups(replay, clips, group_count):
    seraena = small(replay=replay)
    for step in range(5):
        found = lesson(seraena, clips, group_count, step)
        assert all(torch.isfinite(value).all() and not value.requires_grad for value in found)
    assert seraena.replay.count == min(8, 5 * clips * group_count)


def test_it_learns_to_tell_them_apart():
    seraena = small(lr=3e-3)
    losses = [float(lesson(seraena, clips=4, step=step).discriminator_loss) for step in range(40)]
    assert losses[0] > 0.8
    assert sum(losses[-5:]) / 5 < 0.6


def test_a_correction_brings_the_features_nearer_to_the_real_ones():
    seraena = small(eps=1e-12)
    for step in range(10):
        lesson(seraena, step=step)
    real, fake, context = groups(4, step=99)
    correction, deviation, before = seraena.correct(real, fake, context)
    assert correction.std(correction=0).item() == pytest.approx(1, rel=1e-4)
    assert seraena.correct(real, fake + 0.01 * correction, context)[2] < before
    assert seraena.correct(real, fake - 0.01 * correction, context)[2] > before
    assert seraena.correct(real, real, context)[1] == 0


def test_the_floor_follows_the_gradient_to_other_sizes():
    fixed, scaled = small(), small(eps_reference_hw=64)
    assert fixed.floor(64, 64) == fixed.floor(480, 720) == scaled.floor(64, 64) == 1e-5
    assert scaled.floor(128, 128) == 1e-5 / 4
    corrections, deviation, _ = scaled.correct(*groups(2))
    assert deviation < 1e-4
    assert corrections.std(correction=0).item() == pytest.approx(float(deviation / (deviation + 16e-5)), rel=1e-4)


def test_a_groups_slot_is_its_position():
    seraena = small()
    _, fake, context = groups(6)
    seraena(*groups(6), Draws(0, [3, 4, 6]))  # group positions 6 7 8 9 12 13 in a ring of 8
    assert seraena.replay.filled.nonzero().flatten().tolist() == [0, 1, 4, 5, 6, 7]
    kept, contexts = seraena.replay.take(torch.arange(6))
    torch.testing.assert_close(kept, fake[[2, 3, 4, 5, 0, 1]].clamp(0, 1), rtol=0, atol=0.51 / 255)
    torch.testing.assert_close(contexts, context[[2, 3, 4, 5, 0, 1]], rtol=2**-8, atol=0)


def test_draws_belong_to_positions_not_to_batches():
    """The same clips in another order are the same lesson."""
    seraena, other = small(), small()
    data = groups(4)
    swapped = [x.view(2, 2, *x.shape[1:]).flip(0).flatten(0, 1) for x in data]
    one, two = seraena(*data, Draws(0, [0, 1])), other(*swapped, Draws(0, [1, 0]))
    assert torch.equal(seraena.replay.fakes, other.replay.fakes)
    assert float(one.discriminator_loss) == pytest.approx(float(two.discriminator_loss), rel=1e-5)
    assert float(one.deviation) == pytest.approx(float(two.deviation), rel=1e-2)


def test_about_half_of_the_fakes_are_remembered_ones():
    seraena = small(replay_length=64, replay_dtype="float32")
    shares = []
    for step in range(30):
        _, fake, context = groups(8, step)
        mixed, contexts = seraena._mixed(fake, context, Draws(0, range(4 * step, 4 * step + 4)))
        fresh = [torch.equal(a, b) for a, b in zip(mixed, fake, strict=True)]
        assert fresh == [torch.equal(a, b) for a, b in zip(contexts, context, strict=True)]
        shares.append(sum(fresh) / 8)
    assert 0.4 < sum(shares) / 30 < 0.65


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_it(dtype):
    inside, outside = small(), small()
    with torch.autocast("cpu", dtype):
        found = lesson(inside)
    expected = lesson(outside)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("replay_dtype", ["uint8", "bfloat16", "float32"])
def test_a_restored_state_goes_on_bitwise(replay_dtype):
    seraena, other = small(replay_dtype=replay_dtype), small(seed=1, replay_dtype=replay_dtype)
    for step in range(3):
        lesson(seraena, clips=1, step=step)
    other.load_state_dict({name: value.clone() for name, value in seraena.state_dict().items()})
    for step in range(3, 6):
        found, expected = lesson(other, clips=1, step=step), lesson(seraena, clips=1, step=step)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    states = seraena.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert {name.partition(".")[0] for name in states[0]} == {"disc", "optimizer", "replay"}


def test_a_state_from_before_the_first_lesson():
    seraena = small(seed=1)
    lesson(seraena)
    seraena.load_state_dict(small().state_dict())
    assert seraena.replay is None
    torch.testing.assert_close(lesson(seraena).correction, lesson(small()).correction, rtol=0, atol=0)


def test_states_of_something_else_are_refused():
    seraena = small()
    lesson(seraena)
    state = seraena.state_dict()
    with pytest.raises(UserError, match="replay has 8 slots"):
        small(replay_length=4).load_state_dict(state)
    with pytest.raises(UserError, match="not loss.discriminator"):
        Seraena(SeraenaDiscriminator(CHANNELS, 3, width=4)).load_state_dict(state)
    with pytest.raises(UserError, match="ema.x, which Seraena does not keep"):
        seraena.load_state_dict({**state, "ema.x": torch.zeros(1)})
    with pytest.raises(UserError, match="init_from"):
        seraena.load_state_dict({})


@pytest.mark.parametrize("options", [{"replay": "random"}, {"replay_dtype": "int4"}])
def test_impossible_settings(options):
    with pytest.raises(UserError, match="loss.replay must be"):
        small(**options)
