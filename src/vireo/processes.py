"""The worker processes of one machine: start them, pass signals on, wait, say which one failed first.

torch's elastic agent could do this, but it kills what has not saved 30 s after a stop, dies itself of SIGUSR1 and
SIGUSR2, and turns every exit code into 1.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from vireo import faults
from vireo.run_folder import log_file

GRACE = 10.0  # seconds in which the others may fail by themselves, and write why, after one process has
POLL = 0.05  # seconds
FAILURES = ".failures"  # in the run's folder: a line "<rank> <time>" for each process that caught its failure


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
) -> int:
    """Run `count` workers on a resolved config to their end; returns the exit code of the one that failed first.

    If none failed: 0, or 75 after a requested stop (also one that came before a worker could listen). Rank 0 has the
    console, the output of each other rank goes to `logs/rank_<n>.log` beside the config.

    held: file descriptor of the run's lock, which the workers inherit. obsolete: asked now and then whether the workers
    should end, since those of another machine have.

    resend: signals that came meanwhile are sent to this process again once the workers have saved and ended, when its
    own handlers are back (submitit's requeues the job).
    """
    (resolved.with_name("logs")).mkdir(exist_ok=True)
    resolved.with_name(FAILURES).unlink(missing_ok=True)
    first = share.node * count
    variables = environment(count, share)
    workers = {first + k: _start(resolved, first + k, variables[k], held) for k in range(count)}
    with _forward_signals(list(workers.values())) as asked:
        try:
            codes, killed = _wait(workers, obsolete)
        finally:
            for worker in workers.values():
                worker.kill()  # of no effect on those that have ended
    codes = {rank: faults.EXIT_STOPPED if -code in asked else code for rank, code in codes.items()}
    failed = [rank for rank, code in codes.items() if code not in (0, faults.EXIT_STOPPED) and rank not in killed]
    if failed:
        rank = first_failure(failed, resolved)
        code = codes[rank]
        if share.nodes * count > 1:
            print(_about(rank, code, resolved), file=sys.stderr, flush=True)
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


def _start(resolved: Path, rank: int, variables: Mapping[str, str], held: int | None) -> subprocess.Popen:
    # Threads that wait by spinning take the core from the loader's workers where there are few.
    inherited = {
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "HYDRA_FULL_ERROR": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [sys.executable, "-u", "-m", "vireo.start_worker", str(os.getpid()), str(resolved)]
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


def _wait(workers: Mapping[int, subprocess.Popen], obsolete: Callable[[], bool]) -> tuple[dict[int, int], set[int]]:
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
        if deadline is None and obsolete():
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            killed = set(workers.keys() - codes.keys())
            for rank in killed:
                workers[rank].kill()
                codes[rank] = workers[rank].wait()
        time.sleep(POLL)
    return codes, killed


def note_failure(resolved: Path, rank: int) -> None:
    """Called by a worker that has caught its failure, before others can notice that it is gone."""
    with open(resolved.with_name(FAILURES), "a") as file:
        file.write(f"{rank} {time.time()}\n")


def first_failure(ranks: Sequence[int], resolved: Path) -> int:
    """Which of the failed ranks was the first. One that could not note its failure was killed, which others noticed."""
    path = resolved.with_name(FAILURES)
    lines = path.read_text().split("\n") if path.exists() else []
    noted = {int(rank): float(when) for rank, when in (line.split() for line in lines if line)}
    return min(ranks, key=lambda rank: (noted.get(rank, 0.0), rank))


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
    """Pass stop signals on to the workers, and list them."""
    asked: list[int] = []

    def forward(number: int, frame: object) -> None:
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
