"""The first frame of every listed clip, as pictures with a list of their own: what image-to-video starts from."""

import logging
import os
import shutil
from pathlib import Path

from PIL import Image

from vireo.data import caption_lists
from vireo.data.listing import shortened
from vireo.errors import UserError
from vireo.video_io import BadVideoError, VideoReader

logger = logging.getLogger(__name__)


def extract(root: Path, videos: str | None, out: Path, allow_outside_root: bool = False) -> str:
    """Write `out`/images/<name>.png, frames of the videos' own size, and `out`/images.txt, whole or not at all.

    root: folder of the lists. videos: name of the list of clips, which may lie elsewhere if allow_outside_root.
    Pictures are named by the clip's file name, and by its path where two clips share that. Returns what to tell. Raises
    UserError if a clip cannot be read (all of these together), since a shorter list would move pictures to other clips,
    and if there are pictures already.
    """
    lists = caption_lists.read(root, {"videos": videos}, allow_outside_root=allow_outside_root)
    if lists.problems:
        raise UserError(f"{root} cannot be used:\n{shortened(lists.problems)}")
    listed, folder = out / "images.txt", out / "images"
    there = [str(path) for path in (listed, folder) if path.exists()]
    if there:
        raise UserError(f"{' and '.join(there)} exist: remove them to extract first frames anew, or name out=<folder>")
    file = lists.files["videos"]
    names = _names(file.lines)
    unfinished, problems = out / f".images.{os.getpid()}", []
    try:
        for row, name in enumerate(names):
            target = unfinished / f"{name}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with VideoReader(file.file(row)) as video:
                    Image.fromarray(video.get([0])[0].permute(1, 2, 0).numpy()).save(target)
            except BadVideoError as error:
                problems.append(f"{file.place(row)}: {file.lines[row]}: {error.reason}")
        if problems:
            raise UserError(f"first frames of {root} were not extracted:\n{shortened(problems)}")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    listed.write_text("".join(f"images/{name}.png\n" for name in names), encoding="utf-8")
    words = "data.image=listed" + ("" if out.samefile(root) else f" data.images={listed.resolve()}")
    return f"{len(names)} first frames: {folder}, listed in {listed}\nto start from them: {words}"


def _names(videos: list[str]) -> list[str]:
    """A name for each clip's picture, different ones."""
    stems = [Path(video).stem for video in videos]
    if len(set(stems)) == len(stems):
        return stems
    return [Path(video).with_suffix("").as_posix().strip("/").replace("..", "_") for video in videos]
