"""The peers: each holds the same transitions, used as its own documentation recommends. The buffers.

A peer is made in a process of its own, with an empty folder. `sample(n)` is what is timed: it draws
uniformly and gives the batch in the peer's own form. `items(batch)` turns one into numpy arrays, to
be compared once with what was recorded. Every import of a peer is in its class: each is optional.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench_data import Recording, disk_bytes, write_store

PIECE = 1024  # transitions handed to a peer at once while it is filled


class Peer:
    """What every peer has; `transitions` are rows of the recording."""

    drops_final_observation = False  # after an episode's end it gives some other next observation
    uses_torch = False  # then the better of one thread and torch's default is measured

    def __init__(self, recording: Recording, folder: Path) -> None:
        self.recording = recording
        self.folder = folder
        self.rows = recording.transitions()
        self.first = recording.first()
        self.rng = np.random.default_rng(0)
        self.atari = recording.stack > 1
        self.shape = recording.observation.shape[1:]
        self.stacked_shape = (recording.stack, *self.shape) if self.atari else self.shape
        self.fill()

    def fill(self) -> None:
        """Take in the recording."""
        raise NotImplementedError

    def warm(self) -> None:
        """Touch all data once, where it is not in memory yet."""

    def sample(self, n: int) -> Any:
        """Draw n transitions uniformly."""
        raise NotImplementedError

    def items(self, batch: Any) -> dict[str, np.ndarray]:
        """A batch as arrays: observation, action, reward, next_observation, and terminated if it has it."""
        raise NotImplementedError

    def nbytes(self) -> int:
        """Bytes that the transitions take, in memory or on disk."""
        return disk_bytes(self.folder)

    def pieces(self) -> Iterator[dict[str, np.ndarray]]:
        """The transitions in order, some at a time; no piece crosses an episode's end."""
        for start, stop in self.recording.episodes():
            for a in range(start, stop - 1, PIECE):
                yield self.transitions(np.arange(a, min(a + PIECE, stop - 1)))

    def transitions(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The recorded transitions of these rows."""
        recording = self.recording
        columns = {name: recording_column(recording, name)[rows] for name in FLAT}
        observation = recording.stacked(rows, self.first)
        return {
            "observation": observation,
            "next_observation": recording.stacked(rows + 1, self.first),
            **columns,
        }

    def spaces(self) -> tuple[Any, Any]:
        """Gymnasium's spaces of what an agent sees and does."""
        from gymnasium import spaces

        if self.atari:
            return spaces.Box(0, 255, self.stacked_shape, np.uint8), spaces.Discrete(18)
        return spaces.Box(-np.inf, np.inf, self.shape, np.float64), spaces.Box(-1, 1, (6,), np.float32)


FLAT = ("action", "reward", "terminated", "truncated")


def recording_column(recording: Recording, name: str) -> np.ndarray:
    return np.asarray(getattr(recording, name))


# ---- replaystore


class Replaystore(Peer):
    """`store.sample` with the defaults."""

    cache_bytes: int | None = None

    def fill(self) -> None:
        from replaystore import ReplayStore, Transition

        self.path = self.folder.parent / f"replaystore-{len(self.rows)}"
        if not self.path.exists():
            partial = self.path.with_suffix(".partial")
            write_store(partial, self.recording)
            partial.rename(self.path)
        self.window = Transition(frame_stack=self.recording.stack)
        options = {} if self.cache_bytes is None else {"cache_bytes": self.cache_bytes}
        self.store = ReplayStore.open(self.path, **options)

    def warm(self) -> None:
        for start in range(0, len(self.store), 4096):
            self.store.read(np.arange(start, min(start + 4096, len(self.store))), self.window)

    def sample(self, n: int) -> Any:
        return self.store.sample(n, self.window, self.rng)

    def items(self, batch: Any) -> dict[str, np.ndarray]:
        names = ("observation", "action", "reward", "next_observation", "terminated")
        return {name: np.asarray(getattr(batch, name)) for name in names}

    def nbytes(self) -> int:
        return disk_bytes(self.path)


class ReplaystoreCached(Replaystore):
    """The same with a `cache_bytes` that all frames fit into."""

    cache_bytes = 1 << 34

    def fill(self) -> None:
        rows = self.recording.observation
        self.cache_bytes = int(rows.nbytes * 1.25) + (1 << 23)
        super().fill()


class ReplaystoreLoader(Replaystore):
    """`dataset.loader`: dicts of tensors."""

    num_workers = 0

    def fill(self) -> None:
        super().fill()
        from replaystore.dataset import ReplayDataset

        self.dataset = ReplayDataset(self.path, self.window)
        self.batches: dict[int, Iterator[Any]] = {}

    def warm(self) -> None:
        if self.num_workers == 0:
            dataset = self.dataset
            for start in range(0, len(dataset), 4096):
                dataset.batch(np.arange(start, min(start + 4096, len(dataset))))

    def sample(self, n: int) -> Any:
        if n not in self.batches:
            self.batches.clear()  # the workers of another batch size end
            self.batches[n] = self.forever(n)
            for _ in range(len(self.dataset) // n if self.num_workers else 0):  # while workers start
                next(self.batches[n])
        return next(self.batches[n])

    def forever(self, n: int) -> Iterator[Any]:
        """Batches of n, epoch after epoch."""
        loader = self.dataset.loader(
            batch_size=n,
            num_workers=self.num_workers,
            drop_last=True,
            persistent_workers=self.num_workers > 0,
        )
        while True:
            yield from loader

    def items(self, batch: Any) -> dict[str, np.ndarray]:
        return {name: batch[name].numpy() for name in ("observation", "action", "reward", "next_observation")}


class ReplaystoreLoader2(ReplaystoreLoader):
    """`dataset.loader(num_workers=2)`."""

    num_workers = 2


# ---- replay buffers


class StableBaselines(Peer):
    """`ReplayBuffer` in RAM; frame stacks stored whole, as VecFrameStack gives them."""

    drops_final_observation = True
    uses_torch = True

    def fill(self) -> None:
        from stable_baselines3.common.buffers import ReplayBuffer

        options = {"optimize_memory_usage": True, "handle_timeout_termination": False}
        self.buffer = ReplayBuffer(len(self.rows), *self.spaces(), device="cpu", n_envs=1, **options)
        position = 0
        for piece in self.pieces():  # by assignment: a million calls of add take minutes
            part = slice(position, position + len(piece["reward"]))
            self.buffer.observations[part, 0] = piece["observation"]
            self.buffer.actions[part, 0] = piece["action"].reshape(len(piece["reward"]), -1)
            self.buffer.rewards[part, 0] = piece["reward"]
            self.buffer.dones[part, 0] = piece["terminated"] | piece["truncated"]
            position = part.stop
        self.buffer.full = True

    def sample(self, n: int) -> Any:
        return self.buffer.sample(n)

    def items(self, batch: Any) -> dict[str, np.ndarray]:
        return {
            "observation": batch.observations.numpy(),
            "action": batch.actions.numpy().reshape(len(batch.actions), *self.recording.action.shape[1:]),
            "reward": batch.rewards.numpy()[:, 0],
            "next_observation": batch.next_observations.numpy(),
        }

    def nbytes(self) -> int:
        names = ("observations", "actions", "rewards", "dones")
        return sum(getattr(self.buffer, name).nbytes for name in names)


class ExtraBuffers(StableBaselines):
    """`CompressedReplayBuffer` with the compression that its documentation calls fast."""

    method = "lz4-block/1"

    def fill(self) -> None:
        from sb3_extra_buffers.compressed import CompressedReplayBuffer, find_buffer_dtypes

        if not self.atari:
            raise NotImplementedError("compresses images; for vectors it is SB3's own buffer")
        observation_space, action_space = self.spaces()
        kwargs = {"obs_shape": observation_space.shape, "elem_dtype": np.uint8}
        dtypes = find_buffer_dtypes(**kwargs, compression_method=self.method)
        self.buffer = CompressedReplayBuffer(
            len(self.rows),
            observation_space,
            action_space,
            device="cpu",
            optimize_memory_usage=True,
            handle_timeout_termination=False,
            dtypes=dtypes,
            compression_method=self.method,
        )
        for piece in self.pieces():
            done = piece["terminated"] | piece["truncated"]
            for i in range(len(done)):
                one = slice(i, i + 1)
                observations = (piece["observation"][one], piece["next_observation"][one])
                self.buffer.add(*observations, piece["action"][one], piece["reward"][one], done[one], [{}])

    def nbytes(self) -> int:
        compressed = sum(len(data) for data in self.buffer.observations.ravel() if data is not None)
        names = ("observations", "actions", "rewards", "dones")
        return compressed + sum(getattr(self.buffer, name).nbytes for name in names)


class ExtraBuffersZstd(ExtraBuffers):
    """The same with the compression that it recommends."""

    method = "zstd-3"


class TorchRL(Peer):
    """`TensorDictReplayBuffer` over `LazyMemmapStorage`."""

    uses_torch = True

    def fill(self) -> None:
        import torch
        from tensordict import TensorDict
        from torchrl.data import LazyMemmapStorage, TensorDictReplayBuffer

        storage = LazyMemmapStorage(len(self.rows), scratch_dir=str(self.folder))
        self.buffer = TensorDictReplayBuffer(storage=storage, batch_size=256)
        for piece in self.pieces():
            tensors = {name: torch.from_numpy(array) for name, array in piece.items()}
            after = {"observation": tensors.pop("next_observation")}
            after |= {name: tensors.pop(name)[:, None] for name in ("reward", "terminated", "truncated")}
            self.buffer.extend(TensorDict({**tensors, "next": after}, [len(piece["reward"])]))

    def sample(self, n: int) -> Any:
        return self.buffer.sample(n)

    def items(self, batch: Any) -> dict[str, np.ndarray]:
        after = batch["next"]
        return {
            "observation": batch["observation"].numpy(),
            "action": batch["action"].numpy(),
            "reward": after["reward"].numpy()[:, 0],
            "next_observation": after["observation"].numpy(),
            "terminated": after["terminated"].numpy()[:, 0],
        }


class Cpprb(Peer):
    """`ReplayBuffer` in files (`mmap_prefix`), next observations shared (`next_of`)."""

    mapped = True
    numbers: Any = None  # of vectors; None is the recording's own dtype

    def fill(self) -> None:
        from cpprb import ReplayBuffer

        dtype = self.numbers or self.recording.observation.dtype
        fields = {
            "obs": {"shape": self.stacked_shape, "dtype": dtype},
            "act": {"shape": self.recording.action.shape[1:] or 1, "dtype": self.recording.action.dtype},
            "rew": {"dtype": np.float32 if self.numbers else np.float64},
            "done": {"dtype": np.bool_},
        }
        options = {"mmap_prefix": str(self.folder / "cpprb")} if self.mapped else {}
        self.buffer = ReplayBuffer(len(self.rows), fields, next_of="obs", **options)
        for start, stop in self.recording.episodes():
            for a in range(start, stop - 1, PIECE):
                piece = self.transitions(np.arange(a, min(a + PIECE, stop - 1)))
                self.buffer.add(
                    obs=piece["observation"],
                    next_obs=piece["next_observation"],
                    act=piece["action"],
                    rew=piece["reward"],
                    done=piece["terminated"],
                )
            self.buffer.on_episode_end()

    def sample(self, n: int) -> Any:
        return self.buffer.sample(n)

    def items(self, batch: Any) -> dict[str, np.ndarray]:
        return {
            "observation": batch["obs"],
            "action": batch["act"].reshape(-1, *self.recording.action.shape[1:]),
            "reward": batch["rew"][:, 0],
            "next_observation": batch["next_obs"],
            "terminated": batch["done"][:, 0],
        }

    def nbytes(self) -> int:
        if self.mapped:
            return super().nbytes()
        return sum(array.nbytes for array in self.buffer.get_all_transitions().values()) // 2


class CpprbMemory(Cpprb):
    """The same in RAM."""

    mapped = False


class CpprbSingle(CpprbMemory):
    """In RAM with float32, which is cpprb's default: half the bytes of what was recorded."""

    numbers = np.float32


class Tianshou(Peer):
    """`ReplayBuffer(stack_num=4, save_only_last_obs=True, ignore_obs_next=True)`, as for Atari."""

    drops_final_observation = True

    def fill(self) -> None:
        from tianshou.data import Batch, ReplayBuffer

        if not self.atari:
            return self.fill_vectors()
        options = {"stack_num": 4, "save_only_last_obs": True, "ignore_obs_next": True}
        self.buffer = ReplayBuffer(len(self.rows), **options)
        for piece in self.pieces():
            for i in range(len(piece["reward"])):
                values = {new: piece[old][i] for new, old in TIANSHOU.items()}
                self.buffer.add(Batch(obs=piece["observation"][i], info={}, **values))
        return None

    def fill_vectors(self) -> None:
        from tianshou.data import ReplayBuffer

        parts = list(self.pieces())
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        done = columns["terminated"] | columns["truncated"]
        values = {new: columns[old] for new, old in TIANSHOU.items()}
        self.drops_final_observation = False
        observations = {"obs": columns["observation"], "obs_next": columns["next_observation"]}
        self.buffer = ReplayBuffer.from_data(**observations, **values, done=done)

    def sample(self, n: int) -> Any:
        return self.buffer.sample(n)[0]

    def items(self, batch: Any) -> dict[str, np.ndarray]:
        return {
            "observation": batch.obs,
            "action": batch.act,
            "reward": batch.rew,
            "next_observation": batch.obs_next,
            "terminated": batch.terminated,
        }

    def nbytes(self) -> int:
        return sum(np.asarray(array).nbytes for array in self.buffer._meta.__dict__.values() if len(array))


TIANSHOU = {"act": "action", "rew": "reward", "terminated": "terminated", "truncated": "truncated"}
