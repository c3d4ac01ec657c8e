import ml_dtypes
import numpy as np
import pytest
import torch

from replaystore import Field, SchemaError
from replaystore.errors import LimitError
from replaystore.field import CHUNK_BYTES

FLAT_DTYPES = ["bool", "int8", "uint16", "int64", "float16", "float32", "float64"]


@pytest.mark.parametrize("dtype", FLAT_DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_a_right_array_is_taken_as_it_is(dtype, shape):
    value = np.ones(shape, dtype)
    assert Field("x", shape, dtype).accept(value) is value
    batch = np.ones((5, *shape), dtype)
    assert Field("x", shape, dtype).accept(batch, (5,)) is batch


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        ("float64", 1.5, 1.5),
        ("float64", 3, 3.0),
        ("float64", np.float32(0.1), np.float64(np.float32(0.1))),
        ("float64", np.int64(2**53), 2.0**53),
        ("float32", 0.5, np.float32(0.5)),
        ("float32", 16777216, np.float32(16777216)),
        ("float16", -2, np.float16(-2)),
        ("int64", np.uint8(255), 255),
        ("int64", -(2**63), -(2**63)),
        ("uint8", 255, 255),
        ("uint8", np.int64(0), 0),
        ("uint64", 2**64 - 1, 2**64 - 1),
        ("bool", True, True),
        ("bool", np.False_, False),
        ("float64", np.array(2.0), 2.0),
        ("float64", torch.tensor(2.0), 2.0),
        ("bool", torch.tensor(True), True),
        ("int64", torch.tensor(7), 7),
    ],
)
def test_a_number_that_keeps_its_value_is_converted(dtype, value, expected):
    field = Field("x", (), dtype)
    cell = np.zeros(1, dtype)
    cell[0] = field.accept(value)
    assert cell[0] == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, 5e-324, np.float32("nan")])
def test_a_number_of_any_bits_is_taken(value):
    cell = np.zeros(1)
    cell[0] = Field("x", (), "float64").accept(value)
    assert np.array_equal(cell[0], value, equal_nan=True)
    assert np.signbit(cell[0]) == np.signbit(value)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("float32", 0.1),
        ("float32", 1e300),
        ("float32", 16777217),
        ("float16", 65536.0),
        ("float64", 2**53 + 1),
        ("float64", 2**63 - 1),
        ("float64", np.uint64(2**64 - 1)),
        ("float64", 10**30),
        ("float64", True),
        ("float64", "1.0"),
        ("float64", None),
        ("float64", 1 + 0j),
        ("float64", b"1"),
        ("float64", object()),
        ("float64", np.datetime64("2020-01-01")),
        ("float64", np.array([1.0])),
        ("float64", [1.0]),
        ("float64", ml_dtypes.bfloat16(1.0)),
        ("uint8", 300),
        ("uint8", -1),
        ("uint8", 1.0),
        ("uint8", float("nan")),
        ("int64", float("nan")),
        ("int64", 2**63),
        ("int64", np.uint64(2**63)),
        ("int8", 128),
        ("uint64", -1),
        ("bool", 1),
        ("bool", 0.0),
        ("bool", "yes"),
        ("bool", None),
        ("float64", torch.tensor(1.0, requires_grad=True)),
        ("float64", torch.tensor(1.0, dtype=torch.bfloat16)),
        ("float64", torch.tensor([1.0])),
    ],
)
def test_a_number_that_would_change_is_refused(dtype, value):
    with pytest.raises(SchemaError, match=rf"field 'x': expected {dtype} of shape \(\), got"):
        Field("x", (), dtype).accept(value)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (np.zeros((84, 84), "float32"), "float32"),
        (np.zeros((84, 84), "int16"), "int16"),
        (np.zeros((84, 84, 1), "uint8"), r"\(84, 84, 1\)"),
        (np.zeros((84,), "uint8"), r"\(84,\)"),
        (np.zeros((84, 85), "uint8"), r"\(84, 85\)"),
        (np.zeros((0, 84), "uint8"), r"\(0, 84\)"),
        (np.uint8(0), r"\(\)"),
        (np.zeros((84, 84), object), "object"),
        (np.zeros((84, 84), "U1"), "<U1"),
        (np.zeros((84, 84), "S1"), "S1"),
        (np.zeros((84, 84), "M8[s]"), "datetime64"),
        (np.zeros((84, 84), "complex64"), "complex64"),
        (np.zeros((84, 84), [("a", "u1")]), "'a'"),
        (np.zeros((84, 84), ml_dtypes.float8_e4m3fn), "float8"),
        (np.zeros((84, 84), np.longdouble), "longdouble|float128"),
        ([[0] * 84] * 84, "int64"),
        ([[0, 0], [0]], "list"),
        (None, "NoneType"),
        ({}, "dict"),
        ("frame", "str"),
        (torch.zeros((84, 84)), "float32"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_array_that_is_not_the_fields_is_refused(value, found):
    with pytest.raises(
        SchemaError, match=rf"field 'frame': expected uint8 of shape \(84, 84\), got .*({found})"
    ):
        Field("frame", (84, 84), "uint8").accept(value)


def test_the_number_of_environments_is_part_of_the_shape():
    field = Field("x", (2,), "float32")
    with pytest.raises(
        SchemaError, match=r"expected float32 of shape \(3, 2\), got float32 of shape \(4, 2\)"
    ):
        field.accept(np.zeros((4, 2), "float32"), (3,))
    with pytest.raises(SchemaError, match=r"expected float64 of shape \(3,\), got float64 of shape \(\)"):
        Field("x", (), "float64").accept(1.0, (3,))
    assert Field("x", (), "float64").accept([1, 2, 3], (3,)).tolist() == [1.0, 2.0, 3.0]


def laid_out(array, tmp_path):
    """An array's values in every layout in memory."""
    mapped = np.memmap(tmp_path / "map", array.dtype, "w+", shape=array.shape)
    mapped[:] = array
    read_only = array.copy()
    read_only.flags.writeable = False
    strided = np.zeros((2 * array.shape[0], *array.shape[1:]), array.dtype)
    strided[::2] = array
    return {
        "big-endian": array.astype(array.dtype.newbyteorder(">")),
        "Fortran": np.asfortranarray(array),
        "strided": strided[::2],
        "reversed": array[::-1].copy()[::-1],
        "read-only": read_only,
        "memmap": mapped,
        "torch": torch.from_numpy(array),
        "transposed torch": torch.from_numpy(array.T.copy()).T,
    }


LAYOUTS = ["big-endian", "Fortran", "strided", "reversed", "read-only", "memmap", "torch", "transposed torch"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_an_array_does_not_matter(layout, tmp_path):
    array = np.arange(6, dtype="float64").reshape(2, 3) + 0.1
    given = laid_out(array, tmp_path)[layout]
    stored = np.empty((2, 3))
    stored[:] = Field("x", (2, 3), "float64").accept(given)
    assert (stored == array).all()


GOOD_NAMES = [
    "a",
    "A9",
    "_x",
    "log_prob",
    "info/lives",
    "0",
    "a.b-c",
    "a/0/b",
    "x" * 64,
    "x" * 64 + "/" + "y" * 64,
]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_plain_name_is_a_fields_name(name):
    assert Field(name, (), "bool").name == name


BAD_NAMES = [
    "",
    ".",
    "..",
    "../x",
    "/abs",
    "a//b",
    "a/",
    "a/../b",
    "a\\b",
    "zarr.json",
    "c",
    "a/c",
    "index",
    "lock",
    "head.arrow",
    "a\0",
    "a\n",
    "\n",
    "x" * 65,
    "x" * 300,
    "/".join(["x" * 60] * 5),
    " x ",
    "a b",
    "a:b",
    "C:\\x",
    "-x",
    ".x",
    "ü",
    "u\u0308",
    "😀",
    "٣",
    None,
    5,
    b"x",
    ("a",),
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name)[:20])
def test_a_name_that_is_no_plain_path_is_refused(name):
    with pytest.raises(SchemaError, match="field name"):
        Field(name, (), "bool")


@pytest.mark.parametrize(
    "dtype",
    ["O", "U3", "S3", "M8[s]", "m8[s]", "complex64", "V4", [("a", "i4")], "nonsense", None.__class__, 5, np.longdouble,
     ml_dtypes.bfloat16, torch.float32],
    ids=repr,
)  # fmt: skip
def test_a_dtype_that_is_not_stored_is_refused_with_the_list(dtype):
    with pytest.raises(SchemaError, match=r"field 'x': expected a dtype of .*'bool'.*'float64'.*, got"):
        Field("x", (), dtype)


@pytest.mark.parametrize(
    "shape", [(0,), (-1,), (1.0,), (True,), ("3",), 3, None, (1,) * 17, (2, None)], ids=repr
)
def test_what_is_no_shape_is_refused(shape):
    with pytest.raises(SchemaError, match="field 'x': expected a shape of positive sizes, got"):
        Field("x", shape, "uint8")


@pytest.mark.parametrize("shape", [(2**26,), (2**40, 2**40), (2**62,), (2**32, 2**32)])
def test_a_row_beyond_all_reason_is_refused(shape):
    with pytest.raises(LimitError, match="field 'x'"):
        Field("x", shape, "uint8")


@pytest.mark.parametrize(
    "codec",
    ["", "raw", "zstd", "blosc", "blosc-lz4", "blosc-lz4-0", "blosc-lz4-10", "blosc-lz4-99", "blosc-gzip-5", "blosc-lz4-5-x",
     "pickle", "blosc-lz4-5-shuffle-shuffle", None, 5],
)  # fmt: skip
def test_an_unknown_codec_is_refused_with_the_choices(codec):
    with pytest.raises(SchemaError, match=r"field 'x': expected codec .*lz4hc or zstd.*, got"):
        Field("x", (100, 100), "uint8", codec=codec)


@pytest.mark.parametrize(
    ("shape", "dtype", "chunk_rows"), [((), "uint8", 4), ((3,), "uint8", 2), ((), "float32", 1)]
)
def test_a_chunk_of_a_few_bytes_is_refused(shape, dtype, chunk_rows):
    with pytest.raises(SchemaError, match=r"field 'x': expected chunks of 8 bytes or more, . rows have [46]"):
        Field("x", shape, dtype, codec="blosc-lz4-5", chunk_rows=chunk_rows)


@pytest.mark.parametrize("chunk_rows", [0, -1, 3, 1.0, True, "8", 8192, 2**40])
def test_a_chunk_of_no_power_of_two_is_refused(chunk_rows):
    with pytest.raises(SchemaError, match=r"field 'x': expected chunk_rows a power of two.*, got"):
        Field("x", (100, 100), "uint8", chunk_rows=chunk_rows)


def test_a_chunk_beyond_all_reason_is_refused():
    with pytest.raises(LimitError, match="field 'x'"):
        Field("x", (2**24,), "uint8", chunk_rows=4096)


@pytest.mark.parametrize("padding", [b"", bytes(3), bytes(5)])
def test_padding_of_another_size_is_refused(padding):
    with pytest.raises(SchemaError, match=f"field 'x': expected 4 bytes of padding, got {len(padding)}"):
        Field("x", (), "int32", padding=padding)


@pytest.mark.parametrize(
    ("shape", "dtype", "codec"),
    [
        ((), "bool", "flat"),
        ((511,), "uint8", "flat"),
        ((512,), "uint8", "blosc-lz4hc-5"),
        ((84, 84), "uint8", "blosc-lz4hc-5"),
        ((84, 84, 3), "uint8", "blosc-lz4hc-5"),
        ((4, 84, 84), "float32", "blosc-lz4hc-5-shuffle"),
        ((1000, 1000), "uint8", "blosc-lz4hc-5"),
        ((64,), "float64", "blosc-lz4hc-5-shuffle"),
    ],
)
def test_small_rows_are_flat_and_large_ones_packed(shape, dtype, codec):
    assert Field("x", shape, dtype).codec == codec
    assert Field("x", shape, dtype).packed == (codec != "flat")


@pytest.mark.parametrize("row_nbytes", [1, 3, 31, 32, 33, 900, 7056, 65535, 65536, 65537, 10**6])
def test_a_chunk_has_as_many_rows_as_fit(row_nbytes):
    field = Field("x", (row_nbytes,), "uint8", codec="blosc-lz4-1")
    assert field.chunk_rows & (field.chunk_rows - 1) == 0
    assert field.chunk_rows <= 4096
    assert field.chunk_nbytes <= max(CHUNK_BYTES, row_nbytes)
    assert field.chunk_rows == 4096 or 2 * field.chunk_nbytes > CHUNK_BYTES


@pytest.mark.parametrize(
    "field",
    [
        Field("a/b", (), "bool"),
        Field("x", (84, 84), "uint8"),
        Field("x", [np.int64(3)], np.float32, padding=np.arange(3, dtype="float32").tobytes()),
        Field("x", (9,), ">i4", codec="blosc-zstd-9-bitshuffle", chunk_rows=4096),
        Field("x", (), "bool", codec="blosc-lz4-1"),
        Field("x", (7,), "uint8", codec="blosc-lz4-1"),
    ],
    ids=repr,
)
def test_a_field_comes_back_from_json(field):
    assert Field.from_json(**field.to_json()) == field
    assert hash(Field.from_json(**field.to_json())) == hash(field)


def test_the_padding_row_has_the_fields_shape():
    row = np.arange(6, dtype="int16").reshape(2, 3)
    field = Field("x", (2, 3), "int16", padding=row.tobytes())
    assert (field.padding_row() == row).all()
    assert Field("x", (2, 3), "int16").padding_row() is None
