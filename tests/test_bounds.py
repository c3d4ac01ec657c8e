"""Bounds that recorders are given: those of a store that they make, and never others than it has."""

import gymnasium as gym
import numpy as np
import pytest

from replaystore import ReplayStore, UsageError
from replaystore.bounds import Bounds
from replaystore.cli import main
from replaystore.recorder import RecordReplay, RecordVectorReplay

BOUNDS = {"capacity": 2000, "capacity_bytes": 40_000_000, "max_age": 3600.0}


def record_one(path, **bounds):
    env = RecordReplay(gym.make("CartPole-v1"), path, **bounds)
    env.reset(seed=0)
    env.step(0)
    env.close()


def record_two(path, **bounds):
    envs = RecordVectorReplay(gym.make_vec("CartPole-v1", 2), path, **bounds)
    envs.reset(seed=0)
    envs.step(np.array([0, 1]))
    envs.close()


def record_from_the_shell(path, **bounds):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in bounds.items()]
    assert main(["record", "CartPole-v1", str(path), "--steps", "3", "--seed", "0", *options]) == 0


RECORDERS = {"one": record_one, "two": record_two, "shell": record_from_the_shell}


@pytest.mark.parametrize("record", RECORDERS.values(), ids=RECORDERS)
def test_a_store_that_is_made_has_the_bounds_and_is_added_to_with_them_or_without(record, tmp_path):
    record(tmp_path / "store", **BOUNDS)
    with ReplayStore.open(tmp_path / "store") as store:
        assert store.bounds == Bounds(**BOUNDS)
        count = len(store)
    record(tmp_path / "store", **BOUNDS)
    record(tmp_path / "store", capacity=2000)
    record(tmp_path / "store")
    with ReplayStore.open(tmp_path / "store") as store:
        assert len(store) == 4 * count


@pytest.mark.parametrize("record", [record_one, record_two])
def test_reservoir_that_is_made_is_added_to_with_or_without_saying_so(record, tmp_path):
    for bounds in ({"capacity": 2000, "reservoir": True}, {"capacity": 2000}, {}):
        record(tmp_path / "store", **bounds)
        with ReplayStore.open(tmp_path / "store") as store:
            assert store.bounds == Bounds(2000, reservoir=True)
    record(tmp_path / "other", capacity=2000)
    with pytest.raises(UsageError, match=r"reservoir: expected False, as .* was created with, got True"):
        record(tmp_path / "other", capacity=2000, reservoir=True)


def test_reservoir_is_made_from_the_shell(tmp_path, capsys):
    options = ["--steps", "3", "--capacity", "2000", "--reservoir"]
    assert main(["record", "CartPole-v1", str(tmp_path / "store"), *options]) == 0
    assert main(["info", str(tmp_path / "store")]) == 0
    assert "2,000 transitions, a reservoir" in capsys.readouterr().out


@pytest.mark.parametrize("num_envs", ["1", "2"])
def test_recording_from_the_shell_ends_though_the_store_is_full(num_envs, tmp_path, capsys):
    options = ["--steps", "1200", "--capacity", "300", "--num-envs", num_envs, "--seed", "0"]
    assert main(["record", "CartPole-v1", str(tmp_path / "store"), *options]) == 0
    assert capsys.readouterr().out.startswith("recorded 120")
    with ReplayStore.open(tmp_path / "store") as store:
        assert 200 < len(store) <= 300


def files_of(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("record", [record_one, record_two])
@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("is_bounded", [True, False])
def test_another_bound_than_the_store_has_is_refused_with_both_and_changes_nothing(
    record, name, is_bounded, tmp_path
):
    path = tmp_path / "store"
    record(path, **BOUNDS if is_bounded else {})
    before, other = files_of(path), BOUNDS[name] * 2
    expected = BOUNDS[name] if is_bounded else "none"
    message = f"^{name}: expected {expected}, as {path} was created with, got {other}$"
    with pytest.raises(UsageError, match=message):
        record(path, **{name: other})
    assert files_of(path) == before


@pytest.mark.parametrize(("value", "expected"), [(5, "at least 128"), (-1, "an int from 1"), ("9", "an int")])
def test_what_can_be_no_bound_is_refused_and_makes_no_store(value, expected, tmp_path):
    with pytest.raises(UsageError, match=f"^capacity: expected .*{expected}.*got {value!r}$"):
        record_one(tmp_path / "store", capacity=value)
    assert not (tmp_path / "store").exists()
    record_one(tmp_path / "store", **BOUNDS)
    with pytest.raises(UsageError, match=r"^capacity: expected .*got "):
        record_one(tmp_path / "store", capacity=value)


def test_going_on_from_a_checkpoint_asks_for_the_same_bounds(tmp_path):
    record_one(tmp_path / "store", **BOUNDS)
    with ReplayStore.open(tmp_path / "store", "a") as store:
        store.checkpoint("here")
    with pytest.raises(UsageError, match=r"^capacity: expected 2000"):
        record_one(tmp_path / "store", at="here", capacity=3000)
    record_one(tmp_path / "store", at="here", capacity=2000)


def test_a_recorder_keeps_within_the_bounds(tmp_path):
    env = RecordReplay(gym.make("CartPole-v1"), tmp_path / "store", capacity=400)
    for seed in range(60):
        env.reset(seed=seed)
        while not any(env.step(env.action_space.sample())[2:4]):
            pass
    env.close()
    with ReplayStore.open(tmp_path / "store") as store:
        assert 400 * 15 // 16 <= len(store) <= 400
        store.check()


def test_the_shell_says_what_differs_and_info_shows_the_bounds(tmp_path, capsys):
    path = tmp_path / "store"
    record_from_the_shell(path, capacity=2000)
    command = ["record", "CartPole-v1", str(path), "--steps", "3", "--capacity", "3000"]
    assert main(command) == 1
    assert f"capacity: expected 2000, as {path} was created with, got 3000" in capsys.readouterr().err
    for name, bounds, shown in [
        ("store", {}, "2,000 transitions"),
        ("all", BOUNDS, "2,000 transitions, 40,000,000 bytes, 3,600.0 seconds"),
        ("none", {}, "none"),
    ]:
        if name != "store":
            record_from_the_shell(tmp_path / name, **bounds)
        capsys.readouterr()
        assert main(["info", str(tmp_path / name)]) == 0
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bounds ")]
        assert line.split(maxsplit=1)[1] == shown
