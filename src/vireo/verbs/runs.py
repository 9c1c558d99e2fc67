"""vireo runs [experiment=<recipe>] [paths.outputs=<folder>]

List the runs below outputs: state, steps, best validation figure, speed, overrides. A chain is listed with the stage
that has begun last.
"""

from collections.abc import Sequence
from pathlib import Path

from vireo import config, report, run_folder
from vireo.errors import UserError
from vireo.verbs.arguments import is_run


def main(words: Sequence[str]) -> int:
    values = dict(word.partition("=")[::2] for word in words)
    unknown = values.keys() - {"experiment", "paths.outputs"}
    if unknown:
        raise UserError(f"vireo runs takes experiment= and paths.outputs=, not {', '.join(sorted(unknown))}")
    outputs = Path(values.get("paths.outputs", config.outputs_folder()))
    folders = sorted(path for path in outputs.glob(f"{values.get('experiment', '*')}/*") if is_run(path))
    rows = []
    for folder in folders:
        *_, (stage, run) = run_folder.stages(folder).items()
        title = f"{folder.name} ({stage})" if stage else folder.name
        rows.append({"experiment": folder.parent.name, **report.state_of(run), "run": title})
    print(report.table(rows) if rows else f"no runs below {outputs}")
    return 0
