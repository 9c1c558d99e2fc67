"""Resolved settings: plain, complete, absolute, written and read back, changed."""

import os
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from vireo import config
from vireo.errors import UserError


def plain(value) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or type(value) in (str, int, float, bool)


def test_settings_are_plain_values():
    settings = config.settings(["notes='it: no'", "tags=[a,b]"])
    assert plain(settings)
    assert settings["precision"] == "auto" and settings["size"] == "mini"
    assert settings["schedule"]["warmup_steps"] == settings["warmup_steps"]
    left = [key for key, value in settings.items() if key != "interpolations" and "${" in str(value)]
    assert left == []


def test_a_node_that_several_read_is_resolved_for_each(conf):
    """The noise schedule belongs to the model; loss and sampler get a copy, as diffusion recipes have it."""
    (conf / "model/toy.yaml").write_text(
        "defaults: [taehv, _self_]\n"
        "noise_schedule:\n  _target_: vireo.schedules.Linear\n  warmup_steps: ${warmup_steps}\n"
        "inputs: [condition_latents, prompt_embeds]\n"
    )
    words = ["model=toy", "+loss.l1=${model.noise_schedule}", "tags=${model.inputs}"]
    assert config.problems(words) == []
    settings = config.settings(words)
    assert settings["loss"]["l1"] == {"_target_": "vireo.schedules.Linear", "warmup_steps": 5}
    assert settings["tags"] == ["condition_latents", "prompt_embeds"]
    changed = config.change(settings, ["warmup_steps=3"])
    assert changed["loss"]["l1"] == changed["model"]["noise_schedule"]
    assert changed["loss"]["l1"]["warmup_steps"] == 3


def test_folders_are_absolute(tmp_path, full):
    settings = config.settings([*full, "paths.outputs='~/runs'"])
    assert settings["paths"] == {
        "data": str(tmp_path / "data"),
        "weights": str(tmp_path / "weights"),
        "outputs": os.path.expanduser("~/runs"),
    }
    assert settings["data"]["root"] == str(tmp_path / "data")
    assert "machine" not in settings


def test_text_and_file(tmp_path):
    settings = config.settings(["notes='yes: no # 1e-4'", "optimizer.eps=1e-9"])
    assert config.from_text(config.to_text(settings)) == settings
    path = tmp_path / "resolved.yaml"
    config.save_resolved(settings, path)
    assert config.load_resolved(path) == settings
    assert list(tmp_path.glob(".resolved*")) == []
    assert OmegaConf.to_container(OmegaConf.load(path))["notes"] == "yes: no # 1e-4"


def test_files_that_are_no_resolved_config(tmp_path):
    path = tmp_path / "resolved.yaml"
    with pytest.raises(UserError, match="cannot be read"):
        config.load_resolved(path)
    path.write_text("a: [1")
    with pytest.raises(UserError, match="not valid YAML"):
        config.load_resolved(path)
    path.write_text("a: 1")
    with pytest.raises(UserError, match="not the resolved config of a run"):
        config.load_resolved(path)


def test_a_run_of_an_older_version_is_told_what_to_do(tmp_path):
    settings = config.settings([])
    del settings["cache"], settings["loader"]["prefetch"]
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=r"lacks loader\.prefetch, cache\. What it trained still serves.*init_from="):
        config.load_resolved(path)


def test_a_run_from_elsewhere_calls_nothing_strange(tmp_path):
    settings = config.settings([])
    settings["tracker"]["_target_"] = "os.system"
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=r"calls os\.system, which no config may call"):
        config.load_resolved(path)


def test_the_launcher_reads_the_number_of_processes_from_the_environment(monkeypatch):
    assert config.settings([])["launcher"]["processes"] == 1
    monkeypatch.setenv("VIDEO_TRAIN_PROCESSES", "")
    assert config.settings([])["launcher"]["processes"] == 1
    assert config.settings(["launcher=slurm"])["launcher"]["processes"] == "auto"
    monkeypatch.setenv("VIDEO_TRAIN_PROCESSES", "3")
    assert config.settings([])["launcher"]["processes"] == 3
    monkeypatch.setenv("VIDEO_TRAIN_PROCESSES", "auto")
    assert config.settings([])["launcher"]["processes"] == "auto"
    assert config.settings(["launcher.processes=2"])["launcher"]["processes"] == 2


def test_outputs_folder(monkeypatch):
    assert config.outputs_folder() == Path("outputs")
    monkeypatch.setenv("VIREO_OUTPUTS", "/large/disk")
    assert config.outputs_folder() == Path("/large/disk")


@pytest.mark.full  # it makes a world, as tests/mini/test_world.py does
def test_mini_world_is_where_it_will_be_made(tmp_path, monkeypatch):
    from vireo.mini import world

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(world, "PARTS", ())
    paths = config.settings([])["paths"]
    made = world.ensure()
    assert paths["data"] == str(made / "data") and paths["weights"] == str(made / "weights")


def test_changes_are_followed_by_what_depends_on_them(tmp_path):
    settings = config.settings(["run=mine"])
    changed = config.change(settings, ["num_frames=17", "paths.data=other", "optimizer.eps=1e-6"])
    assert changed["data"]["num_frames"] == 17 and changed["model"]["checks"]["num_frames"]["num_frames"] == 17
    assert changed["data"]["root"] == str(tmp_path / "other") and changed["run"] == "mine"
    assert changed["optimizer"]["eps"] == 1e-6
    assert settings["data"]["num_frames"] == 9
    assert config.change(settings, []) == settings
    assert config.change(changed, ["num_frames=9"])["data"]["num_frames"] == 9


def test_changes_are_checked():
    settings = config.settings([])
    for word, said in [
        ("num_framez=17", "Did you mean num_frames?"),
        ("num_frames=12", "9 or 16"),
        ("lr=abc", "expected a number"),
        ("model=taehv", "only values can be changed here"),
        ("+model.network.widht=3", "has no argument widht"),
    ]:
        with pytest.raises(UserError) as told:
            config.change(settings, [word])
        assert said in str(told.value)


def test_what_may_leave_the_machine(tmp_path, full):
    shown = config.public(config.settings(full))
    assert str(tmp_path) not in str(shown)
    assert shown["data"]["root"] == "${paths.data}" and shown["lr"] == 3e-4
    assert shown["model"]["network"]["weights"] == "${paths.weights}/taehv/taecvx"
