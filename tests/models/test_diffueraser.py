"""DiffuEraser's starts, exports, and what is refused; its numbers are in tests/test_diffueraser_golden.py."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.eraser_weights import DESCRIBED, adapter, motion_unet, save, unet2d

from vireo.errors import UserError
from vireo.freezing import FreezePolicy
from vireo.models.brushnet import BrushNetModel
from vireo.models.diffueraser import DiffuEraser, adapter_config, motion_config, spatial_config
from vireo.weights import initialize_from

B, T = 2, 3
MOTION_ONLY = ["motion_modules"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save(tmp_path_factory.mktemp("weights"))


def given(frames=T):
    generator = torch.Generator().manual_seed(0)
    shapes = {"noisy": 4, "masked_latents": 4, "keep": 1}
    made = {name: torch.randn(B, width, frames, 8, 8, generator=generator) for name, width in shapes.items()}
    return {**made, "prompt_embeds": torch.randn(B, 7, 16, generator=generator), "timesteps": torch.tensor([37, 811])}


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def spatial(state):
    return {name: value for name, value in state.items() if "motion_modules" not in name}


def motion(state):
    return {name: value for name, value in state.items() if "motion_modules" in name}


def weights(folder: Path):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


# Where a network starts


def test_stage_1_starts_from_the_spatial_part_of_the_released_unet(folders):
    made = DiffuEraser(**folders)
    released = Path(folders["released"])
    assert type(made.unet).__name__ == "UNet2DConditionModel"
    assert equal(made.unet.state_dict(), spatial(weights(released / "unet_main")))
    assert equal(made.brushnet.state_dict(), weights(released / "brushnet"))


def test_a_second_stage_without_a_first_one_is_told(folders, caplog, tmp_path):
    everything = FreezePolicy(["."])
    for kind in ("none", "released"):
        everything(DiffuEraser(**folders, motion_init=kind))
    first = DiffuEraser(**folders)
    second = DiffuEraser(**folders, motion_init="adapter")
    initialize_from(second, first.export(tmp_path, first.state_dict())[0])
    everything(second)
    assert "stage 1" not in caplog.text
    everything(DiffuEraser(**folders, motion_init="adapter"))
    assert "no stage 1 of yours has trained: say init_from=<stage 1's run or export>" in caplog.text


def test_other_starts(folders):
    made = DiffuEraser(**folders, unet_init="base", brushnet_init="from_unet")
    base = weights(Path(folders["base"]) / "unet")
    assert equal(made.unet.state_dict(), base)
    assert torch.equal(made.brushnet.conv_in_condition.weight[:, 4:8], base["conv_in.weight"])
    without = DiffuEraser(None, folders["base"], unet_init="base", brushnet_init="from_unet")
    assert equal(without.state_dict(), made.state_dict()), "the released folder need not be there"


def test_stage_2_starts_from_animatediff_or_from_the_released_motion_modules(folders):
    first, second = (DiffuEraser(**folders, motion_init=kind) for kind in ("adapter", "released"))
    released = weights(Path(folders["released"]) / "unet_main")
    assert equal(motion(first.unet.state_dict()), weights(Path(folders["motion_adapter"])))
    assert equal(second.unet.state_dict(), released)
    assert equal(spatial(first.unet.state_dict()), spatial(released))
    assert len(DESCRIBED["keys"]["motion_unet"]) == len(first.unet.state_dict())


def test_an_adapter_without_a_middle_block(folders, tmp_path):
    adapter(use_motion_mid_block=False).save_pretrained(tmp_path / "adapter")
    made = DiffuEraser(folders["released"], motion_adapter=str(tmp_path / "adapter"), motion_init="adapter")
    assert not any("mid_block.motion" in name for name in made.unet.state_dict())
    spatial_middle = DiffuEraser(folders["released"])
    for network in (made, spatial_middle):  # with idle motion modules both are the same network
        for name, value in network.named_parameters():
            if "motion_modules" in name and "proj_out" in name:
                torch.nn.init.zeros_(value)
    with torch.no_grad():
        torch.testing.assert_close(made(**given()), spatial_middle(**given()))


@pytest.mark.parametrize("mid", [True, False])
def test_configs_are_those_that_diffusers_makes(mid):
    one = motion_unet(use_motion_mid_block=mid)
    ours = motion_config(unet2d().config, adapter(use_motion_mid_block=mid).config)
    for name, value in one.config.items():
        if name[:1] != "_" and name in ours:
            assert ours[name] == value, name
    back = spatial_config(one.config)
    for name, value in unet2d().config.items():
        if name in back and name[:1] != "_" and name != "mid_block_type":
            assert back[name] == value, name
    modules = adapter_config(one.config)
    assert modules == {name: adapter(use_motion_mid_block=mid).config[name] for name in modules}


def test_parameters_at_real_size():
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
        modules = diffusers.MotionAdapter()
        both = diffusers.UNetMotionModel(cross_attention_dim=768)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964 and len(unet.state_dict()) == 686
    assert sum(p.numel() for p in modules.parameters()) == 453_209_280 and len(modules.state_dict()) == 567
    assert both.state_dict().keys() == unet.state_dict().keys() | modules.state_dict().keys()


# What it computes


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "adapter"])
def test_a_clip_does_not_depend_on_its_batch(folders, kind):
    made, whole = DiffuEraser(**folders, motion_init=kind).eval(), given()
    alone = [made(**{name: value[row : row + 1] for name, value in whole.items()}) for row in range(B)]
    torch.testing.assert_close(made(**whole), torch.cat(alone), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_frames_see_each_other_in_stage_2_only(folders):
    changed = given()
    changed["noisy"][:, :, 2] += 1
    for kind, alone in (("none", True), ("adapter", False)):
        made = DiffuEraser(**folders, motion_init=kind).eval()
        same = torch.allclose(made(**given())[:, :, 0], made(**changed)[:, :, 0], atol=1e-6)
        assert same == alone


@torch.no_grad()
def test_sizes_that_are_no_power_of_two(folders):
    made = DiffuEraser(**folders, motion_init="adapter").eval()
    uneven = {name: value[..., :6, :] if value.ndim == 5 else value for name, value in given().items()}
    assert made(**uneven).shape == (B, 4, T, 6, 8)


def test_what_stage_2_learns(folders):
    made = DiffuEraser(**folders, motion_init="adapter")
    FreezePolicy(MOTION_ONLY)(made)
    made(**given()).square().mean().backward()
    learnt = {name.removeprefix("unet.") for name, p in made.named_parameters() if p.grad is not None}
    assert learnt == set(DESCRIBED["stage2_trainable"])
    stock = motion_unet()
    stock.freeze_unet2d_params()
    assert learnt == {name for name, p in stock.named_parameters() if p.requires_grad}


def test_too_many_frames_for_the_motion_modules(folders):
    made = DiffuEraser(**folders, motion_init="adapter")
    with pytest.raises(UserError, match="33 frames is too long"):
        made(**given(33))


# Exports


def test_exports_are_read_by_the_stock_classes(folders, tmp_path):
    first = DiffuEraser(**folders)
    [stage1] = first.export(tmp_path, first.state_dict())
    assert stage1 == tmp_path / "finetuned-stage1"
    second = DiffuEraser(**folders, motion_init="adapter")
    stage2, modules = second.export(tmp_path, second.state_dict())
    classes = {
        stage1 / "unet_main": (diffusers.UNet2DConditionModel, first.unet),
        stage1 / "brushnet": (BrushNetModel, first.brushnet),
        stage2 / "unet_main": (diffusers.UNetMotionModel, second.unet),
        stage2 / "brushnet": (BrushNetModel, second.brushnet),
    }
    for folder, (kind, network) in classes.items():
        made, report = kind.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        assert json.loads((folder / "config.json").read_text())["_class_name"] == kind.__name__
        assert equal(made.state_dict(), network.state_dict())
    read = diffusers.MotionAdapter.from_pretrained(modules)
    assert equal(read.state_dict(), motion(second.unet.state_dict()))


def test_stage_2_keeps_what_stage_1_learnt(folders, tmp_path):
    first = DiffuEraser(**folders)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.01)
    first.export(tmp_path / "export", first.state_dict())
    second = DiffuEraser(**folders, motion_init="adapter")
    before = motion(second.unet.state_dict())
    before = {name: value.clone() for name, value in before.items()}
    second.load(tmp_path / "export")
    assert equal(motion(second.unet.state_dict()), before)
    FreezePolicy(MOTION_ONLY)(second)
    optimizer = torch.optim.AdamW([p for p in second.parameters() if p.requires_grad], lr=0.1)
    second(**given()).square().mean().backward()
    optimizer.step()
    second.export(tmp_path / "export", second.state_dict())
    stage1, stage2 = (tmp_path / "export" / f"finetuned-stage{stage}" for stage in (1, 2))
    assert equal(weights(stage2 / "brushnet"), weights(stage1 / "brushnet"))
    assert equal(spatial(weights(stage2 / "unet_main")), weights(stage1 / "unet_main"))
    assert not equal(motion(weights(stage2 / "unet_main")), before)


def test_an_export_can_stand_for_the_released_folder(folders, tmp_path):
    for kind in ("none", "released"):
        made = DiffuEraser(**folders, motion_init=kind)
        folder = made.export(tmp_path, made.state_dict())[0]
        again = DiffuEraser(str(folder), motion_init=kind)
        assert equal(again.state_dict(), made.state_dict())
    first = DiffuEraser(**folders, unet_init="base")
    first.load(tmp_path / "finetuned-stage2")
    assert equal(first.unet.state_dict(), spatial(made.unet.state_dict())), "stage 1 leaves motion modules out"


# Mistakes


def test_mistakes_are_told(folders, tmp_path):
    with pytest.raises(UserError, match="unet_init is one of released, base; got 'sd15'"):
        DiffuEraser(**folders, unet_init="sd15")
    with pytest.raises(UserError, match=r"model\.network\.motion_adapter must name a folder"):
        DiffuEraser(folders["released"], motion_init="adapter")
    with pytest.raises(UserError, match="holds a UNet2DConditionModel; expected a BrushNetModel"):
        shutil.copytree(folders["released"], tmp_path / "wrong")
        shutil.rmtree(tmp_path / "wrong" / "brushnet")
        shutil.copytree(Path(folders["base"]) / "unet", tmp_path / "wrong" / "brushnet")
        DiffuEraser(str(tmp_path / "wrong"))
    made = DiffuEraser(**folders)
    with pytest.raises(UserError, match="has no unet_main/ and brushnet/"):
        made.load(tmp_path)
    exported = made.export(tmp_path / "export", made.state_dict())[0]
    state = weights(exported / "brushnet")
    del state["brushnet_mid_block.bias"]
    save_file(state, exported / "brushnet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"does not fit this network: (?s:.)*brushnet_mid_block\.bias"):
        made.load(exported)
