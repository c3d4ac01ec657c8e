"""Whatever bytes a store's files hold, reading them gives what was recorded or raises our error."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from faulty_disk import small_schema
from fuzzing import seal_head
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_head import SCHEMA, same, some_head

from replaystore import ReplayStoreError
from replaystore.codec import crc32c
from replaystore.episodes import decode_table, encode_table, episode_schema
from replaystore.head import decode_head, encode_head
from replaystore.metadata import check_array, check_group, parse_root, render_array, render_root
from replaystore.packed import read_index

HEAD = encode_head(some_head(), SCHEMA)
PART = encode_table(some_head().episodes)
PATH = Path("file")
FIELD = SCHEMA.by_name["observation"]

quick = settings(max_examples=300, deadline=None, derandomize=True, database=None)
bytes_or_text = st.one_of(st.binary(max_size=300), st.text(max_size=100).map(lambda text: text.encode()))
edits = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 30), st.binary(max_size=30)),
    min_size=1,
    max_size=4,
)
values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([2**62, 2**63, 2**64, -(2**63), 10**400]),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["flat", "blosc-lz4-1", "uint8", "../x", "a\0b", "string"]),
    ),
    lambda child: st.one_of(st.lists(child, max_size=4), st.dictionaries(st.text(max_size=8), child, max_size=4)),
    max_leaves=12,
)  # fmt: skip


def edited(data: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    """Replace pieces of some bytes: where, as a part of the length, how many bytes, by what."""
    for where, length, piece in changes:
        at = math.floor(where * len(data))
        data = data[:at] + piece + data[at + length :]
    return data


def test_damage_of_any_file_is_an_error_and_never_data(tmp_path):
    """In a process of bounded memory, which a crash or a case that hangs ends."""
    program = Path(__file__).with_name("fuzzing.py")
    command = [sys.executable, str(program), str(tmp_path), "--cases", "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    counts = json.loads(done.stdout)["done"]
    assert counts.keys() == {"damage", "forge_root", "forge_head", "forge_part", "forge_shard"}
    assert sum(counts.values()) == 300


@quick
@given(bytes_or_text)
@example(b"")
@example(b"ARROW1\0\0")
@example(HEAD[:-1])
def test_any_bytes_are_refused(data):
    table = episode_schema(SCHEMA)
    for parse in (
        lambda: decode_head(data, SCHEMA, PATH),
        lambda: decode_head(seal_head(data), SCHEMA, PATH),
        lambda: decode_table(data, table, PATH),
        lambda: parse_root(data, "file"),
        lambda: check_array(data, "file", SCHEMA, FIELD, num_envs=1),
        lambda: check_group(data, "file"),
    ):
        with pytest.raises(ReplayStoreError):
            parse()
    assert read_index(np.frombuffer(data, np.uint8), 4) is None


@quick
@given(edits)
def test_a_head_with_other_bytes_is_refused(changes):
    data = edited(HEAD, changes)
    try:
        head = decode_head(data, SCHEMA, PATH)
    except ReplayStoreError:
        return
    assert same(head, some_head())


@quick
@given(st.sampled_from(["schema", "env_spec", "frame_stack", "format_version", "other"]), values)
def test_attributes_of_any_value_are_refused_or_are_those_of_a_store(name, value):
    root = json.loads(render_root(small_schema(), env_spec=None, frame_stack=1))
    content = root["attributes"]["replaystore"] | {name: value}
    del content["crc32c"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["crc32c"] = f"{crc32c(canonical.encode()):08x}"
    root["attributes"]["replaystore"] = content
    try:
        found = parse_root(json.dumps(root).encode(), "file")
    except ReplayStoreError:
        return
    assert found["schema"].to_json() == content["schema"]


@quick
@given(st.sampled_from(["schema fields", "schema columns", "field"]), st.text(max_size=10), values)
def test_a_schema_of_any_value_is_refused_or_comes_back(place, name, value):
    schema = small_schema().to_json()
    if place == "schema fields":
        schema["fields"] = value
    elif place == "schema columns":
        schema["columns"] = {name: value}
    else:
        names = sorted(schema["fields"][0])
        schema["fields"][0][names[len(name) % len(names)]] = value
    try:
        found = type(small_schema()).from_json(schema)
    except ReplayStoreError:
        return
    assert found.to_json() == schema


@quick
@given(st.sampled_from(sorted(json.loads(render_array(SCHEMA, FIELD, num_envs=1, length=9)))), values)
def test_an_arrays_metadata_of_any_value_is_refused_or_the_same(name, value):
    node = json.loads(render_array(SCHEMA, FIELD, num_envs=1, length=9))
    changed = node | {name: value}
    try:
        length = check_array(json.dumps(changed).encode(), "file", SCHEMA, FIELD, num_envs=1)
    except ReplayStoreError:
        return
    assert changed | {"shape": None} == node | {"shape": None}
    assert changed["shape"] == [length, *node["shape"][1:]]


@quick
@given(edits)
def test_an_arrow_file_with_other_bytes_is_refused_or_is_a_valid_table(changes):
    """As when somebody makes the checksums fit."""
    try:
        decode_head(seal_head(edited(HEAD, changes)), SCHEMA, PATH)
        table = decode_table(edited(PART, changes), episode_schema(SCHEMA), PATH)
    except ReplayStoreError:
        return
    assert isinstance(table, pa.Table)
    table.validate(full=True)
