"""Processes that do not outlive the one that started them."""

import ctypes
import multiprocessing
import os
import signal
import sys


def die_with_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """Ask Linux for a signal when the parent is killed, so that no orphan goes on writing into the run's folder.

    parent: its process number; if it was killed before Linux could be asked, the signal comes at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def end_children() -> None:
    """Kill what this process has started by multiprocessing and what has not ended with its work.

    Loader workers ignore SIGTERM, so Python would wait at its exit for one that hangs, for ever.
    """
    for child in multiprocessing.active_children():
        child.kill()
