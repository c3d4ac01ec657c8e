"""Files of a store are damaged in every way: is it noticed, and does no reader return it?

Every file of a small but complete store has bytes flipped at random places, is cut at others,
overwritten, removed, and replaced by things that are no file, by an older copy of itself and by
others of its kind. Each time `verify` must find it, or all that is read must be as it was; what is
sampled from a packed field must be right even then, and a transition must keep its id. The cases
run in processes of their own, so that one which ends the interpreter is seen, and counts as WRONG.
"""

import argparse
import collections
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pyarrow as pa

from replaystore import Batch, Field, ReplayStore, ReplayStoreError, Schema
from replaystore.verify import verify

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import recording
from recording import SHAPE, observations

SERVER = multiprocessing.get_context("forkserver")
PATIENCE = 60  # seconds for one case
OUTCOMES = ("at open", "by reading", "by verify", "harmless", "WRONG")
PACKED = ("observation/camera", "observation/depth", "next_observation/camera", "next_observation/depth")


class Case(NamedTuple):
    """One file, relative to the store, and what is done to it."""

    file: Path
    damage: str
    place: int = 0
    bits: int = 0
    other: Path = Path()  # what takes its place


# ---- the store


def schema() -> Schema:
    packed = {"codec": "blosc-lz4hc-5", "chunk_rows": 32}
    fields = [
        Field("observation/camera", SHAPE, "uint8", **packed),
        Field("observation/depth", SHAPE, "uint8", **packed),
        Field("observation/position", (3,), "float32"),
        Field("info/lives", (), "int64"),
        *recording.schema().fields[1:],
    ]
    return Schema(fields, {"level": "string"}, file_rows=4096, shard_chunks=32)


def observation(number: int) -> dict[str, np.ndarray]:
    camera, depth = observations(np.array([number, number + (1 << 40)]))
    return {"camera": camera, "depth": depth, "position": np.full(3, number + 0.5, np.float32)}


def record(store: ReplayStore, numbers: range) -> None:
    """Episodes of seven rows, of which the last stays open; a commit every 50 rows."""
    for i in numbers:
        if i % 7 == 0 or i == numbers[0]:
            store.reset(observation(i), seed=i, columns={"level": f"level {i % 3}"})
        store.step(i, observation(i + 1), i / 2, i % 7 == 6, False, info={"lives": i % 5 + 1})
        if i % 50 == 0:
            store.flush()


def make(intact: Path, older: Path) -> None:
    """One writer closes its stream, the other is killed; `older` is a copy from before.

    The first has full flat files, full shards and sealed index parts, and open ones of each.
    """
    multiprocessing.set_start_method("fork", force=True)  # else numcodecs' semaphore is left behind
    with mock.patch("replaystore.commit.PART_EPISODES", 200):
        first = ReplayStore.create(intact, schema(), env_spec='{"id": "CartPole-v1"}')
        record(first, range(2800))
        second = ReplayStore.open(intact, "a")
        record(second, range(10_000, 10_100))
        shutil.copytree(intact, older)
        record(first, range(2800, 4300))
        first.close()
        record(second, range(10_100, 10_300))
        second.flush()
        os._exit(0)


def kind_of(file: Path) -> str:
    """The line of the table in which a file is counted."""
    if file.name == "zarr.json":
        return "zarr.json"
    if file.name in ("head.arrow", "lock"):
        return file.name
    if file.parent.name in ("heads", "index"):
        return {"heads": "kept head", "index": "index part"}[file.parent.name]
    return "shard" if {"camera", "depth"} & set(file.parts) else "flat file"


# ---- the cases


def cases_of(file: Path, folder: Path, rng: random.Random, *, flips: int, cuts: int) -> Iterator[Case]:
    """All that is done to one file."""
    intact = folder / "intact"
    nbytes = (intact / file).stat().st_size
    for place in rng.choices(range(nbytes), k=flips) if nbytes else ():
        yield Case(file, "flip", place, bits=rng.randrange(1, 256))
    for place in rng.sample(range(nbytes), min(cuts, nbytes)):
        yield Case(file, "cut", place)
    for damage in ("zeros", "ones", "longer", "removed", "directory", "pipe", "link"):
        yield Case(file, damage)
    if (folder / "older" / file).exists():
        yield Case(file, "older")
    others = sorted(other for other in files_of(intact) if kind_of(other) == kind_of(file) and other != file)
    for other in rng.sample(others, min(3, len(others))):
        yield Case(file, "another", other=other)


def files_of(path: Path) -> list[Path]:
    return sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())


def do_damage(case: Case, target: Path, intact: Path, older: Path) -> None:
    content, place = (intact / case.file).read_bytes(), case.place
    target.unlink()
    match case.damage:
        case "flip":
            flipped = bytes([content[place] ^ case.bits])
            target.write_bytes(content[:place] + flipped + content[place + 1 :])
        case "cut":
            target.write_bytes(content[:place])
        case "zeros":
            target.write_bytes(bytes(len(content)))
        case "ones":
            target.write_bytes(b"\xff" * len(content))
        case "longer":
            target.write_bytes(content + content[:100] + b"junk")
        case "older":
            shutil.copyfile(older / case.file, target)
        case "another":
            shutil.copyfile(intact / case.other, target)
        case "directory":
            target.mkdir()
        case "pipe":
            os.mkfifo(target)
        case "link":
            target.symlink_to(intact / case.file)


# ---- what comes of one, in a process of its own


class Shown(NamedTuple):
    """All that a reader is told; arrays are in the order of the ids."""

    arrays: dict[str, np.ndarray]
    episodes: pa.Table
    env_spec: str | None

    def equals(self, other: "Shown") -> bool:
        same = all(np.array_equal(self.arrays[name], array) for name, array in other.arrays.items())
        return same and self.episodes.equals(other.episodes) and self.env_spec == other.env_spec

    def check_packed(self, batch: dict[str, np.ndarray]) -> None:
        """Assert that transitions have their packed values, whatever they have of others."""
        place = np.searchsorted(self.arrays["ids"], batch["ids"])
        assert (self.arrays["ids"].take(place, mode="clip") == batch["ids"]).all(), "an id that never was"
        for name in PACKED:
            assert np.array_equal(self.arrays[name][place], batch[name]), f"altered {name}"


def arrays_of(batch: Batch) -> dict[str, np.ndarray]:
    names = ("action", "reward", "terminated", "truncated", "discount", "ids")
    arrays = {name: getattr(batch, name) for name in names} | {"lives": batch.extra["info"]["lives"]}
    for top in ("observation", "next_observation"):
        arrays |= {f"{top}/{part}": array for part, array in getattr(batch, top).items()}
    order = np.argsort(batch.ids, kind="stable")
    return {name: array[order] for name, array in arrays.items()}


def read_all(store: ReplayStore) -> Shown:
    return Shown(arrays_of(store.read(np.arange(len(store)))), store.episodes, store.env_spec)


def outcome(path: Path, original: Shown) -> tuple[str, str]:
    """Where damage is noticed first, and in words what is wrong."""
    found, stage = [str(finding) for finding in verify(path)], "at open"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            with ReplayStore.open(path) as store:
                stage = "at open" if warned else "by reading"
                sample_some(store, original)
                shown = read_all(store)
                original.check_packed(shown.arrays)
        except ReplayStoreError as error:
            return (stage, "") if found else ("WRONG", f"verify misses what a reader sees: {error}")
    if found:
        return ("at open" if warned else "by verify"), ""
    return ("harmless", "") if shown.equals(original) else ("WRONG", "not noticed")


def sample_some(store: ReplayStore, original: Shown) -> None:
    """Where a batch can be sampled, it is right."""
    rng = np.random.default_rng(0)
    for _ in range(6):
        try:
            batch = store.sample(8, rng=rng)
        except ReplayStoreError:
            continue  # reading everything says so again
        original.check_packed(arrays_of(batch))


def examine(folder: Path, cases: Sequence[Case], say: Connection) -> None:
    """Tell the outcome of each case, in order."""
    intact, older, copy = folder / "intact", folder / "older", folder / f"copy-{os.getpid()}"
    shutil.copytree(intact, copy)
    with ReplayStore.open(intact) as store:
        original = read_all(store)
    for case in cases:
        target = copy / case.file
        do_damage(case, target, intact, older)
        try:
            say.send(outcome(copy, original))
        except Exception as error:
            say.send(("WRONG", repr(error)))
        if target.is_dir():
            target.rmdir()
        target.unlink(missing_ok=True)
        shutil.copyfile(intact / case.file, target)


# ---- in their parent


def examine_all(folder: Path, cases: Sequence[Case]) -> Iterator[tuple[str, str]]:
    """The outcome of each case; one that ends its process, or does not end, is WRONG."""
    done = 0
    while done < len(cases):
        told, say = SERVER.Pipe(duplex=False)
        process = SERVER.Process(target=examine, args=(folder, cases[done:], say), daemon=True)
        process.start()
        say.close()
        problem = ""
        while done < len(cases) and not problem:
            try:
                problem = "" if told.poll(PATIENCE) else f"no end after {PATIENCE} s"
                yield told.recv() if not problem else ("WRONG", problem)
            except EOFError:
                process.join()
                problem = f"the interpreter ended with status {process.exitcode}"
                yield "WRONG", problem
            done += 1
        if problem:
            process.kill()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=2000, help="flipped bytes, over all files")
    parser.add_argument("--cuts", type=int, default=200, help="places at which each file is cut")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    SERVER.set_forkserver_preload(["replaystore.verify"])
    with tempfile.TemporaryDirectory(prefix="damage-") as name:
        folder, rng = Path(name), random.Random(options.seed)
        maker = SERVER.Process(target=make, args=(folder / "intact", folder / "older"))
        maker.start()
        maker.join()
        files = files_of(folder / "intact")
        not_empty = sum((folder / "intact" / file).stat().st_size > 0 for file in files)
        sizes = {"flips": -(-options.flips // not_empty), "cuts": options.cuts}
        cases = [case for file in files for case in cases_of(file, folder, rng, **sizes)]
        table: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for case, (stage, problem) in zip(cases, examine_all(folder, cases), strict=True):
            table[kind_of(case.file)][stage] += 1
            table["all"][stage] += 1
            if problem:
                print(f"WRONG: {case.file}: {case.damage} {case.place} {case.other}: {problem}", flush=True)
    print(f"{len(files)} files, {sum(case.damage == 'flip' for case in cases)} flipped bytes")
    print(f"{'':12}" + "".join(f"{name:>12}" for name in ("cases", *OUTCOMES)))
    for kind, counts in sorted(table.items(), key=lambda item: item[0] == "all"):
        line = (counts.total(), *[counts[name] for name in OUTCOMES])
        print(f"{kind:12}" + "".join(f"{count:12,}" for count in line))
    sys.exit(table["all"]["WRONG"] > 0)


if __name__ == "__main__":
    main()
