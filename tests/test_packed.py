import os

import numpy as np
import pytest
from test_processes import actions_of, check_counted, counting_schema, image, numbers_below, record
from test_windows import FLAGS

from replaystore import Field, ReplayStore, Schema
from replaystore import arena as arena_module
from replaystore import catalog as catalog_module
from replaystore import packed as packed_module
from replaystore.codec import ChunkCodec, crc32c
from replaystore.errors import CommitError, CorruptionError
from replaystore.files import FileState
from replaystore.packed import ABSENT, PackedWriter, open_shard, read_index

pytestmark = pytest.mark.usefixtures("_no_syncs")

CHUNKS = 6
FIELD = Field("x", (10, 10), "uint8", chunk_rows=2, codec="blosc-lz4-1")


def encoded(value):
    """A chunk full of a value, or of noise that cannot be compressed."""
    if value == "noise":
        rows = np.random.default_rng(0).integers(0, 256, size=(2, 10, 10), dtype=np.uint8)
    else:
        rows = np.full((2, 10, 10), value, np.uint8)
    return ChunkCodec(FIELD).encode(rows)


def chunk_of(shard, i):
    """The encoded bytes of a shard's chunk, or None if it is absent."""
    offset, nbytes = map(int, shard.index[i])
    return None if nbytes == ABSENT else shard.data[offset : offset + nbytes].tobytes()


class Packed:
    """A packed array, its commits, and what its chunks should hold."""

    def __init__(self, path):
        self.path = path
        self.writer = PackedWriter(path, FIELD, chunks=CHUNKS, num_envs=1)
        self.states = {}
        self.chunks = {}

    def write(self, chunks, *, keep=True):
        states, files = self.writer.write({number: encoded(value) for number, value in chunks.items()})
        if keep:
            self.writer.shards |= states
            self.states |= {file.number: file for file in files}
            self.chunks |= chunks

    def repack(self, number):
        self.states[number] = self.writer.repack(number)

    def resume(self):
        self.writer = PackedWriter(self.path, FIELD, chunks=CHUNKS, num_envs=1)
        self.writer.resume(self.states.values())

    def check(self, states=None, chunks=None):
        """Compare the shards as of a commit, by default the last."""
        states, chunks = states or self.states, chunks or self.chunks
        for number, state in states.items():
            shard = open_shard(self.writer.shard_path(number), state, CHUNKS, 1)
            found = [chunk_of(shard, i) for i in range(CHUNKS)]
            values = [chunks.get(number * CHUNKS + i) for i in range(CHUNKS)]
            assert found == [None if value is None else encoded(value) for value in values]


def test_chunks_are_appended_into_shards_and_replaced(tmp_path):
    packed = Packed(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(20):
        packed.write({number: int(rng.integers(100))})
        packed.check()
        packed.write({number: "noise", number + 1: int(rng.integers(100))})
        packed.check()
        if rng.random() < 0.4:
            packed.resume()
    assert len(packed.states) == 4


def test_every_commit_ends_in_a_whole_index(tmp_path):
    packed = Packed(tmp_path)
    for number in range(CHUNKS):
        packed.write({number: number})
        data = packed.writer.shard_path(0).read_bytes()
        assert len(data) == packed.states[0].nbytes
        index = read_index(np.frombuffer(data, np.uint8), CHUNKS)
        assert (index[: number + 1, 1] != ABSENT).all()
        assert (index[number + 1 :] == ABSENT).all()


def test_a_commit_of_before_is_read_though_more_was_appended(tmp_path):
    packed = Packed(tmp_path)
    packed.write({0: 1, 1: 2})
    before, chunks = dict(packed.states), dict(packed.chunks)
    packed.write({1: 3, 2: 4})
    packed.check(before, chunks)
    packed.check()


def test_what_was_not_committed_is_cut_off_and_written_over(tmp_path):
    packed = Packed(tmp_path)
    packed.write({0: 1, 1: 2})
    for resume in (False, True):
        packed.write({1: 50, 2: "noise", 7: 9}, keep=False)
        packed.check()
        if resume:
            packed.resume()
        packed.write({1: 3 + resume})
        packed.check()
        assert packed.writer.shard_path(0).stat().st_size == packed.states[0].nbytes


def test_repacking_keeps_the_chunks_and_drops_the_dead_bytes(tmp_path):
    packed = Packed(tmp_path)
    for value in range(10):
        packed.write({0: "noise", 2: value, 5: "noise"})
    large = packed.writer.shard_path(0).stat().st_size
    state = packed.writer.shards[0]
    assert large == state.nbytes > 3 * state.live_nbytes
    packed.repack(0)
    packed.check()
    small = packed.writer.shard_path(0).stat().st_size
    assert small == packed.states[0].nbytes == state.live_nbytes == packed.writer.shards[0].nbytes
    packed.write({3: 8})
    packed.check()
    packed.resume()
    packed.check()


def test_a_repacked_shard_is_found_by_the_commit_before_it(tmp_path):
    """The process may die between repacking and the head that tells the new length."""
    packed = Packed(tmp_path)
    for value in range(5):
        packed.write({0: "noise", 1: value})
    before = dict(packed.states)
    packed.repack(0)
    assert packed.states[0].nbytes < before[0].nbytes
    packed.check(before)
    packed.states = before
    packed.resume()
    packed.write({2: 3})
    packed.check()


def test_an_open_map_outlives_repacking(tmp_path):
    packed = Packed(tmp_path)
    packed.write({0: "noise"})
    packed.write({0: 5, 1: 6})
    shard = open_shard(packed.writer.shard_path(0), packed.states[0], CHUNKS, 1)
    packed.repack(0)
    packed.write({1: 7})
    assert chunk_of(shard, 0) == encoded(5)
    assert chunk_of(shard, 1) == encoded(6)


def foreign(tmp_path, chunks):
    """The bytes of another array's shard."""
    other = Packed(tmp_path / "other")
    (tmp_path / "other").mkdir()
    other.write(chunks)
    return other.writer.shard_path(0).read_bytes()


WRONG = {
    "missing": lambda data, tmp_path: None,
    "empty": lambda data, tmp_path: b"",
    "cut": lambda data, tmp_path: data[:-1],
    "half": lambda data, tmp_path: data[: len(data) // 2],
    "zeros": lambda data, tmp_path: bytes(len(data)),
    "ones": lambda data, tmp_path: b"\xff" * len(data),
    "one chunk other": lambda data, tmp_path: foreign(tmp_path, {0: 1, 1: 2, 2: 4}),
    "first chunk other": lambda data, tmp_path: foreign(tmp_path, {0: 9, 1: 2, 2: 3}),
    "one chunk less": lambda data, tmp_path: foreign(tmp_path, {0: 1, 1: 2}),
    "one chunk more": lambda data, tmp_path: foreign(tmp_path, {0: 1, 1: 2, 2: 3, 3: 4}),
    "no chunk": lambda data, tmp_path: b"\xff" * 96 + crc32c(b"\xff" * 96).to_bytes(4, "little"),
    "index": lambda data, tmp_path: data[:-20] + bytes([data[-20] ^ 1]) + data[-19:],
    "index checksum": lambda data, tmp_path: data[:-1] + bytes([data[-1] ^ 1]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_shard_that_is_not_the_one_committed_is_refused(tmp_path, wrong):
    packed = Packed(tmp_path)
    packed.write({0: 1, 1: 2, 2: 3})
    path = packed.writer.shard_path(0)
    data = WRONG[wrong](path.read_bytes(), tmp_path)
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
    with pytest.raises(CorruptionError, match=f"^{path}: "):
        open_shard(path, packed.states[0], CHUNKS, 1)


@pytest.mark.parametrize("kind", ["directory", "link", "pipe"])
def test_what_is_no_regular_file_is_no_shard(tmp_path, kind):
    packed = Packed(tmp_path)
    packed.write({0: 1})
    path = packed.writer.shard_path(0)
    path.rename(path.with_name("moved"))
    if kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("moved")
    else:
        os.mkfifo(path)
    with pytest.raises(CorruptionError, match=f"^{path}: expected a regular file"):
        open_shard(path, packed.states[0], CHUNKS, 1)


@pytest.mark.parametrize(
    "entry",
    [
        (0, 2**63),
        (2**63, 40),
        (2**64 - 40, 80),
        (10**6, 40),
        (0, 19),
        (0, 0),
        (0, 10**6),
        (2**64 - 2, 2**64 - 2),
    ],
)
def test_an_index_that_points_outside_the_shard_is_none(entry):
    index = np.full((CHUNKS, 2), ABSENT, "<u8")
    index[1] = entry
    raw = index.tobytes()
    data = np.frombuffer(bytes(200) + raw + crc32c(raw).to_bytes(4, "little"), np.uint8)
    assert read_index(data, CHUNKS) is None
    index[1] = 100, 100
    raw = index.tobytes()
    data = np.frombuffer(bytes(200) + raw + crc32c(raw).to_bytes(4, "little"), np.uint8)
    assert (read_index(data, CHUNKS) == index).all()


@pytest.mark.parametrize("nbytes", [0, 1, 99, 100])
def test_bytes_too_short_for_an_index_hold_none(nbytes):
    assert read_index(np.zeros(nbytes, np.uint8), CHUNKS) is None


def test_a_shard_without_a_chunk_is_refused(tmp_path):
    raw = b"\xff" * 16 * CHUNKS
    (tmp_path / "x").write_bytes(raw + crc32c(raw).to_bytes(4, "little"))
    with pytest.raises(CorruptionError):
        open_shard(tmp_path / "x", FileState(0, len(raw) + 4, 0), CHUNKS, 1)


# ---- in a store


def shards(path):
    return sorted(
        (path / "streams/000000/observation").glob("c/*/0/0/0"), key=lambda each: int(each.parts[-4])
    )


def test_a_sealed_shard_is_never_written_again(tmp_path):
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        before = {}
        for start in range(0, 600, 25):
            record(store, range(start, start + 25))
            store.flush()
            now = {path: path.stat() for path in shards(tmp_path / "store")}
            assert all(now[path] == found for path, found in before.items())
            full = len(store.episodes) and (start + 25) // 32 - 1
            before = {path: now[path] for path in shards(tmp_path / "store")[:full]}
        assert len(before) > 10
        assert actions_of(store) == numbers_below(600)


def test_a_sealed_shard_has_no_dead_bytes(tmp_path):
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        for i in range(110):
            record(store, [i])
            store.flush()
        full = shards(tmp_path / "store")[:-1]
        assert len(full) == 3
        for path in full:
            data = np.fromfile(path, np.uint8)
            index = read_index(data, 8)
            assert index[:, 1].sum() + 16 * 8 + 4 == len(data)


def test_dead_bytes_are_bounded_however_often_is_committed(tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.commit.DEAD_BYTES", 3000)
    schema = Schema(counting_schema().fields, shard_chunks=64)
    with ReplayStore.create(tmp_path / "store", schema) as store:
        for i in range(100):
            record(store, [i])
            store.flush()
            data = np.fromfile(shards(tmp_path / "store")[0], np.uint8)
            sizes = read_index(data, 64)[:, 1]
            live = int(sizes[sizes != ABSENT].sum()) + 16 * 64 + 4
            assert len(data) <= 2 * live + 3000
        assert actions_of(store) == numbers_below(100)


def test_closing_leaves_few_dead_bytes(tmp_path):
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        for i in range(31):
            record(store, [i])
            store.flush()
        open_bytes = shards(tmp_path / "store")[0].stat().st_size
    closed_bytes = shards(tmp_path / "store")[0].stat().st_size
    assert closed_bytes < open_bytes / 4
    with ReplayStore.open(tmp_path / "store", "a") as store:
        assert actions_of(store) == numbers_below(31)


def test_a_damaged_chunk_is_named_with_its_rows_and_the_others_are_read(tmp_path):
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        record(store, range(100))
    path = shards(tmp_path / "store")[1]
    data = bytearray(path.read_bytes())
    start, nbytes = map(int, read_index(np.frombuffer(data, np.uint8), 8)[3])
    data[start + nbytes // 2] ^= 1
    path.write_bytes(data)
    with ReplayStore.open(tmp_path / "store") as store:
        with pytest.raises(CorruptionError, match=rf"{path}: chunk 3 \(rows 44 to 47 of environment 0"):
            store.read(np.arange(len(store)))
        rows = np.arange(len(store))
        numbers = np.array(numbers_below(100))
        intact = rows[(numbers < 44) | (numbers > 48)]
        check_counted(store.read(intact))


def test_a_failed_sync_of_a_repacked_shard_loses_nothing(tmp_path, monkeypatch):
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        record(store, range(30))
        store.flush()
        record(store, range(30, 50))
        original = packed_module.write_atomic

        def write_atomic(path, data):
            original(path, data)
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patched:
            patched.setattr(packed_module, "write_atomic", write_atomic)
            with pytest.raises(CommitError, match="Input/output error"):
                store.flush()
        record(store, range(50, 90))
        store.flush()
        assert actions_of(store) == numbers_below(90)
        with ReplayStore.open(tmp_path / "store") as reader:
            assert actions_of(reader) == numbers_below(90)


def commit_each(store, numbers):
    for i in numbers:
        record(store, [i])
        store.flush()


def overtaking(monkeypatch, store, owner, first, rounds):
    """Have the writer commit and repack its open shard behind each head that a reader reads."""
    original, left = owner.read_head, list(range(rounds))

    def read_head(stream):
        head = original(stream)
        if left:
            start = first + 20 * (rounds - len(left))
            left.pop()
            commit_each(store, range(start, start + 20))
        return head

    monkeypatch.setattr(owner, "read_head", read_head)
    return left


def test_a_reader_that_is_behind_finds_a_shard_though_its_writer_repacks_it_meanwhile(tmp_path, monkeypatch):
    schema = Schema(counting_schema().fields, file_rows=4096, shard_chunks=64)
    monkeypatch.setattr("replaystore.commit.DEAD_BYTES", 1)
    with ReplayStore.create(tmp_path / "store", schema) as store:
        commit_each(store, range(10))
        with ReplayStore.open(tmp_path / "store") as reader:
            commit_each(store, range(10, 40))
            left = overtaking(monkeypatch, store, arena_module, 40, 3)
            assert actions_of(reader) == numbers_below(10)
            reader.check()
    assert len(left) < 3, "the reader found the shard of its own commit"


def test_a_store_is_opened_though_its_writer_repacks_meanwhile(tmp_path, monkeypatch):
    schema = Schema(counting_schema().fields, file_rows=4096, shard_chunks=64)
    monkeypatch.setattr("replaystore.commit.DEAD_BYTES", 1)
    with ReplayStore.create(tmp_path / "store", schema) as store:
        commit_each(store, range(10))
        overtaking(monkeypatch, store, catalog_module, 10, 5)
        with ReplayStore.open(tmp_path / "store") as reader:
            shown = actions_of(reader)
            assert len(shown) >= len(numbers_below(10))
            assert shown == numbers_below(200)[: len(shown)]
            reader.check()


def test_many_environments_share_a_shard(tmp_path):
    observation = Field("observation", (30, 30), "uint8", chunk_rows=4)
    rest = [Field("action", (), "int64"), Field("reward", (), "float64"), *FLAGS]
    schema = Schema([observation, *rest], shard_chunks=40)
    no, envs = np.zeros(20, bool), np.arange(20)
    with ReplayStore.create(tmp_path / "store", schema, num_envs=20) as store:
        store.reset(np.stack([image(env) for env in envs]))
        for t in range(1, 31):
            frames = np.stack([image(7 * t + env) for env in envs])
            store.step(1000 * t + envs, frames, np.zeros(20), no, no)
        store.flush()
        for opened in (store, ReplayStore.open(tmp_path / "store")):
            batch = opened.read(np.arange(len(opened)))
            t, env = batch.action // 1000, batch.action % 1000
            assert sorted(batch.action) == sorted((1000 * np.arange(1, 31)[:, None] + envs).ravel())
            assert (batch.observation == ((7 * (t - 1) + env) % 251)[:, None, None]).all()
            assert (batch.next_observation == ((7 * t + env) % 251)[:, None, None]).all()
            if opened is not store:
                opened.close()
    assert len(shards(tmp_path / "store")) == 4
