"""Checks: what does not fit is refused, and what may surprise is said, when stylize is called."""

import re
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import IMAGES, TINY, half_mask, last
from PIL import Image

import nst_helpers as nst

GB = 1e9
PHOTO = IMAGES / "china.jpg"
PARTS = ["content", "styles", "masks", "keep", "start"]


def call(pair, network, config=TINY, **pictures) -> None:
    """Call ``stylize`` with some of its pictures replaced, and take no step."""
    given = {"content": pair[0], "styles": pair[1], **pictures}
    nst.stylize(given.pop("content"), given.pop("styles"), config, network=network, **given)


def refused(pair, network, config=TINY, **pictures) -> str:
    with pytest.raises(ValueError, match=r"^\w.*\.$") as error:
        call(pair, network, config, **pictures)
    return str(error.value)


# What is no picture -------------------------------------------------------------------------------


def in_a_list(name: str, value):
    return [value] if name in ("styles", "masks") else value


@pytest.mark.parametrize(
    ("name", "listed"),
    [*((name, False) for name in PARTS), ("styles", True), ("masks", True)],
)
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (str(PHOTO), repr(str(PHOTO))),
        (PHOTO, repr(str(PHOTO))),
        (PHOTO.read_bytes(), "bytes"),
        (Image.new("RGB", (64, 48)), "PIL picture"),
        (torch.rand(48, 64, 3).numpy(), "numpy.ndarray"),
        (7, "int"),
        ({"a": 1}, "dict"),
    ],
    ids=["path", "Path", "bytes", "PIL", "NumPy", "number", "dict"],
)
def test_what_is_no_tensor_is_named_with_the_way_to_make_one(vgg, pair, name, listed, value, kind):
    text = refused(pair, vgg, **{name: [value] if listed else value})
    assert text.startswith(f"{name} ")
    assert kind in text
    assert "load_image" in text
    assert len(text) < 300


@pytest.mark.parametrize("name", ["content", "styles", "masks"])
def test_none_is_no_picture(vgg, pair, name):
    text = refused(pair, vgg, **{name: None})
    assert text.startswith(f"{name} ")
    assert "NoneType" in text


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(
    "shape",
    [(3, 40, 60), (1, 1, 40, 60), (1, 4, 40, 60), (2, 3, 40, 60), (1, 3, 15, 60), (1, 3, 60, 0)],
)
def test_a_tensor_of_another_shape_is_refused(vgg, pair, name, shape):
    text = refused(pair, vgg, **{name: in_a_list(name, torch.zeros(shape))})
    assert text.startswith(f"{name} ")
    assert str(shape) in text
    assert "16" in text


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(
    ("change", "given"),
    [
        (lambda image: image * 255, "torch.float32"),
        (lambda image: (image * 255).byte(), "torch.uint8"),
        (lambda image: image - 0.5, "torch.float32"),
        (lambda image: image * torch.nan, "nan"),
        (lambda image: image / 0, "inf"),
        (lambda image: image > 0.5, "torch.bool"),
    ],
    ids=["255", "bytes", "negative", "NaN", "infinite", "bool"],
)
def test_numbers_that_are_not_from_0_to_1_are_refused(vgg, pair, name, change, given):
    text = refused(pair, vgg, **{name: in_a_list(name, change(pair[0]))})
    assert text.startswith(f"{name} ")
    assert given in text


def test_complex_numbers_are_refused(vgg, pair):
    text = refused(pair, vgg, content=pair[0].to(torch.complex64))
    assert text.startswith("content ")
    assert "torch.complex64" in text


def test_a_single_bad_pixel_is_found(vgg, pair):
    for value in (-1e-3, 1.001, torch.nan):
        image = pair[0].clone()
        image[0, 1, 20, 30] = value
        assert refused(pair, vgg, content=image).startswith("content ")


# Settings and networks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [{"num_steps": 3}, "bundled", 512, nst.StyleTransferConfig, object()]
)
def test_a_config_of_another_type_is_refused(vgg, pair, config):
    text = refused(pair, vgg, config)
    assert text.startswith("config ")
    assert "StyleTransferConfig" in text


def test_a_network_in_the_place_of_the_config_is_refused_in_one_short_line(vgg, pair):
    with pytest.raises(ValueError, match=r"^config ") as error:
        nst.stylize(*pair, vgg)
    assert "VGG19Features" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("network", ["bundled", {}, torch.nn.ReLU(), nst.VGG19Features])
def test_a_network_of_another_type_is_refused(pair, network):
    text = refused(pair, network)
    assert text.startswith("network ")
    assert "VGG19Features" in text


def test_a_network_without_a_layer_that_is_needed_is_refused(vgg, pair):
    for needed in ({"content_layers": ("relu3_2",)}, {"style_layers": ("relu3_2",)}):
        weights = {"style_layer_weights": (1,)} if "style_layers" in needed else {}
        text = refused(pair, vgg, replace(TINY, **needed, **weights))
        assert text.startswith("network ")
        assert "relu3_2" in text


def test_a_network_with_another_pooling_is_refused(vgg, pair):
    text = refused(pair, vgg, replace(TINY, pooling="average"))
    assert text.startswith("network ")
    assert "'average'" in text
    assert "'max'" in text


def test_a_device_that_is_not_there_is_refused(pair):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    text = refused(pair, None, replace(TINY, device="cuda"))
    assert text.startswith("device ")
    assert "'cuda'" in text


def test_settings_that_make_no_sense_together(vgg, pair):
    """Settings make no sense together"""
    with pytest.raises(ValueError, match=r"content_weight.*style_weight"):
        nst.StyleTransferConfig(content_weight=0, style_weight=0)
    with pytest.raises(ValueError, match=r"style_layer_weights.*style_layers"):
        nst.StyleTransferConfig(style_layers=("relu1_1", "relu2_1"), style_layer_weights=(1, 2, 3))
    styles = [pair[1]] * 2
    text = refused(pair, vgg, replace(TINY, style_blend=(1, 2, 3)), styles=styles)
    assert text.startswith("style_blend ")
    assert "(1, 2, 3)" in text
    text = refused(pair, vgg, styles=styles, masks=[torch.ones_like(pair[0])])
    assert text.startswith("masks ")
    with pytest.warns(nst.SettingsWarning, match="seed=7"):
        call(pair, vgg, replace(TINY, seed=7))


# Counts -------------------------------------------------------------------------------------------


def test_no_painting_at_all_is_refused(vgg, pair):
    for styles in ([], ()):
        assert refused(pair, vgg, styles=styles).startswith("styles ")


@pytest.mark.parametrize("count", [1, 3])
def test_as_many_masks_as_paintings_are_needed(vgg, pair, count):
    masks = [torch.ones_like(pair[0])] * count
    text = refused(pair, vgg, styles=[pair[1]] * 2, masks=masks)
    assert text.startswith("masks ")
    assert "2" in text
    assert str(count) in text


def test_as_many_weights_of_a_blend_as_paintings_are_needed(vgg, pair):
    for count in (1, 3):
        config = replace(TINY, style_blend=(1,) * 2)
        text = refused(pair, vgg, config, styles=[pair[1]] * count)
        assert text.startswith("style_blend ")
        assert "(1, 1)" in text
        assert str(count) in text


# Masks --------------------------------------------------------------------------------------------


def white_square(size, side: int) -> torch.Tensor:
    mask = torch.zeros(1, 3, *size)
    mask[..., 16 : 16 + side, 16 : 16 + side] = 1
    return mask


@pytest.mark.parametrize("side", [0, 4])
def test_a_region_that_no_layer_would_see_is_refused(vgg, pair, side):
    layers = {"style_layers": ("relu1_1", "relu4_1"), "style_layer_weights": (1, 1)}
    masks = [torch.ones_like(pair[0]), white_square(pair[0].shape[2:], side)]
    text = refused(pair, vgg, replace(TINY, **layers), styles=[pair[1]] * 2, masks=masks)
    assert text.startswith("masks[1] ")
    for part in ("8 x 8", "relu4_1", f"{masks[1].mean():.2%}"):
        assert part in text


def test_how_large_a_region_must_be_depends_on_the_deepest_style_layer(vgg, pair):
    small = white_square(pair[0].shape[2:], 4)
    shallow = {"style_layers": ("relu1_1", "relu2_1"), "style_layer_weights": (1, 1)}
    call(pair, vgg, replace(TINY, **shallow), masks=[small])
    in_another_order = {"style_layers": ("relu4_1", "relu1_1"), "style_layer_weights": (1, 1)}
    text = refused(pair, vgg, replace(TINY, **in_another_order), masks=[small])
    assert "relu4_1" in text


def test_a_small_region_of_a_large_photo_and_a_grey_one_are_taken(vgg):
    content = torch.rand(1, 3, 342, 512)
    call((content, content), vgg, masks=[white_square((342, 512), 32)])
    call((content, content), vgg, masks=[torch.full((1, 3, 342, 512), 0.1)])


# Memory -------------------------------------------------------------------------------------------


def needed(pictures, long_side, config=TINY, checkpoint=True) -> float:
    size = (round(long_side * 2 / 3), long_side)
    in_strips = nst.blocks_in_strips(size, size, checkpoint)
    return nst.bytes_needed(size, pictures, config, torch.float32, in_strips)


@pytest.mark.parametrize(("quality", "factor"), [("quick", 1), ("normal", 1.25), ("best", 1.5)])
def test_a_size_that_cannot_fit_is_refused_with_the_largest_that_would(
    monkeypatch, vgg, pair, quality, factor
):
    monkeypatch.setattr(nst, "free_memory", lambda device: 0.3 * GB)
    huge = torch.zeros(1, 3, 2000, 3000)
    config = replace(TINY, quality=quality)
    text = refused(pair, vgg, config, content=huge)
    assert text.startswith("max_size ")
    for part in ("3000", "0.3 GB", "cpu"):
        assert part in text
    largest = int(re.search(r"at most (\d+)", text)[1])
    assert 16 < largest < 3000
    pictures = nst.gather_pictures(huge, pair[1])
    assert needed(pictures, factor * (largest - 2)) <= 0.3 * GB
    assert needed(pictures, factor * (largest + 2)) > 0.3 * GB
    call(pair, vgg, config, content=torch.zeros(1, 3, round(largest * 2 / 3) - 1, largest - 1))


def test_a_supersampled_picture_is_counted_with_its_first_block_in_strips(monkeypatch, vgg, pair):
    monkeypatch.setattr(nst, "free_memory", lambda device: 0.3 * GB)
    huge = torch.zeros(1, 3, 2000, 3000)
    config = replace(TINY, quality="normal", checkpoint=False)
    largest = int(re.search(r"at most (\d+)", refused(pair, vgg, config, content=huge))[1])
    pictures = nst.gather_pictures(huge, pair[1])
    for long_side, fits in ((largest - 2, True), (largest + 2, False)):
        size = (round(1.25 * long_side * 2 / 3), round(1.25 * long_side))
        assert (nst.bytes_needed(size, pictures, config, torch.float32, 1) <= 0.3 * GB) is fits


def test_without_checkpoints_what_fits_only_with_them_is_refused(monkeypatch, vgg, pair):
    """Linux lets a process take more than there is and then kills it without a word."""
    content = torch.zeros(1, 3, 400, 600)
    pictures = nst.gather_pictures(content, pair[1])
    lean, plain = (needed(pictures, 600, checkpoint=checkpoint) for checkpoint in (True, False))
    assert lean < plain
    monkeypatch.setattr(nst, "free_memory", lambda device: (lean + plain) / 2)
    for checkpoint in ("auto", True):
        call(pair, vgg, replace(TINY, checkpoint=checkpoint), content=content)
    text = refused(pair, vgg, replace(TINY, checkpoint=False), content=content)
    assert text.startswith("max_size ")
    assert "600" in text


def test_where_no_picture_at_all_fits_it_says_so(monkeypatch, vgg, pair):
    monkeypatch.setattr(nst, "free_memory", lambda device: 1000.0)
    text = refused(pair, vgg)
    assert "at most" not in text
    for part in ("0.0 GB", "cpu"):
        assert part in text


def test_the_memory_is_that_of_the_networks_device_and_number_type(monkeypatch, vgg, pair):
    asked = []
    monkeypatch.setattr(nst, "free_memory", lambda device: asked.append(device) or 0.0)
    half = nst.VGG19Features(weights="bundled", dtype=torch.bfloat16)
    pictures = nst.gather_pictures(*pair)
    size = pair[0].shape[2:]
    in_half, in_full = (
        nst.bytes_needed(size, pictures, TINY, dtype, 0)
        for dtype in (torch.bfloat16, torch.float32)
    )
    config = replace(TINY, checkpoint=False)
    refused(pair, vgg, config)
    assert asked[0] == vgg.device
    monkeypatch.setattr(nst, "free_memory", lambda device: (in_half + in_full) / 2)
    assert refused(pair, vgg, config).startswith("max_size ")
    call(pair, half, config)


# Warnings -----------------------------------------------------------------------------------------


def test_a_picture_of_another_shape_is_stretched_with_a_warning(vgg, pair):
    square = torch.ones(1, 3, 64, 64)
    for name, pictures in {
        "masks[0]": {"masks": [square]},
        "keep": {"keep": square},
        "start": {"start": square},
    }.items():
        with pytest.warns(nst.SettingsWarning) as told:
            nst.stylize(*pair, TINY, network=vgg, **pictures)
        (warning,) = told
        for part in (name, "64 x 64", f"64 x {pair[0].shape[2]}"):
            assert part in str(warning.message)
        assert warning.filename == __file__  # the line that called stylize


def test_another_size_of_the_same_shape_needs_no_warning(vgg, pair):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in ((86, 128), (42, 64), (21, 32)):
            other = torch.ones(1, 3, *size)
            call(pair, vgg, masks=[other], keep=other, start=other)


def test_what_was_warned_about_is_stretched_and_painted(vgg, pair):
    square = half_mask((64, 64))
    config = replace(TINY, num_steps=1, scales=1, learning_rate=1e-6)
    with pytest.warns(nst.SettingsWarning):
        image = last(nst.stylize(*pair, config, network=vgg, keep=1 - square, start=square)).image
    assert image.shape == pair[0].shape
    assert image[..., :28].min() > 0.99  # the start, stretched
    assert torch.equal(image[..., 34:], pair[0][..., 34:])  # the photo, kept


def test_larger_strokes_than_the_painting_has_pixels_for_are_said(vgg, pair):
    with pytest.warns(nst.SettingsWarning, match=r"style_scale=2.*128.*64"):
        call(pair, vgg, replace(TINY, style_scale=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(pair, vgg, replace(TINY, style_scale=0.5))
        call(pair, vgg, replace(TINY, style_scale=2), styles=torch.rand(1, 3, 100, 128))
        call(pair, vgg, styles=nst.shrink_to(pair[1], 32))  # a small painting is fine by default


def test_a_seed_without_noise_is_said(vgg, pair):
    with pytest.warns(nst.SettingsWarning, match="seed=7.*noise"):
        call(pair, vgg, replace(TINY, seed=7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(pair, vgg, replace(TINY, seed=7, noise=0.1))
        call(pair, vgg, replace(TINY, seed=7, init="noise"))
        call(pair, vgg, replace(TINY, seed=0))
