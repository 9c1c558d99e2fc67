"""What the replay keeps, where, and in how many bytes."""

import pytest
import torch

from vireo.errors import UserError
from vireo.losses.replay import Replay


def ring(dtype="float32", max_bytes=2**20, max_length=4):
    return Replay(torch.zeros(3, 2, 2), torch.zeros(2, 1, 1), dtype, max_bytes, max_length)


def groups(*values):
    """Fakes and contexts of constant value."""
    values = torch.tensor(values).view(-1, 1, 1, 1)
    return values.expand(-1, 3, 2, 2), values.expand(-1, 2, 1, 1)


def held(replay):
    return replay.fakes[:, 0, 0, 0].tolist()


def test_slots_are_overwritten_in_order():
    replay = ring()
    replay.store([1, 3], *groups(0.1, 0.2))
    assert replay.count == 2
    replay.store([3, 0, 3], *groups(0.3, 0.4, 0.5))
    assert held(replay) == pytest.approx([0.4, 0.1, 0, 0.5])
    fakes, contexts = replay.take(torch.tensor([0, 2, 2]))  # among slots 0, 1 and 3
    assert fakes[:, 0, 0, 0].tolist() == contexts[:, 0, 0, 0].tolist() == pytest.approx([0.4, 0.5, 0.5])


def test_bytes_limit_the_length():
    a_group = {"float32": 4 * 12 + 4 * 2, "bfloat16": 2 * 12 + 2 * 2, "uint8": 12 + 2 * 2}
    for dtype, size in a_group.items():
        assert len(ring(dtype, max_bytes=3 * size)) == len(ring(dtype, max_bytes=4 * size - 1)) == 3
        assert len(ring(dtype, max_bytes=9 * size)) == 4
        with pytest.raises(UserError, match=f"replay without a slot: .* takes {size} bytes"):
            ring(dtype, max_bytes=size - 1)


def test_eight_bits_keep_pixels_and_clamp_the_rest():
    replay = ring("uint8")
    replay.store([0, 1, 2], *replay.encoded(*groups(0.3, -0.5, 1.7)))
    fakes, contexts = replay.take(torch.arange(3))
    assert fakes[:, 0, 0, 0].tolist() == pytest.approx([0.3, 0, 1], abs=0.5 / 255)
    assert contexts[:, 0, 0, 0].tolist() == pytest.approx([0.3, -0.5, 1.7], rel=2**-8)
    assert fakes.dtype == contexts.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32"])
def test_a_state_holds_what_is_filled(dtype):
    replay, other = ring(dtype), ring(dtype)
    replay.store([1, 3], *replay.encoded(*groups(0.25, 1.0)))
    state = replay.state_dict()
    assert len(state["fakes"]) == 2
    other.load_state_dict(state)
    for name in ("fakes", "contexts", "filled"):
        assert torch.equal(getattr(other, name), getattr(replay, name))


def test_a_state_of_another_ring_is_refused():
    replay = ring("uint8")
    replay.store([0], *replay.encoded(*groups(0.5)))
    for other in (ring("bfloat16"), ring("uint8", max_length=3)):
        with pytest.raises(UserError, match="has 4 slots of torch.uint8, this run's has"):
            other.load_state_dict(replay.state_dict())


def test_groups_of_another_size_are_refused():
    with pytest.raises(UserError, match="height and width cannot change"):
        ring().store([0], torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 1, 1))
