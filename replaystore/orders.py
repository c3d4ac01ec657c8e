"""Orders in which an epoch visits its items: random, from a seed, without a permutation in memory."""

from functools import cached_property

import numpy as np

from replaystore.compiled import finding

SMALL = 1 << 16  # items of which a permutation is kept
ROUNDS = 3  # of two steps each: four steps would do (Luby and Rackoff 1988)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Order:
    """A random order of the numbers below `length`: a bijection of positions to numbers.

    A permutation if that is small, or else a Feistel network (Luby and Rackoff 1988) over the next
    power of two, walked until it comes out below `length` (Black and Rogaway 2002).
    """

    def __init__(self, length: int, seed: tuple[int, ...]) -> None:
        self.length = length
        self._seed = seed
        bits = self._bits = max(2, (length - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)

    @cached_property
    def _permutation(self) -> np.ndarray:
        return np.random.default_rng(self._seed).permutation(self.length)

    @cached_property
    def _keys(self) -> np.ndarray:
        return np.random.SeedSequence(self._seed).generate_state(2 * ROUNDS, np.uint64)

    def take(self, start: int, stop: int) -> np.ndarray:
        """The numbers at positions `start` to `stop`, int64."""
        if self.length <= SMALL:
            return self._permutation[start:stop]
        if finding is not None and start < stop:
            taken = np.empty(stop - start, np.int64)
            finding.take_order(start, self.length, self._bits, self._keys, taken)
            return taken
        numbers = self._scramble(np.arange(start, stop, dtype=np.uint64))
        while len(outside := np.flatnonzero(numbers >= self.length)):
            numbers[outside] = self._scramble(numbers[outside])
        return numbers.astype(np.int64)

    def _scramble(self, numbers: np.ndarray) -> np.ndarray:
        low, high = numbers & self._low_mask, numbers >> self._low_bits
        for first, second in self._keys.reshape(-1, 2):
            high ^= mixed(low ^ first) & self._high_mask
            low ^= mixed(high ^ second) & self._low_mask
        scrambled: np.ndarray = (high << self._low_bits) | low
        return scrambled


class InTurn:
    """The numbers in their own order."""

    def __init__(self, length: int, seed: tuple[int, ...]) -> None:
        self.length = length

    def take(self, start: int, stop: int) -> np.ndarray:
        """The numbers at positions `start` to `stop`, int64."""
        return np.arange(start, stop)


class PooledOrder:
    """Runs of consecutive numbers in random order, shuffled among each other a pool at a time.

    The numbers are turned by a random amount first, so that runs begin elsewhere in every epoch; what
    does not fill a run belongs to the last pool.
    """

    def __init__(self, length: int, seed: tuple[int, ...], *, pool: int, run: int) -> None:
        assert pool % run == 0, (pool, run)
        self.length = length
        self._seed = seed
        self._pool = pool
        self._run = run
        self._turn = int(np.random.default_rng(seed).integers(length))
        self._whole = length // run
        self._runs = Order(self._whole, seed)
        self._held = (-1, np.empty(0, np.int64))  # a pool's number, and its numbers

    def take(self, start: int, stop: int) -> np.ndarray:
        """The numbers at positions `start` to `stop`, int64."""
        parts = [np.empty(0, np.int64)]
        while start < stop:
            number = min(start // self._pool, self._last)
            first = number * self._pool
            parts.append(self._pooled(number)[start - first : stop - first])
            start += len(parts[-1])
        return np.concatenate(parts)

    @property
    def _last(self) -> int:
        """The last pool, which takes the rest as well if that alone would be less than a run."""
        return max(0, -(-(self._whole * self._run) // self._pool) - 1)

    def _pooled(self, number: int) -> np.ndarray:
        if self._held[0] != number:
            size = self._pool // self._run
            runs = self._runs.take(number * size, min((number + 1) * size, self._whole))
            numbers = (runs[:, None] * self._run + np.arange(self._run)).reshape(-1)
            if number == self._last:
                numbers = np.append(numbers, np.arange(self._whole * self._run, self.length))
            numbers = np.random.default_rng((*self._seed, number)).permutation(numbers)
            self._held = number, (numbers + self._turn) % self.length
        return self._held[1]


def mixed(words: np.ndarray) -> np.ndarray:
    """Mix 64-bit words (the finalizer of splitmix64, Steele, Lea and Flood 2014)."""
    words = words + GOLDEN
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = words ^ (words >> np.uint64(31))
    return mixed
