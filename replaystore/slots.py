"""Which transition of a store stands at which place of a ring that another program indexes.

A slot holds one transition of each environment, by id. The ids of an episode's transitions are
apart by the number of environments, so all are kept as runs where they are saved.
"""

from typing import Any

import numpy as np

from replaystore.index import EpisodeIndex, Places


class Slots:
    """The newest `size` transitions of each environment, in the order in which they came.

    Slot `count % size` is the next to be filled. `ids` is (size, num_envs), int64.
    """

    def __init__(self, size: int, num_envs: int) -> None:
        self.size = size
        self.num_envs = num_envs
        self.clear()

    def clear(self) -> None:
        """Hold nothing."""
        self.count = 0
        self.ids = np.zeros((self.size, self.num_envs), np.int64)

    def put(self, ids: np.ndarray, lengths: np.ndarray, count: int) -> None:
        """Add `count` transitions of each environment: runs from these ids on, by environment, in order."""
        assert lengths.sum() == count * self.num_envs, (lengths, count)
        added = expand(ids, lengths, self.num_envs).reshape(self.num_envs, count).T
        kept = min(count, self.size)
        self.count += count
        self.ids[np.arange(self.count - kept, self.count) % self.size] = added[count - kept :]

    def fill(self, env: np.ndarray, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Hold the newest of these runs, as many transitions of each environment; runs are in order."""
        totals = np.bincount(env, lengths, self.num_envs).astype(np.int64)
        kept = min(self.size, int(totals.min()))
        self.clear()
        for column in range(self.num_envs):
            mine = np.flatnonzero(env == column)
            before = lengths[mine].cumsum() - lengths[mine]  # transitions before each run
            skipped = (totals[column] - kept - before).clip(0, lengths[mine])
            starts = ids[mine] + skipped * self.num_envs
            self.ids[:kept, column] = expand(starts, lengths[mine] - skipped, self.num_envs)
        self.count = kept

    def __getstate__(self) -> dict[str, Any]:
        held = self.ids[: self.count].T.ravel()
        is_start = np.diff(held, prepend=held[:1] - 1) != self.num_envs
        is_start[:1] = True
        starts = np.flatnonzero(is_start)
        return {
            "size": self.size,
            "num_envs": self.num_envs,
            "count": self.count,
            "starts": held[starts],
            "lengths": np.diff(starts, append=len(held)),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["size"], state["num_envs"])  # type: ignore[misc]
        self.count = state["count"]
        held = expand(state["starts"], state["lengths"], self.num_envs)
        self.ids[: self.count] = held.reshape(self.num_envs, -1).T


class Added:
    """Finds the transitions that a writer of this process adds to a store, from its index.

    Made when nothing has been added yet. The writer adds to a stream in which nobody has an open
    episode then, and all others stay as they are.
    """

    def __init__(self, index: EpisodeIndex, num_envs: int) -> None:
        self._others = np.unique(index.episodes(index.num_closed)[0])
        self._stream: int | None = None
        self._number = index.num_closed  # from which on episodes may hold what is new
        self._time = np.zeros(num_envs, np.int64)  # after what was taken

    def take(self, index: EpisodeIndex, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The `count` new transitions of each environment as runs, by environment: ids and lengths."""
        runs = self._find(index, self._number)
        if runs.last.sum() - runs.time.sum() != count * len(self._time):
            runs = self._find(index, 0)  # an interrupt has had the index made anew
        self._stream, self._number = int(runs.stream[0]), index.num_closed
        np.maximum.at(self._time, runs.env, runs.last)
        return index.ids(runs), runs.last - runs.time

    def _find(self, index: EpisodeIndex, number: int) -> Places:
        stream, env, first, last = index.episodes(number)
        is_ours = ~np.isin(stream, self._others) if self._stream is None else stream == self._stream
        is_new = is_ours & (last > self._time[env])
        order = np.flatnonzero(is_new)[np.lexsort((first[is_new], env[is_new]))]
        stream, env, first, last = (part[order] for part in (stream, env, first, last))
        return Places(stream, env, np.maximum(first, self._time[env]), first, last)


def runs_of(index: EpisodeIndex) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All transitions, stream by stream in time, as runs: their environments, first ids and lengths."""
    stream, env, first, last = index.episodes()
    order = np.lexsort((first, stream))
    ids = index.ids(Places(stream, env, first, first, last))
    return env[order], ids[order], (last - first)[order]


def expand(starts: np.ndarray, lengths: np.ndarray, step: int) -> np.ndarray:
    """All members of arithmetic sequences, one after the other, int64."""
    ends = lengths.cumsum()
    shifts: np.ndarray = np.repeat(starts - (ends - lengths) * step, lengths)
    return shifts + step * np.arange(len(shifts))
