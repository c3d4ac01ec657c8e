"""Statistics against numpy over all rows at once; where they are kept; `Normalize` and `Cast`."""

import errno
import json
import subprocess
import sys

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from test_sequences import nested_schema, record, tuple_schema

import replaystore.stats
import replaystore.transforms
from replaystore import Cast, Field, Normalize, ReplayStore, Schema, Transition, UsageError
from replaystore.dataset import ReplayDataset
from replaystore.sequences import Sequence
from replaystore.stats import LEVELS, PARTS
from replaystore.verify import verify

FLAGS = (Field("terminated", (), "bool"), Field("truncated", (), "bool"))


def rows_of(episodes, name):
    return np.concatenate([np.stack(episode.fields[name]) for episode in episodes]).astype(np.float64)


def check(stats, rows):
    assert stats.count == len(rows)
    expected = {"mean": rows.mean(0), "std": rows.std(0), "minimum": rows.min(0), "maximum": rows.max(0)}
    expected["quantiles"] = np.quantile(rows, LEVELS, axis=0)
    for part in PARTS:
        found = getattr(stats, part)
        np.testing.assert_allclose(found, expected[part], rtol=1e-12, atol=1e-12, err_msg=part)
        assert found.dtype == np.float64
        assert found.shape == expected[part].shape


def simple(path, values, **kwargs):
    """One episode with these observations and rewards."""
    values = np.asarray(values)
    schema = Schema(
        [
            Field("observation", values.shape[1:], values.dtype),
            Field("action", (), "int64"),
            Field("reward", (), "float64"),
            *FLAGS,
        ]
    )
    n = len(values) - 1
    store = ReplayStore.create(path, schema, **kwargs)
    ends = np.arange(n) == n - 1
    store.add_episode(
        observation=values,
        action=np.arange(n),
        reward=np.arange(n) * 1.0,
        terminated=ends,
        truncated=~ends & False,
    )
    return store


@pytest.mark.parametrize(("seed", "widths"), [(0, [1]), (1, [3]), (2, [1, 2])])
@pytest.mark.parametrize("block_rows", [1, 7, 1 << 16])
def test_stats_equal_those_of_all_rows_at_once(tmp_path, monkeypatch, seed, widths, block_rows):
    monkeypatch.setattr("replaystore.stats.BLOCK_ROWS", block_rows)
    rng = np.random.default_rng(seed)
    schema = tuple_schema(rng) if seed == 1 else nested_schema(rng)
    stores, episodes = record(tmp_path / "store", schema, rng, widths)
    with ReplayStore.open(tmp_path / "store") as reader:
        for name in schema.by_name:
            if name not in ("terminated", "truncated"):
                check(reader.stats(name), rows_of(episodes, name))
        flags = np.concatenate([[e.terminated and t + 1 == len(e) for t in range(len(e))] for e in episodes])
        check(reader.stats("terminated"), flags.astype(np.float64))
    for store in stores:
        store.close()


def test_the_writer_counts_rows_that_it_has_not_committed_and_keeps_nothing_then(tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", 1e6)
    kept = tmp_path / "store" / "stats" / "observation.json"
    with simple(tmp_path / "store", np.arange(5.0)) as store:
        check(store.stats("observation"), np.arange(5.0))
        assert not kept.exists()
        store.flush()
        check(store.stats("observation"), np.arange(5.0))
        assert kept.exists()
        store.reset(7.0)
        store.step(0, 9.0, 1.0, False, False)
        check(store.stats("observation"), np.array([0, 1, 2, 3, 4, 7, 9.0]))


def counted(monkeypatch):
    """How often statistics were computed, as a list that grows."""
    calls, compute = [], replaystore.stats._compute
    monkeypatch.setattr(
        "replaystore.stats._compute", lambda *arguments: calls.append(arguments) or compute(*arguments)
    )
    return calls


def test_stats_are_kept_until_the_next_commit(tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    values = np.random.default_rng(0).normal(size=(9, 2, 3)) * 1e3
    with simple(tmp_path / "store", values) as store:
        pass
    with ReplayStore.open(tmp_path / "store") as store:
        first = store.stats("observation")
    with ReplayStore.open(tmp_path / "store") as store:
        second = store.stats("observation")
        assert len(calls) == 1
        for part in PARTS:
            np.testing.assert_array_equal(getattr(first, part), getattr(second, part), strict=True)
        assert list(verify(tmp_path / "store")) == []
        with ReplayStore.open(tmp_path / "store", "a") as writer:
            writer.reset(values[0])
            writer.step(0, values[1], 1.0, True, False)
        store.stats("observation")
        assert len(calls) == 1, "a reader holds its commit"
        store.refresh()
        assert store.stats("observation").count == 11
        assert len(calls) == 2


def test_each_field_has_its_own_file(tmp_path):
    stores, episodes = record(
        tmp_path / "store", nested_schema(np.random.default_rng(0)), np.random.default_rng(0), [1]
    )
    with stores[0] as store:
        check(store.stats("observation/zeros"), rows_of(episodes, "observation/zeros"))
        check(store.stats("reward"), rows_of(episodes, "reward"))
    names = sorted(path.name for path in (tmp_path / "store" / "stats").iterdir())
    assert names == ["observation~zeros.json", "reward.json"]


@pytest.mark.parametrize("spoil", ["bit", "cut", "empty", "number", "list", "version"])
def test_a_damaged_file_is_made_anew(tmp_path, monkeypatch, spoil):
    calls = counted(monkeypatch)
    with simple(tmp_path / "store", np.arange(5.0)) as store:
        store.flush()
        store.stats("observation")
        path = tmp_path / "store" / "stats" / "observation.json"
        good = path.read_bytes()
        node = json.loads(good)
        spoiled = {
            "bit": good.replace(b"2.0", b"6.0", 1),
            "cut": good[:-9],
            "empty": b"",
            "number": b"7",
            "list": resealed(node, {"mean": [1.0, 2.0]}),
            "version": resealed(node, {"format_version": 2}),
        }[spoil]
        assert spoiled != good
        path.write_bytes(spoiled)
        check(store.stats("observation"), np.arange(5.0))
        assert len(calls) == 2
        assert path.read_bytes() == good


def resealed(node, change):
    content = node["stats"] | change
    return json.dumps({"stats": content, "crc32c": replaystore.stats._checksum(content)}).encode()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_store_that_cannot_be_written_has_stats_all_the_same(tmp_path, monkeypatch, code):
    def refuse(path, data):
        raise OSError(code, "no")

    with simple(tmp_path / "store", np.arange(5.0)) as store:
        store.flush()
        monkeypatch.setattr("replaystore.stats.write_atomic", refuse)
        check(store.stats("observation"), np.arange(5.0))
    assert not (tmp_path / "store" / "stats" / "observation.json").exists()


def test_a_link_in_the_place_of_the_directory_is_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with simple(tmp_path / "store", np.arange(5.0)) as store:
        store.flush()
        (tmp_path / "store" / "stats").symlink_to(elsewhere)
        check(store.stats("observation"), np.arange(5.0))
    assert list(elsewhere.iterdir()) == []


def test_other_errors_in_writing_are_not_hidden(tmp_path, monkeypatch):
    def refuse(path, data):
        raise OSError(errno.EIO, "no")

    with simple(tmp_path / "store", np.arange(5.0)) as store:
        store.flush()
        monkeypatch.setattr("replaystore.stats.write_atomic", refuse)
        with pytest.raises(OSError, match="no"):
            store.stats("observation")


def test_chosen_episodes_have_stats_of_their_own_that_are_not_kept(tmp_path):
    stores, episodes = record(
        tmp_path / "store", nested_schema(np.random.default_rng(4)), np.random.default_rng(4), [2]
    )
    with stores[0] as store:
        chosen = store.where(pc.field("length") == 9)
        long = [episode for episode in episodes if len(episode) == 9]
        assert 0 < len(long) < len(episodes)
        check(chosen.stats("reward"), rows_of(long, "reward"))
        assert not (tmp_path / "store" / "stats").exists()
        check(store.stats("reward"), rows_of(episodes, "reward"))


def test_a_value_that_never_changes_deviates_by_exactly_zero(tmp_path):
    values = np.stack([np.full(3000, 0.1), np.arange(3000.0)], axis=1)
    with simple(tmp_path / "store", values) as store:
        stats = store.stats("observation")
        assert stats.mean[0] == 0.1
        assert stats.std[0] == 0.0
        batch = Normalize({"observation": stats})(store.sample(64))
    assert (batch.observation[:, 0] == 0).all()


def test_large_offsets_do_not_spoil_the_deviation(tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.stats.BLOCK_ROWS", 100)
    noise = np.random.default_rng(0).normal(size=5000)
    with simple(tmp_path / "store", 1e9 + noise) as store:
        assert store.stats("observation").std == pytest.approx((1e9 + noise).std(), rel=1e-6)


def test_quantiles_of_more_rows_than_are_kept_are_close(tmp_path, monkeypatch):
    monkeypatch.setattr("replaystore.stats.SAMPLE_ROWS", 2000)
    values = np.random.default_rng(0).permutation(40_001).astype(np.float64)
    with simple(tmp_path / "store", values) as store:
        found = store.stats("observation").quantiles / 40_000
    assert (np.abs(found - LEVELS) < 4 * np.sqrt(0.25 / 2000)).all()
    assert found[2] != 0.5


def test_values_that_are_no_numbers_are_not_hidden(tmp_path):
    with simple(tmp_path / "store", np.array([[1.0, 1.0], [np.nan, np.inf], [3.0, 3.0]])) as store:
        stats = store.stats("observation")
        store.flush()
        kept = [store.stats("observation") for _ in range(2)]
    for each in (stats, *kept):
        assert np.isnan(each.mean[0])
        assert np.isnan(each.minimum[0])
        assert each.maximum[1] == np.inf


def test_progress_is_shown_if_asked_for(tmp_path, capsys):
    with simple(tmp_path / "store", np.arange(5.0)) as store:
        store.stats("observation")
        assert capsys.readouterr().err == ""
        store.stats("observation", progress=True)
    assert "stats of observation" in capsys.readouterr().err


def test_unknown_fields_and_empty_stores_are_refused(tmp_path):
    expected = r"expected a field of observation, action.*got 'obs'"
    with simple(tmp_path / "store", np.arange(5.0)) as store, pytest.raises(UsageError, match=expected):
        store.stats("obs")
    schema = Schema([Field(n, (), "int64") for n in ("observation", "action", "reward")] + list(FLAGS))
    empty = ReplayStore.create(tmp_path / "empty", schema)
    with empty as store, pytest.raises(UsageError, match="expected at least one row"):
        store.stats("reward")


# ---- transforms


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    path = tmp_path_factory.mktemp("stats") / "store"
    rng = np.random.default_rng(5)
    stores, _ = record(path, nested_schema(rng), rng, [2])
    with stores[0] as store:
        yield path, store


def standardized(values, stats):
    std = np.where(stats.std > 0, stats.std, 1)
    return (values.astype(np.float64) - stats.mean) / std


@pytest.mark.parametrize("window", [Transition(), Transition(frame_stack=3), Sequence(4, burn_in=1)])
def test_normalize_treats_arrays_and_tensors_alike(nested, window):
    path, store = nested
    names = ["observation/image", "observation/framed", "reward", "tag"]
    stats = {name: store.stats(name) for name in names}
    normalize = Normalize(stats)
    numbers = np.arange(store.count(window))
    before = store.read(numbers, window)
    arrays = normalize(store.read(numbers, window))
    tensors = normalize(ReplayDataset(path, window).batch(numbers))
    tops = [name for name in ("observation", "next_observation") if hasattr(before, name)]
    for top in tops:
        for part in ("image", "framed"):
            found, plain = getattr(arrays, top)[part], getattr(before, top)[part]
            expected = standardized(plain, stats[f"observation/{part}"])
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(tensors[top][part].numpy(), found, rtol=1e-6, atol=1e-6)
            assert found.dtype == np.float32
            assert tensors[top][part].dtype == torch.float32
        assert (getattr(arrays, top)["zeros"] == getattr(before, top)["zeros"]).all()
    np.testing.assert_allclose(
        arrays.extra["tag"], standardized(before.extra["tag"], stats["tag"]), rtol=1e-5
    )
    np.testing.assert_allclose(tensors["tag"].numpy(), arrays.extra["tag"], rtol=1e-6)
    assert type(arrays) is type(before)


def test_normalize_keeps_the_digits_of_wide_values(tmp_path):
    values = np.array([1e9, 1e9 + 1, 1e9 + 2])
    with simple(tmp_path / "store", values) as store:
        normalize = Normalize({"observation": store.stats("observation")})
        array = normalize({"observation": values})["observation"]
        tensor = normalize({"observation": torch.from_numpy(values)})["observation"]
    np.testing.assert_allclose(array, [-(1.5**0.5), 0, 1.5**0.5], rtol=1e-6)
    np.testing.assert_allclose(tensor.numpy(), array, rtol=1e-6)


def test_cast_takes_a_field_or_all_below_a_name(nested):
    path, store = nested
    cast = Cast({"observation": "float32", "action/0": "int32"})
    batch = cast(store.read(np.arange(5)))
    tensors = cast(ReplayDataset(path).batch(np.arange(5)))
    for top in ("observation", "next_observation"):
        assert {array.dtype.name for array in getattr(batch, top).values()} == {"float32"}
        assert {tensor.dtype for tensor in tensors[top].values()} == {torch.float32}
    assert [part.dtype.name for part in batch.action] == ["int32", "float32"]
    assert [part.dtype for part in tensors["action"]] == [torch.int32, torch.float32]
    assert (batch.action[0] == store.read(np.arange(5)).action[0]).all()


@pytest.mark.parametrize("dtype", replaystore.transforms._TENSOR_METHODS)
def test_cast_gives_the_dtype_that_was_asked_for(dtype):
    cast = Cast({"x": dtype})
    assert cast({"x": np.arange(3)})["x"].dtype == np.dtype(dtype)
    assert cast({"x": torch.arange(3)})["x"].dtype == getattr(torch, dtype)


def test_wrong_transforms_are_refused(nested):
    _, store = nested
    batch = store.read(np.arange(5))
    stats = store.stats("observation/zeros")
    with pytest.raises(UsageError, match="expected a dict from field to Stats"):
        Normalize({"observation": 1.0})
    with pytest.raises(UsageError, match=r"expected a dict from field to one of .*'float16'"):
        Cast({"observation": "float8"})
    with pytest.raises(UsageError, match=r"batch: expected 'lives' among .*'tag'"):
        Cast({"lives": "float32"})(batch)
    with pytest.raises(UsageError, match=r"batch: expected 'depth' among .*'image'"):
        Normalize({"observation/depth": stats})(batch)
    with pytest.raises(UsageError, match=r"observation/image: expected rows of shape \(3,\)"):
        Normalize({"observation/image": stats})(batch)
    with pytest.raises(UsageError, match="batch: expected '0' among"):
        Cast({"reward/0": "float32"})(batch)


def test_transforms_load_no_torch():
    code = "import sys, replaystore.stats; assert not {'torch', 'tqdm'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
