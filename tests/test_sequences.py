"""Windows of many steps against a slow reference, worked out step by step from whole episodes."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_windows import (
    ENDS,
    FLAGS,
    check_items,
    flat_batch,
    leaves,
    random_episode,
    random_value,
    reference_item,
    reference_stack,
    simple_store,
)

from replaystore import Field, ReplayStore, Schema, Transition, UsageError
from replaystore.dataset import ReplayDataset
from replaystore.sequences import Sequence, WholeEpisode

EXAMPLES = Path(__file__).parent.parent / "examples"
TAG = Field("tag", (), "int64")  # numbers the transitions, so that each can be told
STORES = {"one": (0, [1]), "vector": (1, [3]), "streams": (2, [1, 2]), "tuple": (3, [2, 1])}


def nested_schema(rng):
    """Packed and flat observations, with each kind of padding."""
    frame = random_value(Field("x", (2,), "int16"), rng)
    return Schema(
        [
            Field("observation/image", (6, 5), "uint8", codec="blosc-lz4-1", chunk_rows=4),
            Field("observation/zeros", (3,), "float32", padding=bytes(12)),
            Field("observation/framed", (2,), "int16", padding=frame.tobytes()),
            Field("action/0", (), "int64"),
            Field("action/1", (2,), "float32"),
            Field("reward", (), "float64"),
            *FLAGS,
            TAG,
        ]
    )


def tuple_schema(rng):
    """A Tuple observation and a reward of two parts."""
    return Schema(
        [
            Field("observation/0", (), "int64"),
            Field("observation/1", (2, 2), "float32"),
            Field("action", (), "int32"),
            Field("reward", (2,), "float32"),
            *FLAGS,
            TAG,
        ]
    )


def random_queue(schema, rng, tags):
    """The episodes of one environment, the last of which may stay open."""
    kinds = ["terminated", "truncated", "cut"]
    queue = [
        random_episode(schema, rng, int(rng.choice([1, 1, 2, 3, 9])), rng.choice(kinds)) for _ in range(5)
    ]
    queue.append(random_episode(schema, rng, 4, rng.choice([*kinds, "open"])))
    for episode in queue:
        episode.fields["tag"] = [np.int64(next(tags)) for _ in range(len(episode))]
    return queue


class Player:
    """Records a queue of episodes for each environment of a stream."""

    def __init__(self, store, queues, rng):
        self.store, self.rng = store, rng
        self.queues = [iter(queue) for queue in queues]
        self.now = [None] * len(queues)
        self.at = [0] * len(queues)

    def play(self):
        while (begins := [self.is_over(env) for env in range(len(self.now))]) and self.step(begins):
            if self.rng.random() < 0.2:
                self.store.flush()
        self.store.flush()

    def is_over(self, env):
        """Whether the environment's episode is, and there is another."""
        if self.now[env] is None or self.at[env] == len(self.now[env]):
            following = next(self.queues[env], None)
            if following is not None:
                self.now[env], self.at[env] = following, 0
                return True
        return False

    def step(self, begins):
        if any(begins):
            self.store.reset(self.values("observation", 0)["observation"], mask=np.array(begins))
        active = np.array([self.at[env] < len(self.now[env]) for env in range(len(self.now))])
        if not active.any():
            return False
        values = {top: self.values(top, top == "observation")[top] for top in self.store.schema.tops}
        flags = {name: self.flags(name) for name in ("terminated", "truncated")}
        self.store.step(**(values | flags), mask=active)
        self.at = [at + int(is_active) for at, is_active in zip(self.at, active, strict=True)]
        return True

    def values(self, top, ahead):
        """One row of the fields below a name, with the environments first if there are several."""
        schema = self.store.schema
        flat = {}
        for name in schema.names(top):
            none = np.zeros(schema.by_name[name].shape, schema.by_name[name].dtype)
            rows = [self.row(env, name, ahead, none) for env in range(len(self.now))]
            flat[name] = np.stack(rows) if len(rows) > 1 else rows[0]
        return {top: schema.nest(top, flat)}

    def row(self, env, name, ahead, none):
        rows = self.now[env].fields[name]
        return rows[self.at[env] + ahead] if self.at[env] + ahead < len(rows) else none

    def flags(self, name):
        ends = [getattr(e, name) and at + 1 == len(e) for e, at in zip(self.now, self.at, strict=True)]
        return np.array(ends) if len(ends) > 1 else ends[0]


def record(path, schema, rng, widths):
    """A stream for each width, written at the same time; the episodes."""
    tags = iter(range(10**6))
    queues = [[random_queue(schema, rng, tags) for _ in range(width)] for width in widths]
    stores = [ReplayStore.create(path, schema, widths[0])]
    stores += [ReplayStore.open(path, "a", num_envs=width) for width in widths[1:]]
    for store, queue in zip(stores, queues, strict=True):
        Player(store, queue, rng).play()
    return stores, [episode for stream in queues for queue in stream for episode in queue]


@pytest.fixture(scope="module", params=STORES)
def recorded(request, tmp_path_factory):
    """A store as its writer and as a reader have it, and its episodes."""
    seed, widths = STORES[request.param]
    rng = np.random.default_rng(seed)
    schema = (tuple_schema if request.param == "tuple" else nested_schema)(rng)
    path = tmp_path_factory.mktemp("sequences") / "store"
    stores, episodes = record(path, schema, rng, widths)
    with ReplayStore.open(path) as reader:
        stores[0].refresh()
        yield stores[0], reader, episodes
    for store in stores:
        store.close()


def reference_sequence(schema, episode, begin, steps, window):
    """What the run of so many steps from step `begin` of an episode is, worked out row by row."""
    item = {"mask": [0 <= t < len(episode) for t in range(begin, begin + steps)]}
    item["is_first"] = [t == 0 for t in range(begin, begin + steps)]
    item["length"] = sum(item["mask"])
    for name, field in schema.by_name.items():
        if schema.is_observation(name):
            item[name] = [
                reference_stack(field, episode, t, window.frame_stack)
                if 0 <= t <= len(episode)
                else np.zeros(
                    ((window.frame_stack,) if window.frame_stack > 1 else ()) + field.shape, field.dtype
                )
                for t in range(begin, begin + steps + 1)
            ]
        elif name not in ("terminated", "truncated"):
            none = np.zeros(field.shape, field.dtype)
            rows = episode.fields[name]
            item[name] = [rows[t] if 0 <= t < len(rows) else none for t in range(begin, begin + steps)]
    for name in ("terminated", "truncated"):
        item[name] = [getattr(episode, name) and t + 1 == len(episode) for t in range(begin, begin + steps)]
    if window.gamma is not None:
        item["return_to_go"] = [
            reference_return(schema, episode, t, window.gamma) for t in range(begin, begin + steps)
        ]
    return {name: np.array(rows) for name, rows in item.items()}


def reference_return(schema, episode, t, gamma):
    total = np.zeros(schema.by_name["reward"].shape)
    if 0 <= t < len(episode):
        for k in range(t, len(episode)):
            total = total + gamma ** (k - t) * episode.fields["reward"][k].astype(np.float64)
    return total


def flat_sequences(schema, batch):
    """A batch as arrays by field."""
    named = {
        name: value for name, value in batch._asdict().items() if name not in ("ids", "weights", "extra")
    }
    named |= batch.extra
    flat = {}
    for top, value in named.items():
        flat |= dict(leaves(schema, top, value)) if top in schema.tops else {top: value}
    return flat


def check_sequences(schema, batch, expected):
    arrays = flat_sequences(schema, batch)
    for name in arrays:
        values = np.stack([item[name] for item in expected])
        if name == "return_to_go":
            np.testing.assert_allclose(arrays[name], values, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(arrays[name], values, err_msg=name)
        assert arrays[name].dtype == (
            schema.by_name[name].dtype if name in schema.by_name else arrays[name].dtype
        )
    assert arrays.keys() == expected[0].keys()


def where_tags_are(episodes):
    return {int(tag): (e, t) for e in episodes for t, tag in enumerate(e.fields["tag"])}


sizes = st.integers(1, 12)
sequences = st.builds(
    Sequence,
    length=sizes,
    burn_in=st.integers(0, 5),
    stride=st.integers(1, 4),
    frame_stack=st.sampled_from([1, 1, 2, 4]),
    pad=st.booleans(),
    gamma=st.sampled_from([None, 0.0, 0.5, 0.99, 1.0]),
)
transitions = st.builds(
    Transition,
    n_step=sizes,
    gamma=st.sampled_from([0.0, 0.5, 0.97, 1.0]),
    frame_stack=st.sampled_from([1, 2, 4, 12]),
)
whole = st.builds(
    WholeEpisode,
    max_length=st.none() | sizes,
    gamma=st.sampled_from([None, 0.0, 0.5, 1.0]),
    frame_stack=st.sampled_from([1, 2, 4]),
)
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(window=transitions, seed=st.integers(0, 99))
def test_every_transition_equals_a_slow_reference(recorded, window, seed):
    for store in recorded[:2]:
        numbers = np.random.default_rng(seed).permutation(len(store))
        batch = store.read(numbers, window)
        places = where_tags_are(recorded[2])
        items = [places[int(tag)] for tag in batch.extra["tag"]]
        assert len(set(map(id, items))) == len(places) == len(store)
        expected = [reference_item(store.schema, episode, t, window) for episode, t in items]
        check_items(store.schema, flat_batch(store.schema, batch), expected)


@many
@given(window=sequences, seed=st.integers(0, 99))
def test_every_sequence_equals_a_slow_reference(recorded, window, seed):
    for store in recorded[:2]:
        n = store.count(window)
        if not n:
            assert not window.pad
            continue
        numbers = np.random.default_rng(seed).permutation(n)
        batch = store.read(numbers, window)
        places = where_tags_are(recorded[2])
        items = [places[int(tag)] for tag in batch.extra["tag"][:, window.burn_in]]
        steps = window.burn_in + window.length
        expected = [reference_sequence(store.schema, e, t - window.burn_in, steps, window) for e, t in items]
        check_sequences(store.schema, batch, expected)


@many
@given(window=sequences)
def test_sequences_begin_wherever_the_stride_and_the_padding_say(recorded, window):
    _, reader, episodes = recorded
    tags = []
    for episode in episodes:
        starts = range(0, len(episode), window.stride)
        if not window.pad:
            starts = range(window.burn_in, len(episode) - window.length + 1, window.stride)
        tags += [int(episode.fields["tag"][t]) for t in starts]
    n = reader.count(window)
    assert n == len(tags)
    if n:
        batch = reader.read(np.arange(n), window)
        assert sorted(batch.extra["tag"][:, window.burn_in].tolist()) == sorted(tags)
        if not window.pad:
            assert batch.mask.all()


@many
@given(window=whole, seed=st.integers(0, 99))
def test_every_whole_episode_equals_a_slow_reference(recorded, window, seed):
    for store in recorded[:2]:
        n = store.count(window)
        assert n == store.num_episodes == len(recorded[2])
        numbers = np.random.default_rng(seed).permutation(n)[: seed + 1]
        batch = store.read(numbers, window)
        places = where_tags_are(recorded[2])
        items = [places[int(tag)] for tag in batch.extra["tag"][:, 0]]
        assert all(t == 0 for _, t in items)
        steps = max(len(episode) for episode, _ in items)
        steps = steps if window.max_length is None else min(steps, window.max_length)
        check_sequences(
            store.schema, batch, [reference_sequence(store.schema, e, 0, steps, window) for e, _ in items]
        )


@pytest.mark.parametrize(
    "window", [Sequence(3, burn_in=2), Sequence(3, burn_in=2, pad=False), WholeEpisode()]
)
def test_ids_name_the_transition_at_which_an_item_begins(recorded, window):
    _, reader, _ = recorded
    batch = reader.read(np.arange(reader.count(window)), window)
    transitions = reader.items(Transition()).numbers(batch.ids)
    begins = reader.read(transitions).extra["tag"]
    assert (batch.extra["tag"][:, getattr(window, "burn_in", 0)] == begins).all()
    assert batch.weights.dtype == np.float32
    assert batch.weights.shape == batch.ids.shape


def test_a_sequence_is_padded_on_both_sides_and_its_last_observation_is_there(tmp_path):
    with simple_store(tmp_path / "store", length=3, end="terminated") as store:
        batch = store.read(np.arange(3), Sequence(2, burn_in=1, gamma=0.5))
    assert batch.observation.tolist() == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 0]]
    assert batch.mask.tolist() == [[False, True, True], [True] * 3, [True, True, False]]
    assert batch.is_first.tolist() == [[False, True, False], [True, False, False], [False] * 3]
    assert batch.reward.tolist() == [[0, 1, 10], [1, 10, 100], [10, 100, 0]]
    assert batch.terminated.tolist() == [[False] * 3, [False, False, True], [False, True, False]]
    assert batch.length.tolist() == [2, 3, 2]
    assert batch.extra["return_to_go"].tolist() == [[0, 31, 60], [31, 60, 100], [60, 100, 0]]


def test_returns_to_go_reach_beyond_the_item_to_the_end_of_the_episode(tmp_path):
    with simple_store(tmp_path / "store", length=5, end="truncated") as store:
        batch = store.read(np.arange(2), Sequence(2, pad=False, gamma=1))
        episode = store.read(np.arange(1), WholeEpisode(max_length=2))
    assert batch.extra["return_to_go"].tolist() == [[11111, 11110], [11110, 11100]]
    assert batch.reward.shape == (2, 2)
    assert episode.extra["return_to_go"].tolist() == [[11111, 11110]]
    assert episode.truncated.tolist() == [[False, False]], "it ends beyond max_length"


def test_rewards_beyond_the_end_do_not_count_even_if_they_are_not_numbers(tmp_path):
    with simple_store(tmp_path / "store", length=2, end="terminated") as store:
        store.reset(1)
        store.step(0, 2, float("nan"), False, False)
        batch = store.read(np.arange(2), Sequence(4, gamma=1))
    assert batch.reward.tolist() == [[1, 10, 0, 0], [10, 0, 0, 0]]
    assert batch.extra["return_to_go"].tolist() == [[11, 10, 0, 0], [10, 0, 0, 0]]


def test_stacks_are_views_of_frames_where_nothing_is_padded(tmp_path):
    with simple_store(tmp_path / "store", length=9, end="terminated") as store:
        batch = store.read(np.arange(4), Sequence(4, burn_in=1, frame_stack=3, pad=False))
    assert batch.observation.shape == (4, 6, 3)
    assert batch.observation.strides[1] == batch.observation.strides[2]


def test_an_open_episode_grows_and_its_sequences_with_it(tmp_path):
    with simple_store(tmp_path / "store", length=2, end="open") as store:
        first = store.read(np.arange(1), Sequence(4, gamma=1))
        store.step(2, 4, 100.0, True, False)
        second = store.read(np.arange(1), Sequence(4, gamma=1))
    assert first.ids.tolist() == second.ids.tolist()
    assert (first.length.tolist(), second.length.tolist()) == ([2], [3])
    assert first.extra["return_to_go"][0, 0] == 11
    assert second.extra["return_to_go"][0, 0] == 111


def test_a_store_without_an_episode_that_long_says_so(tmp_path):
    with simple_store(tmp_path / "store", length=3, end="terminated") as store:
        with pytest.raises(UsageError, match=r"expected at least one item of Sequence\(length=4.*has none"):
            store.sample(1, Sequence(4, pad=False))
        assert store.sample(2, Sequence(4)).mask.shape == (2, 4)
        assert store.count(Sequence(3, pad=False)) == 1
        assert store.count(Sequence(3, burn_in=1, pad=False)) == 0


def test_reading_no_items_gives_empty_arrays(tmp_path):
    with simple_store(tmp_path / "store", length=3, end="terminated") as store:
        none = np.arange(0)
        assert store.read(none, Sequence(2, burn_in=1, frame_stack=2)).observation.shape == (0, 4, 2)
        assert store.read(none, WholeEpisode()).reward.shape == (0, 0)


def test_a_field_of_the_name_of_the_returns_is_not_overwritten(tmp_path):
    fields = [Field("observation", (), "int64"), Field("action", (), "int64"), Field("reward", (), "float64")]
    schema = Schema([*fields, *FLAGS, Field("return_to_go", (), "float64")])
    with ReplayStore.create(tmp_path / "store", schema) as store:
        store.reset(0)
        store.step(0, 1, 1.0, True, False, return_to_go=7.0)
        with pytest.raises(UsageError, match=r"return_to_go.*gamma=None"):
            store.read(np.arange(1), WholeEpisode())
        assert store.read(np.arange(1), WholeEpisode(gamma=None)).extra["return_to_go"].tolist() == [[7]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "window",
    [Sequence(4, burn_in=2, frame_stack=2, gamma=0.9), Sequence(2, frame_stack=3, pad=False), WholeEpisode()],
)
def test_a_loader_gives_the_sequences_that_the_store_reads(tmp_path, window, workers):
    rng = np.random.default_rng(1)
    stores, _ = record(tmp_path / "store", nested_schema(rng), rng, [2])
    with stores[0]:
        pass
    with ReplayStore.open(tmp_path / "store") as store:
        n = store.count(window)
        number_of = {int(each): i for i, each in enumerate(store.read(np.arange(n), window).ids)}
        seen = []
        for batch in ReplayDataset(tmp_path / "store", window).loader(4, seed=1, num_workers=workers):
            ids = batch["ids"].tolist()
            expected = store.read(np.array([number_of[each] for each in ids]), window)
            steps = expected.mask.shape[1]  # a loader pads to the longest of several batches
            assert (batch["mask"].numpy()[:, :steps] == expected.mask).all()
            assert not batch["mask"][:, steps:].any()
            for part, array in expected.observation.items():
                shown = batch["observation"][part].numpy()
                np.testing.assert_array_equal(shown[:, : steps + 1], array)
                assert not shown[:, steps + 1 :].any()
            if window.gamma is not None:
                found = batch["return_to_go"].numpy()[:, :steps]
                np.testing.assert_allclose(found, expected.extra["return_to_go"])
            seen += ids
    assert sorted(seen) == sorted(number_of)


@pytest.mark.parametrize("end", ENDS)
def test_the_smallest_episode_is_a_sequence(tmp_path, end):
    with simple_store(tmp_path / "store", length=1, end=end) as store:
        batch = store.read(np.arange(1), Sequence(1, pad=False))
        assert batch.observation.tolist() == [[1, 2]]
        assert batch.terminated.tolist() == [[end == "terminated"]]
        assert batch.truncated.tolist() == [[end == "truncated"]]
        padded = store.read(np.arange(1), Sequence(3, burn_in=2, frame_stack=2))
        assert padded.observation.tolist() == [[[0, 0], [0, 0], [1, 1], [1, 2], [0, 0], [0, 0]]]


@pytest.mark.parametrize(
    ("window", "arguments"),
    [
        (Sequence, {"length": 0}),
        (Sequence, {"length": 2.0}),
        (Sequence, {"length": 2, "burn_in": -1}),
        (Sequence, {"length": 2, "stride": 0}),
        (Sequence, {"length": 2, "stride": True}),
        (Sequence, {"length": 2, "frame_stack": 0}),
        (Sequence, {"length": 2, "pad": 1}),
        (Sequence, {"length": 2, "gamma": 1.5}),
        (WholeEpisode, {"max_length": 0}),
        (WholeEpisode, {"frame_stack": None}),
        (WholeEpisode, {"gamma": float("nan")}),
        (WholeEpisode, {"gamma": True}),
    ],
)
def test_a_window_refuses_what_is_no_window(window, arguments):
    with pytest.raises(UsageError, match=f"{list(arguments)[-1]}: expected .*, got"):
        window(**arguments)


def test_a_recurrent_model_learns_from_recorded_sequences(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    sys.modules.pop("sequence_batches", None)
    import sequence_batches

    losses = sequence_batches.main([str(tmp_path / "store"), "--steps", "600", "--updates", "40"])
    assert losses[-1] < losses[0] / 2
    shown = capsys.readouterr().out
    assert "observation (16, 21, 3)" in shown
    assert "return_to_go" in shown
