from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from test_episodes import EPISODES
from test_processes import actions_of, counting_schema, numbers_below, record
from test_store import small_schema

from replaystore import CommitError, ReplayStore
from replaystore import commit as commit_module
from replaystore.episodes import episode_schema, episode_table
from replaystore.errors import CorruptionError
from replaystore.files import FileState
from replaystore.head import HEAD, HISTORY, Head, decode_head, empty_head, encode_head, read_head, write_head

COLUMNS = {"level": "int64", "win": "bool", "score": "float64", "note": "string"}
SCHEMA = small_schema(columns=COLUMNS, file_rows=4096)


def table(*episodes):
    return episode_table(episodes, episode_schema(SCHEMA))


def some_head(**changed):
    """Two environments: one with a closed episode, one with an open one that has just begun a file."""
    files = {
        field.name: {
            n: FileState(n, 100 + n, 2**32 - 1 - n) for n in range(2 if field.name == "observation" else 1)
        }
        for field in SCHEMA.fields
    }
    closed, open_ = EPISODES[0]._replace(length=7), EPISODES[2]._replace(env=1, first_row=4090, length=6)
    head = Head(3, np.array([8, 4097]), 1, files, (FileState(0, 9, 7),), table(closed), table(open_))
    return replace(head, **changed)


def same(one, other):
    return all(
        getattr(one, name).equals(getattr(other, name)) if name in ("episodes", "open") else
        np.array_equal(getattr(one, name), getattr(other, name)) if name == "rows" else
        getattr(one, name) == getattr(other, name)
        for name in Head.__dataclass_fields__
    )  # fmt: skip


@pytest.mark.parametrize("head", [some_head(), empty_head(SCHEMA, 5)], ids=["full", "empty"])
def test_a_head_comes_back_from_its_bytes(tmp_path, head):
    assert same(decode_head(encode_head(head, SCHEMA), SCHEMA, tmp_path), head)
    (tmp_path / HISTORY).mkdir()
    write_head(tmp_path, head, SCHEMA)
    assert same(decode_head(read_head(tmp_path), SCHEMA, tmp_path), head)
    assert read_head(tmp_path) == encode_head(head, SCHEMA)


def test_a_head_is_an_arrow_file_that_anybody_reads(tmp_path):
    (tmp_path / HISTORY).mkdir()
    write_head(tmp_path, some_head(), SCHEMA)
    row = pa.ipc.open_file((tmp_path / HEAD).read_bytes()).read_all().to_pylist()
    assert len(row) == 1
    assert (row[0]["commit"], row[0]["rows"]) == (3, [8, 4097])
    assert row[0]["episodes"][0]["note"] == "grüße"


def test_an_open_episodes_last_row_is_an_observation_only():
    head = some_head()
    assert head.is_open.tolist() == [False, True]
    assert head.field_rows(SCHEMA, "observation").tolist() == [8, 4097]
    assert head.field_rows(SCHEMA, "action").tolist() == [8, 4096]


def test_any_changed_byte_of_a_head_is_noticed_or_changes_nothing(tmp_path):
    head = some_head()
    data = encode_head(head, SCHEMA)
    harmless = 0
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        try:
            found = decode_head(bytes(damaged), SCHEMA, tmp_path)
        except CorruptionError:
            continue
        assert same(found, head), position
        harmless += 1
    assert harmless <= 8, "only the second copy of the checksum may change"


def test_a_head_cut_anywhere_is_refused(tmp_path):
    data = encode_head(some_head(), SCHEMA)
    for size in range(0, len(data), 5):
        with pytest.raises(CorruptionError, match=f"^{tmp_path}: "):
            decode_head(data[:size], SCHEMA, tmp_path)
    with pytest.raises(CorruptionError):
        decode_head(data + b"\0", SCHEMA, tmp_path)


def test_text_that_looks_like_the_checksum_does_no_harm(tmp_path):
    episode = EPISODES[0]._replace(length=7, policy="replaystore-crc32c:00000000" * 3)
    head = some_head(episodes=table(episode))
    assert same(decode_head(encode_head(head, SCHEMA), SCHEMA, tmp_path), head)


def test_a_head_of_another_schema_is_refused(tmp_path):
    with pytest.raises(CorruptionError, match=f"^{tmp_path}: expected the columns"):
        decode_head(encode_head(some_head(), SCHEMA), small_schema(columns={"x": "bool"}), tmp_path)
    other = replace(empty_head(small_schema(), 1), files={"observation": {0: FileState(0, 1, 1)}})
    with pytest.raises(CorruptionError, match=f"^{tmp_path}: "):
        decode_head(encode_head(other, small_schema()), small_schema(), tmp_path)


def with_files(field, states):
    head = some_head()
    return replace(head, files=head.files | {field: {state.number: state for state in states}})


EPISODE = EPISODES[0]
FORGED = {
    "negative rows": some_head(rows=np.array([-1, 4097])),
    "rows beyond the files": some_head(rows=np.array([8, 8193])),
    "rows beyond all files": some_head(rows=np.array([2**60, 4097])),
    "no environment": some_head(rows=np.zeros(0, np.int64)),
    "fewer environments than episodes": some_head(rows=np.array([4097])),
    "file missing": with_files("observation", [FileState(0, 5, 5)]),
    "file too many": with_files("reward", [FileState(0, 5, 5), FileState(1, 5, 5)]),
    "file of another number": with_files("reward", [FileState(1, 5, 5)]),
    "file of a negative number": with_files("reward", [FileState(-1, 5, 5)]),
    "file of no bytes": with_files("reward", [FileState(0, 0, 5)]),
    "file of negative bytes": with_files("reward", [FileState(0, -5, 5)]),
    "episode of no transition": some_head(episodes=table(EPISODE._replace(length=0))),
    "episode of negative length": some_head(episodes=table(EPISODE._replace(length=-3))),
    "episode before the rows": some_head(episodes=table(EPISODE._replace(first_row=-1))),
    "episode beyond the rows": some_head(episodes=table(EPISODE._replace(length=8))),
    "episode of a huge row": some_head(episodes=table(EPISODE._replace(first_row=2**63 - 2))),
    "episode of another environment": some_head(episodes=table(EPISODE._replace(env=2))),
    "episode of a negative environment": some_head(episodes=table(EPISODE._replace(env=-1))),
    "open episode beyond the rows": some_head(open=table(EPISODES[2]._replace(env=1, first_row=4090, length=7))),
    "open episode short of the rows": some_head(open=table(EPISODES[2]._replace(env=1, first_row=4090, length=5))),
    "two open episodes of one environment": some_head(open=table(*[EPISODES[2]._replace(env=1, first_row=4090, length=6)] * 2)),
}  # fmt: skip


@pytest.mark.parametrize("head", FORGED.values(), ids=FORGED)
def test_a_head_that_cannot_be_is_refused_though_its_checksum_is_right(tmp_path, head):
    with pytest.raises(CorruptionError, match=f"^{tmp_path}: "):
        decode_head(encode_head(head, SCHEMA), SCHEMA, tmp_path)


def test_a_link_or_a_directory_is_no_head(tmp_path):
    (tmp_path / HISTORY).mkdir()
    write_head(tmp_path, some_head(), SCHEMA)
    (tmp_path / HEAD).rename(tmp_path / "moved")
    (tmp_path / HEAD).symlink_to("moved")
    with pytest.raises(CorruptionError, match="expected a regular file"):
        read_head(tmp_path)
    (tmp_path / HEAD).unlink()
    (tmp_path / HEAD).mkdir()
    with pytest.raises(CorruptionError, match="expected a regular file"):
        read_head(tmp_path)


@pytest.mark.parametrize("numbers", [45, 40, 33])
def test_a_head_that_was_renamed_but_not_synced_is_committed_once(tmp_path, monkeypatch, numbers):
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", 1e6)
    original, failures = commit_module.write_head, [1]

    def write_head(*arguments):
        original(*arguments)
        if failures:
            raise OSError(5, "Input/output error", failures.pop())

    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        record(store, range(25))
        store.flush()
        record(store, range(25, numbers))
        with monkeypatch.context() as patched:
            patched.setattr(commit_module, "write_head", write_head)
            with pytest.raises(CommitError, match="Input/output error"):
                store.flush()
            record(store, range(numbers, 60))
            store.flush()
        assert actions_of(store) == numbers_below(60)
        assert store.episodes["length"].to_pylist() == [19, 19, 19]
        store.check()
        with ReplayStore.open(tmp_path / "store") as reader:
            assert actions_of(reader) == numbers_below(60)
            reader.check()


def test_a_commit_that_failed_can_be_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", 1e6)
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        record(store, range(25))
        store.flush()
        record(store, range(25, 50))
        with monkeypatch.context() as patched:
            for _ in range(3):

                def write_head(*arguments):
                    raise OSError(28, "No space left on device")

                patched.setattr(commit_module, "write_head", write_head)
                with pytest.raises(CommitError, match="No space left on device"):
                    store.flush()
                with ReplayStore.open(tmp_path / "store") as reader:
                    assert actions_of(reader) == numbers_below(25)
                assert actions_of(store) == numbers_below(50)
        store.flush()
        with ReplayStore.open(tmp_path / "store") as reader:
            assert actions_of(reader) == numbers_below(50)
