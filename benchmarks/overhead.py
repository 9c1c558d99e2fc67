"""python benchmarks/overhead.py [pairs]

What the training loop costs: the same student on the same frames in memory, through vireo's loop (draws, encoder,
vote, guard, schedule, figures every 10 steps) and through a bare PyTorch loop, alternating in one process.
"""

import itertools
import sys

import torch

from loop import Loop
from paired import paired, verdict
from vireo import config, distributed, objects
from vireo.models.encoders import NoEncoder

STEPS = 10  # of one round
BATCH, FRAMES, SIDE = 4, 9, 64
BOUND = 1.03


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (BATCH, FRAMES, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    batch = {"frames": frames, "position": torch.arange(BATCH), "bad": []}
    settings = config.settings(["experiment=taehv", "model.network.weights=null", "ema.decay=0", f"batch_size={BATCH}"])
    ours = Loop(settings, NoEncoder(), itertools.repeat(batch), STEPS)

    bare_network = objects.network(settings)
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

    print(f"{STEPS} steps of {BATCH}x{FRAMES}x{SIDE}x{SIDE}, {torch.get_num_threads()} threads, {pairs} pairs")
    ratio = paired(ours, bare, pairs)
    print(f"loop / bare   {ratio}   {verdict(ratio, BOUND)}")
    distributed.close()


if __name__ == "__main__":
    main()
