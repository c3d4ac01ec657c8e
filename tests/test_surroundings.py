"""What is around a store: other processes, clocks, mounts, users, copies, links, limits."""

import gc
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import open_files
from faulty_disk import (
    BEFORE,
    NEVER,
    FaultyDisk,
    assert_whole,
    begin,
    committed,
    install,
    leftovers,
    mounted,
    needs_descriptors,
    needs_mount,
    small_schema,
)
from recording import Recorder, check_transitions, schema
from test_bad_input import as_another_user
from test_processes import started

from replaystore import CommitError, ReplayStore, Schema
from replaystore.errors import ClosedError, CorruptionError, ReadOnlyError
from replaystore.verify import verify
from replaystore.writer import StreamWriter

pytestmark = pytest.mark.usefixtures("_no_syncs")

DAY = 86400.0


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return begin(tmp_path_factory.mktemp("surroundings") / "store")


RECORD_AND_WAIT = """
sys.path.insert(0, sys.argv[2])
from recording import Recorder
with ReplayStore.open(path, "a") as store:
    recorder = Recorder(store, start=len(store))
    recorder.step(10)
    store.flush()
    say(recorder.count)
    sys.stdin.readline()
    recorder.step(10)
"""


def test_a_stopped_writer_holds_nobody_up_and_goes_on(begun, tmp_path):
    path = shutil.copytree(begun, tmp_path / "store")
    child = started(RECORD_AND_WAIT, path, Path(__file__).parent)
    assert child.stdout.readline() == "35\n"
    child.send_signal(signal.SIGSTOP)
    try:
        assert committed(path) == 35
        with ReplayStore.open(path, "a") as store:
            Recorder(store, start=45).step(5)
            store.flush()
            assert store.episodes["stream"].unique().to_pylist() == [0, 1]
    finally:
        child.send_signal(signal.SIGCONT)
    _, errors = child.communicate("go on\n", timeout=30)
    assert child.returncode == 0, errors
    assert_whole(path, 50)


def test_a_clock_that_jumps_changes_no_order(begun, tmp_path, monkeypatch):
    path = shutil.copytree(begun, tmp_path / "store")
    jumps = [time.time() + DAY * days for days in (400, -400, 0, 3650, -3650)]
    for number, now in enumerate(jumps):
        monkeypatch.setitem(StreamWriter.__init__.__kwdefaults__, "clock", lambda now=now: now)
        with ReplayStore.open(path, "a") as store:
            Recorder(store, start=BEFORE + 7 * number).step(7)
    assert_whole(path, BEFORE + 7 * len(jumps))
    with ReplayStore.open(path) as store:
        times = store.episodes["start_time"].cast("int64").to_pylist()
    assert [*dict.fromkeys(times)][-len(jumps) :] == [int(now * 1e6) for now in jumps]


@needs_mount
def test_a_read_only_file_system_is_read_and_refused_for_writing(begun, tmp_path):
    with mounted(tmp_path / "mount", "--bind", "-o", "ro", str(begun.parent)) as mount:
        if os.access(mount, os.W_OK):
            subprocess.run(["mount", "-o", "remount,ro,bind", str(mount)], check=True)
        assert_whole(mount / "store", BEFORE)
        with pytest.raises(ReadOnlyError):
            ReplayStore.open(mount / "store", "a")
        with pytest.raises(ReadOnlyError):
            ReplayStore.create(mount / "new", small_schema())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.skipif(os.getuid() != 0, reason="needs to be root, to become another user")
def test_a_file_that_may_not_be_read_is_named(begun):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = shutil.copytree(begun, Path(folder) / "store")
        os.chmod(path / "streams/000000/action/c/0/0", 0)

        def message() -> str:
            try:
                ReplayStore.open(path)
            except OSError as error:
                return str(error)
            return "opened"

        assert "action/c/0/0" in as_another_user(message)


def copy_shuffled(source: Path, target: Path, rng: random.Random, between: Callable[[], None]) -> None:
    """Copy a directory file by file in any order, with a call every now and then."""
    names = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    rng.shuffle(names)
    for name in names:
        if rng.random() < 0.2:
            between()
        if (source / name).exists() and not name.name.endswith(".partial"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


@pytest.mark.filterwarnings("ignore:.*a copy of a store that was being written:UserWarning")
def test_a_copy_made_while_recording_opens_at_a_commit_or_is_refused(begun, tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", NEVER)
    rng, outcomes = random.Random(0), Counter()
    path = shutil.copytree(begun, tmp_path / "store")
    with ReplayStore.open(path, "a") as store:
        recorder = Recorder(store, start=BEFORE)
        commits = {BEFORE}

        def record() -> None:
            recorder.step(rng.randrange(5))
            store.flush()
            commits.add(recorder.count)

        for attempt in range(20):
            target = tmp_path / str(attempt)
            copy_shuffled(path, target, rng, record)
            is_right = list(verify(target)) == []
            try:
                count = committed(target)
            except CorruptionError:
                outcomes["refused"] += 1
                assert not is_right
                continue
            assert count in commits
            outcomes["newest" if is_right else "older"] += 1
            with ReplayStore.open(target, "a") as copied:
                Recorder(copied, start=count).step(5)
            assert_whole(target, count + 5)
    assert outcomes["newest"] > 0
    assert outcomes["older"] > 0


def test_a_store_reached_by_a_symbolic_link_to_its_parent_is_read_and_written(begun, tmp_path):
    (tmp_path / "real").mkdir()
    shutil.copytree(begun, tmp_path / "real" / "store")
    (tmp_path / "link").symlink_to("real")
    with ReplayStore.open(tmp_path / "link" / "store", "a") as store:
        Recorder(store, start=BEFORE).step(10)
    assert_whole(tmp_path / "link" / "store", BEFORE + 10)
    (tmp_path / "direct").symlink_to(tmp_path / "real" / "store")
    assert_whole(tmp_path / "direct", BEFORE + 10)


def resources() -> tuple[int, int]:
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@needs_descriptors
def test_failures_leave_no_descriptor_thread_or_file_behind(begun, tmp_path, monkeypatch):
    disk = install(FaultyDisk(), monkeypatch)
    path = shutil.copytree(begun, tmp_path / "store")
    with ReplayStore.open(path, "a") as store:
        recorder = Recorder(store, start=BEFORE)
        recorder.step(10)
        store.flush()
        names, before = sorted(path.rglob("*")), resources()
        for number in range(120):
            recorder.step()
            disk.fail(1 + number % 3, kind=("fsync", "pwrite", "replace", "open")[number % 4])
            try:
                store.flush()
            except CommitError:
                disk.make_room()
                store.flush()
        assert disk.failures > 80
        disk.make_room()
        store.flush()
        gone = [name for name in names if not name.exists()]
        assert gone == []
        assert leftovers(path) == []
        assert resources() <= before
    assert_whole(path, BEFORE + 130)


@needs_descriptors
def test_opening_and_closing_leaves_no_descriptor_or_thread_behind(begun, tmp_path):
    path = shutil.copytree(begun, tmp_path / "store")
    before = resources()
    for number in range(100):
        with ReplayStore.open(path, "a" if number % 3 == 0 else "r") as store:
            store.refresh()
            assert len(store.sample(2).ids) == 2
    assert resources() == before


@needs_descriptors
def test_opening_that_fails_leaves_no_descriptor_thread_or_lock_behind(begun, tmp_path):
    path = shutil.copytree(begun, tmp_path / "store")
    shard = path / "streams/000000/observation/c/0/0/0/0"
    content = shard.read_bytes()
    before = resources()
    for length in range(0, len(content), 97):
        shard.write_bytes(content[:length])
        with pytest.raises(CorruptionError):
            ReplayStore.open(path, "a")
    assert resources() == before
    assert open_files(path) == []
    shard.write_bytes(content)
    with ReplayStore.open(path, "a") as store:
        assert store.episodes["stream"].unique().to_pylist() == [0]


def test_more_files_than_may_be_open_are_read(tmp_path):
    path = tmp_path / "store"
    with ReplayStore.create(path, Schema(schema().fields, file_rows=4096, shard_chunks=1)) as store:
        Recorder(store).bulk(600)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, limits[1]))
    try:
        with ReplayStore.open(path) as store:
            assert check_transitions(store) == list(range(600))
        with ReplayStore.open(path, "a") as store:
            Recorder(store, start=600).bulk(100)
            store.flush()
            assert check_transitions(store) == list(range(700))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@needs_descriptors
def test_closed_store_lets_its_files_go_while_the_object_stays(begun, tmp_path):
    path = shutil.copytree(begun, tmp_path / "store")
    store = ReplayStore.open(path)
    batch = store.sample(20)
    assert str(path) in Path("/proc/self/maps").read_text()
    store.close()
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert (batch.reward == batch.action / 2).all()
    with pytest.raises(ClosedError):
        store.sample(1)
