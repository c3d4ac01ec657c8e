"""The command line: `replaystore record | info | verify | repair | bench | tune`, each with `--help`."""

import argparse
import contextlib
import importlib.util
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from tqdm import tqdm

from replaystore import bench
from replaystore.bounds import Bounds
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
    record.add_argument(
        "--capacity", type=int, default=None, help="transitions that a new store keeps at most"
    )
    record.add_argument(
        "--capacity-bytes", type=int, default=None, help="bytes on disk that it takes at most"
    )
    record.add_argument(
        "--max-age", type=float, default=None, help="seconds that it keeps an episode at most"
    )
    record.add_argument(
        "--reservoir", action="store_true", help="keep each episode ever seen with the same probability"
    )
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
    measure = commands.add_parser("bench", help="measure a store on this machine, as a table and a picture")
    measure.add_argument("path", type=Path)
    measure.add_argument("--seconds", type=float, default=2.0, help="that each timing takes (default: 2)")
    measure.add_argument(
        "--frame-stack", type=int, default=None, help="of the items (default: as the environment's)"
    )
    measure.add_argument("--png", type=Path, default=None, help="also draw the figures; needs matplotlib")
    measure.set_defaults(run=_bench)
    tune = commands.add_parser("tune", help="try codecs and chunk lengths on a store's own packed fields")
    tune.add_argument("path", type=Path)
    tune.add_argument("--rows", type=int, default=4096, help="to try them on (default: 4096)")
    tune.set_defaults(run=_tune)
    return parser


def _record(options: argparse.Namespace) -> int:
    if options.steps < 1 or options.num_envs < 1:
        raise UsageError("--steps and --num-envs: expected at least 1")
    policy = None if options.policy == "random" else _load_policy(Path(options.policy))
    env = _make_env(options)
    record = RecordVectorReplay if options.num_envs > 1 else RecordReplay
    bounds = {name: getattr(options, name) for name in Bounds._fields}
    recorder: Any = record(env, options.path, policy=Path(options.policy).stem, **bounds)
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
    """Record so many transitions, or until Ctrl-C; returns how many."""
    vector = isinstance(recorder, RecordVectorReplay)
    taken, idle = 0, 0  # transitions; environments that their next step only resets
    with _interrupts() as interrupted, tqdm(total=steps, unit="step", unit_scale=True) as bar:
        observation, _ = recorder.reset(seed=seed)
        while taken < steps and not interrupted.is_set():
            observation, _, terminated, truncated, _ = recorder.step(policy(observation))
            taken += np.size(terminated) - idle
            bar.update(taken - bar.n)
            ended = int(np.count_nonzero(np.logical_or(terminated, truncated)))
            if vector:
                idle = ended
            elif ended:
                observation, _ = recorder.reset()
    if interrupted.is_set():
        sys.stderr.write("stopped: what was recorded is kept\n")
    return taken


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C, so that a step under way is ended and counted; a second one interrupts it."""
    interrupted = threading.Event()

    def note(number: int, frame: Any) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _info(options: argparse.Namespace) -> int:
    with ReplayStore.open(options.path) as store:
        episodes = store.episodes
        rows = [
            ("transitions", f"{len(store):,}"),
            ("episodes", f"{store.num_episodes:,}"),
            ("streams", f"{len(np.unique(integers(episodes, 'stream')))}"),
            ("bytes on disk", f"{store.nbytes:,} ({store.nbytes / max(1, len(store)):.1f} a transition)"),
            ("bounds", _bounds(store.bounds)),
            ("checkpoints", ", ".join(store.checkpoints) or "none"),
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


def _bounds(bounds: Bounds) -> str:
    """What a store keeps at most, in words."""
    units = ("transitions", "bytes", "seconds")
    given = [f"{bound:,} {unit}" for bound, unit in zip(bounds, units, strict=False) if bound is not None]
    return ", ".join(given + ["a reservoir"] * bounds.reservoir) or "none"


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


def _bench(options: argparse.Namespace) -> int:
    if options.seconds <= 0:
        raise UsageError(f"--seconds: expected more than 0, got {options.seconds}")
    if options.png is not None and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--png needs matplotlib: pip install matplotlib")
    figures: list[bench.Figure] = []
    rng = np.random.default_rng(0)
    for figure in bench.measure(options.path, options.seconds, rng, frame_stack=options.frame_stack):
        if not figures or figures[-1].section != figure.section:
            sys.stdout.write(f"{figure.section}\n")
        sys.stdout.write(f"  {figure.name:<42} {figure.value:>12,.1f}\n")
        sys.stdout.flush()
        figures.append(figure)
    if options.png is not None:
        bench.draw(figures, options.png, str(options.path))
        sys.stdout.write(f"drawn to {options.png}\n")
    return 0


def _tune(options: argparse.Namespace) -> int:
    if options.rows < 1:
        raise UsageError(f"--rows: expected at least 1, got {options.rows}")
    with ReplayStore.open(options.path) as store:
        packed = [field for field in store.schema.fields if field.packed]
        if not packed:
            sys.stdout.write(f"{options.path}: no field is packed, there is nothing to tune\n")
        for field in packed:
            sys.stdout.write(f"{field.name}: rows of {field.row_nbytes:,} bytes; * is how it is stored\n")
            sys.stdout.write(f"  {'codec':<24} {'rows a chunk':>12} {'bytes a row':>12}")
            sys.stdout.write(f" {'µs to encode a row':>19} {'µs to read an item':>19}\n")
            for trial in bench.try_codecs(store, field, np.random.default_rng(0), rows=options.rows):
                mark = "*" if (trial.codec, trial.chunk_rows) == (field.codec, field.chunk_rows) else " "
                sys.stdout.write(f"{mark} {trial.codec:<24} {trial.chunk_rows:>12} {trial.nbytes:>12.1f}")
                sys.stdout.write(f" {trial.encode:>19.1f} {trial.read:>19.1f}\n")
    return 0
