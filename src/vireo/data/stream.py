"""From a dataset to batches whose content depends only on the step.

The run sees one infinite global stream of positions: epoch = position // n, and the entry is a permutation keyed by
(seed, epoch). A batch is a slice of that stream, so its content does not depend on ranks, loader workers or restarts.
"""

import signal
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

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

    def sources(self, index: int) -> dict[str, list[Source]]:
        """Every cacheable source that this entry can ask for."""
        ...

    def describe(self) -> dict[str, Any]:
        """What it holds, for people: values, and lists of lines."""
        ...


class Stream(TorchDataset):
    """The global stream of one dataset, read batch by batch in the loader's workers.

    A sample whose file cannot be read is replaced by the next entry of the same permutation that can, drawn with the
    sample's own position, so the replacement is the same on every machine; the batch names the file under "bad".
    """

    def __init__(self, dataset: Dataset, seed: int | str, shuffle: bool = True) -> None:
        if len(dataset) == 0:
            raise UserError("the dataset is empty: there is nothing to read")
        self.dataset = dataset
        self.seed = seed
        self.shuffle = shuffle
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        return [self[place] for place in places]

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        """The sample at (position, step)."""
        position, step = place
        draws = Draws(self.seed, [position], step=step)
        n, bad = len(self.dataset), []
        for attempt in range(n):
            try:
                sample = self.dataset.sample(self.index(position, attempt), draws)
                loaded = {key: _load(value) for key, value in sample.items()}
            except BadVideoError as error:
                bad.append((str(error.path), str(error.reason)))
                continue
            return {**loaded, "position": position, "bad": bad}
        raise UserError(f"none of the {n} entries could be read; the last: {bad[-1][0]}: {bad[-1][1]}")

    def batch(self, positions: Sequence[int], device: torch.device) -> dict[str, Any]:
        """The samples at these positions, at step 0, collated and on the device: for held-out clips."""
        return to_device(collate(self.__getitems__([(position, 0) for position in positions])), device)

    def index(self, position: int, attempt: int = 0) -> int:
        """The dataset entry at a position; `attempt` > 0 gives its substitutes."""
        n = len(self.dataset)
        epoch, place = divmod(position, n)
        if not self.shuffle:
            return (place + attempt) % n
        if self._order[0] != epoch:
            self._order = (epoch, order(self.seed, epoch, n))
        return int(self._order[1][(place + attempt) % n])


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


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack tensors along a new first axis; strings and the rest become lists. `position` is int64 (B,)."""
    batch: dict[str, Any] = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        batch[key] = torch.stack(values) if isinstance(values[0], Tensor) else values
    batch["position"] = torch.tensor(batch["position"], dtype=torch.int64)
    batch["bad"] = [pair for pairs in batch["bad"] for pair in pairs]
    return batch


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with every tensor but `position` on the device."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) and key != "position" else value
        for key, value in batch.items()
    }


def _start_worker(worker: int) -> None:
    """One thread each, since the workers are the parallelism; and a stop signal is the main process's business.

    A batch system signals the whole process group: a worker that died of it would end the run before it has saved.
    torch ends workers itself, and kills one that does not listen.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def loader(
    stream: Stream,
    slices: Sampler[list[tuple[int, int]]],
    workers: int = 2,
    timeout: float = 300.0,
    prefetch: int = 2,
    pin: bool = False,
) -> DataLoader:
    """Micro-batches in order. timeout: seconds after which a worker that gives nothing ends the run."""
    return DataLoader(
        stream,
        batch_sampler=slices,
        num_workers=workers,
        collate_fn=collate,
        timeout=timeout if workers else 0,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=_start_worker,
        pin_memory=pin,
    )
