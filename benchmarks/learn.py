"""python benchmarks/learn.py [case …] [key=value …]

Does it learn? Each case is an ordinary run of train.py on the mini world, or a chain of them, shown beside its naive
baselines with the CPU seconds it took. Without a case, all of them run.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vireo import config, report, run_folder
from vireo.mini import world

ROOT = Path(__file__).resolve().parents[1]

SUBJECTS = [
    "experiment=opens2v_wan",
    "steps=600",
    "validation.every=100",
    "validation.clips=32",
    "checkpoint.every=300",
    "loader.workers=0",
]
EDITS = ["schedule=cosine", "steps=1600", "validation.every=400", "validation.clips=96", "checkpoint.every=400"]
CASES = {
    # Users of the real recipe start from a released network, so the demonstration fine-tunes the shipped one.
    "taehv": ["experiment=taehv"],
    "taehv_seraena": ["experiment=taehv_seraena"],
    # The next frame against the last one, on clips that were never trained on; the baseline sees the last one alone.
    "ip2p_video": ["experiment=ip2p_video", *EDITS],
    "ip2p_image": ["experiment=ip2p_image", *EDITS],
    # Both stages, from networks that know nothing: first single frames, then motion.
    "diffueraser": [
        "experiment=diffueraser",
        "schedule=cosine",
        "cache=on",
        "validation.clips=16",
        "chain.stage2.steps=1200",
    ],
    # A LoRA learns one clip by heart, on a ground that the shipped network has never seen, under a word of its own.
    "cogvideox_one_clip": [
        "experiment=cogvideox_t2v_lora",
        "size=mini",
        "data.validation=.",
        "data.id_token=MARBLED",
        "lr=3e-3",
        "steps=400",
        "validation.clips=1",
        "model.sampler.guidance_scale=1",
    ],
    # The flow's error without the reference less that with it, and the same from the published start.
    "opens2v_wan": SUBJECTS,
    "opens2v_wan_published": [*SUBJECTS, "model.network.init=published"],
    # From nothing: Muon, and mostly small crops, since a young autoencoder needs many independent pictures a second.
    "taehv_scratch": [
        "experiment=taehv",
        "model.network.weights=null",
        "optimizer=muon",
        "lr=0.02",
        "warmup_steps=50",
        "steps=2000",
        "data.sizes=[32,32,32,32,32,32,32,64]",
        "data.crop_scale=[0.5,1.0]",
        "validation.every=250",
        "checkpoint.every=500",
    ],
}


# The stages of DiffuEraser on the same clips. All holes move, so what they hide is seen in other frames. Both start
# from the same noise, the first one once more in its own way, from one noise for all frames.
MOVING_HOLES = ["data.mask.p_static=0", "data.num_frames=9", "model.sampler.window=9"]
INDEPENDENT = ["model.sampler.noise=independent"]


def one_clip(words: list[str]) -> Path:
    """A folder of one clip of the mini world with a caption that says what of it the shipped CogVideoX knows."""
    folder = Path(config.settings(words)["paths"]["outputs"]) / "one_clip"
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    shutil.copy(world.ensure() / "data" / "clips" / "00003.mp4", folder / "videos")
    (folder / "prompts.txt").write_text("a large blue square moves to the left\n")
    (folder / "videos.txt").write_text("videos/00003.mp4\n")
    return folder


def constant(words: list[str]) -> float:
    """Least loss, on the validation's timesteps, of a prediction that knows the clip but does not see the noise."""
    from vireo import objects
    from vireo.losses.denoising import GRID

    loss: Any = objects.loss(config.settings(words))
    kept = loss.noise_schedule.alphas_cumprod
    return sum(float(kept[len(kept) * percent // 100]) for percent in GRID) / len(GRID)


def run(case: str, further: list[str]) -> list[Path]:
    """Train, and say what the held-out clips were like before the first and after the last step; the runs' folders."""
    words = [*CASES[case], f"run=learn_{case}", "tracker=none", *further]
    if case == "cogvideox_one_clip":
        words.append(f"paths.data={one_clip(words)}")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, str(ROOT / "train.py"), *words], check=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"\n{case}: {cpu:.0f} CPU s in all (imports, validation and data included)")
    stages = run_folder.stages(config.run_folder(config.settings(words)))
    for name, folder in stages.items():
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        figures = [row for row in rows if "validation/loss" in row]
        for when, row in (("before", figures[0]), (f"after {figures[-1]['step']} steps", figures[-1])):
            print(f"{name} {when}\n{report.comparison({k: v for k, v in row.items() if k != 'step'})}")
    return list(stages.values())


def evaluate(folder: Path, *words: str) -> None:
    """As `vireo evaluate` does."""
    command = [sys.executable, "-c", "from vireo import cli; raise SystemExit(cli.vireo())", "evaluate"]
    print(f"\n{folder.resolve().name}, {' '.join(words)}", flush=True)
    subprocess.run([*command, f"run={folder.resolve()}", *words], check=True, cwd=ROOT)


def staged() -> None:
    """From nothing as the shipped student was trained: single frames, small crops, whole clips (13 CPU minutes)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "vireo.mini.train_autoencoders",
            "taehv",
            "--scratch",
            folder,
            "--output",
            folder,
        ]
        subprocess.run(command, check=True, cwd=ROOT)
        figures = json.loads((Path(folder) / "taehv_autoencoder" / "figures.json").read_text())
    shown = {name: figures[name] for name in ("held_out_psnr", "baselines", "cpu_seconds", "parameters")}
    print(f"\ntaehv_staged: {shown}")


def main() -> None:
    cases = [word for word in sys.argv[1:] if "=" not in word] or [*CASES, "taehv_staged"]
    further = [word for word in sys.argv[1:] if "=" in word]
    for case in cases:
        if case == "taehv_staged":
            staged()
            continue
        folders = run(case, further)
        if case == "cogvideox_one_clip":
            print(f"loss of the best constant prediction: {constant(CASES[case]):.4f}")
        if case == "diffueraser":
            for folder in folders:
                evaluate(folder, *MOVING_HOLES, *INDEPENDENT)
            evaluate(folders[0], *MOVING_HOLES, f"out={folders[0].resolve()}/evaluation/shared_noise")


if __name__ == "__main__":
    main()
