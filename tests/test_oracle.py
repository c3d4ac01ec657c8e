"""What the package reads is what zarr-python, tensorstore and Arrow read from the directory."""

import numpy as np
import pyarrow as pa
import pytest
import tensorstore
import zarr
from test_model import mixed_schema, tiny_parts
from test_store import drift, small_schema
from test_windows import FLAGS, random_value

from replaystore import Field, ReplayStore, Schema, Transition
from replaystore.metadata import check_array

pytestmark = pytest.mark.usefixtures("_no_syncs")


def by_zarr(path, stream, name):
    return zarr.open_array(path / "streams" / f"{stream:06d}" / name, mode="r")[:]


def by_tensorstore(path, stream, name):
    kvstore = {"driver": "file", "path": str(path / "streams" / f"{stream:06d}" / name)}
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()


def check_episodes(store, read):
    """Compare every episode with the arrays that another program reads."""
    schema, table = store.schema, store.episodes.to_pylist()
    arrays = {
        stream: {name: read(store.path, stream, name) for name in schema.by_name}
        for stream in {row["stream"] for row in table}
    }
    for number, row in enumerate(table):
        episode = store.episode(number)
        flat = {
            name: value
            for top in schema.tops
            for name, value in schema.flatten_top(top, episode[top]).items()
        }
        for name, found in flat.items():
            rows = slice(row["first_row"], row["first_row"] + row["length"] + schema.is_observation(name))
            expected = arrays[row["stream"]][name][rows, row["env"]]
            assert found.dtype == expected.dtype
            assert found.tobytes() == expected.tobytes(), (number, name)
            behind = arrays[row["stream"]][name][row["first_row"] + row["length"], row["env"]]
            assert schema.is_observation(name) or not behind.any(), (
                "an episode's last row is an observation only"
            )
    return arrays


def play(store, rng, steps):
    """Random episodes in all environments, which end at different times."""
    schema, num_envs = store.schema, store._writer.head.num_envs
    lead = (num_envs,) if num_envs > 1 else ()

    def values(tops):
        flat = {}
        for name in (name for top in tops for name in schema.names(top)):
            field = schema.by_name[name]
            flat[name] = random_value(Field("x", lead + field.shape, field.dtype), rng)
        return {top: schema.nest(top, flat) for top in tops}

    ended = np.ones(num_envs, bool)
    for _ in range(steps):
        if ended.any():
            store.reset(**values(["observation"]), mask=ended)
        terminated = rng.random(num_envs) < 0.05
        truncated = rng.random(num_envs) < 0.05
        flags = {"terminated": terminated, "truncated": truncated}
        if num_envs == 1:
            flags = {name: flag[0] for name, flag in flags.items()}
        tops = [top for top in schema.tops if top not in flags]
        store.step(**values(tops), **flags)
        ended = terminated | truncated


@pytest.mark.parametrize("read", [by_zarr, by_tensorstore])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_others_read_the_same_at_every_commit(tmp_path, monkeypatch, read, num_envs):
    tiny_parts(monkeypatch)
    rng = np.random.default_rng(num_envs)
    with ReplayStore.create(tmp_path / "store", mixed_schema(), num_envs) as store:
        for _ in range(4):
            play(store, rng, 50)
            store.flush()
            check_episodes(store, read)
            with ReplayStore.open(tmp_path / "store") as reader:
                check_episodes(reader, read)
    with ReplayStore.open(tmp_path / "store", "a") as store:
        check_episodes(store, read)
        play(store, rng, 30)
        store.flush()
        check_episodes(store, read)


@pytest.mark.parametrize("read", [by_zarr, by_tensorstore])
def test_others_read_what_is_sampled(tmp_path, read):
    rng = np.random.default_rng(0)
    with ReplayStore.create(tmp_path / "store", mixed_schema(), 2) as store:
        play(store, rng, 100)
        store.flush()
        batch = store.sample(200, Transition(frame_stack=1), rng=rng)
        time, env = (batch.ids % 2**40) // 2, batch.ids % 2
        rows = {name: read(store.path, 0, name) for name in store.schema.by_name}
        assert (batch.observation["image"] == rows["observation/image"][time, env]).all()
        assert (batch.next_observation["image"] == rows["observation/image"][time + 1, env]).all()
        assert (batch.next_observation["vector"] == rows["observation/vector"][time + 1, env]).all()
        assert (batch.action == rows["action"][time, env]).all()
        assert (batch.reward == rows["reward"][time, env]).all()
        assert (batch.terminated == rows["terminated"][time, env]).all()
        assert (batch.extra["info"]["logits"] == rows["info/logits"][time, env]).all()


@pytest.mark.parametrize("codec", ["flat", "blosc-lz4-1", "blosc-zstd-5-bitshuffle", "blosc-lz4hc-5-shuffle"])
@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint16", "int32", "uint64", "float16", "float32", "float64"]
)
def test_every_dtype_and_codec_is_read_by_zarr_and_tensorstore(tmp_path, dtype, codec):
    observation = Field("observation", (3, 2), dtype, codec=codec)
    rest = [Field("action", (), "int64"), Field("reward", (), "float64"), *FLAGS]
    schema = Schema([observation, *rest], file_rows=4096, shard_chunks=16)
    rng = np.random.default_rng(0)
    bits = rng.integers(
        0, 2 if dtype == "bool" else 256, (31, 3, 2, observation.dtype.itemsize), dtype=np.uint8
    )
    values = bits.view(dtype)[..., 0]
    with ReplayStore.create(tmp_path / "store", schema) as store:
        zeros = np.zeros(30)
        flags = {"terminated": zeros.astype(bool), "truncated": zeros.astype(bool)}
        store.add_episode(observation=values, action=np.arange(30), reward=zeros, **flags)
        store.flush()
        for read in (by_zarr, by_tensorstore):
            check_episodes(store, read)
            assert read(store.path, 0, "observation")[:31, 0].tobytes() == values.tobytes()


def test_rows_beyond_the_first_file_are_read_by_zarr(tmp_path):
    log = [[], [], []]
    rng = np.random.default_rng(0)
    with ReplayStore.create(tmp_path / "store", small_schema(file_rows=4096), num_envs=3) as store:
        drift(store, rng, 300, log)
        store.flush()
        check_episodes(store, by_zarr)
        numbers = np.arange(9000)
        store.close()
    with ReplayStore.open(tmp_path / "store", "a", num_envs=1) as store:
        flags = {"terminated": numbers < 0, "truncated": numbers < 0}
        for _ in range(2):
            store.add_episode(observation=np.arange(9001), action=numbers, reward=numbers / 2, **flags)
        store.flush()
        check_episodes(store, by_zarr)


def test_a_closed_store_has_arrays_of_exactly_its_rows(tmp_path):
    with ReplayStore.create(tmp_path / "store", mixed_schema(), 3) as store:
        play(store, np.random.default_rng(0), 40)
    with ReplayStore.open(tmp_path / "store") as store:
        rows = store._view._catalog.heads[0].rows
        for field in store.schema.fields:
            assert by_zarr(store.path, 0, field.name).shape == (rows.max(), 3, *field.shape)
            path = store.path / "streams/000000" / field.name / "zarr.json"
            assert check_array(path.read_bytes(), str(path), store.schema, field, num_envs=3) == rows.max()


def test_the_index_is_read_by_arrow(tmp_path, monkeypatch):
    tiny_parts(monkeypatch)
    with ReplayStore.create(tmp_path / "store", mixed_schema(), 3) as store:
        play(store, np.random.default_rng(0), 150)
        store.flush()
        stream = tmp_path / "store/streams/000000"
        parts = [
            pa.ipc.open_file(path.read_bytes()).read_all() for path in sorted((stream / "index").iterdir())
        ]
        assert parts
        head = pa.ipc.open_file((stream / "head.arrow").read_bytes()).read_all().to_pylist()[0]
        sealed = [row for part in parts for row in part.to_pylist()]
        open_ = [row for row in head["open"] if row["length"]]
        assert [
            {"stream": 0} | row for row in sealed + head["episodes"] + open_
        ] == store.episodes.to_pylist()
