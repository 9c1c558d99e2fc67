"""A training loss that can be read: one at a random timestep says little, since timesteps differ more than weeks do."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vireo.distributed import sum_over_ranks

DECAY = 0.99  # of a bin's average, at each step that has a sample in the bin


class LossByTimestep:
    """A moving average of the loss for each of `bins` equal ranges of timesteps, over all ranks.

    sums: float32 (2, bins), a decaying sum and the weight it has, so that the average is right from the first sample.
    """

    def __init__(self, bins: int, num_train_timesteps: int) -> None:
        self.bins, self.count = bins, num_train_timesteps
        self.sums, self.found = torch.zeros(2, bins), torch.zeros(2, bins)
        edges = [num_train_timesteps * place // bins for place in range(bins + 1)]
        self.names = [f"loss_t{low}_{high - 1}" for low, high in zip(edges, edges[1:], strict=False)]

    def to(self, device: torch.device) -> None:
        self.sums, self.found = self.sums.to(device), self.found.to(device)

    @torch.no_grad()
    def add(self, timesteps: Tensor, losses: Tensor) -> None:
        """Note samples of this rank.

        timesteps: in [0, num_train_timesteps], (B,), or (B, t) of which the mean counts. losses: float32 (B,); what is
        not finite is left out.
        """
        finite = torch.isfinite(losses)
        shares = timesteps.view(len(timesteps), -1).float().mean(1) / self.count
        bins = (shares * self.bins).long().clamp(max=self.bins - 1)
        places = F.one_hot(bins, self.bins) * finite[:, None]  # (B, bins)
        self.found += torch.stack([torch.where(finite, losses, 0.0) @ places.float(), places.sum(0).float()])

    @torch.no_grad()
    def end_step(self) -> dict[str, Tensor]:
        """The averages with the samples that all ranks have noted, by name; NaN for a bin that has seen none.

        Collective.
        """
        total, samples = sum_over_ranks(self.found)
        self.found = torch.zeros_like(self.found)
        mean = torch.stack([total / samples.clamp(min=1), torch.ones_like(samples)])
        self.sums = torch.where(samples > 0, DECAY * self.sums + (1 - DECAY) * mean, self.sums)
        return dict(zip(self.names, self.sums[0] / self.sums[1], strict=True))

    def load(self, sums: Tensor | None) -> None:
        """Go on with stored sums. Raises ValueError for another number of bins."""
        if sums is None or sums.shape != self.sums.shape:
            raise ValueError(f"the checkpoint has no loss by {self.bins} ranges of timesteps: set loss.timestep_bins")
        self.sums = sums.to(self.sums.device)
