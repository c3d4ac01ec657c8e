"""Double DQN over batches of n-step transitions: the networks, one update, acting, scoring.

It knows torch and numpy but no replay memory. A batch is a mapping of tensors:

    observation        (batch, …) vectors, or (batch, k, 84, 84) uint8 frames
    action             (batch,)
    reward             (batch,) the discounted sum of the window's rewards
    next_observation   (batch, …) where the window ends
    discount           (batch,) gamma ** steps, and 0 after termination
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import SyncVectorEnv
from torch import Tensor, nn
from torch.nn import functional

COLUMNS = ("observation", "action", "reward", "next_observation", "discount")
FRAME_NDIM = 3  # (k, 84, 84); anything flatter is a vector


@dataclass(frozen=True)
class Config:
    """What a learner may vary."""

    learning_rate: float = 1e-3
    hidden: int = 128  # width of the MLP's two layers
    target_period: int = 1  # updates between two changes of the target network
    target_rate: float = 0.02  # how far a change moves it; 1 copies the online network
    conservatism: float = 0.0  # weight of the CQL(H) term; 0 for online learning
    max_grad_norm: float = 10.0


class Learned(NamedTuple):
    """The outcome of one update."""

    loss: Tensor  # scalar
    errors: Tensor  # (batch,) absolute TD errors, before weighting


class State(TypedDict):
    """All that learning goes on from; `torch.save` takes it."""

    online: dict[str, Tensor]
    target: dict[str, Tensor]
    optimizer: dict[str, object]
    updates: int


class Scale(nn.Module):
    """Turns bytes into [0, 1], on the device, so that only bytes travel there."""

    def forward(self, frames: Tensor) -> Tensor:
        return frames.float() / 255


def mlp(size: int, num_actions: int, hidden: int) -> nn.Sequential:
    """A Q-network for vectors of `size` numbers."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(size, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_actions),
    )


def nature_cnn(num_frames: int, num_actions: int) -> nn.Sequential:
    """The Q-network of Mnih et al. (2015) for stacks of 84×84 frames."""
    return nn.Sequential(
        Scale(),
        nn.Conv2d(num_frames, 32, 8, stride=4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 512),
        nn.ReLU(),
        nn.Linear(512, num_actions),
    )


class DQN:
    """A Q-network that learns from batches; its weights depend on `seed` and batches only."""

    def __init__(
        self,
        observation_shape: tuple[int, ...],
        num_actions: int,
        *,
        config: Config,
        seed: int,
        device: str = "cpu",
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if len(observation_shape) == FRAME_NDIM:
                network = nature_cnn(observation_shape[0], num_actions)
            else:
                network = mlp(int(np.prod(observation_shape)), num_actions, config.hidden)
        self.config = config
        self.device = torch.device(device)
        self.num_actions = num_actions
        self.online = network.to(self.device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.online.parameters(), lr=config.learning_rate)
        self.updates = 0

    def learn(self, batch: Mapping[str, Tensor], weights: Tensor | None = None) -> Learned:
        """Take one gradient step; `weights` (batch,) are importance weights of the items."""
        batch = {name: batch[name].to(self.device, non_blocking=True) for name in COLUMNS}
        values = self.online(batch["observation"])
        taken = values.gather(1, batch["action"].long().unsqueeze(1)).squeeze(1)
        target = self._target(batch)
        losses = functional.smooth_l1_loss(taken, target, reduction="none")
        if self.config.conservatism:
            losses = losses + self.config.conservatism * (values.logsumexp(1) - taken)
        if weights is not None:
            losses = losses * weights.to(self.device)
        loss = losses.mean()
        self._descend(loss)
        return Learned(loss.detach(), (taken - target).detach().abs())

    @torch.no_grad()
    def _target(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The double-DQN target: the online network chooses, the target network values."""
        following = batch["next_observation"]
        chosen = self.online(following).argmax(1, keepdim=True)
        value: Tensor = self.target(following).gather(1, chosen).squeeze(1)
        return batch["reward"].float() + batch["discount"].float() * value

    def _descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.online.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.updates += 1
        if self.updates % self.config.target_period == 0:
            self._move_target()

    @torch.no_grad()
    def _move_target(self) -> None:
        for kept, new in zip(self.target.parameters(), self.online.parameters(), strict=True):
            kept.lerp_(new, self.config.target_rate)

    @torch.no_grad()
    def act(self, observations: np.ndarray, *, epsilon: float, rng: np.random.Generator) -> np.ndarray:
        """An action for each of `observations` (batch, …): int64, random with rate `epsilon`."""
        values = self.online(torch.from_numpy(observations).to(self.device))
        greedy = values.argmax(1).cpu().numpy()
        other = rng.integers(self.num_actions, size=len(greedy))
        return np.where(rng.random(len(greedy)) < epsilon, other, greedy)

    def state_dict(self) -> State:
        """What `load_state_dict` goes on from; its tensors are the agent's own, not copies."""
        return {
            "online": self.online.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from what `state_dict` returned."""
        self.online.load_state_dict(state["online"])
        self.target.load_state_dict(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]


def evaluate(agent: DQN, make_env: Callable[[], gym.Env], *, episodes: int, seed: int) -> np.ndarray:
    """Returns (episodes,) of the greedy policy: one episode in each of as many environments."""
    envs = SyncVectorEnv([make_env] * episodes)
    rng = np.random.default_rng(seed)
    observations, _ = envs.reset(seed=seed)
    returns = np.zeros(episodes)
    running = np.ones(episodes, bool)
    while running.any():
        actions = agent.act(observations, epsilon=0.0, rng=rng)
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        returns += rewards * running
        running &= ~(terminated | truncated)
    envs.close()
    return returns
