"""Makes room in a store with bounds: says what a writer evicts before it commits more.

The oldest goes first: a stream evicts from its lowest row on, for all environments alike. Of several
streams those that nobody writes go first, the oldest of them first, by whoever writes another. Each
writer then evicts of its own stream what is above the bound, as long as that has more than its even
share; one that has less leaves it to the others, who look at the store about once a second.

A sixteenth more than needed is evicted, so that it need not be done at every commit: a full store
holds between 15/16 of its capacity and all of it. Of `capacity_bytes` another sixteenth is left for
what commits write beside rows; while a full shard is repacked it is on disk twice.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from replaystore.arena import stream_path
from replaystore.bounds import Bounds
from replaystore.commit import Pending, StreamCommitter
from replaystore.errors import ReplayStoreError, UsageError
from replaystore.files import Lock, disk_usage, list_directory
from replaystore.head import HEAD, Head, decode_head, read_head
from replaystore.index import CONTEXT
from replaystore.schema import MIN_FILE_ROWS, Schema
from replaystore.spans import Spans

FILES = 8  # that a full stream of the smallest bound has of a field, at least, where rows allow it
CHUNKS = 8  # that a bound must have room for, of each environment
STREAMS = 32  # of a full reservoir
SLACK = 16  # a bound's part that is evicted beyond need
MAX_ROW = np.iinfo(np.int64).max
FloorOf = Callable[[StreamCommitter, int], int]


def fitted_schema(schema: Schema, bounds: Bounds, num_envs: int) -> Schema:
    """The schema with files so short that the bounds have room for several of them.

    Raises `UsageError` if the bounds have no room for a few chunks.
    """
    rows = _rows_within(schema, bounds)
    if rows is None:
        return schema
    _check_large_enough(schema, bounds, num_envs)
    longest = max((field.chunk_rows for field in schema.fields if field.packed), default=1)
    rows = stream_length(schema, bounds, num_envs) if bounds.reservoir else max(1, rows // FILES)
    return Schema(
        schema.fields,
        schema.columns,
        file_rows=min(schema.file_rows, rows),
        shard_chunks=min(schema.shard_chunks, max(1, rows // longest)),
    )


def ring_rows(schema: Schema, bounds: Bounds, num_envs: int) -> int | None:
    """The most rows of an environment that a writer should hold in memory, if the bounds say so."""
    rows = _rows_within(schema, bounds)
    if rows is None:
        return None
    return max(
        1, (stream_length(schema, bounds, num_envs) if bounds.reservoir else rows // FILES) // num_envs
    )


def stream_length(schema: Schema, bounds: Bounds, num_envs: int) -> int:
    """About how many transitions a stream of a reservoir has: a 32nd of them, or one chunk of each environment."""
    assert bounds.capacity is not None, bounds
    return max(bounds.capacity // STREAMS, _least(schema, num_envs))


def _row_nbytes(schema: Schema) -> int:
    return sum(field.row_nbytes for field in schema.fields)


def _rows_within(schema: Schema, bounds: Bounds) -> int | None:
    """How many rows, were they not compressed, the bounds allow."""
    allowed = [] if bounds.capacity is None else [bounds.capacity]
    if bounds.capacity_bytes is not None:
        allowed.append(bounds.capacity_bytes // _row_nbytes(schema))
    return min(allowed, default=None)


def _least(schema: Schema, num_envs: int) -> int:
    """Rows of a chunk of each environment."""
    return max(16, *(field.chunk_rows for field in schema.fields)) * num_envs


def _check_large_enough(schema: Schema, bounds: Bounds, num_envs: int) -> None:
    least = CHUNKS * _least(schema, num_envs)
    if bounds.capacity is not None and bounds.capacity < least:
        raise UsageError(
            f"capacity: expected at least {least} transitions, {CHUNKS} chunks of {num_envs} environments,"
            f" got {bounds.capacity}"
        )
    flat = sum(field.row_nbytes for field in schema.fields if not field.packed)
    nbytes = max(least * _row_nbytes(schema), 4 * MIN_FILE_ROWS * num_envs * flat)
    if bounds.capacity_bytes is not None and bounds.capacity_bytes < nbytes:
        raise UsageError(
            f"capacity_bytes: expected at least {nbytes}, for some files of {num_envs} environments,"
            f" got {bounds.capacity_bytes}"
        )


class Room:
    """What a writer asks before each commit; on its background thread alone."""

    def __init__(
        self,
        root: Path,
        stream: int,
        schema: Schema,
        bounds: Bounds,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._root = root
        self._stream = stream
        self._schema = schema
        self._bounds = bounds
        self._clock = clock
        self._heads: dict[int, tuple[bytes, Head]] = {}  # of other streams, as they were last read
        self._asked: dict[int, int] = {}  # by stream: the row below which the user wants no more
        self._is_asked = False  # of other streams, since the last commit
        self._aged = -np.inf  # when episodes of other streams were last held against the clock

    def ask(self, rows: Mapping[int, int]) -> None:
        """Evict the rows of streams below one: at the next commit, or later where they still grow.

        Streams that another process writes are left as they are. Any thread may call.
        """
        highest = {stream: max(row, self._asked.get(stream, 0)) for stream, row in rows.items()}
        self._asked = self._asked | highest
        self._is_asked = True

    def make(self, committer: StreamCommitter, pending: Pending) -> Head:
        """Evict what pending rows need room for; on any exception the last commit stands."""
        floors = [self._asked.get(self._stream, 0)]
        if self._is_asked:
            self._is_asked = False
            self._others()
            for other in self._idle():
                _evict(other, self._asked.get(int(other.path.name), 0))
                other.remove_evicted()
        if self._bounds.capacity is not None:
            floors.append(self._by_capacity(committer, pending, self._bounds.capacity))
        if self._bounds.capacity_bytes is not None:
            floors.append(self._by_bytes(committer, pending, self._bounds.capacity_bytes))
        if self._bounds.max_age is not None:
            floors.append(self._by_age(committer, self._bounds.max_age))
        return _evict(committer, max(floors))

    def _by_capacity(self, committer: StreamCommitter, pending: Pending, capacity: int) -> int:
        new = sum(episode.length for episode in [*pending.closed, *pending.open])
        need = _left(committer.head) + new - int(_opened(committer).left(0))
        others = {stream: _left(head) for stream, head in self._others().items()}
        excess = need + sum(others.values()) - capacity
        if excess <= 0:
            return 0
        freed, live = self._evict_idle(excess + capacity // SLACK, _left, _floor_leaving_less)
        allowed = max(capacity - sum(others.values()) + freed, capacity // (live + 1))
        if need <= allowed:
            return 0
        return _floor_leaving_less(committer, need - allowed + capacity // SLACK)

    def _by_bytes(self, committer: StreamCommitter, pending: Pending, capacity: int) -> int:
        rows = int((pending.rows - committer.head.rows).sum())
        total = disk_usage(self._root) + rows * _row_nbytes(self._schema)
        capacity -= capacity // SLACK
        if total <= capacity:
            return 0
        wanted = total - capacity + capacity // SLACK
        self._others()
        freed, live = self._evict_idle(wanted, None, self._floor_freeing)
        own = disk_usage(committer.path) + rows * _row_nbytes(self._schema)
        allowed = max(capacity - (total - freed - own), capacity // (live + 1))
        return 0 if own <= allowed else self._floor_freeing(committer, own - allowed + capacity // SLACK)

    def _by_age(self, committer: StreamCommitter, age: float) -> int:
        now = self._clock()
        if not self._aged <= now < self._aged + age / SLACK:
            self._aged = now
            self._others()
            for other in self._idle():
                _evict(other, _floor_by_age(other, now, age))
                other.remove_evicted()
        return _floor_by_age(committer, now, age)

    def _floor_freeing(self, committer: StreamCommitter, nbytes: int) -> int:
        """The lowest row below which whole files have so many bytes, or the last that files end at."""
        ends = {}
        for field in self._schema.fields:
            size = self._schema.shard_rows(field, committer.head.num_envs)
            for number in committer.head.files[field.name]:
                folder = committer.path / field.name / "c" / str(number)
                ends[folder] = (number + 1) * size + CONTEXT
        ends = {folder: end for folder, end in ends.items() if end <= committer.evictable}
        freed = floor = 0
        for folder, end in sorted(ends.items(), key=lambda item: item[1]):
            if freed < nbytes:
                freed, floor = freed + disk_usage(folder), end
        return floor

    # ---- other streams

    def _others(self) -> dict[int, Head]:
        """The newest heads of the other streams that have one."""
        for name in list_directory(self._root / "streams"):
            if len(name) == 6 and name.isdigit() and int(name) != self._stream:
                path = stream_path(self._root, int(name))
                try:
                    data = read_head(path)
                    if self._heads.get(int(name), (b"", None))[0] != data:
                        self._heads[int(name)] = data, decode_head(data, self._schema, path / HEAD)
                except (ReplayStoreError, OSError):
                    self._heads.pop(int(name), None)  # it is being made, or `verify` says what is wrong
        return {stream: head for stream, (_, head) in self._heads.items()}

    def _idle(self) -> Iterator[StreamCommitter]:
        """Streams that nobody writes, the oldest first, each locked for as long as it is looked at."""
        for stream in sorted(self._heads):
            path = stream_path(self._root, stream)
            lock = Lock.acquire(path / "lock")
            if lock is not None:
                try:
                    head = decode_head(read_head(path), self._schema, path / HEAD)
                    if head.evicted is not None:
                        yield StreamCommitter(path, self._schema, head)
                finally:
                    lock.release()

    def _evict_idle(
        self, wanted: int, left: Callable[[Head], int] | None, floor_of: FloorOf
    ) -> tuple[int, int]:
        """Evict from streams that nobody writes; returns what that freed, and how many streams are written.

        What is wanted and freed is what `left` counts of a head, or bytes on disk.
        """
        freed, idle = 0, 0
        for other in self._idle():
            idle += 1
            if freed < wanted:
                before = disk_usage(other.path) if left is None else left(other.head)
                head = _evict(other, floor_of(other, wanted - freed))
                other.remove_evicted()
                freed += before - (disk_usage(other.path) if left is None else left(head))
        return freed, len(self._heads) - idle


def _evict(committer: StreamCommitter, floor: int) -> Head:
    """Evict up to a row, or as far as it goes."""
    floor = min(floor, committer.evictable)
    return committer.evict(floor) if floor > committer.head.floor else committer.head


def _left(head: Head) -> int:
    return 0 if head.evicted is None else head.evicted.left


def _opened(committer: StreamCommitter) -> Spans:
    return Spans.of({0: committer.head.open})


def _floor_leaving_less(committer: StreamCommitter, count: int) -> int:
    """The lowest row from which on there are so many transitions less than now."""
    spans = committer.spans.joined(_opened(committer))
    return spans.floor_leaving(max(0, _left(committer.head) - count))


def _floor_by_age(committer: StreamCommitter, now: float, age: float) -> int:
    """The first row of the episodes that are young enough, or still open."""
    spans, oldest = committer.spans, (now - age) * 1e6
    if spans.start.min(initial=MAX_ROW) >= oldest - age * 1e6 / SLACK:
        return 0
    return min(spans.floor_younger(int(oldest)), int(_opened(committer).first.min(initial=MAX_ROW)))
