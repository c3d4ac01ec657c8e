"""What is kept beside the rows: verify reads all of it, repair moves what is damaged out of the way."""

import os
import pickle
import random
import shutil

import numpy as np
import pytest
from growing import add_stream

import replaystore.sampler_file
import replaystore.verify
from replaystore import Prioritized, ReplayStore, ReplayStoreError, UsageError, load_sampler, save_sampler
from replaystore.cli import main
from replaystore.repair import repair
from replaystore.verify import kept_files, verify

FILES = [
    "checkpoints/first.arrow",
    "checkpoints/identity",
    "checkpoints/second.arrow",
    "samplers/learner.arrow",
    "stats/observation.json",
    "stats/reward.json",
]


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A store with a sampler, two checkpoints and statistics of two fields."""
    path = tmp_path_factory.mktemp("kept") / "store"
    add_stream(path, 100)
    sampler = Prioritized()
    with ReplayStore.open(path, "a") as store:
        store.checkpoint("second", {"step": 1}, samplers={"replay": sampler})
        ids = store.sample(50, sampler=sampler).ids
        sampler.update_priorities(ids, np.arange(50.0))
        store.checkpoint("first", {"step": 2}, samplers={"replay": sampler})
        assert store.checkpoints == ["second", "first"]
        save_sampler(path, "learner", sampler)
    with ReplayStore.open(path) as store:
        store.stats("observation")
        store.stats("reward")
    return path


@pytest.fixture
def path(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "store")


def contents(path):
    """What a user is given of all that is kept, as bytes."""
    with ReplayStore.open(path) as store:
        sampler, states = Prioritized(), []
        for name in ("first", "second"):
            states.append(store.restore(name, samplers={"replay": sampler}))
            states.append(sampler.state_dict())
        load_sampler(path, "learner", sampler)
        return pickle.dumps([*states, sampler.state_dict(), store.checkpoints])


def test_the_files_are_all_found_and_whole(path):
    assert [str(file.relative_to(path)) for file in sorted(kept_files(path))] == FILES
    assert list(verify(path)) == []
    (path / "samplers" / "learner.arrow.1-1.partial").write_bytes(b"cut short by a kill")
    (path / "checkpoints" / "first.arrow.1-1.partial").write_bytes(b"")
    assert list(verify(path)) == []


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_byte_is_found_or_changes_nothing(path, file):
    rng, expected = random.Random(file), contents(path)
    content, found = (path / file).read_bytes(), 0
    for _ in range(60):
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (path / file).write_bytes(changed)
        findings = list(verify(path))
        assert {finding.path.parent.name for finding in findings} <= {file.split("/")[0]}
        assert all(finding.stop == 0 and finding.stream is None for finding in findings)
        if findings:
            found += 1
        elif not file.startswith("stats"):  # padding, or an order of bytes that means the same
            assert contents(path) == expected
    assert found > 20


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"{}"]
)
def test_a_cut_or_foreign_file_is_named_and_moved_out_of_the_way(path, file, damage):
    (path / file).write_bytes(damage((path / file).read_bytes()))
    findings = list(verify(path))
    assert all(str(finding.path) in str(finding) for finding in findings)
    assert path / file in {finding.path for finding in findings}
    done = repair(path, findings)
    assert list(verify(path)) == []
    if file.endswith("identity"):  # the checkpoints say what it was
        assert done == []
        with ReplayStore.open(path) as store:
            assert store.restore("first") == {"step": 2}
        return
    assert [each.path for each in done] == [path / file]
    assert done[0].moved_to.is_file()
    with ReplayStore.open(path, "a") as store:
        assert len(store) == 100
        assert [name for name in ("second", "first") if f"{name}.arrow" not in file] == store.checkpoints
        store.checkpoint("third")


def test_a_checkpoint_of_another_store_is_named(path, tmp_path):
    add_stream(tmp_path / "other", 10)
    with ReplayStore.open(tmp_path / "other", "a") as store:
        store.checkpoint("foreign")
    shutil.copy(tmp_path / "other" / "checkpoints" / "foreign.arrow", path / "checkpoints")
    [finding] = verify(path)
    assert "foreign.arrow: expected a checkpoint of this store" in str(finding)
    [moved] = repair(path, [finding])
    assert moved.path == finding.path
    assert list(verify(path)) == []
    with ReplayStore.open(path) as store:
        assert store.checkpoints == ["second", "first"]


def test_links_out_of_the_store_are_named_and_not_followed(path, tmp_path):
    (path / "samplers").rename(tmp_path / "elsewhere")
    (path / "samplers").symlink_to(tmp_path / "elsewhere")
    (path / "stats" / "reward.json").unlink()
    os.mkfifo(path / "stats" / "reward.json")
    (path / "checkpoints" / "third.arrow").symlink_to("nowhere")
    findings = list(verify(path))
    assert [str(finding.path.relative_to(path)) for finding in findings] == [
        "samplers",
        "stats/reward.json",
        "checkpoints/third.arrow",
    ]
    repair(path, findings)
    assert list(verify(path)) == []
    assert (tmp_path / "elsewhere" / "learner.arrow").exists()


def test_a_file_that_is_removed_meanwhile_is_not_missed(path, monkeypatch):
    files = kept_files(path)
    monkeypatch.setattr(replaystore.verify, "kept_files", lambda root: files)
    (path / "checkpoints" / "second.arrow").unlink()
    assert list(verify(path)) == []


def test_a_forged_state_of_a_sampler_is_refused_as_damaged(path):
    for state in ({"array": 0}, {"a": {"array": 7}}, {"a": {"array": "x"}}):
        data = replaystore.sampler_file._encode("Prioritized", state)
        (path / "samplers" / "learner.arrow").write_bytes(data)
        with pytest.raises(ReplayStoreError, match="expected a sampler's state"):
            load_sampler(path, "learner", Prioritized())
        assert len(list(verify(path))) == 1


def test_checkpoints_are_listed_in_their_order_and_shown(path, tmp_path, capsys):
    with ReplayStore.open(path, "a") as store:
        assert store.checkpoints == ["second", "first"]
        store.checkpoint("second")
        assert store.checkpoints == ["first", "second"]
        store.checkpoint("third", keep=1)
        assert store.checkpoints == ["third"]
        store.checkpoint("fourth")
    add_stream(tmp_path / "none", 3)
    for folder, shown in ((path, "third, fourth"), (tmp_path / "none", "none")):
        assert main(["info", str(folder)]) == 0
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("checkpoints ")]
        assert line.split(maxsplit=1)[1] == shown


def test_verify_and_repair_of_kept_files_from_the_command_line(path, capsys):
    (path / "samplers" / "learner.arrow").write_bytes(b"gone")
    assert main(["verify", str(path)]) == 1
    assert str(path / "samplers" / "learner.arrow") in capsys.readouterr().out
    assert main(["repair", str(path), "--yes"]) == 0
    assert "learner.arrow: moved to" in capsys.readouterr().out
    assert main(["verify", str(path)]) == 0
    with pytest.raises(UsageError, match="found none"):
        load_sampler(path, "learner", Prioritized())
