"""One sample that a person made from files of their own, as a dataset."""

from collections.abc import Mapping
from typing import Any

from vireo.data.source import Source
from vireo.randomness import Draws


class Given:
    """The same sample `count` times; where it lies in the dataset decides about noise alone."""

    max_bad_fraction = 0.0

    def __init__(self, sample: Mapping[str, Any], count: int) -> None:
        self.one, self.count = dict(sample), count

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, draws: Draws) -> dict[str, Any]:
        return dict(self.one)

    def sources(self, index: int) -> dict[str, list[Source | str]]:
        return {}

    def describe(self) -> dict[str, Any]:
        return {"clips": self.count}
