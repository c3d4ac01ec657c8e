"""Which items the batches of a loader hold: draws of a sampler, pass after pass, that can be resumed."""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Sampler as TorchSampler

from replaystore.errors import UsageError
from replaystore.samplers import Sampler
from replaystore.windows import new_seeds


class Numbered(Protocol):
    """What batches need of a dataset: its items as of one commit, which it can be moved to."""

    @property
    def items(self) -> Any:
        """What samplers draw from."""

    @property
    def commit(self) -> int:
        """Tells the commit from others."""

    @property
    def takes_seeds(self) -> bool:
        """Whether an item is read with a seed."""

    def __len__(self) -> int: ...

    def state_dict(self) -> dict[str, Any]:
        """The commit."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Move to a commit."""


class Drawn(NamedTuple):
    """Items to read at once, their weights and seeds, and the commit of the dataset that they count in."""

    numbers: np.ndarray
    weights: np.ndarray | None
    seeds: np.ndarray | None
    commit: int

    def part(self, which: slice) -> "Drawn":
        """Some of the items."""
        weights = None if self.weights is None else self.weights[which]
        seeds = None if self.seeds is None else self.seeds[which]
        return Drawn(self.numbers[which], weights, seeds, self.commit)


def _joined(draws: list[Drawn]) -> Drawn:
    """Several draws of one commit as one; those without weights weigh 1 beside others."""
    numbers, weights, seeds, commits = zip(*draws, strict=True)
    if any(each is not None for each in weights):
        ones = [np.ones(len(each), np.float32) for each in numbers]
        weights = tuple(one if each is None else each for one, each in zip(ones, weights, strict=True))

    def joined(parts: tuple[Any, ...]) -> Any:
        return None if parts[0] is None else np.concatenate(parts)

    return Drawn(joined(numbers), joined(weights), joined(seeds), commits[0])


class Batches(TorchSampler[Any]):
    """The numbers of a pass's batches, small batches several at a time.

    One pass at a time; another thread may ask for the state. Under `torch.distributed` all ranks
    draw the same from the same commit, which they agree on here, and each keeps its own share.
    `together` is how many items a loader wants to be drawn at once, which then says what it has given;
    without it, batches come one at a time and are given when they are drawn. Up to `at_once` items of
    several draws come at once, so that how many are read at once changes nothing of what is drawn: where a
    sampler has an order they are one draw, which of one with pools ends where a pool does.
    """

    def __init__(
        self,
        dataset: Numbered,
        batch_size: int,
        *,
        sampler: Sampler,
        seed: int | None,
        drop_last: bool,
        together: int | None,
        at_once: int = 1,
    ) -> None:
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise UsageError(f"batch_size: expected an int from 1, got {batch_size!r}")
        self.size = batch_size
        self._dataset = dataset
        self._rank, self._ranks = _rank()
        self._sampler = sampler
        self._rng = np.random.default_rng(seed)
        if self._ranks > 1:
            self._agree()
        self._drop_last = drop_last
        self._is_told = together is not None  # what was given
        if together is None or self._sampler.is_adaptive:
            together = at_once = 1
        self._step = max(1, together // batch_size) * batch_size  # items of a draw
        self._most = max(1, at_once // batch_size)  # batches of a pool that are drawn at once
        pool = self._sampler.pool // self._ranks
        self._pool = pool if self._step < min(pool, at_once) else 0  # this rank's items of one, if it matters
        self._draws = max(1, at_once // self._step)
        self._lock = threading.Lock()
        self._pass = _Pass(0, 0, is_over=True)
        self._is_restored = False
        self._pending: deque[Drawn] = deque()  # drawn, and not yet all given

    def _agree(self) -> None:
        """Take over the commit, the sampler's state and the random numbers of rank 0."""
        state: list[Any] = [self._dataset.state_dict(), self._sampler.state_dict()]
        state.append(self._rng.bit_generator.state)
        torch.distributed.broadcast_object_list(state)
        self._dataset.load_state_dict(state[0])
        self._sampler.load_state_dict(state[1])
        self._rng.bit_generator.state = state[2]

    def __len__(self) -> int:
        """Batches of a pass."""
        return self._count(len(self._dataset) // self._ranks)

    def _count(self, items: int) -> int:
        return math.floor(items / self.size) if self._drop_last else math.ceil(items / self.size)

    def __iter__(self) -> Iterator[Drawn]:
        with self._lock:
            if not self._is_restored or self._pass.is_over:
                self._sampler.begin()
                self._pending.clear()
                self._pass = _Pass(self._sampler.left(self._dataset.items) // self._ranks, 0)
            self._is_restored = False
            again = list(self._pending)
        yield from again
        while (drawn := self._draw()) is not None:
            yield drawn
        if not self._is_told:
            self.end()

    def _draw(self) -> Drawn | None:
        """What comes next, of one or several draws."""
        with self._lock:
            draws: list[Drawn] = []
            for items in self._sizes_now():
                try:
                    drawn = self._draw_once(items)
                except UsageError:
                    if not draws:
                        raise
                    break  # after what was drawn before; the next call meets the error again
                if drawn is None:
                    break
                draws.append(drawn)
            if not draws:
                return None
            drawn = draws[0] if len(draws) == 1 else _joined(draws)
            if self._is_told:
                self._pending.append(drawn)
            return drawn

    def _draws_now(self) -> int:
        """How many draws to give at once: few at the ends of a pass, where workers wait for each other."""
        total, done, _ = self._pass
        left = (total - done) // (4 * self._step)
        return max(1, min(self._draws, 1 + done // self._step, left))

    def _sizes_now(self) -> list[int]:
        """The items of each draw to make now: of one for all of them, where the sampler has an order."""
        if self._pool:
            return [self._pool_now()]
        draws = self._draws_now()
        return [draws * self._step] if self._sampler.has_order else [self._step] * draws

    def _pool_now(self) -> int:
        """The items of those batches that end nearest to a pool's end."""
        left = self._pool - self._pass.drawn % self._pool
        batches = round(left / self.size) or round((left + self._pool) / self.size)
        return min(batches, self._most) * self.size

    def _draw_once(self, items: int) -> Drawn | None:
        total, done, _ = self._pass
        n = min(items, total - done)
        if self._drop_last:
            n = n // self.size * self.size
        if n <= 0:
            return None
        draw = self._sampler.draw(self._dataset.items, n * self._ranks, self._rng)
        seeds = new_seeds(len(draw.numbers), self._rng) if self._dataset.takes_seeds else None
        drawn = Drawn(draw.numbers, draw.weights, seeds, self._dataset.commit)
        self._pass = _Pass(total, done + n)
        return drawn.part(slice(self._rank, None, self._ranks))

    def given(self, items: int) -> None:
        """Say that so many items of the oldest draw have been given to the user."""
        with self._lock:
            first = self._pending.popleft()
            if items < len(first.numbers):
                self._pending.appendleft(first.part(slice(items, None)))

    def end(self) -> None:
        """Say that the pass has come to its end: the next one begins anew, also after a restart."""
        with self._lock:
            self._pass = self._pass._replace(is_over=True)

    def state_dict(self) -> dict[str, Any]:
        """Where the pass is: the sampler's state, what was drawn and not yet given, the commit.

        Plain values and tensors, which `torch.load` takes without trusting the file.
        """
        with self._lock:
            state = {
                "sampler": self._sampler.state_dict(),
                "rng": self._rng.bit_generator.state,
                "pass": tuple(self._pass),
                "pending": [tuple(drawn[:3]) for drawn in self._pending],
                "share": (self._rank, self._ranks),
            }
            state |= self._dataset.state_dict()
            kept: dict[str, Any] = _map_state(state, np.ndarray, torch.tensor)
            return kept

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there at the next `iter`, on the items of that commit, however the store grew."""
        expected = {"sampler", "rng", "pass", "pending", "share", "heads"}
        if not isinstance(state, dict) or state.keys() != expected:
            found = sorted(state) if isinstance(state, dict) else state
            raise UsageError(f"loader: expected a state of {sorted(expected)}, got {found}")
        state = _map_state(state, torch.Tensor, torch.Tensor.numpy)
        if tuple(state["share"]) != (self._rank, self._ranks):
            raise UsageError(
                f"state: expected that of rank {self._rank} of {self._ranks}, got {state['share']}"
            )
        with self._lock:
            self._dataset.load_state_dict(state)
            self._sampler.load_state_dict(state["sampler"])
            self._rng.bit_generator.state = state["rng"]
            self._pass = _Pass(*state["pass"])
            commit = self._dataset.commit
            self._pending = deque(Drawn(n, w, s, commit) for n, w, s in state["pending"])
            self._is_restored = True


class _Pass(NamedTuple):
    """Items of a pass of this rank, how many of them were drawn, and whether the user has seen its end."""

    total: int
    drawn: int
    is_over: bool = False


def _rank() -> tuple[int, int]:
    """The number of this process under torch.distributed, and how many there are."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _map_state(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Nested dicts, lists and tuples with each leaf of a kind replaced."""
    if isinstance(value, dict):
        return {name: _map_state(child, kind, function) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_state(child, kind, function) for child in value)
    return function(value) if isinstance(value, kind) else value
