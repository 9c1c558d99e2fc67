"""A step that takes far longer than usual: where does each process stand?

One process that waits for ever (a deadlock, a dead disk, a kernel that never ends) makes all others wait for it, until
a collective's timeout ends the run with no word about the cause. So each process writes the stacks of all its threads
into `stacks/rank_<n>.txt` before that. Python's faulthandler does it from a thread of its own that needs no lock, so it
works while everything else stands still. What no collective's timeout ends, since nobody else waits or nobody is in
one, a timer of the system does: its signal ends the process whatever it is doing.
"""

import faulthandler
import logging
import os
import signal
import statistics
import time
from collections import deque
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)

FACTOR = 20.0  # times the median of recent steps
AT_LEAST = 30.0  # seconds: a slow disk is no hang
SHARE = 0.7  # of the collectives' timeout, after which nobody can be asked any more
LAST = 2.0  # times that timeout: whatever waits in a collective has given up by then, and said why
RECENT = 50  # steps
REARM = 1.0  # seconds; arming starts a thread, which takes 0.1 ms
FOLDER = "stacks"  # in a run's folder

# A forked child would have faulthandler's lock but not its thread, and wait for it for ever. The next step arms anew.
os.register_at_fork(before=faulthandler.cancel_dump_traceback_later)


def file_of(run_folder: Path, rank: int) -> Path:
    return run_folder / FOLDER / f"rank_{rank}.txt"


def written_since(run_folder: Path, when: float) -> list[Path]:
    """Files with stacks that processes have written since a time, of a process that hangs for ever too."""
    files = [path for path in (run_folder / FOLDER).glob("rank_*.txt") if path.stat().st_mtime >= when]
    return sorted(path for path in files if path.stat().st_size)


class Watchdog:
    """Watches one process's steps: `begin_step` at the start of each, `between_steps` before what is none, `close`.

    A process in which neither is called for LAST times the timeout is ended by SIGALRM, which nothing here handles.

    file: where stacks go, behind those of earlier attempts; gone at the end if there are none. timeout: seconds after
    which a collective gives up (launcher.timeout). at_least: seconds below which no step counts as hanging.
    """

    def __init__(self, file: Path, timeout: float, at_least: float = AT_LEAST) -> None:
        self.file, self.most, self.last, self.at_least = file, SHARE * timeout, LAST * timeout, at_least
        self.seconds: deque[float] = deque(maxlen=RECENT)
        self.began: float | None = None
        self.armed: float | None = None
        self.stream: IO[str] | None = None
        self.before = 0  # bytes of earlier attempts

    def close(self) -> None:
        """Nothing is watched any more; if stacks were written, say where."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        if self.stream is None:
            return
        self.stream.close()
        size = self.file.stat().st_size
        if size > self.before:
            log.error("a step took far longer than usual; where this process stood then: %s", self.file)
        elif not size:
            self.file.unlink()

    def begin_step(self) -> None:
        """The step before, if there was one, is over; the next one has its time from now on."""
        now = time.monotonic()
        if self.began is not None:
            self.seconds.append(now - self.began)
        self.began = now
        if self.armed is None or now - self.armed > REARM:
            self.armed = now
            self._arm(self.patience())

    def between_steps(self) -> None:
        """What begins is not part of a step and may take longer: a clip to validate, a checkpoint, an export."""
        self.began = self.armed = None
        self._arm(self.most)

    def _arm(self, seconds: float) -> None:
        if self.stream is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.stream = open(self.file, "a")  # noqa: SIM115 - faulthandler needs its descriptor until the end
            self.before = self.file.stat().st_size
        faulthandler.dump_traceback_later(seconds, file=self.stream)
        signal.setitimer(signal.ITIMER_REAL, self.last)

    def patience(self) -> float:
        """Seconds that a step may take before stacks are written."""
        if len(self.seconds) < 3:  # the first ones compile, allocate and read what nothing has read before
            return self.most
        return min(self.most, max(self.at_least, FACTOR * statistics.median(self.seconds)))
