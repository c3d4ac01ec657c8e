"""How soon a store of vectors is at its full speed after a restart, when nothing of it is in memory.

A store of HalfCheetah's shapes is made and forgotten by the page cache, then batches of 256 are drawn:
with flat files read in huge pages, as is usual, and page by page. Printed are transitions a second, by
seconds since it was opened.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import replaystore.foresight
from replaystore import Field, ReplayStore, Schema
from replaystore.files import drop_from_cache, major_faults

STEPS = 1000  # of an episode
BATCH = 256


def make_store(path: Path, transitions: int) -> None:
    fields = [Field("observation", (17,), "float64"), Field("action", (6,), "float32")]
    fields += [
        Field("reward", (), "float64"),
        Field("terminated", (), "bool"),
        Field("truncated", (), "bool"),
    ]
    rng = np.random.default_rng(0)
    observation, action = rng.random((STEPS + 1, 17)), rng.random((STEPS, 6), np.float32)
    never, ends = np.zeros(STEPS, bool), np.arange(STEPS) == STEPS - 1
    with ReplayStore.create(path, Schema(fields)) as store:
        for _ in tqdm(range(transitions // STEPS), desc="recording", mininterval=5):
            store.add_episode(
                observation=observation, action=action, reward=action[:, 0], terminated=never, truncated=ends
            )


def rates(path: Path, seconds: int) -> tuple[list[float], int]:
    """Transitions in each second since the store was opened, and how often the disk was waited for."""
    drop_from_cache(path)
    rng, drawn, waits = np.random.default_rng(0), [0] * seconds, major_faults()
    start = time.perf_counter()
    with ReplayStore.open(path) as store:
        while (second := int(time.perf_counter() - start)) < seconds:
            store.sample(BATCH, rng=rng)
            drawn[second] += BATCH
    return drawn, major_faults() - waits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--transitions", type=int, default=5_000_000)
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="of which the best is printed: disks vary")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        path = Path(folder) / "store"
        make_store(path, arguments.transitions)
        found: dict[str, list[tuple[list[float], int]]] = {"huge pages": [], "page by page": []}
        for _ in range(arguments.rounds):
            for runs, huge in zip(found.values(), (True, False), strict=True):
                replaystore.foresight.HAS_HUGE_PAGES = huge
                runs.append(rates(path, arguments.seconds))
    print(f"\n{arguments.transitions} transitions; thousand transitions a second, and waits for the disk\n")
    titles = " | ".join(f"second {i + 1}" for i in range(arguments.seconds))
    print(f"| read in | {titles} | waits |\n| --- |{' --- |' * (arguments.seconds + 1)}")
    for title, runs in found.items():
        drawn, waits = max(runs, key=lambda run: sum(run[0]))
        print(f"| {title} | {' | '.join(f'{each / 1000:,.0f}' for each in drawn)} | {waits:,} |")


if __name__ == "__main__":
    main()
