"""The writer of a stream: rows are appended in memory, and a thread commits them.

Rows stay in the ring until they are durable. A background thread commits about every second, or when
the ring is half full. It alone encodes, writes, syncs and replaces the head, so that an interrupt in
the caller's thread cannot stop a commit half-way.
"""

import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from replaystore.appender import Appender, Clock
from replaystore.commit import MakesRoom, Pending, StreamCommitter
from replaystore.episodes import Episode, OpenEpisode, above, episodes_of
from replaystore.errors import ClosedError, CommitError, ForkError
from replaystore.files import Lock, populate
from replaystore.head import HEAD, Head, decode_head, read_head
from replaystore.ring import Ring
from replaystore.schema import Schema

COMMIT_SECONDS = 1.0


class Moved(NamedTuple):
    """An open episode of `length` transitions that was recorded anew: its first row before and now."""

    stream: int
    env: int
    old: int
    new: int
    length: int


ReadRows = Callable[[Episode, int, int], Mapping[str, np.ndarray]]


class StreamWriter(Appender):
    """Appends to one stream, and commits.

    `lock` guards what the calls share with the background thread.
    """

    def __init__(
        self,
        path: Path,
        schema: Schema,
        head: Head,
        *,
        number: int,
        lock: Lock,
        clock: Clock = time.time,
        room: MakesRoom | None = None,
        ring_rows: int | None = None,
    ) -> None:
        """Take up a stream where its head left it.

        With bounds, `room` evicts what commits need room for; a commit has no more than `ring_rows`
        rows of an environment, or those of a few chunks.
        """
        self.path = path
        self.number = number
        committer = StreamCommitter(path, schema, head)
        super().__init__(schema, head, clock=clock, ring_rows=ring_rows)
        self._file_lock = lock
        self._committer: StreamCommitter | None = committer
        self.head = committer.head
        self._room = room
        self._committed_changes = 0
        self._base: Head | None = None  # while the stream goes back to it
        self._failure: CommitError | None = None
        self._closing = self._stopped = self._forked = False
        self._prepare_thread()

    @property
    def state(self) -> tuple[int, int]:
        """Changes and commits so far: while it is the same, so is what a reader here shows."""
        return self._changes, self.head.commit

    # ---- room, flush, close

    def evict(self, rows: Mapping[int, int]) -> None:
        """Evict the rows of streams below one; raises `CommitError` if that fails."""
        with self.lock:
            self._check_usable()
            assert self._room is not None, self.path
            self._commit_now()  # of what is in no commit nothing can be evicted
            own = min(rows.get(self.number, 0), *self._rows)  # none that is still to come
            self._room.ask({**rows, self.number: own})
            self._commit_now()

    def flush(self) -> None:
        """Return when all that was appended before is durable; raises `CommitError` if it cannot be."""
        with self.lock:
            self._check_usable(raise_failure=False)
            self._failure = None
            self._commit_now()

    def close(self) -> None:
        """Cut open episodes short, commit, and give the stream back."""
        with self.lock:
            if not self._stopped:
                self._check_usable(raise_failure=False)
                for env in range(self._num_envs):
                    self._cut(env)
                try:
                    self._closing = True
                    self._failure = None
                    self._commit_now()
                    self._stopped = True
                except BaseException:
                    self._closing = False
                    raise
            self._wake.set()
        self._thread.join()
        self.discard()

    def discard(self) -> None:
        """Let go of the stream without a commit."""
        self._closing = self._stopped = True
        if self._thread.is_alive():
            self._wake.set()
            self._thread.join()
        self._file_lock.release()

    def abandon(self) -> None:
        """In a forked child: this writer belongs to the parent."""
        self.lock = threading.RLock()
        self._forked = True

    def _check_usable(self, *, raise_failure: bool = True) -> None:
        if self._forked:
            raise ForkError("this store was opened for writing by the parent process: open it again here")
        if self._closing:
            raise ClosedError("the store is closed")
        if self._failure is not None and raise_failure:
            failure, self._failure = self._failure, None
            raise failure

    def _commit_now(self) -> None:
        """Have the background thread commit what is there now; the caller holds the lock."""
        self._asked += 1
        wanted = self._asked
        self._wake.set()
        while self._served < wanted:
            self._done.wait()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _wake_committer(self, env: int) -> None:
        self._half[env] = self._rows[env] + self._ring.capacity  # once is enough until the next commit
        self._wake.set()

    def start(self) -> None:
        """Begin to commit; every row of `floor` and above that is committed must be refilled."""
        self._thread.start()

    def _prepare_thread(self) -> None:
        self._wake = threading.Event()
        self._done = threading.Condition(self.lock)
        self._asked = self._served = 0
        self._thread = threading.Thread(
            target=_commit_loop,
            args=(weakref.ref(self), self._wake, self._ring),
            name="replaystore-commit",
            daemon=True,
        )

    def __del__(self) -> None:
        if not getattr(self, "_closing", True) and not self._forked:
            warnings.warn(f"{self.path}: the store was not closed", ResourceWarning, stacklevel=2)
            self._stopped = True
            self._wake.set()

    # ---- going back to an older commit

    def go_back(self, base: Head, read: ReadRows) -> list[Moved]:
        """Have the episodes of an older head of this stream again, and go on with its open ones.

        Later rows stay where they are, unused. An open episode is recorded anew at the end of its
        column, from `read(episode, start, stop)`: rows of an episode by field, without those that
        fields other than observations do not have. Returns where the open episodes are now. One
        commit at the end makes it so; until then readers see the stream as it was.
        """
        with self.lock:
            episodes = episodes_of(above(base.open, self.head.floor))
            end = max(self._rows + [self._rows[each.env] + each.length + 1 for each in episodes])
            for episode in episodes:
                self._align(episode, end)
                self._append_again(episode, read)
            for episode in episodes:
                self._wait_for_room(episode.env)
            self._closed, self._log, self._base = [], [], base  # from here on no commit until all is set
            moved = [self._open_again(episode, read) for episode in episodes]
            self._changes += 1
            self._commit_now()
            self._base = None
            return moved

    def _align(self, episode: Episode, end: int) -> None:
        """Leave rows unused where the episode's column would end more than a shard before the longest."""
        behind = end - (self._rows[episode.env] + episode.length + 1)
        if behind >= self._max_lag:
            none = {name: array[:0, 0] for name, array in self._ring.arrays.items()}
            self._append_rows(episode.env, none, behind)

    def _append_again(self, episode: Episode, read: ReadRows) -> None:
        """Append all rows of an episode but the last, in pieces of bounded memory."""
        first, last = episode.first_row, episode.first_row + episode.length
        for start in range(first, last, self._ring.keep * 16):
            stop = min(start + self._ring.keep * 16, last)
            self._append_rows(episode.env, read(episode, start, stop), stop - start)

    def _open_again(self, episode: Episode, read: ReadRows) -> Moved:
        """Append an episode's last row, and go on with it."""
        env, last = episode.env, episode.first_row + episode.length
        row = self._rows[env]
        first = row - episode.length
        self._ring.put(env, row, 1, read(episode, last, last + 1))
        self._rows[env] = row + 1
        described = (episode.seed, episode.start_time, episode.policy, episode.columns)
        opened = self._open[env] = OpenEpisode(first, *described)
        opened.reward = 0.0 if episode.episode_return is None else episode.episode_return
        return Moved(self.number, env, episode.first_row, first, episode.length)

    # ---- on the background thread

    def serve(self) -> bool:
        """Commit once; False when the writer is closed. A failure goes to the next caller."""
        with self.lock:
            asked, final, stopped = self._asked, self._closing, self._stopped
        if stopped:
            return False
        failure = None
        try:
            committer = self._committer or self._recover()
            with self.lock:
                pending = self._pending()
                changes = self._changes
            if self._room is not None and pending.base is None:
                self._adopt(self._room.make(committer, pending), self._committed_changes)
                committer.remove_evicted()
            if changes != self._committed_changes:
                self._adopt(committer.commit(pending, self._ring), changes)
            self._adopt(committer.tidy(final=final), changes)
        except Exception as error:  # whatever it is, it belongs to the caller, not to this thread
            self._committer = None
            failure = commit_error(error, self.path)
        with self.lock:
            self._failure = failure
            self._served = asked
            self._done.notify_all()
        return True

    def _recover(self) -> StreamCommitter:
        """After a failure: take the stream up from its head on disk, as after a restart.

        The head may be that of the commit that failed, if only the sync of its directory did; it
        then counts as written, but the rows are committed once more before anyone is told so.
        """
        head = decode_head(read_head(self.path), self._schema, self.path / HEAD)
        committer = StreamCommitter(self.path, self._schema, head)
        if committer.head.commit > self.head.commit:
            self._adopt(committer.head, changes=-1)
        self._committer = committer
        return committer

    def _pending(self) -> Pending:
        self._settle_all()
        if self._room is not None and self._asked == self._served:  # or else a call is under way
            self._move_on_idle()
        self._half = [row + self._ring.capacity // 2 for row in self._rows]  # those before are seen to now
        return Pending(np.array(self._rows, np.int64), list(self._closed), self._open_now(), self._base)

    def _move_on_idle(self) -> None:
        """Leave rows unused in columns that lag, or they would keep rows from eviction.

        Those are columns without an episode, or with one that has no transition, whose only row moves on.
        """
        none = {name: array[:0, 0] for name, array in self._ring.arrays.items()}
        for env, episode in enumerate(self._open):
            row = self._rows[env]
            behind, free = max(self._rows) - row, self._limit[env] - self._ring.keep - row
            is_idle = episode is None or episode.first_row == row - 1
            if is_idle and behind >= self._max_lag and free > 0:
                self._ring.put(env, row, min(behind, free), none)
                self._rows[env] += min(behind, free)
                if episode is not None:
                    episode.first_row = self._rows[env] - 1
                    self._ring.move(env, row - 1, episode.first_row)
                self._changes += 1

    def _adopt(self, head: Head, changes: int) -> None:
        with self.lock:
            del self._closed[: head.closed - self.head.closed]
            self.head = head
            self._committed_changes = changes
            self._set_room(head)


def _commit_loop(reference: "weakref.ref[StreamWriter]", wake: threading.Event, ring: Ring) -> None:
    """Commit about every second until the writer is closed or forgotten.

    Until there is something to do, get the ring's memory from the kernel: a huge page takes 0.2 to 5 ms,
    for which no step should have to wait.
    """
    for piece in ring.memory():
        if wake.is_set():
            break
        populate(piece)
    del ring
    going = True
    while going:
        wake.wait(COMMIT_SECONDS)
        wake.clear()
        writer = reference()
        going = writer is not None and writer.serve()
        del writer


def commit_error(error: Exception, path: Path) -> CommitError:
    """What a caller is told of an error that kept a commit from being made."""
    code = error.errno if isinstance(error, OSError) else None
    where = getattr(error, "filename", None) or path
    advice = "the rows are still in memory: make room and flush, or go on, and they are written again"
    return CommitError(code, f"the commit failed ({error!r}); {advice}", str(where))
