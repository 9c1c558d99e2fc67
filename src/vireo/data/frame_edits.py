"""Twenty frames and an instruction give the next one: the clips of InstructPix2Pix for video."""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor

from vireo.data import edit_clips_arrow, edit_clips_conversion
from vireo.data.edit_clips import NUM_FRAMES, EditClip, Frame, Listing, list_raw, metadata_file
from vireo.data.listing import shortened
from vireo.data.source import Source, check_content, identify
from vireo.data.transforms import RESAMPLER, centre_box, crop_and_resize, random_box
from vireo.digests import bytes_digest, file_digest, file_digests
from vireo.errors import UserError
from vireo.randomness import Draws
from vireo.video_io import BadVideoError, decoder_version, read_image

logger = logging.getLogger(__name__)

INSIDE = "frame_edits"  # the folder below a root that holds other layouts too, as the mini world does


class FrameEdits:
    """Clips of 21 frames of which the last is to be made from those before it and a text.

    A sample is {"frames": [Source] * num_frames, oldest first, "target": Source, "prompt": str, "name": str such as
    "train/move_object/video_01", "task": str such as "move_object", "frame_numbers": [int] of frames and target}. A
    source loads uint8 RGB (3, height, width), so a loaded batch has "frames" (B, num_frames, 3, height, width) and
    "target" (B, 3, height, width).
    All 21 frames of a sample have one crop and one flip; the crop fills the frame, scaled up where the clip is small.
    Clips that are not complete or have no text are left out and reported.

    root: the raw layout (`vireo.data.edit_clips`), what `vireo prepare` or the published converter made of it
    (`vireo.data.edit_clips_arrow`), or a folder with either below `frame_edits/`.
    num_frames: of the condition, the last ones before the target: 20 for video, 1 for the image baseline, which so
    makes frame 20 from frame 19 of the same clips.
    split: "train" takes the split of this name, "validation" those that `held_out` names and the data have: both
    others by default. To judge on clips that chose no checkpoint, train with [val] and evaluate with [test].
    target_frame, condition_frames: numbers of frames, 0 to 20, in place of these: 1 and [0] are the published baseline.
    The condition's rise and end before the target, for a network that is shown its answer learns to copy it.
    crop: "center", the largest box; or "random" for training, of a scale drawn from `crop_scale`, shares of the
    largest box. crop_variants: how many random crops a clip has, the same in each epoch, so that they can be cached;
    null draws anew each time.
    flip: probability of a horizontal flip in training; 0 since instructions say left and right.
    frames_root: where the paths of a Hugging Face dataset start, if it has been moved away from its frames.
    max_bad_fraction: largest share of clips that turn out unreadable while training.
    allow_outside_root: whether the metadata may list clips outside `root`, or a dataset frames outside its folder of
    frames, as those of the published converter do, whose paths are absolute.
    Raises UserError if the arguments or the data cannot be used.
    """

    def __init__(
        self,
        root: str | Path,
        num_frames: int,
        height: int,
        width: int,
        *,
        split: Literal["train", "validation"] = "train",
        held_out: Sequence[str] = ("val", "test"),
        target_frame: int = NUM_FRAMES - 1,
        condition_frames: Sequence[int] | None = None,
        crop: Literal["center", "random"] = "center",
        crop_scale: tuple[float, float] = (0.8, 1.0),
        crop_variants: int | None = None,
        flip: float = 0.0,
        frames_root: str | Path | None = None,
        max_bad_fraction: float = 0.01,
        allow_outside_root: bool = False,
    ) -> None:
        self.root = _layout_folder(Path(root).expanduser())
        self.height, self.width = height, width
        self.split, self.held_out = split, list(held_out)
        self.target_frame = target_frame
        self.condition_frames = list(range(target_frame - num_frames, target_frame))
        if condition_frames is not None:
            self.condition_frames = list(condition_frames)
        self.crop, self.crop_scale, self.crop_variants = crop, (crop_scale[0], crop_scale[-1]), crop_variants
        self.flip = flip
        self.max_bad_fraction, self.allow_outside_root = max_bad_fraction, allow_outside_root
        self._check_arguments(num_frames)

        self.is_arrow = (self.root / edit_clips_arrow.MARKER).is_file()
        self.frames_root = None if frames_root is None else Path(frames_root).expanduser()
        self.listing = self._list()
        self.clips = self._chosen()
        self._known: dict[int, dict[str, list[str]]] = {}
        if self.listing.left_out and split == "train":  # once, not for each split
            left_out = shortened(self.listing.left_out)
            logger.warning("clips of %s that cannot be used are left out:\n%s", self.root, left_out)

    def __len__(self) -> int:
        """Number of clips of this split."""
        return len(self.clips)

    def sample(self, index: int, draws: Draws) -> dict[str, Any]:
        """One clip, undecoded (see the class). Draws "crop", "crop_variant" and "flip" where these are random; B is 1.

        Raises BadVideoError that names clip and frame if a picture cannot be read, here or when a source is loaded.
        """
        clip = self.clips[index]
        view = self._view(clip, draws)
        about = {"prompt": clip.prompt, "name": clip.name, "task": clip.task, "frame_numbers": self.frame_numbers}
        return {**self._sources(clip, view), **about}

    def sources(self, index: int) -> dict[str, list[Source | str]]:
        """The text, and every picture that this entry can ask for: one for each crop and flip, none if crops are drawn
        anew. The file system is asked again whether the pictures are the same."""
        clip = self.clips[index]
        self._known.pop(id(clip), None)
        found: dict[str, list[Source | str]] = {"prompt": [clip.prompt]}
        if self._is_random and self.crop_variants is None:
            return found
        found |= {"frames": [], "target": []}
        variants: Sequence[int | None] = range(self.crop_variants or 0) if self._is_random else [None]
        for variant, flipped in product(variants, self._flips):
            sources = self._sources(clip, self._fixed_view(clip, variant, flipped))
            found["frames"] += sources["frames"]
            found["target"].append(sources["target"])
        return found

    def describe(self) -> dict[str, Any]:
        """What this split holds, for people."""
        tasks = Counter(clip.task or "(no task)" for clip in self.clips)
        about: dict[str, Any] = {
            "root": str(self.root),
            "layout": "Hugging Face dataset" if self.is_arrow else f"raw, {metadata_file(self.root)}",
            "clips": len(self),
            "splits": ", ".join(f"{name} {count}" for name, count in Counter(c.split for c in self.clips).items()),
            "tasks": ", ".join(f"{task} {count}" for task, count in sorted(tasks.items())),
            "condition": f"{len(self.condition_frames)} frames, {_range(self.condition_frames)}",
            "target": f"frame {self.target_frame:02d}",
            "pictures": f"{self.height} x {self.width}, crop {self.crop}, flip {self.flip}",
            "left_out": self.listing.left_out,
        }
        if self.is_arrow:
            about["features"] = [f"{name}: {kind}" for name, kind in edit_clips_arrow.features().items()]
        return about

    def faults(self) -> list[str]:
        """What is wrong with the data of all splits, for people: missing splits, clips that are left out, are listed
        again or are in two splits, and edited pictures that are no longer those of the files they were made from."""
        wanted = ("train", "test") if self.is_arrow else ("train", *self.held_out)
        there = Counter(clip.split for clip in self.listing.clips)
        found = [f"no clip of the split {split} can be used" for split in wanted if not there[split]]
        found += self.listing.left_out
        times = Counter((clip.split, clip.frames[0].path) for clip in self.listing.clips)
        found += [
            f"{path.parent} is listed {count} times in {split}" for (split, path), count in times.items() if count > 1
        ]
        names = {clip.name: clip.split for clip in reversed(self.listing.clips)}
        for clip in self.listing.clips:
            if names[clip.name] != clip.split:
                found.append(f"{clip.name} is in {names[clip.name]} and in {clip.split}")
            target = clip.frames[-1]
            if self.is_arrow and target.path.is_file() and target.path.read_bytes() != target.read():
                found.append(f"{clip.name}: {target.path} has changed since the conversion: convert it anew")
        return found

    @staticmethod
    def prepare(
        root: str | Path,
        out: str | Path | None = None,
        strict: bool = False,
        resplit: float | None = None,
        seed: int = 0,
        allow_outside_root: bool = False,
    ) -> str:
        """For `vireo prepare`: convert the raw layout to a Hugging Face dataset (`edit_clips_conversion.convert`).

        out: default `<root>_arrow`. allow_outside_root: of the class. Returns what to tell. Raises UserError.
        """
        raw = _layout_folder(Path(root).expanduser())
        if (raw / edit_clips_arrow.MARKER).is_file():
            raise UserError(f"{raw} is a Hugging Face dataset already: give the raw layout, paths.data=…")
        folder = Path(out).expanduser() if out is not None else raw.with_name(f"{raw.name}_arrow")
        report = edit_clips_conversion.convert(
            raw, folder, strict=strict, resplit=resplit, seed=seed, allow_outside_root=allow_outside_root
        )
        return f"{report}\ndataset  {folder}\nto train on it: paths.data={folder}"

    @property
    def frame_numbers(self) -> list[int]:
        """Of the condition's frames, oldest first, and of the target."""
        return [*self.condition_frames, self.target_frame]

    @property
    def _is_random(self) -> bool:
        return self.crop == "random" and self.split == "train"

    @property
    def _flips(self) -> list[bool]:
        """The values that a flip coin of this split can show."""
        if self.split != "train" or self.flip == 0:
            return [False]
        return [True] if self.flip == 1 else [False, True]

    def _view(self, clip: EditClip, draws: Draws) -> "View":
        flipped = self._flips[-1]
        if len(self._flips) > 1:
            flipped = float(draws.uniform("flip")[0]) < self.flip
        if not self._is_random:
            return self._fixed_view(clip, None, flipped)
        if self.crop_variants is None:
            return View(draws, flipped, None)
        return self._fixed_view(clip, int(draws.integers("crop_variant", 0, self.crop_variants)[0]), flipped)

    def _fixed_view(self, clip: EditClip, variant: int | None, flipped: bool) -> "View":
        """The centre, or one of the clip's random crops."""
        about: dict[str, Any] = {"crop": "center", "height": self.height, "width": self.width, "flip": flipped}
        if variant is None:
            return View(None, flipped, about)
        about["crop"] = [*self.crop_scale, clip.name, variant]
        return View(Draws(("crop variants", clip.name), [variant]), flipped, about)

    def _sources(self, clip: EditClip, view: "View") -> dict[str, Any]:
        numbers = self.frame_numbers
        *frames, target = (
            Source(identity, partial(self._load, clip, number, view, identity), f"{clip.name}/{number:02d}")
            for number, identity in zip(numbers, self._identities(clip, view, numbers), strict=True)
        )
        return {"frames": frames, "target": target}

    def _identities(self, clip: EditClip, view: "View", numbers: Sequence[int]) -> Sequence[str | None]:
        """Of these frames, for which the file system is asked once, until `sources` asks again."""
        if view.about is None:
            return [None] * len(numbers)
        known = self._known.setdefault(id(clip), {})  # a name may come twice in published datasets
        key = json.dumps(view.about, sort_keys=True)
        if key not in known:
            decoding = {"decoder": decoder_version("pillow"), "resampler": RESAMPLER, **view.about}
            known[key] = [identify(content, **decoding) for content in _digests(clip, numbers)]
        return known[key]

    def _load(self, clip: EditClip, number: int, view: "View", identity: str | None) -> Tensor:
        """uint8 RGB (3, height, width)."""
        picture = _read(partial(_picture, clip.frames[number], identity), clip, number)[None]
        size = picture.shape[2:]
        divisor = math.gcd(self.height, self.width)
        shape = (self.height // divisor, self.width // divisor)  # not the target itself: a box may be smaller
        if view.draws is None:
            box = centre_box(size, shape)
        else:
            box = random_box(size, shape, self.crop_scale, view.draws)
        pixels = crop_and_resize(picture, box, self.height, self.width)[0]
        return (pixels.flip(-1) if view.flipped else pixels).contiguous()

    def _list(self) -> Listing:
        if self.is_arrow:
            return edit_clips_arrow.list_arrow(self.root, self.frames_root, self.allow_outside_root)
        if self.frames_root is not None:
            raise UserError(f"data.frames_root is for Hugging Face datasets, and {self.root} is none: leave it out")
        return list_raw(self.root, self.allow_outside_root)

    def _chosen(self) -> list[EditClip]:
        wanted = ["train"] if self.split == "train" else self.held_out
        clips = [clip for clip in self.listing.clips if clip.split in wanted]
        if not clips and self.split == "train":
            reasons = shortened(self.listing.left_out) or "  there is none in train/"
            raise UserError(f"no clip of {self.root} can be trained on:\n{reasons}")
        return clips

    def _check_arguments(self, num_frames: int) -> None:
        """Report every argument that makes no sense, together."""
        counts = {"num_frames": num_frames, "height": self.height, "width": self.width}
        if self.crop_variants is not None:
            counts["crop_variants"] = self.crop_variants
        problems = [f"{name} is {value}, expected at least 1" for name, value in counts.items() if value < 1]
        shares = {"flip": self.flip, "max_bad_fraction": self.max_bad_fraction}
        problems += [f"{name} is {value}, expected 0 to 1" for name, value in shares.items() if not 0 <= value <= 1]
        if not 0 <= self.target_frame < NUM_FRAMES:
            problems.append(f"target_frame is {self.target_frame}, expected 0 to {NUM_FRAMES - 1}")
        if len(self.condition_frames) != num_frames:
            problems.append(f"condition_frames are {self.condition_frames}, expected num_frames = {num_frames} of them")
        elif not _rises([-1, *self.frame_numbers]):
            problems.append(
                f"condition_frames are {self.condition_frames}, expected numbers from 0 that rise and end before the "
                f"frame to be made: {self.target_frame} frames are before target_frame={self.target_frame}"
            )
        if self.crop not in ("random", "center"):
            problems.append(f"crop is {self.crop!r}, expected random or center")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            problems.append(f"crop_scale is {self.crop_scale}, expected smallest and largest share, above 0 to 1")
        if self.crop_variants is not None and self.crop != "random":
            problems.append(f"crop_variants is {self.crop_variants}, which is for crop=random")
        if self.split not in ("train", "validation"):
            problems.append(f"split is {self.split!r}, expected train or validation")
        if not self.held_out or not set(self.held_out) <= {"val", "test"}:
            problems.append(f"held_out is {self.held_out}, expected val, test or both")
        if problems:
            raise UserError(f"data {self.root}:\n" + shortened(problems, limit=len(problems)))


class View(NamedTuple):
    """How the frames of one sample are shown. draws: of its random crop, None for the centre. about: all of this as
    JSON values, for the identity of a source; None for what is drawn anew each time."""

    draws: Draws | None
    flipped: bool
    about: dict[str, Any] | None


def _layout_folder(root: Path) -> Path:
    """`root` or the folder in it, whichever holds clips. Raises UserError if none does."""
    for folder in (root, root / INSIDE):
        if _has_clips(folder):
            return folder
    below = next((f": paths.data={folder} has them" for folder in sorted(root.glob("*")) if _has_clips(folder)), "")
    raise UserError(
        f"no edited clips in {root}: expected metadata.json or metadata.jsonl with train/, val/ and test/, or a "
        f"Hugging Face dataset ({edit_clips_arrow.MARKER}) with train/ and test/{below}"
    )


def _has_clips(folder: Path) -> bool:
    return (folder / edit_clips_arrow.MARKER).is_file() or bool(metadata_file(folder))


def _range(frames: Sequence[int]) -> str:
    """ "03 to 19", or all of them where some are left out."""
    if list(frames) == list(range(frames[0], frames[-1] + 1)) and len(frames) > 1:
        return f"{frames[0]:02d} to {frames[-1]:02d}"
    return ", ".join(f"{number:02d}" for number in frames)


def _rises(numbers: Sequence[int]) -> bool:
    """Whether each number is above the one before."""
    return all(earlier < later for earlier, later in pairwise(numbers))


T = TypeVar("T")


def _read(read: Callable[[], T], clip: EditClip, number: int) -> T:
    """What `read` gives; what is wrong with the frame is a BadVideoError that names its clip."""
    path, kind = clip.frames[number].path, BadVideoError
    try:
        return read()
    except BadVideoError as error:
        reason, kind = error.reason, type(error)
    except FileNotFoundError:
        reason = "there is no such picture"
    except OSError as error:
        reason = error.strerror or str(error)
    raise kind(path, f"frame {number:02d} of {clip.name}: {reason}")


def _picture(frame: Frame, identity: str | None) -> Tensor:
    """uint8 RGB (3, H, W) of the very bytes that the identity is about."""
    content = frame.read()
    check_content(identity, frame.path, content)
    return read_image(frame.path, content)


def _digests(clip: EditClip, numbers: Sequence[int]) -> list[str]:
    """Hashes of the bytes of these frames, all files in one go. Raises BadVideoError that names the frame."""
    frames = [clip.frames[number] for number in numbers]
    try:
        known = file_digests([frame.path for frame in frames if not frame.is_inside])
    except OSError:  # asked one by one, the frame is known
        return [_read(partial(_digest, clip.frames[number]), clip, number) for number in numbers]
    return [
        _read(partial(_digest, frame), clip, number) if frame.is_inside else known[str(frame.path)]
        for number, frame in zip(numbers, frames, strict=True)
    ]


def _digest(frame: Frame) -> str:
    """Of the frame's bytes, the same for a picture in a file of its own and inside another one."""
    if frame.is_inside:
        return bytes_digest(frame.read())
    return file_digest(frame.path)
