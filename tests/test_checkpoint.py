import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.toys import STATE
from vireo import checkpoint
from vireo.errors import UserError

PARTS = {
    "network": {"a": torch.arange(6.0), "b": torch.ones(2, 2)},
    "ema": {},
    "optimizer": {"a|step": torch.tensor(3.0)},
}


def save(folder, *steps):
    for step in steps:
        checkpoint.save(folder, step, PARTS, {**STATE, "position": 2 * step})


def test_round_trip(tmp_path):
    save(tmp_path, 5)
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 5 and found.state == {**STATE, "position": 10}
    assert torch.equal(found.tensors("network")["a"], PARTS["network"]["a"])
    assert found.tensors("ema") == {} and found.tensors("optimizer")["a|step"] == 3


def test_the_newest_is_by_number_not_by_time(tmp_path):
    save(tmp_path, 10, 200, 9)
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 200
    assert checkpoint.steps(tmp_path) == [9, 10, 200]


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def cut_before_it_was_hashed(folder):
    """As a file system does that loses the end of a file without a word."""
    path = folder / "network.safetensors"
    cut(path)
    about = json.loads((folder / "manifest.json").read_text())
    about["files"][path.name] = checkpoint._identity(path)
    (folder / "manifest.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: flip(folder / "network.safetensors"), "SHA-256"),
        (lambda folder: cut(folder / "network.safetensors"), "cut off"),
        (cut_before_it_was_hashed, "its tensors cannot be read"),
        (lambda folder: (folder / "optimizer.safetensors").unlink(), "missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: cut(folder / "manifest.json"), "malformed JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "damaged manifest"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(tmp_path, caplog, damage, says):
    save(tmp_path, 1, 2)
    folder = checkpoint.folder_of(tmp_path, 2)
    damage(folder)
    with pytest.raises(UserError, match=says):
        checkpoint.verify(folder)
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 1
    assert says in caplog.text and "step_00000002" in caplog.text


def change(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"format": 99}, "format 99, this version of vireo reads 1"),
        ({"step": -1}, "step is -1, expected a whole number from 0"),
        ({"step": "2"}, "step is '2', expected a whole number"),
        ({"step": 10**9}, "step is 1000000000, expected"),
        ({"state": {}}, "its state lacks position"),
    ],
)
def test_a_manifest_that_no_resume_could_use_is_damaged(tmp_path, changed, says):
    save(tmp_path, 1, 2)
    change(checkpoint.folder_of(tmp_path, 2), lambda manifest: manifest.update(changed))
    with pytest.raises(UserError, match=says):
        checkpoint.verify(checkpoint.folder_of(tmp_path, 2))
    assert checkpoint.latest(tmp_path).step == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("position", -5),
        ("position", True),
        ("position", 2**70),
        ("skipped", None),
        ("usual_loss", float("nan")),
        ("losses_seen", 1.5),
        ("global_batch", 0),
        ("strategy", []),
        ("best", {"step": 1}),
        ("best", {"step": 1, "value": "high"}),
        ("frozen", None),
        ("tracker_id", 7),
        ("owes_validation", "no"),
    ],
)
def test_so_is_a_state_with_a_value_that_no_run_has_written(tmp_path, key, value):
    save(tmp_path, 2)
    folder = checkpoint.folder_of(tmp_path, 2)
    change(folder, lambda manifest: manifest["state"].update({key: value}))
    with pytest.raises(UserError, match=f"{key} is .*, expected"):
        checkpoint.verify(folder)
    with pytest.raises(UserError, match=f"{key} is .*, expected"):
        checkpoint.adopt(tmp_path / "other", folder)
    assert checkpoint.steps(tmp_path / "other") == []


@pytest.mark.parametrize(
    ("name", "place", "reader"),
    [
        ("network.safetensors", checkpoint, "_identity"),
        ("network.safetensors", Path, "stat"),
        ("manifest.json", Path, "is_file"),
        ("manifest.json", Path, "read_text"),
    ],
)
def test_one_that_the_disk_cannot_read_is_passed_over_too(tmp_path, monkeypatch, caplog, name, place, reader):
    save(tmp_path, 1, 2)
    bad, read = checkpoint.folder_of(tmp_path, 2) / name, getattr(place, reader)

    def failing(path, *args, **kwargs):
        if path == bad:
            raise OSError(errno.EIO, "Input/output error")
        return read(path, *args, **kwargs)

    monkeypatch.setattr(place, reader, failing)
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 1
    assert f"{bad} cannot be read: Input/output error" in caplog.text


def test_a_manifest_cannot_point_out_of_its_folder(tmp_path):
    save(tmp_path, 1)
    path = checkpoint.folder_of(tmp_path, 1) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../../../secret"] = {"size": 1, "sha256": ""}
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="missing"):
        checkpoint.verify(path.parent)


@pytest.mark.parametrize("when", ["write", "rename"])
def test_a_save_that_fails_leaves_nothing_that_looks_complete(tmp_path, monkeypatch, when):
    save(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*(("safetensors.torch.save_file", full) if when == "write" else ("pathlib.Path.rename", full)))
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def test_a_file_that_was_cut_off_while_it_was_written_is_no_checkpoint(tmp_path, monkeypatch):
    """Its hash would be right, and retention would delete the good one before it."""
    import safetensors.torch

    save(tmp_path, 1)
    whole = safetensors.torch.save_file

    def writes_half(tensors, path, metadata):
        whole(tensors, path, metadata)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def writes_fewer(tensors, path, metadata):
        whole(dict(list(tensors.items())[:1]), path, metadata)

    for writer, says in ((writes_half, "cannot be read"), (writes_fewer, "holds other tensors")):
        monkeypatch.setattr(safetensors.torch, "save_file", writer)
        with pytest.raises(OSError, match=f"network.safetensors was written, but {says}"):
            save(tmp_path, 2)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def test_too_little_space_is_found_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OSError, match="MiB free"):
        save(tmp_path, 1)


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / ".step_00000002.tmp-77").mkdir()
    checkpoint.clean(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def test_retention_keeps_the_newest_the_best_and_the_multiples(tmp_path):
    save(tmp_path, 10, 20, 30, 40, 50)
    assert checkpoint.retain(tmp_path, keep_last=1, keep_every=20, best=10) == [30]
    assert checkpoint.steps(tmp_path) == [10, 20, 40, 50]
    assert checkpoint.retain(tmp_path, keep_last=0, keep_every=None, best=None) == [10, 20, 40]


def test_a_damaged_one_that_was_passed_over_does_not_outlive_a_good_one(tmp_path):
    save(tmp_path, 10, 1000)
    flip(checkpoint.folder_of(tmp_path, 1000) / "network.safetensors")
    assert checkpoint.set_damaged_aside(tmp_path, checkpoint.latest(tmp_path)) == [1000]
    save(tmp_path, 20)
    assert checkpoint.retain(tmp_path, keep_last=1, keep_every=None, best=None) == [10]
    assert checkpoint.latest(tmp_path).step == 20
    assert (tmp_path / "checkpoints" / "step_00001000.damaged").is_dir()


def test_a_checkpoint_that_is_adopted_is_the_newest(tmp_path):
    save(tmp_path / "other", 20)
    other = checkpoint.folder_of(tmp_path / "other", 20)
    checkpoint.adopt(tmp_path / "new", other)
    assert checkpoint.latest(tmp_path / "new").step == 20 and checkpoint.verify(other).step == 20
    run = tmp_path / "run"
    save(run, 10, 20, 30)
    own = {step: checkpoint.folder_of(run, step) for step in (10, 20, 30)}
    for source, left in ((other, [10, 20]), (own[20], [10, 20]), (own[10], [10])):
        checkpoint.adopt(run, source)
        assert checkpoint.steps(run) == left
        assert checkpoint.latest(run).step == left[-1]
    aside = {path.name for path in (run / "checkpoints").iterdir()} - {"step_00000010"}
    assert aside == {"step_00000020.aside", "step_00000030.aside"}
    checkpoint.adopt(run, own[20].with_suffix(".aside"))  # what was set aside can be taken up again
    assert checkpoint.latest(run).step == 20


def test_a_checkpoint_that_is_no_good_is_not_adopted(tmp_path):
    save(tmp_path, 10, 20)
    cut(checkpoint.folder_of(tmp_path, 10) / "manifest.json")
    with pytest.raises(UserError, match="malformed JSON"):
        checkpoint.adopt(tmp_path, checkpoint.folder_of(tmp_path, 10))
    assert checkpoint.steps(tmp_path) == [10, 20]
