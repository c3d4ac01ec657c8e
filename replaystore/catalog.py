"""What a store holds, over all its streams: their heads, the index, the table of episodes."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from replaystore.appender import Ended
from replaystore.arena import stream_path
from replaystore.episodes import above, episode_schema, integers, open_part, part_path
from replaystore.errors import CorruptionError, SnapshotExpired, StoreGone
from replaystore.files import FileState, list_directory
from replaystore.head import (
    HEAD,
    Head,
    check_episodes,
    decode_head,
    encode_head,
    has_head,
    kept_heads,
    read_head,
)
from replaystore.index import EpisodeIndex
from replaystore.reader import check_files
from replaystore.schema import FLAGS, Schema
from replaystore.writer import StreamWriter


class Catalog:
    """The streams of a store as of one commit of each, and what writers here have added since."""

    def __init__(self, root: Path, schema: Schema) -> None:
        self.index = EpisodeIndex()
        self.heads: dict[int, Head] = {}
        self._loaded: dict[int, bytes] = {}
        self.writers: dict[int, StreamWriter] = {}  # here, by stream
        self._root = root
        self._schema = schema
        self._table = episode_schema(schema)
        self._parts: dict[int, dict[int, pa.Table]] = {}  # by stream and number
        self._open_elsewhere: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
        self._indexed: dict[int, tuple[int, int]] = {}  # by stream: parts, and episodes since

    def read_heads(self) -> dict[int, bytes]:
        """The newest head of every stream; a stream without a first commit is none yet."""
        try:
            names = list_directory(self._root / "streams")
        except FileNotFoundError as error:
            raise StoreGone(f"{self._root}: the store is no longer there") from error
        streams = [int(name) for name in names if len(name) == 6 and name.isascii() and name.isdigit()]
        heads = {}
        for stream in streams:
            path = stream_path(self._root, stream)
            try:
                heads[stream] = read_head(path)
            except CorruptionError:
                if stream in self.heads:
                    raise
                if has_head(path):  # by now, or it is damaged
                    heads[stream] = read_head(path)
        return heads

    def choose_heads(self) -> dict[int, bytes]:
        """For each stream its newest head of which all files are there.

        That is the newest, but in a copy that was made while the store was written: there, with a
        warning, it may be an older one.
        """
        return {stream: self._choose_head(stream, data) for stream, data in self.read_heads().items()}

    def _choose_head(self, stream: int, data: bytes) -> bytes:
        path = stream_path(self._root, stream)
        while True:
            head = decode_head(data, self._schema, path / HEAD)
            try:
                check_files(path, head, self._schema)
                return data
            except CorruptionError as error:
                again = read_head(path)
                if again == data:
                    return self._older_head(path, head, error)
                data = again  # its writer goes on, and has repacked a shard

    def _older_head(self, path: Path, newest: Head, error: CorruptionError) -> bytes:
        for head, data in kept_heads(path, self._schema):
            if head.commit < newest.commit:
                try:
                    check_files(path, head, self._schema)
                except CorruptionError:
                    continue  # an older one may be whole
                lost = f"commit {head.commit} instead of {newest.commit}: {error}"
                warnings.warn(
                    f"{path}: a copy of a store that was being written? Showing {lost}", stacklevel=7
                )
                return data
        raise error

    def check(self) -> None:
        """Raise at the first stream of which files are missing or wrong, and check the index."""
        for stream, head in self.heads.items():
            path, shown = stream_path(self._root, stream), head
            while not self._owns(stream):
                try:
                    check_files(path, shown, self._schema)
                    break
                except CorruptionError:
                    newest = decode_head(read_head(path), self._schema, path / HEAD)
                    if newest.commit <= shown.commit:
                        raise
                    shown = newest  # its writer has repacked a shard since
        self.index.check()
        lengths = integers(self.episodes(), "length")
        assert lengths.sum() == len(self.index), (lengths.sum(), len(self.index))

    def snapshot(self) -> dict[int, bytes]:
        """The heads of the commit shown, as bytes."""
        return {stream: encode_head(head, self._schema) for stream, head in self.heads.items()}

    def decode(self, data: Mapping[int, bytes]) -> dict[int, Head]:
        """The heads among these that are new, checked; those of the writers here are not asked for."""
        return {
            stream: decode_head(raw, self._schema, stream_path(self._root, stream) / HEAD)
            for stream, raw in data.items()
            if self._loaded.get(stream) != raw and not self._owns(stream)
        }

    def goes_on(self, heads: Mapping[int, Head]) -> bool:
        """Whether these heads have all episodes of those shown: not if their stream went back meanwhile."""
        return all(self._goes_on(stream, head) for stream, head in heads.items() if stream in self.heads)

    def _goes_on(self, stream: int, head: Head) -> bool:
        path = stream_path(self._root, stream)
        try:
            return has_all_of(path, head, self.heads[stream], self._table)
        except CorruptionError as error:
            self._check_parts_there(path, head, error)
            raise

    def take(
        self, heads: Mapping[int, Head], data: Mapping[int, bytes], order: np.ndarray | None = None
    ) -> None:
        """Take over heads, and index their episodes, stream by stream.

        In an index that is empty the first ones come as `order` says: the streams of closed episodes.
        """
        parts = {stream: self._open_parts(stream, head) for stream, head in heads.items()}
        for stream, head in heads.items():
            self.index.set_width(stream, head.num_envs)
            self.index.evict(stream, head.floor)
        if order is not None:
            self._index_in_order(heads, parts, order)
        for stream, head in heads.items():
            self._index_head(stream, head, parts[stream])
        self.heads |= heads
        self._loaded |= {stream: data[stream] for stream in heads}
        self._index_open()

    def attach(self, writer: StreamWriter) -> None:
        """From now on a stream shows what its writer here has, not what its head says is open."""
        self.writers[writer.number] = writer
        self._index_open()

    def detach(self, writer: StreamWriter) -> None:
        """From now on a stream shows its head, all of which `catch_up` has indexed: its writer has closed."""
        stream, head = writer.number, writer.head
        assert self.heads[stream] is head, (stream, head.commit)
        self._loaded[stream] = encode_head(head, self._schema)
        self._indexed[stream] = head.next_part, len(head.episodes)
        del self.writers[stream]
        self._index_open()

    def catch_up(self, writer: StreamWriter) -> dict[int, Head]:
        """Index what a writer here appended since the last call; returns its head if it changed.

        The caller holds the writer's lock.
        """
        changed = {}
        if writer.head is not self.heads[writer.number]:
            changed = {writer.number: writer.head}
            self.heads |= changed
            self._open_parts(writer.number, writer.head)
            self.index.evict(writer.number, writer.head.floor)
        ended = writer.take_ended()
        if len(ended.env):
            self.index.append(writer.number, *ended)
        self.index.set_open(self._open_elsewhere + self._open_here())
        return changed

    def episodes(self) -> pa.Table:
        """All episodes; those that are open behind the others of their stream."""
        tables = [self._stream_episodes(stream) for stream in sorted(self.heads)]
        return pa.concat_tables([_with_stream(self._table.empty_table(), 0), *tables])

    def _owns(self, stream: int) -> bool:
        return stream in self.writers

    def _index_head(self, stream: int, head: Head, parts: list[pa.Table]) -> None:
        done_parts, done_episodes = self._indexed.get(stream, (0, 0))
        tables = [*parts, head.episodes]
        start = head.closed - sum(map(len, tables))
        for number, table in enumerate(tables, start=head.first_part):
            skip = done_episodes if number == done_parts else 0
            if number >= done_parts:
                before = None if head.evicted is None else {stream: start + skip}
                self.index.append(stream, *_ended(table.slice(skip)), before=before)
            start += len(table)
        self._indexed[stream] = head.next_part, len(head.episodes)

    def _index_in_order(
        self, heads: Mapping[int, Head], parts: Mapping[int, list[pa.Table]], order: np.ndarray
    ) -> None:
        """Index all closed episodes, of streams in this order."""
        assert not self._indexed, self._indexed
        tables = {
            stream: pa.concat_tables([*parts[stream], heads[stream].episodes]) for stream in sorted(heads)
        }
        for stream, table in tables.items():
            if heads[stream].evicted is not None:
                order = _fitted(order, stream, len(table))
        counts = [len(table) for table in tables.values()]
        by_stream = np.argsort(order, kind="stable")
        assert np.array_equal(order[by_stream], np.repeat(sorted(heads), counts)), (counts, order)
        columns = []
        for values in zip(*map(_ended, tables.values()), strict=True):
            column = np.empty(len(order), np.int64)
            column[by_stream] = np.concatenate(values)
            columns.append(column)
        bounded = {stream: head for stream, head in heads.items() if head.evicted is not None}
        before = {stream: head.closed - len(tables[stream]) for stream, head in bounded.items()}
        self.index.append(order, *columns, before=before)
        self._indexed = {stream: (head.next_part, len(head.episodes)) for stream, head in heads.items()}

    def _open_parts(self, stream: int, head: Head) -> list[pa.Table]:
        """The sealed parts that are left, in order."""
        known, path = self._parts.get(stream, {}), stream_path(self._root, stream)
        parts = {}
        for state in head.parts:
            if state.number not in known:
                part = self._open_part(path, head, state)
                check_episodes(part, head, part_path(path, state.number))
                known = known | {state.number: part}
            parts[state.number] = known[state.number]
        self._parts[stream] = parts
        return list(parts.values())

    def _open_part(self, path: Path, head: Head, state: FileState) -> pa.Table:
        try:
            return open_part(path, state, self._table)
        except CorruptionError as error:
            self._check_parts_there(path, head, error)
            raise

    def _check_parts_there(self, path: Path, head: Head, error: CorruptionError) -> None:
        """Raise `SnapshotExpired` if parts of the index that a head names were evicted since."""
        if decode_head(read_head(path), self._schema, path / HEAD).first_part > head.first_part:
            raise SnapshotExpired(f"{path}: commit {head.commit} was evicted: refresh()") from error

    def _index_open(self) -> None:
        others = [stream for stream in self.heads if not self._owns(stream)]
        self._open_elsewhere = [(stream, *_open_places(self.heads[stream])) for stream in others]
        self.index.set_open(self._open_elsewhere + self._open_here())

    def _open_here(self) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        return [(stream, *writer.open_episodes()) for stream, writer in self.writers.items()]

    def _stream_episodes(self, stream: int) -> pa.Table:
        head = self.heads[stream]
        if self._owns(stream):
            newest = self.writers[stream].uncommitted()
        else:
            newest = head.open.filter(pa.array(integers(head.open, "length") > 0))
        table = pa.concat_tables([*self._parts[stream].values(), head.episodes, newest])
        return _with_stream(above(table, head.floor), stream)


def has_all_of(path: Path, head: Head, older: Head, table: pa.Schema) -> bool:
    """Whether a stream's head has the closed episodes of an older one, and has them first.

    Of those that were evicted since nothing is asked.
    """
    parts = {part.number: part for part in head.parts}
    if any(parts.get(part.number) != part for part in older.parts if part.number >= head.first_part):
        return False
    number = older.next_part
    if number < head.first_part:
        return True
    following = open_part(path, parts[number], table) if number in parts else head.episodes
    same: bool = following.slice(0, len(older.episodes)).equals(older.episodes)
    return same


def _fitted(order: np.ndarray, stream: int, count: int) -> np.ndarray:
    """The order with so many episodes of a stream, more or fewer of them at its beginning."""
    here = np.flatnonzero(order == stream)
    rest = np.delete(order, here[: max(0, len(here) - count)])
    return np.concatenate([np.full(max(0, count - len(here)), stream), rest])


def _ended(table: pa.Table) -> Ended:
    return Ended(*(integers(table, name) for name in ("env", "first_row", "length", *FLAGS)))


def _open_places(head: Head) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    env, first, length, *_ = _ended(head.open)
    some = length > 0
    return env[some], first[some], length[some]


def _with_stream(table: pa.Table, stream: int) -> pa.Table:
    column = pa.array(np.full(len(table), stream), pa.int32())
    return table.add_column(0, pa.field("stream", pa.int32(), nullable=False), column)
