"""Changes to batches where they are read: `Normalize`, `Cast`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from replaystore.errors import UsageError
from replaystore.stats import Stats


class Normalize:
    """(x - mean) / std as float32, for fields by name: `Normalize({"observation": stats})`.

    Called on a batch, numpy's or a dict of tensors, it gives one with these fields replaced, and
    `next_observation` along with `observation`. An element that never changes is only centred.
    Padding is treated as the rest is. Integers of 32 bits and more, and float64, are subtracted
    and divided in float64.
    """

    def __init__(self, stats: Mapping[str, Stats]) -> None:
        if not isinstance(stats, Mapping) or not all(isinstance(each, Stats) for each in stats.values()):
            raise UsageError(f"Normalize: expected a dict from field to Stats, got {stats!r:.200}")
        self._scales = {
            name: (each.mean, np.where(each.std > 0, each.std, 1.0)) for name, each in stats.items()
        }

    def __call__(self, batch: Any) -> Any:
        for name, (mean, std) in self._scales.items():
            batch = _replaced(batch, name, partial(_scaled, name, mean, std))
        return batch


class Cast:
    """Other dtypes for fields, or for all below a name: `Cast({"observation": "float32"})`.

    Called as `Normalize` is.
    """

    def __init__(self, dtypes: Mapping[str, str]) -> None:
        if not isinstance(dtypes, Mapping) or not all(each in _TENSOR_METHODS for each in dtypes.values()):
            raise UsageError(
                f"Cast: expected a dict from field to one of {[*_TENSOR_METHODS]}, got {dtypes!r}"
            )
        self._dtypes = dict(dtypes)

    def __call__(self, batch: Any) -> Any:
        for name, dtype in self._dtypes.items():
            batch = _replaced(batch, name, partial(_cast, dtype))
        return batch


_TENSOR_METHODS = {"bool": "bool", "uint8": "byte", "int8": "char", "int16": "short", "int32": "int",
                   "int64": "long", "float16": "half", "float32": "float", "float64": "double"}  # fmt: skip


def _cast(dtype: str, value: Any) -> Any:
    """An array or a tensor, without loading torch where there is none."""
    if isinstance(value, np.ndarray):
        return value.astype(dtype, copy=False)
    return getattr(value, _TENSOR_METHODS[dtype])()


def _scaled(name: str, mean: np.ndarray, std: np.ndarray, value: Any) -> Any:
    if tuple(value.shape[value.ndim - mean.ndim :]) != mean.shape:
        found = tuple(value.shape)
        raise UsageError(f"Normalize: {name}: expected rows of shape {mean.shape}, got a batch of {found}")
    is_exact = value.dtype.itemsize <= 2 or str(value.dtype).endswith("float32")
    wide = _cast("float32" if is_exact else "float64", value)
    if isinstance(wide, np.ndarray):
        return ((wide - mean.astype(wide.dtype)) / std.astype(wide.dtype)).astype(np.float32, copy=False)
    return _cast("float32", (wide - wide.new_tensor(mean)) / wide.new_tensor(std))


def _replaced(batch: Any, name: str, function: Callable[[Any], Any]) -> Any:
    """The batch with a field replaced, and what is the next observation's of it."""
    top, *parts = name.split("/")
    tops = _children(batch)
    if top == "observation" and "next_observation" in tops:
        batch = _put(batch, ["next_observation", *parts], function)
    return _put(
        batch, [top, *parts] if top in tops or "extra" not in tops else ["extra", top, *parts], function
    )


def _put(value: Any, path: list[str], function: Callable[[Any], Any]) -> Any:
    """Nested dicts and tuples with the leaves below a path replaced."""
    children = _children(value)
    if not path and not children:
        return function(value)
    if path and path[0] not in children:
        raise UsageError(f"batch: expected {path[0]!r} among {list(children)}")
    whole = children | {part: _put(children[part], path[1:], function) for part in path[:1] or children}
    if isinstance(value, tuple):
        return type(value)(**whole) if hasattr(value, "_asdict") else tuple(whole.values())
    return whole


def _children(value: Any) -> dict[str, Any]:
    """The parts of a batch or of a nested value, by name; a leaf has none."""
    if isinstance(value, tuple):
        parts = value._asdict() if hasattr(value, "_asdict") else {str(i): v for i, v in enumerate(value)}
        return dict(parts)
    return dict(value) if isinstance(value, dict) else {}
