"""What safety costs: sampling with checksums and without, commits with syncs and without.

Also what the compiled code of the read path saves.

Each pair is measured in turns on one store of real Breakout frames; printed are medians and ratios.
"""

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import ale_py
import gymnasium as gym
import numpy as np
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

from replaystore import ReplayStore, Transition, codec, files
from replaystore.recorder import RecordReplay


def record(path: Path, steps: int) -> None:
    gym.register_envs(ale_py)
    env = AtariPreprocessing(gym.make("ALE/Breakout-v5", frameskip=1))
    recorder = RecordReplay(FrameStackObservation(env, 4), path)
    recorder.action_space.seed(0)
    recorder.reset(seed=0)
    for _ in range(steps):
        _, _, terminated, truncated, _ = recorder.step(recorder.action_space.sample())
        if terminated or truncated:
            recorder.reset()
    recorder.close()


def in_turns(first: Callable[[], None], second: Callable[[], None], rounds: int) -> tuple[float, float]:
    """Median seconds of each, run in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, into in zip((first, second), times, strict=True):
            start = time.perf_counter()
            run()
            into.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def _right(address: int, nbytes: int) -> int:
    return codec.RESIDUE


def _compiled_right(folder: Path) -> int:
    """The address of a C function that does the same, for the compiled way; needs a C compiler."""
    source = f"unsigned right(const void *data, unsigned long nbytes) {{ return {codec.RESIDUE}u; }}"
    command = ["cc", "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / "right.so")]
    subprocess.run(command, input=source, text=True, check=True)
    return codec._address(ctypes.CDLL(str(folder / "right.so")).right)


def without_checksums(run: Callable[[], None], folder: Path) -> Callable[[], None]:
    address = _compiled_right(folder) if codec.COMPILED else 0

    def unchecked() -> None:
        with (
            mock.patch.object(codec, "checksum_at", _right),
            mock.patch.object(codec, "CRC32C_ADDRESS", address),
        ):
            run()

    return unchecked


def without_compiled_code(run: Callable[[], None]) -> Callable[[], None]:
    def interpreted() -> None:
        with mock.patch.object(codec, "COMPILED", None):
            run()

    return interpreted


def without_syncs(run: Callable[[], None]) -> Callable[[], None]:
    class NoSync:
        def __getattr__(self, name: str) -> object:
            return (lambda descriptor: None) if name == "fsync" else getattr(os, name)

    os = files.os

    def unsynced() -> None:
        with mock.patch.object(files, "os", NoSync()):
            run()

    return unsynced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000, help="frames to record")
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "breakout.replay"
        record(path, options.steps)
        with ReplayStore.open(path, "a") as store:
            rng, window = np.random.default_rng(0), Transition(frame_stack=4)
            for size in (32, 256):

                def sample(size: int = size) -> None:
                    for _ in range(2048 // size):
                        store.sample(size, window, rng)

                checked, unchecked = in_turns(sample, without_checksums(sample, Path(folder)), options.rounds)
                rates = f"{2048 / checked:,.0f}/s with checksums, {2048 / unchecked:,.0f}/s without"
                print(f"sampling, batch {size}: {rates}: {checked / unchecked:.3f}x the time")
                compiled, interpreted = in_turns(sample, without_compiled_code(sample), options.rounds)
                print(f"  without compiled code {interpreted / compiled:.3f}x the time")
            frame = np.zeros((84, 84), np.uint8)
            store.reset(frame)

            def commit() -> None:
                store.step(0, frame, 0.0, False, False)
                store.flush()

            synced, unsynced = in_turns(commit, without_syncs(commit), options.rounds)
            print(f"a commit of one step: {synced * 1e3:.2f} ms, without syncs {unsynced * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
