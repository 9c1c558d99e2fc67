"""The training script: it learns, it goes on where it stopped, and its optimizer is what its docstring says."""

import json

import pytest

torch = pytest.importorskip("torch")

from vireo.errors import UserError  # noqa: E402
from vireo.mini import autoencoders  # noqa: E402
from vireo.mini import train_autoencoders as training  # noqa: E402
from vireo.muon import Muon  # noqa: E402
from vireo.randomness import Draws  # noqa: E402


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.last = (torch.nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 8), (8, 8), (8, 3)))

    def forward(self, x):
        return self.last(self.hidden(self.first(x).relu()).relu())


def reconstruct(network, clips, draws):
    noise = 0 if draws is None else 0.01 * draws.normal("noise", *clips.shape[1:])
    frames = network((clips + noise).flatten(0, 1)).unflatten(0, clips.shape[:2])
    return autoencoders.Reconstruction(frames, frames, frames.square().mean())


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.setattr(training, "TRAINING_SEEDS", range(1_000_000, 1_000_008))
    monkeypatch.setattr(training, "HELD_OUT_SEEDS", range(2_000_000, 2_000_002))
    return autoencoders.Recipe(
        build=Tiny,
        reconstruct=reconstruct,
        stages=[autoencoders.Stage(4, 4, 1, 16), autoencoders.Stage(4, 2, 2, 32)],
        muon_lr=0.02,
        adamw_lr=3e-3,
        kl_weight=1e-4,
        folder="tiny",
    )


def test_convolutions_that_touch_pixels_are_not_muons(recipe):
    network = Tiny()
    muon, adamw = training.make_optimizer(network, recipe).param_groups
    assert [id(p) for p in muon["params"]] == [id(network.hidden.weight)]
    assert len(adamw["params"]) == 5
    assert (muon["kind"], muon["lr"], adamw["kind"], adamw["lr"]) == ("muon", 0.02, "adamw", pytest.approx(3e-3))


def test_schedule_warms_up_and_ends_near_zero():
    curve = [training.schedule(step, 1000) for step in range(1000)]
    assert curve[0] == 0.01
    assert max(curve) > 0.97
    assert curve[-1] < 1e-5
    assert curve[200:] == sorted(curve[200:], reverse=True)


def test_a_restart_is_the_curve_again_at_half_the_height():
    curve = [training.schedule(step, 1500, restart=1000) for step in range(1500)]
    assert curve[:1000] == [training.schedule(step, 1000) for step in range(1000)]
    assert curve[1000:] == [training.schedule(step, 500) / 2 for step in range(500)]


def test_an_interrupted_training_goes_on_to_the_same_weights(recipe, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, _ = training.train("tiny", recipe, 0, tmp_path / "a", report_every=3)
    step = Muon.step
    calls = []

    def dies_at_the_sixth(self, closure=None):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Muon, "step", dies_at_the_sixth)
        with pytest.raises(KeyboardInterrupt):
            training.train("tiny", recipe, 0, tmp_path / "b", report_every=3)
    resumed, _ = training.train("tiny", recipe, 0, tmp_path / "b", report_every=3)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_a_checkpoint_of_another_recipe_is_refused(recipe, tmp_path):
    training.train("tiny", recipe, 0, tmp_path)
    with pytest.raises(UserError, match="belongs to the recipe"):
        training.train("tiny", recipe._replace(muon_lr=0.5), 0, tmp_path)


def test_training_lowers_the_error(recipe, tmp_path):
    start = Tiny()
    unseen = training.held_out()
    before = training.psnr(training.reconstruct_all(start, recipe, unseen), unseen).mean()
    recipe = recipe._replace(stages=[autoencoders.Stage(60, 8, 1, 16)])
    trained, cpu_seconds = training.train("tiny", recipe, 0, tmp_path)
    after = training.psnr(training.reconstruct_all(trained, recipe, unseen), unseen).mean()
    assert after > before + 0.5
    assert cpu_seconds > 0


def test_batches_are_crops_of_the_clips(recipe):
    everything = training.clips(training.TRAINING_SEEDS)
    stage = autoencoders.Stage(1, 6, 5, 24)
    batch = training.training_batch(everything, stage, Draws(0, range(6)))
    assert batch.shape == (6, 5, 3, 24, 24)
    assert batch.min() >= -1
    assert batch.max() <= 1
    assert torch.equal(batch, training.training_batch(everything, stage, Draws(0, range(6))))
    late = training.training_batch(everything, stage._replace(frames=1, size=64, earliest=20), Draws(0, range(6)))
    last_frames = training.to_pixels(everything[:, -1:])
    assert all(any(torch.equal(c, f) or torch.equal(c.flip(-1), f) for f in last_frames) for c in late)
    whole = training.training_batch(everything, autoencoders.Stage(1, 1, 21, 64), Draws(0, [3]))
    original = training.to_pixels(everything)
    assert any(torch.equal(whole[0], clip) or torch.equal(whole[0].flip(-1), clip) for clip in original)


def test_psnr_of_a_known_error():
    clean = torch.zeros(2, 3, 3, 4, 4)
    noisy = clean + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(training.psnr(noisy, clean), torch.tensor([20.0, 40.0]))


@pytest.mark.full
def test_ship_writes_weights_config_and_figures(recipe, tmp_path, monkeypatch):
    network = autoencoders.build_kl()
    kl = autoencoders.RECIPES["kl"]
    monkeypatch.setattr(training, "HELD_OUT_SEEDS", range(2_000_000, 2_000_016))
    monkeypatch.setattr(training, "TRAINING_SEEDS", range(1_000_000, 1_000_064))
    figures = training.ship("kl", kl, network, 0, 12.0, tmp_path / "kl", tmp_path / "kl.png")
    assert json.loads((tmp_path / "kl/figures.json").read_text()) == figures
    assert figures["parameters"] == 415_615
    assert figures["cpu_seconds"] == 12
    assert json.loads((tmp_path / "kl/config.json").read_text())["scaling_factor"] == pytest.approx(
        1 / figures["latent_std"], rel=1e-3
    )
    assert (tmp_path / "kl.png").stat().st_size > 10_000
