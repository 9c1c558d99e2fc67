"""What a run or a sweep shows at its end: curves as a picture, a table, and where to look."""

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vireo import checkpoint
from vireo.run_folder import finished, is_locked
from vireo.tracking import read_metrics

CURVES = "curves.png"
CLIPS = "held_out_clips"  # in a row of metrics.jsonl: how many its validation looked at
PANELS = ("loss", "validation/psnr", "validation/loss", "grad_norm", "lr", "seconds_per_step")
NAMED = 10  # curves of a picture that have a colour of their own


def curves(folder: Path) -> Path:
    """Draw a run's metrics.jsonl into `<run>/curves.png`: a panel for each figure that was logged, baselines dashed."""
    rows = read_metrics(folder / "metrics.jsonl")
    return draw({folder.name: rows}, folder / CURVES)


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, further: Sequence[str] = ()) -> Path:
    """Curves of one or more runs in one picture, a panel for each of PANELS and `further` that any run has.

    runs: by title, the best first. The first NAMED have colours and stand in the legend, the others are grey.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    known = {name for rows in runs.values() for row in rows for name in row}
    panels = [name for name in dict.fromkeys([*PANELS, *further]) if name in known]
    columns = min(3, max(1, len(panels)))
    lines = -(-max(1, len(panels)) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 3.1 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for place, (title, rows) in reversed(list(enumerate(runs.items()))):  # the best one is drawn last, on top
            points = [(row["step"], row[panel]) for row in rows if panel in row]
            look = {"color": f"C{place}"} if place < NAMED else {"color": "0.75", "linewidth": 0.8}
            marker = "o" if len(points) < 20 and place < NAMED else None
            x, y = [step for step, _ in points], [value for _, value in points]
            axis.plot(x, y, label=title, marker=marker, markersize=3, **look)
        if len(runs) == 1:
            _baselines(axis, panel, next(iter(runs.values())))
        axis.set_title(panel, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
        if panel in ("loss", "grad_norm"):
            axis.set_yscale("log")
    if len(runs) > 1 and panels:
        _legend(figure, list(runs))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _legend(figure: Any, titles: Sequence[str]) -> None:
    """Below the panels, where it hides no curve; the grey ones share an entry."""
    from matplotlib.lines import Line2D

    shown = [(title if len(title) <= 60 else f"{title[:59]}…") for title in titles[:NAMED]]
    lines = [Line2D([], [], color=f"C{place}") for place in range(len(shown))]
    if len(titles) > NAMED:
        shown.append(f"{len(titles) - NAMED} others")
        lines.append(Line2D([], [], color="0.75", linewidth=0.8))
    columns = max(1, min(4, 150 // max(map(len, shown))))
    figure.legend(lines, shown, loc="outside lower center", ncols=columns, fontsize=8)


def _baselines(axis: Any, panel: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Dashed lines for naive predictions: validation/<baseline>/psnr beside validation/psnr."""
    group, _, measure = panel.rpartition("/")
    last: Mapping[str, Any] = next((row for row in reversed(rows) if panel in row), {})
    names = [name.split("/")[1] for name in sorted(last) if re.fullmatch(f"{group}/[^/]+/{measure}", name)]
    for number, name in enumerate(names, 1):
        axis.axhline(last[f"{group}/{name}/{measure}"], linestyle="--", linewidth=1, color=f"C{number}", label=name)
    if names:
        axis.get_lines()[0].set_label("prediction")
        axis.legend(fontsize=7)


def where_to_look(folder: Path, exported: Sequence[Path], figures: Mapping[str, float]) -> str:
    """The last words of a run."""
    samples = sorted((folder / "samples").glob("step_*"))
    lines = [f"\nheld-out clips:\n{comparison(figures)}\n" if figures else ""]
    rows = read_metrics(folder / "metrics.jsonl")
    losses = [(row["step"], row["validation/loss"]) for row in _of_the_last_clips(rows) if "validation/loss" in row]
    if len(losses) > 1:  # at the same draws, so they can be compared, which losses of training cannot
        said = ", ".join(f"{loss:.4g} at step {step}" for step, loss in (losses[0], losses[-1]))
        lines.append(f"held-out loss on fixed draws: {said}\n")
    lines.append("Where to look:")
    if (folder / CURVES).exists():
        lines.append(f"  curves        {folder / CURVES}")
    if samples:
        kinds = sorted({file.suffix for file in samples[-1].iterdir()})
        lines.append(f"  side by side  {samples[-1]}/{', '.join(f'*{kind}' for kind in kinds)}")
    lines.append(f"  metrics       {folder / 'metrics.jsonl'}")
    lines += [f"  export        {path}" for path in exported]
    return "\n".join(lines)


def comparison(figures: Mapping[str, float]) -> str:
    """A table with a line for the prediction and one for each baseline, a column for each measure.

    figures: "psnr" or "validation/psnr" of the prediction, "mean colour/psnr" of a baseline.
    """
    lines: dict[str, dict[str, float]] = {"prediction": {}}
    for name, value in figures.items():
        title, _, measure = name.removeprefix("validation/").rpartition("/")
        lines.setdefault(title or "prediction", {})[measure] = value
    measures = list(lines["prediction"])
    return table([{"": title, **{measure: row.get(measure) for measure in measures}} for title, row in lines.items()])


def state_of(folder: Path, metric: str = "psnr", higher_is_better: bool = True) -> dict[str, Any]:
    """One run in a row: how far it is, how good by the metric, how long its steps took, and whether it is done.

    seconds: of all steps together, validation and saving apart.
    """
    rows = read_metrics(folder / "metrics.jsonl")
    marker = finished(folder)
    saved = checkpoint.steps(folder)
    name = f"validation/{metric}"
    values = [row[name] for row in _of_the_last_clips(rows) if name in row]
    values = [value for value in values if math.isfinite(value)]
    best = (marker or {}).get("best") or {}
    seconds = [row["seconds_per_step"] for row in rows if "seconds_per_step" in row]
    return {
        "run": folder.name,
        "state": "running" if is_locked(folder) else "finished" if marker else "stopped" if saved else "no checkpoint",
        "steps": rows[-1]["step"] if rows else 0,
        "checkpoint": saved[-1] if saved else None,
        "best": best.get("value", (max if higher_is_better else min)(values, default=None)),
        "loss": next((row["loss"] for row in reversed(rows) if "loss" in row), None),
        "seconds_per_step": sorted(seconds)[len(seconds) // 2] if seconds else None,
        "seconds": _seconds(rows),
        "overrides": " ".join(_overrides(folder)),
    }


def _of_the_last_clips(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows but for those of validations on more or fewer held-out clips than the last one, which nothing compares
    with; rows that do not say are kept."""
    last = next((row[CLIPS] for row in reversed(rows) if CLIPS in row), None)
    return [row for row in rows if row.get(CLIPS, last) == last]


def _seconds(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """A row's seconds_per_step is the mean since the row before."""
    timed = [(row["step"], row["seconds_per_step"]) for row in rows if "seconds_per_step" in row]
    before = [0, *(step for step, _ in timed)]
    return sum((step - last) * each for (step, each), last in zip(timed, before, strict=False)) if timed else None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as aligned text."""
    if not rows:
        return "(none)"
    names = list(rows[0])
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    return path


def brief(lines: Sequence[Any], most: int = 6) -> str:
    """A list on one line, or on lines of their own with a count of what is left out."""
    if len(lines) == 1:
        return str(lines[0])
    shown = [f"\n    {line}" for line in lines[:most]]
    more = f"\n    … and {len(lines) - most} more" if len(lines) > most else ""
    return f"{len(lines)}{''.join(shown)}{more}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _overrides(folder: Path) -> list[str]:
    path = folder / "overrides.json"
    return json.loads(path.read_text()) if path.exists() else []
