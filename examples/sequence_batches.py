"""Batches of sequences: for a recurrent agent, for a decision transformer, and a GRU that learns.

    python examples/sequence_batches.py pendulum.replay --steps 4000

Records Pendulum-v1 acted in at random, prints what batches of its sequences look like, and trains
a GRU on a CPU to predict the next observation. The first steps of a sequence only warm the GRU's
state up, and padding does not count.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium as gym
import torch
from torch import nn

from replaystore.dataset import ReplayDataset
from replaystore.recorder import RecordReplay
from replaystore.sequences import Sequence, WholeEpisode

BURN_IN, LENGTH, BATCH = 4, 16, 16


def record(path: Path, steps: int, *, seed: int) -> None:
    """Act at random for so many steps."""
    env = RecordReplay(gym.make("Pendulum-v1"), path)
    env.action_space.seed(seed)
    env.reset(seed=seed)
    for _ in range(steps):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
    env.close()


def show_shapes(path: Path) -> None:
    """Print a batch of each kind."""
    windows = {
        "R2D2": Sequence(LENGTH, burn_in=BURN_IN, stride=LENGTH // 2),
        "decision transformer": Sequence(LENGTH, gamma=1.0),
        "whole episodes": WholeEpisode(max_length=100),
    }
    for name, window in windows.items():
        batch = next(iter(ReplayDataset(path, window).loader(BATCH, seed=0)))
        shapes = ", ".join(f"{field} {tuple(value.shape)}" for field, value in batch.items())
        print(f"{name}: {shapes}")


class Model(nn.Module):
    """Predicts how each observation changes, from what was seen and done so far."""

    def __init__(self, observation_size: int, action_size: int, hidden: int = 32) -> None:
        super().__init__()
        self.gru = nn.GRU(observation_size + action_size, hidden, batch_first=True)
        self.head = nn.Linear(hidden, observation_size)

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        steps = torch.cat([observation, action], dim=-1)
        with torch.no_grad():
            _, state = self.gru(steps[:, :BURN_IN])
        states, _ = self.gru(steps[:, BURN_IN:], state)
        return observation[:, BURN_IN:] + self.head(states)


def prediction_loss(model: Model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean squared error over real steps; `observation` is one step longer than the rest."""
    observation = batch["observation"]
    predicted = model(observation[:, :-1], batch["action"])
    error = ((predicted - observation[:, BURN_IN + 1 :]) ** 2).mean(dim=-1)
    mask = batch["mask"][:, BURN_IN:]
    return (error * mask).sum() / mask.sum()


def learn(path: Path, updates: int, *, seed: int) -> list[float]:
    """Train on sequences in random order; the loss of each update."""
    torch.manual_seed(seed)
    dataset = ReplayDataset(path, Sequence(LENGTH, burn_in=BURN_IN))
    loader = dataset.loader(BATCH, seed=seed)
    schema = dataset.store.schema.by_name
    model = Model(*(schema[name].shape[0] for name in ("observation", "action")))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses: list[float] = []
    while len(losses) < updates:
        for batch in loader:
            loss = prediction_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == updates:
                break
    return losses


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="the store; a new one, or one of Pendulum to add to")
    parser.add_argument("--steps", type=int, default=4000, help="transitions to record (4000)")
    parser.add_argument("--updates", type=int, default=200, help="batches to learn from (200)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[float]:
    args = parse(argv)
    record(args.path, args.steps, seed=args.seed)
    show_shapes(args.path)
    losses = learn(args.path, args.updates, seed=args.seed)
    for update in range(0, len(losses), max(1, len(losses) // 10)):
        print(f"update {update:5d}: loss {losses[update]:.4f}")
    print(f"update {len(losses) - 1:5d}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
