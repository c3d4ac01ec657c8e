"""Steps → rows of a stream, in memory.

Values are checked and put into a ring, episodes begin and end; what commits them is in `writer.py`.
An interrupt may come between any two lines: what a call has begun is then undone or settled by the
next one.
"""

import abc
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from replaystore.episodes import (
    Episode,
    OpenEpisode,
    check_policy,
    check_seed,
    check_seeds,
    column_value,
    episode_schema,
    episode_table,
    episodes_of,
)
from replaystore.errors import SchemaError, UsageError
from replaystore.head import Head
from replaystore.ring import MAX_ROWS, Ring
from replaystore.schema import Schema

Clock = Callable[[], float]


class Ended(NamedTuple):
    """Episodes of a stream as int64 arrays; what the index needs of them."""

    env: np.ndarray
    first: np.ndarray
    length: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


class Appender(abc.ABC):
    """Appends to one stream; its owner serialises the calls.

    `lock` guards what the calls share with whoever commits.
    """

    def __init__(self, schema: Schema, head: Head, *, clock: Clock, ring_rows: int | None) -> None:
        """Go on from a head, with room for `ring_rows` rows of an environment or those of a few chunks."""
        self.lock = threading.RLock()
        self._schema = schema
        self._clock = clock
        self._num_envs = head.num_envs
        self._lead = (self._num_envs,) if self._num_envs > 1 else ()
        self._ring = Ring(schema, self._num_envs, most=MAX_ROWS if ring_rows is None else ring_rows)
        self._prepare_columns()
        self._rows: list[int] = head.rows.tolist()
        self._open: list[OpenEpisode | None] = [None] * self._num_envs
        self._closed: list[Episode] = []  # in no commit yet
        self._log: list[tuple[int, ...]] = []  # what `Ended` needs of those not yet taken
        self._changes = 0
        self._set_room(head)
        self._resume(head)

    def _prepare_columns(self) -> None:
        """What every step needs of each field, looked up once."""
        schema, arrays = self._schema, self._ring.arrays
        self._step_names = [field.name for field in schema.fields]
        self._scalar_reward = schema.by_name["reward"].shape == ()
        self._max_lag = min(schema.shard_rows(field, self._num_envs) for field in schema.fields)
        self._plain_names = frozenset() if schema.is_nested else frozenset(self._step_names)
        self._acceptors = [(field.name, field.number_types, field.accept) for field in schema.fields]
        own = {name: array[:, 0] for name, array in arrays.items()}  # of the first environment
        self._action_columns = [(name, own[name]) for name in schema.acted]
        self._observation_columns = [(name, own[name]) for name in schema.observed]

    @abc.abstractmethod
    def _check_usable(self, *, raise_failure: bool = True) -> None:
        """Raise if nothing can be appended, or a commit that nobody waited for has failed."""

    @abc.abstractmethod
    def _commit_now(self) -> None:
        """Return when what is there is durable; the caller holds the lock."""

    @abc.abstractmethod
    def _wake_committer(self, env: int) -> None:
        """Have what is there committed soon, as an environment's rows fill half of the ring."""

    # ---- appending

    def reset(
        self,
        observation: Any,
        *,
        seed: int | Sequence[int | None] | None = None,
        mask: np.ndarray | None = None,
        policy: str | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin an episode in each environment of `mask`; an open one ends there, cut short."""
        with self.lock:
            self._check_usable()
            envs, values, described = self.check_reset(
                observation, seed=seed, mask=mask, policy=policy, columns=columns
            )
            if not envs:
                return
            for env in envs:
                self._cut(env)
                self._catch_up(env)
                self._wait_for_room(env)
            now, rows = int(self._clock() * 1e6), list(self._rows)
            self._put_observation(values, envs)
            for env, (own_seed, own_policy, own_columns) in zip(envs, described, strict=True):
                self._open[env] = OpenEpisode(rows[env], own_seed, now, own_policy, own_columns)

    def check_reset(
        self,
        observation: Any,
        *,
        seed: int | Sequence[int | None] | None = None,
        mask: np.ndarray | None = None,
        policy: str | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> tuple[list[int], dict[str, np.ndarray], list[tuple[int | None, str | None, tuple[Any, ...]]]]:
        """Raise what `reset` would of these arguments.

        Gives the environments, the fields' values, and of each environment the seed, policy and columns.
        """
        envs = self.envs(mask)
        values = self._accept_observation(observation)
        seeds = check_seeds(seed, self._num_envs)
        policy = check_policy(policy)
        given = {} if columns is None else columns
        return envs, values, [(seeds[env], policy, self._columns(given, env)) for env in envs]

    def step(self, values: Mapping[str, Any], mask: np.ndarray | None = None) -> None:
        """Append what was done from the last row, and the observation that followed."""
        with self.lock:
            self._check_usable()
            if self._num_envs == 1 and mask is None:
                self._step_one(values)
            else:
                self._step_many(values, self.envs(mask))

    def _step_one(self, values: Mapping[str, Any]) -> None:
        episode = self._open[0]
        if episode is None:
            raise UsageError("step before reset: begin an episode first")
        accepted = self._accept_step(values)
        row = self._rows[0]
        if row >= self._limit[0]:
            self._wait_for_room(0)
        mask, total = self._ring.mask, episode.reward
        try:
            slot = (row - 1) & mask
            for name, column in self._action_columns:
                column[slot] = accepted[name]
            slot = row & mask
            for name, column in self._observation_columns:
                column[slot] = accepted[name]
            self._rows[0] = row + 1
            self._changes += 1
            if self._scalar_reward:
                episode.reward = total + float(values["reward"])
            if values["terminated"] or values["truncated"]:
                self._end(0, bool(values["terminated"]), bool(values["truncated"]))
        except BaseException:
            self._undo({0: (row, total)})
            raise
        if row >= self._half[0]:
            self._wake_committer(0)

    def _step_many(self, values: Mapping[str, Any], envs: list[int]) -> None:
        closed = [env for env in envs if self._open[env] is None]
        if closed:
            raise UsageError(f"step before reset: environments {closed} have no open episode")
        accepted, lead = self._accept_steps(values), self._lead or (1,)
        if not envs:
            return
        for env in envs:
            self._wait_for_room(env)
        terminated, truncated, reward = (
            accepted[name].reshape(*lead, -1)[:, 0].tolist() for name in ("terminated", "truncated", "reward")
        )
        before = {env: (self._rows[env], self._opened(env).reward) for env in envs}
        try:
            rows = np.array(self._rows)[envs]
            for name, value in accepted.items():
                back = 0 if self._schema.is_observation(name) else 1
                self._ring.arrays[name][(rows - back) & self._ring.mask, envs] = value[envs]
            self._advance(envs)
            for env in envs:
                if self._scalar_reward:
                    self._opened(env).reward = before[env][1] + reward[env]
                if terminated[env] or truncated[env]:
                    self._end(env, terminated[env], truncated[env])
        except BaseException:
            self._undo(before)
            raise

    def check_step(self, values: Mapping[str, Any]) -> None:
        """Raise what `step` would of these values, whether or not an episode is open."""
        if self._num_envs == 1:
            self._accept_step(values)
        else:
            self._accept_steps(values)

    def _accept_step(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields' values, ready to be assigned to a row of the one environment."""
        flat = values if values.keys() == self._plain_names else self._schema.flatten(values)
        accepted = {}
        for name, kept, accept in self._acceptors:
            value = flat[name]
            accepted[name] = value if type(value) in kept else accept(value)
        return accepted

    def _accept_steps(self, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The fields' values as arrays (num_envs, *shape)."""
        flat = self._schema.flatten(values)
        return {name: self._accept(name, flat[name]) for name in self._step_names}

    def _undo(self, before: Mapping[int, tuple[int, float]]) -> None:
        """After an interrupt in the middle of a step: episodes end before it, or with it if they did.

        `before` gives each environment's rows and sum of rewards as they were.
        """
        for env, (row, total) in before.items():
            episode = self._open[env]
            if episode is not None and episode.record is None:
                self._rows[env], episode.reward = row, total
                self._end(env, False, False)

    def add_episode(
        self,
        values: Mapping[str, Any],
        *,
        env: int | None = None,
        seed: int | None,
        policy: str | None,
        columns: Mapping[str, Any],
    ) -> None:
        """Append a whole episode to a column, by default the shortest.

        Observations are (L+1, …), the rest (L, …).

        One that is longer than the ring is committed in parts; if that fails, the parts before
        stay as an incomplete episode.
        """
        with self.lock:
            self._check_usable()
            env = self.shortest if env is None else env
            if self._open[env] is not None:
                raise UsageError("add_episode while an episode is open: finish it with step or reset first")
            arrays = self._accept_episode(values)
            length = len(arrays["reward"])
            described = (check_policy(policy), self._columns(columns, env))
            seed = check_seed(seed)
            self._wait_for_room(env, min(length + 1, self._ring.capacity - self._ring.keep))
            self._open[env] = OpenEpisode(self._rows[env], seed, int(self._clock() * 1e6), *described)
            try:
                self._append_rows(env, arrays, length + 1)
                self._end_added(env, arrays)
            except BaseException:
                self._end_added(env, arrays)
                raise

    def check_episode(
        self,
        values: Mapping[str, Any],
        *,
        env: int,
        seed: int | None,
        policy: str | None,
        columns: Mapping[str, Any],
    ) -> int:
        """Raise what `add_episode` would of these arguments; returns the episode's length."""
        length = len(self._accept_episode(values)["reward"])
        check_policy(policy)
        self._columns(columns, env)
        check_seed(seed)
        return length

    def cut(self, env: int) -> None:
        """End an environment's open episode, if it has one, neither terminated nor truncated."""
        with self.lock:
            self._cut(env)

    def prepare(self, envs: Sequence[int]) -> None:
        """Raise now what a step of these environments would, but for its values; wait until there is room.

        While the caller holds `lock`, the step then raises nothing else.
        """
        with self.lock:
            self._check_usable()
            for env in envs:
                self._wait_for_room(env)

    def is_open(self, env: int) -> bool:
        """Whether an environment has an open episode."""
        with self.lock:
            self._settle(env)
            return self._open[env] is not None

    @property
    def shortest(self) -> int:
        """The environment with the fewest rows."""
        return int(np.argmin(self._rows))

    def _end_added(self, env: int, arrays: Mapping[str, np.ndarray]) -> None:
        """End an added episode as it says; cut short if an error or interrupt kept rows out."""
        self._settle(env)
        episode = self._open[env]
        if episode is None:
            return
        is_whole = self._rows[env] - episode.first_row == len(arrays["reward"]) + 1
        if is_whole and self._scalar_reward:
            episode.reward = float(arrays["reward"].astype(np.float64).sum())
        self._end(env, *(is_whole and bool(arrays[name][-1]) for name in ("terminated", "truncated")))

    def _append_rows(self, env: int, arrays: Mapping[str, np.ndarray], rows: int) -> None:
        """Append rows of one environment, in pieces that fit; zeros where an array is shorter."""
        done = 0
        while done < rows:
            self._wait_for_room(env)
            row = self._rows[env]
            count = min(rows - done, self._limit[env] - row)
            self._ring.put(
                env, row, count, {name: array[done : done + count] for name, array in arrays.items()}
            )
            done += count
            self._rows[env] = row + count
            self._changes += 1

    def _accept_episode(self, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
        flat = self._schema.flatten(values)
        try:
            length = len(flat["reward"])
        except TypeError as error:
            raise SchemaError(
                f"field 'reward': expected an array of L rewards, got {flat['reward']!r}"
            ) from error
        if length == 0:
            raise SchemaError("add_episode: expected at least one transition, got none")
        arrays = {}
        for name, field in self._schema.by_name.items():
            rows = length + 1 if self._schema.is_observation(name) else length
            arrays[name] = np.asarray(field.accept(flat[name], (rows,)))
        if (arrays["terminated"][:-1] | arrays["truncated"][:-1]).any():
            raise SchemaError("add_episode: terminated or truncated before the last transition")
        return arrays

    def _accept_observation(self, observation: Any) -> dict[str, np.ndarray]:
        flat = self._schema.flatten_top("observation", observation)
        return {name: self._accept(name, value) for name, value in flat.items()}

    def _accept(self, name: str, value: Any) -> np.ndarray:
        """A field's value as an array (num_envs, *shape)."""
        accepted = np.asarray(self._schema.by_name[name].accept(value, self._lead))
        return accepted if self._lead else accepted[None]

    def _put_observation(self, values: Mapping[str, np.ndarray], envs: list[int]) -> None:
        slots = np.array(self._rows)[envs] & self._ring.mask
        for name in self._step_names:
            self._ring.arrays[name][slots, envs] = values[name][envs] if name in values else 0
        self._advance(envs)

    def _advance(self, envs: list[int]) -> None:
        for env in envs:
            self._rows[env] += 1
            if self._rows[env] > self._half[env]:
                self._wake_committer(env)
        self._changes += 1

    def _cut(self, env: int) -> None:
        self._settle(env)
        if self._open[env] is not None:
            self._end(env, False, False)

    def _end(self, env: int, terminated: bool, truncated: bool) -> None:
        last = (self._rows[env] - 1) & self._ring.mask
        for name in self._schema.acted:
            self._ring.arrays[name][last, env] = 0
        self._opened(env).record = self._describe(env, terminated, truncated)  # now it has ended
        self._settle(env)

    def _settle(self, env: int) -> None:
        """Enter an episode that has ended, once, however often an interrupt comes between."""
        episode = self._open[env]
        if episode is None or episode.record is None:
            return
        record = episode.record
        if record.length > 0 and not any(record is entered for entered in self._closed[-self._num_envs :]):
            self._closed.append(record)
        if record.length > 0 and record[:5] not in self._log[-self._num_envs :]:
            self._log.append(record[:5])
        self._changes += 1
        self._open[env] = None

    def _settle_all(self) -> None:
        for env in range(self._num_envs):
            self._settle(env)

    def _describe(self, env: int, terminated: bool = False, truncated: bool = False) -> Episode:
        episode = self._opened(env)
        length = self._rows[env] - 1 - episode.first_row
        total = episode.reward if self._scalar_reward else None
        rest = (total, episode.seed, episode.start_time, episode.policy, episode.columns)
        return Episode(env, episode.first_row, length, terminated, truncated, *rest)

    def _opened(self, env: int) -> OpenEpisode:
        episode = self._open[env]
        assert episode is not None, env
        return episode

    def _catch_up(self, env: int) -> None:
        """Leave rows unused so that this column is not more than a shard behind the longest."""
        behind = max(self._rows) - self._rows[env]
        if behind >= self._max_lag:
            none = {name: array[:0, 0] for name, array in self._ring.arrays.items()}
            self._append_rows(env, none, behind)

    def envs(self, mask: np.ndarray | None) -> list[int]:
        """The environments of a mask, (num_envs,) bool, all if there is none."""
        if mask is None:
            return list(range(self._num_envs))
        mask = np.asarray(mask)
        if mask.shape != (self._num_envs,) or mask.dtype != np.dtype(bool):
            raise UsageError(f"mask: expected {self._num_envs} bools, got {mask.dtype} of shape {mask.shape}")
        return np.flatnonzero(mask).tolist()

    def _columns(self, given: Mapping[str, Any], env: int) -> tuple[Any, ...]:
        if not isinstance(given, Mapping):
            raise UsageError(f"columns: expected a dict, got {given!r}")
        unknown = given.keys() - self._schema.columns.keys()
        if unknown:
            raise SchemaError(
                f"expected episode columns of {list(self._schema.columns)}, got {sorted(unknown)}"
            )
        return tuple(
            column_value(name, dtype, given.get(name), env, self._num_envs)
            for name, dtype in self._schema.columns.items()
        )

    def _wait_for_room(self, env: int, rows: int = 1) -> None:
        while self._rows[env] + rows > self._limit[env]:
            self._commit_now()

    # ---- what is there, for the process that writes; the caller holds `lock`

    def forget_taken(self) -> None:
        """Give the episodes that are in no commit once more, to a reader that begins from the head."""
        self._log = [episode[:5] for episode in self._closed]

    def take_ended(self) -> Ended:
        """Episodes that ended since the last call."""
        self._settle_all()
        log, self._log = self._log, []
        return Ended(*np.array(log, np.int64).reshape(-1, 5).T)

    def open_episodes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Environment, first row and length of the open episodes of at least one transition."""
        found = [
            (env, episode.first_row, self._rows[env] - 1 - episode.first_row)
            for env, episode in enumerate(self._open)
            if episode is not None and self._rows[env] - 1 > episode.first_row
        ]
        env, first, length = np.array(found, np.int64).reshape(-1, 3).T
        return env, first, length

    def uncommitted(self) -> pa.Table:
        """The episodes that closed since the last commit, and the open ones."""
        episodes = [*self._closed, *[episode for episode in self._open_now() if episode.length]]
        return episode_table(episodes, episode_schema(self._schema))

    def floor_of(self, head: Head) -> np.ndarray:
        """The first row of each environment that the ring has to hold after a commit, (num_envs,)."""
        floor: np.ndarray = (head.rows - head.is_open) // self._ring.keep * self._ring.keep
        return floor

    @property
    def ring(self) -> Mapping[str, np.ndarray]:
        """By field, (capacity, num_envs, *shape); row t stands at t % capacity."""
        return self._ring.arrays

    def refill(self, env: int, row: int, count: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Put committed rows back into the ring: those of a chunk that is not yet full."""
        self._ring.put(env, row, count, arrays)

    def _open_now(self) -> list[Episode]:
        return [self._describe(env) for env, episode in enumerate(self._open) if episode is not None]

    def _set_room(self, head: Head) -> None:
        """Rows below the floor are durable and in chunks that are full: their slots are free."""
        floor = self.floor_of(head)
        self._limit = (floor + self._ring.capacity).tolist()
        self._half = (floor + self._ring.capacity // 2).tolist()

    def _resume(self, head: Head) -> None:
        """End the episodes that the last writer of the stream left open."""
        for ended in episodes_of(head.open):
            self._changes += 1
            if ended.length:
                self._closed.append(ended)
                self._log.append(ended[:5])
