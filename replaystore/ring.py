"""Rows in memory that are not yet durable: one ring per field, indexed by time and environment.

Row t of an environment stands at t % capacity. Rows stay until a commit that holds them is
durable, so that a failed commit can be done again in full, and a chunk that is not yet full keeps
its first rows, so that it can be encoded again.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from replaystore.field import Field
from replaystore.schema import Schema

RING_BYTES = 1 << 25
MAX_ROWS = 1 << 18
PIECE_BYTES = 1 << 21


class Ring:
    """`arrays[field]` is (capacity, num_envs, *shape); the caller keeps count of what is in use."""

    def __init__(self, schema: Schema, num_envs: int, *, most: int = MAX_ROWS) -> None:
        """Rows of `most` or fewer, if a few chunks take no more."""
        row_nbytes = num_envs * sum(field.row_nbytes for field in schema.fields)
        self.keep = max(field.chunk_rows for field in schema.fields)
        fitting = 1 << (max(1, RING_BYTES // row_nbytes).bit_length() - 1)
        self.capacity = max(min(fitting, 1 << (most.bit_length() - 1)), 4 * self.keep, 16)
        self.mask = self.capacity - 1
        self.arrays = {
            field.name: np.zeros((self.capacity, num_envs, *field.shape), field.dtype)
            for field in schema.fields
        }

    def memory(self) -> Iterator[np.ndarray]:
        """Its bytes, in pieces."""
        for array in self.arrays.values():
            data = array.reshape(-1).view(np.uint8)
            for start in range(0, len(data), PIECE_BYTES):
                yield data[start : start + PIECE_BYTES]

    def put(self, env: int, row: int, count: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Set `count` rows from `row`; zeros where an array is shorter."""
        for start, some, slot in self.pieces(row, row + count):
            for name, array in arrays.items():
                part = array[start - row : start - row + some]
                self.arrays[name][slot : slot + len(part), env] = part
                self.arrays[name][slot + len(part) : slot + some, env] = 0

    def move(self, env: int, row: int, to: int) -> None:
        """Copy a row to another one."""
        for array in self.arrays.values():
            array[to & self.mask, env] = array[row & self.mask, env]

    def copy_to(self, out: np.ndarray, name: str, env: int, start: int, stop: int) -> None:
        """Copy rows `start` to `stop` of one environment to the beginning of `out`."""
        for row, count, slot in self.pieces(start, stop):
            out[row - start : row - start + count] = self.arrays[name][slot : slot + count, env]

    def chunk(self, field: Field, env: int, start: int, stop: int) -> np.ndarray:
        """The chunk of one environment that begins at row `start`, with zeros from row `stop` on.

        A whole chunk of a stream of one environment is not copied.
        """
        slot = start & self.mask
        assert slot + field.chunk_rows <= self.capacity, (start, field.chunk_rows, self.capacity)
        rows = self.arrays[field.name][slot : slot + field.chunk_rows, env]
        if stop < start + field.chunk_rows:
            rows = rows.copy()
            rows[stop - start :] = 0
        return np.ascontiguousarray(rows)

    def pieces(self, start: int, stop: int) -> Iterable[tuple[int, int, int]]:
        """Split rows into (row, count, slot), each without a turn of the ring."""
        while start < stop:
            slot = start & self.mask
            count = min(stop - start, self.capacity - slot)
            yield start, count, slot
            start += count
