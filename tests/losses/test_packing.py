"""Frames in groups and back: the notebook's numbers, and any length with any size of group."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from vireo.losses.packing import pack, pack_latents, padding, unpack

GOLDEN = Path(__file__).parents[1] / "golden" / "taehv"


def clip(batch, length, side=1):
    return torch.arange(batch * length * 3 * side * side).float().view(batch, length, 3, side, side)


def test_golden_packing():
    expected = load_file(GOLDEN / "packing.safetensors")
    frames = clip(2, 8, side=2)
    latents = torch.arange(12).float().view(2, 3, 2, 1, 1).transpose(1, 2)
    groups = pack(frames, 3)
    assert torch.equal(groups, expected["grouped"])
    assert torch.equal(unpack(groups, 2, 8), expected["ungrouped"])
    assert torch.equal(pack_latents(latents, 3), expected["ctx"])


def test_the_notebooks_padding_is_one_whole_group_more():
    groups = pack(clip(1, 9), 3, at_least=3)  # nine frames of a clip of twelve
    assert torch.equal(groups, pack(torch.cat([clip(1, 9), clip(1, 9)[:, :3]], dim=1), 3))
    assert len(pack(clip(1, 9), 3)) == 3


def test_a_clip_shorter_than_its_padding_ends_with_its_last_frame():
    assert pack(clip(1, 2), 6).view(6, 3)[:, 0].tolist() == [0, 3, 0, 3, 3, 3]


@given(
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 7),
    st.integers(0, 8),
    st.sampled_from([torch.float32, torch.uint8]),
)
def test_every_length_packs_into_groups_of_every_size(batch, length, group_frames, at_least, dtype):
    frames = clip(batch, length).to(dtype)
    groups = pack(frames, group_frames, at_least)
    assert groups.shape[1:] == (3 * group_frames, 1, 1)
    assert len(groups) * group_frames == batch * (length + padding(length, group_frames, at_least))
    assert at_least <= padding(length, group_frames, at_least) < at_least + group_frames
    assert torch.equal(unpack(groups, batch, length), frames)


@pytest.mark.parametrize("length", [4, 6])
def test_a_group_holds_consecutive_frames_of_one_clip(length):
    groups = pack(clip(2, length), 2).view(2, length // 2, 2, 3)
    assert torch.equal(groups, clip(2, length).view(2, length // 2, 2, 3))
