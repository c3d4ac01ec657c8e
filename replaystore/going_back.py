"""Opens a store where a checkpoint left it.

Committed rows never change on disk, and the index says which of them exist. So nothing is cut off:
each stream gets, by one commit, the episodes that it had at the checkpoint; its later rows stay,
unused. Episodes that were open then are recorded anew behind them, so that they can go on.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from replaystore.arena import stream_path
from replaystore.checkpoints import Checkpoint, check_fits, decoded_heads
from replaystore.episodes import Episode, integers
from replaystore.errors import UsageError, WriterBusy
from replaystore.files import Lock, list_directory
from replaystore.head import Head, empty_head
from replaystore.index import Places
from replaystore.view import View
from replaystore.writer import Moved, ReadRows, StreamWriter


class Target(NamedTuple):
    """What streams go back to: their heads, and the order of all closed episodes, (episodes,) streams."""

    heads: dict[int, Head]
    order: np.ndarray


def lock_streams(path: Path) -> dict[int, Lock]:
    """The locks of all streams of a store; `WriterBusy` if somebody writes one."""
    locks: dict[int, Lock] = {}
    try:
        while new := [number for number in _numbers(path) if number not in locks]:
            for number in new:
                lock = Lock.acquire(stream_path(path, number) / "lock")
                if lock is None:
                    raise WriterBusy(
                        f"{stream_path(path, number)}: expected nobody to write the store while it goes back to"
                        " a checkpoint, found a writer: close it first"
                    )
                locks[number] = lock
    except BaseException:
        for lock in locks.values():
            lock.release()
        raise
    return locks


def _numbers(path: Path) -> list[int]:
    return [int(name) for name in list_directory(path / "streams") if len(name) == 6 and name.isdigit()]


def target_of(view: View, checkpoint: Checkpoint, num_envs: int | None) -> Target:
    """What each stream that a view shows goes back to; raises before anything is changed.

    Episodes that other writers had open at the checkpoint end there, cut short.
    """
    old = decoded_heads(view.path, checkpoint, view.schema)
    check_fits(view.path, old, dict(view.heads), view.schema)
    writer = checkpoint.writer
    if num_envs not in (None, old[writer].num_envs):
        raise UsageError(f"num_envs: expected {old[writer].num_envs}, as at the checkpoint, got {num_envs!r}")
    order = np.repeat(checkpoint.order.stream, checkpoint.order.episodes)
    heads = {}
    for stream, newest in view.heads.items():
        head = old.get(stream, empty_head(view.schema, newest.num_envs))
        heads[stream] = head if stream == writer else _ended(head)
        order = np.append(order, np.full(len(heads[stream].episodes) - len(head.episodes), stream))
    return Target(heads, order)


def _ended(head: Head) -> Head:
    """A head whose open episodes have ended, those without transitions as if they had never begun."""
    open_ = head.open.filter(pa.array(integers(head.open, "length") > 0))
    episodes = pa.concat_tables([head.episodes, open_])
    return replace(head, episodes=episodes, closed=head.closed + len(open_), open=head.open.slice(0, 0))


def is_there(newest: Head, target: Head) -> bool:
    """Whether a stream has just the episodes that it is to go back to, and none is to go on."""
    is_over = not len(newest.open) and not len(target.open)
    parts = tuple(part for part in target.parts if part.number >= newest.first_part)
    return is_over and newest.parts == parts and newest.episodes.equals(target.episodes)


def go_back(
    view: View, target: Target, writer: StreamWriter, open_other: Callable[[int], StreamWriter]
) -> list[Moved]:
    """Take all streams back; returns the open episodes of the writer's, which can go on.

    `open_other` begins to write another stream, whose lock the caller holds. The writer's own goes
    first, each stream by one commit: after a crash between two of them the next call goes on.
    """
    newest = dict(view.heads)
    moved = []
    if not is_there(newest[writer.number], target.heads[writer.number]):
        moved = writer.go_back(target.heads[writer.number], rows_of(view, writer.number))
    for stream, head in target.heads.items():
        if stream != writer.number and not is_there(newest[stream], head):
            other = open_other(stream)
            try:
                other.go_back(head, rows_of(view, stream))
                other.close()
            except BaseException:
                other.discard()
                raise
    return moved


def rows_of(view: View, stream: int) -> ReadRows:
    """Reads rows of a stream's episodes from what a view shows."""

    def read(episode: Episode, start: int, stop: int) -> dict[str, np.ndarray]:
        env, one = np.array([episode.env]), np.array([1])
        first, last = one * episode.first_row, one * (episode.first_row + episode.length)
        places = Places(one * stream, env, one * start, first, last)
        observed, acted = np.arange(start, stop)[None], np.arange(start, min(stop, int(last[0])))[None]
        wanted = [(observed, view.schema.observed), (acted, view.schema.acted)]
        return {name: array[0] for name, array in view.arrays(places, wanted).items()}

    return read
