"""The mini world is made once, whole or not at all, and is what the recipes' readers expect."""

import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vireo.data.listing import list_folder
from vireo.errors import UserError
from vireo.mini import frame_edits, scenes, world

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def made(tmp_path_factory, record_testsuite_property) -> Path:
    started, cpu = time.perf_counter(), time.process_time()
    folder = world.ensure(tmp_path_factory.mktemp("mini") / "world")
    record_testsuite_property("mini_world_seconds", round(time.perf_counter() - started, 1))
    record_testsuite_property("mini_world_cpu_seconds", round(time.process_time() - cpu, 1))
    return folder


@pytest.fixture
def few(monkeypatch):
    """A world of two clips and no weights, for the tests that are about how it is made."""
    monkeypatch.setattr(world, "NUM_CLIPS", 2)
    monkeypatch.setattr(world, "PARTS", (world.write_clips,))
    monkeypatch.setattr(world, "PROGRAMS", {})


def annotations(folder: Path) -> list[dict]:
    return json.loads((folder / "data/clips.json").read_text())["list"]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / ((a.astype(float) - b) ** 2).mean())


def test_annotations_name_every_clip(made):
    content = json.loads((made / "data/clips.json").read_text())
    assert content["total"] == len(content["list"]) == world.NUM_CLIPS
    assert {entry["path"] for entry in content["list"]} == {
        path.relative_to(made / "data").as_posix() for path in (made / "data/clips").iterdir()
    }
    assert content["list"][9]["text"] == scenes.scene(9).text


@pytest.mark.parametrize("index", [0, 57, 311])
def test_clips_decode_alike_in_decord_and_pyav(made, index):
    decord = pytest.importorskip("decord")
    path = made / "data" / annotations(made)[index]["path"]
    truth = scenes.render(scenes.scene(index))
    by_decord = decord.VideoReader(str(path))[:].asnumpy()
    with av.open(str(path)) as container:
        by_pyav = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert container.streams.video[0].average_rate == world.FPS
    assert by_decord.shape == by_pyav.shape == truth.shape
    assert psnr(by_decord, truth) > 41
    assert psnr(by_pyav, truth) > 41


def test_weights_lie_under_the_real_names(made):
    for name in world.WEIGHTS:
        assert list((made / "weights" / name).glob("*.safetensors")), name
    assert (made / "weights/taehv/taecvx.safetensors").is_file()
    for vae in ("sd-vae-ft-mse", "CogVideoX-2b/vae", "Wan2.1-T2V-1.3B-Diffusers/vae"):
        assert json.loads((made / "weights" / vae / "config.json").read_text())["_class_name"].startswith("Autoencoder")


def test_edited_clips_lie_where_their_recipe_looks(made):
    edits = made / "data" / "frame_edits"
    rows = json.loads((edits / "metadata.json").read_text())
    assert len(rows) == frame_edits.NUM_TRAINING + 2 * frame_edits.NUM_HELD_OUT
    assert len(list(edits.glob("*/*/*"))) == len(rows)


def test_a_second_call_reads_nothing_and_writes_nothing(made):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert world.ensure(made) == made
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_two_processes_that_ask_at_once_build_once(few, tmp_path, monkeypatch):
    builds = tmp_path / "builds"

    def slow_part(folder: Path) -> None:
        with builds.open("a") as log:
            log.write("built\n")
        time.sleep(0.5)
        world.write_clips(folder)

    monkeypatch.setattr(world, "PARTS", (slow_part,))
    context = multiprocessing.get_context("fork")
    seen = context.Queue()
    children = [
        context.Process(target=lambda: seen.put(len(annotations(world.ensure(tmp_path / "world"))))) for _ in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [seen.get(timeout=10), seen.get(timeout=10)] == [2, 2]
    assert builds.read_text() == "built\n"


def test_an_interrupted_build_leaves_no_world_and_the_next_one_succeeds(few, tmp_path, monkeypatch):
    def killed(folder: Path) -> None:
        world.write_clips(folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(world, "PARTS", (killed,))
        with pytest.raises(KeyboardInterrupt):
            world.ensure(tmp_path / "world")
    assert not (tmp_path / "world").exists()
    assert len(annotations(world.ensure(tmp_path / "world"))) == 2
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["world"]


def test_a_program_that_fails_says_why_and_leaves_no_world(few, tmp_path, monkeypatch):
    monkeypatch.setattr(world, "PROGRAMS", {"vireo.mini.nothing": "data"})
    with pytest.raises(RuntimeError, match=r"(?s)python -m vireo.mini.nothing failed with 1:.*No module named"):
        world.ensure(tmp_path / "world")
    assert not (tmp_path / "world").exists()


def test_a_program_is_stopped_with_what_it_runs_beside(few, tmp_path, monkeypatch):
    (tmp_path / "endless.py").write_text("import time\ntime.sleep(600)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(world, "PROGRAMS", {"endless": "data"})
    monkeypatch.setattr(world, "PARTS", (lambda folder: 1 / 0,))
    with pytest.raises(ZeroDivisionError):
        world.ensure(tmp_path / "world")


def test_the_process_that_makes_the_world_needs_no_torch():
    code = "import sys, vireo.mini.world, vireo.mini.frame_edits; sys.exit('torch' in sys.modules)"
    source = str(Path(world.__file__).parents[2])
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": source}).returncode == 0


def test_the_cache_is_named_by_version(few, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert world.ensure() == tmp_path / "vireo" / f"mini-{world.version()}"


def test_an_empty_folder_is_filled(few, tmp_path):
    assert world.ensure(tmp_path / "empty") == tmp_path / "empty"
    (tmp_path / "other").mkdir()
    assert (world.ensure(tmp_path / "other") / world.MARKER).is_file()


def test_a_folder_with_something_else_is_refused(few, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="neither empty nor a mini world"):
        world.ensure(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_world_of_another_version_is_refused(few, tmp_path, monkeypatch):
    folder = world.ensure(tmp_path / "world")
    monkeypatch.setattr(world, "version", lambda: "another")
    with pytest.raises(UserError, match="delete it"):
        world.ensure(folder)


def test_version_follows_the_contents_of_the_package(tmp_path, monkeypatch):
    copy = tmp_path / "mini"
    shutil.copytree(Path(world.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = world.version()
    monkeypatch.setattr(world, "__file__", str(copy / "world.py"))
    assert world.version() == before
    (copy / "scenes.py").write_text("# changed")
    assert world.version() != before


def test_the_plain_clips_are_all_that_is_found_in_the_folder_of_data(made):
    assert {entry.name for entry in list_folder(made / "data")} == {entry["path"] for entry in annotations(made)}
