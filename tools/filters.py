"""How long `store.where` takes on a million episodes, and the first draw from what it chose.

The store is made once, of episodes of one transition and tiny fields. Printed are medians, and what
pyarrow's own `Table.filter` takes, which gathers every column.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from tqdm import tqdm

from replaystore import Field, ReplayStore, Schema

BAR = 20  # milliseconds
CONDITIONS = {
    "return > 100": pc.field("return") > 100,
    "seed == 7": pc.field("seed") == 7,
    'policy == "eps=0.1"': pc.field("policy") == "eps=0.1",
    "level == 3 (the user's column)": pc.field("level") == 3,
    'return > 100 and policy == "eps=0.1"': (pc.field("return") > 100) & (pc.field("policy") == "eps=0.1"),
}


def make_store(path: Path, episodes: int) -> None:
    """Episodes of one transition each, in one stream."""
    schema = Schema(
        [
            Field("observation", (), "uint8"),
            Field("action", (), "uint8"),
            Field("reward", (), "float64"),
            Field("terminated", (), "bool"),
            Field("truncated", (), "bool"),
        ],
        columns={"level": "int64"},
    )
    rng = np.random.default_rng(0)
    rewards, levels = rng.normal(0, 100, episodes), rng.integers(10, size=episodes).tolist()
    fixed = {
        "observation": np.zeros(2, np.uint8),
        "action": np.zeros(1, np.uint8),
        "terminated": np.ones(1, bool),
        "truncated": np.zeros(1, bool),
    }
    with ReplayStore.create(path, schema) as store:
        for number in tqdm(range(episodes), "recording", mininterval=5):
            store.add_episode(
                reward=rewards[number : number + 1],
                seed=number % 1000,
                policy=f"eps=0.{number % 10}",
                columns={"level": levels[number]},
                **fixed,
            )


def median_ms(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--store", type=Path, help="where the store is made, or is already")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.store or Path(folder) / "store"
        if not path.exists():
            make_store(path, arguments.episodes)
        with ReplayStore.open(path) as store:
            report(store, arguments.rounds)


def report(store: ReplayStore, rounds: int) -> None:
    rng = np.random.default_rng(0)
    print(f"{store.num_episodes} episodes; milliseconds, medians of {rounds}; the bar for where is {BAR}\n")
    print("| condition | chosen | where | where, then a batch of 256 | table.filter |")
    print("| --- | --- | --- | --- | --- |")
    for name, condition in CONDITIONS.items():
        chosen = store.where(condition).num_episodes
        where = median_ms(lambda c=condition: store.where(c), rounds)
        draw = median_ms(lambda c=condition: store.where(c).sample(256, rng=rng), rounds)
        plain = median_ms(lambda c=condition: store.episodes.filter(c), rounds)
        print(f"| {name} | {chosen} | {where:.1f} | {draw:.1f} | {plain:.1f} |")


if __name__ == "__main__":
    main()
