"""One packed field of all streams, read through an arena of decoded chunks.

Each chunk that a batch needs is decoded once, whatever order its rows are asked in, and these are
gathered while it is in the processor's cache. A large arena keeps decoded chunks; with a small one, only
the rows up to the last one needed are decoded. What numpy can do for all chunks of a piece at once
(finding shards, reading index entries and headers) is done at once.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from replaystore.codec import ChunkCodec, DamagedChunk
from replaystore.errors import CorruptionError, SnapshotExpired
from replaystore.field import Field
from replaystore.files import MEMORY_START, chunk_path, memory, prefetch
from replaystore.head import HEAD, Head, decode_head, read_head
from replaystore.packed import Shard, open_shard
from replaystore.schema import Schema

MIN_CACHE = 100  # chunks, below which a cache is not worth its bookkeeping
PIECE_ROWS = 1 << 14  # prepared at once
MAX_COPIED = 4096  # indices of shards kept in memory, so that they are read from disk but once
MAX_SHARDS = PIECE_ROWS  # mapped at once, of the 65,530 maps that Linux allows a process
ONLY = np.zeros(1, np.int64)
HASH = 0x1E3779B97F4A7C15  # odd; the upper bits of a multiple differ where numbers do
NOTHING = -1  # in a slot; as an index, the last entry, which no chunk has


class StreamSpace(NamedTuple):
    """A stream's head and its place in the common numbering of rows (`reader.py`)."""

    head: Head
    base: int
    rows: int  # numbers set aside, all environments together


def stream_path(root: Path, stream: int) -> Path:
    return root / "streams" / f"{stream:06d}"


def run_bounds(chunks: np.ndarray) -> np.ndarray:
    """Where each run of rows of one chunk begins, and where the last one ends."""
    bounds = np.flatnonzero(chunks[1:] != chunks[:-1]) + 1
    return np.concatenate(([0], bounds, [len(chunks)]))


class PackedColumn:
    """One packed field of all streams, and its part of the arena."""

    def __init__(self, root: Path, schema: Schema, field: Field, cache_bytes: int) -> None:
        self._root = root
        self._schema = schema
        self._field = field
        self._codec = ChunkCodec(field)
        slots = cache_bytes // field.chunk_nbytes
        self._is_cache = slots >= MIN_CACHE
        slots = slots if self._is_cache else 0
        self._arena = np.empty((slots * field.chunk_rows, *field.shape), field.dtype)
        self._scratch = np.empty((field.chunk_rows, *field.shape), field.dtype)
        self._holds = np.full(slots, NOTHING, np.int64)  # the chunk in each slot, if it is a cache
        self._slots = np.zeros(1, np.int32)  # by chunk: 1 + its slot, or 0; the last one is nothing's
        self._hand = 0
        self.from_disk = False  # whether to ask for chunks before the first of them is read
        self._spaces: Mapping[int, StreamSpace] = {}
        self._forget_shards(0)

    def lay_out(self, spaces: Mapping[int, StreamSpace], rows: int) -> None:
        """Take over a new numbering of rows."""
        size = self._field.chunk_rows
        self._spaces = spaces
        self._streams = list(spaces)
        self._bases = np.array([space.base // size for space in spaces.values()])
        widths = np.array([space.head.num_envs for space in spaces.values()])
        self._shard_chunks = widths * [self._schema.env_chunks(width) for width in widths.tolist()]
        counts = [
            -(-(space.rows // size) // n)
            for space, n in zip(spaces.values(), self._shard_chunks, strict=True)
        ]
        self._first_shard = np.cumsum([0, *counts])[:-1]
        self._slots = np.zeros(rows // size + 1, np.int32)
        self._holds[:] = NOTHING
        self._forget_shards(sum(counts))
        for stream in spaces:
            self._hold_shards(stream)

    def update(self, stream: int, space: StreamSpace, old: Head) -> None:
        """Forget the shards and the unfinished chunks that a newer commit changed."""
        name, size = self._field.name, self._field.chunk_rows
        first = int(self._first_shard[self._streams.index(stream)])
        for number, state in old.files[name].items():
            if space.head.files[name].get(number) != state:
                self._start[first + number] = 0  # before the map goes, should an interrupt come
                self._shards.pop(first + number, None)
        rows = old.field_rows(self._schema, name)
        chunks = space.base // size + rows // size * old.num_envs + np.arange(old.num_envs)
        self._slots[chunks[rows % size != 0]] = 0
        self._hold_shards(stream)

    def _hold_shards(self, stream: int) -> None:
        """Map at once what may be evicted, so that a reader has it for as long as it shows the commit."""
        head = self._spaces[stream].head
        if head.evicted is None:
            return
        numbers = (
            np.fromiter(head.files[self._field.name], np.int64)
            + self._first_shard[self._streams.index(stream)]
        )
        unopened = numbers[self._start[numbers] == 0]
        if len(self._shards) + len(unopened) <= MAX_SHARDS:
            self._open_shards(unopened, unopened)

    def take(self, chunks: np.ndarray, within: np.ndarray, out: np.ndarray) -> None:
        """Gather rows by chunk number and row within the chunk: all of one length, flat."""
        take_piece = self._take_cached if self._is_cache else self._take_piece
        for start in range(0, len(chunks), PIECE_ROWS):
            piece = slice(start, start + PIECE_ROWS)
            take_piece(chunks[piece], within[piece], out[piece])

    def _take_piece(self, chunks: np.ndarray, within: np.ndarray, out: np.ndarray) -> None:
        """Decode each chunk once: sorting a hash of 16 bits, which is quick, brings its rows together."""
        to = (chunks * HASH >> 48).astype(np.uint16).argsort(kind="stable")
        chunks = chunks.take(to)
        first = run_bounds(chunks)
        self._take_rows(chunks.take(first[:-1]), out, first=first, within=within.take(to), to=to)

    def _take_rows(
        self, chunks: np.ndarray, out: np.ndarray, *, first: np.ndarray, within: np.ndarray, to: np.ndarray
    ) -> None:
        """Copy rows of each chunk, as `ChunkCodec.take_rows`."""
        start, nbytes = self._where(chunks)
        try:
            self._codec.take_rows(
                start, nbytes, first=first, within=within, to=to, out=out, scratch=self._scratch
            )
        except DamagedChunk as error:
            raise self._damaged(int(chunks[error.place]), error) from error

    def _take_cached(self, chunks: np.ndarray, within: np.ndarray, out: np.ndarray) -> None:
        held = self._slots.take(chunks)
        if not held.all():
            missing = np.unique(chunks[held == 0])
            pinned = np.zeros(len(self._holds), bool)
            pinned[held[held > 0] - 1] = True
            free = len(pinned) - np.count_nonzero(pinned)
            if len(missing) > free:
                self._take_piece(chunks, within, out)
                return
            self._fetch(missing, pinned)
            held = self._slots.take(chunks)
        rows = (held.astype(np.int64) - 1) * self._field.chunk_rows + within
        self._arena.take(rows, axis=0, out=out, mode="clip")

    def _fetch(self, missing: np.ndarray, pinned: np.ndarray) -> None:
        """Decode distinct chunks over the oldest in slots that are not pinned, (slots,)."""
        oldest = np.roll(np.arange(len(pinned)), -self._hand)
        slots = oldest[~pinned[oldest]][: len(missing)]
        held = self._holds[slots]
        self._slots[held[self._slots[held] == slots + 1]] = 0
        self._holds[slots] = NOTHING
        each = np.arange(self._field.chunk_rows)
        to = (slots[:, None] * len(each) + each).ravel()
        first = np.arange(len(slots) + 1) * len(each)
        self._take_rows(missing, self._arena, first=first, within=np.tile(each, len(slots)), to=to)
        self._holds[slots] = missing
        self._slots[missing] = slots + 1
        self._hand = int(slots[-1] + 1) % len(self._holds)

    def _where(self, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The addresses of the chunks' bytes, and how many they are."""
        place = self._bases.searchsorted(chunks, side="right") - 1 if len(self._bases) > 1 else ONLY
        shard, number = np.divmod(chunks - self._bases.take(place), self._shard_chunks.take(place))
        shard += self._first_shard.take(place)
        if not self._start.take(shard).all():
            self._open_shards(np.unique(shard[self._start[shard] == 0]), np.unique(shard))
        places = self._index.take(shard) + 16 * number
        if self.from_disk and len(self._shards) > MAX_COPIED:
            prefetch(places, np.full(len(places), 16))
        entries = places[:, None] + np.arange(16)
        offset, nbytes = memory().take(entries - MEMORY_START).view("<i8").T.copy()
        start, end = self._start.take(shard) + offset, offset + nbytes
        outside = (offset < 0) | (nbytes < 0) | (end > self._nbytes.take(shard))
        if outside.any():
            raise self._damaged(int(chunks[np.argmax(outside)]), CorruptionError("the chunk is missing"))
        if self.from_disk:
            prefetch(start, nbytes)
        return start, nbytes

    def _damaged(self, chunk: int, error: Exception) -> CorruptionError:
        place = int(self._bases.searchsorted(chunk, side="right")) - 1
        stream, within = self._streams[place], chunk - int(self._bases[place])
        num_envs, size = self._spaces[stream].head.num_envs, self._field.chunk_rows
        first, number = within // num_envs * size, within % int(self._shard_chunks[place])
        rows = f"rows {first} to {first + size - 1} of environment {within % num_envs}, stream {stream}"
        path = self._shards[self._shard_of(chunk)].path
        return CorruptionError(f"{path}: chunk {number} ({rows}): {error}")

    def _shard_of(self, chunk: int) -> int:
        place = int(self._bases.searchsorted(chunk, side="right")) - 1
        return int(self._first_shard[place] + (chunk - self._bases[place]) // self._shard_chunks[place])

    def _forget_shards(self, count: int) -> None:
        self._start = np.zeros(count, np.int64)  # by shard: address of its bytes, 0 if not open
        self._shards: dict[int, Shard] = {}
        self._index = np.zeros(count, np.int64)  # address of its index
        self._nbytes = np.zeros(count, np.int64)

    def _open_shards(self, unopened: np.ndarray, all_needed: np.ndarray) -> None:
        if len(self._shards) + len(unopened) > MAX_SHARDS:
            self._forget_shards(len(self._start))
            unopened = all_needed
        for shard in unopened.tolist():
            opened = self._open(shard)
            if len(self._shards) < MAX_COPIED:
                opened = replace(opened, index=opened.index.copy())
            self._shards[shard] = opened
            self._index[shard] = opened.index.ctypes.data
            self._nbytes[shard] = len(opened.data)
            self._start[shard] = opened.data.ctypes.data

    def _open(self, shard: int) -> Shard:
        place = int(self._first_shard.searchsorted(shard, side="right")) - 1
        stream, number = self._streams[place], shard - int(self._first_shard[place])
        head, name = self._spaces[stream].head, self._field.name
        path = chunk_path(stream_path(self._root, stream) / name, number, 2 + len(self._field.shape))
        while True:
            try:
                chunks = int(self._shard_chunks[place])
                return open_shard(path, head.files[name][number], chunks, head.num_envs)
            except CorruptionError:
                newest = self._newest_head(stream)
                if newest.commit <= head.commit:
                    raise
                check_there(path, newest, name, number)
                head = newest  # its writer has repacked the shard since

    def _newest_head(self, stream: int) -> Head:
        return newest_head(self._root, stream, self._schema)


def newest_head(root: Path, stream: int, schema: Schema) -> Head:
    """The head of a stream on disk."""
    path = stream_path(root, stream)
    return decode_head(read_head(path), schema, path / HEAD)


def check_there(path: Path, newest: Head, name: str, number: int) -> None:
    """Raise `SnapshotExpired` if the newest head does not name a field's file any more."""
    if number not in newest.files[name]:
        raise SnapshotExpired(f"{path}: the file was evicted since this commit: refresh() to a newer one")
