"""Frozen networks that turn pixels and text into latents and embeddings: what every encoder shares.

An encoder works in two steps. `encode` is a pure function of one field of the batch, so its outputs can be kept in a
cache (as posterior moments, never as samples). `condition` is what must be fresh at every step: drawing from the
posterior, scaling, noising an image before it is encoded. Encoders are never wrapped, never trained, never saved.
"""

import functools
import json
from typing import Any

import torch
from torch import Tensor, nn

from vireo.randomness import Draws


class Encoder:
    """Base of all encoders.

    `outputs` maps each cacheable output to the batch's field it is computed from, or to a literal text in quotation
    marks: '""' is the empty prompt, the same for every sample.
    """

    outputs: dict[str, str] = {}
    device: torch.device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Where parts are put when they are loaded, at their first use."""
        self.device = device
        self.literals.clear()

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the frozen networks by name, once they are loaded; without loading them."""
        return {}

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
        made = {}
        for output, field in self.outputs.items():
            if output not in batch and is_literal(field):
                made[output] = self.literal(output).expand(len(draws.positions), *self.literal(output).shape[1:])
            elif output not in batch:
                made[output] = self.encode(output, batch[field])
        return self.condition({**batch, **made}, draws)

    def literal(self, output: str) -> Tensor:
        """The output of a literal, (1, ...), which is computed once."""
        if output not in self.literals:
            self.literals[output] = self.encode(output, [json.loads(self.outputs[output])])
        return self.literals[output]

    @functools.cached_property
    def literals(self) -> dict[str, Tensor]:
        return {}


def is_literal(field: str) -> bool:
    """Whether an output is computed from a text in quotation marks instead of a field of the batch."""
    return field.startswith('"')


class NoEncoder(Encoder):
    """For networks that learn from pixels alone: the batch goes through as it is."""
