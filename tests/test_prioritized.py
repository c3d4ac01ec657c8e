"""Samplers that keep a number for every item: what is drawn, how often, and what is remembered."""

import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from replaystore import Field, ReplayStore, Schema, Transition
from replaystore.dataset import ReplayDataset
from replaystore.errors import CorruptionError, UsageError
from replaystore.files import write_atomic
from replaystore.index import EpisodeIndex, Spacing
from replaystore.leaves import PAGE
from replaystore.prioritized import Once, Prioritized
from replaystore.sampler_file import load_sampler, save_sampler
from replaystore.samplers import Uniform

SCHEMA = Schema(
    [
        Field("observation", (), "float32"),
        Field("action", (), "int64"),
        Field("reward", (), "float64"),
        Field("terminated", (), "bool"),
        Field("truncated", (), "bool"),
    ]
)
WINDOW = Transition()


def add_episode(store, length):
    flags = np.zeros(length, bool)
    observations = np.arange(length + 1, dtype=np.float32)
    actions = np.arange(length)
    rewards = np.ones(length)
    store.add_episode(
        observation=observations, action=actions, reward=rewards, terminated=flags, truncated=flags
    )


def step_all(store, num_envs, steps):
    """Steps of a vector of environments, of which none ends."""
    zeros = np.zeros(num_envs, bool)
    for _ in range(steps):
        values = np.zeros(num_envs, np.int64), np.zeros(num_envs, np.float32), np.zeros(num_envs)
        store.step(*values, zeros, zeros)


def make_store(path, lengths=(30, 1, 25), num_envs=1):
    store = ReplayStore.create(path, SCHEMA, num_envs=num_envs)
    for length in lengths:
        add_episode(store, length)
    return store


def all_ids(source, window=WINDOW):
    return source.read(np.arange(source.count(window)), window).ids


def index_of(*lengths, spacing=None):
    """An index of one stream of one environment with closed episodes of these lengths."""
    index = EpisodeIndex() if spacing is None else EpisodeIndex(spacing)
    index.set_width(0, 1)
    lengths = np.array(lengths)
    first = np.cumsum(lengths + 1) - lengths - 1
    index.append(0, np.zeros(len(lengths), np.int64), first, lengths)
    return index


def expected_probabilities(priorities, alpha=0.6, epsilon=1e-6):
    values = (np.asarray(priorities, float) + epsilon) ** alpha
    return values / values.sum()


def assert_drawn_as(counts, probabilities):
    """A chi-square test at five standard deviations; draws by strata lie closer still."""
    expected = counts.sum() * probabilities
    assert expected.min() > 5, "too few draws for the test"
    freedom = len(expected) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < freedom + 5 * np.sqrt(2 * freedom), statistic


def draw_counts(source, sampler, ids, *, seed=0, draws=400, n=128, window=WINDOW):
    """How often each id was drawn; no other is drawn, and ids come with their own probabilities."""
    rng = np.random.default_rng(seed)
    order = np.argsort(ids)
    counts = np.zeros(len(ids), np.int64)
    for _ in range(draws):
        drawn = source.sample(n, window, rng, sampler=sampler).ids
        place = np.minimum(ids[order].searchsorted(drawn), len(ids) - 1)
        assert np.array_equal(ids[order][place], drawn), "an id that is no item"
        counts += np.bincount(order[place], minlength=len(ids))
    sampler.check()
    return counts


def priorities_for(ids, seed=0):
    return np.random.default_rng(seed).uniform(0.05, 3, len(ids))


def report(source, sampler, *, seed=0, window=WINDOW):
    """Draw once, and report priorities of all items; ids and what was reported."""
    source.sample(1, window, np.random.default_rng(9), sampler=sampler)
    ids = all_ids(source, window)
    priorities = priorities_for(ids, seed)
    sampler.update_priorities(ids, priorities)
    return ids, priorities


# ---- distributions


def test_items_are_drawn_by_their_priorities(tmp_path):
    with make_store(tmp_path / "s") as store:
        sampler = Prioritized()
        ids, priorities = report(store, sampler)
        counts = draw_counts(store, sampler, ids)
        assert_drawn_as(counts, expected_probabilities(priorities))


def test_a_draw_has_one_item_of_each_nth_of_the_sum():
    items, sampler, rng = index_of(40), Prioritized(alpha=1), np.random.default_rng(0)
    sampler.draw(items, 1, rng)
    sampler.update_priorities(np.arange(40), np.where(np.arange(40) == 7, 39.0, 1.0))
    for _ in range(20):
        numbers = sampler.draw(items, 78, rng).numbers
        assert (np.diff(numbers) >= 0).all()
        assert 38 <= np.count_nonzero(numbers == 7) <= 40, "half of the sum, but for the ends"


def test_probabilities_and_weights_are_those_of_the_formulas():
    items, sampler, rng = index_of(50), Prioritized(beta=0.5, beta_end=0.5), np.random.default_rng(0)
    sampler.draw(items, 1, rng)
    priorities = priorities_for(np.arange(50))
    sampler.update_priorities(np.arange(50), priorities)
    draw = sampler.draw(items, 20, rng)
    chances = expected_probabilities(priorities)[draw.numbers]
    np.testing.assert_allclose(draw.probabilities, chances, rtol=1e-12)
    weights = (50 * chances) ** -0.5
    np.testing.assert_allclose(draw.weights, weights / weights.max(), rtol=1e-6)
    assert draw.weights.dtype == np.float32
    everything = sampler.probability(items, np.arange(50))
    np.testing.assert_allclose(everything, expected_probabilities(priorities), rtol=1e-12)


def test_alpha_0_draws_uniformly_with_weights_of_1(tmp_path):
    with make_store(tmp_path / "s") as store:
        sampler = Prioritized(alpha=0)
        ids, _ = report(store, sampler)
        assert_drawn_as(draw_counts(store, sampler, ids), np.full(len(ids), 1 / len(ids)))
        assert (store.sample(9, WINDOW, sampler=sampler).weights == 1).all()


@pytest.mark.usefixtures("_no_syncs")
def test_what_is_appended_and_not_committed_is_drawn_too(tmp_path):
    with make_store(tmp_path / "s", lengths=()) as store:
        sampler, rng = Prioritized(), np.random.default_rng(0)
        store.reset(np.float32(0))
        for count in range(1, 60):
            store.step(0, np.float32(0), 0.0, count % 20 == 0, False)
            if count % 20 == 0:
                store.reset(np.float32(0))
            store.sample(3, WINDOW, rng, sampler=sampler)
            sampler.check()
        ids, priorities = report(store, sampler)
        assert len(ids) == 59
        store.step(0, np.float32(0), 0.0, False, False)
        ids, priorities = np.append(ids, all_ids(store)[-1]), np.append(priorities, priorities.max())
        counts = draw_counts(store, sampler, ids)
        assert_drawn_as(counts, expected_probabilities(priorities))


@pytest.mark.usefixtures("_no_syncs")
def test_streams_and_environments_grow_each_for_itself(tmp_path):
    path = tmp_path / "s"
    with make_store(path, num_envs=3, lengths=(7, 9, 4)) as store, ReplayStore.open(path, "a") as other:
        other.refresh()
        store.reset(np.zeros(3, np.float32))
        sampler, rng = Prioritized(), np.random.default_rng(1)
        known = {}
        for round_ in range(6):
            step_all(store, 3, 4)
            if round_ == 3:
                other.reset(np.zeros(3, np.float32))
            if round_ >= 3:
                step_all(other, 3, 5)
                other.flush()
                store.refresh()
            if round_ == 4:
                store.reset(np.zeros(3, np.float32), mask=np.array([True, False, True]))
            store.sample(4, WINDOW, rng, sampler=sampler)
            sampler.check()
            ids = all_ids(store)
            for each in ids.tolist():
                known.setdefault(each, sampler.largest_priority)
            reported = rng.choice(ids, 10, replace=False)
            known.update(zip(reported.tolist(), [2.5] * 10, strict=True))
            sampler.update_priorities(reported, np.full(10, 2.5))
        assert len({each >> 40 for each in known}) == 2
        assert sorted(known) == sorted(all_ids(store).tolist())
        ids = np.array(list(known))
        found = sampler.probability(store.items(WINDOW), store.items(WINDOW).numbers(ids))
        raised = [value if value == 1 else value + (1e-6 if value == 2.5 else 0) for value in known.values()]
        np.testing.assert_allclose(found, expected_probabilities(raised, epsilon=0), rtol=1e-9)
        assert_drawn_as(draw_counts(store, sampler, ids), found)


@pytest.mark.usefixtures("_no_syncs")
def test_taking_in_step_by_step_equals_taking_in_at_once(tmp_path):
    with make_store(tmp_path / "s", num_envs=4, lengths=()) as store:
        rng = np.random.default_rng(3)
        store.reset(np.zeros(4, np.float32))
        samplers = {spacing: Prioritized() for spacing in (Spacing(), Spacing(3, 2, 1), Spacing(1, 5, 0))}
        views = {spacing: _Spaced(spacing) for spacing in samplers}
        for _ in range(60):
            step_all(store, 4, int(rng.integers(1, 4)))
            mask = rng.random(4) < 0.15
            if mask.any():
                store.reset(np.zeros(4, np.float32), mask=mask)
            for spacing, sampler in samplers.items():
                items = store.items(views[spacing])
                if len(items) and rng.random() < 0.7:
                    sampler.draw(items, 2, rng)
        for spacing, sampler in samplers.items():
            items, fresh = store.items(views[spacing]), Prioritized()
            sampler.draw(items, 1, rng)
            fresh.draw(items, 1, rng)
            ids = items.ids(items.locate(np.arange(len(items))))
            assert sampler._leaves.tree.total == len(items)
            assert np.array_equal(np.sort(_item_ids(sampler)), np.sort(ids))
            assert np.array_equal(np.sort(_item_ids(fresh)), np.sort(ids))


class _Spaced(Transition):
    """Transitions of which only some begin an item."""

    def __init__(self, spacing):
        super().__init__()
        object.__setattr__(self, "_spacing", spacing)

    @property
    def spacing(self):
        return self._spacing


def _item_ids(sampler):
    leaves = np.flatnonzero(sampler._leaves._is_item)
    return sampler._leaves._keys[leaves // PAGE] * PAGE + leaves % PAGE


@pytest.mark.parametrize("spacing", [Spacing(5, 3, 2), Spacing(1 << 40, 1, 0)])
def test_only_transitions_that_begin_an_item_are_drawn(tmp_path, spacing):
    with make_store(tmp_path / "s", lengths=(30, 1, 25, 40)) as store:
        window, sampler = _Spaced(spacing), Prioritized()
        ids, priorities = report(store, sampler, window=window)
        assert len(ids) == store.count(window) < len(store)
        counts = draw_counts(store, sampler, ids, window=window)
        assert_drawn_as(counts, expected_probabilities(priorities))
        with pytest.raises(UsageError, match="expected ids of items"):
            sampler.update_priorities(np.array([int(ids[0]) + 1]), np.array([1.0]))


def test_a_part_of_a_store_is_drawn_by_the_same_priorities(tmp_path):
    with make_store(tmp_path / "s", lengths=(30, 5, 25)) as store:
        sampler = Prioritized()
        ids, priorities = report(store, sampler)
        part = store.where(pc.field("length") > 10)
        there = np.isin(ids, all_ids(part))
        assert there.sum() == 55
        counts = draw_counts(part, sampler, ids[there])
        assert_drawn_as(counts, expected_probabilities(priorities[there]))
        store.sample(1, WINDOW, sampler=sampler)  # the five are new again
        found = sampler.probability(store.items(WINDOW), np.arange(60))
        raised = np.where(there, priorities + 1e-6, sampler.largest_priority)
        np.testing.assert_allclose(found, expected_probabilities(raised, epsilon=0))


def test_it_goes_on_after_the_store_was_reopened_and_has_grown(tmp_path):
    path, sampler = tmp_path / "s", Prioritized()
    with make_store(path) as store:
        ids, priorities = report(store, sampler)
    with ReplayStore.open(path, "a") as store:
        add_episode(store, 12)
        everything = all_ids(store)
        assert np.array_equal(everything[: len(ids)], ids)
        raised = np.append(priorities + 1e-6, [sampler.largest_priority] * 12)
        counts = draw_counts(store, sampler, everything)
        assert_drawn_as(counts, expected_probabilities(raised, epsilon=0))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_draws_by_priorities_that_change_in_between(tmp_path, num_workers):
    path, sampler = tmp_path / "s", Prioritized()
    with make_store(path, lengths=(30, 25)):
        pass
    dataset = ReplayDataset(path)
    workers = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    loader = dataset.loader(5, sampler=sampler, seed=4, **workers)
    for _ in loader:
        pass
    ids = all_ids(dataset.selection)
    counts = {}
    for priorities in (priorities_for(ids, 1), np.where(ids == 3, 1.0, 0.0)):
        sampler.update_priorities(torch.from_numpy(ids), torch.from_numpy(priorities))
        counts = np.zeros(len(ids), np.int64)
        for _ in range(60):
            for batch in loader:
                counts += (batch["ids"].numpy()[:, None] == ids).sum(axis=0)
                assert batch["weights"].max() == 1
        expected = expected_probabilities(priorities)
        assert counts.sum() == 60 * len(ids)
        if priorities.min() > 0:
            assert_drawn_as(counts, expected)
    assert counts[ids == 3][0] > 0.95 * counts.sum()
    dataset.close()


def test_threads_may_draw_and_report_at_once(tmp_path):
    sampler, items, failed = Prioritized(), index_of(*[50] * 40), []

    def work(seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(150):
                draw = sampler.draw(items, 32, rng)
                sampler.update_priorities(items.ids(items.locate(draw.numbers)), rng.random(32))
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sampler.check()
    assert not failed
    assert sampler.state_dict()["draws"] == 600


# ---- priorities


def test_new_items_get_the_largest_priority_that_ever_was():
    items, sampler, rng = index_of(10), Prioritized(alpha=1, epsilon=0.5), np.random.default_rng(0)
    sampler.draw(items, 1, rng)
    sampler.update_priorities(np.arange(10), np.full(10, 0.25))
    assert sampler.largest_priority == 1, "it begins at 1"
    sampler.update_priorities(np.array([3]), np.array([6.5]))
    sampler.update_priorities(np.array([3]), np.array([0.0]))
    assert sampler.largest_priority == 7
    items.set_open([(0, np.array([0]), np.array([11]), np.array([2]))])
    values = sampler.probability(items, np.arange(12))
    np.testing.assert_allclose(values / values[3], [1.5] * 3 + [1] + [1.5] * 6 + [14] * 2)


def test_an_open_episode_keeps_its_priorities_while_it_grows_and_when_it_closes():
    items, sampler = index_of(3), Prioritized(alpha=1)
    one = np.array([0])
    for length in range(1, 6):
        items.set_open([(0, one, np.array([4]), np.array([length]))])
        sampler.draw(items, 1, np.random.default_rng(0))
        sampler.update_priorities(np.array([3 + length]), np.array([length / 10]))
    items.append(0, one, np.array([4]), np.array([6]))
    items.set_open([(0, one, np.array([11]), np.array([8]))])  # it has more than the last one had
    values = sampler.probability(items, np.arange(17))
    np.testing.assert_allclose(values / values[0], [1] * 3 + [0.1, 0.2, 0.3, 0.4, 0.5] + [1] * 9, rtol=1e-4)
    sampler.check()


def test_of_an_id_reported_twice_the_last_priority_counts():
    items, sampler = index_of(2), Prioritized(alpha=1, epsilon=1e-9)
    sampler.draw(items, 1, np.random.default_rng(0))
    sampler.update_priorities(np.array([0, 1, 0]), np.array([9.0, 1.0, 3.0]))
    np.testing.assert_allclose(sampler.probability(items, np.arange(2)), [0.75, 0.25])


def test_beta_rises_from_draw_to_draw_and_then_stays():
    items, sampler = index_of(5), Prioritized(beta=0.2, beta_end=0.7, beta_draws=5)
    rng = np.random.default_rng(0)
    betas = []
    for _ in range(8):
        betas.append(sampler.beta)
        sampler.draw(items, 3, rng)
    np.testing.assert_allclose(betas, [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.7, 0.7])


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("ids", "priorities", "message"),
    [
        ([0, 1], [1.0, NAN], "numbers from 0 to 1e100, got nan at 1"),
        ([0, 1], [INF, 1.0], "numbers from 0 to 1e100, got inf at 0"),
        ([0, 1], [1.0, -0.5], "numbers from 0 to 1e100, got -0.5 at 1"),
        ([0, 1], [1.0, 1e101], "numbers from 0 to 1e100"),
        ([0, 1], [1.0], "expected 2 numbers, one for each id"),
        ([0, 1], [[1.0], [1.0]], "expected 2 numbers, one for each id"),
        ([0, 1], ["a", "b"], "expected 2 numbers, one for each id"),
        ([0, 1], [True, False], "expected 2 numbers, one for each id, got bool"),
        ([0.0, 1.0], [1.0, 1.0], "expected a list of integers, got float64"),
        ([[0, 1]], [[1.0, 1.0]], "expected a list of integers"),
        (0, 1.0, "expected a list of integers"),
        ([0, 30], [1.0, 1.0], "expected ids of items that there were at the last draw, got 30"),
        ([0, 31], [1.0, 1.0], "got 31"),
        ([0, 5 << 40], [1.0, 1.0], f"got {5 << 40}"),
        ([0, -1], [1.0, 1.0], "got -1"),
        ([0, -1 << 40], [1.0, 1.0], f"got {-1 << 40}"),
    ],
)
def test_wrong_priorities_are_refused_and_change_nothing(ids, priorities, message):
    items, sampler = index_of(30), Prioritized()
    sampler.draw(items, 3, np.random.default_rng(0))
    before = sampler.state_dict()
    with pytest.raises(UsageError, match=message):
        sampler.update_priorities(ids, priorities)
    assert_same_state(sampler.state_dict(), before)


def test_priorities_before_the_first_draw_are_refused():
    with pytest.raises(UsageError, match="expected ids of items that there were at the last draw, got 0"):
        Prioritized().update_priorities([0], [1.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.1}, "alpha: expected a number from 0 to 1, got -0.1"),
        ({"alpha": NAN}, "alpha: expected a number from 0 to 1, got nan"),
        ({"beta": 1.1}, "beta: expected a number from 0 to 1"),
        ({"beta_end": "1"}, "beta_end: expected a number from 0 to 1, got '1'"),
        ({"beta_draws": 0}, "beta_draws: expected an int from 1, got 0"),
        ({"beta_draws": 1.5}, "beta_draws: expected an int from 1, got 1.5"),
        ({"epsilon": 0}, "epsilon: expected a number from 1e-100 to 1, got 0"),
        ({"epsilon": True}, "epsilon: expected a number from 1e-100 to 1, got True"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        Prioritized(**arguments)


# ---- eviction


def test_evicted_items_are_not_drawn_and_reports_of_them_are_passed_over():
    items, sampler, rng = index_of(*[99] * 60), Prioritized(), np.random.default_rng(0)
    sampler.draw(items, 1, rng)
    pages = len(sampler.state_dict()["pages"])
    sampler.evict(0, 2500)
    sampler.check()
    draw = sampler.draw(items, 2000, rng)
    assert items.ids(items.locate(draw.numbers)).min() >= 2500
    sampler.update_priorities([10, 2499, 2500], [5.0, 5.0, 5.0])
    assert sampler.largest_priority == pytest.approx(5)
    assert sampler.probability(items, items.numbers(np.array([2501])))[0] == pytest.approx(
        1 / (items.numbers(np.array([5998]))[0] - items.numbers(np.array([2500]))[0] + 5**0.6), rel=1e-3
    )
    items.append(0, np.array([0]), np.array([7000]), np.array([1500]))
    sampler.draw(items, 1, rng)
    sampler.check()
    assert len(sampler.state_dict()["pages"]) <= pages + 1, "pages of what was evicted are used again"
    restored = Prioritized()
    restored.load_state_dict(sampler.state_dict())
    draw = restored.draw(items, 2000, rng)
    assert items.ids(items.locate(draw.numbers)).min() >= 2500
    restored.update_priorities([10], [1.0])
    sampler.evict(0, 1 << 39)
    with pytest.raises(UsageError, match="all were evicted"):
        sampler.draw(items, 1, rng)


# ---- what is remembered


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name])


def assert_same_draw(one, other):
    for first, second in zip(one, other, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.usefixtures("_no_syncs")
@pytest.mark.parametrize("kind", [Prioritized, lambda: Once(draws=3)], ids=["Prioritized", "Once"])
def test_draws_after_a_restore_equal_those_without(tmp_path, kind):
    path, original, restored = tmp_path / "s", kind(), kind()
    with make_store(path, num_envs=2, lengths=(40, 3)) as store:
        store.reset(np.zeros(2, np.float32))
        step_all(store, 2, 700)
        rng = np.random.default_rng(0)
        for _ in range(20):
            numbers = original.draw(store.items(WINDOW), 16, rng).numbers
            if isinstance(original, Prioritized):
                ids = store.read(numbers).ids
                original.update_priorities(ids, rng.random(16))
        store.flush()
        save_sampler(path, "mine", original)
        load_sampler(path, "mine", restored)
        assert_same_state(original.state_dict(), restored.state_dict())
        again = np.random.default_rng(0)
        again.bit_generator.state = rng.bit_generator.state
        for _ in range(20):
            step_all(store, 2, 90)
            draws = [s.draw(store.items(WINDOW), 16, r) for s, r in ((original, rng), (restored, again))]
            assert_same_draw(*draws)
            restored.check()
        assert_same_state(original.state_dict(), restored.state_dict())


def test_items_that_a_crash_took_are_forgotten_and_drawn_as_new_when_they_come_again(tmp_path):
    longer, shorter, rng = index_of(10, 20), index_of(10, 5), np.random.default_rng(0)
    original, restored = Prioritized(), Prioritized()
    original.draw(longer, 1, rng)
    original.update_priorities([0, 12], [0.5, 8.0])
    restored.load_state_dict(original.state_dict())
    assert restored.draw(shorter, 500, rng).numbers.max() == 14
    np.testing.assert_allclose(restored.probability(shorter, np.arange(15)).sum(), 1)
    assert set(_item_ids(restored)) == {*range(10), *range(11, 16)}
    restored.draw(longer, 1, rng)
    values = restored.probability(longer, np.arange(30))
    np.testing.assert_allclose(values[-15:], values[11], rtol=1e-9)
    restored.check()


def test_a_state_of_other_arguments_or_of_another_sampler_is_refused():
    sampler = Prioritized()
    sampler.draw(index_of(5), 2, np.random.default_rng(0))
    state = sampler.state_dict()
    wrong = {
        "alpha": (Prioritized(alpha=0.5), state, "alpha: expected a state of a sampler with 0.5, got 0.6"),
        "kind": (Once(), state, "Once: expected a state of"),
        "none": (Prioritized(), None, "Prioritized: expected a state of"),
        "pages": (Prioritized(), state | {"pages": np.zeros(2, np.int64)}, "values: expected float64"),
        "keys": (Prioritized(), state | {"pages": np.array([-7])}, "pages: expected each once, all from 0"),
        "dtype": (
            Prioritized(),
            state | {"values": state["values"].astype("f4")},
            "values: expected float64",
        ),
        "value": (Prioritized(), state | {"values": -state["values"]}, "expected finite numbers from 0"),
        "draws": (Prioritized(), state | {"draws": -1}, "draws: expected an int from 0"),
        "largest": (Prioritized(), state | {"largest": NAN}, "largest: expected a number from 1"),
    }
    for other, changed, message in wrong.values():
        before = other.state_dict()
        with pytest.raises(UsageError, match=message):
            other.load_state_dict(changed)
        assert_same_state(other.state_dict(), before)
    once = Once(draws=2)
    once.draw(index_of(5), 1, np.random.default_rng(0))
    for other, message in ((Once(draws=3), "with 3, got 2"), (Once(draws=1), "with 1, got 2")):
        with pytest.raises(UsageError, match=message):
            other.load_state_dict(once.state_dict())
    with pytest.raises(UsageError, match="whole numbers up to 2"):
        once.load_state_dict(once.state_dict() | {"values": once.state_dict()["values"] * 1.25})


def test_a_loaders_state_holds_the_sampler(tmp_path):
    path = tmp_path / "s"
    with make_store(path, lengths=(30, 25)):
        pass
    batches = {}
    state = None
    for name in ("whole", "resumed"):
        dataset, sampler = ReplayDataset(path), Prioritized()
        loader = dataset.loader(6, sampler=sampler, seed=1)
        if state is not None:
            loader.load_state_dict(state)
        batches[name] = []
        for number, batch in enumerate(loader):
            batches[name].append(batch["ids"].tolist())
            sampler.update_priorities(batch["ids"], torch.cos(batch["ids"].double()) + 1)
            if name == "whole" and number == 3:
                state = loader.state_dict()
        dataset.close()
    assert batches["resumed"] == batches["whole"][4:]


# ---- files


def test_a_state_is_kept_with_the_store_and_a_kill_leaves_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / "s"
    with make_store(path):
        pass
    with ReplayStore.open(path) as store:
        sampler = Prioritized()
        ids, _ = report(store, sampler)
        save_sampler(path, "mine", sampler)
        kept = sampler.state_dict()
        sampler.update_priorities(ids, np.ones(len(ids)))
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("killed")))
            with pytest.raises(OSError, match="killed"):
                save_sampler(path, "mine", sampler)
        loaded = Prioritized()
        load_sampler(path, "mine", loaded)
        assert_same_state(loaded.state_dict(), kept)
        (path / "samplers" / "mine.arrow.1-1.partial").write_bytes(b"killed")
        save_sampler(path, "mine", loaded)
        store.check()
    assert [each.name for each in (path / "samplers").iterdir()] == ["mine.arrow"]
    table = pa.ipc.open_file(pa.py_buffer((path / "samplers" / "mine.arrow").read_bytes())).read_all()
    assert table["kind"].to_pylist() == ["Prioritized"]


@pytest.mark.parametrize("sampler", [Uniform(replace=False, seed=3), Once(draws=2), Uniform()])
def test_every_sampler_can_be_kept(tmp_path, sampler):
    with make_store(tmp_path / "s") as store:
        first = store.sample(20, WINDOW, np.random.default_rng(0), sampler=sampler)
        save_sampler(store.path, "any", sampler)
        state = sampler.state_dict()
        second = store.sample(20, WINDOW, np.random.default_rng(1), sampler=sampler)
        load_sampler(store.path, "any", sampler)
        assert_same_state(sampler.state_dict(), state)
        again = store.sample(20, WINDOW, np.random.default_rng(1), sampler=sampler)
        assert again.ids.tolist() == second.ids.tolist() != first.ids.tolist()


def test_a_damaged_file_is_refused_wherever_the_damage_is(tmp_path):
    sampler = Prioritized()
    sampler.draw(index_of(5), 2, np.random.default_rng(0))
    (tmp_path / "samplers").mkdir()
    save_sampler(tmp_path, "mine", sampler)
    file = tmp_path / "samplers" / "mine.arrow"
    data, kept, refused = file.read_bytes(), sampler.state_dict(), []
    rng = np.random.default_rng(0)
    spots = np.append(rng.integers(2000, size=300), len(data) - 1 - rng.integers(2000, size=300))
    damaged = [_flipped(data, int(at), int(rng.integers(8))) for at in spots]
    for changed in [*damaged, *(data[:cut] for cut in range(0, len(data), 97)), b"", rng.bytes(500)]:
        file.write_bytes(changed)
        loaded = Prioritized()
        try:
            load_sampler(tmp_path, "mine", loaded)
            assert_same_state(loaded.state_dict(), kept)  # padding was hit
        except CorruptionError as error:
            refused.append(str(error))
    assert len(refused) > len(damaged) // 2
    assert all("mine.arrow" in message for message in refused)


def _flipped(data, at, bit):
    changed = bytearray(data)
    changed[at] ^= 1 << bit
    return bytes(changed)


def test_a_foreign_file_a_wrong_name_and_a_missing_file_are_refused(tmp_path):
    (tmp_path / "samplers").mkdir()
    once, prioritized = Once(), Prioritized()
    save_sampler(tmp_path, "once", once)
    with pytest.raises(UsageError, match="expected the state of a Prioritized, found that of a Once"):
        load_sampler(tmp_path, "once", prioritized)
    with pytest.raises(UsageError, match="expected a sampler saved by this name, found none"):
        load_sampler(tmp_path, "other", prioritized)
    for name in ("", "../x", "a/b", "a.b", "-a", "ä", None, "a" * 101):
        with pytest.raises(UsageError, match="name: expected up to 100 of the characters"):
            save_sampler(tmp_path, name, once)
    table = pa.table({"kind": ["Once"]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    write_atomic(tmp_path / "samplers" / "once.arrow", sink.getvalue().to_pybytes())
    with pytest.raises(CorruptionError, match="expected the columns"):
        load_sampler(tmp_path, "once", once)


# ---- once


@pytest.mark.parametrize("draws", [1, 3])
def test_once_draws_every_item_so_often_and_then_no_more(tmp_path, draws):
    with make_store(tmp_path / "s") as store:
        sampler, rng = Once(draws=draws), np.random.default_rng(0)
        ids, counts = all_ids(store), {}
        while left := sampler.left(store.items(WINDOW)):
            drawn = store.sample(9, WINDOW, rng, sampler=sampler).ids.tolist()
            assert len(drawn) == min(9, left)
            if draws == 1:
                assert len(set(drawn)) == len(drawn)
            for each in drawn:
                counts[each] = counts.get(each, 0) + 1
            sampler.check()
        assert counts == dict.fromkeys(ids.tolist(), draws)
        with pytest.raises(
            UsageError, match="every one of them was drawn " + ("once" if draws == 1 else "3")
        ):
            store.sample(1, WINDOW, rng, sampler=sampler)
        add_episode(store, 4)
        new = store.sample(100, WINDOW, rng, sampler=sampler).ids
        assert len(new) == 4 * draws
        assert set(new.tolist()) == set(all_ids(store)[-4:].tolist())


def test_once_draws_uniformly_of_what_is_left():
    rng, counts = np.random.default_rng(0), np.zeros((3, 12))
    items = index_of(12)
    for _ in range(2000):
        sampler = Once(draws=2)
        for step in range(3):
            draw = sampler.draw(items, 4, rng)
            assert draw.weights is None
            counts[step] += np.bincount(draw.numbers, minlength=12)
    for row in counts:
        assert_drawn_as(row, np.full(12, 1 / 12))
    assert (sampler.draw(items, 1, rng).probabilities <= 2 / 12).all()


def test_a_loader_ends_when_every_item_was_drawn_once(tmp_path):
    path, sampler = tmp_path / "s", Once()
    with make_store(path, lengths=(30, 25)):
        pass
    dataset = ReplayDataset(path)
    loader = dataset.loader(8, sampler=sampler)
    ids = np.concatenate([batch["ids"].numpy() for batch in loader])
    assert sorted(ids.tolist()) == sorted(all_ids(dataset.selection).tolist())
    assert list(loader) == []
    dataset.close()


@pytest.mark.parametrize("draws", [0, -1, 1.5, True, None, 1 << 21])
def test_once_refuses_a_wrong_number_of_draws(draws):
    with pytest.raises(UsageError, match=r"draws: expected an int from 1 to 2\^20"):
        Once(draws=draws)


# ---- the example


@pytest.mark.parametrize("arguments", [[], ["--uniform"]])
def test_the_example_learns_and_goes_on_from_what_it_kept(tmp_path, monkeypatch, arguments):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    for name in ("dqn", "prioritized_dqn"):
        sys.modules.pop(name, None)
    import prioritized_dqn

    path = tmp_path / "cartpole.replay"
    for run in (1, 2):
        result = prioritized_dqn.main([str(path), "--steps", "560", *arguments])
        assert result.returns.sum() == result.ends[-1] <= 560
        with ReplayStore.open(path) as store:
            assert len(store) == 560 * run
    assert (path / "samplers" / "priorities.arrow").exists() == (not arguments)
    if not arguments:
        sampler = Prioritized()
        load_sampler(path, "priorities", sampler)
        assert sampler.state_dict()["draws"] == 2 * 30
