"""How far a learner may run ahead of its actors, and they of it, when both run at once.

The idea is that of Reverb's rate limiters (Cassirer et al. 2021, arXiv 2102.04736): samples are
drawn at a steady ratio to what is inserted, so that a run learns the same however fast its parts are.
"""

import threading
from collections.abc import Callable
from typing import Any

from replaystore.errors import UsageError


class SamplesPerInsert:
    """Says when a learner may sample and when an actor may insert.

    After `min_size` insertions `ratio` items are to be sampled per insertion, give or take
    `tolerance` items: with d = ratio * (inserted - min_size) - sampled, sampling has to leave d at
    `-tolerance` or above, and inserting at `tolerance` or below. Before, sampling has to wait and
    inserting does not. A learner that samples n at once and an actor that inserts m never wait for
    each other if n + ratio * m is at most 2 * tolerance.

    The limiter counts what it is told; any thread may call it. It reads no clock.
    """

    def __init__(self, ratio: float, *, min_size: int = 1, tolerance: float) -> None:
        if not _is_number(ratio) or not 0 < ratio < float("inf"):
            raise UsageError(f"ratio: expected a number above 0, got {ratio!r}")
        if type(min_size) is not int or min_size < 1:
            raise UsageError(f"min_size: expected an int from 1, got {min_size!r}")
        least = (1 + ratio) / 2
        if not _is_number(tolerance) or not least <= tolerance < float("inf"):
            raise UsageError(
                f"tolerance: expected a number from (1 + ratio) / 2 = {least}, got {tolerance!r}"
            )
        self._ratio = ratio
        self._min_size = min_size
        self._tolerance = tolerance
        self._inserted = self._sampled = 0
        self._is_closed = False
        self._changed = threading.Condition()

    @property
    def inserted(self) -> int:
        """Transitions inserted so far."""
        return self._inserted

    @property
    def sampled(self) -> int:
        """Items sampled so far."""
        return self._sampled

    def may_sample(self, n: int = 1) -> bool:
        """Whether n more items may be sampled now."""
        with self._changed:
            return self._may_sample(_count(n))

    def may_insert(self, n: int = 1) -> bool:
        """Whether n more transitions may be inserted now."""
        with self._changed:
            return self._may_insert(_count(n))

    def add_sampled(self, n: int = 1) -> None:
        """Say that n items were sampled."""
        with self._changed:
            self._sampled += _count(n)
            self._changed.notify_all()

    def add_inserted(self, n: int = 1) -> None:
        """Say that n transitions were inserted."""
        with self._changed:
            self._inserted += _count(n)
            self._changed.notify_all()

    def wait_to_sample(self, n: int = 1, timeout: float | None = None) -> bool:
        """Wait until n items may be sampled, and count them; False after `timeout` seconds or `close`."""
        self._check_fits(_count(n), 1)
        return self._wait(lambda: self._may_sample(n), timeout, sampled=n)

    def wait_to_insert(self, n: int = 1, timeout: float | None = None) -> bool:
        """Wait until n transitions may be inserted, and count them; False as `wait_to_sample`."""
        self._check_fits(1, _count(n))
        return self._wait(lambda: self._may_insert(n), timeout, inserted=n)

    def close(self) -> None:
        """Let all that wait go: the run is over."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def state_dict(self) -> dict[str, Any]:
        """The two counts."""
        with self._changed:
            return {"inserted": self._inserted, "sampled": self._sampled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the counts of a state."""
        if not isinstance(state, dict) or state.keys() != {"inserted", "sampled"}:
            raise UsageError(f"SamplesPerInsert: expected a state of inserted and sampled, got {state!r}")
        inserted, sampled = _count(state["inserted"]), _count(state["sampled"])
        with self._changed:
            self._inserted, self._sampled = inserted, sampled
            self._changed.notify_all()

    def check(self) -> None:
        """Raise at the first broken invariant."""
        assert self._inserted >= 0, self._inserted
        assert self._sampled >= 0, self._sampled

    def _due(self) -> float:
        """How many items are to be sampled for what was inserted; negative if too many were."""
        return self._ratio * (self._inserted - self._min_size) - self._sampled

    def _may_sample(self, n: int) -> bool:
        return self._inserted >= self._min_size and self._due() - n >= -self._tolerance

    def _may_insert(self, n: int) -> bool:
        return self._inserted < self._min_size or self._due() + self._ratio * n <= self._tolerance

    def _check_fits(self, sampled: int, inserted: int) -> None:
        """Raise if nobody could ever allow so many at once."""
        if sampled + self._ratio * inserted > 2 * self._tolerance:
            raise UsageError(
                f"expected at most 2 * tolerance = {2 * self._tolerance} items for what is sampled and inserted "
                f"at once, got {sampled} + {self._ratio} * {inserted}"
            )

    def _wait(
        self, may: Callable[[], bool], timeout: float | None, *, inserted: int = 0, sampled: int = 0
    ) -> bool:
        with self._changed:
            allowed = self._changed.wait_for(lambda: self._is_closed or may(), timeout)
            if not allowed or self._is_closed:
                return False
            self._inserted += inserted
            self._sampled += sampled
            self._changed.notify_all()
            return True


def _count(n: Any) -> int:
    if type(n) is not int or n < 0:
        raise UsageError(f"expected a count from 0, got {n!r}")
    return n


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
