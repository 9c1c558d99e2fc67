"""Which lengths a student and its teacher can share."""

import logging
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vireo import config
from vireo.errors import UserError
from vireo.models.taehv_variants import VARIANTS, lengths
from vireo.models.teacher_lengths import FAMILIES, Plan, check_length, find, longest, plan

PAIRS = [("taecvx", "cogvideox"), ("taew2_1", "wan"), ("taew2_2", "wan"), ("taehv", "hunyuan"), ("taehv1_5", "hunyuan")]
PAIRS += [("taeltx_2", "ltx"), ("taeltx2_3_wide", "ltx"), ("taehv", "wan"), ("taew2_1", "cogvideox")]


@pytest.mark.parametrize(
    ("num_frames", "variant", "family", "expected"),
    [
        (9, "taecvx", "cogvideox", Plan(3, 9, slice(0, 9), 3)),
        (8, "taecvx", "cogvideox", Plan(2, 8, slice(0, 8), 0)),
        (16, "taecvx", "cogvideox", Plan(4, 16, slice(0, 16), 0)),
        (25, "taecvx", "cogvideox", Plan(7, 25, slice(0, 25), 3)),
        (13, "taew2_1", "wan", Plan(4, 13, slice(0, 13), 3)),
        (17, "taehv", "hunyuan", Plan(5, 17, slice(0, 17), 3)),
        (17, "taeltx_2", "ltx", Plan(3, 17, slice(0, 17), 7)),
        (1, "taew2_1", "wan", Plan(1, 1, slice(0, 1), 3)),
    ],
)
def test_plans(num_frames, variant, family, expected):
    assert plan(num_frames, variant, family) == expected


@pytest.mark.parametrize(
    ("num_frames", "variant", "family", "nearest"),
    [
        (12, "taew2_1", "wan", "9 or 13"),
        (12, "taecvx", "cogvideox", "9 or 16"),
        (5, "taecvx", "cogvideox", "1 or 8"),
        (20, "taecvx", "cogvideox", "17 or 24"),
        (16, "taehv", "hunyuan", "13 or 17"),
        (12, "taeltx_2", "ltx", "9 or 17"),
        (8, "taew2_1", "cogvideox", "1 or 9"),
        (13, "taew2_1", "cogvideox", "9 or 17"),
    ],
)
def test_a_length_that_does_not_come_back_names_the_two_nearest(num_frames, variant, family, nearest):
    with pytest.raises(UserError, match=rf"num_frames={num_frames} does not suit .* Set num_frames to {nearest}\b"):
        plan(num_frames, variant, family)


def rule(family, n):
    """As the documentation of each video model gives it."""
    return n % 8 in (0, 1) if family == "cogvideox" else n % (8 if family == "ltx" else 4) == 1


@given(st.sampled_from(PAIRS), st.integers(1, 300))
def test_legal_lengths_are_those_of_both(pair, n):
    variant, family = pair
    legal = rule(family, n) and lengths(variant, n).decoded == n
    try:
        made = plan(n, variant, family)
    except UserError:
        assert not legal
    else:
        assert legal
        assert made.latents == lengths(variant, n).latents
        assert made.target == slice(0, n) and made.decoded == n
        assert (n + made.pad) % VARIANTS[variant].frames_per_latent == 0


@given(st.sampled_from(PAIRS), st.integers(1, 300))
def test_lenient_plans_compare_first_frames_that_both_give_back(pair, n):
    variant, family = pair
    try:
        made = plan(n, variant, family, strict_lengths=False)
    except UserError:
        assert family == "cogvideox", "of every other length these VAEs and students drop the same last frames"
    else:
        assert lengths(FAMILIES[family].twin, n) == lengths(variant, n) == (made.latents, made.decoded)
        assert made.target == slice(0, made.decoded) and made.decoded <= n


def test_the_published_length_passes_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert plan(12, "taew2_1", "wan", strict_lengths=False) == Plan(3, 9, slice(0, 9), 0)
        assert plan(12, "taecvx", "cogvideox", strict_lengths=False) == Plan(3, 9, slice(0, 9), 0)
    first, second = (record.getMessage() for record in caplog.records)
    assert "last 3 frames are compared with nothing" in first and "num_frames=9 or 13 has neither fault" in first
    assert "num_frames=9 or 16 has neither fault" in second
    caplog.clear()
    plan(9, "taew2_1", "wan", strict_lengths=False)
    assert not caplog.records


@pytest.mark.parametrize("num_frames", [5, 13])
def test_more_frames_than_the_clip_has_are_refused_however_lenient(num_frames):
    with pytest.raises(UserError, match="Set num_frames to"):
        plan(num_frames, "taecvx", "cogvideox", strict_lengths=False)


def test_another_rhythm_is_refused_by_the_variants_that_would_do():
    with pytest.raises(UserError, match=r"taeltx_2 cannot learn .* wan, which makes one latent of 4 frames.* taew2_1"):
        plan(9, "taeltx_2", "wan")
    with pytest.raises(UserError, match="taew2_1 cannot learn .* taeltx_2, taeltx2_3, taeltx2_3_wide"):
        plan(9, "taew2_1", "ltx")
    with pytest.raises(UserError, match="taeh3 cannot learn"):
        plan(22, "taeh3", "wan")


def test_unknown_names_and_no_frames():
    with pytest.raises(UserError, match="'wann'; there are cogvideox, wan, hunyuan, ltx"):
        find("wann")
    with pytest.raises(UserError, match="Unknown TAEHV variant"):
        plan(9, "taew3", "wan")
    with pytest.raises(UserError, match="at least one frame"):
        plan(0, "taew2_1", "wan")


def test_every_family_has_its_variant():
    for family in FAMILIES.values():
        assert family.twin in VARIANTS
    assert check_length("taecvx", 9, "cogvideox") is None


def test_needs_no_torch():
    code = "import sys, vireo.models.teacher_lengths; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The model files call check_length before torch is imported.


@pytest.mark.parametrize("model", ["taehv_cogvideox", "taehv_wan", "taehv_hunyuan", "taehv_ltx"])
def test_model_files_are_valid(model):
    assert config.problems([f"model={model}"]) == []


def test_model_files_refuse_a_length():
    (problem,) = config.problems(["model=taehv_wan", "num_frames=12"])
    assert problem.key == "num_frames" and "Set num_frames to 9 or 13" in problem.message
    assert "+model.checks.num_frames.strict_lengths=false" in problem.message
    lenient = ["model=taehv_wan", "num_frames=12", "+model.checks.num_frames.strict_lengths=false"]
    assert config.problems(lenient) == []
    (problem,) = config.problems(["model=taehv_wan", "model.encoder.family=ltx", "num_frames=9"])
    assert "taew2_1 cannot learn" in problem.message


def test_model_files_differ_in_the_teacher_and_inherit_the_rest():
    cogvideox, wan = (config.settings([f"model=taehv_{name}"])["model"] for name in ("cogvideox", "wan"))
    assert (cogvideox["network"]["variant"], wan["network"]["variant"]) == ("taecvx", "taew2_1")
    assert (cogvideox["encoder"]["latent_space"], wan["encoder"]["latent_space"]) == ("raw", "diffusion")
    assert wan["sampler"] == {**cogvideox["sampler"], "variant": "taew2_1"}
    assert wan["network"]["encoder_width"] == cogvideox["network"]["encoder_width"] == 36
    assert wan["network"]["weights"] is None and cogvideox["network"]["weights"].endswith("taehv/taecvx")


@pytest.mark.parametrize(
    "limit, variant, family, expected",
    [
        (16, "taew2_1", None, 13),
        (16, "taecvx", None, 16),
        (16, "taecvx", "cogvideox", 16),
        (16, "taew2_1", "cogvideox", 9),
        (17, "taew2_1", "cogvideox", 17),
        (30, "taeltx_2", "ltx", 25),
        (1, "taew2_1", "wan", 1),
        (21, "taeh3", None, 5),
    ],
)
def test_the_longest_clip_below_a_limit(limit, variant, family, expected):
    assert longest(limit, variant, family) == expected


def test_no_clip_is_short_enough():
    with pytest.raises(UserError, match="no clip of 4 frames or less .* taeh3; the shortest has 5"):
        longest(4, "taeh3")
