"""`ReplayStore`: one directory that is recorded into and sampled from.

The store joins the parts: a view of what it holds, to sample from (`selection.py`), and, when it was
opened for writing, the writer of one stream.
"""

import json
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from replaystore.bounds import Bounds, check_bounds
from replaystore.checkpoints import (
    Checkpoint,
    checkpoint_names,
    checkpoint_path,
    read_checkpoint,
    runs_of,
    write_checkpoint,
)
from replaystore.contents import NONE, pack_content, restore_content, unpack_content
from replaystore.errors import ClosedError, ReadOnlyError, UsageError
from replaystore.evictions import read_evictions
from replaystore.files import disk_usage
from replaystore.going_back import go_back, lock_streams, target_of
from replaystore.head import Head
from replaystore.metadata import parse_root, render_root
from replaystore.opening import StreamOpener, check_num_envs
from replaystore.reservoir import ReservoirWriter
from replaystore.room import fitted_schema, stream_length
from replaystore.root import make_root, read_root
from replaystore.samplers import Sampler
from replaystore.schema import Schema
from replaystore.selection import Selection
from replaystore.view import View
from replaystore.writer import Moved, StreamWriter

CACHE_BYTES = 1 << 23


class ReplayStore(Selection):
    """A replay memory on disk. Make one with `create` or `open`; use it as a context manager.

    Any number of processes may have a store open to read while others write it. One object may be
    used by several threads; their calls are serialised. After a fork the child can read with it,
    and gets `ForkError` if it writes.
    """

    def __init__(self, path: Path, *, heads: Mapping[int, bytes] | None, cache_bytes: int) -> None:
        self.path = path
        root = read_root(path)
        attributes = parse_root(root, str(path / "zarr.json"))
        self.env_spec: str | None = attributes["env_spec"]
        self.frame_stack: int = attributes["frame_stack"]
        self.bounds: Bounds = attributes["bounds"]
        super().__init__(View(path, attributes["schema"], heads=heads, cache_bytes=cache_bytes))
        self._opener = StreamOpener(self._view, self.bounds, root)
        self._writer: StreamWriter | ReservoirWriter | None = None
        self._moved: list[Moved] = []  # by going back to a checkpoint
        self._went_back_to: str | None = None
        _stores.add(self)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        schema: Schema,
        num_envs: int = 1,
        capacity: int | None = None,
        capacity_bytes: int | None = None,
        max_age: float | None = None,
        *,
        reservoir: bool = False,
        env_spec: str | None = None,
        frame_stack: int = 1,
        cache_bytes: int = CACHE_BYTES,
        rng: np.random.Generator | None = None,
    ) -> Self:
        """Make a store in a directory that is new or empty, and open it for writing.

        With `capacity`, in transitions, `capacity_bytes`, on disk, or `max_age`, in seconds since an
        episode began, the oldest transitions are evicted: those of all streams count together, a
        full store keeps at least 15/16 of its capacity. Files get as short as that needs.

        A `reservoir` of a capacity keeps each episode ever seen with the same probability, `admission`,
        for continual learning: `rng` says which ones are recorded and which evicted.

        `env_spec` is gymnasium's `EnvSpec.to_json()` and `frame_stack` the stack of the
        environment's observations; both are kept for `make_env` and the user.
        """
        check_num_envs(num_envs)
        if not isinstance(schema, Schema):
            raise UsageError(f"schema: expected a Schema, got {schema!r}")
        if not isinstance(env_spec, str | None):
            raise UsageError(f"env_spec: expected a str or None, got {env_spec!r}")
        if type(frame_stack) is not int or frame_stack < 1:
            raise UsageError(f"frame_stack: expected an int from 1, got {frame_stack!r}")
        bounds = Bounds(capacity, capacity_bytes, max_age, reservoir)
        check_bounds(bounds)
        schema = fitted_schema(schema, bounds, num_envs)
        path = Path(os.path.abspath(path))
        data = render_root(schema, env_spec=env_spec, frame_stack=frame_stack, bounds=bounds)
        make_root(path, data)
        return cls.open(path, "a", num_envs=num_envs, cache_bytes=cache_bytes, rng=rng)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        mode: str = "r",
        *,
        num_envs: int | None = None,
        cache_bytes: int = CACHE_BYTES,
        heads: Mapping[int, bytes] | None = None,
        at: str | None = None,
        rng: np.random.Generator | None = None,
    ) -> Self:
        """Open to read ("r"), or also to append ("a").

        Appending continues the newest stream of `num_envs` (by default: of the newest stream)
        that nobody holds, or starts a new one. `cache_bytes` bounds the decoded chunks kept in
        memory. `heads`, from another process's `store.snapshot`, opens that commit exactly. A reservoir
        has one writer at a time, or else `WriterBusy`; `rng` decides what it records and evicts.

        `at` appends where a checkpoint left the store: with its transitions in its order, and its
        open episodes, which `step` continues. What was recorded later, by anybody, is dropped:
        it is sampled no more. Raises `WriterBusy`, with nothing changed, while somebody writes the store.
        The rows of the open episodes get new ids. What a bounded store has evicted since is gone. With
        several streams, each goes back by a commit of its own: after a crash between, open again.
        """
        if mode not in ("r", "a"):
            raise UsageError(f'mode: expected "r" or "a", got {mode!r}')
        if type(cache_bytes) is not int or cache_bytes < 0:
            raise UsageError(f"cache_bytes: expected an int from 0, got {cache_bytes!r}")
        if at is not None and (mode == "r" or heads is not None):
            raise UsageError('at: expected mode "a" and no heads, to go on from a checkpoint')
        if rng is not None and not isinstance(rng, np.random.Generator):
            raise UsageError(f"rng: expected a numpy.random.Generator, got {rng!r}")
        path = Path(os.path.abspath(path))
        checkpoint = None if at is None else read_checkpoint(path, at)
        store = cls(path, heads=heads, cache_bytes=cache_bytes)
        if checkpoint is not None:
            store._go_back(checkpoint, num_envs)
            store._went_back_to = at
        elif mode == "a":
            store._open_writer(num_envs, rng)
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
        with self._view.lock:
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
        with self._view.lock:
            writer = self._writer or self._writable()
            writer.step(values | extra if extra else values, mask)

    def add_episode(
        self,
        *,
        seed: int | None = None,
        policy: str | None = None,
        columns: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        """Append a whole episode: L+1 observations, L of every other field."""
        with self._view.lock:
            self._writable().add_episode(
                fields, seed=seed, policy=policy, columns={} if columns is None else columns
            )

    def evict(self, rows: Mapping[int, int]) -> None:
        """Evict the rows of each stream below one, as `Once.consumed` gives them; of stores with bounds.

        Commits what was appended, as `flush` does, and returns when they are evicted, as far as whole
        chunks go; 64 rows more stay for stacks of frames. Streams that another process writes are left
        as they are; in those that nobody writes the rows are shown until `refresh`.
        """
        with self._view.lock:
            writer = self._writable()
            if self.bounds.is_none or isinstance(writer, ReservoirWriter):
                raise UsageError(
                    f"evict: expected a store with capacity, capacity_bytes or max_age, and no reservoir,"
                    f" {self.path} has {self.bounds}"
                )
            writer.evict(_checked_rows(rows, self._view.heads))

    def flush(self) -> None:
        """Return when every row appended before survives a kill and a power cut."""
        with self._view.lock:
            self._writable().flush()

    def checkpoint(
        self,
        name: str,
        state: Any = None,
        *,
        samplers: Mapping[str, Sampler] = NONE,
        generators: Mapping[str, Any] = NONE,
        loader: Any = None,
        keep: int | None = None,
    ) -> None:
        """Keep, with this commit of the store, all that a run goes on from; durable when it returns.

        `state` is nested dicts, lists and tuples of tensors, arrays, numbers, strings, bytes and
        None. Kept beside it are the states of samplers, of numpy's and torch's `generators` and
        those that a program shares (`random`, `np.random`, `torch`), and of a loader. No row is
        copied. A checkpoint of the same name is replaced, at once; with `keep` all but the newest
        so many are removed. Raises `UsageError` before anything is written.
        """
        checkpoint_path(self.path, name)
        if keep is not None and (type(keep) is not int or keep < 1):
            raise UsageError(f"keep: expected None or an int from 1, got {keep!r}")
        with self._view.lock:
            writer = self._writable()
            content = pack_content(state, samplers, generators, loader)
            writer.flush()
            heads, index = self._view.snapshot(), self._view.index()
            order = runs_of(index.episodes()[0][: index.num_closed])
            write_checkpoint(self.path, name, Checkpoint(writer.number, heads, order, content), keep=keep)
            if name == self._went_back_to:  # the older one, which knew rows by ids of before
                self._moved = []

    def restore(
        self,
        name: str,
        *,
        samplers: Mapping[str, Sampler] = NONE,
        generators: Mapping[str, Any] = NONE,
        loader: Any = None,
    ) -> Any:
        """The state that a checkpoint kept, tensors on the CPU; what is given goes on from its own.

        The generators that a program shares are set as well. Call it on the store that was opened
        `at` the checkpoint: samplers then know the rows of open episodes by their new ids.
        """
        content = unpack_content(self.path, name, read_checkpoint(self.path, name).content)
        with self._view.lock:
            widths = self._view.index().widths
        moved = self._moved if name == self._went_back_to else []
        return restore_content(content, samplers, generators, loader, moved=moved, widths=widths)

    def close(self) -> None:
        """Commit what was appended, give the stream back, and let the files go."""
        with self._view.lock:
            if self._writer is not None:
                self._writer.close()
            self._view.close()
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
        with self._view.lock:
            self._view.refresh()

    @property
    def snapshot(self) -> dict[int, bytes]:
        """The commit this store shows, to `open` the same in another process."""
        with self._view.lock:
            return self._view.snapshot()

    @property
    def checkpoints(self) -> list[str]:
        """The names of the store's checkpoints, the newest last; those that cannot be read are left out."""
        return checkpoint_names(self.path)

    @property
    def nbytes(self) -> int:
        """Bytes on disk: the blocks of every file in the directory."""
        return disk_usage(self.path)

    @property
    def admission(self) -> float:
        """The probability with which an episode is recorded: 1, but for a reservoir.

        Of a reservoir also that with which each episode seen so far is there.
        """
        with self._view.lock:
            if isinstance(self._writer, ReservoirWriter):
                return self._writer.admission
            return read_evictions(self.path, self._view.heads).admission if self.bounds.reservoir else 1.0

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
        with self._view.lock:
            self._view.check()

    # ---- the writer

    def _writable(self) -> StreamWriter | ReservoirWriter:
        self._check_open()
        if self._writer is None:
            raise ReadOnlyError(f'{self.path}: opened with mode "r"; open it with mode "a" to write')
        return self._writer

    def _open_writer(self, num_envs: int | None, rng: np.random.Generator | None) -> None:
        self._check_writable()
        if self.bounds.reservoir:
            self._writer = self._fill_reservoir(num_envs, rng)
            return
        self._writer = self._opener.newest(num_envs)

    def _fill_reservoir(self, num_envs: int | None, rng: np.random.Generator | None) -> ReservoirWriter:
        capacity, num_envs = self.bounds.capacity, self._opener.width(num_envs)
        assert capacity is not None, self.bounds
        return ReservoirWriter(
            self._view,
            self._opener.open,
            num_envs=num_envs,
            capacity=capacity,
            stream_length=stream_length(self.schema, self.bounds, num_envs),
            rng=np.random.default_rng() if rng is None else rng,
        )

    def _go_back(self, checkpoint: Checkpoint, num_envs: int | None) -> None:
        """Take all streams back to a checkpoint, and go on with the one that its writer had."""
        if self.bounds.reservoir:
            raise UsageError(
                f"at: {self.path} is a reservoir, which cannot have back what it has evicted since"
            )
        self._check_writable()
        locks = lock_streams(self.path)

        def begin(stream: int) -> StreamWriter:
            return self._opener.take_up(stream, locks.pop(stream))

        try:
            self._view.refresh()
            target = target_of(self._view, checkpoint, num_envs)
            writer = begin(checkpoint.writer)
            try:
                self._moved = go_back(self._view, target, writer, begin)
                self._view.attach(writer)
                self._view.rebuild(target.order)
                self._writer = writer
            except BaseException:
                writer.discard()
                raise
        finally:
            for lock in locks.values():
                lock.release()

    def _check_writable(self) -> None:
        if not os.access(self.path / "streams", os.W_OK):
            raise ReadOnlyError(f"{self.path}: the directory cannot be written")

    def _check_open(self) -> None:
        if self._view.is_closed:
            raise ClosedError(f"{self.path}: the store is closed")


def _checked_rows(rows: Any, heads: Mapping[int, Head]) -> dict[int, int]:
    if not isinstance(rows, Mapping):
        raise UsageError(f"evict: expected a dict of rows by stream, got {rows!r}")
    for stream, row in rows.items():
        if stream not in heads or not isinstance(row, int | np.integer) or row < 0:
            raise UsageError(
                f"evict: expected a row from 0 of a stream among {sorted(heads)}, got row {row!r} of {stream!r}"
            )
    return {int(stream): int(row) for stream, row in rows.items()}


_stores: "weakref.WeakSet[ReplayStore]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for store in list(_stores):
        store._view.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
