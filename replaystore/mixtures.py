"""Draws from several samplers, several strata of one store, or several stores, in given shares.

Of n draws each share gets its exact part, rounded up or down at random so that its expectation is
exact. The draws are then interleaved, so that also batches that are cut from a larger draw have
about their shares of each.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from replaystore.episodes import integers
from replaystore.errors import UsageError
from replaystore.index import EpisodeIndex
from replaystore.samplers import Draw, Sampler, Uniform, translate
from replaystore.schema import Schema
from replaystore.selection import Selection, check_sampler, check_window, evaluate
from replaystore.strata import Strata
from replaystore.windows import Window

STORE_BIT = 60  # of an id of `MixedStores`: above the stream's number
MAX_STORES = 8


class HasEpisodes(Protocol):
    """A store, a selection or a dataset."""

    @property
    def episodes(self) -> pa.Table:
        """The table of episodes."""


class Mixture(Sampler):
    """Draws from component samplers, each of which may come to the end of a pass and begin anew."""

    def __init__(self, samplers: Sequence[Sampler], shares: Sequence[Any]) -> None:
        self._samplers = list(samplers)
        self._shares = _normalized(type(self).__name__, shares)
        self.is_adaptive = any(sampler.is_adaptive for sampler in samplers)
        self.pool = max(
            1 if sampler.pool == 1 else round(sampler.pool / share)
            for sampler, share in zip(samplers, self._shares, strict=True)
        )
        if len({id(sampler) for sampler in samplers}) < len(samplers):
            raise UsageError(
                f"{type(self).__name__}: expected a sampler object for each share, got one twice"
            )

    def begin(self) -> None:
        for sampler in self._samplers:
            sampler.begin()

    def state_dict(self) -> dict[str, Any]:
        return {str(number): sampler.state_dict() for number, sampler in enumerate(self._samplers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for number, sampler in enumerate(self._samplers):
            sampler.load_state_dict(state[str(number)])

    def check(self) -> None:
        for sampler in self._samplers:
            sampler.check()


class Mixed(Mixture):
    """A weighted mixture of samplers over the same items: `Mixed([(Uniform(), 1), (Recent(…), 3)])`.

    `Draw.probabilities` are those of the mixture, the sum over the samplers of share times
    probability, where a `Once` says what it has left after the draw. `Draw.weights` are those of the
    sampler that drew an item, 1 where it has none.
    """

    def __init__(self, samplers: Sequence[tuple[Sampler, float]]) -> None:
        parts = pairs("Mixed", samplers)
        super().__init__([check_sampler(sampler) for sampler, _ in parts], [share for _, share in parts])

    def draw(self, items: EpisodeIndex, n: int, rng: np.random.Generator) -> Draw:
        counts = split(n, self._shares, rng)
        draws = [
            fill(sampler, items, count, rng)
            for sampler, count in zip(self._samplers, counts, strict=True)
            if count
        ]
        joined = interleaved(draws, rng)
        return joined._replace(probabilities=self.probability(items, joined.numbers))

    def probability(self, items: EpisodeIndex, numbers: np.ndarray) -> np.ndarray:
        chances = [sampler.probability(items, numbers) for sampler in self._samplers]
        probability: np.ndarray = self._shares @ np.stack(chances)
        return probability


class Stratified(Mixture):
    """Given shares of the draws from given kinds of episodes: `Stratified(store, {"demo": 1, None: 1})`.

    `by` is a column of the episode table, or a pyarrow expression on it; `shares` says how much of
    the draws comes from the episodes with each of its values. None stands for all other values, and
    for none; without it, other episodes are not drawn. Within a stratum draws are uniform, or by
    the sampler that `samplers` has for it.

    `source` is the store, the selection or the dataset that the sampler will draw from; new episodes
    join their strata. The value of an episode is read when it is first drawn from and again while it
    is open. A stratum that has no item is an error, or, with `stand_in`, the others take its share.
    """

    def __init__(
        self,
        source: HasEpisodes,
        shares: Mapping[Any, float],
        *,
        by: str | pc.Expression = "policy",
        samplers: Mapping[Any, Sampler] | None = None,
        stand_in: bool = False,
    ) -> None:
        samplers = {} if samplers is None else samplers
        if not isinstance(shares, Mapping) or not shares:
            raise UsageError(f"Stratified: expected a dict of value to share, got {shares!r}")
        if unknown := [value for value in samplers if value not in shares]:
            raise UsageError(f"samplers: expected values among {list(shares)}, got {unknown}")
        self._values = list(shares)
        super().__init__(
            [check_sampler(samplers.get(value, Uniform())) for value in shares], list(shares.values())
        )
        self._labels = _Labels(source, self._values, by)
        self._strata = Strata(self._labels)
        self._stand_in = stand_in
        self._labels.check()

    def draw(self, items: EpisodeIndex, n: int, rng: np.random.Generator) -> Draw:
        parts = self._strata.of(items, len(self._values))
        shares = self._shares_of(parts)
        draws = []
        for number, count in enumerate(split(n, shares, rng)):
            if count:
                draw = fill(self._samplers[number], parts[number], count, rng)
                draws.append(
                    draw._replace(
                        numbers=translate(parts[number], draw.numbers, items),
                        probabilities=shares[number] * draw.probabilities,
                    )
                )
        return interleaved(draws, rng)

    def probability(self, items: EpisodeIndex, numbers: np.ndarray) -> np.ndarray:
        parts = self._strata.of(items, len(self._values))
        ids, probability = items.ids(items.locate(numbers)), np.zeros(len(numbers))
        for share, part, sampler in zip(self._shares_of(parts), parts, self._samplers, strict=True):
            found = part.numbers(ids)
            here = np.flatnonzero(found >= 0)
            if len(here):
                probability[here] = share * sampler.probability(part, found[here])
        return probability

    def _shares_of(self, parts: list[EpisodeIndex]) -> np.ndarray:
        """The shares of the strata, as far as they have items."""
        has_items = np.array([len(part) > 0 for part in parts])
        if has_items.all():
            return self._shares
        if not self._stand_in or not has_items.any():
            missing = self._values[int(np.argmin(has_items))]
            raise UsageError(f"Stratified: expected items with {self._labels.name} {missing!r}, found none")
        return _scaled(np.where(has_items, self._shares, 0.0))


class _Labels:
    """The strata of episodes, by the values of an expression on their table.

    Within a stream the table and an index of the same selection have the episodes in one order.
    """

    def __init__(self, source: HasEpisodes, values: list[Any], by: str | pc.Expression) -> None:
        if not isinstance(by, str | pc.Expression):
            raise UsageError(f"by: expected the name of a column or an expression, got {by!r}")
        self.name = by if isinstance(by, str) else str(by)
        self._source = source
        self._values = values
        self._expression = pc.field(by) if isinstance(by, str) else by
        self._seen: dict[int, int] = {}  # closed episodes by stream

    def check(self) -> None:
        """Raise `UsageError` if the source has no such column or its values are of another type."""
        self._numbers(self._source.episodes.slice(0, 1))

    def __call__(self, items: EpisodeIndex, start: int) -> np.ndarray:
        self._seen = self._seen if start else {}
        stream, _, _, last = items.episodes(start)
        table, labels, num_closed = self._source.episodes, np.empty(len(stream), np.int64), items.num_closed
        streams = np.asarray(table.column("stream").to_numpy())
        for number in np.unique(stream).tolist():
            begin, end = streams.searchsorted([number, number + 1]).tolist()
            rows = table.slice(begin, end - begin).slice(self._seen.get(number, 0))
            here = np.flatnonzero(stream == number)
            first, length = (integers(rows, name) for name in ("first_row", "length"))
            if not np.array_equal(first + length, last[here]):  # the first may have been evicted since
                raise UsageError("Stratified: expected items of the source, got those of other episodes")
            labels[here] = self._numbers(rows)
            seen = int(np.count_nonzero(here + start < num_closed))
            self._seen[number] = self._seen.get(number, 0) + seen
        return labels

    def _numbers(self, table: pa.Table) -> np.ndarray:
        """The number of the stratum of every row, -1 for none."""
        found = evaluate(table, self._expression)
        others = self._values.index(None) if None in self._values else -1
        numbers = np.full(len(table), others, np.int64)
        for number, value in enumerate(self._values):
            if value is not None:
                same = pc.fill_null(pc.equal(found, self._scalar(value, found.type)), False)
                numbers[same.to_numpy()] = number
        return numbers

    def _scalar(self, value: Any, kind: pa.DataType) -> pa.Scalar:
        try:
            return pa.scalar(value, kind)
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise UsageError(f"shares: expected values of {self.name}, {kind}, got {value!r}") from error


class MixedStores:
    """Batches of items of several stores or selections: `MixedStores([(online, 1), (demos, 1)])`.

    All have the same schema. `ids` are told apart by their bits from 60: `ids >> 60` is the number
    of the store in the list, `ids & (1 << 60) - 1` the id that it has there.
    """

    def __init__(self, selections: Sequence[tuple[Selection, float]]) -> None:
        parts = pairs("MixedStores", selections)
        check_number("MixedStores", len(parts))
        self._selections = [_check_selection(selection) for selection, _ in parts]
        self._shares = _normalized("MixedStores", [share for _, share in parts])
        check_alike("MixedStores", [selection.schema for selection in self._selections])

    def sample(
        self,
        n: int,
        window: Window | None = None,
        rng: np.random.Generator | None = None,
        *,
        samplers: Sequence[Sampler] | None = None,
    ) -> Any:
        """Draw n items, uniformly from each store or by its sampler; those of a store are together."""
        if not isinstance(n, (int, np.integer)) or isinstance(n, bool) or n < 1:
            raise UsageError(f"sample: expected a batch size from 1, got {n!r}")
        if samplers is not None and len(samplers) != len(self._selections):
            raise UsageError(f"samplers: expected {len(self._selections)}, got {len(samplers)}")
        rng = np.random.default_rng() if rng is None else rng
        window, batches = check_window(window), []
        for number, count in enumerate(split(n, self._shares, rng)):
            sampler = None if samplers is None else samplers[number]
            left = count
            while left:
                batch = self._selections[number].sample(left, window, rng, sampler=sampler)
                left -= len(batch.ids)
                batches.append(batch._replace(ids=batch.ids | (number << STORE_BIT)))
        return type(batches[0])._make(_joined(parts) for parts in zip(*batches, strict=True))


def split(n: int, shares: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Divide n into whole numbers, each n * share rounded up or down, and that in expectation."""
    edges = np.floor(np.cumsum(n * shares) + rng.random()).astype(np.int64)
    edges[np.flatnonzero(shares)[-1] :] = n  # whatever the rounding of the sum
    counts: list[int] = np.diff(edges, prepend=0).tolist()
    return counts


def fill(sampler: Sampler, items: EpisodeIndex, n: int, rng: np.random.Generator) -> Draw:
    """Draw exactly n items, beginning a new pass where one ends."""
    draws = [sampler.draw(items, n, rng)]
    while (left := n - sum(len(draw.numbers) for draw in draws)) > 0:
        draws.append(sampler.draw(items, left, rng))
    return _concatenated(draws)


def _concatenated(draws: Sequence[Draw]) -> Draw:
    if len(draws) == 1:
        return draws[0]
    numbers, probabilities, weights = zip(*draws, strict=True)
    joined = None
    if any(each is not None for each in weights):
        ones = [np.ones(len(draw.numbers), np.float32) for draw in draws]
        joined = np.concatenate([o if w is None else w for w, o in zip(weights, ones, strict=True)])
    return Draw(np.concatenate(numbers), np.concatenate(probabilities), joined)


def interleaved(draws: Sequence[Draw], rng: np.random.Generator) -> Draw:
    """Join draws so that every stretch of the result has about its share of each."""
    if len(draws) == 1:
        return draws[0]
    lengths = [len(draw.numbers) for draw in draws]
    order = np.argsort(np.concatenate([(np.arange(n) + rng.random(n)) / n for n in lengths]))
    joined = _concatenated(draws)
    weights = None if joined.weights is None else joined.weights[order]
    return Draw(joined.numbers[order], joined.probabilities[order], weights)


def _joined(parts: Sequence[Any]) -> Any:
    """Arrays of several batches, one after the other; nested dicts and tuples as they are."""
    if isinstance(parts[0], dict):
        return {name: _joined([part[name] for part in parts]) for name in parts[0]}
    if isinstance(parts[0], tuple):
        return tuple(_joined(each) for each in zip(*parts, strict=True))
    return np.concatenate(parts)


def pairs(name: str, pairs: Any) -> list[tuple[Any, Any]]:
    if not isinstance(pairs, Sequence) or not pairs or not all(_is_pair(pair) for pair in pairs):
        raise UsageError(f"{name}: expected a list of pairs of which the second is a share, got {pairs!r}")
    return list(pairs)


def check_number(name: str, stores: int) -> None:
    """Raise `UsageError` for more stores than ids can tell apart."""
    if stores > MAX_STORES:
        raise UsageError(f"{name}: expected up to {MAX_STORES} stores, got {stores}")


def check_alike(name: str, schemas: Sequence[Schema]) -> None:
    """Raise `UsageError` unless all stores have the first one's schema."""
    for number, schema in enumerate(schemas):
        difference = schemas[0].difference(schema)
        if difference is not None:
            raise UsageError(f"{name}: store {number} has another schema than the first: {difference}")


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2


def _check_selection(selection: Any) -> Selection:
    if not isinstance(selection, Selection):
        raise UsageError(f"MixedStores: expected stores or selections of them, got {selection!r}")
    return selection


def _normalized(name: str, shares: Sequence[Any]) -> np.ndarray:
    for share in shares:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < np.inf:
            raise UsageError(f"{name}: expected shares above 0, got {share!r}")
    return _scaled(np.array(shares, np.float64))


def _scaled(shares: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = shares / shares.sum()
    return scaled
