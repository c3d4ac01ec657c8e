"""Train a DQN from a recorded store alone, and see what the policy is then worth.

    python examples/record_rollouts.py cartpole.replay
    python examples/offline_dqn.py cartpole.replay --seeds 5

No environment is touched by training: batches come from a `DataLoader` over the store. An
environment serves to score the greedy policy, along the way for the picture and at the end;
no score influences training or chooses among networks. The last network is the result.

Returns of ten steps make it robust: over CartPole stores of 15,000 and 50,000 transitions and
6,000 to 12,000 updates, all of 70 networks ended at 500. With three steps 2 of 78 ended below
475, though they had scored 500 earlier in their training.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from dqn import DQN, Config, evaluate
from matplotlib.figure import Figure
from torch import Tensor

from replaystore import ReplayStore, Transition
from replaystore.dataset import ReplayDataset

CURVE_EPISODES = 10
CURVE_SEED, FINAL_SEED = 1_000_000, 2_000_000  # two sets of episodes, the same for every network

MakeEnv = Callable[[], gym.Env]


class Source(NamedTuple):
    """What training needs to know of a store."""

    path: Path
    make_env: MakeEnv  # the recorded environment again
    frame_stack: int
    behaviour: float  # mean return of the recorded episodes


class Result(NamedTuple):
    """What one seed's training came to."""

    updates: np.ndarray  # (evaluations,) updates done by then
    means: np.ndarray  # (evaluations,) mean return of the greedy policy
    final: np.ndarray  # (episodes,) returns of the last network


def endless(loader: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """One epoch after the other, each in an order of its own."""
    while True:
        yield from loader


def make_agent(make_env: MakeEnv, config: Config, seed: int) -> DQN:
    """An untrained agent that fits the environment's spaces."""
    env = make_env()
    observations, actions = env.observation_space, env.action_space
    env.close()
    assert isinstance(observations, gym.spaces.Box), observations
    assert isinstance(actions, gym.spaces.Discrete), actions
    return DQN(observations.shape, int(actions.n), config=config, seed=seed)


def train(args: argparse.Namespace, source: Source, seed: int) -> Result:
    """Train one network, its learning rate falling to 0 so that it comes to rest."""
    window = Transition(n_step=args.n_step, gamma=args.gamma, frame_stack=source.frame_stack)
    dataset, make_env = ReplayDataset(source.path, window), source.make_env
    loader = dataset.loader(batch_size=args.batch_size, num_workers=args.workers, shuffle=True, seed=seed)
    agent = make_agent(make_env, Config(conservatism=args.conservatism), seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(agent.optimizer, args.updates)
    curve: list[tuple[int, float]] = []
    for batch in itertools.islice(endless(loader), args.updates):
        agent.learn(batch)
        schedule.step()
        if agent.updates % args.evaluate_every == 0:
            returns = evaluate(agent, make_env, episodes=CURVE_EPISODES, seed=CURVE_SEED)
            curve.append((agent.updates, float(returns.mean())))
            print(f"seed {seed}: {agent.updates:6,} updates, return {returns.mean():6.1f}")
    final = evaluate(agent, make_env, episodes=args.episodes, seed=FINAL_SEED)
    updates, means = np.array(curve).reshape(-1, 2).T
    return Result(updates, means, final)


def open_source(path: Path, env: str | None) -> Source:
    with ReplayStore.open(path) as store:
        make_env = store.make_env if env is None else functools.partial(gym.make, env)
        behaviour = float(store.episodes["return"].to_numpy().mean())
        return Source(path, make_env, store.frame_stack, behaviour)


def draw(results: list[Result], behaviour: float, title: str, path: Path) -> None:
    """Write the learning curves, a line for each seed, as a PNG."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for seed, result in enumerate(results):
        label = f"seed {seed}: {result.final.mean():.0f} at the end"
        axes.plot(result.updates, result.means, marker="o", markersize=3, label=label)
    axes.axhline(behaviour, color="black", linestyle="--", label=f"behaviour: {behaviour:.0f}")
    axes.set(xlabel="updates", ylabel="return of the greedy policy", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=150)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="a store, as record_rollouts.py writes it")
    parser.add_argument("--env", default=None, help="scores the policy (default: the recorded one)")
    parser.add_argument("--seeds", type=int, default=1, help="networks to train (1)")
    parser.add_argument("--updates", type=int, default=6_000, help="of each network (6000)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--n-step", type=int, default=10, help="steps to a reward (10)")
    parser.add_argument("--gamma", type=float, default=0.99)
    parser.add_argument("--conservatism", type=float, default=0.0, help="CQL's alpha (0)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes (0)")
    parser.add_argument("--evaluate-every", type=int, default=500, help="updates (500)")
    parser.add_argument("--episodes", type=int, default=100, help="in the last evaluation (100)")
    parser.add_argument("--picture", type=Path, default=Path("offline_dqn.png"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[Result]:
    """Train every seed; print and draw what came of it."""
    args = parse(argv)
    torch.set_num_threads(1)  # so small a network is slower on more
    source = open_source(args.path, args.env)
    print(f"behaviour: mean return {source.behaviour:.1f}")
    results = [train(args, source, seed) for seed in range(args.seeds)]
    for seed, result in enumerate(results):
        mean, least = result.final.mean(), result.final.min()
        print(f"seed {seed}: {args.episodes} episodes, mean return {mean:.1f}, least {least:.0f}")
    draw(results, source.behaviour, f"{args.path.name}, offline", args.picture)
    print(f"{args.picture}: the learning curves")
    return results


if __name__ == "__main__":
    main()
