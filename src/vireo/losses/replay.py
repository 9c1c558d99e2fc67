"""A ring of past fakes, in a bounded number of bytes, for a discriminator that must not forget them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vireo.errors import UserError
from vireo.pixels import to_pixels, to_uint8

# How fakes and contexts are kept. Eight bits suit pixels; latents need an exponent.
DTYPES = {
    "uint8": (torch.uint8, torch.bfloat16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
}


class Replay:
    """Fakes with their contexts in numbered slots, allocated whole at once, so that memory cannot run out later.

    fake, context: one of each (shapes and device count). dtype: a key of DTYPES; uint8 keeps pixels in [0, 1] only.
    max_bytes, max_length: the number of slots is the largest that both allow.

    Raises UserError if not a single slot fits.
    """

    def __init__(self, fake: Tensor, context: Tensor, dtype: str, max_bytes: int, max_length: int) -> None:
        kinds = list(zip((fake, context), DTYPES[dtype], strict=True))
        slot = sum(math.prod(one.shape) * kind.itemsize for one, kind in kinds)
        length = min(max_length, max_bytes // slot)
        if length < 1:
            raise UserError(
                f"loss.replay_bytes={max_bytes} and loss.replay_length={max_length} leave the replay without a slot: "
                f"a group of frames {tuple(fake.shape)} with its context {tuple(context.shape)} takes {slot} bytes."
            )
        self.fakes, self.contexts = (
            torch.zeros(length, *one.shape, dtype=kind, device=one.device) for one, kind in kinds
        )
        self.filled = torch.zeros(length, dtype=torch.bool)  # on the host, where slots are chosen

    def __len__(self) -> int:
        """Slots, empty ones included."""
        return len(self.filled)

    @property
    def count(self) -> int:
        """Slots that are filled."""
        return int(self.filled.sum())

    def encoded(self, fakes: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """Fakes and contexts as they are kept."""
        kept = to_uint8(fakes, low=0.0) if self.fakes.dtype == torch.uint8 else fakes.to(self.fakes.dtype)
        return kept, contexts.to(self.contexts.dtype)

    def store(self, slots: Sequence[int], fakes: Tensor, contexts: Tensor) -> None:
        """Overwrite slots with what `encoded` gave; of two rows for one slot the later stays.

        Raises UserError if it has another shape than the slots, which the slots of a checkpoint can have.
        """
        here, given = ([tuple(x.shape[1:]) for x in pair] for pair in ((self.fakes, self.contexts), (fakes, contexts)))
        if here != given:
            raise UserError(
                f"the checkpoint's replay holds groups of frames {here[0]} with contexts {here[1]}, this run's are "
                f"{given[0]} and {given[1]}: height and width cannot change on a resume with Seraena"
            )
        rows = {slot: row for row, slot in enumerate(slots)}
        where, which = list(rows), list(rows.values())
        self.fakes[where], self.contexts[where] = fakes[which], contexts[which]
        self.filled[where] = True

    def take(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 fakes and contexts. which: int64 on the CPU, in [0, count), numbers among the filled slots."""
        slots = self.filled.nonzero().flatten()[which].to(self.fakes.device)
        fakes = self.fakes[slots]
        return to_pixels(fakes, low=0.0) if fakes.dtype == torch.uint8 else fakes.float(), self.contexts[slots].float()

    def state_dict(self) -> dict[str, Tensor]:
        """Only what is filled."""
        slots = self.filled.nonzero().flatten().to(self.fakes.device)
        return {"fakes": self.fakes[slots], "contexts": self.contexts[slots], "filled": self.filled.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises UserError if the state is of a ring with another number of slots or another dtype."""
        if len(state["filled"]) != len(self) or state["fakes"].dtype != self.fakes.dtype:
            raise UserError(
                f"the checkpoint's replay has {len(state['filled'])} slots of {state['fakes'].dtype}, this run's has "
                f"{len(self)} of {self.fakes.dtype}: keep loss.replay_bytes, replay_length and replay_dtype on a resume"
            )
        slots = state["filled"].cpu().nonzero().flatten()
        self.store(slots.tolist(), state["fakes"].to(self.fakes.device), state["contexts"].to(self.fakes.device))
