"""The losses against closed forms: numbers that follow from the formula alone."""

import re

import pytest
import torch

import nst_helpers as nst


def stripes() -> torch.Tensor:
    """Columns of 0 and 1 in turn: a total variation of 1."""
    return (torch.arange(8) % 2).float().expand(1, 3, 6, 8)


# Gram matrices and means --------------------------------------------------------------------------


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


def test_style_statistics_are_a_gram_matrix_and_below_it_the_means():
    features = torch.rand(2, 4, 5, 6)
    found = nst.style_statistics({"a": features, "b": features[:, :3]})
    assert {layer: tuple(part.shape) for layer, part in found.items()} == {
        "a": (2, 5, 4),
        "b": (2, 4, 3),
    }
    torch.testing.assert_close(found["a"][:, :-1], nst.gram_matrix(features))
    torch.testing.assert_close(found["a"][:, -1], features.mean((2, 3)))


def test_style_statistics_of_some_layers_only():
    features = {"a": torch.rand(1, 4, 5, 6), "b": torch.rand(1, 8, 2, 3)}
    assert list(nst.style_statistics(features, ["b"])) == ["b"]


def test_style_statistics_of_regions_are_those_of_their_positions():
    """Of two halves, a region each: the same as of each half alone."""
    features = torch.rand(1, 4, 6, 8)
    guide = torch.zeros(2, 1, 6, 8)
    guide[0, ..., :4] = guide[1, ..., 4:] = 2**0.5  # a mean square of 1
    found = nst.style_statistics({"a": features}, guides={"a": guide})["a"]
    halves = torch.cat([features[..., :4], features[..., 4:]])
    torch.testing.assert_close(found, nst.style_statistics({"a": halves})["a"])


def test_only_layers_with_a_guide_have_regions():
    features = {"a": torch.rand(1, 4, 5, 6), "b": torch.rand(1, 8, 2, 3)}
    found = nst.style_statistics(features, guides={"b": torch.ones(2, 1, 2, 3)})
    assert {layer: len(part) for layer, part in found.items()} == {"a": 1, "b": 2}


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


def test_the_gradient_through_the_means_is_autograds_own():
    features = torch.rand(2, 3, 4, 5, requires_grad=True)
    upstream = torch.rand(2, 3)
    (expected,) = torch.autograd.grad(features.mean((2, 3)), features, upstream)
    means = nst.style_statistics({"a": features})["a"][:, -1]
    (found,) = torch.autograd.grad(means, features, upstream)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_in_chunks_are_the_plain_ones(monkeypatch, dtype):
    features = torch.rand(1, 8, 30, 21, dtype=dtype, requires_grad=True)
    rows = features.detach().float().flatten(2)
    expected = torch.cat([rows @ rows.mT / (30 * 21), rows.mean(2)[:, None]], dim=1)
    gradients = []
    for positions in (7, 10**6):
        monkeypatch.setattr(nst, "POSITIONS_AT_ONCE", positions)
        found = nst.style_statistics({"a": features})["a"]
        torch.testing.assert_close(found, expected)
        gradients += torch.autograd.grad((found * torch.arange(8.0)).sum(), features)
    assert gradients[0].dtype == dtype
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_statistics_keep_no_copy_of_the_features_and_the_gradient_has_their_layout(layout):
    """A float32 copy at relu1_1 would be the largest tensor of a run in half precision."""
    features = torch.rand(1, 8, 6, 5, dtype=torch.bfloat16)
    features = features.contiguous(memory_format=layout).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        found = nst.style_statistics({"a": features})["a"]
    storages = {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.numel() > 9 * 8}
    assert storages == {features.untyped_storage().data_ptr()}
    (gradient,) = torch.autograd.grad(found.sum(), features)
    assert gradient.is_contiguous(memory_format=layout)


# Content and style --------------------------------------------------------------------------------


def style_distance(picture: torch.Tensor, painting: torch.Tensor) -> torch.Tensor:
    """The style loss between features of one layer."""
    found, target = (nst.style_statistics({"a": part}) for part in (picture, painting))
    return nst.calculate_style_loss(found, target)


def test_losses_are_zero_at_the_target_and_large_at_nothing():
    features = {"a": torch.rand(1, 4, 5, 6), "b": torch.rand(1, 8, 2, 3)}
    nothing = {layer: torch.zeros_like(found) for layer, found in features.items()}
    assert nst.calculate_content_loss(features, features).item() == 0
    assert nst.calculate_content_loss(nothing, features).item() == pytest.approx(1)
    target = nst.style_statistics(features)
    assert nst.calculate_style_loss(target, target).item() == 0
    assert nst.calculate_style_loss(nst.style_statistics(nothing), target).item() > 0.9


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
        content = nst.calculate_content_loss({"a": picture}, {"a": photo})
        return content, style_distance(picture, photo)

    torch.testing.assert_close(losses(50), losses(1))


@pytest.mark.parametrize("loss", [nst.calculate_content_loss, nst.calculate_style_loss])
def test_losses_of_what_has_no_such_layer_are_refused(loss):
    target = {"relu1_1": torch.ones(1, 3, 2)}
    for given, wanted, part in (
        ({"relu2_1": torch.ones(1, 3, 2)}, target, "relu1_1"),
        ({}, target, "none"),
        (torch.ones(1, 3, 8, 8), target, "(1, 3, 8, 8)"),
        (target, torch.ones(1, 3, 8, 8), "(1, 3, 8, 8)"),
        (target, {}, "{}"),
    ):
        with pytest.raises(ValueError, match=re.escape(part)):
            loss(given, wanted)


def test_a_gram_matrix_of_no_features_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 8, 8\)"):
        nst.gram_matrix(torch.ones(3, 8, 8))


def test_the_size_of_a_painting_does_not_matter_to_the_style_loss():
    features = torch.rand(1, 4, 5, 6)
    tiled = features.repeat(1, 1, 3, 2)  # the same texture, more of it
    assert style_distance(tiled, features).item() < 1e-8


def test_style_ignores_where_things_are_and_content_does_not():
    features = torch.rand(1, 4, 6, 6)
    moved = features.flip(3)
    assert style_distance(moved, features).item() < 1e-8
    assert nst.calculate_content_loss({"a": moved}, {"a": features}).item() > 0.1


def test_strong_means_do_not_hide_how_channels_vary_together():
    """In a Gram matrix alone these two would differ by one part in a hundred million."""
    wave = torch.randn(1, 1, 40, 40)
    together = 100 + torch.cat([wave, wave], dim=1)
    in_turn = 100 + torch.cat([wave, -wave], dim=1)
    assert style_distance(in_turn, together).item() > 0.1


def test_the_means_of_channels_count_too():
    features = torch.rand(1, 4, 20, 20)
    assert style_distance(features + 1, features).item() > 0.1


def near_and_far() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A target, what matches it, and what does not: each the statistics of one layer."""
    target = nst.style_statistics({"a": torch.rand(1, 4, 5, 6)})["a"]
    other = nst.style_statistics({"a": torch.rand(1, 4, 5, 6) ** 2})["a"]
    return target, target.clone(), other


def test_layer_weights_make_a_weighted_mean():
    target, near, far = near_and_far()
    distance = nst.calculate_style_loss({"far": far}, {"far": target}).item()
    found, targets = {"near": near, "far": far}, {"near": target, "far": target}
    for weights, share in ((None, 1 / 2), ((3, 1), 1 / 4), ((30, 10), 1 / 4), ((0, 2), 1)):
        loss = nst.calculate_style_loss(found, targets, weights)
        assert loss.item() == pytest.approx(share * distance)


def test_regions_count_by_their_shares():
    target, near, far = near_and_far()
    distance = nst.calculate_style_loss({"a": far}, {"a": target}).item()
    found, targets = {"a": torch.cat([near, far])}, {"a": torch.cat([target, target])}
    loss = nst.calculate_style_loss(found, targets, region_shares=(0.25, 0.75))
    assert loss.item() == pytest.approx(0.75 * distance)


@pytest.mark.parametrize("given", [(1, 4, 5, 6), (1, 4, 4), (2, 5, 4), (1, 9, 8)])
def test_what_is_no_statistics_of_that_layer_is_refused(given):
    targets = {"relu1_1": torch.ones(1, 5, 4)}
    with pytest.raises(ValueError, match=r"^relu1_1 ") as error:
        nst.calculate_style_loss({"relu1_1": torch.ones(given)}, targets)
    for part in (repr(given), "(1, 5, 4)", "style_statistics"):
        assert part in str(error.value)


def test_a_target_of_zeros_keeps_the_losses_finite():
    ones, zeros = torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)
    assert nst.calculate_content_loss({"a": ones}, {"a": zeros}).isfinite()
    assert style_distance(ones, zeros).isfinite()
    assert style_distance(zeros, ones).isfinite()


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


def test_the_total_is_the_weighted_sum_of_the_three():
    """The network gives layers from shallow to deep, whatever their order in the config."""
    config = nst.StyleTransferConfig(
        content_weight=5,
        style_weight=7,
        tv_weight=11,
        content_layers=("relu3_1",),
        style_layers=("relu2_1", "relu1_1"),
        style_layer_weights=(1, 3),
    )
    target, near, far = near_and_far()
    distance = nst.calculate_style_loss({"a": far}, {"a": target}).item()
    targets = nst.Targets(
        content={"relu3_1": torch.full((1, 1, 2, 2), 2.0)},
        style={"relu2_1": target, "relu1_1": target},
        guides=None,
        region_shares=(1.0,),
    )
    features = {"relu3_1": torch.ones(1, 1, 2, 2)}  # (1 - 2)² / 2²
    losses = nst.calculate_losses(
        stripes(), features, {"relu1_1": near, "relu2_1": far}, targets, config
    )
    style = distance / 4
    expected = {"content": 1 / 4, "style": style, "tv": 1, "total": 5 / 4 + 7 * style + 11}
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected)
