"""The two-scale formula for all values, and how many predictions it costs."""

from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from vireo.diffusion.guidance import IMAGE, NEITHER, TEXT_AND_IMAGE, TextGuidance, TwoScaleGuidance
from vireo.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "ip2p"
SCALES = st.one_of(st.sampled_from([0.0, 1.0, 1.5, 7.5]), st.floats(-20, 20, width=16))


def network(noisy, image, text):
    """Depends on everything in another way."""
    return noisy.cos() + 2 * image * noisy + (text + 0.3).square() + image * text


@given(SCALES, SCALES)
@example(1.0, 1.0)
@example(0.0, 0.0)
@example(7.5, 1.0)
@example(1.0, 2.0)  # diffusers' pipeline gives up guidance here
@settings(max_examples=150, deadline=None)
def test_the_formula_holds_for_all_scales(text_scale, image_scale):
    generator = torch.Generator().manual_seed(0)
    noisy, image, text, null = torch.randn((4, 2, 5), generator=generator, dtype=torch.float64)
    guidance = TwoScaleGuidance(text_scale, image_scale)
    given_conditions = guidance.conditions({"image": image}, {"text": text}, {"text": null})
    combined = guidance.combine(network(guidance.repeat(noisy), **given_conditions))
    whole, only, neither = (network(noisy, *c) for c in ((image, text), (image, null), (0 * image, null)))
    expected = neither + image_scale * (only - neither) + text_scale * (whole - only)
    torch.testing.assert_close(combined, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(
    "text, image, passes",
    [
        (7.5, 1.5, (TEXT_AND_IMAGE, IMAGE, NEITHER)),
        (1.0, 1.0, (TEXT_AND_IMAGE,)),
        (0.0, 1.0, (IMAGE,)),
        (0.0, 0.0, (NEITHER,)),
        (7.5, 1.0, (TEXT_AND_IMAGE, IMAGE)),
        (3.0, 3.0, (TEXT_AND_IMAGE, NEITHER)),
        (0.0, 2.0, (IMAGE, NEITHER)),
        (-1.0, 2.0, (TEXT_AND_IMAGE, IMAGE, NEITHER)),
    ],
)
def test_no_pass_is_wasted(text, image, passes):
    guidance = TwoScaleGuidance(text, image)
    assert guidance.passes == passes
    assert guidance.repeat(torch.zeros(2, 4)).shape == (2 * len(passes), 4)


@pytest.mark.parametrize("frames", [3, 20])
def test_golden_combination(frames):
    golden = load_file(GOLDEN / f"video_train_n{frames}.safetensors")
    three = torch.cat([golden[f"guided_warm.eps_{name}"] for name in ("text_image", "image", "uncond")])
    combined = TwoScaleGuidance(7.5, 1.5).combine(three)
    torch.testing.assert_close(combined, golden["guided_warm.eps_guided"], rtol=0, atol=1e-6)


def test_scales_that_are_no_numbers():
    with pytest.raises(UserError, match="text_guidance=nan"):
        TwoScaleGuidance(float("nan"), 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Of a text alone


def test_text_guidance_goes_beyond_the_text():
    guidance = TextGuidance(6.0)
    text, null = torch.ones(2, 3), torch.zeros(2, 3)
    given = guidance.conditions({"image": torch.full((2, 1), 5.0)}, {"prompt": text}, {"prompt": null})
    assert torch.equal(given["prompt"], torch.cat([null, text])) and given["image"].shape == (4, 1)
    assert guidance.repeat(text).shape == (4, 3)
    predictions = torch.tensor([[1.0], [1.0], [2.0], [3.0]])
    assert guidance.combine(predictions, torch.tensor(500)).flatten().tolist() == [7.0, 13.0]


def test_without_guidance_there_is_one_pass():
    guidance = TextGuidance(1.0)
    text = torch.ones(2, 3)
    assert guidance.conditions({}, {"prompt": text}, {}) == {"prompt": text}
    assert torch.equal(guidance.combine(text, torch.tensor(500)), text)
    assert TextGuidance(1.0, dynamic=50).passes == 2, "its scale changes"


def test_a_dynamic_scale_depends_on_the_timestep():
    guidance = TextGuidance(6.0, dynamic=50)
    assert guidance.at(50) == 1.0 and guidance.at(0) == pytest.approx(7.0)
    assert all(1 <= guidance.at(timestep) <= 7 for timestep in range(1000))


def test_a_text_scale_that_is_no_number():
    with pytest.raises(UserError, match="guidance_scale=inf"):
        TextGuidance(float("inf"))
