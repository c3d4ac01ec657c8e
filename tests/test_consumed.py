"""What `Once` has drawn as often as it may can go: `store.evict(sampler.consumed(items))`."""

from collections import Counter

import numpy as np
import pytest
from test_eviction import Appender, actions_of, create, head_of, image, rows_on_disk, small_schema

from replaystore import (
    Once,
    ReplayStore,
    Sequence,
    Transition,
    UsageError,
    WholeEpisode,
    load_sampler,
    save_sampler,
)
from replaystore.errors import ReadOnlyError
from replaystore.index import EpisodeIndex, Spacing
from replaystore.verify import verify

LARGE = 100_000  # a capacity that nothing here reaches


def evict_consumed(store, sampler, window):
    rows = sampler.consumed(store.items(window))
    store.evict(rows)
    return rows


def steps_of(store, rng, count, state, env_odds=(1.0, 1.0)):
    """Steps of two environments, each when it likes to; every transition has a number of its own."""
    for _ in range(count):
        mask = rng.random(2) < env_odds
        begins = mask & ~state["open"]
        numbers = state["count"] + np.arange(2)
        if begins.any():
            store.reset(image(numbers), mask=begins)
        if not mask.any():
            continue
        ends = rng.random(2) < 0.05
        features = {"features": (numbers % 1000).astype("int32")}
        store.step(numbers, image(numbers), numbers / 2, ends, ends & False, info=features, mask=mask)
        state["count"] += 2
        state["recorded"] |= set(numbers[mask].tolist())
        state["open"] = np.where(mask, ~ends, state["open"])


@pytest.mark.usefixtures("_no_syncs")
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("odds", [(1.0, 1.0), (1.0, 0.2)], ids=["together", "apart"])
def test_each_transition_is_drawn_so_often_though_what_is_consumed_goes(tmp_path, draws, odds):
    rng, sampler, drawn = np.random.default_rng(0), Once(draws=draws), Counter()
    state = {"count": 0, "open": np.zeros(2, bool), "recorded": set()}
    with create(tmp_path, LARGE, num_envs=2) as store:
        for turn in range(40):
            steps_of(store, rng, 100, state, odds)
            wanted = draws * len(state["recorded"]) - sum(drawn.values())
            if turn % 10 == 9:
                odds = odds[::-1]
            while wanted > 20 * draws:
                drawn.update(store.sample(min(wanted, 50), sampler=sampler, rng=rng).action.tolist())
                wanted -= 50
            kept_before = set(store.read(np.arange(len(store))).action.tolist())
            evict_consumed(store, sampler, Transition())
            kept = set(store.read(np.arange(len(store))).action.tolist())
            assert {number for number in kept_before if drawn[number] < draws} <= kept
            store.check()
            sampler.check()
        while sampler.left(store.items(Transition())):
            drawn.update(store.sample(50, sampler=sampler, rng=rng).action.tolist())
        assert drawn == Counter(dict.fromkeys(state["recorded"], draws))
        assert head_of(store).floor > 1000
        assert len(store) < len(state["recorded"]) / 2
    assert list(verify(store.path)) == []


@pytest.mark.usefixtures("_no_syncs")
def test_the_files_of_what_is_consumed_go(tmp_path):
    rng, sampler = np.random.default_rng(0), Once()
    with create(tmp_path, LARGE) as store:
        appender = Appender(store)
        for _ in range(4):
            appender.episodes(150, rng)
            while sampler.left(store.items(Transition())):
                store.sample(500, sampler=sampler, rng=rng)
            evict_consumed(store, sampler, Transition())
            assert len(store) < 16
        assert appender.count > 15_000
        assert rows_on_disk(store, "observation") < 2 * store.schema.shard_rows(store.schema.fields[0], 1)


@pytest.mark.usefixtures("_no_syncs")
def test_what_is_left_is_left_after_opening_again(tmp_path):
    rng, sampler, drawn = np.random.default_rng(0), Once(), []
    with create(tmp_path, LARGE) as store:
        appender = Appender(store)
        appender.episodes(60, rng)
        for _ in range(20):
            drawn += store.sample(50, sampler=sampler, rng=rng).action.tolist()
        save_sampler(store.path, "once", sampler)
        evict_consumed(store, sampler, Transition())
        left = set(actions_of(store))
        assert set(range(appender.count)) - set(drawn) <= left
    again = Once()
    load_sampler(store.path, "once", again)
    with ReplayStore.open(store.path, "a") as store:
        assert set(actions_of(store)) == left
        while again.left(store.items(Transition())):
            drawn += store.sample(100, sampler=again, rng=rng).action.tolist()
        assert sorted(drawn) == list(range(appender.count))
        evict_consumed(store, again, Transition())
        assert len(store) < 16


@pytest.mark.usefixtures("_no_syncs")
@pytest.mark.parametrize("window", [Sequence(20, burn_in=10, stride=5, pad=False), WholeEpisode()])
def test_rows_that_an_open_episode_will_need_stay(tmp_path, window):
    rng, sampler, seen = np.random.default_rng(0), Once(), []
    with create(tmp_path, LARGE) as store:
        appender = Appender(store)
        for _ in range(60):
            appender.steps(17, ends=lambda number: number % 90 == 89)
            if sampler.left(store.items(window)):
                seen += store.sample(1000, window, rng, sampler=sampler).ids.tolist()
            evict_consumed(store, sampler, window)
        assert head_of(store).floor > 300
    appender = Appender(ReplayStore.create(tmp_path / "all", small_schema(), capacity=LARGE))
    appender.steps(60 * 17, ends=lambda number: number % 90 == 89)
    with appender.store as whole:
        expected = whole.read(np.arange(whole.count(window)), window).ids.tolist()
    assert sorted(seen) == expected


@pytest.mark.usefixtures("_no_syncs")
def test_streams_that_nobody_writes_are_evicted_too_and_those_of_others_stay(tmp_path):
    rng, sampler = np.random.default_rng(0), Once()
    with create(tmp_path, LARGE) as store:
        Appender(store).episodes(30, rng)
    with (
        ReplayStore.open(store.path, "a", num_envs=2) as second,
        ReplayStore.open(store.path, "a", num_envs=1) as third,
    ):
        Appender(second, start=10**6).episodes(30, rng)
        second.flush()
        third.flush()
        with ReplayStore.open(store.path, "a", num_envs=2) as fourth:
            Appender(fourth, start=2 * 10**6).episodes(30, rng)
            while sampler.left(fourth.items(Transition())):
                fourth.sample(500, sampler=sampler, rng=rng)
            rows = evict_consumed(fourth, sampler, Transition())
            assert set(rows) == {0, 1, 2}
            assert head_of(fourth, 2).floor > 100
            assert head_of(fourth, 0).floor == head_of(fourth, 1).floor == 0, "they have writers"
            third.close()
            evict_consumed(fourth, sampler, Transition())
            assert head_of(fourth, 0).floor > 100
            assert head_of(fourth, 1).floor == 0
            fourth.refresh()
            assert fourth.items(Transition()).floors[0] > 100
            assert len(fourth) == len(actions_of(fourth))


def test_a_column_without_episodes_keeps_the_rows_in_which_they_may_begin():
    index, sampler = EpisodeIndex(), Once()
    index.set_width(0, 2)
    index.append(0, np.array([0]), np.array([0]), np.array([100]))
    sampler.draw(index, 100, np.random.default_rng(0))
    assert sampler.consumed(index) == {0: 0}
    index.append(0, np.array([1]), np.array([0]), np.array([30]))
    assert sampler.consumed(index) == {0: 0}, "its transitions have draws left"
    sampler.draw(index, 100, np.random.default_rng(0))
    assert sampler.consumed(index) == {0: 31}


def test_an_open_episode_keeps_the_rows_of_its_next_item():
    index, sampler = EpisodeIndex(Spacing(4, 10, 3)), Once()
    index.set_width(0, 1)
    index.append(0, np.array([0]), np.array([0]), np.array([50]))
    index.set_open([(0, np.array([0]), np.array([51]), np.array([8]))])
    sampler.draw(index, 100, np.random.default_rng(0))
    assert sampler.consumed(index) == {0: 51}, "it has no item yet"
    index.set_open([(0, np.array([0]), np.array([51]), np.array([18]))])
    sampler.draw(index, 100, np.random.default_rng(0))
    assert sampler.consumed(index) == {0: 51 + 8}, "it has two, and three rows go before each"


@pytest.mark.usefixtures("_no_syncs")
def test_evicting_is_refused_where_it_is_not_possible(tmp_path):
    for name, bounds in (("whole", {}), ("reservoir", {"capacity": 500, "reservoir": True})):
        store = ReplayStore.create(tmp_path / name, small_schema(), **bounds)
        with store, pytest.raises(UsageError, match="evict: expected a store with capacity"):
            store.evict({0: 5})
    with create(tmp_path) as store:
        Appender(store).episode(50)
        for rows in (5, {1: 5}, {0: -1}, {0: 1.5}, {"0": 3}):
            with pytest.raises(UsageError, match="evict: expected"):
                store.evict(rows)
        store.evict({0: 10**9})
        assert len(store) < 16
        Appender(store, start=50).episode(50)
        for _ in range(3):
            store.flush()
        assert len(store) >= 50, "rows that were not there yet stay"
    with ReplayStore.open(store.path) as reader, pytest.raises(ReadOnlyError):
        reader.evict({0: 5})
