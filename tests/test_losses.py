"""The losses and their gradients against closed forms."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import SHALLOW

import nst_helpers as nst


def statistics_of(features: torch.Tensor) -> nst.Statistics:
    return nst.style_statistics({"a": features})["a"]


def style_distance(features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The style loss between the features of two pictures in one layer."""
    return nst.calculate_style_loss({"a": statistics_of(features)}, {"a": statistics_of(target)})


# Statistics ---------------------------------------------------------------------------------------


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("size", [(4, 4), (3, 7)])
def test_the_gram_matrix_of_ones_is_ones_at_any_size(size):
    assert torch.equal(nst.gram_matrix(torch.ones(2, 5, *size)), torch.ones(2, 5, 5))


def test_half_precision_features_have_losses_in_float32():
    """float16 holds no number above 65,504, and the square of 300 is larger."""
    picture, photo = (torch.full((1, 4, 8, 8), value).half() for value in (300.0, 600.0))
    gram = torch.full((1, 4, 4), 300.0**2)
    torch.testing.assert_close(nst.gram_matrix(picture), gram)
    torch.testing.assert_close(statistics_of(picture).mean, torch.full((1, 4), 300.0))
    loss = nst.calculate_content_loss({"a": picture}, {"a": photo})
    torch.testing.assert_close(loss, torch.tensor(1 / 4))


def test_style_statistics_are_the_gram_matrix_and_the_means_of_each_layer():
    features = {"a": torch.rand(2, 4, 5, 6), "b": torch.rand(1, 8, 2, 3)}
    found = nst.style_statistics(features)
    for layer, tensor in features.items():
        torch.testing.assert_close(found[layer].gram, nst.gram_matrix(tensor))
        torch.testing.assert_close(found[layer].mean, tensor.mean((2, 3)))
    assert list(nst.style_statistics(features, ["b"])) == ["b"]


def test_the_statistics_of_a_region_are_those_of_its_positions():
    """Two halves as regions have the statistics of the two halves alone."""
    features = torch.rand(1, 4, 6, 8)
    guide = torch.zeros(2, 1, 6, 8)
    guide[0, ..., :4] = guide[1, ..., 4:] = 2**0.5  # a mean square of 1
    found = nst.style_statistics({"a": features}, guides={"a": guide})["a"]
    for region, half in enumerate((features[..., :4], features[..., 4:])):
        torch.testing.assert_close(found.gram[region], nst.gram_matrix(half)[0])
        torch.testing.assert_close(found.mean[region], half.mean((2, 3))[0])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("regions", [0, 2])
def test_statistics_in_parts_are_the_formulas(monkeypatch, dtype, bound, regions):
    """Equation 3 of the paper, and its gradient, which autograd finds for the plain product."""
    monkeypatch.setattr(nst, "_POSITIONS_AT_ONCE", 7)
    features = torch.rand(1, 8, 30, 21).to(dtype).requires_grad_()
    guide = torch.rand(regions, 1, 30, 21) if regions else torch.ones(1)
    guides = {"a": guide} if regions else None
    found = nst.style_statistics({"a": features}, guides=guides)["a"]
    plain = features.float()
    expected = nst.gram_matrix(plain * guide), (plain * guide.square()).mean((2, 3))
    upstream = [torch.rand_like(target) for target in expected]  # not symmetric
    for value, target in zip(found, expected, strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, target) < bound
    (gradient,) = torch.autograd.grad(found, features, upstream)
    (target,) = torch.autograd.grad(expected, features, upstream)
    assert relative_error(gradient, target) < bound


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_statistics_keep_no_copy_of_the_features(layout):
    """A float32 copy at relu1_1 would be the largest tensor of a run in half precision."""
    features = torch.rand(1, 8, 6, 5, dtype=torch.bfloat16)
    features = features.contiguous(memory_format=layout).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        found = statistics_of(features)
    storages = {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.numel() > 9 * 8}
    assert storages == {features.untyped_storage().data_ptr()}
    (gradient,) = torch.autograd.grad(found.gram.sum(), features)
    assert gradient.is_contiguous(memory_format=layout)


# Content ------------------------------------------------------------------------------------------


def test_the_content_loss_is_the_mean_over_the_photos_layers():
    ones = torch.ones(1, 1, 3, 3)
    photo, picture = {"a": 2 * ones, "b": 4 * ones}, {"a": 3 * ones, "b": ones, "c": ones}
    expected = ((3 - 2) ** 2 / 2**2 + (1 - 4) ** 2 / 4**2) / 2
    assert nst.calculate_content_loss(picture, photo).item() == expected


def test_the_gradient_of_the_content_loss():
    picture, photo = torch.rand(2, 1, 3, 4, 5)
    picture.requires_grad_()
    loss = nst.calculate_content_loss({"a": picture}, {"a": photo})
    (gradient,) = torch.autograd.grad(loss, picture)
    torch.testing.assert_close(gradient, 2 * (picture - photo) / photo.square().sum())


# Style --------------------------------------------------------------------------------------------


def test_the_style_loss_and_its_gradient():
    """‖C − Ca‖² / ‖Ca‖² + ‖μ − μa‖² / ‖μa‖², with C = Σ (f − μ)(f − μ)ᵀ / N."""
    picture, painting = torch.rand(1, 3, 4, 5), torch.rand(1, 3, 6, 7)
    C, Ca = (torch.cov(features.flatten(2)[0], correction=0) for features in (picture, painting))
    μ, μa = (features.mean((2, 3), keepdim=True) for features in (picture, painting))
    expected = (C - Ca).square().sum() / Ca.square().sum()
    expected += (μ - μa).square().sum() / μa.square().sum()
    of_covariance = 4 * (C - Ca) @ (picture - μ).flatten(2) / Ca.square().sum() / 20
    of_mean = 2 * (μ - μa) / μa.square().sum() / 20
    picture.requires_grad_()
    loss = style_distance(picture, painting)
    (gradient,) = torch.autograd.grad(loss, picture)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, of_covariance.view_as(picture) + of_mean)


def test_losses_are_0_at_the_target_and_fixed_at_nothing():
    target = torch.rand(1, 4, 5, 6)
    nothing = torch.zeros_like(target)
    assert nst.calculate_content_loss({"a": target}, {"a": target}).item() == 0
    assert nst.calculate_content_loss({"a": nothing}, {"a": target}).item() == 1
    assert nst.calculate_content_loss({"a": target}, {"a": nothing}).isfinite()
    assert style_distance(target, target).item() == 0
    assert style_distance(nothing, target).item() == 2  # 1 for the covariance, 1 for the mean
    assert style_distance(target, nothing).isfinite()


def test_layers_count_by_their_weights():
    near, far = torch.rand(2, 1, 4, 5, 6)
    distance = style_distance(far, near).item()
    found = {"near": statistics_of(near), "far": statistics_of(far)}
    target = {"near": statistics_of(near), "far": statistics_of(near)}
    for weights, share in ((None, 1 / 2), ((3, 1), 1 / 4), ((30, 10), 1 / 4), ((0, 2), 1)):
        loss = nst.calculate_style_loss(found, target, weights)
        assert loss.item() == pytest.approx(share * distance)


def test_regions_count_by_their_shares():
    near, far = torch.rand(2, 1, 4, 5, 6)
    found = {"a": statistics_of(torch.cat([near, far]))}
    target = {"a": statistics_of(torch.cat([near, near]))}
    loss = nst.calculate_style_loss(found, target, region_shares=(0.25, 0.5))
    assert loss.item() == pytest.approx(0.5 * style_distance(far, near).item())


def test_the_style_loss_of_a_batch_is_the_mean_of_its_pictures():
    """Each by its own norm: a dark painting counts as much as a light one."""
    pictures, paintings = torch.rand(2, 3, 4, 5, 6)
    paintings[0] /= 10
    pairs = zip(pictures.split(1), paintings.split(1), strict=True)
    alone = [style_distance(picture, painting).item() for picture, painting in pairs]
    assert style_distance(pictures, paintings).item() == pytest.approx(sum(alone) / 3)


@pytest.mark.parametrize("loss", [nst.calculate_content_loss, nst.calculate_style_loss])
def test_a_missing_layer_is_named(loss):
    features = {"relu1_1": torch.ones(1, 2, 3, 3), "relu2_1": torch.ones(1, 2, 3, 3)}
    target = features if loss is nst.calculate_content_loss else nst.style_statistics(features)
    with pytest.raises(ValueError, match=r"relu1_1.*relu2_1"):
        loss({"relu2_1": target["relu2_1"]}, target)


# Total variation ----------------------------------------------------------------------------------

ROWS, COLUMNS = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")


@pytest.mark.parametrize(
    ("image", "expected"),
    [((ROWS + COLUMNS) % 2, 2), (ROWS % 2, 1), (COLUMNS % 2, 1), (0 * ROWS, 0)],
)
def test_total_variation_of_patterns(image, expected):
    assert nst.total_variation_loss(image.float().expand(1, 3, 6, 8)).item() == expected


def test_the_gradient_of_the_total_variation_of_one_bright_pixel():
    image = torch.zeros(1, 1, 5, 7)
    image[..., 2, 3] = 1
    image.requires_grad_()
    (gradient,) = torch.autograd.grad(nst.total_variation_loss(image), image)
    across, down = 1 / (5 * 6), 1 / (4 * 7)  # one over the number of differences
    expected = torch.zeros(1, 1, 5, 7)
    expected[..., 2, 2] = expected[..., 2, 4] = -2 * across
    expected[..., 1, 3] = expected[..., 3, 3] = -2 * down
    expected[..., 2, 3] = 4 * across + 4 * down
    torch.testing.assert_close(gradient, expected)


# The total ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("color", ["style", "content", "luminance"])
def test_the_losses_of_a_step_are_those_of_the_canvas_before_it(shallow, pair, pictures, color):
    """The photo gets the painting's palette, or the painting gets the photo's."""
    photo, painting = pair
    start = nst.resize(pictures["chelsea"], photo.shape[2:])
    weights = {"content_weight": 3, "style_weight": 7, "tv_weight": 11}
    layers = {"style_layers": ("relu2_1", "relu1_1"), "style_layer_weights": (1, 3)}
    config = replace(SHALLOW, num_steps=1, scales=1, color=color, **weights, **layers)
    (step,) = nst.stylize(photo, painting, config, network=shallow, start=start)
    if color == "luminance":
        shares = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        photo, painting, start = (
            (image * shares).sum(1, keepdim=True) for image in (photo, painting, start)
        )
    if color == "style":
        photo = nst.match_colors(photo, painting).clamp(0, 1)
    else:
        painting = nst.match_colors(painting, photo).clamp(0, 1)
    canvas, target = (F.pad(image, (4, 4, 4, 4), mode="reflect") for image in (start, photo))
    (found, statistics), (content, _), (_, style) = (
        shallow.look(image, config.content_layers, config.style_layers)
        for image in (canvas, target, painting)
    )
    expected = {
        "content": nst.calculate_content_loss(found, content).item(),
        "style": nst.calculate_style_loss(statistics, style, (1, 3)).item(),
        "tv": nst.total_variation_loss(canvas).item(),
    }
    expected["total"] = 3 * expected["content"] + 7 * expected["style"] + 11 * expected["tv"]
    losses = {name: loss.item() for name, loss in step.losses.items()}
    assert losses == pytest.approx(expected, rel=1e-4)
