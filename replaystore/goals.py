"""Goals in hindsight: `Relabelled` replaces goals by what was achieved later (Andrychowicz et al.
2017, arXiv 1707.01495, strategy "future").
"""

import copy
import hashlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from replaystore.errors import UsageError
from replaystore.index import Places, Run, Spacing, Wanted
from replaystore.orders import mixed
from replaystore.schema import Nested, Schema
from replaystore.windows import Batch, Items, RowTimes, Transition, new_seeds

ACHIEVED = "observation/achieved_goal"
DESIRED = "observation/desired_goal"

GoalReward = Callable[[np.ndarray, np.ndarray, Nested], np.ndarray]


class GoalTimes(NamedTuple):
    """The rows of the transitions, and which of these get another goal.

    `achieved` has the transitions' observation rows and then the row of the later goal, (batch,
    frames + 1) int64; `is_relabelled` is (batch,) bool.
    """

    transitions: RowTimes
    achieved: np.ndarray
    is_relabelled: np.ndarray

    def wanted(self, schema: Schema) -> Wanted:
        """The times at which to read the fields."""
        _check_schema(schema)
        times, others = self.transitions, [name for name in schema.observed if name != ACHIEVED]
        return [(self.achieved, [ACHIEVED]), (times.observation, others), (times.start, schema.acted)]


class Relabelled:
    """Transitions of which a share of `goals / (goals + 1)` get a goal that was achieved later.

    The store's observations are those of gymnasium's GoalEnv: a Dict with `achieved_goal` and
    `desired_goal`. The new goal, in both observations, is what was achieved at a row drawn
    uniformly from the next one to the episode's last. The reward is computed anew by
    `reward(achieved_goal, desired_goal, info)`, with GoalEnv.compute_reward's meaning, for all
    such transitions of a batch at once: goals are (batch, …), `achieved_goal` is the one that
    followed the action, and `info` holds the recorded `info/…` fields, or nothing. `terminated` and
    `discount` stay as recorded: reaching a goal that was not pursued ended nothing.

    Which transitions and which goals is drawn with the items: by the generator of `store.sample`,
    or by that of a loader, whose seed and state give the same goals again with any number of
    workers. Items that are read by number get goals that depend on `seed`, the number of batches
    read before with this object, and the places of the batch's items. For workers that are spawned,
    `reward` has to be a function at the top of a module.
    """

    def __init__(
        self, reward: GoalReward, window: Transition | None = None, *, goals: int = 4, seed: int | None = None
    ) -> None:
        self.window = Transition() if window is None else window
        if not isinstance(self.window, Transition) or self.window.n_step != 1:
            raise UsageError(f"window: expected a Transition with n_step=1, got {window!r}")
        if not callable(reward):
            raise UsageError(f"reward: expected a function like GoalEnv.compute_reward, got {reward!r}")
        if not isinstance(goals, int) or isinstance(goals, bool) or goals < 1:
            raise UsageError(f"goals: expected an int from 1, got {goals!r}")
        if seed is not None and (type(seed) is not int or seed < 0):
            raise UsageError(f"seed: expected None or an int from 0, got {seed!r}")
        self._reward = reward
        self._share = 1 - 1 / (goals + 1)
        self._seed = secrets.randbits(63) if seed is None else seed
        self._reads = 0
        self._seeds: np.ndarray | None = None  # of the items of the next batch, if they were drawn

    def __repr__(self) -> str:
        return f"Relabelled({self.window})"

    @property
    def spacing(self) -> Spacing:
        return self.window.spacing

    def rows(self, places: Places) -> GoalTimes:
        """Which rows the items at these places need, those of their goals among them."""
        seeds = self._read_seeds(places) if self._seeds is None else self._seeds
        words = mixed(seeds.astype(np.uint64))
        later = (_fractions(mixed(words)) * (places.last - places.time)).astype(np.int64)
        transitions = self.window.rows(places)
        frames = transitions.observation
        times = frames.times if isinstance(frames, Run) else frames
        achieved = np.concatenate([times, (places.time + 1 + later)[:, None]], axis=1)
        return GoalTimes(transitions, achieved, _fractions(words) < self._share)

    def seeded(self, seeds: np.ndarray) -> "Relabelled":
        """The window of the next batch, with the goal of each item as its seed says; (batch,) int64."""
        window = copy.copy(self)
        window._seeds = seeds
        return window

    def _read_seeds(self, places: Places) -> np.ndarray:
        """The seeds of items that are read by number."""
        where = np.stack([places.stream, places.env, places.time]).tobytes()
        hashed = int.from_bytes(hashlib.blake2b(where, digest_size=16).digest(), "little")
        self._reads += 1
        return new_seeds(len(places.time), np.random.default_rng([self._seed, self._reads, hashed]))

    def batch(
        self, rows: GoalTimes, arrays: Mapping[str, np.ndarray], *, schema: Schema, items: Items
    ) -> Batch:
        """Shape what was read, with the new goals and rewards."""
        goal = arrays[ACHIEVED][:, -1]
        own = {**arrays, ACHIEVED: arrays[ACHIEVED][:, :-1]}
        chosen = rows.is_relabelled
        own[DESIRED][chosen] = goal[chosen, None]
        if chosen.any():
            rewards = self._reward(own[ACHIEVED][chosen, -1], goal[chosen], _info(schema, arrays, chosen))
            own["reward"][chosen] = _checked(rewards, own["reward"][chosen])
        return self.window.batch(rows.transitions, own, schema=schema, items=items)


def _fractions(words: np.ndarray) -> np.ndarray:
    """Numbers from 0 to below 1, float64, from random words of 64 bits."""
    fractions: np.ndarray = (words >> np.uint64(11)) * 2.0**-53
    return fractions


def _check_schema(schema: Schema) -> None:
    fields = [schema.by_name.get(name) for name in (ACHIEVED, DESIRED)]
    if any(field is None for field in fields):
        have = ", ".join(schema.observed)
        raise UsageError(f"Relabelled: expected the fields {ACHIEVED} and {DESIRED}, the store has {have}")
    kinds = [(field.shape, field.dtype) for field in fields if field is not None]
    if kinds[0] != kinds[1]:
        raise UsageError(
            f"Relabelled: expected goals of one shape and dtype, found {kinds[0]} and {kinds[1]}"
        )


def _info(schema: Schema, arrays: Mapping[str, np.ndarray], chosen: np.ndarray) -> Any:
    """What was recorded of the environment's info, for some of the transitions."""
    if "info" not in schema.extra:
        return {}
    return schema.nest("info", {name: arrays[name][chosen] for name in schema.names("info")})


def _checked(rewards: Any, recorded: np.ndarray) -> np.ndarray:
    """What the user's function gave, if that can stand for the recorded rewards."""
    array = np.asarray(rewards)
    if array.shape != recorded.shape or not np.can_cast(array.dtype, recorded.dtype, "same_kind"):
        expected, found = (f"{each.dtype} of {each.shape}" for each in (recorded, array))
        raise UsageError(f"reward: expected {expected}, the function gave {found}")
    return array
