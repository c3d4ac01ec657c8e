"""The way from a number to its rows: the index in memory.

Items are numbered over all episodes in the order in which they were indexed. What an item is, its
window says by a `Spacing`; with the plain one each transition is an item. An episode of L
transitions takes the rows `first` to `first + L` of one environment's column.

A transition's id, stream * 2^40 + time * num_envs + env, names it for good: numbers change when
episodes are closed, ids never do.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from replaystore.errors import CorruptionError, UsageError

FEW = 100  # numbers that are found faster one by one
STREAM_BIT = 40  # of an id
WHOLE = 1 << 40  # a stride that no episode is longer than

_versions = itertools.count(1)


class Places(NamedTuple):
    """Where items are; int64 arrays of one shape. The episode takes rows first to last."""

    stream: np.ndarray
    env: np.ndarray
    time: np.ndarray
    first: np.ndarray
    last: np.ndarray


class Spacing(NamedTuple):
    """Which transitions of an episode begin an item.

    Those at `offset`, `offset + stride`, … of which `span` transitions are left.
    """

    stride: int = 1
    span: int = 1
    offset: int = 0

    def items(self, length: np.ndarray) -> np.ndarray:
        """How many items there are in episodes of so many transitions."""
        if self == EACH:
            return length
        items: np.ndarray = np.maximum((length - self.offset - self.span) // self.stride + 1, 0)
        return items


EACH = Spacing()


class Extent(NamedTuple):
    """Which episodes there are, to find the same ones again when more have come.

    `closed` has the streams and how many of their episodes are closed: [stream, count]. `open` has
    the other episodes: [stream, env, first, last].
    """

    closed: list[list[int]]
    open: list[list[int]]


class EpisodeIndex:
    """Maps numbers to rows; closed episodes are appended, open ones replaced."""

    def __init__(self, spacing: Spacing = EACH) -> None:
        self.spacing = spacing
        self.widths = np.ones(0, np.int64)  # environments by stream
        self._table = np.empty((5, 64), np.int64)  # stream, env, first, last, shift
        self._ends = np.empty(64, np.int64)  # items up to and with each episode
        self.version = 0  # grows with every change; no other index that is not empty has the same
        self._closed = 0
        self._count = 0
        self._buckets = np.empty(0, np.int64)
        self._bucket_bits = self._bucketed = 0  # log2 of a bucket's items; those in all of them
        self._sorted_keys = np.empty(0, np.int64)  # of the first closed episodes, in order
        self._sorted = np.empty(0, np.int64)  # those episodes
        self._columns = np.zeros(0, np.int64)  # by stream: columns of the streams known before
        self._followed = -1  # the version of the index that this one follows

    def __len__(self) -> int:
        """The number of items."""
        return int(self._ends[self._count - 1]) if self._count else 0

    @property
    def num_episodes(self) -> int:
        return self._count

    @property
    def num_closed(self) -> int:
        """Episodes that will not change any more; they come first."""
        return self._closed

    def set_width(self, stream: int, num_envs: int) -> None:
        """Say how many environments a stream has, before its first episode."""
        if stream >= len(self.widths):
            self.widths = np.append(self.widths, np.ones(stream + 1 - len(self.widths), np.int64))
        if self.widths[stream] != num_envs:
            self.widths[stream] = num_envs
            self._sorted_keys = self._sorted = np.empty(0, np.int64)
        self._columns = np.cumsum(self.widths) - self.widths

    def append(
        self, stream: int | np.ndarray, env: np.ndarray, first: np.ndarray, length: np.ndarray
    ) -> None:
        """Add closed episodes; those that are open have to be set again."""
        self._count = self._closed
        self._add(stream, env, first, first + length)
        self._closed = self._count

    def set_open(
        self, episodes: Sequence[tuple[int | np.ndarray, np.ndarray, np.ndarray, np.ndarray]]
    ) -> None:
        """Replace the open episodes: stream, env, first and length so far."""
        self._count = self._closed
        self.version = next(_versions)
        for stream, env, first, length in episodes:
            self._add(stream, env, first, first + length)

    def follow(self, other: "EpisodeIndex") -> None:
        """Take in the episodes of an index that this one followed before, or any if it is empty."""
        assert self._closed <= other._closed, (self._closed, other._closed)
        if self._followed != other.version:
            self._followed = -1  # after an interrupt
            new = slice(self._closed, other._closed)
            self.take(other, closed=new, open=slice(other._closed, other._count))
            self._followed = other.version

    def take(self, other: "EpisodeIndex", *, closed: slice | np.ndarray, open: slice | np.ndarray) -> None:
        """Add closed episodes of another index by their numbers, and replace the open ones."""
        if not np.array_equal(self.widths, other.widths[: len(self.widths)]):
            self._sorted_keys = self._sorted = np.empty(0, np.int64)
        self.widths, self._columns = other.widths, other._columns
        self._count = self._closed
        self._add(*other._table[:4, closed])
        self._closed = self._count
        self._add(*other._table[:4, open])

    def _add(self, stream: int | np.ndarray, env: np.ndarray, first: np.ndarray, last: np.ndarray) -> None:
        self.version = next(_versions)
        start, stop = self._count, self._count + len(env)
        if stop > len(self._ends):
            grow = max(stop, 2 * len(self._ends)) - len(self._ends)
            self._table = np.pad(self._table, ((0, 0), (0, grow)))
            self._ends = np.pad(self._ends, (0, grow))
        counts = self.spacing.items(last - first)
        ends = len(self) + np.cumsum(counts)
        shift = first + self.spacing.offset - (ends - counts) * self.spacing.stride
        for row, values in enumerate((stream, env, first, last, shift)):
            self._table[row, start:stop] = values
        self._ends[start:stop] = ends
        self._count = stop

    def locate(self, numbers: np.ndarray) -> Places:
        """Find items by number; all must be from 0 to `len(self) - 1`."""
        stream, env, first, last, shift = self._table.take(self._find(numbers), axis=1)
        stride = self.spacing.stride
        return Places(stream, env, (numbers if stride == 1 else numbers * stride) + shift, first, last)

    def ids(self, places: Places) -> np.ndarray:
        """Names for transitions that never change."""
        if len(self.widths) == 1 and self.widths[0] == 1:
            return places.time
        ids: np.ndarray = (
            (places.stream << STREAM_BIT) + places.time * self.widths[places.stream] + places.env
        )
        return ids

    def numbers(self, ids: np.ndarray) -> np.ndarray:
        """The numbers of the items that begin at the transitions of these ids, -1 where none does."""
        stream, row = ids >> STREAM_BIT, ids & ((1 << STREAM_BIT) - 1)
        known = (stream >= 0) & (stream < len(self.widths))
        stream = np.where(known, stream, 0)
        if not len(self.widths):
            return np.full(ids.shape, -1)
        time, env = np.divmod(row, self.widths[stream])
        episode = self._episode_at(self._key(stream, env, time), time)
        _, _, first, last, shift = self._table.take(np.maximum(episode, 0), axis=1)
        stride, span, offset = self.spacing
        number, rest = np.divmod(time - shift, stride)
        is_item = known & (episode >= 0) & (rest == 0) & (time >= first + offset) & (time + span <= last)
        return np.where(is_item, number, -1)

    def _key(self, stream: np.ndarray, env: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Orders rows by column, then time."""
        key: np.ndarray = ((self._columns[stream] + env) << STREAM_BIT) + time
        return key

    def _episode_at(self, keys: np.ndarray, times: np.ndarray) -> np.ndarray:
        """The episodes that hold rows, -1 where none does.

        Closed episodes are looked up in a sorted list that is merged anew once an eighth more are
        there; the rest of them and the open ones in a short one, sorted for each call.
        """
        if (self._closed - len(self._sorted)) * 8 > len(self._sorted) + 1024:
            self._sorted_keys, self._sorted = self._sort(0, self._closed)
        found = np.full(keys.shape, -1)
        recent = self._sort(len(self._sorted), self._count)
        for sorted_keys, episodes in ((self._sorted_keys, self._sorted), recent):
            if len(sorted_keys):
                place = sorted_keys.searchsorted(keys, side="right") - 1
                key, episode = sorted_keys.take(place, mode="clip"), episodes.take(place, mode="clip")
                last = self._table[3].take(episode)
                same = (place >= 0) & (keys >> STREAM_BIT == key >> STREAM_BIT) & (times < last)
                found = np.where(same, episode, found)
        return found

    def _sort(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        keys = self._key(*self._table[:3, start:stop])
        order = keys.argsort(kind="stable")
        return keys[order], start + order

    def _find(self, numbers: np.ndarray) -> np.ndarray:
        """The episodes that items belong to.

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
        """Note the episode of every 2^k-th item, once an eighth more of them is there."""
        ends = self._ends[: self._closed]
        if not len(self._buckets) or ends[-1] * 8 > self._bucketed * 9:
            self._bucket_bits = max(0, int(ends[-1] // len(ends) // 4).bit_length() - 1)
            starts = np.arange(0, max(1, ends[-1]), 1 << self._bucket_bits)
            self._buckets = ends.searchsorted(starts, side="right")
            self._bucketed = int(ends[-1])

    def episodes(self, start: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Stream, env, first and last row of the episodes from number `start` on."""
        stream, env, first, last = self._table[:4, start : self._count]
        return stream, env, first, last

    def extent(self) -> Extent:
        """Which episodes there are."""
        stream = self._table[0, : self._closed]
        streams, counts = np.unique(stream, return_counts=True)
        closed = np.stack([streams, counts], axis=1).tolist()
        return Extent(closed, self._table[:4, self._closed : self._count].T.tolist())

    def at(self, extent: Extent) -> "EpisodeIndex":
        """An index of its own over the episodes of an extent, stream by stream, the open ones last."""
        index = EpisodeIndex(self.spacing)
        index.widths, index._columns = self.widths, self._columns
        for number, count in sorted(extent.closed):
            found = np.flatnonzero(self._table[0, : self._closed] == number)[:count]
            if len(found) != count:
                raise UsageError(f"expected {count} closed episodes in stream {number}, found {len(found)}")
            index._add(*self._table[:4, found])
        index._closed = index._count
        index._add(*np.array(extent.open, np.int64).reshape(-1, 4).T)
        return index

    def is_like(self, other: "EpisodeIndex") -> bool:
        """Whether the same episodes have the same numbers in both."""
        return np.array_equal(self._table[:4, : self._count], other._table[:4, : other._count])

    def check(self) -> None:
        """Raise at the first broken invariant; `CorruptionError` if episodes of a column overlap."""
        stream, env, first, last, shift = self._table[:, : self._count]
        ends = self._ends[: self._count]
        counts = self.spacing.items(last - first)
        assert (last > first).all(), "an episode without transitions"
        assert (np.diff(ends, prepend=0) == counts).all(), "lengths and their sums differ"
        assert (first + self.spacing.offset - (ends - counts) * self.spacing.stride == shift).all(), "shifts"
        order = np.lexsort((first, env, stream))
        same = (np.diff(stream[order]) == 0) & (np.diff(env[order]) == 0)
        overlap = same & (first[order][1:] <= last[order][:-1])
        if overlap.any():  # files may say so, whoever made them
            at = order[1:][overlap][0]
            where = f"row {first[at]} of environment {env[at]}, stream {stream[at]}"
            raise CorruptionError(f"the index: expected episodes apart, found two with {where}")
