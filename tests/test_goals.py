"""Relabelled goals: which, where from, how often, and the rewards that follow from them."""

import numpy as np
import pytest

import replaystore.dataset
import replaystore.loader
from replaystore import Field, ReplayStore, Schema, Transition, UsageError
from replaystore.dataset import ReplayDataset
from replaystore.goals import Relabelled
from replaystore.prioritized import Prioritized

FLAGS = (Field("terminated", (), "bool"), Field("truncated", (), "bool"))
LENGTHS = (7, 1, 12, 3)
GOAL = -1.0  # the desired goal as recorded; what is achieved at row r of episode e is 100 e + r


def goal_schema(*, reward="float64", desired=((2,), "float64"), fields=()):
    observations = [
        Field("observation/achieved_goal", (2,), "float64", padding=np.full(2, -9.0).tobytes()),
        Field("observation/desired_goal", *desired),
        Field("observation/observation", (), "int64"),
    ]
    return Schema([*observations, Field("action", (), "int64"), Field("reward", (), reward), *FLAGS, *fields])


def observation(episode, row):
    goals = {"achieved_goal": np.full(2, 100.0 * episode + row), "desired_goal": np.full(2, GOAL)}
    return goals | {"observation": row}


def goal_store(path, *, lengths=LENGTHS, is_open=True, schema=None, **extra):
    """Episodes whose achieved goals tell where they are; the last one stays open."""
    store = ReplayStore.create(path, goal_schema() if schema is None else schema)
    for episode, length in enumerate(lengths):
        store.reset(observation(episode, 0))
        for t in range(length):
            last = t + 1 == length and not (is_open and episode + 1 == len(lengths))
            store.step(t, observation(episode, t + 1), -1.0, last, False, **extra)
    return store


def reached(achieved, desired, info):
    """0 where the goal is, -1 elsewhere, as the sparse rewards of gymnasium's GoalEnv."""
    return -(np.abs(achieved - desired).max(axis=-1) > 0).astype(np.float64)


def distance(achieved, desired, info):
    return -np.abs(achieved - desired).sum(axis=-1)


def test_goals_are_achieved_later_in_the_same_episode_and_rewards_follow(tmp_path):
    with goal_store(tmp_path / "store") as store:
        numbers = np.tile(np.arange(len(store)), 200)
        batch = store.read(numbers, Relabelled(distance, seed=0))
        plain = store.read(numbers)
        last = {e: 100 * e + length for e, length in enumerate(LENGTHS)}
    desired = batch.observation["desired_goal"][:, 0]
    after = batch.next_observation["achieved_goal"][:, 0]
    is_new = desired != GOAL
    assert (batch.next_observation["desired_goal"] == batch.observation["desired_goal"]).all()
    assert (desired[is_new] >= after[is_new]).all(), "from the next observation on"
    assert (desired[is_new] <= [last[int(goal) // 100] for goal in after[is_new]]).all()
    assert (batch.reward[is_new] == -2 * (desired - after)[is_new]).all()
    assert (batch.reward[~is_new] == -1.0).all(), "as recorded"
    for name in ("terminated", "truncated", "discount", "ids", "action"):
        assert (getattr(batch, name) == getattr(plain, name)).all()
    for part in ("achieved_goal", "observation"):
        assert (batch.observation[part] == plain.observation[part]).all()
        assert (batch.next_observation[part] == plain.next_observation[part]).all()


@pytest.mark.parametrize("goals", [1, 4])
def test_share_and_later_steps_are_as_likely_as_they_should_be(tmp_path, goals):
    draws = 20_000
    with goal_store(tmp_path / "store") as store:
        batch = store.read(np.full(draws, 2), Relabelled(reached, goals=goals, seed=1))
    desired = batch.observation["desired_goal"][:, 0]
    share = goals / (goals + 1)
    counts = [np.sum(desired == row) for row in (GOAL, 3, 4, 5, 6, 7)]
    expected = draws * np.array([1 - share, *[share / 5] * 5])
    assert sum(counts) == draws
    assert (((counts - expected) ** 2) / expected).sum() < 20.5, "chi-square, 5 degrees, one in a thousand"


def test_the_last_transition_gets_the_goal_that_it_reached(tmp_path):
    with goal_store(tmp_path / "store", lengths=(1,), is_open=False) as store:
        batch = store.read(np.zeros(50, np.int64), Relabelled(reached, seed=0))
    is_new = batch.observation["desired_goal"][:, 0] == 1.0
    assert 0 < is_new.sum() < 50
    assert (batch.reward == np.where(is_new, 0.0, -1.0)).all()
    assert batch.terminated.all()


def test_a_batch_read_again_has_other_goals_and_a_seed_gives_them_again(tmp_path):
    numbers = np.tile(np.arange(7), 5)
    with goal_store(tmp_path / "store") as store:

        def goals(window):
            return store.read(numbers, window).observation["desired_goal"].tolist()

        first, same, other = (Relabelled(reached, seed=seed) for seed in (3, 3, 4))
        reads = [goals(first), goals(first)]
        assert reads[0] != reads[1]
        assert reads == [goals(same), goals(same)]
        assert goals(other) not in reads
        assert goals(Relabelled(reached)) != goals(Relabelled(reached))


def test_stacks_carry_the_goal_in_every_frame(tmp_path):
    with goal_store(tmp_path / "store") as store:
        numbers = np.tile(np.arange(7), 20)
        batch = store.read(numbers, Relabelled(reached, Transition(frame_stack=3), seed=0))
        plain = store.read(numbers, Transition(frame_stack=3))
    desired = batch.observation["desired_goal"]
    assert desired.shape == (140, 3, 2)
    assert (desired == desired[:, :1]).all()
    assert (batch.next_observation["desired_goal"] == desired).all()
    assert (batch.observation["achieved_goal"] == plain.observation["achieved_goal"]).all()
    after = batch.next_observation["achieved_goal"][:, -1]
    is_new = desired[:, 0, 0] != GOAL
    assert (batch.reward[is_new] == reached(after, desired[:, 0], {})[is_new]).all()


def test_the_function_gets_the_recorded_info(tmp_path):
    schema = goal_schema(fields=[Field("info/scale", (), "float64"), Field("note", (), "int64")])
    seen = []

    def scaled(achieved, desired, info):
        seen.append(sorted(info))
        return info["scale"] * reached(achieved, desired, info) - 1

    extra = {"info": {"scale": 5.0}, "note": 1}
    with goal_store(tmp_path / "store", schema=schema, **extra) as store:
        batch = store.read(np.zeros(100, np.int64), Relabelled(scaled, seed=0))
    assert seen == [["scale"]]
    assert set(batch.reward.tolist()) == {-1.0, -6.0}


def goals_of(batches):
    return [batch["observation"]["desired_goal"][:, 0].tolist() for batch in batches]


def test_goals_of_a_loader_are_those_of_its_seed_whoever_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(replaystore.dataset, "READ_AT_ONCE", 8)
    goal_store(tmp_path / "store", lengths=(300, 300)).close()

    def epochs(window, **options):
        loader = ReplayDataset(tmp_path / "store", window).loader(16, **options)
        return [goals_of(loader), goals_of(loader)]

    with monkeypatch.context() as patch:
        patch.setattr(replaystore.loader, "SMALL_BYTES", 1)  # one draw at a time
        first = epochs(Relabelled(reached, seed=1), seed=5)
    assert first[0] != first[1]
    assert all(any(goal != GOAL for goal in batch) for batch in first[0])
    window = Relabelled(reached, seed=2)
    assert epochs(window, seed=5) == first
    assert epochs(window, seed=5, num_workers=2) == first
    assert epochs(window, seed=5, num_workers=1, persistent_workers=True) == first
    assert epochs(window, seed=5, read_ahead=True) == first
    assert epochs(window, seed=6) != first


@pytest.mark.parametrize("stop", [0, 1, 17, 25])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_loader_that_is_stopped_goes_on_with_the_same_goals(tmp_path, monkeypatch, stop, adaptive):
    """Also in the midst of what is read at once, with another number of workers."""
    monkeypatch.setattr(replaystore.dataset, "READ_AT_ONCE", 8)
    goal_store(tmp_path / "store", lengths=(300, 300)).close()

    def make(seed, workers):
        dataset = ReplayDataset(tmp_path / "store", Relabelled(reached))
        return dataset.loader(15, sampler=Prioritized() if adaptive else None, seed=seed, num_workers=workers)

    loader = make(5, 0)
    batches = iter(loader)
    for _ in range(stop):
        next(batches)
    state = loader.state_dict()
    expected = goals_of(batches) + goals_of(loader)
    for workers in (0, 2):
        again = make(7, workers)
        again.load_state_dict(state)
        assert goals_of(again) + goals_of(again) == expected


def test_goals_of_samples_are_those_of_the_generator(tmp_path):
    with goal_store(tmp_path / "store") as store:
        batches = [
            store.sample(64, Relabelled(reached, seed=window), np.random.default_rng(seed))
            for window, seed in [(0, 0), (1, 0), (0, 1)]
        ]
    goals = [batch.observation["desired_goal"].tolist() for batch in batches]
    assert goals[0] == goals[1] != goals[2]


def test_sampling_draws_relabelled_items_of_a_growing_store(tmp_path):
    with goal_store(tmp_path / "store", lengths=(3,)) as store:
        window = Relabelled(reached, seed=0)
        for t in range(3, 30):
            store.step(t, observation(0, t + 1), -1.0, False, False)
            batch = store.sample(32, window, np.random.default_rng(t))
            assert batch.observation["desired_goal"].max() <= t + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": Transition(n_step=3)}, "window: expected a Transition with n_step=1"),
        ({"window": "Transition"}, "window: expected a Transition with n_step=1"),
        ({"reward": None}, "reward: expected a function"),
        ({"goals": 0}, "goals: expected an int from 1"),
        ({"goals": 2.5}, "goals: expected an int from 1"),
        ({"seed": -1}, "seed: expected None or an int from 0"),
        ({"seed": 1.0}, "seed: expected None or an int from 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        Relabelled(**({"reward": reached} | arguments))


def test_a_store_without_goals_is_refused(tmp_path):
    fields = [Field("observation", (), "int64"), Field("action", (), "int64"), Field("reward", (), "float64")]
    with ReplayStore.create(tmp_path / "store", Schema([*fields, *FLAGS])) as store:
        store.reset(0)
        store.step(0, 1, 1.0, True, False)
        with pytest.raises(UsageError, match="expected the fields observation/achieved_goal"):
            store.sample(4, Relabelled(reached))


def test_goals_of_different_shapes_are_refused(tmp_path):
    schema = goal_schema(desired=((3,), "float64"))
    with ReplayStore.create(tmp_path / "store", schema) as store:
        row = {"achieved_goal": np.zeros(2), "desired_goal": np.zeros(3), "observation": 0}
        store.reset(row)
        store.step(0, row, 1.0, True, False)
        with pytest.raises(UsageError, match="goals of one shape and dtype"):
            store.sample(4, Relabelled(reached))


@pytest.mark.parametrize(
    "function",
    [
        lambda achieved, desired, info: 0.0,
        lambda achieved, desired, info: achieved - desired,
        lambda achieved, desired, info: np.full(len(achieved), "x"),
        lambda achieved, desired, info: np.zeros(len(achieved), complex),
    ],
)
def test_rewards_that_cannot_stand_for_the_recorded_ones_are_refused(tmp_path, function):
    expected = r"reward: expected float64 of \(\d+,\), the function gave"
    with goal_store(tmp_path / "store") as store, pytest.raises(UsageError, match=expected):
        store.sample(64, Relabelled(function))


def test_an_integer_reward_is_not_cut_to_fit(tmp_path):
    with ReplayStore.create(tmp_path / "store", goal_schema(reward="int64")) as store:
        store.reset(observation(0, 0))
        store.step(0, observation(0, 1), -1, True, False)
        with pytest.raises(UsageError, match=r"reward: expected int64 .* gave float64"):
            store.sample(64, Relabelled(reached))
