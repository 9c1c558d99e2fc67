"""Whether a network looks at its references, measured where it is known."""

import pytest
import torch
from tests import wan
from tests.sampling.test_reference_videos import INPUTS, SIZE, Encoder

from vireo.diffusion.flow_schedule import FlowSchedule
from vireo.errors import UserError
from vireo.models import wan_weights
from vireo.randomness import Draws
from vireo.sampling.evaluation import Evaluated
from vireo.sampling.reference_evaluations import BasePreservation, ReferenceGain
from vireo.sampling.reference_videos import ReferenceSampler
from vireo.weights import initialize_from

CPU = torch.device("cpu")


class Stream:
    """Held-out clips, each with a reference of its own: a number, which is also the mean of its latents."""

    seed = "validation"

    def batch(self, indices, device):
        draws, rows = Draws("clips", indices), len(indices)
        numbers = torch.tensor(indices, dtype=torch.float32)
        return {
            "position": list(indices),
            "latents": draws.normal("latents", 16, 6, 4, 4) / 10 + numbers.view(-1, 1, 1, 1, 1),
            "prompt_embeds": torch.ones(rows, 12, 20),
            "reference_clip": numbers.view(-1, 1, 1, 1).expand(rows, 1, 5, 24),
            "reference_latents": numbers.view(-1, 1, 1, 1, 1).expand(rows, 16, 1, 4, 4),
            "reference_mask": torch.ones(rows, 1, dtype=torch.bool),
            "subject_mask": torch.ones(rows, 1, 1, 8, 8, dtype=torch.uint8),
        }


class Looks:
    """A network that guesses the latents from the number that its reference shows, or takes them for 0."""

    def __call__(self, noisy, timesteps, reference_clip, reference_mask, **others):
        number = torch.where(reference_mask[:, 0], reference_clip[:, 0, 0, 0], torch.tensor(0.0))
        return (noisy - number.view(-1, 1, 1, 1, 1)) / (timesteps / 1000).view(-1, 1, 1, 1, 1)


def evaluated(evaluation, network, count=3, sampler=None):
    sampler = sampler or ReferenceSampler(FlowSchedule(), INPUTS, **SIZE)
    return evaluation(Evaluated(network, Encoder(), sampler, Stream(), range(count), CPU, None))


class TestGain:
    def test_a_network_that_looks(self):
        rows = evaluated(ReferenceGain(timesteps=[1000.0], batch_size=2), Looks())
        regions = {(row["timestep"], row["region"]) for row in rows}
        assert regions == {(t, r) for t in (1000.0, "all") for r in ("frame", "subject")} and len(rows) == 4
        assert [row["timestep"] for row in rows] == [1000.0, 1000.0, "all", "all"]
        for row in rows:
            assert row["clips"] == 3 and row["right"] == pytest.approx(0.01, rel=0.2)
            # Clip 0 sees 1's number, 1 sees 2's, 2 sees 0's: squared errors of 1, 1 and 4. Without any: 0, 1 and 4.
            assert row["gain_over_other"] == pytest.approx(2, rel=0.1)
            assert row["gain_over_none"] == pytest.approx(5 / 3, rel=0.1)

    def test_it_is_zero_before_the_first_step(self, tmp_path):
        rows = evaluated(ReferenceGain(timesteps=[300.0, 900.0]), wan.network(wan.save_base(tmp_path)))
        assert len(rows) == 6 and all(row["gain_over_other"] == row["gain_over_none"] == 0 for row in rows)

    def test_it_needs_another_clip(self):
        with pytest.raises(UserError, match="two held-out clips"):
            evaluated(ReferenceGain(), Looks(), count=1)

    def test_settings_are_checked(self):
        for timesteps in ([], [0.0], [1500.0]):
            with pytest.raises(UserError, match="1000 sigma"):
                ReferenceGain(timesteps=timesteps)

    def test_it_needs_a_sampler_with_references(self):
        with pytest.raises(UserError, match="reference_videos"):
            evaluated(ReferenceGain(), Looks(), sampler=object())


class TestBase:
    @pytest.fixture(params=["bidirectional", "causal"])
    def network(self, request, tmp_path):
        return wan.network(wan.save_base(tmp_path), mode=request.param)

    @torch.no_grad()
    def test_new_modules_leave_it_alone(self, network):
        base = {name: value.clone() for name, value in network.transformer.state_dict().items()}
        wan.filled(network)
        network.transformer.load_state_dict({name: v for name, v in base.items() if "vae" not in name}, strict=False)
        (row,) = evaluated(BasePreservation(), network)
        assert row["timestep"] == 500.0 and row["largest"] == row["relative"] == 0

    @torch.no_grad()
    def test_other_changes_show(self, network):
        own = network.transformer
        own.blocks[1].attn2.to_v.weight.mul_(1.1)
        (row,) = evaluated(BasePreservation(), network)
        assert row["largest"] > 0 and 0 < row["relative"] < 0.1
        assert network.transformer is own

    @torch.no_grad()
    def test_the_base_is_what_training_began_with(self, tmp_path):
        """An export in which parts of Wan had learnt is the base of who goes on from it, and not of who only looks."""
        folder = wan.save_base(tmp_path)
        first = wan.network(folder)
        first.transformer.blocks[1].attn2.to_v.weight.mul_(1.1)
        export = wan_weights.save_published(
            tmp_path / "model.pt",
            {name.removeprefix("transformer."): value for name, value in first.state_dict().items()},
        )
        second, looked_at = wan.network(folder), wan.network(folder)
        initialize_from(second, export)
        looked_at.load(export)
        (row,), (other,) = (evaluated(BasePreservation(), network) for network in (second, looked_at))
        assert row["largest"] == 0 < other["largest"]
        second.transformer.blocks[0].attn2.to_v.weight.mul_(1.1)
        (row,) = evaluated(BasePreservation(), second)
        assert row["largest"] > 0

    def test_other_networks_have_none(self):
        with pytest.raises(UserError, match="has no base"):
            evaluated(BasePreservation(), Looks())
