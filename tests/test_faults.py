"""Calls that fail, full disks, short writes, hangs: no acknowledged row is lost, and recording goes on."""

import contextlib
import errno
import fcntl
import itertools
import os
import random
import resource
import shutil
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import open_files
from faulty_disk import (
    BEFORE,
    NEVER,
    FaultyDisk,
    assert_whole,
    begin,
    committed,
    failure_of,
    install,
    leftovers,
    mounted,
    needs_descriptors,
    needs_mount,
    small_schema,
    some_numbers,
)
from recording import Recorder, check_transitions, schema

from replaystore import CommitError, ReplayStore, Schema, files
from replaystore.codec import ChunkCodec
from replaystore.errors import LockUnsupported
from replaystore.verify import verify

ERRORS = ("EIO", "EDQUOT", "EROFS", "EMFILE", "EACCES", "EINTR", "EAGAIN", "EFBIG")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FaultyDisk:
    return install(FaultyDisk(), monkeypatch)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return begin(tmp_path_factory.mktemp("faults") / "store")


class Session:
    """Records on a faulty disk: a call that fails is checked, and made again when there is room."""

    def __init__(self, begun: Path, path: Path, disk: FaultyDisk, code: int = errno.ENOSPC) -> None:
        self.path = path
        self.count = 0
        self._begun = begun
        self._disk = disk
        self._code = code
        self._begin()

    def _begin(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self._begun, self.path)
        self.count = self._acknowledged = BEFORE

    def record(self, *, patience: int = 1) -> bool:
        """Open, record, close, while calls fail as planned; whether one did."""
        self._disk.failures = 0
        store = self._insist(lambda: ReplayStore.open(self.path, "a"), None, patience)
        with self._disk.paused():
            assert leftovers(self.path) == []
        recorder = Recorder(store, start=self.count)
        for _ in range(9):
            self._insist(recorder.step, recorder, patience)
        self._insist(store.flush, recorder, patience)
        self._acknowledged = recorder.count
        recorder.step(3)
        self._insist(store.close, recorder, patience)
        self.count = self._acknowledged = recorder.count
        self._disk.make_room()
        return self._disk.failures > 0

    def check(self) -> None:
        """Everything is there, in one stream, and nothing is left over; then begin again."""
        assert_whole(self.path, self.count)
        with ReplayStore.open(self.path, "a") as store:
            assert store.episodes["stream"].unique().to_pylist() == [0]
            assert leftovers(self.path) == []
        self._begin()

    def _insist(self, call: Callable[[], Any], recorder: Recorder | None, patience: int) -> Any:
        for attempt in itertools.count(1):
            try:
                return call()
            except OSError as error:
                self._check(error, recorder)
            assert attempt <= patience + 1, "fails though there is room"
            if attempt >= patience:
                self._disk.make_room()

    def _check(self, error: OSError, recorder: Recorder | None) -> None:
        assert error.errno == self._code
        with self._disk.paused():
            if recorder is None:
                assert committed(self.path) == self._acknowledged
                return
            assert isinstance(error, CommitError)
            assert Path(error.filename).is_relative_to(self.path)
            assert self._acknowledged <= committed(self.path) <= recorder.count
            assert check_transitions(recorder.store) == list(range(recorder.count))


@pytest.fixture
def session(disk: FaultyDisk, begun: Path, tmp_path: Path) -> Session:
    return Session(begun, tmp_path / "store", disk)


def test_a_disk_that_is_full_at_any_call_loses_nothing(disk, session):
    for number in some_numbers():
        disk.fail(number)
        if not session.record():
            break
        if number % 5 == 0:
            session.check()
    assert number > 50
    session.check()


def test_a_disk_that_is_full_from_any_call_until_there_is_room_loses_nothing(disk, session):
    for number in itertools.count(1, 5):
        disk.fail(number, forever=True)
        if not session.record(patience=2):
            break
        if number % 20 == 1:
            session.check()
    assert number > 50
    session.check()


@pytest.mark.parametrize("kind", ["open", "pwrite", "fsync", "replace"])
def test_a_call_that_keeps_failing_until_there_is_room_loses_nothing(kind, disk, session):
    for number in (1, 2, 4, 8):
        disk.fail(number, kind=kind, forever=True)
        assert session.record(patience=3)
    session.check()


@pytest.mark.parametrize("name", ERRORS)
def test_any_error_of_any_call_loses_nothing(name, disk, begun, tmp_path):
    rng = random.Random(name)
    code = getattr(errno, name)
    session = Session(begun, tmp_path / "store", disk, code)
    for kind in ("open", "pwrite", "fsync", "replace"):
        disk.fail(rng.randrange(1, 8), code, kind=kind)
        assert session.record()
    session.check()


def test_creating_a_store_on_a_full_disk_can_be_repeated(disk, tmp_path):
    for number in some_numbers():
        path = tmp_path / str(number)
        disk.fail(number)
        error = failure_of(lambda path=path: made_with_room(disk, path))
        disk.make_room()
        if error is None:
            break
        assert error.errno == errno.ENOSPC
        assert open_files(path) == []
        begun = (path / "zarr.json").exists()
        with ReplayStore.open(path, "a") if begun else ReplayStore.create(path, small_schema()) as store:
            Recorder(store).step(10)
        assert_whole(path, 10)
    assert number > 10


def made_with_room(disk: FaultyDisk, path: Path) -> ReplayStore:
    store = ReplayStore.create(path, small_schema())
    disk.make_room()
    return store


def test_a_commit_that_failed_in_the_background_is_raised_at_the_next_call(
    disk, begun, tmp_path, monkeypatch
):
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", 0.001)
    path = shutil.copytree(begun, tmp_path / "store")
    with ReplayStore.open(path, "a") as store:
        recorder = Recorder(store, start=BEFORE)
        store.flush()
        disk.fail(1, forever=True)
        with pytest.raises(CommitError, match="No space left on device"):
            recorder.step(1_000_000)
        refused = recorder.count
        with disk.paused():
            assert BEFORE <= committed(path) <= refused
        disk.make_room()
        store.flush()
        recorder.step(10)
    assert recorder.count == refused + 10
    assert_whole(path, refused + 10)


class ShortDisk(FaultyDisk):
    """Every write takes a part of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = random.Random(0)

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        view = memoryview(data)
        return os.pwrite(descriptor, view[: self.rng.randint(1, len(view))], offset)


def test_short_writes_are_completed(disk, begun, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "os", ShortDisk())
    path = shutil.copytree(begun, tmp_path / "store")
    with ReplayStore.open(path, "a") as store:
        recorder = Recorder(store, start=BEFORE)
        for _ in range(5):
            recorder.step(9)
            store.flush()
    assert_whole(path, BEFORE + 45)


class ForgetfulDisk(FaultyDisk):
    """A failed fsync drops what was written since the last one, and the next one says "ok"."""

    def __init__(self) -> None:
        super().__init__()
        self._unsynced: dict[int, list[tuple[int, bytes]]] = {}

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        with open(f"/proc/self/fd/{descriptor}", "rb") as file:
            file.seek(offset)
            old = file.read(len(data))
        written = self._call("pwrite", descriptor, data, offset)
        self._unsynced.setdefault(descriptor, []).append((offset, old.ljust(written, b"\0")))
        return written

    def fsync(self, descriptor: int) -> None:
        lost = self._unsynced.pop(descriptor, [])
        try:
            self._call("fsync", descriptor)
        except OSError:
            for offset, old in reversed(lost):
                os.pwrite(descriptor, old, offset)
            raise

    def close(self, descriptor: int) -> None:
        self._unsynced.pop(descriptor, None)
        os.close(descriptor)


@needs_descriptors
def test_pages_that_a_failed_fsync_drops_are_written_again(disk, begun, tmp_path, monkeypatch):
    disk = ForgetfulDisk()
    monkeypatch.setattr(files, "os", disk)
    session = Session(begun, tmp_path / "store", disk, errno.EIO)
    for number in some_numbers():
        disk.fail(number, errno.EIO, kind="fsync")
        if not session.record():
            break
        if number % 5 == 0:
            session.check()
    assert number > 20
    session.check()


def record_until_it_fails(store: ReplayStore, recorder: Recorder) -> tuple[CommitError, int]:
    """Returns the error, and how many transitions had been acknowledged before it."""
    acknowledged = recorder.count
    for _ in range(1000):
        try:
            recorder.step(100)
            store.flush()
        except CommitError as error:
            return error, acknowledged
        acknowledged = recorder.count
    raise AssertionError("no commit failed")


def fill(directory: Path, nbytes: int) -> None:
    """Take what room there is, in files of this many bytes."""
    with contextlib.suppress(OSError):
        for number in itertools.count():
            (directory / f"filler{number}").write_bytes(bytes(nbytes))


@needs_mount
@pytest.mark.parametrize(
    ("options", "nbytes"), [("size=2m", 4096), ("size=8m,nr_inodes=400", 0)], ids=["bytes", "inodes"]
)
def test_a_disk_that_is_really_full_can_be_recorded_on_when_there_is_room(options, nbytes, tmp_path):
    with mounted(tmp_path / "mount", "-t", "tmpfs", "-o", options, "tmpfs") as mount:
        with ReplayStore.create(mount / "store", small_schema()) as store:
            recorder = Recorder(store)
            recorder.step(50)
            store.flush()
            fill(mount, nbytes)
            error, acknowledged = record_until_it_fails(store, recorder)
            assert error.errno == errno.ENOSPC
            assert acknowledged <= committed(mount / "store") <= recorder.count
            for filler in mount.glob("filler*"):
                filler.unlink()
            store.flush()
            recorder.step(10)
        assert_whole(mount / "store", recorder.count)
        assert leftovers(mount) == []


def test_a_limit_on_the_size_of_files_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", NEVER)
    path = tmp_path / "store"
    with ReplayStore.create(path, Schema(schema().fields, file_rows=4096)) as store:
        recorder = Recorder(store)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
        try:
            error, acknowledged = record_until_it_fails(store, recorder)
            assert error.errno == errno.EFBIG
            assert acknowledged <= committed(path) <= recorder.count
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        store.flush()
    assert_whole(path, recorder.count)


def test_a_disk_that_hangs_stops_steps_only_when_memory_is_full(begun, tmp_path, monkeypatch):
    hanging, hung, room = types.SimpleNamespace(**vars(os)), threading.Event(), threading.Event()

    def fsync(descriptor: int) -> None:
        hung.set()
        room.wait()

    path = shutil.copytree(begun, tmp_path / "store")
    monkeypatch.setattr("replaystore.ring.RING_BYTES", 0)
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", 0.001)
    with ReplayStore.open(path, "a") as store:
        recorder = Recorder(store, start=BEFORE)
        hanging.fsync = fsync
        monkeypatch.setattr(files, "os", hanging)
        recorder.step()
        assert hung.wait(10)
        stepping = threading.Thread(target=recorder.step, args=[100])
        stepping.start()
        stepping.join(0.2)
        assert stepping.is_alive(), "more rows than the ring holds were accepted"
        assert BEFORE < recorder.count < BEFORE + 100
        assert committed(path) == BEFORE
        room.set()
        stepping.join()
    assert recorder.count == BEFORE + 101
    assert_whole(path, recorder.count)


def test_a_file_that_cannot_be_read_is_an_error_and_not_data(disk, begun):
    for number in itertools.count(1):
        disk.fail(number, errno.EIO, kind="pread")
        findings = list(verify(begun))
        if not findings:
            break
        assert ["Input/output error" in str(finding) for finding in findings] == [True]
        disk.fail(number, errno.EIO, kind="pread")
        error = failure_of(lambda: ReplayStore.open(begun))
        assert error is None or error.errno == errno.EIO
        disk.make_room()
    assert number > 10


def test_a_file_system_without_locks_is_read_and_refused_for_writing(begun, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files, "fcntl", types.SimpleNamespace(**vars(fcntl) | {"flock": flock}))
    with pytest.raises(LockUnsupported, match=r"lock: cannot lock: No locks available"):
        ReplayStore.open(begun, "a")
    assert open_files(begun) == []
    assert committed(begun) == BEFORE


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_links_makes_a_store_or_says_why_not(code, disk, tmp_path):
    path = tmp_path / "store"
    disk.fail(1, code, kind="link", forever=True)
    error = failure_of(lambda: ReplayStore.create(path, small_schema()))
    assert leftovers(tmp_path) == []
    assert (committed(path) == 0) if error is None else (os.strerror(code) in str(error))


def test_memory_that_runs_out_in_a_commit_loses_nothing(begun, tmp_path, monkeypatch):
    path = shutil.copytree(begun, tmp_path / "store")

    def encode(*_: object) -> bytes:
        raise MemoryError

    with ReplayStore.open(path, "a") as store:
        recorder = Recorder(store, start=BEFORE)
        with monkeypatch.context() as patch:
            patch.setattr(ChunkCodec, "encode", encode)
            recorder.step(10)
            with pytest.raises(CommitError, match="MemoryError"):
                store.flush()
            assert committed(path) == BEFORE
            assert check_transitions(store) == list(range(recorder.count))
        store.flush()
        assert committed(path) == recorder.count
        recorder.step(3)
    assert_whole(path, BEFORE + 13)
