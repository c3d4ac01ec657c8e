import json

import numpy as np
import pytest
from test_store import small_schema
from test_windows import FLAGS

from replaystore import Field, Schema, SchemaError
from replaystore.errors import LimitError
from replaystore.files import HUGE_PAGE

REWARD = Field("reward", (), "float64")
OBSERVATION, ACTION = Field("observation", (2,), "float32"), Field("action", (), "int64")


def nested_schema():
    """A Dict with a Tuple in it as observation, a Tuple as action, a Dict as info."""
    names = [
        "observation/cam",
        "observation/arm/0",
        "observation/arm/1",
        "action/0",
        "action/1",
        "info/lives",
    ]
    return Schema([*[Field(name, (), "int64") for name in names], REWARD, *FLAGS])


def values(**changed):
    given = {"observation": 1, "action": 2, "reward": 3.0, "terminated": False, "truncated": False}
    return given | changed


@pytest.mark.parametrize("missing", ["observation", "action", "reward", "terminated", "truncated"])
def test_each_part_of_a_transition_is_required(missing):
    fields = [field for field in small_schema().fields if field.name != missing]
    with pytest.raises(SchemaError, match=f"field '{missing}' missing"):
        Schema(fields)


@pytest.mark.parametrize("name", ["terminated", "truncated"])
@pytest.mark.parametrize(("shape", "dtype"), [((), "uint8"), ((1,), "bool"), ((), "float64")])
def test_flags_are_single_bools(name, shape, dtype):
    fields = [field for field in small_schema().fields if field.name != name]
    with pytest.raises(SchemaError, match=f"field '{name}': expected one flat bool a row, got"):
        Schema([*fields, Field(name, shape, dtype)])


def test_a_nested_reward_is_refused():
    with pytest.raises(SchemaError, match="field 'reward'"):
        Schema([OBSERVATION, ACTION, Field("reward/a", (), "float64"), *FLAGS])


@pytest.mark.parametrize(
    "names",
    [
        ("x", "x"),
        ("x", "X"),
        ("info/a", "info/A"),
        ("info/x", "INFO/x"),
        ("x", "x/y"),
        ("x/y", "x"),
        ("Action",),
    ],
)
def test_names_that_clash_are_refused(names):
    with pytest.raises(SchemaError, match="clashes with"):
        Schema([*small_schema().fields, *[Field(name, (), "bool") for name in names]])


def test_too_many_fields_are_refused():
    fields = [Field(f"info/{i}", (), "bool") for i in range(1001)]
    with pytest.raises(LimitError, match="expected at most 1000 fields, got 1006"):
        Schema([*small_schema().fields, *fields])


@pytest.mark.parametrize(
    "columns",
    [
        {"x": "int32"},
        {"x": int},
        {"": "int64"},
        {"a b": "int64"},
        {"reward": "float64"},
        {5: "int64"},
        {"x": None},
    ],
)
def test_what_is_no_episode_column_is_refused(columns):
    with pytest.raises(SchemaError, match="episode column"):
        small_schema(columns=columns)


@pytest.mark.parametrize(
    "name", ["stream", "env", "first_row", "length", "return", "seed", "start_time", "policy"]
)
def test_an_episode_column_may_not_take_the_name_of_one_that_every_episode_has(name):
    with pytest.raises(SchemaError, match=f"episode column '{name}'"):
        small_schema(columns={name: "int64"})


@pytest.mark.parametrize("name", ["file_rows", "shard_chunks"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True, 2**31])
def test_what_is_no_size_of_files_is_refused(name, value):
    with pytest.raises(SchemaError, match=f"{name}: expected an int from 1 to .*, got"):
        small_schema(**{name: value})


def test_values_are_flattened_and_nested_again():
    schema = nested_schema()
    given = values(observation={"arm": (1, 2), "cam": 0}, action=(3, 4), info={"lives": 5})
    flat = schema.flatten(given)
    assert flat == {
        "observation/cam": 0,
        "observation/arm/0": 1,
        "observation/arm/1": 2,
        "action/0": 3,
        "action/1": 4,
        "info/lives": 5,
        "reward": 3.0,
        "terminated": False,
        "truncated": False,
    }
    assert {top: schema.nest(top, flat) for top in schema.tops} == given
    assert schema.extra == ("info",)
    assert schema.names("observation") == ("observation/cam", "observation/arm/0", "observation/arm/1")
    assert [name for name in flat if schema.is_observation(name)] == list(schema.names("observation"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"observation": {"cam": 0}}, "field 'observation': expected parts .*'cam', 'arm'.*, got .*'cam'"),
        ({"observation": {"cam": 0, "arm": (1,)}}, "field 'observation/arm': expected parts"),
        ({"observation": {"cam": 0, "arm": (1, 2, 3)}}, "field 'observation/arm': expected parts"),
        ({"observation": {"cam": 0, "arm": (1, 2), "x": 1}}, "field 'observation'.*'x'"),
        ({"observation": np.zeros(3)}, "field 'observation': expected parts .*, got ndarray"),
        ({"action": [3, 4]}, "field 'action': expected parts .*, got list"),
        ({"info": None}, "field 'info': expected parts .*, got NoneType"),
        ({"other": 1}, r"missing \[\], unknown \['other'\]"),
    ],
)
def test_values_of_another_nesting_are_refused(changed, message):
    given = values(observation={"cam": 0, "arm": (1, 2)}, action=(3, 4), info={"lives": 5})
    with pytest.raises(SchemaError, match=message):
        nested_schema().flatten(given | changed)


def test_a_missing_value_is_named_with_those_that_are_wanted():
    with pytest.raises(SchemaError, match=r"expected the fields observation, action, .*missing \['reward'\]"):
        small_schema().flatten({name: 0 for name in small_schema().tops if name != "reward"})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ([Field("observation", (3,), "float32")], r"field 'observation': expected shape \(2,\), got \(3,\)"),
        ([Field("observation", (2,), "float64")], "field 'observation': expected dtype float32, got float64"),
        (
            [Field("observation", (2,), "float32", padding=bytes(8))],
            "field 'observation': expected padding None",
        ),
        ([OBSERVATION, Field("x", (), "bool")], "the store has no field 'x'"),
        ([Field("observation/a", (2,), "float32")], "only the store has field 'observation'"),
    ],
)
def test_the_difference_names_the_field(other, message):
    mine = Schema([OBSERVATION, ACTION, REWARD, *FLAGS])
    difference = mine.difference(Schema([*other, ACTION, REWARD, *FLAGS]))
    with pytest.raises(ValueError, match=message):
        raise ValueError(difference)


def test_schemas_that_store_the_same_do_not_differ():
    mine = Schema([OBSERVATION, ACTION, REWARD, *FLAGS], columns={"x": "int64"})
    packed = Field("observation", (2,), "float32", codec="blosc-lz4-1")
    assert mine.difference(Schema([ACTION, REWARD, *FLAGS, packed], columns={"x": "int64"})) is None
    assert "episode columns" in mine.difference(Schema(mine.fields))


def test_a_schema_comes_back_from_json():
    schema = Schema(nested_schema().fields, columns={"x": "string"}, file_rows=4096, shard_chunks=7)
    back = Schema.from_json(json.loads(json.dumps(schema.to_json())))
    assert (back.fields, back.columns) == (schema.fields, schema.columns)
    assert (back.file_rows, back.shard_chunks, back.tops) == (4096, 7, schema.tops)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fields", None),
        ("fields", 5),
        ("fields", "x"),
        ("fields", [1]),
        ("fields", [{}]),
        ("fields", {"a": 1}),
        ("fields", []),
        ("columns", None),
        ("columns", 5),
        ("columns", "x"),
        ("columns", [1]),
        ("columns", {"a": 1}),
        ("columns", {"a": []}),
        ("file_rows", None),
        ("file_rows", "x"),
        ("file_rows", 1e400),
        ("shard_chunks", None),
        ("shard_chunks", [1]),
        ("shard_chunks", 2**62),
    ],
)
def test_json_that_is_no_schema_is_refused(key, value):
    data = small_schema().to_json()
    with pytest.raises(SchemaError):
        Schema.from_json(data | {key: value})
    del data[key]
    with pytest.raises(SchemaError):
        Schema.from_json(data)


@pytest.mark.parametrize("data", [None, 5, "x", [], [1]])
def test_json_that_is_no_object_is_no_schema(data):
    with pytest.raises(SchemaError):
        Schema.from_json(data)


@pytest.mark.parametrize("key", ["name", "shape", "dtype", "codec", "chunk_rows", "padding"])
@pytest.mark.parametrize("value", [5, -1, "x", "../x", [1, 2**62], {"a": 1}, 1e400, True])
def test_json_of_a_damaged_field_is_refused(key, value):
    data = json.loads(
        json.dumps(Schema([Field("observation", (90, 90), "uint8"), ACTION, REWARD, *FLAGS]).to_json())
    )
    data["fields"][0][key] = value
    with pytest.raises((SchemaError, LimitError)):
        Schema.from_json(data)


@pytest.mark.parametrize("num_envs", [1, 2, 3, 8, 64, 1000, 65536])
@pytest.mark.parametrize("file_rows", [1, 4096, 131072])
def test_flat_files_are_whole_pages_of_any_field(num_envs, file_rows):
    schema = small_schema(file_rows=file_rows)
    rows = schema.time_chunk(num_envs)
    assert rows % 4096 == 0
    assert rows & (rows - 1) == 0
    assert rows == 4096 or rows * num_envs <= file_rows
    assert schema.shard_rows(schema.by_name["reward"], num_envs) == rows


def test_flat_files_of_8_byte_values_are_whole_huge_pages():
    schema = small_schema()
    for num_envs in (1, 4, 64):
        assert schema.time_chunk(num_envs) * num_envs * 8 % HUGE_PAGE == 0


@pytest.mark.parametrize("num_envs", [1, 3, 64, 1024, 5000])
def test_a_shard_holds_so_many_chunks_of_all_environments(num_envs):
    frame = Field("observation", (84, 84), "uint8", chunk_rows=8)
    schema = Schema([frame, ACTION, REWARD, *FLAGS], shard_chunks=1024)
    rows = schema.shard_rows(frame, num_envs)
    assert rows % 8 == 0
    assert rows == 8 or 1024 - num_envs < rows // 8 * num_envs <= 1024
