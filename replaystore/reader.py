"""Rows → arrays: the read path of all streams.

The rows of all streams share one numbering, so that each flat field is read by one gather however
many streams and files there are: stream s has the numbers from `base[s]`, and row (time, env) is
`base[s] + time * num_envs + env`. A packed field's chunks are numbered alike, `chunk_rows` rows at
a time.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from replaystore.arena import PackedColumn, StreamSpace, stream_path
from replaystore.errors import CorruptionError
from replaystore.field import Field
from replaystore.files import FileState, chunk_path, size_of
from replaystore.flat import FlatColumn, file_checksum
from replaystore.head import Head
from replaystore.index import Places
from replaystore.packed import open_shard
from replaystore.schema import Schema

SLICE_ROWS = 160  # decoded and gathered while in cache: 32 items of five frames
MAX_SHARDS = 8192  # mapped at once, of the 65,530 maps that Linux allows a process

NOTHING = -1  # in a slot; as an index, the last entry, which no chunk has

Allocate = Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray]


class Tail(NamedTuple):
    """The rows of one stream that its writer still holds in memory.

    `arrays[field]` is (capacity, num_envs, *shape), with row t of an environment at t % capacity;
    it holds the rows from `floor[env]`.
    """

    stream: int
    floor: np.ndarray
    arrays: Mapping[str, np.ndarray]


class Reader:
    """Reads rows of any streams, as of the newest commit it was given of each."""

    def __init__(self, root: Path, schema: Schema, *, cache_bytes: int) -> None:
        self._root = root
        self._schema = schema
        self._spaces: dict[int, StreamSpace] = {}
        self._base = np.zeros(0, np.int64)
        self._width = np.zeros(0, np.int64)
        self._flat: dict[str, FlatColumn] = {}
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

    def ids(self, places: Places) -> np.ndarray:
        """Names for transitions that never change: stream * 2^40 + time * num_envs + env."""
        ids: np.ndarray = (places.stream << 40) + places.time * self._width[places.stream] + places.env
        return ids

    def read(
        self,
        places: Places,
        times: Mapping[str, np.ndarray],
        *,
        tail: Tail | None = None,
        allocate: Allocate = np.empty,
    ) -> dict[str, np.ndarray]:
        """Gather fields at times: `times[field]` (batch, …) gives (batch, …, *shape)."""
        base, width = self._base[places.stream], self._width[places.stream]
        arrays = {}
        for name, time in times.items():
            wide = (...,) + (None,) * (time.ndim - 1)
            env, stream = places.env[wide], places.stream[wide]
            held = None
            if tail is not None:
                held = (stream == tail.stream) & (time >= tail.floor[env * (stream == tail.stream)])
                held = held if held.any() else None
            out = allocate(time.shape + self._schema.by_name[name].shape, self._schema.by_name[name].dtype)
            if time.size and (held is None or not held.all()):
                self._gather(name, time, base[wide], width[wide], env, held, out)
            if held is not None and tail is not None:
                ring = tail.arrays[name]
                column = np.broadcast_to(env, time.shape)[held]
                out[held] = ring[time[held] % len(ring), column]
            arrays[name] = out
        return arrays

    def _gather(
        self,
        name: str,
        time: np.ndarray,
        base: np.ndarray,
        width: np.ndarray,
        env: np.ndarray,
        held: np.ndarray | None,
        out: np.ndarray,
    ) -> None:
        field = self._schema.by_name[name]
        flat_out = out.reshape(-1, *field.shape)
        if field.packed:
            column = self._packed[name]
            chunk = base // field.chunk_rows + time // field.chunk_rows * width + env
            column.take(_elsewhere(chunk, held), time.ravel() % field.chunk_rows, flat_out)
        else:
            rows = _elsewhere(base + time * width + env, held)
            self._flat[name].rows.take(rows, axis=0, out=flat_out, mode="clip")

    def _needed_rows(self, head: Head) -> int:
        """Row numbers that a head's files take, in whole flat files."""
        time_chunk = self._schema.time_chunk(head.num_envs)
        return -(-int(head.rows.max()) // time_chunk) * time_chunk * head.num_envs

    def _reserved(self, stream: int) -> int:
        return self._spaces[stream].rows if stream in self._spaces else -1

    def _lay_out(self, heads: dict[int, Head]) -> None:
        """Give every stream a place with room to grow, and map all files anew."""
        base, spaces = 0, {}
        for stream, head in sorted(heads.items()):
            rows = 2 * self._needed_rows(head)
            spaces[stream] = StreamSpace(head, base, rows)
            base += rows
        flat = {field.name: FlatColumn(field, base) for field in self._schema.fields if not field.packed}
        for stream, space in spaces.items():
            self._map_flat(flat, stream, space, already=None)
        self._spaces, self._flat = spaces, flat
        self._base = np.zeros(max(heads) + 1, np.int64)
        self._width = np.ones(max(heads) + 1, np.int64)
        for stream, space in spaces.items():
            self._base[stream], self._width[stream] = space.base, space.head.num_envs
        for column in self._packed.values():
            column.lay_out(self._spaces, base)

    def _map_flat(
        self, columns: Mapping[str, FlatColumn], stream: int, space: StreamSpace, already: Head | None
    ) -> None:
        rows = self._schema.time_chunk(space.head.num_envs) * space.head.num_envs
        for name, column in columns.items():
            mapped = already.files[name] if already else {}
            for number in space.head.files[name].keys() - mapped.keys():
                array = stream_path(self._root, stream) / name
                column.place(array, number, row=space.base + number * rows, rows=rows)


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
                open_shard(file, state, schema.env_chunks(head.num_envs) * head.num_envs)
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


def _elsewhere(numbers: np.ndarray, held: np.ndarray | None) -> np.ndarray:
    """Flatten numbers, and replace those that the writer holds by one that is on disk."""
    if held is not None:
        numbers = np.where(held, numbers[~held][0], numbers)
    flat: np.ndarray = numbers.ravel()
    return flat
