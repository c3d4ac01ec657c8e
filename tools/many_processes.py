"""Eight writers and four readers on one store, while a writer is killed and another one halted.

Readers open, refresh, sample and read episodes in a loop: lengths must never go down, and every row
must be what its writer recorded. Afterwards each row that a writer's `flush` acknowledged must be
there once, in that writer's order. The other writers must go on while one is halted.
"""

import argparse
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from replaystore import Batch, ReplayStore, Schema, Transition
from replaystore.verify import verify

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import recording
from recording import observations

SERVER = multiprocessing.get_context("forkserver")
WINDOWS = (Transition(), Transition(n_step=3, gamma=0.5), Transition(frame_stack=3))
WRITER_BITS = 32  # a row's number is its writer's, and below these bits its place in that one's order


# ---- writers


def write(path: Path, writer: int, until: float, say: Connection) -> None:
    """Record about 500 rows a second, and tell how many are sent and how many are safe."""
    rng, first = np.random.default_rng(writer), writer << WRITER_BITS
    with ReplayStore.open(path, "a") as store:
        recorder = recording.Recorder(store, start=first)
        while time.monotonic() < until:
            times = int(rng.integers(1, 50))
            say.send(("sent", recorder.count - first + times))
            recorder.step(times)
            if rng.random() < 0.5:  # else it is committed in the background
                store.flush()
                say.send(("safe", recorder.count - first))
            time.sleep(times / 500)
    say.send(("safe", recorder.count - first))


# ---- readers


def read(path: Path, reader: int, until: float, say: Connection) -> None:
    """Do everything that a reader can, and raise if anything is other than it was recorded."""
    rng, before, reads = np.random.default_rng(reader), np.zeros(0, np.int64), 0
    store = ReplayStore.open(path)
    while time.monotonic() < until:
        if rng.random() < 0.2:
            store.close()
            store = ReplayStore.open(path)
        else:
            store.refresh()
        now = lengths(store)
        assert len(now) >= len(before), "a stream is gone"
        assert (now[: len(before)] >= before).all(), f"lengths went down from {before} to {now}"
        before = now
        if len(store):
            window = WINDOWS[rng.integers(len(WINDOWS))]
            check_batch(store.sample(int(rng.integers(1, 300)), window, rng), window)
            newest = np.arange(max(0, len(store) - 500), len(store))
            check_batch(store.read(newest), Transition())
            for number in rng.integers(store.num_episodes, size=3):
                check_episode(store.episode(int(number)))
        if rng.random() < 0.05:
            store.check()
        reads += 1
        say.send(("reads", reads))
    store.close()


def lengths(store: ReplayStore) -> np.ndarray:
    """Transitions by stream."""
    stream, length = (store.episodes[name].to_numpy() for name in ("stream", "length"))
    return np.bincount(stream, length).astype(np.int64)


def check_batch(batch: Batch, window: Transition) -> None:
    """Every value follows from the number in `action`."""
    number, stack = batch.action, window.frame_stack
    newest = batch.observation[:, -1] if stack > 1 else batch.observation
    assert np.array_equal(newest, observations(number))
    if window.n_step == 1:
        following = batch.next_observation[:, -1] if stack > 1 else batch.next_observation
        assert np.array_equal(following, observations(number + 1))
        assert np.array_equal(batch.reward, number / 2)
        assert np.array_equal(batch.terminated, number % 7 == 6)
        assert np.array_equal(batch.discount == 0, batch.terminated)
    assert not batch.truncated.any()


def check_episode(arrays: dict[str, Any]) -> None:
    number = arrays["action"]
    assert (np.diff(number) == 1).all()
    assert len(number) <= 7
    assert np.array_equal(arrays["observation"], observations(np.append(number, number[-1] + 1)))
    assert np.array_equal(arrays["reward"], number / 2)
    assert np.array_equal(arrays["terminated"], number % 7 == 6)


# ---- their parent


class Worker:
    """A process, and the last number it told for each word."""

    def __init__(self, work: Callable[..., None], *arguments: object) -> None:
        self.told: dict[str, int] = {"sent": 0, "safe": 0, "reads": 0}
        self.error = ""
        self.longest = 0.0  # seconds between two acknowledgements
        self._last = time.monotonic()
        self.pipe, say = SERVER.Pipe(duplex=False)
        self.process = SERVER.Process(target=run, args=(work, *arguments, say), daemon=True)
        self.process.start()
        say.close()

    def listen(self) -> bool:
        """Take in one thing; False at its end."""
        try:
            word, value = self.pipe.recv()
        except EOFError:
            return False
        if word == "error":
            self.error = value
        else:
            self.told[word] = value
        if word in ("safe", "reads"):
            self.longest = max(self.longest, time.monotonic() - self._last)
            self._last = time.monotonic()
        return True


def run(work: Callable[..., None], *arguments: Any) -> None:
    multiprocessing.set_start_method("fork", force=True)  # a kill would leave numcodecs' semaphore
    try:
        work(*arguments)
    except BaseException:
        arguments[-1].send(("error", traceback.format_exc()))


def watch(workers: list[Worker], seconds: float) -> None:
    """Take in what they tell for some time, or, if they all end before, until then."""
    until, open_ = time.monotonic() + seconds, {each.pipe: each for each in workers if not each.pipe.closed}
    while open_ and (left := until - time.monotonic()) > 0:
        for pipe in multiprocessing.connection.wait(list(open_), left):
            if not open_[pipe].listen():
                pipe.close()
                del open_[pipe]


def check_writer(action: np.ndarray, ids: np.ndarray, number: int, writer: Worker) -> int:
    """Assert that a writer's rows are there once, in order; returns how many."""
    mine = action >> WRITER_BITS == number
    found = action[mine][np.argsort(ids[mine])] - (number << WRITER_BITS)
    assert np.array_equal(found, np.arange(len(found))), f"writer {number}: not each row once, in order"
    assert len(np.unique(ids[mine] >> 40)) == 1, f"writer {number}: more than one stream"
    assert writer.told["safe"] <= len(found) <= writer.told["sent"], (number, len(found), writer.told)
    return len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--readers", type=int, default=4)
    options = parser.parse_args()
    SERVER.set_forkserver_preload(["replaystore.verify"])
    with tempfile.TemporaryDirectory(prefix="many-") as folder:
        path = Path(folder) / "store"
        ReplayStore.create(path, Schema(recording.schema().fields, shard_chunks=256)).close()
        until = time.monotonic() + options.seconds
        writers = [Worker(write, path, i, until) for i in range(options.writers)]
        readers = [Worker(read, path, i, until) for i in range(options.readers)]
        part = options.seconds / 6
        watch(writers + readers, 2 * part)
        writers[0].process.kill()
        watch(writers + readers, part)
        os.kill(writers[1].process.pid, signal.SIGSTOP)
        watch(writers + readers, part)
        os.kill(writers[1].process.pid, signal.SIGCONT)
        watch(writers + readers, 2 * part + 60)
        errors = report(path, writers, readers, halted=part)
    print("errors:", len(errors))
    for error in errors:
        print(error)
    sys.exit(bool(errors))


def report(path: Path, writers: list[Worker], readers: list[Worker], *, halted: float) -> list[str]:
    """Print what was done; returns what went wrong."""
    errors = [worker.error for worker in writers + readers if worker.error]
    late = [worker for worker in writers + readers if not worker.pipe.closed]
    errors += [f"{len(late)} processes did not end"] if late else []
    errors += [f"verify: {finding}" for finding in verify(path)]
    with ReplayStore.open(path) as store:
        store.check()
        recording.check_transitions(store)
        batch = store.read(np.arange(len(store)))
    rows = 0
    for number, writer in enumerate(writers):
        try:
            rows += check_writer(batch.action, batch.ids, number, writer)
        except AssertionError as error:
            errors.append(str(error))
    errors += [] if rows == len(batch.action) else [f"{len(batch.action) - rows} rows are nobody's"]
    safe = sum(writer.told["safe"] for writer in writers)
    pause = max(writer.longest for writer in writers[2:])
    errors += [f"a writer waited {pause:.1f} s while another was halted"] if pause > halted else []
    print(f"{len(writers)} writers: {rows:,} rows, {safe:,} of them acknowledged when last told")
    print(
        f"one killed, one halted for {halted:.0f} s; of the others none was without a commit for {pause:.1f} s"
    )
    reads = sum(reader.told["reads"] for reader in readers)
    slowest = max(reader.longest for reader in readers)
    print(f"{len(readers)} readers: {reads:,} rounds of reading, the longest {slowest:.1f} s")
    return errors


if __name__ == "__main__":
    main()
