import functools
import itertools
import json
import math
import os
from pathlib import Path

import pytest
import torch

from tests.toys import Denoise, ToyDataset, ToyNetwork
from vireo import distributed, faults, optimizers
from vireo.data.stream import Slices, Stream, loader
from vireo.ema import ExponentialMovingAverage
from vireo.freezing import FreezePolicy
from vireo.hangs import Watchdog
from vireo.models.encoders import NoEncoder
from vireo.randomness import seed_default
from vireo.schedules import Constant, Cosine
from vireo.strategies.replicated import Replicated
from vireo.training import Progress, train
from vireo.video_io import BadVideoError


@pytest.fixture(autouse=True)
def fresh_process_state():
    yield
    distributed.close()


def run(
    steps=6,
    batch_size=2,
    accumulation=1,
    workers=0,
    loss=None,
    lr=0.01,
    schedule=None,
    skips=3,
    boundary=None,
    stop=None,
    log_every=1,
    max_loss_rise=None,
    record=lambda incident: None,
    bad_samples=Path(os.devnull),
    bad_limit=1,
):
    """Train the toy recipe; returns (network, average, reported figures, progress)."""
    strategy = Replicated(precision="fp32")
    seed_default(0, "init", "network")
    network, policy = ToyNetwork(), FreezePolicy(["."])
    policy(network)
    optimizer = optimizers.adamw(policy.groups(network, lr), lr=lr)
    average = ExponentialMovingAverage(dict(network.named_parameters()), 0.9)
    figures: dict[int, dict] = {}
    slices = Slices(0, 0, steps, batch_size, accumulation, distributed.rank(), distributed.world_size())
    progress = train(
        strategy.prepare(network, optimizer),
        NoEncoder(),
        loss or Denoise(),
        iter(loader(Stream(ToyDataset(), 0), slices, workers=workers, timeout=20)),
        optimizer,
        schedule or Constant(),
        strategy,
        average,
        seed=0,
        progress=Progress(0, 0, 0),
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        max_grad_norm=1.0,
        log_every=log_every,
        max_consecutive_skips=skips,
        max_loss_rise=max_loss_rise,
        room=faults.Room(Path(os.devnull, "none")),
        bad_files=faults.BadFiles(bad_limit, bad_samples),
        stop=faults.StopRequest() if stop is None else stop,
        watchdog=Watchdog(Path(os.devnull), timeout=1e6),
        report=lambda step, values: figures.__setitem__(step, dict(values)),
        record=record,
        at_boundary=boundary or (lambda progress, last: False),
    )
    return network, average, figures, progress


def losses(figures):
    return [figures[step]["loss"] for step in sorted(figures)]


def test_it_learns_and_counts():
    _, _, figures, progress = run(steps=60)
    assert progress == Progress(60, 120, 0)
    assert losses(figures)[-1] < 0.5 * losses(figures)[0]


def test_accumulation_equals_a_larger_batch():
    big, _, one, _ = run(batch_size=4)
    small, _, two, _ = run(batch_size=2, accumulation=2)
    torch.testing.assert_close(losses(one), losses(two), rtol=1e-5, atol=0)
    for a, b in zip(big.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_workers_change_nothing(workers):
    assert losses(run()[2]) == losses(run(workers=workers)[2])


def test_the_rate_follows_the_schedule():
    figures = run(steps=5, schedule=Cosine(2))[2]
    rates = [figures[step]["lr"] for step in range(1, 6)]
    assert rates[0] == pytest.approx(0.005) and rates[1] == pytest.approx(0.01) and rates[-1] == pytest.approx(0)


def test_the_base_rate_is_told_and_each_groups_gradient(monkeypatch):
    groups = {"first": {"match": "first", "lr_scale": 100.0}}
    monkeypatch.setattr(FreezePolicy, "__init__", functools.partialmethod(FreezePolicy.__init__, groups=groups))
    figures = run(steps=2, lr=0.01)[2][1]
    assert figures["lr"] == pytest.approx(0.01)
    norms = figures["grad_norm_first"], figures["grad_norm_default"]
    assert min(norms) > 0 and figures["grad_norm"] == pytest.approx(math.hypot(*norms))


def test_a_network_adds_figures_of_its_own(monkeypatch):
    monkeypatch.setattr(ToyNetwork, "figures", lambda self: {"gate": self.first.bias.detach().abs().sum()})
    figures = run(steps=2)[2]
    assert figures[1]["gate"] > 0 and "grad_norm_default" not in figures[1]


def test_a_figure_of_which_nothing_is_known_is_left_out(monkeypatch):
    known = iter([math.nan, 2.0])
    monkeypatch.setattr(Denoise, "end_step", lambda self: {"late": torch.tensor(next(known))})
    figures = run(steps=2)[2]
    assert "late" not in figures[1] and figures[2]["late"] == 2.0


def test_a_step_without_a_finite_gradient_moves_nothing():
    states = {}

    def remember(progress, last):
        states[progress.step] = torch.cat([p.detach().flatten().clone() for p in spy[0]])

    spy = []

    class Poisoned(Denoise):
        def __call__(self, network, batch, draws):
            if not spy:
                spy.append(list(network.parameters()))
            return super().__call__(network, batch, draws)

    _, average, figures, progress = run(loss=Poisoned(poison_at=2), boundary=remember)
    assert torch.equal(states[2], states[3]) and not torch.equal(states[3], states[4])
    assert progress.skipped == 1 and figures[6]["skipped_steps"] == 1
    assert all(torch.isfinite(value).all() for value in average.average.values())


def test_too_many_of_them_end_the_run_with_the_samples_named():
    class AlwaysPoisoned(Denoise):
        def __call__(self, network, batch, draws):
            self.poison_at = draws.step
            return super().__call__(network, batch, draws)

    with pytest.raises(faults.TooManyFaults, match="3 steps in a row.*from step 0 to 2"):
        run(loss=AlwaysPoisoned())


def test_a_stop_request_ends_the_run_at_the_next_boundary():
    request, steps = faults.StopRequest(), []

    def boundary(progress, last):
        steps.append((progress.step, last))
        if progress.step == 2:
            request.signal = 15

    assert run(boundary=boundary, stop=request)[3].step == 3
    assert steps == [(1, False), (2, False), (3, True)]


def test_two_ranks_see_what_one_bigger_batch_sees():
    one = list(Slices(10, 0, 3, 4, 1, 0, 1))
    two = [list(Slices(10, 0, 3, 2, 1, rank, 2)) for rank in range(2)]
    for whole, left, right in zip(one, *two, strict=True):
        assert whole == left + right
    accumulated = list(Slices(10, 0, 3, 2, 2, 0, 1))
    assert list(itertools.chain(*one)) == list(itertools.chain(*accumulated))


def test_a_skip_is_known_at_the_boundary_of_its_own_step():
    skipped = {}
    run(
        loss=Denoise(poison_at=2),
        log_every=100,
        boundary=lambda progress, last: skipped.update({progress.step: progress.skipped}),
    )
    assert skipped == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 1}


class Large(Denoise):
    """Runs out of memory with more than `fits` samples at once, from `step` on."""

    def __init__(self, fits, step=2):
        super().__init__()
        self.fits, self.step, self.sizes = fits, step, []

    def __call__(self, network, batch, draws):
        size = len(batch["position"])
        self.sizes.append(size)
        if draws.step >= self.step and size > self.fits:
            network(torch.zeros(1, 2, 3, 8, 8))  # part of a forward pass, whose graph is thrown away
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().__call__(network, batch, draws)


@pytest.mark.parametrize(("fits", "sizes"), [(3, [5, 5, 5, 3, 2, 3, 2]), (1, [5, 5, 5, 3, 2, 1, 1, 1, 1, 1, 1])])
def test_out_of_memory_is_tried_again_in_smaller_pieces_with_the_same_gradient(fits, sizes):
    whole, _, expected, _ = run(batch_size=5)
    loss = Large(fits)
    pieces, _, figures, progress = run(batch_size=5, loss=loss)
    assert loss.sizes[: len(sizes)] == sizes and max(loss.sizes[-3:]) == fits
    assert progress.skipped == 0 and figures[6]["memory_retries"] > 0 == expected[6]["memory_retries"]
    torch.testing.assert_close(losses(figures), losses(expected), rtol=1e-6, atol=0)
    for a, b in zip(whole.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class LargeForTheMachine(Large):
    """Asks for more than any machine has, from torch or, as decoders do, from Python."""

    def __init__(self, asks):
        super().__init__(fits=3)
        self.asks = asks

    def __call__(self, network, batch, draws):
        try:
            return super().__call__(network, batch, draws)
        except torch.OutOfMemoryError:
            self.asks()


@pytest.mark.parametrize("asks", [lambda: torch.empty(1 << 45), lambda: bytearray(1 << 60)], ids=["torch", "python"])
def test_so_is_the_memory_of_the_machine(asks):
    expected, found = run(batch_size=5)[2], run(batch_size=5, loss=LargeForTheMachine(asks))[2]
    assert found[6]["memory_retries"] == 1
    torch.testing.assert_close(losses(found), losses(expected), rtol=1e-6, atol=0)


def test_another_error_of_torch_is_not_taken_for_it():
    with pytest.raises(RuntimeError, match="shape"):
        run(loss=LargeForTheMachine(lambda: torch.ones(2).view(3)), batch_size=5)


def test_pieces_and_accumulation():
    _, _, expected, _ = run(batch_size=3, accumulation=2)
    torch.testing.assert_close(
        losses(run(batch_size=3, accumulation=2, loss=Large(2, step=0))[2]), losses(expected), rtol=1e-6, atol=0
    )


def test_the_next_start_takes_pieces_that_fit(tmp_path):
    path = tmp_path / "room.json"
    batch = {"position": torch.arange(5), "bad": []}
    for error, size, rows in [
        (ValueError(), 5, None),  # nothing to do with memory
        (torch.OutOfMemoryError(), 1, None),  # there is nothing smaller to try
        (torch.OutOfMemoryError(), 5, 3),
        (MemoryError(), 3, 2),
    ]:
        with pytest.raises(type(error)), faults.Room(path).noted(size):
            raise error
        assert faults.rows_that_fit(path) == rows
    pieces = faults.Room(path, faults.rows_that_fit(path)).pieces(batch)
    assert [piece["position"].tolist() for piece in pieces] == [[0, 1], [2, 3], [4]]


def test_one_sample_that_does_not_fit_ends_the_run_with_what_helps():
    with pytest.raises(faults.TooManyFaults, match="step 2: out of memory with a single sample.*gradient_checkpoint"):
        run(loss=Large(0))


class OneFileIsBroken(ToyDataset):
    def sample(self, index, draws):
        if index == 3:
            raise BadVideoError("clip3.mp4", "it is empty")
        return super().sample(index, draws)


def test_a_file_that_cannot_be_read_is_told_once_written_down_and_counted(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr("tests.test_training.ToyDataset", OneFileIsBroken)
    lines = tmp_path / "bad_samples.jsonl"
    _, _, figures, progress = run(steps=14, bad_samples=lines)  # four epochs
    (row,) = map(json.loads, lines.read_text().splitlines())
    assert row.pop("step") in range(14) and row == {"file": "clip3.mp4", "reason": "it is empty"}
    told = [record.getMessage() for record in caplog.records if "clip3" in record.getMessage()]
    assert told == ["clip3.mp4 cannot be read, so another sample takes its place: it is empty"]
    assert figures[14]["bad_files"] == 1 and progress.step == 14


class Spiky(Denoise):
    """A loss that is a hundred times too large at one step."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def __call__(self, network, batch, draws):
        objective = super().__call__(network, batch, draws)
        return objective._replace(total=objective.total * (100 if draws.step == self.at else 1))


@pytest.mark.parametrize(("limit", "skipped"), [(10, 1), (1000, 0), (None, 0)])
def test_a_loss_spike_is_turned_away_where_a_limit_is_set(limit, skipped):
    incidents = []
    _, _, figures, progress = run(steps=26, loss=Spiky(at=23), max_loss_rise=limit, record=incidents.append)
    assert progress.skipped == skipped and [incident.step for incident in incidents] == [23] * skipped
    if limit == 10:
        assert progress.usual_loss == pytest.approx(sum(losses(figures)[:20]) / 20, rel=0.2)


def test_the_guard_counts_finite_losses_only_and_goes_on_where_it_stopped():
    values = [1.0, math.nan, *(1.0 + 0.1 * (i % 3) for i in range(30)), math.inf]
    whole, first = faults.LossSpikes(10), faults.LossSpikes(10)
    for value in values:
        whole.guarded(torch.tensor(value))
    for value in values[:12]:  # too few to judge by
        first.guarded(torch.tensor(value))
    again = faults.LossSpikes(10, first.usual, first.seen)
    for value in values[12:]:
        again.guarded(torch.tensor(value))
    assert (again.usual, again.seen) == (whole.usual, whole.seen) and whole.seen == 31
    assert math.isnan(whole.guarded(torch.tensor(12.0))) and whole.guarded(torch.tensor(9.0)) == 9
    assert faults.LossSpikes(10, first.usual, 19).guarded(torch.tensor(99.0)) == 99


def test_a_step_that_is_turned_away_is_recorded_with_its_samples_and_terms():
    incidents = []
    run(loss=Denoise(poison_at=2), record=incidents.append, log_every=100)
    (incident,) = incidents
    assert incident.step == 2 and [position for position, _ in incident.samples] == [4, 5]
    assert all(name.startswith("clip") for _, name in incident.samples)
    assert incident.suspects() == ["loss", "mse"] and "loss, mse of rank 0" in incident.diagnosis()
