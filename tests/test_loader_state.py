"""A loader that is stopped in mid-pass goes on as if it had not been, here and on several ranks."""

import io

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
import torch.multiprocessing
from growing import Actors, add_stream, schema
from torchdata.stateful_dataloader import StatefulDataLoader

import replaystore.dataset
import replaystore.loader
from replaystore import Field, ReplayStore, Schema, Sequence, Transition, UsageError
from replaystore.dataset import ReplayDataset
from replaystore.mixtures import Mixed, Stratified
from replaystore.prioritized import Once, Prioritized
from replaystore.samplers import InOrder, Recent, Shuffled, Uniform

SAMPLERS = {
    "default": lambda dataset: None,
    "uniform": lambda dataset: Uniform(),
    "epoch": lambda dataset: Uniform(replace=False, seed=3),
    "shuffled": lambda dataset: Shuffled(pool=64, run=16, seed=3),
    "in order": lambda dataset: InOrder(),
    "recent": lambda dataset: Recent(half_life=100),
    "prioritized": lambda dataset: Prioritized(),
    "once": lambda dataset: Once(draws=2),
    "mixed": lambda dataset: Mixed([(Uniform(), 1), (Shuffled(pool=16, run=4, seed=1), 2)]),
    "stratified": lambda dataset: Stratified(dataset, {0: 1, None: 1}, by="stream", stand_in=True),
}


NOT_ADAPTIVE = [kind for kind in SAMPLERS if kind not in ("prioritized", "once")]


@pytest.fixture
def path(tmp_path):
    """Two streams, 910 transitions."""
    count = add_stream(tmp_path / "store", 270, num_envs=3, level=1)
    add_stream(tmp_path / "store", 100, first=count, seed=1, level=2)
    return tmp_path / "store"


def kept(state):
    """A state as it comes back from a file that is not trusted."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def ids(batches):
    return [batch["ids"].tolist() for batch in batches]


def stop_and_go(make, stop, *, then=lambda: None, passes=1):
    """The batches from `stop` on of a loader that was not stopped, and of one that was; and the state."""
    loader = make()
    for _ in range(passes - 1):
        list(loader)
    batches, state = iter(loader), None
    for _ in range(stop):
        next(batches)
    state = kept(loader.state_dict())
    expected = ids(batches)
    expected += ids(loader)  # and the next pass
    then()
    again = make()
    again.load_state_dict(state)
    return expected, ids(again) + ids(again)


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("batch_size", [7, 32, 256, 300])
@pytest.mark.parametrize("together", [8, 256])
def test_loader_goes_on_with_the_same_batches(kind, batch_size, together, path, monkeypatch):
    monkeypatch.setattr(replaystore.dataset, "READ_AT_ONCE", together)

    def make():
        dataset = ReplayDataset(path)
        return dataset.loader(batch_size, sampler=SAMPLERS[kind](dataset), seed=1)

    for stop, passes in [(0, 1), (1, 1), (2, 1 if kind == "once" else 2), (3, 1)]:
        expected, found = stop_and_go(make, stop, passes=passes)
        assert found == expected
        assert sum(map(len, expected)) > 910


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 2},
        {"num_workers": 2, "persistent_workers": True},
        {"read_ahead": True},
        {"num_workers": 1, "read_ahead": True},
        {"drop_last": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["default", "shuffled", "stratified", "prioritized"])
def test_loader_goes_on_whoever_reads(kind, options, path):
    def make():
        dataset = ReplayDataset(path, Transition(n_step=2), where=pc.field("length") > 2)
        return dataset.loader(30, sampler=SAMPLERS[kind](dataset), seed=1, **options)

    expected, found = stop_and_go(make, 5)
    assert found == expected


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("kind", [*NOT_ADAPTIVE, "jittered"])
def test_batches_are_the_same_however_many_are_read_at_once(kind, drop_last, path, monkeypatch):
    monkeypatch.setattr(replaystore.dataset, "READ_AT_ONCE", 8)
    found = []
    for workers, small_bytes in ((0, 1), (0, 1 << 20), (2, 1 << 20)):
        monkeypatch.setattr(replaystore.loader, "SMALL_BYTES", small_bytes)
        dataset = ReplayDataset(path)
        sampler = Jittered(replace=False, seed=3) if kind == "jittered" else SAMPLERS[kind](dataset)
        loader = dataset.loader(10, sampler=sampler, seed=1, num_workers=workers, drop_last=drop_last)
        found.append(ids(loader) + ids(loader))
    assert found[0] == found[1] == found[2]


class Jittered(Uniform):
    """A user's own, whose draws depend on how many items they are."""

    def draw(self, items, n, rng):
        draw = super().draw(items, n, rng)
        return draw._replace(numbers=draw.numbers[rng.permutation(len(draw.numbers))])


def sizes_read(dataset, workers):
    return [len(drawn.numbers) for drawn in dataset.loader(4, num_workers=workers).batch_sampler]


def test_worker_reads_several_draws_at_once_but_few_at_the_ends_of_a_pass(path, monkeypatch):
    monkeypatch.setattr(replaystore.dataset, "READ_AT_ONCE", 8)
    found = sizes_read(ReplayDataset(path), workers=2)
    assert sum(found) == 910
    assert found[:4] == [8, 16, 32, 64]
    assert found[-4:] == [8, 8, 8, 6]
    assert max(found) > 128
    assert sizes_read(ReplayDataset(path), workers=0) == found, "as the items are small"
    monkeypatch.setattr(replaystore.loader, "SMALL_BYTES", 1)
    assert set(sizes_read(ReplayDataset(path), workers=0)) == {8, 6}


@pytest.mark.parametrize("limit", ["SENT_BYTES", "SENT_AT_ONCE"])
def test_worker_reads_one_draw_at_once_if_it_is_large(limit, path, monkeypatch):
    monkeypatch.setattr(replaystore.dataset, "READ_AT_ONCE", 8)
    monkeypatch.setattr(replaystore.loader, "SMALL_BYTES", 1)
    monkeypatch.setattr(replaystore.loader, limit, 1)
    assert set(sizes_read(ReplayDataset(path), workers=2)) == {8, 6}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pool_is_read_at_once_from_its_beginning_to_its_end(workers, path, monkeypatch):
    monkeypatch.setattr(replaystore.dataset, "READ_AT_ONCE", 8)
    dataset = ReplayDataset(path)
    loader = dataset.loader(4, sampler=Shuffled(pool=64, run=16), num_workers=workers)
    assert [len(drawn.numbers) for drawn in loader.batch_sampler] == [64] * 14 + [910 - 14 * 64]
    loader = dataset.loader(3, sampler=Shuffled(pool=64, run=16), num_workers=workers)
    ends = np.cumsum([len(drawn.numbers) for drawn in loader.batch_sampler])
    assert abs(ends[:14] - 64 * np.arange(1, 15)).max() <= 3, "two batches at a time, nearly a pool"
    monkeypatch.setattr(replaystore.loader, "POOL_BYTES", 30 * dataset.item_nbytes)
    monkeypatch.setattr(replaystore.loader, "SENT_AT_ONCE", 1)
    loader = dataset.loader(4, sampler=Shuffled(pool=64, run=16), num_workers=workers)
    assert [len(drawn.numbers) for drawn in loader.batch_sampler][:6] == [28, 28, 8] * 2


def test_what_is_not_read_together_is_not_read_by_pools(path):
    dataset, sampler = ReplayDataset(path), Shuffled(pool=64, run=16)
    assert [len(drawn.numbers) for drawn in dataset.batches(30, sampler)] == [30] * 30 + [10]
    sequences = ReplayDataset(path, Sequence(2)).loader(3, sampler=sampler)
    assert {len(drawn.numbers) for drawn in sequences.batch_sampler} <= {3, 2, 1}
    adaptive = Mixed([(sampler, 1), (Prioritized(), 1)])
    loader = dataset.loader(35, sampler=adaptive)
    assert {len(drawn.numbers) for drawn in loader.batch_sampler} == {35}


def test_of_a_share_of_a_pool_as_many_items_are_read_as_hold_a_whole_one():
    assert Mixed([(Uniform(), 3), (Shuffled(pool=64, run=16), 1)]).pool == 256
    assert Mixed([(Uniform(), 3), (InOrder(), 1)]).pool == 1


def test_what_a_transform_makes_may_be_large(path, monkeypatch):
    monkeypatch.setattr(replaystore.dataset, "READ_AT_ONCE", 8)
    monkeypatch.setattr(replaystore.loader, "SMALL_BYTES", 1)
    monkeypatch.setattr(replaystore.loader, "SENT_BYTES", 31 * ReplayDataset(path).item_nbytes)
    assert max(sizes_read(ReplayDataset(path), workers=2)) == 24
    calls = []
    assert set(sizes_read(ReplayDataset(path, transform=calls.append), workers=2)) == {8, 6}
    assert not calls, "it runs where batches are read, and nowhere else"


class NowAndThen(Uniform):
    """Weighs every other draw."""

    count = 0

    def draw(self, items, n, rng):
        self.count += 1
        draw = super().draw(items, n, rng)
        return draw._replace(weights=np.full(n, 0.5, np.float32) if self.count % 2 == 0 else None)


def test_weights_of_some_draws_are_kept_beside_those_of_none(path, monkeypatch):
    monkeypatch.setattr(replaystore.dataset, "READ_AT_ONCE", 8)
    found = []
    for workers in (0, 2):
        loader = ReplayDataset(path).loader(4, sampler=NowAndThen(), seed=0, num_workers=workers)
        found.append(torch.cat([batch["weights"] for batch in loader]).tolist())
    assert found[0] == found[1] == ([1] * 8 + [0.5] * 8) * 56 + [1] * 8 + [0.5] * 6


def draw_passes(batches, passes, found):
    for _ in range(passes):
        for batch in batches:
            found += batch.numbers.tolist()


def test_what_was_drawn_before_an_error_is_given(path, monkeypatch):
    monkeypatch.setattr(replaystore.dataset, "READ_AT_ONCE", 8)
    given = []
    for workers in (0, 2):
        sampler = Mixed([(Once(), 0.9), (Uniform(), 0.1)])
        loader = ReplayDataset(path).loader(4, sampler=sampler, seed=0, num_workers=workers)
        found = []
        with pytest.raises(UsageError, match="Once: expected items to draw"):
            draw_passes(loader.batch_sampler, 3, found)
        given.append(found)
    assert given[0] == given[1]


def test_state_is_the_same_whoever_reads(path):
    states = []
    for options in ({}, {"num_workers": 2}, {"read_ahead": True}):
        loader = ReplayDataset(path).loader(20, seed=1, **options)
        batches = iter(loader)
        for _ in range(14):
            next(batches)
        again = ReplayDataset(path).loader(20, seed=9, num_workers=1)
        again.load_state_dict(kept(loader.state_dict()))
        states.append(ids(again))
        del batches
    assert states[0] == states[1] == states[2]
    assert len(states[0]) == 46 - 14


@pytest.mark.parametrize(
    ("kind", "workers"), [*((kind, 0) for kind in SAMPLERS), ("default", 2), ("shuffled", 2)]
)
def test_loader_goes_on_after_the_store_grew_also_in_open_episodes(kind, workers, tmp_path):
    with ReplayStore.create(tmp_path / "store", schema(), 3) as store:
        actors = Actors(store, 3)
        actors.step(150)
        store.flush()
        assert store.items(Transition()).num_episodes > store.items(Transition()).num_closed

        def make():
            dataset = ReplayDataset(tmp_path / "store")
            return dataset.loader(16, sampler=SAMPLERS[kind](dataset), seed=1, num_workers=workers)

        def grow():
            actors.step(100)
            store.flush()
            add_stream(tmp_path / "store", 20, num_envs=2, seed=5)

        expected, found = stop_and_go(make, 9, then=grow)
        assert found == expected


def test_loader_goes_on_after_shards_were_repacked(tmp_path):
    fields = [Field("observation", (32, 32), "uint8", chunk_rows=2), *schema().fields[1:]]
    images = Schema(fields, columns={"level": "int64"}, shard_chunks=4)

    def write(store, start, episodes):
        for number in range(start, start + 5 * episodes, 5):
            numbers = np.arange(number, number + 6, dtype=np.uint8)
            store.add_episode(
                observation=np.broadcast_to(numbers[:, None, None], (6, 32, 32)).copy(),
                action=np.arange(number, number + 5),
                reward=np.zeros(5),
                terminated=np.arange(5) == 4,
                truncated=np.zeros(5, bool),
            )
            store.flush()

    with ReplayStore.create(tmp_path / "store", images) as store:
        write(store, 0, 5)
        loader = ReplayDataset(tmp_path / "store").loader(4, seed=0)
        batches = iter(loader)
        next(batches)
        state = kept(loader.state_dict())
        expected = [batch["observation"] for batch in batches]
        write(store, 25, 20)
    again = ReplayDataset(tmp_path / "store").loader(4, seed=3)
    again.load_state_dict(state)
    found = [batch["observation"] for batch in again]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_state_between_passes_begins_the_next_one(path):
    loader = ReplayDataset(path).loader(100, seed=0)
    states = [kept(loader.state_dict())]
    list(loader)
    states.append(kept(loader.state_dict()))
    expected = ids(loader)
    for state, number in zip(states, (0, 1), strict=True):
        again = ReplayDataset(path).loader(100, seed=0 if number == 0 else 5)
        again.load_state_dict(state)
        found = ids(again)
        assert len(found) == 10
        assert (found == expected) == (number == 1)


def test_state_in_the_body_of_the_last_turn_has_nothing_left_of_the_pass(path):
    loader = ReplayDataset(path).loader(100, seed=0)
    for _ in loader:
        state = kept(loader.state_dict())
    again = ReplayDataset(path).loader(100, seed=0)
    again.load_state_dict(state)
    assert ids(again) == []
    assert ids(again) == ids(loader)


def test_state_of_another_rank_or_sampler_is_refused(path):
    loader = ReplayDataset(path).loader(100)
    state = loader.state_dict()
    with pytest.raises(UsageError, match="expected that of rank 0 of 1, got"):
        loader.load_state_dict(state | {"share": (1, 2)})
    with pytest.raises(UsageError, match="Uniform: expected a state of"):
        ReplayDataset(path).loader(100, sampler=Uniform()).load_state_dict(state)
    with pytest.raises(UsageError, match="loader: expected a state of"):
        loader.load_state_dict({"sampler": {}})


# ---- torchdata


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls what torch renamed
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["default", "shuffled", "uniform", "stratified"])
@pytest.mark.parametrize("stop", [1, 5, 10])
def test_stateful_loader_of_torchdata_goes_on(kind, workers, stop, path):
    def make():
        dataset = ReplayDataset(path)
        batches = dataset.batches(100, SAMPLERS[kind](dataset), seed=1)
        collate = dataset.collate_fn()
        return StatefulDataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers)

    def grow():
        add_stream(path, 50, num_envs=3, seed=7)

    expected, found = stop_and_go(make, stop, then=grow)
    assert found == expected
    assert len(expected) == 10 - stop + 10


# ---- torch.distributed


SAMPLERS_OF_RANKS = {  # without seeds: the ranks have to agree
    "default": lambda: None,
    "shuffled": lambda: Shuffled(pool=64, run=16),
    "uniform": Uniform,
}


def rank_of_two(rank, path, folder, kind):
    """One rank: its batches of two passes, stopped in the first, kept in a file."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{kind}", rank=rank, world_size=2
    )
    replaystore.dataset.READ_AT_ONCE = 8  # of this process, so that several draws are read at once
    dataset = ReplayDataset(path)
    make = SAMPLERS_OF_RANKS[kind]
    loader = dataset.loader(32, sampler=make())
    batches = iter(loader)
    first = [next(batches)["ids"].tolist() for _ in range(5)]
    state = kept(loader.state_dict())
    rest = ids(batches)
    again = ReplayDataset(path).loader(32, sampler=make())
    again.load_state_dict(state)
    assert ids(again) == rest
    torch.save([first + rest, ids(again), len(loader)], f"{folder}/{kind}-{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", SAMPLERS_OF_RANKS)
def test_ranks_share_a_pass_without_overlap(kind, path, tmp_path):
    add_stream(path, 1, seed=3)  # 911 transitions: one is left over
    torch.multiprocessing.spawn(rank_of_two, (str(path), str(tmp_path), kind), nprocs=2)
    first, second = (torch.load(tmp_path / f"{kind}-{rank}") for rank in range(2))
    for one, other in zip(first[:2], second[:2], strict=True):
        assert [len(batch) for batch in one] == [len(batch) for batch in other]
        assert len(one) == first[2] == second[2]
        both = [each for batch in one + other for each in batch]
        assert len(both) == 910
        assert len(set(both)) == 910 or kind == "uniform"
    assert first[0] != first[1]
