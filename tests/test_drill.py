"""Every fault, made for real, on one cheap recipe; tests/test_experiments.py has the worst ones on every recipe."""

import shlex

import pytest

from tests import drills, runs
from vireo import drill
from vireo.errors import UserError

TINY = [*(word for word in runs.TINY if not word.startswith(("steps=", "loader"))), "loader.workers=1"]


@pytest.fixture(scope="module")
def drilled(tmp_path_factory):
    return drills.undisturbed(TINY, tmp_path_factory.mktemp("drill"))


# What tests/test_resume.py shows in other ways, and what waits for a timeout, is left to the full matrix.
ELSEWHERE = ("kill", "kill-save", "stop", "disk-full", "damage", "hang-loader")


def titles():
    marked = ((fault.title, [pytest.mark.full] if fault.title in ELSEWHERE else []) for fault in drill.FAULTS)
    return [pytest.param(title, marks=marks) for title, marks in marked]


@pytest.mark.parametrize("title", titles())
def test_it_survives(drilled, title):
    drills.survives(drilled, title)


def test_memory_is_not_tried_again_where_others_wait_in_the_forward_pass(drilled):
    fault, one = next(fault for fault in drill.FAULTS if fault.title == "memory"), drilled[0]
    assert fault.needs(one) is None and "nothing smaller" in fault.needs({**one, "batch_size": 1})
    seraena = {"_target_": "vireo.losses.autoencoder_seraena.AutoencoderSeraena"}
    zero = {"_target_": "vireo.strategies.zero.Zero"}
    waiting = [
        ("loss", seraena),
        ("strategy", {"_target_": "vireo.strategies.sharded.FullySharded"}),
        ("strategy", {**zero, "config": {"zero_optimization": {"stage": 3}}}),
    ]
    two = {**one, "launcher": {**one["launcher"], "processes": 2}}
    for node, value in waiting:
        assert "other processes wait" in fault.needs({**two, node: value}) and fault.needs({**one, node: value}) is None
    assert fault.needs({**two, "strategy": {**zero, "config": {"zero_optimization": {"stage": 2}}}}) is None
    assert fault.needs(two) is None


@pytest.mark.parametrize("title", ["not-finite", "memory"])
def test_so_do_two_processes(tmp_path, title):
    drills.two_ranks([*TINY, "loader.workers=0"], tmp_path, title)


def test_a_chain_is_refused_with_the_command_of_each_stage(tmp_path):
    with pytest.raises(UserError, match="experiment=diffueraser is a chain of 2 stages") as refused:
        drill.settings_of(["experiment=diffueraser", "chain.stage2.lr=2e-5", "batch_size=2"], tmp_path)
    commands = [shlex.split(line) for line in str(refused.value).splitlines() if line.startswith("  vireo drill ")]
    made = [drill.settings_of(words, tmp_path) for _, _, *words in commands]
    assert [one["experiment"] for one in made] == ["diffueraser_stage1", "diffueraser_stage2"]
    assert made[1]["lr"] == 2e-5 != made[0]["lr"] and [one["batch_size"] for one in made] == [2, 2]


def test_a_difference_is_seen(drilled, tmp_path):
    """A drill that compared nothing would praise everything."""
    settings, undisturbed = drilled
    other = drill._make({**settings, "lr": 2 * settings["lr"]}, "another_lr")
    assert drills.start(other, None) == 0
    assert "of step" in (drill.difference(undisturbed, other, exact=True) or "")


def test_a_run_that_logged_other_steps_is_a_difference(tmp_path):
    for name, count in (("one", 3), ("two", 2)):
        (tmp_path / name).mkdir()
        rows = "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(count))
        (tmp_path / name / "metrics.jsonl").write_text(rows)
    told = drill.difference(tmp_path / "one", tmp_path / "two", exact=True)
    assert told == "2 steps were logged, 3 in an undisturbed run"


def test_a_run_that_does_not_survive_is_told(drilled, monkeypatch):
    def forgetful():
        from vireo import checkpoint

        checkpoint.latest = lambda folder, before=None: None  # resumes from nothing
        drill._at_step(3, drill._signal(9))

    settings, undisturbed = drilled
    fault = drill.Fault("forget", "nothing is resumed", forgetful, drill.KILLED, then="same")
    monkeypatch.setattr(drill, "FAULTS", (fault._replace(code=0),))
    (result,) = drill.drill(settings, drills.start, exact=True, undisturbed=undisturbed)
    assert result.survived is False and "exit code 137, 0 was expected" in result.detail
