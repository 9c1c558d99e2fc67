"""Captioned clips for text-to-video and image-to-video, in the layout of the CogVideoX fine-tuning recipe."""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from vireo.data import caption_lists, first_frames, transforms
from vireo.data.clip_sampling import Pad, fill_up, num_timed, strided_clip, timed_clip, uniform_clip
from vireo.data.held_out import held_out_names
from vireo.data.listing import shortened
from vireo.data.scan import scan
from vireo.data.source import Source, check_content, content_digest, identify
from vireo.data.transforms import RESAMPLER, Resize, filled_box, padded_size, resize
from vireo.errors import UserError
from vireo.randomness import Draws
from vireo.video_io import BadVideoError, VideoInfo, VideoReader, decoder_version, read_image

logger = logging.getLogger(__name__)

INSIDE = "captioned_clips"  # the folder below a root that holds other layouts too, as the mini world does
FEW = 25  # clips: the recipe's advice for a new concept or style is to have at least so many
DISTORTION = 1.05  # ratio of the aspect ratios from which stretching is told


class Bucket(NamedTuple):
    """The shape of a clip."""

    num_frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Clip:
    """One row of the lists. name: as videos.txt calls it. video, info: None where only the caption is there.

    image: the picture in images.txt. folder: number of the folder it comes from, of those that are mixed.
    """

    name: str
    prompt: str
    video: Path | None
    info: VideoInfo | None
    image: Path | None
    bucket: Bucket
    folder: int


class CaptionedClips:
    """Clips with a caption each, and perhaps the picture that they start from.

    A sample is {"frames": Source, "prompt": str, "name": str}, with `image` also {"image": Source}, and of a validation
    clip {"fps": float}: its frames a second as shown, 0 if unknown. The sources load uint8 RGB (T, 3, H, W) and
    (3, H, W). A validation folder without videos gives samples without "frames" and "fps".
    Files are looked at when the dataset is made; all that is wrong with lists and files is one UserError.

    root: folder of the lists (`vireo.data.caption_lists`), or one with such a folder in `captioned_clips/`.
    num_frames, height, width: of every clip, unless `buckets` are given; validation clips always have these.
    split: "train" or "validation", whose clips are those of the folder `validation` (below root, or any path; the same
        layout, in which only captions must be there), or else the share of root that `held_out` says
        (`vireo.data.held_out`).
    prompts, videos, images: names of the list files; null takes the usual ones. One that is absolute is root's, so the
        folder `validation` has the usual one.
    image: "first_frame" is that of the clip as shown, the very same pixels; "listed" is from the list of images, and so
        it is where a validation folder has no videos.
    mix: folders below root with their weights, {ships: 2, horses: 1}, in place of root itself: how often a sample comes
        from each, however many clips it has.
    id_token: is put before each caption that does not begin with it; validation_id_token: also of validation.
    frame_policy: "stride" takes every (length // num_frames)-th frame as the published loader does, "uniform" frames
        from the first to the last, "clip" consecutive ones, at `fps` frames a second if that is given.
    start: of a "clip": first, center or random, where validation takes the center; windows: how many random starts a
        clip has, the same in each epoch, so that they can be cached; null draws anew each time.
    pad: what becomes of clips that are too short: repeat_last, loop or error.
    resize: crop, pad or stretch, of clips and pictures by one resampler (`vireo.data.transforms.resize`).
    buckets: shapes [num_frames, height, width] of training clips. Each clip has the longest one that it fills, and of
        these the nearest aspect ratio. All samples of a step come from one bucket, drawn in proportion to its clips.
    empty_captions: whether a blank line in the prompts is a caption.
    max_bad_fraction: largest share of clips that turn out unreadable while training.
    allow_outside_root: whether lists may name files that do not lie in their folder.
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
        prompts: str | None = None,
        videos: str | None = None,
        images: str | None = None,
        image: Literal["none", "first_frame", "listed"] = "none",
        mix: Mapping[str, float] | None = None,
        validation: str | None = None,
        held_out: float | str = 0.1,
        id_token: str | None = None,
        validation_id_token: bool = True,
        frame_policy: Literal["stride", "uniform", "clip"] = "stride",
        fps: float | None = None,
        start: Literal["first", "center", "random"] = "first",
        windows: int | None = None,
        pad: Pad = "repeat_last",
        resize: Resize = "crop",
        buckets: Sequence[Sequence[int]] | None = None,
        empty_captions: bool = False,
        max_bad_fraction: float = 0.01,
        allow_outside_root: bool = False,
    ) -> None:
        self.root = _layout_folder(Path(root).expanduser(), prompts, mix)
        self.split, self.image = split, image
        self.names = {"prompts": prompts, "videos": videos, "images": images}
        self.empty_captions, self.max_bad_fraction = empty_captions, max_bad_fraction
        self.allow_outside_root = allow_outside_root
        self.frame_policy, self.fps, self.start, self.windows = frame_policy, fps, start, windows
        self.pad, self.resize = pad, resize
        self.mix = dict(mix or {})
        self.buckets = [Bucket(num_frames, height, width)]
        self._check_arguments(buckets, validation)
        if split == "validation":
            id_token = id_token if validation_id_token else None
            self.start = "center" if start == "random" else start
        elif buckets:
            self.buckets = [Bucket(*bucket) for bucket in buckets]
        self.id_token = id_token

        if split == "validation" and validation is not None:
            self.names = {kind: None if Path(name or "").is_absolute() else name for kind, name in self.names.items()}
            self.clips = self._read(self.root / Path(validation).expanduser(), 0, "")
        else:
            folders = list(self.mix) or [""]
            clips = [
                clip
                for number, folder in enumerate(folders)
                for clip in self._read(self.root / folder, number, f"{folder}/" if folder else "")
            ]
            held = set() if validation is not None else held_out_names({c.name for c in clips}, held_out, self.root)
            self.clips = [clip for clip in clips if (clip.name in held) == (split == "validation")]
        self.pools = self._pools()
        self.notes = self._notes()
        for note in self.notes if split == "train" else ():
            logger.warning("%s: %s", self.root, note)

    def __len__(self) -> int:
        """Number of clips of this split."""
        return len(self.clips)

    def sample(self, index: int, draws: Draws) -> dict[str, Any]:
        """One clip, undecoded (see the class); of several buckets or folders, one of those that are drawn.

        Draws, where these are random: "bucket" once per step, "folder", and "start" or "window"; B is 1.
        Raises BadVideoError if a file is gone, and where a source is loaded if it cannot be read.
        """
        clip = self._picked(index, draws)
        starts = self._starts(clip)
        window = int(draws.integers("window", 0, len(starts))[0]) if len(starts) > 1 else 0
        sources = self._sources(clip, starts[window] if starts else None, draws)
        found: dict[str, Any] = {**sources, "prompt": clip.prompt, "name": clip.name}
        if self.split == "validation" and clip.info is not None:
            found["fps"] = self._shown_fps(clip, self._indices(clip, 0.0))
        return found

    def sources(self, index: int) -> dict[str, list[Source | str]]:
        """The caption, the clip and the picture, of each of its windows; no clip where its start is drawn anew."""
        clip = self.clips[index]
        found: dict[str, list[Source | str]] = {"prompt": [clip.prompt]}
        for start in self._starts(clip):
            for field, source in self._sources(clip, start).items():
                known = {one.identity for one in found.setdefault(field, []) if isinstance(one, Source)}
                if source.identity not in known:
                    found[field].append(source)
        if self.image == "listed" and "image" not in found:
            found["image"] = [self._of_image(clip)]
        return found

    def describe(self) -> dict[str, Any]:
        """What this split holds, for people: numbers, and what is shown of each clip."""
        about: dict[str, Any] = {
            "root": str(self.root),
            "clips": len(self),
            **self._describe_videos(),
            "shown as": [
                f"{count} clips of {'x'.join(map(str, bucket))}"
                for bucket, count in sorted(Counter(clip.bucket for clip in self.clips).items())
            ],
            "frame policy": f"{self.frame_policy}, pad {self.pad}, resize {self.resize}",
            "image": self.image,
        }
        if self.mix:
            counts = Counter(clip.folder for clip in self.clips)
            about["mix"] = [
                f"{name}: weight {weight:g}, {counts[number]} clips"
                for number, (name, weight) in enumerate(self.mix.items())
            ]
        about["each clip"] = [f"{clip.name}: {self._coverage(clip)}" for clip in self.clips]
        if self.notes:
            about["notes"] = self.notes
        return about

    @staticmethod
    def prepare(
        root: str | Path,
        videos: str | None = None,
        prompts: str | None = None,
        mix: Mapping[str, float] | None = None,
        out: str | Path | None = None,
        allow_outside_root: bool = False,
    ) -> str:
        """For `vireo prepare`: the first frame of every clip as images/<name>.png, and images.txt.

        out: the folder of both, by default the lists' own. allow_outside_root: of the class. Returns what to tell.
        Raises UserError.
        """
        if mix:
            raise UserError("first frames are extracted of one folder at a time: data.mix=null paths.data=<folder>")
        folder = _layout_folder(Path(root).expanduser(), prompts, None)
        target = Path(out).expanduser() if out is not None else folder
        return first_frames.extract(folder, videos, target, allow_outside_root)

    @staticmethod
    def from_files(
        height: int,
        width: int,
        prompt: str,
        image: str | None = None,
        resize: Resize = "crop",
        id_token: str | None = None,
        validation_id_token: bool = True,
    ) -> dict[str, Any]:
        """For `vireo sample`: a sample without a clip, of a prompt and, for image-to-video, the file of a picture.

        Raises BadVideoError for a picture that cannot be read.
        """
        token = id_token if validation_id_token else None
        made: dict[str, Any] = {"prompt": _with_token(prompt, token), "name": prompt}
        if image is not None:
            picture = read_image(Path(image).expanduser())
            made["image"] = transforms.resize(picture[None], height, width, resize)[0]
        return made

    # ------------------------------------------------------------------ what a sample shows

    def _picked(self, index: int, draws: Draws) -> Clip:
        """The clip of an index; where buckets or folders are drawn, the one that stands at its place among those."""
        if len(self.pools) == 1:
            return self.clips[self._in_pool(self.pools[0], index)]
        buckets = list(dict.fromkeys(pool.bucket for pool in self.pools))
        weights = [sum(pool.weight for pool in self.pools if pool.bucket == bucket) for bucket in buckets]
        bucket = buckets[_chosen(weights, draws.once_uniform("bucket"))]
        pools = [pool for pool in self.pools if pool.bucket == bucket]
        pool = pools[_chosen([pool.weight for pool in pools], float(draws.uniform("folder")[0]))]
        return self.clips[self._in_pool(pool, index)]

    def _in_pool(self, pool: "Pool", index: int) -> int:
        return pool.clips[index * len(pool.clips) // len(self)]

    def _starts(self, clip: Clip) -> list[float]:
        """The shares of what is left over before a clip that it may start at, as far as they are fixed."""
        if self.start != "random" or self.frame_policy != "clip":
            return [0.5 if self.start == "center" else 0.0]
        seed = ("windows", clip.name)
        return [float(Draws(seed, [number]).uniform("start")[0]) for number in range(self.windows or 0)]

    def _indices(self, clip: Clip, start: float) -> list[int]:
        return fill_up(self._unpadded(clip, start), clip.bucket.num_frames, self.pad)

    def _unpadded(self, clip: Clip, start: float) -> list[int]:
        assert clip.info is not None
        length, num_frames = clip.info.num_frames, clip.bucket.num_frames
        match self.frame_policy:
            case "stride":
                return strided_clip(length, num_frames)
            case "uniform":
                return uniform_clip(length, num_frames)
            case "clip":
                return timed_clip(length, num_frames, self._step(clip.info), start)

    def _step(self, info: VideoInfo) -> float:
        return 1.0 if self.fps is None else info.fps / self.fps

    def _sources(self, clip: Clip, start: float | None, draws: Draws | None = None) -> dict[str, Source]:
        """start: None where it is to be drawn."""
        found = {}
        if clip.video is not None:
            is_fixed = start is not None
            if start is None:
                assert draws is not None
                start = float(draws.uniform("start")[0])
            indices = self._indices(clip, start)
            found["frames"] = self._of_video(clip, indices, is_fixed)
            if self.image == "first_frame":
                first = self._of_video(clip, indices[:1], is_fixed)
                found["image"] = Source(first.identity, lambda: first.load()[0], f"{clip.name}, frame {indices[0]}")
        if self.image == "listed":
            found["image"] = self._of_image(clip)
        return found

    def _of_video(self, clip: Clip, indices: list[int], is_fixed: bool) -> Source:
        assert clip.video is not None and clip.info is not None
        identity = None
        if is_fixed:
            identity = _identity(
                clip.video,
                decoder=decoder_version("pillow" if clip.video.is_dir() else clip.info.decoder),
                frames=indices,
                **self._decoding(clip),
            )
        return Source(identity, partial(self._load, clip, indices, identity), clip.name)

    def _of_image(self, clip: Clip) -> Source:
        assert clip.image is not None
        path, (_, height, width) = clip.image, clip.bucket
        identity = _identity(path, decoder=decoder_version("pillow"), **self._decoding(clip))

        def load() -> Tensor:
            try:
                content = path.read_bytes()
            except OSError as error:
                raise BadVideoError(path, error.strerror or str(error)) from error
            check_content(identity, path, content)
            return resize(read_image(path, content)[None], height, width, self.resize)[0]

        return Source(identity, load, clip.name)

    def _decoding(self, clip: Clip) -> dict[str, Any]:
        _, height, width = clip.bucket
        return {"height": height, "width": width, "resize": self.resize, "resampler": RESAMPLER}

    def _load(self, clip: Clip, indices: list[int], identity: str | None) -> Tensor:
        """uint8 RGB (T, 3, height, width), of the very content that the identity is about."""
        assert clip.video is not None and clip.info is not None
        _, height, width = clip.bucket
        with VideoReader(clip.video, clip.info.decoder) as video:
            if len(video) < clip.info.num_frames:
                check_content(identity, clip.video)  # so that a filling of the cache looks at it once more
            video.expect(clip.info.num_frames)
            frames = video.get(indices)
        check_content(identity, clip.video)
        return resize(frames, height, width, self.resize).contiguous()

    # ------------------------------------------------------------------ what there is

    def _read(self, folder: Path, number: int, prefix: str) -> list[Clip]:
        """The clips of one folder. Raises UserError with all that is wrong with it."""
        wanted = ["prompts", "videos", *(["images"] if self.image == "listed" else [])]
        names = {kind: self.names[kind] for kind in wanted}
        lists = caption_lists.read(folder, names, self.empty_captions, self.allow_outside_root)
        if self.split == "validation" and self.image == "first_frame" and "videos" not in lists.files:
            self.image = "listed"
            return self._read(folder, number, prefix)
        files, problems = lists.files, list(lists.problems)
        videos, images = files.get("videos"), files.get("images")
        if videos is None and self.split == "train":
            problems.append(f"there is no {caption_lists.ALIASES['videos'][0]}: expected one line for each caption")
        if images is None and self.image == "listed":
            advice = "vireo prepare makes it of the first frames; or take data.image=first_frame"
            problems.append(f"there is no {caption_lists.ALIASES['images'][0]}: {advice}")
        rows = range(min(len(file.lines) for file in files.values()))
        infos = _looked_at(videos, rows, folder, problems) if videos else {}
        if images:
            _looked_at(images, rows, folder, problems, pictures=True)
        clips = []
        for row in rows:
            if videos is not None and row not in infos:
                continue  # told above
            clip = Clip(
                name=prefix + (videos.lines[row] if videos else images.lines[row] if images else f"prompt {row + 1}"),
                prompt=self._caption(files["prompts"].lines[row]),
                video=videos.file(row) if videos else None,
                info=infos.get(row),
                image=images.file(row) if images else None,
                bucket=self._bucket(infos.get(row)),
                folder=number,
            )
            problems += self._clip_problems(clip, videos.place(row) if videos else "")
            clips.append(clip)
        if problems:
            told = shortened(problems, limit=30)
            raise UserError(f"{folder} cannot be used:\n{told}\nmend them, or take the lines out of all the lists")
        return clips

    def _clip_problems(self, clip: Clip, place: str) -> list[str]:
        """Why a clip that can be read does not suit the arguments."""
        if clip.info is None:
            return []
        if self.fps is not None and not clip.info.fps:
            return [f"{place}: {clip.name} does not say its frame rate, which data.fps={self.fps:g} needs"]
        found = len(self._unpadded(clip, 0.0))
        if self.pad == "error" and found < clip.bucket.num_frames:
            return [f"{place}: {clip.name} gives {found} frames, {clip.bucket.num_frames} are needed: data.pad=…"]
        return []

    def _caption(self, line: str) -> str:
        return _with_token(line, self.id_token)

    def _bucket(self, info: VideoInfo | None) -> Bucket:
        if info is None or len(self.buckets) == 1:
            return self.buckets[0]
        length = info.num_frames
        if self.frame_policy == "clip" and (self.fps is None or info.fps):
            length = num_timed(length, self._step(info))
        lengths = {bucket.num_frames for bucket in self.buckets}
        chosen = max((n for n in lengths if n <= length), default=min(lengths))

        def distance(bucket: Bucket) -> tuple[float, float]:
            aspect = math.log(info.height / info.width * bucket.width / bucket.height)
            area = math.log(info.height * info.width / (bucket.height * bucket.width))
            return round(abs(aspect), 6), abs(area)

        return min((b for b in self.buckets if b.num_frames == chosen), key=distance)

    def _pools(self) -> list["Pool"]:
        """The clips by bucket and folder; a single pool where nothing is drawn, as in validation."""
        if self.split == "validation" or (len(self.buckets) == 1 and not self.mix):
            return [Pool(self.buckets[0], 1.0, list(range(len(self.clips))))]
        members: dict[tuple[Bucket, int], list[int]] = {}
        for index, clip in enumerate(self.clips):
            members.setdefault((clip.bucket, clip.folder), []).append(index)
        sizes = Counter(clip.folder for clip in self.clips)
        shares = list(self.mix.values()) or [float(len(self.clips))]
        return [
            Pool(bucket, shares[folder] * len(some) / sizes[folder], some)
            for (bucket, folder), some in sorted(members.items())
        ]

    # ------------------------------------------------------------------ for people

    def _describe_videos(self) -> dict[str, Any]:
        infos = [clip.info for clip in self.clips if clip.info is not None]
        if not infos:
            return {"videos": "none, so nothing is scored"}
        return {
            "frames": _range([info.num_frames for info in infos]),
            "fps": _range([round(info.fps, 2) for info in infos]),
            "pictures": ", ".join(sorted({f"{info.height}x{info.width}" for info in infos})),
        }

    def _coverage(self, clip: Clip) -> str:
        """What is shown of a clip in time and space."""
        if clip.info is None:
            return "no video"
        info, bucket = clip.info, clip.bucket
        unpadded = self._unpadded(clip, (self._starts(clip) or [0.0])[0])
        first, last = unpadded[0], unpadded[-1]
        shown = f"frames {first} to {last} of {info.num_frames}"
        if info.fps:
            seconds = [f"{frame / info.fps:.2f}" for frame in (first, last, info.num_frames)]
            shown += f" ({seconds[0]} to {seconds[1]} of {seconds[2]} s)"
        if self.start == "random" and self.frame_policy == "clip":
            shown += ", at a random start"
        if len(unpadded) < bucket.num_frames:
            shown += f", {bucket.num_frames - len(unpadded)} frames padded"
        return f"{shown}; {self._resized(info, bucket)}"

    def _resized(self, info: VideoInfo, bucket: Bucket) -> str:
        size, target = (info.height, info.width), (bucket.height, bucket.width)
        said = f"{info.height}x{info.width} -> {bucket.height}x{bucket.width}"
        if self.resize == "crop":
            box = filled_box(size, target)
            cut = 1 - box.height * box.width / (info.height * info.width)
            return f"{said}, {cut:.0%} cropped" if cut >= 0.005 else said
        if self.resize == "pad":
            inside = padded_size(size, target)
            bars = 1 - inside[0] * inside[1] / (bucket.height * bucket.width)
            return f"{said}, {bars:.0%} black" if bars >= 0.005 else said
        return f"{said}, {_distortion(info, bucket):.2f} times wider" if _distortion(info, bucket) != 1 else said

    def _shown_fps(self, clip: Clip, indices: list[int]) -> float:
        assert clip.info is not None
        if self.frame_policy == "clip":
            return self.fps or clip.info.fps
        gaps = [b - a for a, b in pairwise(indices) if b > a]
        return clip.info.fps * len(gaps) / sum(gaps) if gaps else clip.info.fps

    def _notes(self) -> list[str]:
        """What may be meant, and is known to go wrong."""
        notes = []
        if twice := _repeated([clip.prompt for clip in self.clips]):
            notes.append(f"{len(twice)} captions come more than once, such as {twice[0]!r}")
        if twice := _repeated([str(clip.image) for clip in self.clips if clip.image is not None]):
            notes.append(f"{len(twice)} pictures come more than once, such as {twice[0]}")
        if self.split == "train" and 0 < len(self) < FEW:
            notes.append(f"{len(self)} clips: a new concept or style needs at least {FEW}")
        unused = [path for folder in self.mix or [""] for path in caption_lists.present(self.root / folder, "images")]
        if self.image == "first_frame" and self.split == "train" and unused:
            notes.append(
                f"{unused[0].relative_to(self.root)} is not read, since data.image=first_frame; listed reads it"
            )
        videos = [clip for clip in self.clips if clip.info is not None]
        if self.resize == "stretch":
            worst = max((_distortion(c.info, c.bucket) for c in videos if c.info), key=_unevenness, default=1.0)
            if _unevenness(worst) > DISTORTION:
                notes.append(f"data.resize=stretch makes pictures up to {worst:.2f} times wider; crop distorts nothing")
        short = [c.name for c in videos if len(self._unpadded(c, 0.0)) < c.bucket.num_frames]
        if short:
            notes.append(f"{len(short)} clips are too short and padded (data.pad={self.pad}), such as {short[0]}")
        return notes

    def _check_arguments(self, buckets: Sequence[Sequence[int]] | None, validation: str | None) -> None:
        """Report every argument that makes no sense, together."""
        shapes: dict[str, Sequence[int]] = {"num_frames, height, width": self.buckets[0]}
        shapes |= {f"buckets[{place}]": tuple(bucket) for place, bucket in enumerate(buckets or ())}
        problems = [
            f"{name} is {list(shape)}, expected three numbers, at least 1"
            for name, shape in shapes.items()
            if len(shape) != 3 or min(shape) < 1
        ]
        if buckets is not None and not buckets:
            problems.append("buckets is empty, expected at least one, or null")
        choices = {
            "split": (self.split, ("train", "validation")),
            "image": (self.image, ("none", "first_frame", "listed")),
            "frame_policy": (self.frame_policy, ("stride", "uniform", "clip")),
            "start": (self.start, ("first", "center", "random")),
            "pad": (self.pad, ("repeat_last", "loop", "error")),
            "resize": (self.resize, ("crop", "pad", "stretch")),
        }
        problems += [
            f"{name} is {value!r}, expected {', '.join(known[:-1])} or {known[-1]}"
            for name, (value, known) in choices.items()
            if value not in known
        ]
        if self.frame_policy != "clip" and (self.fps is not None or self.start != "first"):
            problems.append(f"fps and start are for frame_policy=clip, which is {self.frame_policy}")
        if self.fps is not None and self.fps <= 0:
            problems.append(f"fps is {self.fps}, expected more than 0")
        if self.windows is not None and (self.start != "random" or self.windows < 1):
            problems.append(f"windows is {self.windows}, expected at least 1, and start=random")
        # First frames leave one use for a list: a validation folder that has no videos.
        if self.names["images"] and not (self.image == "listed" or (self.image == "first_frame" and validation)):
            problems.append(f"images={self.names['images']} is read with image=listed alone, which is {self.image}")
        if not 0 <= self.max_bad_fraction <= 1:
            problems.append(f"max_bad_fraction is {self.max_bad_fraction}, expected 0 to 1")
        problems += [
            f"mix.{name} is {weight}, expected more than 0" for name, weight in self.mix.items() if not weight > 0
        ]
        if problems:
            raise UserError(f"data {self.root}:\n" + shortened(problems, limit=len(problems)))


class Pool(NamedTuple):
    """Clips of one shape from one folder, by index. weight: how often one is drawn, relative to other pools."""

    bucket: Bucket
    weight: float
    clips: list[int]


def _looked_at(
    file: caption_lists.ListFile, rows: Sequence[int], folder: Path, problems: list[str], pictures: bool = False
) -> dict[int, VideoInfo]:
    """What the files of these rows are like, where they are there; `problems` gets those that cannot be read."""
    there = {row: file.file(row) for row in rows if file.lines[row] and file.file(row).exists()}
    findings = scan({file.lines[row]: path for row, path in there.items()}, folder, pictures)
    infos = {}
    for row in there:
        found = findings[file.lines[row]]
        if isinstance(found, str):
            problems.append(f"{file.place(row)}: {file.lines[row]}: {found}")
        else:
            infos[row] = found
    return infos


def _with_token(caption: str, id_token: str | None) -> str:
    if id_token is None or caption == id_token or caption.startswith(f"{id_token} "):
        return caption
    return f"{id_token} {caption}".rstrip()


def _repeated(values: Sequence[str]) -> list[str]:
    return [value for value, count in Counter(values).items() if count > 1]


def _chosen(weights: Sequence[float], u: float) -> int:
    """The place whose part of the sum of weights holds the share u in [0, 1)."""
    left = u * sum(weights)
    for place, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return place
    return len(weights) - 1


def _identity(path: Path, **decoding: Any) -> str:
    """Raises BadVideoError if the file has gone."""
    try:
        return identify(content_digest(path), **decoding)
    except OSError as error:
        raise BadVideoError(path, error.strerror or str(error)) from error


def _layout_folder(root: Path, prompts: str | None, mix: Mapping[str, float] | None) -> Path:
    """`root`, or the folder in it where only that one has captions."""

    def suits(folder: Path) -> bool:
        if mix:
            return all((folder / name).is_dir() for name in mix)
        names = [prompts] if prompts is not None else caption_lists.ALIASES["prompts"]
        return any((folder / name).is_file() for name in names)

    return root / INSIDE if suits(root / INSIDE) and not suits(root) else root


def _distortion(info: VideoInfo, bucket: Bucket) -> float:
    """How many times wider pictures become, relative to their height, when they are stretched."""
    return round(bucket.width / info.width * info.height / bucket.height, 3)


def _unevenness(ratio: float) -> float:
    return max(ratio, 1 / ratio)


def _range(values: Sequence[float]) -> str:
    """ "a" or "a to b"; empty without values."""
    ends = sorted({min(values), max(values)}) if values else []
    return " to ".join(str(end) for end in ends)
