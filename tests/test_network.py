"""VGG19 against torchvision's modules, and the fast version against the plain one."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, last, needs_half, random_vgg
from torch import nn
from torchvision.transforms.functional import normalize

import nst_helpers as nst

ALL_LAYERS = [name for name in nst._VGG19_MODULES if name.startswith("relu")]
# Where torchvision has some layers, counted by hand.
POSITIONS = {"relu1_1": 1, "relu2_2": 8, "relu3_4": 17, "relu4_2": 22, "relu5_1": 29}
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CAFFE_BGR = [103.939, 116.779, 123.68]  # the mean of each channel, from 0 to 255


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert expected.norm() > 0
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


# torchvision's network ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_features() -> nn.Sequential:
    return random_vgg(30)  # down to relu5_1


def named_weights(features: nn.Sequential) -> dict[str, torch.Tensor]:
    """The weights of torchvision's modules, by the names of ours."""
    convolutions = [name for name in nst._VGG19_MODULES if name.startswith("conv")]
    names = [f"{name}.{kind}" for name in convolutions for kind in ("weight", "bias")]
    return dict(zip(names, features.state_dict().values(), strict=False))


def by_hand(features: nn.Sequential, x: torch.Tensor, pooling: str = "max") -> list[torch.Tensor]:
    """The outputs of torchvision's modules; the first has its input's edge repeated."""
    first, *others = features
    outputs = [F.conv2d(F.pad(x, (1, 1, 1, 1), "replicate"), first.weight, first.bias)]
    for module in others:
        if isinstance(module, nn.MaxPool2d) and pooling == "average":
            module = nn.AvgPool2d(2)
        outputs.append(module(outputs[-1].clone()))  # torchvision's ReLUs work in place
    return outputs


@pytest.mark.parametrize("pooling", ["max", "average"])
def test_features_are_torchvisions(random_features, pooling):
    image = torch.rand(1, 3, 64, 48)
    weights = nst.Weights(named_weights(random_features), *IMAGENET, "random", "hash")
    network = nst.VGG19Features(weights, POSITIONS, pooling)
    expected = by_hand(random_features, normalize(image, *IMAGENET), pooling)
    found = network(image)
    assert list(found) == list(POSITIONS)
    assert list(network(image, ["relu3_4", "relu1_1"])) == ["relu3_4", "relu1_1"]
    for layer, position in POSITIONS.items():
        assert relative_error(found[layer], expected[position]) < 1e-5, layer
    assert (network.source, network.sha256, network.pooling) == ("random", "hash", pooling)


@pytest.mark.parametrize("kind", [nst.VGG19Features, nst._FastVGG19])
def test_a_network_trained_on_caffes_input_sees_the_same_in_rgb(random_features, kind):
    """Its first filters are for BGR, from 0 to 255, less the mean."""
    image = torch.rand(1, 3, 32, 32)
    bgr = normalize(255 * image.flip(1), CAFFE_BGR, [1, 1, 1])
    expected = by_hand(random_features[:2], bgr)[1]
    tensors = named_weights(random_features)
    tensors["conv1_1.weight"] = tensors["conv1_1.weight"].flip(1)
    mean = [value / 255 for value in reversed(CAFFE_BGR)]
    weights = nst.Weights(tensors, mean, [1 / 255] * 3, "caffe", "")
    found = kind(weights, ["relu1_1"])(image)["relu1_1"]
    assert relative_error(found, expected) < 1e-5


# The plain network and the fast one ---------------------------------------------------------------


@pytest.fixture(scope="module")
def weights() -> nst.Weights:
    """The bundled weights, as ``load_network`` hands them to the fast network."""
    with mock.patch.object(nst, "_FastVGG19", wraps=nst._FastVGG19) as made:
        nst.load_network(replace(TINY, content_layers=("relu5_4",)))
    return made.call_args.args[0]


@pytest.fixture(scope="module")
def photo(pictures) -> torch.Tensor:
    """Of a height that makes the last strip of some blocks shorter, of others higher."""
    return nst.resize(pictures["china"], (161, 40))


@pytest.fixture
def low_strips(monkeypatch):
    """Strips of 8 rows, so that all five blocks have several in a small image."""
    monkeypatch.setattr(nst, "_STRIP_ROWS", 8)


@pytest.mark.parametrize("size", [(161, 40), (16, 40)])  # many strips, and the least height
@pytest.mark.parametrize("pooling", ["max", "average"])
@pytest.mark.parametrize("layers", [ALL_LAYERS, ["relu1_1", "relu2_1", "relu5_1"]])
@torch.no_grad()
def test_both_see_the_same_in_every_layer(low_strips, weights, layers, pooling, size):
    image = torch.rand(1, 3, *size)
    expected = nst.VGG19Features(weights, layers, pooling)(image)
    fast = nst._FastVGG19(weights, layers, pooling)
    for strips in (0, 1, 5):
        found = fast.in_strips(strips)(image)
        assert list(found) == layers
        for layer in layers:
            assert relative_error(found[layer], expected[layer]) < 1e-5, (layer, strips)


def losses_and_gradients(network, image, content, style, guides=None):
    """What a network sees in ``image``, the content and style losses, and their gradients."""
    content_layers = ("relu2_1", "relu4_2")  # the first is a style layer too
    image = image.clone().requires_grad_()
    features, statistics = network.look(image, content_layers, TINY.style_layers, guides)
    with torch.no_grad():
        targets, _ = network.look(content, content_layers)
        _, style_targets = network.look(style, (), TINY.style_layers, guides)
    shares = (1.0,) if guides is None else (0.5, 0.5)
    content_loss = nst.calculate_content_loss(features, targets)
    style_loss = nst.calculate_style_loss(statistics, style_targets, None, shares)
    losses = content_loss, style_loss
    gradients = [torch.autograd.grad(loss, image, retain_graph=True)[0] for loss in losses]
    return features, statistics, [loss.item() for loss in losses], gradients


@pytest.mark.parametrize("pooling", ["max", "average"])
@pytest.mark.parametrize("regions", [0, 2])
def test_both_look_the_same_and_have_the_same_gradients(
    low_strips, weights, photo, pooling, regions
):
    sizes = zip(TINY.style_layers, [(161, 40), (80, 20), (40, 10), (20, 5)], strict=True)
    guides = {layer: torch.rand(regions, 1, *size) for layer, size in sizes} if regions else None
    given = photo.flip(3), photo, photo.flip(2, 1), guides
    plain = losses_and_gradients(nst.VGG19Features(weights, TINY.layers, pooling), *given)
    for strips in (0, 1, 5):
        network = nst._FastVGG19(weights, TINY.layers, pooling).in_strips(strips)
        features, statistics, losses, gradients = losses_and_gradients(network, *given)
        assert (list(features), list(statistics)) == (list(plain[0]), list(plain[1]))
        for layer, expected in plain[0].items():
            assert relative_error(features[layer], expected) < 1e-5
        for layer, (gram, mean) in plain[1].items():
            assert relative_error(statistics[layer].gram, gram) < 1e-5
            assert relative_error(statistics[layer].mean, mean) < 1e-5
        assert losses == pytest.approx(plain[2], rel=1e-4)
        for gradient, expected in zip(gradients, plain[3], strict=True):
            assert relative_error(gradient, expected) < 5e-4  # 3e-4 in torch 2.4, 5e-5 in 2.14


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_the_method_alone_paints_what_stylize_paints(weights, pair, optimizer):
    config = replace(TINY, num_steps=4, optimizer=optimizer)
    photo, painting = pair
    plain, fast = (kind(weights, config.layers) for kind in (nst.VGG19Features, nst._FastVGG19))
    scales = nst.plan_scales(tuple(photo.shape[2:]), config)
    expected = last(nst.paint(nst.Job(photo, [painting], config, plain, scales)))
    found = last(nst.stylize(photo, painting, config, network=fast))
    assert expected.number == found.number == 4
    assert (found.image - expected.image).abs().max() * 255 < 0.01
    assert found.losses["total"].item() == pytest.approx(expected.losses["total"].item(), rel=1e-4)


# Layers and settings ------------------------------------------------------------------------------


def test_the_network_is_frozen_and_ends_at_its_deepest_layer(weights):
    network = nst.VGG19Features(weights, ("relu2_1", "relu1_1"))
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    names = [name for name, _ in network.network.named_children()]
    assert names == ["conv1_1", "relu1_1", "conv1_2", "relu1_2", "pool1", "conv2_1", "relu2_1"]


def test_only_the_layers_asked_for_are_given_and_nothing_deeper_runs():
    network = nst.load_network(TINY)
    del network.network.conv2_2, network.network.conv3_1
    image = torch.rand(1, 3, 16, 16)
    assert list(network(image, ["relu2_1", "relu1_1"])) == ["relu2_1", "relu1_1"]
    content, statistics = network.look(image, ["relu2_1"], ["relu1_1"])
    assert (list(content), list(statistics)) == (["relu2_1"], ["relu1_1"])


@pytest.mark.parametrize("kind", [nst.VGG19Features, nst._FastVGG19])
def test_luminance_is_seen_as_a_grey_picture(weights, kind):
    luminance = torch.rand(1, 1, 16, 20)
    network = kind(weights, ["relu2_1"])
    grey = network(luminance.repeat(1, 3, 1, 1))["relu2_1"]
    torch.testing.assert_close(network(luminance)["relu2_1"], grey)


def test_a_network_is_made_as_its_config_says():
    config = replace(TINY, pooling="average", precision="bfloat16", content_layers=("relu2_2",))
    network = nst.load_network(config)
    assert (network.layers, network.pooling) == (config.layers, "average")
    assert network.device == torch.device("cpu")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("regions", [0, 2])
def test_fast_statistics_are_the_plain_ones_in_parts(monkeypatch, dtype, bound, regions):
    monkeypatch.setattr(nst, "_POSITIONS_AT_ONCE", 7)
    features = torch.rand(1, 8, 30, 21).to(dtype).requires_grad_()
    guide = torch.rand(regions, 1, 30, 21) if regions else None
    found = nst._fast_statistics(features, guide)
    guides = {"a": guide} if regions else None
    expected = nst.style_statistics({"a": features.float()}, guides=guides)["a"]
    upstream = torch.rand_like(expected.gram), torch.rand_like(expected.mean)  # not symmetric
    for value, target in zip(found, expected, strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, target) < bound
    (gradient,) = torch.autograd.grad(found, features, upstream)
    (target,) = torch.autograd.grad(expected, features, upstream)
    assert relative_error(gradient, target) < bound


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_fast_statistics_keep_no_copy_of_the_features(layout):
    """A float32 copy at relu1_1 would be the largest tensor of a run in half precision."""
    features = torch.rand(1, 8, 6, 5, dtype=torch.bfloat16)
    features = features.contiguous(memory_format=layout).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        found = nst._fast_statistics(features)
    storages = {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.numel() > 9 * 8}
    assert storages == {features.untyped_storage().data_ptr()}
    (gradient,) = torch.autograd.grad(found.gram.sum(), features)
    assert gradient.is_contiguous(memory_format=layout)


def test_strips_keep_less_for_the_gradient(low_strips, vgg, photo):
    def kept(strips: int) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            image = photo.clone().requires_grad_()
            vgg.in_strips(strips).look(image, (), TINY.style_layers)
        return sum(sizes)

    whole, first_in_strips, all_in_strips = (kept(strips) for strips in (0, 1, 5))
    assert first_in_strips * 1.25 < whole
    assert all_in_strips * 16 < whole


def test_a_copy_in_strips_shares_its_weights_and_leaves_the_network_alone(vgg):
    network = vgg.in_strips(5)
    assert (network.strips, vgg.strips) == (5, 0)
    assert network.network.conv1_1.weight is vgg.network.conv1_1.weight


# Half precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "factor", "bound"),
    [("bfloat16", 1, 0.03), pytest.param("float16", 64, 0.005, marks=needs_half)],
)
def test_half_precision_sees_the_same_within_its_rounding(vgg, pair, precision, factor, bound):
    half = nst.load_network(replace(TINY, precision=precision))
    given = pair[0].flip(3), *pair
    features, _, losses, gradients = losses_and_gradients(half, *given)
    full = losses_and_gradients(vgg, *given)
    for layer, expected in full[0].items():
        assert features[layer].dtype == half.dtype
        assert relative_error(factor * features[layer].float(), expected) < bound
    assert losses == pytest.approx(full[2], rel=bound)
    for gradient, expected in zip(gradients, full[3], strict=True):
        assert gradient.dtype == torch.float32
        assert F.cosine_similarity(gradient.flatten(), expected.flatten(), 0) > 0.97


@needs_half
def test_float16_has_room_for_the_largest_features(weights, pair):
    network = nst._FastVGG19(weights, ALL_LAYERS, dtype=torch.float16)
    harsh = (pair[1] > 0.5).float()  # as much contrast as a picture can have
    assert max(features.max() for features in network(harsh).values()) < 65_504 / 16
