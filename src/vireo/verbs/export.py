"""vireo export run=<run> [step=500] [out=<folder>]

Write what the ecosystem reads (released key names, diffusers folders) from a run's newest checkpoint, or from one by
step, with the averaged weights where there are any. Default folder: <run>/export/step_00000500.
"""

from collections.abc import Sequence
from pathlib import Path

from vireo.errors import UserError
from vireo.verbs import arguments


def main(words: Sequence[str]) -> int:
    given = arguments.read(words, ("step", "out", "weights"))
    if given.folder is None and "weights" not in given.own:
        raise UserError("vireo export needs run=<run> (`vireo runs` lists them), or weights=<file> and an experiment")
    from vireo.verbs import trained

    network, about = trained.network(given)
    default = (
        given.folder / "export" / (f"step_{int(given.own['step']):08d}" if "step" in given.own else "newest")
        if given.folder
        else Path("export")
    )
    for path in network.export(Path(given.own.get("out", default)), network.state_dict()):
        print(f"{path}  from {about}")
    return 0
