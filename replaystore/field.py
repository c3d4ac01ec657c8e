"""`Field`: one named column of a store's rows, and the check of a value for it."""

import base64
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from replaystore.errors import LimitError, SchemaError

FLAT_ROW_BYTES = 512  # rows below this are kept raw and mapped, larger ones are compressed
CHUNK_BYTES = 131072  # decoded bytes of a packed chunk, at the most unless one row has more

MAX_ROW_BYTES = 1 << 28
MAX_CHUNK_ROWS = 4096  # of which a flat file has a multiple
MIN_DECODED_BYTES = 8  # of a packed chunk; fewer make an encoded one that is too short (`codec.py`)
DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
          "float16", "float32", "float64")  # fmt: skip
RESERVED = {"index", "heads", "lock", "head.arrow", "zarr.json", "c"}

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_CODEC = re.compile(r"flat|blosc-(lz4|lz4hc|zstd)-([1-9])(-shuffle|-bitshuffle)?")


@dataclass(frozen=True)
class Field:
    """One named column of the schema.

    `codec` is "flat" (kept raw, mapped) or "blosc-NAME-LEVEL[-shuffle|-bitshuffle]" with NAME one
    of lz4, lz4hc, zstd; by default rows under 512 bytes are flat. `chunk_rows` rows of a packed
    field are compressed together (a power of two). `padding` is the raw bytes of the row that
    stands before an episode's first one in a frame stack; None repeats the first.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    codec: str
    chunk_rows: int
    padding: bytes | None

    def __init__(
        self,
        name: str,
        shape: Iterable[int],
        dtype: Any,
        *,
        codec: str = "auto",
        chunk_rows: int | None = None,
        padding: bytes | None = None,
    ) -> None:
        _check_name(name)
        set_ = object.__setattr__
        set_(self, "name", name)
        set_(self, "shape", _as_shape(name, shape))
        set_(self, "dtype", _as_dtype(name, dtype))
        set_(self, "codec", self._as_codec(codec))
        set_(self, "chunk_rows", self._as_chunk_rows(chunk_rows))
        set_(self, "padding", padding)
        if padding is not None and len(padding) != self.row_nbytes:
            expected = f"{self.row_nbytes} bytes of padding"
            raise SchemaError(f"field {name!r}: expected {expected}, got {len(padding)}")

    @property
    def row_nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def packed(self) -> bool:
        return self.codec != "flat"

    @property
    def chunk_nbytes(self) -> int:
        return self.chunk_rows * self.row_nbytes

    def padding_row(self) -> np.ndarray | None:
        if self.padding is None:
            return None
        return np.frombuffer(self.padding, self.dtype).reshape(self.shape)

    def accept(self, value: Any, lead: tuple[int, ...] = ()) -> Any:
        """Return `value` ready to be assigned to a row, or raise `SchemaError`.

        Nothing is cast but what keeps every value: another byte order, and single numbers (an
        `int` reward for a float64 field). `lead` is `(num_envs,)` for rows of a vector env.
        """
        kind = type(value)
        if kind is np.ndarray:
            if value.dtype == self.dtype and value.shape == lead + self.shape:
                return value
        elif not lead and (kind in self.number_types or (kind is int and value in self._int_range)):
            return value
        return self._convert(value, lead + self.shape, is_number=not self.shape)

    @cached_property
    def number_types(self) -> frozenset[type]:
        """Types of single numbers that are stored as they are."""
        own = (self.dtype.type, _NATIVE.get(self.dtype, self.dtype.type))
        return frozenset() if self.shape else frozenset(own)

    @cached_property
    def _int_range(self) -> range:
        """The ints that are stored as they are."""
        if self.shape or self.dtype.kind not in "iu":
            return range(0)
        limits = np.iinfo(self.dtype)
        return range(int(limits.min), int(limits.max) + 1)

    def _convert(self, value: Any, shape: tuple[int, ...], *, is_number: bool) -> np.ndarray:
        expected = f"field {self.name!r}: expected {self.dtype} of shape {shape}"
        try:
            array = np.asarray(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise SchemaError(f"{expected}, got {type(value).__name__}: {error}") from error
        if array.dtype.name not in DTYPES or array.shape != shape:
            shown = f"{array.dtype} of shape {array.shape}"
            raise SchemaError(f"{expected}, got {shown} ({type(value).__name__})")
        if array.dtype.newbyteorder("=") == self.dtype:
            return array
        if is_number and (converted := _same_numbers(array, self.dtype)) is not None:
            return converted
        shown = f"{array.dtype}" if array.ndim else f"{array.dtype} {value!r}"
        raise SchemaError(f"{expected}, got {shown}: convert it first, rows are never cast")

    @classmethod
    def from_json(
        cls, name: str, shape: list[int], dtype: str, codec: str, chunk_rows: int, padding: str | None
    ) -> "Field":
        """Read what `to_json` gave, as keywords."""
        raw = None if padding is None else base64.b64decode(padding, validate=True)
        rows = None if codec == "flat" else chunk_rows
        return cls(name, shape, dtype, codec=codec, chunk_rows=rows, padding=raw)

    def to_json(self) -> dict[str, Any]:
        padding = None if self.padding is None else base64.b64encode(self.padding).decode()
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype.name,
            "codec": self.codec,
            "chunk_rows": self.chunk_rows,
            "padding": padding,
        }

    def _as_codec(self, codec: str) -> str:
        if codec == "auto":
            if self.row_nbytes < FLAT_ROW_BYTES:
                return "flat"
            return "blosc-lz4hc-5" if self.dtype.itemsize == 1 else "blosc-lz4hc-5-shuffle"
        if not isinstance(codec, str) or not _CODEC.fullmatch(codec):
            choices = (
                "auto, flat, or blosc-NAME-LEVEL[-shuffle|-bitshuffle], NAME lz4, lz4hc or zstd, LEVEL 1 to 9"
            )
            raise SchemaError(f"field {self.name!r}: expected codec {choices}, got {codec!r}")
        return codec

    def _as_chunk_rows(self, chunk_rows: int | None) -> int:
        if not self.packed:
            return 1
        if chunk_rows is None:
            fitting = min(MAX_CHUNK_ROWS, max(1, CHUNK_BYTES // self.row_nbytes))
            return 1 << (fitting.bit_length() - 1)
        if (
            type(chunk_rows) is not int
            or not 0 < chunk_rows <= MAX_CHUNK_ROWS
            or chunk_rows & (chunk_rows - 1)
        ):
            wanted = f"a power of two from 1 to {MAX_CHUNK_ROWS}"
            raise SchemaError(f"field {self.name!r}: expected chunk_rows {wanted}, got {chunk_rows!r}")
        nbytes = chunk_rows * self.row_nbytes
        if nbytes < MIN_DECODED_BYTES:
            raise SchemaError(
                f"field {self.name!r}: expected chunks of {MIN_DECODED_BYTES} bytes or more, {chunk_rows} rows"
                f" have {nbytes}: use more chunk_rows, or codec='flat'"
            )
        if nbytes > MAX_ROW_BYTES:
            raise LimitError(
                f"field {self.name!r}: a chunk of {chunk_rows} rows has more than {MAX_ROW_BYTES} bytes"
            )
        return chunk_rows


_NATIVE: dict[np.dtype[Any], type] = {np.dtype("float64"): float, np.dtype("bool"): bool}


def _check_name(name: str) -> None:
    if not isinstance(name, str) or len(name) > 255:
        raise SchemaError(f"field name: expected a str of at most 255 characters, got {name!r:.80}")
    for part in name.split("/"):
        if not _PART.fullmatch(part) or part in RESERVED:
            allowed = f"parts of letters, digits, '_', '.', '-', joined by '/', none of {sorted(RESERVED)}"
            raise SchemaError(f"field name {name!r}: expected {allowed}")


def _as_shape(name: str, shape: Iterable[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(shape)
        good = all(isinstance(size, (int, np.integer)) and size > 0 for size in sizes)
    except TypeError:
        sizes, good = (), False
    if not good or len(sizes) > 16 or any(isinstance(size, bool) for size in sizes):
        raise SchemaError(f"field {name!r}: expected a shape of positive sizes, got {shape!r}")
    if math.prod(map(int, sizes)) * 8 > MAX_ROW_BYTES:
        raise LimitError(f"field {name!r}: a row of shape {sizes} may have more than {MAX_ROW_BYTES} bytes")
    return tuple(map(int, sizes))


def _as_dtype(name: str, dtype: Any) -> np.dtype[Any]:
    try:
        given = np.dtype(dtype)
    except TypeError as error:
        raise SchemaError(f"field {name!r}: expected a dtype of {DTYPES}, got {dtype!r}") from error
    if given.name not in DTYPES:
        raise SchemaError(f"field {name!r}: expected a dtype of {DTYPES}, got {given}")
    native: np.dtype[Any] = np.dtype(given.name)
    return native


def _same_numbers(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray | None:
    """Cast numbers if each keeps its value (bool stays bool, float never becomes int)."""
    order = "biuf"
    kind, wanted = array.dtype.kind, dtype.kind
    if "b" in (kind, wanted) or order.index(kind.replace("u", "i")) > order.index(wanted.replace("u", "i")):
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
        back = cast.astype(array.dtype)
    same = np.array_equal(back, array, equal_nan=array.dtype.kind == "f")
    sign_kept = np.array_equal(cast < 0, array < 0)
    return cast if same and sign_kept else None
