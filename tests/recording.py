"""Recordings whose every row can be told from its number, for tests of crashes and damage."""

import math

import numpy as np

from replaystore import Field, ReplayStore, Schema, Transition

SHAPE = (6, 6)


def schema() -> Schema:
    """One packed field of two rows a chunk, and flat ones."""
    return Schema(
        [
            Field("observation", SHAPE, "uint8", codec="blosc-lz4hc-5", chunk_rows=2),
            Field("action", (), "int64"),
            Field("reward", (), "float64"),
            Field("terminated", (), "bool"),
            Field("truncated", (), "bool"),
        ]
    )


def observations(numbers: np.ndarray) -> np.ndarray:
    """The observations from which transitions were taken; no two of them are alike."""
    pixels = numbers.astype(np.uint64)[:, None] * np.uint64(math.prod(SHAPE))
    hashed = (pixels + np.arange(math.prod(SHAPE), dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    return (hashed >> np.uint64(56)).astype(np.uint8).reshape(-1, *SHAPE)


def observation(number: int) -> np.ndarray:
    return observations(np.array([number]))[0]


class Recorder:
    """Appends transitions whose action is their number, in episodes of seven."""

    def __init__(self, store: ReplayStore, *, start: int = 0) -> None:
        self.store = store
        self.count = start
        self._is_open = False

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            number = self.count
            if not self._is_open:
                self.store.reset(observation(number))
            ends = number % 7 == 6
            self.store.step(number, observation(number + 1), number / 2, ends, False)
            self.count, self._is_open = number + 1, not ends

    def bulk(self, length: int) -> None:
        """One long episode, for reaching the end of a file quickly."""
        numbers = np.arange(self.count, self.count + length)
        last = np.arange(length) == length - 1
        self.store.add_episode(
            observation=observations(np.arange(self.count, self.count + length + 1)),
            action=numbers,
            reward=numbers / 2,
            terminated=last,
            truncated=np.zeros(length, bool),
        )
        self.count += length


def check_transitions(store: ReplayStore) -> list[int]:
    """Assert that every transition is as it was recorded; returns their numbers, in order."""
    batch = store.read(np.arange(len(store)), Transition())
    assert np.array_equal(batch.reward, batch.action / 2)
    assert np.array_equal(batch.observation, observations(batch.action))
    assert np.array_equal(batch.next_observation, observations(batch.action + 1))
    return batch.action.tolist()
