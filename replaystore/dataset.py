"""torch: a map-style dataset over a store, and its DataLoader.

What crosses to a worker process is a path and the heads of the commit; each worker maps the files
for itself and decodes straight into the shared memory that it hands over (`handover.py`).
"""

import os
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from replaystore.batches import Batches
from replaystore.errors import UsageError
from replaystore.goals import Relabelled
from replaystore.handover import leaves, map_leaves, memory_of
from replaystore.index import EpisodeIndex
from replaystore.loader import Loadable, Loader, Tensors
from replaystore.recycler import Allocate
from replaystore.samplers import InOrder, Sampler, Uniform
from replaystore.selection import Selection, check_sampler, check_window, item_of
from replaystore.store import CACHE_BYTES, ReplayStore
from replaystore.windows import Transition, Window, takes_seeds

READ_AT_ONCE = 256  # items of the batches that are drawn and read together


class ReplayDataset(Loadable):
    """The items of a store as of one commit, as dicts of tensors.

    `dataset[i]` is one item; `dataset.__getitems__(numbers)` a batch that was read at once. Keys
    are those of the window's batch, with the user's own fields beside them; Dict and Tuple spaces
    stay nested. `where`, a pyarrow expression, keeps only the episodes for which it holds.
    `transform` gets the dict of tensors where it is read, with the items of several batches at once,
    and returns one to take its place.
    `len(dataset)` stays as it is until `refresh()`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        window: Window | None = None,
        *,
        where: pc.Expression | None = None,
        transform: Callable[[Tensors], Tensors] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if transform is not None and not callable(transform):
            raise UsageError(f"transform: expected a function of a dict of tensors, got {transform!r}")
        self._transform = transform
        self.window = check_window(window)
        self._path = os.path.abspath(path)
        self._where = where
        self._cache_bytes = cache_bytes
        self._store: ReplayStore | None = None
        self._selection: Selection | None = None
        super().__init__()
        self.refresh()

    def refresh(self) -> None:
        """Move to the store's newest commit. Loaders with persistent workers must be made anew."""
        self.show(None)

    def show(self, heads: dict[int, bytes] | None) -> None:
        """Move to the commit of a store's `snapshot`, or to the newest."""
        self.close()
        self._store = ReplayStore.open(self._path, cache_bytes=self._cache_bytes, heads=heads)
        self._heads = self._store.snapshot
        self._length = self.selection.count(self.window)
        self._commit = _fingerprint(self._heads)

    def close(self) -> None:
        """Let the store's files go; they are opened again when they are needed."""
        if self._store is not None:
            self._store.close()
        self._store = self._selection = None

    @property
    def commit(self) -> int:
        """A checksum of the commit that the dataset shows, to tell it from others."""
        return self._commit

    @property
    def snapshot(self) -> dict[int, bytes]:
        """The commit that the dataset shows, for `show`."""
        return self._heads

    @property
    def store(self) -> ReplayStore:
        """The store, opened in this process at the dataset's commit."""
        if self._store is None:
            self._store = ReplayStore.open(self._path, cache_bytes=self._cache_bytes, heads=self._heads)
        return self._store

    @property
    def selection(self) -> Selection:
        """The episodes of the dataset."""
        if self._selection is None:
            self._selection = self.store if self._where is None else self.store.where(self._where)
        return self._selection

    @property
    def items(self) -> EpisodeIndex:
        """The index of its items."""
        return self.selection.items(self.window)

    @property
    def takes_seeds(self) -> bool:
        """Whether an item is read with a seed."""
        return takes_seeds(self.window)

    @property
    def together(self) -> int:
        """How many items the batches that are drawn and read together have."""
        return READ_AT_ONCE if isinstance(self.window, Transition | Relabelled) else 1

    @property
    def item_nbytes(self) -> int:
        """Bytes of memory that an item may take; a transform is taken to make floats of bytes."""
        one = np.zeros(1, np.int64)
        window = self.window.seeded(one) if takes_seeds(self.window) else self.window
        return memory_of(self.selection.read(one, window)) * (1 if self._transform is None else 4)

    def check_has_items(self) -> None:
        """Raise `UsageError` if there is nothing to load."""
        if not len(self):
            raise UsageError(f"loader: expected at least one {item_of(self.window)}, {self._path} has none")

    @property
    def episodes(self) -> pa.Table:
        """The table of its episodes, as `store.episodes`."""
        return self.selection.episodes

    def state_dict(self) -> dict[str, Any]:
        """The commit that the dataset shows; torchdata brings it to the workers."""
        return {"heads": self._heads}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Show the commit of a state, unless it is shown already."""
        if state["heads"] != self._heads:
            self.show(state["heads"])

    def __len__(self) -> int:
        return self._length

    def read(
        self,
        numbers: np.ndarray,
        weights: np.ndarray | None = None,
        seeds: np.ndarray | None = None,
        allocate: Allocate | None = None,
    ) -> dict[str, Any]:
        """Items by number as nested arrays, transformed; with the weights and seeds that were drawn."""
        window = self.window
        if seeds is not None and takes_seeds(window):
            window = window.seeded(seeds)
        arrays = _named(self.selection.read(numbers, window, weights=weights, allocate=allocate))
        if self._transform is None:
            return arrays
        return _transformed(self._transform(map_leaves(arrays, torch.from_numpy)), len(numbers))

    def batches(
        self,
        batch_size: int = 256,
        sampler: Sampler | None = None,
        *,
        seed: int | None = None,
        drop_last: bool = False,
    ) -> "Batches":
        """A batch sampler, for a DataLoader of one's own; `loader` has one already.

        With torchdata: `StatefulDataLoader(dataset, batch_sampler=dataset.batches(256),
        collate_fn=dataset.collate_fn())`.
        """
        sampler = self._sampler(sampler, seed)
        return Batches(self, batch_size, sampler=sampler, seed=seed, drop_last=drop_last, together=None)

    def loader(
        self,
        batch_size: int = 256,
        *,
        sampler: Sampler | None = None,
        shuffle: bool = True,
        seed: int | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        persistent_workers: bool = False,
        read_ahead: bool = False,
        **kwargs: Any,
    ) -> "Loader":
        """A `DataLoader` whose batches are read at once and not collated again.

        Without a sampler one pass is an epoch: each item once, in a new order every time if
        `shuffle`, which `seed` makes reproducible. A sampler that never comes to an end draws as
        many items a pass as there are; it stays in this process, workers only read. Under
        `torch.distributed` each rank gets a share of every draw. `read_ahead` reads on a thread of
        this process, while the last batches are used. Other arguments go to `DataLoader`.
        """
        if sampler is None and not shuffle:
            sampler = InOrder()
        return self._loader(
            batch_size,
            self._sampler(sampler, seed),
            seed=seed,
            drop_last=drop_last,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=persistent_workers,
            read_ahead=read_ahead,
            **kwargs,
        )

    def _sampler(self, sampler: Sampler | None, seed: int | None) -> Sampler:
        """What is to draw, or `UsageError` if there is nothing to draw from."""
        self.check_has_items()
        return Uniform(replace=False, seed=seed) if sampler is None else check_sampler(sampler)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_store": None, "_selection": None}


def _fingerprint(heads: dict[int, bytes]) -> int:
    checksum = 0
    for stream, head in sorted(heads.items()):
        checksum = zlib.crc32(head, zlib.crc32(str(stream).encode(), checksum))
    return checksum


def _transformed(batch: Any, items: int) -> dict[str, Any]:
    """What a transform gave, as arrays."""
    if not isinstance(batch, dict) or "ids" not in batch:
        raise UsageError(f"transform: expected it to return the dict of tensors, got {type(batch)}")
    for leaf in leaves(batch):
        if not isinstance(leaf, torch.Tensor) or leaf.shape[:1] != (items,):
            got = f"one of shape {tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else type(leaf)
            raise UsageError(f"transform: expected tensors of {items} items, as it was given, got {got}")
    try:
        arrays: dict[str, Any] = map_leaves(batch, torch.Tensor.numpy)
    except (TypeError, RuntimeError) as error:
        raise UsageError(f"transform: expected tensors that numpy can hold: {error}") from error
    return arrays


def _named(batch: Any) -> dict[str, Any]:
    named: dict[str, Any] = batch._asdict()
    named |= named.pop("extra")
    return named
