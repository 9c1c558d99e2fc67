"""Jobs of a sweep on this machine: each in a process of its own, `launcher.jobs` of them side by side.

The parent only composes. It has not imported torch and runs no thread, so a job is forked from it in milliseconds, and
what a job changes (environment, signal handlers, output) ends with its process.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from vireo import devices, faults, orphans, ranks, sweeps

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Started(NamedTuple):
    process: BaseProcess
    folder: Path
    slot: int  # its share of the machine
    alone: bool
    began: float


class Pending:
    """The result of a job that is going on, for sweepers that ask for a number: float() waits for it."""

    def __init__(self, jobs: "SideBySide", folder: Path) -> None:
        self.jobs, self.folder = jobs, folder

    def __float__(self) -> float:
        """What a search minimises or maximises. Raises faults.Stopped when the sweep was stopped."""
        self.jobs.wait(self.folder)
        if self.jobs.stopped:
            raise faults.Stopped("the sweep was stopped")
        one = sweeps.read(self.folder)
        return sweeps.objective(one.get("best"), one.get("higher_is_better", True))


class SideBySide:
    """Starts jobs in turn. A signal to stop is passed on to those that run, and no further one is started.

    A Ctrl-C is not passed on: it reaches the jobs from the terminal itself.
    """

    def __init__(self) -> None:
        self.running: list[Started] = []
        self.stopped = False
        self.handlers: dict[signal.Signals, signal._HANDLER] = {}

    def start(
        self, work: Callable[[], int], folder: Path, words: list[str], jobs: int, processes: int | str
    ) -> Pending:
        """Call `work` in a process of its own as soon as fewer than `jobs` run; it returns an exit code.

        folder: of the job, named by its number; gets its note and, where several run, what they print. processes:
        that the job will start. Raises UserError for more jobs than GPUs.
        """
        if not self.handlers:
            self.handlers = {number: signal.signal(number, self._stop) for number in SIGNALS}
        while len(self.running) >= jobs:
            self._wait_for_one()
        sweeps.begin(folder, words)
        if self.stopped:
            sweeps.note(folder, exit_code=faults.EXIT_STOPPED, message="not started")
            return Pending(self, folder)
        slot = min(set(range(jobs)) - {one.slot for one in self.running})
        environment = devices.share(slot, jobs, processes)
        if jobs > 1:
            print(f"job {folder.name} begins; what it prints: {folder / 'console.log'}", flush=True)
        sys.stdout.flush()
        sys.stderr.flush()
        fork = multiprocessing.get_context("fork")
        console = folder / "console.log" if jobs > 1 else None
        process = fork.Process(target=_work, args=(work, os.getpid(), environment, console))
        process.start()
        self.running.append(Started(process, folder, slot, jobs == 1, time.monotonic()))
        return Pending(self, folder)

    def wait(self, folder: Path | None = None) -> None:
        """Until the job of this folder has ended, or every job."""
        while any(folder in (None, one.folder) for one in self.running):
            self._wait_for_one()

    def close(self) -> None:
        """Wait for all jobs; signals mean again what they meant before."""
        self.wait()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _wait_for_one(self) -> None:
        ended = wait([one.process.sentinel for one in self.running])
        for one in [one for one in self.running if one.process.sentinel in ended]:
            one.process.join()
            self.running.remove(one)
            code = one.process.exitcode or 0
            code = code if code >= 0 else 128 - code
            if "exit_code" not in sweeps.read(one.folder):
                where = "" if one.alone else f"; what it printed: {one.folder / 'console.log'}"
                sweeps.note(one.folder, exit_code=code or faults.EXIT_FAULT, message=f"its process died{where}")
            self.stopped |= code in (faults.EXIT_STOPPED, faults.EXIT_INTERRUPTED)
            if not one.alone:
                state = sweeps.ENDED.get(code, f"failed ({code})")
                print(f"job {one.folder.name} {state} after {time.monotonic() - one.began:.0f} s", flush=True)

    def _stop(self, number: int, frame: object) -> None:
        self.stopped = True
        for one in self.running:
            if number != signal.SIGINT and one.process.pid and one.process.exitcode is None:
                os.kill(one.process.pid, number)


def _work(work: Callable[[], int], parent: int, environment: dict[str, str], console: Path | None) -> None:
    """In the job's process."""
    for number in SIGNALS:  # the parent's handler would pass signals on to other jobs
        signal.signal(number, lambda number, frame: os._exit(faults.EXIT_STOPPED))
    orphans.die_with_parent(parent)
    ranks.leave()
    os.environ.update(environment)
    if console is not None:
        output = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
    sys.exit(work())
