"""Frozen networks that turn pixels and text into latents and embeddings: what every encoder shares.

An encoder works in two steps. `encode` is a pure function of one field of the batch, so its outputs can be kept in a
cache (as posterior moments, never as samples). `condition` is what must be fresh at every step: drawing from the
posterior, scaling, noising an image before it is encoded. Encoders are never wrapped, never trained, never saved.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from vireo.cache import literal
from vireo.errors import UserError
from vireo.randomness import Draws


class Encoder:
    """Base of all encoders.

    outputs: for each cacheable output the batch's field it is computed from, or a text in double quotes that all
    samples share: {"null_prompt_embeds": '""'}. parts: names of the `functools.cached_property`s that load weights.
    """

    outputs: dict[str, str] = {}
    parts: tuple[str, ...] = ()
    device: torch.device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Where parts are put when they are loaded, at their first use; those that are loaded are let go."""
        self.free()
        self.device = device

    def loaded_parts(self) -> set[str]:
        """Names of what is in memory now."""
        return {*self.parts, "_of_text"} & self.__dict__.keys()

    def free(self, but: Collection[str] = ()) -> None:
        """Give back the memory of what is loaded, `but` for some; it is loaded again when it is used again."""
        for name in self.loaded_parts().difference(but):
            del self.__dict__[name]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the frozen networks by name, once they are loaded; without loading them."""
        return {}

    def identity(self, output: str) -> str:
        """Names what `encode(output, …)` computes, from configs and file hashes, without loading weights."""
        raise KeyError(f"{type(self).__name__} has no output {output!r}; it has {sorted(self.outputs)}")

    def encode(self, output: str, values: Any) -> Tensor:
        """One cacheable output from its field's values, (B, …) -> (B, …); also (B, N, …). Draws nothing.

        values: a tensor on the device, or texts.
        """
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
        """The batch with latents and conditions; outputs that are there already (from a cache) are not computed.

        Nor are those of a field that the batch lacks: held-out prompts may have no video.
        """
        missing = {
            output: field
            for output, field in self.outputs.items()
            if output not in batch and (field in batch or literal(field) is not None)
        }
        computed = {}
        for output, field in missing.items():
            text = literal(field)
            if text is None:
                computed[output] = self.encode(output, batch[field])
            else:
                computed[output] = self._shared(output, text, len(draws.positions))
        return self.condition({**batch, **computed}, draws)

    def _shared(self, output: str, text: str, samples: int) -> Tensor:
        """An output that all samples share, computed once, as a view of (samples, …)."""
        known: dict[str, Tensor] = self.__dict__.setdefault("_of_text", {})
        if output not in known:
            known[output] = self.encode(output, [text])
        return known[output].expand(samples, *known[output].shape[1:])


class NoEncoder(Encoder):
    """For networks that learn from pixels alone: the batch goes through as it is."""


def split(moments: Tensor, channels: int = -3) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of moments that have both (the log variance) on one axis, as diffusers reads them."""
    mean, log_variance = moments.chunk(2, dim=channels)
    return mean, torch.exp(0.5 * log_variance.clamp(-30, 20))


def check_finite(values: Tensor, what: str, dtype: str) -> None:
    """Not finite values would poison the weights, and a cache for good. Raises UserError that names the rows (B, ...).

    dtype: what the encoder computed in, of `saved_networks.DTYPES`.
    """
    if not bool(torch.isfinite(values).all()):
        rows = torch.nonzero(~torch.isfinite(values).flatten(1).all(1)).flatten().tolist()
        advice = "the weights are damaged" if dtype == "fp32" else "set model.encoder.dtype=fp32"
        raise UserError(f"{what} of rows {rows} of a batch are not finite in {dtype}: {advice}.")
