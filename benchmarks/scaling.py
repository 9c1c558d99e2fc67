"""python benchmarks/scaling.py [--quick] [--strategies ddp,zero2]

What it costs to start, to share and to sweep, each with one thread a process:
1. samples/s of one and of two processes for each strategy (a compute-bound mini TAEHV, the same batch on each);
2. the time from `python train.py` to the first step, against the bare imports that the recipe cannot do without;
3. a sweep of 20 tiny runs, against the same runs started by hand one after the other.
Ratios are of neighbours in time. --quick (some minutes): fewer steps, pairs and jobs. On a busy machine the efficiency
of two processes is not measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from paired import at_least, at_most, interval
from vireo import config

ROOT = Path(__file__).parents[1]
EFFICIENCY, START, SWEEP = 0.85, 1.5, 1.3  # bounds
ONE_ROUND = "not judged, one round"  # whose interval is a point
IDLE = 1.7  # cores that have to be idle for the first measurement

# What no program that trains the recipe with these libraries can do without; torch's optimizers import torch._dynamo.
IMPORTS = {
    "taehv": "torch, torch._dynamo, accelerate, av, PIL.Image",
    "ip2p_video": "torch, torch._dynamo, accelerate, av, PIL.Image; "
    "from diffusers import AutoencoderKL, UNet2DConditionModel; from transformers import CLIPTextModel, CLIPTokenizer",
}
QUIET = ["tracker=none", "loader.workers=0", "validation.at_start=false", "validation.every=null"]
QUIET += ["checkpoint.every=null", "logging.every=1", "validation.clips=1"]
HEAVY = ["experiment=taehv", "batch_size=4", "height=64", "width=64", *QUIET]
TINY = ["experiment=taehv", "model.network.weights=null", "++model.network.encoder_width=8", "batch_size=1", "steps=2"]
TINY += ["++model.network.decoder_widths=[8,8,8,8]", "++model.network.num_memblocks=1", "height=32", "width=32", *QUIET]


def command(*words: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *words]


def environment(outputs: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "VIREO_OUTPUTS": str(outputs)}


def run(outputs: Path, *words: str) -> None:
    """Raises RuntimeError with what a command that failed has said."""
    ended = subprocess.run(command(*words), env=environment(outputs), capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}")


def rows(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def idle_cores(seconds: float = 2.0) -> float:
    """Cores that nobody used for a while, of those that this process may use (Linux)."""

    def idle() -> float:
        return int(Path("/proc/stat").read_text().split("\n")[0].split()[4]) / os.sysconf("SC_CLK_TCK")

    before = idle()
    time.sleep(seconds)
    return (idle() - before) / seconds


def samples_per_second(strategy: str, processes: int, steps: int, outputs: Path) -> float:
    """Median over the steps after the first three, of all processes together."""
    name = f"{strategy}-{processes}-{time.monotonic_ns()}"
    words = [f"strategy={strategy}", f"launcher.processes={processes}", f"steps={steps}", f"run={name}"]
    run(outputs, *HEAVY, *words)
    found = [row["seconds_per_step"] for row in rows(outputs / "taehv" / name) if "seconds_per_step" in row]
    return 4 * processes / statistics.median(found[3:])


def measure_strategies(names: list[str], steps: int, rounds: int, outputs: Path) -> None:
    print(f"\nsamples/s, one thread a process, {steps} steps, {rounds} rounds")
    for name in names:
        pairs, quiet = [], True
        for _ in range(rounds):
            quiet &= idle_cores() >= IDLE
            both = 1 if name == "single" else 2
            pairs.append([samples_per_second(name, processes, steps, outputs) for processes in range(1, both + 1)])
            quiet &= idle_cores() >= IDLE
        said = "  ".join(f"{statistics.median(column):7.2f}" for column in zip(*pairs, strict=True))
        if name == "single":
            print(f"{name:<14} {said}")
            continue
        efficiencies = [two / (2 * one) for one, two in pairs]
        low, high = interval(efficiencies)
        said += f"  efficiency {statistics.median(efficiencies):.2f} [{low:.2f}, {high:.2f}]"
        if name == "ddp":
            busy = f">= {EFFICIENCY}: not measured, two cores were not idle"
            judged = at_least(EFFICIENCY, low, high) if len(pairs) > 1 else f">= {EFFICIENCY}: {ONE_ROUND}"
            said += f"  {judged if quiet else busy}"
        print(f"{name:<14} {said}", flush=True)


def seconds_to_first_step(experiment: str, outputs: Path) -> float:
    """Wall time from the command to the row of step 1; the run is stopped then."""
    name = f"start-{time.monotonic_ns()}"
    words = [f"experiment={experiment}", *QUIET, "batch_size=1", "cache=off", f"run={name}"]
    began = time.perf_counter()
    child = subprocess.Popen(
        command(*words), env=environment(outputs), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not rows(outputs / experiment / name):
        if child.poll() is not None:
            raise RuntimeError(f"{' '.join(words)} ended with {child.returncode} before its first step")
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    child.terminate()
    child.wait()
    return seconds


def seconds_of(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    return time.perf_counter() - began


def measure_start(pairs: int, outputs: Path) -> None:
    print(f"\nfrom the command to the first step, {pairs} pairs")
    for experiment, imports in IMPORTS.items():
        found = []
        for _ in range(pairs):
            found.append((seconds_to_first_step(experiment, outputs), seconds_of(f"import {imports}")))
        compare(experiment, "first step", "bare imports", found, START)


def measure_sweep(jobs: int, rounds: int, outputs: Path) -> None:
    print(f"\na sweep of {jobs} tiny runs, {rounds} rounds")
    found = []
    for number in range(rounds):
        seeds = [str(1000 * number + seed) for seed in range(jobs)]
        began = time.perf_counter()
        run(outputs / "swept", "-m", *TINY, f"seed={','.join(seeds)}")
        swept = time.perf_counter() - began
        began = time.perf_counter()
        for seed in seeds:
            run(outputs / "by_hand", *TINY, f"seed={seed}")
        found.append((swept, time.perf_counter() - began))
    compare("sweep", "swept", "by hand", found, SWEEP)


def compare(title: str, a: str, b: str, found: list[tuple[float, float]], bound: float) -> None:
    ratios = [one / two for one, two in found]
    low, high = interval(ratios)
    seconds = [statistics.median(column) for column in zip(*found, strict=True)]
    print(
        f"{title:<14} {a} {seconds[0]:.1f} s, {b} {seconds[1]:.1f} s, ratio {statistics.median(ratios):.2f} "
        f"[{low:.2f}, {high:.2f}]  {at_most(bound, low, high) if len(found) > 1 else f'<= {bound}: {ONE_ROUND}'}",
        flush=True,
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--strategies", help="default: all")
    given = arguments.parse_args()
    there = sorted(path.stem for path in (config.conf_dir() / "strategy").glob("*.yaml"))
    names = given.strategies.split(",") if given.strategies else there
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder)
        run(outputs, *TINY)  # makes the mini world
        measure_strategies(names, 8 if given.quick else 20, 1 if given.quick else 5, outputs)
        measure_start(2 if given.quick else 10, outputs)
        measure_sweep(3 if given.quick else 20, 1 if given.quick else 3, outputs)


if __name__ == "__main__":
    main()
