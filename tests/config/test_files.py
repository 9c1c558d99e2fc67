"""The shipped YAML files: every experiment works in both sizes, and each file keeps the rules of the tree."""

import dataclasses
import inspect
import re
import typing
from pathlib import Path

import pytest
import yaml

from vireo import config
from vireo.config.schema import Config
from vireo.data.stream import loader

FILES = sorted(path.relative_to(config.conf_dir()) for path in config.conf_dir().rglob("*.yaml"))
FILES = [path for path in FILES if path != Path("local/default.yaml")]


def lines(path: Path) -> list[str]:
    return (config.conf_dir() / path).read_text().splitlines()


def content(path: Path) -> dict:
    return yaml.safe_load((config.conf_dir() / path).read_text())


def test_the_tree_is_not_empty():
    assert len(FILES) > 20 and "ip2p_video" in config.experiments()


@pytest.mark.parametrize("experiment", config.experiments())
@pytest.mark.parametrize("size", ["mini", "full"])
def test_experiments_compose_validate_and_resolve(experiment, size, full):
    words = [f"experiment={experiment}", *(full if size == "full" else ["size=mini"])]
    assert config.problems(words) == []
    settings = config.settings(words)
    assert settings["experiment"] == experiment and settings["size"] == size
    assert config.from_text(config.to_text(settings)) == settings


@pytest.mark.parametrize(
    "words",
    [
        *[[f"schedule={name}"] for name in ("constant", "cosine", "linear")],
        *[[f"freeze-policy={name}"] for name in ("all", "decoder", "encoder", "unet", "unet_text_encoder")],
        ["freeze-policy=unet_brushnet"],
        ["freeze-policy=motion_modules"],
        *[[f"tracker={name}"] for name in ("none", "tensorboard", "wandb")],
        *[[f"cache={name}"] for name in ("on", "off")],
        ["strategy=single"],
        ["optimizer=adamw"],
        ["optimizer.moments=8bit"],
        ["model=ip2p_video_text", "freeze-policy=unet_text_encoder", "loss=ip2p"],
        ["data=clips"],
        ["debug=quick"],
    ],
    ids=lambda words: words[0],
)
def test_other_options_validate_too(words):
    assert config.problems(words) == []


def test_the_cache_is_switched_by_its_group_and_off_by_default():
    """`on` and `off` are words here, not the truth values that YAML reads them as."""
    assert config.settings(["cache=on"])["cache"]["enabled"] is True
    assert config.settings(["cache=off"])["cache"]["enabled"] is config.settings([])["cache"]["enabled"] is False
    outputs = config.settings(["paths.outputs=/runs"])
    assert outputs["cache"]["folder"] == "/runs/cache"


def test_freeze_policy_is_chosen_with_a_hyphen_and_changed_with_an_underscore():
    assert config.settings(["freeze-policy=decoder"])["freeze_policy"]["train"] == [r"^decoder\."]
    assert config.settings(['freeze_policy.train=["^encoder"]'])["freeze_policy"]["train"] == ["^encoder"]


def test_the_first_convolution_can_learn_faster():
    words = ["experiment=ip2p_video", "freeze_policy.groups.conv_in.lr_scale=10"]
    assert config.problems(words) == []
    assert config.settings(words)["freeze_policy"]["groups"]["conv_in"]["lr_scale"] == 10


def test_video_inpainting_is_trained_as_published(full):
    words = [*full, "experiment=diffueraser"]
    chain = config.stages(config.settings(words)["chain"], words)
    first, second = (config.settings(own) for own in chain.values())
    assert [stage["experiment"] for stage in (first, second)] == ["diffueraser_stage1", "diffueraser_stage2"]
    assert [stage["num_frames"] for stage in (first, second)] == [10, 22]
    assert [stage["model"]["sampler"]["num_inference_steps"] for stage in (first, second)] == [50, 20]
    assert [stage["freeze_policy"]["train"] for stage in (first, second)] == [
        [r"^unet\.", r"^brushnet\."],
        [r"\.motion_modules\."],
    ]
    wanted = {"lr": 5e-6, "steps": 20000, "height": 512, "width": 512, "max_grad_norm": 1.0, "batch_size": 1}
    for stage in (first, second):
        assert {key: stage[key] for key in wanted} == wanted and stage["gradient_accumulation"] == 1
        assert stage["checkpoint"]["every"] == stage["validation"]["every"] == 2000 and stage["validation"]["at_start"]
        assert stage["schedule"]["_target_"].endswith("Constant") and stage["warmup_steps"] == 0
        assert stage["optimizer"]["betas"] == [0.9, 0.999] and stage["optimizer"]["weight_decay"] == 0.01
        assert stage["model"]["noise_schedule"]["prediction_type"] == "epsilon"
        assert stage["data"]["repeat"] == {"davis": 10, "ytvos": 1} and stage["data"]["prompt"] == "clean background"
        judged = stage["validation"]["metric"], stage["validation"]["higher_is_better"]
        assert stage["data"]["annotations"] and judged == ("loss", False), "the truth in an object's hole is the object"
    small = config.settings(["experiment=diffueraser_stage2"])
    assert not small["data"]["annotations"] and small["validation"]["metric"] == "hole_psnr"
    assert small["validation"]["higher_is_better"]


def test_the_video_editor_is_trained_as_published(full):
    video, image = (config.settings([*full, f"experiment={name}"]) for name in ("ip2p_video", "ip2p_image"))
    wanted = {"lr": 5e-5, "steps": 20000, "height": 256, "width": 256, "max_grad_norm": 1.0, "num_frames": 20}
    assert {key: video[key] for key in wanted} == wanted
    assert video["batch_size"] * video["gradient_accumulation"] == 16
    assert video["schedule"]["_target_"].endswith("Constant") and video["optimizer"]["weight_decay"] == 0.01
    assert (
        video["loss"]["condition_dropout"] == 0.05 and video["model"]["noise_schedule"]["prediction_type"] == "epsilon"
    )
    assert image["num_frames"] == image["model"]["network"]["num_condition_frames"] == 1
    differ = {key for key in video if video[key] != image[key]}
    assert differ <= {"experiment", "num_frames", "model", "data", "run"}


def test_a_size_changes_numbers_and_paths_and_nothing_else(full):
    mini, real = config.settings([]), config.settings(full)
    assert mini["model"]["network"]["_target_"] == real["model"]["network"]["_target_"]
    assert (mini["steps"], mini["height"]) != (real["steps"], real["height"])
    assert real["lr"] == 3e-4 and real["steps"] == 10000 and real["optimizer"]["betas"] == [0.9, 0.95]
    assert real["batch_size"] * real["gradient_accumulation"] == 4 and real["max_grad_norm"] == 1.0


def test_mini_network_is_the_one_whose_weights_are_shipped():
    from vireo.mini.autoencoders import TAEHV_ARGUMENTS

    network = config.settings([])["model"]["network"]
    assert {key: network[key] for key in TAEHV_ARGUMENTS} == TAEHV_ARGUMENTS


def test_the_command_line_wins_over_everything(full):
    assert config.settings(["debug=quick", "steps=9"])["steps"] == 9
    assert config.settings(["model.network.num_memblocks=2"])["model"]["network"]["num_memblocks"] == 2
    assert config.settings([*full, "height=256"])["data"]["height"] == 256


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_are_short_and_say_what_they_are_for(path):
    text = lines(path)
    assert len(text) < 45 and max(map(len, text)) <= 120
    comments = [line for line in text if line.startswith("# ") and not line.startswith("# @package")]
    assert comments, "no comment says what the file is for"
    if any("@package" in line for line in text):
        assert text[0].startswith("# @package"), "Hydra reads the package from the very first line only"


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] in ("experiment", "freeze-policy")], ids=str)
def test_packages(path):
    package = "_global_" if path.parts[0] == "experiment" else "freeze_policy"
    assert lines(path)[0] == f"# @package {package}"


def test_no_file_is_moved_away_from_the_keys_that_it_names():
    """In another package than `model`, `${model.network.variant}` of a file in conf/model would be another file's."""
    for path in FILES:
        for line in lines(path):
            found = re.search(r"^[^#]*?([\w/-]+)@(\w+)(.*)", line)
            if not found:
                continue
            moved, package, option = found.groups()
            if package == "_here_":
                assert Path(moved).parent == Path("/") / path.parent, f"{path}: {line}"
            else:
                assert package in (path.parent.name, "_global_") or f"/{package}/" in option, f"{path}: {line}"


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "experiment"], ids=str)
def test_experiments_open_with_their_command_and_are_called_like_their_file(path):
    assert lines(path)[1].startswith(f"# python train.py experiment={path.stem}")
    assert content(path)["experiment"] == path.stem
    assert config.describe_experiments()[path.stem]
    mini = Path("sizes/mini/experiment") / path.name
    assert content(mini)["mini_of"] == path.stem


@pytest.mark.parametrize("path", FILES, ids=str)
def test_own_values_come_after_those_of_other_files(path):
    found = content(path)
    others = [entry for entry in found.get("defaults", ()) if not str(next(iter(entry), "")).startswith("override")]
    if len(found) > 1 and [entry for entry in others if entry != "_self_"] and path != Path("config.yaml"):
        assert found["defaults"][-1] == "_self_"


def leaves(tree: typing.Any, prefix: str = "") -> list[tuple[str, typing.Any]]:
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in leaves(value, f"{prefix}{key}.")]
    return [(prefix.rstrip("."), tree)]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_boolean_where_text_is_meant(path):
    """`precision: no` is false in YAML: booleans may stand only where the schema or the signature says bool."""
    schema_bools = {
        f"{name}.{inner}"
        for name, node in typing.get_type_hints(Config).items()
        if hasattr(node, "__dataclass_fields__")
        for inner, hint in typing.get_type_hints(node).items()
        if hint is bool
    }
    known = {*schema_bools, "enabled", "_partial_", "find_unused_parameters", "job.chdir"}
    known |= {
        "network.gradient_checkpointing",
        "detach",
        "offload",
        "network.compile",
        "network.channels_last",
        "sampler.dynamic_guidance",
    }
    known |= {"encoder.tiling", "encoder.slicing", "dora", "rslora", "float8", "skip_padding"}
    known |= {"network.learned_positions", "network.vae_pos_embed"}
    known |= {"empty_captions", "validation_id_token", "annotations"}
    known |= {"prefer_tagged", "no_background", "with_face", "subject_mask"}
    deepspeed = {"overlap_comm", "contiguous_gradients", "offload_optimizer.pin_memory"}
    deepspeed |= {"use_multi_rank_bucket_allreduce"}
    known |= {f"config.zero_optimization.{key}" for key in deepspeed}
    known |= {"config.zero_allow_untested_optimizer", "config.zero_force_ds_cpu_optimizer"}
    known |= {"stderr_to_stdout", "launcher.slurm.sbatch.requeue"}
    for key, value in leaves(content(path)):
        assert not isinstance(value, bool) or key in known, f"{key} is {value}"
        assert not isinstance(key, bool)


def test_every_default_of_the_schema_is_legal():
    """Ranges and types of the schema hold for its own defaults."""
    assert config.problems(["debug=quick"]) == []


def test_every_key_of_the_schema_is_read():
    code = "\n".join(
        path.read_text() for path in Path(config.__file__).parents[1].rglob("*.py") if path.name != "schema.py"
    )
    files = "\n".join(line for path in FILES for line in lines(path))
    passed = {f"loader.{name}" for name in inspect.signature(loader).parameters}  # the node as a whole
    for key in _keys(Config):
        name = key.rpartition(".")[2]
        read = f'["{name}"]' in code or f'.get("{name}")' in code or f"${{{key}}}" in files
        assert read or key in passed, f"nobody reads {key}"


def _keys(kind, above=""):
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from _keys(field.type, f"{above}{field.name}.")
        else:
            yield above + field.name


def test_nothing_of_a_machine_is_in_the_files():
    for path in FILES:
        for line in lines(path):
            if path != Path("local/example.yaml"):
                assert "/home/" not in line and "/root/" not in line and "/tmp/" not in line
