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
from bench_data import Recording, write_long_store

import replaystore.foresight
from replaystore import ReplayStore
from replaystore.files import drop_from_cache, major_faults

ROWS = 1000  # written over and over
BATCH = 256


def recording() -> Recording:
    """Rows of HalfCheetah's shapes; what is read as it was written takes as long whatever it is."""
    rng, never = np.random.default_rng(0), np.zeros(ROWS, bool)
    observation, action = rng.random((ROWS, 17)), rng.random((ROWS, 6), np.float32)
    return Recording(observation, action, action[:, 0], never, never, begins=never, stack=1)


def rates(path: Path, seconds: int) -> tuple[list[int], int]:
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
        write_long_store(path, recording(), arguments.transitions)
        found: dict[str, list[tuple[list[int], int]]] = {"huge pages": [], "page by page": []}
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
