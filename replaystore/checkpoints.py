"""Checkpoints of a store: `checkpoints/<name>.arrow`, each replaced atomically.

A checkpoint copies no rows, as committed rows never change: it says which there were. It is an Arrow
IPC file of one row:

    store      the store's identity, as in `checkpoints/identity`
    sequence   counts up with every checkpoint of the store
    writer     the stream that its writer had
    heads      of every stream: its number, and the bytes of its head
    order      the closed episodes as they are numbered: stream, and how many of it come in a row
    content    what the user gave, and the states of samplers and random generators (`states.py`)
    crc32c     of all that, in this order
"""

import os
import re
import secrets
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from replaystore.arena import stream_path
from replaystore.catalog import has_all_of
from replaystore.codec import crc32c
from replaystore.episodes import decode_table, encode_table, episode_schema
from replaystore.errors import CorruptionError, UsageError
from replaystore.files import (
    PARTIAL,
    list_directory,
    make_directory,
    map_whole,
    read_bytes,
    remove,
    write_atomic,
)
from replaystore.head import Head, decode_head
from replaystore.schema import Schema

FOLDER = "checkpoints"
IDENTITY = "identity"
_HEAD = pa.struct([("stream", pa.int64()), ("head", pa.large_binary())])
_RUN = pa.struct([("stream", pa.int64()), ("episodes", pa.int64())])
_SCHEMA = pa.schema(
    [
        pa.field("store", pa.string(), nullable=False),
        pa.field("sequence", pa.int64(), nullable=False),
        pa.field("writer", pa.int64(), nullable=False),
        pa.field("heads", pa.list_(_HEAD), nullable=False),
        pa.field("order", pa.list_(_RUN), nullable=False),
        pa.field("content", pa.large_binary(), nullable=False),
        pa.field("crc32c", pa.uint32(), nullable=False),
    ]
)


class Runs(NamedTuple):
    """Closed episodes as they are numbered: of which stream, and how many of it come in a row; int64."""

    stream: np.ndarray
    episodes: np.ndarray


class Checkpoint(NamedTuple):
    """One commit of a store's streams, and `content`, what was kept with it."""

    writer: int
    heads: dict[int, bytes]
    order: Runs
    content: bytes


def checkpoint_names(store: str | os.PathLike[str]) -> list[str]:
    """The names of a store's checkpoints, the oldest first; those that cannot be read are left out."""
    return [name for _, name in sorted(_sequences(Path(store)))]


def runs_of(streams: np.ndarray) -> Runs:
    """Streams of episodes, in order, as runs."""
    starts = np.flatnonzero(np.diff(streams, prepend=-1))
    return Runs(streams[starts], np.diff(starts, append=len(streams)))


def checkpoint_path(store: Path, name: str) -> Path:
    """The file of a checkpoint; `UsageError` if the name could not be one."""
    if not isinstance(name, str) or not re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", name):
        raise UsageError(
            f"checkpoint: expected a name of up to 100 of the characters A-Z, a-z, 0-9, _ and -, got {name!r}"
        )
    return store / FOLDER / f"{name}.arrow"


def write_checkpoint(store: Path, name: str, checkpoint: Checkpoint, *, keep: int | None) -> None:
    """Write a checkpoint durably; then, with `keep`, remove all but the newest so many.

    What it names must be durable. A crash leaves the checkpoint that had the name before.
    """
    path = checkpoint_path(store, name)
    make_directory(path.parent, exist_ok=True)
    for left in list_directory(path.parent):
        if left.endswith(PARTIAL):  # of a checkpoint that was cut short
            remove(path.parent / left)
    sequence = max((number for number, _ in _sequences(store)), default=0) + 1
    write_atomic(path, _encode(_make_identity(store), sequence, checkpoint))
    for _, other in sorted(_sequences(store))[: -keep if keep else 0]:
        remove(checkpoint_path(store, other))


def read_checkpoint(store: Path, name: str) -> Checkpoint:
    """Read a checkpoint of this store and check its bytes."""
    path = checkpoint_path(store, name)
    if not path.exists():
        found = ", ".join(checkpoint_names(store)) or "none"
        raise UsageError(f"{path}: expected a checkpoint {name!r}, found {found}")
    identity, checkpoint = _decode(path)
    own = _read_identity(store)
    if identity != own:
        raise UsageError(
            f"{path}: expected a checkpoint of this store, whose identity is {own}, found one of {identity}"
        )
    return checkpoint


def check_checkpoint_file(path: Path) -> None:
    """Raise an error of the package if a checkpoint, or the store's identity, is damaged or of another store."""
    if path.name == IDENTITY:
        _read_identity(path.parent.parent)
    else:
        read_checkpoint(path.parent.parent, path.stem)


def restore_identity(store: Path) -> None:
    """Make a store's identity what its checkpoints say, if those that can be read are of one store."""
    folder, found = store / FOLDER, set()
    for name in checkpoint_names(store):
        try:
            found.add(_decode(folder / f"{name}.arrow")[0])
        except CorruptionError:
            continue  # `verify` named it
    if len(found) == 1:
        write_atomic(folder / IDENTITY, found.pop().encode())


def decoded_heads(store: Path, checkpoint: Checkpoint, schema: Schema) -> dict[int, Head]:
    """The heads that a checkpoint names, by stream."""
    return {
        stream: decode_head(data, schema, stream_path(store, stream))
        for stream, data in checkpoint.heads.items()
    }


def check_fits(store: Path, old: dict[int, Head], newest: dict[int, Head], schema: Schema) -> None:
    """Raise `UsageError` unless the newest heads have all the episodes of older ones, and have them first."""
    for stream, head in old.items():
        problem = _misfit(stream_path(store, stream), head, newest.get(stream), schema)
        if problem is not None:
            raise UsageError(
                f"{store}: stream {stream:06d}: {problem}: the checkpoint is of another store, or its rows"
                " were set aside when the store was opened at an earlier one"
            )


def _misfit(stream: Path, old: Head, newest: Head | None, schema: Schema) -> str | None:
    if newest is None:
        return "expected a stream, found none"
    if newest.num_envs != old.num_envs:
        return f"expected {old.num_envs} environments, found {newest.num_envs}"
    if newest.commit < old.commit or (newest.rows < old.rows).any():
        return f"expected commit {old.commit} of {old.rows} rows or a later one, found {newest.commit}"
    if not has_all_of(stream, newest, old, episode_schema(schema)):
        return f"expected its first {old.closed} episodes to be the checkpoint's"
    return None


# ---- the files


def _sequences(store: Path) -> list[tuple[int, str]]:
    """The checkpoints that can be read: sequence and name. Of their bytes few are read."""
    folder, found = store / FOLDER, []
    for file in list_directory(folder) if folder.is_dir() else []:
        name, _, ending = file.rpartition(".")
        if ending == "arrow":
            try:
                found.append((int(_table(folder / file).column("sequence")[0].as_py()), name))
            except CorruptionError:
                continue  # `read_checkpoint` says so to who asks for it
    return found


def _make_identity(store: Path) -> str:
    path = store / FOLDER / IDENTITY
    if not path.exists():
        write_atomic(path, secrets.token_hex(16).encode())
    return _read_identity(store)


def _read_identity(store: Path) -> str:
    data = read_bytes(store / FOLDER / IDENTITY, 100)
    if not re.fullmatch(b"[0-9a-f]{32}", data):
        raise CorruptionError(f"{store / FOLDER / IDENTITY}: expected 32 hexadecimal digits, found {data!r}")
    return data.decode()


def _encode(identity: str, sequence: int, checkpoint: Checkpoint) -> bytes:
    writer, heads, order, content = checkpoint
    row = [
        identity,
        sequence,
        writer,
        [{"stream": stream, "head": head} for stream, head in heads.items()],
        [
            {"stream": s, "episodes": n}
            for s, n in zip(order.stream.tolist(), order.episodes.tolist(), strict=True)
        ],
        content,
    ]
    row.append(_checksum(identity, sequence, checkpoint))
    columns = [pa.array([value], field.type) for value, field in zip(row, _SCHEMA, strict=True)]
    return encode_table(pa.Table.from_arrays(columns, schema=_SCHEMA))


def _decode(path: Path) -> tuple[str, Checkpoint]:
    table = _table(path)
    identity, sequence, writer, heads, order, content, checksum = (
        column[0].as_py() for column in table.columns
    )
    entries = [*heads, *order]
    if any(entry is None or None in entry.values() for entry in entries):
        raise CorruptionError(f"{path}: nulls where there are none")
    runs = [np.array([run[name] for run in order], np.int64) for name in ("stream", "episodes")]
    by_stream = {head["stream"]: head["head"] for head in heads}
    checkpoint = Checkpoint(writer, by_stream, Runs(*runs), content)
    if _checksum(identity, sequence, checkpoint) != checksum:
        raise CorruptionError(f"{path}: the checksum does not match")
    return identity, checkpoint


def _table(path: Path) -> pa.Table:
    table = decode_table(map_whole(path), _SCHEMA, path)
    if len(table) != 1:
        raise CorruptionError(f"{path}: expected one row, found {len(table)}")
    return table


def _checksum(identity: str, sequence: int, checkpoint: Checkpoint) -> int:
    writer, heads, order, content = checkpoint
    crc = crc32c(f"{identity}\n{sequence}\n{writer}\n".encode())
    for stream, head in heads.items():
        crc = crc32c(head, crc32c(f"{stream}\n{len(head)}\n".encode(), crc))
    for column in order:
        crc = crc32c(column.astype("<i8").tobytes(), crc)
    return crc32c(content, crc)
