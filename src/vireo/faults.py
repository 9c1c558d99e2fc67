"""What can go wrong during a run, decided by all ranks together."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from vireo.run_folder import dispensable, write_json

if TYPE_CHECKING:  # the launcher's parent knows exit codes and signals, and must start without torch
    from torch import Tensor

log = logging.getLogger(__name__)

# Flags of the vote that every rank casts once a micro-step, before the backward pass.
STOP = 1  # a signal asked to save and stop at the next step boundary
BAD_DATA = 2  # the rank has found files that cannot be read, of which the others do not know
OUT_OF_MEMORY = 4  # its forward pass did not fit

EXIT_FINISHED = 0
EXIT_FAULT = 1
EXIT_MISTAKE = 2  # a UserError
EXIT_STOPPED = 75  # stopped on request, resumable with the same command (EX_TEMPFAIL)
EXIT_INTERRUPTED = 128 + signal.SIGINT  # a second Ctrl-C: nothing was saved any more

ECHO = 1.0  # seconds: one Ctrl-C can arrive twice, from the terminal and passed on by torch's launcher or the parent


class StopRequest:
    """Whether a signal has asked the run to save and stop, or its time is over. The handler only sets a flag.

    deadline: seconds since 1970 from which on a stop is asked for; None: never.
    A second Ctrl-C exits at once; a process that waits in a C library hears nothing, so its parent kills it. Other
    signals may come several times (from the batch system, from torch's launcher, from the parent) and always mean the
    same.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline = deadline
        self.signal: int | None = None
        self.asked_at = 0.0

    def __bool__(self) -> bool:
        return self.signal is not None or (self.deadline is not None and time.time() > self.deadline)

    def ask(self) -> None:
        """Ask for a stop without a signal."""
        self._handle(signal.SIGTERM, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT and time.monotonic() - self.asked_at > ECHO:
            os._exit(EXIT_INTERRUPTED)
        if self.signal is None:
            self.signal, self.asked_at = number, time.monotonic()


@contextmanager
def stop_on_signals(deadline: float | None = None) -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 into a request to stop; the old handlers come back afterwards."""
    request = StopRequest(deadline)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    previous = {number: signal.signal(number, request._handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Stopped(Exception):
    """A signal asked to stop where no step is being made; the message says how to go on if nothing is to be saved."""


class TooManyFaults(RuntimeError):
    """A fault came so often that going on would waste the machine; the message says which, where and since when."""


class Room:
    """How many samples fit into memory at once. Once it has run out, micro-batches are cut into smaller pieces.

    Every rank cuts in the same way, since all have learnt of it by the same vote. The gradient is the same sum, added
    up in another order. (A loss's own learner, as Seraena's, sees the pieces as batches of their own.)
    path: a JSON file for the number that fits, if this start has to end to find it out. rows: what an earlier start has
    written there (`rows_that_fit`), the same on every rank.
    """

    def __init__(self, path: Path, rows: int | None = None) -> None:
        self.path, self.rows = path, rows
        self.retries = 0

    def pieces(self, batch: Mapping[str, Any]) -> deque[dict[str, Any]]:
        """The micro-batch in pieces of as many samples as are known to fit; normally itself."""
        size = len(batch["position"])
        rows = self.rows or size
        return deque(_rows(batch, start, min(start + rows, size)) for start in range(0, size, rows))

    def smaller(self, step: int, pieces: Iterable[Mapping[str, Any]]) -> deque[dict[str, Any]]:
        """Pieces, of which the first did not fit, cut to half its size. Raises TooManyFaults if it is one sample."""
        first, *others = pieces
        size = len(first["position"])
        if size == 1:
            raise TooManyFaults(f"step {step}: out of memory with a single sample. {LEVERS}")
        self.rows = -(-size // 2)
        log.warning("step %d: out of memory with %d samples at once; from now on %d at a time", step, size, self.rows)
        if not self.retries:
            log.warning("the gradient stays the same, but each step takes longer. %s", LEVERS)
        self.retries += 1
        return deque(part for piece in (first, *others) for part in self.pieces(piece))

    @contextmanager
    def noted(self, size: int) -> Iterator[None]:
        """Where memory cannot run out for some without stranding the others (a backward pass, and the forward passes of
        sharded networks): then this process ends, and the next start takes pieces of half as many samples as `size`."""
        try:
            yield
        except BaseException as error:
            if is_out_of_memory(error) and size > 1:
                with dispensable("how many samples fit into memory"):
                    write_json(self.path, {"rows": -(-size // 2)})
            raise


def rows_that_fit(path: Path) -> int | None:
    """What `Room.noted` has written; None if it had no reason to."""
    return json.loads(path.read_text())["rows"] if path.exists() else None


LEVERS = (
    "What takes less memory, cheapest first: a smaller batch_size with more gradient_accumulation, precision=bf16, "
    "model.network.gradient_checkpointing=true, optimizer.moments=8bit, ema.decay=0, strategy=fsdp or zero2 on several "
    "GPUs, strategy=fsdp_offload or zero2_offload, fewer frames or pixels."
)


def _rows(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Some samples of a batch, which has a row for each in every value."""
    if start == 0 and stop == len(batch["position"]):
        return dict(batch)
    return {key: value[start:stop] for key, value in batch.items() if key != "bad"}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the GPU, or of the machine, ran out."""
    import torch

    # torch has no class of its own for the machine's memory: its message is all there is to know it by.
    of_the_machine = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    return of_the_machine or isinstance(error, torch.OutOfMemoryError | MemoryError)


def give_memory_back() -> None:
    """What torch's allocator keeps for later goes back to the GPU, so that smaller pieces find room."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class LossSpikes:
    """Turns steps away whose loss rises above `limit` times its running mean; a `limit` of None never looks.

    What is compared is the mean over ranks, which every rank then knows, at the price of waiting for it.
    usual: the running mean of finite losses, over about 50 micro-batches. seen: how many it has; 20 make it a judge.
    """

    BEFORE, WEIGHT = 20, 0.02

    def __init__(self, limit: float | None, usual: float = 0.0, seen: int = 0) -> None:
        self.limit, self.usual, self.seen = limit, usual, seen

    def guarded(self, loss: Tensor) -> Tensor:
        """The loss itself, or one that makes the gradient non-finite, which no strategy lets through."""
        if self.limit is None:
            return loss
        from vireo import distributed

        value = distributed.average({"loss": float(loss.detach())})["loss"]
        if not math.isfinite(value):
            return loss  # another guard's business
        if self.seen >= self.BEFORE and value > self.limit * self.usual:
            log.error("the loss is %.4g, its running mean %.4g: no update (faults.max_loss_rise)", value, self.usual)
            return loss * float("nan")
        self.seen += 1
        self.usual += max(self.WEIGHT, 1 / self.seen) * (value - self.usual)
        return loss


class BadFiles:
    """Files that could not be read while training: each is told once, with the reason, and written down.

    limit: how many there may be on all ranks together. path: where a line of JSON (step, file, reason) goes for each.
    Its length is their number, from this start of the run on: what broke before may have been mended.
    """

    def __init__(self, limit: int, path: Path) -> None:
        self.limit, self.path = limit, path
        self.news: dict[str, str] = {}  # reasons by file, as long as only this rank knows them
        self._reasons: dict[str, str] = {}  # of all ranks; a file may come again in every epoch

    def __len__(self) -> int:
        return len(self._reasons)

    @property
    def too_many(self) -> bool:
        return len(self) > self.limit

    def share(self) -> None:
        """Tell each other what is new. Collective."""
        from vireo import distributed

        for news in distributed.gather(self.news):
            self._reasons |= news
        self.news = {}

    def note(self, step: int, found: Iterable[tuple[str, str]]) -> None:
        """found: (file, reason) of what a batch has other samples instead of."""
        for file, reason in found:
            if file in self._reasons or file in self.news:
                continue
            self.news[file] = reason
            log.warning("%s cannot be read, so another sample takes its place: %s", file, reason)
            with dispensable(f"the line about {file}"), self.path.open("a") as lines:
                lines.write(json.dumps({"step": step, "file": file, "reason": reason}) + "\n")

    def error(self) -> TooManyFaults:
        """What to raise when there are too many."""
        lines = [f"  {file}: {reason}" for file, reason in list(self._reasons.items())[:10]]
        said = f"{len(self)} files broke while training, at most {self.limit} may (data.max_bad_fraction):"
        return TooManyFaults("\n".join([said, *lines]))


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
