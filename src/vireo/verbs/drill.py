"""vireo drill experiment=<recipe> … [only=kill,not-finite] [out=<folder>]

Try what happens to this composition when something goes wrong: it is trained for a few steps undisturbed, then once for
each fault, which is made for real in its processes; then the same command is given again. Prints a table of faults,
what was done and whether the run survived. A chain's stages are drilled one by one, by commands of their own.
Everything is written below <outputs>/drills, or out=.
"""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from vireo import config, drill, faults, processes
from vireo.errors import UserError
from vireo.launch import number_of_processes
from vireo.verbs import arguments


def main(words: Sequence[str]) -> int:
    own, others = arguments.split(words, ("only", "out"))
    titles = [fault.title for fault in drill.FAULTS]
    only = own["only"].split(",") if "only" in own else titles
    if strange := [title for title in only if title not in titles]:
        raise UserError(f"only={','.join(strange)}: no such fault; there are {', '.join(titles)}")
    default = config.outputs_folder() / "drills" / time.strftime("%Y-%m-%d_%H-%M-%S")
    outputs = Path(own.get("out", default)).expanduser().absolute()
    settings = drill.settings_of(others, outputs)
    if settings["size"] == "mini":
        from vireo.mini import world

        world.ensure()
    settings["launcher"]["processes"] = processes_here = number_of_processes(settings["launcher"]["processes"])

    def start(folder: Path, fault: drill.Fault | None) -> int:
        print(f"  {folder.name}: {fault.what if fault else 'no fault'}", flush=True)
        entry = ("vireo.start_drill", *([fault.title] if fault else []))
        return processes.run(folder / "resolved.yaml", processes_here, entry=entry)

    import torch

    from vireo import report

    print(f"{settings['experiment']}, {processes_here} processes, {drill.STEPS} steps each, in {outputs}", flush=True)
    exact = not torch.cuda.is_available()
    results: list[drill.Result] = []
    with contextlib.suppress(KeyboardInterrupt):  # what was tried so far is worth its table
        results += drill.drill(settings, start, exact, only)
    rows = [
        {
            "fault": result.title,
            "what was done": result.what,
            "survived": {True: "yes", False: "NO", None: "not tried"}[result.survived],
            "": result.detail,
            "seconds": f"{result.seconds:.0f}",
        }
        for result in results
    ]
    print(f"\n{report.table(rows)}")
    return faults.EXIT_FAULT if any(result.survived is False for result in results) else faults.EXIT_FINISHED
