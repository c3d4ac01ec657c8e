"""A disk whose calls fail as planned, and the store that is recorded on it."""

import contextlib
import errno
import functools
import itertools
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from recording import Recorder, check_transitions, schema

from replaystore import ReplayStore, Schema, files
from replaystore.verify import verify

CHANGES = ("open", "pwrite", "fsync", "replace", "link", "unlink", "mkdir", "ftruncate", "rename")
READS = os.O_WRONLY | os.O_RDWR | os.O_DIRECTORY  # without any of these a file is opened to be read
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

    @contextlib.contextmanager
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
        is_planned = name == kind or (kind is None and name in CHANGES)
        if is_planned and not (name == "open" and arguments[1] & READS == 0):
            self.counts[name] += 1
            number = self.counts.total()
            if number == first or (forever and number > first):
                self.failures += 1
                path = arguments[0] if isinstance(arguments[0], str | Path) else None
                raise OSError(code, os.strerror(code), path)
        if name != "fsync":  # no power cut here
            return getattr(os, name)(*arguments)


def some_numbers(seed: int = 0) -> Iterator[int]:
    """Numbers from 1 without end, of which about every second one is left out."""
    rng = random.Random(seed)
    for start in itertools.count(1, 4):
        yield from sorted(rng.sample(range(start, start + 4), 2))


def install(disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch) -> FaultyDisk:
    """Put a disk in the place of the system's, with commits only when they are asked for."""
    monkeypatch.setattr(files, "os", disk)
    monkeypatch.setattr("replaystore.commit.PART_EPISODES", 3)
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", NEVER)
    return disk


def small_schema() -> Schema:
    """Shards of 32 rows."""
    return Schema(schema().fields, file_rows=4096, shard_chunks=16)


def begin(path: Path) -> Path:
    """Make a store of some transitions, whose last chunk is not full."""
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


def assert_whole(path: Path, count: int) -> None:
    """The store opens with exactly these transitions, and nothing is wrong with it."""
    assert committed(path) == count
    assert list(verify(path)) == []


def leftovers(path: Path) -> list[str]:
    return [file.name for file in path.rglob("*.partial")]


def failure_of(call: Callable[[], Any]) -> OSError | None:
    """The error that a call raises; what it returns is closed."""
    try:
        call().close()
    except OSError as error:
        return error
    return None


needs_descriptors = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc/self/fd")
needs_mount = pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")


@contextlib.contextmanager
def mounted(path: Path, *arguments: str) -> Iterator[Path]:
    path.mkdir()
    done = subprocess.run(["mount", *arguments, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)
