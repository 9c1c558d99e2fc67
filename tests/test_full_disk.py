"""A disk that is full for a while: nothing that a run writes may end it, nor change what it learns."""

import errno
import logging
import os
import subprocess
from pathlib import Path

import pytest

from tests import runs
from vireo import checkpoint, config, console, faults, launch, run_folder
from vireo.errors import UserError
from vireo.mini import world

WORDS = ["checkpoint.every=1", "checkpoint.keep_last=2", "faults.max_consecutive_save_failures=9"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    world.ensure()
    return runs.train(tmp_path_factory.mktemp("undisturbed"), *WORDS)


class Flaky:
    """A file that takes three bytes, then nothing at first."""

    def __init__(self, file):
        self.file, self.refusals = file, 3

    def write(self, data):
        if self.refusals and self.refusals < 3:
            self.refusals -= 1
            raise OSError(28, "No space left on device")
        if self.refusals:
            self.refusals -= 1
            return self.file.write(data[:3])
        return self.file.write(data)

    def close(self):
        self.file.close()


def fail_everywhere():
    """Sabotage: each place that writes fails once with ENOSPC."""
    import safetensors.torch

    from vireo import tracking, validation
    from vireo.models.taehv import TAEHV

    def once(original, when=lambda *args: True):
        left = [1]

        def full(*args, **kwargs):
            if left and when(*args):
                left.pop()
                raise OSError(28, "No space left on device")
            return original(*args, **kwargs)

        return full

    safetensors.torch.save_file = once(safetensors.torch.save_file)
    Path.write_text = once(Path.write_text, lambda path, *_: path.name == "manifest.json")
    Path.rename = once(Path.rename, lambda path, *_: path.name.startswith(".step_"))
    checkpoint._flush = once(checkpoint._flush)
    validation.show = once(validation.show)
    TAEHV.export = once(TAEHV.export, lambda network, folder, state: folder.name == "best")
    begin = tracking.MetricsFile.__init__

    def flaky(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self.file = Flaky(self.file)

    tracking.MetricsFile.__init__ = flaky


def test_each_writer_fails_once(tmp_path, undisturbed):
    folder = runs.make(tmp_path, WORDS)
    assert runs.work(folder, fail_everywhere) == 0
    log = (folder / "train.log").read_text()
    assert log.count("the checkpoint could not be saved: OSError: [Errno 28] No space left on device") == 4
    for told in ("metrics.jsonl: No space left", "pictures of held-out clips could not be", "export/best could not be"):
        assert told in log
    assert runs.metrics(folder) == runs.metrics(undisturbed)
    assert checkpoint.latest(folder).step == 8 and not list((folder / "checkpoints").glob(".*"))


def fail_at_the_end(export):
    """Sabotage: there is no room for the last picture, and none for the last export or the marker of the end."""

    def arm():
        from vireo import report, run_folder
        from vireo.models.taehv import TAEHV

        def full(*args):
            raise OSError(28, "No space left on device")

        whole = TAEHV.export
        report.draw = full
        if export:
            TAEHV.export = lambda *args: full() if args[1].name == "export" else whole(*args)
        else:
            run_folder.write_json = full

    return arm


def test_what_is_written_last_is_written_by_the_same_command_again(tmp_path, undisturbed):
    folder = runs.make(tmp_path, WORDS)
    for export, lacking in ((True, "the export"), (False, "the note that the run is finished")):
        assert runs.work(folder, fail_at_the_end(export)) == faults.EXIT_FAULT
        log = (folder / "train.log").read_text()
        assert f"{lacking} could not be written: OSError: [Errno 28]" in log and "Traceback" not in log
        assert checkpoint.latest(folder).step == 8 and not (folder / "finished").exists()
    assert "the picture of the curves could not be written" in log
    assert runs.work(folder) == 0
    assert (folder / "finished").exists() and (folder / "curves.png").exists()
    assert runs.metrics(folder) == runs.metrics(undisturbed)


@pytest.fixture(scope="module")
def settings():
    return config.settings([*runs.TINY, "run=early"])


@pytest.mark.parametrize("what", ["probe", "lock", "config", "notes"])
def test_a_disk_that_is_full_at_the_start_is_told_with_the_folder(tmp_path, monkeypatch, settings, what):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    opened = lambda path, *args: full() if str(path).endswith(".lock") else open(path, *args)  # noqa: E731, SIM115
    writers = {
        "probe": (os, "fsync", full),
        "lock": (run_folder, "open", opened),
        "config": (config, "save_resolved", full),
        "notes": (run_folder, "write_json", full),
    }
    monkeypatch.setattr(*writers[what], raising=False)
    outputs = {**settings, "paths": {**settings["paths"], "outputs": str(tmp_path)}}
    with pytest.raises(UserError, match=r"early.* \(No space left on device\); free some space.*paths.outputs=…"):
        launch.run(outputs, [])


def test_a_log_that_cannot_be_written_says_so_once_and_goes_on(tmp_path, capfd):
    """Not with a traceback for each line."""
    (tmp_path / "train.log").symlink_to("/dev/full")
    log = console.LogFile(tmp_path / "train.log")
    for number in range(1000):
        log.handle(logging.makeLogRecord({"msg": f"line {number}"}))
    said = capfd.readouterr().err
    assert (
        said
        == f"{tmp_path}/train.log cannot be written: No space left on device; lines are lost until there is space\n"
    )
    os.dup2(os.open(tmp_path / "space", os.O_WRONLY | os.O_CREAT), log.stream.fileno())
    log.handle(logging.makeLogRecord({"msg": "the last line"}))
    log.close()
    assert (tmp_path / "space").read_text().endswith("\nthe last line\n")


@pytest.fixture
def small_disk(tmp_path):
    """small_disk("8m"): a folder on a disk of that size, which is taken away after the test."""
    place = tmp_path / "mount"

    def mount(size: str) -> Path:
        place.mkdir()
        asked = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if subprocess.run(asked, capture_output=True).returncode:
            pytest.skip("this user may not mount")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


def test_a_run_ends_with_a_message_on_a_disk_that_stays_full(small_disk, disturbed, capfd):
    """Workers, logs, notes of failures and restarts: nothing ends in the parent's traceback."""
    place = small_disk("90m")
    disturbed("fill_the_disk_at", 3)
    words = [*runs.TINY, "checkpoint.every=1", "faults.max_consecutive_save_failures=2", "validation.every=null"]
    words += [f"paths.outputs={place}", "run=full", "launcher.restarts=1", "validation.at_start=false"]
    done = launch.train(*words)
    said = "".join(capfd.readouterr())
    assert done.exit_code == faults.EXIT_MISTAKE, said  # that of the second start
    assert "starting again from the last checkpoint (1 of 1)" in said
    assert "2 checkpoints in a row could not be saved" in said and "0 MiB free, but a checkpoint" in said, said
    assert "Logging error" not in said and "Traceback" not in said, said
    with pytest.raises(UserError, match="No space left on device.*free some space"):
        launch.train(*words)
    (done.folder / "filler").unlink()
    assert runs.work(done.folder) == 0 and checkpoint.latest(done.folder).step == 8


def test_a_small_disk(small_disk, undisturbed, capfd):
    place = small_disk("8m")

    def fill_and_empty():
        from vireo import training

        checkpoint.MARGIN = -(2**40)  # it is not looked whether there is space: the writers find out
        original, filler = training.seed_default, place / "filler"

        def disturbed(seed, purpose, position):
            if position[0] == 2 and not filler.exists():
                with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                    while True:
                        file.write(bytes(4096))
            if position[0] == 6:
                filler.unlink(missing_ok=True)
            original(seed, purpose, position)

        training.seed_default = disturbed

    folder = runs.make(place, WORDS)
    assert runs.work(folder, fill_and_empty) == 0, (folder / "train.log").read_text()
    assert capfd.readouterr().out.count("the checkpoint could not be saved") == 4  # the log is on that disk too
    assert runs.metrics(folder) == runs.metrics(undisturbed)
    assert [checkpoint.verify(checkpoint.folder_of(folder, step)).step for step in (7, 8)] == [7, 8]
    assert not list((folder / "checkpoints").glob(".*"))
