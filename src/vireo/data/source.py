"""Something that can be decoded later, or never: its identity is known without opening it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Source:
    """identity: what is decoded and how (see `identify`), so that equal identities decode to equal tensors; None for
    what is random and can never be cached. load: decodes it. name: what people call it, such as the file's path in the
    dataset's folder."""

    identity: str | None
    load: Callable[[], Tensor]
    name: str = ""


def identify(content: str, **decoding: Any) -> str:
    """The identity of a file that is decoded in a certain way: the same wherever the file lies.

    content: `vireo.digests.file_digest` of the file. decoding: all that shapes the decoded tensor, as JSON values: the
    decoder and its version (`vireo.video_io.decoder_version`), frames, size, crop, flip. When one of them changes,
    `vireo prepare cache=status` names it.
    """
    return json.dumps({"content": content, **decoding}, sort_keys=True)
