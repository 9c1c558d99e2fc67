"""Videos of a text and references: guidance, roll-outs, and what is measured of them."""

import pytest
import torch
from tests import wan

from vireo.diffusion.flow_schedule import FlowSchedule
from vireo.errors import UserError
from vireo.randomness import Draws
from vireo.sampling.reference_measures import colour_distance, flow_errors
from vireo.sampling.reference_videos import ReferenceSampler, RollOutSampler

INPUTS = ["prompt_embeds", "reference_clip", "reference_latents", "reference_mask"]
SIZE = {"num_frames": 21, "height": 16, "width": 16}
EULER = {"scheduler": "FlowMatchEulerDiscreteScheduler"}


class Encoder:
    """Latents are pictures of 16 colours, four frames each, and everything is encoded already."""

    def __call__(self, batch, draws):
        return batch

    def latent_shape(self, num_frames, height, width):
        return 16, 1 + (num_frames - 1) // 4, height // 4, width // 4

    def decode(self, latents):
        frames = latents[:, :3].transpose(1, 2).repeat_interleave(4, dim=1)[:, 3:]
        return (frames.repeat_interleave(4, dim=3).repeat_interleave(4, dim=4) / 6 + 0.5).clamp(0, 1)


class Flow:
    """A network that knows where every noisy sample comes from: its clean latents depend on what it is given."""

    def __init__(self):
        self.calls = []

    def __call__(self, noisy, timesteps, prompt_embeds, reference_mask, reference_scale=1.0, **others):
        self.calls.append((timesteps, reference_mask))
        text = prompt_embeds.mean((1, 2)) * 10
        clean = (text + 3 * reference_scale * reference_mask.any(1)).view(-1, 1, 1, 1, 1).expand_as(noisy)
        return (noisy - clean) / (timesteps / 1000).view(-1, 1, 1, 1, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return wan.save_base(tmp_path_factory.mktemp("wan"))


def batch(rows=2, references=1):
    drawn = Draws("data", range(rows))
    return {
        "prompt_embeds": 0.1 * torch.ones(rows, 12, 20),
        "null_prompt_embeds": torch.zeros(rows, 12, 20),
        "reference_clip": drawn.normal("clip", references, 5, 24),
        "reference_latents": drawn.normal("reference", 16, references, 4, 4),
        "reference_mask": torch.ones(rows, references, dtype=torch.bool),
        "latents": drawn.normal("latents", 16, 6, 4, 4),
        "frames": drawn.integers("frames", 0, 256, 21, 3, 16, 16).to(torch.uint8),
        "references": drawn.integers("pictures", 0, 256, references, 3, 16, 16).to(torch.uint8),
        "position": list(range(rows)),
    }


def sampled(network=None, rows=2, kind=ReferenceSampler, **options):
    sampler = kind(FlowSchedule(), INPUTS, **SIZE, **options)
    return sampler.sample(network or Flow(), Encoder(), batch(rows), Draws("sampling", range(rows)))


class TestAllAtOnce:
    @pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
    def test_it_ends_where_the_network_points(self, scheduler):
        found = sampled(num_inference_steps=6, text_guidance=1.0, scheduler=scheduler)
        assert found.shape == (2, 16, 6, 4, 4)
        torch.testing.assert_close(found, torch.full_like(found, 4.0), rtol=0, atol=0.05)

    @pytest.mark.parametrize(
        ("text", "reference", "wanted", "passes"),
        [(1, 1, 4, 1), (5, 1, 3 + 5, 2), (5, 5, 5 * 4, 2), (5, 2, 2 * 3 + 5, 3), (0, 1, 3, 1)],
    )
    def test_guidance_by_text_and_references(self, text, reference, wanted, passes):
        network = Flow()
        found = sampled(network, num_inference_steps=4, text_guidance=text, reference_guidance=reference, **EULER)
        torch.testing.assert_close(found, torch.full_like(found, float(wanted)), rtol=0, atol=1e-3)
        assert all(len(timesteps) == 2 * passes for timesteps, _ in network.calls)
        assert all(mask.dtype == torch.bool for _, mask in network.calls)

    def test_the_scale_reaches_the_network(self):
        found = sampled(num_inference_steps=2, text_guidance=1.0, reference_scale=0.5, **EULER)
        torch.testing.assert_close(found, torch.full_like(found, 2.5), rtol=0, atol=1e-3)

    def test_a_clip_does_not_depend_on_its_batch(self, folder):
        network = wan.filled(wan.network(folder))
        for kind, options in ((ReferenceSampler, EULER), (RollOutSampler, {})):
            made = network if kind is ReferenceSampler else causal(folder)
            steps = {"num_inference_steps": 2} if kind is ReferenceSampler else {}
            pair, alone = (sampled(made, rows, kind, **options, **steps) for rows in (2, 1))
            torch.testing.assert_close(pair[:1], alone, rtol=0, atol=1e-4)

    def test_columns(self):
        sampler = ReferenceSampler(FlowSchedule(), INPUTS, **SIZE, num_inference_steps=2)
        data, network = batch(references=2), Flow()
        columns = sampler(network, Encoder(), data, Draws("sampling", [0, 1]))
        assert list(columns) == ["references", "target", "prediction", "vae"]
        assert columns["references"].shape == (2, 2, 3, 16, 16)
        assert {columns[name].shape for name in ("target", "prediction", "vae")} == {(2, 21, 3, 16, 16)}
        assert all(column.min() >= 0 and column.max() <= 1 for column in columns.values())
        baselines = sampler.baselines(data)
        assert {column.shape for column in baselines.values()} == {(2, 21, 3, 16, 16)}
        figures = sampler.measure(network, Encoder(), data, {**columns, **baselines})
        assert {value.shape for value in figures.values()} == {(2,)}
        assert {"reference_gain", "colour_distance", "target/colour_distance"} <= figures.keys()

    def test_without_references_it_is_text_to_video(self):
        given = {name: value for name, value in batch().items() if "reference" not in name}
        sampler = ReferenceSampler(FlowSchedule(), ["prompt_embeds"], **SIZE, **EULER, num_inference_steps=2)

        def network(noisy, timesteps, prompt_embeds, reference_scale):
            return torch.zeros_like(noisy)

        columns = sampler(network, Encoder(), given, Draws("sampling", range(2)))
        assert set(columns) == {"target", "prediction", "vae"}
        assert sampler.baselines(given) == {} and sampler.measure(network, Encoder(), given, columns) == {}

    def test_without_a_truth(self):
        sampler = ReferenceSampler(FlowSchedule(), INPUTS, **SIZE, num_inference_steps=2)
        data = {name: value for name, value in batch().items() if name not in ("latents", "frames")}
        columns = sampler(Flow(), Encoder(), data, Draws("sampling", [0, 1]))
        assert list(columns) == ["references", "prediction"]
        assert list(sampler.measure(Flow(), Encoder(), data, columns)) == ["colour_distance"]


def causal(folder, group=3):
    return wan.filled(wan.network(folder, mode="causal", group_frames=group, window_frames=None, sink_frames=0))


class TestRollOut:
    def test_it_ends_where_the_network_points(self):
        class Cached(Flow):
            def __call__(self, noisy, timesteps, cache, keep=False, **conditions):
                assert not keep or float(timesteps.max()) == 0
                return super().__call__(noisy, timesteps.clamp(min=1), **conditions)

        network = Cached()
        found = sampled(network, kind=RollOutSampler)
        torch.testing.assert_close(found, torch.full_like(found, 4.0), rtol=0, atol=1e-3)
        times = [float(timesteps[0]) for timesteps, _ in network.calls]
        torch.testing.assert_close(
            times, [1000.0, 937.5, 5000 / 6, 625.0, 1.0] * 2
        )  # table[1000 - s], then the context

    @torch.no_grad()
    def test_one_group_is_the_parallel_forward(self, folder):
        """The same few steps without any cache, on all frames at once."""
        network, data, draws = causal(folder, 6), batch(), Draws("sampling", [0, 1])
        found = sampled(network, kind=RollOutSampler, group_frames=6)
        conditions = {name: data[name] for name in INPUTS}
        schedule, latents = FlowSchedule(), torch.zeros(2, 16, 6, 4, 4)
        for step, place in enumerate([999, 749, 499, 249]):
            times = schedule.timesteps(torch.tensor([place, place]))
            noisy = schedule.add_noise(
                latents, draws.normal(f"sampling noise of group 0, step {step}", 16, 6, 4, 4), times
            )
            latents = schedule.to_clean(network(noisy, times, **conditions), noisy, times)
        assert torch.equal(found, latents)

    @torch.no_grad()
    def test_later_groups_see_earlier_ones(self, folder):
        network = causal(folder)
        found, alone = sampled(network, kind=RollOutSampler), sampled(network, kind=RollOutSampler, group_frames=6)
        assert found.shape == alone.shape
        forgetful = sampled(
            wan.filled(wan.network(folder, mode="causal", window_frames=3, sink_frames=0)), kind=RollOutSampler
        )
        torch.testing.assert_close(found[:, :, :3], forgetful[:, :, :3])
        assert (found[:, :, 3:] - forgetful[:, :, 3:]).abs().max() > 1e-2

    def test_guidance_has_a_cache_for_each_pass(self, folder):
        found = sampled(causal(folder), kind=RollOutSampler, text_guidance=3.0)
        assert torch.isfinite(found).all() and not torch.equal(found, sampled(causal(folder), kind=RollOutSampler))

    def test_bidirectional_weights_are_refused(self, folder):
        with pytest.raises(UserError, match="mode=causal"):
            sampled(wan.network(folder), kind=RollOutSampler)

    def test_steps_can_be_listed(self):
        sampler = RollOutSampler(FlowSchedule(), INPUTS, **SIZE, denoising_steps=[1000, 500])
        assert sampler.timesteps == pytest.approx([1000, 5000 / 6])

    def test_settings_are_checked(self):
        for wrong in ({"denoising_steps": [250, 500]}, {"denoising_steps": []}, {"denoising_steps": [2000, 1]}):
            with pytest.raises(UserError, match="denoising_steps"):
                sampled(kind=RollOutSampler, **wrong)
        for wrong in ({"group_frames": 0}, {"context_noise": 1000}):
            with pytest.raises(UserError, match=next(iter(wrong))):
                sampled(kind=RollOutSampler, **wrong)
        with pytest.raises(UserError, match="group_frames=4"):
            sampled(kind=RollOutSampler, group_frames=4)
        with pytest.raises(UserError, match="num_inference_steps=0"):
            sampled(num_inference_steps=0)


class TestMeasures:
    def test_the_gain_is_what_references_take_from_the_error(self):
        class Knows:
            """Predicts the flow, the better the more of the right references it sees."""

            def __call__(self, noisy, timesteps, reference_mask, **others):
                self.seen = noisy
                error = torch.where(reference_mask.any(1), 0.5, 2.0).view(-1, 1, 1, 1, 1)
                return draws.normal("noise", *noisy.shape[1:]) - data["latents"] + error

        data, sampler = batch(), ReferenceSampler(FlowSchedule(), INPUTS, **SIZE)
        draws = Draws("reference gain", [0, 1])
        gain = sampler.measure(Knows(), Encoder(), data, {})["reference_gain"]
        torch.testing.assert_close(gain, torch.full((2,), 4 - 0.25), rtol=1e-4, atol=1e-4)

    def test_errors_inside_a_mask(self):
        data, draws = batch(), Draws(0, [0, 1])
        target = draws.normal("noise", 16, 6, 4, 4) - data["latents"]
        mask = torch.zeros(2, 1, 6, 4, 4)
        mask[..., :1] = 1

        def nothing(noisy, timesteps):
            return torch.zeros_like(noisy)

        found = flow_errors(nothing, FlowSchedule(), data["latents"], draws, 500.0, {}, mask)
        torch.testing.assert_close(found, target[..., :1].square().mean((1, 2, 3, 4)))

    def test_colours(self):
        red, blue, white = (
            torch.tensor(c).view(1, 1, 3, 1, 1).expand(1, 1, 3, 8, 8) for c in ([1.0, 0, 0], [0, 0, 1.0], [1.0] * 3)
        )
        subject = torch.cat([red[..., :4], white[..., :4]], dim=-1)
        present = torch.tensor([[True]])
        assert colour_distance(subject, present, red).item() == 0
        assert colour_distance(subject, present, blue).item() == 1
        half = torch.cat([red[..., :4], blue[..., :4]], dim=-1)
        assert 0 < colour_distance(subject, present, half).item() < 1
        two, padded = torch.cat([subject, blue], dim=1), torch.tensor([[True, False]])
        assert colour_distance(two, padded, red).item() == 0
        assert colour_distance(white, present, red).item() == 1
