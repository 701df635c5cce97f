"""The network is torchvision's VGG19, in float32 and in half precision, at once and in strips."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, last, random_vgg, save_checkpoint
from torch import Tensor, nn

import nst_helpers as nst

DEEPEST = "relu5_1"
TORCHVISIONS_NUMBERS = {"relu1_1": 1, "relu2_2": 8, "relu4_2": 22, DEEPEST: 29}  # counted by hand


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A file of random weights down to relu5_1, and torchvision's modules that have them."""
    features = random_vgg(30)
    path = tmp_path_factory.mktemp("weights") / "vgg19-random.pth"
    return save_checkpoint(features, path), features


def losses_and_gradient(network, picture, content, style, **options):
    """The losses of ``picture``, and the gradient of their sum, as a step computes them."""
    layers = nst.STYLE_LAYERS
    with torch.no_grad():
        targets = nst.Targets(
            content=network(content, nst.CONTENT_LAYERS, **options),
            style=network(style, layers, statistics=layers, **options),
            guides=None,
            region_shares=(1.0,),
        )
    picture = picture.clone().requires_grad_()
    found = network(picture, statistics=layers, **options)
    config = replace(TINY, content_weight=3, style_weight=30, tv_weight=1)
    losses = nst.calculate_losses(picture, found, found, targets, config)
    (losses["total"] * picture.numel()).backward()
    return {name: loss.item() for name, loss in losses.items()}, picture.grad


# Features and layers ------------------------------------------------------------------------------


def departed(features: nn.Sequential, pooling: str) -> nn.Sequential:
    """torchvision's modules, changed only where this project departs from them."""
    modules = [nn.ReLU() if isinstance(module, nn.ReLU) else module for module in features]
    if pooling == "average":
        modules = [nn.AvgPool2d(2) if isinstance(m, nn.MaxPool2d) else m for m in modules]
    first = nn.Conv2d(3, 64, 3, padding=1, padding_mode="replicate")
    first.load_state_dict(features[0].state_dict())
    return nn.Sequential(first, *modules[1:])


@pytest.mark.parametrize("pooling", ["max", "average"])
@torch.no_grad()
def test_features_are_torchvisions(checkpoint, pooling):
    path, features = checkpoint
    picture = torch.rand(1, 3, 64, 48)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)  # of ImageNet
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    modules = departed(features, pooling)
    found = nst.VGG19Features(tuple(TORCHVISIONS_NUMBERS), path, pooling)(picture)
    assert list(found) == list(TORCHVISIONS_NUMBERS)
    for layer, number in TORCHVISIONS_NUMBERS.items():
        expected = modules[: number + 1]((picture - mean) / std)
        assert expected.std() > 0
        error = (found[layer] - expected).abs().max() / expected.max()
        assert error < 1e-4, layer


def test_the_network_is_frozen_and_ends_at_its_deepest_layer(checkpoint):
    network = nst.VGG19Features(("relu4_2", "relu1_1"), checkpoint[0])
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    numbers = {name: nst.VGG19_MODULES.index(name) for name, _ in network.network.named_children()}
    assert max(numbers.values()) == nst.VGG19_MODULES.index("relu4_2")


def test_only_the_layers_that_are_asked_for_are_given_and_nothing_below_them_runs(vgg):
    ran = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in vgg.network.named_children()
    ]
    picture = torch.rand(1, 3, 16, 16)
    assert set(vgg(picture)) == {*nst.CONTENT_LAYERS, *nst.STYLE_LAYERS}
    ran.clear()
    assert list(vgg(picture, ["relu2_1", "relu1_1"])) == ["relu1_1", "relu2_1"]
    for hook in hooks:
        hook.remove()
    assert ran[-1] == "relu2_1"


def test_nothing_that_was_handed_out_is_overwritten(vgg):
    picture = torch.rand(1, 3, 32, 32)
    alone = vgg(picture, ["relu3_1"])["relu3_1"]
    assert torch.equal(vgg(picture)["relu3_1"], alone)
    assert alone.min() == 0  # after the ReLU


def test_style_statistics_are_given_in_the_place_of_features(vgg, pair):
    features = vgg(pair[0])
    asked = ["relu2_1", "relu4_1"]
    found = vgg(pair[0], statistics=asked)
    assert set(found) == set(features)
    statistics = nst.style_statistics(features, asked)
    for layer, tensor in found.items():
        torch.testing.assert_close(tensor, statistics.get(layer, features[layer]))


def test_a_luminance_is_seen_as_a_grey_picture(vgg):
    luminance = torch.rand(1, 1, 16, 20)
    grey = vgg(luminance.repeat(1, 3, 1, 1))
    for layer, features in vgg(luminance).items():
        assert torch.equal(features, grey[layer])


def test_pooling_before_the_relu_changes_nothing(vgg, pair):
    """The network pools first where nobody asks for that ReLU; the maximum is the same."""
    last_of_blocks = ("relu1_2", "relu2_2", "relu3_4", "relu4_4")
    asked = nst.VGG19Features((*vgg.layers, *last_of_blocks), "bundled")

    def pools_first(network) -> bool:
        names = [name for name, _ in network.network.named_children()]
        return names.index("pool1") < names.index("relu1_2")

    assert pools_first(vgg)
    assert not pools_first(asked)
    features = asked(pair[0], vgg.layers)
    for layer, expected in vgg(pair[0]).items():
        assert torch.equal(features[layer], expected)


@pytest.mark.parametrize(
    "layers", [["relu3_2"], ["relu9_9"], ["conv1_1", "relu2_1"], [], "relu1_1", [("relu1_1",)]]
)
def test_a_layer_that_the_network_was_not_made_for_is_refused(vgg, layers):
    with pytest.raises(ValueError, match=r"^layers .*relu4_2.*relu2_1") as error:
        vgg(torch.rand(1, 3, 16, 16), layers)
    assert repr(layers) in str(error.value)


@pytest.mark.parametrize(
    "layers", [("relu6_1",), ("conv4_1",), (), "relu4_2", ("relu4_2", 7), ([],), None]
)
def test_a_layer_that_vgg19_does_not_have_is_refused(layers):
    with pytest.raises(ValueError, match=r"^layers .*relu1_1.*relu5_4") as error:
        nst.VGG19Features(layers, "bundled")
    assert repr(layers) in str(error.value)


@pytest.mark.parametrize("pooling", ["median", None, 2])
def test_a_pooling_that_there_is_not_is_refused(pooling):
    with pytest.raises(ValueError, match=r"^pooling .*'max'.*'average'") as error:
        nst.VGG19Features(weights="bundled", pooling=pooling)
    assert repr(pooling) in str(error.value)


def test_layers_may_be_a_list_and_one_may_serve_content_and_style():
    network = nst.VGG19Features(["relu2_1", "relu1_1", "relu2_1"], "bundled")
    assert list(network(torch.rand(1, 3, 16, 16))) == ["relu1_1", "relu2_1"]


def test_a_network_for_a_config_is_made_as_the_config_says():
    config = replace(
        TINY,
        content_layers=("relu2_2",),
        style_layers=("relu1_1", "relu2_2"),
        style_layer_weights=(1, 1),
        pooling="average",
        precision="bfloat16",
    )
    network = nst.VGG19Features.from_config(config)
    assert set(network.layers) == {"relu1_1", "relu2_2"}
    assert (network.pooling, network.source) == ("average", "bundled")
    assert (network.dtype, network.device) == (torch.bfloat16, torch.device("cpu"))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}


def size_in_memory(network: nn.Module) -> int:
    return sum(parameter.untyped_storage().nbytes() for parameter in network.parameters())


def test_only_the_weights_that_are_needed_stay_in_memory(checkpoint, tmp_path):
    assert 51e6 < size_in_memory(nst.VGG19Features((DEEPEST,), checkpoint[0])) < 53e6
    network = nst.VGG19Features(("relu1_2",), checkpoint[0])
    shared = torch.rand(1_000_000)  # a file may keep all its tensors in one piece of memory
    views = {
        "features.0.weight": shared[:1728].view(64, 3, 3, 3),
        "features.0.bias": shared[:64],
        "features.2.weight": shared[:36864].view(64, 64, 3, 3),
        "features.2.bias": shared[:64],
    }
    torch.save(views, tmp_path / "views.pth")
    of_views = nst.VGG19Features(("relu1_2",), tmp_path / "views.pth")
    assert size_in_memory(of_views) == size_in_memory(network)


def test_the_losses_do_not_depend_on_the_scales_of_the_layers(vgg, pictures):
    """Sources of weights differ in them, and settings mean the same with all sources."""
    rescaled = copy.deepcopy(vgg)
    scale = 1.0
    for number, module in enumerate(rescaled.network):
        if isinstance(module, nn.Conv2d):  # a ReLU passes the scale of its layer on
            module.weight /= scale
            scale = 10.0 ** (number % 5 - 2)
            module.weight *= scale
            module.bias *= scale
    photo, painting = pictures["china"], pictures["starry_night"]
    trio = photo.flip(3), photo, painting
    expected, gradient = losses_and_gradient(vgg, *trio)
    losses, its_gradient = losses_and_gradient(rescaled, *trio)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert (its_gradient - gradient).norm() < 1e-2 * gradient.norm()


# Half precision -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def half(request) -> nst.VGG19Features:
    return nst.VGG19Features(weights="bundled", dtype=getattr(torch, request.param))


def test_half_precision_sees_what_float32_sees(vgg, half, pair):
    bound, likeness = {torch.bfloat16: (0.03, 0.97), torch.float16: (0.005, 0.99)}[half.dtype]
    photo, painting = pair
    trio = photo.flip(3), photo, painting
    expected, gradient = losses_and_gradient(vgg, *trio)
    losses, half_gradient = losses_and_gradient(half, *trio)
    assert losses == pytest.approx(expected, rel=bound)
    assert half_gradient.dtype == torch.float32
    assert half_gradient.isfinite().all()
    assert F.cosine_similarity(half_gradient.flatten(), gradient.flatten(), 0) > likeness


@pytest.mark.slow
def test_half_precision_paints_the_same_picture(vgg, half, pair):
    """Rounding moves single strokes, so the pictures are compared blurred, and by their losses."""
    steps = {torch.bfloat16: 12, torch.float16: 3}[half.dtype]  # a CPU is slow in float16
    config = replace(TINY, num_steps=steps, scales=1)
    in_half = last(nst.stylize(*pair, config, network=half))
    in_full = last(nst.stylize(*pair, config, network=vgg))
    assert in_half.image.dtype == torch.float32
    difference = F.avg_pool2d(in_half.image - in_full.image, 4).abs().mean()
    assert difference < 0.25 * (in_full.image - pair[0]).abs().mean()
    assert in_half.losses["total"].item() == pytest.approx(in_full.losses["total"].item(), rel=0.1)


def test_float16_has_room_for_the_loudest_features(pair):
    """The bundled network's go up to some 20,000, and float16 ends at 65,504."""
    network = nst.VGG19Features(weights="bundled", dtype=torch.float16)
    loud = (pair[1] > 0.5).float()  # as much contrast as a picture can have
    assert max(features.max() for features in network(loud).values()) < 65_504 / 16


# Strips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, nst.ALL_BLOCKS])
@pytest.mark.parametrize("size", [(129, 70), (96, 64), (65, 33), (16, 90)])
def test_in_strips_the_losses_and_the_gradient_are_the_same(
    monkeypatch, vgg, pictures, size, blocks
):
    """Strips of 16 rows, so that most blocks have several; odd heights, for an odd last one."""
    monkeypatch.setattr(nst, "STRIP_ROWS", 16)
    trio = [nst.resize(pictures[name], size) for name in ("chelsea", "china", "starry_night")]
    expected, gradient = losses_and_gradient(vgg, *trio)
    losses, its_gradient = losses_and_gradient(vgg, *trio, blocks_in_strips=blocks)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert (its_gradient - gradient).norm() < 1e-4 * gradient.norm()


@pytest.mark.parametrize("pooling", ["max", "average"])
@torch.no_grad()
def test_in_strips_the_features_are_the_same_in_every_layer(monkeypatch, pooling, pictures):
    monkeypatch.setattr(nst, "STRIP_ROWS", 8)
    layers = ("relu1_1", "relu1_2", "relu2_2", "relu3_4", "relu4_4")
    network = nst.VGG19Features(layers, "bundled", pooling)
    in_strips = network(pictures["china"], blocks_in_strips=nst.ALL_BLOCKS)
    for layer, features in network(pictures["china"]).items():
        torch.testing.assert_close(in_strips[layer], features, rtol=1e-4, atol=1e-3)


def test_in_strips_nothing_but_the_blocks_outputs_is_kept(monkeypatch, vgg, pictures):
    monkeypatch.setattr(nst, "STRIP_ROWS", 16)

    def kept(blocks: int) -> int:
        sizes = []

        def note(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            picture = pictures["china"].clone().requires_grad_()
            vgg(picture, statistics=nst.STYLE_LAYERS, blocks_in_strips=blocks)
        return sum(sizes)

    plain, first_in_strips, all_in_strips = (kept(blocks) for blocks in (0, 1, nst.ALL_BLOCKS))
    assert first_in_strips * 1.25 < plain
    assert all_in_strips * 4 < plain


def test_in_strips_no_piece_of_a_picture_is_higher_than_a_strip_and_its_halo(monkeypatch, vgg):
    monkeypatch.setattr(nst, "STRIP_ROWS", 16)
    heights = []
    hook = vgg.network.get_submodule("conv1_1").register_forward_hook(
        lambda _, inputs, __: heights.append(inputs[0].shape[2])
    )
    vgg(torch.rand(1, 3, 96, 16), blocks_in_strips=1)
    hook.remove()
    assert len(heights) == 96 / 16
    assert max(heights) == 16 + 2 * 2  # two convolutions in the block, both ways
