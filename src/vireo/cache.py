"""The encoding cache: what frozen networks make of files and texts, computed once.

An entry is one output of an encoder for one Source or one text: posterior moments or embeddings, never samples. Its
name is a hash of what was encoded (the file's content and how it was decoded, not its path) and by what (the encoder's
identity), so an entry is never stale: a changed file, setting or encoder asks for another name. Entries lie in
`<folder>/<first two digits>/<key>.safetensors`, with their origin in the file's metadata. They are written whole or not
at all, by any number of processes and runs at once, and one that is damaged counts as missing.
"""

import ctypes
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor

log = logging.getLogger(__name__)

SCHEMA = 1  # of keys and files: another one makes all entries anew
SUFFIX = ".safetensors"
OVERHEAD = 1024  # bytes in memory beside an entry's values: objects, names
FEW = 4  # files that are flushed one by one
ANOTHER = "it holds another encoding than its name says"
# Bytes: a header holds the origin, of which a prompt may be the longest part.
USUAL_HEADER, LONGEST_HEADER = 2**12, 2**22


class Encoder(Protocol):
    """What a cache asks of an encoder (`vireo.models.encoders`)."""

    outputs: dict[str, str]

    def identity(self, output: str) -> str: ...


class Asked(Protocol):
    """An encoding that somebody wants: an encoder's output, for a source identity."""

    @property
    def output(self) -> str: ...
    @property
    def source(self) -> str: ...


A = TypeVar("A", bound=Asked)


class Damaged(Exception):
    """An entry that cannot be used; the message says why."""


def literal(field: str) -> str | None:
    """The text that stands in an encoder's `outputs` in place of a field, '"a text"'; None for a field's name."""
    return json.loads(field) if field.startswith('"') else None


def text_identity(text: str) -> str:
    """The source identity of a text, such as a prompt: the text itself."""
    return json.dumps({"text": text}, ensure_ascii=False)


def text_of(identity: str) -> str:
    """The text that `text_identity` was given."""
    return json.loads(identity)["text"]


def key(encoder: str, source: str) -> str:
    """The name of an entry, 40 hexadecimal digits, from the identities of the encoder (for its output) and source."""
    return hashlib.blake2b(json.dumps([SCHEMA, encoder, source]).encode(), digest_size=20).hexdigest()


class Cache:
    """The entries of one encoder in a folder that many runs share. It holds no weights, and goes to loader workers.

    folder: is made when the first entry is written. outputs, identities: the encoder's, by output. memory: bytes of
    entries that each process keeps when it has read them. Those that come first stay: in epochs that visit everything
    once, any rule that replaces them keeps less.
    """

    def __init__(
        self, folder: str | Path, outputs: Mapping[str, str], identities: Mapping[str, str], memory: int = 2**29
    ) -> None:
        self.folder = Path(folder)
        self.outputs, self.identities = dict(outputs), dict(identities)
        self.memory = memory
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._kept_bytes = 0

    @classmethod
    def of(cls, encoder: Encoder, folder: str | Path, memory: int = 2**29) -> "Cache":
        """The cache of an encoder, whose weights are not loaded for it."""
        identities = {output: encoder.identity(output) for output in encoder.outputs}
        return cls(folder, encoder.outputs, identities, memory)

    def key(self, output: str, source: str) -> str:
        return key(self.identities[output], source)

    def path(self, output: str, source: str) -> Path:
        return entry_path(self.folder, self.key(output, source))

    def read(self, output: str, source: str) -> Tensor | None:
        """The output for a source identity, on the CPU, as it was computed; None if there is no usable entry.

        Not to be changed in place: it may be kept for later. A damaged entry is removed, with a warning.
        """
        encoder = self.identities[output]
        kept = self._kept.get((encoder, source))
        if kept is not None:
            return kept
        path = self.path(output, source)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            value = _decode(data, encoder, source)
        except Damaged as damage:
            _discard(path, str(damage))
            return None
        size = value.nbytes + OVERHEAD
        if self._kept_bytes + size <= self.memory:
            self._kept[encoder, source] = value
            self._kept_bytes += size
        return value

    def holds(self, output: str, source: str, thorough: bool = False) -> bool:
        """Whether there is an entry of the right origin and length; thorough: and with the right checksum."""
        return self._holds(self.key(output, source), output, source, thorough)

    def missing(self, entries: Mapping[str, A], thorough: bool = False) -> dict[str, A]:
        """Of entries by key those that it does not hold; there may be many."""
        return {key: one for key, one in entries.items() if not self._holds(key, one.output, one.source, thorough)}

    def _holds(self, key: str, output: str, source: str, thorough: bool) -> bool:
        path = f"{self.folder}/{_place(key)}"
        try:
            _check_origin(_whole(path) if thorough else _header(path), self.identities[output], source)
        except FileNotFoundError:
            return False
        except Damaged as damage:
            log.warning("%s: %s; it counts as missing", path, damage)
            return False
        return True

    def write(self, output: str, source: str, value: Tensor, name: str = "") -> None:
        """Add one entry, see `write_all`."""
        self.write_all([New(output, source, value, name)])

    def write_all(self, entries: Sequence["New"]) -> int:
        """Add entries, each whole or not at all; one that is there is replaced by the same. Returns their number.

        Raises OSError (disk full, no permission); nothing that looks like a new entry is left behind then.
        """
        unfinished: dict[str, str] = {}  # the name it is written under -> the entry's
        try:
            for one in entries:
                encoder = self.identities[one.output]
                about = {"schema": str(SCHEMA), "encoder": encoder, "source": one.source, "name": one.name}
                path = str(self.path(one.output, one.source))
                folder, stem = os.path.split(path.removesuffix(SUFFIX))
                temporary = f"{folder}/.{stem}.{uuid.uuid4().hex}.tmp"
                unfinished[temporary] = path
                _write_new(temporary, _encode(one.value, about))
            _flush(self.folder, list(unfinished))
            # The folders are not flushed: a rename that a power cut undoes costs one encoding.
            while unfinished:
                temporary, path = next(iter(unfinished.items()))
                os.replace(temporary, path)
                del unfinished[temporary]
        except BaseException:
            for temporary in unfinished:
                Path(temporary).unlink(missing_ok=True)
            raise
        return len(entries)


class New(NamedTuple):
    """An entry to be written: the output for a source identity, and what people call the source."""

    output: str
    source: str
    value: Tensor
    name: str = ""


def _write_new(path: str, data: bytes) -> None:
    try:
        file = open(path, "wb")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(path, "wb")  # noqa: SIM115
    with file:
        file.write(data)


def _flush(folder: Path, paths: Sequence[str]) -> None:
    """Wait until files are on the disk. Many small ones together, where Linux can: that is a tenth of the work."""
    together = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if together is None or len(paths) < FEW:
        for path in paths:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if together(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# All entries of a folder


def entry_path(folder: Path, key: str) -> Path:
    return folder / _place(key)


def _place(key: str) -> str:
    return f"{key[:2]}/{key}{SUFFIX}"


def entries(folder: Path) -> Iterator[Path]:
    """The files of all entries, whoever they belong to."""
    return folder.glob(f"[0-9a-f][0-9a-f]/*{SUFFIX}")


def unfinished(folder: Path) -> Iterator[Path]:
    """What is being written, or was left by a process that was killed."""
    return folder.glob("[0-9a-f][0-9a-f]/.*.tmp")


def verify(path: Path) -> int:
    """Read one entry as a whole; returns its bytes. Raises Damaged if it is not what its name and checksum say."""
    header = _whole(path)
    about = header["__metadata__"]
    if key(about.get("encoder", ""), about.get("source", "")) != path.stem:
        raise Damaged(ANOTHER)
    return path.stat().st_size


# ---------------------------------------------------------------------------------------------------------------------
# The bytes of an entry: a safetensors file with the tensor "value"; its checksum covers dtype, shape and values.


def _encode(value: Tensor, about: dict[str, str]) -> bytes:
    blank = "0" * hashlib.sha256().digest_size * 2
    data = safetensors.torch.save({"value": value.detach().cpu().contiguous()}, {**about, "checksum": blank})
    start = 8 + int.from_bytes(data[:8], "little")
    checksum = _sum(json.loads(data[8:start]), memoryview(data)[start:])
    head = data[:start].replace(f'"checksum":"{blank}"'.encode(), f'"checksum":"{checksum}"'.encode())
    return head + data[start:]


def _decode(data: bytes, encoder: str, source: str) -> Tensor:
    header, start = _parsed(data, len(data))
    _check_origin(header, encoder, source)
    _check_sum(header, memoryview(data)[start:])
    try:
        return safetensors.torch.load(data)["value"]
    except safetensors.SafetensorError as error:
        raise Damaged(f"it cannot be read ({error})") from error


def _whole(path: str | Path) -> dict[str, Any]:
    """The header of an entry whose checksum is right. Raises Damaged."""
    data = Path(path).read_bytes()
    header, start = _parsed(data, len(data))
    _check_sum(header, memoryview(data)[start:])
    return header


def _header(path: str) -> dict[str, Any]:
    """The header of an entry of the right length. Raises Damaged. Every start asks this of tens of thousands."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size, data = os.fstat(descriptor).st_size, os.read(descriptor, USUAL_HEADER)
        length = 8 + int.from_bytes(data[:8], "little")
        if length > len(data):
            data += os.read(descriptor, min(length, LONGEST_HEADER) - len(data))
    finally:
        os.close(descriptor)
    return _parsed(data, size)[0]


def _parsed(data: bytes, size: int) -> tuple[dict[str, Any], int]:
    """The header at the beginning of a file of `size` bytes, and where the values begin. Raises Damaged."""
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or len(data) < start:
        raise Damaged(f"cut off after {size} bytes")
    try:
        header = json.loads(data[8:start])
        end = start + header["value"]["data_offsets"][1]
        header["__metadata__"]["checksum"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise Damaged(f"its header cannot be read ({type(error).__name__})") from error
    if size != end:
        raise Damaged(f"{size} bytes, its header says {end}")
    return header, start


def _check_origin(header: dict[str, Any], encoder: str, source: str) -> None:
    about = header["__metadata__"]
    if (about.get("encoder"), about.get("source")) != (encoder, source):
        raise Damaged(ANOTHER)


def _check_sum(header: dict[str, Any], values: bytes | memoryview) -> None:
    if _sum(header, values) != header["__metadata__"]["checksum"]:
        raise Damaged("its checksum is wrong")


def _sum(header: dict[str, Any], values: bytes | memoryview) -> str:
    digest = hashlib.sha256(json.dumps(header["value"], sort_keys=True).encode())
    digest.update(values)
    return digest.hexdigest()


def _discard(path: Path, reason: str) -> None:
    log.warning("%s: %s; it is removed and counts as missing", path, reason)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error.strerror)
