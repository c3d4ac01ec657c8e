"""What a checkpoint keeps beside the store: the user's values, and the states of random generators.

`pack` turns nested dicts, lists and tuples of tensors, arrays, numbers, strings, bytes and None into
the bytes of `torch.save`, which `torch.load` takes without trusting the file; `unpack` is its
inverse. Arrays, numpy's scalars and bytes travel as tensors of bytes, in a dict that names itself by
the key `MARK`. torch is loaded when one of these functions is called, not before.
"""

import io
import pickle
import random
import struct
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from replaystore.errors import UsageError

MARK = "replaystore"  # a key of dicts that stand for something else
MAX_DEPTH = 64  # of nested values
MAX_BITS = 2000  # of an integer, which is what `torch.load` takes
KINDS = "biufc"  # of dtypes: bool, integers, floats, complex
UNREADABLE = (RuntimeError, pickle.UnpicklingError, struct.error, LookupError, TypeError, EOFError)
PLAIN = (bool, int, float, str, type(None))


def pack(value: Any) -> bytes:
    """A nested value as bytes; `UsageError` names the place of what cannot be kept."""
    import torch

    file = io.BytesIO()
    torch.save(_packed(value, "state", 0), file)
    return file.getvalue()


def unpack(data: bytes) -> Any:
    """The value that was packed; tensors are on the CPU. `ValueError` if the bytes are no such value."""
    import torch

    try:
        return _unpacked(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    except UNREADABLE as error:
        raise ValueError(f"expected a value packed by a checkpoint: {error}") from error


def _packed(value: Any, path: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise UsageError(f"{path[:200]}: expected values nested at most {MAX_DEPTH} deep")
    kind = type(value)
    if kind is int and value.bit_length() > MAX_BITS:
        raise UsageError(f"{path}: expected integers of at most {MAX_BITS} bits")
    if kind in PLAIN:
        return value
    if kind in (dict, OrderedDict):
        return _packed_dict(value, path, depth)
    if kind in (list, tuple):
        return kind(_packed(child, f"{path}[{i}]", depth + 1) for i, child in enumerate(value))
    if kind is bytes:
        return _as_tensor("bytes", np.frombuffer(value, np.uint8))
    if isinstance(value, np.generic) or kind is np.ndarray:
        array = np.asarray(value)
        if array.dtype.kind in KINDS:
            return _as_tensor("array" if kind is np.ndarray else "scalar", array)
        raise UsageError(f"{path}: expected an array of numbers or bools, got one of {array.dtype}")
    return _packed_tensor(value, path)


def _packed_dict(value: dict[Any, Any], path: str, depth: int) -> dict[Any, Any]:
    for key in value:
        if type(key) not in PLAIN or key == MARK:
            raise UsageError(f"{path}: expected keys that are numbers or strings, not {MARK!r}, got {key!r}")
    packed = type(value)((key, _packed(child, f"{path}[{key!r}]", depth + 1)) for key, child in value.items())
    if type(value) is OrderedDict and "_metadata" in vars(value):  # of a module's state_dict
        vars(packed)["_metadata"] = _packed(vars(value)["_metadata"], f"{path}._metadata", depth + 1)
    return packed


def _packed_tensor(value: Any, path: str) -> Any:
    import torch

    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        expected = "nested dicts, lists and tuples of tensors, arrays, numbers, strings, bytes and None"
        raise UsageError(f"{path}: expected {expected}, got {kind_of(value)}")
    if value.layout is not torch.strided or value.is_meta or value.is_quantized:
        raise UsageError(f"{path}: expected a dense tensor with values, got {kind_of(value)}")
    value = value.detach()
    is_part = value.untyped_storage().nbytes() != value.nbytes  # of which all would be saved
    return value.clone() if is_part else value


def _as_tensor(kind: str, array: np.ndarray) -> dict[str, Any]:
    import torch

    little = np.array(array, array.dtype.newbyteorder("<"), order="C")
    data = torch.from_numpy(little.reshape(-1).view(np.uint8))
    return {MARK: kind, "dtype": little.dtype.str, "shape": list(array.shape), "data": data}


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict):
        if MARK in value:
            return _from_tensor(value)
        unpacked = type(value)((key, _unpacked(child)) for key, child in value.items())
        if type(value) is OrderedDict and "_metadata" in vars(value):
            vars(unpacked)["_metadata"] = _unpacked(vars(value)["_metadata"])
        return unpacked
    if isinstance(value, (list, tuple)):
        return type(value)(_unpacked(child) for child in value)
    return value


def _from_tensor(value: Mapping[str, Any]) -> Any:
    dtype, data = np.dtype(value["dtype"]), value["data"].numpy()
    if dtype.kind not in KINDS:
        raise ValueError(f"expected an array of numbers, found one of {dtype}")
    if value[MARK] == "bytes":
        return data.tobytes()
    array = data.view(dtype).reshape(value["shape"])
    return array if value[MARK] == "array" else array[()]


def kind_of(value: Any) -> str:
    """The type of a value, as a user knows it."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


# ---- random generators


def global_generators() -> dict[str, Any]:
    """The states of the generators that all of a program shares: Python's, numpy's, torch's."""
    import torch

    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
    }
    return state


def set_global_generators(state: Mapping[str, Any]) -> None:
    """Give them these states; those of CUDA devices where there are as many of them."""
    import torch

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def generator_state(name: str, generator: Any) -> dict[str, Any]:
    """The state of a numpy or torch generator, with the kind that it is of."""
    import torch

    if isinstance(generator, np.random.Generator):
        kind = type(generator.bit_generator).__name__
        return {"kind": kind, "state": generator.bit_generator.state}
    if isinstance(generator, torch.Generator):
        return {"kind": f"torch {generator.device.type}", "state": generator.get_state()}
    expected = "a numpy.random.Generator or torch.Generator"
    raise UsageError(f"generators[{name!r}]: expected {expected}, got {kind_of(generator)}")


def set_generator_state(generator: Any, state: Mapping[str, Any]) -> None:
    """Let a generator go on from a state of its kind."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state["state"]
    else:
        generator.set_state(state["state"])
