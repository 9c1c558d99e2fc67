"""Held-out clips: what the network makes of them, measured beside naive baselines and made visible."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vireo import distributed, video_io
from vireo.data.stream import Stream, collate, to_device
from vireo.losses.objective import Loss
from vireo.metrics import MEASURES
from vireo.models.encoders import Encoder
from vireo.pixels import to_uint8
from vireo.randomness import Draws

SEED = "validation"  # validation draws the same numbers at every step of every run


class Sampler(Protocol):
    """Turns a batch into named videos: float pixels in [0, 1], (B, T, C, H, W)."""

    def __call__(self, network: nn.Module, encoder: Encoder, batch: dict, draws: Draws) -> dict[str, Tensor]:
        """Always with "prediction", with "target" where there is a truth; the rest is worth seeing beside them."""
        ...

    def baselines(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What one gets without any network, in the same layout as "target"."""
        ...

    def measure(
        self, network: nn.Module, encoder: Encoder, batch: dict, columns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What is measured beside whole frames (latents, a region): (B,) each; {} if nothing is.

        columns: this sampler's, and its baselines. Names are "<measure>" or, for another column than the prediction,
        "<column>/<measure>".
        """
        ...


class Evaluation(Protocol):
    """A measurement that only `vireo evaluate` makes, since it costs much; `model.evaluations` names a recipe's."""

    def __call__(
        self,
        network: nn.Module,
        encoder: Encoder,
        sampler: Sampler,
        stream: Stream,
        indices: Sequence[int],
        device: torch.device,
        folder: Path,
    ) -> Sequence[Mapping[str, Any]]:
        """Rows of a table, JSON values with the same keys in each. What is skipped says why in a row.

        stream, indices: held-out clips. folder: for pictures and videos.
        """
        ...


class ClipScore(NamedTuple):
    """The measures of one held-out clip: {"psnr": …, "mean colour/psnr": …, "loss": …}."""

    clip: int
    name: str
    measures: dict[str, float]


@torch.no_grad()
def score_clips(
    network: nn.Module,
    encoder: Encoder,
    loss: Loss,
    sampler: Sampler,
    stream: Stream,
    indices: Sequence[int],
    batch_size: int,
    device: torch.device,
) -> Iterator[tuple[ClipScore, dict[str, Tensor]]]:
    """Score and yield held-out clips with their columns, uint8 (T, C, H, W) on the CPU.

    The network is called with what the caller has set (evaluation mode, averaged weights). The loss does not learn.
    """
    learning, loss.learning = loss.learning, False
    try:
        for some in _batches(indices, batch_size):
            batch = collate(stream.samples([(index, 0) for index in some]))
            draws = Draws(SEED, batch["position"], device)
            names = batch.get("name", [str(index) for index in some])
            batch = encoder(to_device(batch, device), draws)
            totals = [loss(network, batch, draws.pinned(point)).total for point in loss.grid]
            columns = sampler(network, encoder, batch, draws)
            baselines = sampler.baselines(batch) if "target" in columns else {}
            figures = sampler.measure(network, encoder, batch, {**columns, **baselines})
            for row, (index, name) in enumerate(zip(some, names, strict=True)):
                shown = {title: to_uint8(video[row], low=0).cpu() for title, video in columns.items()}
                measures = {"loss": float(sum(totals) / len(totals)), **{n: float(v[row]) for n, v in figures.items()}}
                for title, video in {**columns, **baselines}.items():
                    if "target" in columns and title != "target" and video.shape == columns["target"].shape:
                        prefix = "" if title == "prediction" else f"{title}/"
                        for measure, values in measure_video(video[row], columns["target"][row]).items():
                            measures[prefix + measure] = values
                yield ClipScore(index, str(name), measures), shown
    finally:
        loss.learning = learning


def measure_video(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """Every weight-free measure of one clip (T, C, H, W), on the pixels an 8-bit video would have."""
    a, b = (to_uint8(video, low=0).float().div(255)[None] for video in (prediction, target))
    return {name: float(measure(a, b)[0]) for name, measure in MEASURES.items()}


def means(scores: Iterable[ClipScore]) -> dict[str, float]:
    """Mean of each measure over the clips."""
    rows = [score.measures for score in scores]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}


def validate(
    network: nn.Module,
    encoder: Encoder,
    loss: Loss,
    sampler: Sampler,
    stream: Stream,
    *,
    clips: int,
    batch_size: int,
    device: torch.device,
    folder: Path,
    fps: float,
    pictures: int = 4,
) -> dict[str, float]:
    """Mean measures over the first `clips` held-out clips, shared out over the ranks; the same on every rank.

    Every rank takes equally many clips (some twice, counted once), since the network's forward may be a collective.
    Writes side-by-side videos and one PNG grid of the first `pictures` clips into `folder`, each on the rank that
    has it.
    """
    count = min(clips, len(stream.dataset))
    rank, world = distributed.rank(), distributed.world_size()
    mine = [(rank + world * turn) % count for turn in range(-(-count // world))]
    scores, shown = [], {}
    for score, columns in score_clips(network, encoder, loss, sampler, stream, mine, batch_size, device):
        scores.append(score)
        if score.clip < pictures:
            shown[score.clip] = columns
    everything = {s.clip: s for s in itertools.chain(*distributed.gather(scores))}
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    for index, columns in shown.items():
        show(columns, folder / f"clip_{index:03d}", fps)
    return means(everything[index] for index in sorted(everything))


def show(columns: Mapping[str, Tensor], path: Path, fps: float) -> None:
    """Write one clip's columns side by side: `path`.mp4 and a grid of frames, `path`.png."""
    video_io.write_video(path.with_suffix(".mp4"), video_io.side_by_side(columns), fps)
    video_io.write_grid(path.with_suffix(".png"), columns)


def _batches(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(indices), size):
        yield list(indices[start : start + size])
