"""Damages the files of a small store in every way, and reads it, in a process of bounded memory.

`python tests/fuzzing.py DIRECTORY --seconds 300 --seed 1` goes on for longer than the suite does,
and `--only N` repeats one case. A line is printed for each case that raises what it must not, or
returns what was not recorded; the last line counts what was done.

Half of the damage leaves the checksums as they were: a row is then right, or refused. In the other
half they are made to fit, as a stranger could: any row may be read then, but nothing worse happens.
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import functools
import json
import os
import random
import resource
import shutil
import socket
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from replaystore import Batch, Field, ReplayStore, ReplayStoreError, Schema, Transition, commit
from replaystore.codec import crc32c
from replaystore.episodes import encode_table
from replaystore.files import FileState
from replaystore.head import HEAD, Head, decode_head, encode_head
from replaystore.verify import verify

MEMORY_BYTES = 1 << 29  # that a case may allocate
CASE_SECONDS = 20
WINDOWS = (Transition(), Transition(frame_stack=3, n_step=2))
MARK = b"replaystore-crc32c:"
NUMBERS = [
    0,
    1,
    -1,
    2,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**48,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
VALUES = [*NUMBERS, -(2**63), 10**400, 1.5, float("nan"), float("inf"), True, None, "", "1", "flat", "float64",
          "../x", "/etc/passwd", "file:///etc/passwd", "a\0b", "\ud800", "x" * 5000, [], {}, [[]], [1, 2]]  # fmt: skip

SCHEMA = Schema(
    [
        Field("observation/frame", (6, 6), "uint8", codec="blosc-lz4hc-5", chunk_rows=2),
        Field("observation/speed", (2,), "float32"),
        Field("action", (), "int64"),
        Field("reward", (), "float64"),
        Field("terminated", (), "bool"),
        Field("truncated", (), "bool"),
        Field("logits", (32,), "float32", codec="blosc-zstd-1-shuffle", chunk_rows=4),
    ],
    {"note": "string", "score": "float64"},
    file_rows=4096,
    shard_chunks=8,
)


def episode(rng: np.random.Generator, length: int) -> dict[str, Any]:
    return {
        "observation": {
            "frame": rng.integers(0, 256, (length + 1, 6, 6), np.uint8),
            "speed": rng.normal(size=(length + 1, 2)).astype("float32"),
        },
        "action": rng.integers(0, 2**60, length),
        "reward": rng.normal(size=length),
        "terminated": np.arange(length) == length - 1,
        "truncated": np.zeros(length, bool),
        "logits": rng.normal(size=(length, 32)).astype("float32"),
    }


def make_store(path: Path) -> None:
    """A stream of one environment and one of two, with sealed and open shards and index parts."""
    rng = np.random.default_rng(0)
    with ReplayStore.create(path, SCHEMA) as store, ReplayStore.open(path, "a", num_envs=2) as second:
        for number in range(8):
            columns = {"note": f"nöte {number}", "score": number / 2}
            store.add_episode(policy="random", seed=number, columns=columns, **episode(rng, 5 + number))
            second.add_episode(columns=columns, **episode(rng, 4))
            store.flush()
            second.flush()


# ---- damage that leaves checksums as they were


def place_in(rng: random.Random, data: bytes) -> int:
    """Anywhere, but more often near the beginning or the end."""
    near = min(len(data), 300)
    return rng.choice(
        [rng.randrange(len(data) + 1), rng.randrange(near + 1), len(data) - rng.randrange(near + 1)]
    )


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Flip, insert, delete, repeat, blank, cut, or write a number of some width."""
    at = place_in(rng, data)
    stop = min(len(data), at + rng.choice([1, 1, 4, 8, 24, 200, 4096]))
    piece, rest = data[at:stop], data[stop:]
    number = (rng.choice(NUMBERS) % 2**64).to_bytes(8, "little")[: rng.choice([4, 8])]
    changed = rng.choice(
        [
            bytes([piece[0] ^ 1 << rng.randrange(8)]) + piece[1:] if piece else b"\x01",
            rng.randbytes(rng.randrange(1, 9)) + piece,
            b"",
            piece + piece,
            bytes(len(piece)),
            b"\xff" * len(piece),
            number + piece[len(number) :],
        ]
    )
    return rng.choice([data[:at] + changed + rest] * 6 + [data[:at]])


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    text = data.decode()
    if rng.random() < 0.1:
        return rng.choice(
            [b"", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, text.upper().encode()]
        )
    node = json.loads(text)
    changed = mutate_node(rng, node)
    with contextlib.suppress(ValueError):
        return json.dumps(changed, indent=2).encode()
    return mutate(rng, data)


def mutate_node(rng: random.Random, node: Any) -> Any:
    """Change one value somewhere in nested dicts and lists: replace, drop or repeat it."""
    keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
    if type(node) is int and rng.random() < 0.5:
        return node + rng.choice([-2, -1, 1, 2, 7])
    if not keys or rng.random() < 0.03:
        return rng.choice(VALUES)
    key = rng.choice(keys)
    action = rng.choice(["go deeper"] * 6 + ["drop", "repeat"])
    if action == "drop":
        del node[key]
    elif action == "repeat" and isinstance(node, list):
        node.insert(key, node[key])
    elif action == "repeat":
        node[rng.choice(["x", "..", "", key + " "])] = node[key]
    else:
        node[key] = mutate_node(rng, node[key])
    return node


def put_something_else(rng: random.Random, file: Path) -> None:
    """Put what is no regular file in the place of one, or nothing."""
    file.unlink()
    kind = rng.choice(["nothing", "directory", "link out", "link to itself", "pipe", "socket"])
    if kind == "directory":
        file.mkdir()
    elif kind.startswith("link"):
        file.symlink_to("/etc/passwd" if kind == "link out" else file.name)
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(file.parent):
            listener.bind(file.name)


# ---- damage with checksums that fit


def seal_head(data: bytes) -> bytes:
    """Make the checksum of a head fit."""
    places = {data.find(MARK), data.rfind(MARK)} - {-1}
    for digits in (b"00000000", None):
        digits = digits or f"{crc32c(data):08x}".encode()
        for at in places:
            data = data[: at + len(MARK)] + digits + data[at + len(MARK) + 8 :]
    return data


def forge_root(rng: random.Random, stream: Path) -> None:
    file = stream.parent.parent / "zarr.json"
    node = json.loads(file.read_bytes())
    content = node["attributes"]["replaystore"]
    del content["crc32c"]
    part = rng.choice(["schema", "schema", None])
    if part is None:
        content = mutate_node(rng, content)
    else:
        content[part] = mutate_node(rng, content[part])
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    if isinstance(content, dict):
        content["crc32c"] = f"{crc32c(canonical.encode()):08x}"
    node["attributes"]["replaystore"] = content
    file.write_bytes(json.dumps(node, indent=2).encode())


def forge_head(rng: random.Random, stream: Path) -> None:
    file = stream / HEAD
    data = file.read_bytes()
    if rng.random() < 0.3:
        file.write_bytes(seal_head(mutate(rng, data)))
    else:
        file.write_bytes(seal_head(mutate_table(rng, data)))


def mutate_table(rng: random.Random, data: bytes) -> bytes:
    """Change values of an Arrow file that keeps its columns."""
    table = pa.ipc.open_file(data).read_all()
    rows = table.to_pylist()
    for _ in range(rng.choice([1, 1, 2, 3])):
        row = rng.randrange(len(rows))
        rows[row] = mutate_node(rng, rows[row])
    try:
        return encode_table(pa.Table.from_pylist(rows, schema=table.schema))
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):  # no such table
        return mutate(rng, data)


def head_of(stream: Path) -> Head:
    return decode_head((stream / HEAD).read_bytes(), SCHEMA, stream / HEAD)


def write_head_of(stream: Path, head: Head) -> None:
    (stream / HEAD).write_bytes(encode_head(head, SCHEMA))


def forge_part(rng: random.Random, stream: Path) -> None:
    head = head_of(stream)
    state = rng.choice(head.parts)
    file = stream / f"index/{state.number:06d}.arrow"
    change = mutate if rng.random() < 0.3 else mutate_table
    data = change(rng, file.read_bytes())
    file.write_bytes(data)
    forged = FileState(state.number, len(data), crc32c(data))
    parts = tuple(forged if part is state else part for part in head.parts)
    write_head_of(stream, dataclasses.replace(head, parts=parts))


def forge_shard(rng: random.Random, stream: Path) -> None:
    """Change a chunk or the index; the checksums of both, and the head's of the shard, fit."""
    head = head_of(stream)
    name = rng.choice(["observation/frame", "logits"])
    ndim = 2 + len(SCHEMA.by_name[name].shape)
    state = rng.choice(list(head.files[name].values()))
    file = stream.joinpath(name, "c", str(state.number), *["0"] * (ndim - 1))
    data = file.read_bytes()
    chunks = SCHEMA.env_chunks(head.num_envs) * head.num_envs
    index = np.frombuffer(data[-16 * chunks - 4 : -4], "<u8").reshape(chunks, 2).copy()
    present = np.flatnonzero(index[:, 1] != 2**64 - 1).tolist()
    body = data[: -16 * chunks - 4]
    if rng.random() < 0.7:
        offset, nbytes = index[rng.choice(present)].tolist()
        frame = mutate(rng, body[offset : offset + nbytes - 4])
        sealed = frame + crc32c(frame).to_bytes(4, "little")
        index[index[:, 0] == offset] = len(body), len(sealed)
        body += sealed
    else:
        index[rng.choice(present), rng.randrange(2)] = rng.choice(NUMBERS) % 2**64
    ends = b""
    for i in (present[0], present[-1]):
        end = int(index[i].sum())
        ends += body[max(0, end - 4) : end].ljust(4, b"\0")
    identity = crc32c(ends, crc32c(np.ascontiguousarray(index[:, 1]).tobytes()))
    blob = body + index.tobytes() + crc32c(index.tobytes()).to_bytes(4, "little")
    file.write_bytes(blob)
    files = head.files | {
        name: head.files[name] | {state.number: FileState(state.number, len(blob), identity)}
    }
    write_head_of(stream, dataclasses.replace(head, files=files))


FORGERIES: list[Callable[[random.Random, Path], None]] = [forge_root, forge_head, forge_part, forge_shard]


# ---- one case


def kind_of(file: Path) -> str:
    """The role of a file in a store, so that each is damaged as often."""
    if file.name == "zarr.json":
        return f"zarr.json {len(file.parts)}"
    if "c" in file.parts:
        return f"file of {file.parts[2]}"
    return file.parent.name if file.parent.name in ("heads", "index") else file.name


class Fuzzer:
    """A store, what it holds, and how its files were."""

    def __init__(self, path: Path) -> None:
        make_store(path)
        self.path = path
        with ReplayStore.open(path) as store:
            self.intact = [store.read(np.arange(len(store)), window) for window in WINDOWS]
        names = [file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file()]
        self.files = {name: (path / name).read_bytes() for name in names}
        self.kinds: dict[str, list[Path]] = {}
        for name in names:
            self.kinds.setdefault(kind_of(name), []).append(name)

    def restore(self) -> None:
        for name, content in self.files.items():
            file = self.path / name
            if file.is_dir() and not file.is_symlink():
                file.rmdir()
            elif file.is_symlink() or not file.is_file():
                file.unlink(missing_ok=True)
            elif file.read_bytes() == content:
                continue
            file.unlink(missing_ok=True)
            file.write_bytes(content)

    def damage(self, rng: random.Random) -> str:
        """Change one or two files and keep the checksums; returns what kind of files they are."""
        done = []
        for _ in range(rng.choice([1, 1, 1, 2])):
            kind = rng.choice(sorted(self.kinds))
            name = rng.choice(self.kinds[kind])
            file, data = self.path / name, self.files[name]
            if rng.random() < 0.08 and file.is_file():
                put_something_else(rng, file)
            elif file.is_file():
                is_json = name.suffix == ".json" and rng.random() < 0.7
                file.write_bytes(mutate_json(rng, data) if is_json else mutate(rng, data))
            done.append(str(name))
        return " and ".join(done)

    def forge(self, rng: random.Random) -> str:
        change = rng.choice(FORGERIES)
        change(rng, self.path / "streams" / rng.choice(["000000", "000001"]))
        return change.__name__

    def run(self, number: int, seed: int) -> str:
        """Damage the store, read it, and put it back; raises what must not happen."""
        rng = random.Random(f"{seed}-{number}")
        forged = rng.random() < 0.5
        what = self.forge(rng) if forged else self.damage(rng)
        try:
            self.read(rng, None if forged else self.intact)
            if not forged and rng.random() < 0.2:
                self.append(rng)
        except Exception as error:
            error.add_note(what)
            raise
        finally:
            self.restore()
        return what.split("/")[-1] if forged else "damage"

    def read(self, rng: random.Random, intact: list[Batch] | None) -> None:
        with refused():
            list(verify(self.path))
        with refused(), ReplayStore.open(self.path) as store:
            for call in self.calls(store, rng, intact):
                with refused():
                    call()

    def calls(
        self, store: ReplayStore, rng: random.Random, intact: list[Batch] | None
    ) -> Iterator[Callable[[], object]]:
        yield store.check
        yield store.refresh
        yield lambda: store.episodes.validate(full=True)
        yield lambda: store.episode(rng.randrange(store.num_episodes))
        yield lambda: store.sample(8)
        for place, window in enumerate(WINDOWS):
            yield functools.partial(read_all, store, window, None if intact is None else intact[place])

    def append(self, rng: random.Random) -> None:
        """Record on the damaged store, in a copy: what is there stays readable, or is refused."""
        copy = self.path.with_name("copy")
        for name in self.files:
            with contextlib.suppress(OSError):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                if (self.path / name).is_file() and not (self.path / name).is_symlink():
                    shutil.copyfile(self.path / name, copy / name)
        try:
            with refused(), ReplayStore.open(copy, "a") as store:
                before = len(store)
                store.add_episode(**episode(np.random.default_rng(1), 6))
                store.flush()
                assert len(store) == before + 6
        finally:
            shutil.rmtree(copy)


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Let pass our errors, and the system's that name a file."""
    try:
        yield
    except ReplayStoreError:
        pass
    except OSError as error:
        if error.filename is None:
            raise


def read_all(store: ReplayStore, window: Transition, intact: Batch | None) -> None:
    batch = store.read(np.arange(min(len(store), 1000)), window)
    if intact is not None:
        assert_same_rows(batch, intact)


def assert_same_rows(batch: Batch, intact: Batch) -> None:
    """Every transition that is shown is as it was recorded."""
    known = {identity: place for place, identity in enumerate(intact.ids.tolist())}
    places = [known[identity] for identity in batch.ids.tolist()]
    for name in ("observation", "next_observation", "extra"):
        shown, recorded = getattr(batch, name), getattr(intact, name)
        for part in shown:
            assert np.array_equal(shown[part], recorded[part][places]), f"altered {name}/{part}"
    for name in ("action", "reward", "terminated", "truncated"):
        assert np.array_equal(getattr(batch, name), getattr(intact, name)[places]), f"altered {name}"


# ---- the process


def bound_memory() -> None:
    """Let allocations beyond MEMORY_BYTES fail; addresses that are only set aside do not count."""
    status = Path("/proc/self/status")
    if status.exists():
        used = next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmData" in line)
        resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + MEMORY_BYTES,) * 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--cases", type=int, default=sys.maxsize)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*a copy of a store that was being written", UserWarning)
    os.fsync = lambda descriptor: None
    commit.PART_EPISODES = 3
    fuzzer = Fuzzer(arguments.directory / "store")
    bound_memory()
    end, done, problems = time.monotonic() + arguments.seconds, Counter[str](), Counter[str]()
    first = arguments.only or 0
    last = arguments.cases if arguments.only is None else first + 1
    for number in range(first, last):
        if time.monotonic() > end:
            break
        print(f"case {number}", file=sys.stderr)
        faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
        try:
            done[fuzzer.run(number, arguments.seed)] += 1
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            problem = f"{type(error).__name__} at {where}"
            problems[problem] += 1
            if problems[problem] == 1:
                print(f"case {number}: {problem}: {error!s:.200} {getattr(error, '__notes__', None)}")
            if arguments.only is not None:
                raise
    print(json.dumps({"done": done, "problems": problems}))
    return bool(problems)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
