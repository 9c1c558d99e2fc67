"""A chain: stages that are ordinary runs, one after the other, each from the export of the one before.

The chain's own folder, `<outputs>/<experiment>/<run>/chain.json`, only says which runs these are.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vireo import checkpoint, config, faults, ranks, run_folder
from vireo.errors import UserError


def run(
    settings: dict[str, Any],
    overrides: Sequence[str],
    swept: Sequence[str],
    run_stage: Callable[[dict[str, Any], Sequence[str]], Any],
    choose_folder: Callable[[dict[str, Any]], Path],
) -> Any:
    """Run the stages until one does not end; returns what `run_stage` said of the last that began.

    settings: the chain's, validated with all its stages. overrides: its words. swept: keys that stand first in the
    runs' names. run_stage: called with a stage's settings and words; its answer has `exit_code`. choose_folder: where a
    run with these settings goes, another place each time with resume=none. A stage that is finished does nothing.
    Raises UserError for what a chain cannot do.
    """
    started = ranks.started()
    if started is not None:
        raise UserError(f"a chain starts processes anew for each stage, and {started.starter} owns them: use "
                        "python train.py … launcher.processes=N")  # fmt: skip
    if settings["resume"] not in ("auto", "none"):
        raise UserError(f"resume={settings['resume']} is one stage's checkpoint: say chain.<stage>.resume=…")
    folder, stages = config.run_folder(settings), config.stages(settings["chain"], overrides)
    before, planned, export = run_folder.stages(folder), dict[str, dict[str, Any]](), None
    for name, words in stages.items():
        first = [key.removeprefix(f"chain.{name}.") for key in swept]
        if swept and planned:  # what an earlier stage varies
            first.append("init_from")
        stage = _where_it_was(config.settings(words, swept=first, init_from=export), before.get(name))
        place = choose_folder(stage)
        planned[name] = {**stage, "run": place.name, "resume": "auto" if stage["resume"] == "none" else stage["resume"]}
        export = str(place / "export")
    _refuse_another_beginning(planned)
    runs = {name: os.path.relpath(config.run_folder(stage), folder) for name, stage in planned.items()}
    with run_folder.needed(folder):
        folder.mkdir(parents=True, exist_ok=True)
        run_folder.write_json(folder / run_folder.CHAIN, runs)
    done = None
    for number, (name, words) in enumerate(stages.items(), 1):
        print(f"\n{name}, stage {number} of {len(stages)} of {folder}", flush=True)
        done = run_stage(planned[name], words)
        if done.exit_code != faults.EXIT_FINISHED:
            break
    return done


def _where_it_was(stage: dict[str, Any], before: Path | None) -> dict[str, Any]:
    """The settings, with the run that the chain had for this stage, if resume=none once put it beside the first one."""
    first = config.run_folder(stage)
    if stage["resume"] != "auto" or before is None or before.resolve().parent != first.resolve().parent:
        return stage
    return {**stage, "run": before.name} if re.fullmatch(rf"{re.escape(first.name)}-\d+", before.name) else stage


def _refuse_another_beginning(planned: Mapping[str, dict[str, Any]]) -> None:
    """Raise UserError where a stage would train on while a later one has begun from its export as it was."""
    names = list(planned)
    for place, name in enumerate(names):
        begun = [later for later in names[place + 1 :] if checkpoint.steps(config.run_folder(planned[later]))]
        if begun and _trains(planned[name]):
            anew = " ".join(f"chain.{later}.resume=none" for later in begun)
            raise UserError(
                f"{name} has still to train in {config.run_folder(planned[name])}, but {begun[0]} has begun from an "
                f"earlier export of it, in {config.run_folder(planned[begun[0]])}. To train {' and '.join(begun)} anew "
                f"from the new one, say {anew}, once; to lengthen {begun[-1]} alone, chain.{begun[-1]}.steps=…"
            )


def _trains(stage: dict[str, Any]) -> bool:
    """Whether a run with these settings has steps to do."""
    folder = config.run_folder(stage)
    done = run_folder.finished(folder)
    if done is None or stage["resume"] != "auto":
        return True
    if not stage["epochs"]:
        return bool(stage["steps"] > done["step"])
    before = config.load_resolved(folder / "resolved.yaml")["epochs"]  # how many steps they are, only the data knows
    return before is None or stage["epochs"] > before
