import itertools

import pytest
import torch

from tests.toys import Denoise, ToyDataset, ToyNetwork
from vireo import distributed, faults, optimizers
from vireo.data.stream import Slices, Stream, loader
from vireo.ema import ExponentialMovingAverage
from vireo.freezing import FreezePolicy
from vireo.models.encoders import NoEncoder
from vireo.randomness import seed_default
from vireo.schedules import Constant, Cosine
from vireo.strategies.replicated import Replicated
from vireo.training import Progress, train


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
        max_bad_files=1,
        stop=faults.StopRequest() if stop is None else stop,
        report=lambda step, values: figures.__setitem__(step, dict(values)),
        at_boundary=boundary or (lambda progress, last: None),
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
