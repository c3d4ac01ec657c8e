"""The command line: `replaystore record | info | verify | repair`, each with `--help`."""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from tqdm import tqdm

from replaystore.episodes import integers
from replaystore.errors import ReplayStoreError, UsageError
from replaystore.recorder import RecordReplay, RecordVectorReplay
from replaystore.repair import repair
from replaystore.store import ReplayStore
from replaystore.verify import Finding, count_files, verify

Policy = Callable[[Any], Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except ReplayStoreError as error:
        sys.stderr.write(f"replaystore: {error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="replaystore", description="A replay store on disk.")
    commands = parser.add_subparsers(title="commands", required=True)
    record = commands.add_parser("record", help="record an environment's transitions")
    record.add_argument("env", help="the environment's id, such as CartPole-v1 or ALE/Breakout-v5")
    record.add_argument("path", type=Path, help="the store, which is made or added to")
    record.add_argument(
        "--steps", type=int, required=True, help="transitions to record, all environments together"
    )
    record.add_argument(
        "--policy",
        default="random",
        help='"random", or a Python file that defines policy(observation) -> action (batched with --num-envs)',
    )
    record.add_argument("--num-envs", type=int, default=1, help="environments in a vector (default: 1)")
    record.add_argument(
        "--atari", action="store_true", help="grey 84×84 frames, four emulator frames a step, stacks of four"
    )
    record.add_argument("--seed", type=int, default=None, help="of the environment and the random policy")
    record.set_defaults(run=_record)
    info = commands.add_parser("info", help="say what a store holds")
    info.add_argument("path", type=Path)
    info.set_defaults(run=_info)
    check = commands.add_parser(
        "verify", help="read every byte, and name what is damaged; exit status 1 if any"
    )
    check.add_argument("path", type=Path)
    check.set_defaults(run=_verify)
    mend = commands.add_parser("repair", help="keep what is intact, move the rest to PATH.dropped")
    mend.add_argument("path", type=Path)
    mend.add_argument("--yes", action="store_true", help="do not ask before changing anything")
    mend.set_defaults(run=_repair)
    return parser


def _record(options: argparse.Namespace) -> int:
    if options.steps < 1 or options.num_envs < 1:
        raise UsageError("--steps and --num-envs: expected at least 1")
    policy = None if options.policy == "random" else _load_policy(Path(options.policy))
    env = _make_env(options)
    record = RecordVectorReplay if options.num_envs > 1 else RecordReplay
    recorder: Any = record(env, options.path, policy=Path(options.policy).stem)
    try:
        recorder.action_space.seed(options.seed)
        policy = policy or (lambda observation: recorder.action_space.sample())
        taken = _roll_out(recorder, policy, steps=options.steps, seed=options.seed)
    finally:
        recorder.close()
    sys.stdout.write(f"recorded {taken} transitions to {options.path}\n")
    return 0


def _make_env(options: argparse.Namespace) -> Any:
    wrappers = _atari_wrappers() if options.atari else []
    kwargs: dict[str, Any] = {"frameskip": 1} if options.atari else {}
    try:
        if options.num_envs > 1:
            return gym.make_vec(options.env, options.num_envs, "sync", wrappers=wrappers, **kwargs)
        env = gym.make(options.env, **kwargs)
        for wrapper in wrappers:
            env = wrapper(env)
        return env
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        raise UsageError(f"cannot make the environment {options.env!r}: {error}") from error


def _atari_wrappers() -> list[Callable[[Any], Any]]:
    if importlib.util.find_spec("ale_py") is None:
        raise UsageError("--atari needs ale-py: pip install replaystore[atari]")
    import ale_py  # here alone: an optional dependency

    gym.register_envs(ale_py)
    return [AtariPreprocessing, lambda env: FrameStackObservation(env, 4)]


def _load_policy(path: Path) -> Policy:
    spec = importlib.util.spec_from_file_location("replaystore_policy", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UsageError(f'--policy: expected "random" or a Python file, found {str(path)!r}')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "policy", None)):
        raise UsageError(f"--policy: expected {path} to define policy(observation)")
    found: Policy = module.policy
    return found


def _roll_out(
    recorder: RecordReplay | RecordVectorReplay, policy: Policy, *, steps: int, seed: int | None
) -> int:
    """Record until `steps` transitions are there, or Ctrl-C; returns how many were recorded."""
    before = len(recorder.store)
    vector = isinstance(recorder, RecordVectorReplay)
    with tqdm(total=steps, unit="step", unit_scale=True) as bar:
        try:
            observation, _ = recorder.reset(seed=seed)
            while (taken := len(recorder.store) - before) < steps:
                bar.update(taken - bar.n)
                observation, _, terminated, truncated, _ = recorder.step(policy(observation))
                if not vector and (terminated or truncated):
                    observation, _ = recorder.reset()
        except KeyboardInterrupt:
            sys.stderr.write("\nstopped: what was recorded is kept\n")
        taken = len(recorder.store) - before
        bar.update(taken - bar.n)
    return taken


def _info(options: argparse.Namespace) -> int:
    with ReplayStore.open(options.path) as store:
        episodes = store.episodes
        rows = [
            ("transitions", f"{len(store):,}"),
            ("episodes", f"{store.num_episodes:,}"),
            ("streams", f"{len(np.unique(integers(episodes, 'stream')))}"),
            ("bytes on disk", f"{store.nbytes:,} ({store.nbytes / max(1, len(store)):.1f} a transition)"),
        ]
        if len(episodes):
            returns = episodes["return"].drop_null().to_numpy()
            lengths = integers(episodes, "length")
            rows.append(("length", f"{lengths.min()} to {lengths.max()}, mean {lengths.mean():.1f}"))
            if len(returns):
                rows.append(("return", f"{returns.min():g} to {returns.max():g}, mean {returns.mean():.2f}"))
        rows += [(f.name, f"{f.dtype} {f.shape} {f.codec}") for f in store.schema.fields]
    width = max(len(name) for name, _ in rows)
    sys.stdout.write("".join(f"{name:<{width}}  {value}\n" for name, value in rows))
    return 0


def _findings(path: Path) -> list[Finding]:
    """Verify a store with a progress bar; prints one line a finding."""
    if not path.is_dir():
        raise UsageError(f"{path}: expected a directory")
    with tqdm(total=count_files(path), unit="file", leave=False) as bar:
        findings = list(verify(path, bar.update))
    for finding in findings:
        sys.stdout.write(f"{finding}\n")
    return findings


def _verify(options: argparse.Namespace) -> int:
    findings = _findings(options.path)
    sys.stdout.write(f"{options.path}: {len(findings) or 'nothing'} found wrong\n")
    return 1 if findings else 0


def _repair(options: argparse.Namespace) -> int:
    findings = _findings(options.path)
    if not findings:
        sys.stdout.write(f"{options.path}: nothing to repair\n")
        return 0
    if not options.yes and input(f"repair {options.path}? Damaged streams are moved aside. [y/N] ") != "y":
        return 1
    for repaired in repair(options.path, findings):
        sys.stdout.write(f"{repaired}\n")
    return 1 if _findings(options.path) else 0
