"""Painting: scales, steps, starts, optimizers, what is shown, and runs in which things go wrong."""

import threading
import weakref
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise, zip_longest
from typing import ClassVar

import pytest
import torch
from conftest import (
    TINY,
    change_features,
    content_loss,
    fail,
    half_mask,
    last,
    paint,
    style_loss,
)

import nst_helpers as nst

OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
PAIRS = pytest.mark.parametrize(
    ("photo", "painting"), [("china", "starry_night"), ("chelsea", "stained_glass")]
)
# With color="content" the photo keeps its colours, and a run starts from the photo as it is.
# One step that is too small to see: what it shows is the start.
AT_THE_START = {"num_steps": 1, "scales": 1, "learning_rate": 1e-6, "color": "content"}


@pytest.fixture(scope="session")
def pair(pictures) -> tuple[torch.Tensor, torch.Tensor]:
    """A photo and a painting, 48 pixels long: the least that can be painted at three sizes."""
    return nst.shrink_to(pictures["china"], 48), nst.shrink_to(pictures["starry_night"], 48)


def mean_change(image: torch.Tensor, other: torch.Tensor) -> float:
    return (image - other).abs().mean().item()


# The picture --------------------------------------------------------------------------------------


@pytest.mark.slow
@OPTIMIZERS
@PAIRS
def test_the_style_comes_and_the_content_stays(vgg, pictures, photo, painting, optimizer):
    content = nst.shrink_to(pictures[photo], 96)
    style = nst.shrink_to(pictures[painting], 96)
    settings = {"content_weight": 2.5, "style_weight": 30, "num_steps": 40}
    result = paint(content, style, vgg, optimizer=optimizer, **settings)
    assert result.shape == content.shape
    assert result.min() >= 0
    assert result.max() <= 1
    assert style_loss(result, style, vgg) < style_loss(content, style, vgg) / 4
    # Both photos in the painting's palette, so that a change of colours is no loss of content.
    other = pictures["chelsea" if photo == "china" else "china"]
    unrelated = nst.recolor(nst.resize(other, content.shape[2:]), [style], [], TINY)
    recolored = nst.recolor(content, [style], [], TINY)
    assert style_loss(result, style, vgg) < style_loss(recolored, style, vgg) / 2
    assert content_loss(result, recolored, vgg) < content_loss(unrelated, recolored, vgg)


@pytest.mark.slow
@pytest.mark.parametrize("weight", ["content_weight", "style_weight", "tv_weight"])
def test_each_weight_pulls_the_way_it_says(vgg, pair, weight):
    content, style = pair

    def loss_with(value):
        weights = {"content_weight": 2.5, "style_weight": 30, "tv_weight": 2, weight: value}
        image = paint(content, style, vgg, num_steps=25, scales=1, **weights)
        if weight == "tv_weight":
            return nst.total_variation_loss(image).item()
        if weight == "content_weight":
            return content_loss(image, content, vgg)
        return style_loss(image, style, vgg)

    assert loss_with(50) < loss_with(0.1)


@pytest.mark.slow
def test_a_small_picture_and_a_large_one_look_alike(vgg, pictures):
    """The style loss of the large one, shrunk, is about that of the small one."""
    photo, painting = pictures["china"], pictures["starry_night"]
    small_photo, small_painting = nst.shrink_to(photo, 64), nst.shrink_to(painting, 64)
    settings = {"num_steps": 40, "scales": "auto"}
    small = paint(small_photo, small_painting, vgg, **settings)
    large = nst.shrink_to(paint(photo, painting, vgg, **settings), 64)
    before = style_loss(small_photo, small_painting, vgg)
    assert style_loss(large, small_painting, vgg) < before / 2
    assert style_loss(large, small_painting, vgg) < 3 * style_loss(small, small_painting, vgg)


@OPTIMIZERS
def test_the_same_settings_give_the_same_picture_bit_for_bit(vgg, pair, optimizer):
    config = replace(TINY, optimizer=optimizer, noise=0.1)
    torch.manual_seed(1)
    steps = list(nst.stylize(*pair, config, network=vgg))
    torch.manual_seed(2)  # the process's own dice have no part in it
    again = list(nst.stylize(*pair, config, network=vgg))
    for step, other in zip(steps, again, strict=True):
        assert torch.equal(step.image, other.image)
        assert step.losses == other.losses


def test_a_run_leaves_the_dice_and_the_pictures_as_they_were(vgg, pair):
    before = [picture.clone() for picture in pair]
    state = torch.get_rng_state()
    paint(*pair, vgg, noise=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(picture, copy) for picture, copy in zip(pair, before, strict=True))


def test_a_run_makes_its_own_network_where_none_is_given(vgg, pair):
    config = replace(TINY, num_steps=1)
    assert torch.equal(last(nst.stylize(*pair, config)).image, paint(*pair, vgg, num_steps=1))


def test_a_run_needs_no_settings(vgg, pair):
    step = next(nst.stylize(*pair, network=vgg))
    assert step.number == 1
    assert step.total > 1


def test_the_network_that_is_given_decides_the_number_type(pair):
    half = nst.VGG19Features(weights="bundled", dtype=torch.bfloat16)
    step = next(nst.stylize(*pair, TINY, network=half))
    assert step.record["settings"]["precision"] == "bfloat16"
    assert step.image.dtype == torch.float32


def test_content_and_style_may_have_any_sizes_and_shapes(vgg, pair):
    tall = pair[0].mT.contiguous()
    strip = torch.rand(1, 3, 16, 70)
    assert paint(tall, strip, vgg, num_steps=2).shape == tall.shape
    assert paint(strip, tall, vgg, num_steps=2).shape == strip.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_pictures_of_any_floating_point_type_are_painted_in_float32(vgg, pair, dtype):
    content, style = (picture.to(dtype) for picture in pair)
    image = paint(content, style, vgg, num_steps=3)
    assert image.dtype == torch.float32
    assert mean_change(image, paint(*pair, vgg, num_steps=3)) < 0.02


@OPTIMIZERS
def test_pixels_stay_in_range_under_a_wild_learning_rate(vgg, pair, optimizer):
    """Without the clamp the losses would be those of no picture: tv is at most 2 in [0, 1]."""
    config = replace(TINY, optimizer=optimizer, scales=1, learning_rate=0.9)
    for step in nst.stylize(*pair, config, network=vgg):
        assert step.losses["tv"] <= 2
        assert step.image.min() >= 0
        assert step.image.max() <= 1


GREY = torch.full((1, 3, 32, 48), 0.5)
BLACK = torch.zeros(1, 3, 36, 48)
STRIP = pytest.param("a strip", marks=pytest.mark.slow)


@pytest.mark.parametrize("color", ["style", "content", "luminance"])
@pytest.mark.parametrize(
    "which",
    ["a grey photo", "a black painting", "one picture as both", "grey as both", STRIP],
)
def test_pictures_with_nothing_to_hold_on_to(vgg, pair, which, color):
    """The photo is one plain grey, the painting black, both the same, or one a strip of 16 x 4000 pixels"""  # noqa: E501
    photo, painting = pair
    content, style = {
        "a grey photo": (GREY, painting),
        "a black painting": (photo, BLACK),
        "one picture as both": (photo, photo),
        "grey as both": (GREY, GREY),
        "a strip": (nst.resize(photo, (16, 4000)), painting),
    }[which]
    image = paint(content, style, vgg, color=color, num_steps=2 if which == "a strip" else 8)
    assert image.shape == content.shape
    assert image.isfinite().all()
    assert image.min() >= 0
    assert image.max() <= 1
    if which in ("one picture as both", "grey as both"):
        assert mean_change(image, content) < 0.06
    elif color == "style":  # in the colours of a grey photo, a painting is grey too
        assert mean_change(image, content) > 0.005


# Steps --------------------------------------------------------------------------------------------


@pytest.fixture
def steps(vgg, pair) -> list[nst.Step]:
    """Of a run at two sizes."""
    return list(nst.stylize(*pair, replace(TINY, num_steps=8, scales=2), network=vgg))


def test_steps_are_numbered_over_all_sizes(steps, pair):
    assert [step.number for step in steps] == list(range(1, 9))
    assert {step.total for step in steps} == {8}
    heights = [step.image.shape[2] for step in steps]
    assert heights == sorted(heights)
    assert len(set(heights)) == 2
    assert steps[-1].image.shape == pair[0].shape


def test_progress_is_the_share_of_the_work_and_ends_at_1(steps):
    shares = [0.0, *(step.progress for step in steps)]
    parts = [after - before for before, after in pairwise(shares)]
    assert shares[-1] == pytest.approx(1, abs=1e-9)
    pixels = [(step.image.shape[2] + 8) * (step.image.shape[3] + 8) for step in steps]
    for part, painted in zip(parts, pixels, strict=True):
        assert part == pytest.approx(painted / sum(pixels), rel=0.3)
    assert parts[-1] > 1.5 * parts[0] > 0  # a step at twice the pixels is more work


def test_each_step_has_its_own_picture_losses_and_record(vgg, pair):
    kept = []
    copies = []
    for step in nst.stylize(*pair, TINY, network=vgg):
        kept.append(step)
        copies.append(step.image.clone())
    for step, copy in zip(kept, copies, strict=True):
        assert torch.equal(step.image, copy)  # no later step has painted into it
        assert step.record["step"] == step.number
        assert step.record["finished"] is (step.number == step.total)
        assert not step.image.requires_grad
        assert {"content", "style", "tv", "total"} <= step.losses.keys()
        for loss in step.losses.values():
            assert loss.shape == ()
            assert loss.isfinite()
            assert not loss.requires_grad
    totals = [step.losses["total"].item() for step in kept]
    assert len(set(totals)) == len(totals)


def test_a_step_cannot_be_changed(steps):
    with pytest.raises(FrozenInstanceError):
        steps[0].number = 7


def test_the_losses_are_those_of_the_picture_before_the_step(vgg, pair):
    config = replace(TINY, num_steps=2, scales=1, init="content")
    first, second = nst.stylize(*pair, config, network=vgg)
    assert first.losses["content"] == 0  # of the photo itself
    assert second.losses["content"] > 0


def test_the_caller_can_compute_gradients_between_the_steps(vgg, pair):
    for _ in nst.stylize(*pair, replace(TINY, num_steps=2), network=vgg):
        assert torch.is_grad_enabled()


def test_pictures_that_need_gradients_give_a_result_that_does_not(vgg, pair):
    content, style = (picture.clone().requires_grad_() for picture in pair)
    image = paint(content, style, vgg, num_steps=2, keep=content, color="luminance")
    assert not image.requires_grad


class NoteGradient(torch.autograd.Function):
    """Passes numbers on as they are, and notes how large their gradient is."""

    noted: ClassVar[list[float]] = []

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        NoteGradient.noted.append(grad.abs().mean().item())
        return grad


def test_the_gradient_does_not_shrink_with_the_size(monkeypatch, vgg, pictures):
    """Each pixel's part in a mean is small; float16 would lose it unless the loss is scaled up."""
    NoteGradient.noted.clear()
    for side in (32, 128):
        photo, style = (nst.shrink_to(pictures[name], side) for name in ("china", "starry_night"))

        def note(features):
            return {**features, "relu4_2": NoteGradient.apply(features["relu4_2"])}

        with monkeypatch.context() as patch:
            change_features(patch, 1, note)
            paint(photo, style, vgg, scales=1, num_steps=1, init="noise")
    of_small, of_large = NoteGradient.noted
    assert of_large > of_small / 4  # there are 16 times as many pixels


# Scales -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", ["auto", 1, 2, 3])
@pytest.mark.parametrize("size", [(342, 512), (85, 128), (900, 600)])
def test_sizes_go_from_coarse_to_fine_in_one_shape(size, scales):
    plan = nst.plan_scales(size, 100, replace(TINY, scales=scales))
    sizes = [scale.size for scale in plan]
    assert sizes[-1] == size
    if scales != "auto":
        assert len(plan) == scales
    for (height, width), (higher, wider) in pairwise(sizes):
        assert higher == pytest.approx(2 * height, abs=1)
        assert wider == pytest.approx(2 * width, abs=1)
        assert height / width == pytest.approx(size[0] / size[1], rel=0.03)


def test_no_side_is_painted_below_16_pixels():
    for size in ((16, 4000), (32, 32), (16, 16)):
        plan = nst.plan_scales(size, 100, replace(TINY, scales=9))
        assert min(side for scale in plan for side in scale.size) >= 16
        assert plan[-1].size == size
    assert len(nst.plan_scales((64, 64), 100, replace(TINY, scales=9))) > 2


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 10, 209, 210, 1000, 10**9, 2**63 - 1])
@pytest.mark.parametrize("size", [(342, 512), (85, 128), (2048, 2048)])
def test_the_plan_spends_all_steps_and_always_paints_the_full_size(num_steps, size):
    plan = nst.plan_scales(size, num_steps, replace(TINY, scales="auto"))
    assert sum(scale.steps for scale in plan) == num_steps
    assert all(scale.steps >= 1 for scale in plan)
    assert plan[-1].size == size


@pytest.mark.parametrize(
    ("num_steps", "expected"), [(75, [57, 12, 6]), (13, [10, 2, 1]), (95, [57, 22, 16])]
)
def test_most_steps_are_taken_where_they_are_cheap(num_steps, expected):
    """Up to the normal number; those beyond it go to the two finest scales."""
    plan = nst.plan_scales((342, 512), num_steps, nst.StyleTransferConfig())
    assert [scale.steps for scale in plan] == expected
    assert [scale.size[1] for scale in plan] == [160, 320, 640]


def test_a_run_of_any_number_of_steps_starts_at_once(vgg, pair):
    """A list with an entry a step would not fit into any memory."""
    step = next(nst.stylize(*pair, replace(TINY, num_steps=2**62), network=vgg))
    assert step.total == 2**62
    assert 0 < step.progress < 1e-9


@pytest.mark.parametrize(
    ("size", "expected"),
    [((85, 128), 1), ((60, 91), 1), ((42, 64), 2), ((30, 45), 2), ((21, 32), 3), ((170, 256), 1)],
)
def test_a_picture_is_gone_on_from_at_its_own_size_and_up(size, expected):
    config = replace(TINY, scales=3)
    assert len(nst.plan_scales((85, 128), 30, config)) == 3
    plan = nst.plan_scales((85, 128), 30, config, torch.rand(1, 3, *size))
    assert len(plan) == expected
    assert plan[-1].size == (85, 128)
    assert sum(scale.steps for scale in plan) == 30


@pytest.mark.parametrize("color", ["content", "luminance"])
def test_the_photos_fine_detail_comes_in_with_the_size_that_shows_it(vgg, pair, color):
    """With steps too small to see, what comes out is the photo: no scale leaves it blurred."""
    settings = {"num_steps": 9, "scales": 2, "learning_rate": 1e-6, "color": color}
    assert mean_change(paint(*pair, vgg, **settings, detail=1), pair[0]) < 5e-3
    if color == "content":
        blurred = nst.enlarge_softly(nst.resize(pair[0], (21, 32)), pair[0].shape[2:])
        without = paint(*pair, vgg, **settings, detail=0)
        assert mean_change(without, blurred) < mean_change(blurred, pair[0]) / 2


def test_marks_of_single_pixels_do_not_grow_with_the_picture():
    """They would become a grid of dots two pixels wide."""
    checkerboard = (torch.arange(16)[:, None] + torch.arange(24)) % 2
    enlarged = nst.enlarge_softly(checkerboard.float().expand(1, 3, -1, -1), (32, 48))
    torch.testing.assert_close(enlarged, torch.full((1, 3, 32, 48), 0.5), atol=1e-3, rtol=0)


def test_a_picture_that_does_not_grow_is_not_softened(pair):
    photo = pair[0]
    for size in (photo.shape[2:], (30, 45)):
        assert torch.equal(nst.enlarge_softly(photo, size), nst.resize(photo, size))


def test_without_a_content_weight_no_detail_of_the_photo_comes_in(vgg, pair):
    photo = pair[0]
    blurred = nst.enlarge_softly(nst.resize(photo, (21, 32)), photo.shape[2:])
    settings = {"init": "noise", "num_steps": 9, "scales": 2, "learning_rate": 1e-6, "detail": 1}

    def correlation_with_edges(content_weight):
        image = paint(*pair, vgg, content_weight=content_weight, **settings)
        both = torch.stack([image.flatten(), (photo - blurred).flatten()])
        return torch.corrcoef(both)[0, 1].abs().item()

    assert correlation_with_edges(1) > 0.15
    assert correlation_with_edges(0) < 0.08


# The start ----------------------------------------------------------------------------------------


def test_the_start_is_what_init_names(vgg, pair):
    photo, painting = pair
    from_photo = paint(*pair, vgg, **AT_THE_START, init="content")
    torch.testing.assert_close(from_photo, photo, atol=1e-3, rtol=0)
    from_style = paint(*pair, vgg, **{**AT_THE_START, "color": "style"}, init="style")
    stretched = nst.resize(painting, photo.shape[2:])
    torch.testing.assert_close(from_style, stretched, atol=1e-3, rtol=0)
    noise = paint(*pair, vgg, **AT_THE_START, init="noise")
    assert noise.mean() == pytest.approx(0.5, abs=0.05)
    assert 0.1 < noise.std() < 0.4
    correlation = torch.corrcoef(torch.stack([noise.flatten(), photo.flatten()]))[0, 1]
    assert correlation.abs() < 0.1


def test_a_start_that_is_given_comes_before_init(vgg, pair):
    start = pair[0].flip(3)
    for init in ("content", "noise", "style"):
        image = paint(*pair, vgg, **AT_THE_START, init=init, start=start)
        torch.testing.assert_close(image, start, atol=1e-3, rtol=0)


@pytest.mark.filterwarnings("ignore:seed=:nst_helpers.SettingsWarning")
def test_noise_follows_the_seed(vgg, pair):
    def start(**settings):
        return paint(*pair, vgg, **AT_THE_START, **settings)

    for settings in ({"noise": 0.1}, {"init": "noise"}):
        assert torch.equal(start(**settings, seed=1), start(**settings, seed=1))
        assert not torch.equal(start(**settings, seed=1), start(**settings, seed=2))
    assert torch.equal(start(noise=0, seed=1), start(noise=0, seed=2))
    spread = (start(noise=0.1) - start(noise=0)).std().item()
    assert 0.05 < spread < 0.11  # the clamp to [0, 1] takes a little


@pytest.mark.parametrize("at_step", [1, 2, 5])
def test_an_interrupted_run_goes_on_from_its_latest_picture(monkeypatch, vgg, pair, at_step):
    """`start=` that picture"""
    with monkeypatch.context() as patch:
        change_features(patch, at_step, fail(KeyboardInterrupt()))
        steps = []
        with pytest.raises(KeyboardInterrupt):
            steps.extend(nst.stylize(*pair, TINY, network=vgg))
    assert len(steps) == at_step - 1
    result = steps[-1].image if steps else pair[0]
    assert result.min() >= 0
    assert result.max() <= 1
    further = last(nst.stylize(*pair, TINY, network=vgg, start=result))
    assert further.number == TINY.num_steps
    assert further.image.shape == pair[0].shape


def test_going_on_gets_further(vgg, pair):
    photo, painting = pair
    config = replace(TINY, num_steps=12)
    for step in nst.stylize(*pair, config, network=vgg):
        if step.number == 4:
            break
    assert step.image.shape[2] < photo.shape[2]
    before = nst.resize(step.image, photo.shape[2:])
    image = paint(*pair, vgg, num_steps=12, start=step.image)
    assert style_loss(image, painting, vgg) < style_loss(before, painting, vgg)


# Optimizers ---------------------------------------------------------------------------------------


@pytest.mark.slow
@OPTIMIZERS
@pytest.mark.parametrize("scales", [1, 2])
@PAIRS
def test_the_loss_goes_down_at_each_scale(vgg, pictures, photo, painting, scales, optimizer):
    content = nst.shrink_to(pictures[photo], 64)
    style = nst.shrink_to(pictures[painting], 64)
    num_steps = {1: 24, 2: 80}[scales]  # of 80, 10 are taken at the finer scale
    settings = {"scales": scales, "num_steps": num_steps, "learning_rate": 0.02}
    config = replace(TINY, optimizer=optimizer, **settings)
    totals: dict[torch.Size, list[float]] = {}
    for step in nst.stylize(content, style, config, network=vgg):
        totals.setdefault(step.image.shape, []).append(step.losses["total"].item())
    assert len(totals) == scales
    for of_scale in totals.values():
        assert of_scale[-1] < of_scale[0] / 2
        assert max(of_scale) == of_scale[0]


@OPTIMIZERS
@pytest.mark.parametrize("learning_rate", [0.005, 0.05])
def test_the_first_step_is_as_long_as_the_learning_rate_says(vgg, pair, optimizer, learning_rate):
    settings = {"color": "content", "scales": 1, "learning_rate": learning_rate}
    config = replace(TINY, optimizer=optimizer, **settings)
    step = next(nst.stylize(*pair, config, network=vgg))
    length = mean_change(step.image, pair[0])
    expected = learning_rate * (nst.FIRST_MOVE if optimizer == "lbfgs" else 1)
    assert 0.3 * expected < length < 2 * expected


def test_the_optimizers_differ(vgg, pair):
    images = [paint(*pair, vgg, optimizer=optimizer) for optimizer in ("adam", "lbfgs")]
    assert mean_change(*images) > 1e-3


# Brush size ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:style_scale=:nst_helpers.SettingsWarning")
@pytest.mark.parametrize(("style_scale", "expected"), [(1, 48), (0.5, 24), (2, 96), (9, 120)])
@pytest.mark.parametrize(("quality", "factor"), [("quick", 1), ("normal", 1.25), ("best", 1.5)])
def test_a_painting_is_seen_at_the_size_asked_for_and_never_enlarged_more_than_the_picture(
    monkeypatch, vgg, pair, style_scale, expected, quality, factor
):
    long_sides = []
    forward = nst.VGG19Features.forward

    def note(self, image, *args, **kwargs):
        height, width = image.shape[2:]
        if height > width:  # the photo is wide, the painting is tall
            long_sides.append(height)
        return forward(self, image, *args, **kwargs)

    monkeypatch.setattr(nst.VGG19Features, "forward", note)
    settings = {"style_scale": style_scale, "quality": quality, "scales": 2, "num_steps": 2}
    paint(pair[0], torch.rand(1, 3, 120, 90), vgg, **settings)
    assert max(long_sides) == expected * factor


# Supersampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quality", "factor"), [("normal", 1.25), ("best", 1.5)])
def test_a_larger_picture_is_painted_than_is_shown(monkeypatch, vgg, pair, quality, factor):
    widths = note_widths_of_canvases(monkeypatch)
    config = replace(TINY, quality=quality, num_steps=22)
    steps = list(nst.stylize(*pair, config, network=vgg))
    size = pair[0].shape[2:]
    large = tuple(round(factor * side) for side in size)
    coarse = tuple(round(side / 2) for side in large)
    assert widths == [coarse[1]] * 20 + [large[1]] * 2
    assert [step.image.shape[2:] for step in steps] == [coarse] * 20 + [size] * 2


@pytest.mark.parametrize("quality", nst.QUALITIES)
def test_the_textbook_loop_paints_at_the_size_that_it_shows(monkeypatch, vgg, pair, quality):
    widths = note_widths_of_canvases(monkeypatch)
    paint(*pair, vgg, quality=quality, scales=1)
    assert set(widths) == {pair[0].shape[3]}


def test_only_a_picture_larger_than_the_result_has_its_first_block_in_strips(
    monkeypatch, vgg, pair
):
    """So that supersampling takes no more memory than it must."""
    seen = set()
    forward = nst.VGG19Features.forward

    def note(self, image, *args, blocks_in_strips=0, **kwargs):
        if image.requires_grad:
            seen.add((image.shape[3] > pair[0].shape[3] + 2 * nst.MARGIN, blocks_in_strips))
        return forward(self, image, *args, blocks_in_strips=blocks_in_strips, **kwargs)

    monkeypatch.setattr(nst.VGG19Features, "forward", note)
    paint(*pair, vgg, quality="normal", checkpoint=False)
    assert seen == {(False, 0), (True, 1)}


def note_widths_of_canvases(monkeypatch) -> list[int]:
    """A list that every step adds to: how wide the picture is that it looks at."""
    widths = []
    take_step = nst.take_step

    def note(canvas, *args):
        widths.append(canvas.shape[3] - 2 * nst.MARGIN)
        return take_step(canvas, *args)

    monkeypatch.setattr(nst, "take_step", note)
    return widths


@pytest.mark.parametrize(("long_side", "expected"), [(64, 96), (40, 60), (80, 96), (200, 200)])
def test_a_painting_is_enlarged_with_the_picture_and_no_further(long_side, expected):
    """So that its strokes come out as large as without supersampling."""
    style = torch.rand(1, 3, long_side // 2, long_side)
    best = replace(TINY, quality="best")
    assert nst.enlarge_for_supersampling(style, (43, 64), best).shape[3] == expected
    assert nst.enlarge_for_supersampling(style, (43, 64), TINY) is style
    large_strokes = replace(best, style_scale=2)
    wanted = max(long_side, 1.5 * min(long_side, 128))
    assert nst.enlarge_for_supersampling(style, (43, 64), large_strokes).shape[3] == wanted


def test_a_supersampled_picture_records_what_gives_it_again(vgg, pair, tmp_path):
    step = last(nst.stylize(*pair, replace(TINY, quality="normal"), network=vgg))
    again = nst.settings_from_png(nst.save_image(step, tmp_path))
    assert again.max_size == TINY.max_size
    assert torch.equal(last(nst.stylize(*pair, again, network=vgg)).image, step.image)


def test_supersampling_out_of_memory_ends_at_the_full_size_if_that_fits(monkeypatch, vgg, pair):
    photo = pair[0]
    width = round(1.5 * photo.shape[3])
    run_out_of_memory(monkeypatch, MemoryError(), range(width, 10**6), even_in_strips=True)
    config = replace(TINY, quality="best", checkpoint=True)
    with pytest.warns(nst.RecoveryWarning, match=f"{photo.shape[3]} x {photo.shape[2]}"):
        step = last(nst.stylize(*pair, config, network=vgg))
    assert step.image.shape == photo.shape


# What is shown: luminance and keep ----------------------------------------------------------------


def chroma(image: torch.Tensor) -> torch.Tensor:
    return image - nst.painted_channels(image, "luminance")


@OPTIMIZERS
@pytest.mark.parametrize("photo", ["china", "chelsea"])
@pytest.mark.parametrize("quality", ["quick", "normal"])
def test_luminance_leaves_the_chroma_untouched_and_paints_the_rest(
    vgg, pictures, photo, optimizer, quality
):
    content = nst.shrink_to(pictures[photo], 48)
    settings = {"color": "luminance", "optimizer": optimizer, "quality": quality}
    image = paint(content, pictures["starry_night"], vgg, **settings)
    torch.testing.assert_close(chroma(image), chroma(content), atol=1e-6, rtol=0)
    assert image.min() >= 0
    assert image.max() <= 1
    assert mean_change(image, content) > 0.01


@pytest.mark.parametrize("color", ["style", "content", "luminance"])
@pytest.mark.parametrize("quality", ["quick", "normal"])
def test_a_kept_part_is_the_photo_bit_for_bit_and_the_rest_as_without(vgg, pair, color, quality):
    photo = pair[0]
    keep = half_mask(photo.shape[2:])
    kept = paint(*pair, vgg, keep=keep, color=color, quality=quality)
    free = paint(*pair, vgg, color=color, quality=quality)
    assert torch.equal(kept[keep == 1], photo[keep == 1])
    assert torch.equal(kept[keep == 0], free[keep == 0])
    assert mean_change(free[keep == 0], photo[keep == 0]) > 0.01


def test_what_is_kept_may_have_another_size_and_soft_edges(vgg, pair):
    photo = pair[0]
    large = paint(*pair, vgg, num_steps=2, keep=half_mask((86, 128)))
    assert torch.equal(large[..., :23], photo[..., :23])
    grey = paint(*pair, vgg, num_steps=2, keep=torch.full_like(photo, 0.5))
    expected = (photo + paint(*pair, vgg, num_steps=2)) / 2
    torch.testing.assert_close(grey, expected, atol=1e-6, rtol=0)


# Losses that are no numbers -----------------------------------------------------------------------


def spoil(layer: str, value: float):
    return lambda features: {**features, layer: features[layer] * value}


class SpoilGradient(torch.autograd.Function):
    """Passes numbers on as they are, and makes their gradient NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan


class FailGradient(SpoilGradient):
    """Passes numbers on as they are, and has no memory left for their gradient."""

    @staticmethod
    def backward(ctx, grad):
        raise MemoryError


def spoil_gradients(how: type[torch.autograd.Function]):
    return lambda features: {layer: how.apply(found) for layer, found in features.items()}


@pytest.mark.parametrize(
    ("layer", "value"),
    [("relu3_1", torch.nan), ("relu4_2", torch.inf), ("relu1_1", torch.nan)],
)
def test_a_loss_that_is_no_number(monkeypatch, pair, layer, value):
    """A loss is NaN or infinite"""
    half = nst.VGG19Features(weights="bundled", dtype=torch.bfloat16)
    change_features(monkeypatch, 4, spoil(layer, value))
    types = []
    forward = nst.VGG19Features.forward

    def note(self, *args, **kwargs):
        types.append(self.dtype)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(nst.VGG19Features, "forward", note)
    with pytest.warns(nst.RecoveryWarning) as told:
        steps = list(nst.stylize(*pair, replace(TINY, scales=1), network=half))
    (warning,) = told
    text = str(warning.message)
    for part in ("step 4", "bfloat16", layer, "float32", "step 3"):
        assert part in text.lower()
    assert warning.filename == __file__
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6]
    assert all(step.image.isfinite().all() for step in steps)
    assert steps[2].record["notes"] == []
    assert steps[3].record["notes"] == [text]
    # It goes on from the picture that there was, in float32; the caller's network stays as it was.
    first_move = mean_change(steps[1].image, steps[0].image)
    assert mean_change(steps[3].image, steps[2].image) < 3 * first_move
    assert types[0] == torch.bfloat16
    assert types[-1] == torch.float32
    assert half.dtype == torch.bfloat16


def test_a_gradient_that_is_no_number_counts_too(monkeypatch, vgg, pair):
    change_features(monkeypatch, 2, spoil_gradients(SpoilGradient))
    with pytest.raises(FloatingPointError) as error:
        last(nst.stylize(*pair, TINY, network=vgg))
    assert "step 2" in str(error.value).lower()
    assert "gradient" in str(error.value)


def test_a_loss_that_is_no_number_in_float32(monkeypatch, vgg, pair):
    """The same, in float32 already"""
    change_features(monkeypatch, 4, spoil("relu2_1", torch.nan))
    steps = []
    with pytest.raises(FloatingPointError) as error:
        steps.extend(nst.stylize(*pair, TINY, network=vgg))
    assert [step.number for step in steps] == [1, 2, 3]
    for part in ("step 4", "float32", "relu2_1", "step 3", "learning_rate"):
        assert part in str(error.value).lower()


# Memory that runs out -----------------------------------------------------------------------------

OUT_OF_MEMORY = {
    "Python": MemoryError(),
    "CUDA": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "MPS": RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)."),
    "Linux": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    "Windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried 9 bytes"),
    "oneDNN": RuntimeError("could not create a primitive"),
}


def run_out_of_memory(
    monkeypatch, error, widths=range(10**6), even_in_strips=False, in_steps=True
) -> None:
    """Let looks at pictures of some ``widths`` run out: in the steps, or before them."""
    forward = nst.VGG19Features.forward

    def fail_sometimes(self, image, *args, blocks_in_strips=0, **kwargs):
        width = image.shape[3] - 2 * nst.MARGIN
        is_short = even_in_strips or blocks_in_strips < nst.ALL_BLOCKS
        if is_short and width in widths and image.requires_grad == in_steps:
            raise error
        return forward(self, image, *args, blocks_in_strips=blocks_in_strips, **kwargs)

    monkeypatch.setattr(nst.VGG19Features, "forward", fail_sometimes)


def widths_of_scales(photo: torch.Tensor, config: nst.StyleTransferConfig) -> list[int]:
    return [scale.size[1] for scale in nst.plan_scales(photo.shape[2:], config.num_steps, config)]


def test_memory_that_runs_out(monkeypatch, vgg, pair):
    """Memory runs out"""
    change_features(monkeypatch, 4, spoil_gradients(FailGradient))
    with pytest.warns(nst.RecoveryWarning) as told:
        steps = list(nst.stylize(*pair, replace(TINY, scales=1), network=vgg))
    (warning,) = told
    height, width = pair[0].shape[2:]
    assert f"{width} x {height}" in str(warning.message)
    assert "checkpoints" in str(warning.message)
    # No step is lost, and it goes on from the picture that there was.
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6]
    first_move = mean_change(steps[1].image, steps[0].image)
    assert mean_change(steps[3].image, steps[2].image) < 3 * first_move
    # The record tells that some steps were painted with checkpoints, some without.
    assert [step.record["settings"]["checkpoint"] for step in steps[2:4]] == [False, "auto"]
    assert [step.record["notes"] for step in steps[2:4]] == [[], [str(warning.message)]]


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_each_platforms_words_for_it_are_known(monkeypatch, vgg, pair, error):
    run_out_of_memory(monkeypatch, error)
    with pytest.warns(nst.RecoveryWarning, match="checkpoints"):
        step = last(nst.stylize(*pair, replace(TINY, scales=1, num_steps=2), network=vgg))
    assert step.number == 2


@pytest.mark.parametrize("in_steps", [True, False])
@pytest.mark.parametrize("scale", [0, 1, 2])
def test_checkpoints_take_over_at_any_scale(monkeypatch, vgg, pictures, pair, scale, in_steps):
    photo = nst.shrink_to(pictures["china"], 96)
    config = replace(TINY, scales=3, num_steps=6)
    width = widths_of_scales(photo, config)[scale]
    run_out_of_memory(monkeypatch, MemoryError(), [width], in_steps=in_steps)
    with pytest.warns(nst.RecoveryWarning) as told:
        steps = list(nst.stylize(photo, pair[1], config, network=vgg))
    (warning,) = told
    assert f"{width} x" in str(warning.message)
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1].image.shape == photo.shape


@pytest.mark.parametrize(("scale", "checkpoint"), [(0, "auto"), (2, "auto"), (2, True)])
def test_where_even_checkpoints_do_not_fit_the_picture_ends_smaller(
    monkeypatch, vgg, pair, pictures, scale, checkpoint
):
    photo = nst.resize(pictures["china"], (96, 144))
    config = replace(TINY, scales=3, num_steps=6, checkpoint=checkpoint)
    width = widths_of_scales(photo, config)[scale]
    run_out_of_memory(monkeypatch, MemoryError(), range(width, 10**6), even_in_strips=True)
    keep = half_mask(photo.shape[2:])
    with pytest.warns(nst.RecoveryWarning) as told:
        steps = list(nst.stylize(photo, pair[1], config, network=vgg, keep=keep))
    image = steps[-1].image
    texts = [str(warning.message) for warning in told]
    assert f"{image.shape[3]} x {image.shape[2]}" in texts[-1]
    assert len(texts) == (1 if checkpoint is True else 2)
    assert steps[-1].record["notes"] == texts
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1].progress == pytest.approx(1, abs=1e-9)
    assert 0.5 * width < image.shape[3] < width
    small_photo = nst.resize(photo, image.shape[2:])
    kept = slice(None, image.shape[3] // 2 - 1)
    assert torch.equal(image[..., kept], small_photo[..., kept])
    assert mean_change(image, small_photo) > 0.005


def test_what_the_failed_step_held_is_free_before_the_run_goes_on(monkeypatch, vgg, pair):
    """An error holds the frames that it passed through, and they hold the step's tensors."""
    held = []
    was_free = []
    forward = nst.VGG19Features.forward

    def note(self, image, *args, blocks_in_strips=0, **kwargs):
        if image.requires_grad and blocks_in_strips < nst.ALL_BLOCKS:
            features = torch.zeros(10)
            held.append(weakref.ref(features))
            raise MemoryError
        was_free.extend(reference() is None for reference in held)
        return forward(self, image, *args, blocks_in_strips=blocks_in_strips, **kwargs)

    monkeypatch.setattr(nst.VGG19Features, "forward", note)
    with pytest.warns(nst.RecoveryWarning):
        next(nst.stylize(*pair, TINY, network=vgg))
    assert was_free
    assert all(was_free)


def test_memory_too_short_for_any_size_is_said(monkeypatch, vgg, pair):
    run_out_of_memory(monkeypatch, MemoryError(), even_in_strips=True)
    with pytest.warns(nst.RecoveryWarning), pytest.raises(MemoryError) as error:
        last(nst.stylize(*pair, TINY, network=vgg))
    assert "pixels" in str(error.value)


def test_any_other_error_is_not_taken_for_memory(monkeypatch, vgg, pair):
    run_out_of_memory(monkeypatch, RuntimeError("something else"), even_in_strips=True)
    with pytest.raises(RuntimeError, match="something else"):
        last(nst.stylize(*pair, TINY, network=vgg))


# Two runs at a time -------------------------------------------------------------------------------

FIRST = replace(TINY, optimizer="adam", color="luminance", noise=0.1, num_steps=5)
SECOND = replace(TINY, optimizer="lbfgs", num_steps=3, scales=1, checkpoint=True)


def test_two_runs_that_are_interleaved_each_end_with_the_right_picture(vgg, pair):
    runs = []
    expected = []
    for config in (FIRST, SECOND):
        expected.append(last(nst.stylize(*pair, config, network=vgg)))
        runs.append(nst.stylize(*pair, config, network=vgg))
    latest = [None, None]
    for steps in zip_longest(*runs):
        latest = [new or old for new, old in zip(steps, latest, strict=True)]
    for step, right in zip(latest, expected, strict=True):
        assert step.number == right.number
        assert torch.equal(step.image, right.image)
        assert step.losses == right.losses
        assert step.record["settings"] == right.record["settings"]


def test_a_run_that_is_left_alone_does_not_hinder_another(vgg, pair):
    left = nst.stylize(*pair, FIRST, network=vgg)
    next(left)
    image = paint(*pair, vgg)
    left.close()
    assert torch.equal(paint(*pair, vgg), image)


def test_threads_take_turns_and_each_ends_with_the_right_picture(monkeypatch, vgg, pair):
    configs = {"first": FIRST, "second": SECOND}
    expected = {
        name: last(nst.stylize(*pair, config, network=vgg)).image
        for name, config in configs.items()
    }
    at_once = []
    inside = set()
    forward = nst.VGG19Features.forward

    def note(self, image, *args, **kwargs):
        if not image.requires_grad:
            return forward(self, image, *args, **kwargs)
        inside.add(threading.get_ident())
        at_once.append(len(inside))
        try:
            return forward(self, image, *args, **kwargs)
        finally:
            inside.discard(threading.get_ident())

    monkeypatch.setattr(nst.VGG19Features, "forward", note)
    found = {}
    both_ready = threading.Barrier(2)

    def run(name):
        both_ready.wait()
        found[name] = last(nst.stylize(*pair, configs[name], network=vgg)).image

    threads = [threading.Thread(target=run, args=(name,)) for name in configs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(at_once) == {1}
    for name, image in expected.items():
        assert torch.equal(found[name], image)
