"""A replay store as the replay buffer of Stable-Baselines3, whose draws and tensors it gives bit for bit.

    DQN("CnnPolicy", env, replay_buffer_class=ReplayStoreBuffer,
        replay_buffer_kwargs={"path": "run1.replay"})

SB3 hands over transitions, each with both its observations; the store takes rows. A transition whose
observation is, byte for byte, the next one of the transition before goes on with the episode: only
what follows is written. Any other begins an episode. `slots.py` says which transition of the store
stands at which place of SB3's ring, so SB3 draws as it does from its own arrays.

The actions are stored as SB3 hands them over: those of a Box space scaled to [-1, 1].
"""

import os
import weakref
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from replaystore.codec import crc32c
from replaystore.errors import CommitError, SchemaError, StoreGone, UsageError
from replaystore.index import EpisodeIndex
from replaystore.sb3_rows import RowForm, find_stack, stack_of
from replaystore.slots import Added, Slots, runs_of
from replaystore.spaces import Space, given_stack
from replaystore.store import ReplayStore
from replaystore.windows import Batch, Transition

_PLAIN = Transition()
PROBES = 16  # transitions by which a saved buffer knows its store again


class ReplayStoreBuffer(ReplayBuffer):
    """SB3's replay buffer on a `ReplayStore` at `path`; it samples the newest `buffer_size` transitions.

    The store is made at the first `add`. One that is there already is continued: its newest
    transitions are in the buffer from the beginning. `frame_stack` says of how many frames an
    observation is the stack, along its first axis, with what stands before an episode's first frame
    as `padding` ("zero", as in `VecFrameStack`, or "reset"); only the newest frame is stored then.
    By default a stack of uint8 images is found by itself; 1 stores observations whole.

    `optimize_memory_usage` is refused, as there is nothing to gain; `n_steps` of an algorithm has no
    effect with a buffer of one's own, as SB3 warns.

    A pickle of it (`model.save_replay_buffer`) names the store and the transitions, and holds no
    data. What is added after it stays in the store but is not in the buffer that it is loaded as.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: Space,
        action_space: Space,
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        *,
        path: str | os.PathLike[str],
        frame_stack: int | None = None,
        padding: str = "zero",
    ) -> None:
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        if optimize_memory_usage:
            raise UsageError(
                "optimize_memory_usage: expected False, got True;"
                f" {type(self).__name__} stores each observation once as it is, and keeps timeouts"
            )
        self.buffer_size = max(buffer_size // n_envs, 1)
        self.optimize_memory_usage = False
        self.handle_timeout_termination = handle_timeout_termination
        self.path = Path(os.path.abspath(path))
        stack = None if frame_stack is None else given_stack(frame_stack, padding)
        self._form = RowForm(observation_space, action_space, stack)
        self._is_form_known = frame_stack is not None
        self._slots = Slots(self.buffer_size, n_envs)
        self._count = 0  # transitions of each environment, since the last `reset`
        self._detach()
        if self._exists():
            self._attach("r")
            self._fill()

    def _detach(self) -> None:
        """Be without a store: what belongs to this process alone."""
        self._store: ReplayStore | None = None
        self._closer: weakref.finalize[Any, Any] | None = None
        self._added: Added | None = None  # finds what is written here
        self._last: list[tuple[bytes, ...]] = []  # the newest observation of each environment
        self._has_ended = np.ones(self.n_envs, bool)

    # ---- the store

    @property
    def store(self) -> ReplayStore:
        """The store; there is none before the first `add`."""
        if self._store is None:
            raise UsageError(f"{self.path}: there is no store yet; it is made at the first add")
        return self._store

    def close(self) -> None:
        """Commit and close the store; happens by itself when the buffer or the process ends."""
        self._note()
        if self._closer is not None:
            self._closer()
        self._detach()

    def _exists(self) -> bool:
        return os.path.lexists(self.path / "zarr.json")

    def _attach(self, mode: str) -> None:
        """Open the store in the place of one that is open; raise `SchemaError` if it is of another kind."""
        self.close()
        store = ReplayStore.open(self.path, mode, num_envs=self.n_envs)
        self._keep(store)
        if not self._is_form_known:
            self._form = self._form.stacked(stack_of(store.schema, store.frame_stack))
            self._is_form_known = True
        difference = store.schema.difference(self._form.schema)
        if difference is None and store.frame_stack != self._form.frames:
            difference = f"expected frame_stack={store.frame_stack}, got {self._form.frames}"
        streams, *_ = self._index.episodes()
        widths = np.unique(self._index.widths[streams])
        if difference is None and (widths != self.n_envs).any():
            held = " and ".join(map(str, widths))
            difference = f"expected the n_envs that it was written with, {held}, got {self.n_envs}"
        if difference is None and store.bounds.reservoir:
            difference = "expected one that has its newest transitions, found a reservoir"
        if difference is not None:
            self.close()
            raise SchemaError(f"{self.path}: the store is of another kind: {difference}")

    def _keep(self, store: ReplayStore) -> None:
        self._store = store
        self._closer = weakref.finalize(self, _close, store, os.getpid())

    def _begin(self, now: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> None:
        """Open the store for writing at the first `add`, or make it."""
        if self._exists():
            self._attach("a")
        else:
            if not self._is_form_known:
                self._form = self._form.stacked(find_stack(now, after))
                self._is_form_known = True
            self._keep(
                ReplayStore.create(self.path, self._form.schema, self.n_envs, frame_stack=self._form.frames)
            )
        self._added = Added(self._index, self.n_envs)

    # ---- adding

    def add(
        self, obs: Any, next_obs: Any, action: Any, reward: Any, done: Any, infos: list[dict[str, Any]]
    ) -> None:
        """Append a transition of each environment, as SB3 hands them over: (n_envs, …) each.

        Raises `SchemaError` if observations are not the frame stacks that they should be, and
        `CommitError` if the last commit failed; the call can then be repeated.
        """
        now, after = self._form.leaves(obs, self.n_envs), self._form.leaves(next_obs, self.n_envs)
        if self._added is None:
            self._begin(now, after)
        begun, following = self._form.blobs(now), self._form.blobs(after)
        begins = self._begins(begun)
        self._form.check(begun, following, begins)
        values = self._values(action, after, reward, done, infos)
        state = self._last, self._has_ended  # to go on from, if what follows has to be repeated
        self._last = []  # should this be interrupted, all begin anew
        try:
            if begins.any():
                self.store.reset(self._lead(self._form.rows(now)), mask=begins)
                state = begun, np.zeros(self.n_envs, bool)
            self.store.step(*[self._lead(value) for value in values])
        except CommitError:
            self._last, self._has_ended = state
            raise
        self._last, self._has_ended = following, values[-2] | values[-1]
        self._count += 1
        self._set_position()

    def _values(
        self,
        action: Any,
        after: Mapping[str, np.ndarray],
        reward: Any,
        done: Any,
        infos: list[dict[str, Any]],
    ) -> tuple[Any, ...]:
        """What `store.step` takes, in its order; (n_envs, …) each."""
        ended = np.asarray(done).reshape(self.n_envs).astype(bool)
        timeout = np.array([info.get("TimeLimit.truncated", False) for info in infos], bool)
        return (
            self._form.actions(action, self.n_envs),
            self._form.rows(after),
            np.asarray(reward, np.float64).reshape(self.n_envs),
            ended & ~timeout,
            ended & timeout,
        )

    def _begins(self, observations: list[tuple[bytes, ...]]) -> np.ndarray:
        """Which environments begin an episode, (n_envs,): those not where their last transition led."""
        if not self._last:
            return np.ones(self.n_envs, bool)
        differs = [one != last for one, last in zip(observations, self._last, strict=True)]
        begins: np.ndarray = self._has_ended | np.array(differs)
        return begins

    def _lead(self, value: Any) -> Any:
        """Values of the environments as the store takes them: without an axis for a single one."""
        if self.n_envs > 1:
            return value
        return {key: leaf[0] for key, leaf in value.items()} if isinstance(value, dict) else value[0]

    def reset(self) -> None:
        """Empty the buffer; the store keeps what it has."""
        self._note()
        self._count = 0
        self._slots.clear()
        self._set_position()

    def _set_position(self) -> None:
        self.pos = self._count % self.buffer_size
        self.full = self._count >= self.buffer_size

    # ---- which transitions stand where

    @cached_property
    def _window(self) -> Transition:
        return Transition(frame_stack=self._form.frames)

    @property
    def _index(self) -> EpisodeIndex:
        return self.store.items(_PLAIN)

    def _fill(self) -> None:
        """Put the newest transitions of the store into the slots."""
        self._slots.fill(*runs_of(self._index))
        self._count = self._slots.count
        self._set_position()

    def _note(self) -> None:
        """Give slots to the transitions added since the last call."""
        wanted = self._count - self._slots.count
        if wanted:
            assert self._added is not None, wanted
            self._slots.put(*self._added.take(self._index, wanted), wanted)

    # ---- sampling

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ReplayBufferSamples:
        return ReplayBufferSamples(*map(self.to_torch, self._batch(batch_inds, env)))

    def _batch(self, slots: np.ndarray, env: VecNormalize | None) -> tuple[Any, ...]:
        """The transitions at some slots, each of an environment drawn as SB3 draws it; as SB3's arrays."""
        envs = np.random.randint(0, high=self.n_envs, size=(len(slots),))  # noqa: NPY002 — SB3's stream
        batch = self._read(slots, envs)
        n = len(slots)
        after = self._normalize_obs(self._form.observations(batch.next_observation, n), env)
        ended = batch.terminated if self.handle_timeout_termination else batch.terminated | batch.truncated
        return (
            self._normalize_obs(self._form.observations(batch.observation, n), env),
            np.asarray(batch.action).reshape(n, self.action_dim).astype(self._action_dtype, copy=False),
            after,
            ended.astype(np.float32).reshape(-1, 1),
            self._normalize_reward(batch.reward.astype(np.float32).reshape(-1, 1), env),
        )

    @cached_property
    def _action_dtype(self) -> Any:
        return self._maybe_cast_dtype(self.action_space.dtype)

    def _read(self, slots: np.ndarray, envs: np.ndarray) -> Batch:
        self._note()
        numbers = self._index.numbers(self._slots.ids[slots, envs])
        missing = int((numbers < 0).sum())
        if missing:
            raise UsageError(
                f"{self.path}: expected all transitions of the buffer, {missing} of {len(slots)} are no"
                " longer in the store; keep at least buffer_size transitions there"
            )
        batch: Batch = self.store.read(numbers, self._window)
        return batch

    # ---- saving

    def __getstate__(self) -> dict[str, Any]:
        """What names the store and the transitions, all of which are durable when this returns."""
        if self._added is not None:
            self._note()
            self.store.flush()
        state = self.__dict__ | {"_probe": self._probe()}
        for name in _OF_THE_PROCESS & state.keys():
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        probe = state.pop("_probe")
        self.__dict__.update(state)
        self._detach()
        if not self._count:
            return
        if not self._exists():
            raise StoreGone(
                f"{self.path}: expected the store of a saved buffer of {self.size() * self.n_envs}"
                " transitions, found none; if it was moved, move it back or link to it"
            )
        self._attach("r")
        if self._probe() != probe:
            self.close()
            raise UsageError(f"{self.path}: expected the store of the saved buffer, found another")

    def _probe(self) -> int:
        """A checksum of a few of the buffer's transitions, from the newest to the oldest."""
        if not self._count:
            return 0
        slots = np.linspace(self._count - 1, self._count - self.size(), PROBES).astype(np.int64)
        batch = self._read(slots % self.buffer_size, np.arange(PROBES) % self.n_envs)
        leaves = self._form.observations(batch.next_observation, PROBES)
        arrays = [*leaves.values()] if isinstance(leaves, dict) else [leaves]
        arrays += [batch.action, batch.reward, batch.terminated, batch.truncated]
        return crc32c(np.concatenate([np.frombuffer(array.tobytes(), np.uint8) for array in arrays]))


class ReplayStoreDictBuffer(ReplayStoreBuffer, DictReplayBuffer):
    """`ReplayStoreBuffer` for observations that are a Dict of arrays.

    It does not relabel goals: `HerReplayBuffer` has a memory of its own.
    """

    def __init__(
        self, buffer_size: int, observation_space: spaces.Dict, action_space: Space, *args: Any, **kwargs: Any
    ) -> None:
        if not isinstance(observation_space, spaces.Dict):
            raise SchemaError(f"observation_space: expected a Dict, got {observation_space}")
        ReplayStoreBuffer.__init__(self, buffer_size, observation_space, action_space, *args, **kwargs)

    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray, env: VecNormalize | None = None
    ) -> DictReplayBufferSamples:
        observation, action, after, ended, reward = self._batch(batch_inds, env)
        return DictReplayBufferSamples(
            {key: self.to_torch(leaf) for key, leaf in observation.items()},
            self.to_torch(action),
            {key: self.to_torch(leaf) for key, leaf in after.items()},
            self.to_torch(ended),
            self.to_torch(reward),
        )


_OF_THE_PROCESS = {"_store", "_closer", "_added", "_last", "_has_ended"}


def _close(store: ReplayStore, process: int) -> None:
    if os.getpid() == process:  # a forked child must leave its parent's store alone
        store.close()
