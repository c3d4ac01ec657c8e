"""torch: a map-style dataset over a store, and its DataLoader.

What crosses to a worker process is a path and the heads of the commit; each worker maps the files
for itself and decodes straight into the shared memory that it hands over.
"""

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from replaystore.errors import UsageError
from replaystore.store import CACHE_BYTES, ReplayStore
from replaystore.windows import Batch, Transition

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
        item: Tensors = _map_arrays(batch, lambda tensor: tensor[0])
        return item

    def __getitems__(self, numbers: "Sequence[int] | np.ndarray | _Numbers") -> "Items":
        if isinstance(numbers, _Numbers):
            if numbers.refreshed != self._refreshed:
                raise UsageError(
                    "the dataset was refreshed, but persistent workers hold the old commit: make a new loader"
                )
            numbers = numbers.numbers
        return Items(self.batch(np.asarray(numbers)))

    def batch(self, numbers: np.ndarray) -> Tensors:
        """Read transitions by number, as one dict of tensors with the batch first."""
        memory = _Memory(shared=get_worker_info() is not None)
        batch = self.store.read(numbers, self.window, allocate=memory.allocate)
        return {name: _map_arrays(value, memory.tensor) for name, value in _items(batch)}

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
        **kwargs: Any,
    ) -> "DataLoader[Tensors]":
        """A `DataLoader` whose every batch is read at once and not collated again.

        One pass is an epoch: each transition once, in a new order every time if `shuffle`, which
        `seed` makes reproducible. Other arguments go to `DataLoader`.
        """
        batches = _Batches(self, batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)
        return DataLoader(
            self,
            batch_sampler=batches,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=persistent_workers,
            collate_fn=_collated,
            **kwargs,
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_store": None}


class Items(Sequence[Tensors]):
    """A batch that is one dict of tensors, and also the list of items that torch asks for."""

    def __init__(self, batch: Tensors) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["ids"])

    def __getitem__(self, number: Any) -> Any:
        return _map_arrays(self.batch, lambda tensor: tensor[number])


class _Numbers(NamedTuple):
    """The transitions of a batch, and the commit of the dataset that they count in."""

    numbers: np.ndarray
    refreshed: int


class _Batches(Sampler[Any]):
    """The numbers of each batch of an epoch."""

    def __init__(
        self, dataset: ReplayDataset, batch_size: int, *, shuffle: bool, seed: int | None, drop_last: bool
    ) -> None:
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise UsageError(f"batch_size: expected an int from 1, got {batch_size!r}")
        if not len(dataset):
            raise UsageError("loader: expected at least one transition, the store has none")
        self._dataset = dataset
        self._batch_size = batch_size
        self._rng = np.random.default_rng(seed) if shuffle else None
        self._drop_last = drop_last

    def __len__(self) -> int:
        batches = len(self._dataset) / self._batch_size
        return math.floor(batches) if self._drop_last else math.ceil(batches)

    def __iter__(self) -> Iterator[_Numbers]:
        length = len(self._dataset)
        order = np.arange(length) if self._rng is None else self._rng.permutation(length)
        for batch in range(len(self)):
            numbers = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            yield _Numbers(numbers, self._dataset.refreshed)


class _Memory:
    """Arrays to read into, and the tensors over the same memory; in a worker it is shared."""

    def __init__(self, *, shared: bool) -> None:
        self._shared = shared
        self._made: list[tuple[int, torch.Tensor]] = []

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        if not self._shared:
            return np.empty(shape, dtype)
        nbytes = max(1, math.prod(shape) * dtype.itemsize)
        storage = torch.UntypedStorage._new_shared(nbytes)  # type: ignore[no-untyped-call]
        flat = torch.empty(0, dtype=torch.uint8).set_(storage)
        self._made.append((flat.data_ptr(), flat))
        return flat.numpy()[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """The array as a tensor; a view of shared memory stays one."""
        view = torch.from_numpy(array)
        for address, flat in self._made:
            offset = array.ctypes.data - address
            if 0 <= offset < len(flat):
                typed = flat[: len(flat) // array.itemsize * array.itemsize].view(view.dtype)
                return typed.as_strided(array.shape, view.stride(), offset // array.itemsize)
        return view


def _items(batch: Batch) -> Iterator[tuple[str, Any]]:
    for name in batch.__dataclass_fields__:
        if name != "extra":
            yield name, getattr(batch, name)
    yield from batch.extra.items()


def _map_arrays(value: Any, function: Any) -> Any:
    if isinstance(value, dict):
        return {name: _map_arrays(child, function) for name, child in value.items()}
    if isinstance(value, tuple):
        return tuple(_map_arrays(child, function) for child in value)
    return function(value)


def _collated(items: Any) -> Tensors:
    """The batch of an `Items`, which needs no collating."""
    batch: Tensors = items.batch
    return batch
