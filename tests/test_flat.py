import os
from pathlib import Path

import numpy as np
import pytest
from test_windows import random_value

from replaystore.codec import crc32c
from replaystore.errors import CorruptionError
from replaystore.field import Field
from replaystore.files import HUGE_PAGE, WRITES_BACK_PARTS, AddressRange, chunk_path, major_faults
from replaystore.flat import FlatColumn, FlatWriter

FILE_ROWS = 4096


class Growing:
    """A flat array and what it should hold: a list of rows for each environment."""

    def __init__(self, path, field, num_envs, rng):
        self.path, self.field, self.num_envs, self.rng = path, field, num_envs, rng
        self.columns = [[] for _ in range(num_envs)]
        self.files = {}
        self.writer = self.make_writer()

    def make_writer(self):
        return FlatWriter(self.path, self.field, num_envs=self.num_envs, time_chunk=FILE_ROWS)

    def lengths(self):
        return [len(column) for column in self.columns]

    def append(self, counts, *, keep=True):
        """Write some rows of each environment; without `keep` as a commit that fails after it."""
        old = self.lengths()
        new = [length + count for length, count in zip(old, counts, strict=True)]
        cells = self.writer.cells(max(new))
        floor = self.writer.state.floor
        for env, (start, stop) in enumerate(zip(old, new, strict=True)):
            rows = [random_value(self.field, self.rng) for _ in range(start, stop)]
            if rows:
                cells[start - floor : stop - floor, env] = rows
            if keep:
                self.columns[env].extend(rows)
        state, files = self.writer.write(cells, min(new))
        if keep:
            self.writer.state = state
            self.files |= {file.number: file for file in files}

    def resume(self):
        state, self.writer = self.writer.state, self.make_writer()
        self.writer.resume(min(self.lengths()), max(self.lengths()))
        assert self.writer.state == state

    def read(self):
        """All files as one array (time, env, *shape), through the map."""
        count = -(-max(self.lengths()) // FILE_ROWS)
        rows = FILE_ROWS * self.num_envs
        column = FlatColumn(self.field, count * rows)
        for number in range(count):
            column.place(self.path, number, row=number * rows, rows=rows)
        return column.rows.reshape(-1, self.num_envs, *self.field.shape)

    def check(self):
        array = self.read()
        for env, column in enumerate(self.columns):
            assert np.array_equal(array[: len(column), env], np.array(column, self.field.dtype).reshape(
                len(column), *self.field.shape
            ))  # fmt: skip
        assert sorted(self.files) == list(range(-(-max(self.lengths()) // FILE_ROWS)))
        for number, state in self.files.items():
            data = chunk_path(self.path, number, 2 + len(self.field.shape)).read_bytes()
            assert len(data) == FILE_ROWS * self.num_envs * self.field.row_nbytes
            rows = min(max(self.lengths()) - number * FILE_ROWS, FILE_ROWS)
            assert state.nbytes == rows * self.num_envs * self.field.row_nbytes
            assert crc32c(data[: state.nbytes]) == state.crc32c


FIELDS = [Field("x", (), "bool"), Field("x", (3,), "float32"), Field("x", (2, 2), "int64")]


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: f"{field.dtype}-{field.shape}")
@pytest.mark.parametrize("num_envs", [1, 3])
def test_rows_are_appended_over_the_ends_of_files(tmp_path, field, num_envs):
    rng = np.random.default_rng(0)
    array = Growing(tmp_path, field, num_envs, rng)
    for _ in range(12):
        kind = rng.integers(4)
        counts = rng.integers(0, 1800 if kind == 0 else 40, size=num_envs)
        if kind == 1:
            counts[rng.integers(num_envs)] = 0
        if not counts.any():
            continue  # a commit leaves a field alone that has no new rows
        array.append(counts.tolist())
        array.check()
        if rng.random() < 0.3:
            array.resume()


def test_the_end_of_a_file_may_be_the_end_of_the_rows(tmp_path):
    array = Growing(tmp_path, Field("x", (), "int64"), 2, np.random.default_rng(0))
    for counts in [(4095, 4096), (1, 0), (0, 1), (4095, 4095), (1, 0), (4096, 4096), (3 * 4096, 0), (1, 1)]:
        array.append(counts)
        array.resume()
        array.check()


def test_a_write_that_was_not_committed_is_written_over(tmp_path):
    array = Growing(tmp_path, Field("x", (2,), "float64"), 2, np.random.default_rng(0))
    array.append([10, 30])
    for resume in (False, True):
        array.append([50, 5000], keep=False)
        if resume:
            array.resume()
        array.append([1, 0])
        array.check()
        array.append([20, 100])
        array.check()


def test_committed_bytes_never_change(tmp_path):
    rng = np.random.default_rng(0)
    array = Growing(tmp_path, Field("x", (), "int64"), 2, rng)
    for _ in range(10):
        array.append(rng.integers(0, 1200, size=2))
        mapped, lengths = array.read(), array.lengths()
        before = [mapped[:length, env].copy() for env, length in enumerate(lengths)]
        array.append(rng.integers(1, 1200, size=2), keep=bool(rng.integers(2)))
        for env, length in enumerate(lengths):
            assert (mapped[:length, env] == before[env]).all()


def test_a_file_uses_disk_blocks_for_its_rows_only(tmp_path):
    array = Growing(tmp_path, Field("x", (60,), "float64"), 1, np.random.default_rng(0))
    array.append([20])
    found = chunk_path(tmp_path, 0, 3).stat()
    assert found.st_size == 4096 * 480
    assert found.st_blocks * 512 <= 20 * 480 + 8192


def nbytes_in_huge_pages(path, nbytes):
    """How many of a file's first bytes are mapped in huge pages when all of them are looked at."""
    range_ = AddressRange(nbytes, huge=True)
    range_.place(path, offset=0, nbytes=nbytes)
    np.asarray(range_)[:: HUGE_PAGE // 8].max()
    maps = Path("/proc/self/smaps").read_text().split(str(path))[1:]
    return 1024 * sum(int(text.split("FilePmdMapped:")[1].split()[0]) for text in maps)


@pytest.mark.skipif(not WRITES_BACK_PARTS, reason="the kernel writes whole huge pages back, or has none")
@pytest.mark.parametrize("piece", [137, 4096, 14000])
def test_what_is_written_in_small_pieces_is_held_in_huge_pages(tmp_path, piece):
    (tmp_path / "large").write_bytes(b"a" * 2 * HUGE_PAGE)
    if nbytes_in_huge_pages(tmp_path / "large", 2 * HUGE_PAGE) < HUGE_PAGE:
        pytest.skip("this file system keeps no huge pages")
    (tmp_path / "x").mkdir()
    rows = 8 * HUGE_PAGE // 480
    array = FlatWriter(tmp_path / "x", Field("x", (60,), "float64"), num_envs=1, time_chunk=16 * FILE_ROWS)
    waits = major_faults()
    for top in [*range(4000, rows, piece), rows]:  # the first ones without huge pages
        cells = array.cells(top)
        cells[:] = np.arange(array.state.floor, top)[:, None, None] + 1
        array.state, _ = array.write(cells, top)
    assert major_faults() - waits < 4, "those of holes do not count"
    path = chunk_path(tmp_path / "x", 0, 3)
    assert nbytes_in_huge_pages(path, 8 * HUGE_PAGE) >= 6 * HUGE_PAGE
    assert path.stat().st_blocks * 512 <= rows * 480 + 8192
    found = np.fromfile(path, np.float64).reshape(-1, 60)
    assert (found[:rows] == np.arange(1, rows + 1)[:, None]).all()
    assert not found[rows:].any()


def test_the_beginning_of_an_array_is_held_in_small_pages(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "replaystore.files.GrowingFile.hold_end_in_huge_page", lambda *what: asked.append(what[1:])
    )
    array = FlatWriter(tmp_path, Field("x", (60,), "float64"), num_envs=1, time_chunk=2 * FILE_ROWS)
    array.state, _ = array.write(array.cells(4000), 4000)
    assert not asked
    array.state, _ = array.write(array.cells(9000), 9000)
    assert asked == [(4000 * 480, 4192 * 480), (0, 808 * 480)]


@pytest.mark.parametrize("wrong", ["missing", "empty", "short", "long", "directory", "link", "pipe"])
def test_a_file_that_is_not_the_one_committed_is_not_mapped(tmp_path, wrong):
    array = Growing(tmp_path, Field("x", (), "int64"), 1, np.random.default_rng(0))
    array.append([10])
    path = chunk_path(tmp_path, 0, 2)
    data = path.read_bytes()
    path.unlink()
    if wrong == "directory":
        path.mkdir()
    elif wrong == "link":
        path.with_name("elsewhere").write_bytes(data)
        path.symlink_to(path.with_name("elsewhere"))
    elif wrong == "pipe":
        os.mkfifo(path)
    elif wrong != "missing":
        path.write_bytes({"empty": b"", "short": data[:-1], "long": data + b"\0"}[wrong])
    with pytest.raises(CorruptionError, match=f"{path}: (expected|the file is missing)"):
        array.read()


def test_files_are_mapped_read_only(tmp_path):
    array = Growing(tmp_path, Field("x", (), "int64"), 1, np.random.default_rng(0))
    array.append([10])
    mapped = array.read()
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1


def test_a_writer_keeps_no_file_open(tmp_path):
    array = Growing(tmp_path, Field("x", (), "bool"), 1, np.random.default_rng(0))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(8):
        array.append([4096])
        assert len(os.listdir("/proc/self/fd")) == before
    array.check()
