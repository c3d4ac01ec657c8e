"""Interrupts, signals and exits at any moment: what was accepted is there once, the store stays whole."""

import functools
import itertools
import json
import linecache
import os
import random
import shutil
import signal
import sys
import time
import traceback
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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
    small_schema,
    some_numbers,
)
from recording import Recorder, check_transitions, observation
from test_processes import started

from replaystore import CommitError, ReplayStore, files
from replaystore.verify import verify

PACKAGE = str(Path(files.__file__).parent)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return begin(tmp_path_factory.mktemp("interrupts") / "store")


@pytest.fixture
def _commits_on_request(_no_syncs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", NEVER)


def interrupt_at(
    number: int, call: Callable[[], Any], *, again: bool = True, but: str | None = None
) -> str | None:
    """Make a call with a KeyboardInterrupt at its n-th line within the package; where that was.

    Lines that run again count each time, or else the first time only; those of the file `but` never.
    """
    lines: list[str] = []
    place = None

    def trace(frame: types.FrameType, event: str, _: Any) -> Any:
        nonlocal place
        name = frame.f_code.co_filename
        if not name.startswith(PACKAGE) or place is not None or Path(name).name == but:
            return None
        # Python itself lets no signal in at a `try`, nor between the end of a `with` block and its exit
        if event != "line" or linecache.getline(name, frame.f_lineno).lstrip().startswith(("with ", "try:")):
            return trace
        line = f"{Path(name).name}:{frame.f_lineno}"
        if again or line not in lines:
            lines.append(line)
            if len(lines) == number:
                place = line
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
        Recorder(self.store, start=number).bulk(3)
        self.accepted += range(number, number + 3)

    def prepared(self, name: str) -> Callable[[], Any]:
        """The call to interrupt, with an episode open before all but `add_episode`."""
        calls = {
            "reset": self.begin,
            "step": self.step,
            "last step": functools.partial(self.step, ends=True),
            "add_episode": self.add_episode,
            "flush": self.store.flush,
        }
        if name != "add_episode":
            self.begin()
            self.step()
        return calls[name]

    def go_on(self) -> None:
        """After an interrupt: record an episode, and flush."""
        self.number += 10
        self.begin()
        self.step(ends=True)
        self.store.flush()
        self.store.check()

    def check(self, places: list[str | None]) -> None:
        with ReplayStore.open(self.path) as reader:
            numbers = check_transitions(reader)
        assert numbers == sorted(set(numbers)), places
        assert set(self.accepted) <= set(numbers), places
        assert [str(finding) for finding in verify(self.path)] == [], places


@pytest.mark.usefixtures("_commits_on_request")
@pytest.mark.parametrize("name", ["reset", "step", "last step", "add_episode", "flush"])
def test_an_interrupt_at_any_line_leaves_a_whole_store(name, tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.commit.PART_EPISODES", 50)
    recording = Interrupted(tmp_path / "store")
    places: list[str | None] = ["begin"]
    while places[-1] is not None:
        places.append(interrupt_at(len(places), recording.prepared(name)))
        recording.go_on()
        if len(places) % 20 == 0:
            recording.check(places[-20:])
    recording.store.close()
    recording.check(places[-20:])
    assert len(places) > 5


@pytest.mark.usefixtures("_commits_on_request")
@pytest.mark.parametrize("name", ["reset", "step"])
def test_an_interrupt_at_any_line_leaves_all_environments_whole(name, tmp_path):
    store = ReplayStore.create(tmp_path / "store", small_schema(), num_envs=3)
    places: list[str | None] = []
    for number in some_numbers():
        frames = np.stack([observation(number)] * 3)
        step = functools.partial(
            store.step, np.arange(3), frames, np.ones(3), np.arange(3) == 1, np.arange(3) == 2
        )
        store.reset(frames)
        places.append(
            interrupt_at(number, step if name == "step" else functools.partial(store.reset, frames))
        )
        store.reset(frames)
        step()
        if len(places) % 4 == 0:
            store.flush()
        if len(places) % 20 == 0:
            store.check()
            assert [str(finding) for finding in verify(tmp_path / "store")] == [], places[-20:]
        if places[-1] is None:
            break
    store.close()
    assert [str(finding) for finding in verify(tmp_path / "store")] == [], places[-20:]
    assert len(places) > 5


@pytest.mark.usefixtures("_commits_on_request")
def test_close_that_was_interrupted_at_any_line_can_be_repeated(tmp_path):
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
def test_an_interrupt_while_waiting_for_a_commit_does_not_hide_that_it_failed(
    name, begun, tmp_path, monkeypatch
):
    disk = install(FaultyDisk(), monkeypatch)
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


def in_child(function: Callable[[], None]) -> int:
    """Run a function in a forked child, which may crash; 0 if it raised nothing."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1]


def interrupt_reading(path: Path, *, writes: bool) -> None:
    """Read with an interrupt at one line after another, while there is always something new to see."""
    writer = ReplayStore.open(path, "a")
    recorder = Recorder(writer, start=BEFORE)
    store = writer if writes else ReplayStore.open(path)
    places: list[str | None] = []
    for number in some_numbers():
        recorder.step(9)
        writer.flush()
        read = lambda: (writes or store.refresh(), store.sample(3))  # noqa: E731
        places.append(interrupt_at(number, read, again=False))
        if not writes:
            store.refresh()
        newest = store.read(np.arange(len(store) - 20, len(store)))
        assert newest.action.tolist() == list(range(recorder.count - 20, recorder.count)), places[-1]
        if len(places) % 20 == 0 or places[-1] is None:
            store.check()
            assert check_transitions(store) == list(range(recorder.count)), places[-20:]
        if places[-1] is None:
            break
    assert len(places) > 50


@pytest.mark.usefixtures("_commits_on_request")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("writes", [False, True], ids=["reader", "writer"])
def test_an_interrupt_at_any_line_of_sampling_harms_no_later_sample(writes, begun, tmp_path):
    path = shutil.copytree(begun, tmp_path / "store")
    assert in_child(lambda: interrupt_reading(path, writes=writes)) == 0


# ---- signals and exits

RECORD_INTERRUPTED = """
import signal
sys.path.insert(0, sys.argv[2])
from recording import observation
replaystore.writer.COMMIT_SECONDS = 0.01
store = ReplayStore.open(path, "a")
number, acknowledged = 0, []
for _ in range(60):
    accepted = []
    try:
        say("interrupt me")
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
        number += 1000
        acknowledged += accepted
store.close()
say(acknowledged)
"""


def test_an_interrupt_at_any_moment_loses_no_accepted_row(tmp_path):
    path = tmp_path / "store"
    ReplayStore.create(path, small_schema()).close()
    rng = random.Random(0)
    with started(RECORD_INTERRUPTED, path, Path(__file__).parent) as child:
        while (answer := json.loads(child.stdout.readline() or "null")) == "interrupt me":
            time.sleep(rng.uniform(0.0, 0.01))
            child.send_signal(signal.SIGINT)
        errors = child.stderr.read()
    assert child.returncode == 0, errors
    with ReplayStore.open(path) as store:
        store.check()
        numbers = check_transitions(store)
    assert numbers == sorted(set(numbers))
    assert set(answer) <= set(numbers)
    assert list(verify(path)) == []


def count_signal(counter: Counter[int], number: int, _: object) -> None:
    counter[number] += 1


def test_signals_that_are_handled_interrupt_no_call(begun, tmp_path):
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


RECORD_AND_EXIT = """
import time
sys.path.insert(0, sys.argv[2])
from recording import Recorder
store = ReplayStore.open(path, "a")
recorder = Recorder(store, start=len(store))
recorder.step(10)
store.flush()
say(recorder.count)
recorder.step(10)
"""

EXITS = {
    "the end of the program": "",
    "sys.exit": "sys.exit(3)",
    "an exception": "raise RuntimeError('no')",
    "os._exit": "os._exit(4)",
    "a commit under way": (
        "replaystore.writer.COMMIT_SECONDS = 0.0001\nfor _ in range(300): recorder.step(); time.sleep(0.0001)"
    ),
}


@pytest.mark.parametrize("last", EXITS.values(), ids=EXITS)
def test_an_exit_without_close_keeps_what_was_committed(last, begun, tmp_path):
    path = shutil.copytree(begun, tmp_path / "store")
    child = started(RECORD_AND_EXIT + last, path, Path(__file__).parent)
    output, errors = child.communicate(timeout=30)
    assert child.returncode >= 0, errors
    assert int(output) == BEFORE + 10
    count = committed(path)
    assert BEFORE + 10 <= count <= BEFORE + 320
    with ReplayStore.open(path, "a") as store:
        Recorder(store, start=count).step(10)
        assert store.episodes["stream"].unique().to_pylist() == [0]
    assert_whole(path, count + 10)
