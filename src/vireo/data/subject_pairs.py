"""Pairs of one subject in two clips, OpenS2V's cross-frame pairs: a picture of the one is the other's reference.

A folder has `final_output/<cluster>.json`, a list of {cur_id, aft_id, cur_class_id, aft_class_id, cur_class_name,
aft_class_name, …} for every cluster, whose clips were cut from one video. Ids are `<part>/<key>`, class ids those of
masks. Some of the published pairs were made from other annotations than are published, so their ids name other masks.
"""

import functools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vireo.data.listing import shortened
from vireo.data.subject_annotations import Annotation, Subject
from vireo.data.subject_parts import Part, named
from vireo.errors import UserError
from vireo.video_io import BadVideoError


class Side(NamedTuple):
    """One of the two. name: of the clip, `<part>/<key>`. subject: id of the mask. class_name: what it is said to show,
    None if that is not said."""

    name: str
    subject: str
    class_name: str | None


class SubjectPairs:
    """folder: with `final_output/`. Raises UserError if there is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "final_output"
        if not self.folder.is_dir():
            raise UserError(f"data.pairs: there is no {self.folder}, expected one JSON file for each cluster of clips")

    def of(self, name: str, cluster: str) -> list[tuple[Side, Side]]:
        """Those of a clip `<part>/<key>`, its own side first. Raises UserError for a malformed file."""
        found = []
        for one, other in _pairs(self.folder / f"{cluster}.json"):
            found += [(a, b) for a, b in ((one, other), (other, one)) if a.name == name and b.name != name]
        return found


def subject_of(side: Side, annotation: Annotation) -> Subject:
    """The subject of its clip that a side means. Raises ValueError, for people, if the clip has no such mask, or if it
    shows something else than the pair says."""
    subject = next((subject for subject in annotation.subjects if subject.id == side.subject), None)
    if subject is None:
        raise ValueError(f"{side.name} has no mask {side.subject}")
    if side.class_name not in (None, subject.class_name):
        raise ValueError(f"mask {side.subject} of {side.name} is {subject.class_name!r}, not {side.class_name!r}")
    return subject


def report(pairs: SubjectPairs, parts: Sequence[Part]) -> str:
    """What of the pairs can be used, for people: every one is looked at."""
    counts: Counter[str] = Counter()
    wrong: dict[str, None] = {}
    for file in sorted(pairs.folder.glob("*.json")):
        there = functools.cache(functools.partial(named, parts))  # many pairs are of one clip
        for pair in _pairs(file):
            try:
                clips = [there(side.name) for side in pair]
                for side, clip in zip(pair, clips, strict=True):
                    if clip is not None:
                        subject_of(side, clip.about)
            except (ValueError, BadVideoError) as error:
                counts["left out"] += 1
                wrong[str(error)] = None
            else:
                counts["elsewhere" if None in clips else "usable"] += 1
    lines = [str(pairs.folder), f"  {counts.total()} pairs, {counts['usable']} of them usable"]
    if counts["elsewhere"]:
        lines.append(f"  {counts['elsewhere']} with a clip that is in none of these annotations")
    if wrong:
        lines.append(f"  {counts['left out']} left out:\n{shortened(list(wrong))}")
    return "\n".join(lines)


@functools.lru_cache(maxsize=256)
def _pairs(file: Path) -> list[tuple[Side, Side]]:
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
        return [(_side(pair, "cur"), _side(pair, "aft")) for pair in listed]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: not a list of pairs {{cur_id, aft_id, cur_class_id, aft_class_id}}: {error}"
        ) from None


def _side(pair: dict[str, str], which: str) -> Side:
    return Side(pair[f"{which}_id"], str(pair[f"{which}_class_id"]), pair.get(f"{which}_class_name"))
