"""Each example runs, with fewer steps; what it comes to is measured by `tools/demo`."""

import sys
from pathlib import Path

import numpy as np
import pytest

from replaystore import ReplayStore, Transition

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    for name in ("dqn", "offline_dqn", "record_rollouts"):
        sys.modules.pop(name, None)


def test_cartpole_is_recorded_and_learned_from_offline(tmp_path):
    import offline_dqn
    import record_rollouts

    path, picture = tmp_path / "cartpole.replay", tmp_path / "curve.png"
    record_rollouts.main([str(path), "--steps", "3000"])
    with ReplayStore.open(path) as store:
        assert len(store) == 3000
        returns = store.episodes["return"].to_numpy()
    assert returns.min() < 60 < returns.max(), "the behaviour is of mixed quality"
    arguments = ["--updates", "60", "--evaluate-every", "30", "--episodes", "3", "--seeds", "2"]
    results = offline_dqn.main([str(path), *arguments, "--picture", str(picture)])
    assert [result.updates.tolist() for result in results] == [[30, 60], [30, 60]]
    assert all((result.final >= 1).all() and len(result.final) == 3 for result in results)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_atari_is_recorded_as_stacks_stored_once(tmp_path):
    import record_rollouts

    path = tmp_path / "breakout.replay"
    record_rollouts.main([str(path), "--atari", "--env", "ALE/Breakout-v5", "--steps", "60"])
    with ReplayStore.open(path) as store:
        assert (len(store), store.frame_stack) == (60, 4)
        assert store.schema.by_name["observation"].shape == (84, 84)
        batch = store.read(np.arange(60), Transition(frame_stack=4))
        assert batch.observation.shape == (60, 4, 84, 84)
        assert np.array_equal(batch.observation[1:], batch.next_observation[:-1])
        assert (batch.observation[0] == batch.observation[0, 0]).all(), "padded with the first frame"


def test_dqn_learns_frames_and_vectors(tmp_path):
    import dqn
    import torch

    rng = np.random.default_rng(0)
    for shape in ((4,), (4, 84, 84)):
        agent = dqn.DQN(shape, 3, config=dqn.Config(), seed=0)
        dtype = np.uint8 if len(shape) == 3 else np.float32
        frames = torch.from_numpy(rng.integers(0, 9, (2, 8, *shape)).astype(dtype))
        batch = {
            "observation": frames[0],
            "next_observation": frames[1],
            "action": torch.arange(8) % 3,
            "reward": torch.ones(8, dtype=torch.float64),
            "discount": torch.zeros(8, dtype=torch.float64),
        }
        losses = [float(agent.learn(batch)[0]) for _ in range(60)]
        assert losses[-1] < losses[0] / 2, "every action is worth 1"
