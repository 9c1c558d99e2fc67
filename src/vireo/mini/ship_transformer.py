"""The small transformers that are shipped: trained by the recipes themselves, kept in half precision.

    python train.py experiment=cogvideox_t2v_sft run=shipped steps=4000 lr=3e-3 schedule=cosine warmup_steps=100 \\
        ema.decay=0.999 loss.condition_dropout=0.1
    python -m vireo.mini.ship_transformer outputs/cogvideox_t2v_sft/shipped cogvideox_transformer

    python train.py experiment=opens2v_wan data=captioned_clips freeze-policy=all model.inputs=[prompt_embeds] \\
        loss.image_inputs=[] loss.timestep_range=[0,1000] loss.condition_dropout=0.1 validation.metric=loss \\
        validation.higher_is_better=false schedule=cosine warmup_steps=100 ema.decay=0.999 \
        run=shipped steps=3000 lr=3e-3
    the same with run=shipped2 init_from=outputs/opens2v_wan/shipped steps=5000 lr=2e-3
    python -m vireo.mini.ship_transformer outputs/opens2v_wan/shipped2 wan_transformer

Before the first time there is no such file, and the world's transformers are random. Trained again, one goes on from
the shipped weights: delete their folder first.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vireo.errors import UserError

WEIGHTS = Path(__file__).parent / "weights"
FILE = "diffusion_pytorch_model.safetensors"


def ship(run: Path, folder: Path) -> None:
    """Write the export of a finished run into `folder`, with its figures. Raises UserError if it is not finished."""
    from safetensors.torch import save_file

    if not (run / "finished").is_file():
        raise UserError(f"{run} is no finished run")
    state, config = _transformer(run / "export")
    weights = {name: value.half() for name, value in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / FILE, metadata={"format": "pt"})
    (folder / FILE).chmod(0o644)  # safetensors makes them private
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    finished = json.loads((run / "finished").read_text(encoding="utf-8"))
    figures = {
        "held_out": finished["figures"],
        "steps": finished["step"],
        "parameters": sum(value.numel() for value in weights.values()),
        "bytes": (folder / FILE).stat().st_size,
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _transformer(exported: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and config of an exported transformer; of a Wan with references, what is not the references'."""
    from safetensors.torch import load_file

    if (exported / "transformer").is_dir():
        config = json.loads((exported / "transformer" / "config.json").read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # a folder of this machine
        return load_file(exported / "transformer" / FILE), config
    from vireo.mini.wan_networks import TRANSFORMER
    from vireo.models.wan_references import ADAPTER, is_new

    state = {name: value for name, value in load_file(exported / ADAPTER).items() if not is_new(name)}
    return state, {"_class_name": "WanTransformer3DModel", **TRANSFORMER}


if __name__ == "__main__":
    ship(Path(sys.argv[1]), WEIGHTS / sys.argv[2])
