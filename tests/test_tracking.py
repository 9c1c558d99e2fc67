import json
import sys

from tests import runs
from vireo import checkpoint, config
from vireo.mini import world
from vireo.tracking import Log, MetricsFile, TensorBoard, Tracker, Wandb, read_metrics

ABOUT = {"name": "run", "config": {"lr": 0.1}, "notes": "a note", "tags": ["one"], "run_id": None, "step": 0}


def test_rows_after_the_resumed_step_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step)})
    first.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    second = MetricsFile(path, 2)
    second.log(3, {"loss": 30.0})
    second.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_fresh_start_begins_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 9}\n')
    MetricsFile(path, 0).close()
    assert read_metrics(path) == []


class Broken(Tracker):
    def start(self, **about):
        return "id"

    def log(self, step, metrics):
        raise ConnectionError("no route")

    def picture(self, step, name, path):
        raise AssertionError("called after it was switched off")

    def finish(self):
        raise AssertionError("called after it was switched off")


def test_a_tracker_that_fails_never_stops_the_run(tmp_path, caplog):
    log = Log(MetricsFile(tmp_path / "metrics.jsonl", 0), Broken())
    assert log.start(folder=tmp_path, **ABOUT) == "id"
    log.metrics(1, {"loss": 1.0})
    log.picture(1, "x", tmp_path / "x.png")
    log.metrics(2, {"loss": 2.0})
    log.finish()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert caplog.text.count("switched off") == 1 and "no route" in caplog.text


def test_a_service_that_is_down_at_one_start_costs_no_run_id(tmp_path):
    """The next start goes on in the same curve."""
    from vireo import objects

    class Service(Broken):
        def start(self, run_id, **about):
            if down:  # of the loop below, at this start
                raise ConnectionError("no route")
            return run_id or "curve"

        log = picture = finish = lambda *about: None

    def use():
        objects.tracker = lambda settings: Service()

    world.ensure()
    folder, known = runs.make(tmp_path, ["steps=5", "validation.every=null", "validation.at_start=false"]), []
    for last in (2, 4, 5):
        down = last == 4
        settings = config.load_resolved(folder / "resolved.yaml")
        config.save_resolved({**settings, "preempt_at": last}, folder / "resolved.yaml")
        assert runs.work(folder, use) == (75 if last < 5 else 0)
        known.append(checkpoint.latest(folder).state["tracker_id"])
    assert known == ["curve"] * 3


def test_tensorboard_gets_figures_notes_and_tags(tmp_path):
    for first, last in ((0, 3), (2, 3)):  # the second goes on after step 2: what came later is logged again
        tracker = TensorBoard()
        no_id = tracker.start(folder=tmp_path, **{**ABOUT, "step": first})
        assert no_id is None  # else tracker=wandb would take it for its own when the run goes on
        tracker.log(last, {"loss": 0.5})
        tracker.finish()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("loss")] == [(3, 0.5)]
    text = events.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "a note" in text and "one" in text


def test_wandb_works_offline_without_an_account_and_keeps_its_id(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    tracker = Wandb(mode="offline")
    run_id = tracker.start(folder=tmp_path, **ABOUT)
    tracker.log(1, {"loss": 0.5})
    tracker.finish()
    again = Wandb(mode="offline")
    assert run_id and again.start(folder=tmp_path, **{**ABOUT, "run_id": run_id}) == run_id
    again.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_trackers_are_imported_late():
    code = "import sys, vireo.tracking; print(json.dumps(sorted({'torch', 'wandb', 'tensorboard'} & set(sys.modules))))"
    import subprocess

    answer = subprocess.run([sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) == []
