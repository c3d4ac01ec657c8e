"""What is wrong is refused with what was expected and found, writes nothing, and does no harm."""

import os
import re
import tempfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_head import SCHEMA as HEAD_SCHEMA
from test_metadata import root
from test_processes import in_fork
from test_store import small_episode, small_schema
from test_windows import FLAGS

from replaystore import (
    Field,
    FormatError,
    ReplayStore,
    ReplayStoreError,
    Schema,
    SchemaError,
    Transition,
    UsageError,
)
from replaystore.errors import FormatTooNew, ReadOnlyError
from replaystore.recorder import RecordReplay

pytestmark = pytest.mark.usefixtures("_no_syncs")

FRAME = np.arange(900, dtype=np.uint8).reshape(30, 30)


def schema():
    """A packed frame, a vector, a level that is an integer, and a field of the user's."""
    return Schema(
        [
            Field("observation/frame", (30, 30), "uint8", chunk_rows=4),
            Field("observation/vector", (2,), "float32"),
            Field("action", (), "int64"),
            Field("reward", (), "float64"),
            *FLAGS,
            Field("level", (), "int32"),
        ],
        columns={"score": "float64", "name": "string"},
        file_rows=4096,
    )


def observation(i=0, num_envs=1):
    lead = (num_envs,) if num_envs > 1 else ()
    vector = np.full((*lead, 2), i, "float32")
    return {"frame": np.broadcast_to(FRAME + np.uint8(i), (*lead, 30, 30)), "vector": vector}


def step(i=0, num_envs=1, **changed):
    """The arguments of a good step, some of them changed; ... leaves one out."""
    lead = (num_envs,) if num_envs > 1 else ()
    good = {
        "action": np.full(lead, i)[()],
        "observation": observation(i, num_envs),
        "reward": np.full(lead, float(i))[()],
        "terminated": np.zeros(lead, bool)[()],
        "truncated": np.zeros(lead, bool)[()],
        "level": np.full(lead, i, "int32")[()],
    }
    return {name: value for name, value in (good | changed).items() if value is not ...}


def whole(length=3, **changed):
    """The arguments of a good `add_episode`."""
    good = {
        "observation": observation(1, length + 1)
        if length
        else {name: v[None] for name, v in observation(1).items()},
        "action": np.arange(length),
        "reward": np.zeros(length),
        "terminated": np.arange(length) == length - 1,
        "truncated": np.zeros(length, bool),
        "level": np.zeros(length, "int32"),
    }
    return {name: value for name, value in (good | changed).items() if value is not ...}


def content(store):
    """All that a store holds and all the bytes of its files."""
    store.flush()
    table = store.episodes.to_pylist()
    arrays = [store.episode(i)["action"].tolist() for i in range(len(table))]
    files = {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()}
    return len(store), table, arrays, files


def refused(store, error, message, call, *arguments, **keywords):
    """Assert that a call is refused, has written nothing, and leaves the store as usable as before."""
    before = content(store)
    with pytest.raises(error, match=message) as caught:
        call(*arguments, **keywords)
    assert isinstance(caught.value, ReplayStoreError)
    assert content(store) == before
    store.check()
    num_envs = store.episodes["env"].to_pylist() and max(store.episodes["env"].to_pylist()) + 1
    count = len(store)
    store.step(**step(7, num_envs))
    store.flush()
    assert len(store) == count + num_envs


@pytest.fixture(params=[1, 2], ids=["one env", "two envs"])
def num_envs(request):
    return request.param


@pytest.fixture
def store(tmp_path, num_envs):
    """A store in which an episode is open."""
    with ReplayStore.create(tmp_path / "store", schema(), num_envs) as opened:
        opened.reset(observation(0, num_envs))
        for i in range(3):
            opened.step(**step(i, num_envs))
        yield opened


def each(value, num_envs):
    """A value for every environment."""
    return value if num_envs == 1 else np.stack([np.asarray(value)] * num_envs)


# ---- step

WRONG_STEPS = {
    "int for a frame": ({"frame": np.zeros((30, 30), "int64")}, r"'observation/frame': expected uint8 .*, got int64"),
    "float for a frame": ({"frame": np.zeros((30, 30))}, r"'observation/frame': expected uint8 .*, got float64"),
    "frame with a channel": ({"frame": FRAME[..., None]}, r"expected uint8 of shape .*30, 30\), got .*30, 30, 1\)"),
    "frame of another size": ({"frame": FRAME[:29]}, r"expected uint8 of shape .*30, 30\), got .*29, 30\)"),
    "flattened frame": ({"frame": FRAME.ravel()}, r"got uint8 of shape \((2, )?900,?\)"),
    "float64 for float32": ({"vector": np.zeros(2)}, "'observation/vector': expected float32 .*, got float64"),
    "int for float32": ({"vector": np.zeros(2, int)}, "'observation/vector': expected float32 .*, got int64"),
    "object": ({"vector": np.array([1, None])}, "'observation/vector': expected float32 .*, got object"),
    "strings": ({"vector": np.array(["1", "2"])}, "'observation/vector': expected float32 .*, got <U1"),
    "complex": ({"vector": np.zeros(2, complex)}, "'observation/vector': expected float32 .*, got complex"),
    "NaN for an int": ({"level": float("nan")}, "'level': expected int32 .*, got float64"),
    "float for an int": ({"action": 1.0}, "'action': expected int64 .*, got float64"),
    "too large an int": ({"level": 2**31}, "'level': expected int32 .*, got int64"),
    "bool for an int": ({"action": True}, "'action': expected int64 .*, got bool"),
    "text for a reward": ({"reward": "1.0"}, "'reward': expected float64 .*, got <U3"),
    "no reward": ({"reward": None}, "'reward'"),
    "complex reward": ({"reward": 1j}, "'reward': expected float64 .*, got complex128"),
    "vector reward": ({"reward": np.zeros(3)}, r"'reward': expected float64 of shape .*, got .*3"),
    "int for a flag": ({"terminated": 1}, "'terminated': expected bool .*, got int64"),
    "text for a flag": ({"truncated": "no"}, "'truncated': expected bool .*, got <U2"),
    "reward with a gradient": ({"reward": torch.tensor(1.0, requires_grad=True)}, "'reward': expected float64"),
    "bfloat16": ({"vector": torch.zeros(2, dtype=torch.bfloat16)}, "'observation/vector': expected float32"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_STEPS)
def test_a_step_with_a_wrong_value_is_refused(store, num_envs, wrong):
    values, message = WRONG_STEPS[wrong]
    arguments = step(9, num_envs)
    for name, value in values.items():
        if torch.is_tensor(value) and num_envs > 1:
            value = torch.stack([value] * num_envs)
        elif num_envs > 1:
            value = np.stack([value] * num_envs)
        if name in arguments:
            arguments[name] = value
        else:
            arguments["observation"] = arguments["observation"] | {name: value}
    refused(store, SchemaError, message, store.step, **arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"level": ...}, r"missing \['level'\]"),
        ({"other": 1}, r"unknown \['other'\]"),
        ({"observation": {"frame": FRAME}}, r"'observation': expected parts \['frame', 'vector'\], got \['frame'\]"),
        ({"observation": FRAME}, "'observation': expected parts .*, got ndarray"),
        ({"observation": None}, "'observation': expected parts .*, got NoneType"),
    ],
)  # fmt: skip
def test_a_step_with_other_fields_is_refused(store, num_envs, changed, message):
    refused(store, SchemaError, message, store.step, **step(9, num_envs, **changed))


@pytest.mark.parametrize("field", ["action", "reward", "terminated", "level"])
def test_a_step_of_another_number_of_environments_is_refused(store, num_envs, field):
    other = np.stack([step(9)[field]] * (num_envs + 1))
    shape = re.escape(str((num_envs,) if num_envs > 1 else ()))
    message = rf"field '{field}': expected {other.dtype} of shape {shape}, got .* \({num_envs + 1},\)"
    refused(store, SchemaError, message, store.step, **step(9, num_envs, **{field: other}))


@pytest.mark.parametrize(
    "mask",
    [[True], np.ones(3, bool), np.ones((2, 2), bool), np.ones(2, int), "yes", True, [1, 0], np.array(None)],
)
@pytest.mark.parametrize("call", ["step", "reset"])
def test_what_is_no_mask_is_refused(tmp_path, call, mask):
    with ReplayStore.create(tmp_path / "store", schema(), 2) as store:
        store.reset(observation(0, 2))
        store.step(**step(0, 2))
        arguments = step(9, 2) if call == "step" else {"observation": observation(0, 2)}
        refused(
            store, UsageError, "mask: expected 2 bools, got", getattr(store, call), **arguments, mask=mask
        )


def test_a_step_before_reset_is_refused(tmp_path, num_envs):
    with ReplayStore.create(tmp_path / "store", schema(), num_envs) as store:
        with pytest.raises(UsageError, match="step before reset"):
            store.step(**step(0, num_envs))
        store.reset(observation(0, num_envs))
        store.step(**step(0, num_envs))
        assert len(store) == num_envs


@pytest.mark.parametrize("flag", ["terminated", "truncated"])
def test_a_step_behind_an_episodes_end_is_refused(store, num_envs, flag):
    store.step(**step(1, num_envs, **{flag: each(True, num_envs)}))
    before = content(store)
    with pytest.raises(UsageError, match="step before reset"):
        store.step(**step(2, num_envs))
    assert content(store) == before


def test_a_step_of_some_environments_needs_only_their_episodes(tmp_path):
    with ReplayStore.create(tmp_path / "store", schema(), 2) as store:
        store.reset(observation(0, 2), mask=np.array([True, False]))
        with pytest.raises(UsageError, match=r"environments \[1\] have no open episode"):
            store.step(**step(0, 2))
        store.step(**step(0, 2), mask=np.array([True, False]))
        store.step(**step(0, 2), mask=np.array([False, False]))
        assert len(store) == 1


# ---- reset


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"observation": observation() | {"vector": np.zeros(3)}},
            r"'observation/\w+': expected \w+ of shape",
        ),
        ({"observation": FRAME}, "'observation': expected parts"),
        ({"seed": -1}, "seed: expected"),
        ({"seed": 1.5}, "seed: expected"),
        ({"seed": "7"}, "seed: expected"),
        ({"seed": [1, 2, 3]}, "seed: expected"),
        ({"seed": 2**63}, "seed: expected"),
        ({"policy": 5}, "policy"),
        ({"policy": "\ud800"}, "policy"),
        ({"columns": {"other": 1}}, r"expected episode columns of \['score', 'name'\], got \['other'\]"),
        ({"columns": {"score": "high"}}, "episode column 'score': expected .*float.*, got 'high'"),
        ({"columns": {"score": 10**400}}, "episode column 'score': expected"),
        ({"columns": {"score": [1.0] * 3}}, "episode column 'score': expected"),
        ({"columns": {"name": 5}}, "episode column 'name': expected .*str.*, got 5"),
        ({"columns": {"name": "\udfff"}}, "episode column 'name': expected"),
        ({"columns": 5}, "columns"),
    ],
)
def test_a_reset_with_a_wrong_value_is_refused(store, num_envs, arguments, message):
    good = {"observation": observation(0, num_envs)}
    refused(store, (SchemaError, UsageError), message, store.reset, **(good | arguments))


# ---- add_episode


@pytest.fixture
def closed_store(tmp_path):
    """A store in which no episode is open."""
    with ReplayStore.create(tmp_path / "store", schema()) as opened:
        opened.add_episode(**whole())
        yield opened


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (whole(3, reward=np.zeros(2)), r"field '[\w/]+': expected \w+ of shape \([23][^)]*\), got .* \([34][^)]*\)"),
        (whole(3, action=np.arange(4)), r"'action': expected int64 of shape \(3,\), got .* \(4,\)"),
        (whole(3, observation=observation(1, 3)), r"'observation/frame': expected .*\(4, 30, 30\), got .*\(3, 30, 30\)"),
        (whole(3, reward=1.0), "field 'reward': expected an array of L rewards, got 1.0"),
        (whole(3, reward=...), r"missing \['reward'\]"),
        (whole(3, other=np.zeros(3)), r"unknown \['other'\]"),
        (whole(0), "expected at least one transition, got none"),
        (whole(3, terminated=np.array([True, False, False])), "terminated or truncated before the last"),
        (whole(3, truncated=np.array([False, True, True])), "terminated or truncated before the last"),
        (whole(3, terminated=np.zeros(3)), "'terminated': expected bool .*, got float64"),
        (whole(3, reward=["a", "b", "c"]), "'reward': expected float64 .*, got <U1"),
        (whole(3, reward=[1, [2], 3]), "'reward': expected float64"),
        (whole(3, level=np.full(3, np.nan)), "'level': expected int32 .*, got float64"),
        (whole(3) | {"seed": -1}, "seed: expected"),
        (whole(3) | {"seed": [1]}, "seed: expected"),
        (whole(3) | {"policy": 5}, "policy"),
        (whole(3) | {"columns": {"other": 1}}, "expected episode columns"),
    ],
)  # fmt: skip
def test_an_episode_with_a_wrong_value_is_refused(closed_store, arguments, message):
    before = content(closed_store)
    with pytest.raises((SchemaError, UsageError), match=message):
        closed_store.add_episode(**arguments)
    assert content(closed_store) == before
    closed_store.add_episode(**whole(2))
    assert len(closed_store) == 5


def test_an_episode_beside_one_that_is_open_is_refused(tmp_path):
    with ReplayStore.create(tmp_path / "store", schema()) as store:
        store.reset(observation())
        store.step(**step())
        refused(store, UsageError, "add_episode while an episode is open", store.add_episode, **whole())


# ---- values are stored as they are


def bits_schema():
    vector = Field("observation", (4,), "float64")
    packed = Field("info/packed", (64,), "float64", chunk_rows=4)
    return Schema(
        [vector, Field("action", (2, 2), "float32"), Field("reward", (), "float64"), *FLAGS, packed]
    )


def test_not_a_number_and_negative_zero_are_kept_bit_by_bit(tmp_path):
    nans = np.array([0x7FF8000000000001, 0xFFF8DEADBEEF0000, 0x7FF0000000000001, 0x8000000000000000], "u8")
    odd = nans.view("float64")
    with ReplayStore.create(tmp_path / "store", bits_schema()) as store:
        store.reset(odd)
        for i in range(4):
            action = np.array([[-0.0, np.nan], [np.inf, 1e-45]], "float32")
            info = {"packed": np.tile(odd, 16)}
            store.step(action, odd[::-1], odd[i], False, False, info=info)
        shown = [store.read(np.arange(4))]
        store.flush()
        with ReplayStore.open(tmp_path / "store") as reader:
            shown.append(reader.read(np.arange(4)))
    for batch in shown:
        assert batch.observation[0].view("u8").tolist() == nans.tolist()
        assert batch.next_observation.view("u8").tolist() == [nans[::-1].tolist()] * 4
        assert batch.reward.view("u8").tolist() == nans.tolist()
        assert (batch.action.view("u4") == action.view("u4")).all()
        assert (batch.extra["info"]["packed"].view("u8") == np.tile(nans, 16)).all()


@pytest.mark.parametrize(
    "layout", ["big-endian", "Fortran", "strided", "0-d", "memmap", "read-only", "torch", "lists"]
)
def test_arrays_of_any_layout_are_stored_right(tmp_path, layout):
    def laid_out(value):
        value = np.asarray(value)
        if layout == "big-endian":
            return value.astype(value.dtype.newbyteorder(">"))
        if layout == "Fortran" and value.ndim:
            return np.asfortranarray(value)
        if layout == "strided" and value.ndim:
            return np.repeat(value, 2, axis=0)[::2]
        if layout == "memmap":
            files.append(tmp_path / f"map{len(files)}")
            mapped = np.memmap(files[-1], value.dtype, "w+", shape=value.shape or (1,))
            mapped[...] = value
            return mapped if value.ndim else mapped.reshape(())
        if layout == "torch":
            return torch.from_numpy(value.copy())
        copy = value.copy()
        copy.flags.writeable = layout != "read-only"
        return copy.tolist() if layout == "lists" and value.dtype in ("float64", "int64", "bool") else copy

    files, rng = [], np.random.default_rng(0)
    rows = [
        {
            "observation": rng.normal(size=4),
            "action": rng.normal(size=(2, 2)).astype("float32"),
            "reward": rng.normal(),
            "terminated": i == 5,
            "truncated": i == 5,
            "info": {"packed": rng.normal(size=64)},
        }
        for i in range(6)
    ]
    first = rng.normal(size=4)
    with ReplayStore.create(tmp_path / "store", bits_schema()) as store:
        for _ in range(2):
            store.reset(laid_out(first))
            for row in rows:
                given = {name: laid_out(value) for name, value in row.items() if name != "info"}
                store.step(**given, info={"packed": laid_out(row["info"]["packed"])})
            store.flush()
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0] if name != "info"}
        arrays["observation"] = np.stack([first, *arrays["observation"]])
        packed = np.stack([row["info"]["packed"] for row in rows])
        if layout != "0-d":
            store.add_episode(
                **{name: laid_out(array) for name, array in arrays.items()}, info={"packed": laid_out(packed)}
            )
        for number in range(store.num_episodes):
            found = store.episode(number)
            for name, array in arrays.items():
                assert np.array_equal(found[name], array), name
            assert np.array_equal(found["info"]["packed"], packed)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_an_array_that_is_changed_after_the_call_changes_no_row(tmp_path, num_envs, kind):
    make = torch.from_numpy if kind == "torch" else np.asarray
    lead = (num_envs,) if num_envs > 1 else ()
    buffers = {
        "observation": np.zeros((*lead, 4)),
        "action": np.zeros((*lead, 2, 2), "float32"),
        "reward": np.zeros(lead),
        "terminated": np.zeros(lead, bool),
        "truncated": np.zeros(lead, bool),
    }
    packed = np.zeros((*lead, 64))
    given = {name: make(array) for name, array in buffers.items()}
    with ReplayStore.create(tmp_path / "store", bits_schema(), num_envs) as store:
        store.reset(given["observation"])
        for i in range(1, 9):
            for array in [*buffers.values(), packed]:
                array[...] = i if array.dtype != bool else False
            store.step(**given, info={"packed": make(packed)})
        for array in [*buffers.values(), packed]:
            array[...] = 77
        store.flush()
        for number in range(num_envs):
            found = store.episode(number)
            assert found["observation"][:, 0].tolist() == list(range(9))
            assert found["action"][:, 1, 1].tolist() == list(range(1, 9))
            assert found["reward"].tolist() == list(range(1, 9))
            assert found["info"]["packed"][:, 63].tolist() == list(range(1, 9))
            assert not found["terminated"].any()


def test_arrays_of_an_episode_that_are_changed_after_the_call_change_no_row(tmp_path):
    with ReplayStore.create(tmp_path / "store", small_schema()) as store:
        arrays = small_episode(0, 5)
        store.add_episode(**arrays)
        for array in arrays.values():
            array[...] = 1
        assert store.episode(0)["action"].tolist() == [0, 1, 2, 3, 4]
        assert store.episode(0)["reward"].tolist() == [0, 1, 2, 3, 4]


def test_a_batch_that_is_changed_changes_no_row(tmp_path):
    with ReplayStore.create(tmp_path / "store", bits_schema()) as store:
        store.reset(np.zeros(4))
        store.step(np.zeros((2, 2), "float32"), np.ones(4), 5.0, False, False, info={"packed": np.ones(64)})
        for committed in (False, True):
            if committed:
                store.flush()
            batch, arrays = store.sample(3), store.episode(0)
            for array in (batch.observation, batch.reward, batch.extra["info"]["packed"], arrays["reward"]):
                array[...] = 99
            again = store.sample(3)
            assert (again.reward == 5).all()
            assert (again.observation == 0).all()
            assert (again.extra["info"]["packed"] == 1).all()


# ---- sampling and reading


@pytest.mark.parametrize("n", [0, -1, 1.0, "8", None, True, np.float64(3), [3], np.array([3])])
def test_what_is_no_batch_size_is_refused(closed_store, n):
    with pytest.raises(UsageError, match="sample: expected a batch size from 1, got"):
        closed_store.sample(n)
    assert len(closed_store.sample(np.int64(8)).reward) == 8


def test_an_empty_store_cannot_be_sampled(tmp_path):
    with ReplayStore.create(tmp_path / "store", schema()) as store:
        with pytest.raises(UsageError, match=r"expected at least one transition, .* has none"):
            store.sample(1)
        store.reset(observation())
        with pytest.raises(UsageError, match=r"expected at least one transition, .* has none"):
            store.sample(1)
        store.step(**step())
        assert store.sample(2).action.tolist() == [0, 0]


@pytest.mark.parametrize(
    "rng", [5, "x", np.random.RandomState(0), torch.Generator(), np.random, 0, False, [1]]
)
def test_what_is_no_generator_is_refused(closed_store, rng):
    with pytest.raises(UsageError, match=r"rng: expected a numpy\.random\.Generator"):
        closed_store.sample(1, rng=rng)


@pytest.mark.parametrize("window", [5, np.random.default_rng(0), Transition, "x", 0])
def test_what_is_no_window_is_refused(closed_store, window):
    for call in (lambda: closed_store.sample(1, window), lambda: closed_store.read(np.arange(1), window)):
        with pytest.raises(UsageError, match="window: expected a window such as Transition"):
            call()


@pytest.mark.parametrize(
    "numbers",
    [[3], [-1], [0, 1, 10**12], [-(2**63)], np.array([2**64 - 1], "u8"), [0.0], [True, False, True], 0, [[0]], "0", None,
     [None], []],
)  # fmt: skip
def test_numbers_that_are_no_transitions_are_refused(closed_store, numbers):
    with pytest.raises(UsageError, match="read: expected"):
        closed_store.read(numbers)
    assert closed_store.read([2, 0]).action.tolist() == [2, 0]


def test_reading_no_transition_gives_an_empty_batch(closed_store):
    batch = closed_store.read(np.arange(0), Transition(n_step=3, frame_stack=2))
    assert batch.observation["frame"].shape == (0, 2, 30, 30)
    assert (batch.reward.shape, batch.ids.shape) == ((0,), (0,))


@pytest.mark.parametrize("number", [1, -2, 10**30, 0.0, "0", None, True, [0], slice(0, 1)])
def test_what_is_no_episodes_number_is_refused(closed_store, number):
    with pytest.raises(UsageError, match="episode: expected a number below 1, got"):
        closed_store.episode(number)


# ---- creating and opening


@pytest.mark.parametrize("num_envs", [0, -1, 1.0, True, "2", None, 65537])
def test_what_is_no_number_of_environments_is_refused(tmp_path, num_envs):
    with pytest.raises(UsageError, match="num_envs: expected an int from 1 to 65536, got"):
        ReplayStore.create(tmp_path / "store", schema(), num_envs)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("frame_stack", [0, -1, 1.0, True, "4", None])
def test_what_is_no_frame_stack_is_refused(tmp_path, frame_stack):
    with pytest.raises(UsageError, match="frame_stack: expected an int from 1, got"):
        ReplayStore.create(tmp_path / "store", schema(), frame_stack=frame_stack)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("env_spec", [5, {"id": "x"}, b"{}"])
def test_what_is_no_env_spec_is_refused(tmp_path, env_spec):
    with pytest.raises(UsageError, match="env_spec: expected"):
        ReplayStore.create(tmp_path / "store", schema(), env_spec=env_spec)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("given", [None, [], {}, "schema", schema().fields])
def test_what_is_no_schema_is_refused(tmp_path, given):
    with pytest.raises((SchemaError, UsageError), match="schema: expected"):
        ReplayStore.create(tmp_path / "store", given)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "w"},
        {"mode": "rb"},
        {"mode": None},
        {"cache_bytes": -1},
        {"cache_bytes": 1.5},
        {"cache_bytes": True},
    ],
)
def test_opening_with_a_wrong_argument_is_refused(closed_store, arguments):
    closed_store.flush()
    with pytest.raises(UsageError, match=f"{next(iter(arguments))}: expected .*, got"):
        ReplayStore.open(closed_store.path, **arguments)


@pytest.mark.parametrize("num_envs", [0, -1, 1.0, True, "2", 65537])
def test_appending_with_a_wrong_number_of_environments_is_refused(closed_store, num_envs):
    with pytest.raises(UsageError, match="num_envs: expected an int from 1 to 65536, got"):
        ReplayStore.open(closed_store.path, "a", num_envs=num_envs)
    assert len(list((closed_store.path / "streams").glob("0*"))) == 1


NO_STORES = {
    "missing": lambda path: None,
    "below a missing directory": lambda path: None,
    "file": lambda path: path.write_text("x"),
    "empty directory": lambda path: path.mkdir(),
    "another directory": lambda path: (path.mkdir(), (path / "photo.jpg").write_text("x")),
    "another zarr group": lambda path: (path.mkdir(), (path / "zarr.json").write_bytes(root(schema=...))),
    "metadata that is a directory": lambda path: (path / "zarr.json").mkdir(parents=True),
    "metadata that is a link": lambda path: (path.mkdir(), (path / "zarr.json").symlink_to("/etc/passwd")),
    "metadata that is a pipe": lambda path: (path.mkdir(), os.mkfifo(path / "zarr.json")),
}


@pytest.mark.parametrize("kind", NO_STORES)
@pytest.mark.parametrize("mode", ["r", "a"])
def test_what_is_no_store_is_not_opened_and_not_touched(tmp_path, kind, mode):
    path = tmp_path / "store"
    NO_STORES[kind](path)
    if kind == "below a missing directory":
        path = path / "store"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FormatError, match=f"{path}.*: "):
        ReplayStore.open(path, mode)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", [kind for kind in NO_STORES if kind not in ("missing", "empty directory")])
def test_a_store_is_not_created_where_something_is(tmp_path, kind):
    path = tmp_path / "store"
    NO_STORES[kind](path)
    if kind == "below a missing directory":
        path = path / "store"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FormatError, match=f"{path}: expected"):
        ReplayStore.create(path, schema())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_store_is_not_created_over_another(closed_store):
    before = content(closed_store)
    with pytest.raises(FormatError, match=f"{closed_store.path}: "):
        ReplayStore.create(closed_store.path, small_schema())
    assert content(closed_store) == before


def test_a_store_that_was_half_created_can_be_created(tmp_path, monkeypatch):
    for name, files in {
        "a": [],
        "b": ["streams/"],
        "c": ["streams/zarr.json"],
        "d": ["streams/zarr.json", "zarr.json.123-0.partial"],
    }.items():
        for file in files:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(exist_ok=True) if file.endswith("/") else path.write_text("half")
        with ReplayStore.create(tmp_path / name, small_schema()) as store:
            store.add_episode(**small_episode(0, 2))
        with ReplayStore.open(tmp_path / name) as store:
            assert len(store) == 2


@pytest.mark.parametrize("mode", ["r", "a"])
def test_a_store_of_a_newer_format_is_not_opened(tmp_path, mode):
    with ReplayStore.create(tmp_path / "store", HEAD_SCHEMA):
        pass
    (tmp_path / "store/zarr.json").write_bytes(root(format_version=3))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(
        FormatTooNew, match="format version 3, this package knows up to 2: install a newer replaystore"
    ):
        ReplayStore.open(tmp_path / "store", mode)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_store_of_another_environment_says_which_field_differs(tmp_path):
    RecordReplay(gym.make("CartPole-v1"), tmp_path / "store").close()
    with (
        gym.make("Acrobot-v1") as env,
        pytest.raises(SchemaError, match=r"field 'observation': expected shape \(4,\), got \(6,\)"),
    ):
        RecordReplay(env, tmp_path / "store")


def as_another_user(function):
    """Run a function in a child that may not write everywhere, as root may."""

    def unprivileged():
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        return function()

    return in_fork(unprivileged)


@pytest.fixture
def read_only_directory():
    """A directory that everybody may read and nobody may write; pytest's own is nobody's but ours."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        path.chmod(0o755)
        yield path
        for each_path in path.rglob("*"):
            if each_path.is_dir():
                each_path.chmod(0o755)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_read_only_directory_is_read_but_not_written(read_only_directory):
    path = read_only_directory / "store"
    with ReplayStore.create(path, small_schema()) as store:
        store.add_episode(**small_episode(0, 3))
    for each_path in [*path.rglob("*"), path]:
        each_path.chmod(0o555 if each_path.is_dir() else 0o444)
    read_only_directory.chmod(0o555)

    def read():
        with ReplayStore.open(path) as opened:
            return opened.read(np.arange(3)).action.tolist()

    assert as_another_user(read) == [0, 1, 2]
    assert as_another_user(lambda: ReplayStore.open(path, "a")) == ReadOnlyError.__name__
    assert (
        as_another_user(lambda: ReplayStore.create(path.with_name("new"), small_schema())) == "ReadOnlyError"
    )
    assert len(list((path / "streams").glob("0*"))) == 1
    read_only_directory.chmod(0o755)
