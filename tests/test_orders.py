"""Orders are bijections that look random and take no memory."""

import tracemalloc

import numpy as np
import pytest

from replaystore.compiled import finding
from replaystore.orders import SMALL, InTurn, Order, PooledOrder

LENGTHS = [1, 2, 3, 5, 63, 64, 65, 1000, SMALL - 1, SMALL, SMALL + 1, 100_003, 1_000_000]
RUN, POOL = 8, 32


@pytest.fixture(autouse=True, params=[finding, None], ids=["compiled", "numpy"])
def compiled(request, monkeypatch):
    monkeypatch.setattr("replaystore.orders.finding", request.param)


@pytest.mark.skipif(finding is None, reason="there was no C compiler")
@pytest.mark.parametrize("length", [SMALL + 1, (1 << 17) - 1, 1 << 17, 1_000_003, 10**12, 1 << 61])
def test_an_order_is_the_same_without_compiled_code(length, monkeypatch):
    for start in (0, 5, length - 1000):
        taken = []
        for each in (finding, None):
            monkeypatch.setattr("replaystore.orders.finding", each)
            taken.append([Order(length, (seed, 1)).take(start, start + 1000) for seed in range(3)])
        assert np.array_equal(*taken)


@pytest.mark.parametrize("length", [1000, SMALL + 1, 300_000])
def test_nothing_is_taken_from_beyond_an_order(length):
    for start, stop in ((5, 5), (length, length), (length + 7, length + 7), (length + 7, length)):
        assert Order(length, (0, 0)).take(start, stop).tolist() == []


@pytest.mark.parametrize("length", LENGTHS)
def test_order_visits_each_number_once(length):
    for seed in range(3):
        numbers = Order(length, (seed, 7)).take(0, length)
        assert numbers.dtype == np.int64
        assert np.array_equal(np.sort(numbers), np.arange(length))


@pytest.mark.parametrize(
    "length", [1, 2, RUN - 1, RUN, RUN + 1, POOL - 1, POOL, POOL + 1, 75, 10_001, 100_003]
)
def test_pooled_order_visits_each_number_once(length):
    for seed in range(5):
        order = PooledOrder(length, (seed, 0), pool=POOL, run=RUN)
        assert np.array_equal(np.sort(order.take(0, length)), np.arange(length))


@pytest.mark.parametrize("length", [7, 1000, SMALL + 1, 300_000])
@pytest.mark.parametrize("kind", ["order", "pooled", "in turn"])
def test_pieces_are_those_of_the_whole(kind, length):
    order = {
        "order": lambda: Order(length, (3, 1)),
        "pooled": lambda: PooledOrder(length, (3, 1), pool=POOL, run=RUN),
        "in turn": lambda: InTurn(length, (3, 1)),
    }[kind]
    length = min(length, 5000)  # of a longer one, the beginning
    whole = order().take(0, length)
    edges = np.unique(np.random.default_rng(0).integers(length + 1, size=20))
    pieces = np.split(np.arange(length), edges)
    assert np.array_equal(np.concatenate([order().take(p[0], p[-1] + 1) for p in pieces if len(p)]), whole)


@pytest.mark.parametrize("length", [50_000, SMALL + 1, 200_000, 1 << 20])
def test_order_looks_random(length):
    numbers = Order(length, (1, 2)).take(0, length) / length
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 5 / np.sqrt(length)
    assert abs(np.corrcoef(numbers, np.arange(length))[0, 1]) < 5 / np.sqrt(length)
    blocks = np.histogram2d(numbers, np.arange(length), bins=16)[0]
    chi_square = ((blocks - length / 256) ** 2 / (length / 256)).sum()
    assert 100 < chi_square < 360  # 225 degrees of freedom


@pytest.mark.parametrize("length", [SMALL + 1, 100_000])
def test_every_position_has_any_number(length):
    first = np.array([Order(length, (seed, 0)).take(0, 8) for seed in range(2000)]) / length
    assert np.abs(first.mean(axis=0) - 0.5).max() < 5 * np.sqrt(1 / 12 / 2000)
    between = np.corrcoef(first.T) - np.eye(8)
    assert np.abs(between).max() < 5 / np.sqrt(2000)


def test_orders_of_other_seeds_and_passes_differ():
    orders = [Order(100_000, seed).take(0, 100).tolist() for seed in [(1, 0), (1, 1), (2, 0)]]
    assert len({tuple(order) for order in orders}) == 3
    assert Order(100_000, (1, 0)).take(0, 100).tolist() == orders[0]


def test_order_of_a_billion_takes_no_memory():
    tracemalloc.start()
    numbers = Order(10**9, (0, 0)).take(0, 256)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert len(np.unique(numbers)) == 256
    assert 0 <= numbers.min() <= numbers.max() < 10**9
    assert numbers.max() > 9 * 10**8
    assert np.array_equal(Order(10**9, (0, 0)).take(100, 110), numbers[100:110])


def test_pooled_order_reads_whole_runs_of_a_pool_at_a_time():
    length = 40 * POOL + 3
    order = PooledOrder(length, (5, 0), pool=POOL, run=RUN)
    for pool in range(39):
        numbers = np.sort(order.take(pool * POOL, (pool + 1) * POOL))
        ends = np.count_nonzero(np.diff(numbers) != 1) + 1
        assert ends <= POOL // RUN + 1  # one more where the turn splits a run


def test_runs_begin_elsewhere_in_every_pass():
    starts = set()
    for seed in range(50):
        order = PooledOrder(100 * POOL, (seed, 0), pool=POOL, run=RUN)
        starts |= set((np.sort(order.take(0, POOL))[:1] % RUN).tolist())
    assert len(starts) == RUN
