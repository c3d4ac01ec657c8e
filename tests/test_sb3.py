import contextlib
import copy
import gc
import os
import pickle
import shutil
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage

from replaystore import Field, ReplayStore, Transition
from replaystore.errors import CommitError, SchemaError, StoreGone, UsageError
from replaystore.recorder import RecordReplay
from replaystore.sb3 import ReplayStoreBuffer, ReplayStoreDictBuffer
from replaystore.spaces import schema_from_spaces

pytestmark = pytest.mark.usefixtures("_no_syncs")

BOX = spaces.Box(-10, 10, (3,), np.float32)
FOUR = spaces.Discrete(4)
TWO_PARTS = spaces.Dict(
    {"image": spaces.Box(0, 255, (2, 6, 6), np.uint8), "goal": spaces.Discrete(5), "arm": BOX}
)


class Walk(gym.Env):
    """Random observations of any space; episodes of 3 to 9 steps end one way or the other."""

    def __init__(self, seed=0, observation_space=BOX, action_space=FOUR):
        self.observation_space, self.action_space = copy.deepcopy((observation_space, action_space))
        self.observation_space.seed(seed)
        self.action_space.seed(seed)
        self._rng = np.random.default_rng(seed)

    def reset(self, *, seed=None, options=None):
        self._left = int(self._rng.integers(3, 10))
        return self.observation_space.sample(), {}

    def step(self, action):
        self._left -= 1
        ends = self._left == 0
        terminated = ends and bool(self._rng.integers(2))
        return self.observation_space.sample(), self._rng.normal(), terminated, ends and not terminated, {}


def walks(n_envs=1, **arguments):
    return DummyVecEnv([lambda seed=seed: Walk(seed, **arguments) for seed in range(n_envs)])


def pictures(n_envs=1, channels=1, frames=4):
    """Stacks of frames as `make_atari_env` and DQN's "CnnPolicy" make them: (frames * channels, 24, 24)."""
    space = spaces.Box(0, 255, (24, 24, channels), np.uint8)
    return VecTransposeImage(VecFrameStack(walks(n_envs, observation_space=space), frames))


def leaves(observations):
    return observations if isinstance(observations, dict) else {"": observations}


def raw(envs, normalized, original):
    return original() if isinstance(envs, VecNormalize) else normalized


def feed(envs, buffers, steps, now=None):
    """Take random steps and add them as SB3 does; returns the last observations, to go on from."""
    if now is None:
        now = raw(envs, envs.reset(), lambda: envs.get_original_obs())
    for _ in range(steps):
        action = np.array([envs.action_space.sample() for _ in range(envs.num_envs)])
        after, reward, done, infos = envs.step(action)
        after = raw(envs, after, lambda: envs.get_original_obs())
        reward = raw(envs, reward, lambda: envs.get_original_reward())
        final = copy.deepcopy(after)
        for env in np.flatnonzero(done):
            last = infos[env]["terminal_observation"]
            last = envs.unnormalize_obs(last) if isinstance(envs, VecNormalize) else last
            for key, leaf in leaves(final).items():
                leaf[env] = leaves(last)[key]
        for buffer in buffers:
            buffer.add(copy.deepcopy(now), copy.deepcopy(final), action, reward, done, infos)
        now = after
    return now


def buffer_for(envs, path, size=50, **arguments):
    is_dict = isinstance(envs.observation_space, spaces.Dict)
    kind = ReplayStoreDictBuffer if is_dict else ReplayStoreBuffer
    return kind(
        size, envs.observation_space, envs.action_space, "cpu", n_envs=envs.num_envs, path=path, **arguments
    )


def sb3_buffer_for(envs, size=50, **arguments):
    kind = DictReplayBuffer if isinstance(envs.observation_space, spaces.Dict) else ReplayBuffer
    return kind(size, envs.observation_space, envs.action_space, "cpu", n_envs=envs.num_envs, **arguments)


def drawn(buffer, n=200, env=None):
    np.random.seed(7)  # noqa: NPY002 — what SB3 draws from
    return buffer.sample(n, env)


def assert_same_samples(mine, theirs, env=None):
    assert (mine.pos, mine.full, mine.size()) == (theirs.pos, theirs.full, theirs.size())
    ours, wanted = drawn(mine, env=env), drawn(theirs, env=env)
    assert type(ours) is type(wanted)
    for name, value in wanted._asdict().items():
        if value is None:
            assert getattr(ours, name) is None
            continue
        found = leaves(getattr(ours, name))
        assert list(found) == list(leaves(value))
        for key, leaf in leaves(value).items():
            torch.testing.assert_close(found[key], leaf, rtol=0, atol=0)
            assert found[key].stride() == leaf.stride()


# ---- what SB3's own buffer gives, bit for bit


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("handle_timeout_termination", [True, False])
@pytest.mark.parametrize(
    "observation_space",
    [BOX, spaces.Discrete(7), spaces.MultiDiscrete([3, 4]), spaces.MultiBinary(5), TWO_PARTS],
    ids=lambda space: type(space).__name__,
)
def test_samples_are_those_of_sb3s_own_buffer(
    tmp_path, n_envs, handle_timeout_termination, observation_space
):
    envs = walks(n_envs, observation_space=observation_space)
    theirs = sb3_buffer_for(envs, handle_timeout_termination=handle_timeout_termination)
    mine = buffer_for(envs, tmp_path / "a", handle_timeout_termination=handle_timeout_termination)
    now = None
    for steps in (2, 13, 1, 60, 45):  # the ring wraps, between samples too
        now = feed(envs, [mine, theirs], steps, now)
        assert_same_samples(mine, theirs)
    mine.close()


@pytest.mark.parametrize(
    "action_space",
    [
        spaces.Discrete(10),
        spaces.Discrete(3, start=-1),
        spaces.MultiDiscrete([3, 4]),
        spaces.MultiBinary(4),
        spaces.Box(-1, 1, (2,), np.float32),
        spaces.Box(-1, 1, (2, 3), np.float32),
        spaces.Box(-1, 1, (2,), np.float64),
    ],
    ids=str,
)
def test_actions_have_sb3s_shapes_and_dtypes(tmp_path, action_space):
    envs = walks(2, action_space=action_space)
    mine, theirs = buffer_for(envs, tmp_path / "a"), sb3_buffer_for(envs)
    feed(envs, [mine, theirs], 40)
    assert_same_samples(mine, theirs)
    mine.close()


@pytest.mark.parametrize("is_dict", [False, True])
@pytest.mark.parametrize(
    "dtype",
    [
        "uint8",
        "int8",
        "uint16",
        "int16",
        "uint32",
        "int32",
        "uint64",
        "int64",
        "float16",
        "float32",
        "float64",
    ],
)
def test_observations_have_the_dtypes_of_their_space(tmp_path, dtype, is_dict):
    space = spaces.Box(0, 100, (2,), np.dtype(dtype))
    envs = walks(1, observation_space=spaces.Dict({"one": space, "two": BOX}) if is_dict else space)
    mine, theirs = buffer_for(envs, tmp_path / "a"), sb3_buffer_for(envs)
    feed(envs, [mine, theirs], 20)
    sample = leaves(drawn(mine).observations)
    assert sample["one" if is_dict else ""].numpy().dtype == dtype
    assert_same_samples(mine, theirs)
    mine.close()


def test_values_of_another_dtype_are_cast_as_sb3_casts_them(tmp_path):
    envs = walks(1)
    mine, theirs = buffer_for(envs, tmp_path / "a"), sb3_buffer_for(envs)
    rng = np.random.default_rng(0)
    for _ in range(30):
        now, after = rng.normal(size=(2, 1, 3))  # float64, and of no episode in particular
        for buffer in (mine, theirs):
            buffer.add(now, after, np.array([1], np.int32), np.array([0.1]), np.array([0.0]), [{}])
    assert_same_samples(mine, theirs)
    mine.close()


@pytest.mark.parametrize("observation_space", [BOX, TWO_PARTS], ids=["Box", "Dict"])
def test_samples_are_normalized_as_sb3_normalizes_them(tmp_path, observation_space):
    keys = ["arm"] if observation_space is TWO_PARTS else None
    envs = VecNormalize(walks(2, observation_space=observation_space), norm_obs_keys=keys)
    mine, theirs = buffer_for(envs, tmp_path / "a"), sb3_buffer_for(envs)
    feed(envs, [mine, theirs], 40)
    assert_same_samples(mine, theirs, env=envs)
    assert drawn(mine, env=envs).rewards.dtype == torch.float32
    mine.close()


@pytest.mark.parametrize("device", ["cpu", "auto", "meta"])
def test_samples_are_on_the_device(tmp_path, device):
    envs = walks(1)
    with ReplayStore.create(tmp_path / "a", schema_from_spaces(BOX, FOUR)):
        pass
    mine = ReplayStoreBuffer(50, BOX, FOUR, device, path=tmp_path / "a")
    feed(envs, [mine], 20)
    wanted = ReplayBuffer(50, BOX, FOUR, device).device.type
    sample = mine.sample(10)
    assert {part.device.type for part in sample if part is not None} == {wanted}
    mine.close()


def test_extend_adds_one_after_the_other(tmp_path):
    mine, theirs = buffer_for(walks(1), tmp_path / "a"), sb3_buffer_for(walks(1))
    numbers = np.arange(10, dtype=np.float32)
    now = np.broadcast_to(numbers[:, None, None], (10, 1, 3))
    rest = (np.zeros((10, 1), np.int64), numbers[:, None], np.zeros((10, 1), bool), [[{}]] * 10)
    for buffer in (mine, theirs):
        buffer.extend(now, now + 1, *rest)
    assert_same_samples(mine, theirs)
    assert mine.store.episodes["length"].to_pylist() == [10]
    mine.close()


# ---- training


@pytest.mark.parametrize(
    ("algorithm", "env", "steps"), [(DQN, "CartPole-v1", 2000), (SAC, "Pendulum-v1", 250)], ids=["DQN", "SAC"]
)
def test_training_ends_with_the_same_weights(tmp_path, algorithm, env, steps):
    models = []
    for kwargs in (
        {},
        {"replay_buffer_class": ReplayStoreBuffer, "replay_buffer_kwargs": {"path": tmp_path / "a"}},
    ):
        model = algorithm(
            "MlpPolicy", env, seed=3, device="cpu", buffer_size=1000, learning_starts=50, **kwargs
        )
        models.append(model.learn(steps))
    theirs, mine = (model.policy.state_dict() for model in models)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert len(models[1].replay_buffer.store) == steps
    models[1].replay_buffer.close()


def test_dqn_learns_from_pictures_of_which_each_is_stored_once(tmp_path):
    space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    models = []
    for kwargs in (
        {},
        {"replay_buffer_class": ReplayStoreBuffer, "replay_buffer_kwargs": {"path": tmp_path / "a"}},
    ):
        envs = VecFrameStack(walks(2, observation_space=space), 4)
        torch.manual_seed(0)
        model = DQN("CnnPolicy", envs, seed=3, device="cpu", buffer_size=60, learning_starts=20, **kwargs)
        models.append(model.learn(100).learn(40))  # the second time, environments begin anew
    theirs, mine = (model.policy.state_dict() for model in models)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    store = models[1].replay_buffer.store
    assert store.frame_stack == 4
    assert store.schema.by_name["observation"].shape == (36, 36)
    models[1].replay_buffer.close()


# ---- what the store holds


def test_observations_are_stored_once_and_endings_apart(tmp_path):
    envs = walks(2)
    mine = buffer_for(envs, tmp_path / "a")
    added = []
    keep = mock.Mock(add=lambda *values: added.append(values))
    feed(envs, [mine, keep], 60)
    mine.close()
    with ReplayStore.open(tmp_path / "a") as store:
        store.check()
        assert len(store) == 120
        episodes = store.episodes
        closed = np.array(episodes["terminated"]) | np.array(episodes["truncated"])
        assert closed.sum() == sum(done.sum() for *_, done, _ in added)
        truncated = sum(info.get("TimeLimit.truncated", False) for *_, infos in added for info in infos)
        assert np.array(episodes["truncated"]).sum() == truncated > 0
        assert not (np.array(episodes["terminated"]) & np.array(episodes["truncated"])).any()
        by_env = {env: [] for env in range(2)}
        for number, env in enumerate(episodes["env"].to_pylist()):
            by_env[env].append(store.episode(number)["observation"])
        for env in range(2):
            wanted = [now[env] for now, *_ in added]
            found = np.concatenate([observations[:-1] for observations in by_env[env]])
            np.testing.assert_array_equal(found, wanted)
            lasts = [values[1][env] for values in added if values[4][env]]
            np.testing.assert_array_equal([each[-1] for each in by_env[env][: len(lasts)]], lasts)


def test_an_episode_begins_where_an_observation_does_not_follow(tmp_path):
    envs = walks(1)
    mine = buffer_for(envs, tmp_path / "a")
    zero, one = np.zeros((1, 3), np.float32), np.ones((1, 3), np.float32)
    rest = (np.array([0]), np.array([0.0]), np.array([False]), [{}])
    for now, after in ((zero, one), (one, zero), (one, -zero), (zero, one)):
        mine.add(now, after, *rest)
    assert mine.store.episodes["length"].to_pylist() == [2, 1, 1]  # -0 is not 0
    np.testing.assert_array_equal(mine._read(np.arange(4), np.zeros(4, int)).observation[:, 0], [0, 1, 1, 0])
    mine.close()


def test_observations_that_are_not_numbers_follow_as_well(tmp_path):
    mine = buffer_for(walks(1), tmp_path / "a")
    nothing = np.full((1, 3), np.nan, np.float32)
    for _ in range(3):
        mine.add(nothing, nothing, np.array([0]), np.array([0.0]), np.array([False]), [{}])
    assert mine.store.episodes["length"].to_pylist() == [3]
    mine.close()


def test_only_the_newest_are_sampled_whatever_the_store_holds(tmp_path):
    envs = walks(2)
    mine = buffer_for(envs, tmp_path / "a", size=21)
    feed(envs, [mine], 40)
    assert mine.buffer_size == mine.size() == 10
    assert len(mine.store) == 80
    ids = np.unique(mine._read(*np.indices((10, 2)).reshape(2, -1)).ids)
    newest = mine.store.read(np.arange(80))
    times = {env: np.sort(newest.ids[newest.ids % 2 == env])[-10:] for env in range(2)}
    np.testing.assert_array_equal(ids, np.sort(np.concatenate(list(times.values()))))
    mine.close()


def test_reset_empties_the_buffer_and_not_the_store(tmp_path):
    envs = walks(1)
    mine, theirs = buffer_for(envs, tmp_path / "a"), sb3_buffer_for(envs)
    now = feed(envs, [mine, theirs], 30)
    for buffer in (mine, theirs):
        buffer.reset()
    assert mine.size() == 0
    feed(envs, [mine, theirs], 12, now)
    assert_same_samples(mine, theirs)
    assert len(mine.store) == 42
    mine.close()


def test_a_store_that_is_there_is_continued(tmp_path):
    envs = walks(2)
    first, theirs = buffer_for(envs, tmp_path / "a", size=40), sb3_buffer_for(envs, size=40)
    feed(envs, [first, theirs], 15)
    first.close()
    mine = buffer_for(envs, tmp_path / "a", size=40)
    assert_same_samples(mine, theirs)
    feed(envs, [mine, theirs], 31)
    assert_same_samples(mine, theirs)
    assert len(mine.store) == 92
    mine.close()


def test_a_store_of_a_recorder_is_sampled(tmp_path):
    with RecordReplay(Walk(), tmp_path / "a") as env:
        env.reset()
        for _ in range(30):
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            if terminated or truncated:
                env.reset()
    mine = buffer_for(walks(1), tmp_path / "a", size=20)
    assert (mine.size(), mine.full) == (20, True)
    assert mine.sample(10).actions.shape == (10, 1)
    feed(walks(1), [mine], 5)
    assert len(mine.store) == 35
    mine.close()


def test_another_writer_of_the_store_does_not_disturb(tmp_path):
    envs = walks(1)
    with ReplayStore.create(tmp_path / "a", schema_from_spaces(BOX, FOUR)) as other:
        other.reset(np.zeros(3, np.float32))
        for _ in range(3):
            other.step(0, np.zeros(3, np.float32), 0.0, False, False)
        other.flush()
        mine, theirs = buffer_for(envs, tmp_path / "a", size=20), sb3_buffer_for(envs, size=20)
        for _ in range(3):  # what the store held already
            zero = np.zeros((1, 3), np.float32)
            theirs.add(zero, zero, np.array([0]), np.array([0.0]), np.array([False]), [{}])
        now = None
        for _ in range(5):
            now = feed(envs, [mine, theirs], 6, now)
            assert_same_samples(mine, theirs)
        mine.close()


def test_an_index_made_anew_has_the_same_transitions(tmp_path):
    envs = walks(1)
    zero = np.zeros(3, np.float32)
    with ReplayStore.create(tmp_path / "a", schema_from_spaces(BOX, FOUR)) as first:
        other = ReplayStore.open(tmp_path / "a", "a")  # of the second stream
        for store in (first, other):
            for _ in range(3):
                store.add_episode(
                    observation=np.stack([zero] * 2),
                    action=[0],
                    reward=[0.0],
                    terminated=[True],
                    truncated=[False],
                )
            store.flush()
    mine, theirs = buffer_for(envs, tmp_path / "a"), sb3_buffer_for(envs)
    for _ in range(6):
        theirs.add(zero[None], zero[None], np.array([0]), np.zeros(1), np.array([True]), [{}])
    now = None
    for _ in range(3):
        now = feed(envs, [mine, theirs], 10, now)
        assert_same_samples(mine, theirs)
        now = feed(envs, [mine, theirs], 10, now)
        mine.store.flush()  # so that they stand before the other stream's in the new index
        mine.store._view._is_behind = True  # as after an interrupt while it was being followed
    other.close()
    assert_same_samples(mine, theirs)
    mine.close()


@pytest.mark.parametrize("method", ["step", "reset"])
def test_a_failed_commit_can_be_repeated(tmp_path, method):
    envs = pictures(2)
    mine, theirs = buffer_for(envs, tmp_path / "a"), sb3_buffer_for(envs)
    failures = []

    def add(*values):
        error = CommitError(28, "the disk is full", "somewhere")
        with mock.patch.object(ReplayStore, method, side_effect=error), contextlib.suppress(CommitError):
            mine.add(*values)
            return  # there was nothing to begin
        failures.append(values)
        mine.add(*values)

    added = []
    keep = mock.Mock(add=lambda *values: added.append(values))
    feed(envs, [mock.Mock(add=add), theirs, keep], 20)
    assert len(failures) == 20 if method == "step" else 2 < len(failures) < 20
    assert_same_samples(mine, theirs)
    assert len(mine.store) == 40
    assert mine.store.num_episodes == sum(values[4].sum() for values in added) + 2 - sum(added[-1][4])
    mine.close()


def test_an_interrupt_in_a_step_ends_the_episode_before_it(tmp_path):
    envs = walks(1)
    mine, theirs = buffer_for(envs, tmp_path / "a"), sb3_buffer_for(envs)
    now = feed(envs, [mine, theirs], 1)
    with (
        mock.patch.object(ReplayStore, "step", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        feed(envs, [mine], 1, now)
    feed(envs, [mine, theirs], 10)
    assert_same_samples(mine, theirs)
    mine.close()


# ---- frame stacks


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize(
    ("channels", "frames", "given"),
    [(1, 4, None), (1, 4, 4), (1, 2, None), (3, 4, 4), (1, 4, 1), (3, 4, None)],
)
def test_stacks_are_rebuilt_from_the_newest_frames(tmp_path, n_envs, channels, frames, given):
    envs = pictures(n_envs, channels, frames)
    mine, theirs = buffer_for(envs, tmp_path / "a", frame_stack=given), sb3_buffer_for(envs)
    now = None
    for steps in (1, 5, 40, 45):
        now = feed(envs, [mine, theirs], steps, now)
        assert_same_samples(mine, theirs)
    is_whole = given == 1 or (channels == 3 and given is None)
    assert mine.store.frame_stack == (1 if is_whole else frames)
    frame = (24, 24) if channels == 1 else (3, 24, 24)
    wanted = (channels * frames, 24, 24) if is_whole else frame
    assert mine.store.schema.by_name["observation"].shape == wanted
    mine.close()


def test_a_stack_of_vectors_is_rebuilt(tmp_path):
    envs = VecFrameStack(walks(2), 3)
    mine, theirs = buffer_for(envs, tmp_path / "a", frame_stack=3), sb3_buffer_for(envs)
    feed(envs, [mine, theirs], 60)
    assert mine.store.schema.by_name["observation"].shape == (3,)
    assert_same_samples(mine, theirs)
    mine.close()


def test_stacks_of_a_dict_are_rebuilt(tmp_path):
    space = spaces.Dict({"far": spaces.Box(0, 255, (2,), np.uint8), "near": BOX})
    envs = VecFrameStack(walks(2, observation_space=space), 3)
    mine, theirs = buffer_for(envs, tmp_path / "a", frame_stack=3), sb3_buffer_for(envs)
    feed(envs, [mine, theirs], 60)
    assert mine.store.schema.by_name["observation/far"].shape == (2,)
    assert_same_samples(mine, theirs)
    mine.close()


@pytest.mark.parametrize("given", [{}, {"frame_stack": 4, "padding": "reset"}], ids=["found", "given"])
def test_stacks_padded_with_the_first_frame_are_rebuilt(tmp_path, given):
    def make():
        env = Walk(observation_space=spaces.Box(0, 255, (12, 12), np.uint8))
        return gym.wrappers.FrameStackObservation(env, 4)

    envs = DummyVecEnv([make])
    mine, theirs = buffer_for(envs, tmp_path / "a", **given), sb3_buffer_for(envs)
    feed(envs, [mine, theirs], 60)
    assert mine.store.schema.by_name["observation"].shape == (12, 12)
    assert_same_samples(mine, theirs)
    mine.close()


def test_a_store_says_how_its_stacks_are_padded(tmp_path):
    envs = pictures()
    theirs = sb3_buffer_for(envs)
    for _ in range(2):
        mine = buffer_for(envs, tmp_path / "a")
        feed(envs, [mine, theirs], 10)
        mine.close()
    mine = buffer_for(envs, tmp_path / "a")
    assert_same_samples(mine, theirs)
    mine.close()
    with pytest.raises(SchemaError, match=r"expected shape \(24, 24\), got \(4, 24, 24\)"):
        buffer_for(envs, tmp_path / "a", frame_stack=1)


def test_a_picture_that_is_no_stack_is_stored_whole(tmp_path):
    envs = walks(1, observation_space=spaces.Box(0, 255, (3, 12, 12), np.uint8))
    mine, theirs = buffer_for(envs, tmp_path / "a"), sb3_buffer_for(envs)
    feed(envs, [mine, theirs], 20)
    assert mine.store.frame_stack == 1
    assert_same_samples(mine, theirs)
    mine.close()


def test_a_grey_picture_in_three_colours_is_stored_whole(tmp_path):
    envs = walks(1, observation_space=spaces.Box(0, 255, (3, 6, 6), np.uint8))
    mine = buffer_for(envs, tmp_path / "a")
    grey = np.full((1, 3, 6, 6), 9, np.uint8)
    mine.add(grey, grey, np.array([0]), np.array([0.0]), np.array([False]), [{}])
    assert mine.store.frame_stack == 1
    mine.close()


def test_a_stack_that_does_not_move_on_is_refused(tmp_path):
    envs = pictures(2)
    mine = buffer_for(envs, tmp_path / "a")
    now = feed(envs, [mine], 2)
    other = now.copy()
    other[:, :-1] = now[:, 1:]
    other[1, 0, 5, 5] ^= 1
    rest = (np.array([0, 0]), np.zeros(2), np.zeros(2, bool), [{}, {}])
    with pytest.raises(SchemaError, match=r"environment 1: expected the stack of 4 frames moved on by one"):
        mine.add(now, other, *rest)
    assert len(mine.store) == 4
    mine.close()


def test_an_episode_that_begins_with_other_frames_is_refused(tmp_path):
    envs = pictures()
    mine = buffer_for(envs, tmp_path / "a", frame_stack=4, padding="reset")
    with pytest.raises(SchemaError, match="filled with padding 'reset', got other frames"):
        feed(envs, [mine], 1)
    mine.close()


@pytest.mark.parametrize("frame_stack", [0, True, 2.0])
def test_a_frame_stack_that_is_no_number_of_frames_is_refused(tmp_path, frame_stack):
    with pytest.raises(UsageError, match="frame_stack: expected an int from 1"):
        buffer_for(pictures(), tmp_path / "a", frame_stack=frame_stack)


@pytest.mark.parametrize("space", [spaces.Box(0, 255, (9, 6, 6), np.uint8), spaces.Discrete(4)], ids=str)
def test_a_space_that_is_no_stack_is_refused(tmp_path, space):
    with pytest.raises(SchemaError, match="expected a Box with 4 frames along its first axis"):
        buffer_for(walks(observation_space=space), tmp_path / "a", frame_stack=4)


# ---- saving


def test_a_saved_buffer_gives_the_same_samples_and_no_later_rows(tmp_path):
    envs = pictures(2)
    mine, theirs = buffer_for(envs, tmp_path / "a"), sb3_buffer_for(envs)
    now = feed(envs, [mine, theirs], 40)
    nothing = len(pickle.dumps(buffer_for(envs, tmp_path / "b")))
    saved = pickle.dumps(mine)
    assert len(saved) < nothing + 2000  # 40 steps of pictures of 576 bytes
    feed(envs, [mine], 10, now)
    mine.close()
    again = pickle.loads(saved)
    assert_same_samples(again, theirs)
    feed(envs, [again, theirs], 33)
    assert_same_samples(again, theirs)
    assert len(again.store) == 2 * 83
    again.close()


def test_a_model_goes_on_from_a_saved_buffer(tmp_path):
    path = tmp_path / "a"
    kwargs = {"replay_buffer_class": ReplayStoreBuffer, "replay_buffer_kwargs": {"path": path}}
    model = DQN(
        "MlpPolicy", "CartPole-v1", seed=0, device="cpu", buffer_size=500, learning_starts=50, **kwargs
    )
    model.learn(300)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    wanted = drawn(model.replay_buffer)
    model.learn(100, reset_num_timesteps=False)
    model.replay_buffer.store.flush()
    again = DQN.load(tmp_path / "model", env=model.env)
    assert again.replay_buffer.size() == 400  # the newest that the store holds
    again.load_replay_buffer(tmp_path / "buffer")
    assert again.replay_buffer.size() == 300
    for mine, theirs in zip(drawn(again.replay_buffer)[:5], wanted[:5], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    again.learn(100, reset_num_timesteps=False)
    assert again.replay_buffer.size() == 400
    for each in (model, again):
        each.replay_buffer.close()
    with ReplayStore.open(path) as store:
        assert len(store) == 500


def test_a_saved_buffer_is_durable_before_it_is_closed(tmp_path):
    envs = walks(1)
    mine, theirs = buffer_for(envs, tmp_path / "a"), sb3_buffer_for(envs)
    feed(envs, [mine, theirs], 20)
    saved = pickle.dumps(mine)
    again = pickle.loads(saved)  # while the first one holds the stream
    assert_same_samples(again, theirs)
    now = feed(envs, [again, theirs], 20)
    feed(envs, [again, theirs], 20, now)
    assert_same_samples(again, theirs)
    assert again.store.items(Transition()).episodes()[0].max() == 1
    for each in (mine, again):
        each.close()


def test_a_buffer_that_has_nothing_can_be_saved(tmp_path):
    envs = walks(1)
    again = pickle.loads(pickle.dumps(buffer_for(envs, tmp_path / "a")))
    assert again.size() == 0
    feed(envs, [again], 5)
    assert len(again.store) == 5
    again.close()


def test_loading_a_buffer_says_that_its_store_is_gone(tmp_path):
    envs = walks(1)
    mine = buffer_for(envs, tmp_path / "a")
    feed(envs, [mine], 5)
    saved = pickle.dumps(mine)
    mine.close()
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(StoreGone, match="expected the store of a saved buffer of 5 transitions, found none"):
        pickle.loads(saved)


@pytest.mark.parametrize("steps", [2, 5, 9])
def test_loading_a_buffer_says_that_another_store_is_in_its_place(tmp_path, steps):
    mine = buffer_for(walks(1), tmp_path / "a")
    feed(walks(1), [mine], 5)
    saved = pickle.dumps(mine)
    mine.close()
    shutil.rmtree(tmp_path / "a")
    other = buffer_for(walks(1), tmp_path / "a")
    feed(DummyVecEnv([lambda: Walk(seed=99)]), [other], steps)
    other.close()
    with pytest.raises(UsageError, match=r"no longer in the store|found another"):
        pickle.loads(saved)


# ---- closing


def test_a_buffer_that_is_forgotten_closes_its_store(tmp_path):
    mine = buffer_for(walks(1), tmp_path / "a")
    feed(walks(1), [mine], 5)
    del mine
    gc.collect()
    with ReplayStore.open(tmp_path / "a") as store:
        assert len(store) == 5


def test_a_forked_child_leaves_the_store_to_its_parent(tmp_path):
    mine = buffer_for(walks(1), tmp_path / "a")
    now = feed(envs := walks(1), [mine], 5)
    child = os.fork()
    if child == 0:
        mine.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    feed(envs, [mine], 5, now)
    mine.close()
    with ReplayStore.open(tmp_path / "a") as store:
        assert len(store) == 10


def test_a_closed_buffer_can_be_added_to_again(tmp_path):
    envs = walks(1)
    mine, theirs = buffer_for(envs, tmp_path / "a"), sb3_buffer_for(envs)
    now = feed(envs, [mine, theirs], 5)
    for _ in range(3):
        mine.close()
        now = feed(envs, [mine, theirs], 5, now)
        assert_same_samples(mine, theirs)
        now = feed(envs, [mine, theirs], 5, now)
    mine.close()


# ---- what is refused


@pytest.mark.parametrize("handle_timeout_termination", [True, False])
@pytest.mark.parametrize("space", [BOX, TWO_PARTS], ids=["Box", "Dict"])
def test_optimize_memory_usage_is_refused(tmp_path, handle_timeout_termination, space):
    kind = ReplayStoreDictBuffer if space is TWO_PARTS else ReplayStoreBuffer
    with pytest.raises(UsageError, match="optimize_memory_usage: expected False"):
        kind(
            10,
            space,
            FOUR,
            "cpu",
            optimize_memory_usage=True,
            handle_timeout_termination=handle_timeout_termination,
            path=tmp_path / "a",
        )


def test_another_number_of_environments_is_refused(tmp_path):
    mine = buffer_for(walks(1), tmp_path / "a")
    feed(walks(1), [mine], 5)
    mine.close()
    with pytest.raises(SchemaError, match=r"expected the n_envs that it was written with, 1, got 2"):
        buffer_for(walks(2), tmp_path / "a")


@pytest.mark.parametrize(
    ("spaces_given", "message"),
    [
        ({"observation_space": spaces.Box(-1, 1, (4,), np.float32)}, r"expected shape \(3,\), got \(4,\)"),
        ({"observation_space": spaces.Box(-1, 1, (3,), np.float64)}, "expected dtype float32, got float64"),
        (
            {"action_space": spaces.Box(-1, 1, (1,), np.float32)},
            r"field 'action': expected shape \(\), got \(1,\)",
        ),
        ({"observation_space": TWO_PARTS}, "only the store has field 'observation'"),
    ],
)
def test_a_store_of_other_spaces_is_refused(tmp_path, spaces_given, message):
    mine = buffer_for(walks(1), tmp_path / "a")
    feed(walks(1), [mine], 5)
    mine.close()
    with pytest.raises(SchemaError, match=message):
        buffer_for(walks(1, **spaces_given), tmp_path / "a")


def test_a_store_with_fields_that_sb3_does_not_have_is_refused(tmp_path):
    schema = schema_from_spaces(BOX, FOUR, fields=[Field("log_prob", (), "float32")])
    ReplayStore.create(tmp_path / "a", schema).close()
    with pytest.raises(SchemaError, match="only the store has field 'log_prob'"):
        buffer_for(walks(1), tmp_path / "a")


def test_a_reservoir_is_refused(tmp_path):
    mine = buffer_for(walks(1), tmp_path / "a")
    feed(walks(1), [mine], 1)
    schema = mine.store.schema
    mine.close()
    ReplayStore.create(tmp_path / "b", schema, capacity=500, reservoir=True).close()
    with pytest.raises(SchemaError, match="found a reservoir"):
        buffer_for(walks(1), tmp_path / "b")


def test_a_dict_buffer_wants_a_dict(tmp_path):
    with pytest.raises(SchemaError, match="observation_space: expected a Dict, got Box"):
        ReplayStoreDictBuffer(10, BOX, FOUR, "cpu", path=tmp_path / "a")


def test_there_is_no_store_before_the_first_add(tmp_path):
    mine = buffer_for(walks(1), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(UsageError, match="there is no store yet; it is made at the first add"):
        _ = mine.store
    with pytest.raises(ValueError, match="high <= 0"):  # as from SB3's own
        mine.sample(1)
