"""Reads every byte of a store and says what is wrong with it.

Nothing is written. A finding names a file, what was expected and
found, and the rows that cannot be trusted for it; `repair.py` keeps the others.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from replaystore import checkpoints, stats
from replaystore import sampler_file as samplers
from replaystore.arena import stream_path
from replaystore.bounds import Bounds
from replaystore.codec import ChunkCodec
from replaystore.episodes import decode_table, episode_schema, integers, part_path, read_part
from replaystore.errors import ReplayStoreError
from replaystore.evictions import EVICTED, FOLDER, read_evictions
from replaystore.field import Field
from replaystore.files import chunk_path, list_directory, map_whole, read_bytes, read_range, size_of
from replaystore.flat import file_checksum
from replaystore.head import HEAD, Head, check_episodes, decode_head, has_head, kept_heads, read_head
from replaystore.metadata import MAX_METADATA_BYTES, check_array, check_group, parse_root, parse_stream
from replaystore.packed import ABSENT, find_index
from replaystore.reader import check_files
from replaystore.schema import Schema

Kept = tuple[str, Callable[[Path], None]]  # the ending of files, and what checks one
KEPT: dict[str, Kept] = {  # by folder, beside the streams
    samplers.FOLDER: (".arrow", samplers.check_sampler_file),
    stats.FOLDER: (".json", stats.check_stats_file),
    checkpoints.FOLDER: (".arrow", checkpoints.check_checkpoint_file),
}
Progress = Callable[[], None]
UNKNOWN_EPISODES = "index"  # in the place of a field: rows whose episodes are not known
EVERYTHING = np.iinfo(np.int64).max


class Finding(NamedTuple):
    """Something wrong: where, what, and the rows `start` to `stop` that it spoils.

    `stream` is None if it concerns the whole store, `env` None if every environment. Findings
    that spoil no row (`stop` is 0) are of files that can be made anew, or are kept beside the rows.
    """

    path: Path
    problem: str
    stream: int | None = None
    field: str | None = None
    env: int | None = None
    start: int = 0
    stop: int = 0

    def __str__(self) -> str:
        return self.problem if str(self.path) in self.problem else f"{self.path}: {self.problem}"

    @property
    def spoils(self) -> bool:
        """Whether rows or episodes are lost by it."""
        return self.stop > self.start


def stream_numbers(root: Path) -> list[int]:
    """The streams that have a first commit."""
    names = [name for name in list_directory(root / "streams") if len(name) == 6 and name.isdigit()]
    return [int(name) for name in names if has_head(root / "streams" / name)]


def verify(root: Path, progress: Progress = lambda: None) -> Iterator[Finding]:
    """Find everything that is wrong with a store; `progress` is called once a file."""
    try:
        schema = read_schema(root)
    except (ReplayStoreError, OSError) as error:
        yield Finding(root / "zarr.json", str(error), stop=EVERYTHING)
        return
    yield from _group(root / "streams", None)
    yield from _evictions(root, schema)
    for stream in stream_numbers(root):
        yield from verify_stream(root, stream, schema, progress)
    yield from verify_kept(root, progress)


def verify_kept(root: Path, progress: Progress = lambda: None) -> Iterator[Finding]:
    """Find what is damaged of the samplers, statistics and checkpoints that are kept with a store."""
    for folder in KEPT:
        if (root / folder).is_symlink():
            yield Finding(root / folder, "expected a directory, found a link")
    for file in kept_files(root):
        try:
            KEPT[file.parent.name][1](file)
        except (ReplayStoreError, OSError) as error:
            if os.path.lexists(file):  # and was not removed meanwhile
                yield Finding(file, str(error))
        progress()


def kept_files(root: Path) -> list[Path]:
    """The files of samplers, statistics and checkpoints."""
    return [
        root / folder / name
        for folder, (ending, _) in KEPT.items()
        if (root / folder).is_dir() and not (root / folder).is_symlink()
        for name in list_directory(root / folder)
        if name.endswith(ending) or (folder, name) == (checkpoints.FOLDER, checkpoints.IDENTITY)
    ]


def _evictions(root: Path, schema: Schema) -> Iterator[Finding]:
    """Whether a reservoir's file names all the streams that were evicted."""
    try:
        if _read_bounds(root).reservoir:
            paths = {stream: stream_path(root, stream) for stream in stream_numbers(root)}
            heads = {n: decode_head(read_head(path), schema, path / HEAD) for n, path in paths.items()}
            read_evictions(root, heads)
    except (ReplayStoreError, OSError) as error:
        yield Finding(root / FOLDER / EVICTED, str(error))


def _read_bounds(root: Path) -> Bounds:
    path = root / "zarr.json"
    bounds: Bounds = parse_root(read_bytes(path, MAX_METADATA_BYTES), str(path))["bounds"]
    return bounds


def read_schema(root: Path) -> Schema:
    path = root / "zarr.json"
    schema: Schema = parse_root(read_bytes(path, MAX_METADATA_BYTES), str(path))["schema"]
    return schema


def count_files(root: Path) -> int:
    """How often `verify` will report progress, as far as the heads can be read."""
    total = len(kept_files(root))
    try:
        schema = read_schema(root)
        for stream in stream_numbers(root):
            path = stream_path(root, stream)
            head = decode_head(read_head(path), schema, path / HEAD)
            total += sum(len(files) for files in head.files.values())
    except (ReplayStoreError, OSError):
        return total  # `verify` says why
    return total


def verify_stream(
    root: Path, stream: int, schema: Schema, progress: Progress = lambda: None
) -> Iterator[Finding]:
    """Find everything that is wrong with one stream."""
    path = stream_path(root, stream)
    try:
        head = decode_head(read_head(path), schema, path / HEAD)
        newer = newer_head(path, schema, head)
        if newer is not None:
            head = decode_head(read_head(path), schema, path / HEAD)  # a writer may have committed since
            newer = newer_head(path, schema, head)
    except (ReplayStoreError, OSError) as error:
        yield Finding(path / HEAD, str(error), stream, stop=EVERYTHING)
        return
    if newer is not None:
        problem = f"expected commit {newer[0].commit}, whose files are all there, found {head.commit}"
        yield Finding(path / HEAD, problem, stream)
    yield from _metadata(root, stream, schema, head)
    tables = []
    for state in head.parts:
        part = part_path(path, state.number)
        try:
            table = decode_table(read_part(path, state), episode_schema(schema), part)
            check_episodes(table, head, part)
            tables.append(table)
        except (ReplayStoreError, OSError) as error:
            yield Finding(part, str(error), stream, UNKNOWN_EPISODES, stop=EVERYTHING)
    episodes = pa.concat_tables([*tables, head.episodes, head.open])
    yield from _overlaps(path, stream, episodes)
    for field in schema.fields:
        check = _packed_file if field.packed else _flat_file
        for number in sorted(head.files[field.name]):
            complete = len(tables) == len(head.parts)
            yield from check(path, stream, schema, field, head, number, episodes if complete else None)
            progress()


def newer_head(path: Path, schema: Schema, head: Head) -> tuple[Head, bytes] | None:
    """The newest kept head of which all files are there, if the stream's own head is older."""
    for kept, data in kept_heads(path, schema):
        if kept.commit > head.commit:
            try:
                check_files(path, kept, schema)
            except (ReplayStoreError, OSError):
                continue  # as in a copy that was made while the store was written
            return kept, data
    return None


def _metadata(root: Path, stream: int, schema: Schema, head: Head) -> Iterator[Finding]:
    path = stream_path(root, stream)
    try:
        parse_stream(read_bytes(path / "zarr.json", MAX_METADATA_BYTES), str(path / "zarr.json"), schema)
    except (ReplayStoreError, OSError) as error:
        yield Finding(path / "zarr.json", str(error), stream)
    groups = {parent for field in schema.fields for parent in list(Path(field.name).parents)[:-1]}
    for group in sorted(groups):
        yield from _group(path / group, stream)
    for field in schema.fields:
        file = path / field.name / "zarr.json"
        try:
            data = read_bytes(file, MAX_METADATA_BYTES)
            length = check_array(data, str(file), schema, field, num_envs=head.num_envs)
        except (ReplayStoreError, OSError) as error:
            yield Finding(file, str(error), stream)
            continue
        if length < head.rows.max():
            problem = f"expected a length of at least {head.rows.max()} rows, found {length}"
            yield Finding(file, problem, stream)


def _group(path: Path, stream: int | None) -> Iterator[Finding]:
    file = path / "zarr.json"
    try:
        check_group(read_bytes(file, MAX_METADATA_BYTES), str(file))
    except (ReplayStoreError, OSError) as error:
        yield Finding(file, str(error), stream)


def _overlaps(path: Path, stream: int, episodes: pa.Table) -> Iterator[Finding]:
    env, first, length = (integers(episodes, name) for name in ("env", "first_row", "length"))
    order = np.lexsort((first, env))
    env, first, last = env[order], first[order], (first + length)[order]
    for i in np.flatnonzero((np.diff(env) == 0) & (first[1:] <= last[:-1])):
        problem = f"episodes overlap at row {first[i + 1]} of environment {env[i]}"
        yield Finding(path / HEAD, problem, stream, None, int(env[i]), int(first[i + 1]), int(last[i]) + 1)


def _flat_file(
    path: Path,
    stream: int,
    schema: Schema,
    field: Field,
    head: Head,
    number: int,
    episodes: pa.Table | None,
) -> Iterator[Finding]:
    size = schema.shard_rows(field, head.num_envs)
    file = chunk_path(path / field.name, number, 2 + len(field.shape))
    start, rows = number * size, head.field_rows(schema, field.name)
    stop = min(start + size, int(rows.max()))
    spoiled = (stream, field.name, None, start, stop)
    state = head.files[field.name][number]
    whole = size * head.num_envs * field.row_nbytes
    try:
        found = size_of(file)
        if found != whole:
            yield Finding(file, f"expected {whole} bytes, found {found}", *spoiled)
            return
        checksum = file_checksum(file, field, rows - start, state.nbytes)
        flags = read_range(file, 0, state.nbytes) if field.name in ("terminated", "truncated") else None
    except (ReplayStoreError, OSError) as error:
        yield Finding(file, str(error), *spoiled)
        return
    if (stop - start) * (whole // size) != state.nbytes or checksum != state.crc32c:
        problem = f"expected checksum {state.crc32c:08x} over {state.nbytes} bytes, found {checksum:08x}"
        yield Finding(file, problem, *spoiled)
    elif episodes is not None and flags is not None:
        cells = np.frombuffer(flags, bool).reshape(-1, head.num_envs).copy()
        for env, end in enumerate((rows - start).tolist()):
            cells[max(0, end) :, env] = False  # no rows, whatever is there
        yield from _flags(file, stream, field.name, cells, start, episodes)


def _flags(
    file: Path, stream: int, name: str, cells: np.ndarray, start: int, episodes: pa.Table
) -> Iterator[Finding]:
    """The flags of the rows of episodes and of the index must be the same, both ways."""
    env, first, length = (integers(episodes, column) for column in ("env", "first_row", "length"))
    row = first + length - 1 - start
    here = (row >= 0) & (row < len(cells)) & (length > 0)
    expected = np.zeros(cells.shape, bool)
    expected[row[here], env[here]] = episodes.column(name).to_numpy()[here]
    named = _named(len(cells), cells.shape[1], env, first - start, first - start + length)
    for time, column in np.argwhere((expected != cells) & named):
        where = f"row {start + time} of environment {column}"
        problem = f"{where}: the index says {expected[time, column]}, the array {cells[time, column]}"
        yield Finding(file, problem, stream, name, int(column), int(start + time), int(start + time) + 1)


def _named(rows: int, num_envs: int, env: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Which rows are transitions of episodes, (rows, num_envs) bool; of the others nothing is expected."""
    begins = np.zeros((rows + 1, num_envs), np.int64)
    np.add.at(begins, (first.clip(0, rows), env), 1)
    np.add.at(begins, (last.clip(0, rows), env), -1)
    named: np.ndarray = begins.cumsum(axis=0)[:-1] > 0
    return named


def _packed_file(
    path: Path,
    stream: int,
    schema: Schema,
    field: Field,
    head: Head,
    number: int,
    episodes: pa.Table | None,
) -> Iterator[Finding]:
    num_envs, size = head.num_envs, field.chunk_rows
    env_chunks = schema.env_chunks(num_envs)
    file = chunk_path(path / field.name, number, 2 + len(field.shape))
    start, rows = number * env_chunks * size, head.field_rows(schema, field.name)
    try:
        state, chunks = head.files[field.name][number], env_chunks * num_envs
        data, index = find_index(file, map_whole(file), state, chunks, num_envs)
    except (ReplayStoreError, OSError) as error:
        stop = min(start + env_chunks * size, int(rows.max()))
        yield Finding(file, str(error), stream, field.name, None, start, stop)
        return
    codec, chunk = ChunkCodec(field), np.empty((size, *field.shape), field.dtype)
    for i, (offset, nbytes) in enumerate(index.tolist()):
        first, env = start + i // num_envs * size, i % num_envs
        if first >= rows[env]:
            continue
        try:
            encoded = b"" if nbytes == ABSENT else data[offset : offset + nbytes].tobytes()
            codec.decode(encoded, chunk.ctypes.data)
        except ReplayStoreError as error:
            stop = min(first + size, int(rows[env]))
            problem = f"chunk {i} (rows {first} to {stop - 1} of environment {env}): {error}"
            yield Finding(file, problem, stream, field.name, env, first, stop)
