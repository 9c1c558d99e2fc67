"""A run's hash, name and folder are functions of what shapes its result."""

import copy
import functools
import re
import subprocess
import sys
from pathlib import Path

import vireo
from vireo import config

BASE = ["experiment=taehv"]


def digest(*words: str) -> str:
    return config.config_hash(config.settings([*BASE, *words]))


def test_hash_is_the_same_in_another_process(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(vireo.__file__).parents[1]))
    code = "from vireo import config; print(config.config_hash(config.settings(['experiment=taehv'])))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert re.fullmatch(r"[0-9a-f]{8}", there) and there == digest()


def test_hash_does_not_depend_on_the_order_of_keys():
    def turned(tree):
        return {k: turned(v) for k, v in reversed(tree.items())} if isinstance(tree, dict) else tree

    settings = config.settings([])
    assert list(turned(settings)) != list(settings)
    assert config.config_hash(turned(settings)) == config.config_hash(settings)


def test_hash_leaves_out_what_does_not_shape_the_result():
    words = ["run=name", "resume=none", "notes=text", "tags=[a]", "allow_changes=[lr]", "allow_targets=[x]"]
    words += ["launcher.processes=1", "launcher.timeout=5", "strategy=single", "logging.every=1", "tracker=none"]
    words += ["validation.every=7", "checkpoint.every=7", "loader.workers=0", "faults.max_consecutive_skips=2"]
    words += ["cache=on", "cache.folder=elsewhere", "cache.memory=0"]
    words += ["paths.outputs=elsewhere", "+model.sampler.chunk=2", "~model.checks", "size=mini"]
    words += ["lr=0.0005", "ema.decay=0.90", "data.flip=0.50"]  # as they are anyway
    assert digest(*words) == digest()


def test_hash_changes_with_what_shapes_the_result():
    settings = config.settings([])
    hashes = {config.config_hash(settings)}
    changes = [
        ("steps", 7), ("lr", 1e-4), ("seed", 1), ("batch_size", 3), ("num_frames", 17), ("precision", "bf16"),
        ("ema.decay", 0.99), ("max_grad_norm", 2.0), ("schedule._target_", "vireo.schedules.Constant"),
        ("freeze_policy.train", ["^decoder"]), ("model.network.num_memblocks", 2), ("model.network.weights", None),
        ("loss.decoder_input", "teacher"), ("data.flip", 0.25), ("optimizer.betas", [0.9, 0.99]), ("adapter", {"a": 1}),
        ("init_from", "somewhere"), ("gradient_accumulation", 2), ("epochs", 2.0), ("experiment", "other"),
        ("faults.max_loss_rise", 3.0),
    ]  # fmt: skip
    for key, value in changes:
        changed = copy.deepcopy(settings)
        *path, last = key.split(".")
        functools.reduce(dict.__getitem__, path, changed)[last] = value
        hashes.add(config.config_hash(changed))
    assert len(hashes) == 1 + len(changes)


def test_hash_of_the_mini_size_is_the_same_wherever_its_world_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    first = config.settings([])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    second = config.settings([])
    assert first["paths"]["data"] != second["paths"]["data"]
    assert first["data"]["root"] == first["paths"]["data"]
    assert config.config_hash(first) == config.config_hash(second)
    assert config.differences(first, second) == []


def test_hash_of_the_full_size_knows_its_data(tmp_path, full):
    (tmp_path / "other").mkdir()
    assert digest(*full) != digest(*full, "paths.data=other")
    assert digest(*full, f"paths.data={tmp_path}/data") == digest(*full)


def test_names():
    assert config.settings([])["run"] == f"mini-{digest()}"
    settings = config.settings(["seed=2", "lr=1e-4", "logging.every=3"])
    assert settings["run"] == f"mini_lr-0.0001_seed-2-{config.config_hash(settings)}"
    assert config.settings(["run=mine"])["run"] == "mine"
    assert config.settings(["freeze-policy=decoder"])["run"].startswith("mini_freeze-policy-decoder-")


def test_names_do_not_depend_on_the_spelling_of_the_words():
    assert config.settings(["seed=2", "lr=1e-4"])["run"] == config.settings(["lr=0.0001", "seed=2"])["run"]


def test_jobs_of_a_sweep_have_folders_of_their_own_whatever_it_varies():
    def name(*words: str, swept: list[str]) -> str:
        return config.settings(words, swept=swept)["run"]

    alone = name("seed=2", swept=[])
    assert name("seed=2", swept=["seed"]) == alone
    first, second = (name("seed=2", f"strategy={option}", swept=["strategy"]) for option in ("ddp", "fsdp"))
    assert first.startswith("mini_strategy-ddp_seed-2-") and second.startswith("mini_strategy-fsdp_seed-2-")
    assert len({first[-8:], second[-8:], alone[-8:]}) == 3
    assert len({name(f"launcher.processes={count}", swept=["launcher.processes"]) for count in (1, 2)}) == 2

    measured = [name("run=m", f"validation.metric={metric}", swept=["validation.metric"]) for metric in ("a", "b")]
    assert [one[:-8] for one in measured] == ["m_metric-a-", "m_metric-b-"]
    assert name("run=m", "lr=1e-4", swept=["lr"]) == name("run=m", "lr=0.0001", "steps=9", swept=["lr"]), "can go on"
    assert name("run=m", "lr=1e-4", swept=["run"]) == "m"
    assert name("run=a${lr}", "lr=1e-4", "seed=2", swept=["lr", "seed"]).startswith("a0.0001_seed-2-")
    assert name("run=a${lr}", "lr=1e-4", swept=["lr"]) == "a0.0001"
    long = {name(f"run={'m' * 70}", f"seed={seed}", swept=["seed"]) for seed in (1, 2)}
    assert len(long) == 2 and all(one.startswith("m" * 70) for one in long)


def test_names_are_short_and_plain():
    words = ['freeze_policy.train=["^encoder\\.1$","a/b c"]', "+loss.mix_probability=0.123456", "tags=[a]", "lr=1e-4"]
    words += ["height=96", "width=96", "seed=12345", "max_grad_norm=0.3", "ema.decay=0.999"]
    settings = config.settings(words)
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,60}", settings["run"])
    assert settings["run"].endswith(f"-{config.config_hash(settings)}")


def test_other_words_for_the_same_values_find_the_same_folder(tmp_path):
    first = config.settings([])
    config.run_folder(first).mkdir(parents=True)
    assert config.settings(["lr=5e-4"])["run"] == first["run"]
    assert config.settings(["lr=2e-4"])["run"] != first["run"]


def test_folder():
    settings = config.settings(["run=mine", "paths.outputs=there"])
    assert config.run_folder(settings) == Path.cwd() / "there" / "taehv" / "mine"


def test_differences():
    old = config.settings(["run=mine"])

    def differences(*words: str, allow: list[str] = []) -> list[str]:  # noqa: B006 - never changed
        return config.differences(old, config.settings(["run=mine", *words]), allow)

    free = ["steps=7", "logging.every=3", "validation.every=9", "checkpoint.keep_last=1", "launcher.processes=2"]
    assert differences(*free, "loader.workers=0", "tracker=none") == []
    assert differences("strategy=single") == []
    assert differences("steps=null", "epochs=2") == []
    assert differences("lr=1e-4") == ["lr: 0.0005 in the run, 0.0001 now"]
    assert differences("lr=1e-4", "seed=3") == [
        "lr: 0.0005 in the run, 0.0001 now",
        "seed: 0 in the run, 3 now",
    ]
    assert differences("lr=1e-4", "seed=3", allow=["lr"]) == ["seed: 0 in the run, 3 now"]
    assert differences("+loss.l1=0.5", allow=["optimizer"]) == ["loss.l1: nothing in the run, 0.5 now"]
    assert differences("+loss.l1=0.5", allow=["loss"]) == []
    # One knob, and all that follows from it.
    assert differences("num_frames=17") == ["data.num_frames: 9 in the run, 17 now", "num_frames: 9 in the run, 17 now"]
