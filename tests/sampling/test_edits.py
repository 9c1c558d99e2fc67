"""What the sampler of edits makes, shows and measures."""

import pytest
import torch
from tests.edit_toys import FRAMES, SCALE, SIDE, Editor, Halving, LastFrame, batch

from vireo.diffusion.noise_schedule import NoiseSchedule
from vireo.errors import UserError
from vireo.metrics import ssim_map
from vireo.pixels import to_pixels
from vireo.randomness import Draws
from vireo.sampling.edits import EditSampler

INPUTS = ["condition_latents", "prompt_embeds"]
COLUMNS = ["inputs", "target", "prediction", "vae", "copy-last vae"]


def sampler(prediction_type="epsilon", **options):
    return EditSampler(NoiseSchedule(prediction_type=prediction_type), INPUTS, **{"num_inference_steps": 3, **options})


def copying(**options):
    """A sampler for `LastFrame`, whose prediction it decodes as it is."""
    return sampler("sample", scheduler="DDIMScheduler", **options)


def encoded(clips=(0, 1), frames=FRAMES):
    encoder, draws = Halving(), Draws("validation", clips)
    return encoder, encoder(batch(clips, frames), draws), draws


def columns(chosen, network, clips=(0, 1), frames=FRAMES):
    encoder, data, draws = encoded(clips, frames)
    return chosen(network, encoder, data, draws), data, encoder


def test_columns():
    made, data, _ = columns(sampler(), Editor())
    assert list(made) == COLUMNS
    assert made["inputs"].shape == (2, 3, 3, SIDE, SIDE)
    assert torch.equal(made["inputs"], to_pixels(data["frames"][:, [0, 2, 3]], low=0))
    for name in COLUMNS[1:]:
        assert made[name].shape == (2, 1, 3, SIDE, SIDE) and made[name].dtype == torch.float32
        assert made[name].min() >= 0 and made[name].max() <= 1
    assert torch.equal(made["target"][:, 0], to_pixels(data["target"], low=0))


def test_the_published_recipe_shows_00_10_and_19():
    made, data, _ = columns(copying(), LastFrame(), (0,), frames=20)
    assert torch.equal(made["inputs"], to_pixels(data["frames"][:, [0, 10, 19]], low=0))


def test_one_condition_frame_is_enough():
    made, _, _ = columns(copying(), LastFrame(), (0,), frames=1)
    assert made["inputs"].shape == (1, 1, 3, SIDE, SIDE)


def test_a_network_that_copies_gives_the_last_frame_through_the_vae():
    made, data, encoder = columns(copying(text_guidance=1.0, image_guidance=1.0), LastFrame())
    torch.testing.assert_close(made["prediction"], made["copy-last vae"], rtol=0, atol=1e-5)
    ceiling = encoder.decode(encoder.encode("target_moments", data["target"])[:, :4] * SCALE)
    torch.testing.assert_close(made["vae"][:, 0], ceiling.clamp(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "DDIMScheduler", "DDPMScheduler"])
def test_a_clip_does_not_depend_on_its_batch(scheduler):
    network, chosen = Editor(), sampler(scheduler=scheduler)
    both = columns(chosen, network, (0, 3))[0]
    for row, clip in enumerate((0, 3)):
        alone = columns(chosen, network, (clip,))[0]
        torch.testing.assert_close(both["prediction"][row], alone["prediction"][0], rtol=0, atol=1e-5)
    assert not torch.equal(both["prediction"][0], both["prediction"][1])


def test_the_same_numbers_again_and_none_of_the_global_state():
    network = Editor()
    first = columns(sampler(), network)[0]["prediction"]
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(columns(sampler(), network)[0]["prediction"], first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("text, image, passes", [(7.5, 1.5, 3), (7.5, 1.0, 2), (2.0, 2.0, 2), (1.0, 1.0, 1)])
def test_one_call_a_step_with_the_passes_that_count(text, image, passes):
    network = Editor()
    columns(sampler(text_guidance=text, image_guidance=image), network)
    assert network.batches == [2 * passes] * 3


def test_guidance_and_settings_of_the_scheduler_matter():
    network = Editor()
    chosen = [
        sampler(),
        sampler(text_guidance=1.0),
        sampler(image_guidance=1.0),
        sampler(num_inference_steps=4),
        sampler(scheduler="DDIMScheduler"),
        sampler(scheduler="DDIMScheduler", scheduler_settings={"timestep_spacing": "trailing"}),
    ]
    sums = {float(each.sample(network, encoded()[1], encoded()[2]).sum()) for each in chosen}
    assert len(sums) == len(chosen)


def test_further_guidance_is_a_column_each_by_the_same_noise():
    network = Editor()
    made = columns(sampler(further_guidance=[(3, 1.5), (1.0, 1.0)]), network)[0]
    assert list(made) == [
        "inputs",
        "target",
        "prediction",
        "text 3 image 1.5",
        "text 1 image 1",
        "vae",
        "copy-last vae",
    ]
    for title, text, image in (("text 3 image 1.5", 3.0, 1.5), ("text 1 image 1", 1.0, 1.0)):
        alone = columns(sampler(text_guidance=text, image_guidance=image), network)[0]
        assert torch.equal(made[title], alone["prediction"]) and not torch.equal(made[title], made["prediction"])


def test_baselines():
    data = encoded()[1]
    found = sampler().baselines(data)
    assert torch.equal(found["copy-last"], to_pixels(data["frames"][:, -1:], low=0))
    assert torch.equal(found["copy-first"], to_pixels(data["frames"][:, :1], low=0))


def test_measures_of_the_region_that_changes():
    last = torch.full((1, 1, 3, 4, 4), 100, dtype=torch.uint8)
    target = last[:, 0].clone()
    target[..., :2, :] = 200  # the upper half changes
    data = {"frames": last, "target": target}
    pixels = to_pixels(target, low=0)[:, None]
    shown = {"target": pixels, "prediction": pixels.clone(), "copy-last": to_pixels(last, low=0), "inputs": pixels}
    shown["prediction"][..., 2:, :] = 0.0  # wrong, but only where nothing happens
    figures = sampler().measure(Editor(), Halving(), data, shown)
    assert "inputs/l1" not in figures and "target/l1" not in figures
    for prefix, title in (("", "prediction"), ("copy-last/", "copy-last")):
        of_region = ssim_map(shown[title], pixels)[..., :2, :].mean()
        assert float(figures.pop(f"{prefix}changed_ssim")) == pytest.approx(float(of_region), rel=1e-6)
    assert {name: float(value) for name, value in figures.items()} == pytest.approx(
        {
            "changed_fraction": 0.5,
            "l1": 0.5 * 100 / 255,
            "changed_l1": 0.0,
            "changed_psnr": 100.0,
            "copy-last/l1": 0.5 * 100 / 255,
            "copy-last/changed_l1": 100 / 255,
            "copy-last/changed_psnr": -20 * torch.log10(torch.tensor(100 / 255)).item(),
        },
        rel=1e-5,
    )


def test_where_nothing_changes_the_whole_frame_counts():
    still = torch.full((1, 1, 3, 4, 4), 100, dtype=torch.uint8)
    shown = {"target": to_pixels(still, low=0), "prediction": to_pixels(still, low=0) + 0.2}
    figures = sampler().measure(Editor(), Halving(), {"frames": still, "target": still[:, 0] + 5}, shown)
    assert figures["changed_fraction"] == 0
    assert float(figures["changed_l1"]) == pytest.approx(0.2, abs=1e-6) == float(figures["l1"])
    sharp = sampler(change_threshold=0.01).measure(
        Editor(), Halving(), {"frames": still, "target": still[:, 0] + 5}, shown
    )
    assert sharp["changed_fraction"] == 1


def test_a_roll_out_encodes_each_new_frame_once_and_equals_encoding_everything_anew():
    network, chosen = Editor(), sampler()
    encoder, data, draws = encoded()
    encoder.calls.clear()
    made = chosen.roll_out(network, encoder, data, draws, num_frames=3)
    assert encoder.calls == ["target_moments"] * 2, "two frames come back, the third is only shown"
    frames = data["frames"]
    for number in range(3):
        window = Halving().encode("frame_moments", frames)[:, :, :4]
        latents = chosen.sample(network, {**data, "condition_latents": window}, draws, number)
        picture = (encoder.decode(latents) * 255).round().clamp(0, 255).to(torch.uint8)
        assert (made[:, number].int() - picture.int()).abs().max() <= 1
        frames = torch.cat([frames[:, 1:], made[:, number, None]], dim=1)


def test_the_first_frame_of_a_roll_out_is_the_prediction():
    network, chosen = Editor(), sampler()
    encoder, data, draws = encoded()
    prediction = chosen(network, encoder, data, draws)["prediction"]
    rolled = to_pixels(chosen.roll_out(network, encoder, data, draws, 1), low=0)
    torch.testing.assert_close(rolled, prediction, rtol=0, atol=0.51 / 255)


def test_latents_may_be_recycled_without_the_vae():
    encoder, data, draws = encoded()
    encoder.calls.clear()
    made = sampler(recycle="latents").roll_out(Editor(), encoder, data, draws, 3)
    assert encoder.calls == [] and made.shape == (2, 3, 3, SIDE, SIDE)
    assert not torch.equal(made, sampler().roll_out(Editor(), encoder, data, draws, 3))


def test_noise_of_a_roll_out():
    encoder, data, draws = encoded()
    network = Editor()
    network.mix.weight.data[:, 4:] = 0  # blind to its conditions, so that only the noise tells frames apart
    same, new = (
        sampler(roll_out_noise=policy).roll_out(network, encoder, data, draws, 3) for policy in ("same", "new")
    )
    assert torch.equal(same[:, 0], same[:, 1]) and torch.equal(same[:, 0], new[:, 0])
    assert not torch.equal(new[:, 0], new[:, 1]) and not torch.equal(new[:, 1], new[:, 2])


def test_a_roll_out_beside_the_truth():
    encoder, data, draws = encoded()
    chosen = copying(roll_out_frames=3, text_guidance=1.0, image_guidance=1.0)
    videos = chosen.videos(LastFrame(), encoder, data, draws)["roll_out"]
    frames = to_pixels(torch.cat([data["frames"], data["target"][:, None]], 1), low=0)
    assert torch.equal(videos["target"], frames[:, 2:])
    assert torch.equal(videos["copy-last"], frames[:, 1:2].expand(-1, 3, -1, -1, -1))
    last = encoder.decode(data["condition_latents"][:, 1] * SCALE)
    torch.testing.assert_close(videos["prediction"][:, 0], last, rtol=0, atol=0.51 / 255)


def test_a_roll_out_is_no_longer_than_the_window():
    encoder, data, draws = encoded()
    made = copying(roll_out_frames=99).videos(LastFrame(), encoder, data, draws)
    assert made["roll_out"]["target"].shape[1] == FRAMES
    encoder, data, draws = encoded(frames=1)
    assert copying().videos(LastFrame(), encoder, data, draws) == {}


def test_frames_that_are_not_evenly_spaced_have_no_roll_out(caplog):
    encoder, data, draws = encoded()
    chosen = copying()
    for numbers, count in (([16, 17, 18, 19, 20], 1), ([4, 8, 12, 16, 20], 1), ([4, 10, 15, 19, 20], 0)):
        for _ in range(2):
            made = chosen.videos(LastFrame(), encoder, {**data, "frame_numbers": [numbers, numbers]}, draws)
            assert len(made) == count
    assert [record.getMessage().count("not evenly spaced") for record in caplog.records] == [1]


def test_mistakes():
    with pytest.raises(UserError, match="num_inference_steps=0"):
        sampler(num_inference_steps=0)
    with pytest.raises(UserError, match="image_guidance=inf"):
        sampler(image_guidance=float("inf"))
    with pytest.raises(UserError, match="recycle is 'latent'; expected 'pixels' or 'latents'"):
        sampler(recycle="latent")
    with pytest.raises(UserError, match="roll_out_noise is 'foo'; expected 'same' or 'new'"):
        sampler(roll_out_noise="foo")
