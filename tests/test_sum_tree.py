"""The sum tree against a list."""

import bisect
import itertools

import numpy as np
import pytest

from replaystore.sum_tree import FAN, TOP, SumTree


def tree_of(priorities):
    tree = SumTree()
    tree.grow(len(priorities))
    tree.set(np.arange(len(priorities)), np.asarray(priorities, float))
    return tree


def expected_leaf(priorities, value):
    """The first leaf up to which the priorities add up to more than a value."""
    return bisect.bisect_right(list(itertools.accumulate(priorities)), value)


SIZES = [1, 2, FAN - 1, FAN, FAN + 1, TOP - 1, TOP, TOP + 1, FAN * TOP, FAN * TOP + 1]


@pytest.mark.parametrize("size", SIZES)
def test_every_leaf_is_found_at_every_size(size):
    tree = tree_of(np.ones(size))
    tree.check()
    assert tree.total == size
    assert np.array_equal(tree.find(np.arange(size)), np.arange(size))
    assert np.array_equal(tree.find(np.arange(size) + 0.75), np.arange(size))


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_equal_those_on_a_list(seed):
    rng = np.random.default_rng(seed)
    tree, model = SumTree(), []
    for _ in range(120):
        if rng.random() < 0.2 or not model:
            model += [0] * int(rng.integers(1, 400))
            tree.grow(len(model))
        leaves = rng.integers(len(model), size=rng.integers(1, 60))
        priorities = rng.integers(0, 4, len(leaves)).astype(float)  # sums of integers are exact
        tree.set(leaves, priorities)
        for leaf, priority in zip(leaves.tolist(), priorities.tolist(), strict=True):
            model[leaf] = priority
        tree.check()
        assert tree.total == sum(model)
        assert tree.get(np.arange(len(model))).tolist() == model
        if tree.total:
            values = rng.random(50) * tree.total
            assert tree.find(values).tolist() == [expected_leaf(model, value) for value in values]
            exact = rng.integers(tree.total, size=50).astype(float)
            assert tree.find(exact).tolist() == [expected_leaf(model, value) for value in exact]


def test_of_a_leaf_set_twice_the_last_one_counts():
    tree = tree_of([1.0, 1.0, 1.0])
    tree.set(np.array([1, 2, 1]), np.array([5.0, 2.0, 7.0]))
    assert tree.get(np.arange(3)).tolist() == [1, 7, 2]
    tree.check()


def test_many_leaves_at_once_are_summed_as_few_are():
    rng = np.random.default_rng(0)
    size = 5 * TOP * FAN
    priorities = rng.random(size)
    at_once, bit_by_bit = tree_of(priorities), tree_of(np.zeros(size))
    for part in np.array_split(rng.permutation(size), 300):
        bit_by_bit.set(part, priorities[part])
    at_once.check()
    bit_by_bit.check()
    assert at_once.total == bit_by_bit.total


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e200])
def test_no_leaf_of_priority_0_is_found_whatever_rounding_does(scale):
    rng = np.random.default_rng(1)
    for size in (5, FAN * FAN + 3, TOP + 17, 3 * FAN * TOP):
        priorities = np.where(rng.random(size) < 0.2, rng.lognormal(0, 20, size), 0) * scale
        priorities[[0, -1]] = 0
        priorities[size // 2] = scale
        tree = tree_of(priorities)
        edges = np.concatenate([[0.0], tree._ends[:-1], np.nextafter(tree._ends[1:], 0), [tree.total]])
        values = np.concatenate([edges, priorities.cumsum(), rng.random(5000) * tree.total])
        values = np.minimum(values, tree.total)
        assert (tree.get(tree.find(values)) > 0).all()


def test_leaves_are_found_as_often_as_their_priorities_say():
    rng = np.random.default_rng(2)
    priorities = rng.random(3000) ** 4
    tree = tree_of(priorities)
    n = 1_000_000
    values = (np.arange(n) + rng.random(n)) * (tree.total / n)
    counts = np.bincount(tree.find(values), minlength=3000)
    assert np.abs(counts - priorities / priorities.sum() * n).max() < 2, "each share, but for its ends"


def test_it_takes_less_than_12_bytes_a_leaf_also_after_growing():
    tree = SumTree()
    for length in range(100_000, 400_000, 7_777):
        tree.grow(length)
        assert len(tree) == length
        assert tree.nbytes < 12 * length
    tree.check()


def test_after_an_interrupt_the_sums_are_made_anew(monkeypatch):
    tree = tree_of(np.ones(TOP * FAN))

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SumTree, "_sum_top", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tree.set(np.array([3, 5000]), np.array([10.0, 0.0]))
    assert tree.total == TOP * FAN + 8
    tree.check()


def test_check_finds_a_wrong_sum_and_a_wrong_leaf():
    tree = tree_of(np.ones(TOP * FAN))
    tree._levels[1][7] += 1
    with pytest.raises(AssertionError, match="not those of their children"):
        tree.check()
    tree = tree_of(np.ones(3))
    tree._levels[0][1] = np.nan
    with pytest.raises(AssertionError, match="no number from 0"):
        tree.check()
