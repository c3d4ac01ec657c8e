"""A number for every item of an index, kept in a sum tree: the priorities of samplers.

Leaves belong to ids, which never change, and come in pages: page k of a stream has the leaves of its
ids k * PAGE to (k + 1) * PAGE - 1. A page is made when the first of its ids is an item, so each
stream grows for itself. Of ids that are no item of the index (an episode's last row, say) the leaf
is 0 and `_is_item` is False.
"""

import weakref
from typing import NamedTuple

import numpy as np

from replaystore.errors import UsageError
from replaystore.index import STREAM_BIT, EpisodeIndex
from replaystore.sum_tree import SumTree

PAGE_BITS = 10
PAGE = 1 << PAGE_BITS
FREE = -1  # in the place of a page's key: nothing is in it


class Taken(NamedTuple):
    """What of an index was taken in: its closed episodes, and the open one of each column."""

    version: int
    evictions: int
    closed: int
    widths: np.ndarray  # (streams,) environments
    columns: np.ndarray  # (streams,) the first column of each
    first: np.ndarray  # (columns,) the row of the open episode's first item, -1 if there is none
    counts: np.ndarray  # (columns,) its items


class Leaves:
    """Values by id, and the items of an index that have one.

    One object goes with one index. Given another, it keeps the values of items that are in both and
    forgets the others, at the cost of a pass over all items.
    """

    def __init__(self) -> None:
        self.tree = SumTree()
        self._is_item = np.zeros(self.tree.capacity, bool)
        self._keys = np.empty(0, np.int64)  # by page: its ids >> PAGE_BITS, or FREE
        self._sorted_keys = np.empty(0, np.int64)  # of the pages that are not free
        self._sorted = np.empty(0, np.int64)  # those pages
        self._floors: dict[int, int] = {}  # by stream: the row below which all was evicted
        self._index: weakref.ref[EpisodeIndex] | None = None
        self._taken: Taken | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        pages = self._keys.nbytes + self._sorted_keys.nbytes + self._sorted.nbytes
        return self.tree.nbytes + self._is_item.nbytes + pages

    def take_in(self, items: EpisodeIndex, value: float) -> None:
        """Give every item that has none yet a value; costs O(open episodes) where little is new."""
        taken = self._taken
        is_known = self._index is not None and self._index() is items
        if taken is None or not is_known or items.evictions != taken.evictions:
            self._take_all(items, value)
        elif items.version != taken.version:
            self._take_new(items, value, taken)

    def set(self, leaves: np.ndarray, values: np.ndarray | float) -> None:
        """Set the values of items; of a leaf that comes twice the last one counts."""
        self.tree.set(leaves, values)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The leaves of items by id; -1 of items that were evicted, `UsageError` if some never were."""
        leaves = self._leaves(ids)
        is_item = (leaves >= 0) & self._is_item.take(leaves, mode="clip")
        if is_item.all():
            return leaves
        leaves = np.where(is_item, leaves, -1)
        unknown = ~is_item & ~self._is_evicted(ids)
        if unknown.any():
            raise UsageError(
                f"ids: expected ids of items that there were at the last draw, got {ids[unknown][0]}"
            )
        return leaves

    def numbers(self, leaves: np.ndarray, items: EpisodeIndex) -> np.ndarray:
        """The numbers of items in the index that was last taken in."""
        ids = (self._keys.take(leaves >> PAGE_BITS) << PAGE_BITS) + (leaves & (PAGE - 1))
        numbers = items.numbers(ids)
        assert numbers.min() >= 0, ids[numbers < 0]
        return numbers

    def positive(self) -> np.ndarray:
        """The ids of the items whose value is above 0, (items,) int64."""
        leaves = np.flatnonzero(self._is_item)
        leaves = leaves[self.tree.get(leaves) > 0]
        ids: np.ndarray = (self._keys[leaves >> PAGE_BITS] << PAGE_BITS) + (leaves & (PAGE - 1))
        return ids

    def evict(self, stream: int, row: int) -> None:
        """Forget the items of a stream below a row, time * num_envs + env; whole pages are used again."""
        self._floors[stream] = max(row, self._floors.get(stream, 0))
        pages = np.flatnonzero(self._keys >> (STREAM_BIT - PAGE_BITS) == stream)
        ids = (self._keys[pages, None] << PAGE_BITS) + np.arange(PAGE)
        gone = self._is_evicted(ids)
        leaves = ((pages[:, None] << PAGE_BITS) + np.arange(PAGE))[gone]
        self._drop(leaves)
        self._keys[pages[gone.all(axis=1)]] = FREE
        self._sort_keys()

    def move(self, old: np.ndarray, new: np.ndarray) -> None:
        """Let items have other ids, one for one; what is no item stays none."""
        leaves = self._leaves(old)
        there = (leaves >= 0) & self._is_item.take(leaves, mode="clip")
        values = self.tree.get(leaves[there])
        self._drop(leaves[there])
        self._make_pages(new[there])
        self._add(self._leaves(new[there]), values)

    def state(self) -> dict[str, np.ndarray]:
        """Its pages, the values in them (NaN of what is no item), and what was evicted."""
        leaves = np.arange(len(self._keys) * PAGE)
        values = np.where(self._is_item[: len(leaves)], self.tree.get(leaves), np.nan)
        floors = np.array(sorted(self._floors.items()), np.int64).reshape(-1, 2)
        return {"pages": self._keys.copy(), "values": values, "floors": floors}

    def check(self) -> None:
        """Raise at the first broken invariant."""
        self.tree.check()
        assert len(self.tree) == len(self._keys) * PAGE, (len(self.tree), len(self._keys))
        assert len(self._is_item) == self.tree.capacity, (len(self._is_item), self.tree.capacity)
        leaves = np.flatnonzero(~self._is_item[: len(self.tree)])
        assert not self.tree.get(leaves).any(), "a value of what is no item"
        assert not self._is_item[len(self.tree) :].any(), "an item beyond the last page"
        used = self._keys[self._keys != FREE]
        assert np.array_equal(np.unique(used), self._sorted_keys), "pages out of order"
        assert np.array_equal(self._keys[self._sorted], self._sorted_keys), "pages in the wrong place"

    # ---- taking in an index

    def _take_all(self, items: EpisodeIndex, value: float) -> None:
        """Take in an index of which nothing is known."""
        self._taken = None  # after an interrupt it begins anew
        for stream in np.flatnonzero(items.floors).tolist():
            self.evict(stream, int(items.floors[stream] * items.widths[stream]))
        ids = _new_ids(items, 0, np.zeros(items.num_episodes, np.int64))
        ids = ids[~self._is_evicted(ids)]
        self._make_pages(ids)
        here = np.zeros(len(self._is_item), bool)
        here[self._leaves(ids)] = True
        self._drop(np.flatnonzero(self._is_item & ~here))
        self._add(np.flatnonzero(here & ~self._is_item), value)
        columns = np.cumsum(items.widths) - items.widths
        none = np.full(int(items.widths.sum()), -1)
        self._index = weakref.ref(items)
        self._note(items, Taken(0, 0, 0, items.widths.copy(), columns, none, none.copy()))

    def _take_new(self, items: EpisodeIndex, value: float, taken: Taken) -> None:
        """Take in what was added to an index since the last call."""
        stream, env, first, counts = items.spans(taken.closed)
        if not np.array_equal(items.widths, taken.widths):
            return self._take_all(items, value)
        column = taken.columns[stream] + env
        before = np.where(taken.first[column] == first, taken.counts[column], 0)
        if (counts < before).any():
            return self._take_all(items, value)
        self._taken = None
        ids = _new_ids(items, taken.closed, before)
        if len(ids):
            self._make_pages(ids)
            self._add(self._leaves(ids), value)
        self._note(items, taken)
        return None

    def _note(self, items: EpisodeIndex, taken: Taken) -> None:
        """Keep in mind that all of an index was taken in."""
        stream, env, first, counts = items.spans(items.num_closed)
        column = taken.columns[stream] + env
        taken.first[column] = first
        taken.counts[column] = counts
        self._taken = taken._replace(
            version=items.version, evictions=items.evictions, closed=items.num_closed
        )

    def _add(self, leaves: np.ndarray, value: float | np.ndarray) -> None:
        self.tree.set(leaves, value)
        self._is_item[leaves] = True

    def _drop(self, leaves: np.ndarray) -> None:
        self.tree.set(leaves, 0.0)
        self._is_item[leaves] = False

    # ---- pages

    def _leaves(self, ids: np.ndarray) -> np.ndarray:
        """The leaves of ids, -1 where there is no page."""
        if not len(self._sorted):
            return np.full(ids.shape, -1)
        keys = ids >> PAGE_BITS
        place = self._sorted_keys.searchsorted(keys)
        found = self._sorted_keys.take(place, mode="clip") == keys
        leaves = (self._sorted.take(place, mode="clip") << PAGE_BITS) + (ids & (PAGE - 1))
        return np.where(found, leaves, -1)

    def _make_pages(self, ids: np.ndarray) -> None:
        """Have pages for ids, free ones first; in the order of the ids, so that it can be repeated."""
        keys = ids >> PAGE_BITS
        keys = np.unique(keys[self._leaves(ids) < 0])
        if not len(keys):
            return
        places = np.flatnonzero(self._keys == FREE)[: len(keys)]
        count = len(self._keys) + len(keys) - len(places)
        self.tree.grow(count * PAGE)
        self._is_item = np.pad(self._is_item, (0, self.tree.capacity - len(self._is_item)))
        places = np.append(places, np.arange(len(self._keys), count))
        pages = np.pad(self._keys, (0, count - len(self._keys)))
        pages[places] = keys
        self._keys = pages
        self._sort_keys()

    def _sort_keys(self) -> None:
        used = np.flatnonzero(self._keys != FREE)
        used = used[self._keys[used].argsort()]
        self._sorted, self._sorted_keys = used, self._keys[used]

    def _is_evicted(self, ids: np.ndarray) -> np.ndarray:
        evicted = np.zeros(ids.shape, bool)
        for stream, row in self._floors.items():
            evicted |= (ids >= stream << STREAM_BIT) & (ids < (stream << STREAM_BIT) + row)
        return evicted


def restore_leaves(state: dict[str, np.ndarray]) -> Leaves:
    """The leaves that gave a state; `UsageError` if it is none."""
    pages, values, floors = (state[name] for name in ("pages", "values", "floors"))
    _expect("pages", pages, np.int64, (-1,))
    _expect("values", values, np.float64, (len(pages) * PAGE,))
    _expect("floors", floors, np.int64, (-1, 2))
    used = pages[pages != FREE]
    if (used < 0).any() or len(np.unique(used)) != len(used):
        raise UsageError("pages: expected each once, all from 0")
    is_item = ~np.isnan(values)
    if not (np.isfinite(values[is_item]) & (values[is_item] >= 0)).all():
        raise UsageError("values: expected finite numbers from 0, or NaN")
    if is_item.reshape(-1, PAGE)[pages == FREE].any():
        raise UsageError("values: expected no items in free pages")
    return _filled(Leaves(), pages, is_item, values, dict(floors.tolist()))


def _filled(
    leaves: Leaves, pages: np.ndarray, is_item: np.ndarray, values: np.ndarray, floors: dict[int, int]
) -> Leaves:
    leaves._keys, leaves._floors = pages.copy(), floors
    leaves._sort_keys()
    leaves.tree.grow(len(values))
    leaves._is_item = np.pad(is_item, (0, leaves.tree.capacity - len(is_item)))
    leaves.tree.set(np.arange(len(values)), np.where(is_item, values, 0.0))
    return leaves


def _expect(name: str, array: np.ndarray, dtype: type, shape: tuple[int, ...]) -> None:
    fits = isinstance(array, np.ndarray) and array.dtype == dtype and array.ndim == len(shape)
    if not fits or any(n not in (-1, found) for n, found in zip(shape, array.shape, strict=True)):
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else repr(array)
        raise UsageError(f"{name}: expected {np.dtype(dtype)} {shape}, got {found}")


def _new_ids(items: EpisodeIndex, start: int, before: np.ndarray) -> np.ndarray:
    """The ids of the items of episodes from number `start` on, but for the first ones of each."""
    stream, env, first, counts = items.spans(start)
    stride, width = items.spacing.stride, items.widths[stream]
    counts = counts - before
    starts = (stream << STREAM_BIT) + (first + before * stride) * width + env
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    ids: np.ndarray = np.repeat(starts, counts) + within * np.repeat(stride * width, counts)
    return ids
