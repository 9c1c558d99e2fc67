"""What is shipped of a recipe's run is small and loads."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from vireo.errors import UserError
from vireo.mini import networks, ship_transformer, wan_networks
from vireo.models.wan_references import WanReferences


def test_a_finished_run_is_shipped_in_half_precision(tmp_path):
    networks.write_cogvideox(tmp_path / "run" / "export", "CogVideoX-5b")
    run, shipped = tmp_path / "run", tmp_path / "shipped"
    with pytest.raises(UserError, match="no finished run"):
        ship_transformer.ship(run, shipped)
    (run / "finished").write_text(json.dumps({"step": 3, "figures": {"validation/loss": 0.2}}))
    ship_transformer.ship(run, shipped)
    weights = load_file(shipped / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    figures = json.loads((shipped / "figures.json").read_text())
    assert figures["bytes"] < 1e6 and figures["steps"] == 3 and figures["held_out"] == {"validation/loss": 0.2}
    loaded = diffusers.CogVideoXTransformer3DModel.from_pretrained(shipped)
    assert sum(p.numel() for p in loaded.parameters()) == figures["parameters"]


def test_of_a_wan_with_references_the_base_is_shipped(tmp_path):
    wan_networks.write_pipeline(tmp_path / "wan")
    made = WanReferences(str(tmp_path / "wan"), clip_dim=32)
    run, shipped = tmp_path / "run", tmp_path / "shipped"
    made.export(run / "export", made.state_dict())
    (run / "finished").write_text(json.dumps({"step": 3, "figures": {}}))
    ship_transformer.ship(run, shipped)
    loaded, report = diffusers.WanTransformer3DModel.from_pretrained(shipped, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value.float(), made.transformer.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("module", [networks, wan_networks])
def test_the_shipped_ones_are_small(module):
    files = list(module.SHIPPED_TRANSFORMER.iterdir())
    assert {path.name for path in files} == {"config.json", "figures.json", "diffusion_pytorch_model.safetensors"}
    assert sum(path.stat().st_size for path in files) < 1_000_000
