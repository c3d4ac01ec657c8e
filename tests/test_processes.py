"""Several processes on one store."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from test_windows import FLAGS

from replaystore import Field, ReplayStore, Schema


def python(code, *arguments):
    """Run code in a fresh interpreter with warnings as errors, and return the JSON that it prints."""
    result = started(code, *arguments)
    output, errors = result.communicate(timeout=60)
    assert result.returncode == 0, errors
    return json.loads(output or "null")


def started(code, *arguments):
    command = [sys.executable, "-W", "error", "-c", PRELUDE + code, *map(str, arguments)]
    return subprocess.Popen(
        command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


PRELUDE = """
import json, os, sys
import numpy as np
import replaystore
from replaystore import *
from replaystore.errors import *

path = sys.argv[1]
say = lambda value: print(json.dumps(value), flush=True)
image = lambda i: np.full((30, 30), i % 251, "uint8")
"""


def counting_schema():
    """Every value of a row follows from its number, so that a reader can tell what is right."""
    return Schema(
        [
            Field("observation", (30, 30), "uint8", chunk_rows=4),
            Field("action", (), "int64"),
            Field("reward", (), "float64"),
            *FLAGS,
        ],
        file_rows=4096,
        shard_chunks=8,
    )


def image(i):
    return np.full((30, 30), i % 251, "uint8")


def record(store, numbers):
    """Append to one environment: the step to observation i has action i and reward i; 20 to an episode."""
    for i in numbers:
        if i % 20 == 0:
            store.reset(image(i))
        else:
            store.step(i, image(i), float(i), i % 20 == 19, False)


def numbers_below(stop):
    """The actions of the transitions that `record(range(stop))` appends."""
    return [i for i in range(stop) if i % 20]


def check_counted(batch):
    """Raise unless every value of a batch is what `record` appended."""
    number = batch.action
    assert (batch.reward == number).all()
    assert (batch.observation == (number - 1)[:, None, None] % 251).all()
    assert (batch.next_observation == number[:, None, None] % 251).all()
    assert (batch.terminated == (number % 20 == 19)).all()


WRITE_AND_TELL = """
replaystore.writer.COMMIT_SECONDS = 0.001
with ReplayStore.open(path, "a") as store:
    for i in range(int(sys.argv[2])):
        if i % 20 == 0:
            store.reset(image(i))
        else:
            store.step(i, image(i), float(i), i % 20 == 19, False)
        if i == 5:
            store.flush()
            say("begun")
"""


def test_a_reader_beside_a_writer_sees_only_whole_commits_in_order(tmp_path):
    ReplayStore.create(tmp_path / "store", counting_schema()).close()
    steps = 4000
    rng = np.random.default_rng(0)
    lengths = []
    with started(WRITE_AND_TELL, tmp_path / "store", steps) as writer:
        writer.stdout.readline()
        with ReplayStore.open(tmp_path / "store") as reader:
            while writer.poll() is None:
                reader.refresh()
                lengths.append(len(reader))
                batch = reader.read(np.arange(len(reader)))
                assert batch.action.tolist() == numbers_below(steps)[: len(reader)]
                check_counted(batch)
                check_counted(reader.sample(50, rng=rng))
                reader.check()
            reader.refresh()
            assert len(reader) == len(numbers_below(steps))
        assert writer.stderr.read() == ""
    assert writer.returncode == 0
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 2, "the reader saw no commit but the last"


def test_a_store_can_be_opened_at_any_moment_of_its_writing(tmp_path):
    ReplayStore.create(tmp_path / "store", counting_schema()).close()
    lengths = []
    with started(WRITE_AND_TELL, tmp_path / "store", 4000) as writer:
        writer.stdout.readline()
        while writer.poll() is None:
            with ReplayStore.open(tmp_path / "store") as reader:
                lengths.append(len(reader))
                assert actions_of(reader) == numbers_below(4000)[: len(reader)]
        assert writer.stderr.read() == ""
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 2, "the reader saw no commit but the last"


def test_a_reader_that_does_not_refresh_stays_at_its_commit(tmp_path):
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        record(store, range(30))
        store.flush()
        with ReplayStore.open(tmp_path / "store") as reader:
            record(store, range(30, 500))
            store.flush()
            batch = reader.read(np.arange(len(reader)))
            check_counted(batch)
            assert batch.action.tolist() == numbers_below(30)
            assert reader.num_episodes == 2


READ_ALL = """
with ReplayStore.open(path, heads={int(k): bytes.fromhex(v) for k, v in json.loads(sys.argv[2]).items()}) as s:
    batch = s.read(np.arange(len(s)))
    say([batch.action.tolist(), batch.observation[:, 0, 0].tolist()])
"""


def test_a_snapshot_opens_the_same_commit_in_another_process_later(tmp_path):
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        record(store, range(30))
        store.flush()
        with ReplayStore.open(tmp_path / "store") as reader:
            heads = json.dumps({stream: head.hex() for stream, head in reader.snapshot.items()})
        record(store, range(30, 500))
        store.flush()
    actions, observations = python(READ_ALL, tmp_path / "store", heads)
    assert actions == numbers_below(30)
    assert observations == [i - 1 for i in numbers_below(30)]


def in_fork(function):
    """Run a function in a forked child; returns what it returned, or the name of what it raised."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result = function()
        except Exception as error:
            result = type(error).__name__
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        answer = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return json.loads(answer)


def actions_of(store):
    batch = store.read(np.arange(len(store)))
    check_counted(batch)
    return batch.action.tolist()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("mode", ["r", "a"])
def test_a_forked_child_reads_the_same(tmp_path, mode):
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        record(store, range(50))
        store.flush()
    with ReplayStore.open(tmp_path / "store", mode) as store:
        expected = actions_of(store)
        assert in_fork(lambda: actions_of(store)) == expected == numbers_below(50)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_reads_what_its_parent_has_not_committed(tmp_path):
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        record(store, range(50))
        assert in_fork(lambda: actions_of(store)) == numbers_below(50)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("call", ["step", "reset", "flush", "close", "add_episode"])
def test_a_forked_child_cannot_write_and_its_parent_goes_on(tmp_path, call):
    with ReplayStore.create(tmp_path / "store", counting_schema()) as store:
        record(store, range(45))
        calls = {
            "step": lambda: store.step(45, image(45), 45.0, False, False),
            "reset": lambda: store.reset(image(0)),
            "flush": store.flush,
            "close": store.close,
            "add_episode": lambda: store.add_episode(
                observation=np.zeros((2, 30, 30), "uint8"),
                action=np.zeros(1, int),
                reward=np.zeros(1),
                terminated=np.ones(1, bool),
                truncated=np.zeros(1, bool),
            ),
        }
        assert in_fork(calls[call]) == "ForkError"
        with ReplayStore.open(tmp_path / "store", "a") as other:
            assert other.episodes.schema.equals(store.episodes.schema)
            other.reset(image(0))
            assert other._writer.number != store._writer.number, "the child gave the parent's lock away"
        record(store, range(45, 60))
        store.flush()
        assert actions_of(store) == numbers_below(60)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_stream_is_free_when_its_writer_closes_though_a_forked_child_lives_on(tmp_path):
    store = ReplayStore.create(tmp_path / "store", counting_schema())
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)  # until the parent closes its end
        os._exit(0)
    record(store, range(20))
    store.close()
    with ReplayStore.open(tmp_path / "store", "a") as again:
        record(again, range(20, 40))
        assert again.episodes["stream"].to_pylist() == [0, 0]
    os.close(read)
    os.close(write)
    assert os.waitpid(child, 0)[1] == 0


CREATE = """
sys.stdin.readline()
schema = Schema([Field("observation", (), "int64"), Field("action", (), "int64"), Field("reward", (), "float64"),
                 Field("terminated", (), "bool"), Field("truncated", (), "bool")])
for i in range(int(sys.argv[2])):
    try:
        with ReplayStore.create(f"{path}/{i}", schema) as store:
            store.reset(0)
            store.step(0, 1, 1.0, True, False)
        say("made")
    except FormatError:
        say("refused")
"""


def test_of_two_processes_that_create_a_store_one_wins(tmp_path):
    rounds = 20
    processes = [started(CREATE, tmp_path, rounds) for _ in range(2)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [process.communicate(timeout=60) for process in processes]
    assert [errors for _, errors in results] == ["", ""]
    answers = [[json.loads(line) for line in output.splitlines()] for output, _ in results]
    assert [sorted(pair) for pair in zip(*answers, strict=True)] == [["made", "refused"]] * rounds
    for i in range(rounds):
        with ReplayStore.open(tmp_path / str(i)) as store:
            assert len(store) == 1


KILLED = """
store = ReplayStore.open(path, "a")
for i in range(30):
    store.reset(image(i)) if i % 20 == 0 else store.step(i, image(i), float(i), i % 20 == 19, False)
store.flush()
say("flushed")
os.kill(os.getpid(), 9)
"""


def test_a_killed_writer_leaves_its_flushed_rows_and_its_stream(tmp_path):
    ReplayStore.create(tmp_path / "store", counting_schema()).close()
    writer = started(KILLED, tmp_path / "store")
    assert json.loads(writer.communicate()[0]) == "flushed"
    with ReplayStore.open(tmp_path / "store", "a") as store:
        assert actions_of(store) == numbers_below(30)
        record(store, range(40, 60))
        store.flush()
        assert actions_of(store) == numbers_below(30) + [i for i in range(40, 60) if i % 20]
        assert store.episodes["stream"].to_pylist() == [0, 0, 0]
        assert store.episodes["terminated"].to_pylist() == [True, False, True]
        assert store.episodes["truncated"].to_pylist() == [False, False, False]
