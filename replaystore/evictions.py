"""Which streams of a reservoir were evicted: `reservoir/evicted.json`, replaced atomically.

    {"crc32c": "…", "evicted": [[stream, n], …]}

`stream` was evicted, one of n; in order. The crc32c is of the list as JSON, 8 hex digits.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from replaystore.codec import crc32c
from replaystore.errors import CorruptionError
from replaystore.files import read_bytes, write_atomic
from replaystore.head import Head

FOLDER = "reservoir"
EVICTED = "evicted.json"
MAX_BYTES = 1 << 26


class Evictions(NamedTuple):
    """The streams that were evicted so far, in order, and how many there were at each."""

    streams: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()

    @property
    def admission(self) -> float:
        """The probability with which an episode is admitted, and with which each one seen is there."""
        return math.prod(1 - 1 / count for count in self.counts)

    def and_one(self, stream: int, count: int) -> "Evictions":
        """These and then that of a stream, one of `count`."""
        return Evictions((*self.streams, stream), (*self.counts, count))


def read_evictions(store: Path, heads: Mapping[int, Head]) -> Evictions:
    """The evictions of a reservoir that shows these heads; `CorruptionError` if its file lacks some."""
    path = store / FOLDER / EVICTED
    evictions = _decode(read_bytes(path, MAX_BYTES), path) if path.exists() else Evictions()
    missing = {stream for stream, head in heads.items() if head.is_evicted} - set(evictions.streams)
    if missing:
        raise CorruptionError(
            f"{path}: expected the evictions of streams {sorted(missing)}, found none: without them nothing can"
            " be added evenly; take the file from a copy of the store"
        )
    return evictions


def write_evictions(store: Path, evictions: Evictions) -> None:
    """Keep evictions durably; a crash leaves those before or these."""
    write_atomic(store / FOLDER / EVICTED, _encode(evictions))


def _encode(evictions: Evictions) -> bytes:
    pairs = [list(pair) for pair in zip(*evictions, strict=True)]
    checksum = f"{crc32c(json.dumps(pairs).encode()):08x}"
    return json.dumps({"crc32c": checksum, "evicted": pairs}).encode()


def _decode(data: bytes, path: Path) -> Evictions:
    try:
        pairs = json.loads(data)["evicted"]
        streams, counts = (tuple(int(pair[place]) for pair in pairs) for place in range(2))
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise CorruptionError(f"{path}: expected evictions, found {data[:80]!r}: {error!r}") from error
    evictions = Evictions(streams, counts)
    if _encode(evictions) != data:
        raise CorruptionError(f"{path}: the checksum does not match, or it is not as this package writes it")
    if len(set(streams)) < len(streams) or min(streams, default=0) < 0 or min(counts, default=2) < 2:
        raise CorruptionError(f"{path}: expected each stream once, and 2 streams or more, found {evictions}")
    return evictions
