"""Windows of many steps: `Sequence` for recurrent agents and world models, `WholeEpisode`.

Both read a run of consecutive steps of one episode. Observations are one more than steps: row i is
what step i was taken from, row i + 1 what followed. Each frame is read once; stacks are views of
the frames, and copied only where some of a batch's steps are padding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from replaystore.errors import UsageError
from replaystore.index import WHOLE, Places, Spacing, Wanted
from replaystore.schema import Nested, Schema
from replaystore.windows import Items

RETURN_TO_GO = "return_to_go"


class SequenceBatch(NamedTuple):
    """Runs of steps as numpy arrays (batch, time, …); `observation` is (batch, time + 1, …).

    `mask` says which steps are real: all others are zeros in every array, and so are observations
    next to no real step. `length` (int64) counts the real steps of each item. `is_first` marks an
    episode's first step. `ids` (int64) name for good the transition at which an item begins,
    after its burn-in, and `weights` (float32) correct for the sampler; both are (batch,). `extra`
    holds the user's own fields and, if the window has a gamma, `return_to_go`.
    """

    observation: Nested
    action: Nested
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    is_first: np.ndarray
    mask: np.ndarray
    length: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    extra: dict[str, Nested]


class RunTimes(NamedTuple):
    """The rows to read for a batch of runs, as times within each item's column; int64.

    `observation` is (batch, time + frame_stack), `step` (batch, time), and `reward` as `step` or
    longer: up to the episode's end. All are clamped to the episode. `before` marks the frames that
    would stand before its first row, `rewarded` the rewards that are real, `mask` the steps,
    `seen` (batch, time + 1) the observations, and `is_first` the episode's first step.
    """

    observation: np.ndarray
    step: np.ndarray
    reward: np.ndarray
    before: np.ndarray
    rewarded: np.ndarray
    mask: np.ndarray
    seen: np.ndarray
    is_first: np.ndarray

    def wanted(self, schema: Schema) -> Wanted:
        """The times at which to read the fields."""
        others = [name for name in schema.acted if name != "reward"]
        return [(self.observation, schema.observed), (self.reward, ["reward"]), (self.step, others)]


@dataclass(frozen=True)
class Sequence:
    """`burn_in` steps to warm a recurrent state up, then `length` steps to learn from.

    Items begin `stride` steps apart (R2D2, Kapturowski et al. 2019, has stride = length / 2). With
    `pad` they begin at an episode's steps 0, stride, 2 stride, …; burn-in before the episode and
    steps after its end are padding. Without, only items that lie wholly within an episode are
    there, burn-in included. With `frame_stack` > 1 observations are (batch, time + 1, frame_stack,
    …), padded at the episode's start as those of `Transition`.

    `gamma` adds `return_to_go`: at each step the discounted sum of the episode's rewards from there
    on, as far as it is recorded, and not only of those in the item (Chen et al. 2021, arXiv
    2106.01345). It is dear in long episodes, as the rewards are read up to their ends.
    """

    length: int
    burn_in: int = 0
    stride: int = 1
    frame_stack: int = 1
    pad: bool = True
    gamma: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("burn_in", 0), ("stride", 1), ("frame_stack", 1)):
            _check_int(name, getattr(self, name), least)
        if not isinstance(self.pad, bool):
            raise UsageError(f"pad: expected a bool, got {self.pad!r}")
        _check_gamma(self.gamma)

    @property
    def spacing(self) -> Spacing:
        return Spacing(self.stride) if self.pad else Spacing(self.stride, self.length, self.burn_in)

    def rows(self, places: Places) -> RunTimes:
        """Which rows the items at these places need."""
        return _rows(self, places, places.time - self.burn_in, self.burn_in + self.length)

    def batch(
        self, rows: RunTimes, arrays: Mapping[str, np.ndarray], *, schema: Schema, items: Items
    ) -> SequenceBatch:
        """Shape what was read: `arrays` holds each field at the rows asked for."""
        return _batch(self, rows, arrays, schema, items)


@dataclass(frozen=True)
class WholeEpisode:
    """A whole episode, or its first `max_length` steps; those of a batch are as long as the longest.

    Shorter ones end in padding. `return_to_go` (Chen et al. 2021, arXiv 2106.01345) is the
    discounted sum of the rewards from each step to the episode's end, beyond `max_length` too. Of
    an episode that is still open, the item has what is recorded so far.
    """

    max_length: int | None = None
    gamma: float | None = 1.0
    frame_stack: int = 1

    def __post_init__(self) -> None:
        if self.max_length is not None:
            _check_int("max_length", self.max_length, 1)
        _check_int("frame_stack", self.frame_stack, 1)
        _check_gamma(self.gamma)

    @property
    def spacing(self) -> Spacing:
        return Spacing(stride=WHOLE)

    def rows(self, places: Places) -> RunTimes:
        """Which rows the episodes at these places need."""
        longest = int((places.last - places.first).max(initial=0))
        steps = longest if self.max_length is None else min(longest, self.max_length)
        return _rows(self, places, places.first, steps)

    def batch(
        self, rows: RunTimes, arrays: Mapping[str, np.ndarray], *, schema: Schema, items: Items
    ) -> SequenceBatch:
        """Shape what was read: `arrays` holds each field at the rows asked for."""
        return _batch(self, rows, arrays, schema, items)


def _rows(window: Sequence | WholeEpisode, places: Places, begin: np.ndarray, steps: int) -> RunTimes:
    """The rows of runs of so many steps that begin at these times, which may be before the episode."""
    first, last, begin = places.first[:, None], places.last[:, None], begin[:, None]
    step = begin + np.arange(steps)
    frames = begin + np.arange(1 - window.frame_stack, steps + 1)
    rewards = step
    if window.gamma is not None:
        rewards = begin + np.arange(max(steps, int((last - begin).max(initial=0))))
    seen = frames[:, window.frame_stack - 1 :]
    return RunTimes(
        observation=np.clip(frames, first, last),
        step=np.clip(step, first, last - 1),
        reward=np.clip(rewards, first, last - 1),
        before=frames < first,
        rewarded=(first <= rewards) & (rewards < last),
        mask=(first <= step) & (step < last),
        seen=(first <= seen) & (seen <= last),
        is_first=step == first,
    )


def _batch(
    window: Sequence | WholeEpisode,
    rows: RunTimes,
    arrays: Mapping[str, np.ndarray],
    schema: Schema,
    items: Items,
) -> SequenceBatch:
    parts = {name: _part(window, name, rows, arrays[name], schema) for name in schema.by_name}
    extra = {top: schema.nest(top, parts) for top in schema.extra}
    if window.gamma is not None:
        if RETURN_TO_GO in extra:
            raise UsageError(f"gamma: expected no field {RETURN_TO_GO!r}, the store has one: use gamma=None")
        extra[RETURN_TO_GO] = _returns_to_go(arrays["reward"], rows, window.gamma)
    return SequenceBatch(
        observation=schema.nest("observation", parts),
        action=schema.nest("action", parts),
        reward=parts["reward"],
        terminated=parts["terminated"],
        truncated=parts["truncated"],
        is_first=rows.is_first,
        mask=rows.mask,
        length=rows.mask.sum(axis=1),
        ids=items.ids,
        weights=items.weights,
        extra=extra,
    )


def _part(
    window: Sequence | WholeEpisode, name: str, rows: RunTimes, array: np.ndarray, schema: Schema
) -> np.ndarray:
    """One field of the batch: its values at the steps, and zeros where there is none."""
    if schema.is_observation(name):
        padding = schema.by_name[name].padding_row()
        if padding is not None:
            array[rows.before] = padding
        if window.frame_stack > 1:
            return _stacked(array, window.frame_stack, rows.seen)
        return _clear(array, rows.seen)
    if name == "reward":
        _clear(array, rows.rewarded)
        return array[:, : rows.mask.shape[1]]
    return _clear(array, rows.mask)


def _clear(array: np.ndarray, kept: np.ndarray) -> np.ndarray:
    if not kept.all():
        array[~kept] = 0
    return array


def _stacked(frames: np.ndarray, length: int, seen: np.ndarray) -> np.ndarray:
    """Frames (batch, time + length, …) as stacks (batch, time + 1, length, …).

    A frame may belong to a real stack and to a padded one, so padding takes a copy.
    """
    views = np.lib.stride_tricks.sliding_window_view(frames, length, axis=1, writeable=True)
    stacks = np.moveaxis(views, -1, 2)
    return stacks if seen.all() else _clear(stacks.copy(), seen)


def _returns_to_go(reward: np.ndarray, rows: RunTimes, gamma: float) -> np.ndarray:
    """At each step the discounted sum of the rewards from there on; (batch, time, …)."""
    rewards = reward.astype(np.float64)
    steps, reach = rows.mask.shape[1], rewards.shape[1]
    total = np.einsum("bn...,n->b...", rewards[:, steps:], gamma ** np.arange(reach - steps))
    returns = np.empty_like(rewards[:, :steps])
    for step in reversed(range(steps)):
        total = rewards[:, step] + gamma * total
        returns[:, step] = total
    return _clear(returns, rows.mask).astype(reward.dtype if reward.dtype.kind == "f" else np.float64)


def _check_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name}: expected an int from {least}, got {value!r}")


def _check_gamma(gamma: Any) -> None:
    is_number = isinstance(gamma, (int, float)) and not isinstance(gamma, bool)
    if gamma is not None and not (is_number and 0 <= gamma <= 1):
        raise UsageError(f"gamma: expected None or a number from 0 to 1, got {gamma!r}")
