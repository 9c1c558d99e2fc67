import pytest
from hypothesis import given
from hypothesis import strategies as st

from vireo.schedules import Constant, Cosine, Linear

schedules = st.builds(
    lambda make, warmup: make(warmup), st.sampled_from([Constant, Cosine, Linear]), st.integers(0, 50)
)


@given(schedules, st.integers(1, 500), st.data())
def test_multipliers_stay_between_zero_and_one(schedule, steps, data):
    step = data.draw(st.integers(0, steps - 1))
    assert 0 <= schedule(step, steps) <= 1


@pytest.mark.parametrize("make", [Cosine, Linear])
def test_the_last_step_has_the_final_rate_and_warm_up_ends_at_full(make):
    schedule = make(10, 0.1)
    assert schedule(99, 100) == pytest.approx(0.1)
    assert schedule(0, 100) == pytest.approx(0.1) and schedule(9, 100) == pytest.approx(1.0)
    rates = [schedule(step, 100) for step in range(10, 100)]
    assert rates == sorted(rates, reverse=True)


def test_a_cosine_is_half_way_in_the_middle():
    assert Cosine(0)(50, 101) == pytest.approx(0.5)


def test_constant():
    assert [Constant(4)(step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
