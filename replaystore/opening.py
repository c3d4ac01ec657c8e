"""Opens a store's streams to write them: the lock, the newest head, the ring filled again."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from replaystore.arena import stream_path
from replaystore.bounds import Bounds
from replaystore.commit import create_stream
from replaystore.errors import UsageError
from replaystore.files import Lock, make_directory, write_atomic
from replaystore.head import HEAD, Head, decode_head, empty_head, encode_head, has_head, keep_head, read_head
from replaystore.index import Places
from replaystore.room import Room, ring_rows
from replaystore.schema import MAX_NUM_ENVS
from replaystore.view import View
from replaystore.writer import StreamWriter


class StreamOpener:
    """Begins to write streams of one store; `root` is its `zarr.json`."""

    def __init__(self, view: View, bounds: Bounds, root: bytes) -> None:
        self._view = view
        self._bounds = bounds
        self._root = root

    def newest(self, num_envs: int | None) -> StreamWriter:
        """Write the newest stream of this many environments that nobody holds, or a new one, and show it."""
        heads, num_envs = self._view.heads, self.width(num_envs)
        newest = max(heads, default=-1)
        ours = [stream for stream in sorted(heads, reverse=True) if heads[stream].num_envs == num_envs]
        for stream in itertools.chain(ours, itertools.count(newest + 1)):
            writer = self.open(stream, num_envs)
            if writer is not None:
                return writer
        raise AssertionError("streams have no end")

    def width(self, num_envs: int | None) -> int:
        """So many environments, once that is checked; by default as many as the newest stream has."""
        heads = self._view.heads
        if num_envs is None:
            return heads[max(heads)].num_envs if heads else 1
        check_num_envs(num_envs)
        return num_envs

    def open(self, stream: int, num_envs: int) -> StreamWriter | None:
        """Write a stream, which is made if there is none, and show it; None if another writer has it."""
        path = self._path(stream)
        make_directory(path, exist_ok=True)
        lock = Lock.acquire(path / "lock")
        if lock is None:
            return None
        try:
            if not has_head(path):
                empty = empty_head(self._view.schema, num_envs, is_bounded=not self._bounds.is_none)
                create_stream(path, self._view.schema, empty, self._root)
            head = self._newest_head(stream)
            if head.num_envs != num_envs:  # made meanwhile by somebody else
                lock.release()
                return None
        except BaseException:
            lock.release()
            raise
        writer = self._begin(stream, lock, head)
        try:
            self._view.attach(writer)
            return writer
        except BaseException:
            writer.discard()
            self._view.forget(writer)
            raise

    def take_up(self, stream: int, lock: Lock) -> StreamWriter:
        """Write a stream whose lock is held already; without an error it is the writer's."""
        try:
            head = self._newest_head(stream)
        except BaseException:
            lock.release()
            raise
        return self._begin(stream, lock, head)

    def _begin(self, stream: int, lock: Lock, head: Head) -> StreamWriter:
        """A writer that goes on from a stream's newest head."""
        path = self._path(stream)
        schema = self._view.schema
        try:
            keep_head(path, head, schema)
            room = self._room_of(stream, head)
            writer = StreamWriter(path, schema, head, number=stream, lock=lock, **room)
        except BaseException:
            lock.release()
            raise
        try:
            if writer.head.commit > head.commit:
                self._view.move_on({stream: encode_head(writer.head, schema)})
            self._refill(writer, head)
            writer.start()
            return writer
        except BaseException:
            writer.discard()
            raise

    def _room_of(self, stream: int, head: Head) -> dict[str, Any]:
        """What makes a writer keep within the store's bounds."""
        if self._bounds.is_none:
            return {}
        schema = self._view.schema
        rows = ring_rows(schema, self._bounds, head.num_envs)
        if self._bounds.reservoir:  # whose streams are evicted as a whole
            return {"ring_rows": rows}
        return {"room": Room(self._view.path, stream, schema, self._bounds), "ring_rows": rows}

    def _newest_head(self, stream: int) -> Head:
        """The head to go on from; the stream is locked, so nobody replaces it."""
        path = self._path(stream)
        known = self._view.heads.get(stream)
        data = read_head(path)
        if known is not None and decode_head(data, self._view.schema, path / HEAD).commit > known.commit:
            data = self._view.choose_heads()[stream]
            if data != read_head(path):
                write_atomic(path / HEAD, data)  # what this copy lacks is given up
        self._view.move_on({stream: data})
        return self._view.heads[stream]

    def _refill(self, writer: StreamWriter, head: Head) -> None:
        schema = self._view.schema
        for env, (floor, rows) in enumerate(zip(writer.floor_of(head), head.rows, strict=True)):
            if floor < rows:
                one = np.array([0])
                places = Places(one + writer.number, one + env, one + floor, one, one)
                wanted = [
                    (np.arange(floor, head.field_rows(schema, name)[env])[None], [name])
                    for name in schema.by_name
                ]
                arrays = self._view.arrays(places, wanted)
                rings = {name: array[0] for name, array in arrays.items()}
                writer.refill(env, int(floor), int(rows - floor), rings)

    def _path(self, stream: int) -> Path:
        return stream_path(self._view.path, stream)


def check_num_envs(num_envs: Any) -> None:
    """Raise `UsageError` for what could be no number of environments."""
    if not isinstance(num_envs, int) or isinstance(num_envs, bool) or not 1 <= num_envs <= MAX_NUM_ENVS:
        raise UsageError(f"num_envs: expected an int from 1 to {MAX_NUM_ENVS}, got {num_envs!r}")
