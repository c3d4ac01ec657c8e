"""Prefix sums over priorities: a tree of sums, searched for many values at once.

Level 0 holds the priorities, the leaves; entry i of the next level is the sum of entries i * FAN to
(i + 1) * FAN - 1 of the one below, and so on up to a level of at most TOP entries. A sum is always
computed anew from all of its children, in their order, so it depends on them alone: nothing drifts,
and a tree that is built from the same leaves is the same to the bit.
"""

import numpy as np

FAN = 16  # children of a sum; 32 and 64 took 1.3 and 1.9 times as long at 10^6 leaves, batch 256
TOP = 4096  # entries of the highest level at most, which is searched by bisection
MANY = 4096  # leaves set at once from which their sums are made unique first


class SumTree:
    """Priorities of leaves, numbered from 0, and a search in their cumulative sum; float64.

    It takes 8 * (1 + 1 / (FAN - 1)) bytes a leaf, a quarter more after growing.
    """

    def __init__(self) -> None:
        self._length = 0
        self._levels = [np.zeros(FAN)]
        self._ends = np.zeros(FAN + 1)  # 0, and the cumulative sums of the highest level
        self._is_behind = False  # sums are to be made anew: an interrupt may have come in between

    def __len__(self) -> int:
        """The number of leaves."""
        return self._length

    @property
    def capacity(self) -> int:
        """Leaves that there is memory for."""
        return len(self._levels[0])

    @property
    def total(self) -> float:
        """The sum of all priorities."""
        self._catch_up()
        return float(self._ends[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(level.nbytes for level in self._levels) + self._ends.nbytes

    def grow(self, length: int) -> None:
        """Have so many leaves, or more; new ones get priority 0."""
        if length > self.capacity:
            leaves = np.zeros(_padded(max(length, self.capacity * 5 // 4)))
            leaves[: self.capacity] = self._levels[0]
            self._levels, self._is_behind = [leaves], True
            self._catch_up()
        self._length = max(self._length, length)

    def get(self, leaves: np.ndarray) -> np.ndarray:
        """The priorities of some leaves."""
        priorities: np.ndarray = self._levels[0].take(leaves)
        return priorities

    def set(self, leaves: np.ndarray, priorities: np.ndarray | float) -> None:
        """Set priorities, finite and not below 0; of a leaf that comes twice the last one counts."""
        if not len(leaves):
            return
        assert 0 <= leaves.min() <= leaves.max() < self._length, (leaves.min(), leaves.max(), self._length)
        self._catch_up()
        self._is_behind = True
        self._levels[0][leaves] = priorities
        nodes = leaves
        for below, sums in zip(self._levels, self._levels[1:], strict=False):
            nodes = nodes // FAN
            if len(nodes) > MANY:
                nodes = np.flatnonzero(np.bincount(nodes))
            sums[nodes] = _blocks(below).take(nodes, axis=0).sum(axis=1)
        self._sum_top()
        self._is_behind = False

    def find(self, values: np.ndarray) -> np.ndarray:
        """The leaves in whose share of the cumulative sum values lie; never one of priority 0.

        Values from 0 to below `total`; what rounding lifts to an end counts to the last share before it.
        """
        assert self.total > 0, "a tree without a priority above 0"
        left = np.minimum(values, np.nextafter(self._ends[-1], 0))
        found: np.ndarray = self._ends[1:].searchsorted(left, side="right")
        left -= self._ends.take(found)
        ends = np.zeros((len(values), FAN + 1))  # 0, and the cumulative sums of a block
        rows = np.arange(0, ends.size, FAN + 1)
        for level in self._levels[-2::-1]:
            np.add.accumulate(_blocks(level).take(found, axis=0), axis=1, out=ends[:, 1:])
            np.minimum(left, np.nextafter(ends[:, -1], 0), out=left)
            child = (ends[:, 1:] > left[:, None]).argmax(axis=1)
            left -= ends.take(rows + child)
            found = found * FAN + child
        return found

    def check(self) -> None:
        """Raise at the first broken invariant."""
        self._catch_up()
        leaves = self._levels[0]
        assert self._length <= len(leaves) == _padded(len(leaves)), (self._length, len(leaves))
        assert (np.isfinite(leaves) & (leaves >= 0)).all(), "a priority that is no number from 0"
        assert not leaves[self._length :].any(), "a priority beyond the last leaf"
        for level, expected in zip(self._levels, _sums(leaves), strict=True):
            assert np.array_equal(level, expected), f"{len(level)} sums that are not those of their children"
        assert np.array_equal(self._ends[1:], self._levels[-1].cumsum()), "the cumulative sums of the top"

    def _catch_up(self) -> None:
        """Make all sums anew if some may not be those of their children."""
        if self._is_behind:
            self._levels = _sums(self._levels[0])
            self._sum_top()
            self._is_behind = False

    def _sum_top(self) -> None:
        top = self._levels[-1]
        if len(self._ends) != len(top) + 1:
            self._ends = np.zeros(len(top) + 1)
        np.cumsum(top, out=self._ends[1:])


def _sums(leaves: np.ndarray) -> list[np.ndarray]:
    """All levels over some leaves, each a multiple of FAN long."""
    levels = [leaves]
    while len(levels[-1]) > TOP:
        sums = _blocks(levels[-1]).sum(axis=1)
        levels.append(np.pad(sums, (0, _padded(len(sums)) - len(sums))))
    return levels


def _padded(length: int) -> int:
    """The next multiple of FAN."""
    return -(-length // FAN) * FAN


def _blocks(level: np.ndarray) -> np.ndarray:
    """The children of each sum of the level above, (sums, FAN)."""
    return level.reshape(-1, FAN)
