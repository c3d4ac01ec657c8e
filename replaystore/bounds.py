"""How much a store keeps: the bounds that it was created with."""

import math
from typing import Any, NamedTuple

from replaystore.errors import UsageError


class Bounds(NamedTuple):
    """The most that a store keeps; None where there is no bound.

    `capacity` in transitions, `capacity_bytes` in bytes on disk, `max_age` in seconds since an
    episode began. What is beyond is evicted, the oldest first.
    """

    capacity: int | None = None
    capacity_bytes: int | None = None
    max_age: float | None = None

    @property
    def is_none(self) -> bool:
        """Whether nothing is ever evicted."""
        return all(bound is None for bound in self)


def check_bounds(bounds: Bounds) -> None:
    """Raise `UsageError` for what could be no bound."""
    for name, value in (("capacity", bounds.capacity), ("capacity_bytes", bounds.capacity_bytes)):
        if value is not None and (type(value) is not int or not 0 < value < 1 << 63):
            raise UsageError(f"{name}: expected None or an int from 1 to 2^63 - 1, got {value!r}")
    age = bounds.max_age
    if age is not None and (type(age) not in (int, float) or not 0 < age < math.inf):
        raise UsageError(f"max_age: expected None or a number of seconds above 0, got {age!r}")


def check_bounds_are(stored: Bounds, given: Bounds, where: str) -> None:
    """Raise `UsageError` for a bound that is given and is not the one that a store was created with."""
    check_bounds(given)
    for name, expected, found in zip(Bounds._fields, stored, given, strict=True):
        if found is not None and found != expected:
            kept = "none" if expected is None else str(expected)
            raise UsageError(f"{name}: expected {kept}, as {where} was created with, got {found}")


def bounds_to_json(bounds: Bounds) -> dict[str, Any]:
    return bounds._asdict()


def bounds_from_json(data: Any) -> Bounds:
    """Read what `bounds_to_json` gave; raises `UsageError` for anything else."""
    if not isinstance(data, dict) or data.keys() != set(Bounds._fields):
        raise UsageError(f"expected the bounds {Bounds._fields}, got {data!r}")
    bounds = Bounds(**data)
    check_bounds(bounds)
    return bounds
