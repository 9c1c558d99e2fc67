"""At which timesteps a diffusion model is trained."""

from torch import Tensor


def logit_normal(normal: Tensor, low: int, high: int) -> Tensor:
    """Timesteps in [low, high), int64, from standard normal numbers of the same shape.

    The sigmoid of a normal number, which is in the middle more often than at the ends: Esser et al. 2024
    (https://arxiv.org/abs/2403.03206), section 3.1.
    """
    return (low + (high - low) * normal.double().sigmoid()).long().clamp(max=high - 1)
