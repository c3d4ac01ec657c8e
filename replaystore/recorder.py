"""The wrappers that feed a store from an environment or a vector of them.

They return exactly what the environment returns. What a failed commit kept from being appended
stays with the wrapper and is appended at its next call.
"""

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from replaystore.bounds import Bounds, check_bounds_are
from replaystore.errors import CommitError, SchemaError, UsageError
from replaystore.field import Field
from replaystore.schema import Schema
from replaystore.spaces import (
    FrameStack,
    Path,
    find_frame_stack,
    given_stack,
    leaf_at,
    map_leaves,
    path_of,
    schema_from_spaces,
    spec_of,
    vector_spec,
    vector_stack,
)
from replaystore.store import ReplayStore

__all__ = ["RecordReplay", "RecordVectorReplay", "schema_from_spaces"]

DIRECT_STEPS = 16  # from one check of the stacks of a `FrameStackObservation` to the next


class _Call(NamedTuple):
    """A call to the store."""

    method: Callable[..., None]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def copied(self) -> "_Call":
        """The same call with values of its own, which the environment cannot change."""
        return _Call(self.method, *copy.deepcopy((self.args, self.kwargs)))


class _Recorder:
    """What both wrappers share: the store, the calls that wait, the check of frame stacks."""

    def __init__(self, store: ReplayStore, stack: FrameStack | None, num_envs: int | None) -> None:
        self.store = store
        self.stack = stack
        self.annotations: dict[str, Any] = {}
        self.has_gap = False
        self._is_vector = num_envs is not None
        self._newest = (slice(None), -1) if self._is_vector else -1
        self._waiting: tuple[_Call, ...] = ()
        self.observation_paths = {name: path_of(name) for name in store.schema.observed}
        self._stacked_paths = {} if stack is None else self.observation_paths
        self._awaited: dict[str, list[bytes]] = {  # what the next stacks begin with
            name: [b""] * (num_envs or 1) for name in self._stacked_paths
        }
        self._steps = 0
        self._steps_a_check = DIRECT_STEPS if stack is not None and stack.is_direct else 1
        self._is_check_due = False
        self._info_names = [f.name for f in store.schema.fields if f.name.startswith("info/")]

    def append(self, *calls: _Call, has_gap: bool = False) -> None:
        """Make calls to the store in order; those that a failed commit stops wait for the next.

        `has_gap` is how the episode stands after them. An interrupt, or a step that is refused,
        leaves a gap, across which nothing is recorded before the next reset.
        """
        self.has_gap = True
        calls, self._waiting = self._waiting + calls, ()
        for number, call in enumerate(calls):
            try:
                call.method(*call.args, **call.kwargs)
            except CommitError:
                self._waiting = tuple(rest.copied() for rest in calls[number:])
                self.has_gap = has_gap
                raise
        self.has_gap = has_gap

    def append_step(self, values: tuple[Any, ...], info: Mapping[str, Any]) -> None:
        """`append` a step of one environment, after `before_step`: the call of every step, so kept short."""
        extra = self.extra(info) if self._info_names or self.annotations else {}
        try:
            self.store.step(*values, **extra)
        except CommitError:
            self._waiting = (_Call(self.store.step, values, extra).copied(),)
            self.has_gap = False
            raise
        self.has_gap = False

    def before_step(self) -> None:
        """Append what waits; raise if a step that is not stored has left a gap in the episode."""
        if self.has_gap:
            raise UsageError(
                "the last step was refused or interrupted, so the episode cannot go on: reset first"
            )
        if self._waiting:
            self.append()
        self.has_gap = True  # unless this step is appended

    def before_reset(self) -> bool:
        """Append what waits; return whether there is a gap that only a reset of all closes."""
        had_gap = self.has_gap
        self.append(has_gap=had_gap)
        self.has_gap = True
        return had_gap

    def newest(self, observation: Any) -> Any:
        """The newest frame of a stacked observation, or the observation."""
        if self.stack is None:
            return observation
        if type(observation) is np.ndarray:
            return observation[self._newest]
        return map_leaves(observation, lambda leaf: leaf[self._newest])

    def moved_on(self, observation: Any, envs: Sequence[int] = (0,)) -> Any:
        """The `newest` of a step; raise unless its stacks are the last ones moved on by a frame.

        What a `FrameStackObservation` itself gives is checked at the first step of an episode and now and
        then: it is wrong only where an environment writes to what it gave before.
        """
        if self.stack is None:
            return observation
        is_to_follow = self._steps % self._steps_a_check == 0
        self._steps += 1
        if self._is_check_due or is_to_follow:
            self._check_stacks(observation, envs, is_to_follow)
        return self.newest(observation)

    def _check_stacks(self, observation: Any, envs: Sequence[int], is_to_follow: bool) -> None:
        """Raise unless stacks are what is awaited; say what of the next ones is, if those are to follow."""
        for name, path in self._stacked_paths.items():
            stacks, awaited = self._stacks(observation, path), self._awaited[name]
            for env in envs:
                frames, size = stacks[env].tobytes(), len(stacks[env])
                if not frames.startswith(awaited[env]):
                    raise SchemaError(
                        f"field {name!r}: expected the last stack of {size} frames moved on by one;"
                        " a wrapper changes the frames: pass frame_stack=1 to store whole stacks"
                    )
                awaited[env] = frames[len(frames) // size :] if is_to_follow else b""
        self._is_check_due = is_to_follow

    def check_padding(self, observation: Any, envs: Sequence[int] = (0,)) -> None:
        """Raise unless an episode's first stack is padded as the store will pad it."""
        for name, path in self._stacked_paths.items():
            stacks = self._stacks(observation, path)
            padding = self.store.schema.by_name[name].padding
            for env in envs:
                *older, newest = [frame.tobytes() for frame in stacks[env]]
                if any(frame != (newest if padding is None else padding) for frame in older):
                    kind = "its newest frame" if padding is None else "the padding"
                    raise SchemaError(f"field {name!r}: expected an episode's first stack filled with {kind}")
                self._awaited[name][env] = stacks[env][1:].tobytes()
        self._is_check_due = True

    def _stacks(self, observation: Any, path: Path) -> np.ndarray:
        """A field's stacks, (num_envs, stack, …)."""
        leaf = np.asarray(leaf_at(observation, path))
        return leaf if self._is_vector else leaf[None]

    def extra(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """The user's own fields of a step: from `info`, and from `annotate`."""
        values: dict[str, Any] = {}
        for name in self._info_names:
            *parents, last = name.split("/")
            source: Any = {"info": info}
            target = values
            for part in parents:
                source, target = source.get(part, {}), target.setdefault(part, {})
            if last not in source:
                raise SchemaError(f"field {name!r}: the environment's info has no such value")
            target[last] = source[last]
        return values | self.annotations


def _open_or_create(
    path: str | os.PathLike[str],
    schema: Schema,
    *,
    num_envs: int,
    spec: str | None,
    stack: FrameStack | None,
    at: str | None,
    bounds: Bounds,
) -> ReplayStore:
    frames = stack.length if stack else 1
    if at is None and not os.path.lexists(os.path.join(path, "zarr.json")):
        return ReplayStore.create(
            path, schema, num_envs, **bounds._asdict(), env_spec=spec, frame_stack=frames
        )
    with ReplayStore.open(path) as existing:
        check_bounds_are(existing.bounds, bounds, str(path))
        difference = existing.schema.difference(schema)
        if difference is None and existing.frame_stack != frames:
            difference = f"expected a stack of {existing.frame_stack} frames, got {frames}"
    if difference is not None:
        raise SchemaError(f"{path}: the store has another schema: {difference}")
    return ReplayStore.open(path, "a", num_envs=num_envs, at=at)


class RecordReplay(gym.Wrapper[Any, Any, Any, Any]):
    """Records every transition of an environment; creates the store or adds to it.

    `frame_stack` says of how many frames an observation is the stack; by default a
    `FrameStackObservation` is found by itself. Of a stack only the newest frame is stored; `SchemaError`
    where a stack is not the last one moved on, which is looked at every step, or in one of 16 where no
    wrapper above that one could change it.
    `padding` is "reset", "zero" or a frame, for stacks given by `frame_stack`. `fields` are the
    user's own: `info/NAME` is taken from the environment's info, any other from `annotate`.
    `policy` tags the episodes that begin from now on, and `columns` describes them. `at` goes on from
    a checkpoint of the store; the environment begins anew, so an episode that was open then ends at
    the first `reset`. `capacity`, `capacity_bytes`, `max_age` and `reservoir` bound a store that is made, as in
    `ReplayStore.create`; for one that is there they have to be its own, or `UsageError` is raised.

    The store is at `store`; `close` commits and closes it.
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        path: str | os.PathLike[str],
        *,
        frame_stack: int | None = None,
        padding: Any = "reset",
        fields: Iterable[Field] = (),
        column_types: Mapping[str, str] | None = None,
        policy: str | None = None,
        at: str | None = None,
        capacity: int | None = None,
        capacity_bytes: int | None = None,
        max_age: float | None = None,
        reservoir: bool = False,
    ) -> None:
        super().__init__(env)
        stack = find_frame_stack(env) if frame_stack is None else given_stack(frame_stack, padding)
        schema = schema_from_spaces(
            env.observation_space,
            env.action_space,
            fields=fields,
            columns=column_types,
            frame_stack=stack,
        )
        bounds = Bounds(capacity, capacity_bytes, max_age, reservoir)
        store = _open_or_create(
            path, schema, num_envs=1, spec=spec_of(env), stack=stack, at=at, bounds=bounds
        )
        self._recorder = _Recorder(store, stack, None)
        self.policy = policy
        self.columns: dict[str, Any] = {}

    @property
    def store(self) -> ReplayStore:
        return self._recorder.store

    def annotate(self, **values: Any) -> None:
        """Give the user's own fields of the next step, e.g. `annotate(log_prob=-0.7)`."""
        self._recorder.annotations = values

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        recorder = self._recorder
        recorder.before_reset()
        observation, info = self.env.reset(seed=seed, options=options)
        recorder.check_padding(observation)
        described = {"policy": self.policy, "columns": self.columns}
        recorder.append(_Call(self.store.reset, (recorder.newest(observation), seed), described))
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        recorder = self._recorder
        recorder.before_step()
        # a copy of what the environment may change
        taken = action if isinstance(action, (int, np.integer)) else copy.deepcopy(action)
        result = self.env.step(action)
        observation, reward, terminated, truncated, info = result
        recorder.append_step((taken, recorder.moved_on(observation), reward, terminated, truncated), info)
        return result

    def close(self) -> None:
        """Commit and close the store, and close the environment."""
        try:
            self._recorder.append()
            self.store.close()
        finally:
            super().close()


class RecordVectorReplay(gym.vector.VectorWrapper[Any, Any, Any, Any, Any]):
    """Records every transition of a vector environment, one column of a stream for each.

    All three autoreset modes are right: an episode's final observation is stored whichever way
    the environment hands it over, and no transition crosses an episode's end. The arguments are
    those of `RecordReplay`; a `FrameStackObservation` is found by itself in a `SyncVectorEnv`.
    """

    def __init__(
        self,
        env: gym.vector.VectorEnv[Any, Any, Any],
        path: str | os.PathLike[str],
        *,
        frame_stack: int | None = None,
        padding: Any = "reset",
        fields: Iterable[Field] = (),
        column_types: Mapping[str, str] | None = None,
        policy: str | None = None,
        at: str | None = None,
        capacity: int | None = None,
        capacity_bytes: int | None = None,
        max_age: float | None = None,
        reservoir: bool = False,
    ) -> None:
        super().__init__(env)
        self._mode = _autoreset_mode(env)
        stack = given_stack(frame_stack, padding) if frame_stack else vector_stack(env)
        schema = schema_from_spaces(
            env.single_observation_space,
            env.single_action_space,
            fields=fields,
            columns=column_types,
            frame_stack=stack,
        )
        bounds, spec = Bounds(capacity, capacity_bytes, max_age, reservoir), vector_spec(env)
        store = _open_or_create(
            path, schema, num_envs=env.num_envs, spec=spec, stack=stack, at=at, bounds=bounds
        )
        self._recorder = _Recorder(store, stack, env.num_envs)
        self.policy = policy
        self.columns: dict[str, Any] = {}
        self._ended = np.zeros(env.num_envs, bool)

    @property
    def store(self) -> ReplayStore:
        return self._recorder.store

    def annotate(self, **values: Any) -> None:
        """Give the user's own fields of the next step, each (num_envs, …)."""
        self._recorder.annotations = values

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        mask = np.ones(self.num_envs, bool)
        if options is not None and "reset_mask" in options:
            mask = np.array(options["reset_mask"], bool)
        had_gap = self._recorder.before_reset()
        result = self.env.reset(seed=seed, options=options)
        self._ended = self._ended & ~mask
        begin = self._begin(result[0], mask, seed)
        self._recorder.append(begin, has_gap=had_gap and not mask.all())
        return result

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self._recorder.before_step()
        taken = copy.deepcopy(actions)
        result = self.env.step(actions)
        observations, _, terminated, truncated, _ = result
        ended = np.asarray(terminated) | np.asarray(truncated)
        if self._mode is AutoresetMode.NEXT_STEP:
            begun, mask = self._ended, ~self._ended
        elif self._mode is AutoresetMode.SAME_STEP:
            begun, mask = ended, np.ones(self.num_envs, bool)
        else:
            begun, mask = np.zeros(self.num_envs, bool), np.ones(self.num_envs, bool)
        calls = [self._append(taken, result, mask)] if mask.any() else []
        if begun.any():
            calls.append(self._begin(observations, begun, None))
        self._ended = ended
        self._recorder.append(*calls)
        return result

    def _append(self, actions: Any, result: Any, mask: np.ndarray) -> _Call:
        observations, rewards, terminated, truncated, infos = result
        recorder = self._recorder
        if self._mode is AutoresetMode.SAME_STEP and (terminated | truncated).any():
            observations, infos = _with_final(
                observations, infos, terminated | truncated, recorder.observation_paths.values()
            )
        newest = recorder.moved_on(observations, np.flatnonzero(mask).tolist())
        values = (actions, newest, rewards, terminated, truncated)
        own, extra = map_leaves((values, recorder.extra(infos)), self._lead)
        return _Call(self.store.step, own, {"mask": mask, **extra})

    def _begin(self, observations: Any, mask: np.ndarray, seed: Any) -> _Call:
        recorder = self._recorder
        recorder.check_padding(observations, np.flatnonzero(mask).tolist())
        newest = map_leaves(recorder.newest(observations), self._lead)
        described = {"mask": mask, "policy": self.policy, "columns": self.columns}
        return _Call(self.store.reset, (newest, seed), described)

    def _lead(self, values: Any) -> np.ndarray:
        """The environments' values; a store of one environment has no axis for it."""
        array = np.asarray(values)
        return array if self.num_envs > 1 else array[0]

    def close(self, **kwargs: Any) -> None:
        """Commit and close the store, and close the environments."""
        try:
            self._recorder.append()
            self.store.close()
        finally:
            super().close(**kwargs)


def _autoreset_mode(envs: gym.vector.VectorEnv[Any, Any, Any]) -> AutoresetMode:
    mode = envs.metadata.get("autoreset_mode")
    try:
        return AutoresetMode(mode)
    except ValueError as error:
        raise UsageError(
            f'metadata["autoreset_mode"]: expected one of gymnasium\'s AutoresetMode, got {mode!r}'
        ) from error


def _with_final(
    observations: Any, infos: Mapping[str, Any], ended: np.ndarray, paths: Iterable[Path]
) -> tuple[Any, dict[str, Any]]:
    """Put the final observations, and the infos of the last steps, in the place of the reset ones."""
    if "final_obs" not in infos:
        raise UsageError('SAME_STEP autoreset: expected infos["final_obs"] at an episode\'s end')
    observations = copy.deepcopy(observations)
    for path in paths:
        for env in np.flatnonzero(ended):
            leaf_at(observations, path)[env] = leaf_at(infos["final_obs"][env], path)
    return observations, _merged(infos, infos.get("final_info", {}), ended)


def _merged(infos: Mapping[str, Any], final: Mapping[str, Any], ended: np.ndarray) -> dict[str, Any]:
    """The infos, with those of the last steps where an episode has ended."""
    merged = dict(infos)
    for key, value in final.items():
        if key not in infos:
            merged[key] = value
        elif isinstance(value, Mapping):
            merged[key] = _merged(infos[key], value, ended)
        else:
            merged[key] = np.array(infos[key])
            merged[key][ended] = value[ended]
    return merged
