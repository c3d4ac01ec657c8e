"""`ReplayDataset` and its loader against `store.read`."""

import pickle
import threading

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.utils.data import DataLoader

from replaystore import Field, ReplayStore, Schema, Transition, UsageError
from replaystore.dataset import ReplayDataset
from replaystore.errors import CorruptionError
from replaystore.recorder import schema_from_spaces

LENGTHS = (3, 40, 1, 17)
COUNT = sum(LENGTHS)
IMAGE = spaces.Box(0, 255, (84, 84), np.uint8)
VECTOR = spaces.Box(-1, 1, (3,), np.float32)
NESTED = spaces.Dict(camera=IMAGE, rest=spaces.Tuple([spaces.Discrete(5), VECTOR]))
ACTIONS = spaces.Dict(grip=spaces.MultiBinary(3), move=spaces.Box(-1, 1, (2,), np.float64))
SPACES = {
    "vector": (VECTOR, spaces.Discrete(4)),
    "image": (IMAGE, spaces.Discrete(4)),
    "nested": (NESTED, ACTIONS),
}
WINDOWS = {
    "plain": Transition(),
    "stacked": Transition(frame_stack=4),
    "n-step": Transition(n_step=3, gamma=0.9, frame_stack=2),
}
EXTRA = Field("info/lives", (), "int16")


def write_episodes(path, observation_space=VECTOR, action_space=SPACES["vector"][1], lengths=LENGTHS):
    """Make a store, or add to it, episodes of these lengths."""
    schema = schema_from_spaces(observation_space, action_space, fields=[EXTRA])
    store = ReplayStore.open(path, "a") if path.exists() else ReplayStore.create(path, schema)
    rng = np.random.default_rng(len(store))
    with store:
        for length in lengths:
            store.reset(observation_space.sample())
            for left in reversed(range(length)):
                values = (action_space.sample(), observation_space.sample(), rng.normal())
                store.step(*values, left == 0, False, info={"lives": np.int16(left)})
    return path


def expected_batch(path, numbers, window=None):
    """What the store reads, as the dict that the dataset promises."""
    with ReplayStore.open(path) as store:
        batch = store.read(np.asarray(numbers), window)
    named = {name: value for name, value in batch._asdict().items() if name != "extra"}
    return named | batch.extra


def assert_same(found, expected):
    """Tensors equal arrays: nesting, names, dtypes, shapes, values."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, child in expected.items():
            assert_same(found[name], child)
    elif isinstance(expected, tuple):
        for part, child in zip(found, expected, strict=True):
            assert_same(part, child)
    else:
        assert isinstance(found, torch.Tensor)
        np.testing.assert_array_equal(found.numpy(), expected, strict=True)


def tensors(value):
    if isinstance(value, (dict, tuple)):
        for child in value.values() if isinstance(value, dict) else value:
            yield from tensors(child)
    else:
        yield value


def ids(batches):
    return [batch["ids"].tolist() for batch in batches]


def all_ids(batches):
    return [each for batch in ids(batches) for each in batch]


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("kinds", SPACES.values(), ids=SPACES)
def test_items_and_batches_are_what_the_store_reads(kinds, window, tmp_path):
    path = write_episodes(tmp_path / "store", *kinds)
    dataset = ReplayDataset(path, window)
    assert len(dataset) == COUNT
    numbers = [0, 60, 2, 2, 43, 44]
    expected = expected_batch(path, numbers, window)
    items = dataset.__getitems__(numbers)
    assert_same(items.batch, expected)
    assert len(items) == len(numbers)
    for i, number in enumerate(numbers):
        one = expected_batch(path, [number], window)
        assert_same(dataset[number], map_first(one))
        assert_same(items[i], dataset[number])


def map_first(value):
    if isinstance(value, dict):
        return {name: map_first(child) for name, child in value.items()}
    return tuple(map(map_first, value)) if isinstance(value, tuple) else value[0]


def test_item_is_counted_from_the_end_or_refused(tmp_path):
    dataset = ReplayDataset(write_episodes(tmp_path / "store"))
    assert dataset[-1]["ids"] == dataset[COUNT - 1]["ids"]
    for number in (COUNT, -COUNT - 1):
        with pytest.raises(IndexError, match=str(number)):
            dataset[number]


@pytest.mark.parametrize(
    ("workers", "context"),
    [(0, None), (2, "fork"), (2, "spawn"), (2, "forkserver")],
    ids=["no worker", "fork", "spawn", "forkserver"],
)
def test_epoch_visits_each_transition_once_and_batches_are_what_the_store_reads(workers, context, tmp_path):
    path = write_episodes(tmp_path / "store", *SPACES["nested"])
    window = WINDOWS["stacked"]
    loader = ReplayDataset(path, window).loader(
        10, seed=3, num_workers=workers, multiprocessing_context=context, persistent_workers=workers > 0
    )
    number_of = {each: i for i, each in enumerate(expected_batch(path, range(COUNT))["ids"].tolist())}
    for _ in range(2):
        batches = list(loader)
        assert [len(batch["ids"]) for batch in batches] == [10] * 6 + [1]
        assert sorted(all_ids(batches)) == sorted(number_of)
        for batch in batches:
            numbers = [number_of[each] for each in batch["ids"].tolist()]
            assert_same(batch, expected_batch(path, numbers, window))


@pytest.mark.parametrize("workers", [0, 2])
def test_order_is_that_of_the_seed_and_new_in_each_epoch(workers, tmp_path):
    dataset = ReplayDataset(write_episodes(tmp_path / "store"))
    first, second, other = (dataset.loader(8, seed=seed, num_workers=workers) for seed in (5, 5, 6))
    epochs = [ids(first), ids(first)]
    assert epochs == [ids(second), ids(second)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != ids(other)


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_ahead_gives_the_same_batches(workers, tmp_path):
    dataset = ReplayDataset(write_episodes(tmp_path / "store", lengths=(600,)))
    loaders = [dataset.loader(9, seed=1, num_workers=workers, read_ahead=ahead) for ahead in (False, True)]
    for first, second in zip(*loaders, strict=True):
        assert_same(first, second)
    for batch in loaders[1]:
        assert len(batch["ids"]) == 9
        break  # and the thread ends with the loop
    assert [each for each in threading.enumerate() if "read-ahead" in each.name] == []


def test_error_while_reading_ahead_reaches_the_caller(tmp_path):
    path = write_episodes(tmp_path / "store", *SPACES["image"])
    loader = ReplayDataset(path).loader(COUNT, read_ahead=True)
    shard = next((path / "streams").glob("*/observation/c/0/0/0/0"))
    shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(CorruptionError, match=str(shard)):
        list(loader)


def test_order_without_shuffling_is_that_of_the_store(tmp_path):
    path = write_episodes(tmp_path / "store")
    loader = ReplayDataset(path).loader(9, shuffle=False)
    for _ in range(2):
        assert all_ids(loader) == expected_batch(path, range(COUNT))["ids"].tolist()


def test_global_random_state_is_not_touched(tmp_path):
    loader = ReplayDataset(write_episodes(tmp_path / "store")).loader(9)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    list(loader._index_sampler)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [25, 25, 11]), (True, [25, 25])])
def test_last_batch_is_short_or_dropped(drop_last, sizes, tmp_path):
    loader = ReplayDataset(write_episodes(tmp_path / "store")).loader(25, drop_last=drop_last)
    assert len(loader) == len(sizes)
    assert [len(batch["ids"]) for batch in loader] == sizes


@pytest.mark.parametrize("workers", [0, 1])
def test_plain_loader_of_torch_collates_the_same_batches(workers, tmp_path):
    path = write_episodes(tmp_path / "store", *SPACES["nested"])
    loader = DataLoader(ReplayDataset(path, WINDOWS["n-step"]), batch_size=20, num_workers=workers)
    start = 0
    for batch in loader:
        stop = min(start + 20, COUNT)
        found = {name: as_tuples(value) for name, value in batch.items()}
        assert_same(found, expected_batch(path, range(start, stop), WINDOWS["n-step"]))
        start = stop
    assert start == COUNT


def as_tuples(value):
    """Undo what torch's collating makes of tuples."""
    if isinstance(value, dict):
        return {name: as_tuples(child) for name, child in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def test_pickled_dataset_shows_the_same_commit(tmp_path):
    path = write_episodes(tmp_path / "store", *SPACES["image"])
    dataset = ReplayDataset(path, WINDOWS["stacked"])
    expected = expected_batch(path, range(COUNT), WINDOWS["stacked"])
    data = pickle.dumps(dataset)
    write_episodes(path, *SPACES["image"])
    again = pickle.loads(data)
    assert len(again) == COUNT
    assert_same(again.__getitems__(np.arange(COUNT)).batch, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_dataset_stays_at_its_commit_until_it_is_refreshed(workers, tmp_path):
    path = write_episodes(tmp_path / "store", *SPACES["image"])
    dataset = ReplayDataset(path)
    loader = dataset.loader(16, num_workers=workers)
    write_episodes(path, *SPACES["image"], lengths=(30,))
    assert (len(dataset), len(loader)) == (COUNT, 4)
    assert len(all_ids(loader)) == COUNT
    with pytest.raises(IndexError):
        dataset[COUNT]
    dataset.refresh()
    assert (len(dataset), len(loader)) == (COUNT + 30, 6)
    assert sorted(all_ids(loader)) == sorted(expected_batch(path, range(COUNT + 30))["ids"].tolist())


def test_persistent_workers_of_a_dataset_that_was_refreshed_ask_for_a_new_loader(tmp_path):
    path = write_episodes(tmp_path / "store")
    dataset = ReplayDataset(path)
    loader = dataset.loader(COUNT, num_workers=1, persistent_workers=True)
    assert len(all_ids(loader)) == COUNT
    write_episodes(path)
    dataset.refresh()
    with pytest.raises(UsageError, match="make a new loader"):
        list(loader)
    loader._iterator._shutdown_workers()  # left to the garbage collector, torch waits 5 s for its worker
    assert len(all_ids(dataset.loader(COUNT, num_workers=1, persistent_workers=True))) == 2 * COUNT


def test_batch_can_be_changed_without_changing_the_store(tmp_path):
    path = write_episodes(tmp_path / "store", *SPACES["nested"])
    dataset = ReplayDataset(path)
    for tensor in tensors(dataset.batch(np.arange(COUNT))):
        tensor.zero_()
    assert_same(dataset.batch(np.arange(COUNT)), expected_batch(path, range(COUNT)))


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True, None])
def test_batch_size_that_is_no_number_of_items_is_refused(batch_size, tmp_path):
    dataset = ReplayDataset(write_episodes(tmp_path / "store"))
    with pytest.raises(UsageError, match="batch_size"):
        dataset.loader(batch_size)


def test_loader_of_an_empty_store_is_refused(tmp_path):
    ReplayStore.create(tmp_path / "store", schema_from_spaces(VECTOR, VECTOR)).close()
    dataset = ReplayDataset(tmp_path / "store")
    assert len(dataset) == 0
    with pytest.raises(UsageError, match="at least one"):
        dataset.loader(8)


def test_error_in_a_worker_reaches_the_caller_with_its_message(tmp_path):
    path = write_episodes(tmp_path / "store", *SPACES["image"])
    loader = ReplayDataset(path).loader(COUNT, num_workers=1, persistent_workers=True)
    shard = next((path / "streams").glob("*/observation/c/0/0/0/0"))
    shard.write_bytes(b"\0" * shard.stat().st_size)
    batches = iter(loader)
    with pytest.raises(RuntimeError, match=str(shard)):
        next(batches)
    loader._iterator._shutdown_workers()  # left to the garbage collector, torch waits 5 s for its worker


def test_dataset_of_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a replaystore"):
        ReplayDataset(tmp_path)


def test_fields_of_other_dtypes_become_tensors_of_them(tmp_path):
    names = ["bool", "int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64"]
    extra = [Field(f"x/{name}", (2,), name) for name in names]
    schema = Schema([*schema_from_spaces(VECTOR, VECTOR).fields, *extra])
    with ReplayStore.create(tmp_path / "store", schema) as store:
        store.reset(VECTOR.sample())
        values = {name: np.array([1, 0]).astype(name) for name in names}
        store.step(VECTOR.sample(), VECTOR.sample(), 0.0, True, False, x=values)
    for workers in (0, 1):
        [batch] = ReplayDataset(tmp_path / "store").loader(1, num_workers=workers)
        assert {name: str(tensor.dtype) for name, tensor in batch["x"].items()} == {
            name: f"torch.{name}" for name in names
        }
        assert all(tensor[0].tolist() == [1, 0] for tensor in batch["x"].values())


def double_rewards(batch):
    return batch | {"reward": batch["reward"] * 2}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_transform_is_applied_to_every_batch(workers, tmp_path):
    path = write_episodes(tmp_path / "store")
    plain, doubled = ReplayDataset(path), ReplayDataset(path, transform=double_rewards)
    assert torch.equal(doubled[3]["reward"], 2 * plain[3]["reward"])
    batches = zip(plain.loader(8, seed=1), doubled.loader(8, seed=1, num_workers=workers), strict=True)
    for before, after in batches:
        assert_same(after, double_rewards(before))


def changed(**values):
    return lambda batch: batch | {name: value(batch["reward"]) for name, value in values.items()}


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (5, "expected a function"),
        (len, "return the dict of"),
        (changed(reward=lambda reward: reward[:2]), r"expected tensors of 3 items.*got one of shape \(2,\)"),
        (changed(mean=torch.mean), r"expected tensors of 3 items.*got one of shape \(\)"),
        (changed(reward=torch.Tensor.tolist), "expected tensors of 3 items.*got <class 'list'>"),
        (changed(reward=torch.Tensor.bfloat16), "expected tensors that numpy can hold"),
        (changed(reward=torch.Tensor.requires_grad_), "expected tensors that numpy can hold.*grad"),
    ],
)
def test_what_is_no_transform_is_refused(transform, message, tmp_path):
    path = write_episodes(tmp_path / "store")
    with pytest.raises(UsageError, match=message):
        ReplayDataset(path, transform=transform).batch(np.arange(3))
