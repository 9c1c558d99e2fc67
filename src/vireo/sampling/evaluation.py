"""What only `vireo evaluate` measures, since it costs much."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from vireo.models.encoders import Encoder
from vireo.sampling.sampler import Sampler


class Evaluated(NamedTuple):
    """What an evaluation looks at.

    network: in evaluation mode. stream, indices: `vireo.data.stream.Stream` of the held-out clips, and which of them;
    all of these can be read. folder: for pictures and videos.
    """

    network: nn.Module
    encoder: Encoder
    sampler: Sampler
    stream: Any
    indices: Sequence[int]
    device: torch.device
    folder: Path


class Evaluation(Protocol):
    """One measurement; `model.evaluations` names a recipe's."""

    def __call__(self, given: Evaluated) -> Sequence[Mapping[str, Any]]:
        """Rows of a table, JSON values with the same keys in each. What is skipped says why in a row."""
        ...
