"""Records many times a reservoir's capacity and prints what it kept of each tenth of the recording.

    python tools/reservoir.py --steps 3000000 --capacity 100000

Exits with 1 if more transitions than the capacity were ever there, if a transition that was sampled is
wrong, or if `verify` finds something.
"""

import argparse
from pathlib import Path

import numpy as np
from bounded import LOOKS, Source, is_right, record_part, run_from_the_shell, schema

from replaystore import ReplayStore
from replaystore.files import disk_usage
from replaystore.verify import verify


def run(path: Path, arguments: argparse.Namespace) -> bool:
    source, rng = Source(frames=arguments.frames), np.random.default_rng(0)
    steps, capacity = arguments.steps, arguments.capacity
    most = most_bytes = wrong = 0
    rates = []
    with ReplayStore.create(
        path, schema(frames=arguments.frames), capacity=capacity, reservoir=True, rng=np.random.default_rng(0)
    ) as store:
        for part in range(LOOKS):
            rates.append(record_part(store, source, part, steps))
            most, most_bytes = max(most, len(store)), max(most_bytes, disk_usage(path))
            wrong += not is_right(store, source, rng)
        streams = max(store.episodes["stream"].to_pylist()) + 1
        actions = np.concatenate([store.episode(i)["action"] for i in range(store.num_episodes)])
        admission = store.admission
    kept = np.histogram(actions, np.linspace(0, steps, 11))[0]
    findings = list(verify(path))
    print(
        f"{steps} steps, capacity {capacity}: {len(actions)} transitions are left of {streams} streams,"
        f" admission {admission:.4f}, of all steps that is {admission * steps:.0f}"
    )
    print(f"left of each tenth of the recording: {', '.join(map(str, kept))}")
    print(f"most there: {most} transitions, {most_bytes / 1e6:.1f} MB")
    tenth = LOOKS // 10
    print(
        f"steps a second of CPU time: first tenth {np.median(rates[:tenth]):.0f}, last {np.median(rates[-tenth:]):.0f}"
    )
    print(f"wrong batches: {wrong}; findings of verify: {len(findings)}")
    return most <= capacity and not wrong and not findings


if __name__ == "__main__":
    run_from_the_shell(run, "a reservoir's", steps=3_000_000)
