"""Pairs of one subject in two clips, OpenS2V's cross-frame pairs: a picture of the one is the other's reference.

A folder has `final_output/<cluster>.json`, a list of {cur_id, aft_id, cur_class_id, aft_class_id, …} for every cluster,
whose clips were cut from one video. Ids are `<part>/<key>`, class ids those of the masks.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

from vireo.errors import UserError


class Partner(NamedTuple):
    """A subject of another clip. name: `<part>/<key>`. subject: id of the mask."""

    name: str
    subject: str


class SubjectPairs:
    """folder: with `final_output/`. Raises UserError if there is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "final_output"
        if not self.folder.is_dir():
            raise UserError(f"data.pairs: there is no {self.folder}, expected one JSON file for each cluster of clips")

    def partners(self, name: str, cluster: str) -> dict[str, list[Partner]]:
        """Those of a clip `<part>/<key>` by the id of its own subject. Raises UserError for a malformed file."""
        found: dict[str, list[Partner]] = {}
        for one, own, other, theirs in _pairs(self.folder / f"{cluster}.json"):
            for mine, subject, partner in ((one, own, Partner(other, theirs)), (other, theirs, Partner(one, own))):
                if mine == name and partner.name != name:
                    found.setdefault(subject, []).append(partner)
        return found


@functools.lru_cache(maxsize=256)
def _pairs(file: Path) -> list[tuple[str, str, str, str]]:
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
        return [(p["cur_id"], str(p["cur_class_id"]), p["aft_id"], str(p["aft_class_id"])) for p in listed]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{file}: not a list of pairs {{cur_id, aft_id, cur_class_id, aft_class_id}}: {error}"
        ) from None
