"""vireo evaluate run=<run> [step=500] [clips=100] [out=<folder>]
vireo evaluate experiment=<recipe> weights=<file> …

Measure a trained network, or foreign weights without a run, on every held-out clip: a table beside naive baselines,
metrics.json and metrics.csv with each clip's figures, videos of the worst and the best clips, and what the recipe names
in model.evaluations. Default folder: <run>/evaluation.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from vireo.errors import UserError
from vireo.run_folder import write_json
from vireo.verbs import arguments

if TYPE_CHECKING:
    from torch import Tensor

    from vireo.validation import ClipScore

SHOWN = 3  # worst and best clips to show
NOTES = {
    "pixels": "measured as in an 8-bit video",
    "psnr": "the mean over a clip's frames",
    "pooled_psnr": "of a clip's mean error; in a mean over clips, of the mean of their errors",
    "infinite psnr": "null for a clip; in the mean, as for single frames, what has no error counts as 100 dB",
}


def main(words: Sequence[str]) -> int:
    given = arguments.read(words, ("step", "clips", "weights", "out"))
    clips = arguments.whole(given.own, "clips", None)
    from vireo import objects, report
    from vireo.sampling.columns import Remembered
    from vireo.sampling.evaluation import Evaluated
    from vireo.validation import means, means_by_task, score_clips
    from vireo.verbs import trained

    network, about = trained.network(given)
    encoder, sampler = objects.encoder(given.settings), objects.sampler(given.settings)
    evaluations = objects.evaluations(given.settings)  # now, so that a mistake in the last one is told at once
    device, settings = trained.device(), given.settings["validation"]
    encoder.to(device)
    stream = trained.held_out(given.settings, encoder)
    folder = Path(given.own.get("out", (given.folder or Path()) / "evaluation"))
    folder.mkdir(parents=True, exist_ok=True)
    indices = range(len(stream.dataset) if clips is None else min(clips, len(stream.dataset)))
    loss, batch_size = objects.loss(given.settings), given.settings["batch_size"]
    with TemporaryDirectory() as videos:
        sampler = Remembered(sampler, Path(videos)) if evaluations else sampler
        scored = score_clips(network, encoder, loss, sampler, stream, indices, batch_size, device)
        everything, shown = _show_extremes(scored, settings, folder)
        scores = [score for score in everything if not score.unreadable]
        unreadable = {score.name: score.unreadable for score in everything if score.unreadable}
        readable = [score.clip for score in scores]
        mean, tasks = means(scores), means_by_task(scores)
        rows: list[dict[str, Any]] = [{"clip": score.name, **_honest(score.measures)} for score in scores]
        rows += [{**dict.fromkeys(rows[0] if rows else ()), "clip": name} for name in unreadable]
        found: dict[str, Any] = {"weights": about, "device": str(device), "clips": len(scores), "notes": NOTES}
        found |= {
            "mean": mean,
            "tasks": tasks,
            "each": rows,
            "unreadable": unreadable,
            "shown": shown,
            "evaluations": {},
            "missing": list(evaluations),
        }
        write_json(folder / "metrics.json", found)
        report.write_csv(rows, folder / "metrics.csv")
        print(f"{len(scores)} held-out clips, weights: {about}\n\n{report.comparison(mean)}\n", flush=True)
        for name, reason in unreadable.items():
            print(f"left out: {name}: {reason}")
        if tasks:
            print(f"by task\n{report.table(tasks)}\n", flush=True)
        for name, evaluation in evaluations.items():
            table = list(evaluation(Evaluated(network, encoder, sampler, stream, readable, device, folder)))
            print(f"{name.replace('_', ' ')}\n{report.table(table)}\n", flush=True)
            found["evaluations"][name] = table
            found["missing"].remove(name)
            write_json(folder / "metrics.json", found)
    print(f"each clip  {folder / 'metrics.json'}, metrics.csv\nto look at {folder}/worst_*, best_*")
    return 0


def _show_extremes(
    scored: Iterator[tuple["ClipScore", dict[str, "Tensor"]]], settings: Mapping[str, Any], folder: Path
) -> tuple[list["ClipScore"], dict[str, str]]:
    """All scores, also of clips that cannot be read; the worst and the best clips are written as worst_1, …, best_1, …
    and named here by these."""
    from vireo.comparison import show

    metric, sign = settings["metric"], 1 if settings["higher_is_better"] else -1
    scores: list[ClipScore] = []
    heaps: dict[str, list] = {"worst": [], "best": []}  # so that only a few videos are held
    for score, columns in scored:
        if score.unreadable:
            scores.append(score)
            continue
        if metric not in score.measures:
            raise UserError(f"validation.metric={metric} is not measured; there are {', '.join(score.measures)}")
        scores.append(score)
        figure = sign * score.measures[metric]
        for title, rank in (("worst", -figure), ("best", figure)):
            heapq.heappush(heaps[title], (rank, score.clip, score, columns))
            if len(heaps[title]) > SHOWN:
                heapq.heappop(heaps[title])
    names = {}
    for title, heap in heaps.items():
        for place, (*_, score, columns) in enumerate(sorted(heap, key=lambda entry: -entry[0]), 1):
            show(columns, folder / f"{title}_{place}", settings["fps"] or score.fps, settings["gif"])
            names[f"{title}_{place}"] = score.name
    return scores, names


def _honest(measures: Mapping[str, float]) -> dict[str, float | None]:
    """A clip without any error has no PSNR in dB."""
    from vireo.metrics import MOST

    return {name: None if name.endswith("psnr") and value >= MOST else value for name, value in measures.items()}
