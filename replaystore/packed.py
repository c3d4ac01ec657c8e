"""A packed array: chunks into shards, shards into chunks.

A shard is one zarr v3 `sharding_indexed` file:

    chunk | chunk | … | index | crc32c

chunk    encoded bytes, ending in their own crc32c (`codec.py`)
index    two little-endian u64 per chunk, in order (time, env): offset, nbytes; all ones if absent
crc32c   of the index, 4 bytes, little-endian

A commit appends the chunks that changed and a fresh index behind the last one, so that the file's
end is a valid index at every commit and nothing committed is written over. A shard that is full,
or holds more dead bytes than live ones, is repacked: replaced by a file of its live chunks alone.
A reader that knows the committed length looks for the index there, or, if the shard was repacked
since, at the file's end. The checksum of a shard covers what repacking keeps, and whatever a commit can
change: the encoded sizes of its chunks, and the checksums of the first and of each environment's last.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from replaystore.codec import MIN_CHUNK_BYTES, crc32c
from replaystore.errors import CorruptionError
from replaystore.field import Field
from replaystore.files import (
    FileState,
    GrowingFile,
    chunk_path,
    make_parents,
    map_whole,
    read_bytes,
    write_atomic,
)

ABSENT = 2**64 - 1
MAX_SHARD_BYTES = 1 << 40


@dataclass(frozen=True)
class ShardState:
    """A shard at a commit: its length, its index `(chunks, 2)`, the chunks' checksums."""

    nbytes: int
    index: np.ndarray
    checksums: np.ndarray

    @property
    def live_nbytes(self) -> int:
        """Bytes of the shard once repacked."""
        sizes = self.index[self.index[:, 1] != ABSENT, 1]
        return int(sizes.sum()) + _index_nbytes(len(self.index))

    def file(self, number: int, num_envs: int) -> FileState:
        ends = self.checksums[_ends(self.index, num_envs)]
        return FileState(number, self.nbytes, _identity(self.index, ends))


def _index_nbytes(chunks: int) -> int:
    return 16 * chunks + 4


def _ends(index: np.ndarray, num_envs: int) -> np.ndarray:
    """The first chunk that is there, and each environment's last: all others are full."""
    numbers = np.arange(len(index)).reshape(-1, num_envs)
    present = np.where((index[:, 1] != ABSENT).reshape(-1, num_envs), numbers, -1)
    last = np.sort(present.max(axis=0))
    return np.concatenate([[present[present >= 0].min()], last[last >= 0]])


def _identity(index: np.ndarray, ends: np.ndarray) -> int:
    return crc32c(ends.astype("<u4").tobytes(), crc32c(np.ascontiguousarray(index[:, 1]).tobytes()))


def _encode_index(index: np.ndarray) -> bytes:
    data = index.tobytes()
    return data + crc32c(data).to_bytes(4, "little")


def read_index(data: np.ndarray, chunks: int) -> np.ndarray | None:
    """The index at the end of a shard's bytes, `(chunks, 2)`, or None if there is no valid one."""
    body = len(data) - _index_nbytes(chunks)
    if body < 0:
        return None
    raw = data[body:-4]
    if crc32c(raw) != int.from_bytes(data[-4:].tobytes(), "little"):
        return None
    index = raw.view("<u8").reshape(chunks, 2)
    offset, nbytes = index[index[:, 1] != ABSENT].T
    fits = (nbytes >= MIN_CHUNK_BYTES) & (nbytes <= body) & (offset <= body - np.minimum(nbytes, body))
    return index if fits.all() else None


def _chunk_checksum(data: np.ndarray, entry: np.ndarray) -> int:
    end = int(entry[0] + entry[1])
    return int.from_bytes(data[end - 4 : end].tobytes(), "little")


@dataclass(frozen=True)
class Shard:
    """A mapped shard as of one commit: its bytes, and its index (chunks, 2), which lies in them."""

    path: Path
    data: np.ndarray
    index: np.ndarray


def open_shard(path: Path, state: FileState, chunks: int, num_envs: int) -> Shard:
    """Map a shard and find the index that a commit speaks of.

    Raises `CorruptionError` if the file is missing, shorter than committed without having been
    repacked, damaged in its index, or another shard than the one that was committed.
    """
    return Shard(path, *find_index(path, map_whole(path), state, chunks, num_envs))


def find_index(
    path: Path, whole: np.ndarray, state: FileState, chunks: int, num_envs: int
) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a shard as of a commit, and its index; see `open_shard`.

    The checksums of earlier stores cover but the shard's first and last chunk.
    """
    for data in (whole[: state.nbytes], whole):
        index = read_index(data, chunks)
        if index is None:
            continue
        if (index[:, 1] == ABSENT).all():
            continue
        ends = np.array([_chunk_checksum(data, entry) for entry in index[_ends(index, num_envs)]])
        if state.crc32c in (_identity(index, ends), _identity(index, ends[[0, -1]])):
            return data, index
    raise CorruptionError(
        f"{path}: expected the shard committed with {state.nbytes} bytes, found {len(whole)} bytes"
        " of another, or a damaged index: run `replaystore verify`"
    )


class PackedWriter:
    """Appends encoded chunks to one packed array of a stream."""

    def __init__(self, path: Path, field: Field, *, chunks: int, num_envs: int) -> None:
        """`chunks` are those of a shard, all environments together."""
        self.field = field
        self.num_envs = num_envs
        self.shards: dict[int, ShardState] = {}
        self.chunks = chunks
        self._path = path
        self._ndim = 2 + len(field.shape)
        self._named: set[int] = set()  # shards whose names are durable

    def resume(self, states: Iterable[FileState]) -> None:
        """Take up the open shards of an earlier writer; what it wrote after its commit is cut off."""
        for state in states:
            shard = open_shard(self.shard_path(state.number), state, self.chunks, self.num_envs)
            index = shard.index.copy()
            checksums = np.zeros(self.chunks, np.uint32)
            for i in np.flatnonzero(index[:, 1] != ABSENT):
                checksums[i] = _chunk_checksum(shard.data, index[i])
            self.shards[state.number] = ShardState(len(shard.data), index, checksums)
            with self._open(state.number) as file:
                file.truncate(len(shard.data))

    def shard_path(self, number: int) -> Path:
        return chunk_path(self._path, number, self._ndim)

    def write(self, encoded: dict[int, bytes]) -> tuple[dict[int, ShardState], list[FileState]]:
        """Append chunks by their number in the array, and sync; the new states are not yet taken."""
        states = {}
        by_shard: dict[int, dict[int, bytes]] = {}
        for number, data in encoded.items():
            by_shard.setdefault(number // self.chunks, {})[number % self.chunks] = data
        for number, chunks in by_shard.items():
            states[number] = self._append(number, chunks)
        return states, [state.file(number, self.num_envs) for number, state in states.items()]

    def _append(self, number: int, chunks: dict[int, bytes]) -> ShardState:
        old = self.shards.get(number)
        if old is None:
            index = np.full((self.chunks, 2), ABSENT, "<u8")
            old = ShardState(0, index, np.zeros(self.chunks, np.uint32))
        index, checksums, offset = old.index.copy(), old.checksums.copy(), old.nbytes
        for i, data in chunks.items():
            index[i] = offset, len(data)
            checksums[i] = int.from_bytes(data[-4:], "little")
            offset += len(data)
        blob = b"".join([*chunks.values(), _encode_index(index)])
        with self._open(number) as file:
            file.truncate(old.nbytes)
            file.write(blob, old.nbytes)
            file.sync()
        return ShardState(old.nbytes + len(blob), index, checksums)

    def repack(self, number: int) -> FileState:
        """Replace a shard by one of its live chunks alone, as of the last commit."""
        state, path = self.shards[number], self.shard_path(number)
        data = read_bytes(path, MAX_SHARD_BYTES)
        index = state.index.copy()
        parts, offset = [], 0
        for i in np.flatnonzero(index[:, 1] != ABSENT):
            start, nbytes = map(int, index[i])
            parts.append(data[start : start + nbytes])
            index[i, 0] = offset
            offset += nbytes
        blob = b"".join([*parts, _encode_index(index)])
        write_atomic(path, blob)
        self.shards[number] = ShardState(len(blob), index, state.checksums)
        return self.shards[number].file(number, self.num_envs)

    def seal(self, number: int) -> None:
        """Forget a shard that is full and repacked: nothing is written to it again."""
        del self.shards[number]

    def _open(self, number: int) -> GrowingFile:
        path = self.shard_path(number)
        make_parents(path, self._path)
        file = GrowingFile.create(path, is_named=number in self._named)
        self._named.add(number)
        return file
