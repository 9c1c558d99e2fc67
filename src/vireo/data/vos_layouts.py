"""Layouts of video object segmentation sets, whose frames and annotations inpainting learns from and is judged by.

DAVIS: `ImageSets/2017/<list>.txt` names the videos, whose frames are `JPEGImages/480p/<name>/*.jpg` and whose masks are
`Annotations/480p/<name>/*.png`. YouTube-VOS: the folders of `JPEGImages/`; files are numbered in steps of 5 and are
consecutive as they are listed.
"""

from pathlib import Path

from vireo.data.listing import Entry, inside, list_folder, shortened
from vireo.errors import UserError


def davis(root: Path, image_set: str, allow_outside_root: bool = False) -> list[Entry]:
    """The videos that one of DAVIS's lists names ("train", "val"), in its order, there or not.

    Raises UserError for a folder or a list that is missing, a list without a name, and for names that lead out of the
    folder of frames, unless these may.
    """
    frames = root / "JPEGImages" / "480p"
    if not frames.is_dir():
        raise UserError(f"there is no folder {frames}: expected DAVIS in {root} (data.davis=null leaves it out)")
    file = root / "ImageSets" / "2017" / f"{image_set}.txt"
    if not file.is_file():
        others = sorted(path.stem for path in file.parent.glob("*.txt"))
        known = f"there are {', '.join(others)}" if others else "there is no list in its folder either"
        raise UserError(f"there is no list {file}, {known}: it names the videos of DAVIS, one a line")
    entries, outside = [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        name = line.strip()
        try:
            if name:
                entries.append(Entry(f"davis/{name}", inside(frames, frames / name, allow_outside_root)))
        except ValueError as error:
            outside.append(f"{file.name}, line {number}: {error}")
    if outside:
        raise UserError(f"{file} cannot be used:\n{shortened(outside)}")
    if not entries:
        raise UserError(f"{file} names no video")
    return entries


def davis_annotation(root: Path, entry: Entry) -> Path | None:
    """The folder of a video's masks, None where there is none."""
    folder = root / "Annotations" / "480p" / entry.path.name
    return folder if folder.is_dir() else None


def youtube_vos(root: Path) -> list[Entry]:
    """All videos, by name. Raises UserError for a folder that is missing or holds none."""
    frames = root / "JPEGImages"
    if not frames.is_dir():
        raise UserError(f"there is no folder {frames}: expected YouTube-VOS in {root} (data.ytvos=null leaves it out)")
    return [Entry(f"ytvos/{entry.name}", entry.path) for entry in list_folder(frames)]
