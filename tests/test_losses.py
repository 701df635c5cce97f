"""The losses against closed forms: numbers that follow from the formula alone."""

import pytest
import torch

import nst_helpers as nst


def test_gram_of_ones_is_ones_at_any_size():
    for height, width in ((4, 4), (3, 7)):
        gram = nst.gram_matrix(torch.ones(2, 5, height, width))
        torch.testing.assert_close(gram, torch.ones(2, 5, 5))


def test_gram_holds_the_mean_products_of_channels():
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])  # two channels, two positions
    expected = torch.tensor([[[(1 + 4) / 2, (3 + 8) / 2], [(3 + 8) / 2, (9 + 16) / 2]]])
    torch.testing.assert_close(nst.gram_matrix(features), expected)


def test_the_gradient_through_the_gram_matrix_is_autograds_own():
    features = torch.rand(2, 3, 4, 5, requires_grad=True)
    upstream = torch.rand(2, 3, 3)  # not symmetric: both halves of the gradient count
    flat = features.flatten(2)
    (expected,) = torch.autograd.grad(flat @ flat.mT / 20, features, upstream)
    (got,) = torch.autograd.grad(nst.gram_matrix(features), features, upstream)
    torch.testing.assert_close(got, expected)


def test_gram_stays_finite_and_float32_for_large_half_precision_features():
    features = torch.full((1, 2, 64, 64), 60000.0, dtype=torch.float16)
    gram = nst.gram_matrix(features)
    assert gram.dtype == torch.float32
    torch.testing.assert_close(gram, torch.full((1, 2, 2), 60000.0**2), rtol=1e-5, atol=0)


def test_total_variation_of_a_checkerboard_is_two_and_of_a_flat_picture_zero():
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    checkerboard = ((rows + columns) % 2).float().expand(1, 3, 6, 8)
    assert nst.total_variation_loss(checkerboard).item() == 2
    assert nst.total_variation_loss(torch.full((1, 3, 6, 8), 0.3)).item() == 0


def test_total_variation_of_stripes_counts_one_direction():
    stripes = (torch.arange(8) % 2).float().expand(1, 3, 6, 8)
    assert nst.total_variation_loss(stripes).item() == 1
    assert nst.total_variation_loss(stripes.mT).item() == 1


def test_losses_are_zero_at_the_target_and_one_at_nothing():
    features = {"a": torch.rand(1, 4, 5, 6), "b": torch.rand(1, 8, 2, 3)}
    grams = {layer: nst.gram_matrix(f) for layer, f in features.items()}
    nothing = {layer: torch.zeros_like(f) for layer, f in features.items()}
    assert nst.calculate_content_loss(features, features).item() == 0
    assert nst.calculate_style_loss(features, grams).item() == 0
    assert nst.calculate_content_loss(nothing, features).item() == pytest.approx(1)
    assert nst.calculate_style_loss(nothing, grams).item() == pytest.approx(1)


def test_losses_are_relative_so_the_scale_of_a_layer_cancels_out():
    generated, target = {"a": torch.rand(1, 4, 5, 6)}, {"a": torch.rand(1, 4, 7, 3)}
    grams = {"a": nst.gram_matrix(target["a"])}
    style = nst.calculate_style_loss(generated, grams)
    louder = nst.calculate_style_loss({"a": generated["a"] * 50}, {"a": grams["a"] * 2500})
    torch.testing.assert_close(style, louder)
    photo = {"a": torch.rand(1, 4, 5, 6)}
    content = nst.calculate_content_loss(generated, photo)
    torch.testing.assert_close(content, nst.calculate_content_loss({"a": generated["a"] * 50}, {"a": photo["a"] * 50}))


def test_style_layer_weights_are_a_weighted_mean():
    features = {"near": torch.ones(1, 1, 2, 2), "far": torch.zeros(1, 1, 2, 2)}
    grams = {layer: torch.ones(1, 1, 1) for layer in features}  # distances 0 and 1
    assert nst.calculate_style_loss(features, grams).item() == 0.5
    assert nst.calculate_style_loss(features, grams, (3, 1)).item() == 0.25
    assert nst.calculate_style_loss(features, grams, (30, 10)).item() == 0.25


def test_style_ignores_where_things_are_and_content_does_not():
    features = torch.rand(1, 4, 6, 6)
    moved = features.flip(3)
    grams = {"a": nst.gram_matrix(features)}
    assert nst.calculate_style_loss({"a": moved}, grams).item() < 1e-10
    assert nst.calculate_content_loss({"a": moved}, {"a": features}).item() > 0.1


def test_an_all_zero_target_keeps_the_losses_finite():
    features, target = {"a": torch.ones(1, 2, 3, 3)}, {"a": torch.zeros(1, 2, 3, 3)}
    grams = {"a": torch.zeros(1, 2, 2)}
    assert nst.calculate_content_loss(features, target).isfinite()
    assert nst.calculate_style_loss(features, grams).isfinite()


def test_the_total_is_the_weighted_sum_of_the_three():
    config = nst.StyleTransferConfig(
        content_weight=5, style_weight=7, tv_weight=11, style_layers=("relu1_1", "relu2_1"), style_layer_weights=(3, 1)
    )
    stripes = (torch.arange(8) % 2).float().expand(1, 3, 6, 8)  # a total variation of 1
    features = {"relu1_1": torch.ones(1, 1, 2, 2), "relu2_1": torch.zeros(1, 1, 2, 2)}
    content = {"relu1_1": torch.full((1, 1, 2, 2), 2.0)}  # (1 - 2)² / 2²
    grams = {layer: torch.ones(1, 1, 1) for layer in features}  # distances 0 and 1, weighted 3 : 1
    losses = nst.calculate_losses(stripes, features, content, grams, config)
    assert {name: loss.item() for name, loss in losses.items()} == {
        "content": 0.25,
        "style": 0.25,
        "tv": 1,
        "total": 5 * 0.25 + 7 * 0.25 + 11,
    }
