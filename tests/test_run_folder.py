import json
import os
import subprocess
import sys

import pytest

from vireo import run_folder
from vireo.errors import UserError

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


def test_environment_tells_versions_and_no_secret(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    about = json.dumps(run_folder.environment())
    assert '"torch"' in about and "very-secret" not in about


def test_json_is_replaced_at_once(tmp_path):
    path = tmp_path / "finished"
    assert run_folder.finished(tmp_path) is None
    run_folder.write_json(path, {"step": 3})
    assert run_folder.finished(tmp_path) == {"step": 3} and list(tmp_path.iterdir()) == [path]
