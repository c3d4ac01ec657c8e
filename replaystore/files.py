"""Every call to the operating system: write, sync, rename, lock, map, prefetch.

Only this module opens, syncs, renames or unlinks. A file that must be there after a power cut is
written, synced, renamed into place, and its directory synced; the head, which names it, comes
after. Tests put a file system of their own in the place of `os` here.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import itertools
import mmap
import os
import re
import resource
import stat
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from replaystore.errors import CorruptionError, LimitError, LockUnsupported

HUGE_PAGE = 1 << 21
PAGE = mmap.ALLOCATIONGRANULARITY
PARTIAL = ".partial"
PIECE_BYTES = 1 << 24
MEMORY_START = 4096  # below which no program has anything
MAX_STRETCHES = 1024  # that Linux takes in one call

_MAP_FIXED = 0x10  # the same on Linux and macOS; the mmap module does not name it
_MADV_POPULATE_READ = 22  # of Linux, as the next
_MADV_POPULATE_WRITE = 23
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
HAS_HUGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE") and os.path.isdir("/sys/kernel/mm/transparent_hugepage")
WRITES_BACK_PARTS = HAS_HUGE_PAGES and tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (6, 6)
_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_process_madvise = getattr(_libc, "process_madvise", None) if hasattr(os, "pidfd_open") else None
if _process_madvise is not None:
    _process_madvise.restype = ctypes.c_ssize_t
    _process_madvise.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint
    ]  # fmt: skip
_counter = itertools.count()


class FileState(NamedTuple):
    """What a commit says of one chunk or shard file: its number, and its committed bytes."""

    number: int
    nbytes: int
    crc32c: int


def chunk_path(array: Path, number: int, ndim: int) -> Path:
    """The file of an array's chunk or shard `number` in time, as zarr's default keys name it."""
    return array.joinpath("c", str(number), *["0"] * (ndim - 1))


def make_parents(path: Path, root: Path) -> None:
    """Make the directories between `root`, which exists, and a file."""
    if path.parent != root and not path.parent.is_dir():
        make_parents(path.parent, root)
        make_directory(path.parent, exist_ok=True)


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a whole regular file of at most `limit` bytes; links, devices and pipes are refused."""
    descriptor = _open_regular(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise LimitError(f"{path}: expected at most {limit} bytes, found {size}")
        return read_at(descriptor, size, 0)
    finally:
        os.close(descriptor)


def read_at(descriptor: int, nbytes: int, offset: int) -> bytes:
    """Read `nbytes`, or fewer where the file ends."""
    parts: list[bytes] = []
    while nbytes > 0 and (part := os.pread(descriptor, nbytes, offset)):
        parts.append(part)
        offset += len(part)
        nbytes -= len(part)
    return b"".join(parts)


def read_range(path: Path, offset: int, nbytes: int) -> bytes:
    """Read some bytes of a regular file."""
    descriptor = _open_regular(path, os.O_RDONLY)
    try:
        return read_at(descriptor, nbytes, offset)
    finally:
        os.close(descriptor)


def read_pieces(path: Path, nbytes: int) -> Iterator[bytes]:
    """Read the first `nbytes` of a regular file in pieces of a bounded size."""
    descriptor = _open_regular(path, os.O_RDONLY)
    try:
        for offset in range(0, nbytes, PIECE_BYTES):
            yield read_at(descriptor, min(PIECE_BYTES, nbytes - offset), offset)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file: after a crash it holds the old bytes or the new, never a mixture."""
    partial = _write_partial(path, data)
    try:
        os.replace(partial, path)
    except OSError:
        os.unlink(partial)
        raise
    sync_directory(path.parent)


def write_new(path: Path, data: bytes) -> None:
    """Like `write_atomic`, but raises `FileExistsError` if somebody else's file is there."""
    partial = _write_partial(path, data)
    try:
        os.link(partial, path)
    finally:
        os.unlink(partial)
    sync_directory(path.parent)


def write_spare(path: Path, data: bytes) -> None:
    """Replace a file that nothing depends on: not synced, so a power cut or kill may spoil it.

    It is made anew, because to rename over a file, or cut it to nothing, makes ext4 sync.
    """
    remove(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    try:
        write_at(descriptor, data, 0)
    finally:
        os.close(descriptor)


def _write_partial(path: Path, data: bytes) -> Path:
    partial = path.with_name(f"{path.name}.{os.getpid()}-{next(_counter)}{PARTIAL}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    try:
        try:
            write_at(descriptor, data, 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        os.unlink(partial)
        raise
    return partial


def make_directory(path: Path, *, exist_ok: bool = False) -> None:
    """Make a directory whose name survives a power cut."""
    try:
        os.mkdir(path)
    except FileExistsError:
        if not exist_ok:
            raise
    sync_directory(path.parent)


def sweep_partials(path: Path) -> None:
    """Remove what a write that was cut short left below a directory that nobody else writes."""
    for folder, _, names in os.walk(path):
        for name in names:
            if name.endswith(PARTIAL):
                remove(Path(folder, name))


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Unlink a file that may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def move(source: Path, target: Path) -> None:
    """Rename a file or directory on the same file system, durably; nothing is replaced."""
    if os.path.lexists(target):
        raise FileExistsError(f"{target}: already there")
    os.rename(source, target)
    sync_directory(target.parent)
    sync_directory(source.parent)


def remove_tree(path: Path) -> None:
    """Remove a directory and all in it; links are removed, never followed."""
    for name in os.listdir(path):
        child = path / name
        if child.is_dir() and not child.is_symlink():
            remove_tree(child)
        else:
            os.unlink(child)
    os.rmdir(path)


def size_of(path: Path) -> int:
    """Bytes of a regular file; `CorruptionError` if it is missing or something else."""
    try:
        found = os.lstat(path)
    except FileNotFoundError as error:
        raise CorruptionError(f"{path}: the file is missing") from error
    if not stat.S_ISREG(found.st_mode):
        raise CorruptionError(f"{path}: expected a regular file")
    return found.st_size


def list_directory(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def disk_usage(path: Path) -> int:
    """Bytes of the disk blocks of every file below a directory, as `du` counts them."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in [".", *names]:
            with contextlib.suppress(FileNotFoundError):  # replaced meanwhile by a writer
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data`, however little each call takes."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


class GrowingFile:
    """A file that one writer appends to; nothing below a committed length is written again."""

    waits: ClassVar[int] = 0  # of this process for holes that were to be held in memory

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._closer = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def create(cls, path: Path, *, is_named: bool) -> "GrowingFile":
        """Open or create; unless `is_named`, its name is made durable too."""
        file = cls(path, _open_regular(path, os.O_RDWR | os.O_CREAT))
        try:
            if not is_named:
                sync_directory(path.parent)
        except BaseException:
            file.close()
            raise
        return file

    def __enter__(self) -> "GrowingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, nbytes: int, offset: int) -> bytes:
        return read_at(self._descriptor, nbytes, offset)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        write_at(self._descriptor, data, offset)

    def truncate(self, nbytes: int) -> None:
        if os.fstat(self._descriptor).st_size != nbytes:
            os.ftruncate(self._descriptor, nbytes)

    def hold_end_in_huge_page(self, offset: int, nbytes: int) -> None:
        """Before a stretch is written: have the page cache hold the huge page that it begins to fill as such.

        All that is written there lies in it then, in however small pieces, and readers map it. Pages that the
        stretch fills are huge by themselves. The file must have nothing there yet. Where the kernel cannot, or
        has no memory to spare, the pages are small ones; one that cannot write a part of them back is not asked.
        """
        start = (offset + nbytes) // HUGE_PAGE * HUGE_PAGE
        end = start + HUGE_PAGE
        is_new = offset <= start < offset + nbytes
        if not is_new or not WRITES_BACK_PARTS or end > os.fstat(self._descriptor).st_size:
            return
        before = _own_faults()
        with contextlib.suppress(LimitError, OSError):  # too few addresses
            whole = AddressRange(end, huge=True)
            whole._place(self._descriptor, 0, end)
            _libc.madvise(whole.address, end, mmap.MADV_RANDOM)  # no small pages read ahead of the others
            _libc.madvise(whole.address + start, PAGE, _MADV_POPULATE_READ)
        GrowingFile.waits += _own_faults() - before

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        self._closer()


def _open_regular(path: Path, flags: int) -> int:
    """Open without following a link, waiting for a pipe, or waking a device."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except FileNotFoundError as error:
        raise CorruptionError(f"{path}: the file is missing") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise CorruptionError(f"{path}: expected a regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptionError(f"{path}: expected a regular file")
    return descriptor


class AddressRange:
    """Reserved addresses into which files are mapped, read-only, one behind the other.

    Large ones begin where a huge page does: where the page cache holds a file in huge pages, as it holds what
    was written in large pieces, the kernel then maps those, and rows are found without walking page tables.
    `np.asarray(range)` is its bytes; the addresses stay valid as long as the range or such an
    array lives. Reading where nothing was placed ends the process, so callers check first.

    A page that is read from disk comes alone, or, of a `huge` range, with the huge page around it; for that the
    system must have huge pages.
    """

    def __init__(self, nbytes: int, *, huge: bool = False) -> None:
        self._huge = huge
        self.nbytes = max(1, -(-nbytes // PAGE)) * PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        slack = HUGE_PAGE if self.nbytes >= HUGE_PAGE else 0
        try:
            start = _map(None, self.nbytes + slack, 0, flags, -1)
        except OSError as error:
            raise LimitError(f"cannot set aside {self.nbytes} bytes of addresses: {error}") from error
        self.address = start
        if slack:
            self.address = (start // HUGE_PAGE + 1) * HUGE_PAGE
            _libc.munmap(start, self.address - start)
            _libc.munmap(self.address + self.nbytes, start + slack - self.address)
        finalizer = weakref.finalize(self, _libc.munmap, self.address, self.nbytes)
        finalizer.atexit = False  # a thread may still read while the interpreter shuts down

    def place(self, path: Path, *, offset: int, nbytes: int, exact: bool = False) -> None:
        """Map the first `nbytes` of a file; raises `CorruptionError` if it has fewer."""
        descriptor = _open_regular(path, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            if size < nbytes or (exact and size != nbytes):
                raise CorruptionError(f"{path}: expected {nbytes} bytes, found {size}")
            self._place(descriptor, offset, nbytes)
        finally:
            os.close(descriptor)

    def clear(self, *, offset: int, nbytes: int) -> None:
        """Let go of what was placed there: its file, if it was unlinked, gives its disk blocks back."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0) | _MAP_FIXED
        _map(self.address + offset, nbytes, 0, flags, -1)

    @classmethod
    def of_file(cls, path: Path) -> "AddressRange":
        """A whole file, of the size that it has when it is opened."""
        descriptor = _open_regular(path, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            range_ = cls(size)
            if size:
                range_._place(descriptor, 0, size)
            range_.nbytes = size
            return range_
        finally:
            os.close(descriptor)

    def _place(self, descriptor: int, offset: int, nbytes: int) -> None:
        assert offset % PAGE == 0, offset
        assert offset + nbytes <= self.nbytes, (offset, nbytes, self.nbytes)
        where = self.address + offset
        _map(where, nbytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor)
        _libc.madvise(where, nbytes, mmap.MADV_HUGEPAGE if self._huge else mmap.MADV_RANDOM)

    def read_by_page(self) -> None:
        """From now on read each page of a huge range from disk alone, and map no more huge pages."""
        self._huge = False
        for advice in (mmap.MADV_NOHUGEPAGE, mmap.MADV_RANDOM):
            _libc.madvise(self.address, self.nbytes, advice)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"data": (self.address, True), "shape": (self.nbytes,), "typestr": "|u1", "version": 3}


class _Memory:
    """Every address of this process."""

    __array_interface__: ClassVar[dict[str, Any]] = {
        "data": (MEMORY_START, True),
        "shape": (1 << 47,),
        "typestr": "|u1",
        "version": 3,
    }


@functools.cache
def memory() -> np.ndarray:
    """All memory as bytes, from the address `MEMORY_START`, to gather from many maps at once.

    Reading where nothing is mapped ends the process, so callers check their addresses first.
    """
    return np.asarray(_Memory())


def map_whole(path: Path) -> np.ndarray:
    """Map a whole file, read-only, as bytes."""
    return np.asarray(AddressRange.of_file(path))


def prefetch(addresses: np.ndarray, nbytes: np.ndarray) -> None:
    """Ask the kernel to read stretches of mapped files from disk soon, in one go."""
    first = addresses & ~(PAGE - 1)
    stretches = np.stack([first, addresses + nbytes - first], axis=1)
    for start in range(0, len(stretches), MAX_STRETCHES):
        some = stretches[start : start + MAX_STRETCHES]
        if not _prefetch_at_once(some):
            for address, length in some.tolist():
                _libc.madvise(address, length, mmap.MADV_WILLNEED)


def _prefetch_at_once(stretches: np.ndarray) -> bool:
    """Ask by one call, which takes a fifth less time; False where the system has none or forbids it."""
    if _process_madvise is None:
        return False
    try:
        process = os.pidfd_open(os.getpid())
    except OSError:
        return False
    try:
        address, count = stretches.ctypes.data, len(stretches)
        asked = _process_madvise(process, address, count, mmap.MADV_WILLNEED, 0)
        return bool(asked == stretches[:, 1].sum())
    finally:
        os.close(process)


def populate(array: np.ndarray) -> None:
    """Have the kernel give a contiguous array its memory now, zeroed, rather than at the first write to it.

    Others may write to it meanwhile. Where the kernel cannot (Linux before 5.14), nothing happens.
    """
    start = -(-array.ctypes.data // PAGE) * PAGE
    end = (array.ctypes.data + array.nbytes) // PAGE * PAGE
    if sys.platform == "linux" and start < end:
        _libc.madvise(start, end - start, _MADV_POPULATE_WRITE)


def drop_from_cache(path: Path) -> None:
    """Have the kernel forget a directory's files, as far as it can, to measure reading from disk."""
    os.sync()
    for folder, _, names in os.walk(path):
        for name in names:
            descriptor = _open_regular(Path(folder, name), os.O_RDONLY)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def memory_limit() -> int:
    """Bytes of memory that this process may have: the machine's, or what its control groups allow."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in _limit_files(Path("/proc/self/cgroup"), _CONTROL_GROUPS):
        text = file.read_text().strip()
        if text.isdigit():  # and not "max"
            limits.append(int(text))
    return min(limits)


def _limit_files(groups: Path, root: Path) -> Iterator[Path]:
    """The limits of the control groups that `groups` names and of those around them, of either version."""
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, kinds, group = line.split(":", 2)
        if "memory" in kinds.split(",") or not kinds:
            for folder in (Path(group), *Path(group).parents):
                for name in ("memory.max", "memory.limit_in_bytes"):
                    file = root / kinds / folder.relative_to("/") / name
                    if file.is_file():
                        yield file


def major_faults() -> int:
    """How often this process has waited for a mapped page to be read from disk, to read what it holds."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt - GrowingFile.waits


def _own_faults() -> int:
    """Those of this thread."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt


def _map(address: int | None, nbytes: int, protection: int, flags: int, descriptor: int) -> int:
    mapped = _libc.mmap(address, nbytes, protection, flags, descriptor, 0)
    if mapped == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"mmap of {nbytes} bytes: {os.strerror(code)}")
    return int(mapped)


class Lock:
    """An exclusive lock on a file that dies with the process that took it.

    The kernel's lock decides, never the file's content. A forked child gives its copy up, so that
    the lock ends with its owner even if children live on.
    """

    def __init__(self, descriptor: int) -> None:
        self._closer = weakref.finalize(self, os.close, descriptor)
        _locks.add(self)

    @classmethod
    def acquire(cls, path: Path) -> "Lock | None":
        """Take the lock, or return None at once if another process has it."""
        descriptor = _open_regular(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            raise LockUnsupported(error.errno, f"{path}: cannot lock: {error.strerror}") from error
        return cls(descriptor)

    def release(self) -> None:
        self._closer()


_locks: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def _release_in_child() -> None:
    for lock in list(_locks):
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)
