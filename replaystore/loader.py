"""The DataLoader: batches that are read at once, in this process or in workers, and not collated again."""

import abc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from replaystore.batches import Batches, Drawn, Numbered
from replaystore.errors import UsageError
from replaystore.handover import Inbox, Outbox, Parcel, map_leaves
from replaystore.recycler import Allocate
from replaystore.samplers import Sampler

SENT_AT_ONCE = 1024  # items that a worker reads at once, as a message costs what 20 of them do
SENT_BYTES = 1 << 26  # but no more than this, if that is not less than are drawn together
SMALL_AT_ONCE = 4096  # or this many if they are small,
SMALL_BYTES = 1 << 20  # no more than this in all, also without workers
POOL_BYTES = 1 << 27  # of a pool that are read at once

Tensors = dict[str, Any]


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


class Loadable(Dataset[Tensors], Numbered, abc.ABC):
    """A map-style dataset of which batches are read at once, here or in a worker."""

    def __init__(self) -> None:
        self._outbox: Outbox | None = None  # of a worker

    @property
    @abc.abstractmethod
    def together(self) -> int:
        """How many items the batches that are drawn and read together have."""

    @property
    @abc.abstractmethod
    def item_nbytes(self) -> int:
        """Bytes of memory that an item may take."""

    @abc.abstractmethod
    def read(
        self,
        numbers: np.ndarray,
        weights: np.ndarray | None = None,
        seeds: np.ndarray | None = None,
        allocate: Allocate | None = None,
    ) -> dict[str, Any]:
        """Items by number as nested arrays, transformed; with the weights and seeds that were drawn."""

    def __getitem__(self, number: int) -> Tensors:
        index = number + len(self) if number < 0 else number
        if not 0 <= index < len(self):
            raise IndexError(f"expected a number below {len(self)}, got {number}")
        batch = self.batch(np.array([index]))
        item: Tensors = map_leaves(batch, lambda tensor: tensor[0])
        return item

    def __getitems__(self, numbers: Sequence[int] | np.ndarray | Drawn) -> Items:
        drawn = numbers if isinstance(numbers, Drawn) else Drawn(np.asarray(numbers), None, None, self.commit)
        if drawn.commit != self.commit:
            raise UsageError(
                "the dataset was refreshed, but persistent workers hold the old commit: make a new loader"
            )
        if get_worker_info() is None:
            return Items(self.read(*drawn[:3]))
        self._outbox = self._outbox or Outbox()
        parcel = self._outbox.begin()
        arrays = self.read(*drawn[:3], parcel.allocate)
        return Items(arrays, parcel.filled(arrays))

    def _read_at_once(self, sampler: Sampler, num_workers: int) -> int:
        """How many items of small batches are read at once: a pool and some, what a worker sends, or small ones."""
        if self.together == 1 or not len(self):
            return 1
        nbytes = self.item_nbytes
        if sampler.pool > self.together:
            return min(sampler.pool + self.together, POOL_BYTES // nbytes)
        sent = min(SENT_AT_ONCE, SENT_BYTES // nbytes) if num_workers else 1
        return max(sent, min(SMALL_AT_ONCE, SMALL_BYTES // nbytes))

    def batch(self, numbers: np.ndarray) -> Tensors:
        """Read items by number, as one dict of tensors with the batch first."""
        return Items(self.read(numbers)).batch

    def _loader(
        self,
        batch_size: int,
        sampler: Sampler,
        *,
        seed: int | None,
        drop_last: bool,
        num_workers: int,
        read_ahead: bool,
        **kwargs: Any,
    ) -> "Loader":
        """A loader of what a sampler draws, of which small batches are read several at a time."""
        batches = Batches(
            self,
            batch_size,
            sampler=sampler,
            seed=seed,
            drop_last=drop_last,
            together=self.together,
            at_once=self._read_at_once(sampler, num_workers),
        )
        return Loader(
            self,
            batches,
            read_ahead=read_ahead,
            num_workers=num_workers,
            collate_fn=self.collate_fn(),
            **kwargs,
        )

    def collate_fn(self) -> "Collated":
        """What makes a batch of `__getitems__`'s result, without collating it again."""
        return Collated()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_outbox": None}


class Loader(DataLoader[Tensors]):
    """Gives one by one the batches that were read, and came from a worker, several at a time."""

    def __init__(self, dataset: Loadable, batches: Batches, *, read_ahead: bool, **kwargs: Any) -> None:
        super().__init__(dataset, batch_sampler=batches, **kwargs)
        self._batches = batches
        self._read = dataset.__getitems__
        self._read_ahead = read_ahead

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Any:
        groups = super().__iter__() if self.num_workers or self.pin_memory else self._read_here()
        return self._each(_ahead(groups) if self._read_ahead else groups)

    def _read_here(self) -> Iterator[Tensors]:
        """What torch's iterator gives without workers, and takes a twentieth of a batch's time for."""
        for drawn in self._batches:
            yield self._read(drawn).batch

    def _each(self, groups: Iterator[Tensors]) -> Iterator[Tensors]:
        for group in groups:
            batches = _split(group, self._batches.size)
            del group  # whose memory is used again once the user has let go of its last batch
            for batch in batches:
                self._batches.given(len(batch["ids"]))
                yield batch
                del batch
        self._batches.end()

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, to go on from with the batch after the last one that it gave."""
        return self._batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state at the next `iter`: the same items in the same order, however many workers."""
        self._batches.load_state_dict(state)


def _split(group: Tensors, size: int) -> Iterator[Tensors]:
    """The batches of so many items, or the last of fewer, that were read together."""
    length = len(group["ids"])
    if length <= size:
        yield group
        return
    parts = map_leaves(group, lambda tensor: iter(tensor.unsafe_split(size)))  # without a record for autograd
    del group
    for _ in range(0, length, size):
        yield map_leaves(parts, next)


def _ahead(groups: Iterator[Tensors]) -> Iterator[Tensors]:
    """Get the next one on a thread while the last one is used."""
    with ThreadPoolExecutor(1, "replaystore-read-ahead") as thread:
        coming = thread.submit(next, groups, None)
        while (group := coming.result()) is not None:
            coming = thread.submit(next, groups, None)
            yield group


class Collated:
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
