"""Write the golden stores of this format version; run once for each version, never again.

    python tests/golden/make_golden.py

The store is small: short files, two streams, sealed shards and a sealed part of the index, one
stream left by a writer that was killed. What it holds is worked out in `test_golden.py`.
Another one has a capacity, and holds numbered transitions.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from replaystore import Field, ReplayStore, Schema, commit
from replaystore.metadata import BOUNDED_VERSION, FORMAT_VERSION
from replaystore.writer import StreamWriter

GOLDEN = Path(__file__).parent
PADDING = np.array([-1, -2], "int16").tobytes()
sys.path.insert(0, str(GOLDEN.parent))

import recording  # noqa: E402
from test_golden import EPISODES, START_TIME, value_of  # noqa: E402


def golden_schema() -> Schema:
    return Schema(
        [
            Field("observation/image", (20, 20), "uint8", chunk_rows=2, codec="blosc-lz4hc-5"),
            Field("observation/vector/0", (2,), "int16", codec="blosc-lz4-1", chunk_rows=8, padding=PADDING),
            Field("action", (), "int8"),
            Field("reward", (), "float16", codec="blosc-lz4-9-bitshuffle", chunk_rows=16),
            Field("terminated", (), "bool"),
            Field("truncated", (), "bool"),
            Field("info/logits", (3,), "float32", codec="blosc-zstd-3-shuffle", chunk_rows=4),
        ],
        columns={"level": "int64", "note": "string", "win": "bool", "score": "float64"},
        file_rows=4096,
        shard_chunks=8,
    )


def record(store: ReplayStore, stream: int) -> None:
    """Record a stream's episodes: those of environments that step together have one length."""
    schema = store.schema
    groups: dict[int, list] = {}
    for episode in EPISODES:
        if episode.stream == stream:
            groups.setdefault(episode.group, []).append(episode)
    for group in groups.values():
        first = group[0]
        columns = {name: [each.columns[name] for each in group] for name in schema.columns}
        policy, seeds = first.policy, [each.seed for each in group]
        if len(group) == 1:
            columns = {name: values[0] for name, values in columns.items()}

        def values(tops, t, group=group):
            flat = {
                name: np.stack(
                    [value_of(name, episode, t + schema.is_observation(name)) for episode in group]
                )
                for top in tops
                for name in schema.names(top)
            }
            flat = {name: array[0] for name, array in flat.items()} if len(group) == 1 else flat
            return {top: schema.nest(top, flat) for top in tops}

        seed = seeds if len(group) > 1 else seeds[0]
        store.reset(**values(["observation"], -1), seed=seed, policy=policy, columns=columns)
        for t in range(first.length):
            store.step(**values(schema.tops, t))
            if t % 3 == 0:
                store.flush()


def main() -> None:
    """Write `v1/` and so on next to this file; refuses to write over one."""
    target = GOLDEN / f"v{FORMAT_VERSION}"
    if target.exists() and "--again" not in sys.argv:
        raise SystemExit(f"{target} is there: a released format's golden store is never written again")
    shutil.rmtree(target, ignore_errors=True)
    commit.PART_EPISODES = 3
    defaults = StreamWriter.__init__.__kwdefaults__
    defaults["clock"] = lambda: START_TIME
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "store"
        with ReplayStore.create(
            path, golden_schema(), env_spec='{"id": "Golden-v1"}', frame_stack=3
        ) as store:
            record(store, 0)
        with ReplayStore.open(path, "a", num_envs=2) as store:
            record(store, 1)
            store.flush()
            shutil.copytree(path, target)  # an episode of each environment is open: as after a kill
        make_sparse(target)
        write_bounded(Path(directory) / "bounded", GOLDEN / f"bounded-v{BOUNDED_VERSION}")


def write_bounded(path: Path, target: Path) -> None:
    """Record twelve times a capacity, and copy what a writer that was killed then leaves."""
    shutil.rmtree(target, ignore_errors=True)
    with ReplayStore.create(path, recording.schema(), capacity=300) as store:
        recorder = recording.Recorder(store)
        for _ in range(360):
            recorder.step(10)
            store.flush()
        shutil.copytree(path, target)
    make_sparse(target)


def make_sparse(target: Path) -> None:
    """Leave out what git does not keep, and the older heads, which only a copy made while writing needs."""
    for spare in target.rglob("heads/*.arrow"):
        spare.unlink()
    for folder in sorted(target.rglob("*"), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


if __name__ == "__main__":
    main()
