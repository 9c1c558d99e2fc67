"""What a tiny autoencoder makes of whole pictures, beside what it makes of the crops that it learnt from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from vireo.comparison import show
from vireo.errors import UserError
from vireo.metrics import measure_video
from vireo.models import teacher_lengths
from vireo.models.taehv import TAEHV
from vireo.models.teachers import Teacher
from vireo.pixels import to_uint8
from vireo.randomness import Draws
from vireo.sampling.evaluation import Evaluated
from vireo.sampling.four_paths import FourPaths
from vireo.sampling.reconstruction import Reconstruction

MEASURES = ("psnr", "ssim", "temporal_psnr", "flicker")
FIGURES = [title for measure in MEASURES for title in (measure, f"crop {measure}")]


@runtime_checkable
class WholeClips(Protocol):
    """Datasets that give clips at their own size, such as `vireo.data.clips.Clips`."""

    def longest(self, index: int) -> int: ...

    def whole(self, index: int, num_frames: int, multiple: int = 1) -> dict[str, Any]: ...


class FullResolution:
    """Held-out clips at their own size and greater length, run by chunks, and the same clips' crops as in validation.

    Networks that saw only small crops show streaks at large sizes. The videos and pictures are `full_*`.

    max_frames: a clip is the longest legal one that its video has, but not longer. clips: how many, from the first.
    chunk: frames that the tiny network runs at a time, see `TAEHV.encode`.
    teacher: whether the model's teacher encodes and decodes as well, each clip at once, which takes much memory; where
    it does not fit, the tiny network stands alone and a row says so.
    """

    def __init__(self, max_frames: int = 49, clips: int = 4, chunk: int = 4, teacher: bool = False) -> None:
        self.max_frames, self.clips, self.teacher = max_frames, clips, teacher
        self.alone, self.crossed = Reconstruction("chunked", chunk), FourPaths("chunked", chunk)
        if min(max_frames, clips) < 1:
            raise UserError(f"FullResolution takes numbers from 1 on, got max_frames={max_frames}, clips={clips}")

    @torch.no_grad()
    def __call__(self, given: Evaluated) -> Sequence[Mapping[str, Any]]:
        """A row for each clip and column, then the means; see `vireo.sampling.evaluation.Evaluation`.

        Each measure stands beside the crop's. Without a teacher "own latents" are all there is, and the baselines.
        """
        network, encoder, stream, device = given.network, given.encoder, given.stream, given.device
        if not isinstance(network, TAEHV):
            raise UserError(f"FullResolution takes a TAEHV, the network is a {type(network).__name__}")
        teacher = encoder if self.teacher and isinstance(encoder, Teacher) else None
        if self.teacher and teacher is None:
            raise UserError("FullResolution has teacher=true, but the model's encoder is no teacher")
        dataset = stream.dataset
        if not isinstance(dataset, WholeClips):
            note = f"not measured: {type(dataset).__name__} has no clips at their own size"
            return [{"clip": "all", "note": note}]
        family = teacher.family if teacher else None
        rows = []
        for index in given.indices[: self.clips]:
            limit = min(self.max_frames, dataset.longest(index))
            length = teacher_lengths.longest(limit, network.variant.name, family)
            sample = dataset.whole(index, length, network.variant.spatial_downscale)
            batch = {"frames": sample["frames"][None].to(device), "position": torch.tensor([index])}
            whole, baselines, note = self._videos(network, encoder, batch, stream.seed)
            _show(whole, given.folder / f"full_{index:03d}", sample.get("fps"))
            crop, small_baselines, _ = self._videos(network, encoder, stream.batch([index], device), stream.seed)
            rows += _rows(sample["name"], {**whole, **baselines}, {**crop, **small_baselines})
            rows += [{**rows[-1], "column": "teacher", **dict.fromkeys(FIGURES), "note": note}] if note else []
        return [*rows, *_means(rows)]

    def _videos(
        self, network: TAEHV, encoder: Any, batch: dict, seed: object
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
        """The columns and the baselines of one clip, (T, C, H, W), and why the teacher's are missing."""
        draws, note = Draws(seed, batch["position"], batch["frames"].device), ""
        made: dict[str, Tensor] = {}
        if self.teacher:
            try:
                made = self.crossed(network, encoder, encoder(batch, draws), draws)
            except torch.OutOfMemoryError:
                note = "does not fit into the device's memory: lower max_frames, or say teacher=false"
        if not made:
            alone = self.alone(network, encoder, batch, draws)
            made = {"target": alone["target"], "own latents": alone["prediction"]}  # as FourPaths calls it
        baselines = self.alone.baselines({"frames": batch["frames"][:, : made["target"].shape[1]]})
        return _first(made), _first(baselines), note


def _show(columns: Mapping[str, Tensor], path: Path, fps: float | None) -> None:
    shown = {name: to_uint8(video, low=0.0).cpu() for name, video in columns.items()}
    if "prediction" not in shown:
        shown["prediction"] = shown.pop("own latents")  # the one whose error is shown
    show(shown, path, fps)


def _first(videos: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: video[0] for name, video in videos.items()}


def _rows(clip: str, whole: Mapping[str, Tensor], crop: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A row for each column of the whole clip; what only the crop has is left out."""
    frames, _, height, width = whole["target"].shape
    rows = []
    for name in [name for name in whole if name != "target"]:
        here = measure_video(whole[name], whole["target"])
        there = measure_video(crop[name], crop["target"]) if name in crop else {}
        figures = {**here, **{f"crop {measure}": value for measure, value in there.items()}}
        facts = {"clip": clip, "column": name, "frames": frames, "size": f"{height}x{width}"}
        rows.append({**facts, **{name: figures.get(name) for name in FIGURES}, "note": ""})
    return rows


def _means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The mean over the clips for each column."""
    means = []
    for column in dict.fromkeys(row["column"] for row in rows if not row["note"]):
        mine = [row for row in rows if row["column"] == column and not row["note"]]
        figures = {}
        for name in FIGURES:
            values = [row[name] for row in mine if row[name] is not None]
            figures[name] = sum(values) / len(values) if values else None
        facts = {"clip": f"mean of {len(mine)}", "column": column, "frames": None, "size": None}
        means.append({**facts, **figures, "note": ""})
    return means
