"""How much moves in the videos of each column."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vireo.optical_flow import motion_amplitude
from vireo.sampling.columns import columns
from vireo.sampling.evaluation import Evaluated


class MotionAmplitude:
    """OpenS2V-Eval's motion amplitude, see `vireo.optical_flow.motion_amplitude`; no weights are needed.

    Rows: {"column", "motion_amplitude", "score", "clips"}, means over the clips; score is clipped to [0, 1], as there.
    The target's row says what the clips have. clips: how many of the held-out clips, from the first; None: all.
    """

    def __init__(self, clips: int | None = 16) -> None:
        self.clips = clips

    @torch.no_grad()
    def __call__(self, given: Evaluated) -> Sequence[Mapping[str, Any]]:
        """See `vireo.sampling.evaluation.Evaluation`. Columns of a single frame are left out."""
        found = defaultdict(list)
        for _, videos in columns(given._replace(indices=given.indices[: self.clips])):
            for name, video in videos.items():
                if len(video) > 1:
                    found[name].append(float(motion_amplitude(video[None])))
        return [
            {
                "column": name,
                "motion_amplitude": sum(values) / len(values),
                "score": sum(min(value, 1.0) for value in values) / len(values),
                "clips": len(values),
            }
            for name, values in found.items()
        ]
