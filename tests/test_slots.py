import pickle

import numpy as np
import pytest

from replaystore.slots import Slots, expand


def test_expand_gives_all_members_in_order():
    expanded = expand(np.array([5, 100, 7]), np.array([3, 0, 2]), 4)
    assert expanded.tolist() == [5, 9, 13, 7, 11]


def test_slots_hold_the_newest_in_a_ring():
    slots = Slots(4, 1)
    slots.put(np.array([0]), np.array([3]), 3)
    slots.put(np.array([10]), np.array([3]), 3)
    assert slots.ids[:, 0].tolist() == [11, 12, 2, 10]
    slots.put(np.array([20]), np.array([9]), 9)  # more than there are slots
    assert slots.count == 15
    assert slots.ids[:, 0].tolist() == [26, 27, 28, 25]


def test_slots_of_an_environment_hold_its_transitions():
    slots = Slots(4, 2)
    slots.put(np.array([0, 1, 9]), np.array([3, 1, 2]), 3)
    assert slots.ids[:3].tolist() == [[0, 1], [2, 9], [4, 11]]


def test_slots_refuse_environments_of_different_lengths():
    with pytest.raises(AssertionError):
        Slots(4, 2).put(np.array([0, 1]), np.array([3, 2]), 3)


def test_slots_are_filled_with_the_newest_of_each_environment():
    slots = Slots(3, 2)
    slots.fill(np.array([0, 1, 0, 1]), np.array([0, 1, 40, 51]), np.array([2, 2, 2, 5]))
    assert slots.ids.tolist() == [[2, 55], [40, 57], [42, 59]]
    slots.fill(np.array([0, 1, 0]), np.array([0, 1, 40]), np.array([2, 2, 2]))  # two of the second one
    assert slots.count == 2
    assert slots.ids[:2].tolist() == [[40, 1], [42, 3]]


@pytest.mark.parametrize("count", [0, 3, 8, 23])
def test_a_pickle_holds_the_same_slots_as_runs(count):
    slots = Slots(8, 2)
    for i in range(count):
        slots.put(np.array([100 * (i // 5) + 2 * i, 100 * (i // 3) + 2 * i + 1]), np.array([1, 1]), 1)
    again = pickle.loads(pickle.dumps(slots))
    assert (again.size, again.num_envs, again.count) == (8, 2, count)
    np.testing.assert_array_equal(again.ids, slots.ids)


def test_a_pickle_of_a_million_slots_in_few_runs_is_small():
    slots = Slots(1_000_000, 1)
    slots.put(np.arange(0, 1_100_000, 1100), np.full(1000, 1000), 1_000_000)
    assert len(pickle.dumps(slots)) < 40_000
