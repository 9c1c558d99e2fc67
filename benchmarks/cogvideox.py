"""python benchmarks/cogvideox.py [--quick]

CogVideoX on the mini world's small networks. A step of vireo against a bare loop of the same network on tensors in
memory: a LoRA, with and without gradient checkpointing, and the whole network, by time and by peak memory. A step of
image-to-video with cached variants against one of text-to-video. Preparing the cache against decoding and encoding
alone. Starting with a full cache, after imports.

Every comparison alternates between the two in this process. Loading happens in it too, so that CPU time counts it; a
step against the bare loop is also measured with batches that are loaded already, as workers do beside the step.
"""

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ip2p import STEPS, Some, fill
from loop import loading
from paired import paired, verdict
from vireo import config, digests, distributed, objects
from vireo.cache import Cache
from vireo.data.stream import Stream
from vireo.mini import world
from vireo.peak_memory import peak_memory

WORDS = ["tracker=none", "loader.workers=0", "warmup_steps=0"]
LORA, SFT = "experiment=cogvideox_t2v_lora", "experiment=cogvideox_t2v_sft"
CHECKPOINTED = "model.network.gradient_checkpointing=1"
HELD = 64  # clips that the bare loop draws from


def bare(settings: dict[str, Any], dataset: Any, cache: Cache) -> Callable[[], None]:
    """The same step in a bare loop: encodings in memory, torch's own randomness, no vote, no guard, no figures."""
    network, policy = objects.network(settings), objects.freeze_policy(settings)
    policy(network)
    policy.train_mode(network)
    learns = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=settings["lr"], betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    loss: Any = objects.loss(settings)
    encoder: Any = objects.encoder(settings)
    schedule, scale = loss.noise_schedule, encoder.scaling_factor
    rows = Stream(dataset, 0, cache=cache).samples([(position, 0) for position in range(HELD)])
    moments, text = (torch.stack([row[name] for row in rows]) for name in ("video_moments", "prompt_embeds"))

    def run() -> None:
        for _ in range(STEPS):
            which = torch.randint(HELD, (settings["batch_size"],))
            mean, log_variance = moments[which].chunk(2, dim=1)
            clean = (mean + (log_variance / 2).exp() * torch.randn_like(mean)) * scale
            noise, timesteps = torch.randn_like(clean), torch.randint(1000, (len(which),))
            noisy = schedule.add_noise(clean, noise, timesteps)
            prediction = network(noisy, timesteps, prompt_embeds=text[which])
            F.mse_loss(prediction, schedule.target(clean, noise, timesteps)).backward()
            torch.nn.utils.clip_grad_norm_(learns, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return run


def filled(words: list[str], folder: Path) -> tuple[dict[str, Any], Any, Any, Cache]:
    """Settings, training clips, encoder, and a cache that has all of them."""
    settings = config.settings([*words, *WORDS])
    dataset, encoder = objects.dataset(settings, "train"), objects.encoder(settings)
    cache = Cache.of(encoder, folder)
    fill(cache, Some(dataset, 0, len(dataset)), encoder, settings["cache"]["batch_size"])
    return settings, dataset, encoder, cache


def steps(folder: Path, pairs: int) -> None:
    for name, words in {"LoRA": [LORA], "LoRA, checkpointed": [LORA, CHECKPOINTED], "all": [SFT]}.items():
        settings, dataset, encoder, cache = filled(words, folder)
        ours, theirs = loading(settings, dataset, encoder, cache, STEPS), bare(settings, dataset, cache)
        for _ in range(len(dataset) // (STEPS * settings["batch_size"]) + 1):
            ours()  # an epoch, after which entries are in memory
        print(f"step with loading / bare loop, {name}   {paired(ours, theirs, pairs)}", flush=True)
        ours.batches = itertools.cycle([next(ours.batches) for _ in range(8)])
        ratio = paired(ours, theirs, pairs)
        print(f"step / bare loop, {name}   {ratio}   {verdict(ratio, 1.03)}", flush=True)
        peaks = [[peak_memory(call, torch.device("cpu")) or 0 for _ in range(5)] for call in (ours, theirs)]
        ours_mib, theirs_mib = (statistics.median(some) / 2**20 for some in peaks)
        share = f"{ours_mib / theirs_mib:.3f}" if theirs_mib else "not known"
        print(f"peak memory / bare loop, {name}   {share}   ({ours_mib:.0f} and {theirs_mib:.0f} MiB)   <= 1.1")


def pictures(folder: Path, pairs: int) -> None:
    """Image-to-video with 8 noised encodings of each picture in the cache, and with the VAE at each step."""
    text = loading(*filled([LORA], folder), STEPS)
    for variants in (8, "null"):
        words = ["experiment=cogvideox_i2v_lora", f"model.encoder.image_variants={variants}"]
        image = loading(*filled(words, folder), STEPS)
        for _ in range(30 if variants == 8 else 1):
            image()
        ratio = paired(image, text, pairs)
        held = f"   {verdict(ratio, 1.05)}" if variants == 8 else ""
        print(f"image-to-video step, image_variants={variants} / text-to-video step   {ratio}{held}", flush=True)


def preparation(pairs: int, clips: int) -> None:
    """Filling an empty cache; at 17x128x192 the VAE has something to do."""
    settings = config.settings([LORA, *WORDS, "num_frames=17", "height=128", "width=192"])
    dataset, encoder = objects.dataset(settings, "train"), objects.encoder(settings)
    batch_size, some = settings["cache"]["batch_size"], Some(dataset, 0, clips)

    def pure() -> None:
        given = [some.sources(index) for index in range(clips)]
        for first in range(0, clips, batch_size):
            frames = [one["frames"][0].load() for one in given[first : first + batch_size]]
            encoder.encode("video_moments", torch.stack(frames))
        encoder.encode("prompt_embeds", [one["prompt"][0] for one in given])
        encoder.encode("null_prompt_embeds", [""])
        encoder.free()  # as the filling does: weights are loaded each time

    with tempfile.TemporaryDirectory() as folder:

        def prepare() -> None:
            fill(Cache.of(encoder, Path(folder) / str(time.monotonic_ns())), some, encoder, batch_size)

        ratio = paired(prepare, pure, pairs, warmup=1)
        print(
            f"preparation of {clips} clips / decoding and encoding alone   {ratio}   {verdict(ratio, 1.1)}", flush=True
        )


def warm_start(folder: Path) -> None:
    """Every entry is there, and files are known by size and times of change: what a process does after its imports.

    That is to read lists and what is remembered of each file, to look at all of them, and to ask for every entry.
    """
    settings, dataset, _, _ = filled([LORA], folder)
    seconds = {}
    for clips in (4, len(dataset)):
        with tempfile.TemporaryDirectory() as root:
            data = {**settings["data"], "root": _first(dataset, clips, Path(root))}
            times = [_start({**settings, "data": data}, folder) for _ in range(8)]  # the first one hashes the files
        seconds[clips] = statistics.median(times[1:])
    few, many = seconds[4], seconds[len(dataset)]
    each = (many - few) / (len(dataset) - 4)
    print(f"start with a full cache: {few:.3f} s for 4 clips (<= 0.1), {1000 * each:.3f} ms for each further one (< 1)")


def _first(dataset: Any, clips: int, root: Path) -> str:
    """A folder with the first clips of a dataset alone."""
    for name in ("prompts.txt", "videos.txt"):
        lines = (dataset.root / name).read_text(encoding="utf-8").splitlines()[:clips]
        (root / name).write_text("\n".join(lines), encoding="utf-8")
    for name in lines:
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy2(dataset.root / name, root / name)
    return str(root)


def _start(settings: dict[str, Any], folder: Path) -> float:
    """Seconds of a start, as of a process that has seen no file yet."""
    digests._remembered.clear()
    began = time.perf_counter()
    dataset, encoder = objects.dataset(settings, "train"), objects.encoder(settings)
    fill(Cache.of(encoder, folder), dataset, encoder, settings["cache"]["batch_size"])
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pairs")
    pairs = 6 if parser.parse_args().quick else 30
    world.ensure()
    print(f"{torch.get_num_threads()} threads, {pairs} pairs")
    with tempfile.TemporaryDirectory() as folder:
        warm_start(Path(folder))
        preparation(max(pairs // 3, 3), clips=8)
        steps(Path(folder), pairs)
        pictures(Path(folder), pairs)
    distributed.close()


if __name__ == "__main__":
    main()
