"""The parts of OpenS2V-5M: annotation files, and a folder of videos for each."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vireo.data import subject_annotations
from vireo.data.json_index import JsonIndex
from vireo.data.listing import inside, shortened
from vireo.data.source import identify
from vireo.data.subject_annotations import Annotation
from vireo.data.transforms import Box
from vireo.digests import file_digest
from vireo.errors import UserError
from vireo.video_io import BadVideoError, decoder_version

INSIDE = "subject_clips"  # the folder below a root that holds other layouts too, as the mini world does
# Folders of the annotations and of each file's videos: OpenS2V-5M's, and those of its demonstration.
LAYOUTS = (("Jsons/mask_and_bbox", "Videos"), ("demo_result/step5/merge_final_json", "demo_result/step0/videos"))


class Part(NamedTuple):
    """One annotation file, and the folder that its paths start from. name: of the file, without its suffix.

    allow_outside_root: whether they may lead out of it."""

    name: str
    entries: JsonIndex
    videos: Path
    allow_outside_root: bool = False

    def clip(self, row: int) -> "Clip":
        """The usable entry of this number. Raises BadVideoError for a video that lies elsewhere and may not."""
        about = subject_annotations.parse(*self.entries.entry(row))
        name, path = f"{self.name}/{about.key}", self.videos / about.video
        try:
            return Clip(name, inside(self.videos, path, self.allow_outside_root), about)
        except ValueError as error:
            raise BadVideoError(path, f"of {name} in {self.entries.path}: {error}") from None


class Clip(NamedTuple):
    """One entry. name: `<part>/<key>`. path: its video."""

    name: str
    path: Path
    about: Annotation

    def box(self, frames: Tensor) -> Box:
        """The picture without watermarks, in frames (T, C, H, W). Raises BadVideoError if it is not inside."""
        height, width = frames.shape[-2:]
        x0, x1, y0, y1 = self.about.crop or (0, width, 0, height)
        if x1 > width or y1 > height:
            says = f"crop {list(self.about.crop or ())} of {self.name} (x0, x1, y0, y1)"
            raise BadVideoError(self.path, f"frames of {width}x{height} pixels; {says} is not in them")
        return Box(y0, x0, y1 - y0, x1 - x0)

    def identity(self, **decoding: Any) -> str:
        """Of something that is made from the cropped video."""
        try:
            content = file_digest(self.path)
        except OSError as error:
            raise BadVideoError(self.path, error.strerror or str(error)) from error
        return identify(content, decoder=decoder_version("pyav"), crop=self.about.crop, **decoding)


def find_parts(
    root: Path, annotations: Sequence[str] | None, videos: Sequence[str] | None, allow_outside_root: bool = False
) -> list[Part]:
    """The annotation files with their videos, indexed. Raises UserError for lists of different lengths, files that are
    not there, and two files of one name."""
    if annotations is None or videos is None:
        if annotations is not videos:
            raise UserError("data.annotations and data.videos go together: give both, or neither")
        files, folders = _layout(root)
    else:
        if len(annotations) != len(videos) or not annotations:
            raise UserError(
                f"data.annotations has {len(annotations)} files and data.videos {len(videos)} folders: expected one "
                "folder for each file, in the same order"
            )
        files, folders = ([below(root, name) for name in names] for names in (annotations, videos))
    twice = [name for name, count in Counter(file.stem for file in files).items() if count > 1]
    if twice:
        raise UserError(f"data.annotations: {twice[0]} is the name of two files; clips are known by it: rename one")
    version = subject_annotations.VERSION
    return [
        Part(file.stem, JsonIndex(file, subject_annotations.judge, version), folder, allow_outside_root)
        for file, folder in zip(files, folders, strict=True)
    ]


def _layout(root: Path) -> tuple[list[Path], list[Path]]:
    for base in (root, root / INSIDE):
        for annotations, videos in LAYOUTS:
            files = sorted((base / annotations).glob("*.json"))
            if files:
                return files, [base / videos / file.stem for file in files]
    expected = " or ".join(f"{annotations}/<part>.json with {videos}/<part>/" for annotations, videos in LAYOUTS)
    raise UserError(f"there are no annotated clips in {root}: expected {expected}, or data.annotations and data.videos")


def named(parts: Sequence[Part], name: str) -> Clip | None:
    """The clip `<part>/<key>`, None if it is none of these parts'. Raises BadVideoError as `Part.clip` does."""
    for part in parts:
        if name.startswith(f"{part.name}/"):
            row = part.entries.row(name.removeprefix(f"{part.name}/"))
            if row is not None:
                return part.clip(row)
    return None


def report(part: Part) -> str:
    """What a part holds, for people: every entry is read, and every video is looked for."""
    count = frames = masks = without = 0
    seconds, missing = 0.0, []
    for row in part.entries.usable.nonzero()[0].tolist():
        try:
            clip = part.clip(row)
        except BadVideoError as error:
            missing.append(str(error))
            continue
        length = clip.about.stop - clip.about.start
        count, frames, masks = count + 1, frames + length, masks + len(clip.about.subjects)
        seconds += length / clip.about.fps if clip.about.fps else 0
        without += not clip.about.subjects
        if not clip.path.exists():
            missing.append(f"{clip.about.key}: there is no {clip.path}")
    lines = [
        str(part.entries.path),
        f"  {len(part.entries)} entries, {count} of them usable: {frames} frames, {seconds / 3600:.2f} hours, "
        f"{masks} masks",
    ]
    found = {f"{without} entries have no masks": without, f"{len(missing)} videos are missing": missing}
    for what, some in {"left out": part.entries.problems, **found}.items():
        if some:
            lines.append(f"  {what}" + (f":\n{shortened(some)}" if isinstance(some, list) else ""))
    return "\n".join(lines)


def below(root: Path, name: str) -> Path:
    """A path as given, below the root, or below the folder in it, wherever something is."""
    places = [Path(name).expanduser(), root / name, root / INSIDE / name]
    return next((place for place in places if place.exists()), root / name)
