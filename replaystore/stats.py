"""Statistics of a field over all its rows, and what they are for: `Normalize` and `Cast`.

They are computed in one pass in bounded memory, and kept in the store as of a commit:

    stats/observation~camera.json    "/" in a field's name is "~"

The file is JSON: `stats` holds the format version, the field, the commits (by stream: number and
hash of the head), the number of rows, and each statistic as a list of the row's elements in C
order; `crc32c` is of `stats` as canonical JSON. A file of another commit or version, or a damaged
one, is replaced; nothing else depends on it.
"""

import errno
import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from replaystore.codec import crc32c
from replaystore.errors import CorruptionError, FormatError, LimitError, UsageError
from replaystore.field import Field
from replaystore.files import make_directory, read_bytes, write_atomic
from replaystore.head import Head
from replaystore.index import EpisodeIndex, Places, Wanted
from replaystore.metadata import parse_json
from replaystore.schema import Schema

FOLDER = "stats"
FORMAT_VERSION = 1
PARTS = ("mean", "std", "minimum", "maximum", "quantiles")
LEVELS = (0.01, 0.1, 0.5, 0.9, 0.99)  # of the quantiles
SAMPLE_ROWS = 16384  # that quantiles are worked out from
SAMPLE_BYTES = 1 << 26
BLOCK_ELEMENTS = 1 << 22  # read at once
BLOCK_ROWS = 1 << 16
MAX_BYTES = 1 << 30  # of a file
_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, eq=False)
class Stats:
    """Of each element of a field's row, over `count` rows; float64 arrays of the field's shape.

    An observation's rows include the final ones of episodes. `std` is that of the rows themselves
    (divided by count). `quantiles` is (5, …), at the levels 0.01, 0.1, 0.5, 0.9 and 0.99. They are
    exact up to 16,384 rows or 64 MiB of them; of more rows, one is drawn from each of that many
    equal stretches, which puts a quantile's level off by about 0.4 % for 16,384 rows.
    """

    count: int
    mean: np.ndarray
    std: np.ndarray
    minimum: np.ndarray
    maximum: np.ndarray
    quantiles: np.ndarray


class Shown(Protocol):
    """A commit of each stream and what can be read of it, as `View` has it."""

    path: Path
    schema: Schema

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """To be held around the calls below."""

    @property
    def heads(self) -> Mapping[int, Head]:
        """The heads shown, by stream."""

    def index(self) -> EpisodeIndex:
        """All episodes."""

    def snapshot(self) -> dict[int, bytes]:
        """The heads as bytes."""

    def arrays(self, places: Places, wanted: Wanted) -> dict[str, np.ndarray]:
        """Fields at times."""


def field_stats(view: Shown, index: EpisodeIndex, name: str, *, progress: bool = False) -> Stats:
    """Statistics of a field over the episodes of an index.

    Over all that a commit holds they are computed once and kept with the store, if it can be
    written. Rows that are not yet committed count, but then nothing is kept.
    """
    if name not in view.schema.by_name:
        raise UsageError(f"stats: expected a field of {', '.join(view.schema.by_name)}, got {name!r}")
    field = view.schema.by_name[name]
    path = view.path / FOLDER / f"{name.replace('/', '~')}.json"
    with view.lock:
        commits = None if path.parent.is_symlink() else _commits(view, index)
        rows = _Rows.of(index, final=view.schema.is_observation(name))  # after the view has caught up
    if not rows.total:
        raise UsageError(f"stats: expected at least one row, {view.path} has none")
    if commits is None:
        return _compute(view, field, rows, progress)
    kept = _load(path, field, commits)
    if kept is None:
        kept = _compute(view, field, rows, progress)
        _keep(path, field, commits, kept)
    return kept


class _Rows(NamedTuple):
    """The rows of episodes as one sequence, episode by episode; int64 arrays (episodes,)."""

    stream: np.ndarray
    env: np.ndarray
    first: np.ndarray
    last: np.ndarray
    ends: np.ndarray  # rows up to and with each episode

    @classmethod
    def of(cls, index: EpisodeIndex, *, final: bool) -> "_Rows":
        stream, env, first, last = (part.copy() for part in index.episodes())
        return cls(stream, env, first, last, np.cumsum(last - first + final))

    @property
    def total(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def places(self, start: int, stop: int) -> Places:
        """Where the rows from `start` to `stop - 1` are."""
        row = np.arange(start, stop)
        episode = self.ends.searchsorted(row, side="right")
        before = np.where(episode > 0, self.ends[episode - 1], 0)
        stream, env, first, last = (part[episode] for part in self[:4])
        return Places(stream, env, first + row - before, first, last)


def _commits(view: Shown, index: EpisodeIndex) -> dict[str, str] | None:
    """What names the commits, if the index is all that they hold and nothing beyond."""
    if len(index) != len(view.index()):
        return None
    stream, env, _, last = index.episodes()
    for number, head in view.heads.items():
        here = stream == number
        if (last[here] >= head.rows[env[here]]).any():
            return None
    hashes = {
        number: hashlib.blake2b(data, digest_size=8).hexdigest() for number, data in view.snapshot().items()
    }
    return {str(number): f"{view.heads[number].commit} {hashes[number]}" for number in sorted(hashes)}


# ---- one pass


class _Moments:
    """Count, mean, sum of squares about it, and extremes, block by block (Chan et al. 1979)."""

    def __init__(self, elements: int) -> None:
        self.count = 0
        self.mean, self.squares = np.zeros(elements), np.zeros(elements)
        self.minimum, self.maximum = np.full(elements, np.inf), np.full(elements, -np.inf)

    def add(self, block: np.ndarray) -> None:
        """Take in rows; (rows, elements) float64, which is used up."""
        np.minimum(self.minimum, block.min(axis=0), out=self.minimum)
        np.maximum(self.maximum, block.max(axis=0), out=self.maximum)
        mean, count = block.mean(axis=0), self.count + len(block)
        block -= mean
        block *= block
        shift = mean - self.mean
        self.squares += block.sum(axis=0) + shift**2 * (self.count * len(block) / count)
        self.mean += shift * (len(block) / count)
        self.count = count

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Mean, deviation and extremes; what never changes deviates by 0, whatever was rounded."""
        is_constant = self.minimum == self.maximum
        mean = np.where(is_constant, self.minimum, self.mean)
        std = np.where(is_constant, 0.0, np.sqrt(self.squares / self.count))
        return mean, std, self.minimum, self.maximum


def _compute(view: Shown, field: Field, rows: _Rows, progress: bool) -> Stats:
    elements = int(np.prod(field.shape, dtype=np.int64))
    moments, chosen = _Moments(elements), _sampled(rows.total, field.row_nbytes)
    sample = np.empty((len(chosen), elements), field.dtype)
    size = min(BLOCK_ROWS, max(1, BLOCK_ELEMENTS // elements))
    with np.errstate(invalid="ignore", over="ignore"):
        for start in _shown(range(0, rows.total, size), field.name, progress):
            places = rows.places(start, min(start + size, rows.total))
            with view.lock:
                block = view.arrays(places, [(places.time, [field.name])])[field.name]
            block = block.reshape(len(block), elements)
            low, high = chosen.searchsorted([start, start + size])
            sample[low:high] = block[chosen[low:high] - start]
            moments.add(block.astype(np.float64))
        quantiles = _quantiles(sample)
    mean, std, minimum, maximum = (part.reshape(field.shape) for part in moments.result())
    return Stats(rows.total, mean, std, minimum, maximum, quantiles.reshape(-1, *field.shape))


def _sampled(count: int, nbytes: int) -> np.ndarray:
    """Rows to work quantiles out from, in order; always the same ones of so many."""
    wanted = min(count, SAMPLE_ROWS, max(1, SAMPLE_BYTES // nbytes))
    edges = np.arange(wanted + 1) * count // wanted
    return np.random.default_rng(0).integers(edges[:-1], edges[1:])


def _quantiles(sample: np.ndarray) -> np.ndarray:
    """Of each column, (levels, columns) float64; some columns at a time, for the memory it takes."""
    step = max(1, BLOCK_ELEMENTS // len(sample))
    columns = range(0, sample.shape[1], step)
    parts = [np.quantile(sample[:, at : at + step].astype(np.float64), LEVELS, axis=0) for at in columns]
    return np.concatenate(parts, axis=1)


def _shown(blocks: range, name: str, progress: bool) -> Iterable[int]:
    if not progress:
        return blocks
    from tqdm import tqdm  # here alone: using a store must not load it

    bar: Iterable[int] = tqdm(blocks, desc=f"stats of {name}", unit="block", leave=False)
    return bar


# ---- kept with the store


def _keep(path: Path, field: Field, commits: dict[str, str], stats: Stats) -> None:
    """Write the file, unless the store cannot be written."""
    lists = {name: np.ravel(getattr(stats, name)).tolist() for name in PARTS}
    content = {**_heading(field, commits), "count": stats.count, **lists}
    data = json.dumps({"stats": content, "crc32c": _checksum(content)}).encode()
    try:
        make_directory(path.parent, exist_ok=True)
        write_atomic(path, data)
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise


def check_stats_file(path: Path) -> None:
    """Raise an error of the package if a file of kept statistics is damaged."""
    _read(path, MAX_BYTES)


def _read(path: Path, limit: int) -> dict[str, Any]:
    """What a file of at most so many bytes holds, checked by its checksum."""
    kept = parse_json(read_bytes(path, limit), str(path))
    content = kept.get("stats") if isinstance(kept, dict) else None
    if not isinstance(content, dict) or kept.get("crc32c") != _checksum(content):
        raise CorruptionError(f"{path}: the checksum does not match")
    return content


def _load(path: Path, field: Field, commits: dict[str, str]) -> Stats | None:
    """What the file holds, if it is of these commits and whole."""
    elements = int(np.prod(field.shape, dtype=np.int64))
    try:
        content = _read(path, (1 << 20) + 512 * elements + 128 * len(commits))
    except (CorruptionError, FormatError, LimitError):
        return None  # missing, or damaged, and made anew
    heading = _heading(field, commits)
    if {name: content.get(name) for name in heading} != heading:
        return None
    shapes = dict.fromkeys(PARTS, field.shape) | {"quantiles": (len(LEVELS), *field.shape)}
    try:
        parts = [np.array(content[name], np.float64).reshape(shape) for name, shape in shapes.items()]
        return Stats(int(content["count"]), *parts)
    except (KeyError, TypeError, ValueError):
        return None  # not what this package writes, though its checksum is right


def _heading(field: Field, commits: dict[str, str]) -> dict[str, Any]:
    kind = {"field": field.name, "dtype": field.dtype.name, "shape": list(field.shape)}
    return {"format_version": FORMAT_VERSION, **kind, "commits": commits, "levels": list(LEVELS)}


def _checksum(content: dict[str, Any]) -> str:
    return f"{crc32c(json.dumps(content, sort_keys=True, separators=(',', ':')).encode()):08x}"


# ---- transforms
