"""replaystore: a disk-backed, persistent replay store for reinforcement learning."""

from replaystore.errors import (
    ClosedError,
    CommitError,
    CorruptionError,
    FormatError,
    ReplayStoreError,
    SchemaError,
    UsageError,
)
from replaystore.field import Field
from replaystore.schema import Schema
from replaystore.store import ReplayStore
from replaystore.windows import Batch, Transition

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "ClosedError",
    "CommitError",
    "CorruptionError",
    "Field",
    "FormatError",
    "ReplayStore",
    "ReplayStoreError",
    "Schema",
    "SchemaError",
    "Transition",
    "UsageError",
]
