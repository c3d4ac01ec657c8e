"""torch: a map-style dataset over a store, and its DataLoader.

What crosses to a worker process is a path and the heads of the commit; each worker maps the files
for itself and decodes straight into the shared memory that it hands over (`handover.py`).
"""

import math
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data import Sampler as TorchSampler

from replaystore.errors import UsageError
from replaystore.goals import Relabelled
from replaystore.handover import Inbox, Outbox, Parcel, map_leaves
from replaystore.reader import Allocate
from replaystore.samplers import InOrder, Sampler, Shuffled, Uniform
from replaystore.selection import Selection, check_sampler, check_window, item_of
from replaystore.store import CACHE_BYTES, ReplayStore
from replaystore.windows import Transition, Window

READ_AT_ONCE = 256  # items of the batches that are read together

Tensors = dict[str, Any]


class ReplayDataset(Dataset[Tensors]):
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
        self._outbox: Outbox | None = None  # of a worker
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

    def reserve(self, rows: int) -> None:
        """Keep so many decoded rows in memory, or more."""
        nbytes = rows * sum(field.row_nbytes for field in self.store.schema.fields if field.packed)
        if nbytes > self._cache_bytes:
            self._cache_bytes = nbytes
            self.close()

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

    def __getitem__(self, number: int) -> Tensors:
        index = number + self._length if number < 0 else number
        if not 0 <= index < self._length:
            raise IndexError(f"expected a number below {self._length}, got {number}")
        batch = self.batch(np.array([index]))
        item: Tensors = map_leaves(batch, lambda tensor: tensor[0])
        return item

    def __getitems__(self, numbers: "Sequence[int] | np.ndarray | Drawn") -> "Items":
        weights = None
        if isinstance(numbers, Drawn):
            drawn = numbers
            if drawn.commit != self._commit:
                raise UsageError(
                    "the dataset was refreshed, but persistent workers hold the old commit: make a new loader"
                )
            numbers, weights = drawn.numbers, drawn.weights
        numbers = np.asarray(numbers)
        if get_worker_info() is None:
            return Items(self._read(numbers, weights))
        self._outbox = self._outbox or Outbox()
        parcel = self._outbox.begin()
        arrays = self._read(numbers, weights, parcel.allocate)
        return Items(arrays, parcel.filled(arrays))

    def batch(self, numbers: np.ndarray) -> Tensors:
        """Read items by number, as one dict of tensors with the batch first."""
        return Items(self._read(numbers)).batch

    def _read(
        self, numbers: np.ndarray, weights: np.ndarray | None = None, allocate: Allocate | None = None
    ) -> dict[str, Any]:
        """Items by number as nested arrays, transformed."""
        arrays = _named(self.selection.read(numbers, self.window, weights=weights, allocate=allocate))
        if self._transform is None:
            return arrays
        batch = self._transform(map_leaves(arrays, torch.from_numpy))
        if not isinstance(batch, dict) or "ids" not in batch:
            raise UsageError(f"transform: expected it to return the dict of tensors, got {type(batch)}")
        named: dict[str, Any] = map_leaves(batch, torch.Tensor.numpy)
        return named

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
        return Batches(self, batch_size, sampler=sampler, seed=seed, drop_last=drop_last, together=None)

    def collate_fn(self) -> "Collated":
        """What makes a batch of `__getitems__`'s result, without collating it again."""
        return Collated()

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
        together = READ_AT_ONCE if isinstance(self.window, Transition | Relabelled) else 1
        batches = Batches(
            self, batch_size, sampler=sampler, seed=seed, drop_last=drop_last, together=together
        )
        if isinstance(sampler, Shuffled):
            self.reserve(2 * sampler.pool)
        return Loader(
            self,
            batches,
            read_ahead=read_ahead,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=persistent_workers,
            collate_fn=Collated(),
            **kwargs,
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_store": None, "_selection": None, "_outbox": None}


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


class Drawn(NamedTuple):
    """Items to read at once, their weights, and the commit of the dataset that they count in."""

    numbers: np.ndarray
    weights: np.ndarray | None
    commit: int


class Batches(TorchSampler[Any]):
    """The numbers of a pass's batches, small batches several at a time.

    One pass at a time; another thread may ask for the state. Under `torch.distributed` all ranks
    draw the same from the same commit, which they agree on here, and each keeps its own share.
    `together` is how many items a loader wants at once, which then says what it has given; without
    it, batches come one at a time and are given when they are drawn.
    """

    def __init__(
        self,
        dataset: ReplayDataset,
        batch_size: int,
        *,
        sampler: Sampler | None,
        seed: int | None,
        drop_last: bool,
        together: int | None,
    ) -> None:
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise UsageError(f"batch_size: expected an int from 1, got {batch_size!r}")
        if not len(dataset):
            raise UsageError(f"loader: expected at least one {item_of(dataset.window)}, the store has none")
        self.size = batch_size
        self._dataset = dataset
        self._rank, self._ranks = _rank()
        self._sampler = Uniform(replace=False, seed=seed) if sampler is None else check_sampler(sampler)
        self._rng = np.random.default_rng(seed)
        if self._ranks > 1:
            self._agree()
        self._drop_last = drop_last
        at_once = 1 if together is None or self._sampler.is_adaptive else together
        self._step = max(1, at_once // batch_size) * batch_size
        self._lock = threading.Lock()
        self._pass = _Pass(0, 0, is_over=True)
        self._is_restored = False
        self._is_told = together is not None  # what was given
        self._pending: deque[Drawn] = deque()  # drawn, and not yet all given

    def _agree(self) -> None:
        """Take over the commit, the sampler's state and the random numbers of rank 0."""
        state: list[Any] = [self._dataset.state_dict(), self._sampler.state_dict()]
        state.append(self._rng.bit_generator.state)
        torch.distributed.broadcast_object_list(state)
        self._dataset.load_state_dict(state[0])
        self._sampler.load_state_dict(state[1])
        self._rng.bit_generator.state = state[2]

    def __len__(self) -> int:
        """Batches of a pass."""
        return self._count(len(self._dataset) // self._ranks)

    def _count(self, items: int) -> int:
        return math.floor(items / self.size) if self._drop_last else math.ceil(items / self.size)

    @property
    def _items(self) -> Any:
        return self._dataset.selection.items(self._dataset.window)

    def __iter__(self) -> Iterator[Drawn]:
        with self._lock:
            if not self._is_restored or self._pass.is_over:
                self._sampler.begin()
                self._pending.clear()
                self._pass = _Pass(self._sampler.left(self._items) // self._ranks, 0)
            self._is_restored = False
            again = list(self._pending)
        yield from again
        while (drawn := self._draw()) is not None:
            yield drawn
        if not self._is_told:
            self.end()

    def _draw(self) -> Drawn | None:
        with self._lock:
            total, done, _ = self._pass
            n = min(self._step, total - done)
            if self._drop_last:
                n = n // self.size * self.size
            if n <= 0:
                return None
            draw = self._sampler.draw(self._items, n * self._ranks, self._rng)
            mine = slice(self._rank, None, self._ranks)
            weights = None if draw.weights is None else draw.weights[mine]
            drawn = Drawn(draw.numbers[mine], weights, self._dataset.commit)
            self._pass = _Pass(total, done + n)
            if self._is_told:
                self._pending.append(drawn)
            return drawn

    def given(self, items: int) -> None:
        """Say that so many items of the oldest draw have been given to the user."""
        with self._lock:
            first = self._pending.popleft()
            if items < len(first.numbers):
                weights = None if first.weights is None else first.weights[items:]
                self._pending.appendleft(first._replace(numbers=first.numbers[items:], weights=weights))

    def end(self) -> None:
        """Say that the pass has come to its end: the next one begins anew, also after a restart."""
        with self._lock:
            self._pass = self._pass._replace(is_over=True)

    def state_dict(self) -> dict[str, Any]:
        """Where the pass is: the sampler's state, what was drawn and not yet given, the commit.

        Plain values and tensors, which `torch.load` takes without trusting the file.
        """
        with self._lock:
            state = {
                "sampler": self._sampler.state_dict(),
                "rng": self._rng.bit_generator.state,
                "pass": tuple(self._pass),
                "pending": [(drawn.numbers, drawn.weights) for drawn in self._pending],
                "share": (self._rank, self._ranks),
            }
            state |= self._dataset.state_dict()
            kept: dict[str, Any] = _map_state(state, np.ndarray, torch.tensor)
            return kept

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there at the next `iter`, on the items of that commit, however the store grew."""
        expected = {"sampler", "rng", "pass", "pending", "share", "heads"}
        if not isinstance(state, dict) or state.keys() != expected:
            found = sorted(state) if isinstance(state, dict) else state
            raise UsageError(f"loader: expected a state of {sorted(expected)}, got {found}")
        state = _map_state(state, torch.Tensor, torch.Tensor.numpy)
        if tuple(state["share"]) != (self._rank, self._ranks):
            raise UsageError(
                f"state: expected that of rank {self._rank} of {self._ranks}, got {state['share']}"
            )
        with self._lock:
            self._dataset.load_state_dict(state)
            self._sampler.load_state_dict(state["sampler"])
            self._rng.bit_generator.state = state["rng"]
            self._pass = _Pass(*state["pass"])
            commit = self._dataset.commit
            self._pending = deque(Drawn(numbers, weights, commit) for numbers, weights in state["pending"])
            self._is_restored = True


class _Pass(NamedTuple):
    """Items of a pass of this rank, how many of them were drawn, and whether the user has seen its end."""

    total: int
    drawn: int
    is_over: bool = False


def _rank() -> tuple[int, int]:
    """The number of this process under torch.distributed, and how many there are."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _fingerprint(heads: dict[int, bytes]) -> int:
    checksum = 0
    for stream, head in sorted(heads.items()):
        checksum = zlib.crc32(head, zlib.crc32(str(stream).encode(), checksum))
    return checksum


def _map_state(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Nested dicts, lists and tuples with each leaf of a kind replaced."""
    if isinstance(value, dict):
        return {name: _map_state(child, kind, function) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_state(child, kind, function) for child in value)
    return function(value) if isinstance(value, kind) else value


class Loader(DataLoader[Tensors]):
    """Gives one by one the batches that were read, and came from a worker, several at a time."""

    def __init__(self, dataset: ReplayDataset, batches: Batches, *, read_ahead: bool, **kwargs: Any) -> None:
        super().__init__(dataset, batch_sampler=batches, **kwargs)
        self._batches = batches
        self._read_ahead = read_ahead

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Any:
        groups = super().__iter__()
        return self._each(_ahead(groups) if self._read_ahead else groups)

    def _each(self, groups: Iterator[Tensors]) -> Iterator[Tensors]:
        size = self._batches.size
        for group in groups:
            parts = map_leaves(group, lambda tensor: list(tensor.split(size)))
            for part, ids in enumerate(parts["ids"]):
                self._batches.given(len(ids))
                yield map_leaves(parts, itemgetter(part))
        self._batches.end()

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, to go on from with the batch after the last one that it gave."""
        return self._batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state at the next `iter`: the same items in the same order, however many workers."""
        self._batches.load_state_dict(state)


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


def _named(batch: Any) -> dict[str, Any]:
    named: dict[str, Any] = batch._asdict()
    named |= named.pop("extra")
    return named
