"""Asking for pages ahead: when it is done, and that what is read stays the same."""

import itertools
import shutil

import numpy as np
import pytest
from recording import Recorder, schema
from test_windows import FLAGS

import replaystore.arena
import replaystore.codec
import replaystore.foresight
import replaystore.reader
from replaystore import Field, ReplayStore, Schema, Transition
from replaystore.codec import ChunkCodec
from replaystore.compiled import finding
from replaystore.field import MAX_CHUNK_ROWS
from replaystore.files import HAS_HUGE_PAGES, HUGE_PAGE, AddressRange
from replaystore.flat import FlatColumn
from replaystore.foresight import ITEMS_A_WAIT, Foresight, Patience
from replaystore.index import Run


def test_asking_ahead_begins_when_reads_wait_for_the_disk_and_ends_when_none_does():
    waits = [1000]
    foresight = Foresight(lambda: waits[0])
    for waits[0], is_on in [(1000, False), (1001, False), (1018, True)]:
        for _ in range(8):
            foresight.note(32)
        assert foresight.is_on == is_on
    for waits[0] in range(1018, 1518, 5):
        foresight.note(256)
        assert foresight.is_on
    for _ in range(32):
        foresight.note(256)
    assert not foresight.is_on
    foresight = Foresight(lambda: waits[0])
    for more, is_on in [(0, False), (10, False), (6, False), (0, False), (7, False), (9, False), (1, True)]:
        waits[0] += more
        foresight.note(256)
        assert foresight.is_on == is_on, "16 of 1,024, then 17 of 768"


@pytest.mark.parametrize("copied", [0, 4096], ids=["index mapped", "index in memory"])
def test_what_is_read_is_what_was_asked_for_ahead(copied, tmp_path, monkeypatch):
    monkeypatch.setattr(replaystore.arena, "MAX_COPIED", copied)
    with ReplayStore.create(tmp_path / "store", schema()) as store:
        Recorder(store).step(500)
    asked = []
    for module in (replaystore.reader, replaystore.arena):
        monkeypatch.setattr(
            module, "prefetch", lambda start, nbytes: asked.extend(zip(start, nbytes, strict=True))
        )
    numbers, window = np.random.default_rng(0).integers(500, size=64), Transition(frame_stack=2)
    with ReplayStore.open(tmp_path / "store") as store:
        plain = store.read(numbers, window)
    assert asked == []
    with ReplayStore.open(tmp_path / "store") as store:
        store._view._reader._foresight.is_on = store._view._reader._packed["observation"].from_disk = True
        store._view._reader._patience.is_left = False
        ahead = store.read(numbers, window)
        for name in ("observation", "action", "reward", "next_observation", "terminated", "ids"):
            assert np.array_equal(getattr(plain, name), getattr(ahead, name))
        for name, expected in {"action": 64, "reward": 64, "terminated": 0, "truncated": 0}.items():
            rows = store._view._reader._flat[name].rows
            start, itemsize = rows.ctypes.data, rows.itemsize
            found = covered(start + plain.ids * itemsize, asked)
            assert found == expected, f"{name}: whether an episode ended is known from the index"
    chunks = set(np.concatenate([numbers // 2, numbers // 2 + 1]).tolist())  # of two rows each
    entries = {start for start, nbytes in asked if nbytes == 16}
    assert len(entries) > len(chunks) // 2 if copied == 0 else not entries
    assert len({start for start, nbytes in asked if 16 < nbytes < 4096}) > len(chunks) // 2


@pytest.mark.skipif(not HAS_HUGE_PAGES, reason="flat files are read by page where there are no huge pages")
def test_huge_pages_are_waited_for_until_that_was_often_in_vain(tmp_path, monkeypatch):
    with ReplayStore.create(tmp_path / "store", schema()) as store:
        Recorder(store).step(500)
    waits, asked, by_page = itertools.count(step=10), [], []
    monkeypatch.setattr(replaystore.reader, "major_faults", lambda: next(waits))
    monkeypatch.setattr(replaystore.reader, "prefetch", lambda *_: asked.append(len(by_page)))
    monkeypatch.setattr(AddressRange, "read_by_page", lambda range_: by_page.append(range_))
    monkeypatch.setattr(Foresight, "note", lambda *_: None)
    with ReplayStore.open(tmp_path / "store") as store:
        reader = store._view._reader
        reader._foresight.is_on = True
        reader._patience = Patience(30 * HUGE_PAGE)
        for _ in range(4):
            assert asked == by_page == []
            store.sample(8)
        assert len(by_page) == 4, "the flat fields"
        store.sample(8)
        assert asked == [4]


@pytest.mark.skipif(not HAS_HUGE_PAGES, reason="there is no patience where there are no huge pages")
def test_patience_is_for_reading_all_once_and_for_some_waiting_all_the_time():
    patience = Patience(200 * HUGE_PAGE)
    for waits in (100, 100, 8):
        patience.note(waits, 0)
    assert patience.is_left
    for _ in range(1000):
        patience.note(2, 2 * ITEMS_A_WAIT)
    assert patience.is_left
    patience.note(1, ITEMS_A_WAIT - 1)
    assert not patience.is_left
    patience.note(0, 10**6)
    assert not patience.is_left, "the columns are read by page already"
    patience = Patience(200 * HUGE_PAGE)
    patience.note(0, 10**6)
    patience.note(209, 0)
    assert not patience.is_left, "patience is not saved up"


@pytest.mark.skipif(not HAS_HUGE_PAGES, reason="flat files are read by page where there are no huge pages")
def test_columns_that_would_fill_the_memory_are_read_by_page(tmp_path, monkeypatch):
    with ReplayStore.create(tmp_path / "store", schema()) as store:
        Recorder(store).step(20)
    nbytes = schema().time_chunk(1) * (8 + 8 + 1 + 1)
    for memory, huge in ((nbytes * 4 // 3 + 1, True), (nbytes * 4 // 3 - 1, False)):
        monkeypatch.setattr(replaystore.foresight, "memory_limit", lambda memory=memory: memory)
        with ReplayStore.open(tmp_path / "store") as store:
            assert store._view._reader._patience.is_left == huge
            assert {column._range._huge for column in store._view._reader._flat.values()} == {huge}


def test_patience_is_for_the_flat_files_there_are_not_for_those_evicted(tmp_path):
    path = tmp_path / "store"
    with ReplayStore.create(path, schema(), capacity=3000) as store:
        Recorder(store).step(30_000)
    names = ("action", "reward", "terminated", "truncated")
    sizes = [
        file.stat().st_size
        for name in names
        for file in path.glob(f"streams/*/{name}/c/**/*")
        if file.is_file()
    ]
    assert sum(sizes) < 10_000 * (8 + 8 + 1 + 1)
    with ReplayStore.open(path) as store:
        assert store._view._reader._patience._most == sum(sizes) / HUGE_PAGE + 8


def covered(addresses, asked):
    return sum(any(start <= each < start + nbytes for start, nbytes in asked) for each in addresses)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_pages_of_a_store_on_disk_may_be_asked_for(num_envs, tmp_path, monkeypatch):
    with ReplayStore.create(tmp_path / "store", schema(), num_envs) as store:
        shape = (num_envs,) if num_envs > 1 else ()
        frame = np.ones((*shape, 6, 6), np.uint8)
        store.reset(frame)
        for number in range(20):
            values = (np.full(shape, kind(number))[()] for kind in (np.int64, np.float64))
            store.step(
                next(values), frame, next(values), np.zeros(shape, bool)[()], np.zeros(shape, bool)[()]
            )
    monkeypatch.setattr(Foresight, "note", lambda *_: None)
    with ReplayStore.open(tmp_path / "store") as store:
        store._view._reader._foresight.is_on = store._view._reader._packed["observation"].from_disk = True
        batch = store.read(np.arange(len(store)))
        assert sorted(batch.action.tolist()) == sorted(list(range(20)) * num_envs)


def flat_schema(shape=(3,)):
    fields = [("observation/x", shape, "float32"), ("observation/n", (), "int16"), ("action", (), "int64")]
    fields += [("reward", (), "float64"), ("terminated", (), "bool"), ("truncated", (), "bool")]
    return Schema([Field(*field) for field in fields])


def add_flat_episode(store, rng, length):
    schema = flat_schema()
    values = {}
    for field in schema.fields:
        rows = length + schema.is_observation(field.name)
        values[field.name] = rng.integers(2, size=(rows, *field.shape)).astype(field.dtype)
    values["terminated"] = values["truncated"] = np.zeros(length, bool)
    nested = {"x": values.pop("observation/x"), "n": values.pop("observation/n")}
    store.add_episode(observation=nested, **values)


@pytest.mark.parametrize("num_envs", [[1], [1, 1], [3], [2, 2], [1, 2]], ids=str)
@pytest.mark.parametrize("allocate", [None, np.empty], ids=["", "into memory that is given"])
@pytest.mark.parametrize("compiled", [finding, None], ids=["compiled", "numpy"])
def test_what_is_read_in_runs_is_what_is_read_row_by_row(num_envs, allocate, compiled, tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.reader.finding", compiled)
    rng, path, taken = np.random.default_rng(0), tmp_path / "store", []
    take_runs = FlatColumn.take_runs
    monkeypatch.setattr(FlatColumn, "take_runs", lambda *what: taken.append(what[0]) or take_runs(*what))
    for n in num_envs:
        opened = (
            ReplayStore.open(path, "a", num_envs=n)
            if path.exists()
            else ReplayStore.create(path, flat_schema(), num_envs=n)
        )
        with opened as store:
            for length in (5, 1, 90, 33):
                add_flat_episode(store, rng, length)
    with ReplayStore.open(path) as store:
        numbers = rng.permutation(len(store))
        fast = [store.read(some, allocate=allocate) for some in (numbers, numbers[:50])]
        assert len(taken) == (4 if compiled and len({*num_envs}) == 1 else 0)
        monkeypatch.setattr(store._view._reader, "_apart", 0)
        taken.clear()
        slow = [store.read(some) for some in (numbers, numbers[:50])]
        assert taken == []
    for one, other in zip(slow, fast, strict=True):
        for kind in ("observation", "next_observation"):
            for name in ("x", "n"):
                a, b = getattr(one, kind)[name], getattr(other, kind)[name]
                assert a.dtype == b.dtype
                assert np.array_equal(a, b)
        assert np.array_equal(one.reward, other.reward)


def test_rows_that_a_writer_still_holds_are_not_read_in_runs(tmp_path):
    length, values = 2 * MAX_CHUNK_ROWS, np.arange(2 * MAX_CHUNK_ROWS + 1, dtype="float32")
    with ReplayStore.create(tmp_path / "store", flat_schema(shape=())) as store:
        store.reset({"x": values[0], "n": 0})
        for i in range(length):
            store.step(i, {"x": values[i + 1], "n": 0}, 0.0, False, False)
            if i == MAX_CHUNK_ROWS + 9:
                store.flush()  # the writer holds the rows of chunks that are not full, and those after
        for start in (0, MAX_CHUNK_ROWS - 2, MAX_CHUNK_ROWS - 1, MAX_CHUNK_ROWS):
            for stop in (start + 1, start + 20, length):
                batch = store.read(np.arange(start, stop))
                assert np.array_equal(batch.observation["x"], values[start:stop])
                assert np.array_equal(batch.next_observation["x"], values[start + 1 : stop + 1])
        first = np.array([0, MAX_CHUNK_ROWS - 20])
        found = store._view.arrays(store._view.index().locate(first), [(Run(first, 50), ["observation/x"])])
        assert np.array_equal(found["observation/x"], values[first[:, None] + np.arange(50)])


def test_no_transitions_of_an_empty_store_are_read_as_empty_arrays(tmp_path):
    ReplayStore.create(tmp_path / "store", schema()).close()
    with ReplayStore.open(tmp_path / "store") as store:
        batch = store.read(np.arange(0))
    assert (batch.observation.shape, batch.action.shape, batch.ids.shape) == ((0, 6, 6), (0,), (0,))


@pytest.mark.parametrize("slots", [0, 20], ids=["no cache", "a cache that is too small"])
def test_each_chunk_of_a_batch_is_decoded_once_whatever_the_order(slots, tmp_path, monkeypatch):
    """Also those of several streams, whose numbers have many bits in common."""
    with ReplayStore.create(tmp_path / "store", schema()) as store:
        Recorder(store).step(100)
    for stream in ("000001", "000002"):
        shutil.copytree(tmp_path / "store/streams/000000", tmp_path / "store/streams" / stream)
    decoded, take_rows = [], ChunkCodec.take_rows

    def note(codec, sources, *arguments, **named):
        decoded.append(sources.tolist())
        take_rows(codec, sources, *arguments, **named)

    monkeypatch.setattr(ChunkCodec, "take_rows", note)
    monkeypatch.setattr(replaystore.arena, "MIN_CACHE", 10)
    window = Transition(frame_stack=3)
    cache_bytes = slots * schema().by_name["observation"].chunk_nbytes
    with ReplayStore.open(tmp_path / "store", cache_bytes=cache_bytes) as store:
        in_order = store.read(np.arange(300), window)
        numbers = np.random.default_rng(0).permutation(300)
        shuffled = store.read(numbers, window)
        last = store.episodes.to_pylist()[-1]
    assert np.array_equal(shuffled.observation, in_order.observation[numbers])
    assert len(decoded) == 2
    for sources in decoded:
        assert len(sources) == len(set(sources)) == 3 * ((last["first_row"] + last["length"] + 2) // 2)


@pytest.mark.parametrize("codec", ["blosc-lz4hc-5", "blosc-zstd-1"])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_what_is_read_is_the_same_without_compiled_code(codec, num_envs, tmp_path, monkeypatch):
    """Also where a piece of many rows begins in the middle of a chunk's, and of noise in other frames."""
    monkeypatch.setattr(replaystore.arena, "PIECE_ROWS", 100)
    rng = np.random.default_rng(0)
    field = Field("observation", (30, 30), "uint8", codec=codec, chunk_rows=4)
    fields = [Field("action", (), "int64"), Field("reward", (), "float64"), *FLAGS]
    path = tmp_path / "store"
    with ReplayStore.create(path, Schema([field, *fields]), num_envs=num_envs) as store:
        for length in rng.integers(1, 30, 20).tolist():
            frames = rng.integers(0, 256 if length % 5 == 0 else 3, (length + 1, 30, 30), np.uint8)
            flags = {"terminated": np.zeros(length, bool), "truncated": np.zeros(length, bool)}
            store.add_episode(observation=frames, action=np.arange(length), reward=np.zeros(length), **flags)
    numbers, window = rng.integers(200, size=150), Transition(frame_stack=3)
    with ReplayStore.open(path) as store:
        batch = store.read(numbers, window)
        monkeypatch.setattr(replaystore.codec, "COMPILED", None)
        again = store.read(numbers, window)
    for one, other in zip(batch[:8], again[:8], strict=True):
        assert np.array_equal(one, other)


def test_a_chunk_that_fills_up_between_others_is_seen_after_refresh(tmp_path):
    """Of one environment, while the other's are there: the shard keeps its length and sizes when repacked."""
    values, rows, no = [1, 2, 3, 4, 5], 16, np.zeros(2, bool)
    fields = [Field("observation", (), "int32", codec="blosc-lz4hc-5", chunk_rows=rows // 2)]
    fields += [Field("action", (), "int64"), Field("reward", (), "float64")]
    fields += [Field(name, (), "bool") for name in ("terminated", "truncated")]

    def observed(t):
        return np.full(2, values[t % len(values)], "int32")

    with ReplayStore.create(tmp_path / "store", Schema(fields, shard_chunks=4), 2) as store:

        def step(t, *, mask):
            store.step(np.full(2, t), observed(t), np.zeros(2), no, no, mask=np.array(mask))

        store.reset(observed(0))
        for t in range(1, rows - 1):
            step(t, mask=[True, True])
        step(rows - 1, mask=[False, True])
        store.flush()
        with ReplayStore.open(tmp_path / "store") as reader:
            reader.read(np.arange(len(reader)))
            before = reader.snapshot
            step(rows - 1, mask=[True, False])
            for t in range(rows, rows + 3):
                step(t, mask=[True, True])
            store.flush()
            with ReplayStore.open(tmp_path / "store", heads=before) as behind:
                assert behind.episode(0)["observation"].tolist() == [values[t % 5] for t in range(rows - 1)]
            reader.refresh()
            expected = [values[t % 5] for t in range(rows + 3)]
            assert [reader.episode(env)["observation"].tolist() for env in range(2)] == [expected] * 2
