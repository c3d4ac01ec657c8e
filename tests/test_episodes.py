import numpy as np
import pyarrow as pa
import pytest
from test_store import small_schema

from replaystore import SchemaError, UsageError
from replaystore.codec import crc32c
from replaystore.episodes import (
    Episode,
    check_policy,
    check_seed,
    check_seeds,
    column_value,
    decode_table,
    encode_table,
    episode_schema,
    episode_table,
    episodes_of,
    open_part,
    part_path,
    write_part,
)
from replaystore.errors import CorruptionError

COLUMNS = {"level": "int64", "win": "bool", "score": "float64", "note": "string"}
SCHEMA = episode_schema(small_schema(columns=COLUMNS))
EPISODES = [
    Episode(0, 0, 5, True, False, 1.5, 7, 1_700_000_000_000_000, "random", (3, True, 0.5, "grüße")),
    Episode(1, 2**40 - 9, 1, False, True, None, None, 0, None, (None, None, None, None)),
    Episode(65535, 6, 2, False, False, float("inf"), 2**63 - 1, -1, "", (-(2**63), False, -0.0, "")),
]


def test_episodes_come_back_from_a_table():
    table = episode_table(EPISODES, SCHEMA)
    assert table.schema.equals(SCHEMA)
    assert episodes_of(table) == EPISODES
    assert episodes_of(episode_table([], SCHEMA)) == []


def test_a_table_comes_back_from_its_bytes(tmp_path):
    table = episode_table(EPISODES, SCHEMA)
    assert decode_table(encode_table(table), SCHEMA, tmp_path).equals(table)


def test_a_part_is_an_arrow_file_that_anybody_reads(tmp_path):
    (tmp_path / "index").mkdir()
    state = write_part(tmp_path, 3, episode_table(EPISODES, SCHEMA))
    path = part_path(tmp_path, 3)
    assert path == tmp_path / "index/000003.arrow"
    assert (state.number, state.nbytes, state.crc32c) == (3, path.stat().st_size, crc32c(path.read_bytes()))
    assert (
        pa.ipc.open_file(path.read_bytes()).read_all().to_pylist()
        == episode_table(EPISODES, SCHEMA).to_pylist()
    )
    assert episodes_of(open_part(tmp_path, state, SCHEMA)) == EPISODES


def test_a_part_with_any_byte_changed_is_refused(tmp_path):
    (tmp_path / "index").mkdir()
    state = write_part(tmp_path, 0, episode_table(EPISODES, SCHEMA))
    path = part_path(tmp_path, 0)
    data = path.read_bytes()
    wrong = [data[:-1], data + b"\0", b"", bytes(len(data))]
    for position in range(0, len(data), 7):
        wrong.append(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
    for each in wrong:
        path.write_bytes(each)
        with pytest.raises(CorruptionError, match=f"^{path}: expected"):
            open_part(tmp_path, state, SCHEMA)
    path.unlink()
    with pytest.raises(CorruptionError, match=f"^{path}: the file is missing"):
        open_part(tmp_path, state, SCHEMA)


TABLE = episode_table(EPISODES, SCHEMA)
OTHERS = {
    "no column": TABLE.drop_columns(["length"]),
    "one more": TABLE.append_column("x", pa.array([1, 2, 3])),
    "renamed": TABLE.rename_columns(["x", *SCHEMA.names[1:]]),
    "reordered": TABLE.select([*SCHEMA.names[1:], SCHEMA.names[0]]),
    "another type": TABLE.set_column(0, "env", TABLE["env"].cast(pa.int64())),
    "nulls": TABLE.set_column(
        1, pa.field("first_row", pa.int64(), nullable=False), pa.array([1, None, 2], pa.int64())
    ),
    "large strings": TABLE.set_column(8, "policy", TABLE["policy"].cast(pa.large_string())),
}


@pytest.mark.parametrize("table", OTHERS.values(), ids=OTHERS)
def test_a_table_of_other_columns_is_refused(table, tmp_path):
    with pytest.raises(CorruptionError, match=f"^{tmp_path}: "):
        decode_table(encode_table(table), SCHEMA, tmp_path)


@pytest.mark.parametrize("data", [b"", b"ARROW1", b"x" * 1000, encode_table(TABLE)[:-10]])
def test_what_is_no_arrow_file_is_refused(data, tmp_path):
    with pytest.raises(CorruptionError, match=f"^{tmp_path}: no valid Arrow file"):
        decode_table(data, SCHEMA, tmp_path)


def test_text_that_is_no_text_is_refused(tmp_path):
    data = encode_table(TABLE)
    assert data.count("grüße".encode()) == 1
    with pytest.raises(CorruptionError):
        decode_table(data.replace("grüße".encode(), b"gr\xff\xff\xff\xff\xffe"[:7]), SCHEMA, tmp_path)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, 1.5, "1", True, np.float64(3), [1], b"x", object()])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(UsageError, match="seed: expected"):
        check_seed(seed)
    with pytest.raises(UsageError, match="seed: expected"):
        check_seeds(seed, 2)


@pytest.mark.parametrize(
    "seeds", [[1], [1, 2, 3], (), np.zeros((3, 1), int), [1, -1], [1, "2"], {1: 2}, {1, 2}]
)
def test_seeds_that_are_not_one_for_each_environment_are_refused(seeds):
    with pytest.raises(UsageError, match="seed: expected"):
        check_seeds(seeds, 2)


def test_seeds_may_be_numpys():
    assert check_seed(np.uint64(5)) == 5
    assert check_seeds(np.array([3, 4]), 2) == [3, 4]
    assert check_seeds(None, 2) == [None, None]
    assert check_seeds([None, 9], 2) == [None, 9]
    assert check_seeds(2**63 - 2, 2) == [2**63 - 2, 2**63 - 1]


def test_seeds_that_count_up_beyond_63_bits_are_refused():
    with pytest.raises(UsageError, match="seed: expected"):
        check_seeds(2**63 - 1, 2)


@pytest.mark.parametrize("policy", [5, b"x", ["x"], "\ud800", True])
def test_what_is_no_text_is_no_policy(policy):
    with pytest.raises((SchemaError, UsageError), match="policy"):
        check_policy(policy)


GOOD = [
    ("int64", 5, 5),
    ("int64", np.int8(-5), -5),
    ("int64", np.uint64(7), 7),
    ("int64", 2**63 - 1, 2**63 - 1),
    ("float64", 1, 1.0),
    ("float64", np.float32(0.5), 0.5),
    ("float64", float("nan"), float("nan")),
    ("bool", True, True),
    ("bool", np.False_, False),
    ("string", "grüße", "grüße"),
    ("string", "", ""),
    ("int64", [4, 5], 5),
    ("int64", np.array([4, 5], np.int16), 5),
    ("string", ("a", None), None),
    ("bool", np.array([True, False]), False),
    ("int64", None, None),
]


@pytest.mark.parametrize(("dtype", "value", "expected"), GOOD)
def test_a_column_takes_a_value_or_one_for_each_environment(dtype, value, expected):
    found = column_value("x", dtype, value, 1, 2)
    assert type(found) is type(expected)
    assert found == expected or expected != expected
    schema = episode_schema(small_schema(columns={"x": dtype}))
    table = episode_table([EPISODES[1]._replace(columns=(found,))], schema)
    assert table["x"][0].as_py() == expected or expected != expected


BAD = [
    ("int64", 1.0),
    ("int64", "1"),
    ("int64", True),
    ("int64", 2**63),
    ("int64", -(2**63) - 1),
    ("int64", np.uint64(2**63)),
    ("int64", np.bool_(True)),
    ("int64", [1]),
    ("int64", [1, 2, 3]),
    ("int64", [1, 2.5]),
    ("int64", np.zeros((2, 2), int)),
    ("float64", "1"),
    ("float64", True),
    ("float64", 1 + 0j),
    ("float64", np.complex128(1)),
    ("float64", 10**400),
    ("float64", 2**53 + 1),
    ("bool", 1),
    ("bool", "yes"),
    ("bool", 0.0),
    ("string", 5),
    ("string", b"x"),
    ("string", "\ud800"),
    ("string", object()),
    ("string", {"a": 1}),
]


@pytest.mark.parametrize(("dtype", "value"), BAD)
def test_a_value_that_is_not_the_columns_is_refused(dtype, value):
    with pytest.raises(SchemaError, match="episode column 'x': expected"):
        column_value("x", dtype, value, 1, 2)
