"""Power cuts: every state that a disk may be left in opens at a commit, with all acknowledged rows."""

import dataclasses
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from recording import Recorder, check_transitions, schema
from simulated_disk import Choice, DiskLog, Image

from replaystore import ReplayStore, ReplayStoreError, Transition, commit, files, flat, packed, reservoir
from replaystore.evictions import read_evictions
from replaystore.index import STREAM_BIT

STATES = ("none", "all", "journal", "random")


def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seal shards and index parts after a few rows."""
    monkeypatch.setattr("replaystore.schema.SHARD_CHUNKS", 256)
    monkeypatch.setattr("replaystore.commit.PART_EPISODES", 3)
    monkeypatch.setattr("replaystore.commit.DEAD_BYTES", 2000)
    monkeypatch.setattr("replaystore.schema.FILE_ROWS", 4096)


def record(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Record with many flushes, a reopening, and the end of a flat file; returns the disk's log."""
    disk = DiskLog(root)
    monkeypatch.setattr(files, "os", disk)
    path = root / "store"
    with ReplayStore.create(path, schema()) as store:
        recorder = Recorder(store)
        recorder.bulk(4060)
        store.flush()
        disk.note("ack", recorder.count)
        for steps in (1, 1, 2, 3, 5, 1, 9):
            recorder.step(steps)
            store.flush()
            disk.note("ack", recorder.count)
    with ReplayStore.open(path, "a") as store:
        recorder = Recorder(store, start=recorder.count)
        for steps in (4, 10, 1, 2):
            recorder.step(steps)
            store.flush()
            disk.note("ack", recorder.count)
    disk.note("ack", recorder.count)
    monkeypatch.setattr(files, "os", __import__("os"))
    return disk.log


def failures(
    log: list[tuple],
    root: Path,
    scratch: Path,
    *,
    states: int,
    seed: int,
    find: Callable[..., str | None] | None = None,
) -> Iterator[str]:
    """Rebuild states at random points of the log; yields what `find` finds wrong with those that fail."""
    rng = random.Random(seed)
    cuts = sorted(rng.randrange(len(log) + 1) for _ in range(states))
    image, done, acknowledged = Image(root), 0, 0
    for cut in cuts:
        for entry in log[done:cut]:
            image.apply(entry)
            acknowledged = entry[1] if entry[0] == "ack" else acknowledged
        done = cut
        choice = Choice(rng.choice(STATES), rng)
        image.after_power_cut(choice, scratch)
        problem = (find or problem_of)(scratch / "store", acknowledged, append=rng.random() < 0.2)
        shutil.rmtree(scratch)
        if problem:
            yield f"after call {cut}, {choice.kind}: {problem}"


def problem_of(path: Path, acknowledged: int, *, append: bool) -> str | None:
    if not (path / "zarr.json").exists():
        return "no store" if acknowledged else None
    try:
        with ReplayStore.open(path, "a" if append else "r") as store:
            store.check()
            numbers = check_transitions(store)
            if numbers != list(range(len(numbers))) or len(numbers) < acknowledged:
                return f"{acknowledged} transitions acknowledged, found {len(numbers)}: {numbers[-5:]}"
            if append:
                Recorder(store, start=len(numbers)).step(20)
        if append:
            with ReplayStore.open(path) as store:
                assert check_transitions(store) == list(range(len(numbers) + 20))
    except (ReplayStoreError, AssertionError, UserWarning) as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_every_state_after_a_power_cut_opens_at_a_commit(tmp_path, monkeypatch):
    small_files(monkeypatch)
    log = record(tmp_path, monkeypatch)
    assert list(failures(log, tmp_path, tmp_path / "scratch", states=400, seed=0)) == []


BOUND = 300


def record_evicting(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Record several times what a store may hold, with a reopening; returns the disk's log."""
    disk = DiskLog(root)
    monkeypatch.setattr(files, "os", disk)
    with ReplayStore.create(root / "store", schema(), capacity=BOUND) as store:
        recorder = Recorder(store)
        for length in (250, 90, 61, 200, 33):
            recorder.bulk(length)
            store.flush()
            disk.note("ack", recorder.count)
    with ReplayStore.open(root / "store", "a") as store:
        recorder = Recorder(store, start=recorder.count)
        for steps in (40, 10, 75, 25):
            recorder.step(steps)
            store.flush()
            disk.note("ack", recorder.count)
        recorder.bulk(4000)
    disk.note("ack", recorder.count)
    monkeypatch.setattr(files, "os", __import__("os"))
    return disk.log


def problem_of_evicting(path: Path, acknowledged: int, *, append: bool) -> str | None:
    if not (path / "zarr.json").exists():
        return "no store" if acknowledged else None
    try:
        with ReplayStore.open(path, "a" if append else "r") as store:
            store.check()
            numbers = check_transitions(store)
            stop = numbers[-1] + 1 if numbers else 0
            if numbers != list(range(stop - len(numbers), stop)) or stop < acknowledged:
                return f"{acknowledged} transitions acknowledged, found {numbers[:1]} to {stop}"
            if len(numbers) < min(stop, BOUND // 2) or len(numbers) > BOUND:
                return f"{len(numbers)} transitions are left of {stop}"
            if append:
                Recorder(store, start=stop).bulk(200)
        if append:
            with ReplayStore.open(path) as store:
                assert check_transitions(store)[-200:] == list(range(stop, stop + 200))
                named = {f"{n}" for n in store._view.heads[0].files["observation"]}
                assert {each.name for each in (path / "streams/000000/observation/c").iterdir()} == named
    except (ReplayStoreError, AssertionError, UserWarning) as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_every_state_of_an_evicting_writer_opens_at_a_commit(tmp_path, monkeypatch):
    small_files(monkeypatch)
    log = record_evicting(tmp_path, monkeypatch)
    scratch = tmp_path / "scratch"
    found = failures(log, tmp_path, scratch, states=200, seed=0, find=problem_of_evicting)
    assert list(found) == []
    assert any(entry[0] == "unlink" and "/c/" in entry[1] for entry in log)


SMALL = 160


def record_reservoir(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Record several times what a reservoir may hold, with a reopening; returns the disk's log."""
    disk = DiskLog(root)
    monkeypatch.setattr(files, "os", disk)
    count = 0
    for rounds in (8, 3):
        rng = np.random.default_rng(rounds)
        if count:
            store = ReplayStore.open(root / "store", "a", rng=rng)
        else:
            store = ReplayStore.create(root / "store", schema(), capacity=SMALL, reservoir=True, rng=rng)
        with store:
            recorder = Recorder(store, start=count)
            for _ in range(rounds):
                recorder.bulk(21)
                recorder.step(14)
                store.flush()
                disk.note("ack", numbers_by_stream(store))
            count = recorder.count
    monkeypatch.setattr(files, "os", __import__("os"))
    return disk.log


def numbers_by_stream(store: ReplayStore) -> dict[int, set[int]]:
    """The transitions of each stream, each as it was recorded."""
    numbers = check_transitions(store)
    ids = store.read(np.arange(len(store)), Transition()).ids
    found: dict[int, set[int]] = {}
    for number, id_ in zip(numbers, ids.tolist(), strict=True):
        found.setdefault(id_ >> STREAM_BIT, set()).add(number)
    return found


def problem_of_reservoir(path: Path, acknowledged: int | dict[int, set[int]], *, append: bool) -> str | None:
    """All that was acknowledged is there, but for streams that are evicted, and those are named."""
    acknowledged = acknowledged or {}
    if not (path / "zarr.json").exists():
        return "no store" if acknowledged else None
    try:
        with ReplayStore.open(path, "a" if append else "r") as store:
            store.check()
            found = numbers_by_stream(store)
            evicted = {stream for stream, head in store._view.heads.items() if head.is_evicted}
            named = read_evictions(path, store._view.heads).streams
            for stream, numbers in acknowledged.items():
                if stream not in evicted and not numbers <= found.get(stream, set()):
                    return f"of stream {stream} {sorted(numbers)} was acknowledged, found {found.get(stream)}"
            if len(store) != len(set().union(*found.values())) or len(store) > SMALL:
                return f"{len(store)} transitions, {found}"
            if append and evicted != set(named):
                return f"expected the eviction of {named} to be finished, found that of {evicted}"
            if append:
                Recorder(store, start=10**6).bulk(100)
    except (ReplayStoreError, AssertionError, UserWarning) as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_every_state_of_a_reservoir_opens_with_all_that_is_not_evicted(tmp_path, monkeypatch):
    small_files(monkeypatch)
    log = record_reservoir(tmp_path, monkeypatch)
    scratch = tmp_path / "scratch"
    found = failures(log, tmp_path, scratch, states=100, seed=0, find=problem_of_reservoir)
    assert list(found) == []
    assert any(entry[0] == "unlink" and "/c/" in entry[1] for entry in log)


def evicted_before_it_is_named(patch: pytest.MonkeyPatch) -> None:
    """The file that names evictions is written, but its name is not made durable."""
    original = reservoir.write_evictions

    def write(path, evictions):
        sync, files.sync_directory = files.sync_directory, skip
        try:
            return original(path, evictions)
        finally:
            files.sync_directory = sync

    patch.setattr(reservoir, "write_evictions", write)


def test_an_eviction_that_is_not_durably_named_is_found(tmp_path, monkeypatch):
    small_files(monkeypatch)
    with monkeypatch.context() as patch:
        evicted_before_it_is_named(patch)
        log = record_reservoir(tmp_path, patch)
    scratch = tmp_path / "scratch"
    assert any(failures(log, tmp_path, scratch, states=200, seed=0, find=problem_of_reservoir))


def files_before_head(patch: pytest.MonkeyPatch) -> None:
    """Files are removed before the head that no longer names them is durable."""
    original = commit.StreamCommitter.evict

    def evict(committer, floor):
        before = committer.head
        committer.head = dataclasses.replace(before, evicted=before.evicted._replace(floor=floor))
        committer.remove_evicted()
        committer.head = before
        return original(committer, floor)

    patch.setattr(commit.StreamCommitter, "evict", evict)


def evicting_head_not_synced(patch: pytest.MonkeyPatch) -> None:
    """The directory of the head that names less is not synced before the files go."""
    original = commit.StreamCommitter.evict

    def evict(committer, floor):
        sync, files.sync_directory = files.sync_directory, skip
        try:
            return original(committer, floor)
        finally:
            files.sync_directory = sync

    patch.setattr(commit.StreamCommitter, "evict", evict)


@pytest.mark.parametrize("plant", [files_before_head, evicting_head_not_synced])
def test_an_eviction_that_removes_files_too_early_is_found(tmp_path, monkeypatch, plant):
    small_files(monkeypatch)
    with monkeypatch.context() as patch:
        plant(patch)
        log = record_evicting(tmp_path, patch)
    scratch = tmp_path / "scratch"
    assert any(failures(log, tmp_path, scratch, states=500, seed=0, find=problem_of_evicting)), plant


def skip(*_: object) -> None:
    """Stands for a call that a bug leaves out."""


def rename_before_sync(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    descriptor = files.os.open(partial, files.os.O_WRONLY | files.os.O_CREAT, 0o644)
    files.write_at(descriptor, data, 0)
    files.os.replace(partial, path)
    files.os.fsync(descriptor)
    files.os.close(descriptor)
    files.sync_directory(path.parent)


def test_planted_bugs_are_found(tmp_path, monkeypatch):
    small_files(monkeypatch)
    for name, plant in PLANTED.items():
        root = tmp_path / name
        root.mkdir()
        with monkeypatch.context() as patch:
            plant(patch)
            log = record(root, patch)
        assert any(failures(log, root, root / "scratch", states=500, seed=0)), name


def without_data_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(files.GrowingFile, "sync", skip)


def without_directory_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(files, "sync_directory", skip)


def head_synced_after_rename(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("replaystore.head.write_atomic", rename_before_sync)


def chunks_over_the_last_index(patch: pytest.MonkeyPatch) -> None:
    """New chunks take the place of the committed index, as a shard that is simply appended to."""
    original = packed.PackedWriter._append

    def append(writer, number, chunks):
        if old := writer.shards.get(number):
            start = old.nbytes - 16 * writer.chunks - 4
            writer.shards[number] = dataclasses.replace(old, nbytes=start)
        return original(writer, number, chunks)

    patch.setattr(packed.PackedWriter, "_append", append)


def head_before_data(patch: pytest.MonkeyPatch) -> None:
    """Data is written and synced only after the head that names it."""
    late = []
    original = flat.FlatWriter.write
    head = commit.write_head

    def write(writer, cells, floor):
        real_write, real_sync = files.GrowingFile.write, files.GrowingFile.sync
        files.GrowingFile.write = lambda file, data, offset: late.append((file.path, bytes(data), offset))
        files.GrowingFile.sync = skip
        try:
            return original(writer, cells, floor)
        finally:
            files.GrowingFile.write, files.GrowingFile.sync = real_write, real_sync

    def write_head(*args):
        written = head(*args)
        for path, data, offset in late:
            with files.GrowingFile.create(path, is_named=True) as file:
                file.write(data, offset)
                file.sync()
        late.clear()
        return written

    patch.setattr(flat.FlatWriter, "write", write)
    patch.setattr(commit, "write_head", write_head)


PLANTED = {
    "data not synced": without_data_sync,
    "directory not synced": without_directory_sync,
    "head renamed before it is synced": head_synced_after_rename,
    "chunks over the last index": chunks_over_the_last_index,
    "head before data": head_before_data,
}
