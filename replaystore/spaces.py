"""gymnasium spaces → schema; frame stacks and specs of environments."""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers import (
    FrameStackObservation,
    OrderEnforcing,
    PassiveEnvChecker,
    RecordEpisodeStatistics,
    RecordVideo,
    TimeLimit,
)

from replaystore.errors import SchemaError, UsageError
from replaystore.field import Field
from replaystore.schema import Schema

# Wrappers that hand over observations as they are.
PASSING = (OrderEnforcing, PassiveEnvChecker, RecordEpisodeStatistics, RecordVideo, TimeLimit)

Space = gym.Space[Any]
Path = tuple[int | str, ...]


class FrameStack(NamedTuple):
    """How observations are stacked: by how many frames, and what stands before the first.

    `padding` is "reset" (the first frame again), "zero", or a frame. `is_direct` says that nothing
    that could change them stands between a `FrameStackObservation` and whoever gets its stacks.
    """

    length: int
    padding: Any
    is_direct: bool = False


def schema_from_spaces(
    observation_space: Space,
    action_space: Space,
    *,
    fields: Iterable[Field] = (),
    columns: Mapping[str, str] | None = None,
    frame_stack: FrameStack | None = None,
) -> Schema:
    """A schema for an environment's transitions; dtypes are kept exactly, rewards are float64.

    Dict and Tuple spaces become nested fields. `fields` are the user's own, `columns` of the
    episodes. With `frame_stack`, every array of the observation space has the frames first, and
    one frame is a row. Raises `SchemaError` for a space without a fixed shape.
    """
    observations = _space_fields("observation", observation_space)
    if frame_stack is not None:
        paddings = _paddings(observations, frame_stack)
        observations = [
            _unstacked(field, frame_stack.length, padding)
            for field, padding in zip(observations, paddings, strict=True)
        ]
    fixed = [Field("reward", (), "float64"), Field("terminated", (), "bool"), Field("truncated", (), "bool")]
    actions = _space_fields("action", action_space)
    return Schema([*observations, *actions, *fixed, *fields], columns)


def _space_fields(path: str, space: Space) -> list[Field]:
    if isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        assert space.shape is not None, space
        return [Field(path, space.shape, space.dtype)]
    if isinstance(space, spaces.Dict):
        if any(not isinstance(key, str) or key.isdigit() or "/" in key for key in space):
            wanted = "names as keys (numbers are a Tuple's, a slash joins names)"
            raise SchemaError(f"field {path!r}: expected {wanted}, got {list(space)}")
        children: Iterable[tuple[str, Space]] = space.items()
    elif isinstance(space, spaces.Tuple):
        children = ((str(i), child) for i, child in enumerate(space))
    else:
        raise SchemaError(f"field {path!r}: {space} has no fixed shape and cannot be stored")
    found = [field for name, child in children for field in _space_fields(f"{path}/{name}", child)]
    if not found:
        raise SchemaError(f"field {path!r}: expected a space with parts, got {space}")
    return found


def _paddings(stacked: list[Field], stack: FrameStack) -> list[bytes | None]:
    if isinstance(stack.padding, str) and stack.padding == "reset":
        return [None] * len(stacked)
    if isinstance(stack.padding, str) and stack.padding == "zero":
        return [bytes(field.row_nbytes // stack.length) for field in stacked]
    if isinstance(stack.padding, str):
        raise UsageError(f'padding: expected "reset", "zero" or a frame, got {stack.padding!r}')
    return [
        np.asarray(leaf_at(stack.padding, path_of(field.name)), field.dtype).tobytes() for field in stacked
    ]


def path_of(name: str) -> Path:
    """Where in a nested value the field `top/part/…` is found: its keys and numbers."""
    return tuple(int(part) if part.isdigit() else part for part in name.split("/")[1:])


def leaf_at(value: Any, path: Path) -> Any:
    for part in path:
        value = value[part]
    return value


def _unstacked(field: Field, length: int, padding: bytes | None) -> Field:
    if field.shape[:1] != (length,):
        raise SchemaError(f"field {field.name!r}: expected {length} frames first, got shape {field.shape}")
    return Field(field.name, field.shape[1:], field.dtype, padding=padding)


def map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    if type(value) is np.ndarray:
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_leaves(child, function) for key, child in value.items()}
    if isinstance(value, tuple):
        return tuple(map_leaves(child, function) for child in value)
    return function(value)


def find_frame_stack(env: gym.Env[Any, Any]) -> FrameStack | None:
    """The stack of a `FrameStackObservation` that gives the environment its observation space."""
    layer, is_direct = env, True
    while isinstance(layer, gym.Wrapper):
        if isinstance(layer, FrameStackObservation) and layer.observation_space == env.observation_space:
            padding = layer.padding_value if layer.padding_type == "_custom" else layer.padding_type
            is_direct = is_direct and type(layer) is FrameStackObservation
            return FrameStack(layer.stack_size, padding, is_direct) if layer.stack_size > 1 else None
        is_direct = is_direct and type(layer) in PASSING
        layer = layer.env
    return None


def given_stack(length: int, padding: Any) -> FrameStack | None:
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise UsageError(f"frame_stack: expected an int from 1, got {length!r}")
    return FrameStack(length, padding) if length > 1 else None


def vector_stack(envs: gym.vector.VectorEnv[Any, Any, Any]) -> FrameStack | None:
    base = envs.unwrapped
    if not isinstance(base, SyncVectorEnv) or envs.single_observation_space != base.single_observation_space:
        return None
    stacks = [find_frame_stack(env) for env in base.envs]
    is_direct = envs is base and all(stack is not None and stack.is_direct for stack in stacks)
    return None if stacks[0] is None else stacks[0]._replace(is_direct=is_direct)


def _spec_json(spec: Any) -> str | None:
    """The spec as JSON, or None with a warning if it holds what cannot be written."""
    if spec is None:
        return None
    try:
        return str(spec.to_json())
    except (ValueError, TypeError) as error:
        message = f"the environment's spec cannot be saved, so make_env() will not work: {error}"
        warnings.warn(message, UserWarning, stacklevel=4)
        return None


def spec_of(env: gym.Env[Any, Any]) -> str | None:
    try:
        spec = env.spec
    except ValueError as error:  # a wrapper that does not record its arguments
        warnings.warn(f"make_env() will not work: {error}", UserWarning, stacklevel=3)
        return None
    return _spec_json(spec)


def vector_spec(envs: gym.vector.VectorEnv[Any, Any, Any]) -> str | None:
    base = envs.unwrapped
    if isinstance(base, SyncVectorEnv):
        return spec_of(base.envs[0])
    spec = copy.deepcopy(envs.spec)
    if spec is None or spec.kwargs.get("wrappers"):
        return None
    if spec.kwargs.get("vectorization_mode") == "vector_entry_point":
        spec.kwargs.pop("max_episode_steps", None)  # make_vec put it there for the vector alone
    for name in ("num_envs", "vectorization_mode", "vector_kwargs", "wrappers"):
        spec.kwargs.pop(name, None)
    return _spec_json(spec)
