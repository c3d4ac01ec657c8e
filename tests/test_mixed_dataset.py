"""Loaders of several stores: in their shares, with the stores' values, resumed exactly, whoever reads."""

import pickle

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
import torch.multiprocessing
from growing import add_stream, chi_square, schema
from test_dataset import NESTED, VECTOR, assert_same, write_episodes
from test_goals import GOAL, goal_store, reached
from test_loader_state import ids, kept, stop_and_go
from torchdata.stateful_dataloader import StatefulDataLoader

from replaystore import (
    Field,
    InOrder,
    Once,
    Prioritized,
    Recent,
    Relabelled,
    ReplayStore,
    Schema,
    Shuffled,
    Stratified,
    Transition,
    Uniform,
    UsageError,
)
from replaystore.dataset import ReplayDataset
from replaystore.mixed_dataset import MixedDataset

LOW = (1 << 60) - 1


@pytest.fixture
def paths(tmp_path):
    """A store of 300 transitions in two streams, and one of 90."""
    count = add_stream(tmp_path / "a", 80, num_envs=3, level=1)
    add_stream(tmp_path / "a", 60, first=count, seed=1, level=2)
    add_stream(tmp_path / "b", 90, seed=2)
    return tmp_path / "a", tmp_path / "b"


def mixed(paths, shares=(1, 3), *, window=None, where=None):
    first, second = (ReplayDataset(path, window, where=where) for path in paths)
    return MixedDataset([(first, shares[0]), (second, shares[1])])


def actions_of(batches):
    """By store, the actions of all batches, each of which is found right."""
    found = [[], []]
    for batch in batches:
        which = batch["ids"] >> 60
        assert torch.equal(batch["reward"], batch["action"] / 2)
        assert torch.equal(batch["next_observation"], batch["action"].float())
        for number in range(2):
            found[number] += batch["action"][which == number].tolist()
    return found


# ---- what is drawn


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_the_shares_and_the_items_are_even(workers, paths):
    loader = mixed(paths).loader(40, samplers=[Uniform(), Uniform()], seed=0, num_workers=workers)
    assert len(loader) == 10
    batches = [batch for _ in range(40) for batch in loader]
    found = actions_of(batches)
    assert abs(len(found[0]) - 390 * 40 / 4) <= 80, "less than one apart in each of 80 draws"
    seconds = [int((batch["ids"] >> 60).sum()) for batch in batches if len(batch["ids"]) == 40]
    assert abs(np.mean(seconds) - 30) < 0.2
    assert min(seconds) >= 26, "each batch has about its share, although many are read at once"
    for each, count in zip(found, (300, 90), strict=True):
        counts = np.bincount(each, minlength=count)
        assert len(counts) == count
        assert chi_square(counts, np.full(count, len(each) / count)) < 5


@pytest.mark.parametrize("workers", [0, 2])
def test_each_store_is_gone_through_before_anything_comes_again(workers, paths):
    loader = mixed(paths, (1, 1)).loader(13, seed=3, num_workers=workers)
    first, second = actions_of(loader)
    assert abs(len(first) - 195) <= 2
    assert len(set(first)) == len(first)
    for start in range(0, 180, 90):
        assert sorted(second[start : start + 90]) == list(range(90))
    assert actions_of(loader) != [first, second]
    assert len(first) + len(second) == 390


@pytest.mark.parametrize("window", [Transition(), Transition(n_step=3), Transition(frame_stack=2)])
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_what_the_stores_hold(workers, window, tmp_path):
    paths = [write_episodes(tmp_path / name, NESTED, lengths=lengths) for name, lengths in PARTS.items()]
    parts = [ReplayDataset(path, window) for path in paths]
    dataset = MixedDataset([(parts[0], 1), (parts[1], 1)])
    for batch in dataset.loader(9, seed=0, num_workers=workers):
        for number, part in enumerate(parts):
            here = batch["ids"] >> 60 == number
            own = part.items.numbers(batch["ids"][here].numpy() & LOW)
            expected = part.batch(own)
            expected["ids"] = expected["ids"] | number << 60
            assert_same(chosen(batch, here), arrays(expected))


PARTS = {"a": (9, 4), "b": (3, 20)}


def chosen(value, here):
    if isinstance(value, dict):
        return {name: chosen(child, here) for name, child in value.items()}
    return tuple(chosen(child, here) for child in value) if isinstance(value, tuple) else value[here]


def arrays(value):
    if isinstance(value, dict):
        return {name: arrays(child) for name, child in value.items()}
    return tuple(map(arrays, value)) if isinstance(value, tuple) else value.numpy()


def test_items_are_numbered_dataset_by_dataset(paths):
    dataset = mixed(paths)
    assert len(dataset) == 390
    assert dataset[299]["ids"] < 1 << 60
    assert dataset[300]["ids"] == 1 << 60
    assert dataset[-1]["action"] == 89
    with pytest.raises(IndexError, match="390"):
        dataset[390]
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again.batch(np.arange(390))["ids"], dataset.batch(np.arange(390))["ids"])


def test_parts_keep_their_conditions_and_samplers(paths):
    a = ReplayDataset(paths[0], where=pc.field("level") == 2)
    b = ReplayDataset(paths[1])
    dataset = MixedDataset([(a, 1), (b, 1)])
    prioritized = Prioritized()
    loader = dataset.loader(20, samplers=[prioritized, InOrder()], seed=0)
    first, second = actions_of(loader)
    assert set(first) <= set(range(240, 300))
    assert second == [number % 90 for number in range(len(second))]
    batch = next(iter(loader))
    here = batch["ids"] >> 60 == 0
    prioritized.update_priorities(batch["ids"][here].numpy() & LOW, np.full(int(here.sum()), 50.0))
    hot = set(batch["action"][here].tolist())
    batches = list(loader)
    found = actions_of(batches)[0]
    assert sum(each in hot for each in found) > 0.5 * len(found)
    assert len({weight for batch in batches for weight in batch["weights"].tolist()}) > 1


def doubled(batch):
    return batch | {"reward": batch["reward"] * 2}


@pytest.mark.parametrize("workers", [0, 2])
def test_parts_keep_their_transforms_and_windows(workers, tmp_path):
    for name in ("a", "b"):
        goal_store(tmp_path / name, lengths=(40,)).close()
    plain = ReplayDataset(tmp_path / "a", transform=doubled)
    hindsight = ReplayDataset(tmp_path / "b", Relabelled(reached))
    loader = MixedDataset([(plain, 1), (hindsight, 1)]).loader(8, seed=0, num_workers=workers)
    batches = list(loader)
    store = torch.cat([batch["ids"] >> 60 for batch in batches])
    goal = torch.cat([batch["observation"]["desired_goal"][:, 0] for batch in batches])
    assert (goal[store == 0] == GOAL).all()
    assert (torch.cat([batch["reward"] for batch in batches])[store == 0] == -2).all()
    assert 0 < (goal[store == 1] == GOAL).sum() < 20


# ---- going on


SAMPLERS = {
    "default": lambda parts: None,
    "uniform": lambda parts: [Uniform(), Recent(half_life=50)],
    "passes": lambda parts: [Shuffled(pool=32, run=8, seed=1), InOrder()],
    "adaptive": lambda parts: [Prioritized(), Once(draws=20)],
    "stratified": lambda parts: [Stratified(parts[0], {1: 1, 2: 1}, by="level"), Uniform()],
}


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}], ids=str
)
def test_loader_goes_on_with_the_same_batches_though_the_stores_grew(kind, options, paths):
    def make():
        parts = [ReplayDataset(path) for path in paths]
        dataset = MixedDataset([(parts[0], 1), (parts[1], 1)])
        return dataset.loader(30, samplers=SAMPLERS[kind](parts), seed=1, **options)

    def grow():
        for path in paths:
            add_stream(path, 30, seed=5, first=1000)

    expected, found = stop_and_go(make, 5, then=grow)
    assert found == expected
    assert len(expected) == 8 + 13


def test_state_of_a_loader_is_that_of_any_number_of_workers(paths):
    found = []
    for workers in (0, 2):
        loader = mixed(paths).loader(20, seed=1, num_workers=workers)
        batches = iter(loader)
        for _ in range(14):
            next(batches)
        again = mixed(paths).loader(20, seed=9, num_workers=1)
        again.load_state_dict(kept(loader.state_dict()))
        del batches
        found.append(ids(again))
    assert found[0] == found[1]
    assert len(found[0]) == 6


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls what torch renamed
@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_loader_of_torchdata_goes_on(workers, paths):
    def make():
        dataset = mixed(paths)
        batches, collate = dataset.batches(30, seed=1), dataset.collate_fn()
        return StatefulDataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers)

    expected, found = stop_and_go(make, 5)
    assert found == expected
    assert len(expected) == 8 + 13


def rank_of_two(rank, paths, folder):
    """One rank: its batches of a pass, without a seed, so that the ranks have to agree."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    loader = mixed(paths, (1, 1)).loader(20)
    torch.save([ids(loader), len(loader)], f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_ranks_share_a_pass_without_overlap(paths, tmp_path):
    torch.multiprocessing.spawn(rank_of_two, (paths, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    assert [len(batches) for batches, _ in found] == [10, 10] == [length for _, length in found]
    drawn = [each for batches, _ in found for batch in batches for each in batch]
    first = [each for each in drawn if each < 1 << 60]
    assert len(drawn) == 390
    assert abs(len(first) - 195) <= 10
    assert len(set(first)) == len(first)
    second = {each: drawn.count(each) for each in drawn if each >= 1 << 60}
    assert len(second) == 90
    assert set(second.values()) <= {2, 3}


def test_refresh_shows_the_newest_commits_and_persistent_workers_are_told(paths):
    dataset = mixed(paths)
    loader = dataset.loader(390, num_workers=1, persistent_workers=True)
    list(loader)
    add_stream(paths[1], 10, seed=5, first=1000)
    assert len(dataset) == 390
    dataset.refresh()
    assert len(dataset) == 400
    with pytest.raises(UsageError, match="make a new loader"):
        list(loader)
    loader._iterator._shutdown_workers()  # left to the garbage collector, torch waits 5 s for its worker
    dataset.close()
    assert dataset[399]["action"] == 1009


# ---- wrong use


def test_wrong_use_is_refused(paths, tmp_path):
    a, b = (ReplayDataset(path) for path in paths)
    ReplayStore.create(tmp_path / "empty", schema()).close()
    empty, longer = ReplayDataset(tmp_path / "empty"), ReplayDataset(paths[1], Transition(frame_stack=2))
    for make, message in [
        (lambda: MixedDataset([]), "MixedDataset: expected a list of pairs"),
        (lambda: MixedDataset([a, b]), "MixedDataset: expected a list of pairs"),
        (lambda: MixedDataset([(paths[0], 1)]), r"expected datasets such as ReplayDataset\(path\)"),
        (lambda: MixedDataset([(a, 1), (b, 0)]), "expected shares above 0, got 0"),
        (lambda: MixedDataset([(a, 1)] * 9), "MixedDataset: expected up to 8 stores, got 9"),
        (lambda: mixed(paths).loader(0), "batch_size: expected an int from 1, got 0"),
        (lambda: mixed(paths).loader(8, samplers=[Uniform()]), "samplers: expected 2, got 1"),
        (lambda: mixed(paths).loader(8, samplers=[Uniform(), 5]), "sampler: expected a Sampler"),
        (lambda: mixed(paths).loader(8, samplers=[Uniform()] * 2), "each share, got one twice"),
        (
            lambda: MixedDataset([(a, 1), (empty, 1)]).loader(8),
            "expected at least one transition, .*empty has",
        ),
        (
            lambda: MixedDataset([(a, 1), (longer, 1)]).batch(np.arange(390)),
            r"observation to be float32 of \(\) and float32 of \(2,\)",
        ),
        (
            lambda: mixed(paths).loader(8).load_state_dict(a.loader(8).state_dict()),
            "expected the commits of 2 datasets, got that of one",
        ),
        (
            lambda: mixed(paths).loader(8).load_state_dict(MixedDataset([(a, 1)]).loader(8).state_dict()),
            "expected the commits of 2 datasets, got those of 1",
        ),
    ]:
        with pytest.raises(UsageError, match=message):
            make()


def test_stores_of_other_schemas_are_refused_with_the_difference(paths, tmp_path):
    other = Schema([*schema().fields, Field("log_prob", (), "float32")], columns={"level": "int64"})
    ReplayStore.create(tmp_path / "other", other).close()
    parts = [(ReplayDataset(path), 1) for path in (paths[0], tmp_path / "other")]
    with pytest.raises(UsageError, match=r"MixedDataset: store 1 has another schema than the first: "):
        MixedDataset(parts)
    vector = write_episodes(tmp_path / "vector", VECTOR)
    with pytest.raises(UsageError, match="MixedDataset: store 1 has another schema"):
        MixedDataset([parts[0], (ReplayDataset(vector), 1)])
