"""The way from a number to its rows: the index in memory.

Items are numbered over all episodes in the order in which they were indexed. What an item is, its
window says by a `Spacing`; with the plain one each transition is an item. An episode of L
transitions takes the rows `first` to `first + L` of one environment's column.

A transition's id, stream * 2^40 + time * num_envs + env, names it for good: numbers change when
episodes are closed or evicted, ids never do.

Of a stream whose rows below some `floor` were evicted, transitions from the floor on are there. An
episode that began before it is cut: its items are those that it had from the floor on, and `CONTEXT`
rows before are kept, so that a stack of frames does not end at the floor.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from replaystore.compiled import finding
from replaystore.errors import CorruptionError, UsageError

FEW = 100  # numbers that are found faster one by one
STREAM_BIT = 40  # of an id
WHOLE = 1 << 40  # a stride that no episode is longer than
CONTEXT = 64  # rows below a floor that are kept, for stacks of frames

_versions = itertools.count(1)


class Places(NamedTuple):
    """Where items are; int64 arrays of one shape. The episode takes rows first to last.

    `first` is the first row that can be read, if the episode's beginning was evicted. `terminated`
    and `truncated` are the rows whose actions ended it so, -1 where none did, and None if the fields
    of that name are to be read instead.
    """

    stream: np.ndarray
    env: np.ndarray
    time: np.ndarray
    first: np.ndarray
    last: np.ndarray
    terminated: np.ndarray | None = None
    truncated: np.ndarray | None = None


class Run(NamedTuple):
    """Times that follow each other: `length` of them from each of `first`, (batch,) int64, on."""

    first: np.ndarray
    length: int

    @property
    def times(self) -> np.ndarray:
        """Each of them, (batch, length)."""
        # numpy adds along the longer side
        turned: np.ndarray = np.arange(self.length)[:, None] + self.first
        return turned.T


Wanted: TypeAlias = Sequence[tuple[np.ndarray | Run, Sequence[str]]]
"""What to read at places: times, (batch, …) int64 or runs of them, and the names of the fields to read there."""


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

    `closed` has the streams and how many of their episodes are closed, evicted ones included:
    [stream, count]. `open` has the other episodes: [stream, env, first, last]. `floors` has the
    streams of which rows were evicted: [stream, floor].
    """

    closed: list[list[int]]
    open: list[list[int]]
    floors: list[list[int]] = []  # noqa: RUF012  # of those that were kept before there were any


class _Buckets(NamedTuple):
    """Of every 2^bits-th item its episode, int32, of the first `items`; `closed` episodes were there."""

    episodes: np.ndarray
    bits: int
    items: int
    closed: int


class EpisodeIndex:
    """Maps numbers to rows; closed episodes are appended and evicted, open ones replaced."""

    def __init__(self, spacing: Spacing = EACH) -> None:
        self.spacing = spacing
        self.widths = np.ones(0, np.int64)  # environments by stream
        self.floors = np.zeros(0, np.int64)  # by stream: the row below which all was evicted
        self.evictions = 0  # how often rows were evicted: what is known of closed episodes is void then
        self._totals: dict[int, int] = {}  # by stream: episodes closed so far, evicted ones included
        # stream, env, first, last, rows that terminated and truncated it, shift, items up to and with it:
        # an episode's columns lie side by side, in one line of the processor's caches
        self._table = _empty_table(64)
        self._numbers = np.empty(64, np.int64)  # of closed episodes in their streams
        self.version = 0  # grows with every change; no other index that is not empty has the same
        self._closed = 0
        self._count = 0
        self._buckets = _Buckets(np.empty(0, np.int32), 0, 0, 0)
        self._sorted_keys = np.empty(0, np.int64)  # of the first closed episodes, in order
        self._sorted = np.empty(0, np.int64)  # those episodes
        self._columns = np.zeros(0, np.int64)  # by stream: columns of the streams known before
        self._followed = -1  # the version of the index that this one follows

    def __len__(self) -> int:
        """The number of items."""
        return int(self._table[7, self._count - 1]) if self._count else 0

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
            self.floors = np.append(self.floors, np.zeros(stream + 1 - len(self.floors), np.int64))
        if self.widths[stream] != num_envs:
            self.widths[stream] = num_envs
            self._sorted_keys = self._sorted = np.empty(0, np.int64)
        self._columns = np.cumsum(self.widths) - self.widths

    def append(
        self,
        stream: int | np.ndarray,
        env: np.ndarray,
        first: np.ndarray,
        length: np.ndarray,
        terminated: np.ndarray | bool = False,
        truncated: np.ndarray | bool = False,
        *,
        before: Mapping[int, int] | None = None,
    ) -> None:
        """Add closed episodes; those that are open have to be set again.

        `before` says how many of a stream were closed before these, if some were evicted unseen.
        """
        totals = self._totals | dict(before or {})
        numbers, totals = _count_on(totals, np.broadcast_to(stream, env.shape))
        self._count = self._closed
        last = first + length
        ends = [np.where(ended, last - 1, -1) for ended in (terminated, truncated)]
        self._add(stream, env, first, last, *ends, number=numbers)
        self._closed = self._count
        self._totals = totals

    def set_open(
        self, episodes: Sequence[tuple[int | np.ndarray, np.ndarray, np.ndarray, np.ndarray]]
    ) -> None:
        """Replace the open episodes: stream, env, first and length so far."""
        self._count = self._closed
        self.version = next(_versions)
        for stream, env, first, length in episodes:
            self._add(stream, env, first, first + length)

    def evict(self, stream: int, floor: int) -> None:
        """Forget a stream's transitions below a row; open episodes have to be set again."""
        if floor > self.floors[stream]:
            rest = self._beginning(self.floors.copy(), self.evictions + 1)
            rest.floors[stream] = floor
            rest.take(self, closed=slice(0, self._closed), open=slice(0, 0))
            self.__dict__.update(rest.__dict__)  # at once, should an interrupt come

    def emptied(self) -> "EpisodeIndex":
        """An index of its own without episodes, of the same streams and floors."""
        index = self._beginning(self.floors, self.evictions)
        index.widths, index._columns = self.widths, self._columns
        return index

    def first_rows(self, stream: np.ndarray, env: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Where the episodes of rows began, be it below a floor; -1 where there is none any more."""
        episode = self._episode_at(self._key(stream, env, time), time)
        first: np.ndarray = np.where(episode < 0, -1, self._table[2][np.maximum(episode, 0)])
        return first

    def _beginning(self, floors: np.ndarray, evictions: int) -> "EpisodeIndex":
        """An empty index of the same items, with these floors."""
        index = EpisodeIndex(self.spacing)
        index.floors, index.evictions = floors, evictions
        return index

    def follow(self, other: "EpisodeIndex") -> None:
        """Take in the episodes of an index that this one followed before, or any if it is empty."""
        if self._followed == other.version:
            return
        self._followed = -1  # after an interrupt
        if self.evictions != other.evictions:
            self.__dict__.update(self._beginning(other.floors, other.evictions).__dict__)
        assert self._closed <= other._closed, (self._closed, other._closed)
        new = slice(self._closed, other._closed)
        self.take(other, closed=new, open=slice(other._closed, other._count))
        self._followed = other.version

    def take(self, other: "EpisodeIndex", *, closed: slice | np.ndarray, open: slice | np.ndarray) -> None:
        """Add closed episodes of another index by their numbers, and replace the open ones.

        What the other one has evicted has to be evicted here too.
        """
        if not np.array_equal(self.widths, other.widths[: len(self.widths)]):
            self._sorted_keys = self._sorted = np.empty(0, np.int64)
        self.widths, self._columns = other.widths, other._columns
        assert not self._count or self.evictions == other.evictions, (self.evictions, other.evictions)
        self.floors = np.maximum(other.floors, np.pad(self.floors, (0, len(other.floors) - len(self.floors))))
        self.evictions = max(self.evictions, other.evictions)
        self._totals = other._totals
        self._count = self._closed
        self._add(*other._table[:6, closed], number=other._numbers[closed])
        self._closed = self._count
        self._add(*other._table[:6, open])

    def _add(
        self,
        stream: int | np.ndarray,
        env: np.ndarray,
        first: np.ndarray,
        last: np.ndarray,
        terminated: np.ndarray | int = -1,
        truncated: np.ndarray | int = -1,
        *,
        number: np.ndarray | int = -1,
    ) -> None:
        """Add episodes, but for those that were evicted; `number` is that of a closed one in its stream."""
        self.version = next(_versions)
        columns = (stream, env, first, last, terminated, truncated, number)
        values = np.array(np.broadcast_arrays(*columns), np.int64)
        if self._is_cut:
            values = values[:, values[3] > self.floors[values[0]]]
        start, stop = self._count, self._count + values.shape[1]
        if stop > self._table.shape[1]:
            self._grow(max(stop, 2 * self._table.shape[1]))
        begin, counts = self._items(values)
        ends = len(self) + np.cumsum(counts)
        self._table[:6, start:stop] = values[:6]
        self._table[6, start:stop] = begin - (ends - counts) * self.spacing.stride
        self._table[7, start:stop] = ends
        self._numbers[start:stop] = values[6]
        self._count = stop

    def _grow(self, size: int) -> None:
        """Make room for so many episodes."""
        table, numbers = _empty_table(size), np.empty(size, np.int64)
        table[:, : self._count] = self._table[:, : self._count]
        numbers[: self._count] = self._numbers[: self._count]
        self._numbers = numbers
        self._table = table  # the last, as it tells how much room there is

    @property
    def _is_cut(self) -> bool:
        return self.evictions > 0

    def _items(self, episodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the first items of episodes begin, and how many they have; (≥4, episodes) of the table."""
        stream, _, first, last = episodes[:4]
        stride, _, offset = self.spacing
        if not self._is_cut:
            return first + offset, self.spacing.items(last - first)
        skipped = np.maximum(-((first + offset - self.floors[stream]) // stride), 0)
        counts = self.spacing.items(last - first) - skipped
        return first + offset + skipped * stride, np.maximum(counts, 0)

    def spans(self, start: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of the episodes from number `start` on: stream, env, the row of the first item, and how many."""
        stream, env = self._table[:2, start : self._count]
        return stream, env, *self._items(self._table[:, start : self._count])

    def locate(self, numbers: np.ndarray) -> Places:
        """Find items by number, int64; raises `IndexError` unless all are from 0 to `len(self) - 1`."""
        stream, env, first, last, terminated, truncated, time = self._described(numbers)
        if self._is_cut:
            first = np.maximum(first, self.floors[stream] - CONTEXT)
        return Places(stream, env, time, first, last, terminated, truncated)

    def _described(self, numbers: np.ndarray) -> np.ndarray:
        """The table's first columns of the episodes that items belong to, (7, items), with times for shifts."""
        if numbers.dtype != np.int64:
            numbers = numbers.astype(np.int64, casting="safe")
        stride = self.spacing.stride
        if finding is None:
            if len(numbers) and numbers.view(np.uint64).max() >= len(self):  # or below 0
                raise IndexError(f"expected numbers of {len(self)} items")
            columns = self._of(self._find(numbers))[:7]
            columns[6] += numbers if stride == 1 else numbers * stride
            return columns
        episodes, bits, _, _ = self._filled_buckets()
        columns = np.empty((7, len(numbers)), np.int64)
        finding.locate(numbers, self._table.T, self._count, episodes, bits, stride, columns)
        return columns

    def _of(self, episodes: np.ndarray) -> np.ndarray:
        """The table's columns of some episodes, (8, episodes)."""
        return self._table.T.take(episodes, axis=0).T

    def ids(self, places: Places) -> np.ndarray:
        """Names for transitions that never change."""
        if len(self.widths) == 1 and self.widths[0] == 1:
            return places.time.copy()  # and not all that was located with it
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
        _, _, first, last, _, _, shift, _ = self._of(np.maximum(episode, 0))
        stride, span, offset = self.spacing
        number, rest = np.divmod(time - shift, stride)
        is_item = known & (episode >= 0) & (rest == 0) & (time >= first + offset) & (time + span <= last)
        if self._is_cut:
            is_item &= time >= self.floors[stream]
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
                last = self._table[3][episode]
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
        The bucket of a number, no longer than episodes are on the average, gives an episode at or before
        its own, mostly at most two before.
        """
        ends = self._table[7, : self._count]
        if len(numbers) < FEW or not self._closed:
            return ends.searchsorted(numbers, side="right")
        episodes, bits, _, _ = self._filled_buckets()
        episode = episodes.take(numbers >> bits, mode="clip")
        for _ in range(2):
            episode += ends[episode] <= numbers
        late = np.flatnonzero(ends[episode] <= numbers)
        episode[late] = ends.searchsorted(numbers[late], side="right")
        return episode

    def _filled_buckets(self) -> _Buckets:
        """The buckets, filled anew once an eighth more items are there."""
        known = self._buckets
        if known.closed == self._closed:
            return known
        ends = self._table[7, : self._closed]
        episodes, bits, items, _ = known
        if not len(episodes) or ends[-1] * 8 > items * 9:
            items = int(ends[-1])
            bits = max(0, int(items // len(ends)).bit_length() - 1)
            begins = np.arange(0, max(1, items), 1 << bits)
            episodes = ends.searchsorted(begins, side="right").astype(np.int32)  # half the places in caches
        self._buckets = _Buckets(episodes, bits, items, self._closed)  # at once, should an interrupt come
        return self._buckets

    def episodes(self, start: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Stream, env, first and last row of the episodes from number `start` on.

        Of one whose beginning was evicted, `first` is the row of its first transition that is there.
        """
        stream, env, first, last = self._table[:4, start : self._count]
        return stream, env, np.maximum(first, self.floors[stream]) if self._is_cut else first, last

    def extent(self) -> Extent:
        """Which episodes there are."""
        closed = [[stream, count] for stream, count in sorted(self._totals.items()) if count]
        opened = self._table[:4, self._closed : self._count].T.tolist()
        return Extent(closed, opened, self._cuts())

    def _cuts(self) -> list[list[int]]:
        return [[stream, floor] for stream, floor in enumerate(self.floors.tolist()) if floor]

    def holds(self, extent: Extent) -> bool:
        """Whether nothing of an extent was evicted since."""
        return self._cuts() == [list(cut) for cut in extent.floors]

    def at(self, extent: Extent) -> "EpisodeIndex":
        """An index of its own over the episodes of an extent, stream by stream, the open ones last.

        Those that were evicted since are not in it.
        """
        totals = {stream: count for stream, count in extent.closed}  # noqa: C416  # mypy wants pairs
        index = self._beginning(self.floors, self.evictions)
        index.widths, index._columns, index._totals = self.widths, self._columns, totals
        for stream, count in sorted(extent.closed):
            if self._totals.get(stream, 0) < count:
                found = self._totals.get(stream, 0)
                raise UsageError(f"expected {count} closed episodes in stream {stream}, found {found}")
            numbers = self._numbers[: self._closed]
            chosen = np.flatnonzero((self._table[0, : self._closed] == stream) & (numbers < count))
            index._add(*self._table[:6, chosen], number=numbers[chosen])
        index._closed = index._count
        index._add(*np.array(extent.open, np.int64).reshape(-1, 4).T)
        return index

    def is_like(self, other: "EpisodeIndex") -> bool:
        """Whether the same items have the same numbers in both."""
        alike = np.array_equal(self._table[:4, : self._count], other._table[:4, : other._count])
        return alike and self._cuts() == other._cuts()

    def check(self) -> None:
        """Raise at the first broken invariant; `CorruptionError` if episodes of a column overlap."""
        stream, env, first, last, terminated, truncated, shift, ends = self._table[:, : self._count]
        begin, counts = self._items(self._table[:, : self._count])
        assert (last > first).all(), "an episode without transitions"
        for end in (terminated, truncated):
            assert ((end == -1) | (end == last - 1)).all(), "an episode that ends before its last transition"
        assert (np.diff(ends, prepend=0) == counts).all(), "lengths and their sums differ"
        assert (begin - (ends - counts) * self.spacing.stride == shift).all(), "shifts"
        assert not self._is_cut or (last > self.floors[stream]).all(), "an episode that was evicted"
        order = np.lexsort((first, env, stream))
        same = (np.diff(stream[order]) == 0) & (np.diff(env[order]) == 0)
        overlap = same & (first[order][1:] <= last[order][:-1])
        if overlap.any():  # files may say so, whoever made them
            at = order[1:][overlap][0]
            where = f"row {first[at]} of environment {env[at]}, stream {stream[at]}"
            raise CorruptionError(f"the index: expected episodes apart, found two with {where}")


def _empty_table(size: int) -> np.ndarray:
    """Room for the 8 columns of so many episodes, each episode in one line of the processor's caches."""
    room = np.empty(8 * size + 7, np.int64)
    start = -(room.ctypes.data // 8) % 8
    return room[start : start + 8 * size].reshape(size, 8).T


def _count_on(totals: dict[int, int], stream: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
    """The numbers of episodes in their streams, and the totals with them."""
    numbers = np.empty(len(stream), np.int64)
    totals = dict(totals)
    for each in np.unique(stream).tolist():
        here = np.flatnonzero(stream == each)
        start = totals.get(each, 0)
        numbers[here] = start + np.arange(len(here))
        totals[each] = start + len(here)
    return numbers, totals
