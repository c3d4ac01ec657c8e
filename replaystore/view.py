"""What a store shows: the index over its streams, their rows, and what a writer here has added."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from replaystore.catalog import Catalog
from replaystore.errors import ClosedError, ReplayStoreError, SnapshotExpired
from replaystore.head import Head, encode_head
from replaystore.index import EACH, EpisodeIndex, Places, Spacing
from replaystore.reader import Allocate, Reader, Tail
from replaystore.schema import Schema
from replaystore.windows import Items, Window
from replaystore.writer import StreamWriter

TRIES = 100  # to read heads and map their files before a writer evicts one of them
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
        self.writer: StreamWriter | None = None
        self.is_closed = False
        self._cache_bytes = cache_bytes
        self._catalog = Catalog(path, schema)
        self._reader = Reader(path, schema, cache_bytes=cache_bytes)
        self._tail: Tail | None = None  # what the writer's ring holds beyond the heads shown
        self._indices: dict[Spacing, EpisodeIndex] = {}
        self._is_behind = False  # an interrupt came while commits were taken over
        self._shown = (-1, -1)  # the writer's state that the index and the reader show
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
        """While it is held, what is shown stays as `catch_up` left it: no commit of a writer here comes between."""
        return self.lock if self.writer is None else self.writer.lock

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
        times = {field.name: rows.of(field.name) for field in self.schema.fields}
        arrays = self._reader.read(places, times, tail=self._tail, allocate=allocate)
        if weights is None:
            weights = np.ones(len(places.time), np.float32)
        items = Items(self._catalog.index.ids(places), weights, places)
        return window.batch(rows, arrays, schema=self.schema, items=items)

    def arrays(self, places: Places, times: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Fields at times, `(batch, …)` each."""
        return self._reader.read(places, times, tail=self._tail)

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
        self._catalog.attach(writer)
        self.writer = writer

    def catch_up(self) -> None:
        """In the process that writes: take in what was appended since the last call."""
        if self.is_closed:
            raise ClosedError(f"{self.path}: the store is closed")
        if self._is_behind:
            self.rebuild()
        if self.writer is not None and self._shown != self.writer.state:
            self._is_behind = True
            try:
                self._show(self.writer)
            except SnapshotExpired:
                self.renew()
                self._show(self.writer)
        self._is_behind = False

    def _show(self, writer: StreamWriter) -> None:
        with writer.lock:
            state = writer.state
            changed = self._catalog.catch_up()
            if changed and self._evicts(changed):  # before the next eviction removes files
                self._reader.update(changed)
        if changed and not self._evicts(changed):
            self._reader.update(changed)
        if changed or self._tail is None:
            head = self._catalog.heads[writer.number]
            self._tail = Tail(writer.number, writer.floor_of(head), writer.ring)
        self._shown = state

    @staticmethod
    def _evicts(heads: Mapping[int, Head]) -> bool:
        return any(head.evicted is not None for head in heads.values())

    def after_fork(self) -> None:
        """In a forked child: another thread may have held the locks, the generator's among them."""
        self.lock = threading.RLock()
        self.rng = np.random.default_rng()
        if self.writer is not None:
            self.writer.abandon()

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
            if self.writer is not None:
                heads[self.writer.number] = encode_head(self.writer.head, self.schema)
                self.writer.forget_taken()
            self._catalog, self._reader, self._tail, self._shown = catalog, reader, None, (-1, -1)
            self._indices = {}
            self.load(heads, order)
            if self.writer is not None:
                self._catalog.attach(self.writer)

    @contextlib.contextmanager
    def _commits_held(self) -> Iterator[None]:
        """While what the writer here has not committed is joined to the head that lacks it."""
        with self.commits_lock:
            self.catch_up()
            yield
