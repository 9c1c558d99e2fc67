"""Real runs of the video editor, quickly: six clips of plain colours and a pipeline of small networks."""

import os
import shutil
from pathlib import Path

from tests.data import edits
from tests.pipelines import save_pipeline

TRAINED = ("train/move_object/video_01", "train/drop_object/video_01", "train/cover_object/video_01")
SHORT = ["steps=4", "checkpoint.every=2", "validation.every=4", "validation.clips=2", "logging.every=1", "tracker=none"]
SHORT += ["loader.workers=0"]
HELD_OUT = ("val/move_object/video_01", "val/drop_object/video_01", "test/drop_object/video_01")


def world(folder: Path) -> list[str]:
    """Data and weights below `folder`, and the words that train on them at full size, two clips a step (not SHORT)."""
    weights = folder / "weights"
    for file in save_pipeline(weights / "instruct-pix2pix").rglob("*.safetensors"):
        os.utime(file, (1_600_000_000, 1_600_000_000))  # so that its hash is remembered
    data = edits.write(folder / "data", [*TRAINED, *HELD_OUT], size=(16, 16))
    return [
        "experiment=ip2p_video",
        "size=full",
        f"paths.data={data}",
        f"paths.weights={weights}",
        "model.encoder.dtype=fp32",
        "+model.sampler.scheduler=DDIMScheduler",
        "model.sampler.num_inference_steps=2",
        "num_frames=20",
        "height=16",
        "width=16",
        "batch_size=2",
        "gradient_accumulation=1",
        "lr=1e-3",
        "precision=fp32",
    ]


def one_clip(words: list[str], folder: Path) -> list[str]:
    """The same words for data whose one clip is trained on and held out, to see whether it is learnt by heart."""
    data = edits.write(folder / "one", [TRAINED[0]], size=(16, 16))
    shutil.copytree(data / TRAINED[0], data / HELD_OUT[0])
    edits.write_metadata(data, [edits.row(name) for name in (TRAINED[0], HELD_OUT[0])])
    return [*(word for word in words if not word.startswith("paths.data=")), f"paths.data={data}"]
