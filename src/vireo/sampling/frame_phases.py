"""Faults that come back every few frames: autoencoders that pool frames are worst at certain places of each group."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vireo.metrics import decibels, frame_mse
from vireo.pixels import as_8_bit
from vireo.sampling.columns import columns, scored
from vireo.sampling.evaluation import Evaluated


class FramePhases:
    """PSNR by the place of a frame, for every column: the first frame, and those after it by t mod `period`.

    The first frame has latents of its own in causal VAEs; users of TAEHV report faults there and every four frames.
    period: frames that share a latent. Draws `psnr_by_frame.png`, a curve for each column.
    """

    def __init__(self, period: int = 4) -> None:
        self.period = period

    @torch.no_grad()
    def __call__(self, given: Evaluated) -> Sequence[Mapping[str, Any]]:
        """A row a column, values in dB, means over the clips; see `vireo.sampling.evaluation.Evaluation`.

        "first frame"; "t mod p = k" without it, None where clips are too short; "spread": best minus worst of these.
        """
        found: dict[str, list[torch.Tensor]] = {}
        for _, videos in columns(given):
            for name, video in scored(videos).items():
                by_frame = decibels(frame_mse(as_8_bit(video), as_8_bit(videos["target"])))
                found.setdefault(name, []).append(by_frame.cpu())
        curves = {name: torch.stack(clips).mean(0).tolist() for name, clips in found.items()}
        if curves:
            _draw(curves, self.period, given.folder / "psnr_by_frame.png")
        return [{"column": name, **self.phases(curve)} for name, curve in curves.items()]

    def phases(self, by_frame: Sequence[float]) -> dict[str, float | None]:
        """The row of one column from its PSNR by frame."""
        row: dict[str, float | None] = {"first frame": by_frame[0]}
        means = []
        for phase in range(self.period):
            there = [value for t, value in enumerate(by_frame) if t and t % self.period == phase]
            mean = sum(there) / len(there) if there else None
            row[f"t mod {self.period} = {phase}"] = mean
            means += [] if mean is None else [mean]
        return {**row, "spread": max(means) - min(means) if means else None}


def _draw(curves: Mapping[str, Sequence[float]], period: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, curve in curves.items():
        axis.plot(range(len(curve)), curve, marker="o", markersize=3, label=name)
    longest = max(len(curve) for curve in curves.values())
    for t in range(0, longest, period):
        axis.axvline(t, color="0.85", linewidth=1, zorder=0)
    axis.set(xlabel="frame", ylabel="PSNR (dB)", title=f"held-out clips by frame, every {period}th marked")
    axis.set_xticks(range(0, longest, max(1, longest // 16)))
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
