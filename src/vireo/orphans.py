"""Processes that do not outlive the one that started them."""

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing import util


def die_with_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """Ask Linux for a signal when the parent is killed, so that no orphan goes on writing into the run's folder.

    parent: its process number; if it was killed before Linux could be asked, the signal comes at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def end_children_at_exit() -> None:
    """Kill what this process has started by multiprocessing and what is still there when Python exits.

    Loader workers ignore SIGTERM, with which Python ends such children, and it waits for one that hangs for ever.
    """
    util.Finalize(None, _end_children, exitpriority=0)


def _end_children() -> None:
    for child in multiprocessing.active_children():
        child.kill()
