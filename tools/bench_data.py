"""What is measured on: recorded Atari frames, HalfCheetah-shaped rows, and stores made of them.

A recording is rows as the store has them: an observation, and what was done from it; the last row
of an episode holds its final observation alone. It is kept in a folder of plain `.npy` files, so
that every process maps the same frames.
"""

import itertools
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from replaystore import Field, ReplayStore, Schema

GAMES = {"Breakout": "ALE/Breakout-v5", "MsPacman": "ALE/MsPacman-v5"}
COLUMNS = ("observation", "action", "reward", "terminated", "truncated", "begins")


class Recording(NamedTuple):
    """Rows in order; `begins` marks the first row of an episode. `stack` frames are an observation."""

    observation: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    begins: np.ndarray
    stack: int

    def head(self, transitions: int) -> "Recording":
        """The first rows, as many as hold this many transitions; the last episode is cut short."""
        rows = int(self.transitions()[transitions - 1]) + 2
        return self._replace(**{name: getattr(self, name)[:rows] for name in COLUMNS})

    def transitions(self) -> np.ndarray:
        """The row of each transition, in order."""
        return np.flatnonzero(~self.begins[1:])

    def first(self) -> np.ndarray:
        """The first row of every row's episode."""
        return np.maximum.accumulate(np.where(self.begins, np.arange(len(self.begins)), 0))

    def episodes(self) -> list[tuple[int, int]]:
        """The rows of each episode of at least one transition: from, to."""
        starts = [*np.flatnonzero(self.begins).tolist(), len(self.begins)]
        return [(a, b) for a, b in itertools.pairwise(starts) if b - a > 1]

    def stacked(self, rows: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Observations as the agent saw them: `(batch, stack, …)`, the first row repeated before it."""
        if self.stack == 1:
            return np.asarray(self.observation[rows])
        frames = rows[:, None] + np.arange(1 - self.stack, 1)
        return np.asarray(self.observation[np.maximum(frames, first[rows][:, None])])


# ---- recording


def record_atari(game: str, rows: int, folder: Path) -> None:
    """Play with a random policy, preprocessed as everybody does, and keep the frames."""
    import ale_py
    import gymnasium
    from gymnasium.wrappers import AtariPreprocessing

    gymnasium.register_envs(ale_py)
    env = AtariPreprocessing(gymnasium.make(GAMES[game], frameskip=1))
    env.action_space.seed(0)
    arrays = _empty_rows(rows, (84, 84), np.uint8, action=np.zeros(rows, np.int64))
    arrays["observation"][0], _ = env.reset(seed=0)
    arrays["begins"][0] = True
    row = 0
    while row + 1 < rows:
        action = env.action_space.sample()
        observation, reward, terminated, truncated, _ = env.step(action)
        done = (action, reward, terminated, truncated)
        for name, value in zip(("action", "reward", "terminated", "truncated"), done, strict=True):
            arrays[name][row] = value
        row += 1
        arrays["observation"][row] = observation
        if (terminated or truncated) and row + 1 < rows:
            row += 1
            arrays["observation"][row], _ = env.reset()
            arrays["begins"][row] = True
    _save(folder, arrays)


def make_cheetah(rows: int, folder: Path) -> None:
    """Rows of HalfCheetah's shapes and dtypes: 17 + 6 numbers, episodes of 1,000 steps, truncated."""
    rng = np.random.default_rng(0)
    action = rng.uniform(-1, 1, (rows, 6)).astype(np.float32)
    arrays = _empty_rows(rows, (17,), np.float64, action=action)
    arrays["observation"][:] = rng.standard_normal((rows, 17))
    arrays["reward"][:] = rng.standard_normal(rows)
    arrays["begins"][::1001] = True
    arrays["truncated"][999::1001] = True
    _save(folder, arrays)


def load(folder: Path) -> Recording:
    """Map a recording."""
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
    return Recording(**arrays, stack=4 if arrays["observation"].ndim == 3 else 1)


def recorded_rows(folder: Path) -> int:
    """How many rows a folder has, 0 if there is no recording."""
    path = folder / "begins.npy"
    return len(np.load(path, mmap_mode="r")) if path.exists() else 0


def _empty_rows(rows: int, shape: tuple[int, ...], dtype: Any, *, action: np.ndarray) -> dict[str, Any]:
    flags = {name: np.zeros(rows, bool) for name in ("terminated", "truncated", "begins")}
    return {
        "observation": np.zeros((rows, *shape), dtype),
        "action": action,
        "reward": np.zeros(rows),
        **flags,
    }


def _save(folder: Path, arrays: dict[str, Any]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in COLUMNS:  # `begins` last: it is what says that the recording is whole
        np.save(folder / f"{name}.npy", arrays[name])


# ---- stores


def schema_of(recording: Recording) -> Schema:
    """A store's schema with the defaults of the library."""
    return Schema(
        [
            Field("observation", recording.observation.shape[1:], recording.observation.dtype),
            Field("action", recording.action.shape[1:], recording.action.dtype),
            Field("reward", (), "float64"),
            Field("terminated", (), "bool"),
            Field("truncated", (), "bool"),
        ]
    )


def write_store(path: Path, recording: Recording) -> None:
    """Write all episodes of a recording."""
    shutil.rmtree(path, ignore_errors=True)
    with ReplayStore.create(path, schema_of(recording)) as store:
        for start, stop in recording.episodes():
            store.add_episode(
                observation=recording.observation[start:stop],
                action=recording.action[start : stop - 1],
                reward=recording.reward[start : stop - 1],
                terminated=recording.terminated[start : stop - 1],
                truncated=recording.truncated[start : stop - 1],
            )


def write_long_store(path: Path, recording: Recording, transitions: int) -> None:
    """Write episodes of 500 steps, from the rows of a recording over and over."""
    shutil.rmtree(path, ignore_errors=True)
    truncated = np.zeros(500, bool)
    truncated[-1] = True
    with ReplayStore.create(path, schema_of(recording)) as store:
        for episode in range(transitions // 500):
            start = episode * 501 % (len(recording.begins) - 501)
            steps = slice(start, start + 500)
            store.add_episode(
                observation=recording.observation[start : start + 501],
                action=recording.action[steps],
                reward=recording.reward[steps],
                terminated=np.zeros(500, bool),
                truncated=truncated,
            )


def like_cartpole(recording: Recording) -> Recording:
    """A recording of vectors in CartPole's shapes: four of the numbers, a number for an action."""
    observation = np.asarray(recording.observation[:, :4], np.float32)
    return recording._replace(observation=observation, action=np.zeros(len(observation), np.int64))


def multiply_store(source: Path, path: Path, copies: int) -> None:
    """A store of as many copies of one stream: merging stores is moving their streams."""
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(source, path)
    for stream in range(1, copies):
        shutil.copytree(path / "streams" / "000000", path / "streams" / f"{stream:06d}")


def disk_bytes(path: Path) -> int:
    """Bytes of the disk blocks of everything below a path."""
    found = [Path(folder, name) for folder, _, names in os.walk(path) for name in [".", *names]]
    return sum(file.lstat().st_blocks * 512 for file in found)


# ---- memory limits


def cgroup_root() -> Path | None:
    """Where memory control groups can be made, or None."""
    one, two = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    if (one / "memory.limit_in_bytes").exists() and os.access(one, os.W_OK):
        return one
    control = two / "cgroup.subtree_control"
    if control.exists() and os.access(two, os.W_OK) and "memory" in control.read_text():
        return two
    return None


def available_memory() -> int:
    """Bytes that processes can still have, page cache that can be dropped included."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))


class MemoryLimit:
    """A control group whose processes may hold `nbytes`, page cache included."""

    def __init__(self, root: Path, nbytes: int) -> None:
        self.path = root / f"replaystore-bench-{os.getpid()}-{nbytes}"
        self.path.mkdir(exist_ok=True)
        names = ("memory.limit_in_bytes", "memory.max")
        limit = next(self.path / name for name in names if (self.path / name).exists())
        limit.write_text(str(nbytes))

    def join(self) -> None:
        """Put the calling process under the limit."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def remove(self) -> None:
        """Remove the group, once its processes have ended."""
        self.path.rmdir()
