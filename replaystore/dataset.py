"""torch: a map-style dataset over a store, and its DataLoader.

What crosses to a worker process is a path and the heads of the commit; each worker maps the files
for itself and decodes straight into the shared memory that it hands over (`handover.py`).
"""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from replaystore.errors import UsageError
from replaystore.handover import Inbox, Outbox, Parcel, map_leaves
from replaystore.store import CACHE_BYTES, ReplayStore
from replaystore.windows import Batch, Transition

READ_AT_ONCE = 256  # transitions of the batches that are read together

Tensors = dict[str, Any]


class ReplayDataset(Dataset[Tensors]):
    """The transitions of a store as of one commit, as dicts of tensors.

    `dataset[i]` is one item; `dataset.__getitems__(numbers)` a batch that was read at once. Keys
    are those of `Batch`, with the user's own fields beside them; Dict and Tuple spaces stay
    nested. `len(dataset)` stays as it is until `refresh()`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        window: Transition | None = None,
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.window = window or Transition()
        self._path = os.path.abspath(path)
        self._cache_bytes = cache_bytes
        self._store: ReplayStore | None = None
        self._outbox: Outbox | None = None  # of a worker
        self._refreshed = -1
        self.refresh()

    def refresh(self) -> None:
        """Move to the store's newest commit. Loaders with persistent workers must be made anew."""
        if self._store is not None:
            self._store.close()
        self._store = ReplayStore.open(self._path, cache_bytes=self._cache_bytes)
        self._heads = self._store.snapshot
        self._length = len(self._store)
        self._refreshed += 1

    @property
    def refreshed(self) -> int:
        """How often the dataset has moved to a newer commit."""
        return self._refreshed

    @property
    def store(self) -> ReplayStore:
        """The store, opened in this process at the dataset's commit."""
        if self._store is None:
            self._store = ReplayStore.open(self._path, cache_bytes=self._cache_bytes, heads=self._heads)
        return self._store

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> Tensors:
        index = number + self._length if number < 0 else number
        if not 0 <= index < self._length:
            raise IndexError(f"expected a number below {self._length}, got {number}")
        batch = self.batch(np.array([index]))
        item: Tensors = map_leaves(batch, lambda tensor: tensor[0])
        return item

    def __getitems__(self, numbers: "Sequence[int] | np.ndarray | _Numbers") -> "Items":
        if isinstance(numbers, _Numbers):
            if numbers.refreshed != self._refreshed:
                raise UsageError(
                    "the dataset was refreshed, but persistent workers hold the old commit: make a new loader"
                )
            numbers = numbers.numbers
        numbers = np.asarray(numbers)
        if get_worker_info() is None:
            return Items(_named(self.store.read(numbers, self.window)))
        self._outbox = self._outbox or Outbox()
        parcel = self._outbox.begin()
        arrays = _named(self.store.read(numbers, self.window, allocate=parcel.allocate))
        return Items(arrays, parcel.filled(arrays))

    def batch(self, numbers: np.ndarray) -> Tensors:
        """Read transitions by number, as one dict of tensors with the batch first."""
        return Items(_named(self.store.read(numbers, self.window))).batch

    def loader(
        self,
        batch_size: int = 256,
        *,
        shuffle: bool = True,
        seed: int | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        persistent_workers: bool = False,
        read_ahead: bool = False,
        **kwargs: Any,
    ) -> "DataLoader[Tensors]":
        """A `DataLoader` whose batches are read at once and not collated again.

        One pass is an epoch: each transition once, in a new order every time if `shuffle`, which
        `seed` makes reproducible. `read_ahead` reads on a thread of this process, while the last
        batches are used. Other arguments go to `DataLoader`.
        """
        batches = _Batches(self, batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)
        return _Loader(
            self,
            batches,
            read_ahead=read_ahead,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=persistent_workers,
            collate_fn=_Collated(),
            **kwargs,
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_store": None, "_outbox": None}


class Items(Sequence[Tensors]):
    """A batch that is one dict of tensors, and also the list of items that torch asks for.

    In a worker, `parcel` is the batch on its way to the process that asked for it.
    """

    def __init__(self, arrays: dict[str, Any], parcel: Parcel | None = None) -> None:
        self._arrays = arrays
        self.parcel = parcel

    @cached_property
    def batch(self) -> Tensors:
        batch: Tensors = map_leaves(self._arrays, torch.from_numpy)
        return batch

    def __len__(self) -> int:
        return len(self._arrays["ids"])

    def __getitem__(self, number: Any) -> Any:
        return map_leaves(self.batch, lambda tensor: tensor[number])


class _Numbers(NamedTuple):
    """Transitions to read at once, and the commit of the dataset that they count in."""

    numbers: np.ndarray
    refreshed: int


class _Batches(Sampler[Any]):
    """The numbers of an epoch's batches, small batches several at a time."""

    def __init__(
        self, dataset: ReplayDataset, batch_size: int, *, shuffle: bool, seed: int | None, drop_last: bool
    ) -> None:
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise UsageError(f"batch_size: expected an int from 1, got {batch_size!r}")
        if not len(dataset):
            raise UsageError("loader: expected at least one transition, the store has none")
        self.size = batch_size
        self._dataset = dataset
        self._rng = np.random.default_rng(seed) if shuffle else None
        self._drop_last = drop_last

    @property
    def count(self) -> int:
        """Batches of an epoch."""
        batches = len(self._dataset) / self.size
        return math.floor(batches) if self._drop_last else math.ceil(batches)

    def __iter__(self) -> Iterator[_Numbers]:
        length = len(self._dataset)
        order = np.arange(length) if self._rng is None else self._rng.permutation(length)
        order = order[: self.count * self.size]
        step = max(1, READ_AT_ONCE // self.size) * self.size
        for start in range(0, len(order), step):
            yield _Numbers(order[start : start + step], self._dataset.refreshed)


class _Loader(DataLoader[Tensors]):
    """Gives one by one the batches that were read, and came from a worker, several at a time."""

    def __init__(self, dataset: ReplayDataset, batches: _Batches, *, read_ahead: bool, **kwargs: Any) -> None:
        super().__init__(dataset, batch_sampler=batches, **kwargs)
        self._batches = batches
        self._read_ahead = read_ahead

    def __len__(self) -> int:
        return self._batches.count

    def __iter__(self) -> Any:
        groups = super().__iter__()
        return self._each(_ahead(groups) if self._read_ahead else groups)

    def _each(self, groups: Iterator[Tensors]) -> Iterator[Tensors]:
        size = self._batches.size
        for group in groups:
            parts = map_leaves(group, lambda tensor: list(tensor.split(size)))
            for part in range(len(parts["ids"])):
                yield map_leaves(parts, itemgetter(part))


def _ahead(groups: Iterator[Tensors]) -> Iterator[Tensors]:
    """Get the next one on a thread while the last one is used."""
    with ThreadPoolExecutor(1, "replaystore-read-ahead") as thread:
        coming = thread.submit(next, groups, None)
        while (group := coming.result()) is not None:
            coming = thread.submit(next, groups, None)
            yield group


class _Collated:
    """The batch of an `Items`, which needs no collating; from a worker it comes as a parcel."""

    def __init__(self) -> None:
        self._inbox = Inbox()
        self._number = self._inbox.number

    def __call__(self, items: Any) -> Any:
        if items.parcel is None:
            return items.batch
        items.parcel.inbox = self._number
        return items.parcel

    def __getstate__(self) -> dict[str, Any]:
        return {"_number": self._number}  # a worker needs no more


def _named(batch: Batch) -> dict[str, Any]:
    named = batch._asdict()
    named |= named.pop("extra")
    return named
