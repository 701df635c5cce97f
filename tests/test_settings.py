"""Every setting is checked when it is made; devices and precisions are chosen as they should be."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

import nst_helpers as nst

NAN = math.nan


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("max_size", 15, "at least 16"),
        ("max_size", 512.0, "whole number"),
        ("num_steps", 0, "at least 1"),
        ("num_steps", True, "whole number"),
        ("scales", 0, "at least 1"),
        ("scales", "many", "'auto'"),
        ("content_weight", -1, "at least 0"),
        ("style_weight", NAN, "at least 0"),
        ("style_weight", "30", "a number"),
        ("tv_weight", math.inf, "at least 0"),
        ("learning_rate", 0, "above 0"),
        ("content_layers", ("relu9_9",), "relu4_2"),
        ("content_layers", "relu4_2", "tuple"),
        ("style_layers", (), "tuple"),
        ("style_layers", ("relu1_1", "relu1_1"), "different"),
        ("style_layer_weights", (1, 2), "5 numbers"),
        ("style_layer_weights", (1, 2, 3, 4, NAN), "at least 0"),
        ("style_layer_weights", (0, 0, 0, 0, 0), "not all 0"),
        ("style_layer_weights", 3, "5 numbers"),
        ("content_layers", None, "tuple"),
        ("pooling", "median", "'max' or 'average'"),
        ("color", "sepia", "'style', 'content' or 'luminance'"),
        ("optimizer", "sgd", "'adam' or 'lbfgs'"),
        ("init", "photo", "or a picture"),
        ("style_scale", 0, "above 0"),
        ("style_blend", (0, 0), "not all 0"),
        ("style_blend", (1, -1), "at least 0"),
        ("style_blend", 1, "'equal'"),
        ("masks", "mask.png", "a tuple of pictures"),
        ("keep", "mask.png", "a picture"),
        ("weights", None, "a path"),
        ("precision", "float8", "'bfloat16'"),
        ("precision", [], "'bfloat16'"),
        ("device", "gpu", "cpu"),
        ("seed", -1, "at least 0"),
        ("seed", 2**64, "at least 0"),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError) as error:
        nst.StyleTransferConfig(**{name: value})
    message = str(error.value)
    assert message.startswith(name) and repr(value) in message and allowed in message
    assert message.count("\n") == 0 and message.endswith(".")


@pytest.mark.parametrize("picture", [torch.rand(3, 40, 40), torch.rand(1, 1, 40, 40), torch.full((1, 3, 40, 40), 2.0)])
def test_a_picture_among_the_settings_is_checked_when_it_is_set(picture):
    for settings in ({"masks": (picture,)}, {"keep": picture}, {"init": picture}):
        with pytest.raises(ValueError, match=rf"^{next(iter(settings))} must be .*\(1, 3, H, W\)|from 0 to 1"):
            nst.StyleTransferConfig(**settings)
    with pytest.raises(ValueError, match="masks must be a picture"):
        nst.StyleTransferConfig(masks=("mask.png",))


def test_a_misspelt_setting_raises_and_a_made_one_cannot_change():
    with pytest.raises(TypeError, match="style_wieght"):
        nst.StyleTransferConfig(style_wieght=3)
    config = nst.StyleTransferConfig()
    with pytest.raises(FrozenInstanceError):
        config.style_weight = 3
    assert replace(config, style_weight=3).style_weight == 3


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_cuda_else_mps_else_the_cpu(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert nst.pick_device() == torch.device(expected)
    assert nst.pick_device("cpu") == torch.device("cpu")


def test_a_device_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device must be .*cpu.*, not 'cuda'"):
        nst.pick_device("cuda")


@pytest.mark.parametrize(("pays", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_precision_takes_bfloat16_on_a_cpu_only_where_it_is_faster(monkeypatch, pays, expected):
    monkeypatch.setattr(nst, "_bfloat16_pays", lambda: pays)
    assert nst.pick_precision("auto", torch.device("cpu")) == expected
    assert nst.pick_precision("float32", torch.device("cpu")) == torch.float32
    assert nst.pick_precision("auto", torch.device("mps")) == torch.float32
