"""What a loss returns, and the little that every loss shares."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vireo.randomness import Draws


class Objective(NamedTuple):
    """The value to minimise and what is worth logging.

    total: scalar, attached to the graph, mean over the micro-batch. metrics: detached scalars by name.
    """

    total: Tensor
    metrics: dict[str, Tensor]


class Loss:
    """A training objective: `loss(network, batch, draws) -> Objective`.

    The loss owns timesteps, noise, targets and weights; the network only predicts and is called through its wrapper's
    `forward`. A loss that owns a learner of its own (an adversarial critic) overrides `to`, `state_dict` and
    `load_state_dict`, and changes its state only where `learning` is true: validation sets it to false.
    """

    learning: bool = True
    is_local: bool = True  # a call waits for no other process, so one for which memory ran out can be made again

    # Where validation asks for the loss, by purposes of `draws`; "loss" is the mean over these points. A diffusion loss
    # gives timesteps here, since its value at random ones says little about a network.
    grid: Sequence[Mapping[str, float]] = ({},)

    def __call__(self, network: nn.Module, batch: dict, draws: Draws) -> Objective:
        raise TypeError(f"{type(self).__name__} does not say what it minimises: define __call__")

    def end_step(self) -> dict[str, Tensor]:
        """Figures that take a whole step of all ranks, detached scalars by name; by default none. NaN on all ranks is
        what cannot be told yet, and is not logged.

        Called on every rank once a step, after its backward passes, so it may be collective where `__call__` is local.
        """
        return {}

    def to(self, device: torch.device) -> None:
        """Move whatever the loss owns to the device; most losses own nothing."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that changes during training and must survive a restart, as flat named tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave; raises ValueError for a state that is not this loss's."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, the checkpoint has {sorted(state)[:5]}")
