"""Two processes of each strategy equal one, resume exactly, and leave the same files. Each strategy is started once."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel  # noqa: F401 - imported here so that no forked rank has to
from safetensors.torch import load_file

from tests import ranks, runs
from tests.recipes import RECIPES
from tests.strategies.ops import skip_without_ops
from vireo import checkpoint, config, distributed, objects
from vireo.mini import world

SHORT = ["steps=4", "checkpoint.every=2", "validation.every=null", "validation.clips=2", "logging.every=1"]
SHORT += ["validation.at_start=false", "tracker=none", "loader.workers=0", "ema.decay=0.9", "launcher.timeout=60"]
QUICK, FULL = tuple(name for name, recipe in RECIPES.items() if recipe.quick), tuple(RECIPES)
FEW = ("taehv", "opens2v_wan")  # of the quick ones, for a second strategy
HALF_FROZEN = ("cogvideox_t2v_lora", "model.network.dtype=bf16")  # the mini size has float32 throughout
full, slow = pytest.mark.full, pytest.mark.slow
STRATEGIES = [
    pytest.param(("ddp", QUICK), id="ddp-quick"),
    pytest.param(("fsdp", FEW), id="fsdp-quick", marks=slow),
    # What DeepSpeed compiles first, once per environment, takes longer than all of it.
    pytest.param(("zero2", ("taehv",)), id="zero2-quick", marks=slow),
    pytest.param(("zero3", ("taehv",)), id="zero3-quick", marks=full),
    *(
        pytest.param((name, FULL), id=name, marks=full)
        for name in ("ddp", "fsdp", "fsdp_offload", "zero2", "zero2_offload", "zero3")
    ),
]


def halved(recipe: str) -> str:
    """The name of a recipe's run in which each process does half of its share at a time."""
    return f"{recipe}, accumulated"


def make(root: Path, recipe: str, *words: str) -> Path:
    return runs.make(root, [*asked(recipe), *words], shrunk=False)


def asked(recipe: str) -> list[str]:
    return [f"experiment={recipe}", *RECIPES[recipe].words, *SHORT]


def poison() -> None:
    """In the run of that name, the second rank's loss is not a number in the second micro-step of the third step."""
    original = objects.loss

    def made(settings):
        loss = original(settings)
        if settings["run"] != "poisoned":
            return loss
        calls = []

        class Poisoned(type(loss)):
            def __call__(self, network, batch, draws):
                objective = super().__call__(network, batch, draws)
                calls.append(draws.step)
                spoilt = distributed.rank() == 1 and calls.count(2) == 2 and draws.step == 2
                return objective._replace(total=objective.total * float("nan")) if spoilt else objective

        loss.__class__ = Poisoned
        return loss

    objects.loss = made


def again(source: Path, target: Path, *words: str) -> Path:
    """A copy of a stopped run that goes on in another way: strategy, and how the global batch is shared out."""
    shutil.copytree(source, target)
    settings = config.settings([*asked("taehv"), *words])
    config.save_resolved(settings, target / "resolved.yaml")
    return target


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process does, by recipe; and a run that one process stopped after step 2."""
    world.ensure()
    root = tmp_path_factory.mktemp("alone")
    made = {}
    for recipe in RECIPES:
        made[recipe] = make(root, recipe, "batch_size=4", "strategy=single", "gradient_accumulation=1")
    made["stopped"] = make(root, "taehv", "batch_size=4", "strategy=single", "gradient_accumulation=1", "run=stopped",
                           "preempt_at=2")  # fmt: skip
    made["half frozen"] = make(root, *HALF_FROZEN, "batch_size=4", "strategy=single", "gradient_accumulation=1")
    made["bf16"] = make(root, "taehv", "batch_size=4", "strategy=single", "gradient_accumulation=1", "precision=bf16")
    done: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in done:
            assert runs.work(made[name]) == (75 if name == "stopped" else 0), (made[name] / "train.log").read_text()
            done[name] = made[name]
        return done[name]

    return get


@pytest.fixture(scope="module", params=STRATEGIES)
def spread(request, alone, tmp_path_factory):
    """Folders of one strategy's runs on two processes, by what they are."""
    strategy, recipes = request.param
    if strategy.startswith("zero"):
        skip_without_ops()
    root = tmp_path_factory.mktemp(strategy)
    chosen = [f"strategy={strategy}"]
    # Smaller than any block: several units.
    chosen += ["strategy.unit=1000"] if strategy.startswith("fsdp") else []
    halves = ["batch_size=1", "gradient_accumulation=2", *chosen]
    folders = {recipe: make(root, recipe, "batch_size=2", "gradient_accumulation=1", *chosen) for recipe in recipes}
    for recipe in recipes:
        if RECIPES[recipe].accumulates:
            folders[halved(recipe)] = make(root, recipe, *halves)
    folders["stopped"] = make(root, "taehv", *halves, "run=stopped", "preempt_at=2")
    folders["poisoned"] = make(root, "taehv", *halves, "run=poisoned")
    folders["from one"] = again(alone("stopped"), root / "from_one", "batch_size=2", "gradient_accumulation=1", *chosen)
    if recipes == FULL:
        folders["bf16"] = make(root, "taehv", *halves, "precision=bf16", "run=bf16")
    if recipes == FULL or strategy == "fsdp":
        folders["half frozen"] = make(root, *HALF_FROZEN, "batch_size=2", "gradient_accumulation=1", *chosen)
    order = [*folders, "stopped"]
    # All recipes take minutes where nothing else runs, and many of them beside other tests.
    codes = ranks.work([folders[name] for name in order], poison, timeout=1800 if recipes == FULL else 600)
    for name, found in zip(order, codes, strict=False):
        stopped = name == "stopped" and not (folders[name] / "finished").exists()
        log = (folders[name] / "train.log").read_text()
        assert found in ([0, 0], [75, 75]), f"{name}: {found}\n{log}"
        assert found == [0, 0] or stopped or name == "stopped", log
    assert len(codes) == len(order)
    return folders


def test_no_recipe_is_left_out():
    there = {path.stem for path in (config.conf_dir() / "experiment").glob("*.yaml")}
    chains = {name for name in there if config.settings([f"experiment={name}"])["chain"]}
    assert there - chains == RECIPES.keys(), "tests/recipes.py has a line for each file of conf/experiment"


def losses(folder: Path) -> torch.Tensor:
    rows = [row for row in runs.metrics(folder) if "loss" in row]
    return torch.tensor([[row["loss"], row["grad_norm"]] for row in rows], dtype=torch.float64)


def exported(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "export").rglob("*.safetensors"))
    return {f"{path.name}:{name}": value for path in files for name, value in load_file(path).items()}


def close(one: dict, two: dict, rtol: float = 1e-4, atol: float = 5e-6) -> None:
    assert one.keys() == two.keys() and one
    for name, value in one.items():
        said = f"{name} differs by up to {(value - two[name]).abs().max():.3g}"
        torch.testing.assert_close(value, two[name], rtol=rtol, atol=atol, msg=said)


def test_losses_are_those_of_one_process(spread, alone):
    for recipe in spread.keys() & RECIPES.keys():
        tolerance = RECIPES[recipe].tolerance
        torch.testing.assert_close(losses(spread[recipe]), losses(alone(recipe)), rtol=tolerance, atol=0)
        assert len(losses(spread[recipe])) == 4


def test_norms_of_groups_are_those_of_one_process(spread, alone):
    for recipe in spread.keys() & RECIPES.keys():
        here, there = (
            [row for row in runs.metrics(folder) if "loss" in row] for folder in (spread[recipe], alone(recipe))
        )
        for name in (name for name in here[0] if name.startswith("grad_norm_")):
            found, wanted = ([row[name] for row in rows] for rows in (here, there))
            assert found == pytest.approx(wanted, rel=RECIPES[recipe].tolerance), f"{recipe}: {name}"


def test_half_precision_is_that_of_one_process(spread, alone):
    if "bf16" in spread:
        torch.testing.assert_close(losses(spread["bf16"]), losses(alone("bf16")), rtol=2e-2, atol=0)
        assert not torch.equal(losses(spread["bf16"]), losses(spread[halved("taehv")]))


def test_frozen_weights_in_half_precision_do_what_they_do_in_one_process(spread, alone):
    if "half frozen" in spread:
        torch.testing.assert_close(losses(spread["half frozen"]), losses(alone("half frozen")), rtol=2e-2, atol=0)
        close(exported(spread["half frozen"]), exported(alone("half frozen")), rtol=1e-2, atol=1e-3)


def test_accumulation_is_a_larger_batch(spread, alone):
    for recipe, about in RECIPES.items():
        if halved(recipe) in spread:
            torch.testing.assert_close(
                losses(spread[halved(recipe)]), losses(alone(recipe)), rtol=about.tolerance, atol=0
            )


def test_exports_and_checkpoints_are_those_of_one_process(spread, alone):
    for recipe in (name for name in spread if name in RECIPES and RECIPES[name].accumulates):
        close(exported(spread[recipe]), exported(alone(recipe)))
        here, there = checkpoint.latest(spread[recipe]), checkpoint.latest(alone(recipe))
        assert here is not None and there is not None
        for part in ("network", "ema", "optimizer"):
            close(here.tensors(part), there.tensors(part), rtol=1e-3)


def test_it_resumes_bitwise(spread):
    assert runs.metrics(spread["stopped"]) == runs.metrics(spread[halved("taehv")])
    one, two = checkpoint.latest(spread["stopped"]), checkpoint.latest(spread[halved("taehv")])
    assert one is not None and two is not None and one.step == two.step == 4
    for part in ("network", "optimizer", "ema"):
        first, second = one.tensors(part), two.tensors(part)
        assert first.keys() == second.keys() and first
        assert all(torch.equal(first[name], second[name]) for name in first), part


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_both(spread):
    rows = [row for row in runs.metrics(spread["poisoned"]) if "loss" in row]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1]
    clean = [row for row in runs.metrics(spread[halved("taehv")]) if "loss" in row]
    assert [row["loss"] for row in rows[:2]] == [row["loss"] for row in clean[:2]]
    found = checkpoint.latest(spread["poisoned"])
    assert found is not None and found.state["skipped"] == 1
    for part in ("network", "optimizer", "ema"):
        assert all(torch.isfinite(value).all() for value in found.tensors(part).values())
    steps = {float(value) for name, value in found.tensors("optimizer").items() if name.endswith("|step")}
    assert steps == {3.0}


def test_it_goes_on_where_one_process_stopped(spread, alone):
    torch.testing.assert_close(losses(spread["from one"]), losses(alone("taehv")), rtol=1e-5, atol=0)


def test_one_process_goes_on_where_it_stopped(spread, alone, tmp_path):
    folder = tmp_path / "back"
    shutil.copytree(spread["stopped"], folder)
    shutil.rmtree(checkpoint.folder_of(folder, 4))
    (folder / "finished").unlink()
    config.save_resolved(
        config.settings([*asked("taehv"), "batch_size=4", "gradient_accumulation=1", "strategy=single"]),
        folder / "resolved.yaml",
    )
    assert runs.work(folder) == 0, (folder / "train.log").read_text()
    assert "step 2 of 4" in (folder / "train.log").read_text()
    torch.testing.assert_close(losses(folder), losses(alone("taehv")), rtol=1e-5, atol=0)
