"""Stores that released versions wrote are read for ever; `golden/make_golden.py` writes them."""

import hashlib
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from recording import Recorder, check_transitions

from replaystore import ReplayStore, Transition
from replaystore.bounds import Bounds
from replaystore.verify import verify

VERSIONS = sorted(Path(__file__).parent.glob("golden/v*"))
BOUNDED = sorted(Path(__file__).parent.glob("golden/bounded-v*"))  # of a capacity of 300
START_TIME = 1_700_000_000.25


class Golden(NamedTuple):
    """An episode of the golden store; those of one group were recorded together."""

    number: int
    stream: int
    group: int
    env: int
    length: int
    end: str
    seed: int | None
    policy: str | None
    columns: dict[str, Any]


def columns(level=None, note=None, win=None, score=None):
    return {"level": level, "note": note, "win": win, "score": score}


EPISODES = [
    Golden(0, 0, 0, 0, 5, "terminated", 7, "random", columns(3, "grüße", True, 0.5)),
    Golden(1, 0, 1, 0, 1, "truncated", None, None, columns()),
    Golden(2, 0, 2, 0, 12, "cut", 2**63 - 1, "ε-greedy", columns(-(2**63), "", False, -0.0)),
    Golden(3, 0, 3, 0, 20, "both", 0, "", columns(score=float("inf"))),
    Golden(4, 0, 4, 0, 9, "cut", 1, "last", columns(level=0)),
    Golden(5, 1, 5, 0, 6, "terminated", 11, "two", columns(1, "a")),
    Golden(6, 1, 5, 1, 6, "truncated", None, "two", columns(2, None)),
    Golden(7, 1, 6, 0, 4, "cut", 13, None, columns(win=True)),
    Golden(8, 1, 6, 1, 4, "cut", 14, None, columns(win=False)),
]


def value_of(name, episode, t):
    """A field's value at row t of an episode: different everywhere, and never to be changed."""
    last = t == episode.length - 1
    serial = 100 * episode.number + t
    return {
        "observation/image": lambda: ((np.arange(400) * (t + 1) + 7 * serial) % 256).astype("uint8").reshape(20, 20),
        "observation/vector/0": lambda: np.array([serial, -serial], "int16"),
        "action": lambda: np.int8(serial % 256 - 128),
        "reward": lambda: np.float16(serial / 4),
        "terminated": lambda: np.bool_(last and episode.end in ("terminated", "both")),
        "truncated": lambda: np.bool_(last and episode.end in ("truncated", "both")),
        "info/logits": lambda: np.array([serial, 0.1, -0.0], "float32"),
    }[name]()  # fmt: skip


def check_content(store, episodes):
    """Compare a store's episodes, their rows and their columns with the list."""
    store.check()
    assert store.num_episodes == len(episodes)
    assert len(store) == sum(episode.length for episode in episodes)
    for number, (row, episode) in enumerate(zip(store.episodes.to_pylist(), episodes, strict=True)):
        total = sum(float(value_of("reward", episode, t)) for t in range(episode.length))
        expected = episode.columns | {
            "stream": episode.stream,
            "env": episode.env,
            "length": episode.length,
            "terminated": episode.end in ("terminated", "both"),
            "truncated": episode.end in ("truncated", "both"),
            "seed": episode.seed,
            "policy": episode.policy,
            "return": total,
        }
        assert {name: row[name] for name in expected} == expected
        assert row["start_time"].timestamp() == START_TIME
        arrays = store.episode(number)
        for top in store.schema.tops:
            for name, array in store.schema.flatten_top(top, arrays[top]).items():
                rows = episode.length + store.schema.is_observation(name)
                values = np.stack([value_of(name, episode, t) for t in range(rows)])
                assert array.dtype == values.dtype
                assert array.tobytes() == values.tobytes(), (number, name)


def fingerprint(path):
    return {
        each.relative_to(path): (hashlib.sha256(each.read_bytes()).hexdigest(), each.stat().st_mtime_ns)
        for each in path.rglob("*")
        if each.is_file()
    }


def test_there_are_golden_stores():
    assert [path.name for path in VERSIONS][:1] == ["v1"]
    assert [path.name for path in BOUNDED][:1] == ["bounded-v2"]


@pytest.mark.parametrize("path", VERSIONS, ids=lambda path: path.name)
def test_a_golden_store_is_read_as_it_was_recorded(path):
    before = fingerprint(path)
    with ReplayStore.open(path) as store:
        check_content(store, EPISODES)
        assert store.env_spec == '{"id": "Golden-v1"}'
        assert store.frame_stack == 3
        assert [field.name for field in store.schema.fields if not field.packed] == [
            "action",
            "terminated",
            "truncated",
        ]
        batch = store.read(np.arange(len(store)), Transition(frame_stack=3))
        assert (batch.observation["vector"][0][0] == [[-1, -2], [-1, -2], [0, 0]]).all()
    assert fingerprint(path) == before, "opening a store to read must write nothing"


@pytest.mark.parametrize("path", VERSIONS, ids=lambda path: path.name)
def test_a_golden_store_holds_every_kind_of_file(path):
    stream = path / "streams/000000"
    assert len(list((stream / "observation/image/c").iterdir())) > 2
    assert (stream / "index/000000.arrow").is_file()
    assert (stream / "action/c/0/0").stat().st_size == 4096
    assert sum(each.stat().st_size for each in path.rglob("*") if each.is_file()) < 120_000


@pytest.mark.parametrize("path", VERSIONS, ids=lambda path: path.name)
@pytest.mark.parametrize("num_envs", [1, 2])
def test_a_golden_store_is_appended_to(tmp_path, path, num_envs):
    shutil.copytree(path, tmp_path / "store")
    with ReplayStore.open(tmp_path / "store", "a", num_envs=num_envs) as store:
        check_content(store, EPISODES)
        episode = EPISODES[0]
        flat = {
            name: np.stack([value_of(name, episode, t) for t in range(5 + store.schema.is_observation(name))])
            for name in store.schema.by_name
        }
        store.add_episode(**{top: store.schema.nest(top, flat) for top in store.schema.tops})
        assert len(list((tmp_path / "store/streams").glob("0*"))) == 2, "a stream is taken up again"
    with ReplayStore.open(tmp_path / "store") as store:
        assert store.num_episodes == len(EPISODES) + 1
        added = [5, len(EPISODES)][num_envs - 1]
        assert (store.episode(added)["action"] == flat["action"]).all()
        assert (store.episode(added)["observation"]["image"] == flat["observation/image"]).all()


@pytest.mark.parametrize("path", BOUNDED, ids=lambda path: path.name)
def test_a_golden_store_with_a_capacity_is_read_and_appended_to(tmp_path, path):
    before = fingerprint(path)
    with ReplayStore.open(path) as store:
        store.check()
        assert store.bounds == Bounds(capacity=300)
        assert check_transitions(store) == list(range(3308, 3600))
    assert fingerprint(path) == before, "opening a store to read must write nothing"
    shutil.copytree(path, tmp_path / "store")
    with ReplayStore.open(tmp_path / "store", "a") as store:
        recorder = Recorder(store, start=3600)
        recorder.step(100)
        store.flush()
        numbers = check_transitions(store)
        assert 280 < len(numbers) <= 300
        assert numbers == list(range(3700 - len(numbers), 3700))
    assert list(verify(tmp_path / "store")) == []
