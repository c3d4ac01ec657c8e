"""`ReplayStore`: one directory that is recorded into and sampled from.

The store joins the parts: the streams' heads, the episode index over them, the reader of their
rows, and, when it was opened for writing, the writer of one stream.
"""

import contextlib
import itertools
import json
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from replaystore.arena import stream_path
from replaystore.catalog import Catalog
from replaystore.commit import create_stream
from replaystore.episodes import integers
from replaystore.errors import ClosedError, ReadOnlyError, ReplayStoreError, UsageError
from replaystore.files import Lock, disk_usage, make_directory, write_atomic
from replaystore.head import HEAD, Head, decode_head, empty_head, encode_head, has_head, keep_head, read_head
from replaystore.index import Places
from replaystore.metadata import parse_root, render_root
from replaystore.reader import Allocate, Reader, Tail
from replaystore.root import make_root, read_root
from replaystore.schema import MAX_NUM_ENVS, Schema
from replaystore.windows import Batch, Transition
from replaystore.writer import StreamWriter

CACHE_BYTES = 1 << 23


class ReplayStore:
    """A replay memory on disk. Make one with `create` or `open`; use it as a context manager.

    Any number of processes may have a store open to read while others write it. One object may be
    used by several threads; their calls are serialised. After a fork the child can read with it,
    and gets `ForkError` if it writes.
    """

    def __init__(self, path: Path, *, heads: Mapping[int, bytes] | None, cache_bytes: int) -> None:
        self.path = path
        self._root = read_root(path)
        attributes = parse_root(self._root, str(path / "zarr.json"))
        self.schema: Schema = attributes["schema"]
        self.env_spec: str | None = attributes["env_spec"]
        self.frame_stack: int = attributes["frame_stack"]
        self._lock = threading.RLock()
        self._catalog = Catalog(path, self.schema)
        self._reader = Reader(path, self.schema, cache_bytes=cache_bytes)
        self._writer: StreamWriter | None = None
        self._tail: Tail | None = None  # what the writer's ring holds beyond the heads shown
        self._rng = np.random.default_rng()
        self._closed = False
        self._cache_bytes = cache_bytes
        self._is_behind = False  # an interrupt came while commits were taken over
        self._shown = (-1, -1)  # the writer's state that the index and the reader show
        self._load(heads if heads is not None else self._catalog.choose_heads())
        _stores.add(self)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        schema: Schema,
        num_envs: int = 1,
        *,
        env_spec: str | None = None,
        frame_stack: int = 1,
        cache_bytes: int = CACHE_BYTES,
    ) -> Self:
        """Make a store in a directory that is new or empty, and open it for writing.

        `env_spec` is gymnasium's `EnvSpec.to_json()` and `frame_stack` the stack of the
        environment's observations; both are kept for `make_env` and the user.
        """
        _check_num_envs(num_envs)
        if not isinstance(schema, Schema):
            raise UsageError(f"schema: expected a Schema, got {schema!r}")
        if not isinstance(env_spec, str | None):
            raise UsageError(f"env_spec: expected a str or None, got {env_spec!r}")
        if type(frame_stack) is not int or frame_stack < 1:
            raise UsageError(f"frame_stack: expected an int from 1, got {frame_stack!r}")
        path = Path(os.path.abspath(path))
        data = render_root(schema, env_spec=env_spec, frame_stack=frame_stack)
        make_root(path, data)
        return cls.open(path, "a", num_envs=num_envs, cache_bytes=cache_bytes)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        mode: str = "r",
        *,
        num_envs: int | None = None,
        cache_bytes: int = CACHE_BYTES,
        heads: Mapping[int, bytes] | None = None,
    ) -> Self:
        """Open to read ("r"), or also to append ("a").

        Appending continues the newest stream of `num_envs` (by default: of the newest stream)
        that nobody holds, or starts a new one. `cache_bytes` bounds the decoded chunks kept in
        memory. `heads`, from another process's `store.snapshot`, opens that commit exactly.
        """
        if mode not in ("r", "a"):
            raise UsageError(f'mode: expected "r" or "a", got {mode!r}')
        if type(cache_bytes) is not int or cache_bytes < 0:
            raise UsageError(f"cache_bytes: expected an int from 0, got {cache_bytes!r}")
        store = cls(Path(os.path.abspath(path)), heads=heads, cache_bytes=cache_bytes)
        if mode == "a":
            store._open_writer(num_envs)
        return store

    # ---- writing

    def reset(
        self,
        observation: Any,
        seed: int | Sequence[int | None] | None = None,
        *,
        mask: np.ndarray | None = None,
        policy: str | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin an episode; one still open ends there, neither terminated nor truncated.

        With several environments, arrays have them first, and `mask`, (num_envs,) bool, says
        which of them begin. `policy` tags the episode, `columns` fills the schema's episode
        columns (a value, or one for each environment).
        """
        with self._lock:
            self._writable().reset(observation, seed=seed, mask=mask, policy=policy, columns=columns)

    def step(
        self,
        action: Any,
        observation: Any,
        reward: Any,
        terminated: Any,
        truncated: Any,
        *,
        mask: np.ndarray | None = None,
        **extra: Any,
    ) -> None:
        """Append a transition: what was done from the last observation, and the one that followed.

        Raises `SchemaError` or `UsageError` before anything is written, and `CommitError` if the
        last background commit failed: nothing is lost or appended then, and the call can be
        repeated.
        """
        values = {
            "action": action,
            "observation": observation,
            "reward": reward,
            "terminated": terminated,
            "truncated": truncated,
        }
        with self._lock:
            self._writable().step(values | extra if extra else values, mask)

    def add_episode(
        self,
        *,
        seed: int | None = None,
        policy: str | None = None,
        columns: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        """Append a whole episode: L+1 observations, L of every other field."""
        with self._lock:
            self._writable().add_episode(
                fields, seed=seed, policy=policy, columns={} if columns is None else columns
            )

    def flush(self) -> None:
        """Return when every row appended before survives a kill and a power cut."""
        with self._lock:
            self._writable().flush()

    def close(self) -> None:
        """Commit what was appended, give the stream back, and let the files go."""
        with self._lock:
            if self._writer is not None:
                self._writer.close()
            self._closed = True
        _stores.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- reading

    def refresh(self) -> None:
        """Move to the newest commit of every stream; transition numbers may change, ids do not."""
        self._check_open()
        with self._lock:
            if self._is_behind:
                self._rebuild()
            heads = self._catalog.read_heads()
            self._is_behind = True
            try:
                self._load(heads)
            except (ReplayStoreError, OSError):
                self._is_behind = False  # nothing was taken over
                raise
            self._is_behind = False

    @property
    def snapshot(self) -> dict[int, bytes]:
        """The commit this store shows, to `open` the same in another process."""
        with self._lock:
            self._catch_up()
            return self._catalog.snapshot()

    def __len__(self) -> int:
        """Transitions; in the process that writes, also those not yet committed."""
        with self._lock:
            self._catch_up()
            return len(self._catalog.index)

    @property
    def num_episodes(self) -> int:
        """Episodes of at least one transition, open ones included."""
        with self._lock:
            self._catch_up()
            return self._catalog.index.num_episodes

    @property
    def nbytes(self) -> int:
        """Bytes on disk: the blocks of every file in the directory."""
        return disk_usage(self.path)

    @property
    def episodes(self) -> pa.Table:
        """One row per episode, those of sealed index parts memory-mapped; see the README.

        `stream` and the columns of the index. Episodes that are open stand behind the others of
        their stream, with the length they have.
        """
        with self._lock:
            self._catch_up()
            with self._commits_held():
                return self._catalog.episodes()

    def episode(self, number: int) -> dict[str, Any]:
        """The arrays of one episode: L+1 observations, L of the rest; nested as the spaces are."""
        with self._lock:
            table = self.episodes
            if not isinstance(number, (int, np.integer)) or not -len(table) <= number < len(table):
                raise UsageError(f"episode: expected a number below {len(table)}, got {number!r}")
            row = table.slice(int(number) % len(table), 1)
            stream, env, first, length = (
                integers(row, name) for name in ("stream", "env", "first_row", "length")
            )
            places = Places(stream, env, first, first, first + length)
            rows = first[:, None] + np.arange(length[0] + 1)
            times = {
                field.name: rows if self.schema.is_observation(field.name) else rows[:, :-1]
                for field in self.schema.fields
            }
            arrays = self._reader.read(places, times, tail=self._tail)
            flat = {name: array[0] for name, array in arrays.items()}
            return {top: self.schema.nest(top, flat) for top in self.schema.tops}

    def sample(
        self, n: int, window: Transition | None = None, rng: np.random.Generator | None = None
    ) -> Batch:
        """Draw n transitions uniformly, with replacement."""
        if not isinstance(n, (int, np.integer)) or isinstance(n, bool) or n < 1:
            raise UsageError(f"sample: expected a batch size from 1, got {n!r}")
        if rng is not None and not isinstance(rng, np.random.Generator):
            raise UsageError(f"rng: expected a numpy.random.Generator, got {rng!r}")
        with self._lock:
            self._catch_up()
            length = len(self._catalog.index)
            if not length:
                raise UsageError(f"sample: expected at least one transition, {self.path} has none")
            rng = self._rng if rng is None else rng
            return self._read(rng.integers(length, size=n), _window(window))

    def read(
        self, numbers: np.ndarray, window: Transition | None = None, *, allocate: Allocate = np.empty
    ) -> Batch:
        """Read transitions by number, from 0 to `len(store) - 1`.

        `allocate(shape, dtype)` gives the arrays to read into.
        """
        numbers = np.asarray(numbers)
        with self._lock:
            self._catch_up()
            length = len(self._catalog.index)
            if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
                raise UsageError(f"read: expected a list of integers, got {numbers.dtype} of {numbers.shape}")
            if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < length:
                shown = f"{numbers.min()} to {numbers.max()}"
                raise UsageError(f"read: expected numbers from 0 to {length - 1}, got {shown}")
            return self._read(numbers.astype(np.int64), _window(window), allocate)

    def _read(self, numbers: np.ndarray, window: Transition, allocate: Allocate = np.empty) -> Batch:
        """The read path: numbers, places, rows, arrays, batch."""
        places = self._catalog.index.locate(numbers)
        rows = window.rows(places)
        times = {field.name: rows.of(field.name) for field in self.schema.fields}
        arrays = self._reader.read(places, times, tail=self._tail, allocate=allocate)
        return window.batch(rows, arrays, schema=self.schema, ids=self._reader.ids(places))

    def make_env(self, **kwargs: Any) -> Any:
        """Make the recorded environment again, by gymnasium's `make` with these arguments.

        This runs the code that the store's environment spec names: use it on stores you trust.
        """
        import gymnasium  # here alone: opening and sampling a store must not load it

        if self.env_spec is None:
            raise UsageError(f"{self.path}: no environment spec was recorded")
        spec = gymnasium.envs.registration.EnvSpec.from_json(self.env_spec)
        kept = json.loads(self.env_spec).get("num_envs")
        return gymnasium.make_vec(spec, kept, **kwargs) if kept else gymnasium.make(spec, **kwargs)

    def check(self) -> None:
        """Raise at the first thing that is wrong: sizes, heads, the files still growing, the index.

        Quick; `replaystore verify` reads every byte.
        """
        with self._lock:
            self._catch_up()
            with self._commits_held():
                self._catalog.check()

    # ---- the writer

    def _writable(self) -> StreamWriter:
        if self._closed:
            raise ClosedError(f"{self.path}: the store is closed")
        if self._writer is None:
            raise ReadOnlyError(f'{self.path}: opened with mode "r"; open it with mode "a" to write')
        return self._writer

    def _open_writer(self, num_envs: int | None) -> None:
        """Take the newest stream of this many environments that nobody holds, or a new one."""
        if not os.access(self.path / "streams", os.W_OK):
            raise ReadOnlyError(f"{self.path}: the directory cannot be written")
        heads = self._catalog.heads
        newest = max(heads, default=-1)
        if num_envs is None:
            num_envs = heads[newest].num_envs if heads else 1
        _check_num_envs(num_envs)
        ours = [stream for stream in sorted(heads, reverse=True) if heads[stream].num_envs == num_envs]
        for stream in itertools.chain(ours, itertools.count(newest + 1)):
            make_directory(stream_path(self.path, stream), exist_ok=True)
            if self._hold(stream, num_envs):
                return

    def _hold(self, stream: int, num_envs: int) -> bool:
        """Lock a stream and take up its writing; False if another writer has it."""
        path = stream_path(self.path, stream)
        lock = Lock.acquire(path / "lock")
        if lock is None:
            return False
        try:
            if not has_head(path):
                create_stream(path, self.schema, empty_head(self.schema, num_envs), self._root)
            head = self._newest_head(stream)
            if head.num_envs != num_envs:  # made meanwhile by somebody else
                lock.release()
                return False
            keep_head(path, head, self.schema)
            writer = StreamWriter(path, self.schema, head, number=stream, lock=lock)
        except BaseException:
            lock.release()
            raise
        try:
            if writer.head.commit > head.commit:
                self._load({stream: encode_head(writer.head, self.schema)})
            self._refill(writer, head)
        except BaseException:
            writer.discard()
            raise
        writer.start()
        self._catalog.attach(writer)
        self._writer = writer
        return True

    def _newest_head(self, stream: int) -> Head:
        """The head to go on from; the stream is locked, so nobody replaces it."""
        path = stream_path(self.path, stream)
        known = self._catalog.heads.get(stream)
        data = read_head(path)
        if known is not None and decode_head(data, self.schema, path / HEAD).commit > known.commit:
            data = self._catalog.choose_heads()[stream]
            if data != read_head(path):
                write_atomic(path / HEAD, data)  # what this copy lacks is given up
        self._load({stream: data})
        return self._catalog.heads[stream]

    def _refill(self, writer: StreamWriter, head: Head) -> None:
        for env, (floor, rows) in enumerate(zip(writer.floor_of(head), head.rows, strict=True)):
            if floor < rows:
                one = np.array([0])
                places = Places(one + writer.number, one + env, one + floor, one, one)
                times = {
                    name: np.arange(floor, head.field_rows(self.schema, name)[env])[None]
                    for name in self.schema.by_name
                }
                arrays = self._reader.read(places, times)
                rings = {name: array[0] for name, array in arrays.items()}
                writer.refill(env, int(floor), int(rows - floor), rings)

    def _rebuild(self) -> None:
        """Begin anew from the heads: an interrupt has left the index or the reader half-way."""
        heads = self._catalog.read_heads()
        catalog = Catalog(self.path, self.schema)
        reader = Reader(self.path, self.schema, cache_bytes=self._cache_bytes)
        with self._writer.lock if self._writer is not None else contextlib.nullcontext():
            if self._writer is not None:
                heads[self._writer.number] = encode_head(self._writer.head, self.schema)
                self._writer.forget_taken()
            self._catalog, self._reader, self._tail, self._shown = catalog, reader, None, (-1, -1)
            self._load(heads)
            if self._writer is not None:
                self._catalog.attach(self._writer)

    def _load(self, heads: Mapping[int, bytes]) -> None:
        changed = self._catalog.decode(heads)
        if changed:
            self._reader.update(changed)
        self._catalog.take(changed, heads)

    def _catch_up(self) -> None:
        """In the process that writes: take in what was appended since the last call."""
        self._check_open()
        if self._is_behind:
            self._rebuild()
        if self._writer is not None and self._shown != self._writer.state:
            self._is_behind = True
            with self._writer.lock:
                state = self._writer.state
                changed = self._catalog.catch_up()
            if changed:
                self._reader.update(changed)
            if changed or self._tail is None:
                head = self._catalog.heads[self._writer.number]
                self._tail = Tail(self._writer.number, self._writer.floor_of(head), self._writer.ring)
            self._shown = state
        self._is_behind = False

    @contextlib.contextmanager
    def _commits_held(self) -> Iterator[None]:
        """While what the writer here has not committed is joined to the head that lacks it."""
        if self._writer is None:
            yield
            return
        with self._writer.lock:
            self._catch_up()
            yield

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self.path}: the store is closed")

    def _after_fork(self) -> None:
        self._lock = threading.RLock()
        if self._writer is not None:
            self._writer.abandon()


_stores: "weakref.WeakSet[ReplayStore]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for store in list(_stores):
        store._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)


_PLAIN = Transition()


def _window(window: Transition | None) -> Transition:
    if window is None:
        return _PLAIN
    if not isinstance(window, Transition):
        raise UsageError(f"window: expected a Transition, got {window!r}")
    return window


def _check_num_envs(num_envs: Any) -> None:
    if not isinstance(num_envs, int) or isinstance(num_envs, bool) or not 1 <= num_envs <= MAX_NUM_ENVS:
        raise UsageError(f"num_envs: expected an int from 1 to {MAX_NUM_ENVS}, got {num_envs!r}")
