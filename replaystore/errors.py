"""Every exception that replaystore raises on purpose.

Each derives from `ReplayStoreError` and, where one fits, from the builtin that a caller who does
not know this package would catch.
"""


class ReplayStoreError(Exception):
    """The base of every exception raised on purpose by this package."""


class SchemaError(ReplayStoreError, ValueError):
    """A value, field or space does not fit the schema; nothing was written."""


class UsageError(ReplayStoreError, ValueError):
    """An argument, or the order of calls, is wrong; nothing was written."""


class LimitError(ReplayStoreError, ValueError):
    """A size is beyond what the package accepts, or beyond what the files justify."""


class FormatError(ReplayStoreError, ValueError):
    """The path is no replay store, or its metadata is not what this package writes."""


class FormatTooNew(FormatError):
    """The store was written by a newer version of this package."""


class CorruptionError(ReplayStoreError, RuntimeError):
    """A file is damaged, missing or foreign; the message names it."""


class CommitError(ReplayStoreError, OSError):
    """A commit failed: the store stays at its last commit, the rows stay in memory."""


class StoreGone(ReplayStoreError, FileNotFoundError):
    """The store was deleted while it was open."""


class SnapshotExpired(ReplayStoreError, RuntimeError):
    """The files of this commit were evicted; `refresh()` moves to a newer one."""


class ReadOnlyError(ReplayStoreError, PermissionError):
    """The store cannot be written: it was opened with mode "r", or its directory forbids it."""


class WriterBusy(ReplayStoreError, BlockingIOError):
    """Another process holds the stream that was asked for."""


class LockUnsupported(ReplayStoreError, OSError):
    """The file system has no working locks, so a second writer could not be kept away."""


class ClosedError(ReplayStoreError, ValueError):
    """The store was closed."""


class ForkError(ReplayStoreError, RuntimeError):
    """A forked child used a writer that belongs to its parent."""
