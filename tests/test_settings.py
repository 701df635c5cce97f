"""Settings: each one is checked when it is set, and a config is a plain value."""

import json
import re
from dataclasses import FrozenInstanceError, asdict, fields, replace
from math import inf, nan
from pathlib import Path

import pytest
import torch
from conftest import TINY

import nst_helpers as nst

# The last of each is not the default.
GOOD_VALUES = {
    "max_size": [16, 333],
    "quality": ["auto", "quick", "normal", "best"],
    "num_steps": [1, "auto", 7],
    "scales": [1, "auto", 3],
    "content_weight": [0, 0.1],
    "style_weight": [0, 1e9],
    "tv_weight": [0, 1.5],
    "balance": ["auto", 0, 3.2],
    "detail": [1, 0.5, 0],
    "color": ["style", "content", "luminance"],
    "style_scale": [3, 0.3],
    "style_blend": [(0, 1), "equal", (1, 0.3)],
    "init": ["content", "style", "noise"],
    "optimizer": ["lbfgs", "adam"],
    "learning_rate": [1, 1e-3],
    "content_layers": [("relu5_4",), ("relu3_1", "relu4_2")],
    "style_layers": [("relu1_1", "relu2_2", "relu3_1", "relu5_4")],
    "style_layer_weights": ["equal", (0, 0, 0, 1), (0.1, 3, 1, 0)],
    "pooling": ["max", "average"],
    "weights": ["auto", "torchvision", "bundled", "vgg19.pth"],
    "precision": ["auto", "float32", "float16", "bfloat16"],
    "checkpoint": [False, "auto", 1024, True],
    "device": ["auto", "cpu", "cuda", "mps", "cuda:1"],
    "noise": [0, 0.5],
    "seed": [0, 2**63 - 1],
}
ALL_CHANGED = {name: values[-1] for name, values in GOOD_VALUES.items()}
BAD_VALUES = {
    "max_size": [15, 512.0, None],
    "quality": ["perfect"],
    "num_steps": [0, True, "many"],
    "scales": [0, 1.5, "many"],
    "content_weight": [-1, True],
    "style_weight": [nan, "30"],
    "tv_weight": [inf, -0.5],
    "balance": [-1, "high"],
    "detail": [1.5, -0.5],
    "color": ["sepia"],
    "style_scale": [0, None],
    "style_blend": [(), (0, 0), (1, -1), (1, nan), "even", 1],
    "init": ["photo"],
    "optimizer": ["sgd"],
    "learning_rate": [0],
    "content_layers": ["relu4_2", ("relu9_9",), None],
    "style_layers": [(), ("conv1_1",), ("relu1_1", "relu1_1")],
    "style_layer_weights": [(0, 0, 0, 0), (1, 2, 3, "4"), (1.0, 2.0, 3.0), 3, "even"],
    "pooling": ["median"],
    "weights": ["", None],
    "precision": ["float8", None],
    "checkpoint": [-1, 2.5, "yes"],
    "device": ["gpu", "cuda:"],
    "noise": [-0.1],
    "seed": [-1, 2**63],
}


def test_a_long_value_is_cut_but_not_hidden():
    with pytest.raises(ValueError, match=r"^weights .*abcabc") as caught:
        nst.StyleTransferConfig(weights=b"abc" * 999)
    assert len(str(caught.value)) < 400
    with pytest.raises(ValueError, match=r"^style_blend .*\(2,\)"):
        nst.StyleTransferConfig(style_blend=torch.ones(2))


def each(values: dict[str, list]) -> list[tuple]:
    return [(name, value) for name in values for value in values[name]]


@pytest.mark.parametrize(("name", "value"), each(BAD_VALUES))
def test_a_bad_value_is_refused_with_its_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name} .*{re.escape(repr(value))}"):
        replace(TINY, **{name: value})


@pytest.mark.parametrize(("name", "value"), each(GOOD_VALUES))
def test_a_good_value_is_kept(name, value):
    assert getattr(replace(TINY, **{name: value}), name) == value


@pytest.mark.parametrize("make", [nst.StyleTransferConfig, lambda **given: replace(TINY, **given)])
def test_a_misspelt_setting_is_refused(make):
    with pytest.raises(TypeError, match=r"style_wieght.*did you mean style_weight\?$"):
        make(style_wieght=3)


def test_one_of_the_two_weights_must_be_above_0():
    with pytest.raises(ValueError, match=r"content_weight.*style_weight.*0"):
        nst.StyleTransferConfig(content_weight=0, style_weight=0)


# A config is a plain value ------------------------------------------------------------------------


def test_a_config_survives_json():
    assert set(ALL_CHANGED) == {field.name for field in fields(nst.StyleTransferConfig)}
    config = nst.StyleTransferConfig(**ALL_CHANGED)
    again = nst.StyleTransferConfig(**json.loads(json.dumps(asdict(config))))
    assert again == config
    assert hash(again) == hash(config)  # no lists are left


def test_lists_become_tuples_and_paths_and_devices_text():
    path, device = Path("my weights") / "vgg19.pth", torch.device("cuda", 1)
    lists = {"style_blend": [1, 2], "content_layers": ["relu3_1"]}
    config = replace(TINY, **lists, weights=path, device=device)
    assert (config.style_blend, config.content_layers) == ((1, 2), ("relu3_1",))
    assert (config.weights, config.device) == (str(path), "cuda:1")
    assert replace(TINY, device=torch.device("cpu")) == TINY


def test_the_style_layers_can_be_changed_alone():
    """Their weights are "equal", for any number of layers."""
    assert replace(nst.StyleTransferConfig(), style_layers=("relu1_1",)).layers == (
        "relu4_2",
        "relu1_1",
    )


def test_a_config_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        TINY.style_weight = 3


# What follows from the settings -------------------------------------------------------------------


def test_a_layer_for_content_and_style_is_named_once():
    config = replace(TINY, content_layers=("relu4_2", "relu1_1"))
    assert config.layers == ("relu4_2", "relu1_1", "relu2_1", "relu3_1", "relu4_1")


@pytest.mark.parametrize(("quality", "factor"), [("quick", 1), ("normal", 1.25), ("best", 1.5)])
def test_better_quality_paints_larger_except_at_one_scale(quality, factor):
    assert replace(TINY, quality=quality, scales="auto").supersampling == factor
    assert replace(TINY, quality=quality, scales=2).supersampling == factor
    assert replace(TINY, quality=quality, scales=1).supersampling == 1
