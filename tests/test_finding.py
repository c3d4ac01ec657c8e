import numpy as np
import pytest

from replaystore.compiled import finding

pytestmark = pytest.mark.skipif(finding is None, reason="there was no C compiler")

LENGTHS = [3, 0, 0, 0, 0, 0, 1, 7, 2]
ENDS = np.cumsum(LENGTHS)
ROWS = np.column_stack([np.arange(7 * len(LENGTHS)).reshape(-1, 7) * 100, ENDS])
EPISODES = np.arange(len(LENGTHS)).repeat(LENGTHS)


def located(numbers, rows=ROWS, count=None, buckets=(), bits=0, stride=2, shape=None):
    out = np.full((7, len(numbers)) if shape is None else shape, -1)
    count = len(rows) if count is None else count
    finding.locate(numbers, rows, count, np.array(buckets, np.int32), bits, stride, out)
    return out


@pytest.mark.parametrize("buckets", [[], [0] * 13, [0, 0, 0, 6], [99, -1], EPISODES.tolist()], ids=len)
@pytest.mark.parametrize("step", [1, -1, 3])
@pytest.mark.parametrize("repeats", [0, 1, 9])
def test_items_are_found_wherever_the_search_begins(buckets, step, repeats):
    numbers = np.arange(13).repeat(repeats)[::step]
    expected = ROWS[EPISODES[numbers], :7].T.copy()
    expected[6] += 2 * numbers
    assert np.array_equal(located(numbers, buckets=buckets), expected)


def test_episodes_beyond_the_buckets_are_found():
    rows = np.arange(1, 1001)[:, None] * [7, 6, 5, 4, 3, 2, 9, 1]
    numbers = np.random.default_rng(0).integers(1000, size=500)
    found = located(numbers, rows, buckets=range(0, 400, 4), bits=2, stride=0)
    assert np.array_equal(found, rows[numbers, :7].T)


@pytest.mark.parametrize("number", [-1, 13, 2**62, -(2**63)])
def test_a_number_without_an_episode_is_refused(number):
    with pytest.raises(IndexError, match="expected numbers of items"):
        located(np.array([0, number, 1]))
    with pytest.raises(IndexError, match="expected numbers of items"):
        located(np.array([0, 11]), count=len(ENDS) - 1)


def test_nothing_is_found_in_an_empty_index():
    none = np.zeros((0, 8), np.int64)
    assert located(none[:, 0], none).shape == (7, 0)
    with pytest.raises(IndexError, match="expected numbers of items"):
        located(np.array([0]), none)


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": len(ROWS) + 1},
        {"count": -1},
        {"rows": ROWS[:, :7].copy()},
        {"rows": ROWS.reshape(-1)},
        {"rows": ROWS.astype(np.int32)},
        {"bits": -1},
        {"bits": 64},
        {"shape": (7, 1)},
        {"shape": (8, 2)},
    ],
    ids=str,
)
def test_arrays_that_do_not_match_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        located(np.array([0, 1]), **wrong)


def test_arrays_with_gaps_are_refused():
    with pytest.raises((ValueError, BufferError)):
        located(np.array([0, 1]), rows=ROWS[:, ::-1])


def test_buckets_of_other_integers_are_refused():
    with pytest.raises(ValueError, match="expected arrays of integers"):
        finding.locate(
            np.array([0]), ROWS, len(ROWS), np.zeros(1, np.int64), 0, 2, np.empty((7, 1), np.int64)
        )


def copied(numbers, row_nbytes=3, length=2, apart=1, source=None, items=None):
    source = np.arange(100, dtype=np.uint8) if source is None else source
    out = np.full((len(numbers) if items is None else items, length, max(row_nbytes, 1)), 255, np.uint8)
    finding.copy_runs(source, row_nbytes, length, apart, numbers, out)
    return out


@pytest.mark.parametrize("row_nbytes", [1, 8, 27, 600])
@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("apart", [1, 3])
@pytest.mark.parametrize("stride", [1, -2])
def test_runs_are_copied_from_wherever_they_begin(row_nbytes, length, apart, stride):
    rows = np.random.default_rng(0).integers(256, size=(40, row_nbytes), dtype=np.uint8)
    source = np.append(rows.reshape(-1), np.zeros(row_nbytes - 1, np.uint8))  # not a whole row more
    last = 40 - 1 - (length - 1) * apart
    for count in (0, 1, 47, 48, 49, 63, 64, 65, 500):
        numbers = np.random.default_rng(count).integers(last + 1, size=abs(stride) * count)[::stride]
        expected = rows[numbers[:, None] + apart * np.arange(length)]
        assert np.array_equal(copied(numbers, row_nbytes, length, apart, source), expected)
    assert np.array_equal(copied(np.array([0, last]), row_nbytes, length, apart, source)[1, -1], rows[-1])
    for number in (-1, last + 1, 2**62, -(2**63)):
        with pytest.raises(IndexError, match="expected runs inside"):
            copied(np.array([0, number, last]), row_nbytes, length, apart, source)


@pytest.mark.parametrize(("length", "apart"), [(34, 1), (2, 33), (5, 9), (2, 2**62)])
def test_runs_longer_than_the_source_are_refused(length, apart):
    with pytest.raises(IndexError, match="expected runs inside"):
        copied(np.array([0]), 3, length, apart)


def test_numbers_may_lie_anywhere():
    numbers = np.frombuffer(b"?" + np.arange(31).tobytes(), np.int64, offset=1)
    assert not numbers.flags.aligned
    assert np.array_equal(copied(numbers)[:, 0, 0], 3 * np.arange(31))


@pytest.mark.parametrize(
    "wrong",
    [
        {"row_nbytes": 0},
        {"row_nbytes": -3},
        {"length": 0},
        {"apart": 0},
        {"apart": -1},
        {"items": 1},
        {"items": 3},
        {"numbers": np.array([0, 1], np.int32)},
        {"numbers": np.array([[0], [1]])},
        {"source": np.arange(100, dtype=np.uint8)[::2]},
    ],
    ids=str,
)
def test_runs_that_do_not_match_are_refused(wrong):
    with pytest.raises((ValueError, BufferError)):
        copied(**{"numbers": np.array([0, 1])} | wrong)


@pytest.mark.parametrize(
    ("start", "length", "bits", "items"),
    [
        (-1, 10, 4, 1),
        (0, 10, 4, 11),
        (10, 10, 4, 1),
        (0, 10, 3, 1),
        (0, 10, 0, 1),
        (0, 10, 63, 1),
        (2**62, 10, 4, 1),
    ],
)
def test_positions_that_an_order_has_not_are_refused(start, length, bits, items):
    with pytest.raises(ValueError, match="expected positions below"):
        finding.take_order(start, length, bits, np.zeros(6, np.uint64), np.empty(items, np.int64))
    with pytest.raises((ValueError, BufferError)):
        finding.take_order(0, 10, 4, np.zeros(6, np.uint32), np.empty(1, np.int64))
