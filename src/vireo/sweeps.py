"""What a sweep leaves behind: a note for each job, and from the notes a table and one picture of all curves.

`<sweep>/<number>/job.json` holds what the job was asked and how it ended; its figures lie in its run's folder.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vireo import faults, report, run_folder
from vireo.errors import UserError
from vireo.tracking import read_metrics

NOTE = "job.json"
CODE = "code.json"
ENDED = {
    faults.EXIT_FINISHED: "finished",
    faults.EXIT_STOPPED: "stopped",
    faults.EXIT_INTERRUPTED: "stopped",
    faults.EXIT_MISTAKE: "mistake",
}


def begin(folder: Path, overrides: Sequence[str]) -> None:
    """A new note for a job that begins, in place of what its life before a requeue, or another sweep, has left."""
    (folder / NOTE).unlink(missing_ok=True)
    note(folder, overrides=list(overrides))


def note(folder: Path, **facts: Any) -> None:
    """Add facts to the note of the job whose folder this is: overrides, run, exit_code, message, best, metric, …

    A full disk takes no note, and ends neither the job nor the others of the sweep.
    """
    with run_folder.dispensable(f"the note of job {folder.name}"):
        folder.mkdir(parents=True, exist_ok=True)
        run_folder.write_json(folder / NOTE, {**read(folder), **facts})


def read(folder: Path) -> dict[str, Any]:
    """The note of one job; empty if there is none yet."""
    path = folder / NOTE
    return json.loads(path.read_text()) if path.exists() else {}


def check_folders(subdir: str) -> None:
    """Raises UserError for jobs' folders that are not called by their numbers (`hydra.sweep.subdir`)."""
    if subdir != "${hydra.job.num}":
        raise UserError(
            f"hydra.sweep.subdir is '{subdir}'; leave it out: a job's folder in a sweep is its number, and holds only "
            "notes. The runs have folders with the swept values in their names, or what run= says: 'run=seed_${seed}'"
        )


def fix(sweep: Path, code: Mapping[str, str]) -> None:
    """Write down what the jobs of a sweep are to run: hashes by what they are of. Notes of a sweep before it go.

    Whether a run is finished stands in the run's own folder, so nothing is trained twice for that.
    """
    sweep.mkdir(parents=True, exist_ok=True)
    for number in notes(sweep):
        (sweep / str(number) / NOTE).unlink()
    run_folder.write_json(sweep / CODE, code)


def check(folder: Path, code: Mapping[str, str]) -> None:
    """Say, in the job's output and for the sweep's end, what has changed since the sweep began."""
    path = folder.parent / CODE
    fixed = json.loads(path.read_text()) if path.exists() else {}  # an older vireo may have begun the sweep
    changed = sorted(name for name, digest in code.items() if fixed.get(name) != digest)
    if changed:
        print(f"{' and '.join(changed)} changed after the sweep began; this job runs what is there now", flush=True)
        note(folder, changed=changed)


def notes(sweep: Path) -> dict[int, dict[str, Any]]:
    """The notes of all jobs that a sweep has begun, by number."""
    folders = [path.parent for path in sweep.glob(f"*/{NOTE}") if path.parent.name.isdigit()]
    return {int(folder.name): read(folder) for folder in sorted(folders, key=lambda path: int(path.name))}


def objective(best: float | None, higher_is_better: bool) -> float:
    """What a search minimises or maximises: a failed job, or one without a finite figure, is infinitely bad."""
    if best is None or not math.isfinite(best):
        return -math.inf if higher_is_better else math.inf
    return best


def exit_code(sweep: Path) -> int:
    """The worst of all jobs, a fault before a requested stop; a fault if one left no code, or if there was no job."""
    found = [one.get("exit_code") for one in notes(sweep).values()] or [None]
    codes = [faults.EXIT_FAULT if code is None else code for code in found]
    failed = [code for code in codes if code not in (faults.EXIT_FINISHED, faults.EXIT_STOPPED)]
    return max(failed or codes)


def rows(sweep: Path) -> list[dict[str, Any]]:
    """A row for each job: overrides in which it differs from the others, best figure, steps, seconds, state, run.

    Figures are those that the run's folder has now. A job that did not end well is finished here, too, if its run was
    finished afterwards, by hand or by the same sweep started again.
    """
    found = notes(sweep)
    titled = zip(found.items(), _titles(found), strict=True)
    return [_row(number, one, words, sweep / str(number)) for (number, one), words in titled]


def show(sweep: Path) -> str:
    """Table, failed jobs and the best one as text; writes `sweep.csv` and `curves.png` into the sweep's folder."""
    table = rows(sweep)
    if not table:
        return f"no job of {sweep} has begun"
    lines = ["", report.table(table), ""]
    for row, one in zip(table, notes(sweep).values(), strict=True):
        if one.get("changed"):
            lines.append(f"job {_named(row)} ran {' and '.join(one['changed'])} as changed after the sweep began")
        if one.get("exit_code") not in (None, faults.EXIT_FINISHED) and row["state"] != "finished":
            said = (one.get("message") or "").strip() or f"see {one.get('run')}/train.log"
            lines.append(f"job {_named(row)} {row['state']}: {said}")
    best = _best(table, notes(sweep))
    if best is not None:
        lines.append(f"best    job {_named(table[best])}: {table[best]['best']:.4g}")
    lines.append(f"table   {report.write_csv(table, sweep / 'sweep.csv')}")
    picture = curves(sweep)
    return "\n".join([*lines, f"curves  {picture}"] if picture else lines)


def curves(sweep: Path) -> Path | None:
    """All runs of a sweep in one picture, the best ones by name; None if none has a figure yet."""
    found = notes(sweep)
    table = rows(sweep)
    order = sorted(range(len(table)), key=lambda place: _merit(table[place], list(found.values())[place]))
    runs = {}
    for place in order:
        one, row = list(found.values())[place], table[place]
        folder = run_folder.newest_stage(Path(one["run"])) if one.get("run") else None
        figures = read_metrics(folder / "metrics.jsonl") if folder else []
        if figures:
            runs[_named(row)] = figures
    metrics = [f"validation/{one['metric']}" for one in found.values() if one.get("metric")]
    return report.draw(runs, sweep / "curves.png", metrics) if runs else None


def _named(row: Mapping[str, Any]) -> str:
    """The number of a job, and what sets it apart, if there are others."""
    return f"{row['job']} ({row['overrides']})" if row["overrides"] else str(row["job"])


def _titles(found: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """The words of each job that not all jobs share."""
    words = [one.get("overrides", []) for one in found.values()]
    common = set.intersection(*map(set, words)) if words else set()
    return [" ".join(word for word in own if word not in common) for own in words]


def _row(number: int, one: Mapping[str, Any], words: str, place: Path) -> dict[str, Any]:
    folder, metric = one.get("run"), one.get("metric") or "psnr"
    run = run_folder.newest_stage(Path(folder)) if folder else None
    about = report.state_of(run, metric, one.get("higher_is_better", True)) if run else {}
    return {
        "job": number,
        "overrides": words,
        "state": _state(one.get("exit_code"), about.get("state", "beginning"), run, place),
        "best": about.get("best"),
        "metric": metric,
        "loss": about.get("loss"),
        "steps": about.get("steps"),
        "seconds": about.get("seconds"),
        "run": folder or (one.get("message") or "").partition("\n")[0],
    }


def _state(code: int | None, now: str, run: Path | None, place: Path) -> str:
    """How a job ended by itself, unless its run is going on, or was finished, since. now: the state of its run.

    A mistake can be that the folder was finished with, or belongs to, somebody else.
    """
    if code is None or (now == "running" and code != faults.EXIT_MISTAKE):
        return now
    if run and now == "finished" and (run / "finished").stat().st_mtime >= (place / NOTE).stat().st_mtime:
        return now
    return ENDED.get(code, f"failed ({code})")


def _merit(row: Mapping[str, Any], one: Mapping[str, Any]) -> float:
    """Sorts the best first."""
    higher = one.get("higher_is_better", True)
    return (-1 if higher else 1) * objective(row["best"], higher)


def _best(table: Sequence[Mapping[str, Any]], found: Mapping[int, Mapping[str, Any]]) -> int | None:
    merits = [_merit(row, one) for row, one in zip(table, found.values(), strict=True)]
    place = min(range(len(merits)), key=merits.__getitem__, default=None)
    return place if place is not None and math.isfinite(merits[place]) else None
