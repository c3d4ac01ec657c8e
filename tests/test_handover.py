"""Shared memory that is used again: nothing that is held is written over, nothing is lost."""

import gc
import os
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from test_dataset import all_ids, assert_same, expected_batch, write_episodes

import replaystore.dataset
import replaystore.loader
from replaystore.dataset import ReplayDataset
from replaystore.handover import Inbox, Outbox
from replaystore.samplers import Uniform


def send(outbox, inbox, batch):
    """Read a batch into a parcel, field by field, and return what arrives."""
    parcel = outbox.begin()
    inside = {}
    for name, array in batch.items():
        inside[name] = parcel.allocate(array.shape, array.dtype)
        inside[name][...] = array
    parcel = parcel.filled(inside)
    parcel.inbox = inbox.number
    return pickle.loads(bytes(ForkingPickler.dumps(parcel)))


def batch_of(number, size=10):
    return {
        "a": np.full((size, 3), number, "uint8"),
        "b": np.full(size, number / 2),
        "c": np.arange(size) > 4,
    }


def assert_arrived(tensors, batch):
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "a": torch.uint8,
        "b": torch.float64,
        "c": torch.bool,
    }
    assert all(np.array_equal(tensors[name].numpy(), array) for name, array in batch.items())


def test_batch_arrives_as_it_was_sent_and_its_slot_is_used_again():
    outbox, inbox = Outbox(), Inbox()
    for number in range(50):
        tensors = send(outbox, inbox, batch_of(number))
        assert_arrived(tensors, batch_of(number))
    assert len(outbox._slots) == 3  # one that was too small, one that is held, one that is filled


def test_batches_that_are_kept_are_not_written_over():
    outbox, inbox = Outbox(), Inbox()
    kept = [send(outbox, inbox, batch_of(number)) for number in range(20)]
    for number, tensors in enumerate(kept):
        assert_arrived(tensors, batch_of(number))
    del kept[1:], tensors
    for number in range(20):
        send(outbox, inbox, batch_of(number + 100))
    assert_arrived(kept[0], batch_of(0))
    assert len(outbox._slots) == 21


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_slot_is_held_as_long_as_any_view_of_any_tensor_lives(name):
    outbox, inbox = Outbox(), Inbox()
    send(outbox, inbox, batch_of(1))
    part = send(outbox, inbox, batch_of(2))[name][2:4]
    expected = part.clone()
    for number in range(3, 10):
        send(outbox, inbox, batch_of(number))
    assert torch.equal(part, expected)


def test_batches_of_any_size_fit():
    outbox, inbox = Outbox(), Inbox()
    for size in (1, 100, 3, 1000, 0, 999):
        assert_arrived(send(outbox, inbox, batch_of(7, size)), batch_of(7, size))


def test_parcel_that_is_never_sent_frees_its_slot():
    outbox = Outbox()
    for _ in range(5):
        outbox.begin()
    gc.collect()
    assert len(outbox._slots) == 1


@pytest.mark.skipif(
    not hasattr(os, "memfd_create"), reason="a Linux call; elsewhere slots are temporary files"
)
def test_slots_have_no_place_in_dev_shm_and_their_files_close_with_them():
    def files():
        return [os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]

    before = sorted(files())
    outbox, inbox = Outbox(), Inbox()
    tensors = send(outbox, inbox, batch_of(1))
    new = [name for name in files() if name not in before and not name.startswith("socket")]
    assert new
    assert all(name.startswith("/memfd:replaystore") for name in new)
    del outbox, inbox, tensors
    gc.collect()
    assert not [name for name in files() if "memfd" in name]


def test_forked_process_frees_no_slot_of_its_parent():
    outbox, inbox = Outbox(), Inbox()
    send(outbox, inbox, batch_of(0))
    tensors = send(outbox, inbox, batch_of(1))
    child = os.fork()
    if child == 0:
        tensors.clear()
        os._exit(0)
    os.waitpid(child, 0)
    send(outbox, inbox, batch_of(2))
    send(outbox, inbox, batch_of(3))
    assert_arrived(tensors, batch_of(1))


def test_workers_use_a_few_slots_over_an_epoch_and_those_of_the_last_epoch_are_let_go(tmp_path):
    path = write_episodes(tmp_path / "store", lengths=(4000,))
    loader = ReplayDataset(path).loader(300, num_workers=1)
    for _ in range(3):
        for batch in loader:
            assert len(batch["ids"]) <= 300
        assert len(loader.collate_fn._inbox._slots) <= 5


@pytest.mark.parametrize("make", [lambda: Uniform(replace=False, seed=0), Uniform], ids=["a pass", "draws"])
@pytest.mark.parametrize("workers", [0, 2])
def test_more_items_are_read_at_once_if_they_are_small(make, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(replaystore.dataset, "READ_AT_ONCE", 7)
    monkeypatch.setattr(replaystore.loader, "SENT_AT_ONCE", 14)
    dataset = ReplayDataset(write_episodes(tmp_path / "store", lengths=(900, 100)))
    found = []
    for most, fitting, expected in [(1, 999, 14 if workers else 7), (70, 80, 70), (80, 70, 70)]:
        monkeypatch.setattr(replaystore.loader, "SMALL_AT_ONCE", most)
        monkeypatch.setattr(replaystore.loader, "SMALL_BYTES", fitting * dataset.item_nbytes)
        loader = dataset.loader(7, sampler=make(), seed=0, num_workers=workers)
        drawn = [each.numbers for each in loader.batch_sampler]
        assert max(map(len, drawn)) == expected
        assert len(drawn[0]) == len(drawn[-2]) == 7, "few at the ends of a pass"
        found.append(np.concatenate(drawn))
    assert all(np.array_equal(found[0], each) for each in found)


def test_small_batches_that_are_read_together_are_those_of_the_store(tmp_path):
    path = write_episodes(tmp_path / "store", lengths=(500, 100))
    everything = expected_batch(path, range(600))
    for workers in (0, 1):
        batches = list(ReplayDataset(path).loader(7, shuffle=False, num_workers=workers))
        assert [len(batch["ids"]) for batch in batches] == [7] * 85 + [5]
        assert all_ids(batches) == everything["ids"].tolist()
        assert_same(batches[40], expected_batch(path, range(280, 287)))
