"""A flat array: rows appended to raw chunk files, read through one contiguous map.

    c/0/0   rows 0 to H-1 of every environment: (time, env, *shape), little-endian, uncompressed
    c/1/0   rows H to 2H-1; and so on

Each file has its whole length from the start, without using disk blocks, so that zarr can read it
at any time; what lies above the committed rows is zeros or nothing at all. Columns advance on
their own, so the rows above the shortest column (`floor`) and below the longest (`top`) are
written again as they fill: bytes of existing rows stay as they are. The checksum of a file is the
crc32c of its bytes below `top`, with zeros where no row exists.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from replaystore.codec import crc32c
from replaystore.compiled import finding
from replaystore.field import Field
from replaystore.files import (
    AddressRange,
    FileState,
    GrowingFile,
    chunk_path,
    make_parents,
    read_pieces,
    read_range,
)
from replaystore.recycler import SMALLEST, Allocate


class FlatState(NamedTuple):
    """How far a flat array is written; `crc32c` is of its last file's bytes below `floor`."""

    floor: int
    top: int
    crc32c: int


def committed_checksum(cells: np.ndarray, rows: np.ndarray, crc: int = 0) -> int:
    """The checksum of cells `(time, env, *shape)`, of which `rows` of each environment exist."""
    shortest = int(np.clip(rows.min(), 0, len(cells)))
    ragged = cells[shortest:].copy()
    for env, end in enumerate(rows.tolist()):
        ragged[max(0, end - shortest) :, env] = 0
    return crc32c(_as_bytes(ragged), crc32c(_as_bytes(cells[:shortest]), crc))


def file_checksum(path: Path, field: Field, rows: np.ndarray, nbytes: int) -> int:
    """`committed_checksum` of a file's first `nbytes`, read piece by piece."""
    stride = len(rows) * field.row_nbytes
    even = min(int(np.clip(rows.min(), 0, None)) * stride, nbytes)
    crc = _checksum_of_first(path, even)
    if even == nbytes:
        return crc
    data = read_range(path, even, nbytes - even)
    cells = np.frombuffer(data, field.dtype).reshape(-1, len(rows), *field.shape)
    return committed_checksum(cells, rows - even // stride, crc)


def _checksum_of_first(path: Path, nbytes: int) -> int:
    crc = 0
    for piece in read_pieces(path, nbytes):
        crc = crc32c(piece, crc)
    return crc


def _as_bytes(cells: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(cells).reshape(-1).view(np.uint8)


class FlatWriter:
    """Appends rows to one flat array of a stream."""

    def __init__(self, path: Path, field: Field, *, num_envs: int, time_chunk: int) -> None:
        self.field = field
        self.state = FlatState(0, 0, 0)
        self._path = path
        self._ndim = 2 + len(field.shape)
        self._time_chunk = time_chunk
        self._shape = (num_envs, *field.shape)
        self._stride = num_envs * field.row_nbytes
        self._named: set[int] = set()  # files whose names are durable

    def resume(self, floor: int, top: int) -> None:
        """Take up the array of an earlier writer where its last commit left it."""
        number = floor // self._time_chunk
        nbytes = (floor - number * self._time_chunk) * self._stride
        path = chunk_path(self._path, number, self._ndim)
        self.state = FlatState(floor, top, _checksum_of_first(path, nbytes) if nbytes else 0)

    def cells(self, top: int) -> np.ndarray:
        """An array for the rows from the state's floor to `top`, holding those already written."""
        floor, old_top, _ = self.state
        cells = np.zeros((max(top, old_top) - floor, *self._shape), self.field.dtype)
        for number, low, high in self._pieces(floor, old_top):
            offset = (low - number * self._time_chunk) * self._stride
            path = chunk_path(self._path, number, self._ndim)
            data = read_range(path, offset, (high - low) * self._stride)
            cells[low - floor : high - floor] = np.frombuffer(data, cells.dtype).reshape(-1, *self._shape)
        return cells

    def write(self, cells: np.ndarray, floor: int) -> tuple[FlatState, list[FileState]]:
        """Write and sync what `cells` gave and the caller filled; the new state is not yet taken."""
        first, _, prefix = self.state
        top = first + len(cells)
        crc, files = 0, []
        for number, low, high in self._pieces(first, top):
            start = number * self._time_chunk
            data = cells[low - first : high - first].reshape(high - low, -1).view(np.uint8)
            with self._open(number) as file:
                if low > 0:  # an array that is smaller than a huge page needs none
                    file.hold_end_in_huge_page((low - start) * self._stride, data.size)
                file.write(data.reshape(-1).data, (low - start) * self._stride)
                file.sync()
            complete = min(max(floor, low), high) - low
            below = crc32c(data[:complete], prefix if start <= first else 0)
            files.append(FileState(number, (high - start) * self._stride, crc32c(data[complete:], below)))
            if number == floor // self._time_chunk:
                crc = below
        return FlatState(floor, top, crc), files

    def _pieces(self, low: int, high: int) -> list[tuple[int, int, int]]:
        """Split rows of time into (file number, low, high)."""
        size = self._time_chunk
        numbers = range(low // size, -(-high // size))
        return [(n, max(low, n * size), min(high, (n + 1) * size)) for n in numbers if low < high]

    def _open(self, number: int) -> GrowingFile:
        path = chunk_path(self._path, number, self._ndim)
        make_parents(path, self._path)
        file = GrowingFile.create(path, is_named=number in self._named)
        self._named.add(number)
        file.truncate(self._time_chunk * self._stride)
        return file


class FlatColumn:
    """One flat field of all streams as one array `(rows, *shape)`, however many files it has.

    What is read from disk is read page by page, or in huge pages until `read_by_page` is called.
    """

    def __init__(self, field: Field, rows: int, *, huge: bool = False) -> None:
        self._field = field
        self._range = AddressRange(rows * field.row_nbytes, huge=huge)
        self.read_by_page = self._range.read_by_page
        self._data = np.asarray(self._range)[: rows * field.row_nbytes]
        self.rows = self._data.view(field.dtype).reshape(rows, *field.shape)
        self.few = SMALLEST // field.row_nbytes  # rows that `take` allocates memory for well

    def place(self, array: Path, number: int, *, row: int, rows: int) -> None:
        """Map a file of `rows` rows so that its first is row `row` of the column."""
        nbytes = self._field.row_nbytes
        path = chunk_path(array, number, 2 + len(self._field.shape))
        self._range.place(path, offset=row * nbytes, nbytes=rows * nbytes, exact=True)

    def take_runs(self, numbers: np.ndarray, length: int, apart: int, allocate: Allocate) -> np.ndarray:
        """Of each run `length` rows, `apart` from one to the next, in memory from `allocate`: (batch, length, *shape).

        There must be compiled code.
        """
        field = self._field
        out = allocate((len(numbers), length, *field.shape), field.dtype)
        finding.copy_runs(self._data, field.row_nbytes, length, apart, numbers, out)
        return out

    def touch(self, numbers: np.ndarray) -> None:
        """Have the pages in which rows begin read from disk."""
        self._data.take(numbers * self._field.row_nbytes, mode="clip")

    def clear(self, *, row: int, rows: int) -> None:
        """Let go of the file that was mapped there; its rows must not be read again."""
        nbytes = self._field.row_nbytes
        self._range.clear(offset=row * nbytes, nbytes=rows * nbytes)
