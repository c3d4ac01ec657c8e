"""How much a store keeps: the bounds that it was created with."""

import math
from typing import Any, NamedTuple

from replaystore.errors import UsageError

_NAMES = ("capacity", "capacity_bytes", "max_age")


class Bounds(NamedTuple):
    """The most that a store keeps; None where there is no bound.

    `capacity` in transitions, `capacity_bytes` in bytes on disk, `max_age` in seconds since an
    episode began. What is beyond is evicted, the oldest first; of a `reservoir`, which has a capacity
    alone, any episode with the same probability.
    """

    capacity: int | None = None
    capacity_bytes: int | None = None
    max_age: float | None = None
    reservoir: bool = False

    @property
    def is_none(self) -> bool:
        """Whether nothing is ever evicted."""
        return self.capacity is None and self.capacity_bytes is None and self.max_age is None


def check_bounds(bounds: Bounds) -> None:
    """Raise `UsageError` for what could be no bound."""
    for name, value in (("capacity", bounds.capacity), ("capacity_bytes", bounds.capacity_bytes)):
        if value is not None and (type(value) is not int or not 0 < value < 1 << 63):
            raise UsageError(f"{name}: expected None or an int from 1 to 2^63 - 1, got {value!r}")
    age = bounds.max_age
    if age is not None and (type(age) not in (int, float) or not 0 < age < math.inf):
        raise UsageError(f"max_age: expected None or a number of seconds above 0, got {age!r}")
    if type(bounds.reservoir) is not bool:
        raise UsageError(f"reservoir: expected True or False, got {bounds.reservoir!r}")
    if bounds.reservoir and (bounds.capacity is None or (bounds.capacity_bytes, age) != (None, None)):
        raise UsageError(f"reservoir: expected a capacity, and no capacity_bytes or max_age, got {bounds}")


def check_bounds_are(stored: Bounds, given: Bounds, where: str) -> None:
    """Raise `UsageError` for a bound that is given and is not the one that a store was created with."""
    check_bounds(given)
    for name, expected, found in zip(Bounds._fields, stored, given, strict=True):
        if found not in (None, False) and found != expected:
            kept = "none" if expected is None else str(expected)
            raise UsageError(f"{name}: expected {kept}, as {where} was created with, got {found}")


def bounds_to_json(bounds: Bounds) -> dict[str, Any]:
    """As JSON; `reservoir`, which older versions of this package do not know, where it is true alone."""
    values = bounds._asdict()
    return values if bounds.reservoir else {name: values[name] for name in _NAMES}


def bounds_from_json(data: Any) -> Bounds:
    """Read what `bounds_to_json` gave; raises `UsageError` for anything else."""
    if not isinstance(data, dict) or data.keys() - {"reservoir"} != set(_NAMES):
        raise UsageError(f"expected the bounds {Bounds._fields}, got {data!r}")
    bounds = Bounds(**data)
    check_bounds(bounds)
    return bounds
