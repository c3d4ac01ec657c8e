"""The episodes of an index divided into strata, each of which is an index of its own."""

from collections.abc import Callable

import numpy as np

from replaystore.index import EpisodeIndex

Label = Callable[[EpisodeIndex, int], np.ndarray]


class Strata:
    """Divides the episodes of an index as it grows: each closed one is looked at once.

    `label(items, start)` gives the number of the stratum of every episode from number `start` on,
    -1 for none. It begins at 0 when the index is another one than before, or rows were evicted, and
    is asked about open episodes again.
    """

    def __init__(self, label: Label) -> None:
        self._label = label
        self._items: EpisodeIndex | None = None
        self._version = self._evictions = -1
        self._closed = 0
        self._parts: list[EpisodeIndex] = []

    def of(self, items: EpisodeIndex, count: int = 0) -> list[EpisodeIndex]:
        """The strata, at least `count` of them; some may be empty."""
        is_new = items is not self._items or items.evictions != self._evictions
        if is_new:
            self._closed, self._parts = 0, []
        if is_new or items.version != self._version:
            self._items = None  # after an interrupt it begins anew
            self._divide(items)
            self._items, self._version, self._evictions = items, items.version, items.evictions
        self._reach(count, items)
        return self._parts

    def _reach(self, count: int, items: EpisodeIndex) -> None:
        while len(self._parts) < count:
            self._parts.append(EpisodeIndex(items.spacing))

    def _divide(self, items: EpisodeIndex) -> None:
        start, stop = self._closed, items.num_closed
        labels = self._label(items, start)
        self._reach(int(labels.max(initial=-1)) + 1, items)
        for number, part in enumerate(self._parts):
            mine = start + np.flatnonzero(labels == number)
            part.take(items, closed=mine[mine < stop], open=mine[mine >= stop])
        self._closed = stop
