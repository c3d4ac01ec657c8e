"""A run of `examples/resume_dqn.py` that is killed at random moments, and what it comes to."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from replaystore import ReplayStore, Transition
from replaystore.verify import verify

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "examples" / "resume_dqn.py"


class Outcome(NamedTuple):
    """What a run comes to: its episodes, network, optimizer, random numbers, and the store's contents."""

    state: dict[str, Any]
    random: dict[str, Any]
    episodes: list[dict[str, Any]]
    transitions: list[bytes]


class Moment(NamedTuple):
    """When to kill: once so many steps are done, or for 0 at the start; then after a delay in seconds."""

    step: int
    delay: float


def start(path: Path, arguments: list[str]) -> "subprocess.Popen[str]":
    """Begin the run at a store, or go on with it."""
    command = [sys.executable, str(SCRIPT), str(path), *arguments, "--picture", str(path) + ".png"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def run_through(path: Path, arguments: list[str]) -> float:
    """Run to the end; the seconds that it took."""
    began = time.perf_counter()
    with start(path, arguments) as process:
        process.communicate()
    assert process.returncode == 0, process.returncode
    return time.perf_counter() - began


def run_killed(path: Path, arguments: list[str], moments: list[Moment]) -> int:
    """Kill the run at these moments, starting it again each time, and let it end; how often it was killed."""
    killed = 0
    for moment in moments:
        with start(path, arguments) as process:
            if moment.step:
                _wait_for(process, moment.step)
            time.sleep(moment.delay)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        killed += process.returncode == -signal.SIGKILL
    run_through(path, arguments)
    return killed


def _wait_for(process: "subprocess.Popen[str]", step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        found = re.match(r"step +([\d,]+)", line)
        if found is not None and int(found[1].replace(",", "")) >= step:
            return


def moments_of(steps: int, kills: int, seed: int) -> list[Moment]:
    """Random moments, in order; the first is while the run begins."""
    rng = random.Random(seed)
    later = sorted(rng.randrange(1, int(0.98 * steps)) for _ in range(kills - 1))
    return [Moment(0, rng.uniform(0, 5)), *[Moment(step, rng.uniform(0, 0.2)) for step in later]]


def outcome(path: Path) -> Outcome:
    """Read what a run came to, and verify its store."""
    assert [str(finding) for finding in verify(path)] == []
    generator = np.random.default_rng()
    with ReplayStore.open(path) as store:
        store.check()
        state = store.restore("latest", generators={"rng": generator})
        batch = store.read(np.arange(len(store)), Transition(n_step=3, gamma=0.99))
        episodes = store.episodes.drop_columns(["first_row", "start_time"]).to_pylist()
    arrays = [getattr(batch, name).tobytes() for name in batch._fields if name not in ("ids", "extra")]
    return Outcome(state, generator.bit_generator.state, episodes, arrays)


def difference(first: Any, second: Any, place: str = "outcome") -> str | None:
    """Where two nested values differ in a bit, or None."""
    if type(first) is not type(second):
        return f"{place}: {type(first)} and {type(second)}"
    if isinstance(first, torch.Tensor):
        return None if torch.equal(first, second) else f"{place}: tensors differ"
    if isinstance(first, (dict, list, tuple)):
        pairs = first.items() if isinstance(first, dict) else enumerate(first)
        keys = first.keys() == second.keys() if isinstance(first, dict) else len(first) == len(second)
        if not keys:
            return f"{place}: {len(first)} and {len(second)} values"
        found = (difference(value, second[key], f"{place}[{key!r}]") for key, value in pairs)
        return next((each for each in found if each is not None), None)
    return None if first == second else f"{place}: {first!r} and {second!r}"
