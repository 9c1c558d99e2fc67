"""python benchmarks/ip2p.py [--quick]

What the encoding cache is worth to InstructPix2Pix for video, on the mini world's small networks (the arithmetic of the
real ones is counted, not run): a training step with cached encodings against one that encodes, and against a bare loop
on tensors in memory; preparing the cache against decoding and encoding alone; starting with a full cache.

Every comparison alternates between the two in this process. Loading happens in it too, so that CPU time counts it; a
cached step against the bare loop is also measured with batches that are loaded already, as workers do beside the step.
A start with a full cache is timed in a new process, as starts are: in an old one Python collects garbage meanwhile.
"""

import argparse
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from loop import loading
from paired import paired, verdict
from vireo import cache_filling, config, distributed, objects
from vireo.cache import Cache
from vireo.data.stream import Stream
from vireo.mini import world

STEPS = 5  # of one round
WORDS = ["experiment=ip2p_video", "tracker=none", "loader.workers=0"]


# -------------------------------------------------------------------------------------------------------- arithmetic


def arithmetic(side: int) -> None:
    """Operations of a sample's step with the real shapes: counted on tensors without memory."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(in_channels=84, cross_attention_dim=768, attention_head_dim=8)
        vae: Any = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        latent, text = torch.randn(1, 84, side // 8, side // 8), torch.randn(1, 77, 768)
        encode = _count(lambda: vae.encode(torch.randn(1, 3, side, side)))
        step = _count(lambda: unet(latent, torch.tensor([1]), text).sample.sum().backward())
    share = 21 * encode / (21 * encode + step)
    print(
        f"Stable Diffusion 1.5 at {side} pixels, a sample: 21 encodings {21 * encode / 1e12:.2f} T, UNet forward and "
        f"backward {step / 1e12:.2f} T: {share:.0%} of a step is saved, it becomes {1 / (1 - share):.1f} times cheaper"
    )


def _count(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------------------------- steps


def bare(settings: dict[str, Any], dataset: Any, cache: Cache, samples: int) -> Callable[[], None]:
    """The same step in a bare loop: encodings stacked in memory, torch's own randomness, no vote, no guard."""
    network, batch_size = objects.network(settings), settings["batch_size"]
    loss: Any = objects.loss(settings)
    schedule = loss.noise_schedule
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings["lr"], fused=True)
    average = [parameter.detach().clone() for parameter in network.parameters()]
    rows = Stream(dataset, 0, cache=cache).samples([(position, 0) for position in range(samples)])
    held = {name: torch.stack([row[name] for row in rows]) for name in cache.outputs}

    def run() -> None:
        for _ in range(STEPS):
            which = torch.randint(samples, (batch_size,))
            mean, log_variance = held["target_moments"][which].chunk(2, dim=1)
            clean = (mean + (log_variance / 2).exp() * torch.randn_like(mean)) * 0.73
            conditions, text = held["frame_moments"][which].chunk(2, dim=2)[0], held["prompt_embeds"][which]
            drop = torch.rand(batch_size)
            text = torch.where((drop < 0.1).view(-1, 1, 1), held["null_prompt_embeds"][which], text)
            conditions = conditions * ~((drop >= 0.05) & (drop < 0.15)).view(-1, 1, 1, 1, 1)
            noise, timesteps = torch.randn_like(clean), torch.randint(1000, (batch_size,))
            noisy = schedule.add_noise(clean, noise, timesteps)
            prediction = network(noisy, timesteps, condition_latents=conditions, prompt_embeds=text)
            F.mse_loss(prediction, schedule.target(clean, noise, timesteps)).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(average, list(network.parameters()), 0.005)

    return run


# ------------------------------------------------------------------------------------------------------- preparation


class Some:
    """The first clips of a dataset."""

    def __init__(self, dataset: Any, first: int, number: int) -> None:
        self.dataset, self.first, self.number = dataset, first, number

    def __len__(self) -> int:
        return self.number

    def sources(self, index: int) -> dict:
        return self.dataset.sources(self.first + index)


def fill(cache: Cache, dataset: Any, encoder: Any, batch_size: int) -> None:
    cache_filling.fill(cache, {"train": dataset}, encoder, "benchmark", batch_size=batch_size)


def pure(dataset: Some, encoder: Any, batch_size: int) -> None:
    """Decode and encode the same clips, and forget the result."""
    sources = [s for i in range(len(dataset)) for f in ("frames", "target") for s in dataset.sources(i)[f]]
    with torch.no_grad():
        for first in range(0, len(sources), batch_size):
            pictures = torch.stack([source.load() for source in sources[first : first + batch_size]])
            encoder.encode("target_moments", pictures)


def preparation(side: int, pairs: int, clips: int) -> None:
    """Filling an empty cache. At the recipe's side the small VAE is still far cheaper than the real one."""
    settings = config.settings([*WORDS, f"height={side}", f"width={side}"])
    dataset, encoder = objects.dataset(settings, "train"), objects.encoder(settings)
    batch_size, firsts = settings["cache"]["batch_size"], itertools.count(0, clips)
    with tempfile.TemporaryDirectory() as folder:

        def prepare() -> None:
            some = Some(dataset, next(firsts) % (len(dataset) - clips), clips)
            fill(Cache.of(encoder, Path(folder) / str(time.monotonic_ns())), some, encoder, batch_size)

        ratio = paired(prepare, lambda: pure(Some(dataset, 0, clips), encoder, batch_size), pairs)
        print(f"preparation, {side} pixels / decoding and encoding alone   {ratio}   {verdict(ratio, 1.1)}", flush=True)


def seconds_to_fill(folder: Path) -> float:
    """Of the whole cache, or of finding that it is full."""
    settings = config.settings(WORDS)
    dataset, encoder = objects.dataset(settings, "train"), objects.encoder(settings)
    began = time.perf_counter()
    fill(Cache.of(encoder, folder), dataset, encoder, settings["cache"]["batch_size"])
    return time.perf_counter() - began


def warm_start(folder: Path) -> None:
    """Fill the whole cache and start again with it, each in a new process."""
    seconds = []
    for _ in range(2):
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            seconds.append(fresh.apply(seconds_to_fill, (folder,)))
    cold, warm = seconds
    print(f"cold {cold:.1f} s, warm {warm:.2f} s: {warm / cold:.1%}   wanted: <= 2 %", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pairs, few clips")
    pairs = 4 if parser.parse_args().quick else 30
    world.ensure()
    for side in (256, 512):
        arithmetic(side)
    settings = config.settings(WORDS)
    dataset, encoder = objects.dataset(settings, "train"), objects.encoder(settings)
    print(f"{len(dataset)} clips of 21 frames of 64x64, {torch.get_num_threads()} threads, {pairs} pairs")
    preparation(64, max(pairs // 3, 3), clips=8)
    preparation(256, max(pairs // 6, 3), clips=2)
    with tempfile.TemporaryDirectory() as folder:
        warm_start(Path(folder))
        cache = Cache.of(encoder, Path(folder))
        cached = loading(settings, dataset, encoder, cache, STEPS)
        uncached = loading(settings, dataset, encoder, None, STEPS)
        print(f"step cached / uncached   {paired(cached, uncached, max(pairs // 6, 2), warmup=1)}", flush=True)
        for _ in range(len(dataset) // (STEPS * settings["batch_size"]) + 1):
            cached()  # an epoch, after which entries are in memory
        alone = bare(settings, dataset, cache, 128)
        print(f"cached step with loading / bare loop on tensors in memory   {paired(cached, alone, pairs)}", flush=True)
        cached.batches = itertools.cycle([next(cached.batches) for _ in range(8)])
        ratio = paired(cached, alone, pairs)
        print(f"cached step / bare loop on tensors in memory   {ratio}   {verdict(ratio, 1.03)}")
    distributed.close()


if __name__ == "__main__":
    main()
