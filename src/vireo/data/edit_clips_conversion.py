"""From the raw layout of edited clips to a Hugging Face dataset with exactly the published features.

The dataset is made from the files as they are now: no cache of `datasets` is in between, which would give back clips
whose frames are gone.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vireo.data.edit_clips import SPLITS, EditClip, list_raw, numbers
from vireo.data.edit_clips_arrow import MARKER, description, features
from vireo.data.held_out import held_out_names
from vireo.data.listing import shortened
from vireo.errors import UserError
from vireo.video_io import BadVideoError, read_image


class Checked(NamedTuple):
    """A clip whose pictures were all decoded: the hashes of their bytes, and the edited picture as it is stored."""

    clip: EditClip
    hashes: tuple[bytes, ...]
    edited: bytes


class Report(NamedTuple):
    """What a conversion kept: clips by split; what it left out, "<clip>: <reason>"; where the dataset lies."""

    kept: dict[str, int]
    left_out: list[str]
    folder: Path

    def __str__(self) -> str:
        total = sum(self.kept.values())
        splits = ", ".join(f"{split} {count}" for split, count in self.kept.items())
        text = f"{total} of {total + len(self.left_out)} clips kept ({splits}), {len(self.left_out)} left out"
        if self.left_out:
            text += f":\n{shortened(self.left_out, limit=50)}"
        if not self.kept["test"]:
            text += "\nwarning: the test split is empty, so nothing can be validated; resplit=0.1 holds a tenth out"
        return text


def convert(
    root: Path,
    out: Path,
    *,
    strict: bool = False,
    resplit: float | None = None,
    seed: int = 0,
    allow_outside_root: bool = False,
) -> Report:
    """Write the raw layout below `root` as a dataset with the published features.

    Every picture is decoded once; clips that are incomplete, damaged, without text, or of which a training clip shares
    a picture with a held-out one, are left out and reported. The raw split is kept. The dataset is made from the
    files as they are now, without any cache, and appears at `out` whole or not at all.
    strict: refuse if anything would be left out. resplit: the share of clips that is held out as `test` in place of the
    raw split, chosen by seed and name. allow_outside_root: whether clips may lie outside `root`. Raises UserError for
    these, if no clip is left to train on, and for an `out` that holds something else than a dataset.
    """
    if resplit is not None and not 0 < resplit < 1:
        raise UserError(f"resplit={resplit}: a share of the clips between 0 and 1 is expected")
    if out.exists() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise UserError(f"{out} holds something else than a dataset: choose another folder with out=…")
    clips, left_out = list_raw(root, allow_outside_root)
    checked, damaged = _check(clips)
    if resplit is not None:
        checked = _split_anew(checked, resplit, seed)
    checked, leaks = _without_leaks(checked)
    left_out += damaged + leaks
    if strict and left_out:
        raise UserError(f"strict: {len(left_out)} clips of {root} cannot be used:\n{shortened(left_out, limit=50)}")
    names = [s for s in SPLITS if s != "val" or any(c.clip.split == "val" for c in checked)]
    splits = {name: [c for c in checked if c.clip.split == name] for name in names}
    if not splits["train"]:
        raise UserError(f"no clip of {root} is left to train on:\n{shortened(left_out, limit=50)}")
    _write(splits, root, out)
    return Report({name: len(some) for name, some in splits.items()}, left_out, out)


def _check(clips: Sequence[EditClip]) -> tuple[list[Checked], list[str]]:
    """Decode every picture, in a few threads: Pillow lets go of Python's lock."""
    checked, damaged = [], []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for clip, found in zip(clips, pool.map(_checked, clips), strict=True):
            if isinstance(found, str):
                damaged.append(f"{clip.name}: {found}")
            else:
                checked.append(found)
    return checked, damaged


def _checked(clip: EditClip) -> Checked | str:
    """The clip, or why it cannot be used."""
    hashes, sizes, content = [], Counter[str](), b""
    for number, frame in enumerate(clip.frames):
        try:
            content = frame.read()
            _, height, width = read_image(frame.path, content).shape
        except BadVideoError as error:
            return f"frame {number:02d}: {error.reason}"
        except OSError as error:
            return f"frame {number:02d} cannot be read ({error.strerror})"
        hashes.append(hashlib.blake2b(content, digest_size=16).digest())
        sizes[f"{width}x{height}"] += 1
    if len(sizes) > 1:
        return f"its frames have different sizes: {', '.join(sorted(sizes))}"
    return Checked(clip, tuple(hashes), content)


def _split_anew(checked: Sequence[Checked], share: float, seed: int) -> list[Checked]:
    """`train` and `test` by the hash of seed and name, so that a clip's part does not depend on the other clips."""
    keyed = {f"{seed}/{one.clip.name}": one for one in checked}
    held_out = held_out_names(keyed, share, Path())
    return [
        one._replace(clip=replace(one.clip, split="test" if key in held_out else "train")) for key, one in keyed.items()
    ]


def _without_leaks(checked: Sequence[Checked]) -> tuple[list[Checked], list[str]]:
    """Without the training clips that share a picture, byte by byte, with a held-out clip."""
    held_out = {h: one.clip.name for one in checked if one.clip.split != "train" for h in one.hashes}
    kept, leaks = [], []
    for one in checked:
        shared = [n for n, h in enumerate(one.hashes) if h in held_out] if one.clip.split == "train" else []
        if shared:
            leaks.append(f"{one.clip.name}: {numbers(shared)} also in {held_out[one.hashes[shared[0]]]}, held out")
        else:
            kept.append(one)
    return kept, leaks


def _write(splits: Mapping[str, Sequence[Checked]], root: Path, out: Path) -> None:
    """Save beside `out`, then swap: a reader finds the old dataset or the new one."""
    import datasets

    out = out.resolve()
    info = datasets.DatasetInfo(description=description(root.resolve(), out), features=features())
    made = {name: datasets.Dataset.from_dict(_columns(some, root), info=info.copy()) for name, some in splits.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished, old = (out.with_name(f".{out.name}.{what}-{os.getpid()}") for what in ("unfinished", "old"))
    try:
        with _without_progress_bars():
            # One file for each split: of none, as for an empty one without this, the dataset could not be read back.
            datasets.DatasetDict(made).save_to_disk(str(unfinished), num_shards=dict.fromkeys(made, 1))
        for split in made:
            _spell_as_before(unfinished / split)
        if out.exists():
            out.rename(old)
        try:
            unfinished.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise
    finally:
        for leftover in (unfinished, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _spell_as_before(split: Path) -> None:
    """Call a list `Sequence`, as `datasets` did before version 4, which cannot read `List`; later ones read both."""
    import pyarrow as pa

    about = split / "dataset_info.json"
    about.write_text(about.read_text().replace('"_type": "List"', '"_type": "Sequence"'))
    for file in split.glob("*.arrow"):
        with pa.OSFile(str(file)) as source:
            table = pa.ipc.open_stream(source).read_all()
        spelt = {key: value.replace(b'"List"', b'"Sequence"') for key, value in table.schema.metadata.items()}
        table = table.replace_schema_metadata(spelt)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    import datasets

    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _columns(some: Sequence[Checked], root: Path) -> dict[str, list[Any]]:
    frames = [[f.path.relative_to(root).as_posix() for f in one.clip.frames[:-1]] for one in some]
    pictures = [{"bytes": one.edited, "path": one.clip.frames[-1].path.name} for one in some]
    return {"input_frames": frames, "edit_prompt": [one.clip.prompt for one in some], "edited_image": pictures}
