"""Notes, tables and pictures of sweeps, and sweeps from the command line with a toy in the place of the workers."""

import csv
import importlib.util
import json
import math
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from vireo import cli, config, faults, launch, run_folder, sweeps
from vireo.errors import UserError
from vireo.verbs import report


def make_run(folder: Path, psnr: list[float], finished: bool = True) -> Path:
    folder.mkdir(parents=True)
    rows = [{"step": s, "loss": 1 / s, "seconds_per_step": 0.5} for s in range(2, 2 * len(psnr) + 1, 2)]
    rows += [{"step": 2 * number, "validation/psnr": value} for number, value in enumerate(psnr, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        best = {"step": 2, "value": max(psnr)}
        run_folder.write_json(folder / "finished", {"step": 2 * len(psnr), "best": best, "figures": {}})
    return folder


@pytest.fixture
def sweep(tmp_path) -> Path:
    """Three jobs: one finished, one better but stopped, one with a mistake."""
    sweep = tmp_path / "sweeps" / "first"
    runs = [make_run(tmp_path / "toy" / "a", [20.0, 21.0]), make_run(tmp_path / "toy" / "b", [20.0, 23.0], False)]
    about = {"metric": "psnr", "higher_is_better": True}
    sweeps.note(sweep / "0", overrides=["seed=0", "lr=1"], run=str(runs[0]), exit_code=0, best=21.0, **about)
    sweeps.note(sweep / "1", overrides=["seed=0", "lr=2"], run=str(runs[1]), exit_code=75, **about)
    sweeps.note(sweep / "10", overrides=["seed=0", "lr=fast"], exit_code=2, message="lr: is 'fast'\nmore words")
    return sweep


def test_a_row_for_each_job_in_order(sweep):
    rows = sweeps.rows(sweep)
    assert [row["job"] for row in rows] == [0, 1, 10]
    assert [row["overrides"] for row in rows] == ["lr=1", "lr=2", "lr=fast"]
    assert [row["state"] for row in rows] == ["finished", "no checkpoint", "mistake"] or rows[1]["state"] == "stopped"
    assert [row["best"] for row in rows] == [21.0, 23.0, None]
    assert [row["steps"] for row in rows] == [4, 4, None] and rows[0]["seconds"] == 2.0
    assert rows[2]["run"] == "lr: is 'fast'"


def test_the_exit_code_is_the_worst(sweep, tmp_path):
    assert sweeps.exit_code(sweep) == 2  # a mistake weighs more than a requested stop
    sweeps.note(tmp_path / "other" / "0", overrides=[])  # a job that left no code
    assert sweeps.exit_code(tmp_path / "other") == 1
    assert sweeps.exit_code(tmp_path / "nothing") == 1


def test_the_report_names_what_failed_and_what_is_best(sweep, tmp_path, capsys):
    words = ["sweep=first", f"paths.outputs={tmp_path}"]
    assert cli.run_verb("report", words) == 0
    said = capsys.readouterr().out
    assert "job 10 (lr=fast) mistake: lr: is 'fast'\nmore words" in said and "job 1 (lr=2) stopped: see" in said
    assert "best    job 1 (lr=2): 23" in said
    with open(sweep / "sweep.csv") as file:
        assert [row["overrides"] for row in csv.DictReader(file)] == ["lr=1", "lr=2", "lr=fast"]
    with Image.open(sweep / "curves.png") as picture:
        assert picture.width > 600


def test_a_job_that_was_mended_by_hand_is_finished(sweep, tmp_path):
    run_folder.write_json(tmp_path / "toy" / "b" / "finished", {"step": 4, "best": {"step": 4, "value": 24.0}})
    row = sweeps.rows(sweep)[1]
    assert (row["state"], row["best"]) == ("finished", 24.0) and "job 1 (lr=2) stopped" not in sweeps.show(sweep)


def test_a_job_that_failed_is_named_whatever_its_folder_says(tmp_path):
    """Another job, or an earlier run, has finished there."""
    run = make_run(tmp_path / "toy" / "a", [20.0])
    for number, code in enumerate((0, 2, 1)):
        sweeps.note(tmp_path / "sweep" / str(number), overrides=[f"lr={number}"], run=str(run), exit_code=code)
    os.utime(run / "finished", (0, 0))
    assert [row["state"] for row in sweeps.rows(tmp_path / "sweep")] == ["finished", "mistake", "failed (1)"]
    said = sweeps.show(tmp_path / "sweep")
    assert "job 1 (lr=1) mistake: see " in said and "job 2 (lr=2) failed (1): see " in said
    with run_folder.lock(run):  # the folder belongs to somebody else: that was the mistake
        assert [row["state"] for row in sweeps.rows(tmp_path / "sweep")] == ["running", "mistake", "running"]


def test_notes_of_an_earlier_sweep_in_the_same_place_are_gone(sweep):
    sweeps.fix(sweep, {})
    assert sweeps.notes(sweep) == {} and sweeps.show(sweep) == f"no job of {sweep} has begun"
    assert not (sweep / "sweep.csv").exists()
    sweeps.note(sweep / "0", exit_code=75, message="stopped", changed=["sources"])
    sweeps.begin(sweep / "0", ["lr=1"])
    assert sweeps.read(sweep / "0") == {"overrides": ["lr=1"]}, "also of a job that is queued again"


def test_one_job_needs_no_words(tmp_path):
    run = make_run(tmp_path / "toy" / "a", [20.0])
    words = ["seed=0", "lr=1", "experiment=taehv"]
    sweeps.note(tmp_path / "0", overrides=words, run=str(run), exit_code=0, best=20.0, metric="psnr")
    assert "best    job 0: 20\n" in sweeps.show(tmp_path) and "lr=1" not in sweeps.show(tmp_path)
    sweeps.note(tmp_path / "1", overrides=["seed=0", "lr=2", "experiment=taehv"], exit_code=1)
    assert "best    job 0 (lr=1): 20\n" in sweeps.show(tmp_path)


def test_lower_can_be_better(sweep):
    for number in (0, 1):
        sweeps.note(sweep / str(number), higher_is_better=False)
    assert "best    job 1 (lr=2): 20" in sweeps.show(sweep)  # its lowest figure; the finished one's marker says 21


def test_what_a_search_is_told():
    assert sweeps.objective(3.0, True) == 3.0
    for bad in (None, math.nan, math.inf, -math.inf):
        assert sweeps.objective(bad, True) == -math.inf and sweeps.objective(bad, False) == math.inf


def test_a_sweep_that_is_not_there(tmp_path, sweep):
    with pytest.raises(UserError, match="sweep=second is neither.*\n  first"):
        report.main(["sweep=second", f"paths.outputs={tmp_path}"])
    with pytest.raises(UserError, match="takes either sweep=.* or run="):
        report.main(["sweep=first", "run=a"])


def toy(resolved: Path, launcher: dict, held: int) -> int:
    """In the place of the workers: the best figure is a function of lr, greatest at 1e-3 and no number above 1e-2."""
    settings = config.load_resolved(resolved)
    with open(Path(settings["paths"]["outputs"]) / "started", "a") as log:
        log.write(f"{resolved.parent.name} {os.environ.get('OMP_NUM_THREADS')}\n")
    if settings["seed"] == 13:
        return faults.EXIT_FAULT
    value = math.nan if settings["lr"] > 1e-2 else -abs(math.log10(settings["lr"]) + 3)
    run_folder.write_json(resolved.parent / "finished", {"step": settings["steps"], "best": {"value": value}})
    return faults.EXIT_FINISHED


@pytest.fixture
def train(tmp_path, monkeypatch, capfd):
    """train("lr=1,2", …) -> (exit code, what was printed, jobs that were started so far)."""
    monkeypatch.setenv("VIREO_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(launch, "start", toy)

    def call(*words: str) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["vireo", "train", "-m", "tracker=none", *words])
        capfd.readouterr()
        code = cli.vireo()
        started = (tmp_path / "started").read_text().splitlines() if (tmp_path / "started").exists() else []
        return code, "".join(capfd.readouterr()), started

    return call


def table(outputs: Path) -> list[dict]:
    last = max((outputs / "sweeps").iterdir())
    with open(last / "sweep.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_failed_job_stops_no_other_and_what_is_missing_is_done_later(train, tmp_path, monkeypatch):
    words = ["experiment=taehv", "seed=1,13,3", "launcher.jobs=2"]
    code, said, started = train(*words)
    assert code == 1 and len(started) == 3
    assert [row["state"] for row in table(tmp_path)] == ["finished", "failed (1)", "finished"]
    assert "job 1 (seed=13) failed (1): see " in said
    _, _, started = train(*words)
    assert len(started) == 4 and started[3].startswith("mini_seed-13-")


def test_yaml_files_that_change_while_jobs_wait_are_told(train, tmp_path, monkeypatch):
    file = tmp_path / "conf" / "debug" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package _global_\n")

    def edit(resolved: Path, launcher: dict, held: int) -> int:
        file.write_text("# @package _global_\nnotes: edited\n")
        return toy(resolved, launcher, held)

    monkeypatch.setattr(launch, "start", edit)
    code, said, _ = train("--config-dir", str(tmp_path / "conf"), "experiment=taehv", "debug=mine", "seed=1,2")
    assert code == 0 and said.count("YAML files changed after the sweep began; this job runs what is there now") == 1
    assert "job 1 (seed=2) ran YAML files as changed after the sweep began" in said


def test_what_shapes_no_result_can_be_swept_too(train, tmp_path):
    words = ["experiment=taehv", "strategy=single,ddp", "run=one"]
    code, said, started = train(*words)
    assert code == 0 and "is finished" not in said
    assert [name.rpartition("-")[0] for name in started] == ["one_strategy-single", "one_strategy-ddp"]
    assert len({row["run"] for row in table(tmp_path)}) == 2


def test_a_place_that_a_sweep_had_before_shows_the_new_one(train, tmp_path):
    place = f"hydra.sweep.dir={tmp_path / 'sweeps' / 'here'}"
    assert train("experiment=taehv", "seed=1,2", place)[0] == 0
    code, said, started = train("experiment=taehv", "seed=2", place)
    assert code == 0 and said.count("is finished") == 1 and len(started) == 2
    (row,) = table(tmp_path)
    assert "seed-2" in row["run"]


def test_folders_of_jobs_are_called_by_their_numbers(train, tmp_path):
    with pytest.raises(UserError, match="hydra.sweep.subdir is 'seed_.{seed}'; leave it out"):
        sweeps.check_folders("seed_${seed}")
    with pytest.raises(SystemExit):
        train("experiment=taehv", "seed=1,2", "hydra.sweep.subdir=seed_${seed}")
    assert not (tmp_path / "started").exists()


def test_experiments_by_pattern_and_ranges(train, tmp_path):
    code, _, started = train("experiment=glob(taehv*,exclude=*wan)", "seed=range(1,3)")
    assert code == 0 and len(started) == 4
    assert {row["overrides"] for row in table(tmp_path)} == {
        f"experiment={name} seed={seed}" for name in ("taehv", "taehv_seraena") for seed in (1, 2)
    }


def test_names_of_runs_in_a_sweep_begin_with_what_is_swept(train):
    long = ["batch_size=3", "ema.decay=0.123", "height=96", "logging.every=7", "max_grad_norm=0.3", "warmup_steps=7"]
    code, said, started = train("experiment=taehv", *long, "width=96,128")
    assert code == 0, said
    assert [name.split("_")[:2] for name in started] == [["mini", "width-96"], ["mini", "width-128"]]
    assert all("_batch_size-3_" in name and len(name.split()[0]) <= 60 for name in started)


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs Optuna: pip install 'vireo[optuna]'")
@pytest.mark.parametrize(
    "higher_is_better", [pytest.param(True, marks=pytest.mark.slow), pytest.param(False, marks=pytest.mark.full)]
)
def test_optuna_seeks_the_best_figure_and_finds_finished_runs_again(train, tmp_path, higher_is_better):
    words = ["experiment=taehv", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=4"]
    words += ["lr=choice(1e-4,1e-3,5e-2)", f"validation.higher_is_better={higher_is_better}", "seed=5"]
    code, said, started = train(*words)
    assert code == 0, said
    tried = {row["overrides"] for row in table(tmp_path)}
    best = "lr=0.001" if higher_is_better else "lr=0.0001"
    assert f"Directions: ['{'maximize' if higher_is_better else 'minimize'}']" in said
    assert {best, "lr=0.05"} <= tried, "another seed of the sampler is needed for this test"
    assert f"Best parameters: {{'lr': {best.removeprefix('lr=')}}}" in said
    assert len(started) == len(tried)
    assert train(*words)[2] == started


def test_optuna_that_is_not_installed_is_told(train, monkeypatch):
    monkeypatch.setattr("vireo.config.composition.find_spec", lambda name: None)
    code, said, _ = train("hydra/sweeper=optuna", "lr=interval(1e-4,1e-3)")
    assert code == 2 and "pip install 'vireo[optuna]'" in said
