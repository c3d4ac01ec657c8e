"""Renders and checks the `zarr.json` of groups and arrays.

They are rendered here rather than by zarr so that a store's bytes do not depend on zarr's version
and reading one needs no zarr; tests hold zarr's own rendering against them. The root group's
attributes hold what the store is (format version, schema, environment), with a crc32c over their
canonical JSON.
"""

import json
from typing import Any

from replaystore.bounds import Bounds, bounds_from_json, bounds_to_json
from replaystore.codec import blosc_settings, crc32c
from replaystore.errors import (
    CorruptionError,
    FormatError,
    FormatTooNew,
    LimitError,
    SchemaError,
    UsageError,
)
from replaystore.field import Field
from replaystore.schema import Schema

FORMAT_VERSION = 1
BOUNDED_VERSION = 2  # of stores that evict, which the first version's package cannot read
MAX_METADATA_BYTES = 1 << 24
_GROUP = {"zarr_format": 3, "node_type": "group"}
_ARRAY = {
    "zarr_format": 3,
    "node_type": "array",
    "attributes": {},
    "storage_transformers": [],
    "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
}


def render_root(
    schema: Schema, *, env_spec: str | None, frame_stack: int, bounds: Bounds | None = None
) -> bytes:
    """The root group's `zarr.json`; `env_spec` is gymnasium's `EnvSpec.to_json`."""
    is_bounded = bounds is not None and not bounds.is_none
    content = {
        "format_version": BOUNDED_VERSION if is_bounded else FORMAT_VERSION,
        "schema": schema.to_json(),
        "env_spec": env_spec,
        "frame_stack": frame_stack,
    }
    if bounds is not None and is_bounded:
        content["bounds"] = bounds_to_json(bounds)
    attributes = {"replaystore": content | {"crc32c": _checksum(content)}}
    return json.dumps(_GROUP | {"attributes": attributes}, indent=2).encode()


def render_group() -> bytes:
    return json.dumps(_GROUP | {"attributes": {}}, indent=2).encode()


def parse_stream(data: bytes, path: str, schema: Schema) -> None:
    """Raise unless a stream's `zarr.json` is a copy of the root's."""
    if parse_root(data, path)["schema"].to_json() != schema.to_json():
        raise FormatError(f"{path}: the stream has another schema than the store")


def parse_root(data: bytes, path: str) -> dict[str, Any]:
    """Return the root's attributes, `schema` as a `Schema`, `bounds` as `Bounds`; refuse anything else."""
    node = parse_json(data, path)
    attributes = node.get("attributes") if isinstance(node, dict) else None
    content = attributes.get("replaystore") if isinstance(attributes, dict) else None
    if not isinstance(content, dict):
        raise FormatError(f"{path}: not a replaystore (no attribute 'replaystore')")
    version = content.get("format_version")
    if type(version) is not int or version < 1:
        raise FormatError(f"{path}: expected a format version from 1, found {version!r}")
    if version > BOUNDED_VERSION:
        known = f"this package knows up to {BOUNDED_VERSION}"
        raise FormatTooNew(f"{path}: format version {version}, {known}: install a newer replaystore")
    found = content.pop("crc32c", None)
    whole = _GROUP | {"attributes": {"replaystore": content}}
    if node != whole or found != _checksum(content):
        raise CorruptionError(f"{path}: the attributes' checksum does not match them")
    return _checked(content, path)


def _checked(content: dict[str, Any], path: str) -> dict[str, Any]:
    is_bounded = content["format_version"] == BOUNDED_VERSION
    expected = {"format_version", "schema", "env_spec", "frame_stack"} | ({"bounds"} if is_bounded else set())
    if content.keys() != expected:
        raise FormatError(f"{path}: expected the attributes {sorted(expected)}, found {sorted(content)}")
    spec, frames = content["env_spec"], content["frame_stack"]
    if not isinstance(spec, str | None) or type(frames) is not int or frames < 1:
        raise FormatError(f"{path}: expected an environment spec and a frame stack, found {frames!r}")
    try:
        bounds = bounds_from_json(content["bounds"]) if is_bounded else Bounds()
        return content | {"schema": Schema.from_json(content["schema"]), "bounds": bounds}
    except (SchemaError, LimitError, UsageError) as error:
        raise FormatError(f"{path}: {error}") from error


def parse_json(data: bytes, path: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not a replaystore: no valid JSON ({error})") from error


def _checksum(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"{crc32c(canonical.encode()):08x}"


def render_array(schema: Schema, field: Field, *, num_envs: int, length: int) -> bytes:
    """An array's `zarr.json`: `(time, env, *shape)`, `length` rows of time."""
    return json.dumps(_array(schema, field, num_envs, length), indent=2).encode()


def check_array(data: bytes, path: str, schema: Schema, field: Field, *, num_envs: int) -> int:
    """Return an array's length in time; raise `FormatError` if it is not the schema's array."""
    node = parse_json(data, path)
    shape = node.get("shape") if isinstance(node, dict) else None
    length = shape[0] if isinstance(shape, list) and shape else None
    if type(length) is not int or length < 0:
        raise FormatError(f"{path}: expected an array with a length in time, found shape {shape!r}")
    expected = _array(schema, field, num_envs, length)
    if node != expected:
        keys = expected.keys() | node.keys()
        differing = sorted(key for key in keys if node.get(key) != expected.get(key))
        raise FormatError(f"{path}: differs from the schema's array in {', '.join(differing)}")
    return length


def check_group(data: bytes, path: str) -> None:
    """Raise `FormatError` unless this is the `zarr.json` of a plain group."""
    if parse_json(data, path) != json.loads(render_group()):
        raise FormatError(f"{path}: expected a zarr group without attributes")


def _array(schema: Schema, field: Field, num_envs: int, length: int) -> dict[str, Any]:
    rest = list(field.shape)
    endian = {"configuration": {"endian": "little"}} if field.dtype.itemsize > 1 else {}
    codecs: list[dict[str, Any]] = [{"name": "bytes"} | endian]
    if field.packed:
        codecs = [_sharding(field, [*codecs, _blosc(field), {"name": "crc32c"}])]
    chunk = [schema.shard_rows(field, num_envs), num_envs, *rest]
    return _ARRAY | {
        "shape": [length, num_envs, *rest],
        "data_type": field.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "fill_value": False if field.dtype.kind == "b" else 0.0 if field.dtype.kind == "f" else 0,
        "codecs": codecs,
        "dimension_names": ["time", "env", *[f"axis_{i}" for i in range(len(rest))]],
    }


def _sharding(field: Field, codecs: list[dict[str, Any]]) -> dict[str, Any]:
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    return {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [field.chunk_rows, 1, *field.shape],
            "codecs": codecs,
            "index_codecs": index,
            "index_location": "end",
        },
    }


def _blosc(field: Field) -> dict[str, Any]:
    name, level, shuffle = blosc_settings(field.codec)
    return {
        "name": "blosc",
        "configuration": {
            "typesize": field.dtype.itemsize,
            "cname": name,
            "clevel": level,
            "shuffle": ("noshuffle", "shuffle", "bitshuffle")[shuffle],
            "blocksize": 0,
        },
    }
