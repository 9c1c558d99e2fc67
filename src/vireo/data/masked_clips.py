"""Videos with holes, to learn what belongs into them: DAVIS, YouTube-VOS, or any other videos."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vireo.data.held_out import held_out_names
from vireo.data.listing import Entry, list_folder, shortened
from vireo.data.masks import MovingShapes, dilate, read_hole, wrong_number
from vireo.data.scan import scan
from vireo.data.source import Source, check_content, identify
from vireo.data.transforms import RESAMPLER, covering_size, crop_centre, resize
from vireo.data.vos_layouts import davis, davis_annotation, youtube_vos
from vireo.digests import file_digests
from vireo.errors import UserError
from vireo.randomness import Draws
from vireo.video_io import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    BadVideoError,
    VideoInfo,
    VideoReader,
    decoder_version,
    frame_files,
)

logger = logging.getLogger(__name__)

MULTIPLE = 8  # of pixels: what VAEs make one latent of
SOURCES = ("davis", "ytvos", "videos")
PROMPT = "clean background"


class MaskedClips:
    """Clips of successive frames with a hole that moves through them or stands still.

    A sample is {"frames": [Source] * num_frames, "masked_frames": Source, "hole": Source, "prompt": str, "name": str
    such as "davis/bear"}; a validation clip has "fps" too. They load uint8 RGB (3, H, W) each, RGB (T, 3, H, W) whose
    hole is black, and (T, 1, H, W), 1 = hole. Frames are decoded once for all three; holes are fresh at every sample,
    so only frames can be cached, each by itself, so that clips of any start share them.
    The hole is made at the video's own size, then all three are resized until they cover height x width, and cropped.

    davis, ytvos: roots in these layouts (`vireo.data.vos_layouts`); videos: a folder of any videos or folders of
    frames; null: not used. repeat: how often an epoch has each video of a source, once where nothing is said.
    mask: draws holes (num_frames, height, width, draws), as `vireo.data.masks.MovingShapes` does. masks: a folder with
    holes of these videos instead, `<name>/`, `<name>.png` or `<name>.mp4`; what it lacks is told, and drawn.
    split: "train"; "validation" gives the first frames of each held-out video, the same hole every time: DAVIS's
    annotation unless `annotations` is false, else one drawn by the video's name.
    dilation: pixels by which holes that are read are grown.
    held_out: a list of DAVIS by its name; names of videos; a share of all videos; or "all", to judge on all there are.
    prompt: what the text encoder reads for every clip. reverse: probability that a clip runs backwards.
    crop: "center"; or "none" for the whole picture, as published first: the shorter side becomes the smaller of height
    and width, sides are cut to multiples of 8, and masks are resized bilinearly (and split at half, where the published
    code keeps fractions at their edges). Then videos of several shapes need batch_size=1.
    validation_size: "native" leaves validation clips as large as they are; "crop" makes them as those of training.
    max_bad_fraction: largest share of videos that cannot be read, or whose masks are of another number or size; they
    are left out and reported.
    allow_outside_root: whether DAVIS's lists may name videos outside its folder of frames.
    Videos of fewer than num_frames frames are left out and counted. Raises UserError if nothing is left, or for what
    cannot be used.
    """

    def __init__(
        self,
        num_frames: int,
        height: int,
        width: int,
        *,
        davis: str | Path | None,
        ytvos: str | Path | None,
        videos: str | Path | None = None,
        mask: Any = None,
        repeat: Mapping[str, int] | None = None,
        masks: str | Path | None = None,
        split: Literal["train", "validation"] = "train",
        annotations: bool = True,
        dilation: int = 4,
        held_out: str | float | Sequence[str] = "val",
        prompt: str = PROMPT,
        reverse: float = 0.5,
        crop: Literal["center", "none"] = "center",
        validation_size: Literal["native", "crop"] = "native",
        max_bad_fraction: float = 0.01,
        allow_outside_root: bool = False,
    ) -> None:
        given = {"davis": davis, "ytvos": ytvos, "videos": videos}
        self.roots = {source: Path(root).expanduser() for source, root in given.items() if root is not None}
        self.num_frames, self.height, self.width = num_frames, height, width
        self.mask = MovingShapes() if mask is None else mask
        self.repeat = dict.fromkeys(SOURCES, 1) | dict(repeat or {})
        self.masks = None if masks is None else Path(masks).expanduser()
        self.split, self.annotations, self.dilation, self.held_out = split, annotations, dilation, held_out
        self.prompt, self.reverse, self.crop = prompt, reverse, crop
        self.validation_size, self.max_bad_fraction = validation_size, max_bad_fraction
        self.allow_outside_root = allow_outside_root
        self._check_arguments()

        entries = self._list()
        self.infos, self.bad = self._scan(entries)
        self._check_bad(len(entries))
        short = {name for name, info in self.infos.items() if info.num_frames < num_frames}
        usable = {name: entry for name, entry in entries.items() if name in self.infos and name not in short}
        self.too_short = Counter(_source(name) for name in short)
        self._report(usable)
        held_out_here = self._held_out(entries, set(usable))
        wanted = {name: entry for name, entry in usable.items() if (name in held_out_here) == (split == "validation")}
        holes = self._hole_files(usable, wanted)
        unsuited = self._unsuited(holes)
        self.bad |= unsuited
        self._check_bad(len(entries))
        wanted = {name: entry for name, entry in wanted.items() if name not in unsuited}
        if not wanted and split == "train" and held_out != "all":
            raise UserError(
                f"no video is left to train on: {len(usable)} of {len(entries)} have num_frames={num_frames} frames "
                f"({self._shorter()}), and held_out={held_out} takes these: lower num_frames or hold out others"
            )
        self.videos = wanted
        times = self.repeat if split == "train" else dict.fromkeys(SOURCES, 1)
        self.order = [name for name in wanted for _ in range(times[_source(name)])]
        self.holes = {name: holes[name] for name in wanted if name in holes}
        self._digests: dict[str, dict[Path, str]] = {}  # by video and file, in order

    def __len__(self) -> int:
        """Number of clips in an epoch: videos, repeated."""
        return len(self.order)

    def sample(self, index: int, draws: Draws) -> dict[str, Any]:
        """One clip, undecoded (see the class). Draws "clip", "reverse" and what the mask draws; B is 1.

        Raises BadVideoError if the video cannot be read, here or when a source is loaded.
        """
        name = self.order[index]
        info = self.infos[name]
        if self.split == "validation":
            numbers, draws = list(range(self.num_frames)), Draws(("validation", name), [0])
        else:
            start = int(draws.integers("clip", 0, info.num_frames - self.num_frames + 1)[0])
            numbers = list(range(start, start + self.num_frames))
            if float(draws.uniform("reverse")[0]) < self.reverse:
                numbers.reverse()
        clip = _Clip(
            partial(self._read, name, numbers),
            partial(self._hole, name, numbers, draws),
            self._size(info),
            "nearest-exact" if self.crop == "center" else "bilinear",
        )
        identities = self._identities(name, numbers)
        return {
            "frames": [
                Source(identity, partial(self._frame, name, number, identity, clip, place), f"{name}/{number}")
                for place, (number, identity) in enumerate(zip(numbers, identities, strict=True))
            ],
            "masked_frames": Source(None, clip.masked_frames, name),
            "hole": Source(None, clip.resized_hole, name),
            "prompt": self.prompt,
            "name": name,
            **({"fps": info.fps} if self.split == "validation" else {}),
        }

    def whole(self, index: int, num_frames: int | None = None) -> dict[str, Any]:
        """A whole video with its hole, or its first `num_frames` frames, decoded, as large as it is.

        A sample as that of a validation clip, but for length and size: both sides are cut to multiples of 8.
        """
        name = self.order[index]
        info = self.infos[name]
        numbers = list(range(min(info.num_frames, num_frames or info.num_frames)))
        frames, hole = self._read(name, numbers), self._hole(name, numbers, Draws(("validation", name), [0]))
        fit = _native(info)
        return {
            "frames": fit.pictures(frames),
            "masked_frames": fit.pictures(_blackened(frames, hole)),
            "hole": fit.hole(hole, "nearest-exact"),
            "prompt": self.prompt,
            "name": name,
            "fps": info.fps,
        }

    def sources(self, index: int) -> dict[str, list[Source | str]]:
        """The text, and every frame that a clip of this video can have. The file system is asked again for changes."""
        name = self.order[index]
        self._digests.pop(name, None)
        count = self.num_frames if self.split == "validation" else self.infos[name].num_frames
        numbers = list(range(count))
        frames: list[Source | str] = [
            Source(identity, partial(self._frame, name, number, identity), f"{name}/{number}")
            for number, identity in zip(numbers, self._identities(name, numbers), strict=True)
        ]
        return {"prompt": [self.prompt], "frames": frames}

    def describe(self) -> dict[str, Any]:
        """What this split holds, for people: a line for each source, videos and frames."""
        about: dict[str, Any] = {}
        for source, root in self.roots.items():
            infos = [self.infos[name] for name in self.videos if _source(name) == source]
            times = f", each {self.repeat[source]} times" if self.split == "train" and self.repeat[source] > 1 else ""
            short = f", {n} too short" if (n := self.too_short[source]) else ""
            frames = sum(info.num_frames for info in infos)
            about[source] = f"{len(infos)} videos, {frames} frames{times}{short} ({root})"
        size = f"{self.height} x {self.width}, crop {self.crop}"
        if self.split == "validation" and self.validation_size == "native":
            size = "as large as the videos"
        return about | {
            "clips": f"{len(self)} of {self.num_frames} frames",
            "pictures": size,
            "holes": f"{len(self.holes)} videos have theirs, {len(self.videos) - len(self.holes)} drawn ones",
            "bad": [f"{name}: {reason}" for name, reason in self.bad.items()],
        }

    @staticmethod
    def from_files(
        video: str,
        mask: str,
        dilation: int,
        prior: str | None = None,
        prompt: str = PROMPT,
        max_side: str | int = 960,
    ) -> dict[str, Any]:
        """For `vireo sample`: one whole video with its hole, as a sample, decoded; "has_truth" is False in it.

        video, mask: a video file or a folder of frames; the mask also one picture for all. prior: a video of the same
        length and, but for its scale, the same picture, with the hole already filled in some way, "prior_frames" of the
        sample. The longer side becomes at most `max_side` pixels, both are cut to multiples of 8. Raises UserError,
        also for a mask without a hole, or with nothing else.
        """
        longest = int(max_side) if str(max_side).isdecimal() else 0
        if longest < MULTIPLE or dilation < 0:
            raise UserError(
                f"max_side={max_side}, data.dilation={dilation}: whole numbers of pixels are expected, at least "
                f"{MULTIPLE} and 0"
            )
        path = Path(video).expanduser()
        frames, fps = _whole(path)
        own = frames.shape[2:]
        scale = min(1.0, longest / max(own))
        fit = _whole_picture([int(side * scale) for side in own])
        if not all(fit.crop):
            told = f", {_sides(fit.size)} with max_side={max_side}" if scale < 1 else ""
            raise UserError(f"video={video} is {_sides(own)} pixels{told}: at least {MULTIPLE}x{MULTIPLE} are needed")
        read = read_hole(Path(mask).expanduser(), range(len(frames)), len(frames))
        if read.shape[1:] != own:
            raise UserError(
                f"mask={mask} is {_sides(read.shape[1:])} pixels, the video {_sides(own)}: they have to be the same"
            )
        hole = dilate(read, dilation)
        if (resized := fit.hole(hole, "nearest-exact")).float().mean() in (0, 1):
            raise UserError(
                f"mask={mask} makes {resized.float().mean():.0%} of the video a hole: expected white where it is to be "
                "filled, black or transparent where it stays"
            )
        sample = {
            "frames": fit.pictures(frames),
            "masked_frames": fit.pictures(_blackened(frames, hole)),
            "hole": resized,
            "prompt": prompt,
            "name": path.stem,
            "fps": fps,
            "has_truth": False,
        }
        if prior is not None:
            filled, _ = _whole(Path(prior).expanduser())
            if len(filled) != len(frames):
                raise UserError(f"prior={prior} has {len(filled)} frames, the video {len(frames)}")
            (height, width), (own_height, own_width) = filled.shape[2:], own
            if abs(width * own_height - height * own_width) >= MULTIPLE * max(own):  # sides may be cut to multiples
                raise UserError(
                    f"prior={prior} is {_sides(filled.shape[2:])} pixels, the video {_sides(own)}: expected the same "
                    "picture, larger or smaller as a whole"
                )
            sample["prior_frames"] = fit.pictures(filled)
        return sample

    def _list(self) -> dict[str, Entry]:
        """All videos of all sources by name, those that are held out too."""
        if not self.roots:
            raise UserError("data: davis, ytvos and videos are all null: one of them has to name a folder")
        found: list[Entry] = []
        if "davis" in self.roots:
            found += self._davis("train")
            if isinstance(self.held_out, str) and self.held_out != "all":
                found += self._davis(self.held_out)
        if "ytvos" in self.roots:
            found += youtube_vos(self.roots["ytvos"])
        if "videos" in self.roots:
            found += [Entry(f"videos/{one.name}", one.path) for one in list_folder(self.roots["videos"])]
        return {entry.name: entry for entry in found}

    def _davis(self, image_set: str) -> list[Entry]:
        return davis(self.roots["davis"], image_set, self.allow_outside_root)

    def _scan(self, entries: Mapping[str, Entry]) -> tuple[dict[str, VideoInfo], dict[str, str]]:
        """The videos that can be read, and why the others cannot."""
        findings: dict[str, VideoInfo | str] = {}
        for source, root in self.roots.items():
            findings |= scan({name: one.path for name, one in entries.items() if _source(name) == source}, root)
        bad = {name: found for name, found in findings.items() if isinstance(found, str)}
        return {name: found for name, found in findings.items() if isinstance(found, VideoInfo)}, bad

    def _check_bad(self, videos: int) -> None:
        """Raises UserError if too many of so many videos are bad."""
        if len(self.bad) / videos > self.max_bad_fraction:
            reasons = shortened([f"{name}: {reason}" for name, reason in self.bad.items()])
            raise UserError(
                f"{len(self.bad)} of {videos} videos cannot be read, more than max_bad_fraction="
                f"{self.max_bad_fraction} allows:\n{reasons}\nmend, replace or remove them"
            )

    def _report(self, usable: Mapping[str, Entry]) -> None:
        if not usable:
            raise UserError(f"no video has num_frames={self.num_frames} frames ({self._shorter()}): lower it")
        if self.split == "train":  # once, not for each split
            for source, count in self.too_short.items():
                logger.warning("%d videos of %s have fewer than %d frames", count, source, self.num_frames)
            if self.bad:
                reasons = shortened([f"{name}: {reason}" for name, reason in self.bad.items()])
                logger.warning("videos that cannot be read are left out:\n%s", reasons)

    def _shorter(self) -> str:
        counts = [f"{source} {count}" for source, count in self.too_short.items()]
        return f"{', '.join(counts) or 'none'} are shorter"

    def _held_out(self, entries: Mapping[str, Entry], usable: set[str]) -> set[str]:
        rule = self.held_out
        if rule == "all":
            return usable
        if isinstance(rule, str):
            return {entry.name for entry in self._davis(rule)}
        if isinstance(rule, (int, float)):
            return held_out_names(usable, rule, Path())
        by_short = {name.partition("/")[2]: name for name in reversed(list(entries))}
        unknown = [name for name in rule if name not in entries and name not in by_short]
        if unknown:
            raise UserError(f"held_out names {', '.join(unknown)}, which no source has")
        return {by_short.get(name, name) for name in rule}

    def _hole_files(self, usable: Mapping[str, Entry], wanted: Mapping[str, Entry]) -> dict[str, Path]:
        """Where the holes of this split's videos can be read. Raises UserError for `masks` that are of no video."""
        found = {name: hole for name, entry in usable.items() if (hole := self._hole_file(entry)) is not None}
        if self.masks is not None:
            if not found:
                name = next(iter(usable)).partition("/")[2]
                there = ", ".join(sorted(path.name for path in self.masks.iterdir())[:5]) or "nothing"
                raise UserError(
                    f"masks={self.masks} has a mask of no video: expected names of videos, such as {name}/, "
                    f"{name}.png or {name}.mp4; there is {there}"
                )
            if lacking := [name for name in wanted if name not in found]:
                logger.warning(
                    "%d of %d videos (%s) have no mask in %s, so their holes are drawn:\n%s",
                    len(lacking), len(wanted), self.split, self.masks, shortened(lacking),
                )  # fmt: skip
        return {name: found[name] for name in wanted if name in found}

    def _unsuited(self, holes: Mapping[str, Path]) -> dict[str, str]:
        """The videos whose masks do not suit them, and why; only headers and one picture of each are looked at."""
        root = self.masks or self.roots.get("davis", Path())
        by_kind: tuple[dict[str, Path], dict[str, Path]] = {}, {}  # folders and videos; pictures
        for path in holes.values():
            by_kind[path.suffix.lower() in IMAGE_SUFFIXES][path.relative_to(root).as_posix()] = path
        looked_at = scan(by_kind[False], root) | scan(by_kind[True], root, pictures=True)
        reasons = {}
        for name, path in holes.items():
            info, found = self.infos[name], looked_at[path.relative_to(root).as_posix()]
            if isinstance(found, str):
                reasons[name] = f"{path}: {found}"
            elif wrong := wrong_number(found.num_frames, info.num_frames):
                reasons[name] = f"{path}: {wrong}"
            elif (found.height, found.width) != (info.height, info.width):
                sizes = f"{found.width}x{found.height} pixels for {info.width}x{info.height}"
                reasons[name] = f"{path}: masks of {sizes}"
        if reasons:
            told = shortened([f"{name}: {reason}" for name, reason in reasons.items()])
            logger.warning("videos (%s) whose masks do not suit them are left out:\n%s", self.split, told)
        return reasons

    def _hole_file(self, entry: Entry) -> Path | None:
        """Where this video's hole can be read."""
        if self.masks is not None:
            name = entry.name.partition("/")[2]
            if entry.path.suffix.lower() in VIDEO_SUFFIXES:
                name = name.removesuffix(entry.path.suffix)
            endings = ("", *sorted(IMAGE_SUFFIXES), *sorted(VIDEO_SUFFIXES))
            return next((path for end in endings if (path := self.masks / f"{name}{end}").exists()), None)
        if self.split == "validation" and self.annotations and _source(entry.name) == "davis":
            return davis_annotation(self.roots["davis"], entry)
        return None

    def _size(self, info: VideoInfo) -> "_Fit":
        """How this split's pictures are made of a video's."""
        if self.split == "validation" and self.validation_size == "native":
            return _native(info)
        own = (info.height, info.width)
        if self.crop == "center":
            return _Fit(covering_size(own, (self.height, self.width)), (self.height, self.width))
        side = min(self.height, self.width)
        return _whole_picture(covering_size(own, (side, side)))

    def _read(self, name: str, numbers: Sequence[int]) -> Tensor:
        """uint8 RGB (T, 3, H, W) at the video's own size."""
        info = self.infos[name]
        with VideoReader(self.videos[name].path, info.decoder) as video:
            video.expect(info.num_frames)
            frames = video.get(numbers)
        if frames.shape[2:] != (info.height, info.width):
            found = "x".join(map(str, frames.shape[:1:-1]))
            raise BadVideoError(self.videos[name].path, f"a frame is {found} pixels, not {info.width}x{info.height}")
        return frames

    def _frame(self, name: str, number: int, identity: str, clip: "_Clip | None" = None, place: int = 0) -> Tensor:
        """uint8 RGB (3, height, width) of this split; of a clip that is decoded once, or by itself."""
        if clip is None:
            frame = self._size(self.infos[name]).pictures(self._read(name, [number]))[0]
        else:
            frame = clip.frame(place)
        files = list(self._digests[name])
        check_content(identity, files[number] if len(files) > 1 else files[0])
        return frame

    def _hole(self, name: str, numbers: Sequence[int], draws: Draws) -> Tensor:
        """uint8 (T, H, W) at the video's own size."""
        info = self.infos[name]
        if name not in self.holes:
            hole = self.mask(len(numbers), info.height, info.width, draws)
            return hole.flip(0) if numbers[0] > numbers[-1] else hole
        hole = dilate(read_hole(self.holes[name], numbers, info.num_frames), self.dilation)
        if hole.shape[1:] != (info.height, info.width):
            found = "x".join(map(str, hole.shape[:0:-1]))
            raise BadVideoError(self.holes[name], f"masks of {found} pixels for {info.width}x{info.height}")
        return hole

    def _identities(self, name: str, numbers: Sequence[int]) -> list[str]:
        """Of these frames; all of a video's are hashed at once, the first time."""
        path, info = self.videos[name].path, self.infos[name]
        is_folder = path.is_dir()
        if name not in self._digests:
            files = frame_files(path) if is_folder else [path]
            try:
                found = file_digests(files)
            except OSError as error:
                raise BadVideoError(path, error.strerror or str(error)) from error
            self._digests[name] = {file: found[str(file)] for file in files}
        digests, fit = list(self._digests[name].values()), self._size(info)
        about: dict[str, Any] = {"size": fit.size, "crop": fit.crop, "resampler": RESAMPLER}
        if not is_folder:
            decoder = decoder_version(info.decoder)
            return [identify(digests[0], decoder=decoder, frame=number, **about) for number in numbers]
        return [identify(digests[number], decoder=decoder_version("pillow"), **about) for number in numbers]

    def _check_arguments(self) -> None:
        """Report every argument that makes no sense, together."""
        counts = {"num_frames": self.num_frames, "height": self.height, "width": self.width}
        counts |= {f"repeat.{source}": times for source, times in self.repeat.items()}
        problems = [f"{name} is {value}, expected at least 1" for name, value in counts.items() if value < 1]
        if unknown := sorted(self.repeat.keys() - set(SOURCES)):
            problems.append(f"repeat names {', '.join(unknown)}, expected {', '.join(SOURCES)}")
        shares = {"reverse": self.reverse, "max_bad_fraction": self.max_bad_fraction}
        problems += [f"{name} is {value}, expected 0 to 1" for name, value in shares.items() if not 0 <= value <= 1]
        if self.dilation < 0:
            problems.append(f"dilation is {self.dilation}, expected 0 pixels or more")
        if self.height % MULTIPLE or self.width % MULTIPLE:
            problems.append(f"clips are {self.height} x {self.width}, expected multiples of {MULTIPLE}")
        choices = {"split": ("train", "validation"), "crop": ("center", "none"), "validation_size": ("native", "crop")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                problems.append(f"{name} is {getattr(self, name)!r}, expected {' or '.join(known)}")
        if isinstance(self.held_out, str) and self.held_out != "all" and "davis" not in self.roots:
            problems.append(f"held_out={self.held_out} is a list of DAVIS, which is off: give a share such as 0.1")
        if self.masks is not None and not self.masks.is_dir():
            problems.append(f"masks is {self.masks}, expected a folder with masks of the videos")
        if problems:
            raise UserError("data cannot be used:\n" + shortened(problems, limit=len(problems)))


class _Fit(NamedTuple):
    """How pictures are made of a video's: resized to `size`, then the middle of size `crop`; both (height, width)."""

    size: tuple[int, ...]
    crop: tuple[int, ...]

    def pictures(self, frames: Tensor) -> Tensor:
        """uint8 (T, 3, H, W) -> (T, 3, *crop)."""
        return crop_centre(resize(frames, self.size[0], self.size[1], "stretch"), *self.crop).contiguous()

    def hole(self, hole: Tensor, mode: str) -> Tensor:
        """uint8 (T, H, W) -> (T, 1, *crop). mode: "nearest-exact", or "bilinear", where half and more is hole."""
        if mode == "bilinear":
            soft = resize(255 * hole[:, None], self.size[0], self.size[1], "stretch")
            return crop_centre((soft >= 128).to(torch.uint8), *self.crop).contiguous()
        return crop_centre(interpolate(hole[:, None], self.size, mode=mode), *self.crop).contiguous()


def _native(info: VideoInfo) -> _Fit:
    return _whole_picture((info.height, info.width))


def _whole_picture(size: Sequence[int]) -> _Fit:
    """Resized and then only cut to multiples of 8."""
    return _Fit(tuple(size), tuple(side // MULTIPLE * MULTIPLE for side in size))


class _Clip:
    """One clip at its video's own size, read and given a hole once, whichever of its three forms is asked for first."""

    def __init__(self, read: Any, make_hole: Any, fit: _Fit, mode: str) -> None:
        self.read, self.make_hole, self.fit, self.mode = read, make_hole, fit, mode

    @cached_property
    def pictures(self) -> Tensor:
        return self.read()

    @cached_property
    def hole(self) -> Tensor:
        return self.make_hole()

    def frame(self, place: int) -> Tensor:
        return self.fit.pictures(self.pictures[place : place + 1])[0]

    def masked_frames(self) -> Tensor:
        return self.fit.pictures(_blackened(self.pictures, self.hole))

    def resized_hole(self) -> Tensor:
        return self.fit.hole(self.hole, self.mode)


def _blackened(frames: Tensor, hole: Tensor) -> Tensor:
    """Frames (T, 3, H, W) that are black in the hole (T, H, W); their memory stays channels-last, where it is."""
    return (frames.permute(0, 2, 3, 1) * (1 - hole)[..., None]).permute(0, 3, 1, 2)


def _whole(path: Path) -> tuple[Tensor, float]:
    """All frames of a video, and how many it has a second."""
    with VideoReader(path) as video:
        return video.get(range(len(video))), video.fps


def _sides(size: Sequence[int]) -> str:
    """(height, width) as people write it."""
    return f"{size[1]}x{size[0]}"


def _source(name: str) -> str:
    return name.partition("/")[0]
