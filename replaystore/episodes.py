"""The index: the table of episodes.

On disk the index is Arrow, one row per episode: sealed parts `index/000000.arrow`, and in the head
the episodes since.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from replaystore.codec import crc32c
from replaystore.errors import CorruptionError, SchemaError, UsageError
from replaystore.files import FileState, map_whole, read_bytes, write_atomic
from replaystore.schema import Schema

PART_EPISODES = 4096  # unsealed episodes, which every commit writes again, before a part is sealed

_ARROW = {"bool": pa.bool_(), "int64": pa.int64(), "float64": pa.float64(), "string": pa.string()}


class Episode(NamedTuple):
    """One episode of a stream; `columns` are the user's, in the order of the schema."""

    env: int
    first_row: int
    length: int
    terminated: bool
    truncated: bool
    episode_return: float | None
    seed: int | None
    start_time: int  # microseconds since 1970
    policy: str | None
    columns: tuple[Any, ...]


def episode_schema(schema: Schema) -> pa.Schema:
    """The Arrow schema of the index."""
    fixed = [
        pa.field("env", pa.int32(), nullable=False),
        pa.field("first_row", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("terminated", pa.bool_(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("return", pa.float64()),
        pa.field("seed", pa.int64()),
        pa.field("start_time", pa.timestamp("us", "UTC"), nullable=False),
        pa.field("policy", pa.string()),
    ]
    return pa.schema([*fixed, *[pa.field(n, _ARROW[dtype]) for n, dtype in schema.columns.items()]])


def episode_table(episodes: Sequence[Episode], schema: pa.Schema) -> pa.Table:
    rows = [episode[:-1] + episode.columns for episode in episodes]
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(schema)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def episodes_of(table: pa.Table) -> list[Episode]:
    """The rows of a table; the inverse of `episode_table`."""
    numbers = table.set_column(7, "start_time", table.column("start_time").cast(pa.int64()))
    columns = [column.to_pylist() for column in numbers.columns]
    return [Episode._make([*row[:9], tuple(row[9:])]) for row in zip(*columns, strict=True)]


def integers(table: pa.Table, name: str) -> np.ndarray:
    """A column without nulls as int64."""
    return np.asarray(table.column(name).to_numpy(), np.int64)


def above(table: pa.Table, floor: int) -> pa.Table:
    """What is left of episodes when all transitions below a row are gone: a cut one begins at the row."""
    if floor == 0:
        return table
    first, length = integers(table, "first_row"), integers(table, "length")
    left = np.minimum(length, first + length - floor)
    is_left = (left > 0) | ((length == 0) & (first >= floor))
    for name, values in (("first_row", np.maximum(first, floor)), ("length", left)):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), pa.array(values, pa.int64()))
    start = int(is_left.argmax()) if is_left.any() else len(table)
    if is_left[start:].all():  # as of one environment: a slice takes no time
        return table.slice(start)
    return table.filter(pa.array(is_left))


def part_path(stream: Path, number: int) -> Path:
    return stream / "index" / f"{number:06d}.arrow"


def encode_table(table: pa.Table) -> bytes:
    """A table as the bytes of an Arrow IPC file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def decode_table(data: Any, schema: pa.Schema, path: Path) -> pa.Table:
    """Read an Arrow IPC file of exactly this schema, without copying; its bytes were checked."""
    try:
        table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
        if not table.schema.remove_metadata().equals(schema):
            raise CorruptionError(f"{path}: expected the columns {schema}, found {table.schema}")
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:  # as pyarrow has it, its IOError
        raise CorruptionError(f"{path}: no valid Arrow file: {error}") from error
    nulls = [f.name for f in schema if not f.nullable and table.column(f.name).null_count]
    if nulls:
        raise CorruptionError(f"{path}: nulls in {nulls}")
    return table.replace_schema_metadata(None)


def column_names(data: Any) -> list[str]:
    """The columns of an Arrow IPC file; none if it is not one."""
    try:
        names: list[str] = pa.ipc.open_file(pa.py_buffer(data)).schema.names
    except (pa.ArrowException, OSError):
        return []
    return names


def write_part(stream: Path, number: int, table: pa.Table) -> FileState:
    data = encode_table(table)
    write_atomic(part_path(stream, number), data)
    return FileState(number, len(data), crc32c(data))


def open_part(stream: Path, state: FileState, schema: pa.Schema) -> pa.Table:
    """Map a sealed part and check it."""
    path = part_path(stream, state.number)
    data = map_whole(path)
    _check_part(data, state, path)
    return decode_table(data, schema, path)


def read_part(stream: Path, state: FileState) -> bytes:
    """The checked bytes of a sealed part, not mapped."""
    path = part_path(stream, state.number)
    data = read_bytes(path, state.nbytes)
    _check_part(data, state, path)
    return data


def _check_part(data: Any, state: FileState, path: Path) -> None:
    if len(data) != state.nbytes or crc32c(data) != state.crc32c:
        expected = f"{state.nbytes} bytes of checksum {state.crc32c:08x}"
        raise CorruptionError(f"{path}: expected {expected}, found {len(data)} bytes or another checksum")


class OpenEpisode:
    """An episode that is being recorded."""

    __slots__ = ("columns", "first_row", "policy", "record", "reward", "seed", "start_time")

    def __init__(
        self, first_row: int, seed: int | None, start_time: int, policy: str | None, columns: tuple[Any, ...]
    ) -> None:
        self.first_row = first_row
        self.seed = seed
        self.start_time = start_time
        self.policy = policy
        self.columns = columns
        self.reward = 0.0
        self.record: Episode | None = None  # once it has ended


def check_seeds(seed: Any, num_envs: int) -> list[int | None]:
    """One seed per environment; a single one counts up, as gymnasium's vector envs do."""
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, (int, np.integer)) and not isinstance(seed, bool):
        return [check_seed(int(seed) + i) for i in range(num_envs)]
    if not isinstance(seed, (list, tuple, np.ndarray)) or len(seed) != num_envs:
        raise UsageError(f"seed: expected an int or {num_envs} of them, got {seed!r}")
    return [check_seed(each) for each in seed]


def check_seed(seed: Any) -> int | None:
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
        raise UsageError(f"seed: expected None or an int from 0 to 2^63 - 1, got {seed!r}")
    return int(seed)


def check_policy(policy: Any) -> str | None:
    return None if policy is None else _as_string("policy", policy)


def column_value(name: str, dtype: str, value: Any, env: int, num_envs: int) -> Any:
    """An environment's value of a user's column, out of one for all or one for each."""
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim):
        if len(value) != num_envs:
            raise SchemaError(f"episode column {name!r}: expected {num_envs} values, got {len(value)}")
        value = value[env]
    return None if value is None else _CONVERT[dtype](name, value)


def _as_bool(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise SchemaError(f"episode column {name!r}: expected a bool, got {value!r}")
    return bool(value)


def _as_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not -(2**63) <= value < 2**63:
        raise SchemaError(f"episode column {name!r}: expected an int of 64 bits, got {value!r}")
    return int(value)


def _as_float(name: str, value: Any) -> float:
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and abs(int(value)) <= 2**53:
        return float(value)
    if not isinstance(value, (float, np.floating)):
        raise SchemaError(f"episode column {name!r}: expected a float, got {value!r}")
    return float(value)


def _as_string(name: str, value: Any) -> str:
    if not isinstance(value, str) or not _is_utf8(value):
        raise SchemaError(f"episode column {name!r}: expected a str of Unicode characters, got {value!r}")
    return str(value)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_CONVERT = {"bool": _as_bool, "int64": _as_int, "float64": _as_float, "string": _as_string}
