"""How fast a tiny autoencoder is, in each of its modes and beside its teacher, and how much memory it takes."""

import copy
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vireo.errors import UserError
from vireo.models import teacher_lengths
from vireo.models.taehv import TAEHV, Mode
from vireo.models.teachers import DTYPES, Teacher
from vireo.peak_memory import peak_memory
from vireo.pixels import to_uint8
from vireo.randomness import Draws
from vireo.sampling.evaluation import Evaluated

MODES: tuple[Mode, ...] = ("parallel", "chunked", "sequential")
Call = Callable[[], object]


class AutoencoderSpeed:
    """Encoding and decoding of one clip: frames a second, peak memory, and the speed as a multiple of the teacher's.

    num_frames: the clip is the longest legal one that is not longer. height, width: of it, in pixels. Its content is
    noise, which costs what any other costs. chunk: of the mode "chunked". repeats: timed calls, of which the median
    counts; before them one call warms up and another one's memory is measured.
    teacher: whether the model's teacher is measured too, if it has one; then the tiny network computes in the teacher's
    dtype, so that the ratio is one of networks and not of number formats.
    """

    def __init__(
        self, num_frames: int, height: int, width: int, chunk: int = 4, repeats: int = 3, teacher: bool = True
    ) -> None:
        self.num_frames, self.height, self.width = num_frames, height, width
        self.chunk, self.repeats, self.teacher = chunk, repeats, teacher
        if min(num_frames, height, width, chunk, repeats) < 1:
            raise UserError(f"AutoencoderSpeed takes numbers from 1 on, got {vars(self)}")

    @torch.no_grad()
    def __call__(self, given: Evaluated) -> Sequence[Mapping[str, Any]]:
        """A row for each network, mode and direction; see `vireo.sampling.evaluation.Evaluation`.

        frames_per_s. peak_MiB: beyond what was held before (weights, the clip), see `peak_memory`; None if not
        measured. x_teacher: teacher's seconds over these. note: why a row has no figures.
        """
        network, encoder, device = given.network, given.encoder, given.device
        if not isinstance(network, TAEHV):
            raise UserError(f"AutoencoderSpeed measures a TAEHV, the network is a {type(network).__name__}")
        teacher = encoder if self.teacher and isinstance(encoder, Teacher) else None
        dtype = teacher.dtype if teacher else "fp32"
        count = teacher_lengths.longest(self.num_frames, network.variant.name, teacher.family if teacher else None)
        frames = Draws(given.stream.seed, [0], device).uniform("speed", count, 3, self.height, self.width)
        facts = {"clip": f"{count}x{self.height}x{self.width}", "dtype": dtype, "device": _name(device)}

        rows: list[dict[str, Any]] = []
        seconds_of_teacher: dict[str, float] = {}
        for mode, part, call in [
            *([] if teacher is None else _teachers(teacher, frames)),
            *_tinys(copy.deepcopy(network).to(DTYPES[dtype]), frames.to(DTYPES[dtype]), self.chunk),
        ]:
            name = "teacher" if mode == "its own" else "tiny"
            try:
                call()
                peak, seconds = peak_memory(call, device), _median_seconds(call, self.repeats, device)
            except torch.OutOfMemoryError:
                note = "does not fit into the device's memory: lower num_frames, height or width"
                figures: dict[str, Any] = {"frames_per_s": None, "peak_MiB": None, "x_teacher": None, "note": note}
            else:
                if name == "teacher":
                    seconds_of_teacher[part] = seconds
                figures = {
                    "frames_per_s": count / seconds,
                    "peak_MiB": None if peak is None else peak / 2**20,
                    "x_teacher": seconds_of_teacher[part] / seconds if part in seconds_of_teacher else None,
                    "note": "" if peak is not None else "memory is not measured on this system",
                }
            rows.append({"network": name, "mode": mode, "part": part, **facts, **figures})
        return rows


def _teachers(teacher: Teacher, frames: Tensor) -> list[tuple[str, str, Call]]:
    batch, draws = {"frames": to_uint8(frames, low=0.0)}, Draws("speed", [0], frames.device)
    # What is decoded is made at the first, untimed call, where it counts as one that may not fit.
    latents = functools.cache(lambda: teacher.condition(batch, draws)["target_latents"])
    encode = functools.partial(teacher.condition, batch, draws)
    return [("its own", "encode", encode), ("its own", "decode", lambda: teacher.decode(latents()))]


def _tinys(network: TAEHV, frames: Tensor, chunk: int) -> list[tuple[str, str, Call]]:
    latents = functools.cache(lambda: network.encode(frames, "sequential"))
    return [
        (mode, part, functools.partial(call, mode))
        for mode in MODES
        for part, call in (
            ("encode", lambda mode: network.encode(frames, mode, chunk)),
            ("decode", lambda mode: network.decode(latents(), mode, chunk)),
        )
    ]


def _median_seconds(call: Call, repeats: int, device: torch.device) -> float:
    times = []
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, threads: {torch.get_num_threads()}"
