"""What every sampler offers: columns to look at and to score, and what is measured or shown beside them."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vireo.randomness import Draws


class Sampler:
    """Turns a batch into named videos: float pixels in [0, 1], (B, T, C, H, W).

    unscored: names of columns that are for the eyes only. Every other column with the target's shape is scored.
    result: the column that is what people want of it, which `vireo sample` writes by itself for files of theirs.
    """

    unscored: Collection[str] = ()
    result = "prediction"

    def __call__(self, network: nn.Module, encoder: Any, batch: dict, draws: Draws) -> dict[str, Tensor]:
        """Always with "prediction", with "target" where there is a truth; the rest is worth seeing beside them."""
        raise TypeError(f"{type(self).__name__} does not say what it shows: define __call__")

    def baselines(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What one gets without any network, in the same layout as "target"; by default nothing."""
        return {}

    def measure(
        self, network: nn.Module, encoder: Any, batch: dict, columns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What is measured beside whole frames (latents, a region): (B,) each; by default nothing.

        columns: this sampler's, and its baselines. Names are "<measure>" or, for another column than the prediction,
        "<column>/<measure>".
        """
        return {}

    def run_exported(self, folder: Path) -> None:
        """Load what the network exported as its users will, and run it once; what fails is raised. By default nothing.

        Called at a run's end, on the main process. On the CPU, since the training still fills the GPU.
        """
        return None

    def videos(self, network: nn.Module, encoder: Any, batch: dict, draws: Draws) -> dict[str, dict[str, Tensor]]:
        """Further videos that `vireo sample` writes, and validation does not since they cost more; by default none.

        The columns of one video by its title, which ends its file's name.
        """
        return {}
