"""What vireo itself reads from a config: names, types, meanings, legal ranges and defaults, in this one place.

An option of a group (model, data, loss, …) is not mirrored here: it is a `_target_` node, and its keys are checked
against the target's own signature (`vireo.config.signatures`).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING


class Size(Enum):
    """mini is the embedded demonstration, full the recipe itself."""

    mini = "mini"
    full = "full"


class Precision(Enum):
    """auto is bf16 on a GPU that has it, else fp32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Verify(Enum):
    """How a file is known to be the one that was encoded: stat asks for size and times of change, bytes reads it."""

    stat = "stat"
    bytes = "bytes"


def knob(
    meaning: str,
    default: Any = MISSING,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A key with its meaning and, for a number, its range. Without a default somebody has to give it a value."""
    metadata = {"meaning": meaning, "at_least": at_least, "above": above, "below": below}
    return dataclasses.field(default=default, metadata=metadata)


def some(meaning: str, factory: Callable[[], Any] = list) -> Any:
    """A key that starts as an empty list, or as a node with its own defaults."""
    return dataclasses.field(default_factory=factory, metadata={"meaning": meaning})


@dataclass
class Checkpoint:
    every: int | None = knob("save every so many steps; null: by time only", 500, at_least=1)
    every_minutes: float | None = knob("and after so many minutes without a save", 30.0, above=0)
    keep_last: int = knob("newest checkpoints to keep", 3, at_least=1)
    keep_every: int | None = knob("keep multiples of so many steps for good", None, at_least=1)
    keep_best: bool = knob("keep and export the best one by validation.metric", True)
    background: bool = knob("write while training goes on", False)


@dataclass
class Validation:
    every: int | None = knob("validate every so many steps; null: only at the end", 500, at_least=1)
    at_start: bool = knob("also before the first step, which finds broken paths early", True)
    clips: int = knob("clips of the validation split to look at", 8, at_least=1)
    metric: str = knob("the figure that says which checkpoint is best", "psnr")
    higher_is_better: bool = knob("whether a greater value of that figure is the better one", True)
    fps: float | None = knob("frames per second of the videos written for people; null: the clips' own", None, above=0)
    gif: bool = knob("whether these videos are also written as GIFs", False)


@dataclass
class Ema:
    decay: float = knob("decay of the weights' moving average; 0 is off", 0.0, at_least=0, below=1)


@dataclass
class Faults:
    max_consecutive_skips: int = knob("steps in a row without a finite gradient that end the run", 10, at_least=1)
    max_consecutive_save_failures: int = knob("failed checkpoints in a row that end the run", 3, at_least=1)
    max_loss_rise: float | None = knob("no update where the loss is above so many times its mean", None, above=1)


@dataclass
class Logging:
    every: int = knob("steps from one line of figures to the next", 10, at_least=1)


@dataclass
class Loader:
    workers: int = knob("processes that read data, for each training process; 0: none", 2, at_least=0)
    timeout: float = knob("seconds after which a worker that gives nothing ends the run", 300.0, above=0)
    prefetch: int = knob("batches that each worker reads ahead", 2, at_least=1)


@dataclass
class Cache:
    enabled: bool = knob("compute frozen encodings once and read them from then on", False)
    folder: str = knob("where they are kept; may be shared by all runs of a machine", "${paths.outputs}/cache")
    verify: Verify = knob("stat believes size and times of files; bytes reads files and entries anew", Verify.stat)
    batch_size: int = knob("files or texts that are encoded at once before training", 8, at_least=1)
    memory: int = knob("bytes of entries that each process keeps when it has read them", 2**29, at_least=0)


@dataclass
class Slurm:
    """What is asked of the queue; by launcher=slurm and slurm_multinode (gpus, minutes: submitit_local too)."""

    nodes: int = knob("machines that share one run", 1, at_least=1)
    gpus: int | None = knob("GPUs of each machine; null: none are asked for", None, at_least=1)
    cpus: int | None = knob("cores of each machine", None, at_least=1)
    memory_gb: int | None = knob("memory of each machine", None, at_least=1)
    minutes: int = knob("time limit of a job", 1440, at_least=1)
    grace_seconds: int = knob("so long before the limit a run is asked to save and stop", 120, at_least=1)
    requeue: int = knob("how often a job goes on that has met its time limit; preemptions do not count", 10, at_least=0)
    parallel: int = knob("jobs of a sweep that run at the same time", 256, at_least=1)
    partition: str | None = knob("partition, or several: a,b", None)
    account: str | None = knob("account that pays", None)
    qos: str | None = knob("quality of service", None)
    constraint: str | None = knob("features that the machines must have", None)
    setup: list[str] = some("shell lines before the job, as [module load cuda]")
    container: str | None = knob("image that a job runs in, where Slurm has pyxis", None)
    srun: list[str] = some('further arguments of srun, as ["--container-mounts=/data"]')
    sbatch: dict[str, Any] = some("further options of sbatch, as {mail-type: END}", dict)


@dataclass
class Launcher:
    where: str = knob("the chosen launcher; its file says it")
    processes: int | str = knob("processes to start on a machine, or auto: one for each visible GPU", at_least=1)
    timeout: float = knob("seconds after which a collective that a process has left ends the run", above=0)
    restarts: int = knob("how often the processes are started again after a fault", at_least=0)
    jobs: int = knob("runs of a sweep side by side, each with its share of GPUs or threads", 1, at_least=1)
    slurm: Slurm = some("what is asked of the queue", Slurm)


@dataclass
class Paths:
    data: str | None = knob("the folder of the data set")
    weights: str | None = knob("the folder of released weights")
    outputs: str = knob("the folder that gets one folder for each run")


@dataclass
class Machine:
    """Where this machine keeps things. Only paths/full.yaml reads it, so a mini run never meets real data."""

    data: str | None = knob("folder of data for size=full", "${oc.env:VIREO_DATA,null}")
    weights: str | None = knob("folder of weights for size=full", "${oc.env:VIREO_WEIGHTS,null}")


Option = dict[str, Any] | None


@dataclass
class Config:
    experiment: str = knob("the recipe; also the name of its folder below outputs")
    size: Size = knob("mini: the demonstration; full: the recipe itself")
    mini_of: str | None = knob("the experiment whose mini numbers these are; sizes/mini/experiment/*.yaml say it", None)

    lr: float = knob("learning rate", above=0)
    warmup_steps: int = knob("optimizer steps of linear warm-up", 0, at_least=0)
    seed: int = knob("of everything random", 0, at_least=0)
    steps: int | None = knob("optimizer steps", None, at_least=1)
    epochs: float | None = knob("passes over the data, instead of steps", None, above=0)
    batch_size: int = knob("clips in a micro-batch of one process", at_least=1)
    gradient_accumulation: int = knob("micro-batches in a step", 1, at_least=1)
    max_grad_norm: float | None = knob("clip the gradient to this norm; null: never", None, above=0)
    num_frames: int = knob("frames that the network is conditioned on or makes", at_least=1)
    height: int = knob("pixels", at_least=1)
    width: int = knob("pixels", at_least=1)
    max_hours: float | None = knob(
        "stop so many hours after the start, restarts included, as if preempted; null: never",
        None,
        above=0,
    )
    precision: Precision = knob("auto: bf16 where the GPU has it, else fp32", Precision.auto)

    run: str | None = knob("name of the run's folder; without one: the overrides in short and a hash", None)
    resume: str = knob("auto: go on from the newest checkpoint; none: afresh; or a checkpoint's folder", "auto")
    preempt_at: int | None = knob("stop after this step as a preempted job does, and start again", None, at_least=2)
    init_from: str | None = knob("a run, an export or a file to take the initial weights from", None)
    chain: dict[str, Any] = some("experiments that run one after the other, each from the one before's export", dict)
    allow_changes: list[str] = some("keys that may differ from the run that is resumed")
    allow_targets: list[str] = some("further packages that a _target_ may name, e.g. [my_package]")
    notes: str = knob("free text, kept with the run", "")
    tags: list[str] = some("labels for the tracker")

    checkpoint: Checkpoint = some("what is saved when", Checkpoint)
    validation: Validation = some("what is measured on held-out clips, and when", Validation)
    ema: Ema = some("moving average of the weights", Ema)
    faults: Faults = some("how much may go wrong", Faults)
    logging: Logging = some("figures", Logging)
    loader: Loader = some("reading data", Loader)
    cache: Cache = some("what frozen networks compute", Cache)

    model: Option = knob("network, encoder, sampler", None)
    data: Option = knob("the data set", None)
    loss: Option = knob("the objective", None)
    optimizer: Option = knob("the optimizer", None)
    schedule: Option = knob("the learning rate over time", None)
    freeze_policy: Option = knob("what learns", None)
    adapter: Option = knob("what is added to the network", None)
    strategy: Option = knob("how one model is spread over processes", None)
    tracker: Option = knob("where figures are shown", None)
    launcher: Launcher = some("where processes run", Launcher)
    paths: Paths = some("folders", Paths)
    machine: Machine = some("folders of this machine", Machine)


# Groups whose node is one `_target_`, and whether a run needs it.
TARGET_GROUPS = {
    "data": True,
    "loss": True,
    "optimizer": True,
    "schedule": True,
    "freeze_policy": True,
    "adapter": False,
    "strategy": True,
    "tracker": False,
}

# Nodes of `model`, and whether a run needs them. `pipeline` (a folder), `noise_schedule` and `inputs` are there to be
# interpolated; `checks` holds functions that judge the config before torch is imported, `evaluations` what only
# `vireo evaluate` measures.
MODEL_NODES = {
    "network": True,
    "encoder": True,
    "sampler": True,
    "pipeline": False,
    "noise_schedule": False,
    "inputs": False,
    "checks": False,
    "evaluations": False,
}

# Arguments that vireo passes itself when it makes the object, and what a person sets instead.
PASSED = {
    "data": {"split": "both splits are made from this one node"},
    "optimizer": {
        "groups": "freeze_policy.groups says which parameters form a group",
        "params": "freeze_policy.groups says which parameters form a group",
        "lr": "the learning rate is the top-level lr",
    },
    "strategy": {"precision": "set the top-level precision", "timeout": "set launcher.timeout"},
}
