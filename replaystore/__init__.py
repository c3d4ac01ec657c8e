"""replaystore: a disk-backed, persistent replay store for reinforcement learning."""

from replaystore.errors import (
    ClosedError,
    CommitError,
    CorruptionError,
    FormatError,
    ReplayStoreError,
    SchemaError,
    SnapshotExpired,
    UsageError,
)
from replaystore.field import Field
from replaystore.goals import Relabelled
from replaystore.limiter import SamplesPerInsert
from replaystore.mixtures import Mixed, MixedStores, Stratified
from replaystore.prioritized import Once, Prioritized
from replaystore.sampler_file import load_sampler, save_sampler
from replaystore.samplers import InOrder, Recent, Shuffled, Uniform
from replaystore.schema import Schema
from replaystore.sequences import Sequence, SequenceBatch, WholeEpisode
from replaystore.stats import Stats
from replaystore.store import ReplayStore
from replaystore.transforms import Cast, Normalize
from replaystore.windows import Batch, Transition

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Cast",
    "ClosedError",
    "CommitError",
    "CorruptionError",
    "Field",
    "FormatError",
    "InOrder",
    "Normalize",
    "Mixed",
    "MixedStores",
    "Once",
    "Prioritized",
    "Recent",
    "Relabelled",
    "ReplayStore",
    "ReplayStoreError",
    "Schema",
    "SamplesPerInsert",
    "SchemaError",
    "Sequence",
    "SequenceBatch",
    "Shuffled",
    "SnapshotExpired",
    "Stats",
    "Stratified",
    "Transition",
    "Uniform",
    "UsageError",
    "WholeEpisode",
    "load_sampler",
    "save_sampler",
]
