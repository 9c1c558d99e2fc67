"""vireo check environment
vireo check experiment=<recipe> [any override]

`check environment`: versions, GPU and driver, video decoders, disk, shared memory, and what is missing for which
recipe. `check experiment=…`: the config, then the data as training would see it, with the columns and the files that
its dataset can verify (`faults`), for each stage of a chain. Exit code 2 if something is wrong.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

from vireo import config
from vireo.run_folder import PACKAGES
from vireo.verbs import arguments

OPTIONAL = {
    "deepspeed": "strategy=zero2, zero2_offload and zero3 (Linux only)",
    "wandb": "tracker=wandb",
    "tensorboard": "tracker=tensorboard",
    "bitsandbytes": "8-bit optimizers (GPU only)",
    "submitit": "launcher=slurm",
    "hydra-optuna-sweeper": "hydra/sweeper=optuna",
}
MIB = 2**20


def main(words: Sequence[str]) -> int:
    return _environment() if list(words) == ["environment"] else _experiment(words)


def _environment() -> int:
    """Print what this machine has; 2 if something that every recipe needs is missing."""
    missing = []
    print(f"python        {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        version = _version(package)
        print(f"{package:<13} {version or 'MISSING'}")
        if version is None and package != "decord":  # PyAV reads videos where decord has no wheel
            missing.append(package)
    for package, purpose in OPTIONAL.items():
        print(f"{package:<13} {_version(package) or f'not installed; needed for {purpose}'}")
    print(f"decoder       {_decoder()}")
    print(f"GPU           {_gpus()}")
    print(f"CPU           {os.cpu_count()} cores, {_memory()} MiB memory")
    outputs = config.outputs_folder()
    disk = shutil.disk_usage(next(p for p in [outputs, *outputs.absolute().parents] if p.exists()))
    print(f"disk          {disk.free // MIB} MiB free for {outputs}")
    if Path("/dev/shm").exists():
        shared = shutil.disk_usage("/dev/shm").free // MIB
        hint = "" if shared > 512 else "  (little: loader workers may die with a bus error; docker run --shm-size=8g)"
        print(f"shared memory {shared} MiB free{hint}")
    print("\nrecipes at full size:")
    for name in config.experiments():
        problems = config.problems([f"experiment={name}", "size=full"])
        missing_here = "; ".join(problem.message for problem in problems)
        print(f"  {name:<22} {missing_here or 'ready'}")
    if missing:
        print(f"\nmissing: {', '.join(missing)}; `pip install -e .` installs what vireo needs")
    return 2 if missing else 0


def _experiment(words: Sequence[str]) -> int:
    """Print the data of one composition, of a chain each stage's, as training would see it; 2 if it has faults."""
    given = arguments.read(words, ())
    print(f"config        valid ({given.settings['experiment']}, size={given.settings['size']})")
    if given.settings["size"] == "mini":
        from vireo.mini import world

        world.ensure()
    faults: dict[str, None] = {}  # in order, told once for all splits
    for title, settings in _stages(given, words):
        if title:
            print(f"\n{title}")
        faults |= dict.fromkeys(_data(settings))
    if faults:
        print("\nfaults of the data\n" + "\n".join(f"  {fault}" for fault in faults))
    return 2 if faults else 0


def _stages(given: arguments.Arguments, words: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A title and the settings of each stage; of what is no chain, or a run already, none and its own."""
    if given.folder is not None or not given.settings["chain"]:
        yield "", given.settings
        return
    for name, of_stage in config.stages(given.settings["chain"], words).items():
        settings = config.settings(of_stage)
        yield f"{name} ({settings['experiment']})", settings


def _data(settings: dict[str, Any]) -> list[str]:
    """Print what both splits hold; their faults."""
    from vireo import objects, report

    faults: list[str] = []
    for split in ("train", "validation"):
        dataset: Any = objects.dataset(settings, split)
        faults += dataset.faults() if hasattr(dataset, "faults") else []
        print(f"\n{split}")
        for name, value in dataset.describe().items():
            lines = value if isinstance(value, list) else [value]
            print(f"  {name:<14} {report.brief(lines)}")
    return faults


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _decoder() -> str:
    have = [name for name in ("decord", "av") if util.find_spec(name)]
    return " then ".join(have) if have else "NONE: pip install decord av"


def _gpus() -> str:
    """Names, memory and driver by nvidia-smi, which answers without importing torch."""
    if not shutil.which("nvidia-smi"):
        return "none (everything runs on the CPU, at size=mini in minutes)"
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return answer.stdout.strip().replace("\n", "; ") or f"nvidia-smi fails: {answer.stderr.strip()}"


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB
