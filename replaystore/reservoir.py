"""Records into a reservoir: every episode ever seen is there with the same probability (Vitter 1985).

An episode is admitted when it begins, with probability q, at first 1, or not recorded at all. Streams
have about a 32nd of the capacity each; whenever there would be more transitions than the capacity, one
of the n streams is evicted as a whole, each with probability 1/n, and q becomes q (n - 1) / n.

Proof that this is even: if every episode seen so far is there with probability q, then after an
eviction with q (n - 1) / n, as it needed its stream to be spared, and that is the new q; and the next
episode is there with the new q, as it is admitted so. At first all are there, and q is 1.

When streams are evicted depends on the lengths of the episodes that are there, so q is a random number.
What is exact then is that 1/q of an episode that is there, and 0 of one that is not, has the expectation
1: each one there stands for 1/q that were seen. The probability of one of L transitions differs from the
others' by a part of L / capacity at the most: with 1 to 60 of 300 by 6 percent, with 1 to 12 of 1,000 by
less than what 4,000 simulated recordings show, half a percent.

Each stream that is evicted, and n, are written down (`evictions.py`) before anything of it goes; so q
and an eviction that was cut short are known after a crash.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from replaystore.arena import stream_path
from replaystore.commit import evict_stream
from replaystore.errors import ForkError, ReplayStoreError, UsageError, WriterBusy
from replaystore.evictions import FOLDER, read_evictions, write_evictions
from replaystore.files import Lock, make_directory, sweep_partials
from replaystore.head import read_head
from replaystore.view import View
from replaystore.writer import StreamWriter, commit_error


class ReservoirWriter:
    """Appends to a reservoir; its calls are those of a `StreamWriter`, and its owner serialises them.

    New episodes go to one stream until that has its length, then to the next; a stream has a writer
    for as long as an episode in it is open.
    """

    def __init__(
        self,
        view: View,
        open_stream: Callable[[int, int], StreamWriter | None],
        *,
        num_envs: int,
        capacity: int,
        stream_length: int,
        rng: np.random.Generator,
    ) -> None:
        """Go on from what is there; raises `WriterBusy` while another process writes the reservoir.

        `open_stream(number, num_envs)` begins to write a stream and has the view show it; it gives None
        if that has a writer already.
        """
        self._view = view
        self._open_stream = open_stream
        self._num_envs = num_envs
        self._capacity = capacity
        self._stream_length = stream_length
        self._rng = rng
        self._owner = os.getpid()
        self._is_counted = True  # but after errors
        self._lock = _lock(view.path)
        try:
            view.refresh()  # what another writer may have left since
            self._evictions = read_evictions(view.path, view.heads)
            self._held = {  # transitions, by stream that is not evicted
                stream: head.evicted.left
                for stream, head in view.heads.items()
                if head.evicted is not None and not head.is_evicted
            }
            self._total = sum(self._held.values())
            for stream, head in view.heads.items():
                if head.is_evicted:  # a writer that was killed may have left files
                    evict_stream(stream_path(view.path, stream), head, view.schema)
            self._doomed = [stream for stream in self._evictions.streams if stream in self._held]
            self._evict_doomed()
            self._filling = self._begin(self._first())
        except BaseException:
            self.discard()
            raise
        self._at = [self._filling] * num_envs  # by environment: the writer of its last episode
        self._is_outside = [False] * num_envs  # whether that is open and not recorded

    @property
    def number(self) -> int:
        """The stream to which new episodes go."""
        return self._filling.number

    @property
    def admission(self) -> float:
        """The probability with which the next episode is admitted, and each one seen is there."""
        return self._evictions.admission

    # ---- appending

    def reset(
        self,
        observation: Any,
        *,
        seed: int | Sequence[int | None] | None = None,
        mask: np.ndarray | None = None,
        policy: str | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin an episode in each environment of `mask`, recorded or not; an open one ends there."""
        described: dict[str, Any] = {"seed": seed, "policy": policy, "columns": columns}
        self._filling.check_reset(observation, mask=mask, **described)
        envs = self._filling.envs(mask)
        self._move_on()
        with self._filling.lock:
            self._filling.prepare(envs)
            admitted = [env for env in envs if self._admits()]
            for env in envs:
                self._end(env)
            self._filling.reset(observation, mask=self._mask(admitted), **described)
            for env in envs:
                self._at[env], self._is_outside[env] = self._filling, env not in admitted

    def step(self, values: Mapping[str, Any], mask: np.ndarray | None = None) -> None:
        """Append what was done from the last row, and what followed, to episodes that are recorded."""
        try:
            if self._num_envs == 1 and mask is None:
                self._step_one(values)
            else:
                self._step_many(values, mask)
        except BaseException:
            self._is_counted = False
            raise

    def _step_many(self, values: Mapping[str, Any], mask: np.ndarray | None) -> None:
        envs = self._filling.envs(mask)
        self._make_room(sum(not self._is_outside[env] for env in envs))
        outside = [env for env in envs if self._is_outside[env]]
        parts = self._parts([env for env in envs if not self._is_outside[env]])
        self._filling.check_step(values) if not parts else self._step_parts(values, parts)
        if outside:
            over = np.logical_or(values["terminated"], values["truncated"]).reshape(-1)
            for env in outside:
                self._is_outside[env] = not over[env]

    def _step_one(self, values: Mapping[str, Any]) -> None:
        if not self._is_outside[0]:
            self._make_room(1)
        if self._is_outside[0]:  # also if that made it so
            self._check_owner()
            self._filling.check_step(values)
            self._is_outside[0] = not (values["terminated"] or values["truncated"])
            return
        writer = self._at[0] if self._at[0].is_open(0) else self._filling
        writer.step(values)
        self._count(writer, 1)

    def _parts(self, envs: list[int]) -> dict[StreamWriter, list[int]]:
        """Environments by the writer of their open episode; where none is open, the filling one says so."""
        parts: dict[StreamWriter, list[int]] = {}
        for env in envs:
            writer = self._at[env]
            parts.setdefault(writer if writer.is_open(env) else self._filling, []).append(env)
        return parts

    def _step_parts(self, values: Mapping[str, Any], parts: dict[StreamWriter, list[int]]) -> None:
        """Append to several streams all or nothing; after an interrupt between, episodes end there."""
        with contextlib.ExitStack() as stack:
            for writer, envs in parts.items():
                stack.enter_context(writer.lock)
                writer.prepare(envs)
            done: list[int] = []
            try:
                for writer, envs in parts.items():
                    writer.step(values, self._mask(envs))
                    self._count(writer, len(envs))
                    done += envs
            except BaseException:
                if done:
                    for env in [env for envs in parts.values() for env in envs]:
                        self._end(env)
                raise

    def add_episode(
        self,
        values: Mapping[str, Any],
        *,
        seed: int | None,
        policy: str | None,
        columns: Mapping[str, Any],
    ) -> None:
        """Append a whole episode, or not."""
        self._move_on()
        env = self._filling.shortest
        if self._is_outside[env] or self._at[env].is_open(env):
            raise UsageError("add_episode while an episode is open: finish it with step or reset first")
        described: dict[str, Any] = {"seed": seed, "policy": policy, "columns": columns}
        length = self._filling.check_episode(values, env=env, **described)
        if length > self._capacity:
            raise self._too_long()
        writer = self._filling
        writer.prepare([env])
        if not self._admits():
            return
        self._make_room(length)
        if self._filling is writer:  # or else it is evicted with the stream that it was to go to
            self._is_counted = False  # until it is
            writer.add_episode(values, env=env, **described)
            self._count(writer, length)
            self._is_counted = True

    def _count(self, writer: StreamWriter, count: int) -> None:
        self._held[writer.number] += count
        self._total += count

    def _admits(self) -> bool:
        return bool(self._rng.random() < self.admission)

    def _end(self, env: int) -> None:
        """End the episode that an environment has open, recorded or not."""
        self._at[env].cut(env)
        self._is_outside[env] = False

    def _mask(self, envs: Sequence[int]) -> np.ndarray:
        mask = np.zeros(self._num_envs, bool)
        mask[list(envs)] = True
        return mask

    # ---- flush, close

    def flush(self) -> None:
        """Return when all that was appended before is durable; raises `CommitError` if it cannot be."""
        self._settle()
        for writer in self._view.writers.values():
            writer.flush()

    def close(self) -> None:
        """Cut open episodes short, commit, and let others write the reservoir."""
        for writer in self._view.writers.values():
            writer.close()
        self._lock.release()

    def discard(self) -> None:
        """Let go of the reservoir without a commit."""
        for writer in self._view.writers.values():
            writer.discard()
        self._lock.release()

    # ---- streams

    def _first(self) -> int:
        """The newest stream, if it is not full and of as many environments; or else a new one."""
        newest = max([*self._view.heads, *self._evictions.streams], default=-1)
        if newest not in self._held or self._held[newest] >= self._stream_length:
            return newest + 1
        return newest if self._view.heads[newest].num_envs == self._num_envs else newest + 1

    def _begin(self, stream: int) -> StreamWriter:
        """Write a stream, or a later one where an interrupt kept its writer from being known here."""
        self._view.catch_up()
        while stream not in self._view.writers:
            if self._open_stream(stream, self._num_envs) is None:
                stream += 1
        self._held.setdefault(stream, 0)
        return self._view.writers[stream]

    def _move_on(self) -> None:
        """Before an episode begins: go on to the next stream if this one is full, and close what has ended."""
        self._settle()
        if self._held[self._filling.number] >= self._stream_length:
            with _as_commit_error(self._view.path):
                self._filling = self._begin(self._filling.number + 1)
        for writer in list(self._view.writers.values()):
            if writer is not self._filling and not any(map(writer.is_open, range(self._num_envs))):
                writer.close()
                self._view.detach(writer)

    # ---- room

    def _make_room(self, count: int) -> None:
        """Evict streams until there is room for so many transitions."""
        self._settle()
        while self._total + count > self._capacity:
            if len(self._held) == 1:
                raise self._too_long()
            streams = sorted(self._held)
            victim = streams[int(self._rng.integers(len(streams)))]
            evictions = self._evictions.and_one(victim, len(streams))
            with _as_commit_error(self._view.path):
                write_evictions(self._view.path, evictions)
            self._evictions, self._doomed = evictions, [victim]
            self._settle()

    def _too_long(self) -> UsageError:
        return UsageError(
            f"expected the episodes that are open to have no more than the reservoir's capacity of"
            f" {self._capacity} transitions together, as they are kept whole: end them sooner"
        )

    def _settle(self) -> None:
        """Do what a failure left undone: evict what is named as evicted, have a stream to fill."""
        self._check_owner()
        if not self._is_counted:
            self._recount()
        if not self._doomed and self._filling.number in self._held:
            return
        with _as_commit_error(self._view.path):
            self._evict_doomed()
            if self._filling.number not in self._held:
                self._filling = self._begin(self._filling.number + 1)

    def _recount(self) -> None:
        """Count what the streams have; after an error or an interrupt it may not be what was noted."""
        stream, _, first, last = self._view.index().episodes()
        for held in self._held:
            self._held[held] = int((last - first)[stream == held].sum())
        self._total = sum(self._held.values())
        self._is_counted = True

    def _check_owner(self) -> None:
        if os.getpid() != self._owner:
            raise ForkError("this store was opened for writing by the parent process: open it again here")

    def _evict_doomed(self) -> None:
        """Evict the streams that are named as evicted and still there."""
        while self._doomed:
            self._evict(self._doomed[0])
            self._held.pop(self._doomed[0], None)
            self._total = sum(self._held.values())
            del self._doomed[0]

    def _evict(self, stream: int) -> None:
        writer = self._view.writers.get(stream)
        if writer is not None:
            for env in filter(writer.is_open, range(self._num_envs)):
                writer.cut(env)
                self._is_outside[env] = True
            writer.discard()
            self._view.forget(writer)
        self._view.catch_up()  # an interrupt may have left it half-way
        path = stream_path(self._view.path, stream)
        evict_stream(path, self._view.heads[stream], self._view.schema)
        self._view.move_on({stream: read_head(path)})


def _lock(store: Path) -> Lock:
    make_directory(store / FOLDER, exist_ok=True)
    lock = Lock.acquire(store / FOLDER / "lock")
    if lock is None:
        raise WriterBusy(
            f"{store}: expected nobody to write the store, as a reservoir has one writer at a time, found one:"
            " close it first"
        )
    try:
        sweep_partials(store / FOLDER)
    except BaseException:
        lock.release()
        raise
    return lock


@contextlib.contextmanager
def _as_commit_error(path: Path) -> Iterator[None]:
    """Tell a caller of an error of the disk as of one in the background."""
    try:
        yield
    except ReplayStoreError:
        raise
    except OSError as error:
        raise commit_error(error, path) from error
