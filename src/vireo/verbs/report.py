"""vireo report sweep=<folder or name> [paths.outputs=<folder>]
vireo report run=<folder or name>

A sweep, also while it runs: a table of its jobs (overrides, state, best figure, steps, seconds of training), the same
as `sweep.csv`, and the curves of all runs in `curves.png`. Names are those of folders below <outputs>/sweeps.
Of a run: its state and `curves.png`; of a chain, those of each stage.
"""

from collections.abc import Sequence
from pathlib import Path

from vireo import config, report, run_folder, sweeps
from vireo.errors import UserError
from vireo.verbs.arguments import find


def main(words: Sequence[str]) -> int:
    values = dict(word.partition("=")[::2] for word in words)
    unknown = values.keys() - {"sweep", "run", "paths.outputs"}
    if unknown or ("sweep" in values) == ("run" in values):
        raise UserError("vireo report takes either sweep=<folder or name> or run=<folder or name>")
    if "run" in values:
        runs = list(run_folder.stages(find(values["run"])).values())
        judged = [config.load_resolved(folder / "resolved.yaml")["validation"] for folder in runs]
        rows = [
            report.state_of(folder, validation["metric"], validation["higher_is_better"])
            for folder, validation in zip(runs, judged, strict=True)
        ]
        print(report.table(rows))
        for folder in runs:
            print(f"curves  {report.curves(folder)}")
        return 0
    outputs = Path(values.get("paths.outputs") or config.outputs_folder())
    print(sweeps.show(_find_sweep(values["sweep"], outputs / "sweeps")))
    return 0


def _find_sweep(name: str, below: Path) -> Path:
    for path in (Path(name), below / name):
        if path.is_dir() and sweeps.notes(path):
            return path
    known = sorted((path for path in below.glob("*") if sweeps.notes(path)), key=lambda path: path.stat().st_mtime)
    shown = "\n".join(f"  {path.name}" for path in known[-10:]) or "  (none)"
    raise UserError(f"sweep={name} is neither a sweep's folder nor its name. Sweeps below {below}:\n{shown}")
