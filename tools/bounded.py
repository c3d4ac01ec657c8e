"""Appends many times a store's capacity and prints what is on disk, how fast it went, what is drawn.

    python tools/bounded.py --steps 10000000 --capacity 100000
    python tools/bounded.py --frames --steps 1000000 --capacity 100000

Exits with 1 if more transitions than the capacity and one file were ever on disk, if a transition
that was sampled is wrong, or if draws are not uniform over what is kept.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from replaystore import Field, ReplayStore, Schema, Transition
from replaystore.arena import stream_path
from replaystore.files import disk_usage, list_directory
from replaystore.head import HEAD, decode_head, read_head
from replaystore.verify import verify

EPISODE = 200
LOOKS = 200  # at the disk


def schema(*, frames: bool) -> Schema:
    observation = Field("observation", (84, 84), "uint8") if frames else Field("observation", (4,), "float32")
    flags = [Field(name, (), "bool") for name in ("terminated", "truncated")]
    return Schema([observation, Field("action", (), "int64"), Field("reward", (), "float32"), *flags])


class Source:
    """Observations that tell their number: its value, or its bytes along a frame's first row."""

    def __init__(self, *, frames: bool) -> None:
        self._frames = (
            np.random.default_rng(0).integers(0, 40, (64, 84, 84)).astype(np.uint8) if frames else None
        )

    def __call__(self, number: int) -> np.ndarray:
        if self._frames is None:
            return np.full(4, number % (1 << 20), np.float32)
        frame = self._frames[number % 64]
        frame[0, :8] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
        return frame

    def numbers(self, observations: np.ndarray) -> np.ndarray:
        if self._frames is None:
            return observations[:, 0].astype(np.int64)
        return np.ascontiguousarray(observations[:, 0, :8]).view("<i8")[:, 0]

    def expected(self, numbers: np.ndarray) -> np.ndarray:
        return numbers if self._frames is not None else numbers % (1 << 20)


def record_part(store: ReplayStore, source: Source, part: int, steps: int) -> float:
    """Record one of the `LOOKS` parts of all steps; how many steps that were for a second of CPU time."""
    numbers = range(part * steps // LOOKS, (part + 1) * steps // LOOKS)
    start = time.process_time()
    for number in numbers:
        if number % EPISODE == 0:
            store.reset(source(number))
        ends = number % EPISODE == EPISODE - 1
        store.step(number, source(number + 1), 1.0, ends, False)
    return len(numbers) / (time.process_time() - start)


def on_disk(store: ReplayStore) -> int:
    """Transitions from the first file that is there, of the field that has most of them."""
    path = stream_path(store.path, 0)
    head = decode_head(read_head(path), store.schema, path / HEAD)
    rows = []
    for field in store.schema.fields:
        folder = path / field.name / "c"
        first = min((int(name) for name in list_directory(folder)), default=0) if folder.is_dir() else 0
        rows.append(int(head.rows.max()) - first * store.schema.shard_rows(field, head.num_envs))
    return max(rows) * EPISODE // (EPISODE + 1)


def is_right(store: ReplayStore, source: Source, rng: np.random.Generator) -> bool:
    batch = store.sample(256, Transition(), rng)
    following = np.array_equal(source.numbers(batch.next_observation), source.expected(batch.action + 1))
    return following and np.array_equal(source.numbers(batch.observation), source.expected(batch.action))


def deviation(store: ReplayStore, rng: np.random.Generator, last: int) -> float:
    """Chi-square of draws over 1,000 parts of what is kept, in standard deviations."""
    length, draws = len(store), 200_000
    ages = np.concatenate([last - store.sample(1000, Transition(), rng).action for _ in range(draws // 1000)])
    edges = np.linspace(0, length, 1001).astype(np.int64)
    counts = np.histogram(ages, edges)[0]
    expected = draws * np.diff(edges) / length
    if counts.sum() != draws:
        return float("inf")
    return float((((counts - expected) ** 2 / expected).sum() - 999) / np.sqrt(2 * 999))


def run(path: Path, arguments: argparse.Namespace) -> bool:
    source, rng = Source(frames=arguments.frames), np.random.default_rng(0)
    steps, capacity = arguments.steps, arguments.capacity
    most = most_bytes = wrong = 0
    rates = []
    with ReplayStore.create(path, schema(frames=arguments.frames), capacity=capacity) as store:
        shard = max(store.schema.shard_rows(field, 1) for field in store.schema.fields)
        for part in range(LOOKS):
            rates.append(record_part(store, source, part, steps))
            most, most_bytes = max(most, on_disk(store)), max(most_bytes, disk_usage(path))
            wrong += not is_right(store, source, rng)
        store.flush()
        length, away = len(store), deviation(store, rng, steps - 1)
    tenth = LOOKS // 10
    ratio = np.median(rates[-tenth:]) / np.median(rates[:tenth])
    findings = list(verify(path))
    print(
        f"{steps} steps, capacity {capacity}, files of {shard} rows or fewer; {length} transitions are left"
    )
    print(
        f"most on disk: {most} transitions ({most - capacity:+} against the capacity), {most_bytes / 1e6:.1f} MB"
    )
    print(
        f"steps a second of CPU time: {np.median(rates):.0f}; the last tenth against the first: {ratio:.2f}"
    )
    print(
        f"wrong batches: {wrong}; chi-square {away:+.1f} standard deviations; findings of verify: {len(findings)}"
    )
    return most <= capacity + shard and not wrong and abs(away) < 5 and not findings


def run_from_the_shell(run: Callable[[Path, argparse.Namespace], bool], what: str, *, steps: int) -> None:
    """Read the options, run in a temporary directory, and exit with 1 if it says that something is wrong."""
    parser = argparse.ArgumentParser(description=f"Records many times {what} capacity.")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--capacity", type=int, default=100_000)
    parser.add_argument("--frames", action="store_true", help="frames of 84 x 84 instead of 4 floats")
    parser.add_argument(
        "--path", type=Path, help="a directory to make the store in; by default a temporary one"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.path) as directory:
        sys.exit(not run(Path(directory) / "store", arguments))


if __name__ == "__main__":
    run_from_the_shell(run, "a store's", steps=10_000_000)
