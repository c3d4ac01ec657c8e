"""Makes a damaged store whole again out of what is intact.

Metadata is written anew from the schema, and a damaged head is replaced by its copy. A
stream with rows that cannot be trusted is written anew from the others: an episode is split where
rows are missing, and the pieces, of two rows or more, are episodes that are neither terminated nor
truncated. The damaged stream is moved, as it is, to `NAME.dropped/` beside the store, and so are
damaged files of samplers, statistics and checkpoints.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from replaystore.arena import stream_path
from replaystore.checkpoints import restore_identity
from replaystore.codec import ChunkCodec
from replaystore.commit import create_stream, render_stream
from replaystore.episodes import (
    Episode,
    above,
    decode_table,
    episode_schema,
    episodes_of,
    part_path,
    read_part,
)
from replaystore.errors import CorruptionError, ReplayStoreError, WriterBusy
from replaystore.field import Field
from replaystore.files import Lock, chunk_path, make_directory, move, read_bytes, remove_tree, write_atomic
from replaystore.head import HEAD, Head, decode_head, empty_head, kept_heads, read_head
from replaystore.metadata import MAX_METADATA_BYTES, parse_root, render_group
from replaystore.packed import MAX_SHARD_BYTES, find_index
from replaystore.schema import FLAGS, Schema
from replaystore.verify import (
    UNKNOWN_EPISODES,
    Finding,
    newer_head,
    read_schema,
    stream_numbers,
    verify_kept,
    verify_stream,
)
from replaystore.writer import StreamWriter


class Repaired(NamedTuple):
    """What a repair did to a stream: transitions before and after, and where the damage is now."""

    stream: int
    before: int
    after: int
    moved_to: Path | None

    def __str__(self) -> str:
        kept = f"stream {self.stream:06d}: kept {self.after} of {self.before} transitions"
        return kept if self.moved_to is None else f"{kept}; the damaged files are in {self.moved_to}"


class SetAside(NamedTuple):
    """A damaged file that was kept beside the rows, and where it is now."""

    path: Path
    moved_to: Path

    def __str__(self) -> str:
        return f"{self.path}: moved to {self.moved_to}"


def repair(root: Path, findings: Sequence[Finding]) -> list[Repaired | SetAside]:
    """Repair what `verify` found, and say what became of each stream and kept file that it concerned.

    Nobody may have the store open. Raises `WriterBusy` if somebody writes a stream, and
    `CorruptionError` if neither the root's metadata nor any stream's copy of it can be read.
    """
    root_bytes = _repair_root(root)
    dropped = root.with_name(root.name + ".dropped")
    _finish_moves(root, dropped)
    write_atomic(root / "streams" / "zarr.json", render_group())
    streams = {finding.stream for finding in findings if finding.stream is not None}
    repaired = [_repair_stream(root, stream, root_bytes, dropped) for stream in sorted(streams)]
    return [*repaired, *_set_aside(root, dropped)]


def _set_aside(root: Path, dropped: Path) -> Iterator[SetAside]:
    """Move damaged files that are kept beside the rows out of the store."""
    if any(verify_kept(root)):
        restore_identity(root)
    for finding in list(verify_kept(root)):
        name = str(finding.path.relative_to(root)).replace(os.sep, "-")
        yield SetAside(finding.path, _drop(finding.path, dropped, f"kept-{name}"))


def _repair_root(root: Path) -> bytes:
    """The root's `zarr.json`, from a stream's copy if it is damaged."""
    candidates = [root / "zarr.json", *[stream_path(root, s) / "zarr.json" for s in stream_numbers(root)]]
    for path in candidates:
        try:
            data = read_bytes(path, MAX_METADATA_BYTES)
            parse_root(data, str(path))
        except (ReplayStoreError, OSError):
            continue  # the next one may be intact
        if path != candidates[0]:
            write_atomic(candidates[0], data)
        return data
    raise CorruptionError(f"{root}: neither zarr.json nor a stream's copy of it can be read")


def _finish_moves(root: Path, dropped: Path) -> None:
    """Put in place what a repair that was cut short had already written anew."""
    for new in sorted(dropped.glob("new-*")):
        target = root / "streams" / new.name.removeprefix("new-")
        if target.exists():
            remove_tree(new)
        else:
            move(new, target)


def _repair_stream(root: Path, stream: int, root_bytes: bytes, dropped: Path) -> Repaired:
    path, schema = stream_path(root, stream), read_schema(root)
    lock = Lock.acquire(path / "lock")
    if lock is None:
        raise WriterBusy(f"{path}: somebody is writing the stream")
    try:
        head = _repair_head(path, schema)
        if head is None:
            return Repaired(stream, 0, 0, _drop(path, dropped, path.name))
        render_stream(path, schema, head, root_bytes)
        findings = list(verify_stream(root, stream, schema))
        episodes = list(_intact_episodes(path, schema, head))
        before = sum(episode.length for episode in episodes)
        if not any(finding.spoils for finding in findings):
            return Repaired(stream, before, before, None)
        after = _rewrite(path, dropped / f"new-{path.name}", schema, head, episodes, findings, root_bytes)
        moved_to = _drop(path, dropped, path.name)
        move(dropped / f"new-{path.name}", path)
        return Repaired(stream, before, after, moved_to)
    finally:
        lock.release()


def _repair_head(path: Path, schema: Schema) -> Head | None:
    """The newest head that can be read, made the stream's head."""
    try:
        head = decode_head(read_head(path), schema, path / HEAD)
        newer = newer_head(path, schema, head)
        if newer is None:
            return head
    except (ReplayStoreError, OSError):
        kept = kept_heads(path, schema)
        if not kept:
            return None
        newer = kept[0]
    write_atomic(path / HEAD, newer[1])
    return newer[0]


def _drop(path: Path, dropped: Path, name: str) -> Path:
    """Move a stream or a file out of the store; returns where it is."""
    make_directory(dropped, exist_ok=True)
    number = 0
    while (target := dropped / f"{name}-{number}").exists():
        number += 1
    move(path, target)
    return target


def _intact_episodes(path: Path, schema: Schema, head: Head) -> Iterator[Episode]:
    for state in head.parts:
        try:
            data = read_part(path, state)
        except (ReplayStoreError, OSError):
            continue  # `verify` named it; its episodes' bounds are not known
        table = decode_table(data, episode_schema(schema), part_path(path, state.number))
        yield from episodes_of(above(table, head.floor))
    yield from episodes_of(above(head.episodes, head.floor))
    yield from (episode for episode in episodes_of(above(head.open, head.floor)) if episode.length)


def _rewrite(
    path: Path,
    new: Path,
    schema: Schema,
    head: Head,
    episodes: Sequence[Episode],
    findings: Sequence[Finding],
    root_bytes: bytes,
) -> int:
    """Write a stream anew from its intact rows; returns how many transitions it has."""
    make_directory(new.parent, exist_ok=True)
    if new.exists():
        remove_tree(new)
    make_directory(new)
    lock = Lock.acquire(new / "lock")
    assert lock is not None, new
    empty = empty_head(schema, head.num_envs, is_bounded=head.evicted is not None)
    create_stream(new, schema, empty, root_bytes)
    rows, now = _Rows(path, schema, head), [0]
    writer = StreamWriter(new, schema, empty, number=0, lock=lock, clock=lambda: now[0] / 1e6)
    writer.start()
    kept = 0
    for episode in episodes:
        now[0] = episode.start_time
        for start, stop in _intact_runs(episode, findings):
            values = rows.read(episode, start, stop)
            writer.add_episode(
                values,
                env=episode.env,
                seed=episode.seed,
                policy=episode.policy,
                columns=dict(zip(schema.columns, episode.columns, strict=True)),
            )
            kept += stop - start - 1
    writer.close()
    return kept


def _intact_runs(episode: Episode, findings: Sequence[Finding]) -> list[tuple[int, int]]:
    """Rows (start, stop) of an episode between which every transition can be trusted."""
    observations, actions = np.ones(episode.length + 1, bool), np.ones(episode.length, bool)
    for finding in findings:
        if finding.field in (*FLAGS, UNKNOWN_EPISODES) or finding.env not in (None, episode.env):
            continue  # the flags are in the index too, and the bounds of this episode are known
        start, stop = (max(0, row - episode.first_row) for row in (finding.start, finding.stop))
        if finding.field is None or finding.field.split("/")[0] == "observation":
            observations[start:stop] = False
        if finding.field is None or finding.field.split("/")[0] != "observation":
            actions[start:stop] = False
    good = np.concatenate([[False], observations[:-1] & observations[1:] & actions, [False]])
    edges = np.flatnonzero(np.diff(good.astype(np.int8))).reshape(-1, 2) + episode.first_row
    return [(start, stop + 1) for start, stop in edges.tolist()]


class _Rows:
    """Reads the rows of a stream from its files, one file of a field at a time."""

    def __init__(self, path: Path, schema: Schema, head: Head) -> None:
        self._path = path
        self._schema = schema
        self._head = head
        self._files: dict[str, tuple[int, np.ndarray]] = {}

    def read(self, episode: Episode, start: int, stop: int) -> Mapping[str, object]:
        """What `add_episode` takes, for rows of an episode; flags come from the index."""
        arrays = {}
        for field in self._schema.fields:
            if field.name in FLAGS:
                arrays[field.name] = np.zeros(stop - start - 1, bool)
                whole = stop == episode.first_row + episode.length + 1
                arrays[field.name][-1] = whole and getattr(episode, field.name)
            else:
                end = stop if self._schema.is_observation(field.name) else stop - 1
                arrays[field.name] = self._rows(field, episode.env, start, end)
        return {top: self._schema.nest(top, arrays) for top in self._schema.tops}

    def _rows(self, field: Field, env: int, start: int, stop: int) -> np.ndarray:
        size = self._schema.shard_rows(field, self._head.num_envs)
        parts = []
        for number in range(start // size, -(-stop // size)):
            cells = self._file(field, number)
            parts.append(cells[max(0, start - number * size) : stop - number * size, env])
        return np.concatenate(parts)

    def _file(self, field: Field, number: int) -> np.ndarray:
        """The cells of one file, (time, env, *shape); zeros where a chunk cannot be decoded."""
        if self._files.get(field.name, (-1, None))[0] != number:
            load = self._load_packed if field.packed else self._load_flat
            self._files[field.name] = number, load(field, number)
        return self._files[field.name][1]

    def _load_flat(self, field: Field, number: int) -> np.ndarray:
        size = self._schema.shard_rows(field, self._head.num_envs)
        path = chunk_path(self._path / field.name, number, 2 + len(field.shape))
        data = read_bytes(path, size * self._head.num_envs * field.row_nbytes)
        return np.frombuffer(data, field.dtype).reshape(size, self._head.num_envs, *field.shape)

    def _load_packed(self, field: Field, number: int) -> np.ndarray:
        num_envs, rows = self._head.num_envs, field.chunk_rows
        chunks = self._schema.env_chunks(num_envs)
        path = chunk_path(self._path / field.name, number, 2 + len(field.shape))
        whole = np.frombuffer(read_bytes(path, MAX_SHARD_BYTES), np.uint8)
        state = self._head.files[field.name][number]
        data, index = find_index(path, whole, state, chunks * num_envs, num_envs)
        cells = np.zeros((chunks, num_envs, rows, *field.shape), field.dtype)
        codec = ChunkCodec(field)
        for i, (offset, nbytes) in enumerate(index.tolist()):
            if offset + nbytes <= len(data):
                try:
                    codec.decode(
                        data[offset : offset + nbytes].tobytes(), cells[divmod(i, num_envs)].ctypes.data
                    )
                except CorruptionError:
                    continue  # `verify` named it, so its rows are in no intact run
        return np.moveaxis(cells, 1, 2).reshape(chunks * rows, num_envs, *field.shape)
