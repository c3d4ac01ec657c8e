"""Stores that grow while they are sampled, for tests of samplers: tiny rows, numbered actions."""

import numpy as np

from replaystore import Field, ReplayStore, Schema

FIELDS = [
    Field("observation", (), "float32"),
    Field("action", (), "int64"),
    Field("reward", (), "float64"),
    Field("terminated", (), "bool"),
    Field("truncated", (), "bool"),
]


def schema():
    return Schema(FIELDS, columns={"level": "int64"})


class Actors:
    """Steps the environments of a store; their episodes have random lengths up to 12."""

    def __init__(self, store, num_envs=1, seed=0, first=0):
        self.store = store
        self.num_envs = num_envs
        self.count = first
        self._rng = np.random.default_rng(seed)
        self._ended = np.ones(num_envs, bool)

    def step(self, times=1, policy=None, level=0):
        for _ in range(times):
            if self._ended.any():
                mask = self._ended if self.num_envs > 1 else None
                self.store.reset(
                    self._shaped(np.zeros(self.num_envs, np.float32)),
                    mask=mask,
                    policy=policy,
                    columns={"level": level},
                )
            numbers = np.arange(self.count, self.count + self.num_envs)
            self._ended = self._rng.random(self.num_envs) < 1 / 6
            self.store.step(
                self._shaped(numbers),
                self._shaped(numbers.astype(np.float32)),
                self._shaped(numbers / 2),
                self._shaped(self._ended),
                self._shaped(np.zeros(self.num_envs, bool)),
            )
            self.count += self.num_envs

    def _shaped(self, values):
        return values if self.num_envs > 1 else values[0]


def add_stream(path, steps, num_envs=1, seed=0, first=0, **columns):
    """Make a store, or add a stream to it, of so many steps; returns the next number."""
    if path.exists():
        store = ReplayStore.open(path, "a", num_envs=num_envs)
    else:
        store = ReplayStore.create(path, schema(), num_envs)
    with store:
        actors = Actors(store, num_envs, seed, first)
        actors.step(steps, **columns)
    return actors.count


def chi_square(counts, expected):
    """How far counts are from what is expected, in standard deviations of the chi-square statistic."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    assert expected.min() >= 5, expected.min()
    degrees = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees)
