"""The episodes of a stream as bounds see them: how many transitions are left from which row on."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from replaystore.episodes import integers


class Spans(NamedTuple):
    """Episodes of a stream, in order; int64 arrays (episodes,).

    `first` row and `last`, `start` in microseconds since 1970, and the number of the index's `part`.
    """

    first: np.ndarray
    last: np.ndarray
    start: np.ndarray
    part: np.ndarray

    @classmethod
    def of(cls, tables: Mapping[int, pa.Table]) -> "Spans":
        """The episodes of tables, by the number of their part."""
        columns = [np.empty((4, 0), np.int64)]
        for number, table in tables.items():
            first, length = integers(table, "first_row"), integers(table, "length")
            start = np.asarray(table.column("start_time").cast(pa.int64()).to_numpy())
            columns.append(np.array([first, first + length, start, np.full(len(table), number)]))
        return cls(*np.concatenate(columns, axis=1))

    def joined(self, other: "Spans") -> "Spans":
        """These and then the others."""
        return Spans(*np.concatenate([self, other], axis=1))

    def above(self, floor: int) -> "Spans":
        """Those that have transitions from a row on."""
        return Spans(*np.array(self)[:, self.last > floor])

    def left(self, floor: int) -> int:
        """How many transitions there are from a row on."""
        return int(np.maximum(self.last - np.maximum(self.first, floor), 0).sum())

    def floor_leaving(self, count: int) -> int:
        """The lowest row from which on there are no more than so many transitions."""
        low, high = 0, int(self.last.max(initial=0))
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.left(middle) > count else (low, middle)
        return low

    def floor_younger(self, start: int) -> int:
        """The first row of episodes that began at a time or later; beyond all rows if there is none."""
        return int(self.first[self.start >= start].min(initial=np.iinfo(np.int64).max))
