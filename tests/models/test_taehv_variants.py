"""How long clips, latents and decoded clips are."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vireo.errors import UserError
from vireo.models.taehv import TAEHV
from vireo.models.taehv_variants import VARIANTS, check_length, find, is_legal, lengths, nearest_legal

NAMES = st.sampled_from(sorted(VARIANTS))


@pytest.mark.parametrize(
    ("num_frames", "latents", "decoded", "decoded_by_cogvideox"),
    [(1, 1, 1, 1), (4, 1, 1, 1), (5, 2, 5, 8), (8, 2, 5, 8), (9, 3, 9, 9), (12, 3, 9, 9), (13, 4, 13, 16)]
    + [(16, 4, 13, 16), (17, 5, 17, 17), (20, 5, 17, 17)],
)
def test_lengths_of_the_reference(num_frames, latents, decoded, decoded_by_cogvideox):
    assert lengths("taew2_1", num_frames) == (latents, decoded)
    assert lengths("taecvx", num_frames) == (latents, decoded_by_cogvideox)


def test_lengths_of_ltx_and_h3():
    assert lengths("taeltx_2", 9) == lengths("taeltx_2", 16) == (2, 9)
    assert lengths("taeh3", 22) == (7, 22)
    assert lengths("taeh3", 39) == (12, 39)


def rule(name, n):
    """The legal lengths as the documentation of each video model gives them."""
    if name == "taecvx":
        return n % 8 in (0, 1)
    if name == "taeh3":
        return n % 17 == 5
    return n % (8 if name.startswith("taeltx") else 4) == 1


@given(NAMES, st.integers(1, 400))
def test_legal_lengths_follow_each_models_rule(name, n):
    assert is_legal(name, n) == rule(name, n)


@given(NAMES, st.integers(-5, 400))
def test_nearest_legal_lengths_enclose_and_nothing_lies_between(name, n):
    nearest = nearest_legal(name, n)
    assert all(is_legal(name, found) for found in nearest)
    assert nearest == [n] if is_legal(name, n) else n not in nearest
    assert max(nearest) >= n
    smallest_legal = next(k for k in range(1, 30) if is_legal(name, k))
    assert min(nearest) <= n or n < smallest_legal
    assert not any(is_legal(name, between) for between in range(min(nearest) + 1, max(nearest)) if len(nearest) == 2)


@given(NAMES, st.integers(1, 400))
def test_more_frames_never_give_fewer_latents(name, n):
    assert lengths(name, n).latents <= lengths(name, n + 1).latents


NETWORKS = {
    name: TAEHV(name, encoder_width=2, decoder_widths=(2, 2, 2, 2), num_memblocks=1)
    for name in ("taew2_1", "taecvx", "taeltx_2", "taeh3", "taehv1_5_super")
}


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(NETWORKS)), st.integers(1, 45), st.integers(1, 9))
@torch.no_grad()
def test_the_network_gives_these_lengths(name, n, chunk):
    network = NETWORKS[name]
    side = VARIANTS[name].spatial_downscale
    latents = network.encode(torch.rand(1, n, 3, side, side), "chunked", chunk)
    decoded = network.decode(latents, "chunked", chunk)
    assert (latents.shape[2], decoded.shape[1]) == lengths(name, n)


def test_an_illegal_length_names_the_nearest_legal_ones():
    with pytest.raises(UserError, match=r"num_frames=12 does not suit taecvx .* decode to 9 frames.* to 9 or 16"):
        check_length("taecvx", 12)
    with pytest.raises(UserError, match="at least one frame"):
        check_length("taecvx", 0)
    check_length("taecvx", 16)


def test_an_unknown_variant_names_the_one_that_was_meant():
    with pytest.raises(UserError, match="Did you mean 'taecvx'"):
        find("taecvx2b")


def test_needs_no_torch():
    code = "import sys, vireo.models.taehv_variants; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
