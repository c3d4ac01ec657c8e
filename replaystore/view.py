"""What a store shows: the index over its streams, their rows, and what writers here have added."""

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from replaystore.catalog import Catalog
from replaystore.errors import ClosedError, ReplayStoreError, SnapshotExpired
from replaystore.head import Head, encode_head
from replaystore.index import EACH, EpisodeIndex, Places, Spacing, Wanted
from replaystore.reader import Reader, Tail
from replaystore.recycler import Allocate
from replaystore.schema import Schema
from replaystore.windows import Items, Window
from replaystore.writer import StreamWriter

TRIES = 100  # to read heads and map their files before a writer evicts one of them
ONE = np.ones(1, np.float32)  # what items weigh unless the sampler says otherwise
MAX_INDICES = 8  # of windows other than plain transitions, kept at once


class View:
    """One commit of each stream and, in the process that writes, the rows appended since.

    Callers hold `lock` while they use what a call gave them.
    """

    def __init__(
        self, path: Path, schema: Schema, *, heads: Mapping[int, bytes] | None, cache_bytes: int
    ) -> None:
        self.path = path
        self.schema = schema
        self.lock = threading.RLock()
        self.rng = np.random.default_rng()  # of those who bring none
        self.writers: dict[int, StreamWriter] = {}  # here, by stream
        self.is_closed = False
        self._cache_bytes = cache_bytes
        self._catalog = Catalog(path, schema)
        self._reader = Reader(path, schema, cache_bytes=cache_bytes)
        self._tails: dict[int, Tail] = {}  # what the writers' rings hold beyond the heads shown
        self._indices: dict[Spacing, EpisodeIndex] = {}
        self._is_behind = False  # an interrupt came while commits were taken over
        self._shown: dict[int, tuple[int, int]] = {}  # the writers' states that index and reader show
        self._load_first(heads)

    def _load_first(self, heads: Mapping[int, bytes] | None) -> None:
        if heads is not None:
            self.load(heads)
            return
        try:
            self.load(self._catalog.choose_heads())
        except SnapshotExpired:
            self.renew()

    @property
    def heads(self) -> Mapping[int, Head]:
        """The heads shown, by stream."""
        return self._catalog.heads

    @property
    def commits_lock(self) -> contextlib.AbstractContextManager[Any]:
        """While it is held, what is shown stays as `catch_up` left it: no writer here commits meanwhile."""
        if not self.writers:
            return self.lock
        writer, *others = self.writers.values()
        return _all_held(self.writers.values()) if others else writer.lock

    # ---- reading

    def index(self, spacing: Spacing = EACH) -> EpisodeIndex:
        """The index of the items with this spacing, as of now."""
        self.catch_up()
        if spacing == EACH:
            return self._catalog.index
        index = self._indices.setdefault(spacing, EpisodeIndex(spacing))
        index.follow(self._catalog.index)
        while len(self._indices) > MAX_INDICES:
            self._indices.pop(next(iter(self._indices)))
        return index

    def episodes(self) -> pa.Table:
        """The table of episodes."""
        with self._commits_held():
            return self._catalog.episodes()

    def read(
        self,
        places: Places,
        window: Window,
        *,
        weights: np.ndarray | None = None,
        allocate: Allocate | None = None,
    ) -> Any:
        """The read path: places, rows, arrays, batch."""
        rows = window.rows(places)
        arrays = self.arrays(places, rows.wanted(self.schema), allocate)
        if weights is None:
            weights = ONE.repeat(len(places.time))
        items = Items(self._catalog.index.ids(places), weights, places)
        return window.batch(rows, arrays, schema=self.schema, items=items)

    def arrays(
        self, places: Places, wanted: Wanted, allocate: Allocate | None = None
    ) -> dict[str, np.ndarray]:
        """Fields at times, `(batch, …)` each."""
        return self._reader.read(places, wanted, tails=[*self._tails.values()], allocate=allocate)

    def close(self) -> None:
        """Let the files go; nothing can be read any more."""
        self.is_closed = True
        self._catalog = Catalog(self.path, self.schema)
        self._reader = Reader(self.path, self.schema, cache_bytes=0)
        self._tails, self._indices = {}, {}

    # ---- moving on

    def refresh(self) -> None:
        """Move to the newest commit of every stream."""
        if self._is_behind:
            self.rebuild()
        heads = self._catalog.read_heads()
        self._is_behind = True
        try:
            self.load(heads)
        except SnapshotExpired:
            self.renew()
        except (ReplayStoreError, OSError):
            self._is_behind = False  # nothing was taken over
            raise
        self._is_behind = False

    def renew(self) -> None:
        """Begin anew from the newest heads: files that the ones shown name were evicted."""
        self._is_behind = True
        for attempt in range(TRIES):
            try:
                self.rebuild()
                break
            except SnapshotExpired:
                if attempt == TRIES - 1:
                    raise
        self._is_behind = False

    def snapshot(self) -> dict[int, bytes]:
        """The heads of the commit shown, as bytes."""
        self.catch_up()
        return self._catalog.snapshot()

    def choose_heads(self) -> dict[int, bytes]:
        """For each stream its newest head of which all files are there."""
        return self._catalog.choose_heads()

    def move_on(self, heads: Mapping[int, bytes]) -> None:
        """Move to these heads of some streams; after an interrupt the next call begins anew."""
        self.catch_up()
        self._is_behind = True
        self.load(heads)
        self._is_behind = False

    def load(self, heads: Mapping[int, bytes], order: np.ndarray | None = None) -> None:
        """Take over heads; those that are known already cost nothing. For `order` see `Catalog.take`."""
        changed = self._catalog.decode(heads)
        if not self._catalog.goes_on(changed):
            self.rebuild()
            return
        if changed:
            self._reader.update(changed)
        self._catalog.take(changed, heads, order)

    def attach(self, writer: StreamWriter) -> None:
        """From now on show what this writer has as well."""
        self._is_behind = True
        self._catalog.attach(writer)
        self.writers[writer.number] = writer
        self._is_behind = False

    def detach(self, writer: StreamWriter) -> None:
        """From now on show of its stream what it committed: it has closed."""
        self.catch_up()
        self._is_behind = True
        del self.writers[writer.number], self._tails[writer.number], self._shown[writer.number]
        self._catalog.detach(writer)
        self._is_behind = False

    def forget(self, writer: StreamWriter) -> None:
        """Show nothing that a writer did not commit: it was discarded."""
        self._is_behind = True
        self.writers.pop(writer.number, None)
        self.catch_up()

    def catch_up(self) -> None:
        """In the process that writes: take in what was appended since the last call."""
        if self.is_closed:
            raise ClosedError(f"{self.path}: the store is closed")
        if self._is_behind:
            self.rebuild()
        for number, writer in self.writers.items():
            if self._shown.get(number) != writer.state:
                self._is_behind = True
                try:
                    self._show(writer)
                except SnapshotExpired:
                    self.renew()
                    self._show(writer)
        self._is_behind = False

    def _show(self, writer: StreamWriter) -> None:
        number = writer.number
        with writer.lock:
            state = writer.state
            changed = self._catalog.catch_up(writer)
            if changed and self._evicts(changed):  # before the next eviction removes files
                self._reader.update(changed)
        if changed and not self._evicts(changed):
            self._reader.update(changed)
        if changed or number not in self._tails:
            head = self._catalog.heads[number]
            self._tails[number] = Tail(number, writer.floor_of(head), writer.ring)
        self._shown[number] = state

    @staticmethod
    def _evicts(heads: Mapping[int, Head]) -> bool:
        return any(head.evicted is not None for head in heads.values())

    def after_fork(self) -> None:
        """In a forked child: another thread may have held the locks, the generator's among them."""
        self.lock = threading.RLock()
        self.rng = np.random.default_rng()
        for writer in self.writers.values():
            writer.abandon()

    def check(self) -> None:
        """Raise at the first thing that is wrong: sizes, heads, growing files, the index."""
        with self._commits_held():
            self._catalog.check()
            for index in self._indices.values():
                index.check()

    def rebuild(self, order: np.ndarray | None = None) -> None:
        """Begin anew from the heads: an interrupt has left the index or the reader half-way.

        Or the streams went back to older commits; `order` then numbers the episodes as they were.
        """
        heads = self._catalog.read_heads()
        catalog = Catalog(self.path, self.schema)
        reader = Reader(self.path, self.schema, cache_bytes=self._cache_bytes)
        with self.commits_lock:
            for number, writer in self.writers.items():
                heads[number] = encode_head(writer.head, self.schema)
                writer.forget_taken()
            self._catalog, self._reader, self._tails, self._shown = catalog, reader, {}, {}
            self._indices = {}
            self.load(heads, order)
            for writer in self.writers.values():
                self._catalog.attach(writer)

    @contextlib.contextmanager
    def _commits_held(self) -> Iterator[None]:
        """While what writers here have not committed is joined to the heads that lack it."""
        with self.commits_lock:
            self.catch_up()
            yield


@contextlib.contextmanager
def _all_held(writers: Iterable[StreamWriter]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for writer in writers:
            stack.enter_context(writer.lock)
        yield
