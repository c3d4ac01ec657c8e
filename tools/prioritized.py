"""Prioritized replay measured: its speed against cpprb's, and what it does for learning.

    python tools/prioritized.py speed
    python tools/prioritized.py learn --picture docs/prioritized.png

`speed` draws batches of 256 of a million transitions in the shapes of HalfCheetah and reports new
priorities, in turns with cpprb's PrioritizedReplayBuffer, and prints the median of the turns' ratios.
It needs cpprb, of which the package itself knows nothing. `learn` runs `examples/prioritized_dqn.py`
with and without priorities, on the same seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from replaystore import Field, ReplayStore, Schema
from replaystore.prioritized import Prioritized

BATCH, EPISODE = 256, 1000
ROUNDS, CALLS = 20, 100
SCHEMA = Schema(
    [
        Field("observation", (17,), "float64"),
        Field("action", (6,), "float32"),
        Field("reward", (), "float64"),
        Field("terminated", (), "bool"),
        Field("truncated", (), "bool"),
    ]
)


def episode(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random numbers in the shapes of an episode of HalfCheetah."""
    return {
        "observation": rng.normal(size=(EPISODE + 1, 17)),
        "action": rng.uniform(-1, 1, (EPISODE, 6)).astype(np.float32),
        "reward": rng.normal(size=EPISODE),
        "terminated": np.zeros(EPISODE, bool),
        "truncated": np.arange(EPISODE) == EPISODE - 1,
    }


def filled_buffer(transitions: int) -> Any:
    """A buffer of cpprb with the same transitions and random priorities."""
    try:
        from cpprb import PrioritizedReplayBuffer
    except ImportError:
        sys.exit("tools/prioritized.py: speed compares with cpprb, which is not installed: pip install cpprb")
    shapes = {
        "observation": {"shape": 17, "dtype": np.float64},
        "action": {"shape": 6, "dtype": np.float32},
        "reward": {"dtype": np.float64},
        "next_observation": {"shape": 17, "dtype": np.float64},
        "terminated": {"dtype": np.bool_},
        "truncated": {"dtype": np.bool_},
    }
    buffer = PrioritizedReplayBuffer(transitions, shapes, alpha=0.6)
    rng, priorities = np.random.default_rng(0), np.random.default_rng(1)
    for _ in range(transitions // EPISODE):
        rows = episode(rng)
        observations = rows.pop("observation")
        both = {"observation": observations[:-1], "next_observation": observations[1:]}
        buffer.add(**rows, **both, priorities=np.abs(priorities.normal(size=EPISODE)))
    return buffer


def cpprb_turn(transitions: int) -> Callable[[], None]:
    buffer, rng = filled_buffer(transitions), np.random.default_rng(2)

    def turn() -> None:
        batch = buffer.sample(BATCH, beta=0.4)
        buffer.update_priorities(batch["indexes"], np.abs(rng.normal(size=BATCH)))

    return turn


def write_store(path: Path, transitions: int) -> None:
    rng = np.random.default_rng(0)
    with ReplayStore.create(path, SCHEMA) as store:
        for _ in range(transitions // EPISODE):
            store.add_episode(**episode(rng))


def store_turn(store: ReplayStore, sampler: Prioritized) -> Callable[[], None]:
    draws, rng = np.random.default_rng(3), np.random.default_rng(2)
    store.sample(BATCH, rng=draws, sampler=sampler)
    ids = store.read(np.arange(len(store))).ids
    sampler.update_priorities(ids, np.abs(np.random.default_rng(1).normal(size=len(ids))))

    def turn() -> None:
        batch = store.sample(BATCH, rng=draws, sampler=sampler)
        sampler.update_priorities(batch.ids, np.abs(rng.normal(size=BATCH)))

    return turn


def seconds(turn: Callable[[], None]) -> float:
    """The median time of some calls in a row."""
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        turn()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def speed(args: argparse.Namespace) -> None:
    """Print the times of both, their ratio, and the memory that priorities take."""
    theirs, sampler = cpprb_turn(args.transitions), Prioritized()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cheetah.replay")
        write_store(path, args.transitions)
        with ReplayStore.open(path) as store:
            ours = store_turn(store, sampler)
            pairs = [(seconds(ours), seconds(theirs)) for _ in range(ROUNDS)]
            nbytes = sampler.nbytes / len(store)
    mine, other = (statistics.median(times) * 1e6 for times in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"{args.transitions:,} transitions, sample({BATCH}) and update_priorities, {ROUNDS} turns each")
    print(f"replaystore  {mine:7.1f} µs")
    print(f"cpprb        {other:7.1f} µs")
    print(f"ratio        {ratio:7.2f} times the speed of cpprb (bar: at least 1)")
    print(f"memory       {nbytes:7.1f} bytes of priorities a transition (bar: at most 24)")


def learn(args: argparse.Namespace) -> None:
    """Train with and without priorities on each seed; print and draw the returns."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    import prioritized_dqn

    curves: dict[str, list[np.ndarray]] = {"prioritized": [], "uniform": []}
    for seed in range(args.seeds):
        for kind, runs in curves.items():
            uniform = kind == "uniform"
            quiet = contextlib.redirect_stdout(None)
            with tempfile.TemporaryDirectory() as folder, quiet:
                path = Path(folder, "cartpole.replay")
                result = prioritized_dqn.train(path, steps=args.steps, seed=seed, uniform=uniform)
            runs.append(by_step(result.ends, result.returns, args.steps))
            print(f"seed {seed}, {kind:11}: mean return over all steps {runs[-1].mean():6.1f}", flush=True)
    report(curves, args.steps)
    draw(curves, args)


def by_step(ends: np.ndarray, returns: np.ndarray, steps: int, window: int = 10) -> np.ndarray:
    """The mean return of the last episodes that had ended by each 100th step, (steps // 100,)."""
    at = np.arange(100, steps + 1, 100)
    ended = ends.searchsorted(at, side="right")
    means = [returns[max(0, count - window) : count].mean() if count else 0.0 for count in ended]
    return np.array(means)


def report(curves: dict[str, list[np.ndarray]], steps: int) -> None:
    """A table: for each fifth of the run, the mean over seeds, and how far the seeds lie apart."""
    print("\n| steps | " + " | ".join(curves) + " |\n| --- |" + " --- |" * len(curves))
    for part in range(5):
        span = slice(part * steps // 500, (part + 1) * steps // 500)
        cells = []
        for runs in curves.values():
            means = [run[span].mean() for run in runs]
            cells.append(f"{np.mean(means):.1f} ({min(means):.0f} to {max(means):.0f})")
        print(f"| to {(part + 1) * steps // 5:,} | " + " | ".join(cells) + " |")


def draw(curves: dict[str, list[np.ndarray]], args: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for color, (kind, runs) in zip(("C0", "C1"), curves.items(), strict=True):
        steps = 100 * np.arange(1, len(runs[0]) + 1)
        for run in runs:
            axes.plot(steps, run, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, np.mean(runs, axis=0), color=color, label=f"{kind}, mean of {len(runs)} seeds")
    axes.set(xlabel="environment steps", ylabel="return of the last 10 episodes", title="CartPole-v1")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.picture, dpi=120)
    print(f"\n{args.picture}: the learning curves")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("speed", help="against cpprb")
    command.add_argument("--transitions", type=int, default=1_000_000)
    command.set_defaults(run=speed)
    command = commands.add_parser("learn", help="against uniform draws")
    command.add_argument("--seeds", type=int, default=5)
    command.add_argument("--steps", type=int, default=20_000)
    command.add_argument("--picture", type=Path, default=Path("docs/prioritized.png"))
    command.set_defaults(run=learn)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
