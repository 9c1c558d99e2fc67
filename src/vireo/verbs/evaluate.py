"""vireo evaluate run=<run> [step=500] [clips=100] [out=<folder>]
vireo evaluate experiment=<recipe> weights=<file> …

Measure a trained network, or foreign weights without a run, on every held-out clip: a table beside naive baselines,
metrics.json with each clip's figures, and videos of the worst and the best clips. Default folder: <run>/evaluation.
"""

import heapq
from collections.abc import Sequence
from pathlib import Path

from vireo.run_folder import write_json
from vireo.verbs import arguments

SHOWN = 3  # worst and best clips to show


def main(words: Sequence[str]) -> int:
    given = arguments.read(words, ("step", "clips", "weights", "out"))
    clips = arguments.whole(given.own, "clips", None)
    from vireo import objects, report
    from vireo.data.stream import Stream
    from vireo.validation import SEED, ClipScore, means, score_clips, show
    from vireo.verbs import trained

    network, about = trained.network(given)
    encoder, sampler = objects.encoder(given.settings), objects.sampler(given.settings)
    encoder.to(trained.device())
    stream = Stream(objects.dataset(given.settings, "validation"), SEED, shuffle=False)
    folder = Path(given.own.get("out", (given.folder or Path()) / "evaluation"))
    folder.mkdir(parents=True, exist_ok=True)
    count = len(stream.dataset) if clips is None else min(clips, len(stream.dataset))
    settings = given.settings["validation"]
    sign = 1 if settings["higher_is_better"] else -1

    scores: list[ClipScore] = []
    worst: list = []  # heaps of (figure, index, columns) so that only a few videos are held
    best: list = []
    pairs = score_clips(
        network,
        encoder,
        objects.loss(given.settings),
        sampler,
        stream,
        range(count),
        given.settings["batch_size"],
        trained.device(),
    )
    for score, columns in pairs:
        scores.append(score)
        figure = sign * score.measures[settings["metric"]]
        for heap, rank in ((worst, -figure), (best, figure)):
            heapq.heappush(heap, (rank, score.clip, columns))
            if len(heap) > SHOWN:
                heapq.heappop(heap)
    for title, heap in (("worst", worst), ("best", best)):
        for place, (_, index, columns) in enumerate(sorted(heap, key=lambda entry: -entry[0])):
            show(columns, folder / f"{title}_{place}_clip_{index:03d}", settings["fps"])

    mean = means(scores)
    rows = [{"clip": s.name, **s.measures} for s in scores]
    print(f"{len(scores)} held-out clips, weights: {about}\n\n{report.comparison(mean)}\n")
    tables = {}
    for name, evaluation in objects.evaluations(given.settings).items():
        tables[name] = list(evaluation(network, encoder, sampler, stream, range(count), trained.device(), folder))
        print(f"{name.replace('_', ' ')}\n{report.table(tables[name])}\n", flush=True)
    about_all = {"weights": about, "clips": len(scores), "mean": mean, "each": rows, "evaluations": tables}
    write_json(folder / "metrics.json", about_all)
    print(f"each clip  {folder / 'metrics.json'}\nvideos     {folder}/worst_*.mp4, best_*.mp4")
    if scores and settings["metric"] in mean:
        report.write_csv(rows, folder / "metrics.csv")
    return 0
