"""Strata of a store that is drawn from while its writer, in the same process, evicts."""

import contextlib
import threading
import time

import numpy as np
import pyarrow.compute as pc
import pytest
from growing import schema
from test_eviction import Appender, check_batch, small_schema

import replaystore.writer
from replaystore import Prioritized, Recent, ReplayStore, Sequence, Stratified, Transition
from replaystore.errors import SnapshotExpired
from replaystore.index import EpisodeIndex

CAPACITY = 600
POLICIES = ("demo", "mine", None)


def append(appender, policies, count=1):
    """Episodes by these policies in turn; which transitions are whose."""
    for number in range(count):
        length, policy = 7 + number % 5, POLICIES[number % 3]
        policies.update(dict.fromkeys(range(appender.count, appender.count + length), policy))
        appender.episode(length, policy=policy)


def check_strata(store, sampler, policies, rng):
    batch = store.sample(60, sampler=sampler, rng=rng)
    check_batch(batch)
    drawn = [policies[number] for number in batch.action.tolist()]
    assert 19 <= sum(policy == "demo" for policy in drawn) <= 21
    assert len(drawn) == 60


def commit_in_the_midst(store, monkeypatch):
    """Have the writer commit, and evict, whenever a sampler has just looked at the episodes."""
    episodes, (writer,) = EpisodeIndex.episodes, store._view.writers.values()

    def look_and_wait(index, start=0):
        found = [column.copy() for column in episodes(index, start)]
        before, end = writer.head.commit, time.monotonic() + 0.05
        writer._wake.set()
        while writer.head.commit == before and time.monotonic() < end:
            time.sleep(0.001)
        return tuple(found)

    monkeypatch.setattr(EpisodeIndex, "episodes", look_and_wait)


@pytest.mark.usefixtures("_no_syncs")
def test_rows_that_are_evicted_while_a_sampler_looks_are_no_error(tmp_path, monkeypatch):
    rng, policies = np.random.default_rng(0), {}
    with ReplayStore.create(tmp_path / "store", small_schema(), capacity=CAPACITY) as store:
        appender = Appender(store)
        append(appender, policies, 50)
        store.flush()
        sampler = Stratified(store, {"demo": 1, None: 2})
        store.sample(3, sampler=sampler, rng=rng)
        for _ in range(8):
            append(appender, policies, 9)
            with monkeypatch.context() as patch:
                commit_in_the_midst(store, patch)
                check_strata(store, sampler, policies, rng)
        assert store.items(Transition()).evictions > 2


SAMPLERS = {
    "plain": lambda: None,
    "recent": lambda: {"demo": Recent(fraction=0.5), None: Recent(half_life=100)},
    "prioritized": lambda: {None: Prioritized()},
}


@pytest.mark.usefixtures("_no_syncs")
@pytest.mark.parametrize("kind", SAMPLERS)
def test_draws_are_from_their_strata_while_another_thread_appends(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(replaystore.writer, "COMMIT_SECONDS", 0.002)
    policies, stop = {}, threading.Event()
    rng = np.random.default_rng(0)
    with ReplayStore.create(tmp_path / "store", small_schema(), capacity=CAPACITY) as store:
        appender = Appender(store)
        append(appender, policies, 20)
        sampler = Stratified(store, {"demo": 1, None: 2}, samplers=SAMPLERS[kind]())

        def act():
            while not stop.is_set() and appender.count < 400 * CAPACITY:
                append(appender, policies, 3)
                time.sleep(0.0005)

        actor = threading.Thread(target=act)
        actor.start()
        try:
            draws = 0
            while draws < 100 or store.items(Transition()).evictions < 4:
                check_strata(store, sampler, policies, rng)
                draws += 1
                assert actor.is_alive(), "the actor has come to its end, or has failed"
        finally:
            stop.set()
            actor.join()


@pytest.mark.usefixtures("_no_syncs")
def test_strata_of_other_windows_and_of_choices_while_rows_are_evicted(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    with ReplayStore.create(tmp_path / "store", schema(), capacity=CAPACITY) as store:
        number = 0

        def episodes(count):
            nonlocal number
            for level in np.arange(count) % 2:
                numbers = np.arange(number, number + 10)
                store.add_episode(
                    observation=np.arange(number, number + 11, dtype=np.float32),
                    action=numbers,
                    reward=np.full(10, float(level)),
                    terminated=numbers == numbers[-1],
                    truncated=np.zeros(10, bool),
                    columns={"level": level},
                )
                number += 10

        episodes(50)
        store.flush()
        sampler = Stratified(store, {0: 1, 1: 3}, by="level")
        for _ in range(6):
            episodes(9)
            with monkeypatch.context() as patch:
                commit_in_the_midst(store, patch)
                batch = store.sample(40, Sequence(4, stride=3), rng, sampler=sampler)
            assert np.count_nonzero(batch.reward[:, 0] == 1.0) == 30
            chosen = store.where(pc.field("return") >= 0)
            episodes(9)
            store.flush()  # what was chosen is evicted in part, before it is first used
            own = Stratified(chosen, {0: 1, 1: 3}, by="level")
            batch = chosen.sample(40, rng=rng, sampler=own)
            assert np.count_nonzero(batch.reward == 1.0) == 30
            episodes(9)
            store.flush()  # and after it
            with contextlib.suppress(SnapshotExpired):
                chosen.sample(40, rng=rng, sampler=own)
        assert store.items(Transition()).evictions > 2
