"""Motion modules belong to the second stage, and its export of a first stage leaves them as they are."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vireo import config, objects
from vireo.errors import UserError
from vireo.mini import world
from vireo.models.motion_starts import check_motion_init

CHAIN = ["experiment=diffueraser", "tracker=none"]
RELEASED = "model.network.motion_init=released"


@pytest.mark.parametrize(("kind", "stage"), [("adapter", 1), ("released", 1), ("none", 2), ("adaptor", 2)])
def test_what_does_not_suit_a_stage(kind, stage):
    with pytest.raises(UserError, match=rf"motion_init={kind}, but stage {stage}.*chain\.stage2\.model\.network"):
        check_motion_init(kind, stage)


def test_a_plain_key_of_the_chain_does_not_turn_stage_1_into_a_motion_run():
    [problem] = config.problems([*CHAIN, RELEASED])
    assert problem.key == "chain.stage1: motion" and f"chain.stage2.{RELEASED}" in problem.message
    for words in ([*CHAIN, f"chain.stage2.{RELEASED}"], ["experiment=diffueraser_stage2", RELEASED], CHAIN):
        assert config.problems(words) == []


def test_the_chains_second_stage_starts_with_the_released_motion_modules(tmp_path):
    released = world.ensure() / "weights" / "diffuEraser" / "unet_main"
    words = [*CHAIN, f"chain.stage2.{RELEASED}", f"paths.outputs={tmp_path}"]
    first, second = config.stages(config.settings(words)["chain"], words).values()
    network = objects.network(config.settings(first))
    assert not network.moves
    with torch.no_grad():
        next(network.unet.parameters()).add_(1)  # as if trained
    [export] = network.export(tmp_path / "export", network.state_dict())
    begun = objects.network(config.settings(second, init_from=str(tmp_path / "export"))).unet.state_dict()
    motion = {name: value for name, value in begun.items() if "motion_modules" in name}
    told, trained = (load_file(Path(folder) / "diffusion_pytorch_model.safetensors") for folder in
                     (released, export / "unet_main"))  # fmt: skip
    assert motion and all(torch.equal(value, told[name]) for name, value in motion.items())
    assert all(torch.equal(value, trained[name]) for name, value in begun.items() if name not in motion)
