"""The small CogVideoX transformer that is shipped: trained by the recipe itself, kept in half precision.

    python train.py experiment=cogvideox_t2v_sft run=shipped steps=4000 lr=3e-3 schedule=cosine warmup_steps=100 \\
        ema.decay=0.999 loss.condition_dropout=0.1
    python -m vireo.mini.ship_transformer outputs/cogvideox_t2v_sft/shipped

Before the first time there is no such file, and the world's transformers are random. Trained again, one goes on from
the shipped weights: delete their folder first.
"""

import json
import sys
from pathlib import Path

from vireo.errors import UserError
from vireo.mini.networks import SHIPPED_TRANSFORMER

FILE = "diffusion_pytorch_model.safetensors"


def ship(run: Path, folder: Path = SHIPPED_TRANSFORMER) -> None:
    """Write the export of a finished run into `folder`, with its figures. Raises UserError if it is not finished."""
    from safetensors.torch import load_file, save_file

    if not (run / "finished").is_file():
        raise UserError(f"{run} is no finished run")
    exported = run / "export" / "transformer"
    weights = {name: value.half() for name, value in load_file(exported / FILE).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / FILE, metadata={"format": "pt"})
    (folder / FILE).chmod(0o644)  # safetensors makes them private
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    finished = json.loads((run / "finished").read_text(encoding="utf-8"))
    figures = {
        "held_out": finished["figures"],
        "steps": finished["step"],
        "parameters": sum(value.numel() for value in weights.values()),
        "bytes": (folder / FILE).stat().st_size,
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    ship(Path(sys.argv[1]))
