"""`vireo prepare`, and `vireo check` of what it makes, as people call them."""

import json
import shutil
import sys

import pytest
from tests.data import edits, videos

from vireo import cli
from vireo.mini import frame_edits, world
from vireo.verbs import prepare_cache


@pytest.fixture
def vireo(monkeypatch, capfd):
    """vireo("prepare", "out=…", …) -> (exit code, what was printed). No world is made: these have data of their own."""
    monkeypatch.setattr(world, "ensure", lambda: None)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["vireo", *words])
        capfd.readouterr()
        return cli.vireo(), "".join(capfd.readouterr())

    return call


@pytest.fixture
def given(tmp_path):
    """The words of a composition that reads edits below tmp_path/raw."""
    root = edits.write(tmp_path / "raw")
    return ["experiment=ip2p_video", "size=mini", f"paths.data={root}"]


def test_prepare_then_check(vireo, given, tmp_path):
    code, said = vireo("prepare", *given, f"out={tmp_path / 'made'}")
    assert code == 0 and "5 of 5 clips kept (train 3, val 1, test 1), 0 left out" in said
    code, said = vireo("check", *given[:2], f"paths.data={tmp_path / 'made'}")
    assert code == 0 and "input_frames: " in said and "length=20" in said and "clips          3" in said
    assert "drop_object 1, move_object 1" in said


def test_a_conversion_needs_no_weights(vireo, given, tmp_path):
    words = [*given[:1], "size=full", given[2]]
    code, said = vireo("prepare", *words)
    assert code == 0 and "5 of 5 clips kept" in said
    for cause in (["prepare", *words, "cache=status"], ["check", *words]):
        code, said = vireo(*cause)
        assert code == 2 and "size=full needs your weights" in said
    code, said = vireo("prepare", *words[:2])
    assert code == 2 and "size=full needs your data" in said and "weights" not in said


def test_what_is_left_out_is_told_and_strict_refuses(vireo, given, tmp_path):
    (tmp_path / "raw" / edits.NAMES[1] / "13.png").unlink()
    code, said = vireo("check", *given)
    told = [line for line in said.splitlines() if line.strip().endswith("train/drop_object/video_01: frame 13 missing")]
    assert code == 2 and len(told) >= 3, "in each split, and a fault"
    code, said = vireo("prepare", *given, "strict=true")
    assert code == 2 and "strict: 1 clips" in said and not (tmp_path / "raw_arrow").exists()
    code, said = vireo("prepare", *given, "strict=false")
    assert code == 0 and "4 of 5 clips kept" in said and said.count("frame 13 missing") == 1, "one summary"
    assert (tmp_path / "raw_arrow" / "dataset_dict.json").exists()


def test_a_new_split_follows_the_seed(vireo, given, tmp_path):
    assert vireo("prepare", *given, "resplit=0.4", "seed=3")[0] == 0
    assert json.loads((tmp_path / "raw_arrow" / "dataset_dict.json").read_text()) == {"splits": ["train", "test"]}
    rows = {}
    for seed in range(4):
        assert vireo("prepare", *given, "resplit=0.4", f"seed={seed}")[0] == 0
        rows[seed] = (tmp_path / "raw_arrow" / "test" / "data-00000-of-00001.arrow").read_bytes()
    assert len(set(rows.values())) > 1


def test_check_fails_for_a_dataset_whose_frames_are_gone(vireo, given, tmp_path):
    assert vireo("prepare", *given)[0] == 0
    shutil.rmtree(tmp_path / "raw" / edits.NAMES[4])
    code, said = vireo("check", *given[:2], f"paths.data={tmp_path / 'raw_arrow'}")
    assert code == 2 and "no clip of the split test can be used" in said
    shutil.rmtree(tmp_path / "raw")
    code, said = vireo("check", *given[:2], f"paths.data={tmp_path / 'raw_arrow'}")
    assert code == 2 and "are not where it says" in said


@pytest.mark.parametrize(
    "words, message",
    [
        (["strict=perhaps"], "strict=perhaps: true or false is expected"),
        (["resplit=half"], "resplit=half: a share such as 0.1 is expected"),
        (["resplit=2"], "resplit=2.0: a share of the clips between 0 and 1"),
    ],
)
def test_values_that_make_no_sense(vireo, given, words, message):
    code, said = vireo("prepare", *given, *words)
    assert code == 2 and message in said


def test_data_that_need_no_preparation_say_so(vireo, tmp_path):
    for name in "ab":
        videos.write_flat(tmp_path / "clips" / f"{name}.mp4", 9)
    code, said = vireo("prepare", "experiment=taehv", "size=mini", f"paths.data={tmp_path / 'clips'}")
    assert code == 2 and "vireo.data.clips.Clips is read as it is, there is nothing to prepare" in said


def test_what_is_about_the_cache_is_left_to_it(vireo, given, monkeypatch):
    asked = []
    monkeypatch.setattr(prepare_cache, "main", lambda arguments, action: asked.append((arguments, action)) or 7)
    assert vireo("prepare", *given, "cache=status", "seed=5")[0] == 7
    [(arguments, action)] = asked
    assert action == "status" and arguments.settings["seed"] == 5


def test_the_mini_world_to_look_at(vireo, tmp_path, monkeypatch):
    monkeypatch.setattr(frame_edits, "NUM_HELD_OUT", 2)
    out = tmp_path / "mini"
    code, said = vireo("prepare", "mini", f"out={out}", "clips=3")
    assert code == 0 and f"3 clips to train on, 4 held out: {out}" in said
    assert len(json.loads((out / "metadata.json").read_text())) == 7
    code, said = vireo("check", "experiment=ip2p_image", "size=mini", f"paths.data={out}")
    assert code == 0, said
    for words in (["clips=3"], [f"out={out}", "clip=3"]):
        code, said = vireo("prepare", "mini", *words)
        assert code == 2 and "takes out=<folder>" in said


def test_the_cache_is_looked_after(vireo, given, tmp_path):
    """What the actions do is tested in tests/test_cached_runs.py."""
    words = [*given, f"paths.outputs={tmp_path}"]
    code, said = vireo("prepare", *words, "cache=status")
    assert code == 0 and f"{tmp_path / 'cache'}\n" in said and "0 entries" in said
    assert vireo("prepare", *words, "cache=verify")[0] == 0
    code, said = vireo("prepare", *words, "cache=empty")
    assert code == 2 and "expected one of fill, status, verify, prune" in said
    code, said = vireo("prepare", *words, "cache=fill", "strict=true")
    assert code == 2 and "cache=fill goes without strict" in said
