"""How well holes are filled: whole sequences by the field's measures, and what a single sample pays for being one."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from vireo.errors import UserError
from vireo.metrics import box_ssim, decibels, frame_mse
from vireo.pixels import as_8_bit
from vireo.randomness import Draws
from vireo.sampling.columns import Remembered
from vireo.sampling.evaluation import Evaluated
from vireo.sampling.inpainting import InpaintingSampler


@runtime_checkable
class WholeSequences(Protocol):
    """Datasets that give whole videos with their holes, such as `vireo.data.masked_clips.MaskedClips`."""

    def whole(self, index: int, num_frames: int | None = None) -> dict[str, Any]: ...


class InpaintedSequences:
    """Held-out videos from their first to their last frame at their own size, filled by overlapping windows.

    Rows: {"column", "psnr", "ssim_65", "hole_psnr", "background_psnr", "warp_error_lk", "sequences", "frames"}. psnr
    and ssim_65 are means over all frames of all videos, as ProPainter has them; the others are means over videos, see
    `InpaintingSampler.measure`. Papers take the flow of the warping error from RAFT and multiply likewise by 1000.
    The truth in an annotated hole is the object itself: of what is to be removed only the background can be judged.

    clips: how many of the held-out videos, from the first; None: all. max_frames: frames of each, from the first.
    """

    def __init__(self, clips: int | None = None, max_frames: int | None = None) -> None:
        self.clips, self.max_frames = clips, max_frames

    @torch.no_grad()
    def __call__(self, given: Evaluated) -> Sequence[Mapping[str, Any]]:
        """See `vireo.sampling.evaluation.Evaluation`. Raises UserError for other samplers and data."""
        filler, dataset = _filler(given.sampler), given.stream.dataset
        if not isinstance(dataset, WholeSequences):
            raise UserError(f"{type(dataset).__name__} has no whole videos: remove this from model.evaluations")
        frames: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        videos: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for index in list(given.indices)[: self.clips]:
            sample = dataset.whole(given.stream.index(index), self.max_frames)
            batch = {n: v[None].to(given.device) if isinstance(v, Tensor) else [v] for n, v in sample.items()}
            draws = Draws(given.stream.seed, [index], given.device)
            batch = given.encoder(batch, draws)
            columns = {**filler(given.network, given.encoder, batch, draws), **filler.baselines(batch)}
            for name, value in filler.measure(given.network, given.encoder, batch, columns).items():
                column, _, measure = name.rpartition("/")
                videos[column or "prediction"][measure].append(float(value[0]))
            for name in columns.keys() - {"target", *filler.unscored}:
                shown = as_8_bit(columns[name])
                frames[name]["psnr"].append(decibels(frame_mse(shown, columns["target"]))[0].cpu())
                frames[name]["ssim_65"].append(box_ssim(shown, columns["target"])[0].cpu())
        rows = []
        for column in videos:
            all_frames = {m: float(torch.cat(frames[column][m]).mean()) for m in frames[column]}
            means = {m: sum(values) / len(values) for m, values in videos[column].items()}
            names = ("psnr", "ssim_65", "hole_psnr", "background_psnr", "warp_error_lk")
            figures = {name: {**all_frames, **means}.get(name) for name in names}
            count = sum(map(len, frames["prediction"]["psnr"]))
            rows.append(
                {"column": column, **figures, "sequences": len(videos["prediction"]["hole_psnr"]), "frames": count}
            )
        return rows


class SampleMean:
    """The mean of several samples of each clip beside a single one: a single one pays for its own variance.

    Rows: {"line", "hole_psnr", "background_psnr"}, means over the clips; the ceiling and the baselines have rows too.
    samples: of each clip, the first is validation's. clips: how many of the held-out ones, from the first; None: all.
    """

    def __init__(self, samples: int = 8, clips: int | None = 16) -> None:
        if samples < 2:
            raise UserError(f"a mean of samples needs at least 2, got samples={samples}")
        self.samples, self.clips = samples, clips

    @torch.no_grad()
    def __call__(self, given: Evaluated) -> Sequence[Mapping[str, Any]]:
        """See `vireo.sampling.evaluation.Evaluation`. Raises UserError for another sampler."""
        filler = _filler(given.sampler)
        found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for index in list(given.indices)[: self.clips]:
            batch = given.stream.batch([index], given.device)
            draws = Draws(given.stream.seed, batch["position"], given.device)
            batch = given.encoder(batch, draws)
            columns = {**filler(given.network, given.encoder, batch, draws), **filler.baselines(batch)}
            others = [
                filler.predict(given.network, given.encoder, batch, draws, number) for number in range(1, self.samples)
            ]
            columns[f"mean of {self.samples}"] = torch.stack([columns["prediction"], *others]).mean(dim=0)
            for name, value in filler.measure(given.network, given.encoder, batch, columns).items():
                line, _, measure = name.rpartition("/")
                if measure in ("hole_psnr", "background_psnr"):
                    found[line or "prediction"][measure].append(float(value[0]))
        return [
            {"line": line, **{name: sum(values) / len(values) for name, values in measures.items()}}
            for line, measures in found.items()
        ]


def _filler(sampler: Any) -> InpaintingSampler:
    sampler = sampler.sampler if isinstance(sampler, Remembered) else sampler
    if not isinstance(sampler, InpaintingSampler):
        raise UserError(
            f"this evaluation needs vireo.sampling.inpainting.InpaintingSampler as model.sampler, got "
            f"{type(sampler).__name__}: remove it from model.evaluations"
        )
    return sampler
