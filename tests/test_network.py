"""VGG19 against torchvision's modules, and parts, strips and half precision against the whole."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, needs_half, random_vgg, save_checkpoint
from torch import nn
from torchvision.transforms.functional import normalize

import nst_helpers as nst

BLOCKS = enumerate((2, 2, 4, 4, 4), start=1)
ALL_LAYERS = tuple(f"relu{block}_{n}" for block, count in BLOCKS for n in range(1, count + 1))
# Where torchvision has some layers, counted by hand.
POSITIONS = {"relu1_1": 1, "relu2_2": 8, "relu3_4": 17, "relu4_2": 22, "relu5_1": 29}
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
STRIPS = (0, 1, 5)  # blocks


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert expected.norm() > 0
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


# torchvision's network ----------------------------------------------------------------------------


def by_hand(features: nn.Sequential, x: torch.Tensor, pooling: str) -> list[torch.Tensor]:
    """The outputs of torchvision's modules; the first has its input's edge repeated."""
    first, *others = features
    outputs = [F.conv2d(F.pad(x, (1, 1, 1, 1), "replicate"), first.weight, first.bias)]
    for module in others:
        if isinstance(module, nn.MaxPool2d) and pooling == "average":
            module = nn.AvgPool2d(2)
        outputs.append(module(outputs[-1].clone()))  # torchvision's ReLUs work in place
    return outputs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(random_vgg(30), tmp_path_factory.mktemp("weights") / "random.pth")


@pytest.mark.parametrize("pooling", ["max", "average"])
def test_features_are_torchvisions(checkpoint, pooling):
    """Theirs of an image less ImageNet's mean, over its deviation."""
    image = torch.rand(1, 3, 64, 48)
    config = replace(TINY, weights=checkpoint, pooling=pooling, content_layers=tuple(POSITIONS))
    network = nst.load_network(replace(config, style_layers=("relu1_1",)))
    expected = by_hand(random_vgg(30), normalize(image, *IMAGENET), pooling)
    found = network(image)
    assert list(found) == list(POSITIONS)
    for layer, position in POSITIONS.items():
        assert relative_error(found[layer], expected[position]) < 1e-5, layer
    assert (network.source, network.pooling) == ("random.pth", pooling)


# Layers and settings ------------------------------------------------------------------------------


def test_the_network_is_frozen_and_ends_at_its_deepest_layer():
    config = replace(TINY, content_layers=("relu2_1",), style_layers=("relu1_1",))
    network = nst.load_network(config)
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


def test_an_image_without_its_batch_is_refused(shallow):
    with pytest.raises(ValueError, match=r"^image .*\(1, 3, H, W\).*not \(3, 16, 20\)"):
        shallow(torch.rand(1, 3, 16, 20)[0])


def test_luminance_is_seen_as_a_grey_picture(shallow):
    luminance = torch.rand(1, 1, 16, 20)
    grey = shallow(luminance.repeat(1, 3, 1, 1))["relu2_1"]
    torch.testing.assert_close(shallow(luminance)["relu2_1"], grey)


def test_a_network_is_made_as_its_config_says():
    config = replace(TINY, pooling="average", precision="bfloat16", content_layers=("relu2_2",))
    network = nst.load_network(config)
    assert (network.layers, network.pooling) == (config.layers, "average")
    assert (network.device, network.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}


# Strips -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo(pictures) -> torch.Tensor:
    """Of a height that makes the last strip of some blocks shorter, of others higher."""
    return nst.resize(pictures["china"], (161, 40))


@pytest.mark.usefixtures("low_strips")
@pytest.mark.parametrize("size", [(161, 40), (16, 40)])  # many strips, and the least height
@pytest.mark.parametrize("pooling", ["max", "average"])
@torch.no_grad()
def test_strips_see_the_same_in_every_layer(pooling, size):
    network = nst.load_network(replace(TINY, pooling=pooling, content_layers=ALL_LAYERS))
    image = torch.rand(1, 3, *size)
    whole, *in_strips = (
        network.look(image, ALL_LAYERS, blocks_in_strips=strips)[0] for strips in STRIPS
    )
    for layer in ALL_LAYERS:
        for found in in_strips:
            assert relative_error(found[layer], whole[layer]) < 1e-5, layer


def losses_and_gradients(network, image, content, style, guides=None, strips=0):
    """What a network sees in ``image``, the content and style losses, and their gradients."""
    content_layers = ("relu2_1", "relu4_2")  # the first is a style layer too
    image = image.clone().requires_grad_()
    features, statistics = network.look(image, content_layers, TINY.style_layers, guides, strips)
    with torch.no_grad():
        targets = network(content, content_layers)
        _, style_targets = network.look(style, (), TINY.style_layers, guides, strips)
    content_loss = nst.calculate_content_loss(features, targets)
    style_loss = nst.calculate_style_loss(statistics, style_targets)
    losses = content_loss, style_loss
    gradients = [torch.autograd.grad(loss, image, retain_graph=True)[0] for loss in losses]
    return features, statistics, [loss.item() for loss in losses], gradients


@pytest.mark.usefixtures("low_strips")
@pytest.mark.parametrize("regions", [0, 2])
def test_strips_have_the_same_statistics_losses_and_gradients(vgg, photo, regions):
    sizes = zip(TINY.style_layers, [(161, 40), (80, 20), (40, 10), (20, 5)], strict=True)
    guides = {layer: torch.rand(regions, 1, *size) for layer, size in sizes} if regions else None
    given = photo.flip(3), photo, photo.flip(2, 1), guides
    whole, *in_strips = (losses_and_gradients(vgg, *given, strips) for strips in STRIPS)
    for features, statistics, losses, gradients in in_strips:
        for layer, expected in whole[0].items():
            assert relative_error(features[layer], expected) < 1e-5
        for layer, (gram, mean) in whole[1].items():
            assert relative_error(statistics[layer].gram, gram) < 1e-5
            assert relative_error(statistics[layer].mean, mean) < 1e-5
        assert losses == pytest.approx(whole[2], rel=1e-4)
        for gradient, expected in zip(gradients, whole[3], strict=True):
            assert relative_error(gradient, expected) < 5e-4  # 3e-4 in torch 2.4, 5e-5 in 2.14


def note_kept(sizes: list[int]):
    """Note the size of every tensor that is kept for the gradient."""
    return torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
    )


@pytest.mark.usefixtures("low_strips")
def test_strips_keep_less_for_the_gradient(vgg, photo):
    kept = []
    for strips in STRIPS:
        sizes = []
        with note_kept(sizes):
            vgg.look(photo.clone().requires_grad_(), (), TINY.style_layers, blocks_in_strips=strips)
        kept.append(sum(sizes))
    whole, first_in_strips, all_in_strips = kept
    assert first_in_strips * 1.25 < whole
    assert all_in_strips * 16 < whole


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
def test_float16_has_room_for_the_largest_features(pair):
    config = replace(TINY, precision="float16", content_layers=ALL_LAYERS)
    harsh = (pair[1] > 0.5).float()  # as much contrast as a picture can have
    seen = nst.load_network(config)(harsh)
    assert max(features.max() for features in seen.values()) < 65_504 / 16
