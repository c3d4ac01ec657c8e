"""A disk that can lose power: every call of `files.py` is logged, and any crash state rebuilt.

`DiskLog` stands in the place of `os` in `replaystore.files`. `Image` replays a prefix of the log
as POSIX allows: what was written to a file but not synced may be there, be missing, or be torn;
names made, replaced or removed in a directory may be missing until the directory is synced.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class DiskLog:
    """`os`, with every change to files and directories below `root` written down."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log: list[tuple[Any, ...]] = []
        self._inodes: dict[str, int] = {}
        self._open: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def note(self, *entry: Any) -> None:
        self.log.append(entry)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        path = str(path)
        is_new = not os.path.lexists(path)
        descriptor = os.open(path, flags, mode)
        if is_new:
            self._inodes[path] = len(self.log)
            self.note("create", path, self._inodes[path])
        self._open[descriptor] = path if flags & os.O_DIRECTORY else self._inodes.get(path)
        return descriptor

    def close(self, descriptor: int) -> None:
        self._open.pop(descriptor, None)
        os.close(descriptor)

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        written = os.pwrite(descriptor, data, offset)
        self.note("write", self._open[descriptor], offset, bytes(data[:written]))
        return written

    def ftruncate(self, descriptor: int, nbytes: int) -> None:
        os.ftruncate(descriptor, nbytes)
        self.note("truncate", self._open[descriptor], nbytes)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)
        self.note("sync", self._open[descriptor])

    def mkdir(self, path: Any) -> None:
        os.mkdir(path)
        self.note("mkdir", str(path))

    def replace(self, source: Any, target: Any) -> None:
        os.replace(source, target)
        self._inodes[str(target)] = self._inodes.pop(str(source))
        self.note("replace", str(source), str(target), self._inodes[str(target)])

    def link(self, source: Any, target: Any) -> None:
        os.link(source, target)
        self._inodes[str(target)] = self._inodes[str(source)]
        self.note("link", str(target), self._inodes[str(target)])

    def unlink(self, path: Any) -> None:
        os.unlink(path)
        self.note("unlink", str(path))

    def rmdir(self, path: Any) -> None:
        os.rmdir(path)
        self.note("unlink", str(path))


@dataclass
class _Directory:
    durable: dict[str, Any] = field(default_factory=dict)
    pending: list[list[tuple[str, Any]]] = field(default_factory=list)


@dataclass
class _File:
    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)


class Image:
    """What a disk holds after a prefix of a log, and what a power cut may leave of it."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._directories = {self._root: _Directory()}
        self._files: dict[int, _File] = {}

    def apply(self, entry: tuple[Any, ...]) -> None:
        kind, *rest = entry
        getattr(self, f"_{kind}")(*rest)

    def _create(self, path: str, inode: int) -> None:
        self._files[inode] = _File()
        self._change(path, inode)

    def _write(self, inode: int, offset: int, data: bytes) -> None:
        self._files[inode].pending.append((offset, data))

    def _truncate(self, inode: int, nbytes: int) -> None:
        self._files[inode].pending.append((nbytes, None))

    def _sync(self, target: Any) -> None:
        if isinstance(target, str):
            directory = self._directories[target]
            for changes in directory.pending:
                _enter(directory.durable, changes)
            directory.pending.clear()
        else:
            file = self._files[target]
            for write in file.pending:
                _put(file.durable, write)
            file.pending.clear()

    def _mkdir(self, path: str) -> None:
        self._directories[path] = _Directory()
        self._change(path, path)

    def _replace(self, source: str, target: str, inode: int) -> None:
        self._change(source, None, target, inode)

    def _link(self, target: str, inode: int) -> None:
        self._change(target, inode)

    def _unlink(self, path: str) -> None:
        self._change(path, None)

    def _ack(self, *_: Any) -> None:
        """An acknowledgement is no change to the disk."""

    def _change(self, *pairs: Any) -> None:
        changes = [(os.path.basename(p), v) for p, v in zip(pairs[::2], pairs[1::2], strict=True)]
        self._directories[os.path.dirname(pairs[0])].pending.append(changes)

    def after_power_cut(self, choose: "Choice", target: Path) -> None:
        """Write into `target` one state that the disk may be in when the power comes back."""
        self._rebuild(self._root, choose, target)

    def _rebuild(self, directory: str, choose: "Choice", target: Path) -> None:
        target.mkdir()
        node = self._directories[directory]
        entries = dict(node.durable)
        for changes in choose.names(node.pending):
            _enter(entries, changes)
        for name, value in entries.items():
            if isinstance(value, str):
                self._rebuild(value, choose, target / name)
            else:
                self._rebuild_file(self._files[value], choose, target / name)

    def _rebuild_file(self, file: _File, choose: "Choice", path: Path) -> None:
        data = bytearray(file.durable)
        for write in choose.writes(file.pending):
            _put(data, write)
        with open(path, "wb") as out:
            end = len(data.rstrip(b"\0"))
            out.write(data[:end])
            out.truncate(len(data))


@dataclass
class Choice:
    """Which unsynced changes a power cut spares: "none", "all", or a random part of each."""

    kind: str
    random: random.Random

    def names(self, pending: list[Any]) -> Iterator[Any]:
        if self.kind == "journal":  # names in order, as a journalling file system keeps them
            yield from pending[: self.random.randint(0, len(pending))]
            return
        yield from (change for change in pending if self._spared())

    def writes(self, pending: list[tuple[int, bytes | None]]) -> Iterator[tuple[int, bytes | None]]:
        for offset, data in pending:
            if not self._spared():
                continue
            if data is None or self.kind == "all" or self.random.random() < 0.5:
                yield offset, data
            else:  # torn: some sectors of it
                for start in range(0, len(data), 512):
                    if self.random.random() < 0.5:
                        yield offset + start, data[start : start + 512]

    def _spared(self) -> bool:
        if self.kind in ("none", "all"):
            return self.kind == "all"
        return self.random.random() < 0.5


def _enter(entries: dict[str, Any], changes: list[tuple[str, Any]]) -> None:
    for name, value in changes:
        if value is None:
            entries.pop(name, None)
        else:
            entries[name] = value


def _put(data: bytearray, write: tuple[int, bytes | None]) -> None:
    offset, new = write
    if new is None:
        del data[offset:]
        data.extend(bytes(offset - len(data)))
        return
    data.extend(bytes(max(0, offset + len(new) - len(data))))
    data[offset : offset + len(new)] = new
