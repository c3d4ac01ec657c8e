"""Record Breakout, check every stored value, and measure what recording costs.

    python tools/check_atari.py --steps 50000

A random policy plays Breakout as 84×84 grey frames in stacks of four. Whatever the wrapper
returned is also kept in memory and compared, element by element, with the stored arrays as the
package, zarr and tensorstore read them. Vectors of four games, in each autoreset mode, are
compared with games that are played one by one. The same loop, with and without recording, is
timed in turns. Exit status 1 if a value differs or a figure is above its bar.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import tensorstore
import zarr
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

from replaystore import ReplayStore, Transition
from replaystore.recorder import RecordReplay, RecordVectorReplay

MAX_BYTES = 150  # a transition
MAX_RATIO = 1.05
STACK = 4
NUM_ENVS = 4
FIELDS = ("observation", "action", "reward", "terminated", "truncated")
WRAPPERS = (AtariPreprocessing, lambda env: FrameStackObservation(env, STACK))

Rows = dict[str, np.ndarray]  # of one episode: L+1 observations, L of the rest


def make_env(game: str = "Breakout") -> gym.Env:
    env = gym.make(f"ALE/{game}-v5", frameskip=1)
    for wrapper in WRAPPERS:
        env = wrapper(env)
    return env


# ---- every stored value


def record(path: Path, steps: int, seed: int) -> list[Rows]:
    """Record, and return copies of what came from the environment, one item an episode."""
    env = RecordReplay(make_env(), path)
    env.action_space.seed(seed)
    episodes, left = [], steps
    observation, _ = env.reset(seed=seed)
    while left:
        episodes.append(play_episode(env, observation, left))
        left -= len(episodes[-1]["reward"])
        if left:
            observation, _ = env.reset()
    env.close()
    return episodes


def play_episode(env: gym.Env, observation: np.ndarray, limit: int) -> Rows:
    frames, rest, over = [observation[-1].copy()], [], False
    while not over and len(rest) < limit:
        action = env.action_space.sample()
        observation, reward, terminated, truncated, _ = env.step(action)
        frames.append(observation[-1].copy())
        rest.append((action, float(reward), terminated, truncated))
        over = terminated or truncated
    columns = [np.array(column) for column in zip(*rest, strict=True)]
    return dict(zip(FIELDS, [np.array(frames), *columns], strict=True))


def read_by_package(path: Path) -> Iterator[Rows]:
    with ReplayStore.open(path) as store:
        for number in range(store.num_episodes):
            yield store.episode(number)


def read_by_zarr(path: Path) -> Iterator[Rows]:
    arrays = zarr.open_group(path, mode="r")["streams/000000"]
    for first, length in places(path):
        yield {name: arrays[name][rows(name, first, length), 0] for name in FIELDS}


def read_by_tensorstore(path: Path) -> Iterator[Rows]:
    def open_array(name: str) -> Any:
        kvstore = {"driver": "file", "path": str(path / "streams" / "000000" / name)}
        return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()

    arrays = {name: open_array(name) for name in FIELDS}
    for first, length in places(path):
        yield {name: arrays[name][rows(name, first, length), 0].read().result() for name in FIELDS}


def places(path: Path) -> list[tuple[int, int]]:
    """First row and length of each episode."""
    with ReplayStore.open(path) as store:
        table = store.episodes
    return list(zip(table["first_row"].to_pylist(), table["length"].to_pylist(), strict=True))


def rows(name: str, first: int, length: int) -> slice:
    return slice(first, first + length + (name == "observation"))


def count_differences(expected: list[Rows], found: Iterator[Rows]) -> int:
    """How many values differ; an array of another dtype or shape differs in all of them."""
    different = 0
    for wanted, got in zip(expected, found, strict=True):
        for name in FIELDS:
            same_kind = (wanted[name].dtype, wanted[name].shape) == (got[name].dtype, got[name].shape)
            different += int((wanted[name] != got[name]).sum()) if same_kind else wanted[name].size
    return different


def check_values(path: Path, steps: int) -> bool:
    print(f"{steps:,} steps of Breakout, every stored value")
    expected = record(path, steps, seed=0)
    values = sum(episode[name].size for episode in expected for name in FIELDS)
    readers = {"the package": read_by_package, "zarr": read_by_zarr, "tensorstore": read_by_tensorstore}
    good = True
    for name, read in readers.items():
        different = count_differences(expected, read(path))
        good &= tell(f"values that differ, read by {name}", f"{different} of {values:,}", different == 0)
    return good & check_bytes(path, steps)


def check_bytes(path: Path, steps: int) -> bool:
    with ReplayStore.open(path) as store:
        nbytes = store.nbytes
        tell("episodes", f"{store.num_episodes:,}")
        complete = tell("transitions", f"{len(store):,}", len(store) == steps)
    used = subprocess.run(["du", "-s", "--block-size=1", path], capture_output=True, check=True)
    counted = int(used.stdout.split()[0])
    tell("bytes on disk, by the store", f"{nbytes:,}")
    tell("bytes on disk, by du", f"{counted:,}")
    each = max(nbytes, counted) / steps
    return complete & tell(f"bytes a transition (bar {MAX_BYTES})", f"{each:.1f}", each <= MAX_BYTES)


# ---- vectors


def digest(*values: Any) -> bytes:
    """A transition as something to count."""
    whole = blake2b(digest_size=16)
    for value in values:
        whole.update(np.ascontiguousarray(value))
    return whole.digest()


def play_vector(path: Path, mode: AutoresetMode, actions: np.ndarray) -> None:
    envs = gym.make_vec(
        "ALE/Breakout-v5",
        NUM_ENVS,
        "sync",
        wrappers=WRAPPERS,
        vector_kwargs={"autoreset_mode": mode},
        frameskip=1,
    )
    recorder = RecordVectorReplay(envs, path)
    recorder.reset(seed=0)
    for action in actions:
        _, _, terminated, truncated, _ = recorder.step(action)
        ended = terminated | truncated
        if mode is AutoresetMode.DISABLED and ended.any():
            recorder.reset(options={"reset_mask": ended})
    recorder.close()


def play_singly(mode: AutoresetMode, actions: np.ndarray) -> Counter[bytes]:
    """The transitions of games played one by one, with the actions of the vector."""
    counted: Counter[bytes] = Counter()
    for seed, column in enumerate(actions.T):
        env, ended = make_env(), False
        observation, _ = env.reset(seed=seed)
        for action in column:
            if ended:
                observation, _ = env.reset()
                ended = False
                if mode is AutoresetMode.NEXT_STEP:
                    continue
            before = observation
            observation, reward, terminated, truncated, _ = env.step(action)
            counted[digest(before, action, float(reward), observation, terminated, truncated)] += 1
            ended = terminated or truncated
        env.close()
    return counted


def count_stored(path: Path) -> Counter[bytes]:
    counted: Counter[bytes] = Counter()
    with ReplayStore.open(path) as store:
        for start in range(0, len(store), 256):
            numbers = np.arange(start, min(start + 256, len(store)))
            batch = store.read(numbers, Transition(frame_stack=STACK))
            parts = (batch.observation, batch.action, batch.reward, batch.next_observation)
            counted.update(map(digest, *parts, batch.terminated, batch.truncated))
    return counted


def check_vectors(folder: Path, steps: int) -> bool:
    print(f"\n{steps:,} steps of {NUM_ENVS} Breakouts in a vector, every transition")
    actions = np.random.default_rng(0).integers(4, size=(-(-steps // NUM_ENVS), NUM_ENVS))
    good = True
    for mode in AutoresetMode:
        path = folder / mode.name
        play_vector(path, mode, actions)
        stored, expected = count_stored(path), play_singly(mode, actions)
        wrong = (stored - expected).total() + (expected - stored).total()
        shown = f"{wrong} of {expected.total():,}"
        good &= tell(f"transitions missing or too many, {mode.name}", shown, wrong == 0)
    return good


# ---- what recording costs


def step_through(env: gym.Env, actions: np.ndarray) -> None:
    for action in actions:
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()


def time_in_turns(path: Path, game: str, steps: int, block: int) -> tuple[np.ndarray, float]:
    """Seconds of blocks, (blocks, 3, 2): bare, recorded, the flush after it; and those of `close`.

    The flush keeps the background commit of a recorded block out of the bare block that follows.
    """
    bare, recorded = make_env(game), RecordReplay(make_env(game), path)
    for env in (bare, recorded):
        env.reset(seed=0)
    blocks = np.random.default_rng(0).integers(4, size=(max(1, steps // block), block))
    seconds = np.zeros((len(blocks), 3, 2))
    for number, actions in enumerate(blocks):
        for turn in (number % 2, 1 - number % 2):
            env = (bare, recorded)[turn]
            seconds[number, turn] = time_call(lambda env=env, actions=actions: step_through(env, actions))
            if turn == 1:
                seconds[number, 2] = time_call(recorded.store.flush)
    return seconds, time_call(recorded.close)[0]


def time_call(call: Callable[[], None]) -> tuple[float, float]:
    """Seconds that a call takes, and those of all the process's threads on a CPU."""
    start, cpu_start = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - cpu_start


def check_time(path: Path, game: str, steps: int, block: int) -> bool:
    print(f"\n{steps:,} steps of {game} with and without recording, in turns of {block:,}")
    seconds, close = time_in_turns(path, game, steps, block)
    bare, recorded, flush = (seconds[:, number] for number in range(3))  # each (blocks, 2): wall, CPU
    tell("µs a step, bare", f"{np.median(bare[:, 0]) / block * 1e6:.1f}")
    tell("µs a step, recorded", f"{np.median(recorded[:, 0]) / block * 1e6:.1f}")
    tell("ms of the flush after a turn", f"{np.median(flush[:, 0]) * 1e3:.1f}")
    tell("ms of close", f"{close * 1e3:.1f}")
    with_flush, cpu = np.median((recorded + flush) / bare, axis=0)
    tell("ratio of CPU times, with the flush and all threads", f"{cpu:.3f}")
    tell("ratio, with the flush", f"{with_flush:.3f}")
    ratio = np.median(recorded / bare, axis=0)[0]
    return tell(f"ratio, median of the turns' (bar {MAX_RATIO})", f"{ratio:.3f}", ratio <= MAX_RATIO)


def tell(what: str, value: str, good: bool | None = None) -> bool:
    mark = "" if good is None else "ok" if good else "FAILED"
    print(f"  {what:<52} {value:>24} {mark}", flush=True)
    return good is not False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50_000, help="to record and compare")
    parser.add_argument("--vector-steps", type=int, default=20_000, help="of each mode; 0 for none")
    parser.add_argument("--timed-steps", type=int, default=50_000, help="of each loop; 0 for none")
    parser.add_argument("--timed-game", default="Breakout", help="of the loops that are timed")
    parser.add_argument("--block", type=int, default=2_000, help="steps until the loops take turns")
    options = parser.parse_args()
    gym.register_envs(ale_py)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    with tempfile.TemporaryDirectory(prefix="check_atari.") as folder:
        good = check_values(Path(folder) / "single", options.steps)
        if options.vector_steps:
            good &= check_vectors(Path(folder), options.vector_steps)
        if options.timed_steps:
            good &= check_time(Path(folder) / "timed", options.timed_game, options.timed_steps, options.block)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
