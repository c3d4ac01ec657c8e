"""Memory for batches, used again once the last array over it is gone.

Fresh memory is dear: the kernel clears every page of it and maps it, which for a batch of frames
takes longer than gathering them.
"""

import math
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

Allocate = Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray]

SMALLEST = 1 << 22  # bytes; below, the C library uses again what left the caches last, be it of another user
LARGEST = 1 << 27
KEPT = 4  # pieces of memory without a user


class Recycler:
    """Allocates arrays; any thread may."""

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=KEPT)

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """An array of any content, as `np.empty` gives one."""
        nbytes = math.prod(shape) * dtype.itemsize
        if not SMALLEST <= nbytes <= LARGEST:
            return np.empty(shape, dtype)
        memory = self._take(nbytes)
        held = np.frombuffer(memory.data, np.uint8)  # what every view of it holds on to
        weakref.finalize(held, self._free.append, memory).atexit = False
        return held.view(dtype).reshape(shape)

    def _take(self, nbytes: int) -> np.ndarray:
        """Memory of this size, what was used last; that of other sizes leaves as newer comes back."""
        for _ in range(len(self._free)):
            try:
                memory = self._free.pop()
            except IndexError:  # another thread was faster
                break
            if len(memory) == nbytes:
                return memory
            self._free.appendleft(memory)
        return np.empty(nbytes, np.uint8)
