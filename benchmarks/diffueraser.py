"""python benchmarks/diffueraser.py [--quick]

What a step of DiffuEraser costs, on the mini world's small networks: vireo's loop against a bare PyTorch loop on the
same batches, and against one that does what the published trainer does at every step; drawing holes.

Every comparison alternates between the two in this process, on batches that are loaded before.
"""

import argparse
import copy
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from loop import Loop
from paired import at_most, interval, paired, verdict
from vireo import config, distributed, objects
from vireo.data.masks import MovingShapes
from vireo.data.stream import Slices, Stream, loader
from vireo.mini import world
from vireo.randomness import Draws

BATCHES = 4  # in turn
COLLECTIONS = 5  # of garbage, at every step of the published trainer
WORDS = ["tracker=none", "loader.workers=0", "cache=off", "steps=100000"]
HOLES = (10, 480, 854)  # frames, height and width of a clip of the recipe's data


def batches(settings: dict[str, Any], encoder: Any) -> list[dict[str, Any]]:
    """Some of the run's batches, with what a cache would hold of them."""
    stream = Stream(objects.dataset(settings, "train"), settings["seed"])
    slices = Slices(0, 0, BATCHES * settings["batch_size"], settings["batch_size"], 1, 0, 1)
    return [
        {**batch, **{name: encoder.encode(name, batch[source]) for name, source in encoder.outputs.items()}}
        for batch in itertools.islice(loader(stream, slices, workers=0), BATCHES)
    ]


def bare(
    network: torch.nn.Module, settings: dict[str, Any], encoder: Any, given: Iterator[dict[str, Any]], published: bool
) -> Callable[[], None]:
    """The same step in a bare loop: torch's own randomness, no vote, no guard, no figures.

    published: encode frames and text at every step, collect garbage and empty the device's cache.
    """
    loss: Any = objects.loss(settings)
    schedule = loss.noise_schedule
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=settings["lr"], fused=True)
    average, decay = [parameter.detach().clone() for parameter in learning], settings["ema"]["decay"]

    def drawn(moments: torch.Tensor) -> torch.Tensor:
        mean, log_variance = moments.chunk(2, dim=2)
        latents = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return latents.transpose(1, 2) * encoder.scaling_factor

    def step(batch: dict[str, Any]) -> None:
        moments, text = batch["frame_moments"], batch["prompt_embeds"]
        if published:
            encoder.embeds_by_text.clear()
            moments = encoder.encode("frame_moments", batch["frames"])
            text = torch.cat([encoder.encode("prompt_embeds", [one]) for one in batch["prompt"]])
        clean, masked = drawn(moments), drawn(encoder.encode("frame_moments", batch["masked_frames"]))
        keep = 1 - batch["hole"][..., ::8, ::8].float().transpose(1, 2)
        noise, timesteps = torch.randn_like(clean), torch.randint(1000, (len(clean),))
        prediction = network(schedule.add_noise(clean, noise, timesteps), timesteps, masked, keep, text)
        F.mse_loss(prediction, schedule.target(clean, noise, timesteps)).backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, list[torch.Tensor](learning), 1 - decay)
        for _ in range(COLLECTIONS if published else 0):
            gc.collect()
            torch.cuda.empty_cache()

    return lambda: step(next(given))


def steps(experiment: str, pairs: int) -> None:
    settings = config.settings([f"experiment={experiment}", *WORDS])
    encoder = objects.encoder(settings)
    given = batches(settings, encoder)
    ours = Loop(settings, encoder, itertools.cycle(given), steps=1)
    size = f"{settings['batch_size']} clips of {settings['num_frames']} frames"
    for title, published, bound in (("a bare loop", False, 1.03), ("a step as published", True, 1.0)):
        other = bare(copy.deepcopy(ours.network), settings, encoder, itertools.cycle(given), published)
        ratio = paired(ours, other, pairs)
        print(f"{experiment}, {size}: vireo's loop / {title}   {ratio}   {verdict(ratio, bound)}", flush=True)


def holes(clips: int) -> None:
    """Drawing holes one by one, in this thread, as a worker of the loader does."""
    draw, seconds = MovingShapes(), []
    for number in range(clips):
        began = time.process_time()
        draw(*HOLES, Draws(("benchmark", 0), [number]))
        seconds.append(time.process_time() - began)
    low, high = (1e3 * bound for bound in interval(seconds))
    median = 1e3 * statistics.median(seconds)
    print(
        f"holes of {HOLES[0]} frames of {HOLES[2]}x{HOLES[1]}: {median:.2f} ms [{low:.2f}, {high:.2f}] of CPU a clip, "
        f"{HOLES[0] * clips / sum(seconds):.0f} masks a second   ms {at_most(5, low, high)}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pairs, few clips")
    quick = parser.parse_args().quick
    world.ensure()
    print(f"{torch.get_num_threads()} threads, {4 if quick else 30} pairs of steps")
    holes(20 if quick else 200)
    for experiment in ("diffueraser_stage1", "diffueraser_stage2"):
        steps(experiment, 4 if quick else 30)
    distributed.close()


if __name__ == "__main__":
    main()
