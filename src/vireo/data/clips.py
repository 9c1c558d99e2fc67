"""Clips of videos, cropped and augmented: for autoencoders, and for all that learns from videos alone."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from vireo.data.clip_sampling import middle_clip, random_clip
from vireo.data.held_out import held_out_names
from vireo.data.listing import Entry, list_annotation, list_folder, shortened
from vireo.data.scan import scan
from vireo.data.source import Source
from vireo.data.transforms import ColorJitter, centre_box, crop_and_resize, random_box, random_jitter
from vireo.errors import UserError
from vireo.randomness import Draws
from vireo.video_io import VideoInfo, VideoReader

logger = logging.getLogger(__name__)


class Clips:
    """One clip of `num_frames` frames from each video below a folder or in an annotation file.

    A sample is {"frames": uint8 RGB (T, 3, height, width), "name": str, "text": str if the annotation has it}, that of
    a validation clip has "fps" too: its frames a second, 0 if the file does not say.
    A training clip has a random frame step, start, crop, flip and colours, all the same for its frames and all from
    `draws`. A validation clip is the middle of its video, its largest centre crop, unchanged in every other way.
    All videos are looked at when the dataset is made, and again only when they change (`vireo.data.scan`).

    root: folder of videos (subfolders included) or, if it holds none, of folders of frames.
    num_frames, height, width: of every clip. Videos are scaled down, never up: small ones are reflected at the border.
    split: "train", or "validation" for the held-out clips; the latter is empty if a single clip is all there is.
    annotations: JSON file that lists the clips (`vireo.data.listing`); as given, or below `root`.
    held_out: which clips are held out: a fraction, a folder in `root`, or a list file (`vireo.data.held_out`).
    frame_step: smallest and largest distance of a clip's frames in the video; validation takes the smallest.
    sizes: sides of square training clips in place of height and width; one is drawn for all samples of a step.
    crop: "random", or "center" for the largest centre crop. crop_scale: smallest and largest share of the largest box.
    flip: probability of a horizontal flip. jitter: probability of changed colours, jitter_strength: by how much
    (brightness, contrast, saturation, hue). Both are off unless asked for, since they contradict captions ("left",
    "red"); the published TAEHV recipe has 0.5 and 0.7.
    min_frames: videos with fewer are left out, by default those with less than `num_frames`; a video that is long
    enough for this but not for its clip holds its last frame.
    max_bad_fraction: largest share of videos that cannot be read; they are left out and reported.
    allow_outside_root: whether an annotation may list files that do not lie in `root`.
    Raises UserError if the arguments, the folder or the annotation cannot be used, or if too many videos are bad.
    """

    def __init__(
        self,
        root: str | Path,
        num_frames: int,
        height: int,
        width: int,
        *,
        split: Literal["train", "validation"] = "train",
        annotations: str | Path | None = None,
        held_out: float | str = 0.1,
        frame_step: tuple[int, int] = (1, 1),
        sizes: Sequence[int] | None = None,
        crop: Literal["random", "center"] = "random",
        crop_scale: tuple[float, float] = (0.8, 1.0),
        flip: float = 0.0,
        jitter: float = 0.0,
        jitter_strength: tuple[float, float, float, float] = ColorJitter(),
        min_frames: int | None = None,
        max_bad_fraction: float = 0.01,
        allow_outside_root: bool = False,
    ) -> None:
        self.root = Path(root).expanduser()
        self.num_frames, self.height, self.width = num_frames, height, width
        self.split = split
        self.frame_step = (frame_step[0], frame_step[-1])
        self.sizes = list(sizes) if sizes is not None else None
        self.crop, self.crop_scale = crop, (crop_scale[0], crop_scale[-1])
        self.flip, self.jitter, self.jitter_strength = flip, jitter, ColorJitter(*jitter_strength)
        self.min_frames = num_frames if min_frames is None else min_frames
        self.max_bad_fraction = max_bad_fraction
        self._check_arguments(held_out)

        entries = self._list(annotations, allow_outside_root)
        findings = scan({entry.name: entry.path for entry in entries}, self.root)
        self.infos = {name: found for name, found in findings.items() if isinstance(found, VideoInfo)}
        self.bad = {name: found for name, found in findings.items() if isinstance(found, str)}
        self.too_short = {name for name, info in self.infos.items() if info.num_frames < self.min_frames}
        usable = self._usable(entries)
        unusable = {*self.bad, *self.too_short}
        self.held_out = held_out_names({entry.name for entry in usable}, held_out, self.root, unusable)
        self.entries = [entry for entry in usable if (entry.name in self.held_out) == (split == "validation")]

    def __len__(self) -> int:
        """Number of clips of this split."""
        return len(self.entries)

    def sample(self, index: int, draws: Draws | None = None) -> dict[str, Any]:
        """One clip (see the class). draws: one position; a validation clip needs none.

        Draws "clip", "crop", "flip", "jitter", "color_jitter" and, once per step, "size". Raises BadVideoError if the
        video cannot be read.
        """
        entry = self.entries[index]
        if self.split == "validation":
            frames = self._middle(entry, self.num_frames)
            _, _, *size = frames.shape
            box = centre_box(size, (self.height, self.width))
            return self._with_facts(entry, crop_and_resize(frames, box, self.height, self.width))
        if draws is None:
            raise TypeError("a training clip is random: sample(index, draws)")
        return {"frames": self._random(entry, draws).contiguous(), **_naming(entry)}

    def whole(self, index: int, num_frames: int, multiple: int = 1) -> dict[str, Any]:
        """The middle of a video at its own size, to see what a network does beyond the crops that it learns from.

        A sample as that of a validation clip, but for the size: nothing is scaled, only the borders are cut, so that
        both sides are multiples of `multiple`. num_frames: at most `longest(index)`, else the last frame is held.
        Raises UserError if the picture is smaller than `multiple`, BadVideoError if the video cannot be read.
        """
        entry = self.entries[index]
        frames = self._middle(entry, num_frames)
        _, _, *size = frames.shape
        height, width = (side // multiple * multiple for side in size)
        if not height or not width:
            raise UserError(f"{entry.name} has {size[0]}x{size[1]} pixels, at least {multiple}x{multiple} are needed")
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        return self._with_facts(entry, frames[:, :, top : top + height, left : left + width])

    def longest(self, index: int) -> int:
        """Frames that a clip of this video can have, every `frame_step[0]`-th from its first to its last."""
        return (self.infos[self.entries[index].name].num_frames - 1) // self.frame_step[0] + 1

    def sources(self, index: int) -> dict[str, list[Source]]:
        """Nothing can be cached: crops are random."""
        return {}

    def describe(self) -> dict[str, Any]:
        """What this split holds, for people: numbers, and lists of lines."""
        infos = [self.infos[entry.name] for entry in self.entries]
        frames = sum(info.num_frames for info in infos)
        seconds = sum(info.num_frames / info.fps for info in infos if info.fps)
        return {
            "root": str(self.root),
            "clips": len(self),
            "frames": frames,
            "hours": round(seconds / 3600, 3),
            "fps": _range([round(info.fps, 2) for info in infos]),
            "height": _range([info.height for info in infos]),
            "width": _range([info.width for info in infos]),
            "held_out": sorted(self.held_out),
            "bad": [f"{name}: {reason}" for name, reason in self.bad.items()],
            "too_short": [self._shortness(name) for name in sorted(self.too_short)],
        }

    def _middle(self, entry: Entry, num_frames: int) -> Tensor:
        with VideoReader(entry.path, self.infos[entry.name].decoder) as video:
            video.expect(self.infos[entry.name].num_frames)
            return video.get(middle_clip(len(video), num_frames, self.frame_step[0]))

    def _with_facts(self, entry: Entry, frames: Tensor) -> dict[str, Any]:
        fps = self.infos[entry.name].fps / self.frame_step[0]
        return {"frames": frames.contiguous(), **_naming(entry), "fps": fps}

    def _random(self, entry: Entry, draws: Draws) -> Tensor:
        height, width = self.height, self.width
        if self.sizes:
            height = width = self.sizes[draws.once_integer("size", 0, len(self.sizes))]
        with VideoReader(entry.path, self.infos[entry.name].decoder) as video:
            video.expect(self.infos[entry.name].num_frames)
            frames = video.get(random_clip(len(video), self.num_frames, self.frame_step, draws))
        _, _, *size = frames.shape
        if self.crop == "random":
            box = random_box(size, (height, width), self.crop_scale, draws)
        else:
            box = centre_box(size, (height, width))
        frames = crop_and_resize(frames, box, height, width)
        if self.flip and float(draws.uniform("flip")[0]) < self.flip:
            frames = frames.flip(-1)
        if self.jitter and float(draws.uniform("jitter")[0]) < self.jitter:
            frames = random_jitter(frames, self.jitter_strength, draws)
        return frames

    def _list(self, annotations: str | Path | None, allow_outside_root: bool) -> list[Entry]:
        if annotations is None:
            return list_folder(self.root)
        if not self.root.is_dir():
            raise UserError(f"there is no folder {self.root}: expected the one that the annotation's paths start from")
        given = Path(annotations).expanduser()
        return list_annotation(given if given.is_file() else self.root / given, self.root, allow_outside_root)

    def _usable(self, entries: list[Entry]) -> list[Entry]:
        """The entries that can be trained on. Raises UserError if too many are bad or none is left."""
        reasons = [f"{name}: {reason}" for name, reason in self.bad.items()]
        share = len(self.bad) / len(self.infos | self.bad)
        if share > self.max_bad_fraction:
            raise UserError(
                f"{len(self.bad)} of {len(self.infos | self.bad)} videos in {self.root} cannot be read, more than "
                f"max_bad_fraction={self.max_bad_fraction} allows:\n{shortened(reasons)}\nmend, replace or remove them"
            )
        if reasons and self.split == "train":  # once, not for each split
            logger.warning("videos of %s that cannot be read are left out:\n%s", self.root, shortened(reasons))
        short = [self._shortness(name) for name in sorted(self.too_short)]
        usable = [entry for entry in entries if entry.name not in self.bad and entry.name not in self.too_short]
        if not usable:
            raise UserError(
                f"no clip of {self.root} can be used:\n{shortened(reasons + short)}\nto use short ones, lower "
                "num_frames, or min_frames, which holds their last frame"
            )
        if short and self.split == "train":
            logger.warning("videos of %s that are too short are left out:\n%s", self.root, shortened(short))
        return usable

    def _shortness(self, name: str) -> str:
        return f"{name}: {self.infos[name].num_frames} frames, {self.min_frames} are needed"

    def _check_arguments(self, held_out: float | str) -> None:
        """Report every argument that makes no sense, together."""
        low, high = self.frame_step
        counts = {"num_frames": self.num_frames, "min_frames": self.min_frames}
        counts |= {"height": self.height, "width": self.width}
        counts |= {f"sizes[{place}]": size for place, size in enumerate(self.sizes or ())}
        shares = {"flip": self.flip, "jitter": self.jitter, "max_bad_fraction": self.max_bad_fraction}
        problems = [f"{name} is {value}, expected at least 1" for name, value in counts.items() if value < 1]
        problems += [f"{name} is {value}, expected 0 to 1" for name, value in shares.items() if not 0 <= value <= 1]
        if self.sizes == []:
            problems.append("sizes is empty, expected at least one, or null")
        if not 1 <= low <= high:
            problems.append(f"frame_step is ({low}, {high}), expected smallest and largest, from 1 on")
        if not 0 <= self.crop_scale[0] <= self.crop_scale[1] <= 1:
            problems.append(f"crop_scale is {self.crop_scale}, expected smallest and largest share, 0 to 1")
        if min(self.jitter_strength) < 0:
            problems.append(f"jitter_strength is {tuple(self.jitter_strength)}, expected nothing below 0")
        if self.crop not in ("random", "center"):
            problems.append(f"crop is {self.crop!r}, expected random or center")
        if self.split not in ("train", "validation"):
            problems.append(f"split is {self.split!r}, expected train or validation")
        if not isinstance(held_out, str) and not 0 <= held_out < 1:
            problems.append(f"held_out is {held_out}, expected a fraction below 1, a folder or a list file")
        if problems:
            raise UserError(f"data {self.root}:\n" + shortened(problems, limit=len(problems)))


def _naming(entry: Entry) -> dict[str, str]:
    return {"name": entry.name} if entry.text is None else {"name": entry.name, "text": entry.text}


def _range(values: Sequence[float]) -> str:
    """ "a" or "a to b"; empty without values."""
    ends = sorted({min(values), max(values)}) if values else []
    return " to ".join(str(end) for end in ends)
