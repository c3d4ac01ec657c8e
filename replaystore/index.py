"""The way from a transition number to its rows: the index in memory.

Transition numbers count the transitions of all episodes in the order in which they were indexed;
an episode of L transitions takes the rows `first` to `first + L` of one environment's column.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from replaystore.errors import CorruptionError

FEW = 100  # numbers that are found faster one by one


class Places(NamedTuple):
    """Where transitions are; int64 arrays of one shape. The episode takes rows first to last."""

    stream: np.ndarray
    env: np.ndarray
    time: np.ndarray
    first: np.ndarray
    last: np.ndarray


class EpisodeIndex:
    """Maps transition numbers to rows; closed episodes are appended, open ones replaced."""

    def __init__(self) -> None:
        self._table = np.empty((5, 64), np.int64)  # stream, env, first, last, shift
        self._ends = np.empty(64, np.int64)  # transitions up to and with each episode
        self._closed = 0
        self._count = 0
        self._buckets = np.empty(0, np.int64)
        self._bucket_bits = self._bucketed = 0  # log2 of a bucket's transitions; those in all of them

    def __len__(self) -> int:
        """The number of transitions."""
        return int(self._ends[self._count - 1]) if self._count else 0

    @property
    def num_episodes(self) -> int:
        return self._count

    def append(self, stream: int, env: np.ndarray, first: np.ndarray, length: np.ndarray) -> None:
        """Add closed episodes; those that are open have to be set again."""
        self._count = self._closed
        self._add(stream, env, first, length)
        self._closed = self._count

    def set_open(self, episodes: Sequence[tuple[int, np.ndarray, np.ndarray, np.ndarray]]) -> None:
        """Replace the open episodes: stream, env, first and length so far."""
        self._count = self._closed
        for stream, env, first, length in episodes:
            self._add(stream, env, first, length)

    def _add(self, stream: int, env: np.ndarray, first: np.ndarray, length: np.ndarray) -> None:
        start, stop = self._count, self._count + len(env)
        if stop > len(self._ends):
            grow = max(stop, 2 * len(self._ends)) - len(self._ends)
            self._table = np.pad(self._table, ((0, 0), (0, grow)))
            self._ends = np.pad(self._ends, (0, grow))
        ends = len(self) + np.cumsum(length)
        last = first + length
        for row, values in enumerate((stream, env, first, last, last - ends)):
            self._table[row, start:stop] = values
        self._ends[start:stop] = ends
        self._count = stop

    def locate(self, numbers: np.ndarray) -> Places:
        """Find transitions by number; all must be from 0 to `len(self) - 1`."""
        stream, env, first, last, shift = self._table.take(self._find(numbers), axis=1)
        return Places(stream, env, numbers + shift, first, last)

    def _find(self, numbers: np.ndarray) -> np.ndarray:
        """The episodes that transitions belong to.

        For many numbers a binary search is slow, as the processor cannot foresee its branches.
        The bucket of a number gives an episode at or before its own, mostly at most two before.
        """
        ends = self._ends[: self._count]
        if len(numbers) < FEW or not self._closed:
            return ends.searchsorted(numbers, side="right")
        self._fill_buckets()
        episode = self._buckets.take(numbers >> self._bucket_bits, mode="clip")
        for _ in range(2):
            episode += ends.take(episode) <= numbers
        late = np.flatnonzero(ends.take(episode) <= numbers)
        episode[late] = ends.searchsorted(numbers[late], side="right")
        return episode

    def _fill_buckets(self) -> None:
        """Note the episode of every 2^k-th transition, once an eighth more of them is there."""
        ends = self._ends[: self._closed]
        if ends[-1] * 8 > self._bucketed * 9:
            self._bucket_bits = max(0, int(ends[-1] // len(ends) // 4).bit_length() - 1)
            starts = np.arange(0, ends[-1], 1 << self._bucket_bits)
            self._buckets = ends.searchsorted(starts, side="right")
            self._bucketed = int(ends[-1])

    def episode(self, number: int) -> Places:
        """The place of an episode's first transition, arrays of shape (1,)."""
        stream, env, first, last, _ = self._table[:, number : number + 1]
        return Places(stream, env, first, first, last)

    def check(self) -> None:
        """Raise at the first broken invariant; `CorruptionError` if episodes of a column overlap."""
        stream, env, first, last, shift = self._table[:, : self._count]
        ends = self._ends[: self._count]
        assert (last > first).all(), "an episode without transitions"
        assert (np.diff(ends, prepend=0) == last - first).all(), "lengths and their sums differ"
        assert (last - ends == shift).all(), "shifts and ends differ"
        order = np.lexsort((first, env, stream))
        same = (np.diff(stream[order]) == 0) & (np.diff(env[order]) == 0)
        overlap = same & (first[order][1:] <= last[order][:-1])
        if overlap.any():  # files may say so, whoever made them
            at = order[1:][overlap][0]
            where = f"row {first[at]} of environment {env[at]}, stream {stream[at]}"
            raise CorruptionError(f"the index: expected episodes apart, found two with {where}")
