"""Shares are exact, strata follow a store that grows, and stores stay apart."""

import json

import numpy as np
import pyarrow.compute as pc
import pytest
from growing import Actors, add_stream, chi_square, schema

from replaystore import Field, ReplayStore, Schema, Transition, UsageError
from replaystore.dataset import ReplayDataset
from replaystore.mixtures import Mixed, MixedStores, Stratified, split
from replaystore.prioritized import Prioritized
from replaystore.samplers import InOrder, Recent, Shuffled, Uniform


def two_policies(path, num_envs=1):
    """Stream 0 by the policy demo, stream 1 by others; returns where the second begins, and the end."""
    middle = add_stream(path, 40, num_envs, policy="demo", level=1)
    with ReplayStore.open(path, "a", num_envs=num_envs + 1) as store:
        actors = Actors(store, num_envs + 1, seed=1, first=middle)
        for policy in (None, "eps=0.1", None, "eps=0.2"):
            actors.step(30, policy=policy, level=2)
    return middle, actors.count


def actions(store, sampler, n, at_once=250, rng=None):
    rng = rng or np.random.default_rng(0)
    return np.concatenate(
        [store.sample(at_once, rng=rng, sampler=sampler).action for _ in range(n // at_once)]
    )


# ---- shares


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.1, 0.2, 0.7], [1.0], [1 / 3] * 3, [0.05, 0.9, 0.05, 0.0]])
@pytest.mark.parametrize("n", [1, 2, 7, 32])
def test_parts_are_exact_in_expectation_and_by_less_than_one_apart(shares, n):
    rng = np.random.default_rng(0)
    parts = np.array([split(n, np.array(shares), rng) for _ in range(20_000)])
    assert (parts.sum(axis=1) == n).all()
    assert (np.abs(parts - n * np.array(shares)) < 1 + 1e-9).all()
    assert np.abs(parts.mean(axis=0) - n * np.array(shares)).max() < 5 * 0.5 / np.sqrt(20_000)


# ---- Mixed


def test_mixture_draws_with_the_sum_of_its_probabilities(tmp_path):
    count = add_stream(tmp_path / "store", 100)
    with ReplayStore.open(tmp_path / "store") as store:
        sampler = Mixed([(Uniform(), 1), (Recent(half_life=20), 2), (Uniform(replace=False, seed=0), 1)])
        items = store.items(Transition())
        expected = sampler.probability(items, np.arange(count))
        recent = Recent(half_life=20).probability(items, np.arange(count))
        np.testing.assert_allclose(expected, 0.5 / count + 0.5 * recent)
        counts = np.bincount(actions(store, sampler, 100_000), minlength=count)
        assert chi_square(counts, expected * 100_000) < 5
        draw = sampler.draw(items, 50, np.random.default_rng(0))
        np.testing.assert_allclose(draw.probabilities, expected[draw.numbers])


def test_mixture_is_as_adaptive_as_its_samplers_and_keeps_their_weights(tmp_path):
    add_stream(tmp_path / "store", 100)
    prioritized = Prioritized()
    sampler = Mixed([(prioritized, 1), (Uniform(), 1)])
    assert sampler.is_adaptive
    assert not Mixed([(Uniform(), 1)]).is_adaptive
    with ReplayStore.open(tmp_path / "store") as store:
        store.sample(10, sampler=sampler)
        prioritized.update_priorities(np.arange(3), [100.0, 100.0, 100.0])
        found = actions(store, sampler, 10_000)
        assert np.count_nonzero(found < 3) > 1500
        weights = store.sample(1000, sampler=sampler).weights
        assert sorted(set(np.round(weights, 6)))[-1] == 1
        assert len(set(np.round(weights, 6))) == 2


# ---- Stratified


@pytest.mark.parametrize("num_envs", [1, 2])
def test_each_share_comes_uniformly_from_its_stratum(num_envs, tmp_path):
    middle, count = two_policies(tmp_path / "store", num_envs)
    with ReplayStore.open(tmp_path / "store") as store:
        sampler = Stratified(store, {"demo": 1, None: 3})
        counts = np.bincount(actions(store, sampler, 40_000), minlength=count)
        assert abs(counts[:middle].sum() - 10_000) < 80  # 62 or 63 of each 250
        assert chi_square(counts[:middle], np.full(middle, counts[:middle].mean())) < 5
        assert chi_square(counts[middle:], np.full(count - middle, counts[middle:].mean())) < 5
        items = store.items(Transition())
        draw = sampler.draw(items, 64, np.random.default_rng(0))
        np.testing.assert_allclose(draw.probabilities, sampler.probability(items, draw.numbers))
        assert sampler.probability(items, np.arange(count)).sum() == pytest.approx(1)


def test_strata_are_those_of_any_column_or_expression(tmp_path):
    two_policies(tmp_path / "store")
    with ReplayStore.open(tmp_path / "store") as store:
        table = store.episodes

        def strata(shares, by):
            sampler, items = Stratified(store, shares, by=by), store.items(Transition())
            draw = sampler.draw(items, 4000, np.random.default_rng(0))
            places = items.locate(draw.numbers)
            stream, first = places.stream.tolist(), places.first.tolist()
            rows = {(s, e, f): i for i, (s, e, f) in enumerate(episode_keys(table))}
            return [rows[key] for key in zip(stream, places.env.tolist(), first, strict=True)]

        for shares, by in [
            ({0: 1, 1: 1}, "stream"),
            ({1: 1, 2: 3}, "level"),
            ({0: 1, 1: 1}, "env"),
            ({"demo": 1, "eps=0.1": 2}, "policy"),
            ({True: 1, False: 1}, pc.field("return") > 100),
            ({1: 1, 2: 2, None: 1}, "length"),
        ]:
            values = table.append_column("x", evaluated(table, by)).column("x").to_pylist()
            drawn = [values[row] for row in strata(shares, by)]
            for value, share in shares.items():
                number = sum(each == value if value is not None else each not in shares for each in drawn)
                assert abs(number - 4000 * share / sum(shares.values())) < 1


def episode_keys(table):
    return zip(*(table.column(name).to_pylist() for name in ("stream", "env", "first_row")), strict=True)


def evaluated(table, by):
    if isinstance(by, str):
        return table.column(by)
    return pc.greater(table.column("return"), 100)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_new_episodes_join_their_strata_in_the_process_that_writes(num_envs, tmp_path):
    with ReplayStore.create(tmp_path / "store", schema(), num_envs) as store:
        actors, policies = Actors(store, num_envs), {}
        actors.step(5, policy="demo")
        sampler = Stratified(store, {"demo": 1, None: 1}, stand_in=True)
        rng = np.random.default_rng(0)
        for turn in range(40):
            if turn % 9 == 8:
                store.flush()
            actors.step(3, policy=("demo", None, "other")[turn % 3])
            table = store.episodes
            for (_, env, first), policy in zip(
                episode_keys(table), table.column("policy").to_pylist(), strict=True
            ):
                policies[env, first] = policy
            items = store.items(Transition())
            draw = sampler.draw(items, 40, rng)
            places = items.locate(draw.numbers)
            drawn = [policies[key] for key in zip(places.env.tolist(), places.first.tolist(), strict=True)]
            is_mixed = {"demo"} < set(policies.values())
            assert sum(policy == "demo" for policy in drawn) == (20 if is_mixed else 40)
        expected = store.where(pc.field("policy") == "demo")
        assert len({*actions(store, Stratified(store, {"demo": 1}), 20_000).tolist()}) == len(expected)


def test_new_episodes_join_their_strata_after_a_refresh(tmp_path):
    path = tmp_path / "store"
    middle = add_stream(path, 30, policy="demo")
    with ReplayStore.open(path) as store:
        sampler = Stratified(store, {"demo": 1, "mine": 1})
        with pytest.raises(UsageError, match="expected items with policy 'mine', found none"):
            store.sample(8, sampler=sampler)
        for turn in range(3):
            middle = add_stream(path, 20, 1 + turn % 2, seed=turn, first=middle, policy="mine")
            store.refresh()
            found = actions(store, sampler, 10_000)
            assert np.count_nonzero(found < 30) == 5000
            assert set(found.tolist()) == set(range(middle))


def test_stratum_without_items_is_named_or_stood_in_for(tmp_path):
    count = add_stream(tmp_path / "store", 50, policy="demo", level=3)
    with ReplayStore.open(tmp_path / "store") as store:
        with pytest.raises(UsageError, match="expected items with level 7, found none"):
            store.sample(8, sampler=Stratified(store, {3: 1, 7: 1}, by="level"))
        sampler = Stratified(store, {3: 1, 7: 1}, by="level", stand_in=True)
        assert set(actions(store, sampler, 2000).tolist()) == set(range(count))
        with pytest.raises(UsageError, match="expected items with level 8, found none"):
            store.sample(8, sampler=Stratified(store, {8: 1, 7: 1}, by="level", stand_in=True))


def test_strata_have_samplers_of_their_own(tmp_path):
    middle, count = two_policies(tmp_path / "store")
    samplers = {"demo": InOrder(), None: Recent(fraction=0.1)}
    with ReplayStore.open(tmp_path / "store") as store:
        sampler = Stratified(store, {"demo": 1, None: 1}, samplers=samplers)
        found = actions(store, sampler, 20_000, at_once=10)
        demo = found[found < middle]
        turns = [demo[i : i + middle] for i in range(0, len(demo) - middle, middle)]
        assert all(sorted(turn) == list(range(middle)) for turn in turns)
        assert len(set(found[found >= middle].tolist())) == round((count - middle) * 0.1)


def test_strata_of_a_selection_and_of_windows(tmp_path):
    middle, _ = two_policies(tmp_path / "store", 2)
    with ReplayStore.open(tmp_path / "store") as store:
        chosen = store.where(pc.field("length") > 3)
        sampler = Stratified(chosen, {0: 1, 1: 1}, by="stream")
        for window in (Transition(), Transition(n_step=3), Transition(frame_stack=2)):
            batch = chosen.sample(400, window, np.random.default_rng(0), sampler=sampler)
            assert np.count_nonzero(batch.action < middle) == 200
        with pytest.raises(UsageError, match="expected items of the source"):
            store.sample(8, sampler=sampler)


@pytest.mark.parametrize("workers", [0, 2])
def test_strata_of_a_dataset_in_a_loader(workers, tmp_path):
    middle, count = two_policies(tmp_path / "store")
    dataset = ReplayDataset(tmp_path / "store")
    sampler = Stratified(dataset, {"demo": 1, None: 1})
    loader = dataset.loader(20, sampler=sampler, num_workers=workers, seed=0)
    found = [batch["action"].numpy() for _ in range(5) for batch in loader]
    demos = np.array([np.count_nonzero(each < middle) for each in found if len(each) == 20])
    assert np.abs(demos - 10).max() <= 4  # of each batch, although many are drawn at once
    total = np.concatenate(found)
    assert abs(np.count_nonzero(total < middle) - len(total) / 2) <= 5
    assert len(total) == 5 * count


def test_state_of_mixtures_goes_on_exactly(tmp_path):
    two_policies(tmp_path / "store")

    def mixed(store):
        inner = {None: Mixed([(Uniform(), 1), (Shuffled(pool=16, run=4, seed=1), 1)]), "demo": InOrder()}
        return Stratified(store, {"demo": 1, None: 2}, samplers=inner)

    with ReplayStore.open(tmp_path / "store") as store:
        sampler = mixed(store)
        actions(store, sampler, 50, at_once=10)
        again = mixed(store)
        again.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
        assert actions(store, again, 500, 10).tolist() == actions(store, sampler, 500, 10).tolist()
        again.check()
        with pytest.raises(UsageError, match="Stratified: expected a state of"):
            again.load_state_dict({"0": {}})


# ---- MixedStores


def test_stores_are_mixed_in_their_shares_and_told_apart(tmp_path):
    counts = [add_stream(tmp_path / name, steps, envs) for name, steps, envs in [("a", 50, 1), ("b", 40, 2)]]
    with ReplayStore.open(tmp_path / "a") as a, ReplayStore.open(tmp_path / "b") as b:
        mixed, rng = MixedStores([(a, 1), (b, 3)]), np.random.default_rng(0)
        seen = np.zeros((2, 80), int)
        for _ in range(200):
            batch = mixed.sample(40, Transition(n_step=2), rng)
            which, ids = batch.ids >> 60, batch.ids & ((1 << 60) - 1)
            assert np.bincount(which).tolist() == [10, 30]
            np.add.at(seen, (which, batch.action), 1)
            for number, store in enumerate((a, b)):
                items = store.items(Transition())
                again = store.read(items.numbers(ids[which == number]))
                assert np.array_equal(again.action, batch.action[which == number])
                assert np.array_equal(again.observation, batch.observation[which == number])
        for number in range(2):
            expected = np.full(counts[number], seen[number].sum() / counts[number])
            assert chi_square(seen[number][: counts[number]], expected) < 5


def test_stores_have_samplers_of_their_own_that_may_end_a_pass(tmp_path):
    add_stream(tmp_path / "a", 7)
    add_stream(tmp_path / "b", 9, level=5)
    with ReplayStore.open(tmp_path / "a") as a, ReplayStore.open(tmp_path / "b") as b:
        mixed = MixedStores([(a, 1), (b.where(pc.field("level") == 5), 1)])
        batch = mixed.sample(28, samplers=[InOrder(), Uniform()])
        assert batch.action[:14].tolist() == list(range(7)) * 2
        assert len(batch.ids) == 28


def test_nested_observations_are_joined(tmp_path):
    fields = [
        Field("observation/a", (2,), "float32"),
        Field("observation/b", (), "int8"),
        Field("x/y", (), "int8"),
    ]
    nested = Schema([*fields, *(field for field in schema().fields if field.name != "observation")])
    values = {"observation": {"a": np.ones((4, 2), np.float32), "b": np.arange(4, dtype=np.int8)}}
    rest = {"action": np.arange(3), "reward": np.zeros(3), "x": {"y": np.zeros(3, np.int8)}}
    ends = {"terminated": np.array([False, False, True]), "truncated": np.zeros(3, bool)}
    for name in ("a", "b"):
        with ReplayStore.create(tmp_path / name, nested) as store:
            store.add_episode(**values, **rest, **ends)
    with ReplayStore.open(tmp_path / "a") as a, ReplayStore.open(tmp_path / "b") as b:
        batch = MixedStores([(a, 1), (b, 1)]).sample(10)
        assert np.array_equal(batch.observation["b"], batch.action)
        assert batch.observation["a"].shape == (10, 2)
        assert batch.extra["x"]["y"].shape == (10,)


def test_stores_of_other_schemas_are_refused_with_the_difference(tmp_path):
    add_stream(tmp_path / "a", 5)
    other = Schema([*schema().fields, Field("log_prob", (), "float32")], columns={"level": "int64"})
    with (
        ReplayStore.open(tmp_path / "a") as a,
        ReplayStore.create(tmp_path / "b", other) as b,
        pytest.raises(UsageError, match=r"store 1 has another schema than the first: .* no field 'log_prob'"),
    ):
        MixedStores([(a, 1), (b, 1)])


# ---- wrong use


def test_wrong_use_is_refused(tmp_path):
    add_stream(tmp_path / "store", 5)
    with ReplayStore.open(tmp_path / "store") as store:
        one = Uniform()
        for make, message in [
            (lambda: Mixed([]), "Mixed: expected a list of pairs"),
            (lambda: Mixed([Uniform()]), "Mixed: expected a list of pairs"),
            (lambda: Mixed([("x", 1)]), "sampler: expected a Sampler"),
            (lambda: Mixed([(Uniform(), 0)]), "Mixed: expected shares above 0, got 0"),
            (lambda: Mixed([(one, 1), (one, 1)]), "a sampler object for each share, got one twice"),
            (lambda: Stratified(store, {}), "expected a dict of value to share"),
            (lambda: Stratified(store, {"a": -1}), "expected shares above 0, got -1"),
            (lambda: Stratified(store, {"a": 1}, by="no"), "expected an expression on stream, env"),
            (lambda: Stratified(store, {"a": 1}, by=3), "by: expected the name of a column"),
            (lambda: Stratified(store, {"a": 1}, by="level"), "expected values of level, int64, got 'a'"),
            (lambda: Stratified(store, {"a": 1}, samplers={"b": one}), "samplers: expected values among"),
            (lambda: MixedStores([(store, 1)] * 9), "expected up to 8 stores, got 9"),
            (lambda: MixedStores([("path", 1)]), "expected stores or selections"),
            (lambda: MixedStores([(store, 1)]).sample(0), "expected a batch size from 1, got 0"),
            (lambda: MixedStores([(store, 1)]).sample(5, samplers=[]), "samplers: expected 1, got 0"),
        ]:
            with pytest.raises(UsageError, match=message):
                make()
