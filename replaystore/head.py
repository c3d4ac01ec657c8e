"""One commit of a stream: write, load, check.

`head.arrow` is an Arrow IPC file of one row, replaced atomically; it names all that exists:

    commit      its number, from 1
    rows        rows written per environment, an open episode's last observation included
    closed      episodes closed so far, sealed ones included
    files       every chunk and shard file: field, number, committed bytes, crc32c
    parts       the sealed parts of the index: number, bytes, crc32c
    episodes    the closed episodes since the last sealed part
    open        the open episodes
    evicted     in a bounded store alone: the row below which all transitions are gone, in every
                environment; how many parts of the index are; how many transitions are left

`files` and `parts` name what is left: of a field the files that do not lie wholly below row
`evicted - CONTEXT`, and the parts from number `evicted.parts`. Episodes below the row may still
stand in a part that holds others; readers pass over them. `closed` counts them. Of a stream that was
evicted as a whole the row is one above all files, and nothing is named.

The file's own crc32c stands in the Arrow schema's metadata, "replaystore-crc32c:" and 8 hex
digits, which is there twice (Arrow repeats the schema in its footer); it is computed with zeros
for those digits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from replaystore.codec import crc32c
from replaystore.episodes import column_names, decode_table, encode_table, episode_schema, integers
from replaystore.errors import CorruptionError, LimitError
from replaystore.files import (
    FileState,
    list_directory,
    make_directory,
    read_bytes,
    remove,
    write_atomic,
    write_spare,
)
from replaystore.index import CONTEXT
from replaystore.schema import MAX_NUM_ENVS, Schema

HEAD = "head.arrow"
HISTORY = "heads"
MAX_HEAD_BYTES = 1 << 30
_MARK = b"replaystore-crc32c:"
_ZEROS = b"00000000"
_FILE = pa.struct(
    [("field", pa.int32()), ("number", pa.int64()), ("nbytes", pa.int64()), ("crc32c", pa.uint32())]
)


_EVICTED = pa.struct([("floor", pa.int64()), ("parts", pa.int64()), ("left", pa.int64())])


class Evicted(NamedTuple):
    """What a bounded stream has lost.

    Every transition below row `floor` of each environment, and the first `parts` parts of the index;
    `left` transitions are there.
    """

    floor: int = 0
    parts: int = 0
    left: int = 0


@dataclass(frozen=True)
class Head:
    """What exists of a stream at a commit."""

    commit: int
    rows: np.ndarray  # (num_envs,) int64
    closed: int
    files: dict[str, dict[int, FileState]]  # by field and number
    parts: tuple[FileState, ...]
    episodes: pa.Table
    open: pa.Table
    evicted: Evicted | None = None  # None where nothing ever is

    @property
    def floor(self) -> int:
        """The row below which all transitions are gone, in every environment."""
        return 0 if self.evicted is None else self.evicted.floor

    @property
    def is_evicted(self) -> bool:
        """Whether the stream was evicted as a whole: nobody will write it again."""
        return self.floor > int(self.rows.max())

    @property
    def first_part(self) -> int:
        """The number of the first part of the index that is left."""
        return 0 if self.evicted is None else self.evicted.parts

    @property
    def next_part(self) -> int:
        """The number of the part that is sealed next."""
        return self.first_part + len(self.parts)

    def first_file(self, size: int) -> int:
        """The number of the first file that is left of a field that has `size` rows a file."""
        return max(0, self.floor - CONTEXT) // size

    @property
    def num_envs(self) -> int:
        return len(self.rows)

    @property
    def is_open(self) -> np.ndarray:
        """Which environments have an open episode; (num_envs,) bool."""
        mask = np.zeros(self.num_envs, bool)
        mask[integers(self.open, "env")] = True
        return mask

    def field_rows(self, schema: Schema, name: str) -> np.ndarray:
        """Rows per environment that a field has: an open episode's last row is an observation only."""
        return self.rows if schema.is_observation(name) else self.rows - self.is_open


def empty_head(schema: Schema, num_envs: int, *, is_bounded: bool = False) -> Head:
    none = episode_schema(schema).empty_table()
    files: dict[str, dict[int, FileState]] = {field.name: {} for field in schema.fields}
    evicted = Evicted() if is_bounded else None
    return Head(0, np.zeros(num_envs, np.int64), 0, files, (), none, none, evicted)


def _arrow_schema(episodes: pa.Schema, *, is_bounded: bool) -> pa.Schema:
    fields = [
        ("commit", pa.int64()),
        ("rows", pa.list_(pa.int64())),
        ("closed", pa.int64()),
        ("files", pa.list_(_FILE)),
        ("parts", pa.list_(_FILE)),
        ("episodes", pa.list_(pa.struct(list(episodes)))),
        ("open", pa.list_(pa.struct(list(episodes)))),
        *([("evicted", _EVICTED)] if is_bounded else []),
    ]
    return pa.schema([pa.field(name, type_, nullable=False) for name, type_ in fields])


def encode_head(head: Head, schema: Schema) -> bytes:
    places = {field.name: i for i, field in enumerate(schema.fields)}
    files = [(places[name], *state) for name, states in head.files.items() for state in states.values()]
    arrow = _arrow_schema(episode_schema(schema), is_bounded=head.evicted is not None)
    arrays = [
        pa.array([head.commit], pa.int64()),
        _one_list(pa.array(head.rows, pa.int64())),
        pa.array([head.closed], pa.int64()),
        _one_list(_file_structs(files)),
        _one_list(_file_structs([(-1, *state) for state in head.parts])),
        _one_list(_struct_array(head.episodes)),
        _one_list(_struct_array(head.open)),
        *([] if head.evicted is None else [pa.array([head.evicted._asdict()], _EVICTED)]),
    ]
    mark = (_MARK + _ZEROS).decode()
    table = pa.Table.from_arrays(arrays, schema=arrow.with_metadata({"checksum": mark}))
    data = encode_table(table)
    return _replace_checksum(data, f"{crc32c(data):08x}".encode())


def decode_head(data: bytes, schema: Schema, path: Path) -> Head:
    """Check and read a head; raises `CorruptionError`."""
    found = data[data.find(_MARK) + len(_MARK) :][:8]
    zeroed = _replace_checksum(data, _ZEROS)
    if len(zeroed) != len(data) or found != f"{crc32c(zeroed):08x}".encode():
        raise CorruptionError(f"{path}: the head's checksum does not match its bytes")
    episodes = episode_schema(schema)
    is_bounded = b"evicted" in data and "evicted" in column_names(data)
    row = decode_table(data, _arrow_schema(episodes, is_bounded=is_bounded), path).to_batches()
    if len(row) != 1 or row[0].num_rows != 1:
        raise CorruptionError(f"{path}: expected one row")
    if _nulls(row[0]):
        raise CorruptionError(f"{path}: nulls where there are none")
    lists = {name: row[0].column(name)[0] for name in row[0].schema.names}
    rows = np.array(lists["rows"].values, np.int64)
    if not 0 < len(rows) <= MAX_NUM_ENVS or (rows < 0).any():
        raise CorruptionError(f"{path}: expected rows of 1 to {MAX_NUM_ENVS} environments, found {rows}")
    files: dict[str, dict[int, FileState]] = {field.name: {} for field in schema.fields}
    for place, *state in _file_tuples(lists["files"]):
        if not 0 <= place < len(schema.fields):
            raise CorruptionError(
                f"{path}: expected a field from 0 to {len(schema.fields) - 1}, found {place}"
            )
        files[schema.fields[place].name][state[0]] = FileState(*state)
    head = Head(
        commit=lists["commit"].as_py(),
        rows=rows,
        closed=lists["closed"].as_py(),
        files=files,
        parts=tuple(FileState(*state) for _, *state in _file_tuples(lists["parts"])),
        episodes=_episode_table(lists["episodes"], episodes, path),
        open=_episode_table(lists["open"], episodes, path),
        evicted=_evicted(lists["evicted"], path) if is_bounded else None,
    )
    check_episodes(head.episodes, head, path)
    check_episodes(head.open, head, path, shortest=0)
    _check_open(head, path)
    _check_evicted(head, path)
    _check_files(head, schema, path)
    return head


def check_episodes(table: pa.Table, head: Head, path: Path, *, shortest: int = 1) -> None:
    """Raise `CorruptionError` unless every episode lies within the rows of its column."""
    env, first, length = (integers(table, name) for name in ("env", "first_row", "length"))
    good = (env >= 0) & (env < head.num_envs) & (first >= 0) & (length >= shortest)
    good &= (first < 2**40) & (length < 2**40)
    good &= first + length < head.rows[np.where(good, env, 0)]
    if not good.all():
        bad = np.flatnonzero(~good)[0]
        shown = f"{length[bad]} transitions from row {first[bad]} of environment {env[bad]}"
        raise CorruptionError(f"{path}: expected episodes within {head.rows} rows, found {shown}")


def _check_open(head: Head, path: Path) -> None:
    """An open episode is the last of its column, so there is one at the most."""
    env, first, length = (integers(head.open, name) for name in ("env", "first_row", "length"))
    if (first + length != head.rows[env] - 1).any() or len(np.unique(env)) != len(env):
        raise CorruptionError(f"{path}: expected open episodes at the ends of columns")


def _check_evicted(head: Head, path: Path) -> None:
    """Nothing is evicted that is still to be written, and the parts that are left follow each other."""
    if head.evicted is None:
        return
    numbers = [part.number for part in head.parts]
    if numbers != list(range(head.first_part, head.first_part + len(numbers))):
        raise CorruptionError(f"{path}: expected parts from number {head.first_part}, found {numbers}")
    if head.closed < len(head.episodes):
        raise CorruptionError(f"{path}: expected {len(head.episodes)} closed episodes, found {head.closed}")
    named = len(head.parts) + len(head.episodes) + len(head.open)
    if head.floor > head.rows.min() and (named or not head.rows.max() < head.floor < 1 << 40):
        raise CorruptionError(f"{path}: expected eviction within {head.rows} rows, found {head.floor}")


def _check_files(head: Head, schema: Schema, path: Path) -> None:
    """Every file that the rows need must be named, and none beside them; so rows are bounded."""
    for field in schema.fields:
        rows = int(head.field_rows(schema, field.name).max())
        size = schema.shard_rows(field, head.num_envs)
        start, stop = head.first_file(size), -(-rows // size)
        named = head.files[field.name]
        expected = max(stop - start, 0)
        if len(named) != expected or (named and not start <= min(named) <= max(named) < stop):
            raise CorruptionError(
                f"{path}: field {field.name!r}: expected {expected} files for {rows} rows, found {len(named)}"
            )
        if any(state.nbytes <= 0 for state in named.values()):
            raise CorruptionError(f"{path}: field {field.name!r}: expected files of at least one byte")


def write_head(stream: Path, head: Head, schema: Schema) -> None:
    """Commit: everything the head names must be synced before.

    Copies are kept in `heads/`: of the commits that are multiples of 2^p the last two, for each p,
    and that with which the writer began. Whenever a copy of the directory was begun, one of them is
    from before that, and speaks only of files that the copy holds.
    """
    data = encode_head(head, schema)
    write_atomic(stream / HEAD, data)
    _make_history(stream)
    power = 0
    while power == 0 or (head.commit and head.commit % (1 << power) == 0):
        write_spare(stream / HISTORY / f"{power:02d}-{head.commit >> power & 1}.arrow", data)
        power += 1


def keep_head(stream: Path, head: Head, schema: Schema) -> None:
    """Keep the head with which a writer begins, until it ends."""
    _make_history(stream)
    write_spare(stream / HISTORY / "begun.arrow", encode_head(head, schema))


def _make_history(stream: Path) -> None:
    if not (stream / HISTORY).is_dir():  # many ways of copying leave out empty directories
        make_directory(stream / HISTORY, exist_ok=True)


def has_head(stream: Path) -> bool:
    """Whether a stream had a first commit, though its head may be lost."""
    return (stream / HEAD).exists() or bool(_kept(stream))


def kept_heads(stream: Path, schema: Schema) -> list[tuple[Head, bytes]]:
    """The kept heads that can be read, the newest first."""
    found = {}
    for path in _kept(stream):
        try:
            data = read_bytes(path, MAX_HEAD_BYTES)
            found[data] = decode_head(data, schema, path)
        except (CorruptionError, LimitError):
            continue  # such heads are spares: what cannot be read is none
    return sorted(((head, data) for data, head in found.items()), key=lambda pair: -pair[0].commit)


def forget_older_heads(stream: Path, head: Head) -> None:
    """Keep of the older heads only the newest commit's copy: nobody writes the stream any more."""
    for path in _kept(stream):
        if path.name != f"00-{head.commit & 1}.arrow":
            remove(path)


def _kept(stream: Path) -> list[Path]:
    folder = stream / HISTORY
    return [folder / name for name in list_directory(folder)] if folder.is_dir() else []


def read_head(stream: Path) -> bytes:
    return read_bytes(stream / HEAD, MAX_HEAD_BYTES)


def _replace_checksum(data: bytes, digits: bytes) -> bytes:
    for at in {data.find(_MARK), data.rfind(_MARK)} - {-1}:
        start = at + len(_MARK)
        data = data[:start] + digits + data[start + 8 :]
    return data


def _evicted(values: Any, path: Path) -> Evicted:
    found = values.as_py()
    if found is None or any(type(value) is not int or value < 0 for value in found.values()):
        raise CorruptionError(f"{path}: expected what was evicted, as numbers from 0, found {found}")
    return Evicted(**found)


def _nulls(row: pa.RecordBatch) -> int:
    """Nulls among the rows and files; those of episodes are checked with them."""
    rows, files, parts = (row.column(name).values for name in ("rows", "files", "parts"))
    children = [states.field(i) for states in (files, parts) for i in range(_FILE.num_fields)]
    return sum(array.null_count for array in (rows, files, parts, *children))


def _one_list(values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def _file_structs(states: Sequence[tuple[int, ...]]) -> pa.StructArray:
    columns = zip(*states, strict=True) if states else [()] * 4
    arrays = [pa.array(column, field.type) for column, field in zip(columns, _FILE, strict=True)]
    return pa.StructArray.from_arrays(arrays, fields=list(_FILE))


def _file_tuples(states: Any) -> list[tuple[int, ...]]:
    columns = [states.values.field(i).to_pylist() for i in range(_FILE.num_fields)]
    return list(zip(*columns, strict=True))


def _struct_array(table: pa.Table) -> pa.StructArray:
    arrays = [column.combine_chunks() for column in table.columns]
    return pa.StructArray.from_arrays(arrays, fields=list(table.schema))


def _episode_table(structs: Any, schema: pa.Schema, path: Path) -> pa.Table:
    values = structs.values
    arrays = [values.field(i) for i in range(len(schema))]
    nulls = [f.name for f, array in zip(schema, arrays, strict=True) if not f.nullable and array.null_count]
    if values.null_count or nulls:
        raise CorruptionError(f"{path}: nulls in the episodes' {nulls}")
    return pa.Table.from_arrays(arrays, schema=schema)
