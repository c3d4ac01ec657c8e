"""A run that was killed comes to the same, to the last bit, as one that was not."""

import sys
from pathlib import Path

import pytest
import torch
from resuming import Moment, difference, outcome, run_killed, run_through

from replaystore import ReplayStore

ARGUMENTS = ["--steps", "1500", "--every", "200"]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    for name in ("dqn", "record_rollouts", "resume_dqn"):
        sys.modules.pop(name, None)
    import resume_dqn

    yield resume_dqn
    torch.use_deterministic_algorithms(False)


def test_a_run_that_is_killed_twice_ends_with_the_same_weights_rows_and_returns(tmp_path):
    run_through(tmp_path / "whole", ARGUMENTS)
    moments = [Moment(500, 0.0), Moment(900, 0.05)]
    assert run_killed(tmp_path / "killed", ARGUMENTS, moments) == 2
    expected, found = outcome(tmp_path / "whole"), outcome(tmp_path / "killed")
    assert difference(expected, found) is None
    assert len(expected.episodes) == len(expected.state["returns"]) > 10


def test_a_run_goes_on_from_its_last_checkpoint_and_differs_with_another_seed(tmp_path, example, capsys):
    arguments = [str(tmp_path / "store"), "--picture", str(tmp_path / "curve.png"), "--every", "100"]
    first = example.main([*arguments, "--steps", "300"])
    assert "going on" not in capsys.readouterr().out
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    second = example.main([*arguments, "--steps", "500"])
    assert f"going on at step {first.ends[-1]}" in capsys.readouterr().out
    assert second.returns[: len(first.returns)] == first.returns
    assert second.ends[-1] >= 500 > first.ends[-1]
    with pytest.raises(SystemExit, match="expected --seed 0"):
        example.main([*arguments, "--steps", "700", "--seed", "1"])


def test_a_run_begins_from_a_recorded_store(tmp_path, example):
    arguments = ["--picture", str(tmp_path / "curve.png"), "--steps", "300"]
    recorded = example.main([str(tmp_path / "recorded"), *arguments])
    (tmp_path / "recorded/checkpoints/latest.arrow").unlink()
    with pytest.raises(SystemExit, match="--warm-start"):
        example.main([str(tmp_path / "recorded"), *arguments])
    warm = ["--warm-start", str(tmp_path / "recorded")]
    result = example.main([str(tmp_path / "warm"), *arguments, *warm])
    with ReplayStore.open(tmp_path / "warm") as store:
        assert len(store) == recorded.ends[-1] + result.ends[-1]
    again = example.main([str(tmp_path / "warm"), *arguments, *warm])
    assert again == result, "it is not begun once more"


def test_atari_goes_on_in_stacks_of_frames(tmp_path, example, monkeypatch):
    plan = example.FRAMES._replace(warm_up=20, batch=4, learn_every=50)
    monkeypatch.setattr(example, "FRAMES", plan)
    arguments = ["--env", "ALE/Breakout-v5", "--picture", str(tmp_path / "curve.png"), "--every", "1"]
    monkeypatch.setattr(example, "exploration", lambda step, steps: 1.0)
    whole = example.main([str(tmp_path / "whole"), *arguments, "--steps", "400"])
    stopped = example.main([str(tmp_path / "parts"), *arguments, "--steps", "100"])
    assert len(stopped.returns) < len(whole.returns)
    example.main([str(tmp_path / "parts"), *arguments, "--steps", "400"])
    assert difference(outcome(tmp_path / "whole"), outcome(tmp_path / "parts")) is None
    with ReplayStore.open(tmp_path / "parts") as store:
        assert store.frame_stack == 4
