"""How much memory a call needs at its worst."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that the call held at most, beyond what was held before it; None where nobody counts them.

    On a GPU: what torch's allocator gave out. On the CPU: the resident memory of the whole process, as Linux counts it,
    so other threads should rest; elsewhere, and under a C library other than glibc, None. It holds what malloc keeps in
    between: of a TAEHV at its released size, measurements differed by up to a quarter from one to the next, whether in
    this process or in one of their own. Call it once before, so that what is loaded at the first use does not count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not _begin_anew():
        return None
    start = _most_resident()
    call()
    return _most_resident() - start


def _begin_anew() -> bool:
    """Give freed memory back and forget the peak so far. False if this system does not offer both."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if CLEAR.exists() else None
    if trim is None:
        return False
    trim(0)  # what is free but kept would be used again without being seen
    CLEAR.write_text("5")  # the peak becomes the present size, see proc_pid_clear_refs(5)
    return True


def _most_resident() -> int:
    """Bytes that this process had in memory at most since `_begin_anew`."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024
