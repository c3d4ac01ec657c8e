"""A process of its own for each thing measured, and the jobs that it does there.

`Worker` is the parent's end. Jobs are functions of this module, called by name; what a process has
made (a peer, a store) stays in it between jobs, so that runs of different peers can take turns.
"""

import importlib
import multiprocessing
import os
import time
import traceback
import zlib
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from bench_data import Recording, load

HELD: dict[str, Any] = {}  # what this process keeps between jobs


class WorkerError(Exception):
    """A job failed, or its process died; the message says how."""


class Worker:
    """A process that does jobs, under a memory limit if it is given one."""

    def __init__(self, log: Path, limit: Any = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(log), limit))
        self._process.start()
        theirs.close()

    def do(self, job: str, **arguments: Any) -> Any:
        """Do a job there and return its result."""
        try:
            self._connection.send((job, arguments))
            good, result = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            raise WorkerError(f"the process died with status {self._process.exitcode}") from error
        if not good:
            raise WorkerError(result)
        return result

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(connection: Connection, log: str, limit: Any) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)  # what peers print must not get between the tables
    os.dup2(descriptor, 2)
    if limit is not None:
        limit.join()
    while True:
        try:
            job, arguments = connection.recv()
        except EOFError:
            HELD.clear()
            return
        try:
            answer = (True, globals()[job](**arguments))
        except Exception as error:
            traceback.print_exc()
            answer = (False, f"{type(error).__name__}: {error}")
        connection.send(answer)


# ---- sampling, by any peer


def prepare(peer: str, recording: str, transitions: int, folder: str) -> dict[str, float]:
    """Make a peer of the first transitions of a recording, and warm it."""
    from bench_stores import PEERS

    data = load(Path(recording)).head(transitions)
    made = HELD["peer"] = PEERS[peer](data, Path(folder))
    made.warm()
    _compare_with_recorded(made, data)
    return {"bytes": made.nbytes() / len(made.rows)}


def rate(batch: int, seconds: float) -> dict[str, float]:
    """Transitions a second, after a few batches that do not count: by the clock and by CPU time.

    CPU time is that of all threads of this process, and hardly changes when others use the machine.
    """
    if getattr(HELD["peer"], "uses_torch", False):
        _set_torch_threads(batch)
    return _rate(batch, seconds)


def _set_torch_threads(batch: int) -> None:
    """Torch's threads wait for each other; where cores are few or busy, one can be faster."""
    import torch

    best = HELD.setdefault("torch threads", {})
    if batch not in best:
        rates = {}
        for threads in (HELD.setdefault("all threads", torch.get_num_threads()), 1):
            torch.set_num_threads(threads)
            rates[threads] = _rate(batch, 0.5)["wall"]
        best[batch] = max(rates, key=lambda threads: rates[threads])
    torch.set_num_threads(best[batch])


def _rate(batch: int, seconds: float) -> dict[str, float]:
    peer, done = HELD["peer"], 0
    for _ in range(2):
        peer.sample(batch)
    start, start_cpu = time.perf_counter(), time.process_time()
    while True:
        peer.sample(batch)
        done += batch
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return {"wall": done / elapsed, "cpu": done / (time.process_time() - start_cpu)}


def _compare_with_recorded(peer: Any, data: Recording) -> None:
    """Raise unless what a peer draws is, field by field, what was recorded."""
    items = peer.items(peer.sample(32))
    first, known = data.first(), _by_newest_row(data, items["observation"].dtype)
    for i in range(32):
        newest = items["observation"][i, -1] if data.stack > 1 else items["observation"][i]
        candidates = known.get(zlib.crc32(np.ascontiguousarray(newest)), [])
        if not any(_same(peer, data, first, items, i, row) for row in candidates):
            raise AssertionError(f"item {i} of a batch is no transition that was recorded")


def _by_newest_row(data: Recording, dtype: Any) -> dict[int, list[int]]:
    known: dict[int, list[int]] = {}
    for row in data.transitions().tolist():
        key = zlib.crc32(np.ascontiguousarray(data.observation[row], dtype=dtype))
        known.setdefault(key, []).append(row)
    return known


def _same(peer: Any, data: Recording, first: np.ndarray, items: Any, i: int, row: int) -> bool:
    rows = np.array([row])
    expected = {name: getattr(data, name)[row] for name in ("action", "reward", "terminated")}
    expected["observation"] = data.stacked(rows, first)[0]
    expected["next_observation"] = data.stacked(rows + 1, first)[0]
    is_last = row + 2 >= len(data.begins) or data.begins[row + 2]
    if peer.drops_final_observation and is_last:
        del expected["next_observation"]
    for name, value in expected.items():
        if name in items:
            found = items[name][i]
            if found.shape != value.shape or not (found == value.astype(found.dtype)).all():
                return False
    return True


# ---- a replaystore alone


def imports(path: str | None = None) -> None:
    """Import the library; opening a small store loads what is imported late, such as pyarrow's pandas."""
    importlib.import_module("replaystore")
    if path is not None:
        first_batch(path)


def first_batch(path: str) -> float:
    """Seconds to open a store and draw a batch of 256."""
    from replaystore import ReplayStore

    start = time.perf_counter()
    store = ReplayStore.open(path)
    store.sample(256)
    elapsed = time.perf_counter() - start
    store.close()
    return elapsed


def anonymous_memory(path: str, frame_stack: int, batches: int) -> float:
    """Bytes of anonymous memory that opening a store and sampling from it added, at its highest."""
    from replaystore import ReplayStore, Transition

    before = highest = _anonymous()
    store = ReplayStore.open(path)
    window = Transition(frame_stack=frame_stack)
    for _ in range(batches):
        batch = store.sample(256, window)
        highest = max(highest, _anonymous())
        del batch
    store.close()
    return float(highest - before)


def _anonymous() -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def open_store(path: str, frame_stack: int, warm: bool) -> int:
    """Open a store to sample from; `warm` reads all of it once. Returns its length."""
    from replaystore import ReplayStore, Transition

    store, window = ReplayStore.open(path), Transition(frame_stack=frame_stack)
    length = len(store)
    for start in range(0, length if warm else 0, 4096):
        store.read(np.arange(start, min(start + 4096, length)), window)
    HELD["peer"] = _Opened(store, window)
    return length


class _Opened:
    def __init__(self, store: Any, window: Any) -> None:
        self._store, self._window = store, window
        self._rng = np.random.default_rng(0)

    def sample(self, n: int) -> Any:
        return self._store.sample(n, self._window, self._rng)


def hold_arrays(transitions: int) -> None:
    """Make arrays in memory of HalfCheetah's shapes, to gather the rows of transitions from."""
    HELD["peer"] = _Arrays(transitions)


class _Arrays:
    def __init__(self, rows: int) -> None:
        shapes = [((17,), "f8"), ((6,), "f4"), ((), "f8"), ((), "?"), ((), "?")]
        self._columns = [np.ones((rows + 1, *shape), dtype) for shape, dtype in shapes]
        self._rng = np.random.default_rng(0)

    def sample(self, n: int) -> Any:
        observation, *others = self._columns
        rows = self._rng.integers(len(observation) - 1, size=n)
        both = observation.take(rows[:, None] + np.arange(2), axis=0, mode="clip")
        return [both, *(column.take(rows, axis=0, mode="clip") for column in others)]


def bytes_read() -> int:
    """Bytes that this process had read from disk so far."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


# ---- writing


def step_rate(recording: str, path: str, seconds: float) -> dict[str, float]:
    """Rows a second by `store.step` from a loop over recorded rows, until the last flush returned."""
    from bench_data import schema_of

    from replaystore import ReplayStore

    data, done = load(Path(recording)), 0
    rows = min(len(data.begins), 20_000)
    columns = [
        np.array(getattr(data, name)[:rows]) for name in ("action", "reward", "terminated", "truncated")
    ]
    action, reward, terminated, truncated = ([*column] for column in columns)
    observation, begins = [*np.array(data.observation[:rows])], data.begins[:rows].tolist()
    with ReplayStore.create(path, schema_of(data)) as store:
        start = time.perf_counter()
        step, reset = store.step, store.reset
        while time.perf_counter() - start < seconds:
            reset(observation[0])
            for row in range(rows - 1):
                if begins[row + 1]:
                    reset(observation[row + 1])
                else:
                    step(action[row], observation[row + 1], reward[row], terminated[row], truncated[row])
            done += rows
        store.flush()
        elapsed = time.perf_counter() - start
    return {"rate": done / elapsed, "rows": done, "seconds": elapsed}


def add_rate(peer: str, recording: str, seconds: float) -> float:
    """Transitions a second by the `add` of another buffer, one at a time."""
    data = load(Path(recording)).head(10_000)
    rows = data.transitions()
    parts = [data.observation[rows], data.observation[rows + 1], data.action[rows], data.reward[rows]]
    lists = [[*np.array(part)] for part in [*parts, data.terminated[rows]]]
    add, done = ADDERS[peer](len(rows)), 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for values in zip(*lists, strict=True):
            add(*values)
        done += len(rows)
    return done / (time.perf_counter() - start)


def _sb3_add(capacity: int) -> Any:
    from gymnasium import spaces
    from stable_baselines3.common.buffers import ReplayBuffer

    low, high = spaces.Box(-np.inf, np.inf, (17,), np.float64), spaces.Box(-1, 1, (6,), np.float32)
    buffer = ReplayBuffer(capacity, low, high, device="cpu")
    infos: list[dict[str, Any]] = [{}]
    return lambda o, after, a, r, d: buffer.add(
        o[None], after[None], a[None], np.array([r]), np.array([d]), infos
    )


def _cpprb_add(capacity: int) -> Any:
    from cpprb import ReplayBuffer

    vector = {"shape": 17, "dtype": np.float64}
    fields = {"obs": vector, "next_obs": vector, "act": {"shape": 6}, "rew": {}, "done": {}}
    buffer = ReplayBuffer(capacity, fields)
    return lambda o, after, a, r, d: buffer.add(obs=o, next_obs=after, act=a, rew=r, done=d)


ADDERS = {"SB3 (RAM)": _sb3_add, "cpprb (RAM)": _cpprb_add}
