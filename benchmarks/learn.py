"""python benchmarks/learn.py [case …] [key=value …]

Does it learn? Each case is an ordinary run of train.py on the mini world, shown beside its naive baselines with the
CPU seconds it took. Without a case, all of them run.
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from vireo import config, report

ROOT = Path(__file__).resolve().parents[1]

SUBJECTS = [
    "experiment=opens2v_wan",
    "steps=600",
    "validation.every=300",
    "validation.clips=32",
    "checkpoint.every=300",
    "loader.workers=0",
]
CASES = {
    # Users of the real recipe start from a released network, so the demonstration fine-tunes the shipped one.
    "taehv": ["experiment=taehv"],
    "taehv_seraena": ["experiment=taehv_seraena"],
    # The next frame against the last one, on clips that were never trained on.
    "ip2p_video": [
        "experiment=ip2p_video",
        "schedule=cosine",
        "steps=1600",
        "validation.every=400",
        "validation.clips=96",
        "checkpoint.every=400",
    ],
    # The flow's error without the reference less that with it, and the same from the published start.
    "opens2v_wan": SUBJECTS,
    "opens2v_wan_published": [*SUBJECTS, "model.network.init=published", "freeze_policy.groups.gate.lr_scale=0"],
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


def run(case: str, further: list[str]) -> tuple[dict[str, float], dict[str, float], float, int]:
    """Figures of the held-out clips before the first and after the last step, CPU seconds, steps."""
    words = [*CASES[case], f"run=learn_{case}", "tracker=none", *further]
    settings = config.settings(words)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, str(ROOT / "train.py"), *words], check=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    rows = [json.loads(line) for line in (config.run_folder(settings) / "metrics.jsonl").read_text().splitlines()]
    figures = [row for row in rows if "validation/loss" in row]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return figures[0], figures[-1], cpu, figures[-1]["step"]


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
        start, end, cpu, steps = run(case, further)
        print(f"\n{case}: {steps} steps, {cpu:.0f} CPU s in all (imports, validation and data included)")
        print(f"before\n{report.comparison({k: v for k, v in start.items() if k != 'step'})}")
        print(f"after\n{report.comparison({k: v for k, v in end.items() if k != 'step'})}")


if __name__ == "__main__":
    main()
