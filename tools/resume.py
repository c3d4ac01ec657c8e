"""What resuming from a checkpoint comes to, and what a checkpoint costs.

    python tools/resume.py              # CartPole, 30,000 steps: killed five times, and not at all
    python tools/resume.py --cost       # a store of 1,000,000 Breakout transitions with priorities

The first compares the weights, the optimizer, the random numbers, the returns and the contents of
the store, to the last bit. The second prints medians, each time apart from writing the rows.
"""

import argparse
import gc
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_data import load, multiply_store, record_atari, recorded_rows, write_store

from replaystore import Prioritized, ReplayStore, Transition
from replaystore.checkpoints import checkpoint_path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path += [str(REPOSITORY / "tests"), str(REPOSITORY / "examples")]
from dqn import DQN, Config  # noqa: E402
from resuming import difference, moments_of, outcome, run_killed, run_through  # noqa: E402

PIECE = 50_000  # transitions recorded for --cost, and copied


def compare(folder: Path, *, steps: int, kills: int, seed: int) -> bool:
    """Run with kills and without; whether both come to the same."""
    arguments = ["--steps", str(steps)]
    seconds = run_through(folder / "whole", arguments)
    moments = moments_of(steps, kills, seed)
    killed_times = run_killed(folder / "killed", arguments, moments)
    shown = "; ".join(f"step {moment.step:,} and {moment.delay:.2f} s" for moment in moments)
    print(f"{steps:,} steps in {seconds:.1f} s; killed {killed_times} of {kills} times, after {shown}")
    whole, killed = outcome(folder / "whole"), outcome(folder / "killed")
    problem = difference(whole, killed)
    returns = np.array(whole.state["returns"])
    print(f"{len(returns)} episodes, mean return of the last 20: {returns[-20:].mean():.1f}")
    print("identical: weights, optimizer, random numbers, returns, contents" if problem is None else problem)
    return problem is None and killed_times == kills


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def resident() -> int:
    """Bytes of this process in memory that are its own, mapped files left out."""
    gc.collect()
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * resource.getpagesize()


def make_large(folder: Path, recording: Path | None, transitions: int) -> Path:
    """A store of so many Breakout transitions: copies of a stream."""
    recording = recording or folder / "recording"
    if recorded_rows(recording) <= PIECE:
        record_atari("Breakout", PIECE + 2_000, recording)
    write_store(folder / "piece", load(recording).head(PIECE))
    multiply_store(folder / "piece", folder / "large", max(1, transitions // PIECE))
    return folder / "large"


def report(what: str, seconds: list[float]) -> None:
    print(
        f"{what}: {statistics.median(seconds) * 1e3:.0f} ms (of {len(seconds)}, at most {max(seconds):.2f} s)"
    )


def cost(folder: Path, recording: Path | None, *, transitions: int, rounds: int) -> None:
    """What a checkpoint of a large store with priorities takes, and going back to it."""
    path, rng, window = make_large(folder, recording, transitions), np.random.default_rng(0), Transition()
    agent = DQN((4, 84, 84), 4, config=Config(), seed=0)
    model = {"agent": agent.state_dict()}
    sampler = Prioritized()
    frame = np.zeros((84, 84), np.uint8)
    with ReplayStore.open(path, "a") as store:
        batch = store.sample(100_000, window, rng, sampler=sampler)
        sampler.update_priorities(batch.ids, rng.random(len(batch.ids)))
        del batch
        print(f"{len(store):,} transitions, {store.nbytes / 1e6:.0f} MB")

        def checkpoint(state: Any) -> float:
            store.reset(frame)
            for _ in range(10):
                store.step(0, frame, 0.0, False, False)
            store.flush()
            given = {"samplers": {"per": sampler}, "generators": {"rng": rng}}
            return timed(lambda: store.checkpoint("here", state, **given))

        checkpoint(None)
        without = checkpoint_path(path, "here").stat().st_size
        first = resident()
        seconds = [checkpoint(model) for _ in range(rounds)]
        size, grown = checkpoint_path(path, "here").stat().st_size, resident() - first
        report("checkpoint with a model", seconds)
        print(f"its file: {without / 1e6:.2f} MB without the model, {size / 1e6:.2f} MB with it")
        print(f"memory after {rounds} checkpoints: {grown / 1e6:+.1f} MB")
    opened, restored, plain = [], [], []
    for _ in range(rounds):
        shutil.rmtree(folder / "copy", ignore_errors=True)
        shutil.copytree(path, folder / "copy")
        began = time.perf_counter()
        with ReplayStore.open(folder / "copy", "a", at="here") as store:
            opened.append(time.perf_counter() - began)
            again = Prioritized()
            restored.append(timed(lambda: store.restore("here", samplers={"per": again})))  # noqa: B023
        began = time.perf_counter()
        with ReplayStore.open(folder / "copy", "a"):
            plain.append(time.perf_counter() - began)
    report("opening at it", opened)
    report("opening without", plain)
    report("restoring the model, priorities and generators", restored)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cost", action="store_true", help="measure a checkpoint instead")
    parser.add_argument("--steps", type=int, default=30_000, help="of CartPole (30000)")
    parser.add_argument("--kills", type=int, default=5, help="(5)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--transitions", type=int, default=1_000_000, help="with --cost (1000000)")
    parser.add_argument("--rounds", type=int, default=7, help="with --cost (7)")
    parser.add_argument("--recording", type=Path, default=None, help="Breakout rows of tools/bench.py")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.cost:
            cost(Path(folder), options.recording, transitions=options.transitions, rounds=options.rounds)
        elif not compare(Path(folder), steps=options.steps, kills=options.kills, seed=options.seed):
            sys.exit(1)


if __name__ == "__main__":
    main()
