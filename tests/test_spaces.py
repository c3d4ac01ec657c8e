"""Spaces of gymnasium become the fields of a schema, or are refused by name."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers import FrameStackObservation, TimeLimit, TransformObservation
from gymnasium.wrappers import RecordEpisodeStatistics as RecordEpisode
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from replaystore import Field, SchemaError, UsageError
from replaystore.recorder import schema_from_spaces
from replaystore.spaces import FrameStack, find_frame_stack, given_stack, vector_stack

CHOICE = spaces.Discrete(2)
IMAGE = spaces.Box(0, 255, (4, 6, 5), np.uint8)


class Still(gym.Env):
    """Shows the same frame for ever."""

    action_space = CHOICE

    def __init__(self, observation_space):
        self.observation_space = observation_space

    def reset(self, *, seed=None, options=None):
        return spaces.utils.create_zero_array(self.observation_space), {}


def observation_fields(space, **kwargs):
    fields = schema_from_spaces(space, CHOICE, **kwargs).fields
    return [(field.name, field.shape, field.dtype.name) for field in fields if field.name[0] == "o"]


@pytest.mark.parametrize(
    ("space", "shape", "dtype"),
    [
        *[
            (spaces.Box(0, 1, (3, 2), dtype), (3, 2), dtype)
            for dtype in ("int8", "int16", "uint16", "int64", "uint64", "float16", "float32", "float64")
        ],
        (spaces.Box(0, 255, (84, 84), np.uint8), (84, 84), "uint8"),
        (spaces.Box(0, 1, (3,), np.bool_), (3,), "bool"),
        (spaces.Box(-1, 1, (), np.float64), (), "float64"),
        (spaces.Discrete(5), (), "int64"),
        (spaces.Discrete(5, start=3), (), "int64"),
        (spaces.MultiDiscrete([3, 4]), (2,), "int64"),
        (spaces.MultiDiscrete(np.array([[3, 4], [5, 6]]), dtype=np.int32), (2, 2), "int32"),
        (spaces.MultiBinary(7), (7,), "int8"),
        (spaces.MultiBinary([3, 2]), (3, 2), "int8"),
    ],
    ids=str,
)
def test_shape_and_dtype_of_a_space_are_kept(space, shape, dtype):
    schema = schema_from_spaces(space, space)
    assert [schema.by_name[name].shape for name in ("observation", "action")] == [shape, shape]
    assert [schema.by_name[name].dtype.name for name in ("observation", "action")] == [dtype, dtype]


def test_nested_spaces_become_paths_in_the_order_of_the_space():
    inner = spaces.Tuple([spaces.Discrete(3), spaces.Dict(left=spaces.MultiBinary(2))])
    space = spaces.Dict(camera=IMAGE, arm=inner)
    assert observation_fields(space) == [
        ("observation/camera", (4, 6, 5), "uint8"),
        ("observation/arm/0", (), "int64"),
        ("observation/arm/1/left", (2,), "int8"),
    ]


def test_reward_is_float64_and_the_flags_are_bool():
    schema = schema_from_spaces(CHOICE, CHOICE)
    dtypes = {name: schema.by_name[name].dtype.name for name in ("reward", "terminated", "truncated")}
    assert dtypes == {"reward": "float64", "terminated": "bool", "truncated": "bool"}


def test_fields_and_columns_of_the_user_stand_beside_those_of_the_spaces():
    schema = schema_from_spaces(
        CHOICE, CHOICE, fields=[Field("log_prob", (), "float32")], columns={"level": "int64"}
    )
    assert schema.extra == ("log_prob",)
    assert schema.columns == {"level": "int64"}


@pytest.mark.parametrize(
    ("space", "named"),
    [
        (spaces.Text(5), "Text"),
        (spaces.Sequence(CHOICE), "Sequence"),
        (spaces.Graph(CHOICE, None), "Graph"),
        (spaces.OneOf([CHOICE, IMAGE]), "OneOf"),
        (spaces.Dict(words=spaces.Tuple([CHOICE, spaces.Text(5)])), "observation/words/1"),
        (spaces.Dict(), "observation"),
        (spaces.Tuple([]), "observation"),
    ],
    ids=str,
)
def test_space_without_a_fixed_shape_is_refused_by_name(space, named):
    with pytest.raises(SchemaError, match=named):
        schema_from_spaces(space, CHOICE)


@pytest.mark.parametrize(
    "key", ["..", ".", "", "a/b", "a\\b", "a\n", "a\0", " ", "../a", "index", "zarr.json", "0", 0, "é" * 200]
)
def test_key_that_is_no_field_name_is_refused(key):
    with pytest.raises(SchemaError, match="observation"):
        schema_from_spaces(spaces.Dict({key: CHOICE}), CHOICE)


@pytest.mark.parametrize("keys", [("camera", "Camera"), ("a", "a/b")])
def test_keys_that_clash_once_flattened_are_refused(keys):
    with pytest.raises(SchemaError, match="observation"):
        schema_from_spaces(spaces.Dict(dict.fromkeys(keys, CHOICE)), CHOICE)


@pytest.mark.parametrize("name", ["reward", "action", "observation", "observation/0", "Reward"])
def test_field_of_the_user_cannot_take_the_place_of_another(name):
    with pytest.raises(SchemaError, match="clash"):
        schema_from_spaces(CHOICE, CHOICE, fields=[Field(name, (), "float32")])


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        ("reset", None),
        ("zero", np.zeros((6, 5), np.uint8)),
        (np.full((6, 5), 9, np.uint8), np.full((6, 5), 9, np.uint8)),
    ],
    ids=["reset", "zero", "custom"],
)
def test_a_row_of_a_stacked_space_is_one_frame_and_knows_its_padding(padding, expected):
    field = schema_from_spaces(IMAGE, CHOICE, frame_stack=FrameStack(4, padding)).by_name["observation"]
    assert (field.shape, field.dtype.name) == ((6, 5), "uint8")
    np.testing.assert_equal(field.padding_row(), expected)


def test_padding_of_a_nested_space_goes_by_name_and_not_by_order():
    space = spaces.Dict(left=spaces.Box(0, 9, (2,), np.int16), right=spaces.Box(0, 9, (2,), np.int16))
    frame = {"right": np.array([1, 1], np.int16), "left": np.array([2, 2], np.int16)}
    stack = find_frame_stack(FrameStackObservation(Still(space), 3, padding_type=frame))
    schema = schema_from_spaces(
        FrameStackObservation(Still(space), 3).observation_space, CHOICE, frame_stack=stack
    )
    assert schema.by_name["observation/left"].padding_row().tolist() == [2, 2]
    assert schema.by_name["observation/right"].padding_row().tolist() == [1, 1]


def test_space_that_is_not_stacked_so_high_is_refused():
    with pytest.raises(SchemaError, match="3 frames first, got shape"):
        schema_from_spaces(IMAGE, CHOICE, frame_stack=FrameStack(3, "reset"))


def test_unknown_padding_is_refused():
    with pytest.raises(UsageError, match="mirror"):
        schema_from_spaces(IMAGE, CHOICE, frame_stack=FrameStack(4, "mirror"))


@pytest.mark.parametrize("length", [0, -1, 2.0, True, "4"])
def test_length_of_a_stack_that_is_no_number_of_frames_is_refused(length):
    with pytest.raises(UsageError, match="frame_stack"):
        given_stack(length, "reset")


def test_stack_is_found_below_wrappers_that_keep_its_observations():
    frame = np.full((6, 5), 7, np.uint8)
    stacked = FrameStackObservation(Still(spaces.Box(0, 9, (6, 5), np.uint8)), 4, padding_type=frame)
    length, padding, is_direct = find_frame_stack(TimeLimit(stacked, 10))
    assert (length, padding.tolist(), is_direct) == (4, frame.tolist(), True)


def test_stack_is_direct_below_wrappers_that_hand_it_over_and_no_others():
    class Other(FrameStackObservation):
        pass

    def same(frames):
        return frames

    stacked = FrameStackObservation(Still(spaces.Box(0, 9, (6, 5), np.uint8)), 4)
    changed = TransformObservation(stacked, same, stacked.observation_space)
    assert find_frame_stack(stacked).is_direct
    assert find_frame_stack(TimeLimit(RecordEpisode(stacked), 9)).is_direct
    for env in (changed, TimeLimit(changed, 9), gym.Wrapper(stacked), Other(stacked.env, 4)):
        assert find_frame_stack(env) == FrameStack(4, "reset", is_direct=False)


def test_stacks_of_a_vector_are_direct_if_all_its_environments_give_them_so():
    def make():
        return FrameStackObservation(Still(spaces.Box(0, 9, (6, 5), np.uint8)), 4)

    envs = SyncVectorEnv([make, make])
    assert vector_stack(envs) == FrameStack(4, "reset", is_direct=True)
    assert vector_stack(RecordEpisodeStatistics(envs)) == FrameStack(4, "reset", is_direct=False)
    assert vector_stack(SyncVectorEnv([make, lambda: gym.Wrapper(make())])) == FrameStack(4, "reset")


def test_stack_is_not_found_where_it_is_none():
    stacked = FrameStackObservation(Still(spaces.Box(0, 9, (6, 5), np.uint8)), 4)
    flattened = TransformObservation(stacked, np.ravel, spaces.Box(0, 9, (120,), np.uint8))
    single = FrameStackObservation(Still(IMAGE), 1)
    assert [find_frame_stack(env) for env in (flattened, single, Still(IMAGE))] == [None] * 3
