"""Chains from the command line: two stages of a tiny autoencoder, interrupted in either, swept, and looked at."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from tests import runs
from tests.test_launch import vireo  # noqa: F401 - a fixture
from vireo import chains, checkpoint, config, faults, launch, processes, ranks, run_folder
from vireo.errors import UserError

CHAIN = [*runs.TINY, "steps=4", "chain.one.experiment=taehv", "chain.two.experiment=taehv", "chain.two.steps=5"]
CHAIN += ["checkpoint.every=2", "validation.every=null", "validation.clips=1"]


def stages(outputs, name="both"):
    return run_folder.stages(outputs / "taehv" / name)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """A folder of outputs with the chain "both", which nothing has interrupted."""
    outputs = tmp_path_factory.mktemp("calm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "start", lambda resolved, launcher, held: abs(runs.work(resolved.parent)))
        done = launch.train(*CHAIN, "run=both", f"paths.outputs={outputs}")
    assert done.exit_code == faults.EXIT_FINISHED and checkpoint.latest(done.folder).step == 5
    return outputs


def test_each_stage_starts_from_the_export_of_the_one_before(calm, vireo, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("VIREO_OUTPUTS", str(calm))
    first, second = stages(calm).values()
    assert (first.resolve().name, second.resolve().name) == ("both-one", "both-two")
    assert config.load_resolved(second / "resolved.yaml")["init_from"] == str(first.resolve() / "export")
    assert [checkpoint.latest(folder).step for folder in (first, second)] == [4, 5]
    psnr = [[row["validation/psnr"] for row in runs.metrics(folder) if "validation/psnr" in row] for folder in
            (first, second)]  # fmt: skip
    assert psnr[1][0] == pytest.approx(psnr[0][-1], abs=1e-6)

    stamps = [(folder / "metrics.jsonl").stat().st_mtime_ns for folder in (first, second)]
    code, said = vireo("train", *CHAIN, "run=both")
    assert code == 0 and said.count("is finished") == 2 and "two, stage 2 of 2" in said, said
    assert stamps == [(folder / "metrics.jsonl").stat().st_mtime_ns for folder in (first, second)]

    code, said = vireo("runs")
    assert code == 0 and "both (two)" in said
    code, said = vireo("report", "run=both")
    assert code == 0 and "both-one" in said and "both-two" in said and said.count("curves.png") == 2
    code, said = vireo("export", "run=both", "step=5", f"out={tmp_path / 'out'}")
    assert code == 0
    exported = load_file(tmp_path / "out" / "taecvx.safetensors")
    trained = load_file(second / "export" / "taecvx.safetensors")
    assert all(torch.equal(exported[name], trained[name]) for name in trained)
    code, said = vireo("sample", "run=taehv/both", "clips=1", f"out={tmp_path / 'shown'}")
    assert code == 0 and (tmp_path / "shown" / "clip_000.png").exists()


def test_a_killed_stage_goes_on_where_it_stopped(calm, vireo, tmp_path, monkeypatch):  # noqa: F811
    words = [*CHAIN, "run=both"]
    deadly = ["both-one", "both-two"]

    def killed_once(resolved, launcher, held):
        doomed = resolved.parent.name in deadly and deadly.pop(0)
        return abs(runs.work(resolved.parent, runs.die_at(3) if doomed else None))

    monkeypatch.setattr(launch, "start", killed_once)
    assert vireo("train", *words)[0] == signal.SIGKILL and list(stages(tmp_path)) == ["one"]
    assert vireo("train", *words)[0] == signal.SIGKILL and list(stages(tmp_path)) == ["one", "two"]
    code, said = vireo("train", *words)
    assert code == 0 and said.count("is finished") == 1, said
    for folder, undisturbed in zip(stages(tmp_path).values(), stages(calm).values(), strict=True):
        assert runs.metrics(folder) == runs.metrics(undisturbed)
        one, two = checkpoint.latest(folder).tensors("network"), checkpoint.latest(undisturbed).tensors("network")
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_longer_stage_is_refused_where_a_later_one_has_begun(calm, vireo, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(calm / "taehv", tmp_path / "taehv")
    one, two = stages(tmp_path).values()
    longer = [word if word != "steps=4" else "steps=6" for word in CHAIN] + ["run=both"]
    code, said = vireo("train", *longer)
    assert code == 2 and "one has still to train in" in said and "say chain.two.resume=none, once" in said, said
    assert [checkpoint.latest(folder).step for folder in (one, two)] == [4, 5]

    def killed(resolved, launcher, held):
        return abs(runs.work(resolved.parent, runs.die_at(3) if resolved.parent.name == "both-two-2" else None))

    with monkeypatch.context() as patch:
        patch.setattr(launch, "start", killed)
        assert vireo("train", *longer, "chain.two.resume=none")[0] == signal.SIGKILL
    assert [folder.name for folder in stages(tmp_path).values()] == ["both-one", "both-two-2"]
    code, said = vireo("train", *longer)  # a plain command goes on in the folder of the chain
    assert code == 0 and said.count("is finished") == 1, said
    one, new = stages(tmp_path).values()
    assert new.name == "both-two-2" and not (new.parent / "both-two-3").exists()
    assert [checkpoint.latest(folder).step for folder in (one, new, two)] == [6, 5, 5]
    assert vireo("train", *longer, "chain.two.steps=7")[0] == 0, "the last stage may be lengthened"
    assert checkpoint.latest(new).step == 7


def test_the_data_of_every_stage_is_checked(vireo):  # noqa: F811
    code, said = vireo("check", *CHAIN, "++chain.two.data.held_out=0.3")
    one, two = said.split("\ntwo (taehv)\n")
    assert code == 0 and one.count("\nvalidation") == two.count("\nvalidation") == 1, said
    assert "\none (taehv)\n" in one and one.split("\ntrain\n")[1] != two.split("\ntrain\n")[1], said


def test_a_mistake_in_the_last_stage_is_told_before_the_first_one_starts(vireo, tmp_path):  # noqa: F811
    code, said = vireo("train", *CHAIN, "chain.two.lrr=1")
    assert code == 2 and "chain.two: lrr: there is no such key" in said and not (tmp_path / "taehv").exists()


@pytest.mark.full
def test_a_sweep_over_a_stages_key_shares_the_stage_before(vireo, tmp_path):  # noqa: F811
    code, said = vireo("train", "-m", *CHAIN, "chain.two.lr=1e-3,1e-4")
    assert code == 0, said
    assert said.count("is finished (step 4)") == 1, "the second job finds the first stage done"
    notes = [json.loads(path.read_text()) for path in tmp_path.glob("sweeps/*/*/job.json")]
    lasts = {config.load_resolved(run_folder.Path(one["run"]) / "resolved.yaml")["lr"] for one in notes}
    assert lasts == {1e-3, 1e-4}
    assert "chain.two.lr=0.001" in said and "chain.two.lr=0.0001" in said


def test_a_sweep_of_a_named_chain_has_runs_of_its_own_for_each_job(tmp_path):
    """Also of the stage after the one whose key is swept: it starts from another export."""
    runs_of = []
    for lr in ("1e-3", "1e-4"):
        words = [*CHAIN, "run=both", f"paths.outputs={tmp_path}", f"++chain.one.lr={lr}"]
        settings = config.settings(words, swept=["chain.one.lr"])

        def stage(settings, words):
            runs_of.append(settings["run"])
            return launch.Job(list(words), config.run_folder(settings), faults.EXIT_FINISHED)

        chains.run(settings, words, ["chain.one.lr"], stage, config.run_folder)
    assert len(set(runs_of)) == 4, runs_of
    assert [name[:8] for name in runs_of] == ["both-one", "both-two"] * 2
    assert len(list(tmp_path.glob("taehv/both_lr-*/chain.json"))) == 2


@pytest.mark.full
def test_starting_afresh_leaves_the_earlier_runs(vireo, tmp_path):  # noqa: F811
    assert vireo("train", *CHAIN, "run=both")[0] == 0
    first = stages(tmp_path)
    assert vireo("train", *CHAIN, "run=both", "resume=none")[0] == 0
    second = stages(tmp_path)
    assert len({path.resolve() for path in [*first.values(), *second.values()]}) == 4


def test_the_hours_of_a_chain_are_counted_once(tmp_path, monkeypatch):
    """Also those of a stage that starts again after preempt_at."""
    started = []

    def preempted_once(resolved, launcher, held):
        started.append(os.environ[processes.STARTED])
        time.sleep(0.01)
        folder = resolved.parent
        checkpoint.folder_of(folder, 2).mkdir(parents=True, exist_ok=True)
        return faults.EXIT_FINISHED if len(started) % 2 == 0 else faults.EXIT_STOPPED

    monkeypatch.setattr(launch, "start", preempted_once)
    launch.train(*CHAIN, "preempt_at=2", f"paths.outputs={tmp_path}")
    assert len(started) == 4 and len(set(started)) == 1


def test_what_a_chain_cannot_do(monkeypatch, tmp_path):
    settings = config.settings([*CHAIN, f"paths.outputs={tmp_path}"])
    with pytest.raises(UserError, match=r"say chain\.<stage>\.resume=…"):
        chains.run({**settings, "resume": "some/checkpoint"}, CHAIN, [], lambda *_: None, config.run_folder)
    monkeypatch.setattr(ranks, "started", lambda: ranks.World(0, 2, "torchrun"))
    with pytest.raises(UserError, match="torchrun owns them"):
        chains.run(settings, CHAIN, [], lambda *_: None, config.run_folder)
