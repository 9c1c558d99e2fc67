"""What can go wrong during a run, decided by all ranks together."""

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)

# Flags of the vote that every rank casts once a micro-step, before the backward pass.
STOP = 1  # a signal asked to save and stop at the next step boundary
BAD_DATA = 2  # the rank cannot go on with its data

EXIT_FINISHED = 0
EXIT_FAULT = 1
EXIT_MISTAKE = 2  # a UserError
EXIT_STOPPED = 75  # stopped on request, resumable with the same command (EX_TEMPFAIL)


class StopRequest:
    """Whether a signal has asked the run to save and stop. The handler only sets a flag.

    A second Ctrl-C exits at once. Other signals may come several times (from the batch system, from torch's launcher,
    from the parent) and mean the same each time.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.asked_at = 0.0

    def __bool__(self) -> bool:
        return self.signal is not None

    def ask(self) -> None:
        """Ask for a stop without a signal."""
        self._handle(signal.SIGTERM, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # One Ctrl-C can arrive twice at once: from the terminal and passed on by torch's launcher.
        if self.signal is not None and number == signal.SIGINT and time.monotonic() - self.asked_at > 1:
            os._exit(EXIT_STOPPED)
        if self.signal is None:
            self.signal, self.asked_at = number, time.monotonic()


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 into a request to stop; the old handlers come back afterwards."""
    request = StopRequest()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    previous = {number: signal.signal(number, request._handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def die_with_parent() -> None:
    """Ask Linux for a SIGTERM when the parent is killed, so that no orphan goes on writing into the run's folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class Stopped(Exception):
    """A signal asked to stop before the loop, which would have saved; the message says how to go on."""


class TooManyFaults(RuntimeError):
    """A fault came so often that going on would waste the machine; the message says which, where and since when."""


class NonFiniteSteps:
    """Counts steps whose gradient was not finite; they were turned away on the device already."""

    def __init__(self, limit: int, total: int = 0) -> None:
        self.limit = limit
        self.total = total
        self.consecutive = 0

    def see(self, step: int, finite: bool, names: list[str]) -> None:
        """Note one step. Raises TooManyFaults when `limit` steps in a row were not finite."""
        if finite:
            self.consecutive = 0
            return
        self.total += 1
        self.consecutive += 1
        log.error("step %d: the gradient is not finite, no update was made (samples: %s)", step, ", ".join(names[:8]))
        if self.consecutive >= self.limit:
            raise TooManyFaults(
                f"{self.consecutive} steps in a row had a gradient that is not finite, from step "
                f"{step - self.consecutive + 1} to {step}. The last checkpoint is from before. Look at the loss's "
                "terms in metrics.jsonl; a lower lr, precision=fp32, model.encoder.dtype=fp32 where that overflows, or "
                "other data are the usual cures (faults.max_consecutive_skips sets the limit)"
            )


class SaveFailures:
    """Counts checkpoints that could not be written; the run goes on until `limit` in a row have failed."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.consecutive = 0

    def see(self, step: int, error: str | None) -> None:
        """Note one save. Raises TooManyFaults when `limit` saves in a row have failed."""
        if error is None:
            self.consecutive = 0
            return
        self.consecutive += 1
        log.error("step %d: the checkpoint could not be saved: %s", step, error)
        if self.consecutive >= self.limit:
            raise TooManyFaults(
                f"{self.consecutive} checkpoints in a row could not be saved (last: {error}). Free some space or "
                "move outputs with paths.outputs=…; the last good checkpoint is untouched"
            )
