"""The wrappers that feed a store from an environment or a vector of them.

They return exactly what the environment returns. What a failed commit kept from being appended
stays with the wrapper and is appended at its next call.
"""

import contextlib
import copy
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from replaystore.errors import CommitError, SchemaError, UsageError
from replaystore.field import Field
from replaystore.schema import Schema
from replaystore.spaces import (
    FrameStack,
    find_frame_stack,
    given_stack,
    leaf_at,
    map_leaves,
    schema_from_spaces,
    spec_of,
    vector_spec,
    vector_stack,
)
from replaystore.store import ReplayStore

__all__ = ["RecordReplay", "RecordVectorReplay", "schema_from_spaces"]


class _Recorder:
    """What both wrappers share: the store, the calls that wait, the check of frame stacks."""

    def __init__(self, store: ReplayStore, stack: FrameStack | None, *, frame_axis: int) -> None:
        self.store = store
        self.stack = stack
        self.annotations: dict[str, Any] = {}
        self._frame_axis = frame_axis
        before = (slice(None),) * frame_axis
        self._newest = (*before, -1)
        self._all_but_newest, self._all_but_oldest = (*before, slice(-1)), (*before, slice(1, None))
        self._waiting: deque[Callable[[], None]] = deque()
        self._has_gap = False
        self.observation_names = store.schema.names("observation")
        self._info_names = [f.name for f in store.schema.fields if f.name.startswith("info/")]

    def call(self, *calls: Callable[[], None]) -> None:
        """Make calls to the store in order; what a failed commit stops is made at the next call."""
        self._waiting.extend(calls)
        while self._waiting:
            call = self._waiting.popleft()
            try:
                call()
            except CommitError:
                self._waiting.appendleft(call)
                raise

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """While a step or reset is recorded: if that fails, nothing is until the next reset."""
        try:
            yield
        except CommitError:
            raise
        except BaseException:  # refused, or interrupted who knows where
            self._waiting.clear()
            self._has_gap = True
            raise

    def before_step(self) -> None:
        """Append what waits; raise if a refused step has left a gap in the episode."""
        self.call()
        if self._has_gap:
            raise UsageError("a step of this episode was refused, so it cannot go on: reset first")

    def before_reset(self, *, whole: bool = True) -> None:
        self.call()
        self._has_gap = self._has_gap and not whole

    def newest(self, observation: Any) -> Any:
        """A copy of the newest frame of a stacked observation, or of the observation."""
        if self.stack is None:
            return map_leaves(observation, np.array)
        return map_leaves(observation, lambda leaf: np.array(leaf[self._newest]))

    def check_stack(self, observation: Any, before: Any) -> None:
        """Raise unless a step's observation is the last one moved on by a frame."""
        if self.stack is None:
            return
        for name in self.observation_names:
            now, last = leaf_at(observation, name), leaf_at(before, name)
            if not _same(now[self._all_but_newest], last[self._all_but_oldest]):
                raise SchemaError(
                    f"observation: expected the last stack of {self.stack.length} frames moved on by one;"
                    " a wrapper changes the frames: pass frame_stack=1 to store whole stacks"
                )

    def check_padding(self, observation: Any) -> None:
        """Raise unless an episode's first stack is padded as the store will pad it."""
        if self.stack is None:
            return
        for name in self.observation_names:
            leaf = leaf_at(observation, name)
            padding = self.store.schema.by_name[name].padding_row()
            frames = np.moveaxis(leaf, self._frame_axis, 0)
            expected = np.broadcast_to(frames[-1] if padding is None else padding, frames[:-1].shape)
            if not _same(frames[:-1], expected):
                kind = "its newest frame" if padding is None else "the padding"
                raise SchemaError(f"field {name!r}: expected an episode's first stack filled with {kind}")

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


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two arrays of one shape hold the same values, NaN being one."""
    if first.dtype.kind == "f":
        return np.array_equal(first, second, equal_nan=True)
    return bool((first == second).all())


def _copied(action: Any) -> Any:
    """What an action was when it was taken, should the environment change it."""
    return action if isinstance(action, (int, np.integer)) else copy.deepcopy(action)


def _open_or_create(
    path: str | os.PathLike[str], schema: Schema, *, num_envs: int, spec: str | None, stack: FrameStack | None
) -> ReplayStore:
    frames = stack.length if stack else 1
    if not os.path.lexists(os.path.join(path, "zarr.json")):
        return ReplayStore.create(path, schema, num_envs, env_spec=spec, frame_stack=frames)
    with ReplayStore.open(path) as existing:
        difference = existing.schema.difference(schema)
        if difference is None and existing.frame_stack != frames:
            difference = f"expected a stack of {existing.frame_stack} frames, got {frames}"
    if difference is not None:
        raise SchemaError(f"{path}: the store has another schema: {difference}")
    return ReplayStore.open(path, "a", num_envs=num_envs)


class RecordReplay(gym.Wrapper[Any, Any, Any, Any]):
    """Records every transition of an environment; creates the store or adds to it.

    `frame_stack` says of how many frames an observation is the stack; by default a
    `FrameStackObservation` is found by itself. Of a stack only the newest frame is stored.
    `padding` is "reset", "zero" or a frame, for stacks given by `frame_stack`. `fields` are the
    user's own: `info/NAME` is taken from the environment's info, any other from `annotate`.
    `policy` tags the episodes that begin from now on, and `columns` describes them.

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
        store = _open_or_create(path, schema, num_envs=1, spec=spec_of(env), stack=stack)
        self._recorder = _Recorder(store, stack, frame_axis=0)
        self.policy = policy
        self.columns: dict[str, Any] = {}
        self._before: Any = None

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
        with recorder.recording():
            recorder.check_padding(observation)
            newest, policy, columns = recorder.newest(observation), self.policy, dict(self.columns)
            self._remember(observation)
            recorder.call(lambda: recorder.store.reset(newest, seed, policy=policy, columns=columns))
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        recorder = self._recorder
        recorder.before_step()
        taken = _copied(action)
        result = self.env.step(action)
        observation, reward, terminated, truncated, info = result
        with recorder.recording():
            recorder.check_stack(observation, self._before)
            values = (taken, recorder.newest(observation), reward, terminated, truncated)
            extra = recorder.extra(info)
            self._remember(observation)
            recorder.call(lambda: recorder.store.step(*values, **extra))
        return result

    def _remember(self, observation: Any) -> None:
        self._before = map_leaves(observation, np.array) if self._recorder.stack else None

    def close(self) -> None:
        """Commit and close the store, and close the environment."""
        try:
            self._recorder.call()
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
        store = _open_or_create(path, schema, num_envs=env.num_envs, spec=vector_spec(env), stack=stack)
        self._recorder = _Recorder(store, stack, frame_axis=1)
        self.policy = policy
        self.columns: dict[str, Any] = {}
        self._ended = np.zeros(env.num_envs, bool)
        self._before: Any = None

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
        self._recorder.before_reset(whole=bool(mask.all()))
        result = self.env.reset(seed=seed, options=options)
        self._ended = self._ended & ~mask
        self._remember(result[0])
        with self._recorder.recording():
            self._recorder.call(self._begin(result[0], mask, seed))
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
        with self._recorder.recording():
            calls = [self._append(taken, result, mask)] if mask.any() else []
            if begun.any():
                calls.append(self._begin(observations, begun, None))
            self._ended = ended
            self._remember(observations)
            self._recorder.call(*calls)
        return result

    def _append(self, actions: Any, result: Any, mask: np.ndarray) -> Callable[[], None]:
        observations, rewards, terminated, truncated, infos = result
        recorder = self._recorder
        if self._mode is AutoresetMode.SAME_STEP and (terminated | truncated).any():
            observations, infos = _with_final(
                observations, infos, terminated | truncated, recorder.observation_names
            )
        if recorder.stack is not None:
            recorder.check_stack(_select(observations, mask), _select(self._before, mask))
        values = (actions, recorder.newest(observations), rewards, terminated, truncated)
        own, extra = map_leaves((values, recorder.extra(infos)), self._lead)
        return lambda: recorder.store.step(*own, mask=mask, **extra)

    def _begin(self, observations: Any, mask: np.ndarray, seed: Any) -> Callable[[], None]:
        recorder = self._recorder
        recorder.check_padding(_select(observations, mask))
        newest = map_leaves(recorder.newest(observations), self._lead)
        policy, columns = self.policy, dict(self.columns)
        return lambda: recorder.store.reset(newest, seed, mask=mask, policy=policy, columns=columns)

    def _lead(self, values: Any) -> np.ndarray:
        """A copy of the environments' values; a store of one environment has no axis for it."""
        array = np.array(values)
        return array if self.num_envs > 1 else array[0]

    def _remember(self, observations: Any) -> None:
        self._before = map_leaves(observations, np.array) if self._recorder.stack else None

    def close(self, **kwargs: Any) -> None:
        """Commit and close the store, and close the environments."""
        try:
            self._recorder.call()
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


def _select(value: Any, mask: np.ndarray) -> Any:
    return map_leaves(value, lambda leaf: np.asarray(leaf)[mask])


def _with_final(
    observations: Any, infos: Mapping[str, Any], ended: np.ndarray, names: Iterable[str]
) -> tuple[Any, dict[str, Any]]:
    """Put the final observations, and the infos of the last steps, in the place of the reset ones."""
    if "final_obs" not in infos:
        raise UsageError('SAME_STEP autoreset: expected infos["final_obs"] at an episode\'s end')
    observations = copy.deepcopy(observations)
    for name in names:
        for env in np.flatnonzero(ended):
            leaf_at(observations, name)[env] = leaf_at(infos["final_obs"][env], name)
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
