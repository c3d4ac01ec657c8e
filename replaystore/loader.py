"""The DataLoader: batches that are read at once, in this process or in workers, and not collated again."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from replaystore.batches import Batches
from replaystore.handover import Inbox, Parcel, map_leaves

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


class Loader(DataLoader[Tensors]):
    """Gives one by one the batches that were read, and came from a worker, several at a time."""

    def __init__(
        self, dataset: Dataset[Tensors], batches: Batches, *, read_ahead: bool, **kwargs: Any
    ) -> None:
        super().__init__(dataset, batch_sampler=batches, **kwargs)
        self._batches = batches
        self._read_ahead = read_ahead

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Any:
        groups = super().__iter__()
        return self._each(_ahead(groups) if self._read_ahead else groups)

    def _each(self, groups: Iterator[Tensors]) -> Iterator[Tensors]:
        for group in groups:
            for batch in _split(group, self._batches.size):
                self._batches.given(len(batch["ids"]))
                yield batch
        self._batches.end()

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, to go on from with the batch after the last one that it gave."""
        return self._batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state at the next `iter`: the same items in the same order, however many workers."""
        self._batches.load_state_dict(state)


def _split(group: Tensors, size: int) -> Iterator[Tensors]:
    """The batches of so many items, or the last of fewer, that were read together."""
    if len(group["ids"]) <= size:
        yield group
        return
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
