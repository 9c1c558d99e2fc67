"""What is shipped of a run of the CogVideoX recipe is small and loads."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from vireo.errors import UserError
from vireo.mini import networks, ship_transformer


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


@pytest.mark.skipif(not networks.SHIPPED_TRANSFORMER.is_dir(), reason="no transformer is shipped yet")
def test_the_shipped_one_is_small():
    files = list(networks.SHIPPED_TRANSFORMER.iterdir())
    assert {path.name for path in files} == {"config.json", "figures.json", "diffusion_pytorch_model.safetensors"}
    assert sum(path.stat().st_size for path in files) < 1_000_000
