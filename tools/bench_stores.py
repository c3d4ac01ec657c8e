"""The peers that are data sets or array stores, and the table of all peers.

Those of rows stack no frames, so the rows of each item are asked for; zarr and tensorstore read the
arrays of the replaystore's own directory.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from bench_data import disk_bytes
from bench_peers import (
    FLAT,
    Cpprb,
    CpprbMemory,
    CpprbSingle,
    ExtraBuffers,
    ExtraBuffersZstd,
    Peer,
    Replaystore,
    ReplaystoreCached,
    ReplaystoreLoader,
    ReplaystoreLoader2,
    StableBaselines,
    Tianshou,
    TorchRL,
)


class FlashbaxVault(Peer):
    """A `Vault` read back into a flat buffer, which is how it is sampled: all of it in memory."""

    drops_final_observation = True

    def fill(self) -> None:
        import flashbax
        import jax
        from flashbax.vault import Vault

        jax.config.update("jax_enable_x64", True)
        steps = len(self.rows)
        self.make: Callable[[int], Any] = lambda n: flashbax.make_flat_buffer(
            max_length=steps + 1, min_length=2, sample_batch_size=n, add_sequences=True
        )
        parts = list(self.pieces())
        columns = {name: np.concatenate([p[name] for p in parts]) for name in ("observation", *FLAT)}
        del parts
        buffer = self.make(32)
        state = buffer.add(buffer.init({name: column[0] for name, column in columns.items()}), columns)
        vault = Vault("vault", state.experience, rel_dir=str(self.folder), vault_uid="0")
        vault.write(state)
        del state, columns
        self.state = Vault("vault", rel_dir=str(self.folder), vault_uid="0").read()
        self.samplers: dict[int, Callable[..., Any]] = {}
        self.key = jax.random.PRNGKey(0)

    def sample(self, n: int) -> Any:
        import jax

        if n not in self.samplers:
            self.samplers[n] = jax.jit(self.make(n).sample)
        self.key, key = jax.random.split(self.key)
        return jax.block_until_ready(self.samplers[n](self.state, key).experience)

    def items(self, batch: Any) -> dict[str, np.ndarray]:
        items = {name: np.asarray(batch.first[name]) for name in ("observation", *FLAT)}
        return {**items, "next_observation": np.asarray(batch.second["observation"])}


class RowStore(Peer):
    """A table or arrays of rows; an item's rows are found as any user would, with numpy."""

    def sample(self, n: int) -> Any:
        row = self.rows[self.rng.integers(len(self.rows), size=n)]
        window = np.maximum(row[:, None] + np.arange(1 - self.recording.stack, 2), self.first[row][:, None])
        wanted, where = np.unique(window, return_inverse=True)
        observation, columns = self.read(wanted, row)
        return observation[where.reshape(window.shape)], columns

    def read(self, rows: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Observations at distinct sorted rows, and the other columns at `steps`."""
        raise NotImplementedError

    def items(self, batch: Any) -> dict[str, np.ndarray]:
        frames, columns = batch
        stack = self.recording.stack
        before, after = (
            (frames[:, :stack], frames[:, -stack:]) if self.atari else (frames[:, 0], frames[:, 1])
        )
        return {"observation": before, "next_observation": after, **columns}


class Lance(RowStore):
    """A dataset of rows, `take`n by number."""

    def fill(self) -> None:
        import lance
        import pyarrow as pa

        recording = self.recording
        width = int(np.prod(self.shape))
        batches = []
        for start in range(0, len(recording.begins), 4096):
            part = slice(start, start + 4096)
            flat = np.ascontiguousarray(recording.observation[part]).reshape(-1)
            columns = {"observation": pa.FixedSizeListArray.from_arrays(pa.array(flat), width)}
            action = np.ascontiguousarray(recording.action[part])
            columns["action"] = pa.array(action) if action.ndim == 1 else _lists(action)
            for name in FLAT[1:]:
                columns[name] = pa.array(np.ascontiguousarray(getattr(recording, name)[part]))
            batches.append(pa.RecordBatch.from_pydict(columns))
        table = pa.Table.from_batches(batches)
        self.dataset = lance.write_dataset(table, self.folder / "rows.lance")

    def read(self, rows: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        table = self.dataset.take(rows.tolist(), columns=["observation"])
        flat = table.column("observation").combine_chunks().flatten().to_numpy()
        found = self.dataset.take(steps.tolist(), columns=list(FLAT))
        columns = {name: _to_numpy(found.column(name)) for name in FLAT}
        return flat.reshape(len(rows), *self.shape), columns


def _lists(array: np.ndarray) -> Any:
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])


def _to_numpy(column: Any) -> np.ndarray:
    chunk = column.combine_chunks()
    if hasattr(chunk.type, "list_size"):
        return chunk.flatten().to_numpy().reshape(len(chunk), -1)
    return chunk.to_numpy(zero_copy_only=False)


class Minari(Peer):
    """A dataset that gives whole episodes: the episode of each drawn transition is read."""

    def fill(self) -> None:
        os.environ["MINARI_DATASETS_PATH"] = str(self.folder)
        import minari
        from gymnasium import spaces
        from minari.data_collector import EpisodeBuffer

        recording, buffers = self.recording, []
        for start, stop in recording.episodes():
            steps = slice(start, stop - 1)
            buffers.append(
                EpisodeBuffer(
                    id=len(buffers),
                    observations=np.asarray(recording.observation[start:stop]),
                    actions=np.asarray(recording.action[steps]),
                    rewards=np.asarray(recording.reward[steps]),
                    terminations=np.asarray(recording.terminated[steps]),
                    truncations=np.asarray(recording.truncated[steps]),
                    infos={},
                )
            )
        one_frame = spaces.Box(0, 255, self.shape, np.uint8)
        observation_space, action_space = self.spaces()
        self.dataset = minari.create_dataset_from_buffers(
            "bench/rows-v0",
            buffers,
            observation_space=one_frame if self.atari else observation_space,
            action_space=action_space,
            jpeg_encoding=False,
        )
        self.starts = np.array([start for start, _ in recording.episodes()])

    def sample(self, n: int) -> Any:
        rows = self.rows[self.rng.integers(len(self.rows), size=n)]
        number = self.starts.searchsorted(rows, side="right") - 1
        items = {name: [] for name in ("observation", "next_observation", *FLAT)}
        for episode in np.unique(number):
            data = self.dataset[int(episode)]
            step = rows[number == episode] - self.starts[episode]
            items["observation"].append(self.stacks(data.observations, step))
            items["next_observation"].append(self.stacks(data.observations, step + 1))
            for name, column in zip(FLAT, MINARI, strict=True):
                items[name].append(getattr(data, column)[step])
        return {name: np.concatenate(parts) for name, parts in items.items()}

    def stacks(self, observations: np.ndarray, step: np.ndarray) -> np.ndarray:
        """The observation at each step of an episode, `stack` frames of it."""
        if not self.atari:
            return observations[step]
        return observations[np.maximum(step[:, None] + np.arange(1 - self.recording.stack, 1), 0)]

    def items(self, batch: Any) -> dict[str, np.ndarray]:
        return batch  # type: ignore[no-any-return]


MINARI = ("actions", "rewards", "terminations", "truncations")


class StoreArrays(RowStore):
    """The arrays of the replaystore's own directory, read by somebody else."""

    def fill(self) -> None:
        self.path = self.folder.parent / f"replaystore-{len(self.rows)}"
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: measure replaystore in the same run")
        episodes = self.recording.episodes()
        renumbered = np.cumsum([0, *[stop - start for start, stop in episodes]])
        self.to_stored = np.zeros(len(self.first), np.int64)  # rows of empty episodes are not stored
        for (start, stop), stored in zip(episodes, renumbered.tolist(), strict=False):
            self.to_stored[start:stop] = np.arange(stored, stored + stop - start)
        self.arrays = {name: self.open(name) for name in ("observation", *FLAT)}

    def open(self, name: str) -> Any:
        """One array of the store's stream."""
        raise NotImplementedError

    def nbytes(self) -> int:
        return disk_bytes(self.path)


class Zarr(StoreArrays):
    """zarr-python's `oindex`."""

    def open(self, name: str) -> Any:
        import zarr

        return zarr.open_array(self.path / "streams" / "000000" / name, mode="r")

    def read(self, rows: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        stored, where = np.unique(self.to_stored[steps], return_inverse=True)
        columns = {name: self.arrays[name].oindex[stored, 0][where] for name in FLAT}
        return self.arrays["observation"].oindex[self.to_stored[rows], 0], columns


class Tensorstore(StoreArrays):
    """tensorstore with its zarr3 driver, all fields of a batch asked for at once."""

    def open(self, name: str) -> Any:
        import tensorstore

        path = str(self.path / "streams" / "000000" / name) + "/"
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
        return tensorstore.open(spec, read=True).result()

    def read(self, rows: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        observation = self.arrays["observation"][self.to_stored[rows], 0].read()
        columns = {name: self.arrays[name][self.to_stored[steps], 0].read() for name in FLAT}
        return observation.result(), {name: column.result() for name, column in columns.items()}


PEERS: dict[str, type[Peer]] = {
    "replaystore": Replaystore,
    "replaystore, cached": ReplaystoreCached,
    "replaystore, loader": ReplaystoreLoader,
    "replaystore, loader, 2 workers": ReplaystoreLoader2,
    "SB3 (RAM)": StableBaselines,
    "sb3-extra-buffers (lz4-block/1)": ExtraBuffers,
    "sb3-extra-buffers (zstd-3)": ExtraBuffersZstd,
    "TorchRL (memmap)": TorchRL,
    "cpprb (mmap)": Cpprb,
    "cpprb (RAM)": CpprbMemory,
    "cpprb (RAM, float32)": CpprbSingle,
    "Tianshou (RAM)": Tianshou,
    "Flashbax Vault (RAM)": FlashbaxVault,
    "Lance": Lance,
    "Minari": Minari,
    "zarr oindex": Zarr,
    "tensorstore": Tensorstore,
}
