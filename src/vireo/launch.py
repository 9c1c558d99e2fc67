"""The parent of a run: makes the folder, writes the resolved config, starts the workers and waits for them.

It never imports torch. The config is composed and resolved once, here; workers read nothing but `resolved.yaml`.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from vireo import checkpoint, config, faults, report, run_folder
from vireo.errors import UserError
from vireo.tracking import read_metrics

EXIT_FILE = ".exit"  # in the run's folder, beside resolved.yaml


class Job(NamedTuple):
    """How one run ended: what was asked, its folder, the exit code, the best validation figure, what went wrong."""

    overrides: list[str]
    folder: Path | None
    exit_code: int
    best: float | None = None
    message: str = ""


def main(words: Sequence[str]) -> int:
    """Compose what the command line says (once, or once for each job of a sweep), validate it, and run it.

    Returns the worst exit code. Raises UserError for words that Hydra cannot compose.
    """
    config.register()
    jobs: list[Job] = []
    sweep: list[Path | None] = [None]

    @hydra.main(version_base="1.3", config_path=str(config.conf_dir()), config_name="config")
    def task(composed: DictConfig) -> float | None:
        stopped = any(one.exit_code == faults.EXIT_STOPPED for one in jobs)
        sweep[0] = sweep_folder()
        jobs.append(job(composed, stopped))
        return jobs[-1].best

    with config.explain_mistakes(words):
        task()
    return conclude(jobs, sweep[0])


def job(composed: DictConfig, stopped: bool = False) -> Job:
    """Validate, resolve and run one composed config. A user's mistake is part of the answer, not an exception.

    stopped: an earlier job of the sweep was stopped on request, so this one is not started.
    """
    overrides = list(HydraConfig.get().overrides.task)
    if stopped:
        return Job(overrides, None, faults.EXIT_STOPPED, message="not started: the sweep was stopped")
    try:
        return run(config.settled(composed), overrides)
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        return Job(overrides, None, faults.EXIT_MISTAKE, message=str(mistake))


def sweep_folder() -> Path | None:
    """Where the running Hydra app keeps its sweep; None for a single run."""
    settings = HydraConfig.get()
    return Path(settings.sweep.dir) if settings.mode == RunMode.MULTIRUN else None


def conclude(jobs: Sequence[Job], folder: Path | None) -> int:
    """The worst exit code; of a sweep also its table, as text and CSV, and all curves in one picture."""
    if folder is not None:
        common = set.intersection(*(set(one.overrides) for one in jobs)) if len(jobs) > 1 else set()
        asked = [" ".join(word for word in one.overrides if word not in common) for one in jobs]
        rows = [_row(number, one, words) for number, (one, words) in enumerate(zip(jobs, asked, strict=True))]
        print(f"\n{report.table(rows)}\n\ntable   {report.write_csv(rows, folder / 'sweep.csv')}")
        runs = {w: read_metrics(one.folder / "metrics.jsonl") for one, w in zip(jobs, asked, strict=True) if one.folder}
        if runs:
            print(f"curves  {report.draw(runs, folder / 'curves.png')}")
    return max((one.exit_code for one in jobs), default=faults.EXIT_FINISHED)  # no job: --cfg, --help


def _row(number: int, one: Job, words: str) -> dict[str, Any]:
    states = {faults.EXIT_FINISHED: "finished", faults.EXIT_STOPPED: "stopped", faults.EXIT_MISTAKE: "mistake"}
    about = report.state_of(one.folder) if one.folder else {}
    return {
        "job": number,
        "overrides": words,
        "state": states.get(one.exit_code, f"failed ({one.exit_code})"),
        "best": one.best,
        "loss": about.get("loss"),
        "steps": about.get("steps"),
        "seconds_per_step": about.get("seconds_per_step"),
        "run": str(one.folder) if one.folder else one.message.partition("\n")[0],
    }


def run(settings: dict[str, Any], overrides: Sequence[str]) -> Job:
    """Train one resolved config in its own folder, from its newest checkpoint.

    A finished run says so and does nothing. Raises UserError for a folder that cannot be used.
    """
    folder = _make_folder(settings)
    _refuse_other_config(folder, settings)
    done = run_folder.finished(folder) if settings["resume"] == "auto" else None
    if done and not _longer(settings, done):
        print(
            f"{folder} is finished (step {done['step']}). To go on, give more steps with run={folder.name}; "
            "resume=none starts afresh beside it"
        )
        return Job(list(overrides), folder, faults.EXIT_FINISHED, (done["best"] or {}).get("value"))
    with run_folder.lock(folder) as held:
        config.save_resolved(settings, folder / "resolved.yaml")
        run_folder.write_json(folder / "overrides.json", list(overrides))
        run_folder.write_json(folder / "environment.json", run_folder.environment())
        (folder / "finished").unlink(missing_ok=True)
        print(config.banner(settings, folder), flush=True)
        if settings["size"] == "mini":
            from vireo.mini import world  # brings numpy, which --help and --cfg can do without

            world.ensure()
        code = start(folder / "resolved.yaml", settings["launcher"], held)
        if code == faults.EXIT_STOPPED and checkpoint.steps(folder)[-1:] == [settings["preempt_at"]]:
            print(f"starting again from step {settings['preempt_at']} (preempt_at)", flush=True)
            code = start(folder / "resolved.yaml", settings["launcher"], held)
    done = run_folder.finished(folder)
    return Job(list(overrides), folder, code, (done["best"] or {}).get("value") if done else None)


def _make_folder(settings: dict[str, Any]) -> Path:
    folder = config.run_folder(settings)
    if settings["resume"] == "none":
        beside = (folder.with_name(f"{folder.name}-{number}") for number in range(2, 10_000))
        folder = folder if not folder.exists() else next(path for path in beside if not path.exists())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); choose another place with paths.outputs=…"
        ) from None
    return folder


def _longer(settings: dict[str, Any], done: dict[str, Any]) -> bool:
    return bool(settings["epochs"]) or settings["steps"] > done["step"]


def _refuse_other_config(folder: Path, settings: dict[str, Any]) -> None:
    """A folder goes on only with the config it began with; length, logging and the like may differ."""
    path = folder / "resolved.yaml"
    if not path.exists() or not (folder / "checkpoints").is_dir():
        return
    differences = config.differences(config.load_resolved(path), settings, settings["allow_changes"] or [])
    if differences:
        raise UserError(
            f"{folder} was trained with another config:\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nGive this one another name (run=…), or allow what may change (allow_changes=[lr,…])"
        )


def start(resolved: Path, launcher: dict[str, Any], held: int) -> int:
    """Run the workers of one resolved config to their end; returns their exit code.

    After a fault they are started again from the last checkpoint, `launcher.restarts` times; not after a mistake of
    the user's or a requested stop. held: file descriptor of the run's lock, which the children inherit, so the folder
    stays locked while one lives.
    """
    for attempt in range(launcher["restarts"] + 1):
        if attempt:
            print(f"starting again from the last checkpoint ({attempt} of {launcher['restarts']})", flush=True)
        code = _start_once(resolved, number_of_processes(launcher["processes"]), held)
        if code in (faults.EXIT_FINISHED, faults.EXIT_MISTAKE, faults.EXIT_STOPPED):
            break
    return code


def _start_once(resolved: Path, processes: int, held: int) -> int:
    command = [sys.executable, "-u", "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--max-restarts=0", "-m"]
    command += ["vireo.worker", str(resolved)]
    verdict = resolved.with_name(EXIT_FILE)
    verdict.unlink(missing_ok=True)
    # Threads that wait by spinning take the core from the loader's workers where there are few.
    environment = {
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "HYDRA_FULL_ERROR": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    with subprocess.Popen(command, env=environment, pass_fds=(held,)) as child, _forward_signals(child):
        code = child.wait()
    # torch's launcher knows only success and failure; the main worker writes down what it was.
    if processes > 1 and verdict.exists():
        code = int(verdict.read_text())
    return code if code >= 0 else 128 - code


def number_of_processes(asked: int | str) -> int:
    """`auto` is one for each visible GPU, at least one. Raises UserError for more processes than GPUs."""
    gpus = _visible_gpus()
    if asked == "auto":
        return max(1, gpus)
    if gpus and int(asked) > gpus:
        raise UserError(f"launcher.processes={asked}, but {gpus} GPUs are visible; use at most that many, or auto")
    return int(asked)


def _visible_gpus() -> int:
    """GPUs that a worker would see, without importing torch here."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() and part.strip() != "-1"])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


@contextmanager
def _forward_signals(child: subprocess.Popen) -> Iterator[None]:
    """Pass stop signals on to the workers. A Ctrl-C reaches them from the terminal itself."""

    def forward(number: int, frame: object) -> None:
        if number != signal.SIGINT:
            child.send_signal(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
