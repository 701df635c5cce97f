"""The method: the plan of scales, starts, palettes, optimizers, steps, and what is refused."""

import itertools
import math
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import (
    SHALLOW,
    TINY,
    assert_close,
    content_loss,
    mean_change,
    note_looks,
    paint,
    style_loss,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import nst_helpers as nst

# Steps too small to see, so that the result is the start; with the photo's palette unchanged.
STANDING_STILL = {"learning_rate": 1e-7, "color": "content"}
AT_THE_START = {**STANDING_STILL, "num_steps": 1, "scales": 1}
GREY = torch.full((1, 3, 32, 48), 0.5)


@pytest.mark.parametrize(
    ("settings", "widths", "steps"),
    [
        ({"quality": "quick"}, [128, 256, 512], [40, 8, 4]),
        ({"quality": "normal"}, [160, 320, 640], [76, 16, 8]),
        ({"quality": "best"}, [96, 192, 384, 768, 768], [66, 14, 41, 28, 7]),
        ({"num_steps": 101}, [160, 320, 640], [76, 17, 8]),
        ({"num_steps": 120}, [160, 320, 640, 640], [76, 26, 10, 8]),
        ({"scales": 1}, [512], [100]),
    ],
)
def test_a_small_size_has_most_of_the_steps(settings, widths, steps):
    plan = nst.plan_scales((342, 512), nst.StyleTransferConfig(**settings))
    assert [scale.size[1] for scale in plan] == widths
    assert [scale.steps for scale in plan] == steps


@given(
    size=st.tuples(st.integers(16, 2000), st.integers(16, 2000)),
    num_steps=st.integers(1, 300),
    scales=st.just("auto") | st.integers(1, 9),
    quality=st.sampled_from(["quick", "normal", "best"]),
    optimizer=st.sampled_from(["lbfgs", "adam"]),
)
def test_a_plan_takes_all_steps_and_ends_at_the_finest_size(size, num_steps, **settings):
    config = nst.StyleTransferConfig(num_steps=num_steps, **settings)
    plan = nst.plan_scales(size, config)
    assert sum(scale.steps for scale in plan) == num_steps
    assert plan[-1].size == tuple(round(side * config.supersampling) for side in size)
    for scale in plan:
        finer_scales = round(math.log2(max(plan[-1].size) / max(scale.size)))
        for side, finest in zip(scale.size, plan[-1].size, strict=True):
            assert side == pytest.approx(finest / 2**finer_scales, abs=0.5)
        assert scale.lr == pytest.approx(config.learning_rate * (1 + 0.8 * finer_scales))
        assert scale.steps >= 1
        assert min(scale.size) >= 16
        is_finest = scale is plan[-1] and scale.size != plan[0].size
        # Adam gets nowhere without deep layers.
        assert scale.is_shallow == (is_finest and config.optimizer == "lbfgs")


def test_auto_quality_plans_what_a_run_takes(monkeypatch):
    config = nst.StyleTransferConfig()
    for is_available, auto in ((True, "best"), (False, "normal")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=is_available: found)
        for device, quality in (("auto", auto), ("cpu", "normal"), ("cuda:1", "best")):
            expected = nst.plan_scales((342, 512), replace(config, quality=quality))
            assert nst.plan_scales((342, 512), replace(config, device=device)) == expected


CONTENT = ("relu2_2", "relu4_2")


@pytest.fixture(scope="module")
def two_contents():
    return nst.load_network(replace(TINY, content_layers=CONTENT))


@pytest.mark.parametrize(
    ("content_layers", "weights", "content", "style"),
    [
        (("relu4_2",), (1, 2, 3, 4), ["relu3_1"], {"relu1_1": 1, "relu2_1": 2, "relu3_1": 3}),
        (CONTENT, (0, 2, 0, 4), ["relu2_2"], {"relu2_1": 2}),
        (("relu4_2",), (0, 0, 0, 4), ["relu3_1"], {"relu4_1": 4}),
    ],
)
def test_the_finest_scale_leaves_deep_layers_out(
    monkeypatch, two_contents, pair, content_layers, weights, content, style
):
    looks = note_looks(monkeypatch)
    config = replace(TINY, content_layers=content_layers, style_layer_weights=weights)
    *_, step = nst.stylize(*pair, config, network=two_contents)
    coarse = next(look for look in looks if look.is_canvas)
    assert list(coarse.content_layers) == list(content_layers)
    assert list(coarse.style_layers) == list(config.style_layers)
    painting, canvas = looks[-2:]
    assert (list(canvas.content_layers), list(canvas.style_layers)) == (content, list(style))
    seen, target = (two_contents.look(look.image, (), style)[1] for look in (canvas, painting))
    expected = nst.calculate_style_loss(seen, target, list(style.values()))
    assert step.losses["style"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_no_scale_is_smaller_than_the_picture_to_go_on_from():
    expected = {256: [128], 128: [128], 90: [128], 64: [64, 128], 45: [64, 128], 32: [32, 64, 128]}
    for width, widths in expected.items():
        start = torch.rand(1, 3, width * 2 // 3, width)
        plan = nst.plan_scales((85, 128), replace(TINY, scales=3), start)
        assert [scale.size[1] for scale in plan] == widths


def test_a_canvas_larger_than_the_result_is_shrunk(shallow, pair):
    config = replace(SHALLOW, quality="best", num_steps=22)
    steps = list(nst.stylize(*pair, config, network=shallow))
    assert [step.picture.shape[3] for step in steps] == [48] * 20 + [96] * 2
    assert [step.image.shape[3] for step in steps] == [48] * 20 + [64] * 2
    assert torch.equal(steps[-1].image, nst.resize(steps[-1].picture, pair[0].shape[2:]))


def test_a_run_starts_from_the_start_it_is_given_or_what_init_names(shallow, pair):
    photo, painting = pair
    assert_close(paint(*pair, shallow, **AT_THE_START, init="content"), photo, 1e-4)
    stretched = nst.resize(painting, photo.shape[2:])
    from_style = paint(*pair, shallow, **{**AT_THE_START, "color": "style"}, init="style")
    assert_close(from_style, stretched, 1e-4)
    start = photo.flip(3)
    for init in ("content", "noise", "style"):
        assert_close(paint(*pair, shallow, **AT_THE_START, init=init, start=start), start, 1e-4)


@pytest.mark.parametrize(("settings", "spread"), [({"noise": 0.1}, 0.1), ({"init": "noise"}, 0.24)])
def test_noise_depends_on_the_seed_alone(shallow, settings, spread):
    images = []
    for seed, global_seed in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(global_seed)
        images.append(paint(GREY, GREY, shallow, **AT_THE_START, **settings, seed=seed))
    assert torch.equal(images[0], images[1])
    assert mean_change(images[0], images[2]) > spread / 2
    for image in images:
        assert image.mean() == pytest.approx(0.5, abs=0.01)
        assert image.std() == pytest.approx(spread, rel=0.05)  # of 1/4, the clamp takes some


def test_the_photos_edges_come_back_at_the_size_that_shows_them(shallow):
    photo = torch.full((1, 3, 48, 64), 0.3)
    photo[..., 25:] = 0.7
    photo[:, :, ::2, 40:] += 0.004  # hardly visible ripples
    result = partial(paint, photo, photo, shallow, **STANDING_STILL, num_steps=9)
    without, half, full = (result(detail=detail) for detail in (0, 0.5, 1))
    assert mean_change(without, photo) > 0.005  # blurred
    assert mean_change(full, photo) < mean_change(without, photo) / 10
    assert mean_change(half, (without + full) / 2) < 1e-4
    assert full[..., 50:].std() < photo[..., 50:].std() / 2  # no ripples
    assert_close(result(content_weight=0, detail=1), without, 1e-4)


def test_an_edge_is_steep_and_stands_out():
    image = torch.full((1, 3, 60, 80), 0.5)
    image[:, :, ::2, :20] += 0.004  # hardly visible ripples
    image[..., 40:] = torch.linspace(0.9, 0.7, 40)  # an edge, and a gentle slope beside it
    edges, of_one_channel = map(nst._edges, (image, image[:, :1]))
    assert edges.shape == (1, 1, 60, 80)
    assert edges[..., :18].max() < 0.2
    assert edges[..., 26:34].max() < 1e-3
    assert edges[..., 38:42].min() > 0.9
    assert edges[..., 46:48].max() < 0.1  # the slope, too near the edge to stand out
    assert 0.2 < edges[..., 60].min() < edges[..., 60].max() < 0.5
    assert torch.equal(of_one_channel, edges)


def test_the_photo_gets_the_palette_of_its_paintings(shallow, pictures):
    photo, *styles = (pictures[name] for name in ("china", "starry_night", "stained_glass"))
    settings = {**AT_THE_START, "color": "style", "style_blend": (3, 1)}
    one, other = (nst.match_colors(photo, style).clamp(0, 1) for style in styles)
    assert_close(paint(photo, styles, shallow, **settings), 0.75 * one + 0.25 * other, 1e-4)


def test_darks_stay_as_dark_as_the_paintings_but_noise_is_not_amplified(shallow):
    """A nearly white sheet with one dark mark: its covariance alone would make the darks pale."""
    ramp = torch.linspace(0.1, 0.9, 48).expand(1, 3, 32, 48)
    sheet = torch.full((1, 3, 48, 48), 0.95)
    sheet[..., 20:28, 20:28] = 0.05  # 3 % of it
    by_covariance = nst.match_colors(ramp, sheet)
    result = paint(ramp, sheet, shallow, learning_rate=1e-7, num_steps=1, scales=1)
    assert by_covariance.min() > 0.5
    assert result[..., :3].mean() < by_covariance[..., :3].mean() - 0.25
    assert_close(result[..., 40:], by_covariance.clamp(0, 1)[..., 40:], 1e-3)  # lights stay
    flat = paint(GREY, sheet, shallow, learning_rate=1e-7, num_steps=1, scales=1)
    assert flat.std() < 0.01


# The balance --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def china(pictures):
    return nst.shrink_to(pictures["china"], 96)


@pytest.fixture(scope="module")
def sheet(china):
    """A white sheet with one dark mark: what a painting has once."""
    sheet = torch.full_like(china, 0.95)
    sheet[..., 20:40, 20:40] = 0.05
    return sheet


def first_step(photo, painting, network, **settings):
    config = replace(TINY, **{"num_steps": 60, "scales": "auto", **settings})
    return next(nst.stylize(photo, painting, config, network=network))


def test_the_photo_counts_more_where_the_painting_does_not_suit_it(vgg, china, sheet):
    suited, unsuited = (first_step(china, style, vgg) for style in (china.flip(3), sheet))
    assert 1 <= suited.job.balance < unsuited.job.balance / 2
    assert unsuited.job.balance <= 8
    losses = unsuited.losses
    total = 5 * unsuited.job.balance * losses["content"] + 100 * losses["style"]
    assert losses["total"].item() == pytest.approx((total + 2 * losses["tv"]).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "balance"),
    [
        ({"content_weight": 0}, 1),
        ({"style_weight": 0}, 1),
        ({"num_steps": 20}, 1),  # fewer than three trials would take
        ({"scales": 1}, 1),
        ({"balance": 2.5}, 2.5),
        ({"balance": 2.5, "scales": 1}, 2.5),
    ],
)
def test_without_a_need_for_a_balance_there_is_no_trial(
    monkeypatch, vgg, china, sheet, settings, balance
):
    looks = note_looks(monkeypatch)
    assert first_step(china, sheet, vgg, **settings).job.balance == balance
    assert sum(look.is_canvas for look in looks) == 1


def test_quick_at_256_pixels_has_the_trial_too():
    """There people try settings, so it must show what a larger picture will be."""
    plan = nst.plan_scales((171, 256), nst.StyleTransferConfig(quality="quick"))
    trial = 11 * (107 + 8) * (160 + 8)
    assert trial < sum(scale.work for scale in plan) / 3


# Optimizers ---------------------------------------------------------------------------------------

WIDE = (-100.0, 100.0)  # limits that no pixel reaches
CURVATURES = torch.tensor([1.0, 3.0, 9.0]).repeat(16).view(1, 3, 4, 4)
lbfgs = partial(nst._LBFGS, limits=WIDE, history_dtype=torch.float32)
adam = partial(nst._Adam, limits=WIDE, steps=20)


def minimise(optimizer, curvatures, steps):
    """The canvas before and after each step on the quadratic Σ c x² / 2, whose minimum is at 0."""
    canvases = [optimizer.canvas.detach().clone()]
    for _ in range(steps):
        optimizer.step(optimizer.canvas.detach() * curvatures)
        canvases.append(optimizer.canvas.detach().clone())
    return canvases


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-3)])
def test_lbfgs_finds_the_minimum_of_a_quadratic_with_three_curvatures(dtype, largest):
    """Four pairs tell it the three curvatures, so it steps straight to the minimum."""
    optimizer = lbfgs(torch.ones(1, 3, 4, 4), 0.3, history_dtype=dtype)
    *_, canvas = minimise(optimizer, CURVATURES, 20)
    assert canvas.abs().max() < largest
    *_, of_adam = minimise(adam(torch.ones(1, 3, 4, 4), 0.3), CURVATURES, 20)
    assert of_adam.abs().max() > largest


def test_lbfgs_limits_its_steps_and_keeps_four_with_how_they_changed_the_gradient():
    optimizer = lbfgs(torch.ones(1, 3, 4, 4), 0.02)
    canvases = minimise(optimizer, CURVATURES, 9)
    moves = [after - before for before, after in itertools.pairwise(canvases)]
    lengths = [move.abs().mean().item() for move in moves]
    assert lengths[0] == pytest.approx(0.2 * 0.02, rel=1e-4)
    assert max(lengths) == pytest.approx(1.5 * 0.02, rel=1e-4)
    for (s, y, rho), move in zip(optimizer.pairs, moves[-5:-1], strict=True):
        assert_close(s, move, 1e-6)
        assert_close(y, CURVATURES * move, 1e-5)
        assert rho.item() == pytest.approx(1 / (s * y).sum().item(), rel=1e-4)


def test_the_direction_of_lbfgs_is_minus_the_inverse_hessian_of_bfgs_times_the_gradient():
    """As equation 6.17 of Nocedal and Wright makes that matrix of the pairs."""
    optimizer = lbfgs(torch.randn(1, 3, 2, 2), 0.5)
    minimise(optimizer, torch.rand(1, 3, 2, 2) + 0.1, 4)
    inverse_hessian = optimizer.gamma * torch.eye(12)
    for s, y, rho in optimizer.pairs:
        project = torch.eye(12) - rho * torch.outer(s.flatten(), y.flatten())
        inverse_hessian = project @ inverse_hessian @ project.T
        inverse_hessian += rho * torch.outer(s.flatten(), s.flatten())
    assert len(optimizer.pairs) == 3
    s, y, _ = optimizer.pairs[-1]
    assert optimizer.gamma.item() == pytest.approx(((s * y).sum() / (y * y).sum()).item())
    gradient = torch.randn(1, 3, 2, 2)
    expected = -inverse_hessian @ gradient.flatten()
    torch.testing.assert_close(optimizer._direction(gradient).flatten(), expected)


def test_lbfgs_ignores_a_pair_without_curvature():
    optimizer = lbfgs(torch.zeros(1, 3, 4, 4), 0.1)
    for number in (1, 2, 3):
        optimizer.step(torch.ones(1, 3, 4, 4))
        assert_close(optimizer.canvas, torch.full((1, 3, 4, 4), -0.02 * number), 1e-6)


def test_lbfgs_measures_its_step_after_the_clamp():
    optimizer = lbfgs(torch.full((1, 1, 1, 2), 0.9), 2.5, limits=(0.0, 1.0))
    optimizer.step(torch.tensor([[[[-1.0, 1.0]]]]))
    optimizer.step(torch.tensor([[[[-0.5, 0.5]]]]))
    ((s, y, _),) = optimizer.pairs
    assert_close(s, torch.tensor([[[[0.1, -0.5]]]]), 1e-6)
    assert_close(y, torch.tensor([[[[0.5, -0.5]]]]), 1e-6)


def test_the_first_step_of_adam_has_a_closed_form():
    gradient = torch.tensor([[[[3.0, -4.0, 1e-4, 0.0]]]])
    optimizer = adam(torch.zeros(1, 1, 1, 4), 0.1)
    optimizer.step(gradient)
    root_mean_square = gradient.square().mean().sqrt()
    expected = -0.1 * gradient.sign() * (gradient.abs() / root_mean_square).sqrt()
    assert_close(optimizer.canvas, expected, 1e-6)
    assert_close(optimizer.image, expected, 1e-6)


def test_adam_averages_gradients_slows_down_along_a_cosine_and_shows_an_average():
    optimizer = adam(torch.zeros(1, 1, 1, 3), 0.1, steps=8)
    mean = square = canvas = average = torch.zeros(1, 1, 1, 3)
    for number in range(8):
        gradient = torch.randn(1, 1, 1, 3)
        optimizer.step(gradient)
        mean = 0.7 * mean + 0.3 * gradient
        square = 0.9 * square + 0.1 * gradient**2
        variance = square / (1 - 0.9 ** (number + 1))
        lr = 0.1 * (0.05 + 0.95 * (1 + math.cos(math.pi * number / 8)) / 2)
        move = mean / (1 - 0.7 ** (number + 1)) / (variance * variance.mean()) ** 0.25
        canvas = canvas - lr * move
        average = (average + canvas) / 2
        assert_close(optimizer.canvas, canvas, 1e-5)
        assert_close(optimizer.image, average / (1 - 0.5 ** (number + 1)), 1e-5)


@pytest.mark.parametrize("make", [lbfgs, adam])
def test_pixels_stay_within_their_limits_and_no_gradient_moves_none(make):
    lower, upper = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.5)
    upper[..., 0] = 1
    optimizer = make(torch.full((1, 3, 4, 4), 0.4), 9.0, limits=(lower, upper))
    optimizer.step(torch.zeros(1, 3, 4, 4))
    assert torch.equal(optimizer.canvas, torch.full((1, 3, 4, 4), 0.4))
    optimizer.step(-torch.ones(1, 3, 4, 4))
    assert torch.equal(optimizer.canvas, upper)


# Steps --------------------------------------------------------------------------------------------


def test_steps_are_numbered_and_each_has_its_own_picture_losses_and_progress(shallow, pair):
    config = replace(SHALLOW, num_steps=13)
    steps, copies = [], []
    for step in nst.stylize(*pair, config, network=shallow):
        steps.append(step)
        copies.append((step.image.clone(), step.picture.clone()))
    pixels = [(step.picture.shape[2] + 8) * (step.picture.shape[3] + 8) for step in steps]
    for number, step in enumerate(steps, start=1):
        assert (step.number, step.total) == (number, 13)
        assert step.progress == pytest.approx(sum(pixels[:number]) / sum(pixels))
        assert set(step.losses) == {"content", "style", "tv", "total"}
        assert all(loss.shape == () and not loss.requires_grad for loss in step.losses.values())
    for step, copy in zip(steps, copies, strict=True):
        assert all(map(torch.equal, (step.image, step.picture), copy))  # not painted into later


def test_no_step_resizes_the_photo_where_nothing_of_it_is_shown(monkeypatch, shallow, pair):
    steps = nst.stylize(*pair, replace(SHALLOW, quality="normal", num_steps=13), network=shallow)
    next(steps)
    resize, sizes = nst.resize, []

    def noted(image, size):
        sizes.append(tuple(image.shape[2:]))
        return resize(image, size)

    monkeypatch.setattr(nst, "resize", noted)
    assert [next(steps).picture.shape[3] for _ in range(9)] == [40] * 9
    assert tuple(pair[0].shape[2:]) not in sizes


def test_gradients_do_not_vanish_in_a_large_picture(monkeypatch, shallow, pictures):
    """Each pixel's part in a mean is small: float16 would lose it."""
    grad, sizes = torch.autograd.grad, []

    def noted(*args):
        (gradient,) = grad(*args)
        sizes.append(gradient.abs().mean())
        return (gradient,)

    monkeypatch.setattr(torch.autograd, "grad", noted)
    for side in (32, 128):
        photo, style = (nst.shrink_to(pictures[name], side) for name in ("china", "starry_night"))
        paint(photo, style, shallow, scales=1, num_steps=1, init="noise")
    of_small, of_large = sizes
    assert of_large > of_small / 4  # there are 16 times as many pixels


@pytest.mark.parametrize(("style_scale", "long_side"), [(1, 64), (0.5, 32), (2, 120)])
@pytest.mark.parametrize(("quality", "factor"), [("quick", 1), ("normal", 1.25), ("best", 1.5)])
def test_a_painting_is_seen_at_its_scale_and_enlarged_only_with_the_canvas(
    monkeypatch, shallow, pair, style_scale, long_side, quality, factor
):
    looks = note_looks(monkeypatch)
    settings = {"style_scale": style_scale, "quality": quality, "num_steps": 1}
    paint(pair[0], torch.rand(1, 3, 120, 90), shallow, **settings)
    sizes = [look.image.shape[2:] for look in looks]
    seen = [height for height, width in sizes if height > width]  # the photo is not upright
    assert seen == [factor * long_side]


@pytest.mark.parametrize("color", ["style", "content", "luminance"])
def test_plain_pictures_and_those_of_any_size_are_painted(shallow, pair, color):
    photo, painting = pair
    strip = torch.rand(1, 3, 16, 200)
    pairs = [(GREY, painting), (photo, 0 * photo), (photo.mT, strip), (strip, photo), (GREY, GREY)]
    for content, style in pairs:
        image = paint(content, style, shallow, color=color)
        assert image.shape == content.shape
        assert image.isfinite().all()
    assert mean_change(image, GREY) < 0.06  # grey on grey


@pytest.mark.parametrize("shade", [0.0, 0.5, 1.0])
def test_a_painting_of_one_colour_is_painted_in_half_precision(pair, shade):
    """All that its covariance has is rounding, which is nothing to divide by."""
    config = replace(TINY, precision="bfloat16", scales=1)
    for step in nst.stylize(pair[0], torch.full_like(pair[1], shade), config):
        assert all(loss.isfinite() for loss in step.losses.values())
    assert step.job.notes == ()
    assert mean_change(step.image, torch.full_like(step.image, shade)) < 0.1


@pytest.mark.parametrize(
    ("optimizer", "names"),
    [("lbfgs", "china chelsea starry_night"), ("adam", "chelsea china stained_glass")],
)
def test_the_picture_gets_nearer_to_the_painting(vgg, pictures, optimizer, names):
    content, other, style = (nst.shrink_to(pictures[name], 64) for name in names.split())
    config = replace(TINY, num_steps=55, optimizer=optimizer)
    steps = list(nst.stylize(content, style, config, network=vgg))
    losses = [step.losses["total"].item() for step in steps]
    for of_scale in (losses[:50], losses[50:]):
        assert of_scale[-1] < 0.6 * of_scale[0]
        assert max(of_scale) == of_scale[0]
    # All in the painting's palette, so that a change of colours is no loss of content.
    other = nst.resize(other, content.shape[2:])
    recolored, unrelated = (nst.match_colors(x, style).clamp(0, 1) for x in (content, other))
    image = steps[-1].image
    assert style_loss(image, style, vgg) < style_loss(recolored, style, vgg) / 2
    assert content_loss(image, recolored, vgg) < content_loss(unrelated, recolored, vgg)


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_the_same_settings_give_the_same_picture_bit_for_bit(vgg, pair, optimizer):
    config = replace(TINY, optimizer=optimizer, noise=0.1)
    runs = [list(nst.stylize(*pair, config, network=vgg)) for _ in range(2)]
    for step, again in zip(*runs, strict=True):
        assert torch.equal(step.image, again.image)
        assert step.losses == again.losses


def test_a_run_changes_nothing_of_the_callers(shallow, pair):
    config = replace(SHALLOW, noise=0.1)
    given = [*pair, *shallow.state_dict().values(), torch.get_rng_state()]
    before = [tensor.clone() for tensor in given]
    for _ in nst.stylize(*pair, config, network=shallow, keep=pair[0], start=pair[0]):
        assert torch.is_grad_enabled()
    assert all(map(torch.equal, [*given[:-1], torch.get_rng_state()], before))
    assert config == replace(SHALLOW, noise=0.1)


def test_pictures_may_be_of_any_floating_point_type_and_need_gradients(shallow, pair):
    expected = paint(*pair, shallow, num_steps=3, color="luminance")
    for dtype in (torch.float16, torch.float64):
        content, style = (picture.to(dtype).requires_grad_() for picture in pair)
        keep = torch.zeros_like(content)
        image = paint(content, style, shallow, num_steps=3, keep=keep, color="luminance")
        assert (image.dtype, image.requires_grad) == (torch.float32, False)
        assert mean_change(image, expected) < 0.01


def test_a_run_needs_neither_a_network_nor_settings(vgg, shallow, pair):
    config = replace(SHALLOW, num_steps=1)
    assert torch.equal(next(nst.stylize(*pair, config)).image, paint(*pair, shallow, num_steps=1))
    assert next(nst.stylize(*pair, network=vgg)).total == 100


# What is refused before the first step ------------------------------------------------------------

MASK = torch.ones(1, 3, 32, 32)
NAN = MASK.clone()
NAN[0, 1, 20, 30] = torch.nan


@pytest.mark.parametrize("name", ["content", "styles", "masks", "keep", "start", "visible"])
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("images/china.jpg", "china.jpg"),
        (Image.new("RGB", (64, 48)), "Image"),
        (torch.rand(48, 64, 3).numpy(), "array"),
        (MASK[0], "(3, 32, 32)"),
        (MASK[:, :2], "(1, 2, 32, 32)"),
        (MASK[..., :15], "(1, 3, 32, 15)"),
        (255 * MASK, "255"),
        (MASK.byte(), "uint8"),
        (-0.5 * MASK, "-0.5"),
        (NAN, "nan"),
    ],
)
def test_a_bad_picture_is_refused(shallow, pair, name, value, shown):
    listed = [value] if name in ("styles", "masks", "visible") else value
    given = {"content": pair[0], "styles": pair[1], name: listed}
    with pytest.raises(ValueError, match=rf"^{name}.*{re.escape(shown)}"):
        nst.stylize(**given, config=SHALLOW, network=shallow)


class StyleTransferConfig:
    """As the module's own, from before it was reloaded."""


class VGG19Features:
    """As the module's own, from before it was reloaded."""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"content": None}, "content.*None"),
        ({"styles": None}, "styles.*None"),
        ({"styles": "images/china.jpg"}, "styles.*china.jpg"),
        ({"styles": []}, "styles"),
        ({"masks": [None]}, "masks.*None"),
        ({"masks": [MASK, MASK]}, "masks.*1.*2"),
        ({"config": {"num_steps": 3}}, "config.*{'num_steps': 3}"),
        ({"config": replace(SHALLOW, style_blend=(1.0, 2.0))}, r"style_blend.*1.*\(1.0, 2.0\)"),
        ({"config": replace(SHALLOW, content_layers=("relu3_2",))}, "network.*relu3_2"),
        ({"config": replace(SHALLOW, style_layers=("relu1_2",))}, "network.*relu1_2"),
        ({"config": replace(SHALLOW, pooling="average")}, "network.*average"),
        ({"network": "bundled"}, "network.*'bundled'"),
        ({"config": StyleTransferConfig()}, "config .*reloaded"),
        ({"network": VGG19Features()}, "network .*reloaded"),
    ],
)
def test_what_does_not_fit_is_refused(shallow, pair, wrong, message):
    given = {"content": pair[0], "styles": pair[1], "config": SHALLOW, "network": shallow}
    with pytest.raises(ValueError, match=f"^{message}"):
        nst.stylize(**{**given, **wrong})
