"""Ranks that run several configs in turn, forked from this process, so that importing is paid once."""

import gc
import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from vireo import orphans, worker
from vireo.console import set_up_logging


def work(
    folders: Sequence[Path], sabotage: Callable[[], None] | None = None, processes: int = 2, timeout: float = 600
) -> list[list[int]]:
    """Run the worker on each folder in turn, on all ranks; returns the exit codes of each folder by rank.

    sabotage: called in every rank first, to break something in it.
    """
    fork = multiprocessing.get_context("fork")
    port, queue = _free_port(), fork.SimpleQueue()

    parent = os.getpid()

    def child(rank: int) -> None:
        orphans.die_with_parent(parent)
        gc.freeze()  # as in runs.py
        group = {"WORLD_SIZE": processes, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        group |= {"MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in group.items()})
        torch.set_num_threads(1)
        dist.destroy_process_group = lambda: None  # one group for all runs, as DeepSpeed wants it
        if sabotage is not None:
            sabotage()
        codes = []
        for folder in folders:
            set_up_logging(folder / "train.log")
            codes.append(worker.main(folder / "resolved.yaml"))
            if codes[-1] not in (0, 75):  # the group may be of no use any more
                break
        queue.put((rank, codes))
        os._exit(0)

    ranks = [fork.Process(target=child, args=(rank,)) for rank in range(processes)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(timeout)
        if one.is_alive() or one.exitcode:
            for other in ranks:
                other.kill()
            logs = "\n".join((f / "train.log").read_text() for f in folders if (f / "train.log").exists())
            raise RuntimeError(f"rank {ranks.index(one)} ended with {one.exitcode} within {timeout} s:\n{logs}")
    by_rank = dict(queue.get() for _ in ranks)
    return [list(codes) for codes in zip(*(by_rank[rank] for rank in range(processes)), strict=False)]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
