import numpy as np
import pytest

from replaystore import Field, ReplayStore, Schema, Transition, UsageError

FLAGS = (Field("terminated", (), "bool"), Field("truncated", (), "bool"))
ENDS = {"terminated": (True, False), "truncated": (False, True), "cut": (False, False), "open": None}


class Recorded:
    """An episode as plain lists by field: L+1 values of the observation's, L of the others."""

    def __init__(self, names):
        self.fields = {name: [] for name in names}
        self.terminated = self.truncated = False

    def __len__(self):
        return len(self.fields["reward"])


def random_value(field, rng):
    """One row of a field: any bits that are a number."""
    if field.dtype.kind == "b":
        return rng.random(field.shape) < 0.5
    if field.dtype.kind == "f":
        return rng.normal(size=field.shape).astype(field.dtype)
    return rng.integers(0, 100, size=field.shape).astype(field.dtype)


def reference_item(schema, episode, t, window):
    """What a `Transition` at step t of an episode is, worked out row by row."""
    steps = min(window.n_step, len(episode) - t)
    terminated = episode.terminated and t + steps == len(episode)
    item = {
        "reward": sum(window.gamma**k * np.float64(episode.fields["reward"][t + k]) for k in range(steps)),
        "terminated": terminated,
        "truncated": episode.truncated and t + steps == len(episode),
        "discount": 0.0 if terminated else window.gamma**steps,
    }
    for name in schema.by_name:
        if schema.is_observation(name):
            item[name] = reference_stack(schema.by_name[name], episode, t, window.frame_stack)
            item["next_" + name] = reference_stack(
                schema.by_name[name], episode, t + steps, window.frame_stack
            )
        elif name not in item:
            item[name] = episode.fields[name][t]
    return item


def reference_stack(field, episode, t, length):
    rows, padding = episode.fields[field.name], field.padding_row()
    frames = [
        rows[time] if time >= 0 else rows[0] if padding is None else padding
        for time in range(t - length + 1, t + 1)
    ]
    return np.stack(frames) if length > 1 else frames[0]


def flat_batch(schema, batch):
    """A batch as arrays by field; those of the next observation as "next_" + field."""
    extra = {name: value for top in schema.extra for name, value in leaves(schema, top, batch.extra[top])}
    after = {"next_" + name: value for name, value in leaves(schema, "observation", batch.next_observation)}
    own = dict(leaves(schema, "observation", batch.observation)) | dict(
        leaves(schema, "action", batch.action)
    )
    single = ("reward", "terminated", "truncated", "discount")
    return own | after | extra | {name: getattr(batch, name) for name in single}


def leaves(schema, top, value):
    return schema.flatten_top(top, value).items()


def check_items(schema, arrays, expected):
    """Compare a flat batch with references, one for each item; sums may differ in the last digits."""
    for name in arrays:
        values = np.stack([item[name] for item in expected])
        if name in ("reward", "discount"):
            tolerance = 1e-5 if arrays[name].dtype == np.float32 else 1e-12
            np.testing.assert_allclose(arrays[name], values, rtol=tolerance, atol=tolerance, err_msg=name)
        else:
            np.testing.assert_array_equal(arrays[name], values, err_msg=name)
    assert arrays.keys() == expected[0].keys()


def add_recorded(store, episode):
    """Append an episode by `reset` and `step`, and leave it open."""
    schema, fields = store.schema, episode.fields
    at = [{name: rows[t] for name, rows in fields.items()} for t in range(len(episode))]
    store.reset(schema.nest("observation", {n: fields[n][0] for n in schema.names("observation")}))
    for t, row in enumerate(at):
        row |= {n: fields[n][t + 1] for n in schema.names("observation")}
        values = {top: schema.nest(top, row) for top in schema.tops if top not in ("terminated", "truncated")}
        last = t + 1 == len(episode)
        store.step(**values, terminated=last and episode.terminated, truncated=last and episode.truncated)


def random_episode(schema, rng, length, end):
    episode = Recorded(schema.by_name)
    for name, field in schema.by_name.items():
        rows = length + schema.is_observation(name)
        episode.fields[name] = [random_value(field, rng) for _ in range(rows)]
    episode.terminated, episode.truncated = ENDS[end] or (False, False)
    return episode


def window_schema(rng, reward):
    """Nested observations with and without padding, a nested action and a field of the user's."""
    image = Field("observation/image", (6, 5), "uint8", codec="blosc-lz4-1", chunk_rows=4)
    zeros = Field("observation/zeros", (3,), "float32", padding=bytes(12))
    frame = random_value(Field("x", (2,), "int16"), rng)
    framed = Field("observation/framed", (2,), "int16", padding=frame.tobytes())
    actions = [Field("action/0", (), "int64"), Field("action/1", (2,), "float32")]
    return Schema(
        [image, zeros, framed, *actions, Field("reward", *reward), *FLAGS, Field("log_prob", (), "float64")]
    )


REWARDS = [((), "float64"), ((), "float32"), ((), "int64"), ((2,), "float64")]


@pytest.mark.parametrize("seed", range(12))
def test_every_transition_equals_a_slow_reference(tmp_path, seed):
    rng = np.random.default_rng(seed)
    schema = window_schema(rng, REWARDS[seed % 4])
    kinds = ["terminated", "truncated", "cut"]
    episodes = [random_episode(schema, rng, int(rng.integers(1, 8)), rng.choice(kinds)) for _ in range(12)]
    episodes.append(random_episode(schema, rng, 5, "open"))
    with ReplayStore.create(tmp_path / "store", schema) as store:
        for episode in episodes:
            add_recorded(store, episode)
            if rng.random() < 0.3:
                store.flush()
        places = [(episode, t) for episode in episodes for t in range(len(episode))]
        assert len(store) == len(places)
        for _ in range(8):
            n_step, stack = int(rng.choice([1, 1, 2, 3, 20])), int(rng.choice([1, 2, 4, 10]))
            window = Transition(
                n_step=n_step, frame_stack=stack, gamma=float(rng.choice([0.0, 0.5, 0.97, 1]))
            )
            numbers = rng.permutation(len(places))
            arrays = flat_batch(schema, store.read(numbers, window))
            expected = [reference_item(schema, *places[number], window) for number in numbers]
            check_items(schema, arrays, expected)


def simple_schema(*, padding=None, reward=((), "float64")):
    observation = Field("observation", (), "int64", padding=padding)
    return Schema([observation, Field("action", (), "int64"), Field("reward", *reward), *FLAGS])


def simple_store(path, *, length, end, **kwargs):
    """One episode whose observations are 1, 2, … and rewards 1, 10, 100, …"""
    store = ReplayStore.create(path, simple_schema(**kwargs))
    store.reset(1)
    for t in range(length):
        last = t + 1 == length
        terminated, truncated = (ENDS[end] or (False, False)) if last else (False, False)
        reward = np.full(store.schema.by_name["reward"].shape, 10**t, store.schema.by_name["reward"].dtype)
        store.step(t, t + 2, reward[()], terminated, truncated)
    return store


@pytest.mark.parametrize(("end", "discount"), [("terminated", 0), ("truncated", 0.25), ("open", 0.25)])
def test_only_termination_makes_the_discount_zero(tmp_path, end, discount):
    with simple_store(tmp_path / "store", length=3, end=end) as store:
        batch = store.read(np.arange(3), Transition(n_step=2, gamma=0.5))
    assert batch.discount.tolist() == [0.25, discount, 0 if end == "terminated" else 0.5]
    assert batch.reward.tolist() == [1 + 5, 10 + 50, 100]
    assert batch.next_observation.tolist() == [3, 4, 4]
    assert batch.terminated.tolist() == [False, end == "terminated", end == "terminated"]
    assert batch.truncated.tolist() == [False, end == "truncated", end == "truncated"]


@pytest.mark.parametrize(
    ("padding", "first", "second"),
    [
        (None, [1, 1, 1], [1, 1, 2]),
        (np.int64(0).tobytes(), [0, 0, 1], [0, 1, 2]),
        (np.int64(9).tobytes(), [9, 9, 1], [9, 1, 2]),
    ],
)
@pytest.mark.parametrize("n_step", [1, 2])
def test_a_stack_is_padded_before_the_first_row(tmp_path, padding, first, second, n_step):
    with simple_store(tmp_path / "store", length=4, end="terminated", padding=padding) as store:
        batch = store.read(np.arange(4), Transition(frame_stack=3, n_step=n_step))
    assert batch.observation.tolist() == [first, second, [1, 2, 3], [2, 3, 4]]
    assert batch.next_observation[-1].tolist() == [3, 4, 5]
    assert batch.next_observation[0].tolist() == (second if n_step == 1 else [1, 2, 3])


def test_a_stack_never_reaches_into_the_episode_before(tmp_path):
    with simple_store(tmp_path / "store", length=3, end="truncated") as store:
        store.reset(70)
        store.step(0, 71, 0.0, True, False)
        batch = store.read(np.array([3]), Transition(frame_stack=4))
    assert batch.observation.tolist() == [[70] * 4]
    assert batch.next_observation.tolist() == [[70, 70, 70, 71]]


@pytest.mark.parametrize("frame_stack", [2, 4])
def test_stacked_observations_share_memory_with_the_next_ones(tmp_path, frame_stack):
    with simple_store(tmp_path / "store", length=6, end="terminated") as store:
        batch = store.read(np.arange(6), Transition(frame_stack=frame_stack))
    assert np.shares_memory(batch.observation, batch.next_observation)
    assert batch.observation.base is batch.next_observation.base
    assert batch.observation.base.shape == (6, frame_stack + 1)


@pytest.mark.parametrize(
    ("reward", "n_step", "dtype"),
    [
        (((), "float32"), 1, "float32"),
        (((), "float32"), 3, "float32"),
        (((), "int32"), 1, "int32"),
        (((), "int32"), 3, "float64"),
        (((3,), "float64"), 3, "float64"),
    ],
)
def test_returns_keep_a_float_reward_dtype(tmp_path, reward, n_step, dtype):
    with simple_store(tmp_path / "store", length=4, end="terminated", reward=reward) as store:
        batch = store.read(np.arange(4), Transition(n_step=n_step, gamma=1))
    assert batch.reward.dtype == np.dtype(dtype)
    assert batch.reward.shape == (4, *reward[0])
    expected = [1, 10, 100, 1000] if n_step == 1 else [111, 1110, 1100, 1000]
    assert (batch.reward == np.reshape(expected, (4,) + (1,) * len(reward[0]))).all()


def test_rewards_beyond_the_end_do_not_count_even_if_they_are_not_numbers(tmp_path):
    with simple_store(tmp_path / "store", length=2, end="terminated") as store:
        store.reset(1)
        store.step(0, 2, float("nan"), False, False)
        batch = store.read(np.arange(2), Transition(n_step=5, gamma=1))
    assert batch.reward.tolist() == [11, 10]


@pytest.mark.parametrize(
    "arguments",
    [
        {"n_step": 0},
        {"n_step": -1},
        {"n_step": 1.0},
        {"n_step": True},
        {"frame_stack": 0},
        {"frame_stack": "4"},
        {"gamma": -0.1},
        {"gamma": 1.5},
        {"gamma": float("nan")},
        {"gamma": "0.9"},
        {"gamma": None},
    ],
)
def test_a_window_refuses_what_is_no_window(arguments):
    with pytest.raises(UsageError, match=f"{next(iter(arguments))}: expected .*, got"):
        Transition(**arguments)
