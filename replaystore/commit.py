"""The commit of a stream: rows from the ring to its files, then one rename of the head.

`StreamCommitter.commit` is where rows become durable: array lengths, data and index parts are
written and synced, and only then the head that names them is replaced. Nothing is taken over in
memory before that, so that after a failure the same commit can be done again from the start.

`StreamCommitter.evict` goes the other way: first a head that names less; when it is durable,
`remove_evicted` removes the files that it no longer names, or the next writer does after a crash.
`evict_stream` gives up a whole stream in the same way.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from replaystore.codec import ChunkCodec
from replaystore.episodes import (
    PART_EPISODES,
    Episode,
    episode_schema,
    episode_table,
    open_part,
    write_part,
)
from replaystore.files import (
    FileState,
    list_directory,
    make_parents,
    remove,
    remove_tree,
    sweep_partials,
    write_atomic,
)
from replaystore.flat import FlatState, FlatWriter
from replaystore.head import Evicted, Head, forget_older_heads, write_head
from replaystore.index import CONTEXT
from replaystore.metadata import render_array, render_group
from replaystore.packed import PackedWriter, ShardState
from replaystore.ring import Ring
from replaystore.schema import Schema
from replaystore.spans import Spans

DEAD_BYTES = 1 << 20  # of an open shard, beside as many as are live, before it is repacked


class Pending(NamedTuple):
    """What a commit adds: rows per environment, episodes closed since the last, open ones.

    With `base` they are added to the episodes of that older head, and all later ones are dropped.
    """

    rows: np.ndarray
    closed: list[Episode]
    open: list[Episode]
    base: Head | None = None


class StreamCommitter:
    """Writes the commits of one stream, whose lock the caller holds."""

    def __init__(self, path: Path, schema: Schema, head: Head) -> None:
        """Take up the files where the head left them, cutting off what it does not name."""
        sweep_partials(path)
        self.path = path
        self.head = head
        self._schema = schema
        self._num_envs = head.num_envs
        self._time_chunk = schema.time_chunk(head.num_envs)
        self._lengths: dict[str, int] = {}
        self._flat: dict[str, FlatWriter] = {}
        self._packed: dict[str, PackedWriter] = {}
        for field in schema.fields:
            rows = head.field_rows(schema, field.name)
            if field.packed:
                chunks = schema.env_chunks(self._num_envs) * self._num_envs
                packed = PackedWriter(path / field.name, field, chunks=chunks, num_envs=self._num_envs)
                full = int(rows.min()) // schema.shard_rows(field, self._num_envs)
                states = head.files[field.name].values()
                packed.resume(state for state in states if state.number >= full - 1)
                self._packed[field.name] = packed
            else:
                flat = FlatWriter(
                    path / field.name, field, num_envs=self._num_envs, time_chunk=self._time_chunk
                )
                flat.resume(int(rows.min()), int(rows.max()))
                self._flat[field.name] = flat
        self._spans: Spans | None = None  # read when they are asked for
        self.remove_evicted()
        self._name_repacked()

    def _name_repacked(self) -> None:
        """Commit the lengths of shards that a writer repacked and was killed before it did.

        Readers find the index of such a shard at its end, until something is appended to it.
        """
        changed = {
            name: [
                state.file(number, self._num_envs)
                for number, state in writer.shards.items()
                if state.nbytes != self.head.files[name][number].nbytes
            ]
            for name, writer in self._packed.items()
        }
        if any(changed.values()):
            self._replace_head(changed)

    def _replace_head(self, changed: Mapping[str, list[FileState]]) -> None:
        head = _with_files(replace(self.head, commit=self.head.commit + 1), changed)
        write_head(self.path, head, self._schema)
        self.head = head

    def commit(self, pending: Pending, ring: Ring) -> Head:
        """Make the pending rows durable; on any exception the last commit stands."""
        head = self._next_head(pending)
        spans = self._next_spans(pending, head)
        head = _counted(head, spans)
        if pending.base is None:  # or else it could replace a part that the last commit names
            head = self._seal_episodes(head)
        self._render_arrays(int(pending.rows.max()), exact=False)
        flat = {name: self._write_flat(name, head, ring) for name in self._flat}
        packed = {name: self._write_packed(name, head, ring) for name in self._packed}
        head = _with_files(head, {name: files for name, (_, files) in (flat | packed).items()})
        write_head(self.path, head, self._schema)
        for name, (state, _) in flat.items():
            self._flat[name].state = state
        for name, (shards, _) in packed.items():
            self._packed[name].shards |= shards
        self.head, self._spans = head, spans
        if pending.base is not None:
            self._forget_later_parts()
        return head

    def _forget_later_parts(self) -> None:
        """Remove the parts of the index that the head no longer names, and the older heads that did."""
        forget_older_heads(self.path, self.head)
        last = max((part.number for part in self.head.parts), default=-1)
        folder = self.path / "index"
        for name in list_directory(folder) if folder.is_dir() else []:
            if name.endswith(".arrow") and int(name.removesuffix(".arrow")) > last:
                remove(folder / name)

    # ---- eviction

    @property
    def spans(self) -> Spans:
        """The closed episodes that are left; of a store with bounds."""
        if self._spans is None:
            self._spans = self._spans_of(self.head)
        return self._spans

    def _spans_of(self, head: Head) -> Spans:
        table = episode_schema(self._schema)
        tables = {part.number: open_part(self.path, part, table) for part in head.parts}
        return Spans.of(tables | {head.next_part: head.episodes}).above(head.floor)

    @property
    def evictable(self) -> int:
        """The row up to which rows can be evicted: in no environment is one below it written again."""
        keep = max(field.chunk_rows for field in self._schema.fields)
        return int((self.head.rows - self.head.is_open).min()) // keep * keep

    def evict(self, floor: int) -> Head:
        """Give up all transitions below a row; `remove_evicted` then removes their files."""
        assert self.head.evicted is not None, self.path
        assert self.head.floor <= floor <= self.evictable, (self.head.floor, floor, self.evictable)
        spans = self.spans.above(floor)
        first_part = int(spans.part.min(initial=self.head.next_part))
        head = replace(
            self.head,
            commit=self.head.commit + 1,
            evicted=Evicted(floor, first_part),
            parts=tuple(part for part in self.head.parts if part.number >= first_part),
        )
        files = {name: self._files_left(name, head) for name in head.files}
        head = _counted(replace(head, files=files), spans)
        write_head(self.path, head, self._schema)
        self.head, self._spans = head, spans
        for name, writer in self._packed.items():
            writer.shards = {n: state for n, state in writer.shards.items() if n in head.files[name]}
        return head

    def _files_left(self, name: str, head: Head) -> dict[int, FileState]:
        start = head.first_file(self._schema.shard_rows(self._schema.by_name[name], self._num_envs))
        return {number: state for number, state in head.files[name].items() if number >= start}

    def remove_evicted(self) -> None:
        """Remove the files that the head names no more, also those of a writer that was killed."""
        _remove_evicted(self.path, self.head, self._schema)

    # ---- the next head

    def tidy(self, *, final: bool) -> Head:
        """Repack full shards, and at the end open ones; give arrays their exact length at the end."""
        changed = {name: files for name in self._packed if (files := self._repack(name, final))}
        if changed:
            self._replace_head(changed)
        if final:
            self._render_arrays(int(self.head.rows.max()), exact=True)
            forget_older_heads(self.path, self.head)
        return self.head

    def _next_head(self, pending: Pending) -> Head:
        table = episode_schema(self._schema)
        base = self.head if pending.base is None else pending.base
        added, open_ = episode_table(pending.closed, table), episode_table(pending.open, table)
        closed = pa.concat_tables([base.episodes, added])
        return replace(
            self.head,
            commit=self.head.commit + 1,
            rows=pending.rows,
            closed=base.closed + len(pending.closed),
            parts=tuple(part for part in base.parts if part.number >= self.head.first_part),
            episodes=closed,
            open=open_,
        )

    def _next_spans(self, pending: Pending, head: Head) -> Spans | None:
        if head.evicted is None:
            return None
        if pending.base is not None:
            return self._spans_of(head)
        added = episode_table(pending.closed, episode_schema(self._schema))
        return self.spans.joined(Spans.of({self.head.next_part: added})).above(head.floor)

    def _seal_episodes(self, head: Head) -> Head:
        if len(head.episodes) < PART_EPISODES:
            return head
        make_parents(self.path / "index" / "part", self.path)
        part = write_part(self.path, head.next_part, head.episodes.combine_chunks())
        return replace(head, parts=(*head.parts, part), episodes=head.episodes.schema.empty_table())

    def _write_flat(self, name: str, head: Head, ring: Ring) -> tuple[FlatState, list[FileState]]:
        writer = self._flat[name]
        old, new = self._rows(self.head, name), self._rows(head, name)
        if (old == new).all():
            return writer.state, []
        cells = writer.cells(int(new.max()))
        floor = writer.state.floor
        for env in range(self._num_envs):
            cells[old[env] - floor :, env] = 0  # what a writer that was killed may have left
            ring.copy_to(cells[old[env] - floor :, env], name, env, int(old[env]), int(new[env]))
        return writer.write(cells, int(new.min()))

    def _write_packed(
        self, name: str, head: Head, ring: Ring
    ) -> tuple[dict[int, ShardState], list[FileState]]:
        writer = self._packed[name]
        field, codec = writer.field, ChunkCodec(writer.field)
        size = field.chunk_rows
        old, new = self._rows(self.head, name), self._rows(head, name)
        encoded = {}
        for env in np.flatnonzero(old != new).tolist():
            for first in range(int(old[env]) // size * size, int(new[env]), size):
                rows = ring.chunk(field, env, first, int(new[env]))
                encoded[first // size * self._num_envs + env] = codec.encode(rows)
        return writer.write(encoded)

    def _rows(self, head: Head, name: str) -> np.ndarray:
        return head.field_rows(self._schema, name)

    def _repack(self, name: str, final: bool) -> list[FileState]:
        writer, repacked = self._packed[name], []
        shard_rows = self._schema.shard_rows(writer.field, self._num_envs)
        full = int(self._rows(self.head, name).min()) // shard_rows
        for number, state in list(writer.shards.items()):
            live = state.live_nbytes
            dead = state.nbytes - live
            if dead and (number < full or dead > live + DEAD_BYTES or (final and dead > live // 16)):
                repacked.append(writer.repack(number))
            if number < full:
                writer.seal(number)
        return repacked

    def _render_arrays(self, rows: int, *, exact: bool) -> None:
        """Give every array's `zarr.json` a length of at least the rows written."""
        for field in self._schema.fields:
            step = self._schema.shard_rows(field, self._num_envs)
            length = rows if exact else max(-(-rows // step) * step, step)
            if self._lengths.get(field.name) != length:
                data = render_array(self._schema, field, num_envs=self._num_envs, length=length)
                write_atomic(self.path / field.name / "zarr.json", data)
                self._lengths[field.name] = length


def evict_stream(path: Path, head: Head, schema: Schema) -> None:
    """Give up all of a stream that nobody writes, for good; does what is left to do if it was cut short.

    `head` is the stream's newest. Its rows stay counted, so that no id is given twice.
    """
    if not head.is_evicted:
        sizes = [schema.shard_rows(field, head.num_envs) for field in schema.fields]
        end = max(-(-int(head.rows.max()) // size) * size for size in sizes)
        head = replace(
            head,
            commit=head.commit + 1,
            files={name: {} for name in head.files},
            parts=(),
            episodes=head.episodes.slice(0, 0),
            open=head.open.slice(0, 0),
            evicted=Evicted(end + CONTEXT, head.next_part + 1),  # as if the last were sealed as a part
        )
        write_head(path, head, schema)
    forget_older_heads(path, head)
    _remove_evicted(path, head, schema)


def _remove_evicted(path: Path, head: Head, schema: Schema) -> None:
    for field in schema.fields:
        start = head.first_file(schema.shard_rows(field, head.num_envs))
        folder = path / field.name / "c"
        for name in list_directory(folder) if start and folder.is_dir() else []:
            if name.isdigit() and int(name) < start:
                remove_tree(folder / name)
    folder = path / "index"
    for name in list_directory(folder) if head.first_part and folder.is_dir() else []:
        number = name.removesuffix(".arrow")
        if number.isdigit() and int(number) < head.first_part:
            remove(folder / name)


class MakesRoom(Protocol):
    """What a writer of a bounded store asks before each commit."""

    def make(self, committer: StreamCommitter, pending: Pending) -> Head:
        """Evict what pending rows need room for; returns the head that is then the newest."""
        ...

    def ask(self, rows: Mapping[int, int]) -> None:
        """Evict the rows of streams below one as well."""
        ...


def create_stream(path: Path, schema: Schema, head: Head, root: bytes) -> None:
    """Write a stream's metadata and its first commit, which names nothing yet.

    The stream's `zarr.json` is a copy of the root's, so that either can be made from the other.
    """
    render_stream(path, schema, head, root)
    write_head(path, head, schema)


def render_stream(path: Path, schema: Schema, head: Head, root: bytes) -> None:
    """Write the metadata of a stream, its groups and its arrays."""
    write_atomic(path / "zarr.json", root)
    for field in schema.fields:
        array = path / field.name
        make_parents(array / "zarr.json", path)
        data = render_array(schema, field, num_envs=head.num_envs, length=int(head.rows.max()))
        write_atomic(array / "zarr.json", data)
        for parent in list(array.relative_to(path).parents)[:-1]:
            write_atomic(path / parent / "zarr.json", render_group())


def _counted(head: Head, spans: Spans | None) -> Head:
    """The head of a bounded stream with the number of transitions that are left in it."""
    if head.evicted is None or spans is None:
        return head
    left = spans.left(head.floor) + Spans.of({0: head.open}).left(head.floor)
    return replace(head, evicted=head.evicted._replace(left=left))


def _with_files(head: Head, changed: Mapping[str, list[FileState]]) -> Head:
    files = {
        name: states | {state.number: state for state in changed.get(name, [])}
        for name, states in head.files.items()
    }
    return replace(head, files=files)
