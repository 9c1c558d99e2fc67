import errno
import fcntl
import json
import os
import socket
import subprocess
import sys

import pytest

from tests import runs
from vireo import run_folder
from vireo.errors import UserError
from vireo.mini import world

HOLD = "import sys, time; from pathlib import Path; from vireo import run_folder\n"
HOLD += "with run_folder.lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_a_second_run_refuses_and_names_the_first_until_it_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on .*run=<name>"), run_folder.lock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    with run_folder.lock(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()


def test_where_the_file_system_has_no_locks_the_named_process_is_looked_for(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    note, here = tmp_path / ".lock", socket.gethostname()
    gone = subprocess.Popen(["true"])
    gone.wait()
    for other in (f"process {os.getppid()} on {here}", f"process {gone.pid} on elsewhere"):
        note.write_text(other)
        with pytest.raises(UserError, match=f"{other}.*No locks available.*delete it"), run_folder.lock(tmp_path):
            pass
        assert run_folder.is_locked(tmp_path) and note.read_text() == other
    note.write_text(f"process {gone.pid} on {here}")
    with run_folder.lock(tmp_path):
        assert run_folder.is_locked(tmp_path) and note.read_text() == f"process {os.getpid()} on {here}"
    assert not run_folder.is_locked(tmp_path)


def test_a_lock_that_another_machine_did_not_give_back_is_told(tmp_path, caplog):
    (tmp_path / ".lock").write_text("process 7 on elsewhere")
    for warned in (True, False):
        with run_folder.lock(tmp_path):
            assert ("was held by process 7 on elsewhere" in caplog.text) == warned
        caplog.clear()


def test_environment_tells_versions_and_no_secret(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    about = json.dumps(run_folder.environment())
    assert '"torch"' in about and "very-secret" not in about


def test_what_data_a_run_had_is_known_by_names_and_sizes(tmp_path):
    data = tmp_path / "data"
    (data / "b").mkdir(parents=True)
    for name, content in (("a.txt", "one"), ("b/c.txt", "four")):
        (data / name).write_text(content)
    (data / "gone").symlink_to(tmp_path / "nowhere")
    node = {"_target_": "x", "root": str(data), "list": str(data / "a.txt"), "crop": "a.txt", "none": None, "size": 8}

    def told(most=100):
        return run_folder.data_files({**node, "missing": "/nowhere"}, most)

    found = told()
    assert list(found) == ["root", "list"] and found["root"]["path"] == str(data)
    assert [found[key][what] for key in found for what in ("files", "bytes")] == [3, 7, 1, 3]
    (data / "a.txt").write_text("two")
    assert told() == found, "contents are not read"
    few = told(most=2)
    for change in (lambda: (data / "b/c.txt").write_text("fives"), lambda: (data / "b/c.txt").rename(data / "b/d.txt")):
        change()
        assert told()["root"]["names_and_sizes"] != found["root"]["names_and_sizes"] and told()["list"] == found["list"]
        assert told(most=2) == few, "folder after folder"


def test_json_is_replaced_at_once(tmp_path):
    path = tmp_path / "finished"
    assert run_folder.finished(tmp_path) is None
    run_folder.write_json(path, {"step": 3})
    assert run_folder.finished(tmp_path) == {"step": 3} and list(tmp_path.iterdir()) == [path]


def test_no_secret_of_the_environment_is_in_anything_that_a_run_writes(tmp_path, monkeypatch):
    secrets = {"WANDB_API_KEY": "0123456789abcdef", "HF_TOKEN": "hf_abcdefgh", "AWS_SECRET_ACCESS_KEY": "aws/secret+1"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    world.ensure()
    folder = runs.make(tmp_path, ["steps=2", "tracker=tensorboard", "validation.at_start=false"])
    run_folder.write_json(folder / "environment.json", run_folder.environment())
    assert runs.work(folder) == 0
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"resolved.yaml", "train.log", "environment.json", "manifest.json"} <= {path.name for path in files}
    assert any("tensorboard" in str(path) for path in files)
    for path in files:
        content = path.read_bytes()
        assert not [name for name, value in secrets.items() if value.encode() in content], path
