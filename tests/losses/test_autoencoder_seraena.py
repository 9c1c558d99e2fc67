"""The autoencoder's objective with Seraena: the reference's whole step, what counts, and when nothing may change."""

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.golden.fill import fill, noise
from tests.losses.test_seraena import distance, golden_discriminator, recorded_draws
from torch import nn

from vireo.errors import UserError
from vireo.losses import autoencoder
from vireo.losses.autoencoder import Autoencoder
from vireo.losses.autoencoder_seraena import VALUE, AutoencoderSeraena
from vireo.losses.packing import unpack
from vireo.losses.seraena import Seraena
from vireo.models.seraena_discriminator import SeraenaDiscriminator, SyncBatchNorm2d
from vireo.models.taehv import TAEHV, TAEHVOutput
from vireo.pixels import to_pixels
from vireo.randomness import Draws

GOLDEN = Path(__file__).parents[1] / "golden" / "taehv"
FIGURES = {"discriminator_loss", "feature_loss", "deviation", "gradient_ratio", "uninformative_value"}


def test_golden_step(monkeypatch):
    described, expected = (
        json.loads((GOLDEN / "step_taew2_1.json").read_text()),
        load_file(GOLDEN / "step_taew2_1.safetensors"),
    )
    video = (0.5 + 0.25 * noise("step_taew2_1.video", 2, 12, 3, 32, 32)).clamp(0, 1)
    latents = noise("step_taew2_1.latent", 2, 3, 16, 4, 4).transpose(1, 2)
    monkeypatch.setattr(autoencoder, "to_pixels", lambda frames, low: frames)  # the recorded frames are not 8-bit
    seen = {}
    whole = Seraena.__call__

    def watched(self, real, fake, context, draws):
        seen.update(fake=fake, context=context, found=whole(self, real, fake, context, draws))
        return seen["found"]

    monkeypatch.setattr(Seraena, "__call__", watched)
    network = fill(TAEHV("taew2_1"))
    loss = AutoencoderSeraena(golden_discriminator(), replay="reference", replay_dtype="float32", replay_length=64)
    draws = recorded_draws(expected["fake_mask"], described["random"]["sample"], clips=2)
    total, metrics = loss(network, {"frames": video, "target_latents": latents}, draws)
    total.backward()

    found = {
        "loss_encoder": metrics["latent"],
        "loss_reconstruction": metrics["reconstruction"],
        "loss_seraena": metrics[VALUE],
        "disc_loss": metrics["seraena/discriminator_loss"],
    }
    for key, value in found.items():
        assert distance(value, expected[key]) < 1e-2, key
    assert total.item() == pytest.approx(sum(found[key].item() for key in found if key != "disc_loss"), rel=1e-5)
    assert distance(seen["context"], expected["ctx"]) < 1e-6
    decoded = unpack(seen["fake"], 2, 9)
    assert distance(decoded, expected["decode_unclamped"]) < 1e-4
    correction = unpack(seen["found"].correction, 2, 9)
    assert distance(decoded + correction, expected["correction_target"]) < 3e-2
    assert distance(correction, expected["correction_target"] - expected["decode_unclamped"]) < 3e-2
    norms = torch.stack([dict(network.named_parameters())[name].grad.norm() for name in described["grad_order"]])
    torch.testing.assert_close(norms, expected["grad_l2"], rtol=1e-3, atol=0)
    torch.testing.assert_close(norms.norm(), expected["grad_total"], rtol=1e-3, atol=0)


class Decoded(nn.Module):
    """Gives latents and frames that are functions of the clip, scaled by its one parameter."""

    def __init__(self, length=5, dtype=torch.float32):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.length, self.dtype, self.poison = length, dtype, 1.0

    def forward(self, frames, latents, *, use_given, detach):
        small = nn.functional.avg_pool2d(frames.flatten(0, 1), 8).unflatten(0, frames.shape[:2])
        own = torch.cat([small[:, :2], small[:, -2:]], dim=2).transpose(1, 2)  # (B, 6, 2, h, w)
        blurred = 0.5 * (frames + frames.roll(1, dims=-1)) + 0.1 * torch.sin(40 * frames)
        decoded = self.gain * self.poison * blurred[:, : self.length]
        return TAEHVOutput(own.to(self.dtype), decoded.to(self.dtype))


def batch(clips=2, length=8, step=0, side=16):
    generator = torch.Generator().manual_seed(step)
    return {
        "frames": torch.randint(0, 256, (clips, length, 3, side, side), generator=generator, dtype=torch.uint8),
        "target_latents": torch.randn(clips, 6, 2, side // 8, side // 8, generator=generator),
    }


def draws_at(step, clips=2):
    return Draws(0, range(clips * step, clips * (step + 1)), step=step)


def small(seed=0, group_frames=2, **options):
    torch.manual_seed(seed)
    discriminator = SeraenaDiscriminator(3 * group_frames, 6, width=4)
    return AutoencoderSeraena(discriminator, group_frames=group_frames, **{"replay_length": 16, **options})


def states_equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def copied(loss):
    return {name: value.clone() for name, value in loss.state_dict().items()}


@pytest.mark.parametrize(
    "weights", [{"seraena": 0.5}, {"seraena": 2.0, "reconstruction": 20.0, "latent": 0.1, "l1": 1.0}]
)
def test_the_terms_and_what_they_pull(weights):
    data, network = batch(), Decoded()
    total, metrics = small(**weights, eps=1e-8)(network, data, draws_at(0))
    rest, without = Autoencoder(**{k: v for k, v in weights.items() if k != "seraena"})(network, data, draws_at(0))
    assert metrics.keys() == without.keys() | {f"seraena/{name}" for name in FIGURES}
    assert total.item() == pytest.approx(rest.item() + weights["seraena"] * metrics[VALUE].item(), rel=1e-5)
    assert all(not value.requires_grad for value in metrics.values())
    opened = metrics["seraena/deviation"] / (metrics["seraena/deviation"] + 1e-8)
    assert metrics[VALUE].item() == pytest.approx(float(opened**2), rel=0.3)  # over the frames that are not padding


def test_the_ratio_is_that_of_the_gradients_on_the_frames(monkeypatch):
    network, loss, kept = Decoded(), small(seraena=0.3, reconstruction=0.7), {}
    compare = loss.compare

    def watched(step, draws):
        kept["prediction"] = prediction = step.prediction.detach().requires_grad_()
        kept["terms"], figures = compare(step._replace(prediction=prediction), draws)
        return kept["terms"], figures

    monkeypatch.setattr(loss, "compare", watched)
    _, metrics = loss(network, batch(), draws_at(0))
    pulls = [
        torch.autograd.grad(w * kept["terms"][n], kept["prediction"])[0].norm()
        for n, w in ((VALUE, 0.3), ("reconstruction", 0.7))
    ]
    assert metrics["seraena/gradient_ratio"].item() == pytest.approx(float(pulls[0] / pulls[1]), rel=1e-5)
    assert "seraena/gradient_ratio" not in small(reconstruction=0.0)(network, batch(), draws_at(0)).metrics


@pytest.mark.parametrize("length", [1, 4, 5])
@pytest.mark.parametrize("group_frames", [1, 3, 4])
@pytest.mark.parametrize("clips", [1, 3])
def test_any_length_with_any_group_and_batch(length, group_frames, clips):
    loss = small(group_frames=group_frames, replay_length=64)
    for step in range(2):
        total, _ = loss(Decoded(length), batch(clips, step=step), draws_at(step, clips))
        assert torch.isfinite(total)
    assert loss.seraena.replay.count == 2 * clips * -(-length // group_frames)


def test_the_notebooks_groups_cover_the_whole_clip():
    counts = {}
    for pad in ("minimal", "notebook"):
        loss = small(group_frames=3, pad=pad)
        loss(Decoded(length=9), batch(length=12), draws_at(0))
        counts[pad] = loss.seraena.replay.count // 2
    assert counts == {"minimal": 3, "notebook": 4}


@pytest.mark.parametrize("decoder_input", ["teacher", "own", "mixed"])
def test_the_context_is_of_the_latents_that_were_decoded(decoder_input):
    data, network = batch(clips=8), Decoded(length=4)
    loss = small(decoder_input=decoder_input, replay_dtype="float32")
    loss(network, data, draws_at(0, clips=8))
    own = network(to_pixels(data["frames"], low=0.0), None, use_given=None, detach=False).latents
    given = draws_at(0, clips=8).uniform("decoder_input") >= {"teacher": 0, "own": 1, "mixed": 0.5}[decoder_input]
    expected = torch.where(given.view(-1, 1, 1, 1), data["target_latents"].mean(2), own.mean(2)).repeat_interleave(2, 0)
    assert torch.equal(loss.seraena.replay.contexts, expected)
    assert len(given.unique()) == (2 if decoder_input == "mixed" else 1)


def test_the_discriminator_gets_no_gradient_through_the_network():
    loss, network = small(), Decoded()
    before = copied(loss)
    total, _ = loss(network, batch(), draws_at(0))
    learned = copied(loss)
    assert not states_equal(before, learned)
    total.backward()
    assert network.gain.grad.abs() > 0
    assert states_equal(learned, loss.state_dict())
    assert all(parameter.grad is None for parameter in loss.seraena.discriminator.parameters())


def test_validation_changes_nothing_and_has_a_total_that_can_fall():
    loss, network = small(), Decoded()
    loss(network, batch(), draws_at(0))
    before, modes = copied(loss), [m.training for m in loss.seraena.discriminator.modules()]
    loss.learning = False
    with torch.no_grad():
        total, metrics = loss(network, batch(step=1), Draws("validation", [0, 1]))
        plain = Autoencoder()(network, batch(step=1), Draws("validation", [0, 1]))
    assert states_equal(before, loss.state_dict())
    assert modes == [m.training for m in loss.seraena.discriminator.modules()]
    assert torch.equal(total, plain.total)
    assert metrics.keys() == plain.metrics.keys()


def test_validation_before_training_allocates_nothing():
    loss = small()
    loss.learning = False
    loss(Decoded(), batch(), draws_at(0))
    assert loss.seraena.replay is None


@pytest.mark.parametrize("where", ["frames", "overflow", "latents"])
def test_what_is_not_finite_teaches_nothing(where):
    loss, network, data = small(), Decoded(), batch(step=1)
    loss(network, batch(), draws_at(0))
    before = copied(loss)
    if where == "latents":
        data["target_latents"][0, 0, 0, 0, 0] = float("inf")
    else:
        network.poison = {"frames": float("nan"), "overflow": 1e12}[where]
    total, metrics = loss(network, data, draws_at(1))
    assert states_equal(before, loss.state_dict())
    assert VALUE not in metrics
    assert total > 1e20 or not torch.isfinite(total)
    network.poison = 1.0
    assert VALUE in loss(network, batch(step=2), draws_at(2)).metrics


def test_a_run_restored_from_a_file_goes_on_bitwise(tmp_path):
    loss, other, network = small(), small(seed=5), Decoded()
    for step in range(3):
        loss(network, batch(step=step), draws_at(step))
    save_file(loss.state_dict(), tmp_path / "loss.safetensors")
    other.load_state_dict(load_file(tmp_path / "loss.safetensors"))
    for step in range(3, 6):
        one, two = (each(network, batch(step=step), draws_at(step)) for each in (loss, other))
        assert torch.equal(one.total, two.total)
        assert states_equal(one.metrics, two.metrics)
    assert states_equal(loss.state_dict(), other.state_dict())


def test_half_precision_frames_get_a_float32_correction():
    exact, half = small(), small()
    with torch.autocast("cpu", torch.bfloat16):
        total, metrics = half(Decoded(dtype=torch.bfloat16), batch(), draws_at(0))
    _, expected = exact(Decoded(), batch(), draws_at(0))
    assert total.dtype == metrics[VALUE].dtype == torch.float32
    for name in ("discriminator_loss", "deviation", "uninformative_value"):
        assert metrics[f"seraena/{name}"].item() == pytest.approx(expected[f"seraena/{name}"].item(), rel=0.1)


def test_it_trains_with_a_real_network():
    torch.manual_seed(0)
    network = TAEHV("taecvx", encoder_width=8, decoder_widths=(16, 8, 8, 8), num_memblocks=1)
    loss = AutoencoderSeraena(SeraenaDiscriminator(9, 16, width=4), eps_reference_hw=64)
    for step in range(2):
        loss(network, {"frames": batch(step=step)["frames"]}, draws_at(step)).total.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad": "most"}, "loss.pad must be minimal or notebook"),
        ({"group_frames": 0}, "group_frames at least 1"),
        ({"group_frames": 3}, "images of 6 channels, but loss.group_frames=3 makes 9"),
        ({"replay_dtype": "int4"}, "loss.replay_dtype"),
        ({"decoder_input": "students"}, "decoder_input must be"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(UserError, match=message):
        AutoencoderSeraena(SeraenaDiscriminator(6, 6, width=4), **{"group_frames": 2, **options})


def test_a_discriminator_for_other_latents_is_refused():
    loss = AutoencoderSeraena(SeraenaDiscriminator(6, 16, width=4), group_frames=2)
    with pytest.raises(UserError, match="contexts of 16 channels, .* have 6"):
        loss(Decoded(), batch(), draws_at(0))


# ------------------------------------------------------------------ two ranks

TASKS = """
import pickle, sys
import torch
import torch.distributed as dist
from tests.losses.test_autoencoder_seraena import normalized, trained
from vireo import distributed

torch.set_num_threads(1)
dist.init_process_group("gloo")
distributed.open_side_group(60)
rank = distributed.rank()
results = {"trained": trained(rank, 2), "reference": trained(rank, 2, replay="reference")}
results["normalized"] = normalized(rank, 2)
results["poisoned"] = trained(rank, 2, poisoned=rank == 1)
rows = torch.full((1, 2), rank + 0.5, dtype=torch.bfloat16)
results["rows"] = distributed.concatenate(rows)
distributed.close()
pickle.dump(results, open(f"{sys.argv[1]}/rank{rank}.pkl", "wb"))
"""


def trained(rank, world, steps=4, poisoned=False, **options):
    """Figures, state and state before a poisoned step, of 4 clips a step shared out over the ranks."""
    loss, network, share = small(seed=rank, replay_length=21, **options), Decoded(), 4 // world
    loss.to(torch.device("cpu"))
    figures = []
    for step in range(steps):
        mine = slice(rank * share, (rank + 1) * share)
        data = {name: value[mine] for name, value in batch(clips=4, step=step).items()}
        network.poison = float("nan") if poisoned and step == steps - 1 else 1.0
        before = copied(loss)
        total, metrics = loss(network, data, Draws(0, range(4 * step, 4 * step + 4)[mine], step=step))
        figures.append({name: float(value) for name, value in {"total": total.detach(), **metrics}.items()})
    return figures, copied(loss), before


def normalized(rank, world):
    """Output, gradients (of the input, and of weights averaged over ranks) and statistics of a layer in training."""
    x = 3 + torch.randn(4, 2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x[rank * 4 // world : (rank + 1) * 4 // world].requires_grad_()
    layer = SyncBatchNorm2d(2).double()
    y = layer(x)
    (y.square() * torch.linspace(0, 1, 15).view(3, 5) * (x.detach() > 3)).sum().backward()
    return {
        "y": y.detach(),
        "x": x.grad,
        "weight": layer.weight.grad,
        "bias": layer.bias.grad,
        **dict(layer.named_buffers()),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found."""
    folder, root = tmp_path_factory.mktemp("ranks"), Path(__file__).parents[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root / 'src'}"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TASKS, str(folder)],
            env={**common, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for child in children:
        output, _ = child.communicate(timeout=120)
        assert child.returncode == 0, output
    return [pickle.loads((folder / f"rank{rank}.pkl").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize(("task", "options"), [("trained", {}), ("reference", {"replay": "reference"})])
def test_two_ranks_with_two_clips_equal_one_with_four(ranks, task, options):
    alone, state, _ = trained(0, 1, **options)
    (figures, first, _), (others, second, _) = (rank[task] for rank in ranks)
    for step in range(4):
        for name, value in alone[step].items():
            together = (figures[step][name] + others[step][name]) / 2
            assert together == pytest.approx(value, rel=1e-5), (step, name)
        for name in ("seraena/deviation", "seraena/gradient_ratio"):
            assert figures[step][name] == others[step][name]
    assert states_equal(first, second)
    assert first.keys() == state.keys()
    for name, value in state.items():
        if name.startswith("replay.fakes"):
            assert (first[name].int() - value.int()).abs().max() <= 1
        elif value.is_floating_point():
            assert distance(first[name].float(), value.float()) < 1e-4, name
        else:
            assert torch.equal(first[name], value), name


def test_batches_are_normalized_over_both_ranks(ranks):
    one = normalized(0, 1)
    both = [rank["normalized"] for rank in ranks]
    for name in ("y", "x"):
        torch.testing.assert_close(torch.cat([rank[name] for rank in both]), one[name])
    for name in ("weight", "bias"):
        torch.testing.assert_close(both[0][name] + both[1][name], one[name])
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(both[0][name], one[name])
        assert torch.equal(both[0][name], both[1][name])


def test_what_is_not_finite_on_one_rank_teaches_neither(ranks):
    for rank in ranks:
        figures, after, before = rank["poisoned"]
        assert states_equal(before, after)
        assert VALUE in figures[-2] and VALUE not in figures[-1]


def test_rows_of_any_dtype_are_gathered(ranks):
    for rank in ranks:
        assert torch.equal(rank["rows"], torch.tensor([[0.5, 0.5], [1.5, 1.5]], dtype=torch.bfloat16))
