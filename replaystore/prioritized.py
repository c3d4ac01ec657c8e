"""Samplers that keep a number for every item: its priority, or how often it may still be drawn."""

import abc
import threading
from typing import Any

import numpy as np

from replaystore.errors import UsageError
from replaystore.index import STREAM_BIT, EpisodeIndex
from replaystore.leaves import Leaves, restore_leaves
from replaystore.samplers import Draw, Sampler

MAX_PRIORITY = 1e100  # so that no sum of priorities overflows


class _ByLeaf(Sampler):
    """Draws by the values of leaves; new items get the same one each. Any thread may call."""

    def __init__(self) -> None:
        self._leaves = Leaves()
        self._lock = threading.Lock()

    @property
    @abc.abstractmethod
    def _new_value(self) -> float:
        """The value of an item that is new."""

    @abc.abstractmethod
    def _state(self) -> dict[str, Any]:
        """What the sampler remembers beyond the leaves."""

    @abc.abstractmethod
    def _load_state(self, state: dict[str, Any]) -> None:
        """Take that back; raises before anything is changed."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self._leaves.nbytes

    def probability(self, items: EpisodeIndex, numbers: np.ndarray) -> np.ndarray:
        """The probability of each of these numbers in a draw of one item, float64."""
        with self._lock:
            self._leaves.take_in(items, self._new_value)
            leaves = self._leaves.find(items.ids(items.locate(numbers)))
            chances: np.ndarray = self._leaves.tree.get(leaves) / (self._leaves.tree.total or 1.0)
            return chances

    def evict(self, stream: int, row: int) -> None:
        """Forget the items of a stream whose row, time * num_envs + env, is below this one."""
        with self._lock:
            self._leaves.evict(stream, row)

    def state_dict(self) -> dict[str, Any]:
        """What the sampler remembers; 8 bytes an id, as arrays, and a few plain values."""
        with self._lock:
            return self._state() | self._leaves.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state: the same draws follow, given the same items and random numbers.

        Items that the index has no more, as after a crash that took the last second, are forgotten
        at the next draw; those that came meanwhile are new.
        """
        super().load_state_dict(state)
        with self._lock:
            leaves = restore_leaves(state)
            self._load_state(state)
            self._leaves = leaves

    def check(self) -> None:
        """Raise at the first broken invariant."""
        with self._lock:
            self._leaves.check()


class Prioritized(_ByLeaf):
    """Draws items by their priorities: proportional prioritization (Schaul et al. 2015).

    An item of priority p is drawn with probability P = p^alpha / sum of p^alpha, where p is what was
    last reported of it plus `epsilon`, and the largest that there ever was, at first 1, if it is new.
    A draw of n takes one item from each nth of the sum (appendix B.2.1 there). `Draw.weights` are
    (N * P)^-beta divided by the largest of the draw; beta rises from `beta` to `beta_end` over
    `beta_draws` draws.

    One object goes with one index: one store or part of it, and one window. Given another, it keeps
    the priorities of the items that are in both. Under `torch.distributed` every rank has to be told
    the same priorities.
    """

    is_adaptive = True

    def __init__(
        self,
        *,
        alpha: float = 0.6,
        beta: float = 0.4,
        beta_end: float = 1.0,
        beta_draws: int = 100_000,
        epsilon: float = 1e-6,
    ) -> None:
        for name, value in (("alpha", alpha), ("beta", beta), ("beta_end", beta_end)):
            if not _is_number(value) or not 0 <= value <= 1:
                raise UsageError(f"{name}: expected a number from 0 to 1, got {value!r}")
        if type(beta_draws) is not int or beta_draws < 1:
            raise UsageError(f"beta_draws: expected an int from 1, got {beta_draws!r}")
        if not _is_number(epsilon) or not 1e-100 <= epsilon <= 1:
            raise UsageError(f"epsilon: expected a number from 1e-100 to 1, got {epsilon!r}")
        super().__init__()
        self._alpha = float(alpha)
        self._beta, self._beta_end, self._beta_draws = float(beta), float(beta_end), beta_draws
        self._epsilon = float(epsilon)
        self._draws = 0
        self._largest = 1.0

    @property
    def beta(self) -> float:
        """The exponent of the weights of the next draw."""
        part = min(1.0, self._draws / self._beta_draws)
        return self._beta + (self._beta_end - self._beta) * part

    @property
    def largest_priority(self) -> float:
        """The largest priority so far, which new items get; at first 1."""
        return self._largest

    @property
    def _new_value(self) -> float:
        return float(self._largest**self._alpha)

    def draw(self, items: EpisodeIndex, n: int, rng: np.random.Generator) -> Draw:
        with self._lock:
            self._leaves.take_in(items, self._new_value)
            tree = self._leaves.tree
            total = tree.total
            if total == 0:
                raise UsageError("Prioritized: expected items to draw, all were evicted")
            leaves = tree.find((np.arange(n) + rng.random(n)) * (total / n))
            values = tree.get(leaves)
            numbers = self._leaves.numbers(leaves, items)
            weights = (values.min() / values) ** self.beta  # N and the sum cancel
            self._draws += 1
            return Draw(numbers, values / total, weights.astype(np.float32))

    def update_priorities(self, ids: Any, priorities: Any) -> None:
        """Say how much there is to learn from transitions, for instance their absolute TD errors.

        `ids` (n,) are integers, as in `batch.ids`, `priorities` (n,) numbers from 0 to 1e100; arrays
        or tensors. Of an id that comes twice the last one counts. Transitions that were evicted since
        they were drawn are passed over. Raises `UsageError` before anything is changed.
        """
        ids, priorities = _checked_priorities(ids, priorities)
        with self._lock:
            leaves = self._leaves.find(ids)
            there = leaves >= 0
            raised = priorities[there] + self._epsilon
            self._leaves.set(leaves[there], raised**self._alpha)
            self._largest = max(self._largest, float(raised.max(initial=0)))

    def _state(self) -> dict[str, Any]:
        return {
            "alpha": self._alpha,
            "epsilon": self._epsilon,
            "draws": self._draws,
            "largest": self._largest,
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        for name, own in (("alpha", self._alpha), ("epsilon", self._epsilon)):
            if state[name] != own:
                raise UsageError(f"{name}: expected a state of a sampler with {own}, got {state[name]!r}")
        draws, largest = state["draws"], state["largest"]
        if type(draws) is not int or draws < 0:
            raise UsageError(f"draws: expected an int from 0, got {draws!r}")
        if not _is_number(largest) or not 1 <= largest <= 2 * MAX_PRIORITY:
            raise UsageError(f"largest: expected a number from 1, got {largest!r}")
        self._draws, self._largest = draws, float(largest)


class Once(_ByLeaf):
    """Draws every item a limited number of times, `draws`, and then no more; new items as they come.

    What is left of all items is drawn uniformly and without replacement: with `draws=1` no item
    comes twice. Where fewer than n are left a draw gives those, and `UsageError` is raised where none
    are. `Draw.probabilities` are the shares of what is left before the draw.
    """

    def __init__(self, *, draws: int = 1) -> None:
        if type(draws) is not int or not 1 <= draws <= 1 << 20:
            raise UsageError(f"draws: expected an int from 1 to 2^20, got {draws!r}")
        super().__init__()
        self._times = draws

    @property
    def _new_value(self) -> float:
        return float(self._times)

    def left(self, items: EpisodeIndex) -> int:
        """How many draws of one item are left."""
        with self._lock:
            self._leaves.take_in(items, self._new_value)
            return int(self._leaves.tree.total)

    def draw(self, items: EpisodeIndex, n: int, rng: np.random.Generator) -> Draw:
        with self._lock:
            self._leaves.take_in(items, self._new_value)
            tree = self._leaves.tree
            total = int(tree.total)
            if total == 0:
                times = "once" if self._times == 1 else f"{self._times} times"
                raise UsageError(f"Once: expected items to draw, every one of them was drawn {times}")
            leaves = tree.find(rng.choice(total, size=min(n, total), replace=False).astype(np.float64))
            before = tree.get(leaves)
            drawn, counts = np.unique(leaves, return_counts=True)
            numbers = self._leaves.numbers(leaves, items)
            self._leaves.set(drawn, tree.get(drawn) - counts)
            return Draw(numbers, before / total)

    def consumed(self, items: EpisodeIndex) -> dict[int, int]:
        """By stream, the row below which no item has draws left, nor will one that is still recorded.

        For `store.evict(sampler.consumed(store.items(window)))`.
        """
        with self._lock:
            self._leaves.take_in(items, self._new_value)
            ids = self._leaves.positive()
        stream, row = ids >> STREAM_BIT, ids & ((1 << STREAM_BIT) - 1)
        columns, width = np.cumsum(items.widths) - items.widths, items.widths[stream]
        rows = _ends(items, columns)
        np.minimum.at(rows, columns[stream] + row % width, row // width)
        rows = np.maximum(rows - items.spacing.offset, 0)
        streams = np.unique(items.episodes()[0])
        lowest = np.minimum.reduceat(rows, columns)
        return dict(zip(streams.tolist(), lowest[streams].tolist(), strict=True))

    def _state(self) -> dict[str, Any]:
        return {"draws": self._times}

    def _load_state(self, state: dict[str, Any]) -> None:
        if state["draws"] != self._times:
            raise UsageError(f"draws: expected a state with {self._times}, got {state['draws']!r}")
        if (state["values"] > self._times).any() or (state["values"] % 1 > 0).any():
            raise UsageError(f"values: expected whole numbers up to {self._times}")


def _ends(items: EpisodeIndex, columns: np.ndarray) -> np.ndarray:
    """By column, the row from which on items may still come, (columns,) int64; 0 where there was no episode."""
    ends = np.zeros(int(items.widths.sum()), np.int64)
    stream, env, _, last = items.episodes()
    np.maximum.at(ends, columns[stream] + env, last + 1)
    start = items.num_closed
    stream, env, begin, counts = items.spans(start)
    following = begin + counts * np.int64(items.spacing.stride)
    ends[columns[stream] + env] = np.minimum(following, items.episodes(start)[3])
    return ends


def _checked_priorities(ids: Any, priorities: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays, int64 and float64, of one length."""
    ids, priorities = np.asarray(ids), np.asarray(priorities)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UsageError(f"ids: expected a list of integers, got {ids.dtype} of {ids.shape}")
    if priorities.shape != ids.shape or priorities.dtype.kind not in "fiu":
        found = f"{priorities.dtype} of {priorities.shape}"
        raise UsageError(f"priorities: expected {len(ids)} numbers, one for each id, got {found}")
    priorities = priorities.astype(np.float64)
    wrong = ~((priorities >= 0) & (priorities <= MAX_PRIORITY))
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise UsageError(f"priorities: expected numbers from 0 to 1e100, got {priorities[at]} at {at}")
    return ids.astype(np.int64), priorities


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
