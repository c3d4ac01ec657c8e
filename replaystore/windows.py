"""What an item is: windows expand places into the rows to read, and shape what was read.

`Transition` is the item of DQN and its kin. With n_step = 1 the frames of `observation` and
`next_observation` are read once and both are views of one array `(batch, frame_stack + 1, …)`;
with n_step > 1 the two stacks share few frames, so each is read for itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np

from replaystore.errors import UsageError
from replaystore.index import EACH, Places, Run, Spacing, Wanted
from replaystore.schema import FLAGS, Nested, Schema

ALL = slice(None)


class Batch(NamedTuple):
    """Transitions as numpy arrays, each with the batch first.

    `reward` is the n-step return and `discount` what the value of `next_observation` is worth:
    gamma^k after k steps, 0 after termination. `terminated` and `truncated` are of the last step.
    `ids` (int64) name the transitions for good. `weights` (float32) correct for the sampler, and are 1
    but for those that draw by priority. `extra` holds the user's own fields.
    """

    observation: Nested
    action: Nested
    reward: np.ndarray
    next_observation: Nested
    terminated: np.ndarray
    truncated: np.ndarray
    discount: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    extra: dict[str, Nested]


class Times(Protocol):
    """The rows to read for a batch of some window."""

    def wanted(self, schema: Schema) -> Wanted:
        """The times at which to read the fields."""


class Items(NamedTuple):
    """The items of a batch: their ids (int64) and weights (float32), and where they are."""

    ids: np.ndarray
    weights: np.ndarray
    places: Places


class Window(Protocol):
    """What an item is: which transitions begin one, which rows it takes, and what they become."""

    @property
    def spacing(self) -> Spacing:
        """Which transitions begin an item."""

    def rows(self, places: Places) -> Any:
        """The rows that the items at these places need, as `Times`."""

    def batch(self, rows: Any, arrays: Mapping[str, np.ndarray], *, schema: Schema, items: Items) -> Any:
        """Shape what was read, `arrays` with each field at the rows asked for, into a named tuple."""


class Seeded(Window, Protocol):
    """A window of which an item is partly random."""

    def seeded(self, seeds: np.ndarray) -> Window:
        """The window of the next batch, each of whose items follows from its seed; (batch,) int64."""


def takes_seeds(window: Window) -> TypeGuard[Seeded]:
    """Whether whoever draws items for a window draws a seed for each of them as well."""
    return hasattr(window, "seeded")


def new_seeds(n: int, rng: np.random.Generator) -> np.ndarray:
    """Seeds of items, int64 from 0."""
    return rng.integers(1 << 63, size=n)


class RowTimes(NamedTuple):
    """The rows to read for a batch, as times within each item's column; int64.

    Fields that are read at the same rows share one array. `observation` is (batch, frames); `reward`
    (batch,) or (batch, n_step); `end`, the row of the last step, and `start` are (batch,). `steps`
    counts the steps until `end`, (batch,), unless that is always one. `before` marks the frames that
    would stand before the episode's first row, or is None if none can.
    """

    observation: np.ndarray | Run
    before: np.ndarray | None
    reward: np.ndarray
    start: np.ndarray
    end: np.ndarray
    steps: np.ndarray | None

    def wanted(self, schema: Schema) -> Wanted:
        """The times at which to read the fields."""
        if self.steps is None:
            return [(self.observation, schema.observed), (self.start, schema.acted)]
        first = [name for name in schema.acted if name != "reward" and name not in FLAGS]
        return [
            (self.observation, schema.observed),
            (self.start, first),
            (self.reward, ["reward"]),
            (self.end, FLAGS),
        ]


@dataclass(frozen=True)
class Transition:
    """A transition with its n-step return (Sutton and Barto 2018, eq. 7.1) and stacked frames.

    The return sums the rewards of up to `n_step` steps, fewer at the episode's end. With
    `frame_stack` > 1 observations are (batch, frame_stack, …), oldest first; before an episode's
    first row stands the field's padding, which by default repeats that row.
    """

    n_step: int = 1
    gamma: float = 0.99
    frame_stack: int = 1

    def __post_init__(self) -> None:
        for name in ("n_step", "frame_stack"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"{name}: expected an int from 1, got {value!r}")
        if (
            isinstance(self.gamma, bool)
            or not isinstance(self.gamma, (int, float))
            or not 0 <= self.gamma <= 1
        ):
            raise UsageError(f"gamma: expected a number from 0 to 1, got {self.gamma!r}")

    @property
    def spacing(self) -> Spacing:
        return EACH

    @cached_property
    def _offsets(self) -> np.ndarray:
        """Of the frames that a transition's two observations take, from its time."""
        return np.arange(1 - self.frame_stack, 2)

    @cached_property
    def _views(self) -> tuple[Any, Any]:
        """Where the two observations are among the frames that were read."""
        stack = self.frame_stack
        return (ALL, slice(0, stack) if stack > 1 else 0), (ALL, slice(-stack, None) if stack > 1 else -1)

    @cached_property
    def _worth(self) -> np.ndarray:
        """Of the next observation, if a single step did not terminate and if it did."""
        return np.array([self.gamma, 0.0])

    def rows(self, places: Places) -> RowTimes:
        """Which rows the items at these places need."""
        start = places.time
        if self.n_step == self.frame_stack == 1:
            return RowTimes(Run(start, 2), None, start, start, start, None)
        if self.n_step == 1:
            frames = (self._offsets[:, None] + start).T  # numpy adds along the longer side
            return RowTimes(*self._clamp(frames, places), start, start, start, None)
        steps = np.minimum(places.last - start, self.n_step)
        frames = self._offsets[:-1]
        both = np.concatenate([start[:, None] + frames, (start + steps)[:, None] + frames], axis=1)
        reward = np.minimum(start[:, None] + np.arange(self.n_step), places.last[:, None] - 1)
        return RowTimes(*self._clamp(both, places), reward, start, start + steps - 1, steps)

    def _clamp(self, times: np.ndarray, places: Places) -> tuple[np.ndarray, np.ndarray | None]:
        if self.frame_stack == 1:
            return times, None
        first = places.first[:, None]
        return np.maximum(times, first), times < first

    def batch(
        self, rows: RowTimes, arrays: Mapping[str, np.ndarray], *, schema: Schema, items: Items
    ) -> Batch:
        """Shape what was read: `arrays` holds each field at the rows asked for."""
        if rows.before is not None:
            _pad(rows.before, arrays, schema)
        reward, discount = self._returns(rows, arrays["reward"], arrays["terminated"])
        now, after = self._views
        return Batch(  # by place: by name takes twice as long
            schema.nest("observation", arrays, now),
            schema.nest("action", arrays),
            reward,
            schema.nest("observation", arrays, after),
            arrays["terminated"],
            arrays["truncated"],
            discount,
            items.ids,
            items.weights,
            {top: schema.nest(top, arrays) for top in schema.extra},
        )

    def _returns(
        self, rows: RowTimes, reward: np.ndarray, terminated: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        dtype = reward.dtype if reward.dtype.kind == "f" else np.dtype(np.float64)
        if rows.steps is None:
            return reward, self._worth.astype(dtype, copy=False).take(terminated)
        step = np.arange(self.n_step)
        within = (step < rows.steps[:, None]).reshape(*rows.reward.shape, *[1] * (reward.ndim - 2))
        weighted = np.where(within, reward, 0).astype(np.float64)
        total = np.einsum("bn...,n->b...", weighted, self.gamma**step)
        discount = np.where(terminated, 0.0, self.gamma**rows.steps)
        return total.astype(dtype), discount.astype(dtype)


def _pad(before: np.ndarray, arrays: Mapping[str, np.ndarray], schema: Schema) -> None:
    for name in schema.observed:
        padding = schema.by_name[name].padding_row()
        if padding is not None:
            arrays[name][before] = padding
