"""The files for people who launch by hand are printed from conf/strategy: `python -m tests.test_launch_files`."""

import json
from pathlib import Path

import pytest
import yaml

from vireo import config

LAUNCH = Path(__file__).parents[1] / "launch"
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


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
        print(path)
