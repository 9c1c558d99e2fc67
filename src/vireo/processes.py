"""The worker processes of one machine: start them, pass signals on, wait, say which one failed first.

torch's elastic agent could do this, but it kills what has not saved 30 s after a stop, dies itself of SIGUSR1 and
SIGUSR2, and turns every exit code into 1.
"""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from vireo import faults, hangs
from vireo.run_folder import dispensable, log_file, write_json

GRACE = 10.0  # seconds in which the others may fail by themselves, and write why, after one process has
SETTLE = 1.0  # seconds in which another machine says that it was its process that failed first
POLL = 0.05  # seconds
STARTED = "VIREO_STARTED"  # the variable that says when a command was given, in seconds since 1970
NOTES = "VIREO_FAILURES"  # the variable that names a folder with <rank>.json for each process that has failed


class Share(NamedTuple):
    """Which part of all processes runs on this machine, and where rank 0 listens. One machine has it all."""

    node: int = 0
    nodes: int = 1
    address: str = "127.0.0.1"
    port: int | None = None  # None: a free one


WHOLE = Share()


def run(
    resolved: Path,
    count: int,
    share: Share = WHOLE,
    held: int | None = None,
    obsolete: Callable[[], bool] = lambda: False,
    resend: bool = False,
    entry: Sequence[str] = ("vireo.start_worker",),
) -> int:
    """Run `count` workers on a resolved config to their end; returns the exit code of the one that failed first.

    On whichever machine that was: a failure on another one ends the workers here. What hung before that is told, with
    the files that hold its stacks. If none failed: 0, or 75 after a requested stop (also one that came before a worker
    could listen). 130 after a second Ctrl-C, which kills them. Rank 0 has the console, the output of each other rank
    goes to `logs/rank_<n>.log` beside the config.

    held: file descriptor of the run's lock, which the workers inherit. obsolete: asked now and then whether the workers
    should end, since those of another machine have.

    entry: the module that a worker is, and its arguments behind the parent's number and the config.

    resend: signals that came meanwhile are sent to this process again once the workers have saved and ended, when its
    own handlers are back (submitit's requeues the job).
    """
    began = time.time()
    (resolved.with_name("logs")).mkdir(exist_ok=True)
    notes = resolved.with_name(f".failed-{share.port or 'here'}")  # another folder for each attempt
    if share.node == 0:
        for old in resolved.parent.glob(".failed-*"):
            shutil.rmtree(old)
    first = share.node * count
    variables = [{**own, NOTES: str(notes)} for own in environment(count, share)]
    workers = {first + k: _start(entry, resolved, first + k, variables[k], held) for k in range(count)}

    def needless() -> bool:
        return obsolete() or (share.nodes > 1 and bool(_noted(notes).keys() - workers.keys()))

    with _forward_signals(list(workers.values())) as asked:
        try:
            codes, killed = _wait(workers, needless)
        finally:
            for worker in workers.values():
                worker.kill()  # of no effect on those that have ended
    if signal.SIGKILL in asked:
        return faults.EXIT_INTERRUPTED
    codes = {rank: faults.EXIT_STOPPED if -code in asked else code for rank, code in codes.items()}
    own = {}  # beside what is noted, which a full disk does not take
    for rank, code in codes.items():
        if rank in killed and rank in _noted(notes):
            own[rank] = faults.EXIT_FAULT
        elif rank not in killed and code not in (0, faults.EXIT_STOPPED):
            own[rank] = code
    for rank, code in own.items():
        _note_code(notes, rank, code)
    failed = _failures(notes, share.nodes, own)
    if failed:
        rank, code = failed[0]
        with dispensable("what is said of the failure"):
            if share.nodes * count > 1:
                print(_about(rank, code, resolved), file=sys.stderr, flush=True)
            if stacks := hangs.written_since(resolved.parent, began):
                files = "".join(f"\n  {path}" for path in stacks)
                told = f"a step took far longer than usual; where processes stood then:{files}"
                print(told, file=sys.stderr, flush=True)
    else:
        code = max(codes.values())
    for number in asked:
        if resend and callable(signal.getsignal(number)):
            os.kill(os.getpid(), number)
    return code if code >= 0 else 128 - code


def environment(count: int, share: Share) -> list[dict[str, str]]:
    """The variables that tell each of this machine's workers its place; none for a process that is alone."""
    world = count * share.nodes
    if world == 1:
        return [{}]
    common = {
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": share.address,
        "MASTER_PORT": share.port or free_port(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", 1),
    }
    places = [{**common, "RANK": share.node * count + k, "LOCAL_RANK": k} for k in range(count)]
    return [{name: str(value) for name, value in place.items()} for place in places]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def _start(
    entry: Sequence[str], resolved: Path, rank: int, variables: Mapping[str, str], held: int | None
) -> subprocess.Popen:
    # Threads that wait by spinning take the core from the loader's workers where there are few.
    inherited = {
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "HYDRA_FULL_ERROR": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [sys.executable, "-u", "-m", entry[0], str(os.getpid()), str(resolved), *entry[1:]]
    descriptors = () if held is None else (held,)
    if rank == 0:
        return subprocess.Popen(command, env={**inherited, **variables}, pass_fds=descriptors)
    with open(log_file(resolved.parent, rank), "a") as log:
        return subprocess.Popen(
            command,
            env={**inherited, **variables},
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _wait(workers: Mapping[int, subprocess.Popen], needless: Callable[[], bool]) -> tuple[dict[int, int], set[int]]:
    """Exit codes by rank, and the ranks that had to be killed since they did not end after another one's failure."""
    codes: dict[int, int] = {}
    killed: set[int] = set()
    deadline = None
    while len(codes) < len(workers):
        for rank in workers.keys() - codes.keys():
            code = workers[rank].poll()
            if code is not None:
                codes[rank] = code
                if code not in (0, faults.EXIT_STOPPED):
                    deadline = deadline or time.monotonic() + GRACE
        if deadline is None and needless():
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            killed = set(workers.keys() - codes.keys())
            for rank in killed:
                workers[rank].kill()
                codes[rank] = workers[rank].wait()
        time.sleep(POLL)
    return codes, killed


def note_failure(rank: int) -> None:
    """Called by a worker that has caught its failure, before others can notice that it is gone."""
    if NOTES in os.environ:  # else somebody else has started it, and looks for himself
        _note(Path(os.environ[NOTES]), rank, when=time.time())


def _note_code(notes: Path, rank: int, code: int) -> None:
    """Called by the parent of a worker that has failed; one that could not say when was killed."""
    _note(notes, rank, **{"when": 0.0, **_noted(notes).get(rank, {}), "code": code})


def _note(notes: Path, rank: int, **facts: float) -> None:
    with dispensable(f"that rank {rank} has failed"):
        notes.mkdir(exist_ok=True)
        write_json(notes / f"{rank}.json", facts)


def _noted(notes: Path) -> dict[int, dict[str, Any]]:
    found = {}
    for path in notes.glob("[0-9]*.json"):
        with suppress(FileNotFoundError):  # the first machine has begun anew
            found[int(path.stem)] = json.loads(path.read_text())
    return found


def _failures(notes: Path, machines: int, own: Mapping[int, int]) -> list[tuple[int, int]]:
    """Rank and exit code of what has failed on all machines, first things first.

    A process that was killed is the first one: the others have noticed it. own: codes of this machine's by rank, in the
    order in which they ended, which is what counts where none could note when it failed.
    """
    deadline = time.monotonic() + GRACE
    if machines > 1 and _noted(notes):
        time.sleep(SETTLE)
    while any("code" not in one for rank, one in _noted(notes).items() if rank not in own):
        if time.monotonic() > deadline:
            break
        time.sleep(POLL)  # its parent waits for its end
    noted = _noted(notes)
    when = {rank: noted.get(rank, {}).get("when", 0.0) for rank in [*own, *noted]}
    codes = {rank: one.get("code", faults.EXIT_FAULT) for rank, one in noted.items()} | dict(own)
    return [(rank, codes[rank]) for rank in sorted(when, key=when.__getitem__)]  # equal ones stay in their order


def _about(rank: int, code: int, resolved: Path) -> str:
    how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
    told = f"rank {rank} failed first ({how})"
    if rank == 0:
        return told
    path = log_file(resolved.parent, rank)
    text = path.read_text(errors="replace")[-20_000:]
    # The message before the last traceback stands in the same line of the log; without one, the last lines have to do.
    found = list(re.finditer(r"^.*Traceback \(most recent call last\)", text, re.MULTILINE))
    end = text[found[-1].start() :] if found else "\n".join(text.splitlines()[-10:])
    return f"{told}; the end of {path}:\n{end.rstrip()}"


@contextmanager
def _forward_signals(workers: Sequence[subprocess.Popen]) -> Iterator[list[int]]:
    """Pass stop signals on to the workers, and list them.

    A Ctrl-C after the first request is passed on as SIGKILL: Python's handlers do not run in a worker that waits in a
    collective or for its GPU.
    """
    asked: list[int] = []
    first = math.inf

    def forward(number: int, frame: object) -> None:
        nonlocal first
        if number == signal.SIGINT and time.monotonic() - first > faults.ECHO:
            number = signal.SIGKILL
        first = min(first, time.monotonic())
        for worker in workers:
            worker.send_signal(number)  # of no effect on those that have ended, or heard a Ctrl-C from the terminal
        if number not in asked:
            asked.append(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
