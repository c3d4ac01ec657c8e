"""A run goes on from a checkpoint as if it had not been stopped."""

import contextlib
import io
import random
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
from faulty_disk import NEVER, small_schema
from recording import Recorder, check_transitions, observation, observations, schema

from replaystore import (
    CorruptionError,
    InOrder,
    Mixed,
    Once,
    Prioritized,
    Recent,
    ReplayStore,
    Shuffled,
    Transition,
    Uniform,
    UsageError,
)
from replaystore.checkpoints import checkpoint_names, checkpoint_path
from replaystore.dataset import ReplayDataset
from replaystore.errors import ClosedError, ReadOnlyError, WriterBusy
from replaystore.states import pack, unpack
from replaystore.verify import verify

pytestmark = pytest.mark.usefixtures("_no_syncs")

WINDOW = Transition(n_step=2, gamma=0.5)


class Run:
    """A run of several environments that depends on its generator alone; it can go on from a checkpoint."""

    def __init__(self, store, num_envs=1, sampler=None):
        self.store = store
        self.num_envs = num_envs
        self.sampler = Uniform() if sampler is None else sampler
        self.rng = np.random.default_rng(5)
        self.is_open = np.zeros(num_envs, bool)
        self.done = 0
        self.drawn = []

    def step(self, times):
        for _ in range(times):
            begin = ~self.is_open & (self.rng.random(self.num_envs) < 0.7)
            if begin.any():
                self.store.reset(self._images(), mask=begin, seed=self.done)
            self.is_open |= begin
            if self.is_open.any():
                self._step(self.is_open & (self.rng.random(self.num_envs) < 0.8))
            if len(self.store):
                self._draw()

    def _step(self, mask):
        if mask.any():
            ends = self.rng.random((2, self.num_envs)) < 0.15
            action, reward = np.arange(self.num_envs) + self.done, self.rng.random(self.num_envs)
            values = (action, self._images(), reward, *(ends & mask))
            if self.num_envs == 1:
                values = (action[0], values[1], reward[0], *(each[0] for each in values[3:]))
            self.store.step(*values, mask=mask)
            self.is_open &= ~(mask & ends.any(axis=0))
            self.done += self.num_envs

    def _images(self):
        images = observations(self.rng.integers(1 << 30, size=self.num_envs))
        return images if self.num_envs > 1 else images[0]

    def _draw(self):
        batch = self.store.sample(8, WINDOW, self.rng, sampler=self.sampler)
        if isinstance(self.sampler, Prioritized):
            self.sampler.update_priorities(batch.ids, self.rng.random(len(batch.ids)))
        self.drawn.append(values_of(batch))

    def checkpoint(self, name, **kwargs):
        state = {"is_open": self.is_open, "done": self.done}
        given = {"samplers": {"sampler": self.sampler}, "generators": {"rng": self.rng}}
        self.store.checkpoint(name, state, **given, **kwargs)

    def restore(self, name):
        given = {"samplers": {"sampler": self.sampler}, "generators": {"rng": self.rng}}
        state = self.store.restore(name, **given)
        self.is_open, self.done = state["is_open"], state["done"]


def values_of(batch):
    """A batch but for its ids and weights, as bytes."""
    return [
        getattr(batch, name).tobytes() for name in batch._fields if name not in ("ids", "weights", "extra")
    ]


def contents(store):
    """Everything that a store shows, in order, but for ids, rows and the time of day."""
    table = store.episodes.drop_columns(["first_row", "start_time"]).to_pylist()
    return table, values_of(store.read(np.arange(len(store)), WINDOW))


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Index parts of three episodes, and no commits but those asked for."""
    monkeypatch.setattr("replaystore.commit.PART_EPISODES", 3)
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", NEVER)


def make(path, num_envs=1):
    return ReplayStore.create(path, small_schema(), num_envs)


# ---- going on


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("before", [0, 1, 2, 7, 40, 90])
@pytest.mark.parametrize("lost", [0, 3, 60])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(num_envs, before, lost, tmp_path):
    with make(tmp_path / "whole", num_envs) as store:
        whole = Run(store, num_envs)
        whole.step(before)
        whole.checkpoint("here")
        head = len(whole.drawn)
        whole.step(70)
        expected = contents(store)
    with make(tmp_path / "stopped", num_envs) as store:
        run = Run(store, num_envs)
        run.step(before)
        run.checkpoint("here")
        run.step(lost)
    for _ in range(2):  # the second time what went on from the checkpoint is dropped
        with ReplayStore.open(tmp_path / "stopped", "a", at="here") as store:
            run = Run(store, num_envs)
            run.restore("here")
            store.check()
            run.step(70)
            store.check()
            assert contents(store) == expected
            assert run.drawn == whole.drawn[head:]
        assert list(verify(tmp_path / "stopped")) == []
    with ReplayStore.open(tmp_path / "stopped") as store:
        assert contents(store)[1] == expected[1]


def test_an_episode_that_was_open_goes_on_with_its_return_and_its_seed(tmp_path):
    with make(tmp_path / "store") as store:
        store.reset(observation(0), seed=7, policy="greedy")
        for number in range(3):
            store.step(number, observation(number + 1), 0.1, False, False)
        store.checkpoint("open")
        start = store.episodes["start_time"][0]
        store.step(9, observation(9), 9.0, True, False)
    with ReplayStore.open(tmp_path / "store", "a", at="open") as store:
        store.step(3, observation(4), 0.1, True, False)
    with ReplayStore.open(tmp_path / "store") as store:
        row = store.episodes.to_pylist()
        assert [(each["length"], each["seed"], each["policy"], each["terminated"]) for each in row] == [
            (4, 7, "greedy", True)
        ]
        assert row[0]["return"] == 0.1 + 0.1 + 0.1 + 0.1
        assert row[0]["start_time"] == start.as_py()
        assert store.episode(0)["action"].tolist() == [0, 1, 2, 3]
        assert np.array_equal(store.episode(0)["observation"], observations(np.arange(5)))


def test_an_open_episode_longer_than_the_ring_is_recorded_anew_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.ring.RING_BYTES", 1)
    with make(tmp_path / "store") as store:
        store.reset(observation(0))
        for number in range(200):
            store.step(number, observation(number + 1), number / 2, False, False)
        store.checkpoint("long")
        store.step(200, observation(0), 0.0, True, False)
    with ReplayStore.open(tmp_path / "store", "a", at="long") as store:
        assert check_transitions(store) == list(range(200))
        store.step(200, observation(201), 100.0, False, False)
        assert check_transitions(store) == list(range(201))
        store.flush()
        with ReplayStore.open(tmp_path / "store") as reader:
            assert check_transitions(reader) == list(range(201))
    assert list(verify(tmp_path / "store")) == []


def test_columns_with_open_episodes_of_very_different_lengths_go_on_together(tmp_path):
    with make(tmp_path / "store", 2) as store:
        images = observations(np.arange(2))
        store.reset(images)
        only_first = np.array([True, False])
        for _ in range(100):
            store.step(np.zeros(2, int), images, np.zeros(2), *np.zeros((2, 2), bool), mask=only_first)
        store.step(np.ones(2, int), images, np.ones(2), *np.zeros((2, 2), bool))
        store.checkpoint("here")
        before = contents(store)
    with ReplayStore.open(tmp_path / "store", "a", at="here") as store:
        assert contents(store) == before
        rows = store.episodes["first_row"].to_numpy() + store.episodes["length"].to_numpy()
        assert abs(rows[0] - rows[1]) < 32, "the columns end within a shard"
        store.step(np.ones(2, int), images, np.ones(2), *np.ones((2, 2), bool))
    assert list(verify(tmp_path / "store")) == []


def test_streams_of_other_writers_go_back_too(tmp_path):
    path = tmp_path / "store"
    with make(path) as store, ReplayStore.open(path, "a") as other:
        first, second = Recorder(store), Recorder(other, start=100)
        first.step(20)
        second.step(10)
        other.flush()
        store.refresh()
        first.step(15)
        store.checkpoint("here")
        before = check_transitions(store)
        assert before != sorted(before), "in the order in which the store came to know them"
        assert sorted(before) == [*range(35), *range(100, 110)]
        second.step(30)
        first.step(5)
        with ReplayStore.open(path, "a") as third:
            Recorder(third, start=500).step(12)
    with ReplayStore.open(path, "a", at="here") as store:
        assert check_transitions(store) == before, "in the order of then"
        assert sorted(store.episodes["stream"].unique().to_pylist()) == [0, 1]
        Recorder(store, start=35).step(7)
        assert check_transitions(store) == [*before, *range(35, 42)]
    assert list(verify(path)) == []
    with ReplayStore.open(path) as store:
        store.check()
        assert sorted(check_transitions(store)) == sorted([*before, *range(35, 42)])


@pytest.mark.parametrize("later", [0, 20, 100, 400])
def test_what_was_evicted_since_a_checkpoint_is_gone(later, tmp_path):
    path = tmp_path / "store"
    with ReplayStore.create(path, small_schema(), capacity=200) as store:
        recorder = Recorder(store)
        recorder.step(494)
        store.checkpoint("here")
        before = check_transitions(store)
        for _ in range(later // 10):
            recorder.step(10)
            store.flush()
    with ReplayStore.open(path, "a", at="here") as store:
        store.check()
        found = check_transitions(store)
        assert found == before[len(before) - len(found) :]
        assert len(found) > 100 - later
        recorder = Recorder(store, start=494)
        recorder._is_open = bool(store._moved)
        recorder.step(300)
        store.flush()
        found = check_transitions(store)
        assert found == list(range(found[0], 794))
        assert len(found) <= 200
    assert list(verify(path)) == []


def test_a_reader_sees_the_store_go_back_when_it_refreshes(tmp_path):
    path = tmp_path / "store"
    with make(path) as store:
        recorder = Recorder(store)
        recorder.step(25)
        store.checkpoint("here")
        recorder.step(60)
    with (
        ReplayStore.open(path) as reader,
        ReplayStore.open(path) as late,
        ReplayStore.open(path, "a", at="here") as store,
    ):
        reader.refresh()
        reader.check()
        assert check_transitions(reader) == list(range(25))
        recorder = Recorder(store, start=25)
        recorder._is_open = True
        recorder.step(90)
        store.flush()
        for each in (reader, late):  # what `late` missed is as long again
            each.refresh()
            each.check()
            assert check_transitions(each) == list(range(115))


def test_a_part_of_the_index_that_a_crash_left_is_never_taken_for_another(tmp_path):
    path = tmp_path / "store"
    with make(path) as store:
        recorder = Recorder(store)
        recorder.step(14)
        store.checkpoint("here")
        recorder.step(70)
    parts = path / "streams/000000/index"
    left = {file.name: file.read_bytes() for file in parts.iterdir()}
    with ReplayStore.open(path, "a", at="here") as store:
        assert not list(parts.iterdir()), "what came later is removed"
        for name, data in left.items():
            (parts / name).write_bytes(data)
        Recorder(store, start=14).step(35)
    assert {file.name: file.read_bytes() for file in parts.iterdir()} != left
    with ReplayStore.open(path) as store:
        store.check()
        assert check_transitions(store) == list(range(49))
    assert list(verify(path)) == []


# ---- samplers, generators, loaders


SAMPLERS = {
    "uniform": Uniform,
    "epoch": lambda: Uniform(replace=False, seed=3),
    "shuffled": lambda: Shuffled(pool=32, run=8, seed=3),
    "in order": InOrder,
    "recent": lambda: Recent(half_life=10),
    "prioritized": Prioritized,
    "mixed": lambda: Mixed([(Uniform(), 1), (Shuffled(pool=16, run=4, seed=1), 2)]),
}


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("before", [35, 36, 37, 38, 39])
def test_every_sampler_goes_on_with_the_same_draws(kind, before, tmp_path):
    with make(tmp_path / "whole") as store:
        whole = Run(store, sampler=SAMPLERS[kind]())
        whole.step(before)
        whole.checkpoint("here")
        head = len(whole.drawn)
        whole.step(40)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    with ReplayStore.open(tmp_path / "stopped", "a", at="here") as store:
        run = Run(store, sampler=SAMPLERS[kind]())
        run.restore("here")
        run.step(40)
        assert run.drawn == whole.drawn[head:]
        run.sampler.check()


def test_priorities_of_an_open_episode_stay_with_its_transitions(tmp_path):
    with make(tmp_path / "store", 2) as store:
        run, sampler = Run(store, 2), Prioritized(alpha=1.0)
        run.step(30)
        batch = store.read(np.arange(len(store)), WINDOW)
        store.sample(1, WINDOW, run.rng, sampler=sampler)
        sampler.update_priorities(batch.ids, np.arange(len(store)))
        expected = sampler.probability(store.items(WINDOW), np.arange(len(store)))
        assert run.is_open.any()
        store.checkpoint("here", samplers={"per": sampler})
    with ReplayStore.open(tmp_path / "store", "a", at="here") as store:
        again = Prioritized(alpha=1.0)
        store.restore("here", samplers={"per": again})
        assert not np.array_equal(store.read(np.arange(len(store)), WINDOW).ids, batch.ids)
        assert np.allclose(again.probability(store.items(WINDOW), np.arange(len(store))), expected)
        again.check()


def test_items_drawn_once_are_not_drawn_again(tmp_path):
    with make(tmp_path / "store") as store:
        Recorder(store).step(25)
        once = Once()
        first = store.sample(20, WINDOW, sampler=once).action
        store.checkpoint("here", samplers={"once": once})
    with ReplayStore.open(tmp_path / "store", "a", at="here") as store:
        once = Once()
        store.restore("here", samplers={"once": once})
        rest = store.sample(20, WINDOW, sampler=once).action
        assert sorted([*first, *rest]) == list(range(25))


def test_generators_go_on_given_and_shared(tmp_path):
    def draw():
        return (
            [generator.random() for generator in generators.values()],
            torch.rand(2, generator=own).tolist(),
            random.random(),
            np.random.random(),  # noqa: NPY002
            torch.rand(2).tolist(),
        )

    kinds = (np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64, np.random.PCG64DXSM)
    generators = {kind.__name__: np.random.Generator(kind(1)) for kind in kinds}
    own = torch.Generator()
    with make(tmp_path / "store") as store:
        store.checkpoint("here", generators={**generators, "own": own})
        expected = draw()
        assert draw() != expected
        store.restore("here", generators={**generators, "own": own})
        assert draw() == expected


def test_a_loader_goes_on_in_mid_pass(tmp_path):
    path = tmp_path / "store"
    with make(path) as store:
        recorder = Recorder(store)
        recorder.step(40)
        store.flush()
        loader = ReplayDataset(path).loader(4, seed=3)
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        store.checkpoint("here", loader=loader)
        expected = [batch["action"].tolist() for batch in batches]
        recorder.step(30)
    with ReplayStore.open(path, "a", at="here") as store:
        loader = ReplayDataset(path).loader(4, seed=3)
        store.restore("here", loader=loader)
        assert [batch["action"].tolist() for batch in loader] == expected


# ---- what a checkpoint keeps


def test_a_state_comes_back_as_it_was(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    state = {
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "arrays": [
            np.arange(6).reshape(2, 3)[:, ::2],
            np.zeros((0, 3)),
            np.array(3, ">i4"),
            np.array([True]),
        ],
        "plain": (1, -(2**127), 2.5, True, None, "x → ሴ", b"\x00\xff", b""),
        "scalars": [np.float64(2.5), np.int8(-1), np.bool_(True)],
        7: torch.arange(10**6)[:3],
        "types": [torch.zeros(2, dtype=torch.bfloat16), torch.nn.Parameter(torch.ones(1))],
    }
    with make(tmp_path / "store") as store:
        store.checkpoint("here", state)
        found = store.restore("here")
    assert checkpoint_path(tmp_path / "store", "here").stat().st_size < 100_000
    module.load_state_dict(found["module"])
    optimizer.load_state_dict(found["optimizer"])
    assert found["module"]._metadata == state["module"]._metadata
    for name, tensor in state["module"].items():
        assert torch.equal(found["module"][name], tensor)
    for ours, theirs in zip(found["arrays"], state["arrays"], strict=True):
        assert np.array_equal(ours, theirs)
        assert (ours.shape, ours.dtype.kind) == (theirs.shape, theirs.dtype.kind)
        ours[...] = 0  # can be written
    assert found["plain"] == state["plain"]
    assert [(type(value), value) for value in found["scalars"]] == [(type(v), v) for v in state["scalars"]]
    assert torch.equal(found[7], torch.arange(3))
    assert found["types"][0].dtype == torch.bfloat16


LOOP = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({"a": [1, {"b": object()}]}, r"state\['a'\]\[1\]\['b'\]"),
        ({"f": print}, r"state\['f'\]"),
        ([{1, 2}], r"state\[0\]"),
        ({"names": np.array(["a"])}, r"state\['names'\]"),
        ({"objects": np.array([None])}, r"state\['objects'\]"),
        ({(1, 2): 3}, "state"),
        ({"replaystore": 3}, "state"),
        ({"huge": 1 << 5000}, r"state\['huge'\]"),
        ({"meta": torch.zeros(2, device="meta")}, r"state\['meta'\]"),
        ({"sparse": torch.zeros(2).to_sparse()}, r"state\['sparse'\]"),
        (LOOP, r"state\[0\]"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_its_place_and_nothing_is_written(state, place, tmp_path):
    with make(tmp_path / "store") as store:
        with pytest.raises(UsageError, match=place):
            store.checkpoint("here", state)
        assert not (tmp_path / "store/checkpoints").exists()


def test_a_packed_value_of_a_stranger_runs_nothing():
    file = io.BytesIO()
    torch.save({"evil": print}, file)
    with pytest.raises(ValueError, match="packed by a checkpoint"):
        unpack(file.getvalue())
    for bad in (b"", b"junk", pack({"a": 1})[:-30]):
        with pytest.raises(ValueError, match="packed by a checkpoint"):
            unpack(bad)
    assert type(unpack(pack(OrderedDict(a=(1, [2]))))) is OrderedDict


def test_a_checkpoint_of_many_rows_is_as_small_as_one_of_few(tmp_path):
    with make(tmp_path / "store") as store:
        recorder = Recorder(store)
        recorder.step(14)
        store.checkpoint("few")
        for _ in range(20):
            recorder.bulk(1_000)
        store.checkpoint("many")
    few, many = (checkpoint_path(tmp_path / "store", name).stat().st_size for name in ("few", "many"))
    assert many < few + 20_000


def test_keep_leaves_the_newest_checkpoints(tmp_path):
    with make(tmp_path / "store") as store:
        recorder = Recorder(store)
        for number in range(6):
            recorder.step(3)
            store.checkpoint(f"step-{number}", number, keep=None if number < 3 else 2)
        assert checkpoint_names(store.path) == ["step-4", "step-5"]
        store.checkpoint("step-4", "again")
        assert checkpoint_names(store.path) == ["step-5", "step-4"], "by when they were made"
        assert store.restore("step-4") == "again"
        assert store.restore("step-5") == 5


# ---- wrong use


@pytest.fixture
def begun(tmp_path):
    """A store with a checkpoint at 25 of its 40 transitions."""
    with make(tmp_path / "store") as store:
        recorder = Recorder(store)
        recorder.step(25)
        store.checkpoint(
            "here", {"x": 1}, samplers={"a": Uniform()}, generators={"g": np.random.default_rng()}
        )
        recorder.step(15)
    return tmp_path / "store"


@pytest.fixture
def unchanged(begun):
    """Nothing in a store has changed at the end of a test."""

    def files():
        return {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}

    before = files()
    yield
    assert files() == before


NAMES = ["", "a/b", "..", "a.b", ".a", "-a", "a b", "ä", "x" * 101, "a\n", None, 3, b"a", "a\x00"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_plain_word_is_refused(name, begun):
    with ReplayStore.open(begun, "a") as store:
        for call in (store.checkpoint, store.restore):
            with pytest.raises(UsageError, match="expected a name"):
                call(name)
    if name is not None:
        with pytest.raises(UsageError, match="expected a name"):
            ReplayStore.open(begun, "a", at=name)


@pytest.mark.usefixtures("unchanged")
def test_a_missing_checkpoint_is_said_with_those_there_are(begun):
    with pytest.raises(UsageError, match="'there', found here"):
        ReplayStore.open(begun, "a", at="there")
    with ReplayStore.open(begun) as store, pytest.raises(UsageError, match="'there', found here"):
        store.restore("there")


def test_a_store_without_checkpoints_says_so(tmp_path):
    with make(tmp_path / "store") as store, pytest.raises(UsageError, match="found none"):
        store.restore("here")
    assert checkpoint_names(tmp_path / "store") == []


@pytest.mark.usefixtures("unchanged")
def test_arguments_that_make_no_sense_are_refused(begun):
    with pytest.raises(UsageError, match="mode"):
        ReplayStore.open(begun, at="here")
    with pytest.raises(UsageError, match="heads"):
        ReplayStore.open(begun, "a", at="here", heads={})
    with pytest.raises(UsageError, match="num_envs: expected 1"):
        ReplayStore.open(begun, "a", at="here", num_envs=2)
    with ReplayStore.open(begun) as store:
        with pytest.raises(ReadOnlyError):
            store.checkpoint("there")
        for wrong, match in [
            ({"samplers": {"b": Uniform()}}, r"\['a'\], got 'b'"),
            ({"samplers": {"a": InOrder()}}, "expected a Uniform"),
            ({"samplers": {"a": 3}}, "expected a Sampler"),
            ({"samplers": [3]}, "expected a dict"),
            ({"generators": {"g": np.random.Generator(np.random.MT19937())}}, "expected a PCG64"),
            ({"generators": {"g": np.random.RandomState()}}, "expected a numpy.random.Generator"),
            ({"loader": 3}, "loader"),
            ({"loader": ReplayDataset(begun).loader()}, "kept none"),
        ]:
            with pytest.raises(UsageError, match=match):
                store.restore("here", **wrong)
        assert store.restore("here") == {"x": 1}
    with pytest.raises(ClosedError):
        store.restore("here")


@pytest.mark.parametrize("keep", [0, -1, True, 1.0, "2"])
def test_keep_is_a_positive_int(keep, begun):
    with ReplayStore.open(begun, "a") as store, pytest.raises(UsageError, match="keep"):
        store.checkpoint("there", keep=keep)


@pytest.mark.usefixtures("unchanged")
def test_a_damaged_checkpoint_is_noticed_wherever_it_is(begun):
    path = checkpoint_path(begun, "here")
    whole = path.read_bytes()
    for place in range(0, len(whole), 23):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
        with ReplayStore.open(begun) as store, contextlib.suppress(CorruptionError):
            assert store.restore("here") == {"x": 1}, "a byte that says nothing"
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptionError, match=r"here\.arrow"):
            ReplayStore.open(begun, "a", at="here")
    path.write_bytes(whole)


def test_a_checkpoint_of_another_store_is_refused(begun, tmp_path):
    with make(tmp_path / "other") as store:
        Recorder(store).step(40)
        store.checkpoint("own")
    shutil.copy(checkpoint_path(begun, "here"), checkpoint_path(tmp_path / "other", "here"))
    with pytest.raises(UsageError, match="this store"):
        ReplayStore.open(tmp_path / "other", "a", at="here")
    with ReplayStore.open(tmp_path / "other", "a", at="own") as store:
        assert len(store) == 40


def test_a_copy_that_went_another_way_does_not_take_the_checkpoint(begun, tmp_path):
    with ReplayStore.open(begun, "a") as store:
        shutil.copytree(begun, tmp_path / "copy")
        Recorder(store, start=50).step(7)
        store.checkpoint("later")
    shutil.copy(checkpoint_path(begun, "later"), checkpoint_path(tmp_path / "copy", "later"))
    with pytest.raises(UsageError, match="another store"):
        ReplayStore.open(tmp_path / "copy", "a", at="later")


def test_a_checkpoint_whose_rows_were_set_aside_is_refused(begun):
    with ReplayStore.open(begun, "a") as store:
        store.checkpoint("later")
    with ReplayStore.open(begun, "a", at="here") as store:
        Recorder(store, start=25).step(30)
    with pytest.raises(UsageError, match="set aside"):
        ReplayStore.open(begun, "a", at="later")
    with ReplayStore.open(begun, "a", at="here") as store:
        assert check_transitions(store) == list(range(25))


@pytest.mark.usefixtures("unchanged")
def test_a_store_that_is_being_written_does_not_go_back(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "busy")
    with ReplayStore.open(tmp_path / "busy", "a"), pytest.raises(WriterBusy, match="000000"):
        ReplayStore.open(tmp_path / "busy", "a", at="here")
    with ReplayStore.open(tmp_path / "busy", "a", at="here") as store:
        assert len(store) == 25, "and then it does"


def test_the_whole_schema_of_a_store_can_be_checkpointed(tmp_path):
    with ReplayStore.create(tmp_path / "store", schema()) as store:
        Recorder(store).step(9)
        store.checkpoint("here")
    with ReplayStore.open(tmp_path / "store", "a", at="here") as store:
        assert check_transitions(store) == list(range(9))
