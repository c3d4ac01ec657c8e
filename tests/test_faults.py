"""Faults of the system: calls that fail, full disks, interrupts, signals, exits.

`F7` and the like number the faults that a store has to survive; power cuts are in
`test_power_loss.py`, damaged files in `test_damage.py`, kills in `test_kill.py`.
"""

import errno
import fcntl
import functools
import gc
import itertools
import json
import linecache
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import open_files
from recording import Recorder, check_transitions, observation, schema

from replaystore import CommitError, ReplayStore, ReplayStoreError, Schema, files
from replaystore.codec import ChunkCodec
from replaystore.errors import CorruptionError, LockUnsupported, ReadOnlyError
from replaystore.verify import verify

CHANGES = ("open", "pwrite", "fsync", "replace", "link", "unlink", "mkdir", "ftruncate", "rename")
ERRORS = ("EIO", "EDQUOT", "EROFS", "EMFILE", "EACCES", "EINTR", "EAGAIN", "EFBIG")
BEFORE = 25  # transitions of the store that a test begins with
NEVER = 1e6  # seconds between commits that nobody asks for


class FaultyDisk:
    """`os` of a disk whose calls fail as planned: the `first` of a kind, or every one from there."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failures = 0
        self.make_room()

    def fail(
        self, first: int, code: int = errno.ENOSPC, *, kind: str | None = None, forever: bool = False
    ) -> None:
        """Fail from now on the call of a kind, or of all in CHANGES, with this number."""
        self.counts.clear()
        self._plan = (first, code, kind, forever)

    def make_room(self) -> None:
        self._plan = (sys.maxsize, 0, None, False)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let all calls through, without counting them."""
        plan, counts = self._plan, self.counts.copy()
        self.make_room()
        yield
        self._plan, self.counts = plan, counts

    def __getattr__(self, name: str) -> Any:
        if name not in (*CHANGES, "pread"):
            return getattr(os, name)
        return functools.partial(self._call, name)

    def _call(self, name: str, *arguments: Any) -> Any:
        first, code, kind, forever = self._plan
        if name == kind or (kind is None and name in CHANGES):
            self.counts[name] += 1
            number = self.counts.total()
            if number == first or (forever and number > first):
                self.failures += 1
                path = arguments[0] if isinstance(arguments[0], str | Path) else None
                raise OSError(code, os.strerror(code), path)
        if name != "fsync":  # no power cut here
            return getattr(os, name)(*arguments)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FaultyDisk:
    disk = FaultyDisk()
    monkeypatch.setattr(files, "os", disk)
    monkeypatch.setattr("replaystore.commit.PART_EPISODES", 3)
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", NEVER)
    return disk


def small_schema() -> Schema:
    """Shards of 32 rows."""
    return Schema(schema().fields, file_rows=4096, shard_chunks=16)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of some transitions, whose last chunk is not full."""
    path = tmp_path_factory.mktemp("faults") / "store"
    with ReplayStore.create(path, small_schema()) as store:
        Recorder(store).step(BEFORE)
    return path


def committed(path: Path) -> int:
    """How many transitions a reader finds, each as it was recorded and in order."""
    with ReplayStore.open(path) as reader:
        reader.check()
        numbers = check_transitions(reader)
    assert numbers == list(range(len(numbers)))
    return len(numbers)


def leftovers(path: Path) -> list[str]:
    return [file.name for file in path.rglob("*.partial")]


def assert_whole(path: Path, count: int) -> None:
    """The store opens with exactly these transitions, and nothing is wrong with it."""
    assert committed(path) == count
    assert list(verify(path)) == []


class Session:
    """Records on a faulty disk: a call that fails is checked, and made again when there is room."""

    def __init__(self, path: Path, disk: FaultyDisk, code: int) -> None:
        self._path = path
        self._disk = disk
        self._code = code
        self.acknowledged = BEFORE

    def record(self, *, patience: int) -> None:
        """Open, record over the ends of a shard and of an index part, close."""
        store = self._insist(lambda: ReplayStore.open(self._path, "a"), None, patience)
        recorder = Recorder(store, start=BEFORE)
        for steps in (2, 20):
            for _ in range(steps):
                self._insist(recorder.step, recorder, patience)
            self._insist(store.flush, recorder, patience)
            self.acknowledged = recorder.count
        recorder.step(3)
        self._insist(store.close, recorder, patience)
        self.acknowledged = recorder.count

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
                assert committed(self._path) == self.acknowledged
                return
            assert isinstance(error, CommitError)
            assert Path(error.filename).is_relative_to(self._path)
            assert self.acknowledged <= committed(self._path) <= recorder.count
            assert check_transitions(recorder.store) == list(range(recorder.count))


def record_on(disk: FaultyDisk, begun: Path, path: Path, code: int = errno.ENOSPC, *, patience: int = 1) -> bool:
    """Record on a copy of a store while calls fail as planned; whether one did."""
    shutil.copytree(begun, path)
    disk.failures = 0
    session = Session(path, disk, code)
    session.record(patience=patience)
    failed = disk.failures > 0
    disk.make_room()
    assert_whole(path, session.acknowledged)
    with ReplayStore.open(path, "a") as store:
        assert store.episodes["stream"].unique().to_pylist() == [0]
        assert leftovers(path) == []
    shutil.rmtree(path)
    return failed


def test_f7_full_disk_at_any_call_loses_nothing(disk, begun, tmp_path):
    for number in itertools.count(1):
        disk.fail(number)
        if not record_on(disk, begun, tmp_path / "store"):
            break
    assert number > 50


def test_f7_disk_that_stays_full_from_any_call_until_there_is_room_loses_nothing(disk, begun, tmp_path):
    for number in itertools.count(1):
        disk.fail(number, forever=True)
        if not record_on(disk, begun, tmp_path / "store", patience=2):
            break
    assert number > 50


@pytest.mark.parametrize("kind", ["open", "pwrite", "fsync", "replace", "mkdir", "ftruncate"])
def test_f7_call_that_keeps_failing_until_there_is_room_loses_nothing(kind, disk, begun, tmp_path):
    for number in (1, 2, 5, 9):
        disk.fail(number, kind=kind, forever=True)
        assert record_on(disk, begun, tmp_path / "store", patience=3) or number > 1


@pytest.mark.parametrize("name", ERRORS)
def test_f8_any_error_of_any_call_loses_nothing(name, disk, begun, tmp_path):
    rng = random.Random(name)
    code = getattr(errno, name)
    for kind in ("open", "pwrite", "fsync", "replace"):
        disk.fail(rng.randrange(1, 12), code, kind=kind)
        assert record_on(disk, begun, tmp_path / "store", code)


def test_f7_creating_a_store_on_a_full_disk_can_be_repeated(disk, tmp_path):
    for number in itertools.count(1):
        path = tmp_path / str(number)
        disk.fail(number)
        try:
            ReplayStore.create(path, small_schema()).close()
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC
        disk.make_room()
        assert open_files(path) == []
        opening = ReplayStore.open(path, "a") if (path / "zarr.json").exists() else None
        with opening or ReplayStore.create(path, small_schema()) as store:
            Recorder(store).step(10)
        assert_whole(path, 10)
    assert number > 10
    disk.make_room()


def test_f7_failed_commit_in_the_background_is_raised_at_the_next_call(disk, begun, tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", 0.001)
    path = shutil.copytree(begun, tmp_path / "store")
    with ReplayStore.open(path, "a") as store:
        recorder = Recorder(store, start=BEFORE)
        store.flush()
        disk.fail(1, forever=True)
        with pytest.raises(CommitError, match="No space left on device"):
            for _ in range(100_000):
                recorder.step()
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


def test_f14_short_writes_are_completed(disk, begun, tmp_path, monkeypatch):
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


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc/self/fd")
def test_f13_pages_that_a_failed_fsync_drops_are_written_again(disk, begun, tmp_path, monkeypatch):
    forgetful = ForgetfulDisk()
    monkeypatch.setattr(files, "os", forgetful)
    for number in itertools.count(1):
        forgetful.fail(number, errno.EIO, kind="fsync")
        if not record_on(forgetful, begun, tmp_path / "store", errno.EIO):
            break
    assert number > 20


@contextmanager
def mounted(path: Path, *arguments: str) -> Iterator[Path]:
    path.mkdir()
    done = subprocess.run(["mount", *arguments, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


needs_mount = pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")


def record_until_it_fails(store: ReplayStore, recorder: Recorder) -> tuple[CommitError, int]:
    """Returns the error, and how many transitions had been acknowledged before it."""
    acknowledged = recorder.count
    with pytest.raises(CommitError) as caught:
        for _ in range(1000):
            recorder.step(100)
            store.flush()
            acknowledged = recorder.count
    return caught.value, acknowledged


def fill(directory: Path, names: Iterator[str], nbytes: int) -> None:
    """Take what room there is, in files of this size, the last of them smaller."""
    while True:
        with open(directory / next(names), "wb", buffering=0) as file:
            if nbytes and file.write(bytes(nbytes)) < nbytes:
                return


@needs_mount
@pytest.mark.parametrize(("fault", "options"), [("F9", "size=1m"), ("F10", "size=8m,nr_inodes=60")])
def test_f9_f10_disk_that_is_really_full_can_be_recorded_on_when_there_is_room(fault, options, tmp_path):
    with mounted(tmp_path / fault, "-t", "tmpfs", "-o", options, "tmpfs") as mount:
        with ReplayStore.create(mount / "store", small_schema()) as store:
            recorder = Recorder(store)
            recorder.step(50)
            store.flush()
            fillers = (f"filler{i}" for i in itertools.count())
            with pytest.raises(OSError, match="No space left on device"):
                fill(mount, fillers, 65536 if fault == "F9" else 0)
            error, acknowledged = record_until_it_fails(store, recorder)
            assert error.errno == errno.ENOSPC
            assert acknowledged <= committed(mount / "store") <= recorder.count
            for filler in mount.glob("filler*"):
                filler.unlink()
            store.flush()
            recorder.step(10)
        assert_whole(mount / "store", recorder.count)
        assert leftovers(mount) == []


def test_f11_limit_on_the_size_of_files_loses_nothing(tmp_path, monkeypatch):
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


def test_f19_disk_that_hangs_stops_steps_only_when_memory_is_full(begun, tmp_path, monkeypatch):
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


def test_f22_file_that_cannot_be_read_is_an_error_and_not_data(disk, begun):
    for number in itertools.count(1):
        disk.fail(number, errno.EIO, kind="pread")
        findings = list(verify(begun))
        if not findings:
            break
        assert ["Input/output error" in str(finding) for finding in findings] == [True]
        disk.fail(number, errno.EIO, kind="pread")
        try:
            assert committed(begun) == BEFORE
        except OSError as error:
            assert error.errno == errno.EIO
    assert number > 10
    disk.make_room()


# ---- interrupts


def interrupt_at(number: int, call: Callable[[], Any]) -> str | None:
    """Make a call with a KeyboardInterrupt at its n-th line within the package; where that was."""
    package = str(Path(files.__file__).parent)
    lines = itertools.count(1)
    place = None

    def trace(frame: types.FrameType, event: str, _: Any) -> Any:
        nonlocal place
        name = frame.f_code.co_filename
        if event == "line" and name.startswith(package):
            # Python itself lets no signal in between the end of a `with` block and its exit
            is_with = linecache.getline(name, frame.f_lineno).lstrip().startswith("with ")
            if not is_with and next(lines) == number:
                place = f"{Path(name).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        assert place is not None
    finally:
        sys.settrace(before)
    return place


class Interrupted:
    """Records with interrupts: what returned is there once, what was interrupted at most once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = ReplayStore.create(path, small_schema())
        self.number = 0
        self.accepted: list[int] = []

    def begin(self) -> None:
        self.store.reset(observation(self.number))

    def step(self, *, ends: bool = False) -> None:
        number, self.number = self.number, self.number + 1
        self.store.step(number, observation(number + 1), number / 2, ends, False)
        self.accepted.append(number)

    def add_episode(self) -> None:
        number, self.number = self.number, self.number + 3
        recorder = Recorder(self.store, start=number)
        recorder.bulk(3)
        self.accepted += range(number, number + 3)

    def check(self, place: str | None) -> None:
        """After an interrupt: record an episode, flush, and have another look."""
        self.number += 10
        self.begin()
        self.step(ends=True)
        self.store.flush()
        self.store.check()
        with ReplayStore.open(self.path) as reader:
            numbers = check_transitions(reader)
        assert numbers == sorted(set(numbers)), place
        assert set(self.accepted) <= set(numbers), place
        assert [str(finding) for finding in verify(self.path)] == [], place


def interrupted_call(recording: Interrupted, name: str) -> Callable[[], Any]:
    """What is interrupted, on a store in which an episode is open or has just ended."""
    calls = {
        "reset": recording.begin,
        "step": recording.step,
        "last step": functools.partial(recording.step, ends=True),
        "add_episode": recording.add_episode,
        "flush": recording.store.flush,
        "sample": lambda: recording.store.sample(2),
    }
    if name != "add_episode":
        recording.begin()
        recording.step()
    return calls[name]


@pytest.mark.parametrize("name", ["reset", "step", "last step", "add_episode", "flush", "sample"])
def test_f6_interrupt_at_any_line_leaves_a_whole_store(name, tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", NEVER)
    monkeypatch.setattr("replaystore.commit.PART_EPISODES", 50)
    recording = Interrupted(tmp_path / "store")
    for number in itertools.count(1):
        place = interrupt_at(number, interrupted_call(recording, name))
        recording.check(place)
        if place is None:
            break
    recording.store.close()
    assert number > 5


@pytest.mark.parametrize("name", ["reset", "step"])
def test_f6_interrupt_at_any_line_leaves_all_environments_whole(name, tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", NEVER)
    store = ReplayStore.create(tmp_path / "store", small_schema(), num_envs=3)
    for number in itertools.count(1):
        frames = np.stack([observation(number)] * 3)
        step = functools.partial(store.step, np.arange(3), frames, np.ones(3), np.arange(3) == 1, np.arange(3) == 2)
        store.reset(frames)
        place = interrupt_at(number, step if name == "step" else functools.partial(store.reset, frames))
        store.reset(frames)
        step()
        store.flush()
        store.check()
        assert [str(finding) for finding in verify(tmp_path / "store")] == [], place
        if place is None:
            break
    store.close()
    assert number > 5


def test_f6_close_that_was_interrupted_at_any_line_can_be_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", NEVER)
    path = tmp_path / "store"
    ReplayStore.create(path, small_schema()).close()
    count, place = 0, "begin"
    for number in itertools.count(1):
        store = ReplayStore.open(path, "a")
        recorder = Recorder(store, start=count)
        recorder.step(3)
        count = recorder.count
        place = interrupt_at(number, store.close)
        store.close()
        assert open_files(path) == [], place
        assert committed(path) == count, place
        if place is None:
            break
    assert number > 5
    with ReplayStore.open(path) as store:
        assert store.episodes["stream"].unique().to_pylist() == [0]


@pytest.mark.parametrize("name", ["flush", "close"])
def test_f6_interrupt_while_waiting_for_the_commit_does_not_hide_that_it_failed(name, disk, begun, tmp_path):
    path = shutil.copytree(begun, tmp_path / "store")
    store = ReplayStore.open(path, "a")
    recorder = Recorder(store, start=BEFORE)
    recorder.step(3)
    disk.fail(1, forever=True)
    done = store._writer._done
    waited, done.wait = done.wait, interrupt
    with pytest.raises(KeyboardInterrupt):
        getattr(store, name)()
    done.wait = waited
    with pytest.raises(CommitError):
        getattr(store, name)()
    disk.make_room()
    store.close()
    assert_whole(path, recorder.count)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


RECORD_INTERRUPTED = """
import sys
sys.path.insert(0, sys.argv[2])
import replaystore.writer
from recording import *
replaystore.writer.COMMIT_SECONDS = 0.01
store = ReplayStore.open(sys.argv[1], "a")
number, interrupts, acknowledged = 0, 0, []
print("begun", flush=True)
while interrupts < 60:
    accepted = []
    try:
        store.reset(observation(number))
        while True:
            store.step(number, observation(number + 1), number / 2, number % 7 == 6, False)
            accepted.append(number)
            number += 1
            if number % 7 == 0:
                store.reset(observation(number))
            if number % 10 == 0:
                store.flush()
    except KeyboardInterrupt:
        interrupts += 1
        number += 1000
        acknowledged += accepted
        print("interrupted", flush=True)
store.close()
import json
print(json.dumps(acknowledged))
"""


def test_f6_sigint_at_random_moments_loses_no_accepted_row(tmp_path):
    path = tmp_path / "store"
    ReplayStore.create(path, small_schema()).close()
    child = start(RECORD_INTERRUPTED, path, Path(__file__).parent)
    rng = random.Random(0)
    line = child.stdout.readline()
    while line in ("begun\n", "interrupted\n"):
        time.sleep(rng.uniform(0.0, 0.01))
        child.send_signal(signal.SIGINT)
        line = child.stdout.readline()
    _, errors = child.communicate()
    assert child.returncode == 0, errors
    with ReplayStore.open(path) as store:
        store.check()
        numbers = check_transitions(store)
    assert numbers == sorted(set(numbers))
    assert set(json.loads(line)) <= set(numbers)
    assert list(verify(path)) == []


def count_signal(counter: Counter[int], number: int, _: object) -> None:
    counter[number] += 1


def test_f8_signals_that_are_handled_interrupt_no_call(begun, tmp_path):
    path = shutil.copytree(begun, tmp_path / "store")
    handled: Counter[int] = Counter()
    before = signal.signal(signal.SIGALRM, functools.partial(count_signal, handled))
    signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
    try:
        with ReplayStore.open(path, "a") as store:
            recorder = Recorder(store, start=BEFORE)
            for _ in range(30):
                recorder.step(5)
                store.flush()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert handled[signal.SIGALRM] > 30
    assert_whole(path, BEFORE + 150)


# ---- processes


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


RECORD_AND_STAY = """
import sys
sys.path.insert(0, sys.argv[2])
from recording import *
store = ReplayStore.open(sys.argv[1], "a")
recorder = Recorder(store, start=len(store))
recorder.step(10)
store.flush()
print(recorder.count, flush=True)
sys.stdin.readline()
recorder.step(10)
"""


def test_f27_stopped_writer_holds_nobody_up_and_goes_on(begun, tmp_path):
    path = shutil.copytree(begun, tmp_path / "store")
    child = start(RECORD_AND_STAY + "store.close()", path, Path(__file__).parent)
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
    _, errors = child.communicate("go on\n")
    assert child.returncode == 0, errors
    assert_whole(path, 50)


EXITS = {
    "the end of the program": "",
    "sys.exit": "sys.exit(3)",
    "an exception": "raise RuntimeError('no')",
    "os._exit": "import os; os._exit(4)",
    "a commit under way": (
        "import replaystore.writer, time; replaystore.writer.COMMIT_SECONDS = 0.0001\n"
        "for _ in range(300): recorder.step(); time.sleep(0.0001)"
    ),
}


@pytest.mark.parametrize("last", EXITS.values(), ids=EXITS)
def test_f37_exit_without_close_keeps_what_was_committed(last, begun, tmp_path):
    path = shutil.copytree(begun, tmp_path / "store")
    child = start(RECORD_AND_STAY + last, path, Path(__file__).parent)
    output, errors = child.communicate("go on\n", timeout=30)
    assert child.returncode >= 0, errors
    assert int(output) == 35
    count = committed(path)
    assert 35 <= count <= 345
    with ReplayStore.open(path, "a") as store:
        Recorder(store, start=count).step(10)
        assert store.episodes["stream"].unique().to_pylist() == [0]
    assert_whole(path, count + 10)


def test_f28_file_system_without_locks_is_refused_for_writing_and_read(begun, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files, "fcntl", types.SimpleNamespace(**vars(fcntl) | {"flock": flock}))
    with pytest.raises(LockUnsupported, match=r"lock: cannot lock: No locks available"):
        ReplayStore.open(begun, "a")
    assert open_files(begun) == []
    assert committed(begun) == BEFORE


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_f28_file_system_without_links_makes_a_store_or_says_why_not(code, disk, tmp_path):
    disk.fail(1, code, kind="link", forever=True)
    try:
        with ReplayStore.create(tmp_path / "store", small_schema()) as store:
            Recorder(store).step(5)
    except OSError as error:
        assert error.errno == code
        assert "link" in str(error)
    else:
        assert_whole(tmp_path / "store", 5)


def test_f29_memory_that_runs_out_in_a_commit_loses_nothing(begun, tmp_path, monkeypatch):
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


DAY = 86400.0


def test_f32_clock_that_jumps_changes_no_order(begun, tmp_path, monkeypatch):
    path = shutil.copytree(begun, tmp_path / "store")
    from replaystore.writer import StreamWriter

    jumps = [time.time() + DAY * days for days in (400, -400, 0, 3650, -3650)]
    for number, now in enumerate(jumps):
        monkeypatch.setitem(StreamWriter.__init__.__kwdefaults__, "clock", lambda now=now: now)
        with ReplayStore.open(path, "a") as store:
            Recorder(store, start=BEFORE + 7 * number).step(7)
    assert_whole(path, BEFORE + 7 * len(jumps))
    with ReplayStore.open(path) as store:
        times = store.episodes["start_time"].cast("int64").to_numpy()[-len(jumps) :]
        assert times.tolist() == [int(now * 1e6) for now in jumps]


@needs_mount
def test_f33_read_only_file_system_is_read_and_refused_for_writing(begun, tmp_path):
    with mounted(tmp_path / "mount", "--bind", "-o", "ro", str(begun.parent)) as mount:
        if os.access(mount, os.W_OK):
            subprocess.run(["mount", "-o", "remount,ro,bind", str(mount)], check=True)
        assert_whole(mount / "store", BEFORE)
        with pytest.raises(ReadOnlyError):
            ReplayStore.open(mount / "store", "a")
        with pytest.raises(ReadOnlyError):
            ReplayStore.create(mount / "new", small_schema())


def as_nobody(function: Callable[[], None]) -> int:
    """Run a function as another user, in a child; 0 if it raised nothing."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            function()
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.mark.skipif(os.getuid() != 0, reason="needs to be root, to become another user")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_f33_another_user_reads_and_is_refused_for_writing(begun):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = shutil.copytree(begun, Path(folder) / "store")

        def read_and_try_to_write() -> None:
            assert_whole(path, BEFORE)
            with pytest.raises(ReadOnlyError):
                ReplayStore.open(path, "a")
            shard = next((path / "streams/000000/observation/c").rglob("0"))
            with pytest.raises(OSError, match="Permission denied"):
                open(shard if shard.is_file() else path / "zarr.json", "r+b")

        assert as_nobody(read_and_try_to_write) == 0
        os.chmod(path / "streams/000000/action/c/0/0", 0)

        def name_the_file() -> None:
            with pytest.raises(OSError, match="action/c/0/0"):
                ReplayStore.open(path)

        assert as_nobody(name_the_file) == 0


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


def test_f34_copy_made_while_recording_is_right_or_found_wrong(begun, tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", NEVER)
    rng, outcomes = random.Random(0), Counter()
    path = shutil.copytree(begun, tmp_path / "store")
    with ReplayStore.open(path, "a") as store:
        recorder = Recorder(store, start=BEFORE)

        def record() -> None:
            recorder.step(rng.randrange(12))
            store.flush()

        for attempt in range(40):
            target = tmp_path / str(attempt)
            before = recorder.count
            copy_shuffled(path, target, rng, record)
            try:
                if list(verify(target)):
                    outcomes["found"] += 1
                    continue
                assert committed(target) >= before
                outcomes["right"] += 1
            except ReplayStoreError:
                outcomes["refused"] += 1
    assert outcomes["right"] > 0
    assert outcomes["found"] > 0
    assert outcomes.total() == 40


def test_f35_store_reached_by_a_symbolic_link_to_its_parent_is_read_and_written(begun, tmp_path):
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


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc/self/fd")
def test_f38_failures_leave_no_descriptor_thread_or_file_behind(disk, begun, tmp_path):
    path = shutil.copytree(begun, tmp_path / "store")
    with ReplayStore.open(path, "a") as store:
        recorder = Recorder(store, start=BEFORE)
        recorder.step(10)
        store.flush()
        names, before = sorted(path.rglob("*")), resources()
        for number in range(1000):
            recorder.step()
            disk.fail(1 + number % 37, kind=("fsync", "pwrite", "replace", "open")[number % 4])
            try:
                store.flush()
            except CommitError:
                disk.make_room()
                store.flush()
        assert disk.failures > 400
        disk.make_room()
        store.flush()
        gone = [name for name in names if not name.exists()]
        assert gone == []
        assert leftovers(path) == []
        assert resources() == before
    assert_whole(path, BEFORE + 1010)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc/self/fd")
def test_f38_opening_and_closing_leaves_no_descriptor_or_thread_behind(begun, tmp_path):
    path = shutil.copytree(begun, tmp_path / "store")
    before = resources()
    for number in range(200):
        with ReplayStore.open(path, "a" if number % 3 == 0 else "r") as store:
            store.refresh()
            assert len(store.sample(2).ids) == 2
    assert resources() == before


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc/self/fd")
def test_f38_opening_that_fails_leaves_no_descriptor_thread_or_lock_behind(begun, tmp_path):
    path = shutil.copytree(begun, tmp_path / "store")
    shard = path / "streams/000000/observation/c/0/0/0/0"
    content = shard.read_bytes()
    before = resources()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
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
