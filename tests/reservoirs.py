"""A reservoir without a disk: streams that only count, to record into it some thousand times."""

import threading
from types import SimpleNamespace

import numpy as np

from replaystore import UsageError, evictions, reservoir


class CountingStream:
    """A `StreamWriter` and its head in one, which remembers the names of episodes and their lengths.

    The observation that an episode begins with is its name.
    """

    def __init__(self, number, num_envs):
        self.number, self.num_envs = number, num_envs
        self.lock = threading.RLock()
        self.lengths = {}
        self.is_evicted = False
        self._names = [None] * num_envs

    @property
    def evicted(self):
        return SimpleNamespace(left=sum(self.lengths.values()))

    @property
    def shortest(self):
        return 0

    def envs(self, mask):
        return list(range(self.num_envs)) if mask is None else np.flatnonzero(mask).tolist()

    def reset(self, observation, *, mask, **_):
        for env in self.envs(mask):
            self._names[env] = int(np.atleast_1d(observation)[env])
            self.lengths[self._names[env]] = 0

    def step(self, values, mask=None):
        for env in self.envs(mask):
            if self._names[env] is None:
                raise UsageError("step before reset")
            self.lengths[self._names[env]] += 1
            if np.atleast_1d(values["terminated"])[env]:
                self._names[env] = None

    def add_episode(self, values, **_):
        self.lengths[values["name"]] = values["length"]

    def check_reset(self, observation, **_):
        pass

    def check_step(self, values):
        pass

    def check_episode(self, values, **_):
        return values["length"]

    def prepare(self, envs):
        pass

    def cut(self, env):
        self._names[env] = None

    def is_open(self, env):
        return self._names[env] is not None

    def close(self):
        self._names = [None] * self.num_envs

    flush = discard = close


class CountingStore:
    """What a reservoir's writer asks of a view, and what it opens streams with."""

    path, schema = reservoir.Path("nowhere"), None

    def __init__(self):
        self.heads, self.writers = {}, {}
        self.evictions = evictions.Evictions()

    def open(self, number, num_envs):
        stream = self.heads.setdefault(number, CountingStream(number, num_envs))
        self.writers[number] = stream
        return stream

    def detach(self, stream):
        del self.writers[stream.number]

    forget = detach

    def refresh(self):
        self.writers = {}

    def move_on(self, heads):
        pass

    def catch_up(self):
        pass

    def kept(self):
        """The names of the episodes that are there."""
        return [
            name
            for stream in self.heads.values()
            if not stream.is_evicted
            for name, length in stream.lengths.items()
            if length
        ]


def without_disk(monkeypatch):
    """Let `CountingStore` stand for what is on disk; returns what begins to record into one."""
    current = []

    def instead(name, function):
        original = getattr(reservoir, name)

        def choose(path, *rest):
            return function(*rest) if CountingStore.path in (path, *path.parents) else original(path, *rest)

        monkeypatch.setattr(reservoir, name, choose)

    instead("_lock", lambda: SimpleNamespace(release=lambda: None))
    instead("read_evictions", lambda heads: current[-1])
    instead("write_evictions", current.append)
    instead("evict_stream", lambda stream, schema: setattr(stream, "is_evicted", True))
    instead("read_head", lambda: b"")

    def begin(store, rng, num_envs=1, capacity=300, stream_length=20):
        current.append(store.evictions)
        return reservoir.ReservoirWriter(
            store, store.open, num_envs=num_envs, capacity=capacity, stream_length=stream_length, rng=rng
        )

    return begin


def deviation(differences):
    """How far the means of columns (runs, columns) are from 0 together: Hotelling's T², as standard deviations.

    It is distributed as chi-square, with a degree of freedom for each column, if there are many runs.
    """
    runs, columns = differences.shape
    means, covariance = differences.mean(axis=0), np.cov(differences, rowvar=False)
    statistic = runs * means @ np.linalg.solve(np.atleast_2d(covariance), means)
    return float((statistic - columns) / np.sqrt(2 * columns))
