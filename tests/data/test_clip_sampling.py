from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vireo.data.clip_sampling import (
    clip_indices,
    fill_up,
    middle_clip,
    num_timed,
    random_clip,
    strided_clip,
    timed_clip,
    uniform_clip,
)
from vireo.randomness import Draws

lengths = st.integers(1, 300)
counts = st.integers(1, 40)
steps = st.tuples(st.integers(1, 6), st.integers(0, 5)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(lengths, counts, steps, st.integers(0, 2**40))
def test_random_clips_lie_in_the_video_and_never_go_back(length, num_frames, frame_step, position):
    indices = random_clip(length, num_frames, frame_step, Draws(0, [position]))
    assert len(indices) == num_frames
    assert min(indices) >= 0 and max(indices) < length
    gaps = {b - a for a, b in zip(indices, indices[1:], strict=False)}
    fits = (num_frames - 1) * frame_step[0] < length
    if fits:
        assert len(gaps) <= 1 and all(frame_step[0] <= gap <= frame_step[1] for gap in gaps)
    else:  # from the first frame on, then the last one held
        assert indices == clip_indices(length, num_frames, frame_step[0], 0)
        assert indices[-1] == length - 1 and all(gap >= 0 for gap in gaps)


@given(lengths, counts, st.integers(1, 6))
def test_middle_clips_lie_in_the_middle(length, num_frames, step):
    indices = middle_clip(length, num_frames, step)
    assert len(indices) == num_frames
    assert min(indices) >= 0 and max(indices) < length
    if (num_frames - 1) * step < length:
        before, behind = indices[0], length - 1 - indices[-1]
        assert 0 <= behind - before <= 1
        assert all(b - a == step for a, b in zip(indices, indices[1:], strict=False))


def test_every_step_and_every_start_occurs_equally_often():
    clips = [random_clip(20, 6, (1, 9), Draws(0, [position])) for position in range(3000)]
    by_step = Counter(clip[1] - clip[0] for clip in clips)
    assert set(by_step) == {1, 2, 3}, "a step of 4 needs 21 frames"
    assert all(abs(count - 1000) < 120 for count in by_step.values())
    starts = Counter(clip[0] for clip in clips if clip[1] - clip[0] == 1)
    assert set(starts) == set(range(15))
    assert all(abs(count - by_step[1] / 15) < 40 for count in starts.values())


def test_behind_the_end_the_last_frame_is_held():
    assert clip_indices(length=4, num_frames=6, step=1, start=0) == [0, 1, 2, 3, 3, 3]
    assert random_clip(4, 6, (2, 3), Draws(0, [0])) == [0, 2, 3, 3, 3, 3]


@given(lengths, counts)
def test_strides_and_uniform_clips_lie_in_the_video(length, num_frames):
    for indices in (strided_clip(length, num_frames), uniform_clip(length, num_frames)):
        assert len(indices) == min(length, num_frames) and indices[0] == 0 and indices[-1] < length
        assert all(b > a for a, b in zip(indices, indices[1:], strict=False))
    if num_frames > 1:
        assert uniform_clip(length, num_frames)[-1] == length - 1, "from the first to the last"


def test_the_published_strides():
    assert strided_clip(49, 33) == list(range(33)), "the last third is never seen"
    assert strided_clip(49, 17)[-1] == 32
    assert strided_clip(5, 9) == [0, 1, 2, 3, 4]


@given(lengths, counts, st.floats(0.2, 9), st.floats(0, 1))
def test_timed_clips_keep_their_distance(length, num_frames, step, start):
    indices = timed_clip(length, num_frames, step, start)
    assert len(indices) == min(num_frames, num_timed(length, step))
    assert min(indices) >= 0 and max(indices) < length
    assert all(abs(index - indices[0] - k * step) <= 1 for k, index in enumerate(indices))


def test_the_start_of_a_timed_clip():
    assert [timed_clip(20, 9, 1.0, start)[0] for start in (0, 0.5, 0.999, 1)] == [0, 6, 11, 11]
    assert timed_clip(25, 9, 3.125, 0) == [0, 3, 6, 9, 13, 16, 19, 22], "8 frames a second of 25: one is missing"


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(0, 12))
def test_filling_up(indices, more):
    num_frames = len(indices) + more
    held, looped = (fill_up(indices, num_frames, pad) for pad in ("repeat_last", "loop"))
    assert len(held) == len(looped) == num_frames
    assert held == indices + indices[-1:] * more and looped == (indices * 13)[:num_frames]
    if more:
        with pytest.raises(ValueError, match=f"{len(indices)} frames, {num_frames} are needed"):
            fill_up(indices, num_frames, "error")
    else:
        assert fill_up(indices, num_frames, "error") == indices
