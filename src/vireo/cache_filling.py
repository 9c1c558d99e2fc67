"""Which encodings the datasets of a run can ask for, and computing those that the cache does not hold.

All ranks share the work by key, files are decoded by loader workers, entries are written by threads. What is written
stays, so a filling that was interrupted goes on where it stopped.
"""

import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from vireo import cache_manifests, distributed, faults, orphans
from vireo.cache import Cache, New, literal, text_identity, text_of
from vireo.data.source import ChangedError, Source
from vireo.data.stream import Dataset, start_worker
from vireo.errors import UserError
from vireo.memory import readable
from vireo.models.encoders import Encoder
from vireo.video_io import BadVideoError

log = logging.getLogger(__name__)

PROGRESS_EVERY = 10.0  # seconds
WAITING = 64  # entries that may wait for the disk; those that do are written together
SHOWN = 5  # lines of a warning


class Wanted(NamedTuple):
    """One encoding that a dataset can ask for.

    output: of the encoder, the first of those that share the encoding. source: its identity. name: for people. place:
    split, index, field and number in `dataset.sources(index)[field]`; None for a text, whose identity says it all.
    """

    output: str
    source: str
    name: str
    place: tuple[str, int, str, int] | None


class Filled(NamedTuple):
    """entries: how many there should be. encoded: how many were added. unreadable: what could not be decoded, and why.
    changed: how many files were others than when they were listed, of which nothing was written. stopped: whether it
    was asked to stop. All ranks together."""

    entries: int
    encoded: int
    unreadable: list[str]
    changed: int = 0
    stopped: bool = False


def wanted(cache: Cache, datasets: Mapping[str, Dataset], unreadable: list[str] | None = None) -> dict[str, Wanted]:
    """By key, everything cacheable that the splits {"train": …} can ask for, texts that all samples share first.

    Nothing is decoded, and the cache's folder is not looked at. unreadable: gets why entries of files that cannot even
    be hashed are left out; the stream replaces these.
    """
    found: dict[str, Wanted] = {}
    outputs: dict[str, list[str]] = {}
    for output, field in cache.outputs.items():
        text = literal(field)
        if text is None:
            outputs.setdefault(field, []).append(output)
        else:
            found[cache.key(output, text_identity(text))] = Wanted(output, text_identity(text), repr(text), None)
    for split, dataset in datasets.items():
        for index in range(len(dataset)):
            try:
                asked = dataset.sources(index)
            except BadVideoError as error:
                if unreadable is not None:
                    unreadable.append(str(error))
                continue
            for field, sources in asked.items():
                for number, source in enumerate(sources if field in outputs else ()):
                    one = _of_source(source, (split, index, field, number))
                    if one is not None:
                        for output in outputs[field]:
                            found.setdefault(cache.key(output, one.source), one._replace(output=output))
    return found


def _of_source(source: Source | str, place: tuple[str, int, str, int]) -> Wanted | None:
    if isinstance(source, str):
        return Wanted("", text_identity(source), repr(source), None)
    if source.identity is None:
        return None
    split, index, field, _ = place
    return Wanted("", source.identity, source.name or f"{field} of {split} {index}", place)


def fill(
    cache: Cache,
    datasets: Mapping[str, Dataset],
    encoder: Encoder,
    name: str,
    *,
    batch_size: int,
    workers: int = 0,
    timeout: float = 300.0,
    thorough: bool = False,
    stop: faults.StopRequest | None = None,
) -> Filled:
    """Encode what the datasets can ask for and the cache does not hold; called by all ranks of a run.

    name: of the manifest that says who needs these entries. batch_size: how many are encoded at once. workers, timeout:
    of the loader. thorough: believe an entry that is there only after its checksum. stop: ends it after a batch.
    The encoder's weights are loaded when there is something to encode, those for texts first, which are freed before
    others are loaded; none stay afterwards. Files that change meanwhile are told and looked at once more, so that an
    entry never holds another content than its key says.
    Raises UserError, on all ranks, for an encoding that is not finite (it names the file), for weights that are being
    replaced, for a disk without room for what is missing, and for a folder that cannot be written. Whatever else ends
    one rank (its memory, a worker that died) ends all, as a RuntimeError that names it on the others. Files that cannot
    be read are left out, with a warning: the stream replaces them.
    """
    once = partial(_fill, cache, datasets, encoder, name, batch_size, workers, timeout, thorough, stop)
    filled = once()
    if filled.changed and not filled.stopped:
        if distributed.is_main():
            log.warning("%d files changed while they were encoded: they are looked at once more", filled.changed)
        filled, before = once(), filled.encoded
        filled = filled._replace(encoded=before + filled.encoded)
    if filled.unreadable and distributed.is_main():
        more = [f"and {len(filled.unreadable) - SHOWN} more"] if len(filled.unreadable) > SHOWN else []
        log.warning("not cached, since it cannot be read:\n  %s", "\n  ".join([*filled.unreadable[:SHOWN], *more]))
    return filled


def _fill(
    cache: Cache,
    datasets: Mapping[str, Dataset],
    encoder: Encoder,
    name: str,
    batch_size: int,
    workers: int,
    timeout: float,
    thorough: bool,
    stop: faults.StopRequest | None,
) -> Filled:
    hashless: list[str] = []
    entries = _on_all_ranks(partial(_listed_first, cache, datasets, name, hashless))
    rank, world = distributed.rank(), distributed.world_size()
    mine = {key: one for key, one in entries.items() if int(key[:8], 16) % world == rank}
    missing = list(_on_all_ranks(partial(cache.missing, mine, thorough)).values())
    total = sum(distributed.gather(len(missing)))
    if not total:
        return Filled(len(entries), 0, hashless)
    if distributed.is_main():
        log.info("encoding cache %s: %d of %d entries are missing", cache.folder, total, len(entries))
    share = _Share(cache, encoder, datasets, missing, batch_size, workers, timeout)
    began = told = time.monotonic()
    flags = 0
    with share.writer:
        # The ranks keep step, so that all of them learn at once of a stop or a fault.
        turns = max(distributed.gather(share.turns))
        for turn in range(1, turns + 1):
            share.take_turn()
            flags = distributed.vote((faults.STOP if stop else 0) | (faults.BAD_DATA if share.problem else 0))
            if flags:
                break
            if time.monotonic() - told > PROGRESS_EVERY and distributed.is_main():
                told, done = time.monotonic(), turn / turns
                log.info("encoded about %d of %d, %.0f s left", done * total, total, (told - began) * (1 / done - 1))
        share.settle()
    encoder.free()
    _end_all_ranks(share.problem)
    reports = distributed.gather((share.encoded, share.unreadable))
    encoded = sum(number for number, _ in reports)
    unreadable = [one for _, some in reports for one in some]
    if distributed.is_main():
        log.info("encoding cache: %d entries added in %.0f s", encoded, time.monotonic() - began)
    return Filled(
        len(entries),
        encoded,
        [*hashless, *(one.reason for one in unreadable)],
        sum(one.has_changed for one in unreadable),
        bool(flags & faults.STOP),
    )


def listed(cache: Cache, entries: Mapping[str, Wanted]) -> dict[str, cache_manifests.Listed]:
    """The entries as a manifest lists them."""
    return {
        key: cache_manifests.Listed(one.output, one.name, cache.identities[one.output], one.source)
        for key, one in entries.items()
    }


def _listed_first(cache: Cache, datasets: Mapping[str, Dataset], name: str, unreadable: list[str]) -> dict[str, Wanted]:
    """What is wanted; the manifest that says so is written before the entries, so that nobody prunes them meanwhile."""
    entries = wanted(cache, datasets, unreadable)
    if distributed.is_main():
        cache_manifests.write(cache.folder, name, listed(cache, entries))
    return entries


T = TypeVar("T")


def _on_all_ranks(task: Callable[[], T]) -> T:
    """What each rank's task gives; if one fails, all end."""
    results: list[T] = []
    problem = None
    try:
        results.append(task())
    except Exception as error:
        problem = error
    _end_all_ranks(problem)
    return results[0]


def _end_all_ranks(problem: Exception | None) -> None:
    """Called by all ranks: if any has a problem, each raises its own, or one that tells those of the others."""
    own = (isinstance(problem, UserError), str(problem), type(problem).__name__) if problem is not None else None
    told = {rank: one for rank, one in enumerate(distributed.gather(own)) if one is not None}
    if problem is not None:
        raise problem
    if told and all(is_mistake for is_mistake, *_ in told.values()):
        raise UserError("\n".join(text for _, text, _ in told.values()))
    if told:
        said = "; ".join(f"rank {rank}: {kind}: {text}" for rank, (_, text, kind) in told.items())
        raise RuntimeError(f"the encoding cache cannot be filled: {said}")


class _Unreadable(NamedTuple):
    reason: str
    has_changed: bool = False


Decoded = Tensor | str | _Unreadable


class _Share:
    """What one rank encodes and writes, batch after batch; `problem` says why it cannot go on."""

    def __init__(
        self,
        cache: Cache,
        encoder: Encoder,
        datasets: Mapping[str, Dataset],
        missing: Sequence[Wanted],
        batch_size: int,
        workers: int,
        timeout: float,
    ) -> None:
        self.cache, self.encoder = cache, encoder
        batches = _batches(missing, batch_size)
        self.ahead = Counter(one.output for one in missing)
        self.turns = len(batches)
        self.batches = iter(_loader(datasets, missing, batches, min(workers, self.turns), timeout))
        self.writer = ThreadPoolExecutor(1, "cache")
        self.waiting: list[New] = []
        self.writing: Future[int] | None = None
        self.encoded, self.unreadable = 0, list[_Unreadable]()
        self.compared: set[str] = set()
        self.texts_before = False
        self.problem: Exception | None = None

    def take_turn(self) -> None:
        """Encode one more batch, if there is one, and hand it to the writer."""
        try:
            batch: list[tuple[Wanted, Decoded]] = next(self.batches, [])
            self.unreadable += [value for _, value in batch if isinstance(value, _Unreadable)]
            for ones, values in _alike(batch, self.encoder.device):
                is_text = isinstance(values, list)
                if self.texts_before and not is_text:
                    self.encoder.free()  # T5 need not leave room for the VAE
                self.texts_before = is_text
                encodings = _encode(self.encoder, ones, values)
                self._compare_weights(ones[0].output)
                self._check_space(ones[0].output, encodings[0])
                self.waiting += [
                    New(one.output, one.source, encoding, one.name)
                    for one, encoding in zip(ones, encodings, strict=True)
                ]
            self._write(WAITING)
        except Exception as error:  # all ranks hear of it at the next vote, and each ends with it
            self.problem = error

    def _compare_weights(self, output: str) -> None:
        """Whether the weights, which have been loaded by now, are still those that the keys name."""
        if output not in self.compared and self.encoder.identity(output) != self.cache.identities[output]:
            raise UserError(
                f"the weights that make {output} have changed since they were hashed; nothing was stored of them. "
                "Start again when they are all there"
            )
        self.compared.add(output)

    def _check_space(self, output: str, encoding: Tensor) -> None:
        """Whether there is room for all that is missing of an output; asked once, by the size of its first entry."""
        if output not in self.ahead:
            return
        number = distributed.world_size() * self.ahead.pop(output)
        folder = next(folder for folder in (self.cache.folder, *self.cache.folder.parents) if folder.exists())
        free = shutil.disk_usage(folder).free
        if number * encoding.nbytes > free:
            raise UserError(
                f"the encoding cache in {self.cache.folder} lacks {number} entries of {output}, "
                f"{readable(encoding.nbytes)} each and {readable(number * encoding.nbytes)} in all; {readable(free)} "
                "are free. Choose another folder with cache.folder=…, fewer data, or cache=off, which encodes at each "
                "step"
            )

    def settle(self) -> None:
        """Wait until everything is written."""
        try:
            while self.waiting or self.writing is not None:
                self._write(0)
        except Exception as error:
            self.problem = self.problem or error

    def _write(self, most: int) -> None:
        """Give the writer all that waits when it is free; wait for it if more than `most` entries wait."""
        if self.writing is not None and (self.writing.done() or len(self.waiting) > most or not self.waiting):
            try:
                self.encoded += self.writing.result()
            except OSError as error:
                raise UserError(
                    f"the encoding cache in {self.cache.folder} cannot be written: {error.strerror}. Free some space "
                    "or choose another folder with cache.folder=…; what is written stays"
                ) from error
            finally:
                self.writing = None
        if self.writing is None and self.waiting:
            self.writing, self.waiting = self.writer.submit(self.cache.write_all, self.waiting), []


class _Undecoded(TorchDataset):
    """The values of what is missing, decoded in the loader's workers."""

    def __init__(self, datasets: Mapping[str, Dataset], missing: Sequence[Wanted]) -> None:
        self.datasets, self.missing = datasets, missing
        self._entry: tuple[tuple[str, int], Mapping[str, Sequence[Source | str]]] = (("", -1), {})

    def __getitem__(self, number: int) -> tuple[Wanted, Decoded]:
        one = self.missing[number]
        if one.place is None:
            return one, text_of(one.source)
        try:
            source = self._source(*one.place)
            if source.identity != one.source:
                raise ChangedError(one.name, "has changed since it was listed")
            return one, source.load()
        except BadVideoError as error:
            return one, _Unreadable(str(error), isinstance(error, ChangedError))

    def _source(self, split: str, index: int, field: str, number: int) -> Source:
        """As it is now, which may be another one than was listed. Raises BadVideoError."""
        if self._entry[0] != (split, index):  # its other sources are likely to be the next ones
            self._entry = (split, index), self.datasets[split].sources(index)
        source = self._entry[1][field][number]
        assert isinstance(source, Source)
        return source


def _batches(missing: Sequence[Wanted], size: int) -> list[list[int]]:
    """Numbers of what is missing, in batches of one output each; those of texts come first."""

    def kind(number: int) -> tuple[bool, str]:
        return missing[number].place is not None, missing[number].output

    batches = []
    for _, group in groupby(sorted(range(len(missing)), key=kind), key=kind):
        numbers = list(group)
        batches += [numbers[first : first + size] for first in range(0, len(numbers), size)]
    return batches


def _loader(
    datasets: Mapping[str, Dataset],
    missing: Sequence[Wanted],
    batches: list[list[int]],
    workers: int,
    timeout: float,
) -> DataLoader:
    orphans.end_children_at_exit()
    return DataLoader(
        _Undecoded(datasets, missing),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=list,
        timeout=timeout if workers else 0,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # else it takes its workers' seed from torch's, in runs that fill a cache alone
    )


def _alike(
    batch: Sequence[tuple[Wanted, Decoded]], device: torch.device
) -> Iterator[tuple[list[Wanted], Tensor | list[str]]]:
    """The parts of a batch that can be encoded at once: its texts as a list, its tensors by shape, on the device."""
    parts: dict[Any, list[tuple[Wanted, Any]]] = {}
    for one, value in batch:
        if not isinstance(value, _Unreadable):
            parts.setdefault(value.shape if isinstance(value, Tensor) else None, []).append((one, value))
    for shape, pairs in parts.items():
        ones, values = [one for one, _ in pairs], [value for _, value in pairs]
        yield ones, values if shape is None else torch.stack(values).to(device)


@torch.no_grad()
def _encode(encoder: Encoder, ones: Sequence[Wanted], values: Tensor | list[str]) -> Tensor:
    """The encodings on the CPU. Raises UserError that names the file if one is not finite."""
    try:
        encodings = encoder.encode(ones[0].output, values).cpu()
    except UserError as error:  # the encoder knows rows, not files
        raise UserError(f"{error} The batch was {', '.join(one.name for one in ones)}") from error
    for one, encoding in zip(ones, encodings, strict=True):
        if not torch.isfinite(encoding).all():
            raise UserError(
                f"{one.name}: its {one.output} have values that are not finite, so nothing could be learnt from them. "
                "Look at this file; an encoder in half precision can also overflow: model.encoder.dtype=fp32"
            )
    return encodings
