"""The loop paints: real pictures, the real network, small sizes."""

from dataclasses import replace

import pytest
import torch

import nst_helpers as nst

CONFIG = nst.StyleTransferConfig(weights="bundled", precision="float32", max_size=128)


def last(steps):
    *_, step = steps
    return step


def style_loss(image, style, vgg):
    grams = {x: nst.gram_matrix(f) for x, f in vgg(style, nst.STYLE_LAYERS).items()}
    return nst.calculate_style_loss(vgg(image), grams, CONFIG.style_layer_weights).item()


def content_loss(image, content, vgg):
    return nst.calculate_content_loss(vgg(image), vgg(content, nst.CONTENT_LAYERS)).item()


@pytest.mark.parametrize(
    ("photo", "painting", "other"), [("china", "starry_night", "chelsea"), ("chelsea", "stained_glass", "china")]
)
def test_the_style_comes_and_the_content_stays(vgg, pictures, photo, painting, other):
    content, style = pictures[photo], pictures[painting]
    result = last(nst.stylize(content, style, CONFIG, vgg)).image
    assert result.shape == content.shape and 0 <= result.min() and result.max() <= 1
    assert style_loss(result, style, vgg) * 10 < style_loss(content, style, vgg)
    unrelated = nst.resize(pictures[other], content.shape[2:])
    assert content_loss(result, content, vgg) < content_loss(unrelated, content, vgg)


def test_the_same_settings_give_the_same_picture_bit_for_bit(vgg, pictures):
    config = replace(CONFIG, num_steps=7, scales=2)
    runs = [nst.stylize(pictures["china"], pictures["starry_night"], config, vgg) for _ in range(2)]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one.image, other.image)
        assert one.losses == other.losses


def test_steps_are_numbered_and_each_holds_its_own_picture_and_losses(vgg, pictures):
    config = replace(CONFIG, num_steps=8, scales=2)
    steps = list(nst.stylize(pictures["chelsea"], pictures["starry_night"], config, vgg))
    assert [step.number for step in steps] == list(range(1, 9))
    heights = [step.image.shape[2] for step in steps]
    assert heights == sorted(heights) and len(set(heights)) == 2
    assert steps[-1].image.shape == pictures["chelsea"].shape
    assert not torch.equal(steps[-1].image, steps[-2].image)
    for step in steps:
        total = 30 * step.losses["style"]  # the weights by hand: the sum is the formula
        total += config.content_weight * step.losses["content"] + config.tv_weight * step.losses["tv"]
        torch.testing.assert_close(step.losses["total"], total)
        assert not step.losses["total"].requires_grad and not step.image.requires_grad


def test_one_scale_starts_as_a_copy_of_the_content(vgg, pictures):
    content = pictures["china"]
    before = content.clone()
    config = replace(CONFIG, num_steps=1, scales=1, learning_rate=1e-6)
    step = next(nst.stylize(content, pictures["starry_night"], config, vgg))
    assert step.losses["content"] == 0
    torch.testing.assert_close(step.image, before, atol=1e-5, rtol=0)
    assert torch.equal(content, before)


@pytest.mark.filterwarnings("ignore:seed=")
def test_noise_at_the_start_follows_the_seed(vgg, pictures):
    def start(**settings):
        config = replace(CONFIG, num_steps=1, scales=1, learning_rate=1e-6, **settings)
        return next(nst.stylize(pictures["china"], pictures["starry_night"], config, vgg)).image

    assert torch.equal(start(noise=0.1, seed=1), start(noise=0.1, seed=1))
    assert not torch.equal(start(noise=0.1, seed=1), start(noise=0.1, seed=2))
    assert torch.equal(start(noise=0.0, seed=1), start(noise=0.0, seed=2))
    spread = (start(noise=0.1) - start()).std().item()
    assert 0.05 < spread < 0.1  # the clamp to [0, 1] takes a little


def test_pixels_stay_in_range_under_a_wild_learning_rate(vgg, pictures):
    """Without the clamp the pixels would leave [0, 1] and the losses would be those of no picture."""
    config = replace(CONFIG, num_steps=6, scales=1, learning_rate=0.5)
    steps = list(nst.stylize(pictures["china"], pictures["stained_glass"], config, vgg))
    assert all(step.losses["tv"] <= 2 for step in steps)
    assert all(0 <= step.image.min() and step.image.max() <= 1 for step in steps)


def test_smaller_scales_take_larger_steps(monkeypatch, vgg, pictures):
    rates, adam = [], torch.optim.Adam

    def note(params, lr, *rest):
        rates.append(lr)
        return adam(params, lr, *rest)

    monkeypatch.setattr(torch.optim, "Adam", note)
    config = replace(CONFIG, num_steps=9, scales=3, learning_rate=0.01)
    last(nst.stylize(pictures["china"], pictures["starry_night"], config, vgg))
    assert rates == pytest.approx([0.026, 0.018, 0.01])


def test_content_and_style_may_have_any_sizes_and_shapes(vgg, pictures):
    tall = pictures["china"].mT.contiguous()
    strip = torch.rand(1, 3, 16, 70)
    config = replace(CONFIG, num_steps=2)
    assert last(nst.stylize(tall, strip, config, vgg)).image.shape == tall.shape
    assert last(nst.stylize(strip, tall, config, vgg)).image.shape == strip.shape


def test_a_style_smaller_than_the_content_is_not_enlarged(monkeypatch, vgg, pictures):
    sizes = []
    monkeypatch.setattr(nst, "resize", lambda image, size: sizes.append(tuple(size)) or image)
    nst.shrink_to(torch.rand(1, 3, 40, 60), 128)
    assert sizes == []
    nst.shrink_to(torch.rand(1, 3, 40, 60), 30)
    assert sizes == [(20, 30)]


@pytest.mark.parametrize("weight", ["content_weight", "style_weight", "tv_weight"])
def test_each_weight_pulls_the_way_it_says(vgg, pictures, weight):
    content, style = (nst.shrink_to(pictures[name], 64) for name in ("china", "starry_night"))

    def loss(factor):
        value = getattr(CONFIG, weight) * factor
        config = replace(CONFIG, num_steps=25, scales=1, **{weight: value})
        image = last(nst.stylize(content, style, config, vgg)).image
        if weight == "tv_weight":
            return nst.total_variation_loss(image).item()
        if weight == "content_weight":
            return content_loss(image, content, vgg)
        return style_loss(image, style, vgg)

    assert loss(20) < loss(1 / 20)


def test_the_photos_fine_detail_comes_in_with_the_size_that_shows_it(vgg, pictures):
    """With steps too small to see, what comes out is the photo: no scale leaves it blurred."""
    config = replace(CONFIG, num_steps=9, scales=3, learning_rate=1e-6)
    image = last(nst.stylize(pictures["china"], pictures["starry_night"], config, vgg)).image
    assert (image - pictures["china"]).abs().mean() < 2e-3


# The plan of scales -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "scales", "expected"),
    [
        ((342, 512), "auto", [(85, 128), (121, 181), (171, 256), (242, 362), (342, 512)]),
        ((342, 512), 1, [(342, 512)]),
        ((342, 512), 2, [(242, 362), (342, 512)]),
        ((128, 192), "auto", [(64, 96), (91, 136), (128, 192)]),
        ((85, 128), "auto", [(85, 128)]),
        ((16, 4000), "auto", [(16, 4000)]),
        ((32, 32), 9, [(16, 16), (23, 23), (32, 32)]),
    ],
)
def test_each_scale_has_half_the_pixels_of_the_next(size, scales, expected):
    plan = nst.plan_scales(size, replace(CONFIG, scales=scales))
    assert [scale.size for scale in plan] == expected


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 10, 209, 210, 1000])
@pytest.mark.parametrize("size", [(342, 512), (85, 128), (2048, 2048)])
def test_the_plan_spends_all_steps_and_always_paints_the_full_size(num_steps, size):
    plan = nst.plan_scales(size, replace(CONFIG, num_steps=num_steps))
    assert sum(scale.steps for scale in plan) == num_steps
    assert plan[-1].size == size and all(scale.steps >= 1 for scale in plan)


def test_most_steps_are_spent_where_a_step_is_cheap():
    steps = [scale.steps for scale in nst.plan_scales((342, 512), replace(CONFIG, num_steps=82))]
    assert steps == [40, 16, 10, 8, 8]


# What does not fit is said before the loop ------------------------------------------------------


def test_what_does_not_fit_is_refused_when_stylize_is_called(vgg, pictures):
    photo, style = pictures["china"], pictures["starry_night"]
    with pytest.raises(ValueError, match=r"content must be a picture of shape \(1, 3, H, W\).*\(3, "):
        nst.stylize(photo[0], style, CONFIG, vgg)
    with pytest.raises(ValueError, match=r"style must be .*at least 16.*\(1, 3, 10, 128\)"):
        nst.stylize(photo, style[:, :, :10], CONFIG, vgg)
    with pytest.raises(ValueError, match=r"network must be made with relu3_2 too"):
        nst.stylize(photo, style, replace(CONFIG, content_layers=("relu3_2",)), vgg)
    with pytest.raises(ValueError, match=r"network must be made with pooling='average', not 'max'"):
        nst.stylize(photo, style, replace(CONFIG, pooling="average"), vgg)
    for wrong in (photo * 255, (photo * 255).byte(), photo - 0.5, photo * float("nan")):
        with pytest.raises(ValueError, match="content must be floating-point numbers from 0 to 1"):
            nst.stylize(wrong, style, CONFIG, vgg)
