"""Power cuts of a real file system, write-back that fails on one, and kills for lack of memory."""

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_disk import assert_whole, committed, mounted, needs_mount
from recording import Recorder, schema
from test_faults import fill
from test_processes import started

from replaystore import ReplayStore
from replaystore.verify import verify

SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN of ext4 and xfs
NO_LOG_FLUSH = 2  # what is in the journal's memory alone is lost too, as when power goes

RECORD = """
sys.path.insert(0, sys.argv[2])
from recording import Recorder
replaystore.writer.COMMIT_SECONDS = 0.02
store = ReplayStore.open(path, "a")
recorder = Recorder(store, start=len(store))
while True:
    recorder.step(7)
    store.flush()
    say(recorder.count)
"""


def told_until(writer: subprocess.Popen, lines: int) -> list[int]:
    """How many transitions each `flush` that returned had saved."""
    return [int(writer.stdout.readline()) for _ in range(lines)]


def told_last(writer: subprocess.Popen) -> list[int]:
    """The rest of that, after a kill."""
    writer.kill()
    told, _ = writer.communicate()
    return list(map(int, told.split()))


needs_ext4 = pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="needs mkfs.ext4")


def new_image(image: Path, kind: str) -> Path:
    """A file that holds an empty file system of 320 MiB."""
    with open(image, "wb") as file:
        file.truncate(320 << 20)
    subprocess.run([f"mkfs.{kind}", "-q", str(image)], check=True, capture_output=True)
    return image


@pytest.fixture(params=["ext4", "xfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The image of an empty file system; it is mounted anew after each power cut."""
    if shutil.which(f"mkfs.{request.param}") is None:
        pytest.skip(f"needs mkfs.{request.param}")
    return new_image(tmp_path / "image", request.param)


@needs_mount
def test_power_cut_of_a_real_file_system_leaves_what_was_flushed(disk, tmp_path):
    told = 0
    for cut in range(4):
        with mounted(tmp_path / f"mount{cut}", "-o", "loop", str(disk)) as mount:
            path = mount / "store"
            if cut == 0:
                ReplayStore.create(path, schema()).close()
            else:
                assert committed(path) >= told
                assert list(verify(path)) == []
            writer = started(RECORD, path, Path(__file__).parent)
            try:
                counts = told_until(writer, 5 + 20 * cut)
                descriptor = os.open(mount, os.O_RDONLY)
                try:
                    fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
                finally:
                    os.close(descriptor)
            finally:
                rest = told_last(writer)
            told = [*counts, *rest][-1]
    with mounted(tmp_path / "last", "-o", "loop", str(disk)) as mount:
        assert committed(mount / "store") >= told >= 65 * 7
        with ReplayStore.open(mount / "store", "a") as store:
            recorder = Recorder(store, start=len(store))
            recorder.step(20)
        assert_whole(mount / "store", recorder.count)


@needs_mount
@needs_ext4
def test_write_back_that_fails_on_a_real_file_system_is_an_error_and_never_acknowledged(tmp_path):
    with mounted(tmp_path / "below", "-t", "tmpfs", "-o", "size=48m", "tmpfs") as below:
        image = new_image(below / "image", "ext4")  # sparse: its blocks need room below as they are written
        with mounted(tmp_path / "mount", "-o", "loop", str(image)) as mount:
            ReplayStore.create(mount / "store", schema()).close()
            writer = started(RECORD, mount / "store", Path(__file__).parent)
            counts = told_until(writer, 20)
            fill(below, 1 << 16)
            rest, errors = writer.communicate(timeout=60)
            assert "CommitError" in errors
            assert writer.returncode == 1
        for filler in below.glob("filler*"):
            filler.unlink()
        with mounted(tmp_path / "again", "-o", "loop", str(image)) as mount:
            assert committed(mount / "store") >= [*counts, *map(int, rest.split())][-1]
            with ReplayStore.open(mount / "store", "a") as store:
                recorder = Recorder(store, start=len(store))
                recorder.step(20)
            assert_whole(mount / "store", recorder.count)


MEMORY = Path("/sys/fs/cgroup/memory")
RECORD_WITHIN = """
with open(sys.argv[3], "w") as file:
    file.write(str(os.getpid()))
"""
TAKE_ALL = """
    if recorder.count == 700:
        import threading
        def take():
            held = []
            while True:
                held.append(np.ones(1 << 20))
        threading.Thread(target=take, daemon=True).start()
"""


@contextlib.contextmanager
def limited_memory(nbytes: int) -> Iterator[Path]:
    """A control group whose processes the kernel kills when they want more; gives its file of processes."""
    root = MEMORY if MEMORY.is_dir() else MEMORY.parent
    group = root / f"replaystore-test-{os.getpid()}"
    try:
        group.mkdir()
        names = ("memory.limit_in_bytes", "memory.max")
        next(group / name for name in names if (group / name).exists()).write_text(str(nbytes))
    except (OSError, StopIteration) as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"needs memory control groups that may be made: {error!r}")
    try:
        yield group / "cgroup.procs"
    finally:
        for _ in range(100):
            if not (group / "cgroup.procs").read_text():
                break
            time.sleep(0.02)
        group.rmdir()


def test_recorder_that_the_kernel_kills_for_lack_of_memory_loses_nothing_flushed(tmp_path):
    path = tmp_path / "store"
    ReplayStore.create(path, schema()).close()
    with limited_memory(400 << 20) as processes:
        writer = started(RECORD_WITHIN + RECORD + TAKE_ALL, path, Path(__file__).parent, processes)
        told, errors = writer.communicate(timeout=60)
    assert writer.returncode == -9, errors
    assert committed(path) >= int(told.split()[-1]) >= 700
    with ReplayStore.open(path, "a") as store:
        recorder = Recorder(store, start=len(store))
        recorder.step(20)
    assert_whole(path, recorder.count)
