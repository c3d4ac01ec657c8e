"""The command line, called as `replaystore` calls it."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from replaystore import Field, ReplayStore, Schema, Transition
from replaystore.cli import main
from replaystore.codec import ChunkCodec

ROOT = Path(__file__).parent.parent
RUN = "import sys; from replaystore.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cartpole.replay"


def record(path, *arguments, env="CartPole-v1", steps=50):
    return main(["record", env, str(path), "--steps", str(steps), *map(str, arguments)])


def write_policy(tmp_path, text):
    policy = tmp_path / "leaning.py"
    policy.write_text(text)
    return policy


@pytest.mark.parametrize(("num_envs", "most"), [(1, 50), (3, 52)])
def test_record_makes_a_store_of_so_many_transitions(num_envs, most, path, capsys):
    assert record(path, "--num-envs", num_envs) == 0
    with ReplayStore.open(path) as store:
        store.check()
        assert 50 <= len(store) <= most
        assert capsys.readouterr().out == f"recorded {len(store)} transitions to {path}\n"
        assert np.unique(store.episodes["env"]).tolist() == list(range(num_envs))
        assert set(store.episodes["policy"].to_pylist()) == {"random"}
        assert store.make_env().spec.id == "CartPole-v1"


def test_record_with_a_seed_can_be_repeated(tmp_path):
    batches = []
    for name in ("a", "b"):
        record(tmp_path / name, "--seed", 5)
        with ReplayStore.open(tmp_path / name) as store:
            batches.append(store.read(np.arange(50), Transition()))
            assert store.episodes["seed"][0].as_py() == 5
    assert np.array_equal(batches[0].observation, batches[1].observation)
    assert np.array_equal(batches[0].action, batches[1].action)


def test_record_adds_to_the_store_that_is_there(path):
    for num_envs in (1, 3, 1):
        assert record(path, "--num-envs", num_envs) == 0
    with ReplayStore.open(path) as store:
        lengths = store.episodes.group_by("stream").aggregate([("length", "sum")]).sort_by("stream")
        assert lengths["length_sum"].to_pylist()[0] == 100
        assert len(lengths) == 2


def test_record_acts_as_the_policy_of_a_file_says(path, tmp_path):
    policy = write_policy(tmp_path, "def policy(observation):\n    return int(observation[2] > 0)\n")
    assert record(path, "--policy", policy) == 0
    with ReplayStore.open(path) as store:
        batch = store.read(np.arange(50), Transition())
        assert np.array_equal(batch.action, (batch.observation[:, 2] > 0).astype(np.int64))
        assert set(store.episodes["policy"].to_pylist()) == {"leaning"}


def test_record_hands_observations_of_all_environments_to_the_policy(path, tmp_path):
    policy = write_policy(tmp_path, "def policy(observations):\n    return (observations[:, 2] > 0) * 1\n")
    assert record(path, "--policy", policy, "--num-envs", 3) == 0
    with ReplayStore.open(path) as store:
        batch = store.read(np.arange(len(store)), Transition())
        assert np.array_equal(batch.action, (batch.observation[:, 2] > 0).astype(np.int64))


@pytest.mark.parametrize("num_envs", [1, 2])
def test_record_atari_stores_single_frames_of_stacks(num_envs, path):
    arguments = ("--atari", "--num-envs", num_envs, "--seed", 0)
    assert record(path, *arguments, env="ALE/Breakout-v5", steps=20) == 0
    with ReplayStore.open(path) as store:
        field = store.schema.by_name["observation"]
        assert (field.shape, field.dtype.name, store.frame_stack) == ((84, 84), "uint8", 4)
        assert store.sample(5, Transition(frame_stack=4)).observation.shape == (5, 4, 84, 84)
        assert store.make_env().observation_space.shape == (4, 84, 84)


def info(path, capsys):
    capsys.readouterr()
    assert main(["info", str(path)]) == 0
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_info_says_what_the_store_holds(path, capsys):
    record(path)
    told = info(path, capsys)
    with ReplayStore.open(path) as store:
        lengths = store.episodes["length"].to_pylist()
        assert told["episodes"] == str(len(lengths))
        assert told["length"].startswith(f"{min(lengths)} to {max(lengths)}, mean {np.mean(lengths):.1f}")
        assert told["bytes on disk"].startswith(f"{store.nbytes:,} ")
    assert (told["transitions"], told["streams"]) == ("50", "1")
    assert told["observation"].startswith("float32 (4,)")


def test_info_of_an_empty_store_says_so(path, capsys):
    flags = [Field(name, (), "bool") for name in ("terminated", "truncated")]
    values = [Field(name, (), "float32") for name in ("observation", "action", "reward")]
    ReplayStore.create(path, Schema(values + flags)).close()
    told = info(path, capsys)
    assert (told["transitions"], told["episodes"]) == ("0", "0")


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["record", "NoSuchEnv-v7", "PATH", "--steps", "5"], "NoSuchEnv"),
        (["record", "no_such_module:Env-v0", "PATH", "--steps", "5"], "no_such_module"),
        (["record", "not an id!", "PATH", "--steps", "5"], "not an id!"),
        (["record", "CartPole-v1", "PATH", "--steps", "0"], "--steps"),
        (["record", "CartPole-v1", "PATH", "--steps", "5", "--num-envs", "0"], "--num-envs"),
        (["record", "CartPole-v1", "PATH", "--steps", "5", "--policy", "missing.py"], "missing.py"),
        (["record", "CartPole-v1", "PATH", "--steps", "5", "--policy", __file__], "policy"),
        (["record", "CartPole-v1", "PATH", "--steps", "5", "--atari"], "CartPole-v1"),
        (["record", "CartPole-v1", "PATH/missing/store", "--steps", "5"], "PATH/missing/store"),
        (["record", "CartPole-v1", __file__, "--steps", "5"], "test_cli.py"),
        (["info", "PATH"], "PATH"),
        (["info", __file__], "test_cli.py"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_what_cannot_be_done_is_said_in_one_line_and_leaves_no_store(arguments, told, path, capsys):
    status = main([argument.replace("PATH", str(path)) for argument in arguments])
    captured = capsys.readouterr()
    assert (status, captured.out) == (1, "")
    assert captured.err.startswith("replaystore: ")
    assert captured.err.count("\n") == 1
    assert told.replace("PATH", str(path)) in captured.err
    assert not path.exists()


def test_record_into_a_store_of_another_environment_is_refused(path, capsys):
    record(path)
    capsys.readouterr()
    assert record(path, env="MountainCar-v0") == 1
    assert "observation" in capsys.readouterr().err
    with ReplayStore.open(path) as store:
        assert len(store) == 50


def test_record_into_a_directory_that_is_no_store_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert record(tmp_path) == 1
    assert "notes.txt" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_bench_measures_a_store_leaves_it_as_it_was_and_draws(path, tmp_path, capsys):
    record(path, "--atari", env="ALE/Breakout-v5", steps=60)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert main(["bench", str(path), "--seconds", "0.05", "--png", str(tmp_path / "bench.png")]) == 0
    told = capsys.readouterr().out
    figures = dict(re.findall(r"^  (.+?)  +([\d,.]+)$", told, re.MULTILINE))
    assert {"observation", "action", "warm, batch of 32", "step, commits on", "arena.py"} <= figures.keys()
    values = {name: float(value.replace(",", "")) for name, value in figures.items()}
    shares = {name: values.pop(name) for name in figures if name.endswith((".py", "numpy and others"))}
    assert min(values.values()) > 0
    assert sum(shares.values()) == pytest.approx(256e6 / values["warm, batch of 256"], rel=0.01)
    assert "stacks of 4" in told
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert sorted(tmp_path.iterdir()) == [tmp_path / "bench.png", path]


def test_tune_tries_codecs_and_marks_the_one_that_is_used(path, capsys):
    record(path, "--atari", env="ALE/Breakout-v5", steps=200)
    capsys.readouterr()
    assert main(["tune", str(path), "--rows", "100"]) == 0
    rows = re.findall(
        r"^(.) (blosc-\S+) +(\d+) +([\d.]+) +([\d.]+) +([\d.]+)$", capsys.readouterr().out, re.MULTILINE
    )
    assert [(codec, chunk) for mark, codec, chunk, *_ in rows if mark == "*"] == [("blosc-lz4hc-5", "16")]
    sizes = {(codec, int(chunk)): float(nbytes) for _, codec, chunk, nbytes, *_ in rows}
    assert sizes["blosc-lz4hc-5", 32] < sizes["blosc-lz4hc-5", 16] < sizes["blosc-lz4hc-5", 8]
    with ReplayStore.open(path) as store:
        frames = store.episode(0)["observation"][:96].reshape(6, 16, 84, 84)
        codec = ChunkCodec(store.schema.by_name["observation"])
        expected = sum(len(codec.encode(np.ascontiguousarray(chunk))) for chunk in frames) / 96
    assert sizes["blosc-lz4hc-5", 16] == pytest.approx(expected, abs=0.06)


def test_tune_of_a_store_without_packed_fields_says_so(path, capsys):
    record(path)
    assert main(["tune", str(path)]) == 0
    assert "nothing to tune" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["record", "--help"], ["info", "--help"]], ids=" ".join)
def test_help_is_given(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: replaystore")


@pytest.mark.parametrize("arguments", [[], ["recall"], ["record", "CartPole-v1"]], ids=" ".join)
def test_usage_error_has_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


# ---- Ctrl-C


def wait_for_transitions(path, process):
    """Wait until another process has committed some."""
    while process.poll() is None:
        if (path / "zarr.json").exists():
            with ReplayStore.open(path) as store:
                if len(store):
                    return
        time.sleep(0.05)
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("num_envs", [1, 3])
def test_ctrl_c_stops_and_keeps_what_was_recorded(num_envs, path):
    command = ["record", "CartPole-v1", str(path), "--steps", str(10**9), "--num-envs", str(num_envs)]
    with subprocess.Popen(
        [sys.executable, "-c", RUN, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for_transitions(path, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in err
    with ReplayStore.open(path) as store:
        store.check()
        assert out == f"recorded {len(store)} transitions to {path}\n"
    assert record(path) == 0, "the stream was not given back"
