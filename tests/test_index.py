import json

import numpy as np
import pytest

from replaystore.compiled import finding
from replaystore.errors import CorruptionError
from replaystore.index import EpisodeIndex, Extent, Spacing


@pytest.fixture(autouse=True, params=[finding, None], ids=["compiled", "numpy"])
def compiled(request, monkeypatch):
    monkeypatch.setattr("replaystore.index.finding", request.param)


def arrays(episodes, columns=3):
    """Lists of (env, first, length, …) as arrays."""
    return np.array(episodes, np.int64).reshape(-1, columns).T


class Model:
    """All episodes in the order of their transitions' numbers, open ones last.

    Each is its stream, env, first row and length, whether it terminated and whether it was truncated.
    """

    def __init__(self):
        self.closed, self.open = [], []

    def places(self, start=0, step=1, left=1):
        return [
            (stream, env, first + t, first, first + n, *[first + n - 1 if flag else -1 for flag in flags])
            for stream, env, first, n, *flags in self.closed + self.open
            for t in range(start, n - left + 1, step)
        ]


def check(index, model):
    places = model.places()
    assert len(index) == len(places)
    assert index.num_episodes == len(model.closed + model.open)
    found = index.locate(np.arange(len(places)))
    assert list(zip(*(column.tolist() for column in found), strict=True)) == places
    episodes = [column.tolist() for column in index.episodes()]
    shown = [(s, env, first, first + length) for s, env, first, length, *_ in model.closed + model.open]
    assert list(zip(*episodes, strict=True)) == shown
    index.check()


@pytest.mark.parametrize("seed", range(5))
def test_numbers_lead_to_rows_as_a_list_would(seed):
    rng = np.random.default_rng(seed)
    index, model = EpisodeIndex(), Model()
    for stream in (2, 0, 1):
        index.set_width(stream, 4)
    follower = EpisodeIndex(Spacing(3, 2, 1))
    rows = np.zeros((3, 4), np.int64)
    for _ in range(60):
        stream = int(rng.integers(3))
        added = []
        for _ in range(int(rng.integers(0, 30))):
            env, length = int(rng.integers(4)), int(rng.integers(1, 6))
            added.append((env, int(rows[stream, env]), length, *rng.integers(2, size=2).tolist()))
            rows[stream, env] += length + int(rng.integers(1, 4))
        index.append(stream, *arrays(added, 5))
        model.closed += [(stream, *episode) for episode in added]
        model.open = [
            (s, env, int(rows[s, env]), int(rng.integers(1, 50)), 0, 0)
            for s in range(3)
            for env in range(4)
            if rng.random() < 0.3
        ]
        index.set_open([(s, *arrays([e[1:4] for e in model.open if e[0] == s])) for s in range(3)])
        check(index, model)
        follower.follow(index)
        check_spaced(follower, model)


def check_spaced(index, model):
    """Items at transitions 1, 4, 7 … of which 2 are left, and every id leads to its item's number."""
    places = model.places(start=1, step=3, left=2)
    found = index.locate(np.arange(len(index)))
    assert list(zip(*(column.tolist() for column in found), strict=True)) == places
    items = {(s << 40) + t * 4 + env: number for number, (s, env, t, *_) in enumerate(places)}
    every = [(s << 40) + t * 4 + env for s, env, t, _, last, *_ in model.places() for t in (t, last)]
    every += [-1, 7 << 40, (1 << 62) + 5]
    assert index.numbers(np.array(every)).tolist() == [items.get(id_, -1) for id_ in every]
    index.check()


@pytest.mark.parametrize("seed", range(3))
def test_an_extent_finds_the_same_episodes_when_more_have_come(seed):
    rng = np.random.default_rng(seed)
    index, rows = EpisodeIndex(), np.zeros((2, 3), np.int64)
    for stream in range(2):
        index.set_width(stream, 3)

    def grow():
        for _ in range(10):
            stream, env, length = int(rng.integers(2)), int(rng.integers(3)), int(rng.integers(1, 9))
            rows[stream, env] += (stream, env) not in still_open
            length += still_open.pop((stream, env), 0)
            index.append(stream, *arrays([(env, int(rows[stream, env]), length)]))
            rows[stream, env] += length
        for stream, env in ((0, 1), (1, 2)):
            rows[stream, env] += (stream, env) not in still_open
            still_open[stream, env] = still_open.get((stream, env), 0) + 2
        index.set_open([(s, *arrays([(e, int(rows[s, e]), n)])) for (s, e), n in still_open.items()])

    still_open = {}
    grow()
    extent = Extent(**json.loads(json.dumps(index.extent()._asdict())))
    before = index.at(extent)
    ids = set(index.ids(index.locate(np.arange(len(index)))).tolist())
    for _ in range(3):
        grow()
    after = index.at(extent)
    assert after.is_like(before)
    assert not after.is_like(index)
    assert set(after.ids(after.locate(np.arange(len(after)))).tolist()) == ids


def test_an_empty_index_has_nothing():
    index = EpisodeIndex()
    assert (len(index), index.num_episodes) == (0, 0)
    index.set_open([])
    index.append(0, *arrays([]))
    check(index, Model())


def test_numbers_may_come_in_any_order_and_twice():
    index = EpisodeIndex()
    index.append(0, *arrays([(0, 0, 3), (1, 10, 2)]))
    assert index.locate(np.array([4, 0, 4, 2])).time.tolist() == [11, 0, 11, 2]


@pytest.mark.parametrize(
    "episodes",
    [[(0, 0, 3), (0, 3, 2)], [(0, 0, 3), (0, 0, 3)], [(0, 5, 3), (0, 4, 2)], [(0, 0, 9), (0, 2, 1)]],
)
def test_overlapping_episodes_are_noticed(episodes):
    index = EpisodeIndex()
    index.append(0, *arrays(episodes))
    with pytest.raises(CorruptionError, match="expected episodes apart"):
        index.check()


def test_episode_without_transitions_is_noticed():
    index = EpisodeIndex()
    index.append(0, *arrays([(0, 0, 0)]))
    with pytest.raises(AssertionError, match="without transitions"):
        index.check()


def test_rows_beyond_32_bits_are_found():
    index = EpisodeIndex()
    index.append(0, *arrays([(0, 2**31, 2**33), (0, 2**39, 5)]))
    found = index.locate(np.array([0, 2**33 - 1, 2**33]))
    assert found.time.tolist() == [2**31, 2**31 + 2**33 - 1, 2**39]
    index.check()


@pytest.mark.parametrize("longest", [1, 3, 1000])
def test_many_numbers_lead_where_few_do_while_the_index_grows(longest):
    rng = np.random.default_rng(longest)
    index, row = EpisodeIndex(), 0
    for _ in range(30):
        lengths = rng.choice([1, longest], int(rng.integers(1, 200)))
        firsts = row + np.cumsum(lengths + 1) - lengths - 1
        row = int(firsts[-1] + lengths[-1] + 1)
        index.append(0, np.zeros(len(lengths), np.int64), firsts, lengths)
        index.set_open([(0, *(np.array([number]) for number in (1, 0, 37)))])
        numbers = rng.integers(len(index), size=500)
        few = [index.locate(numbers[start : start + 50]) for start in range(0, 500, 50)]
        for together, alone in zip(index.locate(numbers), zip(*few, strict=True), strict=True):
            assert np.array_equal(together, np.concatenate(alone))


@pytest.mark.parametrize("number", [-1, 10, 2**62, -(2**63)])
@pytest.mark.parametrize("repeats", [1, 200])
def test_a_number_that_no_item_has_is_refused(number, repeats):
    index = EpisodeIndex()
    index.append(0, *arrays([(0, 0, 7), (0, 8, 3)]))
    with pytest.raises(IndexError, match="expected numbers"):
        index.locate(np.array([0, number, 9]).repeat(repeats))


def test_an_episode_lies_in_one_line_of_the_caches():
    index = EpisodeIndex()
    for count in (1, 64, 1000):
        assert index._table.T.ctypes.data % 64 == 0
        assert index._table.T.strides == (64, 8)
        index.append(0, *arrays([(0, 10 * (index.num_episodes + i), 9) for i in range(count)]))
    index.check()


def test_an_interrupt_while_room_is_made_leaves_what_there_was(monkeypatch):
    index, model = EpisodeIndex(), Model()
    index.set_width(0, 1)
    for first in (0, 1000):
        episodes = [(0, first + 5 * i, 4, 0, 0) for i in range(100)]
        with monkeypatch.context() as patch:
            patch.setattr("replaystore.index._empty_table", interrupted)
            with pytest.raises(KeyboardInterrupt):
                index.append(0, *arrays(episodes, 5))
        check(index, model)
        index.append(0, *arrays(episodes, 5))
        model.closed += [(0, *episode) for episode in episodes]
        check(index, model)


def test_an_interrupt_while_buckets_are_filled_leaves_those_there_were(monkeypatch):
    index, model = EpisodeIndex(), Model()
    index.set_width(0, 1)
    for first, count, length in ((0, 20, 1000), (30_000, 2000, 10)):
        episodes = [(0, first + i * (length + 1), length, 0, 0) for i in range(count)]
        index.append(0, *arrays(episodes, 5))
        model.closed += [(0, *episode) for episode in episodes]
        with monkeypatch.context() as patch:
            patch.setattr("numpy.arange", interrupted)
            with pytest.raises(KeyboardInterrupt):
                index.locate(np.zeros(200, np.int64))
        check(index, model)


def interrupted(*_):
    raise KeyboardInterrupt
