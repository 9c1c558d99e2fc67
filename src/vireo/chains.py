"""A chain: stages that are ordinary runs, one after the other, each from the export of the one before.

The chain's own folder, `<outputs>/<experiment>/<run>/chain.json`, only says which runs these are.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vireo import config, faults, ranks, run_folder
from vireo.errors import UserError


def run(
    settings: dict[str, Any],
    overrides: Sequence[str],
    swept: Sequence[str],
    run_stage: Callable[[dict[str, Any], Sequence[str]], Any],
) -> Any:
    """Run the stages until one does not end; returns what `run_stage` said of the last that began.

    settings: the chain's, validated with all its stages. overrides: its words. swept: keys that stand first in the
    runs' names. run_stage: called with a stage's settings and words; its answer has `exit_code` and `folder`. A stage
    that is finished does nothing. Raises UserError for what a chain cannot do.
    """
    started = ranks.started()
    if started is not None:
        raise UserError(f"a chain starts processes anew for each stage, and {started.starter} owns them: use "
                        "python train.py … launcher.processes=N")  # fmt: skip
    if settings["resume"] not in ("auto", "none"):
        raise UserError(f"resume={settings['resume']} is one stage's checkpoint: say chain.<stage>.resume=…")
    folder, stages, runs = config.run_folder(settings), config.stages(settings["chain"], overrides), {}
    folder.mkdir(parents=True, exist_ok=True)
    export, done = None, None
    for number, (name, words) in enumerate(stages.items(), 1):
        first = [key.removeprefix(f"chain.{name}.") for key in swept]
        if swept and number > 1:  # what an earlier stage varies
            first.append("init_from")
        stage = config.settings(words, swept=first, init_from=export)
        runs[name] = os.path.relpath(config.run_folder(stage), folder)
        run_folder.write_json(folder / run_folder.CHAIN, runs)
        print(f"\n{name}, stage {number} of {len(stages)} of {folder}", flush=True)
        done = run_stage(stage, words)
        runs[name] = os.path.relpath(done.folder, folder)  # another one than thought, with resume=none
        run_folder.write_json(folder / run_folder.CHAIN, runs)
        if done.exit_code != faults.EXIT_FINISHED:
            break
        export = str(Path(done.folder) / "export")
    return done
