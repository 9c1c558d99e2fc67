import json
import multiprocessing
import os
import shutil
import time

import pytest

from tests.data import videos
from vireo.data import scan as scanning
from vireo.data.scan import scan
from vireo.video_io import VideoInfo


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    for name, num_frames in {"a": 12, "b": 5, "c": 7}.items():
        videos.write_flat(folder / f"{name}.mp4", num_frames)
    return folder


@pytest.fixture
def root(originals, tmp_path):
    shutil.copytree(originals, tmp_path / "root")
    (tmp_path / "root" / "empty.mp4").write_bytes(b"")
    return tmp_path / "root"


@pytest.fixture
def probed(monkeypatch):
    """The paths that are really looked at."""
    paths, probe = [], scanning.probe

    def counting(path):
        paths.append(path.name)
        return probe(path)

    monkeypatch.setattr(scanning, "probe", counting)
    return paths


def listed(root):
    return {path.name: path for path in sorted(root.iterdir())}


def test_what_a_scan_finds(root):
    found = scan({**listed(root), "missing.mp4": root / "missing.mp4"}, root)
    assert list(found) == ["a.mp4", "b.mp4", "c.mp4", "empty.mp4", "missing.mp4"]
    assert found["a.mp4"] == VideoInfo(num_frames=12, fps=25.0, height=48, width=64, decoder="decord")
    assert found["b.mp4"].num_frames == 5
    assert found["empty.mp4"] == "the file is empty (0 bytes)"
    assert found["missing.mp4"] == "there is no such file"


def test_nothing_is_looked_at_twice(root, probed):
    first = scan(listed(root), root)
    assert sorted(probed) == ["a.mp4", "b.mp4", "c.mp4", "empty.mp4"]
    probed.clear()
    assert scan(listed(root), root) == first
    assert probed == []


def test_what_has_changed_is_looked_at_again(root, probed):
    scan(listed(root), root)
    probed.clear()
    shutil.copy(root / "a.mp4", root / "b.mp4")
    os.utime(root / "c.mp4", ns=(0, 1))
    (root / "empty.mp4").unlink()
    shutil.copy(root / "c.mp4", root / "d.mp4")
    found = scan(listed(root), root)
    assert sorted(probed) == ["b.mp4", "c.mp4", "d.mp4"]
    assert {name: info.num_frames for name, info in found.items()} == {"a.mp4": 12, "b.mp4": 12, "c.mp4": 7, "d.mp4": 7}


def test_a_file_that_is_missing_is_looked_for_again(root, probed):
    missing = {"late.mp4": root / "late.mp4"}
    assert scan(missing, root) == {"late.mp4": "there is no such file"}
    shutil.copy(root / "a.mp4", root / "late.mp4")
    assert scan(missing, root)["late.mp4"].num_frames == 12


def test_folders_of_frames_are_remembered_too(tmp_path, probed):
    from PIL import Image

    (tmp_path / "clip").mkdir()
    for k in range(3):
        Image.new("RGB", (8, 6)).save(tmp_path / "clip" / f"{k}.png")
    clip = {"clip": tmp_path / "clip"}
    assert scan(clip, tmp_path)["clip"] == VideoInfo(3, 24.0, 6, 8, "pyav")
    scan(clip, tmp_path)
    assert len(probed) == 1
    Image.new("RGB", (8, 6)).save(tmp_path / "clip" / "3.png")
    assert scan(clip, tmp_path)["clip"].num_frames == 4


def test_pictures_are_remembered_apart_from_videos(root, probed, monkeypatch):
    from PIL import Image

    Image.new("RGB", (8, 6)).save(root / "picture.png")
    names = {name: root / name for name in ("picture.png", "a.mp4")}
    looked_at, probe_image = [], scanning.probe_image
    monkeypatch.setattr(scanning, "probe_image", lambda path: looked_at.append(path.name) or probe_image(path))
    found = scan(names, root, pictures=True)
    assert found["picture.png"] == VideoInfo(1, 0.0, 6, 8, "pillow") and "not a picture" in found["a.mp4"]
    assert scan(names, root, pictures=True) == found and sorted(looked_at) == ["a.mp4", "picture.png"]
    assert scan(names, root)["a.mp4"].num_frames == 12


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        "{}",
        '{"version": 1}',
        '{"version": 1, "videos": []}',
        '{"version": 1, "videos": {"a.mp4": 3}}',
        '{"version": 1, "videos": {"a.mp4": [1, 2, {"frames": 3}]}}',
        '{"version": 0, "videos": {"a.mp4": [1, 2, "of an older version"]}}',
    ],
)
def test_a_cache_that_cannot_be_used_is_made_anew(root, probed, own_cache, content):
    first = scan(listed(root), root)
    (file,) = own_cache.glob("*.json")
    good = json.loads(file.read_text())
    file.write_text(content)
    probed.clear()
    assert scan(listed(root), root) == first
    assert len(probed) == 4
    assert json.loads(file.read_text()) == good
    assert {path.suffix for path in own_cache.iterdir()} == {".json", ".lock"}, "something was left behind"


def test_without_a_cache_folder_every_start_scans(root, probed, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    first = scan(listed(root), root)
    assert "is not remembered" in caplog.text
    assert scan(listed(root), root) == first
    assert len(probed) == 8


def test_an_interrupted_scan_goes_on_where_it_stopped(root, monkeypatch):
    probe, seen = scanning.probe, []

    def interrupted(path):
        seen.append(path.name)
        if path.name == "c.mp4" and len(seen) <= 4:
            raise KeyboardInterrupt
        return probe(path)

    monkeypatch.setattr(scanning, "probe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scan(listed(root), root)
    before = len(seen)
    assert scan(listed(root), root)["a.mp4"].num_frames == 12
    assert "a.mp4" not in seen[before:] and "c.mp4" in seen[before:]


def _scan_slowly(root, log, results):
    probe = scanning.probe

    def slow(path):
        with open(log, "a") as file:
            file.write(path.name + "\n")
        time.sleep(0.05)
        return probe(path)

    scanning.probe = slow
    results.put(scan(listed(root), root))


def test_of_several_processes_one_scans(root, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    log = tmp_path / "log.txt"
    processes = [context.Process(target=_scan_slowly, args=(root, log, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert all(other == found[0] for other in found)
    assert sorted(log.read_text().split()) == ["a.mp4", "b.mp4", "c.mp4", "empty.mp4"]
