"""A sampler's state in a file of the store: `samplers/<name>.arrow`, replaced atomically.

It is an Arrow IPC file of one row:

    kind      the sampler's class
    state     the sampler's state as JSON, with {"array": i} in the places of arrays
    arrays    those arrays: numpy's name of the dtype, the shape, the bytes
    crc32c    of all that, in this order
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from replaystore.codec import crc32c
from replaystore.episodes import decode_table, encode_table
from replaystore.errors import CorruptionError, UsageError
from replaystore.files import PARTIAL, list_directory, make_directory, read_bytes, remove, write_atomic
from replaystore.samplers import Sampler

FOLDER = "samplers"
MAX_BYTES = 1 << 34
DTYPES = ("float64", "int64")
_ARRAY = pa.struct(
    [
        ("dtype", pa.string()),
        ("shape", pa.list_(pa.int64())),
        ("data", pa.large_binary()),
    ]
)
_SCHEMA = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),
        pa.field("state", pa.string(), nullable=False),
        pa.field("arrays", pa.list_(_ARRAY), nullable=False),
        pa.field("crc32c", pa.uint32(), nullable=False),
    ]
)


def save_sampler(store: str | os.PathLike[str], name: str, sampler: Sampler) -> None:
    """Keep a sampler's state with a store; a kill meanwhile leaves the state that was kept before.

    One process at a time saves under a name.
    """
    path = _path(store, name)
    data = _encode(type(sampler).__name__, sampler.state_dict())
    make_directory(path.parent, exist_ok=True)
    for left in list_directory(path.parent):
        if left.startswith(f"{path.name}.") and left.endswith(PARTIAL):  # of a save that was killed
            remove(path.parent / left)
    write_atomic(path, data)


def load_sampler(store: str | os.PathLike[str], name: str, sampler: Sampler) -> None:
    """Let a sampler of the same kind and arguments go on from the state that was kept.

    Raises `UsageError` if none was, and `CorruptionError` if the file is damaged.
    """
    path = _path(store, name)
    if not path.exists():
        raise UsageError(f"{path}: expected a sampler saved by this name, found none")
    kind, state = _decode(read_bytes(path, MAX_BYTES), path)
    if kind != type(sampler).__name__:
        raise UsageError(f"{path}: expected the state of a {type(sampler).__name__}, found that of a {kind}")
    sampler.load_state_dict(state)


def check_sampler_file(path: Path) -> None:
    """Raise `CorruptionError` if what `save_sampler` kept is damaged."""
    _decode(read_bytes(path, MAX_BYTES), path)


def _path(store: str | os.PathLike[str], name: str) -> Path:
    if not isinstance(name, str) or not re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", name):
        raise UsageError(f"name: expected up to 100 of the characters A-Z, a-z, 0-9, _ and -, got {name!r}")
    return Path(store) / FOLDER / f"{name}.arrow"


def _encode(kind: str, state: dict[str, Any]) -> bytes:
    found: list[np.ndarray] = []
    text = json.dumps(_without_arrays(state, found))
    arrays = [{"dtype": a.dtype.name, "shape": list(a.shape), "data": a.tobytes()} for a in found]
    row = [[kind], [text], [arrays], [_checksum(kind, text, arrays)]]
    columns = [pa.array(value, field.type) for value, field in zip(row, _SCHEMA, strict=True)]
    return encode_table(pa.Table.from_arrays(columns, schema=_SCHEMA))


def _decode(data: bytes, path: Path) -> tuple[str, dict[str, Any]]:
    table = decode_table(data, _SCHEMA, path)
    if len(table) != 1:
        raise CorruptionError(f"{path}: expected one row, found {len(table)}")
    kind, text, arrays, checksum = (column[0].as_py() for column in table.columns)
    if any(array is None or None in array.values() for array in arrays):
        raise CorruptionError(f"{path}: nulls where there are none")
    if _checksum(kind, text, arrays) != checksum:
        raise CorruptionError(f"{path}: the checksum does not match")
    try:
        return kind, _with_arrays(json.loads(text), [_array(array, path) for array in arrays])
    except (ValueError, TypeError, IndexError, RecursionError) as error:  # whoever made it
        raise CorruptionError(f"{path}: expected a sampler's state, found no such: {error}") from error


def _without_arrays(value: Any, found: list[np.ndarray]) -> Any:
    """The value with arrays replaced by their places in `found`, which they are added to."""
    if isinstance(value, dict):
        return {name: _without_arrays(child, found) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_arrays(child, found) for child in value]
    if isinstance(value, np.ndarray):
        found.append(value)
        return {"array": len(found) - 1}
    return value


def _with_arrays(value: Any, arrays: list[np.ndarray]) -> Any:
    """The inverse of `_without_arrays`, with lists for tuples."""
    if isinstance(value, dict):
        if value.keys() == {"array"}:
            return arrays[value["array"]]
        return {name: _with_arrays(child, arrays) for name, child in value.items()}
    return [_with_arrays(child, arrays) for child in value] if isinstance(value, list) else value


def _array(array: dict[str, Any], path: Path) -> np.ndarray:
    if array["dtype"] not in DTYPES:
        raise CorruptionError(f"{path}: expected a dtype of {DTYPES}, found {array['dtype']!r}")
    return np.frombuffer(array["data"], array["dtype"]).reshape(array["shape"]).copy()


def _checksum(kind: str, text: str, arrays: list[dict[str, Any]]) -> int:
    crc = crc32c(f"{kind}\n{text}\n".encode())
    for array in arrays:
        crc = crc32c(f"{array['dtype']}\n{array['shape']}\n".encode(), crc)
        crc = crc32c(array["data"], crc)
    return crc
