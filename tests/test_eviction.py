"""Stores with bounds: what goes, what stays, and that nobody reads a wrong row meanwhile."""

import contextlib
import json
import pickle
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
from test_processes import started

from replaystore import (
    Field,
    Once,
    Prioritized,
    ReplayStore,
    Schema,
    Sequence,
    Stratified,
    Transition,
    Uniform,
    UsageError,
    WholeEpisode,
    commit,
    writer,
)
from replaystore.arena import stream_path
from replaystore.bounds import Bounds
from replaystore.dataset import ReplayDataset
from replaystore.errors import SnapshotExpired
from replaystore.files import disk_usage
from replaystore.head import HEAD, Evicted, decode_head, encode_head, read_head
from replaystore.index import CONTEXT, EpisodeIndex, Spacing
from replaystore.repair import repair
from replaystore.room import fitted_schema, ring_rows
from replaystore.verify import verify

CAPACITY = 600


def small_schema(**columns):
    """Two packed fields of different files and flat ones; each value follows from the action."""
    return Schema(
        [
            Field("observation", (30, 30), "uint8", chunk_rows=4),
            Field("action", (), "int64"),
            Field("reward", (), "float64"),
            Field("terminated", (), "bool"),
            Field("truncated", (), "bool"),
            Field("info/features", (), "int32", codec="blosc-lz4-1", chunk_rows=8),
        ],
        columns=columns,
    )


def image(numbers):
    """Two bytes of a number fill the halves of an image."""
    numbers = np.asarray(numbers, np.int64)
    halves = np.stack([numbers % 251, numbers // 251 % 251], axis=-1).astype("uint8")
    return np.repeat(halves, 450, axis=-1).reshape(*numbers.shape, 30, 30)


class Appender:
    """Appends episodes whose transitions are numbered; observation t + 1 follows on action t."""

    def __init__(self, store, *, start=0):
        self.store = store
        self.count = start
        self.of_env = {}  # the next number of each environment's open episode

    def episode(self, length, *, ends=True, **arguments):
        numbers = np.arange(self.count, self.count + length)
        last = numbers == numbers[-1]
        self.store.add_episode(
            observation=image(np.arange(self.count, self.count + length + 1)),
            action=numbers,
            reward=numbers / 2,
            terminated=last & ends,
            truncated=np.zeros(length, bool),
            info={"features": (numbers % 1000).astype("int32")},
            **arguments,
        )
        self.count += length

    def episodes(self, count, rng, longest=60):
        for length in rng.integers(1, longest, size=count).tolist():
            self.episode(length)

    def steps(self, count, ends=lambda number: False):
        """Steps of one environment, whose episode goes on from call to call."""
        for _ in range(count):
            if 0 not in self.of_env:
                self.store.reset(image(self.count))
            number = self.count
            over = bool(ends(number))
            features = {"features": np.int32(number % 1000)}
            self.store.step(number, image(number + 1), number / 2, over, False, info=features)
            self.count += 1
            self.of_env = {} if over else {0: self.count}


def check_batch(batch, stack=1):
    number = batch.action
    assert (batch.reward == number / 2).all()
    assert (batch.extra["info"]["features"] == number % 1000).all()
    newest = batch.observation if stack == 1 else batch.observation[:, -1]
    following = batch.next_observation if stack == 1 else batch.next_observation[:, -1]
    assert (newest == image(number)).all()
    assert (following == image(number + 1)).all()


def actions_of(store):
    """The actions of all transitions, in order, once they are found right."""
    if not len(store):
        return []
    batch = store.read(np.arange(len(store)))
    check_batch(batch)
    return batch.action.tolist()


def head_of(store, stream=0):
    path = stream_path(store.path, stream)
    return decode_head(read_head(path), store.schema, path / HEAD)


def rows_on_disk(store, name, stream=0):
    """Rows of an environment in the files of a field."""
    head = head_of(store, stream)
    size = store.schema.shard_rows(store.schema.by_name[name], head.num_envs)
    numbers = [int(each.name) for each in (stream_path(store.path, stream) / name / "c").iterdir()]
    return int(head.rows.max()) - min(numbers) * size


def create(tmp_path, capacity=CAPACITY, **arguments):
    return ReplayStore.create(tmp_path / "store", small_schema(), capacity=capacity, **arguments)


# ---- environments that wait


def commit_by_itself(store):
    """Have the background thread commit as it does every second, not because of a call."""
    writer = store._writer
    before, end = writer.head.commit, time.monotonic() + 10
    writer._wake.set()
    while writer.head.commit == before and time.monotonic() < end:
        time.sleep(0.001)
    assert writer.head.commit > before


@pytest.mark.usefixtures("_no_syncs")
def test_an_environment_that_was_reset_and_never_stepped_holds_nothing_back(tmp_path):
    """Its observation moves on with the others' rows, and is there when it is stepped at last."""
    capacity = 1500
    with create(tmp_path, capacity, num_envs=3) as store:
        wait = np.array([False, False, True])
        lag = 64 + min(store.schema.shard_rows(field, 3) for field in store.schema.fields)

        def both(values):
            return np.broadcast_to(values, (3, *np.shape(values))).copy()

        store.reset(image(np.array([0, 0, 777])))
        flags = np.zeros(3, bool)
        for number in range(2500):
            values = both(number), image(both(number + 1)), both(number / 2), flags, flags
            store.step(*values, mask=~wait, info={"features": both(np.int32(number % 1000))})
            if number % 10 == 9:
                commit_by_itself(store)
                assert len(store) <= capacity + 2 * lag
        assert head_of(store).floor > 1500
        values = both(777), image(both(778)), both(777 / 2), flags, flags
        store.step(*values, mask=wait, info={"features": both(np.int32(777))})
        store.flush()
        store.check()
        actions = actions_of(store)
        assert max(actions) == 2499
        assert actions.count(777) == 1
        with ReplayStore.open(store.path) as reader:
            assert sorted(actions_of(reader)) == sorted(actions)
    assert list(verify(store.path)) == []


# ---- the index


class Model:
    """Transitions as a list, in the order of their numbers: stream, env, time, first, last."""

    def __init__(self):
        self.closed, self.open, self.floors = [], [], {}

    def places(self, stride=1, span=1, offset=0):
        return [
            (stream, env, time, max(first, self.floors.get(stream, 0) - CONTEXT), last)
            for stream, env, first, last in self.closed + self.open
            for time in range(first + offset, last - span + 1, stride)
            if time >= self.floors.get(stream, 0)
        ]


@pytest.mark.parametrize("seed", range(6))
def test_numbers_lead_to_what_is_left_as_a_list_would(seed):
    rng = np.random.default_rng(seed)
    index, model, rows = EpisodeIndex(), Model(), np.zeros((2, 3), np.int64)
    followers = {
        spacing: EpisodeIndex(spacing) for spacing in (Spacing(3, 2, 1), Spacing(7), Spacing(1 << 40))
    }
    for stream in range(2):
        index.set_width(stream, 3)
    for _ in range(60):
        stream, added = int(rng.integers(2)), []
        for _ in range(int(rng.integers(0, 12))):
            env, length = int(rng.integers(3)), int(rng.integers(1, 150 if rng.random() < 0.1 else 12))
            added.append((env, rows[stream, env], length))
            rows[stream, env] += length + 1
        index.append(stream, *np.array(added, np.int64).reshape(-1, 3).T)
        model.closed += [(stream, env, first, first + length) for env, first, length in added]
        model.open = [
            (s, e, rows[s, e], rows[s, e] + 9) for s in range(2) for e in range(3) if rng.random() < 0.4
        ]
        if rng.random() < 0.4:
            stream = int(rng.integers(2))
            floor = int(rng.integers(0, rows[stream].max() + 5))
            model.floors[stream] = max(floor, model.floors.get(stream, 0))
            index.evict(stream, floor)
        index.set_open([(s, *np.array([(e, f, last - f)]).T) for s, e, f, last in model.open])
        check_index(index, model)
        for spacing, follower in followers.items():
            if rng.random() < 0.6:
                follower.follow(index)
                check_index(follower, model, *spacing)


def check_index(index, model, *spacing):
    places = [tuple(map(int, place)) for place in model.places(*spacing)]
    found = index.locate(np.arange(len(index)))[:5]
    assert list(zip(*(column.tolist() for column in found), strict=True)) == places
    numbers = {(s << 40) + time * 3 + env: number for number, (s, env, time, _, _) in enumerate(places)}
    every = [
        (s << 40) + t * 3 + e
        for s, e, first, last in model.closed + model.open
        for t in range(first, last + 1)
    ]
    assert index.numbers(np.array(every, np.int64)).tolist() == [numbers.get(id_, -1) for id_ in every]
    index.check()


@pytest.mark.parametrize("seed", range(3))
def test_leaves_keep_what_is_left_and_forget_the_rest(seed):
    rng = np.random.default_rng(seed)
    index, sampler, rows = EpisodeIndex(), Prioritized(alpha=1.0, epsilon=1e-9), np.zeros(2, np.int64)
    index.set_width(0, 2)
    known = {}
    for _ in range(40):
        env, length = rng.integers(2, size=20), rng.integers(1, 200, size=20)
        firsts = []
        for e, n in zip(env, length, strict=True):
            firsts.append(rows[e])
            rows[e] += n + 1
        index.append(0, env, np.array(firsts), length)
        if rng.random() < 0.5:
            index.evict(0, int(rows.min()) - int(rng.integers(1, 1500)))
        index.set_open([(0, np.array([0]), rows[:1], np.array([int(rng.integers(1, 30))]))])
        draw = sampler.draw(index, 64, rng)
        ids = index.ids(index.locate(draw.numbers))
        total = sum(known.get(each, sampler.largest_priority) for each in ids_of(index))
        expected = [known.get(each, sampler.largest_priority) / total for each in ids.tolist()]
        np.testing.assert_allclose(draw.probabilities, expected, rtol=1e-6)
        known |= {each: known.get(each, sampler.largest_priority) for each in ids_of(index)}
        values = rng.random(64)
        sampler.update_priorities(ids, values)
        known |= dict(zip(ids.tolist(), values.tolist(), strict=True))
        known = {each: value for each, value in known.items() if each >= index.floors[0] * 2}
        sampler.check()
    assert len(sampler.state_dict()["pages"]) < 2 * rows.max() * 2 / 1024


def ids_of(index):
    return index.ids(index.locate(np.arange(len(index)))).tolist()


# ---- what goes and what stays


@pytest.mark.usefixtures("_no_syncs")
@pytest.mark.parametrize("seed", range(3))
def test_a_full_store_holds_the_newest_transitions(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(commit, "PART_EPISODES", 7)
    rng = np.random.default_rng(seed)
    store = create(tmp_path)
    appender = Appender(store)
    for _ in range(25):
        appender.episodes(int(rng.integers(1, 12)), rng)
        if rng.random() < 0.7:
            store.flush()
            found = actions_of(store)
            assert found == list(range(appender.count - len(found), appender.count))
            assert min(appender.count, CAPACITY * 15 // 16 - 1) <= len(found) <= CAPACITY
            for name in store.schema.by_name:
                assert rows_on_disk(store, name) <= CAPACITY + 4096 + CONTEXT + store.num_episodes
        check_batch(store.sample(20, rng=rng))
        stacked = store.sample(20, Transition(frame_stack=3), rng)
        check_batch(stacked, stack=3)
        store.check()
        if rng.random() < 0.2:
            store.close()
            assert list(verify(store.path)) == []
            store = ReplayStore.open(tmp_path / "store", "a")
            appender.store = store
    store.close()
    assert appender.count > 2 * CAPACITY
    assert list(verify(store.path)) == []


@pytest.mark.usefixtures("_no_syncs")
def test_an_episode_without_end_loses_its_beginning_and_nothing_else(tmp_path):
    with create(tmp_path) as store:
        appender = Appender(store)
        for _ in range(12):
            appender.steps(150)
            store.flush()
            found = actions_of(store)
            assert found == list(range(appender.count - len(found), appender.count))
            assert len(found) <= CAPACITY
            assert store.num_episodes == 1
            batch = store.read(np.arange(len(store)), Transition(frame_stack=9))
            if found[0] >= 8:
                expected = image(np.array(found)[:, None] + np.arange(-8, 1))
                assert (batch.observation == expected).all(), "a stack ends at the floor"
        assert len(found) > CAPACITY * 0.9
        assert store.episode(0)["action"].tolist() == found
    with ReplayStore.open(tmp_path / "store", "a") as store:
        assert actions_of(store) == found


@pytest.mark.usefixtures("_no_syncs")
def test_items_of_a_window_are_those_that_there_were(tmp_path):
    windows = [Sequence(10, stride=7), Sequence(5, burn_in=3, stride=4, pad=False), WholeEpisode()]
    with create(tmp_path) as store:
        appender, rng = Appender(store), np.random.default_rng(0)
        appender.episodes(15, rng, longest=90)
        seen = {window: {} for window in windows}
        for _ in range(20):
            appender.episodes(3, rng, longest=90)
            store.flush()
            floor = head_of(store).floor
            for window in windows:
                batch = store.read(np.arange(store.count(window)), window)
                items = {
                    i: a[m].tolist() for i, a, m in zip(batch.ids, batch.action, batch.mask, strict=True)
                }
                assert all(items[id_] == steps for id_, steps in seen[window].items() if id_ in items)
                gone = seen[window].keys() - items.keys()
                assert all(id_ < floor for id_ in gone)
                seen[window] = items
        assert floor > 0


@pytest.mark.usefixtures("_no_syncs")
@pytest.mark.parametrize("seed", range(2))
def test_environments_that_step_apart_evict_together(tmp_path, seed):
    rng = np.random.default_rng(seed)
    capacity, serial = 3000, 0
    with create(tmp_path, capacity, num_envs=3) as store:
        appender = Appender(store)
        appender.episodes(300, rng)
        for _ in range(40):
            appender.episodes(10, rng)
            store.flush()
            found = actions_of(store)
            assert len(set(found)) == len(found)
            assert len(found) <= capacity
            assert min(found) > appender.count - capacity - 600
            store.check()
        serial = appender.count
    assert list(verify(store.path)) == []
    with ReplayStore.open(store.path) as store:
        assert sorted(actions_of(store)) == sorted(found)
        assert serial > 3 * capacity


@pytest.mark.usefixtures("_no_syncs")
def test_a_column_that_is_not_used_does_not_keep_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.01)
    mask = np.array([True, False])
    with create(tmp_path, 1500, num_envs=2) as store:
        for number in range(12_000):
            if number % 50 == 0:
                store.reset(np.stack([image(number)] * 2), mask=mask)
            features = {"features": np.array([number % 1000] * 2, "int32")}
            flags = np.array([number % 50 == 49] * 2)
            images = np.stack([image(number + 1)] * 2)
            store.step(
                np.array([number] * 2),
                images,
                np.array([number / 2] * 2),
                flags,
                ~flags & False,
                info=features,
                mask=mask,
            )
        store.flush()
        assert head_of(store).floor > 5000
        assert actions_of(store) == list(range(12_000 - len(store), 12_000))
    assert list(verify(store.path)) == []


@pytest.mark.usefixtures("_no_syncs")
def test_an_episode_that_is_left_open_keeps_its_last_rows_and_goes_on(tmp_path):
    def both(number):
        features = {"features": np.array([number % 1000] * 2, "int32")}
        return np.array([number] * 2), np.stack([image(number + 1)] * 2), np.array([number / 2] * 2), features

    def step(number, env, ends):
        action, observation, reward, features = both(number)
        mask = np.arange(2) == env
        store.step(
            action, observation, reward, np.array([ends] * 2), np.zeros(2, bool), info=features, mask=mask
        )

    with create(tmp_path, 1000, num_envs=2) as store:
        store.reset(np.stack([image(0)] * 2))
        for number in range(50):
            step(number, 1, ends=False)
        for number in range(3000):
            step(number, 0, ends=False)
        store.flush()
        assert 0 < head_of(store).floor <= 50
        for number in range(50, 3000):
            step(number, 1, ends=number == 2999)
        store.flush()
        assert list(verify(store.path)) == []
        actions = actions_of(store)
        assert len(actions) <= 1000
        assert head_of(store).floor > 2000
        found = store.episode(-1)["action"].tolist() + store.episode(0)["action"].tolist()
        assert sorted(found) == sorted(actions)


def deleted_maps(path):
    """Files below a directory that are mapped here though they were unlinked."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if str(path) in line and line.endswith("(deleted)")]


@pytest.mark.usefixtures("_no_syncs")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what is mapped is read from /proc")
def test_a_process_that_moves_on_gives_disk_blocks_back(tmp_path):
    with create(tmp_path) as store, ReplayStore.open(store.path) as reader:
        appender = Appender(store)
        for _ in range(12):
            appender.episode(900)
            store.flush()
            reader.refresh()
            check_batch(store.sample(50))
            check_batch(reader.sample(50))
            live = [line for line in deleted_maps(store.path) if "/observation/" not in line]
            assert live == [], "repacked shards alone are held, until they are opened anew"
        assert not deleted_maps(store.path / "streams/000000/observation/c/0/")


@pytest.mark.usefixtures("_no_syncs")
def test_bytes_on_disk_stay_below_their_bound(tmp_path):
    schema = Schema(
        [
            Field("observation", (400,), "float64", codec="blosc-lz4-1", chunk_rows=8),
            *small_schema().fields[1:5],
        ]
    )
    bound = 3_000_000
    rng = np.random.default_rng(0)
    with ReplayStore.create(tmp_path / "store", schema, capacity_bytes=bound) as store:
        for number in range(60):
            observations = rng.random((51, 400))
            flags = np.arange(50) == 49
            store.add_episode(
                observation=observations,
                action=np.full(50, number),
                reward=np.zeros(50),
                terminated=flags,
                truncated=flags,
            )
            store.flush()
            assert disk_usage(store.path) <= bound
        assert head_of(store).floor > 1000
        assert len(store) * 3200 > bound / 2
        assert store.read(np.arange(len(store))).action.max() == 59


@pytest.mark.usefixtures("_no_syncs")
def test_old_episodes_go_and_a_clock_that_jumps_breaks_nothing(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    monkeypatch.setitem(writer.StreamWriter.__init__.__kwdefaults__, "clock", lambda: now[0])
    monkeypatch.setitem(sys.modules["replaystore.room"].Room.__init__.__kwdefaults__, "clock", lambda: now[0])
    with ReplayStore.create(tmp_path / "store", small_schema(), max_age=100.0) as store:
        appender = Appender(store)
        for _ in range(40):
            appender.episode(50)
            now[0] += 10
            store.flush()
            starts = [row.timestamp() for row in store.episodes["start_time"].to_pylist()]
            assert min(starts) > now[0] - 100 - 100 / 16 - 20
        assert len(store) < 700
        for jump in (-5000.0, 9000.0, 0.0):
            now[0] += jump
            appender.episode(50)
            store.flush()
            store.check()
            assert actions_of(store)[-50:] == list(range(appender.count - 50, appender.count))


@pytest.mark.usefixtures("_no_syncs")
def test_each_writer_keeps_its_share_and_streams_without_one_go_first(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.02)
    rng = np.random.default_rng(0)
    with create(tmp_path, 2000) as first:
        appender = Appender(first)
        appender.episodes(80, rng)
        first.flush()
        assert len(first) > 1800
        with ReplayStore.open(first.path, "a") as second:
            other = Appender(second, start=1_000_000)
            for _ in range(150):
                appender.episodes(2, rng)
                other.episodes(1, rng)
                first.flush()
                second.flush()
            total = sum(head_of(first, stream).evicted.left for stream in range(2))
            assert total <= 2000 + 200
            assert all(700 < head_of(first, stream).evicted.left < 1300 for stream in range(2))
        third = ReplayStore.open(first.path, "a")  # takes up the second's stream
        Appender(third, start=2_000_000).episode(10)
        third.close()
    with ReplayStore.open(first.path, "a", num_envs=2) as fourth:
        Appender(fourth, start=3_000_000).episodes(100, rng)
        fourth.flush()
        left = [head_of(fourth, stream).evicted.left for stream in range(3)]
        assert sum(left) <= 2000
        assert left[2] > 1800, "nobody writes the others"
    assert list(verify(first.path)) == []
    with ReplayStore.open(first.path) as store:
        assert sorted(actions_of(store)) == sorted(set(actions_of(store)))
        assert len(store) == sum(left)


# ---- samplers


@pytest.mark.usefixtures("_no_syncs")
def test_uniform_samples_are_uniform_over_what_is_kept(tmp_path):
    rng = np.random.default_rng(0)
    with create(tmp_path) as store:
        appender = Appender(store)
        appender.episodes(90, rng)
        store.flush()
        counts = np.zeros(appender.count)
        for _ in range(100):
            np.add.at(counts, store.sample(600, rng=rng).action, 1)
        kept = counts[appender.count - len(store) :]
        assert counts.sum() == kept.sum() == 60_000
        expected = 60_000 / len(store)
        chi = ((kept - expected) ** 2 / expected).sum()
        assert abs(chi - len(store)) < 4 * np.sqrt(2 * len(store))


@pytest.mark.usefixtures("_no_syncs")
def test_passes_and_samplers_go_on_over_evictions(tmp_path):
    rng = np.random.default_rng(0)
    with create(tmp_path, 1500) as store:
        appender = Appender(store)
        appender.episodes(60, rng)
        store.flush()
        epoch, once = Uniform(replace=False, seed=1), Once()
        strata = Stratified(store, {0: 1.0}, by="env")
        seen, at_begin = [], set(actions_of(store))
        drawn_once = []
        for _ in range(6):
            seen += store.sample(60, sampler=epoch, rng=rng).action.tolist()
            batch = store.sample(60, sampler=once, rng=rng)
            drawn_once += batch.action.tolist()
            check_batch(store.sample(60, sampler=strata, rng=rng))
            once.check()
            appender.episodes(4, rng)
            store.flush()
        assert head_of(store).floor > 0
        assert len(seen) == len(set(seen)), "an item came twice in a pass"
        assert set(seen) <= at_begin
        assert len(drawn_once) == len(set(drawn_once))
        rest = []
        while True:
            batch = store.sample(200, sampler=epoch, rng=rng).action.tolist()
            if not set(batch) <= at_begin - set(seen) - set(rest):
                break
            rest += batch
        kept = set(actions_of(store)) & at_begin
        assert set(rest) == kept - set(seen), "what was left of the pass"
        state = json.loads(json.dumps(epoch.state_dict()))
        appender.episodes(40, rng)
        store.flush()
        again = Uniform(replace=False)
        again.load_state_dict(state)
        whole = []
        while len(whole) < len(store):
            whole += store.sample(100, sampler=again, rng=rng).action.tolist()
        assert sorted(whole) == actions_of(store), "a pass some of whose items are gone begins anew"


@pytest.mark.usefixtures("_no_syncs")
def test_chosen_episodes_are_exact_until_they_are_evicted(tmp_path):
    rng = np.random.default_rng(0)
    with create(tmp_path) as store:
        appender = Appender(store)
        for number in range(60):
            appender.episode(31, policy="a" if number % 2 else "b")
        store.flush()
        chosen = store.where(pc.field("policy") == "a")
        batch = chosen.read(np.arange(len(chosen)), Transition(frame_stack=4))
        assert set(batch.action // 31 % 2) == {1}
        whole = store.read(np.arange(len(store)), Transition(frame_stack=4))
        same = np.isin(whole.action, batch.action)
        assert (whole.observation[same] == batch.observation).all()
        appender.episodes(60, rng)
        store.flush()
        with pytest.raises(SnapshotExpired, match="evicted"):
            chosen.sample(10, rng=rng)


# ---- readers


@pytest.mark.usefixtures("_no_syncs")
def test_a_reader_keeps_its_commit_and_an_evicted_one_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    with create(tmp_path) as store:
        appender = Appender(store)
        appender.episodes(40, rng)
        store.flush()
        with ReplayStore.open(store.path) as reader:
            held, snapshot = actions_of(reader), reader.snapshot
            unread = ReplayStore.open(store.path)
            appender.episodes(800, rng)
            store.flush()
            assert actions_of(reader) == held, "what is mapped stays"
            assert actions_of(unread) == held, "and all of it is mapped from the start"
            unread.close()
            reader.check()
            check_batch(reader.sample(100, rng=rng))
            with pytest.raises(SnapshotExpired, match="evicted"):
                ReplayStore.open(store.path, heads=snapshot)
            reader.refresh()
            assert actions_of(reader) == actions_of(store)
            reader.check()
        table = store.episodes
        assert table["length"].to_numpy().sum() == len(store)


@pytest.mark.usefixtures("_no_syncs")
def test_parts_that_came_and_went_unseen_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "PART_EPISODES", 5)
    rng = np.random.default_rng(0)
    with create(tmp_path) as store:
        appender = Appender(store)
        appender.episodes(10, rng)
        store.flush()
        with ReplayStore.open(store.path) as reader:
            for count in (3, 200, 1, 7, 90):
                for _ in range(count):
                    appender.episodes(1, rng)
                    store.flush() if rng.random() < 0.3 else None
                store.flush()
                reader.refresh()
                assert actions_of(reader) == actions_of(store)
                with ReplayStore.open(store.path) as fresh:
                    assert reader.items(Transition()).extent() == fresh.items(Transition()).extent()
                assert len(list((store.path / "streams/000000/index").iterdir())) == len(head_of(store).parts)


@pytest.mark.usefixtures("_no_syncs")
def test_evicted_rows_are_gone_for_zarr_and_the_others_right(tmp_path):
    zarr = pytest.importorskip("zarr")
    with create(tmp_path) as store:
        appender = Appender(store)
        for _ in range(14):
            appender.episode(900)
            store.flush()
        group = zarr.open_group(str(stream_path(store.path, 0)), mode="r")
        table = store.episodes.to_pylist()
        for row, actions in zip(table, [store.episode(i)["action"] for i in range(len(table))], strict=True):
            rows = slice(row["first_row"], row["first_row"] + row["length"])
            assert (group["action"][rows, 0] == actions).all()
            assert (group["observation"][rows, 0] == image(actions)).all()
        assert not group["action"][:4096].any(), "a file that is gone reads as fill values"


READER = """
import test_eviction as tests
reader = ReplayStore.open(path)
rng = np.random.default_rng(int(sys.argv[2]))
say("begun")
draws = 0
while not (reader.path / "stop").exists():
    for _ in range(5):
        tests.check_batch(reader.sample(32, rng=rng))
        tests.check_batch(reader.sample(32, Transition(frame_stack=3), rng), stack=3)
        draws += 1
    if rng.random() < 0.5:
        reader.refresh()
    if rng.random() < 0.1:
        reader = ReplayStore.open(path)
say(draws)
"""


@pytest.mark.usefixtures("_no_syncs")
def test_readers_beside_an_evicting_writer_see_no_wrong_row_and_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.005)
    rng = np.random.default_rng(0)
    with create(tmp_path) as store, contextlib.ExitStack() as stack:
        appender = Appender(store)
        appender.episodes(30, rng)
        store.flush()
        readers = [stack.enter_context(started(READER, store.path, seed)) for seed in range(4)]
        for reader in readers:
            assert json.loads(reader.stdout.readline()) == "begun"
        while appender.count < 5000:
            appender.episodes(1, rng)
            check_batch(store.sample(8, rng=rng))
        (store.path / "stop").touch()
        for reader in readers:
            output, errors = reader.communicate(timeout=60)
            assert errors == ""
            assert json.loads(output) > 5


@pytest.mark.usefixtures("_no_syncs")
def test_a_dataset_that_is_opened_after_its_rows_were_evicted_says_so(tmp_path):
    rng = np.random.default_rng(0)
    with create(tmp_path) as store:
        appender = Appender(store)
        appender.episodes(40, rng)
        store.flush()
        dataset = ReplayDataset(store.path)
        appender.episodes(400, rng)
        store.flush()
        assert len({int(i) for batch in dataset.loader(64, seed=0) for i in batch["ids"]}) == len(dataset)
        with pytest.raises(SnapshotExpired, match="evicted"):
            pickle.loads(pickle.dumps(dataset))[0]  # as a worker that is not forked has it
        dataset.refresh()
        numbers = np.concatenate([batch["action"] for batch in dataset.loader(64, num_workers=1, seed=0)])
        assert sorted(numbers.tolist()) == actions_of(store)


# ---- verify and repair


@pytest.mark.usefixtures("_no_syncs")
def test_a_damaged_store_with_bounds_is_repaired(tmp_path):
    rng = np.random.default_rng(0)
    with create(tmp_path) as store:
        Appender(store).episodes(200, rng)
    with ReplayStore.open(store.path) as reader:
        before = actions_of(reader)
    shard = sorted((store.path / "streams/000000/observation/c").iterdir(), key=lambda each: int(each.name))[
        -3
    ]
    file = shard / "0/0/0"
    data = bytearray(file.read_bytes())
    data[60] ^= 1
    file.write_bytes(bytes(data))
    findings = list(verify(store.path))
    assert findings
    repair(store.path, findings)
    assert list(verify(store.path)) == []
    with ReplayStore.open(store.path, "a") as store:
        kept = actions_of(store)
        assert set(kept) < set(before)
        assert len(kept) >= len(before) - 2 * 4 - 2
        Appender(store, start=10**6).episodes(100, rng)
        store.flush()
        assert len(store) <= CAPACITY
        assert actions_of(store)[-1] > 10**6
    assert list(verify(store.path)) == []


@pytest.mark.usefixtures("_no_syncs")
def test_what_a_killed_writer_did_not_remove_the_next_one_does(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    with create(tmp_path) as store:
        appender = Appender(store)
        appender.episodes(40, rng)
        monkeypatch.setattr(commit.StreamCommitter, "remove_evicted", lambda self: None)
        appender.episodes(300, rng)
        store.flush()
        found = actions_of(store)
    monkeypatch.undo()
    shards = store.path / "streams/000000/observation/c"
    left = len(list(shards.iterdir()))
    assert list(verify(store.path)) == []
    with ReplayStore.open(store.path, "a") as store:
        assert actions_of(store) == found
        assert len(list(shards.iterdir())) < left / 2
    assert len(list(shards.iterdir())) == len(head_of(store).files["observation"])


# ---- bounds


def test_a_store_without_bounds_has_none_of_it(tmp_path):
    with ReplayStore.create(tmp_path / "store", small_schema()) as store:
        Appender(store).episode(5)
        store.flush()
        assert store.bounds == Bounds()
        assert (
            json.loads((store.path / "zarr.json").read_text())["attributes"]["replaystore"]["format_version"]
            == 1
        )
        assert head_of(store).evicted is None
        assert b"evicted" not in read_head(stream_path(store.path, 0))


def test_bounds_are_kept_with_the_store(tmp_path):
    with create(tmp_path, 1000, capacity_bytes=50_000_000, max_age=3600) as store:
        assert store.schema.file_rows == 1000 // 8
    with ReplayStore.open(store.path) as reader:
        assert reader.bounds == Bounds(1000, 50_000_000, 3600)


WRONG = {
    "capacity": [0, -1, True, 1.5, 2**63, "10", 8 * 16 - 1],
    "capacity_bytes": [0, -5, False, 1e9, 2**63, 1000],
    "max_age": [0, -1.0, float("nan"), float("inf"), True, "1h"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_wrong_bounds_are_refused_and_nothing_is_made(tmp_path, name, value):
    with pytest.raises(UsageError, match=f"^{name}: expected .*got {value!r}$"):
        ReplayStore.create(tmp_path / "store", small_schema(), **{name: value})
    assert not (tmp_path / "store").exists()


def test_files_are_short_enough_for_the_bounds():
    schema = small_schema()
    fitted = fitted_schema(schema, Bounds(capacity=10_000), 1)
    for field in fitted.fields:
        assert fitted.shard_rows(field, 1) <= max(4096, 10_000 // 8)
    assert ring_rows(fitted, Bounds(capacity=10_000), 1) == 1250
    large = fitted_schema(schema, Bounds(capacity=10**9), 1)
    assert large.to_json() == schema.to_json()
    assert fitted_schema(schema, Bounds(max_age=1.0), 1) is schema


FORGED = {
    "rows that are not there": Evicted(10**6, 0, 5),
    "negative": Evicted(-1, 0, 5),
    "other parts": Evicted(0, 3, 5),
}


@pytest.mark.usefixtures("_no_syncs")
@pytest.mark.parametrize("evicted", FORGED.values(), ids=FORGED)
def test_a_forged_eviction_is_refused(tmp_path, evicted, monkeypatch):
    monkeypatch.setattr(commit, "PART_EPISODES", 2)
    with create(tmp_path) as store:
        Appender(store).episodes(5, np.random.default_rng(0))
    head = head_of(store)
    assert head.parts
    stream = stream_path(store.path, 0)
    (stream / HEAD).write_bytes(encode_head(replace(head, evicted=evicted), store.schema))
    shutil.rmtree(stream / "heads")
    with pytest.raises(Exception, match="expected"):
        ReplayStore.open(store.path)
