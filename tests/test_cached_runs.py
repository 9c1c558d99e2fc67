"""Runs and verbs with the cache, on a toy recipe."""

import json
import os
import re
import signal

import pytest

from tests import runs
from tests.caching import Latents, write_picture, write_pictures
from vireo import cache, config, digests
from vireo.errors import UserError
from vireo.verbs import prepare_cache
from vireo.verbs.arguments import Arguments

CACHED = 5 * 4 + 3  # pictures and texts


@pytest.fixture(autouse=True)
def own_user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    digests._remembered.clear()


@pytest.fixture
def data(tmp_path):
    return write_pictures(tmp_path / "data")


def settings(tmp_path, *words, encoder="Latents", **options):
    toy = {name: {"_target_": f"tests.caching.{name}"} for name in ("LatentNetwork", "NextLatents", "NextPicture")}
    made = config.settings([*runs.TINY, "size=full", f"paths.outputs={tmp_path / 'outputs'}", f"paths.data={tmp_path}",
                            f"paths.weights={tmp_path}", "strategy=single", *words])  # fmt: skip
    model = {
        "network": toy["LatentNetwork"],
        "encoder": {"_target_": f"tests.caching.{encoder}"},
        "sampler": toy["NextPicture"],
    }
    node = {"_target_": "tests.caching.Pictures", "root": str(tmp_path / "data"), **options}
    return {**made, "model": model, "loss": toy["NextLatents"], "data": node, "allow_targets": ["tests"],
            "run": "cached" if made["cache"]["enabled"] else "plain"}  # fmt: skip


def start(settings, name=None, sabotage=None):
    """A run's folder and its exit code."""
    folder = config.run_folder({**settings, "run": name or settings["run"]})
    folder.mkdir(parents=True, exist_ok=True)
    config.save_resolved(settings, folder / "resolved.yaml")
    return folder, runs.work(folder, sabotage)


def entries(tmp_path):
    return list(cache.entries(tmp_path / "outputs" / "cache"))


def test_cached_and_plain_runs_are_equal(tmp_path, data):
    plain, code = start(settings(tmp_path, "cache=off"))
    assert code == 0 and not (tmp_path / "outputs" / "cache").exists()
    cached, code = start(settings(tmp_path, "cache=on"))
    assert code == 0, (cached / "train.log").read_text()
    assert len(entries(tmp_path)) == CACHED
    one, two = runs.metrics(plain), runs.metrics(cached)
    assert len(one) == len(two) > 8
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5)

    # With the complete cache neither training nor validation touches weights, and numbers are the same to the bit.
    again, code = start(settings(tmp_path, "cache=on", encoder="NeverLoaded"), "again")
    assert code == 0, (again / "train.log").read_text()
    assert runs.metrics(again) == two


def test_a_cached_run_resumes_bitwise(tmp_path, data):
    straight, code = start(settings(tmp_path, "cache=on"))
    assert code == 0, (straight / "train.log").read_text()
    killed, code = start(settings(tmp_path, "cache=on"), "killed", sabotage=runs.die_at(5))
    assert code == -signal.SIGKILL
    _, code = start(settings(tmp_path, "cache=on", "loader.workers=2"), "killed")
    assert code == 0 and runs.metrics(killed) == runs.metrics(straight)
    weights = [folder / "export" / "toy.safetensors" for folder in (straight, killed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_half_full_cache_is_filled_up_and_a_damaged_entry_survived(tmp_path, data):
    straight, _ = start(settings(tmp_path, "cache=on"))
    paths = sorted(entries(tmp_path))
    for path in paths[::2]:
        path.unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:-1] + b"\x7f")
    again, code = start(settings(tmp_path, "cache=on", "cache.memory=0"), "again")
    log = (again / "train.log").read_text()
    assert code == 0 and "12 of 23 entries are missing" in log and "checksum is wrong" in log
    for a, b in zip(runs.metrics(straight), runs.metrics(again), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_a_stop_while_filling_can_be_resumed(tmp_path, data):
    def stop_at_the_third_picture():
        original, seen = Latents.encode, []

        def encode(self, output, values):
            seen.append(output)
            if len(seen) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, output, values)

        Latents.encode = encode

    folder, code = start(settings(tmp_path, "cache=on", "cache.batch_size=2"), sabotage=stop_at_the_third_picture)
    assert code == 75 and 0 < len(entries(tmp_path)) < CACHED and not (folder / "checkpoints").exists()
    _, code = start(settings(tmp_path, "cache=on"))
    assert code == 0 and len(entries(tmp_path)) == CACHED


def test_the_cache_does_not_shape_a_run():
    changes = ["cache=on", "cache.folder=/elsewhere", "cache.verify=bytes", "cache.memory=7", "cache.batch_size=2"]
    assert config.config_hash(config.settings(changes)) == config.config_hash(config.settings([]))
    assert config.settings(changes)["cache"] == {
        "enabled": True, "folder": "/elsewhere", "verify": "bytes", "memory": 7, "batch_size": 2,
    }  # fmt: skip


def test_compositions_with_other_data_or_encoders_have_other_manifests():
    words = ([], ["height=32"], ["model=taehv_wan"])
    names = {config.cache_name(config.settings(["experiment=taehv", *more])) for more in words}
    assert len(names) == 3
    other = config.settings(["experiment=taehv", "lr=1", "seed=3"])
    assert config.cache_name(other) in names


# ------------------------------------------------------------------ vireo prepare cache=…


def prepare(action, made):
    digests._remembered.clear()  # as in another process
    return prepare_cache.main(Arguments(made, None, {}), action)


def test_prepare_fills_and_status_says_so(tmp_path, data, capsys):
    assert prepare("status", settings(tmp_path)) == 0
    assert f"{CACHED} missing, new: '', 0_0.raw, 0_1.raw, …" in capsys.readouterr().out
    assert prepare("fill", settings(tmp_path)) == 0
    assert f"{CACHED} entries, {CACHED} of them new" in capsys.readouterr().out
    assert prepare("status", settings(tmp_path, encoder="NeverLoaded")) == 0
    told = capsys.readouterr().out
    assert re.search(r"frame_moments +15 +15 +0", told) and "missing," not in told
    assert f"{CACHED} entries" in told and "0 of them nobody asks for" in told
    assert prepare("verify", settings(tmp_path)) == 0
    assert f"{CACHED} entries are good" in capsys.readouterr().out


def test_status_says_what_changed(tmp_path, data, capsys):
    prepare("fill", settings(tmp_path))
    write_picture(data / "0_1.raw", 250)
    prepare("status", settings(tmp_path))
    assert "1 missing, the file's content: 0_1.raw" in capsys.readouterr().out
    write_picture(data / "0_1.raw", 0)
    write_pictures(data)
    prepare("status", settings(tmp_path, flip=True))
    assert "20 missing, flip false -> true: 0_0.raw" in capsys.readouterr().out
    assert len(entries(tmp_path)) == CACHED


def test_prune_removes_what_an_edit_left_and_nothing_else(tmp_path, data, capsys):
    prepare("fill", settings(tmp_path))
    prepare("fill", settings(tmp_path, flip=True))
    there = len(entries(tmp_path))
    assert there == CACHED + 20
    write_picture(data / "0_1.raw", 250)
    prepare("fill", settings(tmp_path))
    capsys.readouterr()
    assert prepare("prune", settings(tmp_path)) == 0
    # The flipped entry of the old file is listed by the other composition until that is filled again.
    assert re.search(r"removed 1 entries \(0\.0 MiB\)", capsys.readouterr().out)
    assert len(entries(tmp_path)) == there
    prepare("status", settings(tmp_path))
    assert "missing," not in capsys.readouterr().out


def test_verify_finds_damage_and_fill_mends_it(tmp_path, data, capsys):
    prepare("fill", settings(tmp_path))
    path = entries(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert prepare("verify", settings(tmp_path)) == 2
    told = capsys.readouterr().out
    assert f"{path}: its checksum is wrong" in told and "1 are damaged" in told
    prepare("fill", settings(tmp_path, "cache.verify=bytes"))
    assert prepare("verify", settings(tmp_path)) == 0


def test_an_unknown_action_is_refused(tmp_path, data):
    with pytest.raises(UserError, match="cache=empty: expected one of fill, status, verify, prune"):
        prepare("empty", settings(tmp_path))


def test_a_recipe_without_outputs_has_nothing_to_cache(tmp_path, data, capsys):
    made = settings(tmp_path)
    made["model"]["encoder"] = {"_target_": "vireo.models.encoders.NoEncoder"}
    assert prepare("status", made) == prepare("fill", made) == 0
    assert "there is nothing to cache" in capsys.readouterr().out
    assert json.loads(next((tmp_path / "outputs" / "cache" / "manifests").glob("*")).read_text())["entries"] == {}
