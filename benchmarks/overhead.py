"""python benchmarks/overhead.py [pairs]

What the training loop costs: the same student on the same frames in memory, through vireo's loop (draws, encoder,
vote, guard, schedule, figures every 10 steps) and through a bare PyTorch loop, alternating in one process.
"""

import itertools
import os
import sys
from pathlib import Path

import torch

from paired import paired, verdict
from vireo import config, distributed, faults, objects
from vireo.ema import ExponentialMovingAverage
from vireo.freezing import FreezePolicy
from vireo.hangs import Watchdog
from vireo.models.encoders import NoEncoder
from vireo.optimizers import adamw
from vireo.schedules import Cosine
from vireo.strategies.replicated import Replicated
from vireo.training import Progress, train

STEPS = 10  # of one round
BATCH, FRAMES, SIDE = 4, 9, 64
BOUND = 1.03


def student() -> torch.nn.Module:
    settings = config.settings(["experiment=taehv", "model.network.weights=null"])
    return objects.network(settings)


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (BATCH, FRAMES, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    batch = {"frames": frames, "position": torch.arange(BATCH), "bad": []}

    bare_network = student()
    bare_optimizer = torch.optim.AdamW(bare_network.parameters(), lr=1e-4, fused=True)

    def bare() -> None:
        for _ in range(STEPS):
            pixels = frames.float().div(255)
            output = bare_network(pixels)
            loss = torch.nn.functional.mse_loss(output.frames, pixels[:, : output.frames.shape[1]])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(bare_network.parameters(), 1.0)
            bare_optimizer.step()
            bare_optimizer.zero_grad()

    strategy = Replicated(precision="fp32")
    network, policy = student(), FreezePolicy(["."])
    policy(network)
    optimizer = adamw(policy.groups(network, 1e-4), lr=1e-4)
    wrapped = strategy.prepare(network, optimizer)
    loss = objects.loss(config.settings(["experiment=taehv"]))

    def ours() -> None:
        train(
            wrapped,
            NoEncoder(),
            loss,
            itertools.repeat(batch),
            optimizer,
            Cosine(),
            strategy,
            ExponentialMovingAverage({}, 0),
            seed=0,
            progress=Progress(0, 0, 0),
            steps=STEPS,
            batch_size=BATCH,
            accumulation=1,
            max_grad_norm=1.0,
            log_every=10,
            max_consecutive_skips=10,
            max_loss_rise=None,
            max_bad_files=1,
            stop=faults.StopRequest(),
            watchdog=Watchdog(Path(os.devnull), timeout=3600),
            report=lambda step, figures: None,
            record=lambda incident: None,
            at_boundary=lambda progress, last: None,
        )

    print(f"{STEPS} steps of {BATCH}x{FRAMES}x{SIDE}x{SIDE}, {torch.get_num_threads()} threads, {pairs} pairs")
    ratio = paired(ours, bare, pairs)
    print(f"loop / bare   {ratio}   {verdict(ratio, BOUND)}")
    distributed.close()


if __name__ == "__main__":
    main()
