"""Which GPUs and how many threads there are, known without importing torch, and a job's share of them."""

import os
from pathlib import Path

from vireo.errors import UserError


def visible_gpus() -> list[str]:
    """Names of the GPUs that a worker would see, as CUDA_VISIBLE_DEVICES has them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part.strip() for part in visible.split(",") if part.strip() and part.strip() != "-1"]
    return [str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share(slot: int, jobs: int, processes: int | str = 1) -> dict[str, str]:
    """The environment of one of `jobs` jobs side by side: its GPUs, or its threads where there are none.

    Threads that somebody has set are left as they are; a job of several processes divides its share among them.
    Raises UserError for more jobs than GPUs.
    """
    gpus = visible_gpus()
    if jobs == 1:
        return {}
    if gpus and jobs > len(gpus):
        raise UserError(f"launcher.jobs={jobs}, but {len(gpus)} GPUs are visible; use at most that many")
    environment = {}
    if gpus:
        mine = gpus[slot * len(gpus) // jobs : (slot + 1) * len(gpus) // jobs]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    if "OMP_NUM_THREADS" not in os.environ:
        each = int(processes) if str(processes).isdigit() else max(1, len(gpus) // jobs)
        environment["OMP_NUM_THREADS"] = str(max(1, cores() // (jobs * each)))
    return environment
