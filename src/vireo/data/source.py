"""Something that can be decoded later, or never: its identity is known without opening it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Source:
    """identity: names file, frame or window, and transform, so that equal identities decode to equal tensors; None
    for what is random and can never be cached. load: decodes it."""

    identity: str | None
    load: Callable[[], Tensor]
