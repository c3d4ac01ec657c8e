import json
import threading

import pytest

from replaystore.errors import UsageError
from replaystore.limiter import SamplesPerInsert


def test_nothing_is_sampled_before_the_least_size():
    limiter = SamplesPerInsert(4, min_size=10, tolerance=100)
    limiter.add_inserted(9)
    assert not limiter.may_sample()
    assert limiter.may_insert(5)
    limiter.add_inserted(1)
    assert limiter.may_sample(100)
    assert not limiter.may_sample(101)


def test_inserting_goes_on_until_the_least_size_whatever_it_overshoots():
    limiter = SamplesPerInsert(4, min_size=5, tolerance=10)
    limiter.add_inserted(4)
    assert limiter.may_insert(4)  # 12 items will be due, but as yet none may be sampled
    limiter.add_inserted(4)
    assert not limiter.may_insert()
    assert limiter.may_sample(22)


def test_each_side_waits_at_the_tolerance():
    limiter = SamplesPerInsert(2, min_size=1, tolerance=6)
    limiter.add_inserted(4)  # 6 items are due
    assert not limiter.may_insert()
    limiter.add_sampled(2)
    assert limiter.may_insert(1)
    assert not limiter.may_insert(2)
    limiter.add_sampled(10)  # 6 too many
    assert not limiter.may_sample()
    assert limiter.may_insert(6)
    limiter.check()


@pytest.mark.parametrize(
    ("ratio", "batch", "step"), [(0.25, 1, 4), (1, 1, 1), (8, 32, 1), (3.5, 7, 2), (8, 256, 16)]
)
def test_ratio_is_held_however_fast_each_side_is(ratio, batch, step):
    limiter = SamplesPerInsert(ratio, min_size=50, tolerance=(batch + ratio * step) / 2)
    for turn in range(3000):
        for _ in range(1 + turn // 100 % 5):
            if limiter.may_insert(step):
                limiter.add_inserted(step)
        for _ in range(1 + turn // 70 % 7):
            if limiter.may_sample(batch):
                limiter.add_sampled(batch)
        assert limiter.may_sample(batch) or limiter.may_insert(step), "both wait for each other"
        if limiter.sampled:
            due = ratio * (limiter.inserted - 50) - limiter.sampled
            assert abs(due) <= (batch + ratio * step) / 2 + ratio * step  # and what overshot the least size
    assert limiter.sampled / (limiter.inserted - 50) == pytest.approx(ratio, rel=0.1)


def test_threads_wait_for_each_other_and_keep_the_ratio():
    limiter = SamplesPerInsert(4, min_size=20, tolerance=32)

    def act():
        while limiter.wait_to_insert():
            pass

    actor = threading.Thread(target=act)
    actor.start()
    for _ in range(200):
        assert limiter.wait_to_sample(16, timeout=30)
    limiter.close()
    actor.join(30)
    assert not actor.is_alive()
    assert limiter.sampled == 3200
    assert abs(4 * (limiter.inserted - 20) - 3200) <= 32
    assert not limiter.wait_to_insert(timeout=30)


def test_waiting_ends_with_the_timeout_and_counts_nothing():
    limiter = SamplesPerInsert(1, min_size=5, tolerance=2)
    assert not limiter.wait_to_sample(timeout=0)
    assert not limiter.wait_to_sample(timeout=0.01)
    assert (limiter.inserted, limiter.sampled) == (0, 0)


def test_state_goes_on_exactly_through_json():
    limiter = SamplesPerInsert(2, min_size=3, tolerance=9)
    limiter.add_inserted(7)
    limiter.add_sampled(5)
    again = SamplesPerInsert(2, min_size=3, tolerance=9)
    again.load_state_dict(json.loads(json.dumps(limiter.state_dict())))
    for n in range(1, 20):
        assert again.may_sample(n) == limiter.may_sample(n)
        assert again.may_insert(n) == limiter.may_insert(n)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0, "tolerance": 1}, "ratio"),
        ({"ratio": "4", "tolerance": 1}, "ratio"),
        ({"ratio": 4, "tolerance": 2}, "tolerance: expected a number from .* = 2.5"),
        ({"ratio": 4, "tolerance": float("nan")}, "tolerance"),
        ({"ratio": 4, "tolerance": 4, "min_size": 0}, "min_size"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        SamplesPerInsert(**arguments)


def test_what_can_never_be_allowed_is_refused():
    limiter = SamplesPerInsert(2, tolerance=8)
    with pytest.raises(UsageError, match=r"at most 2 \* tolerance = 16 .* got 15 \+ 2 \* 1"):
        limiter.wait_to_sample(15)
    with pytest.raises(UsageError, match=r"got 1 \+ 2 \* 8"):
        limiter.wait_to_insert(8)
    for n in (-1, 1.5, True):
        with pytest.raises(UsageError, match="a count from 0"):
            limiter.add_sampled(n)
    with pytest.raises(UsageError, match="expected a state of inserted and sampled"):
        limiter.load_state_dict({"inserted": 1})
