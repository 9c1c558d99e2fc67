"""Which GPUs and how many threads there are, known without importing torch, and a job's share of them."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from vireo.errors import UserError

NVIDIA = Path("/proc/driver/nvidia/gpus")
AMD = Path("/sys/class/kfd/kfd/topology/nodes")  # of ROCm; CPUs are among them, without SIMD units
WSL = Path("/dev/dxg")  # Windows has the driver
COUNT = "import torch; print(torch.cuda.device_count())"


def visible_gpus() -> list[str]:
    """Names of the GPUs that a worker would see, as CUDA_VISIBLE_DEVICES (with ROCm also HIP_…) has them."""
    visible = os.environ.get(_variable())
    if visible is None:
        return [str(number) for number in range(_count())]
    return [part.strip() for part in visible.split(",") if part.strip() and part.strip() != "-1"]


def _variable() -> str:
    return "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in os.environ else "CUDA_VISIBLE_DEVICES"


def _torch_is_for_amd() -> bool:
    torch = importlib.util.find_spec("torch")
    return torch is not None and Path(str(torch.origin)).with_name("lib").joinpath("libtorch_hip.so").exists()


@functools.cache
def _count() -> int:
    found = len(list(NVIDIA.glob("*")))
    if not found and _torch_is_for_amd():  # a processor's own graphics are listed, too
        found = sum(bool(re.search(r"simd_count [1-9]", path.read_text())) for path in AMD.glob("*/properties"))
    if not found and WSL.exists():
        asked = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True)
        found = int(asked.stdout) if asked.returncode == 0 else 0
    return found


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share(slot: int, jobs: int, processes: int | str = 1) -> dict[str, str]:
    """The environment of one of `jobs` jobs side by side: its GPUs, or its threads where there are none.

    Threads that somebody has set are left as they are; a job of several processes divides its share among them.
    Raises UserError for more jobs than GPUs.
    """
    if jobs == 1:
        return {}
    gpus = visible_gpus()
    if gpus and jobs > len(gpus):
        raise UserError(f"launcher.jobs={jobs}, but {len(gpus)} GPUs are visible; use at most that many")
    environment = {}
    if gpus:
        mine = gpus[slot * len(gpus) // jobs : (slot + 1) * len(gpus) // jobs]
        environment[_variable()] = ",".join(mine)
    if "OMP_NUM_THREADS" not in os.environ:
        each = int(processes) if str(processes).isdigit() else max(1, len(gpus) // jobs)
        environment["OMP_NUM_THREADS"] = str(max(1, cores() // (jobs * each)))
    return environment
