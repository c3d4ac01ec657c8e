"""A store's directory as such: what makes it one, and how it is begun."""

import errno
from pathlib import Path

from replaystore.errors import CorruptionError, FormatError, ReadOnlyError
from replaystore.files import PARTIAL, list_directory, make_directory, read_bytes, write_atomic, write_new
from replaystore.metadata import MAX_METADATA_BYTES, render_group


def read_root(path: Path) -> bytes:
    """The `zarr.json` that makes a directory a store."""
    try:
        return read_bytes(path / "zarr.json", MAX_METADATA_BYTES)
    except (CorruptionError, NotADirectoryError) as error:
        raise FormatError(f"{path}: not a replaystore: {error}") from error


def make_root(path: Path, data: bytes) -> None:
    """Write an empty store; its `zarr.json`, which makes it one, comes last."""
    try:
        make_directory(path, exist_ok=True)
        _check_leftovers(path, {"streams"})
        make_directory(path / "streams", exist_ok=True)
        _check_leftovers(path / "streams", {"zarr.json"})
        write_atomic(path / "streams" / "zarr.json", render_group())
        write_new(path / "zarr.json", data)
    except FileExistsError as error:
        raise FormatError(f"{path}: a store or a file is already there") from error
    except (NotADirectoryError, FileNotFoundError) as error:
        raise FormatError(f"{path}: expected a path whose parent is a directory") from error
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise ReadOnlyError(f"{path}: the directory cannot be written: {error}") from error


def _check_leftovers(path: Path, allowed: set[str]) -> None:
    """Raise unless a directory is empty but for what a store's making, cut short, leaves there."""
    others = [name for name in list_directory(path) if name not in allowed and not name.endswith(PARTIAL)]
    if others:
        raise FormatError(f"{path}: expected a new or empty directory, found {others[:5]}")
