"""Damaged files: verify finds every flipped byte, no reader returns one, repair keeps the rest."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from recording import Recorder, check_transitions, observations, schema

import replaystore.commit
from replaystore import ReplayStore, ReplayStoreError
from replaystore.cli import main
from replaystore.packed import PackedWriter
from replaystore.repair import repair
from replaystore.verify import verify

EPISODES = 40


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two writers, with full shards, sealed index parts and an open shard."""
    path = tmp_path_factory.mktemp("damage") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("replaystore.schema.SHARD_CHUNKS", 32)
        patch.setattr("replaystore.commit.PART_EPISODES", 10)
        with ReplayStore.create(path, schema()) as store:
            recorder = Recorder(store)
            for _ in range(EPISODES // 10):
                recorder.step(70)
                store.flush()
            with ReplayStore.open(path, "a") as second:
                Recorder(second, start=7 * EPISODES).step(20)
                second.flush()
    return path


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name != "lock")


def copy(intact: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    shutil.copytree(intact, target)
    return target


def read_all(path: Path) -> list[int] | None:
    """The transitions of a store, asserted to be right in packed fields; None if it is refused."""
    try:
        with ReplayStore.open(path) as store:
            batch = store.read(np.arange(len(store)))
    except ReplayStoreError:
        return None
    expected = observations(np.arange(7 * EPISODES + 21))
    known = {row.tobytes() for row in expected}
    assert all(row.tobytes() in known for row in batch.observation), "altered data"
    assert all(row.tobytes() in known for row in batch.next_observation), "altered data"
    return batch.action.tolist()


def is_live(path: Path, intact: Path) -> bool:
    """Whether a damaged copy differs from the store in what any reader is told."""
    with ReplayStore.open(intact) as one, ReplayStore.open(path) as other:
        first, second = (store.read(np.arange(len(store))) for store in (one, other))
        same = all(
            np.array_equal(getattr(first, name), getattr(second, name))
            for name in ("observation", "action", "reward", "terminated", "truncated", "ids")
        )
        return not (same and one.episodes.equals(other.episodes) and one.env_spec == other.env_spec)


def test_flipped_byte_is_found_or_harmless(intact, tmp_path):
    """The long run, over every kind of file, is `tools/damage`."""
    rng = random.Random(0)
    target = copy(intact, tmp_path)
    for file in files_of(target):
        content = file.read_bytes()
        for _ in range(12):
            place = rng.randrange(len(content))
            flip_byte(file, content, place, 1 << rng.randrange(8))
            found = list(verify(target))
            read_all(target)
            assert found or not is_live(target, intact), f"{file} at {place}"
            file.write_bytes(content)
    assert list(verify(target)) == []


def flip_byte(file: Path, content: bytes, place: int, bits: int) -> None:
    with open(file, "r+b") as out:
        out.seek(place)
        out.write(bytes([content[place] ^ bits]))


def test_truncated_or_missing_file_is_found_and_never_read_as_zeros(intact, tmp_path):
    rng = random.Random(1)
    target = copy(intact, tmp_path)
    for file in files_of(target):
        content = file.read_bytes()
        for length in [None, 0, *[rng.randrange(len(content)) for _ in range(6)]]:
            if length is None:
                file.unlink()
            else:
                file.write_bytes(content[:length])
            found = list(verify(target))
            numbers = read_all(target)
            spare = file.parent.name == "heads"
            assert found or spare or (numbers and not is_live(target, intact)), f"{file} cut to {length}"
            assert numbers is None or numbers == list(range(len(numbers))), file
            file.write_bytes(content)


def test_swapped_files_are_found(intact, tmp_path):
    target = copy(intact, tmp_path)
    shards = sorted((target / "streams/000000/observation/c").glob("*/0/0/0"))
    first, second = shards[0].read_bytes(), shards[1].read_bytes()
    shards[0].write_bytes(second)
    assert [f.path for f in verify(target)] == [shards[0]]
    assert read_all(target) is None
    shards[0].write_bytes(first)
    reward, action = (target / f"streams/000000/{name}/c/0/0" for name in ("reward", "action"))
    reward.write_bytes(action.read_bytes())
    assert [f.path for f in verify(target)] == [reward]


@pytest.mark.parametrize(
    ("damaged", "lost"),
    [
        ("streams/000000/head.arrow", 0),
        ("streams/000001/head.arrow", 0),
        ("zarr.json", 0),
        ("streams/zarr.json", 0),
        ("streams/000000/zarr.json", 0),
        ("streams/000000/reward/zarr.json", 0),
        ("streams/000000/terminated/c/0/0", 0),
        ("streams/000000/reward/c/0/0", 280),
        ("streams/000000/index/000001.arrow", 70),
    ],
)
def test_repair_keeps_what_is_intact(damaged, lost, intact, tmp_path):
    target = copy(intact, tmp_path)
    content = (target / damaged).read_bytes()
    flip_byte(target / damaged, content, len(content) // 2 if "c/" not in damaged else 8, 255)
    findings = list(verify(target))
    assert findings
    repair(target, findings)
    assert list(verify(target)) == []
    with ReplayStore.open(target) as store:
        store.check()
        assert len(store) == 300 - lost
        check_transitions(store)
    with ReplayStore.open(target, "a") as store:
        Recorder(store, start=1000).step(7)
    with ReplayStore.open(target) as store:
        assert len(store) == 307 - lost
        check_transitions(store)


def test_repair_drops_only_the_transitions_of_a_damaged_chunk(intact, tmp_path):
    target = copy(intact, tmp_path)
    shard = target / "streams/000000/observation/c/1/0/0/0"
    flip_byte(shard, shard.read_bytes(), 5, 1)
    with ReplayStore.open(intact) as store:
        before = store.episodes.to_pylist()
    (repaired,) = repair(target, list(verify(target)))
    assert list(verify(target)) == []
    assert repaired.before == 280
    assert repaired.after in (277, 278)  # a chunk of two rows, the last of an episode or not
    assert (repaired.moved_to / "observation").is_dir()
    with ReplayStore.open(target) as store:
        check_transitions(store)
        after = store.episodes.to_pylist()
        kept = [e for e in after if e["stream"] == 0 and e["terminated"]]
        whole = [e for e in before if e["stream"] == 0]
        assert len(kept) in (39, 40)
        assert [e["return"] for e in kept[-20:]] == [e["return"] for e in whole[-20:]]


def test_verify_and_repair_from_the_command_line(intact, tmp_path, capsys, monkeypatch):
    target = copy(intact, tmp_path)
    assert main(["verify", str(target)]) == 0
    shard = target / "streams/000000/observation/c/1/0/0/0"
    flip_byte(shard, shard.read_bytes(), 5, 1)
    capsys.readouterr()
    assert main(["verify", str(target)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert str(shard) in lines[0]
    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert main(["repair", str(target)]) == 1
    assert not (tmp_path / "copy.dropped").exists()
    assert main(["repair", str(target), "--yes"]) == 0
    assert main(["verify", str(target)]) == 0


def test_an_older_head_in_place_of_the_newest_is_found_and_repaired(tmp_path):
    head = tmp_path / "store" / "streams" / "000000" / "head.arrow"
    with ReplayStore.create(tmp_path / "store", schema()) as store:
        recorder = Recorder(store)
        recorder.step(7)
        store.flush()
        older = head.read_bytes()
        recorder.step(7)
    head.write_bytes(older)
    assert any("expected commit" in str(finding) for finding in verify(tmp_path / "store"))
    list(repair(tmp_path / "store", list(verify(tmp_path / "store"))))
    assert list(verify(tmp_path / "store")) == []
    with ReplayStore.open(tmp_path / "store") as store:
        assert check_transitions(store) == list(range(14))


def test_a_shard_that_was_repacked_is_named_before_anything_is_appended_to_it(tmp_path, monkeypatch):
    """As when a writer is killed between repacking and its head, and the next one at any later moment."""
    path, killed, states = tmp_path / "store", tmp_path / "killed", []
    repack, write_head = PackedWriter.repack, replaystore.commit.write_head

    def repack_and_copy(*args):
        state = repack(*args)
        shutil.copytree(path, killed)
        return state

    def copy_and_write(*args):
        states.append(tmp_path / f"state-{len(states)}")
        shutil.copytree(killed, states[-1])
        write_head(*args)

    with ReplayStore.create(path, schema()) as store, monkeypatch.context() as patch:
        recorder = Recorder(store)
        for _ in range(6):
            recorder.step()
            store.flush()
        patch.setattr(PackedWriter, "repack", repack_and_copy)
        store.close()
    monkeypatch.setattr(replaystore.commit, "write_head", copy_and_write)
    with ReplayStore.open(killed, "a") as store:
        Recorder(store, start=6).step()
        store.flush()
    assert len(states) > 1
    for state in states:
        assert list(verify(state)) == []
        with ReplayStore.open(state) as store:
            assert check_transitions(store)[:6] == list(range(6))
