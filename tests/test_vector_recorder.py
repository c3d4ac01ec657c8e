"""`RecordVectorReplay` against separate environments that take the same actions."""

import contextlib
import copy
import functools
import itertools
from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import batch_space, iterate
from gymnasium.wrappers import TimeLimit
from test_recorder import (
    FRAME,
    LARGE_FRAME,
    SPACES,
    MadeUp,
    Reusing,
    Shuffled,
    failing_commits,
    frozen,
    repeat_until_refused,
    stacked,
    stored,
    stored_in_episodes,
)

import replaystore.ring
import replaystore.schema
import replaystore.writer
from replaystore import Field, ReplayStore, SchemaError, UsageError
from replaystore.recorder import RecordReplay, RecordVectorReplay

NEXT_STEP, SAME_STEP, DISABLED = AutoresetMode
LENGTHS = ((5, 1, 12, 2), (1, 1, 30), (7,))

all_modes = pytest.mark.parametrize("mode", AutoresetMode)


def cartpole():
    return TimeLimit(gym.make("CartPole-v1").unwrapped, 25)


def made_up(space, action_space=FRAME, *, kind=MadeUp, lengths=LENGTHS, stack=1):
    """One constructor for each tuple of episode lengths."""
    makes = [functools.partial(kind, space, action_space, lengths=each) for each in lengths]
    return [lambda make=make: stacked(make(), stack) for make in makes] if stack > 1 else makes


@pytest.fixture
def recorder(tmp_path):
    """Makes recorders of the store at `tmp_path / "store"`, and closes them."""
    with contextlib.ExitStack() as stack:

        def make(makes, mode, *, vector=SyncVectorEnv, vector_kwargs=None, **kwargs):
            envs = vector(makes, autoreset_mode=mode, **vector_kwargs or {})
            stack.callback(lambda: envs.closed or envs.close())
            envs = RecordVectorReplay(envs, tmp_path / "store", **kwargs)
            stack.callback(envs.store.close)
            return envs

        yield make


def draw_actions(makes, steps):
    space = batch_space(makes[0]().action_space, len(makes))
    space.seed(1)
    return [space.sample() for _ in range(steps)]


def roll_out(envs, actions, mode):
    """Take the actions; resets what ended where the user has to."""
    returned = [envs.reset(seed=0)]
    for action in actions:
        returned.append(envs.step(action))
        ended = returned[-1][2] | returned[-1][3]
        if mode is DISABLED and ended.any():
            returned.append(envs.reset(options={"reset_mask": ended}))
    return returned


def reference(makes, actions, mode):
    """What separate environments do: of each, a list of (s, a, r, s', terminated, truncated)."""
    space = batch_space(makes[0]().action_space, len(makes))
    taken = [list(iterate(space, action)) for action in actions]
    return [column(make(), [each[i] for each in taken], mode, i) for i, make in enumerate(makes)]


def column(env, actions, mode, seed):
    found = []
    observation, _ = env.reset(seed=seed)
    over = False
    for action in actions:
        if over and mode is NEXT_STEP:  # this step does nothing but reset
            observation, over = env.reset()[0], False
            continue
        if over:
            observation, _ = env.reset()
        before = copy.deepcopy(observation)
        observation, reward, terminated, truncated, _ = env.step(action)
        found.append((before, action, float(reward), copy.deepcopy(observation), terminated, truncated))
        over = terminated or truncated
    return found


def check_store(path, expected, **window):
    """The store holds exactly these transitions, column by column and in order."""
    with ReplayStore.open(path) as store:
        store.check()
        assert len(store) == sum(map(len, expected))
        flat = itertools.chain.from_iterable(expected)
        assert Counter(frozen(stored(store, **window))) == Counter(frozen(list(flat)))
        if window.get("frame_stack", 1) == 1:
            assert columns(store) == {i: list(frozen(each)) for i, each in enumerate(expected) if each}


def columns(store):
    """Of each environment, the transitions of its episodes, first row first."""
    envs, first, lengths = (store.episodes[name].to_numpy() for name in ("env", "first_row", "length"))
    steps = np.split(np.arange(len(store)), np.cumsum(lengths)[:-1])
    transitions = frozen(stored_in_episodes(store))
    found = {}
    for episode in np.lexsort((first, envs)):
        found.setdefault(int(envs[episode]), []).extend(transitions[i] for i in steps[episode])
    return found


ENVS = {
    "8 CartPoles": ([cartpole] * 8, 2500),
    "1 CartPole": ([cartpole], 300),
    "1 frame": (made_up(LARGE_FRAME, spaces.Discrete(3), lengths=LENGTHS[:1]), 100),
    "frames": (made_up(LARGE_FRAME, spaces.Discrete(3)), 200),
    "Dict": (made_up(*SPACES["Dict"]), 150),
    "Dict in another order": (made_up(*SPACES["Dict"], kind=Shuffled), 150),
    "Tuple": (made_up(*SPACES["Tuple"]), 150),
    "Discrete": (made_up(*SPACES["Discrete"]), 150),
    "MultiBinary": (made_up(*SPACES["MultiBinary"]), 150),
    "scalar": (made_up(*SPACES["scalar"]), 150),
}


@all_modes
@pytest.mark.parametrize(("makes", "steps"), ENVS.values(), ids=ENVS)
def test_store_holds_what_separate_environments_do(makes, steps, mode, recorder):
    actions = draw_actions(makes, steps)
    envs = recorder(makes, mode)
    roll_out(envs, actions, mode)
    envs.close()
    check_store(envs.store.path, reference(makes, actions, mode))


@all_modes
def test_store_holds_what_environments_in_other_processes_do(mode, recorder):
    makes = made_up(SPACES["Dict"][0], spaces.Discrete(2))
    actions = draw_actions(makes, 60)
    envs = recorder(makes, mode, vector=AsyncVectorEnv)
    roll_out(envs, actions, mode)
    envs.close()
    check_store(envs.store.path, reference(makes, actions, mode))


def interpret(envs, steps, mode):
    """Take random actions; of each environment, the transitions that gymnasium's documentation tells."""
    envs.action_space.seed(0)
    expected = [[] for _ in range(envs.num_envs)]
    before, _ = envs.reset(seed=0)
    resets = np.zeros(envs.num_envs, bool)
    for _ in range(steps):
        actions = envs.action_space.sample()
        after, reward, terminated, truncated, infos = envs.step(actions)
        ended = terminated | truncated
        last = after.copy()
        for i in np.flatnonzero(ended) if mode is SAME_STEP else ():
            last[i] = infos["final_obs"][i]
        parts = (before, actions, reward.astype(np.float64), last, terminated, truncated)
        for i in np.flatnonzero(~resets):
            expected[i].append(tuple(part[i].copy() for part in parts))
        before, resets = after, ended & (mode is NEXT_STEP)
    return expected


def test_store_holds_what_the_vector_of_cartpoles_does(tmp_path):
    envs = RecordVectorReplay(gym.make_vec("CartPole-v1", 8), tmp_path / "store")
    expected = interpret(envs, 300, NEXT_STEP)
    envs.close()
    check_store(tmp_path / "store", expected)


@pytest.mark.parametrize("mode", [NEXT_STEP, SAME_STEP])  # ale_py knows no other
def test_store_holds_what_the_vector_of_ataris_does(mode, tmp_path):
    gym.register_envs(pytest.importorskip("ale_py"))
    envs = gym.make_vec("ALE/Breakout-v5", 2, autoreset_mode=mode.value)
    envs = RecordVectorReplay(envs, tmp_path / "store", frame_stack=4, padding="zero")
    expected = interpret(envs, 400, mode)
    envs.close()
    assert any(step[4] for step in expected[0])
    check_store(tmp_path / "store", expected, frame_stack=4)


@all_modes
@pytest.mark.parametrize("vector", [SyncVectorEnv, AsyncVectorEnv])
def test_sampled_stacks_are_those_of_the_environments(vector, mode, recorder):
    makes = made_up(LARGE_FRAME, spaces.Discrete(3), stack=4)
    actions = draw_actions(makes, 80)
    envs = recorder(makes, mode, vector=vector, frame_stack=None if vector is SyncVectorEnv else 4)
    roll_out(envs, actions, mode)
    envs.close()
    assert envs.store.schema.by_name["observation"].shape == (84, 84)
    check_store(envs.store.path, reference(makes, actions, mode), frame_stack=4)


@all_modes
def test_wrapper_changes_nothing_that_the_environments_return(mode, recorder):
    makes = made_up(*SPACES["Dict"])
    actions = draw_actions(makes, 60)
    with contextlib.closing(SyncVectorEnv(makes, autoreset_mode=mode)) as bare:
        expected = roll_out(bare, actions, mode)
    assert frozen(strip(roll_out(recorder(makes, mode), actions, mode))) == frozen(strip(expected))


def strip(value):
    """Replace arrays of objects by tuples, which can be compared."""
    if isinstance(value, dict):
        return {name: strip(child) for name, child in value.items()}
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.dtype == object):
        return tuple(map(strip, value))
    return "None" if value is None else value


@all_modes
def test_arrays_that_the_environments_use_again_are_copied(mode, recorder):
    kind = MadeUp if mode is SAME_STEP else Reusing  # gymnasium itself would lose the final frame
    makes = made_up(LARGE_FRAME, spaces.Discrete(3), kind=kind)
    actions = draw_actions(makes, 60)
    envs = recorder(makes, mode, vector_kwargs={"copy": False})
    roll_out(envs, actions, mode)
    envs.close()
    check_store(envs.store.path, reference(makes, actions, mode))


@pytest.mark.parametrize(
    ("space", "steps"), [(LARGE_FRAME, 150), (spaces.Discrete(9), 6000)], ids=["packed", "flat"]
)
def test_columns_that_drift_apart_by_shards_hold_every_transition(space, steps, recorder, monkeypatch):
    monkeypatch.setattr(replaystore.schema, "SHARD_CHUNKS", 6)
    monkeypatch.setattr(replaystore.schema, "FILE_ROWS", 1)
    monkeypatch.setattr(replaystore.ring, "RING_BYTES", 1 << 18)
    monkeypatch.setattr(replaystore.writer, "COMMIT_SECONDS", 0.02)
    makes = made_up(space, spaces.Discrete(3), lengths=((1,), (3 * steps // 4, 5), (steps // 8,)))
    actions = draw_actions(makes, steps)
    envs = recorder(makes, SAME_STEP)
    roll_out(envs, actions, SAME_STEP)
    envs.close()
    check_store(envs.store.path, reference(makes, actions, SAME_STEP))
    with ReplayStore.open(envs.store.path) as store:
        late = store.episodes.filter(np.asarray(store.episodes["env"]) == 1)
        first, second = late["first_row"].to_pylist()[:2]
        assert second > first + late["length"][0].as_py() + 1, "no rows were left out: they did not drift"


# ---- resets


@all_modes
def test_reset_in_the_middle_cuts_every_episode_short(mode, recorder):
    envs = recorder(made_up(FRAME, spaces.Discrete(3), lengths=((4,), (50,))), mode)
    for _ in range(2):
        envs.reset()
        for _ in range(4):
            envs.step(np.zeros(2, np.int64))
    table = envs.store.episodes.sort_by([("env", "ascending"), ("first_row", "ascending")])
    assert table["length"].to_pylist() == [4, 4, 4, 4]
    assert table["terminated"].to_pylist() == [True, True, False, False]
    assert not np.any(table["truncated"])


@all_modes
def test_reset_of_some_leaves_the_episodes_of_others_open(mode, recorder):
    envs = recorder(made_up(FRAME, spaces.Discrete(3), lengths=((50,), (50,), (50,))), mode)
    envs.reset(seed=[5, 6, 7])
    mask = np.array([False, True, False])
    for options in ({"reset_mask": mask}, {"reset_mask": mask}, None):
        envs.step(np.zeros(3, np.int64))
        envs.reset(options=options, seed=10)
    envs.step(np.zeros(3, np.int64))
    table = envs.store.episodes.sort_by([("env", "ascending"), ("first_row", "ascending")])
    assert table["env"].to_pylist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert table["length"].to_pylist() == [3, 1, 1, 1, 1, 1, 3, 1]
    assert table["seed"].to_pylist() == [5, 10, 6, 11, 11, 11, 7, 12]
    assert not np.any(table.select(["terminated", "truncated"]))


def test_step_of_an_episode_that_was_not_reset_is_refused(recorder):
    envs = recorder(made_up(FRAME, spaces.Discrete(3)), NEXT_STEP)
    envs.env.reset()
    with pytest.raises(UsageError, match="reset"):
        envs.step(np.zeros(3, np.int64))
    assert len(envs.store) == 0


# ---- what is recorded beside the transitions


class Telling(MadeUp):
    """Tells in the info of its steps, and of no reset, how many are left."""

    def reset(self, **kwargs):
        return super().reset(**kwargs)[0], {}


@all_modes
@pytest.mark.parametrize("kind", [MadeUp, Telling])
@pytest.mark.parametrize("lengths", [((2, 3),), ((2, 3), (4,))], ids=["one", "two"])
def test_info_of_a_final_step_is_not_that_of_the_reset(lengths, kind, mode, recorder):
    makes = made_up(FRAME, spaces.Discrete(3), kind=kind, lengths=lengths)
    envs = recorder(makes, mode, fields=[Field("info/lives", (), "int64")])
    roll_out(envs, draw_actions(makes, 30), mode)
    for number, length in enumerate(envs.store.episodes["length"].to_pylist()):
        lives = envs.store.episode(number)["info"]["lives"].tolist()
        whole = length + lives[-1]
        assert whole in (2, 3, 4)
        assert lives == list(range(whole - 1, whole - 1 - length, -1))


@pytest.mark.parametrize("num_envs", [1, 3])
def test_fields_of_the_user_are_annotated_for_all_environments(num_envs, recorder):
    makes = made_up(FRAME, spaces.Discrete(3), lengths=((50,),) * num_envs)
    fields = [Field("log_prob", (), "float32"), Field("hidden", (2,), "float32")]
    envs = recorder(makes, NEXT_STEP, fields=fields)
    envs.reset()
    expected = np.arange(5 * num_envs, dtype=np.float32).reshape(5, num_envs)
    for log_prob in expected:
        envs.annotate(log_prob=log_prob, hidden=np.stack([log_prob, -log_prob], axis=1))
        envs.step(np.zeros(num_envs, np.int64))
    for number, env in enumerate(envs.store.episodes["env"].to_pylist()):
        episode = envs.store.episode(number)
        assert np.array_equal(episode["log_prob"], expected[:, env])
        assert np.array_equal(episode["hidden"][:, 1], -expected[:, env])


def test_seeds_policy_and_columns_describe_the_episodes_of_each(recorder):
    makes = made_up(FRAME, spaces.Discrete(3), lengths=((50,), (50,)))
    envs = recorder(makes, NEXT_STEP, policy="greedy", column_types={"level": "int64", "player": "string"})
    envs.columns = {"level": [1, 2], "player": "me"}
    envs.reset(seed=7)
    envs.step(np.zeros(2, np.int64))
    table = envs.store.episodes.select(["env", "seed", "policy", "level", "player"]).to_pylist()
    same = {"policy": "greedy", "player": "me"}
    assert table == [{"env": i, "seed": 7 + i, "level": 1 + i} | same for i in range(2)]


# ---- stores and specs


def test_recordings_of_other_numbers_of_environments_share_a_store(recorder):
    expected = []
    for makes in ([cartpole] * 3, [cartpole], [cartpole] * 3):
        actions = draw_actions(makes, 40)
        envs = recorder(makes, SAME_STEP)
        roll_out(envs, actions, SAME_STEP)
        envs.close()
        expected += reference(makes, actions, SAME_STEP)
    with RecordReplay(cartpole(), envs.store.path) as env:
        env.reset(seed=3)
        for _ in range(5):
            env.step(0)
    expected.append(column(cartpole(), [0] * 5, SAME_STEP, 3))
    with ReplayStore.open(envs.store.path) as store:
        assert Counter(frozen(stored(store))) == Counter(frozen(list(itertools.chain(*expected))))
        assert np.unique(store.episodes["stream"]).tolist() == [0, 1]


def test_environments_that_do_not_tell_their_autoreset_mode_are_refused(tmp_path):
    envs = SyncVectorEnv([cartpole])
    envs.metadata = {}
    with pytest.raises(UsageError, match="autoreset_mode"):
        RecordVectorReplay(envs, tmp_path / "store")
    envs.close()
    assert not (tmp_path / "store").exists()


def test_annotation_of_another_number_of_environments_is_refused(recorder):
    makes = made_up(FRAME, spaces.Discrete(3), lengths=((50,), (50,)))
    envs = recorder(makes, NEXT_STEP, fields=[Field("log_prob", (), "float64")])
    envs.reset()
    envs.annotate(log_prob=np.zeros(3))
    with pytest.raises(SchemaError, match=r"log_prob.*\(2,\).*\(3,\)"):
        envs.step(np.zeros(2, np.int64))
    assert len(envs.store) == 0


@pytest.mark.parametrize("mode", ["sync", "async", None])
def test_environment_is_made_again_from_a_vector(mode, tmp_path):
    envs = RecordVectorReplay(gym.make_vec("CartPole-v1", 2, mode), tmp_path / "store")
    envs.close()
    with ReplayStore.open(tmp_path / "store") as store:
        env = store.make_env()
    assert isinstance(env, gym.Env)
    assert env.spec.id == "CartPole-v1"
    assert env.spec.max_episode_steps == 500


def test_environment_is_made_again_from_a_vector_with_its_wrappers(tmp_path):
    wrappers = [lambda env: gym.wrappers.ClipReward(env, -1, 1), lambda env: stacked(env, 2)]
    envs = gym.make_vec("CartPole-v1", 2, "sync", wrappers=wrappers, sutton_barto_reward=True)
    expected = envs.envs[0].spec.to_json()
    RecordVectorReplay(envs, tmp_path / "store").close()
    with ReplayStore.open(tmp_path / "store") as store:
        assert store.make_env().spec.to_json() == expected


# ---- failed commits


class Counting(SyncVectorEnv):
    """Counts its steps, and knows which environments have ended."""

    steps = 0
    ended = np.zeros(2, bool)

    def reset(self, **kwargs):
        self.ended = np.zeros(2, bool)
        return super().reset(**kwargs)

    def step(self, actions):
        self.steps += 1
        result = super().step(actions)
        self.ended = result[2] | result[3]
        return result


@all_modes
@pytest.mark.parametrize("stack", [1, 2])
def test_rows_that_failed_commits_stopped_are_appended_later(stack, mode, recorder, monkeypatch):
    makes = made_up(FRAME, spaces.Discrete(3), lengths=((2,), (3,)), stack=stack)
    actions = np.zeros(2, np.int64)

    def go_on():
        if mode is DISABLED and envs.env.ended.any():
            envs.reset(options={"reset_mask": envs.env.ended})
        envs.step(actions)

    with failing_commits(monkeypatch):
        envs = recorder(makes, mode, vector=Counting)
        envs.reset(seed=0)
        for _ in range(3):
            repeat_until_refused(go_on)
    envs.store.flush()
    for _ in range(5):
        go_on()
    envs.close()
    expected = reference(makes, [actions] * envs.env.steps, mode)
    check_store(envs.store.path, expected, frame_stack=stack)
