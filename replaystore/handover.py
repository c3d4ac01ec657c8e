"""How a worker process hands its batches over: in shared memory that is used again.

Fresh shared memory is dear, as the kernel clears every page of it and maps it into both processes.
So a worker keeps slots of it, each for the arrays of one batch, and sends a slot's memory once and
from then on only where in it the arrays are. A slot is

    flag | padding | array | padding | array | …

flag     one byte, 1 while a batch is in the slot: the worker sets it, and whoever has the batch last
         clears it, when the last tensor over the slot is gone
array    at a multiple of 64 bytes, the first at 64

A batch that is kept keeps its slot; the worker then makes another one. The memory is an anonymous file's,
which no limit on `/dev/shm` applies to: containers mostly have 64 MB there.
"""

import itertools
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch
from numpy.lib.array_utils import byte_bounds

ALIGNMENT = 64


@dataclass(frozen=True)
class Place:
    """Where an array is in a slot."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


class Slot:
    """Shared memory that holds one batch at a time: `nbytes` of a file, open as `descriptor`."""

    def __init__(self, descriptor: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor).atexit = False
        self._is_known = False  # to the process that receives
        self._bytes = np.frombuffer(mmap.mmap(descriptor, nbytes), np.uint8)

    def to_send(self) -> tuple[Any, int] | None:
        """The file, for a process that does not have it yet."""
        if self._is_known:
            return None
        self._is_known = True
        return DupFd(self._descriptor), self.nbytes

    @property
    def is_free(self) -> bool:
        return bool(self._bytes[0] == 0)

    def hold(self) -> tuple[np.ndarray, "weakref.finalize[Any, Any]"]:
        """The slot's bytes, and what frees the slot when the last array over them is gone."""
        self._bytes[0] = 1
        held = np.frombuffer(self._bytes.data, np.uint8)
        finalizer = weakref.finalize(held, _release, self._bytes, os.getpid())
        finalizer.atexit = False
        return held, finalizer


def _release(slot: np.ndarray, holder: int) -> None:
    if os.getpid() == holder:  # and not a process forked from it
        slot[0] = 0


class Outbox:
    """A worker's slots."""

    def __init__(self) -> None:
        self._slots: list[Slot] = []
        self._nbytes = ALIGNMENT

    def begin(self) -> "Parcel":
        """Something to read the next batch into."""
        return Parcel(self, *self._free_slot())

    def grow(self, nbytes: int) -> "Parcel":
        """One in a slot of so many bytes, or more."""
        self._nbytes = max(self._nbytes, nbytes)
        return self.begin()

    def _free_slot(self) -> tuple[int, Slot]:
        for number, slot in enumerate(self._slots):
            if slot.is_free and slot.nbytes >= self._nbytes:
                return number, slot
        self._slots.append(Slot(_shared_file(self._nbytes), self._nbytes))
        return len(self._slots) - 1, self._slots[-1]


class Parcel:
    """A batch in a slot; what arrives, when it is sent to another process, is a dict of tensors."""

    def __init__(self, outbox: Outbox, number: int, slot: Slot) -> None:
        self.inbox = 0
        self._outbox = outbox
        self._number = number
        self._slot = slot
        self._held, self._finalizer = slot.hold()
        self._start = _address(self._held)
        self._end = ALIGNMENT
        self._places: Any = None

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """An array in the slot, or elsewhere if the slot has no room for it."""
        start, nbytes = self._end, math.prod(shape) * dtype.itemsize
        if start + nbytes > len(self._held):
            return np.empty(shape, dtype)
        self._end = start + _padded(nbytes)
        return self._held[start : start + nbytes].view(dtype).reshape(shape)

    def filled(self, batch: Any) -> "Parcel":
        """The parcel of a batch that was read into this one, in a larger slot if it has to be."""
        arrays = leaves(batch)
        end = self._end + sum(_padded(array.nbytes) for array in arrays if not self._is_inside(array))
        if end > len(self._held):
            whole = ALIGNMENT + sum(_padded(array.nbytes) for array in arrays)
            return self._outbox.grow(max(end, whole)).filled(batch)
        self._places = map_leaves(batch, self._place)
        return self

    def _is_inside(self, array: np.ndarray) -> bool:
        return 0 <= _address(array) - self._start < len(self._held)

    def _place(self, array: np.ndarray) -> Place:
        if not self._is_inside(array):
            inside = self.allocate(array.shape, array.dtype)
            inside[...] = array
            array = inside
        return Place(_address(array) - self._start, array.shape, array.strides, array.dtype.str)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        self._finalizer.detach()  # whoever receives it frees the slot
        return _received, (self.inbox, os.getpid(), self._number, self._slot.to_send(), self._places)


class Inbox:
    """The slots of the workers that send to this process; they go when it goes."""

    def __init__(self) -> None:
        self.number = next(_numbers)
        self._slots: dict[tuple[int, int], Slot] = {}
        _inboxes[self.number] = self

    def add(self, worker: int, number: int, slot: Slot) -> None:
        """Take up a slot of a worker, and forget those of workers that are gone."""
        self._slots = {key: known for key, known in self._slots.items() if _is_alive(key[0])}
        self._slots[worker, number] = slot

    def tensors(self, worker: int, number: int, places: Any) -> Any:
        held, _ = self._slots[worker, number].hold()

        def tensor(place: Place) -> torch.Tensor:
            array = np.ndarray(place.shape, place.dtype, held, place.offset, place.strides)
            return torch.from_numpy(array)

        return map_leaves(places, tensor)


_numbers = itertools.count(1)
_inboxes: "weakref.WeakValueDictionary[int, Inbox]" = weakref.WeakValueDictionary()


def _received(inbox: int, worker: int, number: int, sent: tuple[Any, int] | None, places: Any) -> Any:
    """What a parcel becomes: nested dicts and tuples of tensors over the slot."""
    if sent is not None:
        file, nbytes = sent
        _inboxes[inbox].add(worker, number, Slot(file.detach(), nbytes))
    return _inboxes[inbox].tensors(worker, number, places)


def _shared_file(nbytes: int) -> int:
    """A file without a name, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("replaystore")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, nbytes)
    return descriptor


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def leaves(batch: Any) -> list[Any]:
    """The leaves of nested dicts and tuples."""
    found: list[Any] = []
    map_leaves(batch, found.append)
    return found


def memory_of(batch: Any) -> int:
    """Bytes of the memory under the leaves; what is under several of them counts once."""
    nbytes = end = 0
    for low, high in sorted(map(byte_bounds, leaves(batch))):
        nbytes += max(0, high - max(low, end))
        end = max(end, high)
    return nbytes


def map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """Nested dicts and tuples with each leaf replaced."""
    if isinstance(value, dict):
        return {name: map_leaves(child, function) for name, child in value.items()}
    if isinstance(value, tuple):
        return tuple(map_leaves(child, function) for child in value)
    return function(value)


def _address(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
