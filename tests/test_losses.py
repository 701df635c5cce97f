"""The losses against closed forms: numbers that follow from the formula alone."""

import pytest
import torch

import nst_helpers as nst


def stripes() -> torch.Tensor:
    """Columns of 0 and 1 in turn: a total variation of 1."""
    return (torch.arange(8) % 2).float().expand(1, 3, 6, 8)


# Gram matrices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 4), (3, 7)])
def test_the_gram_matrix_of_ones_is_ones_at_any_size(size):
    gram = nst.gram_matrix(torch.ones(2, 5, *size))
    torch.testing.assert_close(gram, torch.ones(2, 5, 5))


def test_a_gram_matrix_holds_the_mean_products_of_channels():
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])  # two channels, two positions
    expected = torch.tensor([[[(1 + 4) / 2, (3 + 8) / 2], [(3 + 8) / 2, (9 + 16) / 2]]])
    torch.testing.assert_close(nst.gram_matrix(features), expected)


def test_a_guide_weighs_the_positions_of_each_region():
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    guide = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 3.0]]]])  # a region for each position
    first = torch.tensor([[1.0, 3.0], [3.0, 9.0]]) / 2
    second = torch.tensor([[4.0, 8.0], [8.0, 16.0]]) * 9 / 2
    torch.testing.assert_close(nst.gram_matrix(features, guide), torch.stack([first, second]))


def test_gram_matrices_are_made_layer_by_layer_with_the_guides_that_there_are():
    features = {"a": torch.rand(1, 4, 5, 6), "b": torch.rand(1, 8, 2, 3)}
    guides = {"b": torch.rand(2, 1, 2, 3)}
    grams = nst.gram_matrices(features, guides)
    assert list(grams) == ["a", "b"]
    torch.testing.assert_close(grams["a"], nst.gram_matrix(features["a"]))
    torch.testing.assert_close(grams["b"], nst.gram_matrix(features["b"], guides["b"]))
    torch.testing.assert_close(nst.gram_matrices(features)["b"], nst.gram_matrix(features["b"]))


def test_the_gradient_through_a_gram_matrix_is_autograds_own():
    features = torch.rand(2, 3, 4, 5, requires_grad=True)
    upstream = torch.rand(2, 3, 3)  # not symmetric: both halves of the gradient count
    flat = features.flatten(2)
    (expected,) = torch.autograd.grad(flat @ flat.mT / 20, features, upstream)
    (found,) = torch.autograd.grad(nst.gram_matrix(features), features, upstream)
    torch.testing.assert_close(found, expected)


def test_a_gram_matrix_of_large_half_precision_features_is_finite_and_float32():
    features = torch.full((1, 2, 64, 64), 60_000.0, dtype=torch.float16)
    gram = nst.gram_matrix(features)
    assert gram.dtype == torch.float32
    torch.testing.assert_close(gram, torch.full((1, 2, 2), 60_000.0**2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gram_matrix_in_chunks_is_the_plain_one(monkeypatch, dtype):
    features = torch.rand(1, 8, 30, 21, dtype=dtype, requires_grad=True)
    flat = features.detach().float().flatten(2)
    gradients = []
    for positions in (7, 10**6):
        monkeypatch.setattr(nst, "GRAM_POSITIONS", positions)
        gram = nst.gram_matrix(features)
        torch.testing.assert_close(gram, flat @ flat.mT / (30 * 21))
        gradients += torch.autograd.grad((gram * torch.arange(8.0)).sum(), features)
    assert gradients[0].dtype == dtype
    torch.testing.assert_close(*gradients)


def test_a_gram_matrix_keeps_no_copy_of_the_features_and_their_layout():
    """A float32 copy at relu1_1 would be the largest tensor of a run in half precision."""
    features = torch.rand(1, 8, 6, 5, dtype=torch.bfloat16)
    features = features.contiguous(memory_format=torch.channels_last).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gram = nst.gram_matrix(features)
    storages = {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.numel() > 64}
    assert storages == {features.untyped_storage().data_ptr()}
    (gradient,) = torch.autograd.grad(gram.sum(), features)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


# Content and style --------------------------------------------------------------------------------


def test_losses_are_zero_at_the_target_and_one_at_nothing():
    features = {"a": torch.rand(1, 4, 5, 6), "b": torch.rand(1, 8, 2, 3)}
    nothing = {layer: torch.zeros_like(found) for layer, found in features.items()}
    grams, no_grams = nst.gram_matrices(features), nst.gram_matrices(nothing)
    assert nst.calculate_content_loss(features, features).item() == 0
    assert nst.calculate_style_loss(grams, grams).item() == 0
    assert nst.calculate_content_loss(nothing, features).item() == pytest.approx(1)
    assert nst.calculate_style_loss(no_grams, grams).item() == pytest.approx(1)


def test_the_content_loss_is_a_mean_over_the_layers_of_the_photo():
    photo = {"a": torch.full((1, 1, 2, 2), 2.0), "b": torch.full((1, 1, 3, 3), 4.0)}
    picture = {
        "a": torch.full((1, 1, 2, 2), 3.0),  # (3 - 2)² / 2²
        "b": torch.full((1, 1, 3, 3), 1.0),  # (1 - 4)² / 4²
        "another": torch.rand(1, 1, 5, 5),  # that the photo does not ask for
    }
    loss = nst.calculate_content_loss(picture, photo)
    assert loss.item() == pytest.approx((1 / 4 + 9 / 16) / 2)


def test_losses_are_relative_so_the_scale_of_a_layer_cancels_out():
    def losses(factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        picture, photo = torch.rand(2, 1, 4, 5, 6, generator=generator) * factor
        grams = nst.gram_matrices({"a": picture})
        targets = nst.gram_matrices({"a": photo})
        return (
            nst.calculate_content_loss({"a": picture}, {"a": photo}),
            nst.calculate_style_loss(grams, targets),
        )

    torch.testing.assert_close(losses(50), losses(1))


def test_the_size_of_a_painting_does_not_matter_to_the_style_loss():
    features = torch.rand(1, 4, 5, 6)
    tiled = features.repeat(1, 1, 3, 2)  # the same texture, more of it
    grams, targets = nst.gram_matrices({"a": features}), nst.gram_matrices({"a": tiled})
    assert nst.calculate_style_loss(grams, targets).item() < 1e-10


def test_style_ignores_where_things_are_and_content_does_not():
    features = {"a": torch.rand(1, 4, 6, 6)}
    moved = {"a": features["a"].flip(3)}
    grams, moved_grams = nst.gram_matrices(features), nst.gram_matrices(moved)
    assert nst.calculate_style_loss(moved_grams, grams).item() < 1e-10
    assert nst.calculate_content_loss(moved, features).item() > 0.1


def test_layer_weights_make_a_weighted_mean():
    found = {"near": torch.ones(1, 1, 1), "far": torch.zeros(1, 1, 1)}
    targets = {layer: torch.ones(1, 1, 1) for layer in found}  # distances 0 and 1
    assert nst.calculate_style_loss(found, targets).item() == 0.5
    assert nst.calculate_style_loss(found, targets, (3, 1)).item() == 0.25
    assert nst.calculate_style_loss(found, targets, (30, 10)).item() == 0.25


def test_regions_count_by_their_shares():
    found = {"a": torch.tensor([[[1.0]], [[0.0]]])}  # two regions, a matrix each
    targets = {"a": torch.tensor([[[1.0]], [[5.0]]])}  # distances 0 and 1
    loss = nst.calculate_style_loss(found, targets, region_shares=(0.25, 0.75))
    assert loss.item() == pytest.approx(0.75)


@pytest.mark.parametrize("given", [(1, 4, 5, 6), (2, 4, 4), (1, 8, 8)])
def test_what_is_no_gram_matrix_of_that_layer_is_refused(given):
    targets = {"relu1_1": torch.ones(1, 4, 4)}
    with pytest.raises(ValueError, match="relu1_1") as error:
        nst.calculate_style_loss({"relu1_1": torch.ones(given)}, targets)
    for part in (repr(given), "(1, 4, 4)", "gram_matrices"):
        assert part in str(error.value)


def test_a_target_of_zeros_keeps_the_losses_finite():
    ones, zeros = torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)
    grams, targets = nst.gram_matrices({"a": ones}), nst.gram_matrices({"a": zeros})
    assert nst.calculate_content_loss({"a": ones}, {"a": zeros}).isfinite()
    assert nst.calculate_style_loss(grams, targets).isfinite()


def test_losses_of_half_precision_features_are_computed_in_float32():
    """float16 ends at 65,504, which the square of 300 exceeds."""
    picture, photo = (torch.full((1, 4, 8, 8), value).half() for value in (300.0, 600.0))
    loss = nst.calculate_content_loss({"a": picture}, {"a": photo})
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1 / 4)


# Total variation and the sum ----------------------------------------------------------------------


def test_total_variation_of_a_checkerboard_is_two_and_of_a_flat_picture_zero():
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    checkerboard = ((rows + columns) % 2).float().expand(1, 3, 6, 8)
    assert nst.total_variation_loss(checkerboard).item() == 2
    assert nst.total_variation_loss(torch.full((1, 3, 6, 8), 0.3)).item() == 0


def test_total_variation_of_stripes_counts_one_direction():
    assert nst.total_variation_loss(stripes()).item() == 1
    assert nst.total_variation_loss(stripes().mT).item() == 1


def losses_of_stripes(layers: tuple[str, ...]) -> dict[str, float]:
    """Of stripes with 1/4 of content loss, and style distances of 0 in relu1_1, 1 in relu2_1."""
    config = nst.StyleTransferConfig(
        content_weight=5,
        style_weight=7,
        tv_weight=11,
        content_layers=("relu3_1",),
        style_layers=layers,
        style_layer_weights=[{"relu1_1": 3, "relu2_1": 1}[layer] for layer in layers],
    )
    losses = nst.calculate_losses(
        stripes(),
        {"relu3_1": torch.ones(1, 1, 2, 2)},
        {"relu1_1": torch.ones(1, 1, 1), "relu2_1": torch.zeros(1, 1, 1)},
        {"relu3_1": torch.full((1, 1, 2, 2), 2.0)},  # (1 - 2)² / 2²
        {"relu1_1": torch.ones(1, 1, 1), "relu2_1": torch.ones(1, 1, 1)},
        config,
    )
    return {name: loss.item() for name, loss in losses.items()}


def test_the_total_is_the_weighted_sum_of_the_three():
    assert losses_of_stripes(("relu1_1", "relu2_1")) == {
        "content": 0.25,
        "style": 0.25,
        "tv": 1,
        "total": 5 * 0.25 + 7 * 0.25 + 11,
    }


def test_layer_weights_belong_to_the_layers_of_the_config_in_whatever_order():
    """The network gives layers from shallow to deep, however the config names them."""
    in_order, reversed_order = ("relu1_1", "relu2_1"), ("relu2_1", "relu1_1")
    assert losses_of_stripes(reversed_order) == losses_of_stripes(in_order)
