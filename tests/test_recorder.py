"""`RecordReplay` against recorders written here: one keeps what the bare environment returned."""

import contextlib
import copy
import errno
import itertools
import linecache
import sys
from collections import Counter
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation, TimeLimit, TransformObservation

import replaystore.commit
import replaystore.writer
from replaystore import ClosedError, CommitError, Field, ReplayStore, SchemaError, Transition, UsageError
from replaystore.recorder import DIRECT_STEPS, RecordReplay

LENGTHS = (5, 1, 12, 2, 3, 1, 40)
CHOICE = spaces.Discrete(2)
FRAME = spaces.Box(0, 255, (12, 12), np.uint8)
LARGE_FRAME = spaces.Box(0, 255, (84, 84), np.uint8)
ZEROS = np.zeros((12, 12), np.uint8)
FLOAT_FRAME = spaces.Box(-np.inf, np.inf, (12, 12), np.float32)


class MadeUp(gym.Env):
    """Random observations, in episodes of given lengths; every other one is truncated."""

    def __init__(self, observation_space, action_space=CHOICE, lengths=LENGTHS):
        self.observation_space = copy.deepcopy(observation_space)
        self.action_space = copy.deepcopy(action_space)
        self._lengths = itertools.cycle(enumerate(lengths))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.number, self.left = next(self._lengths)
        return self.observe(), {"lives": self.left}

    def observe(self):
        return self.observation_space.sample()

    def step(self, action):
        self.left -= 1
        over = self.left == 0, bool(self.number % 2)
        reward = self.np_random.normal()
        return self.observe(), reward, over[0] and not over[1], all(over), {"lives": self.left}


class Reusing(MadeUp):
    """Returns the same array every time, with other frames in it."""

    def observe(self):
        if not hasattr(self, "_frame"):
            self._frame = self.observation_space.sample()
        self._frame[...] = self.observation_space.sample()
        return self._frame


class Shuffled(MadeUp):
    """Names the parts of its observations in another order than its space."""

    def observe(self):
        return dict(reversed(self.observation_space.sample().items()))


class Bare(gym.Env):
    """Another environment, without the wrappers that it is made of."""

    def __init__(self, env):
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.reset, self.step = env.reset, env.step


class Holed(MadeUp):
    """Some pixels are NaN, some infinite, some -0.0."""

    def observe(self):
        frame = self.observation_space.sample()
        frame.flat[:4] = np.nan, np.inf, -np.inf, -0.0
        return frame


def cartpole():
    return TimeLimit(gym.make("CartPole-v1").unwrapped, 15)


def half_cheetah():
    return gym.make("HalfCheetah-v5", max_episode_steps=150)


def stacked(env, length=4, padding="reset"):
    return FrameStackObservation(env, length, padding_type=padding)


@pytest.fixture
def recorder(tmp_path):
    """Makes recorders of the store at `tmp_path / "store"`, and closes them."""
    with contextlib.ExitStack() as stack:

        def make(env, **kwargs):
            env = RecordReplay(env, tmp_path / "store", **kwargs)
            stack.callback(env.store.close)
            return env

        yield make


def roll_out(env, steps, *, seed=0, kept=None):
    """Act at random; returns copies of (s, a, r, s', terminated, truncated) of each step."""
    env.action_space.seed(seed)
    kept = [] if kept is None else kept
    observation, _ = env.reset(seed=seed)
    for _ in range(steps):
        before, action = copy.deepcopy(observation), env.action_space.sample()
        taken = copy.deepcopy(action)
        observation, reward, terminated, truncated, _ = env.step(action)
        kept.append((before, taken, float(reward), copy.deepcopy(observation), terminated, truncated))
        if terminated or truncated:
            observation, _ = env.reset()
    return kept


def record(env, path, steps, **kwargs):
    """The same as `roll_out`, with the store left at `path`."""
    recorder = RecordReplay(env, path, **kwargs)
    try:
        return roll_out(recorder, steps)
    finally:
        recorder.close()


@contextlib.contextmanager
def failing_commits(monkeypatch):
    """Every commit of a background thread fails, and there are many."""

    def fail(*_):
        raise OSError(errno.ENOSPC, "no room")

    with monkeypatch.context() as patch:
        patch.setattr(replaystore.writer, "COMMIT_SECONDS", 0.01)
        patch.setattr(replaystore.commit.StreamCommitter, "commit", fail)
        yield


def repeat_until_refused(call):
    with pytest.raises(CommitError):  # noqa: PT012
        while True:
            call()


def frozen(value):
    """A nested value as something to compare and count: types of nesting, dtypes, shapes, bytes."""
    if isinstance(value, dict):
        return frozenset((name, frozen(child)) for name, child in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(map(frozen, value))
    array = np.asarray(value)
    return array.dtype.str, array.shape, array.tobytes()


def part(value, i):
    """Item i of a nested value whose arrays have the batch first."""
    if isinstance(value, dict):
        return {name: part(child, i) for name, child in value.items()}
    return tuple(part(child, i) for child in value) if isinstance(value, tuple) else value[i]


def stored(store, **window):
    """Every transition of a store, as `roll_out` returns them."""
    batch = store.read(np.arange(len(store)), Transition(**window))
    names = ("observation", "action", "reward", "next_observation", "terminated", "truncated")
    return [tuple(part(getattr(batch, name), i) for name in names) for i in range(len(store))]


def stored_in_episodes(store):
    """Every transition of a store, put together from whole episodes."""
    found = []
    for number, length in enumerate(store.episodes["length"].to_pylist()):
        rows = store.episode(number)
        names = ("action", "reward", "terminated", "truncated")
        action, reward, terminated, truncated = ([part(rows[n], i) for i in range(length)] for n in names)
        seen = [part(rows["observation"], i) for i in range(length + 1)]
        found += zip(seen, action, reward, seen[1:], terminated, truncated, strict=False)
    return found


SPACES = {
    "float64": (spaces.Box(-np.inf, np.inf, (3,), np.float64), spaces.Box(-1, 1, (2,), np.float64)),
    "int16": (spaces.Box(-32768, 32767, (2, 3), np.int16), spaces.Discrete(4, start=3)),
    "scalar": (spaces.Box(-1, 1, (), np.float32), spaces.Box(-1, 1, (), np.float64)),
    "large float64": (spaces.Box(-np.inf, np.inf, (10, 11), np.float64), spaces.Discrete(2)),
    "bool": (spaces.Box(0, 1, (5,), np.bool_), spaces.Discrete(2)),
    "Discrete": (spaces.Discrete(6, start=-3), spaces.Discrete(4, start=3)),
    "MultiBinary": (spaces.MultiBinary([3, 4]), spaces.MultiBinary(5)),
    "MultiDiscrete": (spaces.MultiDiscrete([3, 9]), spaces.MultiDiscrete([[2, 3], [4, 5]])),
    "Dict": (
        spaces.Dict(camera=LARGE_FRAME, arm=spaces.Box(-1, 1, (2,), np.float64)),
        spaces.Dict(grip=spaces.Discrete(2), move=spaces.Box(-1, 1, (3,))),
    ),
    "Tuple": (spaces.Tuple([FRAME, spaces.Discrete(3)]), spaces.Tuple([spaces.Discrete(3)])),
    "nested": (
        spaces.Dict(a=spaces.Tuple([spaces.Dict(b=FRAME), spaces.MultiBinary(2)]), z=spaces.Discrete(2)),
        spaces.Tuple([spaces.Dict(x=spaces.Discrete(2)), spaces.Tuple([spaces.MultiBinary(3)])]),
    ),
}
ENVS = {name: lambda spaces=spaces: MadeUp(*spaces) for name, spaces in SPACES.items()} | {
    "CartPole": cartpole,
    "HalfCheetah": half_cheetah,
    "NaN": lambda: Holed(FLOAT_FRAME),
    "reused arrays": lambda: Reusing(LARGE_FRAME),
    "other order": lambda: Shuffled(SPACES["Dict"][0]),
}


@pytest.mark.parametrize("make", ENVS.values(), ids=ENVS)
def test_store_holds_what_the_bare_environment_returned(make, tmp_path):
    expected = frozen(roll_out(make(), 300))
    returned = frozen(record(make(), tmp_path / "store", 300))
    assert returned == expected
    with ReplayStore.open(tmp_path / "store") as store:
        assert frozen(stored(store)) == expected
        assert frozen(stored_in_episodes(store)) == expected
        assert Counter(frozen(stored(store))) == Counter(expected)
        store.check()


def test_store_holds_rows_that_are_not_yet_committed(recorder):
    expected = roll_out(MadeUp(LARGE_FRAME), 30)
    env = recorder(MadeUp(LARGE_FRAME))
    roll_out(env, 30)
    assert frozen(stored(env.store)) == frozen(expected)


def test_wrapper_passes_on_the_very_objects_of_the_environment(recorder):
    class Keeping(MadeUp):
        def reset(self, **kwargs):
            self.returned = super().reset(**kwargs)
            return self.returned

        def step(self, action):
            self.returned = super().step(action)
            return self.returned

    inner = Keeping(SPACES["nested"][0])
    env = recorder(inner)
    for call in (lambda: env.reset(seed=1), lambda: env.step(0), env.reset):
        for given, own in zip(call(), inner.returned, strict=True):
            assert given is own


def test_action_changed_by_the_environment_is_stored_as_it_was_taken(recorder):
    class Clipping(MadeUp):
        def step(self, action):
            action *= 0
            return super().step(action)

    env = recorder(Clipping(FRAME, spaces.Box(-1, 1, (2,))))
    env.reset()
    env.step(np.array([0.25, 0.5], np.float32))
    assert stored(env.store)[0][1].tolist() == [0.25, 0.5]


def test_terminated_and_truncated_are_kept_apart(tmp_path):
    expected = record(MadeUp(FRAME, lengths=(2, 3)), tmp_path / "store", 10)
    with ReplayStore.open(tmp_path / "store") as store:
        table = store.episodes.select(["length", "terminated", "truncated", "return"]).to_pydict()
    assert table["length"] == [2, 3, 2, 3]
    assert table["terminated"] == [True, False, True, False]
    assert table["truncated"] == [False, True, False, True]
    rewards = [step[2] for step in expected]
    sums = [sum(rewards[i:j]) for i, j in itertools.pairwise((0, 2, 5, 7, 10))]
    assert table["return"] == pytest.approx(sums)


def test_step_that_is_terminated_and_truncated_at_once_is_both(tmp_path):
    class Both(MadeUp):
        def step(self, action):
            return self.observe(), 0.0, True, True, {}

    record(Both(FRAME), tmp_path / "store", 1)
    with ReplayStore.open(tmp_path / "store") as store:
        assert stored(store)[0][4:] == (True, True)
        assert store.sample(1).discount == 0


def test_final_observation_of_a_truncated_episode_is_kept(tmp_path):
    expected = record(TimeLimit(MadeUp(FRAME, lengths=(100,)), 7), tmp_path / "store", 7)
    with ReplayStore.open(tmp_path / "store") as store:
        assert np.array_equal(store.episode(0)["observation"][7], expected[6][3])
        batch = store.read(np.array([6]), Transition(gamma=0.9))
    assert (batch.terminated[0], batch.truncated[0], batch.discount[0]) == (False, True, 0.9)


def test_episode_cut_short_by_reset_keeps_its_transitions(recorder):
    env = recorder(MadeUp(FRAME, lengths=(100,)))
    expected = roll_out(env, 3) + roll_out(env, 4, seed=1) + roll_out(env, 1, seed=2)
    env.reset()  # an episode of no transition
    env.close()
    with ReplayStore.open(env.store.path) as store:
        assert frozen(stored(store)) == frozen(expected)
        assert store.episodes["length"].to_pylist() == [3, 4, 1]
        assert not np.any(store.episodes.select(["terminated", "truncated"]))


def test_second_recording_adds_to_the_store(tmp_path):
    expected = record(cartpole(), tmp_path / "store", 40) + record(cartpole(), tmp_path / "store", 50)
    with ReplayStore.open(tmp_path / "store") as store:
        assert frozen(stored(store)) == frozen(expected)


def test_store_of_another_schema_is_refused_naming_what_differs(tmp_path):
    record(MadeUp(FRAME), tmp_path / "store", 5)
    with pytest.raises(SchemaError, match=r"observation.*\(12, 12\).*\(84, 84\)"):
        RecordReplay(MadeUp(LARGE_FRAME), tmp_path / "store")
    with pytest.raises(SchemaError, match="action"):
        RecordReplay(MadeUp(FRAME, spaces.MultiBinary(3)), tmp_path / "store")
    with pytest.raises(SchemaError, match="stack"):
        RecordReplay(stacked(MadeUp(FRAME)), tmp_path / "store")
    with ReplayStore.open(tmp_path / "store") as store:
        assert len(store) == 5


def test_step_before_reset_and_after_the_end_are_refused(recorder):
    env = recorder(MadeUp(FRAME, lengths=(1,)))
    env.env.reset()
    with pytest.raises(UsageError, match="reset"):
        env.step(0)
    env.reset()
    env.step(0)
    with pytest.raises(UsageError, match="reset"):
        env.step(0)
    assert len(env.store) == 1


def test_value_that_does_not_fit_is_refused_and_the_store_stays_usable(recorder):
    env = recorder(MadeUp(FRAME, spaces.Box(-1, 1, (2,))))
    env.reset()
    with pytest.raises(SchemaError, match=r"action.*float32.*float64"):
        env.step(np.zeros(2))
    assert len(env.store) == 0
    env.reset()
    env.step(np.zeros(2, np.float32))
    assert len(env.store) == 1


def test_no_transition_spans_a_step_that_was_refused(recorder):
    bare = MadeUp(FRAME, spaces.Box(-1, 1, (2,)))
    env = recorder(copy.deepcopy(bare))
    observation = bare.reset(seed=0)[0]
    env.reset(seed=0)
    happened = []
    for dtype in ("float32", "float64", "float32", "float32"):
        before, action = observation, np.zeros(2, dtype)
        observation, *rest, _ = bare.step(action)
        happened.append((before, action, rest[0], observation, *rest[1:]))
        with contextlib.suppress(SchemaError, UsageError):
            env.step(action)
    found = frozen(stored(env.store))
    assert found[0] == frozen(happened[0])
    assert set(found) <= set(frozen(happened))


@pytest.mark.parametrize("method", ["step", "reset"])
def test_no_transition_spans_an_interrupt_in_the_environment(method, recorder, monkeypatch):
    bare = MadeUp(FRAME, lengths=(50,))
    env = recorder(bare)
    env.reset(seed=0)
    env.step(0)
    inner = getattr(bare, method)

    def interrupted(*args, **kwargs):
        inner(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bare, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            getattr(env, method)(**({"action": 0} if method == "step" else {}))
    with pytest.raises(UsageError, match="reset first"):
        env.step(0)
    env.reset()
    env.step(0)
    assert len(env.store) == 2


def test_closing_again_does_nothing_and_a_step_after_it_is_refused(recorder):
    env = recorder(MadeUp(FRAME))
    roll_out(env, 2)
    env.close()
    env.close()
    with pytest.raises(ClosedError):
        env.step(0)


def test_step_that_is_interrupted_once_it_is_stored_is_not_stored_again(recorder, monkeypatch):
    env = recorder(MadeUp(FRAME))
    env.reset()
    store_step = env.store.step

    def interrupted(*args, **kwargs):
        store_step(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(env.store, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            env.step(0)
    env.close()
    with ReplayStore.open(env.store.path) as store:
        assert len(store) == 1


class InterruptAt:
    """Interrupts at the n-th line that is run in the modules that hold a recording's state."""

    def __init__(self, line):
        self.left = line

    def __call__(self, frame, event, _):
        path = Path(frame.f_code.co_filename)
        if path.name not in ("recorder.py", "appender.py", "writer.py"):
            return None
        line = linecache.getline(str(path), frame.f_lineno).lstrip()
        if event == "line" and not line.startswith(("with ", "try:")):  # where no signal is handled
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def check_interrupted(env, finished, happened):
    """All steps that were finished are stored, and at most one that was not, once each."""
    with ReplayStore.open(env.store.path) as store:
        store.check()
        found = frozen(stored(store))
        assert found in (happened[:finished], happened[: finished + 1])
        for number, row in enumerate(store.episodes.to_pylist()):
            for name in ("terminated", "truncated"):
                assert row[name] == store.episode(number)[name][-1]


def roll_out_and_reset(env, kept):
    """An episode that ends, and one that is cut short."""
    roll_out(env, 2, kept=kept)
    env.reset()


@pytest.mark.parametrize("first", range(1, 5))
def test_interrupt_at_any_line_loses_no_finished_step_and_invents_none(first, tmp_path):
    happened = frozen(roll_out(MadeUp(FRAME, lengths=(1, 50)), 2))
    for line in itertools.count(first, 4):
        env = RecordReplay(MadeUp(FRAME, lengths=(1, 50)), tmp_path / str(line))
        kept, interrupt = [], InterruptAt(line)
        try:
            sys.settrace(interrupt)
            roll_out_and_reset(env, kept)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        env.close()
        check_interrupted(env, len(kept), happened)
        if interrupt.left > 0:
            break


@pytest.mark.parametrize("stack", [1, 4])
def test_rows_that_failed_commits_stopped_are_appended_later(stack, recorder, monkeypatch):
    class Keeping(MadeUp):
        seen = ()

        def observe(self):
            self.seen = (*self.seen, super().observe())
            return self.seen[-1]

    inner = Keeping(FRAME, lengths=(10**6,))
    with failing_commits(monkeypatch):
        env = recorder(stacked(inner, stack) if stack > 1 else inner)
        env.reset(seed=0)
        for _ in range(3):
            repeat_until_refused(lambda: env.step(0))
    env.store.flush()
    for _ in range(5):
        env.step(0)
    assert np.array_equal(env.store.episode(0)["observation"], np.stack(inner.seen))


# ---- what is recorded beside the transitions


def test_seeds_policy_and_columns_describe_the_episodes(recorder):
    types = {"level": "int64", "player": "string"}
    env = recorder(MadeUp(FRAME, lengths=(1,)), policy="first", column_types=types)
    env.columns = {"level": 3}
    roll_out(env, 1, seed=17)  # ends an episode and begins the next, of which nothing comes
    env.policy, env.columns = "second", {"level": 4, "player": "me"}
    roll_out(env, 2, seed=18)
    assert env.store.episodes.select(["seed", "policy", "level", "player"]).to_pydict() == {
        "seed": [17, 18, None],
        "policy": ["first", "second", "second"],
        "level": [3, 4, 4],
        "player": [None, "me", "me"],
    }


def test_fields_of_the_user_come_from_info_and_from_annotate(recorder):
    fields = [Field("info/lives", (), "int64"), Field("log_prob", (), "float64")]
    env = recorder(MadeUp(FRAME, lengths=(3,)), fields=fields)
    for _ in range(2):
        env.reset()
        for log_prob in (-0.1, -0.2, -0.3):
            env.annotate(log_prob=log_prob)
            env.step(0)
    extra = env.store.read(np.arange(6), Transition()).extra
    assert extra["info"]["lives"].tolist() == [2, 1, 0] * 2
    assert extra["log_prob"].tolist() == [-0.1, -0.2, -0.3] * 2
    assert env.store.episode(1)["log_prob"].tolist() == [-0.1, -0.2, -0.3]


@pytest.mark.parametrize(
    ("name", "annotated"), [("info/nothing", {}), ("log_prob", {}), ("log_prob", {"log_prob": 1, "more": 2})]
)
def test_fields_that_are_not_those_of_the_schema_are_refused(name, annotated, recorder):
    env = recorder(MadeUp(FRAME), fields=[Field(name, (), "float64")])
    env.reset()
    env.annotate(**annotated)
    with pytest.raises(SchemaError, match=r"nothing|log_prob|more"):
        env.step(0)
    assert len(env.store) == 0


# ---- frame stacks

STACKS = {
    "flat": lambda padding: stacked(MadeUp(FRAME), padding=padding),
    "packed": lambda padding: stacked(MadeUp(LARGE_FRAME), padding=padding),
    "NaN": lambda padding: stacked(Holed(FLOAT_FRAME), padding=padding),
}
NESTED = spaces.Dict(camera=LARGE_FRAME, rest=spaces.Tuple([spaces.Discrete(5), FLOAT_FRAME]))


def custom_padding(env):
    return copy.deepcopy(env.observation_space).sample()


def expected_returns(kept, n_step, gamma):
    """(s, a, n-step return, s_n, terminated, truncated) by looking ahead from each transition."""
    items = []
    for i, (observation, action, *_) in enumerate(kept):
        ahead = kept[i : i + n_step]
        over = next((k for k, step in enumerate(ahead, 1) if step[4] or step[5]), len(ahead))
        total = sum(gamma**k * step[2] for k, step in enumerate(ahead[:over]))
        items.append((observation, action, np.float64(total), *ahead[over - 1][3:]))
    return items


def split(items):
    """Returns, which are compared up to rounding, and all else, exactly."""
    return [item[2] for item in items], frozen([item[:2] + item[3:] for item in items])


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("padding", ["reset", "zero", "custom"])
@pytest.mark.parametrize("env_name", [*STACKS, "nested"])
def test_sampled_stacks_are_those_of_the_wrapper(env_name, padding, n_step, tmp_path):
    base = MadeUp(NESTED) if env_name == "nested" else STACKS[env_name]("reset").env
    env = stacked(base, padding=custom_padding(base) if padding == "custom" else padding)
    kept = record(env, tmp_path / "store", 150)
    with ReplayStore.open(tmp_path / "store") as store:
        assert store.frame_stack == 4
        found = stored(store, frame_stack=4, n_step=n_step, gamma=0.9)
    returns, rest = split(expected_returns(kept, n_step, 0.9))
    found_returns, found_rest = split(found)
    assert found_rest == rest
    assert found_returns == pytest.approx(returns, rel=1e-12)


def test_only_the_newest_frame_of_a_stack_is_stored(tmp_path):
    kept = record(stacked(MadeUp(LARGE_FRAME)), tmp_path / "store", 20)
    with ReplayStore.open(tmp_path / "store") as store:
        assert store.schema.by_name["observation"].shape == (84, 84)
        newest = [(step[0][-1], *step[1:3], step[3][-1], *step[4:]) for step in kept]
        assert frozen(stored(store)) == frozen(newest)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_stack_may_be_sampled_lower_than_it_was_recorded(length, tmp_path):
    kept = record(stacked(MadeUp(FRAME), padding="zero"), tmp_path / "store", 60)
    with ReplayStore.open(tmp_path / "store") as store:
        found = store.read(np.arange(60), Transition(frame_stack=length)).observation
    lower = np.stack([step[0] for step in kept])[:, -length:]
    assert np.array_equal(found, lower if length > 1 else lower[:, 0])


@pytest.mark.parametrize("stack", [1, None], ids=["frame_stack=1", "FrameStackObservation(1)"])
def test_whole_stacks_are_stored_on_request_and_where_they_are_of_one_frame(stack, tmp_path):
    env = stacked(MadeUp(FRAME), length=4 if stack else 1)
    kept = record(env, tmp_path / "store", 30, frame_stack=stack)
    with ReplayStore.open(tmp_path / "store") as store:
        assert store.schema.by_name["observation"].shape == ((4, 12, 12) if stack else (1, 12, 12))
        assert frozen(stored(store)) == frozen(kept)


@pytest.mark.parametrize(
    "given", [{"frame_stack": 4, "padding": "zero"}, {"frame_stack": 4, "padding": ZEROS}]
)
def test_stack_of_other_origin_is_stored_by_frames_when_it_is_named(given, tmp_path):
    kept = record(Bare(stacked(MadeUp(FRAME), padding="zero")), tmp_path / "store", 40, **given)
    with ReplayStore.open(tmp_path / "store") as store:
        assert frozen(stored(store, frame_stack=4)) == frozen(kept)


def test_stack_is_found_below_a_wrapper_that_changes_every_frame_alike(tmp_path):
    base = stacked(MadeUp(FRAME))
    env = TransformObservation(base, lambda frames: 255 - frames, base.observation_space)
    kept = record(env, tmp_path / "store", 40)
    with ReplayStore.open(tmp_path / "store") as store:
        assert frozen(stored(store, frame_stack=4)) == frozen(kept)


@pytest.mark.parametrize(
    ("change", "padding"),
    [(lambda frames: frames[::-1], "reset"), (np.cumsum, "reset"), (lambda frames: 255 - frames, "zero")],
    ids=["reversed", "summed", "padding changed"],
)
def test_wrapper_that_changes_the_frames_of_a_stack_is_refused(change, padding, recorder):
    base = stacked(MadeUp(FRAME, lengths=(9,)), padding=padding)

    def changed(frames):
        return np.asarray(change(frames), np.uint8).reshape(frames.shape)

    env = recorder(TransformObservation(base, changed, base.observation_space))
    with pytest.raises(SchemaError, match=r"frame_stack=1|first stack"):
        roll_out(env, 5)
    assert len(env.store) == 0


class ReusingLater(MadeUp):
    """Returns arrays of its own, and from a step on the same one."""

    def __init__(self, steps):
        super().__init__(FRAME, lengths=(200,))
        self._steps = steps

    def observe(self):
        frame = self.observation_space.sample()
        self._steps -= 1
        if self._steps > 0:
            return frame
        self._frame = getattr(self, "_frame", frame)
        self._frame[...] = frame
        return self._frame


@pytest.mark.parametrize("steps", [1, 40, 47, 48, 49, 60])
@pytest.mark.parametrize("is_direct", [False, True])
def test_frames_of_a_stack_that_the_environment_writes_to_again_are_refused(steps, is_direct, recorder):
    """At once below another wrapper, at the next check where the stacks come as they were made."""
    env = stacked(ReusingLater(steps))
    env = recorder(TimeLimit(env, 500) if is_direct else gym.Wrapper(env))
    with pytest.raises(SchemaError, match="frame_stack=1"):
        roll_out(env, 100)
    right = max(0, steps - 1)
    assert right <= len(env.store) <= right + (DIRECT_STEPS if is_direct else 0)


# ---- making the environment again


def test_environment_is_made_again_with_its_time_limit(tmp_path):
    record(gym.make("CartPole-v1", max_episode_steps=11, sutton_barto_reward=True), tmp_path / "store", 20)
    with ReplayStore.open(tmp_path / "store") as store:
        env = store.make_env()
    assert env.spec.max_episode_steps == 11
    assert len(roll_out_once(env)) <= 11
    assert env.unwrapped._sutton_barto_reward is True


def roll_out_once(env):
    observations = [env.reset(seed=0)[0]]
    over = False
    while not over:
        observation, _, terminated, truncated, _ = env.step(len(observations) % 2)
        observations.append(observation)
        over = terminated or truncated
    return observations[1:]


def test_environment_is_made_again_with_its_wrappers(tmp_path):
    ale_py = pytest.importorskip("ale_py")
    gym.register_envs(ale_py)
    atari = gym.wrappers.AtariPreprocessing(gym.make("ALE/Breakout-v5", frameskip=1), noop_max=0)
    env = TimeLimit(FrameStackObservation(atari, 4, padding_type="zero"), 50)
    kept = record(env, tmp_path / "store", 12)
    with ReplayStore.open(tmp_path / "store") as store:
        again = store.make_env()
    assert again.spec.to_json() == env.spec.to_json()
    assert frozen(roll_out(again, 12)) == frozen(kept)


def test_environment_is_made_again_with_arguments_of_the_caller(tmp_path):
    record(gym.make("CartPole-v1"), tmp_path / "store", 5)
    with ReplayStore.open(tmp_path / "store") as store:
        assert store.make_env(render_mode="rgb_array").render_mode == "rgb_array"


def test_environment_whose_spec_cannot_be_saved_warns_and_is_recorded(tmp_path):
    env = TransformObservation(gym.make("CartPole-v1"), lambda observation: observation, None)
    with pytest.warns(UserWarning, match="make_env"):
        record(env, tmp_path / "store", 5)
    with ReplayStore.open(tmp_path / "store") as store:
        assert len(store) == 5
        with pytest.raises(UsageError, match="no environment spec"):
            store.make_env()


def test_environment_without_a_spec_is_recorded_without_a_warning(tmp_path):
    record(MadeUp(FRAME), tmp_path / "store", 5)
    with (
        ReplayStore.open(tmp_path / "store") as store,
        pytest.raises(UsageError, match="no environment spec"),
    ):
        store.make_env()
