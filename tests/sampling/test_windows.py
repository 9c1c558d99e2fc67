"""Windows cover every frame, agree with one pass where they can, and blend evenly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vireo.errors import UserError
from vireo.sampling.windows import Windows


def frame_by_frame(noisy, timesteps, mask, text):
    """A network that sees no other frame."""
    assert mask.shape[2] == noisy.shape[2] and text.shape == (len(noisy), 22, 3)
    return 2 * noisy + mask + timesteps[:, None, None, None, None]


@settings(max_examples=60, deadline=None)
@given(frames=st.integers(1, 60), length=st.integers(1, 22), data=st.data())
def test_a_network_without_memory_gives_the_same_in_windows(frames, length, data):
    overlap = data.draw(st.integers(0, length - 1))
    windows = Windows(frame_by_frame, length, overlap)
    starts = windows.starts(frames)
    assert starts[0] == 0 and starts == sorted(set(starts))
    assert starts[-1] + length >= frames and all(
        b - a <= length - overlap for a, b in zip(starts, starts[1:], strict=False)
    )
    noisy, mask, text = torch.randn(2, 4, frames, 2, 2), torch.randn(2, 1, frames, 2, 2), torch.zeros(2, 22, 3)
    given = {"mask": mask, "text": text}
    made = windows(noisy, torch.tensor([1, 5]), **given)
    torch.testing.assert_close(made, frame_by_frame(noisy, torch.tensor([1, 5]), **given))


def test_predictions_fade_into_each_other_over_the_overlap():
    calls = []

    def numbered(noisy, timesteps):
        calls.append(noisy.shape[2])
        return torch.full_like(noisy, float(len(calls) - 1))

    made = Windows(numbered, 6, 2)(torch.zeros(1, 1, 10, 1, 1), torch.tensor([0]))[0, 0, :, 0, 0]
    assert calls == [6, 6]
    torch.testing.assert_close(made, torch.tensor([0, 0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1, 1]))


def test_an_overlap_must_leave_something_new():
    with pytest.raises(UserError, match="overlap by 22"):
        Windows(frame_by_frame, 22, 22)
