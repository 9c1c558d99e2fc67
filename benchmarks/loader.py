"""python benchmarks/loader.py [folder] [--pairs 30] [--workers 2]

What the dataset costs: clips per second of `vireo.data.clips.Clips` (random clip, random crop, resize, flip, colours)
against plain decord (the same clips, decoded and nothing else), each through a DataLoader of its own, alternating.
folder: videos to read; without it eight are generated (480x270, 60 frames). A CPU-sized run: add --pairs 5.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import decord
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from paired import at_least, paired
from vireo.data.clip_sampling import random_clip
from vireo.data.clips import Clips
from vireo.randomness import Draws
from vireo.video_io import write_video

FRAMES, SIDE = 9, 128  # of a clip
ROUND = 24  # clips
BOUND = 0.9  # share of plain decord's clips per second


class Augmented(Dataset):
    """Position p of the stream shows clip p mod n."""

    def __init__(self, clips: Clips) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return ROUND

    def __getitem__(self, position: int) -> torch.Tensor:
        return self.clips.sample(position % len(self.clips), Draws(0, [position]))["frames"]


class Plain(Augmented):
    """The same frames, decoded as decord's manual says; of them a corner, so that sending them costs the same."""

    def __getitem__(self, position: int) -> torch.Tensor:
        path = self.clips.entries[position % len(self.clips)].path
        reader = decord.VideoReader(str(path), num_threads=1)
        frames = reader.get_batch(random_clip(len(reader), FRAMES, self.clips.frame_step, Draws(0, [position])))
        return torch.from_numpy(frames.asnumpy()[:, :SIDE, :SIDE].transpose(0, 3, 1, 2).copy())


def epochs(dataset: Dataset, workers: int) -> Callable[[], None]:
    """One pass over the dataset; the workers stay, and wait idle between the passes."""
    loader = DataLoader(
        dataset, batch_size=4, num_workers=workers, persistent_workers=workers > 0, worker_init_fn=_one_thread
    )

    def epoch() -> None:
        for _ in loader:
            pass

    return epoch


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def cpu_seconds() -> float:
    """CPU time of this process and of its loader's workers, who are still alive (Linux; to 10 ms)."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = time.process_time()
    for child in Path("/proc/self/task").glob("*/children"):
        for pid in child.read_text().split():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / ticks  # user, system
    return total


def generate(folder: Path) -> None:
    """Eight videos of drifting blurred noise, which compress like film."""
    noise = np.random.default_rng(0)
    for number in range(8):
        coarse = torch.from_numpy(noise.integers(0, 256, (1, 3, 40, 64), np.uint8))
        picture = torch.nn.functional.interpolate(coarse, (400, 640), mode="bicubic", antialias=True)[0]
        shifts = [(number * k, (number + 3) * k) for k in range(60)]
        frames = torch.stack([picture.roll(shift, (1, 2))[:, :270, :480] for shift in shifts])
        write_video(folder / f"{number}.mp4", frames, 24)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", nargs="?")
    arguments.add_argument("--pairs", type=int, default=30)
    arguments.add_argument("--workers", type=int, default=2)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if given.folder is None:
            generate(Path(folder))
        clips = Clips(given.folder or folder, FRAMES, SIDE, SIDE, frame_step=(1, 3), flip=0.5, jitter=0.7, held_out=0)
        plain, augmented = epochs(Plain(clips), given.workers), epochs(Augmented(clips), given.workers)
        ratio = paired(plain, augmented, pairs=given.pairs, cpu_seconds=cpu_seconds)
    found = clips.describe()
    print(f"{found['clips']} videos of {found['width']}x{found['height']}, {given.workers} workers")
    print(f"plain decord {ROUND / ratio.seconds_a:.1f} clips/s, Clips {ROUND / ratio.seconds_b:.1f} clips/s")
    print(f"Clips / plain decord: {ratio}")
    print(at_least(BOUND, ratio.low, ratio.high))


if __name__ == "__main__":
    main()
