"""Between the arrays of Stable-Baselines3 and the rows of a store: shapes, dtypes, frame stacks.

SB3 has the environments first, a Discrete value as an array of one, and actions flat. A stack of k
frames has them one after the other along the first axis of an observation, oldest first, as
`VecFrameStack` and `VecTransposeImage` make it: (4, 84, 84), or (12, 84, 84) for frames in colour.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_obs_shape

from replaystore.errors import SchemaError
from replaystore.schema import Schema
from replaystore.spaces import FrameStack, Space, schema_from_spaces

MAX_FOUND = 16  # frames of a stack that is found by itself


class RowForm:
    """How observations and actions of some spaces are stored."""

    def __init__(self, observation_space: Space, action_space: Space, stack: FrameStack | None) -> None:
        self._spaces = (observation_space, action_space)
        self._stack = stack
        self.frames = stack.length if stack else 1
        framed = observation_space if stack is None else _framed(observation_space, stack.length)
        self.schema: Schema = schema_from_spaces(framed, action_space, frame_stack=stack)
        self._leaves = self._find_leaves(observation_space)

    def _find_leaves(self, space: Space) -> dict[str, tuple[int, ...]]:
        """SB3's shape of an observation, by field."""
        if not isinstance(space, spaces.Dict):
            return {"observation": get_obs_shape(space)}  # type: ignore[dict-item]
        return {f"observation/{key}": get_obs_shape(child) for key, child in space.items()}  # type: ignore[misc]

    def stacked(self, stack: FrameStack | None) -> "RowForm":
        """The same with other frame stacks."""
        return RowForm(*self._spaces, stack)

    @cached_property
    def _is_dict(self) -> bool:
        return isinstance(self._spaces[0], spaces.Dict)

    # ---- to rows

    def leaves(self, observation: Any, num_envs: int) -> dict[str, np.ndarray]:
        """An observation's arrays by field, (num_envs, …), as SB3's own buffer would keep them."""
        leaves = {}
        for name, shape in self._leaves.items():
            leaf = observation[name.removeprefix("observation/")] if self._is_dict else observation
            dtype = self.schema.by_name[name].dtype
            leaves[name] = np.ascontiguousarray(leaf).astype(dtype, copy=False).reshape(num_envs, *shape)
        return leaves

    def rows(self, leaves: Mapping[str, np.ndarray]) -> Any:
        """The observations to store, (num_envs, …): of a stack, the newest frames."""
        rows = {}
        for name, leaf in leaves.items():
            shape = self.schema.by_name[name].shape
            rows[name] = leaf.reshape(len(leaf), self.frames, *shape)[:, -1]
        return self._nested(rows)

    def actions(self, action: Any, num_envs: int) -> np.ndarray:
        """The actions to store, (num_envs, …)."""
        field = self.schema.by_name["action"]
        return np.asarray(action).astype(field.dtype, copy=False).reshape(num_envs, *field.shape)

    def _nested(self, leaves: Mapping[str, np.ndarray]) -> Any:
        if not self._is_dict:
            return leaves["observation"]
        return {name.removeprefix("observation/"): leaf for name, leaf in leaves.items()}

    # ---- from rows

    def observations(self, read: Any, n: int) -> Any:
        """What a window has read, in SB3's shape: an array (n, …), or a dict of them."""
        leaves = {
            name: (read[name.removeprefix("observation/")] if self._is_dict else read).reshape(n, *shape)
            for name, shape in self._leaves.items()
        }
        return self._nested(leaves)

    # ---- frame stacks, as bytes: equal to the last bit

    def blobs(self, leaves: Mapping[str, np.ndarray]) -> list[tuple[bytes, ...]]:
        """Of each environment the bytes of its observation's arrays."""
        return list(zip(*[[one.tobytes() for one in leaf] for leaf in leaves.values()], strict=True))

    def check(
        self, now: Sequence[tuple[bytes, ...]], after: Sequence[tuple[bytes, ...]], begins: np.ndarray
    ) -> None:
        """Raise `SchemaError` unless stacks move on by a frame, and begin with nothing but padding."""
        if self._stack is None:
            return
        for env, begin in enumerate(begins.tolist()):
            for name, stack, moved in zip(self._leaves, now[env], after[env], strict=True):
                frame = len(stack) // self.frames
                if stack[frame:] != moved[:-frame]:
                    raise SchemaError(
                        f"field {name!r}, environment {env}: expected the stack of {self.frames} frames moved"
                        " on by one, got another; if a step was lost (to an interrupt, or to a callback that"
                        " ended training), reset the environment; else pass frame_stack=1 to store"
                        " observations whole"
                    )
                if begin and stack[:-frame] != self._padding(name, stack[-frame:]) * (self.frames - 1):
                    raise SchemaError(
                        f"field {name!r}, environment {env}: expected an episode's first stack filled with"
                        f" padding {self._stack.padding!r}, got other frames; pass the padding that the"
                        " environment has, or frame_stack=1; after loading a buffer, reset the environment"
                    )

    def _padding(self, name: str, newest: bytes) -> bytes:
        padding = self.schema.by_name[name].padding
        return newest if padding is None else padding


def _framed(space: Space, length: int) -> Space:
    """A space with the frames as its first axis."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: _framed(child, length) for key, child in space.items()})
    shape = space.shape
    if not isinstance(space, spaces.Box) or not shape or shape[0] % length:
        raise SchemaError(
            f"frame_stack: expected a Box with {length} frames along its first axis, got {space}"
        )
    if shape[0] == length:
        return space
    framed = (length, shape[0] // length, *shape[1:])
    low, high = space.low.reshape(framed), space.high.reshape(framed)
    return spaces.Box(low, high, dtype=space.dtype.type)


def stack_of(schema: Schema, length: int) -> FrameStack | None:
    """The frame stack with which a store was made."""
    if length == 1:
        return None
    field = schema.by_name[schema.observed[0]]
    return FrameStack(length, "reset" if field.padding is None else "zero")


def find_stack(now: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> FrameStack | None:
    """The frame stack of which the first transitions of all environments tell, if they do.

    An observation has to be one uint8 image of at most 16 channels that begins with padding and
    moves on. Three equal channels may be a grey picture, and count for nothing.
    """
    image = now.get("observation")
    if image is None or image.dtype != np.uint8 or image.ndim != 4 or not 2 <= image.shape[1] <= MAX_FOUND:
        return None
    if not np.array_equal(image[:, 1:], after["observation"][:, :-1]):
        return None
    older, newest = image[:, :-1], image[:, -1:]
    if not older.any() and newest.any(axis=(1, 2, 3)).all():
        return FrameStack(image.shape[1], "zero")
    if image.shape[1] != 3 and (older == newest).all() and newest.any():
        return FrameStack(image.shape[1], "reset")
    return None
