import torch
from hypothesis import given
from hypothesis import strategies as st

from vireo.randomness import Draws, key, order, seed_default

positions = st.lists(st.integers(0, 2**40), min_size=1, max_size=6, unique=True)


@given(positions, st.integers(0, 5))
def test_a_samples_numbers_do_not_depend_on_its_neighbours(places, seed):
    together = Draws(seed, places).normal("noise", 3)
    alone = torch.cat([Draws(seed, [place]).normal("noise", 3) for place in places])
    assert torch.equal(together, alone)


@given(positions)
def test_purposes_and_seeds_are_independent(places):
    draws = Draws(0, places)
    assert not torch.equal(draws.normal("noise", 8), draws.normal("crop", 8))
    assert not torch.equal(draws.normal("noise", 8), Draws(1, places).normal("noise", 8))


def test_once_integer_is_keyed_by_the_step_alone():
    sizes = [Draws(0, [position], step=5).once_integer("size", 0, 1000) for position in range(4)]
    assert len(set(sizes)) == 1
    assert len({Draws(0, [0], step=step).once_integer("size", 0, 1000) for step in range(20)}) > 10


def test_ranges():
    draws = Draws(3, range(500))
    integers = draws.integers("timestep", 2, 7)
    assert integers.min() == 2 and integers.max() == 6
    uniform = draws.uniform("u")
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.05


def test_keys_never_change_since_resumed_runs_depend_on_them():
    assert key(0, "noise", 0) == 333594243501737407 < 2**63


@given(st.integers(0, 3), st.integers(0, 3), st.integers(1, 50))
def test_order_is_a_permutation_of_each_epoch(seed, epoch, n):
    assert sorted(order(seed, epoch, n).tolist()) == list(range(n))


def test_seeding_the_default_generator_is_reproducible():
    seed_default(0, "network", (1, 0, 0))
    first = torch.rand(4)
    seed_default(0, "network", (1, 0, 0))
    assert torch.equal(first, torch.rand(4))


def test_a_pinned_purpose_has_one_value_and_the_others_stay():
    draws = Draws(3, [5, 6])
    pinned = draws.pinned({"timestep": 250})
    assert pinned.integers("timestep", 0, 1000).tolist() == [250, 250]
    assert pinned.to("cpu").uniform("timestep", 2).tolist() == [[250, 250], [250, 250]]
    assert torch.equal(pinned.normal("noise", 4), draws.normal("noise", 4))


def test_generators_belong_to_their_samples():
    both, one = Draws(3, [5, 9]).generators("steps"), Draws(3, [9]).generators("steps")
    first, second = (torch.randn(4, generator=made) for made in both)
    assert torch.equal(second, torch.randn(4, generator=one[0])) and not torch.equal(first, second)
    other = Draws(3, [9]).generators("other")[0]
    assert not torch.equal(second, torch.randn(4, generator=other))


def test_once_numbers_are_keyed_by_the_step_alone():
    for name in ("once_uniform", "once_normal"):
        found = {getattr(Draws(0, [position], step=5), name)("size") for position in range(4)}
        assert len(found) == 1
        many = [getattr(Draws(0, [0], step=step), name)("size") for step in range(2000)]
        mean, std = torch.tensor(many).mean(), torch.tensor(many).std()
        expected = (0.5, 1 / 12**0.5) if name == "once_uniform" else (0.0, 1.0)
        assert abs(mean - expected[0]) < 0.07 and abs(std - expected[1]) < 0.07
