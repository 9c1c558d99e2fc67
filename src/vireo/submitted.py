"""Jobs of a queue: what runs inside a job of submitit (Slurm, or processes of this machine in its place).

A job has one task on each machine, which starts the processes of that machine. The first one composes the config; on
the others a task follows a small file that the first one keeps beside the job's files.
"""

import fcntl
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from vireo import devices, faults, processes, ranks, run_folder, sweeps
from vireo.errors import UserError

GLANCE = 0.5  # seconds from one look at the first machine's file to the next
LATE = 15.0  # seconds that a file system may take to show what another machine wrote
ASK = 5.0  # seconds from one question to Slurm to the next


def check(words: Sequence[str]) -> None:
    """Raises UserError for words that ask for a queue and would not get one."""
    chosen = next((word for word in words if re.match(r"launcher=(?!local$)", word)), None)
    if chosen and importlib.util.find_spec("submitit") is None:
        raise UserError(f"{chosen} needs submitit, which is not installed: pip install 'vireo[slurm]'")
    sweeping = chosen or {"-m", "--multirun"} & set(words) or "hydra.mode=multirun" in [w.lower() for w in words]
    for word in () if sweeping else words:
        if word.startswith("hydra/launcher="):
            raise UserError(f"{word} is for sweeps (-m); without one, Hydra ignores it. Say launcher=slurm")
        if word.startswith("hydra/sweeper="):
            raise UserError(f"{word} is for sweeps; without -m, Hydra ignores it. Say python train.py -m …")


def require_queue(where: str) -> None:
    """Raises UserError for launcher=slurm on a machine that has no Slurm."""
    if where.startswith("slurm") and not (shutil.which("sbatch") and shutil.which("srun")):
        raise UserError(
            f"launcher={where}, but this machine has no sbatch and srun: start it where jobs are submitted, or "
            "take launcher=submitit_local, or none"
        )


def inside() -> bool:
    """Whether this process is the task of a job."""
    return "SUBMITIT_EXECUTOR" in os.environ


def node() -> int:
    """The number of this machine in its job."""
    return int(os.environ.get("SLURM_NODEID", "0")) if inside() else 0


def nodes() -> int:
    return int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) if inside() else 1


def wait_for_every_job(sweep: Path, higher_is_better: bool) -> None:
    """Make this process, which is about to submit a sweep, wait for all of its jobs whatever becomes of one.

    The launcher asks job after job for its result, gives up at the first one without, and has no hook; so submitit's
    `Job.results` is replaced. A job that was cancelled, or whose machine is gone, gets a note of that, and counts as
    infinitely bad in a search.
    """
    import submitit
    from hydra.core.utils import JobReturn, JobStatus

    ask = submitit.Job.results

    def results(job: Any) -> list[Any]:
        while not job.paths.result_pickle.exists() and _goes_on(job):
            time.sleep(ASK)
        if not _has_result(job):
            return [lost(job, "it was cancelled, or its machine is gone")]
        try:
            (result,) = ask(job.task(0))  # the first machine's figure is the job's
        except submitit.core.utils.FailedJobError as error:
            return [lost(job, str(error))]
        failed = result.status == JobStatus.FAILED
        return [lost(job, f"{type(result._return_value).__name__}: {result._return_value}") if failed else result]

    def lost(job: Any, why: str) -> JobReturn:
        overrides, _, number, *_ = job.submission().args
        folder = sweep / str(number)
        if "exit_code" not in sweeps.read(folder):
            message = f"{why}; what it printed: {job.paths.stdout}"
            sweeps.note(folder, overrides=overrides, exit_code=faults.EXIT_FAULT, message=message)
        return JobReturn(status=JobStatus.COMPLETED, _return_value=sweeps.objective(None, higher_is_better))

    submitit.Job.results = results  # type: ignore[method-assign,assignment]


def left(sweep: Path) -> str:
    """What to say of Slurm's jobs of a sweep to somebody who waits for them no longer; "" if there are none.

    Jobs of this machine hear a Ctrl-C of the terminal themselves.
    """
    folder = sweep / ".submitit"
    scripts = sorted(path.parent.name for path in folder.glob("*/*_submission.sh"))
    if not scripts:
        return ""
    begun = sorted(path.parent for path in folder.glob("*/*_submitted.pkl"))
    jobs = [job.name for job in begun if not list(job.glob("*_result.pkl"))]
    return (
        f"\nno longer waiting; jobs that go on: {', '.join(jobs)}\n"
        f"to end them: scancel {' '.join(scripts)}\n"
        f"to see what becomes of them: vireo report sweep={sweep}"
    )


def _has_result(job: Any) -> bool:
    """Whether a job that has ended left a result; another machine's file may be seen a little later."""
    began = time.monotonic()
    while not job.paths.result_pickle.exists():
        if time.monotonic() - began > LATE:
            return False
        time.sleep(GLANCE)
    return True


def _goes_on(job: Any) -> bool:
    """Whether a job waits or runs, or Slurm does not answer. submitit asks sacct, which not all clusters have."""
    if type(job).__name__ != "SlurmJob":
        return not job.done()
    asked = subprocess.run(["squeue", "--noheader", f"--jobs={job.job_id}"], capture_output=True, text=True)
    return bool(asked.stdout.strip()) if asked.returncode == 0 else "Invalid job id" not in asked.stderr


def share(resolved: Path, count: int) -> processes.Share:
    """What this machine, the first one of its job, has to run; the others are told, if there are any."""
    if nodes() == 1:
        return processes.WHOLE
    # By the name that Slurm knows it by: the machine's own idea of its name is often that of the loopback.
    address, port = ranks.first_host(os.environ["SLURM_JOB_NODELIST"]), processes.free_port()
    attempt = (_told() or {}).get("attempt", 0) + 1
    _tell({"attempt": attempt, "resolved": str(resolved), "count": count, "address": address, "port": port})
    return processes.Share(0, nodes(), address, port)


@contextmanager
def first_machine() -> Iterator[None]:
    """Around a job on its first machine, which hears of a preemption, and tells the others when the job is over."""
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        signal.signal(signal.SIGTERM, _requeue_if_preempted)
    try:
        yield
    finally:
        if nodes() > 1:
            _tell({"over": True})


@contextmanager
def turn(jobs: int, processes: int | str) -> Iterator[None]:
    """Around a job that is a process of this machine: wait until fewer than `jobs` of its sweep run, and take a share
    of the GPUs or threads. submitit starts all at once. A job's place is a locked file, which is free when it ends,
    however it ends. processes: that the job will start. Raises UserError for more jobs than GPUs.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") != "local":
        yield
        return
    import submitit

    folder = submitit.JobEnvironment().paths.folder.parent
    with ExitStack() as files:
        places = [files.enter_context(open(folder / f"place_{slot}", "a")) for slot in range(jobs)]
        while (slot := next((slot for slot, file in enumerate(places) if _locked(file)), None)) is None:
            time.sleep(GLANCE)
        os.environ.update(devices.share(slot, jobs, processes))
        yield


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: nobody waits
    return True


def _requeue_if_preempted(number: int, frame: object) -> None:
    """Heard once the run has saved. submitit requeues after a signal of its own and lets SIGTERM pass, which can be a
    cancellation; but a job that has to give way within its partition's grace time hears nothing else.
    """
    import submitit

    command = ["scontrol", "show", "job", os.environ["SLURM_JOB_ID"]]
    told = subprocess.run(command, capture_output=True, text=True).stdout
    if "JobState=RUNNING" in told and re.search(r"PreemptTime=\d", told):
        os.kill(os.getpid(), submitit.JobEnvironment()._usr_sig())


def follow() -> None:
    """On every other machine: run what the first one tells, until the job is over."""
    attempt = 0
    while not (told := _told() or {}).get("over"):
        if told.get("attempt", 0) > attempt:
            attempt = told["attempt"]
            place = processes.Share(node(), nodes(), told["address"], told["port"])
            processes.run(Path(told["resolved"]), told["count"], place, obsolete=partial(_is_over, told), resend=True)
        time.sleep(GLANCE)


def _is_over(told: dict[str, Any]) -> bool:
    return (_told() or told) != told


def _message() -> Path:
    import submitit

    return submitit.JobEnvironment().paths.folder / f"{os.environ['SLURM_JOB_ID']}_start.json"


def _restart() -> str:
    """How often Slurm has requeued this job: what an earlier life of it has told does not count."""
    return os.environ.get("SLURM_RESTART_COUNT", "0")


def _tell(what: dict[str, Any]) -> None:
    run_folder.write_json(_message(), {**what, "restart": _restart()})


def _told() -> dict[str, Any] | None:
    try:
        told = json.loads(_message().read_text())
    except FileNotFoundError:
        return None
    return told if told["restart"] == _restart() else None
