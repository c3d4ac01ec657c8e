import errno
import gc
import json
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from test_processes import (
    actions_of,
    check_counted,
    counting_schema,
    image,
    numbers_below,
    python,
    record,
    started,
)
from test_windows import FLAGS

from replaystore import (
    ClosedError,
    Field,
    ReplayStore,
    Schema,
    Transition,
    UsageError,
)
from replaystore import commit as commit_module
from replaystore.catalog import Catalog
from replaystore.commit import StreamCommitter
from replaystore.errors import CommitError, CorruptionError, ReadOnlyError, StoreGone
from replaystore.index import EpisodeIndex
from replaystore.writer import StreamWriter

pytestmark = pytest.mark.usefixtures("_no_syncs")

NEVER = 1e6


def small_schema(**kwargs):
    """Scalars only: the action tells a transition from every other."""
    observation, action = Field("observation", (), "int64"), Field("action", (), "int64")
    return Schema([observation, action, Field("reward", (), "float64"), *FLAGS], **kwargs)


def small_episode(first, length):
    """Arrays of an episode whose actions count from `first`."""
    actions = np.arange(first, first + length)
    return {
        "observation": np.arange(first, first + length + 1),
        "action": actions,
        "reward": actions.astype(float),
        "terminated": np.arange(length) == length - 1,
        "truncated": np.zeros(length, bool),
    }


def counted_episode(first, length):
    """As `record` would append it, but as long as wanted: actions and images count up."""
    numbers = np.arange(first, first + length)
    return {
        "observation": np.stack([image(i) for i in range(first, first + length + 1)]),
        "action": numbers + 1,
        "reward": numbers + 1.0,
        "terminated": np.zeros(length, bool),
        "truncated": np.zeros(length, bool),
    }


# ---- opening and closing


def test_a_new_store_is_empty(tmp_path):
    with ReplayStore.create(tmp_path / "store", small_schema()) as store:
        assert (len(store), store.num_episodes, len(store.episodes)) == (0, 0, 0)
        store.check()
    with ReplayStore.open(tmp_path / "store") as store:
        assert (len(store), store.num_episodes, len(store.episodes)) == (0, 0, 0)


def test_a_store_can_be_created_in_an_empty_directory(tmp_path):
    with ReplayStore.create(tmp_path, small_schema()) as store:
        store.add_episode(**small_episode(0, 1))
    with ReplayStore.open(tmp_path) as store:
        assert len(store) == 1


def test_a_path_may_be_relative_and_the_working_directory_may_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ReplayStore.create("store", small_schema()) as store:
        monkeypatch.chdir("/")
        store.add_episode(**small_episode(0, 3))
    with ReplayStore.open(tmp_path / "store") as store:
        assert len(store) == 3


def test_a_store_may_be_moved(tmp_path):
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        record(store, range(50))
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    with ReplayStore.open(tmp_path / "elsewhere", "a") as store:
        assert actions_of(store) == numbers_below(50)


def test_leaving_the_with_block_by_an_exception_keeps_the_rows_and_the_exception(tmp_path):
    class OwnError(Exception):
        pass

    def fail():
        with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
            record(store, range(30))
            raise OwnError

    with pytest.raises(OwnError):
        fail()
    with ReplayStore.open(tmp_path / "store") as store:
        assert actions_of(store) == numbers_below(30)


def test_closing_twice_is_closing_once(tmp_path):
    for mode in ("a", "r"):
        store = ReplayStore.create(tmp_path / mode, small_schema())
        store.close()
        store = ReplayStore.open(tmp_path / mode, mode)
        store.close()
        store.close()


def test_an_open_episode_is_cut_short_by_close(tmp_path):
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        record(store, range(25))
    with ReplayStore.open(tmp_path / "store", "a") as store:
        assert store.episodes["length"].to_pylist() == [19, 4]
        assert store.episodes["terminated"].to_pylist() == [True, False]
        assert store.episodes["truncated"].to_pylist() == [False, False]
        with pytest.raises(UsageError, match="step before reset"):
            store.step(0, image(0), 0.0, False, False)


CALLS = {
    "reset": lambda store: store.reset(0),
    "step": lambda store: store.step(0, 1, 0.0, False, False),
    "add_episode": lambda store: store.add_episode(**small_episode(0, 1)),
    "flush": lambda store: store.flush(),
    "refresh": lambda store: store.refresh(),
    "sample": lambda store: store.sample(1),
    "read": lambda store: store.read(np.arange(1)),
    "len": len,
    "episodes": lambda store: store.episodes,
    "episode": lambda store: store.episode(0),
    "num_episodes": lambda store: store.num_episodes,
    "check": lambda store: store.check(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mode", ["r", "a"])
def test_a_closed_store_says_so(tmp_path, mode, call):
    with ReplayStore.create(tmp_path / "store", small_schema()) as store:
        store.add_episode(**small_episode(0, 2))
    store = ReplayStore.open(tmp_path / "store", mode)
    store.close()
    with pytest.raises(ClosedError, match="closed"):
        CALLS[call](store)


@pytest.mark.parametrize("call", ["reset", "step", "add_episode", "flush"])
def test_a_store_opened_to_read_cannot_be_written(tmp_path, call):
    with ReplayStore.create(tmp_path / "store", small_schema()) as store:
        store.add_episode(**small_episode(0, 2))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with ReplayStore.open(tmp_path / "store") as store:
        with pytest.raises(ReadOnlyError, match='"a"'):
            CALLS[call](store)
        assert len(store) == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_refreshing_a_deleted_store_says_that_it_is_gone(tmp_path):
    with ReplayStore.create(tmp_path / "store", small_schema()) as store:
        store.add_episode(**small_episode(0, 2))
    with ReplayStore.open(tmp_path / "store") as store:
        (tmp_path / "store").rename(tmp_path / "elsewhere")
        with pytest.raises(StoreGone, match="no longer there"):
            store.refresh()
        assert store.read(np.arange(2)).action.tolist() == [0, 1]


def test_files_that_are_not_the_stores_are_left_alone(tmp_path):
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        record(store, range(50))
    streams = tmp_path / "store" / "streams"
    (streams / ".DS_Store").write_text("x")
    (streams / "lost+found").mkdir()
    (streams / "000000" / "notes.txt").write_text("mine")
    (streams / "000000" / "head.arrow.1-2.partial").write_text("left by a writer that was killed")
    with ReplayStore.open(tmp_path / "store", "a") as store:
        record(store, range(60, 80))
        assert store.num_episodes == 4
    assert (streams / "000000" / "notes.txt").read_text() == "mine"


def test_a_store_that_is_dropped_says_so_and_gives_its_stream_back(tmp_path):
    def drop():
        store = ReplayStore.create(tmp_path / "store", counting_schema())
        record(store, range(30))
        store.flush()
        record(store, range(30, 40))
        del store
        gc.collect()

    with pytest.warns(ResourceWarning, match="the store was not closed"):
        drop()
    with ReplayStore.open(tmp_path / "store", "a") as store:
        assert actions_of(store) == numbers_below(30), "dropping a store commits nothing"
        record(store, range(40, 60))
        assert set(store.episodes["stream"].to_pylist()) == {0}
    for thread in threading.enumerate():
        if thread.name == "replaystore-commit":
            thread.join()


def test_nothing_is_committed_before_the_last_chunk_is_in_memory_again(tmp_path, monkeypatch):
    info = Field("info", (30, 30), "uint8", chunk_rows=4)
    schema = Schema([*counting_schema().fields, info])
    with ReplayStore.create(tmp_path / "store", schema) as store:
        store.reset(image(0))
        for i in range(1, 7):
            store.step(i, image(i), float(i), False, False, info=image(i))
        store.flush()
        shutil.copytree(tmp_path / "store", tmp_path / "killed")  # an episode is open
    original = StreamWriter.refill

    def refill(writer, *arguments):
        time.sleep(0.1)  # in which the background thread may commit, if it was begun too soon
        original(writer, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr("replaystore.writer.COMMIT_SECONDS", 0.001)
        patched.setattr(StreamWriter, "refill", refill)
        ReplayStore.open(tmp_path / "killed", "a").close()
    with ReplayStore.open(tmp_path / "killed") as store:
        assert (store.episode(0)["info"] == np.stack([image(i) for i in range(1, 7)])).all()
        assert (store.episode(0)["observation"] == np.stack([image(i) for i in range(7)])).all()


def test_a_store_whose_last_chunk_is_damaged_is_not_opened_for_writing(tmp_path):
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        record(store, range(6))
    path = tmp_path / "store/streams/000000/observation/c/0/0/0/0"
    data = bytearray(path.read_bytes())
    offset = int.from_bytes(data[-(16 * 8 + 4) + 16 :][:8], "little")  # of chunk 1, in the index of 8
    data[offset + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptionError, match=f"{path}: chunk 1"):
        ReplayStore.open(tmp_path / "store", "a")
    with ReplayStore.open(tmp_path / "store") as store:
        assert store.read(np.arange(3)).action.tolist() == [1, 2, 3]
        with pytest.raises(CorruptionError, match=f"{path}: chunk 1"):
            store.read(np.arange(5))


# ---- what is there


def test_episodes_hold_what_was_said_of_them(tmp_path):
    schema = small_schema(columns={"level": "int64", "note": "string", "win": "bool", "score": "float64"})
    with ReplayStore.create(tmp_path / "store", schema) as store:
        columns = {"level": 3, "note": "grüße", "win": True, "score": 0.5}
        store.reset(0, seed=7, policy="ε-greedy", columns=columns)
        store.step(0, 1, 0.25, False, False)
        store.step(0, 1, 0.5, False, True)
        store.add_episode(**small_episode(0, 3), seed=2**63 - 1, columns={"level": -(2**63)})
        store.reset(0)
        store.step(0, 1, 2.0, False, False)
        shown = [store.episodes.drop_columns(["start_time"]).to_pylist()]
        started = store.episodes["start_time"]
    with ReplayStore.open(tmp_path / "store") as store:
        shown.append(store.episodes.drop_columns(["start_time"]).to_pylist())
        assert store.episodes["start_time"].equals(started)
    none = dict.fromkeys(["seed", "policy", "level", "note", "win", "score"])
    same = {"stream": 0, "env": 0, "terminated": False, "truncated": False}
    expected = [
        same
        | columns
        | {"first_row": 0, "length": 2, "truncated": True, "return": 0.75, "seed": 7, "policy": "ε-greedy"},
        same
        | none
        | {"first_row": 3, "length": 3, "terminated": True, "return": 3.0, "seed": 2**63 - 1}
        | {"level": -(2**63)},
        same | none | {"first_row": 7, "length": 1, "return": 2.0},
    ]
    assert shown == [expected, expected]
    assert abs(started[0].as_py().timestamp() - time.time()) < 3600


def test_numpy_values_and_one_value_for_each_environment_fill_the_columns(tmp_path):
    schema = small_schema(columns={"level": "int64", "note": "string"})
    with ReplayStore.create(tmp_path / "store", schema, num_envs=2) as store:
        columns = {"level": np.array([5, 6], np.int32), "note": ["a", None]}
        store.reset(np.zeros(2, int), seed=[3, None], columns=columns)
        store.step(np.zeros(2, int), np.ones(2, int), np.ones(2), np.ones(2, bool), np.zeros(2, bool))
        assert store.episodes.select(["level", "note", "seed"]).to_pylist() == [
            {"level": 5, "note": "a", "seed": 3},
            {"level": 6, "note": None, "seed": None},
        ]


def test_one_seed_counts_up_over_the_environments(tmp_path):
    with ReplayStore.create(tmp_path / "store", small_schema(), num_envs=3) as store:
        store.reset(np.zeros(3, int), seed=np.int64(40))
        store.step(np.zeros(3, int), np.ones(3, int), np.ones(3), np.ones(3, bool), np.zeros(3, bool))
        assert store.episodes["seed"].to_pylist() == [40, 41, 42]


def test_an_episode_without_transitions_is_none(tmp_path):
    with ReplayStore.create(tmp_path / "store", small_schema()) as store:
        store.reset(0)
        store.reset(5)
        assert (len(store), store.num_episodes, len(store.episodes)) == (0, 0, 0)
        store.flush()
        with ReplayStore.open(tmp_path / "store") as reader:
            assert (len(reader), reader.num_episodes, len(reader.episodes)) == (0, 0, 0)
        store.step(1, 6, 0.0, True, False)
        assert store.episodes["length"].to_pylist() == [1]
        assert store.sample(1).observation.tolist() == [5]


def test_episodes_are_numbered_from_both_ends(tmp_path):
    with ReplayStore.create(tmp_path / "store", small_schema()) as store:
        for length in (3, 1, 4):
            store.add_episode(**small_episode(10 * length, length))
        for opened in (store, ReplayStore.open(tmp_path / "store")):
            opened_store = opened
            if opened is not store:
                store.flush()
                opened.refresh()
            for number, length in enumerate((3, 1, 4)):
                for i in (number, number - 3, np.int64(number)):
                    arrays = opened_store.episode(i)
                    assert arrays.keys() == set(store.schema.tops)
                    for name, expected in small_episode(10 * length, length).items():
                        assert arrays[name].tolist() == expected.tolist()
            if opened is not store:
                opened.close()


def test_nbytes_counts_the_disk_blocks_and_grows(tmp_path):
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        empty = store.nbytes
        record(store, range(400))
        store.flush()
        blocks = sum(
            path.lstat().st_blocks * 512 for path in [tmp_path / "store", *(tmp_path / "store").rglob("*")]
        )
        assert empty < store.nbytes == blocks


def test_rows_are_sampled_before_they_are_committed(tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", NEVER)
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        for i in range(100):
            record(store, [i])
            assert actions_of(store) == numbers_below(i + 1)
        with ReplayStore.open(tmp_path / "store") as reader:
            assert len(reader) == 0
        assert set(store.sample(2000, rng=np.random.default_rng(0)).action) == set(numbers_below(100))


def test_rows_are_committed_by_themselves(tmp_path):
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        record(store, range(30))
        waiting = """
import time
with ReplayStore.open(path) as store:
    for _ in range(300):
        store.refresh()
        if len(store):
            break
        time.sleep(0.1)
    say(store.read(np.arange(len(store))).action.tolist())
"""
        assert python(waiting, tmp_path / "store") == numbers_below(30)


def test_samples_are_the_generators(tmp_path):
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        record(store, range(100))
        draws = [store.sample(50, rng=np.random.default_rng(3)).action.tolist() for _ in range(2)]
        assert draws[0] == draws[1]
        assert store.sample(50).action.tolist() != store.sample(50).action.tolist()


def test_ids_name_a_transition_for_good(tmp_path):
    def ids(store):
        batch = store.read(np.arange(len(store)))
        return dict(zip(batch.action.tolist(), batch.ids.tolist(), strict=True))

    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        record(store, range(30))
        first = ids(store)
        assert len(set(first.values())) == len(first)
        with ReplayStore.open(tmp_path / "store", "a") as other:
            record(other, range(1000, 1030))
            other.flush()
            record(store, range(30, 60))
            store.flush()
            store.refresh()
            assert ids(store).items() >= first.items()
            assert len(set(ids(store).values())) == len(store)
        store.flush()
    with ReplayStore.open(tmp_path / "store") as store:
        assert ids(store).items() >= first.items()


# ---- several streams, several sessions


def test_two_writers_at_once_get_two_streams(tmp_path):
    with (
        ReplayStore.create(tmp_path / "store", counting_schema()) as one,
        ReplayStore.open(tmp_path / "store", "a") as two,
    ):
        record(one, range(50))
        record(two, range(100, 140))
        assert actions_of(one) == numbers_below(50), "only its own before a refresh"
        one.flush()
        two.flush()
        both = sorted(numbers_below(50) + [i for i in range(100, 140) if i % 20])
        for store in (one, two):
            store.refresh()
            assert sorted(actions_of(store)) == both
            assert set(store.episodes["stream"].to_pylist()) == {0, 1}
            store.check()
    with ReplayStore.open(tmp_path / "store", "a") as store:
        assert sorted(actions_of(store)) == both
        record(store, range(200, 220))
    assert len(list((tmp_path / "store" / "streams").glob("0*"))) == 2, "a free stream is taken up again"


def test_streams_of_different_numbers_of_environments_live_together(tmp_path):
    with ReplayStore.create(tmp_path / "store", small_schema(), num_envs=3) as store:
        store.reset(np.arange(3))
        store.step(np.arange(3), np.arange(3) + 1, np.ones(3), np.ones(3, bool), np.zeros(3, bool))
    with ReplayStore.open(tmp_path / "store", "a", num_envs=1) as store:
        store.add_episode(**small_episode(10, 2))
        store.add_episode(**small_episode(20, 2))
    with ReplayStore.open(tmp_path / "store", "a", num_envs=3) as store:
        store.reset(np.arange(3))
        store.step(np.arange(3) + 30, np.arange(3) + 1, np.ones(3), np.ones(3, bool), np.zeros(3, bool))
        assert set(store.read(np.arange(len(store))).action) == {0, 1, 2, 10, 11, 20, 21, 30, 31, 32}
        assert store.episodes["stream"].to_pylist() == [0] * 6 + [1] * 2
        assert store.episodes["env"].to_pylist() == [0, 1, 2, 0, 1, 2, 0, 0]


def test_by_default_the_newest_stream_is_continued(tmp_path):
    with ReplayStore.create(tmp_path / "store", small_schema(), num_envs=1) as store:
        store.add_episode(**small_episode(0, 1))
    ReplayStore.open(tmp_path / "store", "a", num_envs=2).close()
    with ReplayStore.open(tmp_path / "store", "a") as store:
        store.reset(np.zeros(2, int))
        store.step(np.zeros(2, int), np.ones(2, int), np.ones(2), np.ones(2, bool), np.zeros(2, bool))
        assert store.episodes["stream"].to_pylist() == [0, 1, 1]


APPEND = """
with ReplayStore.open(path, "a") as store:
    before = len(store)
    for i in range(int(sys.argv[2]), int(sys.argv[3])):
        store.reset(image(i)) if i % 20 == 0 else store.step(i, image(i), float(i), i % 20 == 19, False)
    say([before, len(store), store.episodes["stream"].to_pylist()])
"""
SAMPLE = """
with ReplayStore.open(path) as store:
    rng = np.random.default_rng(12)
    counts = np.bincount(np.concatenate([store.sample(500, rng=rng).action for _ in range(100)]))
    say(counts.tolist())
"""


def test_the_transitions_of_two_sessions_are_sampled_alike(tmp_path):
    ReplayStore.create(tmp_path / "store", counting_schema()).close()
    assert python(APPEND, tmp_path / "store", 0, 130) == [0, 123, [0] * 7]
    assert python(APPEND, tmp_path / "store", 140, 260) == [123, 237, [0] * 13]
    counts = np.array(python(SAMPLE, tmp_path / "store"))
    expected = [*numbers_below(130), *[i for i in range(140, 260) if i % 20]]
    assert np.flatnonzero(counts).tolist() == expected
    drawn, mean = counts[expected], 100 * 500 / len(expected)
    chi_square = ((drawn - mean) ** 2 / mean).sum()
    freedom = len(expected) - 1
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom), chi_square


# ---- snapshots and refreshing


def test_a_snapshot_of_a_writing_store_is_its_last_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", NEVER)
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        record(store, range(30))
        store.flush()
        assert len(store) == len(numbers_below(30))
        snapshot = store.snapshot
        record(store, range(30, 60))
        store.flush()
        with ReplayStore.open(tmp_path / "store", heads=snapshot) as opened:
            assert actions_of(opened) == numbers_below(30)


def test_refresh_shows_what_was_committed_since(tmp_path):
    with (
        ReplayStore.create(tmp_path / "store", counting_schema()) as store,
        ReplayStore.open(tmp_path / "store") as reader,
    ):
        for start, stop in pairwise((0, 10, 11, 30, 31, 100, 500)):
            record(store, range(start, stop))
            store.flush()
            reader.refresh()
            assert actions_of(reader) == numbers_below(stop)
            reader.check()


def test_a_refresh_that_fails_leaves_the_reader_at_its_commit(tmp_path):
    refresh_twice = """
store = ReplayStore.open(path)
before = store.read(np.arange(len(store))).reward.tolist()
say("opened")
sys.stdin.readline()
for _ in range(2):
    try:
        store.refresh()
        say("refreshed")
    except CorruptionError as error:
        say(str(error))
say(before == store.read(np.arange(len(store))).reward.tolist())
"""
    with ReplayStore.create(tmp_path / "store", small_schema(file_rows=4096)) as store:
        store.add_episode(**small_episode(0, 10))
        store.flush()
        reader = started(refresh_twice, tmp_path / "store")
        assert json.loads(reader.stdout.readline()) == "opened"
        store.add_episode(**small_episode(0, 6000))
    lost = tmp_path / "store/streams/000000/reward/c/1/0"
    lost.unlink()
    output, errors = reader.communicate("go\n", timeout=60)
    assert errors == ""
    assert reader.returncode == 0, "the reader died"
    first, second, same = [json.loads(line) for line in output.splitlines()]
    assert str(lost) in first
    assert str(lost) in second
    assert same


# ---- commits beside reads


@contextmanager
def commits_beside(monkeypatch, store, function, *, after=False):
    """Have a commit fall right before (or after) each call of a function, as the background's may.

    The reading thread may hold a lock that the commit waits for; then it comes a little later.
    """
    owner, name = function
    original, threads = getattr(owner, name), []

    def flush():
        threads.append(threading.Thread(target=store.flush))
        threads[-1].start()
        threads[-1].join(timeout=0.2)

    def called(*arguments, **keywords):
        if not after:
            flush()
        result = original(*arguments, **keywords)
        if after:
            flush()
        return result

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, called)
        yield
    assert threads, "the function was not called"
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("function", [(EpisodeIndex, "locate"), (Transition, "rows")])
@pytest.mark.parametrize("committed", [0, 23, 50])
def test_a_commit_between_finding_rows_and_reading_them_changes_nothing(
    tmp_path, monkeypatch, committed, function
):
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", NEVER)
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        record(store, range(committed))
        store.flush()
        assert actions_of(store) == numbers_below(committed)
        record(store, range(committed, 90))
        with commits_beside(monkeypatch, store, function):
            batch = store.read(np.arange(len(numbers_below(90))))
        check_counted(batch)
        assert batch.action.tolist() == numbers_below(90)


def test_a_commit_meanwhile_loses_no_episode_of_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", NEVER)
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        record(store, range(90))
        with commits_beside(monkeypatch, store, (Catalog, "episodes")):
            assert store.episodes["length"].to_pylist() == [19, 19, 19, 19, 9]
        record(store, range(90, 130))
        with commits_beside(monkeypatch, store, (Catalog, "episodes"), after=True):
            assert store.episode(5)["action"].tolist() == list(range(101, 120))
            assert (store.episode(5)["observation"][:, 0, 0] == np.arange(100, 120)).all()
        record(store, range(130, 135))
        with commits_beside(monkeypatch, store, (Catalog, "episodes")):
            store.check()


@contextmanager
def hasty_threads():
    """Let threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def run_together(*functions):
    """Run functions each in a thread, and return what they raised."""
    raised = []

    def run(function):
        try:
            function()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    with hasty_threads():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return raised


def test_one_thread_samples_what_another_appends(tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.ring.RING_BYTES", 1 << 15)
    steps, finished = 2500, threading.Event()
    rng = np.random.default_rng(0)

    def write():
        try:
            record(store, range(steps))
        finally:
            finished.set()

    def read():
        while not finished.is_set():
            if len(store):
                batch = store.sample(64, rng=rng)
                check_counted(batch)
                arrays = store.episode(-1)
                assert len(arrays["observation"]) == len(arrays["action"]) + 1
                store.check()

    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        assert run_together(write, read) == []
        assert actions_of(store) == numbers_below(steps)


def test_steps_of_two_threads_are_all_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.ring.RING_BYTES", 1)
    steps = 1500

    def write(first):
        for i in range(first, first + steps):
            store.step(i, i, float(i), False, False)

    with ReplayStore.create(tmp_path / "store", small_schema()) as store:
        store.reset(0)
        assert run_together(lambda: write(0), lambda: write(steps)) == []
        assert sorted(store.read(np.arange(len(store))).action.tolist()) == list(range(2 * steps))


def test_episodes_of_two_threads_are_all_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.ring.RING_BYTES", 1)

    def write(first):
        for i in range(first, first + 10):
            store.add_episode(**small_episode(1000 * i, 60))

    with ReplayStore.create(tmp_path / "store", small_schema()) as store:
        assert run_together(lambda: write(0), lambda: write(10)) == []
        assert store.num_episodes == 20
        for number in range(20):
            actions = store.episode(number)["action"]
            assert actions.tolist() == list(range(actions[0], actions[0] + 60))


# ---- commits that fail


def failing_commits(monkeypatch):
    """Have every commit fail; returns the list of those that were tried."""
    tried = []

    def write_head(*arguments):
        tried.append(arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("replaystore.commit.write_head", write_head)
    return tried


def test_the_step_behind_a_failed_background_commit_says_so_and_can_be_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", 0.01)
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        record(store, range(5))
        store.flush()
        begun = []

        def append():
            for i in range(5, 2000):
                begun.append(i)
                record(store, [i])
                time.sleep(0.001)

        with monkeypatch.context() as patched:
            tried = failing_commits(patched)
            with pytest.raises(CommitError, match="No space left on device") as caught:
                append()
            assert tried, "no commit was tried"
            assert caught.value.errno == errno.ENOSPC
            refused = begun[-1]
            assert actions_of(store) == numbers_below(refused)
        record(store, range(refused, refused + 50))
        store.flush()
        with ReplayStore.open(tmp_path / "store") as reader:
            assert actions_of(reader) == numbers_below(refused + 50)


def test_closing_can_be_repeated_when_there_is_room_again(tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", NEVER)
    store = ReplayStore.create(tmp_path / "store", counting_schema())
    record(store, range(30))
    with monkeypatch.context() as patched:
        failing_commits(patched)
        for _ in range(2):
            with pytest.raises(CommitError, match="No space left on device"):
                store.close()
    assert actions_of(store) == numbers_below(30)
    store.close()
    with ReplayStore.open(tmp_path / "store") as reader:
        assert actions_of(reader) == numbers_below(30)
        assert reader.episodes["length"].to_pylist() == [19, 9]


def test_an_interrupt_during_a_flush_stops_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", NEVER)
    original, main = commit_module.write_head, threading.main_thread().ident

    def write_head(*arguments):
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.05)
        original(*arguments)

    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        for start in (0, 25, 50):
            record(store, range(start, start + 25))
            with monkeypatch.context() as patched:
                patched.setattr(commit_module, "write_head", write_head)
                with pytest.raises(KeyboardInterrupt):
                    store.flush()
            assert actions_of(store) == numbers_below(start + 25)
            store.flush()
            store.check()
            with ReplayStore.open(tmp_path / "store") as reader:
                assert actions_of(reader) == numbers_below(start + 25)


# ---- whole episodes


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100, 700])
def test_an_episode_may_be_longer_than_the_ring(tmp_path, monkeypatch, length):
    monkeypatch.setattr("replaystore.ring.RING_BYTES", 1)
    with ReplayStore.create(tmp_path / "store", small_schema()) as store:
        store.add_episode(**small_episode(7, length))
        store.add_episode(**small_episode(0, 2))
        shown = [store.episode(0)]
    with ReplayStore.open(tmp_path / "store") as store:
        shown.append(store.episode(0))
        assert len(store) == length + 2
    for arrays in shown:
        for name, expected in small_episode(7, length).items():
            assert np.array_equal(arrays[name], expected), name


def test_an_episode_whose_commit_failed_can_be_added_again(tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.ring.RING_BYTES", 1)
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", NEVER)
    commits = []
    original = StreamCommitter.commit

    def commit(committer, pending, ring):
        commits.append(pending)
        if len(commits) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(committer, pending, ring)

    with ReplayStore.create(tmp_path / "store", small_schema()) as store:
        monkeypatch.setattr(StreamCommitter, "commit", commit)
        with pytest.raises(CommitError, match="No space left"):
            store.add_episode(**small_episode(0, 200))
        store.add_episode(**small_episode(0, 200))
        arrays = store.episode(-1)
        for name, expected in small_episode(0, 200).items():
            assert np.array_equal(arrays[name], expected), name
        store.check()


def test_rows_that_a_commit_under_way_holds_ask_for_no_other_one(tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.ring.RING_BYTES", 1 << 12)
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", NEVER)
    begun, may_go_on = threading.Semaphore(0), threading.Semaphore(0)
    original = StreamCommitter.commit

    def commit(committer, pending, ring):
        begun.release()
        assert may_go_on.acquire(timeout=30)
        return original(committer, pending, ring)

    with ReplayStore.create(tmp_path / "store", small_schema()) as store:
        monkeypatch.setattr(StreamCommitter, "commit", commit)
        writer = store._writer
        quarter = writer._ring.capacity // 4
        store.reset(0)
        record_more(store, quarter)
        writer._wake.set()  # as if a second had passed
        assert begun.acquire(timeout=30)
        record_more(store, quarter + 2)
        assert not writer._wake.is_set()
        record_more(store, quarter)
        assert writer._wake.is_set(), "half a ring that is in no commit"
        may_go_on.release(3)


def record_more(store, steps):
    for i in range(steps):
        store.step(i, i, float(i), False, False)


def test_step_reset_and_add_episode_give_the_same_rows(tmp_path):
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        store.add_episode(**counted_episode(0, 9))
        store.reset(image(0))
        for i in range(1, 10):
            store.step(i, image(i), float(i), False, False)
        one, other = store.episode(0), store.episode(1)
        for name in one:
            assert np.array_equal(one[name], other[name])
            assert one[name].dtype == other[name].dtype


# ---- several environments


def drift(store, rng, rounds, log):
    """Step random environments, some seldom; an action tells its environment and step."""
    num_envs = len(log)
    no = np.zeros(num_envs, bool)
    for _ in range(rounds):
        mask = rng.random(num_envs) < np.linspace(0.95, 0.02, num_envs)
        begins = mask & (np.array([not episodes for episodes in log]) | (rng.random(num_envs) < 0.05))
        if begins.any():
            store.reset(np.arange(num_envs), mask=begins)
            for env in np.flatnonzero(begins):
                log[env].append([])
        steps = mask & ~begins & np.array([bool(episodes) for episodes in log])
        actions = np.array([1000000 * env + sum(map(len, log[env])) for env in range(num_envs)])
        store.step(actions, actions + 1, actions.astype(float), no, no, mask=steps)
        for env in np.flatnonzero(steps):
            log[env][-1].append(int(actions[env]))


def check_drifted(store, log):
    table = store.episodes
    for env, episodes in enumerate(log):
        numbers = np.flatnonzero(np.asarray(table["env"]) == env)
        found = [store.episode(number)["action"].tolist() for number in numbers]
        assert found == [episode for episode in episodes if episode]
    store.check()


@pytest.mark.parametrize("codec", ["flat", "blosc-lz4-1"])
def test_columns_may_advance_on_their_own(tmp_path, monkeypatch, codec):
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", 0.05)
    rng = np.random.default_rng(0)
    rows = {"chunk_rows": 4} if codec != "flat" else {}
    fields = [
        Field("observation", (), "int64", codec=codec, **rows),
        Field("action", (), "int64", codec=codec, **rows),
    ]
    schema = Schema([*fields, Field("reward", (), "float64"), *FLAGS], file_rows=4096, shard_chunks=16)
    log = [[], [], []]
    ReplayStore.create(tmp_path / "store", schema, num_envs=3).close()
    for _ in range(4):
        with ReplayStore.open(tmp_path / "store", "a") as store:
            store.reset(np.zeros(3, int))
            for episodes in log:
                episodes.append([])
            drift(store, rng, 400, log)
            check_drifted(store, log)
            store.flush()
            with ReplayStore.open(tmp_path / "store") as reader:
                check_drifted(reader, log)
        with ReplayStore.open(tmp_path / "store") as reader:
            check_drifted(reader, log)


def test_a_lagging_column_stays_within_a_shard_of_the_others(tmp_path):
    schema = Schema(counting_schema().fields, shard_chunks=8)
    with ReplayStore.create(tmp_path / "store", schema, num_envs=2) as store:
        frames, no = np.stack([image(1), image(2)]), np.zeros(2, bool)
        store.reset(frames)
        for _ in range(200):
            store.step(np.zeros(2, int), frames, np.zeros(2), no, no, mask=np.array([True, False]))
        store.reset(frames, mask=np.array([False, True]))
        store.step(np.zeros(2, int), frames, np.zeros(2), no, no)
        rows = store.episodes["first_row"].to_pylist()
        assert abs(201 - rows[-1]) <= schema.shard_rows(schema.by_name["observation"], 2)
        assert (store.episode(-1)["observation"] == 2).all()
        store.check()


# ---- many episodes


def test_index_parts_are_sealed_and_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.commit.PART_EPISODES", 10)
    lengths = [1 + i % 4 for i in range(47)]
    with (
        ReplayStore.create(tmp_path / "store", small_schema()) as store,
        ReplayStore.open(tmp_path / "store") as reader,
    ):
        for i, length in enumerate(lengths):
            store.add_episode(**small_episode(100 * i, length))
            if i % 3 == 0:
                store.flush()
                reader.refresh()
                reader.check()
                assert reader.episodes["length"].to_pylist() == lengths[: i + 1]
        assert store.episodes["length"].to_pylist() == lengths
    parts = sorted((tmp_path / "store/streams/000000/index").iterdir())
    assert [part.name for part in parts] == [f"{i:06d}.arrow" for i in range(len(parts))]
    assert len(parts) >= 3
    with ReplayStore.open(tmp_path / "store", "a") as store:
        table = store.episodes
        store.add_episode(**small_episode(0, 9))
        assert store.episodes["length"].to_pylist() == [*lengths, 9]
        assert store.episode(30)["action"].tolist() == list(range(3000, 3000 + lengths[30]))
    assert table["length"].to_pylist() == lengths, "a table outlives its store"
    maps = Path("/proc/self/maps").read_text() if sys.platform == "linux" else ""
    assert all(str(part) in maps for part in parts) or sys.platform != "linux"
    sealed = sum(len(pa.ipc.open_file(part.read_bytes()).read_all()) for part in parts)
    assert sealed <= 47


def test_sealed_parts_are_never_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.commit.PART_EPISODES", 10)
    with ReplayStore.create(tmp_path / "store", small_schema()) as store:
        for i in range(10):
            store.add_episode(**small_episode(i, 2))
        store.flush()
        part = tmp_path / "store/streams/000000/index/000000.arrow"
        before = part.stat()
        for i in range(30):
            store.add_episode(**small_episode(i, 2))
            store.flush()
    assert part.stat() == before


def test_rows_of_many_files_are_found(tmp_path):
    schema = small_schema(file_rows=4096)
    rng = np.random.default_rng(0)
    with (
        ReplayStore.create(tmp_path / "store", schema) as store,
        ReplayStore.open(tmp_path / "store") as reader,
    ):
        first = 0
        for _ in range(12):
            length = int(rng.integers(500, 3000))
            store.add_episode(**small_episode(first, length))
            first += length
            store.flush()
            reader.refresh()
            for opened in (store, reader):
                batch = opened.sample(500, rng=rng)
                assert (batch.observation == batch.action).all()
                assert (batch.next_observation == batch.action + 1).all()
                assert (batch.reward == batch.action).all()
                assert opened.read(np.arange(first)).action.tolist() == list(range(first))
    assert len(list((tmp_path / "store/streams/000000/action/c").iterdir())) >= 4


@pytest.mark.parametrize(
    ("cache_bytes", "piece_rows"),
    [(0, 1 << 16), (0, 64), (0, 7), (1 << 15, 64), (1 << 15, 5), (1 << 24, 64)],
)
def test_the_size_of_the_cache_changes_nothing_but_speed(tmp_path, monkeypatch, cache_bytes, piece_rows):
    monkeypatch.setattr("replaystore.arena.MIN_CACHE", 4)
    monkeypatch.setattr("replaystore.arena.PIECE_ROWS", piece_rows)
    rng = np.random.default_rng(0)
    with (
        ReplayStore.create(tmp_path / "store", counting_schema(), cache_bytes=cache_bytes) as store,
        ReplayStore.open(tmp_path / "store", cache_bytes=cache_bytes) as reader,
    ):
        for start in range(0, 300, 60):
            record(store, range(start, start + 60))
            store.flush()
            if rng.random() < 0.7:
                reader.refresh()
            for opened in (opened for opened in (store, reader) if len(opened)):
                for n in (1, 30, 150):
                    check_counted(opened.sample(n, rng=rng))
                window = Transition(frame_stack=int(rng.integers(1, 6)), n_step=int(rng.integers(1, 4)))
                check_stacked(opened.sample(50, window, rng=rng), window)
                numbers = numbers_below(300)[: len(opened)]
                assert actions_of(opened) == numbers
                backwards = opened.read(np.arange(len(opened))[::-1])
                check_counted(backwards)
                assert backwards.action.tolist() == numbers[::-1]


def check_stacked(batch, window):
    """Every frame of a stack is the one so many steps before, but none before the episode's first."""
    number = batch.action - 1
    last = np.minimum(number + window.n_step, (number // 20 + 1) * 20 - 1)
    back = np.arange(1 - window.frame_stack, 1)
    for found, newest in ((batch.observation, number), (batch.next_observation, last)):
        frames = np.maximum(newest[:, None] + back, newest[:, None] // 20 * 20)
        found = found if window.frame_stack > 1 else found[:, None]
        assert (found == (frames % 251)[..., None, None]).all()
