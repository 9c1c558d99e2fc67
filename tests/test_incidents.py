import errno
import math

import pytest
import torch

from vireo import incidents
from vireo.errors import UserError
from vireo.faults import TooManyFaults
from vireo.incidents import Incident, Verdicts

NAN = math.nan


def test_what_was_written_is_read_back(tmp_path):
    incident = Incident(7, [(14, "a"), (15, "b")], [{"loss": NAN, "mse": 1.5}, {"loss": math.inf, "mse": 0.5}], 2)
    incidents.write(tmp_path, incident)
    back = incidents.read(tmp_path, 7)
    assert incidents.steps(tmp_path) == [7] and repr(back) == repr(incident)
    assert back.suspects() == ["loss"] and back.diagnosis() == "not finite: loss of rank 0, 1; samples: a, b"


@pytest.mark.parametrize("kept", ["", '{"step": 7, "samp', "[]", '{"step": 7, "samples": [3]}', '{"terms": 1}'])
def test_a_file_that_is_damaged_is_named_with_the_others(tmp_path, kept):
    for step in (3, 7, 9):
        incidents.write(tmp_path, Incident(step, [(0, "a")], [{"loss": NAN}], 1))
    (tmp_path / incidents.FOLDER / "step_00000007.json").write_text(kept)
    with pytest.raises(UserError, match=r"step 7 cannot be read: .*step_00000007.json.*: step=3, step=9$"):
        incidents.read(tmp_path, 7)


def test_one_that_a_full_disk_cuts_off_is_not_kept(tmp_path, monkeypatch):
    def full(path, text):
        path.write_bytes(text[:20].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space"):
        incidents.write(tmp_path, Incident(7, [(0, "a")], [{"loss": NAN}], 1))
    assert incidents.steps(tmp_path) == []


def test_a_folder_of_incidents_does_not_grow_for_ever(tmp_path):
    for step in range(incidents.MOST + 5):
        incidents.write(tmp_path, Incident(step, [], [], 1))
    assert incidents.steps(tmp_path) == list(range(5, incidents.MOST + 5)), "the last ones, which ended the run"


def add(verdicts, step, norm, at_once=False, figures=None):
    verdicts.add(step, torch.tensor(norm), figures or {"loss": torch.tensor(1.0)}, [(step, f"clip{step}")], at_once)


def test_a_verdict_is_read_one_step_late_or_at_once():
    seen = []
    verdicts = Verdicts(5, 3, seen.append)
    add(verdicts, 0, NAN)
    assert verdicts.skipped == 3 and not seen
    add(verdicts, 1, 1.0)
    assert verdicts.skipped == 4 and [incident.step for incident in seen] == [0]
    add(verdicts, 2, math.inf, at_once=True)
    assert verdicts.skipped == 5 and "only the gradient" in seen[-1].diagnosis()


def test_so_many_in_a_row_end_the_run_and_others_do_not():
    verdicts = Verdicts(3, 0, lambda incident: None)
    for step, norm in enumerate([NAN, NAN, 1.0, NAN, NAN]):
        add(verdicts, step, norm, at_once=True)
    with pytest.raises(TooManyFaults, match="3 steps in a row.*from step 3 to 5; in the last one, not finite: l2 of"):
        add(verdicts, 5, NAN, at_once=True, figures={"l2": torch.tensor(NAN), "loss": torch.tensor(1.0)})
