import json

from PIL import Image

from vireo import report, run_folder
from vireo.console import Console, set_up_logging

FIGURES = {"validation/psnr": 20.5, "validation/loss": 0.01, "validation/mean colour/psnr": 17.0}


def test_comparison_has_a_line_for_each_column():
    lines = report.comparison(FIGURES).splitlines()
    assert lines[0].split() == ["psnr", "loss"]
    assert lines[1].split() == ["prediction", "20.5", "0.01"] and lines[2].split() == ["mean", "colour", "17", "-"]


def test_curves_are_a_picture(tmp_path):
    rows = [{"step": s, "loss": 1 / s, "lr": 0.1} for s in range(1, 9)] + [{"step": 8, **FIGURES}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Image.open(report.curves(tmp_path)) as picture:
        assert picture.width > 600
    several = report.draw({"a": rows, "b": rows[:3]}, tmp_path / "both.png")
    assert several.stat().st_size > 5000
    assert report.draw({"empty": []}, tmp_path / "none.png").exists()


def test_a_run_in_a_row(tmp_path):
    folder = tmp_path / "taehv" / "one"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(
        '{"step": 2, "loss": 0.5, "seconds_per_step": 2.0}\n{"step": 2, "validation/psnr": 20}\n'
    )
    assert report.state_of(folder)["state"] == "no checkpoint" and report.state_of(folder)["best"] == 20
    run_folder.write_json(folder / "finished", {"step": 2, "best": {"step": 2, "value": 21.0}, "figures": {}})
    row = report.state_of(folder)
    assert (row["state"], row["best"], row["steps"], row["loss"]) == ("finished", 21.0, 2, 0.5)
    with run_folder.lock(folder):
        assert report.state_of(folder)["state"] == "running"


def test_figures_of_other_clips_are_not_compared(tmp_path):
    def row(step, loss, psnr, clips):
        return {"step": step, "validation/loss": loss, "validation/psnr": psnr, "held_out_clips": clips}

    def write(*rows):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        return report.where_to_look(tmp_path, [], {})

    assert "held-out loss" not in write(row(0, 2.94, 30.0, 6), row(6, 1.865, 20.0, 4))
    assert report.state_of(tmp_path)["best"] == 20
    said = write(row(0, 2.94, 30.0, 6), row(3, 1.5, 21.0, 4), row(6, 1.4, 20.0, 4))
    assert "fixed draws: 1.5 at step 3, 1.4 at step 6" in said and report.state_of(tmp_path)["best"] == 21


def test_tables():
    assert report.table([]) == "(none)"
    text = report.table([{"a": 1, "long name": None}, {"a": 22.123456, "long name": "x"}])
    assert text.splitlines() == ["a      long name", "1      -", "22.12  x"]


def test_the_console_says_what_people_look_for(tmp_path, capsys):
    set_up_logging(tmp_path / "train.log")
    console = Console(steps=100, start=0, global_batch=4)
    console.show(10, {"loss": 0.5, "lr": 1e-3, "seconds_per_step": 2.0})
    console.show(10, FIGURES)
    said = capsys.readouterr().out
    assert "loss 0.5  lr 0.001  2 s/step  2 samples/s" in said and "3:00 left" in said
    assert "psnr 20.50 dB (mean colour 17.00)  loss 0.01" in said
    assert "samples/s" in (tmp_path / "train.log").read_text()
