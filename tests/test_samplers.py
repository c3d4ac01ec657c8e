"""What all samplers promise is one function; each one's own distribution is measured."""

import io
import json

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from growing import Actors, add_stream, chi_square, schema

from replaystore import ReplayStore, Transition, UsageError
from replaystore.index import EpisodeIndex, Spacing
from replaystore.mixtures import Mixed
from replaystore.samplers import InOrder, Recent, Shuffled, Uniform

RUN, POOL = 8, 32
SAMPLERS = {
    "uniform": Uniform,
    "epoch": lambda: Uniform(replace=False, seed=5),
    "shuffled": lambda: Shuffled(pool=POOL, run=RUN, seed=5),
    "in order": InOrder,
    "newest": lambda: Recent(fraction=0.3),
    "half-life": lambda: Recent(half_life=30),
    "mixed": lambda: Mixed(
        [(Uniform(), 1), (Recent(half_life=10), 2), (Shuffled(pool=16, run=4, seed=1), 1)]
    ),
}
EPOCHS = ["epoch", "shuffled", "in order"]


def index_of(lengths, streams=1, spacing=None):
    """An index over closed episodes of these lengths, in streams of two environments."""
    index = EpisodeIndex(spacing or Spacing())
    for stream in range(streams):
        index.set_width(stream, 2)
    append(index, lengths, streams)
    return index


def append(index, lengths, streams=1):
    lengths = np.asarray(lengths, np.int64)
    number = index.num_closed + np.arange(len(lengths))
    index.append(number % streams, number % 2, 10_000 * number, lengths)


def set_open(index, length):
    one = np.array([1])
    index.set_open([(0, one, one * 5_000_000, one * length)])


def drawn(sampler, items, n, rng, at_once=64):
    """The numbers of n draws of a sampler that never comes to an end."""
    return np.concatenate([sampler.draw(items, at_once, rng).numbers for _ in range(n // at_once)])


def one_pass(sampler, items, n=17, rng=None):
    """The numbers of a pass from its beginning."""
    rng = rng or np.random.default_rng(0)
    sampler.begin()
    numbers = []
    while sampler.left(items) and len(numbers) < 10**7:
        left = sampler.left(items)
        numbers += sampler.draw(items, n, rng).numbers.tolist()
        if left <= n:
            break
    return numbers


def kept(state):
    """A state as it comes back from a file, by torch and, where it has no arrays, by JSON."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == state
    return json.loads(json.dumps(state))


def check_draw(sampler, items, n, rng):
    draw = sampler.draw(items, n, rng)
    assert draw.numbers.dtype == np.int64
    assert len(draw.numbers) == len(draw.probabilities) > 0
    assert ((draw.numbers >= 0) & (draw.numbers < len(items))).all()
    assert ((draw.probabilities > 0) & (draw.probabilities <= 1)).all()
    assert draw.weights is None or draw.weights.dtype == np.float32
    if "extent" not in sampler.state_dict():  # or a pass may be over fewer items than there are now
        np.testing.assert_allclose(sampler.probability(items, draw.numbers), draw.probabilities)
    sampler.check()


def check_sampler(make, rng):
    """The contract: on items of every kind, while they grow, and after a restart at any time."""
    for spacing in (Spacing(), Spacing(3, 4, 1)):
        items, sampler = index_of([9, 40, 7, 25], streams=2, spacing=spacing), make()
        for turn in range(12):
            check_draw(sampler, items, int(rng.integers(1, 40)), rng)
            again, both = make(), [np.random.default_rng(turn) for _ in range(2)]
            again.load_state_dict(kept(sampler.state_dict()))
            for _ in range(3):
                draws = [each.draw(items, 7, one) for each, one in zip((sampler, again), both, strict=True)]
                assert draws[0].numbers.tolist() == draws[1].numbers.tolist()
                assert draws[0].probabilities.tolist() == draws[1].probabilities.tolist()
            sampler = (sampler, again)[turn % 2]
            if turn % 3 == 1:
                append(items, rng.integers(5, 30, 5), streams=2)
            set_open(items, turn + 5)
        total = sampler.probability(items, np.arange(len(items))).sum()
        assert total == pytest.approx(1)
    with pytest.raises(UsageError, match="expected a state of"):
        make().load_state_dict({"other": 1})
    with pytest.raises(UsageError, match="expected a state of"):
        make().load_state_dict(None)


@pytest.mark.parametrize("kind", EPOCHS)
def test_what_has_an_order_gives_in_one_draw_what_it_gives_in_several(kind):
    items, rng = index_of([40, 30, 29], streams=2), np.random.default_rng(0)
    once, often = SAMPLERS[kind](), SAMPLERS[kind]()
    assert once.has_order
    for counts in ([1, 20, 19], [40], [9, 10]):  # 99 items: a pass
        drawn = np.concatenate([often.draw(items, n, rng).numbers for n in counts])
        assert once.draw(items, sum(counts), rng).numbers.tolist() == drawn.tolist()


@pytest.mark.parametrize("kind", [kind for kind in SAMPLERS if kind not in EPOCHS])
def test_what_depends_on_random_numbers_has_no_order(kind):
    assert not SAMPLERS[kind]().has_order


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_sampler_keeps_the_contract(make):
    check_sampler(make, np.random.default_rng(0))


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_draws_follow_their_probabilities_before_and_after_growth(make):
    rng = np.random.default_rng(1)
    items = index_of([30, 20, 25, 45], streams=2)
    for _ in range(2):
        sampler = make()
        counts = np.bincount(drawn(sampler, items, 96_000, rng), minlength=len(items))
        expected = sampler.probability(items, np.arange(len(items))) * counts.sum()
        some = expected > 0
        assert counts[~some].sum() == 0
        assert chi_square(counts[some], expected[some]) < 5  # and passes are more even than chance
        append(items, [14, 9, 30], streams=2)
        set_open(items, 11)


@pytest.mark.parametrize("kind", EPOCHS)
@pytest.mark.parametrize(
    "length", [1, 2, RUN - 1, RUN, RUN + 1, POOL - 1, POOL, POOL + 1, 500, 65_535, 65_536, 65_537, 10**6]
)
def test_pass_visits_each_item_once(kind, length):
    items, sampler = index_of([length]), SAMPLERS[kind]()
    if kind == "shuffled" and length > 1000:
        sampler = Shuffled(seed=5)
    for _ in range(2):
        numbers = one_pass(sampler, items, n=min(length, 8191) if length > 1000 else 3)
        assert np.array_equal(np.sort(numbers), np.arange(length))


@pytest.mark.parametrize("kind", EPOCHS)
def test_pass_visits_what_was_there_when_it_began(kind):
    rng = np.random.default_rng(3)
    items, sampler = index_of([20, 30, 9], streams=2), SAMPLERS[kind]()
    set_open(items, 5)
    ids = items.ids(items.locate(np.arange(len(items)))).tolist()
    found, left = [], len(items)
    while left:
        draw = sampler.draw(items, 7, rng)
        assert (draw.probabilities == 1 / 64).all()
        found += items.ids(items.locate(draw.numbers)).tolist()
        left -= len(draw.numbers)
        append(items, rng.integers(1, 9, 3), streams=2)
        set_open(items, 5 + len(found))
    assert sorted(found) == sorted(ids)
    assert sampler.left(items) == len(items) > 64


@pytest.mark.parametrize("kind", EPOCHS)
def test_passes_have_orders_of_their_own_from_the_seed(kind):
    items = index_of([100, 30])
    first, second = SAMPLERS[kind](), SAMPLERS[kind]()
    passes = [one_pass(first, items) for _ in range(3)]
    assert passes == [one_pass(second, items) for _ in range(3)]
    assert len({tuple(each) for each in passes}) == (1 if kind == "in order" else 3)


@pytest.mark.parametrize("make", [Uniform, Shuffled])
def test_order_without_a_seed_is_new(make):
    arguments = {"replace": False} if make is Uniform else {}
    items = index_of([200])
    assert one_pass(make(**arguments), items) != one_pass(make(**arguments), items)


@pytest.mark.parametrize("kind", ["epoch", "shuffled"])
def test_first_item_of_a_pass_is_any(kind):
    items, sampler = index_of([40]), SAMPLERS[kind]()
    rng = np.random.default_rng(0)
    counts = np.zeros(40)
    for _ in range(4000):
        sampler.begin()
        counts[sampler.draw(items, 1, rng).numbers] += 1
    assert chi_square(counts, np.full(40, 100)) < 5


@pytest.mark.parametrize("kind", EPOCHS)
def test_pass_goes_on_after_a_restart_although_the_store_grew(kind):
    rng = np.random.default_rng(0)
    items, sampler = index_of([20, 30, 9], streams=2), SAMPLERS[kind]()
    set_open(items, 5)
    sampler.draw(items, 11, rng)
    state = kept(sampler.state_dict())
    expected = [items.ids(items.locate(sampler.draw(items, 9, rng).numbers)).tolist() for _ in range(3)]
    append(items, [3, 4, 5], streams=2)
    set_open(items, 50)
    again = SAMPLERS[kind]()
    again.load_state_dict(state)
    assert again.left(items) == 64 - 11
    found = [items.ids(items.locate(again.draw(items, 9, rng).numbers)).tolist() for _ in range(3)]
    assert found == expected


def test_sampler_tells_an_index_from_another_of_as_many_changes():
    sampler, rng = InOrder(), np.random.default_rng(0)
    first, second = index_of([50, 30]), index_of([7, 30, 43, 10])
    sampler.draw(first, 5, rng)
    with pytest.raises(UsageError, match=r"same store as before, found .* gone"):
        sampler.draw(second, 60, rng)


def test_state_of_a_pass_is_refused_where_its_episodes_are_missing():
    sampler, rng = InOrder(), np.random.default_rng(0)
    sampler.draw(index_of([5, 5, 5]), 2, rng)
    again = InOrder()
    again.load_state_dict(sampler.state_dict())
    with pytest.raises(UsageError, match="expected 3 closed episodes in stream 0, found 2"):
        again.draw(index_of([5, 5]), 2, rng)


# ---- Recent


def ages_drawn(sampler, items, n=100_000):
    return len(items) - 1 - drawn(sampler, items, n, np.random.default_rng(2), at_once=1000)


@pytest.mark.parametrize("half_life", [0.5, 3, 40, 1e9])
def test_probability_halves_with_every_half_life(half_life):
    items = index_of([33, 67])
    counts = np.bincount(ages_drawn(Recent(half_life=half_life), items), minlength=100)
    expected = 0.5 ** (np.arange(100) / half_life)
    expected *= 100_000 / expected.sum()
    some = expected > 5
    assert chi_square(counts[some], expected[some]) < 5
    assert counts[~some].sum() <= 5 + 5 * expected[~some].sum()


@pytest.mark.parametrize(("fraction", "newest"), [(0.2, 20), (0.001, 1), (1, 100), (0.345, 34)])
def test_only_the_newest_fraction_is_drawn(fraction, newest):
    items = index_of([33, 67])
    counts = np.bincount(ages_drawn(Recent(fraction=fraction), items), minlength=100)
    assert counts[newest:].sum() == 0
    assert newest == 1 or chi_square(counts[:newest], np.full(newest, 100_000 / newest)) < 5


def test_streams_are_drawn_by_their_lengths_and_each_by_age():
    items = index_of([40, 10, 40, 10, 40, 10], streams=2)
    sampler = Recent(fraction=0.5)
    numbers = drawn(sampler, items, 50_000, np.random.default_rng(4), at_once=1000)
    places = items.locate(numbers)
    counts = np.bincount(places.stream)
    assert chi_square(counts, [40_000, 10_000]) < 5
    newest = {(0, 2), (0, 4), (1, 3), (1, 5)}  # 60 of 120 items, 15 of 30
    assert {
        (s, f // 10_000) for s, f in zip(places.stream.tolist(), places.first.tolist(), strict=True)
    } == newest


# ---- in stores


def actions(store, sampler, n, rng=None, window=None):
    rng = rng or np.random.default_rng(0)
    return np.concatenate([store.sample(250, window, rng, sampler=sampler).action for _ in range(n // 250)])


@pytest.mark.parametrize("num_envs", [1, 3])
def test_uncommitted_rows_are_drawn_in_the_process_that_writes(num_envs, tmp_path):
    with ReplayStore.create(tmp_path / "store", schema(), num_envs) as store:
        actors = Actors(store, num_envs)
        for _ in range(4):
            actors.step(20)
            counts = np.bincount(actions(store, Uniform(), 20_000), minlength=actors.count)
            assert chi_square(counts, np.full(actors.count, 20_000 / actors.count)) < 5
            for kind in EPOCHS:
                sampler, found = SAMPLERS[kind](), []
                while len(found) < actors.count:
                    found += store.sample(33, sampler=sampler).action.tolist()
                assert sorted(found) == list(range(actors.count))


def test_pass_over_a_live_store_visits_each_transition_once(tmp_path):
    with ReplayStore.create(tmp_path / "store", schema(), 3) as store:
        actors = Actors(store, 3)
        actors.step(50)
        for kind in EPOCHS:
            sampler, found, begun = SAMPLERS[kind](), [], actors.count
            while len(found) < begun:
                found += store.sample(20, sampler=sampler).action.tolist()
                actors.step(2)
            assert sorted(found) == list(range(begun))
            store.flush()


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_draws_are_the_same_after_reopening(make, tmp_path):
    count = add_stream(tmp_path / "store", 60, num_envs=2)
    count = add_stream(tmp_path / "store", 80, num_envs=1, first=count, seed=1)
    found = []
    for _ in range(2):
        with ReplayStore.open(tmp_path / "store") as store:
            found.append(actions(store, make(), 1000).tolist())
    assert found[0] == found[1]
    assert set(found[0]) <= set(range(count))


def test_pass_goes_on_in_a_reader_that_refreshes(tmp_path):
    with ReplayStore.create(tmp_path / "store", schema(), 2) as store:
        actors = Actors(store, 2)
        actors.step(40)
        store.flush()
        with ReplayStore.open(tmp_path / "store") as reader:
            for kind in EPOCHS:
                sampler, found, begun = SAMPLERS[kind](), [], len(reader)
                while len(found) < begun:
                    found += reader.sample(9, sampler=sampler).action.tolist()
                    actors.step(3)
                    store.flush()
                    reader.refresh()
                assert sorted(found) == list(range(begun))


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_only_chosen_episodes_are_drawn(make, tmp_path):
    first = add_stream(tmp_path / "store", 60, num_envs=2, level=1)
    last = add_stream(tmp_path / "store", 60, num_envs=1, first=first, level=2)
    with ReplayStore.open(tmp_path / "store") as store:
        chosen = store.where(pc.field("level") == 2)
        found = actions(chosen, make(), 5000)
        assert found.min() >= first
        assert found.max() == last - 1
        assert not isinstance(make(), Uniform) or set(found.tolist()) == set(range(first, last))


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_windows_of_many_steps_are_drawn(make, tmp_path):
    add_stream(tmp_path / "store", 200, num_envs=2)
    with ReplayStore.open(tmp_path / "store") as store:
        batch = store.sample(64, Transition(n_step=3, frame_stack=2), sampler=make())
        assert len(batch.ids) == 64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(replace=1), "replace: expected a bool, got 1"),
        (lambda: Uniform(replace=False, seed=-1), "seed: expected None or an int from 0"),
        (lambda: Uniform(replace=False, seed=1.0), "seed"),
        (lambda: Shuffled(pool=100), "pool: expected a multiple of run=32, got 100"),
        (lambda: Shuffled(run=0), "run: expected an int from 1, got 0"),
        (lambda: Shuffled(pool=True), "pool"),
        (lambda: Recent(), "expected fraction or half_life"),
        (lambda: Recent(fraction=0.1, half_life=3), "expected fraction or half_life"),
        (lambda: Recent(fraction=0), "fraction: expected a number above 0 up to 1, got 0"),
        (lambda: Recent(fraction=1.1), "fraction"),
        (lambda: Recent(half_life=-1), "half_life: expected a number above 0, got -1"),
        (lambda: Recent(half_life=float("nan")), "half_life"),
        (lambda: Recent(half_life="3"), "half_life"),
    ],
)
def test_wrong_use_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
