"""The parent of a run: makes the folder, writes the resolved config, starts the workers and waits for them.

It never imports torch. The config is composed and resolved once, here; workers read nothing but `resolved.yaml`.
Where somebody else has started the processes (torchrun, srun, …), rank 0 is the parent and a worker at once.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from vireo import (
    chains,
    checkpoint,
    config,
    devices,
    faults,
    global_batch,
    orphans,
    processes,
    ranks,
    run_folder,
    submitted,
    sweeps,
)
from vireo.errors import UserError
from vireo.side_by_side import Pending, SideBySide

PROBE = 64 * 2**10  # bytes: what a run writes before its processes start takes less


class Job(NamedTuple):
    """How one run ended: what was asked, its folder, the exit code, the best validation figure, what went wrong."""

    overrides: list[str]
    folder: Path | None
    exit_code: int
    best: float | None = None
    message: str = ""


class SweepFolder(Callback):
    """Hydra's callback that tells `main` where a sweep lies, whatever its launcher."""

    last: Path | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        others = ranks.started()
        try:
            if others is not None:
                ranks.refuse_sweeps(others, config.hydra.overrides.task, in_a_file=True)
            sweep: Any = OmegaConf.to_container(config.hydra.sweep, resolve=False)
            sweeps.check_folders(sweep["subdir"])
            submitted.require_queue(config.launcher.where)
        except UserError as mistake:
            print(mistake, file=sys.stderr)
            raise SystemExit(faults.EXIT_MISTAKE) from None  # other exceptions Hydra only warns of
        SweepFolder.last = Path(config.hydra.sweep.dir)
        sweeps.fix(SweepFolder.last, _code(config.hydra))
        if config.launcher.where != "local":
            print(f"what the jobs print is in {SweepFolder.last / '.submitit'}", flush=True)
            submitted.wait_for_every_job(SweepFolder.last, config.validation.higher_is_better)


def main(words: Sequence[str]) -> int:
    """Compose what the command line says (once, or once for each job of a sweep), validate it, and run it.

    Returns the worst exit code. Raises UserError for words that Hydra cannot compose.
    """
    world = ranks.started()
    if world is None:
        return compose_and_run(words)
    orphans.die_with_parent(os.getppid())
    if world.rank > 0:
        return ranks.follow()
    code = faults.EXIT_MISTAKE
    try:
        ranks.refuse_sweeps(world, words)
        os.environ["VIDEO_TRAIN_PROCESSES"] = str(world.size)  # whatever is the default of this machine
        code = compose_and_run(words)
    finally:
        ranks.dismiss(world, code)
    return code


def compose_and_run(words: Sequence[str]) -> int:
    """What `main` does in the one process that reads the command line."""
    config.register()
    config.require_sweeper(words)
    submitted.check(words)
    SweepFolder.last, codes, jobs = None, [], SideBySide()

    @hydra.main(version_base="1.3", config_path=str(config.conf_dir()), config_name="config")
    def task(composed: DictConfig) -> Pending | float:
        if submitted.node() > 0:
            submitted.follow()
            return math.nan  # the first machine's figure is the job's
        about = HydraConfig.get()
        if about.mode == RunMode.MULTIRUN and about.launcher._target_.endswith(".BasicLauncher"):
            words_of_job, folder, asked = list(about.overrides.task), Path(about.runtime.output_dir), composed.launcher
            return jobs.start(lambda: job(composed, words).exit_code, folder, words_of_job, asked.jobs, asked.processes)
        with submitted.first_machine(), submitted.turn(composed.launcher.jobs, composed.launcher.processes):
            one = job(composed, words)
        codes.append(one.exit_code)
        return sweeps.objective(one.best, composed.validation.higher_is_better)

    try:
        with config.explain_mistakes(words):
            task()
    except KeyboardInterrupt:
        told = submitted.left(SweepFolder.last) if SweepFolder.last else ""
        if not told:
            raise
        print(told, file=sys.stderr)
        codes.append(faults.EXIT_STOPPED)
    except faults.Stopped as stopped:  # a search ends with the job that was stopped
        print(stopped, file=sys.stderr)
    except Exception as error:
        if not type(error).__module__.startswith("submitit."):
            raise
        why = "" if type(error).__name__ == "FailedJobError" else f" ({error})"  # submitit has printed what sbatch says
        print(f"sbatch has refused, so no job was queued by it{why}", file=sys.stderr)
        codes.append(faults.EXIT_FAULT)
    finally:
        jobs.close()
    if SweepFolder.last is not None and (sweeps.notes(SweepFolder.last) or not codes):
        print(sweeps.show(SweepFolder.last))
        return max(sweeps.exit_code(SweepFolder.last), *codes, faults.EXIT_FINISHED)
    return max(codes, default=faults.EXIT_FINISHED)  # no job: --cfg, --help


def train(*overrides: str) -> Job:
    """Train from a notebook or a program: `launch.train("experiment=taehv", "launcher.processes=2")`.

    The processes are new ones, so the calling one may have used a GPU. Call it from the main thread: it passes Ctrl-C
    and other signals on. Raises UserError with all mistakes in the words.
    """
    if hydras := [word for word in overrides if re.match(r"[+~]*hydra[./]", word)]:
        raise UserError(f"{hydras[0]} is for the command line: python train.py …")
    settings = config.settings(overrides)
    if settings["launcher"]["where"] != "local":
        raise UserError(f"launcher={settings['launcher']['where']} is for the command line: python train.py …")
    return _run_or_chain(settings, overrides)


def job(composed: DictConfig, words: Sequence[str] = ()) -> Job:
    """Validate, resolve and run one composed config. A user's mistake is part of the answer, not an exception.

    words: the command line, whose swept keys come first in the run's name. A job of a sweep leaves a note of its end.
    """
    about = HydraConfig.get()
    overrides, folder, swept = list(about.overrides.task), None, []
    if about.mode == RunMode.MULTIRUN:
        folder, swept = Path(about.runtime.output_dir), [*config.swept(words), *(about.sweeper.get("params") or ())]
        sweeps.begin(folder, overrides)
        sweeps.check(folder, _code(about))
    try:
        settings = config.settled(composed, swept=swept)
        if folder is not None:
            judged = {key: settings["validation"][key] for key in ("metric", "higher_is_better")}
            sweeps.note(folder, run=str(config.run_folder(settings)), **judged)
        done = _run_or_chain(settings, overrides, swept)
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        done = Job(overrides, None, faults.EXIT_MISTAKE, message=str(mistake))
    if folder is not None:
        place = {"run": str(done.folder)} if done.folder else {}
        sweeps.note(folder, exit_code=done.exit_code, message=done.message, best=done.best, **place)
    return done


def _code(about: Any) -> dict[str, str]:
    """Hashes of vireo's sources and of the YAML files from which configs are composed. about: Hydra's own config."""
    folders = [Path(source.path) for source in about.runtime.config_sources if source.schema == "file"]
    return {"sources": config.source_hash(), "YAML files": config.files_hash(folders, "*.yaml")}


def _run_or_chain(settings: dict[str, Any], overrides: Sequence[str], swept: Sequence[str] = ()) -> Job:
    # All processes of this command count max_hours from here: those of a chain's later stages, and those started again.
    os.environ[processes.STARTED] = str(time.time())
    if not settings["chain"]:
        return run(settings, overrides)
    last: Job = chains.run(settings, overrides, swept, run, lambda stage: _choose_folder(stage)[0])
    return last._replace(overrides=list(overrides))


def run(settings: dict[str, Any], overrides: Sequence[str]) -> Job:
    """Train one resolved config in its own folder, from its newest checkpoint or the one that `resume` names.

    Whoever starts it again (vireo, Slurm, torchrun) goes on from the newest one, whatever `resume` said at first. A
    finished run says so and does nothing. Raises UserError for a folder or a checkpoint that cannot be used.
    """
    others = ranks.started()
    if others is not None:
        ranks.check_size(others, settings["launcher"]["processes"])
        if settings["preempt_at"]:
            raise UserError(f"preempt_at starts processes anew, and {others.starter} owns them: use python train.py …")
    folder, again = _choose_folder(settings)
    named = None if again or settings["resume"] in ("auto", "none") else Path(settings["resume"])
    if named and not named.is_dir():
        raise UserError(f"resume is '{named}'; expected auto, none, or the folder of a checkpoint (there is none)")
    _make(folder)
    settings = {**settings, "resume": "auto"}  # what restarts and workers see
    before = _config_before(folder)
    if before:
        _refuse_other_config(folder, before, settings)
    done = None if named else run_folder.finished(folder)
    if done and not _longer(settings, done):
        print(
            f"{folder} is finished (step {done['step']}). To go on, give more steps with run={folder.name}; "
            "resume=none starts afresh beside it"
        )
        return Job(list(overrides), folder, faults.EXIT_FINISHED, (done["best"] or {}).get("value"))
    _refuse_unequal_shares(named or folder, settings)
    with run_folder.lock(folder) as held:
        with run_folder.needed(folder):
            if named:
                checkpoint.adopt(folder, named)
            if before:
                _tell_changes(folder, before, settings)
            _forget_room(folder, settings)
            config.save_resolved(settings, folder / "resolved.yaml")
            run_folder.write_json(folder / "overrides.json", list(overrides))
            run_folder.write_json(folder / "environment.json", run_folder.environment() | {"job": ranks.job()})
            (folder / "finished").unlink(missing_ok=True)
        print(config.banner(settings, folder), flush=True)
        if settings["size"] == "mini":
            from vireo.mini import world as mini_world  # brings numpy, which --help and --cfg can do without

            mini_world.ensure()
        data = run_folder.data_files(settings["data"])
        with run_folder.needed(folder):
            run_folder.write_json(folder / "data.json", data)
        code = start(folder / "resolved.yaml", settings["launcher"], held)
        if code == faults.EXIT_STOPPED and checkpoint.steps(folder)[-1:] == [settings["preempt_at"]]:
            print(f"starting again from step {settings['preempt_at']} (preempt_at)", flush=True)
            code = start(folder / "resolved.yaml", settings["launcher"], held)
    done = run_folder.finished(folder)
    return Job(list(overrides), folder, code, (done["best"] or {}).get("value") if done else None)


def _choose_folder(settings: dict[str, Any]) -> tuple[Path, bool]:
    """The run's folder, and whether this is a job of Slurm or torchrun that goes on with what it has begun there."""
    folder = config.run_folder(settings)
    if settings["resume"] != "none":
        return folder, _begun_by_this_job(folder)
    numbered = [folder, *(folder.with_name(f"{folder.name}-{number}") for number in range(2, 10_000))]
    there = list(takewhile(Path.exists, numbered))
    own = [path for path in there if _begun_by_this_job(path)]
    return (own[-1], True) if own else (numbered[len(there)], False)


def _begun_by_this_job(folder: Path) -> bool:
    about = folder / "environment.json"
    return ranks.restarted() and about.exists() and json.loads(about.read_text()).get("job") == ranks.job()


def _make(folder: Path) -> None:
    """The folder, in which a little can be written: on a full disk, or over a quota, an empty file still can."""
    with run_folder.needed(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        try:
            with open(probe, "wb") as file:
                file.write(bytes(PROBE))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)


def _longer(settings: dict[str, Any], done: dict[str, Any]) -> bool:
    return bool(settings["epochs"]) or settings["steps"] > done["step"]


def _config_before(folder: Path) -> dict[str, Any] | None:
    """What a folder that goes on was run with last."""
    path = folder / "resolved.yaml"
    return config.load_resolved(path) if path.exists() and (folder / "checkpoints").is_dir() else None


def _refuse_other_config(folder: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    """A folder goes on only with the config it began with; length, logging and the like may differ."""
    differences = config.differences(before, settings, settings["allow_changes"] or [])
    if differences:
        raise UserError(
            f"{folder} was trained with another config:\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nGive this one another name (run=…), or allow what may change (allow_changes=[lr,…])"
        )


def _refuse_unequal_shares(place: Path, settings: dict[str, Any]) -> None:
    """Before anything of a run that goes on is changed. place: its folder, or that of a checkpoint."""
    there = checkpoint.steps(place)
    path = (checkpoint.folder_of(place, there[-1]) if there else place) / "manifest.json"
    try:
        wanted = json.loads(path.read_text())["state"]["global_batch"]
    except (OSError, ValueError, LookupError, TypeError):
        return  # none yet, or damaged: workers look for one that is good
    others = ranks.started()
    here = number_of_processes(settings["launcher"]["processes"]) * submitted.nodes()
    global_batch.accumulation(wanted, settings["batch_size"], others.size if others else here)


def _tell_changes(folder: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    """What is another value than when the folder was run last: one line on the console and in its log."""
    changes = config.changes(before, settings)
    if changes:
        line = f"changed: {'; '.join(changes)}"
        print(line, flush=True)
        with run_folder.dispensable("that line"), run_folder.log_file(folder, 0).open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} INFO {line}\n")


def _forget_room(folder: Path, settings: dict[str, Any]) -> None:
    """How many samples fit is known for one config only; any change may be the one that makes room."""
    room, path = run_folder.room_file(folder), folder / "resolved.yaml"
    if room.exists() and not (path.exists() and path.read_text(encoding="utf-8") == config.to_text(settings)):
        room.unlink()


def start(resolved: Path, launcher: dict[str, Any], held: int) -> int:
    """Run the workers of one resolved config to their end; returns their exit code.

    After a fault they are started again from the last checkpoint, `launcher.restarts` times; not after a mistake of
    the user's or a requested stop. Memory that ran out does not count, as long as smaller pieces are left to try.
    held: file descriptor of the run's lock, which the children inherit, so the folder stays locked while one lives.
    """
    if ranks.started() is not None:
        return ranks.work(resolved)
    count = number_of_processes(launcher["processes"])
    if (gpus := len(devices.visible_gpus())) > count:
        print(
            f"{count} of {gpus} visible GPUs will be used. launcher.processes=auto uses all, with batch_size each: "
            f"{gpus / count:g} times the global batch",
            flush=True,
        )
    room = run_folder.room_file(resolved.parent)
    fit, restarts = faults.rows_that_fit(room), 0
    while True:
        code = _start_once(resolved, count, held)
        if code in (faults.EXIT_FINISHED, faults.EXIT_MISTAKE, faults.EXIT_STOPPED, faults.EXIT_INTERRUPTED):
            return code
        before, fit = fit, faults.rows_that_fit(room)
        if fit != before:
            why = f"with {fit} samples at a time, since memory ran out with more"
        elif restarts < launcher["restarts"]:
            restarts += 1
            why = f"{restarts} of {launcher['restarts']}"
        else:
            return code
        with run_folder.dispensable("why it starts again"):  # the console may be a file on the disk that is full
            print(f"starting again from the last checkpoint ({why})", flush=True)


def _start_once(resolved: Path, count: int, held: int) -> int:
    """On this machine, and on the others of a job that has several."""
    share, resend = submitted.share(resolved, count), submitted.inside()
    return processes.run(resolved, count, share, held, resend=resend)


def number_of_processes(asked: int | str) -> int:
    """`auto` is one for each visible GPU, at least one. Raises UserError for more processes than GPUs."""
    if str(asked) == "1":
        return 1
    gpus = len(devices.visible_gpus())
    if asked == "auto":
        return max(1, gpus)
    if gpus and int(asked) > gpus:
        raise UserError(f"launcher.processes={asked}, but {gpus} GPUs are visible; use at most that many, or auto")
    return int(asked)
