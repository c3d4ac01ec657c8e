#!/usr/bin/env python3
"""Compare epochs of `Shuffled` with uniform draws: how fast they are, and how far from uniform.

    python tools/shuffled.py STORE --frame-stack 4 --pools 1024 2048 8192

Turns are taken between the samplers, in one process, in batches of 256; rates are medians. What is
told of the order: of two transitions that follow each other in an episode, how far apart they come
(uniformly drawn, a third of the store on average), and how many of them come in the same batch.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from replaystore import Shuffled, Transition, Uniform
from replaystore.dataset import ReplayDataset
from replaystore.samplers import Sampler

BATCH = 256


def batches(path: Path, window: Transition, sampler: Sampler) -> Iterator[Any]:
    """Batches without end, pass after pass."""
    loader = ReplayDataset(path, window).loader(BATCH, sampler=sampler)
    while True:
        yield from loader


def rate(source: Iterator[Any], seconds: float) -> float:
    """Transitions a second of the process's CPU time."""
    drawn, start = 0, time.process_time()
    while (passed := time.process_time() - start) < seconds:
        drawn += len(next(source)["ids"])
    return drawn / passed


def spread(path: Path, window: Transition, sampler: Sampler) -> tuple[float, float]:
    """Median distance of neighbours in an epoch's order, and the share that comes in one batch."""
    items = ReplayDataset(path, window).selection.items(window)
    rng = np.random.default_rng(0)
    position = np.empty(len(items), np.int64)
    position[sampler.draw(items, len(items), rng).numbers] = np.arange(len(items))
    apart = np.abs(np.diff(position))
    together = position[1:] // BATCH == position[:-1] // BATCH
    return float(np.median(apart)), float(together.mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--frame-stack", type=int, default=1)
    parser.add_argument("--pools", type=int, nargs="+", default=[1024, 2048, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    window = Transition(frame_stack=options.frame_stack)
    samplers: dict[str, Sampler] = {
        "uniform": Uniform(),
        "uniform, without replacement": Uniform(replace=False, seed=0),
    }
    samplers |= {f"Shuffled(pool={pool})": Shuffled(pool=pool, seed=0) for pool in options.pools}
    sources = {name: batches(options.store, window, sampler) for name, sampler in samplers.items()}
    for source in sources.values():
        rate(source, options.seconds)
    rates: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(options.rounds):
        for name, source in sources.items():
            rates[name].append(rate(source, options.seconds))
    print(f"{'':<30} {'transitions/s':>14} {'of uniform':>11} {'apart':>9} {'in one batch':>13}")
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(found, rates["uniform"], strict=True))
        line = f"{name:<30} {statistics.median(found):>14,.0f} {ratio:>10.2f}×"
        if name != "uniform":
            kind = (
                Uniform(replace=False, seed=1)
                if name.startswith("uniform")
                else Shuffled(pool=samplers[name].pool, seed=1)
            )
            apart, together = spread(options.store, window, kind)
            line += f" {apart:>9,.0f} {together:>12.3%}"
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
