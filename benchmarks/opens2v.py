"""python benchmarks/opens2v.py [--entries 100000] [--pairs 30]

What an annotation file of OpenS2V-5M costs: a file of that many entries of about 5 kB is generated (half a gigabyte);
then a fresh process makes its index, and another one looks entries up. A CPU-sized run: add --entries 5000.

Then what vireo's loop costs on the mini world: a step of opens2v_wan with cached encodings against one of a bare loop
on tensors in memory, alternating in this process: first with loading in it too, so that CPU time counts it (masks and
annotations are read at each sample), then with batches that are loaded already, as workers do beside the step.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ip2p import STEPS
from loop import loading
from paired import paired, verdict
from vireo import cache_filling, config, distributed, objects
from vireo.cache import Cache
from vireo.data.stream import Stream
from vireo.mini import world

MIB = 2**20
LOOKUPS = 10_000
BOUNDS = {"seconds to build": 60.0, "MiB for a worker": 150.0, "ms for a lookup": 1.0}


def write(root: Path, count: int) -> int:
    """`Jsons/mask_and_bbox/total_part1.json`; returns its bytes."""
    file = root / "Jsons" / "mask_and_bbox" / "total_part1.json"
    file.parent.mkdir(parents=True)
    ring = "".join(f"{chr(48 + n % 30)}{chr(48 + (7 * n) % 30)}" for n in range(500))
    masks = {str(n): {"size": [720, 1280], "counts": ring, "score": [0.9]} for n in (1, 2, 3)}
    scores = [{"class_name": "dog", "bbox": [1.5, 2.5, 300.5, 400.5], "gme_score": 0.4, "aes_score": 4.5}] * 3
    with open(file, "w", encoding="utf-8") as stream:
        for number in range(count):
            key = f"video{number:08d}_part1_step1-0-95_step2-0-95"
            metadata = {
                "path": f"video{number:08d}.mp4",
                "cut": [0, 95],
                "face_cut": [0, 95],
                "crop": [0, 1280, 0, 720],
                "fps": 30.0,
                "face_cap_qwen": "A dog runs over a meadow. " * 45,
            }
            annotation = {
                "ann_frame_data": {"ann_frame_idx": 0, "annotations": scores},
                "mask_map": {n: {"class_name": "dog"} for n in masks},
                "mask_annotation": {"0": masks},
            }
            entry = {"metadata": metadata, "word_tags": {"subject": ["dog"]}, "annotation": annotation}
            stream.write(("{" if number == 0 else ",") + f"{json.dumps(key)}: {json.dumps(entry)}")
        stream.write("}")
    return file.stat().st_size


MEASURE = """
import json, resource, sys, time
from pathlib import Path
import torch
from vireo.data import subject_clips, subject_parts
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
before, began, cpu = resident(), time.perf_counter(), time.process_time()
(part,) = subject_parts.find_parts(Path(sys.argv[1]), None, None)
built, cpu = time.perf_counter() - began, time.process_time() - cpu
order = torch.randperm(len(part.entries), generator=torch.Generator().manual_seed(0))[: int(sys.argv[2])].tolist()
began = time.perf_counter()
for row in order:
    part.entries.entry(row)
by_number = (time.perf_counter() - began) / len(order)
keys = [part.entries.entry(row)[0] for row in order]
began = time.perf_counter()
assert [part.entries.row(key) for key in keys] == order
by_key = (time.perf_counter() - began) / len(order)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([built, cpu, resident() - before, peak - before, by_number, by_key]))
"""


def measure(root: Path) -> list[float]:
    """In a fresh process: wall and CPU seconds until the part is there, bytes that it added at the end and at most, and
    seconds for a lookup by number and by key."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(root / "cache")}
    command = [sys.executable, "-c", MEASURE, str(root), str(LOOKUPS)]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def bare(settings: dict[str, Any], rows: list[dict[str, Any]]) -> Callable[[], None]:
    """The same step in a bare loop: encodings stacked in memory, torch's own randomness, no vote, no guard."""
    network, policy = objects.network(settings), objects.freeze_policy(settings)
    policy(network)
    groups = [{**group, "params": [p for _, p in group["params"]]} for group in policy.groups(network, settings["lr"])]
    learning = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=settings["lr"], weight_decay=0.0, fused=True)
    names = ("video_latents", "prompt_embeds", "clip_embeds", "reference_latents_raw", "reference_mask")
    held = {name: torch.stack([row[name] for row in rows]) for name in names}
    sigmas = 5 * torch.linspace(1, 1e-3, 1000) / (1 + 4 * torch.linspace(1, 1e-3, 1000))

    def run() -> None:
        for _ in range(STEPS):
            which = torch.randint(len(rows), (settings["batch_size"],))
            clean, text, clip, latents, mask = (held[name][which] for name in names)
            sigma, noise = sigmas[torch.randint(20, 980, (len(which),))], torch.randn_like(clean)
            level = sigma.view(-1, 1, 1, 1, 1)
            noisy = (1 - level) * clean + level * noise
            prediction = network(noisy, 1000 * sigma, text, clip, latents.transpose(1, 2), mask)
            F.mse_loss(prediction, noise - clean).backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return run


def steps(pairs: int) -> None:
    world.ensure()
    few = "data.held_out=0.8"  # encodings of the rest are not needed
    settings = config.settings(["experiment=opens2v_wan", "tracker=none", "loader.workers=0", few])
    dataset, encoder = objects.dataset(settings, "train"), objects.encoder(settings)
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache.of(encoder, Path(folder))
        batch_size = settings["cache"]["batch_size"]
        cache_filling.fill(cache, {"train": dataset}, encoder, "benchmark", batch_size=batch_size)
        cached = loading(settings, dataset, encoder, cache, STEPS)
        for _ in range(len(dataset) // (STEPS * settings["batch_size"]) + 1):
            cached()  # an epoch, after which entries are in memory
        rows = Stream(dataset, 0, cache=cache).samples([(position, 0) for position in range(len(dataset))])
        alone = bare(settings, rows)
        print(f"step with loading / bare loop on tensors in memory   {paired(cached, alone, pairs)}", flush=True)
        cached.batches = itertools.cycle([next(cached.batches) for _ in range(4)])  # loaded, as by workers beside
        ratio = paired(cached, alone, pairs)
        print(f"step / bare loop on tensors in memory   {ratio}   {verdict(ratio, 1.03)}")
    distributed.close()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--entries", type=int, default=100_000)
    arguments.add_argument("--pairs", type=int, default=30, help="of timed steps; 0 leaves them out")
    asked = arguments.parse_args()
    count = asked.entries
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        size = write(Path(folder), count)
        took = time.perf_counter() - began
        print(f"{count} entries, {size / MIB:.0f} MiB, {size / count / 1000:.1f} kB each, written in {took:.0f} s")
        wall, cpu, _, peak, _, _ = measure(Path(folder))
        print(f"index made in {wall:.1f} s ({cpu:.1f} s of CPU), {peak / MIB:.0f} MiB at most while it is made")
        again, _, added, peak, by_number, by_key = measure(Path(folder))
        print(
            f"a worker later: {1000 * again:.0f} ms to open it, {added / MIB:.1f} MiB added, at most {peak / MIB:.1f}; "
            f"an entry by number {1e6 * by_number:.0f} us, a number by key {1e6 * by_key:.0f} us"
        )
    measured = dict(zip(BOUNDS, (wall, added / MIB, 1000 * by_number), strict=True))
    for what, bound in BOUNDS.items():
        print(f"{what}: {measured[what]:.3g}, at most {bound:g}: {'held' if measured[what] <= bound else 'MISSED'}")
    if asked.pairs:
        steps(asked.pairs)


if __name__ == "__main__":
    main()
