"""vireo runs [experiment=<recipe>] [paths.outputs=<folder>]

List the runs below outputs: state, steps, best validation figure, speed, overrides.
"""

from collections.abc import Sequence
from pathlib import Path

from vireo import config, report
from vireo.errors import UserError


def main(words: Sequence[str]) -> int:
    values = dict(word.partition("=")[::2] for word in words)
    unknown = values.keys() - {"experiment", "paths.outputs"}
    if unknown:
        raise UserError(f"vireo runs takes experiment= and paths.outputs=, not {', '.join(sorted(unknown))}")
    outputs = Path(values.get("paths.outputs", config.outputs_folder()))
    folders = sorted(outputs.glob(f"{values.get('experiment', '*')}/*/resolved.yaml"))
    rows = [{"experiment": f.parent.parent.name, **report.state_of(f.parent)} for f in folders]
    print(report.table(rows) if rows else f"no runs below {outputs}")
    return 0
