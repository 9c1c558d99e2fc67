"""Real runs, quickly: workers forked from this process, which has imported everything already."""

import gc
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import accelerate  # noqa: F401 - imported here so that no forked worker has to
import matplotlib.pyplot  # noqa: F401
import torch
import torch._dynamo  # which torch's optimizers import
import torchmetrics.functional.image  # noqa: F401

from tests.sabotage import die_at  # noqa: F401
from vireo import checkpoint, config, drill, orphans, worker
from vireo.console import set_up_logging

# The TAEHV recipe on the mini world with a network of a few thousand parameters.
TINY = [
    "experiment=taehv",
    "model.network.weights=null",
    "++model.network.encoder_width=8",
    "++model.network.decoder_widths=[8,8,8,8]",
    "++model.network.num_memblocks=1",
    "height=32",
    "width=32",
    "batch_size=2",
    "steps=8",
    "checkpoint.every=3",
    "validation.every=4",
    "validation.clips=2",
    "logging.every=1",
    "ema.decay=0.9",
    "tracker=none",
    "loader.workers=0",
]
TIMING = drill.UNEQUAL  # of metrics.jsonl: the only figures that two equal runs differ in


def make(outputs: Path, overrides: Sequence[str], shrunk: bool = True) -> Path:
    """A run's folder with its resolved config, as the launcher makes it; `shrunk` begins from TINY."""
    settings = config.settings([*(TINY if shrunk else ()), f"paths.outputs={outputs}", *overrides])
    folder = config.run_folder(settings)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_resolved(settings, folder / "resolved.yaml")
    return folder


def work(folder: Path, sabotage: Callable[[], None] | None = None, timeout: float = 90) -> int:
    """Run the worker on a folder to its end, in a process of its own; returns its exit code (negative: a signal).

    sabotage: called in that process before the run, to break something in it.
    """

    parent = os.getpid()

    def child() -> None:
        orphans.die_with_parent(parent)
        gc.freeze()  # a process group that the parent has left to be collected would wait here for its threads
        set_up_logging(folder / "train.log")
        if sabotage is not None:
            sabotage()
        os._exit(worker.main(folder / "resolved.yaml"))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"the run in {folder} did not end within {timeout} s:\n{(folder / 'train.log').read_text()}")
    assert process.exitcode is not None
    return process.exitcode


def train(outputs: Path, *overrides: str, shrunk: bool = True) -> Path:
    """A finished run."""
    folder = make(outputs, overrides, shrunk)
    assert work(folder) == 0, (folder / "train.log").read_text()
    return folder


def metrics(folder: Path) -> list[dict]:
    """Rows of metrics.jsonl without what the machine measured."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def same(one: Path, two: Path) -> None:
    """Two runs' figures and last checkpoints, bit for bit."""
    assert metrics(one) == metrics(two)
    a, b = checkpoint.latest(one), checkpoint.latest(two)
    assert a is not None and b is not None and a.state == b.state
    for part in ("network", "optimizer", "ema"):
        first, second = a.tensors(part), b.tensors(part)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), part
