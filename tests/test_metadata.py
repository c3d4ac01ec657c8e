import json

import numpy as np
import pytest
import zarr
from test_store import small_schema
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from replaystore import FormatError, Schema
from replaystore.codec import blosc_settings
from replaystore.errors import CorruptionError, FormatTooNew, ReplayStoreError
from replaystore.field import DTYPES, Field
from replaystore.metadata import (
    BOUNDED_VERSION,
    FORMAT_VERSION,
    check_array,
    check_group,
    parse_root,
    render_array,
    render_group,
    render_root,
)
from replaystore.store import ReplayStore

FIELDS = [
    *[Field("observation", (3,), dtype) for dtype in DTYPES],
    Field("observation", (), "float32"),
    Field("observation", (84, 84), "uint8"),
    Field("observation", (3, 20, 20), "uint8", chunk_rows=2),
    Field("observation", (200,), "float64"),
    Field("observation", (200,), "float16", codec="blosc-zstd-1-bitshuffle"),
    Field("observation", (200,), "bool", codec="blosc-lz4-9-shuffle", chunk_rows=1),
    Field("observation", (), "int64", codec="blosc-lz4-3", chunk_rows=4),
]


def schema_with(field, **kwargs):
    rest = [each for each in small_schema().fields if each.name != "observation"]
    return Schema([field, *rest], **kwargs)


def zarrs_rendering(schema, field, num_envs, length):
    """The metadata that zarr-python writes for the array."""
    chunk = (schema.shard_rows(field, num_envs), num_envs, *field.shape)
    layout = {"chunks": chunk, "compressors": None}
    if field.packed:
        name, level, shuffle = blosc_settings(field.codec)
        shuffled = ("noshuffle", "shuffle", "bitshuffle")[shuffle]
        blosc = BloscCodec(
            typesize=field.dtype.itemsize, cname=name, clevel=level, shuffle=shuffled, blocksize=0
        )
        inner = (field.chunk_rows, 1, *field.shape)
        layout = {"chunks": inner, "shards": chunk, "compressors": [blosc, Crc32cCodec()]}
    store = MemoryStore()
    zarr.create_array(
        store,
        shape=(length, num_envs, *field.shape),
        dtype=field.dtype,
        serializer=BytesCodec(endian="little" if field.dtype.itemsize > 1 else None),
        filters=None,
        fill_value=field.dtype.type(0),
        dimension_names=["time", "env", *[f"axis_{i}" for i in range(len(field.shape))]],
        **layout,
    )
    return json.loads(store._store_dict["zarr.json"].to_bytes())


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f"{f.dtype}-{f.shape}-{f.codec}")
@pytest.mark.parametrize("num_envs", [1, 6])
def test_an_array_is_rendered_as_zarr_renders_it(field, num_envs):
    schema = schema_with(field, shard_chunks=24, file_rows=8192)
    rendered = json.loads(render_array(schema, field, num_envs=num_envs, length=777))
    assert rendered == zarrs_rendering(schema, field, num_envs, 777)


def test_a_group_is_rendered_as_zarr_renders_it():
    store = MemoryStore()
    zarr.create_group(store)
    assert json.loads(render_group()) == json.loads(store._store_dict["zarr.json"].to_bytes())
    check_group(render_group(), "x")


@pytest.mark.filterwarnings("ignore:Object at [a-z.]+ is not recognized")
def test_zarr_reads_every_group_of_a_store(tmp_path):
    fields = [
        Field("observation/a", (), "int64"),
        *[f for f in small_schema().fields if f.name != "observation"],
    ]
    ReplayStore.create(tmp_path / "store", Schema(fields)).close()
    stream = zarr.open_group(tmp_path / "store", mode="r")["streams/000000"]
    assert {name for name, _ in stream.arrays()} == {"action", "reward", "terminated", "truncated"}
    assert list(stream["observation"].array_keys()) == ["a"]


def root(**changed):
    """The root's JSON, with attributes changed and their checksum made right again."""
    from replaystore.metadata import _checksum

    node = json.loads(render_root(small_schema(), env_spec="{}", frame_stack=4))
    content = node["attributes"]["replaystore"]
    content |= changed
    content = {key: value for key, value in content.items() if value is not ... and key != "crc32c"}
    node["attributes"]["replaystore"] = content | {"crc32c": _checksum(content)}
    return json.dumps(node).encode()


def test_the_root_comes_back_as_it_was_rendered():
    schema = schema_with(
        Field("observation", (84, 84), "uint8", padding=bytes(84 * 84)), columns={"x": "bool"}
    )
    attributes = parse_root(render_root(schema, env_spec="{}", frame_stack=4), "x")
    assert (attributes["env_spec"], attributes["frame_stack"]) == ("{}", 4)
    assert attributes["schema"].fields == schema.fields
    assert attributes["schema"].columns == schema.columns
    assert attributes["format_version"] == FORMAT_VERSION


def test_any_changed_value_of_the_root_is_noticed():
    data = render_root(small_schema(), env_spec="{}", frame_stack=4)
    rng = np.random.default_rng(0)
    for position in rng.choice(len(data), 300, replace=False):
        changed = bytearray(data)
        changed[position] ^= 1 << rng.integers(7)
        if json_or_none(changed) == json.loads(data):  # white space
            continue
        with pytest.raises((FormatError, CorruptionError)):
            parse_root(bytes(changed), "x")


def json_or_none(data):
    try:
        return json.loads(bytes(data))
    except ValueError:
        return None


@pytest.mark.parametrize("key", ["consolidated_metadata", "x"])
def test_a_root_with_more_in_it_is_refused(key):
    node = json.loads(root())
    with pytest.raises(CorruptionError):
        parse_root(json.dumps(node | {key: None}).encode(), "x")
    node["attributes"][key] = 1
    with pytest.raises(CorruptionError):
        parse_root(json.dumps(node).encode(), "x")


@pytest.mark.parametrize("version", [BOUNDED_VERSION + 1, 99, 10**30])
def test_a_newer_format_is_refused_and_says_what_to_do(version):
    with pytest.raises(FormatTooNew, match=f"x: format version {version}, .*install a newer replaystore"):
        parse_root(root(format_version=version, unknown="things"), "x")


@pytest.mark.parametrize("version", [0, -1, "1", 1.5, 1.0, True, None, [], ...])
def test_what_is_no_format_version_is_refused(version):
    with pytest.raises(FormatError, match="x: expected a format version from 1, found"):
        parse_root(root(format_version=version), "x")


@pytest.mark.parametrize(
    "changed",
    [
        {"schema": ...},
        {"schema": None},
        {"schema": []},
        {"schema": {"fields": []}},
        {"env_spec": ...},
        {"env_spec": 5},
        {"frame_stack": ...},
        {"frame_stack": 0},
        {"frame_stack": "4"},
    ],
    ids=repr,
)
def test_attributes_that_are_wrong_though_their_checksum_is_right_are_refused(changed):
    with pytest.raises(FormatError, match="x: "):
        parse_root(root(**changed), "x")


DAMAGED = {
    "empty": b"",
    "cut": render_group()[:-5],
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "list": b"[]",
    "number": b"5",
    "null": b"null",
    "long number": b'{"attributes": ' + b"1" * 5000 + b"}",
    "no attributes": b"{}",
    "attributes null": b'{"attributes": null}',
    "attributes list": b'{"attributes": []}',
    "attributes text": b'{"attributes": "replaystore"}',
    "other attributes": render_group(),
    "own attributes null": b'{"attributes": {"replaystore": null}}',
    "own attributes list": b'{"attributes": {"replaystore": []}}',
    "own attributes empty": b'{"attributes": {"replaystore": {}}}',
    "not a number": b'{"attributes": {"replaystore": {"format_version": NaN}}}',
    "infinite": b'{"attributes": {"replaystore": {"format_version": 1e400}}}',
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_a_root_that_is_no_stores_is_refused(data, tmp_path):
    with pytest.raises(FormatError, match="some/path: "):
        parse_root(data, "some/path")
    (tmp_path / "zarr.json").write_bytes(data)
    with pytest.raises(ReplayStoreError, match=str(tmp_path)):
        ReplayStore.open(tmp_path)


def array_node(**changed):
    field = Field("observation", (84, 84), "uint8")
    schema = schema_with(field)
    node = json.loads(render_array(schema, field, num_envs=2, length=10)) | changed
    return schema, field, json.dumps(node).encode()


def test_an_array_of_the_schema_gives_its_length():
    schema, field, data = array_node()
    assert check_array(data, "x", schema, field, num_envs=2) == 10


@pytest.mark.parametrize(
    "changed",
    [
        {"shape": [10, 3, 84, 84]},
        {"shape": [10, 2, 84]},
        {"shape": [-1, 2, 84, 84]},
        {"shape": [1.5, 2, 84, 84]},
        {"shape": [True, 2, 84, 84]},
        {"shape": []},
        {"shape": None},
        {"shape": 5},
        {"data_type": "int8"},
        {"data_type": "numpy.object"},
        {"codecs": []},
        {"codecs": [{"name": "numcodecs.pickle"}]},
        {"fill_value": 1},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 2, 84, 84]}}},
        {"chunk_key_encoding": {"name": "v2"}},
        {"zarr_format": 2},
        {"node_type": "group"},
        {"storage_transformers": [{"name": "x"}]},
        {"unknown": 1},
    ],
    ids=repr,
)
def test_an_array_of_another_form_is_refused(changed):
    schema, field, data = array_node(**changed)
    with pytest.raises(FormatError, match="x: "):
        check_array(data, "x", schema, field, num_envs=2)


@pytest.mark.parametrize("data", [b"", b"[]", b"5", b"null", b"{}", b'{"shape": "10"}', b'{"shape": [[10]]}'])
def test_what_is_no_arrays_metadata_is_refused(data):
    schema, field, _ = array_node()
    with pytest.raises(FormatError, match="x: "):
        check_array(data, "x", schema, field, num_envs=2)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"zarr_format": 3, "node_type": "array", "attributes": {}}']
)
def test_what_is_no_groups_metadata_is_refused(data):
    with pytest.raises(FormatError, match="x: "):
        check_group(data, "x")
