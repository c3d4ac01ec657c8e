import numpy as np
import pytest
from test_store import small_schema
from test_windows import FLAGS

from replaystore import Field, Schema
from replaystore.ring import PIECE_BYTES, Ring


@pytest.mark.parametrize("num_envs", [1, 3])
def test_rows_stand_at_their_number_modulo_the_capacity(monkeypatch, num_envs):
    monkeypatch.setattr("replaystore.ring.RING_BYTES", 1)
    ring = Ring(small_schema(), num_envs)
    assert ring.capacity == 16
    rng = np.random.default_rng(0)
    written = 0
    for _ in range(50):
        count = int(rng.integers(1, 17))
        ring.put(num_envs - 1, written, count, {"action": np.arange(written, written + count)})
        written += count
        first = max(0, written - 16)
        out = np.full(20, -1)
        ring.copy_to(out, "action", num_envs - 1, first, written)
        assert out[: written - first].tolist() == list(range(first, written))
        assert (out[written - first :] == -1).all()
        assert (
            ring.arrays["action"][np.arange(first, written) % 16, num_envs - 1] == np.arange(first, written)
        ).all()


def test_a_shorter_array_leaves_zeros_behind_it(monkeypatch):
    monkeypatch.setattr("replaystore.ring.RING_BYTES", 1)
    ring = Ring(small_schema(), 1)
    ring.put(0, 0, 16, {"action": np.full(16, 9), "reward": np.full(16, 9.0)})
    ring.put(0, 14, 6, {"action": np.array([1, 2, 3, 4]), "reward": np.zeros(0)})
    assert ring.arrays["action"][:, 0].tolist() == [3, 4, 0, 0, *[9] * 10, 1, 2]
    assert ring.arrays["reward"][:, 0].tolist() == [0, 0, 0, 0, *[9] * 10, 0, 0]


@pytest.mark.parametrize("chunk_rows", [1, 8, 512])
@pytest.mark.parametrize("num_envs", [1, 7, 1000])
def test_a_ring_is_a_power_of_two_and_holds_some_chunks(chunk_rows, num_envs):
    observation = Field("observation", (4, 4), "uint8", codec="blosc-lz4-1", chunk_rows=chunk_rows)
    rest = [Field("action", (), "int64"), Field("reward", (), "float64"), *FLAGS]
    ring = Ring(Schema([observation, *rest]), num_envs)
    assert ring.capacity & ring.mask == 0
    assert ring.capacity >= max(16, 4 * chunk_rows)
    assert ring.keep == chunk_rows
    assert {name: array.shape for name, array in ring.arrays.items()} == {
        "observation": (ring.capacity, num_envs, 4, 4),
        **dict.fromkeys(["action", "reward", "terminated", "truncated"], (ring.capacity, num_envs)),
    }
    assert sum(array.nbytes for array in ring.arrays.values()) <= max(1 << 25, 4 * chunk_rows * num_envs * 34)


def test_pieces_of_its_memory_are_all_of_its_bytes_once():
    ring = Ring(Schema([Field("observation", (84, 84), "uint8"), *small_schema().fields[1:]]), 2)
    for piece in ring.memory():
        assert 0 < len(piece) <= PIECE_BYTES
        piece += 1
    for array in ring.arrays.values():
        assert (np.ascontiguousarray(array).reshape(-1).view(np.uint8) == 1).all()
