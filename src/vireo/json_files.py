"""JSON of others: read with a limit on its size, and every way in which it can be wrong told as the user's mistake."""

import json
from pathlib import Path
from typing import Any

from vireo.errors import UserError

SMALL = 16 * 2**20  # bytes that a manifest, a network's config or an index of shards never has


def read(path: Path, largest: int | None = SMALL) -> Any:
    """What a file holds. largest: bytes of a file that is still read; None for lists of any length.

    Raises UserError for a file that cannot be read or is larger, for what is no UTF-8, and for JSON that is malformed
    (with line and column) or nested too deeply.
    """
    return parse(text(path, largest), str(path))


def text(path: Path, largest: int | None = None) -> str:
    """The text of a file of JSON, or of lines of it; for the rest see `read`."""
    try:
        size = path.stat().st_size
        if largest is not None and size > largest:
            raise UserError(f"{path}: {size} bytes, more than the {largest} that such a file can have; it is not read")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, byte {error.start}: not UTF-8 text, expected JSON") from error


def parse(text: str, place: str, line: int | None = None) -> Any:
    """What a text holds, of the file `place`; of a single line of it, its number. Raises UserError as `read` does."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        found = line or error.lineno
        raise UserError(f"{place}, line {found}, column {error.colno}: malformed JSON: {error.msg}") from error
    except (RecursionError, ValueError) as error:  # brackets in brackets in …, a number of thousands of digits
        raise UserError(f"{place}: this JSON is not read: {error}") from error
