"""Recorders that are killed with SIGKILL, and what must be left of their rows.

A recorder is a process that tells its parent, through a pipe, which rows it is about to append and
for which of them `flush` has returned. After the kill the parent opens the store: every
acknowledged row must be there once, unaltered and in order, and none that was not sent.
"""

import contextlib
import multiprocessing
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self
from unittest import mock

import numpy as np
import recording
from recording import observations

from replaystore import ReplayStore, Schema
from replaystore.arena import stream_path
from replaystore.episodes import part_path
from replaystore.files import chunk_path
from replaystore.head import HEAD, Head, decode_head, read_head
from replaystore.verify import stream_numbers, verify

SERVER = multiprocessing.get_context("forkserver")  # it has imported the package, and opens no store
PATIENCE = 60  # seconds for a recorder to say something


class Plan(NamedTuple):
    """What a recorder does, and within how many seconds after which word of it the kill comes."""

    word: str
    span: float
    rows: int = 2000
    most: int = 10  # rows between two pauses
    flushes: float = 1.0  # the share of such pauses; the rest is committed in the background
    commit_seconds: float = 1.0
    num_envs: int = 1
    writers: int = 1


PLANS = {
    "opening": Plan("begun", 0.03),
    "first commit": Plan("sent", 0.03),
    "flush": Plan("opened", 0.15),
    "background commit": Plan("opened", 0.1, flushes=0.1, commit_seconds=0.002),
    "repack and seal": Plan("opened", 0.15, most=100),
    "closing": Plan("closing", 0.05, rows=30),
    "one of two writers": Plan("opened", 0.05, rows=30, writers=2),
}


# ---- in the recorder


def record(path: Path, plan: Plan, recorder: int, say: Connection) -> None:
    """Append rows until killed, or all are there, and tell what is sent and what is safe."""
    multiprocessing.set_start_method("fork", force=True)  # a kill would leave numcodecs' semaphore
    say.send(("begun", 0))
    with (
        mock.patch("replaystore.writer.COMMIT_SECONDS", plan.commit_seconds),
        mock.patch("replaystore.commit.PART_EPISODES", 64),
    ):
        try:
            start = time.perf_counter()
            store = ReplayStore.open(path, "a", num_envs=plan.num_envs)
            say.send(("opened", time.perf_counter() - start))
            append(store, plan, recorder, say)
        except Exception as error:
            say.send(("error", repr(error)))


def append(store: ReplayStore, plan: Plan, recorder: int, say: Connection) -> None:
    rng, count = random.Random(recorder), 0
    while count < plan.rows:
        stop = min(count + rng.randint(1, plan.most), plan.rows)
        say.send(("sent", stop))
        for number in range(count, stop):
            step(store, recorder, plan.num_envs, number)
        count = stop
        if rng.random() < plan.flushes:
            store.flush()
            say.send(("safe", count))
        else:
            time.sleep(0.001)
    say.send(("closing", 0))
    store.close()
    say.send(("safe", count))


def step(store: ReplayStore, recorder: int, num_envs: int, count: int) -> None:
    """Step all environments; the episodes are of seven rows, and begin at another time in each."""
    env = np.arange(num_envs)
    action, begins = actions(recorder, env, count), (count + env) % 7 == 0
    every = slice(None) if num_envs > 1 else 0
    if begins.any() or count == 0:
        mask = begins | (count == 0)
        store.reset(observations(action)[every], mask=mask, columns={"recorder": recorder})
    then, ends = observations(action + 1)[every], ((count + env) % 7 == 6)[every]
    store.step(action[every], then, (action / 2)[every], ends, np.zeros(num_envs, bool)[every])


def actions(recorder: int, env: int | np.ndarray, count: int | np.ndarray) -> np.ndarray:
    """The actions are numbers from which all else that is recorded follows."""
    return np.asarray((recorder << 24) + (env << 20) + count)


# ---- in its parent


class Child:
    """A recorder in a process of its own, and what it has told."""

    def __init__(self, path: Path, plan: Plan, number: int) -> None:
        self.number, self.plan, self.was_killed = number, plan, False
        self.heard: dict[str, Any] = {"sent": 0, "safe": 0, "opened": 0.0}
        self._said: set[str] = set()
        self._pipe, say = SERVER.Pipe(duplex=False)
        self._start(path, say)
        say.close()

    def _start(self, path: Path, say: Connection) -> None:
        arguments = (path, self.plan, self.number, say)
        self._process = SERVER.Process(target=record, args=arguments, daemon=True)
        self._process.start()

    def listen(self, word: str = "") -> None:
        """Take in what it tells, until it says a word or is dead."""
        with contextlib.suppress(EOFError):
            while not word or word not in self._said:
                if not self._pipe.poll(PATIENCE):
                    raise TimeoutError(f"recorder {self.number} has said nothing for {PATIENCE} s")
                said, value = self._pipe.recv()
                self._said.add(said)
                self.heard[said] = value

    def kill(self, after: float) -> None:
        self.listen(self.plan.word)
        time.sleep(after)
        self._process.kill()
        self.was_killed = True

    def end(self) -> None:
        self.listen()
        self._process.join()
        self._pipe.close()


@dataclass
class Tally:
    """What came of some kills."""

    rounds: int = 0
    acknowledged: int = 0
    lost: int = 0
    failed: int = 0
    leftovers: int = 0  # the most at any time
    slowest: float = 0.0  # seconds to open the store, to read or to append

    def add(self, other: "Tally") -> None:
        for name in ("rounds", "acknowledged", "lost", "failed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("leftovers", "slowest"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))


class Ledger:
    """A store, and how many rows each recorder left there; they must be found again every time."""

    def __init__(self, path: Path, rows: Mapping[int, int]) -> None:
        self.path, self.rows = path, dict(rows)

    @classmethod
    def create(cls, path: Path) -> Self:
        """Begin with an empty store of small shards, of which many are filled, repacked and sealed."""
        small = Schema(recording.schema().fields, {"recorder": "int64"}, shard_chunks=96)
        ReplayStore.create(path, small).close()
        return cls(path, {})

    def settle(self, children: Sequence[Child], *, deep: bool) -> Tally:
        """Open the store when its recorders have ended, and hold it against what they told."""
        for child in children:
            child.end()
        tally = Tally(rounds=1, slowest=max([child.heard["opened"] for child in children], default=0.0))
        try:
            start = time.perf_counter()
            with warnings.catch_warnings(action="error"), ReplayStore.open(self.path) as store:
                tally.slowest = max(tally.slowest, time.perf_counter() - start)
                self._check(store, children, tally)
                if deep:
                    self._check_all(store)
                tally.leftovers = len(leftovers(self.path, store.schema))
        except Exception as error:
            print(f"{self.path}: {error!r}")
            tally.failed = 1
        return tally

    def _check(self, store: ReplayStore, children: Sequence[Child], tally: Tally) -> None:
        store.check()
        for child in children:
            assert "error" not in child.heard, child.heard["error"]
            num_envs, sent, safe = child.plan.num_envs, child.heard["sent"], child.heard["safe"]
            count = count_rows(store, child.number, num_envs)
            assert count <= sent, f"found {count} rows, of {sent} that were sent"
            assert child.was_killed or safe == child.plan.rows, "the other writer did not go on"
            tally.acknowledged += safe * num_envs
            tally.lost += max(0, safe - count) * num_envs
            self.rows |= {child.number: count * num_envs} if count else {}
        recorder, length = (store.episodes[name].to_numpy() for name in ("recorder", "length"))
        found = np.bincount(recorder, length)
        assert {i: found[i] for i in np.flatnonzero(found)} == self.rows, "rows of older rounds changed"

    def _check_all(self, store: ReplayStore) -> None:
        """Read every byte and every row: each is there once; in a column they are in order of recording.

        Of two recorders of one round either may have had a stream first.
        """
        found = list(verify(self.path))
        assert not found, f"verify: {found[0]}"
        recording.check_transitions(store)
        batch = store.read(np.arange(len(store)))
        order = np.argsort(batch.ids)
        action, stream = batch.action[order], batch.ids[order] >> 40
        assert len(np.unique(action)) == len(action), "a row is there twice"
        column = stream << 4 | action >> 20 & 15
        for number in np.unique(column):
            mine = action[column == number]
            goes_on = np.diff(mine >> 24) == 0
            in_order = (np.diff(mine)[goes_on] > 0).all() and (np.diff(mine >> 25) >= 0).all()
            assert in_order, f"column {number} is out of order"


def count_rows(store: ReplayStore, recorder: int, num_envs: int) -> int:
    """How many rows of a recorder each environment has, every one compared with what was sent."""
    names = ("recorder", "env", "first_row")
    found, env, first = (store.episodes[name].to_numpy() for name in names)
    counts = set()
    for column in range(num_envs):
        mine = np.flatnonzero((found == recorder) & (env == column))
        episodes = [store.episode(i) for i in mine[np.argsort(first[mine])]]
        numbers = np.concatenate([np.zeros(0, np.int64), *[each["action"] for each in episodes]])
        assert np.array_equal(numbers, actions(recorder, column, np.arange(len(numbers)))), numbers
        for each in episodes:
            action = each["action"]
            assert np.array_equal(each["observation"], observations(np.append(action, action[-1] + 1)))
            assert np.array_equal(each["reward"], action / 2)
            assert np.array_equal(each["terminated"], ((action & 0xFFFFF) + column) % 7 == 6)
        counts.add(len(numbers))
    assert len(counts) == 1, f"half a commit: {counts} rows"
    return counts.pop()


def leftovers(path: Path, schema: Schema) -> set[Path]:
    """The files that no head names: what was cut short, and is not yet swept or written again."""
    named = set()
    for number in stream_numbers(path):
        stream = stream_path(path, number)
        named |= set(_named(stream, decode_head(read_head(stream), schema, stream), schema))
        named |= {stream / HEAD, stream / "lock", *(stream / "heads").glob("*.arrow")}
    return {file for file in path.rglob("*") if file.is_file() and file.name != "zarr.json"} - named


def _named(stream: Path, head: Head, schema: Schema) -> Iterator[Path]:
    for field in schema.fields:
        for number in head.files[field.name]:
            yield chunk_path(stream / field.name, number, 2 + len(field.shape))
    for state in head.parts:
        yield part_path(stream, state.number)


def kill_again_and_again(
    folder: Path, rounds: int, rng: random.Random, *, deep_every: int = 25
) -> dict[str, Tally]:
    """Kill recorders on one store; one that fails is kept, and a new one takes its place."""
    SERVER.set_forkserver_preload(["replaystore.verify"])
    tallies = {name: Tally() for name in [*PLANS, "all closed at the end"]}
    ledger, name, num_envs = Ledger.create(folder / "store"), "", 1
    for i in range(rounds):
        if name == "closing":  # go on at once from the files that it left half repacked
            name = "first commit"
        else:
            name, num_envs = rng.choice(list(PLANS)), rng.choice([1, 1, 3])
        plan = PLANS[name]._replace(num_envs=num_envs)
        children = [Child(ledger.path, plan, 2 * i + k) for k in range(plan.writers)]
        children[0].kill(rng.uniform(0, plan.span))
        tally = ledger.settle(children, deep=i % deep_every == 0)
        tallies[name].add(tally)
        if tally.lost or tally.failed:
            ledger = Ledger.create(folder / f"store-{i}")
    with contextlib.ExitStack() as stack:
        for width in (1, 1, 3, 3):  # every stream is taken up once more, and swept
            stack.enter_context(ReplayStore.open(ledger.path, "a", num_envs=width))
    tallies["all closed at the end"].add(ledger.settle([], deep=True))
    return tallies
