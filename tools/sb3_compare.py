"""Stable-Baselines3 with its own replay buffer and with one on a store.

    python tools/sb3_compare.py weights --steps 20000
    python tools/sb3_compare.py breakout --steps 5000 --rounds 3
    python tools/sb3_compare.py saving --steps 1000000

`weights` trains DQN on CartPole-v1 and SAC on Pendulum-v1 twice from one seed, and counts the
parameters that differ in the end. `breakout` trains DQN("CnnPolicy") on four stacked frames of Breakout
in processes of their own, in turns: SB3's buffer of 50,000 transitions, which fits into memory, and a
store of a million. Printed are steps a second, the CPU time of a step (which says more where other work
runs on the machine), the most memory that was resident (with the pages of mapped files), what is on
disk, and the milliseconds to save and load the buffer.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.save_util import load_from_pkl
from stable_baselines3.common.vec_env import VecFrameStack

from replaystore.sb3 import ReplayStoreBuffer

SIZES = {"sb3": 50_000, "store": 1_000_000}


def kwargs_of(kind: str, path: Path) -> dict[str, Any]:
    if kind == "sb3":
        return {}
    return {"replay_buffer_class": ReplayStoreBuffer, "replay_buffer_kwargs": {"path": str(path)}}


def trained(algorithm: Any, env: str, steps: int, kind: str, path: Path) -> Any:
    model = algorithm("MlpPolicy", env, seed=0, device="cpu", **kwargs_of(kind, path))
    return model.learn(steps)


def compare_weights(steps: int) -> None:
    for algorithm, env in ((DQN, "CartPole-v1"), (SAC, "Pendulum-v1")):
        with tempfile.TemporaryDirectory() as folder:
            models = [trained(algorithm, env, steps, kind, Path(folder) / "run.replay") for kind in SIZES]
            mine, theirs = (model.policy.state_dict() for model in models)
            differing = sum(int((mine[name] != theirs[name]).sum()) for name in mine)
            total = sum(value.numel() for value in mine.values())
            print(f"{env}: {differing} of {total} parameters differ after {steps} steps", flush=True)
            models[1].replay_buffer.close()


def measure(kind: str, steps: int, path: Path) -> dict[str, float]:
    """Train on Breakout; what was measured, by name. CPU time is that of all threads."""
    gym.register_envs(ale_py)
    env = VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", n_envs=1, seed=0), 4)
    model = DQN(
        "CnnPolicy",
        env,
        seed=0,
        device="cpu",
        buffer_size=SIZES[kind],
        **kwargs_of(kind, path / "run.replay"),
    )
    start, cpu_start = time.perf_counter(), time.process_time()
    model.learn(steps)
    rate, cpu = steps / (time.perf_counter() - start), (time.process_time() - cpu_start) / steps * 1e3
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {"steps/s": rate, "CPU ms/step": cpu, "resident MB": resident}
    if kind == "store":
        result["disk MB"] = model.replay_buffer.store.nbytes / 1e6
        result["save ms"] = milliseconds(lambda: model.save_replay_buffer(path / "buffer.pkl"))
        result["load ms"] = milliseconds(lambda: load_from_pkl(path / "buffer.pkl"))
    return result


def milliseconds(call: Any) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def time_saving(transitions: int) -> None:
    """Fill a buffer with transitions of CartPole's shapes; print the time to save and to load it."""
    observations = np.random.default_rng(0).normal(size=(1000, 1, 4)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        model = DQN(
            "MlpPolicy", "CartPole-v1", buffer_size=transitions, **kwargs_of("store", path / "run.replay")
        )
        buffer = model.replay_buffer
        for number in range(transitions):
            now, then = observations[number % 1000], observations[(number + 1) % 1000]
            done = np.array([number % 200 == 199])
            buffer.add(now, then, np.array([[number % 2]]), np.ones(1), done, [{}])
        saving = milliseconds(lambda: model.save_replay_buffer(path / "buffer.pkl"))
        buffer.close()
        loading = milliseconds(lambda: model.load_replay_buffer(path / "buffer.pkl"))
        nbytes = (path / "buffer.pkl").stat().st_size
        print(
            f"{transitions:,} transitions: saved in {saving:.0f} ms, {nbytes:,} bytes; loaded in {loading:.0f} ms"
        )
        model.replay_buffer.close()


def in_process(kind: str, steps: int, parent: Path | None) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        command = [
            sys.executable,
            __file__,
            "measure",
            "--kind",
            kind,
            "--steps",
            str(steps),
            "--dir",
            folder,
        ]
        result: dict[str, float] = json.loads(subprocess.check_output(command))
        return result


def compare_breakout(steps: int, rounds: int, parent: Path | None) -> None:
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in SIZES}
    for _ in range(rounds):
        for kind, into in results.items():
            into.append(in_process(kind, steps, parent))
            print(kind, {name: round(value, 1) for name, value in into[-1].items()}, flush=True)
    for name in ("steps/s", "CPU ms/step"):
        pairs = zip(results["store"], results["sb3"], strict=True)
        ratio = statistics.median(ours[name] / theirs[name] for ours, theirs in pairs)
        print(f"{name} of the store against SB3's buffer: {ratio:.2f} (median of {rounds} rounds)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("weights", "breakout", "measure", "saving"))
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", choices=tuple(SIZES), default="store")
    parser.add_argument("--dir", type=Path, help="where to put the stores; by default the temporary folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "weights":
        compare_weights(arguments.steps)
    elif arguments.what == "saving":
        time_saving(arguments.steps)
    elif arguments.what == "measure":
        print(json.dumps(measure(arguments.kind, arguments.steps, arguments.dir)))
    else:
        compare_breakout(arguments.steps, arguments.rounds, arguments.dir)


if __name__ == "__main__":
    main()
