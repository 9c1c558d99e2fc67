"""Logit-normal timesteps."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vireo.diffusion.timesteps import logit_normal


@given(low=st.integers(0, 998), width=st.integers(1, 1000), normal=st.floats(-50, 50))
def test_they_stay_in_their_range(low, width, normal):
    (found,) = logit_normal(torch.tensor([normal]), low, low + width).tolist()
    assert low <= found < low + width


def test_half_of_them_are_in_the_middle():
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    found = logit_normal(normal, 0, 1000)
    assert found.dtype == torch.int64
    assert abs(found.float().median().item() - 500) < 10
    # sigmoid(+-0.6745), the quartiles of a normal distribution
    assert abs(((found > 337) & (found < 663)).float().mean().item() - 0.5) < 0.02
