"""Train a DQN online, and go on after a kill as if nothing had happened.

    python examples/resume_dqn.py cartpole.replay
    python examples/resume_dqn.py breakout.replay --env ALE/Breakout-v5 --steps 1000000
    python examples/resume_dqn.py fresh.replay --warm-start cartpole.replay

It acts, records into a store and samples from the same store while it is being written. Every
`--every` steps, at the next end of an episode, a checkpoint keeps the network, the optimizer, the
random numbers and which rows there are. Kill it at any moment and start it again with the same
arguments: it drops what came after the checkpoint and does that again, to the last bit the same.

That holds because nothing else carries over from one episode to the next: an environment cannot be
saved in general, so checkpoints are made between episodes, and every episode's reset is seeded from
the run's seed and the episode's number.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from dqn import DQN, FRAME_NDIM, Config
from matplotlib.figure import Figure
from record_rollouts import make_atari

from replaystore import Transition
from replaystore.checkpoints import checkpoint_names
from replaystore.recorder import RecordReplay

GAMMA, N_STEP = 0.99, 3
CHECKPOINT = "latest"  # each takes the place of the last
COLUMNS = ("observation", "action", "reward", "next_observation", "discount")


class Plan(NamedTuple):
    """How a run learns: vectors, or frames as in Mnih et al. (2015)."""

    config: Config
    batch: int
    warm_up: int  # steps before the first update
    learn_every: int  # steps from one update to the next


VECTORS = Plan(Config(learning_rate=5e-4), batch=64, warm_up=500, learn_every=2)
FRAMES = Plan(
    Config(learning_rate=1e-4, target_period=2_000, target_rate=1.0), batch=32, warm_up=10_000, learn_every=4
)


class Result(NamedTuple):
    """The episodes of a run, in order."""

    returns: list[float]
    ends: list[int]  # steps done by the end of each


class Run:
    """A run at the end of an episode; what it goes on from is in `state`, `rng` and the store."""

    def __init__(self, env: RecordReplay, *, steps: int, seed: int) -> None:
        space, actions = env.observation_space, env.action_space
        assert isinstance(space, gym.spaces.Box), space
        assert isinstance(actions, gym.spaces.Discrete), actions
        self.env, self.store = env, env.store
        self.plan = FRAMES if len(space.shape) == FRAME_NDIM else VECTORS
        self.agent = DQN(space.shape, int(actions.n), config=self.plan.config, seed=seed)
        self.window = Transition(n_step=N_STEP, gamma=GAMMA, frame_stack=self.store.frame_stack)
        self.rng = np.random.default_rng(seed)
        self.steps, self.seed = steps, seed
        self.result = Result([], [])

    @property
    def step(self) -> int:
        """Steps done."""
        return self.result.ends[-1] if self.result.ends else 0

    def checkpoint(self) -> None:
        """Keep all of it, with the rows recorded so far."""
        state = {"agent": self.agent.state_dict(), "seed": self.seed, **self.result._asdict()}
        self.store.checkpoint(CHECKPOINT, state, generators={"rng": self.rng})

    def restore(self) -> None:
        """Go on from the checkpoint at which the store was opened."""
        state = self.store.restore(CHECKPOINT, generators={"rng": self.rng})
        if state["seed"] != self.seed:
            raise SystemExit(f"{self.store.path}: expected --seed {state['seed']}, as it began with")
        self.agent.load_state_dict(state["agent"])
        self.result = Result(state["returns"], state["ends"])
        print(f"going on at step {self.step:,}, after {len(self.result.ends)} episodes")

    def play(self) -> None:
        """Act and learn for an episode."""
        seed = np.random.SeedSequence((self.seed, len(self.result.ends))).generate_state(1)
        observation, _ = self.env.reset(seed=int(seed[0]))
        step, total, over = self.step, 0.0, False
        while not over:
            epsilon = exploration(step, self.steps)
            action = self.agent.act(np.asarray(observation)[None], epsilon=epsilon, rng=self.rng)[0]
            observation, reward, terminated, truncated, _ = self.env.step(action)
            total, step, over = total + float(reward), step + 1, terminated or truncated
            if step >= self.plan.warm_up and step % self.plan.learn_every == 0:
                batch = self.store.sample(self.plan.batch, self.window, self.rng)
                self.agent.learn({name: torch.from_numpy(getattr(batch, name)) for name in COLUMNS})
        self.result.returns.append(total)
        self.result.ends.append(step)
        print(f"step {step:7,}: episode {len(self.result.ends):5}, return {total:6.0f}", flush=True)


def exploration(step: int, steps: int) -> float:
    """The rate of random actions: from 1 to 0.02 over the first fifth of the run."""
    return max(0.02, 1.0 - step / (0.2 * steps))


def begin(path: Path, warm_start: Path | None) -> None:
    """Have a copy of another store's rows at `path`, at once, so that a kill leaves all or none."""
    if warm_start is not None and not path.exists():
        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(warm_start, partial)
        shutil.rmtree(partial / "checkpoints", ignore_errors=True)  # of another run
        os.replace(partial, path)


def train(args: argparse.Namespace) -> Result:
    """Begin a run, or go on with it, until `args.steps` are done and the episode is over."""
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    torch.use_deterministic_algorithms(True)
    begin(args.path, args.warm_start)
    at = CHECKPOINT if CHECKPOINT in checkpoint_names(args.path) else None
    inner = make_atari(args.env) if args.env.startswith("ALE/") else gym.make(args.env)
    env = RecordReplay(inner, args.path, at=at)
    try:
        run = Run(env, steps=args.steps, seed=args.seed)
        if at is not None:
            run.restore()
        elif len(run.store) and args.warm_start is None:
            raise SystemExit(f"{args.path}: expected a new store, or one with a checkpoint: see --warm-start")
        else:
            run.checkpoint()
        kept = run.step
        while run.step < args.steps:
            run.play()
            if run.step >= min(kept + args.every, args.steps):
                run.checkpoint()
                kept = run.step
        return run.result
    finally:
        env.close()


def draw(result: Result, title: str, path: Path) -> None:
    """Write the returns and their running mean as a PNG."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    returns, ends = np.array(result.returns), np.array(result.ends)
    width = min(20, len(returns))
    means = np.convolve(returns, np.ones(width) / width, mode="valid")
    axes.plot(ends, returns, ".", markersize=3, alpha=0.4, label="episode")
    axes.plot(ends[width - 1 :], means, label=f"mean of {width}")
    axes.set(xlabel="steps", ylabel="return", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize="small")
    figure.savefig(path, dpi=150)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="the store: a new one, or that of a run to go on with")
    parser.add_argument("--env", default="CartPole-v1", help="Gymnasium id, or ALE/… (CartPole-v1)")
    parser.add_argument("--steps", type=int, default=30_000, help="of the environment (30000)")
    parser.add_argument("--every", type=int, default=2_000, help="steps to a checkpoint (2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm-start", type=Path, default=None, help="a recorded store to begin from")
    parser.add_argument("--picture", type=Path, default=Path("resume_dqn.png"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Result:
    args = parse(argv)
    result = train(args)
    last = np.array(result.returns[-20:])
    print(f"{args.path}: {len(result.returns)} episodes, mean of the last {len(last)}: {last.mean():.1f}")
    draw(result, f"{args.env}, online", args.picture)
    print(f"{args.picture}: the returns")
    return result


if __name__ == "__main__":
    main()
