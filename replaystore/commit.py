"""The commit of a stream: rows from the ring to its files, then one rename of the head.

`StreamCommitter.commit` is where rows become durable: array lengths, data and index parts are
written and synced, and only then the head that names them is replaced. Nothing is taken over in
memory before that, so that after a failure the same commit can be done again from the start.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from replaystore.codec import ChunkCodec
from replaystore.episodes import PART_EPISODES, Episode, episode_schema, episode_table, write_part
from replaystore.files import FileState, make_parents, sweep_partials, write_atomic
from replaystore.flat import FlatState, FlatWriter
from replaystore.head import Head, forget_older_heads, write_head
from replaystore.metadata import render_array, render_group
from replaystore.packed import PackedWriter, ShardState
from replaystore.ring import Ring
from replaystore.schema import Schema

DEAD_BYTES = 1 << 20  # of an open shard, beside as many as are live, before it is repacked


class Pending(NamedTuple):
    """What a commit adds: rows per environment, episodes closed since the last, open ones."""

    rows: np.ndarray
    closed: list[Episode]
    open: list[Episode]


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
                packed = PackedWriter(path / field.name, field, chunks=chunks)
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
        self._name_repacked()

    def _name_repacked(self) -> None:
        """Commit the lengths of shards that a writer repacked and was killed before it did.

        Readers find the index of such a shard at its end, until something is appended to it.
        """
        changed = {
            name: [
                state.file(number)
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
        head = self._seal_episodes(self._next_head(pending))
        self._render_arrays(int(pending.rows.max()), exact=False)
        flat = {name: self._write_flat(name, head, ring) for name in self._flat}
        packed = {name: self._write_packed(name, head, ring) for name in self._packed}
        head = _with_files(head, {name: files for name, (_, files) in (flat | packed).items()})
        write_head(self.path, head, self._schema)
        for name, (state, _) in flat.items():
            self._flat[name].state = state
        for name, (shards, _) in packed.items():
            self._packed[name].shards |= shards
        self.head = head
        return head

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
        closed = pa.concat_tables([self.head.episodes, episode_table(pending.closed, table)])
        open_ = episode_table(pending.open, table)
        return replace(
            self.head,
            commit=self.head.commit + 1,
            rows=pending.rows,
            closed=self.head.closed + len(pending.closed),
            episodes=closed,
            open=open_,
        )

    def _seal_episodes(self, head: Head) -> Head:
        if len(head.episodes) < PART_EPISODES:
            return head
        make_parents(self.path / "index" / "part", self.path)
        part = write_part(self.path, len(head.parts), head.episodes.combine_chunks())
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


def _with_files(head: Head, changed: Mapping[str, list[FileState]]) -> Head:
    files = {
        name: states | {state.number: state for state in changed.get(name, [])}
        for name, states in head.files.items()
    }
    return replace(head, files=files)
