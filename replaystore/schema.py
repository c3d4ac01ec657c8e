"""`Schema`: the fields of a store's rows, and their nesting.

Nested observations and actions are paths: a Dict space's `camera` is the field
`observation/camera`, a Tuple space's first part `observation/0`. `flatten` turns a nested value
into the values of its fields, `nest` turns arrays back into the nested form: a node whose
children are named 0, 1, … is a tuple, any other a dict.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np

from replaystore.errors import LimitError, SchemaError
from replaystore.field import Field

Nested: TypeAlias = "np.ndarray | dict[str, Nested] | tuple[Nested, ...]"

FILE_ROWS = 262144  # rows of all environments in a flat file: whole huge pages of 8-byte values
MIN_FILE_ROWS = 4096  # rows of one environment in a flat file: whole pages of any dtype
SHARD_CHUNKS = 1024  # chunks of all environments in a shard of a packed field
MAX_FILE_ROWS = 1 << 22  # or chunks in a shard
MAX_FIELDS = 1000
MAX_NUM_ENVS = 65536
FIXED_COLUMNS = (
    "stream", "env", "first_row", "length", "terminated", "truncated", "return", "seed", "start_time", "policy"
)  # fmt: skip
COLUMN_DTYPES = ("bool", "int64", "float64", "string")
FLAGS = ("terminated", "truncated")  # which the index holds as well
REQUIRED = ("observation", "action", "reward", *FLAGS)


class Schema:
    """The fields of a store's rows and the user's columns of its episodes; never changes.

    `tops` are the names of the values of a step: "observation", "action" and so on; `extra` those of the
    user's own, beside the five of every transition. `observed` are the fields of an observation, `acted` those
    of what was done about it. `columns` maps the name of an episode column to "bool", "int64", "float64" or "string".
    `file_rows` and `shard_chunks` say how much goes into a file of a flat and a packed field, all
    environments together.
    """

    def __init__(
        self,
        fields: Iterable[Field],
        columns: Mapping[str, str] | None = None,
        *,
        file_rows: int | None = None,
        shard_chunks: int | None = None,
    ) -> None:
        self.fields = tuple(fields)
        self.columns = dict(columns or {})
        self.file_rows = FILE_ROWS if file_rows is None else file_rows
        self.shard_chunks = SHARD_CHUNKS if shard_chunks is None else shard_chunks
        self.by_name = {field.name: field for field in self.fields}
        self._trees = _build_trees(self.fields)
        self.tops = tuple(self._trees)
        self.extra = tuple(name for name in self._trees if name not in REQUIRED)
        self._names = {top: tuple(_leaves(tree)) for top, tree in self._trees.items()}
        self.observed = self._names.get("observation", ())
        self.acted = tuple(name for name in self.by_name if name not in self.observed)
        self.is_nested = any(isinstance(tree, dict) for tree in self._trees.values())
        self._check()

    def names(self, top: str) -> tuple[str, ...]:
        """Names of the fields at or below a top name, in order."""
        return self._names[top]

    def is_observation(self, name: str) -> bool:
        return name.split("/", 1)[0] == "observation"

    def flatten(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Turn one value for each top name into one for each field."""
        if values.keys() != self._trees.keys():
            missing = [name for name in self._trees if name not in values]
            unknown = [name for name in values if name not in self._trees]
            have = ", ".join(self._trees)
            raise SchemaError(f"expected the fields {have}; missing {missing}, unknown {unknown}")
        if not self.is_nested:
            return values
        flat: dict[str, Any] = {}
        for top, value in values.items():
            tree = self._trees[top]
            if isinstance(tree, str):
                flat[top] = value
            else:
                _flatten(tree, value, top, flat)
        return flat

    def flatten_top(self, top: str, value: Any) -> dict[str, Any]:
        """Turn one nested value into one for each field below its top name."""
        flat: dict[str, Any] = {}
        _flatten(self._trees[top], value, top, flat)
        return flat

    def nest(self, top: str, arrays: Mapping[str, Any], part: Any = None) -> Any:
        """Give the arrays of the fields below a top name, or `array[part]`, the nested form of their space."""
        return _nest(self._trees[top], arrays, part)

    def difference(self, other: "Schema") -> str | None:
        """Say in a sentence the first way in which rows of `other` differ, or None."""
        for name in [*self.by_name, *other.by_name]:
            mine, theirs = self.by_name.get(name), other.by_name.get(name)
            if mine is None or theirs is None:
                holder = "the store has no" if mine is None else "only the store has"
                return f"{holder} field {name!r}"
            for part in ("shape", "dtype", "padding"):
                if getattr(mine, part) != getattr(theirs, part):
                    values = f"{getattr(mine, part)}, got {getattr(theirs, part)}"
                    return f"field {name!r}: expected {part} {values}"
        if self.columns != other.columns:
            return f"expected episode columns {self.columns}, got {other.columns}"
        return None

    def to_json(self) -> dict[str, Any]:
        return {
            "fields": [field.to_json() for field in self.fields],
            "columns": self.columns,
            "file_rows": self.file_rows,
            "shard_chunks": self.shard_chunks,
        }

    @classmethod
    def from_json(cls, data: Any) -> "Schema":
        """Read what `to_json` gave; raises `SchemaError` for anything else."""
        try:
            fields = [Field.from_json(**entry) for entry in data["fields"]]
            sizes = {name: data[name] for name in ("file_rows", "shard_chunks")}
            schema = cls(fields, data["columns"], **sizes)
        except (SchemaError, LimitError):
            raise
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise SchemaError(f"expected a schema of fields and columns: {error!r}") from error
        if schema.to_json() != data:
            raise SchemaError("expected a schema as it is written, found other or missing values")
        return schema

    def time_chunk(self, num_envs: int) -> int:
        """Rows of one environment in a flat file: a power of two, whole pages for any dtype."""
        return max(MIN_FILE_ROWS, 1 << (max(1, self.file_rows // num_envs).bit_length() - 1))

    def env_chunks(self, num_envs: int) -> int:
        """Chunks of one environment in a shard."""
        return max(1, self.shard_chunks // num_envs)

    def shard_rows(self, field: Field, num_envs: int) -> int:
        """Rows of one environment in a file of a field."""
        if field.packed:
            return field.chunk_rows * self.env_chunks(num_envs)
        return self.time_chunk(num_envs)

    def _check(self) -> None:
        if len(self.fields) > MAX_FIELDS:
            raise LimitError(f"expected at most {MAX_FIELDS} fields, got {len(self.fields)}")
        for name in ("file_rows", "shard_chunks"):
            size = getattr(self, name)
            if type(size) is not int or not 1 <= size <= MAX_FILE_ROWS:
                raise SchemaError(f"{name}: expected an int from 1 to {MAX_FILE_ROWS}, got {size!r}")
        for name in REQUIRED:
            if name not in self._trees:
                raise SchemaError(f"field {name!r} missing (have: {', '.join(self._trees)})")
        for name in ("terminated", "truncated"):
            field = self.by_name.get(name)
            if field is None or field.shape != () or field.dtype != np.dtype("bool") or field.packed:
                raise SchemaError(f"field {name!r}: expected one flat bool a row, got {field}")
        if "reward" not in self.by_name:
            raise SchemaError("field 'reward': expected an array, got a nested one")
        if len(self.columns) > MAX_FIELDS:
            raise LimitError(f"expected at most {MAX_FIELDS} episode columns, got {len(self.columns)}")
        for name, dtype in self.columns.items():
            taken = name in self._trees or name in FIXED_COLUMNS
            if not isinstance(name, str) or not name.isidentifier() or not name.isascii() or taken:
                others = f"no field's and none of {', '.join(FIXED_COLUMNS)}"
                raise SchemaError(f"episode column {name!r}: expected a name that is {others}")
            if dtype not in COLUMN_DTYPES:
                raise SchemaError(f"episode column {name!r}: expected one of {COLUMN_DTYPES}, got {dtype!r}")


def _build_trees(fields: tuple[Field, ...]) -> dict[str, Any]:
    """A leaf is its field's name; an inner node a dict from part to node."""
    root: dict[str, Any] = {}
    folded: dict[str, str] = {}
    for field in fields:
        twin = folded.setdefault(field.name.casefold(), field.name)
        *parents, leaf = field.name.split("/")
        node = root
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise SchemaError(f"field {field.name!r} clashes with field {node!r}")
        if leaf in node or twin != field.name:
            raise SchemaError(f"field {field.name!r} clashes with another of that name or case")
        node[leaf] = field.name
    return root


def _leaves(tree: Any) -> Iterable[str]:
    if isinstance(tree, str):
        yield tree
    else:
        for child in tree.values():
            yield from _leaves(child)


def _is_tuple(tree: dict[str, Any]) -> bool:
    return list(tree) == [str(i) for i in range(len(tree))]


def _flatten(tree: Any, value: Any, path: str, flat: dict[str, Any]) -> None:
    if isinstance(tree, str):
        flat[tree] = value
        return
    if isinstance(value, tuple) and _is_tuple(tree):
        value = {str(i): part for i, part in enumerate(value)}
    if not isinstance(value, Mapping) or value.keys() != tree.keys():
        got = list(value) if isinstance(value, Mapping) else type(value).__name__
        raise SchemaError(f"field {path!r}: expected parts {list(tree)}, got {got}")
    for part, child in tree.items():
        _flatten(child, value[part], f"{path}/{part}", flat)


def _nest(tree: Any, arrays: Mapping[str, Any], part: Any) -> Any:
    if isinstance(tree, str):
        return arrays[tree] if part is None else arrays[tree][part]
    nested = {name: _nest(child, arrays, part) for name, child in tree.items()}
    return tuple(nested.values()) if _is_tuple(tree) else nested
