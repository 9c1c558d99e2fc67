"""A step that was turned away is made again: the same weights, the same samples, one at a time."""

import shutil

import pytest

from tests import runs
from vireo import incidents
from vireo.errors import UserError
from vireo.losses.autoencoder import Autoencoder
from vireo.mini import world
from vireo.verbs import replay

STEP = 4  # counted from 0; the newest checkpoint before it is that of four steps
BROKEN = 9  # the position of one of its two samples


def poison():
    whole = Autoencoder.__call__

    def poisoned(self, network, batch, draws):
        objective = whole(self, network, batch, draws)
        bad = self.learning and BROKEN in draws.positions
        return objective._replace(total=objective.total * (float("nan") if bad else 1.0))

    Autoencoder.__call__ = poisoned


@pytest.fixture(scope="module")
def poisoned_run(tmp_path_factory):
    world.ensure()
    folder = runs.make(tmp_path_factory.mktemp("poisoned"), ["validation.at_start=false"])
    assert runs.work(folder, poison) == 0
    return folder


def test_the_incident_names_what_was_not_finite(poisoned_run):
    assert incidents.steps(poisoned_run) == [STEP]
    incident = incidents.read(poisoned_run, STEP)
    assert [position for position, _ in incident.samples] == [8, 9] and incident.suspects() == ["loss"]
    assert [row["skipped_steps"] for row in runs.metrics(poisoned_run) if "skipped_steps" in row][-1] == 1


def test_the_broken_sample_is_found(poisoned_run, monkeypatch, capsys):
    monkeypatch.setattr(Autoencoder, "__call__", Autoencoder.__call__)
    poison()
    before = sorted(path.name for path in poisoned_run.rglob("*"))
    assert replay.main([f"run={poisoned_run}"]) == 0
    said = capsys.readouterr().out
    assert "making it again, 0 step(s) after step_00000004 …" in said
    name = incidents.read(poisoned_run, STEP).samples[1][1]
    assert f"{name}: gradients that are not finite: " in said and "and" in said.splitlines()[-1]
    rows = {line.split()[0]: line.split()[-1] for line in said.splitlines() if line.split()[0] in ("8", "9")}
    assert rows == {"8": "True", "9": "False"}
    assert sorted(path.name for path in poisoned_run.rglob("*")) == before, "nothing is written into the run"


def test_where_no_checkpoint_before_it_is_left_it_goes_from_the_beginning_and_says_so(poisoned_run, tmp_path, capsys):
    folder = tmp_path / "pruned"
    shutil.copytree(poisoned_run, folder)
    for path in (folder / "checkpoints").glob("step_0000000[34]"):
        shutil.rmtree(path)
    assert replay.main([f"run={folder}"]) == 0
    assert "again, 4 step(s) after the beginning, since no checkpoint before it is left" in capsys.readouterr().out


def test_the_step_is_reached_with_the_weights_that_it_began_with(poisoned_run, tmp_path):
    """Without the poison, the mean of the samples' losses is what an undisturbed run has logged for that step."""
    from vireo import config
    from vireo.replay import replay as made_again

    undisturbed = runs.train(tmp_path, "validation.at_start=false")
    settings = config.load_resolved(poisoned_run / "resolved.yaml")
    samples = made_again(settings, poisoned_run, incidents.read(poisoned_run, STEP))
    logged = next(row["loss"] for row in runs.metrics(undisturbed) if row["step"] == STEP + 1 and "loss" in row)
    assert all(sample.finite for sample in samples)
    assert sum(sample.terms["loss"] for sample in samples) / 2 == pytest.approx(logged, rel=1e-6)


def test_mistakes_are_told(poisoned_run):
    with pytest.raises(UserError, match="needs run="):
        replay.main([*runs.TINY])
    with pytest.raises(UserError, match=r"step 3 of it was turned away.*there are 4"):
        replay.main([f"run={poisoned_run}", "step=3"])
