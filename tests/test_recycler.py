import gc

import numpy as np
import pytest
from recording import Recorder, schema

import replaystore.loader
import replaystore.recycler
from replaystore import ReplayStore, Transition
from replaystore.dataset import ReplayDataset
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


def test_memory_that_was_used_last_is_used_first():
    recycler = Recycler()
    arrays = [recycler.allocate((SMALLEST,), BYTE) for _ in range(3)]
    last = address(arrays[1])
    for number in (2, 0, 1):
        arrays[number] = None
    for _ in range(5):
        assert address(recycler.allocate((SMALLEST,), BYTE)) == last


@pytest.mark.parametrize("batch_size", [64, 100, 256], ids=["four at once", "two at once", "one"])
def test_loader_keeps_no_batch_that_its_user_has_let_go(batch_size, tmp_path, monkeypatch):
    monkeypatch.setattr(replaystore.loader, "SMALL_BYTES", 1)
    monkeypatch.setattr(replaystore.recycler, "SMALLEST", 1)
    with ReplayStore.create(tmp_path / "store", schema()) as store:
        Recorder(store).bulk(4 * 4096)
    dataset = ReplayDataset(tmp_path / "store", Transition(frame_stack=20))
    batches = iter(dataset.loader(batch_size, seed=0))
    together = 256 // batch_size
    places = [next(batches)["observation"].untyped_storage().data_ptr() for _ in range(5 * together)]
    assert len(set(places)) == 1
