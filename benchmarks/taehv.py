"""python benchmarks/taehv.py [--quick]

What the tiny autoencoder costs at its released size. First, every way to decode a clip: frames a second and peak
memory. Then the whole training step of experiment=taehv_seraena through vireo's loop against the same step in a
straightforward loop, the teacher's latents given to both: time by alternating pairs, peak memory.

Peak memory is a fresh process's, above what it had before the first decode or step.
"""

import argparse
import copy
import functools
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from loop import Loop
from paired import paired, verdict
from vireo import config, distributed
from vireo.models.encoders import NoEncoder
from vireo.models.seraena_discriminator import for_taehv
from vireo.models.taehv import TAEHV
from vireo.models.taehv_streaming import DecoderStream

FRAMES = 33
MODES = ["parallel", "chunked 8", "chunked 4", "chunked 2", "chunked 1", "sequential", "streaming 4", "streaming 1"]
CLIPS, CLIP_FRAMES, GROUP = 2, 9, 3  # of a training step
SLOTS = 16384  # past fakes that Seraena's reference keeps
HERE = str(Path(__file__).parent)  # any folder: nothing is read from the paths


def peak() -> float:
    """MiB that this process has held at most. (Linux; its ru_maxrss would include the process it was started from.)"""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 1024


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------------ decoding


def decoding(mode: str, side: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """A decode of the whole clip in this mode, and a very small one that makes torch load what it needs."""
    torch.manual_seed(0)
    network = TAEHV("taew2_1")
    kind: Any
    kind, _, chunk = mode.partition(" ")

    @torch.no_grad()
    def decode(latents: torch.Tensor) -> None:
        if kind == "streaming":
            stream = DecoderStream(network, chunk=int(chunk))
            for latent in latents.split(1, dim=2):
                stream.push(latent)  # the frames are used and forgotten
            stream.finish()
        else:
            network.decode(latents, kind, int(chunk or 1))

    count = (FRAMES - 1) // 4 + 1
    return functools.partial(decode, noise(1, 16, count, side // 8, side // 8)), functools.partial(
        decode, noise(1, 16, 2, 2, 2)
    )


def measure_decoding(mode: str, side: int, repeats: int) -> dict[str, float]:
    decode, warm_up = decoding(mode, side)
    warm_up()
    before, seconds = peak(), []
    for _ in range(repeats):
        start = time.perf_counter()
        decode()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "memory": peak() - before}


# ------------------------------------------------------------------------------------------------------------ training


def batches(side: int) -> Iterator[dict]:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (CLIPS, CLIP_FRAMES, 3, side, side), generator=generator, dtype=torch.uint8)
    latents = noise(CLIPS, 16, (CLIP_FRAMES - 1) // 4 + 1, side // 8, side // 8)
    for position in itertools.count(0, CLIPS):
        positions = torch.arange(position, position + CLIPS)
        yield {"frames": frames, "target_latents": latents, "position": positions, "bad": []}


def ours(side: int) -> tuple[Callable[[], None], Callable[[], tuple[int, int]]]:
    """One step of the experiment as the training command runs it, in fp32 and without accumulation or teacher."""
    overrides = ["experiment=taehv_seraena", "model=taehv", "size=full", f"paths.data={HERE}", f"paths.weights={HERE}"]
    settings = config.settings([*overrides, "model.network.weights=null", f"height={side}", f"width={side}"])
    loop = Loop(settings, NoEncoder(), batches(side), 1)

    def replay() -> tuple[int, int]:
        loss: Any = loop.loss
        ring = loss.seraena.replay
        held = ring.fakes.nbytes + ring.contexts.nbytes
        return held, held

    return loop, replay


class StraightforwardSeraena:
    """Seraena as its reference is written: a list of past fakes, coins, one update, one correction."""

    def __init__(self) -> None:
        self.discriminator = for_taehv("taecvx", GROUP)
        self.optimizer = torch.optim.AdamW(self.discriminator.parameters(), lr=3e-4, betas=(0.9, 0.99), fused=True)
        self.buffer: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, real: torch.Tensor, fake: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        self.buffer += [(f.clone(), c.clone()) for f, c in zip(fake, context, strict=True)]
        new = len(fake) // 2
        old = [self.buffer[i] for i in torch.randint(len(self.buffer), (len(fake) - new,)).tolist()]
        fakes = torch.cat([fake[:new], torch.stack([f for f, _ in old])])
        contexts = torch.cat([context[:new], torch.stack([c for _, c in old])])
        is_fake = torch.rand(len(fake), 1, 1, 1) < 0.5
        self.discriminator.train()
        scores = self.discriminator(torch.where(is_fake, fakes, real), torch.where(is_fake, contexts, context))
        F.mse_loss(scores, (2.0 * is_fake - 1).expand_as(scores)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

        self.discriminator.eval()
        delta = torch.zeros_like(fake).requires_grad_()
        with torch.no_grad():
            wanted = self.discriminator(real, context)
        difference = wanted - self.discriminator(fake + delta, context)
        (gradient,) = torch.autograd.grad(difference.square().mean(dim=(1, 2, 3)).sum(), delta)
        return -gradient / (gradient.std() + 1e-5)


def bare(side: int) -> tuple[Callable[[], None], Callable[[], tuple[int, int]]]:
    """The same step in a straightforward loop: same network, discriminator, optimizers, average; no vote, no guard."""
    torch.manual_seed(0)
    network, seraena = TAEHV("taecvx"), StraightforwardSeraena()
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 1000))
    stream = batches(side)

    def step() -> None:
        batch = next(stream)
        frames, latents = batch["frames"].float().div(255), batch["target_latents"]
        own = network.encode(frames)
        decoded = network.decode(latents, clamp=False)
        target, fake = frames[:, : decoded.shape[1]], decoded.detach()
        real_groups, fake_groups = (x.reshape(-1, 3 * GROUP, side, side) for x in (target, fake))
        context = latents.mean(dim=2).repeat_interleave(len(fake_groups) // CLIPS, dim=0)
        correction = seraena(real_groups, fake_groups, context).reshape(fake.shape)
        loss = F.mse_loss(decoded, target) + F.mse_loss(own, latents) + F.mse_loss(decoded, fake + correction)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(parameter, 1e-3)

    def replay() -> tuple[int, int]:
        slot = sum(tensor.nbytes for tensor in seraena.buffer[0])
        return slot * len(seraena.buffer), slot * SLOTS

    return step, replay


LOOPS = {"ours": ours, "bare": bare}


def measure_training(loop: str, side: int, steps: int) -> dict[str, float]:
    """MiB: the peak, what of it is the buffer of past fakes, and the buffer's size when it is full."""
    (step, replay), before = LOOPS[loop](side), peak()
    for _ in range(steps):
        step()
    distributed.close()
    held, full = replay()
    return {"memory": peak() - before, "held": held / 2**20, "full": full / 2**20}


# --------------------------------------------------------------------------------------------------------------- tables


def apart(**arguments: object) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", json.dumps(arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def decode_table(side: int, repeats: int, pairs: int) -> None:
    print(f"\ndecode {FRAMES} frames of {side}x{side}, taew2_1, {torch.get_num_threads()} threads")
    for mode in MODES:
        found = apart(what="decoding", mode=mode, side=side, repeats=repeats)
        print(f"  {mode:12} {FRAMES / found['seconds']:7.2f} frames/s  {found['memory']:6.0f} MiB", flush=True)
    parallel, _ = decoding("parallel", side)
    for mode in MODES[1 : 2 if pairs < 5 else 4]:
        ratio = paired(parallel, decoding(mode, side)[0], pairs, warmup=1)
        print(f"  speed of {mode} / parallel   {ratio}   wanted: >= 0.8", flush=True)


def training_table(side: int, pairs: int, steps: int) -> None:
    print(f"\ntraining step of taehv_seraena, {CLIPS}x{CLIP_FRAMES}x{side}x{side}, fp32, teacher's latents given")
    ratio = paired(ours(side)[0], bare(side)[0], pairs)
    print(f"  loop / bare   {ratio}   {verdict(ratio, 1.0)}", flush=True)
    found = {loop: apart(what="training", loop=loop, side=side, steps=steps) for loop in LOOPS}
    working = {loop: figures["memory"] - figures["held"] for loop, figures in found.items()}
    for title, add in (("without past fakes", 0), ("with all past fakes", 1)):
        loop, bare_loop = (working[name] + add * found[name]["full"] for name in ("ours", "bare"))
        print(f"  peak memory {title:20} loop {loop:.0f} MiB, bare {bare_loop:.0f} MiB, ratio {loop / bare_loop:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half the side, few repetitions, 64x64 training only")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        wanted = json.loads(arguments.measure)
        what = wanted.pop("what")
        print(json.dumps(measure_decoding(**wanted) if what == "decoding" else measure_training(**wanted)))
        return
    if arguments.quick:
        decode_table(side=64, repeats=2, pairs=3)
        training_table(side=64, pairs=6, steps=3)
    else:
        decode_table(side=128, repeats=2, pairs=6)
        training_table(side=64, pairs=12, steps=4)
        training_table(side=128, pairs=6, steps=4)
    distributed.close()


if __name__ == "__main__":
    main()
