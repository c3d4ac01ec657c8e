"""Record transitions into a store: CartPole by a controller of mixed quality, or random Atari.

    python examples/record_rollouts.py cartpole.replay --steps 50000
    python examples/record_rollouts.py breakout.replay --atari --env ALE/Breakout-v5 --steps 10000

CartPole's controller looks at the pole only, so the cart may drift off the track; and each
episode replaces a share of its actions, anything from none to all, by random ones. The
store then holds good, bad and random episodes. Other environments are acted in at random. Of
Atari's stacks of frames only the newest is stored; reading stacks them again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

from replaystore.recorder import RecordReplay

Policy = Callable[[np.ndarray], int]


def balance(observation: np.ndarray) -> int:
    """Push to the side that the pole falls to."""
    _, _, angle, angular_velocity = observation
    return int(angle + angular_velocity > 0)


def mixed_policy(num_actions: int, random_share: float, rng: np.random.Generator) -> Policy:
    """Act at random in `random_share` of the steps, and by `balance` in the others."""

    def act(observation: np.ndarray) -> int:
        if rng.random() < random_share:
            return int(rng.integers(num_actions))
        return balance(observation)

    return act


def make_atari(env_id: str) -> gym.Env:
    """An Atari game as stacks of four grey 84×84 frames, four of the game's own to a step."""
    import ale_py

    gym.register_envs(ale_py)
    return FrameStackObservation(AtariPreprocessing(gym.make(env_id, frameskip=1)), 4)


def play(env: gym.Env, policy: Policy, *, seed: int, max_steps: int) -> int:
    """Play one episode, `max_steps` of it at the most; how many steps it took."""
    observation, _ = env.reset(seed=seed)
    steps, over = 0, False
    while steps < max_steps and not over:
        observation, _, terminated, truncated, _ = env.step(policy(observation))
        over = terminated or truncated
        steps += 1
    return steps


def record(env: gym.Env, *, steps: int, seed: int, mixed: bool) -> None:
    """Play episodes, `mixed` in quality or else random, until exactly `steps` are recorded."""
    assert isinstance(env.action_space, gym.spaces.Discrete), env.action_space
    num_actions = int(env.action_space.n)
    rng = np.random.default_rng(seed)
    while steps:
        policy = mixed_policy(num_actions, rng.uniform() if mixed else 1.0, rng)
        steps -= play(env, policy, seed=int(rng.integers(2**31)), max_steps=steps)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="the store; a new one, or one to add to")
    parser.add_argument("--env", default="CartPole-v1", help="Gymnasium id (CartPole-v1)")
    parser.add_argument("--atari", action="store_true", help="the environment is an ALE game")
    parser.add_argument("--steps", type=int, default=50_000, help="transitions (50000)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    env = RecordReplay(make_atari(args.env) if args.atari else gym.make(args.env), args.path)
    record(env, steps=args.steps, seed=args.seed, mixed=args.env == "CartPole-v1")
    env.close()
    print(f"{args.path}: {args.steps:,} transitions of {args.env}")


if __name__ == "__main__":
    main()
