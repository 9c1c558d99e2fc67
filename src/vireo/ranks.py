"""Processes that torchrun, accelerate launch, deepspeed or srun started, all with the same command line.

Rank 0 composes and validates the config and makes the run's folder; the others never come near Hydra, but wait until
they are told the resolved text. What they are told goes through the store at MASTER_ADDR:MASTER_PORT, over which the
process group is formed afterwards.
"""

import json
import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from vireo import faults, processes
from vireo.errors import UserError

PATIENCE = timedelta(minutes=30)  # for rank 0, which may make the mini world first
FAREWELL = 30.0  # seconds that rank 0 waits for the others to hear that there is nothing to do

_keep: list[Any] = []  # the store: rank 0's is the server, and lives until the process ends


class World(NamedTuple):
    """This process among those that somebody else started."""

    rank: int
    size: int
    starter: str  # "torchrun", "srun", … for messages


def started() -> World | None:
    """The place of this process if a launcher started several of it; None where vireo starts processes itself.

    srun says it in words of its own; they are put into the environment as torch and accelerate want them. A world of
    one that nobody starts again is none: its variables may be left over from something else, and its port taken.

    Raises UserError where accelerate was asked for several processes and made one.
    """
    variables = os.environ
    if "SUBMITIT_EXECUTOR" in variables:
        return None  # a job of vireo's own
    if "RANK" not in variables and int(variables.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        variables.update(slurm_variables(variables))
    if variables.get("WORLD_SIZE") == "1" and "TORCHELASTIC_RUN_ID" not in variables:
        leave()
    if "RANK" not in variables or "WORLD_SIZE" not in variables:
        _refuse_lone_accelerate(variables)
        return None
    starters = {"SLURM_STEP_NUM_TASKS": "srun", "TORCHELASTIC_RUN_ID": "torchrun or accelerate launch"}
    starter = next((name for variable, name in starters.items() if variable in variables), "a launcher")
    return World(int(variables["RANK"]), int(variables["WORLD_SIZE"]), starter)


def leave() -> None:
    """Forget the world that the environment speaks of: what this process starts is a world of its own."""
    places = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in [name for name in os.environ if name in places or name.startswith("TORCHELASTIC_")]:
        del os.environ[name]


def slurm_variables(step: Mapping[str, str]) -> dict[str, str]:
    """RANK and its like of a task of srun. Where each task sees one GPU of its own, that is device 0 to all of them.

    The port follows from job, array index and step, since jobs may share a machine.
    """
    names = ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_STEP_ID")
    digest = zlib.crc32("/".join(step.get(name, "") for name in names).encode())
    alone = len([device for device in step.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]) == 1
    return {
        "RANK": step["SLURM_PROCID"],
        "WORLD_SIZE": step["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": "0" if alone else step["SLURM_LOCALID"],
        "MASTER_ADDR": "127.0.0.1" if step["SLURM_STEP_NUM_NODES"] == "1" else first_host(step["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(20_000 + digest % 20_000),
    }


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts: "node03" of "node[03-05,9],gpu1"."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).partition(",")[0]


def job() -> str:
    """What names this start and those that Slurm (a requeue) or torchrun makes of it again; "" if nobody would."""
    if "SLURM_JOB_ID" in os.environ:
        return f"slurm {os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_STEP_ID', 'batch')}"
    return f"torchrun {os.environ['TORCHELASTIC_RUN_ID']}" if "TORCHELASTIC_RUN_ID" in os.environ else ""


def restarted() -> bool:
    """Whether Slurm or torchrun has started this again."""
    return any(int(os.environ.get(f"{who}_RESTART_COUNT", "0")) for who in ("SLURM", "TORCHELASTIC"))


def _refuse_lone_accelerate(variables: Mapping[str, str]) -> None:
    """accelerate launch --cpu --num_processes 2 starts one process and says nothing: its command line knows better."""
    if "ACCELERATE_MIXED_PRECISION" not in variables:
        return
    asked = _asked_of_accelerate(_command_line(os.getppid()))
    if asked > 1:
        raise UserError(
            f"accelerate launch was asked for {asked} processes and started one, as it does with --cpu or a config "
            f"file that says so. Use `python train.py launcher.processes={asked} …`, or torchrun "
            f"--nproc-per-node={asked}; with GPUs, accelerate launch --multi_gpu"
        )


def _command_line(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/cmdline").read_text().split("\0")
    except OSError:
        return []  # not Linux, or gone


def _asked_of_accelerate(words: Sequence[str]) -> int:
    """How many processes a command line of accelerate asks for, by itself or by its config file; 1 if it says nothing.

    Where several are on several machines, the number is that of all of them.
    """
    import yaml

    text = " ".join(words)
    number = re.search(r"--num[-_]processes[ =](\d+)", text)
    if number:
        return int(number[1])
    file = re.search(r"--config[-_]file[ =](\S+)", text)
    if not file or not Path(file[1]).is_file():
        return 1
    content = yaml.safe_load(Path(file[1]).read_text())
    return int(content.get("num_processes") or 1) if isinstance(content, dict) else 1


def refuse_sweeps(world: World, words: Sequence[str], in_a_file: bool = False) -> None:
    """Raises UserError for words that start processes of their own: each rank would run the whole sweep by itself.

    in_a_file: whether a file of the config asks for that.
    """
    if world.size == 1:
        return
    sweeping = [w for w in words if w in ("-m", "--multirun") or w.lower() == "hydra.mode=multirun"]
    elsewhere = [w for w in words if re.match(r"(hydra/)?launcher=(?!local$)", w)]
    elsewhere += ["the launcher or hydra.mode of a YAML file"] if in_a_file else []
    if sweeping or elsewhere:
        rest = " ".join(words)
        processes = "" if elsewhere else f" launcher.processes={world.size}"
        raise UserError(
            f"{(sweeping + elsewhere)[0]} cannot be used under {world.starter}, which has started {world.size} "
            f"processes already: vireo starts the processes of each job itself.\nUse: python train.py {rest}{processes}"
        )


def check_size(world: World, processes: int | str) -> None:
    """Raises UserError if somebody asked for another number of processes than there are."""
    if processes not in (world.size, str(world.size), "auto"):
        raise UserError(
            f"launcher.processes={processes}, but {world.starter} started {world.size} (WORLD_SIZE); leave "
            "launcher.processes out, or let vireo start them: python train.py launcher.processes=N …"
        )


def work(resolved: Path) -> int:
    """Rank 0: tell the others what is trained, and train. Returns the exit code."""
    port = processes.free_port()
    _tell({"run": str(resolved), "text": resolved.read_text(encoding="utf-8"), "port": port})
    return _work(resolved, None, port)


def dismiss(world: World, code: int) -> None:
    """Rank 0: tell the others, who may be waiting, that there is nothing to train, and with which code to end."""
    if _keep or world.size == 1:
        return  # they were told a run
    store = _tell({"exit": code})
    began = time.monotonic()
    while store.add("heard", 0) < world.size - 1 and time.monotonic() - began < FAREWELL:
        time.sleep(0.05)


def follow() -> int:
    """Every other rank: wait to be told what is trained, and take part. Returns the exit code."""
    store = _store()
    told = json.loads(store.get("told"))
    store.add("heard", 1)
    if "exit" in told:
        return int(told["exit"])
    resolved = Path(told["run"])
    if not resolved.parent.is_dir():
        print(
            f"{resolved.parent} is not there on {os.uname().nodename}: paths.outputs must be a folder that all "
            "machines share",
            file=sys.stderr,
        )
        return faults.EXIT_MISTAKE
    return _work(resolved, told["text"], told["port"])


def _work(resolved: Path, text: str | None, port: int) -> int:
    from vireo import worker
    from vireo.console import set_up_logging

    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        # torchrun's store outlives a restart and holds addresses of processes that are gone: form the group at another.
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
    set_up_logging(resolved.parent / "train.log", shared_console=True)
    # Slurm ends the rest of a step when one task has ended with a code. That must not turn a saved stop into a kill.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    return worker.main(resolved, text)


def _tell(message: dict[str, Any]) -> Any:
    store = _store()
    store.set("told", json.dumps(message))
    return store


def _store() -> Any:
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if not _keep:
        _keep.append(next(rendezvous("env://", timeout=PATIENCE))[0])
    return PrefixStore(f"vireo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", _keep[0])
