"""Held-out clips: what the network makes of them, measured beside naive baselines and made visible."""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vireo import distributed, faults
from vireo.comparison import show
from vireo.data.stream import Stream, collate, to_device
from vireo.losses.objective import Loss
from vireo.metrics import decibels, measure_video
from vireo.models.encoders import Encoder
from vireo.pixels import to_uint8
from vireo.randomness import Draws
from vireo.run_folder import dispensable
from vireo.sampling.sampler import Sampler

log = logging.getLogger(__name__)

SEED = "validation"  # validation draws the same numbers at every step of every run


class ClipScore(NamedTuple):
    """The measures of one held-out clip: {"psnr": …, "mean colour/psnr": …, "loss": …}. fps: its own, if known.

    task: the kind of clip that it is, where the data knows kinds. unreadable: why it has no measures; its name is then
    the file's.
    """

    clip: int
    name: str
    measures: dict[str, float]
    fps: float | None = None
    task: str | None = None
    unreadable: str | None = None


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

    The network is called with what the caller has set (evaluation mode, averaged weights). The loss does not learn; it
    sees each clip alone, since it gives one figure for all that it sees. A clip that cannot be read has no measures and
    no columns. Clips of several shapes are taken one by one.
    """
    learning, loss.learning = loss.learning, False
    unscored = {"target", *sampler.unscored}
    try:
        for some, samples in _batches(stream, indices, batch_size):
            # What stands in for a clip that cannot be read goes through the network, for all ranks to call it equally
            # often, but has no score.
            unreadable = [sample["bad"][0] if sample["bad"] else None for sample in samples]
            batch = to_device(collate(samples), device)
            draws = Draws(stream.seed, batch["position"], device)
            names = batch.get("name", [str(index) for index in some])
            rates, tasks = (batch.get(field, [None] * len(some)) for field in ("fps", "task"))
            batch = encoder(batch, draws)
            columns = sampler(network, encoder, batch, draws)
            has_truth = "target" in columns
            losses = [_loss(loss, network, batch, draws, row) for row in range(len(some))] if has_truth else []
            baselines = sampler.baselines(batch) if has_truth else {}
            figures = sampler.measure(network, encoder, batch, {**columns, **baselines})
            for row, (index, name, fps, task) in enumerate(zip(some, names, rates, tasks, strict=True)):
                if (bad := unreadable[row]) is not None:
                    path, reason = bad
                    log.warning("a held-out clip cannot be read and is left out of the scores: %s: %s", path, reason)
                    yield ClipScore(index, path, {}, unreadable=reason), {}
                    continue
                shown = {title: to_uint8(video[row], low=0).cpu() for title, video in columns.items()}
                measures = {n: float(v[row]) for n, v in figures.items()}
                if losses:
                    measures = {"loss": losses[row], **measures}
                for title, video in {**columns, **baselines}.items():
                    if title not in unscored and has_truth and video.shape == columns["target"].shape:
                        prefix = "" if title == "prediction" else f"{title}/"
                        for measure, values in measure_video(video[row], columns["target"][row]).items():
                            measures[prefix + measure] = values
                yield ClipScore(index, str(name), measures, fps, task), shown
    finally:
        loss.learning = learning


@torch.no_grad()
def further_videos(
    network: nn.Module,
    encoder: Encoder,
    sampler: Sampler,
    stream: Stream,
    indices: Sequence[int],
    batch_size: int,
    device: torch.device,
) -> Iterator[tuple[int, str, dict[str, Tensor]]]:
    """The sampler's further videos of held-out clips: number of the clip, title, columns uint8 (T, C, H, W)."""
    for some, samples in _batches(stream, indices, batch_size):
        batch = to_device(collate(samples), device)
        draws = Draws(stream.seed, batch["position"], device)
        for title, columns in sampler.videos(network, encoder, encoder(batch, draws), draws).items():
            for row, index in enumerate(some):
                yield index, title, {name: to_uint8(video[row], low=0).cpu() for name, video in columns.items()}


def means(scores: Iterable[ClipScore]) -> dict[str, float]:
    """Mean of each measure over the clips that could be read; pooled_psnr is that of the mean of their `mse`."""
    rows = [score.measures for score in scores if score.unreadable is None]
    found = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}
    for name in found:
        error = f"{name.removesuffix('pooled_psnr')}mse"
        if name.rpartition("/")[2] == "pooled_psnr" and error in found:
            found[name] = float(decibels(torch.tensor(found[error], dtype=torch.float64)))
    return found


def means_by_task(scores: Sequence[ClipScore]) -> list[dict[str, Any]]:
    """A row for each task and column, with its means: {"task", "clips", "column", "psnr", …}; [] without tasks.

    What only the prediction has, such as the loss, is None for the others.
    """
    rows: list[dict[str, Any]] = []
    for task in sorted({score.task for score in scores if score.task is not None}):
        its = [score for score in scores if score.task == task]
        columns: dict[str, dict[str, float]] = {"prediction": {}}
        for name, value in means(its).items():
            column, _, measure = name.rpartition("/")
            columns.setdefault(column or "prediction", {})[measure] = value
        for column, measures in columns.items():
            about = {"task": task, "clips": len(its), "column": column}
            rows.append(about | {measure: measures.get(measure) for measure in columns["prediction"]})
    return rows


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
    fps: float | None = None,
    gif: bool = False,
    pictures: int = 4,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Mean measures over the first `clips` held-out clips, shared out over the ranks; the same on every rank.

    Every rank takes equally many clips (some twice, counted once), since the network's forward may be a collective.
    Writes side-by-side videos and one PNG grid of the first `pictures` clips into `folder`, each on the rank that
    has it. fps: of these videos; None: the clips' own. gif: whether they are GIFs as well. Where clips cannot be read,
    unreadable_clips says how many, and the means are those of the others.

    stop: asked on every rank after each clip. Raises faults.Stopped on all of them if it is true on one.
    """
    count = min(clips, len(stream.dataset))
    rank, world = distributed.rank(), distributed.world_size()
    mine = [(rank + world * turn) % count for turn in range(-(-count // world))]
    scores, shown = [], {}
    for score, columns in score_clips(network, encoder, loss, sampler, stream, mine, batch_size, device):
        if distributed.vote(int(stop())):
            raise faults.Stopped("stopped on request before a step was made; the same command goes on from here")
        scores.append(score)
        if score.clip < pictures and score.unreadable is None:
            shown[score.clip] = (columns, fps or score.fps)
    everything = {s.clip: s for s in itertools.chain(*distributed.gather(scores))}
    with dispensable("pictures of held-out clips"):
        folder.mkdir(parents=True, exist_ok=True)
        for index, (columns, rate) in shown.items():
            show(columns, folder / f"clip_{index:03d}", rate, gif)
    distributed.barrier()
    found = [everything[index] for index in sorted(everything)]
    unreadable = sum(score.unreadable is not None for score in found)
    return {**means(found), **({"unreadable_clips": unreadable} if unreadable else {})}


def _loss(loss: Loss, network: nn.Module, batch: Mapping[str, Any], draws: Draws, row: int) -> float:
    """Of one clip of a batch, the mean over the loss's grid; it is drawn as if the batch were this clip."""
    alone = {
        name: value[row : row + 1] if isinstance(value, Tensor) and value.ndim or isinstance(value, list) else value
        for name, value in batch.items()
    }
    own = Draws(draws.seed, draws.positions[row : row + 1], draws.device, draws.step)
    totals = [loss(network, alone, own.pinned(point)).total for point in loss.grid]
    return float(sum(totals) / len(totals))


def _batches(stream: Stream, indices: Sequence[int], size: int) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
    """Clips and their samples, `size` at a time, or one by one where their shapes differ.

    On all ranks alike, for all of them to call the network equally often.
    """
    for start in range(0, len(indices), size):
        some = list(indices[start : start + size])
        samples = stream.samples([(position, 0) for position in some])
        shapes = [[value.shape for value in sample.values() if isinstance(value, Tensor)] for sample in samples]
        alike = all(distributed.gather(all(own == shapes[0] for own in shapes)))
        for row in range(0, len(some), size if alike else 1):
            end = row + (size if alike else 1)
            yield some[row:end], samples[row:end]
