"""Frozen networks that turn pixels and text into latents and embeddings: what every encoder shares.

An encoder works in two steps. `encode` is a pure function of one field of the batch, so its outputs can be kept in a
cache (as posterior moments, never as samples). `condition` is what must be fresh at every step: drawing from the
posterior, scaling, noising an image before it is encoded. Encoders are never wrapped, never trained, never saved.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vireo.randomness import Draws


class Encoder:
    """Base of all encoders. `outputs` maps each cacheable output to the batch's field it is computed from."""

    outputs: dict[str, str] = {}
    device: torch.device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Where parts are put when they are loaded, at their first use."""
        self.device = device

    def identity(self, output: str) -> str:
        """Names what `encode(output, …)` computes, from configs and file hashes, without loading weights."""
        raise KeyError(f"{type(self).__name__} has no output {output!r}; it has {sorted(self.outputs)}")

    def encode(self, output: str, values: Any) -> Tensor:
        """One cacheable output from its field's values, (B, …) -> (B, …); also (B, N, …)."""
        raise KeyError(f"{type(self).__name__} has no output {output!r}; it has {sorted(self.outputs)}")

    def condition(self, batch: dict[str, Any], draws: Draws) -> dict[str, Any]:
        """Add what is drawn or scaled afresh at every step; by default nothing."""
        return batch

    def check_network(self, network: nn.Module, batch: dict[str, Any]) -> None:
        """Refuse (UserError) a network that does not suit this encoder; called once, before the first step.

        batch: some samples with this encoder's outputs, on the device. By default every network is welcome.
        """

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any], draws: Draws) -> dict[str, Any]:
        """The batch with latents and conditions; outputs that are there already (from a cache) are not computed."""
        missing = {o: self.encode(o, batch[field]) for o, field in self.outputs.items() if o not in batch}
        return self.condition({**batch, **missing}, draws)


class NoEncoder(Encoder):
    """For networks that learn from pixels alone: the batch goes through as it is."""
