"""The store against a model of it made of lists, through random operations."""

import shutil

import numpy as np
import pytest
from test_windows import FLAGS, Recorded, check_items, flat_batch, random_value, reference_item

from replaystore import Field, ReplayStore, Schema, Transition

pytestmark = pytest.mark.usefixtures("_no_syncs")

OPERATIONS = {
    "step": 60,
    "reset": 8,
    "add_episode": 4,
    "flush": 3,
    "sample": 10,
    "read_all": 2,
    "episode": 4,
    "reader": 3,
    "reopen": 2,
    "kill": 1,
}


def tiny_parts(monkeypatch, *, commit_seconds=1e6):
    """Little memory and small parts, so that some hundred steps commit, seal and repack many times."""
    monkeypatch.setattr("replaystore.ring.RING_BYTES", 1 << 17)
    monkeypatch.setattr("replaystore.commit.PART_EPISODES", 7)
    monkeypatch.setattr("replaystore.commit.DEAD_BYTES", 1 << 12)
    monkeypatch.setattr("replaystore.writer.COMMIT_SECONDS", commit_seconds)


def mixed_schema():
    """Packed and flat fields in tiny files; `action` numbers the transitions, so that each can be told."""
    return Schema(
        [
            Field("observation/image", (30, 30), "uint8", chunk_rows=4),
            Field("observation/vector", (3,), "float32"),
            Field("action", (), "int64"),
            Field("reward", (), "float64"),
            *FLAGS,
            Field("info/logits", (150,), "float32", chunk_rows=2),
        ],
        columns={"level": "int64"},
        file_rows=4096,
        shard_chunks=12,
    )


class Model:
    """The episodes of one stream: the closed ones in order, and the open ones by environment."""

    def __init__(self, schema, num_envs, rng):
        self.schema, self.num_envs, self.rng = schema, num_envs, rng
        self.closed, self.open = [], {}
        self.places = []

    def observation(self):
        fields = [f for f in self.schema.fields if self.schema.is_observation(f.name)]
        return {field.name: random_value(field, self.rng) for field in fields}

    def step(self):
        """The values of one environment's step, of which the action counts up."""
        row = {field.name: random_value(field, self.rng) for field in self.schema.fields}
        return row | {"action": np.int64(0), "terminated": np.False_, "truncated": np.False_}

    def begin(self, env, observation, level):
        self.end(env)
        self.open[env] = Recorded(self.schema.by_name)
        self.open[env].level, self.open[env].total = level, 0.0
        for name, value in observation.items():
            self.open[env].fields[name].append(value)

    def append(self, env, row):
        row["action"] = np.int64(len(self.places))
        episode = self.open[env]
        self.places.append((episode, len(episode)))
        for name, value in row.items():
            episode.fields[name].append(value)
        episode.total += row["reward"]
        episode.terminated, episode.truncated = bool(row["terminated"]), bool(row["truncated"])
        if row["terminated"] or row["truncated"]:
            self.end(env)

    def end(self, env):
        if (episode := self.open.pop(env, None)) is not None and len(episode):
            self.closed.append((env, episode))

    def episodes(self):
        return self.closed + [(env, self.open[env]) for env in sorted(self.open) if len(self.open[env])]

    def rows(self):
        """The table of episodes as the store should give it."""
        return [(env, len(e), e.terminated, e.truncated, e.total, e.level) for env, e in self.episodes()]


class Game:
    """Plays the same operations on a store and on its model."""

    def __init__(self, path, num_envs, rng):
        self.path, self.num_envs, self.rng = path, num_envs, rng
        self.schema = mixed_schema()
        self.model = Model(self.schema, num_envs, rng)
        self.store = ReplayStore.create(path, self.schema, num_envs)
        self.reader, self.seen = ReplayStore.open(path), []

    def close(self):
        self.store.close()
        self.reader.close()

    def mask(self):
        """Environments, often all; None stands for all."""
        chosen = self.rng.random(self.num_envs) < 0.7
        return None if chosen.all() or self.rng.random() < 0.5 else chosen

    def stack(self, rows):
        """Rows by environment to arrays with the environments first, nested as the store wants them."""
        flat = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        if self.num_envs == 1:
            flat = {name: array[0] for name, array in flat.items()}
        tops = {name.split("/")[0] for name in flat}
        return {top: self.schema.nest(top, flat) for top in tops}

    def reset(self):
        mask = self.mask()
        rows = [self.model.observation() for _ in range(self.num_envs)]
        level = int(self.rng.integers(100))
        self.store.reset(**self.stack(rows), mask=mask, columns={"level": level})
        envs = [env for env in range(self.num_envs) if mask is None or mask[env]]
        for env in envs:  # all open episodes end before one begins
            self.model.end(env)
        for env in envs:
            self.model.begin(env, rows[env], level)

    def step(self):
        mask = self.mask()
        closed = [env for env in range(self.num_envs) if env not in self.model.open]
        if closed:
            mask = np.isin(np.arange(self.num_envs), closed, invert=True)
        if mask is not None and not mask.any():
            self.reset()
            return
        rows = [self.model.step() for _ in range(self.num_envs)]
        taken = [env for env in range(self.num_envs) if mask is None or mask[env]]
        for env in taken:
            rows[env]["terminated"], rows[env]["truncated"] = self.rng.random(2) < 0.05
        for env in taken:
            self.model.append(env, rows[env])
        self.store.step(**self.stack(rows), mask=mask)

    def add_episode(self):
        if self.model.open:
            self.step()
            return
        length = int(self.rng.choice([1, 3, 20, 150]))
        before = self.lengths()
        self.model.begin("new", self.model.observation(), None)
        for t in range(length):
            row = self.model.step()
            row["terminated"], row["truncated"] = (self.rng.random(2) < 0.5) & (t + 1 == length)
            self.model.append("new", row)
        self.model.end("new")
        _, episode = self.model.closed.pop()
        arrays = {name: np.stack(rows) for name, rows in episode.fields.items()}
        self.store.add_episode(**{top: self.schema.nest(top, arrays) for top in self.schema.tops})
        env = self.store.episodes["env"][len(before)].as_py()
        self.model.closed.append((env, episode))

    def lengths(self):
        return self.store.episodes["length"].to_pylist()

    def flush(self):
        self.store.flush()

    def sample(self):
        for store, places in ((self.store, self.model.places), (self.reader, self.seen)):
            if not len(store):
                continue
            batch = store.sample(20, rng=self.rng)
            self.compare_batch(batch, places, Transition())

    def read_all(self):
        self.compare_all(self.store, self.model.places)

    def compare_all(self, store, places):
        """Every transition once, as a window that uses all there is to it."""
        window = Transition(n_step=int(self.rng.integers(1, 4)), frame_stack=int(self.rng.integers(1, 4)))
        batch = store.read(np.arange(len(store)), window)
        assert sorted(batch.action) == list(range(len(places)))
        assert len(np.unique(batch.ids)) == len(places)
        self.compare_batch(batch, places, window)

    def compare_batch(self, batch, places, window):
        expected = [reference_item(self.schema, *places[number], window) for number in batch.action]
        if expected:
            check_items(self.schema, flat_batch(self.schema, batch), expected)

    def episode(self):
        episodes = self.model.episodes()
        if episodes:
            number = int(self.rng.integers(-len(episodes), len(episodes)))
            check_episode(self.schema, self.store.episode(number), episodes[number][1])

    def frozen(self):
        """Copies of the model's transitions as they are now, for a reader that stays behind."""
        copies = {}
        for episode, t in self.model.places:
            if id(episode) not in copies:
                copy = copies[id(episode)] = Recorded(())
                copy.fields = {name: list(rows) for name, rows in episode.fields.items()}
                copy.terminated, copy.truncated = episode.terminated, episode.truncated
            yield copies[id(episode)], t

    def reader_moves(self):
        if self.rng.random() < 0.5:
            self.reader.close()
            self.store.flush()
            self.reader = ReplayStore.open(self.path)
        else:
            self.store.flush()
            self.reader.refresh()
        self.seen = list(self.frozen())
        self.reader.check()
        self.compare_all(self.reader, self.seen)

    def end_all(self):
        for env in sorted(self.model.open):
            self.model.end(env)

    def reopen(self):
        self.store.close()
        self.end_all()
        self.store = ReplayStore.open(self.path, "a", num_envs=self.num_envs)

    def kill(self):
        """Go on with a copy made while the store was open: what a killed process leaves."""
        self.store.flush()
        copy = self.path.with_name(self.path.name + "x")
        shutil.copytree(self.path, copy)
        self.close()
        shutil.rmtree(self.path)
        self.path = copy
        self.reader, self.seen = ReplayStore.open(self.path), list(self.frozen())
        self.store = ReplayStore.open(self.path, "a", num_envs=self.num_envs)
        self.end_all()

    def compare(self):
        names = ("env", "length", "terminated", "truncated", "return", "level")
        table = self.store.episodes
        found = list(zip(*(table[name].to_pylist() for name in names), strict=True))
        expected = self.model.rows()
        assert [row[:4] + row[5:] for row in found] == [row[:4] + row[5:] for row in expected]
        np.testing.assert_allclose([row[4] for row in found], [row[4] for row in expected], atol=1e-9)
        assert len(self.store) == len(self.model.places)
        assert self.store.num_episodes == len(expected)
        assert len(self.reader) == len(self.seen)
        self.store.check()


def check_episode(schema, arrays, episode):
    """Compare what `store.episode` gave with a model's episode."""
    flat = {
        name: value for top in schema.tops for name, value in schema.flatten_top(top, arrays[top]).items()
    }
    for name, rows in episode.fields.items():
        np.testing.assert_array_equal(flat[name], np.stack(rows), err_msg=name)
        assert flat[name].dtype == schema.by_name[name].dtype


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("commit_seconds", [1e6, 0.002])
@pytest.mark.parametrize("seed", range(2))
def test_the_store_behaves_as_lists_do(tmp_path, monkeypatch, seed, commit_seconds, num_envs):
    tiny_parts(monkeypatch, commit_seconds=commit_seconds)
    rng = np.random.default_rng([seed, num_envs])
    game = Game(tmp_path / "store", num_envs, rng)
    names = list(OPERATIONS)
    chances = np.array(list(OPERATIONS.values())) / sum(OPERATIONS.values())
    try:
        for _ in range(300):
            operation = rng.choice(names, p=chances)
            {"reader": game.reader_moves}.get(operation, lambda name=operation: getattr(game, name)())()
            game.compare()
        game.reader_moves()
    finally:
        game.close()
