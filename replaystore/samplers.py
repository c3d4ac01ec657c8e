"""Samplers draw items: their numbers, their probabilities and, where that matters, weights.

A sampler is given the index of the items when it draws, so it works with any window and on all of a
store or a part of it. Random numbers come from the caller's generator; what a sampler has to
remember beyond that, `state_dict` gives and `load_state_dict` takes back exactly.
"""

import abc
import secrets
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from replaystore.errors import UsageError
from replaystore.index import EpisodeIndex, Extent
from replaystore.orders import InTurn, Order, PooledOrder
from replaystore.strata import Strata

AHEAD = 8192  # numbers of an epoch made at once


class Draw(NamedTuple):
    """What was drawn: numbers (int64), the probability of each (float64), weights (float32) or None."""

    numbers: np.ndarray
    probabilities: np.ndarray
    weights: np.ndarray | None = None


class Sampler(abc.ABC):
    """Draws items of an index."""

    is_adaptive: bool = False
    """Whether later draws depend on what is reported of earlier ones, so that none should be made
    further ahead than needed."""

    pool: int = 1
    """How many items of a pass are best read at once, from one multiple of this to the next: those that
    share chunks."""

    @abc.abstractmethod
    def draw(self, items: EpisodeIndex, n: int, rng: np.random.Generator) -> Draw:
        """Draw n items of an index that has some; an epoch that ends sooner gives fewer."""

    @property
    def has_order(self) -> bool:
        """Whether a pass has an order of its own: one draw gives what several of as many items in all give."""
        return False

    def probability(self, items: EpisodeIndex, numbers: np.ndarray) -> np.ndarray:
        """The probability of each of these numbers in a draw of one item, float64.

        With passes: in a draw at the beginning of one.
        """
        raise UsageError(f"{type(self).__name__} cannot tell the probability of items that it did not draw")

    def begin(self) -> None:  # noqa: B027
        """Begin a new pass at the next draw, where there are passes."""

    def left(self, items: EpisodeIndex) -> int:
        """How many items the pass has still to draw; as many as there are, if nothing ends it."""
        return len(items)

    def state_dict(self) -> dict[str, Any]:
        """What the sampler remembers, as plain values and arrays."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` of a sampler of the same kind and arguments gave."""
        _expect_keys(self, state, self.state_dict().keys())

    def check(self) -> None:  # noqa: B027
        """Raise at the first broken invariant."""


class Uniform(Sampler):
    """Every item with the same probability.

    With `replace=False` a pass visits each item once that was there when it began, in an order that
    `seed` makes reproducible and that takes no memory; later passes have orders of their own.
    """

    def __init__(self, *, replace: bool = True, seed: int | None = None) -> None:
        if not isinstance(replace, bool):
            raise UsageError(f"replace: expected a bool, got {replace!r}")
        self._epoch = None if replace else _Epoch(check_sampler_seed(seed), Order)

    @property
    def has_order(self) -> bool:
        return self._epoch is not None and type(self).draw is Uniform.draw  # and not that of a user's own

    def draw(self, items: EpisodeIndex, n: int, rng: np.random.Generator) -> Draw:
        if self._epoch is None:
            length = float(len(items))
            numbers = rng.random(n)  # a third of the time of rng.integers
            numbers *= length
            numbers = numbers.astype(np.int64)
            probabilities = np.empty(n)
            probabilities.fill(1 / length)
            return Draw(numbers, probabilities)
        return self._epoch.draw(items, n)

    def probability(self, items: EpisodeIndex, numbers: np.ndarray) -> np.ndarray:
        return np.full(len(numbers), 1 / len(items))

    def begin(self) -> None:
        if self._epoch is not None:
            self._epoch.begin()

    def left(self, items: EpisodeIndex) -> int:
        return len(items) if self._epoch is None else self._epoch.left(items)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._epoch is None else self._epoch.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self._epoch is not None:
            self._epoch.load_state_dict(state)


class _ByEpoch(Sampler):
    """Each item once a pass; `n` draws may be fewer at the end of one."""

    _epoch: "_Epoch"

    @property
    def has_order(self) -> bool:
        return type(self).draw is _ByEpoch.draw  # and not that of a user's own

    def draw(self, items: EpisodeIndex, n: int, rng: np.random.Generator) -> Draw:
        return self._epoch.draw(items, n)

    def probability(self, items: EpisodeIndex, numbers: np.ndarray) -> np.ndarray:
        return np.full(len(numbers), 1 / len(items))

    def begin(self) -> None:
        self._epoch.begin()

    def left(self, items: EpisodeIndex) -> int:
        return self._epoch.left(items)

    def state_dict(self) -> dict[str, Any]:
        return self._epoch.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._epoch.load_state_dict(state)


class InOrder(_ByEpoch):
    """Each item once a pass, in the order of their numbers."""

    def __init__(self) -> None:
        self._epoch = _Epoch(0, InTurn)


class Shuffled(_ByEpoch):
    """Each item once a pass, in an order that decodes each chunk about once: the fast way offline.

    Runs of `run` consecutive items come in random order; as many of them as make `pool` items are
    shuffled among each other at a time. So neighbours in an episode come within `pool` draws of
    each other, and a batch has items of up to `pool / run` runs: a larger pool and shorter runs are
    closer to uniform. `dataset.loader` reads a pool at once, or 128 MiB of it, and is fast by that: in
    `store.sample` each draw decodes anew, and ranks of `torch.distributed` each decode all of a pool.
    """

    def __init__(self, *, pool: int = 2048, run: int = 32, seed: int | None = None) -> None:
        for name, value in (("pool", pool), ("run", run)):
            if type(value) is not int or value < 1:
                raise UsageError(f"{name}: expected an int from 1, got {value!r}")
        if pool % run:
            raise UsageError(f"pool: expected a multiple of run={run}, got {pool}")
        self.pool = pool
        self._epoch = _Epoch(check_sampler_seed(seed), partial(PooledOrder, pool=pool, run=run))


class Recent(Sampler):
    """The newest items of each stream more often, or only those.

    With `fraction` uniformly from the newest part of each stream. With `half_life`, in items, the
    probability halves with every so many newer items of the stream, as in emphasizing recent
    experience (Wang and Ross 2019). Streams are drawn by their lengths.
    """

    def __init__(self, *, fraction: float | None = None, half_life: float | None = None) -> None:
        if (fraction is None) == (half_life is None):
            raise UsageError(f"Recent: expected fraction or half_life, got {fraction!r} and {half_life!r}")
        if fraction is not None and not (_is_number(fraction) and 0 < fraction <= 1):
            raise UsageError(f"fraction: expected a number above 0 up to 1, got {fraction!r}")
        if half_life is not None and not (_is_number(half_life) and 0 < half_life < np.inf):
            raise UsageError(f"half_life: expected a number above 0, got {half_life!r}")
        self._fraction = fraction
        self._half_life = half_life
        self._streams = Strata(_stream_of)

    def draw(self, items: EpisodeIndex, n: int, rng: np.random.Generator) -> Draw:
        streams = self._streams.of(items)
        lengths = np.array([len(stream) for stream in streams])
        chosen = np.cumsum(lengths).searchsorted(rng.integers(lengths.sum(), size=n), side="right")
        uniform, numbers, probabilities = rng.random(n), np.empty(n, np.int64), np.empty(n)
        for at in np.unique(chosen):
            here = np.flatnonzero(chosen == at)
            ages = self._ages(int(lengths[at]), uniform[here])
            mine = lengths[at] - 1 - ages
            is_all = lengths[at] == len(items)  # and then numbered alike
            numbers[here] = mine if is_all else translate(streams[at], mine, items)
            probabilities[here] = self._chances(int(lengths[at]), ages) * lengths[at] / lengths.sum()
        return Draw(numbers, probabilities)

    def probability(self, items: EpisodeIndex, numbers: np.ndarray) -> np.ndarray:
        places = items.locate(numbers)
        ids, probabilities = items.ids(places), np.empty(len(numbers))
        streams = self._streams.of(items)
        for at in np.unique(places.stream):
            here, length = np.flatnonzero(places.stream == at), len(streams[at])
            ages = length - 1 - streams[at].numbers(ids[here])
            probabilities[here] = self._chances(length, ages) * length / len(items)
        return probabilities

    def _newest(self, length: int) -> int:
        assert self._fraction is not None
        return max(1, round(self._fraction * length))

    def _ages(self, length: int, uniform: np.ndarray) -> np.ndarray:
        """How many newer items of the stream there are, from numbers in [0, 1)."""
        if self._half_life is None:
            ages: np.ndarray = (uniform * self._newest(length)).astype(np.int64)
            return ages
        rate = np.log(2) / self._half_life
        ages = (-np.log1p(uniform * np.expm1(-rate * length)) / rate).astype(np.int64)
        ages = np.minimum(ages, length - 1)
        return ages

    def _chances(self, length: int, ages: np.ndarray) -> np.ndarray:
        """The probability of items of these ages among those of their stream."""
        if self._half_life is None:
            newest = self._newest(length)
            return np.where(ages < newest, 1 / newest, 0.0)
        rate = np.log(2) / self._half_life
        chances: np.ndarray = np.exp(-rate * ages) * np.expm1(-rate) / np.expm1(-rate * length)
        return chances


class _Epoch:
    """Passes over the items, each in an order made from the seed and the pass's number.

    Items that are evicted during a pass do not come in it any more. A pass that is restored after
    some of its items were evicted begins anew.
    """

    def __init__(
        self, seed: int, order: Callable[[int, tuple[int, ...]], Order | PooledOrder | InTurn]
    ) -> None:
        self._seed = seed
        self._make_order = order
        self._number = -1
        self._position = 0
        self._extent: Extent | None = None  # of the pass, None before and after it
        self._frozen: EpisodeIndex | None = None
        self._ahead = (0, np.empty(0, np.int64))  # a position, and the numbers from there

    def begin(self) -> None:
        self._extent = self._frozen = None

    def left(self, items: EpisodeIndex) -> int:
        self._take_up(items)
        assert self._frozen is not None
        return len(self._frozen) - self._position

    def draw(self, items: EpisodeIndex, n: int) -> Draw:
        while True:
            left, frozen = self.left(items), self._frozen
            assert frozen is not None
            stop = self._position + min(int(n), left)
            numbers = self._numbers(self._position, stop)
            self._position = stop
            if stop == len(frozen):
                self.begin()
            if items.version != self._same:
                numbers = translate(frozen, numbers, items)
            if len(numbers):
                return Draw(numbers, np.full(len(numbers), 1 / len(frozen)))

    def _take_up(self, items: EpisodeIndex) -> None:
        """Begin a pass over these items, or go on with one that was restored."""
        if self._frozen is not None:
            return
        if self._extent is None or not items.holds(self._extent):
            self._extent, self._number, self._position = items.extent(), self._number + 1, 0
        self._frozen = items.at(self._extent)
        self._same = items.version if self._frozen.is_like(items) else -1
        self._order = self._make_order(len(self._frozen), (self._seed, self._number))
        self._ahead = (0, np.empty(0, np.int64))

    def _numbers(self, start: int, stop: int) -> np.ndarray:
        """The numbers at positions, made some thousand at once."""
        first, numbers = self._ahead
        if not first <= start <= stop <= first + len(numbers):
            numbers = self._order.take(start, min(max(stop, start + AHEAD), self._order.length))
            self._ahead = first, numbers = start, numbers
        return numbers[start - first : stop - first]

    def state_dict(self) -> dict[str, Any]:
        extent = None if self._extent is None else self._extent._asdict()
        return {"seed": self._seed, "epoch": self._number, "position": self._position, "extent": extent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seed, self._number, self._position = state["seed"], state["epoch"], state["position"]
        self._extent = None if state["extent"] is None else Extent(**state["extent"])
        self._frozen = None


def translate(part: EpisodeIndex, numbers: np.ndarray, items: EpisodeIndex) -> np.ndarray:
    """The numbers that items of one index have in another that holds them too.

    Items that the other one has evicted since are left out.
    """
    found = items.numbers(part.ids(part.locate(numbers)))
    if items.evictions != part.evictions:
        return found[found >= 0]
    if gone := np.count_nonzero(found < 0):
        raise UsageError(f"expected items of the same store as before, found {gone} of {len(found)} gone")
    return found


def check_sampler_seed(seed: int | None) -> int:
    """The seed, or a new one."""
    if seed is None:
        return secrets.randbits(63)
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise UsageError(f"seed: expected None or an int from 0 to 2^63 - 1, got {seed!r}")
    return seed


def _stream_of(items: EpisodeIndex, start: int) -> np.ndarray:
    return items.episodes(start)[0]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _expect_keys(sampler: Sampler, state: Any, keys: Iterable[str]) -> None:
    if not isinstance(state, dict) or state.keys() != set(keys):
        found = sorted(state) if isinstance(state, dict) else state
        raise UsageError(f"{type(sampler).__name__}: expected a state of {sorted(keys)}, got {found}")
