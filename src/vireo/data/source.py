"""Something that can be decoded later, or never: its identity is known without opening it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vireo.digests import bytes_digest, file_digests
from vireo.video_io import BadVideoError

_to_text = json.JSONEncoder(sort_keys=True).encode  # json.dumps would make one for each of thousands of frames


class ChangedError(BadVideoError):
    """A file that is no longer what its identity says."""


@dataclass(frozen=True)
class Source:
    """identity: what is decoded and how (see `identify`), so that equal identities decode to equal tensors; None for
    what is random and can never be cached. load: decodes it; raises ChangedError where the file has another content
    than the identity says (see `check_content`), BadVideoError where it cannot be read. name: what people call it, such
    as the file's path in the dataset's folder."""

    identity: str | None
    load: Callable[[], Tensor]
    name: str = ""


def identify(content: str, **decoding: Any) -> str:
    """The identity of a file that is decoded in a certain way: the same wherever the file lies.

    content: `content_digest` of the file or folder. decoding: all that shapes the decoded tensor, as JSON values: the
    decoder and its version (`vireo.video_io.decoder_version`), frames, size, crop, flip. When one of them changes,
    `vireo prepare cache=status` names it.
    """
    return _to_text({"content": content, **decoding})


def content_digest(path: Path) -> str:
    """Names the bytes of a file, or of all files of a folder of frames. Raises OSError if it has gone."""
    files = [file for file in sorted(path.iterdir()) if file.is_file()] if path.is_dir() else [path]
    known = file_digests(files)
    return " ".join(known[str(file)] for file in files)


def check_content(identity: str | None, path: str | Path, content: bytes | None = None) -> None:
    """Raises ChangedError if the bytes of a file, or of a folder of frames, are not those that `identify` was told of.

    content: the bytes that are decoded. None, for files that are too big to be held: called after decoding, this asks
    the file system whether the file is still the one that was hashed. identity: None, of what is random, is not judged.
    """
    if identity is None:
        return
    try:
        found = content_digest(Path(path)) if content is None else bytes_digest(content)
    except OSError as error:
        raise ChangedError(path, error.strerror or str(error)) from error
    if json.loads(identity)["content"] != found:
        raise ChangedError(path, "has changed since it was looked at")
