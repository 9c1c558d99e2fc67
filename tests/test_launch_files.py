"""The files for people who launch by hand are printed from conf/strategy: `python -m tests.test_launch_files`."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests import runs
from tests.strategies.ops import skip_without_ops
from tests.test_ranks import ROOT, environment
from vireo import config

LAUNCH = ROOT / "launch"
WORDS = [*runs.TINY, "batch_size=1", "steps=3", "checkpoint.every=null", "validation.every=null"]
OPTIONS = sorted(path.stem for path in (config.conf_dir() / "strategy").glob("*.yaml"))


def option(name: str) -> dict:
    """An option of conf/strategy with what it inherits, and its interpolations as they are written."""
    own = yaml.safe_load((config.conf_dir() / "strategy" / f"{name}.yaml").read_text())
    (*bases, _) = own.pop("defaults", ["_self_"])
    merged: dict = {}
    for layer in [*(option(base) for base in bases), own]:
        merge(merged, layer)
    return merged


def merge(into: dict, layer: dict) -> None:
    for key, value in layer.items():
        if isinstance(value, dict):
            merge(into.setdefault(key, {}), value)
        else:
            into[key] = value


def deepspeed(name: str) -> str | None:
    """DeepSpeed's JSON of an option; what a run fills in is "auto", as accelerate and transformers say it."""
    node = option(name).get("config")
    if node is None:
        return None
    del node["torch_autocast"]  # of the run's precision; there is no "auto" for it
    filled = {key: "auto" if str(value).startswith("${") else value for key, value in node.items()}
    return json.dumps(filled, indent=2) + "\n"


def accelerate(name: str) -> str:
    """accelerate's config file of an option. vireo spreads the model itself; accelerate only starts the processes."""
    file = f"launch/accelerate/{name}.yaml"
    command = f"accelerate launch --config_file {file} --num_processes 8 train.py strategy={name}"
    made: dict = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU"}
    if deepspeed(name):
        made["distributed_type"] = "DEEPSPEED"
        made["deepspeed_config"] = {"deepspeed_config_file": f"launch/deepspeed/{name}.json", "zero3_init_flag": False}
    return f"# {command} …\n{yaml.safe_dump({**made, 'num_machines': 1}, sort_keys=False)}"


def files() -> dict[Path, str]:
    made = {LAUNCH / "accelerate" / f"{name}.yaml": accelerate(name) for name in OPTIONS if name != "single"}
    made |= {LAUNCH / "deepspeed" / f"{name}.json": text for name in OPTIONS if (text := deepspeed(name))}
    return made


def test_they_are_what_conf_strategy_says():
    there = {*(LAUNCH / "accelerate").glob("*"), *(LAUNCH / "deepspeed").glob("*")}
    assert there == files().keys()
    for path, text in files().items():
        assert path.read_text() == text, f"{path} differs from conf/strategy: python -m tests.test_launch_files"


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "single"])
def test_accelerate_reads_them(name):
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(str(LAUNCH / "accelerate" / f"{name}.yaml"))
    assert read.distributed_type.value == ("DEEPSPEED" if name.startswith("zero") else "MULTI_GPU")


@pytest.mark.parametrize("name", [name for name in OPTIONS if name.startswith("zero")])
def test_a_run_s_numbers_are_in_deepspeed_s_config(name):
    words = ["experiment=taehv", f"strategy={name}", "batch_size=3", "gradient_accumulation=4", "max_grad_norm=0.5"]
    made = config.settings([*words, "precision=bf16"])["strategy"]["config"]
    assert made["train_micro_batch_size_per_gpu"] == 3 and made["gradient_accumulation_steps"] == 4
    assert made["gradient_clipping"] == 0.5 and made["torch_autocast"] == "bf16"
    assert made["zero_optimization"]["stage"] == int(name[4])
    assert made["zero_optimization"]["use_multi_rank_bucket_allreduce"] is False  # docs/scaling.md counts on it


def check_started(command: list, tmp_path: Path) -> None:
    """Two processes that train as vireo's own do."""
    further = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}  # how many processes DeepSpeed takes a CPU for
    ran = subprocess.run(
        [*map(str, command), *WORDS], env=environment(tmp_path, **further), cwd=ROOT, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (folder,) = (path.parent for path in tmp_path.rglob("resolved.yaml"))
    assert (folder / "logs" / "rank_1.log").exists()
    alone = runs.train(tmp_path / "alone", "batch_size=2", *WORDS[-3:])
    assert [row["loss"] for row in runs.metrics(folder) if "loss" in row] == pytest.approx(
        [row["loss"] for row in runs.metrics(alone) if "loss" in row], rel=1e-4
    )


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in OPTIONS if name.startswith(("zero", "fsdp"))])
def test_accelerate_starts_two_processes_with_them(name, tmp_path):
    if name.startswith("zero"):
        skip_without_ops()
    file = LAUNCH / "accelerate" / f"{name}.yaml"
    command = ["accelerate", "launch", "--config_file", file, "--num_processes", "2", "train.py", f"strategy={name}"]
    check_started(command, tmp_path)


@pytest.mark.full
def test_deepspeed_starts_two_processes(tmp_path):
    skip_without_ops()
    check_started([LAUNCH / "deepspeed.sh", "strategy=zero2"], tmp_path)


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
        print(path)
