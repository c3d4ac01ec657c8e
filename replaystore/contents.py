"""What a checkpoint keeps beside the rows: the user's state, samplers, generators, a loader."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from replaystore.checkpoints import checkpoint_path
from replaystore.errors import CorruptionError, UsageError
from replaystore.index import STREAM_BIT
from replaystore.leaves import restore_leaves
from replaystore.samplers import Sampler
from replaystore.states import (
    generator_state,
    global_generators,
    kind_of,
    pack,
    set_generator_state,
    set_global_generators,
    unpack,
)
from replaystore.writer import Moved

NONE: Mapping[str, Any] = MappingProxyType({})


def pack_content(
    state: Any, samplers: Mapping[str, Sampler], generators: Mapping[str, Any], loader: Any
) -> bytes:
    """Everything as bytes; `UsageError` names what cannot be kept."""
    _check_given(samplers, generators, loader)
    content = {
        "user": pack(state),
        "samplers": {
            name: {"kind": type(sampler).__name__, "state": sampler.state_dict()}
            for name, sampler in samplers.items()
        },
        "generators": {name: generator_state(name, each) for name, each in generators.items()},
        "shared": global_generators(),
        "loader": None if loader is None else loader.state_dict(),
    }
    return pack(content)


def unpack_content(store: Path, name: str, data: bytes) -> dict[str, Any]:
    try:
        content: dict[str, Any] = unpack(data)
    except ValueError as error:
        raise CorruptionError(f"{checkpoint_path(store, name)}: {error}") from error
    return content


def restore_content(
    content: dict[str, Any],
    samplers: Mapping[str, Sampler],
    generators: Mapping[str, Any],
    loader: Any,
    *,
    moved: Sequence[Moved],
    widths: np.ndarray,
) -> Any:
    """Let all that is given go on from what was kept of it; returns the user's state.

    Rows of open episodes are known to samplers by their new ids; `widths` are the streams' environments.
    """
    _check_given(samplers, generators, loader)
    if loader is not None and content["loader"] is None:
        raise UsageError("loader: expected none, as the checkpoint kept none")
    _check_kinds("samplers", content["samplers"], {n: type(s).__name__ for n, s in samplers.items()})
    kinds = {name: generator_state(name, each)["kind"] for name, each in generators.items()}
    _check_kinds("generators", content["generators"], kinds)
    for name, sampler in samplers.items():
        state = content["samplers"][name]["state"]
        for each in moved:
            state = _with_moved(state, each, int(widths[each.stream]))
        sampler.load_state_dict(state)
    if loader is not None:
        loader.load_state_dict(content["loader"])
    for name, generator in generators.items():
        set_generator_state(generator, content["generators"][name])
    set_global_generators(content["shared"])
    return unpack(content["user"])


def _check_given(samplers: Mapping[str, Sampler], generators: Mapping[str, Any], loader: Any) -> None:
    for name, given in (("samplers", samplers), ("generators", generators)):
        if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
            raise UsageError(f"{name}: expected a dict with names as keys, got {given!r}")
    for name, sampler in samplers.items():
        if not isinstance(sampler, Sampler):
            raise UsageError(f"samplers[{name!r}]: expected a Sampler, got {kind_of(sampler)}")
    if loader is not None and not (hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")):
        raise UsageError(f"loader: expected one of ReplayDataset.loader, got {kind_of(loader)}")


def _check_kinds(what: str, kept: Mapping[str, Any], given: Mapping[str, str]) -> None:
    for name, kind in given.items():
        if name not in kept:
            raise UsageError(f"{what}: expected names of those kept, {sorted(kept)}, got {name!r}")
        if kept[name]["kind"] != kind:
            raise UsageError(f"{what}[{name!r}]: expected a {kept[name]['kind']}, as was kept, got a {kind}")


def _with_moved(state: Any, moved: Moved, width: int) -> Any:
    """A sampler's state after an open episode got other rows; samplers may hold others' states.

    What names rows in a state are leaves, by id (`leaves.py`), and extents, by place (`index.py`).
    """
    if isinstance(state, (list, tuple)):
        return type(state)(_with_moved(child, moved, width) for child in state)
    if not isinstance(state, dict):
        return state
    state = {name: _with_moved(child, moved, width) for name, child in state.items()}
    if state.keys() >= {"pages", "values", "floors"}:
        state |= _moved_leaves(state, moved, width)
    if state.keys() >= {"closed", "open"}:
        state["open"] = [_moved_episode(episode, moved) for episode in state["open"]]
    return state


def _moved_leaves(state: dict[str, Any], moved: Moved, width: int) -> dict[str, np.ndarray]:
    leaves, steps = restore_leaves(state), np.arange(moved.length) * width
    old, new = (
        (moved.stream << STREAM_BIT) + first * width + moved.env + steps for first in (moved.old, moved.new)
    )
    leaves.move(old, new)
    return leaves.state()


def _moved_episode(episode: Sequence[int], moved: Moved) -> list[int]:
    stream, env, first, last = episode
    if (stream, env, first) == (moved.stream, moved.env, moved.old):
        return [stream, env, moved.new, moved.new + last - first]
    return list(episode)
