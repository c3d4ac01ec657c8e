"""Calls to the operating system that others' calls may come between."""

import mmap
import os
import resource
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from replaystore import files
from replaystore.files import (
    HAS_HUGE_PAGES,
    HUGE_PAGE,
    MAX_STRETCHES,
    PAGE,
    AddressRange,
    _limit_files,
    drop_from_cache,
    major_faults,
    map_whole,
    memory_limit,
    populate,
    prefetch,
)


def test_file_that_is_replaced_meanwhile_is_mapped_as_it_was_or_as_it_is(tmp_path):
    path, done = tmp_path / "shard", threading.Event()
    path.write_bytes(b"a" * 9000)

    def replace():
        for number in range(10**6):
            if done.is_set():
                return
            part = tmp_path / "shard.partial"
            part.write_bytes(b"a" * 9000 if number % 2 else b"b" * 100)
            os.replace(part, path)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        found = [map_whole(path) for _ in range(3000)]
    finally:
        done.set()
        thread.join()
    assert {(len(data), *np.unique(data).tolist()) for data in found} == {(9000, 97), (100, 98)}


def mapped_bytes():
    lines = Path("/proc/self/maps").read_text().splitlines()
    ends = [line.split(" ", 1)[0].split("-") for line in lines]
    return sum(int(stop, 16) - int(start, 16) for start, stop in ends)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the maps of a process are read from /proc")
def test_addresses_begin_at_a_huge_page_and_none_are_kept_besides():
    before, size = mapped_bytes(), 2 * HUGE_PAGE + 3 * PAGE
    ranges = [AddressRange(size - 1) for _ in range(50)]
    assert all(each.address % HUGE_PAGE == 0 for each in ranges)
    assert 50 * size <= mapped_bytes() - before < 51 * size
    del ranges
    assert mapped_bytes() - before < size


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b\n", {"a/memory.max": "5000", "a/b/memory.max": "max", "memory.max": "9000"}, [5000, 9000]),
        ("0::/\n", {"memory.max": "max"}, []),
        ("0::/a/b\n", {"memory.max": "7000"}, [7000]),
        (
            "3:cpu:/a\n2:memory:/a\n",
            {"memory/a/memory.limit_in_bytes": "800", "cpu/a/memory.limit_in_bytes": "1"},
            [800],
        ),
        ("", {"memory.max": "7000"}, []),
    ],
)
def test_memory_is_what_control_groups_leave_of_the_machines(groups, files, expected, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "groups").write_text(groups)
    found = [each.read_text() for each in _limit_files(tmp_path / "groups", tmp_path)]
    assert sorted(int(text) for text in found if text != "max") == expected
    assert list(_limit_files(tmp_path / "none", tmp_path)) == []
    assert 1 << 20 < memory_limit() <= os.sysconf("SC_PHYS_PAGES") * PAGE


@pytest.mark.skipif(not HAS_HUGE_PAGES, reason="there are no huge pages")
def test_pages_of_huge_ranges_are_read_from_disk_together(tmp_path):
    path, nbytes = tmp_path / "file", 2 * HUGE_PAGE
    path.write_bytes(bytes(nbytes))

    def waits(huge, *, changed=False):
        drop_from_cache(tmp_path)
        range_ = AddressRange(nbytes, huge=huge)
        range_.place(path, offset=0, nbytes=nbytes)
        if changed:
            range_.read_by_page()
        before = major_faults()
        assert not np.asarray(range_)[::PAGE].any()
        return major_faults() - before

    one_by_one = waits(huge=False)
    if one_by_one < nbytes // PAGE // 2:
        pytest.skip("this file system keeps files in memory")
    assert waits(huge=True) <= one_by_one // 16
    assert waits(huge=True, changed=True) >= one_by_one // 2


def test_empty_file_is_mapped_as_no_bytes(tmp_path):
    (tmp_path / "empty").touch()
    assert map_whole(tmp_path / "empty").shape == (0,)


class Calls:
    """In the place of the C library; `answer` is what `process_madvise` returns of the bytes asked for."""

    def __init__(self, answer):
        self.answer = answer
        self.at_once, self.one_by_one = [], []

    def process_madvise(self, process, address, count, advice, flags):
        assert advice == mmap.MADV_WILLNEED
        assert count <= MAX_STRETCHES
        stretches = np.ctypeslib.as_array((files.ctypes.c_int64 * (2 * count)).from_address(address))
        self.at_once += stretches.reshape(-1, 2).tolist()
        return self.answer(int(stretches[1::2].sum()))

    def madvise(self, address, length, advice):
        assert advice == mmap.MADV_WILLNEED
        self.one_by_one.append([address, length])


@pytest.mark.parametrize(
    "answer",
    [lambda nbytes: nbytes, lambda nbytes: nbytes - PAGE, lambda nbytes: -1],
    ids=["all", "part", "none"],
)
def test_pages_are_asked_for_at_once_or_else_one_by_one(answer, monkeypatch):
    calls = Calls(answer)
    monkeypatch.setattr(files, "_libc", calls)
    monkeypatch.setattr(files, "_process_madvise", calls.process_madvise)
    addresses = np.arange(1, MAX_STRETCHES + 3) * 3 * PAGE + 5
    prefetch(addresses, np.full(len(addresses), PAGE))
    expected = [[address - 5, PAGE + 5] for address in addresses.tolist()]
    assert calls.at_once == expected
    assert calls.one_by_one == ([] if answer(PAGE) == PAGE else expected)


def test_pages_are_asked_for_one_by_one_where_the_system_has_no_other_way(monkeypatch):
    calls = Calls(None)
    monkeypatch.setattr(files, "_libc", calls)
    monkeypatch.setattr(files, "_process_madvise", None)
    prefetch(np.array([PAGE, 7 * PAGE]), np.array([10, 20]))
    assert calls.one_by_one == [[PAGE, 10], [7 * PAGE, 20]]


def test_pages_of_a_mapped_file_may_be_asked_for(tmp_path):
    (tmp_path / "file").write_bytes(b"a" * 10 * PAGE)
    data = map_whole(tmp_path / "file")
    before = len(os.listdir("/proc/self/fd"))
    prefetch(data.ctypes.data + np.arange(10) * PAGE, np.full(10, 100))
    assert len(os.listdir("/proc/self/fd")) == before
    assert (data == ord("a")).all()


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels are not asked")
def test_memory_that_was_populated_is_there_before_it_is_written_to():
    array = np.zeros(PAGE * 500, np.uint8)
    array[7] = 7
    populate(array[: PAGE * 400])
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    array[: PAGE * 399 : PAGE] += 1
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < 50
    assert array.sum() == 7 + 399
    populate(array[3:9])  # no whole page
