"""A crash or a power cut at any moment leaves a store, and its checkpoints, before or after."""

import contextlib
import errno
import os
import random
import shutil

import pytest
from faulty_disk import NEVER, FaultyDisk, install, leftovers, small_schema, some_numbers
from recording import Recorder, check_transitions
from simulated_disk import Choice, DiskLog, Image

from replaystore import ReplayStore, ReplayStoreError, files
from replaystore.checkpoints import checkpoint_names
from replaystore.commit import StreamCommitter
from replaystore.verify import verify

# ---- crashes


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A store with a checkpoint at 25 of its 40 transitions."""
    monkeypatch.setattr("replaystore.commit.PART_EPISODES", 3)
    with ReplayStore.create(tmp_path / "store", small_schema()) as store:
        recorder = Recorder(store)
        recorder.step(25)
        store.checkpoint("here", {"x": 1})
        recorder.step(15)
    return tmp_path / "store"


@pytest.fixture
def disk(monkeypatch):
    return install(FaultyDisk(), monkeypatch)


def assert_at(path, count):
    with ReplayStore.open(path) as store:
        store.check()
        assert check_transitions(store) == list(range(count))
    assert list(verify(path)) == []


@pytest.mark.parametrize("forever", [True, False])
def test_a_crash_at_any_call_of_going_back_leaves_the_store_before_or_after(forever, disk, begun, tmp_path):
    copy, seen = tmp_path / "copy", set()
    for number in some_numbers():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(begun, copy)
        disk.failures = 0
        disk.fail(number, errno.EIO, forever=forever)
        try:
            store = ReplayStore.open(copy, "a", at="here")
        except OSError:
            store = None
        disk.make_room()
        with ReplayStore.open(copy) as reader:
            count = len(reader)
        assert_at(copy, count)
        seen.add((count, store is None))
        if store is not None:
            store.close()
        with ReplayStore.open(copy, "a", at="here") as store:
            assert check_transitions(store) == list(range(25))
            recorder = Recorder(store, start=25)
            recorder._is_open = True
            recorder.step(30)
        assert_at(copy, 55)
        assert leftovers(copy) == []
        if not disk.failures:
            break
    assert number > 10
    assert seen >= {(40, True), (25, True), (25, False)}


def test_a_crash_at_any_call_of_a_checkpoint_leaves_the_one_before_or_the_new_one(disk, begun, tmp_path):
    copy, seen = tmp_path / "copy", set()
    for number in some_numbers():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(begun, copy)
        disk.failures = 0
        with ReplayStore.open(copy, "a") as store:
            recorder = Recorder(store, start=40)
            recorder.step(3)
            disk.fail(number, errno.ENOSPC, forever=True)
            try:
                store.checkpoint("here", {"x": 2}, keep=1)
            except OSError:
                seen.add("failed")
            disk.make_room()
        names = checkpoint_names(copy)
        assert names == ["here"]
        with ReplayStore.open(copy, "a", at="here") as store:
            found = store.restore("here")["x"]
            assert check_transitions(store) == list(range({1: 25, 2: 43}[found]))
            store.checkpoint("next")
        assert leftovers(copy) == []
        seen.add(found)
        if not disk.failures:
            break
    assert seen == {"failed", 1, 2}


def test_removing_old_checkpoints_comes_after_the_new_one_is_durable(disk, begun):
    with ReplayStore.open(begun, "a") as store:
        store.checkpoint("second")
        disk.fail(1, errno.EIO, kind="replace", forever=True)
        with pytest.raises(OSError, match="Input/output"):
            store.checkpoint("third", keep=1)
        disk.make_room()
        assert checkpoint_names(begun) == ["here", "second"]
        store.checkpoint("third", keep=1)
        assert checkpoint_names(begun) == ["third"]


def begin_two(path):
    """A checkpoint of two streams, and what came later; the other's open episode would fill an index part."""
    with ReplayStore.create(path, small_schema()) as store, ReplayStore.open(path, "a") as other:
        first, second = Recorder(store), Recorder(other, start=105)
        first.step(14)
        second.step(17)
        other.flush()
        store.refresh()
        store.checkpoint("here")
        first.step(30)
        second.step(30)


def test_streams_go_back_one_by_one_each_before_or_after(disk, tmp_path):
    begin_two(tmp_path / "store")
    copy, seen = tmp_path / "copy", set()
    for number in some_numbers():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tmp_path / "store", copy)
        disk.failures = 0
        disk.fail(number, errno.EIO, forever=True)
        with contextlib.suppress(OSError), ReplayStore.open(copy, "a", at="here"):
            disk.make_room()
        disk.make_room()
        with ReplayStore.open(copy) as store:
            store.check()
            numbers = sorted(check_transitions(store))
        counts = sum(each < 105 for each in numbers), sum(each >= 105 for each in numbers)
        assert numbers == [*range(counts[0]), *range(105, 105 + counts[1])]
        seen.add(counts)
        assert list(verify(copy)) == []
        with ReplayStore.open(copy, "a", at="here") as store:
            assert sorted(check_transitions(store)) == [*range(14), *range(105, 122)]
        if not disk.failures:
            break
    assert seen == {(44, 47), (14, 47), (14, 17)}


# ---- power cuts


def go_back_and_on(root, monkeypatch):
    """Checkpoints, going back, and recording on, with index parts sealed; returns the disk's log."""
    disk = DiskLog(root)
    monkeypatch.setattr("replaystore.commit.PART_EPISODES", 3)
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", NEVER)
    monkeypatch.setattr(files, "os", disk)
    path = root / "store"
    with ReplayStore.create(path, small_schema()) as store:
        recorder = Recorder(store)
        recorder.step(25)
        store.checkpoint("here")
        disk.note("ack", ("here", 25))
        for _ in range(6):
            recorder.step(9)
            store.flush()
    for _ in range(2):
        with ReplayStore.open(path, "a", at="here") as store:
            recorder = Recorder(store, start=25)
            recorder._is_open = True
            for _ in range(4):
                recorder.step(9)
                store.flush()
            store.checkpoint("later")
            disk.note("ack", ("later", 61))
            recorder.step(9)
    monkeypatch.setattr(files, "os", os)
    return disk.log


def cut_problem(path, acknowledged):
    """What is wrong with a store after a power cut; every history of it has the same rows."""
    try:
        with ReplayStore.open(path) as store:
            store.check()
            count = len(store)
            assert check_transitions(store) == list(range(count))
        for name, expected in acknowledged.items():
            assert name in checkpoint_names(path), name
            shutil.copytree(path, path.with_name("again"))
            with ReplayStore.open(path.with_name("again"), "a", at=name) as store:
                assert check_transitions(store) == list(range(expected))
                store.restore(name)
                Recorder(store, start=expected).step(15)
            assert list(verify(path.with_name("again"))) == []
            shutil.rmtree(path.with_name("again"))
    except (ReplayStoreError, AssertionError, UserWarning) as error:
        return f"{type(error).__name__}: {error}"
    return None


def cut_problems(log, root, states):
    rng, image, done, acknowledged = random.Random(1), Image(root), 0, {}
    for cut in sorted(rng.randrange(len(log) + 1) for _ in range(states)):
        for entry in log[done:cut]:
            image.apply(entry)
            if entry[0] == "ack":
                acknowledged |= dict([entry[1]])
        done = cut
        if acknowledged:
            image.after_power_cut(Choice(rng.choice(("none", "all", "journal", "random")), rng), root / "cut")
            problem = cut_problem(
                root / "cut/store", {"here": 25} if "later" in acknowledged else acknowledged
            )
            shutil.rmtree(root / "cut")
            if problem:
                yield f"after call {cut}: {problem}"


def test_every_state_after_a_power_cut_goes_back_to_its_checkpoint(tmp_path, monkeypatch):
    log = go_back_and_on(tmp_path, monkeypatch)
    assert list(cut_problems(log, tmp_path, 60)) == []


def test_parts_of_the_index_that_go_too_early_are_found(tmp_path, monkeypatch):
    """A planted bug: they are removed before the head that no longer names them is durable."""
    commit = StreamCommitter.commit

    def removing_first(self, pending, ring):
        if pending.base is not None:
            for part in self.head.parts[len(pending.base.parts) :]:
                files.remove(self.path / "index" / f"{part.number:06d}.arrow")
        return commit(self, pending, ring)

    monkeypatch.setattr(StreamCommitter, "commit", removing_first)
    log = go_back_and_on(tmp_path, monkeypatch)
    monkeypatch.setattr(StreamCommitter, "commit", commit)
    assert next(cut_problems(log, tmp_path, 150), None) is not None
