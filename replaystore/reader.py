"""Rows → arrays: the read path of all streams.

The rows of all streams share one numbering, so that each flat field is read by one gather however
many streams and files there are: stream s has the numbers from `base[s]`, and row (time, env) is
`base[s] + time * num_envs + env`. A packed field's chunks are numbered alike, `chunk_rows` rows at
a time.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from replaystore.arena import PackedColumn, StreamSpace, check_there, newest_head, stream_path
from replaystore.compiled import finding
from replaystore.errors import CorruptionError, SnapshotExpired
from replaystore.field import Field
from replaystore.files import PAGE, FileState, chunk_path, major_faults, prefetch, size_of
from replaystore.flat import FlatColumn, file_checksum
from replaystore.foresight import Foresight, Patience
from replaystore.head import Head
from replaystore.index import CONTEXT, Places, Run, Wanted
from replaystore.packed import open_shard
from replaystore.recycler import Allocate, Recycler
from replaystore.schema import Schema


class Tail(NamedTuple):
    """The rows of one stream that its writer still holds in memory.

    `arrays[field]` is (capacity, num_envs, *shape), with row t of an environment at t % capacity;
    it holds the rows from `floor[env]`.
    """

    stream: int
    floor: np.ndarray
    arrays: Mapping[str, np.ndarray]


class _Rows(NamedTuple):
    """Rows to read: `number` in the common numbering, and what that was made of.

    `time` and `number` are (batch, …), `env`, `base` and `width` broadcast to that. `held` marks
    those that the writer holds, and is None if there are none. From each number on, `length` rows
    are read; with more than one, none is held.
    """

    number: np.ndarray
    time: np.ndarray
    env: np.ndarray | int
    base: np.ndarray | int
    width: np.ndarray | int
    held: np.ndarray | None
    length: int = 1


class Reader:
    """Reads rows of any streams, as of the newest commit it was given of each."""

    def __init__(self, root: Path, schema: Schema, *, cache_bytes: int) -> None:
        self._root = root
        self._schema = schema
        self._spaces: dict[int, StreamSpace] = {}
        self._base = np.zeros(0, np.int64)
        self._width = np.zeros(0, np.int64)
        self._lowest: np.ndarray | None = None  # by stream: the first row to be read, if some were evicted
        self._flat: dict[str, FlatColumn] = {}
        self._flat_fields = [field for field in schema.fields if not field.packed]
        self._patience: Patience  # with the columns of flat fields
        self._foresight = Foresight(major_faults)
        self._recycler = Recycler()
        self._apart = 0  # from a row of an episode to the next, if all fields are flat and it is one number
        self._is_plain = False  # one stream of one environment: the number of a row is its time
        packed = [field for field in schema.fields if field.packed]
        share = cache_bytes // max(1, len(packed))
        self._packed = {field.name: PackedColumn(root, schema, field, share) for field in packed}

    def update(self, heads: Mapping[int, Head]) -> None:
        """Move to newer commits, once all their files are mapped; streams may be new."""
        if any(self._needed_rows(head) > self._reserved(stream) for stream, head in heads.items()):
            old = {stream: space.head for stream, space in self._spaces.items()}
            self._lay_out({**old, **heads})
            return
        for stream, head in heads.items():
            space = self._spaces[stream]
            self._map_flat(self._flat, stream, space._replace(head=head), already=space.head)
        for stream, head in heads.items():
            old_head = self._spaces[stream].head
            self._spaces[stream] = self._spaces[stream]._replace(head=head)
            for column in self._packed.values():
                column.update(stream, self._spaces[stream], old_head)
        self._note_evicted()

    def _note_evicted(self) -> None:
        lowest = np.zeros(len(self._base), np.int64)
        for stream, space in self._spaces.items():
            lowest[stream] = max(0, space.head.floor - CONTEXT)
        self._lowest = lowest if lowest.any() else None

    def read(
        self,
        places: Places,
        wanted: Wanted,
        *,
        tails: Sequence[Tail] = (),
        allocate: Allocate | None = None,
    ) -> dict[str, np.ndarray]:
        """Gather fields at times: (batch, …) gives (batch, …, *shape) of each of them.

        `allocate(shape, dtype)` gives the arrays to read into.
        """
        has_runs = self._apart > 0 and not self._foresight.is_on
        located = [(self._locate(places, times, tails, has_runs), names) for times, names in wanted]
        ends = {"terminated": places.terminated, "truncated": places.truncated}
        if self._foresight.is_on:
            self._have_flat(located, ends)
        arrays = {}
        for rows, names in located:
            size = rows.time.size if allocate is None and rows.held is None else 0
            for name in names:
                end = ends.get(name)
                if end is not None:
                    assert rows.length == 1, "windows ask for flags at times, not in runs"
                    arrays[name] = rows.time == _widened(end, rows.time)
                    continue
                if rows.length > 1:
                    memory = allocate or self._recycler.allocate
                    arrays[name] = self._flat[name].take_runs(rows.number, rows.length, self._apart, memory)
                    continue
                column = self._flat.get(name)
                if column is not None and 0 < size <= column.few:
                    arrays[name] = column.rows.take(rows.number, 0, None, "clip")
                    continue
                field = self._schema.by_name[name]
                shape = rows.time.shape + field.shape
                arrays[name] = (allocate or self._recycler.allocate)(shape, field.dtype)
                self._fill(arrays[name], field, rows, places.stream, tails)
        self._foresight.note(len(places.time))
        for packed in self._packed.values():
            packed.from_disk = self._foresight.is_on
        return arrays

    def _fill(
        self, out: np.ndarray, field: Field, rows: "_Rows", stream: np.ndarray, tails: Sequence[Tail]
    ) -> None:
        """Gather a field's rows from disk and, where a writer still holds them, from its memory."""
        if rows.held is None or not rows.held.all():
            self._gather(field, rows, out.reshape(-1, *field.shape))
        if rows.held is not None:
            for tail in tails:
                held = rows.held
                if len(tails) > 1:
                    held = held & _widened(stream == tail.stream, held)
                ring = tail.arrays[field.name]
                column = np.broadcast_to(rows.env, rows.time.shape)[held]
                out[held] = ring[rows.time[held] % len(ring), column]

    def _have_flat(
        self, located: Sequence[tuple["_Rows", Sequence[str]]], ends: Mapping[str, np.ndarray | None]
    ) -> None:
        """Have the pages of all flat fields read from disk before the first of them is looked at."""
        found = [
            (self._flat[name], rows.number.ravel())
            for rows, names in located
            for name in names
            if rows.held is None and name in self._flat and ends.get(name) is None
        ]
        if found and self._patience.is_left:
            self._wait_for(found, len(located[0][0].time))
        elif found:
            self._ask_for(found)

    def _ask_for(self, found: Sequence[tuple[FlatColumn, np.ndarray]]) -> None:
        """Ask for the pages of rows at once."""
        pages = []
        for column, numbers in found:
            start, size = column.rows.ctypes.data, column.rows[:1].nbytes
            pages += [(start + numbers * size + end) // PAGE for end in (0, size - 1)]
        addresses = np.unique(np.concatenate(pages)) * PAGE
        prefetch(addresses, np.full(len(addresses), PAGE))

    def _wait_for(self, found: Sequence[tuple[FlatColumn, np.ndarray]], items: int) -> None:
        """Have the huge pages around rows read, one by one."""
        before = major_faults()
        for column, numbers in found:
            column.touch(numbers)
        self._patience.note(major_faults() - before, items)
        if not self._patience.is_left:
            for each in self._flat.values():
                each.read_by_page()

    def _locate(
        self, places: Places, times: np.ndarray | Run, tails: Sequence[Tail], has_runs: bool
    ) -> "_Rows":
        """Find rows in the common numbering: as runs, with `has_runs`, if no writer holds one of them."""
        if isinstance(times, Run):
            if has_runs:
                rows = self._locate_from(places, times.first, times.length, tails)
                if rows.held is None:
                    return rows
            times = times.times
        return self._locate_from(places, times, 1, tails)

    def _locate_from(self, places: Places, time: np.ndarray, length: int, tails: Sequence[Tail]) -> "_Rows":
        """Find the rows from these times on; of those that were evicted the files may be gone."""
        if self._lowest is not None and (time < _widened(self._lowest[places.stream], time)).any():
            raise SnapshotExpired(
                f"{self._root}: some of these rows were evicted: choose among those there are"
            )
        if self._is_plain:
            held = time >= tails[0].floor[0] - (length - 1) if tails else None
            return _Rows(time, time, 0, 0, 1, held if held is not None and held.any() else None, length)
        stream, env = _widened(places.stream, time), _widened(places.env, time)
        base, width = self._base[stream], self._width[stream]
        held = np.zeros(time.shape, bool) if tails else None
        for tail in tails:
            floor = tail.floor[env * (stream == tail.stream)] - (length - 1)
            held |= (stream == tail.stream) & (time >= floor)
        held = held if held is not None and held.any() else None
        return _Rows(base + time * width + env, time, env, base, width, held, length)

    def _gather(self, field: Field, rows: "_Rows", out: np.ndarray) -> None:
        if not len(out):
            return
        if field.packed:
            size = field.chunk_rows
            chunk = rows.base // size + rows.time // size * rows.width + rows.env
            self._packed[field.name].take(_elsewhere(chunk, rows.held), rows.time.ravel() % size, out)
        else:
            self._flat[field.name].rows.take(_elsewhere(rows.number, rows.held), axis=0, out=out, mode="clip")

    def _needed_rows(self, head: Head) -> int:
        """Row numbers that a head's files take, in whole flat files."""
        files = -(-int(head.rows.max()) // self._schema.time_chunk(head.num_envs))
        return files * self._file_rows(head)

    def _file_rows(self, head: Head) -> int:
        """Row numbers that one flat file takes."""
        return self._schema.time_chunk(head.num_envs) * head.num_envs

    def _flat_nbytes(self, head: Head) -> int:
        """Bytes of a head's flat files."""
        rows = self._file_rows(head)
        return sum(len(head.files[field.name]) * rows * field.row_nbytes for field in self._flat_fields)

    def _reserved(self, stream: int) -> int:
        return self._spaces[stream].rows if stream in self._spaces else -1

    def _lay_out(self, heads: dict[int, Head]) -> None:
        """Give every stream a place with room to grow, and map all files anew."""
        base, spaces = 0, {}
        for stream, head in sorted(heads.items()):
            rows = 2 * max(self._needed_rows(head), self._file_rows(head))
            spaces[stream] = StreamSpace(head, base, rows)
            base += rows
        self._patience = Patience(sum(self._flat_nbytes(head) for head in heads.values()))
        huge = self._patience.is_left
        flat = {field.name: FlatColumn(field, base, huge=huge) for field in self._flat_fields}
        for stream, space in spaces.items():
            self._map_flat(flat, stream, space, already=None)
        self._spaces, self._flat = spaces, flat
        widths = {head.num_envs for head in heads.values()}
        has_runs = finding is not None and not self._packed and len(widths) == 1
        self._apart = min(widths) if has_runs else 0
        self._is_plain = widths == {1} and len(heads) == 1
        self._base = np.zeros(max(heads) + 1, np.int64)
        self._width = np.ones(max(heads) + 1, np.int64)
        for stream, space in spaces.items():
            self._base[stream], self._width[stream] = space.base, space.head.num_envs
        for column in self._packed.values():
            column.lay_out(self._spaces, base)
        self._note_evicted()

    def _map_flat(
        self, columns: Mapping[str, FlatColumn], stream: int, space: StreamSpace, already: Head | None
    ) -> None:
        rows = self._file_rows(space.head)
        for name, column in columns.items():
            mapped = already.files[name] if already else {}
            array = stream_path(self._root, stream) / name
            for number in space.head.files[name].keys() - mapped.keys():
                try:
                    column.place(array, number, row=space.base + number * rows, rows=rows)
                except CorruptionError:
                    check_there(array, newest_head(self._root, stream, self._schema), name, number)
                    raise
            for number in mapped.keys() - space.head.files[name].keys():
                column.clear(row=space.base + number * rows, rows=rows)


def check_files(path: Path, head: Head, schema: Schema) -> None:
    """Raise `CorruptionError` unless a stream's files are there, and those still growing are right.

    Every file's size is looked at; the checksums of flat files that are not full, and the indices
    of such shards.
    """
    for field in schema.fields:
        size, rows = schema.shard_rows(field, head.num_envs), head.field_rows(schema, field.name)
        for number, state in head.files[field.name].items():
            file = chunk_path(path / field.name, number, 2 + len(field.shape))
            growing = (number + 1) * size > rows.min()
            if not field.packed:
                _check_flat(file, field, size, rows - number * size, state, growing)
            elif growing:
                chunks = schema.env_chunks(head.num_envs) * head.num_envs
                open_shard(file, state, chunks, head.num_envs)
            elif size_of(file) == 0:
                raise CorruptionError(f"{file}: expected a shard, found an empty file")


def _check_flat(
    file: Path, field: Field, size: int, rows: np.ndarray, state: FileState, growing: bool
) -> None:
    whole = size * len(rows) * field.row_nbytes
    if size_of(file) != whole:
        raise CorruptionError(f"{file}: expected {whole} bytes, found {size_of(file)}")
    if growing and file_checksum(file, field, rows, state.nbytes) != state.crc32c:
        raise CorruptionError(f"{file}: the committed rows' checksum is not {state.crc32c:08x}")


def _widened(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Values of items, (batch,), such that they go with rows of these, (batch, …)."""
    return values if rows.ndim == 1 else values.reshape(-1, *[1] * (rows.ndim - 1))


def _elsewhere(numbers: np.ndarray, held: np.ndarray | None) -> np.ndarray:
    """Flatten numbers, and replace those that the writer holds by one that is on disk."""
    if held is not None:
        numbers = np.where(held, numbers[~held][0], numbers)
    flat: np.ndarray = numbers.ravel()
    return flat
