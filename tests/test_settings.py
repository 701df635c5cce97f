"""Settings: each one is checked when it is made, and a config is a plain value."""

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, asdict, fields, replace
from fractions import Fraction
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

import nst_helpers as nst

NAMES = [field.name for field in fields(nst.StyleTransferConfig)]

# A setting, a value that it cannot have, and words that must be among what is allowed.
OUT_OF_RANGE = [
    ("max_size", 15, "16"),
    ("max_size", 512.0, "whole"),
    ("num_steps", 0, "1"),
    ("num_steps", True, "whole"),
    ("num_steps", "many", "'auto'"),
    ("quality", "perfect", "'best'"),
    ("seconds", 0, "0"),
    ("seconds", "a minute", "number"),
    ("detail", 1.5, "1"),
    ("detail", -0.5, "0"),
    ("detail", nan, "number"),
    ("scales", 0, "'auto'"),
    ("scales", "many", "'auto'"),
    ("content_weight", -1, "0"),
    ("style_weight", nan, "0"),
    ("style_weight", "30", "number"),
    ("tv_weight", inf, "0"),
    ("noise", -0.1, "0"),
    ("learning_rate", 0, "0"),
    ("style_scale", 0, "0"),
    ("style_scale", None, "number"),
    ("content_layers", ("relu9_9",), "relu4_2"),
    ("content_layers", "relu4_2", "tuple"),
    ("content_layers", None, "tuple"),
    ("style_layers", (), "tuple"),
    ("style_layers", ("relu1_1", "relu1_1"), "once"),
    ("style_layers", ("conv1_1",), "relu1_1"),
    ("style_layer_weights", (1, 2), "style_layers"),
    ("style_layer_weights", (1, 2, 3, 4, nan), "0"),
    ("style_layer_weights", (0, 0, 0, 0, 0), "0"),
    ("style_layer_weights", 3, "numbers"),
    ("style_blend", (0, 0), "'equal'"),
    ("style_blend", (1, -1), "'equal'"),
    ("style_blend", (), "'equal'"),
    ("style_blend", 1, "'equal'"),
    ("pooling", "median", "'average'"),
    ("color", "sepia", "'luminance'"),
    ("optimizer", "sgd", "'lbfgs'"),
    ("init", "photo", "'noise'"),
    ("checkpoint", 1, "True"),
    ("checkpoint", "yes", "'auto'"),
    ("weights", None, "path"),
    ("precision", "float8", "'bfloat16'"),
    ("precision", (), "'bfloat16'"),
    ("device", "gpu", "'cuda'"),
    ("device", "cuda:", "'cuda:1'"),
    ("seed", -1, "0"),
    ("seed", 2**64, "0"),
]


def check_sentence(error: BaseException, name: str) -> None:
    """It is one sentence, on one line, and begins with the setting's name."""
    message = str(error)
    assert message.startswith(name)
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize(("name", "value", "allowed"), OUT_OF_RANGE)
def test_a_setting_out_of_range(name, value, allowed):
    """A setting is misspelt, of the wrong type or out of range"""
    with pytest.raises(ValueError, match=f"^{name} ") as error:
        nst.StyleTransferConfig(**{name: value})
    check_sentence(error.value, name)
    assert repr(value) in str(error.value)
    assert allowed in str(error.value)


@pytest.mark.parametrize(
    ("misspelt", "nearest"),
    [("style_wieght", "style_weight"), ("nun_steps", "num_steps"), ("colour", "color")],
)
def test_a_misspelt_setting_is_told_the_nearest_one(misspelt, nearest):
    for make in (nst.StyleTransferConfig, lambda **given: replace(TINY, **given)):
        with pytest.raises(TypeError) as error:
            make(**{misspelt: 3})
        assert misspelt in str(error.value)
        assert f"{nearest}?" in str(error.value)


def test_a_setting_unlike_any_other_is_named_without_a_guess():
    with pytest.raises(TypeError) as error:
        nst.StyleTransferConfig(xyzzy=3)
    assert "xyzzy" in str(error.value)
    assert not any(name in str(error.value) for name in NAMES)


HOLDS_ITSELF: list[object] = []
HOLDS_ITSELF.append(HOLDS_ITSELF)

NO_SETTINGS = {
    "a tensor": torch.zeros(2),
    "a large tensor": torch.zeros(200, 200),
    "a tensor of one number": torch.tensor(3),
    "tensors": [torch.zeros(40, 40)] * 2,
    "an array": np.zeros(2),
    "a large array": np.zeros((3, 40, 40)),
    "lines": ["two\nlines"],
    "a long value": {"a": "b" * 10_000},
    "more digits than Python prints": 10**5000,
    "a list that holds itself": HOLDS_ITSELF,
}


@pytest.mark.parametrize("value", NO_SETTINGS.values(), ids=NO_SETTINGS)
def test_whatever_a_setting_is_given_the_error_is_one_short_sentence(value):
    for name in NAMES:
        with pytest.raises(ValueError, match=f"^{name} ") as error:
            nst.StyleTransferConfig(**{name: value})
        check_sentence(error.value, name)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.just(torch.zeros(2)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.text(), inner, max_size=2)
    ),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None, database=None)
@given(st.sampled_from(NAMES), ANYTHING)
def test_any_value_at_all_makes_a_config_or_one_sentence(name, value):
    try:
        config = nst.StyleTransferConfig(**{name: value})
    except ValueError as error:
        check_sentence(error, name)
    else:
        assert nst.StyleTransferConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_settings_that_contradict_each_other_are_refused_when_they_are_set():
    with pytest.raises(ValueError, match=r"content_weight.*style_weight"):
        replace(TINY, content_weight=0, style_weight=0)
    with pytest.raises(ValueError, match=r"seconds=9.*num_steps=5"):
        replace(TINY, seconds=9, num_steps=5)
    with pytest.raises(ValueError, match=r"style_layer_weights.*2 style_layers.*\(1, 2, 3\)"):
        replace(TINY, style_layers=("relu1_1", "relu2_1"), style_layer_weights=(1, 2, 3))


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_here_may_be_named(device):
    """A config that came with a picture from another machine can be made and read."""
    assert replace(TINY, device=device).device == device


# A config is a plain value ------------------------------------------------------------------------


def test_a_config_cannot_change_and_replace_gives_a_changed_copy():
    config = replace(TINY, style_weight=2)
    with pytest.raises(FrozenInstanceError):
        config.style_weight = 3
    assert replace(config, style_weight=3).style_weight == 3
    assert config.style_weight == 2
    with pytest.raises(ValueError, match="style_weight"):
        replace(config, style_weight=-1)


def test_equal_settings_make_equal_configs():
    config = replace(TINY, style_blend=(1, 2))
    assert config == replace(TINY, style_blend=[1, 2])
    assert hash(config) == hash(replace(TINY, style_blend=[1, 2]))
    assert config != replace(TINY, style_blend=(2, 1))


@pytest.mark.parametrize(
    "make", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_config_can_be_copied_and_sent_to_another_process(make):
    config = replace(TINY, style_weight=7, content_layers=["relu3_1"])
    assert make(config) == config


def test_a_config_goes_through_json_as_it_is():
    config = nst.StyleTransferConfig(
        max_size=np.int64(333),
        quality="best",
        seconds=7.5,
        scales=3,
        content_weight=np.float32(0.1),
        color="luminance",
        style_blend=[1, np.float64(0.3)],
        content_layers=["relu3_1", "relu4_2"],
        style_layers=["relu1_1", "relu2_2"],
        style_layer_weights=[0.1, 3],
        weights=Path("my weights") / "vgg19.pth",
        checkpoint=True,
        device="cuda:1",
        seed=2**63 - 1,
    )
    assert nst.StyleTransferConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_a_number_that_no_float_can_hold_is_refused_like_any_other():
    with pytest.raises(ValueError, match=r"^style_weight "):
        nst.StyleTransferConfig(style_weight=Fraction(10**400))


def test_a_config_prints_as_the_code_that_makes_it():
    config = replace(TINY, style_blend=[1, 2], noise=np.float64(0.25), weights=Path("mine.pth"))
    assert eval(repr(config), {"StyleTransferConfig": nst.StyleTransferConfig}) == config


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("style_layers", [*nst.STYLE_LAYERS], nst.STYLE_LAYERS),
        ("style_blend", [1, 2], (1, 2)),
        ("style_blend", [np.float64(0.5), np.int64(2)], (0.5, 2)),
        ("weights", Path("folder") / "mine.pth", str(Path("folder") / "mine.pth")),
        ("max_size", np.int64(64), 64),
        ("num_steps", np.uint8(9), 9),
        ("seed", np.int32(5), 5),
        ("scales", np.int64(2), 2),
        ("style_weight", np.float64(2.5), 2.5),
        ("style_weight", np.float32(2.5), 2.5),
        ("style_weight", np.int64(2), 2),
        ("device", torch.device("cpu"), "cpu"),
        ("device", torch.device("cuda", 1), "cuda:1"),
    ],
)
def test_lists_paths_devices_and_numpys_numbers_are_taken_as_plain_values(name, given, kept):
    value = getattr(nst.StyleTransferConfig(**{name: given}), name)
    assert value == kept
    assert type(value) is type(kept)
    if isinstance(kept, tuple):
        assert [type(part) for part in value] == [type(part) for part in kept]
