"""Reservoirs: every episode ever seen is there with the same probability, whatever happens meanwhile."""

import contextlib
import functools
import json
import os
import shutil
import sys
from collections import Counter
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from faulty_disk import NEVER
from reservoirs import CountingStore, deviation, without_disk
from test_eviction import READER, actions_of, check_batch, head_of, image, small_schema
from test_interrupts import interrupt_at
from test_processes import started

from replaystore import (
    CommitError,
    CorruptionError,
    Prioritized,
    ReplayStore,
    SchemaError,
    SnapshotExpired,
    Transition,
    Uniform,
    UsageError,
    commit,
    evictions,
    reservoir,
    writer,
)
from replaystore.arena import stream_path
from replaystore.bounds import Bounds
from replaystore.errors import ForkError, WriterBusy
from replaystore.evictions import EVICTED, FOLDER, Evictions, read_evictions
from replaystore.head import HEAD, Evicted, decode_head, encode_head
from replaystore.recorder import RecordReplay, RecordVectorReplay, schema_from_spaces
from replaystore.repair import repair
from replaystore.room import fitted_schema
from replaystore.verify import verify

CAPACITY = 500
INTERRUPTS = 40
EPISODE = 1000  # numbers of an episode: its transition t has number EPISODE * episode + t


# ---- how even it is, counted over many recordings without a disk


def record_whole(writer, lengths, first=0):
    for name, length in enumerate(lengths, start=first):
        writer.add_episode({"name": name, "length": int(length)}, seed=None, policy=None, columns={})


def record_steps(writer, lengths, num_envs, first=0):
    """Environments that step together; each begins its next episode when the last is over."""
    waiting = list(range(len(lengths)))[::-1]
    name, left = np.full(num_envs, -1), np.zeros(num_envs, np.int64)
    while waiting or left.any():
        mask = left == 0
        for env in np.flatnonzero(mask):
            name[env] = waiting.pop() if waiting else -1
            left[env] = lengths[name[env]] if name[env] >= 0 else 0
        mask &= left > 0
        if mask.any():
            writer.reset(name + first, mask=mask)
        mask = left > 0
        left[mask] -= 1
        writer.step({"terminated": left == 0, "truncated": np.zeros(num_envs, bool)}, mask)


def recorded(begin, runs, lengths, *, num_envs=1, reopen_at=None, whole=True):
    """Which episodes are kept, (runs, episodes), and 1/q at the end, (runs,)."""
    kept, weights = np.zeros((runs, len(lengths))), np.zeros(runs)
    parts = np.split(lengths, [] if reopen_at is None else [reopen_at])
    for run in range(runs):
        store, first = CountingStore(), 0
        for number, part in enumerate(parts):
            recorder = begin(store, np.random.default_rng((run, number)), num_envs)
            if whole:
                record_whole(recorder, part, first)
            else:
                record_steps(recorder, part, num_envs, first)
            first += len(part)
            store.evictions = recorder._evictions
            recorder.close()
            assert sum(stream.evicted.left for stream in store.heads.values() if not stream.is_evicted) <= 300
        kept[run, store.kept()] = 1
        weights[run] = 1 / recorder.admission
    return kept, weights


def uneven(kept, order):
    """How far the parts of episodes in some order are from being kept alike, in standard deviations."""
    parts = np.stack([kept[:, part].mean(axis=1) for part in np.array_split(order, 8)], axis=1)
    return deviation((parts - kept.mean(axis=1, keepdims=True))[:, :-1])


WAYS = {
    "whole episodes": {},
    "whole episodes, closed and opened between": {"reopen_at": 70},
    "steps": {"whole": False},
    "steps of four environments, closed and opened between": {
        "whole": False,
        "num_envs": 4,
        "reopen_at": 130,
    },
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_being_kept_depends_neither_on_when_an_episode_came_nor_on_its_length(monkeypatch, way):
    lengths = np.random.default_rng(0).integers(1, 9, size=200)
    kept, weights = recorded(without_disk(monkeypatch), 800 if "whole" not in way else 300, lengths, **way)
    assert 0.2 < kept.mean() < 0.5
    assert abs(uneven(kept, np.arange(200))) < 4, "by time"
    assert abs(uneven(kept, np.argsort(lengths, kind="stable"))) < 4, "by length"
    stands_for = (kept * weights[:, None]).mean(axis=1)
    assert abs(stands_for.mean() - 1) < 4 * stands_for.std() / np.sqrt(len(kept)), "each kept one is 1/q"


PLANTED = {
    "q is not lowered": lambda evictions: 1.0,
    "q is lowered too late": lambda evictions: float(np.prod(1 - 1 / np.array(evictions.counts[:-3]))),
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_a_reservoir_that_is_uneven_is_found(monkeypatch, planted):
    monkeypatch.setattr(Evictions, "admission", property(planted))
    lengths = np.random.default_rng(0).integers(1, 9, size=200)
    kept, _ = recorded(without_disk(monkeypatch), 800, lengths)
    assert uneven(kept, np.arange(200)) > 6


# ---- the same on disk


class Both:
    """Records the same, with the same random numbers, into a store and into one that only counts."""

    def __init__(self, path, begin, *, num_envs=1, seed=0, capacity=CAPACITY):
        self.num_envs, self.seed, self.capacity, self.begin = num_envs, seed, capacity, begin
        self.path, self.counting, self.names = path, CountingStore(), 0
        self.lengths = {}  # of the episodes that have begun, by name, so far
        self.open = [None] * num_envs
        rngs = self._rngs()
        self.store = ReplayStore.create(
            path, small_schema(), num_envs, capacity, reservoir=True, rng=next(rngs)
        )
        self._begin_counting(next(rngs))

    def _rngs(self):
        self.seed += 1
        return iter([np.random.default_rng(self.seed) for _ in range(2)])

    def _begin_counting(self, rng):
        length = self.store._writer._stream_length
        self.counted = self.begin(self.counting, rng, self.num_envs, self.capacity, length)

    def reopen(self):
        self.store.close()
        self.counting.evictions = self.counted._evictions
        self.counted.close()
        self.open = [None] * self.num_envs
        assert list(verify(self.path)) == []
        rngs = self._rngs()
        self.store = ReplayStore.open(self.path, "a", rng=next(rngs))
        self._begin_counting(next(rngs))

    def episode(self, length):
        name, numbers = self._new(), self.names * EPISODE + np.arange(length)
        numbers = name * EPISODE + np.arange(length)
        last = np.arange(length) == length - 1
        self.store.add_episode(
            observation=image(name * EPISODE + np.arange(length + 1)),
            action=numbers,
            reward=numbers / 2,
            terminated=last,
            truncated=np.zeros(length, bool),
            info={"features": (numbers % 1000).astype("int32")},
        )
        self.lengths[name] = length
        self.counted.add_episode({"name": name, "length": length}, seed=None, policy=None, columns={})

    def step(self, ends, mask=None):
        """A step of the environments of a mask; (num_envs,) of those that end with it."""
        mask = np.ones(self.num_envs, bool) if mask is None else mask
        begins = mask & np.array([name is None for name in self.open])
        if begins.any():
            for env in np.flatnonzero(begins):
                self.open[env] = self._new()
            names = np.array([-1 if name is None else name for name in self.open])
            self.store.reset(self._shaped(image(names * EPISODE)), mask=begins)
            self.counted.reset(names, mask=begins)
        names = np.array([0 if name is None else name for name in self.open])
        numbers = names * EPISODE + np.array([self.lengths.get(name, 0) for name in names])
        flags = np.zeros(self.num_envs, bool)
        self.store.step(
            self._shaped(numbers),
            self._shaped(image(numbers + 1)),
            self._shaped(numbers / 2),
            self._shaped(ends),
            self._shaped(flags),
            info={"features": self._shaped((numbers % 1000).astype("int32"))},
            mask=mask,
        )
        self.counted.step({"terminated": ends, "truncated": flags}, mask)
        for env in np.flatnonzero(mask):
            self.lengths[self.open[env]] += 1
            if ends[env]:
                self.open[env] = None

    def _new(self):
        self.names += 1
        self.lengths[self.names - 1] = 0
        return self.names - 1

    def _shaped(self, values):
        return values if self.num_envs > 1 else values[0]

    def check(self):
        """What the store shows is what was counted: whole episodes, as they were recorded."""
        actions = actions_of(self.store)
        assert len(actions) == len(set(actions)) <= self.capacity
        found = Counter(action // EPISODE for action in actions)
        assert found == {name: self.lengths[name] for name in self.counting.kept()}
        self.store.check()
        assert self.store.admission == self.counted.admission
        if actions:
            check_batch(self.store.sample(20, Transition(frame_stack=3)), stack=3)


@pytest.mark.usefixtures("_no_syncs")
def test_a_store_keeps_the_episodes_that_were_counted(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    both = Both(tmp_path / "store", without_disk(monkeypatch))
    for turn in range(40):
        for _ in range(int(rng.integers(1, 6))):
            both.episode(int(rng.integers(1, 25)))
        for _ in range(int(rng.integers(0, 40))):
            both.step(rng.random(1) < 0.08)
        while both.open[0] is not None:
            both.step(rng.random(1) < 0.2)
        if turn % 3 == 0:
            both.check()
        if turn % 20 == 10:
            both.reopen()
            both.check()
    assert both.store.admission < 0.6
    both.store.close()
    assert list(verify(both.path)) == []


@pytest.mark.usefixtures("_no_syncs")
def test_environments_that_step_apart_are_each_recorded_for_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.02)
    rng = np.random.default_rng(1)
    both = Both(tmp_path / "store", without_disk(monkeypatch), num_envs=3, capacity=900)
    writers = set()
    for turn in range(2000):
        both.step(rng.random(3) < [0.05, 0.1, 0.011], rng.random(3) < [0.9, 0.5, 1.0])
        writers.add(len(both.store._view.writers))
        if turn % 200 == 0:
            both.check()
        if turn % 900 == 899:
            both.reopen()
    both.check()
    assert writers >= {1, 2}, "episodes go on in a stream while the next is filled"
    assert both.store.admission < 0.5
    both.store.close()
    assert list(verify(both.path)) == []


def create(tmp_path, *, seed=0, num_envs=1, capacity=CAPACITY):
    rng = np.random.default_rng(seed)
    return ReplayStore.create(tmp_path / "store", small_schema(), num_envs, capacity, reservoir=True, rng=rng)


def fill(store, episodes, *, length=20, start=0):
    """Add episodes whose transitions have numbers that go on."""
    for number in range(start, start + episodes):
        numbers = number * EPISODE + np.arange(length)
        flags = numbers == numbers[-1]
        store.add_episode(
            observation=image(number * EPISODE + np.arange(length + 1)),
            action=numbers,
            reward=numbers / 2,
            terminated=flags,
            truncated=flags & False,
            info={"features": (numbers % 1000).astype("int32")},
        )


def evicted_streams(store):
    return {stream for stream in store._view.heads if head_of(store, stream).is_evicted}


@pytest.mark.usefixtures("_no_syncs")
def test_an_evicted_stream_leaves_no_rows_and_ids_stay(tmp_path):
    with create(tmp_path) as store:
        fill(store, 10)
        ids = store.read(np.arange(len(store))).ids
        known = dict(zip(ids.tolist(), actions_of(store), strict=True))
        fill(store, 70, start=10)
        numbers = store.items(Transition()).numbers(np.array(list(known)))
        left = store.read(numbers[numbers >= 0])
        assert 0 < len(left.action) < len(known)
        assert [known[i] for i in left.ids.tolist()] == left.action.tolist()
        evicted = evicted_streams(store)
        assert len(evicted) > 5
        for stream in evicted:
            path = stream_path(store.path, stream)
            assert not [each for name in store.schema.by_name for each in path.glob(f"{name}/c/*")]
            assert len(list((path / "heads").iterdir())) == 1
        assert store.episodes["length"].to_numpy().sum() == len(store)
    with ReplayStore.open(store.path) as reader:
        assert actions_of(reader) == actions_of(reader)
        assert reader.admission == read_evictions(store.path, reader._view.heads).admission < 0.6


@pytest.mark.usefixtures("_no_syncs")
def test_samplers_go_on_while_streams_are_evicted(tmp_path):
    rng, prioritized, epoch = np.random.default_rng(0), Prioritized(), Uniform(replace=False, seed=1)
    with create(tmp_path) as store:
        fill(store, 20)
        pass_ = []
        for start in range(20, 80, 4):
            fill(store, 4, start=start)
            batch = store.sample(30, sampler=prioritized, rng=rng)
            check_batch(batch)
            prioritized.update_priorities(batch.ids, rng.random(30))
            prioritized.check()
            pass_ += store.sample(15, sampler=epoch, rng=rng).action.tolist()
        counts = Counter(store.sample(40_000, rng=rng).action.tolist())
        kept = actions_of(store)
        assert counts.keys() <= set(kept)
        expected = 40_000 / len(kept)
        chi = sum((counts[action] - expected) ** 2 for action in kept) / expected
        assert abs(chi - len(kept)) < 4 * np.sqrt(2 * len(kept)), "uniform over what is kept"


@pytest.mark.usefixtures("_no_syncs")
def test_a_reader_keeps_its_commit_and_moves_on_when_it_refreshes(tmp_path):
    with create(tmp_path) as store:
        fill(store, 20)
        store.flush()
        with ReplayStore.open(store.path) as reader:
            held, snapshot = actions_of(reader), reader.snapshot
            fill(store, 60, start=20)
            store.flush()
            assert actions_of(reader) == held, "what is mapped stays"
            with pytest.raises(SnapshotExpired, match="evicted"):
                ReplayStore.open(store.path, heads=snapshot)
            reader.refresh()
            assert sorted(actions_of(reader)) == sorted(actions_of(store))
            reader.check()
            check_batch(reader.sample(50))
            fill(store, 30, start=80)
            store.flush()
            reader.refresh()
            assert sorted(actions_of(reader)) == sorted(actions_of(store))


@pytest.mark.usefixtures("_no_syncs")
def test_wrapped_environments_record_into_a_reservoir(tmp_path):
    env = gymnasium.make("CartPole-v1")
    schema = schema_from_spaces(env.observation_space, env.action_space)
    ReplayStore.create(tmp_path / "store", schema, capacity=CAPACITY, reservoir=True).close()
    for envs, record in (
        (env, RecordReplay),
        (gymnasium.make_vec("CartPole-v1", 3, vectorization_mode="sync"), RecordVectorReplay),
    ):
        recorder = record(envs, tmp_path / "store")
        recorder.reset(seed=0)
        for _ in range(600):
            _, _, terminated, truncated, _ = recorder.step(recorder.action_space.sample())
            if record is RecordReplay and (terminated or truncated):
                recorder.reset()
        assert 0 < len(recorder.store) <= CAPACITY
        assert recorder.store.admission < 1
        recorder.close()
    assert list(verify(tmp_path / "store")) == []


@pytest.mark.usefixtures("_no_syncs")
def test_readers_beside_a_reservoir_see_no_wrong_row_and_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.005)
    with create(tmp_path) as store, contextlib.ExitStack() as stack:
        fill(store, 10)
        store.flush()
        readers = [stack.enter_context(started(READER, store.path, seed)) for seed in range(2)]
        for reader in readers:
            assert json.loads(reader.stdout.readline()) == "begun"
        for start in range(10, 80):
            fill(store, 1, start=start)
            check_batch(store.sample(8))
        assert store.admission < 1
        (store.path / "stop").touch()
        for reader in readers:
            output, errors = reader.communicate(timeout=60)
            assert errors == ""
            assert json.loads(output) > 5


# ---- what is not recorded is checked all the same


@pytest.mark.usefixtures("_no_syncs")
def test_an_episode_that_is_not_recorded_is_checked_as_ever(tmp_path, monkeypatch):
    features = {"features": np.int32(0)}
    with create(tmp_path) as store:
        monkeypatch.setattr(Evictions, "admission", 0.0)
        with pytest.raises(UsageError, match="step before reset"):
            store.step(0, image(1), 0.0, False, False, info=features)
        with pytest.raises(SchemaError, match="observation"):
            store.reset(np.zeros(3, np.uint8))
        with pytest.raises(SchemaError, match="policy"):
            store.reset(image(0), policy=3)
        with pytest.raises(SchemaError, match="columns"):
            store.reset(image(0), columns={"level": 3})
        with pytest.raises(SchemaError, match="truncated"):
            store.add_episode(action=[0], reward=[0.0])
        store.reset(image(0))
        with pytest.raises(SchemaError, match="action"):
            store.step("left", image(1), 0.0, False, False, info=features)
        with pytest.raises(UsageError, match="while an episode is open"):
            fill(store, 1)
        store.step(0, image(1), 0.0, False, True, info=features)
        with pytest.raises(UsageError, match="step before reset"):
            store.step(0, image(1), 0.0, False, False, info=features)
        fill(store, 3)
        store.flush()
        assert len(store) == store.num_episodes == 0
        assert head_of(store, store._writer.number).rows.max() == 0


@pytest.mark.usefixtures("_no_syncs")
def test_open_episodes_that_the_capacity_cannot_hold_are_refused_and_others_go_on(tmp_path):
    with create(tmp_path) as store:
        fill(store, 20)
        with pytest.raises(UsageError, match="capacity of 500 transitions"):
            fill(store, 1, length=501)
        features = {"features": np.int32(0)}

        def record_until_refused():
            for number in range(10**6):  # until an episode is admitted and spared
                if number % 501 == 0:
                    store.reset(image(number))
                store.step(number, image(number + 1), number / 2, False, False, info=features)

        with pytest.raises(UsageError, match="end them sooner"):
            record_until_refused()
        store.check()
        store.reset(image(0))
        store.step(0, image(1), 0.0, True, False, info=features)
        fill(store, 20, start=20)
        assert 0 < len(store) <= CAPACITY


# ---- one writer, failures, crashes


@pytest.mark.usefixtures("_no_syncs")
def test_a_second_writer_is_refused_and_may_come_later(tmp_path):
    with create(tmp_path) as store:
        fill(store, 3)
        with pytest.raises(WriterBusy, match="one writer at a time"):
            ReplayStore.open(store.path, "a")
        store.checkpoint("here", {"step": 3})
    with pytest.raises(UsageError, match="reservoir"):
        ReplayStore.open(store.path, "a", at="here")
    with ReplayStore.open(store.path, "a", num_envs=2) as second:
        assert second.restore("here") == {"step": 3}
        assert len(second) == 60
        assert second._writer.number == 3, "a stream of its own for two environments"


@pytest.mark.usefixtures("_no_syncs")
def test_a_forked_child_can_read_but_neither_record_nor_evict(tmp_path):
    with create(tmp_path) as store:
        fill(store, 24)
        child = os.fork()
        if child == 0:
            try:
                check_batch(store.sample(5))
                with pytest.raises(ForkError):
                    fill(store, 2, start=24)
                with pytest.raises(ForkError):
                    store.flush()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        fill(store, 30, start=24)
        store.check()


@pytest.mark.usefixtures("_no_syncs")
@pytest.mark.parametrize("place", ["write_evictions", "evict_stream", "read_head"])
def test_an_eviction_that_fails_is_finished_by_the_next_call(tmp_path, monkeypatch, place):
    original, failing = getattr(reservoir, place), [False]

    def fail(*arguments):
        if failing[0]:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(reservoir, place, fail)
    with create(tmp_path) as store:
        fill(store, 25)
        for start in range(25, 75):
            failing[0] = True
            try:
                fill(store, 1, start=start)
            except CommitError:
                named = len(store._writer._evictions.streams)
                failing[0] = False
                fill(store, 1, start=start)
                assert len(store._writer._evictions.streams) >= named
            failing[0] = False
            assert len(store) <= CAPACITY
        store.check()
        assert named > 5
        kept = sorted(actions_of(store))
        admission = store.admission
    assert list(verify(store.path)) == []
    with ReplayStore.open(store.path, "a") as store:
        assert sorted(actions_of(store)) == kept
        assert store.admission == admission
        assert evicted_streams(store) == set(store._writer._evictions.streams)


@pytest.mark.usefixtures("_no_syncs")
def test_after_a_kill_at_any_point_of_an_eviction_it_is_finished(tmp_path, monkeypatch):
    states = []

    def keep(where, function):
        def kept(*arguments):
            found = function(*arguments)
            if sum(each == where for each, _, _ in states) < 2:
                copy = tmp_path / f"copy{len(states)}"
                shutil.copytree(store.path, copy, ignore=shutil.ignore_patterns("*.partial"))
                states.append((where, copy, store._writer._evictions))
            return found

        return kept

    store = create(tmp_path)
    fill(store, 30)
    monkeypatch.setattr(reservoir, "write_evictions", keep("named", reservoir.write_evictions))
    monkeypatch.setattr(commit, "write_head", keep("head", commit.write_head))
    monkeypatch.setattr(reservoir, "evict_stream", keep("evicted", reservoir.evict_stream))
    monkeypatch.setattr(reservoir, "read_head", keep("shown", reservoir.read_head))
    fill(store, 40, start=30)
    monkeypatch.undo()
    store.close()
    assert {where for where, _, _ in states} == {"named", "head", "evicted", "shown"}
    for where, copy, before in states:
        with ReplayStore.open(copy, "a") as again:
            again.check()
            actions = actions_of(again)
            assert len(actions) == len(set(actions)) <= CAPACITY
            found = again._writer._evictions
            assert found.streams[: len(before.streams)] == before.streams, where
            assert len(found.streams) == len(before.streams) + (where == "named")
            assert evicted_streams(again) == set(found.streams)
            assert again.admission == found.admission
            fill(again, 3, start=100)
        assert list(verify(copy)) == []


@pytest.mark.usefixtures("_no_syncs")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a writer not yet attached
def test_after_an_interrupt_at_any_line_a_reservoir_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "COMMIT_SECONDS", NEVER)
    rng, interrupted = np.random.default_rng(0), set()
    with create(tmp_path) as store:
        fill(store, 25)
        for start in range(25, 25 + 4 * INTERRUPTS, 4):
            number = int(rng.integers(1, 900))
            call = functools.partial(fill, store, 3, start=start)
            # between the opening of a file and its first use Python gives no way not to leak it
            interrupted.add(interrupt_at(number, call, again=False, but="files.py"))
            fill(store, 1, start=start + 3)
            assert len(store) <= CAPACITY
            if len(interrupted) % 10 == 0:
                store.check()
                actions = actions_of(store)
                assert len(actions) == len(set(actions)) == len(store)
        assert len(interrupted) > INTERRUPTS / 2
        kept = sorted(actions_of(store))
    assert list(verify(store.path)) == []
    with ReplayStore.open(store.path, "a") as store:
        assert sorted(actions_of(store)) == kept
        assert evicted_streams(store) == set(store._writer._evictions.streams)


# ---- the file of evictions


@pytest.mark.usefixtures("_no_syncs")
def test_evictions_that_are_damaged_or_lost_are_noticed(tmp_path):
    with create(tmp_path) as store:
        fill(store, 35)
    path = store.path / FOLDER / EVICTED
    data = path.read_bytes()
    pairs = json.loads(data)["evicted"]
    assert pairs
    for damaged in (
        data[:-3],
        data.replace(b"[[", b"[[1"),
        b"[]",
        b'{"evicted": 3}',
        b'{"crc32c": "00000000", "evicted": []}',
        evictions._encode(Evictions((1, 1), (3, 3))),
        evictions._encode(Evictions((1,), (1,))),
        evictions._encode(
            Evictions(tuple(stream for stream, _ in pairs[1:]), tuple(n for _, n in pairs[1:]))
        ),
    ):
        path.write_bytes(damaged)
        with pytest.raises(CorruptionError, match=r"evicted\.json"):
            ReplayStore.open(store.path, "a")
        assert any(finding.path == path for finding in verify(store.path))
    path.unlink()
    with pytest.raises(CorruptionError, match="take the file from a copy"):
        ReplayStore.open(store.path, "a")
    with ReplayStore.open(store.path) as reader:
        check_batch(reader.sample(20))
    path.write_bytes(data)
    assert list(verify(store.path)) == []


@pytest.mark.usefixtures("_no_syncs")
def test_a_damaged_reservoir_is_repaired_and_goes_on(tmp_path):
    with create(tmp_path) as store:
        fill(store, 50)
        kept, admission = set(actions_of(store)), store.admission
        evicted = evicted_streams(store)
        assert evicted
        stream = min(set(store._view.heads) - evicted)
    shard = stream_path(store.path, stream) / "observation/c/0/0/0/0"
    data = bytearray(shard.read_bytes())
    data[60] ^= 1
    shard.write_bytes(bytes(data))
    (stream_path(store.path, min(evicted)) / HEAD).write_bytes(b"damaged")
    findings = list(verify(store.path))
    assert {finding.stream for finding in findings} >= {stream, min(evicted)}
    repair(store.path, findings)
    assert list(verify(store.path)) == []
    with ReplayStore.open(store.path, "a") as store:
        left = set(actions_of(store))
        assert left < kept
        assert len(left) > len(kept) - 20
        assert store.admission == admission
        assert evicted_streams(store) == evicted
        fill(store, 20, start=50)
        store.check()


FORGED = {"above a stream that has episodes": (10**5, 0), "without end": (1 << 41, 1)}


@pytest.mark.usefixtures("_no_syncs")
@pytest.mark.parametrize(("floor", "is_emptied"), FORGED.values(), ids=FORGED)
def test_a_forged_eviction_of_a_stream_is_refused(tmp_path, floor, is_emptied):
    with create(tmp_path) as store:
        fill(store, 1)
    head, path = head_of(store), stream_path(store.path, 0)
    head = replace(head, evicted=Evicted(floor, 0, 0), files={name: {} for name in head.files})
    if is_emptied:
        head = replace(head, episodes=head.episodes.slice(0, 0))
    with pytest.raises(CorruptionError, match="expected eviction within"):
        decode_head(encode_head(head, store.schema), store.schema, path / HEAD)


# ---- bounds


def test_a_reservoir_is_kept_with_the_store_and_other_stores_say_nothing_of_it(tmp_path):
    with create(tmp_path) as store:
        assert store.bounds == Bounds(capacity=CAPACITY, reservoir=True)
        assert store.admission == 1.0
    with ReplayStore.open(store.path) as reader:
        assert reader.bounds == store.bounds
        assert reader.admission == 1.0
    with ReplayStore.create(tmp_path / "bounded", small_schema(), capacity=CAPACITY) as other:
        assert other.admission == 1.0
        assert b"reservoir" not in (other.path / "zarr.json").read_bytes()
        assert not (other.path / FOLDER).exists()


WRONG = [
    {"reservoir": True},
    {"reservoir": True, "capacity": 500, "capacity_bytes": 10**8},
    {"reservoir": True, "capacity": 500, "max_age": 10.0},
    {"reservoir": 1, "capacity": 500},
    {"rng": 3, "reservoir": True, "capacity": 500},
]


@pytest.mark.parametrize("arguments", WRONG, ids=str)
def test_wrong_reservoirs_are_refused(tmp_path, arguments):
    with pytest.raises(UsageError, match="expected"):
        ReplayStore.create(tmp_path / "store", small_schema(), **arguments)


def test_a_stream_of_a_reservoir_fits_into_one_file():
    fitted = fitted_schema(small_schema(), Bounds(capacity=320_000, reservoir=True), 1)
    assert all(fitted.shard_rows(field, 1) <= 12_288 for field in fitted.fields)
