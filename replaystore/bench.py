"""How fast a store is on the machine at hand, and which codec suits its frames.

`measure` times what a user of the store does; `try_codecs` encodes a sample of a packed field's own
rows in several ways. Both return figures as rows of a table.
"""

import cProfile
import itertools
import os
import pstats
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from replaystore.arena import run_bounds
from replaystore.codec import ChunkCodec
from replaystore.errors import UsageError
from replaystore.field import MAX_CHUNK_ROWS, Field
from replaystore.files import disk_usage, drop_from_cache
from replaystore.store import ReplayStore
from replaystore.windows import Transition

BATCH = 256
WRITTEN_BYTES = 1 << 26  # of the store's own episodes, at the most, written to measure writing
CODECS = ("blosc-lz4hc-5", "blosc-lz4hc-9", "blosc-lz4-5", "blosc-zstd-3")


class Figure(NamedTuple):
    """One line of the table; `section` is also the title of a panel of the picture."""

    section: str
    name: str
    value: float


def measure(
    path: Path, seconds: float, rng: np.random.Generator, *, frame_stack: int | None = None
) -> Iterator[Figure]:
    """Measure a store: its size by field, reading, writing (to a store beside it), time by stage.

    `frame_stack` is by default that of the recorded environment. Every timing takes `seconds`. Raises `UsageError` for a store without transitions.
    """
    window, sizes, shares = _inspect(path, frame_stack, rng)
    yield from sizes
    section = f"transitions read a second, stacks of {window.frame_stack}"
    for batch in (32, BATCH):  # the last one's time is shared out below
        warm_rate = _read_rate(path, window, batch, seconds, rng)
        yield Figure(section, f"warm, batch of {batch}", warm_rate)
    drop_from_cache(path)
    rate = _read_rate(path, window, BATCH, seconds, rng, warm_up=False)
    yield Figure(section, f"from disk, batch of {BATCH}", rate)
    yield Figure("rows written a second", "step, commits on", _write_rate(path, seconds))
    for module, share in shares.items():
        yield Figure(f"µs for a warm batch of {BATCH}, by module", module, share * BATCH / warm_rate * 1e6)


def _inspect(
    path: Path, frame_stack: int | None, rng: np.random.Generator
) -> tuple[Transition, list[Figure], dict[str, float]]:
    with ReplayStore.open(path) as store:
        if not len(store):
            raise UsageError(f"{path}: expected at least one transition to measure with, it has none")
        window = Transition(frame_stack=store.frame_stack if frame_stack is None else frame_stack)
        return window, list(_sizes(store)), _shares(store, window, rng)


def _read_rate(
    path: Path,
    window: Transition,
    batch: int,
    seconds: float,
    rng: np.random.Generator,
    *,
    warm_up: bool = True,
) -> float:
    with ReplayStore.open(path) as store:
        sample = partial(store.sample, batch, window, rng)
        if warm_up:
            _calls(sample, seconds)
        return batch * _calls(sample, seconds)


def _calls(call: Callable[[], Any], seconds: float) -> float:
    """Calls a second."""
    start, calls = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        call()
        calls += 1
    return calls / passed


def _sizes(store: ReplayStore) -> Iterator[Figure]:
    section, total = "bytes a transition, on disk", store.nbytes
    streams = list((store.path / "streams").iterdir())
    for name in store.schema.by_name:
        nbytes = sum(disk_usage(stream / name) for stream in streams if (stream / name).is_dir())
        total -= nbytes
        yield Figure(section, name, nbytes / len(store))
    yield Figure(section, "index, heads and the rest", total / len(store))


def _write_rate(path: Path, seconds: float) -> float:
    """Write the store's own first episodes again and again, to a store on the same disk."""
    beside = path.parent if os.access(path.parent, os.W_OK) else None
    with ReplayStore.open(path) as store, tempfile.TemporaryDirectory(dir=beside) as folder:
        steps = list(itertools.islice(_steps(store), WRITTEN_BYTES // _row_nbytes(store) or 1))
        with ReplayStore.create(Path(folder) / "store", store.schema) as target:
            target.reset(steps[0]["observation"])
            start, rows = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                for step in steps:
                    target.step(**step)
                    rows += 1
                    if step["terminated"] or step["truncated"]:
                        target.reset(step["observation"])
                        rows += 1
            target.flush()
            return rows / (time.perf_counter() - start)


def _row_nbytes(store: ReplayStore) -> int:
    return sum(field.row_nbytes for field in store.schema.fields)


def _steps(store: ReplayStore) -> Iterator[dict[str, Any]]:
    """The store's steps, as `ReplayStore.step` takes them."""
    for number in range(store.num_episodes):
        episode = store.episode(number)
        for i in range(len(episode["reward"])):
            step = {top: _at(value, i) for top, value in episode.items() if top != "observation"}
            yield step | {"observation": _at(episode["observation"], i + 1)}


def _at(value: Any, i: int) -> Any:
    if isinstance(value, dict):
        return {name: _at(child, i) for name, child in value.items()}
    if isinstance(value, tuple):
        return tuple(_at(child, i) for child in value)
    return value[i]


def _shares(store: ReplayStore, window: Transition, rng: np.random.Generator) -> dict[str, float]:
    """The share of each module in the time of a batch, with the C functions that it calls; largest first.

    They are a profiler's, which slows Python down and C not at all.
    """
    profile = cProfile.Profile()
    batches = 50
    for _ in range(batches):
        store.sample(BATCH, window, rng)
    for _ in range(batches):
        profile.runcall(store.sample, BATCH, window, rng)
    package, spent = os.path.dirname(__file__), Counter[str]()
    for (file, _, _), (_, _, own, _, callers) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if os.path.dirname(file) == package:
            spent[os.path.basename(file)] += own
            continue
        for (caller, _, _), (_, _, on_its_behalf, _) in callers.items():
            inside = os.path.dirname(caller) == package
            spent[os.path.basename(caller) if inside else "numpy and others"] += on_its_behalf
    return {module: total / spent.total() for module, total in spent.most_common()}


class Trial(NamedTuple):
    """One way to pack a field: bytes a row, µs to encode a row, µs to read an item's rows."""

    codec: str
    chunk_rows: int
    nbytes: float
    encode: float
    read: float


def try_codecs(
    store: ReplayStore, field: Field, rng: np.random.Generator, *, rows: int = 4096
) -> Iterator[Trial]:
    """Encode a sample of a packed field's rows with several codecs and chunk lengths.

    An item takes `store.frame_stack + 1` consecutive rows.
    """
    sample = _sample_rows(store, field, rows)
    codecs = dict.fromkeys([field.codec, *(codec for codec in CODECS if field.dtype.itemsize == 1)])
    if field.dtype.itemsize > 1:
        codecs |= dict.fromkeys(f"{codec}-shuffle" for codec in CODECS)
    lengths = [field.chunk_rows * factor // 2 for factor in (1, 2, 4)]
    for codec, length in itertools.product(codecs, lengths):
        if 1 <= length <= min(MAX_CHUNK_ROWS, len(sample)):
            other = Field(field.name, field.shape, field.dtype, codec=codec, chunk_rows=length)
            yield _try(other, sample[: len(sample) // length * length], store.frame_stack + 1, rng)


def _sample_rows(store: ReplayStore, field: Field, rows: int) -> np.ndarray:
    found: list[np.ndarray] = []
    for number in range(store.num_episodes):
        episode = store.episode(number)
        flat = store.schema.flatten_top(field.name.split("/")[0], episode[field.name.split("/")[0]])
        found.append(flat[field.name])
        if sum(map(len, found)) >= rows:
            break
    if not found:
        raise UsageError(f"{store.path}: expected at least one transition to try codecs on, it has none")
    return np.concatenate(found)[:rows]


def _try(field: Field, sample: np.ndarray, item_rows: int, rng: np.random.Generator) -> Trial:
    codec, size = ChunkCodec(field), field.chunk_rows
    start = time.perf_counter()
    chunks = [codec.encode(chunk) for chunk in sample.reshape(-1, size, *field.shape)]
    encoding = time.perf_counter() - start
    encoded = np.frombuffer(b"".join(chunks), np.uint8)
    sizes = np.array([len(chunk) for chunk in chunks])
    starts = encoded.ctypes.data + np.cumsum(sizes) - sizes
    items = 1024
    begins = rng.integers(max(1, len(sample) - item_rows + 1), size=items)
    rows = np.minimum(begins[:, None] + np.arange(item_rows), len(sample) - 1).ravel()
    out = np.empty((len(rows), *field.shape), field.dtype)
    _take(codec, field, (starts, sizes), rows, out)  # for the first time: the kernel gives the memory now
    start = time.perf_counter()
    _take(codec, field, (starts, sizes), rows, out)
    reading = time.perf_counter() - start
    scale = 1e6 / len(sample)
    return Trial(field.codec, size, len(encoded) / len(sample), encoding * scale, reading / items * 1e6)


def _take(
    codec: ChunkCodec,
    field: Field,
    chunks: tuple[np.ndarray, np.ndarray],
    rows: np.ndarray,
    out: np.ndarray,
) -> None:
    """Read rows out of encoded chunks, by their addresses and sizes, one item after the other.

    A chunk that several items need is decoded for each of them, as in a large store hardly any is.
    """
    number, within = np.divmod(rows, field.chunk_rows)
    first = run_bounds(number)
    starts, sizes = (column[number[first[:-1]]] for column in chunks)
    scratch, to = np.empty((field.chunk_rows, *field.shape), field.dtype), np.arange(len(rows))
    codec.take_rows(starts, sizes, first=first, within=within, to=to, out=out, scratch=scratch)


def draw(figures: list[Figure], path: Path, title: str) -> None:
    """Draw the figures as bars, a panel for each section; needs matplotlib."""
    from matplotlib.figure import Figure as Picture  # here alone: an optional dependency

    sections = list(dict.fromkeys(figure.section for figure in figures))
    heights = [sum(figure.section == section for figure in figures) + 1 for section in sections]
    picture = Picture(figsize=(8, 0.36 * sum(heights) + 1), layout="constrained")
    panels = picture.subplots(len(sections), height_ratios=heights, squeeze=False)[:, 0]
    for panel, section in zip(panels, sections, strict=True):
        shown = [figure for figure in figures if figure.section == section]
        bars = panel.barh([figure.name for figure in shown], [figure.value for figure in shown])
        panel.bar_label(bars, [f"{figure.value:,.1f}" for figure in shown], padding=3)
        panel.set_title(section, loc="left", fontsize=10)
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    picture.suptitle(title)
    picture.savefig(path)
