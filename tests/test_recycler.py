import gc

import numpy as np
import pytest

from replaystore.recycler import KEPT, LARGEST, SMALLEST, Recycler

BYTE = np.dtype(np.uint8)


def address(array):
    return array.ctypes.data


@pytest.mark.parametrize("dtype", ["uint8", "float64", "bool"])
def test_memory_is_used_again_once_its_last_view_is_gone(dtype):
    recycler, shape = Recycler(), (SMALLEST, 3)
    first = recycler.allocate(shape, np.dtype(dtype))
    assert (first.shape, first.dtype, first.flags.writeable) == (shape, np.dtype(dtype), True)
    place, view = address(first), first[5:9, 1]
    del first
    gc.collect()
    assert address(recycler.allocate(shape, np.dtype(dtype))) != place, "a view of it is still alive"
    del view
    gc.collect()
    again = [recycler.allocate(shape, np.dtype(dtype)) for _ in range(2)]
    assert place in map(address, again)


def test_arrays_that_live_do_not_share_memory():
    recycler = Recycler()
    arrays = []
    for turn in range(20):
        arrays.append(recycler.allocate((SMALLEST,), BYTE))
        arrays[-1][:] = turn
        if turn % 3 == 2:
            arrays.pop(turn % len(arrays))
    values = [np.unique(array).tolist() for array in arrays]
    assert all(len(value) == 1 for value in values)
    assert len({value[0] for value in values}) == len(arrays)


def test_few_free_pieces_are_kept_and_none_that_is_very_large():
    recycler = Recycler()
    arrays = [recycler.allocate((SMALLEST + n,), BYTE) for n in range(3 * KEPT)]
    arrays.append(recycler.allocate((LARGEST + 1,), BYTE))
    arrays.append(recycler.allocate((SMALLEST - 1,), BYTE))
    del arrays
    gc.collect()
    assert len(recycler._free) == KEPT
    assert all(SMALLEST <= len(memory) < SMALLEST + 3 * KEPT for memory in recycler._free)
