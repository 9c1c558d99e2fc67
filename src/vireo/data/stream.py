"""From a dataset to batches whose content depends only on the step.

The run sees one infinite global stream of positions: epoch = position // n, and the entry is a permutation keyed by
(seed, epoch). A batch is a slice of that stream, so its content does not depend on ranks, loader workers or restarts.
"""

import functools
import multiprocessing
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from vireo import orphans
from vireo.cache import Cache, literal, text_identity
from vireo.data.source import Source
from vireo.errors import UserError
from vireo.randomness import Draws, order
from vireo.video_io import BadVideoError


class Dataset(Protocol):
    """What every dataset offers; shapes and ranges stand in each one's docstring.

    max_bad_fraction: largest share of its files that may turn out unreadable.
    """

    max_bad_fraction: float

    def __len__(self) -> int: ...

    def sample(self, index: int, draws: Draws) -> dict[str, Any]:
        """One sample: tensors, strings and undecoded sources. `draws` holds one position."""
        ...

    def sources(self, index: int) -> Mapping[str, Sequence[Source | str]]:
        """By field, every source and every text that this entry can ask for and that is worth a cache. Finite.

        Identities are those of the files as they are now, for `sample` as well from then on.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What it holds, for people: values, and lists of lines."""
        ...


class Drawn(NamedTuple):
    """One sample before its sources are decoded; attempt: how many entries before it could not be read."""

    sample: dict[str, Any]
    attempt: int
    bad: list[tuple[str, str]]


class Stream(TorchDataset):
    """The global stream of one dataset, read batch by batch in the loader's workers.

    A sample whose file cannot be read is replaced by the next entry of the same permutation that can, drawn with the
    sample's own position, so the replacement is the same on every machine; the batch names the file under "bad".

    cache: of the encoder that the batches are for. Where it has all outputs of a field for all samples of a batch, the
    batch gets these instead of the field, which is not decoded then; of a batch that is half cached, the field is
    decoded for all samples, since only equal samples can be stacked. Texts cost nothing and stay in the batch.
    keep_fields: whether the others stay as well, beside their outputs, for samplers that show and measure them.
    """

    def __init__(
        self,
        dataset: Dataset,
        seed: int | str,
        shuffle: bool = True,
        cache: Cache | None = None,
        keep_fields: bool = False,
    ) -> None:
        if len(dataset) == 0:
            raise UserError("the dataset is empty: there is nothing to read")
        self.dataset = dataset
        self.seed = seed
        self.shuffle = shuffle
        self.cache = cache
        self.keep_fields = keep_fields
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        """The sample at (position, step)."""
        return self.samples([place])[0]

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        return self.samples(places)

    def samples(self, places: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        """The samples of one batch at these (position, step)s: with the same keys, ready for `collate`."""
        drawn = [self._draw(position, step) for position, step in places]
        decoded: list[dict[str, Any]] = [{} for _ in places]
        while True:
            cached = self._cached([one.sample for one in drawn])
            row = 0
            try:
                for row, one in enumerate(drawn):
                    self._decode(one.sample, decoded[row], cached[row])
            except BadVideoError as error:
                bad = [*drawn[row].bad, (str(error.path), str(error.reason))]
                drawn[row] = self._draw(*places[row], drawn[row].attempt + 1, bad)
                decoded[row] = {}
                continue  # what is cached of its substitute is another question
            return [
                {**fields, **outputs, "position": position, "bad": one.bad}
                for (position, _), one, fields, outputs in zip(places, drawn, decoded, cached, strict=True)
            ]

    def batch(self, positions: Sequence[int], device: torch.device) -> dict[str, Any]:
        """The samples at these positions, at step 0, collated and on the device: for held-out clips."""
        return to_device(collate(self.samples([(position, 0) for position in positions])), device)

    def index(self, position: int, attempt: int = 0) -> int:
        """The dataset entry at a position; `attempt` > 0 gives its substitutes."""
        n = len(self.dataset)
        epoch, place = divmod(position, n)
        if not self.shuffle:
            return (place + attempt) % n
        if self._order[0] != epoch:
            self._order = (epoch, order(self.seed, epoch, n))
        return int(self._order[1][(place + attempt) % n])

    def _draw(self, position: int, step: int, attempt: int = 0, bad: Sequence[tuple[str, str]] = ()) -> Drawn:
        """The first sample from `attempt` on that the dataset gives; `bad`: what could not be read before it."""
        draws, n, bad = Draws(self.seed, [position], step=step), len(self.dataset), list(bad)
        for turn in range(attempt, n):
            try:
                return Drawn(self.dataset.sample(self.index(position, turn), draws), turn, bad)
            except BadVideoError as error:
                bad.append((str(error.path), str(error.reason)))
        raise UserError(f"none of the {n} entries could be read; the last: {bad[-1][0]}: {bad[-1][1]}")

    def _decode(self, sample: dict[str, Any], decoded: dict[str, Any], outputs: dict[str, Tensor]) -> None:
        """Bring `decoded` to the fields of the sample that the batch needs beside these cached outputs."""
        for field, value in sample.items():
            if not self.keep_fields and self._is_replaced(field, value, outputs):
                decoded.pop(field, None)
            elif field not in decoded:
                decoded[field] = _load(value)

    def _is_replaced(self, field: str, value: Any, outputs: dict[str, Tensor]) -> bool:
        if self.cache is None or isinstance(value, str):
            return False
        return any(self.cache.outputs[output] == field for output in outputs)

    def _cached(self, samples: Sequence[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """For each sample the outputs that need no encoder: the same ones for all."""
        rows: list[dict[str, Tensor]] = [{} for _ in samples]
        if self.cache is None:
            return rows
        by_field: dict[str, list[str]] = {}
        for output, field in self.cache.outputs.items():
            by_field.setdefault(field, []).append(output)
        for field, outputs in by_field.items():
            text = literal(field)
            values = [text] * len(samples) if text is not None else [sample.get(field) for sample in samples]
            found = list(_all_cached(self.cache, outputs, values))
            if len(found) == len(samples):
                for row, one in zip(rows, found, strict=True):
                    row.update(one)
        return rows


def _all_cached(cache: Cache, outputs: Sequence[str], values: Sequence[Any]) -> Iterator[dict[str, Tensor]]:
    """The outputs for each value of a field, up to the first value for which one is missing."""
    for value in values:
        row = {}
        for output in outputs:
            cached = _from_cache(cache, output, value)
            if cached is None:
                return
            row[output] = cached
        yield row


def _from_cache(cache: Cache, output: str, value: Any) -> Tensor | None:
    """One output of a text, of a source, or of a list of sources (stacked); None if anything is missing."""
    if isinstance(value, str):
        return cache.read(output, text_identity(value))
    if isinstance(value, Source):
        return None if value.identity is None else cache.read(output, value.identity)
    if not isinstance(value, list):
        return None
    parts = []
    for source in value:
        part = _from_cache(cache, output, source)
        if part is None:
            return None
        parts.append(part)
    return torch.stack(parts) if parts else None


def _load(value: Any) -> Any:
    if isinstance(value, Source):
        return value.load()
    if isinstance(value, list) and value and isinstance(value[0], Source):
        return torch.stack([source.load() for source in value])
    return value


class Slices(Sampler[list[tuple[int, int]]]):
    """The micro-batches of one rank, as lists of (position, step).

    The global batch of a step is `batch_size * world_size * accumulation` consecutive positions; micro-step m takes
    the m-th run of `batch_size * world_size` of them and rank r its r-th part. So two ranks, or two micro-steps, see
    together what one bigger batch would see.
    """

    def __init__(
        self, position: int, step: int, steps: int, batch_size: int, accumulation: int, rank: int, world_size: int
    ) -> None:
        self.position, self.step, self.steps = position, step, steps
        self.batch_size, self.accumulation = batch_size, accumulation
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        position, share = self.position, self.batch_size * self.world_size
        for step in range(self.step, self.steps):
            for _ in range(self.accumulation):
                first = position + self.rank * self.batch_size
                yield [(p, step) for p in range(first, first + self.batch_size)]
                position += share


def collate(samples: list[dict[str, Any]], views: bool = True) -> dict[str, Any]:
    """Stack tensors along a new first axis; strings and the rest become lists. `position` is int64 (B,).

    views: whether one and the same tensor in all samples, such as a null prompt, may become a view without copies.
    Raises UserError for tensors of different shapes.
    """
    batch: dict[str, Any] = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        first = values[0]
        if not isinstance(first, Tensor):
            batch[key] = values
        elif views and len(values) > 1 and all(value is first for value in values):
            batch[key] = first.expand(len(values), *first.shape)
        elif len({value.shape for value in values}) > 1:
            shapes = ", ".join(str(tuple(value.shape)) for value in values)
            raise UserError(
                f"samples of one batch differ in shape, {key}: {shapes}; batch_size=1 takes them one by one"
            )
        else:
            batch[key] = torch.stack(values)
    batch["position"] = torch.tensor(batch["position"], dtype=torch.int64)
    batch["bad"] = [pair for pairs in batch["bad"] for pair in pairs]
    return batch


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with every tensor but `position` on the device."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) and key != "position" else value
        for key, value in batch.items()
    }


def start_worker(worker: int) -> None:
    """One thread each, since the workers are the parallelism; and a stop signal is the main process's business.

    A batch system signals the whole process group: a worker that died of it would end the run before it has saved. When
    the main process is gone, so is the worker, whatever it hangs in.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        orphans.die_with_parent(parent.pid, signal.SIGKILL)


def loader(
    stream: Stream,
    slices: Sampler[list[tuple[int, int]]],
    workers: int = 2,
    timeout: float = 300.0,
    prefetch: int = 2,
    pin: bool = False,
) -> DataLoader:
    """Micro-batches in order. timeout: seconds after which a worker that gives nothing ends the run."""
    orphans.end_children_at_exit()
    return DataLoader(
        stream,
        batch_sampler=slices,
        num_workers=workers,
        collate_fn=functools.partial(collate, views=not pin),  # torch cannot pin a view
        timeout=timeout if workers else 0,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=start_worker,
        pin_memory=pin,
    )
