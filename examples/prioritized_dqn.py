"""Train a DQN online from a store that it records into, with prioritized replay or without.

    python examples/prioritized_dqn.py cartpole.replay
    python examples/prioritized_dqn.py other.replay --uniform --seed 1

After every step a batch is drawn, transitions of the last moment included, and its TD errors are
reported as priorities. Run it again on the same path and it goes on: with the rows of the store, and
with the priorities, which are kept beside them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from dqn import DQN, Config

from replaystore import Transition
from replaystore.prioritized import Prioritized
from replaystore.recorder import RecordReplay
from replaystore.sampler_file import load_sampler, save_sampler

GAMMA, N_STEP = 0.99, 3
BATCH, WARM_UP, LEARN_EVERY = 64, 500, 2  # transitions, steps before the first update, steps between
COLUMNS = ("observation", "action", "reward", "next_observation", "discount", "weights")
NAME = "priorities"  # of the sampler's file in the store


class Result(NamedTuple):
    """The episodes of a run, in order."""

    returns: np.ndarray  # (episodes,)
    ends: np.ndarray  # (episodes,) steps done by the end of each


class Memory:
    """What the agent learns from: the store that its environment records into."""

    def __init__(self, env: RecordReplay, *, uniform: bool, updates: int, seed: int) -> None:
        self.store = env.store
        self.window = Transition(n_step=N_STEP, gamma=GAMMA)
        self.rng = np.random.default_rng(seed)
        self.sampler = None if uniform else Prioritized(beta_draws=max(1, updates))
        if self.sampler is not None and (self.store.path / "samplers").exists():
            load_sampler(self.store.path, NAME, self.sampler)

    def learn(self, agent: DQN) -> None:
        """Draw a batch, take a gradient step, and report its errors."""
        batch = self.store.sample(BATCH, self.window, self.rng, sampler=self.sampler)
        tensors = {name: torch.from_numpy(getattr(batch, name)) for name in COLUMNS}
        learned = agent.learn(tensors, tensors["weights"])
        if self.sampler is not None:
            self.sampler.update_priorities(batch.ids, learned.errors)

    def save(self) -> None:
        """Keep the rows, and the priorities with them."""
        self.store.flush()
        if self.sampler is not None:
            save_sampler(self.store.path, NAME, self.sampler)


def exploration(step: int, steps: int) -> float:
    """The rate of random actions: from 1 to 0.02 over the first fifth of the run."""
    return max(0.02, 1.0 - step / (0.2 * steps))


def play(env: RecordReplay, agent: DQN, memory: Memory, *, steps: int, seed: int) -> Result:
    """Act and learn for so many steps."""
    returns, ends, total = [], [], 0.0
    observation, _ = env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        action = agent.act(observation[None], epsilon=exploration(step, steps), rng=rng)[0]
        observation, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        if step >= WARM_UP and step % LEARN_EVERY == 0:
            memory.learn(agent)
        if terminated or truncated:
            returns.append(total)
            ends.append(step + 1)
            print(f"step {step + 1:6,}: episode {len(returns):4}, return {total:5.0f}")
            observation, total = env.reset()[0], 0.0
    return Result(np.array(returns), np.array(ends, np.int64))


def train(path: Path, *, steps: int, seed: int, uniform: bool, env_id: str = "CartPole-v1") -> Result:
    """Train an agent from a store at `path`, which is made or added to."""
    torch.set_num_threads(1)  # so small a network is slower on more
    env = RecordReplay(gym.make(env_id), path)
    try:
        space, actions = env.observation_space, env.action_space
        assert isinstance(space, gym.spaces.Box), space
        assert isinstance(actions, gym.spaces.Discrete), actions
        agent = DQN(space.shape, int(actions.n), config=Config(learning_rate=5e-4), seed=seed)
        memory = Memory(env, uniform=uniform, updates=(steps - WARM_UP) // LEARN_EVERY, seed=seed)
        result = play(env, agent, memory, steps=steps, seed=seed)
        memory.save()
        return result
    finally:
        env.close()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="the store; a new one, or one to add to")
    parser.add_argument("--env", default="CartPole-v1", help="Gymnasium id (CartPole-v1)")
    parser.add_argument("--steps", type=int, default=30_000, help="of the environment (30000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--uniform", action="store_true", help="draw without priorities")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Result:
    args = parse(argv)
    result = train(args.path, steps=args.steps, seed=args.seed, uniform=args.uniform, env_id=args.env)
    last = result.returns[-20:]
    print(
        f"{args.path}: {len(result.returns)} episodes, mean return of the last {len(last)}: {last.mean():.1f}"
    )
    return result


if __name__ == "__main__":
    main()
