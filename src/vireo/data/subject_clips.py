"""A subject's picture and a caption give the clip that the subject was cut from: OpenS2V-5M's layout."""

import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vireo.data import subject_pairs, subject_parts
from vireo.data.clip_sampling import spread_clip
from vireo.data.json_index import hashed
from vireo.data.listing import shortened
from vireo.data.references import Augmentation, Background, blank, letterbox, read_cutout
from vireo.data.source import Source, check_content, identify
from vireo.data.subject_annotations import Subject, cluster
from vireo.data.subject_choice import SELECTIONS, Chosen, Filters, Selection, choose, is_wanted, suits
from vireo.data.subject_pairs import SubjectPairs, subject_of
from vireo.data.subject_parts import Clip, below, find_parts, named
from vireo.data.subject_references import Picture, Reference, Shown
from vireo.data.transforms import RESAMPLER, Box, covering_size, crop_and_resize, crop_centre
from vireo.errors import UserError
from vireo.randomness import Draws
from vireo.video_io import BadVideoError, VideoReader

logger = logging.getLogger(__name__)

CLIP_SIDE = 512  # pixels of a reference before the image encoder's own processor
LOOKED_AT = 200  # clips that are looked at where looking at all would take hours


class Partner(NamedTuple):
    """A subject in another clip."""

    clip: Clip
    subject: Subject


class SubjectClips:
    """Clips with a caption and pictures of the subjects in them.

    A sample is {"frames": Source, "references": [Source] * R, "clip_references": [Source] * R, "reference_mask": bool
    (R,), "prompt": str, "name": "<part>/<key>"}, R = max_subjects_per_sample, and of a validation clip {"fps": float},
    0 if unknown. They load uint8 RGB (T, 3, height, width), (3, height, width) and (3, 512, 512); the last two show the
    same subject, whole, on white. Missing references are white, and False in the mask. With `subject_mask` there is
    also {"subject_mask": uint8 (1, 1, height, width)}, 1 where the references are in the annotated frame.
    A clip without a subject that suits has its whole annotated frame as the reference.

    root: of OpenS2V-5M (`Jsons/mask_and_bbox/<part>.json`, `Videos/<part>/`) or its demonstration (`demo_result/`), or
        a folder with either in `subject_clips/`. annotations, videos: files and folders of other places, below root or
        not, as many of the one as of the other. The files are indexed once (`vireo.data.json_index`).
    split: "train" or "validation"; held_out: a share of the source videos, so that clips of one are not in both; a file
        with a name a line; or "same", to train and to validate on all there is, as one does to overfit a clip.
        Validation always shows the middle of a clip and the same subjects.
    sample_stride: frames of the video from one to the next; target_fps: frames a second instead.
    windows: how many starts a training clip has, the same in each epoch, so that they can be cached; null draws anew.
        A clip of no more than num_frames frames has one.
    subject_selection: "first" mask, "random", or "best_score"; prefer_tagged: subjects and people before other things.
    no_background, subject_area, min_text_score, max_overlap, with_face: see `vireo.data.subject_choice.Filters`.
    reference_background: "white", or "keep" for the box as it is in the frame.
    augmentation: of training references, such as `vireo.data.references.Augmentation`; they cannot be cached then.
    pairs: folder, as given or below root, with pairs of one subject in two clips (`vireo.data.subject_pairs`). Then the
        reference is a picture from another clip, which passes the filters too, or from the clip itself where it has no
        such pair. Pairs that name a mask of another class than they say are left out.
    max_bad_fraction: largest share of clips that turn out unreadable while training.
    allow_outside_root: whether annotations may name videos outside their part's folder.
    Raises UserError if the arguments or the files cannot be used. Entries that cannot be used are left out and told.
    """

    def __init__(
        self,
        root: str | Path,
        num_frames: int,
        height: int,
        width: int,
        *,
        split: Literal["train", "validation"] = "train",
        annotations: Sequence[str] | None = None,
        videos: Sequence[str] | None = None,
        held_out: float | str = 0.1,
        sample_stride: int = 3,
        target_fps: float | None = None,
        windows: int | None = None,
        max_subjects_per_sample: int = 1,
        subject_selection: Selection = "best_score",
        prefer_tagged: bool = True,
        no_background: bool = True,
        subject_area: tuple[float, float] | None = (0.04, 0.9),
        min_text_score: float | None = 0.3,
        max_overlap: float | None = 0.8,
        with_face: bool = False,
        reference_background: Background = "white",
        augmentation: Augmentation | None = None,
        pairs: str | None = None,
        subject_mask: bool = False,
        max_bad_fraction: float = 0.01,
        allow_outside_root: bool = False,
    ) -> None:
        self.root, self.num_frames, self.height, self.width = Path(root).expanduser(), num_frames, height, width
        self.split, self.held_out = split, held_out
        self.sample_stride, self.target_fps, self.windows = sample_stride, target_fps, windows
        self.max_subjects, self.selection = max_subjects_per_sample, subject_selection
        self.prefer_tagged = prefer_tagged
        area = None if subject_area is None else (subject_area[0], subject_area[-1])
        self.filters = Filters(no_background, area, min_text_score, max_overlap, with_face)
        self.background, self.with_mask, self.max_bad_fraction = reference_background, subject_mask, max_bad_fraction
        self.augmentation = augmentation if split == "train" else None
        self._check_arguments()

        self.parts = find_parts(self.root, annotations, videos, allow_outside_root)
        self.pairs = None if pairs is None else SubjectPairs(below(self.root, pairs))
        self._part_of, self._row_of = self._chosen()
        self._look_at_videos()

    def __len__(self) -> int:
        """Number of clips of this split."""
        return len(self._row_of)

    def sample(self, index: int, draws: Draws) -> dict[str, Any]:
        """One clip, undecoded (see the class). Draws, where these are random: "window" or "start", "subjects",
        "partner" and what the augmentation draws; B is 1.

        Raises BadVideoError if the video is not there or the masks are none, and where a source is loaded if it cannot
        be read.
        """
        clip = self._clip(index)
        if self.split == "validation":
            draws = Draws(("validation", clip.name), [0])
        partners, _ = self._partners(clip)
        chosen = self._choose(clip, self.max_subjects, draws, partners)
        shown = [Reference(one, self.background) for one in self._shown(clip, chosen, draws, partners)]
        window = self._window(clip, draws)
        found: dict[str, Any] = {
            "frames": self._frames(clip, window.start, window.is_fixed),
            **self._pictures(shown, draws),
            "reference_mask": torch.arange(self.max_subjects) < len(shown),
            "prompt": clip.about.caption,
            "name": clip.name,
        }
        if self.with_mask:
            found["subject_mask"] = self._mask(clip, chosen)
        if self.split == "validation":
            found["fps"] = self.target_fps or clip.about.fps / self.sample_stride
        return found

    def sources(self, index: int) -> dict[str, list[Source | str]]:
        """The caption, the windows and the references that this entry can ask for, as far as they are fixed."""
        clip = self._clip(index)
        found: dict[str, list[Source | str]] = {"prompt": [clip.about.caption]}
        starts = self._fixed_starts(clip)
        if starts:
            found["frames"] = [self._frames(clip, start, is_fixed=True) for start in starts]
        if self.augmentation is None:
            limit = None if self.selection == "random" else self.max_subjects
            partners, _ = self._partners(clip)
            chosen = self._choose(clip, limit, Draws("any order", [0]), partners)
            references = [Reference(one, self.background) for one in self._shown(clip, chosen, None, partners)]
            for field, size in _sizes(self.height, self.width).items():
                found[field] = [self._picture(reference, size, 0, None) for reference in references]
                # Of those that overlap a sample takes one, so it may have fewer than are possible.
                may_lack = limit is None and self.max_subjects > 1 and self.filters.overlap is not None
                if len(chosen) < self.max_subjects or may_lack:
                    found[field].append(_blank(size))
        return found

    def describe(self) -> dict[str, Any]:
        """What this split holds, for people. Subjects are counted in some of the clips."""
        some = self._spread(LOOKED_AT)
        counts: Counter[str] = Counter()
        paired, wrong = 0, dict[str, None]()
        for index in some:
            clip, draws = self._clip(index), Draws("describe", [0])
            try:
                partners, mistaken = self._partners(clip)
                chosen = self._choose(clip, self.max_subjects, draws, partners)
                shown = self._shown(clip, chosen, draws, partners)
                paired += any(one.picture.clip.name != clip.name for one in shown)
                wrong |= dict.fromkeys(mistaken)  # most pairs are met from both of their sides
            except BadVideoError:
                continue
            counts[f"{len(chosen)} of {len(clip.about.subjects)}" if chosen else "none: the whole frame"] += 1
        about = {
            "root": str(self.root),
            "parts": [f"{part.name}: {len(part.entries)} entries, {part.videos}" for part in self.parts],
            "clips": len(self),
            "frames": f"{self.num_frames} of {self.height}x{self.width}, "
            + (f"{self.target_fps:g} a second" if self.target_fps else f"one in {self.sample_stride} of the video's"),
            "references": f"up to {self.max_subjects}, {self.selection}, {self.filters}",
            f"subjects ({len(some)})": [f"{what}: {count} clips" for what, count in counts.most_common()],
            "left_out": self._problems(),
        }
        if self.pairs is not None:
            about[f"with a reference from another clip ({len(some)})"] = f"{paired} clips; the others show themselves"
            about[f"masks that pairs are wrong about ({len(some)})"] = list(wrong)
        return about

    def faults(self) -> list[str]:
        """Entries that cannot be used, videos that are not there, of those that were looked at, masks that are none,
        and pairs that name other masks than they say; for people."""
        found, wrong = self._problems(), dict[str, None]()
        for index in self._spread(LOOKED_AT):
            try:
                clip = self._clip(index)
            except BadVideoError as error:
                found.append(str(error))
                continue
            if not clip.path.exists():
                found.append(f"{clip.name}: there is no {clip.path}")
            try:
                self._choose(clip, None, Draws("faults", [0]), {})
                wrong |= dict.fromkeys(self._partners(clip)[1])
            except BadVideoError as error:
                found.append(str(error))
        return found + ([f"data.pairs: some are left out:\n{shortened(list(wrong))}"] if wrong else [])

    @staticmethod
    def prepare(
        root: str | Path,
        annotations: Sequence[str] | None = None,
        videos: Sequence[str] | None = None,
        pairs: str | None = None,
        allow_outside_root: bool = False,
    ) -> str:
        """For `vireo prepare`: index the annotation files, and look for every video and at every pair. Returns what to
        tell."""
        folder = Path(root).expanduser()
        parts = find_parts(folder, annotations, videos, allow_outside_root)
        told = [subject_parts.report(part) for part in parts]
        told += [] if pairs is None else [subject_pairs.report(SubjectPairs(below(folder, pairs)), parts)]
        return "\n".join(told)

    @staticmethod
    def from_files(height: int, width: int, prompt: str, reference: str | None = None) -> dict[str, Any]:
        """For `vireo sample`: a sample without a clip, of a prompt and files of pictures with commas between them.

        Raises BadVideoError for a picture that cannot be read.
        """
        files = [Path(name.strip()).expanduser() for name in (reference or "").split(",") if name.strip()]
        cutouts = [read_cutout(file) for file in files]
        made: dict[str, Any] = {"prompt": prompt, "name": prompt}
        for field, size in _sizes(height, width).items():
            made[field] = torch.stack([letterbox(cutout, *size) for cutout in cutouts] or [blank(*size)])
        return made | {"reference_mask": torch.tensor([True] * len(files) or [False])}

    # ------------------------------------------------------------------ what a sample shows

    def _clip(self, index: int) -> Clip:
        return self.parts[self._part_of[index]].clip(int(self._row_of[index]))

    def _partners(self, clip: Clip) -> tuple[dict[str, list[Partner]], list[str]]:
        """The subjects that pairs give those of a clip, by the ids of these, as far as filters can tell without a mask;
        and, for people, what is wrong with pairs."""
        found: dict[str, list[Partner]] = {}
        wrong = []
        there = functools.cache(functools.partial(named, self.parts))
        for mine, theirs in () if self.pairs is None else self.pairs.of(clip.name, cluster(clip.about.key)):
            other = there(theirs.name)
            if other is None:
                continue
            try:
                own, subject = subject_of(mine, clip.about), subject_of(theirs, other.about)
            except ValueError as error:
                wrong.append(str(error))
                continue
            if is_wanted(subject, other.about, self.filters):
                found.setdefault(own.id, []).append(Partner(other, subject))
        return found, wrong

    def _choose(
        self, clip: Clip, limit: int | None, draws: Draws, partners: Mapping[str, Sequence[Partner]]
    ) -> list[Chosen]:
        """The subjects in the clip itself, those with partners if there are any; without a limit all that may be."""
        filters = self.filters if limit is not None else self.filters._replace(overlap=None)

        def chosen(among: Sequence[str] | None) -> list[Chosen]:
            return choose(clip.about, self.selection, limit, filters, self.prefer_tagged, draws, among)

        try:
            return (chosen(list(partners)) if partners else []) or chosen(None)
        except ValueError as error:
            raise BadVideoError(clip.path, f"{clip.name}: {error}") from error

    def _shown(
        self, clip: Clip, chosen: Sequence[Chosen], draws: Draws | None, partners: Mapping[str, Sequence[Partner]]
    ) -> list[Shown]:
        """Where the references are taken from, for each chosen subject one; without draws all that are possible."""
        own = Picture(clip)
        if not chosen:
            return [Shown(own, None, None)]
        shown: list[Shown] = []
        for one in chosen:
            before = shown if draws is not None else []
            found = [it for partner in partners.get(one.subject.id, ()) if (it := self._partner(partner, before))]
            # Of several subjects, the others may have taken all that this one could be shown by.
            if not found or (draws is None and self.max_subjects > 1 and len(chosen) > 1):
                found.append(Shown(own, *one))
            if draws is not None:
                found = [found[int(draws.integers(f"partner_{one.subject.id}", 0, len(found))[0])]]
            shown += found
        return shown

    def _partner(self, partner: Partner, before: Sequence[Shown]) -> Shown | None:
        """A partner as a reference, None if it does not suit, or shows what another reference shows already."""
        clip, subject = partner
        same = [
            Chosen(it.subject, it.mask)
            for it in before
            if it.picture.clip.name == clip.name and it.subject is not None and it.mask is not None
        ]
        if any(it.subject.id == subject.id for it in same):
            return None
        try:
            mask = subject.mask()
        except ValueError as error:
            raise BadVideoError(clip.path, f"{clip.name}: mask {subject.id}: {error}") from error
        return Shown(Picture(clip), subject, mask) if suits(mask, clip.about, self.filters, same) else None

    def _pictures(self, shown: Sequence[Reference], draws: Draws) -> dict[str, list[Source]]:
        found = {}
        for field, size in _sizes(self.height, self.width).items():
            pictures = [self._picture(reference, size, number, draws) for number, reference in enumerate(shown)]
            found[field] = pictures + [_blank(size)] * (self.max_subjects - len(shown))
        return found

    def _picture(self, reference: Reference, size: tuple[int, int], number: int, draws: Draws | None) -> Source:
        augmentation = self.augmentation
        identity = None if augmentation is not None else reference.identity(size)

        def load() -> Tensor:
            cutout = reference.cutout
            check_content(identity, reference.path)
            if augmentation is not None and draws is not None:
                cutout = augmentation(cutout, draws, number)
            return letterbox(cutout, *size)

        return Source(identity, load, reference.name)

    def _window(self, clip: Clip, draws: Draws) -> "Window":
        starts = self._fixed_starts(clip)
        if not starts:
            return Window(float(draws.uniform("start")[0]), is_fixed=False)
        number = int(draws.integers("window", 0, len(starts))[0]) if len(starts) > 1 else 0
        return Window(starts[number], is_fixed=True)

    def _fixed_starts(self, clip: Clip) -> list[float]:
        if self.split == "validation":
            return [0.5]
        if clip.about.stop - clip.about.start <= self.num_frames:  # all of it is shown
            return [0.0]
        return [float(Draws(("windows", clip.name), [k]).uniform("start")[0]) for k in range(self.windows or 0)]

    def _frames(self, clip: Clip, start: float, is_fixed: bool) -> Source:
        identity = None
        if is_fixed:
            identity = clip.identity(
                frames=[clip.about.start, clip.about.stop, self.num_frames, self.target_fps or self.sample_stride],
                rule="frames a second" if self.target_fps else "stride",
                fps=clip.about.fps,
                start=start,
                height=self.height,
                width=self.width,
                resampler=RESAMPLER,
            )
        return Source(identity, partial(self._load, clip, start, identity), clip.name)

    def _load(self, clip: Clip, start: float, identity: str | None = None) -> Tensor:
        """uint8 RGB (T, 3, height, width)."""
        about = clip.about
        with VideoReader(clip.path) as video:
            first, stop = min(about.start, len(video)), min(about.stop, len(video))
            if first == stop:
                raise BadVideoError(clip.path, f"{stop} frames; {clip.name} begins at frame {about.start}")
            step: float = self.sample_stride
            if self.target_fps is not None:
                step = (about.fps or video.fps) / self.target_fps
                if not step:
                    raise BadVideoError(clip.path, "the frame rate is unknown, which data.target_fps needs")
            frames = video.get(spread_clip(first, stop, self.num_frames, step, start))
        check_content(identity, clip.path)
        return self._fitted(frames, clip.box(frames)).contiguous()

    def _fitted(self, frames: Tensor, box: Box) -> Tensor:
        """The box of each frame, scaled until it covers the size, and its middle."""
        size = covering_size((box.height, box.width), (self.height, self.width))
        return crop_centre(crop_and_resize(frames, box, *size), self.height, self.width)

    def _mask(self, clip: Clip, chosen: Sequence[Chosen]) -> Tensor:
        if not chosen:
            return torch.ones(1, 1, self.height, self.width, dtype=torch.uint8)
        mask = torch.from_numpy(np.logical_or.reduce([one.mask for one in chosen]))
        grey = mask.to(torch.uint8)[None, None].mul(255)
        return (self._fitted(grey, Box(0, 0, *mask.shape)) > 127).to(torch.uint8)

    # ------------------------------------------------------------------ what there is

    def _chosen(self) -> tuple[NDArray[np.uint16], NDArray[np.int32]]:
        """Part and row of each clip of this split; 6 bytes a clip, so that parts of millions fit into every worker."""
        rows = [np.flatnonzero(part.entries.usable).astype(np.int32) for part in self.parts]
        parts = np.repeat(np.arange(len(rows), dtype=np.uint16), [len(some) for some in rows])
        groups = np.concatenate([part.entries.groups[some] for part, some in zip(self.parts, rows, strict=True)])
        if not len(groups):
            told = shortened(self._problems())
            raise UserError(f"no clip of {self.root} can be used:\n{told or '  the annotation files are empty'}")
        if self.held_out == "same":
            return parts, np.concatenate(rows)
        wanted = np.isin(groups, self._held_out_groups(groups)) == (self.split == "validation")
        if not wanted.any() and self.split == "train":
            raise UserError(f"data.held_out={self.held_out} holds out all clips: none is left to train on")
        return parts[wanted], np.concatenate(rows)[wanted]

    def _held_out_groups(self, groups: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Hashes of the source videos that are held out: the lowest, at least one of several, but never all."""
        if isinstance(self.held_out, str):
            return _hashes([cluster(name.partition("/")[2]) for name in self._listed(below(self.root, self.held_out))])
        known = np.unique(groups)
        if self.held_out == 0 or len(known) < 2:
            return known[:0]
        count = int((known < np.uint64(int(self.held_out * 2**64))).sum())
        return known[: min(max(count, 1), len(known) - 1)]

    def _listed(self, file: Path) -> list[str]:
        if not file.is_file():
            raise UserError(f"data.held_out={self.held_out}: expected a share below 1, same, or a file: no {file}")
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        unknown = [name for name in names if named(self.parts, name) is None]
        if unknown or not names:
            told = shortened(unknown) or "  it lists none"
            raise UserError(f"{file}: expected names <part>/<key> of clips; these are none:\n{told}")
        return names

    def _groups(self) -> NDArray[np.uint64]:
        found = np.zeros(len(self), np.uint64)
        for number, part in enumerate(self.parts):
            own = self._part_of == number
            found[own] = part.entries.groups[self._row_of[own]]
        return found

    def _problems(self) -> list[str]:
        return [f"{part.name}/{problem}" for part in self.parts for problem in part.entries.problems]

    def _spread(self, count: int) -> list[int]:
        return np.unique(np.linspace(0, len(self) - 1, count).astype(int)).tolist() if len(self) else []

    def _look_at_videos(self) -> None:
        """Tell, once for both splits, of entries that are left out and of some videos that are missing; raise UserError
        if all are, since then the folder is wrong."""
        if self.split != "train":
            return
        if problems := self._problems():
            logger.warning("entries of %s that cannot be used are left out:\n%s", self.root, shortened(problems))
        paths = [self._clip(index).path for index in self._spread(LOOKED_AT)]
        missing = [str(path) for path in paths if not path.exists()]
        told = f"of {len(paths)} videos that were looked for are missing:\n{shortened(missing)}"
        if len(missing) == len(paths):
            raise UserError(f"data.videos: all {told}")
        if missing:
            logger.warning("%d %s", len(missing), told)

    def _check_arguments(self) -> None:
        """Report every argument that makes no sense, together."""
        counts = {"num_frames": self.num_frames, "height": self.height, "width": self.width}
        counts |= {"sample_stride": self.sample_stride, "max_subjects_per_sample": self.max_subjects}
        counts |= {} if self.windows is None else {"windows": self.windows}
        problems = [f"{name} is {value}, expected at least 1" for name, value in counts.items() if value < 1]
        if self.target_fps is not None and self.target_fps <= 0:
            problems.append(f"target_fps is {self.target_fps}, expected more than 0")
        if self.selection not in SELECTIONS:
            problems.append(f"subject_selection is {self.selection!r}, expected {', '.join(SELECTIONS)}")
        if self.background not in ("white", "keep"):
            problems.append(f"reference_background is {self.background!r}, expected white or keep")
        if self.split not in ("train", "validation"):
            problems.append(f"split is {self.split!r}, expected train or validation")
        area = self.filters.area
        if area is not None and not 0 <= area[0] <= area[1] <= 1:
            problems.append(f"subject_area is {area}, expected smallest and largest share, 0 to 1")
        shares = {"max_bad_fraction": self.max_bad_fraction, "max_overlap": self.filters.overlap}
        problems += [f"{k} is {v}, expected 0 to 1" for k, v in shares.items() if v is not None and not 0 <= v <= 1]
        if not isinstance(self.held_out, str) and not 0 <= self.held_out < 1:
            problems.append(f"held_out is {self.held_out}, expected a share below 1, or a file")
        if problems:
            raise UserError(f"data {self.root}:\n" + shortened(problems, limit=len(problems)))


class Window(NamedTuple):
    start: float
    is_fixed: bool


def _sizes(height: int, width: int) -> dict[str, tuple[int, int]]:
    """Of the pictures of a reference by their fields."""
    return {"references": (height, width), "clip_references": (CLIP_SIDE, CLIP_SIDE)}


def _blank(size: tuple[int, int]) -> Source:
    return Source(identify("white", letterbox=list(size)), partial(blank, *size), "no reference")


def _hashes(texts: Sequence[str]) -> NDArray[np.uint64]:
    return np.array([hashed(text) for text in texts], np.uint64)
