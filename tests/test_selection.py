"""Parts of a store: the episodes for which a condition holds, as they were when it was asked."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from growing import Actors, add_stream, schema

from replaystore import ReplayStore, Transition, UsageError
from replaystore.errors import ClosedError
from replaystore.index import EACH, Extent, Spacing
from replaystore.samplers import InOrder
from replaystore.selection import evaluate


@pytest.fixture
def path(tmp_path):
    count = add_stream(tmp_path / "store", 80, num_envs=2, policy="demo", level=1)
    add_stream(tmp_path / "store", 60, first=count, seed=1, level=2)
    return tmp_path / "store"


CONDITIONS = [
    pc.field("return") > 40,
    pc.field("level") == 2,
    pc.field("policy") == "demo",
    pc.field("policy").is_null(),
    (pc.field("length") > 3) & (pc.field("env") == 1),
    pc.field("stream").isin([1]),
    ~pc.field("terminated"),
    pc.field("seed").is_null(),
    pc.field("start_time") > pa.scalar(0, pa.timestamp("us", "UTC")),
]


@pytest.mark.parametrize("condition", CONDITIONS, ids=str)
def test_selection_has_the_episodes_that_arrow_filters(condition, path):
    with ReplayStore.open(path) as store:
        expected = store.episodes.filter(condition)
        chosen = store.where(condition)
        assert chosen.episodes.equals(expected)
        assert chosen.num_episodes == len(expected) > 0
        assert len(chosen) == pc.sum(expected.column("length")).as_py()
        everything = chosen.read(np.arange(len(chosen)))
        one_by_one = [chosen.episode(i) for i in range(len(expected))]
        for name in ("action", "terminated", "truncated"):
            recorded = np.concatenate([episode[name] for episode in one_by_one])
            assert getattr(everything, name).tolist() == recorded.tolist(), name
        for spacing in (EACH, Spacing(2, 3, 1)):
            chosen._index(spacing).check()


def test_ids_of_a_selection_are_those_of_the_store(path):
    with ReplayStore.open(path) as store:
        chosen = store.where(pc.field("level") == 2)
        batch = chosen.sample(50)
        numbers = store.items(Transition()).numbers(batch.ids)
        assert np.array_equal(store.read(numbers).action, batch.action)


def test_selections_are_narrowed(path):
    with ReplayStore.open(path) as store:
        twice = store.where(pc.field("level") == 1).where(pc.field("length") > 4)
        both = store.where((pc.field("level") == 1) & (pc.field("length") > 4))
        assert twice.episodes.equals(both.episodes)
        assert np.array_equal(twice.read(np.arange(len(twice))).ids, both.read(np.arange(len(both))).ids)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_selection_stays_as_it_was_while_the_store_grows(num_envs, tmp_path):
    with ReplayStore.create(tmp_path / "store", schema(), num_envs) as store:
        actors = Actors(store, num_envs)
        actors.step(30)
        chosen = store.where(pc.field("length") > 2)
        before, table = chosen.read(np.arange(len(chosen))), chosen.episodes
        for _ in range(3):
            actors.step(10)
            store.flush()
            assert np.array_equal(chosen.read(np.arange(len(chosen))).action, before.action)
            assert chosen.episodes.equals(table)
        assert len(store.where(pc.field("length") > 2)) > len(chosen)


@pytest.mark.parametrize("narrowed", [False, True])
def test_open_episodes_are_told_from_closed_ones(narrowed, tmp_path):
    """So that a pass over a selection goes on over the same items when they have ended."""
    with ReplayStore.create(tmp_path / "store", schema(), 3) as store:
        actors = Actors(store, 3)
        actors.step(30)
        store.flush()
        actors.step(4)
        some = pc.field("length") > 1

        def choose():
            chosen = store.where(some)
            return chosen.where(some) if narrowed else chosen

        chosen = choose()
        index, everything = chosen.items(Transition()), store.items(Transition())
        opened = {tuple(row) for row in zip(*everything.episodes(everything.num_closed), strict=True)}
        found = {tuple(row) for row in zip(*index.episodes(index.num_closed), strict=True)}
        assert found == {(s, e, first, last) for s, e, first, last in opened if last - first > 1} != set()
        sampler = InOrder()
        chosen.sample(5, sampler=sampler)
        state = json.loads(json.dumps(sampler.state_dict()))
        rest = chosen.sample(len(chosen), sampler=sampler).ids.tolist()
        actors.step(20)
        again = InOrder()
        again.load_state_dict(state)
        assert Extent(**state["extent"]) == index.extent()
        assert choose().sample(len(chosen), sampler=again).ids.tolist() == rest


def test_rows_without_a_value_are_not_chosen(path):
    with ReplayStore.open(path) as store:
        total = len(store.where(pc.field("policy") == "demo")) + len(
            store.where(pc.field("policy").is_null())
        )
        assert total == len(store)
        with pytest.raises(UsageError, match="holds for none of"):
            store.where(pc.field("policy") != "demo")


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("level == 1", "where: expected a pyarrow.compute.Expression, got 'level == 1'"),
        (pc.field("no") == 1, "expected an expression on stream, env, first_row"),
        (pc.field("level") + 1, "where: expected a condition, .* is of type int64"),
        (pc.field("level") == "x", "expected an expression on stream"),
        (pc.field("level") == 99, "where: expected some episodes, .* holds for none of"),
    ],
    ids=str,
)
def test_condition_that_says_nothing_is_refused(condition, message, path):
    with ReplayStore.open(path) as store, pytest.raises(UsageError, match=message):
        store.where(condition)


def test_selection_of_a_closed_store_says_so(path):
    with ReplayStore.open(path) as store:
        chosen = store.where(pc.field("level") == 1)
    uses = [lambda: len(chosen), lambda: chosen.episodes, lambda: chosen.sample(1), lambda: chosen.read([0])]
    for use in uses:
        with pytest.raises(ClosedError, match="the store is closed"):
            use()


def test_evaluation_keeps_the_order_of_a_long_table():
    parts = [pa.table({"x": np.arange(start, start + 4096)}) for start in range(0, 1 << 19, 4096)]
    table = pa.concat_tables(parts)
    assert np.array_equal(evaluate(table, pc.field("x") + 1).to_numpy(), np.arange(1 << 19) + 1)
    assert evaluate(table.slice(0, 0), pc.field("x") + 1).to_pylist() == []
    assert evaluate(table, pc.scalar(True)).to_pylist() == [True] * (1 << 19)


def test_wrong_use_of_reading_is_refused(path):
    with ReplayStore.open(path) as store:
        chosen = store.where(pc.field("level") == 2)
        for use, message in [
            (lambda: chosen.read([len(chosen)]), "expected numbers from 0 to"),
            (lambda: chosen.read([-1]), "expected numbers from 0 to"),
            (lambda: chosen.read([0.5]), "expected a list of integers"),
            (lambda: chosen.episode(chosen.num_episodes), "episode: expected a number below"),
            (lambda: chosen.sample(0), "expected a batch size from 1"),
            (lambda: chosen.sample(1, rng=3), "rng: expected a numpy.random.Generator"),
            (lambda: chosen.sample(1, window=3), "window: expected a window"),
            (lambda: chosen.sample(1, sampler="x"), "sampler: expected a Sampler"),
        ]:
            with pytest.raises(UsageError, match=message):
                use()
