"""What can be sampled: all episodes of a store, or those that `where` chose."""

from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import acero

from replaystore.episodes import integers
from replaystore.errors import SnapshotExpired, UsageError
from replaystore.index import EACH, EpisodeIndex, Places, Spacing
from replaystore.recycler import Allocate
from replaystore.samplers import Sampler, Uniform
from replaystore.schema import FLAGS
from replaystore.stats import Stats, field_stats
from replaystore.view import View
from replaystore.windows import Transition, Window, new_seeds, takes_seeds

_PLAIN = Transition()
_UNIFORM = Uniform()


class Selection:
    """Episodes to sample from; one commit, but for the process that writes them.

    One object may be used by several threads; their calls are serialised.
    """

    def __init__(self, view: View) -> None:
        self._view = view

    @property
    def schema(self) -> Any:
        """The fields of a row and the columns of an episode."""
        return self._view.schema

    def __len__(self) -> int:
        """Transitions; in the process that writes, also those not yet committed."""
        return self.count(_PLAIN)

    def count(self, window: Window) -> int:
        """Items of a window."""
        with self._view.lock:
            return len(self._index(window.spacing))

    def items(self, window: Window) -> EpisodeIndex:
        """The index of a window's items, for samplers; it changes when the store does."""
        with self._view.lock:
            return self._index(window.spacing)

    @property
    def num_episodes(self) -> int:
        """Episodes of at least one transition, open ones included."""
        with self._view.lock:
            return self._index(EACH).num_episodes

    @property
    def episodes(self) -> pa.Table:
        """One row per episode, those of sealed index parts memory-mapped; see the README.

        `stream` and the columns of the index. Episodes that are open stand behind the others of
        their stream, with the length they have.
        """
        with self._view.lock:
            return self._episodes()

    def episode(self, number: int) -> dict[str, Any]:
        """The arrays of one episode: L+1 observations, L of the rest; nested as the spaces are."""
        with self._view.lock:
            table = self._episodes()
            if not isinstance(number, (int, np.integer)) or not -len(table) <= number < len(table):
                raise UsageError(f"episode: expected a number below {len(table)}, got {number!r}")
            row = table.slice(int(number) % len(table), 1)
            stream, env, first, length = (
                integers(row, name) for name in ("stream", "env", "first_row", "length")
            )
            places = Places(stream, env, first, first, first + length)
            rows = first[:, None] + np.arange(length[0] + 1)
            schema = self._view.schema
            wanted = [(rows, schema.observed), (rows[:, :-1], schema.acted)]
            flat = {name: array[0] for name, array in self._view.arrays(places, wanted).items()}
            return {top: schema.nest(top, flat) for top in schema.tops}

    def sample(
        self,
        n: int,
        window: Window | None = None,
        rng: np.random.Generator | None = None,
        *,
        sampler: Sampler | None = None,
    ) -> Any:
        """Draw n items, uniformly and with replacement if no sampler says otherwise."""
        if not isinstance(n, (int, np.integer)) or isinstance(n, bool) or n < 1:
            raise UsageError(f"sample: expected a batch size from 1, got {n!r}")
        if rng is not None and not isinstance(rng, np.random.Generator):
            raise UsageError(f"rng: expected a numpy.random.Generator, got {rng!r}")
        window, sampler = check_window(window), check_sampler(sampler)
        with self._view.lock:
            rng = self._view.rng if rng is None else rng
            try:
                return self._sample(int(n), window, rng, sampler)
            except SnapshotExpired:
                self._renew()
            return self._sample(int(n), window, rng, sampler)

    def _sample(self, n: int, window: Window, rng: np.random.Generator, sampler: Sampler) -> Any:
        with self._view.commits_lock:  # all that a sampler looks at is as of one commit
            index = self._index(window.spacing)
            if not len(index):
                raise UsageError(
                    f"sample: expected at least one {item_of(window)}, {self._view.path} has none"
                )
            draw = sampler.draw(index, n, rng)
        if takes_seeds(window):
            window = window.seeded(new_seeds(len(draw.numbers), rng))
        return self._view.read(index.locate(draw.numbers), window, weights=draw.weights)

    def _renew(self) -> None:
        """Move to the newest commit: a file of the one shown was evicted before it was mapped."""
        self._view.renew()

    def read(
        self,
        numbers: np.ndarray,
        window: Window | None = None,
        *,
        weights: np.ndarray | None = None,
        allocate: Allocate | None = None,
    ) -> Any:
        """Read items by number, from 0 to `count(window) - 1`; for transitions, `len(self) - 1`.

        `weights` are handed through. `allocate(shape, dtype)` gives the arrays to read into.
        """
        numbers, window = np.asarray(numbers), check_window(window)
        with self._view.lock:
            index = self._index(window.spacing)
            if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
                raise UsageError(f"read: expected a list of integers, got {numbers.dtype} of {numbers.shape}")
            try:
                places = index.locate(numbers.astype(np.int64, copy=False))
            except IndexError as error:
                shown = f"{numbers.min()} to {numbers.max()}"
                raise UsageError(f"read: expected numbers from 0 to {len(index) - 1}, got {shown}") from error
            return self._view.read(places, window, weights=weights, allocate=allocate)

    def where(self, condition: pc.Expression) -> "Selection":
        """The episodes of which a condition on their columns holds, as they are now.

        For example `store.where(pc.field("return") > 100)`, with `pyarrow.compute` as `pc`.
        """
        if not isinstance(condition, pc.Expression):
            raise UsageError(f"where: expected a pyarrow.compute.Expression, got {condition!r}")
        with self._view.lock:
            table = self._episodes()
            return _Chosen(self._view, table, _holds(table, condition), self._open_rows(table))

    def stats(self, name: str, *, progress: bool = False) -> Stats:
        """Mean, deviation, extremes and quantiles of a field, for each element of its rows.

        One pass over all rows in bounded memory; of a whole store the result is kept with the
        commit, so that it is there at once the next time.
        """
        with self._view.lock:
            index = self._index(EACH)
        return field_stats(self._view, index, name, progress=progress)

    def _open_rows(self, table: pa.Table) -> np.ndarray:
        """Which rows of the table are of open episodes: the last ones of their streams."""
        index = self._index(EACH)
        streams, counts = np.unique(index.episodes(index.num_closed)[0], return_counts=True)
        ends = integers(table, "stream").searchsorted(streams, side="right")
        rows = [np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)]
        return np.concatenate([np.empty(0, np.int64), *rows])

    def _episodes(self) -> pa.Table:
        return self._view.episodes()

    def _index(self, spacing: Spacing) -> EpisodeIndex:
        return self._view.index(spacing)


class _Chosen(Selection):
    """Some episodes of a table, as they were then, but for those that are gone when they are first used.

    `holds` says which of its rows are chosen, `open_rows` which are of open episodes. The rows are
    gathered when they are asked for.
    """

    def __init__(self, view: View, table: pa.Table, holds: pa.ChunkedArray, open_rows: np.ndarray) -> None:
        super().__init__(view)
        self._from = table
        self._holds = holds
        self._open_in = open_rows
        self._indices: dict[Spacing, EpisodeIndex] = {}

    @cached_property
    def _table(self) -> pa.Table:
        return self._from.filter(self._holds).filter(self._is_left)

    def _episodes(self) -> pa.Table:
        self._index(EACH)  # finds out which are left
        return self._table

    def _index(self, spacing: Spacing) -> EpisodeIndex:
        self._view.catch_up()
        if spacing not in self._indices:
            if spacing == EACH:
                index = self._filled(self._view.index())
            else:
                index = EpisodeIndex(spacing)
                index.follow(self._index(EACH))
            self._indices[spacing] = index
        return self._indices[spacing]

    def _filled(self, source: EpisodeIndex) -> EpisodeIndex:
        """The index of the chosen episodes, but for what was evicted since they were chosen."""
        table = self._from.select(["stream", "env", "first_row", "length", *FLAGS]).filter(self._holds)
        stream, env, first, length, *flags = [integers(table, name) for name in table.column_names]
        is_open = np.isin(np.flatnonzero(self._holds.to_numpy()), self._open_in)
        last, first = first + length, source.first_rows(stream, env, first)
        self._is_left = pa.array(first >= 0)
        closed, is_open = ~is_open & (first >= 0), is_open & (first >= 0)
        index = source.emptied()
        index.append(*(column[closed] for column in (stream, env, first, last - first, *flags)))
        index.set_open([(stream[is_open], env[is_open], first[is_open], last[is_open] - first[is_open])])
        return index

    def _renew(self) -> None:
        raise SnapshotExpired(f"{self._view.path}: chosen episodes were evicted: refresh() and choose again")


def evaluate(table: pa.Table, expression: pc.Expression) -> pa.ChunkedArray:
    """The values of an expression on a table of episodes, in its order, reading only what it names."""
    source = acero.Declaration("table_source", acero.TableSourceNodeOptions(table))
    values = acero.Declaration("project", acero.ProjectNodeOptions([expression], ["value"]), [source])
    try:
        return values.to_table(use_threads=False).column("value")  # with threads, orders could differ
    except (pa.ArrowException, ValueError) as error:
        raise UsageError(f"expected an expression on {', '.join(table.column_names)}: {error}") from error


def _holds(table: pa.Table, condition: pc.Expression) -> pa.ChunkedArray:
    """Where a condition holds: some rows, or `UsageError`."""
    values = evaluate(table, condition)
    if not pa.types.is_boolean(values.type):
        raise UsageError(f"where: expected a condition, {condition} is of type {values.type}")
    holds = pc.fill_null(values, False)
    if not pc.any(holds).as_py():
        raise UsageError(f"where: expected some episodes, {condition} holds for none of {len(table)}")
    return holds


def check_window(window: Window | None) -> Window:
    """The window, or that of plain transitions if there is none."""
    if window is None:
        return _PLAIN
    if type(window) is not Transition and not _is_window(window):
        raise UsageError(f"window: expected a window such as Transition(), got {window!r}")
    return window


def _is_window(value: Any) -> bool:
    return not isinstance(value, type) and all(hasattr(value, name) for name in ("spacing", "rows", "batch"))


def check_sampler(sampler: Sampler | None) -> Sampler:
    """The sampler, or the uniform one if there is none."""
    if sampler is None:
        return _UNIFORM
    if not isinstance(sampler, Sampler):
        raise UsageError(f"sampler: expected a Sampler such as Uniform(), got {sampler!r}")
    return sampler


def item_of(window: Window) -> str:
    """What an item of a window is called."""
    return "transition" if window.spacing == EACH else f"item of {window}"
